"""solo-learn 1.0.2 (November 2021), the only release on the package registry. Its code is in this folder.

Outside this folder are only a branch of :func:`emim_solo.suite.load_suite`, the name of its backbone in
:mod:`emim_solo.suite.api`, a module's name in :mod:`emim_solo.plugin.registration`, and a test for its Namespace in
:mod:`emim_solo.plugin.auto_resumer`.
"""

from emim_solo.suite.release_102 import compat

compat.install()  # before anything of `solo` is imported

from emim_solo.suite.release_102.suite import Release102Suite  # noqa: E402

__all__ = ["Release102Suite"]
