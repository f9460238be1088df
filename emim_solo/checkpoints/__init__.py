"""Checkpoints and weights on disk: opening and exporting them."""

from emim_solo.checkpoints.opening import Checkpoint, DamagedCheckpoint, open_checkpoint, open_checkpoints

__all__ = ["Checkpoint", "DamagedCheckpoint", "open_checkpoint", "open_checkpoints"]
