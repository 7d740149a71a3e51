"""Measure: a table for people, then one JSON line with hardware, versions, commit, settings and every number.

    python bench.py --what=convert --donor=FOLDER --text=FILE     # what conversion costs, against transformers
    python bench.py --what=svd                                    # our SVD of a residual against torch.linalg.svd
    python bench.py --what=scale                                  # convert a checkpoint of Gemma 2B's exact shapes
    python bench.py --what=tokenise --donor=FOLDER --text=FILES   # data.py beside the tokenizer's own batch encoding
    python bench.py --what=train --shape=gemma-2b --compile       # training: ours, transformers, the naive loss
    python bench.py --what=loss --shape=gemma-2b --micro_batch=16  # the loss alone, in chunks and naive
    python bench.py --what=lora --shape=tinyllama --micro_batch=16  # training a layer: LoRA merged against separate
    python bench.py --what=decision --shape=gemma-2b              # an exit decision by each rule beside a block pass
    python bench.py --what=batching --shape=small --loops=2 --ranks=0,64  # the engine: V0 to V5 on the same requests
    python bench.py --what=batching --simulate                    # the paper's simulation, from its own times
    python bench.py --what=decode                                 # one text after another, and transformers'
    python bench.py --what=kernels --shape=gemma-2b --loops=2     # rows at different loops, rung by rung
"""

import importlib.util
import itertools
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from bench_batching import bench_batching
from bench_decode import bench_decision, bench_decode, bench_kernels
from bench_simulate import bench_simulate
from bench_training import GEMMA_2B, bench_lora, bench_loss, bench_train, by_comma
from convert import svd_factors, to_hf, to_recursive, unroll
from hf import hf_config, hf_shapes, load_full
from lib.cli import UserError, parse_args, progress, script, table
from lib.data import Texts, load_tokens, windows, write_shards
from lib.donors import find_donor
from lib.results import append_line, check_writable, json_line
from lib.system import run_info
from lib.tokenizer import Tokenizer, copy_tokenizer
from model import Config, RecursiveTransformer
from sample import generate

HERE = Path(__file__).parent
What = Literal["convert", "svd", "scale", "tokenise", "train", "loss", "lora", "decision", "batching", "decode",
               "kernels"]


@dataclass
class BenchConfig:
    what: What = "convert"                 # which measurement
    donor: str = "assets/donor"            # convert, train, tokenise: full-size model, a folder or a Hugging Face id
    text: str = "assets/books/valid.txt"   # convert, tokenise: text whose loss is measured, or that is tokenised
    tokens: int = 16_384                   # convert: of that text, in windows spread evenly over it
    seq_len: int = 256                     # convert, train, loss, lora, decision: tokens in a window, in the context
    loops: str = "2,3"                     # convert, train: numbers of loops, by comma
    inits: str = "stepwise,average,lower"  # convert: inits, by comma
    ranks: str = "0,16,64"                 # convert, train, lora: LoRA ranks, by comma; "full" is full rank (convert)
    tmp: str | None = None                 # scale, tokenise: folder with 10 GB to spare; not set = the system's
    shape: Literal["donor", "small", "gemma-2b", "tinyllama", "pythia-1b", "smollm2"] = "donor"  # all below: of what
    vocab_sizes: str = "4096,256000"       # decision: sizes of the vocabulary, by comma
    vocab: int = 0                         # train, ..., kernels: words of the vocabulary; 0 = the shape's
    rows: str = "1,16"                     # decision, decode, kernels: rows that are decoded together, by comma
    layers: int = 0                        # train, decision: keep so many of its layers, for a small machine; 0 = all
    width: int = 0                         # loss: of the hidden states, for a small machine; 0 = the shape's
    micro_batch: int = 8                   # train, loss, lora: sequences in a step
    steps: int = 5                         # train, ..., kernels: steps that are timed, after two that are not
    rounds: int = 1                        # train, ..., decode, tokenise: times that all cases are gone through; pooled
    compile: bool = False                  # train: also with torch.compile, ours and transformers'
    ckpt: str | None = None                # batching, decode: a checkpoint of ours; not set = random weights of --shape
    slots: int = 8                         # batching: sequences at a time
    requests: int = 0                      # batching: how many are served; 0 = four for each slot (simulated: 20,000)
    prompt_len: int = 32                   # batching, decode: tokens of a prompt; batching: half to 1.5 times as many
    new_tokens: int = 64                   # batching, decode: tokens that follow; batching: half to 1.5 times as many
    mean_loops: float = 1.25               # batching: loops that tokens with drawn exits run on average
    exit_prob: float | None = None         # batching: the chance to leave after each early loop, instead of mean_loops
    variants: str = ""                     # batching: only these of V0, V1, ..., by comma; V1 and V3 among them
    exits: str = ""                        # batching: drawn, oracle, gate; not set = drawn, of a ckpt oracle,gate
    keys: str = "exact,copy"               # batching: keys of tokens that left, by comma
    refill: int = 1                        # batching: free slots that new prompts wait for, to run together
    head_rows: int = 0                     # batching: rows of the head where it is a stage; 0 = half the slots
    simulate: bool = False                 # batching: no engine, but the paper's simulation, from times of a pass
    times: str | None = None               # batching --simulate: JSON file of these times; not set = the paper's
    plot: str | None = None                # batching: draw tokens/s to this file
    device: str = "auto"                   # all from train on: auto, cpu, cuda
    save: str | None = None                # also append the JSON line to this file


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
    ours = [token.item() for token, _ in generate(full, prompt, 64, temperature=0)]
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
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}),
                                                          encoding="utf-8")
    hf = hf_config(config, torch.bfloat16)
    (folder / "config.json").write_text(json.dumps(hf), encoding="utf-8")
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
# How long tokenising takes

def bench_tokenise(config: BenchConfig) -> dict:
    """Tokens/s of data.py, from text files to shards on the disk, and of the tokenizer's own batch encoding alone, of
    the same documents in memory; in turns, medians over the rounds."""
    tokenizer, documents = Tokenizer.load(find_donor(config.donor)), list(Texts(config.text))
    seconds, total = {"tokenizer alone": [], "data.py": []}, 0
    for _ in progress(range(config.rounds), desc="rounds"):
        began = time.perf_counter()
        if tokenizer.fast:
            ids = tokenizer.fast.encode_batch(documents, add_special_tokens=False)
        else:
            ids = tokenizer.ranks.encode_ordinary_batch(documents, num_threads=os.cpu_count() or 1)
        seconds["tokenizer alone"].append(time.perf_counter() - began)
        del ids                                              # to free them is not what is measured
        with tempfile.TemporaryDirectory(dir=config.tmp) as tmp:
            began = time.perf_counter()
            total, _ = write_shards(config.text, tokenizer, Path(tmp) / "out", tokenizer.vocab_size)
            seconds["data.py"].append(time.perf_counter() - began)
    speed = {way: total / statistics.median(s) for way, s in seconds.items()}
    ratio = speed["data.py"] / speed["tokenizer alone"]
    lines = [["way", "tok/s", "of the first"], ["tokenizer alone", f"{speed['tokenizer alone']:,.0f}", "1.00"],
             ["data.py", f"{speed['data.py']:,.0f}", f"{ratio:.2f}"]]
    print(f"{len(documents):,} documents, {total:,} tokens\n{table(lines)}")
    return {"documents": len(documents), "tokens": total, "tokens_per_s": speed, "ratio": ratio, "seconds": seconds}


ONLY = {  # settings that would do nothing in other measurements, by those that they are for
    "convert": "inits", "loss": "width", "decision": "vocab_sizes", "scale tokenise": "tmp", "train decode": "compile",
    "batching decode": "ckpt prompt_len new_tokens",
    "batching": "slots requests mean_loops exit_prob variants exits keys refill head_rows simulate times plot"}


def check_settings(config: BenchConfig) -> None:
    """UserError for settings that cannot be or would silently do nothing, and for a --save that cannot be written."""
    def given(name):
        return getattr(config, name) != getattr(BenchConfig, name)
    for name in ("tokens", "seq_len", "micro_batch", "steps", "rounds", "slots", "prompt_len", "new_tokens"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name}={getattr(config, name)} must be positive")
    if not config.mean_loops >= 1:
        raise UserError(f"--mean_loops={config.mean_loops} must be 1 or more")
    if config.exit_prob is not None and not 0 <= config.exit_prob <= 1:
        raise UserError(f"--exit_prob={config.exit_prob} is a probability: 0 to 1")
    for name in ("requests", "head_rows", "vocab", "width"):
        if getattr(config, name) < 0:
            raise UserError(f"--{name}={getattr(config, name)} must be 0 or more")
    for measurements, names in ONLY.items():
        for name in names.split():
            if given(name) and config.what not in measurements.split():
                raise UserError(f"--{name}={getattr(config, name)} is for --what={' or '.join(measurements.split())}, "
                                f"and --what={config.what} does not read it: drop one of the two")
    if given("times") and not config.simulate:
        raise UserError(f"--times={config.times} is read by --simulate alone: give it as well")
    for other, name in itertools.product(("ckpt", "simulate"), ("shape", "layers", "vocab")):
        if given(other) and given(name):
            raise UserError(f"--{name}={getattr(config, name)} is of random weights, --{other} needs none: drop one")
    if config.simulate and (config.plot or config.ckpt):
        raise UserError("--simulate runs no model and draws nothing: leave out --ckpt and --plot")
    check_writable("save", config.save)


def main(argv=None):
    config = parse_args(BenchConfig, argv)
    check_settings(config)
    benches = {"tokenise": bench_tokenise, "convert": bench_convert, "svd": bench_svd, "scale": bench_scale,
               "train": bench_train, "loss": bench_loss, "lora": bench_lora, "decision": bench_decision,
               "batching": bench_simulate if config.simulate else bench_batching, "decode": bench_decode,
               "kernels": bench_kernels}
    numbers = benches[config.what](config)
    numbers = {"what": config.what, "settings": asdict(config)} | run_info() | numbers
    print(json_line(numbers))
    if config.save:
        append_line(config.save, numbers)


if __name__ == "__main__":
    script(main)
