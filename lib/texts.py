"""Documents streamed from text files, JSON lines, parquet, folders, and data sets on the Hugging Face hub."""

import gzip
import json
import os
import re
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from lib.cli import UserError, print0
from lib.tokenizer import well_formed

TEXT_FILES = (".txt", ".jsonl", ".jsonl.gz", ".json", ".parquet")
ALIASES = {  # the paper's texts as the hub has them in parquet, with a column `text`; ./pg19 is a folder of that name
    "slimpajama": "gmongaras/SlimPajama-627B_Reupload",      # cerebras/SlimPajama-627B itself is gone
    "redpajama": "togethercomputer/RedPajama-Data-1T-Sample@refs/convert/parquet",  # elsewhere only as a script
    "pg19": "emozilla/pg19",                                 # deepmind/pg19 is a script too
}


class Texts:
    """The documents of files, folders and hub data sets (see `find_sources`), streamed one after another.

    position: what `position()` of an earlier Texts with the same name returned; iteration continues after the
    document that one yielded last. Rows without a text are skipped and counted. An iterable of strings may be
    given instead of a name. Raises UserError for sources that do not exist or cannot be read.
    """

    def __init__(self, name: str | Iterable[str], position: list | None = None):
        self.sources = find_sources(name) if isinstance(name, str) else [name]
        self.source, self.rows, self.state = position or (0, 0, None)
        self.stream = None

    def __iter__(self) -> Iterator[str]:
        while self.source < len(self.sources):
            with explain_errors(self):
                yield from self.read_source(self.sources[self.source])
            self.source, self.rows, self.state = self.source + 1, 0, None

    def read_source(self, source: str | Iterable[str]) -> Iterator[str]:
        """The texts of one source, from its row number self.rows on."""
        empty, unnamed, columns = 0, 0, ()
        for row in self.open_at_position(source):
            row = row if isinstance(row, dict) else {"text": row}
            text = row.get("text")
            self.rows += 1
            if isinstance(text, str):
                yield well_formed(text)
            elif text is not None:
                raise UserError(f"{source} needs a column `text` of strings; in row {self.rows} it is a "
                                f"{type(text).__name__}: {str(text)[:60]}")
            else:
                empty, unnamed, columns = empty + 1, unnamed + ("text" not in row), columns or tuple(row)
                if unnamed == self.rows == 10_000:           # the rest will have no such column either
                    break
        if 0 < unnamed == self.rows:
            raise UserError(f"{source} needs a column `text` of strings; its columns are {', '.join(columns)}")
        if empty:
            print0(f"{source}: {empty:,} rows without a text were left out")

    def open_at_position(self, source: str | Iterable[str]) -> Iterable:
        self.stream = open_source(source)
        if self.state and hasattr(self.stream, "load_state_dict"):   # datasets then downloads nothing twice
            self.stream.load_state_dict(self.state)
            return self.stream
        return islice(self.stream, self.rows, None)

    def position(self) -> list:
        """[index of the source, rows read of it, state of its stream], ready for JSON."""
        state = self.stream.state_dict() if hasattr(self.stream, "state_dict") else None
        return [self.source, self.rows, state]


def split_names(names: str) -> list[str]:
    """The names in a comma-separated list. Parts that together name an existing file are one name, for file
    names may contain commas. Raises UserError for an empty name, which would mean the current folder."""
    parts, found = names.split(","), []
    while parts:
        n = next((n for n in range(len(parts), 1, -1) if os.path.exists(",".join(parts[:n]))), 1)
        found.append(",".join(parts[:n]))
        parts = parts[n:]
    if "" in found:
        raise UserError(f"{names!r} has an empty name in it: give files, folders or data sets, separated by commas")
    return found


def find_sources(name: str) -> list[str]:
    """The files and hub data sets, in order, that a comma-separated list stands for.

    A name is an alias, a file (TEXT_FILES), a folder of them, or a data set on the Hugging Face hub as
    `owner/name[@revision][:config][#split]` (split train by default). Raises UserError for anything else.
    """
    sources = []
    for part in split_names(name):
        alias, sharp, split = part.partition("#")
        part = ALIASES.get(alias, alias) + sharp + split
        file, is_text = Path(part), part.lower().endswith(TEXT_FILES)
        if file.is_dir():
            files = sorted(str(p) for p in file.iterdir() if p.name.lower().endswith(TEXT_FILES) and not p.is_dir())
            if not files:
                raise UserError(f"no text in {file}: looked for {', '.join(TEXT_FILES)}")
            sources += files
        elif file.is_file() and not is_text:
            raise UserError(f"{file} is of an unknown kind; allowed: {', '.join(TEXT_FILES)}")
        elif not file.is_file() and (is_text or not split_hub_id(part)):
            raise UserError(f"{part} does not exist: give a file ({', '.join(TEXT_FILES)}), a folder of them, "
                            f"{', '.join(ALIASES)}, or a Hugging Face dataset as owner/name[:config][#split]")
        else:
            sources.append(part)
    return sources


def split_hub_id(path: str) -> re.Match | None:
    """A match with the groups name, revision, config and split, or None."""
    return re.fullmatch(r"(?P<name>[\w-][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<config>[\w.-]+))?"
                        r"(#(?P<split>[\w.-]+))?", path)


def open_source(source: str | Iterable[str]) -> Iterable:
    """The rows of a source: strings, or dictionaries with the key `text`.

    Hub data sets are datasets.IterableDataset, whose state can be saved. Local files are read without the
    datasets package, which would guess column types and treat names as patterns.
    """
    if not isinstance(source, str):
        return source
    file, name = Path(source), source.lower()
    if file.is_file():
        return read_text(file) if name.endswith(".txt") else read_parquet(file) if name.endswith(".parquet") else (
            read_json_rows(file))
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f"reading {source} needs the package datasets: pip install datasets, or give files") from None
    hub = split_hub_id(source)
    return load_dataset(hub["name"], hub["config"], revision=hub["revision"], split=hub["split"] or "train",
                        streaming=True)


def read_text(file: Path) -> Iterator[str]:
    try:
        yield file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{file} is not UTF-8 ({e.reason} at byte {e.start}); convert it, e.g. with iconv") from e


def read_parquet(file: Path) -> Iterator[dict]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"reading {file} needs the package pyarrow: pip install pyarrow") from None
    with ParquetFile(file) as table:
        names = table.schema_arrow.names
        if "text" not in names and table.metadata.num_rows:
            raise UserError(f"{file} needs a column `text` of strings; its columns are {', '.join(names)}")
        for batch in table.iter_batches(100, columns=["text"]):  # few rows at once: each may be a whole book
            yield from batch.to_pylist()


def read_json_rows(file: Path) -> Iterator:
    """The rows of JSON lines, or of a file that holds one array of rows or one row of several lines."""
    with (gzip.open if file.suffix.lower() == ".gz" else open)(file, "rb") as lines:
        first = True
        for number, line in enumerate(lines, 1):
            line = line.removeprefix(BOM_UTF8).strip()
            if not line:
                continue
            whole = first and (line.startswith(b"[") or line == b"{")
            try:
                row = json.loads(line + b"\n" + lines.read() if whole else line)
            except ValueError as e:
                number += getattr(e, "lineno", 1) - 1
                raise UserError(f"{file} cannot be read: line {number} is not JSON, or incomplete ("
                                f"{getattr(e, 'msg', e)}); mend or remove it") from e
            yield from row if whole and isinstance(row, list) else [row]
            first = False


@contextmanager
def explain_errors(texts: Texts):
    """Turn any error while reading, from a missing data set to a damaged file, into a UserError that names
    the place and the likely remedy."""
    source = texts.sources[texts.source]
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        if not isinstance(source, str):                      # the caller's own iterable
            raise
        hint = ("give a file or folder that exists, or a dataset on the Hugging Face hub that can be reached; "
                "shards already written are kept, and the same command continues from them")
        if os.path.exists(source):
            hint = "it may be damaged or cut short: get it again, or leave it out"
        elif "scripts are no longer supported" in str(e):
            name = split_hub_id(source)["name"]
            hint = ("datasets runs no scripts; most have a copy in parquet: --name="
                    + source.replace(name, f"{name}@refs/convert/parquet", 1))
        elif "zstd" in str(e):
            hint = "its files are compressed with zstd: pip install zstandard"
        raise UserError(f"{source} cannot be read after row {texts.rows} ({type(e).__name__}: {str(e)[:200]}); "
                        f"{hint}") from e
