"""Continuous depth-wise batching (§2.4, App. K), for real: a pass of the shared block serves rows at different loops.

All loops run the same layers, so a batch need not stand at one depth. Each slot holds a sequence, and a pass moves
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from exits import NOT_FINITE, Keys, Rule, check_keys, end_ids, likeliest, whole
from kernels import decode_attention
from lib.cli import UserError
from model import Config, KVCache, RecursiveTransformer, rope_angles


class SlotCache:
    """Keys and values of sequences at different loops and positions, one sequence in each slot.

    Per stored layer (slots + 1, n_loop, max_len, K, D): a row finds its own part by slot and loop. The slot beyond the
    last takes what idle rows write.
    """

    def __init__(self, config: Config, slots: int, max_len: int, device="cpu", dtype=torch.float32):
        shape = (config.n_unique, slots + 1, config.n_loop, max_len, config.n_kv_head, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.rope = rope_angles(torch.arange(max_len, device=device), config)
        self.slot = self.pos = torch.zeros(0, dtype=torch.long, device=device)  # (M,) of the rows in the coming pass
        self.max_kv_len = max_len  # positions that attention reads: all of them, unless the host knows better

    def extend(self, loop: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """The rotary angles of the n rows of the coming pass, which count as one sequence of n tokens."""
        return self.rope[0][self.pos], self.rope[1][self.pos]

    def attend(self, loop: Tensor, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k, v (1, K, M, D) of M rows; returns what q (1, H, M, D) attends to, each in its own slot and loop."""
        q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))             # (M, heads, D)
        self.k[layer].index_put_((self.slot, loop, self.pos), k)
        self.v[layer].index_put_((self.slot, loop, self.pos), v)
        k, v = self.k[layer, :, :, :self.max_kv_len], self.v[layer, :, :, :self.max_kv_len]
        return decode_attention(q, k, v, self.slot, loop, self.pos + 1).transpose(0, 1)[None]


@dataclass(eq=False)                                         # two that say the same are two
class Request:
    """A prompt on its way, and what has become of it."""
    prompt: list[int]
    max_new_tokens: int
    eos_id: int | tuple[int, ...] | None = None              # the id, or the ids, any of which ends the text
    trace: list[int] | None = None                           # leave after these loops, whatever the rule says
    tokens: list[int] = field(default_factory=list)
    loops: list[int] = field(default_factory=list)           # index of the loop that each token left after
    status: Literal["waiting", "running", "done", "cancelled", "refused", "failed"] = "waiting"
    reason: str = ""                                         # why it was refused, or has failed
    arrived: int = 0                                         # passes of the engine when it came, and began
    started: int = -1


class Engine:
    """Slots, a queue, and passes. `generate` for a list of prompts; `add`, `cancel` and `run` for a stream of them.

    slots: sequences at a time; max_len: the longest, prompt and new tokens together. rule, keys: as in `decode`.
    head: for how many rows at a time the head runs, once so many have left or nobody is in flight: 1 is at once, more a
    stage of its own (with as many more slots the block stays full), 0 waits until nobody is in flight (synchronous:
    the batch waits for its slowest). choose: logits (n, V) -> tokens (n,).
    static: shapes are fixed and a pass waits for nothing on the host, which reads what was said one step late: so CUDA
    graphs can hold it, and on GPUs they do. Else idle rows are left out. Either way the same tokens.
    refill: for how many free slots at a time new requests are taken: 1 is at once, more runs prompts together, and all
    of them is static batching (a baseline).
    """

    def __init__(self, model: RecursiveTransformer, slots: int = 16, max_len: int | None = None,
                 rule: Rule | None = None, keys: Keys = "exact", head: int = 1,
                 choose: Callable[[Tensor], Tensor] = likeliest, static: bool | None = None,
                 refill: int = 1):
        c, device, dtype = model.config, model.embed.weight.device, model.embed.weight.dtype
        try:
            slots, head, refill, max_len = (whole(n) for n in (slots, head, refill,
                                                               c.n_ctx if max_len is None else max_len))
        except TypeError as e:
            raise UserError(f"slots, head, refill and max_len are whole numbers: {e}") from None
        check_keys(keys)
        if slots < 1 or not 0 <= head <= slots or not 1 <= refill <= slots or not 2 <= max_len <= c.n_ctx:
            raise UserError(f"slots={slots}, head={head}, refill={refill}, max_len={max_len}: an engine has 1 slot or "
                            "more, a head for 0 to as many rows, a refill of 1 to as many slots, and a max_len from 2 "
                            f"to the model's context of {c.n_ctx}")
        self.model, self.slots, self.max_len, self.rule, self.keys = model, slots, max_len, rule or Rule(), keys
        self.head, self.choose, self.refill, self.device, self.last = head, choose, refill, device, c.n_loop - 1
        self.static = device.type == "cuda" if static is None else static
        self.cache = SlotCache(c, slots, max_len, device, dtype)
        self.ghosts = self.last if keys == "exact" else 0    # of a slot, at most: one at each loop but the first

        def new(*shape, fill=0, dtype=torch.long):
            return torch.full(shape, fill, device=device, dtype=dtype)
        self.x = new(slots, c.n_embd, dtype=dtype)           # state of the token in flight, or of the one that left
        self.loop = new(slots, fill=-1)                      # the loop it is to run; -1 = none is in flight
        self.pos = new(slots)                                # its position
        self.left = new(slots, fill=-1)                      # the loop it left after if it waits for the head, or -1
        self.waited = new(slots)                             # passes that it has waited
        self.made, self.limit = new(slots), new(slots)
        self.ends = new(slots, c.vocab_size, fill=False, dtype=torch.bool)     # which tokens end the sequence
        self.trace = new(slots, max_len, fill=c.n_loop)      # the loop the nth token leaves after; n_loop = by the rule
        self.ghost_x = new(slots, self.ghosts, c.n_embd, dtype=dtype)  # [:, i]: of the ghost that is to run loop i + 1
        self.ghost_pos = new(slots, self.ghosts, fill=-1)              # its position; -1 = there is none
        self.deeper = torch.arange(1, self.ghosts + 1, device=device)          # the loops that ghosts run
        self.y = new(slots * (1 + self.ghosts), c.n_embd, dtype=dtype)         # what a pass makes of all rows
        self.said = new(4, 0)                                # by the head: slots, tokens, loops (-1 = nothing), and
        #                                                      ends: 0 = goes on, 1 = has ended, 2 = has failed
        self.owner: list[Request | None] = [None] * slots
        self.queue: deque[Request] = deque()
        self.unread: deque = deque()                         # (owners, said) that the host has not read yet
        self.graphs: dict = {}
        self.counts = fetch(new(2))                          # rows that wait for the head, and in flight: a pass ago
        self.ran = new(2)                                    # rows that the passes ran, and how many were ghosts
        self.stats = dict.fromkeys(("passes", "head_runs", "head_rows", "prefill_tokens", "longest_wait"), 0)
        self.stats |= dict.fromkeys(("prefill_s", "block_s", "decision_s", "head_s"), 0.0)

    # -----------------------------------------------------------------------------------------------------------------
    # What callers use

    def add(self, prompt: Sequence[int], max_new_tokens: int, eos_id: int | Sequence[int] | None = None,
            trace: Sequence[int] | None = None) -> Request:
        """Queue a prompt. One that cannot be served is refused alone: its `status` is "refused", its `reason` says why.

        eos_id: the id that ends the text, or several. trace: the nth new token leaves after loop trace[n], whatever the
        rule says; the first has run all loops. Tokens beyond its end leave by the rule.
        """
        request = Request(prompt, max_new_tokens, eos_id, trace, arrived=self.stats["passes"])
        try:
            self.check(request)
            self.queue.append(request)
        except UserError as e:
            request.status, request.reason = "refused", str(e)
        return request

    def check(self, request: Request) -> None:
        """Raise UserError if the request cannot be served; else its numbers are Python's own from here on."""
        size = self.model.config.vocab_size
        request.prompt = integers("a token of the prompt", request.prompt, size)
        n, ends = len(request.prompt), integers("an id that ends the text", end_ids(request.eos_id), size)
        request.eos_id = tuple(ends) if len(ends) > 1 else ends[0] if ends else None
        if request.trace is not None:
            request.trace = integers("a loop of the trace", request.trace, self.last + 1)
        if not n:
            raise UserError("the prompt is empty")
        try:
            request.max_new_tokens = whole(request.max_new_tokens)
        except TypeError as e:
            raise UserError(f"max_new_tokens must be a whole number: {e}") from None
        if request.max_new_tokens < 1:
            raise UserError(f"{request.max_new_tokens} new tokens were asked for, at least 1 is needed")
        if n + request.max_new_tokens > self.max_len:
            raise UserError(f"{n} tokens of prompt and {request.max_new_tokens} new ones do not fit the {self.max_len} "
                            "of a slot")

    def cancel(self, request: Request) -> None:
        """Nothing more comes of it, and its slot is free at once. What has come stays."""
        if not isinstance(request, Request):
            raise UserError(f"{request!r} is no request: give what `add` returned")
        if request in self.queue:
            self.queue.remove(request)
        elif request in self.owner:
            slot = self.owner.index(request)
            self.owner[slot] = None
            self.loop[slot] = self.left[slot] = self.ghost_pos[slot] = -1
        elif request.status in ("waiting", "running"):
            raise UserError("the request is another engine's: cancel it there")
        else:
            return
        request.status = "cancelled"

    def run(self) -> Iterator[tuple[Request, int, int]]:
        """Yield (request, token, loop) as tokens come, until nothing is left to do. Requests may be added and cancelled
        in between."""
        while self.queue or any(self.owner):
            for said in self.step():
                if said[0].status != "cancelled":            # by the caller, since
                    yield said

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int,
                 eos_id: int | Sequence[int] | None = None) -> list[Request]:
        """The requests made of the prompts, in their order, each with its tokens and loops, and what became of it in
        its `status`: "done", or "refused" or "failed" with a `reason`."""
        requests = [self.add(prompt, max_new_tokens, eos_id) for prompt in prompts]
        for _ in self.run():
            pass
        return requests

    @torch.inference_mode()
    def step(self) -> list[tuple[Request, int, int]]:
        """One pass, the head if it is its turn, and what the host has read since: (request, token, loop)."""
        if self.head or not (self.loop > 0).any():           # synchronous: new prompts wait for the batch as well
            self.admit()
        self.timed("block_s", self.advance)
        self.timed("decision_s", self.part)
        self.stats["passes"] += 1
        if self.head_has_its_turn():
            self.timed("head_s", self.speak)
            self.unread.append((list(self.owner), *fetch(self.said)))
        out = []
        while len(self.unread) > self.static:
            out += self.read(*self.unread.popleft())
        return out

    def timed(self, name: str, work: Callable) -> None:
        """Run a part of the step. On a GPU with fixed shapes as a CUDA graph: the first time as it is, which compiles
        what it needs, the second time captured, from then on replayed."""
        began = time.perf_counter()
        if not (self.static and self.device.type == "cuda") or name not in self.graphs:
            work()
            self.graphs[name] = None
        else:
            if self.graphs[name] is None:
                self.graphs[name] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graphs[name]):    # records, and runs nothing
                    work()
            self.graphs[name].replay()
        self.stats[name] += time.perf_counter() - began

    # -----------------------------------------------------------------------------------------------------------------
    # The parts of a step

    def admit(self) -> None:
        """Free slots take requests in the order of their coming: fewer where memory is too small for all their prompts
        at once, and one whose prompt alone is too much has failed."""
        free = [slot for slot, owner in enumerate(self.owner) if owner is None]
        if not self.queue or len(free) < self.refill:
            return
        began, n = time.perf_counter(), min(len(free), len(self.queue))
        taken = list(zip(free, self.queue, strict=False))    # they stay in the queue until nothing can fail any more
        while True:
            try:
                self.prefill(taken[:n])
                break
            except RuntimeError as e:                        # an OutOfMemoryError, but not so on CPUs
                if not isinstance(e, torch.OutOfMemoryError) and "allocate memory" not in str(e):
                    raise
                if n == 1:
                    failed = self.queue.popleft()
                    failed.status, failed.reason = "failed", "out of memory: its prompt is too long for this device"
                    return
                n //= 2
        for slot, request in taken[:n]:
            self.queue.popleft()
            self.owner[slot], request.status, request.started = request, "running", self.stats["passes"]
            self.stats["longest_wait"] = max(self.stats["longest_wait"], request.started - request.arrived)
        self.stats["prefill_tokens"] += sum(len(request.prompt) for _, request in taken[:n])
        self.stats["prefill_s"] += time.perf_counter() - began

    def prefill(self, taken: list[tuple[int, Request]]) -> None:
        """Run these prompts through all loops, side by side, into their slots, where they wait for the head like any
        token that left."""
        c = self.model.config
        slots = torch.tensor([slot for slot, _ in taken], device=self.device)
        ends = torch.tensor([len(request.prompt) - 1 for _, request in taken], device=self.device)
        idx = pad_sequence([torch.tensor(request.prompt) for _, request in taken], batch_first=True).to(self.device)
        kv = KVCache(c, *idx.shape, self.device, self.x.dtype)                         # idx (n, T), padded behind
        state = self.model(idx, kv)[-1]                                                # (n, T, C)
        for ours, theirs in ((self.cache.k, kv.k), (self.cache.v, kv.v)):              # theirs (n_layer, n, K, T, D)
            theirs = theirs.unflatten(0, (c.n_loop, c.n_unique)).permute(1, 2, 0, 4, 3, 5)
            for row, (slot, request) in enumerate(taken):
                ours[:, slot, :, :len(request.prompt)] = theirs[:, row, :, :len(request.prompt)]
        self.x[slots] = state[torch.arange(len(taken), device=self.device), ends]
        self.limit[slots] = torch.tensor([r.max_new_tokens for _, r in taken], device=self.device)
        self.ends[slots], self.trace[slots] = False, c.n_loop
        for slot, request in taken:
            self.ends[slot, list(end_ids(request.eos_id))] = True
            if request.trace:
                trace = torch.tensor(request.trace[:self.max_len], device=self.device)
                self.trace[slot, :len(trace)] = trace
        self.pos[slots], self.left[slots], self.waited[slots], self.made[slots] = ends, self.last, 0, 0

    def advance(self) -> None:
        """One pass of the block: every token in flight, ghost or not, runs its loop."""
        here = torch.arange(self.slots, device=self.device)
        # Rows (M,): one for each slot, then its ghosts. What idle ones write goes to the spare slot.
        loop = torch.cat([self.loop, torch.where(self.ghost_pos >= 0, self.deeper, -1).flatten()])
        slot = torch.where(loop >= 0, torch.cat([here, here.repeat_interleave(self.ghosts)]), self.slots)
        pos = torch.cat([self.pos, self.ghost_pos.flatten()]).clamp(min=0)
        x = torch.cat([self.x, self.ghost_x.flatten(0, 1)])                            # (M, C)
        self.ran += torch.stack([(loop >= 0).sum(), (self.ghost_pos >= 0).sum()])
        if self.static:
            self.cache.slot, self.cache.pos = slot, pos
            self.y.copy_(self.model.block(x, loop, self.cache))
            return
        rows = indices(loop >= 0)
        if len(rows):
            self.cache.slot, self.cache.pos, self.cache.max_kv_len = slot[rows], pos[rows], int(pos[rows].max()) + 1
            self.y[rows] = self.model.block(x[rows], loop[rows], self.cache)

    def part(self) -> None:
        """After a pass: who may leave, leaves, and waits for the head; the others stand at their next loop."""
        x, ghost_x = self.y[:self.slots], self.y[self.slots:].view_as(self.ghost_x)
        leaves = (self.loop == self.last) | (self.loop >= 0) & self.may_leave(x)
        if self.ghosts:  # they go one loop on, the last one's are done; who leaves early joins behind
            joins = leaves[:, None] & (self.loop[:, None] + 1 == self.deeper)          # (S, ghosts)
            ghost_x, ghost_pos = ghost_x.roll(1, 1), self.ghost_pos.roll(1, 1)
            ghost_pos[:, 0] = -1
            self.ghost_x.copy_(torch.where(joins[..., None], x[:, None], ghost_x))
            self.ghost_pos.copy_(torch.where(joins, self.pos[:, None], ghost_pos))
        else:
            self.copy_keys(leaves)
        self.x.copy_(torch.where(self.loop[:, None] >= 0, x, self.x))
        self.waited.copy_(torch.where(leaves, 0, self.waited + 1))
        self.left.copy_(torch.where(leaves, self.loop, self.left))
        self.loop.copy_(torch.where(leaves | (self.loop < 0), -1, self.loop + 1))

    def may_leave(self, x: Tensor) -> Tensor:
        """(S,) by the trace where there is one, else by the rule. Of idle rows the answer means nothing."""
        logits = self.model.logits(x) if self.rule.reads_logits else None
        traced = self.trace.gather(1, self.made[:, None])[:, 0]
        return torch.where(traced <= self.last, self.loop >= traced, self.rule(x, self.loop.clamp(min=0), logits))

    def copy_keys(self, leaves: Tensor) -> None:
        """keys="copy": at a token's position, the keys of the loop it leaves after stand in for those of later ones."""
        here = torch.arange(self.slots, device=self.device)
        for kept in (self.cache.k, self.cache.v):                                      # (layers, S + 1, n_loop, T, ...)
            own = kept[:, here, self.loop.clamp(min=0), self.pos]                      # (layers, S, K, D)
            for later in range(1, self.last + 1):
                slot = torch.where(leaves & (self.loop < later), here, self.slots)
                kept[:, slot, later, self.pos] = own

    def head_has_its_turn(self) -> bool:
        """With fixed shapes by the counts of the pass before, which the host need not wait for."""
        if self.static and self.head <= 1:                   # for all slots at every pass
            return True
        counts = fetch(torch.stack([(self.left >= 0).sum(), (self.loop >= 0).sum()]))
        now, self.counts = (self.counts if self.static else counts), counts
        waiting, moving = read_back(*now)
        return waiting > 0 and (waiting >= self.head > 0 or not moving)

    def speak(self) -> None:
        """The head says the next tokens of rows that wait, the longest first, and they enter the first loop."""
        waiting = self.left >= 0
        if self.static:
            rows = torch.where(waiting, self.waited, -1).topk(self.head if self.head > 1 else self.slots).indices
            waiting = waiting & ~((self.loop >= 0).any() & (self.head == 0))
        else:
            rows = indices(waiting)
        logits, valid, made = self.model.logits(self.x[rows]), waiting[rows], self.made[rows] + 1
        token = self.choose(logits)
        broken = ~logits.amax(-1).isfinite()                 # NaN or infinite: there is nothing to choose from
        ended = broken | self.ends[rows, token] | (made >= self.limit[rows])
        self.said = torch.stack([rows, token, torch.where(valid, self.left[rows], -1), ended + 1 * broken])
        self.x[rows] = torch.where(valid[:, None], self.model.first_state(token[:, None])[:, 0], self.x[rows])
        self.loop[rows] = torch.where(valid & ~ended, 0, self.loop[rows])
        self.left[rows] = torch.where(valid, -1, self.left[rows])
        self.pos[rows] += valid
        self.made[rows] += valid
        self.ghost_pos[rows] = torch.where((valid & ended)[:, None], -1, self.ghost_pos[rows])

    def read(self, owners: list[Request | None], said: Tensor, ready) -> list[tuple[Request, int, int]]:
        """Give the tokens to whom the slots belonged when they were said; free the slots of those that ended."""
        out = []
        for slot, token, loop, ended in zip(*read_back(said, ready), strict=True):
            request = owners[slot]
            if loop < 0 or request.status != "running":      # nothing was said; cancelled since
                continue
            if ended:
                request.status, self.owner[slot] = "done", None
            if ended == 2:
                request.status, request.reason = "failed", NOT_FINITE
                continue
            request.tokens.append(token)
            request.loops.append(loop)
            out.append((request, token, loop))
        self.stats["head_runs"] += 1
        self.stats["head_rows"] += len(out)
        return out


def integers(what: str, values: Iterable, size: int) -> list[int]:
    """The values, of a list, an array or a tensor, as ints below `size`. UserError, which says `what` each is, if they
    are of another kind or out of range."""
    try:
        if isinstance(values, str | bytes) and values or getattr(values, "ndim", 1) != 1:
            raise TypeError
        found = [whole(value) for value in values]
    except TypeError:
        raise UserError(f"{what} is not a whole number") from None
    if not all(0 <= value < size for value in found):
        raise UserError(f"{what} is not between 0 and {size - 1}")
    return found


def indices(mask: Tensor) -> Tensor:
    """Where `mask` (M,) is True, in order. Of 7 to 15, filled up to 16 with others: MKL multiplies so many rows up to
    twice as fast (and a GPU's tiles are of 16)."""
    n = int(mask.sum())
    n = 16 if 6 < n < 16 <= len(mask) else n
    return mask.sort(descending=True, stable=True).indices[:n]


def fetch(t: Tensor) -> tuple[Tensor, "torch.cuda.Event | None"]:
    """A copy of `t` on its way to the host, and the event that says when it is there. Nobody waits."""
    if not t.is_cuda:
        return t.clone(), None
    host, ready = torch.empty_like(t, device="cpu", pin_memory=True), torch.cuda.Event()
    host.copy_(t, non_blocking=True)
    ready.record()
    return host, ready


def read_back(host: Tensor, ready) -> list:
    if ready is not None:
        ready.synchronize()
    return host.tolist()
