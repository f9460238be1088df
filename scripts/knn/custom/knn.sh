#!/usr/bin/env bash
# k-NN accuracy of a checkpoint with solo-learn's main_knn.py, EMIM included; in a clone of solo-learn, on a GPU:
#   bash knn.sh CHECKPOINT_FOLDER TRAIN_FOLDER VAL_FOLDER
# On a CPU, or for many checkpoints at once: emim-solo knn CHECKPOINT_FOLDER ...
# The grid of k, temperatures, features and distances is the suite's scripts/knn/imagenet-100/knn.sh. Batch: suite.
set -euo pipefail

python3 -m emim_solo main_knn.py \
    --dataset custom \
    --train_data_path "$2" \
    --val_data_path "$3" \
    --batch_size 16 \
    --num_workers 10 \
    --pretrained_checkpoint_dir "$1" \
    --k 1 2 5 10 20 50 100 200 \
    --temperature 0.01 0.02 0.05 0.07 0.1 0.2 0.5 1 \
    --feature_type backbone projector \
    --distance_function euclidean cosine
