"""The commands as a user types them, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from emim_solo import rows

SMALL = [
    "max_epochs=1",
    "data.num_workers=0",
    "optimizer.batch_size=64",
    "method_kwargs.proj_hidden_dim=64",
    "method_kwargs.proj_output_dim=16",
    "accelerator=cpu",
]


def emim_solo(*arguments: str, cwd: Path, timeout: int = 300) -> subprocess.CompletedProcess[str]:
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
    return [*SMALL, f"data.train_path={few_digits / 'train'}", f"data.val_path={few_digits / 'val'}"]


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


def test_digits_and_configs(tmp_path: Path) -> None:
    assert "train" in emim_solo("digits", "images", cwd=tmp_path).stdout
    assert len(list((tmp_path / "images" / "train").rglob("*.png"))) == 1437
    assert "pretrain/digits" in emim_solo("configs", cwd=tmp_path).stdout
    assert emim_solo("configs", "--copy", "mine", cwd=tmp_path).returncode == 0
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
        (["digits"], "expected one folder"),
    ],
)
def test_what_is_wrong_is_said_on_one_line(arguments: list[str], part: str, tmp_path: Path) -> None:
    done = emim_solo(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("emim-solo: ")]
    assert part in line
    assert "Traceback" not in done.stderr
