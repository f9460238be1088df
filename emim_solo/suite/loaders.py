"""solo-learn's own loaders read the images that this package lists, in both generations.

solo-learn finds images in four ways: by torchvision's ``ImageFolder``, by a list of everything in a folder, and in its DALI
pipelines by two more. Here the images of :func:`emim_solo.images.folders.find_images` replace what each way finds, under the
name that solo-learn's module uses.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from torchvision.datasets import ImageFolder

from emim_solo.images.folders import Images, load_rgb


class ListedImages(ImageFolder):
    """torchvision's ``ImageFolder`` on listed images, decoded by :func:`load_rgb`; without classes labels are -1."""

    listed: Mapping[str, Images]  # by absolute folder

    def __init__(self, root: str | Path, transform: Any = None) -> None:
        self.images_listed = self.listed[os.path.abspath(root)]
        super().__init__(root, transform, loader=load_rgb)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Names of the classes, and each name's label."""
        return self.images_listed.classes, {name: label for label, name in enumerate(self.images_listed.classes)}

    def make_dataset(self, *_: Any, **__: Any) -> list[tuple[str, int]]:  # type: ignore[override]
        """Path and label of each image."""
        return list(zip(self.images_listed.paths, self.images_listed.labels, strict=True))

    @property
    def images(self) -> list[str]:
        """Paths of unlabelled images, as in solo-learn's ``CustomDatasetWithoutLabels``; its ``data.fraction`` sets fewer."""
        return [path for path, _ in self.samples]

    @images.setter
    def images(self, paths: list[str]) -> None:
        self.samples = [(path, -1) for path in paths]


@contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Within it, a module or object of solo-learn has other values of these names."""
    theirs = {name: getattr(owner, name) for name in values}
    vars(owner).update(values)
    try:
        yield
    finally:
        vars(owner).update(theirs)


def reading_folders(module: ModuleType, *listed: Images | None) -> AbstractContextManager[None]:
    """Within it, a module of solo-learn makes :class:`ListedImages` of these folders."""
    by_folder = {os.path.abspath(images.folder): images for images in listed if images is not None}
    names = [name for name in ("ImageFolder", "CustomDatasetWithoutLabels") if by_folder and hasattr(module, name)]
    return replaced(module, **{name: type(name, (ListedImages,), {"listed": by_folder}) for name in names})


def listed_as_os(images: Images) -> SimpleNamespace:
    """The functions of ``os`` by which solo-learn lists a folder: its class folders, and the images in each."""
    root = os.path.abspath(images.folder)
    names: dict[str, list[str]] = {}
    for path, label in zip(images.paths, images.labels, strict=True):
        place = root if label < 0 else os.path.join(root, images.folders[label])
        names.setdefault(place, []).append(os.path.relpath(os.path.abspath(path), place))
    return SimpleNamespace(
        listdir=lambda folder: names.get(os.path.abspath(folder), []),
        scandir=lambda folder: [SimpleNamespace(name=name, is_dir=lambda: True) for name in images.folders],
    )
