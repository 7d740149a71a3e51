#!/usr/bin/env bash
# Tied Recursive Transformers: which donor layers to start from (§2.2; 15 B tokens, no distillation).
# The paper on Gemma 2B, 2 loops, perplexity / accuracy: stepwise 12.85 / 51.7, average 15.15 / 46.7, lower 15.03 / 47.1,
# random 22.66 / 37.6. How to launch: experiments/common.sh.
# shellcheck source=experiments/common.sh
source "$(dirname "$0")/common.sh"

for init in stepwise average lower random; do
    train "tied-$init" "${short[@]}" --init=$init --distill=none
done
# The paper's other baseline: the donor itself, trained on the same tokens at full size.
train full "${short[@]}" --loops=1 --distill=none
