"""Every key of a shipped config, and every other key that is known, with values of every kind: one line, or it trains.

All of them: ``pytest -m every_value tests/test_every_value.py``, in some minutes. Without the marker a sample of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf

from emim_solo.ground import configs
from emim_solo.ground.errors import UsageError
from emim_solo.suite import schema
from emim_solo.training.pretraining import prepare, pretrain

VALUES: tuple[Any, ...] = (
    *(None, "", "text", "two words", "\u00fcn\u00ef", "a\nb", "x" * 300, "../../x"),
    *(-1, 0, 1, 1.5, math.inf, math.nan, 10**6, 10**20, True, False),
    *([], [1, 2], [["text"]], {}, {"a": 1}),
)
SAMPLE = 40  # of some thousand cases


class Reached(Exception):
    """The first batch went through the model."""


class AtTheFirstBatch(Callback):
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        raise Reached


@pytest.fixture
def base(three_classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DictConfig:
    """The shipped config for a folder of images, small and on a CPU."""
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b" / "c")  # "../../x" stays within the test's folder
    overrides = [f"data.{split}_path={three_classes / split}" for split in ("train", "val")]
    overrides += ["accelerator=cpu", "devices=[0]", "strategy=auto", "precision=32", "sync_batchnorm=False"]
    overrides += ["data.num_workers=0", "optimizer.batch_size=8", "augmentations.0.crop_size=32", "max_epochs=1"]
    overrides += ["method_kwargs.proj_hidden_dim=16", "method_kwargs.proj_output_dim=8"]
    with initialize_config_dir(config_dir=str(configs.find("pretrain/custom")), version_base="1.2"):
        cfg = compose("emim", overrides=overrides)
    OmegaConf.set_struct(cfg, False)
    cfg.enable_progress_bar = cfg.enable_model_summary = False
    return cfg


def keys_of(config: Any, above: str = "") -> Iterator[str]:
    """Dotted keys of every section and every value."""
    entries = config.items() if isinstance(config, dict) else enumerate(config)
    for name, value in entries:
        key = f"{above}{name}"
        yield key
        if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(each, dict) for each in value)):
            yield from keys_of(value, f"{key}.")


def known_keys(kind: type, above: str = "") -> Iterator[str]:
    """Dotted keys of a dataclass of settings."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        options = typing.get_args(hints[field.name]) or (hints[field.name],)
        yield f"{above}{field.name}"
        for option in options:
            if dataclasses.is_dataclass(option):
                below = f"{above}{field.name}." + ("0." if field.name == "augmentations" else "")
                yield from known_keys(typing.cast(type, option), below)


def all_cases(base: DictConfig) -> list[tuple[str, Any]]:
    shipped = list(keys_of(OmegaConf.to_container(base)))
    keys = dict.fromkeys([*shipped, *known_keys(schema.Config), *schema.REFUSED])
    assert len(shipped) >= 78 and "augmentations.0.rrc.crop_min_scale" in keys
    return list(itertools.product(keys, VALUES))


def what_happens(base: DictConfig, key: str, value: Any) -> str | None:
    """What is wrong with how a config with this value ends; None where it is one line, or where it trains."""
    cfg = base.copy()
    OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    shown = f"{key}={str(value)[:40]!r}"
    try:
        run = prepare(cfg)
        if run.processes == 1:  # others would be started by Lightning
            pretrain(run, more_callbacks=[AtTheFirstBatch()])
            return f"{shown}: no batch"
    except Reached:
        return None
    except (UsageError, FloatingPointError) as error:
        if "\n" in str(error):
            return f"{shown}: {len(str(error).splitlines())} lines: {error}"
        if len(str(error)) > 1_000:
            return f"{shown}: {len(str(error))} characters"
        if isinstance(error, UsageError) and not error.key:
            return f"{shown}: no key: {error}"
    except Exception as error:
        frames = error.__traceback__
        while frames is not None and frames.tb_next is not None:
            frames = frames.tb_next
        place = "" if frames is None else f" in {frames.tb_frame.f_code.co_filename}:{frames.tb_lineno}"
        return f"{shown}: {type(error).__name__}: {str(error)[:200]!r}{place}"
    return None


@pytest.mark.filterwarnings("ignore")
def test_a_sample_of_all_keys_with_values_of_every_kind_is_one_line_or_trains(base: DictConfig) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    cases = all_cases(base)
    random.Random(seed).shuffle(cases)
    wrong = [said for key, value in cases[:SAMPLE] if (said := what_happens(base, key, value))]
    assert not wrong, f"seed {seed}:\n" + "\n".join(wrong)


@pytest.mark.every_value
@pytest.mark.filterwarnings("ignore")
def test_every_key_with_values_of_every_kind_is_one_line_or_trains(base: DictConfig) -> None:
    wrong = [said for key, value in all_cases(base) if (said := what_happens(base, key, value))]
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("key", "value"),
    [("augmentations.0.num_crops", 10**6), ("data.num_workers", 10**6), ("devices", 10**6), ("num_nodes", 10**6)],
)
def test_a_million_is_refused_before_memory_is_gone(
    key: str, value: int, base: DictConfig, refused: Callable[..., Any]
) -> None:
    OmegaConf.update(base, key, value, force_add=True)
    with refused(key, value):
        prepare(base)
