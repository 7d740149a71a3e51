"""A model as one GGUF file, for llama.cpp and the programs built on it.

A full-size model is written as llama.cpp's architecture of its family. A tied Llama in a loop is written as `nanbeige`:
Llama's layers, stored once and run num_loops times, with a KV cache for each loop. So its file is as small as the
checkpoint is, and holds nothing that a stock llama.cpp (from July 2026) does not know.

Source: llama.cpp's src/models, src/llama-vocab.cpp and conversion/. The file itself is written by its package `gguf`.
"""

import json
import math
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from lib.bpe import SPLIT_PATTERN
from lib.checks import cast
from lib.cli import UserError, progress
from lib.folders import write_beside
from lib.tokenizer import Tokenizer, copy_tokenizer, write_fast_tokenizer

UNROLL = "--unroll writes every layer of every loop out, which llama.cpp runs as a full-size model"
CONVERTER = ("use llama.cpp's convert_hf_to_gguf.py on its folder in Hugging Face's layout, as --unroll --out=FOLDER "
             "writes it")
ARCHS = {"llama": "llama", "mistral": "llama", "gemma": "gemma", "qwen2": "qwen2", "qwen3": "qwen3"}  # ours -> theirs


def architecture(c) -> str:
    """llama.cpp's name of the architecture that computes a model of Config `c`. UserError if it has none."""
    if c.rank or c.vectors == "per_loop":
        raise UserError("llama.cpp has no architecture with weights per loop, and this model has "
                        + (f"a LoRA of rank {c.rank} for each" if c.rank else "norm weights for each") + f"; {UNROLL}")
    if c.kv == "first_loop":
        raise UserError("llama.cpp's looped architecture computes keys and values in every loop, and this model in the "
                        "first alone (kv=first_loop); use the checkpoint as it is, or convert with --kv=own")
    if c.arch not in ARCHS:
        raise UserError(f"GGUF files are written for {', '.join(ARCHS)}, and this is a {c.arch} model; {CONVERTER}")
    arch = ARCHS[c.arch]
    if (c.attn_bias, c.qk_norm) != (arch == "qwen2", arch == "qwen3") or c.attn_bias and c.o_bias or (
            c.mlp_bias or c.parallel or c.no_rope or c.rotary_pct != 1):
        raise UserError(f"llama.cpp's {arch} has no such biases, norms of heads, parallel attention and MLP, or "
                        f"rotation of a part, and this model has; {CONVERTER}")
    if c.rope_llama3 and arch != "llama":
        raise UserError("llama.cpp scales rotary embeddings as Llama 3.1 does in Llama only, and this is "
                        f"{arch}; {CONVERTER}")
    if arch == "gemma" and not c.tie_head:
        raise UserError("llama.cpp's gemma takes the embedding for its head, and this model has a head of its own; "
                        "use it as it is, or --unroll --out=FOLDER for transformers")
    if c.n_loop > 1 and arch != "llama":
        raise UserError(f"llama.cpp loops over layers of Llama only, and these are {c.arch}'s; {UNROLL}")
    return "nanbeige" if c.n_loop > 1 else arch


def write_gguf(file, arch: str, c, tensors: dict[str, Tensor], tokenizer, dtype: str) -> list[str]:
    """Write a model of Config `c`, its tensors under Hugging Face's names, as one file of `architecture` arch. What
    is different about its tokenizer in llama.cpp comes back.

    `tokenizer`: the folder that holds it. dtype: a torch dtype's name, or q8_0 (blocks of 32 weights in 8 bits with a
    scale). llama.cpp wants vectors in float32; rows that are no whole number of blocks are float16.
    """
    try:
        import gguf
    except ImportError:
        raise UserError('--gguf needs the package gguf: pip install -e ".[gguf]"') from None
    file = Path(file)
    check_file(file)
    kind, file_type = {"float32": ("F32", "ALL_F32"), "float16": ("F16", "MOSTLY_F16"),
                       "bfloat16": ("BF16", "MOSTLY_BF16"), "q8_0": ("Q8_0", "MOSTLY_Q8_0")}[dtype]
    writer = gguf.GGUFWriter(None, arch)
    writer.add_type("model")
    writer.add_name(Path(str(c.extra.get("_name_or_path", file.stem))).name)
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(2)                       # of llama.cpp's block formats
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.n_ctx)
    writer.add_block_count(c.n_unique)
    writer.add_embedding_length(c.n_embd)
    writer.add_feed_forward_length(c.n_hidden)
    writer.add_head_count(c.n_head)
    writer.add_head_count_kv(c.n_kv_head)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    if arch == "nanbeige":
        writer.add_uint32("nanbeige.num_loops", c.n_loop)
        # Nanbeige's own model norms the states between two loops; the paper's loops hand them on as they are (Eq. 2).
        writer.add_bool("nanbeige.skip_loop_final_norm", True)
    notes = add_tokenizer(writer, Path(tokenizer), c)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[ARCHS[c.arch].upper()], c.n_unique)
    new = {}                                                 # llama.cpp's name -> its tensor and type
    for theirs, w in tensors.items():
        name = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        rows = "F16" if kind == "Q8_0" and w.size(-1) % 32 else kind
        new[name] = w, gguf.GGMLQuantizationType["F32" if w.dim() == 1 else rows]
    blocks = gguf.GGML_QUANT_SIZES                           # of each type: (weights, bytes) of a block
    if c.rope_llama3:
        new["rope_freqs.weight"] = rope_divisors(c), gguf.GGMLQuantizationType.F32
    sizes = [w.numel() // blocks[qtype][0] * blocks[qtype][1] for w, qtype in new.values()]
    for (name, (w, qtype)), size in zip(new.items(), sizes, strict=True):
        writer.add_tensor_info(name, w.shape, np.dtype(np.float32), size, qtype)

    def write(path: Path) -> None:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        end = sum(writer.ggml_pad(n, writer.data_alignment) for n in (writer.fout[0].tell(), *sizes))
        try:
            for name, (w, qtype) in progress(new.items(), desc="writing", unit="tensor"):   # one at a time in memory
                w = cast(w, torch.float16 if qtype.name == "F16" else w.dtype, name)
                writer.write_tensor_data(gguf.quants.quantize(as_stored(w.float(), name, c).numpy(), qtype))
        finally:
            writer.close()
        if path.stat().st_size != end:                       # numpy's tofile, which it writes with, may fail silently
            raise OSError("the file is cut short: is the disk full?")
    write_beside(file.parent, file.name, write)
    return notes


def as_stored(w: Tensor, name: str, c) -> Tensor:
    """The values (fp32) that llama.cpp's tensor `name` has for our `w`."""
    if c.arch == "gemma" and name.endswith("norm.weight"):
        return w + 1.0                                       # its RMSNorm multiplies by the weight, Gemma's by 1 + it
    if ARCHS[c.arch] == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
        # Llama's rotary embedding turns dimensions 2i and 2i + 1 of a head there; in Hugging Face's order, and ours,
        # i and i + D/2. nanbeige does as Llama; Gemma and Qwen are in Hugging Face's order.
        return w.view(-1, 2, c.head_dim // 2, w.size(-1)).transpose(1, 2).reshape(w.shape)
    return w


def rope_divisors(c) -> Tensor:
    """What llama.cpp divides the rotary frequencies (D/2,) by, for Llama 3.1's scaling: see `rope_angles`, model.py."""
    factor, low, high, n_ctx = c.rope_llama3
    freq = 1.0 / c.rope_theta ** (torch.arange(0, c.head_dim, 2, dtype=torch.float32) / c.head_dim)
    keep = ((n_ctx / (2 * math.pi / freq) - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - keep) / factor + keep)


def check_file(file: Path) -> None:
    """Raise UserError if `file` cannot be written, or is there and is not a GGUF file."""
    if not file.parent.is_dir() or file.is_dir():
        raise UserError(f"--gguf={file} must be a file in a folder that exists")
    if file.exists():
        with open(file, "rb") as f:
            if f.read(4) != b"GGUF":
                raise UserError(f"--gguf={file} is there and is not a GGUF file; give another name")


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer: llama.cpp has the ways of splitting text into words built in, and a file names one of them

GPT2 = "GPT-2's pattern, which ByteLevel has built in"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
PRE_TOKENIZERS = {  # the patterns that cut a text, one after another -> llama.cpp's name for them
    (GPT2,): "gpt-2",
    (r"\p{N}", GPT2): "smollm",
    (LLAMA3,): "llama-bpe",
    (LLAMA3.replace("{1,3}", ""),): "qwen2",
    (SPLIT_PATTERN,): "llama-bpe",
}


def add_tokenizer(writer, folder: Path, c) -> list[str]:
    """Add the tokenizer in `folder` to a GGUFWriter: tokens, merges or scores, special ids, chat template. What is
    different in llama.cpp comes back. UserError for a tokenizer that llama.cpp does not have."""
    import gguf
    tokenizer = Tokenizer.load(folder, c.vocab_size)
    with TemporaryDirectory() as tmp:
        copy_tokenizer(folder, tmp)
        if not (Path(tmp) / "tokenizer.json").exists():      # tiktoken ranks
            write_fast_tokenizer(Path(tmp), c.bos_token_id, c.eos_token_id, c.n_ctx)
        spec = json.loads((Path(tmp) / "tokenizer.json").read_text(encoding="utf-8"))
        model, notes = spec["model"], []
        if model["type"] != "BPE":
            refuse_tokenizer(f"its model is {model['type']}, not BPE")
        if not tokenizer.eos_ids:
            refuse_tokenizer("it names no end-of-text token, for which llama.cpp would take id 11")
        spm = bool(model.get("byte_fallback"))               # sentencepiece's: unknown characters as tokens <0xAB>
        special = gguf.SpecialVocab(tmp, load_merges=not spm, n_vocab=c.vocab_size)
    added = {token["id"]: token for token in spec["added_tokens"]}
    texts = {i: text for text, i in model["vocab"].items()} | {i: token["content"] for i, token in added.items()}
    kinds = []
    for i in range(c.vocab_size):
        text = texts.setdefault(i, f"[PAD{i}]")              # the model's padding
        if spm and text == model.get("unk_token"):
            kinds.append(gguf.TokenType.UNKNOWN)
        elif i in added:
            kinds.append(gguf.TokenType.CONTROL if added[i]["special"] else gguf.TokenType.USER_DEFINED)
        elif text == f"[PAD{i}]":
            kinds.append(gguf.TokenType.UNUSED)
        else:
            is_byte = spm and re.fullmatch("<0x[0-9A-F]{2}>", text)
            kinds.append(gguf.TokenType.BYTE if is_byte else gguf.TokenType.NORMAL)
    tokens = [texts[i] for i in range(c.vocab_size)]
    writer.add_tokenizer_model("llama" if spm else "gpt2")
    writer.add_tokenizer_pre("default" if spm else pre_tokenizer(spec, notes))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if spm:
        writer.add_token_scores(scores(model, tokens))
        writer.add_add_space_prefix(has_space_prefix(spec))
    special.special_token_ids |= dict(zip(("eos", "eot", "eom"), tokenizer.eos_ids, strict=False))
    if tokenizer.bos_id is not None:
        special.special_token_ids["bos"] = tokenizer.bos_id
    special.add_special_token = {"bos": tokenizer.first_id is not None, "eos": False}
    special.add_to_gguf(writer, quiet=True)
    return notes


def refuse_tokenizer(reason: str):
    raise UserError(f"the tokenizer is not written into GGUF files: {reason}; {CONVERTER}: it knows more tokenizers")


def pre_tokenizer(spec: dict, notes: list[str]) -> str:
    """llama.cpp's name for how a byte-level tokenizer.json cuts text into words; adds to the notes what differs."""
    if spec["normalizer"]:
        if spec["normalizer"]["type"] != "NFC":
            refuse_tokenizer(f"its normalizer is {spec['normalizer']['type']}")
        notes.append("llama.cpp does not normalise text, and this tokenizer composes it (NFC)")
    patterns, pre = [], spec["pre_tokenizer"] or {"type": "none"}
    for step in pre.get("pretokenizers", [pre]):
        if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            patterns += [GPT2] if step.get("use_regex", True) else []       # older files have none
        elif step["type"] == "Digits" and step["individual_digits"]:
            patterns.append(r"\p{N}")
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            patterns.append(step["pattern"].get("Regex"))
        else:
            refuse_tokenizer(f"it cuts text by {json.dumps(step)}")
    name = PRE_TOKENIZERS.get(tuple(patterns))
    if name is None:
        refuse_tokenizer(f"llama.cpp has no name for words cut by {' and then '.join(map(str, patterns))}")
    if bool(spec["model"].get("ignore_merges")) != (name == "llama-bpe"):
        refuse_tokenizer(f"llama.cpp's {name} has the other value of ignore_merges")
    if patterns == [SPLIT_PATTERN]:
        notes.append("llama.cpp cuts text as Llama 3 does, and so not after the typographic apostrophe's ’s, ’t, ’re, "
                     "’ve, ’m, ’ll, ’d if letters follow (’tis)")
    return name


def scores(model: dict, tokens: list[str]) -> list[float]:
    """For llama.cpp, which merges the pair whose token scores most: minus the rank of the first merge that makes it.

    UserError unless the merges are sentencepiece's: all pairs that make a token, those of one token together.
    """
    pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    ranks, last, known = {}, None, set(pairs)
    for rank, pair in enumerate(pairs):
        made = "".join(pair)
        if made != last and made in ranks:
            refuse_tokenizer(f"its merges make {made!r} at different ranks")
        ranks.setdefault(made, rank)
        last = made
    for made in ranks:
        for pair in ((made[:i], made[i:]) for i in range(1, len(made))):
            if pair not in known and pair[0] in model["vocab"] and pair[1] in model["vocab"]:
                refuse_tokenizer(f"it does not merge {pair[0]!r} and {pair[1]!r} into {made!r}, and llama.cpp would")
    return [-float(ranks.get(token, 1e9)) for token in tokens]


def has_space_prefix(spec: dict) -> bool:
    """True if a ▁ is put before a text (Llama), False if not (Gemma). UserError for other ways to write spaces."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    normalizer, pre = spec["normalizer"] or {}, spec["pre_tokenizer"]
    steps = normalizer.get("normalizers", [normalizer])
    if steps not in ([replace], [prepend, replace]) or pre and pre != {  # which cuts at spaces, and none are left
            "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}:
        refuse_tokenizer(f"it writes spaces by {json.dumps([normalizer, pre])}")
    return steps[0] == prepend
