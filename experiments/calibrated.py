"""Losses on several texts right after conversion, without training: average + SVD, calibrated, and plain low rank that
stores as much and shares nothing.

    python -m experiments.calibrated --donor=FOLDER --calib_text=SHARDS --texts=books=SHARDS/valid,other=FILE.jsonl

Prints one JSON line per case: loss at each exit on every text, the error (C1) by round, seconds and memory.
"""

import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import product

import torch

from calibrate import calibrate, calibration_windows, collect_stats, mean_errors
from convert import load_full, to_recursive
from experiments.low_rank import stored_block, to_low_rank, weighted_svds
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
    calib_text: str = "assets/books/train"  # text to calibrate on
    calib_tokens: str = "20480"            # tokens of it, several separated by commas
    texts: str = "books=assets/books/valid.txt"  # name=text to measure the loss on, several separated by commas
    tokens: int = 16_384                   # tokens of each of them
    seq_len: int = 256                     # tokens per window
    loops: str = "2"                       # numbers of loops, separated by commas
    ranks: str = "0,16,32,64"              # LoRA ranks, separated by commas
    vectors: str = "tied"                  # norm weights and biases: tied, per_loop, or both separated by a comma
    rounds: int = 8                        # of the fit, at most
    inits: str = "average,calibrated,low_rank"  # only these, by comma
    device: str = "auto"                   # auto, cpu, cuda
    save: str | None = None                # file to append the lines to


def read_texts(args: CaseConfig, tokenizer: Tokenizer, vocab_size: int) -> dict[str, list]:
    """name -> batches of (idx, targets) of each text in --texts."""
    texts = {}
    for name, path in (text.split("=") for text in args.texts.split(",")):
        tokens = load_tokens(path, tokenizer, vocab_size)
        n_windows = min(args.tokens, len(tokens) - 1) // args.seq_len
        idx, targets = batch(tokens, range(n_windows), args.seq_len, seed=7)
        texts[name] = list(zip(idx.split(4), targets.split(4), strict=True))
    return texts


def losses(model, texts: dict[str, list], procs: Processes) -> dict[str, list[float]]:
    """Cross entropy at each exit, on each text."""
    return {name: evaluate(model, pairs, procs, nullcontext(), range(model.config.n_loop))
            for name, pairs in texts.items()}


def main(argv=None) -> None:
    args = parse_args(CaseConfig, argv)
    procs = start_processes(args.device)
    full = load_full(args.donor, torch.float32).to(procs.device)
    V = full.config.vocab_size
    tokenizer = Tokenizer.load(find_donor(args.donor), V)
    texts, calib_text = read_texts(args, tokenizer, V), load_tokens(args.calib_text, tokenizer, V)
    loops, ranks, counts = ([int(n) for n in given.split(",")] for given in (args.loops, args.ranks, args.calib_tokens))
    cases, inits = list(product(loops, ranks, args.vectors.split(","))), args.inits.split(",")
    common = {"what": "calibrated", "settings": asdict(args), **run_info(), "donor_loss": losses(full, texts, procs)}
    print0(f"donor: {common['donor_loss']}")

    def report(**line) -> None:
        print0(" ".join(f"{k} {v}" for k, v in line.items()))
        if args.save:
            append_line(args.save, common | line)

    for n_loop, rank, vectors in cases if "average" in inits else ():
        model = to_recursive(full, n_loop, "average", rank, vectors=vectors)
        report(init="average", loops=n_loop, rank=rank, vectors=vectors, loss=losses(model, texts, procs))
    for n in counts:
        start = time.perf_counter()
        stats = collect_stats(full, calibration_windows(calib_text, n, full.config, args.calib_text))
        reading_s = time.perf_counter() - start
        svds = weighted_svds(full, stats) if "low_rank" in inits else {}
        for n_loop, rank, vectors in cases if svds else ():
            size = stored_block(replace(full.config, n_loop=n_loop, rank=rank, vectors=vectors))
            model = to_low_rank(full, svds, size)
            report(init="low_rank", loops=n_loop, rank=rank, vectors=vectors, calib_tokens=n,
                   loss=losses(model, texts, procs))
        for n_loop, rank, vectors in cases if "calibrated" in inits else ():
            start, errors = time.perf_counter(), {}
            model = calibrate(full, stats, n_loop, rank, vectors, args.rounds, report=errors)
            fitting_s = time.perf_counter() - start
            report(init="calibrated", loops=n_loop, rank=rank, vectors=vectors, calib_tokens=n,
                   loss=losses(model, texts, procs), errors=mean_errors([e for kind in errors.values() for e in kind]),
                   reading_s=reading_s, fitting_s=fitting_s, peak_gib=peak_memory(procs.device))


if __name__ == "__main__":
    script(main)
