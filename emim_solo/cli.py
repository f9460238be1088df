"""The command line: ``emim-solo COMMAND ...``. Configs are composed by Hydra, in solo-learn's YAML schema."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import pkgutil
import re
import select
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from emim_solo import completion
from emim_solo.ground import files
from emim_solo.ground.errors import UsageError
from emim_solo.ground.imports import no_garbage_collection
from emim_solo.ground.stopping import Stopped, stoppable

if TYPE_CHECKING:
    from omegaconf import DictConfig

USAGE = """usage: emim-solo COMMAND ...

  pretrain   --config-path DIR --config-name NAME [key=value ...]   train any method of solo-learn
  benchmark  --config-name NAME [key=value ...]                     train and evaluate methods x seeds: table and report
  tune       --config-path DIR --config-name NAME [key=value ...]   search a recipe without labels
  knn        CHECKPOINT ... [options]                               k-NN accuracy of frozen features
  linear     CHECKPOINT ... [options]                               accuracy of linear classifiers on frozen features
  umap       CHECKPOINT ... [options]                               pictures of the features
  score      CHECKPOINT ... [options]                               rank checkpoints without labels
  export     CHECKPOINT --to FORMAT [--output FILE]                 write the backbone for torchvision, timm, safetensors, onnx
  report     DIR                                                    write the report of a benchmark again from its rows
  configs    [--copy DIR]                                           list or copy the shipped configs
  images     NAME DIR                                               write digits, fashion-mnist, ... as image folders

example: emim-solo pretrain --config-path pretrain/digits --config-name emim max_epochs=10

DIR of --config-path is a folder of yours, or the name of a shipped one, such as pretrain/digits.
CHECKPOINT is the folder of a run, as pretrain prints it.
'emim-solo COMMAND --help' says more about a command. --verbose shows what Lightning and other libraries print, too.
Tab completion in bash and zsh: eval "$(emim-solo -sc install=bash)"; in fish: emim-solo -sc install=fish | source"""

_HELP = {  # of the commands without a parser of their own
    "pretrain": """usage: emim-solo pretrain --config-path DIR --config-name NAME [key=value ...]

Train one method of solo-learn without labels. Checkpoints go to trained_models/METHOD/NUMBER, and one row of results
to trained_models/rows.jsonl.

example: emim-solo pretrain --config-path pretrain/digits --config-name emim max_epochs=10

  key=value                    changes a key of the config; +key=value adds one that it lacks
  --config-path pretrain/custom data.train_path=DIR        trains on a folder of images of yours
  auto_resume.enabled=True     goes on with a run that was stopped
  --help                       after --config-path and --config-name: shows the config
'emim-solo configs' lists the shipped configs.""",
    "benchmark": """usage: emim-solo benchmark --config-name NAME [key=value ...]

Train methods with several seeds on the same data and settings, evaluate each run, and write a table and a report
(report.html). Stopped, the same command goes on where it was.

example: emim-solo benchmark --config-name digits only=[emim,vicreg] 'seeds=[0,1,2]' max_epochs=5

  key=value                    changes a key of the benchmark's config
  +run.key=value               changes a key of the config of every run, as in +run.optimizer.lr=0.01
  --help                       after --config-name: shows the config; its file explains each key
'emim-solo configs' lists the shipped configs.""",
    "report": """usage: emim-solo report DIR

Write the table and the report of a benchmark again, from the rows and pictures in its folder.

example: emim-solo report runs/digits""",
    "images": """usage: emim-solo images NAME DIR

Write digits, fashion-mnist or fashion-mnist-few as folders of image files, DIR/train/CLASS and DIR/val/CLASS.
The digits come with scikit-learn; Fashion-MNIST is downloaded if it is not installed.

example: emim-solo images digits datasets/digits""",
}


@contextlib.contextmanager
def _silent_if_the_reader_leaves() -> Iterator[None]:
    """If the reader of a pipe leaves, as in ``emim-solo configs | head -1``, exit silently with SIGPIPE's status."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        pipes = select.poll()
        pipes.register(sys.stdout, 0)
        if not pipes.poll(0):  # standard output is fine: the broken pipe led to a worker
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        raise SystemExit(128 + signal.SIGPIPE) from None


@_silent_if_the_reader_leaves()
def main(argv: Sequence[str] | None = None) -> None:
    """Run one command. For an error that the user can correct, exit with status 2 and one line on standard error."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(0 if arguments else 2)
    if {*completion.FLAGS}.intersection(arguments[:2]):
        _complete(arguments)
        return
    if "--verbose" in arguments:
        arguments.remove("--verbose")
    else:
        _leave_out_what_libraries_say()
    command, rest = arguments[0], arguments[1:]
    flags = {word.partition("=")[0] for word in rest}  # with those of a config, Hydra shows that config
    if command in _HELP and {"-h", "--help"}.intersection(rest) and flags.isdisjoint(completion.OF_CONFIG):
        print(_HELP[command])
        return
    if command not in COMMANDS:
        refuse(f"unknown command '{command}': expected one of {', '.join(COMMANDS)}")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a user's folder name may not be UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    if not sys.stdout.isatty():  # a log file keeps every state of a progress bar: write one in a thousand
        os.environ.setdefault("TQDM_MINITERS", "1000")
    try:
        with stoppable(), _one_line():
            with no_garbage_collection():
                run = pkgutil.resolve_name(f"emim_solo.{COMMANDS[command]}")
            run(rest)
    except Stopped as stopped:
        stopped.continues = _CONTINUES.get(command) or stopped.continues or "the same command starts again"
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"emim-solo: {stopped}", file=sys.stderr)
        raise SystemExit(stopped.status) from None


def _leave_out_what_libraries_say() -> None:
    """Hide advertisements, tables of modules, and warnings that a user cannot act on."""
    logging.disable(logging.INFO)
    for message in (
        "pkg_resources is deprecated",  # torchmetrics 0.11, which solo-learn needs
        r"`torch\.cuda\.amp\.custom_",
        ".*'pin_memory' argument is set as true but no accelerator",  # solo-learn's loaders set it
        r".*isinstance\(treespec, LeafSpec\)",
        "Total length of `list` across ranks is zero",  # of a run without labels, which has no validation
        "Experiment logs directory .* exists and is not empty",  # nothing is deleted: earlier curves are renamed
    ):
        warnings.filterwarnings("ignore", message=message)


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """An error that the user can correct prints one line; any other keeps its traceback."""
    try:
        yield
    except (UsageError, FloatingPointError) as error:
        refuse(str(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("emim_solo", "solo"):
            raise
        refuse(f"this command needs '{error.name}', which is not installed: pip install 'emim-solo[solo]'")
    except OSError as error:
        if line := files.explain(error):
            refuse(line)
        raise


def refuse(message: str) -> NoReturn:
    """Exit with status 2 and one line on standard error."""
    print(f"emim-solo: {message}", file=sys.stderr)
    raise SystemExit(2)


def _complete(arguments: list[str]) -> None:
    """``emim-solo -sc install=bash``, and the query that the installed shell function sends at each tab."""
    query = next((argument for argument in arguments if argument.startswith("query=")), None)
    if query is None:
        hydra_run("", lambda cfg: None, [argument for argument in arguments if argument not in COMMANDS])
        return
    composed = {"pretrain": _pretrain, "benchmark": _benchmark, "tune": _pretrain}  # a search has the keys of a run
    completion.answer(query, os.environ.get("COMP_LINE", ""), COMMANDS, composed)


_OF_HYDRA = (("--config-name", "-cn"), ("--config-dir", "-cd"), ("--cfg", "-c"))


def hydra_run(
    command: str, task: Callable[[DictConfig], Any], arguments: Sequence[str], folder: str | None = None
) -> None:
    """Compose a config from command-line arguments with Hydra and run ``task`` on it.

    ``--config-path`` names a folder relative to the working directory or a shipped one (``pretrain/digits``);
    without it, ``folder`` is used.
    """
    import hydra

    from emim_solo.ground import configs

    parser = argparse.ArgumentParser(prog=f"emim-solo {command}", add_help=False, allow_abbrev=False)
    parser.add_argument("--config-path", "-cp", default=folder)
    for flag, short in _OF_HYDRA:  # argparse would read -cn as -c n, and -c as the start of -cp
        parser.add_argument(flag, short)
    options, arguments = parser.parse_known_args(arguments)
    for position, argument in enumerate(arguments):
        key, _, value = argument.partition("=")
        if "=" in value and not key.startswith("-") and not re.search(r"""["'\[\](){},$]""", value):
            arguments[position] = f'{key}="{value}"'  # Hydra needs quotes around the checkpoint names of solo-learn
    if {"-h", "--help"}.intersection(arguments):  # Hydra's parser takes overrides only in one block
        overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
        flags = [argument for argument in arguments if argument not in overrides]
        arguments = [*flags, *overrides, f"hydra.help.app_name='emim-solo {command}'"]
    for flag, _ in _OF_HYDRA:
        if value := getattr(options, flag.strip("-").replace("-", "_")):
            arguments = [flag, value, *arguments]
    if options.config_path:
        arguments = ["--config-path", str(configs.find(options.config_path)), *arguments]

    original = sys.argv

    def run(cfg: DictConfig) -> None:
        sys.argv = original  # Lightning starts the other processes of a DDP run with this command
        with _one_line():  # inside Hydra, which would add its own lines to an error
            task(cfg)

    sys.argv = ["emim-solo", *arguments]
    try:
        hydra.main(version_base="1.2", config_path=None)(run)()
    finally:
        sys.argv = original


def _pretrain(arguments: Sequence[str]) -> None:
    def task(cfg: DictConfig) -> None:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode
        from lightning.pytorch.plugins.environments import SLURMEnvironment
        from lightning.pytorch.utilities.rank_zero import rank_zero_only

        from emim_solo.images.folders import why_no_accuracy
        from emim_solo.training.pretraining import prepare, pretrain

        run = prepare(cfg)
        if HydraConfig.get().mode == RunMode.MULTIRUN and run.processes > 1 and not SLURMEnvironment.detect():
            text = f"devices={run.config.devices}: Lightning would start the whole sweep again in each process of a run"
            raise UsageError("devices", f"{text}: set devices=1, or start the runs without --multirun, or by SLURM")
        row = pretrain(run)
        if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
            return
        accuracies = () if why_no_accuracy(row["config"]["data"]) else ("val_acc1", "val_knn_acc1")
        shown = (*accuracies, "score_view_information", "train_mi", "train_mi_null")
        values = ", ".join(f"{name} {row['metrics'][name]:.2f}" for name in shown if name in row["metrics"])
        print(f"{row['name']}: {row['epochs']} epochs in {row['seconds']:.0f} s; {values or 'no validation metrics'}")
        results = Path(row["config"]["checkpoint"]["dir"]) / "rows.jsonl"
        print(f"row in '{results}', checkpoint in '{row['checkpoint']}'")

    hydra_run("pretrain", task, arguments)


def _benchmark(arguments: Sequence[str]) -> None:
    def task(cfg: DictConfig) -> None:
        from emim_solo.benchmark.runner import run_benchmark

        run_benchmark(cfg)

    hydra_run("benchmark", task, arguments, folder="benchmark")


def _images(arguments: Sequence[str]) -> None:
    from emim_solo.images.embedded import DATASETS, write_images

    if len(arguments) != 2 or not all(arguments):
        raise UsageError("images", f"expected a name and a folder: images NAME DIR; there are {', '.join(DATASETS)}")
    name, folder = arguments
    print(f"{name} in '{write_images(name, folder)}/{{train,val}}'")


_CONTINUES = dict.fromkeys(("benchmark", "tune"), "the same command goes on where it was")
COMMANDS = {  # names, imported at first use: torch takes seconds to load
    "pretrain": "cli:_pretrain",
    "benchmark": "cli:_benchmark",
    "tune": "tuning.command:tune_main",
    "knn": "evaluation.commands:knn_main",
    "linear": "evaluation.commands:linear_main",
    "umap": "evaluation.commands:umap_main",
    "score": "evaluation.score:score_main",
    "export": "checkpoints.export:export_main",
    "report": "report.page:main",
    "configs": "ground.configs:main",
    "images": "cli:_images",
}
