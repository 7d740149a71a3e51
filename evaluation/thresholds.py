"""Train an exit gate, and find each rule's threshold that keeps a promised agreement with the full model.

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
    Gate,
    Keys,
    Rule,
    Seen,
    at_exit,
    observe,
    outcome,
    read_thresholds,
    statistics,
    write_beside,
)
from lib.cli import UserError, parse_args, print0, progress, script, table
from lib.data import batch, count_windows, load_tokens, windows
from lib.folders import GATE_FILE, THRESHOLDS_FILE
from lib.results import append_line, check_writable
from lib.system import pick_device, run_info
from lib.tokenizer import Tokenizer
from losses import distill_loss, exit_weights  # noqa: F401 (also found here)
from model import RecursiveTransformer

# ---------------------------------------------------------------------------------------------------------------------
# A gate, and thresholds that keep a promise

def train_gate(model: RecursiveTransformer, pairs: list, epochs: int = 10, lr: float = 3e-3, rows: int = 1024) -> Gate:
    """A gate for the frozen `model`, from the oracle's answers on the texts in `pairs`."""
    states, same = [], []
    with torch.no_grad():
        for idx, targets in progress(pairs, desc="reading for the gate", unit="batch"):
            every = model(idx.to(model.embed.weight.device))
            token = torch.stack([at_exit(model, x, targets.to(x.device), loop)[0] for loop, x in enumerate(every)])
            states.append(torch.stack(every[:-1]).flatten(1, 2))             # (n_loop - 1, B T, C)
            same.append((token[:-1] == token[-1]).flatten(1))                # (n_loop - 1, B T)
    states, same = torch.cat(states, 1), torch.cat(same, 1).float()
    draw = torch.Generator().manual_seed(0)
    gate = Gate(len(states), model.config.n_embd, draw=draw).to(states.device)
    optimizer = torch.optim.AdamW(gate.parameters(), lr)
    steps = max(10, epochs * same.size(1) // rows)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    for _ in progress(range(steps), desc="training the gate", unit="step"):
        some = torch.randint(same.size(1), (rows,), generator=draw).to(states.device)
        answers = torch.stack([gate(states[loop, some], loop) for loop in range(len(states))])
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(answers, same[:, some]).backward()
        optimizer.step()
        schedule.step()
    return gate.eval().requires_grad_(False)


def binomial_cdf(k: int, n: int, p: float) -> float:
    """P(at most k of n), each with probability p."""
    i = torch.arange(k + 1, dtype=torch.float64)
    log_choose = math.lgamma(n + 1) - torch.lgamma(i + 1) - torch.lgamma(n - i + 1)
    return (log_choose + i * math.log(p) + (n - i) * math.log1p(-p)).logsumexp(0).exp().item()


def keeps(agree: Tensor, agreement: float, confidence: float) -> bool:
    """True if the tokens of some windows, which agreed or not, bool (windows, T), show with this confidence that at
    least a share `agreement` of all such tokens does: were it less, so few that do not would be too unlikely (an exact
    binomial test).

    Tokens of one window are alike, so they count for fewer: for as many independent ones as would vary as much between
    windows (the design effect of survey statistics; Korn and Graubard, 1998).
    """
    wrong, T = (~agree).double().sum(1), agree.size(1)
    n, k = agree.numel(), wrong.sum().item()
    effect = wrong.var().item() / (T * k / n * (1 - k / n)) if 0 < k < n and len(wrong) > 1 else 1.0
    effect = max(1.0, effect)
    return binomial_cdf(math.ceil(k / effect), math.floor(n / effect), 1 - agreement) <= 1 - confidence


def calibrate(model: RecursiveTransformer, pairs: list, seen: Seen, rule: Rule, keys: Keys, thresholds: list[float],
              agreement: float, confidence: float) -> float | None:
    """The lowest threshold that `keeps` the agreement on the texts in `pairs`, or None.

    Learn then Test (Angelopoulos et al., 2021; for early exits: Schuster et al., 2022): the thresholds were fixed
    beforehand and are tested from the strictest on, until one fails. So the chance that any that passed is wrong stays
    1 - confidence, though many are tried, and whether or not agreement falls evenly with them.
    """
    windows, found = sum(len(idx) for idx, _ in pairs), None
    for threshold in sorted(thresholds, reverse=True):
        out = outcome(model, pairs, seen, replace(rule, threshold=threshold), keys)
        if not keeps((out.token == seen.token[-1]).view(windows, -1), agreement, confidence):
            break
        found = threshold
    return found


@dataclass
class ExitsConfig:
    ckpt: str = "out"                      # checkpoint folder; gate and thresholds are added to it
    agreement: float = 0.98                # share of tokens that must be what the full model would have said
    confidence: float = 0.95               # how sure to be of that
    keys: Keys = "exact"                   # keys of tokens that left: computed later, or copied from their exit loop
    data: str = "assets/books/train"       # text that the gate is trained on
    valid: str = "assets/books/valid.txt"  # other text: one half of its windows to calibrate on, one to check
    gate_tokens: int = 200_000             # tokens to train the gate on
    tokens: int = 80_000                   # tokens to calibrate and check on
    seq_len: int = 256                     # tokens in a window
    new_gate: bool = False                 # train the gate anew where there is one
    save: str | None = None                # also append what was measured to this file, as a line of JSON
    device: str = "auto"                   # auto, cpu, cuda


def check_settings(config: ExitsConfig, n_loop: int) -> None:
    for name in ("agreement", "confidence"):
        if not 0 < getattr(config, name) < 1:
            raise UserError(f"--{name}={getattr(config, name)} must be above 0 and below 1: no sample makes it certain "
                            "(what always agrees is --rule=never)")
    for name in ("gate_tokens", "tokens", "seq_len"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name}={getattr(config, name)} must be at least 1")
    check_writable("save", config.save)
    if n_loop < 2:
        raise UserError(f"{config.ckpt} has 1 loop, and nothing can leave before the last: give a model with 2 or more")
    need = math.ceil(math.log(1 - config.confidence) / math.log(config.agreement))
    if config.tokens // 2 < need:
        raise UserError(f"--tokens={config.tokens} are too few: {need} tokens without one disagreement would be needed "
                        f"to show --agreement={config.agreement} with --confidence={config.confidence}, and half of "
                        f"the text is kept for the check; use --tokens={2 * need} at the very least, better ten times "
                        "that")


def read_texts(config: ExitsConfig, model: RecursiveTransformer) -> tuple[list, list, list]:
    """Batches of windows, inputs and targets: to train the gate on, to calibrate on, and to check on."""
    vocab_size, seq_len = model.config.vocab_size, min(config.seq_len, model.config.n_ctx)
    tokenizer = Tokenizer.load(config.ckpt, vocab_size)
    text, held = (load_tokens(path, tokenizer, vocab_size) for path in (config.data, config.valid))
    n, there = math.ceil(config.gate_tokens / seq_len), count_windows(text, seq_len)
    learn = [batch(text, range(i, min(i + 8, n, there)), seq_len, seed=0) for i in range(0, min(n, there), 8)]
    n, there = config.tokens // seq_len, count_windows(held, seq_len)
    if not 2 <= n <= there:
        raise UserError(f"--tokens={config.tokens} are {n} windows of {seq_len} tokens, but --valid={config.valid} has "
                        f"{there} and two are needed: use --tokens={2 * seq_len} to {there * seq_len}, or more text")
    spread = [i * there // n for i in range(n)]              # every other window calibrates, the rest checks
    return learn, *([windows(held, seq_len, half[i:i + 8]) for i in range(0, len(half), 8)]
                    for half in (spread[:n // 2 * 2:2], spread[1::2]))


def main(argv=None) -> None:
    config = parse_args(ExitsConfig, argv)
    device = pick_device(config.device)
    model = RecursiveTransformer.load(config.ckpt, dtype=None if device.type == "cuda" else torch.float32).to(device)
    check_settings(config, model.config.n_loop)
    read_thresholds(config.ckpt)                             # damaged ones are named now, not after the minutes of work
    learn, calibration, check = read_texts(config, model)
    count = [sum(idx.numel() for idx, _ in pairs) for pairs in (learn, calibration, check)]
    print0(f"{config.ckpt}: {model.config.n_loop} loops; gate trained on {count[0]:,} tokens of {config.data}, "
           f"thresholds calibrated on {count[1]:,} tokens of {config.valid} and checked on {count[2]:,} others")
    if (n := sum(len(idx) for idx, _ in calibration)) < 30:  # measured: a tenth to a third of such promises break
        print0(f"{n} windows to calibrate on are few: tokens of one are alike, and how much so cannot be told well; "
               "give --tokens enough for 30 of them on either half")
    if config.new_gate or not (Path(config.ckpt) / GATE_FILE).exists():
        gate = train_gate(model, learn)
        gate.save(config.ckpt)
    gate = Gate.load(config.ckpt, model)
    rules = [Rule(name, gate=gate) for name in SCORED]
    # From which thresholds on 2 %, 4 %, ... of the scores let a token leave: by the gate's text, the other has no say.
    shares = np.linspace(0.98, 0, 50)
    tuning = observe(model, learn[:len(learn) // 4 + 1], rules).score
    seen, checked = (observe(model, pairs, rules) for pairs in (calibration, check))
    thresholds, measured, lines = {}, {}, []
    for rule in progress(rules, desc="calibrating", unit="rule"):
        grid = np.quantile(tuning[rule.name].double().cpu(), shares).tolist()        # torch's has a limit
        at = calibrate(model, calibration, seen, rule, config.keys, grid, config.agreement, config.confidence)
        if at is None:
            lines.append([rule.name, "cannot be had", *[""] * 5])
            continue
        thresholds[rule.name], done = at, replace(rule, threshold=at)
        a, b = measured[rule.name] = [statistics(outcome(model, pairs, what, done, config.keys), what)
                                      for pairs, what in ((calibration, seen), (check, checked))]
        lines.append([rule.name, f"{at:.4f}", f"{a['loops']:.3f}", f"{a['agreement']:.4f}", f"{b['loops']:.3f}",
                      f"{b['agreement']:.4f}", f"{b['caught']:.0%}"])
    best = [s.oracle.double().mean().item() + 1 for s in (seen, checked)]
    print0(table([["rule", "threshold", "mean loops", "agreement", "check: loops", "agreement", "caught"], *lines,
                  ["oracle", "", f"{best[0]:.3f}", "1.0000", f"{best[1]:.3f}", "1.0000", "100%"]]))
    if not thresholds:
        raise UserError(f"an agreement of {config.agreement} cannot be had with {config.keys} keys: at the strictest "
                        "threshold of every rule, where 2 % of the scores let a token leave, these tokens do not show "
                        "it; ask for a lower --agreement, give more --tokens, or train the exits (--exit_loss)")
    found = {"agreement": config.agreement, "confidence": config.confidence, "thresholds": thresholds}
    everything = read_thresholds(config.ckpt) | {config.keys: found}
    write_beside(config.ckpt, THRESHOLDS_FILE, lambda path: path.write_text(json.dumps(everything, indent=1) + "\n",
                                                                            encoding="utf-8"))
    if config.save:
        append_line(config.save, {"what": "exits", "settings": asdict(config)} | run_info() | found | {
            "tokens": count[1:], "oracle": best, "calibration_and_check": measured})


if __name__ == "__main__":
    script(main)
