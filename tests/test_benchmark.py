"""A small benchmark from start to report, its plan, and what a kill leaves of it."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from benchmark_folder import write_rows
from conftest import SMALL_BACKBONE
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch.utils.data import DataLoader, Dataset

from emim_solo import cli
from emim_solo.benchmark import plan, runner
from emim_solo.benchmark.cost import loading_seconds, measure
from emim_solo.benchmark.runner import EVALUATION_SHARE, Runner, run_benchmark
from emim_solo.checkpoints.opening import open_checkpoint
from emim_solo.emim.measures import OF_A_PAIR
from emim_solo.evaluation.linear import complete_settings
from emim_solo.evaluation.protocol import Protocol
from emim_solo.evaluation.score import score_checkpoint
from emim_solo.ground.errors import UsageError
from emim_solo.report.page import write_report
from emim_solo.results import rows, terms
from emim_solo.results.tables import collect, headline
from emim_solo.suite import load_suite
from emim_solo.training.pretraining import pretrain

DRIVER = Path(__file__).with_name("benchmark_driver.py")
RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"


@pytest.fixture(scope="module")
def settings(few_digits):
    """A small benchmark's config in a folder of its own."""

    def make(folder: Path, **changes: Any) -> Any:
        base = {
            "dir": str(folder),
            "pretrain": "pretrain/digits",
            "methods": {"emim": {"config": "emim"}, "vicreg": {"config": "vicreg"}},
            "seeds": [0, 1],
            "max_epochs": 2,
            "run": {
                "backbone": SMALL_BACKBONE,
                "data": {
                    "train_path": str(few_digits / "train"),
                    "val_path": str(few_digits / "val"),
                    "num_workers": 0,
                },
                "augmentations": {0: {"crop_size": 16}},
                "optimizer": {"batch_size": 32},
                "enable_progress_bar": False,
                "accelerator": "cpu",
            },
            "linear": {"max_epochs": 5},
            "diagnostics": {"images": 64, "steps": 2},
            "score": {"protocol": "digits"},
            "umap": {"images": 40},
        }
        return OmegaConf.merge(base, changes)

    return make


@pytest.fixture(scope="module")
def finished_aloud(settings, tmp_path_factory) -> tuple[Path, str]:
    """Two methods, two seeds, run to the end: the folder, and what was printed."""
    folder = tmp_path_factory.mktemp("benchmark")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        run_benchmark(settings(folder))
    return folder, out.getvalue()


@pytest.fixture(scope="module")
def finished(finished_aloud) -> Path:
    return finished_aloud[0]


# -- terms -------------------------------------------------------------------------------------------------------


def test_deviations_are_from_what_most_methods_share():
    common = {"max_epochs": 10, "optimizer": {"lr": 0.1, "kwargs": {"eta": 1}}, "devices": [0], "name": "a"}
    found = terms.deviations(
        {"a": common, "b": common | {"optimizer": {"lr": 0.3, "kwargs": {"eta": 1}}, "devices": [1]}, "c": common}
    )
    assert found == {"a": {}, "b": {"optimizer.lr": (0.3, 0.1)}, "c": {}}
    found = terms.deviations({"a": common, "b": {key: value for key, value in common.items() if key != "max_epochs"}})
    assert found["b"] == {"max_epochs": (terms.ABSENT, 10)}


def test_a_declared_key_covers_what_is_below_it():
    found = {"b": {"optimizer.lr": (1, 2), "optimizer.kwargs.eta": (1, 2), "max_epochs": (1, 2)}, "a": {}}
    assert terms.undeclared(found, {"b": ["optimizer"]}) == {"b": ["max_epochs"]}
    assert terms.undeclared(found, {"b": ["opt", "max_epochs", "optimizer.kwargs"]}) == {"b": ["optimizer.lr"]}


# -- plan --------------------------------------------------------------------------------------------------------


def test_a_view_that_the_others_lack_is_one_deviation():
    one, two = {"crop_size": 32, "rrc": {"enabled": True}}, {"crop_size": 16, "rrc": {"enabled": True}}
    configs = {name: {"augmentations": [one]} for name in "ab"} | {"c": {"augmentations": [one, two]}}
    found = terms.deviations(configs)
    assert found == {"a": {}, "b": {}, "c": {"augmentations.1": ("crop_size 16", terms.ABSENT)}}
    assert terms.undeclared(found, {"c": ["augmentations"]}) == {}
    configs["c"] = {"augmentations": [one, {"solarization": 0.1}]}
    assert terms.deviations(configs)["c"] == {"augmentations.1": (terms.PRESENT, terms.ABSENT)}
    configs["c"] = {"augmentations": [one | {"solarization": 0.1}]}  # one key more in a view that they all have
    assert terms.deviations(configs)["c"] == {"augmentations.0.solarization": (0.1, terms.ABSENT)}


def test_plan_is_methods_by_seeds_on_equal_terms(settings, tmp_path):
    made = plan.make_plan(settings(tmp_path, run={"optimizer": {"lr": 0.05}}))
    assert [(run.name, run.seed) for run in made.runs] == [("emim", 0), ("vicreg", 0), ("emim", 1), ("vicreg", 1)]
    assert len({run.config_hash for run in made.runs}) == 4
    own, other = (terms.terms(OmegaConf.to_container(run.cfg)) for run in made.runs[:2])
    assert own == other
    assert own["max_epochs"] == 2
    assert own["optimizer.lr"] == pytest.approx(0.05 * 32 / 256)


def test_any_method_of_the_suite_runs_on_the_same_terms(settings, tmp_path):
    methods = {"simclr": {"method": "simclr", "method_kwargs": {"temperature": 0.3}}}
    made = plan.make_plan(settings(tmp_path, methods=methods, seeds=0))
    simclr = next(run.cfg for run in made.runs if run.name == "simclr")
    assert simclr.method_kwargs.temperature == 0.3
    assert simclr.method_kwargs.proj_output_dim == made.runs[0].cfg.method_kwargs.proj_output_dim
    assert "noise_variance" not in simclr.method_kwargs


def test_a_method_may_take_a_declared_share_of_the_epochs(settings, tmp_path, refused):
    methods = {"emim": {"config": "emim"}, "vicreg": {"config": "vicreg", "share_of_epochs": 0.4}}
    with pytest.raises(UsageError, match=r"max_epochs"):
        plan.make_plan(settings(tmp_path, methods=methods, max_epochs=6))
    for epochs, expected in ((6, 3), (1, 1)):  # rounded up
        cfg = settings(tmp_path, methods=methods, max_epochs=epochs, deviations={"vicreg": ["max_epochs"]})
        found = {run.name: run.cfg.max_epochs for run in plan.make_plan(cfg).runs}
        assert found == {"emim": epochs, "vicreg": expected}
    methods["vicreg"]["share_of_epochs"] = 0.55
    cfg = settings(tmp_path, methods=methods, max_epochs=100, deviations={"vicreg": ["max_epochs"]})
    assert plan.make_plan(cfg).runs[1].cfg.max_epochs == 55, "not 56: 0.55 x 100 is 55.000000000000007"
    methods["vicreg"]["share_of_epochs"] = 1.5
    with refused("methods.vicreg.share_of_epochs", 1.5):
        plan.make_plan(settings(tmp_path, methods=methods))


def test_undeclared_deviation_stops_the_benchmark(settings, tmp_path, refused):
    methods = {"vicreg": {"config": "vicreg", "run": {"optimizer": {"lr": 0.7}, "max_epochs": 2}}}
    with refused("deviations", "vicreg: optimizer.lr", "+deviations.vicreg=[optimizer.lr]"):
        plan.make_plan(settings(tmp_path, methods=methods))
    with refused("deviations", "optimizer.lr"):  # a parallel job that makes one of them only, too
        plan.make_plan(settings(tmp_path, methods=methods, only="emim"))
    plan.make_plan(settings(tmp_path, methods=methods, deviations={"vicreg": ["optimizer.lr"]}))
    assert not list(tmp_path.iterdir()), "planning makes nothing"


@pytest.mark.parametrize(
    ("changes", "key", "names"),
    [
        ({"epochs": 3}, "epochs", ["max_epochs", "+run.optimizer.lr"]),
        ({"seeds": [0, 0]}, "seeds", ["[0, 0]"]),
        ({"seeds": []}, "seeds", ["[]"]),
        ({"seeds": [-1]}, "seeds.0", ["-1"]),
        ({"seeds": 2**70}, "seeds", [2**70]),
        ({"only": "byol"}, "only", ["byol", "emim, vicreg"]),
        ({"methods": {"emim": {"config": "absent"}}}, "methods.emim.config", ["absent.yaml", "barlow, emim"]),
        ({"methods": {"emim": {"configuration": "emim"}}}, "methods.emim.configuration", ["'config'"]),
        ({"methods": {"emim": {"share_of_epochs": 2}}}, "methods.emim.share_of_epochs", [2]),
        ({"methods": {"a/b": {"config": "emim"}}}, "methods", ["a/b"]),
        ({"methods": {"new": {"method": "unheard_of"}}}, "method", ["unheard_of", "barlow_twins"]),
        ({"deviations": {"byol": ["optimizer"]}}, "deviations", ["byol"]),
        ({"deviations": {"emim": "optimizer"}}, "deviations.emim", ["optimizer"]),
        ({"pretrain": "pretrain/absent"}, "configs.folder", ["pretrain/absent", "pretrain/digits"]),
        ({"run": {"data": {"train_path": "absent"}}}, "data.train_path", ["absent"]),
        ({"linear": {"optimizer": {"lr": "oops"}}}, "linear.optimizer.lr", ["oops"]),
        ({"knn": {"ks": 5}}, "knn.ks", [5, "a list"]),
        ({"knn": {"ks": []}}, "knn.ks", ["one value or more"]),
        ({"knn": {"distances": ["manhattan"]}}, "knn.distances.0", ["manhattan", "cosine"]),
        ({"umap": {"images": None}}, "umap.images", ["whole number"]),
        ({"diagnostics": None}, "diagnostics", ["settings by name"]),
        ({"run": {"augmentations": {"7": {"crop_size": 8}}}}, "run.augmentations.7.crop_size", ["augmentations"]),
    ],
)
def test_mistakes_in_the_config_are_named_before_any_run(settings, tmp_path, changes, key, names, refused):
    with refused(key, *names):
        plan.make_plan(settings(tmp_path, **changes))
    assert not list(tmp_path.iterdir())


def test_keys_that_are_left_empty_are_defaults(settings, tmp_path):
    made = plan.make_plan(
        settings(tmp_path, deviations=None, only=None, run=None, linear=None, pretrain="pretrain/digits")
    )
    assert made.settings["linear"]["max_epochs"] == 100


def test_run_reaches_into_lists(settings, tmp_path):
    made = plan.make_plan(settings(tmp_path, run={"augmentations": {0: {"crop_size": 24}}}, seeds=[0]))
    assert [entry.cfg.augmentations[0].crop_size for entry in made.runs] == [24, 24]
    assert made.runs[0].cfg.augmentations[0].rrc.enabled, "the rest of the view stays"


def test_runs_are_one_group_for_wandb(settings, tmp_path):
    made = plan.make_plan(settings(tmp_path / "mine"))
    assert {entry.cfg.wandb.group for entry in made.runs} == {"mine"}


def shipped(name: str, **data: Any) -> Any:
    """A shipped config of a benchmark as its command composes it, on images that are given."""
    with initialize_config_dir(str(plan.configs.find("benchmark")), version_base="1.2"):
        cfg = compose(name)
    OmegaConf.set_struct(cfg, False)
    return OmegaConf.merge(cfg, {"run": {"data": data}}) if data else cfg


def seeds_0(cfg: Any) -> dict[str, plan.Entry]:
    """The runs of its plan by name, of the first seed."""
    return {run.name: run for run in plan.make_plan(OmegaConf.merge(cfg, {"seeds": [0]})).runs}


@pytest.mark.parametrize("name", [Path(name).stem for name in plan.configs.names("benchmark")])
def test_shipped_configs_have_every_key(name):
    cfg = shipped(name)
    assert cfg.keys() == plan.Benchmark.__dataclass_fields__.keys() - {"hydra"}
    assert (plan.configs.find(cfg.pretrain) / "emim.yaml").is_file()
    assert complete_settings(cfg.linear) == complete_settings(None)


def test_the_demo_is_the_digits_but_for_what_its_head_says():
    """Fewer epochs, half the side, twice the batch at the same rate a step, channels last: nothing else, and the same for all methods."""
    digits, demo = (OmegaConf.load(plan.configs.root() / "benchmark" / f"{name}.yaml") for name in ("digits", "demo"))
    changed = {key for key in digits.keys() - {"defaults", "hydra"} if digits[key] != demo[key]}
    assert changed == {"dir", "max_epochs", "run", "umap"}
    assert demo.max_epochs < digits.max_epochs
    assert demo.methods == digits.methods
    found = {}
    for name, cfg in (("digits", digits), ("demo", demo)):
        del cfg["defaults"], cfg["hydra"]
        found[name] = terms.terms(OmegaConf.to_container(plan.make_plan(cfg).runs[0].cfg))
    whole, half = found["digits"], found["demo"]
    differing = {key for key in whole.keys() | half.keys() if whole.get(key) != half.get(key)}
    assert differing - {"max_epochs", "log_every_n_steps"} == {
        "augmentations.0.crop_size",
        "optimizer.batch_size",
        "optimizer.classifier_lr",
    }
    assert half["augmentations.0.crop_size"] * 2 == whole["augmentations.0.crop_size"]
    assert half["optimizer.batch_size"] == 2 * whole["optimizer.batch_size"]


def test_digits_all_has_every_method_that_trains_and_says_where_it_leaves_the_demos_terms(digits):
    """In the epochs, and in the rate and projector that a method's own recipe has."""
    images = {"train_path": str(digits / "train"), "val_path": str(digits / "val"), "embedded": None}
    cfg = shipped("digits-all", **images)
    runs, demo = seeds_0(cfg), seeds_0(shipped("demo", **images))
    assert list(runs)[:3] == list(demo)
    assert all(name == run.cfg.method for name, run in runs.items())
    only_main = {"all4one", "mae", "mocov3", "supcon", "vibcreg"}
    assert runs.keys() == load_suite().methods().keys() - only_main
    assert len(runs) == 15
    shared = terms.terms(OmegaConf.to_container(demo["emim"].cfg)) | {"max_epochs": runs["emim"].cfg.max_epochs}
    for run in runs.values():
        own = terms.terms(OmegaConf.to_container(run.cfg))
        differing = {key for key in shared.keys() | own.keys() if own.get(key) != shared.get(key)}
        assert differing <= {"optimizer.lr", "method_kwargs.proj_hidden_dim", "method_kwargs.proj_output_dim"}
    found = terms.deviations({name: OmegaConf.to_container(run.cfg) for name, run in runs.items()})
    assert {name: list(keys) for name, keys in found.items() if keys} == cfg.deviations
    wmse = runs["wmse"].cfg.method_kwargs
    assert wmse.whitening_size == 2 * wmse.proj_output_dim
    assert len(cfg.seeds) == 3


def test_fashion_mnist_declares_what_its_methods_do_not_share_and_nothing_else(digits):
    """On the digits' images: which folders they are is no matter of the terms."""
    cfg = shipped("fashion-mnist", train_path=str(digits / "train"), val_path=str(digits / "val"), embedded=None)
    runs = seeds_0(cfg)
    assert list(runs) == ["emim", "barlow_twins", "vicreg"]
    assert len(cfg.seeds) == 5
    found = terms.deviations({name: OmegaConf.to_container(run.cfg) for name, run in runs.items()})
    assert {name: list(keys) for name, keys in found.items() if keys} == cfg.deviations


@pytest.mark.parametrize("name", ["digits-all", "fashion-mnist"])
def test_committed_rows_are_of_the_shipped_config(name):
    cfg, folder = OmegaConf.to_container(shipped(name)), RESULTS / name
    found = rows.read(folder / "rows.jsonl")
    trained = [row for row in found if row["stage"] == "pretrain"]
    assert {row["name"] for row in trained} == cfg["methods"].keys()
    for row in trained:
        entry, own = cfg["methods"][row["name"]], row["config"]
        assert row["seed"] in cfg["seeds"]
        assert own["max_epochs"] == row["epochs"] == cfg["max_epochs"]
        assert own["augmentations"] == cfg["run"]["augmentations"]
        assert own["optimizer"]["batch_size"] == cfg["run"]["optimizer"]["batch_size"]
        assert row["method"] == entry.get("method", row["name"])
        assert entry.get("method_kwargs", {}).items() <= own["method_kwargs"].items()
        assert entry.get("run", {}).get("momentum", {}).items() <= own["momentum"].items()


# -- a whole benchmark -------------------------------------------------------------------------------------------


def test_every_stage_of_every_run_is_one_row(finished):
    found = [(row["name"], row["seed"], row["stage"]) for row in rows.read(finished / "rows.jsonl")]
    stages = ("pretrain", "knn", "logistic", "linear", "diagnostics", "score")
    expected = {(name, seed, stage) for name in ("emim", "vicreg") for seed in (0, 1) for stage in stages}
    expected |= {("emim", 0, "umap"), ("vicreg", 0, "umap")}
    assert len(found) == len(expected)
    assert set(found) == expected


def test_rows_belong_to_their_pretraining(finished):
    found = rows.read(finished / "rows.jsonl")
    hashes = {(row["name"], row["seed"]): row["config_hash"] for row in found if row["stage"] == "pretrain"}
    assert all(row["config_hash"] == hashes[row["name"], row["seed"]] for row in found)


def test_the_first_line_says_how_long_by_steps_that_it_has_timed(finished_aloud, settings, tmp_path):
    folder, printed = finished_aloud
    first, second = printed.splitlines()[:2]
    assert re.fullmatch(
        r"About [\d.]+ (s|min|h) of pretraining on this machine, by steps timed just now: 4 runs, 8 epochs of "
        r"[\d.]+ (s|min|h) in all; evaluation usually takes a tenth to a third of that more",
        first,
    )
    assert "left" in second
    assert "not known" not in printed, "what the first line knows, the others do"
    steps = {
        (row["name"], row["seed"]): row["metrics"]["step_seconds"]
        for row in rows.read(folder / "rows.jsonl")
        if row["stage"] == "diagnostics" and "step_seconds" in row["metrics"]
    }
    assert steps.keys() == {("emim", 0), ("vicreg", 0)}, "the same steps, timed once for each method"


def test_the_expected_time_is_that_of_the_steps_and_epochs(settings, tmp_path):
    runs = plan.make_plan(settings(tmp_path, seeds=[0, 1, 2], only="emim")).runs
    cost = measure(runs[0].run, steps=3)
    batches = len(runs[0].run.images.train) // runs[0].cfg.optimizer.batch_size
    assert cost.epoch_seconds >= batches * cost.metrics["step_seconds"] * 0.5
    runner = Runner(plan.make_plan(settings(tmp_path, seeds=[0, 1, 2], only="emim")))
    runner.costs["emim"] = cost
    runner.say_how_long()
    assert runner.forecast["pretrain"] == pytest.approx(2 * cost.epoch_seconds)
    assert set(runner.forecast) == set(runner.waiting)
    usual = EVALUATION_SHARE * 3 * runner.forecast["pretrain"]
    left = sum(runner.forecast[stage] for stage in runner.waiting)
    assert left == pytest.approx(3 * runner.forecast["pretrain"] + usual)


def test_a_loss_of_lists_of_tensors_is_timed(settings, tmp_path):
    methods = {"swav": {"method": "swav", "method_kwargs": {"temperature": 0.1, "num_prototypes": 8, "queue_size": 0}}}
    (run,) = plan.make_plan(settings(tmp_path, methods=methods, only="swav", seeds=[0])).runs
    cost = measure(run.run, steps=2)
    assert 0 < cost.metrics["loss_share"] < 100


def test_a_loss_that_is_a_module_leaves_its_share_out(settings, tmp_path):
    """DINO's training step calls ``self.dino_loss_func``, a name of no function there."""
    own = {"num_prototypes": 16, "warmup_teacher_temperature_epochs": 0}
    methods = {"dino": {"method": "dino", "method_kwargs": own}}
    (run,) = plan.make_plan(settings(tmp_path, methods=methods, only="dino", seeds=[0])).runs
    cost = measure(run.run, steps=2)
    assert cost.metrics.keys() == {"step_seconds"}


def test_loading_that_is_slower_than_the_steps_is_seen():
    """The first batches of a training are there before they are asked for: the pace of its first steps hides the loading."""

    class Slow(Dataset):
        def __len__(self) -> int:
            return 64

        def __getitem__(self, index: int) -> int:
            time.sleep(0.01)
            return index

    assert loading_seconds(DataLoader(Slow(), batch_size=20)) >= 0.2
    assert loading_seconds(DataLoader(Slow(), batch_size=20, num_workers=1)) >= 0.2


def test_steps_timed_beforehand_change_no_result(finished, settings, tmp_path):
    run = plan.make_plan(settings(tmp_path)).runs[1]
    alone = pretrain(run.run, version="alone")["metrics"]
    (row,) = [
        row
        for row in rows.read(finished / "rows.jsonl")
        if (row["name"], row["seed"], row["stage"]) == (run.name, run.seed, "pretrain")
    ]
    assert row["metrics"] == alone


def test_steps_that_cannot_be_timed_leave_the_mistake_to_the_run_that_has_it(settings, few_digits, tmp_path, capsys):
    broken = tmp_path / "images"
    shutil.copytree(few_digits, broken)
    for path in (broken / "train").glob("*/*.png"):
        path.write_bytes(b"no image")
    run = {"data": {"train_path": str(broken / "train"), "val_path": str(broken / "val")}}
    with pytest.raises(UsageError, match=r"data\.train_path: cannot read image"):
        run_benchmark(settings(tmp_path / "run", run=run, seeds=[0]))
    assert capsys.readouterr().out.startswith("How long this takes is not known")


def test_cost_and_collapse_are_among_the_diagnostics(finished):
    by_run = {
        (r["name"], r["seed"]): r["metrics"] for r in rows.read(finished / "rows.jsonl") if r["stage"] == "diagnostics"
    }
    for name in ("emim", "vicreg"):
        assert 0 < by_run[name, 0]["loss_share"] < 100
        assert by_run[name, 0]["step_seconds"] > 0
        assert "loss_share" not in by_run[name, 1], "measured once for each method"
        assert by_run[name, 1]["projector_collapsed"] in (0, 1)
        assert math.isfinite(by_run[name, 1]["backbone_pair_information_null"])


def test_the_score_is_that_of_the_command_in_the_table_and_beside_the_accuracy(finished, capsys):
    scored = {
        row["name"]: row for row in rows.read(finished / "rows.jsonl") if row["stage"] == "score" if row["seed"] == 0
    }
    for name, row in scored.items():
        (folder,) = (finished / row["method"]).glob(f"{name}-seed0-*")
        row_of_command = score_checkpoint(open_checkpoint(folder), Protocol.read("digits"), neighbours=False)
        assert row_of_command["metrics"] == pytest.approx(row["metrics"], nan_ok=True)
        assert row_of_command["protocol"] == row["protocol"] == Protocol.read("digits").hash
    page = (finished / "report.html").read_text()
    assert "Spearman’s rank correlation" in page
    assert f"8 views of {row['images']} validation images, protocol {row['protocol']}" in page
    assert "View information (nats)" in (finished / "table.md").read_text()


def test_diagnostics_are_of_the_views_of_the_score(finished):
    """Of both parts, what both have being the same numbers."""
    rows_of = {
        stage: {(row["name"], row["seed"]): row for row in rows.read(finished / "rows.jsonl") if row["stage"] == stage}
        for stage in ("diagnostics", "score")
    }
    for run, diagnosed in rows_of["diagnostics"].items():
        scored = rows_of["score"][run]
        assert [diagnosed[key] for key in ("protocol", "images", "of")] == [
            scored[key] for key in ("protocol", "images", "of")
        ]
        found = {name: diagnosed["metrics"][f"backbone_{name}"] for name in OF_A_PAIR}
        assert found == pytest.approx({name: scored["metrics"][name] for name in OF_A_PAIR}, nan_ok=True)
        assert diagnosed["metrics"].keys() >= {f"projector_{name}" for name in (*OF_A_PAIR, "spread", "collapsed")}


def test_without_the_score_it_is_neither_made_nor_missed(settings, tmp_path, capsys):
    run_benchmark(settings(tmp_path / "b", only="emim", seeds=[0], max_epochs=1, score={"enabled": False}))
    assert {row["stage"] for row in rows.read(tmp_path / "b" / "rows.jsonl")} >= {"diagnostics", "linear"}
    assert "score" not in {row["stage"] for row in rows.read(tmp_path / "b" / "rows.jsonl")}
    said = capsys.readouterr().out
    assert "View information" not in said
    assert "Not finished" not in said


def test_everything_is_where_the_last_line_says(finished):
    made = {path.relative_to(finished).as_posix() for path in finished.rglob("*") if path.is_file()}
    assert {"report.html", "table.md", "table.tex", "rows.jsonl", "umap/val.png", "umap/train.csv"} <= made
    assert {"umap/val.pdf", "umap/train.png", "spectra/emim-seed1.json"} <= made
    text = (finished / "report.html").read_text()
    assert "data:image/webp" in text
    assert "Learning curves" in text


def test_started_again_it_makes_nothing(finished, settings, capsys):
    before = (finished / "rows.jsonl").read_bytes()
    run_benchmark(settings(finished))
    assert (finished / "rows.jsonl").read_bytes() == before
    out = capsys.readouterr().out
    assert "4 runs, 0 stages made" in out
    assert "on this machine" not in out, "no step is timed for nothing"
    assert "Linear top-1" in out


def test_changed_settings_of_a_stage_repeat_that_stage_alone(finished, settings):
    runner = Runner(plan.make_plan(settings(finished, knn={"ks": [1, 3]})))
    assert runner.waiting == ["knn"] * 4
    runner = Runner(plan.make_plan(settings(finished, views=2)))
    assert sorted(runner.waiting) == ["knn"] * 4 + ["linear"] * 4 + ["logistic"] * 4 + ["umap"], "what uses features"
    runner = Runner(plan.make_plan(settings(finished, max_epochs=3)))
    assert runner.waiting.count("pretrain") == 4


def test_report_is_made_from_the_folder_alone_wherever_it_is(finished, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in finished.rglob("*"):
        if path.is_file() and path.suffix not in (".ckpt", ".pt"):
            (moved / path.relative_to(finished)).parent.mkdir(parents=True, exist_ok=True)
            (moved / path.relative_to(finished)).write_bytes(path.read_bytes())
    written = write_report(moved)
    assert written.html.read_text() == (finished / "report.html").read_text()


def test_missing_checkpoint_is_named_and_the_rest_is_made(finished, settings, tmp_path):
    lines = (finished / "rows.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["stage"] == "pretrain" or json.loads(line)["name"] == "vicreg"]
    (tmp_path / "rows.jsonl").write_text("\n".join(kept) + "\n")
    with pytest.raises(UsageError, match=r"emim seed 0: its checkpoint folder .* is gone"):
        run_benchmark(settings(tmp_path))
    assert "Not finished: emim seed 0" in (tmp_path / "table.md").read_text()
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == len(kept), "nothing lost"


def test_diverged_run_is_flagged_and_not_tried_again(settings, tmp_path, capsys):
    # A learning rate that no network survives.
    run = {"optimizer": {"name": "sgd", "lr": 1e30, "kwargs": None}, "log_every_n_steps": 1}
    small = settings(
        tmp_path, methods={"emim": {"config": "emim"}}, only="emim", seeds=[0], run=run, umap={"enabled": False}
    )
    small.run.optimizer.kwargs = {}
    run_benchmark(small)
    assert "diverged with seed 0" in (tmp_path / "table.md").read_text()
    assert "NaN" in (tmp_path / "report.html").read_text()
    run_benchmark(small)
    assert len(rows.read(tmp_path / "rows.jsonl")) == 1


def test_a_run_out_of_memory_leaves_the_others_to_be_made(settings, tmp_path, monkeypatch, capsys):
    def out_of_memory(run: Any, version: str) -> Any:
        if run.config.method == "emim":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return pretrain(run, version)

    monkeypatch.setattr(runner, "pretrain", out_of_memory)
    cfg = settings(tmp_path, seeds=[0], max_epochs=1, score={"enabled": False}, umap={"enabled": False})
    with pytest.raises(UsageError, match="emim seed 0: out of memory"):
        run_benchmark(cfg)
    assert {row["name"] for row in rows.read(tmp_path / "rows.jsonl")} == {"vicreg"}
    assert "! emim seed 0: out of memory" in capsys.readouterr().err


def test_on_two_devices_of_a_job_of_slurm_a_run_is_trained_and_a_diverged_one_is_recorded(
    settings, tmp_path, monkeypatch
):
    """In processes of its own. Features of an earlier training of the run go."""
    for name, value in {"JOB_NAME": "night", "NTASKS": "1", "NTASKS_PER_NODE": "1", "JOB_ID": "7"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    apart = {"devices": 2, "strategy": "ddp", "knn_eval": {"enabled": False}}
    cfg = settings(tmp_path, only="emim", seeds=[0], max_epochs=1, run=apart)
    benchmark = Runner(plan.make_plan(cfg))
    (run,) = benchmark.plan.runs
    stale = tmp_path / "features" / f"{run.version}.pt"
    stale.parent.mkdir()
    stale.write_bytes(b"of an earlier training")
    assert benchmark._pretrain(run) is None and not stale.exists()
    assert [row["stage"] for row in rows.read(tmp_path / "rows.jsonl")] == ["pretrain"]
    cfg.max_epochs, cfg.run.optimizer.lr = 3, 1e30
    benchmark = Runner(plan.make_plan(cfg))
    (run,) = benchmark.plan.runs
    assert "NaN" in benchmark._pretrain(run)["failed"]


def test_images_other_than_those_of_the_folders_rows_are_refused_before_any_run(
    settings, few_digits, tmp_path, refused
):
    write_rows(tmp_path, seeds=1, methods={"simclr": (90.0, 20.0, 9.0)})
    lines = [
        row | {"images": {"train": {"images": 7, "classes": 10, "digest": "x"}}}
        for row in rows.read(tmp_path / "rows.jsonl")
    ]
    (tmp_path / "rows.jsonl").unlink()
    for row in lines:
        rows.append(tmp_path / "rows.jsonl", row)
    with refused("rows.mixed", "simclr", "7 images there"):
        Runner(plan.make_plan(settings(tmp_path)))


def test_parallel_jobs_make_their_runs_and_leave_the_report_to_the_end(
    finished, settings, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "parallel"
    shutil.copytree(finished, folder)
    for name in ("report.html", "table.md", "rows.jsonl"):
        (folder / name).unlink()
    for row in rows.read(finished / "rows.jsonl"):
        if row["stage"] != "umap" and (row["name"], row["seed"], row["stage"]) != ("vicreg", 1, "knn"):
            rows.append(folder / "rows.jsonl", row)
    before = len(rows.read(folder / "rows.jsonl"))
    config = OmegaConf.load(plan.configs.root() / "benchmark" / "digits.yaml")
    given = OmegaConf.create({"defaults": config.defaults, "hydra": config.hydra})
    OmegaConf.save(OmegaConf.merge(given, settings(folder, only=None)), tmp_path / "small.yaml")
    arguments = ["benchmark", "--config-path", str(tmp_path), "--config-name", "small"]
    monkeypatch.chdir(tmp_path)

    cli.main([*arguments, "--multirun", "only=emim,vicreg"])
    assert "without --multirun" in capsys.readouterr().out
    assert not (folder / "report.html").exists()
    assert [(row["name"], row["stage"]) for row in rows.read(folder / "rows.jsonl")[before:]] == [("vicreg", "knn")]

    cli.main(arguments)
    assert (folder / "report.html").is_file()
    assert [row["stage"] for row in rows.read(folder / "rows.jsonl")[before + 1 :]] == ["umap", "umap"]
    assert {path.name for path in tmp_path.iterdir()} == {"parallel", "small.yaml"}


# -- kills -------------------------------------------------------------------------------------------------------


def start(config: Path, *arguments: str) -> processes.Started:
    return processes.start(config, *arguments, script=DRIVER)


def kill_when(process: processes.Started, condition: Any) -> None:
    while not condition():
        assert process.poll() is None, process.stderr
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def values(folder: Path) -> dict[str, dict[str, float]]:
    """Metrics by stage, without the timings and what the trainer happened to log last."""
    return {
        row["stage"]: {
            name: value for name, value in row["metrics"].items() if name not in ("loss_share", "step_seconds")
        }
        for row in rows.read(folder / "rows.jsonl")
        if row["stage"] != "pretrain"
    }


def test_killed_anywhere_it_ends_in_the_same_table(settings, tmp_path):
    changes = {"only": "emim", "seeds": [0], "max_epochs": 3, "umap": {"enabled": False}}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        OmegaConf.save(settings(folder, **changes), folder.with_suffix(".yaml"))
    # In a process of its own like the others: a process's number of threads decides the order of its sums.
    assert start(whole.with_suffix(".yaml")).wait() == 0
    config = killed.with_suffix(".yaml")

    kill_when(start(config), lambda: list(killed.rglob("*-ep=0.ckpt")) or list(killed.rglob("*-ep=1.ckpt")))
    assert not (killed / "rows.jsonl").exists(), "killed in training"

    assert start(config, "knn").wait() == -signal.SIGKILL, "dies in the middle of appending a row"
    assert not (killed / "rows.jsonl").read_text().endswith("\n")
    assert [row["stage"] for row in rows.read(killed / "rows.jsonl")] == ["pretrain"]

    kill_when(start(config), lambda: '"logistic"' in (killed / "rows.jsonl").read_text())
    assert "diagnostics" not in values(killed), "killed in evaluation"

    assert start(config).wait() == 0
    assert values(killed) == values(whole)
    stages = [row["stage"] for row in rows.read(killed / "rows.jsonl")]
    assert sorted(stages) == sorted(set(stages)), "nothing that was finished was done again"
    shown = [
        [
            cell.text
            for key, cell in zip(table.keys, table.lines[0][1], strict=True)
            if key not in ("epoch", "memory", "loss_share")
        ]
        for table in (headline(collect(rows.read(folder / "rows.jsonl"))) for folder in (whole, killed))
    ]
    assert shown[0] == shown[1]


# -- images without labels, or of one class ----------------------------------------------------------------------------


def test_images_without_labels_from_start_to_report(settings, few_digits, tmp_path, capsys):
    heap = tmp_path / "heap"
    for number, path in enumerate(sorted((few_digits / "train").rglob("*.png"))[::2]):
        target = heap / ("" if number % 2 else "more/deep") / f"{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (heap / ".DS_Store").touch()
    (heap / "more" / "notes.txt").write_text("not an image")
    run = {"data": {"train_path": str(heap), "val_path": None, "embedded": None, "no_labels": True}}
    run_benchmark(settings(tmp_path / "b", run=run, seeds=[0], max_epochs=1))
    made = rows.read(tmp_path / "b" / "rows.jsonl")
    assert {row["stage"] for row in made} == {"pretrain", "diagnostics", "score", "umap"}
    assert [row["of"] for row in made if row["stage"] == "score"] == ["training"] * 2
    metrics = {name: value for row in made for name, value in row["metrics"].items()}
    assert not [name for name in metrics if "acc" in name or "class_loss" in name or "silhouette" in name]
    assert metrics["projector_pair_information"] > 0
    assert metrics["train_trustworthiness"] > 0.5
    said = capsys.readouterr().out
    assert f"'{heap}': 80 images; passed over: 1 .txt, 1 hidden" in said
    assert "No accuracies: images without labels." in said
    assert "Not finished" not in said
    page = (tmp_path / "b" / "report.html").read_text()
    assert "No accuracies: images without labels." in page
    assert {path.name for path in (tmp_path / "b" / "umap").iterdir()} >= {"train.png", "train.pdf"}
    folder = next((tmp_path / "b" / "emim").iterdir())
    for command in ("knn", "linear"):
        with pytest.raises(SystemExit):
            cli.main([command, str(folder)])
        assert "images without labels: an accuracy would say nothing" in capsys.readouterr().err


def test_one_class_keeps_no_run_from_being_made(settings, few_digits, tmp_path, capsys):
    run = {"data": {}, "optimizer": {"batch_size": 8}}
    for split in ("train", "val"):
        shutil.copytree(few_digits / split / "3", tmp_path / split / "3")
        run["data"][f"{split}_path"] = str(tmp_path / split)
    changes = {"seeds": [0], "max_epochs": 1, "umap": {"enabled": False}, "run": run}
    run_benchmark(settings(tmp_path / "b", **changes))
    assert [row["stage"] for row in rows.read(tmp_path / "b" / "rows.jsonl")] == [
        "pretrain",
        "diagnostics",
        "score",
    ] * 2
    assert "No accuracies: a single class." in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["linear", str(next((tmp_path / "b" / "emim").iterdir()))])
    assert "has a single class: an accuracy" in capsys.readouterr().err
