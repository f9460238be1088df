"""Layouts, pictures and palette. The pictures are looked at by people; here, what a program can see of them."""

from __future__ import annotations

import csv
import itertools
import json
import math

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image
from sklearn import datasets, metrics

from emim_solo.errors import UsageError
from emim_solo.evaluation import umap as umap_pictures
from emim_solo.evaluation.palette import PALETTE, class_styles
from emim_solo.evaluation.thumbnails import write_sprite_sheet

pytest.importorskip("umap", reason="umap-learn is the extra 'umap'")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def digits():
    data = datasets.load_digits()
    return torch.tensor(data.data[:200], dtype=torch.float32), torch.tensor(data.target[:200])


@pytest.fixture(scope="module")
def layout(digits):
    features, labels = digits
    rotation, _ = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    views = {"pixels": features, "rotated": features @ rotation}
    return umap_pictures.aligned_layout(views, labels, seed=0)


def test_images_keep_their_place_where_methods_agree(layout):
    # A rotation changes no distance, so two methods that differ by one have the same neighbours.
    pixels, rotated = layout["pixels"].coordinates, layout["rotated"].coordinates
    moved = np.linalg.norm(pixels - rotated, axis=1).mean()
    assert moved < 0.1 * np.linalg.norm(pixels - pixels.mean(axis=0), axis=1).mean()


def test_layout_separates_the_digits(layout):
    for panel in layout.values():
        assert panel.trustworthiness > 0.9
        assert panel.silhouette > 0.3


def test_quality_is_scikit_learns(layout, digits):
    panel = layout["pixels"]
    assert panel.silhouette == pytest.approx(metrics.silhouette_score(panel.coordinates, digits[1].numpy()), abs=1e-6)


def test_seed_decides_the_layout(digits):
    features, labels = digits[0][:60], digits[1][:60]
    views = {"a": features, "b": features.square()}
    first, again, other = (umap_pictures.aligned_layout(views, labels, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first["b"].coordinates, again["b"].coordinates)
    assert not np.allclose(first["b"].coordinates, other["b"].coordinates)


def test_nan_features_leave_a_flagged_panel_and_the_others_whole(digits, tmp_path):
    features, labels = digits[0][:40], digits[1][:40]
    panels = umap_pictures.aligned_layout({"sound": features, "broken": torch.full((40, 3), math.nan)}, labels, seed=0)
    assert np.isfinite(panels["sound"].coordinates).all()
    assert np.isnan(panels["broken"].coordinates).all() and math.isnan(panels["broken"].silhouette)
    names = [str(i) for i in range(10)]
    umap_pictures.draw(panels, labels, names, tmp_path / "val")
    umap_pictures.write_layout(panels, labels, range(40), names, tmp_path / "val")
    assert [panel["points"] is None for panel in json.loads((tmp_path / "val.json").read_text())["panels"]] == [
        False,
        True,
    ]


def test_collapsed_features_still_have_a_layout(digits):
    panels = umap_pictures.aligned_layout({"point": torch.ones(40, 8), "sound": digits[0][:40]}, digits[1][:40], seed=0)
    assert np.isfinite(panels["sound"].coordinates).all()


def test_fewer_images_than_neighbours(digits):
    panels = umap_pictures.aligned_layout({"few": digits[0][:7]}, torch.zeros(7, dtype=torch.long), seed=0)
    assert np.isfinite(panels["few"].coordinates).all()
    assert math.isnan(panels["few"].silhouette)
    with pytest.raises(UsageError, match="too few"):
        umap_pictures.aligned_layout({"fewer": digits[0][:3]}, digits[1][:3], seed=0)


def test_files_hold_the_coordinates(layout, digits, tmp_path):
    names = [f"digit {i}" for i in range(10)]
    umap_pictures.draw(layout, digits[1], names, tmp_path / "val", title="200 digits")
    umap_pictures.write_layout(layout, digits[1], range(200), names, tmp_path / "val")
    assert Image.open(tmp_path / "val.png").size[0] > 1000
    assert (tmp_path / "val.pdf").read_bytes().startswith(b"%PDF")
    with open(tmp_path / "val.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 400
    assert lines[3]["method"] == "pixels" and lines[3]["class"] == f"digit {digits[1][3]}"
    np.testing.assert_allclose([float(lines[3]["x"]), float(lines[3]["y"])], layout["pixels"].coordinates[3], atol=1e-4)


def test_suite_picture_is_made_and_seeded(digits, tmp_path):
    features, labels = digits[0][:60], digits[1][:60]
    names = [str(i) for i in range(10)]
    for stem in ("one", "two"):
        umap_pictures.suite_picture(features, labels, names, tmp_path / stem, seed=3)
    one, two = (np.asarray(Image.open(tmp_path / f"{stem}.png")) for stem in ("one", "two"))
    if one.shape == two.shape:  # where we draw ourselves the file's name is in the title
        assert np.mean(one != two) < 0.02
    assert (tmp_path / "one.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("deficiency", [None, "deuteranomaly", "protanomaly", "tritanomaly"])
def test_colours_differ_for_every_eye(deficiency):
    colorspacious = pytest.importorskip("colorspacious")

    def closest(colours):
        seen = [to_rgb(colour) for colour in colours]
        if deficiency:
            eye = {"name": "sRGB1+CVD", "cvd_type": deficiency, "severity": 100}
            seen = [np.clip(colorspacious.cspace_convert(colour, eye, "sRGB1"), 0, 1) for colour in seen]
        return min(colorspacious.deltaE(a, b, input_space="sRGB1") for a, b in itertools.combinations(seen, 2))

    assert closest(PALETTE) > 14
    if deficiency:
        assert closest(matplotlib.color_sequences["tab10"]) < 10


def test_a_hundred_classes_differ_in_colour_or_shape():
    assert len(set(class_styles(100))) == 100
    assert len({colour for colour, _ in class_styles(10)}) == 10


def test_subset_is_seeded_and_in_order():
    assert umap_pictures.subset(5, 10, 0).tolist() == [0, 1, 2, 3, 4]
    chosen = umap_pictures.subset(1000, 10, 0)
    assert sorted(set(chosen)) == chosen.tolist() and len(chosen) == 10
    assert chosen.tolist() == umap_pictures.subset(1000, 10, 0).tolist() != umap_pictures.subset(1000, 10, 1).tolist()


class Images:
    """Two colours, as a torchvision dataset would give them: through its transform."""

    def __init__(self):
        self.transform = lambda image: torch.zeros(3)

    def __getitem__(self, index):
        return self.transform(Image.new("RGB", (64, 48), ("red", "blue")[index % 2])), index


def test_sprite_sheet_shows_the_images_asked_for_in_order(tmp_path):
    images = Images()
    columns = write_sprite_sheet(images, [0, 1, 1, 0, 1], tmp_path / "sheet.webp", side=16)
    sheet = Image.open(tmp_path / "sheet.webp").convert("RGB")
    assert columns == 3 and sheet.size == (48, 32)
    middle = [sheet.getpixel((8 + 16 * (i % 3), 8 + 16 * (i // 3))) for i in range(5)]
    assert ["red" if r > b else "blue" for r, _, b in middle] == ["red", "blue", "blue", "red", "blue"]
    assert images[0][0].shape == (3,), "the dataset itself keeps its transform"
