"""The commands as a user types them; in a process of its own what depends on one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL_OVERRIDES
from omegaconf import DictConfig, OmegaConf

from emim_solo import cli
from emim_solo.checkpoints.opening import open_checkpoint
from emim_solo.evaluation.score import Protocol, score_checkpoint
from emim_solo.results import rows

SMALL = [
    "max_epochs=1",
    "data.num_workers=0",
    "optimizer.batch_size=64",
    "method_kwargs.proj_hidden_dim=64",
    "method_kwargs.proj_output_dim=16",
    "accelerator=cpu",
]


def emim_solo(*arguments: str, cwd: Path, timeout: int = 900) -> subprocess.CompletedProcess[str]:
    command = Path(sys.executable).parent / "emim-solo"
    return subprocess.run(
        [str(command), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,  # a deadlock between processes must end the test, not the machine
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def digits_overrides(few_digits: Path) -> list[str]:
    return [*SMALL, *SMALL_OVERRIDES, f"data.train_path={few_digits / 'train'}", f"data.val_path={few_digits / 'val'}"]


def test_pretrain_by_a_shipped_name_says_where_things_are(few_digits: Path, tmp_path: Path) -> None:
    done = emim_solo(
        "pretrain",
        "--config-path",
        "pretrain/digits",
        "--config-name",
        "emim",
        *digits_overrides(few_digits),
        "optimizer.batch_size=16",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Lightning's progress bar: no terminal here, so not a line for each of the ten steps.
    assert "10/10" in done.stdout
    assert "5/10" not in done.stdout
    (row,) = rows.read(tmp_path / "trained_models" / "rows.jsonl")
    assert f"val_acc1 {row['metrics']['val_acc1']:.2f}" in done.stdout
    assert row["checkpoint"] in done.stdout
    for of_libraries in ("Tip", "GPU available", "pin_memory", "LeafSpec", "weights_only", "Trainable params"):
        assert of_libraries not in done.stdout + done.stderr, "asked for by --verbose alone"
    assert sorted(path.suffix for path in (tmp_path / row["checkpoint"]).iterdir()) == [".ckpt", ".csv", ".json"]


def test_emim_over_the_config_of_another_method_in_two_processes(few_digits: Path, tmp_path: Path) -> None:
    """Lightning starts the second process with this very command: EMIM must be registered there too."""
    done = emim_solo(
        "pretrain",
        "--config-path=pretrain/digits",
        "--config-name=barlow.yaml",
        "method=emim",
        "name=override",
        "devices=2",
        "strategy=ddp",
        "score.enabled=True",
        "score.patience=1",
        "score.keep_best=True",
        *digits_overrides(few_digits),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = rows.read(tmp_path / "trained_models" / "rows.jsonl")
    assert row["device"] == "2 x cpu"
    assert row["method"] == "emim"
    assert "scale_loss" not in row["config"]["method_kwargs"]
    assert [path.name for path in (tmp_path / "trained_models" / "emim").iterdir()] == ["0"]
    stored = json.loads((tmp_path / row["checkpoint"] / "args.json").read_text())
    assert stored["method_kwargs"]["weight"] == 4.0
    # Rank zero scores, and what is logged is that of the checkpoint.
    assert done.stdout.count("score: 8 views of 60 validation images") == 1
    (path,) = (tmp_path / row["checkpoint"]).glob("*.ckpt")
    scored = score_checkpoint(open_checkpoint(path), Protocol.read("digits"))
    assert [best.name for best in (path.parent / "best").glob("*.ckpt")] == [path.name]
    expected = scored["metrics"]["view_information"]
    assert row["metrics"]["score_view_information"] == pytest.approx(expected, rel=1e-6)


def test_digits_and_configs(typed: Callable[..., Any], tmp_path: Path) -> None:
    assert "train" in typed("images", "digits", "images", cwd=tmp_path).stdout
    assert len(list((tmp_path / "images" / "train").rglob("*.png"))) == 1437
    assert "pretrain/digits" in typed("configs", cwd=tmp_path).stdout
    assert typed("configs", "--copy", "mine", cwd=tmp_path).returncode == 0
    copied = OmegaConf.load(tmp_path / "mine" / "pretrain" / "digits" / "emim.yaml")
    assert copied.method == "emim"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["pretrian"], "unknown command 'pretrian'"),
        (["pretrain", "--config-path", "nowhere", "--config-name", "emim"], "nowhere"),
        (
            ["pretrain", "--config-path", "pretrain/digits", "--config-name", "emim", "method=emmi"],
            "unknown method 'emmi'",
        ),
        (["images"], "expected a name and a folder"),
        (["images", "mnist", "x"], "no images 'mnist': there are digits, fashion-mnist"),
    ],
)
def test_what_is_wrong_is_said_on_one_line(
    arguments: list[str], part: str, typed: Callable[..., Any], tmp_path: Path
) -> None:
    done = typed(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("emim-solo: ")]
    assert part in line
    assert "Traceback" not in done.stderr


def test_a_download_that_fails_is_one_line(
    typed: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for proxy in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    config = ("pretrain", "--config-path", "pretrain/cifar", "--config-name", "emim")
    on_cpu = ("accelerator=cpu", "devices=[0]", "strategy=auto", "precision=32", "sync_batchnorm=False")
    done = typed(*config, *on_cpu, cwd=tmp_path)
    assert done.returncode == 2
    assert "emim-solo: cannot download" in done.stderr and "Traceback" not in done.stderr


def completed(line: str, cwd: Path) -> list[str]:
    """What Hydra's own shell function offers in bash for a line with the cursor at its end."""
    script = """
        eval "$(emim-solo -sc install=bash)"
        complete -p emim-solo >&2
        words=($COMP_LINE)
        COMP_CWORD=$((${#words[@]} - 1)); [[ $COMP_LINE == *" " ]] && COMP_CWORD=${#words[@]}
        hydra_bash_completion
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": path, "COMP_LINE": line, "COMP_POINT": str(len(line))},
    )
    said = done.stderr.split()
    assert said[0] == "complete" and said[-1] == "emim-solo" and done.stderr.count("\n") == 1, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="completion is a function of bash, which is not here")
def test_tab_completion(tmp_path: Path) -> None:
    assert completed("emim-solo be", tmp_path) == ["benchmark"]
    assert "pretrain/digits" in completed("emim-solo pretrain --config-path ", tmp_path)
    assert completed("emim-solo pretrain --config-path pretrain/digits --config-name emim_", tmp_path) == [
        "emim_multicrop.yaml",
        "emim_patches.yaml",
    ]
    digits = "emim-solo pretrain --config-path pretrain/digits --config-name=emim.yaml max_epochs=3"
    assert completed(f"{digits} method_kwargs.w", tmp_path) == ["method_kwargs.weight="]
    assert completed(f"{digits} augmentations=", tmp_path) == [
        f"augmentations={name}" for name in ("multicrop", "patches", "patches_beside", "symmetric")
    ]
    assert completed("emim-solo benchmark --config-name digits see", tmp_path) == ["seeds."]
    assert completed("emim-solo pretrain --config-path pretrain/nowhere --config-name emim opt", tmp_path) == []


@pytest.mark.parametrize("arguments", ["", "configs", "pretrain --help", "--help"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_is_no_error(arguments: str, unbuffered: str, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "emim-solo"), *arguments.split()]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        command,
        cwd=tmp_path,
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode == 128 + signal.SIGPIPE


def test_a_path_with_an_equals_sign_needs_no_quotes() -> None:
    """Every checkpoint of the suite has one in its name."""
    configs: list[DictConfig] = []
    paths = ("a/x-ep=3.ckpt", "'a/y-ep=3.ckpt'")
    for path in paths:
        config = ["--config-path", "pretrain/digits", "--config-name", "emim"]
        cli.hydra_run("pretrain", configs.append, [*config, f"++resume_from_checkpoint={path}", "data.embedded=null"])
    assert [cfg.resume_from_checkpoint for cfg in configs] == [path.strip("'") for path in paths]


@pytest.mark.parametrize(
    "command", ["pretrain", "benchmark", "knn", "linear", "umap", "report", "configs", "images", "tune", "score"]
)
def test_help_names_the_program(command: str, typed: Callable[..., Any], tmp_path: Path) -> None:
    done = typed(command, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "emim-solo" in done.stdout.splitlines()[0]
    assert not list(tmp_path.iterdir())


def test_a_sweep_of_runs_on_several_devices_is_refused(
    typed: Callable[..., Any], few_digits: Path, tmp_path: Path
) -> None:
    words = ["--multirun", "--config-path", "pretrain/digits", "--config-name", "emim", *digits_overrides(few_digits)]
    done = typed("pretrain", *words, "devices=2", "strategy=ddp", "accelerator=cpu", "+seed=0,1", cwd=tmp_path)
    assert done.returncode == 2 and "--multirun" in done.stderr and "devices=[0, 1]" in done.stderr
    assert not (tmp_path / "trained_models").exists()


def test_the_short_flags_of_hydra(typed: Callable[..., Any], tmp_path: Path) -> None:
    long, short = (
        typed("pretrain", *flags, "max_epochs=3", cwd=tmp_path)
        for flags in (
            ("--config-path", "pretrain/digits", "--config-name", "vicreg", "--cfg", "job"),
            ("-cp", "pretrain/digits", "-cn", "vicreg", "-c", "job"),
        )
    )
    assert "method: vicreg" in long.stdout and "max_epochs: 3" in long.stdout
    assert short.returncode == 0 and short.stdout == long.stdout


def test_help_shows_the_config_with_its_overrides(typed: Callable[..., Any], tmp_path: Path) -> None:
    config = ("--config-path", "pretrain/digits", "--config-name", "emim")
    done = typed("pretrain", *config, "--help", "max_epochs=77", cwd=tmp_path)
    assert "max_epochs: 77" in done.stdout
    wrong = typed("pretrain", "--no-such-flag", cwd=tmp_path)
    assert wrong.stderr.startswith("usage: emim-solo ")
