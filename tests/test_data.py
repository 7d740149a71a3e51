"""Tokenizers in and out, shards that refuse the wrong tokenizer, batches that depend on nothing but their numbers."""

import gzip
import json
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from lib import data, shards
from lib.cli import UserError, parse_args
from lib.data import Texts, Tokens, batch, load_tokens, validation
from lib.tokenizer import TextStream, Tokenizer, copy_tokenizer, train_tokenizer

PLAIN = "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals. " * 20
HARD = "naïve café  — 你好，世界! 👩‍👩‍👧 🏴‍☠️\n\n\tdon’t <|endoftext|> 1234567 ٣ ﷽ \u0301e zero\u200bwidth"


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """A tiktoken ranks folder, 300 entries."""
    folder = tmp_path_factory.mktemp("ranks")
    train_tokenizer([PLAIN, "?👩?😀?🚀" * 20], 300, folder)    # merges "?" with half an emoji
    return folder


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory):
    """tokenizer.json in the manner of Pythia: byte-level BPE."""
    fast = Fast(models.BPE())
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast.train_from_iterator([PLAIN], trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["</s>"],
        show_progress=False))
    return save(fast, tmp_path_factory.mktemp("byte_level"))


@pytest.fixture(scope="session")
def metaspace(tmp_path_factory):
    """tokenizer.json in the manner of Llama: spaces as ▁, one in front, unknown characters as bytes."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *"▁abcdefghijklmnopqrstuvwxyzIé.,;", "▁a",
             "▁t", "▁th", "▁the"]
    fast = Fast(models.BPE({w: i for i, w in enumerate(words)}, [("▁", "a"), ("▁", "t"), ("▁t", "h"), ("▁th", "e")],
                           unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    fast.add_special_tokens(["<unk>", "<s>", "</s>"])
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(" ", 1, 0)])
    fast.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return save(fast, tmp_path_factory.mktemp("metaspace"))


def save(fast, folder, eos="</s>"):
    fast.enable_truncation(7)                                # as a careless last user left it
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": eos}}))
    return folder


BACKENDS = pytest.mark.parametrize("kind", ["ranks", "byte_level", "metaspace"])


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers

@BACKENDS
@pytest.mark.parametrize("text", [PLAIN, HARD, "", " ", "a", "  two leading", "trailing \n\n", "\ufffd"])
def test_round_trip(kind, text, request):
    tokenizer = Tokenizer.load(request.getfixturevalue(kind))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, "a"]) == [ids, tokenizer.encode("a")]
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode([tokenizer.eos_id]) in ("</s>", "<|endoftext|>")
    assert max(ids, default=0) < tokenizer.vocab_size


def test_trained_vocabulary_is_full_and_ends_with_eos(ranks):
    tokenizer = Tokenizer.load(ranks, vocab_size=300)
    assert tokenizer.vocab_size == 300 and tokenizer.eos_id == 299 and tokenizer.bos_id is None
    assert tokenizer.decode([299]) == "<|endoftext|>"
    assert len((ranks / "tokenizer.tiktoken").read_text().splitlines()) == 299
    assert len(tokenizer.encode(PLAIN)) < len(PLAIN) / 2     # merges are used


@BACKENDS
@pytest.mark.parametrize("text", [PLAIN, HARD])
def test_each_id_stands_for_so_many_bytes(kind, text, request):
    tokenizer = Tokenizer.load(request.getfixturevalue(kind))
    lengths = tokenizer.byte_lengths()
    assert lengths[tokenizer.encode(text)].sum() == len(text.encode()) + (kind == "metaspace")  # its ▁ in front
    assert len(lengths) == tokenizer.vocab_size and lengths[tokenizer.eos_id] == 0


def test_an_added_word_that_is_not_special_is_text(byte_level, tmp_path):
    fast = Fast.from_file(str(byte_level / "tokenizer.json"))
    fast.add_tokens(["    "])                                # Pythia's runs of spaces
    fast.add_special_tokens(["<pad>"])
    tokenizer = Tokenizer.load(save(fast, tmp_path))
    assert tokenizer.byte_lengths()[tokenizer.encode("a    <pad>", special=True)].tolist() == [1, 4, 0]


def test_ids_of_padded_embeddings_decode_to_nothing(ranks):
    assert Tokenizer.load(ranks, vocab_size=320).decode([72, 310, 73]) == Tokenizer.load(ranks).decode([72, 73])


def test_ids_in_a_gap_decode_to_nothing(ranks, tmp_path):
    """Ranks below 280 and the special token 299: no token has the ids between, which a model may draw all the same."""
    copy_tokenizer(ranks, tmp_path)
    lines = (ranks / "tokenizer.tiktoken").read_bytes().splitlines()
    (tmp_path / "tokenizer.tiktoken").write_bytes(b"\n".join(lines[:280]))
    tokenizer = Tokenizer.load(tmp_path, 300)
    assert tokenizer.decode([72, 285, 298, 73, 299]) == tokenizer.decode([72, 73]) + "<|endoftext|>"
    stream = TextStream(tokenizer)
    assert "".join([stream.push(i) for i in (72, 285, 286, 287, 288, 289, 73)]) == tokenizer.decode([72, 73])
    assert tokenizer.byte_lengths()[280:].sum() == 0 and len(tokenizer.byte_lengths()) == 300


@BACKENDS
def test_control_tokens_that_a_document_spells_are_text(kind, request):
    tokenizer = Tokenizer.load(request.getfixturevalue(kind))
    end = tokenizer.decode([tokenizer.eos_id])
    text = f"a {end} b{end}"
    for ids in (tokenizer.encode(text), tokenizer.encode_batch(["a", text])[1],
                tokenizer.encode_documents([text], np.uint16)[0][:-1].tolist()):
        assert tokenizer.eos_id not in ids and tokenizer.decode(ids) == text
    prompt = tokenizer.encode_prompt(text)
    assert prompt.count(tokenizer.eos_id) == 2 and prompt == tokenizer.encode(text, special=True)
    assert tokenizer.encode_prompt(text, special=False) == tokenizer.encode(text)


@pytest.mark.parametrize("model", [
    models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *((c, -1.0) for c in "ab</s> ")], unk_id=0),
    models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="<unk>")])
def test_control_tokens_among_the_words_of_a_model(tmp_path, model):
    """What these find in their vocabulary they take, whatever the added tokens are."""
    fast = Fast(model)
    fast.add_special_tokens(["<unk>", "</s>"])
    if isinstance(model, models.WordLevel):
        fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = Tokenizer.load(save(fast, tmp_path))
    ids = tokenizer.encode("a </s> b")
    assert 1 not in ids and ids[0] == tokenizer.encode("a")[0] and ids[-1] == tokenizer.encode("b")[0]
    assert ids.count(0) == 2 * isinstance(model, models.WordLevel)             # "</" and "s>" are unknown words
    assert isinstance(model, models.WordLevel) or tokenizer.decode(ids).replace(" ", "") == "a</s>b"
    tokenizer.fast.normalizer = normalizers.NFKC()
    assert 1 not in tokenizer.encode("a \uff1c/s\uff1e b")                      # spelled only once it is normalised


@BACKENDS
@pytest.mark.parametrize("text", [" " * 1_000_000, "a" * 1_000_000 + "b", "\n" * 600_000 + "x", "\t" * 700_000 + "y",
                                  "." * 600_000], ids=["spaces", "letters", "lines", "tabs", "points"])
def test_long_runs(kind, text, request):
    """tiktoken's own search for words overflows its stack on some: what stands around them is encoded as ever."""
    tokenizer = Tokenizer.load(request.getfixturevalue(kind))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    document, short = tokenizer.encode_documents([f"One. {text}\nTwo", "the"], np.uint16)
    assert tokenizer.decode(document[:-1]) == f"One. {text}\nTwo"
    assert short.tolist() == [*tokenizer.encode("the"), tokenizer.eos_id]


@pytest.mark.parametrize("text", [PLAIN, HARD, "\n\n  \n \tx  ", "12345  '’s\r\n"])
def test_what_stands_in_for_tiktoken_gives_the_same_ids(ranks, monkeypatch, text):
    tokenizer = Tokenizer.load(ranks)
    expected = tokenizer.encode(text)

    def panic(*_, **__):
        raise BaseException("stack overflow")
    monkeypatch.setattr(type(tokenizer.ranks), "encode_to_numpy", panic)
    assert tokenizer.encode(text) == expected


def test_a_text_that_is_refused_ends_nothing(tmp_path, capsys):
    """A WordLevel model without a token for unknown words raises; a panic in Rust is not even an Exception."""
    fast = Fast(models.WordLevel({"a": 0, "</s>": 1}, unk_token="none"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = Tokenizer.load(save(fast, tmp_path))
    for write in range(2):
        total, _ = data.write_shards(["a", "a strange word", "a a"], tokenizer, tmp_path / str(write), 300)
    assert load_tokens(str(tmp_path / "1"), tokenizer, 300)[:].tolist() == [0, 1, 0, 0, 1] and total == 5
    assert capsys.readouterr().out.count("'a strange word'") == 2
    for special in (False, True):
        with pytest.raises(UserError, match="refuses a text .*Missing.* 'strange'"):
            tokenizer.encode_prompt("strange", special)


def test_halves_of_surrogate_pairs(ranks, byte_level):
    for tokenizer in (Tokenizer.load(ranks), Tokenizer.load(byte_level)):
        for special in (False, True):
            assert tokenizer.decode(tokenizer.encode_prompt("a\ud800b\udfff", special)) == "a\ufffdb\ufffd"
    assert list(Texts(["\ud800"])) == ["\ufffd"]


@pytest.mark.parametrize("config,generation,expected", [
    ({"eos_token_id": 3}, {}, (3,)), ({"eos_token_id": [5, 3]}, {"eos_token_id": [3, 7]}, (5, 3, 7)),
    ({"eos_token_id": []}, {"eos_token_id": 4}, (4,)), ({"eos_token_id": [None, 6]}, {"eos_token_id": None}, (6,)),
    ({"eos_token_id": -1}, {}, ()), ({}, {}, ()), ({"eos_token_id": [2, 1000]}, {}, (2,))])
def test_all_ids_that_end_a_text(byte_level, tmp_path, config, generation, expected):
    (tmp_path / "tokenizer.json").write_bytes((byte_level / "tokenizer.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = Tokenizer.load(tmp_path, 290)
    assert tokenizer.eos_ids == expected and tokenizer.eos_id == (expected[0] if expected else None)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')     # the tokenizer's own comes first
    tokenizer = Tokenizer.load(tmp_path, 290)
    assert tokenizer.eos_ids == (0, *expected) and tokenizer.eos_id == 0


@pytest.mark.parametrize("value", [True, "2", 1.5, {"a": 1}, [1, "x"]])
def test_an_end_that_is_no_number_is_named(byte_level, tmp_path, value):
    (tmp_path / "tokenizer.json").write_bytes((byte_level / "tokenizer.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(UserError, match="eos_token_id in config.json is"):
        Tokenizer.load(tmp_path)


def test_training_refuses_too_little(tmp_path):
    with pytest.raises(UserError, match="gives only .* 4096 were asked for"):
        train_tokenizer(["abc abc"], 4096, tmp_path)
    with pytest.raises(UserError, match="too small"):
        train_tokenizer(["abc abc"], 100, tmp_path)


@pytest.mark.parametrize("config,expected", [
    ({"eos_token_id": 3}, 3), ({"eos_token_id": [5, 3]}, 5), ({}, None), ({"eos_token_id": None}, None)])
def test_eos_falls_back_to_the_models_config(byte_level, tmp_path, config, expected):
    (tmp_path / "tokenizer.json").write_bytes((byte_level / "tokenizer.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Tokenizer.load(tmp_path).eos_id == expected


def test_a_tokenizer_of_another_model_is_refused(ranks, byte_level, tmp_path):
    for folder, n in ((ranks, 300), (byte_level, 290)):
        Tokenizer.load(folder, vocab_size=n + 20)            # padded embeddings
        with pytest.raises(UserError, match=f"has {n} ids but the model's vocabulary is {n - 1}: it belongs"):
            Tokenizer.load(folder, vocab_size=n - 1)
    (tmp_path / "tokenizer.json").write_bytes((byte_level / "tokenizer.json").read_bytes())
    (tmp_path / "config.json").write_text('{"eos_token_id": 1000}')
    with pytest.raises(UserError, match="has 1001 ids"):
        Tokenizer.load(tmp_path, vocab_size=290)


def test_added_tokens_beyond_the_vocabulary_are_named(byte_level, tmp_path):
    fast = Fast.from_file(str(byte_level / "tokenizer.json"))
    fast.add_special_tokens(["<pad>"])
    save(fast, tmp_path)
    Tokenizer.load(tmp_path, 291)
    with pytest.raises(UserError, match="added tokens that lie beyond the model's vocabulary of 290: '<pad>' .290."):
        Tokenizer.load(tmp_path, 290)


def test_missing_and_corrupt_tokenizers(ranks, tmp_path):
    with pytest.raises(UserError, match="no tokenizer in .*: need tokenizer.json or tokenizer.tiktoken; copy it"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="no tokenizer in"):
        copy_tokenizer(tmp_path, tmp_path)
    whole = {p.name: p.read_bytes() for p in ranks.iterdir()}
    ranks_file, config_file = "tokenizer.tiktoken", "tokenizer_config.json"
    damaged = {"no config": {ranks_file: whole[ranks_file]},
               "cut": {**whole, ranks_file: whole[ranks_file][:1003]},
               "garbage": {**whole, ranks_file: b"\xff\xfe not base64"},
               "config": {**whole, config_file: whole[config_file][:50]},
               "pattern": {**whole, config_file: whole[config_file].replace(b"(?!", b"(((")},
               "json": {"tokenizer.json": b'{"version": "1.0", "model"'},
               "empty": {"tokenizer.json": b""}}
    for name, files in damaged.items():
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file).write_bytes(content)
        with pytest.raises(UserError, match="cannot be read .* copy its files again"):
            Tokenizer.load(tmp_path / name)


def test_hash_follows_the_files_that_decide_the_ids(ranks, byte_level, tmp_path):
    copy_tokenizer(ranks, tmp_path)
    copy_tokenizer(tmp_path, tmp_path)                  # onto itself: nothing happens
    assert Tokenizer.load(tmp_path).hash == Tokenizer.load(ranks).hash != Tokenizer.load(byte_level).hash
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"pat_str": r"\w+|\W"}))
    assert Tokenizer.load(tmp_path).hash != Tokenizer.load(ranks).hash
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "x"}, indent=1))
    lines = (ranks / "tokenizer.tiktoken").read_bytes().splitlines()
    (tmp_path / "tokenizer.tiktoken").write_bytes(b"\r\n".join(lines[::-1]))
    assert Tokenizer.load(tmp_path).hash == Tokenizer.load(ranks).hash


def rewritten(file, folder, change):
    """A tokenizer of a tokenizer.json after change(its content)."""
    content = json.loads(file.read_text())
    content = change(content) or content
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(content, indent=1, sort_keys=True))
    return Tokenizer.load(folder)


def test_a_tokenizer_is_the_same_however_its_file_is_written(byte_level, tmp_path):
    """As by other versions of the library, which leave out what is off and spell merges as one word."""
    file = byte_level / "tokenizer.json"
    tokenizer = Tokenizer.load(byte_level)

    def swap(vocab, a, b):
        vocab[a], vocab[b] = vocab[b], vocab[a]

    def older(content):
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
        for key in ("byte_fallback", "ignore_merges"):
            del content["model"][key]
        del content["pre_tokenizer"]["use_regex"], content["truncation"]
        content["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}

    assert rewritten(file, tmp_path / "a", older).hash == tokenizer.hash
    assert rewritten(file, tmp_path / "b", lambda c: None).hash == tokenizer.hash
    others = {"lower": lambda c: c | {"normalizer": {"type": "Lowercase"}}, "nfc": lambda c: c | {
                  "normalizer": {"type": "NFC"}}, "nfkc": lambda c: c | {"normalizer": {"type": "NFKC"}},
              "space": lambda c: c["pre_tokenizer"].update(add_prefix_space=True),
              "cut": lambda c: c | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                  {"type": "Split", "pattern": {"Regex": "e"}, "behavior": "Isolated", "invert": False},
                  c["pre_tokenizer"]]}},
              "merges": lambda c: c["model"]["merges"].reverse(),
              "swapped": lambda c: swap(c["model"]["vocab"], "a", "b"),
              "swapped bytes": lambda c: swap(c["model"]["vocab"], "È", "Ê")}       # of scripts that few texts have
    for name, change in others.items():
        other = rewritten(file, tmp_path / name, change)
        assert other.hash != tokenizer.hash, name
        assert other.understands(tokenizer) == (not name.startswith("swapped"))
    more = Fast.from_file(str(file))
    more.add_special_tokens(["<|user|>"])                    # a chat model of the same family
    (tmp_path / "chat").mkdir()
    chat = Tokenizer.load(save(more, tmp_path / "chat"))
    assert chat.understands(tokenizer) and not tokenizer.understands(chat) and chat.hash == tokenizer.hash


def test_a_tokenizer_that_transformers_saved_again(byte_level, tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.PreTrainedTokenizerFast(tokenizer_file=str(byte_level / "tokenizer.json")).save_pretrained(tmp_path)
    again, tokenizer = Tokenizer.load(tmp_path), Tokenizer.load(byte_level)
    assert again.file_hash != tokenizer.file_hash and again.hash == tokenizer.hash


def test_shards_of_older_versions_name_the_bytes_of_the_tokenizer(ranks, byte_level, tmp_path):
    import hashlib
    for folder, names in ((ranks, ("tokenizer.tiktoken", "tokenizer_config.json")), (byte_level, ("tokenizer.json",))):
        old = hashlib.sha256(b"".join((folder / name).read_bytes() for name in names)).hexdigest()
        tokenizer, out = Tokenizer.load(folder), tmp_path / folder.name
        data.write_shards(["one"], tokenizer, out, 300)
        shard = out / "00000.safetensors"
        shard.write_bytes(shard.read_bytes().replace(tokenizer.hash.encode(), old.encode()))
        assert load_tokens(str(out), tokenizer, 300)[:-1].tolist() == tokenizer.encode("one")


def test_what_belongs_to_a_tokenizer_travels_with_it(byte_level, tmp_path):
    source = tmp_path / "source"
    names = ["chat_template.jinja", "chat_template.json", "added_tokens.json", "vocab.json", "merges.txt",
             "special_tokens_map.json", "additional_chat_templates/tool.jinja"]
    (source / "additional_chat_templates").mkdir(parents=True)
    copy_tokenizer(byte_level, source)
    for name in names:
        (source / name).write_text(name)
    (tmp_path / "out").mkdir()
    for _ in range(2):
        copy_tokenizer(source, tmp_path / "out")
    assert all((tmp_path / "out" / name).read_text() == name for name in names)


@BACKENDS
@pytest.mark.parametrize("text", [PLAIN, HARD, "?👩?😀" * 9, "  a the \ufffd 你 the\n", "你好" * 9, "a " * 9])
def test_stream_is_the_whole_decode_and_never_half_a_character(kind, text, request):
    tokenizer = Tokenizer.load(request.getfixturevalue(kind))
    stream = TextStream(tokenizer)
    parts = [stream.push(i) for i in tokenizer.encode(text)]
    assert "".join(parts) + stream.flush() == text
    assert sum(p.count("\ufffd") for p in parts) <= text.count("\ufffd")
    half = tokenizer.encode("👩")[:-1]                       # cut off in the middle, and the same object used again
    assert [stream.push(i) for i in half] == [""] * len(half)
    assert stream.flush().strip("\ufffd") == "" == stream.flush()
    assert "".join([stream.push(i) for i in tokenizer.encode("a")]) == "a"


@BACKENDS
def test_stream_gives_text_out_as_soon_as_it_is_whole(kind, request):
    tokenizer = Tokenizer.load(request.getfixturevalue(kind))
    for text in (PLAIN[:100], "the 你 the"):
        stream, ids, shown = TextStream(tokenizer), tokenizer.encode(text), ""
        for n, i in enumerate(ids, 1):
            shown += stream.push(i)
            whole = tokenizer.decode(ids[:n])
            if not whole.endswith("\ufffd"):
                assert shown == whole


@pytest.mark.parametrize("kind", ["ranks", "byte_level"])
def test_stream_survives_bytes_that_are_no_text(kind, request):
    """An untrained model emits any id: the stream goes on, equals the whole decode and keeps a short window."""
    tokenizer, rng = Tokenizer.load(request.getfixturevalue(kind)), random.Random(0)
    noise = [rng.randrange(tokenizer.vocab_size) for _ in range(2000)]
    emoji = tokenizer.encode("👩")
    for ids in (noise, emoji[-1:] * 50, (emoji * 9)[:-1], [*emoji[-1:] * 6, *emoji]):
        stream, longest = TextStream(tokenizer), 0
        text = ""
        for i in ids:
            text += stream.push(i)
            longest = max(longest, len(stream.ids))
        assert text + stream.flush() == tokenizer.decode(ids)
        assert longest <= 12


# ---------------------------------------------------------------------------------------------------------------------
# Texts

def test_every_kind_of_text_file(tmp_path):
    import pyarrow
    import pyarrow.parquet
    lines = "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(("one", "two 你", "")))
    (tmp_path / "a.txt").write_text("\ufeffplain\r\ntext 你\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(lines)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "d.json").write_text(json.dumps([{"text": "in a list"}]))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["column"], "n": [1]}), tmp_path / "e.parquet")
    (tmp_path / "ignored.csv").write_text("no")
    expected = {"a.txt": ["plain\ntext 你\n"], "b.jsonl": ["one", "two 你", ""], "c.jsonl.gz": ["one", "two 你", ""],
                "d.json": ["in a list"], "e.parquet": ["column"]}
    for name, texts in expected.items():
        assert list(Texts(str(tmp_path / name))) == texts
    assert list(Texts(str(tmp_path))) == sum(expected.values(), [])


def test_texts_that_cannot_be_read(tmp_path):
    for name, content, message in (
            ("columns.jsonl", b'{"content": "x", "title": "y"}\n', "needs a column `text` .* content, title"),
            ("number.jsonl", b'{"text": 3}\n', "needs a column `text` of strings"),
            ("broken.jsonl", b'{"text": \n\n', "broken.jsonl cannot be read"),
            ("latin.txt", b"caf\xe9", "not UTF-8"),
            ("table.csv", b"text\nx", "of no known kind; allowed: .txt")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            list(Texts(str(tmp_path / name)))
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="no text in"):
        list(Texts(str(tmp_path / "folder")))
    for missing in (str(tmp_path / "gone.txt"), "gone.txt", "some/gone.jsonl"):
        with pytest.raises(UserError, match="does not exist: give a file"):
            list(Texts(missing))


def test_only_the_hub_needs_the_datasets_package(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert list(Texts(str(tmp_path / "a.jsonl"))) == ["x"]
    with pytest.raises(UserError, match="needs the package datasets: pip install"):
        list(Texts("owner/name"))


@pytest.mark.parametrize("name", ["part[1].jsonl", "x*.jsonl", "a,b.jsonl", "a#b.jsonl", "a:b@c.jsonl", "A.JSONL",
                                  "**.parquet", "[a].txt", "{a,b}.jsonl", "zip::a.jsonl", "hf:a.jsonl", "~a.jsonl"])
def test_names_are_literal(tmp_path, monkeypatch, name):
    """Another file matches the name as a pattern; what is read is the one of that name, alone or in its folder."""
    write = {"jsonl": lambda path, text: path.write_text(json.dumps({"text": text})), "parquet": write_parquet,
             "txt": lambda path, text: path.write_text(text)}[name.lower().rpartition(".")[-1]]
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run [2], a"
    folder.mkdir()
    write(folder / name, "this one")
    write(folder / re.sub(r"[\[\]*{}]", "", f"part1{name}"), "the other")
    (tmp_path / "b.txt").write_text("b")
    assert list(Texts(str(folder / name))) == ["this one"]
    assert list(Texts(f"b.txt,{folder / name},b.txt")) == ["b", "this one", "b"]
    assert sorted(Texts(f"b.txt,{folder}")) == ["b", "the other", "this one"]
    monkeypatch.chdir(folder)
    assert list(Texts(name)) == ["this one"]


def test_load_tokens_of_names_with_commas(ranks, tmp_path):
    tokenizer, folder = Tokenizer.load(ranks), tmp_path / "a,b"
    data.write_shards(["one"], tokenizer, folder, 300)
    (tmp_path / "c,d.txt").write_text("two")
    tokens = load_tokens(f"{folder},{tmp_path / 'c,d.txt'}", tokenizer, 300)
    assert tokens[:].tolist() == [*tokenizer.encode("one"), 299, *tokenizer.encode("two")]


def test_an_empty_name_is_not_the_folder_one_is_in(ranks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("here")
    for name in ("", "a.txt,", ",a.txt"):
        with pytest.raises(UserError, match="empty name"):
            list(Texts(name))
        with pytest.raises(UserError, match="empty name"):
            load_tokens(name, Tokenizer.load(ranks), 300)


def write_parquet(path, *texts, **columns):
    from pyarrow import parquet, table
    parquet.write_table(table({"text": list(texts)} | columns), path, row_group_size=2)


def test_other_columns_do_not_matter(tmp_path):
    """A column beside that is null, a number, a string, an object, or new in the midst of the file."""
    meta = [None, 1, "a", {"b": [1, "c"]}, [], 2.5, True]
    rows = [{"text": str(i), "meta": m} | {f"new{i}": i} for i, m in enumerate(meta)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert list(Texts(str(tmp_path / "a.jsonl"))) == list("0123456")
    write_parquet(tmp_path / "b.parquet", *"abc", n=[1, None, 3], date=["2020-01-01"] * 3)
    assert list(Texts(str(tmp_path / "b.parquet"))) == list("abc")


@pytest.mark.parametrize("line,text", [
    ('{"text": "2020-01-01"}', "2020-01-01"), ('{"text": "12"}', "12"), ('{"text": "true"}', "true"),
    ('\ufeff{"text": "a"}', "a"), ('{"text": "a"}\r', "a"), ('\n \n{"text": "a"}\n\n', "a"),
    ('{"text": "a", "n": NaN, "m": -Infinity}', "a"), ('{"text": "a", "n": 123456789012345678901234567890}', "a"),
    ('{"text": "b", "text": "a"}', "a"), (r'{"text": "\ud800a\udc00"}', "\ufffda\ufffd"),
    (r'{"text": "\ud83d\ude00"}', "\U0001f600"), (r'{"text": "\"a\" \\ \u0000\n\u2028"}', '"a" \\ \0\n\u2028'),
    ('{"text": "a\u2028b\x85c"}', "a\u2028b\x85c"), ('{\n  "text": "a"\n}', "a"), ('[{"text": "a"}]', "a"),
    ('[\n{"text": "a"}\n]', "a"), ('\ufeff[{"text": "a"}]\n', "a"), ('["a"]', "a")])
def test_json_as_it_comes(ranks, tmp_path, line, text):
    for name, write in (("a.jsonl", lambda p, b: p.write_bytes(b)), ("a.json", lambda p, b: p.write_bytes(b)),
                        ("a.jsonl.gz", lambda p, b: p.write_bytes(gzip.compress(b)))):
        write(tmp_path / name, line.encode())
        assert list(Texts(str(tmp_path / name))) == [text]
    tokenizer = Tokenizer.load(ranks)
    data.write_shards(str(tmp_path), tokenizer, tmp_path / "out", 300, valid_share=1e-9)
    assert tokenizer.decode(load_tokens(str(tmp_path / "out"), tokenizer, 300)[:]) == (text + "<|endoftext|>") * 3


@pytest.mark.parametrize("rows,expected", [([], []), ([None], []), ([None, "a", None, "b", None], ["a", "b"])])
def test_empty_files_and_rows_without_a_text(tmp_path, capsys, rows, expected):
    import pyarrow
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (tmp_path / "b.json").write_text(json.dumps([{"text": row} for row in rows]))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    write_parquet(tmp_path / "d.parquet", *rows)
    kinds = (pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string()))
    for i, kind in enumerate(kinds):
        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(rows, kind)}), tmp_path / f"e{i}.parquet")
    (tmp_path / "f.jsonl.gz").write_bytes(b"")
    pyarrow.parquet.write_table(pyarrow.table({"id": []}), tmp_path / "g.parquet")
    (tmp_path / "z.jsonl").write_text('{"id": 1}\n{"text": "last"}\n{}\n')
    capsys.readouterr()
    assert list(Texts(str(tmp_path))) == [*expected * 6, "last"]
    said = capsys.readouterr().out
    assert said.count(f"{rows.count(None)} rows without a text") == 6 * (None in rows)
    assert said.count("z.jsonl: 2 rows without a text") == 1


@pytest.mark.parametrize("name,content,where", [
    ("a.jsonl", b'{"text": "a"}\n\n{"text": "b', "line 3 is not JSON"), ("a.json", b'[{"text": "a"},\n\n', "line 3"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "line 2"), ("a.jsonl", b'{"text": "a"}{"text": "b"}', "line 1"),
    ("a.jsonl", b'{"text": "a"}\n{"text": ["b"]}\n', "row 2 it is a list"), ("a.jsonl", b'{"text": "a"}\n7', "row 2"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)[:-9], "read behind row"),
    ("a.jsonl.gz", b'{"text": "a"}\n', "behind row 0 .BadGzipFile"), ("a.parquet", b"PAR1", "behind row 0"),
    ("a.jsonl", "\ufeff{}".encode("utf-16"), "line 1")])
def test_damaged_files_are_named_with_the_place(tmp_path, name, content, where):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}.*{where}"):
        list(Texts(str(tmp_path / name)))


def test_a_text_of_another_type_in_parquet(tmp_path):
    for texts, kind in ([1, 2], "int"), ([b"a"], "bytes"), ([{"a": 1}], "dict"):
        write_parquet(tmp_path / "a.parquet", *texts)
        with pytest.raises(UserError, match=f"a.parquet.* in row 1 it is a {kind}"):
            list(Texts(str(tmp_path / "a.parquet")))


def test_a_column_that_no_row_has(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "x"}\n' * 3)
    with pytest.raises(UserError, match="its columns are content"):
        list(Texts(str(tmp_path / "a.jsonl")))
    (tmp_path / "a.jsonl").write_text('{"content": "x"}\n' * 10_000 + '{"text": 1}\n')   # not read to its end
    with pytest.raises(UserError, match="its columns are content"):
        list(Texts(str(tmp_path / "a.jsonl")))


def test_local_files_need_no_cache(ranks, tmp_path):
    """HF_HOME may lie where nobody can write, even where root can."""
    (tmp_path / "file").write_text("")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    write_parquet(tmp_path / "b.parquet", "b")
    p = subprocess.run([sys.executable, "data.py", f"--name={tmp_path / 'a.jsonl'},{tmp_path / 'b.parquet'}",
                        f"--tokenizer={ranks}", f"--out={tmp_path / 'out'}"],
                       cwd=Path(data.__file__).parent, capture_output=True, text=True,
                       env=os.environ | {"HF_HOME": str(tmp_path / "file")})
    assert p.returncode == 0, p.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Shards

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
    monkeypatch.setattr(tokenizer, "eos_id", 255_999)
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
        with pytest.raises(UserError, match="cannot write .*disk full.* set it right, and the same command goes on"):
            data.write_shards([PLAIN], tokenizer, tmp_path, 300)
    assert len(calls) == 2 and not list(tmp_path.glob("*.safetensors"))
    data.write_shards([PLAIN], tokenizer, tmp_path, 300)
    assert list(files(tmp_path)) == ["00000.safetensors"]


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
    tokenizer.eos_id = None
    with pytest.raises(UserError, match="names no end-of-text token"):
        data.write_shards(["a"], tokenizer, tmp_path, 300)


# ---------------------------------------------------------------------------------------------------------------------
# Shards, interrupted

def files(folder):
    """{path in the folder: its bytes}; without what a kill may leave of a file that was being written."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def documents(monkeypatch):
    """60 texts of 0 to 1,700 characters (a shard of 150 tokens has many, or a part of one), some of them twice."""
    rng = random.Random(0)
    texts = [PLAIN[rng.randrange(90):][:rng.choice((0, 5, 40, 40, 150, 1700))] for _ in range(50)]
    texts += rng.sample(texts, 10)
    monkeypatch.setattr(shards, "BATCH", 400)
    monkeypatch.setattr(shards.os, "fsync", lambda fd: None)   # the disk need not keep up
    return texts


def interrupted(texts, after):
    """The texts, and an end with an error after so many."""
    yield from texts[:after]
    raise RuntimeError("pulled the plug")


SETTINGS = {"shard_tokens": 150, "valid_share": 0.3}


def stop_early(monkeypatch, *args, commits=1000, **settings):
    """write_shards until it has written so many times, or all whole shards but not the rest."""
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
    with monkeypatch.context() as patch:                     # one batch: nor do the machine's cores change the bytes
        patch.setattr(shards, "BATCH", 10**6)
        counts = data.write_shards(documents, tokenizer, tmp_path / "whole", 300, max_tokens=limit, **SETTINGS)
    whole, resumed = files(tmp_path / "whole"), 0
    assert limit in (1, 150) or any(name.startswith("valid") for name in whole)
    for n in range(8):
        out, after = tmp_path / str(n), 0
        while after < len(documents):                        # interrupted again and again, each time a bit later
            after += rng.randrange(1, 25)
            try:
                done = data.write_shards(interrupted(documents, after), tokenizer, out, 300, max_tokens=limit,
                                         **SETTINGS)
                break                                        # it had its tokens before the error
            except RuntimeError:
                resumed += (out / shards.UNFINISHED).exists()
                assert (out / shards.UNFINISHED).exists() or not list(out.rglob("*.safetensors"))
        else:
            done = data.write_shards(documents, tokenizer, out, 300, max_tokens=limit, **SETTINGS)
        assert files(out) == whole and done == counts
    assert resumed > 2 or limit in (1, 150)


@pytest.mark.parametrize("before", [True, False])
def test_killed_at_every_write(ranks, tmp_path, documents, monkeypatch, before, capsys):
    """Before and after each shard and state file reaches the disk, and before the last state is removed."""
    tokenizer, documents = Tokenizer.load(ranks), documents[:20]
    data.write_shards(documents, tokenizer, tmp_path / "whole", 300, **SETTINGS)
    whole, replace, left = files(tmp_path / "whole"), shards.replace_file, 0

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
            if left == -1 and set(files(out)) == {*whole, shards.UNFINISHED}:
                break                                        # all is there but for the state being removed
        data.write_shards(documents, tokenizer, out, 300, **SETTINGS)
        assert files(out) == whole, n
    assert n > len(whole)                                    # shards, and states between them
    capsys.readouterr()
    data.write_shards(documents, tokenizer, out, 300, **SETTINGS)
    assert files(out) == whole
    assert "was interrupted: goes on behind" in capsys.readouterr().out


def test_killed_behind_the_last_token(ranks, tmp_path, documents, monkeypatch):
    """--tokens is reached at a shard's border and saved, the rest is not: no document is read any more."""
    tokenizer = Tokenizer.load(ranks)
    for limit in range(150, 1501, 150):
        whole, out = tmp_path / f"whole{limit}", tmp_path / f"out{limit}"
        data.write_shards(documents, tokenizer, whole, 300, max_tokens=limit, **SETTINGS)
        stop_early(monkeypatch, documents, tokenizer, out, 300, max_tokens=limit, **SETTINGS)
        data.write_shards(map(str, range(99)), tokenizer, out, 300, max_tokens=limit, **SETTINGS)
        assert files(out) == files(whole)


def test_kill_9(ranks, tmp_path, documents):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in documents))
    settings = [f"--name={tmp_path / 'a.jsonl'}", f"--tokenizer={ranks}", "--shard_tokens=150", "--valid_share=0.3"]
    data.main([*settings, f"--out={tmp_path / 'whole'}"])
    code = ("import sys, time, data, shards; shards.BATCH, read = 400, shards.open_source\n"
            "shards.open_source = lambda s: (time.sleep(0.05) or row for row in read(s))\n"
            "data.main(sys.argv[1:])")
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", code, *settings, f"--out={out}"], cwd=Path(data.__file__).parent)
    while len(list(out.glob("*.safetensors"))) < 5 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL and (out / shards.UNFINISHED).exists()
    data.main([*settings, f"--out={out}"])
    assert files(out) == files(tmp_path / "whole")


def test_hub_streams_go_on_without_reading_again(ranks, tmp_path, documents, monkeypatch):
    """What lies before the last whole shard may as well be gone from the hub."""
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
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert asked == [("owner/name", None, {"revision": None, "split": "train", "streaming": True})] * 2


def test_several_sources_go_on_in_the_middle(tmp_path):
    """A text file, a folder, JSON lines: from every place the rest is what is left."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("one")
    (tmp_path / "folder" / "b.jsonl").write_text('{"text": "two"}\n{"text": "three"}\n')
    (tmp_path / "c.txt").write_text("four")
    name = f"{tmp_path / 'folder'},{tmp_path / 'c.txt'},{tmp_path / 'folder' / 'b.jsonl'}"
    expected, texts = ["one", "two", "three", "four", "two", "three"], Texts(name)
    for n, text in enumerate(texts, 1):
        assert text == expected[n - 1]
        again = Texts(name, json.loads(json.dumps(texts.position())))
        assert list(again) == expected[n:]
    assert n == 6 and list(Texts(name, texts.position())) == []


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "parquet"])
def test_what_an_older_version_began_goes_on(ranks, tmp_path, documents, monkeypatch, kind):
    """It read local files with datasets, whose state counts the same rows, and knew the tokenizer by its bytes."""
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
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_rows_without_a_text_are_counted_when_work_goes_on(tmp_path):
    rows = [None, "a", None, None, "b", None, "c", None]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": row}) + "\n" for row in rows))
    write_parquet(tmp_path / "b.parquet", *rows)
    for name in (tmp_path / "a.jsonl", tmp_path / "b.parquet"):
        texts, expected = Texts(str(name)), ["a", "b", "c"]
        for n, _ in enumerate(texts, 1):
            assert list(Texts(str(name), texts.position())) == expected[n:]
        assert n == 3


def test_what_was_begun_goes_on_only_as_it_was(ranks, byte_level, tmp_path, documents, monkeypatch):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in documents))
    tokenizer, name, out = Tokenizer.load(ranks), str(tmp_path / "a.jsonl"), tmp_path / "out"

    def write(tokenizer=tokenizer, name=name, **other):
        data.write_shards(name, tokenizer, out, 300, **SETTINGS | other)

    stop_early(monkeypatch, name, tokenizer, out, 300, **SETTINGS)
    for other, message in (({"shard_tokens": 60}, "shard_tokens was 150, is 60"), ({"valid_share": 0.2}, "valid_share"),
                           ({"max_tokens": 9}, "tokens was None, is 9"), ({"name": "o/n"}, "name was .*files was"),
                           ({"tokenizer": Tokenizer.load(byte_level)}, "tokenizer was")):
        with pytest.raises(UserError, match=f"begun with other settings .*{message}.* go on with the same ones, or"):
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
    """Duplicates fall on one side, nothing is on both, nothing is lost, and a larger share holds a smaller one."""
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


def test_a_part_that_is_empty(ranks, tmp_path, capsys):
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
        with pytest.raises(UserError, match="not all written: give the python data.py command .* or remove .*state"):
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


# ---------------------------------------------------------------------------------------------------------------------
# The hub

@pytest.mark.parametrize("name,expected,revision", [
    ("slimpajama", ("gmongaras/SlimPajama-627B_Reupload", None), None), ("pg19", ("emozilla/pg19", None), None),
    ("redpajama", ("togethercomputer/RedPajama-Data-1T-Sample", None), "refs/convert/parquet"),
    ("owner/name:config", ("owner/name", "config"), None), ("o/n@v1.0:c-2", ("o/n", "c-2"), "v1.0")])
def test_names_on_the_hub(monkeypatch, tmp_path, name, expected, revision):
    import datasets
    asked = []

    def hub(*args, **options):
        asked.append((args, options))
        return datasets.Dataset.from_list([{"text": "a", "meta": 1}, {"text": "b", "meta": 2}]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", hub)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pg19").mkdir()                              # as --out=pg19 makes it: not what is read
    (tmp_path / "a.txt").write_text("first")
    assert list(Texts(f"a.txt,{name}")) == ["first", "a", "b"]
    assert asked == [(expected, {"revision": revision, "split": "train", "streaming": True})]


@pytest.mark.parametrize("error,message", [
    (RuntimeError("Dataset scripts are no longer supported, but found n.py"), "--name=o/n@refs/convert/parquet"),
    (ValueError("Compression type zstd not supported"), "pip install zstandard"),
    (ConnectionError("no route"), "o/n cannot be read .*no route.* can be reached")])
def test_hub_errors_say_what_to_do(monkeypatch, error, message):
    def hub(*_, **__):
        raise error
    monkeypatch.setattr("datasets.load_dataset", hub)
    with pytest.raises(UserError, match=message):
        list(Texts("o/n"))


# ---------------------------------------------------------------------------------------------------------------------
# Batches

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


def test_rows_do_not_depend_on_how_they_are_dealt():
    whole = batch(TOKENS, range(24), 10, seed=3)
    for n in (1, 2, 3, 8):
        parts = [batch(TOKENS, range(i, i + n), 10, seed=3) for i in reversed(range(0, 24, n))][::-1]
        assert all(torch.equal(torch.cat([p[k] for p in parts]), whole[k]) for k in (0, 1))
    code = ("import numpy as np; from data import *; t = Tokens([np.arange(101, dtype=np.uint16)]);"
            "print(batch(t, range(24), 10, 3)[0][:, 0].tolist())")
    other = subprocess.run([sys.executable, "-c", code], cwd=data.__file__.rpartition("/")[0], capture_output=True)
    assert json.loads(other.stdout) == whole[0][:, 0].tolist(), other.stderr   # another process sees the same data


def test_batches_prepared_ahead_are_the_same_in_the_same_order(monkeypatch):
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


def test_an_error_while_preparing_ahead_comes_where_its_batch_would(monkeypatch):
    real = data.batch
    monkeypatch.setattr(data, "batch", lambda tokens, numbers, *rest: real(tokens, numbers, *rest) if 6 not in numbers
                        else 1 / 0)
    threads = threading.active_count()
    stream = data.batches(TOKENS, [range(i, i + 3) for i in range(0, 30, 3)], 10, 3, torch.device("cpu"))
    assert len([next(stream), next(stream)]) == 2
    with pytest.raises(ZeroDivisionError):
        next(stream)
    assert threading.active_count() == threads                         # nobody left to wait for


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
    """Gemma without BOS is lost: each window starts with it and predicts the window's own first token from it."""
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


def test_stream_goes_on_from_a_prompt(metaspace):
    """A decoder that strips the first space of a text must not strip that of a continuation."""
    tokenizer = Tokenizer.load(metaspace)
    ids = tokenizer.encode("a the")
    stream = TextStream(tokenizer, ids[:1])
    assert "".join(stream.push(i) for i in ids[1:]) == " the"


@pytest.mark.parametrize("prompt", [[], [2], [1], [1, 2]])
def test_a_new_text_begins_as_the_decoder_begins_one(metaspace, prompt):
    """Behind nothing but control tokens the first word's space is stripped, as it is of the whole text."""
    tokenizer = Tokenizer.load(metaspace)
    stream = TextStream(tokenizer, prompt)
    assert "".join(stream.push(i) for i in tokenizer.encode("a the")) + stream.flush() == "a the"


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


def test_a_tokenizer_is_never_replaced(ranks):
    with pytest.raises(UserError, match="has a tokenizer already"):
        train_tokenizer([PLAIN], 300, ranks)


def test_a_tokenizer_trained_in_another_locale(tmp_path):
    (tmp_path / "a.txt").write_text(PLAIN + "naïve ’ 你", encoding="utf-8")
    train_tokenizer(Texts(str(tmp_path / "a.txt")), 300, tmp_path / "here")
    subprocess.run([sys.executable, "data.py", f"--name={tmp_path / 'a.txt'}", "--train_tokenizer=300",
                    f"--out={tmp_path / 'there'}"], cwd=Path(data.__file__).parent, check=True,
                   env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    assert files(tmp_path / "there") == files(tmp_path / "here")


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("at", [1, 2])
def test_half_a_tokenizer_bars_no_way(ranks, tmp_path, monkeypatch, call, at):
    real, calls = getattr(shards.os, call), []

    def fail(*args):
        calls.append(args)
        if len(calls) == at:
            raise OSError("disk full")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(shards.os, call, fail)
        with pytest.raises(UserError, match="cannot write .*disk full"):
            train_tokenizer([PLAIN, "?👩?😀?🚀" * 20], 300, tmp_path)
    with pytest.raises(UserError, match="no tokenizer in"):
        Tokenizer.load(tmp_path)
    train_tokenizer([PLAIN, "?👩?😀?🚀" * 20], 300, tmp_path)
    assert files(tmp_path) == files(ranks)


def test_a_folder_that_cannot_be_written_is_found_out_before_the_training(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(UserError, match="cannot be written"):
            train_tokenizer(interrupted([], 0), 300, out)


@pytest.mark.parametrize("flag", ["--tokens=9", "--valid_share=0.1", "--shard_tokens=9", "--tokenizer=x",
                                  "--vocab_size=9"])
def test_settings_of_shards_are_refused_where_a_tokenizer_is_trained(tmp_path, flag):
    with pytest.raises(UserError, match=f"{flag.partition('=')[0]}.* --train_tokenizer writes none"):
        data.main(["--train_tokenizer=300", f"--out={tmp_path / 'out'}", flag])
    assert not (tmp_path / "out").exists()


def test_training_reads_no_hub_dataset_into_memory(ranks):
    with pytest.raises(UserError, match="python data.py --name=owner/name"):
        load_tokens("owner/name", Tokenizer.load(ranks), 300)


# ---------------------------------------------------------------------------------------------------------------------

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
    clean = runpy.run_path(data.__file__.replace("data.py", "runs/books.py"))["clean"]
    wrapped = ("It was a _dark_ and stormy night; the rain fell in torrents,\n"
               "except at  occasional intervals, when it was checked by a\nviolent gust of wind.")
    verse = "Tyger tyger, burning bright,\n  In the forests of the night;"
    text = f"TRENCK***\n\n\nProduced by\nSomebody\n\n\n[Illustration: a\nboat]\n\n{wrapped}\n\n   * * *\n\n{verse}\r\n"
    assert clean(text) == (
        "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals, when it was "
        "checked by a violent gust of wind.\n\n"
        "* * *\n\nTyger tyger, burning bright,\nIn the forests of the night;\n")
