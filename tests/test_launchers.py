"""The commands of docs/distributed.md compose: Hydra, its launchers and our configs agree on every key."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "distributed.md"
COMMANDS = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("emim-solo pretrain")]
LAUNCHERS = {"submitit_slurm": "hydra_plugins.hydra_submitit_launcher", "joblib": "hydra_plugins.hydra_joblib_launcher"}


def test_there_are_commands() -> None:
    assert len(COMMANDS) == 4


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: shlex.split(command)[3])
def test_command_composes(command: str, typed: Callable[..., Any], tmp_path: Path) -> None:
    _, *arguments = shlex.split(command)
    for launcher, module in LAUNCHERS.items():
        if f"hydra/launcher={launcher}" in arguments and importlib.util.find_spec(module) is None:
            pytest.skip(f"the launcher {launcher} is not installed: pip install 'emim-solo[test]'")
    several = "--multirun" in arguments
    # `--cfg` shows one composed job: the first of a sweep
    shown = [argument.split(",")[0] if argument.startswith("+seed=") else argument for argument in arguments]
    done = typed(*(each for each in shown if each != "--multirun"), "--cfg", "all", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    cfg = OmegaConf.create(done.stdout)
    assert cfg.method == "emim"
    if several:
        assert cfg.seed == 0
        assert cfg.hydra.launcher._target_.endswith("Launcher")
    if "hydra/launcher=submitit_slurm" in arguments:
        launcher = cfg.hydra.launcher
        assert (launcher.nodes, launcher.tasks_per_node) == (cfg.num_nodes, len(cfg.devices)) == (2, 8)
