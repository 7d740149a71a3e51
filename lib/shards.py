"""Token shards: documents tokenised on all cores. An interrupted run can continue, and ends in the same bytes."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lib.cli import UserError, print0, progress
from lib.folders import replace_file
from lib.texts import Texts, find_sources
from lib.tokenizer import Tokenizer

UNFINISHED = "resume.state"              # the file beside unfinished shards that the next run continues from
BATCH = 1_000_000 * min(max(os.cpu_count() or 1, 4), 16)  # characters encoded at once, at some 40 bytes for each


# ---------------------------------------------------------------------------------------------------------------------
# Text -> tokens

def read_batches(texts: Texts) -> Iterator[tuple[list[str], list]]:
    """(non-empty documents to encode together, position after them).

    Documents are never split, which could change their ids: only a large batch of books uses all cores.
    """
    documents, size = [], 0
    for text in texts:
        if text:
            documents.append(text)
            size += len(text)
        if size >= BATCH:
            yield documents, texts.position()
            documents, size = [], 0
    if documents:
        yield documents, texts.position()


def encode_batches(texts: Texts, tokenizer: Tokenizer, vocab_size: int) -> Iterator[tuple[list, list, list]]:
    """(documents, ids of each followed by EOS, position) per batch; a thread reads the next one meanwhile.

    The ids have the smallest type that holds the model's vocabulary.
    """
    if not tokenizer.eos_ids:
        raise UserError("the tokenizer names no end-of-text token, so documents would run together; "
                        "set eos_token in tokenizer_config.json")
    for documents, position in prefetch(read_batches(texts)):
        yield documents, tokenizer.encode_documents(documents, token_type(vocab_size)), position


def prefetch(items: Iterable) -> Iterator:
    """The same items, the next of which a thread prepares while the caller works on one. Rust and the network
    release the GIL."""
    items = iter(items)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item


def token_type(vocab_size: int) -> type:
    return np.uint16 if vocab_size <= 65536 else np.uint32   # Gemma's 256,000 entries do not fit into 16 bits


def held_out(text: str, share: float) -> bool:
    """True for about `share` of all texts. It depends on the text alone: duplicates fall on one side."""
    return share > 0 and int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < share * 2**64


# ---------------------------------------------------------------------------------------------------------------------
# Tokens -> shards

class ShardWriter:
    """Collects tokens and writes folder/00000.safetensors, 00001.safetensors, ..., each a tensor `tokens`."""

    def __init__(self, folder: Path, size: int, vocab_size: int, tokenizer: str):
        self.folder, self.size = folder, size                # size: tokens in a whole shard
        self.metadata = {"vocab_size": str(vocab_size), "tokenizer": tokenizer}
        self.buffer = [np.empty(0, token_type(vocab_size))]  # tokens not yet in a shard
        self.written, self.total = 0, 0                      # shards on disk; tokens in them and in the buffer

    def add(self, ids: np.ndarray) -> None:
        self.buffer.append(ids)
        self.total += len(ids)

    def path(self, i: int) -> Path:
        return self.folder / f"{i:05d}.safetensors"

    def full(self) -> bool:
        return sum(map(len, self.buffer)) >= self.size

    def write(self, last: bool = False) -> None:
        """Write all whole shards in the buffer; if `last`, also the rest as a smaller one."""
        rest = np.concatenate(self.buffer)
        while len(rest) >= self.size or (last and len(rest)):
            replace_file(self.path(self.written), shard_bytes(rest[:self.size], self.metadata))
            rest = rest[self.size:]
            self.written += 1
        self.buffer = [rest.copy()]                          # a view would keep the written ones in memory


def shard_bytes(tokens: np.ndarray, metadata: dict[str, str]) -> bytes:
    """A safetensors file with reproducible bytes; the library's own `save` shuffles the metadata."""
    entry = {"dtype": f"U{8 * tokens.itemsize}", "shape": [len(tokens)], "data_offsets": [0, tokens.nbytes]}
    header = json.dumps({"__metadata__": metadata, "tokens": entry}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + tokens.tobytes()


def write_shards(name: str | Iterable[str], tokenizer: Tokenizer, folder, vocab_size: int,
                 shard_tokens: int = 100_000_000, max_tokens: int | None = None,
                 valid_share: float = 0.0) -> tuple[int, int]:
    """(tokens in the shards in `folder`, tokens of the held-out documents, whose shards are in folder/valid).

    An interrupted run continues after its last whole shard and ends in the same bytes. Raises UserError for a
    folder that is finished or was begun with other settings, a full disk, and text without training tokens.
    """
    folder = Path(folder)
    writers = {"train": ShardWriter(folder, shard_tokens, vocab_size, tokenizer.hash),
               "valid": ShardWriter(folder / "valid", shard_tokens, vocab_size, tokenizer.hash)}
    settings = {"name": name if isinstance(name, str) else "texts", "files": describe_files(name),
                "tokenizer": tokenizer.hash[:16], "vocab_size": vocab_size, "tokens": max_tokens,
                "shard_tokens": shard_tokens, "valid_share": valid_share}
    position = read_state(folder, settings, tokenizer.hashes, writers)
    try:
        fill_shards(Texts(name, position), tokenizer, vocab_size, settings, writers)
    except OSError as e:
        raise UserError(f"cannot write {e.filename or folder} ({e.strerror or e}); shards already written are kept: "
                        "solve this, and the same command continues after them") from e
    if valid_share and writers["valid"].total == 0:
        print0(f"warning: no document fell into the held-out part, so there is no {folder / 'valid'}: start again with "
               f"more than --valid_share={valid_share}, or give train.py another text as --valid")
    return writers["train"].total, writers["valid"].total


def fill_shards(texts: Texts, tokenizer: Tokenizer, vocab_size: int, settings: dict,
                writers: dict[str, ShardWriter]) -> None:
    """Write all documents, or those up to settings["tokens"] for training, into the two sets of shards."""
    train, valid, max_tokens = writers["train"], writers["valid"], settings["tokens"]
    batches = () if train.total == max_tokens else prefetch(encode_batches(texts, tokenizer, vocab_size))
    with progress(unit="tok", unit_scale=True, total=max_tokens, initial=train.total) as bar:
        for documents, rows, position in batches:
            for text, ids in zip(documents, rows, strict=True):
                if held_out(text, settings["valid_share"]):
                    valid.add(ids)
                else:
                    train.add(ids[:None if max_tokens is None else max_tokens - train.total])
                if train.total == max_tokens:
                    break
            bar.update(train.total - bar.n)
            if train.full() or valid.full():
                commit(settings, position, writers)
            if train.total == max_tokens:
                break
    if train.total == 0:
        raise UserError("the text is empty: nothing was written" if valid.total == 0 else
                        f"every document fell into the held-out part, none is left to train on: give more documents or "
                        f"less than --valid_share={settings['valid_share']}, and another --out")
    commit(settings, None, writers)


def commit(settings: dict, position: list | None, writers: dict[str, ShardWriter]) -> None:
    """Write the whole shards, then the state to continue from; with position None the rest as well.

    Killed in between, the shards are ahead of the state: the next run writes the same ones over them.
    """
    state = writers["train"].folder / UNFINISHED
    if not state.exists():                                   # shards without a state count as finished
        write_state(state, settings, None, {})
    for writer in writers.values():
        writer.write(last=position is None)
    if position is None:
        state.unlink()
    else:
        write_state(state, settings, position, writers)


def write_state(path: Path, settings: dict, position: list | None, writers: dict[str, ShardWriter]) -> None:
    state = {"settings": settings, "position": position,
             "parts": {name: [writer.written, writer.total] for name, writer in writers.items()}}
    buffers = {name: np.concatenate(writer.buffer) for name, writer in writers.items()}
    replace_file(path, save(buffers, {"state": json.dumps(state)}))


def read_state(folder: Path, settings: dict, hashes: tuple[str, ...], writers: dict[str, ShardWriter]) -> list | None:
    """The position to continue from, with `writers` restored; None in a folder without shards."""
    path = folder / UNFINISHED
    if not path.exists():
        for writer in writers.values():
            if any(writer.folder.glob("*.safetensors")):
                raise UserError(f"{writer.folder} already holds .safetensors files; give a new folder or remove them")
        return None
    try:
        with safe_open(path, framework="numpy") as f:
            state = json.loads(f.metadata()["state"])
            buffers = {name: f.get_tensor(name) for name in state["parts"]}
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as e:
        raise UserError(f"{path} is damaged ({str(e)[:200]}); remove {folder} and start again") from e
    same = {digest[:16] for digest in hashes}                # states of older versions hold the hash of the files
    clash = [f"{key} was {old}, is {settings[key]}" for key, old in state["settings"].items()
             if settings[key] != old and not (key == "tokenizer" and old in same)]
    if clash:
        raise UserError(f"{folder} was begun with other settings and is not finished ({'; '.join(clash)}): continue "
                        "with the same ones, or give another --out, or remove the folder")
    for name, (written, total) in state["parts"].items():
        writers[name].written, writers[name].total, writers[name].buffer = written, total, [buffers[name]]
        missing = [shard for shard in map(writers[name].path, range(written)) if not shard.exists()]
        if missing:
            raise UserError(f"{missing[0]} is missing, so this run cannot continue; remove {folder} and start again")
    print0(f"{folder} was interrupted: continues after {writers['train'].written} whole shards, at "
           f"{writers['train'].total:,} tokens for training and {writers['valid'].total:,} held out")
    return state["position"]


def describe_files(name: str | Iterable[str]) -> str:
    """The number and total size of the files of a name, to notice on continuing that they have changed."""
    files = [Path(source) for source in (find_sources(name) if isinstance(name, str) else ())]
    sizes = [file.stat().st_size for file in files if file.is_file()]
    return f"{len(sizes)} files of {sum(sizes):,} bytes"
