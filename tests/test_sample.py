"""Sampling: what is drawn, when it stops, and that only whole characters come out."""

import json
import re
import shutil
import sys

import pytest
import torch

import sample
from exits import decode
from model import Config, RecursiveTransformer
from rules import Gate, Rule
from runtime import THRESHOLDS_FILE, UserError
from tokenizer import Tokenizer, train_tokenizer

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
    assert sample.token_probs(logits.flip(-1), 1.0, 0, 0.1).argmax() == 3  # the likeliest is kept, wherever it stands


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


def test_stops_at_the_context_limit_and_says_so(ckpt, capsys, monkeypatch):
    drawn = sample.generate  # random weights end their text now and then: not here
    monkeypatch.setattr(sample, "generate", lambda *a: ((t.where(t != 299, 0), loop) for t, loop in drawn(*a[:-1])))
    assert run(capsys, f"--ckpt={ckpt}", "--prompt=the cat").endswith("(the context of 48 tokens is full)\n")


@pytest.mark.parametrize("samples", [1, 2])
def test_stops_at_end_of_text_and_says_so(ckpt, capsys, monkeypatch, samples):
    cat, eos = 99, 299  # "c", end of text

    def scripted(model, idx, *_):
        return iter([(torch.full((len(idx),), t), torch.ones(len(idx))) for t in (cat, eos, cat)])
    monkeypatch.setattr(sample, "generate", scripted)
    out = run(capsys, f"--ckpt={ckpt}", "--prompt=", f"--samples={samples}")
    assert out.count("(end of text)") == samples
    assert "<|endoftext|>" not in out


def test_streams_whole_characters_only(ckpt, capsys, monkeypatch):
    """Every print is valid text, though a smiling face is four tokens."""
    tokens = Tokenizer.load(ckpt)
    ids = tokens.encode("日🙂é")
    assert len(ids) > 3
    pieces = []
    monkeypatch.setattr("builtins.print", lambda *a, **k: pieces.extend(a))
    assert sample.write([(i, 0) for i in ids], tokens, []) == ""
    assert "".join(pieces) == "日🙂é" and not any("�" in p for p in pieces)


def test_batch_rows_differ_and_file_prompt(ckpt, capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text("the dog", encoding="utf-8")
    prompt = f"--prompt_file={tmp_path / 'prompt.txt'}"
    out = run(capsys, f"--ckpt={ckpt}", prompt, "--samples=3", "--max_new_tokens=12")
    texts = [part.split("\n", 1)[1] for part in out.split("--- sample ")[1:]]
    assert len(set(texts)) == 3 and all(t.startswith("the dog") for t in texts)


@pytest.mark.parametrize("flags, says", [
    (["--prompt=" + "the cat " * 60], "the model's context is 48"), (["--temperature=-1"], "must be 0 or more"),
    (["--top_p=0"], "above 0"), (["--samples=0"], "at least 1"), (["--prompt_file=missing.txt"], "cannot read"),
    (["--ckpt=nowhere"], "does not exist")])
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
        eos_id = None

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
def steps(monkeypatch):
    """The steps of the last text that was generated: (tokens, loops) each, lists over the samples."""
    steps, generate = [], sample.generate

    def recorded(*args):
        steps.clear()
        for token, loop in generate(*args):
            steps.append((token.tolist(), loop.tolist()))
            yield token, loop
    monkeypatch.setattr(sample, "generate", recorded)
    return steps


def loops_until_the_end(steps, eos=299):
    """The loop, from 1, of each token of each sample, up to the one that ends the text."""
    found = []
    for row in zip(*[zip(*step, strict=True) for step in steps], strict=True):
        for token, loop in row:
            found.append(loop + 1)
            if token == eos:
                break
    return found


def assert_legend(line, loops, n_loop=2):
    counts = [loops.count(i + 1) for i in range(n_loop)]
    assert re.findall(r"(\d+) \((\d+)%\)", line) == [(f"{n}", f"{n / len(loops) * 100:.0f}") for n in counts]
    assert line.endswith(f"mean depth {sum(loops) / len(loops):.2f} of {n_loop}")


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("flags", [
    "--rule=max_prob --threshold=0.08", "--rule=gate --samples=3", "--rule=margin --threshold=0.02 --keys=copy",
    "--rule=entropy --threshold=0.12 --keys=copy --samples=2", "--rule=never", "--rule=fixed --samples=2"])
def test_to_show_exits_changes_no_text_and_the_legend_counts_its_tokens(calibrated, capsys, monkeypatch, steps, flags,
                                                                        terminal):
    flags = [f"--ckpt={calibrated}", "--prompt=the cat", "--max_new_tokens=25", "--seed=3", *flags.split()]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    plain = run(capsys, *flags)
    assert not re.search("[₀-₉]|\033\\[", plain)
    text, legend, rest = run(capsys, *flags, "--show_exits").rpartition("left after")
    loops = loops_until_the_end(steps)
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
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
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
    sample.write([(half[0], 1)], tokens, [], sample.Exits(2, colour=False))
    assert re.fullmatch("\ufffd+₂", capsys.readouterr().out)


def test_loops_have_colours_of_their_own_and_numbers_of_two_digits():
    show = sample.Exits(6, colour=True)
    assert len({show.mark("a", loop) for loop in range(6)}) == 6
    assert sample.Exits(12, colour=True).mark("a", 11).endswith("ma\033[0m")
    assert sample.Exits(12, colour=False).mark("a", 11) == "a₁₂"
    assert show.mark("", 0) == sample.Exits(6, colour=False).mark("", 0) == ""


@pytest.mark.parametrize("samples", [1, 2])
def test_the_rule_never_is_no_rule_and_fixed_leaves_where_it_is_told(ckpt, capsys, steps, samples):
    flags = [f"--ckpt={ckpt}", "--prompt=the cat", "--max_new_tokens=12", f"--samples={samples}", "--seed=3"]
    texts = {rule: run(capsys, *flags, *rule.split()) for rule in
             ("", "--rule=never", "--rule=fixed --exit_loop=2", "--rule=fixed --exit_loop=1")}
    assert [loop for _, loop in steps] == [[1] * samples] + [[0] * samples] * 11   # the first is the prompt's
    early = texts.pop("--rule=fixed --exit_loop=1")
    assert len(set(texts.values())) == 1 and early not in texts.values()


def test_rule_threshold_and_keys_reach_the_decoder(ckpt, capsys, steps):
    idx, found = torch.tensor([Tokenizer.load(ckpt).encode("the cat")]), []
    for keys in ("exact", "copy"):
        run(capsys, f"--ckpt={ckpt}", "--prompt=the cat", "--max_new_tokens=30", "--rule=max_prob", "--threshold=0.06",
            f"--keys={keys}", "--temperature=0")
        want = decode(RecursiveTransformer.load(ckpt), idx, 30, Rule("max_prob", 0.06), keys, eos_id=299)
        assert steps == [(token.tolist(), loop.tolist()) for token, loop in want]
        found.append(list(steps))
    assert found[0] != found[1]


def test_to_show_exits_alone_asks_the_calibrated_gate_or_says_what_it_does_instead(ckpt, calibrated, capsys, steps,
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
        assert f"{folder} is not calibrated for {keys} keys: tokens leave where the likeliest one has" in found.err
        assert f"run python exits.py --ckpt={folder} --keys={keys}" in found.err and "not calibrated" not in found.out
    assert asked == [("max_prob", 0.5, 1, "exact"), ("max_prob", 0.5, 1, "copy")]
    with pytest.raises(UserError, match="no calibrated threshold of gate with copy keys"):
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
        with pytest.raises(UserError, match=f"--rule={rule} lets tokens leave before the last loop.* has 1 loop"):
            sample.main([*flags, f"--rule={rule}"])


@pytest.mark.parametrize("rule", ["fixed", "gate"])
def test_a_text_may_end_early_with_a_rule(calibrated, capsys, monkeypatch, steps, rule):
    """Of two samples one ends after 3 tokens, one after 5."""
    ends, token_probs = iter(range(99)), sample.token_probs

    def ending(logits, *rest):
        probs, step = token_probs(logits, *rest), next(ends)
        probs[:, 299] = 0
        for row, end in enumerate((2, 4)):
            if step == end:
                probs[row] = torch.eye(300)[299]
        return probs
    monkeypatch.setattr(sample, "token_probs", ending)
    out = run(capsys, f"--ckpt={calibrated}", "--prompt=the cat", "--samples=2", f"--rule={rule}", "--show_exits")
    assert out.count("(end of text)") == 2 and "endoftext" not in out
    loops = loops_until_the_end(steps)
    assert len(steps) == 5 and len(loops) == 8
    assert_legend(out.splitlines()[-1], loops)


@pytest.mark.parametrize("flags, says", [
    ("--rule=gate", "has no gate: train one with python exits.py"),
    ("--rule=gate --threshold=0.5", "has no gate"), ("--show_exits --threshold=0.5", "has no gate"),
    ("--rule=max_prob", "no calibrated threshold of max_prob with exact keys.*exits.py .*--keys=exact"),
    ("--rule=max_prob --keys=copy", "max_prob with copy keys.*--keys=copy"),
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
    ("--ckpt=assets/donor --rule=gate", "--rule=gate lets tokens leave before.*has 1 loop")])
def test_rules_that_cannot_be_are_refused(ckpt, flags, says):
    with pytest.raises(UserError, match=says):
        sample.main([f"--ckpt={ckpt}", *flags.split()])


@pytest.mark.parametrize("flag", ["--rule=guess", "--keys=moved", "--threshold=half", "--exit_loop=1.5"])
def test_what_is_no_choice_is_refused_by_the_command_line(ckpt, capsys, flag):
    with pytest.raises(SystemExit):
        sample.main([f"--ckpt={ckpt}", flag])
    assert flag.split("=")[0] in capsys.readouterr().err
