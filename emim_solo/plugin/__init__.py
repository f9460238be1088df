"""Registers EMIM with solo-learn."""
