"""``emim-solo export``: the backbone of a run as a file that loads without solo-learn, and a model card beside it."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torchvision.transforms import Normalize

import emim_solo
from emim_solo.checkpoints.architectures import LIBRARIES, ONNX, Architecture, OnnxNetwork, named
from emim_solo.checkpoints.opening import CARD, Checkpoint, Weights, open_checkpoint
from emim_solo.ground import compare, files
from emim_solo.ground.errors import UsageError
from emim_solo.results import rows
from emim_solo.suite import load_suite, plain

SUFFIXES = {"torchvision": ".pth", "timm": ".pth", "safetensors": ".safetensors", ONNX: ".onnx"}
TOLERANCE, ONNX_TOLERANCE = 1e-6, 1e-4  # of features; of the largest one where that is above 1


def export(checkpoint: Checkpoint, to: str, file: Path, licence: str = "other") -> list[str]:
    """Write the backbone of a run, whole, and the card ``<file>.md``. The file is kept if it gives the run's features.

    Args:
        checkpoint: of any method of the suite.
        to: ``torchvision`` or ``timm``: a state dict in the library's names; ``safetensors``: in those of the first of the
            two that has the network; ``onnx``: the network, for any number of images of the size it was trained at.
        file: to write.
        licence: of the weights, as model cards name it.

    Returns:
        The lines of Python that load the file.

    Raises:
        UsageError: the format has no such network, and which one has; or there is nothing to export.
    """
    cfg = checkpoint.trained
    files.writable_folder(file.parent, "--output")
    backbone = load_suite().backbone(checkpoint.model()).to(memory_format=torch.contiguous_format)
    size = cfg.augmentations[0].crop_size
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    features = _features(backbone, images)
    if not features.isfinite().all():
        raise UsageError(f"'{checkpoint.path}' gives features that are not finite: export an earlier checkpoint")
    same = {library: found for library in LIBRARIES if (found := _in_library(library, backbone, cfg, images, features))}
    wanted = to if to in LIBRARIES else next(iter(same), "torchvision or timm")
    architecture, network = same.get(wanted, (None, backbone))
    if to == ONNX:
        architecture = None  # the file holds it
        loading = ["import onnxruntime", "", f"session = onnxruntime.InferenceSession({file.name!r})"]
        loading += ['features = session.run(None, {"images": images})[0]  # NumPy, float32']
    elif architecture is not None:
        loading = architecture.loading(file.name)
    else:
        raise UsageError(
            f"--to {to}: no network of {wanted} gives the features of {cfg.backbone.name} as {cfg.method} trains it: take "
            f"--to {next(iter(same), ONNX)}"
        )
    with files.whole(file) as unfinished:
        if to == ONNX:
            _write_onnx(network, images, features, unfinished)
        elif to == "safetensors":
            from safetensors.torch import save_file

            save_file(network.state_dict(), unfinished, metadata={"format": "pt"})
        else:
            torch.save(network.state_dict(), unfinished)
    card = _card(checkpoint, architecture, loading, features.shape[1], licence)
    files.write_text(file.with_name(f"{file.name}.md"), card)
    return loading


@torch.no_grad()
def _features(network: nn.Module, images: Tensor) -> Tensor:
    """In double precision, where the order of sums does not show."""
    return copy.deepcopy(network).double()(images.double())  # type: ignore[no-any-return]


def _in_library(
    library: str, backbone: nn.Module, cfg: DictConfig, images: Tensor, features: Tensor
) -> tuple[Architecture, nn.Module] | None:
    """The library's network with the backbone's weights, if it gives the backbone's features."""
    try:
        architecture = named(cfg.backbone.name, backbone, plain(cfg.backbone.kwargs), library)
        network = architecture.filled(backbone.state_dict(), "the run")
        theirs = _features(network, images)
    except (AssertionError, RuntimeError, UsageError):  # it has none, or another one of that name
        return None
    return (architecture, network) if _close(theirs, features, TOLERANCE) else None


def _close(theirs: Tensor, ours: Tensor, tolerance: float) -> bool:
    return theirs.shape == ours.shape and bool((theirs - ours).abs().max() <= tolerance * ours.abs().max().clamp(min=1))


def _write_onnx(network: nn.Module, images: Tensor, features: Tensor, file: Path) -> None:
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(f"--to onnx needs the export extra ({error}): pip install 'emim-solo[export]'") from error
    torch.onnx.export(
        network,
        (images,),
        file,
        dynamo=True,
        external_data=False,
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    written = OnnxNetwork(file)
    for some in (images, images[:1]):
        if not _close(written(some), features[: len(some)], ONNX_TOLERANCE):
            raise UsageError("--to onnx: onnxruntime gives other features than the run: take another format")


def _card(
    checkpoint: Checkpoint, architecture: Architecture | None, loading: Sequence[str], width: int, licence: str
) -> str:
    """A model card as huggingface_hub reads it; what opens the file again is in its front matter."""
    from huggingface_hub import ModelCardData

    cfg, suite = checkpoint.trained, load_suite()
    shown = next(part for part in suite.evaluation_transform(cfg).transforms if isinstance(part, Normalize))
    size, mean, std = cfg.augmentations[0].crop_size, [*shown.mean], [*shown.std]
    folder = Path(cfg.data.train_path)  # its own name, not where it lies
    known: dict[str, Any] = {
        **{key: cfg[key] for key in ("name", "method", "seed")},
        "max_epochs": checkpoint.epochs,
        "backbone": plain(cfg.backbone),
        "data": {"dataset": cfg.data.dataset},
        "augmentations": [{"crop_size": size, "mean": mean, "std": std}],
    }
    opening: dict[str, Any] = {CARD: {"network": architecture and vars(architecture), "config": known}}
    front = ModelCardData(
        license=licence,
        library_name=ONNX if architecture is None else architecture.library,
        pipeline_tag="image-feature-extraction",
        tags=["self-supervised-learning", "solo-learn", cfg.method],
        **opening,
    )
    facts = {
        "method": cfg.method,
        "backbone": f"{cfg.backbone.name}, {width} features",
        "trained on": f"{folder.parent.name}/{folder.name}" if cfg.data.dataset == "custom" else cfg.data.dataset,
        "epochs": checkpoint.epochs,
        "seed": cfg.seed,
        "config": compare.config_hash(plain(cfg)),
        "solo-learn": suite.version,
        "emim-solo": emim_solo.__version__,
        "licence of the weights": "for whoever trained them to say" if licence == "other" else licence,
    }
    scores = [f"| {stage} | {name} | {value} |" for (stage, name), value in _scores(checkpoint).items()]
    return "\n".join(
        [
            *("---", front.to_yaml(), "---", f"# {cfg.name}", ""),
            *("```python", *loading, "```", ""),
            f"`images` are RGB in [0, 1], less mean {mean}, over std {std}, as (N, 3, {size}, {size}); `features` are "
            f"(N, {width}).",
            *("", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items()), ""),
            *(["| stage | score | ± half of its 95 % interval |", "|---|---|---:|", *scores, ""] if scores else []),
        ]
    )


def _scores(checkpoint: Checkpoint) -> dict[tuple[str, str], str]:
    """What the rows of the run say of this checkpoint's backbone on the run's own images, the last row of each stage."""
    found: dict[tuple[str, str], str] = {}
    own = compare.config_hash(plain(checkpoint.trained))
    for row in rows.read(checkpoint.rows_file) if checkpoint.rows_file.is_file() else []:
        place = Path(row.get("checkpoint") or "").parts[-2:]
        if (row["config_hash"], row.get("epochs"), place) != (own, checkpoint.epochs, checkpoint.folder.parts[-2:]):
            continue
        metrics = row["metrics"]
        for name, value in metrics.items():
            of_backbone = name.startswith("val_") if row["stage"] == "pretrain" else not name.startswith("projector")
            if of_backbone and value is not None and not name.endswith(("_half_width", "_null", "images")):
                half_width = metrics.get(f"{name}_half_width")
                found[row["stage"], name] = f"{value:.2f}" + ("" if half_width is None else f" ± {half_width:.2f}")
    return found


def export_main(arguments: Sequence[str]) -> None:
    """``emim-solo export FOLDER --to FORMAT``."""
    parser = argparse.ArgumentParser(
        prog="emim-solo export",
        description="The backbone of a run as a file that loads without solo-learn, and its card.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="of a run, or one of its .ckpt files")
    parser.add_argument("--to", choices=SUFFIXES, required=True)
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: backbone-FORMAT in the run's folder")
    parser.add_argument("--license", default="other", help="of the weights, for the card: mit, cc-by-4.0, ...")
    given = parser.parse_args(arguments)
    checkpoint = open_checkpoint(given.folder)
    if isinstance(checkpoint, Weights):
        raise UsageError(f"'{given.folder}' is a file of weights already: expected the folder of a run")
    file = (given.output or checkpoint.folder / f"backbone-{given.to}{SUFFIXES[given.to]}").expanduser()
    if file.suffix != SUFFIXES[given.to]:
        raise UsageError(f"--output {file}: expected a file ending in {SUFFIXES[given.to]}, by which it is read")
    loading = export(checkpoint, given.to, file, given.license)
    print("\n".join([*loading, f"'{file}' gives the features of '{checkpoint.path}'; card in '{file}.md'"]))
