"""Keeps the import paths of version 0.2: ``emim_solo.objective`` is ``emim_solo.emim.objective``."""

from __future__ import annotations

import importlib
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

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


class OldPaths(MetaPathFinder, Loader):
    """An import hook that gives the module of the new path for the old path, so that both names are one module."""

    def find_spec(self, fullname: str, *where: Any) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == "emim_solo" and name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(f"emim_solo.{MOVED[spec.name.partition('.')[2]]}")
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # because the import system has just set the spec of the old path
