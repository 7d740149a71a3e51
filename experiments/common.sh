#!/usr/bin/env bash
# Shared by the paper's experiments (§3.1, App. E): the other files source this. Their first argument is
#
#     toy         the shipped donor and books, on a laptop: minutes a run (the default)
#     gemma       Gemma 2B, SlimPajama, 8 GPUs of 80 GB
#     tinyllama   TinyLlama 1.1B, likewise
#     pythia      Pythia 1B, likewise
#
# and all further arguments go to train.py, where the last of two equal flags counts:
#
#     bash experiments/tied.sh gemma --seed=1
#     DRY=1 bash experiments/tied.sh gemma     only prints the commands
#     GPUS=4 bash experiments/tied.sh gemma    another number of GPUs; the batch stays 2 M tokens
#     NODES=4 HEAD=node0:29500 bash experiments/tied.sh gemma
#                                              on each of four machines that share a file system
#
# Every run has --resume=auto: the same command, by hand or by torchrun after a crash, resumes it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
model=${1:-toy}
shift || true
more=("$@")

run() { echo "+ $*"; [ -n "${DRY:-}" ] || "$@"; }

case $model in
toy)        donor=assets/donor; data=assets/books/train; valid=assets/books/valid.txt ;;
gemma)      donor=google/gemma-2b;              micro=4 ;;
tinyllama)  donor=TinyLlama/TinyLlama_v1.1;     micro=8 ;;
pythia)     donor=EleutherAI/pythia-1b;         micro=8 ;;
*)          echo "unknown model $model: use toy, gemma, tinyllama or pythia" >&2; exit 2 ;;
esac

if [ "$model" = toy ]; then
    launch=(torchrun --standalone)
    settings=(--data="$data" --valid="$valid" --eval_every=25)
    short=(--tokens=300_000)                            # in place of the paper's 15 B
    long=(--tokens=1_200_000)                           # and of its 60 B
    ranks=(16 64)
else
    launch=(torchrun --nproc_per_node="${GPUS:-8}" --max-restarts=3)
    if [ "${NODES:-1}" -gt 1 ]; then
        export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # else a restart reads addresses of dead processes
        launch+=(--nnodes="$NODES" --rdzv_backend=c10d --rdzv_endpoint="${HEAD:?host:port of the first machine}")
    else
        launch+=(--standalone)
    fi
    # Once per donor, beforehand (takes hours; the same command resumes it):
    #     python -m lib.data --name=slimpajama --tokenizer=DONOR --tokens=60e9 --valid_share=0.0001 \
    #         --out=out-slimpajama-MODEL
    data=out-slimpajama-$model valid=out-slimpajama-$model/valid
    settings=(--data="$data" --valid="$valid" --seq_len=2048 --batch_tokens=2_097_152 --micro_batch="$micro"
              --lr=2e-4 --compile --zero --skip_nonfinite
              --eval_every=200 --eval_tokens=1_048_576 --save_every=200)
    short=(--tokens=15_000_000_000 --warmup=200)
    long=(--tokens=60_000_000_000 --warmup=800)
    ranks=(64 128 256 512)
fi

# train OUT FLAGS...: one run, into the folder out-<experiment>-<model>
train() {
    local out=$1
    shift
    run "${launch[@]}" train.py --donor="$donor" --out="out-$out-$model" --resume=auto "${settings[@]}" "$@" \
        ${more[@]+"${more[@]}"}
}
