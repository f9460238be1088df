"""Every method of the suite, of whichever generation is installed: trains, is saved, resumes, or is refused in a line."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL_BACKBONE
from lightning.pytorch import LightningModule, Trainer
from omegaconf import DictConfig
from torch import nn

from emim_solo.checkpoints.opening import open_checkpoint
from emim_solo.ground.errors import UsageError
from emim_solo.suite import load_suite
from emim_solo.suite.fixes import zero_over_nothing
from emim_solo.training.pretraining import prepare, pretrain

MakeCfg = Callable[..., DictConfig]
Refused = Callable[..., AbstractContextManager[Any]]

METHODS = sorted(load_suite().methods())
SMALL: dict[str, Any] = {
    "proj_hidden_dim": 32,
    "proj_output_dim": 16,
    "pred_hidden_dim": 16,
    "temperature": 0.2,
    "temperature_q": 0.1,
    "temperature_k": 0.04,
    "queue_size": 64,
    "num_prototypes": 8,
}
OWN: dict[str, dict[str, Any]] = {
    "deepclusterv2": {"num_prototypes": [4, 4]},
    "dino": {"warmup_teacher_temperature_epochs": 1},
    "mae": {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2},
    "swav": {"epoch_queue_starts": 1},
    "wmse": {"whitening_size": 8, "proj_output_dim": 4},
}
OF_LABELS = ("acc", "class_loss", "val_loss")


@pytest.fixture
def small(make_cfg: MakeCfg, three_classes: Path) -> MakeCfg:
    """``small("byol", labels=False)``: three steps an epoch of the smallest backbone."""

    def make(method: str, labels: bool = True, **overrides: Any) -> DictConfig:
        settings: dict[str, Any] = {
            "method": method,
            "method_kwargs": SMALL | OWN.get(method, {}),
            # MAE and MoCo v3 have ViTs of their own, which take no mlp_ratio.
            "backbone": {"name": "vit_tiny"} if method in ("mae", "mocov3") else SMALL_BACKBONE,
            "data__train_path": str(three_classes / ("train" if labels else "flat")),
            "data__val_path": str(three_classes / "val") if labels else None,
            "data__no_labels": not labels,
            "optimizer": {"name": "sgd", "batch_size": 8, "lr": 0.1, "classifier_lr": 0.1, "weight_decay": 1e-4},
            "momentum": {"base_tau": 0.9, "classifier": True},
            "checkpoint__keep_prev": True,
            "knn_eval__k": 2,
            "log_every_n_steps": 1,
            "enable_model_summary": False,
        }
        return make_cfg(**settings | overrides)

    return make


def checkpoints(row: dict[str, Any]) -> list[Path]:
    return sorted(Path(row["checkpoint"]).glob("*.ckpt"))


def test_no_method_of_the_suite_is_left_out() -> None:
    from solo import methods

    assert set(METHODS) == methods.METHODS.keys() - {"base", "linear"} | {"emim"}
    assert len(METHODS) >= 15


@pytest.mark.parametrize("method", METHODS)
def test_resumed_after_an_epoch_is_the_uninterrupted_run(method: str, small: MakeCfg, tmp_path: Path) -> None:
    """Two epochs, and the second of them again from the checkpoint of the first: the same metrics and weights."""
    whole = pretrain(prepare(small(method, max_epochs=2)))
    first, last = checkpoints(whole)
    assert torch.load(first, weights_only=True)["epoch"] == 0
    resumed = pretrain(
        prepare(small(method, max_epochs=2, checkpoint__dir=str(tmp_path / "again"), resume_from_checkpoint=str(first)))
    )
    assert all(math.isfinite(value) for value in whole["metrics"].values()), whole["metrics"]
    assert {"train_acc1", "train_class_loss", "val_acc1", "val_knn_acc1"} <= whole["metrics"].keys()
    assert resumed["metrics"] == pytest.approx(whole["metrics"], rel=1e-4, abs=1e-4)
    weights, again = (torch.load(path, weights_only=True)["state_dict"] for path in (last, checkpoints(resumed)[-1]))
    torch.testing.assert_close(again, weights)
    before = torch.load(first, weights_only=True)["state_dict"]
    assert any(not torch.equal(before[name], value) for name, value in weights.items()), "nothing was trained"
    assert open_checkpoint(last.parent).model().training is False


@pytest.mark.parametrize("method", METHODS)
def test_trains_without_labels_and_says_nothing_of_them(method: str, small: MakeCfg, refused: Refused) -> None:
    cfg = small(method, labels=False)
    if method == "supcon":
        with refused("method", "supcon needs labels of two classes or more"):
            prepare(cfg)
        return
    row = pretrain(prepare(cfg))
    assert row["metrics"], "the method's own loss is logged"
    assert all(math.isfinite(value) for value in row["metrics"].values()), row["metrics"]
    with open(Path(row["checkpoint"]) / "metrics.csv") as file:
        logged = next(csv.reader(file))
    assert not [name for name in {*logged, *row["metrics"]} if any(word in name for word in OF_LABELS)]
    (path,) = checkpoints(row)
    assert all(
        torch.isfinite(value.float()).all() for value in torch.load(path, weights_only=True)["state_dict"].values()
    )


REFUSED = [
    ("all4one", {"proj_output_dim": 12}, "proj_output_dim in multiples of 8"),
    ("all4one", {"queue_size": 60}, "queue_size=60", "set it to 56"),
    ("deepclusterv2", {"num_prototypes": [25, 25]}, "memory holds 24 of 24", "set it to numbers up to 24"),
    ("deepclusterv2", {"num_prototypes": 4}, "num_prototypes as a list"),
    ("deepclusterv2", {"num_prototypes": [4, 5]}, "num_prototypes as a list of one number"),
    ("dino", {"warmup_teacher_temperature_epochs": 2}, "warmup_teacher_temperature_epochs=2, got 1:", "to 1 or less"),
    ("mae", {"decoder_embed_dim": 30}, "decoder_embed_dim=30 in multiples of 4"),
    ("mocov2plus", {"queue_size": 60}, "queue_size=60", "set it to 56"),
    ("nnbyol", {"queue_size": 4}, "queue_size=4", "set it to 8"),
    ("nnclr", {"queue_size": 60}, "queue_size=60", "set it to 56"),
    ("nnsiam", {"queue_size": 60}, "queue_size=60", "set it to 56"),
    ("ressl", {"queue_size": 60}, "queue_size=60", "set it to 56"),
    ("swav", {"queue_size": 4}, "queue_size=4 is less than 8 images", "set it to 8 or more, or to 0"),
    (
        "wmse",
        {"whitening_size": 256},
        "whitening_size=256 to divide optimizer.batch_size=8: set whitening_size to 8",
    ),
    ("wmse", {"whitening_size": 3}, "set whitening_size to 2 or another divisor"),
    ("wmse", {"proj_output_dim": 8}, "more images to whiten than dimensions"),
]


@pytest.mark.parametrize(
    "case",
    [case for case in REFUSED if case[0] in METHODS],  # main has methods that 1.0.2 has not
)
def test_what_a_method_cannot_do_is_refused_before_images_are_read(
    case: tuple[Any, ...], small: MakeCfg, refused: Refused
) -> None:
    method, kwargs, *names = case
    with refused("method", f"{method} needs ", *names):
        prepare(small(method, method_kwargs=SMALL | OWN.get(method, {}) | kwargs))


def test_other_sections_that_a_method_needs(small: MakeCfg, refused: Refused) -> None:
    with refused("method", "byol needs 0 <= momentum.base_tau <=", "got 0.9 and 0.5"):
        prepare(small("byol", momentum={"base_tau": 0.9, "final_tau": 0.5}))
    cfg = small("byol")
    del cfg.momentum
    assert prepare(cfg).config.momentum == {"base_tau": 0.99, "final_tau": 1.0, "classifier": False}
    with refused("method", "deepclusterv2 needs ", "set data.format=image_folder"):
        prepare(small("deepclusterv2", data__format="dali", dali={"device": "cpu"}))
    if "mae" in METHODS:
        with refused("method", "mae needs a ViT:", "got resnet18"):
            prepare(small("mae", backbone={"name": "resnet18"}))
    with refused("method_kwargs.proj_hidden_dim", "wide", "expected a finite number"):
        load_suite().build(prepare(small("vicreg", method_kwargs=SMALL | {"proj_hidden_dim": "wide"})).config)


NO_DEFAULT_FITS = ("deepclusterv2", "dino", "wmse")  # 24 images, an epoch, batches of 8


@pytest.mark.parametrize("method", METHODS)
def test_settings_without_a_default_are_named(method: str, small: MakeCfg) -> None:
    """1.0.2 has a default for every setting of a method, main for some: a config without any is completed or refused."""
    cfg = small(method)
    cfg.method_kwargs = {}
    refused = None
    try:
        prepare(cfg)
    except UsageError as error:
        refused = str(error)
    if refused is not None:
        assert refused.startswith(f"{method} needs ")
        assert "method_kwargs." in refused
    assert (refused is None) == (
        method == "emim" or (load_suite().generation == "1.0.2" and method not in NO_DEFAULT_FITS)
    )


@pytest.mark.parametrize("method", ["swav", "deepclusterv2"])
def test_queues_and_memory_banks_of_another_size_are_refused(method: str, small: MakeCfg, refused: Refused) -> None:
    (path,) = checkpoints(pretrain(prepare(small(method))))
    other = small(method, max_epochs=2, resume_from_checkpoint=str(path), optimizer__batch_size=5)
    other.method_kwargs.queue_size = 20
    with refused("resume_from_checkpoint", "has shape ", "resume with the same images"):
        pretrain(prepare(other))


def test_first_epoch_of_deepcluster_fills_its_memory_only(small: MakeCfg) -> None:
    """Nothing is assigned yet: a loss of 0, and then one that is not."""
    row = pretrain(prepare(small("deepclusterv2", max_epochs=2)))
    with open(Path(row["checkpoint"]) / "metrics.csv") as file:
        curve = [float(line["train_deepcluster_loss_epoch"] or "nan") for line in csv.DictReader(file)]
    first, second = (value for value in curve if not math.isnan(value))
    assert first == 0
    assert second > 0.1


def test_singular_whitening_is_named(small: MakeCfg) -> None:
    model: Any = load_suite().build(prepare(small("wmse")).config)
    spread = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.whitening(spread).T.cov(), torch.eye(4), atol=1e-4, rtol=0)
    with pytest.raises(FloatingPointError, match="cannot whiten 4 dimensions with 8 images"):
        model.whitening(torch.zeros(8, 4))


# -- the class loss ----------------------------------------------------------------------------------------------------


def loss_and_gradient(logits: torch.Tensor, targets: torch.Tensor, mend: bool) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.clone().requires_grad_()
    loss = nn.functional.cross_entropy(leaf, targets, ignore_index=-1)
    if mend:
        loss = zero_over_nothing(loss, targets)
    return loss, torch.autograd.grad(loss, leaf)[0]


def test_class_loss_is_zero_over_nothing_and_else_the_same_in_every_bit() -> None:
    logits = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    labelled = torch.arange(8) % 3
    for targets in (labelled, labelled.where(labelled > 0, -1)):
        for found, its in zip(
            loss_and_gradient(logits, targets, True), loss_and_gradient(logits, targets, False), strict=True
        ):
            assert torch.equal(found, its)
    nothing = torch.full((8,), -1)
    assert loss_and_gradient(logits, nothing, False)[0].isnan(), "or torch has mended it"
    loss, gradient = loss_and_gradient(logits, nothing, True)
    assert loss == 0
    assert torch.equal(gradient, torch.zeros_like(logits))


@pytest.mark.parametrize("method", ["barlow_twins", "byol", "emim"])
def test_with_labels_a_step_is_the_suites_own(
    method: str, small: MakeCfg, built_to_step: Callable[[DictConfig], LightningModule]
) -> None:
    suite = load_suite()
    run = prepare(small(method, knn_eval__enabled=False, momentum={"classifier": False}))
    cfg, batch = run.config, next(iter(suite.train_loader(run.config, run.images)))
    ours = built_to_step(cfg).train()
    own: Any = suite.methods()[method](**suite.constructor_kwargs(cfg)).train()
    own.load_state_dict(ours.state_dict())
    own.trainer, own.log, own.log_dict = ours.trainer, ours.log, ours.log_dict
    gradients = []
    for model in (ours, own):
        model.training_step(batch, 0).backward()
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(value, gradients[1][name]) for name, value in gradients[0].items())


def test_emim_as_the_clones_own_script_builds_it_needs_no_labels(small: MakeCfg) -> None:
    """main_pretrain.py takes the class out of METHODS: no face, and nothing of the other methods is mended there."""
    suite = load_suite()
    run = prepare(small("emim", labels=False))
    model = suite.methods()["emim"](**suite.constructor_kwargs(run.config))
    trainer = Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False)
    trainer.fit(model, suite.train_loader(run.config, run.images))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert {"train_emim_loss"} <= metrics.keys()
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    if suite.generation == "main":  # 1.0.2 has no script, and its class is not told that there are no labels
        assert not [name for name in metrics if any(word in name for word in OF_LABELS)]
