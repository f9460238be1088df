"""``emim-solo knn | linear | umap``: evaluates one checkpoint or many."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from emim_solo.checkpoints.opening import Checkpoint, open_checkpoints
from emim_solo.evaluation.features import Features, extract_features
from emim_solo.evaluation.protocol import SEEDS, VIEWS
from emim_solo.ground import files
from emim_solo.ground.errors import UsageError
from emim_solo.ground.settings import checked, from_dotlist, read
from emim_solo.images.folders import why_no_accuracy
from emim_solo.results import rows
from emim_solo.suite import as_dict, load_suite
from emim_solo.suite.api import device_of

_VIEWS = {"views=8": "features are the mean over eight views of each image, drawn as in training"}


def evaluation_row(
    stage: str,
    cfg: DictConfig,
    folder: Path,
    metrics: Mapping[str, float],
    start: float,
    settings: Mapping[str, Any],
    epochs: int,
) -> dict[str, Any]:
    """The row of an evaluation, begun at ``start``, of a run in ``folder``, trained with ``cfg`` for ``epochs`` epochs."""
    return rows.new_row(
        stage,
        config=as_dict(cfg),
        suite=load_suite().identity,
        device=str(device_of(cfg)),
        epochs=epochs,
        seconds=round(time.perf_counter() - start, 1),
        checkpoint=str(folder),
        metrics=dict(metrics),
        settings=dict(settings),
    )


def folders_parser(
    command: str, description: str, example: str, keys: Mapping[str, str] | None = None, *, rows: bool = True
) -> argparse.ArgumentParser:
    """The argument parser of a command on checkpoints. It gets the arguments that :func:`split` has left.

    ``keys`` explains the command's own key=value; those for images are added. ``rows``: whether the command writes rows.
    """
    of_images = {"data.train_path=DIR data.val_path=DIR": "images to evaluate on, instead of the run's own"}
    of_images["augmentations.0.crop_size=N"] = "their size in pixels"
    lines = [f"  {key:<40}{text}" for key, text in {**(keys or {}), **of_images}.items()]
    parser = argparse.ArgumentParser(
        prog=f"emim-solo {command}",
        description=description,
        epilog="\n".join(["key=value, after the checkpoints:", *lines, "", f"example: {example}"]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    text = "folder of a run, as pretrain prints it; a .ckpt file in one; a file of 'emim-solo export'; or weights of another "
    parser.add_argument("folders", nargs="+", metavar="CHECKPOINT", help=f"{text}library, as in timm:resnet18@FILE")
    if rows:
        text = "where to append the rows: a folder or a .jsonl file; by default the rows.jsonl of each run"
        parser.add_argument("--rows", type=Path, metavar="PLACE", help=text)
    return parser


def rows_file(checkpoint: Checkpoint, place: Path | None) -> Path:
    """The file for a checkpoint's rows: ``--rows PLACE``, else the run's. UsageError if its folder is not writable."""
    file = checkpoint.rows_file
    if place is not None:
        place = place.expanduser()
        file = place if place.suffix == ".jsonl" else place / "rows.jsonl"
    try:
        files.writable_folder(file.parent, "rows")
    except UsageError as error:
        raise UsageError("--rows", f"{error}, with --rows PLACE") from error
    return file


def split(arguments: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Arguments of a command by kind: checkpoints and options, its own ``key=value``, ``key=value`` for the images."""
    kinds: tuple[list[str], list[str], list[str]] = ([], [], [])
    for argument in arguments:
        # A checkpoint's name may contain a =.
        is_setting = re.match(r"[\w.]+=", argument) and not Path(argument).exists()
        of_images = is_setting and argument.startswith(("data.", "augmentations.", "backbone."))
        kinds[2 if of_images else 1 if is_setting else 0].append(argument)
    return kinds


def views_of(of_command: Sequence[str]) -> tuple[int | None, list[str]]:
    """The K of ``views=K`` among a command's settings (None: features of the whole images), and the other settings."""
    others = [setting for setting in of_command if not setting.startswith("views=")]
    views = from_dotlist([setting for setting in of_command if setting not in others]).get("views")
    checked(views, int | None, "views", VIEWS)
    return views, others


def _each(
    stage: str,
    options: argparse.Namespace,
    changes: Sequence[str],
    evaluate: Callable[[Checkpoint, Features], Mapping[str, float]],
    settings: Mapping[str, Any],
    views: int | None,
) -> None:
    """Evaluate checkpoints one by one. Each row goes to the run's own file, or to ``--rows``."""
    settings = {**settings, "views": views} if views is not None else settings
    checkpoints = open_checkpoints(options.folders, changes)
    places = [rows_file(checkpoint, options.rows) for checkpoint in checkpoints]
    for checkpoint in checkpoints:
        if reason := why_no_accuracy(checkpoint.cfg.data):
            reason = f"'{checkpoint.folder}' has {reason}: an accuracy would say nothing"
            to_do = "add data.train_path=DIR data.val_path=DIR of labelled images, or take 'emim-solo umap'"
            raise UsageError("data.no_labels", f"{reason}; {to_do}")
    for checkpoint, place in zip(checkpoints, places, strict=True):
        start, cfg = time.perf_counter(), checkpoint.cfg
        metrics = evaluate(checkpoint, extract_features(checkpoint, place.parent, views))
        rows.append(place, evaluation_row(stage, cfg, checkpoint.folder, metrics, start, settings, checkpoint.epochs))
        of_views = "" if views is None else f", features averaged over {views} views of each image"
        print(f"{cfg.name} ({checkpoint.path}): accuracies in %{of_views}")
        for name, value in metrics.items():
            if name == "fewest_val_images":
                print(f"  the smallest class has {value:.0f} validation images")
            else:
                print(f"  {name:<28} {value:8.2f}")
        print(f"  row in '{place}'")


def knn_main(arguments: Sequence[str]) -> None:
    """``emim-solo knn FOLDER ...``."""
    from emim_solo.evaluation.knn import DISTANCES, KS, TEMPERATURE, KnnSettings, knn

    about = """Classify validation images by their nearest training images, on frozen features of backbone and projector.

Prints top-1 accuracies in percent by features, distance and number of neighbours k. They equal those of solo-learn's
WeightedKNNClassifier."""
    parser = folders_parser("knn", about, "emim-solo knn trained_models/emim/0 -k 20 --distance cosine", _VIEWS)
    flags = {"ks": "-k", "distances": "--distance", "temperature": "--temperature"}
    parser.add_argument(flags["ks"], dest="ks", type=int, nargs="+", default=list(KS), help="numbers of neighbours")
    parser.add_argument(flags["distances"], dest="distances", choices=DISTANCES, nargs="+", default=list(DISTANCES))
    parser.add_argument(flags["temperature"], type=float, default=TEMPERATURE, help="of votes by cosine similarity")
    words, of_knn, changes = split(arguments)
    views, no_setting = views_of(of_knn)
    options = parser.parse_args([*no_setting, *words])
    try:
        settings = asdict(read(KnnSettings, {name: getattr(options, name) for name in flags}))
    except UsageError as error:
        raise UsageError(error.key, f"{flags[error.key.partition('.')[0]]}: {error}") from error

    def evaluate(checkpoint: Checkpoint, features: Features) -> Mapping[str, float]:
        return knn(features, **settings, device=device_of(checkpoint.cfg))

    _each("knn", options, changes, evaluate, settings, views)


def linear_main(arguments: Sequence[str]) -> None:
    """``emim-solo linear FOLDER ... [key=value ...]``."""
    from emim_solo.evaluation.linear import complete_settings, linear, logistic

    about = """Train two linear classifiers on frozen features of the backbone: solo-learn's LinearModel, and a logistic regression.

Prints accuracies on the validation images in percent: acc1 and acc5 of the LinearModel, logistic_acc1 of the other."""
    keys = {"max_epochs=100 optimizer.lr=0.3 ...": "of the LinearModel, as in scripts/linear", **_VIEWS}
    parser = folders_parser("linear", about, "emim-solo linear trained_models/emim/0 max_epochs=50", keys)
    parser.add_argument("--seed", type=int, default=0, help="of the LinearModel's weights and of the order of images")
    words, of_linear, changes = split(arguments)
    views, of_linear = views_of(of_linear)
    options = parser.parse_args(words)
    checked(options.seed, int, "--seed", SEEDS)
    settings = complete_settings(from_dotlist(of_linear))

    def evaluate(checkpoint: Checkpoint, features: Features) -> Mapping[str, float]:
        regression = {"logistic_acc1": logistic(features, device=device_of(checkpoint.cfg))["backbone_acc1"]}
        return linear(features, checkpoint.cfg, settings, seed=options.seed) | regression

    _each("linear", options, changes, evaluate, {**settings, "seed": options.seed}, views)


def umap_main(arguments: Sequence[str]) -> None:
    """``emim-solo umap FOLDER ...``."""
    from emim_solo.evaluation.thumbnails import MOST_IMAGES
    from emim_solo.evaluation.umap import check_installed, make_pictures

    about = "Draw the features of all checkpoints by UMAP, in one aligned layout, and write their coordinates as CSV."
    example = "emim-solo umap trained_models/emim/0 trained_models/vicreg/0"
    parser = folders_parser("umap", about, example, rows=False)
    parser.add_argument("--output", type=Path, default=Path("umap"), help="folder for the pictures")
    parser.add_argument("--limit", type=int, default=2000, help="at most so many images in each picture")
    parser.add_argument("--seed", type=int, default=0, help="of UMAP and of the choice of images")
    words, no_setting, changes = split(arguments)
    options = parser.parse_args([*no_setting, *words])
    check_installed()
    checked(options.limit, int, "--limit", {"least": 1, "most": MOST_IMAGES})
    checked(options.seed, int, "--seed", SEEDS)
    checkpoints = open_checkpoints(options.folders, changes)
    names = distinct_names(checkpoints)
    output = files.writable_folder(options.output.expanduser(), "--output")
    features = {name: extract_features(run, output) for name, run in zip(names, checkpoints, strict=True)}
    first = checkpoints[0]
    metrics = make_pictures(features, first.cfg, first.images, output, seed=options.seed, limit=options.limit)
    for name, of_run in metrics.items():
        print(f"{name}: " + ", ".join(f"{metric.replace('_', ' ')} {value:.3f}" for metric, value in of_run.items()))
    print(f"pictures (PNG, PDF) and coordinates (CSV) in '{output}'")


def distinct_names(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Names of the runs. If some are equal, these get as many of their last folders as make all names distinct."""
    places = [checkpoint.folder.resolve().parts for checkpoint in checkpoints]
    if len(set(places)) < len(places):  # of one run, several epochs
        places = [checkpoint.path.resolve().parts for checkpoint in checkpoints]
    if len(set(places)) < len(places):
        raise UsageError("checkpoint.twice", "the same checkpoint is named twice: give each folder once")
    names = [files.as_name(str(checkpoint.cfg.name)) for checkpoint in checkpoints]  # solo-learn's names may be paths
    for depth in range(1, max(map(len, places)) + 1):
        distinct = [
            name if names.count(name) == 1 else "-".join([name, *place[-depth:]])
            for name, place in zip(names, places, strict=True)
        ]
        if len(set(distinct)) == len(distinct):
            return distinct
    return [f"{name}-{number}" for number, name in enumerate(names)]
