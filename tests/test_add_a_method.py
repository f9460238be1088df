"""The plugin of docs/add-a-method.md: installed by pip, in processes of its own, by the commands that the page says."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import processes
import pytest
import torch
from conftest import SMALL_OVERRIDES

from emim_solo.results import rows
from emim_solo.suite import load_suite
from emim_solo.suite.plugins import GROUP, methods_of_other_packages

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = (REPOSITORY / "docs" / "add-a-method.md").read_text()
EXAMPLE = REPOSITORY / "examples" / "corinfomax"
BLOCKS = dict.fromkeys(("python", "toml", "console"), "") | dict(
    re.findall(r"```(\w+)\n(.*?)```", PAGE, flags=re.DOTALL)
)
COMMANDS = [shlex.split(line) for line in BLOCKS["console"].splitlines()]
SMALL = ["method_kwargs.proj_hidden_dim=32", "optimizer.batch_size=32", "max_epochs=1", "data.num_workers=0"]


def run(*arguments: object, cwd: Path, path: Path) -> subprocess.CompletedProcess[str]:
    """Python with the folder ``path`` of installed packages first."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), *filter(None, sys.path)])}
    command = [sys.executable, "-W", "ignore::DeprecationWarning", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that pip has put the example into."""
    folder = tmp_path_factory.mktemp("plugin")
    source = shutil.copytree(EXAMPLE, folder / "source")  # building leaves folders beside it
    pip = ("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation")
    done = run(*pip, "--target", folder / "site", source, cwd=folder, path=folder)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def test_the_page_shows_the_example_as_it_is() -> None:
    assert BLOCKS["python"] == (EXAMPLE / "corinfomax_solo.py").read_text()
    assert BLOCKS["toml"] == (EXAMPLE / "pyproject.toml").read_text()
    assert len(BLOCKS["python"].splitlines()) <= 60
    assert COMMANDS[0] == ["pip", "install", "--editable", EXAMPLE.relative_to(REPOSITORY).as_posix()]
    assert [command[1] for command in COMMANDS[1:]] == ["pretrain", "knn", "benchmark", "main_pretrain.py"]


def test_its_commands_train_evaluate_and_compare(installed: Path, few_digits: Path, tmp_path: Path) -> None:
    data = [f"data.train_path={few_digits / 'train'}", f"data.val_path={few_digits / 'val'}"]
    small = {
        "pretrain": [*SMALL, *SMALL_OVERRIDES, *data],
        "benchmark": [
            *(
                "only=corinfomax",
                "seeds=[0]",
                "max_epochs=1",
                "linear.max_epochs=1",
                "score.enabled=False",
                "umap.enabled=False",
                "diagnostics.images=64",
            ),
            *(f"+run.{setting}" for setting in (*data, *SMALL[1:2], "data.num_workers=0", "accelerator=cpu")),
            *(f"+run.{setting.lstrip('+')}" for setting in SMALL_OVERRIDES),
        ],
    }
    there = f"import sys; sys.path.insert(0, {str(installed)!r})"
    for _, command, *words in COMMANDS[1:4]:
        words += small.get(command, [])
        if command == "pretrain":  # in a new interpreter
            done = run("-m", "emim_solo", command, *words, cwd=tmp_path, path=installed)
        else:
            done = processes.command(command, *words, cwd=tmp_path, prepare=there)
        assert done.returncode == 0, done.stderr[-3000:]
    alone = rows.read(tmp_path / "trained_models" / "rows.jsonl")
    assert [(row["stage"], row["method"]) for row in alone] == [("pretrain", "corinfomax"), ("knn", "corinfomax")]
    assert {"train_corinfomax_loss", "val_acc1"} <= alone[0]["metrics"].keys()
    compared = rows.read(tmp_path / "runs" / "digits" / "rows.jsonl")
    assert {row["method"] for row in compared} == {"corinfomax"}
    assert {"pretrain", "knn", "linear", "diagnostics"} <= {row["stage"] for row in compared}
    (checkpoint,) = (tmp_path / "trained_models" / "corinfomax" / "0").glob("*.ckpt")
    covariance = torch.load(checkpoint, weights_only=True)["state_dict"]["covariance"]
    assert covariance.shape == (2, 64, 64)
    assert not torch.allclose(covariance, torch.eye(64, dtype=torch.float64)), "the running moments are saved"


def test_main_pretrain_of_an_unmodified_clone_trains_it(installed: Path, few_digits: Path, tmp_path: Path) -> None:
    load_suite()
    import solo

    assert solo.__file__ is not None
    clone = Path(solo.__file__).resolve().parent.parent
    if not (clone / "main_pretrain.py").is_file():
        pytest.skip("the script is in a clone of solo-learn main only: make test-main SOLO=<clone>")
    _, script, *words = COMMANDS[4]
    words = [str(clone / word) if word == "scripts/pretrain/cifar" else word for word in words]
    words += ["data.dataset=custom", f"data.train_path={few_digits / 'train'}", f"data.val_path={few_digits / 'val'}"]
    words += [*SMALL, "accelerator=cpu", "devices='1'", "strategy=auto", "precision=32", "sync_batchnorm=False"]
    done = run(clone / script, *words, "wandb.enabled=False", "+limit_val_batches=0", cwd=tmp_path, path=installed)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(tmp_path.glob("trained_models/corinfomax/*/corinfomax-*.ckpt"))


@pytest.fixture(scope="module")
def loss() -> Callable[..., Any]:
    load_suite()  # 1.0.2 imports only after it
    spec = importlib.util.spec_from_file_location("corinfomax_solo", EXAMPLE / "corinfomax_solo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function: Callable[..., Any] = module.CorInfoMax.corinfomax_loss
    return function


def test_its_loss_is_the_papers(loss: Callable[..., Any]) -> None:
    """By eigenvalues of moments that NumPy takes, over two steps, the second with the moments of the first."""
    random = np.random.default_rng(0)
    keep, weight, eps, width = 0.3, 5.0, 1e-3, 4
    settings = {"forgetting": keep, "weight": weight, "eps": eps}
    method = SimpleNamespace(
        settings=settings, mean=torch.zeros(2, width).double(), covariance=torch.eye(width).double().repeat(2, 1, 1)
    )
    means, covariances = [np.zeros(width)] * 2, [np.eye(width)] * 2
    for _ in range(2):
        views = random.normal(1.0, 2.0, (2, 30, width))
        expected = weight * np.mean((views[0] - views[1]) ** 2)
        for view in (0, 1):
            means[view] = keep * means[view] + (1 - keep) * views[view].mean(0)
            centred = views[view] - means[view]
            covariances[view] = keep * covariances[view] + (1 - keep) * centred.T @ centred / 30
            expected -= np.log(np.linalg.eigvalsh(covariances[view]) + eps).sum() / width
        assert loss(method, torch.from_numpy(views)).item() == pytest.approx(expected, rel=1e-12)


# -- packages that are wrong --------------------------------------------------------------------------------------------


@pytest.fixture
def methods_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., dict[str, Any]]]:
    """``methods_of({"package": ("name", "module:Class", "source of the module")})``: what the suite then has, and what it says."""
    suite = load_suite()
    before = dict(suite.METHODS)

    def install(packages: dict[str, tuple[str, str, str]]) -> dict[str, Any]:
        for package, (name, value, source) in packages.items():
            info = tmp_path / f"{package}-0.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0\n")
            (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {value}\n")
            (tmp_path / f"{value.partition(':')[0]}.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        methods_of_other_packages.cache_clear()
        return suite.methods()

    yield install
    methods_of_other_packages.cache_clear()
    suite.METHODS.clear()
    suite.METHODS.update(before)


METHOD = "from solo.methods.barlow_twins import BarlowTwins\nclass Method(BarlowTwins): pass\n"
WRONG = {
    "raises": ("plugin.import", "raise RuntimeError('no such\\ndriver')", "RuntimeError: no such driver"),
    "exits": ("plugin.import", "import sys\nsys.exit(3)", "SystemExit: 3"),
    "raises_its_own": ("plugin.import", "class Odd(BaseException): pass\nraise Odd", "Odd"),
    "has_no_such_class": ("plugin.import", "", "AttributeError"),
    "is_no_python": ("plugin.import", "def", "SyntaxError"),
    "function": ("plugin.class", "def Method(): pass", "expected a subclass of solo.methods.base.BaseMethod"),
    "other_class": ("plugin.class", "class Method: pass", "expected a subclass of solo.methods.base.BaseMethod"),
    "module": ("plugin.class", "import sys as Method", "expected a subclass of solo.methods.base.BaseMethod"),
    "object": ("plugin.class", METHOD + "Method = 3", "3: expected a subclass of solo.methods.base.BaseMethod"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_method_is_warned_of_refused_when_asked_for_and_the_rest_goes_on(
    name: str, methods_of: Callable[..., dict[str, Any]], refused: Callable[..., Any]
) -> None:
    key, source, said = WRONG[name]
    value = f"plugin_{name}:Method"
    with pytest.warns(UserWarning, match=f"'{name}' is not available: {value} of package odd .*{re.escape(said)}"):
        methods = methods_of({"odd": (name, value, source), "good": ("good", f"good_{name}:Method", METHOD)})
    assert name not in methods
    assert methods["good"].__name__ == "Method"
    assert methods["emim"] is load_suite().emim_class
    with refused(key, f"method '{name}' is not available", "package odd", said):
        load_suite().method(name)


def test_of_two_methods_of_one_name_none_is_taken(
    methods_of: Callable[..., dict[str, Any]], refused: Callable[..., Any]
) -> None:
    with pytest.warns(UserWarning, match="'twice' is not available: .*mod_one:Method.*mod_two:Method"):
        methods = methods_of({name: ("twice", f"mod_{name}:Method", METHOD) for name in ("one", "two")})
    assert "twice" not in methods
    assert not {"mod_one", "mod_two"} & sys.modules.keys(), "nothing of them is run"
    with refused("plugin.twice", "package one", "package two", "uninstall"):
        load_suite().method("twice")


def test_one_method_that_two_packages_name_is_that_method(methods_of: Callable[..., dict[str, Any]]) -> None:
    methods = methods_of(dict.fromkeys(("three", "four"), ("shared", "mod_shared:Method", METHOD)))
    assert methods["shared"].__module__ == "mod_shared"


@pytest.mark.parametrize("name", ["byol", "emim", "base"])
def test_a_name_of_the_suite_stays_the_suites(name: str, methods_of: Callable[..., dict[str, Any]]) -> None:
    suite = load_suite()
    before = suite.METHODS[name]
    with pytest.warns(
        UserWarning, match=f"method '{name}' of mod_{name} is left out: there is one of that name already"
    ):
        methods_of({"taken": (name, f"mod_{name}:Method", METHOD)})
    assert suite.METHODS[name] is before


def test_an_unknown_method_is_refused_with_those_that_there_are(refused: Callable[..., Any]) -> None:
    with refused("method", "'byool'", "byol", "emim"):
        load_suite().method("byool")


def test_a_script_of_the_suite_goes_on_beside_a_package_that_exits(tmp_path: Path) -> None:
    """A process of its own: the methods are added in the middle of ``import solo``."""
    (tmp_path / "exits.py").write_text("import sys\nsys.exit(3)\n")
    (tmp_path / "good.py").write_text(METHOD)
    for name in ("exits", "good"):
        info = tmp_path / f"{name}-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {name}:Method\n")
    (tmp_path / "script.py").write_text(
        "from solo.methods import METHODS\n"
        "assert METHODS['good'].__module__ == 'good' and 'exits' not in METHODS and 'emim' in METHODS\n"
    )
    done = run("-m", "emim_solo", "script.py", cwd=tmp_path, path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("method 'exits' is not available: exits:Method of package exits") == 1, done.stderr
