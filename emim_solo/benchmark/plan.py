"""The plan of a benchmark: which methods, with which seeds, on which equal terms."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from emim_solo import suite
from emim_solo.evaluation.knn import KnnSettings
from emim_solo.evaluation.linear import complete_settings
from emim_solo.evaluation.protocol import Protocol
from emim_solo.ground import compare, configs, files
from emim_solo.ground.errors import UsageError
from emim_solo.ground.settings import read, setting
from emim_solo.images.folders import Listings, expand_home
from emim_solo.results.terms import deviations, undeclared
from emim_solo.training.run import Run, prepare


@dataclass
class Method:
    """An entry of ``methods``: a config of the folder ``pretrain``, and what is changed of it."""

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
    images: int = setting(2000, least=5)
    seed: int = setting(0, least=0, most=2**32 - 1)


@dataclass
class Benchmark:
    """Every key of a benchmark's config; what each means is said in scripts/benchmark/digits.yaml."""

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
    knn: KnnSettings = field(default_factory=KnnSettings)
    linear: dict[str, Any] | None = None
    diagnostics: Diagnostics = field(default_factory=Diagnostics)
    score: Score = field(default_factory=Score)
    umap: UMAP = field(default_factory=UMAP)
    hydra: Any = None


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
        cfg: of the benchmark, in the schema of :class:`Benchmark`.

    Raises:
        UsageError: an unknown key or method, a deviation from equal terms that is not declared, and whatever is
            wrong with a run's own config.
    """
    expand_home(cfg)
    benchmark, methods = _read(cfg)
    chosen = _chosen(benchmark, methods)
    try:
        linear = complete_settings(benchmark.linear)
    except UsageError as error:
        raise UsageError(f"linear.{error.key}", f"linear: {error}") from error
    protocol = asdict(Protocol.read(benchmark.score.protocol))
    entries: list[Entry] = []
    listings = Listings()
    by_name: dict[str, Mapping[str, Any]] = {}
    for seed in [benchmark.seeds] if isinstance(benchmark.seeds, int) else benchmark.seeds:
        # Those that another job makes are compared with too, once.
        for name in methods:
            if name not in chosen and name in by_name:
                continue
            try:
                composed = _compose(name, methods[name], seed, benchmark)
                run = prepare(composed, listings)
            except UsageError as error:
                raise UsageError(
                    error.key,
                    f"{name}: {error} (keys of the pretraining go under run, on the command line as +run.KEY=VALUE)",
                ) from error
            by_name[name] = suite.as_dict(run.config)
            if name in chosen:
                entries.append(Entry(name, seed, composed, run, compare.config_hash(by_name[name])))
    _check_terms(by_name, benchmark.deviations or {})
    stages = {name: asdict(getattr(benchmark, name)) for name in ("knn", "diagnostics", "umap")}
    stages["diagnostics"]["protocol"] = protocol
    score = protocol if benchmark.score.enabled else {}
    return Plan(Path(benchmark.dir), entries, {**stages, "linear": linear, "score": score})


def _read(cfg: DictConfig) -> tuple[Benchmark, dict[str, Method]]:
    """The settings of a benchmark, and those of its methods."""
    try:
        benchmark = read(Benchmark, cfg)
    except UsageError as error:
        raise UsageError(
            error.key, f"{error} (keys of the pretraining go under run, as in +run.optimizer.lr=0.1)"
        ) from error
    methods = benchmark.methods or Benchmark().methods
    for name in methods:
        files.check_name("methods", name)
    seeds = [benchmark.seeds] if isinstance(benchmark.seeds, int) else benchmark.seeds
    if not seeds or len(set(seeds)) < len(seeds):
        raise UsageError("seeds", f"seeds={seeds}: expected different whole numbers from 0 on, as in seeds=[0,1,2]")
    declared = benchmark.deviations or {}
    if stray := sorted(declared.keys() - methods.keys()):
        raise UsageError(
            "deviations", f"deviations: no method is named {', '.join(stray)}; there are {', '.join(methods)}"
        )
    for name, keys in declared.items():
        if keys is not None and not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
            raise UsageError(
                f"deviations.{name}", f"deviations.{name}={keys}: expected a list of keys of the pretraining"
            )
    return benchmark, {name: read(Method, entry or {}, f"methods.{name}") for name, entry in methods.items()}


def _chosen(benchmark: Benchmark, methods: Mapping[str, Method]) -> list[str]:
    """The methods that this command makes."""
    if benchmark.only is None:
        return list(methods)
    only = [benchmark.only] if isinstance(benchmark.only, str) else benchmark.only
    if not only or not methods.keys() >= set(only):
        raise UsageError("only", f"only={only}: expected some of {', '.join(methods)}")
    return [name for name in methods if name in only]


def _compose(name: str, method: Method, seed: int, benchmark: Benchmark) -> DictConfig:
    """The pretraining config of one run, as its user would have written it."""
    file, folder = method.config or "emim", configs.find(benchmark.pretrain)
    try:
        with _hydra_at(folder):
            cfg = compose(file)
    except MissingConfigException as error:
        there = ", ".join(path.stem for path in sorted(folder.glob("*.yaml")) if not path.stem.startswith("_"))
        raise UsageError(
            f"methods.{name}.config", f"methods.{name}: no '{file}.yaml' in '{folder}'; there are {there}"
        ) from error
    OmegaConf.set_struct(cfg, False)
    kwargs = suite.as_dict(cfg.get("method_kwargs") or OmegaConf.create())
    if method.method not in (None, cfg.method):  # on this one's terms: of its own settings only the widths are shared
        kwargs = {key: kwargs[key] for key in _SHARED_KWARGS if key in kwargs}
        cfg.method = method.method
    cfg.method_kwargs = kwargs
    epochs = benchmark.max_epochs
    if epochs is not None and method.share_of_epochs is not None:
        epochs = math.ceil(epochs * method.share_of_epochs)
    fixed = {
        **({} if epochs is None else {"max_epochs": epochs}),
        "name": name,
        "seed": seed,
        "checkpoint": {"enabled": True, "dir": benchmark.dir, "frequency": 1, "keep_prev": False},
        "auto_resume": {"enabled": False},
        "wandb": {"group": Path(benchmark.dir).name},
    }
    for changes in (benchmark.run or {}, method.run or {}, {"method_kwargs": method.method_kwargs or {}}, fixed):
        for key, value in _changes(changes):
            try:
                OmegaConf.update(cfg, key, value, force_add=True)
            except (OmegaConfBaseException, TypeError, ValueError, IndexError) as error:
                raise UsageError(
                    f"run.{key}", f"methods.{name}: run.{key}={value}: {str(error).splitlines()[0]}"
                ) from error
    return cfg


def _changes(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values by dotted key; a place in a list may be a key (``augmentations.0.crop_size``), a list is one value."""
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _changes(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


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
            "deviations",
            f"unequal terms: {listed}. Make them the same for all methods, or declare them to have them printed with "
            f"the results: +deviations.{name}=[{keys[0]}]",
        )
