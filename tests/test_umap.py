"""Layouts, pictures and palette. The pictures are looked at by people; here, what a program can see of them."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import math
import warnings

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from omegaconf import OmegaConf
from PIL import Image
from sklearn import datasets, metrics

from emim_solo.evaluation import umap as umap_pictures
from emim_solo.evaluation.features import Features, Split
from emim_solo.evaluation.thumbnails import thumbnail, write_sprite_sheet
from emim_solo.images.folders import RunImages
from emim_solo.results.palette import PALETTE, class_styles

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    # Not importorskip: each worker of pytest would import UMAP, which takes some seconds, to collect these tests.
    pytest.mark.skipif(importlib.util.find_spec("umap") is None, reason="umap-learn is the extra 'umap'"),
]


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


def test_fewer_images_than_neighbours(digits, refused):
    panels = umap_pictures.aligned_layout({"few": digits[0][:7]}, torch.zeros(7, dtype=torch.long), seed=0)
    assert np.isfinite(panels["few"].coordinates).all()
    assert math.isnan(panels["few"].silhouette)
    with refused("umap", "3 images", "at least 5"):
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


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, as they were when they were."""
    figures = []
    save = Figure.savefig

    def savefig(figure, path, **options):
        save(figure, path, **options)
        figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def panel_of(images: int) -> umap_pictures.Panel:
    points = np.random.default_rng(0).normal(size=(images, 2)).astype("float32")
    return umap_pictures.Panel(points, 0.9, 0.1)


ODD_NAMES = ["a$_$", "$5 to $10", "x^2_i", "\\alpha", "100 %", "_", "<b>&amp;", "{}", "ü'\""]


@pytest.mark.parametrize("classes", [9, 90])
def test_names_are_text_as_they_are(classes, drawn, tmp_path):
    names = (ODD_NAMES * 10)[:classes]
    methods = ["$emim$", "b^$_$"]
    labels = torch.arange(2 * classes) % classes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        umap_pictures.draw(dict.fromkeys(methods, panel_of(2 * classes)), labels, names, tmp_path / "val")
    texts = [text for text in drawn[0].findobj(Text) if text.get_text()]
    shown = [text.get_text() for text in texts]
    assert {*names, *methods} <= set(shown)
    assert shown.count("a$_$") == names.count("a$_$") * (2 if classes == 9 else 1)
    assert not any(text.get_parse_math() for text in texts)


@pytest.mark.parametrize(("classes", "length", "panels"), [(21, 2, 1), (100, 60, 1), (100, 2, 4), (400, 2, 1)])
def test_legend_of_many_classes_lies_beside_the_panels(classes, length, panels, drawn, tmp_path):
    names = [f"{i:0{length}d}" for i in range(classes)]
    own = {f"method {i}": panel_of(2 * classes) for i in range(panels)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        umap_pictures.draw(own, torch.arange(2 * classes) % classes, names, tmp_path / "val")
    figure = drawn[0]
    sides = [axes.get_window_extent().width / figure.dpi for axes in figure.axes]
    assert min(sides) > 3.3, "the panels keep their size, in inches"
    if classes == 400:  # colours and shapes repeat after a hundred: nothing could be looked up
        assert not figure.legends
        return
    (legend,) = figure.legends
    place = legend.get_window_extent()
    assert [text.get_text()[:20] for text in legend.get_texts()] == [name[:20] for name in names]
    assert not any(place.overlaps(axes.get_tightbbox()) for axes in figure.axes)
    assert figure.bbox.containsx(place.x0) and figure.bbox.containsx(place.x1) and place.y0 >= 0


def test_images_without_labels_have_one_colour_and_no_names(digits, drawn, tmp_path):
    labels = torch.full((60,), -1)
    panels = umap_pictures.aligned_layout({"pixels": digits[0][:60]}, labels, seed=0)
    umap_pictures.draw(panels, labels, [], tmp_path / "train")
    umap_pictures.write_layout(panels, labels, range(60), [], tmp_path / "train")
    (axes,) = drawn[0].axes
    (points,) = axes.collections
    assert len(points.get_offsets()) == 60 and len(points.get_facecolor()) == 1
    assert not axes.texts and not drawn[0].legends and "silhouette" not in axes.get_xlabel()
    with open(tmp_path / "train.csv", newline="") as file:
        assert {line["class"] for line in csv.DictReader(file)} == {""}
    content = json.loads((tmp_path / "train.json").read_text())
    assert content["classes"] == [] and set(content["labels"]) == {-1}


def test_pictures_of_an_unlabelled_folder_without_validation_images(solid_image, tmp_path):
    """Everything that the pictures show of images without labels, from the folder to the thumbnails."""
    for number in range(30):
        solid_image(tmp_path / "heap" / str(number % 2) / f"{number}.png")
    data = {"dataset": "custom", "train_path": str(tmp_path / "heap"), "val_path": None, "format": "image_folder"}
    cfg = OmegaConf.create({"data": {**data, "no_labels": True}, "augmentations": [{"crop_size": 32}]})
    images = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    train = Split(images, None, torch.full((30,), -1))
    methods = {name: Features(train, train, []) for name in ("emim-0.5", "emim-0.7")}
    found = umap_pictures.make_pictures(methods, cfg, RunImages.of(cfg), tmp_path / "umap", seed=0, limit=20)
    assert [list(metrics) for metrics in found.values()] == [["train_trustworthiness"]] * 2
    suffixes = ("png", "pdf", "csv", "json", "webp")
    assert {path.name for path in (tmp_path / "umap").iterdir()} == {f"train.{suffix}" for suffix in suffixes}


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

    def __getitem__(self, index):
        return thumbnail(Image.new("RGB", (64, 48), ("red", "blue")[index % 2])), index


def test_sprite_sheet_shows_the_images_asked_for_in_order(tmp_path):
    columns = write_sprite_sheet(Images(), [0, 1, 1, 0, 1], tmp_path / "sheet.webp")
    sheet = Image.open(tmp_path / "sheet.webp").convert("RGB")
    assert columns == 3 and sheet.size == (96, 64)
    middle = [sheet.getpixel((16 + 32 * (i % 3), 16 + 32 * (i // 3))) for i in range(5)]
    assert ["red" if r > b else "blue" for r, _, b in middle] == ["red", "blue", "blue", "red", "blue"]


def test_thumbnails_are_the_middle_square_in_colour():
    wide = Image.new("L", (60, 20), 0)
    wide.paste(255, (20, 0, 40, 20))
    shown = np.asarray(thumbnail(wide))
    assert shown.shape == (32, 32, 3) and shown.mean() > 250
