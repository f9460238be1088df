"""Import paths of version 0.2 that still lead to their modules: ``emim_solo.objective`` is ``emim_solo.emim.objective``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGE = "emim_solo"
MOVED = {
    "architectures": "checkpoints.architectures",
    "configs": "ground.configs",
    "data": "images.folders",
    "diagnostics": "emim.measures",
    "errors": "ground.errors",
    "files": "ground.files",
    "method": "emim.method",
    "objective": "emim.objective",
    "pretraining": "training.pretraining",
    "registration": "plugin.registration",
    "rows": "results.rows",
    "scores": "emim.measures",
    "suite.face": "suite.api",
    "theory": "emim.theory",
}


class _Forward(Loader):
    """Gives the module of the new path under the old one: there is one module, whatever it is called."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(f"{PACKAGE}.{MOVED[spec.name.removeprefix(f'{PACKAGE}.')]}")
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # the import system has just set that of the old path


class _OldPaths(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, _Forward()) if package == PACKAGE and name in MOVED else None


def install() -> None:
    """From now on the old paths can be imported. Nothing is loaded before it is asked for."""
    if not any(isinstance(finder, _OldPaths) for finder in sys.meta_path):
        sys.meta_path.append(_OldPaths())
