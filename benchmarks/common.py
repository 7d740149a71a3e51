"""What several benchmarks share: model shapes, checks of settings, timing, and how results are printed and saved."""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from typing import Literal

import torch
from torch import Tensor

from lib.cli import UserError, progress
from lib.donors import find_donor
from lib.results import append_line, check_writable, json_line
from lib.system import peak_flops, peak_memory, pick_device, run_info
from model import Config, RecursiveTransformer
from train import donor_config

ShapeName = Literal["donor", "small", "gemma-2b", "tinyllama", "pythia-1b", "smollm2"]
SHAPES = {
    "small": Config(vocab_size=32_768, n_layer=12, n_embd=1024, n_head=8, n_kv_head=1, head_dim=128, n_hidden=4096,
                    n_ctx=2048),
    "gemma-2b": Config(vocab_size=256_000, n_layer=18, n_embd=2048, n_head=8, n_kv_head=1, head_dim=256,
                       n_hidden=16384, n_ctx=8192),
    "tinyllama": Config(vocab_size=32_000, n_layer=22, n_embd=2048, n_head=32, n_kv_head=4, head_dim=64, n_hidden=5632,
                        n_ctx=2048, arch="llama", norm_eps=1e-5, tie_head=False),
    "pythia-1b": Config(vocab_size=50_304, n_layer=16, n_embd=2048, n_head=8, n_kv_head=8, head_dim=256, n_hidden=8192,
                        n_ctx=2048, arch="gpt_neox", norm_eps=1e-5, rotary_pct=0.25, tie_head=False, attn_bias=True,
                        mlp_bias=True, parallel=True),
    "smollm2": Config(vocab_size=49_152, n_layer=30, n_embd=576, n_head=9, n_kv_head=3, head_dim=64, n_hidden=1536,
                      n_ctx=8192, arch="llama", norm_eps=1e-5, rope_theta=100_000.0),
}


# ---------------------------------------------------------------------------------------------------------------------
# Settings, and results

def load_shape(name: ShapeName, donor: str, layers: int = 0, vocab: int = 0) -> Config:
    """The full-size model's shape: one of SHAPES, or the donor's, with so many layers and tokens (0 = all of them).
    Raises UserError for numbers that are out of range."""
    shape = SHAPES.get(name) or donor_config(find_donor(donor))
    if not 0 <= layers <= shape.n_layer:
        raise UserError(f"--layers={layers}, but --shape={name} has {shape.n_layer} of them; "
                        f"use 1 to {shape.n_layer}, or 0 for all")
    if vocab < 0:
        raise UserError(f"--vocab={vocab} must be 0 or more, the vocabulary size; 0 = the shape's")
    return replace(with_layers(shape, layers or shape.n_layer), n_loop=1, rank=0, vocab_size=vocab or shape.vocab_size)


def with_layers(shape: Config, n: int, **changes) -> Config:
    """The shape with its first n layers."""
    return replace(shape, n_layer=n, no_rope=[i for i in shape.no_rope or () if i < n] or None, **changes)


def random_model(shape: Config, device: torch.device, dtype: torch.dtype) -> RecursiveTransformer:
    """Random weights, B of LoRA (which starts at zero) included."""
    torch.manual_seed(0)
    with device:
        model = RecursiveTransformer(shape).to(dtype)
    for name, p in model.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(p, std=0.02)
    return model.eval().requires_grad_(False)


def by_comma(name: str, text: str, positive: bool = False) -> list[int]:
    """The whole numbers in the setting `name`. Raises UserError for other text, and if asked for numbers below 1."""
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        raise UserError(f"--{name}={text} must be whole numbers by comma; use for example --{name}=2,3") from None
    if positive and min(numbers) < 1:
        raise UserError(f"--{name}={text} must be positive")
    return numbers


def check_at_least(config, least: int, *names: str) -> None:
    """Raise UserError if one of these settings is below `least`, which is 0 or 1."""
    for name in names:
        if getattr(config, name) < least:
            raise UserError(f"--{name}={getattr(config, name)} must be {'positive' if least else '0 or more'}")


def check_ckpt_or_shape(config) -> None:
    """Raise UserError if settings of random weights are given beside --ckpt, which has its own shape."""
    for name in ("shape", "layers", "vocab"):
        value = getattr(config, name)
        if config.ckpt and value != getattr(type(config), name):
            raise UserError(f"--{name}={value} describes random weights, and --ckpt={config.ckpt} has its own: give "
                            "one of the two")


def run_and_publish(what: str, config, bench: Callable) -> None:
    """Run bench(config) -> results, if --save could be written, and publish what it found."""
    check_writable("save", config.save)
    publish(what, config, bench(config))


def publish(what: str, config, results: dict) -> None:
    """Print the results as one JSON line with the settings, the hardware and the versions; append it to --save."""
    line = {"what": what, "settings": asdict(config)} | run_info() | results
    print(json_line(line))
    if config.save:
        append_line(config.save, line)


# ---------------------------------------------------------------------------------------------------------------------
# Timing

def synchronize(device: torch.device) -> None:
    """Wait for a GPU to finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_in_turn(works: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, float]:
    """Median microseconds of each function. Each round calls every one of them once, so that noise affects them alike;
    two more rounds come first as warm-up."""
    seconds = {name: [] for name in works}
    for _ in range(rounds + 2):
        for name, work in works.items():
            synchronize(device)
            began = time.perf_counter()
            work()
            synchronize(device)
            seconds[name].append(time.perf_counter() - began)
    return {name: 1e6 * statistics.median(s[2:]) for name, s in seconds.items()}


def copy_bandwidth(device: torch.device, mib: int = 256) -> float:
    """Bytes/s, read and written, of copying a tensor too large for any cache."""
    a = torch.empty(mib * 2**20 * (8 if device.type == "cuda" else 1), dtype=torch.uint8, device=device).fill_(1)
    b = torch.empty_like(a)
    return 2e6 * len(a) / time_in_turn({"copy": lambda: b.copy_(a)}, 5, device)["copy"]


# ---------------------------------------------------------------------------------------------------------------------
# Training steps: each case is measured in its own process, so that its peak memory is its own and is freed afterwards

def run_in_subprocess(measure: Callable, *args) -> dict:
    """measure(*args) from a new process, or {"error": ...} if it runs out of memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure, *args).result()
        except BrokenProcessPool:
            return {"error": "killed"}                       # what Linux does to a process that takes too much memory
        except RuntimeError as e:                            # on a GPU an OutOfMemoryError, on a CPU just this
            if "allocate" not in str(e):
                raise
            return {"error": "out of memory"}


def measure_in_turn(measure: Callable, cases: list[dict], config, shape: Config) -> None:
    """Add to each case the results of `measure`, and tokens_per_s and mfu of its median step; or an "error". Each of
    config.rounds rounds measures every case once, so that noise affects them alike; their seconds are pooled."""
    device = pick_device(config.device)
    peak = peak_flops(device, device.type == "cuda")
    for case in progress(cases * config.rounds, desc="cases", unit="case"):
        if "error" not in case:
            new = run_in_subprocess(measure, config, shape, dict(case))
            case.update(new | {"seconds": sorted(case.get("seconds", []) + new.get("seconds", []))})
    for case in cases:
        if "error" not in case:
            speed = case["tokens"] / statistics.median(case["seconds"])
            case |= {"tokens_per_s": speed, "mfu": peak and speed * case["flops_per_token"] / peak}


def time_steps(step: Callable[[], Tensor], n_steps: int, device: torch.device) -> dict:
    """Seconds of each of n_steps calls of `step` after two for warm-up, the last loss, and the peak of memory."""
    seconds = []
    for _ in range(n_steps + 2):
        synchronize(device)
        began = time.perf_counter()
        loss = step()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds[2:], "loss": loss.item(), "peak_gib": peak_memory(device)}


def speed_cells(case: dict, reference: float) -> list[str]:
    """The last four cells of a case's table row: tokens/s, the same as a multiple of `reference`, MFU, peak memory."""
    if "error" in case:
        return [case["error"], "", "", ""]
    return [f"{case['tokens_per_s']:,.0f}", f"{case['tokens_per_s'] / reference:.2f}",
            f"{case['mfu']:.0%}" if case["mfu"] else "", f"{case['peak_gib']:.2f} GiB"]
