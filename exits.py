"""Early exits that can be used: which tokens may leave before the last loop, and what becomes of their keys (§2.4).

    python exits.py --ckpt=out --agreement=0.98     # train a gate, find each rule's threshold, save both with the model

A token that leaves after an early loop is spared the rest, and two things are left to say. Who may leave: a `Rule`,
which sees the hidden state. And what the later tokens find, in the later loops, where its keys and values should be:

    keys="exact"   the skipped loops are run later, for the keys alone: later tokens see what the full model would show
    keys="copy"    the keys of the loop it left at stand in for the later ones': no work, but an approximation

A row in loop b needs the keys of loop b only, so with exact keys a state never depends on who left before. All tokens
of a text can then be judged in one ordinary pass (`observe`). With copied keys it does depend, but only on decisions of
earlier loops: still one pass, loop by loop (`run_exits`). How training makes early exits good: losses.py.
"""

import json
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import IGNORED, batch, count_windows, load_tokens, windows
from losses import distill_loss, exit_weights  # noqa: F401 (also found here)
from model import KVCache, RecursiveTransformer
from rules import SCORED, Gate, Keys, Rule, check_keys, read_thresholds, write_beside
from runtime import (
    GATE_FILE,
    THRESHOLDS_FILE,
    UserError,
    append_line,
    check_writable,
    parse_args,
    pick_device,
    print0,
    progress,
    run_info,
    script,
    table,
)
from tokenizer import Tokenizer

# ---------------------------------------------------------------------------------------------------------------------
# A text whose next tokens are known, all its tokens at once

def at_exit(model: RecursiveTransformer, x: Tensor, targets: Tensor, loop: int,
            rules: Sequence[Rule] = ()) -> list[Tensor]:
    """[likeliest token, cross entropy of the target, each rule's score], all (...), at states x (..., C) after `loop`.
    A few tokens at a time: all their logits together may not fit. UserError where they are not finite."""
    parts, size = [], max(1, 2**25 // model.config.vocab_size)   # 128 MiB of logits
    for x_, t in zip(x.flatten(0, -2).split(size), targets.flatten().split(size), strict=True):
        logits = model.logits(x_)
        ce = F.cross_entropy(logits, t, reduction="none")
        if not ce.isfinite().all():
            raise UserError(NOT_FINITE)
        parts.append([logits.argmax(-1), ce,
                      *(rule.score(x_, loop, logits) for rule in rules)])
    return [torch.cat(part).view_as(targets) for part in zip(*parts, strict=True)]


@dataclass
class Outcome:
    """What a rule makes of the same N tokens: the loop that each left after, and what came out there."""
    loops: Tensor                                            # (N,)
    token: Tensor                                            # (N,)
    ce: Tensor                                               # (N,)


@dataclass
class Seen:
    """What an ordinary pass over N tokens of a text shows at each exit."""
    token: Tensor                                            # (n_loop, N) the likeliest next token
    ce: Tensor                                               # (n_loop, N) cross entropy of the one that comes next
    score: dict[str, Tensor]                                 # by rule, of those with a threshold: (n_loop - 1, N)

    @property
    def oracle(self) -> Tensor:
        """(N,) the earliest loop whose argmax equals the last loop's (§2.4)."""
        return (self.token == self.token[-1]).int().argmax(0)    # of equal maxima, the first

    def at(self, loops: Tensor) -> Outcome:
        """What comes out if each token leaves after these loops (N,), with exact keys."""
        return Outcome(loops, *(of.gather(0, loops[None])[0] for of in (self.token, self.ce)))


@torch.no_grad()
def observe(model: RecursiveTransformer, pairs: list[tuple[Tensor, Tensor]], rules: Sequence[Rule] = ()) -> Seen:
    """Read the texts in `pairs`, of inputs and targets (B, T), at full depth; targets that are IGNORED are left out."""
    exits = [[] for _ in range(model.config.n_loop)]
    for idx, targets in progress(pairs, desc="reading", unit="batch"):
        idx, targets = (t.to(model.embed.weight.device) for t in (idx, targets))
        kept = targets != IGNORED
        for loop, x in enumerate(model(idx)):
            asked = rules if loop < len(exits) - 1 else ()
            exits[loop].append(at_exit(model, x[kept], targets[kept], loop, asked))
    exits = [[torch.cat(t) for t in zip(*batches, strict=True)] for batches in exits]
    token, ce = (torch.stack([found[i] for found in exits]) for i in range(2))
    return Seen(token, ce, {rule.name: torch.stack([found[2 + i] for found in exits[:-1]])
                            for i, rule in enumerate(rules)})


@torch.no_grad()
def oracle_exits(model: RecursiveTransformer, idx: Tensor) -> Tensor:
    """(B, T) int64: for each token of idx (B, T) the earliest loop whose argmax equals the last loop's (§2.4)."""
    return observe(model, [(idx, idx)]).oracle.view_as(idx)


@torch.no_grad()
def run_exits(model: RecursiveTransformer, idx: Tensor, rule: Rule, keys: Keys = "exact") -> tuple[Tensor, Tensor]:
    """(state (B, T, C) that each token of idx (B, T) leaves with, index of the loop (B, T) after which it does)."""
    check_keys(keys)
    (B, T), last = idx.shape, model.config.n_loop - 1
    x = out = model.first_state(idx)
    cache = KVCache(model.config, B, T, x.device, x.dtype) if keys == "copy" else None
    loops, left = torch.full_like(idx, last), torch.zeros_like(idx, dtype=torch.bool)
    for loop in range(last + 1):
        x = model.block(x, loop, cache)
        out = torch.where(left[..., None], out, x)
        if loop < last:
            now = decide(model, rule, x, loop) & ~left
            loops, left = torch.where(now, loop, loops), left | now
            if left.all():
                break
            if cache is not None:
                cache.exited = left
    return out, loops


def decide(model: RecursiveTransformer, rule: Rule, x: Tensor, loop: int) -> Tensor:
    """rule(x, loop) (...) for many states x (..., C), a few at a time if it takes their logits."""
    if not rule.reads_logits:
        return rule(x, loop)
    chunks = x.flatten(0, -2).split(max(1, 2**25 // model.config.vocab_size))
    return torch.cat([rule(c, loop, model.logits(c)) for c in chunks]).view(x.shape[:-1])


@torch.no_grad()
def outcome(model: RecursiveTransformer, pairs: list, seen: Seen, rule: Rule, keys: Keys = "exact") -> Outcome:
    """With exact keys `seen` holds it already; copied keys change the later states, so the texts are read again."""
    if keys == "exact" and rule.name in seen.score:
        leaves = seen.score[rule.name] >= rule.threshold                     # (n_loop - 1, N)
        return seen.at(torch.cat([leaves, torch.ones_like(leaves[:1])]).int().argmax(0))
    found = []
    for idx, targets in pairs:
        idx, targets = (t.to(model.embed.weight.device) for t in (idx, targets))
        kept, (x, loops) = targets != IGNORED, run_exits(model, idx, rule, keys)
        found.append([loops[kept], *at_exit(model, x[kept], targets[kept], model.config.n_loop - 1)])
    return Outcome(*(torch.cat(t) for t in zip(*found, strict=True)))


def statistics(out: Outcome, seen: Seen) -> dict:
    """Of a rule: mean loops, share of tokens that leave at each, agreement with full depth, perplexity of what came
    out, and how many of the tokens that the oracle lets leave early were caught: they left early, and rightly."""
    last = len(seen.token) - 1
    agree, early = out.token == seen.token[-1], seen.oracle < last
    return {"loops": out.loops.double().mean().item() + 1,
            "left_at": (out.loops.bincount(minlength=last + 1).double() / len(out.loops)).tolist(),
            "agreement": agree.double().mean().item(), "perplexity": out.ce.double().mean().exp().item(),
            "caught": ((out.loops < last) & agree & early).sum().item() / max(1, early.sum().item())}


# ---------------------------------------------------------------------------------------------------------------------
# One token after the other

NOT_FINITE = "the logits are not finite: damaged weights, or numbers too large for the dtype"


def likeliest(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


def whole(number) -> int:
    """The number as Python's own int. TypeError for what is none: 2.5, True, "2", None."""
    if isinstance(number, bool) or getattr(number, "dtype", None) in (bool, torch.bool):
        raise TypeError(f"{number!r} is not a whole number")
    return operator.index(number)


def end_ids(eos_id: int | Sequence[int] | None) -> tuple[int, ...]:
    """The ids that end a text, of None, one, or several. UserError for what are no ids."""
    if eos_id is None:
        return ()
    with suppress(TypeError):
        return (whole(eos_id),)
    try:
        return tuple(map(whole, eos_id))
    except TypeError as e:
        raise UserError(f"eos_id={eos_id!r} must be a token's id, several, or None ({e})") from None


@torch.inference_mode()
def decode(model: RecursiveTransformer, idx: Tensor, max_new_tokens: int, rule: Rule | None = None,
           keys: Keys = "exact", choose: Callable[[Tensor], Tensor] = likeliest,
           eos_id: int | Sequence[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the next token (B,) of each prompt in idx (B, T), and the index of the loop (B,) it left after, until all
    have said `eos_id` (or one of several) or the context is full. The reference: all that is faster must say the same.
    (Made in inference mode: clone what is to go through autograd.)

    Prompts run all loops, and so does what comes first after them. choose: logits (B, V) -> tokens (B,). A row that has
    ended repeats the id that ended it, at loop -1. Rows never influence one another: one whose logits are not finite
    has failed, and says -1 at loop -1 from then on; UserError where all have. A row alone has its skipped loops run
    when a later token needs them, several tokens in one pass; in a batch they run at once, beside those that go on.
    """
    c, (B, T), rule = model.config, idx.shape, rule or Rule()
    if not 0 < T <= c.n_ctx:
        raise UserError(f"a prompt of {T} tokens: give 1 (a BOS, or whatever begins a text) to {c.n_ctx - 1}, so that "
                        "one more fits the model's context")
    check_keys(keys)
    steps = min(max_new_tokens, c.n_ctx - T)
    state = model.first_state(idx[:, :0])                    # (B, 0, C)
    cache = KVCache(c, B, T + steps, state.device, state.dtype)
    behind = [state] * c.n_loop      # per loop, states (B, n, C) of tokens that left before it: it lacks their keys
    logits = model.logits(model(idx, cache)[-1][:, -1])      # (B, V)
    loops, ended = torch.full_like(idx[:, 0], c.n_loop - 1), torch.zeros_like(idx[:, 0], dtype=torch.bool)
    token, ends = torch.full_like(loops, -1), torch.tensor(end_ids(eos_id), dtype=torch.long, device=idx.device)
    for step in range(steps):
        broken = ~ended & ~logits.amax(-1).isfinite()        # NaN or infinite: there is nothing to choose from
        token, ended = torch.where(ended, token, choose(logits)).masked_fill(broken, -1), ended | broken
        if (token < 0).all():
            raise UserError(NOT_FINITE)
        yield token, torch.where(ended, -1, loops)
        ended = ended | torch.isin(token, ends)
        if step == steps - 1 or ended.all():
            return

        x, left, loops = model.first_state(token[:, None].clamp(min=0)), ended, torch.full_like(loops, c.n_loop - 1)
        for loop in range(c.n_loop):
            late = behind[loop].size(1)                      # those that left before this loop catch up, for their keys
            older, x = model.block(torch.cat([behind[loop], x], 1), loop, cache).split([late, 1], 1)
            behind[loop] = behind[loop][:, :0]
            if loop == c.n_loop - 1:
                break
            behind[loop + 1] = torch.cat([behind[loop + 1], older], 1)
            seen = model.logits(x[:, 0]) if rule.reads_logits else None
            now = rule(x[:, 0], loop, seen) & ~left
            if now.any():
                seen = model.logits(x[:, 0]) if seen is None else seen
                logits, loops, left = torch.where(now[:, None], seen, logits), torch.where(now, loop, loops), left | now
            if left.all() and (B == 1 or keys == "copy"):    # nobody goes on
                break
            cache.exited = left[:, None] if keys == "copy" else None
        cache.exited = None
        if not left.all():
            logits = torch.where(left[:, None], logits, model.logits(x[:, 0]))
        if keys == "copy":
            for later in range(loop + 1, c.n_loop):
                cache.copy_loop(later)
        elif loop < c.n_loop - 1:
            behind[loop + 1] = torch.cat([behind[loop + 1], x], 1)


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
