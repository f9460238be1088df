"""The laboratory runs, goes on where it was, and its tables are those of the committed rows."""

from __future__ import annotations

import hashlib
import json
import re
import runpy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from scipy import stats

REPOSITORY = Path(__file__).resolve().parent.parent
RESEARCH = REPOSITORY / "research"
RESULTS = REPOSITORY / "docs" / "results" / "cifar10-lab"
Script = Callable[..., str]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a script of research/ in this process, as Python would run it; returns what it prints."""

    def run(name: str, *arguments: object) -> str:
        path = RESEARCH / name
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        monkeypatch.setattr(sys, "path", [str(path.parent), str(RESEARCH), *sys.path])
        capsys.readouterr()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_the_laboratory_trains_scores_and_goes_on_where_it_was(digits: Path, tmp_path: Path, script: Script) -> None:
    data, rows, trials = tmp_path / "data", tmp_path / "rows.jsonl", tmp_path / "trials.yaml"
    data.mkdir()
    (data / "train").symlink_to(digits / "train")
    (data / "test").symlink_to(digits / "val")
    small = "images: 512, validation_images: 400, epochs: 2, batch: 64, lr: 4.0e-3, dim: 32, hidden: 64"
    trials.write_text(f"multicrop: {{{small}, small_views: 2}}\nvicreg: {{{small}, loss: vicreg}}\n")
    arguments = (trials, "--data", data, "--rows", rows, "--jobs", 1)
    script("lab.py", *arguments, "--only", "multicrop")
    script("lab.py", *arguments)
    first, second = map(json.loads, rows.read_text().splitlines())
    assert (first["trial"], second["trial"]) == ("multicrop", "vicreg")
    for row in (first, second):
        assert 30 < row["knn"] <= 100  # ten classes
        assert 30 < row["linear"] <= 100
        assert row["mi"] > row["mi_null"]
    assert script("lab.py", *arguments) == ""  # nothing is left to do
    assert len(rows.read_text().splitlines()) == 2
    table = script("table.py", rows, "--split", "val", "--against", "multicrop")
    assert f"| {first['knn'] - second['knn']:+.2f} |" in table


@pytest.mark.parametrize("path", sorted((RESEARCH / "trials").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_committed_row_is_of_a_trial_with_those_settings(path: Path) -> None:
    trials = runpy.run_path(str(RESEARCH / "lab.py"))["trials_of"](path)
    rows = [json.loads(line) for line in (RESULTS / f"{path.stem}.jsonl").read_text().splitlines()]
    assert {row["trial"] for row in rows} == trials.keys()
    for row in rows:
        assert trials[row["trial"]] | row["settings"] == trials[row["trial"]], row["trial"]


@pytest.mark.parametrize(
    ("table", "arguments"),
    [
        ("search.md", ("search.jsonl", "--split", "val")),
        ("stability.md", ("stability.jsonl", "--split", "val", "--unlabelled")),
        ("test.md", ("test.jsonl", "--against", "emim")),
        ("rivals.md", ("rivals.jsonl", "--split", "val", "--unlabelled")),
        ("rivals_test.md", ("rivals_test.jsonl", "--against", "emim")),
        ("ablation.md", ("ablation.jsonl", "--split", "val", "--unlabelled", "--against", "default")),
    ],
)
def test_committed_tables_are_made_from_the_committed_rows(
    table: str, arguments: tuple[str, ...], script: Script
) -> None:
    assert (RESULTS / table).read_text() == script("table.py", RESULTS / arguments[0], *arguments[1:])


LABEL_FREE = REPOSITORY / "docs" / "results" / "label-free"


@pytest.mark.parametrize("name", ["cifar10", "digits"])
def test_tables_of_the_score_are_made_from_the_committed_rows(name: str, script: Script) -> None:
    assert (LABEL_FREE / f"{name}.md").read_text() == script("label_free/table.py", LABEL_FREE / f"{name}.jsonl")


def test_runs_of_the_score_are_the_recipes_that_were_drawn(script: Script) -> None:
    drawn = script("label_free/draw.py")
    assert drawn == (RESEARCH / "label_free" / "trials.yaml").read_text()
    rows = list(map(json.loads, (LABEL_FREE / "cifar10.jsonl").read_text().splitlines()))
    trials = yaml.safe_load(drawn)
    assert len({row["trial"] for row in rows}) == len(rows) >= 100
    for row in rows:
        assert trials[row["trial"]].items() <= row["settings"].items(), row["trial"]
        assert row["precision"] == ("bfloat16" if {"avx512_bf16", "amx_bf16"} & set(row["processor"]) else "float32")
    assert script("label_free/draw.py", "--digits") == (RESEARCH / "label_free" / "digits.yaml").read_text()
    of_digits = list(map(json.loads, (LABEL_FREE / "digits.jsonl").read_text().splitlines()))
    entries = yaml.safe_load((RESEARCH / "label_free" / "digits.yaml").read_text())["methods"]
    trained = [row for row in of_digits if row["stage"] == "pretrain"]
    assert len(trained) >= 60
    for row in trained:
        entry = entries[row["name"]]
        assert row["method"] == entry["method"]
        assert entry["method_kwargs"].items() <= row["config"]["method_kwargs"].items(), row["name"]


def test_the_measures_of_the_score_are_scipys() -> None:
    sys.path.insert(0, str(RESEARCH / "label_free"))
    try:
        import table
    finally:
        sys.path.pop(0)
    rng = np.random.default_rng(0)
    scores, quality = rng.integers(0, 5, 30).astype(float), rng.normal(size=30)
    assert table.spearman(scores, quality) == pytest.approx(stats.spearmanr(scores, quality).statistic)
    assert table.kendall(scores, quality) == pytest.approx(stats.kendalltau(scores, quality).statistic)
    several = np.stack([scores, quality]), np.stack([quality, quality])
    assert table.spearman(*several) == pytest.approx([table.spearman(scores, quality), 1])
    assert table.kendall(*several) == pytest.approx([table.kendall(scores, quality), 1])
    assert table.regret(np.array([1.0, 3.0, 3.0]), np.array([9.0, 4.0, 6.0])) == 4, "the mean of the two best-scored"
    methods = np.array(["a"] * 15 + ["b"] * 15)
    both = [stats.spearmanr(scores[methods == m], quality[methods == m]).statistic for m in "ab"]
    assert table.within(table.spearman)(scores, quality, methods) == pytest.approx(np.mean(both))


def test_held_out_images_are_whole_classes_shares_and_in_one_part_only(
    digits: Path, tmp_path: Path, script: Script
) -> None:
    script("hold_out.py", digits / "train", tmp_path / "split")
    parts = {
        name: {path.relative_to(tmp_path / "split" / name) for path in (tmp_path / "split" / name).glob("*/*")}
        for name in ("train", "val")
    }
    assert not parts["train"] & parts["val"]
    assert parts["train"] | parts["val"] == {
        path.relative_to(digits / "train") for path in (digits / "train").glob("*/*")
    }
    for label in map(str, range(10)):
        held_out = sum(path.parent.name == label for path in parts["val"])
        assert held_out / sum(path.parent.name == label for part in parts.values() for path in part) == pytest.approx(
            0.2, abs=0.02
        )


def test_the_picture_of_the_rivals_has_both_protocols(tmp_path: Path, script: Script) -> None:
    script("picture.py", RESULTS / "rivals_test.jsonl", tmp_path / "rivals.svg")
    drawn = (tmp_path / "rivals.svg").read_text()
    for words in ("two views and two small crops", "vicreg_pairs", "barlow_twins"):
        assert f"<!-- {words} -->" in drawn


def test_of_the_kept_rows_at_real_size_those_of_complete_runs_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    names = runpy.run_path(str(RESEARCH / "real_size" / "run.py"), run_name="real_size")
    kept = (REPOSITORY / "docs" / "results" / "real-size" / "two-views-recipes.jsonl").read_text().splitlines()
    stages = {json.loads(line)["stage"] for line in kept}
    assert sorted(names["complete"](kept, stages)) == sorted(f"{line}\n" for line in kept)
    last = json.loads(kept[-1])["name"]
    without_a_stage = names["complete"](kept[:-1], stages)
    assert {json.loads(line)["name"] for line in without_a_stage} == {json.loads(line)["name"] for line in kept} - {
        last
    }


@pytest.mark.parametrize(
    ("picture", "rows"),
    [
        ("rivals", ["cifar10-lab/rivals_test"]),
        ("label-free", ["label-free/cifar10", "label-free/digits"]),
        ("real-size", ["real-size/two-views"]),
        ("report", ["digits/rows"]),
        ("report-umap", ["digits/rows"]),
    ],
)
def test_pictures_are_of_the_committed_rows(picture: str, rows: list[str]) -> None:
    """Each says in its metadata which rows it was made from; those of the report are a screenshot of a benchmark's page."""
    content = b"".join((REPOSITORY / "docs" / "results" / f"{name}.jsonl").read_bytes() for name in rows)
    with Image.open(REPOSITORY / "docs" / "images" / f"{picture}.png") as image:
        assert image.info["rows"] == hashlib.sha256(content).hexdigest(), "make the picture again"


def test_the_tables_at_real_size_are_those_of_the_rows(script: Script) -> None:
    results = REPOSITORY / "docs" / "results" / "real-size"
    page = (results / "README.md").read_text().replace("*", "")
    for name, arguments in (
        ("finals.py", ["two-views.jsonl"]),
        ("finals.py", ["patches.jsonl"]),
        ("choose.py", ["two-views-recipes.jsonl", "--table"]),
        ("choose.py", ["patches-recipes.jsonl", "--table"]),
    ):
        said = script(f"real_size/{name}", results / arguments[0], *arguments[1:])
        lines = [line for line in said.replace("*", "").splitlines() if line.startswith(("| ", "Pretraining takes"))]
        assert len(lines) >= 3
        assert not [line for line in lines if line not in page], arguments


@pytest.mark.parametrize("options", [["--half", "show"], ["--without", "emim_mean"]], ids=" ".join)
def test_the_tables_out_of_the_box_are_those_of_the_rows(options: list[str], script: Script) -> None:
    results = REPOSITORY / "docs" / "results" / "out-of-the-box"
    said = script("out_of_the_box/table.py", results / "rows.jsonl", *options).splitlines()
    assert " 0 not complete" in said[0]
    lines, page = [line for line in said if line.startswith("| ")], (results / "README.md").read_text()
    assert len(lines) >= 13
    assert not [line for line in lines if line not in page]


def test_the_table_of_the_candidates_is_that_of_the_rows(script: Script) -> None:
    """Three columns of the script's, by the names of the page."""
    results = REPOSITORY / "docs" / "results" / "out-of-the-box"
    more = ("--half", "choose", "--more", results / "candidates.jsonl")
    said = script("out_of_the_box/table.py", results / "rows.jsonl", *more).splitlines()
    assert " 0 not complete" in said[0]
    names = {
        "mmcr": "MMCR",
        'spanned {"entropy": "mean", "form": "root", "weight": 0.0, "centred": true}': "U",
        'spanned {"entropy": "mean", "form": "root", "weight": 0.0, "sphere": false}': "T",
        'spanned {"entropy": "mean", "noise": 1.0, "weight": 0.0}': "B",
        'spanned {"entropy": "mean", "noise": 1.0, "averaged": true}': "A",
        "emp_ssl": "EMP-SSL",
        "emim_bound": "EMIM's bound",
        "emim": "EMIM's default",
    }
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said if line.startswith("| ")]
    page = (results / "default.md").read_text()
    for name, settings, distance, _, collapsed, _, less in (row for row in rows if row[0] in names):
        line = f"| {names.pop(name)} | {settings} | {distance} | {collapsed} | {less}"
        assert f"{line} |\n" in page or f"{line}|\n" in page, line
    assert not names


def test_the_powers_in_float32_are_those_of_the_rows(script: Script) -> None:
    results = REPOSITORY / "docs" / "results" / "out-of-the-box"
    said = script(
        "out_of_the_box/table.py", results / "rows.jsonl", "--float32", results / "float32.jsonl"
    ).splitlines()
    names = {"mmcr less mmcr in bfloat16": "MMCR less MMCR in bfloat16"}
    names |= {'schatten {"pairs": true} less mmcr': "pairs of views less MMCR"}
    names |= {f'schatten {{"power": {p / 3}}} less mmcr': f"p = {p}/3 less MMCR" for p in (1, 2)}
    names |= {'schatten {"power": "noise"} less mmcr': "p = v less MMCR"}
    names |= {'schatten {"power": "noise", "least": 0.5} less mmcr': "p = v, 1/2 or more, less MMCR"}
    names |= {"remembered less mmcr": "256 rows remembered less MMCR"}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said[2:]]
    page = (results / "default.md").read_text()
    for name, settings, difference in rows:
        assert f"| {names.pop(name)} | {settings} | {difference} |" in page
    assert not names


def test_what_one_forward_costs_is_that_of_the_rows(script: Script) -> None:
    results = REPOSITORY / "docs" / "results" / "out-of-the-box"
    said = script("out_of_the_box/table.py", results / "rows.jsonl", "--forwards", results / "forwards.jsonl")
    found = re.search(r"(\d+) settings: -([\d.]+ ± [\d.]+) points", said)
    assert found is not None
    page = (REPOSITORY / "docs" / "many-views.md").read_text()
    assert f"over {found[1]} settings" in page and f"{found[2]} points below one for each" in page
