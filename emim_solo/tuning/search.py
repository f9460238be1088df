"""What ``emim-solo tune`` searches (keys of a config, in Hydra's grammar of sweeps), and with which sampler and pruner.

Hydra's plugin hydra-optuna-sweeper reads the same grammar, but it pins optuna<3. So this module calls Optuna itself.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, RangeSweep, Transformer
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from emim_solo.ground import compare, configs
from emim_solo.ground.errors import UsageError
from emim_solo.ground.settings import checked, read, setting
from emim_solo.images.folders import Listings
from emim_solo.suite.api import in_one_line
from emim_solo.training.run import Run, composed, prepare

SAMPLERS = ("TPESampler", "RandomSampler", "GPSampler")
PRUNERS = (
    "MedianPruner",
    "PercentilePruner",
    "SuccessiveHalvingPruner",
    "HyperbandPruner",
    "ThresholdPruner",
    "NopPruner",
)
_NOT_SEARCHED = ("score", "data", *compare.NOT_HASHED)
_SET_BY_TUNE = ("auto_resume", "checkpoint", "hydra", "resume_from_checkpoint", "wandb_run_id")
_MOST = 100_000  # for an argument of a sampler or pruner: more candidates take minutes and exhaust memory
_TRIED = 12  # trials in memory: samplers draw the first ten at random and model later ones


@dataclass(frozen=True)
class Settings:
    """The keys of a search file; scripts/tune/default.yaml explains each."""

    trials: int = setting(20, least=1)
    sampler: str | dict[str, Any] = setting("TPESampler", choices=SAMPLERS)
    pruner: str | dict[str, Any] | None = setting(None, choices=("none", *PRUNERS))
    seed: int = setting(0, least=0)
    params: dict[str, Any] = setting({})


@dataclass(frozen=True)
class Search:
    """A config and the keys that are searched in it."""

    folder: Path  # of the config
    config: str  # its name
    fixed: tuple[str, ...]  # overrides of every trial, as typed
    params: Mapping[str, Override]  # searched values, by key
    settings: Settings
    listings: Listings = field(default_factory=Listings)  # of the image folders, which all trials share

    @staticmethod
    def read(
        config_path: str, config: str, name: str | None, overrides: Sequence[str], trials: int | None = None
    ) -> Search:
        """A search from a YAML file and the command line; the command line overrides the file.

        Args:
            config_path: folder of the config, or a shipped one.
            config: its name.
            name: of the search file, or of a shipped one. None takes the shipped ``default``, and its ``params`` only if
                ``overrides`` search nothing.
            overrides: in Hydra's grammar: sweeps are searched, all else is the same in every trial.
            trials: number of trials, instead of the file's.

        Raises:
            UsageError: no such folder or file, a wrong key or value in it, or nothing to search.
        """
        typed = _parsed(overrides)
        document = configs.values(name or "default", "tune", "search")
        if trials is not None:
            document["trials"] = trials
        settings = read(Settings, document, "search")
        if name is not None or not any(override.is_sweep_override() for override in typed.values()):
            values = compare.leaves(settings.params)
            lines = (f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items())
            typed = _parsed(lines) | typed
        params = {key: override for key, override in typed.items() if override.is_sweep_override()}
        if not params:
            raise UsageError("search.params", "nothing to search: give a key a range, as in optimizer.lr=choice(0.1,1)")
        for key, override in typed.items():
            section = re.split("[./]", key)[0]
            if section in _SET_BY_TUNE or (key == "score.enabled" and override.value() is not True):
                raise UsageError(key, f"{override.input_line}: a search sets {key} itself: leave it out")
            if key in params and section in _NOT_SEARCHED:
                raise UsageError(
                    key, f"{key} cannot be searched, trials differ in their recipe alone: give it one value"
                )
        fixed = tuple(str(override.input_line) for key, override in typed.items() if key not in params)
        search = Search(configs.find(config_path), config.removesuffix(".yaml"), fixed, params, settings)
        for key in params:  # a range that is no distribution fails before any other work
            search.distribution(key)
        return search

    def compose(self, values: Mapping[str, Any]) -> DictConfig:
        """The config of a trial, without added defaults; a UsageError if Hydra cannot compose it."""
        chosen = [f"{str(self.params[key].input_line).partition('=')[0]}={value}" for key, value in values.items()]
        cfg = composed(self.folder, self.config, [*self.fixed, *chosen])
        OmegaConf.update(cfg, "score.enabled", True, force_add=True)
        return cfg

    def complete(self, values: Mapping[str, Any], folder: Path, number: int) -> Run:
        """The run of a trial, with its checkpoints in ``folder``; a UsageError for a bad config or several processes."""
        cfg = self.compose(values)
        cfg.name = f"{cfg.name}-trial{number}"
        kept = {"enabled": True, "dir": str(folder), "frequency": 1, "keep_prev": False}
        cfg.checkpoint = {**(cfg.get("checkpoint") or {}), **kept}
        if cfg.get("resume_from_checkpoint") is not None:
            raise UsageError("resume_from_checkpoint", "resume_from_checkpoint: trials start afresh: leave it out")
        run = prepare(cfg, self.listings)
        if run.processes > 1:
            raise UsageError(
                "devices",
                f"devices={run.config.devices}, num_nodes={run.config.num_nodes}: a trial runs on one: set devices=1, and "
                "start the command several times, with another CUDA_VISIBLE_DEVICES each",
            )
        return run

    def check(self) -> Run:
        """Check all choices or both ends of each range, sampler and pruner (UsageError). Return the run of the first values."""
        first = {key: self.ends(key)[0] for key in self.params}
        base = self.complete(first, Path(), 0)
        for key in self.params:
            for value in self.ends(key)[1:]:
                try:
                    self.complete({**first, key: value}, Path(), 0)
                except UsageError as error:
                    raise UsageError(error.key or key, f"{self.params[key].input_line}: {error}") from error
        # Draw a few trials in memory: Optuna checks some settings only at first use, which is after several trainings.
        space = {key: self.distribution(key) for key in self.params}
        chosen = f"search.sampler={self.settings.sampler}, search.pruner={self.settings.pruner}"
        with in_one_line("search", f"Optuna draws no trials with {chosen}"):
            sampler, pruner = self.make_sampler(0), self.make_pruner(base.config.max_epochs)
            study = optuna.create_study(sampler=sampler, pruner=pruner, direction="maximize")
            for number in range(_TRIED):
                trial = study.ask(space)
                trial.report(float(number), 1)
                trial.should_prune()
                study.tell(trial, float(number))
        return base

    def ends(self, key: str) -> list[Any]:
        """The ends of a range, or all choices."""
        distribution: Any = self.distribution(key)
        if isinstance(distribution, CategoricalDistribution):
            return list(distribution.choices)
        return [distribution.low, distribution.high]

    def distribution(self, key: str) -> BaseDistribution:
        """A Hydra sweep as an Optuna distribution; a UsageError if it cannot be one.

        ``range`` excludes its end, as in Hydra.
        """
        override = self.params[key]
        sweep = override.value()
        tags: set[str] = getattr(sweep, "tags", set())
        kind: Any = FloatDistribution
        try:
            if override.is_delete() or isinstance(sweep, Glob) or getattr(sweep, "shuffle", False):
                raise ValueError("a key that is left out, a glob or a shuffle is not searched")
            if tags - {"log"} or (tags and not isinstance(sweep, IntervalSweep)):
                raise ValueError("log is for interval, and there is no other tag")
            if isinstance(sweep, IntervalSweep):
                low, high = sweep.start, sweep.end
                if isinstance(low, int) and isinstance(high, int):
                    kind = IntDistribution
                if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
                    raise ValueError("an end is not finite")
                return kind(low, high, log=bool(tags))
            if isinstance(sweep, RangeSweep):
                start, stop, step = (Decimal(str(number)) for number in (sweep.start, sweep.stop, sweep.step))
                if (count := math.ceil((stop - start) / step)) < 1:
                    raise ValueError("the range is empty")
                if all(isinstance(number, int) for number in (sweep.start, sweep.stop, sweep.step)):
                    kind = IntDistribution
                number = int if kind is IntDistribution else float
                low, high = sorted((number(start), number(start + (count - 1) * step)))
                return kind(low, high, step=number(abs(step)))
            choices: list[Any] = list(override.sweep_iterator(transformer=Transformer.encode))
            return CategoricalDistribution(choices)
        except (ValueError, ArithmeticError, HydraException) as error:
            raise UsageError(
                key,
                f"{override.input_line}: {str(error) or type(error).__name__}; expected choice(a, b, ...), "
                "range(start, stop, step), interval(low, high), int(interval(low, high)) or tag(log, interval(low, high))",
            ) from error

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        """The values of a trial: new ones, or, after a kill, those that it had before."""
        return {key: trial._suggest(key, self.distribution(key)) for key in self.params}

    def make_sampler(self, number: int) -> Any:
        """The sampler of one trial. Its number enters the seed, so parallel or restarted processes draw differently."""
        seed = int(np.random.SeedSequence([self.settings.seed, number]).generate_state(1)[0])
        return _of_optuna(optuna.samplers, "sampler", self.settings.sampler, SAMPLERS, seed=seed)

    def make_pruner(self, max_epochs: int) -> Any:
        """The pruner. One of its steps is one epoch."""
        pruner = "NopPruner" if self.settings.pruner == "none" else self.settings.pruner
        if pruner is None:
            pruner = {"MedianPruner": {"n_startup_trials": 5, "n_warmup_steps": max_epochs // 3}}
        return _of_optuna(optuna.pruners, "pruner", pruner, PRUNERS)


def _parsed(overrides: Iterable[str]) -> dict[str, Override]:
    """Overrides by key; the last one of a key counts."""
    parsed, parser = {}, OverridesParser.create()
    for text in overrides:
        try:
            # Hydra accepts null as a choice only in the short form: key=a,null.
            override = parser.parse_override(re.sub(r"=choice\((.*\bnull\b.*)\)$", r"=\1", text))
        except HydraException as error:
            raise UsageError(text.partition("=")[0], f"'{text}': {' '.join(str(error).split())}") from error
        parsed[override.key_or_group] = override
    return parsed


def _of_optuna(module: Any, key: str, choice: Any, names: Sequence[str], **arguments: Any) -> Any:
    """A sampler or pruner with its arguments. Each argument must have the type of its default."""
    name, options = next(iter(choice.items())) if isinstance(choice, Mapping) and len(choice) == 1 else (choice, {})
    if name not in names:
        raise UsageError(
            f"search.{key}", f"search.{key}={choice}: expected one of {', '.join(names)}, or {{name: arguments}}"
        )
    known = inspect.signature(getattr(module, name)).parameters
    place = f"search.{key}.{name}"
    if not isinstance(options, Mapping | None):
        raise UsageError(place, f"{place}={options}: expected its arguments by name")
    for argument, value in (options or {}).items():
        if argument in arguments or argument not in known:
            others = ", ".join(known.keys() - arguments.keys()) or "none"
            raise UsageError(f"{place}.{argument}", f"{place}.{argument} is not for a search: expected {others}")
        default = known[argument].default
        hint: Any = {str: int | str, type(None): bool | float | None, type: float}.get(type(default), type(default))
        checked(value, hint, f"{place}.{argument}", {"least": 0, "most": _MOST} if hint is int else {})
    return getattr(module, name)(**arguments, **(options or {}))
