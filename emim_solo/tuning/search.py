"""What ``emim-solo tune`` searches, and by what: keys of a config, in Hydra's grammar of sweeps.

That is how Hydra's own plugin hydra-optuna-sweeper reads it; the plugin pins optuna<3, so Optuna is asked directly.
"""

from __future__ import annotations

import difflib
import inspect
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, Transformer
from hydra.errors import HydraException
from lightning.pytorch import Trainer
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from emim_solo.ground import compare, configs, files
from emim_solo.ground.errors import UsageError
from emim_solo.images.folders import Listings
from emim_solo.suite import as_dict
from emim_solo.training.run import Run, prepare

SAMPLERS = ("TPESampler", "RandomSampler", "GPSampler")
PRUNERS = (
    "MedianPruner",
    "PercentilePruner",
    "SuccessiveHalvingPruner",
    "HyperbandPruner",
    "ThresholdPruner",
    "NopPruner",
)
_NOT_SEARCHED = ("score", "data", "hydra", *compare.NOT_HASHED)


@dataclass(frozen=True)
class Search:
    """A config, and the keys of it that are searched.

    Attributes:
        folder: of the config.
        config: its name.
        fixed: overrides of every trial, as typed.
        params: what is searched, by key.
        trials: how many, whatever becomes of them.
        sampler: of ``optuna.samplers``: a name, or a mapping of it to its arguments.
        pruner: of ``optuna.pruners``, the same; None gives the default, ``none`` stops no trial.
        seed: of the sampler.
    """

    folder: Path
    config: str
    fixed: tuple[str, ...]
    params: Mapping[str, Override]
    trials: int
    sampler: Any
    pruner: Any
    seed: int
    listings: Listings = field(default_factory=Listings)

    @staticmethod
    def read(config_path: str, config: str, name: str | None, overrides: Sequence[str]) -> Search:
        """A search from a YAML file and the command line, of which the latter decides.

        Args:
            config_path: folder of the config, or a shipped one.
            config: its name.
            name: of the file, or of a shipped one. None takes the shipped ``default``, and its ``params`` only if
                ``overrides`` search nothing.
            overrides: in Hydra's grammar: sweeps are searched, all else is the same in every trial.

        Raises:
            UsageError: no such folder or file, an unknown key in it, a wrong value, or nothing to search.
        """
        given = _parsed(overrides)
        settings = _read_settings(name or "default")
        from_file = [
            f"{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in settings.pop("params").items()
        ]
        if name is not None or not any(override.is_sweep_override() for override in given.values()):
            given = _parsed(from_file) | given
        params = {key: override for key, override in given.items() if override.is_sweep_override()}
        if not params:
            raise UsageError(
                "nothing to search: expected keys with ranges, as in 'optimizer.lr=tag(log, interval(1e-3, 1e-1))', "
                "in params of --search or after the options"
            )
        fixed = tuple(str(override.input_line) for key, override in given.items() if key not in params)
        search = Search(configs.find(config_path), config.removesuffix(".yaml"), fixed, params, **settings)
        for key in params:  # each of them can be read, before any other work
            search.distribution(key)
            if key.split(".")[0] in _NOT_SEARCHED:
                raise UsageError(
                    f"{key} cannot be searched: trials differ in their recipe, not in images, scoring or names; "
                    "give it one value"
                )
        return search

    def compose(self, values: Mapping[str, Any]) -> DictConfig:
        """The config of a trial as its user would have written it.

        Raises:
            UsageError: Hydra cannot compose it.
        """
        try:
            with initialize_config_dir(str(self.folder), version_base="1.2"):
                groups = GlobalHydra.instance().config_loader()
                # A key that the suite fills in is not in the YAML; one that nobody knows is refused beforehand.
                chosen = [
                    f"{'' if groups.get_group_options(key) else '++'}{key}={value}" for key, value in values.items()
                ]
                cfg = compose(self.config, overrides=[*self.fixed, *chosen])
        except (HydraException, OmegaConfBaseException) as error:
            raise UsageError(" ".join(str(error).split())) from error
        OmegaConf.set_struct(cfg, False)
        OmegaConf.update(cfg, "score.enabled", True, force_add=True)
        return cfg

    def complete(self, values: Mapping[str, Any], folder: Path, number: int) -> Run:
        """The run of a trial, its checkpoints in ``folder``.

        Raises:
            UsageError: as :func:`~emim_solo.training.pretraining.prepare`, or more than one device.
        """
        cfg = self.compose(values)
        cfg.name = f"{cfg.name}-trial{number}"
        kept = {"enabled": True, "dir": str(folder), "frequency": 1, "keep_prev": False}
        cfg.checkpoint = {**(cfg.get("checkpoint") or {}), **kept}
        if cfg.get("resume_from_checkpoint") is not None:
            raise UsageError("resume_from_checkpoint: trials start afresh, or go on from their own; leave it out")
        run = prepare(cfg, self.listings)
        if run.processes > 1:
            raise UsageError(
                f"devices={run.config.devices}, num_nodes={run.config.num_nodes}: a trial runs on one device; set devices=1, and "
                "start the command several times on the same folder, with another CUDA_VISIBLE_DEVICES each"
            )
        return run

    def check(self) -> DictConfig:
        """Check every key, and both ends of every range, each with the first values of the others.

        Returns:
            The complete config of the first values.

        Raises:
            UsageError: a key that the config does not have, or a value that it does not take.
        """
        written = self.compose({})
        first = {key: self.ends(key)[0] for key in self.params}
        known = {key: value for key, value in first.items() if _has(written, key)}
        base = self.complete(known, Path(), 0).config
        of_trainer = inspect.signature(Trainer.__init__).parameters
        for key in self.params:
            # What optimizer and backbone take is checked by themselves.
            free = key in of_trainer or key.rpartition(".")[0].endswith(".kwargs")
            if not (free or key in known or _has(base, key)):
                near = difflib.get_close_matches(key, compare.leaves(as_dict(base)), n=3, cutoff=0.0)
                raise UsageError(f"the config has no {key} to search: did you mean {', '.join(near)}?")
        if known != first:
            base = self.complete(first, Path(), 0).config
        for key in self.params:
            for value in self.ends(key)[1:]:
                try:
                    self.complete({**first, key: value}, Path(), 0)
                except UsageError as error:
                    raise UsageError(f"{self.params[key].input_line}: {error}") from error
        return base

    def ends(self, key: str) -> list[Any]:
        """The ends of a range, or all choices."""
        distribution = self.distribution(key)
        if isinstance(distribution, CategoricalDistribution):
            return list(distribution.choices)
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        return [distribution.low, distribution.high]

    def distribution(self, key: str) -> BaseDistribution:
        """A sweep of Hydra's as a distribution of Optuna's; the end of ``range`` is left out, as in Hydra.

        Raises:
            UsageError: an empty range, or one that cannot be logarithmic.
        """
        override = self.params[key]
        sweep = override.value()
        log = "log" in getattr(sweep, "tags", ())
        kind: Any = FloatDistribution
        try:
            if isinstance(sweep, IntervalSweep):
                low, high = sweep.start, sweep.end
                if isinstance(low, int) and isinstance(high, int):
                    kind = IntDistribution
                if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
                    raise ValueError("an end is not finite")
                return kind(low, high, log=log)
            if log:
                raise ValueError("log is for interval")
            if override.is_range_sweep():
                values: list[Any] = sorted(override.sweep_iterator())  # type: ignore[type-var]
                if not values:
                    raise ValueError("the range is empty")
                step = values[1] - values[0] if len(values) > 1 else 1
                if all(isinstance(value, int) for value in values):
                    kind = IntDistribution
                return kind(values[0], values[-1], step=step)
            choices: list[Any] = list(override.sweep_iterator(transformer=Transformer.encode))
            return CategoricalDistribution(choices)
        except (ValueError, HydraException) as error:
            raise UsageError(
                f"{override.input_line}: {error}; expected choice(a, b, ...), range(start, stop, step), "
                "interval(low, high), int(interval(low, high)) or tag(log, interval(low, high))"
            ) from error

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        """The values of a trial: new ones, or those that it had before it was killed."""
        values: dict[str, Any] = {}
        for key in self.params:
            given: Any = self.distribution(key)
            if isinstance(given, CategoricalDistribution):
                values[key] = trial.suggest_categorical(key, given.choices)
            else:
                ask: Any = trial.suggest_int if isinstance(given, IntDistribution) else trial.suggest_float
                values[key] = ask(key, given.low, given.high, step=given.step, log=given.log)
        return values

    def make_sampler(self, number: int) -> Any:
        """The sampler of one trial, seeded by its number: several processes, or one after a kill, never draw alike."""
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        return _of_optuna(optuna.samplers, "sampler", self.sampler, SAMPLERS, seed=seed)

    def make_pruner(self, max_epochs: int) -> Any:
        """The pruner; a step of its is an epoch."""
        pruner = "NopPruner" if self.pruner == "none" else self.pruner
        if pruner is None:
            pruner = {"MedianPruner": {"n_startup_trials": 5, "n_warmup_steps": max_epochs // 3}}
        return _of_optuna(optuna.pruners, "pruner", pruner, PRUNERS)


def _read_settings(name: str) -> dict[str, Any]:
    """``trials``, ``sampler``, ``pruner``, ``seed`` and ``params`` of a YAML file."""
    path = configs.file_or_shipped(name, "tune", "search")
    defaults: dict[str, Any] = {"trials": 20, "sampler": "TPESampler", "pruner": None, "seed": 0, "params": {}}
    try:
        given = yaml.safe_load(files.read_text(path)) or {}
    except yaml.YAMLError as error:
        raise UsageError(f"search '{path}' is no YAML ({' '.join(str(error).split())})") from error
    if not isinstance(given, dict) or given.keys() - defaults.keys():
        odd = ", ".join(map(str, given.keys() - defaults.keys())) if isinstance(given, dict) else type(given).__name__
        raise UsageError(f"search '{path}': unknown {odd}: expected {', '.join(defaults)}")
    settings: dict[str, Any] = defaults | given
    if not isinstance(settings["params"], dict):
        raise UsageError(f"search '{path}': params: expected keys of a config, each with a range")
    for key, least in (("trials", 1), ("seed", 0)):
        if type(settings[key]) is not int or settings[key] < least:
            raise UsageError(f"search '{path}': {key}={settings[key]}: expected a whole number of at least {least}")
    return settings


def _parsed(overrides: Sequence[str]) -> dict[str, Override]:
    """Overrides by their keys; the last of a key counts."""
    found, parser = {}, OverridesParser.create()
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            raise UsageError(f"'{text}': {' '.join(str(error).split())}") from error
        found[override.key_or_group] = override
    return found


def _has(cfg: DictConfig, key: str) -> bool:
    """Whether a config has a key, with a value or without."""
    parent, _, last = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    if isinstance(node, ListConfig):
        return last.isdecimal() and int(last) < len(node)
    return isinstance(node, DictConfig) and last in node.keys()  # noqa: SIM118 - ??? counts


def _of_optuna(module: Any, key: str, given: Any, names: Sequence[str], **arguments: Any) -> Any:
    name, own = given, dict[str, Any]()
    if isinstance(given, dict) and len(given) == 1:
        name, own = next((name, own or {}) for name, own in given.items())
    if name not in names:
        raise UsageError(f"{key}={given}: expected one of {', '.join(names)}, or a mapping of it to its arguments")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return getattr(module, name)(**(arguments | own))
    except (TypeError, ValueError, ImportError) as error:
        raise UsageError(f"{key}={given}: Optuna does not take it ({error})") from error
