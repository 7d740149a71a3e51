"""A checkpoint's own tokenizer (tokenizer.json or tiktoken ranks), and text streamed from its ids."""

import base64
import hashlib
import json
import os
import re
import shutil
from array import array
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path

import numpy as np

from lib.bpe import byte_of_character, find_merges
from lib.bpe import train_tokenizer as train_tokenizer
from lib.cli import UserError, print0
from lib.folders import TOKENIZER_FILES, settled

# Text that tokenizers normalise or split differently: case, accents, digits, spaces, scripts. `hash` depends
# on it, and shards store that hash: never change it.
PROBE = ("  It's THE_end's na\u00efve e\u0301clair, don\u2019t I'LL \ufb01ne \u0130stanbul \u1e9e 1 12 123 123456 3e-5"
         "\n\n \n\u216b \u00bd \u0663\u0664 \uff26\uff55\uff4c\u3000 \u4f60\u597d\uff0c\u4e16\u754c\u3002 \u3053\u3093 "
         "\ud55c\uad6d \u05e9\u05b8 \u0939\u093f \u0e44\u0e17 \U0001f469\u200d\U0001f467 \u2620\ufe0f\n\tif (a!=b) {c;}"
         "   // --== \r\n  https://a.b/c?d=e&f#g x@y.org \0\a\u00a0\u200b\ufeff\u2028\ufffd ... !!! \"\u201cq\u201d\" "
         "\u00abr\u00bb \u2014\u2013- CamelCaseABC snake_case   \n")


class Tokenizer:
    """A checkpoint's own tokenizer: `tokenizer.json` by tokenizers, `tokenizer.tiktoken` by tiktoken.

    vocab_size: largest id + 1 (the model's may be larger, as padding). eos_ids: a tuple of the ids that end a
    text; the first stands between documents. bos_id: an id or None. first_id: the BOS that the tokenizer's
    template puts before every text, or None. file_hash: SHA-256 of the files that determine the ids, which
    older shards and runs store instead of `hash`.
    """

    def __init__(self, fast, ranks, known: set[int], control: dict[str, int], eos: list[int], bos: list[int],
                 file_hash: str):
        self.fast, self.ranks = fast, ranks                  # a tokenizers.Tokenizer or a tiktoken.Encoding
        self.known, self.control = known, control            # ids of all tokens; {spelling: id} of control tokens
        self.vocab_size, self.file_hash = max(known) + 1, file_hash
        self.is_control = np.isin(np.arange(self.vocab_size), list(control.values()))
        self.eos_ids, self.bos_id = tuple(eos), next(iter(bos), None)
        # Gemma and Llama put BOS before every text, and Gemma fails without it; Pythia and SmolLM2 do not.
        template = fast.encode("", add_special_tokens=True).ids if fast else []
        self.first_id = template[0] if template[:1] == [self.bos_id] else None

    @classmethod
    def load(cls, folder, vocab_size: int | None = None) -> "Tokenizer":
        """The tokenizer in `folder`. UserError if it is missing, corrupt, or has ids >= vocab_size."""
        folder = settled(folder)
        file = find_tokenizer(folder)
        try:
            config = read_optional_json(folder / "tokenizer_config.json")
            content = file.read_bytes()
            fast = ranks = None
            if file.suffix == ".json":
                fast, added, ids, control = open_fast(file)
            else:
                ranks, added, ids, control = open_ranks(file.name, content, config)
                content += (folder / "tokenizer_config.json").read_bytes()
            if not ids:
                raise ValueError("it has no tokens")
            eos, bos = (special_ids(folder, config, name, ids) for name in ("eos", "bos"))
            control = control | {added[i].content: i for i in eos + bos if i in added}
        except (KeyboardInterrupt, SystemExit, ImportError):
            raise
        except BaseException as e:                           # tokenizers raises Exception; a Rust panic is not even one
            raise UserError(f"the tokenizer in {folder} cannot be read ({type(e).__name__}: {str(e)[:200]}); "
                            "copy its files again from the original checkpoint") from e
        if vocab_size is not None:
            check_ids(folder, vocab_size, [*ids.values(), *eos[:1], *bos[:1]], added)
            eos = [i for i in eos if i < vocab_size]         # the model cannot predict the others
        return cls(fast, ranks, set(ids.values()), control, eos, bos, hashlib.sha256(content).hexdigest())

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the bytes of each id and of how text is split: the ids of PROBE and of all tokens' text.

        It does not depend on how the tokenizer's file is written. Token shards store it.
        """
        tokens = sorted(self.token_bytes().items())
        digest = hashlib.sha256(repr(tokens).encode())
        with suppress(UserError):                            # some refuse text that their vocabulary lacks
            text = PROBE + "\n".join(token.decode("utf-8", "ignore") for _, token in tokens)
            for row in self.encode_rows([text, PROBE.lstrip()]):   # some add a space before a text that has none
                digest.update(row.astype(np.uint32).tobytes())
        return digest.hexdigest()

    @property
    def hashes(self) -> tuple[str, str]:
        return self.hash, self.file_hash

    def understands(self, other: "Tokenizer") -> bool:
        """True if all ids of `other` mean the same in this tokenizer; the two may split text differently."""
        return self.token_bytes() == other.token_bytes() and self.control.items() >= other.control.items()

    @property
    def eos_id(self) -> int | tuple[int, ...] | None:
        """The id that ends a text, a tuple of several, or None: as `decode` and the engine take it."""
        return self.eos_ids[0] if len(self.eos_ids) == 1 else self.eos_ids or None

    def encode(self, text: str, special: bool = False) -> list[int]:
        """The ids of the text alone, without BOS or EOS.

        special: a spelled control token becomes its id; otherwise it is encoded as plain text.
        Raises UserError for text that the tokenizer's library refuses.
        """
        if not special:
            return self.encode_batch([text])[0]
        with explain_refusal(text):
            if self.ranks:
                return self.ranks.encode(well_formed(text), allowed_special="all")
            self.fast.encode_special_tokens = False
            return self.fast.encode(well_formed(text), add_special_tokens=False).ids

    def encode_prompt(self, text: str, special: bool = True) -> list[int]:
        """The ids of a prompt, at least one: BOS if the tokenizer's template has it, then the text.

        special: spelled control tokens become their ids, as chat templates need.
        """
        ids = [self.first_id] * (self.first_id is not None) + self.encode(text, special)
        start = next(iter(self.eos_ids), None) if self.bos_id is None else self.bos_id
        if not ids and start is None:
            raise UserError("the prompt is empty and the tokenizer has no token to begin with; give a prompt")
        return ids or [start]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, on all cores; spelled control tokens are plain text."""
        return [row.tolist() for row in self.encode_rows([well_formed(text) for text in texts])]

    def encode_documents(self, texts: list[str], dtype: type) -> list[np.ndarray]:
        """The ids of each text followed by EOS, dtype (n + 1,), on all cores.

        A text that the tokenizer's library refuses yields an empty array, without EOS, and a warning.
        """
        try:
            rows = self.encode_rows(texts)
        except UserError as e:
            if len(texts) > 1:
                return [row for text in texts for row in self.encode_documents([text], dtype)]
            print0(f"warning: {e}; it is left out")
            return [np.empty(0, dtype)]
        documents = [np.full(len(row) + 1, self.eos_ids[0], dtype) for row in rows]
        for document, row in zip(documents, rows, strict=True):
            document[:-1] = row
        return documents

    def encode_rows(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each well-formed text as an array."""
        if self.ranks:                                       # arrays: building lists would hold the GIL
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return list(pool.map(self.encode_ranks, texts))
        with explain_refusal(texts[0]):
            self.fast.encode_special_tokens = True           # encode spelled control tokens as plain text
            rows = [np.array(array("I", e.ids)) for e in self.fast.encode_batch_fast(texts, add_special_tokens=False)]
            return [self.encode_spelled(text) if self.is_control[row].any() else row
                    for text, row in zip(texts, rows, strict=True)]

    def encode_ranks(self, text: str) -> np.ndarray:
        """The ids of a text by tiktoken. Its regular expression overflows the stack at some 500,000 spaces in
        a row and panics; the package regex then finds the same words, more slowly."""
        with suppress(UserError), explain_refusal(text):
            return self.ranks.encode_to_numpy(text, disallowed_special=())
        import regex  # comes with tiktoken

        with explain_refusal(text):
            words = regex.finditer(self.ranks._pat_str, text)
            return np.array([i for word in words for i in self.ranks._encode_single_piece(word[0])], np.uint32)

    def encode_spelled(self, text: str) -> np.ndarray:
        """The ids of a text that spells control tokens, for tokenizers whose model has these in its vocabulary
        (Unigram, WordLevel): each spelling is cut in two, and control ids that remain are dropped."""
        cuts = [m.start() + 1 for m in re.finditer("|".join(map(re.escape, self.control)), text)]
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)]
        rows = [array("I", e.ids) for e in self.fast.encode_batch_fast(parts, add_special_tokens=False)]
        ids = np.concatenate(rows)
        return ids[~self.is_control[ids]]

    def token_bytes(self) -> dict[int, bytes]:
        """{id: bytes of text} of all tokens but the special ones, which stand for no text."""
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
        """Bytes of text of each id, int64 (n_ids,); 0 for special tokens, of which some lie beyond the rest."""
        special = (i + 1 for i in (*self.eos_ids, self.bos_id) if i is not None)
        lengths = np.zeros(max([self.vocab_size, *special]), np.int64)
        for i, token in self.token_bytes().items():
            lengths[i] = len(token)
        return lengths

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, with special tokens spelled out and U+FFFD for bytes that are not UTF-8."""
        ids = [i for i in map(int, ids) if i in self.known]  # ids in gaps or in a model's padding have no text
        return self.fast.decode(ids, skip_special_tokens=False) if self.fast else self.ranks.decode(ids)


class TextStream:
    """Turns ids into text one by one, without ever returning half a character; the work per id is constant.

    The text of a token depends on its neighbours (bytes of one character, a leading space that decoders
    strip), so the last few ids are decoded together and only text beyond what was returned is new.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Iterable[int] = ()):
        """prompt: the ids before the first, whose text has been shown."""
        self.decode, prompt = tokenizer.decode, list(prompt)
        start = {tokenizer.bos_id, *tokenizer.eos_ids, *tokenizer.control.values()}
        if start.issuperset(prompt):                         # a new text, whose first space decoders may strip
            prompt = []
        self.ids, self.pending = prompt[-4:], 0              # the last ids; how many of them are not yet text
        self.shown = len(self.decode(self.ids))              # characters of these ids' text already returned

    def push(self, id: int) -> str:
        """The text that is certain now and was not before; often empty."""
        self.ids.append(id)
        self.pending += 1
        text = self.decode(self.ids)
        # An incomplete character has at most three bytes, so three ids; with more there is an invalid byte.
        settled = len(text.rstrip("\ufffd")) if self.pending < 4 else len(text) - text.endswith("\ufffd")
        settled = max(settled, self.shown)
        new = text[self.shown:settled]
        if settled == len(text):                             # all is returned: these ids are the next context
            self.ids, self.pending = self.ids[-self.pending:], 0
            self.shown = len(self.decode(self.ids))
        elif self.pending >= 4:
            self.ids, self.shown = self.ids[-4:], len(self.decode(self.ids[-4:])) - 1
        else:
            self.shown = settled
        return new

    def flush(self) -> str:
        """The rest of the text, with U+FFFD for an incomplete character."""
        rest = self.decode(self.ids)[self.shown:] if self.ids else ""
        self.ids, self.shown, self.pending = [], 0, 0
        return rest


def find_tokenizer(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer.tiktoken"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"no tokenizer in {folder}: need tokenizer.json or tokenizer.tiktoken; "
                    "copy it from the original checkpoint (or have transformers' AutoTokenizer make it of a "
                    "tokenizer.model: from_pretrained, save_pretrained)")


def open_fast(file: Path):
    """(tokenizers.Tokenizer, {id: AddedToken}, {token: id}, {spelling: id} of control tokens) of a file."""
    from tokenizers import Tokenizer as Fast
    fast = Fast.from_file(str(file))
    fast.no_truncation()                                     # some are saved with the limits of their last user
    fast.no_padding()
    added = fast.get_added_tokens_decoder()
    unknown = getattr(fast.model, "unk_token", "<unk>")      # stands for text; Unigram does not expose it
    control = {token.content: i for i, token in added.items() if token.special and token.content != unknown}
    return fast, added, fast.get_vocab(with_added_tokens=True), control


def open_ranks(name: str, content: bytes, config: dict):
    """The same, with a tiktoken.Encoding, of a tokenizer.tiktoken and its tokenizer_config.json."""
    import tiktoken
    pairs = [line.split() for line in content.splitlines() if line.strip()]
    merges = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    if sum(len(token) == 1 for token in merges) != 256:
        raise ValueError("single bytes are missing, so some texts could not be encoded")
    control = config["special_tokens"]
    ranks = tiktoken.Encoding(name, pat_str=config["pat_str"], mergeable_ranks=merges, special_tokens=control)
    return ranks, {}, control | merges, control


def read_optional_json(path: Path) -> dict:
    """The contents of a JSON file; {} if there is none."""
    return json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else {}


def special_ids(folder: Path, config: dict, name: str, ids: dict[str, int]) -> list[int]:
    """The ids of "eos" or "bos": of the token in tokenizer_config.json, then those in the model's configs.
    Raises ValueError for anything but numbers."""
    token = config.get(f"{name}_token")
    token = token.get("content") if isinstance(token, dict) else token
    found = [ids[token]] if token in ids else []
    for file in ("config.json", "generation_config.json"):
        numbers = read_optional_json(folder / file).get(f"{name}_token_id")
        for number in numbers if isinstance(numbers, list) else [numbers]:
            if number is not None and type(number) is not int:
                raise ValueError(f"{name}_token_id in {file} is {number!r}; it must be a number, several or null")
            if number is not None and number >= 0:           # -1 means none in some configs
                found.append(number)
    return list(dict.fromkeys(found))


def check_ids(folder: Path, vocab_size: int, ids: list[int], added: dict) -> None:
    """Raise UserError if ids lie outside the model's vocabulary. added: {id: AddedToken}."""
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
def explain_refusal(text: str):
    """Turn everything that a tokenizer's library raises, also a Rust panic, into a UserError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as e:
        raise UserError(f"the tokenizer refuses a text ({type(e).__name__}: {str(e)[:200]}) that begins with "
                        f"{text[:60]!r}") from e


def well_formed(text: str) -> str:
    """The text with U+FFFD for each lone half of a surrogate pair, which JSON allows but UTF-8 does not."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return re.sub("[\ud800-\udfff]", "\ufffd", text)


def copy_tokenizer(src, dst) -> None:
    """Copy the tokenizer files of folder `src` into folder `dst`. UserError if there is none."""
    src = settled(src)
    find_tokenizer(src)
    if src.resolve() == Path(dst).resolve():
        return
    for path in (src / name for name in TOKENIZER_FILES):
        if path.is_file():
            shutil.copy2(path, dst)
        elif path.is_dir():                                  # additional_chat_templates
            shutil.copytree(path, Path(dst) / path.name, dirs_exist_ok=True)


def write_fast_tokenizer(folder: Path, bos_id: int | None, eos_id: int | list[int] | None, n_ctx: int) -> None:
    """Replace the tokenizer.tiktoken in `folder`, which few programs read, by a tokenizer.json."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Fast
    config_file, encoding = folder / "tokenizer_config.json", Tokenizer.load(folder).ranks
    config = read_optional_json(config_file)
    ranks = {token: encoding.encode_single_token(token) for token in encoding.token_byte_values()}
    character = {b: c for c, b in byte_of_character().items()}
    spelled = {token: "".join(map(character.get, token)) for token in ranks}
    merges = [(spelled[a], spelled[b]) for a, b in find_merges(ranks)]
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
