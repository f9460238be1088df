"""Evaluation of a checkpoint: features, k-NN, linear evaluation, label-free score, UMAP."""
