"""GGUF files: every tensor and key read back, tokenizers, what is refused; and llama.cpp itself where it is installed.

    pip install llama-cpp-python    # 0.3.36 or later knows nanbeige; the last tests are skipped without it
"""

import json
import math
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from small_tokenizers import HARD, PLAIN
from test_model import close, last, randomise, tokens
from tiny import files_end_at
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Fast

import convert
from convert import to_recursive, unroll
from lib.bpe import SPLIT_PATTERN
from lib.cli import UserError
from lib.gguf_export import LLAMA3
from lib.tokenizer import PROBE, Tokenizer, copy_tokenizer
from model import Config, RecursiveTransformer

gguf = pytest.importorskip("gguf")
LLAMA = {"arch": "llama", "n_layer": 4, "n_embd": 64, "n_head": 4, "n_kv_head": 2, "head_dim": 10, "n_hidden": 96,
         "n_ctx": 48, "tie_head": True, "norm_eps": 1e-5, "rope_theta": 5000.0}


def save(folder, tokenizer, **changes) -> RecursiveTransformer:
    """Write a small random model with five ids more than its tokenizer has; the model."""
    torch.manual_seed(0)
    size = Tokenizer.load(tokenizer).vocab_size + 5
    model = randomise(RecursiveTransformer(Config(**LLAMA | {"vocab_size": size} | changes)))
    model.save(folder)
    copy_tokenizer(tokenizer, folder)
    return model


def export(folder, **flags):
    """(tensors by name, keys) of the GGUF file that convert.py writes for the model in `folder`."""
    file = folder / "model.gguf"
    convert.main([f"--donor={folder}", f"--gguf={file}", *(f"--{name}={value}" for name, value in flags.items())])
    assert [path.name for path in folder.iterdir() if "gguf" in path.name] == ["model.gguf"]
    reader = gguf.GGUFReader(file)
    return {t.name: t for t in reader.tensors}, {k: f.contents() for k, f in reader.fields.items()}


def values(tensor) -> torch.Tensor:
    """The numbers of a tensor of a GGUF file, in float32 and torch's order of dimensions."""
    w = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    return w.view(*reversed(tensor.shape.tolist()))


NAMES = {"embed": "token_embd", "norm": "output_norm", "head": "output", "norm1": "attn_norm", "norm2": "ffn_norm",
         "attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v", "attn.o": "attn_output", "mlp.gate": "ffn_gate",
         "mlp.up": "ffn_up", "mlp.down": "ffn_down", "attn.q_norm": "attn_q_norm", "attn.k_norm": "attn_k_norm"}


def in_gguf(name: str, w: torch.Tensor, c: Config) -> tuple[str, torch.Tensor]:
    """llama.cpp's name and values (fp32) of our tensor."""
    module, _, kind = name.rpartition(".")
    w = w.float().clone()
    if c.arch == "gemma" and w.dim() == 1:
        w = w + 1
    if c.arch in ("llama", "mistral") and module.endswith(("attn.q", "attn.k")):
        rows, half = w.clone(), c.head_dim // 2
        for head in range(len(w) // c.head_dim):
            for i in range(half):                            # dimensions i and i + D/2 are turned together here
                at = head * c.head_dim
                w[at + 2 * i], w[at + 2 * i + 1] = rows[at + i], rows[at + i + half]
    if module.startswith("layers."):
        _, i, rest = module.split(".", 2)
        return f"blk.{i}.{NAMES[rest]}.{kind}", w
    return f"{NAMES[module]}.{kind}", w


KINDS = {"a tied Llama": {"n_loop": 2}, "three loops": {"n_loop": 3, "n_layer": 6}, "full size": {},
         "a head of its own": {"tie_head": False, "n_loop": 2},
         "Gemma": {"arch": "gemma", "n_kv_head": 1, "head_dim": 12}, "Mistral": {"arch": "mistral", "n_loop": 2},
         "Llama 3.1": {"n_loop": 2, "rope_llama3": [8.0, 0.5, 4.0, 32]},
         "Qwen 2": {"arch": "qwen2", "head_dim": 16, "attn_bias": True, "o_bias": False},
         "Qwen 3": {"arch": "qwen3", "head_dim": 10, "qk_norm": True}}
each_kind = pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)


@each_kind
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "q8_0"])
def test_every_tensor_is_the_models(changes, dtype, byte_level, tmp_path):
    model = save(tmp_path, byte_level, **changes)
    found, keys = export(tmp_path, dtype=dtype)
    want = dict(in_gguf(name, w, model.config) for name, w in model.state_dict().items())
    if changes.get("rope_llama3"):                           # what divides each frequency of a head's 10 dimensions
        turns = [32 / (2 * math.pi * 5000 ** (i / 5)) for i in range(5)]     # in the original context of 32
        keep = [min(max((t - 0.5) / 3.5, 0), 1) for t in turns]
        want["rope_freqs.weight"] = 1 / torch.tensor([(1 - k) / 8 + k for k in keep])
        assert keep[0] == 1 and 0 < keep[1] < 1 and keep[2] == 0
        close(values(found["rope_freqs.weight"]), want.pop("rope_freqs.weight"), 1e-6)
        del found["rope_freqs.weight"]
    assert found.keys() == want.keys()
    for name, w in want.items():
        kind = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "q8_0": "Q8_0"}[dtype]
        if w.size(-1) % 32 and kind == "Q8_0":               # attn_output reads 4 heads of 10: not blocks of 32
            kind = "F16"
        assert found[name].tensor_type.name == ("F32" if w.dim() == 1 else kind), name
        got = values(found[name])
        if w.dim() == 1:
            assert torch.equal(got, w), name
        elif kind == "Q8_0":                                 # half a step of 1/127 of the largest of 32, itself in fp16
            step = w.view(len(w), -1, 32).abs().amax(-1, keepdim=True) / 127
            assert ((got - w).view(len(w), -1, 32).abs() <= step * (0.5 + 127 * 2**-11)).all(), name
        else:
            assert torch.equal(got, w.to(getattr(torch, "float16" if kind == "F16" else dtype)).float()), name
    odd = {n for n in want if want[n].size(-1) % 32 and want[n].dim() > 1}
    assert odd == {n for n in want if "attn_output" in n and changes.get("head_dim") != 16}
    assert keys["general.file_type"] == {"float32": 0, "bfloat16": 32, "float16": 1, "q8_0": 7}[dtype]


@each_kind
def test_keys(changes, byte_level, tmp_path):
    c = save(tmp_path, byte_level, **changes).config
    _, keys = export(tmp_path)
    arch = "nanbeige" if c.n_loop > 1 else c.arch            # (Mistral's own is tested in a loop)
    want = {"vocab_size": c.vocab_size, "context_length": 48, "block_count": c.n_unique, "embedding_length": 64,
            "feed_forward_length": 96, "attention.head_count": 4, "attention.head_count_kv": c.n_kv_head,
            "attention.key_length": c.head_dim, "attention.value_length": c.head_dim, "rope.freq_base": 5000.0,
            "rope.dimension_count": c.head_dim, "attention.layer_norm_rms_epsilon": np.float32(1e-5)}
    if c.n_loop > 1:                                         # states go from loop to loop without the final norm
        want |= {"num_loops": c.n_loop, "skip_loop_final_norm": True}
    assert {k: v for k, v in keys.items() if k.startswith(arch)} == {f"{arch}.{k}": v for k, v in want.items()}
    assert keys["general.architecture"] == arch and keys["general.file_type"] == 0


def test_every_setting_of_a_model_has_a_key_or_is_refused():
    written = {"vocab_size", "n_layer", "n_loop", "n_embd", "n_head", "n_kv_head", "head_dim", "n_hidden", "n_ctx",
               "arch", "norm_eps", "rope_theta", "rope_llama3", "extra"}
    in_tensors_or_tokenizer = {"tie_head", "bos_token_id", "eos_token_id", "attn_bias", "o_bias", "qk_norm"}
    refused = {"rank", "vectors", "kv", "rotary_pct", "no_rope", "mlp_bias", "parallel"}
    assert {f.name for f in fields(Config)} == written | in_tensors_or_tokenizer | refused


def test_relaxed_models_are_unrolled_and_rounded_once(byte_level, tmp_path):
    model = save(tmp_path, byte_level, n_loop=2, rank=3, vectors="per_loop").bfloat16()
    model.save(tmp_path)
    want = unroll(model, torch.float32)
    for dtype in ("keep", "float32"):
        found, keys = export(tmp_path, unroll=True, dtype=dtype)
        assert keys["general.architecture"] == "llama" and keys["llama.block_count"] == 4
        for name, w in want.state_dict().items():
            name, w = in_gguf(name, w, want.config)
            rounded = w.bfloat16().float() if dtype == "keep" and w.dim() > 1 else w
            assert torch.equal(values(found[name]), rounded), name


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers

def write_tokenizer(folder, pre, ignore_merges=False, normalizer=None, config=None) -> Path:
    """A byte-level tokenizer.json that splits text by `pre`."""
    fast = Fast(models.BPE(ignore_merges=ignore_merges))
    fast.pre_tokenizer = pre_tokenizers.Sequence(pre)
    if normalizer:
        fast.normalizer = normalizer
    fast.train_from_iterator([PLAIN, HARD, PROBE, "don't it'll 12 123 1234567 \n\n\n x"] * 3, trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>", "</s>", "<end>"],
        show_progress=False))
    fast.add_tokens(["<tool>"])
    folder.mkdir(exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"} | (config or {})))
    return folder


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


GPT2_LIKE, BYTES = (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex) for regex in (True, False))
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")
NAMED = {"gpt-2": ([GPT2_LIKE], False), "smollm": ([pre_tokenizers.Digits(True), GPT2_LIKE], False),
         "llama-bpe": ([split(LLAMA3), BYTES], True), "qwen2": ([split(QWEN2), BYTES], False)}


@pytest.mark.parametrize("name", NAMED)
def test_byte_level_tokenizers(name, tmp_path):
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    pre, ignore_merges = NAMED[name]
    tokenizer = write_tokenizer(tmp_path / "tokenizer", pre, ignore_merges, config={
        "bos_token": "<s>", "pad_token": "<end>", "chat_template": template})
    spec = json.loads((tokenizer / "tokenizer.json").read_text())
    save(tmp_path / "model", tokenizer, n_loop=2, bos_token_id=0, eos_token_id=[1, 2])
    _, keys = export(tmp_path / "model")
    n = len(spec["model"]["vocab"])
    vocab = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get)
    assert vocab[:3] == ["<s>", "</s>", "<end>"]
    want = {"model": "gpt2", "pre": name, "tokens": [*vocab, "<tool>", *(f"[PAD{n + 1 + i}]" for i in range(5))],
            "token_type": [3] * 3 + [1] * (n - 3) + [4] + [5] * 5,
            "merges": [" ".join(merge) for merge in spec["model"]["merges"]], "bos_token_id": 0, "eos_token_id": 1,
            "eot_token_id": 2, "padding_token_id": 2, "add_bos_token": False, "add_eos_token": False}
    assert {k: v for k, v in keys.items() if k.startswith("tokenizer.ggml")} == {
        f"tokenizer.ggml.{k}": v for k, v in want.items()}
    assert keys["tokenizer.chat_template"] == template


def test_settings_that_older_files_leave_out_have_their_defaults(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer", [GPT2_LIKE])
    spec = json.loads((tokenizer / "tokenizer.json").read_text())
    spec["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    del spec["model"]["ignore_merges"]
    (tokenizer / "tokenizer.json").write_text(json.dumps(spec))
    save(tmp_path / "model", tokenizer, n_loop=2, bos_token_id=0, eos_token_id=1)
    assert export(tmp_path / "model")[1]["tokenizer.ggml.pre"] == "gpt-2"


def test_tiktoken_ranks(ranks, tmp_path, capsys):
    save(tmp_path, ranks)
    _, keys = export(tmp_path)
    encoding = Tokenizer.load(ranks).ranks
    fast = Fast(models.BPE({t: i for i, t in enumerate(keys["tokenizer.ggml.tokens"])},
                           [tuple(m.split(" ")) for m in keys["tokenizer.ggml.merges"]], ignore_merges=True))
    fast.pre_tokenizer = pre_tokenizers.Sequence([split(SPLIT_PATTERN), BYTES])
    for text in (PLAIN, HARD.replace("<|endoftext|>", "")):
        assert fast.encode(text).ids == encoding.encode(text)
    assert keys["tokenizer.ggml.pre"] == "llama-bpe" and keys["tokenizer.ggml.eos_token_id"] == 299
    assert keys["tokenizer.ggml.tokens"][299:301] == ["<|endoftext|>", "[PAD300]"]
    assert keys["tokenizer.ggml.token_type"][298:301] == [1, 3, 5]
    assert "note: llama.cpp cuts text as Llama 3 does, and so not after the typographic" in capsys.readouterr().out


def test_sentencepiece_tokenizers(metaspace, tmp_path):
    spec = json.loads((metaspace / "tokenizer.json").read_text())
    save(tmp_path / "model", metaspace, bos_token_id=1, eos_token_id=2)
    _, keys = export(tmp_path / "model")
    keys = {k.removeprefix("tokenizer.ggml."): v for k, v in keys.items()}
    assert keys["model"] == "llama" and keys["pre"] == "default" and "merges" not in keys
    vocab, n = spec["model"]["vocab"], len(spec["model"]["vocab"])
    assert keys["tokens"][:n] == sorted(vocab, key=vocab.get)
    assert keys["token_type"] == [2, 3, 3] + [6] * 256 + [1] * (n - 259) + [5] * 5
    made = ["▁a", "▁t", "▁th", "▁the"]                       # in the order of their merges
    by_score = sorted(range(n), key=lambda i: -keys["scores"][i])
    assert [keys["tokens"][i] for i in by_score[:4]] == made and keys["scores"][vocab["a"]] == -1e9
    assert keys["add_space_prefix"] is True and keys["add_bos_token"] is True and keys["add_eos_token"] is False

    spec["normalizer"] = spec["normalizer"]["normalizers"][1]    # as Gemma: no ▁ in front
    (tmp_path / "model/tokenizer.json").write_text(json.dumps(spec))
    assert export(tmp_path / "model")[1]["tokenizer.ggml.add_space_prefix"] is False


def refused(match, folder, *flags):
    file = folder / "refused.gguf"
    with pytest.raises(UserError, match=match):
        convert.main([f"--donor={folder}", f"--gguf={file}", *flags])
    assert not file.exists() and not list(folder.glob(".*.tmp"))


@pytest.mark.parametrize("pre, more, match", [
    ([split(r"\p{L}+"), BYTES], {}, r"no name for words cut by \\p\{L\}\+; use llama.cpp's convert_hf_to_gguf.py"),
    ([pre_tokenizers.Whitespace(), BYTES], {}, "it cuts text by .*Whitespace"),
    ([pre_tokenizers.Digits(False), GPT2_LIKE], {}, "it cuts text by .*Digits"),
    ([pre_tokenizers.ByteLevel(add_prefix_space=True)], {}, "it cuts text by .*ByteLevel"),
    ([pre_tokenizers.Split(Regex(QWEN2), "removed"), BYTES], {}, "it cuts text by .*Removed"),
    ([pre_tokenizers.Split(Regex(QWEN2), "isolated", invert=True), BYTES], {}, 'it cuts text by .*"invert": true'),
    ([GPT2_LIKE], {"ignore_merges": True}, "gpt-2 has the other value of ignore_merges"),
    ([split(LLAMA3), BYTES], {}, "llama-bpe has the other value of ignore_merges"),
    ([GPT2_LIKE], {"normalizer": normalizers.Lowercase()}, "its normalizer is Lowercase"),
    ([GPT2_LIKE], {"config": {"eos_token": None}}, "names no end-of-text token, for which llama.cpp would take id 11"),
])
def test_tokenizers_that_llama_cpp_lacks_are_refused(pre, more, match, tmp_path):
    save(tmp_path / "model", write_tokenizer(tmp_path / "tokenizer", pre, **more))
    refused(match, tmp_path / "model")


def test_nfc_is_noted(tmp_path, capsys):
    save(tmp_path / "model", write_tokenizer(tmp_path / "tokenizer", [GPT2_LIKE], normalizer=normalizers.NFC()))
    export(tmp_path / "model")
    assert "note: llama.cpp does not normalise text" in capsys.readouterr().out


@pytest.mark.parametrize("change, match", [
    (lambda s: s["model"]["merges"].append(["▁", "a"]), "its merges make '▁a' at different ranks"),
    (lambda s: s["model"]["vocab"].update({"he": 999}) or s["model"]["merges"].append(["h", "e"]),
     "does not merge '▁t' and 'he' into '▁the'"),
    (lambda s: s.update(normalizer=None, pre_tokenizer={"type": "Metaspace", "replacement": "▁", "split": False,
                                                        "prepend_scheme": "first"}), "it writes spaces by"),
    (lambda s: s.update(model={"type": "WordLevel", "vocab": s["model"]["vocab"], "unk_token": "<unk>"}),
     "its model is WordLevel, not BPE"),
])
def test_tokenizers_that_are_not_sentencepieces_are_refused(change, match, metaspace, tmp_path):
    save(tmp_path / "model", metaspace, vocab_size=1000, bos_token_id=1, eos_token_id=2)
    spec = json.loads((metaspace / "tokenizer.json").read_text())
    change(spec)
    (tmp_path / "model/tokenizer.json").write_text(json.dumps(spec))
    refused(match, tmp_path / "model")


# ---------------------------------------------------------------------------------------------------------------------
# Models and files that are refused

@pytest.mark.parametrize("changes, match", [
    ({"n_loop": 2, "rank": 3}, "no architecture with weights per loop, and this model has a LoRA of rank 3.*--unroll"),
    ({"n_loop": 2, "vectors": "per_loop"}, "this model has norm weights for each; --unroll"),
    ({"n_loop": 2, "kv": "first_loop"}, "computes keys and values in every loop.*--kv=own"),
    ({"n_loop": 2, "arch": "gemma"}, "loops over layers of Llama only, and these are gemma's; --unroll"),
    ({"arch": "gemma", "tie_head": False}, "takes the embedding for its head"),
    *(({name: value}, "llama has no such biases.*and this model has; use llama.cpp's convert_hf_to_gguf.py")
      for name, value in {"attn_bias": True, "mlp_bias": True, "parallel": True, "rotary_pct": 0.5, "qk_norm": True,
                          "no_rope": [3]}.items()),
    ({"arch": "qwen2", "attn_bias": True}, "qwen2 has no such biases"),
    ({"arch": "qwen3", "qk_norm": True, "rope_llama3": [8.0, 1.0, 4.0, 32]}, "does in Llama only, and this is qwen3"),
    ({"arch": "qwen3", "qk_norm": True, "n_loop": 2}, "loops over layers of Llama only, and these are qwen3's"),
    ({"arch": "smollm3"}, "this is a smollm3 model; .*convert_hf"),
    ({"arch": "gpt_neox", "n_kv_head": 4, "head_dim": 16}, "this is a gpt_neox model; .*convert_hf_to_gguf.py"),
])
def test_models_that_llama_cpp_lacks_are_refused(changes, match, byte_level, tmp_path):
    save(tmp_path, byte_level, **changes)
    refused(match, tmp_path)


def test_flags_and_files_that_do_not_fit(byte_level, tmp_path):
    save(tmp_path, byte_level)
    refused("--rank=4 has no effect, since --gguf only exports", tmp_path, "--rank=4")
    refused("--out=x has no effect, since --gguf only exports", tmp_path, "--out=x")
    with pytest.raises(UserError, match="--dtype=q8_0 is a format of GGUF files"):
        convert.main([f"--donor={tmp_path}", "--dtype=q8_0", f"--out={tmp_path}/x"])
    for file in (tmp_path, tmp_path / "none" / "x.gguf", tmp_path / "config.json"):
        with pytest.raises(UserError, match="must be a file in a folder that exists|is not a GGUF file"):
            convert.main([f"--donor={tmp_path}", f"--gguf={file}"])
    assert RecursiveTransformer.load(tmp_path)
    export(tmp_path)
    before = (tmp_path / "model.gguf").read_bytes()
    with files_end_at(len(before) - 1), pytest.raises(UserError, match=r"cannot write .*model\.gguf"):
        export(tmp_path)
    assert (tmp_path / "model.gguf").read_bytes() == before and not list(tmp_path.glob(".*.tmp"))


def test_the_package_is_asked_for(byte_level, tmp_path, monkeypatch):
    save(tmp_path, byte_level)
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(r'pip install -e "\.\[gguf\]"', tmp_path)


def test_numbers_too_large_for_float16_are_refused_by_name(byte_level, tmp_path):
    model = save(tmp_path, byte_level)
    with torch.no_grad():
        model.layers[0].mlp.up.weight[0, 0] = 1e6
    model.save(tmp_path)
    refused(r"blk\.0\.ffn_up\.weight has a weight of 1e\+06", tmp_path, "--dtype=float16")


# ---------------------------------------------------------------------------------------------------------------------
# llama.cpp

@pytest.fixture
def run():
    llama_cpp = pytest.importorskip("llama_cpp")

    def load(folder, **flags):
        """llama.cpp with the file of the model in `folder`, its KV cache in float32."""
        export(folder, **flags)
        return llama_cpp.Llama(str(folder / "model.gguf"), n_ctx=48, n_threads=1, logits_all=True, verbose=False,
                               type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32)
    return load


def their_logits(llama, ids: list[int]) -> torch.Tensor:
    llama.reset()
    llama.eval(ids)
    return torch.tensor(np.array(llama.scores[:len(ids)]))


@each_kind
def test_llama_cpp_computes_the_same(changes, byte_level, run, tmp_path):
    model = save(tmp_path, byte_level, **changes)
    llama, idx = run(tmp_path), tokens(1, 40)
    # llama.cpp looks GELU (Gemma's) up in a table of fp16.
    close(their_logits(llama, idx[0].tolist()), last(model, idx)[0], 2e-2 if model.config.arch == "gemma" else 2e-4)
    if model.config.n_loop > 1:                              # as a file of all layers, the loops written out
        close(their_logits(run(tmp_path, unroll=True), idx[0].tolist()), last(model, idx)[0], 2e-4)
    relaxed = to_recursive(unroll(model), 2, "average", rank=2)
    relaxed.save(tmp_path)
    close(their_logits(run(tmp_path, unroll=True), idx[0].tolist()), last(relaxed, idx)[0],
          2e-2 if model.config.arch == "gemma" else 2e-4)


@pytest.mark.parametrize("name", [*NAMED, "tiktoken", "sentencepiece"])
def test_llama_cpp_reads_text_the_same(name, ranks, metaspace, run, tmp_path):
    tokenizer = {"tiktoken": ranks, "sentencepiece": metaspace}.get(name) or write_tokenizer(
        tmp_path / "tokenizer", *NAMED[name])
    ids = {} if name == "tiktoken" else {"bos_token_id": 1, "eos_token_id": 2} if name == "sentencepiece" else {
        "bos_token_id": 0, "eos_token_id": 1}
    save(tmp_path / "model", tokenizer, n_loop=2, **ids)
    llama, ours = run(tmp_path / "model"), Tokenizer.load(tmp_path / "model")
    for text in (PLAIN, HARD, PROBE, "<tool>x<end> <s>", " a", "don't \n\n\n x  ", "1234567 12"):
        for special in (False, True):
            first = [ours.first_id] * (ours.first_id is not None)
            assert llama.tokenize(text.encode(), special=special) == first + ours.encode(text, special), (text, special)
    assert llama.token_eos() == ours.eos_ids[0]
