"""Evaluation of a checkpoint: features, k-NN, linear, UMAP, diagnostics. Thin over the suite's own."""
