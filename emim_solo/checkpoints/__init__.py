"""Checkpoints and weights on disk: opening and exporting them."""
