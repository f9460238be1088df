"""Folders of images in the suite's own loaders, of either generation: they list them, we say what is an image in them.

The suite finds images in four ways: by torchvision's ``ImageFolder``, by a list of everything in a folder, and in its DALI
pipelines by two more. Each of them takes what :func:`emim_solo.data.find_images` finds, put under the name that the suite's
module looks it up by.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from torchvision.datasets import ImageFolder

from emim_solo.data import class_folders, find_images, image_names, load_rgb


class LabelledImages(ImageFolder):
    """torchvision's ``ImageFolder`` on what :func:`find_images` finds, decoded by :func:`load_rgb`."""

    labelled = True

    def __init__(self, root: str | Path, transform: Any = None) -> None:
        self.found = find_images(root, labelled=self.labelled)
        super().__init__(root, transform, loader=load_rgb)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Names of the classes, and the label of each."""
        return self.found.classes, {name: label for label, name in enumerate(self.found.classes)}

    def make_dataset(self, *_: Any, **__: Any) -> list[tuple[str, int]]:  # type: ignore[override]
        """Path and label of each image."""
        return list(zip(self.found.paths, self.found.labels, strict=True))


class UnlabelledImages(LabelledImages):
    """All images below a folder with the label -1, as the suite's ``CustomDatasetWithoutLabels`` gives them."""

    labelled = False

    @property
    def images(self) -> list[str]:
        """Paths of the images; the suite's ``data.fraction`` sets fewer."""
        return [path for path, _ in self.samples]

    @images.setter
    def images(self, paths: list[str]) -> None:
        self.samples = [(path, -1) for path in paths]


@contextmanager
def reading_folders(module: ModuleType, *, labelled: bool) -> Iterator[None]:
    """Within it, the datasets that a module of the suite makes of a folder are ours."""
    own = {
        "ImageFolder": LabelledImages if labelled else UnlabelledImages,
        "CustomDatasetWithoutLabels": UnlabelledImages,
    }
    suites = {name: getattr(module, name) for name in own if hasattr(module, name)}
    for name in suites:
        setattr(module, name, own[name])
    try:
        yield
    finally:
        for name, dataset in suites.items():
            setattr(module, name, dataset)


FOLDERS_FOR_DALI = SimpleNamespace(
    listdir=image_names,
    scandir=lambda folder: [SimpleNamespace(name=name, is_dir=lambda: True) for name in class_folders(folder)],
)
"""What the suite's DALI modules use of ``os``: their list of a folder's files, and that of its class folders."""
