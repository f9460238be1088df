"""Backbones that leave the suite, loaded where there is neither solo-learn nor emim_solo, and weights that come from outside."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import textwrap
from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from conftest import LARGER
from huggingface_hub import ModelCard
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from emim_solo import cli
from emim_solo.checkpoints.architectures import Architecture, Backbone
from emim_solo.checkpoints.export import SUFFIXES, export, export_main
from emim_solo.checkpoints.opening import open_checkpoint, open_checkpoints
from emim_solo.evaluation.features import Features, extract_features
from emim_solo.ground import compare
from emim_solo.ground.errors import UsageError
from emim_solo.results import rows
from emim_solo.suite import load_suite
from emim_solo.training.pretraining import prepare

MakeCfg = Callable[..., DictConfig]
Refused = Callable[..., AbstractContextManager[Any]]
SCORE = ("--protocol", "digits", "images=12", "views=2", "splits=1", "--no-knn")
DOCS = Path(__file__).resolve().parent.parent / "docs" / "export.md"


def trained(folder: Path, images: Path, *more: str) -> Path:
    """A step of a run by the command line, shown 16 pixels; its folder."""
    overrides = [
        "max_epochs=1",
        "optimizer.batch_size=32",
        "limit_train_batches=1",
        "data.num_workers=0",
        "accelerator=cpu",
        "seed=3",
    ]
    overrides += [f"data.{split}_path={images / split}" for split in ("train", "val")]
    overrides += ["augmentations.0.crop_size=16", "enable_progress_bar=False", f"checkpoint.dir={folder}", *more]
    command = ["pretrain", "--config-path", "pretrain/digits", "--config-name", "emim"]
    cli.main([*command, *(f"++{override}" for override in overrides)])
    (run,) = (args.parent for args in folder.glob("*/*/args.json"))
    return run


@pytest.fixture(scope="module")
def resnet(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """EMIM on the stem for small images, channels last, evaluated and exported to every format."""
    folder = tmp_path_factory.mktemp("resnet")
    run = trained(folder, few_digits, "backbone.small_image_stem=True", "performance.disable_channel_last=False")
    cli.main(["knn", str(run), "-k", "1"])
    cli.main(["score", str(run), *SCORE])
    # Not on the card: numbers of another part, and of other images.
    cli.main(["score", str(run), *SCORE, "features=projector", "--another-protocol"])
    cli.main(["knn", str(run), "-k", "1", f"data.val_path={few_digits / 'train'}"])
    # On it under another name: numbers of other protocols.
    cli.main(["score", str(run), *SCORE, "noise_variance=0.5", "--another-protocol"])
    cli.main(["knn", str(run), "-k", "1", "--temperature", "0.5"])
    for to in SUFFIXES:
        cli.main(["export", str(run), "--to", to, "--license", "mit"])
    return run


@pytest.fixture(scope="module")
def vit(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A method with a momentum backbone on a ViT whose patches fit small images, exported to what has it."""
    folder = tmp_path_factory.mktemp("vit")
    more = ["method=mocov3" if load_suite().generation == "main" else "method=byol", "backbone.name=vit_tiny"]
    more += ["method_kwargs.pred_hidden_dim=16", "method_kwargs.temperature=0.2", "backbone.kwargs.patch_size=4"]
    more += ["momentum.base_tau=0.9", "momentum.final_tau=1.0"]
    run = trained(folder, few_digits, *more)
    cli.main(["export", str(run), "--to", "timm", "--output", str(run / "own.pth")])
    return run


def alone(files: list[Path], images: Tensor, folder: Path) -> list[Tensor]:
    """Features by the lines of each file's card, in a process to which neither solo-learn nor emim_solo is there.

    The lines of torch in double precision, in which the order of sums does not show.
    """
    torch.save(images, folder / "images.pt")
    program = """
        import os, sys
        sys.modules["solo"] = sys.modules["emim_solo"] = None  # Python's own mark of a package that is not there
        import torch
        found = []
        for place, lines in {code}:
            os.chdir(place)
            onnx = "onnxruntime" in lines
            torch.set_default_dtype(torch.float32 if onnx else torch.float64)
            images = torch.load("{images}")
            scope = {{"images": images.numpy() if onnx else images.double()}}
            exec(lines, scope)
            found.append(torch.as_tensor(scope["features"]))
        torch.save(found, "{features}")
        """
    code = []
    for file in files:
        (lines,) = re.findall(r"```python\n(.*?)```", file.with_name(f"{file.name}.md").read_text(), flags=re.DOTALL)
        code.append((str(file.parent), lines))
    program = textwrap.dedent(program).format(code=code, images=folder / "images.pt", features=folder / "features.pt")
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    features: list[Tensor] = torch.load(folder / "features.pt")
    return features


def features_of(run: Path, images: Tensor) -> Tensor:
    with torch.no_grad():
        features: Tensor = open_checkpoint(run).model().double()(images.double())["feats"]
    return features


def test_every_format_gives_the_features_without_the_suite(resnet: Path, vit: Path, tmp_path: Path) -> None:
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    files = {resnet: [resnet / f"backbone-{to}{suffix}" for to, suffix in SUFFIXES.items()]}
    files[vit] = [vit / "own.pth"]
    found = alone([file for own in files.values() for file in own], images, tmp_path)
    for run, own in files.items():
        expected = features_of(run, images)
        for file, features in zip(own, (found.pop(0) for _ in own), strict=True):
            tolerance = 1e-4 if file.suffix == ".onnx" else 1e-6
            assert (features - expected).abs().max() <= tolerance * max(1, expected.abs().max()), file
        assert features.shape[1] == expected.shape[1] in (512, 192)
        assert expected.std(dim=0).max() > 1e-3, "features of different images are different"


def test_the_card_says_what_the_run_says(resnet: Path) -> None:
    card = ModelCard((resnet / "backbone-timm.pth.md").read_text())
    assert (card.data.license, card.data.library_name) == ("mit", "timm")
    arguments = json.loads((resnet / "args.json").read_text())
    table = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", card.text, flags=re.MULTILINE))
    assert table["config"] == compare.config_hash(arguments)
    assert (table["method"], table["epochs"], table["seed"]) == ("emim", "1", "3")
    pretrain, knn, score, of_projector, _, other_score, _ = rows.read(resnet.parent.parent / "rows.jsonl")
    scores = {
        (stage, name, of): value
        for stage, name, value, of in re.findall(r"^\| (\w+) \| (\w+) \| ([^|]+) \| ([^|]+) \|$", card.text, re.M)
    }
    online = "backbone; classifier=online; validation images"
    assert scores["pretrain", "val_acc1", online] == f"{pretrain['metrics']['val_acc1']:.2f}"
    for temperature in (0.07, 0.5):
        of = f"backbone; temperature={temperature}; validation images"
        assert scores["knn", "backbone_cosine_k1", of] == f"{knn['metrics']['backbone_cosine_k1']:.2f}"
    for row in (score, other_score):
        value, width = (row["metrics"][f"view_information{end}"] for end in ("", "_half_width"))
        of = f"backbone; protocol {row['protocol']}; 12 validation images"
        assert scores["score", "view_information", of] == f"{value:.2f} ± {width:.2f}"
    assert len({score["protocol"], other_score["protocol"], of_projector["protocol"]}) == 3
    assert "projector" not in card.text
    assert of_projector["protocol"] not in card.text
    for to in SUFFIXES:  # may be published: nothing of where the images or the run lie
        text = next(resnet.glob(f"backbone-{to}.*.md")).read_text()
        assert str(resnet.parent) not in text
        assert arguments["data"]["train_path"] not in text


@pytest.mark.parametrize("to", SUFFIXES)
def test_an_exported_file_is_opened_as_the_run_is(
    to: str, resnet: Path, few_digits: Path, tmp_path: Path, refused: Refused
) -> None:
    for file in resnet.glob(f"backbone-{to}.*"):
        shutil.copy(file, tmp_path)
    file = tmp_path / f"backbone-{to}{SUFFIXES[to]}"
    with refused("data.train_path", "which images", "Add data.train_path=DIR"):
        open_checkpoint(file)
    images = [f"data.{split}_path={few_digits / split}" for split in ("train", "val")]
    cli.main(["knn", str(file), "-k", "1", *images, "data.num_workers=0"])
    (row,) = rows.read(tmp_path / "rows.jsonl")
    of_run = rows.read(resnet.parent.parent / "rows.jsonl")[1]
    assert (row["name"], row["method"], row["epochs"]) == (of_run["name"], "emim", 1)
    own = {name: value for name, value in of_run["metrics"].items() if not name.startswith("projector")}
    assert row["metrics"] == pytest.approx(own, abs=2), "of 60 images one may be at a draw"


def test_other_commands_take_them_beside_runs(
    resnet: Path, vit: Path, few_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [f"data.{split}_path={few_digits / split}" for split in ("train", "val")] + ["data.num_workers=0"]
    for file in [*resnet.glob("backbone-timm.*"), *vit.glob("own.pth*")]:
        shutil.copy(file, tmp_path)
    run = Path(shutil.copytree(resnet, tmp_path / "runs" / "emim" / "0"))
    cli.main(["score", str(run), str(tmp_path / "backbone-timm.pth"), str(tmp_path / "own.pth"), *SCORE, *images])
    (of_run,) = rows.read(tmp_path / "runs" / "rows.jsonl")
    one, other = rows.read(tmp_path / "rows.jsonl")
    assert one["metrics"]["view_information"] == pytest.approx(of_run["metrics"]["view_information"], rel=1e-3)
    assert other["width"] == 192
    (ckpt,) = run.glob("*.ckpt")  # a network by its name, of the backbone in a checkpoint
    by_name = f"timm:resnet18@{ckpt}"
    images += ["backbone.small_image_stem=True", "augmentations.0.crop_size=16"]
    cli.main(["linear", by_name, str(tmp_path / "own.pth"), *images, "max_epochs=1"])
    assert rows.read(run / "rows.jsonl")[-1]["stage"] == "linear"
    cli.main(["umap", by_name, *images, "--limit", "30", "--output", str(tmp_path / "u")])
    assert (tmp_path / "u" / "val.png").is_file()
    said = capsys.readouterr().out
    assert f"{ckpt.stem} ({ckpt})" in said


# -- weights of a library's network --------------------------------------------------------------------------------------


@pytest.fixture
def of_torchvision(tmp_path: Path) -> tuple[nn.Module, Path]:
    """A ResNet-18 as torchvision makes it, saved with its classifier as scripts do that use DataParallel and argparse."""
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=7)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(std=0.1)
            part.running_var.uniform_(0.5, 2)
    file = tmp_path / "weights.pth"
    weights = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": weights, "epoch": 5, "args": Namespace(lr=0.1), "best_acc1": np.float64(7)}, file)
    return network, file


def test_features_are_those_of_the_librarys_network(
    of_torchvision: tuple[nn.Module, Path], few_digits: Path, tmp_path: Path
) -> None:
    network, file = of_torchvision
    images = [f"data.{split}_path={few_digits / split}" for split in ("train", "val")]
    opened = open_checkpoint(
        f"torchvision:resnet18@{file}", [*images, "data.num_workers=0", "augmentations.0.crop_size=32"]
    )
    found: Features = extract_features(opened)
    network.fc = nn.Identity()
    shown = torchvision.transforms.Compose(
        [
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    files = torchvision.datasets.ImageFolder(few_digits / "val", shown)
    with torch.no_grad():
        expected = network.eval()(torch.stack([image for image, _ in files]))
    assert found.val is not None
    torch.testing.assert_close(found.val.backbone, expected, rtol=1e-4, atol=1e-4)
    assert found.val.projector is None


def test_other_images_have_the_same_classes_in_both_splits(resnet: Path, few_digits: Path, tmp_path: Path) -> None:
    shutil.copytree(few_digits / "val", tmp_path / "val")
    (tmp_path / "val" / "9").rename(tmp_path / "val" / "nine")
    opened = open_checkpoint(resnet, [f"data.val_path={tmp_path / 'val'}"])
    with pytest.raises(UsageError, match="different classes: 9, nine"):
        extract_features(opened)


def test_images_are_shown_as_the_librarys_weights_take_them(few_digits: Path, tmp_path: Path, refused: Refused) -> None:
    file = tmp_path / "w.pth"
    torch.save({"x": torch.zeros(1)}, file)
    opened = open_checkpoint(
        f"timm:vit_tiny_patch16_224.augreg_in21k@{file}", [f"data.train_path={few_digits / 'train'}"]
    )
    assert opened.cfg.augmentations[0] == {"crop_size": 224, "mean": [0.5] * 3, "std": [0.5] * 3}
    with refused("backbone.weights", f"'{file}' is not of timm:vit_tiny", "weights differ, first 'blocks"):
        opened.model()


@pytest.mark.parametrize(
    "name",
    [
        *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t"),
        *("mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5"),
        *("swin_t", "swin_v2_t", "vit_b_32"),
    ],
)
def test_each_family_of_torchvision_from_its_own_state_dict(name: str) -> None:
    """The features are what the network's last linear layer is given."""
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)().eval()
    if name in ("googlenet", "inception_v3"):
        theirs.transform_input = True  # as torchvision sets it with its published weights
    features: list[Tensor] = []
    last = [part for part in theirs.modules() if isinstance(part, nn.Linear)][-1]
    last.register_forward_pre_hook(lambda _, given: features.append(given[0]))
    images = torch.randn(2, 3, 224, 224)
    network = Architecture("torchvision", name).filled(theirs.state_dict(), "its own")
    with torch.no_grad():
        theirs(images)
        torch.testing.assert_close(network(images), features[0])


@pytest.mark.parametrize(
    "name", ["resnet18", "vit_tiny_patch16_224", "mobilenetv3_small_050", "mixer_s32_224", "ghostnet_050"]
)
def test_families_of_timm_from_their_own_state_dict(name: str) -> None:
    torch.manual_seed(0)
    theirs = getattr(timm.models, name)(num_classes=0).eval()
    images = torch.randn(2, 3, 224, 224)
    network = Architecture("timm", name).filled(
        getattr(timm.models, name)().state_dict() | theirs.state_dict(), "its own"
    )
    with torch.no_grad():
        torch.testing.assert_close(network(images), theirs(images))


@pytest.mark.parametrize("saved_with", [{"aux_logits": True}, {"aux_logits": False}])
def test_classifiers_for_training_alone_may_be_in_the_file_or_not(saved_with: dict[str, bool]) -> None:
    """torchvision takes them out of googlenet where it loads published weights, and leaves them in a new one."""
    weights = torchvision.models.googlenet(init_weights=False, **saved_with).state_dict()
    assert any(name.startswith("aux1") for name in weights) == saved_with["aux_logits"]
    network = Architecture("torchvision", "googlenet").filled(weights, "its own")
    assert not any(name.startswith("aux") for name in network.state_dict())
    as_trained = Architecture("torchvision", "googlenet", {"transform_input": False}).filled(weights, "its own")
    assert (network.transform_input, as_trained.transform_input) == (True, False)


RESNET = "torchvision:resnet18@{}"


@pytest.mark.parametrize(
    ("place", "more", "key", "names"),
    [
        ("timm:resnet19@{}", [], "backbone.name", ["timm has no network 'resnet19'"]),
        ("torchvision:squeezenet1_0@{}", [], "backbone.kwargs", ["gives no features", "no linear classifier"]),
        ("torchvision:resnet50@{}", [], "backbone.weights", ["is not of torchvision:resnet50", "weights differ"]),
        (RESNET, ["backbone.small_image_stem=True"], "backbone.weights", ["'conv1.weight' ((64, 3, 7, 7) in it"]),
        (f"{RESNET}x", [], "checkpoint.missing", ["no weights '", "torchvision|timm:NETWORK@FILE"]),
        ("{}", [], "checkpoint.card", ["neither args.json nor a model card 'weights.pth.md'", "NETWORK@FILE"]),
        (RESNET, ["data.valpath=x"], "data.valpath", ["expected one of", "data.val_path"]),
        (RESNET, ["data.val_pathx=x"], "data.val_pathx", ["expected one of", "data.val_path"]),
        (RESNET, ["backbone.stem=x"], "backbone.stem", ["expected one of", "backbone.small_image_stem"]),
        (RESNET, ["data.train_path=nowhere"], "data.train_path", ["nowhere"]),
        (RESNET, ["data.val_path=${{nowhere}}"], "data.val_path", ["nowhere"]),
        (RESNET, ["data.dataset=cifar"], "data.dataset", ["data.dataset='cifar'", "custom, cifar10"]),
        (RESNET, ["augmentations.0.crop_size=[32]"], "augmentations.0.crop_size", ["a whole number"]),
        (RESNET, ["augmentations.0.mean=0.5"], "augmentations.0.mean", ["mean=0.5", "a list"]),
        (RESNET, ["augmentations.0.mean=[0.5]"], "augmentations.0.mean", ["mean=[0.5]", "a list of 3"]),
        (RESNET, ["data.num_workers=-1"], "data.num_workers", ["a whole number"]),
        (RESNET, ["augmentations.0.std=[0.5"], "augmentations.0.std", ["while parsing"]),
        ("torchvision:wide_resnet28w2@{}", [], "backbone.name", ["torchvision has no network 'wide_resnet28w2'"]),
        (RESNET, ["backbone.kwargs.layers=3"], "backbone.kwargs", ["gives no features", "layers"]),
        (RESNET, ["backbone.kwargs.weights=DEFAULT"], "backbone.kwargs.weights", ["weights=DEFAULT", "of the file"]),
        ("timm:resnet18@{}", ["backbone.kwargs.pretrained=True"], "backbone.kwargs.pretrained", ["of the file"]),
        (
            "timm:resnet18@{}",
            ["backbone.kwargs.features_only=True"],
            "backbone.kwargs",
            ["features_only", "no features"],
        ),
        ("timm:resnet18@{}", ["backbone.kwargs.global_pool=''"], "backbone.kwargs", ["(1, 512, 1, 1)", "global_pool"]),
    ],
)
def test_what_cannot_be_opened_is_said_in_a_line(
    place: str,
    more: list[str],
    key: str,
    names: list[str],
    of_torchvision: tuple[nn.Module, Path],
    few_digits: Path,
    refused: Refused,
) -> None:
    changes = [f"data.train_path={few_digits / 'train'}", "augmentations.0.crop_size=32"]
    with refused(key, *names):
        open_checkpoint(place.format(of_torchvision[1]), [*changes, *(change.format() for change in more)]).model()


def test_weights_for_grey_images_are_not_told_to_be_of_another_size(
    few_digits: Path, tmp_path: Path, refused: Refused
) -> None:
    torch.save(timm.create_model("resnet18", in_chans=1).state_dict(), tmp_path / "grey.pth")
    changes = [f"data.train_path={few_digits / 'train'}", "backbone.kwargs.in_chans=1"]
    with refused("backbone.kwargs.in_chans", "1 channels", "RGB") as caught:
        open_checkpoint(f"timm:resnet18@{tmp_path / 'grey.pth'}", changes).model()
    assert "crop_size" not in str(caught.value)


def test_images_of_another_size_are_refused(resnet: Path, vit: Path, few_digits: Path, refused: Refused) -> None:
    images = [f"data.train_path={few_digits / 'train'}", "augmentations.0.crop_size=32"]
    for place in (vit, vit / "own.pth", resnet / "backbone-onnx.onnx"):
        with refused("augmentations.0.crop_size", "does not take images of 32 pixels", "set augmentations.0.crop_size"):
            open_checkpoint(place, images).model()


# -- what a format does not have -------------------------------------------------------------------------------------------


def untrained(folder: Path, cfg: DictConfig) -> Path:
    """A run's folder with a model that has only been initialised."""
    folder.mkdir()
    (folder / "args.json").write_text(json.dumps(OmegaConf.to_container(cfg, resolve=True)))
    torch.save({"state_dict": load_suite().build(cfg).state_dict(), "epoch": 0}, folder / "untrained-ep=0.ckpt")
    return folder


def test_networks_that_the_suite_has_under_a_name_of_its_own(make_cfg: MakeCfg, tmp_path: Path) -> None:
    """solo-learn main puts its ConvNeXt in the place of timm's, and both generations call a Swin otherwise."""
    kwargs = {"swin_tiny": {"img_size": 32, "window_size": 4}}
    if load_suite().generation == "main":
        kwargs["convnext_tiny"] = {}
    files = {}
    for name, own in kwargs.items():
        run = untrained(
            tmp_path / name, prepare(make_cfg(backbone={"name": name, "kwargs": own}, augmentations=[LARGER])).config
        )
        export(open_checkpoint(run), "timm", run / "weights.pth")
        files[run] = run / "weights.pth"
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    for run, features in zip(files, alone([*files.values()], images, tmp_path), strict=True):
        torch.testing.assert_close(features, features_of(run, images), rtol=0, atol=1e-6)


def test_a_network_that_a_library_does_not_have_is_refused_with_the_format_that_has_it(
    vit: Path, make_cfg: MakeCfg, tmp_path: Path, refused: Refused
) -> None:
    missing = {vit: ("torchvision", "timm")}
    if load_suite().generation == "main":  # 1.0.2 has none that neither library has
        for name in ("wide_resnet28w2", "poolformer_s12"):  # of the latter timm has another, which norms after pooling
            run = untrained(tmp_path / name, prepare(make_cfg(backbone={"name": name})).config)
            missing[run] = ("timm", "onnx")
    for run, (to, works) in missing.items():
        for wanted in (to, "safetensors") if works == "onnx" else (to,):
            with refused("--to", f"--to {wanted}: no network of ", f": take --to {works}"):
                export(open_checkpoint(run), wanted, run / f"x{SUFFIXES[wanted]}")
        assert not list(run.glob("x.*")), "nothing is left behind"
    with refused("backbone.kwargs.x", "backbone.kwargs.x=1: of LIBRARY:NETWORK@FILE alone"):
        open_checkpoints([vit], ["backbone.kwargs.x=1"])


def test_what_export_does_not_take_is_said_before_work(vit: Path, refused: Refused) -> None:
    with refused("--output", "weights.bin", ".pth or .pt"):
        export_main([str(vit), "--to", "timm", "--output", "weights.bin"])
    for weights in (f"{vit / 'own.pth'}", f"timm:vit_tiny_patch16_224@{vit / 'own.pth'}"):
        with refused("export.folder", f"'{weights}' is a file of weights already", "folder of a run"):
            export_main([weights, "--to", "onnx"])


def test_any_name_of_a_file_will_do(resnet: Path, few_digits: Path, tmp_path: Path, capsys: Any) -> None:
    """Backslashes, capitals, .pt, and names that are no UTF-8."""
    run = shutil.copytree(resnet, tmp_path / os.fsdecode(b"r\xff") / "emim" / "0")
    images = [f"data.train_path={few_digits / 'train'}", "data.num_workers=0"]
    named = {
        "C:\\out\\w.pth": "timm",
        "W.PT": "timm",
        "W.SAFETENSORS": "safetensors",
        os.fsdecode(b"\xff.ONNX"): "onnx",
    }
    for name, to in named.items():
        if to == "onnx":  # takes a minute to write
            for end in ("", ".md"):
                (run / f"backbone-onnx.onnx{end}").rename(run / f"{name}{end}")
        else:
            cli.main(["export", str(run), "--to", to, "--output", str(run / name)])
        assert isinstance(open_checkpoint(run / name, images).model(), Backbone)
    cli.main(["knn", str(run), "-k", "1"])
    row = rows.read(run.parent.parent / "rows.jsonl")[-1]
    assert row["checkpoint"] == str(run)
    assert "W.SAFETENSORS" in capsys.readouterr().out


@pytest.mark.parametrize("to", ["timm", "safetensors"])
def test_a_full_disk_is_one_line_and_nothing_half_written_is_left(
    to: str, vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here by a limit on the size of files. Of ONNX the bytes are written as those of the others are."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(SystemExit):
            cli.main(["export", str(vit), "--to", to, "--output", str(tmp_path / f"w{SUFFIXES[to]}")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("emim-solo: ")]
    assert "File too large" in line
    assert list(tmp_path.iterdir()) == []


# -- runs of solo-learn main's own script ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["simsiam", "swav"])
def test_runs_of_mains_own_script(
    method: str, few_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SimSiam's has the schedule and the optimizer in it as objects, SwAV's a queue that a fresh model has not."""
    import solo

    script = Path(str(solo.__file__)).resolve().parent.parent / "main_pretrain.py"
    if not script.is_file():
        pytest.skip("main_pretrain.py is in a clone of solo-learn main only: make test-main SOLO=<clone>")
    done = subprocess.run(
        [
            *(
                sys.executable,
                script,
                "--config-path",
                script.parent / "scripts/pretrain/cifar",
                "--config-name",
                method,
            ),
            *(
                f"data.train_path={few_digits / 'train'}",
                "data.val_path=null",
                "data.dataset=custom",
                "data.num_workers=0",
            ),
            *(
                "optimizer.batch_size=32",
                "max_epochs=1",
                "accelerator=cpu",
                "strategy=auto",
                "devices='1'",
                "precision=32",
            ),
            *("++auto_resume.enabled=False", "++wandb.enabled=False", "sync_batchnorm=False", "+limit_train_batches=2"),
            *("backbone.name=vit_tiny", "+backbone.kwargs.img_size=16", "+backbone.kwargs.patch_size=4"),
            *("augmentations.0.crop_size=16", "++method_kwargs.queue_size=64", "++method_kwargs.epoch_queue_starts=0"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = tmp_path.glob("trained_models/*/*/*.ckpt")
    with pytest.raises(SystemExit):  # it was trained without validation images
        cli.main(["knn", str(path.parent), "-k", "1"])
    cli.main(["knn", str(path.parent), "-k", "1", f"data.val_path={few_digits / 'val'}"])
    cli.main(["score", str(path), *SCORE])
    knn, score = rows.read(tmp_path / "trained_models" / "rows.jsonl")
    assert (knn["stage"], score["stage"], score["method"], score["of"]) == ("knn", "score", method, "training")
    cli.main(["export", str(path.parent), "--to", "timm"])
    weights = torch.load(path.parent / "backbone-timm.pth", weights_only=True)
    with torch.serialization.safe_globals([]):
        stored = torch.load(path, map_location="cpu", weights_only=False)["state_dict"]
    assert all(torch.equal(value, stored[f"backbone.{name}"]) for name, value in weights.items())
    capsys.readouterr()


class Unknown:
    def __reduce__(self) -> Any:
        return print, ("code has run",)


def test_only_known_objects_beside_the_weights_are_passed_over(
    resnet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Refused
) -> None:
    run = Path(shutil.copytree(resnet, tmp_path / "runs" / "emim" / "0"))
    (path,) = run.glob("*.ckpt")
    contents = torch.load(path, weights_only=True)
    torch.save(contents | {"lr_schedulers": [Unknown()]}, path)
    with refused("checkpoint.code", "could run code", path):
        open_checkpoint(run)
    assert "code has run" not in capsys.readouterr().out


# -- the page --------------------------------------------------------------------------------------------------------------


def test_the_commands_of_the_page(
    resnet: Path,
    of_torchvision: tuple[nn.Module, Path],
    few_digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(resnet, tmp_path / "trained_models" / "emim" / "0", ignore=shutil.ignore_patterns("backbone-*"))
    of_torchvision[1].rename(tmp_path / "resnet18.pth")
    monkeypatch.chdir(tmp_path)
    page = DOCS.read_text()
    assert len(page.splitlines()) < 60
    commands = [
        line for block in re.findall(r"```console\n(.*?)```", page, flags=re.DOTALL) for line in block.splitlines()
    ]
    for command in commands:
        program, *words = shlex.split(command, comments=True)
        if program == "pip":
            continue  # the extras are what this test runs with
        assert program == "emim-solo"
        words = [word.replace("DIR", str(few_digits)) for word in words]
        if words[0] != "export":
            words += ["data.num_workers=0", *(["augmentations.0.crop_size=16"] if words[0] != "umap" else [])]
        words += {"score": SCORE, "umap": ["--limit", "30"], "linear": ["max_epochs=1"]}.get(words[0], [])
        cli.main(words)
    assert {command.split()[1] for command in commands} >= {"export", "knn", "score", "linear", "umap"}
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    said = capsys.readouterr().out
    assert block.strip() in said, "what export prints"
