"""The measurements of training behind `python bench.py --what=train`, `--what=loss` and `--what=lora`."""

import importlib.util
import itertools
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hf import hf_config
from lib.cli import UserError, progress, table
from lib.donors import find_donor
from lib.system import peak_flops, peak_memory, pick_device
from losses import chunked_loss, distill_loss
from model import Config, Layer, RecursiveTransformer, RelaxedLinear, rope_angles, select_loop, upcast
from train import Objective, TrainConfig, donor_config, make_optimizer

GEMMA_2B = Config(vocab_size=256_000, n_layer=18, n_embd=2048, n_head=8, n_kv_head=1, head_dim=256, n_hidden=16384,
                  n_ctx=8192)
SHAPES = {
    "small": Config(vocab_size=32_768, n_layer=12, n_embd=1024, n_head=8, n_kv_head=1, head_dim=128, n_hidden=4096,
                    n_ctx=2048),
    "gemma-2b": GEMMA_2B,
    "tinyllama": Config(vocab_size=32_000, n_layer=22, n_embd=2048, n_head=32, n_kv_head=4, head_dim=64, n_hidden=5632,
                        n_ctx=2048, arch="llama", norm_eps=1e-5, tie_head=False),
    "pythia-1b": Config(vocab_size=50_304, n_layer=16, n_embd=2048, n_head=8, n_kv_head=8, head_dim=256, n_hidden=8192,
                        n_ctx=2048, arch="gpt_neox", norm_eps=1e-5, rotary_pct=0.25, tie_head=False, attn_bias=True,
                        mlp_bias=True, parallel=True),
    "smollm2": Config(vocab_size=49_152, n_layer=30, n_embd=576, n_head=9, n_kv_head=3, head_dim=64, n_hidden=1536,
                      n_ctx=8192, arch="llama", norm_eps=1e-5, rope_theta=100_000.0),
}


def by_comma(name: str, text: str) -> list[int]:
    """The numbers in the setting `name`."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise UserError(f"--{name}={text} must be whole numbers by comma; use for example --{name}=2,3") from None


# ---------------------------------------------------------------------------------------------------------------------
# Training: every case in a process of its own, so that its memory is its own, and given back

def shape_of(config) -> Config:
    """The full-size model to measure. Raises UserError for settings that nothing can be measured with."""
    shape = SHAPES.get(config.shape) or donor_config(find_donor(config.donor))
    if not 0 <= config.layers <= shape.n_layer:
        raise UserError(f"--layers={config.layers}, but --shape={config.shape} has {shape.n_layer} of them; "
                        f"use 1 to {shape.n_layer}, or 0 for all")
    return replace(shape, n_layer=config.layers or shape.n_layer, n_loop=1, rank=0,
                   vocab_size=config.vocab or shape.vocab_size)


def apart(measure: Callable, *args) -> dict:
    """measure(*args) in a process of its own, or {"error": ...} where memory is too small for it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure, *args).result()
        except BrokenProcessPool:
            return {"error": "killed"}                                       # as Linux does where memory ends
        except RuntimeError as e:                                            # an OutOfMemoryError, but not so on CPUs
            if "allocate" not in str(e):
                raise
            return {"error": "out of memory"}


def measure_in_turn(measure: Callable, cases: list[dict], config, shape: Config) -> None:
    """Add to each case what `measure` finds, tokens_per_s of its median step (of its `tokens`) and mfu; or why there is
    nothing. The cases are gone through config.rounds times, so that a noisy machine disturbs them all alike."""
    device = pick_device(config.device)
    peak = peak_flops(device, device.type == "cuda")
    for case in progress(cases * config.rounds, desc="cases", unit="case"):
        if "error" not in case:
            new = apart(measure, config, shape, dict(case))
            case.update(new | {"seconds": sorted(case.get("seconds", []) + new.get("seconds", []))})
    for case in cases:
        if "error" not in case:
            speed = case["tokens"] / case["seconds"][len(case["seconds"]) // 2]
            case |= {"tokens_per_s": speed, "mfu": peak and speed * case["flops_per_token"] / peak}


def time_steps(step: Callable[[], Tensor], config, device: torch.device) -> dict:
    """Seconds of each of config.steps steps, after two that warm up, the last one's loss, and the peak of memory."""
    def synchronize():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    seconds = []
    for _ in range(config.steps + 2):
        synchronize()
        began = time.perf_counter()
        loss = step()
        synchronize()
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds[2:], "loss": loss.item(), "peak_gib": peak_memory(device)}


def speeds(case: dict, first: float) -> list[str]:
    """A case's last cells in the table, tokens/s also as a multiple of `first`."""
    if "error" in case:
        return [case["error"], "", "", ""]
    return [f"{case['tokens_per_s']:,.0f}", f"{case['tokens_per_s'] / first:.2f}",
            f"{case['mfu']:.0%}" if case["mfu"] else "", f"{case['peak_gib']:.2f} GiB"]


class NaiveObjective(Objective):
    """The same loss from whole logits and softmaxes, as it is commonly written."""

    def forward(self, idx, targets, teacher):
        logits = self.model.logits(self.model(idx)[-1])
        return naive_loss(logits, targets, teacher and upcast(F.linear(*teacher)))


class TransformersObjective(torch.nn.Module):
    """The model in transformers, in a plain training loop: its own loss, and to distil the naive one."""

    def __init__(self, config: Config):
        super().__init__()
        from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        # Its "sdpa", under a name for which it makes no mask: compiled, it would write out the causal one, and SDPA
        # leave its fast path, which not compiled it takes as we do.
        AttentionInterface.register("sdpa_causal", sdpa_attention_forward)
        hf = AutoConfig.for_model(**hf_config(config, torch.float32))
        self.model = AutoModelForCausalLM.from_config(hf, attn_implementation="sdpa_causal").train()

    def forward(self, idx, targets, teacher):
        if teacher is None:
            loss = self.model(input_ids=idx, labels=targets, shift_labels=targets, use_cache=False).loss
            return loss, loss.detach()[None]
        logits = self.model(input_ids=idx, use_cache=False).logits
        return naive_loss(upcast(logits), targets, upcast(F.linear(*teacher)))


def naive_loss(logits: Tensor, targets: Tensor, teacher_logits: Tensor | None) -> tuple[Tensor, Tensor]:
    ce = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
    loss = ce if teacher_logits is None else ce + distill_loss(logits, teacher_logits, "fkl")
    return loss, ce.detach()[None]


def measure_training(config, shape: Config, case: dict) -> dict:
    """`time_steps` of one case. A step is forward and backward of student and teacher, clipping and AdamW, on the same
    random tokens for all; the teacher has the full-size shape."""
    device = pick_device(config.device)
    torch.manual_seed(0)
    bf16 = device.type == "cuda"
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)
    args = TrainConfig(distill="fkl" if case["distill"] else "none", compile=case["compile"])
    with device:
        idx = torch.randint(shape.vocab_size, (config.micro_batch, config.seq_len + 1))
        teacher = RecursiveTransformer(shape).requires_grad_(False) if case["distill"] else None
        if case["code"] == "transformers":
            objective = TransformersObjective(shape)
        else:
            student = RecursiveTransformer(replace(shape, n_loop=case["loops"], rank=case["rank"]))
            objective = (Objective if case["code"] == "ours" else NaiveObjective)(student, args)
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
    return time_steps(step, config, device)


def bench_train(config) -> dict:
    """Tokens/s, MFU and peak memory of a training step: transformers, ours at full size, ours looped, with the loss in
    chunks and with the naive one, without and with distillation from a frozen full-size teacher."""
    shape, tokens = shape_of(config), config.micro_batch * config.seq_len
    with torch.device("meta"):
        forward = RecursiveTransformer(shape).flops(config.seq_len)
    looped = list(itertools.product(by_comma("loops", config.loops), by_comma("ranks", config.ranks)))
    for loops, rank in looped:
        replace(shape, n_loop=loops, rank=rank)                              # refuses now what cannot be built later
    cases = []
    for distill, compiled in itertools.product((False, True), (False, True)[:1 + config.compile]):
        how = {"distill": distill, "compile": compiled, "tokens": tokens,    # looped or not, the same layers run
               "flops_per_token": forward * (4 if distill else 3)}
        if importlib.util.find_spec("transformers"):
            cases.append({"code": "transformers", "loops": 1, "rank": 0} | how)
        cases += [{"code": code, "loops": 1, "rank": 0} | how for code in ("ours, naive loss", "ours")]
        cases += [{"code": "ours", "loops": loops, "rank": rank} | how for loops, rank in looped]
    measure_in_turn(measure_training, cases, config, shape)
    lines, first = [["code", "loops", "rank", "distill", "compile", "tok/s", "of first", "mfu", "peak memory"]], {}
    for case in cases:
        base = first.setdefault(case["distill"], case["tokens_per_s"]) if "error" not in case else 1.0
        lines.append([case["code"], case["loops"], case["rank"],
                      *("yes" if case[k] else "" for k in ("distill", "compile")), *speeds(case, base)])
    print(f"{tokens} tokens a step\n{table(lines)}")
    return {"shape": asdict(shape), "tokens_per_step": tokens, "rows": cases}


def measure_loss(config, shape: Config, case: dict) -> dict:
    """`time_steps` of the loss alone with its gradients, and the memory that it takes beside what it is given."""
    device = pick_device(config.device)
    torch.manual_seed(0)
    with device:
        head, teacher_head = (torch.randn(shape.vocab_size, shape.n_embd) * 0.02 for _ in range(2))      # (V, C)
        states, teacher_states = (torch.randn(case["tokens"], shape.n_embd) for _ in range(2))           # (N, C)
        targets = torch.randint(shape.vocab_size, (case["tokens"],))
    teacher = (teacher_states, teacher_head) if case["distill"] else None

    def step(n: int | None = None) -> Tensor:
        x, w = (t.detach().requires_grad_() for t in (states[:n], head))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            given = teacher and (teacher_states[:n], teacher_head)
            if case["code"] == "chunked":
                loss, _ = chunked_loss([x], w, targets[:n], teacher=given)
            else:
                loss, _ = naive_loss(upcast(F.linear(x, w)), targets[:n], given and upcast(F.linear(*given)))
        loss.backward()
        return loss.detach()
    step(8)                                                                  # what libraries take once is not the loss'
    before = peak_memory(device)
    numbers = time_steps(step, config, device)
    return numbers | {"added_gib": numbers["peak_gib"] - before}


def bench_loss(config) -> dict:
    """Memory and seconds of cross entropy without and with forward KL, in chunks and from whole logits. The naive loss
    is measured on a quarter of the tokens, so that it fits: its memory at all of them is four times what it added."""
    shape, tokens = shape_of(config), config.micro_batch * config.seq_len
    shape = replace(shape, n_embd=config.width or shape.n_embd)
    product = 2 * shape.n_embd * shape.vocab_size                            # FLOPs of logits, and of either gradient
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
    print(f"{shape.vocab_size:,} words, C = {shape.n_embd}\n{table(lines)}")
    return {"shape": asdict(shape), "tokens_per_step": tokens, "rows": cases}


def separate(linear: RelaxedLinear, x: Tensor, loop: int) -> Tensor:
    """What `RelaxedLinear` computes, with the LoRA as a path of its own however many tokens there are."""
    bias = None if linear.bias is None else select_loop(linear.bias, loop)
    return F.linear(x, linear.weight, bias) + F.linear(F.linear(x, linear.lora_a[loop]), linear.lora_b[loop])


def measure_layer(config, shape: Config, case: dict) -> dict:
    """`time_steps` of forward and backward through one layer of two loops; its "loss" is the sum of what comes out."""
    device = pick_device(config.device)
    torch.manual_seed(0)
    with device:
        layer = Layer(replace(shape, n_layer=2, n_loop=2, rank=case["rank"]))
        x = torch.randn(config.micro_batch * config.seq_len, shape.n_embd, requires_grad=True)  # (B T, C)
        rope = rope_angles(torch.arange(config.seq_len, device=device), shape)
    if case["path"] == "separate":
        for linear in (m for m in layer.modules() if isinstance(m, RelaxedLinear)):
            linear.forward = partial(separate, linear)

    def step() -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            total = layer(x, rope, 0, 0).sum()
        total.backward()
        layer.zero_grad(set_to_none=True)
        x.grad = None
        return total.detach()
    return time_steps(step, config, device)


def bench_lora(config) -> dict:
    """Tokens/s of a training step through one layer: what each LoRA rank adds to rank 0, merged into W' as in
    `RelaxedLinear` (where there are many tokens) and as a path of its own beside it."""
    shape, tokens = shape_of(config), config.micro_batch * config.seq_len
    ranks = [rank for rank in by_comma("ranks", config.ranks) if rank]
    for rank in ranks:
        replace(shape, rank=rank)                                            # refuses a negative one
    with torch.device("meta"):
        flops = 3 * RecursiveTransformer(replace(shape, n_layer=1)).flops(config.seq_len, n_exits=0)
    cases = [{"rank": rank, "path": path, "tokens": tokens, "flops_per_token": flops}
             for rank, path in [(0, "merged"), *itertools.product(ranks, ("merged", "separate"))]]
    measure_in_turn(measure_layer, cases, config, shape)
    first = next((case["tokens_per_s"] for case in cases if "error" not in case), 1.0)
    lines = [["path", "rank", "tok/s", "of first", "mfu", "peak memory"]]
    lines += [[case["path"], case["rank"], *speeds(case, first)] for case in cases]
    print(f"{tokens} tokens a step\n{table(lines)}")
    return {"shape": asdict(shape), "tokens_per_step": tokens, "rows": cases}
