"""Continuous depth-wise batching (§2.4, App. K): one pass of the shared block runs rows at different loops.

All loops run the same layers, so the rows of a batch need not be at the same loop. The engine has slots, one
sequence each. A pass runs the block once and moves every token in flight one loop on. A token that exits goes
to the head, which samples the next token; that one enters the first loop in the next pass. A slot whose
sequence has ended takes the next request. With 2 loops, counted from 1 here and from 0 in the code:

    pass   slot 0                            slot 1                            slot 2
    1      "the" loop 1                      "a" loop 2                        idle
    2      "cat" loop 1, ghost "the" loop 2  "dog" loop 1                      a prompt, all loops
    3      "cat" loop 2                      "ran" loop 1, ghost "dog" loop 2  "is" loop 1

With a greedy sampler, each sequence is token for token that of `decode` (exits.py), under every schedule (in bf16 but
for near-ties, which rounding decides).

A token that exits early lacks the keys and values (KV) of the loops it skips, which later tokens attend to:

    keys="exact"   Recomputed KV: the token goes on as a *ghost*, a row that runs the skipped loops only to write
                   their KV. The next token starts at the first loop, so it is always at an earlier loop than the
                   ghosts before it: what it attends to has been written, and no two rows of a slot are at one loop.
    keys="copy"    Copied KV: the exit loop's KV are copied to the skipped loops. There are no ghosts, and later
                   tokens attend to an approximation (cf. CALM, 2207.07061: it projects the exit state anew).

With kv="first_loop" (Config) a token lacks nothing, since all loops read the first loop's KV: no ghosts, no copies.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

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
    """Keys and values of every slot's sequence: k, v (n_unique, slots + 1, n_loop, max_len, K, D), views of what is
    stored as (n_unique, n_loop, slots + 1, K, max_len, D). A *place* is a (loop, slot): a layer's lie in this order.

    Each row of a pass writes and reads at its own slot and loop; idle rows write to the spare slot, the last. With
    kv="first_loop", n_loop here is 1: rows at later loops read the first loop's place, and write to the spare slot.
    """

    def __init__(self, config: Config, slots: int, max_len: int, device="cpu", dtype=torch.float32):
        self.kv_loops, self.slots, self.n_kv_head, self.max_len = config.kv_loops, slots, config.n_kv_head, max_len
        self.shared = config.kv == "first_loop"
        shape = (config.n_unique, config.kv_loops, slots + 1, config.n_kv_head, max_len, config.head_dim)
        stored = [torch.zeros(shape, device=device, dtype=dtype) for _ in "kv"]
        self.k, self.v = (t.permute(0, 2, 1, 4, 3, 5) for t in stored)
        self.by_place = [t.flatten(1, 2) for t in stored]                       # (n_unique, places, K, max_len, D)
        self.key_rows, self.value_rows = (tuple(t.flatten(1, 4)) for t in stored)  # of each layer
        self.rope = rope_angles(torch.arange(max_len, device=device), config)
        self.slot = self.pos = torch.zeros(0, dtype=torch.long, device=device)  # (M,) of the next pass's rows
        self.used = [0] * (slots + 1)                                           # positions to clear at the next prompt
        self.row_place: Tensor | None = None                                    # see `line_up`
        self.lined_up = False

    def place(self, loop: int, slot: int) -> int:
        """Where a layer holds what a row at this loop and slot reads."""
        return min(loop, self.kv_loops - 1) * (self.slots + 1) + slot

    def line_up(self, loop: Sequence[int], slot: Sequence[int], pos: Sequence[int]) -> Tensor:
        """Prepare a pass of M rows, sorted by `place`: attention reads all places from the first row's to the
        last's where they lie, masked beyond each row's position. Returns the loops (M,)."""
        place = [self.place(*row) for row in zip(loop, slot, strict=True)]
        first, n, length, device = place[0], place[-1] + 1 - place[0], max(pos) + 1, self.slot.device
        loops, self.slot, self.pos = torch.tensor([loop, slot, pos], device=device).unbind()
        heads = range(self.n_kv_head)
        written = [at if own < self.kv_loops else self.slots for at, own in zip(place, loop, strict=True)]
        self.target = torch.tensor([(at * self.n_kv_head + head) * self.max_len + t
                                    for at, t in zip(written, pos, strict=True) for head in heads], device=device)
        self.keys, self.values = (t.narrow(1, first, n).narrow(3, 0, length).unbind() for t in self.by_place)
        self.row_place = None if n == len(place) else torch.tensor(place, device=device) - first   # (M,)
        self.lined_up, self.mask = True, None
        if min(pos) < max(pos):
            last = self.pos if self.row_place is None else self.pos.new_zeros(n).index_copy(0, self.row_place, self.pos)
            unread = torch.arange(length, device=device) > last[:, None]
            self.mask = self.rope[0].new_zeros(n, 1, 1, length, dtype=self.k.dtype)
            self.mask.masked_fill_(unread[:, None, None], -torch.inf)
        return loops

    def kv_loop(self, loop: int | Tensor) -> int | Tensor | None:
        """As KVCache's. Where rows are at several loops, all compute KV, and `attend` drops those of later loops."""
        if not self.shared:
            return loop
        if isinstance(loop, Tensor):
            return loop.clamp(max=0)
        return 0 if loop == 0 else None

    def extend(self, loop: int | Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Rotary angles of the n rows of the next pass, as if they were one sequence of n tokens."""
        return self.rope[0][self.pos], self.rope[1][self.pos]

    def attend(self, loop: int | Tensor, layer: int, q: Tensor, k: Tensor | None, v: Tensor | None) -> Tensor:
        """The attention of q (1, M, H, D) to its row's slot and loop, after k, v (1, M, K, D), if given, are stored."""
        if not self.lined_up:
            slot = torch.where(loop > 0, self.slots, self.slot) if self.shared else self.slot    # written
            loop = self.kv_loop(loop)
            self.k[layer].index_put_((slot, loop, self.pos), k[0])
            self.v[layer].index_put_((slot, loop, self.pos), v[0])
            return decode_attention(q[0], self.k[layer], self.v[layer], self.slot, loop, self.pos + 1)[None]
        if k is not None:
            self.key_rows[layer].index_copy_(0, self.target, k.flatten(0, 2))
            self.value_rows[layer].index_copy_(0, self.target, v.flatten(0, 2))
        keys, values = self.keys[layer], self.values[layer]                     # (places, K, length, D)
        grouped = q.view(q.size(1), self.n_kv_head, -1, q.size(3))              # (M, K, H / K, D)
        if self.row_place is None:
            return F.scaled_dot_product_attention(grouped, keys, values, self.mask).reshape(q.shape)
        grouped = grouped.new_zeros(len(keys), *grouped.shape[1:]).index_copy_(0, self.row_place, grouped)
        return F.scaled_dot_product_attention(grouped, keys, values, self.mask)[self.row_place].reshape(q.shape)

    def store_prompts(self, kv: KVCache, scheduled: list[tuple[int, Request]]) -> None:
        """Copy the prompts' keys and values, without their padding, from `kv` to their slots."""
        for cache, new in ((self.k, kv.k), (self.v, kv.v)):                     # new (n_layer, n, K, T, D)
            new = new.unflatten(0, (cache.size(2), -1)).permute(1, 2, 0, 4, 3, 5)
            for i, (slot, request) in enumerate(scheduled):
                T = len(request.prompt)
                cache[:, slot, :, :T] = new[:, i, :, :T]                        # (n_unique, n_loop, T, K, D)
                cache[:, slot, :, T:self.used[slot]] = 0
        for slot, request in scheduled:
            self.used[slot] = len(request.prompt) + request.max_new_tokens

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
    S slots, G ghosts per slot at most: n_loop - 1 with recomputed KV, 0 with copied or shared KV.
    """
    x: Tensor             # (S, C) the current token's hidden state: input of its next loop, or of the head
    numbers: Tensor       # (5, S) the next five, which are views of it
    loop: Tensor          # (S,) the loop that it runs in the next pass, or -1
    exit_loop: Tensor     # (S,) the loop after which it exited, or -1
    waited: Tensor        # (S,) passes that it has waited for the head; undefined in flight
    pos: Tensor           # (S,) its position in the sequence
    last_pos: Tensor      # (S,) position of the last token that may be sampled
    is_eos: Tensor        # (S, V + 1) bool, tokens that end the sequence; V fills up lists of them
    forced_exits: Tensor  # (S, max_len) loop after which the token at a position exits, or n_loop
    ghost_x: Tensor       # (S, G, C) hidden states of the ghosts
    ghost_pos: Tensor     # (S, G) their positions, or -1

    @classmethod
    def empty(cls, c: Config, slots: int, max_len: int, n_ghosts: int, device, dtype) -> "SlotState":
        def full(*shape, fill=0, dtype=torch.long):
            return torch.full(shape, fill, device=device, dtype=dtype)
        numbers = full(5, slots, fill=-1)
        return cls(full(slots, c.n_embd, dtype=dtype), numbers, *numbers,
                   is_eos=full(slots, c.vocab_size + 1, fill=False, dtype=torch.bool),
                   forced_exits=full(slots, max_len, fill=c.n_loop),
                   ghost_x=full(slots, n_ghosts, c.n_embd, dtype=dtype), ghost_pos=full(slots, n_ghosts, fill=-1))

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
        self.ghost_loops = torch.arange(1, c.kv_loops if keys == "exact" else 1, device=device)  # (G,)
        self.n_ghosts = len(self.ghost_loops)                                   # G
        self.n_rows, self.least_loop, self.any_ghosts = 0, 0, self.static       # of the last pass, and after it
        self.state = SlotState.empty(c, slots, max_len, self.n_ghosts, device, dtype)
        self.block_out = torch.zeros(slots * (1 + self.n_ghosts), c.n_embd, device=device, dtype=dtype)
        self.sampled: Tensor  # (4, n): slots, tokens, exit loops (-1 = no token) and status of the head's n rows
        self.slot_request: list[Request | None] = [None] * slots
        self.waiting: deque[Request] = deque()
        self.unread: deque = deque()  # (pass, slot_request, fetched `sampled`) of each run of the head, until read
        self.graphs: dict[str, torch.cuda.CUDAGraph | None] = {}
        self.ran = torch.zeros(2, dtype=torch.long, device=device)              # rows run, ghosts among them
        self.counts = self.count()                            # at the end of the last step
        self.stats = dict.fromkeys(("passes", "head_runs", "head_rows", "prefill_tokens", "longest_wait",
                                    "computed_rows"), 0)                        # idle ones included, unlike `ran`
        self.stats |= dict.fromkeys(("prefill_s", "block_s", "decision_s", "head_s"), 0.0)

    # --------------------------------------------------------------------------------------------------------
    # What callers use

    def add(self, prompt: Sequence[int], max_new_tokens: int, eos_id: int | Sequence[int] | None = None,
            forced_exits: Sequence[int] | None = None) -> Request:
        """The new request, which waits for a slot; "refused", with a `reason`, if it cannot be served.

        eos_id: the token that ends the sequence, or several. forced_exits: entry i is the loop of the exit that
        predicts new token i; beyond its end the rule decides. Entry 0 has no effect: the prompt runs all loops.
        """
        request = Request(prompt, max_new_tokens, eos_id, forced_exits, arrived=self.stats["passes"])
        try:
            self.validate(request)
            self.waiting.append(request)
        except Exception as e:  # UserError, or what an object of the caller's raises when it is read
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
            raise UserError(f"{request!r} is not a request: give what `add` returned")
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
        requests = [self.add(prompt, max_new_tokens, eos_id) for prompt in list(prompts)]
        for _ in self.run():
            pass
        return requests

    @torch.inference_mode()
    def step(self) -> list[tuple[Request, int, int]]:
        """Start requests (`prefill`), `run_block`, let tokens exit or go on (`route_exits`), `run_head` if it is due,
        and `collect` its tokens: (request, token, exit loop) of each new one."""
        self.prefill(self.schedule())
        self.timed("block_s", self.run_block)
        self.stats["computed_rows"] += len(self.block_out) if self.static else self.n_rows
        self.timed("decision_s", self.route_exits)
        self.stats["passes"] += 1
        if self.head_is_due():
            self.timed("head_s", self.run_head)
            self.unread.append((self.stats["passes"], list(self.slot_request), fetch(self.sampled)))
        if self.static and self.head > 1:
            self.counts = self.count()
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
        if len(free) < self.refill or not self.waiting or (self.head == 0 and (self.state.loop > 0).any()):
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
        """Run the prompts through all loops as one batch, padded at the end, and fill their slots: their last tokens
        wait for the head. The prompts and their settings go to the device in one copy, for which nothing waits.

        With kv="first_loop" only the last tokens run the later loops, from their slots."""
        c, s, requests = self.model.config, self.state, [request for _, request in scheduled]
        numbers = [[slot, len(r.prompt) - 1, len(r.prompt) + r.max_new_tokens - 1] for slot, r in scheduled]
        # With a loop for each position: the tokens of the prompt but the last are never routed.
        forced = [[c.n_loop] * (len(r.prompt) - 1) + (r.forced_exits or []) for r in requests]
        table = [numbers, padded([r.prompt for r in requests], 0), padded([end_ids(r.eos_id) for r in requests],
                 c.vocab_size), padded([loops[:self.max_len] for loops in forced], c.n_loop)]
        sent = send([sum(rows, []) for rows in zip(*table, strict=True)], self.device)          # (n, ...)
        numbers, idx, ends, forced = sent.split([len(rows[0]) for rows in table], 1)
        kv = KVCache(c, *idx.shape, self.device, s.x.dtype)
        x = self.model(idx, kv, kv.kv_loops)[-1]                                # (n, T, C)
        self.cache.store_prompts(kv, scheduled)
        slots, pos, last_pos = numbers.unbind(1)                                # (n,)
        x = x[torch.arange(len(x), device=self.device), pos]                    # (n, C)
        for loop in range(kv.kv_loops, c.n_loop):
            self.cache.line_up([loop] * len(x), [slot for slot, _ in scheduled], [len(r.prompt) - 1 for r in requests])
            x = self.model.block(x, loop, self.cache)
        s.x[slots] = x
        s.loop[slots], s.exit_loop[slots], s.waited[slots] = -1, self.last_loop, 0
        s.pos[slots], s.last_pos[slots] = pos, last_pos
        s.is_eos[slots], s.forced_exits[slots] = False, c.n_loop
        s.is_eos[slots[:, None], ends] = True
        s.forced_exits[slots, :forced.size(1)] = forced

    def run_block(self) -> None:
        """One pass: every token in flight and every ghost runs its loop. `block_out` holds the new states."""
        if self.static:
            self.run_all_rows()
        else:
            self.run_active_rows()

    def run_active_rows(self) -> None:
        """The pass without idle rows. Where all rows are at the same loop, it is as cheap as that of `decode`."""
        s = self.state
        loops, _, _, positions, _ = s.numbers.tolist()
        rows = [(loop, slot, positions[slot], slot) for slot, loop in enumerate(loops) if loop >= 0]
        ghosts = [(i + 1, slot, pos, self.slots + slot * self.n_ghosts + i)
                  for slot, own in enumerate(s.ghost_pos.tolist()) for i, pos in enumerate(own) if pos >= 0]
        self.n_rows, self.any_ghosts = len(rows) + len(ghosts), bool(ghosts)
        self.least_loop = min(rows, default=(self.last_loop,))[0]
        if not rows and not ghosts:
            return
        self.ran += torch.tensor([self.n_rows, len(ghosts)], device=self.device)
        loop, slot, pos, row = zip(*sorted(rows + ghosts, key=lambda row: self.cache.place(*row[:2])), strict=True)
        loops = self.cache.line_up(loop, slot, pos)
        x = torch.cat([s.x, s.ghost_x.flatten(0, 1)]) if ghosts else s.x
        row = None if row == tuple(range(self.slots)) else torch.tensor(row, device=self.device)
        y = self.model.block(x if row is None else x[row], loop[0] if len(set(loop)) == 1 else loops, self.cache)
        if row is None:
            self.block_out[:self.slots] = y
        else:
            self.block_out.index_copy_(0, row, y)

    def run_all_rows(self) -> None:
        """The pass of static mode, over the slots' current tokens, then their ghosts. Idle rows write to the spare
        slot."""
        s, slots = self.state, torch.arange(self.slots, device=self.device)
        loop = torch.cat([s.loop, torch.where(s.ghost_pos >= 0, self.ghost_loops, -1).flatten()])       # (M,)
        slot = torch.cat([slots, slots.repeat_interleave(self.n_ghosts)])
        self.cache.lined_up = False
        self.cache.slot = torch.where(loop >= 0, slot, self.slots)
        self.cache.pos = torch.cat([s.pos, s.ghost_pos.flatten()]).clamp(min=0)
        self.ran += torch.stack([(loop >= 0).sum(), (s.ghost_pos >= 0).sum()])
        self.block_out.copy_(self.model.block(torch.cat([s.x, s.ghost_x.flatten(0, 1)]), loop, self.cache))

    def route_exits(self) -> None:
        """After a pass: tokens that exit wait for the head, the others go on to their next loop."""
        s, x = self.state, self.block_out[:self.slots]
        exits = in_flight = s.loop >= 0                                         # (S,)
        any_early = self.static
        if self.static or self.least_loop < self.last_loop:  # else nothing is left to decide
            exits = in_flight & ((s.loop == self.last_loop) | self.may_exit(x))
            any_early = self.static or bool((exits & (s.loop < self.last_loop)).any())
        self.any_ghosts |= any_early
        if self.n_ghosts and self.any_ghosts:
            self.route_ghosts(exits)
        elif any_early and self.keys == "copy":
            self.cache.copy_to_later_loops(exits, s.loop, s.pos)
        torch.where(in_flight[:, None], x, s.x, out=s.x)
        if self.static:
            s.waited.add_(1).masked_fill_(exits, 0)
        torch.where(exits, s.loop, s.exit_loop, out=s.exit_loop)
        s.loop.add_(in_flight).masked_fill_(exits, -1)

    def may_exit(self, x: Tensor) -> Tensor:
        """(S,) bool, by forced_exits where given, else by the rule. Undefined where no token is in flight."""
        s, logits = self.state, self.model.logits(x) if self.rule.reads_logits else None
        by_rule = self.rule(x, s.loop.clamp(min=0), logits)
        if not (self.static or any(request and request.forced_exits for request in self.slot_request)):
            return by_rule
        forced = s.forced_exits.gather(1, s.pos.clamp(min=0)[:, None])[:, 0]
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
        """In static mode with a head for several rows, decided by the counts at the end of the last step, for which
        the host does not wait long: the device is a pass behind."""
        if self.static and self.head == 1:  # in every pass, for all slots: `run_head` masks those not waiting
            return True
        read = self.counts if self.static and self.head else self.count()
        n_waiting, n_in_flight = read()
        return n_waiting > 0 and (n_waiting >= self.head > 0 or not n_in_flight)

    def count(self) -> Callable[[], list]:
        """Begin to fetch the numbers of tokens that wait for the head and that are in flight."""
        return fetch(torch.stack([(self.state.exit_loop >= 0).sum(), (self.state.loop >= 0).sum()]))

    def run_head(self) -> None:
        """Sample the next tokens of slots that wait, longest wait first. They enter the first loop."""
        s, waits = self.state, self.state.exit_loop >= 0
        if self.static:
            rows = torch.where(waits, s.waited, -1).topk(self.head if self.head > 1 else self.slots).indices
        else:
            rows = waits.nonzero()[:, 0]
        old = s.numbers[:, rows]                                                # (5, n)
        _, exit_loop, waited, pos, last_pos = old
        valid, logits = exit_loop >= 0, self.model.logits(s.x[rows])
        token, pos = self.sampler(logits), pos + 1
        failed = ~logits.amax(-1).isfinite()  # NaN or infinite: no token can be sampled
        ended = failed | s.is_eos[rows, token] | (pos >= last_pos)
        self.sampled = torch.stack([rows, token, exit_loop, torch.where(failed, FAILED, ENDED * ended)])
        s.x[rows] = torch.where(valid[:, None], self.model.first_state(token[:, None])[:, 0], s.x[rows])
        new = torch.stack([-1 * ended, torch.full_like(pos, -1), waited, pos, last_pos])
        s.numbers[:, rows] = torch.where(valid, new, old)
        if self.any_ghosts:  # nobody attends to those of an ended sequence
            s.ghost_pos[rows] = s.ghost_pos[rows].masked_fill((valid & ended)[:, None], -1)

    def collect(self) -> list[tuple[Request, int, int]]:
        """Append new tokens to the requests that had the slots when they were sampled; free the slots of ended
        sequences. Returns (request, token, exit loop) of each token."""
        out = []
        # static (True = 1): what the head has sampled in this step is read in the next
        while self.unread and self.unread[0][0] <= self.stats["passes"] - self.static:
            _, requests, read = self.unread.popleft()
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


def padded(rows: list[Sequence[int]], fill: int) -> list[list[int]]:
    """The rows, filled up to the length of the longest."""
    width = max(map(len, rows))
    return [[*row, *[fill] * (width - len(row))] for row in rows]


def send(numbers: list[list[int]], device: torch.device) -> Tensor:
    """`numbers` as a tensor on the device, for which the host does not wait."""
    t = torch.tensor(numbers)
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device)


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
