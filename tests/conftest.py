"""Real parts for every test: the embedded digits and the installed solo-learn, through the suite face."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import processes
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from emim_solo.ground.errors import UsageError
from emim_solo.images.embedded import write_images
from emim_solo.suite import load_suite

torch.set_num_threads(1)  # two workers for two cores; and sums in one order: some tests compare to the bit
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_OPT", "1")  # UMAP is compiled in each process that uses it: 27 s in place of 39

WITH_UMAP = "benchmark export umap evaluation readme"
SLOWEST = f"{WITH_UMAP} tune pretraining live_score within_epoch many_views methods runs registration cli add_a_method"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest files first: a worker that began one last would leave the other idle for a minute."""
    places = {f"test_{name}.py": place for place, name in enumerate(SLOWEST.split())}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests in one worker, as with ``--dist loadfile``; all that use UMAP in the same one, which compiles it once."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return "umap" if Path(file).stem.removeprefix("test_") in WITH_UMAP.split() else file

    return Scheduling(config, log)


@contextmanager
def _refused(key: str | None, *names: object) -> Iterator[pytest.ExceptionInfo[UsageError]]:
    with pytest.raises(UsageError) as caught:
        yield caught
    assert key is None or caught.value.key == key, (caught.value.key, caught.value)
    missing = [str(name) for name in names if str(name) not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
    assert "\n" not in str(caught.value)


@pytest.fixture
def refused() -> Callable[..., AbstractContextManager[pytest.ExceptionInfo[UsageError]]]:
    """``with refused("optimizer.lr", "-1"):`` one line of an error with that key, which has the names in it."""
    return _refused


VIEW: dict[str, Any] = {
    "rrc": {"enabled": True, "crop_min_scale": 0.4, "crop_max_scale": 1.0},
    "color_jitter": {"prob": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.0, "hue": 0.0},
    "grayscale": {"prob": 0.0},
    "gaussian_blur": {"prob": 0.0},
    "solarization": {"prob": 0.0},
    "equalization": {"prob": 0.0},
    "horizontal_flip": {"prob": 0.0},
    "crop_size": 16,
    "num_crops": 2,
}
LARGER = {**VIEW, "crop_size": 32}  # for networks that divide the side of an image by 32


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded digits as image folders."""
    return write_images("digits", tmp_path_factory.mktemp("images") / "digits")


@pytest.fixture(scope="session")
def few_digits(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 training and 6 validation images of each digit: an epoch in a second or two."""
    folder = tmp_path_factory.mktemp("images") / "few"
    for split, count in (("train", 16), ("val", 6)):
        for digit in sorted((digits / split).iterdir()):
            target = folder / split / digit.name
            target.mkdir(parents=True)
            for image in sorted(digit.iterdir())[:count]:
                (target / image.name).write_bytes(image.read_bytes())
    return folder


@pytest.fixture(scope="session")
def three_classes(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training and 6 validation images of three digits, and the training images without classes in ``flat``."""
    folder = tmp_path_factory.mktemp("images") / "three"
    for split, count in (("train", 8), ("val", 2)):
        for digit in "012":
            for number, image in enumerate(sorted((few_digits / split / digit).iterdir())[:count]):
                for target in (folder / split / digit, *([folder / "flat"] if split == "train" else [])):
                    target.mkdir(parents=True, exist_ok=True)
                    (target / f"{digit}-{number}.png").write_bytes(image.read_bytes())
    return folder


# The smallest network of both generations: a third of the time of a ResNet-18, and a fifth of its checkpoints.
SMALL_BACKBONE: dict[str, Any] = {"name": "vit_tiny", "kwargs": {"mlp_ratio": 0.25}}
SMALL_OVERRIDES = [
    "augmentations.0.crop_size=16",
    f"backbone.name={SMALL_BACKBONE['name']}",
    *(f"+backbone.kwargs.{key}={value}" for key, value in SMALL_BACKBONE["kwargs"].items()),
]
RESNET: dict[str, Any] = {"name": "resnet18"}


def _config(images: Path, folder: Path, **overrides: Any) -> DictConfig:
    method = overrides.get("method", "emim")
    cfg = OmegaConf.create(
        {
            "name": f"{method}-digits",
            "method": method,
            "backbone": SMALL_BACKBONE,
            "method_kwargs": {"proj_hidden_dim": 64, "proj_output_dim": 16},
            "data": {
                "dataset": "custom",
                "train_path": str(images / "train"),
                "val_path": str(images / "val"),
                "num_workers": 0,
            },
            "augmentations": [VIEW],
            "optimizer": {
                "name": "adamw",
                "batch_size": 32,
                "lr": 0.001,
                "classifier_lr": 0.01,
                "weight_decay": 1e-4,
            },
            "scheduler": {"name": "warmup_cosine", "warmup_epochs": 1},
            "checkpoint": {"enabled": True, "dir": str(folder)},
            "knn_eval": {"enabled": True, "k": 5, "distance_func": "cosine"},
            "max_epochs": 1,
            "devices": 1,
            "accelerator": "cpu",
            "log_every_n_steps": 2,
            "enable_progress_bar": False,
            "seed": 7,
        }
    )
    for key, value in overrides.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, force_add=True, merge=key != "backbone")
    return cfg


@pytest.fixture
def make_cfg(few_digits: Path, tmp_path: Path) -> Callable[..., DictConfig]:
    """A small pretraining config in solo-learn's schema: ``make_cfg(method="vicreg", data__val_path=None)``."""
    return partial(_config, few_digits, tmp_path / "trained")


@pytest.fixture(scope="session")
def trained(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run of ``make_cfg()``, whose files no test changes but for rows that are appended."""
    from emim_solo.training.pretraining import prepare, pretrain

    return Path(pretrain(prepare(_config(few_digits, tmp_path_factory.mktemp("runs"))))["checkpoint"])


@pytest.fixture
def built_to_step() -> Callable[[DictConfig], LightningModule]:
    """Builds a model whose ``training_step`` can be called by hand: logging needs a running trainer."""

    def build(cfg: DictConfig) -> LightningModule:
        model: LightningModule = load_suite().build(cfg)
        model.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, log_every_n_steps=0)
        model.log = model.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
        return model

    return build


@pytest.fixture
def suites_knn(make_cfg: Callable[..., DictConfig]) -> Callable[[str], Callable[[int], Any]]:
    """For a distance, makes the k-NN classifier of k neighbours that the suite's methods have."""

    def of(distance: str) -> Callable[[int], Any]:
        from emim_solo.training.pretraining import prepare

        cfg = prepare(make_cfg(knn_eval__enabled=True, knn_eval__distance_func=distance)).config
        kind = type(load_suite().build(cfg).knn)
        return lambda k: kind(k=k, T=0.07, distance_fx=distance)

    return of


@pytest.fixture
def killed_when(tmp_path: Path) -> Callable[[DictConfig, str], int]:
    """Trains a config as version "run" in a real process, killed before a step if an expression of ``trainer`` is true then.

    Gives the status that the process ended with.
    """

    def train(cfg: DictConfig, when: str) -> int:
        script = tmp_path / "killed.py"
        script.write_text(
            "import os, signal, sys\n"
            "from omegaconf import OmegaConf\n"
            "from emim_solo import pretraining\n"
            "class Kill(pretraining.StopOnNaN):\n"
            "    def on_train_batch_start(self, trainer, *args):\n"
            f"        if {when}: os.kill(os.getpid(), signal.SIGKILL)\n"
            "pretraining.StopOnNaN = Kill\n"
            "pretraining.pretrain(pretraining.prepare(OmegaConf.load(sys.argv[1])), version='run')\n"
        )
        OmegaConf.save(cfg, tmp_path / "cfg.yaml")
        ended = processes.command(tmp_path / "cfg.yaml", script=script)
        assert ended.returncode in (0, -9), ended.stderr
        return ended.returncode

    return train


@pytest.fixture
def killed_in_its_third_epoch(killed_when: Callable[[DictConfig, str], int]) -> Callable[[DictConfig], None]:
    """Trains a config as version "run" in a real process, which is killed in the middle of its third epoch."""

    def train(cfg: DictConfig) -> None:
        assert killed_when(cfg, "trainer.current_epoch == 2 and args[-1] == 1") == -9

    return train


class Typed(NamedTuple):
    """What a command left: its status, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Typed]:
    """``typed("knn", folder, cwd=tmp_path)``: a command of ``emim-solo`` in this process, which takes seconds to start."""
    from emim_solo import cli

    def run(*words: object, cwd: Path) -> Typed:
        status, out, err = 0, io.StringIO(), io.StringIO()
        with monkeypatch.context() as patched, redirect_stdout(out), redirect_stderr(err):
            patched.chdir(cwd)
            try:
                cli.main([str(word) for word in words])
            except SystemExit as end:
                status = int(end.code or 0)
        return Typed(status, out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def solid_image() -> Callable[[Path], Path]:
    """Writes one small real image file and returns its path."""

    def write(path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (200, 30, 90)).save(path)
        return path

    return write
