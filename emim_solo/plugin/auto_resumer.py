"""Restricts the checkpoints from which solo-learn main's AutoResumer may resume a run of EMIM.

solo-learn's main_pretrain.py and main_linear.py resume from the newest checkpoint that agrees in a dozen settings. The seed and
``method_kwargs`` are not among these, so the second job of a sweep over them would resume the first one. Here all settings that
change a result must agree. Runs of other methods are resumed as in solo-learn.
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
    """Make AutoResumer compare every setting of a run of EMIM. May be called again; does not import solo-learn."""
    resumer = getattr(sys.modules.get("solo.utils.auto_resumer"), "AutoResumer", None)
    if resumer is None or hasattr(resumer.find_checkpoint, "__wrapped__"):
        return
    suites_find_checkpoint = resumer.find_checkpoint

    @functools.wraps(suites_find_checkpoint)
    def find_checkpoint(self: Any, cfg: Any) -> Any:
        # 1.0.2 passes a Namespace, and keeps its own rule
        if not isinstance(cfg, DictConfig) or "emim" not in (cfg.get("method"), cfg.get("pretrain_method")):
            return suites_find_checkpoint(self, cfg)
        here = json.loads(json.dumps(as_dict(cfg), default=str))  # as args.json has it
        candidates = []
        for arguments in Path(self.checkpoint_dir).rglob("args.json"):
            in_one_folder = copy.copy(self)
            in_one_folder.checkpoint_dir = arguments.parent
            try:
                there = as_dict(OmegaConf.create(json.loads(arguments.read_text())))
                checkpoint, wandb_run_id = suites_find_checkpoint(in_one_folder, cfg)
            except (OSError, ValueError, OmegaConfBaseException):  # the file is damaged, or another job is writing it
                continue
            if checkpoint is not None:  # solo-learn takes any file of a folder; keep_prev keeps many
                newest = max(arguments.parent.glob("*.ckpt"), key=os.path.getctime)
                differing = compare.differences(there, here, but=compare.MAY_DIFFER)
                candidates.append((os.path.getctime(newest), newest, wandb_run_id, differing))
        candidates.sort(reverse=True, key=lambda candidate: candidate[0])
        for _, checkpoint, wandb_run_id, differing in candidates:
            if not differing:
                from emim_solo.checkpoints.opening import last_checkpoint  # imports all of solo-learn

                return last_checkpoint(checkpoint.parent) or checkpoint, wandb_run_id
        if candidates:
            _, checkpoint, _, differing = candidates[0]
            rank_zero_warn(
                f"EMIM does not continue '{checkpoint}', which has other settings: {', '.join(differing)}; "
                "training starts afresh"
            )
        return None, None

    resumer.find_checkpoint = find_checkpoint
