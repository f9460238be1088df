"""Rows of results survive a kill and say what made them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emim_solo.ground import compare
from emim_solo.ground.errors import UsageError
from emim_solo.results import rows

CONFIG = {"name": "run", "method": "emim", "seed": 3, "data": {"dataset": "custom"}, "optimizer": {"lr": 0.1}}
SUITE = {"generation": "main", "version": "1.0.6"}


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    row = rows.new_row("knn", config=CONFIG, suite=SUITE, metrics={"top1": 90.5}, seconds=1.0)
    for _ in range(3):
        rows.append(tmp_path / "below" / "rows.jsonl", row)
    assert rows.read(tmp_path / "below" / "rows.jsonl") == [row, row, row]
    assert row["method"] == "emim"
    assert row["seed"] == 3
    assert row["suite"] == SUITE
    assert "torch" in row["versions"]


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_a_line_cut_short_by_a_kill_costs_that_row_only(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = rows.new_row("knn", config=CONFIG, suite=SUITE, metrics={})
    rows.append(path, row)
    rows.append(path, row)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert rows.read(path) == ([row, row] if cut == 1 else [row])
    rows.append(path, row)
    assert len(rows.read(path)) == (3 if cut == 1 else 2)


def test_hash_is_of_what_a_run_computes(tmp_path: Path) -> None:
    first = compare.config_hash(CONFIG)
    assert compare.config_hash({**CONFIG, "name": "other", "checkpoint": {"dir": "elsewhere"}}) == first
    assert compare.config_hash({**CONFIG, "optimizer": {"lr": 0.2}}) != first
    assert compare.config_hash(dict(reversed(CONFIG.items()))) == first


def test_rows_of_one_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "runs" / "emim" / "0"
    one = rows.new_row("knn", config=CONFIG, suite=SUITE, metrics={}, checkpoint=str(place), epochs=2)
    moved = one | {"checkpoint": "/elsewhere/emim/0"}
    others = [
        one | {"checkpoint": str(place.with_name("1"))},
        one | {"checkpoint": str(place / "best")},
        one | {"checkpoint": None},
        one | {"config_hash": "another"},
    ]
    ours = compare.config_hash(CONFIG)
    assert rows.of_checkpoint([one, *others, moved], place, ours) == [one, moved]
    assert rows.of_checkpoint([one, *others], place / "best", ours) == [others[1]]
    assert rows.of_checkpoint([one | {"epochs": 1}, one], place, ours, epochs=2) == [one]
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    assert rows.of_checkpoint([one, *others], Path("."), ours) == [one]


def test_missing_file_and_older_schema(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no results"):
        rows.read(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"schema": 0}) + "\n")
    with pytest.raises(UsageError, match=r"rows.jsonl:1: row of schema 0, expected 1"):
        rows.read(tmp_path / "rows.jsonl")
