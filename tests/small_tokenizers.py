"""Small tokenizers of three kinds, and texts that are hard for them."""

import json

import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from lib.bpe import train_tokenizer

PLAIN = "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals. " * 20
HARD = "naïve café  — 你好，世界! 👩‍👩‍👧 🏴‍☠️\n\n\tdon’t <|endoftext|> 1234567 ٣ ﷽ \u0301e zero\u200bwidth"


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """A tiktoken ranks folder, 300 entries."""
    folder = tmp_path_factory.mktemp("ranks")
    train_tokenizer([PLAIN, "?👩?😀?🚀" * 20], 300, folder)    # merges "?" with half an emoji
    return folder


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory):
    """tokenizer.json in the manner of Pythia: byte-level BPE."""
    fast = Fast(models.BPE())
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast.train_from_iterator([PLAIN], trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["</s>"],
        show_progress=False))
    return save(fast, tmp_path_factory.mktemp("byte_level"))


@pytest.fixture(scope="session")
def metaspace(tmp_path_factory):
    """tokenizer.json in the manner of Llama: spaces as ▁, one in front, unknown characters as bytes."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *"▁abcdefghijklmnopqrstuvwxyzIé.,;", "▁a",
             "▁t", "▁th", "▁the"]
    fast = Fast(models.BPE({w: i for i, w in enumerate(words)}, [("▁", "a"), ("▁", "t"), ("▁t", "h"), ("▁th", "e")],
                           unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    fast.add_special_tokens(["<unk>", "<s>", "</s>"])
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(" ", 1, 0)])
    fast.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return save(fast, tmp_path_factory.mktemp("metaspace"))


def save(fast, folder, eos="</s>"):
    fast.enable_truncation(7)                                # some tokenizers are saved with such limits
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": eos}}))
    return folder


BACKENDS = pytest.mark.parametrize("kind", ["ranks", "byte_level", "metaspace"])
