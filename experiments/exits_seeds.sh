#!/usr/bin/env bash
# Three ways to train exits, three seeds each: uptraining, tied and relaxed, then post-training on new tokens without
# exit losses, weighted, and aggressive 0.1 with self-distillation (§2.4). Measures the loss at each exit, and the mean
# loops that each rule needs for an agreement of 0.95, 0.98 and 0.99. An hour and a half on two cores.
# shellcheck source=experiments/common.sh
source "$(dirname "$0")/common.sh"
[ "$model" = toy ] || { echo "$0 is for the shipped donor only; use experiments/exits.sh for $model" >&2; exit 2; }

for seed in 0 1 2; do
    for kind in tied relaxed; do
        start=(--init=stepwise)
        [ $kind = tied ] || start=(--init=average --rank=32)
        name=seeds-$kind-$seed
        train "$name-up" "${short[@]}" "${start[@]}" --seed=$seed
        post() { train "$name-$1" --tokens=150_000 --ckpt="out-$name-up-$model" --seed=$((seed + 100)) "${@:2}"; }
        post none
        post weighted --exit_loss=weighted
        post self --exit_loss=aggressive --exit_coef=0.1 --exit_distill
        for how in up none weighted self; do
            run python -m evaluation.perplexity --ckpt="out-$name-$how-$model" --text="$valid" --tokens=65_536 \
                --rules=max_prob --keys=exact --save=results/exits_seeds.jsonl
        done
        for agreement in 0.95 0.98 0.99; do
            run python -m evaluation.thresholds --ckpt="out-$name-self-$model" --data="$data" --valid="$valid" \
                --agreement=$agreement --save=results/exits_calibrated.jsonl
        done
    done
done
