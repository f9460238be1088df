"""The protocol of a score: its images, views and features. All checkpoints that are compared share one protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from emim_solo.ground import compare, configs, files
from emim_solo.ground.errors import UsageError
from emim_solo.ground.settings import from_dotlist, read, setting

FEWEST_IMAGES = 4
SEEDS: dict[str, Any] = {"least": 0, "most": 2**32 - 1}  # the range that every library takes
PARTS = ("backbone", "projector")
VIEWS: dict[str, Any] = {"least": 2, "most": 100_000}  # bounds for views of an image whose features are averaged


@dataclass(frozen=True)
class Crop:
    """A random crop; its share of the image's area is between ``crop_min_scale`` and ``crop_max_scale``."""

    enabled: bool
    crop_min_scale: float = setting(above=0, most=1)
    crop_max_scale: float = setting(above=0, most=1)

    def __post_init__(self) -> None:
        if self.crop_min_scale > self.crop_max_scale:
            key = "protocol.augmentation.rrc"
            scales = f"crop_min_scale={self.crop_min_scale} is above crop_max_scale={self.crop_max_scale}"
            raise UsageError(key, f"{key}: {scales}: expected the smaller one first")


@dataclass(frozen=True)
class ColorJitter:
    """Random changes of brightness, contrast, saturation and hue, each at most of this size."""

    prob: float = setting(least=0, most=1)
    brightness: float = setting(least=0)
    contrast: float = setting(least=0)
    saturation: float = setting(least=0)
    hue: float = setting(least=0, most=0.5)


@dataclass(frozen=True)
class Sometimes:
    """An operation on some of the views, chosen with probability ``prob``."""

    prob: float = setting(least=0, most=1)


@dataclass(frozen=True)
class Augmentation:
    """An entry of ``augmentations`` without crop size, mean and std: these are the run's own."""

    rrc: Crop
    color_jitter: ColorJitter
    grayscale: Sometimes
    gaussian_blur: Sometimes
    solarization: Sometimes
    equalization: Sometimes
    horizontal_flip: Sometimes


@dataclass(frozen=True)
class Protocol:
    """How representations are scored. It is the same for all that are compared and does not depend on their training."""

    augmentation: Augmentation
    images: int = setting(least=FEWEST_IMAGES, most=2**31)  # at most
    views: int = setting(least=2, most=1000)  # of each image
    features: str = setting(choices=PARTS)
    noise_variance: float = setting(above=0)  # of the Gaussian noise in the informations
    delta: float = setting(above=0)  # LiDAR's delta
    splits: int = setting(least=1, most=1000)  # of the images into random halves, for the intervals
    seed: int = setting(**SEEDS)  # for the choice of images, the views, nulls and splits

    @property
    def hash(self) -> str:
        """Twelve hex digits that identify the protocol."""
        return compare.config_hash(asdict(self))

    @property
    def settings(self) -> dict[str, Any]:
        """The keyword arguments of :func:`emim_solo.emim.measures.scores`."""
        return {"noise_variance": self.noise_variance, "delta": self.delta, "seed": self.seed}

    @staticmethod
    def read(name: str, changes: Sequence[str] = ()) -> Protocol:
        """A protocol from a YAML file or a shipped one (``default``, ``digits``), with changes, ``key=value`` each.

        UsageError for an unknown or missing key, a wrong value, or if there is no such file.
        """
        path = configs.file_or_shipped(name, "score", "protocol")
        try:
            values = yaml.safe_load(files.read_text(path))
        except yaml.YAMLError as error:
            raise UsageError("protocol", f"protocol '{path}' is no YAML ({' '.join(str(error).split())})") from error
        if not isinstance(values, dict):
            raise UsageError("protocol", f"protocol '{path}' is no mapping: expected the keys of default.yaml")
        return read(Protocol, from_dotlist(changes, values), "protocol")
