"""Continuous depth-wise batching (§2.4, App. K): one pass of the shared block runs rows at different loops.

All loops run the same layers, so the rows of a batch need not be at the same loop. The engine has slots, one
sequence each. A pass runs the block once and moves every token in flight one loop on. A token that exits goes
to the head, which samples the next token; that one enters the first loop in the next pass. A slot whose
sequence has ended takes the next request. With 2 loops, counted from 1 here and from 0 in the code:

    pass   slot 0                            slot 1                            slot 2
    1      "the" loop 1                      "a" loop 2                        idle
    2      "cat" loop 1, ghost "the" loop 2  "dog" loop 1                      a prompt, all loops
    3      "cat" loop 2                      "ran" loop 1, ghost "dog" loop 2  "is" loop 1

With a greedy sampler, each sequence is token for token that of `decode` (exits.py), under every schedule.

A token that exits early lacks the keys and values (KV) of the loops it skips, which later tokens attend to:

    keys="exact"   Recomputed KV: the token goes on as a *ghost*, a row that runs the skipped loops only to write
                   their KV. The next token starts at the first loop, so it is always at an earlier loop than the
                   ghosts before it: what it attends to has been written, and no two rows of a slot are at one loop.
    keys="copy"    Copied KV: the exit loop's KV are copied to the skipped loops. There are no ghosts, and later
                   tokens attend to an approximation (cf. CALM, 2207.07061: it projects the exit state anew).
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from exits import NOT_FINITE, Keys, Rule, check_keys, end_ids, greedy, whole
from kernels import decode_attention
from lib.cli import UserError
from model import Config, KVCache, RecursiveTransformer, rope_angles

ENDED, FAILED = 1, 2  # status of a sequence after a sampled token; 0 = it goes on


@dataclass(eq=False)  # compared by identity: two requests with the same fields are two requests
class Request:
    """A prompt, what is asked for, and the tokens generated so far."""
    prompt: list[int]
    max_new_tokens: int
    eos_id: int | tuple[int, ...] | None = None     # the token, or any of the tokens, that ends the sequence
    forced_exits: list[int] | None = None           # loops after which tokens exit, in place of the rule
    tokens: list[int] = field(default_factory=list)
    loops: list[int] = field(default_factory=list)  # loop after which each token exited, counted from 0
    status: Literal["waiting", "running", "done", "cancelled", "refused", "failed"] = "waiting"
    reason: str = ""                                # why it was refused or failed
    arrived: int = 0                                # passes of the engine before it was added
    started: int = -1                               # and before its prompt was run; -1 = not yet


class SlotCache:
    """Keys and values of every slot's sequence: k, v (n_unique, slots + 1, n_loop, max_len, K, D).

    Each row of a pass writes and reads at its own slot and loop; idle rows write to the spare slot, the last.
    """

    def __init__(self, config: Config, slots: int, max_len: int, device="cpu", dtype=torch.float32):
        shape = (config.n_unique, slots + 1, config.n_loop, max_len, config.n_kv_head, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.rope = rope_angles(torch.arange(max_len, device=device), config)
        self.slot = self.pos = torch.zeros(0, dtype=torch.long, device=device)  # (M,) of the next pass's rows
        self.max_kv_len = max_len  # positions that attention reads

    def extend(self, loop: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Rotary angles of the n rows of the next pass, as if they were one sequence of n tokens."""
        return self.rope[0][self.pos], self.rope[1][self.pos]

    def attend(self, loop: Tensor, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k, v (1, M, K, D) of M rows; returns the attention of q (1, M, H, D) to its row's slot and loop."""
        self.k[layer].index_put_((self.slot, loop, self.pos), k[0])
        self.v[layer].index_put_((self.slot, loop, self.pos), v[0])
        k, v = self.k[layer, :, :, :self.max_kv_len], self.v[layer, :, :, :self.max_kv_len]
        return decode_attention(q[0], k, v, self.slot, loop, self.pos + 1)[None]

    def store_prompts(self, kv: KVCache, scheduled: list[tuple[int, Request]]) -> None:
        """Copy the prompts' keys and values, without their padding, from `kv` to their slots."""
        for cache, new in ((self.k, kv.k), (self.v, kv.v)):                     # new (n_layer, n, K, T, D)
            new = new.unflatten(0, (cache.size(2), -1)).permute(1, 2, 0, 4, 3, 5)
            for i, (slot, request) in enumerate(scheduled):
                T = len(request.prompt)
                cache[:, slot, :, :T] = new[:, i, :, :T]                        # (n_unique, n_loop, T, K, D)

    def copy_to_later_loops(self, exits: Tensor, loop: Tensor, pos: Tensor) -> None:
        """Copied KV, cf. KVCache.copy_loop: where `exits` (S,), a slot's KV at `loop`, `pos` (S,) go to later loops."""
        slots, spare = torch.arange(len(loop), device=loop.device), len(loop)
        for cache in (self.k, self.v):
            own = cache[:, slots, loop.clamp(min=0), pos]                       # (n_unique, S, K, D)
            for later in range(1, cache.size(2)):
                cache[:, torch.where(exits & (loop < later), slots, spare), later, pos] = own


@dataclass(eq=False)
class SlotState:
    """What the device knows of each slot. Tensors are updated in place: CUDA graphs hold their addresses.

    loop    exit_loop    the slot's current token
    >= 0    -1           is in flight: it runs `loop` in the next pass
    -1      >= 0         exited after `exit_loop` and waits for the head
    -1      -1           does not exist: the slot is free, or its sequence has ended

    ghost_pos[:, i] = -1: no ghost runs loop i + 1 in the next pass. forced_exits = n_loop: the rule decides.
    S slots, G ghosts per slot at most: n_loop - 1 with recomputed KV, 0 with copied KV.
    """
    x: Tensor             # (S, C) the current token's hidden state: input of its next loop, or of the head
    loop: Tensor          # (S,) the loop that it runs in the next pass, or -1
    exit_loop: Tensor     # (S,) the loop after which it exited, or -1
    waited: Tensor        # (S,) passes that it has waited for the head; undefined in flight
    pos: Tensor           # (S,) its position in the sequence
    n_generated: Tensor   # (S,) tokens sampled so far
    max_tokens: Tensor    # (S,) tokens after which the sequence ends
    is_eos: Tensor        # (S, V) bool, tokens that end the sequence
    forced_exits: Tensor  # (S, max_len) loop after which the nth sampled token exits, or n_loop
    ghost_x: Tensor       # (S, G, C) hidden states of the ghosts
    ghost_pos: Tensor     # (S, G) their positions, or -1

    @classmethod
    def empty(cls, c: Config, slots: int, max_len: int, n_ghosts: int, device, dtype) -> "SlotState":
        def full(*shape, fill=0, dtype=torch.long):
            return torch.full((slots, *shape), fill, device=device, dtype=dtype)
        return cls(x=full(c.n_embd, dtype=dtype), loop=full(fill=-1), exit_loop=full(fill=-1), waited=full(),
                   pos=full(), n_generated=full(), max_tokens=full(),
                   is_eos=full(c.vocab_size, fill=False, dtype=torch.bool),
                   forced_exits=full(max_len, fill=c.n_loop),
                   ghost_x=full(n_ghosts, c.n_embd, dtype=dtype), ghost_pos=full(n_ghosts, fill=-1))

    def start(self, scheduled: list[tuple[int, Request]], x: Tensor, n_loop: int) -> None:
        """The prompts have run all loops, with states x (n, T, C): their last tokens wait for the head."""
        numbers = [(slot, len(request.prompt) - 1, request.max_new_tokens) for slot, request in scheduled]
        slots, last, limit = torch.tensor(numbers, device=x.device).unbind(1)   # (n,)
        self.x[slots] = x[torch.arange(len(slots), device=x.device), last]
        self.exit_loop[slots], self.waited[slots], self.pos[slots] = n_loop - 1, 0, last
        self.n_generated[slots], self.max_tokens[slots] = 0, limit
        self.is_eos[slots], self.forced_exits[slots] = False, n_loop
        for slot, request in scheduled:
            self.is_eos[slot, list(end_ids(request.eos_id))] = True
            if request.forced_exits:
                forced = torch.tensor(request.forced_exits[:self.forced_exits.size(1)], device=x.device)
                self.forced_exits[slot, :len(forced)] = forced

    def free(self, slot: int) -> None:
        self.loop[slot] = self.exit_loop[slot] = self.ghost_pos[slot] = -1


class Engine:
    """Serves requests: `generate` for a list of prompts; `add`, `run` and `cancel` for a stream of them.

    slots       sequences at a time
    max_len     longest sequence, prompt and new tokens together; None = the model's context
    rule, keys  as in `decode`
    head        tokens that the head waits for while others are in flight. 1 = it runs in every pass; more = in
                full batches; 0 = when no token is in flight (synchronous exits: the slowest token decides)
    sampler     logits (n, V) -> tokens (n,)
    static      shapes are fixed and, but with head = 0, the host never waits within a pass, so that CUDA graphs
                can hold it; the same tokens are read one step late. Otherwise idle rows are left out. None = on GPUs
    refill      free slots that new requests wait for. 1 = they start at once; more = prompts run together; all
                slots = static batching (a baseline)
    """

    def __init__(self, model: RecursiveTransformer, slots: int = 16, max_len: int | None = None,
                 rule: Rule | None = None, keys: Keys = "exact", head: int = 1,
                 sampler: Callable[[Tensor], Tensor] = greedy, static: bool | None = None, refill: int = 1):
        c, device, dtype = model.config, model.embed.weight.device, model.embed.weight.dtype
        try:
            max_len = c.n_ctx if max_len is None else max_len
            slots, head, refill, max_len = (whole(n) for n in (slots, head, refill, max_len))
        except TypeError as e:
            raise UserError(f"slots, head, refill and max_len must be whole numbers: {e}") from None
        check_keys(keys, c)
        if slots < 1 or not 0 <= head <= slots or not 1 <= refill <= slots or not 2 <= max_len <= c.n_ctx:
            raise UserError(f"slots={slots}, head={head}, refill={refill}, max_len={max_len}: use slots from 1, "
                            "head from 0 to slots, refill from 1 to slots, and max_len from 2 to the model's "
                            f"context of {c.n_ctx}")
        self.model, self.rule, self.keys, self.sampler = model, rule or Rule(), keys, sampler
        self.slots, self.max_len, self.head, self.refill = slots, max_len, head, refill
        self.device, self.last_loop = device, c.n_loop - 1
        self.static = device.type == "cuda" if static is None else static
        self.cache = SlotCache(c, slots, max_len, device, dtype)
        self.ghost_loops = torch.arange(1, c.n_loop if keys == "exact" else 1, device=device)  # (G,)
        self.n_ghosts = len(self.ghost_loops)                                   # G
        self.state = SlotState.empty(c, slots, max_len, self.n_ghosts, device, dtype)
        self.block_out = torch.zeros(slots * (1 + self.n_ghosts), c.n_embd, device=device, dtype=dtype)
        self.sampled: Tensor  # (4, n): slots, tokens, exit loops (-1 = no token) and status of the head's n rows
        self.slot_request: list[Request | None] = [None] * slots
        self.waiting: deque[Request] = deque()
        self.unread: deque = deque()  # (slot_request, fetched `sampled`) of each run of the head, until read
        self.graphs: dict[str, torch.cuda.CUDAGraph | None] = {}
        self.ran = torch.zeros(2, dtype=torch.long, device=device)              # rows run, ghosts among them
        self.counts = fetch(torch.zeros(2, dtype=torch.long))  # tokens waiting for the head, and in flight: a pass ago
        self.stats = dict.fromkeys(("passes", "head_runs", "head_rows", "prefill_tokens", "longest_wait"), 0)
        self.stats |= dict.fromkeys(("prefill_s", "block_s", "decision_s", "head_s"), 0.0)

    # --------------------------------------------------------------------------------------------------------
    # What callers use

    def add(self, prompt: Sequence[int], max_new_tokens: int, eos_id: int | Sequence[int] | None = None,
            forced_exits: Sequence[int] | None = None) -> Request:
        """The new request, which waits for a slot; "refused", with a `reason`, if it cannot be served.

        eos_id: the token that ends the sequence, or several. forced_exits: loops after which the new tokens exit;
        tokens beyond its end exit by the rule. Entry 0 has no effect: the prompt yields that token, after all loops.
        """
        request = Request(prompt, max_new_tokens, eos_id, forced_exits, arrived=self.stats["passes"])
        try:
            self.validate(request)
            self.waiting.append(request)
        except UserError as e:
            request.status, request.reason = "refused", str(e)
        return request

    def validate(self, request: Request) -> None:
        """Convert the request's numbers to Python's int. UserError if it cannot be served."""
        last_id = self.model.config.vocab_size - 1
        request.prompt = to_ints("a token of the prompt", request.prompt, 0, last_id)
        ends = to_ints("an id that ends the text", end_ids(request.eos_id), 0, last_id)
        request.eos_id = tuple(ends) if len(ends) > 1 else ends[0] if ends else None
        if request.forced_exits is not None:
            request.forced_exits = to_ints("a loop of forced_exits", request.forced_exits, 0, self.last_loop)
        request.max_new_tokens, = to_ints("max_new_tokens", [request.max_new_tokens], 1, self.max_len)
        n = len(request.prompt)
        if not n:
            raise UserError("the prompt is empty")
        if n + request.max_new_tokens > self.max_len:
            raise UserError(f"{n} tokens of prompt and {request.max_new_tokens} new ones do not fit the "
                            f"{self.max_len} of a slot")

    def cancel(self, request: Request) -> None:
        """Stop the request and free its slot at once. It keeps the tokens generated so far."""
        if not isinstance(request, Request):
            raise UserError(f"{request!r} is no request: give what `add` returned")
        if request in self.waiting:
            self.waiting.remove(request)
        elif request in self.slot_request:
            slot = self.slot_request.index(request)
            self.slot_request[slot] = None
            self.state.free(slot)
        elif request.status in ("waiting", "running"):
            raise UserError("the request is another engine's: cancel it there")
        else:
            return
        request.status = "cancelled"

    def run(self) -> Iterator[tuple[Request, int, int]]:
        """Yield (request, token, exit loop) as tokens are sampled, until no request is waiting or running.
        Requests may be added and cancelled in between."""
        while self.waiting or any(self.slot_request):
            for request, token, loop in self.step():
                if request.status != "cancelled":  # by the caller, after this step
                    yield request, token, loop

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int,
                 eos_id: int | Sequence[int] | None = None) -> list[Request]:
        """One finished request per prompt, in order: "done", or "refused" or "failed" with a `reason`."""
        requests = [self.add(prompt, max_new_tokens, eos_id) for prompt in prompts]
        for _ in self.run():
            pass
        return requests

    @torch.inference_mode()
    def step(self) -> list[tuple[Request, int, int]]:
        """Start requests (`prefill`), `run_block`, let tokens exit or go on (`route_exits`), `run_head` if it is due,
        and `collect` its tokens: (request, token, exit loop) of each new one."""
        self.prefill(self.schedule())
        self.timed("block_s", self.run_block)
        self.timed("decision_s", self.route_exits)
        self.stats["passes"] += 1
        if self.head_is_due():
            self.timed("head_s", self.run_head)
            self.unread.append((list(self.slot_request), fetch(self.sampled)))
        return self.collect()

    def timed(self, name: str, work: Callable) -> None:
        """Run `work` and add its seconds to stats[name]. With fixed shapes on a GPU it becomes a CUDA graph: the
        first call compiles kernels, the second records the graph; the seconds are those of launches only."""
        began = time.perf_counter()
        if not (self.static and self.device.type == "cuda") or name not in self.graphs:
            work()
            self.graphs[name] = None
        else:
            if self.graphs[name] is None:
                self.graphs[name] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graphs[name]):  # records, and runs nothing
                    work()
            self.graphs[name].replay()
        self.stats[name] += time.perf_counter() - began

    # --------------------------------------------------------------------------------------------------------
    # The parts of a step

    def schedule(self) -> list[tuple[int, Request]]:
        """(slot, request) of the waiting requests that take free slots now, in the order of their arrival."""
        free = [slot for slot, request in enumerate(self.slot_request) if request is None]
        if len(free) < self.refill or (self.head == 0 and (self.state.loop > 0).any()):
            return []  # synchronous exits: a batch that has run loop 0 lets no more prompts join
        return list(zip(free, self.waiting, strict=False))

    def prefill(self, scheduled: list[tuple[int, Request]]) -> None:
        """Start the scheduled requests, or fewer of them where memory is too small for all prompts at once. A
        request whose prompt alone is too large fails."""
        if not scheduled:
            return
        began = time.perf_counter()
        while True:
            try:
                self.run_prompts(scheduled)
                break
            except RuntimeError as e:  # OutOfMemoryError, or on CPUs just this
                if not isinstance(e, torch.OutOfMemoryError) and "allocate memory" not in str(e):
                    raise
                if len(scheduled) == 1:
                    failed = self.waiting.popleft()
                    failed.status = "failed"
                    failed.reason = "out of memory: its prompt is too long for this device"
                    return
                scheduled = scheduled[:len(scheduled) // 2]
        for slot, request in scheduled:  # in `waiting` until here, so that no error loses them
            self.waiting.popleft()
            self.slot_request[slot] = request
            request.status, request.started = "running", self.stats["passes"]
            self.stats["longest_wait"] = max(self.stats["longest_wait"], request.started - request.arrived)
            self.stats["prefill_tokens"] += len(request.prompt)
        self.stats["prefill_s"] += time.perf_counter() - began

    def run_prompts(self, scheduled: list[tuple[int, Request]]) -> None:
        """Run the prompts through all loops as one batch, padded at the end, and fill their slots."""
        c, prompts = self.model.config, [torch.tensor(request.prompt) for _, request in scheduled]
        idx = pad_sequence(prompts, batch_first=True).to(self.device)           # (n, T)
        kv = KVCache(c, *idx.shape, self.device, self.state.x.dtype)
        states = self.model(idx, kv)                                            # n_loop of (n, T, C)
        self.cache.store_prompts(kv, scheduled)
        self.state.start(scheduled, states[-1], c.n_loop)

    def run_block(self) -> None:
        """One pass: every token in flight and every ghost runs its loop. `block_out` holds the new states."""
        s, slots = self.state, torch.arange(self.slots, device=self.device)
        # Rows (M,): the slots' current tokens, then their ghosts. Idle rows write to the spare slot.
        loop = torch.cat([s.loop, torch.where(s.ghost_pos >= 0, self.ghost_loops, -1).flatten()])
        slot = torch.cat([slots, slots.repeat_interleave(self.n_ghosts)])
        slot = torch.where(loop >= 0, slot, self.slots)
        pos = torch.cat([s.pos, s.ghost_pos.flatten()]).clamp(min=0)
        x = torch.cat([s.x, s.ghost_x.flatten(0, 1)])                           # (M, C)
        self.ran += torch.stack([(loop >= 0).sum(), (s.ghost_pos >= 0).sum()])
        if self.static:
            self.cache.slot, self.cache.pos = slot, pos
            self.block_out.copy_(self.model.block(x, loop, self.cache))
            return
        rows = padded_indices(loop >= 0)
        if len(rows):
            self.cache.slot, self.cache.pos = slot[rows], pos[rows]
            self.cache.max_kv_len = int(pos[rows].max()) + 1
            self.block_out[rows] = self.model.block(x[rows], loop[rows], self.cache)

    def route_exits(self) -> None:
        """After a pass: tokens that exit wait for the head, the others go on to their next loop."""
        s, x = self.state, self.block_out[:self.slots]
        exits = (s.loop == self.last_loop) | (s.loop >= 0) & self.may_exit(x)   # (S,)
        if self.n_ghosts:
            self.route_ghosts(exits)
        else:
            self.cache.copy_to_later_loops(exits, s.loop, s.pos)
        s.x.copy_(torch.where(s.loop[:, None] >= 0, x, s.x))
        s.waited.copy_(torch.where(exits, 0, s.waited + 1))
        s.exit_loop.copy_(torch.where(exits, s.loop, s.exit_loop))
        s.loop.copy_(torch.where(exits | (s.loop < 0), -1, s.loop + 1))

    def may_exit(self, x: Tensor) -> Tensor:
        """(S,) bool, by forced_exits where given, else by the rule. Undefined where no token is in flight."""
        s, logits = self.state, self.model.logits(x) if self.rule.reads_logits else None
        forced = s.forced_exits.gather(1, s.n_generated[:, None])[:, 0]
        by_rule = self.rule(x, s.loop.clamp(min=0), logits)
        return torch.where(forced <= self.last_loop, s.loop >= forced, by_rule)

    def route_ghosts(self, exits: Tensor) -> None:
        """Column i holds the ghosts at loop i + 1: they move one column on. Tokens that exit early become ghosts."""
        s, x, ghost_x = self.state, self.block_out[:self.slots], self.block_out[self.slots:]
        new = exits[:, None] & (s.loop[:, None] + 1 == self.ghost_loops)        # (S, G)
        ghost_x, ghost_pos = ghost_x.view_as(s.ghost_x).roll(1, 1), s.ghost_pos.roll(1, 1)
        ghost_pos[:, 0] = -1  # what rolled round from the last column has ended
        s.ghost_x.copy_(torch.where(new[..., None], x[:, None], ghost_x))
        s.ghost_pos.copy_(torch.where(new, s.pos[:, None], ghost_pos))

    def head_is_due(self) -> bool:
        """Decided, with fixed shapes, by the counts of a pass ago, which are on the host by now."""
        if self.static and self.head <= 1:  # in every pass, for all slots: `run_head` masks those not waiting
            return True
        counts = fetch(torch.stack([(self.state.exit_loop >= 0).sum(), (self.state.loop >= 0).sum()]))
        now, self.counts = (self.counts if self.static else counts), counts
        n_waiting, n_in_flight = now()
        return n_waiting > 0 and (n_waiting >= self.head > 0 or not n_in_flight)

    def run_head(self) -> None:
        """Sample the next tokens of slots that wait, longest wait first. They enter the first loop."""
        s, waits = self.state, self.state.exit_loop >= 0
        if self.static:
            n = self.head if self.head > 1 else self.slots
            rows = torch.where(waits, s.waited, -1).topk(n).indices
            waits = waits & ~((s.loop >= 0).any() & (self.head == 0))  # head = 0: not while any is in flight
        else:
            rows = padded_indices(waits)
        valid, logits = waits[rows], self.model.logits(s.x[rows])
        token, n_generated = self.sampler(logits), s.n_generated[rows] + 1
        failed = ~logits.amax(-1).isfinite()  # NaN or infinite: no token can be sampled
        ended = failed | s.is_eos[rows, token] | (n_generated >= s.max_tokens[rows])
        status = torch.where(failed, FAILED, ENDED * ended)
        self.sampled = torch.stack([rows, token, torch.where(valid, s.exit_loop[rows], -1), status])
        s.x[rows] = torch.where(valid[:, None], self.model.first_state(token[:, None])[:, 0], s.x[rows])
        s.loop[rows] = torch.where(valid & ~ended, 0, s.loop[rows])
        s.exit_loop[rows] = torch.where(valid, -1, s.exit_loop[rows])
        s.pos[rows] += valid
        s.n_generated[rows] += valid
        s.ghost_pos[rows] = torch.where((valid & ended)[:, None], -1, s.ghost_pos[rows])  # nobody attends to them

    def collect(self) -> list[tuple[Request, int, int]]:
        """Append new tokens to the requests that had the slots when they were sampled; free the slots of ended
        sequences. Returns (request, token, exit loop) of each token."""
        out = []
        while len(self.unread) > self.static:  # static (True = 1): the head's latest run stays for the next step
            requests, read = self.unread.popleft()
            self.stats["head_runs"] += 1
            for slot, token, loop, status in zip(*read(), strict=True):
                request = requests[slot]
                if loop < 0 or request.status != "running":  # no token; or cancelled since
                    continue
                if status:
                    request.status, self.slot_request[slot] = "done", None
                if status == FAILED:
                    request.status, request.reason = "failed", NOT_FINITE
                    continue
                request.tokens.append(token)
                request.loops.append(loop)
                out.append((request, token, loop))
                self.stats["head_rows"] += 1
        return out


def to_ints(what: str, values: Iterable, low: int, high: int) -> list[int]:
    """The values of a list, an array or a tensor as Python's ints. UserError unless all are whole numbers from low
    to high; `what` names one of them."""
    try:
        if isinstance(values, str | bytes) and values or getattr(values, "ndim", 1) != 1:
            raise TypeError
        ints = [whole(value) for value in values]
    except TypeError:
        raise UserError(f"{what} is not a whole number") from None
    if not all(low <= value <= high for value in ints):
        raise UserError(f"{what} is not between {low} and {high}")
    return ints


def padded_indices(mask: Tensor) -> Tensor:
    """Indices of the True elements of mask (M,), in order. 7 to 15 of them are padded to 16 with rows that
    idle or do not wait, whose results nobody reads: MKL multiplies 16 up to twice as fast, and GPU tiles have 16."""
    n = int(mask.sum())
    n = 16 if 6 < n < 16 <= len(mask) else n
    return mask.sort(descending=True, stable=True).indices[:n]


def fetch(t: Tensor) -> Callable[[], list]:
    """Begin to copy `t` to the host. Returns a function that waits for the copy and returns its values."""
    if not t.is_cuda:
        return t.clone().tolist
    host, ready = torch.empty_like(t, device="cpu", pin_memory=True), torch.cuda.Event()
    host.copy_(t, non_blocking=True)
    ready.record()

    def read() -> list:
        ready.synchronize()
        return host.tolist()
    return read
