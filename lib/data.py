"""Batches for training and evaluation, from token shards or from texts and the donor's own tokenizer.

python -m lib.data --name=slimpajama --tokens=15e9 --tokenizer=assets/donor --out=out_data    writes token shards
python -m lib.data --name=FILES --train_tokenizer=4096 --out=out_tokenizer                    trains a tokenizer
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from lib.bpe import train_tokenizer
from lib.cli import UserError, parse_args, print0, script
from lib.donors import find_donor
from lib.shards import UNFINISHED, encode_batches, prefetch, token_type, write_shards
from lib.texts import Texts, split_names
from lib.tokenizer import Tokenizer, read_optional_json

IGNORE = -100                           # a target that counts for no loss; torch's ignore_index


class Tokens:
    """Several arrays (memory-mapped shards) as one long sequence of tokens.

    first_id: the BOS that every window begins with, or None if the tokenizer puts none before a text.
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
        parts = [np.empty(0, np.int64)]                      # sets the type, also of an empty slice
        for array, offset in zip(self.arrays[first:], self.starts[first:], strict=False):
            if offset >= stop:
                break
            parts.append(array[max(start - offset, 0):stop - offset])
        return np.concatenate(parts)


def load_tokens(path: str, tokenizer: Tokenizer, vocab_size: int, hub_tokens: int = 0) -> Tokens:
    """The tokens of shards and texts (folders and names separated by commas), with EOS between documents.

    hub_tokens: how many tokens to read of a data set on the hub; 0 refuses it. Raises UserError for empty text
    and for shards that are damaged, unfinished, of another tokenizer or beyond the model's vocabulary.
    """
    arrays, shards = [], []
    for part in split_names(path):
        if not Path(part).exists() and not hub_tokens:
            raise UserError(f"{part} does not exist: give text files, a folder of them, or token shards; for a Hugging "
                            f"Face dataset write shards first: python -m lib.data --name={part} --tokens=... --out=...")
        shards = sorted(Path(part).glob("*.safetensors")) if Path(part).is_dir() else []
        for folder in (Path(part), Path(part).resolve().parent):  # valid/ is as unfinished as its parent
            if shards and (folder / UNFINISHED).exists():
                raise UserError(f"the shards in {part} are not all written: give the python -m lib.data command that "
                                f"began them again, or remove {folder / UNFINISHED} to use those that exist")
        name, n = (os.path.join(".", part), None) if Path(part).exists() else (part, hub_tokens)  # ./ is no data set
        arrays += [open_shard(shard, tokenizer, vocab_size) for shard in shards] or [
            read_tokens(name, tokenizer, vocab_size, n)]
    if not shards:                                           # the last part was text: no EOS after its last document
        arrays[-1] = arrays[-1][:-1]
    tokens = Tokens([a for a in arrays if len(a)], tokenizer.first_id)
    if len(tokens) == 0:
        raise UserError(f"{path} is empty: there is no text in it")
    return tokens


def read_tokens(name: str, tokenizer: Tokenizer, vocab_size: int, max_tokens: int | None) -> np.ndarray:
    """The tokens of all texts, or the first `max_tokens`, each text followed by EOS."""
    found, n = [np.empty(0, token_type(vocab_size))], 0
    for _, rows, _ in encode_batches(Texts(name), tokenizer, vocab_size):
        found += rows
        n += sum(map(len, rows))
        if max_tokens is not None and n >= max_tokens:
            break
    return np.concatenate(found)[:max_tokens]


def open_shard(path: Path, tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """The tokens of a shard, memory-mapped. Raises UserError if it is damaged or does not fit the model."""
    try:
        with safe_open(path, framework="numpy") as f:        # checks the header against the length of the file
            metadata, view = f.metadata() or {}, f.get_slice("tokens")
            (n,), dtype = view.get_shape(), {"U16": np.uint16, "U32": np.uint32}[view.get_dtype()]
        stored_size = int(metadata.get("vocab_size", 0))
    except (SafetensorError, OSError, KeyError, ValueError) as e:
        raise UserError(f"{path} is not a whole token shard ({str(e)[:200]}); write the shards again") from e
    offset = path.stat().st_size - n * np.dtype(dtype).itemsize  # the one tensor reaches to the end of the file
    tokens = np.memmap(path, dtype, "r", offset, (n,)) if n else np.empty(0, dtype)
    too_large = stored_size > vocab_size and n and tokens.max() >= vocab_size    # padding alone may differ
    if metadata.get("tokenizer") not in tokenizer.hashes or too_large:
        raise UserError(f"shards in {path.parent} were made with another tokenizer or vocabulary (vocab_size "
                        f"{stored_size}, the model's is {vocab_size}); write them again with its own")
    return tokens


def count_windows(tokens: Tokens, seq_len: int, stride: int | None = None) -> int:
    """The number of windows of seq_len inputs and targets: side by side, or one every `stride` tokens."""
    n = (len(tokens) - 1 - seq_len) // (stride or seq_len) + 1
    if n < 1:
        raise UserError(f"{len(tokens)} tokens, need at least {seq_len + 1} (seq_len + 1); "
                        "give more text or a smaller seq_len")
    return n


def windows(tokens: Tokens, seq_len: int, indices: Sequence[int],
            stride: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, int64 (n, seq_len), of the windows with these numbers, after BOS if there is one.

    With a stride below seq_len windows overlap; targets that the previous window has counted are IGNORE.
    """
    stride = stride or seq_len
    rows = torch.from_numpy(np.stack([tokens[i * stride:i * stride + seq_len + 1] for i in indices]))
    if tokens.first_id is not None:
        rows = torch.cat([torch.full((len(rows), 1), tokens.first_id), rows[:, :-1]], dim=1)
    idx, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    targets[torch.tensor([i > 0 for i in indices]), :seq_len - stride] = IGNORE     # window 0 has no previous one
    return idx, targets


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


def batch(tokens: Tokens, rows: range, seq_len: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, int64 (len(rows), seq_len), of the samples with the global numbers `rows`.

    A pure function of the numbers: however they are distributed over ranks and micro-steps, training sees the
    same data. Each epoch has every window once, in an order of its own. UserError for less than one window.
    """
    n = count_windows(tokens, seq_len)
    return windows(tokens, seq_len, [int(permutation(seed, r // n, n)[r % n]) for r in rows])


def batches(tokens: Tokens, rows: Iterable[range], seq_len: int, seed: int, device: torch.device) -> Iterator:
    """`batch` for each range of sample numbers, on `device`. A thread prepares the next one meanwhile (in
    pinned memory for a GPU), so that the device waits for neither disk nor host."""
    def prepared():
        if device.type == "cuda":
            torch.cuda.set_device(device)                    # a new thread would use the first GPU
        for numbers in rows:
            pair = batch(tokens, numbers, seq_len, seed)
            yield [t.pin_memory() for t in pair] if device.type == "cuda" else pair

    for pair in prefetch(prepared()):
        yield tuple(t.to(device, non_blocking=True) for t in pair)


def validation(tokens: Tokens, seq_len: int, max_tokens: int | None = None, rows: int = 8) -> list:
    """[(inputs, targets), ...], int64 (<= rows, seq_len): about max_tokens in windows from the start."""
    n = count_windows(tokens, seq_len)
    n = n if max_tokens is None else min(n, max(1, max_tokens // seq_len))
    return [windows(tokens, seq_len, range(i, min(i + rows, n))) for i in range(0, n, rows)]


# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class DataConfig:
    name: str = "assets/books/train"       # slimpajama, redpajama, pg19, a hub owner/name[:config], files, folders
    tokenizer: str = "assets/donor"        # checkpoint whose tokenizer to use: a folder or a Hugging Face id
    out: str = "out_data"                  # folder for the shards, or for the trained tokenizer
    tokens: int | None = None              # stop after this many training tokens
    valid_share: float = 0.0               # share of the documents that is held out, into OUT/valid
    shard_tokens: int = 100_000_000        # tokens in one file; an interrupted run loses less than this
    vocab_size: int | None = None          # of the model; not set: of the config.json beside the tokenizer
    train_tokenizer: int = 0               # train a tokenizer of this size instead of writing shards


def main(argv=None) -> None:
    config = parse_args(DataConfig, argv)
    for name in ("tokens", "shard_tokens"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise UserError(f"--{name}={getattr(config, name)} must be at least 1")
    if not 0 <= config.valid_share < 1:
        raise UserError(f"--valid_share={config.valid_share} must be at least 0 and less than 1")
    if config.train_tokenizer:
        unused = [f"--{name}" for name in ("tokenizer", "tokens", "valid_share", "shard_tokens", "vocab_size")
                  if getattr(config, name) != getattr(DataConfig, name)]
        if unused:
            raise UserError(f"{', '.join(unused)}: for shards, but --train_tokenizer writes none; drop one of the two")
        train_tokenizer(Texts(config.name), config.train_tokenizer, config.out)
        print0(f"{config.out}: a tokenizer with {config.train_tokenizer:,} entries")
        return
    folder = find_donor(config.tokenizer)
    tokenizer = Tokenizer.load(folder, config.vocab_size)
    vocab_size = config.vocab_size or read_optional_json(folder / "config.json").get("vocab_size")
    total, held = write_shards(config.name, tokenizer, config.out, vocab_size or tokenizer.vocab_size,
                               config.shard_tokens, config.tokens, config.valid_share)
    print0(f"{config.out}: {total:,} tokens" + f"; {config.out}/valid: {held:,} tokens held out" * (held > 0))


if __name__ == "__main__":
    script(main)
