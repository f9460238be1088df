"""Pretraining with the real suite, the real Lightning trainer and real images."""

from __future__ import annotations

import csv
import json
import signal
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import RESNET
from lightning.pytorch import LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from emim_solo.checkpoints.opening import last_checkpoint, open_checkpoint
from emim_solo.emim.objective import emim_loss_func
from emim_solo.ground import configs
from emim_solo.ground.errors import UsageError
from emim_solo.ground.stopping import Stopped
from emim_solo.images.folders import RunImages
from emim_solo.results import rows
from emim_solo.suite import dali, load_suite
from emim_solo.training import pretraining
from emim_solo.training.pretraining import prepare, pretrain

MakeCfg = Callable[..., DictConfig]
Refused = Callable[..., AbstractContextManager[Any]]
Refuses = Callable[..., None]


def read_curve(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("method", ["emim", "barlow_twins", "vicreg"])
def test_one_epoch_of_each_method_of_the_demo(method: str, make_cfg: MakeCfg) -> None:
    row = pretrain(prepare(make_cfg(method=method)))
    folder = Path(row["checkpoint"])
    assert sorted(path.suffix for path in folder.iterdir()) == [".ckpt", ".csv", ".json"]
    assert json.loads((folder / "args.json").read_text())["method"] == method
    assert 0 <= row["metrics"]["val_acc1"] <= 100
    assert 0 <= row["metrics"]["val_knn_acc1"] <= 100
    assert row["epochs"] == 1
    assert rows.read(folder.parent.parent / "rows.jsonl") == [row]
    logged = {name for line in read_curve(folder) for name, value in line.items() if value}
    if method == "emim":
        assert {"train_emim_loss_step", "train_emim_loss_epoch", "train_mi", "train_mi_null"} <= logged
        assert {"train_entropy", "train_residual_entropy"} <= logged
        assert {"train_non_gaussianity", "train_non_gaussianity_null"} <= logged
        assert row["metrics"]["train_mi"] > 0


def test_online_knn_is_of_the_epochs_own_features_however_seldom_it_is_computed(
    make_cfg: MakeCfg, tmp_path: Path
) -> None:
    every, fourth = (
        pretrain(prepare(make_cfg(max_epochs=4, check_val_every_n_epoch=n, checkpoint__dir=str(tmp_path / str(n)))))
        for n in (1, 4)
    )
    names = ("val_knn_acc1", "val_knn_acc5", "val_acc1")
    assert [fourth["metrics"][name] for name in names] == [every["metrics"][name] for name in names]


def test_wandb_without_an_account_is_one_line_before_training(
    make_cfg: MakeCfg, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    with refused("wandb.enabled", "API key", "wandb login", "wandb.offline=True"):
        pretrain(prepare(make_cfg(wandb={"enabled": True})))


def with_small_crops(cfg: DictConfig) -> DictConfig:
    """The config with two crops of half the size beside the large ones."""
    cfg.augmentations.append(OmegaConf.merge(cfg.augmentations[0], {"crop_size": 8, "num_crops": 2}))
    return cfg


def test_emim_takes_every_view_of_multi_crop(
    make_cfg: MakeCfg, built_to_step: Callable[[DictConfig], LightningModule]
) -> None:
    run = prepare(with_small_crops(make_cfg(backbone=RESNET, max_epochs=1)))
    assert (run.config.data.num_large_crops, run.config.data.num_small_crops) == (2, 2)
    row = pretrain(run)
    assert row["metrics"]["train_mi"] > 0
    # One more step by hand: the loss is that of all four embeddings, and every one of them has a gradient.
    suite = load_suite()
    model = built_to_step(run.config)
    taken: list[torch.Tensor] = []
    handle = model.projector.register_forward_hook(lambda _, __, z: taken.append(z))
    batch = next(iter(suite.train_loader(run.config, run.images)))
    assert [tuple(view.shape[-2:]) for view in batch[1]] == [(16, 16)] * 2 + [(8, 8)] * 2
    loss = model.training_step(batch, 0)
    handle.remove()
    assert len(taken) == 4
    gradients = torch.autograd.grad(loss, taken)
    expected = torch.autograd.grad(emim_loss_func(*taken, **model.objective_kwargs), taken)
    for found, its in zip(gradients, expected, strict=True):
        assert found.norm() > 0
        torch.testing.assert_close(found, its)


def test_collapsed_embeddings_are_warned_of(make_cfg: MakeCfg) -> None:
    model = load_suite().build(prepare(make_cfg()).config)
    model.trainer = Trainer(logger=False, enable_checkpointing=False)
    spread = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    for embeddings, expected in ((spread, False), (spread[:, :1] * torch.ones(16) + 5, True), (0 * spread + 1, True)):
        model._latest = embeddings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.on_train_epoch_end()
        assert any("have collapsed" in str(warning.message) for warning in caught) == expected


def test_emim_loss_falls_while_training(make_cfg: MakeCfg) -> None:
    row = pretrain(prepare(make_cfg(backbone=RESNET, max_epochs=4, optimizer__lr=0.01)))
    curve = [
        float(line["train_emim_loss_epoch"])
        for line in read_curve(Path(row["checkpoint"]))
        if line.get("train_emim_loss_epoch")
    ]
    assert curve[-1] < curve[0] - 0.05


def test_momentum_method_and_lars_train(make_cfg: MakeCfg) -> None:
    cfg = make_cfg(
        method="byol",
        method_kwargs={"proj_hidden_dim": 64, "proj_output_dim": 16, "pred_hidden_dim": 32},
        optimizer__name="lars",
        optimizer__lr=0.3,
        momentum={"classifier": False},
        backbone__small_image_stem=False,
    )
    row = pretrain(prepare(cfg))
    assert torch.isfinite(torch.tensor(row["metrics"]["train_class_loss_epoch"]))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_resumed_run_ends_with_the_metrics_of_an_uninterrupted_one(
    num_workers: int, make_cfg: MakeCfg, killed_in_its_third_epoch: Callable[[DictConfig], None], tmp_path: Path
) -> None:
    same = {"max_epochs": 3, "data__num_workers": num_workers}
    whole = pretrain(prepare(make_cfg(**same, checkpoint__dir=str(tmp_path / "whole"))), version="run")

    cfg = make_cfg(**same, checkpoint__dir=str(tmp_path / "parts"))
    killed_in_its_third_epoch(cfg)
    folder = tmp_path / "parts" / "emim" / "run"
    assert "ep=1" in str(last_checkpoint(folder))

    resumed = pretrain(prepare(cfg), version="run")
    assert resumed["metrics"].keys() == whole["metrics"].keys()
    for name, value in whole["metrics"].items():
        assert resumed["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
    assert len(list(folder.glob("*.ckpt"))) == 1
    assert (folder / "metrics.0.csv").is_file()


def test_auto_resume_takes_the_run_of_the_same_config_only_and_once(
    make_cfg: MakeCfg, refused: Refused, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = {"auto_resume": {"enabled": True}, "data__num_workers": 0}
    first = pretrain(prepare(make_cfg(**same)))
    other = pretrain(prepare(make_cfg(**same, optimizer__lr=0.002)))
    assert other["checkpoint"] != first["checkpoint"]
    assert "val_acc1" in other["metrics"]
    # Finished: said, no row more, no file touched; found though another run came after it.
    folder = Path(first["checkpoint"])
    before = {path: path.stat().st_mtime_ns for path in [*folder.iterdir(), folder.parent.parent / "rows.jsonl"]}
    assert pretrain(prepare(make_cfg(**same))) == first
    assert "already finished" in capsys.readouterr().out
    assert {
        path: path.stat().st_mtime_ns for path in [*folder.iterdir(), folder.parent.parent / "rows.jsonl"]
    } == before
    # A kill between the last epoch and the row costs neither: the row comes with its metrics.
    rows_file = folder.parent.parent / "rows.jsonl"
    rows_file.unlink()
    recovered = pretrain(prepare(make_cfg(**same)))
    assert rows.read(rows_file) == [recovered]
    assert recovered["metrics"] == first["metrics"]
    assert recovered["seconds"] == pytest.approx(first["seconds"], abs=5)
    # A checkpoint of another place, with nothing left to train, is no run.
    path = last_checkpoint(folder)
    with refused("resume.finished", "has 1 epochs already", "max_epochs"):
        pretrain(prepare(make_cfg(resume_from_checkpoint=str(path), checkpoint__dir=str(tmp_path / "elsewhere"))))
    assert not list((tmp_path / "elsewhere").rglob("*.jsonl"))


def test_checkpoint_loads_into_the_same_embeddings(trained: Path) -> None:
    suite = load_suite()
    opened = open_checkpoint(trained)
    path, model = opened.path, opened.model()
    weights = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    images = next(iter(suite.evaluation_loaders(opened.cfg, opened.images)[1]))[0]
    with torch.no_grad():
        out = model(images)
    assert out["z"].shape == (len(images), 16)
    assert torch.allclose(out["feats"], suite.backbone(model)(images))


def test_lightnings_load_from_checkpoint(trained: Path) -> None:
    suite = load_suite()
    opened = open_checkpoint(trained)
    path = opened.path
    model = suite.emim_class.load_from_checkpoint(path, strict=True, **suite.constructor_kwargs(opened.cfg))
    weights = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    assert torch.equal(model.projector[0].weight, weights["projector.0.weight"])


def test_small_image_stem_for_any_method(make_cfg: MakeCfg) -> None:
    suite = load_suite()
    for method, kwargs in (("emim", {}), ("byol", {"pred_hidden_dim": 8})):
        cfg = make_cfg(method=method, backbone=RESNET | {"small_image_stem": True}, momentum={"base_tau": 0.9})
        cfg.method_kwargs.update(kwargs)
        model = suite.build(prepare(cfg).config)
        stems = [
            module
            for name, module in model.named_modules()
            if name.endswith("coder.conv1") or name.endswith("bone.conv1")
        ]
        assert len(stems) == (2 if method == "byol" else 1)
        for stem in stems:
            assert stem.kernel_size == (3, 3)
            assert stem.stride == (1, 1)
        assert torch.equal(stems[0].weight, stems[-1].weight)


def test_emim_takes_the_config_of_another_method(make_cfg: MakeCfg) -> None:
    cfg = make_cfg()
    cfg.method_kwargs.update({"scale_loss": 0.1, "lamb": 0.0051, "sim_loss_weight": 25.0})
    completed = prepare(cfg).config.method_kwargs
    assert "scale_loss" not in completed
    assert completed.weight == 4.0
    assert completed.proj_output_dim == 16


def test_learning_rates_scale_with_the_batch(make_cfg: MakeCfg) -> None:
    cfg = prepare(make_cfg(optimizer__batch_size=64, optimizer__lr=0.4, optimizer__classifier_lr=0.8)).config
    assert cfg.optimizer.lr == pytest.approx(0.1)
    assert cfg.optimizer.classifier_lr == pytest.approx(0.2)


@pytest.mark.parametrize("devices", [1, "1", "auto", [0], -1])
def test_every_spelling_of_one_device(devices: Any, make_cfg: MakeCfg) -> None:
    assert list(prepare(make_cfg(devices=devices)).config.devices) == [0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU, so the config runs as it is")
def test_a_config_for_a_gpu_runs_on_a_cpu_as_its_error_says(
    make_cfg: MakeCfg, refused: Refused, killed_when: Callable[[DictConfig, str], int]
) -> None:
    """The options of the Trainer in scripts/pretrain/custom."""
    shipped = yaml.safe_load((configs.root() / "pretrain" / "custom" / "_base.yaml").read_text())
    options = {key: shipped[key] for key in ("devices", "sync_batchnorm", "accelerator", "strategy", "precision")}
    with pytest.raises(UsageError) as said:
        prepare(make_cfg(**options))
    advice = str(said.value).split(": add ")[1].split()
    assert killed_when(make_cfg(**options | dict(each.split("=") for each in advice)), "False") == 0
    with refused("sync_batchnorm", "GPUs"):
        prepare(make_cfg(**options | {"accelerator": "cpu", "precision": 32, "devices": 2}))


def test_nan_in_the_loss_ends_the_run(make_cfg: MakeCfg) -> None:
    with pytest.raises(FloatingPointError, match="NaN"):
        pretrain(prepare(make_cfg(method="barlow_twins", optimizer__lr=1e30, scheduler__warmup_epochs=0, max_epochs=2)))


def test_nan_in_the_embeddings_of_emim_ends_the_run(make_cfg: MakeCfg) -> None:
    with pytest.raises(FloatingPointError, match=r"NaN or Inf|too large"):
        pretrain(prepare(make_cfg(optimizer__lr=1e30, scheduler__warmup_epochs=0, max_epochs=2)))


@pytest.mark.skipif(not dali.is_installed(), reason="NVIDIA DALI is not installed: pip install 'emim-solo[dali]'")
def test_the_same_run_with_dali(make_cfg: MakeCfg, refused: Refused, few_digits: Path, tmp_path: Path) -> None:
    for path in few_digits.rglob("*.png"):  # DALI reads both formats; its own folder is JPEG
        target = (tmp_path / "jpeg" / path.relative_to(few_digits)).with_suffix(".jpg")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).save(target)
    paths = {"data__train_path": str(tmp_path / "jpeg" / "train"), "data__val_path": str(tmp_path / "jpeg" / "val")}
    row = pretrain(prepare(make_cfg(data__format="dali", dali={"device": "cpu"}, max_epochs=2, **paths)))
    assert row["epochs"] == 2
    assert 0 <= row["metrics"]["val_knn_acc1"] <= 100
    with refused("dali.device", "tpu", "cpu, gpu"):
        prepare(make_cfg(data__format="dali", dali={"device": "tpu"}, **paths))


# -- bad input: one clear error each, before any training ------------------------------------------------------------


@pytest.fixture
def refuses(refused: Refused) -> Callable[..., None]:
    """``refuses(cfg, "seed", "oops")``: one line with that key and these names, before any training. No folder of a run is left."""

    def check(cfg: DictConfig, key: str | None, *names: str) -> None:
        with refused(key, *names):
            pretrain(prepare(cfg))
        assert not list(Path(cfg.checkpoint.dir).glob("*/*"))

    return check


def test_unknown_method_lists_those_there_are(make_cfg: MakeCfg, refuses: Refuses) -> None:
    refuses(make_cfg(method="emmi"), "method", "unknown method 'emmi'", "barlow_twins", "emim", "vicreg")


def test_missing_config_keys_are_named(make_cfg: MakeCfg, refuses: Refuses) -> None:
    cfg = make_cfg()
    del cfg.optimizer.lr, cfg.augmentations
    refuses(cfg, "augmentations", "optimizer.lr")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("seed", "oops", "a whole number, at least 0"),
        ("max_epochs", 0, "a whole number, at least 1"),
        ("data.num_workers", "two", "a whole number, at least 0"),
        ("devices", "oops", "a number from 1 on, 'auto' or a list"),
        ("optimizer.batch_size", 2.5, "a whole number, at least 2"),
        ("optimizer.lr", "oops", "a number, at least 0"),
        ("optimizer.classifier_lr", True, "a number, at least 0"),
        ("optimizer.weight_decay", float("inf"), "a number, at least 0"),
        ("scheduler.min_lr", -0.1, "a number, at least 0"),
        ("optimizer.name", "sgdd", "sgd, lars, adam, adamw"),
        ("scheduler.name", "warmup", "warmup_cosine"),
        ("checkpoint.frequency", 0, "a whole number, at least 1"),
        ("precision", 7, "bf16-mixed"),
    ],
)
def test_values_that_are_no_numbers_or_unknown(
    key: str, value: Any, expected: str, make_cfg: MakeCfg, refuses: Refuses
) -> None:
    refuses(make_cfg(**{key.replace(".", "__"): value}), key, str(value), expected)


def test_what_lightning_refuses_is_one_error(make_cfg: MakeCfg, refuses: Refuses) -> None:
    refuses(make_cfg(accelerator="tpu"), "trainer", "torch_xla")


@pytest.mark.parametrize("name", ["optimizer", "scheduler"])
def test_names_that_are_taken_are_built_by_the_suite(name: str, make_cfg: MakeCfg, built_to_step: Any) -> None:
    suite = load_suite()
    for value in getattr(suite, f"{name}s"):
        cfg = make_cfg(**{f"{name}__name": value}, scheduler__lr_decay_steps=[1])
        assert built_to_step(prepare(cfg).config).configure_optimizers()


def test_typo_in_method_kwargs_names_the_nearest(make_cfg: MakeCfg, refuses: Refuses) -> None:
    refuses(make_cfg(method_kwargs__noise_varience=0.1), "method_kwargs.noise_varience", "'noise_variance'")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("noise_variance", 0.0, "a number, above 0"),
        ("weight", -1.0, "a number, at least 0"),
        ("series_order", 1, "a whole number, at least 2 and at most 2"),
        ("marginal", "exakt", "exact"),
        ("proj_output_dim", 0, "a whole number, at least 1"),
        ("proj_hidden_dim", "wide", "a whole number, at least 1"),
        ("weight", "heavy", "a number, at least 0"),
        ("noise_variance", "loud", "a number, above 0"),
    ],
)
def test_bad_values_of_method_kwargs(key: str, value: Any, expected: str, make_cfg: MakeCfg, refuses: Refuses) -> None:
    refuses(make_cfg(**{f"method_kwargs__{key}": value}), f"method_kwargs.{key}", repr(value), expected)


def test_missing_folder(make_cfg: MakeCfg, refuses: Refuses, tmp_path: Path) -> None:
    refuses(make_cfg(data__train_path=str(tmp_path / "nowhere")), "data.train_path", "nowhere")


def test_folder_without_classes(make_cfg: MakeCfg, refuses: Refuses, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refuses(make_cfg(data__train_path=str(tmp_path / "empty")), "data.train_path", "no class folders")


def test_class_without_images(
    make_cfg: MakeCfg, refuses: Refuses, tmp_path: Path, solid_image: Callable[[Path], Path]
) -> None:
    solid_image(tmp_path / "images" / "cat" / "0.png")
    (tmp_path / "images" / "dog").mkdir()
    refuses(make_cfg(data__train_path=str(tmp_path / "images")), "data.train_path", "dog")


def test_corrupt_image_is_named(
    make_cfg: MakeCfg, refuses: Refuses, tmp_path: Path, solid_image: Callable[[Path], Path]
) -> None:
    for number in range(40):
        solid_image(tmp_path / "images" / "cat" / f"{number}.png")
    broken = tmp_path / "images" / "cat" / "7.png"
    broken.write_bytes(broken.read_bytes()[:60])
    refuses(make_cfg(data__train_path=str(tmp_path / "images"), data__val_path=None), "images.unreadable", str(broken))


def test_different_classes_in_train_and_val(
    make_cfg: MakeCfg, refuses: Refuses, tmp_path: Path, solid_image: Callable[[Path], Path]
) -> None:
    solid_image(tmp_path / "val" / "cat" / "0.png")
    refuses(make_cfg(data__val_path=str(tmp_path / "val")), "data.val_path", "different classes", "cat")


def test_fewer_images_than_a_batch(make_cfg: MakeCfg, refuses: Refuses) -> None:
    refuses(make_cfg(optimizer__batch_size=256), "optimizer.batch_size", "160 training images", "256")


def test_a_run_that_is_stopped_before_it_writes_leaves_no_folder(
    make_cfg: MakeCfg, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(pretraining, "check_images", stopped)  # a signal while the images are checked
    cfg = make_cfg()
    with pytest.raises(Stopped):
        pretrain(prepare(cfg))
    assert Path(cfg.checkpoint.dir).is_dir()
    assert not list(Path(cfg.checkpoint.dir).glob("*/*"))


def test_number_of_views_that_a_method_cannot_take(make_cfg: MakeCfg, refuses: Refuses) -> None:
    for method, count in (("emim", 1), ("vicreg", 3)):
        cfg = make_cfg(method=method)
        cfg.augmentations[0].num_crops = count
        refuses(cfg, "augmentations", f"{method} takes 2 large crops", f"give {count}")


@pytest.mark.parametrize("method", ["vicreg", "barlow_twins", "byol", "simclr", "emim"])
def test_small_crops_are_refused_for_methods_whose_loss_leaves_them_out(
    method: str, make_cfg: MakeCfg, refuses: Refuses, built_to_step: Callable[[DictConfig], LightningModule]
) -> None:
    """The suite's own training step is asked: does a small crop change its loss?"""
    suite = load_suite()
    momentum = {"base_tau": 0.9, "final_tau": 1}
    cfg = with_small_crops(make_cfg(method=method, backbone=RESNET, knn_eval__enabled=False, momentum=momentum))
    if method == "byol":
        cfg.method_kwargs.pred_hidden_dim = 8
    if method == "simclr":
        cfg.method_kwargs.temperature = 0.2
    images = RunImages.of(cfg)
    completed = suite.complete(OmegaConf.merge(cfg, {"devices": [0]}), images)
    model = built_to_step(completed)
    indices, views, labels = next(iter(suite.train_loader(completed, images)))
    views = [view.requires_grad_() for view in views]
    try:
        loss = model.training_step([indices, views, labels], 0)
    except ValueError as error:
        if "too many values to unpack" not in str(error):  # what 1.0.2 says of a third crop
            raise
        used = False
    else:
        gradients = torch.autograd.grad(loss, views, allow_unused=True)
        used = all(gradient is not None and bool(gradient.any()) for gradient in gradients[2:])
        assert used or all(gradient is None for gradient in gradients[2:])
    assert used == (method not in ("vicreg", "barlow_twins"))
    if used:
        assert prepare(cfg).config.data.num_small_crops == 2
    else:
        refuses(cfg, "augmentations", f"{method} has no use for small crops", "byol, emim, simclr")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there, asking for one is no error")
def test_gpu_asked_for_and_not_there(make_cfg: MakeCfg, refuses: Refuses) -> None:
    refuses(make_cfg(accelerator="gpu"), "accelerator", "accelerator=gpu", "accelerator=cpu")


def test_truncated_checkpoint(make_cfg: MakeCfg, refuses: Refuses, trained: Path, tmp_path: Path) -> None:
    (path,) = trained.glob("*.ckpt")
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refuses(make_cfg(resume_from_checkpoint=str(cut)), "checkpoint.damaged", "cut.ckpt", "cut short")


def test_checkpoint_of_another_method_or_width(
    make_cfg: MakeCfg, refuses: Refuses, trained: Path, tmp_path: Path
) -> None:
    (path,) = trained.glob("*.ckpt")

    def resumed(**changed: Any) -> DictConfig:
        return make_cfg(max_epochs=2, resume_from_checkpoint=str(path), **changed)

    refuses(resumed(method="vicreg"), "checkpoint.method", "'emim'", "'vicreg'")
    refuses(resumed(method_kwargs__proj_output_dim=32), "checkpoint.weights", "of another model", "projector")
    refuses(resumed(optimizer__name="sgd"), "optimizer.name", "adamw", "sgd")
    with pytest.warns(UserWarning, match=r"goes on with the checkpoint's optimizer.lr="):
        assert pretrain(prepare(resumed(optimizer__lr=0.5)))["epochs"] == 2
