"""Equal terms: the settings that all methods of one benchmark must share, and deviations from them."""

from __future__ import annotations

import re
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
    """The leaves of a config below :data:`TERMS`, and the number of devices if the config lists them."""
    values = {key: value for key, value in leaves(config).items() if any(_below(key, term) for term in TERMS)}
    if isinstance(config.get("devices"), list | tuple):
        values["devices"] = len(config["devices"])
    return values


def deviations(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, tuple[Any, Any]]]:
    """Terms of each method that differ from the most common value; a tie goes to the method listed first.

    Maps method, then dotted key, to (own value, common value). A list item that most others lack, e.g. the small crops
    in ``augmentations``, is one deviation: its number and size of crops, else ``PRESENT``, against ``ABSENT``.
    """
    by_method = {name: terms(config) for name, config in configs.items()}
    differing: dict[str, dict[str, tuple[Any, Any]]] = {name: {} for name in configs}
    for key in sorted({key for values in by_method.values() for key in values}):
        values = {name: values.get(key, ABSENT) for name, values in by_method.items()}
        texts = [repr(value) for value in values.values()]
        common = max(values.values(), key=lambda value: texts.count(repr(value)))
        for name, value in values.items():
            if repr(value) != repr(common):
                differing[name][key] = (value, common)
    return {name: _with_whole_items(differing[name], values) for name, values in by_method.items()}


def _with_whole_items(differing: Mapping[str, tuple[Any, Any]], own: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    whole: dict[str, tuple[Any, Any]] = {}
    for key, values in differing.items():
        item = re.match(r".*?\.\d+(?=\.)", key)
        inside = {leaf: own[leaf] for leaf in own if item and _below(leaf, item[0])}
        if item and inside and all(leaf in differing and differing[leaf][1] == ABSENT for leaf in inside):
            sizes = [f"{size} {inside[leaf]}" for size in _SIZES if (leaf := f"{item[0]}.{size}") in inside]
            whole[item[0]] = (" ".join(sizes) or PRESENT, ABSENT)
        else:
            whole[key] = values
    return whole


def undeclared(
    differing: Mapping[str, Mapping[str, tuple[Any, Any]]], declared: Mapping[str, list[str]]
) -> dict[str, list[str]]:
    """Deviations by method that no declared key covers. A declared key covers everything below it."""
    missing = {
        name: [key for key in keys if not any(_below(key, term) for term in declared.get(name, []))]
        for name, keys in differing.items()
    }
    return {name: keys for name, keys in missing.items() if keys}


def _below(key: str, term: str) -> bool:
    return key == term or key.startswith(term + ".")
