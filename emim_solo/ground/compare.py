"""Configs compared: what a run is known by, and what two runs differ in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

# What a run is called and where it lies does not change what it computes.
NOT_HASHED = (
    "name",
    "checkpoint",
    "auto_resume",
    "resume_from_checkpoint",
    "wandb",
    "wandb_run_id",
    "tensorboard",
    "devices",
)

NO_RESULT = (
    "data.num_workers",
    "accelerator",
    "strategy",
    "enable_progress_bar",
    "enable_model_summary",
    "log_every_n_steps",
    "profiler",
    "max_time",
)
"""Keys that change no result, or none that is not said elsewhere: a run may go on with others. They are in
:func:`config_hash`, by which rows of earlier versions are known."""


def config_hash(config: Mapping[str, Any]) -> str:
    """First 12 hex digits of the SHA-256 of a run's config, less the names and places in it."""
    text = json.dumps(_computed(config), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _computed(config: Mapping[str, Any]) -> dict[str, Any]:
    computed = {key: value for key, value in config.items() if key not in NOT_HASHED}
    if (config.get("checkpoint") or {}).get("every_n_steps"):
        computed["random numbers"] = "of each image and batch"  # no longer of each epoch, whatever the number of steps
    return computed


def processes(config: Mapping[str, Any]) -> int:
    """How many processes train a run together, by its complete config."""
    return len(config.get("devices") or [0]) * int(config.get("num_nodes") or 1)


def differences(there: Mapping[str, Any], here: Mapping[str, Any], *, but: Sequence[str] = ()) -> list[str]:
    """What two configs differ in, less names, places and the keys ``but``: ``seed (1 there, 2 here)``, sorted."""
    one, two = leaves(_computed(there)), leaves(_computed(here))
    values = {key: (one.get(key, "absent"), two.get(key, "absent")) for key in sorted(one.keys() | two.keys())}
    return [f"{key} ({a} there, {b} here)" for key, (a, b) in values.items() if key not in but and a != b]


def leaves(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config by their dotted keys; a list is one value, unless it holds mappings."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, list | tuple) and any(isinstance(entry, Mapping) for entry in value):
            value = {str(index): entry for index, entry in enumerate(value)}
        if isinstance(value, Mapping) and value:
            values |= {f"{key}.{name}": leaf for name, leaf in leaves(value).items()}
        else:
            values[str(key)] = value
    return values
