#!/usr/bin/env bash
# UMAP of a checkpoint's features with solo-learn's main_umap.py, EMIM included; in a clone of solo-learn, on a GPU:
#   bash umap.sh CHECKPOINT_FOLDER
# It writes im100_train_umap.pdf and im100_val_umap.pdf (the suite's names) into the working directory.
# On a CPU, or for many checkpoints in one layout: emim-solo umap CHECKPOINT_FOLDER ...
# Arguments as in the suite's scripts/umap/imagenet-100/umap.sh. Batch: suite.
set -euo pipefail

python3 -m emim_solo main_umap.py \
    --dataset imagenet100 \
    --train_data_path ./datasets/imagenet-100/train \
    --val_data_path ./datasets/imagenet-100/val \
    --batch_size 16 \
    --num_workers 10 \
    --pretrained_checkpoint_dir "$1"
