"""Losses of rival methods for lab.py: from lightly where it has them; CorInfoMax from its paper.

Each is a function of the views' embeddings, N x d. The `large` large views come first, then the small ones. lightly is
a development dependency; the package does not contain this file.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightly.loss import FroSSLLoss, TiCoLoss
from lightly.loss.emp_ssl_loss import invariance_loss, tcr_loss
from lightly.loss.lejepa_loss import SIGReg, lejepa_invariance_loss
from lightly.loss.visreg_loss import visreg_center_loss, visreg_scale_loss, visreg_shape_loss
from torch import Tensor, nn

SLICES = (
    256  # random directions per step, not LeJEPA's 1,024 or VISReg's 4,096, which would take most of a step's time here
)


def frossl(*z: Tensor, invariance_weight: float = 1.0) -> Tensor:
    loss: Tensor = FroSSLLoss(invariance_weight)(list(z))
    return loss


class LeJEPA(nn.Module):
    """lightly's two terms with the weights of its LeJEPALoss, which itself requires a small view."""

    def __init__(self, lambda_param: float = 0.05, large: int = 2) -> None:
        super().__init__()
        self.share, self.large, self.sigreg = lambda_param, large, SIGReg(num_vectors=SLICES)

    def forward(self, *views: Tensor) -> Any:
        z = torch.stack(views)
        return self.share * self.sigreg(z) + (1 - self.share) * lejepa_invariance_loss(
            all_proj=z, global_proj=z[: self.large]
        )


def visreg(*views: Tensor, lambda_param: float = 0.9, large: int = 2) -> Tensor:
    """lightly's four terms with the weights of its VISRegLoss, which itself requires a small view."""
    z = torch.stack(views)
    regularisation = visreg_scale_loss(z) + visreg_shape_loss(z, num_slices=SLICES) + visreg_center_loss(z)
    return lambda_param * regularisation + (1 - lambda_param) * lejepa_invariance_loss(
        all_proj=z, global_proj=z[:large]
    )


def mmcr(*views: Tensor, lmda: float = 0.0) -> Tensor:
    """lightly's MMCRLoss on the sphere, divided by N; without the singular vectors that lightly also computes."""
    z = F.normalize(torch.stack(views, 1), dim=-1)
    spread = torch.linalg.matrix_norm(z.mean(1), ord="nuc")
    within = torch.linalg.matrix_norm(z, ord="nuc").mean() if lmda else 0.0
    return (lmda * within - spread) / len(z)


def emp_ssl(*views: Tensor, inv_coef: float = 200.0, tcr_eps: float = 0.2) -> Tensor:
    """lightly's two terms on the sphere. Its EMPSSLLoss adds the coding rate, but the paper maximises the rate."""
    z = F.normalize(torch.stack(views), dim=-1)
    loss: Tensor = inv_coef * invariance_loss(z) - tcr_loss(z, eps=tcr_eps)
    return loss


class CorInfoMax(nn.Module):
    """S. Ozsoy et al., "Self-Supervised Learning with an Information Maximization Criterion", arXiv 2209.07999.

    -(log det R1 + log det R2) / d + alpha |z1 - z2|^2 / (N d), with R the covariance of each branch, centred by its mean.
    Both are averages over steps without gradient of the history; the newest batch has the share 1 - forgetting. z is on the sphere.
    """

    def __init__(self, alpha: float = 500.0, forgetting: float = 0.01, epsilon: float = 1e-6) -> None:
        super().__init__()
        self.alpha, self.forgetting, self.epsilon = alpha, forgetting, epsilon
        self.history: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(self, *views: Tensor) -> Tensor:
        z = [F.normalize(view, dim=1).double() for view in views]
        spread = torch.stack([self._log_det(number, view) for number, view in enumerate(z)]).sum()
        loss: Tensor = self.alpha * F.mse_loss(*z) - spread / z[0].shape[1]
        return loss.float()

    def _log_det(self, branch: int, z: Tensor) -> Tensor:
        identity = torch.eye(z.shape[1], dtype=z.dtype)
        mean, covariance = self.history.get(branch, (torch.zeros_like(z[0]), identity))
        old, new = self.forgetting, 1 - self.forgetting
        mean = old * mean + new * z.mean(0)
        covariance = old * covariance + new * (z - mean).T @ (z - mean) / len(z)
        self.history[branch] = mean.detach(), covariance.detach()
        return torch.logdet(covariance + self.epsilon * identity)


LOSSES: dict[str, Any] = {
    "frossl": frossl,
    "lejepa": LeJEPA,
    "visreg": visreg,
    "mmcr": mmcr,
    "tico": TiCoLoss,  # its second embeddings come from a momentum encoder: the setting `momentum`
    "emp_ssl": emp_ssl,
    "corinfomax": CorInfoMax,
}
