"""Rivals on many views as methods of solo-learn, main and 1.0.2, by the entry points of pyproject.toml beside this file.

    pip install --no-deps --no-build-isolation --editable research/real_size/rivals

The losses are those of research/out_of_the_box/methods.py and research/rivals.py, which tests hold to lightly's and to
solo-learn's. Projector and everything else are EMIM's, so that the methods differ in the loss alone. One process only: the
losses are of the batch of one process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from solo.methods.base import BaseMethod
from torch import Tensor, nn

from emim_solo.suite import load_suite

RESEARCH = Path(__file__).resolve().parents[2]
for folder in (RESEARCH / "out_of_the_box", RESEARCH):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

import lab  # noqa: E402
import methods  # noqa: E402
import rivals  # noqa: E402


class OfViews(BaseMethod):  # type: ignore[misc, unused-ignore]
    """A loss of the embeddings of two or more views. Subclasses have its settings, with defaults, and `loss`."""

    takes_many_views = True
    WEIGHTS: ClassVar[dict[str, float]] = {}
    loss: Callable[..., Any]

    def __init__(self, cfg: Any = None, **kwargs: Any) -> None:  # main gives one config, 1.0.2 keywords
        own = {name: kwargs.pop(name, value) for name, value in self._defaults().items()}
        super().__init__(*([] if cfg is None else [cfg]), **kwargs)
        self.settings = own if cfg is None else {name: cfg.method_kwargs[name] for name in own}
        hidden, output = self.settings["proj_hidden_dim"], self.settings["proj_output_dim"]
        self.projector = lab.mlp([self.features_dim, hidden, hidden, output])

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        return {"proj_hidden_dim": 2048, "proj_output_dim": 512, **cls.WEIGHTS}

    @classmethod
    def add_and_assert_specific_cfg(cls, cfg: Any) -> Any:  # main: defaults of method_kwargs
        cfg = BaseMethod.add_and_assert_specific_cfg(cfg)
        cfg.method_kwargs = {**cls._defaults(), **cfg.method_kwargs}
        return cfg

    @classmethod
    def add_model_specific_args(cls, parser: Any) -> Any:  # 1.0.2: the same
        parser = BaseMethod.add_model_specific_args(parser)
        for name, value in cls._defaults().items():
            parser.add_argument(f"--{name}", type=type(value), default=value)
        return parser

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        return [*super().learnable_params, {"name": "projector", "params": self.projector.parameters()}]

    def forward(self, X: Tensor) -> dict[str, Any]:
        out = super().forward(X)
        return {**out, "z": self.projector(out["feats"])}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = super().training_step(batch, batch_idx)  # main has called forward in it, 1.0.2 has not
        z = out.get("z") or [self.projector(features) for features in out["feats"]]
        with torch.autocast(z[0].device.type, enabled=False):
            loss = self.loss(*(view.float() for view in z), **{name: self.settings[name] for name in self.WEIGHTS})
        self.log(f"train_{type(self).__name__.lower()}_loss", loss, on_epoch=True, sync_dist=True)
        total: Tensor = out["loss"] + loss
        return total


class EMPSSL(OfViews):
    WEIGHTS: ClassVar = {"inv_coef": 200.0, "tcr_eps": 0.2}
    loss = staticmethod(methods.emp_ssl)


class EMPSSLPublished(EMPSSL):
    """EMP-SSL with its authors' network: the features are a hidden layer of ``proj_hidden_dim`` after the ResNet's pooling."""

    def __init__(self, cfg: Any = None, **kwargs: Any) -> None:
        super().__init__(cfg, **kwargs)
        inputs, width = self.features_dim, self.settings["proj_hidden_dim"]
        backbone: Any = load_suite().backbone(self)
        backbone.fc = nn.Sequential(nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU())
        self.features_dim = width
        self.classifier = nn.Linear(width, self.classifier.out_features)
        self.projector = lab.mlp([width, width, self.settings["proj_output_dim"]])


class MMCR(OfViews):
    WEIGHTS: ClassVar = {"lmda": 0.0}
    loss = staticmethod(rivals.mmcr)


class FroSSL(OfViews):
    WEIGHTS: ClassVar = {"invariance_weight": 1.0}
    loss = staticmethod(rivals.frossl)


class LeJEPA(OfViews):
    """All views are pulled to the mean of all."""

    WEIGHTS: ClassVar = {"lambda_param": 0.05}

    @staticmethod
    def loss(*views: Tensor, lambda_param: float) -> Any:
        return rivals.LeJEPA(lambda_param, large=len(views))(*views)


class VICRegViews(OfViews):
    """VICReg over all pairs of K views, which is each view to the mean of the views at 2K / (K - 1) times the weight."""

    WEIGHTS: ClassVar = {"similarity": 25.0, "variance": 25.0, "covariance": 1.0}
    loss = staticmethod(methods.vicreg)
