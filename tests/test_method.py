"""EMIM's settings: defaults, typos, names of other methods, and a warning where a setting can collapse."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from omegaconf import DictConfig

from emim_solo.emim import method
from emim_solo.emim.method import DEFAULTS, OBJECTIVE_DEFAULTS, complete_method_kwargs
from emim_solo.emim.objective import emim_loss_func
from emim_solo.suite import load_suite
from emim_solo.training.pretraining import prepare, pretrain

Refused = Callable[..., AbstractContextManager[Any]]


def test_defaults_are_the_objectives_own() -> None:
    torch.manual_seed(0)
    z1 = torch.randn(64, 8)
    z2 = z1 + 0.3 * torch.randn(64, 8)
    assert torch.equal(emim_loss_func(z1, z2), emim_loss_func(z1, z2, **OBJECTIVE_DEFAULTS))
    assert complete_method_kwargs({}, set()) == DEFAULTS


def test_names_of_other_methods_are_dropped_and_typos_are_not(refused: Refused) -> None:
    assert complete_method_kwargs({"lamb": 1, "weight": 2.0}, {"lamb"}) == DEFAULTS | {"weight": 2.0}
    with refused("method_kwargs.series_oder", "'series_order'"):
        complete_method_kwargs({"series_oder": 3}, {"lamb"})
    with refused("method_kwargs.wieght", "'weight'"):
        complete_method_kwargs({"wieght": 3}, {"lamb"})


def test_warning_exactly_where_collapse_has_the_lower_loss() -> None:
    """The oracle is the loss itself, of collapsed and of perfectly agreeing embeddings."""
    torch.manual_seed(0)
    agreeing = torch.linalg.qr(torch.randn(512, 4, dtype=torch.float64))[0]
    collapsed = torch.zeros(512, 4, dtype=torch.float64)
    for noise in (0.05, 0.1, 1.0):
        for weight in (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0):
            settings = {"marginal": "exact", "residual": "exact", "weight": weight, "noise_variance": noise}
            lower = emim_loss_func(collapsed, collapsed, **settings) < emim_loss_func(agreeing, agreeing, **settings)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                complete_method_kwargs(settings, set())
            assert bool(lower) == any("can collapse" in str(warning.message) for warning in caught), (noise, weight)


@pytest.mark.parametrize("residual", ["isotropic", "diagonal"])
def test_warning_exactly_where_collapse_has_a_lower_loss_than_independence(residual: str) -> None:
    """The oracle is the loss itself, of collapsed embeddings and of views that are white and share nothing."""
    torch.manual_seed(0)
    noise = torch.randn(512, 8, dtype=torch.float64)
    z1, z2 = torch.linalg.qr(noise - noise.mean(0))[0].split(4, dim=1)
    collapsed = torch.zeros_like(z1)
    for marginal in ("exact", "series"):
        for weight in (0.5, 0.9, 1.1, 2.0, 4.0):
            settings = {"marginal": marginal, "residual": residual, "weight": weight}
            lower = emim_loss_func(collapsed, collapsed, **settings) < emim_loss_func(z1, z2, **settings)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                complete_method_kwargs(settings, set())
            warned = any("can collapse" in str(warning.message) for warning in caught)
            assert warned == (marginal == "exact" and bool(lower)), (marginal, weight)
            assert bool(lower) == (weight > 1) or marginal == "series"


def test_nan_is_said_at_the_logging_interval_where_no_step_may_wait(
    make_cfg: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: compiled, the objective cannot raise. No callback of ours is there, as in a clone of the suite."""
    monkeypatch.setattr(method, "emim_loss_func", torch.compile(emim_loss_func, backend="eager", fullgraph=True))
    suite = load_suite()
    run = prepare(make_cfg(optimizer__lr=1e30, scheduler__warmup_epochs=0, knn_eval__enabled=False))
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=3,
        log_every_n_steps=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    with pytest.raises(FloatingPointError, match=r"EMIM's loss is NaN or infinite by step 3 .* [1-9]\d* in z1, "):
        trainer.fit(suite.build(run.config), suite.train_loader(run.config, run.images))


@pytest.mark.parametrize(("objective", "least"), [("exact", -math.inf), ("mean", -1.0)])
def test_every_objective_trains_and_logs(objective: str, least: float, make_cfg: Callable[..., DictConfig]) -> None:
    kwargs = {"proj_hidden_dim": 64, "proj_output_dim": 16, "objective": objective}
    metrics = pretrain(prepare(make_cfg(method_kwargs=kwargs, log_every_n_steps=5)))["metrics"]
    assert least < metrics["train_emim_loss_epoch"] < 0
    assert metrics["train_mi"] > metrics["train_mi_null"]
    # The two entropies are the exact ones: their difference is the pooled MI of the two views.
    assert metrics["train_entropy"] > metrics["train_residual_entropy"]


def test_training_step_outside_a_trainer(make_cfg: Callable[..., DictConfig]) -> None:
    """As the suite's own methods do: a loss with a gradient, and a warning that nothing is logged."""
    suite = load_suite()
    for name in ("emim", "barlow_twins"):
        run = prepare(make_cfg(method=name, log_every_n_steps=1))
        model, batch = suite.build(run.config), next(iter(suite.train_loader(run.config, run.images)))
        loss = model.training_step(batch, 0)
        loss.backward()
        assert torch.isfinite(loss)
        assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in model.projector[-1].parameters())


def test_names_of_other_methods_are_said() -> None:
    with pytest.warns(UserWarning, match="ignores method_kwargs of other methods: scale_loss"):
        complete_method_kwargs({"scale_loss": 0.1, "weight": 2.0}, {"scale_loss"})


def test_a_checkpoint_of_other_settings_is_not_trained_on(
    make_cfg: Callable[..., DictConfig], refused: Refused
) -> None:
    suite = load_suite()

    def fit(path: Path | None = None, **changed: Any) -> Trainer:
        run = prepare(make_cfg(scheduler__name="none", **changed))
        seed_everything(run.config.seed)
        trainer = Trainer(
            max_epochs=1 if path is None else 2,
            limit_train_batches=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
        )
        trainer.fit(suite.build(run.config), suite.train_loader(run.config, run.images), ckpt_path=path)
        return trainer

    path = Path(make_cfg().checkpoint.dir) / "one.ckpt"
    fit().save_checkpoint(path)
    assert fit(path).current_epoch == 2
    for changed, said in (
        ({"method_kwargs__weight": 1.0}, "method_kwargs.weight (4.0 there, 1.0 here)"),
        ({"method_kwargs__proj_output_dim": 8}, "proj_output_dim"),
        ({"seed": 8}, "seed (7 there, 8 here)"),
    ):
        with refused("resume_from_checkpoint", said):
            fit(path, **changed)

    # To evaluate it, no setting of the training matters.
    cfg = prepare(make_cfg(method_kwargs__weight=1.0)).config
    suite.emim_class.load_from_checkpoint(path, **suite.constructor_kwargs(cfg))
