"""What README and docs/ tell users to type: typed here, by the test that :data:`RUN_BY` names, or marked with what it needs."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SMALL_BACKBONE
from hydra import compose, initialize_config_dir

from emim_solo.ground import configs
from emim_solo.results import rows

REPOSITORY = Path(__file__).resolve().parent.parent
README = REPOSITORY / "README.md"
RESULTS = REPOSITORY / "docs" / "results"
PAGES = (README, REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md")))
# What runs a command that matches from its beginning, the first that does: a test, or a file of the repository and the words in
# it. A command that nothing here can run says `# needs a GPU`, or which data set, behind it or in the line before.
RUN_BY = {
    r"make demo": "tests/test_readme.py::test_make_demo_is_the_benchmark_of_that_name",
    r"make test-main": ".github/workflows/test.yml: make test-main",
    r"make (setup|test|docs)\b": "Makefile: -j2 lint docs",
    r"make dist": "tests/test_package.py::test_twine_finds_nothing_to_say",
    r"pip install setuptools<81": "pyproject.toml: setuptools<81",
    r"pip install --no-build-isolation \.": "tests/test_package.py::test_solo_learn_main_installs_as_readme_says",
    r"pip install PATH/TO/emim-solo(\[|$|\s)": "tests/test_package.py::test_the_wheel_works_where_the_checkout_is_not",
    r"pip install --no-deps solo-learn==1.0.2": "Makefile: pip install --quiet --no-deps solo-learn==1.0.2",
    r"pip install --editable examples/": "tests/test_add_a_method.py::test_the_page_shows_the_example_as_it_is",
    r"emim-solo \w+ .*corinfomax": "tests/test_add_a_method.py::test_its_commands_train_evaluate_and_compare",
    r"python main_pretrain.py .*corinfomax": "tests/test_add_a_method.py::test_main_pretrain_of_an_unmodified_clone_trains_it",
    r"python main_pretrain.py --config-path emim-": "tests/test_registration.py::test_main_pretrain_trains_emim_in_two_processes",
    r"python main_pretrain.py --config-path scripts": "tests/test_registration.py::"
    "test_a_sweep_on_the_suites_own_barlow_config_trains_every_job",
    r"python main_linear.py": "tests/test_registration.py::test_main_linear_takes_the_shipped_config",
    r"python -m emim_solo main_knn.py": "tests/test_registration.py::test_main_knn_knows_emim_only_through_us",
    r"emim-solo configs --copy": "tests/test_configs.py::test_copy_is_whole_and_overwrites_nothing_unasked",
    r"emim-solo pretrain .*hydra/launcher": "tests/test_launchers.py::test_command_composes",
    r"emim-solo pretrain .*devices=": "tests/test_cli.py::test_emim_over_the_config_of_another_method_in_two_processes",
    r"emim-solo pretrain --config-path runs/tune": "tests/test_readme.py::test_the_section_on_images_without_labels",
    r"emim-solo pretrain": "tests/test_cli.py::test_pretrain_by_a_shipped_name_says_where_things_are",
    r"emim-solo tune": "tests/test_tune.py::test_after_a_kill_the_same_command_goes_on_in_two_processes_and_nothing_is_counted_twice",
    r"emim-solo benchmark": "tests/test_benchmark.py::test_every_stage_of_every_run_is_one_row",
    r"emim-solo export": "tests/test_export.py::test_the_commands_of_the_page",
    r"emim-solo knn": "tests/test_evaluation.py::test_knn_command_appends_a_row_beside_the_pretrainings",
    r"emim-solo linear": "tests/test_evaluation.py::test_linear_command_takes_the_suites_keys",
    r"emim-solo (score|umap)": "tests/test_readme.py::test_the_section_on_images_without_labels",
    r"python research/lab.py": "tests/test_research.py::test_the_laboratory_trains_scores_and_goes_on_where_it_was",
    r"python research/picture.py": "tests/test_research.py::test_the_picture_of_the_rivals_has_both_protocols",
    r"python research/table.py": "tests/test_research.py::test_committed_tables_are_made_from_the_committed_rows",
}
NEEDS = re.compile(r"# .*\bneeds (?:\w+ )?(?:GPUs?|data set|CIFAR-10|ImageNet(?:-100)?)\b")
SMALL = {  # for a CPU, in seconds
    "backbone.name": SMALL_BACKBONE["name"],
    **{f"backbone.kwargs.{key}": value for key, value in SMALL_BACKBONE["kwargs"].items()},
    "method_kwargs.proj_hidden_dim": 32,
    "method_kwargs.proj_output_dim": 16,
    "augmentations.0.crop_size": 32,
    "optimizer.batch_size": 32,
    "data.num_workers": 0,
    "accelerator": "cpu",
    "precision": 32,
    "strategy": "auto",
    "sync_batchnorm": False,
    "enable_progress_bar": False,
    "scheduler.warmup_epochs": 0,
    "max_epochs": 1,
}


def test_the_section_on_images_without_labels(typed: Callable[..., Any], few_digits: Path, tmp_path: Path) -> None:
    section = README.read_text().split("## Images without labels\n")[1].split("\n## ")[0]
    assert len(section.strip().splitlines()) <= 10, "as many lines as a reader has patience for"
    (block,) = re.findall(r"```console\n(.*?)```", section, flags=re.DOTALL)
    commands = [shlex.split(line) for line in block.strip().splitlines()]
    assert [command[:2] for command in commands] == [["emim-solo", c] for c in ("tune", "pretrain", "score", "umap")]
    heap = tmp_path / "heap"
    heap.mkdir()
    for number, path in enumerate(sorted((few_digits / "train").rglob("*.png"))[::2]):
        shutil.copy(path, heap / f"{number}.png")
    for command in commands:
        words = ["data.train_path=heap" if word == "data.train_path=DIR" else word for word in command[1:]]
        if "--config-name" in words:
            words = [word for word in words if not word.startswith("max_epochs=")]
            words += [f"++{key}={value}" for key, value in SMALL.items()]
        words += {"tune": ["--trials", "2"], "umap": ["--limit", "40"]}.get(command[1], [])
        done = typed(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        said = done.stdout
        if command[1] == "tune":
            assert "view information (nats)" in said
            best = yaml.safe_load((tmp_path / "runs/tune/emim-custom/best.yaml").read_text())
            assert best["data"]["no_labels"] is True
        if command[1] == "score":
            assert "held-out" in said, "images that the run was not trained on"
    rows = [json.loads(line) for line in (tmp_path / "trained_models" / "rows.jsonl").read_text().splitlines()]
    pretrained, scored = (next(row for row in rows if row["stage"] == stage) for stage in ("pretrain", "score"))
    tuned = [json.loads(line) for line in (tmp_path / "runs/tune/emim-custom/trials.jsonl").read_text().splitlines()]
    assert len(tuned) == 2
    winner = max(tuned, key=lambda row: row["metrics"]["score_view_information"])
    for key, value in winner["params"].items():
        part, name = key.split(".")
        scale = SMALL["optimizer.batch_size"] / 256 if name == "lr" else 1  # the suite's
        assert pretrained["config"][part][name] == pytest.approx(value * scale)
    assert math.isfinite(scored["metrics"]["view_information"])
    assert not [name for row in rows for name in row["metrics"] if "acc" in name], "no label was read"
    assert (tmp_path / "umap" / "train.png").is_file()


def documented(page: Path) -> Iterator[tuple[list[str], str]]:
    """Words of every command in the ``console`` blocks of a page, and the comments that go with it."""
    for block in re.findall(r"```console\n(.*?)```", page.read_text(), flags=re.DOTALL):
        above = ""
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                yield words[:end], above + line
                words = words[end + 1 :]
            above = line if line.startswith("#") else ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_is_run_by_a_test_or_says_what_it_needs(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"^(    |```(ba|z)?sh\n)(\$ )?(emim-solo|python|make|pip) ", text, re.MULTILINE), (
        "commands stand in ```console blocks"
    )
    forgotten = []
    for words, comments in documented(page):
        command = " ".join(words)
        by = next((by for beginning, by in RUN_BY.items() if re.match(beginning, command)), None)
        if by is not None:
            file, found, test = by.partition("::")
            file, _, text = (file, "", f"def {test}(") if found else by.partition(": ")
            assert text in (REPOSITORY / file).read_text(), f"{by}, which is to run `{command}`, is not there"
        elif not NEEDS.search(comments):
            forgotten.append(command)
    assert not forgotten, f"{page.name}: add these to RUN_BY with the test that runs them, or say `# needs a GPU`"


SHIPPED = [
    words[1:]
    for page in PAGES
    for words, _ in documented(page)
    if words[:2] in (["emim-solo", "pretrain"], ["emim-solo", "benchmark"])
    and not any(word.startswith(("hydra/", "runs/tune")) for word in words)
]


@pytest.mark.parametrize("words", SHIPPED, ids=" ".join)
def test_every_key_of_a_command_is_there(words: list[str]) -> None:
    """The commands that train compose as they stand, whatever they need besides."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config-path", default=words[0])
    parser.add_argument("--config-name")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args(words[1:])
    folder = REPOSITORY / given.config_path
    with initialize_config_dir(str(folder if folder.is_dir() else configs.find(given.config_path)), version_base="1.2"):
        assert compose(given.config_name, overrides=given.overrides)


def test_make_demo_is_the_benchmark_of_that_name(typed: Callable[..., Any], few_digits: Path, tmp_path: Path) -> None:
    """What make would run, run for one method with few images."""
    asked = ["make", "--dry-run", "demo", "EPOCHS=1", f"VENV={tmp_path}", "--assume-old", f"{tmp_path}/.installed"]
    (tmp_path / ".installed").touch()
    of_make_test = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")  # with which make would say its directory, too
    outside = {name: value for name, value in os.environ.items() if name not in of_make_test}
    said = subprocess.run(asked, cwd=REPOSITORY, capture_output=True, text=True, check=True, env=outside).stdout
    program, *words = shlex.split(said.splitlines()[-1])
    assert program == f"{tmp_path}/bin/emim-solo"
    words += [f"+run.data.train_path={few_digits / 'train'}", f"+run.data.val_path={few_digits / 'val'}"]
    words += ["only=emim", "diagnostics.images=64", "+run.accelerator=cpu", "+run.data.num_workers=0"]
    done = typed(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    made = {row["stage"]: row["epochs"] for row in rows.read(tmp_path / "runs" / "demo" / "rows.jsonl")}
    assert made.keys() >= {"pretrain", "knn", "logistic", "linear", "diagnostics", "score"}
    assert made["pretrain"] == 1


def table(page: str, heading: str) -> dict[str, dict[str, str]]:
    """Cells of the first table of a page that has this column, by the first cell (its first row) and column, without stars."""
    lines = [line.strip("| ").replace("*", "").split(" | ") for line in (REPOSITORY / page).read_text().splitlines()]
    start = next(number for number, line in enumerate(lines) if heading in [cell.strip() for cell in line])
    names = [cell.strip() for cell in lines[start]]
    rows = {}
    for line in lines[start + 2 :]:
        if len(line) != len(names):
            break
        cells = {name: cell.strip() for name, cell in zip(names, line, strict=True)}
        rows.setdefault(line[0].strip(), cells)
    return rows


def rounded(cell: str) -> str:
    """``41.02 ± 0.48`` to one place, as README has it."""
    return " ± ".join(f"{float(number):.1f}" for number in cell.split(" ± "))


def test_numbers_of_readme_are_those_of_the_committed_tables() -> None:
    """Tests of rows and research hold those tables to their rows."""
    shown = [list(row.values()) for row in table("README.md", "VICReg").values()]
    methods = ("emim", "vicreg", "barlow_twins")
    real_size = table("docs/results/real-size/README.md", "RankMe")
    digits = table("docs/results/digits/table.md", "Linear top-1 (%)")
    cifar = table("docs/results/cifar10-lab/rivals_test.md", "linear top-1 (%)")
    columns = linear, nearest = "Linear top-1 (%)", "20-NN top-1 (%)"
    expected = [[of[method][column] for method in methods] for of in (real_size, digits) for column in columns]
    expected += [[rounded(cifar[method][column]) for method in methods] for column in ("linear top-1 (%)", nearest)]
    assert [row[1:] for row in shown] == expected
    scores = table("docs/results/label-free/cifar10.md", "Spearman, all")
    text = README.read_text().replace("\n  ", " ")
    of = {name: scores[name]["Spearman, all"] for name in ("view information", "RankMe", "LiDAR")}
    assert f"a rank correlation of {of['view information']}. RankMe has {of['RankMe']}, LiDAR {of['LiDAR']}." in text
    behind = table("docs/results/cifar10-lab/rivals_test.md", "emim minus")["vicreg"]["20-NN"]
    assert f"VICReg is {rounded(behind).lstrip('-')} above" in text and behind.startswith("-")
    of_digits = table("docs/results/label-free/digits.md", "Spearman, all")["view information"]["Spearman, all"]
    assert f"{of_digits.split()[0]} on the digits" in text
    assert f"SimCLR has {real_size['simclr'][linear]} % (20-NN {real_size['simclr'][nearest]} %)" in text
    lead = table("docs/results/real-size/README.md", "Difference")["emim − vicreg"]
    assert f"its linear accuracy is {lead[linear].removeprefix('+')} points above" in text
    assert f"lead over VICReg is only {lead['Logistic top-1 (%)'].removeprefix('+')}" in text
    page = (RESULTS / "real-size" / "README.md").read_text()
    found = re.search(r"Pretraining takes (\d+ to \d+ minutes of one) core", page)
    assert found is not None and f"takes {found[1]} CPU core" in text
