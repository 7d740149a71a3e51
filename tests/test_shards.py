"""lib/shards.py: shards that refuse another tokenizer, and the same bytes after any interruption."""

import gzip
import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest
from small_tokenizers import HARD, PLAIN
from test_texts import write_parquet
from tiny import contents

from lib import data, shards
from lib.cli import UserError
from lib.data import load_tokens
from lib.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent


def test_shards_of_older_versions_name_the_bytes_of_the_tokenizer(ranks, byte_level, tmp_path):
    for folder, names in ((ranks, ("tokenizer.tiktoken", "tokenizer_config.json")), (byte_level, ("tokenizer.json",))):
        old = hashlib.sha256(b"".join((folder / name).read_bytes() for name in names)).hexdigest()
        tokenizer, out = Tokenizer.load(folder), tmp_path / folder.name
        data.write_shards(["one"], tokenizer, out, 300)
        shard = out / "00000.safetensors"
        shard.write_bytes(shard.read_bytes().replace(tokenizer.hash.encode(), old.encode()))
        assert load_tokens(str(out), tokenizer, 300)[:-1].tolist() == tokenizer.encode("one")


@pytest.mark.parametrize("vocab_size,dtype", [(300, "U16"), (65536, "U16"), (65537, "U32"), (256_000, "U32")])
def test_shards_hold_the_documents_each_with_eos(ranks, tmp_path, vocab_size, dtype):
    tokenizer, texts = Tokenizer.load(ranks), ["one dark night", "", HARD, "the rain"]
    expected = [i for text in texts if text for i in (*tokenizer.encode(text), 299)]
    total, _ = data.write_shards(texts, tokenizer, tmp_path / "shards", vocab_size, shard_tokens=10)
    files = sorted(p.name for p in (tmp_path / "shards").iterdir())
    assert files == [f"{i:05d}.safetensors" for i in range(-(-len(expected) // 10))]
    with shards.safe_open(tmp_path / "shards" / files[0], framework="numpy") as f:
        assert f.get_slice("tokens").get_dtype() == dtype
        assert f.metadata() == {"vocab_size": str(vocab_size), "tokenizer": tokenizer.hash}
    tokens = load_tokens(str(tmp_path / "shards"), tokenizer, vocab_size)
    assert total == len(tokens) == len(expected) and tokens[:].tolist() == expected
    for a, b in ((0, 10), (9, 11), (3, 35), (10, 20), (5, 5), (len(expected) - 3, len(expected) + 5)):
        assert tokens[a:b].tolist() == expected[a:b] and tokens[a:b].dtype == np.int64


def test_large_ids_survive(ranks, tmp_path, monkeypatch):
    tokenizer = Tokenizer.load(ranks)
    monkeypatch.setattr(tokenizer, "eos_ids", (255_999,))
    data.write_shards(["a"], tokenizer, tmp_path, 256_000)
    assert load_tokens(str(tmp_path), tokenizer, 256_000)[-1:].tolist() == [255_999]


@pytest.mark.parametrize("limit", [1, 10, 25, 10_000])
def test_max_tokens(ranks, tmp_path, limit, monkeypatch):
    monkeypatch.setattr(shards, "BATCH", 5000)
    tokenizer = Tokenizer.load(ranks)
    whole, _ = data.write_shards([PLAIN], tokenizer, tmp_path / "all", 300)
    assert data.write_shards([PLAIN], tokenizer, tmp_path / "some", 300, 10, limit) == (min(limit, whole), 0)
    assert len(load_tokens(str(tmp_path / "some"), tokenizer, 300)) == min(limit, whole)
    assert data.write_shards(repeat(PLAIN), tokenizer, tmp_path / "endless", 300, max_tokens=limit) == (limit, 0)


def test_shards_of_another_tokenizer_are_refused(ranks, byte_level, tmp_path):
    tokenizer = Tokenizer.load(ranks)
    data.write_shards([PLAIN], tokenizer, tmp_path, 300)
    for other, vocab_size in ((Tokenizer.load(byte_level), 300), (tokenizer, 299)):
        with pytest.raises(UserError, match="made with another tokenizer"):
            load_tokens(str(tmp_path), other, vocab_size)
    tokens = load_tokens(str(tmp_path), tokenizer, 300)[:].tolist()
    assert load_tokens(str(tmp_path), tokenizer, 320)[:].tolist() == tokens      # a model that is padded further
    data.write_shards([PLAIN], tokenizer, tmp_path / "padded", 320)
    assert load_tokens(str(tmp_path / "padded"), tokenizer, 300)[:].tolist() == tokens
    with pytest.raises(UserError, match="already holds"):
        data.write_shards([PLAIN], tokenizer, tmp_path, 300)


def test_damaged_shards_are_refused(ranks, tmp_path):
    tokenizer = Tokenizer.load(ranks)
    data.write_shards([PLAIN], tokenizer, tmp_path, 300)
    shard = tmp_path / "00000.safetensors"
    whole = shard.read_bytes()
    for damaged in (whole[:-1], whole[:20], b"", whole + b"\0\0", whole.replace(b"tokens", b"tokems"),
                    whole.replace(b"U16", b"I16")):
        shard.write_bytes(damaged)
        with pytest.raises(UserError, match="not a whole token shard"):
            load_tokens(str(tmp_path), tokenizer, 300)


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_failed_write_leaves_no_shard(ranks, tmp_path, monkeypatch, call):
    tokenizer, real, calls = Tokenizer.load(ranks), getattr(shards.os, call), []

    def fail(*args):
        calls.append(args)
        if len(calls) > 1:                                   # the first file is the state, the second a shard
            raise OSError("disk full")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(shards.os, call, fail)
        with pytest.raises(UserError, match="cannot write .*disk full.* solve this, and the same command continues"):
            data.write_shards([PLAIN], tokenizer, tmp_path, 300)
    assert len(calls) == 2 and not list(tmp_path.glob("*.safetensors"))
    data.write_shards([PLAIN], tokenizer, tmp_path, 300)
    assert list(contents(tmp_path)) == ["00000.safetensors"]


def test_texts_and_shards_together(ranks, tmp_path):
    tokenizer = Tokenizer.load(ranks)
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    data.write_shards(["three"], tokenizer, tmp_path / "shards", 300)
    one, two, three = (tokenizer.encode(t) for t in ("one", "two", "three"))
    a, b, shards = (str(tmp_path / n) for n in ("a.txt", "b.txt", "shards"))
    assert load_tokens(a, tokenizer, 300)[:].tolist() == one
    assert load_tokens(f"{a},{b}", tokenizer, 300)[:].tolist() == [*one, 299, *two]
    assert load_tokens(str(tmp_path), tokenizer, 300)[:].tolist() == [*one, 299, *two]
    assert load_tokens(f"{shards},{a}", tokenizer, 300)[:].tolist() == [*three, 299, *one]
    assert load_tokens(f"{a},{shards}", tokenizer, 300)[:].tolist() == [*one, 299, *three, 299]


def test_empty_text(ranks, tmp_path):
    tokenizer = Tokenizer.load(ranks)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match="is empty"):
        load_tokens(str(tmp_path / "a.txt"), tokenizer, 300)
    with pytest.raises(UserError, match="is empty"):
        data.write_shards([""], tokenizer, tmp_path, 300)
    tokenizer.eos_ids = ()
    with pytest.raises(UserError, match="names no end-of-text token"):
        data.write_shards(["a"], tokenizer, tmp_path, 300)


# ---------------------------------------------------------------------------------------------------------------------
# Shards, interrupted

@pytest.fixture
def documents(monkeypatch):
    """60 texts of 0 to 1,700 characters, ten of them twice; a shard holds many of them, or part of one."""
    rng = random.Random(0)
    texts = [PLAIN[rng.randrange(90):][:rng.choice((0, 5, 40, 40, 150, 1700))] for _ in range(50)]
    texts += rng.sample(texts, 10)
    monkeypatch.setattr(shards, "BATCH", 400)
    monkeypatch.setattr(shards.os, "fsync", lambda fd: None)   # not needed without a power failure
    return texts


def interrupted(texts, after):
    """The first `after` texts, then an error."""
    yield from texts[:after]
    raise RuntimeError("pulled the plug")


SETTINGS = {"shard_tokens": 150, "valid_share": 0.3}


def stop_early(monkeypatch, *args, commits=1000, **settings):
    """write_shards, stopped after this many commits, or before the last one, which writes the rest."""
    commit = shards.commit

    def stopping(settings, position, parts):
        nonlocal commits
        commits -= 1
        if commits < 0 or position is None:
            raise RuntimeError("stopped")
        commit(settings, position, parts)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        patch.setattr(shards, "commit", stopping)
        data.write_shards(*args, **settings)


@pytest.mark.parametrize("limit", [None, 1, 150, 1000, 1500])
def test_resumed_shards_are_the_same_bytes(ranks, tmp_path, documents, monkeypatch, limit):
    tokenizer, rng = Tokenizer.load(ranks), random.Random(1)
    with monkeypatch.context() as patch:                     # one batch: the batch size does not change the bytes
        patch.setattr(shards, "BATCH", 10**6)
        counts = data.write_shards(documents, tokenizer, tmp_path / "whole", 300, max_tokens=limit, **SETTINGS)
    whole, resumed = contents(tmp_path / "whole"), 0
    assert limit in (1, 150) or any(name.startswith("valid") for name in whole)
    for n in range(8):
        out, after = tmp_path / str(n), 0
        while after < len(documents):                        # interrupted again and again, each time later
            after += rng.randrange(1, 25)
            try:
                done = data.write_shards(interrupted(documents, after), tokenizer, out, 300, max_tokens=limit,
                                         **SETTINGS)
                break                                        # it had enough tokens before the error
            except RuntimeError:
                resumed += (out / shards.UNFINISHED).exists()
                assert (out / shards.UNFINISHED).exists() or not list(out.rglob("*.safetensors"))
        else:
            done = data.write_shards(documents, tokenizer, out, 300, max_tokens=limit, **SETTINGS)
        assert contents(out) == whole and done == counts
    assert resumed > 2 or limit in (1, 150)


@pytest.mark.parametrize("before", [True, False])
def test_killed_at_every_write(ranks, tmp_path, documents, monkeypatch, before, capsys):
    """Killed before and after each shard and state file is written, and before the last state is removed."""
    tokenizer, documents = Tokenizer.load(ranks), documents[:20]
    data.write_shards(documents, tokenizer, tmp_path / "whole", 300, **SETTINGS)
    whole, replace, left = contents(tmp_path / "whole"), shards.replace_file, 0

    def dying(path, content):
        nonlocal left
        left -= 1
        if left < 0 and before:
            raise RuntimeError
        replace(path, content)
        if left < 0:
            raise RuntimeError

    for n in range(1000):
        out, left = tmp_path / str(n), n
        with monkeypatch.context() as patch:
            patch.setattr(shards, "replace_file", dying)
            patch.setattr(shards.Path, "unlink", lambda *_: dying(tmp_path / "other", b""))
            with pytest.raises(RuntimeError):
                data.write_shards(documents, tokenizer, out, 300, **SETTINGS)
            if left == -1 and set(contents(out)) == {*whole, shards.UNFINISHED}:
                break                                        # all is there but for the state being removed
        data.write_shards(documents, tokenizer, out, 300, **SETTINGS)
        assert contents(out) == whole, n
    assert n > len(whole)                                    # shards, and states between them
    capsys.readouterr()
    data.write_shards(documents, tokenizer, out, 300, **SETTINGS)
    assert contents(out) == whole
    assert "was interrupted: continues after" in capsys.readouterr().out


def test_killed_after_the_last_token(ranks, tmp_path, documents, monkeypatch):
    """Once --tokens is reached at a shard's end and saved, the next run reads no further document."""
    tokenizer = Tokenizer.load(ranks)
    for limit in range(150, 1501, 150):
        whole, out = tmp_path / f"whole{limit}", tmp_path / f"out{limit}"
        data.write_shards(documents, tokenizer, whole, 300, max_tokens=limit, **SETTINGS)
        stop_early(monkeypatch, documents, tokenizer, out, 300, max_tokens=limit, **SETTINGS)
        data.write_shards(map(str, range(99)), tokenizer, out, 300, max_tokens=limit, **SETTINGS)
        assert contents(out) == contents(whole)


def test_kill_9(ranks, tmp_path, documents):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in documents))
    settings = [f"--name={tmp_path / 'a.jsonl'}", f"--tokenizer={ranks}", "--shard_tokens=150", "--valid_share=0.3"]
    data.main([*settings, f"--out={tmp_path / 'whole'}"])
    code = ("import sys, time; from lib import data, shards, texts; shards.BATCH, read = 400, texts.open_source\n"
            "texts.open_source = lambda s: (time.sleep(0.05) or row for row in read(s))\n"
            "data.main(sys.argv[1:])")
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", code, *settings, f"--out={out}"], cwd=ROOT)
    while len(list(out.glob("*.safetensors"))) < 5 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL and (out / shards.UNFINISHED).exists()
    data.main([*settings, f"--out={out}"])
    assert contents(out) == contents(tmp_path / "whole")


def test_hub_streams_continue_without_reading_again(ranks, tmp_path, documents, monkeypatch):
    """Data before the last whole shard may have disappeared from the hub."""
    import datasets
    load, tokenizer, asked = datasets.load_dataset, Tokenizer.load(ranks), []
    parts = [tmp_path / f"{i}.jsonl" for i in range(6)]
    for i, part in enumerate(parts):
        part.write_text("".join(json.dumps({"text": t}) + "\n" for t in documents[10 * i:10 * i + 10]))

    def hub(name, config=None, **options):
        asked.append((name, config, options))
        return load("json", data_files=[str(p) for p in parts], split="train", streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    data.write_shards(documents, tokenizer, tmp_path / "whole", 300, **SETTINGS)
    stop_early(monkeypatch, "owner/name", tokenizer, tmp_path / "out", 300, commits=8, **SETTINGS)
    with shards.safe_open(tmp_path / "out" / shards.UNFINISHED, framework="numpy") as f:
        _, rows, state = json.loads(f.metadata()["state"])["position"]
    assert 10 < rows < 60 and state
    for part in parts[:rows // 10]:
        part.write_text(json.dumps({"text": "something else"}) + "\n")
    data.write_shards("owner/name", tokenizer, tmp_path / "out", 300, **SETTINGS)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert asked == [("owner/name", None, {"revision": None, "split": "train", "streaming": True})] * 2


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "parquet"])
def test_a_run_of_an_older_version_continues(ranks, tmp_path, documents, monkeypatch, kind):
    """It read local files with datasets, whose state counts the same rows, and stored the hash of the files."""
    tokenizer, name = Tokenizer.load(ranks), str(tmp_path / f"a.{kind}")
    lines = "".join(json.dumps({"text": t}) + "\n" for t in documents)
    if kind == "parquet":
        write_parquet(name, *documents)
    else:
        content = json.dumps([{"text": t} for t in documents]) if kind == "json" else lines
        Path(name).write_bytes(gzip.compress(content.encode()) if kind == "jsonl.gz" else content.encode())
    data.write_shards(name, tokenizer, tmp_path / "whole", 300, **SETTINGS)
    stop_early(monkeypatch, name, tokenizer, tmp_path / "out", 300, commits=5, **SETTINGS)
    path = tmp_path / "out" / shards.UNFINISHED
    with shards.safe_open(path, framework="numpy") as f:
        state, held = json.loads(f.metadata()["state"]), {name: f.get_tensor(name) for name in ("train", "valid")}
    assert 0 < state["position"][1] < len(documents)
    state["position"][2] = {"examples_iterable": {"shard_idx": 0, "type": "ArrowExamplesIterable"}, "epoch": 0}
    state["settings"]["tokenizer"] = tokenizer.file_hash[:16]
    path.write_bytes(shards.save(held, {"state": json.dumps(state)}))
    data.write_shards(name, tokenizer, tmp_path / "out", 300, **SETTINGS)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_run_continues_only_with_its_own_settings(ranks, byte_level, tmp_path, documents, monkeypatch):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in documents))
    tokenizer, name, out = Tokenizer.load(ranks), str(tmp_path / "a.jsonl"), tmp_path / "out"

    def write(tokenizer=tokenizer, name=name, **other):
        data.write_shards(name, tokenizer, out, 300, **SETTINGS | other)

    stop_early(monkeypatch, name, tokenizer, out, 300, **SETTINGS)
    for other, message in (({"shard_tokens": 60}, "shard_tokens was 150, is 60"), ({"valid_share": 0.2}, "valid_share"),
                           ({"max_tokens": 9}, "tokens was None, is 9"), ({"name": "o/n"}, "name was .*files was"),
                           ({"tokenizer": Tokenizer.load(byte_level)}, "tokenizer was")):
        with pytest.raises(UserError, match=f"begun with other settings .*{message}.* continue with the same ones, or"):
            write(**other)
    whole = (out / "00000.safetensors").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="00000.safetensors is missing.* remove .* and start again"):
        write()
    whole.rename(out / "00000.safetensors")
    with open(name, "a") as f:
        f.write('{"text": "one more"}\n')
    with pytest.raises(UserError, match="files was 1 files of"):
        write()
    (out / shards.UNFINISHED).write_bytes(b"{}")
    with pytest.raises(UserError, match="resume.state is damaged"):
        write()


# ---------------------------------------------------------------------------------------------------------------------
# A part held out

def test_held_out_documents_are_the_same_in_every_order(ranks, tmp_path, documents):
    """Duplicates fall on one side, nothing is on both or lost, and a larger share contains a smaller one."""
    tokenizer, texts = Tokenizer.load(ranks), [f"{i} {t}" for i, t in enumerate(documents)] * 2
    random.Random(2).shuffle(texts)
    sides = {}
    for n, (share, order) in enumerate(((0.3, texts), (0.3, texts[::-1]), (0.5, sorted(texts)))):
        data.write_shards(order, tokenizer, tmp_path / str(n), 300, valid_share=share)
        both = [str(tmp_path / str(n)), str(tmp_path / str(n) / "valid")]
        train, valid = (tokenizer.decode(load_tokens(p, tokenizer, 300)[:]).split("<|endoftext|>")[:-1] for p in both)
        assert sorted(train + valid) == sorted(texts) and not set(train) & set(valid)
        assert 0.6 * share < len(valid) / len(texts) < 1.4 * share
        sides[n] = set(valid)
    assert sides[0] == sides[1] < sides[2]
    sample = "".join("01"[shards.held_out(str(i), 0.5)] for i in range(16))
    assert sample == "1101100111111100"                      # in every process, on every machine


def test_an_empty_training_or_held_out_part(ranks, tmp_path, capsys):
    tokenizer, texts = Tokenizer.load(ranks), ["one", "two"]
    assert not shards.held_out("one", 0.1) and shards.held_out("one", 0.999999)
    assert data.write_shards(texts, tokenizer, tmp_path / "a", 300, valid_share=1e-9)[1] == 0
    assert "no document fell into the held-out part" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["00000.safetensors"]
    with pytest.raises(UserError, match="every document fell into .* less than --valid_share=0.999999, and another"):
        data.write_shards(texts, tokenizer, tmp_path / "b", 300, valid_share=0.999999)


def test_unfinished_shards_are_refused_until_the_state_is_removed(ranks, tmp_path, documents, monkeypatch):
    tokenizer, out = Tokenizer.load(ranks), tmp_path / "out"
    stop_early(monkeypatch, documents, tokenizer, out, 300, **SETTINGS)
    for part in (out, out / "valid"):
        with pytest.raises(UserError, match="not all written: give the .* lib.data command .* or remove .*state"):
            load_tokens(str(part), tokenizer, 300)
    monkeypatch.chdir(out / "valid")
    with pytest.raises(UserError, match="not all written"):
        load_tokens(".", tokenizer, 300)
    (out / shards.UNFINISHED).unlink()
    n = len(list(out.glob("*.safetensors")))
    assert len(load_tokens(str(out), tokenizer, 300)) == 150 * n > 0   # the shards in valid are not among them
    for part in (out, out / "valid"):
        with pytest.raises(UserError, match="already holds"):
            data.write_shards(documents, tokenizer, part, 300, **SETTINGS)
