"""Early exits: decoding and whole texts against a full forward pass at every step, rows that are independent of each
other, exit statistics, and what a calibrated threshold guarantees."""

import copy
import json
import math
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_model import ARCHS, close, cut, tiny, tokens
from tiny import contents, files_end_at, read_log, run, weights

import train
from evaluation import thresholds
from evaluation.thresholds import (
    ExitsConfig,
    binomial_cdf,
    calibrate_threshold,
    read_texts,
    shows_agreement,
    train_gate,
)
from exits import (
    SCORED,
    ExitResult,
    ExitStats,
    Gate,
    Rule,
    apply_rule,
    collect_exit_stats,
    decode,
    exits_in_chunks,
    load_rule,
    oracle_exits,
    read_thresholds,
    run_exits,
    summarize,
)
from lib.cli import UserError
from lib.data import load_tokens
from lib.folders import GATE_FILE, THRESHOLDS_FILE
from lib.tokenizer import Tokenizer
from model import RecursiveTransformer, rope_angles, rotate

V = 53
ROOT = Path(__file__).resolve().parent.parent
each_policy = pytest.mark.parametrize("keys", ["exact", "copy"])


class Table:
    """A rule that reads no state but a table of the tokens that exit, bool (B, T, n_loop - 1). `at` is the last token
    before those that `decode` runs, one after the other."""
    reads_logits = False

    def __init__(self, exits, at=-1):
        self.exits, self.at = torch.as_tensor(exits), at

    def __call__(self, x, loop, logits=None):
        if x.dim() == 3:
            return self.exits[:, :x.size(1), loop]
        self.at += loop == 0
        return self.exits[:, self.at, loop]

    def row(self, i):
        return Table(self.exits[i:i + 1], self.at)


class Sampler:
    """Takes the most probable token and the second in turn, among the first `vocab_size`, or the tokens of `script`
    (B, steps); and keeps the logits."""

    def __init__(self, vocab_size=V, script=None):
        self.vocab_size, self.script, self.logits = vocab_size, script, []

    def __call__(self, logits):
        self.logits.append(logits)
        step = len(self.logits) - 1
        return logits[:, :self.vocab_size].topk(2).indices[:, step % 2] if self.script is None else self.script[:, step]


def decoded(model, idx, steps, rule, keys="exact", sampler=None, **options):
    """(tokens, loops, logits) (B, steps, ...) of `decode`."""
    sampler = sampler or Sampler()
    found, loops = zip(*decode(model, idx, steps, copy.copy(rule), keys, sampler, **options), strict=True)
    return torch.stack(found, 1), torch.stack(loops, 1), torch.stack(sampler.logits, 1)


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


def draw_case(seed, no_rope=None):
    """A random model in fp64, prompts, number of steps, and rule; `rules[i]` is what row i alone would be given."""
    rng = random.Random(seed)
    n_loop, rows, prompt, steps = rng.choice((2, 3, 3)), rng.choice((1, 1, 2, 3)), rng.randint(1, 4), rng.randint(1, 7)
    model = tiny(rng.choice(list(ARCHS)), seed, n_layer=rng.randint(1, 2) * n_loop, n_loop=n_loop,
                 rank=rng.choice((0, 3)), vectors=rng.choice(("tied", "per_loop")), no_rope=no_rope).double()
    name = rng.choice(("table", "table", "fixed", *SCORED))
    if name == "table":
        rule = Table(torch.rand(rows, prompt + steps, n_loop - 1) < rng.uniform(0.2, 0.7), prompt - 1)
    else:
        rule = Rule(name, exit_loop=rng.randrange(n_loop), gate=draw_gate(model))
        if name in SCORED:
            found = scores(model, rule)
            at = rng.randrange(len(found) - 1)
            rule.threshold = found[at:at + 2].mean().item()
    rules = [rule.row(i) if name == "table" else rule for i in range(rows)]
    return model, torch.randint(V, (rows, prompt)), steps, rule, rules


def first_exit(model, rule, states):
    """The exit loops (B,) of tokens with the states (B, C) after each loop."""
    asked = [rule(x, i, model.logits(x)) for i, x in enumerate(states[:-1])]
    return torch.tensor([[*row, True].index(True) for row in torch.stack(asked, 1).tolist()])


@torch.no_grad()
def assert_decoded_anew(model, idx, steps, rule):
    """Recomputed KV: at every step a full forward pass over the text so far. Returns the exit loops."""
    sampled, loops, logits = decoded(model, idx, steps, rule)
    rule, sampler, rows = copy.copy(rule), Sampler(), torch.arange(len(idx))
    for step in range(steps):
        states = torch.stack([x[:, -1] for x in model(idx)])
        at = first_exit(model, rule, states) if step else torch.full((len(idx),), len(states) - 1)
        want = model.logits(states[at, rows])
        assert torch.equal(loops[:, step], at)
        close(logits[:, step], want, 1e-9)
        assert torch.equal(sampled[:, step], sampler(want))
        idx = torch.cat([idx, sampled[:, step:step + 1]], 1)
    return loops[:, 1:].flatten().tolist()


@torch.no_grad()
def one_by_one(model, row, rule, judged_from):
    """(states (T, C), exit loops (T,)) of the tokens `row` (T,) with copied KV, computed one token after the other.
    Those before `judged_from` run all loops."""
    c, out, loops = model.config, [], []
    kept = [[] for _ in range(c.n_layer)]                    # by depth, each token's key and value (2, K, D)
    for t, token in enumerate(row):
        x, exited_at, rope = model.first_state(token.view(1, 1)), None, rope_angles(torch.tensor([t]), c)
        for depth in range(c.n_layer):
            loop, i = divmod(depth, c.n_unique)
            if exited_at is not None:
                kept[depth].append(kept[exited_at * c.n_unique + i][t])
                continue
            layer, attn = model.layers[i], model.layers[i].attn
            h = layer.norm1(x, loop)
            q, k, v = (f(h, loop).view(1, 1, -1, c.head_dim) for f in (attn.q, attn.k, attn.v))
            if c.qk_norm:
                q, k = attn.q_norm(q, loop), attn.k_norm(k, loop)
            kept[depth].append(torch.stack([rotate(k, rope)[0, 0], v[0, 0]]))
            k, v = torch.stack(kept[depth], 2).repeat_interleave(c.n_head // c.n_kv_head, dim=1)      # (H, t + 1, D)
            p = (torch.einsum("hd,htd->ht", rotate(q, rope)[0, 0], k) / c.head_dim**0.5).softmax(-1)
            y = x + attn.o(torch.einsum("ht,htd->hd", p, v).view(1, 1, -1), loop)
            x = y + layer.mlp(layer.norm2(x if c.parallel else y, loop), loop)
            done = i == c.n_unique - 1 and loop < c.n_loop - 1
            if done and t >= judged_from and rule(x[0], loop, model.logits(x[0])):
                exited_at = loop
        out.append(x[0, 0])
        loops.append(c.n_loop - 1 if exited_at is None else exited_at)
    return torch.stack(out), torch.tensor(loops)


def assert_copied(model, idx, steps, rule, rules):
    """Copied KV: decode against `one_by_one`."""
    sampled, loops, logits = decoded(model, idx, steps, rule, "copy")
    sampler, prompt = Sampler(), idx.size(1)
    for step in range(steps):
        assert torch.equal(sampled[:, step], sampler(logits[:, step]))
    for i, of_row in enumerate(rules):
        x, want = one_by_one(model, torch.cat([idx[i], sampled[i, :-1]]), copy.copy(of_row), prompt)
        assert torch.equal(loops[i], want[prompt - 1:])
        close(logits[i], model.logits(x[prompt - 1:]), 1e-9)
    return loops[:, 1:].flatten().tolist()


# ---------------------------------------------------------------------------------------------------------------------
# One token after the other

@pytest.mark.parametrize("n_loop", [1, 2, 3])
@pytest.mark.parametrize("arch", ARCHS)
@each_policy
@torch.no_grad()
def test_without_exits_decoding_is_the_full_model(arch, n_loop, keys):
    model, idx = tiny(arch, n_loop=n_loop, rank=2), tokens(2, 5)
    for rule in (None, Rule(), Rule("max_prob"), Rule("fixed", exit_loop=n_loop - 1)):
        sampled, loops = zip(*decode(model, idx, 5, rule, keys), strict=True)
        whole = idx
        for token, loop in zip(sampled, loops, strict=True):
            assert torch.equal(token, model.logits(model(whole)[-1])[:, -1].argmax(-1)) and loop.eq(n_loop - 1).all()
            whole = torch.cat([whole, token[:, None]], 1)


def test_exact_keys_say_what_the_model_says_computed_anew_at_every_step():
    """200 random models, prompts and rules."""
    found = []
    for seed in range(200):
        model, idx, steps, rule, _ = draw_case(seed, no_rope=[0] if seed % 2 else None)
        found += [(model.config.n_loop, loop) for loop in assert_decoded_anew(model, idx, steps, rule)]
    assert all(found.count(kind) > 40 for kind in ((2, 0), (2, 1), (3, 0), (3, 1), (3, 2)))


def test_copied_kv_equal_one_token_after_the_other():
    found = []
    for seed in range(60):
        model, idx, steps, rule, rules = draw_case(1000 + seed)
        found += [(model.config.n_loop, loop) for loop in assert_copied(model, idx, steps, rule, rules)]
    assert all(found.count(kind) > 10 for kind in ((2, 0), (2, 1), (3, 0), (3, 1), (3, 2)))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("exits", [(True, True), (False, True), (False, False), (True, False)])
def test_all_exit_or_none(rows, exits):
    model, rule = tiny("llama", n_loop=3, rank=2).double(), Table(torch.tensor(exits).expand(rows, 12, 2), 3)
    idx, want = tokens(rows, 4), [*exits, True].index(True)
    assert set(assert_decoded_anew(model, idx, 8, rule)) == {want}
    assert set(assert_copied(model, idx, 8, rule, [rule.row(i) for i in range(rows)])) == {want}


@pytest.mark.parametrize("rows, n_loop", [(1, 3), (3, 3), (1, 4)])
@each_policy
@torch.no_grad()
def test_a_whole_text_is_what_decoding_it_gives(rows, n_loop, keys):
    """`decode` forced to follow the text, against `run_exits` in one pass: long enough that several loops lack KV at a
    time, which several passes recompute."""
    for seed, arch in enumerate(ARCHS):
        model = tiny(arch, n_layer=n_loop, n_loop=n_loop, rank=2 * (seed % 2)).double()
        idx, draw = tokens(rows, 25), torch.Generator().manual_seed(seed)
        exits = torch.rand(rows, 25, n_loop - 1, generator=draw) < 0.5
        exits[:, 0] = False                                 # prompts run all loops
        x, loops = run_exits(model, idx, Table(exits), keys)
        _, exit_loop, logits = decoded(model, idx[:, :1], 25, Table(exits, 0), keys, Sampler(script=idx.roll(-1, 1)))
        assert torch.equal(exit_loop, loops) and loops.unique().tolist() == list(range(n_loop))
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
    exits = [[0, 0], [1, 0], [1, 0], [0, 1], [0, 1], [1, 1], [0, 0], [0, 1]]      # (tokens, loops), the prompt first
    _, loops, _ = decoded(model, tokens(1, 1), 8, Table(torch.tensor([exits]).bool(), 0))
    assert loops.tolist() == [[2, 0, 0, 1, 1, 0, 2, 1]]
    assert calls == [(0, 1), (1, 1), (2, 1), (0, 1), (0, 1), (0, 1), (1, 3), (0, 1), (1, 1), (0, 1),
                     (0, 1), (1, 2), (2, 6), (0, 1), (1, 1)]


def test_copied_kv_skip_loops_once_all_rows_have_exited(monkeypatch):
    model = tiny("llama", n_loop=3)
    calls = blocks_run(model, monkeypatch)
    exits = [[[0, 0], [1, 0], [1, 0], [0, 0]], [[0, 0], [1, 0], [0, 1], [1, 0]]]
    decoded(model, tokens(2, 1), 4, Table(torch.tensor(exits).bool(), 0), "copy")
    assert [loop for loop, _ in calls] == [0, 1, 2, 0, 0, 1, 0, 1, 2]


def at_median(model, name):
    rule = Rule(name, gate=draw_gate(model))
    return replace(rule, threshold=scores(model, rule).median().item())


@pytest.mark.parametrize("name", SCORED)
@each_policy
@torch.no_grad()
def test_a_broken_row_changes_nothing_in_the_others(name, keys):
    """Bit for bit, where one row's states and logits are all NaN; that row never exits early, and has no tokens."""
    model = tiny("llama", n_loop=3, rank=2)
    rule = at_median(model, name)
    model.embed.weight[V - 1] = torch.nan                    # the head is another matrix
    idx = tokens(3, 6) % (V - 1)
    broken = idx.clone()
    broken[1] = V - 1
    a, b = (decoded(model, rows, 12, rule, keys, Sampler(V - 1)) for rows in (idx, broken))
    for t, broken_t in zip(a, b, strict=True):
        assert torch.equal(t[[0, 2]], broken_t[[0, 2]])
    assert b[2][1].isnan().all() and b[0][1].eq(-1).all() and b[1][1].eq(-1).all() and a[1].unique().numel() > 1
    with pytest.raises(UserError, match="not finite"):       # where no other row is left
        next(decode(model, broken[1:2], 12, rule, keys))
    for t, broken_t in zip(run_exits(model, idx, rule, keys), run_exits(model, broken, rule, keys), strict=True):
        assert torch.equal(t[[0, 2]], broken_t[[0, 2]])
    assert run_exits(model, broken, rule, keys)[1][1].eq(2).all()


@pytest.mark.parametrize("name", ["never", "fixed", *SCORED])
@each_policy
def test_a_row_of_a_batch_equals_the_row_alone(name, keys):
    model, idx = tiny("gpt_neox", n_loop=3, rank=2).double(), tokens(3, 6)
    rule = at_median(model, name) if name in SCORED else Rule(name)
    sampled, loops, logits = decoded(model, idx, 10, rule, keys)
    for i in range(3):
        alone = decoded(model, idx[i:i + 1], 10, rule, keys)
        assert torch.equal(alone[0], sampled[i:i + 1]) and torch.equal(alone[1], loops[i:i + 1])
        close(alone[2], logits[i:i + 1], 1e-9)


@each_policy
def test_a_row_that_has_ended_repeats_the_end_and_the_others_go_on(keys, monkeypatch):
    model, eos = tiny("llama", n_loop=2).double(), 7
    rule = at_median(model, "max_prob")
    script = torch.tensor([[7, 4, 4, 4, 4, 4, 4, 4], [1, 2, 7, 3, 3, 3, 3, 3], [1, 2, 3, 4, 5, 7, 6, 7]])
    calls = blocks_run(model, monkeypatch)
    sampled, loops, logits = decoded(model, tokens(3, 4), 8, rule, keys, Sampler(script=script), eos_id=eos)
    assert sampled.tolist() == [[7] * 6, [1, 2, 7, 7, 7, 7], [1, 2, 3, 4, 5, 7]]        # then all have ended
    assert len([loop for loop, _ in calls if loop == 0]) == 6                        # nothing is run after that
    assert loops.eq(-1).tolist() == [[step > end for step in range(6)] for end in (0, 2, 5)]
    for i, end in enumerate((0, 2, 5)):
        alone = decoded(model, tokens(3, 4)[i:i + 1], 8, rule, keys, Sampler(script=script[i:i + 1]), eos_id=eos)
        assert alone[0].tolist() == [script[i, :end + 1].tolist()]
        assert torch.equal(alone[1][0], loops[i, :end + 1])
        close(alone[2][0], logits[i, :end + 1], 1e-9)


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array])
def test_a_row_ends_at_any_of_several_ids_and_repeats_it(kind):
    script = torch.tensor([[1, 7, 4, 4], [9, 2, 7, 3], [1, 2, 3, 9]])
    sampled, loops, _ = decoded(tiny("llama", n_loop=2), tokens(3, 4), 4, Rule(), sampler=Sampler(script=script),
                             eos_id=kind([7, 9]))
    assert sampled.tolist() == [[1, 7, 7, 7], [9, 9, 9, 9], [1, 2, 3, 9]]
    assert loops.tolist() == [[1, 1, -1, -1], [1, -1, -1, -1], [1, 1, 1, 1]]


@pytest.mark.parametrize("given", [{"eos_id": 2.5}, {"eos_id": "7"}, {"eos_id": [1, None]}, {"eos_id": True},
                                   {"keys": "kept"}])
def test_ends_and_keys_of_another_kind_are_refused(given):
    with pytest.raises(UserError, match="must be a token's id|use one of exact, copy"):
        next(decode(tiny("llama", n_loop=2), tokens(1, 4), 4, **given))


@torch.no_grad()
def test_a_text_of_which_the_logits_are_not_finite_is_not_summed_up():
    model = tiny("llama", n_loop=2)
    model.layers[0].mlp.down.weight[0, 0] = torch.inf
    with pytest.raises(UserError, match="not finite"):
        collect_exit_stats(model, [(tokens(2, 6), tokens(2, 6))])


def test_a_row_that_has_ended_runs_no_loops(monkeypatch):
    model, exits = tiny("llama", n_loop=2), torch.tensor([False, True])[:, None, None].expand(2, 8, 1)
    calls, script = blocks_run(model, monkeypatch), torch.tensor([[1, 7, 1, 1], [1, 2, 3, 4]])
    decoded(model, tokens(2, 3), 4, Table(exits, 2), "copy", Sampler(script=script), eos_id=7)
    assert [loop for loop, _ in calls] == [0, 1, 0, 1, 0, 0]         # the prompts, one step with both, two with one


@pytest.mark.parametrize("prompt, asked, want", [(5, 10, 3), (5, 3, 3), (5, 2, 2), (7, 9, 1), (8, 9, 0), (3, 1, 1)])
@each_policy
def test_decoding_stops_when_the_context_is_full(prompt, asked, want, keys, monkeypatch):
    model = tiny("gemma", n_loop=2, n_ctx=8)
    calls = blocks_run(model, monkeypatch)
    assert len(list(decode(model, tokens(2, prompt), asked, Rule("fixed"), keys))) == want
    assert [loop for loop, _ in calls].count(0) == max(1, want)      # no pass for a token that is not asked for


@pytest.mark.parametrize("prompt", [0, 9])
def test_a_prompt_that_is_empty_or_longer_than_the_context_is_named(prompt):
    with pytest.raises(UserError, match=f"a prompt of {prompt} tokens: give 1 .* to 7"):
        next(decode(tiny("gemma", n_loop=2, n_ctx=8), tokens(1, prompt), 4))


# ---------------------------------------------------------------------------------------------------------------------
# Whole texts

@pytest.mark.parametrize("keys", ["exact", "copy"])
@torch.no_grad()
def test_a_text_exits_as_its_tokens_do_one_by_one(keys):
    """Recomputed KV: the states of the plain forward pass, after the first loop that the rule accepts."""
    found = []
    for seed in range(24):
        model, _, _, rule, rules = draw_case(2000 + seed)
        if isinstance(rule, Table):
            rule.at = -1
            rules = [rule.row(i) for i in range(len(rules))]
        idx = torch.randint(V, (len(rules), rule.exits.size(1) if isinstance(rule, Table) else 9))
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
            p.mul_(0.7)                                      # loops that change little agree at times
        sampled = torch.stack([model.logits(x).argmax(-1) for x in model(idx)], -1).tolist()
        want = [[loops.index(loops[-1]) for loops in row] for row in sampled]
        assert oracle_exits(model, idx).tolist() == want
        found += sum(want, [])
    assert all(found.count(loop) > 5 for loop in range(n_loop))


@torch.no_grad()
def test_exit_statistics_are_those_of_the_logits():
    model, pairs = tiny("gemma", n_loop=3, rank=2), pairs_of((3, 7), (3, 7), (1, 7))
    rules = [Rule(name, gate=draw_gate(model)) for name in SCORED]
    stats = collect_exit_stats(model, pairs, rules)
    states = [torch.cat([model(idx)[loop].flatten(0, 1) for idx, _ in pairs]) for loop in range(3)]
    targets = torch.cat([t.flatten() for _, t in pairs])
    logits = [model.logits(x) for x in states]
    assert torch.equal(stats.token, torch.stack([z.argmax(-1) for z in logits]))
    close(stats.ce, torch.stack([F.cross_entropy(z, targets, reduction="none") for z in logits]))
    assert list(stats.scores) == list(SCORED)
    for rule in rules:
        close(stats.scores[rule.name], torch.stack([rule.score(states[i], i, logits[i]) for i in range(2)]))
    assert torch.equal(stats.oracle, torch.cat([oracle_exits(model, idx).flatten() for idx, _ in pairs]))
    loops = torch.arange(49) % 3
    out = stats.exit_at(loops)
    assert torch.equal(out.exit_loop, loops)
    assert out.token.tolist() == [stats.token[loop, n].item() for n, loop in enumerate(loops)]
    assert out.ce.tolist() == [stats.ce[loop, n].item() for n, loop in enumerate(loops)]
    assert collect_exit_stats(model, pairs).scores == {}


@pytest.mark.parametrize("name", SCORED)
def test_a_rule_applied_to_statistics_equals_a_second_run(name):
    model, pairs = tiny("llama", n_loop=3).double(), pairs_of((3, 9), (2, 9))
    rule = at_median(model, name)
    stats = collect_exit_stats(model, pairs, [rule])
    for at in (*scores(model, rule)[::12].tolist(), 0.0, math.inf, stats.scores[name].max().item() * (1 - 1e-9)):
        rule = replace(rule, threshold=at)
        a, b = apply_rule(model, pairs, stats, rule), apply_rule(model, pairs, replace(stats, scores={}), rule)
        assert torch.equal(a.exit_loop, b.exit_loop) and torch.equal(a.token, b.token)
        close(a.ce, b.ce, 1e-9)
        x, loops = zip(*(run_exits(model, idx, rule, "copy") for idx, _ in pairs), strict=True)
        assert not b.ce.requires_grad                        # else it would keep all logits alive
        c, want = apply_rule(model, pairs, stats, rule, "copy"), [model.logits(out).argmax(-1).flatten() for out in x]
        assert torch.equal(c.exit_loop, torch.cat([at.flatten() for at in loops]))
        assert torch.equal(c.token, torch.cat(want))


def test_summary_by_hand():
    token = torch.tensor([[1, 2, 3, 4, 5, 6, 9, 8], [1, 0, 3, 7, 5, 6, 9, 7], [1, 2, 0, 7, 5, 9, 9, 8]])
    stats = ExitStats(token, ce=torch.zeros(3, 8), scores={})
    assert stats.oracle.tolist() == [0, 0, 2, 1, 0, 2, 0, 0]
    loops = torch.tensor([0, 1, 1, 1, 2, 2, 0, 2])
    out = ExitResult(loops, stats.token.gather(0, loops[None])[0], torch.tensor([1.0, 2, 3, 0, 0, 0, 1, 1]))
    got = summarize(out, stats)
    assert got == {"loops": 1 + 9 / 8, "left_at": [2 / 8, 3 / 8, 3 / 8], "agreement": 6 / 8,
                   "perplexity": pytest.approx(math.e), "caught": 3 / 6}
    all_run = summarize(stats.exit_at(torch.full((8,), 2)), stats)
    assert all_run == {"loops": 3, "left_at": [0, 0, 1], "agreement": 1, "perplexity": 1, "caught": 0}
    best = summarize(stats.exit_at(stats.oracle), stats)
    assert (best["agreement"], best["caught"], best["loops"]) == (1, 1, 1 + 5 / 8)
    late = ExitStats(stats.token[-1:] + torch.arange(3)[:, None], stats.ce, {})
    assert summarize(late.exit_at(loops), late)["caught"] == 0   # with nothing to catch


@pytest.mark.parametrize("at_once", [1, 3])
def test_logits_of_a_large_vocabulary_come_in_chunks(at_once, monkeypatch):
    """The number of tokens in a chunk falls with the vocabulary size, which is faked here."""
    model, pairs = tiny("llama", n_loop=3).double(), pairs_of((3, 9), (2, 9))
    rules = [at_median(model, name) for name in SCORED]
    stats = collect_exit_stats(model, pairs, rules)
    exited = [run_exits(model, pairs[0][0], rule, "copy") for rule in rules]
    sizes, logits = [], model.logits
    monkeypatch.setattr(model.config, "vocab_size", 2**25 // at_once if at_once > 1 else 2**26)
    monkeypatch.setattr(model, "logits", lambda x: sizes.append(len(x)) or logits(x))
    again = collect_exit_stats(model, pairs, rules)
    assert max(sizes) == at_once and sum(sizes) == 3 * 45
    assert torch.equal(again.token, stats.token)
    close(again.ce, stats.ce, 1e-12)
    for name in SCORED:
        close(again.scores[name], stats.scores[name], 1e-12)
    for rule, (x, loops) in zip(rules, exited, strict=True):
        sizes.clear()
        a, b = run_exits(model, pairs[0][0], rule, "copy")
        assert torch.equal(loops, b) and torch.equal(x, a)
        assert sizes == ([] if rule.name == "gate" else [at_once] * (2 * 27 // at_once))
    x = torch.randn(2, 5, 32).double()
    assert torch.equal(exits_in_chunks(model, rules[0], x, 0), rules[0](x, 0, logits(x)))


# ---------------------------------------------------------------------------------------------------------------------
# What a threshold guarantees

@pytest.mark.parametrize("n", [1, 2, 7, 60, 400])
@pytest.mark.parametrize("p", [Fraction(1, 50), Fraction(1, 2), Fraction(9, 10)])
def test_the_binomial_distribution_is_exact(n, p):
    for k in sorted({0, 1, n // 50, n // 2, n - 1, n}):
        want = sum(math.comb(n, i) * p**i * (1 - p)**(n - i) for i in range(k + 1))
        assert binomial_cdf(k, n, float(p)) == pytest.approx(float(want), rel=1e-9, abs=1e-300)


def test_few_tokens_show_nothing():
    """Without one disagreement, 0.98^149 is the first power below 0.05."""
    assert shows_agreement(torch.ones(1, 149, dtype=torch.bool), 0.98, 0.95)
    assert not shows_agreement(torch.ones(1, 148, dtype=torch.bool), 0.98, 0.95)
    assert not shows_agreement(torch.ones(4, 37, dtype=torch.bool), 0.98, 0.96)
    assert not shows_agreement(torch.zeros(4, 100, dtype=torch.bool), 0.1, 0.5)


def test_windows_that_differ_count_for_fewer_tokens():
    """Disagreements 0, 0, 5, 0 of 8: their variance is 6.25, independent ones' 8 x 5/32 x 27/32. So 32 tokens with 5 of
    them count as 5.4 with 0.84, taken for 5 with 1, and P(at most 1 of 5) at a half each is 6 / 32 = 0.1875."""
    agree = torch.ones(4, 8, dtype=torch.bool)
    agree[2, :5] = False
    assert shows_agreement(agree, 0.5, 0.812) and not shows_agreement(agree, 0.5, 0.813)
    spread = torch.ones(4, 8, dtype=torch.bool)
    spread[:, 3] = False                                     # fewer than chance would vary: never more than they are
    p = binomial_cdf(4, 32, 0.3)
    assert shows_agreement(spread, 0.7, 1 - p * 1.001) and not shows_agreement(spread, 0.7, 1 - p * 0.999)


def draw_agreements(windows, T, wrong, alike):
    """bool (windows, T): a share `wrong` do not agree; `alike` is the correlation of two tokens of one window."""
    p = torch.full((windows, 1), wrong)
    if alike:
        a, b = (torch.tensor(share * (1 / alike - 1)) for share in (wrong, 1 - wrong))
        p = torch.distributions.Beta(a, b).sample((windows, 1))
    return torch.rand(windows, T) >= p


@pytest.mark.parametrize("alike, naive", [(0.0, 0.0), (0.1, 0.15), (0.5, 0.25)])
def test_a_lower_agreement_seldom_passes(alike, naive):
    """At most one time in twenty, with confidence 0.95; a test that took tokens of a window as independent would let it
    pass much more often. Measured on 400 samples, 5 % of which are 20, with a standard deviation of 4.4."""
    torch.manual_seed(0)
    samples = [draw_agreements(100, 64, 0.103, alike) for _ in range(400)]
    assert sum(shows_agreement(agree, 0.9, 0.95) for agree in samples) <= 20 + 3 * 4.4
    passed = sum(binomial_cdf(int((~agree).sum()), agree.numel(), 1 - 0.9) <= 0.05 for agree in samples)
    assert passed >= naive * 400
    samples = [draw_agreements(100, 64, 0.01, alike) for _ in range(20)]
    assert sum(shows_agreement(agree, 0.9, 0.95) for agree in samples) >= 18         # but not everything is refused


def calibrated(monkeypatch, agreements, grid, keys="exact", agreement=0.9, confidence=0.95):
    """(what `calibrate_threshold` returns, the thresholds it tested); agreements(threshold) is bool (windows, T)."""
    asked, stats = [], ExitStats(torch.zeros(2, 0), torch.zeros(2, 0), {})

    def pretended(model, pairs, given, rule, policy):
        asked.append(rule.threshold)
        assert (rule.name, policy, given) == ("margin", keys, stats)
        agree = agreements(rule.threshold)
        stats.token = torch.zeros(2, agree.numel())
        return ExitResult(None, (~agree).flatten().float(), None)
    monkeypatch.setattr(thresholds, "apply_rule", pretended)
    pairs = [(torch.zeros(n, 8), None) for n in (8, 8, 4)]
    found = calibrate_threshold(None, pairs, stats, Rule("margin"), keys, grid, agreement, confidence)
    return found, asked


def test_calibration_goes_down_until_the_first_failure(monkeypatch):
    good, bad = torch.ones(20, 8, dtype=torch.bool), torch.zeros(20, 8, dtype=torch.bool)
    for failing, want, asked in [({0.3}, 0.5, [0.9, 0.7, 0.5, 0.3]), (set(), 0.1, [0.9, 0.7, 0.5, 0.3, 0.1]),
                                 ({0.9}, None, [0.9]), ({0.7, 0.1}, 0.9, [0.9, 0.7])]:
        for grid in ([0.9, 0.7, 0.5, 0.3, 0.1], [0.5, 0.1, 0.9, 0.3, 0.7]):
            for keys in ("exact", "copy"):
                found = calibrated(monkeypatch, lambda t, bad_at=failing: bad if t in bad_at else good, grid, keys)
                assert found == (want, asked)


def test_calibration_accounts_for_windows(monkeypatch):
    """The same 32 disagreements of 160, in four windows of twenty or anywhere: four windows show less."""
    clustered = torch.ones(20, 8, dtype=torch.bool)
    clustered[::5] = False
    scattered = clustered.flatten()[torch.randperm(160, generator=torch.Generator().manual_seed(0))].view(20, 8)
    assert calibrated(monkeypatch, lambda t: scattered, [0.5], agreement=0.6)[0] == 0.5
    assert calibrated(monkeypatch, lambda t: clustered, [0.5], agreement=0.6)[0] is None


def test_trying_many_thresholds_is_not_paid_for_in_confidence(monkeypatch):
    """One threshold that keeps the agreement and fifteen that do not, each on its own draw. It is likely that some of
    the fifteen would pass; that one is reached and passes has a probability of one in twenty."""
    torch.manual_seed(0)
    wrong, passed = 0, 0
    for _ in range(200):
        draws = {t: draw_agreements(20, 8, 0.001 if t == 16 else 0.103, 0.0) for t in range(1, 17)}
        wrong += calibrated(monkeypatch, draws.get, list(draws))[0] != 16
        passed += any(shows_agreement(draws[t], 0.9, 0.95) for t in range(1, 16))
    assert wrong <= 10 + 3 * 3.1 and passed > 40


# ---------------------------------------------------------------------------------------------------------------------
# The gate

@pytest.fixture(scope="module")
def learnable():
    """A model whose first loops agree with the last for some tokens and not for others, in any context; and texts to
    learn that from."""
    model = tiny("llama", n_loop=3)
    for layer in model.layers:
        for linear in (layer.attn.o, layer.mlp.down):
            linear.weight.data.mul_(0 if linear is layer.attn.o else 1.5)
    return model.requires_grad_(False), pairs_of((8, 32), (8, 32), (8, 32), (8, 32))


def test_a_gate_learns_which_states_may_exit(learnable):
    """Of a state that may exit and one that may not it scores the first higher: chance is a half, at each exit."""
    model, pairs = learnable
    before = {name: p.clone() for name, p in model.named_parameters()}
    gate = train_gate(model.requires_grad_(True), pairs, epochs=60)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert not gate.training and not any(p.requires_grad for p in gate.parameters())
    stats = collect_exit_stats(model, pairs_of((8, 32), seed=9), [Rule("gate", gate=gate)])
    for loop, score in enumerate(stats.scores["gate"]):
        same = stats.token[loop] == stats.token[-1]
        assert 0.1 < same.float().mean() < 0.9
        assert (score[same][:, None] > score[~same]).float().mean() > 0.98
        assert abs(score.mean() - same.float().mean()) < 0.05                # a probability, not only an order
    model.requires_grad_(False)


def test_training_a_gate_twice_gives_the_same(learnable):
    torch.manual_seed(1)
    a = train_gate(*learnable, epochs=5)
    torch.manual_seed(2)
    b = train_gate(*learnable, epochs=5)
    assert all(torch.equal(p, b.state_dict()[name]) for name, p in a.state_dict().items())


def test_few_texts_train_a_gate_too(learnable):
    model, pairs = learnable
    gate = train_gate(model, [(idx[:1, :3], targets[:1, :3]) for idx, targets in pairs[:1]])
    assert gate(torch.randn(4, 32), 1).isfinite().all() and gate.w1.shape == (2, 256, 32)


# ---------------------------------------------------------------------------------------------------------------------
# From the command line

@pytest.fixture(scope="module")
def looped(home, tmp_path_factory):
    """A model of two loops, trained a little at both exits."""
    out = tmp_path_factory.mktemp("looped") / "out"
    run(home, out, "--rank=2", "--exit_loss=aggressive", "--lr=3e-3")
    return out


def prepare(home, out, *more):
    thresholds.main([f"--ckpt={out}", f"--data={home}/train.txt", f"--valid={home}/valid.txt", "--gate_tokens=1000",
                "--tokens=400", "--seq_len=20", "--agreement=0.5", "--device=cpu", *more])


@pytest.fixture(scope="module")
def prepared(home, looped, tmp_path_factory):
    out = shutil.copytree(looped, tmp_path_factory.mktemp("prepared") / "out")
    prepare(home, out)
    return out


@pytest.fixture
def out(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "out")


def test_a_gate_and_thresholds_are_added_to_the_checkpoint(looped, prepared):
    before, after = contents(looped), contents(prepared)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {GATE_FILE, THRESHOLDS_FILE}
    model, found = RecursiveTransformer.load(prepared), json.loads(after[THRESHOLDS_FILE])
    assert list(found) == ["exact"] and (found["exact"]["agreement"], found["exact"]["confidence"]) == (0.5, 0.95)
    assert found["exact"]["dtype"] == "torch.float32"
    calibrated = found["exact"]["thresholds"]
    assert calibrated and all(load_rule(prepared, model, name).threshold == at for name, at in calibrated.items())
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model = model.to(dtype)
        assert len(list(decode(model, torch.ones(1, 3).long(), 4, load_rule(prepared, model, "gate", 0.5)))) == 4


def test_an_interrupted_first_save_gets_its_gate(home, looped, tmp_path):
    """The folder holds .next alone, which the lock's owner finishes first."""
    out = tmp_path / "out"
    shutil.copytree(looped, out / ".next")
    prepare(home, out)
    assert {GATE_FILE, THRESHOLDS_FILE, "config.json"} <= {path.name for path in out.iterdir()}
    assert load_rule(out, RecursiveTransformer.load(out), "gate", 0.5).gate


def test_calibration_and_check_share_no_text_and_are_spread_over_it(home, prepared):
    config = ExitsConfig(str(prepared), data=f"{home}/train.txt", valid=f"{home}/valid.txt", gate_tokens=330,
                               tokens=420, seq_len=20)
    learn, calibration, check = (
        [row.tolist() for idx, targets in pairs for row in torch.cat([idx, targets[:, -1:]], 1)]
        for pairs in read_texts(config, RecursiveTransformer.load(prepared)))
    tokenizer = Tokenizer.load(prepared)
    texts = [load_tokens(f"{home}/{name}.txt", tokenizer, 320) for name in ("train", "valid")]
    there = [[text[i * 20:i * 20 + 21].tolist() for i in range((len(text) - 1) // 20)] for text in texts]
    assert len(learn) == 17 and all(row in there[0] for row in learn)
    at = [[there[1].index(row) for row in rows] for rows in (calibration, check)]
    assert [len(rows) for rows in at] == [10, 10]            # 21 make two halves of 10
    assert not {*at[0]} & {*at[1]} and sorted(at[0] + at[1])[::2] == at[0]
    assert min(at[0]) == 0 and max(at[1]) >= len(there[1]) * 0.85


def test_what_is_printed_is_what_the_rules_then_do(home, out, capsys):
    prepare(home, out)
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[1:]}
    model = RecursiveTransformer.load(out)
    config = ExitsConfig(str(out), f"{home}/train.txt", data=f"{home}/train.txt", valid=f"{home}/valid.txt",
                               gate_tokens=1000, tokens=400, seq_len=20)
    _, *halves = read_texts(config, model)
    for name in read_thresholds(out)["exact"]["thresholds"]:
        got = []
        for pairs in halves:
            rule, stats = load_rule(out, model, name), collect_exit_stats(model, pairs)
            numbers = summarize(apply_rule(model, pairs, stats, rule), stats)
            got += [f"{numbers['loops']:.3f}", f"{numbers['agreement']:.4f}"]
        assert lines[name] == [name, f"{rule.threshold:.4f}", *got, f"{numbers['caught']:.0%}"]


def test_the_gate_is_kept_and_other_keys_add_their_thresholds(home, out):
    before = contents(out)
    prepare(home, out, "--gate_tokens=40", "--keys=copy", "--agreement=0.4", "--tokens=120")
    assert contents(out) | {THRESHOLDS_FILE: b""} == before | {THRESHOLDS_FILE: b""}
    exact, both = json.loads(before[THRESHOLDS_FILE]), read_thresholds(out)
    assert both["exact"] == exact["exact"] and both["copy"]["agreement"] == 0.4
    prepare(home, out, "--agreement=0.4")
    again = read_thresholds(out)
    assert again["copy"] == both["copy"] and again["exact"]["agreement"] == 0.4


def test_a_new_gate_is_trained_and_the_old_thresholds_go(home, out):
    before, found = contents(out), read_thresholds(out)
    (out / THRESHOLDS_FILE).write_text(json.dumps(found | {"copy": found["exact"]}))
    prepare(home, out, "--new_gate", "--gate_tokens=500")
    assert contents(out)[GATE_FILE] != before[GATE_FILE] and list(read_thresholds(out)) == ["exact"]


def test_the_same_call_gives_the_same_gate_and_thresholds(home, out):
    before = contents(out)
    torch.manual_seed(7)
    prepare(home, out, "--new_gate")
    assert contents(out) == before


@pytest.mark.parametrize("more", [["--new_gate"], []])
def test_a_full_disk_leaves_gate_and_thresholds(home, out, more, capsys):
    before = contents(out)
    with files_end_at(60), pytest.raises(UserError, match=r"cannot write .*; what was there before is untouched"):
        prepare(home, out, *more)
    assert contents(out) == before


def test_resuming_ignores_gate_and_thresholds_and_drops_them_with_the_old_weights(home, looped, out, tmp_path):
    straight = shutil.copytree(looped, tmp_path / "straight")
    for folder in (straight, out):
        train.main(["--resume", f"--out={folder}", "--tokens=2816"])
    assert read_log(out) == read_log(straight) and not {GATE_FILE, THRESHOLDS_FILE} & {p.name for p in out.iterdir()}
    assert all(torch.equal(p, weights(straight)[name]) for name, p in weights(out).items())
    with pytest.raises(UserError, match="has no gate"):
        load_rule(out, RecursiveTransformer.load(out), "gate", 0.5)


@pytest.mark.parametrize("given, message", [
    ("--agreement=0", r"--agreement=0.0 must be above 0 and below 1: no sample .*--rule=never"),
    ("--agreement=1", r"--agreement=1.0 must be above 0 and below 1"),
    ("--agreement=1.2", r"--agreement=1.2 must be above 0 and below 1"),
    ("--agreement=nan", r"--agreement=nan must be above 0 and below 1"),
    ("--confidence=1", r"--confidence=1.0 must be above 0 and below 1"),
    ("--gate_tokens=0", "--gate_tokens=0 must be at least 1"),
    ("--tokens=-5", "--tokens=-5 must be at least 1"),
    ("--seq_len=0", "--seq_len=0 must be at least 1"),
    ("--agreement=0.99", r"--tokens=400 are too few: to show --agreement=0.99 with --confidence=0.95 takes at least "
                         r"299 tokens without a disagreement.* use --tokens=598 or more"),
    ("--tokens=39", r"--tokens=39 are 1 windows of 20 tokens, but .*valid.txt has \d+ and 2 are needed: use "
                    r"--tokens=40 to \d+, or more text"),
    ("--tokens=1e6", r"--tokens=1000000 are 50000 windows of 20 tokens, but .*valid.txt has \d+ .* use --tokens=40 to"),
    ("--valid=nowhere.txt", "nowhere.txt does not exist: give text files"),
    ("--data=nowhere.txt", "nowhere.txt does not exist: give text files"),
    ("--data=SHORT", r"\d tokens, need at least 21 \(seq_len \+ 1\); give more text or a smaller seq_len"),
    ("--valid=SHORT", r"\d tokens, need at least 21 \(seq_len \+ 1\); give more text or a smaller seq_len"),
    ("--data=EMPTY", r"EMPTY.txt is empty: there is no text in it"),
    ("--ckpt=nowhere", r"no checkpoint in nowhere: no config.json; give a folder"),
    ("--ckpt=FULL", r"full has 1 loop, so no token can exit before the last: give a model with 2 or more"),
    ("--device=abacus", "--device=abacus cannot be used here"),
    ("--save=nowhere/a.jsonl", "--save=nowhere/a.jsonl cannot be written"), ("--save=.", "cannot be written"),
])
def test_bad_settings_are_refused_and_nothing_is_lost(home, out, tmp_path, given, message):
    (tmp_path / "SHORT.txt").write_text("The cat")
    (tmp_path / "EMPTY.txt").write_text("")
    given = given.replace("FULL", f"{home}/full").replace("=SHORT", f"={tmp_path}/SHORT.txt").replace(
        "=EMPTY", f"={tmp_path}/EMPTY.txt")
    before = contents(out), contents(home / "full")
    with pytest.raises(UserError, match=message):
        prepare(home, out, given)
    assert (contents(out), contents(home / "full")) == before


@pytest.mark.parametrize("name, message", [
    (GATE_FILE, "is not the gate of this model .* python -m evaluation.thresholds --ckpt=.*/out --new_gate"),
    (THRESHOLDS_FILE, "is not readable as thresholds .*; remove it, and calibrate again with "
                      "python -m evaluation.thresholds --ckpt="),
])
def test_damaged_files_are_an_error_before_the_work(home, out, name, message, monkeypatch):
    cut(out / name, 0.5)
    before = contents(out)
    monkeypatch.setattr(thresholds, "collect_exit_stats", pytest.fail)
    with pytest.raises(UserError, match=f"{name} {message}"):
        prepare(home, out)
    assert contents(out) == before


def test_an_agreement_out_of_reach_is_an_error(home, out, capsys):
    """Exits that were never trained: even the 2 % of tokens with the highest scores are too many."""
    model = RecursiveTransformer.load(out)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    kept = {name: (out / name).read_bytes() for name in (GATE_FILE, THRESHOLDS_FILE)}
    model.save(out)
    for name, data in kept.items():
        (out / name).write_bytes(data)
    before = contents(out)
    with pytest.raises(UserError, match="no rule reaches an agreement of 0.98 with --keys=exact, even at the strictest "
                                        ".* lower --agreement, give more --tokens, or train the exits"):
        prepare(home, out, "--agreement=0.98")
    assert contents(out) == before and capsys.readouterr().out.count("  none  ") == len(SCORED)


def test_exits_py_names_the_script():
    done = subprocess.run([sys.executable, ROOT / "exits.py", "--ckpt=out"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: exits.py is not a script: run python -m evaluation.thresholds --ckpt=out\n"
