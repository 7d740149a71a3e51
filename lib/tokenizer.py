"""A checkpoint's own tokenizer: tokenizers' JSON or tiktoken's ranks, text streamed out of ids, and one trained."""

import base64
import hashlib
import json
import math
import os
import re
import shutil
from array import array
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np

from lib.cli import UserError, print0
from lib.folders import TOKENIZER_FILES

# GPT-4's way of cutting text into words before byte pairs are merged, with the typographic apostrophe that books use.
SPLIT_PATTERN = (r"['’](?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                 r"|\s*[\r\n]|\s+(?!\S)|\s+")
END_OF_TEXT = "<|endoftext|>"
# What tokenizers prepare or cut differently: case, accents, digits, spaces, scripts. Shards know them by it: it stays.
PROBE = ("  It's THE_end's na\u00efve e\u0301clair, don\u2019t I'LL \ufb01ne \u0130stanbul \u1e9e 1 12 123 123456 3e-5"
         "\n\n \n\u216b \u00bd \u0663\u0664 \uff26\uff55\uff4c\u3000 \u4f60\u597d\uff0c\u4e16\u754c\u3002 \u3053\u3093 "
         "\ud55c\uad6d \u05e9\u05b8 \u0939\u093f \u0e44\u0e17 \U0001f469\u200d\U0001f467 \u2620\ufe0f\n\tif (a!=b) {c;}"
         "   // --== \r\n  https://a.b/c?d=e&f#g x@y.org \0\a\u00a0\u200b\ufeff\u2028\ufffd ... !!! \"\u201cq\u201d\" "
         "\u00abr\u00bb \u2014\u2013- CamelCaseABC snake_case   \n")


class Tokenizer:
    """A checkpoint's own tokenizer: `tokenizer.json` through tokenizers, `tokenizer.tiktoken` through tiktoken.

    vocab_size: its largest id + 1 (a model's may be larger, padded). eos_ids: all ids that end a text, eos_id the first
    of them; bos_id: int; both None where there is none. first_id: the BOS that its template puts before every text, or
    None. file_hash: SHA-256 of the files that decide the ids, which older shards and runs carry instead of `hash`.
    """

    def __init__(self, fast, ranks, known: set[int], control: dict[str, int], eos: list[int], bos: list[int],
                 file_hash: str):
        self.fast, self.ranks = fast, ranks                  # one of the two is None
        self.known, self.control = known, control            # all ids that are tokens; {spelling: id} of control tokens
        self.vocab_size, self.file_hash = max(known) + 1, file_hash
        self.is_control = np.isin(np.arange(self.vocab_size), list(control.values()))
        self.eos_ids, self.eos_id, self.bos_id = tuple(eos), next(iter(eos), None), next(iter(bos), None)
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
            content = file.read_bytes()
            fast = ranks = None
            if file.suffix == ".json":
                from tokenizers import Tokenizer as Fast
                fast = Fast.from_file(str(file))
                fast.no_truncation()                         # some are saved with the limits of their last user
                fast.no_padding()
                added = fast.get_added_tokens_decoder()
                ids = fast.get_vocab(with_added_tokens=True)
                unknown = getattr(fast.model, "unk_token", "<unk>")  # of text without tokens; Unigram does not tell it
                control = {token.content: i for i, token in added.items() if token.special and token.content != unknown}
            else:
                import tiktoken
                pairs = [line.split() for line in content.splitlines() if line.strip()]
                merges = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
                if sum(len(token) == 1 for token in merges) != 256:
                    raise ValueError("single bytes are missing, so some texts could not be encoded")
                added, control = {}, config["special_tokens"]
                ranks = tiktoken.Encoding(file.name, pat_str=config["pat_str"], mergeable_ranks=merges,
                                          special_tokens=control)
                content += (folder / "tokenizer_config.json").read_bytes()
                ids = control | merges
            if not ids:
                raise ValueError("it has no tokens")
            eos, bos = (special_ids(folder, config, name, ids) for name in ("eos", "bos"))
            control = control | {added[i].content: i for i in eos + bos if i in added}
        except (KeyboardInterrupt, SystemExit, ImportError):
            raise
        except BaseException as e:                           # tokenizers raises Exception, a panic in Rust even less
            raise UserError(f"the tokenizer in {folder} cannot be read ({type(e).__name__}: {str(e)[:200]}); "
                            "copy its files again from the original checkpoint") from e
        if vocab_size is not None:
            check_ids(folder, vocab_size, [*ids.values(), *eos[:1], *bos[:1]], added)
            eos = [i for i in eos if i < vocab_size]         # no model says the others
        return cls(fast, ranks, set(ids.values()), control, eos, bos, hashlib.sha256(content).hexdigest())

    @cached_property
    def hash(self) -> str:
        """SHA-256 of what each id stands for, and of how text is cut: of the ids of PROBE and of all words. It is the
        same however the tokenizer's file is written, and token shards carry it."""
        words = sorted(self.token_bytes().items())
        digest = hashlib.sha256(repr(words).encode())
        with suppress(UserError):                            # some refuse text that they have no word for
            text = PROBE + "\n".join(word.decode("utf-8", "ignore") for _, word in words)
            for row in self.encode_rows([text, PROBE.lstrip()]):           # some put a space before a text without
                digest.update(row.astype(np.uint32).tobytes())
        return digest.hexdigest()

    @property
    def hashes(self) -> tuple[str, str]:
        return self.hash, self.file_hash

    def understands(self, other: "Tokenizer") -> bool:
        """True if the ids of `other` stand for the same here, however either cuts text."""
        return self.token_bytes() == other.token_bytes() and self.control.items() >= other.control.items()

    def encode(self, text: str, special: bool = False) -> list[int]:
        """The text's ids and nothing else: no BOS, no EOS. Control tokens that it spells are text, with `special` their
        ids. Raises UserError for what the tokenizer's library refuses."""
        if not special:
            return self.encode_batch([text])[0]
        with refusals(text):
            if self.ranks:
                return self.ranks.encode(well_formed(text), allowed_special="all")
            self.fast.encode_special_tokens = False
            return self.fast.encode(well_formed(text), add_special_tokens=False).ids

    def encode_prompt(self, text: str, special: bool = True) -> list[int]:
        """The ids that a prompt starts with: BOS where the tokenizer's template has it, then the text; never none.

        special: control tokens that it spells, as chats need them, become their ids."""
        ids = [self.first_id] * (self.first_id is not None) + self.encode(text, special)
        start = self.eos_id if self.bos_id is None else self.bos_id
        if not ids and start is None:
            raise UserError("the prompt is empty and the tokenizer has no token to begin with; give a prompt")
        return ids or [start]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, on all cores; control tokens that it spells are text."""
        return [row.tolist() for row in self.encode_rows([well_formed(text) for text in texts])]

    def encode_documents(self, texts: list[str], dtype: type) -> list[np.ndarray]:
        """The ids of each text with EOS behind them, dtype (n + 1,), on all cores. A text that the tokenizer's library
        refuses has none, not even EOS (0,), and a warning says so."""
        try:
            rows = self.encode_rows(texts)
        except UserError as e:
            if len(texts) > 1:
                return [row for text in texts for row in self.encode_documents([text], dtype)]
            print0(f"warning: {e}; it is left out")
            return [np.empty(0, dtype)]
        documents = [np.full(len(row) + 1, self.eos_id, dtype) for row in rows]
        for document, row in zip(documents, rows, strict=True):
            document[:-1] = row
        return documents

    def encode_rows(self, texts: list[str]) -> list[np.ndarray]:
        if self.ranks:                                       # no lists: making them would stop the other threads
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return list(pool.map(self.encode_ranks, texts))
        with refusals(texts[0]):
            self.fast.encode_special_tokens = True           # those that a text spells are text
            rows = [np.array(array("I", e.ids)) for e in self.fast.encode_batch_fast(texts, add_special_tokens=False)]
            return [self.encode_spelled(text) if self.is_control[row].any() else row
                    for text, row in zip(texts, rows, strict=True)]

    def encode_ranks(self, text: str) -> np.ndarray:
        """The ids of a text by tiktoken. It panics at some 500,000 spaces in a row, where its search for words runs out
        of stack: `regex` finds the same words, in more time."""
        with suppress(UserError), refusals(text):
            return self.ranks.encode_to_numpy(text, disallowed_special=())
        import regex  # comes with tiktoken

        with refusals(text):
            words = regex.finditer(self.ranks._pat_str, text)
            return np.array([i for word in words for i in self.ranks._encode_single_piece(word[0])], np.uint32)

    def encode_spelled(self, text: str) -> np.ndarray:
        """The ids of a text that spells control tokens, for tokenizers that have them among their words (Unigram,
        WordLevel, or not flagged): each spelling is cut in two, and an id that is still one of them left out."""
        cuts = [m.start() + 1 for m in re.finditer("|".join(map(re.escape, self.control)), text)]
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)]
        rows = [array("I", e.ids) for e in self.fast.encode_batch_fast(parts, add_special_tokens=False)]
        ids = np.concatenate(rows)
        return ids[~self.is_control[ids]]

    def token_bytes(self) -> dict[int, bytes]:
        """The bytes of text that each id stands for. Special tokens, which stand for none, are not among them."""
        if self.ranks:
            return {i: self.ranks.decode_single_token_bytes(i) for i in self.known - set(self.control.values())}
        added, found = self.fast.get_added_tokens_decoder(), {}
        to_byte = byte_of_character() if "ByteLevel" in str(self.fast.decoder) else None
        for token, i in self.fast.get_vocab(with_added_tokens=True).items():
            if i in added:
                if not added[i].special:
                    found[i] = added[i].content.encode()
            elif to_byte:
                found[i] = bytes(to_byte.get(c, 0) for c in token)
            elif re.fullmatch("<0x[0-9A-F]{2}>", token):     # sentencepiece's single bytes
                found[i] = bytes.fromhex(token[3:5])
            else:
                found[i] = token.replace("\u2581", " ").encode()
        return found

    def byte_lengths(self) -> np.ndarray:
        """How many bytes of text each id stands for, int64 (ids,): 0 for special tokens, also those beyond the rest."""
        special = (i + 1 for i in (self.eos_id, self.bos_id) if i is not None)
        lengths = np.zeros(max([self.vocab_size, *special]), np.int64)
        for i, token in self.token_bytes().items():
            lengths[i] = len(token)
        return lengths

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, special tokens spelled out; bytes that are not UTF-8 become U+FFFD."""
        ids = [i for i in map(int, ids) if i in self.known]  # gaps and a padded model's further ids are no text
        return self.fast.decode(ids, skip_special_tokens=False) if self.fast else self.ranks.decode(ids)


class TextStream:
    """Ids in, text out as soon as it is certain; never half a character, and a constant amount of work per id.

    What a token adds depends on its neighbours (bytes of one character, a leading space that decoders strip), so the
    last few ids are decoded together and only what goes beyond the text already given out is new.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Iterable[int] = ()):
        """`prompt`: the ids before the first, whose text stands there already."""
        self.decode, prompt = tokenizer.decode, list(prompt)
        start = {tokenizer.bos_id, *tokenizer.eos_ids, *tokenizer.control.values()}
        if start.issuperset(prompt):                         # a new text: decoders may strip its first space
            prompt = []
        self.ids, self.pending = prompt[-4:], 0              # a window of the last ids; how many are not yet settled
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
    return json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else {}


def special_ids(folder: Path, config: dict, name: str, ids: dict[str, int]) -> list[int]:
    """The ids of "eos" or "bos": that of the token which tokenizer_config.json names, then the numbers in the model's
    files. Raises ValueError for what is no number."""
    token = config.get(f"{name}_token")
    token = token.get("content") if isinstance(token, dict) else token
    found = [ids[token]] if token in ids else []
    for file in ("config.json", "generation_config.json"):
        numbers = read_json(folder / file).get(f"{name}_token_id")
        for number in numbers if isinstance(numbers, list) else [numbers]:
            if number is not None and type(number) is not int:
                raise ValueError(f"{name}_token_id in {file} is {number!r}; it must be a number, several or null")
            if number is not None and number >= 0:           # -1 is how some say none
                found.append(number)
    return list(dict.fromkeys(found))


def check_ids(folder: Path, vocab_size: int, ids: list[int], added: dict) -> None:
    """Raise UserError if some ids are not in the model's vocabulary. added: {id: AddedToken} of the added tokens."""
    beyond = {i for i in ids if i >= vocab_size}
    if beyond and beyond <= added.keys():
        names = ", ".join(f"{added[i].content!r} ({i})" for i in sorted(beyond)[:5])
        raise UserError(f"the tokenizer in {folder} has added tokens that lie beyond the model's vocabulary of "
                        f"{vocab_size}: {names}; remove them from its added_tokens, or copy the tokenizer of the "
                        "original checkpoint")
    if beyond:
        raise UserError(f"the tokenizer in {folder} has {max(beyond) + 1} ids but the model's vocabulary is "
                        f"{vocab_size}: it belongs to another model; copy the tokenizer of the original checkpoint")


@contextmanager
def refusals(text: str):
    """Whatever a tokenizer's library raises, a panic in Rust (a BaseException) as well, becomes a UserError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as e:
        raise UserError(f"the tokenizer refuses a text ({type(e).__name__}: {str(e)[:200]}) that begins with "
                        f"{text[:60]!r}") from e


def well_formed(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair: JSON can spell one, but no encoding and no tokenizer."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return re.sub("[\ud800-\udfff]", "\ufffd", text)


def copy_tokenizer(src, dst) -> None:
    """Copy the tokenizer files of folder `src` into folder `dst`. UserError if there is no tokenizer in `src`."""
    find_tokenizer(Path(src))
    if Path(src).resolve() == Path(dst).resolve():
        return
    for path in (Path(src) / name for name in TOKENIZER_FILES):
        if path.is_file():
            shutil.copy2(path, dst)
        elif path.is_dir():                                  # additional_chat_templates
            shutil.copytree(path, Path(dst) / path.name, dirs_exist_ok=True)


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder) -> None:
    """Write a byte-level BPE tokenizer into `folder`: vocab_size - 1 tokens and, as the last id, <|endoftext|>."""
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Fast
    folder = Path(folder)
    if any(folder.glob("tokenizer.*")):
        raise UserError(f"{folder} has a tokenizer already; give a new folder")
    if vocab_size < 257:
        raise UserError(f"a vocabulary of {vocab_size} is too small: 256 bytes and {END_OF_TEXT} need 257")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"{folder} cannot be written: give a new folder in one that is there and yours")
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
    # The ranks come last: what a kill leaves without them is no tokenizer yet, and the same command writes it anew.
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    try:
        replace_file(folder / "tokenizer_config.json", text.encode())
        replace_file(folder / "tokenizer.tiktoken", b"".join(lines))
    except OSError as e:
        raise UserError(f"cannot write {folder} ({e.strerror or e}); set it right and train again") from e


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that under its name there is never half of it, whatever is killed or unplugged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.tmp")
    with open(tmp, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)


def byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: Latin-1's visible characters are themselves, the rest follow from 256."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


def write_fast_tokenizer(folder: Path, bos_id: int | None, eos_id: int | list[int] | None, n_ctx: int) -> None:
    """Write the tokenizer.tiktoken in `folder`, which few programs read, as a tokenizer.json of the same ids.

    A ranks file names the tokens in the order in which they were merged, not out of which two: those are what is left
    of a token when only the merges before its own are made.
    """
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Fast
    config_file, encoding = folder / "tokenizer_config.json", Tokenizer.load(folder).ranks
    config = read_json(config_file)
    ranks = {token: encoding.encode_single_token(token) for token in encoding.token_byte_values()}
    character = {b: c for c, b in byte_of_character().items()}
    spelled = {token: "".join(map(character.get, token)) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            joined = [ranks.get(a + b, math.inf) for a, b in pairwise(parts)]
            at = joined.index(min(joined))
            if joined[at] >= ranks[token]:
                break
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:                                              # else only a whole word is this token
            merges.append(tuple(spelled[part] for part in parts))
    special = config.pop("special_tokens")
    fast = Fast(models.BPE({spelled[token]: i for token, i in ranks.items()} | special, merges, ignore_merges=True))
    fast.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(config.pop("pat_str")), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer.tiktoken").unlink()
    by_id = {i: token for token, i in special.items()}
    eos, *_ = eos_id if isinstance(eos_id, list) else [eos_id]
    eos = config.get("eos_token") or by_id.get(eos)
    named = {"bos_token": by_id.get(bos_id, eos), "eos_token": eos, "unk_token": eos, "pad_token": eos}
    config = named | config | {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": n_ctx,
                               "clean_up_tokenization_spaces": False}
    config_file.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
