"""k-NN accuracy of frozen features, equal to the suite's WeightedKNNClassifier.

That one wants all features in one float32 matrix and finds the neighbours anew for every k. Here similarities are
computed once for all ks, a piece of the training features at a time, in the suite's own chunks: features that are one
piece have its results to the last bit, which the tests hold them to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from emim_solo.evaluation.features import Features, all_finite, pieces
from emim_solo.ground.errors import UsageError
from emim_solo.ground.settings import setting

KS = (1, 5, 20, 200)
DISTANCES = ("cosine", "euclidean")
TEMPERATURE = 0.07

_SIMILARITIES = 5_000_000  # at a time, as the suite's max_distance_matrix_size
_EPSILON = 1e-5  # the suite's, added to Euclidean distances
_VOTES = 2**24  # images x neighbours x classes at a time


@dataclass(frozen=True)
class KnnSettings:
    """Of the k-NN evaluation: numbers of neighbours, distances, and the temperature of cosine."""

    ks: list[int] = setting(list(KS), least=1)
    distances: list[str] = setting(list(DISTANCES), choices=DISTANCES)
    temperature: float = setting(TEMPERATURE, above=0)


def knn_accuracies(
    train: Tensor,
    train_labels: Tensor,
    val: Tensor,
    val_labels: Tensor,
    *,
    ks: Sequence[int],
    distance: str = "cosine",
    temperature: float = TEMPERATURE,
    device: torch.device | str = "cpu",
) -> dict[int, float]:
    """Top-1 accuracies of weighted k-NN as the suite defines it, in percent.

    Where k exceeds the number of training images, all of them vote.

    Args:
        train: ``(N, d)`` features to look neighbours up in.
        train_labels: ``(N,)``.
        val: ``(M, d)``.
        val_labels: ``(M,)``.
        ks: numbers of neighbours.
        distance: ``cosine`` (votes weighted by ``exp(similarity / temperature)``) or ``euclidean`` (by the inverse).
        temperature: of cosine; Euclidean has none.
        device: to find neighbours on.

    Returns:
        By k: the accuracy, or NaN for features that are not finite.

    Raises:
        UsageError: an unknown distance, k < 1, or training classes without a validation image.
    """
    smallest = min(ks, default=1)
    if distance not in DISTANCES or smallest < 1:
        raise UsageError(
            "knn",
            f"k-NN with k={smallest}, distance={distance}: expected k >= 1 and one of {', '.join(DISTANCES)}",
        )
    classes = len(val_labels.unique())  # the suite counts them so, and would index past them
    if not set(train_labels.unique().tolist()) <= set(range(classes)):
        raise UsageError(
            "data.val_path",
            f"training images have {len(train_labels.unique())} classes, validation images {classes}: "
            "expected validation images of every class; add some",
        )
    if not all_finite(train, val):
        return dict.fromkeys(ks, math.nan)
    found = _nearest(train, val, ks, distance, torch.device(device))
    accuracies = {}
    for k, (similarities, places) in found.items():
        weights = (similarities / temperature).exp() if distance == "cosine" else similarities
        labels, correct = train_labels[places], 0
        for rows in torch.arange(len(val)).split(max(1, _VOTES // (k * classes))):
            votes = (F.one_hot(labels[rows], classes) * weights[rows, :, None]).sum(dim=1)
            correct += int((votes.sort(dim=1, descending=True).indices[:, 0] == val_labels[rows]).sum())
        accuracies[k] = 100 * correct / len(val)
    return accuracies


def _nearest(
    train: Tensor, val: Tensor, ks: Sequence[int], distance: str, device: torch.device
) -> dict[int, tuple[Tensor, Tensor]]:
    """By k: similarities to the k nearest training images and their positions, both ``(M, k)``.

    For each k by itself, since topk settles ties, of which collapsed features are full, by k.
    """
    best: dict[int, tuple[Tensor, Tensor]] = {}
    start = 0
    for piece in pieces(train):
        known = _prepared(piece, distance, device)
        found: dict[int, list[tuple[Tensor, Tensor]]] = {k: [] for k in ks}
        for asked in val.split(max(1, _SIMILARITIES // len(piece))):
            query = _prepared(asked, distance, device)
            near = query @ known.T if distance == "cosine" else 1 / (torch.cdist(query, known) + _EPSILON)
            for k in ks:
                values, places = near.topk(min(k, len(piece)))
                found[k].append((values.cpu(), places.cpu() + start))
        for k, chunks in found.items():
            values, places = (torch.cat(parts) for parts in zip(*chunks, strict=True))
            if k in best:
                values, places = (torch.cat(pair, dim=1) for pair in zip(best[k], (values, places), strict=True))
                values, order = values.topk(min(k, values.shape[1]))
                places = places.gather(1, order)
            best[k] = values, places
        start += len(piece)
    return best


def _prepared(features: Tensor, distance: str, device: torch.device) -> Tensor:
    features = features.to(device).float()
    return F.normalize(features) if distance == "cosine" else features


def knn(
    features: Features,
    *,
    ks: Sequence[int] = KS,
    distances: Sequence[str] = DISTANCES,
    temperature: float = TEMPERATURE,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Accuracies by ``<part>_<distance>_k<k>``, and the number of validation images of the rarest class.

    Args:
        features: of one run.
        ks: numbers of neighbours.
        distances: ``cosine``, ``euclidean`` or both.
        temperature: of cosine.
        device: to find neighbours on.
    """
    judged = features.to_judge()
    train, val = features.train.parts(), judged.parts()
    metrics = {
        f"{part}_{distance}_k{k}": accuracy
        for part in train
        for distance in distances
        for k, accuracy in knn_accuracies(
            train[part],
            features.train.labels,
            val[part],
            judged.labels,
            ks=ks,
            distance=distance,
            temperature=temperature,
            device=device,
        ).items()
    }
    return metrics | {"fewest_val_images": float(judged.labels.bincount(minlength=len(features.classes)).min())}
