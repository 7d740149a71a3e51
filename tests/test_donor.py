"""The shipped donor: parity with transformers, and uptraining that wins back part of what conversion costs."""

import json
from pathlib import Path

import pytest
import torch

import train
from convert import load_full, to_hf
from lib.data import load_tokens, validation
from lib.tokenizer import Tokenizer
from sample import generate

ROOT = Path(__file__).resolve().parent.parent
DONOR = ROOT / "assets" / "donor"
LOSS = 4.1365  # nats per token, on the first 8,192 tokens of the book it never saw
TEXT = ", and the little girl, who had been a little more than a man, had been a little more than a man"


@pytest.fixture(scope="module")
def donor():
    return load_full(DONOR, torch.float32)


@torch.no_grad()
def test_transformers_loads_it_and_agrees(donor):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(DONOR, dtype=torch.float32, attn_implementation="eager")
    assert type(theirs) is transformers.GemmaForCausalLM
    idx = torch.tensor([Tokenizer.load(DONOR).encode("It was a dark and stormy night, and the old man was afraid.")])
    torch.testing.assert_close(donor.logits(donor(idx)[-1]), theirs.eval()(idx).logits, atol=5e-5, rtol=1e-5)


def test_size_and_shape(donor):
    c, size = donor.config, (DONOR / "model.safetensors").stat().st_size
    assert (c.arch, c.n_layer, c.n_kv_head, c.tie_head, c.vocab_size) == ("gemma", 12, 1, True, 4096)
    assert size < 12e6 and 4.5e6 < donor.num_params()["stored"] < 5.5e6
    assert sum(p.stat().st_size for p in (ROOT / "assets").rglob("*") if p.is_file()) < 20e6


@torch.no_grad()
def test_loss_on_the_unseen_book(donor):
    tokenizer = Tokenizer.load(DONOR, donor.config.vocab_size)
    batches = validation(load_tokens(str(ROOT / "assets/books/valid.txt"), tokenizer, 4096), 256, 8192)
    loss = torch.stack([torch.nn.functional.cross_entropy(donor.logits(donor(x)[-1]).flatten(0, 1), y.flatten())
                        for x, y in batches]).mean().item()
    assert loss == pytest.approx(LOSS, abs=2e-3)


def test_golden_greedy_text(donor):
    tokenizer = Tokenizer.load(DONOR)
    prompt = torch.tensor([tokenizer.encode("The old man looked at her")])
    ids = [token.item() for token, _ in generate(donor, prompt, 24, temperature=0)]
    assert tokenizer.decode(ids) == TEXT


def test_uptraining_wins_loss_back_and_the_start_matters(tmp_path):
    """A hundredth of the README's run: the loss of stepwise falls, and ends below that of random weights."""
    final = {}
    for init in ("stepwise", "random"):
        out = tmp_path / init
        train.main([f"--init={init}", f"--out={out}", f"--donor={DONOR}", f"--data={ROOT / 'assets/books/train'}",
                    f"--valid={ROOT / 'assets/books/valid.txt'}", "--tokens=16384", "--batch_tokens=1024",
                    "--micro_batch=4", "--eval_tokens=1024", "--warmup=2", "--lr=1e-3"])
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        final[init] = log[-1]["full_val_loss"]
        assert final[init] < log[0]["full_val_loss"]
    assert final["stepwise"] < final["random"] - 0.3


def test_its_exported_tokenizer_in_transformers(donor, tmp_path):
    """An export has a tokenizer.json with the same ids, and names BOS, EOS, unknown and padding tokens."""
    transformers = pytest.importorskip("transformers")
    to_hf(donor, tmp_path / "hf", tokenizer=DONOR)
    ours, again = Tokenizer.load(DONOR, 4096), Tokenizer.load(tmp_path / "hf", 4096)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert not (tmp_path / "hf/tokenizer.tiktoken").exists() and again.eos_id == ours.eos_id == theirs.eos_token_id
    assert {theirs.bos_token, theirs.eos_token, theirs.unk_token, theirs.pad_token} == {"<|endoftext|>"}
    for text in ((ROOT / "assets/books/valid.txt").read_text(encoding="utf-8"), "",
                 "  a\n\n“Whither?” 日本 naïve don't 1234\r\n\x85\u3000 🙂"):
        ids = ours.encode(text)
        assert again.encode(text) == theirs(text, verbose=False)["input_ids"] == ids
        assert again.decode(ids) == theirs.decode(ids) == text
