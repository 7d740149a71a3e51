"""Early exits: decoding and whole texts against everything computed anew, what a batch's rows have to do with each other
(nothing), what is counted, and what a calibrated threshold promises."""

import copy
import json
import math
import random
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_model import ARCHS, close, cut, tiny, tokens
from tiny import contents, files_end_at, flags, read_log, run, weights

import exits
import train
from exits import (
    Outcome,
    Seen,
    binomial_cdf,
    calibrate,
    decide,
    decode,
    keeps,
    observe,
    oracle_exits,
    outcome,
    run_exits,
    statistics,
    train_gate,
)
from model import RecursiveTransformer, rope_angles, rotate
from rules import SCORED, Gate, Rule, load_rule, read_thresholds
from runtime import GATE_FILE, THRESHOLDS_FILE, UserError

V = 53
each_policy = pytest.mark.parametrize("keys", ["exact", "copy"])


class Table:
    """A rule that looks at no state: who leaves is written in a table (B, T, n_loop - 1). `at` is the last token before
    those that `decode` asks about, one after the other."""
    reads_logits = False

    def __init__(self, leaves, at=-1):
        self.leaves, self.at = torch.as_tensor(leaves), at

    def __call__(self, x, loop, logits=None):
        if x.dim() == 3:
            return self.leaves[:, :x.size(1), loop]
        self.at += loop == 0
        return self.leaves[:, self.at, loop]

    def row(self, i):
        return Table(self.leaves[i:i + 1], self.at)


class Chooser:
    """Takes the likeliest token and the second likeliest in turn, of the words that are allowed, or the one that
    `script` (B, steps) says; and keeps the logits."""

    def __init__(self, words=V, script=None):
        self.words, self.script, self.logits = words, script, []

    def __call__(self, logits):
        self.logits.append(logits)
        step = len(self.logits) - 1
        return logits[:, :self.words].topk(2).indices[:, step % 2] if self.script is None else self.script[:, step]


def decoded(model, idx, steps, rule, keys="exact", choose=None, **options):
    """(tokens, loops, logits) (B, steps, ...) of `decode`."""
    choose = choose or Chooser()
    said, loops = zip(*decode(model, idx, steps, copy.copy(rule), keys, choose, **options), strict=True)
    return torch.stack(said, 1), torch.stack(loops, 1), torch.stack(choose.logits, 1)


@torch.no_grad()
def scores(model, rule, shape=(2, 12)):
    """Those of a few tokens, after every loop but the last: thresholds are drawn from them."""
    states = model(torch.randint(V, shape))
    return torch.cat([rule.score(x, i, model.logits(x)).flatten() for i, x in enumerate(states[:-1])]).sort().values


def draw_gate(model):
    gate = Gate(model.config.n_loop - 1, model.config.n_embd, hidden=8).to(model.embed.weight.dtype)
    for p in gate.parameters():
        torch.nn.init.normal_(p)
    return gate.requires_grad_(False)


def draw_case(seed):
    """A random model in fp64, prompts, number of steps, and rule; `rules[i]` is what row i alone would be given."""
    rng = random.Random(seed)
    n_loop, rows, prompt, steps = rng.choice((2, 3)), rng.randint(1, 3), rng.randint(1, 5), rng.randint(1, 7)
    model = tiny(rng.choice(list(ARCHS)), seed, n_layer=2 * n_loop, n_loop=n_loop, rank=rng.choice((0, 3)),
                 vectors=rng.choice(("tied", "per_loop"))).double()
    name = rng.choice(("table", "table", "fixed", *SCORED))
    if name == "table":
        rule = Table(torch.rand(rows, prompt + steps, n_loop - 1) < rng.random(), prompt - 1)
    else:
        rule = Rule(name, exit_loop=rng.randrange(n_loop), gate=draw_gate(model))
        if name in SCORED:
            found = scores(model, rule)
            at = rng.randrange(len(found) - 1)
            rule.threshold = found[at:at + 2].mean().item()
    rules = [rule.row(i) if name == "table" else rule for i in range(rows)]
    return model, torch.randint(V, (rows, prompt)), steps, rule, rules


def first_exit(model, rule, states):
    """The loops (B,) after which tokens leave whose states after each loop are (B, C)."""
    asked = [rule(x, i, model.logits(x)) for i, x in enumerate(states[:-1])]
    return torch.tensor([[*row, True].index(True) for row in torch.stack(asked, 1).tolist()])


@torch.no_grad()
def assert_decoded_anew(model, idx, steps, rule):
    """Exact keys: at every step the whole text so far, from scratch. Returns the loops."""
    said, loops, logits = decoded(model, idx, steps, rule)
    rule, choose, rows = copy.copy(rule), Chooser(), torch.arange(len(idx))
    for step in range(steps):
        states = torch.stack([x[:, -1] for x in model(idx)])
        at = first_exit(model, rule, states) if step else torch.full((len(idx),), len(states) - 1)
        want = model.logits(states[at, rows])
        assert torch.equal(loops[:, step], at)
        close(logits[:, step], want, 1e-9)
        assert torch.equal(said[:, step], choose(want))
        idx = torch.cat([idx, said[:, step:step + 1]], 1)
    return loops[:, 1:].flatten().tolist()


@torch.no_grad()
def one_by_one(model, row, rule, judged_from):
    """(states (T, C), loops (T,)) that the tokens `row` (T,) leave with where keys are copied, one token after the
    other. Those before `judged_from` run all loops."""
    c, out, loops = model.config, [], []
    kept = [[] for _ in range(c.n_layer)]                    # by depth, each token's key and value (2, K, D)
    for t, token in enumerate(row):
        x, left, rope = model.first_state(token.view(1, 1)), None, rope_angles(torch.tensor([t]), c)
        for depth in range(c.n_layer):
            loop, i = divmod(depth, c.n_unique)
            if left is not None:
                kept[depth].append(kept[left * c.n_unique + i][t])
                continue
            layer, attn = model.layers[i], model.layers[i].attn
            h = layer.norm1(x, loop)
            q, k, v = (f(h, loop).view(1, 1, -1, c.head_dim) for f in (attn.q, attn.k, attn.v))
            kept[depth].append(torch.stack([rotate(k, rope)[0, 0], v[0, 0]]))
            k, v = torch.stack(kept[depth], 2).repeat_interleave(c.n_head // c.n_kv_head, dim=1)      # (H, t + 1, D)
            p = (torch.einsum("hd,htd->ht", rotate(q, rope)[0, 0], k) / c.head_dim**0.5).softmax(-1)
            y = x + attn.o(torch.einsum("ht,htd->hd", p, v).view(1, 1, -1), loop)
            x = y + layer.mlp(layer.norm2(x if c.parallel else y, loop), loop)
            done = i == c.n_unique - 1 and loop < c.n_loop - 1
            if done and t >= judged_from and rule(x[0], loop, model.logits(x[0])):
                left = loop
        out.append(x[0, 0])
        loops.append(c.n_loop - 1 if left is None else left)
    return torch.stack(out), torch.tensor(loops)


def assert_copied(model, idx, steps, rule, rules):
    """Copied keys: decode against `one_by_one`."""
    said, loops, logits = decoded(model, idx, steps, rule, "copy")
    choose, prompt = Chooser(), idx.size(1)
    for step in range(steps):
        assert torch.equal(said[:, step], choose(logits[:, step]))
    for i, of_row in enumerate(rules):
        x, want = one_by_one(model, torch.cat([idx[i], said[i, :-1]]), copy.copy(of_row), prompt)
        assert torch.equal(loops[i], want[prompt - 1:])
        close(logits[i], model.logits(x[prompt - 1:]), 1e-9)
    return loops[:, 1:].flatten().tolist()


# ---------------------------------------------------------------------------------------------------------------------
# One token after the other

@pytest.mark.parametrize("n_loop", [1, 2, 3])
@pytest.mark.parametrize("arch", ARCHS)
@each_policy
@torch.no_grad()
def test_where_none_leaves_decoding_is_the_full_model(arch, n_loop, keys):
    model, idx = tiny(arch, n_loop=n_loop, rank=2), tokens(2, 5)
    for rule in (None, Rule(), Rule("max_prob"), Rule("fixed", exit_loop=n_loop - 1)):
        said, loops = zip(*decode(model, idx, 8, rule, keys), strict=True)
        whole = idx
        for token, loop in zip(said, loops, strict=True):
            assert torch.equal(token, model.logits(model(whole)[-1])[:, -1].argmax(-1)) and loop.eq(n_loop - 1).all()
            whole = torch.cat([whole, token[:, None]], 1)


def test_exact_keys_say_what_the_model_says_computed_anew_at_every_step():
    """200 random models, prompts and rules."""
    found = []
    for seed in range(200):
        model, idx, steps, rule, _ = draw_case(seed)
        found += [(model.config.n_loop, loop) for loop in assert_decoded_anew(model, idx, steps, rule)]
    assert all(found.count(kind) > 50 for kind in ((2, 0), (2, 1), (3, 0), (3, 1), (3, 2)))


def test_copied_keys_say_what_one_token_after_the_other_says():
    found = []
    for seed in range(100):
        model, idx, steps, rule, rules = draw_case(1000 + seed)
        found += [(model.config.n_loop, loop) for loop in assert_copied(model, idx, steps, rule, rules)]
    assert all(found.count(kind) > 25 for kind in ((2, 0), (2, 1), (3, 0), (3, 1), (3, 2)))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("leaves", [(True, True), (False, True), (False, False), (True, False)])
def test_all_leave_or_none(rows, leaves):
    model, rule = tiny("llama", n_loop=3, rank=2).double(), Table(torch.tensor(leaves).expand(rows, 12, 2), 3)
    idx, want = tokens(rows, 4), [*leaves, True].index(True)
    assert set(assert_decoded_anew(model, idx, 8, rule)) == {want}
    assert set(assert_copied(model, idx, 8, rule, [rule.row(i) for i in range(rows)])) == {want}


@each_policy
@torch.no_grad()
def test_a_whole_text_is_what_decoding_it_gives(keys):
    """`decode` made to say the text, against `run_exits` in one pass."""
    for seed, arch in enumerate(ARCHS):
        model = tiny(arch, n_loop=3, rank=2 * (seed % 2)).double()
        idx, leaves = tokens(3, 11), torch.rand(3, 11, 2, generator=torch.Generator().manual_seed(seed)) < 0.4
        leaves[:, 0] = False                                 # prompts run all loops
        x, loops = run_exits(model, idx, Table(leaves), keys)
        _, said_at, logits = decoded(model, idx[:, :1], 11, Table(leaves, 0), keys, Chooser(script=idx.roll(-1, 1)))
        assert torch.equal(said_at, loops) and loops.unique().tolist() == [0, 1, 2]
        close(logits, model.logits(x), 1e-9)


def blocks_run(model, monkeypatch):
    """(loop, tokens) of each call of model.block from here on."""
    calls, block = [], model.block

    def counted(x, loop, cache=None):
        calls.append((loop, x.size(1)))
        return block(x, loop, cache)
    monkeypatch.setattr(model, "block", counted)
    return calls


def test_a_row_alone_skips_loops_and_catches_up_in_one_pass(monkeypatch):
    model = tiny("llama", n_loop=3)
    calls = blocks_run(model, monkeypatch)
    leaves = [[0, 0], [1, 0], [1, 0], [0, 1], [0, 1], [1, 1], [0, 0], [0, 1]]         # (tokens, loops), the prompt first
    _, loops, _ = decoded(model, tokens(1, 1), 8, Table(torch.tensor([leaves]).bool(), 0))
    assert loops.tolist() == [[2, 0, 0, 1, 1, 0, 2, 1]]
    assert calls == [(0, 1), (1, 1), (2, 1), (0, 1), (0, 1), (0, 1), (1, 3), (0, 1), (1, 1), (0, 1),
                     (0, 1), (1, 2), (2, 6), (0, 1), (1, 1)]


def test_copied_keys_skip_loops_once_all_rows_have_left(monkeypatch):
    model = tiny("llama", n_loop=3)
    calls = blocks_run(model, monkeypatch)
    leaves = [[[0, 0], [1, 0], [1, 0], [0, 0]], [[0, 0], [1, 0], [0, 1], [1, 0]]]
    decoded(model, tokens(2, 1), 4, Table(torch.tensor(leaves).bool(), 0), "copy")
    assert [loop for loop, _ in calls] == [0, 1, 2, 0, 0, 1, 0, 1, 2]


def at_median(model, name):
    rule = Rule(name, gate=draw_gate(model))
    return replace(rule, threshold=scores(model, rule).median().item())


@pytest.mark.parametrize("name", SCORED)
@each_policy
@torch.no_grad()
def test_a_broken_row_changes_nothing_in_the_others(name, keys):
    """To the last bit, where one row's states and logits are all NaN; and it never leaves itself."""
    model = tiny("llama", n_loop=3, rank=2)
    rule = at_median(model, name)
    model.embed.weight[V - 1] = torch.nan                    # the head is another matrix
    idx = tokens(3, 6) % (V - 1)
    broken = idx.clone()
    broken[1] = V - 1
    a, b = (decoded(model, rows, 12, rule, keys, Chooser(V - 1)) for rows in (idx, broken))
    for t, broken_t in zip(a, b, strict=True):
        assert torch.equal(t[[0, 2]], broken_t[[0, 2]])
    assert b[2][1].isnan().all() and b[1][1].eq(2).all() and a[1].unique().numel() > 1
    for t, broken_t in zip(run_exits(model, idx, rule, keys), run_exits(model, broken, rule, keys), strict=True):
        assert torch.equal(t[[0, 2]], broken_t[[0, 2]])
    assert run_exits(model, broken, rule, keys)[1][1].eq(2).all()


@pytest.mark.parametrize("name", ["never", "fixed", *SCORED])
@each_policy
def test_a_row_says_in_a_batch_what_it_says_alone(name, keys):
    model, idx = tiny("gpt_neox", n_loop=3, rank=2).double(), tokens(3, 6)
    rule = at_median(model, name) if name in SCORED else Rule(name)
    said, loops, logits = decoded(model, idx, 10, rule, keys)
    for i in range(3):
        alone = decoded(model, idx[i:i + 1], 10, rule, keys)
        assert torch.equal(alone[0], said[i:i + 1]) and torch.equal(alone[1], loops[i:i + 1])
        close(alone[2], logits[i:i + 1], 1e-9)


@each_policy
def test_a_row_that_has_ended_repeats_the_end_and_the_others_go_on(keys, monkeypatch):
    model, eos = tiny("llama", n_loop=2).double(), 7
    rule = at_median(model, "max_prob")
    script = torch.tensor([[7, 4, 4, 4, 4, 4, 4, 4], [1, 2, 7, 3, 3, 3, 3, 3], [1, 2, 3, 4, 5, 7, 6, 7]])
    calls = blocks_run(model, monkeypatch)
    said, loops, logits = decoded(model, tokens(3, 4), 8, rule, keys, Chooser(script=script), eos_id=eos)
    assert said.tolist() == [[7] * 6, [1, 2, 7, 7, 7, 7], [1, 2, 3, 4, 5, 7]]        # then all have ended
    assert len([loop for loop, _ in calls if loop == 0]) == 6                        # nothing is run after that
    assert loops.eq(-1).tolist() == [[step > end for step in range(6)] for end in (0, 2, 5)]
    for i, end in enumerate((0, 2, 5)):
        alone = decoded(model, tokens(3, 4)[i:i + 1], 8, rule, keys, Chooser(script=script[i:i + 1]), eos_id=eos)
        assert alone[0].tolist() == [script[i, :end + 1].tolist()]
        assert torch.equal(alone[1][0], loops[i, :end + 1])
        close(alone[2][0], logits[i, :end + 1], 1e-9)


@pytest.mark.parametrize("prompt, asked, want", [(5, 10, 3), (5, 3, 3), (5, 2, 2), (7, 9, 1), (8, 9, 0), (3, 1, 1)])
@each_policy
def test_decoding_stops_when_the_context_is_full(prompt, asked, want, keys, monkeypatch):
    model = tiny("gemma", n_loop=2, n_ctx=8)
    calls = blocks_run(model, monkeypatch)
    assert len(list(decode(model, tokens(2, prompt), asked, Rule("fixed"), keys))) == want
    assert [loop for loop, _ in calls].count(0) == max(1, want)      # no pass for a token that nobody asks for


# ---------------------------------------------------------------------------------------------------------------------
# Whole texts

@pytest.mark.parametrize("keys", ["exact", "copy"])
@torch.no_grad()
def test_a_text_leaves_as_its_tokens_do_one_by_one(keys):
    """With exact keys: the states of the plain forward pass, at the loop where the rule first says yes."""
    found = []
    for seed in range(40):
        model, _, _, rule, rules = draw_case(2000 + seed)
        if isinstance(rule, Table):
            rule.at = -1
            rules = [rule.row(i) for i in range(len(rules))]
        idx = torch.randint(V, (len(rules), rule.leaves.size(1) if isinstance(rule, Table) else 9))
        x, loops = run_exits(model, idx, rule, keys)
        for i, of_row in enumerate(rules):
            if keys == "copy":
                want, at = one_by_one(model, idx[i], of_row, 0)
            else:
                states = torch.stack(model(idx[i:i + 1]))                            # (n_loop, 1, T, C)
                at = torch.cat([first_exit(model, of_row, states[:, :, t]) for t in range(idx.size(1))])
                want = states[at, 0, torch.arange(idx.size(1))]
            assert torch.equal(loops[i], at)
            close(x[i], want, 1e-9)
            found += [(model.config.n_loop, loop) for loop in at.tolist()]
    assert all(found.count(kind) > 10 for kind in ((2, 0), (2, 1), (3, 0), (3, 1), (3, 2)))


def pairs_of(*shapes, seed=3):
    """Batches of inputs and targets."""
    torch.manual_seed(seed)
    return [tuple(torch.randint(V, (2, *shape))) for shape in shapes]


@pytest.mark.parametrize("n_loop", [1, 2, 3])
@torch.no_grad()
def test_the_oracle_leaves_as_soon_as_the_argmax_is_the_last_loops(n_loop):
    found = []
    for seed in range(5):
        model, idx = tiny("llama", seed, n_layer=2 * n_loop, n_loop=n_loop), tokens(3, 20)
        for p in model.layers.parameters():
            p.mul_(0.7)                                      # loops that change little agree now and then
        said = torch.stack([model.logits(x).argmax(-1) for x in model(idx)], -1).tolist()
        want = [[loops.index(loops[-1]) for loops in row] for row in said]
        assert oracle_exits(model, idx).tolist() == want
        found += sum(want, [])
    assert all(found.count(loop) > 5 for loop in range(n_loop))


@torch.no_grad()
def test_what_is_observed_is_what_the_exits_say():
    model, pairs = tiny("gemma", n_loop=3, rank=2), pairs_of((3, 7), (3, 7), (1, 7))
    rules = [Rule(name, gate=draw_gate(model)) for name in SCORED]
    seen = observe(model, pairs, rules)
    states = [torch.cat([model(idx)[loop].flatten(0, 1) for idx, _ in pairs]) for loop in range(3)]
    targets = torch.cat([t.flatten() for _, t in pairs])
    logits = [model.logits(x) for x in states]
    assert torch.equal(seen.token, torch.stack([z.argmax(-1) for z in logits]))
    close(seen.ce, torch.stack([F.cross_entropy(z, targets, reduction="none") for z in logits]))
    assert list(seen.score) == list(SCORED)
    for rule in rules:
        close(seen.score[rule.name], torch.stack([rule.score(states[i], i, logits[i]) for i in range(2)]))
    assert torch.equal(seen.oracle, torch.cat([oracle_exits(model, idx).flatten() for idx, _ in pairs]))
    loops = torch.arange(49) % 3
    out = seen.at(loops)
    assert torch.equal(out.loops, loops)
    assert out.token.tolist() == [seen.token[loop, n].item() for n, loop in enumerate(loops)]
    assert out.ce.tolist() == [seen.ce[loop, n].item() for n, loop in enumerate(loops)]
    assert observe(model, pairs).score == {}


@pytest.mark.parametrize("name", SCORED)
def test_what_was_seen_is_what_reading_again_gives(name):
    model, pairs = tiny("llama", n_loop=3).double(), pairs_of((3, 9), (2, 9))
    rule = at_median(model, name)
    seen = observe(model, pairs, [rule])
    for rule.threshold in (*scores(model, rule)[::12].tolist(), 0.0, math.inf, seen.score[name].max().item() * (1 - 1e-9)):
        a, b = outcome(model, pairs, seen, rule), outcome(model, pairs, replace(seen, score={}), rule)
        assert torch.equal(a.loops, b.loops) and torch.equal(a.token, b.token)
        close(a.ce, b.ce, 1e-9)
        x, loops = zip(*(run_exits(model, idx, rule, "copy") for idx, _ in pairs), strict=True)
        c, said = outcome(model, pairs, seen, rule, "copy"), [model.logits(out).argmax(-1).flatten() for out in x]
        assert torch.equal(c.loops, torch.cat([at.flatten() for at in loops])) and torch.equal(c.token, torch.cat(said))


def test_statistics_by_hand():
    seen = Seen(token=torch.tensor([[1, 2, 3, 4, 5, 6, 9, 8], [1, 0, 3, 7, 5, 6, 9, 7], [1, 2, 0, 7, 5, 9, 9, 8]]),
                ce=torch.zeros(3, 8), score={})
    assert seen.oracle.tolist() == [0, 0, 2, 1, 0, 2, 0, 0]
    loops = torch.tensor([0, 1, 1, 1, 2, 2, 0, 2])
    out = Outcome(loops, seen.token.gather(0, loops[None])[0], torch.tensor([1.0, 2, 3, 0, 0, 0, 1, 1]))
    got = statistics(out, seen)
    assert got == {"loops": 1 + 9 / 8, "left_at": [2 / 8, 3 / 8, 3 / 8], "agreement": 6 / 8,
                   "perplexity": pytest.approx(math.e), "caught": 3 / 6}
    all_run = statistics(seen.at(torch.full((8,), 2)), seen)
    assert all_run == {"loops": 3, "left_at": [0, 0, 1], "agreement": 1, "perplexity": 1, "caught": 0}
    best = statistics(seen.at(seen.oracle), seen)
    assert (best["agreement"], best["caught"], best["loops"]) == (1, 1, 1 + 5 / 8)
    none = statistics(seen.at(torch.full((8,), 2)), Seen(seen.token[-1:].expand(3, 8) + torch.arange(3)[:, None], seen.ce, {}))
    assert none["caught"] == 0                               # nothing to catch is no error


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_large_vocabulary_is_gone_through_in_chunks(at_once, monkeypatch):
    """The number of tokens whose logits are made at once falls with the vocabulary's size, which is pretended here."""
    model, pairs = tiny("llama", n_loop=3).double(), pairs_of((3, 9), (2, 9))
    rules = [at_median(model, name) for name in SCORED]
    seen = observe(model, pairs, rules)
    exited = [run_exits(model, pairs[0][0], rule, "copy") for rule in rules]
    sizes, logits = [], model.logits
    monkeypatch.setattr(model.config, "vocab_size", 2**25 // at_once if at_once > 1 else 2**26)
    monkeypatch.setattr(model, "logits", lambda x: sizes.append(len(x)) or logits(x))
    again = observe(model, pairs, rules)
    assert max(sizes) == at_once and sum(sizes) == 3 * 45
    assert torch.equal(again.token, seen.token)
    close(again.ce, seen.ce, 1e-12)
    for name in SCORED:
        close(again.score[name], seen.score[name], 1e-12)
    for rule, (x, loops) in zip(rules, exited, strict=True):
        sizes.clear()
        a, b = run_exits(model, pairs[0][0], rule, "copy")
        assert torch.equal(loops, b) and torch.equal(x, a)
        assert sizes == ([] if rule.name == "gate" else [at_once] * (2 * 27 // at_once))
    x = torch.randn(2, 5, 32).double()
    assert torch.equal(decide(model, rules[0], x, 0), rules[0](x, 0, logits(x)))
