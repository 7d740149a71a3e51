"""Memory and speed of the loss alone, in chunks and from whole logits, without and with distillation.

    python -m benchmarks.loss --shape=gemma-2b --micro_batch=16
"""

from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import ShapeName, check_at_least, load_shape, measure_in_turn, run_and_publish, time_steps
from lib.cli import parse_args, script, table
from lib.system import peak_memory, pick_device
from losses import chunked_loss, distill_loss
from model import Config, upcast


@dataclass
class LossConfig:
    shape: ShapeName = "donor"             # whose shape: the donor's, or one of benchmarks/common.py
    donor: str = "assets/donor"            # full-size model, a folder or a Hugging Face id
    vocab: int = 0                         # vocabulary size; 0 = the shape's
    width: int = 0                         # of the hidden states, for a small machine; 0 = the shape's
    seq_len: int = 256                     # tokens in a sequence
    micro_batch: int = 8                   # sequences in a step
    steps: int = 5                         # timed steps of each case, after two for warm-up
    rounds: int = 1                        # how often all cases are measured; their steps are pooled
    device: str = "auto"                   # auto, cpu, cuda
    save: str | None = None                # also append the JSON line to this file


def naive_loss(logits: Tensor, targets: Tensor, teacher_logits: Tensor | None) -> tuple[Tensor, Tensor]:
    """(loss, cross entropy (1,)): cross entropy, plus forward KL if there is a teacher, from whole logits (..., V)."""
    ce = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
    loss = ce if teacher_logits is None else ce + distill_loss(logits, teacher_logits, "fkl")
    return loss, ce.detach()[None]


def measure_loss(config: LossConfig, shape: Config, case: dict) -> dict:
    """`time_steps` of the loss and its gradients, and the memory that they take beyond their inputs."""
    device = pick_device(config.device)
    torch.manual_seed(0)
    with device:
        head, teacher_head = (torch.randn(shape.vocab_size, shape.n_embd) * 0.02 for _ in range(2))      # (V, C)
        states, teacher_states = (torch.randn(case["tokens"], shape.n_embd) for _ in range(2))           # (N, C)
        targets = torch.randint(shape.vocab_size, (case["tokens"],))

    def step(n: int | None = None) -> Tensor:
        x, w = (t.detach().requires_grad_() for t in (states[:n], head))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            teacher = (teacher_states[:n], teacher_head) if case["distill"] else None
            if case["code"] == "chunked":
                loss, _ = chunked_loss([x], w, targets[:n], teacher=teacher)
            else:
                loss, _ = naive_loss(upcast(F.linear(x, w)), targets[:n], teacher and upcast(F.linear(*teacher)))
        loss.backward()
        return loss.detach()
    step(8)                                                  # memory that libraries allocate once is not the loss's
    before = peak_memory(device)
    numbers = time_steps(step, config.steps, device)
    return numbers | {"added_gib": numbers["peak_gib"] - before}


def bench_loss(config: LossConfig) -> dict:
    """Memory and seconds of cross entropy without and with forward KL, in chunks and from whole logits. The naive loss
    is measured on a quarter of the tokens, so that it fits; on all of them it takes four times the memory."""
    shape, tokens = load_shape(config.shape, config.donor, vocab=config.vocab), config.micro_batch * config.seq_len
    shape = replace(shape, n_embd=config.width or shape.n_embd)
    product = 2 * shape.n_embd * shape.vocab_size            # FLOPs a token of the logits, and of either gradient
    cases = [{"code": code, "distill": distill, "tokens": n, "flops_per_token": (4 if distill else 3) * product}
             for distill in (False, True) for code, n in (("chunked", tokens), ("naive", tokens // 4))]
    measure_in_turn(measure_loss, cases, config, shape)
    lines = [["loss", "distill", "tokens", "ms / 1,000 tokens", "GiB added", f"at {tokens:,} tokens"]]
    for case in cases:
        known = [case["code"], "yes" if case["distill"] else "", f"{case['tokens']:,}"]
        if "error" in case:
            lines.append([*known, case["error"], "", ""])
            continue
        case["added_gib_at_all"] = case["added_gib"] * (4 if case["code"] == "naive" else 1)
        lines.append([*known, f"{1e6 / case['tokens_per_s']:.1f}", f"{case['added_gib']:.2f}",
                      f"{case['added_gib_at_all']:.2f}"])
    print(f"vocabulary size {shape.vocab_size:,}, C = {shape.n_embd}\n{table(lines)}")
    return {"shape": asdict(shape), "tokens_per_step": tokens, "rows": cases}


def main(argv=None):
    config = parse_args(LossConfig, argv)
    check_at_least(config, 1, "seq_len", "micro_batch", "steps", "rounds")
    check_at_least(config, 0, "width")
    run_and_publish("loss", config, bench_loss)


if __name__ == "__main__":
    script(main)
