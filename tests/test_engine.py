"""The engine against sequential decoding: under every schedule each sequence comes out as `decode` generates it. Also:
each place of the cache is written once, before it is read; nothing in a static pass waits for the device; a stream of
requests is served in order, for long, and what cannot be served is refused."""

import gc
import math
import random
from collections import Counter, deque

import numpy as np
import pytest
import torch
from test_exits import draw_gate, scores
from test_model import ARCHS, tiny
from torch.utils._python_dispatch import TorchDispatchMode

from engine import Engine, Request, SlotCache
from exits import SCORED, Rule, decode, end_ids, greedy
from lib.cli import UserError

V, STEPS, NAN = 53, 6, float("nan")
UNREAD = 1e30  # fills what no step may read: finite, so that a masked position adds exactly 0
each_policy = pytest.mark.parametrize("keys", ["exact", "copy"])
each_mode = pytest.mark.parametrize("static", [False, True])


def draw_model(seed, n_loop, arch="llama", **changes):
    """A tiny model with weights so large that each prediction depends on every key."""
    size = {"n_layer": n_loop, "n_loop": n_loop, "n_embd": 16, "n_hidden": 20, "vocab_size": V, "n_ctx": 32}
    model = tiny(arch, seed, **size | changes).double()
    for p in model.layers.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model.requires_grad_(False)


class Replay:
    """A rule for `decode`: the nth new token exits after forced_exits[n] (n > 0), later ones by `rule`."""

    def __init__(self, forced_exits, rule):
        self.forced_exits, self.rule, self.n, self.reads_logits = forced_exits, rule, 0, rule.reads_logits

    def __call__(self, x, loop, logits=None):
        self.n += loop == 0
        if self.n < len(self.forced_exits):
            return torch.full(x.shape[:-1], loop >= self.forced_exits[self.n])
        return self.rule(x, loop, logits)


class Case:
    """A model, a rule and prompts, with the output of `decode` for them."""

    def __init__(self, model, rule=None, keys="exact", prompts=((1, 2, 3),), forced=(None,)):
        self.model, self.rule, self.keys, self.prompts, self.forced = model, rule or Rule(), keys, prompts, forced
        self.known = {}

    def decoded(self, prompt, steps, eos_id=None, forced_exits=None):
        """([token], [exit loop]) that the engine should return."""
        key = tuple(prompt), None if forced_exits is None else tuple(forced_exits)
        if len(self.known.get(key, ())) < steps:
            rule = self.rule if forced_exits is None else Replay(forced_exits, self.rule)
            out = decode(self.model, torch.tensor([prompt]), max(steps, STEPS), rule, self.keys)
            self.known[key] = [(token.item(), loop.item()) for token, loop in out]
        out = self.known[key][:steps]
        ends = next((n for n, (token, _) in enumerate(out, 1) if token in end_ids(eos_id)), steps)
        return [token for token, _ in out[:ends]], [loop for _, loop in out[:ends]]

    def check(self, request):
        tokens, loops = self.decoded(request.prompt, request.max_new_tokens, request.eos_id, request.forced_exits)
        if request.status == "cancelled":
            tokens, loops = tokens[:len(request.tokens)], loops[:len(request.loops)]
        else:
            assert request.status == "done"
        assert (request.tokens, request.loops) == (tokens, loops)

    def engine(self, slots=3, max_len=24, **options):
        return Engine(self.model, slots, max_len, self.rule, self.keys, **options)


def draw_case(i):
    """19 cases with recomputed KV and 19 with copied KV: each rule with 2, 3 and 4 loops, and one with 1 loop."""
    torch.manual_seed(i)
    rng, (copied, j) = random.Random(i), divmod(i, 19)
    (kind, n_loop), keys = (divmod(j, 3) if j < 18 else (0, -1)), ("exact", "copy")[copied]
    n_layer = (n_loop + 2) * (1 + (i % 6 == 1))
    model = draw_model(i, n_loop + 2, list(ARCHS)[(i + j // 3 + 1) % len(ARCHS)], rank=(0, 3)[j % 2], n_layer=n_layer,
                       vectors=("tied", "per_loop")[(i + j // 6) % 2],
                       no_rope=None if copied or j % 2 else list(range(0, n_layer, 2)))
    rule = Rule(("never", "fixed", *SCORED)[kind], exit_loop=rng.randrange(n_loop + 1) if kind else 0)
    if kind > 1:
        rule.gate = draw_gate(model)
        found = scores(model, rule, (2, 24))
        at = rng.randrange(len(found) // 5, len(found) * 4 // 5)
        rule.threshold = found[at:at + 2].mean().item()
    prompts = [[rng.randrange(V) for _ in range(n)] for n in (1, rng.randint(2, 4), rng.randint(5, 9))]
    forced = [None, None, [rng.randrange(n_loop + 2) for _ in range(rng.randint(1, STEPS + 3))]]
    return Case(model, rule, keys, prompts, forced)


def poison(engine):
    """Overwrite what no later step may read: the contents of free slots, and the output of the last pass."""
    engine.block_out.fill_(NAN)
    for slot, request in enumerate(engine.slot_request):
        if request is None:
            engine.cache.k[:, slot] = engine.cache.v[:, slot] = UNREAD
            engine.cache.used[slot] = 0
            engine.state.x[slot] = engine.state.ghost_x[slot] = NAN


def random_schedule(case, rng):
    """(engine, requests) after serving requests that arrive at any time, some of which are cancelled."""
    plan, requests = [], []
    many = rng.random() < 0.1                                # so that 7 to 15 of 16 rows and more are in flight
    for _ in range(20 if many else rng.choice((1, 2, 2, 3, 4))):
        prompt, forced_exits, steps = rng.choice(case.prompts), rng.choice(case.forced), rng.randint(1, STEPS)
        tokens = case.decoded(prompt, STEPS, forced_exits=forced_exits)[0]
        eos_id = rng.choice([None, None, *tokens, (rng.randrange(V), rng.choice(tokens))])
        plan.append((prompt, steps, eos_id, forced_exits))
    slots = rng.randint(8, 18) if many else rng.randint(1, 4)
    engine = case.engine(slots, max(len(prompt) + steps for prompt, steps, *_ in plan), head=rng.randint(0, slots),
                         static=rng.random() < 0.35, refill=rng.choice((1, 1, 1, rng.randint(1, slots), slots)))
    engine.cache.k.fill_(UNREAD)
    engine.cache.v.fill_(UNREAD)
    while plan or engine.waiting or any(engine.slot_request):
        while plan and rng.random() < 0.6:
            requests.append(engine.add(*plan.pop()))
        poison(engine)
        engine.step()
        if requests and rng.random() < 0.08:
            engine.cancel(rng.choice(requests))
        assert engine.stats["passes"] < 500
    return engine, requests


@pytest.mark.parametrize("i", range(38))
def test_every_sequence_is_what_decode_says(i):
    """27 random schedules each, 1,026 in all: arrivals, slots, lengths, cancellations, forced exits, head, modes."""
    case, early, states = draw_case(i), 0, Counter()
    for seed in range(27):
        _, requests = random_schedule(case, random.Random(1000 * i + seed))
        for request in requests:
            case.check(request)
            early += sum(loop < case.model.config.n_loop - 1 for loop in request.loops)
        states.update(request.status for request in requests)
    assert states["done"] > 20 and states["cancelled"] and (early > 3 or case.model.config.n_loop == 1)


# ---------------------------------------------------------------------------------------------------------------------
# The cache

@pytest.mark.parametrize("i", [1, 4, 8, 11, 17, 20, 23, 27, 30, 36])
def test_each_place_of_the_cache_is_written_once_before_it_is_read(i, monkeypatch):
    """Free slots hold UNREAD: a place that is written still holds it, and none that is read does."""
    case, real, real_copy, state = draw_case(i), SlotCache.attend, SlotCache.copy_to_later_loops, {}

    def attend(cache, loop, layer, q, k, v):
        loops = [loop] * len(cache.slot) if isinstance(loop, int) else loop.tolist()
        engine, places = state["engine"], list(zip(cache.slot.tolist(), loops, cache.pos.tolist(), strict=True))
        places = [(slot, loop, pos) for slot, loop, pos in places if slot < engine.slots]
        assert len({(slot, loop) for slot, loop, _ in places}) == len(places)     # no two rows at the same loop
        for slot, loop_, pos in places:
            assert engine.slot_request[slot] is not None and loop_ >= 0
            assert all((t[layer, slot, loop_, pos:] == UNREAD).all() for t in (cache.k, cache.v))
        y = real(cache, loop, layer, q, k, v)
        for slot, loop_, pos in places:
            read = cache.k[layer, slot, loop_, :pos + 1], cache.v[layer, slot, loop_, :pos + 1]
            assert not any((t.abs() >= UNREAD / 2).any() or t.isnan().any() for t in read)
            state["written"] += 1
        return y

    def copy_to_later_loops(cache, exits, loop, pos):
        before, slots = cache.k.clone(), exits.nonzero()[:, 0].tolist()
        real_copy(cache, exits, loop, pos)
        for slot in range(len(loop)):
            later = slice((loop[slot] if slot in slots else case.model.config.n_loop - 1) + 1, None)
            new = cache.k[:, slot, later, pos[slot]]
            assert (before[:, slot, later, pos[slot]] == UNREAD).all() and not (new == UNREAD).any()
            before[:, slot, later, pos[slot]] = new
        torch.testing.assert_close(before[:, :-1], cache.k[:, :-1], rtol=0, atol=0, equal_nan=True)

    class Watched(Engine):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            state["engine"] = self

        def prefill(self, scheduled):
            super().prefill(scheduled)
            for slot, request in scheduled:
                assert self.slot_request[slot] is request
                n, kept = len(request.prompt), torch.stack([self.cache.k[:, slot], self.cache.v[:, slot]])
                assert not (kept[:, :, :, :n] == UNREAD).any() and (kept[:, :, :, n:] == UNREAD).all()

    monkeypatch.setattr(SlotCache, "attend", attend)
    monkeypatch.setattr(SlotCache, "copy_to_later_loops", copy_to_later_loops)
    monkeypatch.setattr("test_engine.Engine", Watched)
    for seed in range(6):
        state["written"] = 0
        _, requests = random_schedule(case, random.Random(seed))
        layers = case.model.config.n_unique
        assert state["written"] >= layers * sum(loop + 1 for r in requests for loop in r.loops[1:])
        for request in requests:
            case.check(request)


# ---------------------------------------------------------------------------------------------------------------------
# A sequence depends on nothing but itself

@pytest.fixture(scope="module", params=["exact", "copy"])
def case(request):
    """Three loops; about a third of the tokens exit after each."""
    model = draw_model(7, 3, rank=2, vectors="per_loop")
    rule = Rule("margin")
    found = scores(model, rule, (2, 24))
    rule.threshold = found[len(found) * 2 // 3].item()
    rng = random.Random(0)
    return Case(model, rule, request.param, [[rng.randrange(V) for _ in range(rng.randint(1, 8))] for _ in range(9)])


@each_mode
def test_slots_order_and_neighbours_change_no_sequence(case, static):
    prompts, one, many = case.prompts[:6], case.engine(1, static=static), case.engine(5, head=5, static=static)
    alone = one.generate(prompts, 7)
    backwards = many.generate(prompts[::-1], 7)[::-1]
    again = many.generate(prompts[2:] + prompts[:2], 7)      # an engine that has served before
    again = again[-2:] + again[:-2]
    assert [r.prompt for r in alone] == [r.prompt for r in backwards] == prompts
    assert [r.tokens for r in alone] == [r.tokens for r in backwards] == [r.tokens for r in again]
    assert {loop for r in alone for loop in r.loops} == {0, 1, 2}
    for request in alone:
        case.check(request)


@each_mode
def test_a_threshold_that_nothing_reaches_is_the_full_model(case, static):
    rule = Rule("margin", math.inf)
    for request in Engine(case.model, 4, 24, rule, case.keys, head=2, static=static).generate(case.prompts, 8):
        assert request.loops == [2] * 8
        text = list(request.prompt)
        for token in request.tokens:
            assert case.model.logits(case.model(torch.tensor([text]))[-1][0, -1]).argmax() == token
            text.append(token)


def test_sampled_tokens_go_to_the_rows_they_were_sampled_for(case):
    """The sampler depends on the logits alone, but is not greedy."""
    def second(logits):
        return logits.topk(2).indices[:, 1]
    for request in case.engine(4, sampler=second, head=2).generate(case.prompts, 6):
        want = list(decode(case.model, torch.tensor([request.prompt]), 6, case.rule, case.keys, second))
        assert request.tokens == [token.item() for token, _ in want]


# ---------------------------------------------------------------------------------------------------------------------
# Static: for CUDA graphs

class NothingWaits(TorchDispatchMode):
    """Fails on operations that make the host wait for the device; `calls` holds all operations and their shapes."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not {"_local_scalar_dense", "nonzero", "item", "masked_select", "equal", "_unique2", "is_nonzero"} & {
            func.overloadpacket.__name__}, func
        flat = [a for arg in args for a in (arg if isinstance(arg, list | tuple) else [arg])]
        tensors = [a for a in flat if isinstance(a, torch.Tensor)]
        if "index" in func.overloadpacket.__name__:          # a mask as an index is a nonzero
            assert not any(t.dtype == torch.bool for t in args[1] if t is not None), func
        self.calls.append((func, *(t.shape for t in tensors)))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("i", [0, 4, 7, 10, 13, 16, 18, 21, 24, 33])
def test_a_static_pass_has_fixed_shapes_and_waits_for_nothing(i, monkeypatch):
    case, calls = draw_case(i), set()
    engine = case.engine(3, static=True, head=i % 4)

    def timed(name, work):
        with NothingWaits() as watch:
            work()
        calls.add((name, tuple(watch.calls)))
    monkeypatch.setattr(engine, "timed", timed)
    for n, prompt in enumerate(case.prompts * 2):
        engine.add(prompt, n + 1)
    assert len(list(engine.run())) == 21 and len(calls) == 3


def test_the_host_reads_one_step_late_in_static_mode(case):
    late, at_once = case.engine(2, head=1, static=True), case.engine(2, head=1, static=False)
    for engine in (late, at_once):
        for prompt in case.prompts[:3]:
            engine.add(prompt, 4)
    got = [[[(r.prompt, token, loop) for r, token, loop in engine.step()] for _ in range(5)]
           for engine in (late, at_once)]
    assert got[0][0] == [] and got[0][1:] == got[1][:-1] and len(got[1][0]) == 2


@each_mode
def test_tokens_read_late_do_not_go_to_the_slot_s_next_request(case, static):
    engine = case.engine(1, static=static)
    first = engine.add(case.prompts[0], 9)
    for _ in range(4):
        engine.step()
    tokens = list(first.tokens)
    engine.cancel(first)
    second = engine.add(case.prompts[1], 2)
    for request, _, _ in engine.run():
        assert request is second
    case.check(second)
    assert first.tokens == tokens and first.status == "cancelled"
    case.check(first)


# ---------------------------------------------------------------------------------------------------------------------
# The head, and the passes it takes

class CountingSampler:
    """Greedy. Notes the rows of each call: in `busy` while other tokens were in flight, in `idle` while none were."""

    def __init__(self):
        self.busy, self.idle, self.engine = [], [], None

    def __call__(self, logits):
        (self.busy if (self.engine.state.loop >= 0).any() else self.idle).append(len(logits))
        return greedy(logits)


def with_head(case, slots, head, static=False):
    sampler = CountingSampler()
    sampler.engine = case.engine(slots, head=head, sampler=sampler, static=static)
    return sampler.engine, sampler


def test_the_head_waits_for_as_many_rows_as_it_is_for(case):
    runs, tokens = [], []
    for head in (1, 2, 3, 4):
        engine, rows = with_head(case, 5, head)
        tokens.append([r.tokens for r in engine.generate(case.prompts * 2, 6)])
        assert min(rows.busy, default=head) >= head and (rows.busy or head > 2)
        assert engine.stats["head_runs"] == len(rows.busy + rows.idle)
        assert engine.stats["head_rows"] == sum(rows.busy + rows.idle) == 18 * 6
        runs.append(engine.stats["head_runs"])
    assert runs == sorted(runs, reverse=True) and runs[0] > runs[1] > runs[3] and tokens == tokens[:1] * 4


def test_with_head_1_no_token_waits_after_a_step(case):
    engine, _ = with_head(case, 4, 1)
    for prompt in case.prompts:
        engine.add(prompt, 6)
    while engine.waiting or any(engine.slot_request):
        engine.step()
        assert (engine.state.exit_loop < 0).all()


@each_mode
def test_with_head_0_the_batch_waits_for_its_slowest_token(case, static):
    """The next tokens of all slots are sampled together, when none is in flight; new requests start then as well."""
    engine, rows = with_head(case, 4, 0, static)
    requests, sampled = [engine.add(prompt, 6) for prompt in case.prompts], set()
    while engine.waiting or any(engine.slot_request):
        in_flight, before = bool((engine.state.loop >= 0).any()), list(engine.slot_request)
        done = {r for r in requests if r.status == "done"}
        got, begun = {request for request, _, _ in engine.step()}, {r for r in requests if r.started >= 0}
        assert got in (set(), sampled if static else begun - done)
        sampled = begun - {r for r in requests if r.status == "done"}
        assert not in_flight or all(new in (None, old) for new, old in zip(engine.slot_request, before, strict=True))
    at_once, _ = with_head(case, 4, 1, static)
    at_once.generate(case.prompts, 6)
    assert engine.stats["passes"] > at_once.stats["passes"] * 1.1
    if not static:
        assert not rows.busy and engine.stats["head_runs"] < at_once.stats["head_runs"]


@pytest.mark.parametrize("head", [2, 4])
def test_in_static_mode_a_full_batch_is_served_once(head):
    """Four sequences at the same loop: the head runs for their next tokens as soon as it can, and not again for rows
    that it has just served. What it has sampled is read in the next step, even if it does not run then."""
    case = Case(draw_model(3, 3), prompts=[(n, n + 1) for n in range(4)])
    engine = case.engine(4, head=head, static=True)
    requests, read = [engine.add(prompt, 5) for prompt in case.prompts], []
    while any(r.status != "done" for r in requests):
        runs, tokens = len(read), engine.step()
        if tokens:
            read.append(engine.stats["passes"])
        assert all(ran >= engine.stats["passes"] for ran, _, _ in engine.unread) and runs < 40
        assert engine.stats["passes"] < 60
    assert engine.stats["head_runs"] == 5 * 4 // head and engine.stats["head_rows"] == 20
    for request in requests:
        case.check(request)


def test_with_head_0_the_head_runs_once_per_token_of_the_batch_in_static_mode_too():
    case = Case(draw_model(3, 3), prompts=[(n, n + 1) for n in range(4)])
    for static in (False, True):
        engine = case.engine(4, head=0, static=static)
        for request in engine.generate(case.prompts, 5):
            case.check(request)
        assert engine.stats["head_runs"] == 5


def test_rows_that_are_computed_though_idle_are_counted():
    """Four loops, one sequence of 5 tokens that all run 4 loops: no ghosts, yet in static mode 3 are computed."""
    case = Case(draw_model(5, 4))
    for static, rows in ((False, 1), (True, 4)):
        engine = case.engine(1, static=static)
        engine.generate(case.prompts, 5)
        assert engine.ran.tolist() == [16, 0]
        assert engine.stats["computed_rows"] == (rows * engine.stats["passes"] if static else 16)


def test_in_static_mode_the_longest_waiting_come_first():
    """Five sequences and a head for two rows: none is ever more than two tokens ahead of another."""
    case = Case(draw_model(3, 2), Rule("fixed", exit_loop=0))
    engine = case.engine(5, head=2, static=True)
    requests, sampled = [engine.add([n], 8) for n in range(5)], Counter()
    for request, _, _ in engine.run():
        sampled[request] += 1
        assert max(sampled.values()) - min(sampled[other] for other in requests) <= 2
    for request in requests:
        case.check(request)


@pytest.mark.parametrize("forced_exits, rows, ghosts", [
    ([3, 0, 0, 0, 0], 4, 1 + 2 + 3),             # one pass each; a ghost has three loops to go, or until the end
    ([3, 3, 3, 3, 3], 16, 0),
    ([3, 1, 0, 2, 3], 2 + 1 + 3 + 4, 2 + 3 + 1),
    ([0, 2, 0, 3, 0], 3 + 1 + 4 + 1, 1 + 3),     # entry 0 has no effect: the prompt has run all loops
    ([0], 16, 0),
    ([], 16, 0),
    ([3, 0, 1, 0, 2, 0, 1, 1, 1], 1 + 2 + 1 + 3, 3 + 2 + 3),
])
@each_policy
@each_mode
def test_passes_and_ghosts_of_one_sequence_follow_from_its_exits(forced_exits, rows, ghosts, keys, static):
    case = Case(draw_model(5, 4, rank=2), keys=keys)
    engine = case.engine(1, head=1, static=static)
    request = engine.add((1, 2, 3), 5, forced_exits=forced_exits)
    for _ in engine.run():
        pass
    case.check(request)
    assert request.loops == [3, *forced_exits[1:], 3, 3, 3, 3][:5]
    ghosts *= keys == "exact"
    assert engine.ran.tolist() == [rows + ghosts, ghosts]
    if not static:
        assert engine.stats["passes"] == 1 + rows            # the first, after the prompt, has no rows
        assert (engine.stats["head_runs"], engine.stats["head_rows"], engine.stats["prefill_tokens"]) == (5, 5, 3)


@each_mode
def test_forced_exits_at_its_own_loops_repeats_a_sequence_under_any_rule(case, static):
    recorded = case.engine(3).generate(case.prompts, 8)
    engine = Engine(case.model, 3, 24, Rule("fixed", exit_loop=0), case.keys, static=static)
    again = [engine.add(r.prompt, 8, forced_exits=r.loops) for r in recorded]
    other = engine.add(case.prompts[0], 8)                   # takes a slot that had forced exits
    assert len(list(engine.run())) == 80
    assert [(r.tokens, r.loops) for r in again] == [(r.tokens, r.loops) for r in recorded]
    assert other.loops == [2, *[0] * 7]


# ---------------------------------------------------------------------------------------------------------------------
# A stream

@each_mode
def test_tokens_are_yielded_as_they_are_sampled_and_new_requests_are_served(case, static):
    engine = case.engine(2, static=static)
    requests, yielded = [engine.add(case.prompts[0], 9)], {}
    for n, (request, token, loop) in enumerate(engine.run()):
        yielded.setdefault(request, []).append((token, loop))
        ended = len(request.tokens) == request.max_new_tokens or token == request.eos_id
        assert request.status == ("done" if ended else "running")
        assert yielded[request] == list(zip(request.tokens, request.loops, strict=True))
        if n in (1, 2, 3, 8):
            requests.append(engine.add(case.prompts[n % 9], n, case.decoded(case.prompts[n % 9], 5)[0][3]))
            assert requests[-1].status == "waiting" and requests[-1].arrived == engine.stats["passes"]
    assert list(yielded) == requests and len(requests) == 5
    for request in requests:
        case.check(request)
        assert request.arrived <= request.started
    assert list(engine.run()) == []


@each_mode
def test_cancelling_stops_one_request_whether_it_runs_waits_or_is_done(case, static):
    """Five requests with the same fields, so that only their identity tells them apart."""
    engine = case.engine(2, static=static)
    done = engine.generate(case.prompts[:1], 2)[0]
    first, second, third, fourth, fifth = requests = [engine.add(case.prompts[1], 8) for _ in range(5)]
    for _ in range(5):
        engine.step()
    assert [r.status for r in requests] == ["running"] * 2 + ["waiting"] * 3 and len(first.tokens) > 1
    for request in (second, fourth, done, second, fourth):
        engine.cancel(request)
    assert [r.status for r in requests] == ["running", "cancelled", "waiting", "cancelled", "waiting"]
    assert list(engine.waiting) == [third, fifth] and done.status == "done" and len(done.tokens) == 2
    assert engine.slot_request == [first, None]
    tokens = list(second.tokens)
    engine.step()
    assert third.status == "running"                          # its slot was free at once
    assert {request for request, _, _ in engine.run()} == {first, third, fifth}
    assert second.tokens == tokens and fourth.tokens == []
    for request in (*requests, done):
        case.check(request)
    engine.cancel(engine.add([], 3))                         # refused before: no effect


@each_mode
def test_all_requests_may_be_cancelled(case, static):
    engine = case.engine(2, static=static)
    requests = [engine.add(prompt, 8) for prompt in case.prompts]
    for request, _, _ in engine.run():
        assert request is requests[0]                        # no other gets a token
        for each in requests:
            engine.cancel(each)
    assert [len(r.tokens) for r in requests[2:]] == [0] * 7 and {r.status for r in requests} == {"cancelled"}
    assert not engine.waiting and engine.slot_request == [None] * 2
    case.check(engine.generate(case.prompts[:1], 3)[0])


@each_mode
def test_static_batching_starts_no_request_until_every_slot_is_free(case, static):
    engine, full = case.engine(3, static=static, refill=3), False
    requests = [engine.add(prompt, n) for n, prompt in enumerate(case.prompts[:7], 1)]
    while engine.waiting or any(engine.slot_request):
        before = list(engine.slot_request)
        engine.step()
        if any(before):
            assert all(new in (None, old) for new, old in zip(engine.slot_request, before, strict=True))
        full |= all(engine.slot_request)
    assert full and [r.started for r in requests[:3]] == [0] * 3 < [r.started for r in requests[3:6]]
    assert len({r.started for r in requests}) == 3
    for request in requests:
        case.check(request)


@each_mode
def test_prompts_wait_for_as_many_free_slots_as_refill_says(case, static):
    engine = case.engine(4, static=static, refill=2)
    requests = [engine.add(prompt, n) for n, prompt in enumerate(case.prompts[:7], 1)]
    for _ in engine.run():
        pass
    together = Counter(r.started for r in requests)
    assert list(together.values()) == [4, 2, 1] and [r.started for r in requests] == sorted(together.elements())
    for request in requests:
        case.check(request)


# ---------------------------------------------------------------------------------------------------------------------
# Many requests, and requests that cannot be served

def test_ten_thousand_requests_are_served_in_their_order_and_nothing_piles_up():
    model = draw_model(0, 2, n_embd=8, n_hidden=8, head_dim=2, n_head=2, n_ctx=8).float()
    case, rng = Case(model, Rule("fixed", exit_loop=0)), random.Random(0)
    prompts = [[rng.randrange(V) for _ in range(rng.randint(1, 3))] for _ in range(40)]
    engine, coming, count, objects = Engine(model, 32, 7, case.rule), 10_000, Counter(), []
    waiting, alive, last_start, added = deque(), [], 0, 0
    while coming or engine.waiting or any(engine.slot_request):
        while coming and len(engine.waiting) < 40:
            steps, forced_exits = rng.choice((1, 1, 2, 3, 4)), rng.choice((None, (0, 1, 0, 1)))
            request = engine.add(rng.choice(prompts), steps, forced_exits=forced_exits)
            coming, added = coming - 1, added + 1
            waiting.append(request)
            alive.append(request)
            if rng.random() < 0.05:
                engine.cancel(rng.choice(alive))
        engine.step()
        while waiting and waiting[0].status != "waiting":
            request = waiting.popleft()
            assert request.started >= last_start or request.started < 0
            last_start = max(last_start, request.started)
        for request in alive:
            if request.status in ("done", "cancelled"):
                case.check(request)
                count[request.status] += 1
        alive = [request for request in alive if request.status in ("waiting", "running")]
        if len(objects) < added // 2000:
            request = None
            gc.collect()
            objects.append(Counter(type(o).__name__ for o in gc.get_objects() if type(o) in (torch.Tensor, Request)))
    assert count["done"] + count["cancelled"] == 10_000 and 100 < count["cancelled"] < 1000
    assert engine.waiting == engine.unread == deque() and engine.slot_request == [None] * 32
    assert len(objects) == 5 and {alive["Tensor"] for alive in objects} == {objects[0]["Tensor"]}
    assert all(alive["Request"] < 100 for alive in objects)
    assert 1 < engine.stats["longest_wait"] < 20             # at most 40 requests of up to 8 passes, in 32 slots


@pytest.mark.parametrize("prompt, steps, options, message", [
    ([], 3, {}, "the prompt is empty"),
    ([1, V], 3, {}, "a token of the prompt is not between 0 and 52"),
    ([-1, 1], 3, {}, "a token of the prompt is not between 0 and 52"),
    ([1] * 24, 1, {}, "24 tokens of prompt and 1 new ones do not fit the 24 of a slot"),
    ([1] * 20, 5, {}, "20 tokens of prompt and 5 new ones do not fit the 24 of a slot"),
    ([1], 0, {}, "max_new_tokens is not between 1 and 24"),
    ([1], -2, {}, "max_new_tokens is not between 1 and 24"),
    ([1], 25, {}, "max_new_tokens is not between 1 and 24"),
    ([1], 3, {"forced_exits": [2, -1, 0]}, "a loop of forced_exits is not between 0 and 2"),
    ([1], 3, {"forced_exits": [2, 1, 3]}, "a loop of forced_exits is not between 0 and 2"),
    ([1, 2.5], 3, {}, "a token of the prompt is not a whole number"),
    ([1, 2.0], 3, {}, "a token of the prompt is not a whole number"),
    ([1, True], 3, {}, "a token of the prompt is not a whole number"),
    ([1, None], 3, {}, "a token of the prompt is not a whole number"),
    (torch.tensor([[1], [2]]), 3, {}, "a token of the prompt is not a whole number"),
    (torch.tensor([1.0, 2.0]), 3, {}, "a token of the prompt is not a whole number"),
    ("the cat", 3, {}, "a token of the prompt is not a whole number"),
    (b"the cat", 3, {}, "a token of the prompt is not a whole number"),
    (None, 3, {}, "a token of the prompt is not a whole number"),
    (7, 3, {}, "a token of the prompt is not a whole number"),
    ([1], 2.5, {}, "max_new_tokens is not a whole number"),
    ([1], "3", {}, "max_new_tokens is not a whole number"),
    ([1], True, {}, "max_new_tokens is not a whole number"),
    ([1], None, {}, "max_new_tokens is not a whole number"),
    ([1], 3, {"eos_id": 2.5}, "eos_id=2.5 must be a token's id, several, or None"),
    ([1], 3, {"eos_id": [2, "3"]}, "eos_id=[2, '3'] must be a token's id, several, or None"),
    ([1], 3, {"eos_id": [2, V]}, "an id that ends the text is not between 0 and 52"),
    ([1], 3, {"forced_exits": [0, 1.5]}, "a loop of forced_exits is not a whole number"),
    ([1], 3, {"forced_exits": 2}, "a loop of forced_exits is not a whole number"),
])
@each_mode
def test_what_cannot_be_served_is_refused_alone(case, static, prompt, steps, options, message):
    engine = case.engine(2, static=static)
    before = engine.add(case.prompts[0], 4)
    for _ in range(3):
        engine.step()
    refused, after = engine.add(prompt, steps, **options), engine.add([2] * 20, 4)        # the longest that fits
    assert refused.status == "refused" and refused.reason.startswith(message)
    assert {request for request, _, _ in engine.run()} == {before, after} and refused.tokens == []
    for request in (before, after):
        case.check(request)


def test_valid_prompts_are_served_beside_refused_ones(case):
    requests = case.engine(2).generate([[1], [], [2, 3], [V]], 3)
    assert [(r.status, r.reason) for r in requests] == [
        ("done", ""), ("refused", "the prompt is empty"), ("done", ""),
        ("refused", "a token of the prompt is not between 0 and 52")]


@pytest.mark.parametrize("kind", [tuple, np.array, torch.tensor, lambda ids: map(np.int32, ids)])
def test_integers_of_every_type_are_accepted(case, kind):
    want, _ = case.decoded((1, 2, 3), 6)
    request = case.engine(1).add(kind([1, 2, 3]), np.int64(6), kind([want[2], 52]), kind([2, 2, 2, 2, 2, 2]))
    assert request.status == "waiting" and request.prompt == [1, 2, 3] and set(map(type, request.prompt)) == {int}
    ended = case.engine(1).generate([kind([1, 2, 3])], 6, torch.tensor(want[2]))[0]
    assert ended.tokens == want[:want.index(want[2]) + 1]


@each_mode
def test_any_of_several_ids_ends_a_text_and_the_slot_s_next_request_has_its_own(case, static):
    engine, want = case.engine(1, static=static), case.decoded((1, 2, 3), 8)[0]
    for eos_id in ([V - 1, want[4], want[2]], [want[5]], (), None, want[1]):
        case.check(engine.generate([[1, 2, 3]], 8, eos_id)[0])
        assert len(case.decoded((1, 2, 3), 8, eos_id)[0]) == 8 or eos_id


@each_mode
@torch.no_grad()
def test_a_request_whose_logits_are_not_finite_fails_and_the_others_go_on(static):
    """After its prompt, or after one of its tokens; its slot is free for the next request."""
    case = Case(draw_model(7, 3, rank=2), Rule("fixed", exit_loop=1))
    want = [case.decoded((token, 2), STEPS)[0] for token in range(1, 9)]
    bad = want[0][2]
    good = [token for token in range(1, 9) if bad not in (token, 2, *want[token - 1])]
    assert len(good) > 2
    case.model.embed.weight[bad] = NAN                       # the head is another matrix
    engine = case.engine(2, static=static)
    late, at_once, *rest = [engine.add([token, 2], STEPS) for token in (1, bad, *good)]
    assert not any(request is at_once for request, _, _ in engine.run())
    assert [r.status for r in (late, at_once, *rest)] == ["failed"] * 2 + ["done"] * len(rest)
    assert "not finite" in late.reason and "not finite" in at_once.reason and at_once.tokens == []
    assert late.tokens == want[0][:want[0].index(bad) + 1]
    assert [r.tokens for r in rest] == [want[token - 1] for token in good]


@torch.no_grad()
def test_what_a_failed_sequence_has_stored_does_not_reach_the_slot_s_next_one():
    """It fails far behind: the next one is short, and attention reads as far as the neighbour's length."""
    case = Case(draw_model(7, 2), prompts=[(5, 6)])
    want = case.decoded((1, 2), STEPS)[0]
    bad = next(n for n in range(9, V) if n not in want and n not in case.decoded((5, 6), 20)[0])
    case.model.embed.weight[bad] = NAN
    engine = case.engine(2)
    neighbour, failed, after = engine.add((5, 6), 20), engine.add([3] * 9 + [bad], 3), engine.add((1, 2), STEPS)
    list(engine.run())
    assert failed.status == "failed" and after.tokens == want
    case.check(neighbour)


class Broken:
    def __iter__(self):
        yield 1
        raise ValueError("broken")

    def __repr__(self):                                      # the same name in every process of the tests
        return "Broken()"


@pytest.mark.parametrize("wrong", [
    {"prompt": Broken()}, {"prompt": torch.empty(2, device="meta", dtype=torch.long)}, {"prompt": Request([1], 3)},
    {"prompt": [2**70]}, {"max_new_tokens": 3.0}, {"max_new_tokens": NAN}, {"max_new_tokens": [3]},
    {"eos_id": Broken()}, {"eos_id": [[1, 2]]}, {"eos_id": [1.0]}, {"eos_id": torch.tensor([1.0, 2.0])},
    {"eos_id": Request([1], 3)}, {"eos_id": 2**70}, {"eos_id": [None]}, {"forced_exits": Broken()},
    {"forced_exits": [2**65]}, {"forced_exits": [[0]]}, {"forced_exits": Request([1], 3)}], ids=str)
def test_what_cannot_even_be_read_is_refused_and_the_others_are_served(case, wrong):
    engine = case.engine(2)
    before = engine.add(case.prompts[0], 4)
    engine.step()
    refused = engine.add(**{"prompt": [1], "max_new_tokens": 3} | wrong)
    after = engine.add(case.prompts[1], 4)
    assert refused.status == "refused" and refused.reason
    assert {request for request, _, _ in engine.run()} == {before, after}
    for request in (before, after):
        case.check(request)


def test_prompts_that_cannot_be_listed_leave_nothing_behind(case):
    engine = case.engine(2)
    with pytest.raises(ValueError, match="broken"):
        engine.generate(([1] for _ in Broken()), 3)
    assert not engine.waiting


def test_a_request_of_another_engine_cannot_be_cancelled(case):
    one, other = case.engine(1), case.engine(1)
    running, waiting = one.add([1], 3), one.add([2], 3)
    one.step()
    for request in (running, waiting, None, 7):
        with pytest.raises(UserError, match="another engine's|is not a request"):
            other.cancel(request)
    assert len(list(one.run())) == 5 and {running.status, waiting.status} == {"done"}
    other.cancel(running)                                    # done: no effect


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory"), ValueError("else")])
def test_prompts_that_do_not_fit_into_memory_together_are_not_lost(case, monkeypatch, error):
    """More than two prompts, or more than 6 tokens, do not fit."""
    engine, forward = case.engine(4), type(case.model).forward
    requests = [engine.add(prompt, 4) for prompt in ([1], [2, 3], [4], [5] * 7, [6], [7])]

    def small(model, idx, *rest):
        if idx.shape[0] > 2 or idx.shape[1] > 6:
            raise error
        return forward(model, idx, *rest)
    monkeypatch.setattr(type(case.model), "forward", small)
    if isinstance(error, ValueError):                        # raised, and the caller may try again
        with pytest.raises(ValueError, match="else"):
            list(engine.run())
        assert [r.status for r in requests] == ["waiting"] * 6 and list(engine.waiting) == requests
        monkeypatch.undo()
        list(engine.run())
    else:
        list(engine.run())
        failed = requests.pop(3)
        assert failed.status == "failed" and "out of memory" in failed.reason and failed.tokens == []
        monkeypatch.undo()
    for request in requests:
        case.check(request)


def test_a_request_copies_its_lists(case):
    engine, prompt, forced_exits = case.engine(1), [1, 2, 3], [2, 0, 1, 0]
    request = engine.add(prompt, 4, forced_exits=forced_exits)
    prompt[0], forced_exits[1] = 9, 1
    assert [token for _, token, _ in engine.run()] == case.decoded((1, 2, 3), 4, forced_exits=(2, 0, 1, 0))[0]
    assert request.loops == [2, 0, 1, 0]


@pytest.mark.parametrize("options", [{"slots": 0}, {"slots": -1}, {"slots": 2, "head": 3}, {"slots": 2, "head": -1},
                                     {"max_len": 33}, {"max_len": 1}, {"max_len": 0}])
def test_settings_out_of_range_are_refused(case, options):
    for wrong in ({"slots": 2.0}, {"max_len": "9"}, {"head": True}, {"refill": None}):
        with pytest.raises(UserError, match="whole numbers"):
            Engine(case.model, **wrong)
    with pytest.raises(UserError, match="keys='kept' is unknown; use one of exact, copy"):
        Engine(case.model, keys="kept")
    with pytest.raises(UserError, match=r"slots=-?\d+, head=-?\d+, refill=-?\d+, max_len=\d+: use slots from 1, head "
                                        "from 0 to slots, refill from 1 to slots, and max_len from 2 to the model's "
                                        "context of 32"):
        Engine(case.model, **options)


def test_max_len_is_the_model_s_context_by_default(case):
    engine = Engine(case.model, 2, rule=case.rule, keys=case.keys)
    case.check(engine.generate([[1] * 20], 12)[0])
    assert engine.cache.k.shape[:4] == (1, 3, 3, 32)
