"""A search over keys of a config that maximises the score, no label anywhere. The engine is Optuna."""
