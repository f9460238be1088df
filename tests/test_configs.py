"""Every shipped config composes, is accepted by the suite's own checks, is equal where it claims to be and says where
its values are from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from emim_solo.emim.method import OBJECTIVE_DEFAULTS, PROJECTOR_DEFAULTS
from emim_solo.ground import configs
from emim_solo.images.folders import Listings, RunImages
from emim_solo.results import rows
from emim_solo.suite import load_suite

REPOSITORY = Path(__file__).resolve().parent.parent
METHODS = {"emim": "emim", "barlow": "barlow_twins", "vicreg": "vicreg"}
DATASETS = ("cifar", "imagenet-100", "imagenet", "custom", "digits")
MULTICROP = ("cifar", "digits")
PATCHES = ("cifar", "custom", "digits")
Refused = Callable[..., AbstractContextManager[Any]]


LISTINGS = Listings()  # the digits are listed once for all configs


@pytest.fixture(scope="module")
def folders(digits: Path) -> list[str]:
    return [f"data.train_path={digits / 'train'}", f"data.val_path={digits / 'val'}"]


def composed(folder: Path, name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(config_dir=str(folder), version_base="1.2"):
        return compose(name, overrides=list(overrides))


def plain(cfg: DictConfig) -> dict[str, Any]:
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return container  # type: ignore[return-value]


def opened(cfg: DictConfig) -> DictConfig:
    OmegaConf.set_struct(cfg, False)
    return cfg


# -- finding, listing, copying ----------------------------------------------------------------------------------------


def test_shipped_folder_is_found_by_name_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert configs.find("pretrain/cifar") == configs.root() / "pretrain" / "cifar"
    assert configs.find("scripts/pretrain/cifar") == configs.root() / "pretrain" / "cifar"


def test_users_own_folder_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrain" / "cifar").mkdir(parents=True)
    assert configs.find("pretrain/cifar") == tmp_path / "pretrain" / "cifar"
    assert configs.find(tmp_path) == tmp_path


@pytest.mark.parametrize("name", ["pretrain/cifr", "/no/such/folder", "pretrain/../../tests"])
def test_unknown_folder_is_refused_with_those_there_are(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    monkeypatch.chdir(tmp_path)
    with refused("configs.folder", "pretrain/cifar, pretrain/custom"):
        configs.find(name)


def test_every_dataset_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    configs.main([])
    printed = capsys.readouterr().out
    for kind in ("pretrain", "linear"):
        for dataset in DATASETS:
            ours = "emim.yaml"
            if kind == "pretrain" and dataset in MULTICROP:
                ours += ", emim_multicrop.yaml"
            if kind == "pretrain" and dataset in PATCHES:
                ours += ", emim_patches.yaml"
            assert f"{kind}/{dataset}: barlow.yaml, {ours}, vicreg.yaml" in printed
    assert "_base" not in printed
    assert "augmentations" not in printed
    assert not re.search(r"^ +\S+: .*\.sh", printed, re.MULTILINE), "a script is no config of a folder"
    assert "knn/custom/knn.sh" in printed


def test_copy_is_whole_and_overwrites_nothing_unasked(tmp_path: Path, refused: Refused) -> None:
    target = tmp_path / "mine"
    configs.main(["--copy", str(target)])
    assert sorted(path.relative_to(target) for path in target.rglob("*") if path.is_file()) == list(configs.files())
    assert plain(composed(target / "pretrain" / "cifar", "emim")) == plain(
        composed(configs.find("pretrain/cifar"), "emim")
    )

    changed = target / "pretrain" / "cifar" / "emim.yaml"
    changed.write_text("mine: True\n")
    with refused("--copy", "--force"):
        configs.copy(target)
    assert changed.read_text() == "mine: True\n"
    configs.copy(target, force=True)
    assert changed.read_bytes() == (configs.root() / "pretrain" / "cifar" / "emim.yaml").read_bytes()


def test_copy_onto_a_file_is_refused(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "mine").write_text("")
    with refused("--copy", "is a file"):
        configs.copy(tmp_path / "mine")


# -- accepted by the suite --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augmentations", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dataset", DATASETS)
def test_pretraining_config_is_complete(dataset: str, name: str, augmentations: str, folders: list[str]) -> None:
    """Held against the suite's own parse_cfg and the method's own checks on main, against the face's on 1.0.2."""
    folder = configs.find(f"pretrain/{dataset}")
    if not (folder / "augmentations" / f"{augmentations}.yaml").exists():
        assert (dataset, augmentations) == ("digits", "asymmetric")
        return
    suite = load_suite()
    cfg = opened(composed(folder, name, f"augmentations={augmentations}", *folders))
    assert cfg.method == METHODS[name]
    written = plain(cfg)
    if suite.generation == "main":
        from solo.args.pretrain import parse_cfg

        done = suite.methods()[cfg.method].add_and_assert_specific_cfg(parse_cfg(cfg))
    else:
        cfg.data.format = "image_folder"  # ImageNet's have dali, which has to be installed
        done = suite.complete(cfg, RunImages.of(cfg, LISTINGS))

    assert done.data.num_large_crops == 2
    assert done.data.num_small_crops == 0
    devices = len(written["devices"])
    assert done.optimizer.lr == pytest.approx(
        written["optimizer"]["lr"] * written["optimizer"]["batch_size"] * devices / 256
    )
    for key, value in written["method_kwargs"].items():
        assert done.method_kwargs[key] == value
    assert not done.wandb.enabled
    assert not OmegaConf.missing_keys(done)


@pytest.mark.parametrize("dataset", MULTICROP)
def test_multicrop_config_is_emims_with_no_more_pixels(dataset: str, folders: list[str]) -> None:
    folder = configs.find(f"pretrain/{dataset}")
    one, two = (opened(composed(folder, name, *folders)) for name in ("emim", "emim_multicrop"))
    done = load_suite().complete(opened(OmegaConf.merge(two, {"devices": [0]})), RunImages.of(two, LISTINGS))
    assert (done.data.num_large_crops, done.data.num_small_crops) == (2, 2)

    def pixels(cfg: DictConfig) -> int:
        return cfg.max_epochs * sum(view.num_crops * view.crop_size**2 for view in cfg.augmentations)

    assert 0.8 * pixels(one) < pixels(two) <= pixels(one)
    one, two = plain(one), plain(two)
    for view in two["augmentations"]:  # the small crops differ from the large ones in size and scale only
        kept = {key: value for key, value in view.items() if key not in ("rrc", "crop_size")}
        assert kept == {key: value for key, value in one["augmentations"][0].items() if key in kept}
    assert two["augmentations"][0] == one["augmentations"][0]
    for cfg in (one, two):
        for key in ("augmentations", "name", "max_epochs"):
            del cfg[key]
        del cfg["optimizer"]["batch_size"]
        if dataset == "digits":  # searched by itself: held to the rows of the search below
            del cfg["optimizer"]["lr"]
    assert one == two


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dataset", DATASETS)
def test_linear_config_is_complete(dataset: str, name: str, folders: list[str]) -> None:
    suite = load_suite()
    checkpoint = 'pretrained_feature_extractor="emim-ep=99.ckpt"'  # as README and the file's head tell to quote it
    cfg = opened(composed(configs.find(f"linear/{dataset}"), name, checkpoint, *folders))
    assert cfg.pretrained_feature_extractor == "emim-ep=99.ckpt"
    assert cfg.pretrain_method == METHODS[name]
    lr = cfg.optimizer.lr
    if suite.generation == "main":
        from solo.args.linear import parse_cfg

        done = parse_cfg(cfg)
    else:
        done = suite.complete_linear(cfg)
    assert done.optimizer.lr == pytest.approx(lr)  # one device, batches of 256
    assert done.max_epochs > max(done.scheduler.lr_decay_steps)
    assert not OmegaConf.missing_keys(done)


def test_a_run_of_a_shipped_config_starts_afresh_and_needs_no_account() -> None:
    """Each job of a sweep, too: solo-learn main would go on with the one before."""
    for folder in (folder for folder in configs.folders() if folder != "benchmark"):
        for name in configs.names(folder):
            cfg = composed(configs.find(folder), name)
            assert not cfg.auto_resume.enabled, folder
            assert not cfg.wandb.enabled, folder


def test_emim_config_states_the_defaults_of_the_method() -> None:
    for dataset in DATASETS:
        kwargs = plain(composed(configs.find(f"pretrain/{dataset}"), "emim"))["method_kwargs"]
        assert {key: kwargs[key] for key in OBJECTIVE_DEFAULTS} == OBJECTIVE_DEFAULTS
        assert set(kwargs) == set(OBJECTIVE_DEFAULTS) | set(PROJECTOR_DEFAULTS)
    cifar = plain(composed(configs.find("pretrain/cifar"), "emim"))["method_kwargs"]
    assert {key: cifar[key] for key in PROJECTOR_DEFAULTS} == PROJECTOR_DEFAULTS


# -- equal terms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pretrain", "linear"])
@pytest.mark.parametrize("dataset", DATASETS)
def test_methods_of_a_dataset_differ_in_nothing_else(kind: str, dataset: str) -> None:
    """One augmentation, backbone, projector width, optimiser, batch and number of epochs."""
    folder = configs.find(f"{kind}/{dataset}")
    shared = []
    for name in METHODS:
        cfg = plain(composed(folder, name))
        own = {"name": cfg.pop("name"), "method": cfg.pop("method" if kind == "pretrain" else "pretrain_method")}
        assert own["method"] == METHODS[name]
        assert own["name"].startswith(f"{METHODS[name]}-")
        kwargs = cfg.pop("method_kwargs", {})
        shared.append(cfg | {key: kwargs[key] for key in PROJECTOR_DEFAULTS if kind == "pretrain"})
    assert shared[0] == shared[1] == shared[2]


def test_method_files_hold_nothing_but_the_method() -> None:
    """Equality is there to be seen: what the methods share is in one file."""
    for path in configs.files():
        if path.stem not in METHODS or path.suffix != ".yaml":
            continue
        content = yaml.safe_load((configs.root() / path).read_text())
        allowed = {"defaults", "name", "method", "method_kwargs", "pretrain_method"}
        assert set(content) <= allowed, path
        assert not set(content.get("method_kwargs", {})) & set(PROJECTOR_DEFAULTS), path


def test_linear_evaluation_fits_its_pretraining() -> None:
    for dataset in DATASETS:
        pretrained = plain(composed(configs.find(f"pretrain/{dataset}"), "emim"))
        linear = plain(composed(configs.find(f"linear/{dataset}"), "emim", "pretrained_feature_extractor=x.ckpt"))
        assert linear["backbone"] == pretrained["backbone"]
        assert linear["data"]["dataset"] == pretrained["data"]["dataset"]
        view = pretrained["augmentations"][0]
        for key, value in linear["data"].get("augmentations", {}).items():
            assert view[key] == value


def test_digits_are_never_mirrored_and_their_statistics_are_true(digits: Path) -> None:
    import numpy as np
    from PIL import Image

    (view,) = plain(composed(configs.find("pretrain/digits"), "emim"))["augmentations"]
    assert view["horizontal_flip"]["prob"] == view["solarization"]["prob"] == 0
    pixels = np.stack([np.asarray(Image.open(path)) for path in (digits / "train").glob("*/*.png")]) / 255
    assert view["mean"] == pytest.approx(pixels.mean((0, 1, 2)).tolist(), abs=5e-4)
    assert view["std"] == pytest.approx(pixels.std((0, 1, 2)).tolist(), abs=5e-4)


# -- where the values are from ----------------------------------------------------------------------------------------

Leaf = tuple[tuple[str | int, ...], Any, str]


def leaves(path: Path) -> Iterator[Leaf]:
    """Key, value and comment of every scalar in a YAML file; a comment on a key's line is its children's too."""
    text = path.read_text()
    lines = text.splitlines()

    def comment(node: yaml.Node) -> str:
        line = lines[node.start_mark.line]
        above = lines[node.start_mark.line - 1].strip() if node.start_mark.line else ""
        found = re.search(r"\s#\s*(.*)", line)
        return found.group(1) if found else above.removeprefix("# ") if above.startswith("#") else ""

    def walk(node: yaml.Node, key: tuple[str | int, ...], inherited: str) -> Iterator[Leaf]:
        if isinstance(node, yaml.MappingNode):
            for name, child in node.value:
                yield from walk(child, (*key, name.value), comment(name) or inherited)
        elif isinstance(node, yaml.SequenceNode) and any(not isinstance(n, yaml.ScalarNode) for n in node.value):
            for index, child in enumerate(node.value):
                yield from walk(child, (*key, index), inherited)
        else:
            value = content
            for step in key:
                value = value[step]
            yield key, value, inherited

    content: Any = OmegaConf.to_container(OmegaConf.create(text))
    node = yaml.compose(text)
    header = lines[0].removeprefix("# ") if isinstance(node, yaml.SequenceNode) else ""
    yield from walk(node, (), header)


SELF_EXPLANATORY = {"defaults", "hydra", "method", "pretrain_method", "name"}


def value_files() -> list[Path]:
    kinds = ("pretrain", "linear")
    return [path for path in configs.files() if path.parts[0] in kinds and path.suffix == ".yaml"]


@pytest.mark.parametrize("path", value_files(), ids=str)
def test_every_value_names_its_source(path: Path) -> None:
    silent = [
        ".".join(map(str, key))
        for key, _, comment in leaves(configs.root() / path)
        if key[0] not in SELF_EXPLANATORY and key != ("data", "dataset") and not comment
    ]
    assert not silent


@pytest.fixture(scope="module")
def suite_scripts() -> Path:
    load_suite()  # 1.0.2 imports only after it
    import solo

    assert solo.__file__ is not None
    scripts = Path(solo.__file__).resolve().parent.parent / "scripts" / "pretrain"
    if not scripts.is_dir():
        pytest.skip("the suite's own configs are in a clone of solo-learn main only: make test-main SOLO=<clone>")
    return scripts.parent


def suite_files(kind: str, dataset: str, comment: str, name: str) -> list[tuple[str, str]]:
    """The suite's configs that a comment appeals to: folder and file name."""
    if kind == "linear":
        both = [("linear/imagenet-100", "vicreg.yaml"), ("linear/imagenet-100", "barlow.yaml")]
        of = {"imagenet": [("linear/imagenet", "barlow.yaml")], "imagenet-100": both}.get(dataset, both[:1])
    elif dataset == "custom":
        of = [("pretrain/custom", "byol.yaml")]
    elif dataset == "imagenet":
        of = [("pretrain/imagenet", "barlow.yaml")]
    else:
        folder = "pretrain/cifar" if dataset == "digits" else f"pretrain/{dataset}"
        of = [(folder, "barlow.yaml"), (folder, "vicreg.yaml")]
    elsewhere = "(imagenet-100)" in comment or "imagenet-100/" in comment
    if elsewhere or (dataset in ("custom", "imagenet") and "vicreg.yaml" in comment):
        of = [("pretrain/imagenet-100", "barlow.yaml"), ("pretrain/imagenet-100", "vicreg.yaml")]
    first = comment.split(";")[0]
    named = [file for file in ("barlow.yaml", "vicreg.yaml") if file in first]
    if kind == "pretrain" and name in METHODS:  # a method's own settings are in the method's own file
        named = [f"{name}.yaml"]
    return [entry for entry in of if not named or entry[1] in named]


@cache
def suites_own(folder: Path, name: str) -> DictConfig:
    return composed(folder, name)


@pytest.mark.parametrize("path", value_files(), ids=str)
def test_values_said_to_be_the_suites_are(path: Path, suite_scripts: Path) -> None:
    """A comment that begins with 'suite' is a claim about solo-learn's own file, read from the clone."""
    kind, dataset = path.parts[:2]
    checked = 0
    for key, value, comment in leaves(configs.root() / path):
        if not comment.startswith("suite") or comment.startswith("suite's default") or key[0] in SELF_EXPLANATORY:
            continue
        augmentation = "augmentations" in path.parts
        if augmentation and path.stem == "asymmetric":
            entries = [(f"pretrain/{dataset}", "byol.yaml" if dataset == "custom" else "barlow.yaml")]
        elif augmentation:
            name = "vicreg.yaml"
            entries = [("pretrain/cifar" if dataset in ("cifar", "digits") else "pretrain/imagenet-100", name)]
        else:
            entries = suite_files(kind, dataset, comment, path.stem)
        assert entries, (path, key, comment)
        for folder, name in entries:
            theirs = suites_own(suite_scripts / folder, name)
            at = ".".join(map(str, ("augmentations", *key) if augmentation else key))
            expected = OmegaConf.select(theirs, at)
            expected = OmegaConf.to_container(expected) if OmegaConf.is_config(expected) else expected
            if key == ("precision",) and kind == "linear":
                expected = f"{expected}-mixed"  # 16, in today's spelling
            assert value == expected, (path, at, f"{folder}/{name}")
            checked += 1
    claims = path.stem == "_base" or ("augmentations" in path.parts and path.stem != "patches")  # which are EMP-SSL's
    assert checked >= (4 if dataset == "digits" else 10) * claims


def test_the_papers_values_are_the_papers() -> None:
    """Barlow Twins (arXiv 2103.03230): lambda 0.0051. VICReg (arXiv 2105.04906): 25, 25, 1.

    On the digits lambda and the weight of invariance were searched, see below.
    """
    for dataset in DATASETS:
        folder = configs.find(f"pretrain/{dataset}")
        vicreg = plain(composed(folder, "vicreg"))["method_kwargs"]
        assert [vicreg[f"{term}_loss_weight"] for term in ("var", "cov")] == [25.0, 1.0]
        if dataset != "digits":
            assert plain(composed(folder, "barlow"))["method_kwargs"]["lamb"] == 0.0051
            assert vicreg["sim_loss_weight"] == 25.0


def scores_of(file: str) -> dict[str, float]:
    """Mean of 20-NN and linear accuracy of every trial over its seeds, from the committed rows of a search."""
    found: dict[str, list[float]] = {}
    for row in rows.read(REPOSITORY / "docs" / "results" / file):
        if row["stage"] in ("knn", "linear"):
            key = "backbone_cosine_k20" if row["stage"] == "knn" else "acc1"
            found.setdefault(row["name"], []).append(row["metrics"][key])
    return {name: sum(values) / len(values) for name, values in found.items()}


def trials_of_the_digits(file: str, config: str) -> dict[str, dict[str, Any]]:
    methods = yaml.safe_load((REPOSITORY / "research" / file).read_text())["methods"]
    return {name: trial for name, trial in methods.items() if trial["config"] == config}


def test_the_digits_weights_are_those_that_the_first_search_ended_with() -> None:
    scores = scores_of("digits/search.jsonl")
    assert len(scores) == 20
    for config in (*METHODS, "emim_multicrop"):
        trials = trials_of_the_digits("digits-search.yaml", config)
        assert len(trials) == 5
        best = trials[max(trials, key=scores.__getitem__)]
        shipped = plain(composed(configs.find("pretrain/digits"), config))
        assert best.get("method_kwargs", {}).items() <= shipped["method_kwargs"].items()
        if config == "emim_multicrop":  # which the second search was not about
            assert best["run"]["optimizer"].items() <= shipped["optimizer"].items()


def test_what_the_digits_methods_share_is_what_the_second_search_ended_with() -> None:
    """The highest mean over the three methods is what all three get."""
    scores = scores_of("digits/recipes.jsonl")
    assert len(scores) == 18
    recipes: dict[str, dict[str, dict[str, Any]]] = {}
    means: dict[str, float] = {}
    for config, method in METHODS.items():
        trials = trials_of_the_digits("digits-recipes.yaml", config)
        assert len(trials) == 6
        for name, trial in trials.items():
            recipe = name.removeprefix(f"{method}_")
            recipes.setdefault(recipe, {})[config] = trial
            means[recipe] = means.get(recipe, 0.0) + scores[name] / 3
    for config, best in recipes[max(means, key=means.__getitem__)].items():
        shipped = plain(composed(configs.find("pretrain/digits"), config))
        assert best["run"]["optimizer"].items() <= shipped["optimizer"].items()
        assert best["method_kwargs"].items() <= shipped["method_kwargs"].items()


@pytest.mark.parametrize("name", ["digits-all", "fashion-mnist"])
def test_each_method_has_the_best_of_its_four_recipes(name: str) -> None:
    """By the rule that stands above the recipes: the mean of 20-NN and linear on held-out training images."""
    scores = scores_of(f"{name}/recipes.jsonl")
    recipes = plain(OmegaConf.load(REPOSITORY / "research" / f"{name}-recipes.yaml"))["methods"]
    assert scores.keys() == recipes.keys()
    for method, shipped in plain(composed(configs.find("benchmark"), name))["methods"].items():
        tried = [recipe for recipe in recipes if recipe == method or recipe.startswith(f"{method}_")]
        assert len(tried) == 4
        assert shipped == recipes[max(tried, key=scores.__getitem__)], method
