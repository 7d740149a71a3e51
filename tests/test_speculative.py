"""Speculative decoding: greedy, it is full-depth decoding token for token; sampled, it has the same distribution; and
no loop runs twice for an accepted token."""

import itertools
import json
import math
import random
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from test_model import tiny
from test_sample import LINES, ckpt, pages, prompts, run  # noqa: F401 (fixtures)

import sample
from benchmarks import speculative as benchmark
from convert import load_full, to_recursive
from exits import decode
from lib.cli import UserError
from lib.tokenizer import Tokenizer
from sample import token_probs
from speculative import RaggedCache, accept, speculate

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = [[1, 2, 3], [4] * 9, [7], [50, 5, 6, 11]]


def undecided(arch="llama", later=0.4, **changes):
    """A tiny model whose first exit and last loop often agree and often do not: later loops change the states less, by
    their norms times `later`. Its attention is strong, so that its text depends on more than the last token."""
    model = tiny(arch, **{"vectors": "per_loop", "tie_head": False} | changes)
    with torch.no_grad():
        for layer in model.layers:
            for norm in (layer.norm1, layer.norm2):
                norm.weight[1:] = later * norm.weight[1:] - (1 - later) * (arch == "gemma")  # Gemma stores scale - 1
                if norm.bias is not None:
                    norm.bias[1:] *= later
            for linear in (layer.attn.q, layer.attn.k, layer.attn.v, layer.attn.o):
                linear.weight *= 6
    return model


def plain(model, prompt, n, **options):
    return [token.item() for token, _ in decode(model, torch.tensor([prompt]), n, **options)]


def joined(cycles, rows):
    """Each row's text."""
    cycles = list(cycles)
    return [sum((new[i] for new in cycles), []) for i in range(rows)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("arch, n_loop, rank, kv", [
    ("llama", 2, 0, "own"), ("gemma", 2, 3, "own"), ("llama", 3, 3, "own"), ("gpt_neox", 3, 0, "own"),
    ("llama", 2, 3, "first_loop"), ("gemma", 3, 0, "first_loop")])
def test_greedy_text_is_that_of_full_depth_alone_and_in_a_batch(arch, n_loop, rank, kv, dtype):
    model, kinds = undecided(arch, n_loop=n_loop, rank=rank, kv=kv).to(dtype), Counter()
    want = [plain(model, prompt, 24) for prompt in PROMPTS]
    assert len({*want[0], *want[1]}) > 8                                  # not one token again and again
    for gamma in range(1, 7):
        draft_loop = (gamma == 3) * (n_loop - 2)
        for prompt, text in list(zip(PROMPTS, want, strict=True))[:2]:
            cycles = [new for new, in speculate(model, [prompt], 24, gamma, draft_loop)]
            assert sum(cycles, []) == text, (gamma, prompt)
            kinds.update({1: "none", gamma + 1: "all"}.get(len(new), "some") for new in cycles[1:-1])
        assert joined(speculate(model, PROMPTS, 24, gamma, draft_loop), 4) == want, gamma
    assert all(kinds[kind] > 15 for kind in ("none", "some", "all")), kinds


def test_greedy_text_of_the_tied_model_is_that_of_full_depth():
    model = tiny("llama", n_loop=2).double()
    want = [plain(model, prompt, 24) for prompt in PROMPTS]
    assert joined(speculate(model, PROMPTS, 24, 3), 4) == want
    assert joined(speculate(model, PROMPTS[:1], 24, 3), 1) == want[:1]


def test_greedy_text_of_the_shipped_donor_is_that_of_full_depth():
    model = to_recursive(load_full(ROOT / "assets/donor", torch.float32), n_loop=2, init="stepwise")
    draw = random.Random(0)
    texts = [[draw.randrange(4096) for _ in range(12)] for _ in range(3)]
    want = [plain(model, text, 12) for text in texts]
    assert [joined(speculate(model, [text], 12, 3), 1)[0] for text in texts] == want
    assert joined(speculate(model, texts, 12, 3), 3) == want


def test_a_text_ends_in_the_middle_of_an_accepted_draft():
    """With an end token, with several, by its number of tokens and by the context: exactly as without a draft."""
    model = undecided(n_loop=2).double()

    def check(texts, n, **options):
        want = [plain(model, text, n, **options) for text in texts]
        assert joined(speculate(model, texts, n, 4, **options), len(texts)) == want, (n, options)
        assert [joined(speculate(model, [text], n, 4, **options), 1)[0] for text in texts[:2]] == want[:2]
        return [len(text) for text in want]
    cycles = [new for prompt in PROMPTS[:2] for new, in speculate(model, [prompt], 30, 4)]
    inside = sorted({token for new in cycles for token in new[:-2]})      # drafts with an accepted draft behind them
    assert len(inside) > 4
    for eos_id in [*inside[:5], tuple(inside[:2])]:
        assert min(check(PROMPTS, 30, eos_id=eos_id)) < 30
    for n in (0, 1, 2, 3, 5, 8, 13):
        assert check(PROMPTS, n) == 4 * [n]
    assert model.config.n_ctx == 64
    assert check([[i % 7 for i in range(n)] for n in (60, 57, 63, 64, 1)], 20) == [4, 7, 1, 0, 20]


def test_the_cache_of_one_text_is_no_longer_than_it_needs(monkeypatch):
    """Near the end of a text fewer tokens are drafted: none runs at a position that its text does not have."""
    model, ran = undecided(n_loop=2), []
    block = model.block
    monkeypatch.setattr(model, "block", lambda x, loop, cache: ran.append(cache.lengths[0]) or block(x, loop, cache))
    for n in range(1, 9):
        ran.clear()
        list(speculate(model, [[1, 2, 3]], n, 6))
        assert max(ran) <= 3 + n - 1


@pytest.mark.parametrize("n_loop, draft_loop", [(2, 0), (3, 0), (3, 1)])
def test_a_cycle_runs_each_loop_once(monkeypatch, n_loop, draft_loop):
    """The drafting loops token by token, later loops in one pass of all drafts, and the head gamma times and once."""
    model, ran = undecided(n_loop=n_loop), []
    block, logits = model.block, model.logits
    monkeypatch.setattr(model, "block", lambda x, loop, cache: ran.append((loop, x.size(1))) or block(x, loop, cache))
    monkeypatch.setattr(model, "logits", lambda x: ran.append(("head", x.numel() // 32)) or logits(x))
    gamma, cycles = 3, speculate(model, [[1, 2, 3]], 30, 3, draft_loop)
    next(cycles)
    assert ran == [(loop, 3) for loop in range(n_loop)] + [("head", 1)]
    ran.clear()
    next(cycles), next(cycles)
    drafting = [(loop, 1) for loop in range(draft_loop + 1)]
    verifying = [(loop, gamma + 1) for loop in range(draft_loop + 1, n_loop)] + [("head", gamma + 1)]
    assert ran == 2 * (gamma * [*drafting, ("head", 1)] + drafting + verifying)


def test_rows_of_a_batch_read_no_position_beyond_their_own():
    """What is not yet written, padding and rejected drafts reach no row: a position may hold anything before it is
    written."""
    model = undecided(n_loop=2).double()
    want = [plain(model, prompt, 20) for prompt in PROMPTS]
    real, caches = RaggedCache.__init__, []

    def poisoned(self, *args):
        real(self, *args)
        self.k.fill_(1e4), self.v.fill_(1e4)
        caches.append(self)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RaggedCache, "__init__", poisoned)
        assert joined(speculate(model, PROMPTS, 20, 3), 4) == want
    assert len(caches) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Sampling

SETTINGS = {"plain": (1.0, 0, 1.0), "cut": (0.7, 4, 0.95)}                # temperature, top_k, top_p


def tiny_vocabulary():
    model = undecided(n_loop=2, vocab_size=5, later=1).double()
    with torch.no_grad():
        model.head.weight *= 0.8
    return model


@torch.no_grad()
def exact_triples(model, prompt, settings):
    """The probability of each three tokens after the prompt, by the full model."""
    probs = {}
    for triple in itertools.product(range(5), repeat=3):
        logits = model.logits(model(torch.tensor([[*prompt, *triple]]))[-1])[0, len(prompt) - 1:-1]
        probs[triple] = token_probs(logits, *settings)[range(3), triple].prod().item()
    return probs


def chi_square(model, settings, rows, alone=False):
    """(statistic, degrees of freedom) of sampled triples against the exact probabilities."""
    prompt, draw = [1, 3], torch.Generator().manual_seed(5)
    probs, exact = partial(cut_probs, settings), exact_triples(model, prompt, settings)
    if alone:
        texts = [joined(speculate(model, [prompt], 3, 2, probs=probs, draw=draw), 1)[0] for _ in range(rows)]
    else:
        texts = joined(speculate(model, rows * [prompt], 3, 2, probs=probs, draw=draw), rows)
    found = Counter(map(tuple, texts))
    assert all(exact[triple] > 0 for triple in found)                     # nothing that top-k or top-p cuts away
    common = [triple for triple, p in exact.items() if p * rows >= 10]    # chi-square needs some counts in each cell
    common.remove(min(common, key=exact.get))                             # which joins the rest, that this has some too
    expected = [exact[triple] * rows for triple in common]
    counts = [found[triple] for triple in common]
    cells = [*zip(counts, expected, strict=True), (rows - sum(counts), rows - sum(expected))]
    return sum((n - e) ** 2 / e for n, e in cells), len(common)


def cut_probs(settings, logits):
    return token_probs(logits, *settings)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_samples_have_the_distribution_of_the_full_model(settings):
    statistic, freedom = chi_square(tiny_vocabulary(), settings, 10_000)
    assert freedom > 15 and statistic < freedom + 4 * math.sqrt(2 * freedom)      # mean and deviations of chi-square


def test_samples_of_one_text_have_the_distribution_too():
    statistic, freedom = chi_square(tiny_vocabulary(), SETTINGS["plain"], 800, alone=True)
    assert freedom > 15 and statistic < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("bug", ["always accept", "never accept", "replace by a sample of p"])
def test_the_distribution_test_sees_a_wrong_rule(monkeypatch, bug):
    model, rand = tiny_vocabulary(), torch.rand
    if bug == "replace by a sample of p":
        monkeypatch.setattr(torch.Tensor, "clamp", lambda x, min=None: torch.full_like(x, 0.0))
    else:
        monkeypatch.setattr(torch, "rand", lambda *size, **options: rand(*size, **options) * 0 + (bug[0] == "n") * 1e9)
    statistic, freedom = chi_square(model, SETTINGS["plain"], 10_000)
    assert statistic > freedom + 15 * math.sqrt(2 * freedom)


def test_a_draft_rejected_by_rounding_alone_is_replaced_by_a_probable_token(monkeypatch):
    """Where p = q nothing is left of p - q to sample from: then p is."""
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.ones(*size))
    p = torch.tensor([[0.0, 0.5, 0.5], [0.0, 1.0, 0.0]])
    accepted = accept(torch.zeros(1, 2, 3), torch.tensor([[1]]), [p[:1]], lambda logits: p, None)
    assert accepted in ([[1]], [[2]])


def test_drafts_after_logits_that_are_not_finite_are_not_accepted():
    """The argmax of NaN is 0, for draft and full model alike."""
    logits = torch.zeros(2, 3, 4)
    logits[:, :, 2], logits[1] = 1.0, torch.nan
    assert accept(logits, torch.tensor([[2, 0], [0, 0]]), [], None, None) == [[2, 2], [-1]]

    def probs(logits):
        return torch.eye(4)[[0] * len(logits)]               # finite whatever the logits are
    assert accept(logits[1:], torch.tensor([[0, 0]]), [probs([0])] * 2, probs, None) == [[-1]]


# ---------------------------------------------------------------------------------------------------------------------
# Errors

@pytest.mark.parametrize("n_loop, texts, options, says", [
    (1, [[1]], {}, "the model has 1 loop.*2 loops or more"),
    (2, [[1]], {"gamma": 0}, "gamma=0.*give 1 or more"),
    (2, [[1]], {"draft_loop": 1}, "draft_loop=1, but with 2 loops.*the loops 0 to 0"),
    (3, [[1]], {"draft_loop": -1}, "draft_loop=-1, but with 3 loops.*the loops 0 to 1"),
    (2, [], {}, "prompts of"), (2, [[1], []], {}, r"prompts of \[1, 0\] tokens"), (2, [[1] * 65], {}, "to 63 tokens")])
def test_what_cannot_be_decoded_is_refused(n_loop, texts, options, says):
    with pytest.raises(UserError, match=says):
        next(speculate(tiny("llama", n_loop=n_loop), texts, 5, **options))


@pytest.mark.parametrize("probs", [None, partial(cut_probs, SETTINGS["cut"])])
def test_a_text_whose_logits_are_not_finite_ends_and_harms_no_other(probs):
    model = undecided(n_loop=2).double()
    good = joined(speculate(model, [[1, 2], [4]], 20, 3), 2)
    bad = next(t for t in range(53) if t not in {1, 2, 4, *sum(good, [])})
    with torch.no_grad():
        model.embed.weight[bad] = torch.nan
    texts = joined(speculate(model, [[1, 2], [bad, 3], [4]], 20, 3, probs=probs), 3)
    assert texts[1] == [-1] and (probs or [texts[0], texts[2]] == good)
    with pytest.raises(UserError, match="not finite"):
        list(speculate(model, [[bad, 3]], 20, 3, probs=probs))
    with torch.no_grad():
        model.embed.weight[bad], model.embed.weight[good[0][5]] = 0.1, torch.nan   # fails at the seventh token
    cycles, found = speculate(model, [[1, 2]], 20, 3), []
    with pytest.raises(UserError, match="not finite"):
        for new, in cycles:
            found += new
    assert 0 < len(found) <= 6 and found == good[0][:len(found)]          # a draft's NaN may fail those before it


# ---------------------------------------------------------------------------------------------------------------------
# sample.py and the benchmark

def test_sample_writes_the_same_text(ckpt, capsys, prompts):  # noqa: F811
    flags = [f"--ckpt={ckpt}", "--temperature=0", "--max_new_tokens=15"]
    want = [run(capsys, *flags, f"--prompt={line}") for line in LINES]
    assert [run(capsys, *flags, f"--prompt={line}", "--speculative=3") for line in LINES] == want
    found = pages(run(capsys, *flags, prompts, "--speculative=3", "--slots=4"))
    assert list(found.values()) == [text + "\n" for text in want]
    many = run(capsys, *flags, "--prompt=dog", "--speculative=2", "--samples=3")
    assert list(pages(many).values()) == 3 * [want[1] + "\n"]


def test_sample_draws_by_its_seed(ckpt, capsys, prompts):  # noqa: F811
    for flags in (["--prompt=dog"], [prompts, "--slots=4"]):
        flags = [f"--ckpt={ckpt}", "--max_new_tokens=12", "--speculative=2", *flags]
        texts = [run(capsys, *flags, f"--seed={seed}") for seed in (1, 1, 2)]
        assert texts[0] == texts[1] != texts[2]


def test_sample_marks_texts_that_fail(ckpt, capsys, prompts, monkeypatch):  # noqa: F811
    def fake(model, texts, *args, **options):
        yield [[7]] * len(texts)
        yield [[-1]] + [[8, 9]] * (len(texts) - 1)
        if len(texts) == 1:
            raise UserError("all are bad")
    monkeypatch.setattr(sample, "speculate", fake)
    with pytest.raises(UserError, match="3 of 6 prompts failed"):
        sample.main([f"--ckpt={ckpt}", prompts, "--speculative=3", "--slots=2"])
    status = [page.rstrip().splitlines()[-1] for page in pages(capsys.readouterr().out).values()]
    assert [line.startswith("(failed: the logits are not finite") for line in status] == 3 * [True, False]


def test_sample_passes_on_what_ends_a_text(ckpt, capsys, prompts, monkeypatch):  # noqa: F811
    asked = []

    def fake(model, texts, *numbers, eos_id, **options):
        asked.append((len(texts), *numbers, set(eos_id)))
        yield [[7]] * len(texts)
    monkeypatch.setattr(sample, "speculate", fake)
    for prompt in ("--prompt=dog", prompts):
        run(capsys, f"--ckpt={ckpt}", prompt, "--speculative=3", "--max_new_tokens=9")
    ends = set(Tokenizer.load(ckpt).eos_ids)
    assert ends and asked == [(1, 9, 3, ends), (6, 9, 3, ends)]


@pytest.mark.parametrize("flags, says", [
    ("--speculative=-1", "--speculative=-1 must be 0 or more"),
    ("--speculative=2 --show_exits", "--speculative=2 runs all loops .* drop --rule and --show_exits|drop it"),
    ("--speculative=2 --rule=max_prob --threshold=0.5", "runs all loops for each token"),
    ("--speculative=2 --ckpt=assets/donor", "the model has 1 loop.*drop --speculative")])
def test_sample_refuses_what_makes_no_sense(ckpt, flags, says):  # noqa: F811
    with pytest.raises(UserError, match=says):
        sample.main([f"--ckpt={ckpt}", *flags.split()])


def test_the_benchmark_counts_and_compares(ckpt, capsys, tmp_path):  # noqa: F811
    (tmp_path / "text.txt").write_text("the cat sat on the mat and the dog ran away. " * 20)
    flags = [f"--ckpt={ckpt}", f"--text={tmp_path}/text.txt", "--prompts=2", "--rows=2", "--prompt_len=4",
             "--new_tokens=20", "--gammas=1,3", "--device=cpu"]
    benchmark.main(flags)
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(r["gamma"], r["equal_texts"]) for r in line["rows"]] == [(1, 4), (3, 4)]
    for r in line["rows"]:
        assert len(r["speedup_of_prompts"]) == 2
        assert 0 <= r["acceptance"] <= 1 and 1 <= r["tokens_per_cycle"] <= r["gamma"] + 1
        assert r["speedup"] > 0 and r["formula"] > 0 and r["formula_free"] > 0
    for flag, says in (("--gammas=0", "positive"), ("--draft_loop=2", "draft_loop=1, but"), ("--rows=0", "positive"),
                       ("--new_tokens=45", "context is 48"), ("--prompt_len=3000", "context|too few")):
        with pytest.raises(UserError, match=says):
            benchmark.main([*flags, flag])


def test_the_benchmark_sees_a_text_that_differs(ckpt, capsys, monkeypatch, tmp_path):  # noqa: F811
    (tmp_path / "text.txt").write_text("the cat sat on the mat and the dog ran away. " * 20)
    real = benchmark.speculate

    def wrong(*args):
        for new in real(*args):
            yield [[token + 1 for token in row] if row is new[0] else row for row in new]
    monkeypatch.setattr(benchmark, "speculate", wrong)
    benchmark.main([f"--ckpt={ckpt}", f"--text={tmp_path}/text.txt", "--prompts=2", "--rows=3", "--prompt_len=4",
                    "--new_tokens=6", "--gammas=1", "--device=cpu"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"][0]["equal_texts"] == 4


def test_the_formula_of_the_benchmark():
    clock = benchmark.Clock(torch.device("cpu"))
    clock.seconds = {"draft": [2.0], "later 1": [4.0], "later 3": [5.0], "head 1": [1.0], "head 3": [1.5]}
    real, free = benchmark.formula_speedup(clock, 2, 0.5)
    assert real == pytest.approx(1.75 * 7 / (3 * 2 + 2 + 5 + 1.5)) and free == pytest.approx(1.75 * 7 / (3 * 2 + 2 + 5))
    # after the first cycle of one token: 2 of 3 drafts accepted, all, none; the last had no room for its four tokens
    assert benchmark.count_accepted([[[1]], [[2, 3, 4]], [[5, 6, 7, 8]], [[9]], [[10, 11]]], 3, 12) == [2, 3, 0]
    clock.seconds |= {"plain": [4.0, 6.0], "gamma 3": [2.0, 3.0], "later 4": [5.0], "head 4": [1.0]}
    got = benchmark.summarize(clock, 3, [2, 3, 0])
    assert got["acceptance"] == 5 / 7 and got["tokens_per_cycle"] == pytest.approx(1 + 5 / 3) and got["speedup"] == 2
