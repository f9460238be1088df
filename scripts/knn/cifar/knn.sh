#!/usr/bin/env bash
# k-NN accuracy of a checkpoint with solo-learn's main_knn.py, EMIM included; in a clone of solo-learn, on a GPU:
#   bash knn.sh CHECKPOINT_FOLDER
# On a CPU, or for many checkpoints at once: emim-solo knn CHECKPOINT_FOLDER ...
# The grid of k, temperatures, features and distances is the suite's scripts/knn/imagenet-100/knn.sh. Batch: ours: small images.
set -euo pipefail

python3 -m emim_solo main_knn.py \
    --dataset cifar10 \
    --train_data_path ./datasets \
    --val_data_path ./datasets \
    --batch_size 256 \
    --num_workers 4 \
    --pretrained_checkpoint_dir "$1" \
    --k 1 2 5 10 20 50 100 200 \
    --temperature 0.01 0.02 0.05 0.07 0.1 0.2 0.5 1 \
    --feature_type backbone projector \
    --distance_function euclidean cosine
