"""What README tells users of unlabelled images to type, typed: a folder, tune, pretrain, score, UMAP."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

README = Path(__file__).resolve().parent.parent / "README.md"
SMALL = {  # for a CPU, in seconds
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


def test_the_section_on_images_without_labels(few_digits: Path, tmp_path: Path) -> None:
    section = README.read_text().split("## Images without labels\n")[1].split("\n## ")[0]
    assert len(section.strip().splitlines()) <= 10, "as many lines as a reader has patience for"
    (block,) = re.findall(r"```console\n(.*?)```", section, flags=re.DOTALL)
    commands = [shlex.split(line) for line in block.strip().splitlines()]
    assert [command[:2] for command in commands] == [["emim-solo", c] for c in ("tune", "pretrain", "score", "umap")]
    heap = tmp_path / "heap"
    heap.mkdir()
    for number, path in enumerate(sorted((few_digits / "train").rglob("*.png"))[::2]):
        shutil.copy(path, heap / f"{number}.png")
    said = ""
    for command in commands:
        words = ["data.train_path=heap" if word == "data.train_path=DIR" else word for word in command[1:]]
        if "--config-name" in words:
            words = [word for word in words if not word.startswith("max_epochs=")]
            words += [f"++{key}={value}" for key, value in SMALL.items()]
        words += {"tune": ["--trials", "2"], "umap": ["--limit", "40"]}.get(command[1], [])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "emim_solo", *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
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
