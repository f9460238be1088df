"""Results as JSON lines. Each finished stage appends one row; existing rows are never changed."""

from __future__ import annotations

import json
import os
import platform
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from emim_solo.ground import files
from emim_solo.ground.compare import config_hash
from emim_solo.ground.errors import UsageError

SCHEMA = 2
_RENAMED = {
    "effective_rank": "rankme",
    "spectrum_decay": "alpha_req",
    "mi": "pair_information",
    "mi_null": "pair_information_null",
}
_KEYS = {"stage": str, "name": str, "method": str, "seed": int, "config_hash": str}
_REPORTED = ("emim-solo", "torch", "torchvision", "lightning", "torchmetrics", "timm", "hydra-core", "umap-learn")


@cache
def versions() -> Mapping[str, str]:
    """Versions of Python and of the installed libraries that a result depends on: read once, each from a file."""
    found = {name: next(iter(metadata.distributions(name=name)), None) for name in _REPORTED}
    libraries = {name: distribution.version for name, distribution in found.items() if distribution is not None}
    return {"python": platform.python_version()} | libraries


def new_row(stage: str, *, config: Mapping[str, Any], suite: Mapping[str, str], **fields: Any) -> dict[str, Any]:
    """A row that records the config hash and the versions that produced it.

    Args:
        stage: ``pretrain``, ``knn``, ``logistic``, ``linear``, ``diagnostics``, ``umap``, ``score`` or ``tune``.
        config: the complete config of the pretraining run.
        suite: ``generation`` and ``version`` of the installed solo-learn.
        **fields: at least ``metrics`` (name to number), ``seconds``, ``epochs``, ``device``, ``checkpoint``.
    """
    return {
        "schema": SCHEMA,
        "stage": stage,
        **{key: config[key] for key in ("name", "method", "seed")},
        "dataset": config["data"]["dataset"],
        "config_hash": config_hash(config),
        "suite": dict(suite),
        "versions": dict(versions()),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **fields,
    }


def append(path: str | os.PathLike[str], row: Mapping[str, Any]) -> None:
    """Append one row. After a kill, the file has either the whole row or an incomplete last line."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(row, default=str) + "\n"
    with open(path, "ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # otherwise this row joins an incomplete line
                line = "\n" + line
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All complete rows, oldest first. A line cut short by a kill gives a warning; other bad lines or no file, a UsageError."""
    if not Path(path).is_file():
        raise UsageError(
            "rows.missing", f"no results at '{path}': expected the rows.jsonl of a finished run; run one first"
        )
    return list(_rows(Path(path), {}))


def _rows(path: Path, parsed: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows of a file. Lines in ``parsed`` are not parsed again; the others are put there."""
    for number, line in enumerate(files.read_text(path).splitlines(), start=1):
        place = f"{path}:{number}"
        if line.strip() and line not in parsed:
            try:
                parsed[line] = _checked(json.loads(line), place)
            except json.JSONDecodeError:
                warnings.warn(f"{place}: passed over a line that is cut short", stacklevel=3)
        if line in parsed:
            yield parsed[line]


def newest_stages(run: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """By stage the newest row of one run's rows, oldest first, without rows of an earlier epoch or of ``best/``."""
    run = list(run)
    of_end: Mapping[str, Any] = next((row for row in reversed(run) if row["stage"] == "pretrain"), {})
    place, epochs = _place(of_end.get("checkpoint")), of_end.get("epochs") or 0
    return {
        row["stage"]: row
        for row in run
        if (row.get("epochs") or epochs) >= epochs and (not place or _place(row.get("checkpoint")) in (place, ()))
    }


def _place(checkpoint: str | None) -> tuple[str, ...]:
    """``<method>/<version>``, since ``checkpoint.dir`` may have moved."""
    return Path(os.path.abspath(checkpoint)).parts[-2:] if checkpoint else ()


class NewestRows:
    """The newest row of each stage of each run in a file, which need not exist yet. It is read again when its size changes."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path, self._size = Path(path), 0
        self._parsed: dict[str, dict[str, Any]] = {}
        self._stages: dict[tuple[str, int, str], Mapping[str, Mapping[str, Any]]] = {}

    def of_run(self, name: str, seed: int, config_hash: str) -> Mapping[str, Mapping[str, Any]]:
        """The rows of one run by stage."""
        self._read()
        return self._stages.get((name, seed, config_hash), {})

    def pretrained(self) -> list[Mapping[str, Any]]:
        """The pretraining rows of all runs."""
        self._read()
        return [stages["pretrain"] for stages in self._stages.values() if "pretrain" in stages]

    def _read(self) -> None:
        size = self.path.stat().st_size if self.path.is_file() else 0
        if size != self._size:
            self._size, runs = size, defaultdict[tuple[str, int, str], list[dict[str, Any]]](list)
            for row in _rows(self.path, self._parsed) if size else ():
                runs[row["name"], row["seed"], row["config_hash"]].append(row)
            self._stages = {run: newest_stages(of_run) for run, of_run in runs.items()}


def of_checkpoint(
    rows: Iterable[dict[str, Any]], folder: Path, config_hash: str, epochs: int | None = None
) -> list[dict[str, Any]]:
    """The rows of one run's checkpoint on the run's own images, oldest first; with ``epochs``, only rows after so many.

    Only the last two names of ``folder`` count.
    """
    return [
        row
        for row in rows
        if row["config_hash"] == config_hash
        and _place(row.get("checkpoint")) == _place(str(folder))
        and epochs in (None, row.get("epochs"))
    ]


def _checked(row: Any, place: str) -> dict[str, Any]:
    """Check a row and convert it to the current schema."""
    if not isinstance(row, dict):
        raise UsageError(
            "rows.damaged", f"{place}: expected a row, an object in JSON, got {type(row).__name__}: remove it"
        )
    if row.get("schema") not in (1, SCHEMA):
        text = f"row of schema {row.get('schema')}, expected 1 to {SCHEMA}: it is of another version of emim-solo"
        raise UsageError("rows.schema", f"{place}: {text}; move the file away and run again")
    damaged = [key for key, kind in _KEYS.items() if type(row.get(key)) is not kind]
    metrics = row.get("metrics", {})
    if not isinstance(metrics, dict) or not all(isinstance(each, int | float | None) for each in metrics.values()):
        damaged.append("metrics")
    if damaged:
        text = f"damaged row, {', '.join(damaged)} missing or of another type: remove it"
        raise UsageError("rows.damaged", f"{place}: {text}")
    if row["schema"] == 1 and row["stage"] == "diagnostics":
        row["metrics"] = _renamed(metrics)
    return row | {"schema": SCHEMA}


def _renamed(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """Convert diagnostics of schema 1 to schema 2: new names, and the null subtracted from the information.

    Schema 1 takes two views by the run's own augmentation; schema 2 takes the views of the score's protocol.
    """
    renamed = {}
    for key, value in metrics.items():
        part, _, name = key.partition("_")
        null = metrics.get(f"{key}_null")
        if name == "mi" and value is not None and null is not None:
            value -= null
        renamed[f"{part}_{_RENAMED[name]}" if name in _RENAMED else key] = value
    return renamed
