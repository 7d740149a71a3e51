"""The measurements of decoding behind `python bench.py --what=decision`, `--what=decode` and `--what=kernels`."""

import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import kernels
from bench_training import by_comma, shape_of
from convert import to_hf, unroll
from engine import Engine
from exits import SCORED, Gate, Rule, decode
from hf import load_any, load_full
from lib.cli import UserError, progress, table
from lib.donors import find_donor
from lib.system import pick_device
from model import KVCache, RecursiveTransformer


def time_in_turn(works: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, float]:
    """Median microseconds of each work; all are gone through once a round, so that noise disturbs them alike."""
    seconds = {name: [] for name in works}
    for _ in range(rounds + 2):
        for name, work in works.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            began = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - began)
    return {name: 1e6 * statistics.median(s[2:]) for name, s in seconds.items()}                # two warm up


@torch.no_grad()
def bench_decision(config) -> dict:
    """Microseconds of one exit decision by each rule, with all that it needs (logits, where it reads them), beside one
    pass of the block and the head: random weights of a shape as two loops, one token per row, fp32 (bf16 on GPUs)."""
    shape, device, rows = replace(shape_of(config), n_loop=2), pick_device(config.device), []
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    batches, sizes = by_comma("rows", config.rows), by_comma("vocab_sizes", config.vocab_sizes)
    for name, numbers in (("rows", batches), ("vocab_sizes", sizes)):
        if min(numbers) < 1:
            raise UserError(f"--{name}={getattr(config, name)} must be positive")
    for size in progress(sizes, desc="vocabularies"):
        with device:
            model = RecursiveTransformer(replace(shape, vocab_size=size)).to(dtype)
            gate = Gate(1, shape.n_embd)
        rules = [Rule(name, 0.5, gate=gate) for name in SCORED]
        for batch in batches:
            x = torch.randn(batch, shape.n_embd, device=device, dtype=dtype)
            cache = KVCache(model.config, batch, config.seq_len, device, dtype)

            def block(model=model, x=x, cache=cache):
                cache.lengths = [config.seq_len - 1] * 2                     # the last token of a full context
                model.block(x[:, None], 0, cache)
            works = {"block": block, "head": lambda model=model, x=x: model.logits(x)}
            works |= {rule.name: lambda model=model, x=x, rule=rule:
                      rule(x, 0, model.logits(x) if rule.reads_logits else None) for rule in rules}
            rows.append({"vocab_size": size, "batch": batch} | time_in_turn(works, config.steps, device))
    lines = [["words", "rows", "block", "head", *SCORED, *(f"{name} / block" for name in SCORED)]]
    lines += [[f"{row['vocab_size']:,}", row["batch"], *(f"{row[name]:,.0f}" for name in ("block", "head", *SCORED)),
               *(f"{row[name] / row['block']:.1%}" for name in SCORED)] for row in rows]
    print(f"microseconds; {shape.n_unique} layers of C = {shape.n_embd}, context {config.seq_len}\n{table(lines)}")
    return {"shape": asdict(shape), "dtype": str(dtype).removeprefix("torch."), "rows": rows}


# ---------------------------------------------------------------------------------------------------------------------
# Greedy decoding, beside transformers

def copy_bandwidth(device: torch.device, mib: int = 256) -> float:
    """Bytes/s, read and written, of copying a tensor that no cache holds."""
    a = torch.empty(mib * 2**20 * (8 if device.type == "cuda" else 1), dtype=torch.uint8, device=device).fill_(1)
    b = torch.empty_like(a)
    return 2e6 * len(a) / time_in_turn({"copy": lambda: b.copy_(a)}, 5, device)["copy"]


def bytes_per_step(model: RecursiveTransformer, rows: int, context: int) -> int:
    """What a step that makes one token of each row must read: every loop's weights, the head, and keys and values."""
    c, item = model.config, model.embed.weight.element_size()
    cache = 2 * c.n_layer * c.n_kv_head * c.head_dim * context * rows
    return (model.num_params()["run_block"] + model.head_weight.numel() + cache) * item


def in_transformers(model: RecursiveTransformer, attention: str) -> Callable:
    """generate(idx, n) of the same weights in transformers: greedy, with a static cache, not ended by any token."""
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


def model_to_decode(config, device: torch.device) -> RecursiveTransformer:
    """--ckpt as it is, the shipped donor with its weights, or random ones of a shape; fp32, bf16 on a GPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if config.ckpt:
        return load_any(find_donor(config.ckpt), dtype).to(device)
    shape = shape_of(config)
    if config.shape == "donor" and not (config.layers or config.vocab):
        return load_full(config.donor, dtype).to(device).eval()
    torch.manual_seed(0)
    with device:
        return RecursiveTransformer(shape).to(dtype).eval()


@torch.no_grad()
def bench_decode(config) -> dict:
    """Tokens/s of greedy decoding, the prompt included: `decode` (exits.py) and the engine, beside transformers with
    the same weights; and how much of what the memory allows that is."""
    device, n, batches = pick_device(config.device), config.new_tokens, by_comma("rows", config.rows)
    if min(batches) < 1:
        raise UserError(f"--rows={config.rows} must be positive")
    model, rows, theirs = model_to_decode(config, device), [], {}
    c, length = model.config, config.prompt_len + n
    if length > c.n_ctx:
        raise UserError(f"--prompt_len={config.prompt_len} and --new_tokens={n} are {length} tokens, and the model's "
                        f"context is {c.n_ctx}: give less")
    if importlib.util.find_spec("transformers"):
        theirs = {f"transformers, {how}": in_transformers(model, how) for how in ("eager", "sdpa")}
    else:
        print("transformers is not installed: nothing to compare with", file=sys.stderr)
    bandwidth = copy_bandwidth(device)
    for batch in progress(batches, desc="rows"):
        idx = torch.randint(c.vocab_size, (batch, config.prompt_len), generator=torch.Generator().manual_seed(0))
        idx, said = idx.to(device), {}
        engine = Engine(model, batch, length)

        def ours(idx=idx):
            return torch.stack([token for token, _ in decode(model, idx, n)], 1).tolist()

        def by_engine(engine=engine, idx=idx):
            return [request.tokens for request in engine.generate(idx.tolist(), n)]
        works = {"decode": ours, "engine": by_engine} | {
            name: lambda generate=generate, idx=idx: generate(idx, n, config.compile)
            for name, generate in theirs.items()}
        works = {name: lambda name=name, work=work, said=said: said.update({name: work()})
                 for name, work in works.items()}
        floor = batch * bandwidth / bytes_per_step(model, batch, config.prompt_len + n // 2)
        for name, micro in time_in_turn(works, config.rounds, device).items():
            equal = sum(a == b for one, two in zip(said[name], said["decode"], strict=True)
                        for a, b in zip(one, two, strict=True))
            rows.append({"code": name, "rows": batch, "tokens_per_s": 1e6 * batch * n / micro, "tokens": said[name],
                         "equal": equal / (batch * n), "floor_tokens_per_s": floor})
    for row in rows:
        best = max((r["tokens_per_s"] for r in rows if r["rows"] == row["rows"] and r["code"] in theirs), default=None)
        row |= {"of_floor": row["tokens_per_s"] / row["floor_tokens_per_s"],
                "of_transformers": best and row["tokens_per_s"] / best}
    lines = [["code", "rows", "tok/s", "of transformers", "of the floor", "tokens as decode's"]]
    lines += [[r["code"], r["rows"], f"{r['tokens_per_s']:,.0f}",
               f"{r['of_transformers']:.2f}" if r["of_transformers"] else "", f"{r['of_floor']:.0%}",
               f"{r['equal']:.1%}"] for r in rows]
    print(f"{c.n_loop} x {c.n_unique} layers, C = {c.n_embd}, {c.vocab_size:,} words; prompts of {config.prompt_len}, "
          f"{n} new tokens; memory copies at {bandwidth / 1e9:.1f} GB/s\n{table(lines)}")
    return {"model": asdict(c), "dtype": str(model.embed.weight.dtype).removeprefix("torch."),
            "copy_bytes_per_s": bandwidth, "rows": rows}


# ---------------------------------------------------------------------------------------------------------------------
# Rows at different loops, rung by rung

def linear_works(c, rows: int, name: str, d_in: int, d_out: int, device, dtype) -> dict:
    """{operation: ({rung: work}, bytes that any rung must move)} of one linear map for rows at loops in turn."""
    rank, item = min(c.rank, d_in, d_out), torch.empty(0, dtype=dtype).element_size()
    with device:
        x, w = torch.randn(rows, d_in, dtype=dtype) / d_in**0.5, torch.randn(d_out, d_in, dtype=dtype)
        a, b = torch.randn(c.n_loop, rank, d_in, dtype=dtype), torch.randn(c.n_loop, d_out, rank, dtype=dtype)
        loop = torch.arange(rows) % c.n_loop
    through = rows * (d_in + d_out)                                          # read and written
    lora = min(rows, c.n_loop) * rank * (d_in + d_out)                       # of the loops that have rows
    found, ab = {}, (a, b) if rank else (None, None)
    rungs = ["spec", "concat"] + ["triton"] * kernels.runs_triton(x)
    if rank:
        works = {r: partial(getattr(kernels, f"lora_rows_{r}"), x, a, b, loop) for r in rungs}
        found[f"lora_rows {name}"] = works, item * (through + lora)
    works = {r: partial(getattr(kernels, f"linear_rows_{r}"), x, w, *ab, loop) for r in rungs}
    return found | {f"linear_rows {name}": (works, item * (through + lora + w.numel()))}


def attention_works(c, rows: int, context: int, device, dtype) -> dict:
    """As `linear_works`, of attention over a context that long."""
    with device:
        q = torch.randn(rows, c.n_head, c.head_dim, dtype=dtype)
        k, v = (torch.randn(rows, c.n_loop, context, c.n_kv_head, c.head_dim, dtype=dtype) for _ in range(2))
        slot = torch.arange(rows)
        args = q, k, v, slot, slot % c.n_loop, torch.full_like(slot, context)
    rungs = ["spec", "sdpa"] + ["triton"] * kernels.runs_triton(q)
    works = {r: partial(getattr(kernels, f"decode_attention_{r}"), *args) for r in rungs}
    return {"decode_attention": (works, q.element_size() * (2 * q.numel() + 2 * k.numel() // c.n_loop))}


@torch.no_grad()
def bench_kernels(config) -> dict:
    """Microseconds of every rung of the maps and the attention of one layer, for rows at different loops, beside the
    time in which the bytes that must move could be copied. On a CPU, torch's rungs."""
    shape, device, numbers = shape_of(config), pick_device(config.device), []
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    batches = by_comma("rows", config.rows)
    if min(batches) < 1:
        raise UserError(f"--rows={config.rows} must be positive")
    cases = [(replace(shape, n_loop=n, rank=r), rows) for n in by_comma("loops", config.loops)
             for r in by_comma("ranks", config.ranks) for rows in batches]
    bandwidth = copy_bandwidth(device)
    for c, rows in progress(cases, desc="cases", unit="case"):
        C, H = c.n_embd, c.n_head * c.head_dim
        found = {}
        for name, d_in, d_out in (("q", C, H), ("up", C, c.n_hidden), ("down", c.n_hidden, C)):
            found |= linear_works(c, rows, name, d_in, d_out, device, dtype)
        if c.rank == cases[0][0].rank:                                       # it knows no rank
            found |= attention_works(c, rows, config.seq_len, device, dtype)
        for name, (works, moved) in found.items():
            micro = time_in_turn(works, config.steps, device)
            numbers.append({"work": name, "loops": c.n_loop, "rank": c.rank, "rows": rows, "bytes": moved,
                            "floor_us": 1e6 * moved / bandwidth, "us": micro})
    rungs = list(dict.fromkeys(rung for row in numbers for rung in row["us"]))
    lines = [["work", "loops", "rank", "rows", *rungs, "floor", "best / floor"]]
    lines += [[r["work"], r["loops"], r["rank"], r["rows"],
               *(f"{r['us'][rung]:,.1f}" if rung in r["us"] else "" for rung in rungs), f"{r['floor_us']:,.1f}",
               f"{min(r['us'].values()) / r['floor_us']:.1f}"] for r in numbers]
    print(f"microseconds, C = {shape.n_embd}, context {config.seq_len}; memory copies at {bandwidth / 1e9:.1f} GB/s\n"
          f"{table(lines)}")
    return {"shape": asdict(shape), "dtype": str(dtype).removeprefix("torch."), "copy_bytes_per_s": bandwidth,
            "rows": numbers}
