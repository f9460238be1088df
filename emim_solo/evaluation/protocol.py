"""The protocol of a score: its images, views and features. All checkpoints that are compared share one protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torchvision.transforms import ColorJitter

from emim_solo.ground import compare, configs
from emim_solo.ground.errors import UsageError
from emim_solo.ground.settings import from_dotlist, read, setting
from emim_solo.suite.api import in_one_line
from emim_solo.suite.schema import Augmentation

FEWEST_IMAGES = 4
SEEDS: dict[str, Any] = {"least": 0, "most": 2**32 - 1}  # the range that every library takes
PARTS = ("backbone", "projector")
VIEWS: dict[str, Any] = {"least": 2, "most": 100_000}  # bounds for views of an image whose features are averaged


@dataclass(frozen=True)
class Protocol:
    """How representations are scored. It is the same for all that are compared and does not depend on their training."""

    augmentation: Augmentation  # crop size, mean and std are those of the run
    images: int = setting(least=FEWEST_IMAGES, most=2**31)  # at most
    views: int = setting(least=2, most=1000)  # of each image
    features: str = setting(choices=PARTS)
    noise_variance: float = setting(above=0)  # of the Gaussian noise in the informations
    delta: float = setting(above=0)  # LiDAR's delta
    splits: int = setting(least=1, most=1000)  # of the images into random halves, for the intervals
    seed: int = setting(**SEEDS)  # for the choice of images, the views, nulls and splits

    def __post_init__(self) -> None:
        low, high = self.augmentation.rrc.crop_min_scale, self.augmentation.rrc.crop_max_scale
        if low > high:
            key, scales = "protocol.augmentation.rrc", f"crop_min_scale={low} is above crop_max_scale={high}"
            raise UsageError(key, f"{key}: {scales}: expected the smaller one first")
        jitter, key = self.augmentation.color_jitter, "protocol.augmentation.color_jitter"
        with in_one_line(key, f"{key}={asdict(jitter)}"):  # torchvision checks its settings
            ColorJitter(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)

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
        values = configs.values(name, "score", "protocol")
        if not values:
            raise UsageError("protocol", f"protocol '{name}' is empty: expected the keys of default.yaml")
        return read(Protocol, from_dotlist(changes, values), "protocol")
