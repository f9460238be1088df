"""Folders for choosing recipes: 1,000 training images of each class, and 1,000 others of each class to judge on.

    python research/real_size/folders.py datasets/cifar10/train datasets/cifar10-recipes [--images 1000]

Writes TARGET/train and TARGET/val. The order of the images is drawn with seed 0 from their sorted names, so the split is
the same every time. The test images are not touched.
"""

from __future__ import annotations

import argparse
import random
import shutil
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="training images, one folder for each class")
    parser.add_argument("target", type=Path)
    parser.add_argument("--images", type=int, default=1000, help="of each class, in each part")
    arguments = parser.parse_args()
    for folder in sorted(path for path in arguments.source.iterdir() if path.is_dir()):
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
        if len(names) < 2 * arguments.images:
            parser.error(f"{folder} has {len(names)} images, {2 * arguments.images} are needed")
        random.Random(0).shuffle(names)
        for number, part in enumerate(("train", "val")):
            copies = arguments.target / part / folder.name
            copies.mkdir(parents=True, exist_ok=True)
            for name in names[number * arguments.images : (number + 1) * arguments.images]:
                shutil.copy2(folder / name, copies / name)


if __name__ == "__main__":
    main()
