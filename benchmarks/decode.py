"""Speed of greedy decoding without and with the engine, beside transformers and the memory's bandwidth.

    python -m benchmarks.decode --rows=1,16 --rounds=15
    python -m benchmarks.decode --ckpt=out --new_tokens=24
"""

import importlib.util
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import (
    ShapeName,
    by_comma,
    check_at_least,
    check_ckpt_or_shape,
    copy_bandwidth,
    load_shape,
    run_and_publish,
    time_in_turn,
)
from convert import to_hf, unroll
from engine import Engine
from exits import decode
from hf import load_any, load_full
from lib.cli import UserError, parse_args, progress, script, table
from lib.donors import find_donor
from lib.system import pick_device
from model import RecursiveTransformer


@dataclass
class DecodeConfig:
    ckpt: str | None = None                # checkpoint: ours or a Hugging Face one; not set = the shape's model
    shape: ShapeName = "donor"             # the donor itself, or random weights of a shape of benchmarks/common.py
    donor: str = "assets/donor"            # full-size model, a folder or a Hugging Face id
    layers: int = 0                        # use only so many of its layers, with random weights; 0 = all
    vocab: int = 0                         # vocabulary size, with random weights; 0 = the shape's
    rows: str = "1,16"                     # texts that are decoded together, by comma
    prompt_len: int = 32                   # tokens of a prompt
    new_tokens: int = 64                   # tokens that are generated
    compile: bool = False                  # let transformers compile its static cache's forward
    rounds: int = 1                        # how often each implementation is timed, after two for warm-up
    device: str = "auto"                   # auto, cpu, cuda
    save: str | None = None                # also append the JSON line to this file


def bytes_per_step(model: RecursiveTransformer, rows: int, context: int) -> int:
    """What one decoding step of all rows must read: every loop's weights, the head, and keys and values."""
    c, item_size = model.config, model.embed.weight.element_size()
    cache = 2 * c.n_layer * c.n_kv_head * c.head_dim * context * rows
    return (model.num_params()["run_block"] + model.head_weight.numel() + cache) * item_size


def decode_batch(model: RecursiveTransformer, idx: Tensor, n: int) -> list[list[int]]:
    """The greedy texts of n tokens after the prompts idx (B, T), by `decode` (exits.py)."""
    return torch.stack([token for token, _ in decode(model, idx, n)], 1).tolist()


def in_transformers(model: RecursiveTransformer, attention: str) -> Callable:
    """generate(idx, n) of the same weights in transformers: greedy, with a static cache, without an end token."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as tmp:
        to_hf(unroll(model), Path(tmp) / "hf")
        theirs = AutoModelForCausalLM.from_pretrained(Path(tmp) / "hf", dtype=model.embed.weight.dtype,
                                                      attn_implementation=attention)
    theirs = theirs.to(model.embed.weight.device).eval()
    theirs.generation_config.eos_token_id = None

    def generate(idx: Tensor, n: int, compiled: bool) -> list[list[int]]:
        out = theirs.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=n, do_sample=False,
                              cache_implementation="static", disable_compile=not compiled)
        return out[:, idx.size(1):].tolist()
    return generate


def load_model(config: DecodeConfig, device: torch.device) -> RecursiveTransformer:
    """--ckpt as it is, the donor with its weights, or random weights of a shape; fp32, bf16 on a GPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if config.ckpt:
        return load_any(find_donor(config.ckpt), dtype).to(device)
    shape = load_shape(config.shape, config.donor, config.layers, config.vocab)
    if config.shape == "donor" and not (config.layers or config.vocab):
        return load_full(config.donor, dtype).to(device).eval()
    torch.manual_seed(0)
    with device:
        return RecursiveTransformer(shape).to(dtype).eval()


def time_decoding(model: RecursiveTransformer, theirs: dict[str, Callable], batch: int, config: DecodeConfig,
                  bandwidth: float) -> list[dict]:
    """A row for each implementation on `batch` random prompts: tokens/s, the tokens, and how many equal `decode`'s."""
    n, device, texts = config.new_tokens, model.embed.weight.device, {}
    idx = torch.randint(model.config.vocab_size, (batch, config.prompt_len), generator=torch.Generator().manual_seed(0))
    idx = idx.to(device)
    engine = Engine(model, batch, config.prompt_len + n)

    def plain():
        texts["decode"] = decode_batch(model, idx, n)

    def by_engine():
        texts["engine"] = [request.tokens for request in engine.generate(idx.tolist(), n)]

    def by_transformers(name):
        texts[name] = theirs[name](idx, n, config.compile)
    works = {"decode": plain, "engine": by_engine} | {name: partial(by_transformers, name) for name in theirs}
    floor = batch * bandwidth / bytes_per_step(model, batch, config.prompt_len + n // 2)
    rows = []
    for name, micro in time_in_turn(works, config.rounds, device).items():
        equal = sum(a == b for one, two in zip(texts[name], texts["decode"], strict=True)
                    for a, b in zip(one, two, strict=True))
        speed = 1e6 * batch * n / micro
        rows.append({"code": name, "rows": batch, "tokens_per_s": speed, "tokens": texts[name],
                     "equal": equal / (batch * n), "floor_tokens_per_s": floor, "of_floor": speed / floor})
    best = max((row["tokens_per_s"] for row in rows if row["code"] in theirs), default=None)
    return [row | {"of_transformers": best and row["tokens_per_s"] / best} for row in rows]


@torch.no_grad()
def bench_decode(config: DecodeConfig) -> dict:
    """Tokens/s of greedy decoding, prompts included: `decode` (exits.py) and the engine, beside transformers with the
    same weights, and as a share of what the memory's bandwidth allows."""
    device, n, batches = pick_device(config.device), config.new_tokens, by_comma("rows", config.rows, positive=True)
    model, rows, theirs = load_model(config, device), [], {}
    c, length = model.config, config.prompt_len + n
    if length > c.n_ctx:
        raise UserError(f"--prompt_len={config.prompt_len} and --new_tokens={n} are {length} tokens, and the model's "
                        f"context is {c.n_ctx}: give less")
    if c.kv == "first_loop":
        print("transformers has no class that reads the first loop's keys and values in all", file=sys.stderr)
    elif importlib.util.find_spec("transformers"):
        theirs = {f"transformers, {attention}": in_transformers(model, attention) for attention in ("eager", "sdpa")}
    else:
        print("transformers is not installed: nothing to compare with", file=sys.stderr)
    bandwidth = copy_bandwidth(device)
    for batch in progress(batches, desc="rows"):
        rows += time_decoding(model, theirs, batch, config, bandwidth)
    lines = [["code", "rows", "tok/s", "of transformers", "of the copy bandwidth", "tokens equal decode's"]]
    lines += [[r["code"], r["rows"], f"{r['tokens_per_s']:,.0f}",
               f"{r['of_transformers']:.2f}" if r["of_transformers"] else "", f"{r['of_floor']:.0%}",
               f"{r['equal']:.1%}"] for r in rows]
    print(f"{c.n_loop} x {c.n_unique} layers, C = {c.n_embd}, vocabulary size {c.vocab_size:,}; prompts of "
          f"{config.prompt_len}, {n} new tokens; memory copies at {bandwidth / 1e9:.1f} GB/s\n{table(lines)}")
    return {"model": asdict(c), "dtype": str(model.embed.weight.dtype).removeprefix("torch."),
            "copy_bytes_per_s": bandwidth, "rows": rows}


def main(argv=None):
    config = parse_args(DecodeConfig, argv)
    check_at_least(config, 1, "prompt_len", "new_tokens", "rounds")
    check_ckpt_or_shape(config)
    run_and_publish("decode", config, bench_decode)


if __name__ == "__main__":
    script(main)
