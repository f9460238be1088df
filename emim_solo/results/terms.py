"""Equal terms: what the methods of one benchmark must share, and where they do not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from emim_solo.ground.compare import leaves

TERMS = (
    "augmentations",
    "backbone",
    "data",
    "method_kwargs.proj_hidden_dim",
    "method_kwargs.proj_output_dim",
    "optimizer",
    "scheduler",
    "max_epochs",
    "accumulate_grad_batches",
    "precision",
    "gradient_clip_val",
    "sync_batchnorm",
)
"""Keys of solo-learn's config, each with everything below it."""

ABSENT, PRESENT = "absent", "present"
_SIZES = ("num_crops", "crop_size")


def terms(config: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a config that equal terms are about; of the devices, how many there are."""
    found = {key: value for key, value in leaves(config).items() if any(_below(key, term) for term in TERMS)}
    if isinstance(config.get("devices"), (list, tuple)):
        found["devices"] = len(config["devices"])
    return found


def deviations(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, tuple[Any, Any]]]:
    """Where each method's terms differ from those of most others.

    Args:
        configs: completed config of one run by method.

    Returns:
        By method, by dotted key: its own value and the common one. The common value is the most frequent, the
        first method's in a tie. Methods without a deviation have an empty entry. An item that the others' lists
        lack, say the small crops of ``augmentations``, is one deviation: its number and size of crops, ``PRESENT``
        where it has none, against ``ABSENT``.
    """
    own = {name: terms(config) for name, config in configs.items()}
    found: dict[str, dict[str, tuple[Any, Any]]] = {name: {} for name in configs}
    for key in sorted({key for values in own.values() for key in values}):
        values = {name: own[name].get(key, ABSENT) for name in own}
        common_text, _ = Counter(map(repr, values.values())).most_common(1)[0]
        common = next(value for value in values.values() if repr(value) == common_text)
        for name, value in values.items():
            if repr(value) != common_text:
                found[name][key] = (value, common)
    return {name: _with_whole_items(found[name], own[name]) for name in own}


def _with_whole_items(found: Mapping[str, tuple[Any, Any]], own: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    whole: dict[str, tuple[Any, Any]] = {}
    for key, (value, common) in found.items():
        item = re.match(r".*?\.\d+(?=\.)", key)
        leaves = [leaf for leaf in own if item and _below(leaf, item[0])]
        if item and leaves and all(leaf in found and found[leaf][1] == ABSENT for leaf in leaves):
            below = {leaf.removeprefix(f"{item[0]}."): own[leaf] for leaf in leaves}
            sizes = [f"{name} {below[name]}" for name in _SIZES if name in below]
            whole[item[0]] = (" ".join(sizes) or PRESENT, ABSENT)
        else:
            whole[key] = (value, common)
    return whole


def undeclared(
    found: Mapping[str, Mapping[str, tuple[Any, Any]]], declared: Mapping[str, list[str]]
) -> dict[str, list[str]]:
    """Deviations that no declared key covers, by method; a declared key covers everything below it."""
    missing = {
        name: [key for key in keys if not any(_below(key, given) for given in declared.get(name, []))]
        for name, keys in found.items()
    }
    return {name: keys for name, keys in missing.items() if keys}


def _below(key: str, term: str) -> bool:
    return key == term or key.startswith(term + ".")
