"""What LoRA adds to a training step through one layer: merged into W' first, or as a separate path beside it.

    python -m benchmarks.lora --shape=tinyllama --micro_batch=16 --ranks=64,512
"""

import itertools
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import (
    ShapeName,
    by_comma,
    check_at_least,
    load_shape,
    measure_in_turn,
    run_and_publish,
    speed_cells,
    time_steps,
    with_layers,
)
from lib.cli import parse_args, script, table
from lib.system import pick_device
from model import Config, Layer, RecursiveTransformer, RelaxedLinear, rope_angles, select_loop


@dataclass
class LoraConfig:
    shape: ShapeName = "donor"             # whose shape: the donor's, or one of benchmarks/common.py
    donor: str = "assets/donor"            # full-size model, a folder or a Hugging Face id
    ranks: str = "0,16,64"                 # LoRA ranks, by comma; 0 is measured in any case
    seq_len: int = 256                     # tokens in a sequence
    micro_batch: int = 8                   # sequences in a step
    steps: int = 5                         # timed steps of each case, after two for warm-up
    rounds: int = 1                        # how often all cases are measured; their steps are pooled
    device: str = "auto"                   # auto, cpu, cuda
    save: str | None = None                # also append the JSON line to this file


def separate_lora(linear: RelaxedLinear, x: Tensor, loop: int) -> Tensor:
    """W'x + B_l (A_l x): what `RelaxedLinear` computes, never merged, whatever the number of tokens."""
    bias = None if linear.bias is None else select_loop(linear.bias, loop)
    return F.linear(x, linear.weight, bias) + F.linear(F.linear(x, linear.lora_a[loop]), linear.lora_b[loop])


def measure_layer(config: LoraConfig, shape: Config, case: dict) -> dict:
    """`time_steps` of forward and backward through one layer of two loops; the "loss" is the sum of its output."""
    device = pick_device(config.device)
    torch.manual_seed(0)
    with device:
        layer = Layer(with_layers(shape, 2, n_loop=2, rank=case["rank"]))
        x = torch.randn(config.micro_batch * config.seq_len, shape.n_embd, requires_grad=True)  # (B T, C)
        rope = rope_angles(torch.arange(config.seq_len, device=device), shape)
    if case["path"] == "separate":
        for linear in (m for m in layer.modules() if isinstance(m, RelaxedLinear)):
            linear.forward = partial(separate_lora, linear)

    def step() -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            total = layer(x, rope, 0, 0).sum()
        total.backward()
        layer.zero_grad(set_to_none=True)
        x.grad = None
        return total.detach()
    return time_steps(step, config.steps, device)


def bench_lora(config: LoraConfig) -> dict:
    """Tokens/s of a training step through one layer at rank 0, and at each rank by both paths. `RelaxedLinear` merges
    where there are many tokens."""
    shape, tokens = load_shape(config.shape, config.donor), config.micro_batch * config.seq_len
    ranks = [rank for rank in by_comma("ranks", config.ranks) if rank]
    for rank in ranks:
        replace(shape, rank=rank)                            # raises UserError now rather than in a subprocess
    with torch.device("meta"):
        flops = 3 * RecursiveTransformer(with_layers(shape, 1)).flops(config.seq_len, n_exits=0)
    cases = [{"rank": rank, "path": path, "tokens": tokens, "flops_per_token": flops}
             for rank, path in [(0, "merged"), *itertools.product(ranks, ("merged", "separate"))]]
    measure_in_turn(measure_layer, cases, config, shape)
    first = next((case["tokens_per_s"] for case in cases if "error" not in case), 1.0)
    lines = [["path", "rank", "tok/s", "of first", "mfu", "peak memory"]]
    lines += [[case["path"], case["rank"], *speed_cells(case, first)] for case in cases]
    print(f"{tokens} tokens a step\n{table(lines)}")
    return {"shape": asdict(shape), "tokens_per_step": tokens, "rows": cases}


def main(argv=None):
    config = parse_args(LoraConfig, argv)
    check_at_least(config, 1, "seq_len", "micro_batch", "steps", "rounds")
    run_and_publish("lora", config, bench_lora)


if __name__ == "__main__":
    script(main)
