"""Sampling: what is drawn, when it stops, and that only whole characters come out."""

import json

import pytest
import torch

import sample
from model import Config, RecursiveTransformer
from runtime import UserError
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
