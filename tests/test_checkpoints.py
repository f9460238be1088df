"""What is in a file of weights: opened once, called damaged only where it is, and no code of it runs."""

from __future__ import annotations

import os
import sys
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from emim_solo.checkpoints.contents import load, load_weights
from emim_solo.checkpoints.opening import by_epoch

Refused = Callable[..., AbstractContextManager[Any]]
WEIGHTS = {"layer.weight": torch.arange(6.0).reshape(2, 3)}
_opened: list[str] = []
_watched: list[str] = []


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _watched and isinstance(arguments[0], str | bytes) and os.fsdecode(arguments[0]) in _watched:
        _opened.append(os.fsdecode(arguments[0]))


sys.addaudithook(_note)  # for good: there is no way to remove one


@contextmanager
def opened(path: Path) -> Iterator[list[str]]:
    """How often Python opens a file."""
    _opened.clear()
    _watched[:] = [str(path)]
    yield _opened
    _watched.clear()


@pytest.mark.parametrize("weights_alone", [True, False])
def test_a_checkpoint_is_opened_once(weights_alone: bool, tmp_path: Path) -> None:
    path = tmp_path / "x-ep=0.ckpt"
    more = {"hyper_parameters": Namespace(lr=0.1)} if weights_alone else {}
    torch.save({"state_dict": WEIGHTS, "epoch": 0, **more}, path)
    with opened(path) as times:
        contents = load(path, weights_alone=weights_alone)
        assert len(times) == 1
    assert torch.equal(contents["state_dict"]["layer.weight"], WEIGHTS["layer.weight"])


@pytest.mark.parametrize(
    "name", ["w.pth", "w.PT", "w.safetensors", "W.SAFETENSORS", os.fsdecode(b"\xff.pth"), "w=1.bin"]
)
def test_weights_are_known_by_what_is_in_the_file(name: str, tmp_path: Path) -> None:
    for save in (
        lambda path: torch.save(WEIGHTS, path),
        lambda path: torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False),  # torch before 1.6
        lambda path: save_file(WEIGHTS, path),
    ):
        save(tmp_path / "written")
        path = (tmp_path / "written").rename(tmp_path / name)
        with opened(path) as times:
            assert torch.equal(load_weights(path)["layer.weight"], WEIGHTS["layer.weight"])
            assert len(times) == 1


def test_of_several_sets_of_weights_one_is_taken_which_is_said(tmp_path: Path, refused: Refused) -> None:
    averaged = {"layer.weight": torch.zeros(2, 3)}
    path = tmp_path / "w.pth"
    torch.save({"state_dict_ema": averaged, "state_dict": WEIGHTS, "optimizer": {"state": {}}, "epoch": 3}, path)
    with pytest.warns(UserWarning, match=r"'state_dict' is taken, not 'state_dict_ema'$"):
        assert torch.equal(load_weights(path)["layer.weight"], WEIGHTS["layer.weight"])
    torch.save({"model": WEIGHTS, "optimizer": {"state": {}}}, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_weights(path).keys() == WEIGHTS.keys()
    torch.save({"student": WEIGHTS, "teacher": averaged}, path)
    with refused("checkpoint.weights", path, "student, teacher"):
        load_weights(path)


@pytest.mark.parametrize("held", [[1, 2], {0: torch.zeros(1)}, {}, torch.zeros(2), {"state_dict": {}}])
def test_a_sound_file_without_weights_is_not_called_damaged(held: Any, tmp_path: Path, refused: Refused) -> None:
    torch.save(held, tmp_path / "w.pth")
    key = "checkpoint.weights" if isinstance(held, dict) else "checkpoint.unreadable"
    with refused(key, tmp_path / "w.pth", "expected") as caught:
        load_weights(tmp_path / "w.pth")
    for word in ("cut short", "damaged", "remove"):
        assert word not in str(caught.value)


def test_a_sound_archive_that_torch_cannot_load_is_not_called_damaged(tmp_path: Path, refused: Refused) -> None:
    with zipfile.ZipFile(tmp_path / "w.ckpt", "w") as archive:
        archive.writestr("notes.txt", "of another program")
    with refused("checkpoint.unreadable", tmp_path / "w.ckpt", "which is whole") as caught:
        load(tmp_path / "w.ckpt")
    assert "cut short" not in str(caught.value)


def test_a_disk_that_cannot_be_read_says_nothing_of_the_checkpoint(tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "x-ep=0.ckpt"
    torch.save({"state_dict": WEIGHTS, "epoch": 0}, path)
    path.chmod(0)
    with _as_nobody(), refused("checkpoint.unreadable", path, "Permission denied") as caught:
        load(path)
    assert "cut short" not in str(caught.value)
    memory = Path("/proc/self/mem")  # reading at its beginning is an input/output error
    if memory.exists():
        with refused("checkpoint.unreadable", memory, "Input/output error"):
            load(memory)
    for absent in (tmp_path, tmp_path / "absent.ckpt"):
        with refused("checkpoint.missing", f"no checkpoint '{absent}'"):
            load(absent)
    assert by_epoch(tmp_path) == [(0, path)]
    tmp_path.chmod(0o100)  # passed through, not listed
    try:
        with _as_nobody(), pytest.raises(PermissionError):
            by_epoch(tmp_path)
    finally:
        tmp_path.chmod(0o700)


@contextmanager
def _as_nobody() -> Iterator[None]:
    """Permissions do not hold for root."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_tensors_alone_come_out(tmp_path: Path) -> None:
    torch.save({"state_dict": WEIGHTS, "epoch": 0, "args": Namespace(lr=0.1)}, tmp_path / "w.pth")
    assert all(isinstance(value, Tensor) for value in load_weights(tmp_path / "w.pth").values())
