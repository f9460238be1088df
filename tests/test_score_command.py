"""``emim-solo score`` on one tiny trained run, its protocol, its rows and its curve."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL_BACKBONE
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image

from emim_solo.benchmark.plan import make_plan
from emim_solo.checkpoints.opening import Checkpoint, open_checkpoint
from emim_solo.emim.measures import NAMES, scores
from emim_solo.evaluation.commands import knn_main
from emim_solo.evaluation.features import extract_features
from emim_solo.evaluation.knn import knn
from emim_solo.evaluation.protocol import Protocol
from emim_solo.evaluation.score import ScoredViews, score_checkpoint, score_main, see
from emim_solo.ground import compare, configs
from emim_solo.ground.errors import UsageError
from emim_solo.ground.settings import read
from emim_solo.results import rows
from emim_solo.results.tables import NO_DECAY
from emim_solo.suite import load_suite
from emim_solo.training.pretraining import prepare, pretrain

QUICK = ["images=30", "views=3", "splits=2"]


@pytest.fixture(scope="module")
def run(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Two epochs of VICReg on a few digits, a checkpoint of each kept."""
    settings = {
        "dir": str(tmp_path_factory.mktemp("trained")),
        "pretrain": "pretrain/digits",
        "only": "vicreg",
        "max_epochs": 2,
        "run": {
            "backbone": SMALL_BACKBONE,
            "augmentations": {0: {"crop_size": 16}},
            "data": {"train_path": str(few_digits / "train"), "val_path": str(few_digits / "val"), "num_workers": 0},
            "enable_progress_bar": False,
            "accelerator": "cpu",
        },
    }
    (planned,) = make_plan(OmegaConf.create(settings)).runs
    planned.composed.checkpoint.keep_prev = True
    return open_checkpoint(pretrain(prepare(planned.composed), version="0")["checkpoint"])


@pytest.fixture
def copy(run: Checkpoint, tmp_path: Path) -> Path:
    """A copy of the folder of the run, where no other test writes rows."""
    return Path(shutil.copytree(run.folder, tmp_path / "trained" / "vicreg" / "0"))


def changed(run: Checkpoint, **keys: object) -> Checkpoint:
    cfg = run.cfg.copy()
    for key, value in keys.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, merge=False, force_add=True)
    return replace(run, cfg=cfg)


def untrained(run: Checkpoint, folder: Path) -> Path:
    """A run's folder with a model that has only been initialised."""
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(OmegaConf.to_container(run.cfg, resolve=True)))
    torch.save({"state_dict": load_suite().build(run.cfg).state_dict(), "epoch": 0}, folder / "untrained-ep=0.ckpt")
    return folder


def features_of(run: Checkpoint, protocol: Protocol) -> torch.Tensor:
    return see(run, protocol).parts[protocol.features]


# -- the protocol ------------------------------------------------------------------------------------------------


def test_views_are_the_protocols_whatever_workers_batches_and_augmentations_the_run_had(run):
    protocol = Protocol.read("digits", QUICK)
    features = features_of(run, protocol)
    assert features.shape == (30, 3, 192)
    views = [
        {**view, "rrc": {"enabled": True, "crop_min_scale": 0.05, "crop_max_scale": 0.1}}
        for view in run.cfg.augmentations
    ]
    other = changed(run, data__num_workers=1, optimizer__batch_size=7, augmentations=views)
    torch.testing.assert_close(features_of(other, protocol), features, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(features_of(run, Protocol.read("digits", [*QUICK, "seed=1"])), features)


def test_without_augmentation_views_are_the_images_of_evaluation(run):
    """A crop of the whole image and nothing else: each view has the feature of the image that it is of."""
    whole = ["augmentation.color_jitter.prob=0", "augmentation.rrc.crop_min_scale=1"]
    features = features_of(run, Protocol.read("digits", [*QUICK, *whole, "images=60"]))
    images = extract_features(run).val.backbone
    order = np.random.default_rng(0).permutation(60)
    nearest = torch.cdist(features[:, 0], images).argmin(1)
    assert (nearest == torch.tensor(order)).float().mean() > 0.9  # an aspect ratio of a crop is never quite 1


def test_scoring_leaves_the_random_state_alone(run):
    """While training, it must not change what is trained."""
    model, views = run.model(), ScoredViews(run.cfg, Protocol.read("digits", QUICK), run.images)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    views.features(model)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("views=1", "views"),
        ("views=2.5", "views"),
        ("views=1000000", "views"),
        ("images=3", "images"),
        ("noise_variance=0", "noise_variance"),
        ("features=head", "features"),
        ("augmentation.blur.prob=1", "augmentation.blur"),
        ("augmentation.rrc.crop_min_scale=2", "augmentation.rrc.crop_min_scale"),
        ("augmentation.rrc.crop_max_scale=0.1", "augmentation.rrc"),
        ("augmentation.grayscale.prob=1.5", "augmentation.grayscale.prob"),
        ("augmentation.color_jitter.hue=0.6", "augmentation.color_jitter.hue"),
        ("augmentation.color_jitter.hue=-0.1", "augmentation.color_jitter"),  # bounds of one number alone
        ("augmentation.color_jitter.contrast=[0.5,0.1]", "augmentation.color_jitter"),
        ("seed=-1", "seed"),
        ("seed=99999999999999999999", "seed"),
        ("augmentation=none", "augmentation"),
        ("splits=${views}", "splits"),
        ("splits=${nothing}", "splits"),
    ],
)
def test_bad_protocols_are_refused(change, key, refused):
    if key == "splits" and "views" in change:
        assert Protocol.read("default", [change]).splits == 8
        return
    with refused(f"protocol.{key}", key.rpartition(".")[2]):
        Protocol.read("default", [change])


VALUES = [
    None,
    "",
    "text",
    -1,
    0.5,
    math.inf,
    math.nan,
    True,
    [1],
    {"a": 1},
    "x" * 300,
    10**20,
    "../../x",
    "???",
    "${x}",
]


def test_every_key_of_a_protocol_is_kept_or_refused_in_one_line():
    """Each value is one that the key does not take, or the protocol can be read again from what it became."""
    whole = OmegaConf.load(configs.root() / "score" / "default.yaml")
    keys = [*compare.leaves(OmegaConf.to_container(whole)), "augmentation", "augmentation.rrc", "more", "more.still"]
    taken, refusals = 0, []
    for key, value in itertools.product(keys, VALUES):
        changed = whole.copy()
        try:
            OmegaConf.update(changed, key, value, merge=False, force_add=True)
        except OmegaConfBaseException:
            continue
        try:
            protocol = read(Protocol, changed, "protocol")
        except UsageError as error:
            refusals.append(error)
        else:
            assert read(Protocol, asdict(protocol), "protocol") == protocol
            taken += 1
    assert 10 < taken < 60 < len(refusals)
    assert all(error.key.startswith("protocol") and "\n" not in str(error) for error in refusals)
    for other in (None, "text", [1], 3):
        with pytest.raises(UsageError):
            read(Protocol, other, "protocol")


def test_protocol_files(tmp_path, refused):
    with pytest.raises(UsageError, match="shipped one: default, digits"):
        Protocol.read("nowhere")
    mine = tmp_path / "mine.yaml"
    for text in ("images: [", "- 1", "", "text", "3", "images: 4\nimages: 5"):
        mine.write_text(text)
        with refused("protocol", "mine.yaml"):
            Protocol.read(str(mine))
    mine.write_text("2024-01-01: 3")
    with refused("protocol.2024-01-01", "Known"):
        Protocol.read(str(mine))
    default = Protocol.read("default")
    shipped = (configs.root() / "score" / "default.yaml").read_text()
    mine.write_text(re.sub("delta: .*", "delta: 1e-4", shipped))  # a text for YAML 1.1, a number for Hydra
    assert Protocol.read(str(mine)).hash == default.hash
    assert Protocol.read("default", ["noise_variance=0.1", "augmentation.grayscale.prob=0.2"]).hash == default.hash
    assert Protocol.read("default", ["noise_variance=1"]).hash != default.hash
    shorter = OmegaConf.load(configs.root() / "score" / "default.yaml")
    for name in ("gaussian_blur", "solarization", "equalization"):  # off, as where they are left out
        del shorter.augmentation[name]
    OmegaConf.save(shorter, tmp_path / "shorter.yaml")
    assert Protocol.read(str(tmp_path / "shorter.yaml")).hash == default.hash


def test_hashes_of_the_shipped_protocols_are_those_in_rows_of_before():
    assert {name: Protocol.read(name).hash for name in configs.stems("score")} == {
        "default": "47ad64d92658",
        "digits": "c50398233e3c",
    }


# -- one checkpoint ----------------------------------------------------------------------------------------------


def test_row_holds_scores_intervals_and_knn(run):
    protocol = Protocol.read("digits", QUICK)
    row = score_checkpoint(run, protocol)
    expected = scores(features_of(run, protocol))
    assert {name: row["metrics"][name] for name in NAMES} == pytest.approx(expected)
    assert row["metrics"]["view_information_half_width"] > 0
    assert row["metrics"]["knn_acc1"] == knn(extract_features(run), ks=[20])["backbone_cosine_k20"]
    of_views = score_checkpoint(run, Protocol.read("digits", QUICK), neighbour_views=3)
    averaged = knn(extract_features(run, views=3), ks=[20])["backbone_cosine_k20"]
    assert (of_views["knn_views"], of_views["metrics"]["knn_acc1"]) == (3, averaged)
    assert (row["stage"], row["protocol"], row["epochs"]) == ("score", protocol.hash, 2)
    assert (row["images"], row["of"], row["width"]) == (30, "validation", 192)


def test_without_labels_or_validation_images(run, few_digits, tmp_path):
    protocol = Protocol.read("digits", QUICK)
    alone = score_checkpoint(changed(run, data__val_path=None), protocol)
    unlabelled = changed(run, data__no_labels=True)
    of_heap = see(unlabelled, protocol)
    assert alone["of"] == "training" and "knn_acc1" not in alone["metrics"]
    torch.testing.assert_close(of_heap.parts["backbone"], features_of(run, protocol))
    assert of_heap.of == "validation"
    one_class = tmp_path / "val" / "0"
    shutil.copytree(few_digits / "val" / "0", one_class)
    with pytest.warns(UserWarning, match="no 20-NN beside the score"):
        row = score_checkpoint(changed(run, data__val_path=str(one_class.parent)), protocol)
    assert row["images"] == 6 and "knn_acc1" not in row["metrics"]


def test_too_few_images_are_refused(run, tmp_path, refused):
    for number in range(3):
        (tmp_path / "heap").mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / "heap" / f"{number}.png")
    few = changed(run, data__no_labels=True, data__val_path=str(tmp_path / "heap"))
    with refused("data.val_path", "3 validation images", "at least 4"):
        features_of(few, Protocol.read("digits", QUICK))


# -- the command -------------------------------------------------------------------------------------------------


def test_command_ranks_runs_and_keeps_to_one_protocol(run, copy, refused, capsys):
    broken = shutil.copytree(copy, copy.parent / "1")
    for path in broken.glob("*.ckpt"):
        contents = torch.load(path, weights_only=True)
        backbone = next(name for name, value in contents["state_dict"].items() if value.ndim == 4)
        contents["state_dict"][backbone].fill_(torch.nan)
        torch.save(contents, path)
    wide = untrained(changed(run, backbone={"name": "resnet18", "kwargs": {}}), copy.parent / "2")
    score_main([str(broken), str(copy), str(wide), "--no-knn", "--protocol", "digits", *QUICK])
    table = capsys.readouterr().out.splitlines()
    places = {line[0]: line for line in table if line[:1].isdecimal()}
    assert "nan" in places["3"] and "±" in places["1"]
    assert {"1": places["1"].split()[3], "2": places["2"].split()[3]} in (
        {"1": "512", "2": "192"},
        {"1": "192", "2": "512"},
    )

    file = copy.parent.parent / "rows.jsonl"
    found = rows.read(file)
    assert [(row["stage"], row["width"]) for row in found] == [("score", 192), ("score", 192), ("score", 512)]
    with refused("protocol", "views (3 there, 2 here)"):
        score_main([str(copy), "--protocol", "digits", *QUICK, "views=2"])
    assert len(rows.read(file)) == 3
    score_main([str(copy), "--no-knn", "--another-protocol", "--protocol", "digits", *QUICK, "views=2"])
    assert rows.read(file)[-1]["settings"]["views"] == 2


def test_epochs_are_scored_and_drawn_and_json_is_all_that_is_printed(copy, tmp_path, capsys):
    (copy / "cut-ep=7.ckpt").write_bytes(b"PK")
    arguments = [str(copy), "--epochs", "--json", "--output", str(tmp_path / "out"), "--protocol", "digits", *QUICK]
    with pytest.warns(UserWarning, match="passed over"):
        score_main(arguments)
    document = json.loads(capsys.readouterr().out)
    assert sorted(row["epochs"] for row in document["rows"]) == [1, 2]
    ranked = [row["metrics"]["view_information"] for row in document["rows"]]
    assert ranked == sorted(ranked, reverse=True) and ranked[0] != ranked[1]
    assert document["protocol_hash"] == Protocol.read("digits", QUICK).hash
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "view-information.pdf",
        "view-information.png",
    ]
    assert (tmp_path / "out" / "view-information.pdf").read_bytes().startswith(b"%PDF")


def test_two_epochs_of_one_run_are_told_apart(copy, capsys):
    score_main([*map(str, sorted(copy.glob("*.ckpt"))), "--no-knn", *QUICK])
    shown = capsys.readouterr().out
    assert all(path.name in shown for path in copy.glob("*.ckpt"))
    found = [row["metrics"]["view_information"] for row in rows.read(copy.parent.parent / "rows.jsonl")]
    assert len(set(found)) == 2


def test_epochs_of_a_run_that_was_stopped_within_its_first(copy, refused):
    first, second = sorted(copy.glob("*.ckpt"))
    second.unlink()
    first.rename(first.with_name(first.name.replace(".ckpt", "-step=2.ckpt")))
    with refused("checkpoint.missing", "--epochs"):
        score_main([str(copy), "--epochs", "--no-knn", *QUICK])


def test_rows_of_a_folder_that_cannot_be_written_go_where_they_are_told_to(copy, tmp_path, refused, capsys):
    broken = copy.parent.parent / "rows.jsonl"
    broken.unlink(missing_ok=True)
    broken.parent.chmod(0o500)
    try:
        if not os.access(broken.parent, os.W_OK):
            with refused("--rows", "--rows PLACE"):
                score_main([str(copy), "--no-knn", "--protocol", "digits", *QUICK])
        for place, file in (
            (tmp_path / "a", tmp_path / "a" / "rows.jsonl"),
            (tmp_path / "b.jsonl", tmp_path / "b.jsonl"),
        ):
            score_main([str(copy), "--no-knn", "--protocol", "digits", *QUICK, "--rows", str(place)])
            assert [row["stage"] for row in rows.read(file)] == ["score"]
        knn_main([str(copy), "-k", "1", "--rows", str(tmp_path / "a")])
        assert [row["stage"] for row in rows.read(tmp_path / "a" / "rows.jsonl")] == ["score", "knn"]
        assert not broken.exists()
    finally:
        broken.parent.chmod(0o700)


def test_few_images_have_no_alpha_req_and_the_table_says_why(copy, capsys):
    score_main([str(copy), "--no-knn", "--protocol", "digits", *QUICK, "images=6"])
    assert NO_DECAY in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_in_another_precision_has_the_features_of_its_checkpoint(run, dtype):
    """As it is while a run trains in precision=bf16-true, and once the checkpoint of that run is opened."""
    views = ScoredViews(run.cfg, Protocol.read("digits", QUICK), run.images)
    training = run.model().to(dtype)
    opened = run.model()
    opened.load_state_dict(training.state_dict())
    before = {name: tensor.clone() for name, tensor in training.state_dict().items()}
    assert torch.equal(views.features(training), views.features(opened))
    assert all(torch.equal(tensor, before[name]) for name, tensor in training.state_dict().items())
