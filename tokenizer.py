"""A checkpoint's own tokenizer: tokenizers' JSON or tiktoken's ranks, text streamed out of ids, and one trained."""

import base64
import hashlib
import json
import os
import re
import shutil
from array import array
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np

from runtime import TOKENIZER_FILES, UserError

# GPT-4's way of cutting text into words before byte pairs are merged, with the typographic apostrophe that books use.
SPLIT_PATTERN = (r"['’](?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                 r"|\s*[\r\n]|\s+(?!\S)|\s+")
END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """A checkpoint's own tokenizer: `tokenizer.json` through tokenizers, `tokenizer.tiktoken` through tiktoken.

    vocab_size: its largest id + 1 (a model's may be larger, padded). eos_id, bos_id: int or None. first_id: the BOS
    that its template puts before every text, or None.
    hash: SHA-256 of the files that decide the ids; token shards carry it.
    """

    def __init__(self, fast, ranks, vocab_size: int, special: dict[str, int], hash: str):
        self.fast, self.ranks = fast, ranks                  # one of the two is None
        self.vocab_size, self.hash = vocab_size, hash
        self.eos_id, self.bos_id = special.get("eos"), special.get("bos")
        # Gemma and Llama put BOS before every text, and Gemma is lost without it; Pythia and SmolLM2 do not.
        template = fast.encode("", add_special_tokens=True).ids if fast else []
        self.first_id = template[0] if template[:1] == [self.bos_id] else None

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
        """The ids that a prompt starts with: BOS where the tokenizer's template has it, then the text; never none."""
        ids = [self.first_id] * (self.first_id is not None) + self.encode(text)
        start = self.eos_id if self.bos_id is None else self.bos_id
        if not ids and start is None:
            raise UserError("the prompt is empty and the tokenizer has no token to begin with; give a prompt")
        return ids or [start]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, on all cores."""
        if self.fast:
            return [e.ids for e in self.fast.encode_batch_fast(texts, add_special_tokens=False)]
        return self.ranks.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)

    def encode_documents(self, texts: list[str], dtype: type) -> list[np.ndarray]:
        """The ids of each text with EOS behind them, dtype (n + 1,), on all cores."""
        if self.fast:
            rows = [array("I", e.ids) for e in self.fast.encode_batch_fast(texts, add_special_tokens=False)]
        else:                                                # no lists: making them would stop the other threads
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                rows = list(pool.map(partial(self.ranks.encode_to_numpy, disallowed_special=()), texts))
        documents = [np.full(len(row) + 1, self.eos_id, dtype) for row in rows]
        for document, row in zip(documents, rows, strict=True):
            document[:-1] = row
        return documents

    def byte_lengths(self) -> np.ndarray:
        """How many bytes of text each id stands for, int64 (ids,): 0 for special tokens, also those beyond the rest."""
        special = (i + 1 for i in (self.eos_id, self.bos_id) if i is not None)
        lengths = np.zeros(max([self.vocab_size, *special]), np.int64)
        if self.ranks:
            for i in set(range(self.vocab_size)) - {self.ranks.encode_single_token(t)
                                                    for t in self.ranks.special_tokens_set}:
                with suppress(KeyError):                     # a number that is not used
                    lengths[i] = len(self.ranks.decode_single_token_bytes(i))
            return lengths
        added, bytewise = self.fast.get_added_tokens_decoder(), "ByteLevel" in str(self.fast.decoder)
        for token, i in self.fast.get_vocab(with_added_tokens=True).items():
            if i in added:
                lengths[i] = 0 if added[i].special else len(added[i].content.encode())
            elif bytewise:                                   # a character for each byte (`byte_of_character`)
                lengths[i] = len(token)
            elif re.fullmatch("<0x[0-9A-F]{2}>", token):     # sentencepiece's single bytes
                lengths[i] = 1
            else:
                lengths[i] = len(token.replace("\u2581", " ").encode())
        return lengths

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, special tokens spelled out; bytes that are not UTF-8 become U+FFFD."""
        ids = [int(i) for i in ids if i < self.vocab_size]   # a model's padding beyond the tokenizer is no text
        return self.fast.decode(ids, skip_special_tokens=False) if self.fast else self.ranks.decode(ids)


class TextStream:
    """Ids in, text out as soon as it is certain; never half a character, and a constant amount of work per id.

    What a token adds depends on its neighbours (bytes of one character, a leading space that decoders strip), so the
    last few ids are decoded together and only what goes beyond the text already given out is new.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Iterable[int] = ()):
        """`prompt`: the ids before the first, whose text stands there already."""
        self.decode = tokenizer.decode
        self.ids, self.pending = list(prompt)[-4:], 0        # a window of the last ids; how many are not yet settled
        self.shown = len(self.decode(self.ids))              # characters of the window's text that are out

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
    folder = Path(folder)
    if any(folder.glob("tokenizer.*")):
        raise UserError(f"{folder} has a tokenizer already; give a new folder")
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
