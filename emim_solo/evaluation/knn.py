"""k-NN accuracy of frozen features, through the suite's WeightedKNNClassifier."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from emim_solo.errors import UsageError
from emim_solo.evaluation.features import Features
from emim_solo.suite import load_suite

KS = (1, 5, 20, 200)
DISTANCES = ("cosine", "euclidean")
TEMPERATURE = 0.07


def knn_accuracy(
    train: Tensor,
    train_labels: Tensor,
    val: Tensor,
    val_labels: Tensor,
    *,
    k: int,
    distance: str = "cosine",
    temperature: float = TEMPERATURE,
) -> float:
    """Top-1 accuracy of the suite's weighted k-NN, in percent.

    For cosine, features are normalised here: one generation of the suite leaves that to its caller, and for the other
    it changes nothing. Where k exceeds the number of training images, all of them vote.

    Args:
        train: ``(N, d)`` features to look neighbours up in.
        train_labels: ``(N,)``.
        val: ``(M, d)``.
        val_labels: ``(M,)``.
        k: number of neighbours.
        distance: ``cosine`` (votes weighted by ``exp(similarity / temperature)``) or ``euclidean`` (by the inverse).
        temperature: of cosine; Euclidean has none.

    Returns:
        The accuracy, or NaN for features that are not finite.

    Raises:
        UsageError: an unknown distance, k < 1, or training classes without a validation image.
    """
    if distance not in DISTANCES or k < 1:
        raise UsageError(f"k-NN with k={k}, distance={distance}: expected k >= 1 and one of {', '.join(DISTANCES)}")
    # The suite counts classes by the validation labels, and would index past them.
    if not set(train_labels.unique().tolist()) <= set(range(len(val_labels.unique()))):
        raise UsageError(
            f"training images have {len(train_labels.unique())} classes, validation images {len(val_labels.unique())}: "
            "expected validation images of every class; add some"
        )
    if not (torch.isfinite(train).all() and torch.isfinite(val).all()):
        return math.nan
    if distance == "cosine":
        train, val = F.normalize(train), F.normalize(val)
    classifier = load_suite().knn_classifier(k=k, temperature=temperature, distance=distance)
    classifier.update(train_features=train, train_targets=train_labels, test_features=val, test_targets=val_labels)
    return float(classifier.compute()[0])


def knn(
    features: Features,
    *,
    ks: Sequence[int] = KS,
    distances: Sequence[str] = DISTANCES,
    temperature: float = TEMPERATURE,
) -> dict[str, float]:
    """Accuracies by ``<part>_<distance>_k<k>``, and the number of validation images of the rarest class.

    Args:
        features: of one run.
        ks: numbers of neighbours.
        distances: ``cosine``, ``euclidean`` or both.
        temperature: of cosine.
    """
    judged = features.to_judge()
    train, val = features.train.parts(), judged.parts()
    metrics = {
        f"{part}_{distance}_k{k}": knn_accuracy(
            train[part],
            features.train.labels,
            val[part],
            judged.labels,
            k=k,
            distance=distance,
            temperature=temperature,
        )
        for part in train
        for distance in distances
        for k in ks
    }
    return metrics | {"fewest_val_images": float(judged.labels.bincount(minlength=len(features.classes)).min())}
