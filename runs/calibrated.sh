#!/usr/bin/env bash
# What a calibrated start is worth in tokens of uptraining (ours, calibrate.py): three seeds from the paper's average +
# SVD and from a calibrated start, at equal rank and recipe. Each run's log.jsonl has the validation loss every 5 steps
# (10,240 tokens). runs/calibrated.py has the losses before any training. Half an hour on two cores.
# shellcheck source=runs/common.sh
source "$(dirname "$0")/common.sh"
[ "$model" = toy ] || { echo "$0 is made for the shipped donor; for others: results/README.md" >&2; exit 2; }

for seed in 0 1 2; do
    for init in average calibrated; do
        train "calibrated-$init-$seed" "${short[@]}" --init=$init --rank=32 --seed=$seed --eval_every=5
    done
done
