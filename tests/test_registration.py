"""EMIM gets into an unmodified solo-learn. Imports leave traces, so each case is a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from emim_solo.ground import configs
from emim_solo.plugin.registration import register
from emim_solo.suite import load_suite

REPOSITORY = Path(__file__).resolve().parent.parent


def run(*arguments: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python with this repository on its path, whether or not it is installed."""
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path} | env,
        capture_output=True,
        text=True,
    )


def run_script(code: str, cwd: Path, *arguments: str, **env: str) -> str:
    """Run code as a script and return what it printed; a failed assertion in it fails the test."""
    script = cwd / "script.py"
    script.write_text(textwrap.dedent(code))
    done = run(script, *arguments, cwd=cwd, **env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_emim_is_there_when_solo_is_imported_later(tmp_path: Path) -> None:
    run_script(
        """
        import importlib, importlib.util, sys
        from emim_solo.plugin.registration import register

        register()
        register()
        assert not {"torch", "lightning", "solo"} & set(sys.modules), "registration must not load them"
        importlib.util.find_spec("solo")  # asked for, not loaded: must not use the hook up

        from solo.methods import METHODS  # as main_pretrain.py holds it

        import solo.methods
        assert METHODS["emim"].__name__ == "EMIM"
        assert "barlow_twins" in METHODS and METHODS is solo.methods.METHODS
        assert solo.args and solo.losses and solo.utils, "solo's own __init__ has run to its end"

        emim = METHODS["emim"]
        register()
        assert METHODS["emim"] is emim

        importlib.reload(solo.methods)
        register()  # its METHODS are fresh
        assert solo.methods.METHODS is not METHODS and solo.methods.METHODS["emim"] is emim
        """,
        tmp_path,
    )


def test_emim_is_there_when_load_suite_imports_solo(tmp_path: Path) -> None:
    run_script(
        """
        from emim_solo.plugin.registration import register

        register()
        from emim_solo.suite import load_suite

        suite = load_suite()
        from solo.methods import METHODS

        assert METHODS["emim"] is suite.emim_class
        """,
        tmp_path,
    )


def test_emim_is_put_into_loaded_methods_in_place() -> None:
    emim = load_suite().emim_class
    from solo.methods import METHODS

    METHODS.pop("emim", None)
    register()
    register()
    assert METHODS["emim"] is emim


def test_another_package_called_solo_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "solo").mkdir()
    (tmp_path / "solo" / "__init__.py").write_text("keys = 2\n")
    run_script(
        """
        import sys
        from emim_solo.plugin.registration import register

        register()
        import solo
        assert solo.keys == 2 and "torch" not in sys.modules
        """,
        tmp_path,
    )


def test_unsupported_solo_learn_can_still_be_imported(tmp_path: Path) -> None:
    """Who has an old solo-learn and does not use EMIM gets a warning, not an error."""
    methods = tmp_path / "solo" / "methods"
    methods.mkdir(parents=True)
    (tmp_path / "solo" / "__init__.py").write_text("from solo import methods\n")
    (methods / "__init__.py").write_text("METHODS = {'byol': object}\n")
    (methods / "base.py").write_text("")
    run_script(
        """
        import warnings
        from emim_solo.plugin.registration import register

        register()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            from solo.methods import METHODS
        assert list(METHODS) == ["byol"]
        assert any("method 'emim' is not available" in str(warning.message) for warning in caught)
        """,
        tmp_path,
    )


def test_unrelated_hydra_app_imports_neither_torch_nor_solo(tmp_path: Path) -> None:
    code = """
        import sys
        import hydra

        @hydra.main(version_base="1.2", config_path=None)
        def main(cfg):
            from hydra.core.hydra_config import HydraConfig

            assert "hydra_plugins.emim_solo" in sys.modules, "the plugin has been loaded"
            providers = [source.provider for source in HydraConfig.get().runtime.config_sources]
            assert providers == ["hydra", "schema"], "its configs are no groups of this app"
            assert not {"torch", "lightning", "solo", "emim_solo.suite"} & set(sys.modules)
            print("ran")

        main()
    """
    started = time.perf_counter()
    assert run_script(code, tmp_path, "hydra.run.dir=.").strip() == "ran"
    print(f"unrelated Hydra app, plugin loaded: {time.perf_counter() - started:.2f} s in all")


def test_plugin_costs_an_unrelated_hydra_app_little(tmp_path: Path) -> None:
    """Printed, not asserted: a busy machine is no defect."""
    printed = run_script(
        """
        import time
        import hydra.core.plugins, hydra.core.config_search_path
        from hydra._internal.config_search_path_impl import ConfigSearchPathImpl

        started = time.perf_counter()
        from hydra_plugins.emim_solo import EMIMSearchPath

        search_path = ConfigSearchPathImpl()
        EMIMSearchPath().manipulate_search_path(search_path)
        seconds = time.perf_counter() - started
        assert not search_path.get_path()
        print(seconds)
        """,
        tmp_path,
    )
    print(f"the plugin adds {float(printed) * 1000:.0f} ms to a Hydra app")


def test_usage_error_in_another_hydra_app_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(
        textwrap.dedent(
            """
            import hydra
            from emim_solo import UsageError

            @hydra.main(version_base="1.2", config_path=None)
            def main(cfg):
                raise UsageError("weight must be a number")

            main()
            """
        )
    )
    done = run("app.py", "+a=1", "hydra.run.dir=.", cwd=tmp_path)
    assert done.returncode == 1
    assert "weight must be a number" in done.stderr.splitlines()
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("another_plugin", [False, True])
def test_uninstall_leaves_nothing_behind(another_plugin: bool, tmp_path: Path) -> None:
    """Real pip, in an environment of its own; the wheel is zipped here, of the packages that pyproject.toml names."""
    wheel = tmp_path / "emim_solo-0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for package in ("emim_solo", "hydra_plugins"):
            for path in sorted((REPOSITORY / package).rglob("*")):
                if path.is_file() and path.suffix != ".pyc":
                    archive.write(path, path.relative_to(REPOSITORY))
        info = "emim_solo-0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: emim-solo\nVersion: 0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in [*archive.namelist(), f"{info}/RECORD"]))
    environment = tmp_path / "environment"
    venv.create(environment)
    if another_plugin:
        (site,) = environment.glob("lib/*/site-packages")
        (site / "hydra_plugins" / "other").mkdir(parents=True)
        (site / "hydra_plugins" / "other" / "__init__.py").touch()
    before = sorted(environment.rglob("*"))
    pip = ("-m", "pip", "--python", environment / "bin" / "python")
    for command in (("install", "--no-index", "--no-deps", wheel), ("uninstall", "--yes", "emim-solo")):
        done = run(*pip, *command, cwd=tmp_path, PYTHONPATH="", PYTHONDONTWRITEBYTECODE="")
        assert done.returncode == 0, done.stderr
    assert "Uninstalling emim-solo" in done.stdout
    assert sorted(environment.rglob("*")) == before


def test_processes_started_by_lightning_register_too(tmp_path: Path) -> None:
    """DDP: Lightning's own command for the second process of a Hydra app, run as Lightning runs it."""
    printed = run_script(
        """
        import os, subprocess
        import hydra

        @hydra.main(version_base="1.2", config_path=None)
        def main(cfg):
            if "LOCAL_RANK" in os.environ:
                from solo.methods import METHODS

                print("rank", os.environ["LOCAL_RANK"], METHODS["emim"].__name__)
                return
            from lightning.fabric.strategies.launchers.subprocess_script import _hydra_subprocess_cmd

            command, cwd = _hydra_subprocess_cmd(local_rank=1)
            subprocess.run(command, env=os.environ | {"LOCAL_RANK": "1"}, cwd=cwd, check=True)

        main()
        """,
        tmp_path,
        "+a=1",
        "hydra.output_subdir=null",
        "hydra/job_logging=disabled",
    )
    assert "rank 1 EMIM" in printed


def test_script_runs_as_python_would_run_it_with_emim_registered(tmp_path: Path) -> None:
    folder = tmp_path / "clone"
    folder.mkdir()
    (folder / "beside.py").write_text("value = 7\n")
    (folder / "main.py").write_text(
        textwrap.dedent(
            """
            import sys
            from beside import value
            from solo.methods import METHODS

            assert __name__ == "__main__"
            print(sys.argv, sys.path[0], value, METHODS["emim"].__name__)
            """
        )
    )
    done = run("-m", "emim_solo", Path("clone") / "main.py", "--k", "1", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == f"{['clone/main.py', '--k', '1', '2']} {folder} 7 EMIM"


def test_status_of_the_script_is_passed_on(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text("raise SystemExit(5)\n")
    assert run("-m", "emim_solo", "main.py", cwd=tmp_path).returncode == 5


def test_missing_script_is_one_line_and_status_2(tmp_path: Path) -> None:
    done = run("-m", "emim_solo", "main_kmm.py", "--k", "1", cwd=tmp_path)
    assert done.returncode == 2
    assert "no script 'main_kmm.py'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_command_in_place_of_the_script_is_that_command(tmp_path: Path) -> None:
    done = run("-m", "emim_solo", "configs", "pretrain/digits", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (Path(done.stdout.strip()) / "emim.yaml").is_file()


# -- the scripts of an unmodified clone of solo-learn main ------------------------------------------------------------


@pytest.fixture(scope="module")
def clone() -> Path:
    import solo

    assert solo.__file__ is not None
    folder = Path(solo.__file__).resolve().parent.parent
    if not (folder / "main_pretrain.py").is_file():
        pytest.skip("the scripts are in a clone of solo-learn main only: make test-main SOLO=<clone>")
    return folder


@pytest.fixture(scope="module")
def overrides(few_digits: Path) -> list[str]:
    """What makes main_pretrain.py run on a CPU for a few seconds, with any config that has a projector."""
    return [
        *(f"data.train_path={few_digits / 'train'}", f"data.val_path={few_digits / 'val'}", "data.num_workers=0"),
        *("optimizer.batch_size=32", "max_epochs=1", "accelerator=cpu", "strategy=auto", "devices='1'", "precision=32"),
        *("sync_batchnorm=False", "method_kwargs.proj_hidden_dim=64", "method_kwargs.proj_output_dim=16"),
        *("+enable_progress_bar=False", "+limit_val_batches=0", "+num_sanity_val_steps=0"),
    ]


DIGITS = ("--config-path", REPOSITORY / "scripts" / "pretrain" / "digits", "--config-name", "emim.yaml")


@pytest.fixture(scope="module")
def checkpoint(clone: Path, overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch of EMIM in two processes by main_pretrain.py, with the shipped config; the checkpoint's folder."""
    cwd = tmp_path_factory.mktemp("clone")
    done = run(clone / "main_pretrain.py", *DIGITS, *overrides, "strategy=ddp", "devices='2'", cwd=cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (cwd / "trained_models" / "emim").iterdir()
    assert list(folder.glob("*.ckpt"))
    return folder


def test_main_pretrain_trains_emim_in_two_processes(checkpoint: Path) -> None:
    """160 images in batches of 32 are five steps for one process, and two whole ones for each of two."""
    (path,) = checkpoint.glob("*.ckpt")
    assert torch.load(path, map_location="cpu", weights_only=True)["global_step"] == 2
    assert (checkpoint / "args.json").is_file()


def test_main_linear_takes_the_shipped_config(clone: Path, checkpoint: Path, few_digits: Path, tmp_path: Path) -> None:
    (path,) = checkpoint.glob("*.ckpt")
    done = run(
        *(clone / "main_linear.py", "--config-path", REPOSITORY / "scripts" / "linear" / "digits"),
        *("--config-name", "emim.yaml", f'pretrained_feature_extractor="{path}"'),  # quoted as README tells
        *(f"data.train_path={few_digits / 'train'}", f"data.val_path={few_digits / 'val'}", "data.num_workers=0"),
        *("optimizer.batch_size=32", "max_epochs=1", "accelerator=cpu", "strategy=auto", "devices='1'", "precision=32"),
        *("sync_batchnorm=False", "+enable_progress_bar=False"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(tmp_path.glob("trained_models/linear/*/*.ckpt"))


def one_line(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """The command ended with one line that holds the parts, no traceback, beside Hydra's own of the overrides."""
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if parts[0] in line and "with overrides" not in line]
    for part in parts:
        assert part in line


def settings(folder: Path, *keys: str) -> list[list[Any]]:
    """What the runs in ``trained_models/emim`` were configured with, sorted."""
    stored = [OmegaConf.create(json.loads(path.read_text())) for path in folder.glob("trained_models/emim/*/args.json")]
    return sorted([OmegaConf.select(config, key) for key in keys] for config in stored)


def test_a_sweep_on_the_suites_own_barlow_config_trains_every_job(
    clone: Path, overrides: list[str], tmp_path: Path
) -> None:
    """README's second way: nothing of ours but the method's name and settings. That config has auto_resume on."""
    arguments = (
        *(clone / "main_pretrain.py", "--multirun"),
        *("--config-path", clone / "scripts" / "pretrain" / "cifar", "--config-name", "barlow.yaml"),
        *("method=emim", "name=emim-on-barlow", "wandb.enabled=False", "data.dataset=custom", *overrides),
        *("+method_kwargs.weight=1.0,4.0", "+limit_train_batches=1"),
    )
    first = run(*arguments, "+seed=1,2", cwd=tmp_path)
    assert first.returncode == 0, first.stderr[-3000:]
    assert settings(tmp_path, "seed", "method_kwargs.weight") == [[1, 1.0], [1, 4.0], [2, 1.0], [2, 4.0]]
    assert len(list(tmp_path.glob("trained_models/emim/*/emim-on-barlow*.ckpt"))) == 4
    assert "Resuming" not in first.stdout
    assert "EMIM does not continue" in first.stderr
    assert "method_kwargs.weight (1.0 there, 4.0 here)" in first.stderr
    assert "EMIM ignores method_kwargs of other methods: scale_loss" in first.stderr

    again = run(*arguments, "+seed=2,3", cwd=tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stdout.count("Resuming from previous checkpoint") == 2, "of seed 2, whose four are all there"
    assert len(settings(tmp_path, "seed")) == 6


def test_a_typo_in_method_kwargs_is_one_line(clone: Path, overrides: list[str], tmp_path: Path) -> None:
    done = run(clone / "main_pretrain.py", *DIGITS, *overrides, "+method_kwargs.wieght=1.0", cwd=tmp_path)
    one_line(done, "method_kwargs.wieght", "'weight'")


def test_explicit_resume_with_other_settings_is_one_line(
    clone: Path, checkpoint: Path, overrides: list[str], tmp_path: Path
) -> None:
    (path,) = checkpoint.glob("*.ckpt")
    other = ("method_kwargs.weight=1.0", "method_kwargs.proj_output_dim=8", "+seed=6", "max_epochs=2")
    done = run(
        clone / "main_pretrain.py", *DIGITS, *overrides, f"+resume_from_checkpoint='{path}'", *other, cwd=tmp_path
    )
    one_line(done, "has other settings", path.name, "weight (4.0 there, 1.0 here)", "proj_output_dim", "seed (5 there")
    assert not (tmp_path / "trained_models").exists()


def test_a_killed_run_goes_on_with_the_same_command(clone: Path, overrides: list[str], tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(
        textwrap.dedent(
            """
            import os, runpy, signal, sys
            from lightning.pytorch import Trainer

            save = Trainer.save_checkpoint

            def save_and_be_killed(self, *arguments, **kwargs):
                save(self, *arguments, **kwargs)
                os.kill(os.getpid(), signal.SIGKILL)

            Trainer.save_checkpoint = save_and_be_killed
            sys.argv = sys.argv[1:]
            runpy.run_path(sys.argv[0], run_name="__main__")
            """
        )
    )
    command = (clone / "main_pretrain.py", *DIGITS, *overrides, "auto_resume.enabled=True", "max_epochs=3")
    command = (*command, "+limit_train_batches=2")
    assert run("killed.py", *command, cwd=tmp_path).returncode == -signal.SIGKILL
    (path,) = tmp_path.glob("trained_models/emim/*/*-ep=0.ckpt")
    done = run(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"'{path.relative_to(tmp_path)}'" in done.stdout
    assert "other settings" not in done.stderr
    (last,) = tmp_path.glob("trained_models/emim/*/*-ep=2.ckpt")
    assert torch.load(last, map_location="cpu", weights_only=True)["global_step"] == 6


def test_auto_resume_offers_the_newest_run_of_the_same_settings(clone: Path, tmp_path: Path) -> None:
    """The suite's AutoResumer itself, on folders as its Checkpointer leaves them."""
    from solo.utils.auto_resumer import AutoResumer

    register()
    config: dict[str, Any] = {
        "name": "run",
        "method": "emim",
        "seed": 5,
        "max_epochs": 10,
        "backbone": {"name": "resnet18", "kwargs": {}},
        "data": {"dataset": "custom", "train_path": "a", "num_workers": 4},
        "method_kwargs": {"weight": 4.0},
        "augmentations": [{"crop_size": 32, "num_crops": 2}],
        "optimizer": {"name": "sgd", "lr": 0.1, "classifier_lr": "${optimizer.lr}", "kwargs": {"betas": [0.9, 0.99]}},
        "checkpoint": {"dir": "there"},
    }

    def write(version: str, stored: dict[str, Any] | str, *epochs: int) -> list[Path]:
        folder = tmp_path / version
        folder.mkdir(parents=True)
        (folder / "args.json").write_text(stored if isinstance(stored, str) else json.dumps(stored))
        paths = [folder / f"run-ep={epoch}.ckpt" for epoch in epochs]
        for path, epoch in zip(paths, epochs, strict=True):
            torch.save({"state_dict": {}, "epoch": epoch}, path)
            time.sleep(0.02)  # the suite goes by the time of the file
        return paths

    def offered(**changed: Any) -> Path | None:
        cfg = OmegaConf.merge(config, changed)
        return AutoResumer(tmp_path, max_hours=1).find_checkpoint(cfg)[0]

    assert offered() is None
    _, wanted = write("0", config | {"wandb_run_id": "x", "checkpoint": {"dir": "here"}}, 8, 9)
    assert offered() == wanted, "the newer of two, of a run that was written elsewhere"
    others: list[dict[str, Any]] = [
        {"seed": 6},
        {"method_kwargs": {"weight": 1.0}},
        {"augmentations": [{"crop_size": 32, "num_crops": 2}, {"crop_size": 16, "num_crops": 2}]},
        {"data": config["data"] | {"train_path": "b"}},
        {"optimizer": config["optimizer"] | {"kwargs": {"betas": [0.9, 0.95]}}},
        {"gradient_clip_val": 1.0},
    ]
    for number, other in enumerate(others, start=1):
        with pytest.warns(UserWarning, match="training starts afresh"):
            assert offered(**other) is None, other
        (path,) = write(str(number), config | other, 3)
        assert offered(**other) == path
        assert offered() == wanted, "newer ones of other settings do not hide it"
    write("half-written", '{"name": "run", "meth', 3)
    assert offered() == wanted
    (wanted.parent / "run-ep=10.ckpt").write_bytes(wanted.read_bytes()[:50])
    with pytest.warns(UserWarning, match="run-ep=10.ckpt'.*'run-ep=9.ckpt' is taken"):
        assert offered() == wanted

    write("barlow", config | {"method": "barlow_twins"}, 3)
    assert offered(method="barlow_twins", seed=9) is not None, "other methods are the suite's affair"


def test_copied_configs_survive_the_gitignore_of_a_clone(clone: Path, tmp_path: Path) -> None:
    shutil.copy(clone / ".gitignore", tmp_path)
    assert "wandb" in (tmp_path / ".gitignore").read_text()
    copied = configs.copy(tmp_path / "emim-scripts")
    for command in (("init", "--quiet"), ("add", "--all")):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    kept = subprocess.run(["git", "ls-files", "emim-scripts"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert sorted(kept.stdout.split()) == sorted(path.relative_to(tmp_path).as_posix() for path in copied)


@pytest.mark.parametrize("as_python_does", [True, False])
def test_main_knn_knows_emim_only_through_us(
    clone: Path, checkpoint: Path, few_digits: Path, tmp_path: Path, as_python_does: bool
) -> None:
    """main_knn.py never starts Hydra. Its two lines that need CUDA are kept on the CPU by the script that calls it."""
    (tmp_path / "knn_on_cpu.py").write_text(
        textwrap.dedent(
            """
            import runpy, sys
            import torch

            torch.Tensor.cuda = lambda self, **_: self
            sys.argv = sys.argv[1:]
            runpy.run_path(sys.argv[0], run_name="__main__")
            """
        )
    )
    arguments = [
        *("knn_on_cpu.py", clone / "main_knn.py", "--dataset", "custom", "--pretrained_checkpoint_dir", checkpoint),
        *("--train_data_path", few_digits / "val", "--val_data_path", few_digits / "val"),
        *("--batch_size", "20", "--num_workers", "0"),
        *("--k", "1", "--temperature", "0.1", "--feature_type", "backbone", "projector"),
        *("--distance_function", "cosine"),
    ]
    done = run(*([] if as_python_does else ["-m", "emim_solo"]), *arguments, cwd=tmp_path)
    if as_python_does:
        assert "KeyError: 'emim'" in done.stderr
    else:
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("Result: acc@1=") == 2
