"""The protocol of a score: which images, views and features, the same for all that are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import yaml

from emim_solo.ground import compare, configs, files
from emim_solo.ground.errors import UsageError
from emim_solo.ground.settings import from_dotlist, read, setting

FEWEST_IMAGES = 4
SEEDS = {"least": 0, "most": 2**32 - 1}  # that every library takes
PARTS = ("backbone", "projector")


@dataclass(frozen=True)
class Crop:
    """A crop of a random size, of the share ``crop_min_scale`` to ``crop_max_scale`` of the image."""

    enabled: bool
    crop_min_scale: float = setting(above=0, most=1)
    crop_max_scale: float = setting(above=0, most=1)

    def __post_init__(self) -> None:
        if self.crop_min_scale > self.crop_max_scale:
            raise UsageError(
                "protocol.augmentation.rrc",
                f"protocol.augmentation.rrc: crop_min_scale={self.crop_min_scale} is above "
                f"crop_max_scale={self.crop_max_scale}: expected the smaller one first",
            )


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
    """How representations are scored: the same for all that are compared, whatever they were trained with.

    Attributes:
        images: number of images at most.
        views: of each image.
        features: ``backbone`` or ``projector``.
        noise_variance: e of the informations.
        delta: of LiDAR.
        splits: of the images into halves, for the intervals.
        seed: of the images, views, nulls and splits.
        augmentation: of the views.
    """

    augmentation: Augmentation
    images: int = setting(least=FEWEST_IMAGES, most=2**31)
    views: int = setting(least=2, most=1000)
    features: str = setting(choices=PARTS)
    noise_variance: float = setting(above=0)
    delta: float = setting(above=0)
    splits: int = setting(least=1, most=1000)
    seed: int = setting(least=0, most=SEEDS["most"])

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
        """A protocol from its values by name, as ``dataclasses.asdict`` has them.

        Raises:
            UsageError: a key is unknown or missing, or a value of another type or out of its bounds.
        """
        return read(Protocol, values, "protocol")

    @staticmethod
    def read(name: str, changes: Sequence[str] = ()) -> Protocol:
        """A protocol from a YAML file.

        Args:
            name: of the file, or of a shipped one (``default``, ``digits``).
            changes: ``key=value`` each.

        Raises:
            UsageError: no such file, or as :meth:`of`.
        """
        path = configs.file_or_shipped(name, "score", "protocol")
        try:
            values = yaml.safe_load(files.read_text(path))
        except yaml.YAMLError as error:
            raise UsageError("protocol", f"protocol '{path}' is no YAML ({' '.join(str(error).split())})") from error
        if not isinstance(values, dict):
            names = ", ".join(field.name for field in fields(Protocol))
            raise UsageError("protocol", f"protocol '{path}' is no mapping: expected {names}, as in default.yaml")
        return Protocol.of(from_dotlist(changes, values))
