"""Text -> token shards: documents streamed from files or the hub, tokenised on all cores, written so that what is
interrupted goes on and ends in the same bytes."""

import gzip
import hashlib
import json
import os
import re
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lib.cli import UserError, print0, progress
from lib.tokenizer import Tokenizer, replace_file, well_formed

TEXT_FILES = (".txt", ".jsonl", ".jsonl.gz", ".json", ".parquet")
ALIASES = {  # the paper's texts as the hub has them in parquet, with a column `text`; ./pg19 is a folder of that name
    "slimpajama": "gmongaras/SlimPajama-627B_Reupload",      # cerebras/SlimPajama-627B itself is gone
    "redpajama": "togethercomputer/RedPajama-Data-1T-Sample@refs/convert/parquet",  # else a script, which nobody runs
    "pg19": "emozilla/pg19",                                 # deepmind/pg19 is a script too
}
UNFINISHED = "resume.state"              # beside shards that are not all written; what is needed to go on
BATCH = 1_000_000 * min(max(os.cpu_count() or 1, 4), 16)  # characters encoded at once, at some 40 bytes for each


# ---------------------------------------------------------------------------------------------------------------------
# Text -> tokens

class Texts:
    """The documents of files, folders and hub data sets (`find_sources`), one after the other, streamed.

    position: of an earlier Texts with the same name, to go on behind the document it gave last. Rows without a text are
    left out and counted. Raises UserError for what is not there or cannot be read. Instead of a name, texts themselves
    will do.
    """

    def __init__(self, name: str | Iterable[str], position: list | None = None):
        self.sources = find_sources(name) if isinstance(name, str) else [name]
        self.source, self.rows, self.state = position or (0, 0, None)
        self.stream = None

    def __iter__(self) -> Iterator[str]:
        while self.source < len(self.sources):
            source, empty, unnamed, columns = self.sources[self.source], 0, 0, ()
            with readable(self):
                self.stream, skip = open_source(source), self.rows
                if self.state and hasattr(self.stream, "load_state_dict"):  # datasets downloads nothing twice
                    self.stream.load_state_dict(self.state)
                    skip = 0
                for row in islice(self.stream, skip, None):
                    row = row if isinstance(row, dict) else {"text": row}
                    text, self.rows = row.get("text"), self.rows + 1
                    if isinstance(text, str):
                        yield well_formed(text)
                        continue
                    if text is not None:
                        raise UserError(f"{source} needs a column `text` of strings; in row {self.rows} it is a "
                                        f"{type(text).__name__}: {str(text)[:60]}")
                    empty, unnamed, columns = empty + 1, unnamed + ("text" not in row), columns or tuple(row)
                    if unnamed == self.rows == 10_000:       # nor will the rest have it
                        break
            if 0 < unnamed == self.rows:
                raise UserError(f"{source} needs a column `text` of strings; its columns are {', '.join(columns)}")
            if empty:
                print0(f"{source}: {empty:,} rows without a text were left out")
            self.source, self.rows, self.state = self.source + 1, 0, None

    def position(self) -> list:
        """[source, rows read of it, state of its stream], ready for JSON."""
        state = self.stream.state_dict() if hasattr(self.stream, "state_dict") else None
        return [self.source, self.rows, state]


def split_names(names: str) -> list[str]:
    """The names in a list by comma. Several that make up the name of something that exists are that one: a file's own
    name may have commas. Raises UserError for an empty one, which would be the folder that one is in."""
    parts, found = names.split(","), []
    while parts:
        n = next((n for n in range(len(parts), 1, -1) if os.path.exists(",".join(parts[:n]))), 1)
        found.append(",".join(parts[:n]))
        parts = parts[n:]
    if "" in found:
        raise UserError(f"{names!r} has an empty name in it: give files, folders or data sets, by comma")
    return found


def find_sources(name: str) -> list[str]:
    """What is to be read, in order, for a name or several by comma: an alias, a file (TEXT_FILES), a folder of them, or
    a data set on the Hugging Face hub, `owner/name[@revision][:config]`, with #split behind it where that is not train.
    Raises UserError if it is none of them."""
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
            raise UserError(f"{file} is of no known kind; allowed: {', '.join(TEXT_FILES)}")
        elif not file.is_file() and (is_text or not split_hub_id(part)):
            raise UserError(f"{part} does not exist: give a file ({', '.join(TEXT_FILES)}), a folder of them, "
                            f"{', '.join(ALIASES)}, or a Hugging Face dataset as owner/name[:config][#split]")
        else:
            sources.append(part)
    return sources


def split_hub_id(path: str):
    """A match with the groups name, revision, config and split, or None."""
    return re.fullmatch(r"(?P<name>[\w-][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<config>[\w.-]+))?"
                        r"(#(?P<split>[\w.-]+))?", path)


def open_source(source: str | Iterable[str]) -> Iterable:
    """The rows of a source: texts, or dictionaries with a `text`. Only those of the hub, a datasets.IterableDataset,
    have a state; local files are read without datasets, whose types and patterns are not theirs."""
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
        for batch in table.iter_batches(100, columns=["text"]):  # of a row group; books are large
            yield from batch.to_pylist()


def read_json_rows(file: Path) -> Iterator:
    """The rows of JSON lines, or of a file that is one array of them or one row in several lines."""
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
                raise UserError(f"{file} cannot be read: line {number} is not JSON, or only a part ("
                                f"{getattr(e, 'msg', e)}); mend or remove it") from e
            yield from row if whole and isinstance(row, list) else [row]
            first = False


@contextmanager
def readable(texts: Texts):
    """Whatever goes wrong, from a missing data set to a broken file, becomes a UserError that says where and what to
    do."""
    source = texts.sources[texts.source]
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        if not isinstance(source, str):                      # texts that were given: not ours to explain
            raise
        hint = ("it should be a file or folder that is here, or a dataset on the Hugging Face hub that can be reached; "
                "shards that are written stay, and the same command goes on from them")
        if os.path.exists(source):
            hint = "it may be damaged or cut short: get it again, or leave it out"
        elif "scripts are no longer supported" in str(e):
            hint = f"datasets runs no scripts; most have a copy in parquet: --name={source}@refs/convert/parquet"
        elif "zstd" in str(e):
            hint = "its files are compressed with zstd: pip install zstandard"
        raise UserError(f"{source} cannot be read behind row {texts.rows} ({type(e).__name__}: {str(e)[:200]}); "
                        f"{hint}") from e


def read_batches(texts: Texts) -> Iterator[tuple[list[str], list]]:
    """Documents, none empty, that are encoded together, and the position behind them.

    A document is never split, that could change its ids: so a batch has to be large for whole books to fill all cores.
    """
    held, size = [], 0
    for text in texts:
        if text:
            held.append(text)
            size += len(text)
        if size >= BATCH:
            yield held, texts.position()
            held, size = [], 0
    if held:
        yield held, texts.position()


def encode_batches(texts: Texts, tokenizer: Tokenizer, vocab_size: int) -> Iterator[tuple[list, list, list]]:
    """(documents, ids of each with EOS behind them, position) per batch, while the next one is read.

    The ids have the smallest type that holds the model's vocabulary.
    """
    if tokenizer.eos_id is None:
        raise UserError("the tokenizer names no end-of-text token, so documents would run together; "
                        "set eos_token in tokenizer_config.json")
    for held, position in ahead(read_batches(texts)):
        yield held, tokenizer.encode_documents(held, token_type(vocab_size)), position


def ahead(items: Iterable) -> Iterator:
    """The same items; the next is made in a thread while the caller works on one. Rust and the network free the GIL."""
    items = iter(items)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item


def token_type(vocab_size: int) -> type:
    return np.uint16 if vocab_size <= 65536 else np.uint32   # Gemma's 256,000 entries do not fit into 16 bits


def held_out(text: str, share: float) -> bool:
    """True for about `share` of all texts; the text alone decides, so a duplicate is never on the other side."""
    return share > 0 and int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < share * 2**64


# ---------------------------------------------------------------------------------------------------------------------
# Tokens -> shards

class Shards:
    """Tokens on their way into folder/00000.safetensors, 00001.safetensors, ... (one tensor each, `tokens`)."""

    def __init__(self, folder: Path, size: int, vocab_size: int, tokenizer: str):
        self.folder, self.size = folder, size                # tokens in a whole shard
        self.metadata = {"vocab_size": str(vocab_size), "tokenizer": tokenizer}
        self.held = [np.empty(0, token_type(vocab_size))]    # not yet in a shard
        self.written, self.total = 0, 0                      # shards on the disk; tokens in them and held

    def add(self, ids: np.ndarray) -> None:
        self.held.append(ids)
        self.total += len(ids)

    def path(self, i: int) -> Path:
        return self.folder / f"{i:05d}.safetensors"

    def full(self) -> bool:
        return sum(map(len, self.held)) >= self.size

    def write(self, last: bool = False) -> None:
        """All whole shards that are held go to the disk, and with `last` what is left as well."""
        rest = np.concatenate(self.held)
        while len(rest) >= self.size or (last and len(rest)):
            replace_file(self.path(self.written), shard_bytes(rest[:self.size], self.metadata))
            rest = rest[self.size:]
            self.written += 1
        self.held = [rest.copy()]                            # a view would keep the written ones in memory


def shard_bytes(tokens: np.ndarray, metadata: dict[str, str]) -> bytes:
    """A safetensors file; unlike those of its own `save`, which shuffles the metadata, the same bytes every time."""
    entry = {"dtype": f"U{8 * tokens.itemsize}", "shape": [len(tokens)], "data_offsets": [0, tokens.nbytes]}
    header = json.dumps({"__metadata__": metadata, "tokens": entry}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + tokens.tobytes()


def write_shards(name: str | Iterable[str], tokenizer: Tokenizer, folder, vocab_size: int,
                 shard_tokens: int = 100_000_000, max_tokens: int | None = None,
                 valid_share: float = 0.0) -> tuple[int, int]:
    """(tokens in the shards in `folder`, tokens of the held-out documents, whose shards are in folder/valid).

    What was interrupted goes on where its last whole shard ended, and ends in the same bytes. Raises UserError for a
    folder that is finished or was begun with other settings, for a full disk, and for text without a token to train on.
    """
    folder = Path(folder)
    parts = {"train": Shards(folder, shard_tokens, vocab_size, tokenizer.hash),
             "valid": Shards(folder / "valid", shard_tokens, vocab_size, tokenizer.hash)}
    settings = {"name": name if isinstance(name, str) else "texts", "files": describe_files(name),
                "tokenizer": tokenizer.hash[:16], "vocab_size": vocab_size, "tokens": max_tokens,
                "shard_tokens": shard_tokens, "valid_share": valid_share}
    position = read_state(folder, settings, tokenizer.hashes, parts)
    try:
        fill_shards(Texts(name, position), tokenizer, vocab_size, settings, parts)
    except OSError as e:
        raise UserError(f"cannot write {e.filename or folder} ({e.strerror or e}); the shards that are written stay: "
                        "set it right, and the same command goes on behind them") from e
    if valid_share and parts["valid"].total == 0:
        print0(f"warning: no document fell into the held-out part, so there is no {folder / 'valid'}: start again with "
               f"more than --valid_share={valid_share}, or give train.py another text as --valid")
    return parts["train"].total, parts["valid"].total


def fill_shards(texts: Texts, tokenizer: Tokenizer, vocab_size: int, settings: dict, parts: dict[str, Shards]) -> None:
    """All documents, or those up to settings["tokens"] for training, into the shards of the two parts."""
    train, valid, limit = parts["train"], parts["valid"], settings["tokens"]
    batches = () if train.total == limit else ahead(encode_batches(texts, tokenizer, vocab_size))
    with progress(unit="tok", unit_scale=True, total=limit, initial=train.total) as bar:
        for documents, rows, position in batches:
            for text, ids in zip(documents, rows, strict=True):
                if held_out(text, settings["valid_share"]):
                    valid.add(ids)
                else:
                    train.add(ids[:None if limit is None else limit - train.total])
                if train.total == limit:
                    break
            bar.update(train.total - bar.n)
            if train.full() or valid.full():
                commit(settings, position, parts)
            if train.total == limit:
                break
    if train.total == 0:
        raise UserError("the text is empty: nothing was written" if valid.total == 0 else
                        f"every document fell into the held-out part, none is left to train on: give more documents or "
                        f"less than --valid_share={settings['valid_share']}, and another --out")
    commit(settings, None, parts)


def commit(settings: dict, position: list | None, parts: dict[str, Shards]) -> None:
    """Write the whole shards, and behind them what is needed to go on; without a position this is the end: the rest.

    Killed in between, the shards are ahead of the state: the next run writes the same ones over them.
    """
    state = parts["train"].folder / UNFINISHED
    if not state.exists():                                   # shards without a state count as finished
        write_state(state, settings, None, {})
    for part in parts.values():
        part.write(last=position is None)
    if position is None:
        state.unlink()
    else:
        write_state(state, settings, position, parts)


def write_state(path: Path, settings: dict, position: list | None, parts: dict[str, Shards]) -> None:
    state = {"settings": settings, "position": position,
             "parts": {name: [part.written, part.total] for name, part in parts.items()}}
    held = {name: np.concatenate(part.held) for name, part in parts.items()}
    replace_file(path, save(held, {"state": json.dumps(state)}))


def read_state(folder: Path, settings: dict, hashes: tuple[str, ...], parts: dict[str, Shards]) -> list | None:
    """The position to go on from, with `parts` as they were there; None for the start, in a folder without shards."""
    path = folder / UNFINISHED
    if not path.exists():
        for part in parts.values():
            if any(part.folder.glob("*.safetensors")):
                raise UserError(f"{part.folder} already holds .safetensors files; give a new folder or remove them")
        return None
    try:
        with safe_open(path, framework="numpy") as f:
            state = json.loads(f.metadata()["state"])
            held = {name: f.get_tensor(name) for name in state["parts"]}
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as e:
        raise UserError(f"{path} is damaged ({str(e)[:200]}); remove {folder} and start again") from e
    same = {digest[:16] for digest in hashes}                # states of older versions name the tokenizer by its bytes
    clash = [f"{key} was {old}, is {settings[key]}" for key, old in state["settings"].items()
             if settings[key] != old and not (key == "tokenizer" and old in same)]
    if clash:
        raise UserError(f"{folder} was begun with other settings and is not finished ({'; '.join(clash)}): go on with "
                        "the same ones, or give another --out, or remove the folder")
    for name, (written, total) in state["parts"].items():
        parts[name].written, parts[name].total, parts[name].held = written, total, [held[name]]
        gone = [shard for shard in map(parts[name].path, range(written)) if not shard.exists()]
        if gone:
            raise UserError(f"{gone[0]} is missing, so what was begun cannot go on; remove {folder} and start again")
    print0(f"{folder} was interrupted: goes on behind {parts['train'].written} whole shards, at "
           f"{parts['train'].total:,} tokens for training and {parts['valid'].total:,} held out")
    return state["position"]


def describe_files(name: str | Iterable[str]) -> str:
    """What the files of a name amount to, by which to notice if they are others when work goes on."""
    files = [Path(source) for source in (find_sources(name) if isinstance(name, str) else ())]
    sizes = [file.stat().st_size for file in files if file.is_file()]
    return f"{len(sizes)} files of {sum(sizes):,} bytes"
