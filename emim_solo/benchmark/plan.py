"""The plan of a benchmark: which methods, with which seeds, on which equal terms."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from emim_solo import suite
from emim_solo.evaluation.knn import DISTANCES, KS, TEMPERATURE
from emim_solo.evaluation.linear import DEFAULTS as LINEAR_DEFAULTS
from emim_solo.evaluation.linear import complete_settings
from emim_solo.evaluation.score import Protocol
from emim_solo.ground import compare, configs, files
from emim_solo.ground.errors import UsageError
from emim_solo.images.folders import Listings, expand_home
from emim_solo.results.terms import deviations, undeclared
from emim_solo.training.run import Run, prepare

DEFAULTS: dict[str, Any] = {
    "dir": "runs/benchmark",
    "pretrain": "pretrain/custom",
    "methods": {
        "emim": {"config": "emim"},
        "barlow_twins": {"config": "barlow"},
        "vicreg": {"config": "vicreg"},
    },
    "only": None,
    "seeds": [0],
    "max_epochs": None,
    "run": {},
    "deviations": {},
    "knn": {"ks": list(KS), "distances": list(DISTANCES), "temperature": TEMPERATURE},
    "linear": LINEAR_DEFAULTS,
    "diagnostics": {"images": 2048, "steps": 4},
    "score": {"enabled": True, "protocol": "default"},
    "umap": {"enabled": True, "images": 2000, "seed": 0},
}
"""Every key of a benchmark's config; what each means is said in scripts/benchmark/digits.yaml."""

_METHOD_KEYS = {"config", "method", "method_kwargs", "run", "share_of_epochs"}
_SHARED_KWARGS = ("proj_hidden_dim", "proj_output_dim")


@dataclass(frozen=True)
class Entry:
    """One method with one seed.

    Attributes:
        name: of the method in this benchmark.
        seed: of this run.
        composed: its config as a user would have written it.
        run: what is decided about it, ready to train.
        config_hash: what its rows are known by.
    """

    name: str
    seed: int
    composed: DictConfig
    run: Run
    config_hash: str

    @property
    def cfg(self) -> DictConfig:
        """Its complete config."""
        return self.run.config

    @property
    def version(self) -> str:
        """Name of its folder: another config never continues from this one's checkpoints."""
        return f"{self.name}-seed{self.seed}-{self.config_hash[:6]}"

    @property
    def title(self) -> str:
        return f"{self.name} seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """All runs of a benchmark and how they are evaluated.

    Attributes:
        folder: for everything that is made.
        runs: methods by seeds, one seed of every method first.
        settings: of the evaluation stages, by stage; of the score without labels its protocol, nothing where it is not
            wanted.
    """

    folder: Path
    runs: list[Entry]
    settings: dict[str, dict[str, Any]]


def make_plan(cfg: DictConfig) -> Plan:
    """Compose and check every run before the first one starts.

    Args:
        cfg: of the benchmark, over :data:`DEFAULTS`.

    Raises:
        UsageError: an unknown key or method, a deviation from equal terms that is not declared, and whatever is
            wrong with a run's own config.
    """
    plain = _complete(cfg)
    names = _chosen(plain)
    runs: list[Entry] = []
    listings = Listings()
    by_name: dict[str, Mapping[str, Any]] = {}
    for seed in plain["seeds"]:
        # Those that another job makes are compared with too, once.
        for name in plain["methods"]:
            if name not in names and name in by_name:
                continue
            try:
                composed = _compose(name, seed, plain)
                run = prepare(composed, listings)
            except UsageError as error:
                raise UsageError(
                    error.key,
                    f"{name}: {error} (keys of the pretraining go under run, on the command line as +run.KEY=VALUE)",
                ) from error
            by_name[name] = suite.plain(run.config)
            if name in names:
                runs.append(Entry(name, seed, composed, run, compare.config_hash(by_name[name])))
    _check_terms(by_name, plain["deviations"])
    settings = {stage: plain[stage] for stage in ("knn", "linear", "diagnostics", "umap")}
    try:
        settings["linear"] = complete_settings(settings["linear"])
    except UsageError as error:
        raise UsageError(f"linear: {error}") from error
    try:
        score = plain["score"]
        settings["score"] = asdict(Protocol.read(str(score["protocol"]))) if score["enabled"] else {}
    except UsageError as error:
        raise UsageError(f"score: {error}") from error
    return Plan(Path(plain["dir"]), runs, settings)


def _complete(cfg: DictConfig) -> dict[str, Any]:
    given = suite.plain(cfg)
    unknown = sorted(given.keys() - DEFAULTS.keys() - {"hydra"})
    if unknown:
        raise UsageError(
            f"benchmark config: unknown {', '.join(unknown)}; expected {', '.join(DEFAULTS)}. "
            "Keys of the pretraining go under run, as in +run.optimizer.lr=0.1"
        )
    # A mapping of methods replaces the default one as a whole; all else is merged.
    base = {key: value for key, value in DEFAULTS.items() if key != "methods" or not given.get("methods")}
    merged = OmegaConf.merge(base, given)
    assert isinstance(merged, DictConfig)
    expand_home(merged)
    plain = suite.plain(merged)
    seeds = plain["seeds"]
    if isinstance(seeds, int):
        plain["seeds"] = seeds = [seeds]
    if not seeds or len(set(seeds)) < len(seeds) or not all(isinstance(seed, int) and seed >= 0 for seed in seeds):
        raise UsageError(f"seeds={seeds}: expected different whole numbers from 0 on, as in seeds=[0,1,2]")
    for name, entry in plain["methods"].items():
        files.check_name("methods", name)
        odd = sorted((entry or {}).keys() - _METHOD_KEYS)
        if odd:
            raise UsageError(f"methods.{name}: unknown {', '.join(odd)}; expected {', '.join(sorted(_METHOD_KEYS))}")
        share = (entry or {}).get("share_of_epochs")
        if share is not None and not (isinstance(share, int | float) and 0 < share <= 1):
            raise UsageError(f"methods.{name}: share_of_epochs={share}: expected a number above 0 and at most 1")
    stray = sorted(plain["deviations"].keys() - plain["methods"].keys())
    if stray:
        raise UsageError(f"deviations: no method is named {', '.join(stray)}; there are {', '.join(plain['methods'])}")
    return plain


def _epochs(max_epochs: int | None, share: float | None) -> dict[str, int]:
    """Of one method: all of the benchmark's epochs, or its share of them, rounded up."""
    if max_epochs is None:
        return {}
    return {"max_epochs": max_epochs if share is None else math.ceil(max_epochs * share)}


def _chosen(plain: Mapping[str, Any]) -> list[str]:
    names = list(plain["methods"])
    only = plain["only"]
    if only is None:
        return names
    only = [only] if isinstance(only, str) else list(only)
    unknown = [name for name in only if name not in names]
    if unknown or not only:
        raise UsageError(f"only={only}: expected some of {', '.join(names)}")
    return [name for name in names if name in only]


def _compose(name: str, seed: int, plain: Mapping[str, Any]) -> DictConfig:
    """The pretraining config of one run, as its user would have written it."""
    entry = plain["methods"][name] or {}
    file = entry.get("config") or "emim"
    folder = configs.find(plain["pretrain"])
    try:
        with _hydra_at(folder):
            cfg = compose(file)
    except MissingConfigException as error:
        found = ", ".join(path.stem for path in sorted(folder.glob("*.yaml")) if not path.stem.startswith("_"))
        raise UsageError(f"methods.{name}: no '{file}.yaml' in '{folder}'; there are {found}") from error
    OmegaConf.set_struct(cfg, False)
    method = entry.get("method") or cfg.method
    if method != cfg.method:  # another method on this one's terms: of its own settings only the widths are shared
        kwargs = cfg.get("method_kwargs") or {}
        cfg.method_kwargs = {key: kwargs[key] for key in _SHARED_KWARGS if key in kwargs}
    try:
        merged = OmegaConf.merge(
            cfg,
            plain["run"],
            entry.get("run") or {},
            {"method": method, "method_kwargs": entry.get("method_kwargs") or {}},
            _epochs(plain["max_epochs"], entry.get("share_of_epochs")),
            {
                "name": name,
                "seed": seed,
                "checkpoint": {"enabled": True, "dir": plain["dir"], "frequency": 1, "keep_prev": False},
                "auto_resume": {"enabled": False},
            },
        )
    except OmegaConfBaseException as error:
        raise UsageError(f"methods.{name}: {error}") from error
    assert isinstance(merged, DictConfig)
    return merged


@contextmanager
def _hydra_at(folder: Path) -> Iterator[None]:
    """Hydra on another folder of configs, inside a Hydra application: there is one Hydra at a time."""
    instance = GlobalHydra.instance()
    outer = instance.hydra
    instance.clear()
    try:
        with initialize_config_dir(str(folder), version_base="1.2"):
            yield
    finally:
        instance.hydra = outer


def _check_terms(by_name: Mapping[str, Mapping[str, Any]], declared: Mapping[str, Any]) -> None:
    missing = undeclared(deviations(by_name), {name: list(keys or []) for name, keys in declared.items()})
    if missing:
        listed = "; ".join(f"{name}: {', '.join(keys)}" for name, keys in missing.items())
        name, keys = next(iter(missing.items()))
        raise UsageError(
            f"unequal terms: {listed}. Make them the same for all methods, or declare them to have them printed with "
            f"the results: +deviations.{name}=[{keys[0]}]"
        )
