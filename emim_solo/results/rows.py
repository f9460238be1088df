"""Results as JSON lines: one row for each finished stage, only ever appended."""

from __future__ import annotations

import json
import os
import platform
import warnings
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from emim_solo.ground import files
from emim_solo.ground.compare import config_hash
from emim_solo.ground.errors import UsageError

SCHEMA = 1
_KEYS = {"stage": str, "name": str, "method": str, "seed": int, "config_hash": str}
_REPORTED = ("emim-solo", "torch", "torchvision", "lightning", "torchmetrics", "timm", "hydra-core", "umap-learn")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries a result depends on; one that is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in _REPORTED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def new_row(stage: str, *, config: Mapping[str, Any], suite: Mapping[str, str], **fields: Any) -> dict[str, Any]:
    """A row that names everything that made it.

    Args:
        stage: ``pretrain``, ``knn``, ``logistic``, ``linear``, ``diagnostics``, ``umap`` or ``score``.
        config: the completed config of the pretraining run (solo-learn main's schema).
        suite: ``generation`` and ``version`` of the installed solo-learn.
        **fields: at least ``metrics`` (name to number), ``seconds``, ``epochs``, ``device``, ``checkpoint``.
    """
    return {
        "schema": SCHEMA,
        "stage": stage,
        "name": config["name"],
        "method": config["method"],
        "seed": config["seed"],
        "dataset": config["data"]["dataset"],
        "config_hash": config_hash(config),
        "suite": dict(suite),
        "versions": versions(),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **fields,
    }


def append(path: str | os.PathLike[str], row: Mapping[str, Any]) -> None:
    """Append one row; a kill at any moment leaves either the whole row or an unfinished last line.

    One ``write`` on a descriptor opened for appending, then ``fsync``. An unfinished line that an earlier kill
    left behind is closed first, so that it cannot swallow this row.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(row, default=str) + "\n"
    with open(path, "ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = "\n" + line
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All whole rows of a file; a line cut short by a kill is passed over, and named in a warning.

    Raises:
        UsageError: no such file, not in UTF-8, a line that is JSON but no row, or a row of a schema that this version
            does not read.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"no results at '{path}': expected a rows.jsonl written by a finished run; run one first")
    rows = []
    for number, line in enumerate(files.read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            warnings.warn(f"{path}:{number}: passed over a line that is cut short", stacklevel=2)
            continue
        _check(row, f"{path}:{number}")
        rows.append(row)
    return rows


def of_checkpoint(
    rows: Iterable[dict[str, Any]], folder: Path, config_hash: str, epochs: int | None = None
) -> list[dict[str, Any]]:
    """The rows of one run's checkpoint, on the run's own images, oldest first.

    Args:
        rows: to choose from.
        folder: ``<checkpoint.dir>/<method>/<version>``, or one in it. The whole of ``checkpoint.dir`` may have been moved.
        config_hash: of the run's config.
        epochs: that the checkpoint was trained for; None for rows of any.
    """
    place = Path(os.path.abspath(folder)).parts[-2:]
    return [
        row
        for row in rows
        if row["config_hash"] == config_hash
        and Path(row.get("checkpoint") or "").parts[-2:] == place
        and epochs in (None, row.get("epochs"))
    ]


def _check(row: Any, place: str) -> None:
    if not isinstance(row, dict):
        raise UsageError(f"{place}: expected a row, that is an object in JSON, got {type(row).__name__}: remove it")
    if row.get("schema") != SCHEMA:
        raise UsageError(
            f"{place}: row of schema {row.get('schema')}, expected {SCHEMA}: "
            "it was written by another version of emim-solo; move the file away and run again"
        )
    odd = [key for key, kind in _KEYS.items() if not isinstance(row.get(key), kind) or isinstance(row[key], bool)]
    metrics = row.get("metrics", {})
    if not isinstance(metrics, dict) or not all(
        isinstance(value, int | float | type(None)) for value in metrics.values()
    ):
        odd.append("metrics")
    if odd:
        raise UsageError(f"{place}: damaged row, {', '.join(odd)} missing or of another type: remove it")
