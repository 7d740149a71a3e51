"""The model on its own: looping, caching, counting, saving."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lib.cli import UserError
from model import Config, KVCache, RecursiveTransformer, RelaxedLinear

SMALL = {"vocab_size": 53, "n_layer": 6, "n_embd": 32, "n_hidden": 40, "n_head": 4, "n_ctx": 64}
ARCHS = {
    "gemma": {"arch": "gemma", "n_kv_head": 1, "head_dim": 12, "tie_head": True},
    "llama": {"arch": "llama", "n_kv_head": 2, "head_dim": 10, "tie_head": False},
    "gpt_neox": {"arch": "gpt_neox", "n_kv_head": 4, "head_dim": 8, "rotary_pct": 0.25, "attn_bias": True,
                 "mlp_bias": True, "parallel": True, "tie_head": False},
    "qwen2": {"arch": "qwen2", "n_kv_head": 1, "head_dim": 8, "attn_bias": True, "o_bias": False,
              "rope_llama3": [8.0, 1.0, 4.0, 24]},
    "qwen3": {"arch": "qwen3", "n_kv_head": 2, "head_dim": 10, "qk_norm": True},
}
each_arch = pytest.mark.parametrize("arch", ARCHS)


@torch.no_grad()
def randomise(model):
    """Every parameter random, norms, biases and LoRA B too: equal ones would hide a swapped or unused one."""
    for name, p in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            p.uniform_(0.5, 1.5)
        else:
            p.normal_(std=0.1)
    return model.eval()


def tiny(arch, seed=0, **changes):
    torch.manual_seed(seed)
    return randomise(RecursiveTransformer(Config(**SMALL | ARCHS[arch] | changes)))


def tokens(*shape):
    return torch.randint(0, SMALL["vocab_size"], shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def last(model, idx):
    return model.logits(model(idx)[-1])


def close(a, b, tol=2e-5):
    torch.testing.assert_close(a, b, atol=tol, rtol=tol)


# ---------------------------------------------------------------------------------------------------------------------
# Loops

@each_arch
@torch.no_grad()
def test_three_loops_run_two_stored_layers_in_turn(arch):
    looped, full = tiny(arch, n_loop=3), tiny(arch, seed=1)
    assert looped.config.n_unique == len(looped.layers) == 2
    state = looped.state_dict()
    for depth, layer in enumerate([0, 1, 0, 1, 0, 1]):
        state |= {f"layers.{depth}.{n}": w for n, w in looped.layers[layer].state_dict().items()}
    full.load_state_dict(state)
    inputs = []
    for layer in full.layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    idx = tokens(2, 9)
    states, end = looped(idx), full(idx)[-1]
    assert len(states) == 3
    for ours, theirs in zip(states, [inputs[2], inputs[4], end], strict=True):
        close(ours, theirs.view_as(ours))                    # a layer reads (B T, C)
    close(looped.logits(states[-1]), full.logits(end))


@each_arch
@pytest.mark.parametrize("n_loop", [1, 2, 3])
@pytest.mark.parametrize("vectors", ["tied", "per_loop"])
@torch.no_grad()
def test_cached_decoding_equals_full_forward(arch, n_loop, vectors):
    """At every loop, for chunks of several tokens, single tokens and a batch, on a cache that holds some already."""
    model, idx = tiny(arch, n_loop=n_loop, rank=2, vectors=vectors).double(), tokens(3, 13)
    cache = KVCache(model.config, batch=3, max_len=13, dtype=torch.float64)
    parts = [model(chunk, cache) for chunk in idx.split([5, 4, 1, 2, 1], dim=1)]
    for loop, want in enumerate(model(idx)):
        close(torch.cat([p[loop] for p in parts], dim=1), want, 1e-10)
    assert cache.lengths == [13] * n_loop


@torch.no_grad()
def test_a_full_cache_is_refused():
    model = tiny("gemma", n_loop=2)
    cache = KVCache(model.config, batch=1, max_len=4)
    model(tokens(1, 3), cache)
    with pytest.raises(UserError, match="5 tokens do not fit a cache made for 4"):
        model(tokens(1, 2), cache)
    assert cache.lengths == [3, 3]
    model(tokens(1, 1), cache)


@pytest.mark.parametrize("changes, message", [
    ({"n_loop": 4}, "4 loops do not divide the 6 layers; use one of 1, 2, 3, 6"),
    ({"n_loop": 0}, "0 loops do not divide the 6 layers; use one of 1, 2, 3, 6"),
    ({"n_loop": -2}, "use one of 1, 2, 3, 6"),
    ({"rank": -1}, "rank -1 is negative; use 0"),
    ({"vectors": "some"}, "vectors='some' is unknown; use one of tied, per_loop"),
    ({"arch": "bert"}, "arch='bert' is unknown; use one of gemma, llama, gpt_neox"),
    ({"n_embd": 32.0}, "n_embd=32.0 is of the wrong type; it must be int"),
    ({"n_ctx": None}, "n_ctx=None is of the wrong"),
    ({"rank": True}, "rank=True is of the wrong type"),
    ({"tie_head": "false"}, "tie_head='false' is of the wrong type"),
    ({"norm_eps": float("inf")}, "norm_eps=inf is of the wrong type"),
    ({"norm_eps": 0.0}, "norm_eps=0.0 must be positive"),
    ({"n_hidden": -1}, "n_hidden=-1 must be positive"), ({"n_kv_head": 3}, "n_kv_head=3 does not divide the 4 heads"),
    ({"head_dim": 7}, "head_dim=7 rotates 8"), ({"rotary_pct": 1.5}, "rotary_pct=1.5"),
    ({"rotary_pct": -1}, "rotary_pct=-1"),
    ({"rotary_pct": 1e-3}, "rotary_pct=0.001 rotates 0"), ({"eos_token_id": [3, 53]}, "outside the vocabulary of 53"),
    ({"eos_token_id": []}, "eos_token_id=[] is of the wrong type"), ({"extra": []}, "extra=[] is of the wrong type"),
])
def test_config_refuses(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Config(**SMALL | changes)


# ---------------------------------------------------------------------------------------------------------------------
# Relaxed linear layers

@pytest.mark.parametrize("d_in, d_out, rank", [(24, 40, 3), (40, 24, 5), (16, 4, 9)])
@pytest.mark.parametrize("vectors", ["tied", "per_loop"])
@pytest.mark.parametrize("n", [1, 2, 100])
@torch.no_grad()
def test_relaxed_linear_is_w_plus_ba(d_in, d_out, rank, vectors, n):
    """A few tokens never build W' + BA, many do: the same result, without a scale, for every loop."""
    linear = RelaxedLinear(d_in, d_out, Config(n_loop=3, rank=rank, vectors=vectors), bias=True)
    for p in linear.parameters():
        p.normal_()
    x, built, merged = torch.randn(1, n, d_in), [], linear.merged
    linear.merged = lambda loop: built.append(loop) or merged(loop)
    for loop in range(3):
        bias = linear.bias[loop] if vectors == "per_loop" else linear.bias
        want = x @ (linear.weight + linear.lora_b[loop] @ linear.lora_a[loop]).T + bias
        close(linear(x, loop), want, 1e-4)
    assert built == ([0, 1, 2] if n == 100 else [])
    assert linear.lora_a.shape == (3, min(rank, d_in, d_out), d_in)


def test_merging_sums_in_fp32_and_rounds_once():
    linear = RelaxedLinear(64, 64, Config(n_loop=2, rank=64)).bfloat16()
    for p in linear.parameters():
        p.data.normal_()
    want = linear.weight.float() + linear.lora_b[1].float() @ linear.lora_a[1].float()
    assert torch.equal(linear.merged(1), want.bfloat16())


@each_arch
def test_lora_is_on_every_map_of_the_block(arch):
    model = RecursiveTransformer(Config(**SMALL | ARCHS[arch], n_loop=3, rank=16))
    linears = [m for m in model.modules() if isinstance(m, RelaxedLinear)]
    assert len(linears) == 2 * (6 if arch == "gpt_neox" else 7)
    assert all(m.lora_a.shape[:2] == (3, min(16, *m.weight.shape)) for m in linears)
    assert all((m.lora_a != 0).all() and (m.lora_b == 0).all() for m in linears)
    assert not any("lora" in n for n in RecursiveTransformer(Config(**SMALL | ARCHS[arch], n_loop=3)).state_dict())


@pytest.mark.parametrize("n", [3, 30], ids=["separate", "merged"])
def test_every_parameter_learns(n):
    model = tiny("gpt_neox", n_loop=2, rank=2, vectors="per_loop")
    F.cross_entropy(model.logits(model(tokens(1, n))[-1])[0], tokens(n)).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.any(), name
        if "lora" in name or p.dim() == 2 and p.size(0) == 2:
            assert p.grad.flatten(1).any(dim=1).all(), f"a loop of {name} gets no gradient"


# ---------------------------------------------------------------------------------------------------------------------
# Counting

DONORS = {
    "gemma": {"arch": "gemma", "n_layer": 18, "n_embd": 2048, "n_head": 8, "n_kv_head": 1, "head_dim": 256,
              "n_hidden": 16384, "vocab_size": 256000},
    "tinyllama": {"arch": "llama", "n_layer": 22, "n_embd": 2048, "n_head": 32, "n_kv_head": 4, "head_dim": 64,
                  "n_hidden": 5632, "vocab_size": 32000, "tie_head": False},
    "pythia": {"arch": "gpt_neox", "n_layer": 16, "n_embd": 2048, "n_head": 8, "n_kv_head": 8, "head_dim": 256,
               "n_hidden": 8192, "vocab_size": 50304, "tie_head": False, "attn_bias": True, "mlp_bias": True,
               "parallel": True},
}


def billions(donor, **changes):
    with torch.device("meta"):
        return RecursiveTransformer(Config(**DONORS[donor] | changes)).num_params()["stored_block"] / 1e9


@pytest.mark.parametrize("donor, n_loop, want", [
    ("gemma", 2, {0: 0.991, 64: 1.069, 128: 1.148, 256: 1.305, 512: 1.597}),
    ("gemma", 3, {0: 0.661, 64: 0.739, 128: 0.818, 256: 0.974, 512: 1.267}),
    ("tinyllama", 2, {0: 0.484, 64: 0.535, 128: 0.585, 256: 0.686, 512: 0.862}),
    ("pythia", 2, {0: 0.403, 64: 0.441, 128: 0.478, 256: 0.554, 512: 0.705}),
])
def test_parameter_counts_are_the_papers(donor, n_loop, want):
    assert {rank: round(billions(donor, n_loop=n_loop, rank=rank), 3) for rank in want} == want


def test_full_size_parameter_counts_are_the_papers():
    assert [round(billions(donor), 2) for donor in DONORS] == [1.98, 0.97, 0.81]


@pytest.mark.parametrize("vectors", ["tied", "per_loop"])
def test_parameters_by_hand(vectors):
    model = RecursiveTransformer(Config(vocab_size=11, n_layer=6, n_loop=3, rank=3, vectors=vectors, n_embd=8, n_head=2,
                                        n_kv_head=1, head_dim=6, n_hidden=10, arch="llama", tie_head=False))
    linears = [(12, 8), (6, 8), (6, 8), (8, 12), (10, 8), (10, 8), (8, 10)]  # q, k, v, o, gate, up, down
    shared, lora, norms = sum(o * i for o, i in linears), sum(3 * (o + i) for o, i in linears), 2 * 8
    ends, final = 2 * 11 * 8, 8
    stored = 2 * (shared + 3 * lora + norms * (3 if vectors == "per_loop" else 1)) + final
    run = 6 * (shared + lora + norms) + final
    assert model.num_params() == {"stored": stored + ends, "run": run + ends, "stored_block": stored, "run_block": run}
    assert stored + ends == sum(p.numel() for p in model.parameters())


@each_arch
@pytest.mark.parametrize("n_loop, n_exits", [(1, 1), (2, 1), (3, 1), (3, 2)])
def test_flops_are_those_of_the_operations_with_attention_at_half(arch, n_loop, n_exits):
    """torch counts the scores of all pairs of tokens; causal attention needs only the lower half."""
    model, (B, T) = tiny(arch, n_loop=n_loop), (2, 11)
    plain = sdpa_kernel(SDPBackend.MATH)                         # it does not count the CPU's fused kernel
    with FlopCounterMode(display=False) as counter, plain, torch.no_grad():
        for x in model(tokens(B, T))[-n_exits:]:
            model.logits(x)
    c = model.config
    pairs = 4 * c.n_layer * c.n_head * c.head_dim                # FLOPs for each query and key: score, sum of values
    needless = pairs * B * T * (T - 1) // 2                      # keys that lie after their query
    assert B * T * model.flops(T, n_exits) == counter.get_total_flops() - needless
    assert model.flops(T, n_exits) == tiny(arch).flops(T) + (n_exits - 1) * 2 * c.vocab_size * c.n_embd
    assert model.flops(T, n_exits) == tiny(arch, n_loop=n_loop, rank=3, vectors="per_loop").flops(T, n_exits)


# ---------------------------------------------------------------------------------------------------------------------
# Saving and loading

@each_arch
@pytest.mark.parametrize("vectors", ["tied", "per_loop"])
def test_save_and_load(arch, vectors, tmp_path):
    model = tiny(arch, n_loop=2, rank=3, vectors=vectors).train()
    model.save(tmp_path / "ckpt")
    loaded = RecursiveTransformer.load(tmp_path / "ckpt")
    assert loaded.config == model.config and not loaded.training
    assert torch.equal(last(loaded, tokens(2, 5)), last(model, tokens(2, 5)))
    assert all(p.requires_grad for p in loaded.parameters())
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt"]


def test_load_keeps_the_dtype_or_changes_it(tmp_path):
    tiny("llama").bfloat16().save(tmp_path / "ckpt")
    assert {p.dtype for p in RecursiveTransformer.load(tmp_path / "ckpt").parameters()} == {torch.bfloat16}
    widened = RecursiveTransformer.load(tmp_path / "ckpt", dtype=torch.float32)
    assert {p.dtype for p in widened.parameters()} == {torch.float32}
    assert last(RecursiveTransformer.load(tmp_path / "ckpt"), tokens(1, 3)).dtype == torch.float32


def test_a_checkpoint_of_several_dtypes_is_loaded_in_the_widest(tmp_path):
    tiny("llama").save(tmp_path)
    edit_tensors(tmp_path / WEIGHTS, lambda t: t.update({n: w.bfloat16() for n, w in t.items() if "norm" not in n}))
    assert {p.dtype for p in RecursiveTransformer.load(tmp_path).parameters()} == {torch.float32}
    assert {p.dtype for p in RecursiveTransformer.load(tmp_path, dtype=torch.float16).parameters()} == {torch.float16}


def test_a_checkpoint_without_extra_settings(tmp_path):
    tiny("llama").save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config.pop("extra") == {}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    assert RecursiveTransformer.load(tmp_path).config == tiny("llama").config


def test_saving_again_replaces_and_keeps_the_rest(tmp_path):
    tiny("llama").save(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    other = tiny("llama", seed=1)
    other.save(tmp_path)
    assert torch.equal(RecursiveTransformer.load(tmp_path).embed.weight, other.embed.weight)
    assert (tmp_path / "tokenizer.json").exists()


def test_save_refuses_a_folder_of_other_things(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        tiny("llama").save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * keep)])


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


WEIGHTS, CONFIG = "model.safetensors", "config.json"
DAMAGE = {
    "no config": (lambda d: (d / CONFIG).unlink(), "config.json"),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), "cannot read .*missing, cut short or damaged"),
    "cut short": (lambda d: cut(d / WEIGHTS, 0.9), "cannot read .*cut short"),
    "cut in the header": (lambda d: cut(d / WEIGHTS, 0.01), "cannot read .*cut short"),
    "empty": (lambda d: cut(d / WEIGHTS, 0), "cannot read .*cut short"),
    "garbage": (lambda d: (d / WEIGHTS).write_bytes(b"\xff" * 999), "cannot read .*damaged"),
    "config cut": (lambda d: cut(d / CONFIG, 0.5), "not readable JSON"),
    "config a list": (lambda d: (d / CONFIG).write_text("[1]"), "not readable JSON"),
    "missing tensor": (lambda d: edit_tensors(d / WEIGHTS, lambda t: t.pop("layers.1.attn.k.weight")),
                       r"1 missing.*\(layers\.1\.attn\.k\.weight\)"),
    "extra tensor": (lambda d: edit_tensors(d / WEIGHTS, lambda t: t.update(odd=torch.ones(1))),
                     r"1 unexpected.*\(odd\)"),
    "other shape": (lambda d: edit_tensors(d / WEIGHTS, lambda t: t.update({"norm.weight": torch.ones(7)})),
                    r"norm\.weight is \(7,\), expected \(32,\)"),
    "fewer layers": (lambda d: edit_config(d / CONFIG, n_layer=4), "23 unexpected"),
    "unknown setting": (lambda d: edit_config(d / CONFIG, moe=8), r"unknown settings \['moe'\]"),
    "wrong type": (lambda d: edit_config(d / CONFIG, rope_theta="1e4"), "config.json: rope_theta='1e4' is of"),
    "bad setting": (lambda d: edit_config(d / CONFIG, n_loop=4), "do not divide"),
    "other format": (lambda d: edit_config(d / CONFIG, format="x", model_type="llama"), r"Hugging Face one \(llama\)"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_load_names_the_damage(kind, tmp_path):
    damage, message = DAMAGE[kind]
    tiny("llama", n_loop=2, rank=2).save(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        RecursiveTransformer.load(tmp_path)


def test_load_of_nothing(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint in .*/nowhere"):
        RecursiveTransformer.load(tmp_path / "nowhere")
