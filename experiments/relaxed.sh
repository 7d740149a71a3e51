#!/usr/bin/env bash
# Relaxed Recursive Transformers: LoRA ranks and initialisations (Eq. 3, Eq. 4; 15 B tokens, no distillation).
# The paper on Gemma 2B, 2 loops, accuracy of average + SVD: r 64 52.1, 128 52.5, 256 54.2, 512 55.5; of stepwise + SVD
# at 512 50.5, of a LoRA that starts at zero 49.0. How to launch: experiments/common.sh.
# shellcheck source=experiments/common.sh
source "$(dirname "$0")/common.sh"

for rank in "${ranks[@]}"; do
    train "relaxed-average-r$rank" "${short[@]}" --init=average --rank="$rank" --distill=none
done
largest=${ranks[${#ranks[@]}-1]}
train "relaxed-stepwise-r$largest" "${short[@]}" --init=stepwise --rank="$largest" --distill=none
train "relaxed-zero-r$largest" "${short[@]}" --init=average --rank="$largest" --lora_init=zero --distill=none
# Ours: norm weights per loop, 0.01 % more parameters.
train "relaxed-per-loop-r$largest" "${short[@]}" --init=average --rank="$largest" --vectors=per_loop --distill=none
