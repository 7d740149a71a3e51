"""Early exits (§2.4): rules that decide which tokens exit, the oracle, and decoding with a rule.

After each loop but the last a rule may let a token exit: the next token is then predicted from its state there. A
token that exits has no keys and values (KV) in the loops that it skips, and later tokens that reach those loops attend
to them. The paper leaves this open; the argument `keys` chooses between two policies:

    "exact"  recomputed KV: the skipped loops run later, for their KV alone, so every state is that of the full model
    "copy"   copied KV: the KV of the exit loop stand in for those of later loops, an approximation: no loop runs for
             them, but the text may change (cf. CALM, 2207.07061, which copies the hidden state and projects it anew)

A model with kv="first_loop" needs neither: all loops read the first loop's KV, which every token has, so skipped
loops leave no gaps. For it, "exact" costs nothing, and "copy" is refused.

Loops count from 0 here, from 1 on command lines. evaluation/thresholds.py trains gates and calibrates thresholds.
"""

import json
import math
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lib.cli import UserError, progress
from lib.data import IGNORE
from lib.folders import GATE_FILE, THRESHOLDS_FILE, settled, write_beside
from model import Config, KVCache, RecursiveTransformer, upcast

RuleName = Literal["never", "fixed", "max_prob", "margin", "entropy", "gate"]
SCORED = ("max_prob", "margin", "entropy", "gate")           # the rules that compare a score with a threshold
Keys = Literal["exact", "copy"]                              # recomputed or copied KV, see above
NOT_FINITE = "the logits are not finite: damaged weights, or numbers too large for the dtype"
CHUNK = 2**25                                                # logits computed at once: 128 MiB in fp32


def check_keys(keys: str, config: Config) -> None:
    """UserError for an unknown policy, and for copies where all loops read the first loop's keys and values."""
    if keys not in get_args(Keys):
        raise UserError(f"keys={keys!r} is unknown; use one of {', '.join(get_args(Keys))}")
    if keys == "copy" and config.kv == "first_loop":
        raise UserError("keys='copy' copies KV to the loops that a token skips, and all loops of this model read those "
                        "of the first (kv=first_loop); use keys='exact', which costs nothing here")
    loops = range(config.n_loop)
    if keys == "copy" and any(len({config.rotates(loop, i) for loop in loops}) > 1 for i in range(config.n_unique)):
        raise UserError("keys='copy' copies keys to later loops, and a layer of this model rotates them in some loops "
                        "only (no_rope); use keys='exact', or loops whose layers agree")


# ---------------------------------------------------------------------------------------------------------------------
# Rules and the gate

class Gate(nn.Module):
    """A network C -> hidden -> 1 at each exit but the last, which predicts whether the last loop has the same argmax.

    It needs no logits. All exits' weights are stacked, so that the rows of a batch may be at different loops.
    """

    def __init__(self, n_exits: int, n_embd: int, hidden: int = 256, draw: torch.Generator | None = None):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(n_exits, hidden, n_embd, generator=draw) / n_embd**0.5)
        self.b1 = nn.Parameter(torch.zeros(n_exits, hidden))
        self.w2 = nn.Parameter(torch.zeros(n_exits, hidden))
        self.b2 = nn.Parameter(torch.zeros(n_exits))

    def forward(self, x: Tensor, loop: int | Tensor) -> Tensor:
        """Logits (...) of that prediction for states x (..., C) after `loop`, an int or int64 (...)."""
        x = F.rms_norm(upcast(x), x.shape[-1:])              # the scale of states grows with depth
        if isinstance(loop, int):
            return F.gelu(F.linear(x, self.w1[loop], self.b1[loop])) @ self.w2[loop] + self.b2[loop]
        hidden = F.gelu(torch.einsum("...c,ehc->...eh", x, self.w1) + self.b1)
        by_exit = (hidden * self.w2).sum(-1) + self.b2       # (..., n_exits): few, cheaper than gathering weights
        return by_exit.gather(-1, loop.clamp(max=len(self.b2) - 1)[..., None])[..., 0]

    def save(self, folder) -> None:
        """Add the gate to the checkpoint in `folder`, and remove the thresholds of the gate that it replaces."""
        def write(path: Path) -> None:
            save_file(self.state_dict(), path)
            (Path(folder) / THRESHOLDS_FILE).unlink(missing_ok=True)
        write_beside(folder, GATE_FILE, write)

    @classmethod
    def load(cls, folder, model: RecursiveTransformer) -> "Gate":
        """The gate of the checkpoint in `folder`. UserError if it has none, or that of another model."""
        path, c = settled(folder) / GATE_FILE, model.config
        if not path.exists():
            raise UserError(f"{folder} has no gate: train one with python -m evaluation.thresholds --ckpt={folder}, "
                            "or use --rule=max_prob, margin or entropy")
        try:
            tensors = load_file(path)
            hidden = tensors["b1"].shape[1]
            gate = cls(c.n_loop - 1, c.n_embd, hidden)
            gate.load_state_dict(tensors)
            if not all(tensor.isfinite().all() for tensor in tensors.values()):
                raise RuntimeError("its weights are not finite")
        except (OSError, SafetensorError, KeyError, IndexError, RuntimeError) as e:
            raise UserError(f"{path} is not the gate of this model ({str(e).splitlines()[0]}); train a new one with "
                            f"python -m evaluation.thresholds --ckpt={folder} --new_gate") from None
        return gate.to(upcast(model.embed.weight)).eval()    # fp32, or fp64


@dataclass
class Rule:
    """Decides which tokens exit: rule(x, loop, logits) -> bool (...), for states x (..., C) after `loop`.

    Rules with a score, in [0, 1], let a token exit where it reaches `threshold`. `loop` is an int, or int64 (...) where
    rows are at different loops. `logits` (..., V) may be None unless `reads_logits`. Every row is decided by its own
    state alone, and nothing waits for the GPU. After the last loop all tokens exit, without a rule.
    """
    name: RuleName = "never"
    threshold: float = math.inf
    exit_loop: int = 0                                       # rule fixed: all tokens exit after this loop
    gate: Gate | None = None

    def __post_init__(self):
        if self.name not in get_args(RuleName):
            raise UserError(f"the rule {self.name!r} is unknown; use one of {', '.join(get_args(RuleName))}")

    @property
    def reads_logits(self) -> bool:
        return self.name in ("max_prob", "margin", "entropy")

    def __call__(self, x: Tensor, loop: int | Tensor, logits: Tensor | None = None) -> Tensor:
        if self.name == "never":
            return torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
        if self.name == "fixed":
            return torch.zeros(x.shape[:-1], dtype=torch.long, device=x.device) + loop >= self.exit_loop
        return self.score(x, loop, logits) >= self.threshold

    def score(self, x: Tensor, loop: int | Tensor, logits: Tensor | None = None) -> Tensor:
        """Confidence (...) in [0, 1] that the last loop would have the same argmax."""
        if self.name == "gate":
            return self.gate(x, loop).sigmoid()
        total = logits.logsumexp(-1)
        if self.name == "max_prob":
            return (logits.amax(-1) - total).exp()
        if self.name == "margin":                            # between the two most probable tokens
            first, second = (logits.topk(2, dim=-1).values - total[..., None]).exp().unbind(-1)
            return first - second
        logp = logits - total[..., None]                     # 1 - entropy / ln V
        return (1 + (logp.exp() * logp).sum(-1) / math.log(logits.size(-1))).clamp(min=0)    # rounding may go below 0


def load_rule(folder, model: RecursiveTransformer, name: RuleName, threshold: float | None = None,
              exit_loop: int = 1, keys: Keys = "exact") -> Rule:
    """The rule `name` for the model in `folder`, by default with the threshold calibrated for `keys`. exit_loop counts
    from 1. UserError if the model has no exits, or the rule lacks a gate, threshold or loop."""
    n_loop = model.config.n_loop
    if name == "never":
        return Rule()
    if n_loop < 2:
        raise UserError(f"--rule={name} lets tokens exit before the last loop, and the model in {folder} has 1 loop; "
                        "use --rule=never, or a model with 2 loops or more")
    if name == "fixed":
        if not 1 <= exit_loop <= n_loop:
            raise UserError(f"--exit_loop={exit_loop}, but the model has the loops 1 to {n_loop}")
        return Rule(name, exit_loop=exit_loop - 1)
    gate = Gate.load(folder, model) if name == "gate" else None
    if threshold is None:
        calibrated = read_thresholds(folder).get(keys, {})
        threshold = calibrated.get("thresholds", {}).get(name)
        if threshold is None:
            raise UserError(f"{folder} has no calibrated threshold of {name} for --keys={keys}: run "
                            f"python -m evaluation.thresholds --ckpt={folder} --keys={keys} --agreement=0.98, or give "
                            "--threshold (0 to 1)")
        served, dtype = model.embed.weight.dtype, calibrated.get("dtype")
        if dtype and dtype != str(served):                   # scores near the threshold round to either side
            print(f"the thresholds of {folder} were calibrated in {dtype} and are used in {served}: the agreement of "
                  f"{calibrated.get('agreement', 'the calibration')} is not ensured", file=sys.stderr)
    if not (0 <= threshold <= 1 or threshold == math.inf):
        raise UserError(f"--threshold={threshold} is out of range: scores are between 0 and 1 (inf = never)")
    return Rule(name, threshold, gate=gate)


def read_thresholds(folder) -> dict:
    """{keys: {"agreement", "confidence", "dtype", "thresholds": {rule: threshold}}} of the checkpoint, or {}."""
    path = settled(folder) / THRESHOLDS_FILE
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
        if not all(0 <= t <= 1 for by_keys in found.values() for t in by_keys["thresholds"].values()):
            raise ValueError("a threshold is not between 0 and 1")
        return found
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise UserError(f"{path} is not readable as thresholds ({e}); remove it, and calibrate again with "
                        f"python -m evaluation.thresholds --ckpt={folder}") from None


# ---------------------------------------------------------------------------------------------------------------------
# The oracle and the exit statistics of a text: all of its tokens at once

@dataclass
class ExitResult:
    """The exits of N tokens of a text, and what is predicted there."""
    exit_loop: Tensor                                        # (N,)
    token: Tensor                                            # (N,) argmax
    ce: Tensor                                               # (N,) cross entropy of the true next token


@dataclass
class ExitStats:
    """What a forward pass without exits predicts for N tokens of a text, after every loop."""
    token: Tensor                                            # (n_loop, N) argmax
    ce: Tensor                                               # (n_loop, N) cross entropy of the true next token
    scores: dict[str, Tensor]                                # by name of the rule: (n_loop - 1, N)

    @property
    def oracle(self) -> Tensor:
        """(N,) the earliest loop whose argmax is the last loop's (§2.4)."""
        return (self.token == self.token[-1]).int().argmax(0)    # the first of equal maxima

    def exit_at(self, exit_loop: Tensor) -> ExitResult:
        """The result where tokens exit after the loops (N,), with recomputed KV."""
        return ExitResult(exit_loop, *(by_loop.gather(0, exit_loop[None])[0] for by_loop in (self.token, self.ce)))


def score_exit(model: RecursiveTransformer, x: Tensor, targets: Tensor, loop: int,
               rules: Sequence[Rule] = ()) -> list[Tensor]:
    """[argmax, cross entropy of the target, each rule's score], all (...), for states x (..., C) after `loop`, computed
    in chunks: the logits of all tokens may not fit. UserError where they are not finite."""
    chunks, size = [], max(1, CHUNK // model.config.vocab_size)
    for x_, t in zip(x.flatten(0, -2).split(size), targets.flatten().split(size), strict=True):
        logits = model.logits(x_)
        ce = F.cross_entropy(logits, t, reduction="none")
        if not ce.isfinite().all():
            raise UserError(NOT_FINITE)
        chunks.append([logits.argmax(-1), ce, *(rule.score(x_, loop, logits) for rule in rules)])
    return [torch.cat(column).view_as(targets) for column in zip(*chunks, strict=True)]


@torch.no_grad()
def collect_exit_stats(model: RecursiveTransformer, pairs: list[tuple[Tensor, Tensor]],
                       rules: Sequence[Rule] = ()) -> ExitStats:
    """The statistics of the texts in `pairs`, inputs and targets (B, T); targets that are IGNORE are left out."""
    batches = [[] for _ in range(model.config.n_loop)]       # [loop][batch] = [argmax, ce, *scores]
    for idx, targets in progress(pairs, desc="scoring exits", unit="batch"):
        idx, targets = (t.to(model.embed.weight.device) for t in (idx, targets))
        kept = targets != IGNORE
        for loop, x in enumerate(model(idx)):
            scoring = rules if loop < model.config.n_loop - 1 else ()
            batches[loop].append(score_exit(model, x[kept], targets[kept], loop, scoring))
    by_loop = [[torch.cat(column) for column in zip(*of_loop, strict=True)] for of_loop in batches]
    token, ce = (torch.stack([columns[i] for columns in by_loop]) for i in range(2))
    return ExitStats(token, ce, {rule.name: torch.stack([columns[2 + i] for columns in by_loop[:-1]])
                                 for i, rule in enumerate(rules)})


@torch.no_grad()
def oracle_exits(model: RecursiveTransformer, idx: Tensor) -> Tensor:
    """(B, T) int64: for each token of idx (B, T) the earliest loop whose argmax is the last loop's (§2.4)."""
    return collect_exit_stats(model, [(idx, idx)]).oracle.view_as(idx)       # idx as targets: the oracle needs none


@torch.no_grad()
def run_exits(model: RecursiveTransformer, idx: Tensor, rule: Rule, keys: Keys = "exact") -> tuple[Tensor, Tensor]:
    """(states (B, T, C) with which the tokens idx (B, T) exit, their exit loops (B, T)), all tokens at once."""
    check_keys(keys, model.config)
    (B, T), last = idx.shape, model.config.n_loop - 1
    x = out = model.first_state(idx)
    cache = KVCache(model.config, B, T, x.device, x.dtype) if keys == "copy" else model.first_loop_kv(idx)
    exit_loop, exited = torch.full_like(idx, last), torch.zeros_like(idx, dtype=torch.bool)
    for loop in range(last + 1):
        x = model.block(x, loop, cache)
        out = torch.where(exited[..., None], out, x)
        if loop < last:
            exits = exits_in_chunks(model, rule, x, loop) & ~exited
            exit_loop, exited = torch.where(exits, loop, exit_loop), exited | exits
            if exited.all():
                break
            if keys == "copy":
                cache.exited = exited
    return out, exit_loop


def exits_in_chunks(model: RecursiveTransformer, rule: Rule, x: Tensor, loop: int) -> Tensor:
    """rule(x, loop) (...) for states x (..., C); a rule that reads logits gets them in chunks, as in `score_exit`."""
    if not rule.reads_logits:
        return rule(x, loop)
    chunks = x.flatten(0, -2).split(max(1, CHUNK // model.config.vocab_size))
    return torch.cat([rule(chunk, loop, model.logits(chunk)) for chunk in chunks]).view(x.shape[:-1])


@torch.no_grad()
def apply_rule(model: RecursiveTransformer, pairs: list, stats: ExitStats, rule: Rule,
               keys: Keys = "exact") -> ExitResult:
    """Exits of the texts in `pairs`: of a scored rule with recomputed KV from `stats`, else the texts run again."""
    if keys == "exact" and rule.name in stats.scores:
        exits = stats.scores[rule.name] >= rule.threshold                    # (n_loop - 1, N)
        return stats.exit_at(torch.cat([exits, torch.ones_like(exits[:1])]).int().argmax(0))
    batches = []
    for idx, targets in pairs:
        idx, targets = (t.to(model.embed.weight.device) for t in (idx, targets))
        kept, (x, exit_loop) = targets != IGNORE, run_exits(model, idx, rule, keys)
        batches.append([exit_loop[kept], *score_exit(model, x[kept], targets[kept], model.config.n_loop - 1)])
    return ExitResult(*(torch.cat(column) for column in zip(*batches, strict=True)))


def summarize(result: ExitResult, stats: ExitStats) -> dict:
    """Mean loops, share of tokens that exit after each loop, agreement with the last loop, perplexity, and the share
    caught: of the tokens that the oracle lets exit early, how many do so and agree with the last loop."""
    last, exit_loop = len(stats.token) - 1, result.exit_loop
    agree, exitable = result.token == stats.token[-1], stats.oracle < last
    return {"loops": exit_loop.double().mean().item() + 1,
            "left_at": (exit_loop.bincount(minlength=last + 1).double() / len(exit_loop)).tolist(),
            "agreement": agree.double().mean().item(), "perplexity": result.ce.double().mean().exp().item(),
            "caught": ((exit_loop < last) & agree & exitable).sum().item() / max(1, exitable.sum().item())}


# ---------------------------------------------------------------------------------------------------------------------
# Decoding: one token after the other

def greedy(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


def whole(number) -> int:
    """`number` as an int. TypeError if it is not an integer: 2.5, True, "2", None."""
    if isinstance(number, bool) or getattr(number, "dtype", None) in (bool, torch.bool):
        raise TypeError(f"{number!r} is not a whole number")
    return operator.index(number)


def end_ids(eos_id: int | Sequence[int] | None) -> tuple[int, ...]:
    """The ids that end a text, given none, one or several of them. UserError for anything else."""
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
           keys: Keys = "exact", sampler: Callable[[Tensor], Tensor] = greedy,
           eos_id: int | Sequence[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the next tokens (B,) of prompts idx (B, T) and their exit loops (B,), until all rows have ended or the
    context is full. sampler: logits (B, V) -> tokens (B,).

    Prompts run all loops, so the first token exits after the last one. A row ends with `eos_id`, or any of several ids,
    and repeats it with exit loop -1. A row whose logits are not finite has failed: token -1, exit loop -1 from then on;
    UserError if all have. Rows do not influence one another. All are inference tensors: clone them for autograd.
    """
    c, (B, T), embedding = model.config, idx.shape, model.embed.weight
    if not 0 < T <= c.n_ctx:
        raise UserError(f"a prompt of {T} tokens: give 1 (BOS, for an empty text) to {c.n_ctx - 1}, so that one more "
                        "fits the model's context")
    check_keys(keys, c)
    ends = torch.tensor(end_ids(eos_id), dtype=torch.long, device=idx.device)
    n_new = min(max_new_tokens, c.n_ctx - T)
    cache = KVCache(c, B, T + n_new, embedding.device, embedding.dtype)
    run_token = choose_kv_policy(model, cache, rule, keys, B)
    logits, exit_loop = model.logits(run_prompts(model, cache, idx)), torch.full_like(idx[:, 0], c.n_loop - 1)
    token, ended = torch.full_like(exit_loop, -1), torch.zeros_like(exit_loop, dtype=torch.bool)
    for step in range(n_new):
        failed = ~ended & ~logits.amax(-1).isfinite()        # NaN, or infinite
        token, ended = torch.where(ended, token, sampler(logits)).masked_fill(failed, -1), ended | failed
        if (token < 0).all():
            raise UserError(NOT_FINITE)
        yield token, torch.where(ended, -1, exit_loop)
        ended = ended | torch.isin(token, ends)
        if step == n_new - 1 or ended.all():
            return
        routed = Routed(logits, torch.full_like(exit_loop, -1), ended)
        logits, exit_loop, _ = run_token(token[:, None].clamp(min=0), routed)


def run_prompts(model: RecursiveTransformer, cache: KVCache, idx: Tensor) -> Tensor:
    """The last loop's states (B, C) of the last tokens of prompts idx (B, T). All tokens run the loops that add KV to
    the cache: with kv="first_loop" only the last token runs the others."""
    x = model(idx, cache, cache.kv_loops)[-1][:, -1:]
    for loop in range(cache.kv_loops, model.config.n_loop):
        x = model.block(x, loop, cache)
    return x[:, 0]


class Routed(NamedTuple):
    """The newest token of each row on its way through the loops. Rows that have ended count as exited."""
    logits: Tensor                                           # (B, V) at the exit
    exit_loop: Tensor                                        # (B,)
    exited: Tensor                                           # (B,) bool

    def route_exits(self, model: RecursiveTransformer, rule: Rule, x: Tensor, loop: int) -> "Routed":
        """The same with the rows that exit after `loop`, of states x (B, C): by the rule; after the last loop all."""
        last = loop == model.config.n_loop - 1
        logits = model.logits(x) if rule.reads_logits and not last else None
        exits = ~self.exited & (True if last else rule(x, loop, logits))
        if not exits.any():
            return self
        logits = model.logits(x) if logits is None else logits
        return Routed(torch.where(exits[:, None], logits, self.logits), torch.where(exits, loop, self.exit_loop),
                      self.exited | exits)


def choose_kv_policy(model: RecursiveTransformer, cache: KVCache, rule: Rule | None, keys: Keys, rows: int) -> Callable:
    """(idx, Routed) -> Routed: the function that runs the newest tokens idx (B, 1) until they exit."""
    if rule is None or rule == Rule():                       # not by name: any callable with `reads_logits` is a rule
        return partial(run_all_loops, model, cache)
    if cache.kv_loops == 1:
        return partial(share_kv, model, cache, rule)
    if keys == "copy":
        return partial(copy_kv, model, cache, rule)
    if rows > 1:
        return partial(recompute_kv_now, model, cache, rule)
    pending = [cache.k.new_empty(1, 0, model.config.n_embd)] * model.config.n_loop
    return partial(recompute_kv_later, model, cache, rule, pending)


def run_all_loops(model: RecursiveTransformer, cache: KVCache, idx: Tensor, routed: Routed) -> Routed:
    """No rule: the full model."""
    return routed.route_exits(model, Rule(), model(idx, cache)[-1][:, 0], model.config.n_loop - 1)


def share_kv(model: RecursiveTransformer, cache: KVCache, rule: Rule, idx: Tensor, routed: Routed) -> Routed:
    """kv="first_loop", or one loop: no KV is missing in the loops after the last exit, and none of them runs."""
    x = model.first_state(idx)
    for loop in range(model.config.n_loop):
        x = model.block(x, loop, cache)
        routed = routed.route_exits(model, rule, x[:, 0], loop)
        if routed.exited.all():
            break
    return routed


def recompute_kv_later(model: RecursiveTransformer, cache: KVCache, rule: Rule, pending: list[Tensor], idx: Tensor,
                       routed: Routed) -> Routed:
    """Recomputed KV, one row: the loops that a token skips run once a later token reaches them, in the same pass.
    pending: for each loop the states (1, n, C) of tokens that exited before it: exactly the next n positions there,
    since its cache.lengths lags by n."""
    x = model.first_state(idx)
    for loop in range(model.config.n_loop):
        x = model.block(torch.cat([pending[loop], x], 1), loop, cache)       # (1, n + 1, C), the newest token last
        pending[loop] = x[:, :0]
        routed = routed.route_exits(model, rule, x[:, -1], loop)
        if routed.exited.all() and loop < model.config.n_loop - 1:
            pending[loop + 1] = torch.cat([pending[loop + 1], x], 1)         # x holds those pending at `loop` too
            break
    return routed


def recompute_kv_now(model: RecursiveTransformer, cache: KVCache, rule: Rule, idx: Tensor, routed: Routed) -> Routed:
    """Recomputed KV, several rows: all run all loops, those that have exited for their KV alone. It saves no work."""
    x = model.first_state(idx)
    for loop in range(model.config.n_loop):
        x = model.block(x, loop, cache)
        routed = routed.route_exits(model, rule, x[:, 0], loop)
    return routed


def copy_kv(model: RecursiveTransformer, cache: KVCache, rule: Rule, idx: Tensor, routed: Routed) -> Routed:
    """Copied KV: a row that has exited copies the previous loop's, which is its exit's. Once all have, no loop runs."""
    x = model.first_state(idx)
    for loop in range(model.config.n_loop):
        cache.exited = routed.exited[:, None] if loop > 0 else None
        x = model.block(x, loop, cache)
        routed = routed.route_exits(model, rule, x[:, 0], loop)
        if routed.exited.all():
            for later in range(loop + 1, model.config.n_loop):
                cache.copy_loop(later)
            break
    return routed


if __name__ == "__main__":
    print("error: exits.py is not a script: run python -m evaluation.thresholds", *sys.argv[1:], file=sys.stderr)
    sys.exit(2)
