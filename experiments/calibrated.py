"""Calibrated conversion (calibrate.py) beside the paper's average + SVD, right after conversion, without any training.

    python runs/calibrated.py --donor=FOLDER --calib_text=SHARDS --texts=books=SHARDS/valid,other=FILE.jsonl

One line of JSON for each case: the loss at each exit on every text, the error (1) by round, seconds and memory.
"""

import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from calibrate import calibrate, calibration_windows, collect_stats, mean_errors
from convert import load_full, to_recursive
from lib.cli import parse_args, print0, script
from lib.data import batch, load_tokens
from lib.donors import find_donor
from lib.results import append_line
from lib.system import Processes, peak_memory, run_info, start_processes
from lib.tokenizer import Tokenizer
from train import evaluate


@dataclass
class CaseConfig:
    donor: str = "assets/donor"            # full-size model: a folder or a Hugging Face id
    calib_text: str = "assets/books/train"  # what calibration reads
    calib_tokens: str = "20480"            # how much of it, several by comma
    texts: str = "books=assets/books/valid.txt"  # name=text to test on, several by comma
    tokens: int = 16_384                   # of each of them
    seq_len: int = 256                     # tokens per window of them
    loops: str = "2"                       # numbers of loops, by comma
    ranks: str = "0,16,32,64"              # LoRA ranks, by comma
    vectors: str = "tied"                  # norm weights and biases: tied, per_loop, or both by comma
    rounds: int = 8                        # at most
    device: str = "auto"                   # auto, cpu, cuda
    save: str | None = None                # file to add the lines to


def losses(model, texts: dict, procs: Processes) -> dict[str, list[float]]:
    """Cross entropy at each exit, on each text."""
    return {name: evaluate(model, pairs, procs, nullcontext(), range(model.config.n_loop))
            for name, pairs in texts.items()}


def main(argv=None) -> None:
    args = parse_args(CaseConfig, argv)
    procs = start_processes(args.device)
    full = load_full(args.donor, torch.float32).to(procs.device)
    tokenizer, V = Tokenizer.load(find_donor(args.donor), full.config.vocab_size), full.config.vocab_size
    texts = {}
    for name, path in (part.split("=") for part in args.texts.split(",")):
        tokens = load_tokens(path, tokenizer, V)
        idx, targets = batch(tokens, range(min(args.tokens, len(tokens) - 1) // args.seq_len), args.seq_len, seed=7)
        texts[name] = list(zip(idx.split(4), targets.split(4), strict=True))
    calibration = load_tokens(args.calib_text, tokenizer, V)
    numbers = [[int(n) for n in given.split(",")] for given in (args.loops, args.ranks, args.calib_tokens)]
    common = {"what": "calibrated", "settings": asdict(args), **run_info(), "donor_loss": losses(full, texts, procs)}
    print0(f"donor: {common['donor_loss']}")

    def report(**line) -> None:
        print0(" ".join(f"{k} {v}" for k, v in line.items()))
        if args.save:
            append_line(args.save, common | line)

    for loops in numbers[0]:
        for rank in numbers[1]:
            for vectors in args.vectors.split(","):
                report(init="average", loops=loops, rank=rank, vectors=vectors,
                       loss=losses(to_recursive(full, loops, "average", rank, vectors=vectors), texts, procs))
    for n in numbers[2]:
        began = time.perf_counter()
        seen = collect_stats(full, calibration_windows(calibration, n, full.config, args.calib_text))
        reading = time.perf_counter() - began
        for loops in numbers[0]:
            for rank in numbers[1]:
                for vectors in args.vectors.split(","):
                    began, errors = time.perf_counter(), {}
                    model = calibrate(full, seen, loops, rank, vectors, args.rounds, report=errors)
                    seconds = time.perf_counter() - began
                    report(init="calibrated", loops=loops, rank=rank, vectors=vectors, calib_tokens=n,
                           loss=losses(model, texts, procs),
                           errors=mean_errors([e for kind in errors.values() for e in kind]),
                           reading_s=reading, fitting_s=seconds, peak_gib=peak_memory(procs.device))


if __name__ == "__main__":
    script(main)
