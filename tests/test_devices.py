"""A training step of every method on another device, by torch's fake tensors: a tensor left on the CPU is an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from omegaconf import DictConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from emim_solo.emim import method
from emim_solo.emim.objective import emim_loss_func
from emim_solo.suite import load_suite
from emim_solo.training.pretraining import prepare

MakeCfg = Callable[..., DictConfig]

METHODS = sorted(load_suite().methods())
BATCH = 8
SETTINGS: dict[str, Any] = {
    "proj_hidden_dim": 32,
    "proj_output_dim": 16,
    "pred_hidden_dim": 16,
    "temperature": 0.2,
    "temperature_q": 0.1,
    "temperature_k": 0.04,
    "queue_size": 64,
    "num_prototypes": 8,
}
MORE: dict[str, dict[str, Any]] = {
    "deepclusterv2": {"num_prototypes": [4, 4]},
    "dino": {"warmup_teacher_temperature_epochs": 1},
    "mae": {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2},
    "swav": {"epoch_queue_starts": 0},
    "wmse": {"whitening_size": 8, "proj_output_dim": 4},
}


NO_STEP = {
    "all4one": "it asks torch for the type of tensors on a real GPU, and copies a network, with its fake mode",
    "deepclusterv2": "its step is on the clusters that k-means has made of an epoch's embeddings",
    "wmse": "it asks torch for the type of tensors on a real GPU",
}


class ReadValues(TorchDispatchMode):
    """A fake tensor has no values. One that is read is 0, or True, and a mask True throughout: what comes after runs too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func is aten._local_scalar_dense.default:
            return True if args[0].dtype is torch.bool else 0.0 if args[0].is_floating_point() else 0
        if func is aten.nonzero.default:
            return _all_true(args[0])
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            tensor, indices, *rest = args
            args = tensor, [place for index in indices for place in _places(index)], *rest
        return func(*args, **(kwargs or {}))


def _places(index: Tensor | None) -> Sequence[Tensor | None]:
    return _all_true(index).unbind(1) if index is not None and index.dtype is torch.bool else [index]


def _all_true(mask: Tensor) -> Tensor:
    """Shape and device of ``mask.nonzero()`` where it is True throughout."""
    return torch.zeros(mask.numel(), mask.dim(), dtype=torch.long, device=mask.device)


def move(model: nn.Module, device: str) -> None:
    """As ``model.to(device)``, which cannot exchange the data of a fake tensor."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    moved = tensor.detach().to(device)
                    tensors[name] = (
                        nn.Parameter(moved, tensor.requires_grad) if tensors is module._parameters else moved
                    )  # type: ignore[assignment]


def step_on_cuda(cfg: DictConfig) -> Tensor:
    """The loss of one logged training step: its shape and device, for it has no value."""
    suite, run = load_suite(), prepare(cfg)
    with FakeTensorMode(), ReadValues():
        model: Any = suite.build(run.config).train()
        move(model, "cuda")
        model._device = torch.device("cuda:0")  # as Lightning's strategy sets it
        model.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, log_every_n_steps=1)
        model.log = model.log_dict = lambda *_, **__: None
        model.on_train_start()  # makes queues
        views = [
            torch.randn(BATCH, 3, view.crop_size, view.crop_size, device="cuda")
            for view in run.config.augmentations
            for _ in range(view.num_crops)
        ]
        index, labels = (torch.zeros(BATCH, dtype=torch.long, device="cuda") for _ in range(2))
        loss: Tensor = model.training_step([index, views, labels], 0)
        return loss


@pytest.fixture
def step_cfg(make_cfg: MakeCfg) -> MakeCfg:
    def make(name: str, small_crops: bool, **overrides: Any) -> DictConfig:
        cfg = make_cfg(
            method=name,
            method_kwargs=SETTINGS | MORE.get(name, {}),
            backbone={"name": "vit_tiny" if name == "mae" else "resnet18"},
            optimizer__batch_size=BATCH,
            momentum={"base_tau": 0.9, "classifier": True},
            performance={"disable_channel_last": True},  # by `model.to`, as above
            **overrides,
        )
        if small_crops:
            cfg.augmentations.append({**cfg.augmentations[0], "crop_size": 8})
        return cfg

    return make


@pytest.mark.parametrize("name", METHODS)
def test_a_training_step_mixes_no_devices(name: str, step_cfg: MakeCfg) -> None:
    """With online classifier, k-NN, and small crops where the method takes them."""
    if name in NO_STEP:
        pytest.skip(NO_STEP[name])
    for small_crops in (False, True)[: 1 + load_suite().uses_small_crops(name)]:
        loss = step_on_cuda(step_cfg(name, small_crops))
        assert (loss.device.type, loss.shape) == ("cuda", ()), small_crops


def test_a_tensor_left_on_the_cpu_is_an_error(step_cfg: MakeCfg, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above sees what it is for: noise that the loss would draw without saying where."""

    def careless(z1: Tensor, *views: Tensor, **kwargs: Any) -> Tensor:
        return emim_loss_func(z1 + torch.randn(z1.shape), *views, **kwargs)

    monkeypatch.setattr(method, "emim_loss_func", careless)
    with pytest.raises(
        RuntimeError, match=r"two (different )?devices, cuda:0 and cpu|two different devices cuda:0, cpu"
    ):
        step_on_cuda(step_cfg("emim", False))
