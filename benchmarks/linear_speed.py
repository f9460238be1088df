"""`emim-solo linear` beside the suite's main_linear.py on one checkpoint: accuracy, and how many times faster.

    python benchmarks/linear_speed.py --solo CLONE --run FOLDER [--epochs 20] [--output linear_speed.json]

CLONE is one of solo-learn main, FOLDER that of a run which it can read (`emim-solo pretrain` with the clone on
PYTHONPATH) on the shipped pretrain/digits. Both train the suite's LinearModel with the settings of linear/digits, on one
thread and with the loading in the same process, and both see the images as they are evaluated: main_linear.py shows a
folder at 224 pixels with crops and flips unless its build_custom_pipeline is rewritten, which is done here as the suite
tells its users to. Time is the processor's, which a busy machine changes less than the clock; both are in the JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import runpy
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FORWARD, CLASSIFIER = (
    2 * 4.1e9,
    6 * 2048 * 1000,
)  # operations per image: ResNet-50 (4.1 GMACs), and its linear classifier


class Clock:
    def __init__(self) -> None:
        self.begin = time.process_time(), time.perf_counter()

    def read(self) -> dict[str, float]:
        return {
            "cpu_seconds": time.process_time() - self.begin[0],
            "clock_seconds": time.perf_counter() - self.begin[1],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--solo", type=Path, required=True, help="clone of solo-learn main")
    parser.add_argument("--run", type=Path, required=True, help="folder of a run on the digits")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--output", type=Path, help="JSON of the raw figures")
    args = parser.parse_args()
    script = args.solo.resolve() / "main_linear.py"
    sys.path.insert(0, str(script.parent))

    import torch
    from lightning.pytorch import Trainer

    from emim_solo.checkpoints.opening import open_checkpoint
    from emim_solo.evaluation.features import extract_features
    from emim_solo.evaluation.linear import linear
    from emim_solo.ground import configs
    from emim_solo.images.embedded import write_images
    from emim_solo.suite import load_suite

    torch.set_num_threads(1)
    steps = [args.epochs * 3 // 5, args.epochs * 4 // 5]
    output, checkpoint = args.output and args.output.resolve(), open_checkpoint(args.run.resolve())
    folder = tempfile.TemporaryDirectory()
    os.chdir(folder.name)
    write_images("digits", Path("datasets/digits"))
    cfg = checkpoint.cfg
    cfg.data.train_path, cfg.data.val_path = "datasets/digits/train", "datasets/digits/val"
    cfg.data.num_workers, cfg.enable_progress_bar = 0, False

    clock = Clock()
    features = extract_features(checkpoint)
    extraction = clock.read()
    settings = {"standardise": False, "max_epochs": args.epochs, "optimizer": {"weight_decay": 0}}
    clock = Clock()
    ours = linear(features, cfg, settings | {"scheduler": {"lr_decay_steps": steps}})
    classifier = clock.read()

    from solo.data import classification_dataloader

    show = load_suite().evaluation_transform(cfg)
    classification_dataloader.build_custom_pipeline = lambda: {"T_train": show, "T_val": show}
    fit, theirs, suite = Trainer.fit, {}, {}

    def timed_fit(self: Any, *given: Any, **named: Any) -> None:
        begun = Clock()
        fit(self, *given, **named)
        suite.update(begun.read())
        theirs.update({name: float(value) for name, value in self.callback_metrics.items()})

    Trainer.fit = timed_fit  # type: ignore[method-assign]
    sys.argv = [
        *(str(script), "--config-path", str(configs.find("linear/digits")), "--config-name", "emim"),
        f'pretrained_feature_extractor="{checkpoint.path}"',
        *("checkpoint.enabled=False", "accelerator=cpu", "data.num_workers=0", "+enable_progress_bar=False"),
        *(f"max_epochs={args.epochs}", f"scheduler.lr_decay_steps={steps}"),
        *("+num_sanity_val_steps=0", f"+check_val_every_n_epoch={args.epochs}"),
    ]
    runpy.run_path(str(script), run_name="__main__")
    os.chdir("/")
    folder.cleanup()

    key = "cpu_seconds"
    times = {"suite": suite, "extraction": extraction, "classifier": classifier}
    images = len(features.train.labels)
    epoch = {name: spent[key] / args.epochs / images for name, spent in (("suite", suite), ("classifier", classifier))}
    faster = {
        f"digits, {args.epochs} epochs": suite[key] / (extraction[key] + classifier[key]),
        "digits, 100 epochs": 100 * epoch["suite"] / (extraction[key] / images + 100 * epoch["classifier"]),
        "ImageNet, 100 epochs, by operations": 100 * FORWARD / (FORWARD + 100 * CLASSIFIER),
    }
    accuracies = {"main_linear.py": theirs["val_acc1"], "emim-solo linear": ours["acc1"]}
    print(f"torch {torch.__version__}, one thread; {images} images, {args.epochs} epochs of the suite's LinearModel")
    for name, spent in times.items():
        print(f"{name:<36} {spent[key]:8.1f} s of the processor {spent['clock_seconds']:8.1f} s by the clock")
    for name, accuracy in accuracies.items():
        print(f"{name:<36} {accuracy:8.2f} % of the validation images")
    for name, ratio in faster.items():
        print(f"{name:<36} {ratio:8.1f} times faster")
    if output:
        about = {"torch": torch.__version__, "processor": f"{platform.processor() or platform.machine()}, 1 thread"}
        about |= {"load_average": os.getloadavg()[0], "epochs": args.epochs, "images": images}
        found = {**about, "accuracies": accuracies, "seconds": times, "times_faster": faster}
        output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
