#!/usr/bin/env bash
# Which divergence to distil with (App. F; 15 B tokens, tied, stepwise). The paper on Gemma 2B, accuracy: none 51.7,
# forward KL 53.4, reverse KL 53.3, Jensen-Shannon 52.9, total variation 53.0. How to launch: experiments/common.sh.
# shellcheck source=experiments/common.sh
source "$(dirname "$0")/common.sh"

# The paper's teacher is the donor trained on the same data. experiments/tied.sh trains the same run; whichever comes
# second finds it finished.
train full "${short[@]}" --loops=1 --distill=none
for kind in fkl rkl jsd tvd; do
    train "distill-$kind" "${short[@]}" --init=stepwise --distill=$kind --teacher="out-full-$model"
done
