"""Runs that are saved every few steps: stopped anywhere, they go on within the epoch and end the same to the bit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig

from emim_solo.checkpoints.opening import last_checkpoint, open_checkpoint
from emim_solo.ground import compare
from emim_solo.results import rows
from emim_solo.suite import load_suite
from emim_solo.training import order
from emim_solo.training.callbacks import ContinueCheckpoints
from emim_solo.training.pretraining import prepare, pretrain
from emim_solo.training.resume import decide
from emim_solo.training.run import Start

MakeCfg = Callable[..., DictConfig]
Refused = Callable[..., AbstractContextManager[Any]]
STEPS = 5  # of an epoch: 160 images, 32 a batch
SAVED = {"checkpoint__every_n_steps": 2, "max_epochs": 2, "data__num_workers": 0}


class Stop(Callback):
    """An error before a step: what lies on the disk is what a kill would leave."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise InterruptedError


def stopped(cfg: DictConfig, step: int) -> Path:
    """The folder of a run that ended before a step."""
    with pytest.raises(InterruptedError):
        pretrain(prepare(cfg), version="run", more_callbacks=[Stop(step)])
    return Path(cfg.checkpoint.dir) / cfg.method / "run"


def end(folder: Path) -> dict[str, torch.Tensor]:
    """Weights and the optimizer's moments at the end of a run, which has left one file."""
    (path,) = folder.glob("*.ckpt")
    contents = torch.load(path, weights_only=True)
    moments = contents["optimizer_states"][0]["state"]
    flat = {f"{number}.{name}": value for number, each in moments.items() for name, value in each.items()}
    return contents["state_dict"] | contents["made_in_training"] | flat


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    differing = [name for name in one if not torch.equal(one[name], two[name])]
    assert not differing, differing[:5]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Epoch and number of each image that is decoded for training, in order."""
    places: list[tuple[int, int]] = []
    get = order._SeededImages.__getitem__

    def counted(self: Any, place: tuple[int, int]) -> Any:
        places.append(place)
        return get(self, place)

    monkeypatch.setattr(order._SeededImages, "__getitem__", counted)
    return places


# "nnclr" has a queue that training fills, "byol" a momentum network whose rate follows the steps.
@pytest.mark.parametrize("method", ["emim", "byol", "nnclr"])
def test_a_stopped_run_ends_the_same_to_the_bit(
    method: str, make_cfg: MakeCfg, tmp_path: Path, drawn: list[tuple[int, int]]
) -> None:
    more = {"byol": {"pred_hidden_dim": 32}, "nnclr": {"pred_hidden_dim": 32, "temperature": 0.2, "queue_size": 96}}
    kwargs = {"proj_hidden_dim": 64, "proj_output_dim": 16, **more.get(method, {})}
    momentum = {"momentum": {"base_tau": 0.9, "final_tau": 1.0}} if method == "byol" else {}
    cfg = make_cfg(method=method, method_kwargs=kwargs, **SAVED, **momentum)
    whole = pretrain(prepare(cfg), version="run")
    of_whole, once = end(Path(whole["checkpoint"])), sorted(drawn)
    assert len(once) == len(set(once)) == 2 * 160
    for step, batches in ((3, 2), (9, 3)):  # in the first epoch, and in the last one
        cfg.checkpoint.dir = str(tmp_path / f"stopped-{step}")
        folder = stopped(cfg, step)
        (path,) = folder.glob(f"*-ep={step // STEPS}-step={step - 1}.ckpt")
        assert last_checkpoint(folder) == path
        assert open_checkpoint(folder).epochs == step // STEPS, "whole ones"
        drawn.clear()
        row = pretrain(prepare(cfg), version="run")
        left = 2 * STEPS - (step - 1)
        assert len(drawn) == left * 32, "nothing that was done is decoded again"
        assert set(drawn) <= set(once)
        assert_same(of_whole, end(folder))
        fields = {"metrics_from_batch": batches} if step > STEPS else {}
        assert {key: row[key] for key in row if key not in whole} == fields
        of_the_epoch = (
            ("train", "val_knn") if fields else ()
        )  # averages, and the suite's k-NN of the epoch's own features
        same = [name for name in whole["metrics"] if not name.startswith(of_the_epoch)]
        assert {name: row["metrics"][name] for name in same} == {name: whole["metrics"][name] for name in same}
        assert row["config_hash"] == whole["config_hash"]


def test_workers_change_nothing_and_a_kill_neither(
    make_cfg: MakeCfg, tmp_path: Path, killed_when: Callable[[DictConfig, str], int]
) -> None:
    """Two processes, two workers in each, killed by the system; against two processes without workers or a kill."""
    cfg = make_cfg(**SAVED, devices=2, strategy="ddp", optimizer__batch_size=16, sync_batchnorm=False)
    ends = []
    for name, workers, kills in (("whole", 0, ["False"]), ("killed", 2, ["trainer.global_step == 8", "False"])):
        cfg.data.num_workers, cfg.checkpoint.dir = workers, str(tmp_path / name)
        assert [killed_when(cfg, when) == 0 for when in kills] == [when == "False" for when in kills]
        (row,) = rows.read(tmp_path / name / "rows.jsonl")
        assert row["epochs"] == 2
        ends.append(end(tmp_path / name / "emim" / "run"))
    assert_same(*ends)


def test_the_newest_file_of_an_epoch_is_replaced_whatever_its_number_of_digits(make_cfg: MakeCfg) -> None:
    """A kill between saving and removing leaves two."""
    run = prepare(make_cfg())
    folder = run.base / "run"
    folder.mkdir(parents=True)
    older, newer = (folder / f"emim-ep={epoch}.ckpt" for epoch in (9, 10))
    for path in (older, newer, folder / "emim-ep=11-step=57.ckpt"):
        path.touch()
    for start in (Start(newer, epochs=11), Start(folder / "emim-ep=11-step=57.ckpt", epochs=11, batches=2)):
        assert ContinueCheckpoints(None, replace(run, folder=folder, start=start)).resumed == newer
    elsewhere = replace(run, folder=run.base / "other", start=Start(newer, epochs=11))
    assert ContinueCheckpoints(None, elsewhere).resumed is None


def test_a_run_goes_on_within_an_epoch_as_itself_alone(make_cfg: MakeCfg, refused: Refused) -> None:
    folder = stopped(make_cfg(**SAVED), 3)
    (path,) = folder.glob("*-step=2.ckpt")
    for changes, names in (
        ({"optimizer__batch_size": 16}, ["optimizer.batch_size (32 there, 16 here)"]),
        ({"checkpoint__every_n_steps": None}, ["random numbers"]),
        ({"devices": 2}, ["processes (1 there, 2 here)"]),
    ):
        with refused("resume.within_epoch", path, *names):
            pretrain(prepare(make_cfg(**{**SAVED, **changes}, resume_from_checkpoint=str(path))))
    same = make_cfg(**{**SAVED, "checkpoint__every_n_steps": 3}, auto_resume={"enabled": True})
    row = pretrain(prepare(same))
    assert Path(row["checkpoint"]) == folder, "how often it is saved is no other run"


def test_a_file_says_itself_where_in_the_epoch_it_is(make_cfg: MakeCfg) -> None:
    """Under any name it goes on there, not at the epoch's end."""
    cfg = make_cfg(**SAVED)
    (path,) = stopped(cfg, 3).glob("*-step=2.ckpt")
    start = decide(
        prepare(make_cfg(**SAVED, resume_from_checkpoint=str(path.rename(path.with_name("kept.ckpt")))))
    ).start
    assert (start.epochs, start.batches) == (0, 2)


def test_what_cannot_go_on_within_an_epoch_is_refused_before_any_work(make_cfg: MakeCfg, refused: Refused) -> None:
    key = "checkpoint.every_n_steps"
    with refused(key, "checkpoint.enabled"):
        prepare(make_cfg(**SAVED, checkpoint__enabled=False))
    with refused(key, "DALI"):
        prepare(make_cfg(**SAVED, data__format="dali"))
    with refused(key, "dino"):
        prepare(make_cfg(**SAVED, method="dino", momentum={"base_tau": 0.9, "final_tau": 1.0}))
    prepares = {name for name in load_suite().methods() if load_suite().prepares_epochs(name)}
    assert prepares == {"dino", "deepclusterv2"}


def test_one_epoch_after_another_is_another_order_and_other_views(make_cfg: MakeCfg, drawn: list[Any]) -> None:
    seen: list[torch.Tensor] = []

    class Keep(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
            seen.append(batch[1][0].clone())

    pretrain(prepare(make_cfg(**SAVED)), version="run", more_callbacks=[Keep()])
    first, second = drawn[:160], drawn[160:]
    assert [epoch for epoch, _ in drawn] == [0] * 160 + [1] * 160
    assert [index for _, index in first] != [index for _, index in second]
    views = dict(zip(drawn, torch.cat(seen), strict=True))
    assert not any(torch.equal(views[0, index], views[1, index]) for index in range(160))


def test_the_key_is_no_other_run_by_its_number_but_by_its_being_there() -> None:
    off, two, three = ({"seed": 0, "checkpoint": {"every_n_steps": number}} for number in (None, 2, 3))
    assert compare.config_hash(off) == compare.config_hash({"seed": 0, "checkpoint": {}})
    assert compare.config_hash(two) == compare.config_hash(three) != compare.config_hash(off)
