"""CorInfoMax (arXiv 2209.07999) as a method of solo-learn, main and 1.0.2."""

import torch
from solo.methods.base import BaseMethod
from solo.utils.misc import gather
from torch import nn

DEFAULTS = {"proj_hidden_dim": 2048, "proj_output_dim": 64, "weight": 500.0, "forgetting": 0.01, "eps": 1e-6}


class CorInfoMax(BaseMethod):
    def __init__(self, cfg=None, **kwargs):  # main gives one config, 1.0.2 keywords
        own = {name: kwargs.pop(name, value) for name, value in DEFAULTS.items()}
        super().__init__(*([] if cfg is None else [cfg]), **kwargs)
        self.settings = own if cfg is None else {name: cfg.method_kwargs[name] for name in DEFAULTS}
        hidden, d = self.settings["proj_hidden_dim"], self.settings["proj_output_dim"]
        self.projector = nn.Sequential(
            *(nn.Linear(self.features_dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU()),
            nn.Linear(hidden, d),
        )
        self.register_buffer("mean", torch.zeros(2, d, dtype=torch.float64))
        self.register_buffer("covariance", torch.eye(d, dtype=torch.float64).repeat(2, 1, 1))

    @staticmethod
    def add_and_assert_specific_cfg(cfg):  # main: defaults of method_kwargs
        cfg = BaseMethod.add_and_assert_specific_cfg(cfg)
        cfg.method_kwargs = {**DEFAULTS, **cfg.method_kwargs}
        return cfg

    @staticmethod
    def add_model_specific_args(parser):  # 1.0.2: the same
        parser = BaseMethod.add_model_specific_args(parser)
        for name, value in DEFAULTS.items():
            parser.add_argument(f"--{name}", type=type(value), default=value)
        return parser

    @property
    def learnable_params(self):
        return [*super().learnable_params, {"name": "projector", "params": self.projector.parameters()}]

    def forward(self, X):
        out = super().forward(X)
        return {**out, "z": self.projector(out["feats"])}

    def training_step(self, batch, batch_idx):
        out = super().training_step(batch, batch_idx)  # main has called forward in it, 1.0.2 has not
        z = out.get("z") or [self.projector(features) for features in out["feats"]]
        loss = self.corinfomax_loss(torch.stack([gather(view) for view in z]).double()).float()
        self.log("train_corinfomax_loss", loss, on_epoch=True, sync_dist=True)
        return out["loss"] + loss

    def corinfomax_loss(self, z):  # (2, images, dimensions)
        keep = self.settings["forgetting"]
        mean = keep * self.mean + (1 - keep) * z.mean(1)
        centred = z - mean[:, None]
        covariance = keep * self.covariance + (1 - keep) * centred.mT @ centred / z.shape[1]
        self.mean, self.covariance = mean.detach(), covariance.detach()
        eps = self.settings["eps"] * torch.eye(z.shape[2], dtype=z.dtype, device=z.device)
        entropy = torch.logdet(covariance + eps).sum() / z.shape[2]
        return self.settings["weight"] * (z[0] - z[1]).square().mean() - entropy
