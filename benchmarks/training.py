"""Speed and peak memory of a training step, beside transformers and beside the loss from whole logits.

    python -m benchmarks.training --loops=2 --ranks=0,64
    python -m benchmarks.training --shape=gemma-2b --seq_len=2048 --micro_batch=1 --compile     # fits 80 GB
"""

import importlib.util
import itertools
import sys
from dataclasses import asdict, dataclass, replace

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
)
from benchmarks.loss import naive_loss
from hf import hf_config
from lib.cli import parse_args, script, table
from lib.system import pick_device
from model import Config, RecursiveTransformer, upcast
from train import Objective, TrainConfig, make_optimizer


@dataclass
class TrainingConfig:
    shape: ShapeName = "donor"             # whose shape: the donor's, or one of benchmarks/common.py
    donor: str = "assets/donor"            # full-size model, a folder or a Hugging Face id
    layers: int = 0                        # use only so many of its layers, for a small machine; 0 = all
    vocab: int = 0                         # vocabulary size; 0 = the shape's
    loops: str = "2,3"                     # numbers of loops, by comma
    ranks: str = "0,16,64"                 # LoRA ranks, by comma
    seq_len: int = 256                     # tokens in a sequence
    micro_batch: int = 8                   # sequences in a step
    compile: bool = False                  # also with torch.compile, ours and transformers'
    steps: int = 5                         # timed steps of each case, after two for warm-up
    rounds: int = 1                        # how often all cases are measured; their steps are pooled
    device: str = "auto"                   # auto, cpu, cuda
    save: str | None = None                # also append the JSON line to this file


class NaiveObjective(Objective):
    """Our model with the loss from whole logits and softmaxes, as it is commonly written."""

    def forward(self, idx, targets, teacher):
        logits = self.model.logits(self.model(idx)[-1])
        return naive_loss(logits, targets, teacher and upcast(F.linear(*teacher)))


class TransformersObjective(torch.nn.Module):
    """transformers' model with its own loss; for distillation with `naive_loss`."""

    def __init__(self, config: Config):
        super().__init__()
        from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        # Under the name "sdpa" torch.compile would make it write out the causal mask, which rules out SDPA's fast
        # path. Under a name of its own it makes no mask, compiled or not.
        AttentionInterface.register("sdpa_causal", sdpa_attention_forward)
        hf = AutoConfig.for_model(**hf_config(config, torch.float32))
        self.model = AutoModelForCausalLM.from_config(hf, attn_implementation="sdpa_causal").train()

    def forward(self, idx, targets, teacher):
        if teacher is None:
            loss = self.model(input_ids=idx, labels=targets, shift_labels=targets, use_cache=False).loss
            return loss, loss.detach()[None]
        logits = self.model(input_ids=idx, use_cache=False).logits
        return naive_loss(upcast(logits), targets, upcast(F.linear(*teacher)))


def make_objective(case: dict, shape: Config, args: TrainConfig) -> torch.nn.Module:
    """The module whose forward is the case's loss, with its model inside."""
    if case["code"] == "transformers":
        return TransformersObjective(shape)
    student = RecursiveTransformer(replace(shape, n_loop=case["loops"], rank=case["rank"]))
    return (Objective if case["code"] == "ours" else NaiveObjective)(student, args)


def measure_training(config: TrainingConfig, shape: Config, case: dict) -> dict:
    """`time_steps` of one case. A step is forward and backward, clipping and AdamW, on the same random tokens for all
    cases; the teacher has the full-size shape."""
    device = pick_device(config.device)
    torch.manual_seed(0)
    bf16 = device.type == "cuda"
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)
    args = TrainConfig(distill="fkl" if case["distill"] else "none", compile=case["compile"])
    with device:
        idx = torch.randint(shape.vocab_size, (config.micro_batch, config.seq_len + 1))
        teacher = RecursiveTransformer(shape).requires_grad_(False) if case["distill"] else None
        objective = make_objective(case, shape, args)
    teacher = teacher and teacher.to(torch.bfloat16 if bf16 else torch.float32)
    optimizer = make_optimizer(objective.model, args)
    if case["compile"]:
        objective.compile()

    def step() -> Tensor:
        with autocast:
            with torch.no_grad():
                given = teacher and (teacher.norm(teacher(idx[:, :-1])[-1], 0), teacher.head_weight)
            loss, _ = objective(idx[:, :-1], idx[:, 1:].contiguous(), given)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()
    return time_steps(step, config.steps, device)


def make_cases(config: TrainingConfig, shape: Config) -> list[dict]:
    """transformers, ours at full size with both losses, and ours looped; each without and with distillation."""
    with torch.device("meta"):
        forward = RecursiveTransformer(shape).flops(config.seq_len)
    looped = list(itertools.product(by_comma("loops", config.loops), by_comma("ranks", config.ranks)))
    for loops, rank in looped:
        replace(shape, n_loop=loops, rank=rank)              # raises UserError now rather than in a subprocess
    cases = []
    for distill, compiled in itertools.product((False, True), (False, True)[:1 + config.compile]):
        # A looped model runs as many layers as the full-size one, so their FLOPs are the same.
        common = {"distill": distill, "compile": compiled, "tokens": config.micro_batch * config.seq_len,
                  "flops_per_token": forward * (4 if distill else 3)}
        if importlib.util.find_spec("transformers"):
            cases.append({"code": "transformers", "loops": 1, "rank": 0} | common)
        cases += [{"code": code, "loops": 1, "rank": 0} | common for code in ("ours, naive loss", "ours")]
        cases += [{"code": "ours", "loops": loops, "rank": rank} | common for loops, rank in looped]
    return cases


def baseline_gib(shape: Config, tokens: int, distill: bool) -> float:
    """GiB, by arithmetic, of a bf16 training step of the full-size model with so many tokens and its logits whole: what
    transformers takes, and our naive loss.

    Bytes per weight: 16 in fp32 (weight, gradient, AdamW's two), 2 for autocast's copy, 2 for the teacher. Per token:
    8 for each hidden unit and 31 for each channel of a layer (193,576 a layer were counted at Gemma 2B's shape), and
    14 for each entry of the vocabulary, with distillation 36 (results/loss.jsonl: 12 and 32, all in fp32). So Gemma 2B
    with distillation takes 71 GiB for 2,048 tokens and 144 for 8,192.
    """
    with torch.device("meta"):
        weights = RecursiveTransformer(shape).num_params()["stored"]
    per_token = shape.n_layer * (8 * shape.n_hidden + 31 * shape.n_embd) + shape.vocab_size * (36 if distill else 14)
    return (weights * (20 if distill else 18) + tokens * per_token) / 2**30


def warn_of_memory(config: TrainingConfig, shape: Config, memory_gib: float) -> None:
    """Say, before minutes of work, that the baselines will not fit, and what would."""
    sequences = [n for n in range(1, config.micro_batch + 1)
                 if baseline_gib(shape, n * config.seq_len, distill=True) < memory_gib]
    if config.micro_batch not in sequences:
        need = baseline_gib(shape, config.micro_batch * config.seq_len, distill=True)
        print(f"the baselines with distillation take about {need:.0f} GiB of the GPU's {memory_gib:.0f} and will be "
              f"out of memory; use --micro_batch={max(sequences, default=1)}, or a shorter --seq_len", file=sys.stderr)


def bench_training(config: TrainingConfig) -> dict:
    """Tokens/s, MFU and peak memory of a training step, case by case."""
    shape = load_shape(config.shape, config.donor, config.layers, config.vocab)
    tokens, cases, device = config.micro_batch * config.seq_len, make_cases(config, shape), pick_device(config.device)
    if device.type == "cuda":
        warn_of_memory(config, shape, torch.cuda.get_device_properties(device).total_memory / 2**30)
    measure_in_turn(measure_training, cases, config, shape)
    lines, first = [["code", "loops", "rank", "distill", "compile", "tok/s", "of first", "mfu", "peak memory"]], {}
    for case in cases:
        reference = first.setdefault(case["distill"], case["tokens_per_s"]) if "error" not in case else 1.0
        lines.append([case["code"], case["loops"], case["rank"],
                      *("yes" if case[k] else "" for k in ("distill", "compile")), *speed_cells(case, reference)])
    print(f"{tokens} tokens a step\n{table(lines)}")
    return {"shape": asdict(shape), "tokens_per_step": tokens, "rows": cases}


def main(argv=None):
    config = parse_args(TrainingConfig, argv)
    check_at_least(config, 1, "seq_len", "micro_batch", "steps", "rounds")
    run_and_publish("train", config, bench_training)


if __name__ == "__main__":
    script(main)
