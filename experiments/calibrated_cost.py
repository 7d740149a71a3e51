"""Estimates the cost of calibrated conversion for a large donor from two measurements at its width: reading
text with one layer and with a few, and fitting one stored layer. Weights and tokens are random.

    python -m experiments.calibrated_cost --shape=gemma-2b --save=results/calibrated_cost.jsonl
"""

import time
from dataclasses import asdict, dataclass, replace

import torch

from benchmarks.common import SHAPES
from calibrate import calibrate, collect_stats
from lib.cli import UserError, parse_args, print0, script
from lib.results import append_line
from lib.system import peak_memory, run_info
from model import Config, RecursiveTransformer

CPU = torch.device("cpu")


@dataclass
class CostConfig:
    shape: str = "gemma-2b"                # one of the shapes of the benchmarks
    loops: int = 2
    rank: int = 64
    read: int = 2048                       # tokens read in the measurement
    tokens: int = 4096                     # tokens to estimate the cost for
    save: str | None = None                # file to append the line to


def random_model(shape: Config, n_layer: int) -> RecursiveTransformer:
    """The first layers of such a donor in bfloat16."""
    with torch.device("meta"):
        model = RecursiveTransformer(replace(shape, n_layer=n_layer)).bfloat16().eval()
    model.to_empty(device=CPU)
    for p in model.parameters():
        p.data.normal_(std=0.02)
    return model


def gib(tensors, share: float = 1.0) -> float:
    return share * sum(t.numel() * t.element_size() for t in tensors) / 2**30


def main(argv=None) -> None:
    args = parse_args(CostConfig, argv)
    if args.shape not in SHAPES or args.read < 512:
        raise UserError(f"--shape={args.shape}, --read={args.read}: use {', '.join(SHAPES)}, and 512 tokens or more")
    shape = SHAPES[args.shape]
    torch.manual_seed(0)
    windows, seconds = torch.randint(shape.vocab_size, (args.read // 512, 512)).split(4), []
    for n_layer in (1, args.loops):
        full = None                                          # free the smaller model: its memory would count
        full = random_model(shape, n_layer)
        start = time.perf_counter()
        stats = collect_stats(full, windows)
        seconds.append(time.perf_counter() - start)
        print0(f"reading, {n_layer} of the layers: {seconds[-1]:.0f} s, peak {peak_memory(CPU):.1f} GiB")
    reading_peak, start = peak_memory(CPU), time.perf_counter()
    calibrate(full, stats, args.loops, args.rank, stop=0.0)  # all rounds: the upper bound
    fitting_one, peak = time.perf_counter() - start, peak_memory(CPU)
    print0(f"fitting one stored layer: {fitting_one:.0f} s, peak {peak:.1f} GiB")

    per_layer = (seconds[1] - seconds[0]) / (args.loops - 1)
    reading = (seconds[0] + (shape.n_layer - 1) * per_layer) * args.tokens / args.read
    fitting = fitting_one * shape.n_layer / args.loops
    # The layers that were not measured add their weights, their statistics and their inputs to the peaks.
    others = (shape.n_layer - args.loops) / args.loops
    weights = gib(full.layers.parameters(), others)
    statistics = gib([t for pair in stats.inputs.values() for t in pair], others)
    inputs = args.tokens * shape.n_embd * 4 * shape.n_layer / 2**30
    memory = max(reading_peak + weights + statistics + inputs, peak + weights * (1 + 1 / args.loops) + statistics)
    line = {"what": "calibrated_cost", "settings": asdict(args)} | run_info() | {
        "reading_1_s": seconds[0], "reading_all_s": seconds[1], "fitting_one_s": fitting_one,
        "reading_peak_gib": reading_peak, "peak_gib": peak,
        "reading_s": reading, "fitting_s": fitting, "memory_gib": memory}
    print0(f"in total: reading {args.tokens:,} tokens {reading / 60:.1f} min, fitting {fitting / 60:.1f} min, at most "
           f"{memory:.1f} GiB")
    if args.save:
        append_line(args.save, line)


if __name__ == "__main__":
    script(main)
