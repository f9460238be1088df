"""What only the suite knows of a config, kwargs of optimizers, backbones and methods: taken, or refused in one line."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from omegaconf import DictConfig

from emim_solo.ground.errors import UsageError
from emim_solo.suite import load_suite
from emim_solo.training.pretraining import prepare

MakeCfg = Callable[..., DictConfig]

VALUES: list[Any] = [
    *(None, "", "text", "1", "../../x", "x" * 300, -1, 0, 1, 7, 1_000_000, 1.5, math.inf, -math.inf, math.nan),
    *(True, False, [], [1], [0.9, 0.99], {}, {"a": 1}),
]
KEYS: dict[str, dict[str, Any]] = {  # and the config that each is set in
    **{
        f"optimizer.kwargs.{key}": {"optimizer.name": name}
        for name, keys in {
            "sgd": ("momentum", "dampening", "nesterov", "maximize"),
            "lars": ("momentum", "eta", "clip_lr", "exclude_bias_n_norm"),
            "adamw": ("betas", "eps", "amsgrad"),
        }.items()
        for key in keys
    },
    **{f"backbone.kwargs.{key}": {} for key in ("zero_init_residual", "num_classes", "no_such_key", "norm_layer")},
    **{
        f"backbone.kwargs.{key}": {"backbone.name": "vit_tiny"}
        for key in ("img_size", "patch_size", "global_pool", "drop_path_rate", "in_chans", "class_token")
    },
    **{
        f"method_kwargs.{key}": {}
        for key in ("proj_hidden_dim", "proj_output_dim", "series_order", "weight", "marginal")
    },
    **{f"method_kwargs.{key}": {"method": "byol"} for key in ("proj_hidden_dim", "proj_output_dim", "pred_hidden_dim")},
    **{f"method_kwargs.{key}": {"method": "swav"} for key in ("num_prototypes", "queue_size", "temperature")},
    **{f"scheduler.{key}": {"scheduler.name": "step"} for key in ("name", "lr_decay_steps", "interval")},
    **{f"momentum.{key}": {"method": "byol"} for key in ("base_tau", "final_tau", "classifier")},
}
GIGABYTES = ("backbone.kwargs.", "method_kwargs.")  # a network of a million neurons is a user's right
CASES = [(key, value) for key in KEYS for value in VALUES if not (value == 1_000_000 and key.startswith(GIGABYTES))]
SAMPLE = 25


def first_step(cfg: DictConfig) -> None:
    """All that a run does with its config until the first loss."""
    suite, run = load_suite(), prepare(cfg)
    model: Any = suite.build(run.config)
    model.log = model.log_dict = lambda *_, **__: None
    model.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, log_every_n_steps=0)
    model.on_train_start()
    size = run.config.augmentations[0].crop_size
    batch = [torch.arange(4), [torch.randn(4, 3, size, size) for _ in range(2)], torch.arange(4)]
    with suppress(FloatingPointError):  # a loss that is not finite is said in one line, too
        model.training_step(batch, 0)


@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.every_value)])
def test_any_value_of_any_key_is_taken_or_refused_in_one_line(everything: bool, make_cfg: MakeCfg) -> None:
    seed = int(os.environ.get("SEED", random.randrange(2**32)))
    print(f"SEED={seed}")
    failures = []
    for key, value in CASES if everything else random.Random(seed).sample(CASES, SAMPLE):
        settings = {"method_kwargs": {"proj_hidden_dim": 16, "proj_output_dim": 8, "pred_hidden_dim": 8}} | KEYS[key]
        settings |= {"optimizer.batch_size": 4, "knn_eval.enabled": False, "optimizer.kwargs": {}, key: value}
        try:
            first_step(make_cfg(**{name.replace(".", "__"): each for name, each in settings.items()}))
        except UsageError as error:
            if "\n" in str(error) or not error.key:
                failures.append(f"{key}={value!r}: not one line, or without a key: {error}")
        except BaseException as error:
            failures.append(f"{key}={value!r}: {type(error).__name__}: {str(error)[:100]}")
    assert not failures, "\n".join(failures)
