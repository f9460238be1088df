"""The score while training, with the real suite, trainer and images."""

from __future__ import annotations

import csv
import math
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RESNET
from lightning.pytorch import LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf

from emim_solo.checkpoints.opening import by_epoch, last_checkpoint, load, open_checkpoint
from emim_solo.emim.measures import NAMES
from emim_solo.evaluation.score import Protocol, ScoredViews, score_checkpoint, score_main
from emim_solo.images.folders import HeldOut, find_images
from emim_solo.results import rows
from emim_solo.suite import load_suite
from emim_solo.training import pretraining
from emim_solo.training.live_score import BEST, KeepBest, is_last_epoch
from emim_solo.training.pretraining import prepare, pretrain

MakeCfg = Callable[..., DictConfig]
Refused = Callable[..., AbstractContextManager[Any]]
BYOL = {"proj_hidden_dim": 16, "proj_output_dim": 8, "pred_hidden_dim": 16}


@pytest.fixture(scope="module")
def protocol(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file: three views of 30 images."""
    path = tmp_path_factory.mktemp("protocol") / "quick.yaml"
    OmegaConf.save(OmegaConf.create(asdict(Protocol.read("digits", ["images=30", "views=3", "splits=2"]))), path)
    return str(path)


@pytest.fixture
def scored(make_cfg: MakeCfg, protocol: str) -> MakeCfg:
    """``scored(score__patience=2, method="byol")``: the smallest backbone of both generations, scored each epoch."""

    def make(**overrides: Any) -> DictConfig:
        settings = {"enable_model_summary": False, "checkpoint__keep_prev": True}
        score = {"score__enabled": True, "score__protocol": protocol, "score__every_n_epochs": 1}
        if overrides.get("method") == "byol":
            settings["method_kwargs"] = BYOL
        return make_cfg(**settings | score | overrides)

    return make


@pytest.fixture
def unlabelled(scored: MakeCfg, _made: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The row of three epochs of BYOL on images without labels or validation images; trained once."""
    if not _made:
        cfg = scored(
            method="byol",
            max_epochs=3,
            data__val_path=None,
            data__no_labels=True,
            score__keep_best=True,
            checkpoint__dir=str(tmp_path_factory.mktemp("unlabelled")),
        )
        _made.update(pretrain(prepare(cfg)))
    return _made


@pytest.fixture(scope="module")
def _made() -> dict[str, Any]:
    return {}


def curve(folder: Path, name: str = "score_view_information") -> dict[int, float]:
    """Value by epoch, as far as there are any."""
    with open(folder / "metrics.csv") as file:
        return {int(line["epoch"]): float(line[name]) for line in csv.DictReader(file) if line.get(name)}


# -- what is logged ----------------------------------------------------------------------------------------------


def test_what_is_logged_is_what_the_command_says_of_that_epochs_checkpoint(
    unlabelled: dict[str, Any], protocol: str
) -> None:
    folder = Path(unlabelled["checkpoint"])
    run = open_checkpoint(folder)
    found = by_epoch(folder)
    assert [epoch for epoch, _ in found] == [0, 1, 2]
    for epoch, path in found:
        row = score_checkpoint(replace(run, path=path), Protocol.read(protocol))
        assert (row["of"], row["images"]) == ("held-out", 16)
        for name in NAMES:
            assert curve(folder, f"score_{name}")[epoch] == pytest.approx(row["metrics"][name], rel=1e-6)
    assert len(set(curve(folder).values())) == 3
    last = {name: unlabelled["metrics"][f"score_{name}"] for name in NAMES}
    assert last == pytest.approx({name: row["metrics"][name] for name in NAMES}, rel=1e-5, abs=1e-5)
    assert {key: unlabelled["score"][key] for key in ("of", "images", "every_n_epochs", "scorings")} == {
        "of": "held-out",
        "images": 16,
        "every_n_epochs": 1,
        "scorings": 3,
    }


def test_held_out_images_are_not_trained_on(unlabelled: dict[str, Any], protocol: str) -> None:
    opened = open_checkpoint(unlabelled["checkpoint"])
    cfg, images = opened.cfg, opened.images
    trained = {path for path, _ in load_suite().train_loader(cfg, images).dataset.samples}  # type: ignore[attr-defined]

    def scored(protocol: Protocol) -> set[str]:
        assert images.listed is not None
        return {images.listed.paths[place] for place in ScoredViews(cfg, protocol, images).chosen}

    scored_on = scored(Protocol.read(protocol))
    assert (len(trained), len(scored_on)) == (144, 16)
    assert not trained & scored_on
    assert trained | scored_on == set(find_images(cfg.data.train_path, labelled=False).paths)
    # Of another protocol, of more images and another seed, they are the same.
    assert scored(Protocol.read("digits", ["seed=3"])) == scored_on


def test_best_checkpoint_is_opened_like_a_run_and_not_taken_for_the_last(unlabelled: dict[str, Any]) -> None:
    folder = Path(unlabelled["checkpoint"])
    values = curve(folder)
    best = open_checkpoint(folder / "best")
    assert best.epochs - 1 == max(values, key=values.__getitem__)
    assert [path.name for path in (folder / "best").glob("*.ckpt")] == [best.path.name]
    weights = load(dict(by_epoch(folder))[best.epochs - 1])["state_dict"]
    assert all(torch.equal(value, weights[name]) for name, value in best.model().state_dict().items())
    last = last_checkpoint(folder)
    assert last is not None and last.parent == folder and "ep=2" in last.name
    score_main([str(folder / "best"), "--no-knn"])
    row = rows.read(folder.parent.parent / "rows.jsonl")[-1]
    assert (row["stage"], row["of"], row["epochs"]) == ("score", "held-out", best.epochs)


@pytest.mark.parametrize("method", ["byol", "mae"])
def test_every_n_epochs_is_the_smallest_that_costs_under_a_twentieth(
    method: str, scored: MakeCfg, capsys: pytest.CaptureFixture[str]
) -> None:
    if method not in load_suite().methods():
        method = "simsiam"  # 1.0.2 has no MAE
    cfg = scored(method=method, data__no_labels=True, max_epochs=3, score__every_n_epochs=None)
    if method == "mae":
        decoder = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2, "mask_ratio": 0.75}
        cfg.method_kwargs = {**decoder, "norm_pix_loss": False}
        cfg.backbone.kwargs = {}  # its ViT is its own
    elif method == "simsiam":
        cfg.method_kwargs = {"proj_hidden_dim": 16, "proj_output_dim": 8, "pred_hidden_dim": 8, "temperature": 0.2}
    cfg.score.pop("every_n_epochs")
    row = pretrain(prepare(cfg))
    trained = 3 * 2 * (160 // 32 * 32)  # forward and twice that backward, of two crops of the images of whole batches
    smallest = next(n for n in range(1, 100) if 0.05 * n * trained > 30 * 3)
    assert smallest == 2
    assert (row["score"]["every_n_epochs"], row["score"]["of"]) == (smallest, "validation")
    assert list(curve(Path(row["checkpoint"]))) == [1, 2]
    assert "score: 3 views of 30 validation images" in capsys.readouterr().out


# -- training is not changed -------------------------------------------------------------------------------------


def test_training_is_the_same_to_the_bit(scored: MakeCfg, tmp_path: Path) -> None:
    """Batch norm, a momentum network, workers that draw from the training's random state."""
    weights = []
    for enabled in (True, False):
        cfg = scored(
            method="byol",
            backbone=RESNET,
            optimizer__batch_size=80,
            max_epochs=2,
            data__num_workers=1,
            score__enabled=enabled,
            checkpoint__dir=str(tmp_path / str(enabled)),
        )
        row = pretrain(prepare(cfg))
        assert ("score_rankme" in row["metrics"], "score" in row["config"]) == (enabled, enabled)
        weights.append(load(by_epoch(Path(row["checkpoint"]))[-1][1]))
    ours, theirs = weights
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for name, value in ours["state_dict"].items():
        assert torch.equal(value, theirs["state_dict"][name]), name
    assert str(ours["optimizer_states"]) == str(theirs["optimizer_states"])


# -- stopping, resuming ------------------------------------------------------------------------------------------


def test_patience_acts_whenever_validation_comes(scored: MakeCfg) -> None:
    """Nothing is learned at rate 0, so no score is better than one before. Lightning looks on at validation alone."""
    keys = {"optimizer__lr": 0.0, "score__patience": 1, "max_epochs": 6, "check_val_every_n_epoch": 4}
    for named in ({}, {"data__val_path": None}):
        row = pretrain(prepare(scored(**keys, **named)))
        scores = list(curve(Path(row["checkpoint"])).values())
        first = next(n for n in range(1, len(scores)) if scores[n] <= max(scores[:n]))
        assert row["epochs"] == len(scores) == first + 1


def test_where_the_best_was_removed_the_next_one_is_kept(scored: MakeCfg) -> None:
    keys = {"optimizer__lr": 0.0, "score__keep_best": True}
    folder = Path(pretrain(prepare(scored(**keys)), version="run")["checkpoint"])
    shutil.rmtree(folder / BEST)
    assert pretrain(prepare(scored(**keys, max_epochs=2)), version="run")["epochs"] == 2
    assert [path.suffix for path in sorted((folder / BEST).iterdir())] == [".json", ".ckpt"]


@pytest.mark.parametrize("every", [1, 2])
def test_patience_counts_scorings_and_a_run_that_it_ended_is_finished(
    every: int, scored: MakeCfg, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Nothing is learned at rate 0, and the second scoring without a better one ends the run."""
    keys: dict[str, Any] = {
        "optimizer__lr": 0.0,
        "scheduler__warmup_start_lr": 0.0,
        "max_epochs": 9,
        "score__patience": 2,
        "score__every_n_epochs": every,
        "checkpoint__frequency": 1 if every == 1 else 4,
        "score__keep_best": True,
    }
    run = prepare(scored(**keys))
    row = pretrain(run, version="run")
    folder = Path(row["checkpoint"])
    assert row["epochs"] == 3 * every
    assert list(curve(folder)) == [every - 1, 2 * every - 1, 3 * every - 1]
    assert by_epoch(folder)[-1][0] == 3 * every - 1  # of whatever frequency
    assert [epoch for epoch, _ in by_epoch(folder / "best")] == [every - 1]

    capsys.readouterr()
    assert pretrain(run, version="run") == row
    assert "already finished" in capsys.readouterr().out
    if every == 1:
        part = keys | {
            "checkpoint__dir": str(tmp_path / "again"),
            "resume_from_checkpoint": str(by_epoch(folder)[1][1]),
        }
        again = pretrain(prepare(scored(**part)))
        assert (again["epochs"], again["score"]["scorings"]) == (3, 3)
        assert again["metrics"] == pytest.approx(row["metrics"], rel=1e-4, abs=1e-4)
        patient = part | {"score__patience": 3, "checkpoint__dir": str(tmp_path / "patient")}
        assert pretrain(prepare(scored(**patient)))["epochs"] == 4


def test_a_score_that_is_nan_is_logged_said_and_ends_a_run_that_watches_it(
    scored: MakeCfg, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Poison(pretraining.StopOnNaN):
        """Weights that the last step made NaN: no loss has seen them yet."""

        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            super().on_train_epoch_end(trainer, pl_module)
            next(load_suite().backbone(pl_module).parameters()).data.fill_(math.nan)

    monkeypatch.setattr(pretraining, "StopOnNaN", Poison)
    with pytest.warns(UserWarning, match="score of epoch 0 is NaN"):
        row = pretrain(prepare(scored(max_epochs=3, score__patience=2, score__keep_best=True)))
    assert row["epochs"] == 1
    assert math.isnan(row["metrics"]["score_view_information"])
    assert math.isnan(curve(Path(row["checkpoint"]))[0])


def test_a_run_goes_on_only_with_the_images_that_it_held_out(
    unlabelled: dict[str, Any], scored: MakeCfg, refused: Refused, tmp_path: Path
) -> None:
    folder = Path(unlabelled["checkpoint"])
    first = by_epoch(folder)[0][1]
    keys: dict[str, Any] = {
        "method": "byol",
        "max_epochs": 3,
        "data__val_path": None,
        "data__no_labels": True,
        "checkpoint__dir": str(tmp_path),
        "resume_from_checkpoint": str(first),
    }
    again = pretrain(prepare(scored(**keys)))
    assert again["metrics"] == pytest.approx(unlabelled["metrics"], rel=1e-4, abs=1e-4)
    assert again["score"]["scorings"] == 3
    other = tmp_path / "other.yaml"
    OmegaConf.save(OmegaConf.create(asdict(Protocol.read("digits", ["images=30", "seed=1"]))), other)
    with refused("score.protocol", "best and patience would compare unlike numbers"):
        pretrain(prepare(scored(**keys, score__protocol=str(other))))
    # The same config without a score is another run: auto_resume starts it afresh.
    fresh = keys | {"checkpoint__dir": str(folder.parent.parent), "auto_resume": {"enabled": True, "max_hours": 1}}
    fresh |= {"resume_from_checkpoint": None, "score__enabled": False}
    assert pretrain(prepare(scored(**fresh)))["checkpoint"] != str(folder)


def test_the_best_so_far_is_known_where_the_runs_folder_was_moved(tmp_path: Path) -> None:
    there, here = KeepBest(tmp_path / "there", "run-0"), KeepBest(tmp_path / "here", "run-0")
    path = str(tmp_path / "there" / "best" / "run-0-ep=4.ckpt")
    score = torch.tensor(3.0)
    there.best_model_path = there.kth_best_model_path = path
    there.best_model_score, there.best_k_models = score, {path: score}
    moved = tmp_path / "here" / "best" / "run-0-ep=4.ckpt"
    moved.parent.mkdir(parents=True)
    moved.touch()
    here.load_state_dict(there.state_dict())
    assert (here.best_model_path, here.best_k_models) == (str(moved), {str(moved): score})
    assert not here.check_monitor_top_k(Trainer(logger=False, accelerator="cpu"), torch.tensor(2.0))


def test_images_of_a_folder_that_has_changed_are_not_called_held_out(refused: Refused) -> None:
    held_out = HeldOut(images=3, of=30, seed=0)
    assert len(set(held_out.positions(30))) == 3
    with refused("images.held_out", "has 31 images, and had 30"):
        held_out.positions(31)


def test_last_epoch_by_steps_and_by_what_stops_a_run() -> None:
    trainer = Trainer(max_epochs=5, logger=False, enable_checkpointing=False, accelerator="cpu")
    assert not is_last_epoch(trainer)
    trainer.should_stop = True
    assert is_last_epoch(trainer)
    assert is_last_epoch(Trainer(max_steps=0, logger=False, enable_checkpointing=False, accelerator="cpu"))


# -- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "key", "expected"),
    [
        ({"score": {"enable": True}}, "score.enable", "'enabled'"),
        ({"score": True}, "score", "settings by name"),
        ({"score__enabled": "yes"}, "score.enabled", "True or False"),
        ({"score__every_n_epochs": 0}, "score.every_n_epochs", "a whole number or null, at least 1"),
        ({"score__every_n_epochs": 1.5}, "score.every_n_epochs", "1.5"),
        ({"score__patience": 0}, "score.patience", "at least 1"),
        ({"score__patience": 2, "score__enabled": False}, "score.patience", "add score.enabled=True"),
        ({"score__keep_best": True, "score__enabled": False}, "score.keep_best", "add score.enabled=True"),
        ({"score__keep_best": True, "checkpoint__enabled": False}, "score.keep_best", "add checkpoint.enabled=True"),
        ({"score__protocol": "defualt"}, None, "'defualt'"),
        ({"data__val_path": None, "data__dataset": "cifar10"}, "score.enabled", "set data.val_path"),
    ],
)
def test_bad_keys_are_refused_before_an_image_is_read(
    overrides: dict[str, Any], key: str | None, expected: str, scored: MakeCfg, refused: Refused
) -> None:
    with refused(key, expected):
        prepare(scored(**overrides))


def test_too_few_images_are_refused_before_one_is_read(
    scored: MakeCfg, refused: Refused, solid_image: Callable[[Path], Path], tmp_path: Path
) -> None:
    for number in range(39):
        solid_image(tmp_path / "39" / f"{number}.png")
    for number in range(3):
        solid_image(tmp_path / "3" / f"{number}.png")
    few = {"data__no_labels": True, "data__train_path": str(tmp_path / "39"), "optimizer__batch_size": 8}
    with refused("score.enabled", "a tenth of 39 training images to hold out", "at least 4"):
        prepare(scored(**few, data__val_path=None))
    with refused("score.enabled", "3 validation images", "at least 4"):
        prepare(scored(**few, data__val_path=str(tmp_path / "3")))
    solid_image(tmp_path / "39" / "39.png")
    run = prepare(scored(**few, data__val_path=None))
    assert run.config.score.held_out == {"images": 4, "of": 40, "seed": 0}
    assert run.images.train is not None and run.images.held_out is not None
    assert (len(run.images.train), len(run.images.held_out)) == (36, 4)


def test_what_would_fail_at_the_first_scoring_is_said_before_training(
    scored: MakeCfg, refused: Refused, solid_image: Callable[[Path], Path], tmp_path: Path
) -> None:
    for number in range(5):
        solid_image(tmp_path / "val" / f"{number}.png")
    (tmp_path / "val" / "4.png").write_bytes(b"no image")
    with refused("images.unreadable", str(tmp_path / "val" / "4.png")):
        pretrain(prepare(scored(data__no_labels=True, data__val_path=str(tmp_path / "val"))))
