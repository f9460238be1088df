"""The loss and the score without solo-learn: docs/python.md as it stands, and a Python that has torch alone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from emim_solo import EMIMLoss, emim_loss_func, view_information
from emim_solo.emim import measures

REPOSITORY = Path(__file__).resolve().parent.parent
# What torch itself asks for. NumPy is not among it.
OF_TORCH = {"torch", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec", "filelock", "typing_extensions"}
TORCH_ALONE = f"""
import sys
from importlib.abc import MetaPathFinder

class OnlyTorch(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        root = fullname.partition(".")[0]
        if root not in sys.stdlib_module_names | {OF_TORCH | {"emim_solo", "triton", "nvidia", "cuda", "torchgen"}}:
            raise ModuleNotFoundError(f"No module named '{{root}}'", name=root)

sys.meta_path.insert(0, OnlyTorch())
"""


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


BLOCKS = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "python.md").read_text(), flags=re.DOTALL)


def test_the_blocks_of_the_page_run_one_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    *blocks, of_stable_pretraining = BLOCKS
    assert "stable_pretraining" in of_stable_pretraining, "which has a test of its own"
    names: dict[str, object] = {"__name__": "page"}
    torch.manual_seed(0)
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
    said = capsys.readouterr().out
    information, null = map(float, re.search(r"([\d.]+) nats; ([\d.]+) for broken pairs", said).groups())  # type: ignore[union-attr]
    assert information > null, "two views of one image"
    score, half_width = map(float, re.search(r"([\d.]+) ± ([\d.]+) nats", said).groups())  # type: ignore[union-attr]
    assert score > 3 * half_width, "views of one image tell about it"
    assert names["trainer"].global_step == 4  # type: ignore[attr-defined]


def test_the_block_of_stable_pretraining_trains_with_the_loss() -> None:
    pytest.importorskip("stable_pretraining", reason="pip install stable-pretraining, which brings 130 packages")
    names: dict[str, object] = {"__name__": "page"}
    for block in (BLOCKS[0], "import lightning", BLOCKS[-1]):
        exec(compile(block, "docs/python.md", "exec"), names)
    assert names["trainer"].global_step == 4  # type: ignore[attr-defined]


def test_the_lines_of_readme_run() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), flags=re.DOTALL)
    z1, z2, features = normal(32, 8), normal(32, 8, seed=1), normal(32, 3, 8)
    names: dict[str, object] = {"z1": z1, "z2": z2, "features": features}
    exec(compile(block, "README.md", "exec"), names)
    assert names["loss"] == emim_loss_func(z1, z2) and names["found"] == view_information(features)


def test_torch_alone_is_enough_for_the_loss_and_the_score() -> None:
    program = """
import torch
from emim_solo import EMIMLoss, emim_loss_func, mutual_information, view_information
torch.manual_seed(0)
image = torch.randn(64, 1, 8)
views = image + 0.3 * torch.randn(64, 4, 8)
z1, z2 = (view.requires_grad_() for view in (views[:, 0].clone(), views[:, 1].clone()))
loss = EMIMLoss()(z1, z2)
loss.backward()
assert z1.grad.abs().sum() > 0 and loss == emim_loss_func(z1, z2)
found = view_information(views)
print(f"{loss:.4f} {found.score:.4f} {found.half_width:.4f}")
assert "numpy" not in sys.modules and "scipy" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", TORCH_ALONE + program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    loss, score, half_width = map(float, done.stdout.split())
    torch.manual_seed(0)
    image = torch.randn(64, 1, 8)
    views = image + 0.3 * torch.randn(64, 4, 8)
    assert loss == pytest.approx(emim_loss_func(views[:, 0], views[:, 1]).item(), abs=1e-4)
    assert score == pytest.approx(measures.scores(views)["view_information"], abs=1e-4)
    assert half_width == pytest.approx(measures.half_widths(views)["view_information"], abs=1e-3)


def test_a_command_without_its_packages_says_so_in_one_line() -> None:
    program = "from emim_solo.cli import main; main(['knn', 'trained_models/emim/0'])"
    done = subprocess.run([sys.executable, "-c", TORCH_ALONE + program], capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "emim-solo[solo]" in line and "is not installed" in line


def test_the_method_needs_no_package_that_a_clone_lacks() -> None:
    """solo-learn main's own requirements, and what these bring, are enough for ``method=emim``."""
    program = """
import sys
for name in ("optuna", "matplotlib", "umap", "seaborn", "onnx", "onnxscript", "onnxruntime"):
    sys.modules[name] = None
import hydra_plugins.emim_solo
from emim_solo import register
from emim_solo.suite import load_suite
register()
assert "emim" in load_suite().methods()
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_module_is_the_function() -> None:
    views = [normal(32, 6, seed=seed) for seed in range(3)]
    for settings in (
        {},
        {"objective": "exact"},
        {"objective": "mean"},
        {"marginal": "exact", "weight": 1.0, "noise_variance": 0.5},
    ):
        assert EMIMLoss(**settings)(*views) == emim_loss_func(*views, **settings)
    assert EMIMLoss()(views[0], views[0]) < EMIMLoss()(*views[:2]), "lower where the views agree"


def test_directions_are_new_in_every_step_and_the_same_for_the_same_number_of_steps() -> None:
    z1, z2 = normal(64, 8).sign(), normal(64, 8, seed=1).sign()
    one, other = EMIMLoss(gaussian_weight=1.0), EMIMLoss(gaussian_weight=1.0)
    assert one(z1, z2) == other(z1, z2)
    assert one(z1, z2) != EMIMLoss(gaussian_weight=1.0)(z1, z2)
    assert one(z1, z2) > EMIMLoss()(z1, z2), "signs are not Gaussian"


@pytest.mark.parametrize("settings", [{"weight": -1.0}, {"objective": "mi"}, {"noise_variance": 0.0}])
def test_bad_settings_are_refused_when_the_loss_is_made(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        EMIMLoss(**settings)
    with pytest.raises(ValueError, match="two views"):
        EMIMLoss()(normal(8, 4))


def test_the_score_takes_arrays_and_is_of_the_scores() -> None:
    features = normal(60, 1, 5) + normal(60, 3, 5, seed=1)
    found = view_information(features.numpy())
    assert found == view_information(features)
    scores, widths = measures.scores(features), measures.half_widths(features)
    assert found.score == pytest.approx(scores["view_information"])
    assert found.null == pytest.approx(scores["view_information_null"])
    assert found.half_width == pytest.approx(widths["view_information"])
    independent = view_information(np.random.default_rng(0).normal(size=(60, 3, 5)))
    assert independent.score < found.score / 2


@pytest.mark.parametrize("degrees", [1, 2, 5, 10, 30])
def test_the_quantile_of_students_t(degrees: int) -> None:
    assert measures.t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, df=degrees), rel=1e-6)
