"""Continuous depth-wise batching (§2.4, App. K), for real: one pass of the shared block serves rows at different loops.

All loops run the same layers, so a batch need not stand at the same depth. Each slot holds one sequence, and a pass moves
every token in flight one loop on, wherever it is. A token that may leave does so at once: the head says the next one,
which enters the first loop with the coming pass. A slot whose sequence has ended takes the next request.

    pass      slot 0            slot 1            slot 2
    1         "the" loop 1      "a"   loop 2      idle
    2         "cat" loop 1      "dog" loop 1      prompt admitted, all loops
    3         "cat" loop 2      "ran" loop 1      "is"  loop 1

What comes out is what `decode` (exits.py) says, token for token. With exact keys a token that left goes on as a ghost,
which only writes the keys of the loops it skipped. A ghost is always some loops ahead of its successor, so what a token
looks for in the cache is there; and no two tokens of a slot are ever at the same loop.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from exits import likeliest
from model import KVCache, RecursiveTransformer, SlotCache
from rules import Keys, Rule
from runtime import UserError


@dataclass
class Request:
    """A prompt on its way, and what has become of it."""
    prompt: list[int]
    max_new_tokens: int
    eos_id: int | None = None
    trace: list[int] | None = None                           # leave after these loops, whatever the rule says
    tokens: list[int] = field(default_factory=list)
    loops: list[int] = field(default_factory=list)           # index of the loop that each token left after
    state: str = "waiting"                                   # running, done, cancelled, or refused: and why
    arrived: int = 0                                         # passes of the engine when it came, and began
    started: int = -1


class Engine:
    """Slots, a queue, and passes. `generate` for a list of prompts; `add`, `cancel` and `run` for a stream of them.

    slots: sequences at a time; max_len: the longest, prompt and new tokens together. rule, keys: as in `decode`.
    head: how many rows must have left before the head runs for them: 1 at once, more as a stage of its own (with as
    many slots more, so that the block stays full); 0 waits until nobody is in flight (the batch waits for its slowest).
    choose: logits (n, V) -> tokens (n,). static: fixed shapes and nothing read back within a pass, as a CUDA graph
    needs it; else rows that are idle are left out. By default on GPUs.
    """

    def __init__(self, model: RecursiveTransformer, slots: int = 16, max_len: int | None = None,
                 rule: Rule | None = None, keys: Keys = "exact", head: int = 1,
                 choose: Callable[[Tensor], Tensor] = likeliest, static: bool | None = None):
        c, weight = model.config, model.embed.weight
        self.model, self.slots, self.rule, self.keys, self.head, self.choose = model, slots, rule or Rule(), keys, head, choose
        self.max_len = max_len or c.n_ctx
        if slots < 1 or not 0 <= head <= slots or not 2 <= self.max_len <= c.n_ctx:
            raise UserError(f"slots={slots}, head={head}, max_len={max_len}: an engine needs at least 1 slot, a head for 0 "
                            f"to as many rows, and a max_len between 2 and the model's context of {c.n_ctx}")
        self.static = weight.is_cuda if static is None else static
        self.device, self.last = weight.device, c.n_loop - 1
        self.cache = SlotCache(c, slots, self.max_len, weight.device, weight.dtype)
        self.ghosts = self.last if keys == "exact" else 0    # at most: one at each loop but the first

        def new(*shape, fill=0, dtype=torch.long):
            return torch.full(shape, fill, device=weight.device, dtype=dtype)
        self.x = new(slots, c.n_embd, dtype=weight.dtype)    # state of the token in flight, or of the one that left
        self.loop = new(slots, fill=-1)                      # the loop it is to run; -1 = none
        self.pos = new(slots)                                # its position
        self.left = new(slots, fill=-1)                      # the loop it left after and waits for the head; -1 = does not
        self.made, self.limit, self.eos = new(slots), new(slots), new(slots, fill=-1)
        self.trace = new(slots, self.max_len, fill=c.n_loop)
        self.ghost_x = new(slots, self.ghosts, c.n_embd, dtype=weight.dtype)   # [:, i] is to run loop i + 1
        self.ghost_pos = new(slots, self.ghosts, fill=-1)                      # -1 = none
        self.owner: list[Request | None] = [None] * slots
        self.queue: deque[Request] = deque()
        self.stats = {"passes": 0, "rows": 0, "ghost_rows": 0, "head_rows": 0, "head_runs": 0, "prefill_tokens": 0,
                      "block_s": 0.0, "decide_s": 0.0, "head_s": 0.0, "prefill_s": 0.0}

    # -----------------------------------------------------------------------------------------------------------------
    # What callers use

    def add(self, prompt: Sequence[int], max_new_tokens: int, eos_id: int | None = None,
            trace: Sequence[int] | None = None) -> Request:
        """Queue a prompt. One that cannot be served is refused alone: its `state` says why."""
        request = Request(list(prompt), max_new_tokens, eos_id, trace and list(trace), arrived=self.stats["passes"])
        size, room = self.model.config.vocab_size, self.max_len - len(request.prompt)
        if not request.prompt:
            request.state = "refused: the prompt is empty"
        elif not all(0 <= token < size for token in request.prompt):
            request.state = f"refused: the prompt has token ids outside 0 to {size - 1}"
        elif max_new_tokens < 1:
            request.state = f"refused: max_new_tokens={max_new_tokens} must be at least 1"
        elif max_new_tokens > room:
            request.state = (f"refused: {len(request.prompt)} tokens of prompt and {max_new_tokens} new ones are more than "
                             f"the {self.max_len} that a slot holds")
        else:
            self.queue.append(request)
        return request

    def cancel(self, request: Request) -> None:
        if request.state == "waiting":
            self.queue.remove(request)
        elif request.state == "running":
            self.free(self.owner.index(request))
        if request.state in ("waiting", "running"):
            request.state = "cancelled"

    def run(self) -> Iterator[tuple[Request, int, int]]:
        """Yield (request, token, loop) as tokens come, until nothing is left to do. Requests may be added and cancelled
        in between."""
        while self.queue or any(self.owner):
            yield from self.step()

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, eos_id: int | None = None) -> list[Request]:
        """The requests made of the prompts, in their order, each with its tokens and loops."""
        requests = [self.add(prompt, max_new_tokens, eos_id) for prompt in prompts]
        for _ in self.run():
            pass
        return requests

    # -----------------------------------------------------------------------------------------------------------------
    # A step: admit, one pass of the block, the head

    def step(self) -> list[tuple[Request, int, int]]:
        self.admit()
        moving = self.advance()
        return self.speak(moving)

    @torch.no_grad()
    def admit(self) -> None:
        """Free slots take requests, in the order of their coming. Prompts run all loops, side by side."""
        free = [slot for slot, owner in enumerate(self.owner) if owner is None]
        if not (free and self.queue) or (self.head == 0 and any(self.owner) and bool((self.loop >= 0).any())):
            return
        began, c = time.perf_counter(), self.model.config
        requests = [self.queue.popleft() for _ in range(min(len(free), len(self.queue)))]
        slots = torch.tensor(free[:len(requests)], device=self.device)
        lengths = torch.tensor([len(r.prompt) for r in requests], device=self.device)
        idx = torch.zeros(len(requests), int(lengths.max()), dtype=torch.long)     # shorter ones are padded behind
        for row, request in zip(idx, requests, strict=True):
            row[:len(request.prompt)] = torch.tensor(request.prompt)
        kv = KVCache(c, *idx.shape, self.device, self.x.dtype)
        state = self.model(idx.to(self.device), kv)[-1]                            # (n, T, C)
        for ours, theirs in ((self.cache.k, kv.k), (self.cache.v, kv.v)):          # theirs (n_layer, n, K, T, D)
            theirs = theirs.unflatten(0, (c.n_loop, c.n_unique)).permute(1, 2, 0, 4, 3, 5)
            ours[:, slots, :, :idx.size(1)] = theirs
        self.x[slots] = state[torch.arange(len(requests), device=self.device), lengths - 1]
        self.pos[slots], self.left[slots], self.made[slots] = lengths - 1, self.last, 0
        for request, slot in zip(requests, free, strict=False):
            self.owner[slot], request.state, request.started = request, "running", self.stats["passes"]
            self.limit[slot], self.eos[slot] = request.max_new_tokens, -1 if request.eos_id is None else request.eos_id
            self.trace[slot] = c.n_loop
            if request.trace is not None:                    # [0] is the token after the prompt: it ran all loops
                self.trace[slot, :len(request.trace)] = torch.tensor(request.trace, device=self.device)
        self.stats["prefill_tokens"] += int(lengths.sum())
        self.stats["prefill_s"] += time.perf_counter() - began

    @torch.no_grad()
    def advance(self) -> None:
        """One pass of the block: every token in flight, ghost or not, runs one loop on; who may leave, leaves."""
        began, S = time.perf_counter(), self.slots
        here = torch.arange(S, device=self.device)
        loop = torch.cat([self.loop, torch.where(self.ghost_pos >= 0, here.new_tensor(range(1, self.ghosts + 1)),
                                                 -1).flatten()])
        slot = torch.cat([here, here.repeat_interleave(self.ghosts)])
        slot = torch.where(loop >= 0, slot, S)               # what idle rows write goes to the spare slot
        pos = torch.cat([self.pos, self.ghost_pos.flatten()]).clamp(min=0)
        x = torch.cat([self.x, self.ghost_x.flatten(0, 1)])  # (M, C): a row per slot, then its ghosts
        if self.static:
            self.cache.slot, self.cache.pos = slot, pos
            x = self.model.block(x, loop, self.cache)
        else:
            rows = (loop >= 0).nonzero()[:, 0]
            self.cache.slot, self.cache.pos = slot[rows], pos[rows]
            if len(rows):
                x[rows] = self.model.block(x[rows], loop[rows], self.cache)
            self.stats["rows"] += len(rows)
            self.stats["ghost_rows"] += int((rows >= S).sum())
        x, ghost_x = x[:S], x[S:].unflatten(0, (S, self.ghosts))
        self.stats["passes"] += 1
        self.stats["block_s"] += time.perf_counter() - began

        began, moving = time.perf_counter(), self.loop >= 0
        logits = self.model.logits(x) if self.rule.reads_logits else None
        traced = self.trace.gather(1, self.made[:, None])[:, 0]
        may = torch.where(traced < self.last + 1, self.loop >= traced, self.rule(x, self.loop.clamp(min=0), logits))
        leaves = moving & (may | (self.loop == self.last))
        if self.ghosts:                                      # all go one loop on, and those that leave early join them
            at = torch.arange(self.ghosts, device=self.device)
            joins = leaves[:, None] & (self.loop[:, None] == at)                   # (S, ghosts)
            ghost_x, ghost_pos = ghost_x.roll(1, 1), self.ghost_pos.roll(1, 1)
            ghost_pos[:, 0] = -1
            self.ghost_x.copy_(torch.where(joins[..., None], x[:, None], ghost_x))
            self.ghost_pos.copy_(torch.where(joins, self.pos[:, None], ghost_pos))
        elif self.last:
            self.copy_keys(leaves)
        self.x.copy_(x)
        self.left.copy_(torch.where(leaves, self.loop, self.left))
        self.loop.copy_(torch.where(moving & ~leaves, self.loop + 1, -1))
        self.stats["decide_s"] += time.perf_counter() - began

    def copy_keys(self, leaves: Tensor) -> None:
        """The keys of the loop that a token leaves after stand in for those of the later ones, at its position."""
        here = torch.arange(self.slots, device=self.device)
        for kept in (self.cache.k, self.cache.v):            # (K layers, slots + 1, n_loop, T, K, D)
            own = kept[:, here, self.loop.clamp(min=0), self.pos]                  # (layers, S, K, D)
            for later in range(1, self.last + 1):
                slot = torch.where(leaves & (self.loop < later), here, self.slots)
                kept[:, slot, later, self.pos] = own

    @torch.no_grad()
    def speak(self, _=None) -> list[tuple[Request, int, int]]:
        """The head, for the rows that left: their next tokens, which enter the first loop."""
        began = time.perf_counter()
        waits = self.left >= 0
        if self.head == 0:
            run = not bool((self.loop >= 0).any())
        else:
            run = int(waits.sum()) >= self.head or not bool((self.loop >= 0).any())
        if not run:
            return []
        rows = waits.nonzero()[:, 0]
        token = self.choose(self.model.logits(self.x[rows]))
        made = self.made[rows] + 1
        ended = (token == self.eos[rows]) | (made >= self.limit[rows])
        said = list(zip(rows.tolist(), token.tolist(), self.left[rows].tolist(), ended.tolist(), strict=True))
        self.x[rows] = self.model.first_state(token[:, None])[:, 0]
        self.loop[rows], self.left[rows], self.made[rows] = torch.where(ended, -1, 0), -1, made
        self.pos[rows] += 1
        self.stats["head_rows"] += len(rows)
        self.stats["head_runs"] += 1
        out = []
        for slot, token, loop, done in said:
            request = self.owner[slot]
            request.tokens.append(token)
            request.loops.append(loop)
            out.append((request, token, loop))
            if done:
                request.state = "done"
                self.free(slot)
        self.stats["head_s"] += time.perf_counter() - began
        return out

    def free(self, slot: int) -> None:
        """Nobody's rows, and nothing left of who was there."""
        self.owner[slot] = None
        self.loop[slot], self.left[slot] = -1, -1
        self.ghost_pos[slot] = -1
