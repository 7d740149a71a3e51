#!/usr/bin/env bash
# Early exits, trained after uptraining (§2.4): 15 B more tokens, all parameters, starting from experiments/long.sh.
# The paper on Gemma 2B tied, accuracy at the last / first loop: weighted 50.5 / 49.8; aggressive 0.3 52.2 / 48.5;
# 0.1 52.5 / 47.1; 0.1 with self-distillation 52.6 / 48.0; 0.01 52.4 / 42.1. How to launch: experiments/common.sh.
# shellcheck source=experiments/common.sh
source "$(dirname "$0")/common.sh"

post() { train "$1" "${short[@]}" --ckpt="out-long-tied-$model" --teacher="out-full-long-$model" "${@:2}"; }
post exits-weighted --exit_loss=weighted
for coef in 0.3 0.1 0.01; do
    post "exits-aggressive-$coef" --exit_loss=aggressive --exit_coef=$coef
done
post exits-self --exit_loss=aggressive --exit_coef=0.1 --exit_distill
# Relaxation hurts early exits: the same recipe on a relaxed model.
train exits-self-r64 "${short[@]}" --ckpt="out-long-r64-$model" --teacher="out-full-long-$model" \
    --exit_loss=aggressive --exit_coef=0.1 --exit_distill
# Ablation: exits trained from the start.
train exits-cotrained "${short[@]}" --init=stepwise --exit_loss=aggressive --exit_coef=0.1 --exit_distill
