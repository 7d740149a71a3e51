"""How good a model is after each of its loops, and what early exits cost and save, on any text. (Tasks: harness.py.)

    python evaluate.py --ckpt=out --text=assets/books/valid.txt
    python evaluate.py --ckpt=out --text=pg19#test --seq_len=2048 --stride=512 --tokens=1e6
    python evaluate.py --ckpt=out --plot=results/exits.png --save=results/exits.jsonl
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from exits import SCORED, Gate, Rule, observe, outcome, read_thresholds, statistics
from hf import load_any
from lib.cli import UserError, parse_args, print0, progress, script, table
from lib.data import IGNORE, count_windows, load_tokens, windows
from lib.donors import find_donor
from lib.folders import GATE_FILE
from lib.results import append_line, check_plot, check_writable, json_line
from lib.system import pick_device, run_info
from lib.tokenizer import Tokenizer
from model import RecursiveTransformer


@dataclass
class EvaluateConfig:
    ckpt: str = "out"                      # checkpoint: one of ours, or a Hugging Face folder or id
    text: str = "assets/books/valid.txt"   # texts, token shards, or slimpajama, redpajama, pg19#test, owner/name#split
    tokens: int = 16_384                   # tokens of it, in windows spread evenly; of a data set by name the first
    seq_len: int = 256                     # tokens in a window
    stride: int | None = None              # tokens that a window is ahead of the last; not set: all, side by side
    rules: str = "max_prob,margin,entropy,gate"  # exit rules, by comma; the gate if the checkpoint has one
    keys: str = "exact,copy"               # keys of tokens that left, by comma; copied ones take a pass per threshold
    thresholds: str = ""                   # scores from which tokens leave, by comma; empty: nine, spread over them
    plot: str | None = None                # write a plot of agreement against mean loops to this file
    save: str | None = None                # also append the JSON line to this file
    device: str = "auto"                   # auto, cpu, cuda


def by_comma(name: str, text: str, allowed: Sequence[str]) -> list[str]:
    given = list(dict.fromkeys(text.split(",")))
    for word in given:
        if word not in allowed:
            raise UserError(f"--{name}={text}: {word!r} is unknown; use {', '.join(allowed)}, several by comma")
    return given


def check_settings(config: EvaluateConfig) -> list[float]:
    """The thresholds given. UserError for what would otherwise only show after minutes of work."""
    if config.seq_len < 1:
        raise UserError(f"--seq_len={config.seq_len} must be at least 1")
    if config.stride is not None and not 1 <= config.stride <= config.seq_len:
        raise UserError(f"--stride={config.stride} must be 1 to --seq_len={config.seq_len}: between wider ones tokens "
                        "would be left out")
    check_plot(config.plot)
    check_writable("save", config.save)
    try:
        given = [float(word) for word in config.thresholds.split(",")] if config.thresholds else []
    except ValueError:
        raise UserError(f"--thresholds={config.thresholds} must be numbers by comma, as 0.5,0.9") from None
    if not all(0 <= t <= 1 for t in given):
        raise UserError(f"--thresholds={config.thresholds} are out of range: scores are between 0 and 1")
    return given


def window(config: EvaluateConfig, model: RecursiveTransformer) -> tuple[int, int]:
    """(tokens in a window, tokens from one to the next), which the model's context bounds."""
    seq_len = min(config.seq_len, model.config.n_ctx)
    return seq_len, min(config.stride or seq_len, seq_len)


def read_text(config: EvaluateConfig, model: RecursiveTransformer, tokenizer: Tokenizer) -> list:
    """Batches of windows, inputs and targets (<= 8, seq_len), spread evenly over the text.

    With a stride below seq_len a window's first tokens are there to be seen, not counted: their targets are IGNORE.
    """
    seq_len, stride = window(config, model)
    if config.tokens < seq_len:
        raise UserError(f"--tokens={config.tokens} is less than one window; use --tokens={seq_len} or more")
    tokens = load_tokens(config.text, tokenizer, model.config.vocab_size,
                         hub_tokens=config.tokens + 2)       # a target for the last, and EOS
    there = count_windows(tokens, seq_len, stride)
    n = min((config.tokens - seq_len) // stride + 1, there)
    spread = [i * there // n for i in range(n)]
    return [windows(tokens, seq_len, spread[i:i + 8], stride) for i in range(0, n, 8)]


def count_bytes(pairs: list, tokenizer: Tokenizer) -> int:
    """How many bytes of text the targets are that count; those that end a text are none."""
    lengths = torch.from_numpy(tokenizer.byte_lengths())
    return sum(lengths[targets[targets != IGNORE]].sum().item() for _, targets in pairs)


def find_thresholds(scores: Tensor, given: list[float], calibrated: float | None) -> list[float]:
    """The thresholds to try for a rule: those given, or those at which a tenth, two tenths, ... of its scores let a
    token leave; and the one that was calibrated."""
    if not given:
        given = np.quantile(scores.double().cpu(), np.linspace(0.9, 0.1, 9)).tolist()    # torch's has a limit
    return sorted({*given, calibrated} - {None}, reverse=True)


def evaluate_exits(model: RecursiveTransformer, pairs: list, rules: list[Rule], policies: list[str],
                   given: list[float], calibrated: dict) -> dict:
    """Loss at each exit, and a row of `statistics` for each rule, threshold and policy for keys.

    calibrated: what `read_thresholds` found.
    """
    seen, rows = observe(model, pairs, rules), []
    ce = seen.ce.double().mean(1).tolist()
    oracle = {"rule": "oracle", "keys": "exact", "threshold": None} | statistics(seen.at(seen.oracle), seen)
    found = {keys: calibrated.get(keys, {}).get("thresholds", {}) for keys in policies}
    work = [(keys, rule, threshold) for keys in policies for rule in rules
            for threshold in find_thresholds(seen.score[rule.name], given, found[keys].get(rule.name))]
    for keys, rule, threshold in progress(work, desc="thresholds", unit="pass"):
        out = outcome(model, pairs, seen, replace(rule, threshold=threshold), keys)
        promise = calibrated[keys].get("agreement") if found[keys].get(rule.name) == threshold else None
        rows.append({"rule": rule.name, "keys": keys, "threshold": threshold, "calibrated_for": promise}
                    | statistics(out, seen))
    return {"tokens": seen.ce.size(1), "exit_loss": ce, "rows": [oracle, *rows]}


def show(numbers: dict) -> str:
    exits = [["after loop", "loss", "perplexity", "bits per byte"]]
    exits += [[i + 1, f"{ce:.4f}", f"{math.exp(min(ce, 700)):.2f}", f"{bits:.4f}"]
              for i, (ce, bits) in enumerate(zip(numbers["exit_loss"], numbers["bits_per_byte"], strict=True))]
    lines = [["rule", "keys", "threshold", "mean loops", "left after each", "agreement", "perplexity", "caught", ""]]
    for row in numbers["rows"]:
        lines.append([row["rule"], row["keys"], "" if row["threshold"] is None else f"{row['threshold']:.4f}",
                      f"{row['loops']:.3f}", " ".join(f"{share:.0%}" for share in row["left_at"]),
                      f"{row['agreement']:.4f}", f"{row['perplexity']:.2f}", f"{row['caught']:.0%}",
                      f"calibrated for {row['calibrated_for']}" if row.get("calibrated_for") else ""])
    return f"{table(exits)}\n\n{table(lines)}" if len(exits) > 2 else table(exits)


def plot(numbers: dict, path: str) -> None:
    """Agreement with the full model against mean loops: a line per rule, dashed for copied keys, a star the oracle."""
    from matplotlib.figure import Figure  # check_settings has tried

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    oracle, *rows = numbers["rows"]
    names = list(dict.fromkeys(row["rule"] for row in rows))
    for (name, keys) in dict.fromkeys((row["rule"], row["keys"]) for row in rows):
        points = sorted((r["loops"], r["agreement"]) for r in rows if (r["rule"], r["keys"]) == (name, keys))
        axes.plot(*zip(*points, strict=True), "o-" if keys == "exact" else "x--", color=f"C{names.index(name)}",
                  markersize=4, label=f"{name}, {keys} keys")
    axes.plot(oracle["loops"], 1, "k*", markersize=12, label="oracle")
    axes.set(xlabel=f"mean loops of {len(numbers['exit_loss'])}", ylabel="share of tokens as at full depth")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main(argv=None) -> None:
    config = parse_args(EvaluateConfig, argv)
    names = by_comma("rules", config.rules, SCORED)
    policies = by_comma("keys", config.keys, ("exact", "copy"))
    given, device = check_settings(config), pick_device(config.device)
    folder = find_donor(config.ckpt)
    model = load_any(folder, None if device.type == "cuda" else torch.float32).to(device)
    if model.config.n_loop == 1:
        if config.plot:
            raise UserError(f"{config.ckpt} has 1 loop, so there are no exits to plot: leave out --plot")
        names = []
        print0(f"{config.ckpt} has 1 loop: nothing can leave before the last")
    if "gate" in names and config.rules == EvaluateConfig.rules and not (folder / GATE_FILE).exists():
        names.remove("gate")
        print0(f"{config.ckpt} has no gate yet: python exits.py --ckpt={config.ckpt} trains one")
    rules = [Rule(name, gate=Gate.load(folder, model) if name == "gate" else None) for name in names]
    tokenizer, calibrated = Tokenizer.load(folder, model.config.vocab_size), read_thresholds(folder)
    pairs = read_text(config, model, tokenizer)
    (size, stride), number = window(config, model), sum(len(idx) for idx, _ in pairs)
    n_bytes = max(1, count_bytes(pairs, tokenizer))
    numbers = {"windows": number, "window": size, "stride": stride, "bytes": n_bytes}
    numbers |= evaluate_exits(model, pairs, rules, policies, given, calibrated)
    numbers["bits_per_byte"] = [ce / math.log(2) * numbers["tokens"] / n_bytes for ce in numbers["exit_loss"]]
    print0(f"{config.text}: {numbers['tokens']:,} tokens ({n_bytes:,} bytes) in {number} windows of {size}, stride "
           f"{stride}\n")
    print0(show(numbers))
    numbers = {"what": "evaluate", "settings": asdict(config)} | run_info() | numbers
    print0(json_line(numbers))
    if config.save:
        append_line(config.save, numbers)
    if config.plot:
        plot(numbers, config.plot)


if __name__ == "__main__":
    script(main)
