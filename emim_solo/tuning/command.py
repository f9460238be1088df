"""``emim-solo tune``."""

from __future__ import annotations

import argparse
import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path

import optuna
from omegaconf import OmegaConf

from emim_solo.ground import configs, files
from emim_solo.tuning.search import Search
from emim_solo.tuning.study import Tuning


def tune_main(arguments: Sequence[str]) -> None:
    """``emim-solo tune --config-path DIR --config-name NAME [key=value ...]``."""
    parser = argparse.ArgumentParser(
        prog="emim-solo tune",
        description="Search keys of a pretraining config for the highest score, without labels (docs/label-free.md). "
        "After a kill the same command goes on; a second process with it shares the work.",
        epilog="example: emim-solo tune --config-path pretrain/digits --config-name emim 'optimizer.lr=tag(log, "
        "interval(1e-3, 3e-2))' 'method_kwargs.weight=choice(1,2,4,8)' max_epochs=5",
    )
    parser.add_argument("--config-path", "-cp", required=True, help="folder of the config, as in pretrain")
    parser.add_argument("--config-name", "-cn", required=True, help="its name")
    parser.add_argument("--search", help=f"a YAML file, or a shipped one: {', '.join(configs.stems('tune'))}")
    parser.add_argument("--trials", type=int, help="how many in all, instead of the search's")
    parser.add_argument("--output", type=Path, help="folder of the search, by default runs/tune/<name of the config>")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="one value for every trial; or a sweep of Hydra's, as in choice(1,2), which is searched",
    )
    options = parser.parse_intermixed_args(list(arguments))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    search = Search.read(options.config_path, options.config_name, options.search, options.overrides, options.trials)
    folder = options.output
    if folder is None:
        name = OmegaConf.select(search.compose({}), "name", default="")
        files.check_name("name", name)
        folder = Path("runs/tune") / name
    Tuning(search, folder.expanduser(), shlex.join(["emim-solo", "tune", *arguments])).run()
