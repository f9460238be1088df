"""Rows of results survive a kill and say what made them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from emim_solo.ground import compare
from emim_solo.results import rows
from emim_solo.results.tables import collect, differences, headline, to_markdown

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


def test_rows_of_an_earlier_epoch_or_of_the_best_are_not_the_runs(tmp_path: Path) -> None:
    """``emim-solo knn FOLDER/best`` adds a row to the same file, of the same config."""
    place = str(tmp_path / "runs" / "emim" / "0")
    pretrained = rows.new_row("pretrain", config=CONFIG, suite=SUITE, metrics={}, checkpoint=place, epochs=3)
    last, best, earlier = (
        rows.new_row("knn", config=CONFIG, suite=SUITE, metrics={"acc": accuracy}, checkpoint=where, epochs=epochs)
        for accuracy, where, epochs in ((1.0, place, 3), (2.0, f"{place}/best", 3), (3.0, place, 2))
    )
    scored = rows.new_row("score", config=CONFIG, suite=SUITE, metrics={}, checkpoint="/moved/emim/0", epochs=3)
    again = last | {"metrics": {"acc": 4.0}}
    everything = [pretrained, last, best, earlier, scored]
    assert rows.newest_stages(everything) == {"pretrain": pretrained, "knn": last, "score": scored}
    assert rows.newest_stages([*everything, again])["knn"] == again
    for row in everything:
        rows.append(tmp_path / "rows.jsonl", row)
    by_run = rows.NewestRows(tmp_path / "rows.jsonl")
    run = CONFIG["name"], CONFIG["seed"]
    assert by_run.of_run(*run, compare.config_hash(CONFIG))["knn"] == last
    assert collect(rows.read(tmp_path / "rows.jsonl")).rows[run]["knn"] == last


def test_missing_file_and_older_schema(tmp_path: Path, refused: Any) -> None:
    with refused("rows.missing", "no results"):
        rows.read(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"schema": 0}) + "\n")
    with refused("rows.schema", "rows.jsonl:1: row of schema 0", "1 to 2"):
        rows.read(tmp_path / "rows.jsonl")


def test_each_line_is_parsed_once_whoever_appends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed, loads = [], json.loads
    monkeypatch.setattr(rows.json, "loads", lambda line: parsed.append(line) or loads(line))
    path = tmp_path / "rows.jsonl"
    newest = rows.NewestRows(path)
    asked = "run", 3, compare.config_hash(CONFIG)
    assert newest.of_run(*asked) == {}
    first, second, third = (
        rows.new_row("knn", config=CONFIG, suite=SUITE, metrics={"top1": n}) for n in (1.0, 2.0, 3.0)
    )
    rows.append(path, first)
    assert newest.of_run(*asked) == {"knn": first}
    with open(path, "a") as file:  # another job, in the middle of its row
        file.write(json.dumps(second)[:50])
    with pytest.warns(UserWarning, match="jsonl:2: passed over"):
        assert newest.of_run(*asked) == {"knn": first}
    with open(path, "a") as file:
        file.write(json.dumps(second)[50:] + "\n")
    assert newest.of_run(*asked) == {"knn": second} == newest.of_run(*asked)
    rows.append(path, third | {"seed": 4})
    assert newest.of_run("run", 4, asked[2])["knn"]["metrics"] == {"top1": 3.0}
    assert newest.of_run(*asked) == {"knn": second}
    assert len(parsed) == 4 and rows.read(path) == [first, second, third | {"seed": 4}]
    path.unlink()
    assert newest.of_run(*asked) == {}


# -- rows of before ------------------------------------------------------------------------------------------------

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
COMMITTED = sorted(path.relative_to(RESULTS).as_posix() for path in RESULTS.rglob("*.jsonl"))


@pytest.mark.parametrize("name", COMMITTED)
def test_every_committed_file_is_read(name: str) -> None:
    """Rows of the package by it; those of research/ have no schema, and are its scripts'."""
    lines = [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]
    if "schema" not in lines[0]:
        assert all("settings" in line for line in lines)
        return
    found = rows.read(RESULTS / name)
    assert len(found) == len(lines)
    for row, line in zip(found, lines, strict=True):
        assert row["schema"] == rows.SCHEMA
        old, new = line["metrics"], row["metrics"]
        if row["stage"] != "diagnostics":
            assert json.dumps(row) == json.dumps(line | {"schema": rows.SCHEMA})  # NaN is not NaN
            continue
        assert not [key for key in new if re.search(r"_(mi|mi_null|effective_rank|spectrum_decay)$", key)]
        for part in {key.partition("_")[0] for key in old if key.endswith("_mi")}:
            expected = {
                "rankme": old[f"{part}_effective_rank"],
                "alpha_req": old[f"{part}_spectrum_decay"],
                "pair_information_null": old[f"{part}_mi_null"],
                "pair_information": old[f"{part}_mi"] - old[f"{part}_mi_null"],
            }
            for key, value in expected.items():
                assert new[f"{part}_{key}"] == pytest.approx(value, rel=0, abs=0, nan_ok=True)
        assert len(new) == len(old)


def test_values_that_were_none_or_nan_stay_so(tmp_path: Path) -> None:
    row = rows.new_row("diagnostics", config=CONFIG, suite=SUITE, metrics={})
    old = row | {"schema": 1, "metrics": {"projector_mi": None, "projector_mi_null": math.nan, "backbone_mi": 1.5}}
    rows.append(tmp_path / "rows.jsonl", old)
    (found,) = rows.read(tmp_path / "rows.jsonl")
    assert found["metrics"]["projector_pair_information"] is None
    assert math.isnan(found["metrics"]["projector_pair_information_null"])


@pytest.mark.parametrize("name", sorted(path.parent.name for path in RESULTS.glob("*/table.md")))
def test_committed_tables_are_made_from_their_rows(name: str) -> None:
    results = collect(rows.read(RESULTS / name / "rows.jsonl"))
    assert (RESULTS / name / "table.md").read_text() == to_markdown(headline(results))
    assert (RESULTS / name / "differences.md").read_text() == to_markdown(differences(results))
