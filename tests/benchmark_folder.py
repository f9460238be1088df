"""A benchmark's folder as its stages leave it, with made-up numbers: for the tests of tables and report."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from emim_solo.results import rows

METHODS = {"emim": (93.0, 31.0, 9.0), "barlow_twins": (91.5, 24.0, 11.0), "vicreg": (92.4, 28.0, 10.0)}


def config(name: str, seed: int, **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "method": name,
        "seed": seed,
        "backbone": {"name": "resnet18", "kwargs": {}},
        "method_kwargs": {"proj_hidden_dim": 512, "proj_output_dim": 128},
        "data": {"dataset": "custom", "train_path": "images/digits/train", "val_path": "images/digits/val"},
        "augmentations": [{"crop_size": 32, "num_crops": 2, "rrc": {"enabled": True, "crop_min_scale": 0.4}}],
        "optimizer": {"name": "adamw", "batch_size": 128, "lr": 1e-3, "classifier_lr": 1e-2, "weight_decay": 1e-4},
        "scheduler": {"name": "warmup_cosine"},
        "max_epochs": 20,
        "devices": [0],
        **changes,
    }


def write_rows(
    folder: Path, *, seeds: int = 3, methods: dict[str, Any] | None = None, broken: str = "", collapsed: str = ""
) -> Path:
    """Rows of every stage for methods x seeds; one method may have NaN features, another may have collapsed."""
    rng = np.random.default_rng(0)
    for name, (accuracy, mi, seconds) in (methods or METHODS).items():
        for seed in range(seeds):
            bad = name == broken and seed == 0
            own = config(name, seed)

            def add(stage: str, metrics: dict[str, float], own: Any = own, bad: bool = bad, **more: Any) -> None:
                row = rows.new_row(
                    stage,
                    config=own,
                    suite={"generation": "main", "version": "1.0.6"},
                    device="cpu",
                    epochs=20,
                    seconds=1.5,
                    checkpoint=f"elsewhere/{own['method']}/{own['name']}-seed{own['seed']}",
                    metrics={key: float("nan") if bad else value for key, value in metrics.items()},
                )
                rows.append(folder / "rows.jsonl", row | more)

            score = accuracy + rng.normal(0, 0.5)
            pretraining = {"val_acc1": score - 2, "train_mi": mi}
            add("pretrain", pretraining, bad=False, config=own, seconds=seconds * 20, peak_memory_mb=900 + int(seconds))
            knn = {
                f"{part}_{distance}_k{k}": score - 1 - 0.01 * k - rng.random()
                for part in ("backbone", "projector")
                for distance in ("cosine", "euclidean")
                for k in (1, 5, 20, 200)
            }
            add("knn", knn)
            add("logistic", {"backbone_acc1": score + 0.4})
            add("linear", {"acc1": score, "acc5": 99.0})
            diagnostics = {"loss_share": seconds / 2, "step_seconds": 0.8}
            for part, scale in (("backbone", 3.0), ("projector", 1.0)):
                diagnostics |= {
                    f"{part}_pair_information": scale * (mi - 6) + rng.random(),
                    f"{part}_pair_information_null": scale * 6 + rng.random(),
                    f"{part}_rankme": 40 * scale + rng.random(),
                    f"{part}_alignment": 0.3,
                    f"{part}_uniformity": -2.5,
                    f"{part}_alpha_req": 1.1,
                    f"{part}_spread": 0.9,
                    f"{part}_collapsed": float(name == collapsed and seed == 1),
                }
            add("diagnostics", diagnostics)
            information = {"view_information": mi / 2 + score / 10, "view_information_half_width": 0.3, "rankme": 50.0}
            shape = {
                "settings": {"views": 8, "features": "backbone"},
                "protocol": "abc",
                "images": 1000,
                "of": "validation",
            }
            add("score", information, **shape)
            add("umap", {"val_trustworthiness": 0.97, "val_silhouette": 0.5})
    return folder


def write_files(folder: Path, *, seeds: int = 3, images: int = 120, classes: int = 10, methods: Any = None) -> Path:
    """What the stages leave beside the rows: curves, spectra, one aligned layout with thumbnails for each split."""
    rng = np.random.default_rng(1)
    for number, (name, (accuracy, mi, _)) in enumerate((methods or METHODS).items()):
        for seed in range(seeds):
            run = folder / name / f"{name}-seed{seed}"
            run.mkdir(parents=True, exist_ok=True)
            with open(run / "metrics.csv", "w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["epoch", "step", "val_acc1", "val_knn_acc1", "train_mi", "train_mi_null"])
                for epoch in range(20):
                    rise = 1 - np.exp(-(epoch + 1) / 5)
                    score = rise * accuracy + rng.normal(0, 0.8)
                    writer.writerow([epoch, epoch * 11, score, "", "", ""])
                    writer.writerow(
                        [epoch, epoch * 11, "", score - 2, mi * rise if number == 0 else "", 6 if number == 0 else ""]
                    )
            (folder / "spectra").mkdir(exist_ok=True)
            spectra = {
                part: (10 * np.arange(1, d + 1) ** -(0.8 + 0.3 * number + 0.05 * seed)).tolist()
                for part, d in (("backbone", 512), ("projector", 128))
            }
            (folder / "spectra" / f"{name}-seed{seed}.json").write_text(json.dumps(spectra))
    (folder / "umap").mkdir(exist_ok=True)
    for split in ("val", "train"):
        labels = np.arange(images) % classes
        centres = rng.normal(0, 6, (classes, 2))
        panels = []
        for name in methods or METHODS:
            points = centres[labels] + rng.normal(0, 0.7, (images, 2))
            quality = {"trustworthiness": 0.961, "silhouette": 0.512}
            panels.append({"name": name, "points": points.round(3).tolist(), **quality})
        columns = int(np.ceil(np.sqrt(images)))
        sheet = Image.new("RGB", (32 * columns, 32 * columns))
        for i in range(images):
            tile = Image.new("RGB", (32, 32), tuple(int(c) for c in rng.integers(0, 255, 3)))
            sheet.paste(tile, (32 * (i % columns), 32 * (i // columns)))
        sheet.save(folder / "umap" / f"{split}.webp")
        content = {
            "classes": [f"class {i}" if classes > 10 else str(i) for i in range(classes)],
            "labels": labels.tolist(),
            "images": list(range(100, 100 + images)),
            "columns": columns,
            "seed": 0,
            "panels": panels,
        }
        (folder / "umap" / f"{split}.json").write_text(json.dumps(content))
    return folder
