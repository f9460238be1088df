"""EMIM's loss as a module for your own training loop; it needs only torch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from emim_solo.emim.objective import check_loss_settings, emim_loss_func, random_directions

DIRECTIONS = 16  # per step, with gaussian_weight above 0; each step draws new ones, so few are enough


class EMIMLoss(nn.Module):
    """EMIM's loss of two or more views, lower is better.

    Its input is the embeddings of the views, the outputs of a projector: ``loss = EMIMLoss()(z1, z2)``. It has no
    parameters. With several processes under ``torch.distributed``, call it once per process and step.

    Args:
        gather: True joins the embeddings of all processes into one batch. False: each process computes its own loss.
        directions: number of random directions per step, used if ``gaussian_weight`` is above 0.
        **settings: ``objective``, ``marginal``, ``residual``, ``weight``, ``noise_variance``, ``gaussian_weight`` as
            :func:`emim_solo.emim.objective.emim_loss_func` takes them.

    Raises:
        ValueError: a setting that the loss cannot take.
        TypeError: an unknown setting.
    """

    def __init__(self, *, gather: bool = True, directions: int = DIRECTIONS, **settings: Any) -> None:
        super().__init__()
        check_loss_settings(**settings)
        self.gather, self.directions, self.settings = gather, directions, settings
        self.steps = 0  # the seed of the directions: the same in every process

    def forward(self, *views: Tensor) -> Tensor:
        """The loss in nats per dimension, a 0-dim tensor.

        Args:
            views: two or more ``(N, d)`` arrays; row i is the same image in each.

        Raises:
            ValueError, TypeError, FloatingPointError: as :func:`emim_solo.emim.objective.emim_loss_func`.
        """
        if len(views) < 2:
            raise ValueError(f"EMIM's loss takes two views or more, got {len(views)}")
        directions = None
        if self.settings.get("gaussian_weight"):
            directions = random_directions(views[0].shape[1], self.directions, seed=self.steps, device=views[0].device)
            self.steps += 1
        return emim_loss_func(*views, **self.settings, gather=self.gather, directions=directions)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
