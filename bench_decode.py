"""The measurements of decoding behind `python bench.py --what=decision`."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace

import torch

from bench_training import by_comma, shape_of
from model import KVCache, RecursiveTransformer
from rules import SCORED, Gate, Rule
from runtime import UserError, pick_device, progress, table


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
