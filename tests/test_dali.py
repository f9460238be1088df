"""Real DALI pipelines on the CPU, through the suite's own DALI loaders, beside its torchvision loaders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import RESNET
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from emim_solo.images.folders import HeldOut, RunImages, find_images, load_rgb
from emim_solo.suite import dali, load_suite
from emim_solo.training.run import prepare

REPOSITORY = Path(__file__).resolve().parent.parent
Refused = Callable[..., AbstractContextManager[Any]]
BATCH = 16
COLOURS = {"clay": (190, 90, 40), "moss": (60, 130, 70), "sea": (30, 100, 210)}

needs_dali = pytest.mark.skipif(
    not dali.is_installed(), reason="NVIDIA DALI is not installed: pip install 'emim-solo[dali]'"
)


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 JPEGs of one colour each, in three classes of 16, 32 and 48: whole batches, so that an epoch drops nothing."""
    folder = tmp_path_factory.mktemp("jpegs")
    for number, (name, colour) in enumerate(COLOURS.items(), start=1):
        for split, count in (("train", 16 * number), ("val", 4)):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (48 + index % 5, 40), colour).save(folder / split / name / f"{index}.jpg", quality=95)
    return folder


@pytest.fixture
def make_jpeg_cfg(make_cfg: Callable[..., DictConfig], jpegs: Path) -> Callable[..., DictConfig]:
    def make(**overrides: Any) -> DictConfig:
        return make_cfg(
            **{
                "data__train_path": str(jpegs / "train"),
                "data__val_path": str(jpegs / "val"),
                "optimizer__batch_size": BATCH,
                "devices": [0],
                "num_nodes": 1,
                **overrides,
            }
        )

    return make


class Seen(Callback):
    """What each epoch's batches held."""

    def __init__(self) -> None:
        self.labels: list[Counter[int]] = []
        self.shapes: set[tuple[int, ...]] = set()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.labels.append(Counter())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        indices, views, labels = batch
        assert len(indices) == len(labels)
        self.labels[-1].update(labels.tolist())
        self.shapes.update(tuple(view.shape) for view in views)


def fit(cfg: DictConfig, *callbacks: Callback) -> Trainer:
    suite, images = load_suite(), RunImages.of(cfg)
    assert images.train is not None
    cfg = suite.complete(cfg, images)
    trainer = Trainer(
        max_epochs=cfg.max_epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=2,
        callbacks=list(callbacks),
    )
    trainer.fit(suite.build(cfg), datamodule=suite.dali_datamodule(cfg, images.train))
    return trainer


def by_torchvision(cfg: DictConfig) -> Any:
    suite, images = load_suite(), RunImages.of(cfg)
    return suite.train_loader(suite.complete(cfg, images), images)


@needs_dali
def test_every_epoch_has_the_label_counts_of_the_torchvision_loader(make_jpeg_cfg: Callable[..., DictConfig]) -> None:
    seen = Seen()
    trainer = fit(make_jpeg_cfg(data__format="dali", dali__device="cpu", max_epochs=3), seen)

    torchvision: Counter[int] = Counter()
    for _, _, labels in by_torchvision(make_jpeg_cfg()):
        torchvision.update(labels.tolist())
    assert seen.labels == [torchvision] * 3 == [Counter({0: 16, 1: 32, 2: 48})] * 3
    assert seen.shapes == {(BATCH, 3, 16, 16)}
    assert trainer.global_step == 3 * 96 // BATCH
    assert torch.isfinite(trainer.callback_metrics["train_emim_loss"])


@needs_dali
@pytest.mark.parametrize("labelled", [True, False])
def test_images_held_out_for_the_score_do_not_reach_dali(
    labelled: bool, jpegs: Path, make_jpeg_cfg: Callable[..., DictConfig]
) -> None:
    held_out = {"enabled": True, "held_out": {"images": 86, "of": 96, "seed": 0}}
    cfg = make_jpeg_cfg(
        data__format="dali",
        dali__device="cpu",
        max_epochs=2,
        score=held_out,
        optimizer__batch_size=10,
        data__no_labels=not labelled,
    )
    kept = RunImages.of(cfg).train
    assert kept is not None and HeldOut.recorded(cfg) is not None and len(kept) == 10
    seen = Seen()
    assert fit(cfg, seen).global_step == 2
    assert seen.labels == [Counter(kept.labels)] * 2
    assert not labelled or seen.labels[0] != Counter({0: 2, 1: 3, 2: 5}), "of another seed"


@needs_dali
def test_emim_takes_small_crops_from_dali(make_jpeg_cfg: Callable[..., DictConfig]) -> None:
    cfg, seen = make_jpeg_cfg(backbone=RESNET, data__format="dali", dali__device="cpu"), Seen()
    cfg.augmentations.append(OmegaConf.merge(cfg.augmentations[0], {"crop_size": 8, "num_crops": 2}))
    trainer = fit(cfg, seen)
    assert seen.shapes == {(BATCH, 3, 16, 16), (BATCH, 3, 8, 8)}
    assert torch.isfinite(trainer.callback_metrics["train_emim_loss"])


@needs_dali
@pytest.mark.parametrize("solarised", [0.0, 1.0])
def test_views_have_the_values_of_the_torchvision_loader(
    make_jpeg_cfg: Callable[..., DictConfig], solarised: float
) -> None:
    """On images of one colour a crop changes nothing: channel order, mean, std and solarisation must agree."""
    overrides: dict[str, Any] = {
        "augmentations": [
            {
                "rrc": {"enabled": True, "crop_min_scale": 0.4, "crop_max_scale": 1.0},
                "color_jitter": {"prob": 0.0, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1},
                "grayscale": {"prob": 0.0},
                "gaussian_blur": {"prob": 0.0},
                "solarization": {"prob": solarised},
                "equalization": {"prob": 0.0},
                "horizontal_flip": {"prob": 0.5},
                "crop_size": 32,
                "num_crops": 2,
                "mean": [0.3, 0.4, 0.5],
                "std": [0.2, 0.25, 0.3],
            }
        ]
    }

    class Colours(Callback):
        def __init__(self) -> None:
            self.of: dict[int, torch.Tensor] = {}

        def on_train_batch_end(self, *arguments: Any) -> None:
            _, views, labels = arguments[3]
            self.of.update(zip(labels.tolist(), views[0].mean(dim=(2, 3)), strict=True))

    colours = Colours()
    fit(make_jpeg_cfg(data__format="dali", dali__device="cpu", **overrides), colours)
    for _, views, labels in by_torchvision(make_jpeg_cfg(**overrides)):
        for label, view in zip(labels.tolist(), views[0], strict=True):
            # one grey level is 1/255/0.2 = 0.02; two decoders and two resamplers may each be one off
            torch.testing.assert_close(colours.of[label], view.mean(dim=(1, 2)), rtol=0, atol=0.05)


@pytest.fixture
def heap(tmp_path: Path) -> Path:
    """Images of one colour each, in every form that both read, at three depths and among junk; named by their number."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for number, (name, options) in enumerate(
        {
            "0.jpg": {"quality": 100},
            "deep er/1.JPEG": {"quality": 100, "exif": exif},
            "deep er/ünten/2.png": {},
            "3.png": {"mode": "I;16"},
            "4.tif": {"mode": "I;16"},
            "5.webp": {"lossless": True},
            "6.tiff": {"mode": "P"},
            "7.bmp": {},
        }.items()
    ):
        path = tmp_path / "heap" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = 30 * number + 10
        mode = options.pop("mode", "RGB")
        image = Image.new("RGB", (48, 40), (grey, grey, grey))
        deep = Image.fromarray(np.full((40, 48), 257 * grey, dtype="uint16"))
        (deep if mode == "I;16" else image.convert(mode)).save(path, **options)
    for junk in (
        ".DS_Store",
        "._0.jpg",
        "notes.txt",
        "deep er/Thumbs.db",
        "__MACOSX/0.jpg",
        ".ipynb_checkpoints/1.png",
    ):
        (tmp_path / "heap" / junk).parent.mkdir(exist_ok=True)
        (tmp_path / "heap" / junk).write_bytes(b"no image")
    return tmp_path / "heap"


@needs_dali
@pytest.mark.parametrize("labelled", [False, True])
def test_dali_reads_the_images_of_a_folder_that_the_other_loaders_read(
    labelled: bool, heap: Path, make_jpeg_cfg: Callable[..., DictConfig]
) -> None:
    """Nested folders, junk, 16 bits, orientation: the same images, labels and levels of grey."""
    if labelled:
        (heap / "others").mkdir()
        for path in list(heap.glob("[0-9].*")):
            path.rename(heap / "others" / path.name)

    class Greys(Callback):
        def __init__(self) -> None:
            self.seen: list[tuple[float, int]] = []

        def on_train_batch_end(self, *arguments: Any) -> None:
            _, views, labels = arguments[3]
            self.seen += zip(views[0].mean(dim=(1, 2, 3)).tolist(), labels.tolist(), strict=True)

    view = OmegaConf.to_container(make_jpeg_cfg().augmentations[0])
    assert isinstance(view, dict)
    view |= {"color_jitter": {"prob": 0.0}, "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
    batch = 4 if labelled else 8
    overrides: dict[str, Any] = {
        "data": {"train_path": str(heap), "val_path": None, "no_labels": not labelled},
        "augmentations": [view],
        "optimizer__batch_size": batch,
    }
    greys = Greys()
    cfg = make_jpeg_cfg(data__format="dali", dali__device="cpu", **overrides)
    images = RunImages.of(cfg).train
    assert images is not None and len(images) == 8
    dali.check_training_images(images)
    fit(cfg, greys)
    torchvision: list[tuple[float, int]] = []
    for _, views, labels in by_torchvision(make_jpeg_cfg(**overrides)):
        torchvision += zip(views[0].mean(dim=(1, 2, 3)).tolist(), labels.tolist(), strict=True)
    assert len(torchvision) == 8
    expected = [(30 * number + 10, (0 if number in (1, 2) else 1) if labelled else -1) for number in range(8)]
    for found in (greys.seen, torchvision):
        found.sort()
        assert [label for _, label in found] == [label for _, label in expected]
        np.testing.assert_allclose([255 * grey for grey, _ in found], [grey for grey, _ in expected], atol=2)


@needs_dali
@pytest.mark.parametrize("name", ["0.jpg", "1.JPEG", "2.png", "3.png", "4.tif", "5.webp", "6.tiff", "7.bmp"])
def test_dalis_decoder_makes_the_pixels_of_load_rgb(name: str, tmp_path: Path) -> None:
    """What :func:`dali.check_training_images` rests on, shown on an image that is not the same turned or mirrored."""
    from nvidia.dali import fn, pipeline_def, types

    exif = Image.Exif()
    exif[0x0112] = 6
    ramp = np.linspace(0, 65535, 40 * 48).reshape(40, 48).astype("uint16")
    grey = Image.fromarray((ramp >> 8).astype("uint8"))
    image = {"3": Image.fromarray(ramp), "4": Image.fromarray(ramp), "6": grey.convert("P")}.get(name[0], grey)
    image.save(tmp_path / name, quality=95, exif=exif)

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def decoded() -> Any:
        encoded, _ = fn.readers.file(files=[str(tmp_path / name)], labels=[0])
        return fn.decoders.image(encoded, device="cpu", output_type=types.RGB)

    (found,) = decoded().run()
    ours = np.asarray(load_rgb(str(tmp_path / name)), dtype=int)
    assert ours.shape == ((40, 48, 3) if name == "7.bmp" else (48, 40, 3))
    np.testing.assert_allclose(np.asarray(found.as_cpu().at(0)), ours, atol=2)


@needs_dali
@pytest.mark.parametrize(
    ("name", "mode", "key"),
    [
        ("float.tif", "F", "images.unreadable"),
        ("int32.tif", "I", "images.unreadable"),
        ("one.tif", "1", "data.train_path"),
        ("lab.tiff", "LAB", "data.train_path"),
    ],
)
def test_image_that_dali_reads_otherwise_or_not_at_all_is_named(
    name: str, mode: str, key: str, heap: Path, refused: Refused
) -> None:
    Image.new(mode, (48, 40)).save(heap / name)
    with refused(key, name, f"mode {mode}"):
        dali.check_training_images(find_images(heap, labelled=False))


@needs_dali
def test_main_pretrain_runs_dali_without_a_gpu(
    make_jpeg_cfg: Callable[..., DictConfig], jpegs: Path, tmp_path: Path
) -> None:
    """The suite's own script, unmodified: the Hydra plugin registers EMIM and sets its CPU pipelines free."""
    script = clone_script("main_pretrain.py")
    done = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", str(script)),
            *("--config-path", str(REPOSITORY / "scripts" / "pretrain" / "custom"), "--config-name", "emim.yaml"),
            *(f"data.train_path={jpegs / 'train'}", f"data.val_path={jpegs / 'val'}", "data.format=dali"),
            *("+dali.device=cpu", "data.num_workers=1", f"optimizer.batch_size={BATCH}", "max_epochs=2"),
            *("method_kwargs.proj_hidden_dim=64", "method_kwargs.proj_output_dim=16", "augmentations.0.crop_size=32"),
            *("accelerator=cpu", "devices='1'", "sync_batchnorm=False", "precision=32", "+enable_progress_bar=False"),
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (tmp_path / "trained_models" / "emim").iterdir()
    args = json.loads((folder / "args.json").read_text())
    assert args["data"]["format"] == "dali"
    assert args["dali"]["device"] == "cpu"
    assert next(folder.glob("*.ckpt")).name.endswith("ep=1.ckpt")


def clone_script(name: str) -> Path:
    import solo

    assert solo.__file__ is not None
    script = Path(solo.__file__).resolve().parent.parent / name
    if not script.is_file():
        pytest.skip(f"{name} is in a clone of solo-learn main only: make test-main SOLO=<clone>")
    return script


@pytest.mark.parametrize(
    ("overrides", "key", "message"),
    [
        ({"data__dataset": "cifar10"}, "data.format", "does not know data.dataset=cifar10"),
        ({"dali__device": "tpu"}, "dali.device", "expected one of cpu, gpu"),
        ({"dali__device": "cpu", "augmentations__0__equalization__prob": 0.1}, "augmentations", "DALI has none"),
        pytest.param(
            {"dali__device": "gpu"},
            "dali.device",
            "add +dali.device=cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there"),
        ),
    ],
)
@needs_dali
def test_what_dali_cannot_do_is_refused(
    make_jpeg_cfg: Callable[..., DictConfig], overrides: dict[str, Any], key: str, message: str, refused: Refused
) -> None:
    with refused(key, message):
        prepare(make_jpeg_cfg(data__format="dali", **overrides))


@pytest.mark.skipif(dali.is_installed(), reason="DALI is installed")
def test_missing_dali_is_named(make_jpeg_cfg: Callable[..., DictConfig], refused: Refused) -> None:
    with refused("data.format", "pip install 'emim-solo[dali]'"):
        dali.complete_dali(make_jpeg_cfg(data__format="dali"))
