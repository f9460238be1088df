"""``emim-solo tune`` on a few digits: what is searched, what becomes of the trials, kills, and labels that are not read."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import optuna
import processes
import pytest
import torch
import yaml
from conftest import SMALL_OVERRIDES
from lightning.pytorch import Trainer
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from emim_solo import cli
from emim_solo.checkpoints import opening as checkpoints
from emim_solo.ground import configs
from emim_solo.ground.errors import out_of_memory
from emim_solo.results import rows
from emim_solo.training.live_score import MONITOR
from emim_solo.tuning import study as study_module
from emim_solo.tuning.command import tune_main
from emim_solo.tuning.search import Search
from emim_solo.tuning.study import Tuning

# A rate of 1e30 gives a loss that is not finite.
SEARCHED = {"optimizer.lr": "choice(0.001, 0.01, 1e30)", "method_kwargs.weight": "interval(1, 8)"}
TRIALS = 4
# Random, and each trial's seed is its own: what another order of kills and processes must not change.
SETTINGS = {"trials": TRIALS, "sampler": "RandomSampler", "pruner": "none", "seed": 3}
Written = Callable[..., list[str]]
Refused = Callable[..., AbstractContextManager[Any]]


@pytest.fixture(scope="module")
def written(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Writes a search to a file; gives the arguments of the command that makes it in a folder."""
    folder = tmp_path_factory.mktemp("searches")

    def write(output: Path, images: Path = few_digits, **changes: Any) -> list[str]:
        fixed = {
            "data.train_path": str(images / "train"),
            "data.val_path": str(images / "val"),
            "data.num_workers": 0,
            "optimizer.batch_size": 32,
            **dict(override.split("=") for override in SMALL_OVERRIDES),
            "++accelerator": "cpu",
            "++enable_progress_bar": False,
            "max_epochs": 2,
            "score.every_n_epochs": 1,
        }
        params = {**fixed, **changes.pop("params", SEARCHED)}
        file = folder / f"{len(list(folder.iterdir()))}.yaml"
        file.write_text(yaml.safe_dump({**SETTINGS, **changes, "params": params}, sort_keys=False))
        arguments = ["--config-path", "pretrain/digits", "--config-name", "emim"]
        return [*arguments, "--search", str(file), "--output", str(output)]

    return write


@pytest.fixture(scope="module")
def searched(written: Written, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a search that nothing disturbed; no test trains in it."""
    folder = tmp_path_factory.mktemp("tune") / "search"
    cli.main(["tune", *written(folder)])
    return folder


def results(folder: Path) -> list[tuple[Any, ...]]:
    """What is to be the same wherever, whenever and in how many pieces a search was made."""
    keys = ("trial", "params", "state", "epochs", "metrics")
    return sorted(
        (tuple(row[key] for key in keys) for row in rows.read(folder / "trials.jsonl")), key=lambda row: row[0]
    )


# -- a whole search --------------------------------------------------------------------------------------------------


def test_trials_are_ranked_by_their_last_score_and_failed_ones_are_kept(
    searched: Path, written: Written, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (searched / "study.db").read_bytes()
    cli.main(["tune", *written(searched)])  # all is there: it only says so
    said = capsys.readouterr().out
    assert f"{TRIALS} of {TRIALS} trials are there" in said
    assert (searched / "study.db").read_bytes() == before

    table = rows.read(searched / "trials.jsonl")
    runs = {Path(row["checkpoint"]).name: row for row in rows.read(searched / "rows.jsonl")}
    assert [row["trial"] for row in table] == [1, 2, 3, 4]
    finished = [row for row in table if row["state"] == "finished"]
    failed = [row for row in table if row["state"] == "failed"]
    assert finished and failed and len(finished) + len(failed) == TRIALS
    for row in finished:
        run = runs[f"trial-{row['trial']}"]
        assert row["metrics"][MONITOR] == run["metrics"][MONITOR] > 0
        assert row["config_hash"] == run["config_hash"] and row["epochs"] == run["epochs"] == 2
        assert run["config"]["method_kwargs"]["weight"] == row["params"]["method_kwargs.weight"]
    for row in failed:
        assert row["params"]["optimizer.lr"] == 1e30
        assert row["metrics"][MONITOR] is None and "NaN or" in row["reason"]
        assert f"trial {row['trial']}: {row['reason']}" in said
    order = [row["trial"] for row in sorted(finished, key=lambda row: -row["metrics"][MONITOR])]
    lines = said[said.index("─\n") :].splitlines()[1 : TRIALS + 1]
    assert [int(line.split()[-1]) for line in lines][: len(order)] == order
    assert said.splitlines()[-1] == f"emim-solo pretrain --config-path {searched} --config-name best"
    for picture in ("trials.png", "trials.pdf"):
        assert (searched / picture).stat().st_size > 5000


def test_the_config_that_won_trains_the_run_that_won(searched: Path, tmp_path: Path) -> None:
    best = max(rows.read(searched / "trials.jsonl"), key=lambda row: row["metrics"][MONITOR] or -1)
    text = (searched / "best.yaml").read_text()
    assert text.startswith("# emim-solo tune --config-path pretrain/digits")
    assert f"# Trial {best['trial']} of 4 (" in text and best["protocol"] in text
    assert f"{best['metrics'][MONITOR]:.4f} nats" in text
    place = ["--config-path", str(searched), "--config-name", "best", f"checkpoint.dir={tmp_path}"]
    cli.main(["pretrain", *place])
    (row,) = rows.read(tmp_path / "rows.jsonl")
    assert row["metrics"][MONITOR] == best["metrics"][MONITOR]
    assert row["config_hash"] == best["config_hash"]
    assert row["name"] == "emim-digits"
    assert not {"outputs", ".hydra"}.intersection(path.name for path in Path().iterdir())


def test_another_search_in_its_folder_is_refused_with_what_differs(
    searched: Path, written: Written, refused: Refused
) -> None:
    for changes, names in (
        ({"params": {**SEARCHED, "method_kwargs.weight": "interval(1, 9)"}}, ("weight (interval(1", "8", "9")),
        ({"params": {**SEARCHED, "optimizer.weight_decay": 0.5}}, ("optimizer.weight_decay (0.0001 there, 0.5 here)",)),
        ({"params": {**SEARCHED, "score.protocol": "default"}}, ("protocol",)),
        ({"seed": 4}, ("seed (3 there, 4 here)",)),
        ({"pruner": None}, ("pruner",)),
    ):
        with refused("search.other", str(searched), *names, "--output"):
            tune_main(written(searched, **changes))


def test_keys_that_change_no_result_and_images_that_were_moved_are_no_difference(
    searched: Path, few_digits: Path, written: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = shutil.copytree(few_digits, tmp_path / "moved")
    odd = {
        "data.num_workers": 1,
        "++strategy": "auto",
        "++accelerator": "auto",
        "++log_every_n_steps": 3,
        "devices": "[0]",
    }
    tune_main(written(searched, moved, params={**odd, **SEARCHED}))
    assert f"{TRIALS} of {TRIALS} trials are there" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["renamed", "of another size", "one more", "a class fewer"])
def test_trials_of_other_images_are_refused(
    change: str, searched: Path, few_digits: Path, written: Written, tmp_path: Path, refused: Refused
) -> None:
    images = shutil.copytree(few_digits, tmp_path / "images")
    one = sorted((images / "val" / "0").iterdir())[0]
    if change == "renamed":
        one.rename(one.with_name("a.png"))
    elif change == "of another size":
        one.write_bytes(one.read_bytes() + b"0")
    elif change == "one more":
        shutil.copy(one, one.with_name("a.png"))
    else:
        for split in ("train", "val"):
            shutil.rmtree(images / split / "0")
    with refused("search.other", "data.val_path", "60 images there"):
        tune_main(written(searched, images))


def test_a_folder_of_version_0_2_goes_on_and_its_images_are_recorded(
    searched: Path, written: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(searched, tmp_path / "search")
    with sqlite3.connect(folder / "study.db") as database:
        (text,) = database.execute("select value_json from study_user_attributes where key = 'search'").fetchone()
        old = json.loads(text)
        recorded = old.pop("images")
        database.execute("update study_user_attributes set value_json = ? where key = 'search'", (json.dumps(old),))
    database.close()
    tune_main(written(folder))
    assert "recorded no images" in capsys.readouterr().out
    assert optuna.load_study(study_name="tune", storage=f"sqlite:///{folder}/study.db").user_attrs["search"] == (
        old | {"images": recorded}
    )


# -- folders and disks -----------------------------------------------------------------------------------------------

ONE = {"trials": 1, "params": {"optimizer.lr": "choice(0.001, 0.01)", "max_epochs": 1}}


def test_all_of_a_search_lies_in_the_folder_that_was_named(
    written: Written, few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a URL, a glob, a format string or a shell would read as its own; and images in a folder that is no UTF-8."""
    monkeypatch.chdir(tmp_path)
    images = Path(os.fsdecode(os.fsencode(tmp_path) + b"/n\xe9"))
    shutil.copytree(few_digits, images)
    folder = Path("s?mode=ro #%20&{x} [a]*;'~$é")
    settings = {**ONE["params"], "data.train_path": f"'{images}/train'"}  # type: ignore[dict-item]
    arguments = [*written(folder, trials=1, params=settings), f'data.val_path="{images}/val"']
    tune_main(arguments)
    assert {path.name for path in tmp_path.iterdir()} == {folder.name, images.name}
    assert {"study.db", "lock", "trials.jsonl", "best.yaml", "trials.png", "emim"} <= {
        path.name for path in folder.iterdir()
    }
    (row,) = rows.read(folder / "trials.jsonl")
    assert row["state"] == "finished" and checkpoints.last_checkpoint(Path(row["checkpoint"])) is not None
    cli.main(["pretrain", "--config-path", str(folder), "--config-name", "best", "checkpoint.dir=again"])
    (again,) = rows.read("again/rows.jsonl")
    assert again["config_hash"] == row["config_hash"]


@pytest.mark.parametrize("name", ["a${x}", "a::b"])
def test_a_folder_that_others_would_read_otherwise_is_refused(
    name: str, written: Written, tmp_path: Path, refused: Refused
) -> None:
    with refused("--output", name):
        tune_main(written(tmp_path / name))
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_refused_before_work(
    written: Written, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(37, os.strerror(37))

    monkeypatch.setattr(study_module.fcntl, "lockf", no_locks)
    with refused("disk.locks", "--output", str(tmp_path), "No locks"):
        tune_main(written(tmp_path))
    assert not (tmp_path / "study.db").exists()


def test_a_full_disk_fails_no_trial_however_often(
    written: Written, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    for _ in range(4):  # more often than a trial may be killed
        with monkeypatch.context() as full:
            full.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * 10**6))
            with refused("disk.full", "2 MB left"):
                tune_main(written(tmp_path, **ONE))
    tune_main(written(tmp_path, **ONE))
    (row,) = rows.read(tmp_path / "trials.jsonl")
    assert (row["trial"], row["state"]) == (1, "finished")


# -- kills, and several processes ------------------------------------------------------------------------------------


def test_after_a_kill_the_same_command_goes_on_in_two_processes_and_nothing_is_counted_twice(
    searched: Path, written: Written, tmp_path: Path
) -> None:
    command = ["tune", *written(tmp_path / "search")]
    first = processes.start(*command)
    run = tmp_path / "search" / "emim" / "trial-1"
    while not list(run.glob("*.ckpt")):  # after one of its two epochs
        assert first.poll() is None, first.stderr
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (tmp_path / "search" / "trials.jsonl").exists()

    others = [processes.start(*command) for _ in range(2)]
    assert [process.wait() for process in others] == [0, 0]
    logs = [process.stdout for process in others]
    assert sum(f"Resuming from '{run}" in log for log in logs) == 1
    ended = [line.split()[1] for log in logs for line in log.splitlines() if line.startswith("trial ") and ";" in line]
    assert sorted(ended) == ["1", "2", "3", "4"]
    assert results(tmp_path / "search") == results(searched)
    written_once = [row["checkpoint"] for row in rows.read(tmp_path / "search" / "rows.jsonl")]
    assert len(written_once) == len(set(written_once)) == len(rows.read(searched / "rows.jsonl"))


class Terminate(study_module.ReportToOptuna):
    """SIGTERM to this very process at the end of the first epoch."""

    def on_train_epoch_end(self, trainer: Trainer, *args: Any) -> None:  # type: ignore[override]
        super().on_train_epoch_end(trainer, *args)
        os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_ends_it_with_143_and_it_goes_on(
    searched: Path,
    written: Written,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    command = ["tune", *written(tmp_path), "--trials", "1"]
    for _ in range(4):  # more often than a trial may be killed: its user's will is not its fault
        with monkeypatch.context() as patched:
            patched.setattr(study_module, "ReportToOptuna", Terminate)
            with pytest.raises(SystemExit) as ended:
                cli.main(command)
        assert ended.value.code == 143
        said = capfd.readouterr().err.strip().splitlines()[-1]
        assert said == "emim-solo: stopped by SIGTERM: the same command goes on where it was"
        checkpoint = checkpoints.last_checkpoint(tmp_path / "emim" / "trial-1")
        assert checkpoint is not None
        if checkpoint.name.endswith("ep=1.ckpt"):
            break
    cli.main(command)
    assert results(tmp_path) == results(searched)[:1]


# -- trials that are not finished ------------------------------------------------------------------------------------


def test_a_pruned_trial_keeps_its_score_and_a_search_without_a_finished_one_says_so(
    written: Written, tmp_path: Path, refused: Refused
) -> None:
    params = {"optimizer.lr": "tag(log, interval(1e-3, 1e-2))"}
    pruner = {"ThresholdPruner": {"lower": 1e6}}
    with refused("search.unfinished", "1 stopped early"):
        tune_main(written(tmp_path, trials=1, pruner=pruner, params=params))
    (row,) = rows.read(tmp_path / "trials.jsonl")
    assert row["state"] == "stopped early" and row["epochs"] == 1 and row["metrics"][MONITOR] > 0
    assert [epoch for epoch, _ in checkpoints.by_epoch(Path(row["checkpoint"]))] == [0]
    assert not (tmp_path / "rows.jsonl").exists() and not (tmp_path / "best.yaml").exists()


def test_errors_and_kills_of_trials_are_kept_and_the_search_goes_on(
    written: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Refused
) -> None:
    """A backbone that fits no memory, and one whose process is killed at each start."""
    params = {"backbone.name": "resnet50", "+backbone.kwargs.width_per_group": "choice(1000000000000)"}
    arguments = written(tmp_path, trials=2, params=params)
    search = Search.read("pretrain/digits", "emim", arguments[5], [])
    tuning = Tuning(search, tmp_path, "")
    killed = tuning.study.ask()
    killed.suggest_categorical("backbone.kwargs.width_per_group", [1000000000000])
    killed.set_user_attr("starts", [0, 0, 0])
    with refused("search.unfinished", "2 failed", "trial 1", "killed 3 times"):
        tuning.run()
    said = capsys.readouterr()
    assert "! trial 2: emim of solo-learn" in said.err and "memory" in said.err
    assert [row["state"] for row in rows.read(tmp_path / "trials.jsonl")] == ["failed", "failed"]


def test_trials_whose_storage_is_gone_are_not_taken_for_those_of_a_new_search(
    searched: Path, written: Written, tmp_path: Path, refused: Refused
) -> None:
    shutil.copytree(searched, tmp_path / "search")
    (tmp_path / "search" / "study.db").unlink()
    with refused("search.other", "study.db", "--output"):
        tune_main(written(tmp_path / "search"))


def test_the_end_of_memory_is_told_from_faults() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert out_of_memory(caught.value)
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(2) @ torch.zeros(3)
    assert not out_of_memory(caught.value)


# -- labels ----------------------------------------------------------------------------------------------------------


def relabelled(images: Path, folder: Path, classes: int) -> Path:
    """The same images in the same order, in folders of classes that begin and end elsewhere; 1 is no folder at all."""
    for split in ("train", "val"):
        for number, image in enumerate(sorted((images / split).glob("*/*"))):
            label = min(number * number // 40, classes - 1)  # classes of growing sizes, all of them used
            target = folder / split / (f"{label:02}" if classes > 1 else "") / f"{number:04}{image.suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(image, target)
    return folder


def test_the_choice_is_the_same_with_wrong_labels(
    searched: Path, few_digits: Path, written: Written, tmp_path: Path
) -> None:
    images = relabelled(few_digits, tmp_path / "wrong", 10)
    assert len(list((images / "train").iterdir())) == len(list((images / "val").iterdir())) == 10
    tune_main([*written(tmp_path / "search", images), "--trials", "3"])
    assert results(tmp_path / "search") == results(searched)[:3]


def test_the_choice_is_the_same_without_labels(few_digits: Path, written: Written, tmp_path: Path) -> None:
    """Of two rates far apart: the initial weights are others, as there is no classifier to draw them before.

    Of this ViT the untrained one is chosen, by a nat: ten steps at the other rate make it worse.
    """
    chosen = []
    for images, more in ((few_digits, {}), (relabelled(few_digits, tmp_path / "none", 1), {"++data.no_labels": True})):
        params = {"optimizer.lr": "choice(1e-7, 1e-2)", **more}
        tune_main(written(tmp_path / f"search{len(more)}", images, trials=2, params=params, seed=1))
        table = rows.read(tmp_path / f"search{len(more)}" / "trials.jsonl")
        assert len({row["params"]["optimizer.lr"] for row in table}) == 2
        worse, better = sorted(table, key=lambda row: row["metrics"][MONITOR])
        assert better["metrics"][MONITOR] > worse["metrics"][MONITOR] + 0.5
        chosen.append(better["params"])
        assert not [key for row in table for key in row["metrics"] if "acc" in key]
    assert chosen == [{"optimizer.lr": 1e-7}] * 2


# -- what is searched ------------------------------------------------------------------------------------------------


def read(*overrides: str, search: str | None = None, name: str = "emim") -> Search:
    return Search.read("pretrain/digits", name, search, list(overrides))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("interval(0, 1)", FloatDistribution(0.0, 1.0)),
        ("tag(log, interval(1e-3, 3e-2))", FloatDistribution(1e-3, 3e-2, log=True)),
        ("int(interval(1, 9))", IntDistribution(1, 9)),
        ("tag(log, int(interval(1, 9)))", IntDistribution(1, 9, log=True)),
        ("range(64, 257, 64)", IntDistribution(64, 256, step=64)),
        ("range(0, 4)", IntDistribution(0, 3)),  # Hydra leaves the end out
        ("range(0.0, 1.0, 0.25)", FloatDistribution(0.0, 0.75, step=0.25)),
        ("choice(1, 2.5, a, true)", CategoricalDistribution([1, 2.5, "a", True])),
        ("1,2,4", CategoricalDistribution([1, 2, 4])),
        ("choice([60,80], [90])", CategoricalDistribution(["[60,80]", "[90]"])),
        ("'a b',null", CategoricalDistribution(["'a b'", "null"])),
        ("choice(null, 1)", CategoricalDistribution(["null", 1])),  # Hydra takes null in the short form alone
        ("range(9, 0, -3)", IntDistribution(3, 9, step=3)),
        ("range(1, 1000000000001)", IntDistribution(1, 1000000000000)),  # of which no list is made
    ],
)
def test_hydras_sweeps_as_optunas_distributions(text: str, expected: BaseDistribution) -> None:
    found = read(f"optimizer.lr={text}").distribution("optimizer.lr")
    assert found == expected or repr(found) == repr(expected)


def test_the_command_line_decides_over_the_file_and_groups_and_values_are_composed(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("params: {optimizer.lr: 'interval(0, 1)', max_epochs: 3, seed: 'choice(1, 2)'}")
    search = read(
        "max_epochs=7", "+seed=5", "augmentations=choice(symmetric,multicrop)", search=str(tmp_path / "s.yaml")
    )
    assert list(search.params) == ["optimizer.lr", "augmentations"]
    cfg = search.compose({"optimizer.lr": 0.25, "augmentations": "multicrop"})
    assert (cfg.max_epochs, cfg.seed, cfg.optimizer.lr, len(cfg.augmentations)) == (7, 5, 0.25, 2)
    assert list(read().params) == ["optimizer.lr", "optimizer.weight_decay"]  # the shipped default
    assert list(read("optimizer.lr=1,2").params) == ["optimizer.lr"]  # whose keys are for who gives none


LR = "optimizer.lr=choice(1, 2)"


@pytest.mark.parametrize(
    ("overrides", "key", "names"),
    [
        (["optimizer.lrr=interval(0, 1)"], "config", ["optimizer.lrr", "+optimizer.lrr"]),
        (["method_kwargs.wieght=choice(1, 2)"], "config", ["method_kwargs.wieght"]),
        (["+method_kwargs.wieght=choice(1, 2)"], "method_kwargs.wieght", ["'weight'"]),
        (["optimizer.lr=interval(0, -1)"], "optimizer.lr", ["optimizer.lr=interval(0, -1)", "low"]),
        (["optimizer.lr=tag(log, interval(0, 1))"], "optimizer.lr", ["tag(log, interval(0, 1))"]),
        (["optimizer.lr=tag(log, range(1, 9))"], "optimizer.lr", ["log is for interval"]),
        (["optimizer.lr=tag(lin, interval(1, 9))"], "optimizer.lr", ["tag", "lin", "log"]),
        (["optimizer.lr=shuffle(1, 2, 3)"], "optimizer.lr", ["shuffle"]),
        (["optimizer.lr=interval(0, inf)"], "optimizer.lr", ["not finite"]),
        (["optimizer.lr=range(9, 1)"], "optimizer.lr", ["empty"]),
        (["optimizer.lr=range(1, 2, 0)"], "optimizer.lr", ["range(1", "expected"]),
        (["optimizer.lr=range(1, inf)"], "optimizer.lr", ["range(1", "expected"]),
        (["optimizer.lr=interval(1"], "optimizer.lr", ["'optimizer.lr=interval(1'"]),
        (["optimizer.lr=interval(-1, 1)"], "optimizer.lr", ["-1", "at least 0"]),
        (["optimizer.lr=choice(null, 0.1)"], "optimizer.lr", ["lacks optimizer.lr"]),
        (["~optimizer.lr=choice(1, 2)"], "optimizer.lr", ["left out"]),
        (["augmentations=glob(*)"], "augmentations", ["glob", "choice(a, b, ...)"]),
        (["++seed=int(interval(0, 100000000000000000000))"], "seed", ["100000000000000000000"]),
        (
            ["method_kwargs.weight=interval(1, 2)", "optimizer.batch_size=range(64, 0, -63)"],
            "optimizer.batch_size",
            ["optimizer.batch_size=1"],
        ),
        (["optimizer.name=choice(adamw, adamm)"], "optimizer.name", ["adamm", "sgd"]),
        (["score.protocol=choice(digits, default)"], "score.protocol", ["cannot be searched"]),
        (["data.val_path=choice(a, b)"], "data.val_path", ["cannot be searched"]),
        ([LR, "devices=2", "++accelerator=cpu"], "devices", ["CUDA_VISIBLE_DEVICES"]),
        ([LR, "max_epoch=2"], "config", ["max_epoch"]),
        ([LR, "score.protocol=mine"], "protocol", ["'mine'"]),
        ([LR, "checkpoint.dir=x"], "checkpoint.dir", ["leave it out"]),
        ([LR, "checkpoint.keep_prev=True"], "checkpoint.keep_prev", ["leave it out"]),
        ([LR, "auto_resume.enabled=True"], "auto_resume.enabled", ["leave it out"]),
        ([LR, "resume_from_checkpoint=x"], "resume_from_checkpoint", ["leave it out"]),
        ([LR, "score.enabled=False"], "score.enabled", ["leave it out"]),
        ([LR, "hydra.run.dir=x"], "hydra.run.dir", ["leave it out"]),
        ([LR, "hydra/launcher=joblib"], "hydra/launcher", ["leave it out"]),
    ],
)
def test_a_search_that_cannot_work_is_refused_before_the_first_trial(
    overrides: list[str], key: str, names: list[str], few_digits: Path, refused: Refused
) -> None:
    images = [f"data.{split}_path={few_digits / split}" for split in ("train", "val")]
    with refused(key, *names):
        read(*images, *overrides).check()


@pytest.mark.parametrize(
    ("text", "key", "names"),
    [
        ("trial: 3", "search.trial", ["'trials'", "sampler", "pruner", "seed", "params"]),
        ("trials: 3\ntrials: 4", "search", ["duplicate"]),  # YAML takes the last one without a word
        ("params: {optimizer.lr: 1}", "search.params", ["nothing to search"]),
        ("- 1", "search", ["expected"]),
        ("a: [", "search", ["no YAML"]),
        ("3", "search", ["settings by name"]),
        ("sampler: Tpe", "search.sampler", ["Tpe", "TPESampler"]),
        ("sampler: {TPESampler: 3}", "search.sampler.TPESampler", ["3"]),
        ("sampler: {TPESampler: {seed: 3}}", "search.sampler.TPESampler.seed", []),  # each trial would be the same
        (
            "sampler: {TPESampler: {n_startup_trials: x}}",
            "search.sampler.TPESampler.n_startup_trials",
            ["'x'", "number"],
        ),
        ("sampler: {TPESampler: {n_ei_candidates: 0}}", "search", ["n_ei_candidates", "Optuna"]),
        ("sampler: {TPESampler: {n_ei_candidates: 1000000}}", "search.sampler.TPESampler.n_ei_candidates", ["at most"]),
        ("sampler: {TPESampler: {gamma: 1}}", "search", ["gamma", "Optuna"]),
        ("pruner: {MedianPruner: {startup: 1}}", "search.pruner.MedianPruner.startup", ["n_startup_trials"]),
        ("pruner: {HyperbandPruner: {reduction_factor: 1}}", "search", ["reduction_factor", "Optuna"]),
    ],
)
def test_a_file_that_is_no_search_is_refused(
    text: str, key: str, names: list[str], few_digits: Path, tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "s.yaml").write_text(text)
    images = [f"data.{split}_path={few_digits / split}" for split in ("train", "val")]
    with refused(key, *names):
        read(*images, *([] if "params" in text else [LR]), search=str(tmp_path / "s.yaml")).check()


VALUES = [None, "", "text", -1, 0, 1.5, float("inf"), float("nan"), True, [], [1], {}, {"a": 1}, "x" * 300, "../../x"]
RIGHT = {"trials": [], "sampler": [], "pruner": [None], "seed": [0], "params": [{}]}


@pytest.mark.parametrize("key", RIGHT)
def test_each_key_of_a_search_file_takes_what_it_is_for_and_refuses_the_rest(
    key: str, few_digits: Path, tmp_path: Path, refused: Refused
) -> None:
    images = [f"data.{split}_path={few_digits / split}" for split in ("train", "val")]
    for value in VALUES:
        (tmp_path / "s.yaml").write_text(yaml.safe_dump({key: value}))

        def made() -> None:
            read(*images, LR, search=str(tmp_path / "s.yaml")).check()

        if any(value is right or (value == right and type(value) is type(right)) for right in RIGHT[key]):
            made()
        elif key == "params" and value == {"a": 1}:
            with refused("config", "'a'"):
                made()
        else:
            shown = repr(value) if isinstance(value, str) else str(value)
            with refused(f"search.{key}", f"search.{key}={shown[:40]}"):
                made()


def test_shipped_searches_are_accepted(few_digits: Path, refused: Refused) -> None:
    assert configs.stems("tune") == ["default", "digits"]
    images = [f"data.{split}_path={few_digits / split}" for split in ("train", "val")]
    for name in configs.stems("tune"):
        search = read(*images, search=name)
        base = search.check()
        assert base.config.score.enabled and isinstance(search.make_sampler(0), optuna.samplers.TPESampler)
        assert isinstance(search.make_pruner(base.config.max_epochs), optuna.pruners.MedianPruner)
    with refused("search", "'digit'", "default, digits"):
        read(search="digit")


def test_a_damaged_storage_is_named(written: Written, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "study.db").write_text("no database" * 100)
    with refused("search.storage", "study.db", "not a database") as error:
        tune_main(written(tmp_path))
    assert "remove" not in str(error.value)


def test_optuna_is_imported_by_its_command_alone() -> None:
    code = "import sys, emim_solo, emim_solo.cli; assert not {'optuna', 'torch'}.intersection(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
