"""One pretraining run, from its config to its row of results."""
