"""Evaluation of a real checkpoint, held against the suite's own parts and against NumPy and scikit-learn."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from sklearn import datasets
from torch.utils.data import DataLoader, TensorDataset
from torchvision import models

from emim_solo.benchmark.plan import make_plan
from emim_solo.checkpoints.opening import Checkpoint, open_checkpoint
from emim_solo.evaluation import commands
from emim_solo.evaluation import features as stored
from emim_solo.evaluation.features import Features, Split, extract_features, pieces
from emim_solo.evaluation.knn import knn, knn_accuracies
from emim_solo.evaluation.linear import _batches, _Known, _linear_config, _moments, complete_settings, linear, logistic
from emim_solo.ground.errors import UsageError
from emim_solo.results import rows
from emim_solo.suite import load_suite
from emim_solo.training.pretraining import pretrain


@pytest.fixture(scope="module")
def checkpoint(few_digits, tmp_path_factory) -> Checkpoint:
    """One epoch of EMIM on a few digits."""
    folder = tmp_path_factory.mktemp("trained")
    settings = {
        "dir": str(folder),
        "pretrain": "pretrain/digits",
        "only": "emim",
        "max_epochs": 1,
        "run": {
            "data": {"train_path": str(few_digits / "train"), "val_path": str(few_digits / "val"), "num_workers": 0},
            "optimizer": {"batch_size": 32},
            "enable_progress_bar": False,
            "accelerator": "cpu",
        },
    }
    (run,) = make_plan(OmegaConf.create(settings)).runs
    return open_checkpoint(pretrain(run.run, version="0")["checkpoint"])


@pytest.fixture(scope="module")
def features(checkpoint) -> Features:
    return extract_features(checkpoint)


@pytest.fixture(scope="module")
def pixels() -> Features:
    """scikit-learn's digits as they are: 64 features that a linear classifier does well on."""
    data = datasets.load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)
    train, val = Split(images[:1437], None, labels[:1437]), Split(images[1437:], None, labels[1437:])
    return Features(train, val, [str(digit) for digit in range(10)])


# -- features ----------------------------------------------------------------------------------------------------


def test_features_are_the_frozen_models_in_the_order_of_the_images(checkpoint, features):
    assert features.train.backbone.shape == (160, 512)
    assert features.val.projector.shape == (60, 128)
    assert features.classes == [str(digit) for digit in range(10)]
    model = checkpoint.model()
    dataset = load_suite().evaluation_datasets(checkpoint.cfg, checkpoint.images)[1]
    image, label = dataset[17]
    with torch.no_grad():
        out = model(image[None])
    torch.testing.assert_close(features.val.backbone[17], out["feats"][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.val.projector[17], out["z"][0], rtol=1e-4, atol=1e-5)
    assert features.val.labels[17] == label


def test_extraction_changes_nothing(checkpoint, features):
    again = extract_features(checkpoint)
    torch.testing.assert_close(again.train.backbone, features.train.backbone, rtol=0, atol=0)


def test_features_come_back_from_disk(features, tmp_path):
    features.save(tmp_path / "features" / "run.pt")
    found = Features.load(tmp_path / "features" / "run.pt")
    assert torch.equal(found.val.projector, features.val.projector)
    assert found.classes == features.classes
    assert [path.name for path in (tmp_path / "features").iterdir()] == ["run.pt"]


def test_features_of_views_are_the_mean_over_views_of_each_image(checkpoint, monkeypatch):
    cfg, suite, model = checkpoint.cfg, load_suite(), checkpoint.model()
    show = suite.view_transform(cfg, cfg.augmentations[0])
    files, found = sorted(Path(cfg.data.val_path).rglob("*.png")), extract_features(checkpoint, views=3)
    with torch.no_grad():
        for number in (0, 17, 59):
            seed = int(np.random.SeedSequence([cfg.seed, number]).generate_state(1)[0])
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            views = torch.stack([show(Image.open(files[number]).convert("RGB")) for _ in range(3)])
            assert not torch.equal(views[0], views[1])
            out = model(views)
            torch.testing.assert_close(found.val.backbone[number], out["feats"].mean(dim=0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.val.projector[number], out["z"].mean(dim=0), rtol=1e-4, atol=1e-5)
    assert (found.train.backbone.shape, found.classes) == ((160, 512), [str(digit) for digit in range(10)])
    assert torch.equal(found.val.labels, torch.arange(10).repeat_interleave(6))
    monkeypatch.setitem(cfg.data, "num_workers", 2)
    monkeypatch.setitem(cfg.optimizer, "batch_size", 7)
    torch.testing.assert_close(extract_features(checkpoint, views=3).val.backbone, found.val.backbone)


# -- k-NN --------------------------------------------------------------------------------------------------------


def brute_force(train, train_labels, val, val_labels, k, distance, temperature=0.07):
    """Weighted k-NN in NumPy, by its definition."""
    correct = 0
    for image, label in zip(val, val_labels, strict=True):
        if distance == "cosine":
            similarity = train @ image / np.linalg.norm(train, axis=1) / np.linalg.norm(image)
            weight = np.exp(similarity / temperature)
        else:
            weight = similarity = 1 / (np.linalg.norm(train - image, axis=1) + 1e-5)
        nearest = np.argsort(-similarity)[:k]
        votes = np.bincount(train_labels[nearest], weights=weight[nearest], minlength=10)
        correct += votes.argmax() == label
    return 100 * correct / len(val)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("k", [1, 5, 20, 200])
def test_knn_equals_brute_force(pixels, k, distance):
    train, val = pixels.train, pixels.val
    (found,) = knn_accuracies(
        train.backbone, train.labels, val.backbone, val.labels, ks=[k], distance=distance
    ).values()
    arrays = (part.double().numpy() for part in (train.backbone, val.backbone))
    one, other = arrays
    expected = brute_force(one, train.labels.numpy(), other, val.labels.numpy(), k, distance)
    assert found == pytest.approx(expected, abs=0.3), "ties aside"


@pytest.fixture(scope="module")
def collapsed(features) -> Features:
    """Three distinct rows: similarities are full of ties, of which the order of k-NN is all that is left."""
    train = torch.randn(3, 512, generator=torch.Generator().manual_seed(0))[torch.arange(160) % 3]
    return replace(features, train=replace(features.train, backbone=train))


@pytest.mark.parametrize("case", ["features", "collapsed", "pixels"])
@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_knn_equals_the_suites_classifier(case, distance, request, suites_knn):
    features = request.getfixturevalue(case)
    train, val, ks = features.train, features.val, [1, 5, 20, 200]
    found, suites = knn(features, ks=ks, distances=[distance]), suites_knn(distance)
    for k in ks:
        classifier = suites(k)
        classifier.update(train_features=train.backbone, train_targets=train.labels)
        classifier.update(test_features=val.backbone, test_targets=val.labels)
        assert found[f"backbone_{distance}_k{k}"] == classifier.compute()[0]


def test_cosine_ignores_the_length_of_features(pixels):
    train, val = pixels.train, pixels.val
    longer = train.backbone * torch.linspace(0.1, 10, len(train.backbone))[:, None]
    plain, scaled = (
        knn_accuracies(matrix, train.labels, val.backbone, val.labels, ks=[20])[20]
        for matrix in (train.backbone, longer)
    )
    assert scaled == pytest.approx(plain, abs=0.3)


def test_more_neighbours_than_training_images_lets_all_vote(features):
    metrics = knn(features, ks=[160, 5000])
    assert metrics["backbone_cosine_k5000"] == metrics["backbone_cosine_k160"]


def test_a_number_of_neighbours_named_twice_is_computed_once(pixels, monkeypatch):
    once = knn(pixels, ks=[5])
    monkeypatch.setattr(
        "emim_solo.evaluation.knn._SIMILARITIES", 100 * len(pixels.train.labels)
    )  # 360 images, four pieces
    assert knn(pixels, ks=[5, 5]) == once


def test_at_the_lowest_temperature_the_nearest_image_decides(pixels):
    """Without an overflow: the image itself is among the neighbours, with the highest similarity."""
    images, labels = pixels.val.backbone, pixels.val.labels
    found = knn_accuracies(images, labels, images, labels, ks=[200], temperature=0.012)
    nearest = knn_accuracies(images, labels, images, labels, ks=[1], temperature=0.012)
    assert nearest[1] == 100 and found[200] > 95


def test_knn_of_nan_features_is_nan(features):
    broken = replace(features, train=replace(features.train, backbone=torch.full((160, 512), math.nan)))
    metrics = knn(broken, ks=[1])
    assert math.isnan(metrics["backbone_cosine_k1"])
    assert math.isfinite(metrics["projector_cosine_k1"])
    assert metrics["fewest_val_images"] == 6


def test_knn_refuses_what_it_cannot_do(pixels):
    train, val = pixels.train, pixels.val
    few = val.labels < 7
    with pytest.raises(UsageError, match="validation images of every class"):
        knn_accuracies(train.backbone, train.labels, val.backbone[few], val.labels[few], ks=[1])
    with pytest.raises(UsageError, match=r"ks\.1=0"):
        knn_accuracies(train.backbone, train.labels, val.backbone, val.labels, ks=[5, 0])


# -- linear ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quiet(checkpoint):
    cfg = checkpoint.cfg.copy()
    cfg.enable_progress_bar = False
    return cfg


def test_logistic_regression_agrees_with_the_suites_linear_evaluation(pixels, quiet):
    trained, regression = linear(pixels, quiet, seed=0), logistic(pixels)
    assert trained["acc1"] == pytest.approx(regression["backbone_acc1"], abs=1)
    assert trained["acc1"] > 88
    assert trained["acc5"] > trained["acc1"]


def test_linear_evaluation_is_seeded(features, quiet):
    settings = {"max_epochs": 3}
    first, again = (linear(features, quiet, settings, seed=1) for _ in range(2))
    assert first == again


def test_linear_evaluation_leaves_no_bars_in_a_log_file(features, quiet, capsys):
    loud = OmegaConf.merge(quiet, {"enable_progress_bar": True})
    linear(features, loud, {"max_epochs": 2})
    assert "Epoch" not in "".join(capsys.readouterr())


def test_linear_evaluation_takes_the_suites_schedules(features, quiet):
    settings = {
        "standardise": False,
        "max_epochs": 2,
        "optimizer": {"name": "adam", "lr": 0.01},
        "scheduler": {"name": "warmup_cosine", "warmup_epochs": 1},
    }
    assert math.isfinite(linear(features, quiet, settings)["acc1"])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"warmup_epochs": 2}, [0.0, 0.4, 0.4, 0.2]),  # two epochs up, half a cosine over the other two
        ({"warmup_epochs": 0, "min_lr": 0.2}, [0.4, 0.3 + 0.1 * math.sqrt(0.5), 0.3, 0.3 - 0.1 * math.sqrt(0.5)]),
    ],
)
def test_the_linear_evaluations_rates_are_those_asked_for(features, quiet, schedule, expected):
    settings = {
        "max_epochs": 4,
        "optimizer": {"lr": 0.4, "batch_size": 256},
        "scheduler": {"name": "warmup_cosine", "warmup_start_lr": 0.0, "interval": "epoch"} | schedule,
    }
    complete = load_suite().complete_linear(_linear_config(quiet, complete_settings(settings)))
    model = load_suite().linear_model(_Known(features.train.backbone, standardise=True), complete)
    (optimizer,), (schedule,) = model.configure_optimizers()
    schedule = schedule["scheduler"] if isinstance(schedule, dict) else schedule
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(expected)


def test_three_classes(features, quiet):
    def first(split: Split) -> Split:
        kept = split.labels < 3
        return Split(split.backbone[kept], None, split.labels[kept])

    three = Features(first(features.train), first(features.val), ["0", "1", "2"])
    metrics = linear(three, OmegaConf.merge(quiet, {"data": {"num_classes": 3}}), {"max_epochs": 2})
    assert metrics["acc5"] == 100  # whatever it has learned: solo-learn's own top 5 of 3 classes is an error
    assert 0 <= knn(three, ks=[5])["backbone_cosine_k5"] <= 100


def test_nan_features_give_nan(features, quiet):
    broken = replace(features, val=replace(features.val, backbone=torch.full((60, 512), math.inf)))
    assert math.isnan(linear(broken, quiet)["acc1"])
    assert math.isnan(logistic(broken)["backbone_acc1"])


# -- more than fits in memory ------------------------------------------------------------------------------------


@pytest.fixture
def large(monkeypatch):
    """From now on everything is large: on disk, in pieces of 100 rows of 512 numbers."""
    monkeypatch.setattr(stored, "IN_MEMORY", 2**17)
    monkeypatch.setattr(stored, "_PIECE", 100 * 512 * 4)


def test_large_features_lie_on_disk_in_half_precision(checkpoint, features, large):
    found = extract_features(checkpoint)
    assert found.train.backbone.dtype == torch.float16
    assert found.train.projector.dtype == torch.float32, "small enough to stay as they are"
    torch.testing.assert_close(found.train.backbone.float(), features.train.backbone, rtol=1e-3, atol=1e-4)
    assert [len(piece) for piece in pieces(found.train.backbone)] == [100, 60]
    assert {path.suffix for path in checkpoint.folder.iterdir()} == {".ckpt", ".json", ".csv"}, "nothing is left behind"


def test_large_features_of_foreign_weights_lie_on_the_disk_of_their_file(few_digits, large, tmp_path):
    torch.save(models.resnet18().state_dict(), tmp_path / "w.pth")
    images = [f"data.{split}_path={few_digits / split}" for split in ("train", "val")]
    changes = [*images, "augmentations.0.crop_size=32", "data.num_workers=0"]
    found = extract_features(open_checkpoint(f"torchvision:resnet18@{tmp_path / 'w.pth'}", changes))
    assert found.train.backbone.shape == (160, 512) and found.val.backbone.shape == (60, 512)
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]


def test_large_features_come_back_from_disk(checkpoint, features, large, tmp_path):
    made = extract_features(checkpoint)
    made.save(tmp_path / "run.pt")
    assert (tmp_path / "run.pt").stat().st_size < 0.75 * 4 * 220 * (512 + 128)
    found = Features.load(tmp_path / "run.pt")
    assert torch.equal(found.train.backbone, made.train.backbone)


@pytest.mark.parametrize("factor", [1e7, 1e-8, None])
def test_features_that_half_precision_would_change_stay_in_single(factor, tmp_path, large):
    rows = torch.randn(400, 512)
    rows = rows * factor if factor else rows + 5000
    store = stored._Rows(tmp_path)
    for batch in rows.split(64):
        store.append(batch)
    assert torch.equal(store.matrix(), rows)


@pytest.mark.parametrize("later", [70_000.0, 1e-9])
def test_a_later_class_that_half_precision_would_change_takes_all_to_single(later, tmp_path, large):
    """The first images are well inside float16, as one class of a folder is before another."""
    rows = torch.randn(800, 512)
    rows[:, 0] = 0
    rows[500:, 0] = later * torch.linspace(1, 1.0001, 300)
    store = stored._Rows(tmp_path)
    for batch in rows.split(64):
        store.append(batch)
        assert store.dtype == (torch.float16 if store.written <= 448 else torch.float32)
    torch.testing.assert_close(store.matrix()[:448], rows[:448], rtol=1e-3, atol=1e-4)
    assert torch.equal(store.matrix()[448:], rows[448:])


@pytest.mark.parametrize("case", ["pixels", "features", "collapsed"])
def test_neighbours_found_in_pieces_are_the_same(case, request, monkeypatch):
    features = request.getfixturevalue(case)
    whole = knn(features)
    monkeypatch.setattr(stored, "IN_MEMORY", 0)
    monkeypatch.setattr(stored, "_PIECE", 33 * 4 * features.train.backbone.shape[1])
    in_pieces = knn(features)
    assert in_pieces.keys() == whole.keys()
    for name, accuracy in whole.items():
        if case != "collapsed" or "projector" in name:  # else ties alone decide
            assert in_pieces[name] == pytest.approx(accuracy, abs=0.3), name


def test_linear_classifiers_in_pieces_are_the_same(pixels, quiet, monkeypatch):
    whole = linear(pixels, quiet, {"max_epochs": 5}) | logistic(pixels)
    monkeypatch.setattr(stored, "IN_MEMORY", 0)
    monkeypatch.setattr(stored, "_PIECE", 100 * 4 * 64)
    mean, scale = _moments(pixels.train.backbone)
    torch.testing.assert_close(mean, pixels.train.backbone.mean(dim=0))
    torch.testing.assert_close(scale, pixels.train.backbone.std(dim=0, correction=0))
    in_pieces = linear(pixels, quiet, {"max_epochs": 5}) | logistic(pixels)
    for name, accuracy in whole.items():
        assert in_pieces[name] == pytest.approx(accuracy, abs=0.3), name


def test_batches_are_the_loaders_own(pixels):
    """The order of the images, and so every result, is that of a DataLoader that shuffles single images."""
    dataset = TensorDataset(pixels.train.backbone, pixels.train.labels)
    plain = DataLoader(dataset, batch_size=256, shuffle=True, generator=torch.Generator().manual_seed(3))
    ours = _batches(pixels.train, 256, torch.Generator().manual_seed(3))
    for _ in range(2):
        for (images, labels), (expected, targets) in zip(ours, plain, strict=True):
            assert torch.equal(images, expected) and torch.equal(labels, targets)


# -- checkpoints and commands ------------------------------------------------------------------------------------


def test_folders_that_hold_no_run(checkpoint, tmp_path, refused):
    with refused("checkpoint.folder", "no args.json"):
        open_checkpoint(tmp_path)
    arguments = json.loads((checkpoint.folder / "args.json").read_text())
    (tmp_path / "args.json").write_text(json.dumps(arguments))
    with refused("checkpoint.missing", "no checkpoint"):
        open_checkpoint(tmp_path)
    (tmp_path / "x-ep=0.ckpt").write_bytes(checkpoint.path.read_bytes()[:5000])
    with refused("checkpoint.damaged", "x-ep=0.ckpt"):
        open_checkpoint(tmp_path).model()
    (tmp_path / "args.json").write_text(json.dumps(arguments | {"method": "unheard_of"}))
    with refused("checkpoint.method", "unheard_of"):
        open_checkpoint(tmp_path)


def test_knn_command_appends_a_row_beside_the_pretrainings(checkpoint, capsys):
    commands.knn_main([str(checkpoint.folder), "-k", "1", "7", "--distance", "cosine"])
    row = rows.read(checkpoint.folder.parent.parent / "rows.jsonl")[-1]
    assert row["stage"] == "knn"
    assert {"backbone_cosine_k1", "projector_cosine_k7"} <= row["metrics"].keys()
    assert row["settings"]["ks"] == [1, 7]
    said = capsys.readouterr().out
    assert "backbone_cosine_k7" in said
    assert f"the smallest class has {row['metrics']['fewest_val_images']:.0f} validation images" in said, "no accuracy"


def test_views_are_in_the_row_and_change_what_it_says(checkpoint, tmp_path, refused, capsys):
    place = tmp_path / "rows.jsonl"
    for more in ([], ["views=4"]):
        commands.knn_main([str(checkpoint.folder), "-k", "5", "--rows", str(place), *more])
        commands.linear_main([str(checkpoint.folder), "max_epochs=2", "--rows", str(place), *more])
    assert capsys.readouterr().out.count("averaged over 4 views") == 2
    for plain, of_views in zip(rows.read(place)[:2], rows.read(place)[2:], strict=True):
        assert of_views["settings"] == plain["settings"] | {"views": 4}
        assert of_views["metrics"] != plain["metrics"]
    for wrong in ("views=1", "views=0", "views=x", "views=2.5"):
        with refused("views", wrong.partition("=")[2]):
            commands.knn_main([str(checkpoint.folder), wrong])


@pytest.mark.parametrize(
    "setting",
    [
        *("optimizer.lr=oops", "optimizer.lr=null", "optimizer.lr=-1", "optimizer.lr=.inf", "optimizer.lr=???"),
        *("optimizer.batch_size=0", "optimizer.batch_size=1.5", "optimizer.batch_size=99999999999999999999"),
        *(
            "max_epochs=True",
            "max_epochs=null",
            "standardise=1",
            "optimizer.name=null",
            "optimizer=[1]",
            "scheduler=text",
        ),
        *(
            "scheduler.interval=never",
            "scheduler.lr_decay_steps.0=0",
            "scheduler.step=3",
            "epochs=3",
            "optimizer.lr=${x}",
        ),
    ],
)
def test_linear_command_refuses_bad_values_before_features_are_computed(setting, checkpoint, refused, monkeypatch):
    monkeypatch.setattr(commands, "extract_features", lambda *_: pytest.fail("features were computed"))
    key = setting.partition("=")[0]
    if key.endswith(".0"):
        setting = "scheduler.lr_decay_steps=[0]"
    with refused(key, key):
        commands.linear_main([str(checkpoint.folder), setting])


def test_names_that_the_suite_does_not_have_are_refused_before_features_are_computed():
    for setting in (
        {"optimizer": {"name": "text"}},
        {"scheduler": {"name": "slow"}},
        {"scheduler": {"lr_decay_steps": None}},
    ):
        with pytest.raises(UsageError, match="expected"):
            complete_settings(setting)


@pytest.mark.parametrize("seed", ["-1", "99999999999999999999", "4294967296"])
def test_seeds_that_some_library_does_not_take_are_refused(seed, checkpoint, refused):
    for command in (commands.linear_main, commands.umap_main):
        with refused("--seed", seed, "expected", "at most"):
            command([str(checkpoint.folder), "--seed", seed])


def test_neighbours_and_temperatures_that_are_none_are_refused(checkpoint, refused):
    for arguments, key in (
        (["-k", "0"], "ks.0"),
        (["--temperature", "nan"], "temperature"),
        (["--temperature", "0.01"], "temperature"),
    ):
        with refused(key, arguments[0], "expected"):
            commands.knn_main([str(checkpoint.folder), *arguments])


def test_linear_command_takes_the_suites_keys(checkpoint):
    commands.linear_main([str(checkpoint.folder), "max_epochs=2", "optimizer.lr=0.1"])
    row = rows.read(checkpoint.folder.parent.parent / "rows.jsonl")[-1]
    assert row["stage"] == "linear"
    assert row["settings"]["max_epochs"] == 2
    assert {"acc1", "logistic_acc1"} <= row["metrics"].keys()


def test_umap_command_leaves_pictures_of_one_run_and_of_many(checkpoint, tmp_path):
    commands.umap_main([str(checkpoint.folder), "--output", str(tmp_path), "--limit", "30"])
    made = {path.name for path in tmp_path.iterdir()}
    assert {"val.png", "val.pdf", "val.csv", "train.png", "train.pdf"} <= made
    with pytest.raises(UsageError, match="named twice"):
        commands.umap_main([str(checkpoint.folder)] * 2)
    with pytest.raises(UsageError, match="named twice"):
        commands.umap_main([str(checkpoint.path)] * 2)
    with pytest.raises(UsageError, match="at most 250000"):
        commands.umap_main([str(checkpoint.folder), "--limit", "1000000"])


def test_images_of_a_dataset_of_the_suite_have_its_classes_and_its_size(checkpoint, few_digits, tmp_path, refused):
    """solo-learn's transform of ImageNet shows 224 pixels, whatever the run was trained at, and it has 1,000 classes."""
    images = [f"data.{split}_path={few_digits / split}" for split in ("train", "val")]
    commands.linear_main(
        [str(checkpoint.folder), "data.dataset=imagenet", *images, "max_epochs=1", "--rows", str(tmp_path)]
    )
    (row,) = rows.read(tmp_path / "rows.jsonl")
    assert row["dataset"] == "imagenet" and 0 <= row["metrics"]["acc1"] <= 100
    shown = open_checkpoint(checkpoint.folder, ["data.dataset=imagenet", *images])
    assert shown.cfg.data.num_classes == 1000
    assert load_suite().evaluation_transform(shown.cfg)(Image.new("RGB", (32, 32))).shape == (3, 224, 224)
    for key in ("crop_size=64", "mean=[0.5,0.5,0.5]"):
        with refused(f"augmentations.0.{key.partition('=')[0]}", "data.dataset=imagenet", "data.dataset=custom"):
            open_checkpoint(checkpoint.folder, ["data.dataset=imagenet", f"augmentations.0.{key}", *images])


def test_commands_check_every_folder_before_they_begin(checkpoint, tmp_path):
    before = len(rows.read(checkpoint.folder.parent.parent / "rows.jsonl"))
    with pytest.raises(UsageError, match=r"no args\.json"):
        commands.knn_main([str(checkpoint.folder), str(tmp_path)])
    assert len(rows.read(Path(checkpoint.folder.parent.parent) / "rows.jsonl")) == before
