"""What calibrated conversion of a large donor would take, from pieces measured at its width: reading with one layer and
with two, fitting one position of the block. Weights and tokens are random: they cost the same.

    python runs/calibrated_cost.py --shape=gemma-2b --save=results/calibrated_cost.jsonl
"""

import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench_training import SHAPES
from calibrate import calibrate, collect_stats
from lib.cli import UserError, parse_args, print0, script
from lib.results import append_line
from lib.system import peak_memory, run_info
from model import RecursiveTransformer


@dataclass
class CostConfig:
    shape: str = "gemma-2b"                # of bench.py's shapes
    loops: int = 2
    rank: int = 64
    read: int = 2048                       # tokens read to measure it
    tokens: int = 4096                     # tokens that would be read
    save: str | None = None                # file to add the line to


def gib(tensors, share: float = 1.0) -> float:
    return share * sum(t.numel() * t.element_size() for t in tensors) / 2**30


def main(argv=None) -> None:
    args = parse_args(CostConfig, argv)
    if args.shape not in SHAPES or args.read < 512:
        raise UserError(f"--shape={args.shape}, --read={args.read}: use {', '.join(SHAPES)}, and 512 tokens or more")
    shape, cpu = SHAPES[args.shape], torch.device("cpu")
    torch.manual_seed(0)
    windows, seconds = torch.randint(shape.vocab_size, (args.read // 512, 512)).split(4), []
    for n_layer in (1, args.loops):
        with torch.device("meta"):
            full = RecursiveTransformer(replace(shape, n_layer=n_layer)).bfloat16().eval()
        full.to_empty(device=cpu)
        for p in full.parameters():
            p.data.normal_(std=0.02)
        began = time.perf_counter()
        seen = collect_stats(full, windows)
        seconds.append(time.perf_counter() - began)
        print0(f"reading, {n_layer} of the layers: {seconds[-1]:.0f} s, peak {peak_memory(cpu):.1f} GiB")
    reading_peak, began = peak_memory(cpu), time.perf_counter()
    calibrate(full, seen, args.loops, args.rank, stop=0.0)   # all rounds: what it can cost at most
    fitting, peak = time.perf_counter() - began, peak_memory(cpu)
    print0(f"fitting one position: {fitting:.0f} s, peak {peak:.1f} GiB")

    layer = (seconds[1] - seconds[0]) / (args.loops - 1)
    reading = (seconds[0] + (shape.n_layer - 1) * layer) * args.tokens / args.read
    # What the other layers add to either peak: weights in bf16, collect_stats, and the states that enter each.
    more = (shape.n_layer - args.loops) / args.loops
    weights, kept = gib(full.layers.parameters(), more), gib([t for pair in seen.inputs.values() for t in pair], more)
    states = args.tokens * shape.n_embd * 4 * shape.n_layer / 2**30
    memory = max(reading_peak + weights + kept + states, peak + weights * (1 + 1 / args.loops) + kept)
    line = {"what": "calibrated_cost", "settings": asdict(args)} | run_info() | {
        "reading_1_s": seconds[0], "reading_all_s": seconds[1], "fitting_one_s": fitting,
        "reading_peak_gib": reading_peak, "peak_gib": peak,
        "reading_s": reading, "fitting_s": fitting * shape.n_layer / args.loops,
        "memory_gib": memory}
    print0(f"the whole: reading {args.tokens:,} tokens {reading / 60:.1f} min, fitting "
           f"{line['fitting_s'] / 60:.1f} min, at most {line['memory_gib']:.1f} GiB")
    if args.save:
        append_line(args.save, line)


if __name__ == "__main__":
    script(main)
