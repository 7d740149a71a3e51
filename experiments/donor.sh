#!/usr/bin/env bash
# How assets/donor was made: a Gemma-architecture model of 12 layers and 5 M parameters, trained from random weights
# by this project's own train.py on 411 public-domain books of Project Gutenberg (168 M characters).
#
#     bash experiments/donor.sh FOLDER    FOLDER has the books: train-*.jsonl.gz and valid.jsonl.gz, `title` and `text`
#
# An hour on two idle cores, minutes on a GPU. The log is experiments/donor.jsonl. (The shipped donor was started with
# --tokens=15_000_000 and shortened later with --resume --tokens=..., so its cosine falls a little later.)
set -euo pipefail
books=${1:?folder of the books}
work=${2:-out-donor}
mkdir -p "$work"

# Join hard-wrapped lines, drop transcribers' notes.
python -m experiments.books "$books" "$work"

# A byte-level BPE with 4,096 entries, as a tiktoken ranks file; then token shards of the books.
python -m lib.data --name="$work/train.jsonl" --train_tokenizer=4096 --out="$work/tokenizer"
cp assets/donor/config.json "$work/tokenizer/"           # --init=scratch only reads the shape
python -m lib.data --name="$work/train.jsonl" --tokenizer="$work/tokenizer" --out="$work/shards"
python -m lib.data --name="$work/valid.jsonl" --tokenizer="$work/tokenizer" --out="$work/valid_shards"

python train.py --init=scratch --donor="$work/tokenizer" --out="$work/model" \
    --data="$work/shards" --valid="$work/valid_shards" \
    --tokens=9_000_000 --batch_tokens=4096 --micro_batch=16 --lr=2.5e-3 --warmup=100 --beta2=0.98 \
    --eval_every=200 --save_every=200 --log_every=20 --compile

# Hugging Face's layout, in bfloat16.
python convert.py --unroll --donor="$work/model" --out="$work/donor" --dtype=bfloat16
cp "$work/donor/"{config.json,model.safetensors} "$work/tokenizer/"tokenizer* assets/donor/
cp "$work/model/log.jsonl" experiments/donor.jsonl
