"""``emim-solo export``: the backbone of a run as a file that loads without solo-learn, and a model card beside it."""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torchvision.transforms import Normalize

import emim_solo
from emim_solo.checkpoints.architectures import LIBRARIES, ONNX, Architecture, OnnxNetwork, named
from emim_solo.checkpoints.opening import CARD, Checkpoint, is_weights, open_checkpoint
from emim_solo.ground import compare, files
from emim_solo.ground.errors import UsageError
from emim_solo.results import rows
from emim_solo.suite import as_dict, load_suite
from emim_solo.suite.api import in_one_line, whole_size

SUFFIXES = {"torchvision": ".pth", "timm": ".pth", "safetensors": ".safetensors", ONNX: ".onnx"}
"""The file's suffix for each format. Where it is .pth, .pt is accepted, too."""
_ONLINE = ("val_loss", "val_acc1", "val_acc5", "val_knn_acc1", "val_knn_acc5")  # pretraining's metrics of the backbone
TOLERANCE, ONNX_TOLERANCE = 1e-6, 1e-4  # of features, relative to the largest one if that is above 1


def export(checkpoint: Checkpoint, to: str, file: Path, licence: str = "other") -> list[str]:
    """Write a run's backbone and its model card ``<file>.md``, each whole or not at all, if the export gives the run's features.

    ``to`` is one of :data:`SUFFIXES`; safetensors has the names of the first library that has the network. ``licence`` is that of
    the weights. Returns the lines of Python that load the file. UsageError if the format does not have the network (the message
    names one that does), or if features are not finite.
    """
    cfg = checkpoint.trained
    files.writable_folder(file.parent, "--output")
    backbone = load_suite().backbone(checkpoint.model()).to(memory_format=torch.contiguous_format)
    size = whole_size(cfg)
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    features = _features(backbone, images)
    if not features.isfinite().all():
        raise UsageError(
            "export.features", f"'{checkpoint.path}' has features that are not finite: take an earlier one"
        )
    same = {library: same for library in LIBRARIES if (same := _in_library(library, backbone, cfg, images, features))}
    wanted = to if to in LIBRARIES else next(iter(same), "torchvision or timm")
    architecture, network = same.get(wanted, (None, backbone))
    if to == ONNX:
        architecture = None  # an ONNX file holds it
        loading = ["import onnxruntime", "", f"session = onnxruntime.InferenceSession({json.dumps(file.name)})"]
        loading += ['features = session.run(None, {"images": images})[0]  # NumPy, float32']
    elif architecture is not None:
        loading = architecture.loading(file.name)
    else:
        reason = f"no network of {wanted} gives the features of {cfg.backbone.name} as {cfg.method} trains it"
        raise UsageError("--to", f"--to {to}: {reason}: take --to {next(iter(same), ONNX)}")
    content = _to_onnx(network, images, features) if to == ONNX else _to_bytes(network.state_dict(), to)
    card = _card(checkpoint, architecture, loading, features.shape[1], licence)
    with files.whole(file.with_name(f"{file.name}.md")) as unfinished_card, files.whole(file) as unfinished:
        unfinished_card.write_text(card, encoding="utf-8", errors="replace")  # a folder's name may be no UTF-8
        unfinished.write_bytes(content)
    return loading


@torch.no_grad()
def _features(network: nn.Module, images: Tensor) -> Tensor:
    """Features in double precision, so that the order of sums does not matter for the comparison."""
    return copy.deepcopy(network).double()(images.double())  # type: ignore[no-any-return]


def _in_library(
    library: str, backbone: nn.Module, cfg: DictConfig, images: Tensor, features: Tensor
) -> tuple[Architecture, nn.Module] | None:
    """The library's network with the backbone's weights, if it gives the backbone's features."""
    try:
        architecture = named(cfg.backbone.name, backbone, as_dict(cfg.backbone.kwargs), library)
        network = architecture.filled(backbone.state_dict(), "the run")
        theirs = _features(network, images)
    except (AssertionError, RuntimeError, UsageError):  # the library has none, or another one of this name
        return None
    return (architecture, network) if _close(theirs, features, TOLERANCE) else None


def _close(theirs: Tensor, ours: Tensor, tolerance: float) -> bool:
    return theirs.shape == ours.shape and bool((theirs - ours).abs().max() <= tolerance * ours.abs().max().clamp(min=1))


def _to_bytes(weights: dict[str, Tensor], to: str) -> bytes:
    """The file's content. The libraries' own functions would hide errors of the disk, and accept only paths in UTF-8."""
    if to == "safetensors":
        from safetensors.torch import save

        return save(weights, metadata={"format": "pt"})
    content = io.BytesIO()
    torch.save(weights, content)
    return content.getvalue()


def _to_onnx(network: nn.Module, images: Tensor, features: Tensor) -> bytes:
    with in_one_line("--to", "--to onnx", "pip install 'emim-solo[export]'"):
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    program = torch.onnx.export(
        network,
        (images,),
        dynamo=True,
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    written = OnnxNetwork(content, "what was exported")
    for some in (images, images[:1]):
        if not _close(written(some), features[: len(some)], ONNX_TOLERANCE):
            raise UsageError("--to", "--to onnx: onnxruntime gives other features than the run: take another format")
    return content


def _card(
    checkpoint: Checkpoint, architecture: Architecture | None, loading: Sequence[str], width: int, licence: str
) -> str:
    """A model card as huggingface_hub reads it. Its front matter has what is needed to open the file again."""
    from huggingface_hub import ModelCardData

    cfg, suite = checkpoint.trained, load_suite()
    shown = next(part for part in suite.evaluation_transform(cfg).transforms if isinstance(part, Normalize))
    size, mean, std = whole_size(cfg), [*shown.mean], [*shown.std]
    folder = Path(cfg.data.train_path)  # the card shows its name, not its whole path
    known: dict[str, Any] = {
        **{key: cfg[key] for key in ("name", "method", "seed")},
        "max_epochs": checkpoint.epochs,
        "backbone": as_dict(cfg.backbone),
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
        "config": compare.config_hash(as_dict(cfg)),
        "solo-learn": suite.version,
        "emim-solo": emim_solo.__version__,
        "licence of the weights": "for whoever trained them to say" if licence == "other" else licence,
    }
    scores = [f"| {stage} | {name} | {value} | {of} |" for (stage, name, of), value in _scores(checkpoint).items()]
    head = ["| stage | score | ± half of its 95 % interval | features; protocol; images |", "|---|---|---:|---|"]
    return "\n".join(
        [
            *("---", front.to_yaml(), "---", f"# {cfg.name}", ""),
            *("```python", *loading, "```", ""),
            f"`images` are RGB in [0, 1], less mean {mean}, over std {std}, as (N, 3, {size}, {size}); `features` are "
            f"(N, {width}).",
            *("", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items()), ""),
            *([*head, *scores, ""] if scores else []),
        ]
    )


def _scores(checkpoint: Checkpoint) -> dict[tuple[str, str, str], str]:
    """The newest numbers in the run's rows for this checkpoint's backbone on its own images, by stage, name and of what."""
    cfg, file = as_dict(checkpoint.trained), checkpoint.rows_file
    scores: dict[tuple[str, str, str], str] = {}
    stored = rows.read(file) if file.is_file() else []
    for row in rows.of_checkpoint(stored, checkpoint.folder, compare.config_hash(cfg), checkpoint.epochs):
        for name, value in row.get("metrics", {}).items():
            of = _of_backbone(row, name, cfg)
            if of is not None and value is not None and not name.endswith(("_half_width", "_null")):
                half_width = row["metrics"].get(f"{name}_half_width")
                scores[row["stage"], name, of] = f"{value:.2f}" + ("" if half_width is None else f" ± {half_width:.2f}")
    return scores


def _of_backbone(row: Mapping[str, Any], name: str, cfg: Mapping[str, Any]) -> str | None:
    """The features, settings and images that a row's number belongs to; None if it is not of the backbone."""
    stage, settings = row["stage"], compare.leaves(row.get("settings") or {})
    if stage == "score":
        of = f"backbone; protocol {row.get('protocol')}; {row.get('images')} {row.get('of')} images"
        return of if settings.get("features") == "backbone" else None
    if stage == "pretrain":
        if name not in _ONLINE:
            return None
        settings = compare.leaves(cfg.get("knn_eval") or {}) if "knn" in name else {"classifier": "online"}
    elif stage != "linear" and not name.startswith("backbone_"):
        return None
    elif name == "logistic_acc1":  # of these settings only ``views`` applies to the logistic regression
        settings = {key: value for key, value in settings.items() if key == "views"}
    # The names of k-NN metrics already say the number of neighbours and the distance.
    said = ", ".join(f"{key}={value}" for key, value in settings.items() if key not in ("ks", "distances"))
    training = stage == "diagnostics" or name.startswith("train_")
    return f"backbone; {said or 'default settings'}; {row.get('of', 'training' if training else 'validation')} images"


def export_main(arguments: Sequence[str]) -> None:
    """``emim-solo export FOLDER --to FORMAT``."""
    parser = argparse.ArgumentParser(
        prog="emim-solo export",
        description="Write the backbone of a run to a file that loads without solo-learn, with a model card beside it.",
        epilog="example: emim-solo export trained_models/emim/0 --to timm",
    )
    parser.add_argument("folder", metavar="FOLDER", help="folder of a run, or one of its .ckpt files")
    parser.add_argument("--to", choices=SUFFIXES, required=True, help="the library or format")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: backbone-FORMAT in the run's folder")
    parser.add_argument("--license", default="other", help="of the weights, for the card: mit, cc-by-4.0, ...")
    options = parser.parse_args(arguments)
    suffix, output = SUFFIXES[options.to], options.output
    if output is not None and output.suffix.lower() not in (suffix, suffix.removesuffix("h")):
        wanted = " or ".join(dict.fromkeys((suffix, suffix.removesuffix("h"))))
        raise UsageError("--output", f"--output {output}: expected a file ending in {wanted}")
    if is_weights(options.folder):
        reason = f"'{options.folder}' is a file of weights already"
        raise UsageError("export.folder", f"{reason}: expected the folder of a run, or a .ckpt file in one")
    checkpoint = open_checkpoint(options.folder)
    file = Path(os.path.expanduser(output or checkpoint.folder / f"backbone-{options.to}{suffix}"))
    loading = export(checkpoint, options.to, file, options.license)
    print("\n".join([*loading, f"'{file}' gives the features of '{checkpoint.path}'; card in '{file}.md'"]))
