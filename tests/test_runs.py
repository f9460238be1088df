"""What may happen to a run on its way: signals, kills, damaged files, full disks, names, settings left from others."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf

from emim_solo import cli
from emim_solo.checkpoints import opening as checkpoints
from emim_solo.checkpoints.opening import last_checkpoint, open_checkpoint
from emim_solo.evaluation import commands
from emim_solo.evaluation.features import Features
from emim_solo.evaluation.linear import complete_settings
from emim_solo.ground import files
from emim_solo.ground.errors import UsageError
from emim_solo.ground.stopping import Stopped, stoppable
from emim_solo.results import rows
from emim_solo.suite import load_suite
from emim_solo.training import pretraining
from emim_solo.training.pretraining import prepare, pretrain

MakeCfg = Callable[..., DictConfig]
Refused = Callable[..., AbstractContextManager[Any]]


@pytest.fixture(scope="module")
def trained(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one epoch, whose files no test changes but for rows that are appended."""
    folder = tmp_path_factory.mktemp("trained")
    overrides = ["max_epochs=1", "optimizer.batch_size=32", "data.num_workers=0", "accelerator=cpu"]
    overrides += [f"data.{split}_path={few_digits / split}" for split in ("train", "val")]
    overrides += ["enable_progress_bar=False", f"checkpoint.dir={folder}"]
    arguments = ["--config-path", "pretrain/digits", "--config-name", "emim", *_added(overrides)]
    cli.main(["pretrain", *arguments])
    return folder / "emim" / "0"


def _added(overrides: list[str]) -> list[str]:
    return [f"++{override}" for override in overrides]


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A copy of that run for a test to damage."""
    shutil.copytree(trained.parent.parent, tmp_path / "runs")
    return tmp_path / "runs" / "emim" / "0"


def ended(call: Callable[[], Any]) -> int:
    with pytest.raises(SystemExit) as caught:
        call()
    return int(caught.value.code)  # type: ignore[arg-type]


# -- signals -----------------------------------------------------------------------------------------------------------


class Terminate(pretraining.StopOnNaN):
    """SIGTERM to this very process in the middle of its second epoch."""

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:  # type: ignore[override]
        if trainer.current_epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_ends_a_run_with_143_and_the_line_that_continues_it(
    make_cfg: MakeCfg, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    cfg = make_cfg(max_epochs=2)
    OmegaConf.save(cfg, tmp_path / "run.yaml")
    command = [
        "pretrain",
        "--config-path",
        str(tmp_path),
        "--config-name",
        "run",
        f"hydra.run.dir={tmp_path}",  # where Hydra writes a log of its own
        "hydra.output_subdir=null",
    ]
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        patched.setattr(pretraining, "StopOnNaN", Terminate)
        assert ended(lambda: cli.main(command)) == 143
    assert signal.getsignal(signal.SIGTERM) is before
    said = capfd.readouterr().err.strip().splitlines()[-1]
    folder = Path(cfg.checkpoint.dir) / "emim" / "0"
    path = last_checkpoint(folder)
    assert said == (
        f"emim-solo: stopped by SIGTERM: the same command and auto_resume.enabled=True goes on from '{path}'"
    )
    assert not (folder.parent.parent / "rows.jsonl").exists()
    cli.main([*command, "+auto_resume.enabled=True"])
    (row,) = rows.read(folder.parent.parent / "rows.jsonl")
    assert (row["epochs"], Path(row["checkpoint"])) == (2, folder)


@pytest.mark.parametrize(
    ("command", "continues"), [("linear", "the same command starts again"), ("knn", "the same command starts again")]
)
def test_sigterm_in_an_evaluation(
    command: str,
    continues: str,
    trained: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def killed(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(commands, "extract_features", killed)
    assert ended(lambda: cli.main([command, str(trained)])) == 143
    assert capsys.readouterr().err == f"emim-solo: stopped by SIGTERM: {continues}\n"


def test_a_benchmark_goes_on_after_sigterm_with_the_same_command(tmp_path: Path, few_digits: Path) -> None:
    """In a process of its own, with the workers of its loaders."""
    paths = [f"+run.data.{split}_path={few_digits / split}" for split in ("train", "val")]
    command = ["benchmark", "--config-name", "digits", "only=emim", f"dir={tmp_path / 'b'}", "max_epochs=500"]
    started = processes.start(*command, "+run.optimizer.batch_size=32", *paths)
    while not list((tmp_path / "b").rglob("*.ckpt")):
        assert started.poll() is None
        time.sleep(0.2)
    started.send_signal(signal.SIGTERM)
    assert started.wait() == 143
    said = started.stderr
    # A loader that was just starting its workers cannot be torn down: then Python says so before or after the last line.
    before, _, _ = said.partition("Exception ignored in: <function _MultiProcessingDataLoaderIter.__del__")
    last = {part.strip().splitlines()[-1] for part in (before, said)}
    assert "emim-solo: stopped by SIGTERM: the same command goes on where it was" in last, said


def test_a_signal_that_is_ignored_stays_ignored_and_a_lost_one_is_found() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    class Swallows:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    def lost() -> None:
        with stoppable():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                Swallows()
            raise SystemExit  # as Lightning's own SIGTERMException

    with pytest.raises(Stopped) as caught:
        lost()
    assert caught.value.status == 143


# -- checkpoints -------------------------------------------------------------------------------------------------------


def damage(path: Path, how: str) -> None:
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(
        {
            "empty": b"",
            "cut": whole[:middle],
            "zeros": bytes(len(whole)),
            "hole": whole[:middle] + bytes(4096) + whole[middle + 4096 :],
            "text": b"<html>not found</html>",
        }[how]
    )


@pytest.mark.parametrize("how", ["empty", "cut", "zeros", "hole", "text"])
def test_the_newest_whole_checkpoint_is_taken_and_the_damaged_one_named(
    how: str, copied: Path, refused: Refused
) -> None:
    whole = last_checkpoint(copied)
    assert whole is not None
    newer = whole.with_name(whole.name.replace("ep=0", "ep=1"))
    newer.write_bytes(whole.read_bytes())
    damage(newer, how)
    with pytest.warns(UserWarning, match=rf"cannot read checkpoint '.*{newer.name}'.*'{whole.name}' is taken"):
        assert open_checkpoint(copied).path == whole
    damage(whole, how)
    with refused("checkpoint.damaged", "ep=1", "put a whole copy in its place") as caught:
        open_checkpoint(copied)
    assert "remove" not in str(caught.value), "never of what may be whole"


def test_a_run_goes_on_from_the_newest_whole_checkpoint(make_cfg: MakeCfg) -> None:
    same = {"auto_resume": {"enabled": True}, "max_epochs": 2, "checkpoint__keep_prev": True}
    folder = Path(pretrain(prepare(make_cfg(**same)))["checkpoint"])
    whole, cut = sorted(folder.glob("*.ckpt"))
    damage(cut, "cut")
    (folder.parent.parent / "rows.jsonl").unlink()
    with pytest.warns(UserWarning, match=f"'{whole.name}' is taken"):
        again = pretrain(prepare(make_cfg(**same)))
    assert (again["epochs"], Path(again["checkpoint"])) == (2, folder)
    assert last_checkpoint(folder) == cut


def test_the_last_epoch_is_saved_whatever_the_frequency(make_cfg: MakeCfg) -> None:
    row = pretrain(prepare(make_cfg(max_epochs=2, checkpoint__frequency=5, data__num_workers=0)))
    (path,) = Path(row["checkpoint"]).glob("*.ckpt")
    assert path.name.endswith("ep=1.ckpt")


class Payload:
    """Runs code where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("where", ["hyper_parameters", "state_dict"])
@pytest.mark.parametrize("command", ["knn", "linear", "umap", "resume"])
def test_code_in_a_checkpoint_never_runs(
    where: str,
    command: str,
    copied: Path,
    tmp_path: Path,
    make_cfg: MakeCfg,
    capsys: pytest.CaptureFixture[str],
    refused: Refused,
) -> None:
    (path,) = copied.glob("*.ckpt")
    contents = torch.load(path, weights_only=True)
    marker = tmp_path / "marker"
    if where == "state_dict":
        contents["state_dict"]["odd"] = Payload(marker)
    else:
        contents[where] = Payload(marker)
    torch.save(contents, path)
    if command == "resume":
        with refused("checkpoint.code", "could run code"):
            pretrain(prepare(make_cfg(resume_from_checkpoint=str(path), max_epochs=2)))
    else:
        assert ended(lambda: cli.main([command, str(copied)])) == 2
        said = capsys.readouterr().err
        assert "could run code" in said
        assert str(path) in said
    assert not marker.exists()
    path.write_bytes(pickle.dumps({"state_dict": Payload(marker), "epoch": 0}))  # not even torch's format
    with pytest.raises(UsageError):
        checkpoints.load(path)
    assert not marker.exists()


def test_a_checkpoint_of_the_other_generation_is_one_line(copied: Path, refused: Refused) -> None:
    suite = load_suite()
    (other,) = suite.backbone_names.keys() - {suite.generation}
    (path,) = copied.glob("*.ckpt")
    contents = torch.load(path, weights_only=True)
    names = suite.backbone_names
    contents["state_dict"] = {
        name.replace(f"{names[suite.generation]}.", f"{names[other]}.", 1): value
        for name, value in contents["state_dict"].items()
    }
    torch.save(contents, path)
    with refused("checkpoint.generation", f"trained with solo-learn {other}, installed is {suite.generation}"):
        open_checkpoint(copied)


# -- small files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b'{"name": "emim', b"[1, 2]", b"null", b"\xff\xfe{\x00}\x00", b"{}"])
def test_damaged_arguments_are_named(content: bytes, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "args.json").write_bytes(content)
    assert ended(lambda: cli.main(["knn", str(copied)])) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "args.json" in line


ROW = {"schema": 1, "stage": "pretrain", "name": "emim", "method": "emim", "seed": 0, "config_hash": "x"}


@pytest.mark.parametrize(
    "odd", ["null", "12", "[]", '"row"', '{"schema": 1}', json.dumps(ROW | {"metrics": {"a": "b"}})]
)
def test_rows_that_are_none_are_named(odd: str, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(ROW)}\n{odd}\n")
    with refused("rows.damaged", "rows.jsonl:2: "):
        rows.read(tmp_path / "rows.jsonl")


def test_rows_of_another_editor(tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{json.dumps(ROW)}\r\n\r\n{json.dumps(ROW | {'seed': 1})}\r\n".encode())
    assert [row["seed"] for row in rows.read(path)] == [0, 1]
    path.write_text(json.dumps(ROW), encoding="utf-16")
    with refused("file.encoding", "rows.jsonl", "not UTF-8"):
        rows.read(path)
    path.write_text(json.dumps(ROW) + "\n" + json.dumps(ROW)[:20] + "\n")
    with pytest.warns(UserWarning, match=r"rows\.jsonl:2: passed over"):
        assert len(rows.read(path)) == 1


def test_damaged_features_are_named(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "run.pt").write_bytes(b"cut")
    with refused("features.damaged", "run.pt"):
        Features.load(tmp_path / "run.pt")


def test_what_is_written_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "table.md"
    files.write_text(path, "first")

    def fail() -> None:
        with files.whole(path) as unfinished:
            unfinished.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_text() == "first"
    assert [found.name for found in tmp_path.iterdir()] == ["table.md"]


# -- disks and folders -------------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_line(trained: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the checkpoint of some 90 MB does not fit."""
    stored = OmegaConf.create(json.loads((trained / "args.json").read_text()))
    stored.checkpoint.dir = str(tmp_path / "runs")
    OmegaConf.save(stored, tmp_path / "run.yaml")
    command = ["pretrain", "--config-path", tmp_path, "--config-name", "run", "hydra.output_subdir=null"]
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10**7, 10**7))"
    found = processes.command(*command, f"hydra.run.dir={tmp_path}", prepare=limit)
    assert found.returncode == 2
    assert found.stderr.strip().splitlines()[-1].startswith("emim-solo: cannot write"), found.stderr
    assert "Traceback" not in found.stderr


def test_a_folder_that_cannot_be_written_is_said_before_images_are_read(
    make_cfg: MakeCfg, tmp_path: Path, few_digits: Path, refused: Refused
) -> None:
    broken = shutil.copytree(few_digits, tmp_path / "broken") / "train" / "0"
    for image in broken.iterdir():
        image.write_bytes(b"would fail, if it were read")
    (tmp_path / "file").touch()
    for place in ("file", "file/below"):
        run = prepare(make_cfg(checkpoint__dir=str(tmp_path / place), data__train_path=str(broken.parent)))
        with refused("checkpoint.dir", "cannot write to"):
            pretrain(run)
    with refused("disk.full", "checkpoint.dir", "MB left"):
        files.writable_folder(tmp_path, "checkpoint.dir", needed=10**18)
    with refused("--output", "cannot write to"):
        files.writable_folder(tmp_path / "file", "--output")


# -- names -------------------------------------------------------------------------------------------------------------

BAD_NAMES = ["my/run", "..", ".hidden", "", " ", "a\\b", "a\nb", "{}", "x" * 200, "-x", "a:b"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_would_be_paths(name: str, make_cfg: MakeCfg, refused: Refused, tmp_path: Path) -> None:
    with refused("name", "becomes a file name"):
        prepare(make_cfg(name=name))
    from emim_solo.benchmark.plan import make_plan

    with refused("methods", "becomes a file name"):
        make_plan(OmegaConf.create({"dir": str(tmp_path), "pretrain": "pretrain/digits", "methods": {name: {}}}))


def test_names_that_may_be(make_cfg: MakeCfg) -> None:
    for name in ("emim-digits", "Zahlen größer 5", "a$b$", "v1.2+x", "b=4"):
        assert prepare(make_cfg(name=name)).config.name == name


def test_two_runs_that_are_called_the_same_are_told_apart_by_their_folders(
    trained: Path, copied: Path, refused: Refused
) -> None:
    names = commands.distinct_names([open_checkpoint(trained), open_checkpoint(copied)])
    assert len(set(names)) == 2
    assert all(name.startswith("emim-digits-") and name.endswith("-emim-0") for name in names)
    for name in names:
        files.check_name("name", name)
    with refused("checkpoint.twice", "named twice"):
        commands.distinct_names([open_checkpoint(trained), open_checkpoint(trained / ".." / "0")])


def test_numbers_that_an_evaluation_cannot_take_are_refused_before_features(trained: Path, refused: Refused) -> None:
    for main, arguments in (
        (commands.knn_main, ["-k", "0"]),
        (commands.knn_main, ["--temperature", "0"]),
        (commands.umap_main, ["--limit", "0"]),
        (commands.umap_main, ["--seed", "-1"]),
    ):
        with refused(None, arguments[1], "expected"):
            main([str(trained), *arguments])


# -- settings left from another config ---------------------------------------------------------------------------------

LARS = {"clip_lr": True, "eta": 0.02, "exclude_bias_n_norm": True, "momentum": 0.8}


@pytest.mark.parametrize(
    ("name", "kept"), [("adamw", set()), ("adam", set()), ("sgd", {"momentum"}), ("lars", set(LARS))]
)
def test_keys_of_the_old_optimizer_are_left_out_and_named(
    name: str, kept: set[str], make_cfg: MakeCfg, built_to_step: Any
) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        cfg = prepare(make_cfg(optimizer__name=name, optimizer__kwargs=dict(LARS))).config
    assert kept == set(LARS) & set(cfg.optimizer.kwargs)
    assert all(cfg.optimizer.kwargs[key] == LARS[key] for key in kept)
    named = [str(warning.message) for warning in said if "another optimizer" in str(warning.message)]
    assert len(named) == (name != "lars")
    assert all(key in named[0] for key in set(LARS) - kept if named)
    assert built_to_step(cfg).configure_optimizers()


@pytest.mark.parametrize(
    ("changes", "key", "expected"),
    [
        ({"optimizer__kwargs": {"momentun": 0.9}}, "optimizer.kwargs", "momentun is no setting of adamw"),
        ({"optimizer__kwargs": {"betas": [2, 3]}}, "optimizer.kwargs", "beta"),
        ({"optimizer__kwargs": [0.9]}, "optimizer.kwargs", "by name"),
        ({"scheduler__name": "step"}, "scheduler.lr_decay_steps", "epochs"),
        ({"scheduler__interval": "week"}, "scheduler.interval", "step, epoch"),
        ({"optimizer__batch_size": 1}, "optimizer.batch_size", "at least 2"),
    ],
)
def test_settings_that_do_not_fit(
    changes: dict[str, Any], key: str, expected: str, make_cfg: MakeCfg, refused: Refused
) -> None:
    with refused(key, expected):
        prepare(make_cfg(**changes))


def test_linear_refuses_keys_that_it_does_not_know(trained: Path, refused: Refused) -> None:
    for setting, message in (
        ("max_epoch=1", "'max_epochs'"),
        ("optimizer.learning_rate=1", "optimizer.learning_rate"),
        ("finetune=True", "finetune"),
        ("optimizer=adam", "settings"),
    ):
        with refused(setting.partition("=")[0], message):
            commands.linear_main([str(trained), setting])


def test_linear_takes_every_optimizer_of_the_suites_linear_model(trained: Path, refused: Refused) -> None:
    suite = load_suite()
    for name in suite.linear_optimizers:
        settings = [f"optimizer.name={name}", "max_epochs=1", "scheduler.name=none"]
        commands.linear_main([str(trained), *settings])
        row = rows.read(trained.parent.parent / "rows.jsonl")[-1]
        assert row["settings"]["optimizer"]["name"] == name
        assert 0 <= row["metrics"]["acc1"] <= 100
    for name in set(suite.optimizers) - set(suite.linear_optimizers):
        with refused("optimizer.name", name, "one of"):
            complete_settings({"optimizer": {"name": name}})
