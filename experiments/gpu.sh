#!/usr/bin/env bash
# What to run first on one GPU (H100 or H200): the paper's arms on SmolLM2-135M (30 layers as 2 x 15), each at its best
# learning rate, three paired seeds of 21 M tokens, post-trained exits, and plain low rank at the same sizes. The same
# claims and statistics as on the shipped donor. Estimated at 8 hours (100,000 tokens/s), not measured yet.
#
#     bash experiments/gpu.sh BOOKS              BOOKS: text to train on, as --name of `python -m lib.data`
#     DRY=1 bash experiments/gpu.sh BOOKS        only prints the commands
#
# The same command resumes.
set -euo pipefail
cd "$(dirname "$0")/.."
books=${1:?text to train on: files, a folder, or a data set by name}
donor=${DONOR:-HuggingFaceTB/SmolLM2-135M}

run() { echo "+ $*"; [ -n "${DRY:-}" ] || "$@"; }

# Ten minutes: speed and memory, where a mistake shows at once.
run python -m benchmarks.training --shape=smollm2 --seq_len=1024 --micro_batch=16 --loops=2 --ranks=0,64,256 --compile \
    --save=results/train.jsonl
run python -m benchmarks.kernels --shape=gemma-2b --loops=2 --ranks=0,64,512 --rows=1,16,64,128 --seq_len=512 \
    --steps=20 --save=results/kernels.jsonl
run python bench.py --shape=gemma-2b --loops=2 --ranks=0,64 --slots=16,64 --mean_loops=1.24 --prompt_len=64 \
    --new_tokens=256 --rounds=3 --save=results/serving.jsonl

# The matrix.
[ -d out_books/valid ] && [ ! -e out_books/resume.state ] ||
    run python -m lib.data --name="$books" --tokenizer="$donor" --out=out_books --valid_share=0.01
run python -m experiments.matrix --study=smollm2-gpu --donor="$donor"
run python -m experiments.report --study=smollm2-gpu
