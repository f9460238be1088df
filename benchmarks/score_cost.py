"""What the score takes while training: seconds of one scoring beside those of one epoch, in one run.

    python benchmarks/score_cost.py [--method emim] [key=value ...]

Two epochs of the shipped pretrain/digits config, each scored; key=value changes it, as after `emim-solo pretrain`.
"""

from __future__ import annotations

import argparse
import os
import tempfile

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from emim_solo.evaluation.score import Protocol
from emim_solo.ground import configs
from emim_solo.training.live_score import smallest_interval
from emim_solo.training.pretraining import prepare, pretrain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="emim", help="name of a config in pretrain/digits")
    arguments, changes = parser.parse_known_args()
    with initialize_config_dir(config_dir=str(configs.find("pretrain/digits")), version_base="1.2"):
        cfg = compose(
            arguments.method, overrides=["score.enabled=True", "score.every_n_epochs=1", "max_epochs=2", *changes]
        )
    OmegaConf.set_struct(cfg, False)
    with tempfile.TemporaryDirectory() as folder:
        cfg.checkpoint.dir = folder
        row = pretrain(prepare(cfg))
    trained = row["images"]["train"]["images"] // cfg.optimizer.batch_size * cfg.optimizer.batch_size
    scored, crops = row["score"], sum(view["num_crops"] for view in row["config"]["augmentations"])
    one = scored["seconds"] / scored["scorings"]
    epoch = (row["seconds"] - scored["seconds"]) / row["epochs"]
    every = smallest_interval(scored["images"], Protocol.read(cfg.score.protocol).views, crops, trained)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores"
    print(f"{row['method']} on {device}: epoch {epoch:.1f} s, scoring {one:.1f} s, {one / epoch:.2f} of it")
    print(f"every {every} epochs by the rule: {one / epoch / every:.1%} of training")


if __name__ == "__main__":
    main()
