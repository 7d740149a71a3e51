#!/usr/bin/env bash
# The mean loops that each exit rule needs for an agreement of 0.95, 0.98 and 0.99, three seeds: uptraining, tied and
# relaxed, then post-training on the text that follows, aggressive 0.1 with self-distillation (§2.4). Three quarters of
# an hour on two cores. (The losses at the exits are experiments/matrix.py's.)
# shellcheck source=experiments/common.sh
source "$(dirname "$0")/common.sh"
[ "$model" = toy ] || { echo "$0 is for the shipped donor only; use experiments/exits.sh for $model" >&2; exit 2; }

for seed in 0 1 2; do
    for kind in tied relaxed; do
        start=(--init=stepwise)
        [ $kind = tied ] || start=(--init=average --rank=32)
        name=seeds-$kind-$seed
        train "$name-up" "${short[@]}" "${start[@]}" --seed=$seed
        train "$name-self" --tokens=150_000 --ckpt="out-$name-up-$model" --seed=$seed --skip_tokens=300_000 \
            --exit_loss=aggressive --exit_coef=0.1 --exit_distill
        for agreement in 0.95 0.98 0.99; do
            run python -m evaluation.thresholds --ckpt="out-$name-self-$model" --data="$data" --valid="$valid" \
                --agreement=$agreement --save=results/exits_calibrated.jsonl
        done
    done
done
