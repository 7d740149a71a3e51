"""Loss and perplexity at each exit, and what exit rules cost and save, on any text. (Tasks: evaluation/harness.py.)

    python -m evaluation.perplexity --ckpt=out --text=assets/books/valid.txt
    python -m evaluation.perplexity --ckpt=out --text=pg19#test --seq_len=2048 --stride=512 --tokens=1e6
    python -m evaluation.perplexity --ckpt=out --plot=results/exits.png --save=results/exits.jsonl
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from exits import SCORED, Gate, Keys, Rule, apply_rule, check_keys, collect_exit_stats, read_thresholds, summarize
from hf import load_any
from lib.cli import UserError, parse_args, print0, progress, script, table
from lib.data import IGNORE, count_windows, load_tokens, windows
from lib.donors import find_donor
from lib.folders import GATE_FILE, settled
from lib.results import append_line, check_plot, check_writable, json_line
from lib.system import pick_device, run_info
from lib.tokenizer import Tokenizer
from model import RecursiveTransformer


@dataclass
class EvaluateConfig:
    ckpt: str = "out"                      # checkpoint: one of ours, or a Hugging Face folder or id
    text: str = "assets/books/valid.txt"   # texts, token shards, or slimpajama, redpajama, pg19#test, owner/name#split
    tokens: int = 16_384                   # how many, in windows spread evenly; of a data set by name the first ones
    seq_len: int = 256                     # tokens in a window
    stride: int | None = None              # tokens from one window to the next; not set: seq_len
    rules: str = "max_prob,margin,entropy,gate"  # exit rules, separated by commas; the gate if the checkpoint has one
    keys: str = "exact,copy"               # KV of exited tokens: recomputed (exact), copied (copy), or both
    thresholds: str = ""                   # scores from which tokens exit, separated by commas; empty: nine quantiles
    plot: str | None = None                # write a plot of agreement against mean loops to this file
    save: str | None = None                # also append the JSON line to this file
    device: str = "auto"                   # auto, cpu, cuda


def parse_names(name: str, text: str, allowed: Sequence[str]) -> list[str]:
    given = list(dict.fromkeys(text.split(",")))
    for word in given:
        if word not in allowed:
            raise UserError(f"--{name}={text}: {word!r} is unknown; use {', '.join(allowed)}, separated by commas")
    return given


def parse_thresholds(text: str) -> list[float]:
    try:
        given = [float(word) for word in text.split(",")] if text else []
    except ValueError:
        raise UserError(f"--thresholds={text} must be numbers separated by commas, as 0.5,0.9") from None
    if not all(0 <= t <= 1 for t in given):
        raise UserError(f"--thresholds={text} are out of range: scores are between 0 and 1")
    return given


def check_settings(config: EvaluateConfig) -> None:
    """UserError for what would otherwise only show after minutes of work."""
    if config.seq_len < 1:
        raise UserError(f"--seq_len={config.seq_len} must be at least 1")
    if config.stride is not None and not 1 <= config.stride <= config.seq_len:
        raise UserError(f"--stride={config.stride} must be 1 to --seq_len={config.seq_len}: a longer one "
                        "would leave tokens out")
    check_plot(config.plot)
    check_writable("save", config.save)


def window_size(config: EvaluateConfig, model: RecursiveTransformer) -> tuple[int, int]:
    """(tokens in a window, tokens from one window to the next), at most the model's context."""
    seq_len = min(config.seq_len, model.config.n_ctx)
    return seq_len, min(config.stride or seq_len, seq_len)


def read_text(config: EvaluateConfig, model: RecursiveTransformer, tokenizer: Tokenizer) -> list:
    """Batches of windows, inputs and targets (<= 8, seq_len), spread evenly over the text.

    With a stride below seq_len the first tokens of a window are context only: their targets are IGNORE.
    """
    seq_len, stride = window_size(config, model)
    if config.tokens < seq_len:
        raise UserError(f"--tokens={config.tokens} is less than one window; use --tokens={seq_len} or more")
    tokens = load_tokens(config.text, tokenizer, model.config.vocab_size,
                         hub_tokens=config.tokens + 2)       # a target for the last, and EOS
    there = count_windows(tokens, seq_len, stride)
    n = min((config.tokens - seq_len) // stride + 1, there)
    spread = [i * there // n for i in range(n)]
    return [windows(tokens, seq_len, spread[i:i + 8], stride) for i in range(0, n, 8)]


def count_bytes(pairs: list, tokenizer: Tokenizer) -> int:
    """Bytes of text of all targets that count; end-of-text tokens have none."""
    lengths = torch.from_numpy(tokenizer.byte_lengths())
    return sum(lengths[targets[targets != IGNORE]].sum().item() for _, targets in pairs)


def find_thresholds(scores: Tensor, given: list[float], calibrated: float | None) -> list[float]:
    """The thresholds to evaluate for a rule, from the strictest on: those given, or those from which on 10 %, 20 %, ...
    90 % of its scores let a token exit; and the calibrated one."""
    if not given:
        given = np.quantile(scores.double().cpu(), np.linspace(0.9, 0.1, 9)).tolist()    # torch.quantile: up to 2^24
    return sorted({*given, calibrated} - {None}, reverse=True)


def evaluate_exits(model: RecursiveTransformer, pairs: list, rules: list[Rule], policies: list[Keys],
                   given: list[float], calibrated: dict) -> dict:
    """Loss at each exit, and a row of `summarize` for the oracle and for each KV policy, rule and threshold.

    given: thresholds, or none. calibrated: what `read_thresholds` returns.
    """
    stats = collect_exit_stats(model, pairs, rules)
    rows = [{"rule": "oracle", "keys": "exact", "threshold": None} | summarize(stats.exit_at(stats.oracle), stats)]
    calibrated_at = {keys: calibrated.get(keys, {}).get("thresholds", {}) for keys in policies}
    work = [(keys, rule, threshold) for keys in policies for rule in rules
            for threshold in find_thresholds(stats.scores[rule.name], given, calibrated_at[keys].get(rule.name))]
    for keys, rule, threshold in progress(work, desc="thresholds", unit="pass"):
        result = apply_rule(model, pairs, stats, replace(rule, threshold=threshold), keys)
        is_calibrated = calibrated_at[keys].get(rule.name) == threshold
        rows.append({"rule": rule.name, "keys": keys, "threshold": threshold,
                     "calibrated_for": calibrated[keys].get("agreement") if is_calibrated else None}
                    | summarize(result, stats))
    return {"tokens": stats.ce.size(1), "exit_loss": stats.ce.double().mean(1).tolist(), "rows": rows}


def show(numbers: dict) -> str:
    exits = [["after loop", "loss", "perplexity", "bits per byte"]]
    exits += [[i + 1, f"{ce:.4f}", f"{math.exp(min(ce, 700)):.2f}", f"{bits:.4f}"]
              for i, (ce, bits) in enumerate(zip(numbers["exit_loss"], numbers["bits_per_byte"], strict=True))]
    lines = [["rule", "keys", "threshold", "mean loops", "exits by loop", "agreement", "perplexity", "caught", ""]]
    for row in numbers["rows"]:
        lines.append([row["rule"], row["keys"], "" if row["threshold"] is None else f"{row['threshold']:.4f}",
                      f"{row['loops']:.3f}", " ".join(f"{share:.0%}" for share in row["left_at"]),
                      f"{row['agreement']:.4f}", f"{row['perplexity']:.2f}", f"{row['caught']:.0%}",
                      f"calibrated for {row['calibrated_for']}" if row.get("calibrated_for") else ""])
    return f"{table(exits)}\n\n{table(lines)}" if len(exits) > 2 else table(exits)


def plot(numbers: dict, path: str) -> None:
    """Agreement with the full model against mean loops: a line per rule, dashed for copied KV; the oracle a star."""
    from matplotlib.figure import Figure  # check_plot has tried

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    oracle, *rows = numbers["rows"]
    names = list(dict.fromkeys(row["rule"] for row in rows))
    for (name, keys) in dict.fromkeys((row["rule"], row["keys"]) for row in rows):
        points = sorted((r["loops"], r["agreement"]) for r in rows if (r["rule"], r["keys"]) == (name, keys))
        axes.plot(*zip(*points, strict=True), "o-" if keys == "exact" else "x--", color=f"C{names.index(name)}",
                  markersize=4, label=f"{name}, {'recomputed' if keys == 'exact' else 'copied'} KV")
    axes.plot(oracle["loops"], 1, "k*", markersize=12, label="oracle")
    axes.set(xlabel=f"mean loops of {len(numbers['exit_loss'])}", ylabel="agreement with the full model")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def find_rules(config: EvaluateConfig, names: list[str], folder: Path, model: RecursiveTransformer) -> list[Rule]:
    """The rules of these names; none if the model has one loop, and by default no gate if the checkpoint has none."""
    if model.config.n_loop == 1:
        if config.plot:
            raise UserError(f"{config.ckpt} has 1 loop, so there are no exits to plot: leave out --plot")
        print0(f"{config.ckpt} has 1 loop, so no token can exit before the last")
        return []
    if config.rules == EvaluateConfig.rules and not (settled(folder) / GATE_FILE).exists():
        names.remove("gate")
        print0(f"{config.ckpt} has no gate yet: python -m evaluation.thresholds --ckpt={config.ckpt} trains one")
    return [Rule(name, gate=Gate.load(folder, model) if name == "gate" else None) for name in names]


def main(argv=None) -> None:
    config = parse_args(EvaluateConfig, argv)
    names, policies = parse_names("rules", config.rules, SCORED), parse_names("keys", config.keys, get_args(Keys))
    given = parse_thresholds(config.thresholds)
    check_settings(config)
    device, folder = pick_device(config.device), find_donor(config.ckpt)
    model = load_any(folder, None if device.type == "cuda" else torch.float32).to(device)
    rules, calibrated = find_rules(config, names, folder, model), read_thresholds(folder)
    for policy in list(policies):
        try:
            check_keys(policy, model.config)
        except UserError:
            if config.keys != EvaluateConfig.keys:           # by default those that the model has
                raise
            policies.remove(policy)
    tokenizer = Tokenizer.load(folder, model.config.vocab_size)
    pairs = read_text(config, model, tokenizer)
    (size, stride), n_windows = window_size(config, model), sum(len(idx) for idx, _ in pairs)
    n_bytes = max(1, count_bytes(pairs, tokenizer))
    numbers = {"windows": n_windows, "window": size, "stride": stride, "bytes": n_bytes}
    numbers |= evaluate_exits(model, pairs, rules, policies, given, calibrated)
    numbers["bits_per_byte"] = [ce / math.log(2) * numbers["tokens"] / n_bytes for ce in numbers["exit_loss"]]
    print0(f"{config.text}: {numbers['tokens']:,} tokens ({n_bytes:,} bytes) in {n_windows} windows of {size}, stride "
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
