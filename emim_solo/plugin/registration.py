"""Puts EMIM, and methods of other packages, into solo-learn's METHODS: at once where it is loaded, else when it gets loaded.

Another package names its methods in the entry-point group ``emim_solo.methods``, as docs/add-a-method.md shows.
Loading solo-learn takes many seconds, so an import hook waits for ``solo``. No file of it changes, only the dict in
memory, in place: the suite's scripts hold it by name.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

_SUITES = ("emim_solo.suite.main", "emim_solo.suite.release_102")


def register() -> None:
    """Have ``solo.methods.METHODS["emim"]`` from now on. Safe to call again, and before ``solo`` is imported.

    Raises:
        UsageError: solo-learn is loaded, in a version that is not supported. Of one that is loaded later it is a warning.
    """
    if not any(isinstance(finder, _SoloFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _SoloFinder())
    if hasattr(sys.modules.get("solo.methods"), "METHODS"):
        from emim_solo.suite import load_suite

        load_suite().methods()
        _adapt_scripts()


def _adapt_scripts() -> None:
    """Change what main_pretrain.py of a clone uses beside METHODS, as far as it is loaded."""
    from emim_solo.plugin import auto_resumer
    from emim_solo.suite import dali

    dali.free_cpu_pipelines_from_cuda()
    auto_resumer.compare_all_settings_of_emim()


class _SoloFinder(MetaPathFinder):
    """Finds ``solo`` as the other finders do, and registers EMIM when it is loaded: to ask for a spec is not to load it."""

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
            # First: 1.0.2 cannot be imported at all before load_suite has put back what has moved since 2021.
            _add_methods_unless_unsupported()
            execute(module)
            _adapt_scripts()

        # Patched, not wrapped: inspect and importlib.resources ask a loader for more than this one function.
        spec.loader.exec_module = register_and_execute  # type: ignore[method-assign]
        return spec


def _add_methods_unless_unsupported() -> None:
    from emim_solo.ground.errors import UsageError
    from emim_solo.suite import load_suite

    if any(module in sys.modules for module in _SUITES):  # load_suite is what imports `solo`, and adds the methods then
        return
    try:
        load_suite().methods()
    except UsageError as error:
        warnings.warn(f"method 'emim' is not available: {error}", stacklevel=2)


def _is_solo_learn(spec: ModuleSpec) -> bool:
    """Whether a spec is solo-learn's: other packages are called ``solo`` too."""
    return any((Path(folder) / "methods" / "base.py").is_file() for folder in spec.submodule_search_locations or ())
