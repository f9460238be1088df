"""The face over both generations: what is found, what is refused, and that a config means the same on both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LARGER, RESNET
from lightning.pytorch import LightningModule
from omegaconf import DictConfig
from PIL import Image
from torch import nn

from emim_solo.checkpoints.opening import open_checkpoint
from emim_solo.emim.objective import emim_loss_func
from emim_solo.suite import as_dict, load_suite
from emim_solo.training.pretraining import prepare, pretrain

MakeCfg = Callable[..., DictConfig]
Refused = Callable[..., AbstractContextManager[Any]]


def test_emim_is_in_the_suites_own_registry() -> None:
    suite = load_suite()
    assert suite.methods()["emim"] is suite.emim_class
    from solo.methods import METHODS

    assert METHODS["emim"] is suite.emim_class
    assert {"barlow_twins", "vicreg", "byol", "simclr"} <= suite.methods().keys()
    assert not {"base", "linear"} & suite.methods().keys()


def test_projector_has_the_shape_of_the_suites_barlow_twins(make_cfg: MakeCfg) -> None:
    suite = load_suite()
    ours, theirs = (suite.build(prepare(make_cfg(method=method)).config) for method in ("emim", "barlow_twins"))
    assert [str(layer) for layer in ours.projector] == [str(layer) for layer in theirs.projector]
    assert [group["name"] for group in ours.learnable_params if "name" in group][-1] == "projector"


def test_training_loss_is_the_loss_of_the_embeddings(
    make_cfg: MakeCfg, built_to_step: Callable[[DictConfig], LightningModule]
) -> None:
    """One real batch: the training step's loss is the objective of the projected views plus the classifier's loss."""
    suite = load_suite()
    run = prepare(make_cfg(knn_eval__enabled=False))
    model = built_to_step(run.config).train()
    indices, views, labels = next(iter(suite.train_loader(run.config, run.images)))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    loss = model.training_step([indices, views, labels], 0)
    model.load_state_dict(state)
    outs = [model(view) for view in views]
    class_loss = sum(nn.functional.cross_entropy(out["logits"], labels) for out in outs) / 2
    expected = emim_loss_func(outs[0]["z"], outs[1]["z"]) + class_loss
    assert torch.allclose(loss, expected, rtol=1e-4)


def test_channels_last_is_the_same_model_in_another_memory_format(make_cfg: MakeCfg) -> None:
    """main's key, by which the demo's CPU steps take less time; 1.0.2 itself has none."""
    suite, image = load_suite(), torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    feats = []
    for disabled in (True, False):
        torch.manual_seed(0)
        model = suite.build(
            prepare(make_cfg(backbone=RESNET, performance__disable_channel_last=disabled)).config
        ).eval()
        weight = suite.backbone(model).layer1[0].conv1.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) is not disabled
        feats.append(model(image)["feats"])
    torch.testing.assert_close(*feats, rtol=1e-4, atol=1e-4)


def test_both_views_come_from_the_configs_augmentation(make_cfg: MakeCfg) -> None:
    """Without any randomness in the augmentation both views are the evaluation image."""
    cfg = make_cfg(data__num_workers=0)
    view = cfg.augmentations[0]
    view.rrc = {"enabled": True, "crop_min_scale": 1.0, "crop_max_scale": 1.0}
    view.color_jitter.prob = 0.0
    run = prepare(cfg)
    suite = load_suite()
    train = suite.train_loader(run.config, run.images)
    index, views, label = train.dataset[3]
    image, plain_label = suite.evaluation_datasets(run.config, run.images)[0][3]
    assert (index, label) == (3, plain_label)
    assert torch.equal(views[0], views[1])
    # the crop of scale 1 may still stretch by up to 4:3; the mean brightness stays
    assert views[0].shape == image.shape == (3, 16, 16)
    assert torch.allclose(views[0].mean(), image.mean(), atol=0.25)


def test_evaluation_loaders_are_whole_and_in_order(make_cfg: MakeCfg) -> None:
    run = prepare(make_cfg())
    train, val = load_suite().evaluation_loaders(run.config, run.images)
    assert sum(len(labels) for _, labels in train) == 160
    labels = torch.cat([labels for _, labels in val])
    assert labels.tolist() == sorted(labels.tolist())
    assert len(labels) == 60


def test_cosine_knn_has_no_use_for_length(suites_knn: Callable[[str], Callable[[int], Any]]) -> None:
    classifier = suites_knn("cosine")
    torch.manual_seed(0)
    features, labels = torch.randn(200, 8), torch.arange(200) % 4
    features[:, 0] += 3 * labels
    scaled = features * (10 * torch.rand(200, 1) + 0.1)
    scores = []
    for each in (features, scaled):
        knn = classifier(5)
        knn(train_features=each[:100], train_targets=labels[:100])
        knn(test_features=each[100:], test_targets=labels[100:])
        scores.append(knn.compute())
    assert scores[0] == pytest.approx(scores[1])


def test_online_knn_of_some_classes(suites_knn: Callable[[str], Callable[[int], Any]]) -> None:
    """The accuracy of all classes is the mean of theirs, by the same number of images."""
    classifier = suites_knn("euclidean")
    torch.manual_seed(0)
    features, labels = torch.randn(200, 8), torch.arange(200) % 4
    features[:, 0] += labels

    def accuracy(judged: torch.Tensor) -> float:
        knn = classifier(5)
        knn(train_features=features[:100], train_targets=labels[:100])
        knn(test_features=features[100:][judged], test_targets=labels[100:][judged])
        top1, top5 = knn.compute()
        assert top1 < top5 == 100, "of four classes"
        return top1

    of_each = [accuracy(labels[100:] == label) for label in range(4)]
    assert sum(of_each) / 4 == pytest.approx(accuracy(labels[100:] >= 0))


def test_linear_model_of_three_classes() -> None:
    """The suite hard-wires top-5 accuracy."""
    suite = load_suite()
    from torchvision.models import resnet18

    backbone = resnet18()
    backbone.fc = nn.Identity()
    cfg = DictConfig(
        {
            "name": "three",
            "method": "linear",
            "backbone": {"name": "resnet18"},
            "pretrained_feature_extractor": "none.ckpt",
            "data": {"dataset": "custom", "train_path": ".", "val_path": ".", "num_workers": 0},
            "optimizer": {"name": "sgd", "batch_size": 8, "lr": 0.1, "weight_decay": 0.0},
            "scheduler": {"name": "none"},
            "max_epochs": 1,
            "devices": [0],
        }
    )
    cfg = suite.complete_linear(cfg)
    cfg.data.num_classes = 3
    model = suite.linear_model(backbone, cfg)
    out = model.shared_step((torch.randn(8, 3, 32, 32), torch.arange(8) % 3), 0)
    values = out.values() if isinstance(out, dict) else out
    assert all(torch.isfinite(torch.as_tensor(value)).all() for value in values)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("augmentations", "rrc"),
        ("augmentations", "equalization"),
        ("data.fraction", 0.5),
        ("backbone.name", "wide_resnet28w2"),
    ],
)
def test_what_only_main_has_is_refused_by_name_on_1_0_2(
    key: str, value: object, make_cfg: MakeCfg, refused: Refused
) -> None:
    if load_suite().generation == "main":
        pytest.skip("solo-learn main has all of it")
    cfg = make_cfg()
    if value == "rrc":
        cfg.augmentations[0].rrc.enabled = False
    elif value == "equalization":
        cfg.augmentations[0].equalization.prob = 0.1
    else:
        cfg = make_cfg(**{key.replace(".", "__"): value})
    with refused(key, "main"):
        prepare(cfg)


# -- which solo-learn there is, asked in a fresh process ---------------------------------------------------------------


def load_in_fresh_process(before: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    program = (
        f"import sys; {before}\n"
        "from emim_solo.ground.errors import UsageError\n"
        "from emim_solo.suite import load_suite\n"
        "try: load_suite()\n"
        "except UsageError as error: print(error); sys.exit(2)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


def test_no_solo_learn() -> None:
    done = load_in_fresh_process("sys.modules['solo'] = None")  # Python's own mark of a package that is not there
    assert done.returncode == 2, done.stderr
    assert "no solo-learn found" in done.stdout
    assert "pip install --no-deps solo-learn==1.0.2" in done.stdout


def test_unsupported_version(tmp_path: Path) -> None:
    methods = tmp_path / "solo" / "methods"
    methods.mkdir(parents=True)
    (tmp_path / "solo" / "__init__.py").touch()
    (methods / "base.py").touch()
    (tmp_path / "setup.py").write_text('setup(name="solo-learn", version="1.0.4")')
    done = load_in_fresh_process(PYTHONPATH=str(tmp_path))
    assert done.returncode == 2, done.stderr
    assert "solo-learn 1.0.4" in done.stdout
    assert "expected main (1.0.6) or 1.0.2" in done.stdout


def test_loading_imports_no_umap_and_leaves_garbage_collection_on() -> None:
    if load_suite().generation == "main":
        pytest.skip("solo-learn main imports umap itself, to complete a config")
    program = (
        "import gc, sys\n"
        "from emim_solo.suite import load_suite\n"
        "load_suite()\n"
        "assert not {'umap', 'seaborn', 'nvidia.dali'} & sys.modules.keys()\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 100_000\n"
        "from solo.utils.auto_umap import AutoUMAP\n"
        "assert 'umap' in sys.modules and AutoUMAP.__name__ == 'AutoUMAP'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("backbone", "kwargs"),
    [("resnet18", {}), ("vit_tiny", {"img_size": 32, "patch_size": 8}), ("convnext_tiny", {})],
)
def test_emim_trains_on_backbones_of_timm(backbone: str, kwargs: dict[str, int], make_cfg: MakeCfg) -> None:
    if backbone == "convnext_tiny" and load_suite().generation != "main":
        pytest.skip("solo-learn 1.0.2 has no ConvNeXt")
    cfg = make_cfg(backbone={"name": backbone, "kwargs": kwargs}, optimizer__batch_size=80, augmentations=[LARGER])
    row = pretrain(prepare(cfg))
    assert row["metrics"]["train_emim_loss_epoch"] > -5
    assert torch.isfinite(torch.tensor(list(row["metrics"].values()))).all()


def test_a_network_of_one_size_takes_the_validation_images(make_cfg: MakeCfg, refused: Refused) -> None:
    """A ViT takes one size. solo-learn shows CIFAR's validation images in 32 pixels, whatever the crops are."""
    names = {"data__dataset": "cifar10", "data__train_path": "datasets", "data__val_path": "datasets"}
    run = prepare(make_cfg(**names))
    with refused("backbone.kwargs", "vit_tiny", "32 pixels"):
        load_suite().build(run.config)
    load_suite().build(prepare(make_cfg(**{**names, "data__val_path": None})).config)


def test_a_vit_of_cifar_opens_with_other_settings_of_its_images(make_cfg: MakeCfg, tmp_path: Path) -> None:
    """CIFAR's validation images are not resized, so the image that is tried has to have their size."""
    names = {"data__dataset": "cifar10", "data__train_path": "datasets", "data__val_path": "datasets"}
    cfg = prepare(make_cfg(**names, augmentations=[LARGER])).config
    (tmp_path / "args.json").write_text(json.dumps(as_dict(cfg)))
    torch.save({"state_dict": load_suite().build(cfg).state_dict(), "epoch": 0}, tmp_path / "x-ep=0.ckpt")
    assert open_checkpoint(tmp_path, ["data.num_workers=1"]).model()(torch.zeros(1, 3, 32, 32))["feats"].ndim == 2


def test_weights_of_a_library_are_shown_any_dataset_as_that_library_does(few_digits: Path, tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"")
    images = ["data.dataset=imagenet", *(f"data.{split}_path={few_digits / split}" for split in ("train", "val"))]
    place = f"timm:vit_tiny_patch16_224@{tmp_path / 'weights.pth'}"
    (*_, normalize) = load_suite().evaluation_transform(open_checkpoint(place, images).cfg).transforms
    assert list(normalize.mean) == [0.5, 0.5, 0.5], "not ImageNet's"
    shown = load_suite().evaluation_transform(open_checkpoint(place, [*images, "augmentations.0.crop_size=96"]).cfg)
    assert shown(Image.new("RGB", (50, 40))).shape == (3, 96, 96)
