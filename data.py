"""Text for training: the donor's own tokenizer, text -> token shards -> batches.

python data.py --name=FILES --tokenizer=assets/donor --out=out_data       writes token shards
python data.py --name=FILES --train_tokenizer=4096 --out=assets/donor     trains a tokenizer
"""

import base64
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from runtime import UserError, parse_args, print0, progress, script

# GPT-4's way of cutting text into words before byte pairs are merged, with the typographic apostrophe that books use.
SPLIT_PATTERN = (r"['’](?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                 r"|\s*[\r\n]|\s+(?!\S)|\s+")
END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.tiktoken", "tokenizer.model", "tokenizer_config.json",
                   "special_tokens_map.json", "generation_config.json")
TEXT_FILES = (".txt", ".jsonl", ".jsonl.gz", ".json", ".parquet")


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers

class Tokenizer:
    """A checkpoint's own tokenizer: `tokenizer.json` through tokenizers, `tokenizer.tiktoken` through tiktoken.

    vocab_size: its largest id + 1 (a model's may be larger, padded). eos_id, bos_id: int or None.
    hash: SHA-256 of the files that decide the ids; token shards carry it.
    """

    def __init__(self, fast, ranks, vocab_size: int, special: dict[str, int], hash: str):
        self.fast, self.ranks = fast, ranks                  # one of the two is None
        self.vocab_size, self.hash = vocab_size, hash
        self.eos_id, self.bos_id = special.get("eos"), special.get("bos")

    @classmethod
    def load(cls, folder, vocab_size: int | None = None) -> "Tokenizer":
        """The tokenizer in `folder`. UserError if there is none, if it is corrupt, or if it has ids >= vocab_size."""
        folder = Path(folder)
        file = find_tokenizer(folder)
        try:
            config = read_json(folder / "tokenizer_config.json")
            digest = hashlib.sha256(file.read_bytes())
            fast = ranks = None
            if file.suffix == ".json":
                from tokenizers import Tokenizer as Fast
                fast = Fast.from_file(str(file))
                fast.no_truncation()                         # some are saved with the limits of their last user
                fast.no_padding()
                ids = fast.get_vocab(with_added_tokens=True)
            else:
                import tiktoken
                pairs = [line.split() for line in file.read_bytes().splitlines() if line]
                merges = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
                if sum(len(token) == 1 for token in merges) != 256:
                    raise ValueError("single bytes are missing, so some texts could not be encoded")
                ranks = tiktoken.Encoding(file.name, pat_str=config["pat_str"], mergeable_ranks=merges,
                                          special_tokens=config["special_tokens"])
                digest.update((folder / "tokenizer_config.json").read_bytes())
                ids = config["special_tokens"] | {"": max(merges.values())}
            special = {name: special_id(folder, config, name, ids) for name in ("eos", "bos")}
        except (KeyboardInterrupt, SystemExit, ImportError):
            raise
        except BaseException as e:                           # tokenizers raises Exception, a panic in Rust even less
            raise UserError(f"the tokenizer in {folder} cannot be read ({type(e).__name__}: {str(e)[:200]}); "
                            "copy its files again from the original checkpoint") from e
        size = max(ids.values()) + 1
        needed = max(size, *(i + 1 for i in special.values() if i is not None), 0)
        if vocab_size is not None and needed > vocab_size:
            raise UserError(f"the tokenizer in {folder} has {needed} ids but the model's vocabulary is {vocab_size}: "
                            "it belongs to another model; copy the tokenizer of the original checkpoint")
        return cls(fast, ranks, size, special, digest.hexdigest())

    def encode(self, text: str) -> list[int]:
        """The text's ids and nothing else: no BOS, no EOS."""
        return self.encode_batch([text])[0]

    def encode_prompt(self, text: str) -> list[int]:
        """The ids a prompt starts with: as the tokenizer's own template has it (Gemma's BOS), never none at all."""
        ids = self.fast.encode(text, add_special_tokens=True).ids if self.fast else self.encode(text)
        start = self.eos_id if self.bos_id is None else self.bos_id
        if not ids and start is None:
            raise UserError("the prompt is empty and the tokenizer has no token to begin with; give a prompt")
        return ids or [start]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, on all cores."""
        if self.fast:
            return [e.ids for e in self.fast.encode_batch_fast(texts, add_special_tokens=False)]
        return self.ranks.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, special tokens spelled out; bytes that are not UTF-8 become U+FFFD."""
        ids = [int(i) for i in ids if i < self.vocab_size]   # a model's padding beyond the tokenizer is no text
        return self.fast.decode(ids, skip_special_tokens=False) if self.fast else self.ranks.decode(ids)


class TextStream:
    """Ids in, text out as soon as it is certain; never half a character, and a constant amount of work per id.

    What a token adds depends on its neighbours (bytes of one character, a leading space that decoders strip), so the
    last few ids are decoded together and only what goes beyond the text already given out is new.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.decode = tokenizer.decode
        self.ids, self.shown, self.pending = [], 0, 0        # window, its characters given out, ids not yet settled

    def push(self, id: int) -> str:
        self.ids.append(id)
        self.pending += 1
        text = self.decode(self.ids)
        # Of a character cut in half at most three bytes are here, so at most three ids: beyond that, an invalid byte.
        settled = len(text.rstrip("\ufffd")) if self.pending < 4 else len(text) - text.endswith("\ufffd")
        settled = max(settled, self.shown)
        new = text[self.shown:settled]
        if settled == len(text):                             # all is out: the ids just settled are the next context
            self.ids, self.pending = self.ids[-self.pending:], 0
            self.shown = len(self.decode(self.ids))
        elif self.pending >= 4:
            self.ids, self.shown = self.ids[-4:], len(self.decode(self.ids[-4:])) - 1
        else:
            self.shown = settled
        return new

    def flush(self) -> str:
        """What was held back, with U+FFFD for a character that never came whole."""
        rest = self.decode(self.ids)[self.shown:] if self.ids else ""
        self.ids, self.shown, self.pending = [], 0, 0
        return rest


def find_tokenizer(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer.tiktoken"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"no tokenizer in {folder}: need tokenizer.json or tokenizer.tiktoken; "
                    "copy it from the original checkpoint")


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def special_id(folder: Path, config: dict, name: str, ids: dict[str, int]) -> int | None:
    """The id of the "eos" or "bos" token: by its text in tokenizer_config.json, else by number in the model's files."""
    token = config.get(f"{name}_token")
    token = token.get("content") if isinstance(token, dict) else token
    if token in ids:
        return ids[token]
    for file in ("config.json", "generation_config.json"):
        number = read_json(folder / file).get(f"{name}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int):
            return number
    return None


def copy_tokenizer(src, dst) -> None:
    """Copy the tokenizer files of folder `src` into folder `dst`. UserError if there is no tokenizer in `src`."""
    find_tokenizer(Path(src))
    for path in (Path(src) / name for name in TOKENIZER_FILES):
        if path.is_file() and Path(src).resolve() != Path(dst).resolve():
            shutil.copy2(path, dst)


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder) -> None:
    """Write a byte-level BPE tokenizer into `folder`: vocab_size - 1 tokens and, as the last id, <|endoftext|>."""
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Fast
    if vocab_size < 257:
        raise UserError(f"a vocabulary of {vocab_size} is too small: 256 bytes and {END_OF_TEXT} need 257")
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    pieces = (text[i:i + 10_000] for text in texts for i in range(0, len(text), 10_000))  # whole books are slow
    fast.train_from_iterator(pieces, trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False))
    vocab = fast.get_vocab()
    if len(vocab) < vocab_size - 1:
        raise UserError(f"the text gives only {len(vocab) + 1} tokens, {vocab_size} were asked for; "
                        "give more text or ask for fewer")
    to_byte = byte_of_character()
    lines = [base64.b64encode(bytes(to_byte[c] for c in token)) + f" {rank}\n".encode()
             for token, rank in sorted(vocab.items(), key=lambda item: item[1])]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.tiktoken").write_bytes(b"".join(lines))
    config = {"tokenizer_class": "tiktoken", "pat_str": SPLIT_PATTERN,
              "special_tokens": {END_OF_TEXT: vocab_size - 1}, "eos_token": END_OF_TEXT}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: Latin-1's visible characters are themselves, the rest follow from 256."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


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
    """One long row of tokens, read across the borders of the arrays (memory-mapped shards) that it is made of."""

    def __init__(self, arrays: list[np.ndarray]):
        self.arrays = arrays
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
        shards = sorted(Path(part).glob("*.safetensors")) if Path(part).is_dir() else []
        arrays += [open_shard(shard, tokenizer, vocab_size) for shard in shards] or [np.concatenate(
            [np.empty(0, token_type(vocab_size)), *encode_documents(read_texts(part), tokenizer, vocab_size)])]
    if not shards:
        arrays[-1] = arrays[-1][:-1]                         # EOS stands between documents: the last needs none
    tokens = Tokens([a for a in arrays if len(a)])
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
    rows = torch.from_numpy(np.stack([tokens[i * seq_len:(i + 1) * seq_len + 1] for i in indices]))
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
    vocab_size: int | None = None          # of the model, if larger than the tokenizer's
    train_tokenizer: int = 0               # train a tokenizer with so many entries instead of writing shards


def main(argv=None) -> None:
    config = parse_args(DataConfig, argv)
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
        total = write_shards(texts(), tokenizer, config.out, config.vocab_size or tokenizer.vocab_size,
                             config.shard_tokens, config.tokens)
        print0(f"{config.out}: {total:,} tokens from {characters:,} characters read")


if __name__ == "__main__":
    script(main)
