"""lib/tokenizer.py: tokenizers of three kinds in and out, text streamed from ids, and training one."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_tokenizers import BACKENDS, HARD, PLAIN, save
from tiny import contents
from tokenizers import Tokenizer as Fast
from tokenizers import models, normalizers, pre_tokenizers

from lib import data, shards
from lib.bpe import train_tokenizer
from lib.cli import UserError
from lib.data import Texts, load_tokens
from lib.tokenizer import TextStream, Tokenizer, copy_tokenizer

ROOT = Path(__file__).resolve().parent.parent


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
    """Ranks below 280 and the special token 299: a model may draw the ids between, though no token has them."""
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
    """These models use any token of their vocabulary, also control tokens."""
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
    assert 1 not in tokenizer.encode("a \uff1c/s\uff1e b")                      # a control token once normalised


@BACKENDS
@pytest.mark.parametrize("text", [" " * 1_000_000, "a" * 1_000_000 + "b", "\n" * 600_000 + "x", "\t" * 700_000 + "y",
                                  "." * 600_000], ids=["spaces", "letters", "lines", "tabs", "points"])
def test_long_runs(kind, text, request):
    """tiktoken's regular expression overflows its stack on some of them; the text around them is encoded as usual."""
    tokenizer = Tokenizer.load(request.getfixturevalue(kind))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    document, short = tokenizer.encode_documents([f"One. {text}\nTwo", "the"], np.uint16)
    assert tokenizer.decode(document[:-1]) == f"One. {text}\nTwo"
    assert short.tolist() == [*tokenizer.encode("the"), tokenizer.eos_id]


@pytest.mark.parametrize("text", [PLAIN, HARD, "\n\n  \n \tx  ", "12345  '’s\r\n"])
def test_the_fallback_for_tiktoken_gives_the_same_ids(ranks, monkeypatch, text):
    tokenizer = Tokenizer.load(ranks)
    expected = tokenizer.encode(text)

    def panic(*_, **__):
        raise BaseException("stack overflow")
    monkeypatch.setattr(type(tokenizer.ranks), "encode_to_numpy", panic)
    assert tokenizer.encode(text) == expected


def test_refused_texts_are_left_out_with_a_warning(tmp_path, capsys):
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
    ({"eos_token_id": -1}, {}, ()), ({"eos_token_id": None}, {}, ()), ({}, {}, ()),
    ({"eos_token_id": [2, 1000]}, {}, (2,))])
def test_all_ids_that_end_a_text(byte_level, tmp_path, config, generation, expected):
    (tmp_path / "tokenizer.json").write_bytes((byte_level / "tokenizer.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = Tokenizer.load(tmp_path, 290)
    assert tokenizer.eos_ids == expected
    assert tokenizer.eos_id == (expected if len(expected) > 1 else expected[0] if expected else None)
    assert Tokenizer.load(tmp_path).eos_ids[:len(expected)] == expected          # without the model's vocabulary size
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')     # the tokenizer's own comes first
    tokenizer = Tokenizer.load(tmp_path, 290)
    assert tokenizer.eos_ids == (0, *expected)


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
    """The tokenizer of a tokenizer.json to whose content `change` was applied."""
    content = json.loads(file.read_text())
    content = change(content) or content
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(content, indent=1, sort_keys=True))
    return Tokenizer.load(folder)


def test_the_hash_does_not_depend_on_how_the_file_is_written(byte_level, tmp_path):
    """Other versions of the library leave out defaults and write each merge as one string."""
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


def test_a_tokenizer_saved_again_by_transformers_has_the_same_hash(byte_level, tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.PreTrainedTokenizerFast(tokenizer_file=str(byte_level / "tokenizer.json")).save_pretrained(tmp_path)
    again, tokenizer = Tokenizer.load(tmp_path), Tokenizer.load(byte_level)
    assert again.file_hash != tokenizer.file_hash and again.hash == tokenizer.hash


def test_all_files_of_a_tokenizer_are_copied(byte_level, tmp_path):
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
    half = tokenizer.encode("👩")[:-1]                       # an incomplete character, then the same stream again
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
    """An untrained model emits any id: the text equals the whole decode, and the window stays short."""
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


def test_stream_continues_a_prompt(metaspace):
    """A decoder that strips the first space of a text must not strip that of a continuation."""
    tokenizer = Tokenizer.load(metaspace)
    ids = tokenizer.encode("a the")
    stream = TextStream(tokenizer, ids[:1])
    assert "".join(stream.push(i) for i in ids[1:]) == " the"


@pytest.mark.parametrize("prompt", [[], [2], [1], [1, 2]])
def test_the_first_space_of_a_new_text_is_stripped_as_by_the_decoder(metaspace, prompt):
    """After control tokens alone the first space is stripped, as by decoding the whole text."""
    tokenizer = Tokenizer.load(metaspace)
    stream = TextStream(tokenizer, prompt)
    assert "".join(stream.push(i) for i in tokenizer.encode("a the")) + stream.flush() == "a the"


def test_a_tokenizer_is_never_replaced(ranks):
    with pytest.raises(UserError, match="has a tokenizer already"):
        train_tokenizer([PLAIN], 300, ranks)


def test_a_tokenizer_trained_in_another_locale(tmp_path):
    (tmp_path / "a.txt").write_text(PLAIN + "naïve ’ 你", encoding="utf-8")
    train_tokenizer(Texts(str(tmp_path / "a.txt")), 300, tmp_path / "here")
    subprocess.run([sys.executable, "-m", "lib.data", f"--name={tmp_path / 'a.txt'}", "--train_tokenizer=300",
                    f"--out={tmp_path / 'there'}"], cwd=ROOT, check=True,
                   env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("at", [1, 2])
def test_a_failed_write_leaves_no_tokenizer_and_can_be_repeated(ranks, tmp_path, monkeypatch, call, at):
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
    assert contents(tmp_path) == contents(ranks)


def test_an_unwritable_folder_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(UserError, match="cannot be written"):
            train_tokenizer((pytest.fail("read") for _ in "a"), 300, out)
