"""Conversion: source layers, the SVD of the residual, exact limits, the command line, donors that are refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import ARCHS, DAMAGE, close, cut, each_arch, edit_config, edit_tensors, last, randomise, tiny, tokens

import convert
from convert import load_any, load_full, source_layers, svd_factors, to_hf, to_recursive, unroll
from hf import config_from_hf
from lib.cli import UserError
from lib.donors import read_json
from model import RecursiveTransformer, is_matrix

each_init = pytest.mark.parametrize("init", ["stepwise", "average", "lower"])
each_vectors = pytest.mark.parametrize("vectors", ["tied", "per_loop"])


def layer_tensor(full, layer, rest):
    return full.state_dict()[f"layers.{layer}.{rest}"]


# ---------------------------------------------------------------------------------------------------------------------
# The donor layers that a stored layer starts from (Figure 2)

@pytest.mark.parametrize("n_layer, n_loop, want", [
    (6, 2, [0, 2, 5]), (18, 2, [0, 2, 4, 6, 8, 11, 13, 15, 17]), (18, 3, [0, 3, 7, 10, 14, 17]),
    (22, 2, [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21]), (16, 2, [0, 2, 4, 6, 9, 11, 13, 15]),
    (4, 4, [0]), (3, 1, [0, 1, 2]),
])
def test_stepwise_layers(n_layer, n_loop, want):
    assert source_layers(n_layer, n_loop, "stepwise") == [[i] for i in want]


def test_stepwise_rounded_down():
    assert source_layers(6, 2, "stepwise", "floor") == [[0], [2], [5]]
    assert [i for [i] in source_layers(18, 2, "stepwise", "floor")] == [0, 2, 4, 6, 8, 10, 12, 14, 17]


@pytest.mark.parametrize("rounding", ["round", "floor"])
def test_stepwise_keeps_first_and_last(rounding):
    for n_layer in range(2, 40):
        for n_loop in (n for n in range(1, n_layer) if n_layer % n == 0):
            layers = [i for [i] in source_layers(n_layer, n_loop, "stepwise", rounding)]
            assert layers == sorted(set(layers)) and (layers[0], layers[-1]) == (0, n_layer - 1)


def test_average_is_cyclic_and_lower_is_the_first():
    assert source_layers(6, 2, "average") == [[0, 3], [1, 4], [2, 5]]
    assert source_layers(6, 3, "average") == [[0, 2, 4], [1, 3, 5]]
    assert source_layers(6, 2, "lower") == [[0], [1], [2]]


@each_arch
@each_init
def test_layers_start_from_their_sources(arch, init):
    """Matrices, norms and biases alike; embedding, final norm and head are the donor's."""
    full = tiny(arch)
    tied = to_recursive(full, 2, init)
    assert tied.config.n_loop == 2 and len(tied.layers) == 3 and not any("lora" in n for n in tied.state_dict())
    for name, w in tied.state_dict().items():
        if not name.startswith("layers."):
            assert torch.equal(w, full.state_dict()[name]), name
            continue
        _, i, rest = name.split(".", 2)
        sources = [layer_tensor(full, layer, rest) for layer in source_layers(6, 2, init)[int(i)]]
        close(w, sum(sources) / len(sources), 1e-7)


@pytest.mark.parametrize("norms, want", [("init", [[0], [2], [5]]), ("average", [[0, 3], [1, 4], [2, 5]]),
                                         ("pick", [[0], [1], [2]])])
def test_tied_norms_and_biases_are_averaged_or_picked(norms, want):
    full = tiny("gpt_neox")
    tied = to_recursive(full, 2, "stepwise", norms=norms)
    for i, sources in enumerate(want):
        for rest in ("norm1.weight", "norm2.bias", "attn.q.bias", "mlp.down.bias"):
            mean = torch.stack([layer_tensor(full, layer, rest) for layer in sources]).mean(0)
            close(layer_tensor(tied, i, rest), mean, 1e-7)


@each_arch
def test_vectors_per_loop_are_the_donors(arch):
    full = tiny(arch)
    looped = to_recursive(full, 3, "lower", vectors="per_loop")
    for name, w in looped.state_dict().items():
        if name.startswith("layers.") and not is_matrix(name):
            _, i, rest = name.split(".", 2)
            assert torch.equal(w, torch.stack([layer_tensor(full, 2 * loop + int(i), rest) for loop in range(3)]))


def test_random_takes_nothing_from_the_donor():
    full = tiny("gpt_neox")
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(to_recursive(full.bfloat16(), 2, "random", rank=2))
    ours, again, donor = models[0].state_dict(), models[1].state_dict(), full.state_dict()
    assert all(torch.equal(w, again[n]) for n, w in ours.items())
    assert all((w == donor[n]).float().mean() < 0.2 for n, w in ours.items() if n in donor)
    assert {w.dtype for w in ours.values()} == {torch.bfloat16}


@pytest.mark.parametrize("make", [lambda m: to_recursive(m, 2, "average"), lambda m: to_recursive(m, 1), unroll],
                         ids=["looped", "one loop", "unrolled"])
def test_the_new_model_shares_no_memory_with_the_old(make):
    full = tiny("llama")
    before = {n: w.clone() for n, w in full.state_dict().items()}
    randomise(make(full))
    assert all(torch.equal(w, before[n]) for n, w in full.state_dict().items())


# ---------------------------------------------------------------------------------------------------------------------
# Exact limits

@each_arch
@each_init
def test_full_rank_with_vectors_per_loop_is_the_donor(arch, init):
    full, idx = tiny(arch), tokens(2, 9)
    for n_loop in (2, 3):
        close(last(to_recursive(full, n_loop, init, rank=10_000, vectors="per_loop"), idx), last(full, idx), 1e-4)


@each_arch
@each_init
def test_full_rank_with_tied_vectors_is_the_donors_matrices_only(arch, init):
    full, idx = tiny(arch), tokens(2, 9)
    relaxed = to_recursive(full, 2, init, rank=10_000)
    for loop in range(2):
        for i, layer in enumerate(relaxed.layers):
            for rest in (n for n in layer.state_dict() if is_matrix("." + n)):
                linear = layer.get_submodule(rest.removesuffix(".weight"))
                close(linear.merged(loop), layer_tensor(full, 3 * loop + i, rest), 1e-6)
    assert (last(relaxed, idx) - last(full, idx)).abs().max() > 0.01


@each_arch
@each_init
@each_vectors
def test_one_loop_is_the_identity(arch, init, vectors):
    full, idx = tiny(arch), tokens(2, 9)
    assert torch.equal(last(to_recursive(full, 1, init, vectors=vectors), idx), last(full, idx))


@each_arch
@each_vectors
@pytest.mark.parametrize("rank", [0, 3])
def test_unrolled_is_the_same_function(arch, vectors, rank):
    model, idx = tiny(arch, n_loop=3, rank=rank, vectors=vectors), tokens(2, 9)
    full = unroll(model)
    assert (full.config.n_loop, full.config.rank, full.config.vectors, len(full.layers)) == (1, 0, "tied", 6)
    close(last(full, idx), last(model, idx))


def test_lora_rank_is_capped_by_the_layer():
    attn = to_recursive(tiny("gemma"), 2, "average", rank=20).layers[0].attn
    assert (attn.q.rank, attn.k.rank, attn.v.rank) == (20, 12, 12)
    assert attn.k.lora_a.shape == (2, 12, 32) and attn.k.lora_b.shape == (2, 12, 12)


# ---------------------------------------------------------------------------------------------------------------------
# SVD of the residual (Eq. 4) and App. C

@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16)], ids=["wide", "tall", "square"])
@pytest.mark.parametrize("rank", [1, 5, 12, 99])
def test_svd_factors_are_the_best_of_their_rank(shape, rank):
    torch.manual_seed(0)
    delta = torch.randn(shape)
    a, b = svd_factors(delta, rank)
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    r = min(rank, *shape)
    assert a.shape == (r, shape[1]) and b.shape == (shape[0], r)
    close(b @ a, (u[:, :r] * s[:r]) @ vh[:r])
    close(a @ a.T, torch.eye(r))
    close(b.norm(dim=0), s[:r])


def test_svd_of_an_ill_conditioned_residual():
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))[0] for _ in range(2))
    delta = (u * torch.logspace(0, -5, 40, dtype=torch.float64) @ v).float()
    for rank in (10, 30, 40):
        a, b = svd_factors(delta, rank)
        best = torch.linalg.svdvals(delta.double())[rank:].norm()
        assert (b.double() @ a.double() - delta).norm() < best + 1e-6


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_a_direction_without_residual_can_still_learn(shape):
    torch.manual_seed(0)
    delta = torch.randn(shape[0], 2) @ torch.randn(2, shape[1])
    a, b = svd_factors(delta, 6)
    close(b @ a, delta)
    assert (b[:, 2:] == 0).all() and (a[2:] != 0).all()
    assert 0.5 < a[2:].norm(dim=1).mean() < 2


@pytest.mark.parametrize("lora_init, zero_loops", [("svd", [0]), ("zero", [0, 1])])
def test_zero_residual_gets_a_gaussian_a_and_a_zero_b(lora_init, zero_loops):
    model, idx = to_recursive(tiny("llama"), 2, "lower", rank=4, lora_init=lora_init), tokens(2, 9)
    model.logits(model(idx)[-1]).square().mean().backward()
    for layer in model.layers:
        for linear in (layer.attn.k, layer.mlp.gate, layer.mlp.down):
            assert [loop for loop in range(2) if not linear.lora_b[loop].any()] == zero_loops
            assert all((linear.lora_a[loop] != 0).all() for loop in zero_loops)
            assert linear.lora_b.grad.abs().amin(dim=(1, 2)).gt(0).all()


def test_average_of_two_leaves_opposite_residuals():
    full = tiny("llama")
    q = to_recursive(full, 2, "average", rank=5).layers[1].attn.q
    assert torch.equal(q.lora_a[0], q.lora_a[1]) and torch.equal(q.lora_b[1], -q.lora_b[0])
    for loop in range(2):
        a, b = svd_factors(layer_tensor(full, 1 + 3 * loop, "attn.q.weight") - q.weight, 5)
        close(q.lora_b[loop] @ q.lora_a[loop], b @ a, 1e-6)


@each_init
def test_relaxed_layers_start_at_the_best_approximation(init):
    full = tiny("gemma")
    relaxed = to_recursive(full, 3, init, rank=4)
    for loop in range(3):
        for rest in ("attn.q", "attn.v", "mlp.down"):
            linear, w = relaxed.layers[1].get_submodule(rest), layer_tensor(full, 2 * loop + 1, rest + ".weight")
            residual = torch.linalg.svdvals(w - linear.weight)[4:].norm()
            close((w - linear.merged(loop)).norm(), residual, 1e-5)


def test_residual_of_a_half_precision_donor_is_taken_in_fp32():
    full = tiny("llama").bfloat16()
    q = to_recursive(full, 2, "average", rank=99, dtype=torch.float32).layers[0].attn.q
    for loop in range(2):
        close(q.merged(loop), layer_tensor(full, 3 * loop, "attn.q.weight").float(), 1e-7)
    assert {w.dtype for w in to_recursive(full, 2, "average", rank=2).state_dict().values()} == {torch.bfloat16}
    assert {w.dtype for w in to_recursive(full.float(), 2, rank=2, dtype=torch.float16).parameters()} == {torch.float16}


# ---------------------------------------------------------------------------------------------------------------------
# Command line

@pytest.fixture
def donor(tmp_path):
    return hf_folder("llama", tmp_path / "donor")


def hf_folder(arch, folder):
    tokenizers = pytest.importorskip("tokenizers")
    to_hf(tiny(arch), folder)
    words = {w: i for i, w in enumerate(["<eos>", *"abcdefgh"])}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a")).save(str(folder / "tokenizer.json"))
    return folder


def run(**flags):
    convert.main([f"--{name}={value}" for name, value in flags.items()])


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("arch", ARCHS)
def test_main_there_and_back(arch, tmp_path, capsys):
    folder = hf_folder(arch, tmp_path / "donor")
    run(donor=folder, loops=2, init="average", rank=4, vectors="per_loop", out=tmp_path / "out")
    printed = capsys.readouterr().out
    full, saved = load_full(folder), RecursiveTransformer.load(tmp_path / "out")
    want = to_recursive(full, 2, "average", rank=4, vectors="per_loop")
    assert saved.config == want.config
    assert all(torch.equal(w, want.state_dict()[n]) for n, w in saved.state_dict().items())
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    counts = [[f"{m.num_params()[k]:,}" for k in ("stored", "run", "stored_block")] for m in (full, saved)]
    for name, row in zip(("donor", "recursive"), counts, strict=True):
        assert re.search(rf"^{name} +{' +'.join(row)}$", printed, re.M), printed
    q = [full.state_dict()[f"layers.{i}.attn.q.weight"] for i in range(6)]
    residuals = [(q[i] - q[i + 3]) / 2 for i in range(3)]
    kept = sum(torch.linalg.svdvals(d)[:4].square().sum() for d in residuals) / sum(d.square().sum() for d in residuals)
    assert re.search(rf"^attn\.q +{kept:.1%}$", printed, re.M), printed

    run(donor=tmp_path / "out", unroll=True, out=tmp_path / "hf")
    close(last(load_full(tmp_path / "hf"), tokens(2, 9)), last(saved, tokens(2, 9)))
    assert (tmp_path / "hf/tokenizer.json").exists()
    assert (load_any(tmp_path / "hf").config.n_loop, load_any(str(tmp_path / "out")).config.n_loop) == (1, 2)


def test_main_reads_dtype_seed_and_norms(donor, tmp_path):
    run(donor=donor, init="random", rank=2, dtype="bfloat16", seed=5, out=tmp_path / "a")
    run(donor=donor, init="random", rank=2, dtype="bfloat16", seed=5, out=tmp_path / "b")
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    assert RecursiveTransformer.load(tmp_path / "a").embed.weight.dtype == torch.bfloat16
    run(donor=donor, norms="average", rounding="floor", out=tmp_path / "a")
    want = to_recursive(load_full(donor), 2, "stepwise", norms="average", rounding="floor")
    assert torch.equal(last(RecursiveTransformer.load(tmp_path / "a"), tokens(1, 4)), last(want, tokens(1, 4)))


@pytest.mark.parametrize("flag, choices", [("--init=magic", ["stepwise", "average", "lower", "random"]),
                                           ("--vectors=x", ["tied", "per_loop"]), ("--loops=two", ["int"])])
def test_main_lists_the_choices(flag, choices, capsys):
    with pytest.raises(SystemExit) as e:
        convert.main([flag])
    error = capsys.readouterr().err
    assert e.value.code == 2 and all(c in error for c in choices)


# ---------------------------------------------------------------------------------------------------------------------
# Donors and settings that are refused, by name, with nothing overwritten

def refused(donor, message, **flags):
    """convert.py raises this error, and leaves every folder as it was."""
    out = donor.parent / "standing"
    tiny("gemma", vocab_size=9).save(out)
    before = snapshot(donor.parent)
    with pytest.raises(UserError, match=message):
        run(**{"donor": donor, "out": out} | flags)
    assert snapshot(donor.parent) == before
    assert not [p for p in donor.parent.iterdir() if p.suffix in (".tmp", ".old")]


@pytest.mark.parametrize("changes", [
    {"model_type": "mixtral"}, {"model_type": None}, {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
    {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, {"sliding_window": 63},
    {"layer_types": ["full_attention", "sliding_attention"] * 3}, {"attn_logit_softcapping": 50.0},
    {"final_logit_softcapping": 30.0}, {"is_causal": False}, {"use_bidirectional_attention": True},
    {"quantization_config": {"quant_method": "gptq"}}, {"hidden_act": "relu"}, {"hidden_activation": "gelu"},
    {"rope_parameters": {"type": "linear", "factor": 4.0}}, {"rope_scaling": {"rope_type": "default", "factor": 2.0}},
    {"rope_parameters": "yarn"}, {"partial_rotary_factor": 0.5}, {"rotary_pct": 0.25}, {"rotary_emb_base": 500.0},
], ids=str)
def test_unsupported_donors_are_refused_by_name(changes, donor):
    edit_config(donor / "config.json", **changes)
    ((key, value),) = changes.items()
    key = "activation" if "activation" in key or key == "hidden_act" else key
    refused(donor, re.escape(key) + ".*" + re.escape(repr(value)) + ".* not supported")


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_pytorch_tanh"])
def test_gemma_means_tanh_by_gelu_only_in_hidden_act(hidden_act):
    hf = read_json(Path(__file__).parent.parent / "assets/donor/config.json")
    hf |= {"hidden_act": hidden_act, "hidden_activation": None}
    assert config_from_hf(hf).arch == "gemma"
    with pytest.raises(UserError, match="activation 'gelu' is not supported for gemma; use gelu_pytorch_tanh"):
        config_from_hf(hf | {"hidden_activation": "gelu"})


def test_settings_that_change_nothing_are_accepted(donor):
    want = last(load_full(donor), tokens(1, 5))
    edit_config(donor / "config.json", rope_scaling=None, sliding_window=4096, use_sliding_window=False, mlp_bias=False,
                layer_types=["full_attention"] * 6, is_causal=True, quantization_config=None,
                rope_parameters={"rope_type": "default"}, eos_token_id=[7, 8])
    full = load_full(donor)
    assert torch.equal(last(full, tokens(1, 5)), want) and full.config.eos_token_id == [7, 8]


@pytest.mark.parametrize("changes, message", [
    ({"qk_norm": True}, "qk_norm=True is not known here"),
    ({"attention_multiplier": 0.5}, "attention_multiplier=0.5 is not"),
    ({"rope_theta": 500.0, "rope_parameters": {"rope_theta": 1e4}}, "rope_theta is given as 500.0 and as 10000.0"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not supported"),
    ({"hidden_size": 32.0}, "hidden_size=32.0 is of the wrong type; it must be int"),
    ({"hidden_size": True}, "hidden_size=True is of the wrong type"),
    ({"num_attention_heads": 0}, "heads=0 must be positive"),
    ({"num_attention_heads": None}, "num_attention_heads=None is of the wrong type"),
    ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide the 4 heads"),
    ({"head_dim": 15}, "head_dim=15 rotates 16"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5' is of the wrong type"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false'"),
    ({"eos_token_id": []}, "eos_token_id=.. is of the wrong type"),
    ({"eos_token_id": [1, True]}, "eos_token_id=.1, True."),
    ({"eos_token_id": [1, 53]}, r"eos_token_id=\[1, 53\] is outside the vocabulary of 53"),
    ({"bos_token_id": -1}, "bos_token_id=-1 is outside"),
    ({"rope_theta": "1e4"}, "rope_theta='1e4' is of the wrong type"),
    ({"max_position_embeddings": None}, "max_position_embeddings=None is of the wrong type"),
], ids=str)
def test_settings_of_the_wrong_kind_are_refused_by_name(changes, message, donor):
    edit_config(donor / "config.json", **changes)
    refused(donor, "config.json: .*" + message)


@pytest.mark.parametrize("changes", [
    {"num_key_value_heads": 2}, {"head_dim": 16}, {"rope_theta": 500.0}, {"partial_rotary_factor": 0.5},
    {"rotary_pct": 0.0}, {"rotary_pct": 1.5}, {"use_parallel_residual": None}], ids=str)
def test_neox_settings_that_contradict_each_other(changes, tmp_path):
    folder = hf_folder("gpt_neox", tmp_path / "donor")
    edit_config(folder / "config.json", **changes)
    ((key, value),) = changes.items()
    refused(folder, f"{key}={value!r}")


def test_unknown_settings_are_named_once_and_kept(donor, tmp_path, capsys):
    own = {"unsloth_version": "2025.1", "model_name": "mine", "auto_map": {"AutoModel": "x.Y"},
           "initializer_range": 0.5, "_attn_implementation": "sdpa", "max_window_layers": 3,
           "attention_dropout": 0.1, "pad_token_id": 8,
           "eos_token_id": [7, 8]}
    edit_config(donor / "config.json", **own)
    run(donor=donor, out=tmp_path / "looped")
    load_full(donor)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 and "model_name, auto_map" in warnings[0] and "initializer_range" not in warnings[0]
    run(donor=tmp_path / "looped", unroll=True, out=tmp_path / "hf")
    hf = json.loads((tmp_path / "hf/config.json").read_text())
    del own["auto_map"]                                                  # its code is not copied
    assert hf | own == hf and hf["recursive"] == {"n_loop": 2, "rank": 0, "vectors": "tied"}
    assert load_full(tmp_path / "hf").config.eos_token_id == [7, 8]


def test_licence_and_readme_are_kept(donor, tmp_path):
    (donor / "README.md").write_text("---\nlicense: gemma\n---\nA donor é.", encoding="utf-8")
    (donor / "LICENSE.txt").write_text("all yours")
    edit_config(donor / "config.json", _name_or_path="acme/tiny")
    run(donor=donor, rank=2, init="average", out=tmp_path / "looped")
    (tmp_path / "looped/README.md").write_text("my notes")
    run(donor=tmp_path / "looped", unroll=True, out=tmp_path / "hf")
    card = (tmp_path / "hf/README.md").read_text()
    for word in ("license: gemma\n", "base_model: acme/tiny\n", "2 loops", "rank 2", "llama model.\n\nThe donor's"):
        assert word in card, card
    assert (tmp_path / "hf/README_donor.md").read_bytes() == (donor / "README.md").read_bytes()
    assert (tmp_path / "hf/LICENSE.txt").read_text() == "all yours"
    assert (tmp_path / "looped/README.md").read_text() == "my notes"


def test_hidden_act_of_gemma_and_neox(tmp_path):
    for arch, wrong in (("gemma", "silu"), ("gpt_neox", "gelu_new")):
        folder = hf_folder(arch, tmp_path / arch)
        edit_config(folder / "config.json", hidden_act=wrong)
        refused(folder, f"activation '{wrong}' is not supported for {arch}")


WEIGHTS, CONFIG = "model.safetensors", "config.json"
Q = "model.layers.1.self_attn.q_proj.weight"


def shard(folder):
    """Two shards and their index in place of the one file."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    files = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({n: tensors[n] for n in tensors if files[n] == file}, folder / file)
    (folder / (WEIGHTS + ".index.json")).write_text(json.dumps({"weight_map": files}))


def lose_shard(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def cut_shard(folder):
    shard(folder)
    cut(folder / "model-00002-of-00002.safetensors", 0.9)


def empty_index(folder):
    shard(folder)
    (folder / (WEIGHTS + ".index.json")).write_text("{}")


ALIKE = ("no config", "cut short", "cut in the header", "empty", "garbage", "config cut", "config a list",
         "extra tensor")
DONOR_DAMAGE = {kind: DAMAGE[kind] for kind in ALIKE} | {
    "no weights": (lambda d: (d / WEIGHTS).unlink(), "neither model.safetensors nor its index"),
    "only .bin": (lambda d: (d / WEIGHTS).rename(d / "pytorch_model.bin"), r"only \.bin weights"),
    "missing tensor": (lambda d: edit_tensors(d / WEIGHTS, lambda t: t.pop(Q)), f"1 missing.*{Q}"),
    "other shape": (lambda d: edit_tensors(d / WEIGHTS, lambda t: t.update({Q: torch.ones(3, 5)})),
                    rf"{Q} is \(3, 5\), expected \(40, 32\)"),
    "int8": (lambda d: edit_tensors(d / WEIGHTS, lambda t: t.update({Q: t[Q].char()})), rf"{Q} is .*torch\.int8"),
    "lost shard": (lose_shard, "lacks model-00002-of-00002.safetensors, which model.safetensors.index.json names"),
    "cut shard": (cut_shard, "cannot read .*model-00002-of-00002.safetensors"),
    "empty index": (empty_index, "index.json has no weight_map"),
    "more layers": (lambda d: edit_config(d / CONFIG, num_hidden_layers=8), "18 missing"),
    "setting missing": (lambda d: (d / CONFIG).write_text('{"model_type": "llama"}'), "'hidden_size' is missing"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "no tokenizer in"),
}


@pytest.mark.parametrize("kind", DONOR_DAMAGE)
def test_damaged_donors_are_refused(kind, donor):
    damage, message = DONOR_DAMAGE[kind]
    damage(donor)
    refused(donor, message)
    if kind != "no tokenizer":
        with pytest.raises(UserError, match=message):
            load_full(donor)


def test_everything_stored_is_read_or_refused(donor):
    """A tensor that the index does not list, an adapter beside the weights, a head that differs from the embedding."""
    shard(donor)
    edit_tensors(donor / "model-00001-of-00002.safetensors", lambda t: t.update(odd=torch.ones(1)))
    refused(donor, r"1 unexpected \(odd\)")
    edit_tensors(donor / "model-00001-of-00002.safetensors", lambda t: t.pop("odd"))
    edit_config(donor / CONFIG, tie_word_embeddings=True)
    refused(donor, r"lm_head\.weight differs from the embedding")
    edit_config(donor / CONFIG, tie_word_embeddings=False)
    (donor / "adapter_config.json").write_text("{}")
    refused(donor, "has an adapter beside its weights")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(number, donor, tmp_path):
    tiny("llama").save(tmp_path / "ours")
    edit_tensors(tmp_path / "ours" / WEIGHTS, lambda t: t["layers.1.attn.q.weight"].__setitem__((2, 3), number))
    with pytest.raises(UserError, match=r"layers\.1\.attn\.q\.weight .* is not finite"):
        RecursiveTransformer.load(tmp_path / "ours")
    edit_tensors(donor / WEIGHTS, lambda t: t[Q].__setitem__((2, 3), number))
    refused(donor, f"{Q} is not finite")
    with pytest.raises(UserError, match=f"{Q} is not finite"):
        load_full(donor)


def test_numbers_too_large_for_float16_are_refused_by_name(donor, tmp_path):
    """When a donor is read, converted, exported and loaded; bfloat16 holds them."""
    edit_tensors(donor / WEIGHTS, lambda t: t[Q].__setitem__((2, 3), -70144.0))
    message = "has a weight of -70144, and torch.float16 overflows beyond 65504; use .*bfloat16"
    refused(donor, f"layers.1.attn.q.weight {message}", dtype="float16", init="lower")
    with pytest.raises(UserError, match=f"{Q} {message}"):
        load_full(donor, torch.float16)
    run(donor=donor, init="lower", dtype="bfloat16", out=tmp_path / "looped")
    refused(tmp_path / "looped", f"layers.1.attn.q.weight {message}", dtype="float16", unroll=True)
    with pytest.raises(UserError, match=f"layers.1.attn.q.weight .*{message}"):
        RecursiveTransformer.load(tmp_path / "looped", dtype=torch.float16)


def test_a_donor_of_several_dtypes_is_read_in_the_widest(donor, tmp_path):
    exact = load_full(donor)
    edit_tensors(donor / WEIGHTS, lambda t: t.update({n: w.bfloat16() for n, w in t.items() if "norm" not in n}))
    full = load_any(donor)
    assert {p.dtype for p in full.parameters()} == {torch.float32}
    assert torch.equal(full.norm.weight, exact.norm.weight)
    close(last(full, tokens(1, 5)), last(exact, tokens(1, 5)), 0.1)
    run(donor=donor, init="average", rank=2, out=tmp_path / "looped")
    assert {p.dtype for p in RecursiveTransformer.load(tmp_path / "looped").parameters()} == {torch.float32}
    assert {p.dtype for p in load_full(donor, torch.bfloat16).parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_export_merges_in_float32_and_reports_rounding(donor, tmp_path, capsys):
    """A bf16 checkpoint exported in fp32 computes what the checkpoint does in fp32."""
    run(donor=donor, init="average", rank=3, dtype="bfloat16", out=tmp_path / "looped")
    capsys.readouterr()
    want = last(RecursiveTransformer.load(tmp_path / "looped", dtype=torch.float32), tokens(2, 9))
    run(donor=tmp_path / "looped", unroll=True, dtype="float32", out=tmp_path / "wide")
    assert "rounding" not in capsys.readouterr().out
    run(donor=tmp_path / "looped", unroll=True, out=tmp_path / "narrow")
    moved, added = re.search(r"rounding to bfloat16 .* by ([\d.]+)% of .*, ([\d.]+)% of what LoRA adds",
                             capsys.readouterr().out).groups()
    assert 0.1 < float(moved) < 0.4 and float(moved) < float(added)
    wide, narrow = (load_full(tmp_path / name, torch.float32) for name in ("wide", "narrow"))
    close(last(wide, tokens(2, 9)), want)
    assert (last(narrow, tokens(2, 9)) - want).abs().max() > 1e-3
    for name, w in narrow.state_dict().items():
        assert torch.equal(w, wide.state_dict()[name].bfloat16().float()), name  # rounded once


def test_export_in_half_precision_where_lora_adds_nothing_yet(donor, tmp_path, capsys):
    run(donor=donor, init="average", rank=3, lora_init="zero", out=tmp_path / "looped")
    run(donor=tmp_path / "looped", unroll=True, dtype="bfloat16", out=tmp_path / "hf")
    assert "rounding" not in capsys.readouterr().out
    assert {p.dtype for p in load_full(tmp_path / "hf").parameters()} == {torch.bfloat16}


def test_whole_shards_are_read(donor):
    want = last(load_full(donor), tokens(1, 5))
    shard(donor)
    assert torch.equal(last(load_full(donor), tokens(1, 5)), want)


@pytest.mark.parametrize("flags, message", [
    ({"loops": 4}, "4 loops do not divide the 6 layers; use one of 1, 2, 3, 6"),
    ({"loops": 0}, "0 loops do not divide the 6 layers; use one of 1, 2, 3, 6"),
    ({"rank": -3}, "rank -3 is negative; use 0"),
], ids=str)
def test_flags_that_do_not_fit(flags, message, donor):
    refused(donor, message, **flags)


@pytest.mark.parametrize("flags, named", [
    ({"unroll": True, "rank": 64}, "rank"), ({"unroll": True, "init": "average"}, "init"),
    ({"unroll": True, "seed": 1}, "seed"),
    ({"init": "random", "norms": "pick"}, "norms"), ({"init": "random", "rank": 2, "lora_init": "zero"}, "lora_init"),
    ({"init": "average", "rounding": "floor"}, "rounding"), ({"lora_init": "zero"}, "lora_init"),
    ({"vectors": "per_loop", "norms": "average"}, "norms"), ({"calib_tokens": 512}, "calib_tokens"),
], ids=str)
def test_settings_that_would_change_nothing(flags, named, donor):
    refused(donor, f"^--{named}=.*drop --{named}$", **flags)


def test_donor_must_exist_and_output_must_not_hold_something_else(donor, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.png").write_text("meow")
    (tmp_path / "file").write_text("text")
    refused(donor, r"not a checkpoint of this project \(cat\.png\)", out=tmp_path / "photos")
    refused(donor, "file is a file", out=tmp_path / "file")
    refused(tmp_path / "nowhere", "nowhere does not exist; give a folder with config.json")
    refused(donor, "is the donor itself and would replace it", out=donor)


def test_a_looped_model_is_no_donor(donor, tmp_path):
    run(donor=donor, rank=2, out=tmp_path / "looped")
    refused(tmp_path / "looped", "is of a checkpoint of this project.*--unroll")
    (tmp_path / "looped/tokenizer.json").unlink()
    refused(tmp_path / "looped", "no tokenizer in", unroll=True)
    refused(donor, r"not a checkpoint of this project but a Hugging Face one \(llama\)", unroll=True)


@pytest.mark.parametrize("changes", [{"n_loop": 2}, {"rank": 2}, {"vectors": "per_loop"}], ids=str)
def test_recursive_models_are_not_converted_again(changes):
    with pytest.raises(UserError, match=r"recursive model already.*unroll"):
        to_recursive(tiny("llama", **changes), 3)


@pytest.mark.parametrize("options, allowed", [
    ({"init": "magic"}, "stepwise, average, lower, random"), ({"lora_init": "pca"}, "svd, zero"),
    ({"rounding": "up"}, "round, floor"), ({"norms": "none"}, "init, average, pick"),
    ({"vectors": "x"}, "tied, per_loop"),
], ids=str)
def test_unknown_options_list_the_known_ones(options, allowed):
    ((_, given),) = options.items()
    with pytest.raises(UserError, match=f"'{given}' is unknown.*{allowed}"):
        to_recursive(tiny("llama"), 2, **options)


def test_source_layers_refuses():
    with pytest.raises(UserError, match="unknown init 'magic'; use stepwise, average, lower or random"):
        source_layers(6, 2, "magic")
    with pytest.raises(UserError, match="4 loops do not divide the 6 layers"):
        source_layers(6, 4, "average")


def test_ids_home_and_owners(tmp_path, monkeypatch, donor):
    """`~` is the home folder, and a Hugging Face id is read as one even if a folder has its owner's name."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_full("~/donor").config == load_any("~/donor").config == load_full(donor).config
    cached = tmp_path / "hub/models--acme--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text("abc")
    shutil.copytree(donor, cached / "snapshots/abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "acme/other").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert load_full("acme/tiny").config.extra["_name_or_path"] == "acme/tiny"
    edit_config(cached / "snapshots/abc/config.json", _name_or_path="acme/predecessor")
    assert load_full("acme/tiny").config.extra["_name_or_path"] == "acme/tiny"
    with pytest.raises(UserError, match="acme/third is not a folder, and cannot be downloaded either"):
        load_full("acme/third")


def test_load_full_of_nothing(tmp_path):
    with pytest.raises(UserError, match=r"does not exist; give a folder with config\.json"):
        load_full(tmp_path / "nowhere")
    shutil.copytree(hf_folder("gemma", tmp_path / "a"), tmp_path / "b")
    with pytest.raises(UserError, match="does not exist"):
        load_full(tmp_path / "b/config.json")
