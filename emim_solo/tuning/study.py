"""The trials of a search. Each is a pretraining with ``score.enabled=True``, and Optuna gets its scores."""

from __future__ import annotations

import fcntl
import json
import math
import shlex
import sqlite3
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState

from emim_solo.checkpoints import opening
from emim_solo.ground import compare, files
from emim_solo.ground.errors import UsageError, memory_in_one_line
from emim_solo.ground.stopping import Stopped
from emim_solo.images.folders import differing_images
from emim_solo.results import rows
from emim_solo.suite import as_dict, load_suite
from emim_solo.training.live_score import MONITOR, LiveScore, is_last_epoch
from emim_solo.training.pretraining import pretrain
from emim_solo.tuning.search import Search
from emim_solo.tuning.tables import STATES, counts, draw, ranked, row_of, short, table

_STARTS, _MOST_STARTS = "starts", 3
# An error whose key begins with one of these is not the recipe's fault. The search ends; its next start resumes the trial.
_SURROUNDINGS = ("checkpoint", "data", "disk", "images")
_MEANT_OTHERWISE = {"${": "OmegaConf", "::": "fsspec, by which Lightning writes checkpoints"}


class ReportToOptuna(Callback):
    """Tells Optuna each new score of a run, and ends the run if the pruner decides so."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (self.live,) = (callback for callback in trainer.callbacks if isinstance(callback, LiveScore))  # type: ignore[attr-defined]
        self.scorings = self.live.scorings

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.live.scorings == self.scorings:
            return
        self.scorings, epochs = self.live.scorings, trainer.current_epoch + 1
        score = float(trainer.callback_metrics[MONITOR])
        if not math.isfinite(score):
            raise FloatingPointError(f"{MONITOR} is {score} after {epochs} epochs: the features are not finite")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an epoch repeated after a kill keeps its first score
            self.trial.report(score, epochs)
        if not is_last_epoch(trainer) and self.trial.should_prune():
            raise optuna.TrialPruned


class Locks:
    """Locks in one file. The system releases a lock when its process ends for any reason.

    So a running trial with a free lock was killed, and another process resumes it at once. Optuna's heartbeat would
    wait, and could mistake a sleeping process for a dead one. The workers of a loader do not inherit lockf's locks.
    """

    def __init__(self, path: Path) -> None:
        self.file = open(path, "ab")  # noqa: SIM115 - open as long as the search

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within it, only one process counts trials and takes one, or writes the shared files. UsageError without locks."""
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX, 1, 0)
        except OSError as error:
            folder = Path(self.file.name).parent
            raise UsageError(
                "disk.locks",
                f"--output: the file system of '{folder}' has no locks ({error.strerror}), which a search needs: take a "
                "folder on a local disk, or have locks mounted (NFS: with lockd; Lustre: with flock)",
            ) from error
        try:
            yield
        finally:
            fcntl.lockf(self.file, fcntl.LOCK_UN, 1, 0)

    def take(self, number: int) -> bool:
        """Lock a trial, if no other process has it. Returns whether it is locked."""
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number + 1)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def leave(self, number: int) -> None:
        """Unlock a trial."""
        fcntl.lockf(self.file, fcntl.LOCK_UN, 1, number + 1)


class Tuning:
    """One search in one folder. Several processes may work on it at once."""

    def __init__(self, search: Search, folder: Path, command: str) -> None:
        self.search, self.folder, self.command = search, folder, command
        for text, reader in _MEANT_OTHERWISE.items():
            if text in str(folder):
                raise UsageError(
                    "--output", f"--output '{folder}': {text} means something to {reader}; take another name"
                )
        self.base = search.check()
        assert self.base.protocol is not None
        self.protocol = self.base.protocol
        files.writable_folder(folder, "--output")
        self.locks = Locks(folder / "lock")
        with self.locks.together():
            self.study = self._open()
            with _storage(folder / "study.db", StorageInternalError):
                self._check_search()

    def _open(self) -> optuna.Study:
        path = self.folder / "study.db"

        def connect() -> sqlite3.Connection:  # a URL would interpret ?, # and % of the path
            return sqlite3.connect(path, timeout=60, check_same_thread=False)  # waits while another process writes

        with _storage(path, Exception):  # SQLAlchemy and Optuna raise many types
            storage = optuna.storages.RDBStorage("sqlite:///study.db", engine_kwargs={"creator": connect})
            return optuna.create_study(
                storage=storage,
                pruner=self.search.make_pruner(self.base.config.max_epochs),
                study_name="tune",
                direction="maximize",
                load_if_exists=True,
            )

    def _check_search(self) -> None:
        """Record in the storage what comparable trials must share; refuse a folder of another search."""
        settings = {key: getattr(self.search.settings, key) for key in ("sampler", "pruner", "seed")}
        params = {key: override.get_value_string() for key, override in self.search.params.items()}
        more = {
            "search": {"params": params, **settings},
            "protocol": asdict(self.protocol),
            "solo-learn": load_suite().identity,
        }
        ours = json.loads(json.dumps({**as_dict(self.base.config), **more}, default=str))
        images, theirs = self.base.images.record, self.study.user_attrs.get("search")
        if theirs is None and any(self.folder.glob("*/trial-*/*.ckpt")):
            reason = f"'{self.folder}' has trials of a search whose study.db is gone"
            raise UsageError("search.other", f"{reason}: put it back, remove them, or take another --output")
        if theirs is None:
            self.study.set_user_attr("search", {**ours, "images": images})
            return
        of_version_0_2 = "images" not in theirs
        recorded = theirs.pop("images", {})
        # Recorded images are compared by their record, not by their path.
        moved = [f"data.{part}_path" for part in images if part in recorded]
        differing = differing_images(recorded, images)
        differing += compare.differences(theirs, ours, but=(*moved, *compare.MAY_DIFFER))
        if differing:
            raise UsageError(
                "search.other",
                f"'{self.folder}' has another search: {', '.join(differing)}; take another --output, or search the same",
            )
        if of_version_0_2:
            print(
                f"'{self.folder}' is of version 0.2, which recorded no images: its trials are assumed to have had these"
            )
            self.study.set_user_attr("search", {**theirs, "images": images})

    def run(self) -> None:
        """Run the missing trials and write the files of the search; a UsageError if no trial finished."""
        with _storage(self.folder / "study.db", StorageInternalError):
            self._run_all()

    def _run_all(self) -> None:
        if done := len(ranked(self.study)):
            print(f"going on in '{self.folder}': {done} of {self.search.settings.trials} trials are there")
        while (trial := self._next()) is not None:
            sizes = (path.stat().st_size for path in self.folder.glob("*/trial-*/*.ckpt"))
            files.writable_folder(self.folder, "--output", max(sizes, default=0))
            try:
                self._run(trial)
            except (Stopped, UsageError, OSError):
                with suppress(StorageInternalError):
                    trial.set_user_attr(_STARTS, [])  # a stop or a full disk is not the trial's fault
                raise
            with self.locks.together():
                self._write()
            self.locks.leave(trial.number)
        trials = ranked(self.study)
        print(table(trials, list(self.search.params)))
        if elsewhere := len(self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))):
            print(f"{elsewhere} more in other processes, the last of which writes what all of them found")
        elif trials[0].state != TrialState.COMPLETE:
            first = row_of(min(trials, key=lambda trial: trial.number))
            reason = first.get("reason") or first.get("state")
            raise UsageError("search.unfinished", f"no trial was finished ({counts(trials)}); trial 1: {reason}")
        else:
            with self.locks.together():
                self._write()
                draw(self.study, list(self.search.params), self.folder / "trials")
            print(f"trials in '{self.folder / 'trials.jsonl'}', picture (PNG, PDF) beside them; train with what won:")
            print(shlex.join(["emim-solo", "pretrain", "--config-path", str(self.folder), "--config-name", "best"]))

    def _next(self) -> optuna.Trial | None:
        """A trial that was killed, else a new one, else None."""
        with self.locks.together():
            trials = self.study.get_trials(deepcopy=False)
            self.study.sampler = self.search.make_sampler(len(trials))
            for trial in trials:
                if trial.state == TrialState.RUNNING and self.locks.take(trial.number):
                    return optuna.Trial(self.study, trial._trial_id)
            if sum(trial.state != TrialState.WAITING for trial in trials) >= self.search.settings.trials:
                return None
            new = self.study.ask()
            self.locks.take(new.number)
            return new

    def _run(self, trial: optuna.Trial) -> None:
        """Run one trial to its end and write its result into the storage."""
        start, values = time.perf_counter(), self.search.suggest(trial)
        number = trial.number + 1
        config = {**as_dict(self.base.config), **values}  # for a trial that is refused before its config is complete
        fields: dict[str, Any] = {"device": "gpu" if torch.cuda.is_available() else "cpu"}
        state, reason, score = TrialState.FAIL, None, math.nan
        try:
            run = self.search.complete(values, self.folder, number)
            config = as_dict(run.config)
            self._count_starts(trial, config["method"])
            with memory_in_one_line():
                row = pretrain(run, version=f"trial-{number}", more_callbacks=[ReportToOptuna(trial)])
            score = row["metrics"].get(MONITOR, math.nan)
            fields = {key: row[key] for key in ("device", "seconds", "epochs")}
            if math.isfinite(score):
                state = TrialState.COMPLETE
            else:
                reason = f"{MONITOR} is {score}: the features are not finite"
        except optuna.TrialPruned:
            state = TrialState.PRUNED
        except (UsageError, FloatingPointError, torch.linalg.LinAlgError) as error:  # LinAlgError: diverged features
            if isinstance(error, UsageError) and error.key.split(".")[0] in _SURROUNDINGS:
                raise
            reason = str(error).splitlines()[0]
        scored = self.study.get_trials(deepcopy=False)[trial.number].intermediate_values
        if state != TrialState.COMPLETE:
            score = scored[max(scored)] if scored else math.nan
        row = rows.new_row(
            "tune",
            config=config,
            suite=load_suite().identity,
            trial=number,
            state=STATES[state],
            reason=reason,
            params=values,
            checkpoint=str(self.folder / config["method"] / f"trial-{number}"),
            protocol=self.protocol.hash,
            metrics={MONITOR: score if math.isfinite(score) else None},
            **{"epochs": max(scored, default=0), "seconds": round(time.perf_counter() - start, 1), **fields},
        )
        trial.set_user_attr("row", row)
        self.study.tell(trial, score if state == TrialState.COMPLETE else None, state)
        nats = f", {score:.2f} nats" if math.isfinite(score) else ""
        drawn = ", ".join(f"{key}={short(value)}" for key, value in values.items())
        print(
            f"trial {number} of {self.search.settings.trials}: {STATES[state]}{nats}; {drawn}; {row['seconds']:.0f} s"
        )
        sys.stdout.flush()
        if reason:
            print(f"! trial {number}: {reason}", file=sys.stderr)

    def _count_starts(self, trial: optuna.Trial, method: str) -> None:
        """Refuse a trial that was killed several times without a new epoch between, e.g. for lack of memory."""
        last = opening.by_epoch(self.folder / method / f"trial-{trial.number + 1}")
        epochs = last[-1][0] + 1 if last else 0
        starts = [*trial.user_attrs.get(_STARTS, []), epochs]
        trial.set_user_attr(_STARTS, starts)
        if starts.count(epochs) > _MOST_STARTS:
            raise UsageError(
                "search.killed",
                f"killed {_MOST_STARTS} times after {epochs} epochs: give it more memory, or a smaller optimizer.batch_size",
            )

    def _write(self) -> None:
        """Write all rows and the best config anew from the storage, so that a kill cannot truncate or double them."""
        trials = ranked(self.study)
        lines = [row_of(trial) for trial in sorted(trials, key=lambda trial: trial.number) if row_of(trial)]
        files.write_text(self.folder / "trials.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        best = trials[0]
        if best.state != TrialState.COMPLETE:
            return
        # Hydra's own folders and logging are off, as in the shipped configs.
        off = [{f"override hydra/{part}_logging": "disabled"} for part in ("hydra", "job")]
        document = {
            "defaults": ["_self_", *off],
            "hydra": {"output_subdir": None, "run": {"dir": "."}},
            **as_dict(self.search.compose(row_of(best)["params"])),
        }
        command = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in self.command)
        text = (
            f"# {command}\n# Trial {best.number + 1} of {len(trials)} ({counts(trials)}): {best.value:.4f} nats of view "
            f"information by protocol {self.protocol.hash}.\n"
        )
        text += yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=10_000)
        files.write_text(self.folder / "best.yaml", text)


@contextmanager
def _storage(path: Path, errors: type[Exception]) -> Iterator[None]:
    """Within it, an error of the database becomes a UsageError."""
    try:
        yield
    except errors as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UsageError(
            "search.storage",
            f"'{path}' cannot be read or written ({reason}): make room if its disk is full, and the same command goes on; "
            "where it is no database of Optuna's, take another --output",
        ) from error
