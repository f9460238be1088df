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

if TYPE_CHECKING:  # a name as itself: type checkers take it for a name of this package
    from emim_solo.emim.loss import EMIMLoss as EMIMLoss
    from emim_solo.emim.measures import view_information as view_information
    from emim_solo.emim.objective import emim_loss_func as emim_loss_func
    from emim_solo.emim.objective import mutual_information as mutual_information
    from emim_solo.emim.objective import null_mutual_information as null_mutual_information
    from emim_solo.ground.errors import UsageError as UsageError
    from emim_solo.plugin.registration import register as register

_HOME = {
    "EMIMLoss": "emim.loss",
    "UsageError": "ground.errors",
    "emim_loss_func": "emim.objective",
    "mutual_information": "emim.objective",
    "null_mutual_information": "emim.objective",
    "register": "plugin.registration",
    "view_information": "emim.measures",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"emim_solo.{_HOME[name]}"), name)
    raise AttributeError(f"module 'emim_solo' has no attribute {name!r}")
