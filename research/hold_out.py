"""Split a folder of training images in two, so that a recipe is chosen without the images that report it.

    python research/hold_out.py datasets/digits/train datasets/digits-search [--fraction 0.2]

Writes TARGET/train and TARGET/val, stratified by class, the same split every time. Search on them with
data.train_path=TARGET/train data.val_path=TARGET/val.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from sklearn.model_selection import train_test_split


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="training images, one folder for each class")
    parser.add_argument("target", type=Path)
    parser.add_argument("--fraction", type=float, default=0.2, help="of the images, to hold out")
    arguments = parser.parse_args()
    images = sorted(path for path in arguments.source.glob("*/*") if path.is_file())
    if not images:
        parser.error(f"no images in {arguments.source}/<class>/")
    parts = train_test_split(
        images, test_size=arguments.fraction, stratify=[path.parent.name for path in images], random_state=0
    )
    for split, paths in zip(("train", "val"), parts, strict=True):
        for path in paths:
            copy = arguments.target / split / path.parent.name / path.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy)
        print(f"{arguments.target / split}: {len(paths)} images")


if __name__ == "__main__":
    main()
