#!/usr/bin/env bash
# UMAP of checkpoints trained on the digits, on a CPU or a GPU:
#   bash umap.sh CHECKPOINT_FOLDER ...
# Not solo-learn's main_umap.py: it needs a GPU and shows the images of such a folder at 224 pixels.
set -euo pipefail

emim-solo umap "$@"
