"""Exits as a draft: self-speculative decoding. It changes the speed of decoding, and neither a greedy text nor the
distribution of a sampled one.

The exit of an early loop drafts gamma tokens, one after the other, and the later loops verify all of them in one pass.
The draft's states and keys are the verification's, so no loop of an accepted token runs twice. A cycle with gamma = 2
that goes on from "the cat":

    first loop    cat ─► "sat"    sat ─► "on"     on            three passes of one token each, two heads
    later loops   cat ─► "sat"    sat ─► "in"     on ─► "the"   one pass of three tokens, one head for all three
                  equal: keep     not equal: "in" instead       what follows a rejected draft is dropped

For gamma + 1 first loops and one pass of the others a cycle yields 1 to gamma + 1 tokens: the accepted drafts, and one
of the full model. If each draft is accepted with probability p, that is (1 - p^(gamma+1)) / (1 - p) on average.

Greedy, a draft is accepted where it is the full model's argmax (blockwise parallel decoding, 1811.03115). Sampled, a
draft d is accepted with probability min(1, p(d) / q(d)), for p of the full model and q of the exit, and a rejected one
replaced by a sample of max(0, p - q): all tokens then have the distribution p (2211.17192, 2302.01318). That the first
layers of a model can draft for the rest is LayerSkip's idea (2404.16710).
"""

import sys
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from exits import NOT_FINITE, end_ids
from lib.cli import UserError
from model import Config, KVCache, RecursiveTransformer


def check_draft(config: Config, gamma: int, draft_loop: int = 0) -> None:
    """UserError if the model has no loop that could draft for a later one, or if there is nothing to draft."""
    if config.n_loop < 2:
        raise UserError("the model has 1 loop, and speculative decoding drafts with the exit of an early loop for the "
                        "later ones: give a model with 2 loops or more, or drop --speculative")
    if gamma < 1:
        raise UserError(f"gamma={gamma} tokens are to be drafted at a time: give 1 or more")
    if not 0 <= draft_loop < config.n_loop - 1:
        raise UserError(f"draft_loop={draft_loop}, but with {config.n_loop} loops the draft can come from the loops 0 "
                        f"to {config.n_loop - 2}: the last one verifies")


@torch.inference_mode()
def speculate(model: RecursiveTransformer, prompts: Sequence[Sequence[int]], max_new_tokens: int, gamma: int = 4,
              draft_loop: int = 0, probs: Callable[[Tensor], Tensor] | None = None,
              draw: torch.Generator | None = None,
              eos_id: int | Sequence[int] | None = None) -> Iterator[list[list[int]]]:
    """Yield after each cycle the lists of each text's new tokens, the accepted drafts and the full model's next one,
    until all texts have ended; a text that has ended has none. The first cycle, of the prompts, drafts nothing.

    probs: logits (N, V) -> probabilities (N, V) to sample from with `draw`; None = greedy, the default of `decode`
    (exits.py). Prompts may differ in length, and each accepts its own number of drafts. A text ends with `eos_id`, or
    any of several ids, after `max_new_tokens`, or where the context is full; or with the token -1, if its logits or
    those of its drafts are not finite: UserError if all fail. But for rounding, prompts do not influence one another.
    """
    c, embedding, B, length = model.config, model.embed.weight, len(prompts), [len(prompt) for prompt in prompts]
    check_draft(c, gamma, draft_loop)
    if not B or not all(0 < n <= c.n_ctx for n in length):
        raise UserError(f"prompts of {length} tokens: give one or more, each of 1 (BOS, for an empty text) to "
                        f"{c.n_ctx - 1} tokens, so that one more fits the model's context")
    limit = [min(n + max_new_tokens, c.n_ctx) for n in length]
    ends, last = {-1, *end_ids(eos_id)}, [0] * B                         # last: each text's newest token
    n_cached = max(limit) + min(gamma, max_new_tokens)                   # drafts beyond the limit are in it for a while
    cache = (KVCache if B == 1 else RaggedCache)(c, B, n_cached, embedding.device, embedding.dtype)
    idx = pad_sequence([torch.as_tensor(prompt, device=embedding.device) for prompt in prompts], batch_first=True)
    x = model(idx, cache)[-1][range(B), [n - 1 for n in length]]         # (B, C)
    accepted = accept(model.logits(x)[:, None], idx[:, :0], [], probs, draw)
    while True:
        new = [cut(row[:end - n], ends) for row, n, end in zip(accepted, length, limit, strict=True)]
        last = [row[-1] if row else token for row, token in zip(new, last, strict=True)]
        if max(last) < 0:
            yield [row[:-1] for row in new]
            raise UserError(NOT_FINITE)
        yield new
        length = [n + len(row) for n, row in zip(length, new, strict=True)]
        limit = [n if token in ends else end for n, token, end in zip(length, last, limit, strict=True)]
        left = max(end - n for n, end in zip(length, limit, strict=True))
        if not left:
            return
        rewind(cache, [n - 1 for n in length])                           # the newest token has no keys and values yet
        token = torch.tensor(last, device=embedding.device).clamp(min=0)
        states, drafts, draft_probs = draft(model, cache, token, min(gamma, left - 1), draft_loop, probs, draw)
        for loop in range(draft_loop + 1, c.n_loop):
            states = model.block(states, loop, cache)                    # (B, drafts + 1, C), all in one pass
        accepted = accept(model.logits(states), drafts, draft_probs, probs, draw)


def cut(tokens: list[int], ends: set[int]) -> list[int]:
    """The tokens up to the first that ends a text."""
    return tokens[:1 + next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]


def draft(model: RecursiveTransformer, cache: KVCache, token: Tensor, gamma: int, draft_loop: int,
          probs: Callable | None, draw: torch.Generator | None) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(states (B, gamma + 1, C) after `draft_loop` of the newest tokens (B,) and of the drafts that follow them, the
    drafts (B, gamma), and the gamma probabilities (B, V) that each was sampled with)."""
    states, tokens, draft_probs = [], [token], []
    while True:
        x = model.first_state(tokens[-1][:, None])
        for loop in range(draft_loop + 1):
            x = model.block(x, loop, cache)
        states.append(x)
        if len(tokens) > gamma:
            return torch.cat(states, 1), torch.stack(tokens, 1)[:, 1:], draft_probs
        logits = model.logits(x[:, 0])                                   # (B, V)
        if probs is None:
            tokens.append(logits.argmax(-1))
        else:
            draft_probs.append(probs(logits))
            tokens.append(sample_token(draft_probs[-1], draw).to(token.device))


def accept(logits: Tensor, drafts: Tensor, draft_probs: list[Tensor], probs: Callable | None,
           draw: torch.Generator | None) -> list[list[int]]:
    """For each row its accepted drafts, and the token that follows them: from the full model's logits (B, n + 1, V) at
    the newest token and the drafts (B, n). Where the logits of that token are not finite, it is -1."""
    rows, failed = torch.arange(len(logits)), ~logits.amax(-1).isfinite()          # failed (B, n + 1)
    if probs is None:
        best = logits.argmax(-1)                                         # (B, n + 1)
        agreed = (best[:, :-1] == drafts) & ~failed[:, :-1]
        n_accepted = agreed.cumprod(1).sum(1)                            # (B,)
        token = best[rows, n_accepted]
    else:
        p = probs(logits.flatten(0, 1)).view(logits.shape)               # on the device of `draw`
        q = torch.stack([*draft_probs, torch.zeros_like(p[:, 0])], 1)    # 0: nothing is drafted after the last draft
        drafts, failed = drafts.to(p.device), failed.to(p.device)
        p_draft, q_draft = (x[:, :-1].gather(-1, drafts[..., None])[..., 0] for x in (p, q))         # (B, n)
        draws = torch.rand(drafts.shape, generator=draw, dtype=p.dtype, device=p.device)
        agreed = (draws * q_draft < p_draft) & ~failed[:, :-1]           # with probability min(1, p / q)
        n_accepted = agreed.cumprod(1).sum(1)
        p, q = p[rows, n_accepted], q[rows, n_accepted]                  # (B, V)
        rest = (p - q).clamp(min=0)
        token = sample_token(torch.where(rest.sum(-1, keepdim=True) > 0, rest, p), draw)      # else p = q, rounded
    token = token.masked_fill(failed[rows, n_accepted], -1)
    return [row[:n] + [t] for row, n, t in zip(drafts.tolist(), n_accepted.tolist(), token.tolist(), strict=True)]


def sample_token(probs: Tensor, draw: torch.Generator | None = None) -> Tensor:
    """One token (...) for each of the probabilities (..., V), up to a factor: torch.multinomial without its
    synchronisation."""
    return (probs / torch.empty_like(probs).exponential_(generator=draw)).argmax(-1)


# ---------------------------------------------------------------------------------------------------------------------
# The cache: rejected drafts leave it, and rows of a batch may differ in length

def rewind(cache: KVCache, length: list[int]) -> None:
    """Keep the first `length` positions of each row, in all loops. Later ones are masked until they are overwritten."""
    if isinstance(cache, RaggedCache):
        cache.start = torch.tensor(length, device=cache.k.device)
        cache.longest, cache.lengths = max(length), [0] * len(cache.lengths)
    else:
        cache.lengths = [length[0]] * len(cache.lengths)


class RaggedCache(KVCache):
    """A KVCache whose rows hold sequences of different lengths: its `lengths` count from each row's `start` on."""

    def __init__(self, config: Config, batch: int, max_len: int, device="cpu", dtype=torch.float32):
        super().__init__(config, batch, max_len, device, dtype)
        self.row = torch.arange(batch, device=device)[:, None]
        rewind(self, [0] * batch)

    def extend(self, loop: int, T: int) -> tuple[Tensor, Tensor]:
        """Rotary angles of the next T positions of each row at `loop`, as if all B T were one sequence."""
        if loop < self.kv_loops:
            self.lengths[loop] += T
        end = self.lengths[min(loop, self.kv_loops - 1)]
        self.end = self.longest + end
        self.pos = self.start[:, None] + torch.arange(end - T, end, device=self.start.device)              # (B, T)
        self.mask = torch.arange(self.end, device=self.start.device) <= self.pos[:, None, :, None]         # causal
        return self.rope[0][self.pos.flatten()], self.rope[1][self.pos.flatten()]

    def attend(self, loop: int, layer: int, q: Tensor, k: Tensor | None, v: Tensor | None) -> Tensor:
        """Attention (B, T, H, D) to all positions up to each query's own; q (1, B T, H, D), k and v (1, B T, K, D)."""
        keys, values = self.depths[min(loop, self.kv_loops - 1) * self.n_unique + layer]       # (B, K, max_len, D)
        if k is not None:
            keys[self.row, :, self.pos], values[self.row, :, self.pos] = (x.view(*self.pos.shape, *x.shape[2:])
                                                                          for x in (k, v))
        q = q.view(*self.pos.shape, *q.shape[2:]).transpose(1, 2)        # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, keys[:, :, :self.end], values[:, :, :self.end], self.mask,
                                           enable_gqa=q.size(1) != keys.size(1))
        return y.transpose(1, 2)


if __name__ == "__main__":
    print("error: speculative.py is not a script: run python sample.py --speculative=4", *sys.argv[1:], file=sys.stderr)
    sys.exit(2)
