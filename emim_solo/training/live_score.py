"""The label-free score during training: logged every few epochs, watched by Lightning's EarlyStopping and ModelCheckpoint."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from omegaconf import DictConfig, OmegaConf

from emim_solo.checkpoints import opening
from emim_solo.emim.measures import scores
from emim_solo.evaluation.score import ScoredViews
from emim_solo.ground import files
from emim_solo.training.run import Run

MONITOR = "score_view_information"
BEST = "best"
_COST = 20  # a scoring costs less than 1/20 of the training since the last one
_FORWARDS_OF_A_CROP = 3  # one forward, and a backward that costs as much as two


def stopped_early(contents: Mapping[str, Any], cfg: DictConfig) -> bool:
    """Whether the score's patience had run out when the checkpoint was written."""
    patience = OmegaConf.select(cfg, "score.patience")
    if patience is None:
        return False
    state = contents.get("callbacks", {}).get(StopOnScore(patience).state_key)
    return state is not None and state["wait_count"] >= patience


def smallest_interval(images: int, views: int, crops: int, trained: float) -> int:
    """The smallest number of epochs such that one scoring costs less than 5 % of their training, counted in forwards.

    A scoring takes ``views`` of each of ``images`` images. An epoch trains on ``crops`` of each of ``trained`` images.
    """
    return int(_COST * images * views // (_FORWARDS_OF_A_CROP * crops * trained)) + 1


def is_last_epoch(trainer: Trainer) -> bool:
    """Whether the current epoch is the last one: by its number, by the steps, or because something has stopped the run."""
    epochs = trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch + 1
    return epochs or 0 <= trainer.max_steps <= trainer.global_step or trainer.should_stop


def score_callbacks(run: Run, model: LightningModule) -> list[Callback]:
    """Callbacks that score a run; they must precede those that save it. UsageError if it lacks the protocol's features."""
    cfg, folder = run.config, run.folder
    if run.protocol is None or folder is None:
        return []
    views = ScoredViews(cfg, run.protocol, run.images)
    with _undisturbed(model):
        views.check_features(model)
    watchers: list[StopOnScore | KeepBest] = []
    if cfg.score.patience is not None:
        watchers.append(StopOnScore(cfg.score.patience))
    if cfg.score.keep_best:
        watchers.append(KeepBest(folder, f"{cfg.name}-{folder.name}"))
    return [LiveScore(cfg, views, watchers), *watchers]


class LiveScore(Callback):
    """Logs the score at the end of every n-th epoch and of the last one. Scoring changes no bit of the training.

    It calls the watchers, :class:`StopOnScore` and :class:`KeepBest`, itself. Lightning would call them in every epoch, and only
    after solo-learn's Checkpointer, so that its checkpoint would lack their latest state.
    """

    def __init__(self, cfg: DictConfig, views: ScoredViews, watchers: Sequence[StopOnScore | KeepBest]) -> None:
        self.views, self.watchers = views, watchers
        self.every: int | None = cfg.score.every_n_epochs
        self.batch: int = cfg.optimizer.batch_size
        self.crops: int = cfg.data.num_large_crops + cfg.data.num_small_crops
        self.scorings, self.seconds = 0, 0.0

    @property
    def summary(self) -> dict[str, Any]:
        """The entry ``score`` of the run's row; ``seconds`` is the time of all scorings."""
        return {
            "of": self.views.which,
            "images": len(self.views.chosen),
            "every_n_epochs": self.every,
            "scorings": self.scorings,
            "seconds": round(self.seconds, 1),
        }

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        images, views = len(self.views.chosen), self.views.protocol.views
        trained = self.batch * trainer.num_training_batches  # of one process, because only one process scores
        self.every = self.every or smallest_interval(images, views, self.crops, trained)
        if trainer.is_global_zero:
            which = f"{views} views of {images} {self.views.which} images"
            print(f"score: {which}, every {self.every} epoch(s) and after the last", flush=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.every is not None
        if (trainer.current_epoch + 1) % self.every and not is_last_epoch(trainer):
            return
        start = time.perf_counter()
        values: dict[str, float] = {}
        if trainer.is_global_zero:
            with _undisturbed(pl_module):
                values = scores(self.views.features(pl_module), **self.views.protocol.settings)
        values = trainer.strategy.broadcast(values)
        self.scorings, self.seconds = self.scorings + 1, self.seconds + time.perf_counter() - start
        if math.isnan(values["view_information"]):
            rank_zero_warn(f"the score of epoch {trainer.current_epoch} is NaN: the run diverged")
        pl_module.log_dict({f"score_{name}": value for name, value in values.items()}, sync_dist=True)
        for watcher in self.watchers:
            watcher.on_scored(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"scorings": self.scorings, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scorings, self.seconds = state_dict["scorings"], state_dict["seconds"]


class StopOnScore(EarlyStopping):
    """Lightning's EarlyStopping on the score: ends the run at a NaN, or after ``patience`` scorings without a better one."""

    def __init__(self, patience: int) -> None:
        # Without the last argument it would act only if validation came once an epoch.
        super().__init__(MONITOR, mode="max", patience=patience, verbose=True, check_on_train_epoch_end=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Does nothing: :class:`LiveScore` calls ``on_scored`` when there is a score."""

    def on_scored(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state, but with the patience of this config: a user may raise it to go on."""
        super().load_state_dict(state_dict | {"patience": self.patience})


class KeepBest(ModelCheckpoint):
    """Lightning's ModelCheckpoint: keeps the best-scored checkpoint in ``best/``, which evaluations open like a run's folder."""

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(
            str(folder / BEST),
            f"{name}-ep={{epoch}}",
            monitor=MONITOR,
            mode="max",
            auto_insert_metric_name=False,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
        self.folder = folder

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Does nothing: :class:`LiveScore` calls ``on_scored`` when there is a score."""

    def on_scored(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        arguments = self.folder / opening.ARGUMENTS
        if trainer.is_global_zero and arguments.is_file():
            with files.whole(self.folder / BEST / opening.ARGUMENTS) as unfinished:
                shutil.copyfile(arguments, unfinished)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Find the best checkpoint in this folder. If the folder was moved, Lightning forgets the old best and would keep two.

        If the file is gone, the next one scored is the best.
        """
        assert self.dirpath is not None
        kept = Path(self.dirpath) / Path(state_dict["best_model_path"]).name
        if kept.is_file():
            paths = dict.fromkeys(("best_model_path", "kth_best_model_path"), str(kept))
            best = {str(kept): state_dict["best_model_score"]}
            super().load_state_dict(state_dict | paths | {"dirpath": self.dirpath, "best_k_models": best})


@contextmanager
def _undisturbed(model: LightningModule) -> Iterator[None]:
    """Afterwards the random states and the training mode of each module are as before."""
    training = [module for module in model.modules() if module.training]
    with isolate_rng():
        try:
            yield
        finally:
            model.eval()
            for module in training:
                module.training = True
