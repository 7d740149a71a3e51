"""Time of one exit decision by each rule, beside a pass of the block and the head.

    python -m benchmarks.decision --shape=gemma-2b --steps=15
"""

from dataclasses import asdict, dataclass, replace

import torch

from benchmarks.common import ShapeName, by_comma, check_at_least, load_shape, run_and_publish, time_in_turn
from exits import SCORED, Gate, Rule
from lib.cli import parse_args, progress, script, table
from lib.system import pick_device
from model import Config, KVCache, RecursiveTransformer


@dataclass
class DecisionConfig:
    shape: ShapeName = "donor"             # whose shape: the donor's, or one of benchmarks/common.py
    donor: str = "assets/donor"            # full-size model, a folder or a Hugging Face id
    layers: int = 0                        # use only so many of its layers, for a small machine; 0 = all
    vocab_sizes: str = "4096,256000"       # vocabulary sizes, by comma
    rows: str = "1,16"                     # rows that are decoded together, by comma
    seq_len: int = 256                     # tokens in the context
    steps: int = 5                         # timed calls of each kind, after two for warm-up
    device: str = "auto"                   # auto, cpu, cuda
    save: str | None = None                # also append the JSON line to this file


def time_decisions(config: DecisionConfig, shape: Config, batches: list[int]) -> list[dict]:
    """Median microseconds of the block, the head, and a decision by each rule; a row for each number of rows."""
    device = pick_device(config.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        model = RecursiveTransformer(shape).to(dtype)
        gate = Gate(1, shape.n_embd)
    rules, rows = [Rule(name, 0.5, gate=gate) for name in SCORED], []
    for batch in batches:
        x = torch.randn(batch, shape.n_embd, device=device, dtype=dtype)
        cache = KVCache(model.config, batch, config.seq_len, device, dtype)

        def block(x=x, cache=cache):
            cache.lengths = [config.seq_len - 1] * 2         # x is the last token of a full context
            model.block(x[:, None], 0, cache)
        works = {"block": block, "head": lambda x=x: model.logits(x)}
        works |= {rule.name: lambda x=x, rule=rule: rule(x, 0, model.logits(x) if rule.reads_logits else None)
                  for rule in rules}
        rows.append({"vocab_size": shape.vocab_size, "batch": batch} | time_in_turn(works, config.steps, device))
    return rows


@torch.no_grad()
def bench_decision(config: DecisionConfig) -> dict:
    """Microseconds of one exit decision with all that its rule reads (logits, for most), beside one pass of the block
    and of the head. Random weights of a shape as two loops, one token per row, fp32 (bf16 on GPUs)."""
    shape = replace(load_shape(config.shape, config.donor, config.layers), n_loop=2)
    batches, rows = by_comma("rows", config.rows, positive=True), []
    sizes = by_comma("vocab_sizes", config.vocab_sizes, positive=True)
    for size in progress(sizes, desc="vocabularies"):
        rows += time_decisions(config, replace(shape, vocab_size=size), batches)
    lines = [["vocabulary size", "rows", "block", "head", *SCORED, *(f"{name} / block" for name in SCORED)]]
    lines += [[f"{row['vocab_size']:,}", row["batch"], *(f"{row[name]:,.0f}" for name in ("block", "head", *SCORED)),
               *(f"{row[name] / row['block']:.1%}" for name in SCORED)] for row in rows]
    print(f"microseconds; {shape.n_unique} layers of C = {shape.n_embd}, context {config.seq_len}\n{table(lines)}")
    dtype = "bfloat16" if pick_device(config.device).type == "cuda" else "float32"
    return {"shape": asdict(shape), "dtype": dtype, "rows": rows}


def main(argv=None):
    config = parse_args(DecisionConfig, argv)
    check_at_least(config, 1, "seq_len", "steps")
    run_and_publish("decision", config, bench_decision)


if __name__ == "__main__":
    script(main)
