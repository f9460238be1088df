"""Many views of an image: the recipe of patches, one forward for all of a size, and ``precision: auto``."""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RESNET
from hydra import compose, initialize_config_dir
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch.nn import functional

from emim_solo import checkpoints
from emim_solo.benchmark import cost
from emim_solo.benchmark.plan import make_plan
from emim_solo.emim import method
from emim_solo.evaluation.features import extract_features
from emim_solo.evaluation.score import ScoredViews
from emim_solo.ground import configs
from emim_solo.ground.compare import config_hash
from emim_solo.images.folders import load_rgb
from emim_solo.suite import as_dict, dali, load_suite, loaders
from emim_solo.suite.views import activation_bytes
from emim_solo.training import run as runs
from emim_solo.training.pretraining import prepare, pretrain

MakeCfg = Callable[..., DictConfig]
Refused = Callable[..., AbstractContextManager[Any]]
BATCH = 32


@pytest.fixture
def patches(few_digits: Path, tmp_path: Path) -> Callable[..., DictConfig]:
    """A shipped ``emim_patches`` on few digits, its projector and batch small: ``patches("augmentations=patches_beside")``.

    With ImageNet's stem, in whose single pixels bfloat16 is refused, unless ``shipped``.
    """

    def make(*overrides: str, dataset: str = "digits", shipped: bool = False) -> DictConfig:
        small = [f"data.{split}_path={few_digits / split}" for split in ("train", "val")]
        small += ["method_kwargs.proj_hidden_dim=64", "method_kwargs.proj_output_dim=16", "data.num_workers=0"]
        small += [f"optimizer.batch_size={BATCH}", f"checkpoint.dir={tmp_path / 'trained'}", "max_epochs=1"]
        small += [] if shipped else ["++backbone.small_image_stem=False", "precision=32"]
        with initialize_config_dir(config_dir=str(configs.find(f"pretrain/{dataset}")), version_base="1.2"):
            return compose(
                "emim_patches",
                overrides=[
                    *small,
                    "accelerator=cpu",
                    "++log_every_n_steps=5",
                    "+enable_progress_bar=False",
                    *overrides,
                ],
            )

    return make


class Forwards(Callback):
    """Shapes of what the backbone is given in training."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def note(network: torch.nn.Module, images: Any, _: Any) -> None:
            if network.training:
                self.shapes.append(tuple(images[0].shape))

        load_suite().backbone(pl_module).register_forward_hook(note)


@pytest.mark.parametrize(
    ("augmentations", "crops", "of_a_step"),
    [
        ("patches", 5, [(5 * BATCH, 3, 16, 16)]),
        ("patches_beside", 8, [(BATCH, 3, 32, 32), (BATCH, 3, 32, 32), (8 * BATCH, 3, 16, 16)]),
    ],
)
def test_the_recipe_gives_the_loss_every_patch_of_one_forward(
    augmentations: str,
    crops: int,
    of_a_step: list[tuple[int, ...]],
    patches: Callable[..., DictConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    large = len(of_a_step) - 1
    embeddings: list[list[tuple[int, ...]]] = []
    loss_func = method.emim_loss_func

    def noting(*views: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        embeddings.append([tuple(view.shape) for view in views])
        return loss_func(*views, **kwargs)

    monkeypatch.setattr(method, "emim_loss_func", noting)
    forwards = Forwards()
    number = 1 if large else 0
    row = pretrain(
        prepare(patches(f"augmentations={augmentations}", f"augmentations.{number}.num_crops={crops}")),
        more_callbacks=[forwards],
    )
    steps = 160 // BATCH
    assert embeddings == [[(BATCH, 16)] * (large + crops)] * steps
    assert forwards.shapes == of_a_step * steps
    assert row["metrics"]["train_mi"] > 0
    assert 0 <= row["metrics"]["val_knn_acc1"] <= 100


def test_the_recipe_as_it_is_shipped_says_its_precision(patches: Callable[..., DictConfig]) -> None:
    forwards = Forwards()
    little = [
        "optimizer.batch_size=8",
        "+limit_train_batches=2",
        "+limit_val_batches=1",
        "++log_every_n_steps=1",
        "knn_eval.enabled=False",
    ]
    row = pretrain(prepare(patches(*little, shipped=True)), more_callbacks=[forwards])
    assert forwards.shapes == [(8 * 8, 3, 16, 16)] * 2
    assert row["config"]["precision"] == runs.native_precision(OmegaConf.create({"accelerator": "cpu"}))
    assert row["config_hash"] == config_hash(row["config"])


def test_single_pixels_are_refused_in_bfloat16_on_a_cpu(patches: Callable[..., DictConfig], refused: Refused) -> None:
    """torch gives the weights that see them a gradient of whatever lay in the memory."""
    suite = load_suite()
    with refused("precision", "layer4.0.conv1", "precision=32, backbone.small_image_stem=True or a larger crop_size"):
        suite.build(prepare(patches("precision=bf16-mixed")).config)
    suite.build(prepare(patches("precision=bf16-mixed", "augmentations.0.crop_size=24")).config)
    suite.build(prepare(patches("precision=bf16-mixed", shipped=True)).config)
    suite.build(prepare(patches()).config)


@pytest.mark.parametrize("small", [0, 4])
def test_views_at_once_have_the_outputs_that_each_has_alone(
    small: int, make_cfg: MakeCfg, built_to_step: Callable[[DictConfig], LightningModule]
) -> None:
    """Where BatchNorm does not mix them, which it does in training."""
    cfg = make_cfg(backbone=RESNET)
    cfg.augmentations[0].num_crops = 3
    if small:
        cfg.augmentations.append(OmegaConf.merge(cfg.augmentations[0], {"crop_size": 8, "num_crops": small}))
    run = prepare(cfg)
    model: Any = built_to_step(run.config)
    indices, views, labels = next(iter(load_suite().train_loader(run.config, run.images)))
    with torch.no_grad():
        model.train()
        alone = [model(view) for view in views]
        out = super(method.EMIMMethod, model).training_step([indices, views, labels], 0)
        assert not torch.allclose(out["feats"][0], alone[0]["feats"], atol=1e-4), (
            "BatchNorm has the moments of all views"
        )

        model.eval()
        alone = [model(view) for view in views]
        out = super(method.EMIMMethod, model).training_step([indices, views, labels], 0)
        assert len(out["feats"]) == 3 + small and len(out["logits"]) == 3
        for found, expected in zip(out["feats"], alone, strict=True):
            torch.testing.assert_close(found, expected["feats"])
        for found, expected in zip(model.embeddings(out), alone, strict=True):
            torch.testing.assert_close(found, expected["z"])
        for found, expected in zip(out["logits"], alone, strict=False):
            torch.testing.assert_close(found, expected["logits"])
        losses = [functional.cross_entropy(each["logits"], labels) for each in alone[:3]]
        torch.testing.assert_close(out["loss"], torch.stack(losses).mean())
    assert (model.num_large_crops, model.num_small_crops, model.num_crops) == (3, small, 3 + small)


def test_two_views_of_a_size_go_one_at_a_time_as_they_always_did(make_cfg: MakeCfg) -> None:
    cfg = make_cfg(backbone=RESNET)
    cfg.augmentations.append(OmegaConf.merge(cfg.augmentations[0], {"crop_size": 8}))
    forwards = Forwards()
    pretrain(prepare(cfg), more_callbacks=[forwards])
    one = (BATCH, 3, 16, 16), (BATCH, 3, 16, 16), (BATCH, 3, 8, 8), (BATCH, 3, 8, 8)
    assert forwards.shapes == [*one] * (160 // BATCH)


def test_a_method_of_another_package_takes_patches_if_it_says_so(
    patches: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    suite = load_suite()
    base: Any = suite.METHODS["base"]
    seen: list[int] = []

    class Spread(base):
        """Features of the views of an image are drawn to their mean."""

        takes_many_views = True

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            out = super().training_step(batch, batch_idx)
            views = torch.stack(out["feats"])
            seen.append(len(views))
            loss: torch.Tensor = out["loss"] + views.var(0).mean()
            return loss

    monkeypatch.setitem(suite.METHODS, "spread", Spread)
    forwards = Forwards()
    pretrain(prepare(patches("method=spread")), more_callbacks=[forwards])
    assert seen == [8] * (160 // BATCH)
    assert set(forwards.shapes) == {(8 * BATCH, 3, 16, 16)}
    Spread.takes_many_views = False
    with refused("augmentations", "spread takes 2 large crops,", "augmentations give 8"):
        prepare(patches("method=spread"))


RIVALS = Path(__file__).parents[1] / "research" / "real_size" / "rivals"


@pytest.fixture
def rivals(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The classes that the entry points of research/real_size/rivals name."""
    pytest.importorskip("lightly")
    load_suite()
    monkeypatch.syspath_prepend(RIVALS)
    names = re.findall(r'^(\w+) = "(rivals_solo:\w+)"', (RIVALS / "pyproject.toml").read_text(), re.MULTILINE)
    return {name: pkgutil.resolve_name(place) for name, place in names}


def test_the_rivals_of_patches_have_their_published_weights_and_want_views_to_agree(rivals: dict[str, Any]) -> None:
    import methods  # research/out_of_the_box, which rivals_solo.py has put on the path

    assert sorted(rivals) == ["emp_ssl", "emp_ssl_published", "frossl", "lejepa", "mmcr", "vicreg_views"]
    torch.manual_seed(0)
    images, noise = torch.randn(64, 8), torch.randn(3, 64, 8)
    for name, of in rivals.items():
        agree, differ = images + 0.1 * noise, (images + noise) / 2**0.5
        published = getattr(methods, re.sub("_(views|published)$", "", name))
        values = []
        for views in (agree, differ):
            torch.manual_seed(1)  # of LeJEPA's directions
            values.append(of.loss(*views, **of.WEIGHTS))
            torch.manual_seed(1)
            torch.testing.assert_close(values[-1], published(*views))
        assert values[0] < values[1], name


def test_a_rival_of_patches_trains_on_all_of_them(
    rivals: dict[str, Any], patches: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(load_suite().METHODS, "mmcr", rivals["mmcr"])
    forwards = Forwards()
    row = pretrain(prepare(patches("method=mmcr")), more_callbacks=[forwards])
    assert set(forwards.shapes) == {(8 * BATCH, 3, 16, 16)}
    assert row["config"]["method_kwargs"]["lmda"] == 0.0
    assert -1 < row["metrics"]["train_mmcr_loss_epoch"] < 0


def test_the_features_of_the_published_emp_ssl_are_its_hidden_layer(
    rivals: dict[str, Any], patches: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(load_suite().METHODS, "emp_ssl_published", rivals["emp_ssl_published"])
    row = pretrain(prepare(patches("method=emp_ssl_published", "method_kwargs.proj_hidden_dim=48")))
    features = extract_features(checkpoints.open_checkpoint(Path(row["checkpoint"])), views=2)
    assert features.train.backbone.shape == (160, 48)
    assert features.train.backbone.min() == 0  # after the ReLU
    assert features.train.backbone.std(dim=0).mean() > 0


@pytest.mark.parametrize(
    ("name", "crops"),
    [("two-views-recipes", 2), ("two-views", 2), ("patches-recipes", 8), ("patches", 8), ("twenty-patches", 20)],
)
def test_the_runs_at_real_size_are_on_equal_terms(
    name: str, crops: int, rivals: dict[str, Any], few_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for method_name, of in rivals.items():
        monkeypatch.setitem(load_suite().METHODS, method_name, of)
    images = [f"run.data.{part}_path={few_digits / part}" for part in ("train", "val")]
    with initialize_config_dir(config_dir=str(RIVALS.parent), version_base="1.2"):
        plan = make_plan(compose(name, overrides=images))
    assert {run.cfg.augmentations[0].num_crops for run in plan.runs} == {crops}


def test_a_method_of_two_views_is_refused_with_those_that_take_more(
    patches: Callable[..., DictConfig], refused: Refused
) -> None:
    with refused(
        "augmentations", "vicreg takes 2 large crops,", "augmentations give 8", "or take one of emim, ", "wmse"
    ):
        prepare(patches("method=vicreg"))
    with refused("augmentations", "emim takes 2 large crops or more, augmentations give 1"):
        prepare(patches("augmentations.0.num_crops=1"))


@pytest.mark.parametrize("many", ["simclr", "supcon", "wmse"])
def test_the_suites_own_methods_that_take_many_views_train_on_them(
    many: str, patches: Callable[..., DictConfig]
) -> None:
    if many not in load_suite().methods() or not load_suite().takes_many_views(many):
        pytest.skip(f"{many} of this generation unpacks two views")
    own = {"whitening_size": 32, "whitening_iters": 1, "whitening_eps": 0.1} if many == "wmse" else {"temperature": 0.2}
    settings = [f"+method_kwargs.{name}={value}" for name, value in own.items()]
    forwards = Forwards()
    row = pretrain(prepare(patches(f"method={many}", *settings)), more_callbacks=[forwards])
    assert set(forwards.shapes) == {(8 * BATCH, 3, 16, 16)}
    assert row["epochs"] == 1


def test_patches_larger_than_the_images_are_refused(patches: Callable[..., DictConfig], refused: Refused) -> None:
    with refused("augmentations.0.crop_size", "8 patches larger than the images, of 32 pixels", "4.0 times as long"):
        prepare(patches("augmentations.0.crop_size=64"))
    with refused("augmentations.0.crop_size", "of 24 pixels"):
        prepare(patches("augmentations.0.crop_size=32", "data.image_size=24"))
    prepare(patches("augmentations.0.crop_size=64", "augmentations.0.num_crops=2"))  # views, as a ViT may want them


def test_whole_images_are_shown_at_the_resolution_of_the_patches(patches: Callable[..., DictConfig]) -> None:
    suite, run = load_suite(), prepare(patches("score.enabled=True"))
    assert run.protocol is not None
    assert suite.evaluation_transform(run.config)(Image.new("RGB", (32, 32))).shape == (3, 32, 32)
    views = ScoredViews(run.config, run.protocol, run.images)
    assert next(iter(views._loader))[0].shape[-2:] == (32, 32)


def test_an_image_is_decoded_once_for_all_of_its_patches(
    patches: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []

    def noting(path: str) -> Image.Image:
        decoded.append(path)
        return load_rgb(path)

    monkeypatch.setattr(loaders, "load_rgb", noting)
    run = prepare(patches())
    _, views, _ = next(iter(load_suite().train_loader(run.config, run.images)))
    assert [tuple(view.shape) for view in views] == [(BATCH, 3, 16, 16)] * 8
    assert len(decoded) == len(set(decoded)) == BATCH


@pytest.mark.skipif(not dali.is_installed(), reason="NVIDIA DALI is not installed: pip install 'emim-solo[dali]'")
def test_dali_cuts_the_same_patches(patches: Callable[..., DictConfig]) -> None:
    forwards = Forwards()
    row = pretrain(prepare(patches("data.format=dali", "+dali.device=cpu")), more_callbacks=[forwards])
    assert forwards.shapes == [(8 * BATCH, 3, 16, 16)] * (160 // BATCH)
    assert row["metrics"]["train_mi"] > 0


@pytest.mark.parametrize("augmentations", ["patches", "patches_beside"])
@pytest.mark.parametrize(("dataset", "size"), [("cifar", 16), ("digits", 16), ("custom", 112)])
def test_shipped_patches_are_native(
    dataset: str, size: int, augmentations: str, patches: Callable[..., DictConfig]
) -> None:
    """A quarter of the image's area at the resolution that whole images are evaluated at."""
    cfg = patches(f"augmentations={augmentations}", dataset=dataset)
    view = cfg.augmentations[-1]
    assert (view.crop_size, view.num_crops) == (size, 8)
    assert view.rrc.crop_min_scale == view.rrc.crop_max_scale == (size / cfg.data.image_size) ** 2
    if dataset != "cifar":  # whose images torchvision would download
        counts = prepare(cfg).config.data
        assert (counts.num_large_crops, counts.num_small_crops) == ((8, 0), (2, 8))[augmentations == "patches_beside"]


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True}, "32"),
        ({"avx512_bf16": True}, "bf16-mixed"),
        ({"amx_bf16": True, "avx512_bf16": False}, "bf16-mixed"),
    ],
)
def test_auto_is_what_the_processor_has_before_the_run_is_named(
    capabilities: dict[str, bool], expected: str, make_cfg: MakeCfg, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    auto, explicit = (as_dict(prepare(make_cfg(precision=precision)).config) for precision in ("auto", expected))
    assert auto["precision"] == expected
    assert config_hash(auto) == config_hash(explicit)


def test_a_processor_that_does_not_say_what_it_has_gets_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert runs.native_precision(OmegaConf.create({"accelerator": "cpu"})) == "32"


def test_activations_are_what_each_layer_keeps() -> None:
    """By hand: the convolution keeps its input, ReLU its output, float32; the weights are there once."""
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten())
    views = [{"crop_size": 6, "num_crops": 2}, {"crop_size": 4, "num_crops": 5}]
    cfg = OmegaConf.create({"augmentations": views, "optimizer": {"batch_size": 10}})
    pixels = 10 * (2 * 6**2 + 5 * 4**2)
    assert activation_bytes(network, cfg) == 4 * (3 + 8) * pixels
    assert activation_bytes(network.requires_grad_(False), cfg) == 0


def test_patches_beyond_memory_are_refused_before_the_first_step(
    patches: Callable[..., DictConfig], refused: Refused
) -> None:
    run = prepare(patches("optimizer.batch_size=100000000"))
    with refused("augmentations", "100000000 images in 8 views", "GiB of activations", "a process has", "num_crops"):
        pretrain(run)
    with refused("augmentations", "GiB of activations"):
        cost.measure(run)
    assert not run.rows_file.is_file()
