"""Puts EMIM, and methods of other packages, into solo-learn's METHODS: at once where it is loaded, else when it gets loaded.

Another package names its methods in the entry-point group ``emim_solo.methods``, as docs/add-a-method.md shows.

Loading solo-learn takes many seconds, so nothing here imports it (or torch) of its own accord: an import hook waits
for ``solo``. The clone or the installed release stays as it is; what changes is the dict in memory, in place, because
the suite's scripts hold it by name. A process that Lightning starts for DDP runs the same command and therefore
registers in the same way.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

_FACES = ("emim_solo.suite.main", "emim_solo.suite.release_102.suite")


def register() -> None:
    """Have ``solo.methods.METHODS["emim"]`` from now on. Safe to call again, and before ``solo`` is imported.

    Raises:
        UsageError: solo-learn is loaded, in a version that is not supported. Where it is loaded later the same message
            is a warning, so that those who do not use EMIM can work on.
    """
    if not any(isinstance(finder, _SoloFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _SoloFinder())
    if hasattr(sys.modules.get("solo.methods"), "METHODS"):
        _add()
        _adapt()


def _add() -> None:
    from emim_solo.suite import load_suite
    from emim_solo.suite.api import put_into

    emim = load_suite().emim_class()  # which may be what loads solo.methods
    put_into(sys.modules["solo.methods"].METHODS, emim)


def _adapt() -> None:
    from emim_solo.plugin import auto_resumer
    from emim_solo.suite import dali

    dali.free_cpu_pipelines_from_cuda()
    auto_resumer.compare_all_settings_of_emim()


class _SoloFinder(MetaPathFinder):
    """Finds ``solo`` as the other finders do, and has it register EMIM while it is loaded.

    It stays in ``sys.meta_path``: to ask for a spec is not to load it (``importlib.util.find_spec("solo")``), and a
    reloaded ``solo.methods`` has a fresh METHODS.
    """

    def __init__(self) -> None:
        self.loading = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in ("solo", "solo.methods", *_FACES):
            return None
        spec = self._from_other_finders(fullname, path, target)
        if spec is None or spec.loader is None or not _is_solo_learn(spec):
            return spec
        execute = spec.loader.exec_module

        def execute_solo(module: ModuleType) -> None:
            self.loading = True
            try:
                # Before the package's own imports: 1.0.2 cannot be imported at all until the face has put back what
                # has moved since 2021, and no module of `solo` is half loaded yet.
                self._add_unless_unsupported()
                execute(module)
            finally:
                self.loading = False
            _adapt()

        def execute_methods(module: ModuleType) -> None:
            execute(module)
            if not self.loading:  # `solo` was there before this finder, or this is a reload
                self._add_unless_unsupported()

        def execute_face(module: ModuleType) -> None:
            execute(module)
            from emim_solo.suite.api import put_into  # which the face has loaded by now

            put_into(sys.modules["solo.methods"].METHODS, module.EMIM)

        # Patched, not wrapped: inspect and importlib.resources ask a loader for more than this one function.
        spec.loader.exec_module = {  # type: ignore[method-assign]
            "solo": execute_solo,
            "solo.methods": execute_methods,
        }.get(fullname, execute_face)
        return spec

    def _from_other_finders(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    return spec
        return None

    def _add_unless_unsupported(self) -> None:
        from emim_solo.ground.errors import UsageError

        if self.loading and any(name in sys.modules for name in _FACES):
            return  # it is a face that is importing `solo`: it cannot be asked yet, and `execute_face` follows
        try:
            _add()
        except UsageError as error:
            warnings.warn(f"method 'emim' is not available: {error}", stacklevel=2)


def _is_solo_learn(spec: ModuleSpec) -> bool:
    """Whether a spec is solo-learn's: other packages are called ``solo`` too."""
    if spec.name != "solo":
        return True
    return any((Path(folder) / "methods" / "base.py").is_file() for folder in spec.submodule_search_locations or ())
