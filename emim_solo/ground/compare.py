"""Compares configs: the hash that identifies a run, and the settings in which two runs differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

# The name of a run, its folders and loggers do not change what it computes.
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

MAY_DIFFER = (
    "data.num_workers",
    "accelerator",
    "strategy",
    "enable_progress_bar",
    "enable_model_summary",
    "log_every_n_steps",
    "profiler",
    "max_time",
)
"""A run may be resumed with other values of these keys: they change no result, or their effect is recorded elsewhere.
:func:`config_hash` includes them, because it has to stay the same for rows of earlier versions."""


def config_hash(config: Mapping[str, Any]) -> str:
    """First 12 hex digits of the SHA-256 of a run's config, without the keys :data:`NOT_HASHED`."""
    text = json.dumps(_computed(config), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _computed(config: Mapping[str, Any]) -> dict[str, Any]:
    computed = {key: value for key, value in config.items() if key not in NOT_HASHED}
    if (config.get("checkpoint") or {}).get("every_n_steps"):
        computed["random numbers"] = "of each image and batch"  # the number of steps itself changes no result
    return computed


def processes(config: Mapping[str, Any]) -> int:
    """Number of processes that train a run together, from its complete config."""
    return len(config.get("devices") or [0]) * int(config.get("num_nodes") or 1)


def differences(there: Mapping[str, Any], here: Mapping[str, Any], *, but: Sequence[str] = ()) -> list[str]:
    """Sorted differences, as ``seed (1 there, 2 here)``, without :data:`NOT_HASHED` and the keys ``but``."""
    one, two = leaves(_computed(there)), leaves(_computed(here))
    values = {key: (one.get(key, "absent"), two.get(key, "absent")) for key in sorted(one.keys() | two.keys())}
    return [f"{key} ({a} there, {b} here)" for key, (a, b) in values.items() if key not in but and a != b]


def leaves(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config by dotted keys. A list counts as one value, unless it holds mappings."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, list | tuple) and any(isinstance(entry, Mapping) for entry in value):
            value = {str(index): entry for index, entry in enumerate(value)}
        if isinstance(value, Mapping) and value:
            values |= {f"{key}.{name}": leaf for name, leaf in leaves(value).items()}
        else:
            values[str(key)] = value
    return values
