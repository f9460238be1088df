#!/usr/bin/env bash
# k-NN accuracy of checkpoints trained on the digits, on a CPU or a GPU:
#   bash knn.sh CHECKPOINT_FOLDER ...
# Not solo-learn's main_knn.py: it needs a GPU and shows the images of such a folder at 224 pixels.
set -euo pipefail

emim-solo knn "$@"
