"""Train an exit gate, and calibrate each rule's threshold to a guaranteed agreement with the full model.

    python -m evaluation.thresholds --ckpt=out --agreement=0.98
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from exits import (
    SCORED,
    ExitStats,
    Gate,
    Keys,
    Rule,
    apply_rule,
    check_keys,
    collect_exit_stats,
    read_thresholds,
    score_exit,
    summarize,
)
from lib.cli import UserError, parse_args, print0, progress, script, table
from lib.data import batch, count_windows, load_tokens, windows
from lib.folders import GATE_FILE, THRESHOLDS_FILE, own_folder, write_beside
from lib.results import append_line, check_writable
from lib.system import pick_device, run_info
from lib.tokenizer import Tokenizer
from model import RecursiveTransformer


@torch.no_grad()
def gate_examples(model: RecursiveTransformer, pairs: list) -> tuple[Tensor, Tensor]:
    """(states (n_loop - 1, N, C), 1 where the last loop has the same argmax or 0 (n_loop - 1, N)) of the N tokens."""
    examples, labels = [], []
    for idx, targets in progress(pairs, desc="reading for the gate", unit="batch"):
        states = model(idx.to(model.embed.weight.device))
        token = torch.stack([score_exit(model, x, targets.to(x.device), loop)[0] for loop, x in enumerate(states)])
        examples.append(torch.stack(states[:-1]).flatten(1, 2))
        labels.append((token[:-1] == token[-1]).flatten(1))
    return torch.cat(examples, 1), torch.cat(labels, 1).float()


def train_gate(model: RecursiveTransformer, pairs: list, epochs: int = 10, lr: float = 3e-3, rows: int = 1024) -> Gate:
    """A gate for the frozen `model`, trained on the texts in `pairs`."""
    states, labels = gate_examples(model, pairs)
    draw = torch.Generator().manual_seed(0)
    gate = Gate(len(states), model.config.n_embd, draw=draw).to(states.device)
    optimizer = torch.optim.AdamW(gate.parameters(), lr)
    steps = max(10, epochs * labels.size(1) // rows)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    for _ in progress(range(steps), desc="training the gate", unit="step"):
        tokens = torch.randint(labels.size(1), (rows,), generator=draw).to(states.device)
        logits = torch.stack([gate(states[loop, tokens], loop) for loop in range(len(states))])
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(logits, labels[:, tokens]).backward()
        optimizer.step()
        schedule.step()
    return gate.eval().requires_grad_(False)


def binomial_cdf(k: int, n: int, p: float) -> float:
    """P(X <= k) for X binomial with n trials of probability p."""
    i = torch.arange(k + 1, dtype=torch.float64)
    log_choose = math.lgamma(n + 1) - torch.lgamma(i + 1) - torch.lgamma(n - i + 1)
    return (log_choose + i * math.log(p) + (n - i) * math.log1p(-p)).logsumexp(0).exp().item()


def shows_agreement(agree: Tensor, agreement: float, confidence: float) -> bool:
    """True if the sample `agree`, bool (windows, T), shows with this confidence that a share `agreement` of all tokens
    agrees, or more: an exact binomial test.

    Tokens of one window are correlated, so the sample counts for as many independent tokens as would vary as much from
    window to window (the design effect of survey statistics; Korn and Graubard, 1998).
    """
    wrong, T = (~agree).double().sum(1), agree.size(1)
    n, k = agree.numel(), wrong.sum().item()
    effect = wrong.var().item() / (T * k / n * (1 - k / n)) if 0 < k < n and len(wrong) > 1 else 1.0
    effect = max(1.0, effect)                                # n tokens count for n / effect
    return binomial_cdf(math.ceil(k / effect), math.floor(n / effect), 1 - agreement) <= 1 - confidence


def calibrate_threshold(model: RecursiveTransformer, pairs: list, stats: ExitStats, rule: Rule, keys: Keys,
                        thresholds: list[float], agreement: float, confidence: float) -> float | None:
    """The lowest of the thresholds that `shows_agreement` on the texts in `pairs`, or None.

    Learn then Test (Angelopoulos et al., 2021; for early exits: Schuster et al., 2022): the thresholds are fixed before
    these texts are read, and tested from the strictest on until one fails. So the chance that any accepted one is wrong
    is at most 1 - confidence, however many are tested, and even if agreement does not fall steadily with them.
    """
    n_windows, accepted = sum(len(idx) for idx, _ in pairs), None
    for threshold in sorted(thresholds, reverse=True):
        result = apply_rule(model, pairs, stats, replace(rule, threshold=threshold), keys)
        if not shows_agreement((result.token == stats.token[-1]).view(n_windows, -1), agreement, confidence):
            break
        accepted = threshold
    return accepted


def threshold_grid(scores: Tensor) -> list[float]:
    """The thresholds to test: those from which on 2 %, 4 %, ... 100 % of the scores let a token exit."""
    return np.quantile(scores.double().cpu(), np.linspace(0.98, 0, 50)).tolist()     # torch.quantile takes 2^24 at most


@dataclass
class ExitsConfig:
    ckpt: str = "out"                      # checkpoint folder; gate and thresholds are added to it
    agreement: float = 0.98                # share of tokens that must be those of the full model
    confidence: float = 0.95               # of that guarantee
    keys: Keys = "exact"                   # KV of exited tokens: recomputed later (exact), or copied from the exit loop
    data: str = "assets/books/train"       # text to train the gate on
    valid: str = "assets/books/valid.txt"  # other text: half of its windows to calibrate on, half to check
    gate_tokens: int = 200_000             # tokens to train the gate on
    tokens: int = 80_000                   # tokens to calibrate and check on
    seq_len: int = 256                     # tokens in a window
    new_gate: bool = False                 # train a new gate even if there is one
    save: str | None = None                # also append the results to this file, as a line of JSON
    device: str = "auto"                   # auto, cpu, cuda


def check_settings(config: ExitsConfig, n_loop: int) -> None:
    for name in ("agreement", "confidence"):
        if not 0 < getattr(config, name) < 1:
            raise UserError(f"--{name}={getattr(config, name)} must be above 0 and below 1: no sample can prove 1 "
                            "(--rule=never always agrees)")
    for name in ("gate_tokens", "tokens", "seq_len"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name}={getattr(config, name)} must be at least 1")
    check_writable("save", config.save)
    if n_loop < 2:
        raise UserError(f"{config.ckpt} has 1 loop, so no token can exit before the last: give a model with 2 or more")
    need = math.ceil(math.log(1 - config.confidence) / math.log(config.agreement))
    if config.tokens // 2 < need:
        raise UserError(f"--tokens={config.tokens} are too few: to show --agreement={config.agreement} with "
                        f"--confidence={config.confidence} takes at least {need} tokens without a disagreement, and "
                        f"half of the text is for the check; use --tokens={2 * need} or more, better ten times that")


def read_texts(config: ExitsConfig, model: RecursiveTransformer) -> tuple[list, list, list]:
    """Batches of windows, inputs and targets: to train the gate on, to calibrate on, and to check on."""
    vocab_size, seq_len = model.config.vocab_size, min(config.seq_len, model.config.n_ctx)
    tokenizer = Tokenizer.load(config.ckpt, vocab_size)
    train, valid = (load_tokens(path, tokenizer, vocab_size) for path in (config.data, config.valid))
    n = min(math.ceil(config.gate_tokens / seq_len), count_windows(train, seq_len))
    learn = [batch(train, range(i, min(i + 8, n)), seq_len, seed=0) for i in range(0, n, 8)]
    n, there = config.tokens // seq_len, count_windows(valid, seq_len)
    if not 2 <= n <= there:
        raise UserError(f"--tokens={config.tokens} are {n} windows of {seq_len} tokens, but --valid={config.valid} has "
                        f"{there} and 2 are needed: use --tokens={2 * seq_len} to {there * seq_len}, or more text")
    spread = [i * there // n for i in range(n)]              # over the text: even ones to calibrate on, odd to check
    return learn, *([windows(valid, seq_len, half[i:i + 8]) for i in range(0, len(half), 8)]
                    for half in (spread[:n // 2 * 2:2], spread[1::2]))


def show(thresholds: dict[str, float], measured: dict[str, list[dict]], oracle: list[float]) -> str:
    """A row per rule: its threshold, mean loops and agreement on the half calibrated on, and on the half to check."""
    rows = []
    for name in SCORED:
        if name in thresholds:
            a, b = measured[name]
            rows.append([name, f"{thresholds[name]:.4f}", f"{a['loops']:.3f}", f"{a['agreement']:.4f}",
                         f"{b['loops']:.3f}", f"{b['agreement']:.4f}", f"{b['caught']:.0%}"])
        else:
            rows.append([name, "none", *[""] * 5])
    return table([["rule", "threshold", "mean loops", "agreement", "check: loops", "agreement", "caught"], *rows,
                  ["oracle", "", f"{oracle[0]:.3f}", "1.0000", f"{oracle[1]:.3f}", "1.0000", "100%"]])


def main(argv=None) -> None:
    config = parse_args(ExitsConfig, argv)
    device = pick_device(config.device)
    model = RecursiveTransformer.load(config.ckpt, dtype=None if device.type == "cuda" else torch.float32).to(device)
    check_settings(config, model.config.n_loop)
    check_keys(config.keys, model.config)
    with own_folder(config.ckpt):                            # gate and thresholds go with the weights that are in it
        calibrate_rules(config, model)


def calibrate_rules(config: ExitsConfig, model: RecursiveTransformer) -> None:
    """Train the gate if there is none, and find the threshold of each rule; both go beside the weights."""
    folder = config.ckpt
    read_thresholds(folder)                                  # damaged ones are an error now, not after minutes of work
    learn, calibration, check = read_texts(config, model)
    count = [sum(idx.numel() for idx, _ in pairs) for pairs in (learn, calibration, check)]
    print0(f"{folder}: {model.config.n_loop} loops; gate trained on {count[0]:,} tokens of {config.data}, thresholds "
           f"calibrated on {count[1]:,} tokens of {config.valid} and checked on {count[2]:,} others")
    if (n := sum(len(idx) for idx, _ in calibration)) < 30:  # measured: 10 to 30 % of such guarantees are missed
        print0(f"{n} windows to calibrate on are few: how far tokens of one window are correlated is uncertain; "
               "give --tokens enough for 30 windows in each half")

    if config.new_gate or not (Path(folder) / GATE_FILE).exists():
        train_gate(model, learn).save(folder)
    gate = Gate.load(folder, model)
    rules = [Rule(name, gate=gate) for name in SCORED]
    scores = collect_exit_stats(model, learn[:len(learn) // 4 + 1], rules).scores    # of other text: see the grid
    halves = [(pairs, collect_exit_stats(model, pairs, rules)) for pairs in (calibration, check)]
    thresholds, measured = {}, {}
    for rule in progress(rules, desc="calibrating", unit="rule"):
        threshold = calibrate_threshold(model, *halves[0], rule, config.keys, threshold_grid(scores[rule.name]),
                                        config.agreement, config.confidence)
        if threshold is not None:
            thresholds[rule.name], calibrated = threshold, replace(rule, threshold=threshold)
            measured[rule.name] = [summarize(apply_rule(model, pairs, stats, calibrated, config.keys), stats)
                                   for pairs, stats in halves]
    oracle = [stats.oracle.double().mean().item() + 1 for _, stats in halves]
    print0(show(thresholds, measured, oracle))
    if not thresholds:
        raise UserError(f"no rule reaches an agreement of {config.agreement} with --keys={config.keys}, even at the "
                        "strictest threshold, where 2 % of the scores let a token exit; ask for a lower --agreement, "
                        "give more --tokens, or train the exits (--exit_loss)")
    found = {"agreement": config.agreement, "confidence": config.confidence, "dtype": str(model.embed.weight.dtype),
             "thresholds": thresholds}
    text = json.dumps(read_thresholds(folder) | {config.keys: found}, indent=1) + "\n"
    write_beside(folder, THRESHOLDS_FILE, lambda path: path.write_text(text, encoding="utf-8"))
    if config.save:
        append_line(config.save, {"what": "exits", "settings": asdict(config)} | run_info() | found | {
            "tokens": count[1:], "oracle": oracle, "calibration_and_check": measured})


if __name__ == "__main__":
    script(main)
