"""Byte-level BPE: training a tokenizer, and the merges behind a file of tiktoken ranks."""

import base64
import json
import math
import os
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from lib.cli import UserError
from lib.folders import replace_file

# GPT-4's pattern, which splits text into words before byte pairs are merged, plus the typographic apostrophe.
SPLIT_PATTERN = (r"['’](?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                 r"|\s*[\r\n]|\s+(?!\S)|\s+")
END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder) -> None:
    """Write a byte-level BPE tokenizer into `folder`; its last id is <|endoftext|>."""
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Fast
    folder = Path(folder)
    check_new_folder(folder)
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
    config = {"tokenizer_class": "tiktoken", "pat_str": SPLIT_PATTERN,
              "special_tokens": {END_OF_TEXT: vocab_size - 1}, "eos_token": END_OF_TEXT}
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    try:  # the ranks come last: without them a killed run has left no tokenizer, and the same command starts again
        replace_file(folder / "tokenizer_config.json", text.encode())
        replace_file(folder / "tokenizer.tiktoken", b"".join(lines))
    except OSError as e:
        raise UserError(f"cannot write {folder} ({e.strerror or e}); solve this and train again") from e


def check_new_folder(folder: Path) -> None:
    """Raise UserError if a tokenizer lies in `folder` already, or if it cannot be written there."""
    if any(folder.glob("tokenizer.*")):
        raise UserError(f"{folder} has a tokenizer already; give a new folder")
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"{folder} cannot be written: give a new folder inside an existing one that you may write to")


def find_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two tokens that each token was merged from, in order. A ranks file does not name them: they are
    what is left of a token when only the merges before its own are applied."""
    merges = []
    for token in sorted(ranks, key=ranks.get):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            joined = [ranks.get(a + b, math.inf) for a, b in pairwise(parts)]
            at = joined.index(min(joined))
            if joined[at] >= ranks[token]:
                break
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:                                  # otherwise no merge makes it: it is always a whole word
            merges.append(tuple(parts))
    return merges


def byte_of_character() -> dict[str, int]:
    """GPT-2's printable characters for bytes: visible Latin-1 as it is, the others from U+0100 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}
