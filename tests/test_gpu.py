"""What only a GPU can show: `make test-gpu`. Where torch sees none, every test here says so and is skipped."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from emim_solo.checkpoints.opening import last_checkpoint
from emim_solo.emim.measures import scores
from emim_solo.emim.objective import emim_loss_func, mutual_information, random_directions
from emim_solo.evaluation.knn import knn_accuracies
from emim_solo.suite import dali, load_suite
from emim_solo.training.pretraining import prepare, pretrain
from emim_solo.training.run import Run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU: make test-gpu, where there is one"),
]
MakeCfg = Callable[..., DictConfig]
KINDS: list[dict[str, Any]] = [
    {},
    {"objective": "exact"},
    {"objective": "mean"},
    {"marginal": "exact", "residual": "exact", "weight": 1.0},
    {"marginal": "exact", "residual": "isotropic", "weight": 1.0, "noise_variance": 0.5},
    {"residual": "diagonal"},
    {"gaussian_weight": 3.0, "directions": random_directions(48, 8, seed=0)},
]
SIZES = [(256, 48), (40, 48)]  # samples on both sides of the dimensions


def leaves(samples: int, dimension: int, device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(samples, dimension, generator=generator)
    views = [source + 0.5 * torch.randn(samples, dimension, generator=generator) for _ in range(3)]
    return [view.to(device).requires_grad_() for view in views]


def on(device: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in kwargs.items()}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kwargs", KINDS, ids=lambda kwargs: "-".join(kwargs))
def test_losses_and_gradients_are_those_of_the_cpu(kwargs: dict[str, Any], size: tuple[int, int]) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        views = leaves(*size, device)
        value = emim_loss_func(*views, **on(device, kwargs))
        found[device] = [value.cpu(), *(gradient.cpu() for gradient in torch.autograd.grad(value, views))]
    torch.testing.assert_close(found["cuda"][0], found["cpu"][0], rtol=1e-4, atol=1e-6)
    for mine, its in zip(found["cuda"][1:], found["cpu"][1:], strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-3 * float(its.abs().max()))


def test_scores_and_neighbours_are_those_of_the_cpu() -> None:
    features = torch.stack(leaves(400, 24, "cpu"), 1).detach()
    assert scores(features.cuda()) == pytest.approx(scores(features), rel=1e-4, abs=1e-4)
    labels = torch.arange(400) % 5
    x = features[:, 0] + 0.5 * labels[:, None]
    parts = (x[:300], labels[:300], x[300:], labels[300:])
    assert knn_accuracies(*parts, ks=[5], device="cuda") == pytest.approx(knn_accuracies(*parts, ks=[5]), abs=1.1)


@pytest.mark.parametrize("kwargs", KINDS, ids=lambda kwargs: "-".join(kwargs))
def test_no_loss_waits_for_the_gpu(kwargs: dict[str, Any]) -> None:
    views, options = leaves(256, 48, "cuda"), on("cuda", kwargs)
    emim_loss_func(*views, **options).backward()  # libraries are set up in the first call
    torch.cuda.set_sync_debug_mode("error")
    try:
        emim_loss_func(*views, **options).backward()
        mutual_information(*views[:2])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waits_of_a_step(run: Run) -> int:
    """How often a training step and its backward pass wait for the GPU."""
    suite = load_suite()
    model: Any = suite.build(run.config).cuda()
    model.log = model.log_dict = lambda *_, **__: None
    indices, views, labels = next(iter(suite.train_loader(run.config, run.images)))
    batch = [indices.cuda(), [view.cuda() for view in views], labels.cuda()]
    model.training_step(batch, 0).backward()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.training_step(batch, 1).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("gaussian_weight", [0.0, 3.0])
def test_a_step_waits_no_more_often_than_one_of_the_suites_barlow_twins(
    gaussian_weight: float, make_cfg: MakeCfg
) -> None:
    settings = {"accelerator": "gpu", "log_every_n_steps": 10**6, "knn_eval__enabled": False}
    emim = prepare(make_cfg(**settings, method_kwargs__gaussian_weight=gaussian_weight))
    assert waits_of_a_step(emim) <= waits_of_a_step(prepare(make_cfg(**settings, method="barlow_twins")))


def test_mixed_precision_learns_what_full_precision_does(make_cfg: MakeCfg, tmp_path: Path) -> None:
    losses = {}
    for precision in ("32-true", "bf16-mixed", "16-mixed"):
        settings = {"accelerator": "gpu", "precision": precision, "checkpoint__dir": str(tmp_path / precision)}
        metrics = pretrain(prepare(make_cfg(**settings, max_epochs=3)))["metrics"]
        assert metrics["train_mi"] > metrics["train_mi_null"]
        losses[precision] = metrics["train_emim_loss_epoch"]
    assert losses == pytest.approx(dict.fromkeys(losses, losses["32-true"]), rel=0.1)  # 16 steps


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_a_killed_run_in_mixed_precision_goes_on_as_if_it_had_not_been(
    precision: str, make_cfg: MakeCfg, killed_in_its_third_epoch: Callable[[DictConfig], None], tmp_path: Path
) -> None:
    same = {"accelerator": "gpu", "precision": precision, "max_epochs": 3}
    whole = pretrain(prepare(make_cfg(**same, checkpoint__dir=str(tmp_path / "whole"))), version="run")
    cfg = make_cfg(**same, checkpoint__dir=str(tmp_path / "parts"))
    killed_in_its_third_epoch(cfg)
    resumed = pretrain(prepare(cfg), version="run")["metrics"]
    for name in ("train_emim_loss_epoch", "train_mi", "train_entropy"):
        assert resumed[name] == pytest.approx(whole["metrics"][name], rel=2e-2, abs=1e-2), name


@pytest.mark.skipif(not dali.is_installed(), reason="NVIDIA DALI is not installed: pip install 'emim-solo[dali]'")
def test_dali_decodes_on_the_gpu(make_cfg: MakeCfg) -> None:
    row = pretrain(prepare(make_cfg(accelerator="gpu", data__format="dali", dali__device="gpu")))
    assert row["metrics"]["train_mi"] > 0


@pytest.mark.parametrize("script", ["main_knn.py", "main_umap.py"])
def test_the_suites_scripts_with_their_lines_of_cuda(
    script: str, make_cfg: MakeCfg, few_digits: Path, tmp_path: Path
) -> None:
    spec = importlib.util.find_spec("solo")
    assert spec is not None
    path = Path(spec.origin or "").resolve().parent.parent / script
    if not path.is_file():
        pytest.skip(f"{script} is in a clone of solo-learn main only: make test-gpu SOLO=<clone>")
    folder = Path(pretrain(prepare(make_cfg(accelerator="gpu")))["checkpoint"])
    assert last_checkpoint(folder) is not None
    images = ("--dataset", "custom", "--train_data_path", few_digits / "val", "--val_data_path", few_digits / "val")
    arguments: list[Any] = [*images, "--pretrained_checkpoint_dir", folder, "--batch_size", "20", "--num_workers", "0"]
    if script == "main_knn.py":
        arguments += ["--k", "1", "--temperature", "0.1", "--feature_type", "backbone", "--distance_function", "cosine"]
    command = [sys.executable, "-W", "ignore", "-m", "emim_solo", path, *arguments]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Result: acc@1=" in done.stdout or list(tmp_path.rglob("*.pdf")) or list(tmp_path.rglob("*.png"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed for two processes of NCCL")
def test_two_processes_of_nccl_train_as_one_on_the_joined_batch(make_cfg: MakeCfg, tmp_path: Path) -> None:
    losses = []
    for name, devices, batch in (("one", [0], 32), ("two", [0, 1], 16)):
        cfg = make_cfg(accelerator="gpu", devices=devices, checkpoint__dir=str(tmp_path / name))
        cfg.optimizer.batch_size = batch  # of each process
        cfg.update({"strategy": "ddp", "sync_batchnorm": True, "max_epochs": 3})
        OmegaConf.save(cfg, tmp_path / f"{name}.yaml")
        program = (
            "import sys\nfrom omegaconf import OmegaConf\nfrom emim_solo.training.pretraining import prepare, pretrain\n"
            "row = pretrain(prepare(OmegaConf.load(sys.argv[1])))\n"
            "print('loss', row and row['metrics']['train_emim_loss_epoch'])\n"
        )
        script = tmp_path / "train.py"
        script.write_text(program)
        done = subprocess.run(
            [sys.executable, "-W", "ignore", script, tmp_path / f"{name}.yaml"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        (loss,) = {
            line.split()[1] for line in done.stdout.splitlines() if line.startswith("loss") and "None" not in line
        }
        losses.append(float(loss))
    assert losses[1] == pytest.approx(losses[0], rel=0.05)  # other random crops
