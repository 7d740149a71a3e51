"""Text for training: the donor's own tokenizer, text -> token shards -> batches.

python data.py --name=FILES --tokenizer=assets/donor --out=out_data       writes token shards
python data.py --name=FILES --train_tokenizer=4096 --out=out_tokenizer    trains a tokenizer
"""

import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from runtime import UserError, parse_args, print0, progress, script
from tokenizer import Tokenizer, read_json, train_tokenizer

TEXT_FILES = (".txt", ".jsonl", ".jsonl.gz", ".json", ".parquet")


# ---------------------------------------------------------------------------------------------------------------------
# Text -> tokens

def read_texts(path: str) -> Iterator[str]:
    """The documents of a .txt, .jsonl, .jsonl.gz, .json or .parquet file, of a folder of them, or of a dataset on the
    Hugging Face hub (`owner/name` or `owner/name:config`), streamed. Raises UserError if it is none of them."""
    file = Path(path)
    if file.is_dir():
        files = sorted(p for p in file.iterdir() if p.name.endswith(TEXT_FILES))
        if not files:
            raise UserError(f"no text in {file}: looked for {', '.join(TEXT_FILES)}")
        for p in files:
            yield from read_texts(str(p))
    elif file.is_file() and file.suffix == ".txt":
        try:
            yield file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as e:
            raise UserError(f"{file} is not UTF-8 ({e.reason} at byte {e.start}); convert it, e.g. with iconv") from e
    elif file.is_file() and file.name.endswith(TEXT_FILES):
        kind = "parquet" if file.suffix == ".parquet" else "json"
        yield from read_dataset(path, kind, data_files=str(file))
    elif file.is_file():
        raise UserError(f"{file} is of no known kind; allowed: {', '.join(TEXT_FILES)}")
    elif re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?", path) and not path.endswith(TEXT_FILES):
        name, _, config = path.partition(":")
        yield from read_dataset(path, name, config or None)
    else:
        raise UserError(f"{path} does not exist: give a file ({', '.join(TEXT_FILES)}), a folder of them, "
                        "or a Hugging Face dataset as owner/name or owner/name:config")


def read_dataset(path: str, *args, **options) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f"reading {path} needs the package datasets: pip install datasets, or give .txt") from None
    try:
        rows = iter(load_dataset(*args, split="train", streaming=True, **options))
        row = next(rows, None)
        while row is not None:
            if not isinstance(row.get("text"), str):
                raise UserError(f"{path} needs a column `text` of strings; its columns are {', '.join(row)}")
            yield row["text"]
            row = next(rows, None)
    except UserError:
        raise
    except Exception as e:                                   # a missing dataset, no network, a broken file
        raise UserError(f"{path} cannot be read ({type(e).__name__}: {str(e)[:200]}); it should be a file or folder "
                        "that is here, or a dataset on the Hugging Face hub that can be reached") from e


def encode_documents(texts: Iterable[str], tokenizer: Tokenizer, vocab_size: int) -> Iterator[np.ndarray]:
    """Each document's ids with EOS behind them, in the smallest type that holds the model's vocabulary."""
    if tokenizer.eos_id is None:
        raise UserError("the tokenizer names no end-of-text token, so documents would run together; "
                        "set eos_token in tokenizer_config.json")
    held, size = [], 0                                       # documents that are encoded together, on all cores
    for text in chain(texts, [None]):
        if text:
            held, size = [*held, text], size + len(text)
        if len(held) == 256 or size > 4_000_000 or text is None:
            yield from (np.array([*ids, tokenizer.eos_id], token_type(vocab_size))
                        for ids in tokenizer.encode_batch(held))
            held, size = [], 0


def token_type(vocab_size: int) -> type:
    return np.uint16 if vocab_size <= 65536 else np.uint32   # Gemma's 256,000 entries do not fit into 16 bits


def write_shards(texts: Iterable[str], tokenizer: Tokenizer, folder, vocab_size: int,
                 shard_tokens: int = 100_000_000, max_tokens: int | None = None) -> int:
    """The number of tokens written to folder/00000.safetensors, 00001.safetensors, ... (one tensor, `tokens`)."""
    folder = Path(folder)
    if any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} already holds .safetensors files; give a new folder or remove them")
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"vocab_size": str(vocab_size), "tokenizer": tokenizer.hash}
    total, shards, pending, size = 0, 0, [], 0

    def write(ids):
        nonlocal shards
        path = folder / f"{shards:05d}.safetensors"
        path.with_suffix(".tmp").write_bytes(save({"tokens": ids}, metadata))
        os.replace(path.with_suffix(".tmp"), path)           # a crash leaves no half shard under a shard's name
        shards += 1

    with progress(unit="tok", unit_scale=True, total=max_tokens) as bar:
        for ids in encode_documents(texts, tokenizer, vocab_size):
            ids = ids[:None if max_tokens is None else max_tokens - total]
            total += len(ids)
            bar.update(len(ids))
            pending.append(ids)
            size += len(ids)
            if size >= shard_tokens:
                pending = [np.concatenate(pending)]
                while size >= shard_tokens:
                    write(pending[0][:shard_tokens])
                    pending, size = [pending[0][shard_tokens:]], size - shard_tokens
            if total == max_tokens:
                break
    if size:
        write(np.concatenate(pending))
    if total == 0:
        raise UserError("the text is empty: nothing was written")
    return total


# ---------------------------------------------------------------------------------------------------------------------
# Tokens -> batches

class Tokens:
    """One long row of tokens, read across the borders of the arrays (memory-mapped shards) that it is made of.

    first_id: the BOS that every window begins with, None for tokenizers without.
    """

    def __init__(self, arrays: list[np.ndarray], first_id: int | None = None):
        self.arrays, self.first_id = arrays, first_id
        self.starts = np.cumsum([0, *map(len, arrays)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, key: slice) -> np.ndarray:
        """tokens[a:b], int64 (b - a,)."""
        start, stop, step = key.indices(len(self))
        assert step == 1, key
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        parts = [np.empty(0, np.int64)]                      # makes the whole int64, and is it if nothing is asked
        for array, offset in zip(self.arrays[first:], self.starts[first:], strict=False):
            if offset >= stop:
                break
            parts.append(array[max(start - offset, 0):stop - offset])
        return np.concatenate(parts)


def load_tokens(path: str, tokenizer: Tokenizer, vocab_size: int) -> Tokens:
    """The tokens of a folder of shards, or of texts (`read_texts`) with EOS between documents; or of several, by comma.

    Raises UserError for shards of another tokenizer or vocabulary, damaged shards, and empty text.
    """
    arrays, shards = [], []
    for part in path.split(","):
        if not Path(part).exists():
            raise UserError(f"{part} does not exist: give text files, a folder of them, or token shards; for a Hugging "
                            f"Face dataset write shards first: python data.py --name={part} --tokens=... --out=...")
        shards = sorted(Path(part).glob("*.safetensors")) if Path(part).is_dir() else []
        arrays += [open_shard(shard, tokenizer, vocab_size) for shard in shards] or [np.concatenate(
            [np.empty(0, token_type(vocab_size)), *encode_documents(read_texts(part), tokenizer, vocab_size)])]
    if not shards:
        arrays[-1] = arrays[-1][:-1]                         # EOS stands between documents: the last needs none
    tokens = Tokens([a for a in arrays if len(a)], tokenizer.first_id)
    if len(tokens) == 0:
        raise UserError(f"{path} is empty: there is no text in it")
    return tokens


def open_shard(path: Path, tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    try:
        with safe_open(path, framework="numpy") as f:        # checks the header against the length of the file
            metadata, view = f.metadata() or {}, f.get_slice("tokens")
            (n,), dtype = view.get_shape(), {"U16": np.uint16, "U32": np.uint32}[view.get_dtype()]
    except (SafetensorError, OSError, KeyError, ValueError) as e:
        raise UserError(f"{path} is not a whole token shard ({str(e)[:200]}); write the shards again") from e
    if metadata.get("tokenizer") != tokenizer.hash or metadata.get("vocab_size") != str(vocab_size):
        raise UserError(f"shards in {path.parent} were made with another tokenizer or vocabulary (vocab_size "
                        f"{metadata.get('vocab_size')}, the model's is {vocab_size}); write them again with its own")
    offset = path.stat().st_size - n * np.dtype(dtype).itemsize  # the one tensor reaches to the end of the file
    return np.memmap(path, dtype, "r", offset, (n,)) if n else np.empty(0, dtype)


def count_windows(tokens: Tokens, seq_len: int) -> int:
    """How many windows of seq_len inputs, each with its next token as target, the text holds, side by side."""
    n = (len(tokens) - 1) // seq_len
    if n < 1:
        raise UserError(f"{len(tokens)} tokens, need at least {seq_len + 1} (seq_len + 1); "
                        "give more text or a smaller seq_len")
    return n


def windows(tokens: Tokens, seq_len: int, indices: Iterable[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, int64 (n, seq_len), of the windows with these numbers; with BOS first if there is one."""
    rows = torch.from_numpy(np.stack([tokens[i * seq_len:(i + 1) * seq_len + 1] for i in indices]))
    if tokens.first_id is not None:
        rows = torch.cat([torch.full((len(rows), 1), tokens.first_id), rows[:, :-1]], dim=1)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


def batch(tokens: Tokens, rows: range, seq_len: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, int64 (len(rows), seq_len): the windows with the global sample numbers `rows`.

    A pure function of the numbers: however they are dealt over ranks and micro-steps, training sees the same data.
    Each epoch has every window once, in an order of its own. UserError if there is not one whole window.
    """
    n = count_windows(tokens, seq_len)
    return windows(tokens, seq_len, [int(permutation(seed, r // n, n)[r % n]) for r in rows])


def batches(tokens: Tokens, rows: Iterable[range], seq_len: int, seed: int, device: torch.device) -> Iterator:
    """`batch` for each range of sample numbers, on `device`. While one is worked on, a thread prepares the next (in
    pinned memory for a GPU), so that the device never waits for the disk or for the host."""
    def prepare(numbers):
        pair = batch(tokens, numbers, seq_len, seed)
        if device.type == "cuda":
            torch.cuda.set_device(device)                    # a thread starts out with the first GPU
            pair = [t.pin_memory() for t in pair]
        return pair

    with ThreadPoolExecutor(1) as thread:
        coming = None
        for numbers in chain(rows, [None]):
            ready, coming = coming, numbers and thread.submit(prepare, numbers)
            if ready:
                yield tuple(t.to(device, non_blocking=True) for t in ready.result())


def validation(tokens: Tokens, seq_len: int, max_tokens: int | None = None, rows: int = 8) -> list:
    """[(inputs, targets), ...], int64 (<= rows, seq_len): windows side by side from the start, about max_tokens."""
    n = count_windows(tokens, seq_len)
    n = n if max_tokens is None else min(n, max(1, max_tokens // seq_len))
    return [windows(tokens, seq_len, range(i, min(i + rows, n))) for i in range(0, n, rows)]


# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class DataConfig:
    name: str = "assets/books/train"       # text: files, folders by comma, or a Hugging Face dataset owner/name:config
    tokenizer: str = "assets/donor"        # folder of the checkpoint whose tokenizer to use
    out: str = "out_data"                  # folder for the shards, or for the trained tokenizer
    tokens: int | None = None              # stop after so many tokens
    shard_tokens: int = 100_000_000        # tokens in one file
    vocab_size: int | None = None          # of the model, if no config.json beside the tokenizer says it
    train_tokenizer: int = 0               # train a tokenizer with so many entries instead of writing shards


def main(argv=None) -> None:
    config = parse_args(DataConfig, argv)
    for name in ("tokens", "shard_tokens"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise UserError(f"--{name}={getattr(config, name)} must be at least 1")
    characters = 0

    def texts():
        nonlocal characters
        for part in config.name.split(","):
            for text in read_texts(part):
                characters += len(text)
                yield text

    if config.train_tokenizer:
        train_tokenizer(texts(), config.train_tokenizer, config.out)
        print0(f"{config.out}: a tokenizer with {config.train_tokenizer:,} entries from {characters:,} characters")
    else:
        tokenizer = Tokenizer.load(config.tokenizer, config.vocab_size)
        vocab_size = config.vocab_size or read_json(Path(config.tokenizer) / "config.json").get("vocab_size")
        total = write_shards(texts(), tokenizer, config.out, vocab_size or tokenizer.vocab_size,
                             config.shard_tokens, config.tokens)
        print0(f"{config.out}: {total:,} tokens from {characters:,} characters read")


if __name__ == "__main__":
    script(main)
