"""Time of kernels.py's linear layers and attention for rows at different loops, implementation by implementation.

    python -m benchmarks.kernels --shape=gemma-2b --loops=2 --ranks=0,64,512

In a model every layer's weights come from memory, and a CUDA graph launches the kernels. So consecutive calls read
different weights, together more than caches hold, and on a GPU one graph makes them all: no launch from Python counts.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch

import kernels
from benchmarks.common import (
    ShapeName,
    by_comma,
    check_at_least,
    copy_bandwidth,
    load_shape,
    run_and_publish,
    time_in_turn,
)
from lib.cli import parse_args, progress, script, table
from lib.system import pick_device
from model import Config

CACHE = 2**28       # bytes: five times the L2 cache of an H100
CALLS = 16          # at least so many in a CUDA graph, whose launch takes microseconds, too


@dataclass
class KernelsConfig:
    shape: ShapeName = "donor"             # whose shape: the donor's, or one of benchmarks/common.py
    donor: str = "assets/donor"            # full-size model, a folder or a Hugging Face id
    loops: str = "2,3"                     # numbers of loops, by comma
    ranks: str = "0,16,64"                 # LoRA ranks, by comma
    rows: str = "1,16"                     # rows in a pass, by comma
    seq_len: int = 256                     # tokens in the context of each row
    steps: int = 5                         # how often the calls of each implementation are timed, after two for warm-up
    device: str = "auto"                   # auto, cpu, cuda
    save: str | None = None                # also append the JSON line to this file


def linear_works(c: Config, rows: int, name: str, d_in: int, d_out: int, device, dtype) -> dict:
    """{operation: ({implementation: function}, bytes that it must move)} of one linear layer, row m at loop m % n_loop,
    with weights of its own."""
    rank, item_size = min(c.rank, d_in, d_out), torch.empty(0, dtype=dtype).element_size()
    with device:
        x, w = torch.randn(rows, d_in, dtype=dtype) / d_in**0.5, torch.randn(d_out, d_in, dtype=dtype)
        a, b = torch.randn(c.n_loop, rank, d_in, dtype=dtype), torch.randn(c.n_loop, d_out, rank, dtype=dtype)
        loop = torch.arange(rows) % c.n_loop
    activations = rows * (d_in + d_out)
    lora = min(rows, c.n_loop) * rank * (d_in + d_out)       # of the loops that have rows
    found, ab = {}, (a, b) if rank else (None, None)
    names = ["spec", "concat"] + ["triton"] * kernels.runs_triton(x)
    if rank:
        works = {n: partial(getattr(kernels, f"lora_rows_{n}"), x, a, b, loop) for n in names}
        found[f"lora_rows {name}"] = works, item_size * (activations + lora)
    works = {n: partial(getattr(kernels, f"linear_rows_{n}"), x, w, *ab, loop) for n in names}
    return found | {f"linear_rows {name}": (works, item_size * (activations + lora + w.numel()))}


def attention_works(c: Config, rows: int, context: int, device, dtype) -> dict:
    """As `linear_works`, for attention over `context` tokens in each row's own slot and loop of the cache."""
    with device:
        q = torch.randn(rows, c.n_head, c.head_dim, dtype=dtype)
        k, v = (torch.randn(rows, c.n_loop, context, c.n_kv_head, c.head_dim, dtype=dtype) for _ in range(2))
        slot = torch.arange(rows)
        args = q, k, v, slot, slot % c.n_loop, torch.full_like(slot, context)
    names = ["spec", "sdpa"] + ["triton"] * kernels.runs_triton(q)
    works = {n: partial(getattr(kernels, f"decode_attention_{n}"), *args) for n in names}
    return {"decode_attention": (works, q.element_size() * (2 * q.numel() + 2 * k.numel() // c.n_loop))}


def rotate(make_works: Callable[[], dict], most: int = 64) -> dict:
    """As make_works() -> {operation: ({implementation: function}, bytes)}, but with lists of functions, each with
    tensors of its own: as many as together exceed CACHE, but at most `most`."""
    first = make_works()
    found = {operation: ({name: [work] for name, work in works.items()}, moved)
             for operation, (works, moved) in first.items()}
    copies = {operation: min(most, -(-CACHE // moved)) for operation, (_, moved) in first.items()}
    for i in range(1, max(copies.values())):
        for operation, (works, _) in make_works().items():
            for name in works if i < copies[operation] else ():
                found[operation][0][name].append(works[name])
    return found


def call_all(works: list[Callable], device: torch.device) -> Callable[[], None]:
    """A function that calls all of `works`, in turn: on a GPU one CUDA graph of these calls."""
    def call():
        for work in works:
            work()
    if device.type != "cuda":
        return call
    call()                                                   # compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def time_calls(works: dict[str, list[Callable]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median microseconds of one call of each implementation, timed CALLS or more at a time."""
    many = {name: calls * -(-CALLS // len(calls)) for name, calls in works.items()}
    micro = time_in_turn({name: call_all(calls, device) for name, calls in many.items()}, rounds, device)
    return {name: micro[name] / len(calls) for name, calls in many.items()}


@torch.no_grad()
def bench_kernels(config: KernelsConfig) -> dict:
    """Microseconds of every implementation of the linear layers and the attention of one layer, for rows at different
    loops, beside the time in which the bytes that must move could be copied. On a CPU only torch's."""
    shape, device, results = load_shape(config.shape, config.donor), pick_device(config.device), []
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    batches = by_comma("rows", config.rows, positive=True)
    cases = [(replace(shape, n_loop=n, rank=r), rows) for n in by_comma("loops", config.loops)
             for r in by_comma("ranks", config.ranks) for rows in batches]
    bandwidth = copy_bandwidth(device)
    for c, rows in progress(cases, desc="cases", unit="case"):
        C, H = c.n_embd, c.n_head * c.head_dim
        found = {}
        for name, d_in, d_out in (("q", C, H), ("up", C, c.n_hidden), ("down", c.n_hidden, C)):
            found |= rotate(partial(linear_works, c, rows, name, d_in, d_out, device, dtype))
        if c.rank == cases[0][0].rank:                       # attention does not depend on the rank
            found |= rotate(partial(attention_works, c, rows, config.seq_len, device, dtype))
        for name, (works, moved) in found.items():
            if device.type == "cuda":
                del works["spec"]                            # it reads numbers on the host: no graph can record it
            micro = time_calls(works, config.steps, device)
            results.append({"work": name, "loops": c.n_loop, "rank": c.rank, "rows": rows, "bytes": moved,
                            "floor_us": 1e6 * moved / bandwidth, "us": micro})
    names = list(dict.fromkeys(name for row in results for name in row["us"]))
    lines = [["operation", "loops", "rank", "rows", *names, "as a copy", "best / copy"]]
    lines += [[r["work"], r["loops"], r["rank"], r["rows"],
               *(f"{r['us'][name]:,.1f}" if name in r["us"] else "" for name in names), f"{r['floor_us']:,.1f}",
               f"{min(r['us'].values()) / r['floor_us']:.1f}"] for r in results]
    print(f"microseconds, C = {shape.n_embd}, context {config.seq_len}; memory copies at {bandwidth / 1e9:.1f} GB/s\n"
          f"{table(lines)}")
    return {"shape": asdict(shape), "dtype": str(dtype).removeprefix("torch."), "copy_bytes_per_s": bandwidth,
            "rows": results}


def main(argv=None):
    config = parse_args(KernelsConfig, argv)
    check_at_least(config, 1, "seq_len", "steps")
    run_and_publish("kernels", config, bench_kernels)


if __name__ == "__main__":
    script(main)
