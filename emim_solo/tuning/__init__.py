"""A search over keys of a config that maximises the score without labels. It uses Optuna."""
