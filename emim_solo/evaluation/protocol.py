"""The protocol of a score: which images, views and features, the same for all that are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from emim_solo.ground import compare, configs, files
from emim_solo.ground.errors import UsageError
from emim_solo.ground.settings import from_dotlist, read, setting

FEWEST_IMAGES = 4
SEEDS: dict[str, Any] = {"least": 0, "most": 2**32 - 1}  # that every library takes
PARTS = ("backbone", "projector")
VIEWS: dict[str, Any] = {"least": 2, "most": 100_000}  # of each image, whose features are averaged


@dataclass(frozen=True)
class Crop:
    """A crop of a random size, of the share ``crop_min_scale`` to ``crop_max_scale`` of the image."""

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
    """Random brightness, contrast, saturation and hue, each up to this much."""

    prob: float = setting(least=0, most=1)
    brightness: float = setting(least=0)
    contrast: float = setting(least=0)
    saturation: float = setting(least=0)
    hue: float = setting(least=0, most=0.5)


@dataclass(frozen=True)
class Sometimes:
    """An operation that is done to a share of the views."""

    prob: float = setting(least=0, most=1)


@dataclass(frozen=True)
class Augmentation:
    """An entry of ``augmentations`` less what follows the run's images: crop size, mean, std."""

    rrc: Crop
    color_jitter: ColorJitter
    grayscale: Sometimes
    gaussian_blur: Sometimes
    solarization: Sometimes
    equalization: Sometimes
    horizontal_flip: Sometimes


@dataclass(frozen=True)
class Protocol:
    """How representations are scored: the same for all that are compared, whatever they were trained with."""

    augmentation: Augmentation
    images: int = setting(least=FEWEST_IMAGES, most=2**31)  # at most
    views: int = setting(least=2, most=1000)  # of each image
    features: str = setting(choices=PARTS)
    noise_variance: float = setting(above=0)  # e of the informations
    delta: float = setting(above=0)  # of LiDAR
    splits: int = setting(least=1, most=1000)  # of the images into halves, for the intervals
    seed: int = setting(**SEEDS)  # of the images, views, nulls and splits

    @property
    def hash(self) -> str:
        """Twelve digits that tell protocols apart."""
        return compare.config_hash(asdict(self))

    @property
    def settings(self) -> dict[str, Any]:
        """Those of :func:`emim_solo.emim.measures.scores`."""
        return {"noise_variance": self.noise_variance, "delta": self.delta, "seed": self.seed}

    @staticmethod
    def of(values: Any) -> Protocol:
        """A protocol from its values by name; UsageError for an unknown or missing key, or a value that is none."""
        return read(Protocol, values, "protocol")

    @staticmethod
    def read(name: str, changes: Sequence[str] = ()) -> Protocol:
        """A protocol from a YAML file or a shipped one (``default``, ``digits``), with changes, ``key=value`` each.

        UsageError as :meth:`of`, or if there is no such file.
        """
        path = configs.file_or_shipped(name, "score", "protocol")
        try:
            values = yaml.safe_load(files.read_text(path))
        except yaml.YAMLError as error:
            raise UsageError("protocol", f"protocol '{path}' is no YAML ({' '.join(str(error).split())})") from error
        if not isinstance(values, dict):
            raise UsageError("protocol", f"protocol '{path}' is no mapping: expected the keys of default.yaml")
        return Protocol.of(from_dotlist(changes, values))
