"""EMIM's settings: defaults, typos, names of other methods, and a warning where a setting can collapse."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from lightning.pytorch import Trainer
from omegaconf import DictConfig

from emim_solo import method
from emim_solo.errors import UsageError
from emim_solo.method import DEFAULTS, OBJECTIVE_DEFAULTS, complete_method_kwargs
from emim_solo.objective import emim_loss_func
from emim_solo.pretraining import prepare
from emim_solo.suite import load_suite


def test_defaults_are_the_objectives_own() -> None:
    torch.manual_seed(0)
    z1 = torch.randn(64, 8)
    z2 = z1 + 0.3 * torch.randn(64, 8)
    assert torch.equal(emim_loss_func(z1, z2), emim_loss_func(z1, z2, **OBJECTIVE_DEFAULTS))
    assert complete_method_kwargs({}, set()) == DEFAULTS


def test_names_of_other_methods_are_dropped_and_typos_are_not() -> None:
    assert complete_method_kwargs({"lamb": 1, "weight": 2.0}, {"lamb"}) == DEFAULTS | {"weight": 2.0}
    with pytest.raises(UsageError, match="'series_order'"):
        complete_method_kwargs({"series_oder": 3}, {"lamb"})
    with pytest.raises(UsageError, match="'weight'"):
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
    cfg = prepare(make_cfg(optimizer__lr=1e30, scheduler__warmup_epochs=0, knn_eval__enabled=False))
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=3,
        log_every_n_steps=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    with pytest.raises(FloatingPointError, match=r"EMIM's loss is NaN or infinite by step 3 .* [1-9]\d* in z1, "):
        trainer.fit(suite.build(cfg), suite.train_loader(cfg))
