"""One interface, :class:`Suite`, to both generations of solo-learn ("the suite"). Outside, only ``plugin`` asks which is installed."""

from __future__ import annotations

import gc
import importlib.util
import re
from functools import cache
from importlib import metadata
from pathlib import Path

from emim_solo.ground.errors import UsageError
from emim_solo.ground.imports import no_garbage_collection
from emim_solo.suite.api import Suite, as_dict

__all__ = ["Suite", "as_dict", "load_suite"]

_INSTALL = (
    "install solo-learn main (a clone of github.com/vturrisi/solo-learn on the Python path) "
    "or the registry's release: pip install --no-deps solo-learn==1.0.2"
)


@cache
@no_garbage_collection()
def load_suite() -> Suite:
    """The solo-learn that ``import solo`` finds, with EMIM and the methods of other packages added to its METHODS.

    Raises:
        UsageError: there is no solo-learn, or its version is neither main (1.0.6) nor 1.0.2.
    """
    folder = _solo_folder()
    version = _version(folder)
    # Files decide, not package metadata: a clone on the path shadows an installed release.
    if (folder / "data").is_dir() and (folder / "args" / "pretrain.py").is_file():
        from emim_solo.suite.main import MainSuite

        suite: Suite = MainSuite(version)
    elif version == "1.0.2":
        from emim_solo.suite.release_102 import Release102Suite

        suite = Release102Suite(version)
    else:
        raise UsageError(
            "solo-learn",
            f"solo-learn {version} at '{folder}' is not supported: expected main (1.0.6) or 1.0.2; {_INSTALL}",
        )
    suite.methods()
    gc.freeze()  # what was imported stays: later collections, and that at exit (1.6 s), leave it out
    return suite


def _solo_folder() -> Path:
    spec = importlib.util.find_spec("solo")
    locations = list(spec.submodule_search_locations or []) if spec else []
    if not locations or not (Path(locations[0]) / "methods" / "base.py").is_file():
        raise UsageError("solo-learn", f"no solo-learn found: 'import solo' must work; {_INSTALL}")
    return Path(locations[0])


def _version(folder: Path) -> str:
    """Version of the solo-learn in ``folder``: that of its clone, else that of the installed distribution."""
    setup = folder.parent / "setup.py"
    if setup.is_file():
        match = re.search(r"version=\"([^\"]+)\"", setup.read_text())
        return match.group(1) if match else "unknown"
    try:
        distribution = metadata.distribution("solo-learn")
    except metadata.PackageNotFoundError:
        return "unknown"
    installed = Path(str(distribution.locate_file("solo")))
    return distribution.version if installed.resolve() == folder.resolve() else "unknown"
