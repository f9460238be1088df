"""The plan of a benchmark: its methods, its seeds, and the settings that all methods share (equal terms)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from emim_solo import suite
from emim_solo.evaluation.knn import KnnSettings
from emim_solo.evaluation.linear import complete_settings
from emim_solo.evaluation.protocol import VIEWS, Protocol
from emim_solo.evaluation.thumbnails import MOST_IMAGES
from emim_solo.ground import compare, configs, files
from emim_solo.ground.errors import UsageError
from emim_solo.ground.settings import read, setting
from emim_solo.images.folders import Listings, expand_home
from emim_solo.results.terms import deviations, undeclared
from emim_solo.suite.api import in_one_line
from emim_solo.training.run import Run, composed, prepare


@dataclass
class Method:
    """An entry of ``methods``: a config of the folder ``pretrain``, and changes to it."""

    config: str | None = None
    method: str | None = None
    method_kwargs: dict[str, Any] | None = None
    run: dict[str, Any] | None = None
    share_of_epochs: float | None = setting(None, above=0, most=1)


@dataclass
class Diagnostics:
    images: int = setting(2048, least=4)
    steps: int = setting(4, least=1)


@dataclass
class Score:
    enabled: bool = True
    protocol: str = "default"


@dataclass
class UMAP:
    enabled: bool = True
    images: int = setting(2000, least=5, most=MOST_IMAGES)
    seed: int = setting(0, least=0, most=2**32 - 1)


@dataclass
class Benchmark:
    """Every key of a benchmark's config; scripts/benchmark/digits.yaml explains each."""

    dir: str = "runs/benchmark"
    pretrain: str = "pretrain/custom"
    methods: dict[str, Any] = setting(
        {"emim": {"config": "emim"}, "barlow_twins": {"config": "barlow"}, "vicreg": {"config": "vicreg"}}
    )
    only: str | list[str] | None = None
    seeds: int | list[int] = setting([0], least=0, most=2**32 - 1)
    max_epochs: int | None = setting(None, least=1)
    run: dict[str, Any] | None = None
    deviations: dict[str, Any] | None = None
    views: int | None = setting(None, **VIEWS)
    knn: KnnSettings = field(default_factory=KnnSettings)
    linear: dict[str, Any] | None = None
    diagnostics: Diagnostics = field(default_factory=Diagnostics)
    score: Score = field(default_factory=Score)
    umap: UMAP = field(default_factory=UMAP)
    hydra: Any = None


_SHARED_KWARGS = ("proj_hidden_dim", "proj_output_dim")
_UNDER_RUN = " (keys of the pretraining go under run, as in +run.optimizer.lr=0.1)"


@dataclass(frozen=True)
class Entry:
    """One method with one seed."""

    name: str  # of the method in this benchmark
    seed: int
    composed: DictConfig  # its config, without the added defaults
    run: Run
    config_hash: str  # identifies its rows

    @property
    def cfg(self) -> DictConfig:
        """Its complete config."""
        return self.run.config

    @property
    def version(self) -> str:
        """Name of its folder. The hash keeps another config from resuming from these checkpoints."""
        return f"{self.name}-seed{self.seed}-{self.config_hash[:6]}"

    @property
    def title(self) -> str:
        return f"{self.name} seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """All runs of a benchmark and how they are evaluated."""

    folder: Path  # of all output
    runs: list[Entry]  # every method with the first seed, then with the next
    settings: dict[str, dict[str, Any]]  # by stage; empty for a score that is disabled
    protocol: Protocol  # of the score
    views: int | None  # per image, over which features are averaged


def make_plan(cfg: DictConfig) -> Plan:
    """Compose and check every run of a :class:`Benchmark` config before the first run starts.

    Raises:
        UsageError: an unknown key or method, unequal terms that are not declared, or an error in a run's config.
    """
    expand_home(cfg)
    with _explained(after=_UNDER_RUN):
        benchmark = read(Benchmark, cfg)
    methods = _methods(benchmark)
    seeds = _listed(benchmark.seeds)
    if not seeds or len(set(seeds)) < len(seeds):
        raise UsageError("seeds", f"seeds={seeds}: expected different whole numbers, as in seeds=[0,1,2]")
    chosen = methods if benchmark.only is None else _listed(benchmark.only)
    if not chosen or not methods.keys() >= set(chosen):
        raise UsageError("only", f"only={chosen}: expected some of {', '.join(methods)}")
    with _explained("linear.", "linear: "):
        linear = complete_settings(benchmark.linear)
    protocol = Protocol.read(benchmark.score.protocol)
    entries: list[Entry] = []
    listings = Listings()
    composed_by_name: dict[str, DictConfig] = {}
    for name, method in methods.items():
        with _explained(before=f"{name}: ", after=_UNDER_RUN):
            composed_by_name[name] = _compose(name, method, benchmark)
    by_name: dict[str, Mapping[str, Any]] = {}
    for seed in seeds:
        for name in methods:
            if name not in chosen and name in by_name:  # of another job: one seed is enough to compare terms
                continue
            own = composed_by_name[name].copy()
            own.seed = seed
            with _explained(before=f"{name}: ", after=_UNDER_RUN):
                run = prepare(own, listings)
            by_name[name] = suite.as_dict(run.config)
            if name in chosen:
                entries.append(Entry(name, seed, own, run, compare.config_hash(by_name[name])))
    _check_terms(by_name, benchmark.deviations or {})
    settings = {name: asdict(getattr(benchmark, name)) for name in ("knn", "diagnostics", "umap")}
    settings["diagnostics"]["protocol"] = asdict(protocol)
    settings |= {"linear": linear, "score": asdict(protocol) if benchmark.score.enabled else {}}
    return Plan(Path(benchmark.dir), entries, settings, protocol, benchmark.views)


@contextmanager
def _explained(key: str = "", before: str = "", after: str = "") -> Iterator[None]:
    """Within it, a UsageError about a part of the config gets the place of that part, and a hint."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{key}{error.key}", f"{before}{error}{after}") from error


def _listed(value: Any) -> list[Any]:
    """A single value as a list."""
    return value if isinstance(value, list) else [value]


def _methods(benchmark: Benchmark) -> dict[str, Method]:
    methods = benchmark.methods or Benchmark().methods
    for name in methods:
        files.check_name("methods", name)
    for name, keys in (benchmark.deviations or {}).items():
        if name not in methods:
            raise UsageError("deviations", f"deviations: no method is named {name}; there are {', '.join(methods)}")
        if keys is not None and not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
            raise UsageError(f"deviations.{name}", f"deviations.{name}={keys}: expected a list of keys")
    return {name: read(Method, entry or {}, f"methods.{name}") for name, entry in methods.items()}


def _compose(name: str, method: Method, benchmark: Benchmark) -> DictConfig:
    """The pretraining config of a method's runs but for the seed, without the defaults that ``prepare`` adds."""
    file, folder = (method.config or "emim").removesuffix(".yaml"), configs.find(benchmark.pretrain)
    if not (folder / f"{file}.yaml").is_file():
        names = ", ".join(name.removesuffix(".yaml") for name in configs.names(folder))
        raise UsageError(f"methods.{name}.config", f"methods.{name}: no '{file}.yaml' in '{folder}'; there are {names}")
    cfg = composed(folder, file)
    kwargs = suite.as_dict(cfg.get("method_kwargs") or OmegaConf.create())
    if method.method not in (None, cfg.method):  # another method keeps only the projector's widths of this config
        kwargs = {key: kwargs[key] for key in _SHARED_KWARGS if key in kwargs}
        cfg.method = method.method
    cfg.method_kwargs = kwargs
    fixed: dict[str, Any] = {
        "name": name,
        "checkpoint": {"enabled": True, "dir": benchmark.dir, "frequency": 1, "keep_prev": False},
        "auto_resume": {"enabled": False},
        "wandb": {"group": Path(benchmark.dir).name},
    }
    if benchmark.max_epochs is not None:
        fixed["max_epochs"] = math.ceil(round(benchmark.max_epochs * (method.share_of_epochs or 1), 9))
    for changes in (benchmark.run or {}, method.run or {}, {"method_kwargs": method.method_kwargs or {}}, fixed):
        for key, value in _changes(changes):
            with in_one_line(f"run.{key}", f"run.{key}={value}"):
                OmegaConf.update(cfg, key, value, force_add=True)
    return cfg


def _changes(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values by dotted key. A key may have a list index (``augmentations.0.crop_size``); a list is one value."""
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _changes(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _check_terms(by_name: Mapping[str, Mapping[str, Any]], declared: Mapping[str, Any]) -> None:
    missing = undeclared(deviations(by_name), {name: list(keys or []) for name, keys in declared.items()})
    if missing:
        listed = "; ".join(f"{name}: {', '.join(keys)}" for name, keys in missing.items())
        name, keys = next(iter(missing.items()))
        raise UsageError(
            "deviations",
            f"unequal terms: {listed}. Make them the same for all methods, or declare them: "
            f"+deviations.{name}=[{keys[0]}]",
        )
