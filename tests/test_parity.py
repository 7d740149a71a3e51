"""Our full-size models against transformers, there and back: tiny random configs of each family, no download."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import close, last, randomise, tokens

from convert import load_full, to_hf, to_recursive, unroll
from model import Config, KVCache, rope_angles

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SIZES = {"vocab_size": 53, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4,
         "max_position_embeddings": 64, "attn_implementation": "eager"}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # of six frequencies one is kept, one between, four divided
IDS = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
CASES = {
    "gemma-mqa": ("Gemma", {"num_key_value_heads": 1, "head_dim": 16}),
    "gemma-gqa-untied": ("Gemma", {"num_key_value_heads": 2, "head_dim": 20, "tie_word_embeddings": False}),
    "gemma-mha": ("Gemma", {"num_key_value_heads": 4, "head_dim": 8, "rope_parameters": {"rope_theta": 500.0}}),
    "llama-gqa": ("Llama", {"num_key_value_heads": 2}),
    "llama-mqa-tied": ("Llama", {"num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True}),
    "llama-mha": ("Llama", {"head_dim": 10, "rms_norm_eps": 0.1, "rope_parameters": {"rope_theta": 5e5}}),
    "neox": ("GPTNeoX", {"rope_parameters": {"partial_rotary_factor": 0.34, "rope_theta": 500.0}}),
    "neox-sequential": ("GPTNeoX", {"use_parallel_residual": False, "layer_norm_eps": 0.1}),
    "neox-unbiased": ("GPTNeoX", {"attention_bias": False}),
    "neox-rotary-100": ("GPTNeoX", {"rope_parameters": {"partial_rotary_factor": 1.0}}),
    "neox-tied": ("GPTNeoX", {"tie_word_embeddings": True}),
    "llama-3.1": ("Llama", {"num_key_value_heads": 2, "rope_parameters": LLAMA3}),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "gemma-biased": ("Gemma", {"num_key_value_heads": 2, "head_dim": 12, "attention_bias": True}),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "mistral-nemo": ("Mistral", {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": 64}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen2-mha-tied": ("Qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": True, "sliding_window": 8}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-biased": ("Qwen3", {"num_key_value_heads": 1, "head_dim": 10, "attention_bias": True, "rms_norm_eps": 0.1}),
    "smollm3": ("SmolLM3", IDS | {"num_key_value_heads": 2}),
    "smollm3-listed": ("SmolLM3", IDS | {"tie_word_embeddings": False, "no_rope_layers": [0, 1, 0, 0, 1],
                                         "attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
}
FAMILIES = ["gemma-mqa", "llama-gqa", "neox", "llama-3.1", "mistral", "qwen2", "qwen3", "smollm3"]


def hf_model(case):
    """A tiny model of transformers, with every parameter random."""
    torch.manual_seed(0)
    family, options = CASES[case]
    config = getattr(transformers, family + "Config")(**SIZES | options)
    return randomise(getattr(transformers, family + "ForCausalLM")(config))


def from_hf(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **options).eval()


def layer_outputs(model, layers, run, idx):
    """The input (B T, C) of each layer, and the logits."""
    states = []
    hooks = [layer.register_forward_pre_hook(lambda _, args: states.append(args[0].flatten(0, -2))) for layer in layers]
    states.append(run(model, idx))
    for hook in hooks:
        hook.remove()
    return states


@torch.no_grad()
def assert_same(theirs, ours, lengths=(1, 7, 17, 61), tol=2e-5):
    """Logits within `tol`; a failure prints the difference at each layer."""
    for length in lengths:
        idx = tokens(2, length)
        a = layer_outputs(theirs, theirs.base_model.layers, lambda m, idx: m(idx).logits, idx)
        b = layer_outputs(ours, ours.layers, last, idx)
        differences = [(x - y).abs().max().item() for x, y in zip(a, b, strict=True)]
        places = [*(f"into layer {i}" for i in range(len(a) - 1)), "logits"]
        assert differences[-1] <= tol, f"{length} tokens, largest difference:\n" + "\n".join(
            f"  {place}: {d:.1e}" for place, d in zip(places, differences, strict=True))


def edit_config(folder, change):
    hf = json.loads((folder / "config.json").read_text())
    change(hf)
    (folder / "config.json").write_text(json.dumps(hf))


# ---------------------------------------------------------------------------------------------------------------------
# transformers -> ours

@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case, tmp_path):
    theirs = hf_model(case)
    theirs.save_pretrained(tmp_path)
    assert_same(theirs, load_full(tmp_path))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_with_a_cache_are_those_of_transformers(case, tmp_path):
    """A prompt of 7 tokens, then one at a time, beyond the original context where that is shorter."""
    theirs, idx = hf_model(case), tokens(2, 41)
    theirs.save_pretrained(tmp_path)
    ours = load_full(tmp_path)
    cache = KVCache(ours.config, 2, 41)
    parts = [ours.logits(ours(part, cache)[-1]) for part in idx.split([7] + [1] * 34, dim=1)]
    close(torch.cat(parts, 1), theirs(idx).logits)


@pytest.mark.parametrize("case", FAMILIES)
def test_sharded(case, tmp_path):
    theirs = hf_model(case)
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2 and (tmp_path / "model.safetensors.index.json").exists()
    assert_same(theirs, load_full(str(tmp_path)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", FAMILIES)
@torch.no_grad()
def test_half_precision(case, dtype, tmp_path):
    """The stored dtype is kept, or widened without loss; embedding scale and norms round where transformers does."""
    hf_model(case).to(dtype).save_pretrained(tmp_path)
    theirs, ours = from_hf(tmp_path, dtype=dtype), load_full(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {dtype}
    idx = tokens(2, 17)
    a = layer_outputs(theirs, theirs.base_model.layers, lambda m, idx: m(idx).logits, idx)
    b = layer_outputs(ours, ours.layers, last, idx)
    assert torch.equal(a[0], b[0])
    normed = theirs.base_model.layers[0].input_layernorm(a[0]), ours.layers[0].norm1(b[0], 0)
    assert (normed[0] != normed[1]).float().mean() < 0.01
    close(a[-1].float(), b[-1], 0.1 if dtype is torch.bfloat16 else 0.02)
    assert_same(from_hf(tmp_path, dtype=torch.float32), load_full(tmp_path, torch.float32))


@pytest.mark.parametrize("case", ["gemma-mha", "llama-mha", "neox"])
def test_old_spelling_of_rotary_settings(case, tmp_path):
    theirs = hf_model(case)
    theirs.save_pretrained(tmp_path)

    def change(hf):
        rope = hf.pop("rope_parameters")
        hf |= {"rotary_emb_base" if case == "neox" else "rope_theta": rope["rope_theta"], "rope_scaling": None}
        if case == "neox":
            hf["rotary_pct"] = rope["partial_rotary_factor"]

    edit_config(tmp_path, change)
    assert_same(theirs, load_full(tmp_path))


@pytest.mark.parametrize("case", FAMILIES)
def test_old_checkpoints_carry_buffers_and_the_tied_head_twice(case, tmp_path):
    theirs = hf_model(case)
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for i in range(SIZES["num_hidden_layers"]):
        if case == "neox":
            stem = f"gpt_neox.layers.{i}.attention."
            tensors |= {stem + "bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8),
                        stem + "masked_bias": torch.tensor(-1e9), stem + "rotary_emb.inv_freq": torch.ones(2)}
        else:
            tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    if case == "gemma-mqa":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same(theirs, load_full(tmp_path))


@pytest.mark.parametrize("name", ["embed_out.weight", "lm_head.weight"])
def test_neox_head_under_either_name(name, tmp_path):
    theirs = hf_model("neox")
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (old,) = {"embed_out.weight", "lm_head.weight"} & set(tensors)
    tensors[name] = tensors.pop(old)
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same(theirs, load_full(tmp_path))


def test_gemmas_old_activation_name_means_tanh(tmp_path):
    theirs = hf_model("gemma-mqa")
    theirs.save_pretrained(tmp_path)
    edit_config(tmp_path, lambda hf: hf.update(hidden_act="gelu", hidden_activation=None))
    assert_same(theirs, load_full(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# ours -> transformers

@pytest.mark.parametrize("case", CASES)
def test_to_hf_gives_the_donor_back(case, tmp_path):
    theirs = hf_model(case)
    theirs.save_pretrained(tmp_path / "donor")
    full = load_full(tmp_path / "donor")
    to_hf(full, tmp_path / "back")
    back = from_hf(tmp_path / "back")
    assert type(back) is type(theirs)
    want = theirs.state_dict()
    assert want.keys() == back.state_dict().keys()
    assert all(torch.equal(w, want[name]) for name, w in back.state_dict().items())
    assert_same(back, full)
    assert back.config.bos_token_id == theirs.config.bos_token_id
    assert back.config.eos_token_id == theirs.config.eos_token_id
    assert load_full(tmp_path / "back").config == full.config


@pytest.mark.parametrize("vectors", ["tied", "per_loop"])
@pytest.mark.parametrize("case", FAMILIES)
@torch.no_grad()
def test_unrolled_relaxed_model_in_transformers(case, vectors, tmp_path):
    hf_model(case).bfloat16().save_pretrained(tmp_path / "donor")
    full = load_full(tmp_path / "donor", torch.float32)
    relaxed = randomise(to_recursive(full, 2, "average", rank=3, vectors=vectors))
    to_hf(unroll(relaxed), tmp_path / "out")
    close(from_hf(tmp_path / "out")(tokens(2, 9)).logits, last(relaxed, tokens(2, 9)))


def test_rotary_angles_far_out_are_those_of_transformers():
    """At position 8,000 the order of two operations in fp32 changes a cosine by 5e-4."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(hidden_size=64, num_attention_heads=1))
    pos = torch.arange(8000, 8010)
    cos, sin = rope_angles(pos, Config(head_dim=64))
    want_cos, want_sin = theirs(torch.zeros(1), pos[None])
    signed = torch.cat([-want_sin[..., :32], want_sin[..., 32:]], -1)
    for ours, want in ((cos, want_cos), (sin, signed)):
        torch.testing.assert_close(ours[:, 0], want[0], atol=1e-6, rtol=0)
