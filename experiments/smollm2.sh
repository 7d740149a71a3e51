#!/usr/bin/env bash
# The paper's conclusions on a pretrained model, SmolLM2-135M (30 layers) as 2 x 15 and 3 x 10: every init and rank, SVD
# and zero, with and without distillation, the two baselines, then exits; and lm-evaluation-harness scores of each
# model after each loop. One GPU; 56 runs of 21 M tokens, then 10 M for the exits. Not measured yet.
#
#     bash experiments/smollm2.sh BOOKS              BOOKS: text to train on, as --name of `python -m lib.data`
#     DRY=1 bash experiments/smollm2.sh BOOKS        only prints the commands
#     TASKS=FOLDER bash experiments/smollm2.sh ...   scores local task files instead of downloaded ones
#
# The same command resumes the training; scores are measured again.
set -euo pipefail
cd "$(dirname "$0")/.."
books=${1:?text to train on: files, a folder, or a data set by name}
donor=${DONOR:-HuggingFaceTB/SmolLM2-135M}
out=out_experiments/smollm2

run() { echo "+ $*"; [ -n "${DRY:-}" ] || "$@"; }

[ -d out_books/valid ] && [ ! -e out_books/resume.state ] ||
    run python -m lib.data --name="$books" --tokenizer="$donor" --out=out_books --valid_share=0.01
run python -m experiments.matrix --model=smollm2 --donor="$donor"

# Three ways to train exits after uptraining, for a tied and a relaxed model.
recipe=(--data=out_books --valid=out_books/valid --seq_len=1024 --batch_tokens=65_536 --micro_batch=16 --lr=5e-4
        --warmup=20 --tokens=10_485_760 --eval_every=40 --eval_tokens=65_536 --save_every=80 --compile)
exits() {
    local ckpt=out-seeds-$1-0-$3-smollm2
    run python train.py --donor="$donor" --ckpt="$out/$2-s0" --out="$ckpt" --seed=100 --resume=auto \
        "${recipe[@]}" "${@:4}"
    run python -m evaluation.perplexity --ckpt="$ckpt" --text=out_books/valid --tokens=131_072 --seq_len=1024 \
        --rules=max_prob --keys=exact --save=results/exits_seeds.jsonl
}
for start in "tied stepwise-fkl" "relaxed average-r64-fkl"; do
    read -r kind from <<< "$start"
    exits "$kind" "$from" none --exit_loss=last
    exits "$kind" "$from" weighted --exit_loss=weighted
    exits "$kind" "$from" self --exit_loss=aggressive --exit_coef=0.1 --exit_distill
done

# Scores of every checkpoint after each of its loops. (With DRY=1 there may be none: then the patterns are printed.)
for ckpt in "$out"/*-s0 out-seeds-*-smollm2; do
    case $ckpt in
    */full-s0 | */scratch-s0)  loops=1 ;;
    *-3x-*)                    loops=3 ;;
    *)                         loops=2 ;;
    esac
    for loop in $(seq "$loops"); do
        run python -m evaluation.harness --ckpt="$ckpt" --exit_loop="$loop" ${TASKS:+--files="$TASKS"} \
            --save=results/harness_smollm2.jsonl
    done
done
run python -m experiments.report --model=smollm2 --plots
