"""k-NN accuracy of frozen features, equal to that of solo-learn's WeightedKNNClassifier.

solo-learn's class needs all features in one float32 matrix and searches the neighbours again for every k. Here similarities are
computed once for all ks, for one piece of the training features at a time. With a single piece the results are equal to the
last bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from emim_solo.evaluation.features import Features, all_finite, pieces
from emim_solo.ground.errors import UsageError
from emim_solo.ground.settings import read, setting

KS = (1, 5, 20, 200)
DISTANCES = ("cosine", "euclidean")
TEMPERATURE = 0.07

_SIMILARITIES = 5_000_000  # at a time, as solo-learn's max_distance_matrix_size
_COLDEST = 0.012  # below it a vote, exp(similarity / temperature), overflows in float32
_EPSILON = 1e-5  # solo-learn's, added to Euclidean distances
_VOTES = 2**24  # images x neighbours x classes at a time


@dataclass(frozen=True)
class KnnSettings:
    """Settings of the k-NN evaluation: numbers of neighbours, distances, and the temperature for cosine similarity."""

    ks: list[int] = setting(list(KS), least=1, empty=False)
    distances: list[str] = setting(list(DISTANCES), choices=DISTANCES, empty=False)
    temperature: float = setting(TEMPERATURE, least=_COLDEST)


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
    """Top-1 accuracies of solo-learn's weighted k-NN by k, in percent; NaN if features are not finite.

    The neighbours of ``(M, d)`` features ``val`` are searched on a device among ``(N, d)`` features ``train``. If k exceeds N, all N
    vote. A vote has the weight ``exp(similarity / temperature)`` (cosine) or the inverse distance (euclidean). UsageError for an
    unknown distance, k < 1, or training classes without a validation image.
    """
    read(KnnSettings, {"ks": list(ks), "distances": [distance], "temperature": temperature}, "knn")
    classes, trained = len(val_labels.unique()), train_labels.unique()  # as in solo-learn, which fails on other labels
    if not set(trained.tolist()) <= set(range(classes)):
        reason = f"training images have {len(trained)} classes, validation images {classes}"
        raise UsageError("data.val_path", f"{reason}: expected validation images of every class")
    if not all_finite(train, val):
        return dict.fromkeys(ks, math.nan)
    accuracies = {}
    for k, (similarities, places) in _nearest(train, val, ks, distance, torch.device(device)).items():
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
    """For each k, as ``topk`` breaks ties differently: similarities to the k nearest training images and their positions, ``(M, k)``."""
    best: dict[int, tuple[Tensor, Tensor]] = {}
    start = 0
    for piece in pieces(train):
        known = _prepared(piece, distance, device)
        found: dict[int, list[tuple[Tensor, Tensor]]] = {k: [] for k in ks}
        for asked in val.split(max(1, _SIMILARITIES // len(piece))):
            query = _prepared(asked, distance, device)
            near = query @ known.T if distance == "cosine" else 1 / (torch.cdist(query, known) + _EPSILON)
            for k in found:
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
    features: Features, *, ks: Sequence[int] = KS, distances: Sequence[str] = DISTANCES, **settings: Any
) -> dict[str, float]:
    """:func:`knn_accuracies` by ``<part>_<distance>_k<k>``, and ``fewest_val_images``, the number in the smallest class."""
    train, val = features.train, features.to_judge()
    metrics: dict[str, float] = {}
    for part, matrix in val.parts().items():
        judged = (train.parts()[part], train.labels, matrix, val.labels)
        for distance in distances:
            by_k = knn_accuracies(*judged, ks=ks, distance=distance, **settings)
            metrics |= {f"{part}_{distance}_k{k}": accuracy for k, accuracy in by_k.items()}
    return metrics | {"fewest_val_images": float(val.labels.bincount(minlength=len(features.classes)).min())}
