"""lib/texts.py: documents from every kind of file and from the hub, and the errors for damaged ones."""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lib import data
from lib.cli import UserError
from lib.data import Texts, load_tokens
from lib.texts import find_sources
from lib.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent


def write_parquet(path, *texts, **columns):
    from pyarrow import parquet, table
    parquet.write_table(table({"text": list(texts)} | columns), path, row_group_size=2)


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
            ("table.csv", b"text\nx", "of an unknown kind; allowed: .txt")):
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
    """Names are no patterns: only the file of that name is read, although another one would match."""
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


def test_an_empty_name_does_not_mean_the_current_folder(ranks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("here")
    for name in ("", "a.txt,", ",a.txt"):
        with pytest.raises(UserError, match="empty name"):
            list(Texts(name))
        with pytest.raises(UserError, match="empty name"):
            load_tokens(name, Tokenizer.load(ranks), 300)


def test_other_columns_do_not_matter(tmp_path):
    """Another column may be null, a number, a string, an object, or begin in the middle of the file."""
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
def test_variants_of_json(ranks, tmp_path, line, text):
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
    ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)[:-9], "read after row"),
    ("a.jsonl.gz", b'{"text": "a"}\n', "after row 0 .BadGzipFile"), ("a.parquet", b"PAR1", "after row 0"),
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
    """Reading them works although HF_HOME cannot be written."""
    (tmp_path / "file").write_text("")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    write_parquet(tmp_path / "b.parquet", "b")
    p = subprocess.run([sys.executable, "-m", "lib.data", f"--name={tmp_path / 'a.jsonl'},{tmp_path / 'b.parquet'}",
                        f"--tokenizer={ranks}", f"--out={tmp_path / 'out'}"],
                       cwd=ROOT, capture_output=True, text=True,
                       env=os.environ | {"HF_HOME": str(tmp_path / "file")})
    assert p.returncode == 0, p.stderr


def test_reading_continues_in_the_middle_of_several_sources(tmp_path):
    """From every position in a text file, a folder or JSON lines exactly the remaining texts follow."""
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


def test_rows_without_a_text_count_in_the_position(tmp_path):
    rows = [None, "a", None, None, "b", None, "c", None]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": row}) + "\n" for row in rows))
    write_parquet(tmp_path / "b.parquet", *rows)
    for name in (tmp_path / "a.jsonl", tmp_path / "b.parquet"):
        texts, expected = Texts(str(name)), ["a", "b", "c"]
        for n, _ in enumerate(texts, 1):
            assert list(Texts(str(name), texts.position())) == expected[n:]
        assert n == 3


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
    (tmp_path / "pg19").mkdir()                              # as --out=pg19 makes it; not read
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


def test_the_copy_in_parquet_is_named_with_config_and_split(monkeypatch):
    def hub(*_, **__):
        raise RuntimeError("Dataset scripts are no longer supported, but found n.py")
    monkeypatch.setattr("datasets.load_dataset", hub)
    with pytest.raises(UserError) as e:
        list(Texts("o/n:en#test"))
    name = str(e.value).partition("--name=")[2]
    assert name == "o/n@refs/convert/parquet:en#test" and find_sources(name) == [name]
