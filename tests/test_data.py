"""lib/data.py: batches that depend on nothing but their numbers, and the command line."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from small_tokenizers import PLAIN

from experiments.books import clean
from lib import data
from lib.cli import UserError, parse_args
from lib.data import Tokens, batch, load_tokens, validation
from lib.tokenizer import Tokenizer, copy_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TOKENS = Tokens([np.arange(0, 40, dtype=np.uint16), np.arange(40, 101, dtype=np.uint16)])  # 10 windows of 10


def test_targets_are_the_next_tokens():
    inputs, targets = batch(TOKENS, range(5), 10, seed=0)
    assert inputs.shape == targets.shape == (5, 10) and inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)
    assert (inputs[:, 0] % 10 == 0).all()


def test_each_epoch_has_every_window_once_in_its_own_order():
    starts = batch(TOKENS, range(30), 10, seed=0)[0][:, 0].view(3, 10) // 10
    assert all(sorted(epoch) == list(range(10)) for epoch in starts.tolist())
    assert len({tuple(epoch) for epoch in starts.tolist()}) == 3
    assert not torch.equal(starts, batch(TOKENS, range(30), 10, seed=1)[0][:, 0].view(3, 10) // 10)


def test_rows_do_not_depend_on_how_they_are_distributed():
    whole = batch(TOKENS, range(24), 10, seed=3)
    for n in (1, 2, 3, 8):
        parts = [batch(TOKENS, range(i, i + n), 10, seed=3) for i in reversed(range(0, 24, n))][::-1]
        assert all(torch.equal(torch.cat([p[k] for p in parts]), whole[k]) for k in (0, 1))
    code = ("import numpy as np; from lib.data import *; t = Tokens([np.arange(101, dtype=np.uint16)]);"
            "print(batch(t, range(24), 10, 3)[0][:, 0].tolist())")
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert json.loads(other.stdout) == whole[0][:, 0].tolist(), other.stderr   # another process sees the same data


def test_prefetched_batches_are_the_same_in_the_same_order(monkeypatch):
    rows, prepared = [range(i, i + 3) for i in range(0, 30, 3)], []
    real = data.batch
    monkeypatch.setattr(data, "batch", lambda tokens, numbers, *rest: prepared.append(
        (numbers, threading.current_thread())) or real(tokens, numbers, *rest))
    stream = data.batches(TOKENS, iter(rows), 10, 3, torch.device("cpu"))
    for i, numbers in enumerate(rows):
        got = next(stream)
        assert all(torch.equal(a, b) for a, b in zip(got, real(TOKENS, numbers, 10, 3), strict=True))
        assert i + 1 <= len(prepared) <= i + 2                         # one ahead, no more
    assert next(stream, None) is None
    assert [numbers for numbers, _ in prepared] == rows
    assert threading.current_thread() not in {thread for _, thread in prepared}
    assert list(data.batches(TOKENS, [], 10, 3, torch.device("cpu"))) == []


def test_an_error_in_the_prefetch_thread_is_raised_at_its_batch(monkeypatch):
    real = data.batch
    monkeypatch.setattr(data, "batch", lambda tokens, numbers, *rest: real(tokens, numbers, *rest) if 6 not in numbers
                        else 1 / 0)
    threads = threading.active_count()
    stream = data.batches(TOKENS, [range(i, i + 3) for i in range(0, 30, 3)], 10, 3, torch.device("cpu"))
    assert len([next(stream), next(stream)]) == 2
    with pytest.raises(ZeroDivisionError):
        next(stream)
    assert threading.active_count() == threads                         # no thread is left


def test_too_short_a_text():
    assert batch(TOKENS, range(1), 100, seed=0)[0].shape == (1, 100)
    for take in (lambda: batch(TOKENS, range(1), 101, seed=0), lambda: validation(TOKENS, 101)):
        with pytest.raises(UserError, match="101 tokens, need at least 102"):
            take()


def test_validation_reads_from_the_start_in_order():
    batches = validation(TOKENS, 10, rows=4)
    assert [len(inputs) for inputs, _ in batches] == [4, 4, 2]
    assert torch.cat([inputs for inputs, _ in batches]).flatten().tolist() == list(range(100))
    assert torch.cat([targets for _, targets in batches]).flatten().tolist() == list(range(1, 101))
    assert [len(inputs) for inputs, _ in validation(TOKENS, 10, max_tokens=59, rows=4)] == [4, 1]
    assert [len(inputs) for inputs, _ in validation(TOKENS, 10, max_tokens=3)] == [1]


def test_windows_begin_with_bos_where_the_tokenizer_does(metaspace, tmp_path):
    """Each window starts with BOS, without which Gemma fails, and predicts its first own token from it."""
    copy_tokenizer(metaspace, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "bos_token": "<s>"}')
    (tmp_path / "a.txt").write_text("a the a the a the a the ")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.first_id == 1 and Tokenizer.load(metaspace).first_id is None
    assert tokenizer.encode_prompt("a") == [1, *tokenizer.encode("a")]
    tokens = load_tokens(str(tmp_path / "a.txt"), tokenizer, 300)
    (inputs, targets), *_ = validation(tokens, 4, rows=2)
    assert inputs[:, 0].tolist() == [1, 1]
    assert targets.flatten().tolist() == tokens[0:8].tolist()
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


@pytest.mark.parametrize("flag", ["--tokens=0", "--shard_tokens=0", "--valid_share=-0.1", "--valid_share=1"])
def test_counts_and_shares_out_of_range_are_refused(flag):
    with pytest.raises(UserError, match=f"{flag.rstrip('0')}.* must be at least"):
        data.main([flag])


def test_counts_may_be_written_short(capsys):
    for text, n in (("15e9", 15_000_000_000), ("1.5e3", 1500), ("300_000", 300_000), ("7", 7), (str(10**20), 10**20)):
        assert parse_args(data.DataConfig, [f"--tokens={text}"]).tokens == n
    for text in ("1.5", "1e-3", "inf", "nan", "many", ""):
        with pytest.raises(SystemExit):
            parse_args(data.DataConfig, [f"--tokens={text}"])
        assert f"argument --tokens: invalid int value: '{text}'" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--tokens=9", "--valid_share=0.1", "--shard_tokens=9", "--tokenizer=x",
                                  "--vocab_size=9"])
def test_settings_of_shards_are_refused_where_a_tokenizer_is_trained(tmp_path, flag):
    with pytest.raises(UserError, match=f"{flag.partition('=')[0]}.* but --train_tokenizer writes none"):
        data.main(["--train_tokenizer=300", f"--out={tmp_path / 'out'}", flag])
    assert not (tmp_path / "out").exists()


def test_training_reads_no_hub_dataset_into_memory(ranks, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="python -m lib.data --name=owner/name"):
        load_tokens("owner/name", Tokenizer.load(ranks), 300)
    monkeypatch.chdir(tmp_path)                              # nor one whose alias is a folder's name
    Path("slimpajama").mkdir()
    Path("slimpajama/a.txt").write_text("the cat")
    tokens = load_tokens("slimpajama", Tokenizer.load(ranks), 300)
    assert list(tokens[:]) == Tokenizer.load(ranks).encode("the cat")


def test_command_line(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(PLAIN)
    data.main([f"--name={tmp_path / 'a.txt'}", "--train_tokenizer=300", f"--out={tmp_path / 'donor'}"])
    assert "a tokenizer with 300 entries" in capsys.readouterr().out
    (tmp_path / "donor" / "config.json").write_text('{"vocab_size": 320}')  # a padded model, as Pythia is
    data.main([f"--name={tmp_path / 'a.txt'}", f"--tokenizer={tmp_path / 'donor'}", f"--out={tmp_path / 'shards'}",
               "--tokens=50"])
    assert "50 tokens" in capsys.readouterr().out
    assert len(load_tokens(str(tmp_path / "shards"), Tokenizer.load(tmp_path / "donor"), 320)) == 50


def test_books_are_unwrapped():
    wrapped = ("It was a _dark_ and stormy night; the rain fell in torrents,\n"
               "except at  occasional intervals, when it was checked by a\nviolent gust of wind.")
    verse = "Tyger tyger, burning bright,\n  In the forests of the night;"
    text = f"TRENCK***\n\n\nProduced by\nSomebody\n\n\n[Illustration: a\nboat]\n\n{wrapped}\n\n   * * *\n\n{verse}\r\n"
    assert clean(text) == (
        "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals, when it was "
        "checked by a violent gust of wind.\n\n"
        "* * *\n\nTyger tyger, burning bright,\nIn the forests of the night;\n")
