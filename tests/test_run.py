"""A run is decided once: what is read and how often, which images it is of, what it may go on from, Lightning's options."""

from __future__ import annotations

import inspect
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ReadonlyConfigError

from emim_solo.checkpoints import opening
from emim_solo.checkpoints.opening import by_epoch, open_checkpoint
from emim_solo.ground import configs
from emim_solo.images.folders import Images, find_images
from emim_solo.results import rows
from emim_solo.suite import schema
from emim_solo.training.pretraining import prepare, pretrain
from emim_solo.training.resume import decide
from emim_solo.training.run import composed

MakeCfg = Callable[..., DictConfig]
Refused = Callable[..., AbstractContextManager[Any]]
SCORED: dict[str, Any] = {"score__enabled": True, "score__protocol": "digits", "score__every_n_epochs": 1}


@pytest.fixture
def small(make_cfg: MakeCfg) -> MakeCfg:
    """The smallest backbone of both generations."""

    def make(**overrides: Any) -> DictConfig:
        return make_cfg(**{"enable_model_summary": False, "data__val_path": None} | overrides)

    return make


@pytest.fixture
def images(few_digits: Path, tmp_path: Path) -> Path:
    """A copy of the training images for a test to change."""
    return Path(shutil.copytree(few_digits / "train", tmp_path / "images"))


# -- read once ---------------------------------------------------------------------------------------------------

_EVENTS: list[tuple[str, str]] = []
_RECORDING: list[bool] = []


def _record(event: str, arguments: tuple[Any, ...]) -> None:
    if not _RECORDING or not isinstance(arguments[0] if arguments else None, str | os.PathLike):
        return
    reading = event == "open" and not set(str(arguments[1])) & set("wax+")
    if reading or event in ("os.scandir", "os.listdir"):
        _EVENTS.append((event, os.path.abspath(arguments[0])))


sys.addaudithook(_record)  # none can be taken away again


@contextmanager
def recorded() -> Iterator[Counter[tuple[str, str]]]:
    """How often each folder was listed and each file opened for reading, by Python's own account."""
    counts: Counter[tuple[str, str]] = Counter()
    _EVENTS.clear()
    _RECORDING.append(True)
    try:
        yield counts
    finally:
        _RECORDING.clear()
        counts.update(_EVENTS)


def test_each_folder_is_listed_once_and_each_checkpoint_read_once(make_cfg: MakeCfg, few_digits: Path) -> None:
    """With validation images, a score, and a resume."""
    keys = SCORED | {"enable_model_summary": False, "score__keep_best": True}
    folder = Path(pretrain(prepare(make_cfg(**keys)), version="run")["checkpoint"])
    (path,) = folder.glob("*.ckpt")
    (best,) = (folder / "best").glob("*.ckpt")
    with recorded() as one_reading:
        opening.load(path)
    with recorded() as counts:
        assert pretrain(prepare(make_cfg(**keys, max_epochs=2)), version="run")["epochs"] == 2
    listed = {
        place: count
        for (event, place), count in counts.items()
        if event != "open" and few_digits in Path(place).parents
    }
    assert listed == dict.fromkeys((str(each) for each in few_digits.rglob("*") if each.is_dir()), 1)
    assert counts[("open", str(path))] == one_reading[("open", str(path))]
    assert counts[("open", str(best))] == 0


def test_a_run_is_frozen(small: MakeCfg) -> None:
    run = prepare(small(**SCORED))
    with pytest.raises(ReadonlyConfigError):
        run.config.optimizer.lr = 1.0
    with pytest.raises(ReadonlyConfigError):
        run.config.score.protocol = "default"
    for name in ("config", "images", "protocol", "start"):
        with pytest.raises(AttributeError):
            setattr(run, name, None)
        with pytest.raises(AttributeError):
            setattr(decide(run), name, None)


# -- which images ------------------------------------------------------------------------------------------------


def test_row_and_checkpoint_say_which_images_the_run_was_of(trained: Path, few_digits: Path) -> None:
    (row,) = [row for row in rows.read(trained.parent.parent / "rows.jsonl") if row["stage"] == "pretrain"]
    folders = {split: find_images(few_digits / split, labelled=True) for split in ("train", "val")}
    assert row["images"] == {
        split: {"images": count, "classes": 10, "digest": folders[split].digest}
        for split, count in (("train", 160), ("val", 60))
    }
    (path,) = trained.glob("*.ckpt")
    assert torch.load(path, weights_only=True)[opening.IMAGES] == row["images"]
    assert open_checkpoint(trained).recorded == row["images"]


def test_held_out_images_are_in_the_record_by_their_names(small: MakeCfg, images: Path) -> None:
    run = prepare(small(**SCORED, data__train_path=str(images)))
    train, held_out = run.images.train, run.images.held_out
    assert train is not None and held_out is not None
    assert run.images.record == {"train": train.record, "held_out": held_out.record}
    assert (len(train), len(held_out)) == (144, 16)
    moved = Path(held_out.paths[0])
    moved.rename(moved.with_name("another.png"))
    record = prepare(small(**SCORED, data__train_path=str(images))).images.record
    assert record["held_out"]["digest"] != held_out.digest


def test_digest_is_of_names_and_sizes(images: Path, tmp_path: Path) -> None:
    def digest(folder: Path) -> str:
        return find_images(folder, labelled=True).digest

    first = digest(images)
    elsewhere = Path(shutil.move(images, tmp_path / "elsewhere" / "deep"))
    assert digest(elsewhere) == first, "a folder that was moved as a whole"
    (elsewhere / "notes.txt").write_text("no image")
    assert digest(elsewhere) == first
    image = sorted((elsewhere / "0").iterdir())[0]
    contents = image.read_bytes()
    image.write_bytes(contents + b" ")
    assert digest(elsewhere) != first, "a size"
    image.write_bytes(contents)
    assert digest(elsewhere) == first
    image.rename(image.with_name("z.png"))
    assert digest(elsewhere) != first, "a name"


def test_a_link_to_nowhere_is_named(small: MakeCfg, images: Path, refused: Refused) -> None:
    (images / "4" / "link.png").symlink_to("nowhere.png")
    with refused("images.unreadable", str(images / "4" / "link.png")):
        pretrain(prepare(small(data__train_path=str(images))))


def rename_class(images: Path) -> None:
    (images / "0").rename(images / "zero")


def replace_one(images: Path) -> None:
    """As many as before: one removed, one added."""
    removed = sorted((images / "3").iterdir())[0]
    removed.rename(images / "9" / f"new-{removed.name}")


@pytest.mark.parametrize("change", [rename_class, replace_one])
def test_images_that_changed_are_neither_scored_as_held_out_nor_trained_on(
    change: Callable[[Path], None], small: MakeCfg, images: Path, tmp_path: Path, refused: Refused
) -> None:
    """Held out are the images of these names: positions would be those of others after it."""
    keys = SCORED | {"data__train_path": str(images)}
    folder = Path(pretrain(prepare(small(**keys)), version="run")["checkpoint"])
    assert len(open_checkpoint(folder).images.held_positions) == 16
    change(images)
    with refused("images.held_out", str(images), "data.val_path"):
        _ = open_checkpoint(folder).images
    with refused("images.held_out", str(images)):
        pretrain(prepare(small(**keys, max_epochs=2)), version="run")
    elsewhere = {"resume_from_checkpoint": str(by_epoch(folder)[0][1]), "checkpoint__dir": str(tmp_path / "elsewhere")}
    with refused("images.held_out", str(images)):
        pretrain(prepare(small(**keys, **elsewhere, max_epochs=2)))
    assert not list((tmp_path / "elsewhere").rglob("*.csv"))


def test_of_other_images_none_is_held_out_but_of_the_runs_own_elsewhere_the_same_are(
    small: MakeCfg, images: Path, few_digits: Path, tmp_path: Path
) -> None:
    folder = Path(pretrain(prepare(small(**SCORED, data__train_path=str(images))))["checkpoint"])
    ours = open_checkpoint(folder).images
    moved = images.rename(tmp_path / "moved")
    there = open_checkpoint(folder, [f"data.train_path={moved}"]).images
    assert there.held_positions == ours.held_positions and there.held_out is not None and ours.held_out is not None
    assert there.held_out.digest == ours.held_out.digest
    (moved / "5" / "more.png").write_bytes(sorted((moved / "5").iterdir())[0].read_bytes())
    for other in (moved, few_digits / "val"):
        assert open_checkpoint(folder, [f"data.train_path={other}"]).images.held_positions == ()


def test_images_that_a_run_was_trained_on_are_not_held_out_when_it_goes_on(
    small: MakeCfg, tmp_path: Path, refused: Refused
) -> None:
    """The run before had no score, and held nothing out."""
    path = by_epoch(Path(pretrain(prepare(small()))["checkpoint"]))[0][1]
    with refused("images.held_out", "would be of images it was trained on"):
        pretrain(prepare(small(**SCORED, max_epochs=2, resume_from_checkpoint=str(path))))


def test_a_run_of_other_images_is_not_continued_in_its_folder_and_elsewhere_with_a_word(
    small: MakeCfg, images: Path, tmp_path: Path, refused: Refused
) -> None:
    keys = {"data__train_path": str(images)}
    folder = Path(pretrain(prepare(small(**keys)), version="run")["checkpoint"])
    replace_one(images)
    with refused("images.changed", "names or sizes", "160 images there, 160 here"):
        pretrain(prepare(small(**keys, max_epochs=2)), version="run")
    keys |= {"resume_from_checkpoint": str(by_epoch(folder)[0][1]), "checkpoint__dir": str(tmp_path / "elsewhere")}
    with pytest.warns(UserWarning, match="has other images"):
        assert pretrain(prepare(small(**keys, max_epochs=2)))["epochs"] == 2


# -- what it may go on from --------------------------------------------------------------------------------------


def test_auto_resume_goes_on_where_what_differs_changes_no_result_and_says_what_does(small: MakeCfg) -> None:
    keys = {"auto_resume": {"enabled": True}, "max_epochs": 2, "checkpoint__keep_prev": True}
    folder = Path(pretrain(prepare(small(**keys)))["checkpoint"])
    by_epoch(folder)[-1][1].unlink()  # as a kill after the first epoch leaves it
    other = {"data__num_workers": 1, "accelerator": "auto", "strategy": "auto", "log_every_n_steps": 3}
    run = decide(prepare(small(**keys, **other)))
    assert (run.folder, run.start.epochs) == (folder, 1)
    for changed, said in (
        ({"optimizer__lr": 0.002}, "optimizer.lr"),
        ({"optimizer__batch_size": 16}, "optimizer.batch_size"),
        ({"seed": 8}, r"seed \(7 there, 8 here\)"),
        ({"precision": "bf16-mixed"}, "precision"),
    ):
        with pytest.warns(UserWarning, match=f"auto_resume: '{folder}' has other settings: .*{said}"):
            run = decide(prepare(small(**keys, **changed)))
        assert run.start.checkpoint is None
        assert run.folder is not None and run.folder != folder


def test_a_checkpoint_of_version_0_2_which_has_no_record_opens_and_goes_on(small: MakeCfg) -> None:
    keys = SCORED | {"max_epochs": 1}
    folder = Path(pretrain(prepare(small(**keys)), version="run")["checkpoint"])
    ((_, path),) = by_epoch(folder)
    contents = torch.load(path, weights_only=True)
    del contents[opening.IMAGES]
    torch.save(contents, path)
    opened = open_checkpoint(folder)
    assert opened.recorded == {} and len(opened.images.held_positions) == 16
    row = pretrain(prepare(small(**keys | {"max_epochs": 2})), version="run")
    assert (row["epochs"], row["images"].keys()) == (2, {"train", "held_out"})


# -- every option of Lightning's Trainer -------------------------------------------------------------------------

OBEYED: dict[str, Any] = {
    "accelerator": "cpu",
    "strategy": "auto",
    "devices": [0],
    "num_nodes": 1,
    "precision": "32-true",
    "sync_batchnorm": False,
    "max_epochs": 3,
    "min_epochs": 1,
    "max_steps": 2,  # also a run that ends by it is saved, and finished
    "min_steps": 1,
    "max_time": "00:01:00:00",  # by our Timer, which Lightning would take for the config's
    "limit_train_batches": 2,
    "limit_val_batches": 1,
    "limit_test_batches": 1,  # nothing is tested or predicted in a run
    "limit_predict_batches": 1,
    "overfit_batches": 0.5,
    "val_check_interval": 2,
    "check_val_every_n_epoch": 2,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accumulate_grad_batches": 2,
    "gradient_clip_val": 0.5,
    "gradient_clip_algorithm": "value",
    "deterministic": "warn",
    "benchmark": False,
    "inference_mode": False,
    "use_distributed_sampler": False,
    "profiler": "simple",
    "detect_anomaly": True,
    "enable_autolog_hparams": False,
}
"""A value of each option that a config may have."""
REFUSED: dict[str, Any] = {
    "barebones": True,
    "callbacks": None,
    "default_root_dir": "elsewhere",
    "enable_checkpointing": False,
    "fast_dev_run": True,
    "logger": True,
    "model_registry": "registry",
    "plugins": [],
    "reload_dataloaders_every_n_epochs": 1,
}
"""A value of each that it may not have; what to do instead is in the line."""


def test_every_option_of_the_trainer_is_obeyed_or_refused() -> None:
    known = inspect.signature(Trainer.__init__).parameters.keys() - {"self"}
    assert known == OBEYED.keys() | REFUSED.keys(), "of this version of Lightning"
    assert REFUSED.keys() == schema.REFUSED.keys()
    assert OBEYED.keys() <= {*schema.Config.__dataclass_fields__, "devices"}
    assert not OBEYED.keys() & REFUSED.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_option_says_what_to_do(name: str, small: MakeCfg, refused: Refused) -> None:
    with refused(name, name, schema.REFUSED[name]):
        prepare(small(**{name: REFUSED[name]}))


class AtItsFirstBatch(Callback):
    """Keeps the trainer, and ends the run."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.trainer = trainer
        raise Reached


class Reached(Exception):
    pass


def trainer_of(cfg: DictConfig) -> Trainer:
    stop = AtItsFirstBatch()
    with pytest.raises(Reached):
        pretrain(prepare(cfg), more_callbacks=[stop])
    return stop.trainer


def test_the_obeyed_options_reach_the_trainer(make_cfg: MakeCfg) -> None:
    keys = {"checkpoint__enabled": False}
    trainer: Any = trainer_of(make_cfg(**keys, **OBEYED | {"overfit_batches": 0.0, "max_steps": 9}))
    for name in ("max_epochs", "max_steps", "min_epochs", "min_steps", "limit_val_batches", "check_val_every_n_epoch"):
        assert getattr(trainer, name) == {**OBEYED, "max_steps": 9}[name], name
    for name in ("gradient_clip_val", "gradient_clip_algorithm", "accumulate_grad_batches", "val_check_interval"):
        assert getattr(trainer, name) == OBEYED[name], name
    assert trainer.num_training_batches == 2
    assert trainer.progress_bar_callback is None
    assert type(trainer.profiler).__name__ == "SimpleProfiler"
    assert trainer.precision == "32-true"
    (timer,) = [each for each in trainer.callbacks if type(each).__name__ == "Timer"]
    assert timer.time_remaining() < 3600


def test_max_time_and_max_steps_end_a_run_that_is_saved_and_finished(
    small: MakeCfg, capsys: pytest.CaptureFixture[str]
) -> None:
    for version, keys in (("time", {"max_time": {"milliseconds": 1}}), ("steps", {"max_steps": 2})):
        row = pretrain(prepare(small(max_epochs=12, **keys)), version=version)
        ((epoch, _),) = by_epoch(Path(row["checkpoint"]))
        assert (row["epochs"], epoch) == (1, 0), version
        assert "train_emim_loss" in row["metrics"]
        before = rows.read(Path(row["checkpoint"]).parent.parent / "rows.jsonl")
        again = pretrain(prepare(small(max_epochs=12, **keys)), version=version)
        assert again == row
        assert "already finished" in capsys.readouterr().out
        assert rows.read(Path(row["checkpoint"]).parent.parent / "rows.jsonl") == before
    more = pretrain(prepare(small(max_epochs=2)), version="steps")
    assert more["epochs"] == 2


@pytest.mark.parametrize("method", ["emim", "vicreg"])
def test_a_run_of_so_many_steps_goes_on_at_its_next_epoch(method: str, small: MakeCfg) -> None:
    """With ``max_steps`` Lightning takes the end of an epoch for its middle, and would end that epoch again."""
    cfg = small(method=method, max_epochs=4, max_steps=17, checkpoint__keep_prev=True)
    made = [pretrain(prepare(cfg), version=version) for version in ("whole", "killed")]
    folders = [Path(row["checkpoint"]) for row in made]
    for _, path in by_epoch(folders[1])[1:]:
        path.unlink()
    again = pretrain(prepare(cfg), version="killed")
    assert again["epochs"] == made[0]["epochs"] and again["metrics"].keys() == made[0]["metrics"].keys()
    files = [by_epoch(folder) for folder in folders]
    assert [epoch for epoch, _ in files[0]] == [epoch for epoch, _ in files[1]]
    whole, resumed = (torch.load(of_run[-1][1], weights_only=False)["state_dict"] for of_run in files)
    assert all(torch.equal(weights, resumed[name]) for name, weights in whole.items())


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"max_time": {"seconds": 0}}, "max_time"),
        ({"max_time": "soon"}, "max_time"),
        ({"limit_train_batches": 0}, "limit_train_batches"),
        ({"limit_train_batches": 0.0}, "limit_train_batches"),
        ({"limit_train_batches": 0.1}, "trainer"),
        ({"overfit_batches": 0.01}, "trainer"),
        ({"val_check_interval": 50}, "trainer"),
        ({"limit_val_batches": 0.001}, "trainer"),
        ({"strategy": "ddq"}, "strategy"),
        ({"accelerator": "tpu"}, "trainer"),
        ({"precision": "transformer-engine"}, "trainer"),
        ({"profiler": "xla"}, "profiler"),
    ],
)
def test_options_under_which_nothing_could_be_trained_leave_nothing_behind(
    keys: dict[str, Any], key: str, make_cfg: MakeCfg, refused: Refused
) -> None:
    cfg = make_cfg(**keys)
    with refused(key, *keys.values() if key != "trainer" else ()):
        pretrain(prepare(cfg))
    assert not list(Path(cfg.checkpoint.dir).rglob("*.ckpt"))
    assert not list(Path(cfg.checkpoint.dir).rglob("rows.jsonl"))


def test_images_at_some_positions_are_of_the_same_classes() -> None:
    images = Images("f", ["f/a/0.png", "f/b/1.png", "f/b/2.png"], [0, 1, 1], ["a", "b"], ["a", "b"])
    assert images.at([0, 2]) == Images("f", ["f/a/0.png", "f/b/2.png"], [0, 1], ["a", "b"], ["a", "b"])


def test_a_config_that_is_given_is_not_changed(small: MakeCfg) -> None:
    cfg = small(**SCORED)
    before = OmegaConf.to_container(cfg)
    prepare(cfg)
    assert OmegaConf.to_container(cfg) == before


def test_composing_a_config_leaves_an_outer_hydra_active() -> None:
    folder = configs.find("pretrain/digits")
    with initialize_config_dir(str(folder), version_base="1.2"):
        outer = GlobalHydra.instance().hydra
        assert composed(folder, "emim").method == "emim"
        assert GlobalHydra.instance().hydra is outer is not None
