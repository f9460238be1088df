"""EMIM: explicit mutual information maximisation, a self-supervised learning method for solo-learn.

Importing this package imports neither torch nor solo-learn. The names below are loaded at their first use.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from emim_solo.ground.moved import OldPaths

__version__ = "0.3.0"

sys.meta_path.append(OldPaths())

if TYPE_CHECKING:
    from emim_solo.emim.loss import EMIMLoss
    from emim_solo.emim.measures import view_information
    from emim_solo.emim.objective import emim_loss_func, mutual_information, null_mutual_information
    from emim_solo.ground.errors import UsageError
    from emim_solo.plugin.registration import register

_HOME = {
    "EMIMLoss": "emim.loss",
    "UsageError": "ground.errors",
    "emim_loss_func": "emim.objective",
    "mutual_information": "emim.objective",
    "null_mutual_information": "emim.objective",
    "register": "plugin.registration",
    "view_information": "emim.measures",
}
__all__ = [
    "EMIMLoss",
    "UsageError",
    "emim_loss_func",
    "mutual_information",
    "null_mutual_information",
    "register",
    "view_information",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"emim_solo.{_HOME[name]}"), name)
    raise AttributeError(f"module 'emim_solo' has no attribute {name!r}")
