"""Adds EMIM, and the methods of other packages, to solo-learn's METHODS: at once if solo-learn is loaded, else when it is.

Another package names its methods in the entry-point group ``emim_solo.methods``, as docs/add-a-method.md shows.
Loading solo-learn takes many seconds, so an import hook waits for ``solo``. No file of solo-learn changes. The dict METHODS is
changed in place, because solo-learn's scripts import it by name.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType


def register() -> None:
    """Make ``solo.methods.METHODS["emim"]`` available. May be called again, and before ``solo`` is imported.

    Raises:
        UsageError: a version of solo-learn that is not supported is loaded. If it is loaded later, there is only a warning.
    """
    if not any(isinstance(finder, _SoloFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _SoloFinder())
    if hasattr(sys.modules.get("solo.methods"), "METHODS"):
        from emim_solo.suite import load_suite

        load_suite().methods()
        _adapt_scripts()


def _adapt_scripts() -> None:
    """Change, in modules that are loaded, what solo-learn's main_pretrain.py uses beside METHODS."""
    from emim_solo.plugin import auto_resumer
    from emim_solo.suite import dali

    dali.free_cpu_pipelines_from_cuda()
    auto_resumer.compare_all_settings_of_emim()


class _SoloFinder(MetaPathFinder):
    """Finds ``solo`` by the other finders. EMIM is registered only when ``solo`` is loaded, not when its spec is asked for."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "solo":
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or spec.loader is None or not _is_solo_learn(spec):
            return spec
        execute = spec.loader.exec_module

        def register_and_execute(module: ModuleType) -> None:
            # First, because 1.0.2 can be imported only after load_suite has restored names that libraries have moved since 2021.
            _add_methods_unless_unsupported()
            execute(module)
            _adapt_scripts()

        # Patched, not wrapped, because inspect and importlib.resources use other functions of the loader, too.
        spec.loader.exec_module = register_and_execute  # type: ignore[method-assign]
        return spec


def _add_methods_unless_unsupported() -> None:
    from emim_solo.ground.errors import UsageError
    from emim_solo.suite import load_suite

    if {"emim_solo.suite.main", "emim_solo.suite.release_102"}.intersection(sys.modules):
        return  # load_suite is importing `solo` and will add them
    try:
        load_suite().methods()
    except UsageError as error:
        warnings.warn(f"method 'emim' is not available: {error}", stacklevel=2)


def _is_solo_learn(spec: ModuleSpec) -> bool:
    """Whether a spec is solo-learn's, because other packages are called ``solo``, too."""
    return any((Path(folder) / "methods" / "base.py").is_file() for folder in spec.submodule_search_locations or ())
