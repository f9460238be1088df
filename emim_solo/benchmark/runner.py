"""Runs a plan stage by stage. Each finished stage writes a row; a stage that has a row is not run again.

Each stage reads its inputs from disk, so the order of starts and kills does not change the results.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from emim_solo.benchmark.cost import Cost, measure
from emim_solo.benchmark.plan import Entry, Plan, make_plan
from emim_solo.benchmark.pretrain_one import DIVERGED
from emim_solo.checkpoints.opening import Checkpoint, open_checkpoint
from emim_solo.emim.measures import diagnose, spectrum
from emim_solo.evaluation.commands import evaluation_row
from emim_solo.evaluation.features import Features, extract_features
from emim_solo.evaluation.knn import knn
from emim_solo.evaluation.linear import linear, logistic
from emim_solo.evaluation.score import SeenViews, score_checkpoint, see
from emim_solo.evaluation.umap import make_pictures
from emim_solo.ground import files
from emim_solo.ground.errors import UsageError, memory_in_one_line
from emim_solo.ground.stopping import Stopped
from emim_solo.images.folders import differing_images
from emim_solo.report.page import ROWS, spectrum_file, write_report
from emim_solo.results import rows
from emim_solo.results.tables import differences, evaluation_stages, headline, to_text
from emim_solo.suite import as_dict, load_suite
from emim_solo.suite.api import device_of
from emim_solo.training.pretraining import pretrain

_OF_FEATURES = ("knn", "logistic", "linear", "umap")  # stages that use the features on disk
EVALUATION_SHARE = 0.2
"""Usual time of the evaluation over that of the pretraining: 9 to 34 % in the rows of docs/results."""


def run_benchmark(cfg: DictConfig) -> None:
    """``emim-solo benchmark``: make all missing stages, then tables and report. With --multirun, only the runs.

    Raises:
        UsageError: an error in the config; or an error in a run, raised after the other runs were made.
    """
    plan = make_plan(cfg)
    runner = Runner(plan)
    runner.say_how_long()
    runner.make_runs()
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        print(f"{len(plan.runs)} run(s) done; rows in '{plan.folder / ROWS}'. Once all jobs are through, run the same")
        print("command without --multirun for the UMAP pictures, the table and the report.")
    else:
        runner.make_pictures()
        runner.finish()
    if runner.problems:
        raise UsageError("benchmark.runs", "; ".join(runner.problems))


class Runner:
    """Carries out one plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.rows = rows.NewestRows(plan.folder / ROWS)
        self.problems: list[str] = []
        self.forecast: dict[str, float] = {}  # expected seconds by stage
        self.costs: dict[str, Cost] = {}
        self.made = 0
        # the diagnostics take two views
        self.protocol = plan.protocol if plan.settings["score"] else replace(plan.protocol, views=2)
        self.start = time.perf_counter()
        files.writable_folder(plan.folder, "dir")
        self._check_images()
        self.waiting = [
            stage for run in plan.runs for stage in ("pretrain", *self._stages(run)) if not self._is_done(run, stage)
        ]
        self.waiting += [] if self._pictures_done() else ["umap"]

    def _check_images(self) -> None:
        """Refuse a folder whose rows are of other images than those on disk now."""
        ours, planned = self.plan.runs[0].run.images.record, {(run.name, run.seed) for run in self.plan.runs}
        for row in (row for row in self.rows.pretrained() if (row["name"], row["seed"]) not in planned):
            if changed := differing_images(row.get("images") or {}, ours):
                other = f"'{self.rows.path}' has {row['name']} seed {row['seed']} of other images: {', '.join(changed)}"
                raise UsageError("rows.mixed", f"{other}; take another dir, or move the file away")
        for run in self.plan.runs:
            recorded = self._rows_of(run).get("pretrain", {}).get("images", {})
            if changed := differing_images(recorded, run.run.images.record):
                other = f"'{self.rows.path}' has {run.title} of other images: {', '.join(changed)}"
                raise UsageError("images.changed", f"{other}; put them back, or take another dir")

    def _stages(self, run: Entry) -> tuple[str, ...]:
        return evaluation_stages(run.cfg, scored=bool(self.plan.settings["score"]))

    def _rows_of(self, run: Entry) -> Mapping[str, Mapping[str, Any]]:
        """Newest row of each stage of a run, with this config."""
        return self.rows.of_run(run.name, run.seed, run.config_hash)

    def _diverged(self, run: Entry) -> bool:
        return bool(self._rows_of(run).get("pretrain", {}).get("failed"))

    def _is_done(self, run: Entry, stage: str) -> bool:
        row = self._rows_of(run).get(stage)
        is_made = row is not None and (stage == "pretrain" or row.get("settings") == self._settings(run, stage))
        return is_made or self._diverged(run)

    def _settings(self, run: Entry, stage: str) -> dict[str, Any]:
        """Settings, besides the pretraining, that decide a stage's results, in the types that JSON returns."""
        settings = dict(self.plan.settings.get(stage, {}))  # the logistic regression has none
        if self.plan.views is not None and stage in _OF_FEATURES:
            settings["views"] = self.plan.views
        if stage == "umap":
            settings["runs"] = [other.version for other in self._pictured()]
        return dict(json.loads(json.dumps(settings)))

    # -- how long it takes --------------------------------------------------------------------------------------

    def _cost(self, run: Entry) -> Cost:
        """The cost of a method on this machine, measured once."""
        if run.name not in self.costs:
            self.costs[run.name] = measure(run.run, steps=self.plan.settings["diagnostics"]["steps"])
        return self.costs[run.name]

    def say_how_long(self) -> None:
        """Print a forecast of the time from timed steps of each new method. Diagnostics rows record these times, too."""
        new = [run for run in self.plan.runs if not self._is_done(run, "pretrain")]
        if not new:
            return
        try:
            seconds = sum(self._cost(run).epoch_seconds * run.cfg.max_epochs for run in new)
        except Exception as error:  # the run of that method will report the error
            print(
                f"How long this takes is not known: the first training steps raised {type(error).__name__}", flush=True
            )
            return
        epochs = sum(run.cfg.max_epochs for run in new)
        evaluation = [stage for stage in self.waiting if stage != "pretrain"]
        self.forecast = dict.fromkeys(evaluation, EVALUATION_SHARE * seconds / max(1, len(evaluation)))
        self.forecast["pretrain"] = seconds / len(new)
        print(
            f"About {_human(seconds)} of pretraining on this machine, by steps timed just now: {len(new)} "
            f"run{'s' if len(new) > 1 else ''}, {epochs} epochs of {_human(seconds / epochs)} in all; evaluation usually "
            "takes a tenth to a third of that more",
            flush=True,
        )

    @contextmanager
    def _announced(self, stage: str, title: str) -> Iterator[None]:
        """Print one line before a stage: time spent, time left, and the stage. Its time improves the forecast."""
        start = time.perf_counter()
        spent = tqdm.format_interval(start - self.start)
        left = "time left not known yet"
        if self.forecast.keys() >= set(self.waiting):
            left = f"about {tqdm.format_interval(sum(map(self.forecast.__getitem__, self.waiting)))} left"
        print(f"{spent} so far, {left}: {title}", flush=True)
        yield
        self.made += 1
        seconds = time.perf_counter() - start
        self.forecast[stage] = (seconds + self.forecast.get(stage, seconds)) / 2
        if stage in self.waiting:
            self.waiting.remove(stage)
        gc.collect()

    # -- runs ---------------------------------------------------------------------------------------------------

    def make_runs(self) -> None:
        """Pretrain and evaluate every run. An error in one run is recorded, and the others are still made."""
        for run in self.plan.runs:
            try:
                with memory_in_one_line():
                    self._stage(run, "pretrain", partial(self._pretrain, run))
                    if not self._diverged(run):
                        self._evaluate(run)
            except UsageError as error:
                self.problems.append(f"{run.title}: {error}")
                print(f"! {run.title}: {error}", file=sys.stderr)

    def _stage(self, run: Entry, stage: str, work: Callable[[], dict[str, Any] | None]) -> None:
        if self._is_done(run, stage):
            return
        with self._announced(stage, f"{run.title}: {stage}"):
            row = work()
            if row is not None:
                rows.append(self.rows.path, row)

    def _pretrain(self, run: Entry) -> dict[str, Any] | None:
        """Pretrain a run. Returns the row of a run that diverged, so it is not tried again; else ``pretrain`` wrote the row."""
        try:
            if len(run.cfg.devices) > 1:
                self._pretrain_apart(run)
            else:
                pretrain(run.run, version=run.version)
            for path in self.plan.folder.glob(f"features/{run.version}*.pt"):  # of an earlier training
                path.unlink()
            return None
        except FloatingPointError as error:
            print(f"! {run.title}: {error}", file=sys.stderr)
            config = as_dict(run.cfg)
            row = rows.new_row(
                "pretrain",
                config=config,
                suite=load_suite().identity,
                device="gpu" if torch.cuda.is_available() else "cpu",
                epochs=0,
                seconds=0.0,
                checkpoint=str(self._folder(run)),
                metrics={},
                failed=str(error),
            )
            return row | {"config": config}

    def _pretrain_apart(self, run: Entry) -> None:
        """Pretrain on several devices in a new process: Lightning starts the others with the command of the first."""
        config = self.plan.folder / f"{run.version}.yaml"
        OmegaConf.save(run.composed, config)
        command = [sys.executable, "-m", "emim_solo.benchmark.pretrain_one", str(config), run.version]
        # In a job of SLURM, Lightning would expect one task for each device.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        with subprocess.Popen(command, env=environment) as process:
            try:
                code = process.wait()
            except Stopped:
                process.terminate()  # it ends the other processes of the run
                raise
            finally:
                config.unlink()
        if code == DIVERGED:
            raise FloatingPointError("the training loss is NaN or infinite: see above")
        if code:
            raise UsageError(
                "benchmark.runs", f"pretraining on {len(run.cfg.devices)} devices ended with status {code}; see above"
            )

    def _folder(self, run: Entry) -> Path:
        return self.plan.folder / run.cfg.method / run.version

    def _features(self, run: Entry) -> Features:
        """Features of a run, computed once and stored on disk."""
        of_views = "" if self.plan.views is None else f"-views{self.plan.views}"
        path = self.plan.folder / "features" / f"{run.version}{of_views}.pt"
        if path.is_file():
            return Features.load(path)
        features = extract_features(self._checkpoint(run), views=self.plan.views)
        features.save(path)
        return features

    def _checkpoint(self, run: Entry) -> Checkpoint:
        folder = self._folder(run)
        if not folder.is_dir():
            again = f"put it back, or remove its rows from '{self.rows.path}' to train it again"
            raise UsageError("checkpoint.gone", f"its checkpoint folder '{folder}' is gone: {again}")
        return open_checkpoint(folder)

    def _evaluate(self, run: Entry) -> None:
        stages = self._stages(run)
        if all(self._is_done(run, stage) for stage in stages):
            return
        features, device, settings = self._features(run), device_of(run.cfg), self.plan.settings
        row = partial(self._row, run)
        seen = cache(lambda: see(self._checkpoint(run), self.protocol))  # diagnostics and score share it
        work: dict[str, Callable[[], dict[str, Any]]] = {
            "knn": lambda: row("knn", lambda: knn(features, **settings["knn"], device=device)),
            "logistic": lambda: row("logistic", lambda: logistic(features, device=device)),
            "linear": lambda: row("linear", lambda: linear(features, run.cfg, settings["linear"], seed=run.seed)),
            "diagnostics": lambda: self._diagnosed(run, seen()),
            "score": lambda: score_checkpoint(self._checkpoint(run), self.protocol, neighbours=False, seen=seen()),
        }
        for stage in stages:
            self._stage(run, stage, work[stage])

    def _row(self, run: Entry, stage: str, evaluate: Callable[[], Mapping[str, float]]) -> dict[str, Any]:
        start = time.perf_counter()
        metrics = evaluate()
        epochs = self._rows_of(run)["pretrain"]["epochs"]  # fewer than planned if score.patience ended the run
        return evaluation_row(stage, run.cfg, self._folder(run), metrics, start, self._settings(run, stage), epochs)

    def _diagnosed(self, run: Entry, seen: SeenViews) -> dict[str, Any]:
        images = min(self.plan.settings["diagnostics"]["images"], *map(len, seen.parts.values()))
        row = self._row(run, "diagnostics", partial(self._diagnose, run, seen, images))
        return row | {"protocol": self.protocol.hash, "images": images, "of": seen.of}

    def _diagnose(self, run: Entry, seen: SeenViews, images: int) -> dict[str, float]:
        """Diagnostics of backbone and projector. Spectra go to a file, since rows hold only single numbers."""
        metrics: dict[str, float] = {}
        spectra: dict[str, list[float]] = {}
        for part, features in seen.parts.items():
            first, second = features[:images, 0], features[:images, 1]
            settings: Any = {"noise_variance": self.protocol.noise_variance, "seed": self.protocol.seed}
            metrics |= {f"{part}_{name}": value for name, value in diagnose(first, second, **settings).items()}
            if torch.isfinite(first).all():
                spectra[part] = [float(f"{value:.5g}") for value in spectrum(first)]
        path = spectrum_file(self.plan.folder, run.name, run.seed)
        path.parent.mkdir(exist_ok=True)
        files.write_text(path, json.dumps(spectra))
        if run.seed == self.plan.runs[0].seed:  # the cost of a step does not depend on the seed
            metrics |= self._cost(run).metrics
        return metrics

    # -- all methods together -----------------------------------------------------------------------------------

    def _pictured(self) -> list[Entry]:
        """The runs of the first seed that have not diverged, one per method."""
        first = self.plan.runs[0].seed
        return [run for run in self.plan.runs if run.seed == first and not self._diverged(run)]

    def _pictures_done(self) -> bool:
        enabled = self.plan.settings["umap"]["enabled"]
        return not enabled or all(self._is_done(run, "umap") for run in self._pictured())

    def make_pictures(self) -> None:
        """UMAP of all methods, once every run was made without error."""
        if self.problems or self._pictures_done():
            return
        settings, runs = self.plan.settings["umap"], self._pictured()
        try:
            with self._announced("umap", "all methods: umap"):
                metrics = make_pictures(
                    {run.name: self._features(run) for run in runs},
                    runs[0].cfg,
                    runs[0].run.images,
                    self.plan.folder / "umap",
                    seed=settings["seed"],
                    limit=settings["images"],
                    run_seed=runs[0].seed,
                )
                for run in runs:
                    rows.append(self.rows.path, self._row(run, "umap", partial(metrics.__getitem__, run.name)))
        except UsageError as error:
            self.problems.append(f"umap: {error}")

    def finish(self) -> None:
        """Print the table, write the report, and list the files. Does nothing if no run was trained."""
        if not any("pretrain" in self._rows_of(run) for run in self.plan.runs):
            return
        written = write_report(self.plan.folder)
        print(f"\n{to_text(headline(written.results))}\n")
        paired = differences(written.results)
        if paired.lines:
            print(f"{to_text(paired)}\n")
        spent = tqdm.format_interval(time.perf_counter() - self.start)
        runs, pictures = len(self.plan.runs), self.plan.folder / "umap"
        print(
            f"{runs} run{'s' if runs > 1 else ''}, {self.made} stages made in {spent}: rows '{self.rows.path}', tables "
            f"'{written.markdown}' and '{written.latex}'" + (f", pictures '{pictures}'" if pictures.is_dir() else "")
        )
        print(f"Report: {written.html.resolve()}")


def _human(seconds: float) -> str:
    """A rounded duration, since it is an estimate."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.2g} {unit}" if seconds < 10 * length else f"{seconds / length:.0f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
