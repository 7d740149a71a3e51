"""Early exits: rules that decide which tokens exit early, the oracle, and decoding with the KV of exited tokens (§2.4).
TODO
"""


import json
import math
import operator
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lib.cli import UserError, progress
from lib.data import IGNORE
from lib.folders import GATE_FILE, THRESHOLDS_FILE
from losses import distill_loss, exit_weights  # noqa: F401 (also found here)
from model import KVCache, RecursiveTransformer, upcast

RuleName = Literal["never", "fixed", "max_prob", "margin", "entropy", "gate"]
Keys = Literal["exact", "copy"]                              # of tokens that left, in the loops they skipped: exits.py
SCORED = ("max_prob", "margin", "entropy", "gate")           # the rules that have a threshold


def check_keys(keys: str) -> None:
    if keys not in get_args(Keys):
        raise UserError(f"keys={keys!r} is unknown; use one of {', '.join(get_args(Keys))}")


class Gate(nn.Module):
    """A probe on the hidden state at each exit but the last: how likely is it that the last loop would say the same?

    It never touches the vocabulary: a network C -> hidden -> 1 per exit, beside a head of V x C. All exits' weights
    are stacked, so that the rows of a batch may stand at different loops.
    """

    def __init__(self, n_exits: int, n_embd: int, hidden: int = 256, draw: torch.Generator | None = None):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(n_exits, hidden, n_embd, generator=draw) / n_embd**0.5)
        self.b1 = nn.Parameter(torch.zeros(n_exits, hidden))
        self.w2 = nn.Parameter(torch.zeros(n_exits, hidden))
        self.b2 = nn.Parameter(torch.zeros(n_exits))

    def forward(self, x: Tensor, loop: int | Tensor) -> Tensor:
        """Logit (...) of "the last loop would say the same" for states x (..., C) after `loop`, an int or int64 (...).
        """
        x = F.rms_norm(upcast(x), x.shape[-1:])                # deep states are large, and all exits alike to the probe
        if isinstance(loop, int):
            return F.gelu(F.linear(x, self.w1[loop], self.b1[loop])) @ self.w2[loop] + self.b2[loop]
        every = F.gelu(torch.einsum("...c,ehc->...eh", x, self.w1) + self.b1)
        every = (every * self.w2).sum(-1) + self.b2          # (..., n_exits): few, cheaper than gathering weights
        return every.gather(-1, loop.clamp(max=len(self.b2) - 1)[..., None])[..., 0]

    def save(self, folder) -> None:
        """Into the checkpoint in `folder`; thresholds there were those of the gate before, and go once this one is
        written."""
        def write(path: Path) -> None:
            save_file(self.state_dict(), path)
            (Path(folder) / THRESHOLDS_FILE).unlink(missing_ok=True)
        write_beside(folder, GATE_FILE, write)

    @classmethod
    def load(cls, folder, model: RecursiveTransformer) -> "Gate":
        """The gate of the checkpoint in `folder`. UserError if it has none or it is another model's."""
        path, c = Path(folder) / GATE_FILE, model.config
        if not path.exists():
            raise UserError(f"{folder} has no gate: train one with python exits.py --ckpt={folder}, "
                            "or use --rule=max_prob, margin or entropy")
        try:
            tensors = load_file(path)
            hidden = tensors["b1"].shape[1]
            gate = cls(c.n_loop - 1, c.n_embd, hidden)
            gate.load_state_dict(tensors)
            if not all(tensor.isfinite().all() for tensor in tensors.values()):
                raise RuntimeError("its weights are not finite")
        except (OSError, SafetensorError, KeyError, IndexError, RuntimeError) as e:
            raise UserError(f"{path} is not the gate of this model ({str(e).splitlines()[0]}); train it anew with "
                            f"python exits.py --ckpt={folder} --new_gate") from None
        return gate.to(model.embed.weight.device).eval()


@dataclass
class Rule:
    """Which tokens may leave: rule(x, loop, logits) -> bool (...), for states x (..., C) after `loop`.

    A batch at once: each answer depends on its own state alone, and nothing waits for the host. The score of a state
    is in [0, 1], the surer the higher; it may leave from `threshold` on. `loop` is an int, or int64 (...) where the
    rows stand at different loops; `logits` (..., V) are looked at only by the rules that say so in `reads_logits`.
    After the last loop everything leaves: rules are not asked.
    """
    name: RuleName = "never"
    threshold: float = math.inf
    exit_loop: int = 0                                       # fixed: the index of the loop
    gate: Gate | None = None

    def __post_init__(self):
        if self.name not in get_args(RuleName):
            raise UserError(f"the rule {self.name!r} is unknown; use one of {', '.join(get_args(RuleName))}")

    @property
    def reads_logits(self) -> bool:
        return self.name in ("max_prob", "margin", "entropy")

    def __call__(self, x: Tensor, loop: int | Tensor, logits: Tensor | None = None) -> Tensor:
        if self.name in ("never", "fixed"):
            at = torch.zeros(x.shape[:-1], dtype=torch.long, device=x.device) + loop
            return at >= (self.exit_loop if self.name == "fixed" else sys.maxsize)
        return self.score(x, loop, logits) >= self.threshold

    def score(self, x: Tensor, loop: int | Tensor, logits: Tensor | None = None) -> Tensor:
        if self.name == "gate":
            return self.gate(x, loop).sigmoid()
        total = logits.logsumexp(-1)
        if self.name == "max_prob":
            return (logits.amax(-1) - total).exp()
        if self.name == "margin":                            # between the two likeliest
            first, second = (logits.topk(2, dim=-1).values - total[..., None]).exp().unbind(-1)
            return first - second
        p = logits - total[..., None]                        # entropy, as a share of the most there could be
        return (1 + (p.exp() * p).sum(-1) / math.log(logits.size(-1))).clamp(min=0)  # rounding may fall below


def load_rule(folder, model: RecursiveTransformer, name: RuleName, threshold: float | None = None,
              exit_loop: int = 1, keys: Keys = "exact") -> Rule:
    """The rule `name` for the model in `folder`; its threshold, if not given, is the one calibrated for `keys`.

    exit_loop counts from 1, as people do. UserError for what cannot be: see the messages.
    """
    n_loop = model.config.n_loop
    if name == "never":
        return Rule()
    if n_loop < 2:
        raise UserError(f"--rule={name} lets tokens leave before the last loop, and the model in {folder} has 1 loop; "
                        "use --rule=never, or a model with 2 loops or more")
    if name == "fixed":
        if not 1 <= exit_loop <= n_loop:
            raise UserError(f"--exit_loop={exit_loop}, but the model has the loops 1 to {n_loop}")
        return Rule(name, exit_loop=exit_loop - 1)
    gate = Gate.load(folder, model) if name == "gate" else None
    if threshold is None:
        threshold = read_thresholds(folder).get(keys, {}).get("thresholds", {}).get(name)
        if threshold is None:
            raise UserError(f"{folder} has no calibrated threshold of {name} with {keys} keys: run python exits.py "
                            f"--ckpt={folder} --keys={keys} --agreement=0.98, or give --threshold (0 to 1)")
    if not (0 <= threshold <= 1 or threshold == math.inf):
        raise UserError(f"--threshold={threshold} is out of range: scores are between 0 and 1 (inf = never)")
    return Rule(name, threshold, gate=gate)


def read_thresholds(folder) -> dict:
    path = Path(folder) / THRESHOLDS_FILE
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
        if not all(0 <= t <= 1 for by_keys in found.values() for t in by_keys["thresholds"].values()):
            raise ValueError("a threshold is not between 0 and 1")
        return found
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise UserError(f"{path} is not readable as thresholds ({e}); remove it, and calibrate again with python "
                        f"exits.py --ckpt={folder}") from None


def write_beside(folder, name: str, write: Callable[[Path], object]) -> None:
    """A file added to a checkpoint, whole or not at all. UserError where the disk is full."""
    tmp = Path(folder) / f".{name}.tmp"
    try:
        write(tmp)
        os.replace(tmp, Path(folder) / name)
    except (OSError, SafetensorError) as e:
        tmp.unlink(missing_ok=True)
        raise UserError(f"cannot write {Path(folder) / name} ({e}); the checkpoint is as it was") from e


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
    """Read the texts in `pairs`, of inputs and targets (B, T), at full depth; targets that are IGNORE are left out."""
    exits = [[] for _ in range(model.config.n_loop)]
    for idx, targets in progress(pairs, desc="reading", unit="batch"):
        idx, targets = (t.to(model.embed.weight.device) for t in (idx, targets))
        kept = targets != IGNORE
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
        kept, (x, loops) = targets != IGNORE, run_exits(model, idx, rule, keys)
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
