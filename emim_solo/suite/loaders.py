"""Folders of images in the suite's own loaders, of either generation: they list them, we say what is an image in them.

The suite finds images in four ways: by torchvision's ``ImageFolder``, by a list of everything in a folder, and in its DALI
pipelines by two more. Each of them takes what :func:`emim_solo.images.folders.find_images` finds, put under the name that the suite's
module looks it up by.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from torchvision.datasets import ImageFolder

from emim_solo.images.folders import HeldOut, class_folders, find_images, image_names, load_rgb


class LabelledImages(ImageFolder):
    """torchvision's ``ImageFolder`` on what :func:`find_images` finds, decoded by :func:`load_rgb`."""

    labelled = True
    held_out: HeldOut | None = None

    def __init__(self, root: str | Path, transform: Any = None) -> None:
        self.found = find_images(root, labelled=self.labelled)
        if self.held_out is not None:
            self.found = self.found.without(self.held_out.positions(len(self.found)))
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
def reading_folders(module: ModuleType, *, labelled: bool, held_out: HeldOut | None = None) -> Iterator[None]:
    """Within it, the datasets that a module of the suite makes of a folder are ours, less the images held out."""
    own = {
        name: type(dataset.__name__, (dataset,), {"held_out": held_out})
        for name, dataset in (
            ("ImageFolder", LabelledImages if labelled else UnlabelledImages),
            ("CustomDatasetWithoutLabels", UnlabelledImages),
        )
    }
    suites = {name: getattr(module, name) for name in own if hasattr(module, name)}
    for name in suites:
        setattr(module, name, own[name])
    try:
        yield
    finally:
        for name, dataset in suites.items():
            setattr(module, name, dataset)


def folders_for_dali(held_out: Sequence[str] = ()) -> SimpleNamespace:
    """What the suite's DALI modules use of ``os``: their list of a folder's files, and that of its class folders.

    Args:
        held_out: paths of images that are not to be found.
    """
    left_out = {os.path.abspath(path) for path in held_out}

    def listdir(folder: str | Path) -> list[str]:
        names = image_names(folder)
        return [name for name in names if not left_out or os.path.abspath(os.path.join(folder, name)) not in left_out]

    return SimpleNamespace(
        listdir=listdir,
        scandir=lambda folder: [SimpleNamespace(name=name, is_dir=lambda: True) for name in class_folders(folder)],
    )
