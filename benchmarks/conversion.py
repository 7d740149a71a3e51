"""What conversion costs: the loss right after it, the seconds of its SVD, and of a large model as a whole.

    python -m benchmarks.conversion --donor=FOLDER --text=FILE      # the loss, beside the donor's and transformers'
    python -m benchmarks.conversion --measure=svd                   # our SVD of a residual beside torch.linalg.svd
    python -m benchmarks.conversion --measure=scale --tmp=FOLDER    # convert a checkpoint of Gemma 2B's exact shapes
"""

import importlib.util
import itertools
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.common import SHAPES, by_comma, check_at_least, run_and_publish
from convert import svd_factors, to_hf, to_recursive, unroll
from hf import hf_config, hf_shapes, load_full
from lib.cli import UserError, parse_args, progress, script, table
from lib.data import load_tokens, windows
from lib.donors import find_donor
from lib.tokenizer import Tokenizer, copy_tokenizer
from model import Config, RecursiveTransformer
from sample import generate

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class ConversionConfig:
    measure: Literal["loss", "svd", "scale"] = "loss"  # what is measured: see above
    donor: str = "assets/donor"            # loss: full-size model, a folder or a Hugging Face id
    text: str = "assets/books/valid.txt"   # loss: text whose loss is measured
    tokens: int = 16_384                   # loss: tokens of it, in windows spread evenly
    seq_len: int = 256                     # loss: tokens in a window
    loops: str = "2,3"                     # loss: numbers of loops, by comma
    inits: str = "stepwise,average,lower"  # loss: inits, by comma
    ranks: str = "0,16,64"                 # loss: LoRA ranks, by comma; "full" is full rank
    tmp: str | None = None                 # scale: folder with 10 GB to spare; not set = the system's
    save: str | None = None                # also append the JSON line to this file


# ---------------------------------------------------------------------------------------------------------------------
# The loss right after conversion

@torch.no_grad()
def mean_loss(logits_of, rows: list[tuple[Tensor, Tensor]]) -> float:
    """Mean cross entropy in nats of `logits_of(idx)` over windows, summed in fp64."""
    total = sum(F.cross_entropy(logits_of(idx).flatten(0, 1).float(), targets.flatten(), reduction="sum").double()
                for idx, targets in rows)
    return (total / sum(targets.numel() for _, targets in rows)).item()


def model_loss(model: RecursiveTransformer, rows: list[tuple[Tensor, Tensor]]) -> float:
    return mean_loss(lambda idx: model.logits(model(idx)[-1]), rows)


def bench_loss(config: ConversionConfig) -> dict:
    """Loss before any training for each number of loops, init, rank and kind of vectors, beside the donor's."""
    full = load_full(config.donor, torch.float32)
    folder = find_donor(config.donor)
    tokens = load_tokens(config.text, Tokenizer.load(folder, full.config.vocab_size), full.config.vocab_size)
    n, stride = config.tokens // config.seq_len, (len(tokens) - 1) // config.seq_len
    if not 0 < n <= stride:
        raise UserError(f"--tokens={config.tokens} in windows of {config.seq_len}: the text holds {stride} windows")
    rows = [windows(tokens, config.seq_len, [i * stride // n]) for i in range(n)]
    numbers = {"donor_loss": model_loss(full, rows), "tokens": n * config.seq_len, "rows": []}
    if not importlib.util.find_spec("transformers"):
        print("transformers is not installed: nothing to compare with", file=sys.stderr)
    else:
        numbers |= compare_with_transformers(full, folder, rows)
        print("transformers: " + ", ".join(f"{k} {v:.6g}" for k, v in numbers.items() if k != "rows"))
    full_rank = min(full.config.n_embd, full.config.n_hidden)
    ranks = by_comma("ranks", config.ranks.replace("full", str(full_rank)))
    cases = list(itertools.product(by_comma("loops", config.loops), config.inits.split(","), ("tied", "per_loop")))
    for loops, init, vectors in progress(cases, desc="conversions", unit="model"):
        largest = to_recursive(full, loops, init, max(ranks), vectors=vectors)
        for rank in ranks:
            model = reduce_rank(largest, rank)
            numbers["rows"].append({"loops": loops, "init": init, "rank": rank, "vectors": vectors,
                                    "loss": model_loss(model, rows), "stored": model.num_params()["stored"]})
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
    theirs.generation_config.eos_token_id = None                         # nothing ends ours either
    greedy = theirs.generate(prompt, max_new_tokens=64, do_sample=False)[0, 32:].tolist()
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


def reduce_rank(model: RecursiveTransformer, rank: int) -> RecursiveTransformer:
    """The same conversion at a smaller LoRA rank: singular vectors come largest first, so the first ones are kept."""
    with torch.device("meta"):
        smaller = RecursiveTransformer(replace(model.config, rank=rank))
    state = model.state_dict()
    smaller.load_state_dict({name: state[name][tuple(slice(n) for n in p.shape)]
                             for name, p in smaller.state_dict().items()}, assign=True)
    return smaller.eval()


# ---------------------------------------------------------------------------------------------------------------------
# The time of conversion

def bench_svd(config: ConversionConfig) -> dict:
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
    copy_tokenizer(ROOT / "assets/donor", folder)


def bench_scale(config: ConversionConfig) -> dict:
    """Seconds and peak memory of `convert.py --loops=2 --init=average --rank=512` on Gemma 2B's shapes."""
    with tempfile.TemporaryDirectory(dir=config.tmp) as tmp:
        donor, out = Path(tmp) / "donor", Path(tmp) / "recursive"
        write_random_checkpoint(SHAPES["gemma-2b"], donor)
        began = time.perf_counter()
        flags = [f"--donor={donor}", "--loops=2", "--init=average", "--rank=512", f"--out={out}"]
        subprocess.run([sys.executable, ROOT / "convert.py", *flags], check=True)
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        written = sum(p.stat().st_size for p in out.iterdir()) / 2**30
    print(table([["Gemma 2B shapes, 2 loops, average, rank 512", ""], ["seconds", f"{seconds:.0f}"],
                 ["peak memory", f"{peak:.2f} GiB"], ["written", f"{written:.2f} GiB"]]))
    return {"seconds": seconds, "peak_gib": peak, "written_gib": written}


def main(argv=None):
    config = parse_args(ConversionConfig, argv)
    check_at_least(config, 1, "tokens", "seq_len")
    what, bench = {"loss": ("convert", bench_loss), "svd": ("svd", bench_svd),
                   "scale": ("scale", bench_scale)}[config.measure]
    run_and_publish(what, config, bench)


if __name__ == "__main__":
    script(main)
