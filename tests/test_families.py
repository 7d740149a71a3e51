"""Llama 3.1 to 3.3, Mistral, Qwen 2, 2.5 and 3, SmolLM3, and what was distilled into them. Their logits are in
test_parity.py; here are their published settings, the folders of the hub, layers without rotation through everything
that depends on depth, and what stays refused."""

import hashlib
import json
import shutil

import pytest
import torch
from test_convert import run
from test_engine import Case, draw_model
from test_model import close, last, randomise, tiny, tokens
from test_parity import FAMILIES, assert_same, edit_config, from_hf, hf_model

import kernels
from calibrate import to_calibrated
from convert import load_full, to_hf, to_recursive, unroll
from engine import Engine
from exits import Rule, decode, run_exits
from hf import config_from_hf
from lib.cli import UserError
from lib.tokenizer import Tokenizer
from model import Config, KVCache, RecursiveTransformer, rope_angles

transformers = pytest.importorskip("transformers")
BASE = {"hidden_act": "silu", "use_cache": True, "attention_dropout": 0.0, "initializer_range": 0.02,
        "torch_dtype": "bfloat16", "transformers_version": "4.45.0"}
LLAMA = BASE | {"model_type": "llama", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1,
                "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 131072, "vocab_size": 128256,
                "num_attention_heads": 32, "num_key_value_heads": 8, "bos_token_id": 128000, "rope_scaling": {
                    "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                    "original_max_position_embeddings": 8192, "rope_type": "llama3"}}
QWEN = BASE | {"rms_norm_eps": 1e-6, "use_sliding_window": False, "vocab_size": 151936, "num_key_value_heads": 2,
               "max_window_layers": 21, "bos_token_id": 151643, "eos_token_id": 151645}
PUBLISHED = {  # config.json as it is published, what must come of it, and the number of parameters
    "Llama-3.2-1B": (LLAMA | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
                              "tie_word_embeddings": True, "eos_token_id": [128001, 128008, 128009],
                              "rope_scaling": LLAMA["rope_scaling"] | {"factor": 32.0}},
                     {"rope_llama3": [32.0, 1.0, 4.0, 8192], "n_kv_head": 8}, 1_235_814_400),
    "DeepSeek-R1-Distill-Llama-8B": (LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                                              "eos_token_id": 128001, "tie_word_embeddings": False},
                                     {"rope_llama3": [8.0, 1.0, 4.0, 8192], "head_dim": 128}, 8_030_261_248),
    "DeepSeek-R1-Distill-Qwen-1.5B": (QWEN | {
        "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "max_position_embeddings": 131072, "rope_theta": 10000, "sliding_window": 4096,
        "tie_word_embeddings": False, "use_mrope": False}, {"attn_bias": True, "o_bias": False}, 1_777_088_000),
    "Qwen2.5-0.5B": (QWEN | {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "max_position_embeddings": 32768, "rope_theta": 1000000.0, "sliding_window": 32768,
        "tie_word_embeddings": True, "use_mrope": False}, {"attn_bias": True, "o_bias": False}, 494_032_768),
    "Qwen3-0.6B": (QWEN | {
        "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "head_dim": 128,
        "num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 40960, "rope_theta": 1000000,
        "rope_scaling": None, "sliding_window": None, "attention_bias": False, "tie_word_embeddings": True},
                   {"qk_norm": True, "attn_bias": False}, 596_049_920),
    "SmolLM3-3B": (BASE | {
        "model_type": "smollm3", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 65536, "rope_theta": 5000000.0,
        "rms_norm_eps": 1e-6, "attention_bias": False, "mlp_bias": False, "rope_scaling": None, "sliding_window": None,
        "use_sliding_window": False, "layer_types": ["full_attention"] * 36, "max_window_layers": 28,
        "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "vocab_size": 128256, "pretraining_tp": 2,
        "bos_token_id": None, "eos_token_id": 128012, "pad_token_id": 128004},
                   {"no_rope": list(range(3, 36, 4)), "tie_head": True}, 3_075_098_624),
    "Mistral-7B-v0.3": (BASE | {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768, "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-5, "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 32768,
        "bos_token_id": 1, "eos_token_id": 2}, {"head_dim": 128, "rope_llama3": None}, 7_248_023_552),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_are_read_without_a_warning(name, capsys):
    hf, want, size = PUBLISHED[name]
    config = config_from_hf(hf)
    assert {field: getattr(config, field) for field in want} == want and config.arch == hf["model_type"]
    assert config.n_ctx == hf["max_position_embeddings"] and config.eos_token_id == hf["eos_token_id"]
    with torch.device("meta"):
        assert RecursiveTransformer(config).num_params()["stored"] == size
    assert not capsys.readouterr().err


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3"])
def test_settings_that_are_left_out_are_what_transformers_assumes(family):
    given = {"hidden_size": 128, "num_attention_heads": 32, "num_hidden_layers": 8, "intermediate_size": 128,
             "vocab_size": 53, "sliding_window": None, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    theirs = getattr(transformers, family + "Config")(**given)
    ours = config_from_hf(given | {"model_type": theirs.model_type})
    assert (ours.n_kv_head, ours.n_ctx, ours.norm_eps, ours.tie_head, ours.rope_theta, ours.head_dim) == (
        theirs.num_key_value_heads, theirs.max_position_embeddings, theirs.rms_norm_eps, theirs.tie_word_embeddings,
        theirs.rope_parameters["rope_theta"], getattr(theirs, "head_dim", 4) or 4)
    flags = getattr(theirs, "no_rope_layers", [1] * 8)
    assert ours.no_rope == ([i for i in range(8) if not flags[i]] or None)


# ---------------------------------------------------------------------------------------------------------------------
# Folders of the hub

@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(case): the id of a cached download, made as the hub's client makes it: files are links to blobs."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def add(case):
        tokenizers = pytest.importorskip("tokenizers")
        cached, made = tmp_path / "hub/models--acme--tiny", tmp_path / "made"
        hf_model(case).save_pretrained(made, max_shard_size="40KB")
        words = {w: i for i, w in enumerate(["<eos>", "<end>", *"abcdefgh"])}
        fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
        fast.add_special_tokens(["<eos>", "<end>"])
        fast.save(str(made / "tokenizer.json"))
        (made / "chat_template.jinja").write_text("{{ messages }}")
        (made / "generation_config.json").write_text('{"eos_token_id": [1, 0], "temperature": 0.6}')
        for folder in ("blobs", "refs", "snapshots/abc"):
            (cached / folder).mkdir(parents=True)
        (cached / "refs/main").write_text("abc")
        for path in made.iterdir():
            blob = cached / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
            shutil.move(path, blob)
            (cached / "snapshots/abc" / path.name).symlink_to(f"../../blobs/{blob.name}")
        return "acme/tiny"
    return add


@pytest.mark.parametrize("case", FAMILIES)
def test_a_cached_download_is_read_converted_and_exported(case, hub, tmp_path):
    """By its id: several shards and their index, a chat template, several ids that end a text."""
    donor = hub(case)
    folder = tmp_path / "hub/models--acme--tiny/snapshots/abc"
    assert len(list(folder.glob("*.safetensors"))) > 2 and all(path.is_symlink() for path in folder.iterdir())
    full = load_full(donor)
    assert_same(from_hf(folder), full)
    run(donor=donor, loops=2, init="average", rank=1000, vectors="per_loop", out=tmp_path / "looped")
    looped = RecursiveTransformer.load(tmp_path / "looped")
    close(last(looped, tokens(2, 9)), last(full, tokens(2, 9)), 1e-4)
    run(donor=tmp_path / "looped", unroll=True, out=tmp_path / "back")
    assert_same(from_hf(tmp_path / "back"), full, tol=2e-4)
    assert load_full(tmp_path / "back").config.architecture() == full.config.architecture()
    for path in (tmp_path / "looped", tmp_path / "back"):
        assert set(Tokenizer.load(path, 53).eos_ids) >= {0, 1}
        assert (path / "chat_template.jinja").read_text() == "{{ messages }}"


def test_mistrals_second_copy_of_its_weights_is_not_downloaded(monkeypatch):
    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda donor, **options: asked.update(options) or ".")
    load = pytest.raises(UserError, load_full, "mistralai/Mistral-7B-v0.3")
    assert "config.json" in str(load.value) and "consolidated*" in asked["ignore_patterns"]


# ---------------------------------------------------------------------------------------------------------------------
# Scaled rotary embeddings

@pytest.mark.parametrize("spelling", ["rope_scaling rope_type", "rope_scaling type", "rope_parameters type", "both"])
def test_every_spelling_of_the_scaling(spelling, tmp_path):
    theirs = hf_model("llama-3.1")
    theirs.save_pretrained(tmp_path)

    def change(hf):
        rope = hf.pop("rope_parameters")
        hf["rope_theta"], place, kind = rope.pop("rope_theta"), *(spelling + " rope_type").split()[:2]
        rope[kind] = rope.pop("rope_type")
        hf |= {"rope_scaling": rope, "rope_parameters": rope} if spelling == "both" else {place: rope}
    edit_config(tmp_path, change)
    ours = load_full(tmp_path)
    assert ours.config.rope_llama3 == [8.0, 1.0, 4.0, 32] and ours.config.rope_theta == 500.0
    assert_same(theirs, ours)


def test_without_its_original_context_it_is_the_longest(tmp_path):
    hf_model("llama-3.1").save_pretrained(tmp_path)
    edit_config(tmp_path, lambda hf: hf["rope_parameters"].pop("original_max_position_embeddings"))
    assert_same(from_hf(tmp_path), load_full(tmp_path))
    assert load_full(tmp_path).config.rope_llama3[3] == 64


def test_scaled_angles_far_out_are_those_of_transformers():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    hf = PUBLISHED["Llama-3.2-1B"][0]
    pos, theirs = torch.arange(100_000, 100_010), LlamaRotaryEmbedding(LlamaConfig(**hf))
    cos, sin = rope_angles(pos, config_from_hf(hf))
    want_cos, want_sin = theirs(torch.zeros(1), pos[None])
    torch.testing.assert_close(cos[:, 0], want_cos[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(sin[:, 0, 32:], want_sin[0, :, 32:], atol=1e-6, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Layers without rotation: the flag belongs to the depth, also where two depths of one stored layer differ

NO_ROPE = [1, 3, 4]      # of six depths, so that with 2 and with 3 loops a stored layer rotates in some only


def mixed(arch="llama", **changes):
    return tiny(arch, no_rope=NO_ROPE, **changes).double()


@pytest.mark.parametrize("n_loop", [1, 2, 3])
@pytest.mark.parametrize("vectors", ["tied", "per_loop"])
@torch.no_grad()
def test_cached_states_and_the_unrolled_model_are_the_same(n_loop, vectors):
    model, idx = mixed("qwen3", n_loop=n_loop, rank=2, vectors=vectors), tokens(3, 13)
    cache = KVCache(model.config, batch=3, max_len=13, dtype=torch.float64)
    parts = [model(chunk, cache) for chunk in idx.split([5, 4, 1, 2, 1], dim=1)]
    for loop, want in enumerate(model(idx)):
        close(torch.cat([p[loop] for p in parts], dim=1), want, 1e-10)
    full = unroll(model)
    assert full.config.no_rope == NO_ROPE and full.config.n_loop == 1
    close(last(full, idx), last(model, idx), 1e-10)
    full.config.no_rope = None
    assert (last(full, idx) - last(model, idx)).abs().max() > 0.1


@pytest.mark.parametrize("init", ["stepwise", "average", "lower", "calibrated"])
@torch.no_grad()
def test_full_rank_is_the_donor(init):
    full, idx = mixed("qwen3"), tokens(2, 9)
    for n_loop in (2, 3):
        if init == "calibrated":
            model = to_calibrated(full, list(tokens(12, 60).split(4)), n_loop, 1000, "per_loop")
        else:
            model = to_recursive(full, n_loop, init, rank=1000, vectors="per_loop")
        assert model.config.no_rope == NO_ROPE
        close(last(model, idx), last(full, idx), 1e-4)


@torch.no_grad()
def test_a_position_of_an_unrotated_layer_has_no_effect():
    """With no layer that rotates, a text's last logits depend on the set of tokens before the last alone."""
    idx = tokens(1, 9)
    shuffled = torch.cat([idx[:, [2, 0, 3, 1, 7, 5, 4, 6]], idx[:, 8:]], 1)
    still = tiny("llama", n_layer=1, no_rope=[0]).double()
    close(last(still, shuffled)[:, -1], last(still, idx)[:, -1], 1e-12)
    assert (last(tiny("llama", n_layer=1).double(), shuffled) - last(still, idx))[:, -1].abs().max() > 1e-3


@pytest.mark.parametrize("keys", ["exact", "copy"])
def test_copied_keys_need_layers_that_agree(keys):
    """Copied keys are rotated as where they come from; a later loop may not rotate its queries."""
    agreeing, rule = tiny("llama", n_loop=2, no_rope=[1, 4]), Rule("fixed")
    for use in (lambda model: list(decode(model, tokens(1, 3), 2, rule, keys=keys)),
                lambda model: run_exits(model, tokens(1, 3), rule, keys=keys),
                lambda model: Engine(model, 2, keys=keys)):
        use(agreeing)
        if keys == "exact":
            use(tiny("llama", n_loop=2, no_rope=[1]))
        else:
            with pytest.raises(UserError, match="rotates them in some loops only .*use keys='exact', or loops"):
                use(tiny("llama", n_loop=2, no_rope=[1]))


# ---------------------------------------------------------------------------------------------------------------------
# Norms of q and k

@torch.no_grad()
def test_tied_norms_of_q_and_k_are_picked_or_averaged_like_the_others():
    full = tiny("qwen3")
    for kind in ("attn.q_norm", "attn.k_norm", "norm1"):
        w = [full.layers[i].get_submodule(kind).weight for i in range(6)]
        for want, options in (((w[0] + w[3]) / 2, {"init": "average"}), (w[0], {"init": "lower"}),
                              ((w[0] + w[3]) / 2, {"init": "stepwise", "norms": "average"}),
                              (w[0], {"init": "average", "norms": "pick"}),
                              (torch.stack([w[0], w[3]]), {"init": "average", "vectors": "per_loop"})):
            close(to_recursive(full, 2, **options).layers[0].get_submodule(kind).weight, want, 1e-7)


@torch.no_grad()
def test_calibrated_norms_of_q_and_k_are_averaged_and_not_absorbed():
    full = tiny("qwen3").double()
    for vectors in ("tied", "per_loop"):
        model = to_calibrated(full, list(tokens(12, 60).split(4)), 2, 3, vectors)
        for kind in ("attn.q_norm", "attn.k_norm"):
            w = torch.stack([full.layers[i].get_submodule(kind).weight for i in (1, 4)])
            close(model.layers[1].get_submodule(kind).weight, w if vectors == "per_loop" else w.mean(0), 1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Rows at different loops, and Triton's interpreter

ENGINES = {"qwen2": {}, "qwen3": {"vectors": "per_loop"}, "llama": {"no_rope": [1, 2]}}


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")    # idle rows, in the interpreter
@pytest.mark.skipif(kernels.triton is None, reason="no Triton for this system")
@pytest.mark.parametrize("arch", ENGINES)
def test_the_engine_on_the_kernels_is_sequential_decoding(arch, monkeypatch):
    """In fp32, by the interpreter where there is no GPU: ghosts and tokens at several loops in one pass."""
    model = draw_model(3, 2, arch, n_layer=4, rank=3, **ENGINES[arch]).float()
    case = Case(model, Rule("fixed", exit_loop=0), prompts=[(1, 2, 3), (4,)])
    want = [case.decoded(prompt, 5) for prompt in case.prompts]
    calls = {"linear_rows_triton": 0, "decode_attention_triton": 0}

    def counted(name, kernel):
        def call(*args):
            calls[name] += 1
            return kernel(*args)
        return call
    for name in calls:
        monkeypatch.setattr(kernels, name, counted(name, getattr(kernels, name)))
    monkeypatch.setattr(kernels, "runs_triton", lambda x: True)
    engine = case.engine(slots=2, max_len=10, static=True)
    requests = [engine.add(prompt, 5) for prompt in case.prompts]
    list(engine.run())
    assert [(r.tokens, r.loops) for r in requests] == want and min(calls.values()) > 9


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, and what only looks as if it had to be

@pytest.mark.parametrize("arch, reason", [("gemma2", "soft-capping, sandwich norms, sliding windows"),
                                          ("gemma3_text", "sandwich norms, sliding windows"),
                                          ("gemma3", "sandwich norms"), ("olmo2", "norms after, not before")])
def test_relatives_are_refused_with_the_reason(arch, reason):
    with pytest.raises(UserError, match=rf"'{arch}' is not supported \({reason}.*donors are of type gemma, "):
        config_from_hf(LLAMA | {"model_type": arch})


def read(name, **changes):
    return config_from_hf(PUBLISHED[name][0] | changes)


@pytest.mark.parametrize("name, changes", [
    ("Mistral-7B-v0.3", {"sliding_window": 4096}), ("Mistral-7B-v0.3", {"sliding_window": 32767}),
    ("Mistral-7B-v0.3", {"sliding_window": 4096, "use_sliding_window": False}),      # which its class does not read
    ("Qwen2.5-0.5B", {"sliding_window": 4096, "use_sliding_window": True}),
    ("Qwen3-0.6B", {"sliding_window": 4096, "use_sliding_window": True}),
    ("SmolLM3-3B", {"sliding_window": 4096, "use_sliding_window": True}),
    ("Llama-3.2-1B", {"sliding_window": 4096}), ("Mistral-7B-v0.3", {"sliding_window": "4096"})], ids=str)
def test_windows_shorter_than_the_context_are_refused(name, changes):
    with pytest.raises(UserError, match=r"sliding_window=.*shorter than max_position_embeddings.* not supported"):
        read(name, **changes)


def test_a_window_that_is_not_given_is_mistrals():
    hf = {key: value for key, value in PUBLISHED["Mistral-7B-v0.3"][0].items() if key != "sliding_window"}
    with pytest.raises(UserError, match="sliding_window=4096 .*not supported"):
        config_from_hf(hf)
    assert config_from_hf(hf | {"max_position_embeddings": 4096}).extra["sliding_window"] == 4096


@pytest.mark.parametrize("name, changes", [
    ("Mistral-7B-v0.3", {"sliding_window": 32768}), ("Mistral-7B-v0.3", {"sliding_window": 99999}),
    ("Qwen2.5-0.5B", {"sliding_window": 4096}), ("Qwen2.5-0.5B", {"use_sliding_window": True}),
    ("Qwen3-0.6B", {"sliding_window": None, "use_sliding_window": True}),
    ("Mistral-7B-v0.3", {"sliding_window": 4096, "max_position_embeddings": 4096})], ids=str)
def test_windows_that_no_text_reaches_are_accepted(name, changes):
    read(name, **changes)


@pytest.mark.parametrize("name, changes, message", [
    ("Llama-3.2-1B", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
     r"low_freq_factor .*=\[8.0, None, None, 131072\] is of the wrong type; it must be list"),
    ("Llama-3.2-1B", {"rope_scaling": LLAMA["rope_scaling"] | {"factor": "8"}}, "factor.*is of the wrong type"),
    ("Llama-3.2-1B", {"rope_scaling": LLAMA["rope_scaling"] | {"factor": -8.0}}, "must be four positive numbers"),
    ("Llama-3.2-1B", {"rope_scaling": LLAMA["rope_scaling"] | {"low_freq_factor": 4.0}}, "the larger of the two"),
    ("Llama-3.2-1B", {"rope_scaling": LLAMA["rope_scaling"] | {"mscale": 1.0}}, "rope_scaling=.*not supported"),
    ("Llama-3.2-1B", {"rope_scaling": LLAMA["rope_scaling"] | {"type": "yarn"}}, "rope_scaling=.*not supported"),
    ("Llama-3.2-1B", {"rope_parameters": LLAMA["rope_scaling"]}, "rope_scaling and rope_parameters differ"),
    ("Qwen2.5-0.5B", {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
     "rope_scaling=.*another kind than llama3.*not supported"),
    ("Qwen2.5-0.5B", {"dual_chunk_attention_config": {"chunk_size": 262144}}, "dual_chunk_attention.* not known"),
    ("SmolLM3-3B", {"no_rope_layers": [1, 0]}, r"no_rope_layers=\[1, 0\] needs one entry for each of the 36 layers"),
    ("SmolLM3-3B", {"no_rope_layers": "all"}, "no_rope_layers='all' is of the wrong type"),
    ("SmolLM3-3B", {"no_rope_layers": None, "no_rope_layer_interval": 0}, r"interval that is positive \(0\)"),
    ("Llama-3.2-1B", {"no_rope_layers": [1] * 16}, "no_rope_layers=.*not known here and may change the forward pass"),
    ("Qwen2.5-0.5B", {"attention_bias": True}, "attention_bias=True is not known here"),
], ids=str)
def test_settings_that_do_not_fit_are_refused_by_name(name, changes, message):
    with pytest.raises(UserError, match="^config.json: .*" + message):
        read(name, **changes)


def test_qwens_window_is_off_unless_it_is_switched_on():
    for name in ("Qwen2.5-0.5B", "Qwen3-0.6B", "SmolLM3-3B"):
        hf = {key: value for key, value in PUBLISHED[name][0].items() if key != "use_sliding_window"}
        assert config_from_hf(hf | {"sliding_window": 16}).n_ctx > 16


def test_no_rope_layers_by_interval():
    for given, want in (({"no_rope_layers": None}, range(3, 36, 4)),
                        ({"no_rope_layers": None, "no_rope_layer_interval": 6}, range(5, 36, 6))):
        assert read("SmolLM3-3B", **given).no_rope == list(want)
    assert read("SmolLM3-3B", no_rope_layers=[1] * 40).no_rope is None


@pytest.mark.parametrize("changes, message", [
    ({"no_rope": [6]}, r"no_rope=\[6\] names depths that the 6 layers do not have"), ({"no_rope": []}, "wrong type"),
    ({"rope_llama3": [8.0, 1.0, 4.0]}, "must be four positive numbers")], ids=str)
def test_a_config_that_makes_no_model(changes, message):
    with pytest.raises(UserError, match=message):
        Config(n_layer=6, **changes)


@pytest.mark.parametrize("changes, lost", [
    ({"qk_norm": True}, "qk_norm=True"), ({"no_rope": [1]}, r"no_rope=\[1\]"),
    ({"attn_bias": True, "o_bias": False}, "o_bias=False")], ids=str)
def test_what_a_class_of_transformers_lacks_is_not_exported_to_it(changes, lost, tmp_path):
    with pytest.raises(UserError, match=f"transformers' llama cannot have {lost}: this model has no Hugging"):
        to_hf(tiny("llama", **changes), tmp_path / "out")


def test_an_unrotated_export_without_a_donors_flags(tmp_path):
    """The unrolled model of other depths than its donor's: the flags that are written are the model's own."""
    full = load_full_of("smollm3", tmp_path)
    full.config.no_rope = [0, 2]
    to_hf(full, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["no_rope_layers"] == [0, 1, 0, 1]
    assert_same(from_hf(tmp_path / "out"), full)


def load_full_of(case, tmp_path):
    hf_model(case).save_pretrained(tmp_path / "donor")
    return randomise(load_full(tmp_path / "donor"))
