"""Measure: a table for people, then one JSON line with hardware, versions, commit, settings and every number.

    python bench.py --what=convert --donor=FOLDER --text=FILE     # what conversion costs, against transformers
    python bench.py --what=svd                                    # our SVD of a residual against torch.linalg.svd
    python bench.py --what=scale                                  # convert a checkpoint of Gemma 2B's exact shapes
    python bench.py --what=train --shape=gemma-2b --compile       # training: ours, transformers, the naive loss
    python bench.py --what=lora --shape=tinyllama --micro_batch=16  # training a layer: LoRA merged against separate
"""

import importlib.util
import itertools
import json
import math
import multiprocessing
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from convert import svd_factors, to_hf, to_recursive, unroll
from data import load_tokens, windows
from exits import distill_loss
from hf import find_donor, hf_config, hf_shapes, load_full
from model import Config, Layer, RecursiveTransformer, RelaxedLinear, of_loop, rope_angles, widen
from runtime import (
    UserError,
    parse_args,
    peak_flops,
    peak_memory,
    pick_device,
    progress,
    run_info,
    script,
    table,
)
from sample import generate
from tokenizer import Tokenizer, copy_tokenizer
from train import Objective, TrainConfig, donor_config, make_optimizer

HERE = Path(__file__).parent


@dataclass
class BenchConfig:
    what: Literal["convert", "svd", "scale", "train", "lora"] = "convert"  # which measurement
    donor: str = "assets/donor"            # convert, train: full-size model, a folder or a Hugging Face id
    text: str = "assets/books/valid.txt"   # convert: text whose loss is measured
    tokens: int = 16_384                   # convert: of that text, in windows spread evenly over it
    seq_len: int = 256                     # convert, train, lora: tokens in a window
    loops: str = "2,3"                     # convert, train: numbers of loops, by comma
    inits: str = "stepwise,average,lower"  # convert: inits, by comma
    ranks: str = "0,16,64"                 # convert, train, lora: LoRA ranks, by comma; "full" is full rank (convert)
    tmp: str | None = None                 # scale: folder with 10 GB to spare; not set = the system's
    shape: Literal["donor", "gemma-2b", "tinyllama", "pythia-1b", "smollm2"] = "donor"  # train, lora: which model's
    layers: int = 0                        # train: keep so many of its layers, for a small machine; 0 = all
    micro_batch: int = 8                   # train, lora: sequences in a step
    steps: int = 5                         # train, lora: steps that are timed, after two that are not
    rounds: int = 1                        # train, lora: times that all cases are gone through; their steps are pooled
    compile: bool = False                  # train: also with torch.compile, ours and transformers'
    device: str = "auto"                   # train, lora: auto, cpu, cuda
    save: str | None = None                # also append the JSON line to this file


def by_comma(name: str, text: str) -> list[int]:
    """The numbers in the setting `name`."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise UserError(f"--{name}={text} must be whole numbers by comma; use for example --{name}=2,3") from None


# ---------------------------------------------------------------------------------------------------------------------
# What conversion costs

@torch.no_grad()
def mean_loss(logits_of, rows: list[tuple[Tensor, Tensor]]) -> float:
    """Mean cross entropy in nats of `logits_of(idx)` over windows, summed in fp64."""
    total = sum(F.cross_entropy(logits_of(idx).flatten(0, 1).float(), targets.flatten(), reduction="sum").double()
                for idx, targets in rows)
    return (total / sum(targets.numel() for _, targets in rows)).item()


def bench_convert(config: BenchConfig) -> dict:
    """Loss right after conversion, before any training: loops x init x rank x vectors, beside the donor's."""
    full = load_full(config.donor, torch.float32)
    folder = find_donor(config.donor)
    tokens = load_tokens(config.text, Tokenizer.load(folder, full.config.vocab_size), full.config.vocab_size)
    n, stride = config.tokens // config.seq_len, (len(tokens) - 1) // config.seq_len
    if not 0 < n <= stride:
        raise UserError(f"--tokens={config.tokens} in windows of {config.seq_len}: the text holds {stride} windows")
    rows = [windows(tokens, config.seq_len, [i * stride // n]) for i in range(n)]

    def loss_of(model):
        return mean_loss(lambda idx: model.logits(model(idx)[-1]), rows)
    numbers = {"donor_loss": loss_of(full), "tokens": n * config.seq_len, "rows": []}
    if not importlib.util.find_spec("transformers"):
        print("transformers is not installed: nothing to compare with", file=sys.stderr)
    else:
        numbers |= compare_with_transformers(full, folder, rows)
        print("transformers: " + ", ".join(f"{k} {v:.6g}" for k, v in numbers.items() if k != "rows"))
    small = min(full.config.n_embd, full.config.n_hidden)
    ranks = by_comma("ranks", config.ranks.replace("full", str(small)))
    cases = list(itertools.product(by_comma("loops", config.loops), config.inits.split(","), ("tied", "per_loop")))
    for loops, init, vectors in progress(cases, desc="conversions", unit="model"):
        largest = to_recursive(full, loops, init, max(ranks), vectors=vectors)
        for rank in ranks:
            model = of_rank(largest, rank)
            numbers["rows"].append({"loops": loops, "init": init, "rank": rank, "vectors": vectors,
                                    "loss": loss_of(model), "stored": model.num_params()["stored"]})
    lines = [["loops", "init", "rank", "vectors", "loss", "perplexity", "stored"]]
    lines.append([1, "donor", "", "", f"{numbers['donor_loss']:.4f}", f"{math.exp(numbers['donor_loss']):.4f}",
                  f"{full.num_params()['stored'] / 1e6:.1f} M"])
    lines += [[r["loops"], r["init"], r["rank"], r["vectors"], f"{r['loss']:.4f}", f"{math.exp(r['loss']):.5g}",
               f"{r['stored'] / 1e6:.1f} M"] for r in numbers["rows"]]
    print(table(lines))
    return numbers


@torch.no_grad()
def compare_with_transformers(full: RecursiveTransformer, folder: Path, rows: list) -> dict:
    """The donor, and a relaxed model unrolled and exported, in transformers: loss, logits and greedy text."""
    from transformers import AutoModelForCausalLM
    plain = {"dtype": torch.float32, "attn_implementation": "eager"}
    theirs = AutoModelForCausalLM.from_pretrained(folder, **plain).eval()
    idx, _ = rows[0]
    prompt = idx[:, :32]
    greedy = theirs.generate(prompt, max_new_tokens=64, min_new_tokens=64, do_sample=False)[0, 32:].tolist()
    ours = [token.item() for token in generate(full, prompt, 64, temperature=0)]
    relaxed = to_recursive(full, 2, "average", 64, vectors="per_loop")
    with tempfile.TemporaryDirectory() as tmp:
        to_hf(unroll(relaxed), Path(tmp) / "hf")
        exported = AutoModelForCausalLM.from_pretrained(Path(tmp) / "hf", **plain).eval()

    def difference(model, ours):
        return (model(idx).logits - ours.logits(ours(idx)[-1])).abs().max().item()
    return {"transformers_loss": mean_loss(lambda idx: theirs(idx).logits, rows),
            "largest_logit": theirs(idx).logits.abs().max().item(),
            "largest_logit_difference": difference(theirs, full),
            "largest_logit_difference_unrolled": difference(exported, relaxed),
            "greedy_tokens_equal_of_64": sum(a == b for a, b in zip(ours, greedy, strict=True))}


def of_rank(model: RecursiveTransformer, rank: int) -> RecursiveTransformer:
    """The same conversion at a smaller LoRA rank: singular vectors come largest first, so its factors are a part."""
    with torch.device("meta"):
        smaller = RecursiveTransformer(replace(model.config, rank=rank))
    state = model.state_dict()
    smaller.load_state_dict({name: state[name][tuple(slice(n) for n in p.shape)]
                             for name, p in smaller.state_dict().items()}, assign=True)
    return smaller.eval()


# ---------------------------------------------------------------------------------------------------------------------
# How long conversion takes

def bench_svd(config: BenchConfig) -> dict:
    """Seconds and residual norm of the best rank-512 approximation, ours against torch.linalg.svd, at real shapes."""
    rank, numbers = 512, []
    lines = [["residual", "linalg.svd", "ours", "speed-up", "norm ratio - 1"]]
    for shape in ((2048, 2048), (2048, 16384), (16384, 2048), (2048, 5632), (2048, 8192)):
        delta = torch.randn(shape) / shape[1] ** 0.5
        began = time.perf_counter()
        a, b = svd_factors(delta, rank)
        ours = time.perf_counter() - began
        began = time.perf_counter()
        u, s, vt = torch.linalg.svd(delta, full_matrices=False)
        theirs = time.perf_counter() - began
        norms = [(delta - b @ a).norm().item(), (delta - (u[:, :rank] * s[:rank]) @ vt[:rank]).norm().item()]
        numbers.append({"shape": shape, "ours_s": ours, "linalg_s": theirs, "norms": norms})
        lines.append([f"{shape[0]} x {shape[1]}", f"{theirs:.2f} s", f"{ours:.2f} s", f"{theirs / ours:.1f} x",
                      f"{norms[0] / norms[1] - 1:.1e}"])
    print(table(lines))
    return {"rank": rank, "rows": numbers}


GEMMA_2B = Config(vocab_size=256_000, n_layer=18, n_embd=2048, n_head=8, n_kv_head=1, head_dim=256, n_hidden=16384,
                  n_ctx=8192)
SHAPES = {
    "gemma-2b": GEMMA_2B,
    "tinyllama": Config(vocab_size=32_000, n_layer=22, n_embd=2048, n_head=32, n_kv_head=4, head_dim=64, n_hidden=5632,
                        n_ctx=2048, arch="llama", norm_eps=1e-5, tie_head=False),
    "pythia-1b": Config(vocab_size=50_304, n_layer=16, n_embd=2048, n_head=8, n_kv_head=8, head_dim=256, n_hidden=8192,
                        n_ctx=2048, arch="gpt_neox", norm_eps=1e-5, rotary_pct=0.25, tie_head=False, attn_bias=True,
                        mlp_bias=True, parallel=True),
    "smollm2": Config(vocab_size=49_152, n_layer=30, n_embd=576, n_head=9, n_kv_head=3, head_dim=64, n_hidden=1536,
                      n_ctx=8192, arch="llama", norm_eps=1e-5, rope_theta=100_000.0),
}


def write_random_checkpoint(config: Config, folder: Path, layers_per_shard: int = 6) -> None:
    """A Gemma checkpoint of these shapes in sharded bf16, random weights, with the shipped donor's tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes, weight_map, generator = hf_shapes(config), {}, torch.Generator().manual_seed(0)
    shard_of = {n: int(n.split(".")[2]) // layers_per_shard + 1 if ".layers." in n else 0 for n in shapes}
    last = max(shard_of.values())
    for shard in range(last + 1):
        file = f"model-{shard + 1:05d}-of-{last + 1:05d}.safetensors"
        names = [n for n in shapes if shard_of[n] == shard]
        save_file({n: (torch.randn(shapes[n], generator=generator) * 0.02).bfloat16() for n in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    hf = hf_config(config, torch.bfloat16)
    (folder / "config.json").write_text(json.dumps(hf))
    copy_tokenizer(HERE / "assets/donor", folder)


def bench_scale(config: BenchConfig) -> dict:
    """Seconds and peak memory of `convert.py --loops=2 --init=average --rank=512` on Gemma 2B's shapes."""
    with tempfile.TemporaryDirectory(dir=config.tmp) as tmp:
        donor, out = Path(tmp) / "donor", Path(tmp) / "recursive"
        write_random_checkpoint(GEMMA_2B, donor)
        began = time.perf_counter()
        flags = [f"--donor={donor}", "--loops=2", "--init=average", "--rank=512", f"--out={out}"]
        subprocess.run([sys.executable, HERE / "convert.py", *flags], check=True)
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        written = sum(p.stat().st_size for p in out.iterdir()) / 2**30
    print(table([["Gemma 2B shapes, 2 loops, average, rank 512", ""], ["seconds", f"{seconds:.0f}"],
                 ["peak memory", f"{peak:.2f} GiB"], ["written", f"{written:.2f} GiB"]]))
    return {"seconds": seconds, "peak_gib": peak, "written_gib": written}


# ---------------------------------------------------------------------------------------------------------------------
# Training: every case in a process of its own, so that its memory is its own, and given back

def shape_of(config: BenchConfig) -> Config:
    """The full-size model to train. Raises UserError for settings that nothing can be measured with."""
    for name in ("seq_len", "micro_batch", "steps", "rounds"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name}={getattr(config, name)} must be positive")
    shape = SHAPES.get(config.shape) or donor_config(find_donor(config.donor))
    if not 0 <= config.layers <= shape.n_layer:
        raise UserError(f"--layers={config.layers}, but --shape={config.shape} has {shape.n_layer} of them; "
                        f"use 1 to {shape.n_layer}, or 0 for all")
    return replace(shape, n_layer=config.layers or shape.n_layer, n_loop=1, rank=0)


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


def measure_in_turn(measure: Callable, cases: list[dict], config: BenchConfig, shape: Config) -> None:
    """Add to each case what `measure` finds, tokens_per_s of its median step and mfu; or why there is nothing. The
    cases are gone through config.rounds times, so that a noisy machine disturbs them all alike."""
    device = pick_device(config.device)
    peak, tokens = peak_flops(device, device.type == "cuda"), config.micro_batch * config.seq_len
    for case in progress(cases * config.rounds, desc="cases", unit="case"):
        if "error" not in case:
            new = apart(measure, config, shape, dict(case))
            case.update(new | {"seconds": sorted(case.get("seconds", []) + new.get("seconds", []))})
    for case in cases:
        if "error" not in case:
            speed = tokens / case["seconds"][len(case["seconds"]) // 2]
            case |= {"tokens_per_s": speed, "mfu": peak and speed * case["flops_per_token"] / peak}


def time_steps(step: Callable[[], Tensor], config: BenchConfig, device: torch.device) -> dict:
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
        return naive_loss(logits, targets, teacher and widen(F.linear(*teacher)))


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
        return naive_loss(widen(self.model(input_ids=idx, use_cache=False).logits), targets, widen(F.linear(*teacher)))


def naive_loss(logits: Tensor, targets: Tensor, teacher_logits: Tensor | None) -> tuple[Tensor, Tensor]:
    ce = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss = ce if teacher_logits is None else ce + distill_loss(logits, teacher_logits, "fkl")
    return loss, ce.detach()[None]


def measure_training(config: BenchConfig, shape: Config, case: dict) -> dict:
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


def bench_train(config: BenchConfig) -> dict:
    """Tokens/s, MFU and peak memory of a training step: transformers, ours at full size, ours looped, with the loss in
    chunks and with the naive one, without and with distillation from a frozen full-size teacher."""
    shape = shape_of(config)
    with torch.device("meta"):
        forward = RecursiveTransformer(shape).flops(config.seq_len)
    looped = list(itertools.product(by_comma("loops", config.loops), by_comma("ranks", config.ranks)))
    for loops, rank in looped:
        replace(shape, n_loop=loops, rank=rank)                              # refuses now what cannot be built later
    cases = []
    for distill, compiled in itertools.product((False, True), (False, True)[:1 + config.compile]):
        how = {"distill": distill, "compile": compiled,                      # looped or not, the same layers run
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
    tokens = config.micro_batch * config.seq_len
    print(f"{tokens} tokens a step\n{table(lines)}")
    return {"shape": asdict(shape), "tokens_per_step": tokens, "rows": cases}


def separate(linear: RelaxedLinear, x: Tensor, loop: int) -> Tensor:
    """What `RelaxedLinear` computes, with the LoRA as a path of its own however many tokens there are."""
    bias = None if linear.bias is None else of_loop(linear.bias, loop)
    return F.linear(x, linear.weight, bias) + F.linear(F.linear(x, linear.lora_a[loop]), linear.lora_b[loop])


def measure_layer(config: BenchConfig, shape: Config, case: dict) -> dict:
    """`time_steps` of forward and backward through one layer of two loops; its "loss" is the sum of what comes out."""
    device = pick_device(config.device)
    torch.manual_seed(0)
    with device:
        layer = Layer(replace(shape, n_layer=2, n_loop=2, rank=case["rank"]))
        x = torch.randn(config.micro_batch, config.seq_len, shape.n_embd, requires_grad=True)  # (B, T, C)
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


def bench_lora(config: BenchConfig) -> dict:
    """Tokens/s of a training step through one layer: what each LoRA rank adds to rank 0, merged into W' as in
    `RelaxedLinear` (where there are many tokens) and as a path of its own beside it."""
    shape = shape_of(config)
    ranks = [rank for rank in by_comma("ranks", config.ranks) if rank]
    for rank in ranks:
        replace(shape, rank=rank)                                            # refuses a negative one
    with torch.device("meta"):
        flops = 3 * RecursiveTransformer(replace(shape, n_layer=1)).flops(config.seq_len, n_exits=0)
    cases = [{"rank": rank, "path": path, "flops_per_token": flops}
             for rank, path in [(0, "merged"), *itertools.product(ranks, ("merged", "separate"))]]
    measure_in_turn(measure_layer, cases, config, shape)
    first = next((case["tokens_per_s"] for case in cases if "error" not in case), 1.0)
    lines = [["path", "rank", "tok/s", "of first", "mfu", "peak memory"]]
    lines += [[case["path"], case["rank"], *speeds(case, first)] for case in cases]
    tokens = config.micro_batch * config.seq_len
    print(f"{tokens} tokens a step\n{table(lines)}")
    return {"shape": asdict(shape), "tokens_per_step": tokens, "rows": cases}


def main(argv=None):
    config = parse_args(BenchConfig, argv)
    benches = {"convert": bench_convert, "svd": bench_svd, "scale": bench_scale, "train": bench_train,
               "lora": bench_lora}
    numbers = benches[config.what](config)
    line = json.dumps({"what": config.what, "settings": asdict(config)} | run_info() | numbers)
    print(line)
    if config.save:
        with open(config.save, "a") as f:
            f.write(line + "\n")


if __name__ == "__main__":
    script(main)
