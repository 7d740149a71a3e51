"""Sampling: token probabilities, when a text stops, and that only whole characters are printed."""

import io
import json
import re
import shutil
import sys

import pytest
import torch
from test_engine import NothingWaits

import exits
import sample
from exits import Gate, Rule, decode
from lib.cli import UserError
from lib.folders import THRESHOLDS_FILE
from lib.tokenizer import Tokenizer, train_tokenizer
from model import Config, RecursiveTransformer

TEXT = ["the cat sat on the mat and the dog – naïve 日本 🙂 – ran away. " * 40]


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample") / "ckpt"
    torch.manual_seed(0)
    config = Config(vocab_size=300, n_layer=4, n_loop=2, rank=2, n_embd=16, n_head=2, head_dim=8, n_hidden=32, n_ctx=48)
    model = RecursiveTransformer(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model.save(folder)
    train_tokenizer(TEXT, 300, folder)
    return folder


def run(capsys, *flags):
    sample.main(list(flags))
    return capsys.readouterr().out


def test_token_probs_temperature_top_k_top_p():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    torch.testing.assert_close(sample.token_probs(logits, 0.5, 0, 1.0), (logits / 0.5).softmax(-1))
    assert sample.token_probs(logits, 0, 0, 1.0).tolist() == [[1, 0, 0, 0]]
    top2 = sample.token_probs(logits, 1.0, 2, 1.0)
    torch.testing.assert_close(top2[0, :2], logits[0, :2].softmax(-1))
    assert (top2[0, 2:] == 0).all()
    p = logits.softmax(-1)[0]
    just_over_first = sample.token_probs(logits, 1.0, 0, float(p[0]) + 0.01)  # the first alone falls short of it
    torch.testing.assert_close(just_over_first[0, :2], p[:2] / p[:2].sum())
    assert (just_over_first[0, 2:] == 0).all()
    assert sample.token_probs(logits.flip(-1), 1.0, 0, 0.1).argmax() == 3  # the most probable one is kept, at any index


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tiny", [1e-8, 1e-38, 1e-45, 1e-300, 5e-324])
def test_tiny_temperature_and_top_p_are_greedy(tiny, dtype):
    logits = torch.tensor([[2.0, 1.0, 40.0, 39.0], [-5.0, -4.0, -3.0, -900.0]], dtype=dtype)
    for probs in (sample.token_probs(logits, tiny, 0, 1.0), sample.token_probs(logits, 1.0, 0, tiny),
                  sample.token_probs(logits, tiny, 3, tiny)):
        assert probs.tolist() == [[0, 0, 1, 0], [0, 0, 1, 0]]


def test_generate_greedy_equals_full_forward_at_each_step(ckpt):
    model = RecursiveTransformer.load(ckpt)
    idx = torch.randint(0, 300, (2, 5))
    got = torch.stack([token for token, _ in sample.generate(model, idx, 10, temperature=0)], dim=1)
    for _ in range(10):
        idx = torch.cat([idx, model.logits(model(idx)[-1])[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(got, idx[:, 5:])


def test_same_seed_same_text_and_other_seed_other_text(ckpt, capsys):
    texts = [run(capsys, f"--ckpt={ckpt}", "--prompt=the cat", "--max_new_tokens=20", f"--seed={s}") for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("the cat") and texts[0].endswith("(20 new tokens)\n")


def test_the_model_runs_in_the_dtype_asked_for(ckpt, capsys, monkeypatch):
    """One text and, by the engine, several: in fp32 on CPUs unless bfloat16 is asked for."""
    dtypes, real = [], RecursiveTransformer.logits

    def logits(model, x):
        dtypes.append(x.dtype)
        return real(model, x)
    monkeypatch.setattr(RecursiveTransformer, "logits", logits)
    for dtype in ("auto", "float32", "bfloat16"):
        for many in ("--samples=1", "--samples=3"):
            dtypes.clear()
            sample.main([f"--ckpt={ckpt}", "--prompt=the cat", "--max_new_tokens=4", many, f"--dtype={dtype}"])
            want = "bfloat16" if dtype == "bfloat16" else "float32"
            assert set(dtypes) == {getattr(torch, want)} and f"on cpu in {want}" in capsys.readouterr().err


def scripted(monkeypatch, *tokens):
    """Force the model to generate `tokens`, one after the other, and then only "!"."""
    script = iter(tokens)

    def one_hot(logits, *_):
        return torch.eye(300)[[next(script, 0)] * len(logits)]
    monkeypatch.setattr(sample, "token_probs", one_hot)


@pytest.mark.parametrize("samples", [1, 2])
def test_stops_at_the_context_limit_and_says_so(ckpt, capsys, monkeypatch, samples):
    scripted(monkeypatch)
    out = run(capsys, f"--ckpt={ckpt}", "--prompt=the cat", f"--samples={samples}")
    assert out.count("(the context of 48 tokens is full)\n") == samples
    assert out.count("!") == samples * (48 - len(Tokenizer.load(ckpt).encode("the cat")))


@pytest.mark.parametrize("samples", [1, 2])
def test_stops_at_end_of_text_and_says_so(ckpt, capsys, monkeypatch, samples):
    cat, eos = 99, 299  # "c", end of text
    scripted(monkeypatch, cat, eos, cat)
    out = run(capsys, f"--ckpt={ckpt}", "--prompt=", f"--samples={samples}")
    assert out.count("(end of text)") == samples
    assert "<|endoftext|>" not in out


@pytest.mark.parametrize("samples", [1, 2])
def test_any_of_several_ids_ends_a_text(ckpt, capsys, monkeypatch, samples, tmp_path):
    folder = shutil.copytree(ckpt, tmp_path / "ckpt")
    (folder / "generation_config.json").write_text('{"eos_token_id": [299, 280]}')
    [letter] = Tokenizer.load(ckpt).encode("c")
    scripted(monkeypatch, letter, 280, letter)
    out = run(capsys, f"--ckpt={folder}", "--prompt=the cat", f"--samples={samples}")
    assert out.count("(end of text)") == samples and out.count("the catc\n") == samples


@pytest.mark.parametrize("more", [[], ["--samples=2"]])
def test_logits_that_are_not_finite_are_an_error(ckpt, capsys, monkeypatch, more):
    """As with numbers too large for the dtype: damaged weights are refused when they are loaded."""
    model = RecursiveTransformer.load(ckpt)
    model.norm.weight.data[3] = torch.nan
    monkeypatch.setattr(sample, "load_any", lambda *_: model)
    with pytest.raises(UserError, match="the logits are not finite|1 of 1 prompts failed"):
        run(capsys, f"--ckpt={ckpt}", *more)
    assert capsys.readouterr().out.count("failed: the logits are not finite") == len(more) * 2


def test_streams_whole_characters_only(ckpt, capsys, monkeypatch):
    """Every print is valid text, although the emoji takes four tokens."""
    tokens = Tokenizer.load(ckpt)
    ids = tokens.encode("日🙂é")
    assert len(ids) > 3
    pieces = []
    monkeypatch.setattr("builtins.print", lambda *a, **k: pieces.extend(a))
    assert sample.write([(i, 0) for i in ids], tokens, []) is False
    assert "".join(pieces) == "日🙂é" and not any("�" in p for p in pieces)


def test_batch_rows_differ_and_file_prompt(ckpt, capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text("the dog", encoding="utf-8")
    prompt = f"--prompt_file={tmp_path / 'prompt.txt'}"
    out = run(capsys, f"--ckpt={ckpt}", prompt, "--samples=3", "--max_new_tokens=12")
    texts = [part.split("\n", 1)[1] for part in out.split("--- sample ")[1:]]
    assert len(set(texts)) == 3 and all(t.startswith("the dog") for t in texts)


@pytest.mark.parametrize("flag", ["prompts", "prompt_file"])
def test_how_an_editor_saves_a_prompt_changes_nothing(ckpt, capsys, tmp_path, flag):
    outs = []
    for content in (b"the dog\nthe cat\n", b"\xef\xbb\xbfthe dog\r\nthe cat\r\n"):
        (tmp_path / "p.txt").write_bytes(content)
        outs.append(run(capsys, f"--ckpt={ckpt}", f"--{flag}={tmp_path / 'p.txt'}", "--temperature=0"))
    assert outs[0] == outs[1] and "\ufeff" not in outs[0]


def test_control_tokens_of_a_prompt_are_themselves_or_text(ckpt, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(sample, "generate", lambda model, idx, *_: asked.append(idx[0].tolist()) or iter(()))
    for flag in ("--special", "--special=False"):
        run(capsys, f"--ckpt={ckpt}", "--prompt=<|endoftext|>a", flag)
    assert asked[0][0] == 299 and len(asked[0]) == 2 and 299 not in asked[1]
    assert Tokenizer.load(ckpt).decode(asked[1]) == "<|endoftext|>a"


@pytest.mark.parametrize("flags, says", [
    (["--keys=copy"], "--keys=copy is about tokens that exit early"),
    (["--keys=copy", "--rule=never", "--show_exits"], "give a --rule as well"),
    (["--temperature=0", "--top_p=0.9"], "--temperature=0 is greedy"),
    (["--temperature=0", "--top_k=5"], "--temperature=0 is greedy"),
    (["--prompt=caf\udce9"], "has bytes that are not UTF-8"),
    (["--temperature=nan"], "must be 0 or more"), (["--top_p=nan"], "above 0"),
    (["--prompt=" + "the cat " * 60], "the model's context is 48"), (["--temperature=-1"], "must be 0 or more"),
    (["--top_p=0"], "above 0"), (["--samples=0"], "at least 1"), (["--prompt_file=missing.txt"], "cannot read"),
    (["--ckpt=nowhere"], "does not exist"), (["--slots=0"], "at least 1")])
def test_bad_input(ckpt, flags, says):
    with pytest.raises(UserError, match=says):
        sample.main([f"--ckpt={ckpt}", *flags])


def test_tokenizer_of_another_model_is_refused(ckpt, tmp_path):
    model = RecursiveTransformer.load(ckpt)
    model.config.vocab_size = 200
    model.embed.weight.data = model.embed.weight.data[:200]
    model.save(tmp_path / "small")
    for name in ("tokenizer.tiktoken", "tokenizer_config.json"):
        (tmp_path / "small" / name).write_bytes((ckpt / name).read_bytes())
    with pytest.raises(UserError, match="vocabulary is 200"):
        sample.main([f"--ckpt={tmp_path / 'small'}"])
    assert json.loads((tmp_path / "small" / "config.json").read_text())["vocab_size"] == 200


def test_a_continuation_keeps_the_space_that_llama_decoders_strip(capsys):
    class Llama:
        eos_ids, bos_id, control = (), None, {}

        def decode(self, ids):
            return "".join([" man", " looked"][i] for i in ids).removeprefix(" ")
    sample.write([(1, 0)], Llama(), [0])
    assert capsys.readouterr().out == " looked"


# ---------------------------------------------------------------------------------------------------------------------
# Early exits

@pytest.fixture
def calibrated(ckpt, tmp_path):
    """A copy with a gate, and its threshold for exact keys."""
    folder = shutil.copytree(ckpt, tmp_path / "calibrated")
    torch.manual_seed(1)
    gate = Gate(1, 16, hidden=8)
    torch.nn.init.normal_(gate.w2)
    gate.save(folder)
    (folder / THRESHOLDS_FILE).write_text(json.dumps({"exact": {"agreement": 0.9, "thresholds": {"gate": 0.5}}}))
    return folder


@pytest.fixture
def sampled(monkeypatch):
    """(tokens, loops) of each text of the last run, up to the token that ends it."""
    sampled, generate, engine = [], sample.generate, sample.Engine

    def recorded(*args):
        sampled[:] = [([], [])]
        for step in generate(*args):
            for found, each in zip(sampled[0], step, strict=True):
                found.append(each.item())
            yield step

    class Recorded(engine):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            sampled.clear()

        def add(self, *args):
            request = super().add(*args)
            sampled.append((request.tokens, request.loops))
            return request
    monkeypatch.setattr(sample, "generate", recorded)
    monkeypatch.setattr(sample, "Engine", Recorded)
    return sampled


def loops_of(sampled):
    """The exit loop of each token, counted from 1."""
    return [loop + 1 for _, loops in sampled for loop in loops]


def assert_legend(line, loops, n_loop=2):
    counts = [loops.count(i + 1) for i in range(n_loop)]
    assert re.findall(r"(\d+) \((\d+)%\)", line) == [(f"{n}", f"{n / len(loops) * 100:.0f}") for n in counts]
    assert line.endswith(f"mean depth {sum(loops) / len(loops):.2f} of {n_loop}")


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("flags", [
    "--rule=max_prob --threshold=0.08", "--rule=gate --samples=3", "--rule=margin --threshold=0.02 --keys=copy",
    "--rule=entropy --threshold=0.12 --keys=copy --samples=2", "--rule=never", "--rule=fixed --samples=2"])
def test_show_exits_changes_no_text_and_its_legend_counts_the_tokens(calibrated, capsys, monkeypatch, sampled, flags,
                                                                        terminal):
    flags = [f"--ckpt={calibrated}", "--prompt=the cat", "--max_new_tokens=25", "--seed=3", *flags.split()]
    monkeypatch.setattr(sample, "use_colour", lambda _: terminal)
    plain = run(capsys, *flags)
    assert not re.search("[₀-₉]|\033\\[", plain)
    text, legend, rest = run(capsys, *flags, "--show_exits").rpartition("exited after")
    loops = loops_of(sampled)
    assert set(loops) == ({2} if "--rule=never" in flags else {1, 2})
    assert re.sub("\033\\[\\d+m" if terminal else "[₁₂]", "", text) == plain != text
    marks = re.findall("\033\\[(3[23])m" if terminal else "([₁₂])", text)
    assert set(marks) <= ({"32", "33"} if terminal else {"₁", "₂"}) and 10 < len(marks) <= len(loops)
    assert ("₁" in legend + rest) != terminal
    assert_legend(re.sub("\033\\[\\d+m", "", legend + rest).rstrip("\n"), loops)


@pytest.mark.parametrize("terminal", [False, True])
def test_every_piece_is_marked_by_the_loop_of_its_token_and_characters_stay_whole(ckpt, capsys, monkeypatch, terminal):
    tokens = Tokenizer.load(ckpt)
    ids = tokens.encode("the 🙂 cat 日本 – naïve")
    assert len(tokens.encode("🙂")) > 1
    loops = [i % 3 % 2 for i in range(len(ids))]
    monkeypatch.setattr(sample, "use_colour", lambda _: terminal)
    monkeypatch.setattr(sample, "generate", lambda *_: (
        (torch.tensor([i]), torch.tensor([loop])) for i, loop in zip(ids, loops, strict=True)))
    want, part = "", []
    for i, loop in zip(ids, loops, strict=True):
        part.append(i)
        if "\ufffd" not in tokens.decode(part):
            piece = tokens.decode(part)
            want += f"\033[{32 + loop}m{piece}\033[0m" if terminal else piece + "₁₂"[loop]
            part = []
    out = run(capsys, f"--ckpt={ckpt}", "--prompt=the", "--show_exits")
    assert out.startswith(f"the{want}\n(200 new tokens)") or out.startswith(f"the{want}\n(the context of 48")
    assert_legend(re.sub("\033\\[\\d+m", "", out).splitlines()[-1], [loop + 1 for loop in loops])


def test_half_a_character_at_the_end_is_marked_too(ckpt, capsys):
    tokens = Tokenizer.load(ckpt)
    half = tokens.encode("🙂")[:1]
    sample.write([(half[0], 1)], tokens, [], sample.ExitMarker(2, colour=False))
    assert re.fullmatch("\ufffd+₂", capsys.readouterr().out)


@pytest.mark.parametrize("name, value", [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colours_are_for_terminals_that_want_them(calibrated, capsys, monkeypatch, name, value):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    flags = [f"--ckpt={calibrated}", "--prompt=the cat", "--max_new_tokens=5", "--show_exits"]
    assert "\033[" in run(capsys, *flags)
    monkeypatch.setenv(name, value)
    plain = run(capsys, *flags)
    assert "\033[" not in plain and "₂" in plain


def test_loops_have_colours_of_their_own_and_numbers_of_two_digits(monkeypatch):
    show = sample.ExitMarker(6, colour=True)
    assert len({show.mark("a", loop) for loop in range(6)}) == 6
    assert sample.ExitMarker(12, colour=True).mark("a", 11).endswith("ma\033[0m")
    assert sample.ExitMarker(12, colour=False).mark("a", 11) == "a₁₂"
    monkeypatch.setattr(sample.sys, "stdout", io.TextIOWrapper(io.BytesIO(), "latin-1"))
    assert sample.ExitMarker(12, colour=False).mark("a", 11) == "a[12]"
    assert show.mark("", 0) == sample.ExitMarker(6, colour=False).mark("", 0) == ""


@pytest.mark.parametrize("samples", [1, 2])
def test_the_rule_never_is_no_rule_and_fixed_exits_at_its_loop(ckpt, capsys, sampled, samples):
    flags = [f"--ckpt={ckpt}", "--prompt=the cat", "--max_new_tokens=12", f"--samples={samples}", "--seed=3"]
    texts = {rule: run(capsys, *flags, *rule.split()) for rule in
             ("", "--rule=never", "--rule=fixed --exit_loop=2", "--rule=fixed --exit_loop=1")}
    assert [loops for _, loops in sampled] == [[1] + [0] * 11] * samples              # the first is the prompt's
    early = texts.pop("--rule=fixed --exit_loop=1")
    assert len(set(texts.values())) == 1 and early not in texts.values()


def test_rule_threshold_and_keys_reach_the_decoder(ckpt, capsys, sampled):
    idx, found = torch.tensor([Tokenizer.load(ckpt).encode("the cat")]), []
    for keys in ("exact", "copy"):
        run(capsys, f"--ckpt={ckpt}", "--prompt=the cat", "--max_new_tokens=30", "--rule=max_prob", "--threshold=0.06",
            f"--keys={keys}", "--temperature=0")
        want = list(decode(RecursiveTransformer.load(ckpt), idx, 30, Rule("max_prob", 0.06), keys, eos_id=299))
        assert sampled == [tuple([step[part].item() for step in want] for part in (0, 1))]
        found.append(sampled[0])
    assert found[0] != found[1]


def test_show_exits_alone_uses_the_calibrated_gate_or_prints_what_it_uses_instead(ckpt, calibrated, capsys, sampled,
                                                                                   monkeypatch):
    asked, load_rule = [], sample.load_rule
    monkeypatch.setattr(sample, "load_rule", lambda *args: asked.append(args[2:]) or load_rule(*args))

    def shown(folder, *more):
        sample.main([f"--ckpt={folder}", "--prompt=the cat", "--max_new_tokens=12", "--seed=3", "--show_exits", *more])
        return capsys.readouterr()
    want = shown(calibrated, "--rule=gate", "--threshold=0.5").out
    found = shown(calibrated)
    assert found.out == want and "₁" in found.out and "calibrated for" not in found.err
    assert shown(calibrated, "--threshold=0.9").out != want
    asked.clear()
    for folder, more, keys in [(ckpt, [], "exact"), (calibrated, ["--keys=copy"], "copy")]:
        found = shown(folder, *more)
        assert f"{folder} is not calibrated for --keys={keys}: a token exits where the highest probability" in found.err
        assert f"run python -m evaluation.thresholds --ckpt={folder} --keys={keys}" in found.err
        assert "not calibrated" not in found.out
    assert asked == [("max_prob", 0.5, 1, "exact"), ("max_prob", 0.5, 1, "copy")]
    with pytest.raises(UserError, match="no calibrated threshold of gate for --keys=copy"):
        shown(calibrated, "--rule=gate", "--keys=copy")


def test_a_model_of_one_loop_shows_one_loop_and_has_no_rules(ckpt, capsys, tmp_path):
    config = Config(vocab_size=300, n_layer=2, n_embd=16, n_head=2, head_dim=8, n_hidden=32, n_ctx=48)
    RecursiveTransformer(config).save(tmp_path / "full")
    for name in ("tokenizer.tiktoken", "tokenizer_config.json"):
        shutil.copy(ckpt / name, tmp_path / "full")
    flags = [f"--ckpt={tmp_path / 'full'}", "--max_new_tokens=5", "--show_exits"]
    sample.main(flags)
    assert "mean depth 1.00 of 1" in capsys.readouterr().out
    for rule in ("gate", "fixed", "max_prob"):
        with pytest.raises(UserError, match=f"--rule={rule} lets tokens exit before the last loop.* has 1 loop"):
            sample.main([*flags, f"--rule={rule}"])


@pytest.mark.parametrize("rule", ["fixed", "gate"])
def test_a_text_may_end_early_with_a_rule(calibrated, capsys, monkeypatch, sampled, rule):
    """The third and the fifth time that the head runs, its first row ends."""
    runs, token_probs = iter(range(99)), sample.token_probs

    def ending(logits, *rest):
        probs = token_probs(logits, *rest)
        probs[:, 299] = 0
        if next(runs) in (2, 4):
            probs[0] = torch.eye(300)[299]
        return probs
    monkeypatch.setattr(sample, "token_probs", ending)
    out = run(capsys, f"--ckpt={calibrated}", "--prompt=the cat", "--samples=2", f"--rule={rule}", "--show_exits")
    assert out.count("(end of text)") == 2 and "endoftext" not in out
    assert [tokens.index(299) + 1 for tokens, _ in sampled] == [len(loops) for _, loops in sampled]
    assert min(len(loops) for _, loops in sampled) < 5
    assert_legend(out.splitlines()[-1], loops_of(sampled))


@pytest.mark.parametrize("flags, says", [
    ("--rule=gate", "has no gate: train one with python -m evaluation.thresholds"),
    ("--rule=gate --threshold=0.5", "has no gate"), ("--show_exits --threshold=0.5", "has no gate"),
    ("--rule=max_prob", "no calibrated threshold of max_prob for --keys=exact.*thresholds .*--keys=exact"),
    ("--rule=max_prob --keys=copy", "max_prob for --keys=copy.*thresholds .*--keys=copy"),
    ("--rule=max_prob --threshold=1.5", "--threshold=1.5 is out of range"),
    ("--rule=margin --threshold=-0.1", "out of range"), ("--rule=entropy --threshold=nan", "out of range"),
    ("--rule=fixed --exit_loop=0", "--exit_loop=0, but the model has the loops 1 to 2"),
    ("--rule=fixed --exit_loop=3", "--exit_loop=3, but the model has the loops 1 to 2"),
    ("--threshold=0.5", "--threshold=0.5 needs a rule that compares scores"),
    ("--threshold=0", "needs a rule that compares"), ("--rule=never --threshold=0.5", "needs a rule that compares"),
    ("--rule=never --threshold=0.5 --show_exits", "needs a rule that compares"),
    ("--rule=fixed --threshold=0.5", "needs a rule that compares"),
    ("--exit_loop=2", "--exit_loop=2 is for --rule=fixed"),
    ("--rule=max_prob --threshold=0.5 --exit_loop=2", "is for --rule=fixed"),
    ("--ckpt=assets/donor --rule=gate", "--rule=gate lets tokens exit before.*has 1 loop")])
def test_bad_rules_are_refused(ckpt, flags, says):
    with pytest.raises(UserError, match=says):
        sample.main([f"--ckpt={ckpt}", *flags.split()])


@pytest.mark.parametrize("flag", ["--rule=guess", "--keys=moved", "--threshold=half", "--exit_loop=1.5"])
def test_unknown_choices_are_refused_by_the_command_line(ckpt, capsys, flag):
    with pytest.raises(SystemExit):
        sample.main([f"--ckpt={ckpt}", flag])
    assert flag.split("=")[0] in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Many texts, through the engine

LINES = ["the cat", "dog", "", "the mat and the dog – naïve", "日本", "the cat sat on"]


@pytest.fixture
def prompts(tmp_path, monkeypatch):
    """Six prompts, one of them empty; in double precision, so that batches and single rows give the same tokens."""
    load = sample.load_any
    monkeypatch.setattr(sample, "load_any", lambda *args: load(*args).double())
    monkeypatch.setattr(exits.Gate, "load", lambda *args, load=exits.Gate.load: load(*args).double())
    (tmp_path / "prompts.txt").write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return f"--prompts={tmp_path / 'prompts.txt'}"


def pages(out):
    """{title: the text below it}."""
    return {part.split("\n", 1)[0]: part.split("\n", 1)[1] for part in out.split("--- ")[1:]}


@pytest.mark.parametrize("flags", ["--rule=max_prob --threshold=0.06", "--rule=gate --slots=2 --show_exits",
                                   "--rule=margin --threshold=0.02 --keys=copy --slots=1", "--samples=2 --slots=5"])
def test_each_of_many_texts_equals_the_text_alone_in_the_order_of_the_prompts(calibrated, capsys, prompts, flags):
    flags = [f"--ckpt={calibrated}", "--temperature=0", "--max_new_tokens=15", *flags.split()]
    sample.main([*flags, prompts])
    many = capsys.readouterr()
    found, samples = pages(many.out.split("exited after")[0]), "--samples=2" in flags
    titles = [f"prompt {i} of 6" for i in range(1, 7)]
    assert list(found) == ([f"{t}, sample {i} of 2" for t in titles for i in (1, 2)] if samples else titles)
    alone = [run(capsys, *(f for f in flags if "samples" not in f), f"--prompt={line}") for line in LINES]
    assert list(found.values()) == [a.split("exited after")[0] + "\n" for a in alone for _ in range(1 + samples)]
    assert ("exited after" in many.out) == ("--show_exits" in flags)
    n, slots = 12 if samples else 6, int((re.findall(r"slots=(\d)", " ".join(flags)) or [6])[0])
    assert f"; {n} texts through {slots} slots\n" in many.err
    assert re.search(r"\n[\d,]+ tokens in \d+\.\d s, [\d,]+ tok/s\n$", many.err)


def test_many_texts_depend_on_the_seed(ckpt, capsys, prompts):
    texts = [run(capsys, f"--ckpt={ckpt}", prompts, "--max_new_tokens=9", "--slots=2", f"--seed={seed}")
             for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("top_k, kept", [(1, 1), (3, 3), (0, 6)])
def test_tokens_are_sampled_with_their_probabilities(top_k, kept):
    logits = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5]).expand(20_000, -1)
    sampler = sample.make_sampler(sample.SampleConfig(temperature=0.7, top_k=top_k))
    want = sample.token_probs(logits[:1], 0.7, top_k, 1.0)[0]
    share = sampler(logits).bincount(minlength=6) / len(logits)
    assert (share > 0).sum() == kept
    torch.testing.assert_close(share, want, atol=0.02, rtol=0)


def test_the_sampler_never_waits_for_the_gpu():
    """Otherwise no CUDA graph could contain it."""
    for temperature in (0, 0.7):
        sampler = sample.make_sampler(sample.SampleConfig(temperature=temperature, top_k=5, top_p=0.9))
        with NothingWaits() as watch:
            sampler(torch.randn(4, 20))
        assert watch.calls and "multinomial" not in {func.overloadpacket.__name__ for func, *_ in watch.calls}  # inside


def test_prompts_that_cannot_be_served_are_refused_alone(ckpt, capsys, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(Tokenizer, "encode_prompt", lambda self, text, _: self.encode(text) or refuse())
    (tmp_path / "prompts.txt").write_text("\nthe cat\n" + "the cat " * 60 + "\ndog\n")

    def refuse():
        raise UserError("the prompt is empty")
    with pytest.raises(UserError, match="2 of 4 prompts were refused; the reason is printed with each"):
        sample.main([f"--ckpt={ckpt}", prompts, "--max_new_tokens=3", "--slots=2"])
    many, long = capsys.readouterr(), len(Tokenizer.load(ckpt).encode("the cat " * 60))
    ends = [page.rstrip("\n").splitlines()[-1] for page in pages(many.out).values()]
    assert ends == ["(refused: the prompt is empty)", "(3 new tokens)", "(refused: "
                    f"{long} tokens of prompt and 1 new ones do not fit the 48 of a slot)", "(3 new tokens)"]
    assert many.err.index("prompt 1: refused") < many.err.index("prompt 3: refused") < many.err.index("tok/s")
    (tmp_path / "prompts.txt").write_text("\n")
    with pytest.raises(UserError, match="1 of 1 prompts were refused"):
        sample.main([f"--ckpt={ckpt}", prompts, "--max_new_tokens=1"])


def test_texts_are_printed_when_finished_and_ctrl_c_prints_the_rest(ckpt, capsys, prompts, monkeypatch):
    """Of six texts through two slots two are finished and one or two have begun when Ctrl-C comes."""
    scripted(monkeypatch)
    steps, step, seen = iter(range(99)), sample.Engine.step, []

    def interrupted(engine):
        seen.append(capsys.readouterr().out)
        if next(steps) == 11:
            raise KeyboardInterrupt
        return step(engine)
    monkeypatch.setattr(sample.Engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample.main([f"--ckpt={ckpt}", prompts, "--slots=2", "--max_new_tokens=5"])
    end = capsys.readouterr()
    before, after = pages("".join(seen)), pages(end.out)
    assert list(before) == ["prompt 1 of 6", "prompt 2 of 6"] and all("(5 new" in text for text in before.values())
    assert after and list(after) == ["prompt 3 of 6", "prompt 4 of 6"][:len(after)]
    assert all(re.search("!\n\\(interrupted\\)\n$", text) for text in after.values()) and "tok/s" in end.err


@pytest.mark.parametrize("text", [None, "", "the cat\n"])
def test_bad_prompt_files_are_refused(ckpt, prompts, tmp_path, text):
    if text is None:
        (tmp_path / "prompts.txt").unlink()
    else:
        (tmp_path / "prompts.txt").write_text(text)
    flags, says = {None: ([], "cannot read --prompts="), "": ([], "is empty; give a file with a prompt on each line"),
                   "the cat\n": (["--prompt=dog"], "each give the prompt; use one of them")}[text]
    with pytest.raises(UserError, match=says):
        sample.main([f"--ckpt={ckpt}", prompts, *flags])
