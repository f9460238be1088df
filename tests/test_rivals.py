"""The laboratory's losses of others and its candidates, held to lightly's own classes, to scikit-learn and to closed forms."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightly.loss import EMPSSLLoss, LeJEPALoss, MMCRLoss, VISRegLoss
from lightly.loss.emp_ssl_loss import tcr_loss
from sklearn.covariance import oas
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "research"))
import candidates
import rivals

from emim_solo.suite import load_suite


@pytest.fixture
def views() -> list[Tensor]:
    """Four views of 40 images, two of them small crops say: 12-dimensional embeddings that half agree."""
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(40, 12, generator=generator)
    return [source + 0.7 * torch.randn(40, 12, generator=generator) for _ in range(4)]


def seeded(loss: Any, *arguments: Any, **keywords: Any) -> Tensor:
    """Both sides draw the same random directions."""
    torch.manual_seed(3)
    return loss(*arguments, **keywords)


@pytest.mark.parametrize("share", [0.05, 0.6])
def test_two_terms_of_lejepa_and_four_of_visreg_are_lightlys_losses(views: list[Tensor], share: float) -> None:
    split = {"global_proj": torch.stack(views[:2]), "local_proj": torch.stack(views[2:])}
    expected = seeded(LeJEPALoss(share, sigreg_num_vectors=rivals.SLICES), **split)
    torch.testing.assert_close(seeded(rivals.LeJEPA(share), *views), expected)
    expected = seeded(VISRegLoss(share, num_slices=rivals.SLICES), **split)
    torch.testing.assert_close(seeded(rivals.visreg, *views, lambda_param=share), expected)


@pytest.mark.parametrize("lmda", [0.0, 0.05])
def test_mmcr_is_lightlys_over_the_images(views: list[Tensor], lmda: float) -> None:
    z = F.normalize(torch.stack(views, 1), dim=-1)
    torch.testing.assert_close(rivals.mmcr(*views, lmda=lmda), MMCRLoss(lmda)(z[:, :2], z[:, 2:]) / len(z))


def test_emp_ssl_maximises_the_coding_rate_that_lightlys_loss_minimises(views: list[Tensor]) -> None:
    z = F.normalize(torch.stack(views), dim=-1)
    theirs = EMPSSLLoss(inv_coef=200.0)(list(z))
    torch.testing.assert_close(rivals.emp_ssl(*views), theirs - 2 * tcr_loss(z, eps=0.2))
    assert tcr_loss(z, eps=0.2) > tcr_loss(z[:, :1].expand_as(z), eps=0.2), "more of what is spread"


def test_corinfomax_is_that_of_its_first_step_and_remembers(views: list[Tensor]) -> None:
    z1, z2 = (F.normalize(view, dim=1).double() for view in views[:2])
    loss = rivals.CorInfoMax(alpha=500.0, forgetting=0.01)
    spread = 0.0
    for z in (z1, z2):
        centred = z - 0.99 * z.mean(0)  # the mean starts at 0, the covariance at the identity
        spread += torch.linalg.slogdet(0.01 * torch.eye(12) + 0.99 * centred.T @ centred / 40 + 1e-6 * torch.eye(12))[1]
    expected = 500 * (z1 - z2).square().mean() - spread / 12
    first = loss(*views[:2])
    torch.testing.assert_close(first.double(), expected, rtol=1e-6, atol=1e-6)
    assert loss(*views[:2]) != first


LOSSES = {
    **{name: rivals.LOSSES[name] for name in ("frossl", "mmcr", "visreg", "emp_ssl")},
    **{name: rivals.LOSSES[name]() for name in ("lejepa", "corinfomax")},
    **{name: candidates.LOSSES[name] for name in ("shrunk", "centroid")},
    "tico": lambda a, b: rivals.LOSSES["tico"]()(a, b),  # without a history
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_views_that_agree_have_the_lower_loss(loss: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    source, other = torch.randn(64, 8, generator=generator), torch.randn(64, 8, generator=generator)
    assert seeded(loss, source, source + 0.1 * other) < seeded(loss, source, other)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "shrunk"])  # which takes no notice of scale
def test_images_that_differ_have_the_lower_loss(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    source, other = torch.randn(64, 8, generator=generator), torch.randn(64, 8, generator=generator)
    point = torch.randn(1, 8, generator=generator) + 0.01 * source
    assert seeded(LOSSES[name], source, source + 0.1 * other) < seeded(LOSSES[name], point, point + 0.001 * other)


def test_the_shrunk_covariance_is_scikit_learns() -> None:
    """One view twice: v is 0, so the loss holds log det of the shrunk covariance and e alone."""
    z = torch.randn(30, 50, generator=torch.Generator().manual_seed(0))
    pooled = torch.cat([candidates.standardised(z)] * 2)
    shrunk, share = oas(pooled.numpy(), assume_centered=True)
    log_det = torch.logdet(torch.tensor(shrunk, dtype=torch.float64) + 0.1 * torch.eye(50, dtype=torch.float64))
    assert 0.1 < share < 0.9
    found = candidates.shrunk(z, z, noise_variance=0.1)
    expected = (50 / 2 * torch.log(torch.tensor(0.2)) - log_det / 2) / 50
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-3, atol=1e-3)


def test_the_centroids_information_is_that_of_a_gaussian_channel(views: list[Tensor]) -> None:
    """1/2 log det(C + eI)/det(eI), with C of the views' mean on a sphere of radius sqrt(d)."""
    z = F.normalize(torch.stack(views).double(), dim=-1) * 12**0.5
    covariance = torch.cov(z.mean(0).T, correction=0)
    eigenvalues = torch.linalg.eigvalsh(covariance)
    expected = -torch.log1p(eigenvalues / 0.5).sum() / 2 / 12
    torch.testing.assert_close(candidates.centroid(*views, noise_variance=0.5).double(), expected, rtol=1e-4, atol=1e-6)


def test_every_loss_of_the_laboratory_has_a_name_of_its_own() -> None:
    load_suite()
    import lab

    assert rivals.LOSSES.keys() | candidates.LOSSES.keys() <= lab.losses().keys()
    assert not rivals.LOSSES.keys() & candidates.LOSSES.keys()
