"""EMIM as a method of both generations of solo-learn: projector, defaults and checks, training step."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from torch import Tensor, nn

from emim_solo.emim.loss import DIRECTIONS
from emim_solo.emim.measures import collapsed, non_gaussianity
from emim_solo.emim.objective import (
    MARGINALS,
    OBJECTIVES,
    RESIDUALS,
    emim_loss_func,
    entropies,
    mutual_information,
    null_mutual_information,
    random_directions,
)
from emim_solo.ground import compare
from emim_solo.ground.errors import UsageError
from emim_solo.ground.settings import read, setting

_WIDEST = 32_768  # a hidden layer of this width has 4 GB of weights


@dataclass(frozen=True)
class MethodSettings:
    """EMIM's ``method_kwargs``: widths of the projector, and the arguments of :func:`emim_loss_func`."""

    proj_hidden_dim: int = setting(2048, least=1, most=_WIDEST)
    proj_output_dim: int = setting(2048, least=1, most=_WIDEST)
    objective: str = setting("bound", choices=OBJECTIVES)
    marginal: str = setting("series", choices=MARGINALS)
    series_order: int = setting(2, least=2, most=2)
    residual: str = setting("isotropic", choices=RESIDUALS)
    weight: float = setting(4.0, least=0)
    noise_variance: float = setting(0.1, above=0)
    gaussian_weight: float = setting(0.0, least=0)


DEFAULTS = asdict(MethodSettings())
PROJECTOR_DEFAULTS = {name: value for name, value in DEFAULTS.items() if name.startswith("proj_")}
OBJECTIVE_DEFAULTS = {name: value for name, value in DEFAULTS.items() if name not in PROJECTOR_DEFAULTS}
_SETTINGS = "emim_solo"  # key in a checkpoint
_NOT_TO_CHANGE = ("method_kwargs", "seed", "backbone", "optimizer.name")  # when a run is resumed
_IMAGES_TO_JUDGE_COLLAPSE = 256  # of the epoch's last batch; their SVD takes a tenth of a second


def complete_method_kwargs(method_kwargs: Mapping[str, Any], names_of_other_methods: set[str]) -> dict[str, Any]:
    """EMIM's ``method_kwargs`` with defaults filled in, checked before anything is trained.

    Names that belong to another method of solo-learn are dropped, so that ``method=emim`` works as an override on
    any method's config. Every other unknown name counts as a typo.

    Args:
        method_kwargs: as the user wrote them.
        names_of_other_methods: all names that other methods of solo-learn read from ``method_kwargs``.

    Raises:
        UsageError: an unknown name, or a value that the projector or the objective cannot take.
    """
    others = [name for name in method_kwargs if name not in DEFAULTS and name in names_of_other_methods]
    if others:
        # A warning, because a log line would be lost: solo-learn's configs turn off Hydra's logging, and with it the
        # logging of every library loaded before.
        rank_zero_warn(f"EMIM ignores method_kwargs of other methods: {', '.join(others)}")
    settings = {name: value for name, value in method_kwargs.items() if name not in others}
    read(MethodSettings, settings, "method_kwargs")
    settings = DEFAULTS | settings
    _warn_of_collapse(settings)
    return settings


def _warn_of_collapse(settings: Mapping[str, Any]) -> None:
    """Warns of a weight with which an exact entropy gives full collapse the lower loss: see ``emim_loss_func``."""
    if settings["objective"] != "bound":
        return
    noise, weight = settings["noise_variance"], settings["weight"]
    limit = math.log1p(1 / noise) / math.log1p(1 / (1 + noise))
    if settings["residual"] == "exact" and weight > limit:
        rank_zero_warn(
            f"EMIM with residual=exact, noise_variance={noise} and weight={weight} can collapse: above "
            f"weight {limit:.2f} constant embeddings have the lower loss; set residual=isotropic or a smaller weight"
        )
    elif settings["residual"] != "exact" and settings["marginal"] == "exact" and weight > 1:
        rank_zero_warn(
            f"EMIM with marginal=exact and weight={weight} can collapse: above weight 1 constant embeddings have "
            "a lower loss than views that do not agree yet; set marginal=series or weight=1"
        )


class EMIMMethod(LightningModule):
    """What EMIM adds to a generation's ``BaseMethod``, which comes after it among a class's bases.

    A three-layer MLP projector (the shape of solo-learn's Barlow Twins) maps the features of two or more views, small
    crops included; :func:`emim_solo.emim.objective.emim_loss_func` takes the embeddings. It logs ``train_emim_loss`` (each step and
    epoch). At the trainer's logging interval it also logs, in nats, the exact ``train_mi`` of the first two views beside
    ``train_mi_null`` (the same estimator on pairs rolled by one): both contain the small-sample bias, so read their difference.
    Further, the loss's two terms for all views, ``train_entropy`` H(Z) and ``train_residual_entropy`` H(Z|Z'); and
    ``train_non_gaussianity``, how far this process's first view is from Gaussian, beside its null. At the null the MI is a lower
    bound of the true one. At the end of an epoch a warning names a collapse (:func:`emim_solo.emim.measures.collapsed`).
    """

    takes_many_views = True
    features_dim: int
    num_large_crops: int
    projector: nn.Sequential
    method_settings: dict[str, Any]
    objective_kwargs: dict[str, Any]
    _latest: Tensor | None = None

    def add_emim(self, method_kwargs: Mapping[str, Any]) -> None:
        """Build the projector and keep the objective's settings; ``method_kwargs`` are complete."""
        if self.num_large_crops < 2:
            large = self.num_large_crops
            raise UsageError("augmentations", f"EMIM takes 2 large crops or more, augmentations give {large}")
        hidden, output = method_kwargs["proj_hidden_dim"], method_kwargs["proj_output_dim"]
        self.method_settings = {name: method_kwargs[name] for name in DEFAULTS}
        self.objective_kwargs = {name: method_kwargs[name] for name in OBJECTIVE_DEFAULTS}
        self.projector = nn.Sequential(
            nn.Linear(self.features_dim, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, output),
        )

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        """The base method's parameter groups and the projector's."""
        base: list[dict[str, Any]] = super().learnable_params  # type: ignore[misc]
        return [*base, {"name": "projector", "params": self.projector.parameters()}]

    def forward(self, X: Tensor) -> dict[str, Any]:
        """The base method's outputs and the projected features ``z``, shape (batch, proj_output_dim)."""
        out: dict[str, Any] = super().forward(X)
        return {**out, "z": self.projector(out["feats"])}

    def embeddings(self, out: Mapping[str, Any]) -> list[Tensor]:
        """Embeddings of the views, large crops first, from the base training step's outputs."""
        return out["z"]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """EMIM's loss plus the online classifier's loss."""
        out: Any = super().training_step(batch, batch_idx)
        z1, z2, *more = self.embeddings(out)

        directions = None
        if self.objective_kwargs["gaussian_weight"]:  # the same in every process and in a resumed run
            directions = random_directions(z1.shape[1], DIRECTIONS, seed=self.global_step, device=z1.device)
        emim_loss = emim_loss_func(z1, z2, *more, **self.objective_kwargs, directions=directions)
        self.log("train_emim_loss", emim_loss, on_epoch=True, sync_dist=True)

        # Exact MI costs two sets of factorisations, and reading a value makes a GPU wait. So it is computed only on steps
        # whose metrics the trainer logs. Without a trainer there are none; `self.log` then warns, as for every method of
        # solo-learn.
        trainer = self._trainer
        interval = getattr(trainer, "log_every_n_steps", 0)
        if trainer is not None and interval and (trainer.global_step + 1) % interval == 0:
            self._check_finite(emim_loss, z1, z2, *more)
            noise_variance = self.objective_kwargs["noise_variance"]
            of_terms = {name: self.objective_kwargs[name] for name in ("marginal", "residual", "noise_variance")}
            if self.objective_kwargs["objective"] != "bound":
                of_terms |= {"marginal": "exact", "residual": "exact"}
            with torch.no_grad():
                self.log("train_mi", mutual_information(z1, z2, noise_variance=noise_variance))
                self.log("train_mi_null", null_mutual_information(z1, z2, noise_variance=noise_variance))
                entropy, residual_entropy = entropies(z1, z2, *more, **of_terms)
                self.log("train_entropy", entropy)
                self.log("train_residual_entropy", residual_entropy)
                distance, null = non_gaussianity(z1)
                self.log("train_non_gaussianity", distance)
                self.log("train_non_gaussianity_null", null)

        self._latest = z1.detach()[:_IMAGES_TO_JUDGE_COLLAPSE]
        return emim_loss + out["loss"]

    def _check_finite(self, emim_loss: Tensor, *embeddings: Tensor) -> None:
        """Raises on a GPU what the objective raises on a CPU at once. NaN stays until then: its gradient is NaN."""
        if not emim_loss.isfinite():
            odd = ", ".join(f"{int((~z.isfinite()).sum())} in z{i}" for i, z in enumerate(embeddings, 1))
            raise FloatingPointError(
                f"EMIM's loss is NaN or infinite by step {self.global_step} (such values: {odd}): lower optimizer.lr, "
                "use precision=32 or bf16-mixed, raise method_kwargs.noise_variance if the embeddings are finite, "
                "and resume from the last checkpoint"
            )

    def on_train_epoch_end(self) -> None:
        """Warns if the embeddings have collapsed: the loss alone does not show that."""
        super().on_train_epoch_end()
        # main_pretrain.py with max_steps ends the epoch of a checkpoint again, before any step.
        if rank_zero_only.rank == 0 and self._latest is not None and collapsed(self._latest):  # type: ignore[attr-defined]
            rank_zero_warn(
                f"EMIM: the embeddings have collapsed to a point or a few directions at epoch {self.current_epoch}: "
                "raise method_kwargs.noise_variance, lower weight or optimizer.lr"
            )

    def run_settings(self) -> dict[str, Any]:
        """What a checkpoint keeps about its run: at least ``method_kwargs`` and the ``seed``."""
        return {"method_kwargs": self.method_settings, "seed": os.environ.get("PL_GLOBAL_SEED")}  # Lightning's

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the run's settings to the checkpoint."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_SETTINGS] = self.run_settings()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses to resume training from a checkpoint with other settings; evaluation does not compare them.

        Raises:
            UsageError: ``method_kwargs``, seed, backbone or optimizer.name are not this run's. Other differences give a warning.
        """
        super().on_load_checkpoint(checkpoint)
        if self._trainer is None or self._trainer.state.fn != TrainerFn.FITTING:
            return
        here = self.run_settings()
        there = checkpoint.get(_SETTINGS, here)
        there = {**there, "method_kwargs": DEFAULTS | there["method_kwargs"]}  # older checkpoints lack new settings
        differing = compare.differences(there, here, but=compare.MAY_DIFFER)
        if others := [each for each in differing if each.startswith(_NOT_TO_CHANGE)]:
            raise UsageError(
                "resume_from_checkpoint",
                f"checkpoint '{self._trainer.ckpt_path}' has other settings: {', '.join(others)}; "
                "resume it with its own, or start afresh without resume_from_checkpoint",
            )
        if differing:
            rank_zero_warn(
                f"EMIM goes on from '{self._trainer.ckpt_path}', which has other settings: {', '.join(differing)}"
            )
