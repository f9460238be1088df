"""Which checkpoints solo-learn main's AutoResumer may offer to a run of EMIM.

main_pretrain.py and main_linear.py of a clone continue the newest checkpoint that agrees in a dozen settings; neither
the seed nor ``method_kwargs`` is among them. The second job of a sweep over those would be the first one, continued.
Here all settings must agree that change a result. A run of another method is the suite's affair and stays as it is.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from emim_solo.ground import compare
from emim_solo.suite.api import as_dict


def compare_all_settings_of_emim() -> None:
    """Have AutoResumer compare every setting of a run of EMIM. Safe to call again; imports nothing of the suite."""
    resumer = getattr(sys.modules.get("solo.utils.auto_resumer"), "AutoResumer", None)
    if resumer is None or hasattr(resumer.find_checkpoint, "__wrapped__"):
        return
    suites_find_checkpoint = resumer.find_checkpoint

    @functools.wraps(suites_find_checkpoint)
    def find_checkpoint(self: Any, cfg: Any) -> Any:
        # 1.0.2's takes a Namespace, and its caller compares what it gets with the whole config
        if not isinstance(cfg, DictConfig) or "emim" not in (cfg.get("method"), cfg.get("pretrain_method")):
            return suites_find_checkpoint(self, cfg)
        here = as_dict(OmegaConf.create(json.loads(json.dumps(as_dict(cfg), default=str))))
        candidates = []
        for arguments in Path(self.checkpoint_dir).rglob("args.json"):
            in_one_folder = copy.copy(self)
            in_one_folder.checkpoint_dir = arguments.parent
            try:
                there = as_dict(OmegaConf.create(json.loads(arguments.read_text())))
                checkpoint, wandb_run_id = suites_find_checkpoint(in_one_folder, cfg)
            except (OSError, ValueError, OmegaConfBaseException):  # cut short, or another job is writing it
                continue
            if checkpoint is not None:  # the suite takes any of a folder's, with keep_prev they are many
                newest = max(arguments.parent.glob("*.ckpt"), key=os.path.getctime)
                differing = compare.differences(there, here, but=compare.NO_RESULT)
                candidates.append((os.path.getctime(newest), newest, wandb_run_id, differing))
        candidates.sort(reverse=True, key=lambda candidate: candidate[0])
        for _, checkpoint, wandb_run_id, differing in candidates:
            if not differing:
                from emim_solo.checkpoints.opening import last_checkpoint  # which needs all of the suite

                return last_checkpoint(checkpoint.parent) or checkpoint, wandb_run_id
        if candidates:
            _, checkpoint, _, differing = candidates[0]
            rank_zero_warn(
                f"EMIM does not continue '{checkpoint}', which is of other settings: {', '.join(differing)}; "
                "training starts afresh"
            )
        return None, None

    resumer.find_checkpoint = find_checkpoint
