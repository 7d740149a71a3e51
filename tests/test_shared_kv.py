"""kv="first_loop": every loop reads the keys and values of the first."""

import json
import math
import random
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_engine import Case, draw_model
from test_model import ARCHS, SMALL, close, each_arch, last, randomise, tiny, tokens
from tiny import assert_same_weights, run
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import convert
import train
from calibrate import absorb_norms, norm_scale, to_calibrated
from convert import load_full, to_hf, to_recursive, unroll
from engine import Engine
from evaluation import perplexity
from exits import Rule, apply_rule, collect_exit_stats, decode, oracle_exits, run_exits
from lib.checkpoint import check_donor, resumed_settings
from lib.cli import UserError
from lib.tokenizer import Tokenizer, copy_tokenizer
from model import Config, FirstLoopKV, KVCache, RecursiveTransformer

each_shape = pytest.mark.parametrize("n_loop, rank, vectors", [(2, 0, "tied"), (2, 3, "tied"), (3, 2, "per_loop"),
                                                               (3, 0, "per_loop")])


def shared(arch, n_loop=2, seed=0, **changes):
    torch.manual_seed(seed)
    return randomise(RecursiveTransformer(Config(**SMALL | ARCHS[arch] | {"n_loop": n_loop, "kv": "first_loop"}
                                                 | changes))).double()


# ---------------------------------------------------------------------------------------------------------------------
# The forward pass

def reference(model, idx):
    """States after each loop for one sequence idx (T,), written out: one head and one position at a time."""
    c, w = model.config, model.state_dict()
    group, n = c.n_head // c.n_kv_head, c.n_layer // c.n_loop

    def linear(name, x, loop):
        weight, y = w[f"{name}.weight"], 0.0
        if f"{name}.lora_a" in w:
            weight = weight + w[f"{name}.lora_b"][loop] @ w[f"{name}.lora_a"][loop]
        if f"{name}.bias" in w:
            y = w[f"{name}.bias"] if c.vectors == "tied" else w[f"{name}.bias"][loop]
        return x @ weight.T + y

    def norm(name, x, loop):
        if f"{name}.weight" not in w:                        # q and k have norms in Qwen 3 alone
            return x
        scale, bias = w[f"{name}.weight"], w.get(f"{name}.bias", torch.zeros(1).double())
        scale, bias = (v[loop] if v.dim() == 2 else v for v in (scale, bias))
        if c.arch == "gpt_neox":
            x = x - x.mean(-1, keepdim=True)
        y = x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt()
        return y * (scale + (1.0 if c.arch == "gemma" else 0.0)) + bias

    def rotated(x, t, i):
        half = int(c.head_dim * c.rotary_pct) // 2
        freq = 1.0 / c.rope_theta ** (torch.arange(half) / half)
        if c.rope_llama3:
            factor, low, high, n_ctx = c.rope_llama3
            turns = n_ctx / (2 * math.pi / freq)             # in the original context; rounded as ours
            share = (turns - low) / (high - low)
            mixed = (1 - share) * freq / factor + share * freq
            freq = torch.where(turns < low, freq / factor, torch.where(turns > high, freq, mixed))
        angle = (torch.tensor(float(t)) * freq * (i not in (c.no_rope or ()))).double()  # all loops as the first
        a, b, rest = x[:half], x[half:2 * half], x[2 * half:]
        cos, sin = angle.float().cos().double(), angle.float().sin().double()
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest])

    def heads(x, n_heads):
        return x.view(len(x), n_heads, c.head_dim)

    x, states, keys, values = w["embed.weight"][idx], [], {}, {}
    if c.arch == "gemma":
        x = x * c.n_embd**0.5
    for loop in range(c.n_loop):
        for i in range(n):
            at, h = f"layers.{i}.attn", norm(f"layers.{i}.norm1", x, loop)
            q = norm(f"{at}.q_norm", heads(linear(f"{at}.q", h, loop), c.n_head), loop)
            if loop == 0:
                keys[i] = norm(f"{at}.k_norm", heads(linear(f"{at}.k", h, 0), c.n_kv_head), 0)
                values[i] = heads(linear(f"{at}.v", h, 0), c.n_kv_head)
            y = torch.zeros_like(q)
            for head in range(c.n_head):
                for t in range(len(x)):
                    scores = torch.stack([rotated(q[t, head], t, i) @ rotated(keys[i][s, head // group], s, i)
                                          for s in range(t + 1)]) / c.head_dim**0.5
                    y[t, head] = scores.softmax(0) @ values[i][:t + 1, head // group]
            y = x + linear(f"{at}.o", y.flatten(1), loop)
            h, mlp = norm(f"layers.{i}.norm2", x if c.parallel else y, loop), f"layers.{i}.mlp"
            up = linear(f"{mlp}.up", h, loop)
            if c.arch == "gpt_neox":
                up = F.gelu(up)
            else:
                gate = linear(f"{mlp}.gate", h, loop)
                up = (F.gelu(gate, approximate="tanh") if c.arch == "gemma" else F.silu(gate)) * up
            x = y + linear(f"{mlp}.down", up, loop)
        states.append(x)
    return states


@each_arch
@each_shape
@pytest.mark.parametrize("no_rope", [None, [0, 3]])          # in three loops, 3 is the second layer's second depth
@torch.no_grad()
def test_states_are_those_written_out(arch, n_loop, rank, vectors, no_rope):
    model, idx = shared(arch, n_loop, rank=rank, vectors=vectors, no_rope=no_rope), tokens(2, 7)
    states = model(idx)
    for row in range(2):
        for ours, want in zip(states, reference(model, idx[row]), strict=True):
            close(ours[row], want, 1e-10)


@each_arch
@each_shape
@torch.no_grad()
def test_cached_states_are_those_of_the_full_forward(arch, n_loop, rank, vectors):
    """For chunks of several tokens and of one, on a cache of n_unique layers."""
    model, idx = shared(arch, n_loop, rank=rank, vectors=vectors), tokens(3, 13)
    cache = KVCache(model.config, batch=3, max_len=13, dtype=torch.float64)
    assert cache.k.shape[0] == cache.v.shape[0] == model.config.n_unique == 6 // n_loop
    parts = [model(chunk, cache) for chunk in idx.split([5, 4, 1, 2, 1], dim=1)]
    for loop, want in enumerate(model(idx)):
        close(torch.cat([p[loop] for p in parts], dim=1), want, 1e-10)
    assert cache.lengths == [13]
    with pytest.raises(UserError, match="14 tokens do not fit a cache made for 13"):
        model(tokens(3, 1), cache)


@each_arch
def test_gradients_are_the_same_with_checkpointing(arch):
    """And those of the written-out model: the first loop's keys and values get the gradients of all loops."""
    model, idx = shared(arch, 3, rank=2), tokens(1, 5)

    def gradients(states):
        sum(x.square().mean() for x in states).backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    plain = gradients(model(idx))
    model.checkpointing = True
    checkpointed = gradients(model(idx))
    model.checkpointing = False
    state_dict = dict(model.named_parameters())
    model.state_dict = lambda: state_dict                    # with gradients
    written_out = gradients(reference(model, idx[0]))
    assert plain.keys() == checkpointed.keys() == written_out.keys() >= {"layers.0.attn.k.lora_a"}
    for name, want in plain.items():
        assert torch.equal(checkpointed[name], want), name
        close(written_out[name], want, 1e-8)


def test_a_loop_alone_needs_the_first_loops_keys():
    model = shared("llama")
    x = model.first_state(tokens(1, 3))
    with pytest.raises(AssertionError, match="first_loop"):
        model.block(x, 1)


# ---------------------------------------------------------------------------------------------------------------------
# What is stored and what it costs

@each_arch
@each_shape
def test_counts(arch, n_loop, rank, vectors):
    """Of k and v, one loop's LoRA and biases are stored, and they run once."""
    model, own = shared(arch, n_loop, rank=rank, vectors=vectors), shared(arch, n_loop, rank=rank, vectors=vectors,
                                                                          kv="own")
    c, n, o = model.config, model.num_params(), own.num_params()
    assert n["stored"] == sum(p.numel() for p in model.parameters())
    per_loop = per_run = 0                                   # of one layer's k and v
    for kind in ("k", "v"):
        linear = model.layers[0].attn.get_submodule(kind)
        d_out, d_in = linear.weight.shape
        if rank:
            assert linear.lora_a.shape == (1, rank, d_in) and linear.lora_b.shape == (1, d_out, rank)
        lora, bias = rank * (d_in + d_out), d_out * c.attn_bias
        per_loop += lora + bias * (vectors == "per_loop")
        per_run += d_in * d_out + lora + bias
    per_loop += c.qk_norm * c.head_dim * (vectors == "per_loop")         # k's norm
    per_run += c.qk_norm * c.head_dim
    skipped = c.n_unique * (n_loop - 1)
    assert o["stored"] - n["stored"] == o["stored_block"] - n["stored_block"] == skipped * per_loop
    assert o["run"] - n["run"] == o["run_block"] - n["run_block"] == skipped * per_run


@each_arch
@pytest.mark.parametrize("n_loop", [2, 3])
def test_flops_are_those_of_the_operations(arch, n_loop):
    model, (B, T) = shared(arch, n_loop), (2, 11)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        last(model, tokens(B, T))
    c = model.config
    needless = 4 * c.n_layer * c.n_head * c.head_dim * B * T * (T - 1) // 2     # keys that lie after their query
    assert B * T * model.flops(T) == counter.get_total_flops() - needless


@each_arch
@pytest.mark.parametrize("vectors", ["tied", "per_loop"])
def test_save_and_load(arch, vectors, tmp_path):
    model = shared(arch, 3, rank=2, vectors=vectors)
    model.save(tmp_path)
    loaded = RecursiveTransformer.load(tmp_path)
    assert loaded.config == model.config and loaded.config.kv == "first_loop"
    assert all(torch.equal(w, loaded.state_dict()[name]) for name, w in model.state_dict().items())
    close(last(loaded, tokens(2, 5)), last(model, tokens(2, 5)), 1e-12)


def test_a_checkpoint_without_the_setting_has_keys_of_its_own(tmp_path):
    model = shared("llama", kv="own")
    model.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("kv") == "own"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert RecursiveTransformer.load(tmp_path).config == model.config


@pytest.mark.parametrize("changes, message", [
    ({"n_loop": 1}, "kv=first_loop lets later loops read .* use kv=own, or 2 loops or more"),
    ({"kv": "last_loop"}, "kv='last_loop' is unknown; use one of own, first_loop")])
def test_settings_that_make_no_model(changes, message):
    with pytest.raises(UserError, match=message):
        shared("llama", **changes)


# ---------------------------------------------------------------------------------------------------------------------
# Early exits: no token that exits leaves a gap

class RandomExits:
    """A rule that lets each token exit by chance, for a schedule that no state explains."""
    reads_logits, name = False, "random"

    def __init__(self, seed, p=0.5):
        self.draw, self.p = torch.Generator().manual_seed(seed), p

    def __call__(self, x, loop, logits=None):
        return torch.rand(x.shape[:-1], generator=self.draw) < self.p


def record_blocks(model):
    """The (loop, number of tokens) of each call of model.block, which go on being recorded."""
    calls, block = [], model.block
    model.block = lambda x, loop, cache=None: calls.append((loop, x.size(-2))) or block(x, loop, cache)
    return calls


def record_greedy(seen, logits):
    seen.append(logits)
    return logits.argmax(-1)


@each_arch
@pytest.mark.parametrize("n_loop, batch", [(2, 1), (3, 1), (2, 3), (3, 4)])
@torch.no_grad()
def test_decoding_with_random_exits_is_the_full_forward_at_every_step(arch, n_loop, batch):
    for seed in range(5):
        model, prompt, seen = shared(arch, n_loop, seed, rank=2), tokens(batch, 4 + seed), []
        calls = record_blocks(model)
        steps = list(decode(model, prompt, 12, RandomExits(seed), sampler=partial(record_greedy, seen)))
        new, exit_loop = (torch.stack(column, dim=1) for column in zip(*steps, strict=True))     # (B, 12)
        assert (exit_loop[:, 0] == n_loop - 1).all() and len(set(exit_loop.flatten().tolist())) == n_loop
        runs = [(0, prompt.size(1))] + [(loop, 1) for loop in range(1, n_loop)]                  # the prompt's
        runs += [(loop, 1) for last_exit in exit_loop[:, 1:].amax(0) for loop in range(last_exit + 1)]
        assert calls == runs
        states = torch.stack(model(torch.cat([prompt, new], dim=1)))                             # (n_loop, B, n, C)
        for step, logits in enumerate(seen):
            at = states[exit_loop[:, step], torch.arange(batch), prompt.size(1) - 1 + step]      # (B, C)
            close(logits, model.logits(at), 1e-10)
            assert torch.equal(logits.argmax(-1), new[:, step])


@each_arch
@torch.no_grad()
def test_exits_of_a_whole_text_are_those_of_the_full_forward(arch):
    """run_exits, the oracle, the statistics, and a rule from them or run anew."""
    model, idx = shared(arch, 3, rank=2), tokens(4, 9)
    states = torch.stack(model(idx))                                     # (n_loop, B, T, C)
    x, exit_loop = run_exits(model, idx, RandomExits(1))
    assert exit_loop.unique().tolist() == [0, 1, 2]
    rows, positions = torch.arange(4)[:, None], torch.arange(9)
    assert torch.equal(x, states[exit_loop, rows, positions])
    token = model.logits(states).argmax(-1)
    assert torch.equal(oracle_exits(model, idx), (token == token[-1]).int().argmax(0))

    pairs, rule = [(idx[:, :-1], idx[:, 1:])], Rule("max_prob")
    stats = collect_exit_stats(model, pairs, [rule])
    rule.threshold = stats.scores["max_prob"].median().item()
    assert torch.equal(stats.token, token[:, :, :-1].flatten(1))
    from_stats = apply_rule(model, pairs, stats, rule)
    run_anew = apply_rule(model, pairs, replace(stats, scores={}), rule)
    assert len(from_stats.exit_loop.unique()) > 1
    assert torch.equal(from_stats.exit_loop, run_anew.exit_loop) and torch.equal(from_stats.token, run_anew.token)


@torch.no_grad()
def test_copies_are_refused():
    model = shared("llama")
    for use in (lambda: list(decode(model, tokens(1, 3), 2, Rule("fixed"), keys="copy")),
                lambda: run_exits(model, tokens(1, 3), Rule("fixed"), keys="copy"),
                lambda: Engine(model, slots=2, keys="copy")):
        with pytest.raises(UserError, match="kv=first_loop.*use keys='exact'"):
            use()


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("seed", range(30))
@torch.no_grad()
def test_the_engine_is_sequential_decoding_under_random_schedules(seed, static):
    """Ragged prompts, exits by plan or by a rule, requests that arrive and are cancelled in between; without ghosts,
    and each position of the cache holds the first loop's keys of its own token."""
    rng, n_loop = random.Random(seed), 2 + seed % 2
    model = draw_model(seed, n_loop, list(ARCHS)[seed % len(ARCHS)], rank=(0, 2)[seed % 4 > 1], n_layer=2 * n_loop,
                       vectors=("tied", "per_loop")[seed % 5 > 2], kv="first_loop", no_rope=[0] if seed % 2 else None)
    rule = Rule(("never", "fixed", "max_prob")[seed % 3], threshold=0.3, exit_loop=rng.randrange(n_loop))
    case, slots = Case(model, rule), rng.randint(1, 6)
    engine = case.engine(slots, static=static, head=rng.choice([1, rng.randint(0, slots)]),
                         refill=rng.choice([1, rng.randint(1, slots)]))
    assert engine.cache.k.shape[2] == 1 and engine.n_ghosts == 0
    requests = []
    while len(requests) < 12 or engine.waiting or any(engine.slot_request):
        while len(requests) < 12 and rng.random() < 0.6:
            forced = [rng.randrange(n_loop) for _ in range(rng.randint(1, 8))] if rng.random() < 0.5 else None
            prompt = [rng.randrange(53) for _ in range(rng.randint(1, 9))]
            requests.append(engine.add(prompt, rng.randint(1, 9), None, forced))
        engine.step()
        if rng.random() < 0.05 and requests:
            engine.cancel(rng.choice(requests))
        for slot, request in enumerate(engine.slot_request):
            pos = engine.state.pos[slot] if request else 0
            if request and len(request.tokens) > 1 and not static:
                idx = torch.tensor([request.prompt + request.tokens])[:, :pos]
                cache = KVCache(model.config, 1, idx.size(1), dtype=torch.float64)
                model(idx, cache)
                close(engine.cache.k[:, slot, 0, :pos].transpose(1, 2), cache.k[:, 0], 1e-10)
    for request in requests:
        case.check(request)
    assert engine.ran[1] == 0 and any(request.status == "done" for request in requests)


@torch.no_grad()
def test_the_engine_runs_later_loops_for_the_last_token_of_a_prompt():
    model = draw_model(0, 3, kv="first_loop")
    calls = record_blocks(model)
    Engine(model, slots=2, max_len=16).generate([[1, 2, 3], [4, 5, 6, 7, 8]], 1)
    assert calls == [(0, 5), (1, 2), (2, 2)]                             # 2 x 5 tokens with padding, then 2


# ---------------------------------------------------------------------------------------------------------------------
# Conversion

def donor_with_shared_keys(full, n_loop, idx):
    """The last states of a full-size model whose layers read the keys and values that their first loop computed."""
    n = full.config.n_layer // n_loop
    kv, x = FirstLoopKV(replace(full.config, n_layer=n), idx.size(1), idx.device), full.first_state(idx)
    shape, x = x.shape, x.flatten(0, 1)
    for depth, layer in enumerate(full.layers):
        x = layer(x, kv.rope, depth // n, depth % n, kv)
    return x.view(shape)


@each_arch
@pytest.mark.parametrize("n_loop", [2, 3])
@torch.no_grad()
def test_full_rank_is_the_donor_with_shared_keys(arch, n_loop):
    """Also the calibrated one; biases and the norms of q and k are needed per loop."""
    full, idx = tiny(arch).double(), tokens(2, 9)
    want = full.logits(donor_with_shared_keys(full, n_loop, idx))
    model = to_recursive(full, n_loop, "average", 1000, vectors="per_loop", kv="first_loop")
    assert model.config.kv == "first_loop" and model.layers[0].attn.k.lora_a.shape[0] == 1
    close(last(model, idx), want, 2e-4)                                  # the SVD is in fp32
    vectors = "per_loop" if full.config.attn_bias or full.config.qk_norm else "tied"
    model = to_calibrated(full, list(tokens(12, 60).split(4)), n_loop, 1000, vectors, kv="first_loop")
    close(last(model, idx), want, 1e-9)
    assert (last(full, idx) - want).abs().max() > 0.1                    # the donor itself computes something else


@each_arch
@pytest.mark.parametrize("vectors", ["tied", "per_loop"])
@torch.no_grad()
def test_keys_start_as_the_other_layers_with_the_lora_of_the_first_loop(arch, vectors):
    full = tiny(arch, seed=1)
    own = to_recursive(full, 3, "average", 2, vectors=vectors)
    model = to_recursive(full, 3, "average", 2, vectors=vectors, kv="first_loop")
    want, rest = own.state_dict(), model.state_dict()
    for name, w in rest.items():
        stacked = any(f".attn.{kind}." in name for kind in ("k", "v", "k_norm"))
        stacked &= "lora_" in name or (("bias" in name or "norm" in name) and vectors == "per_loop")
        assert torch.equal(w, want[name][:1] if stacked else want[name]), name
    assert want.keys() == rest.keys()


@pytest.mark.parametrize("vectors", ["tied", "per_loop"])
@torch.no_grad()
def test_calibrated_keys_are_the_donors_and_their_lora_can_learn(vectors):
    full = tiny("llama")
    model = to_calibrated(full, list(tokens(12, 60).split(4)), 2, 3, vectors, kv="first_loop")
    for i, layer in enumerate(model.layers):
        donor, scale = absorb_norms(full.layers[i]), norm_scale(layer.norm1).view(-1, SMALL["n_embd"])[0]
        for kind in ("k", "v"):
            linear = layer.attn.get_submodule(kind)
            close(linear.weight * scale, donor.attn.get_submodule(kind).weight, 1e-5)
            assert not linear.lora_b.any() and linear.lora_a.std() > 0.5 / SMALL["n_embd"]**0.5


@torch.no_grad()
def test_no_full_size_form(tmp_path):
    model = shared("llama")
    for export in (lambda: unroll(model), lambda: to_hf(model, tmp_path / "out")):
        with pytest.raises(UserError, match=r"kv=first_loop.*own input.*convert the donor with --kv=own"):
            export()
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The command lines

def test_convert(home, tmp_path):
    convert.main([f"--donor={home}/donor", f"--out={tmp_path}/out", "--init=average", "--rank=2", "--kv=first_loop"])
    want = to_recursive(load_full(home / "donor"), 2, "average", 2, kv="first_loop")
    have = RecursiveTransformer.load(tmp_path / "out")
    assert have.config == want.config and have.config.kv == "first_loop"
    assert all(torch.equal(w, have.state_dict()[name]) for name, w in want.state_dict().items())
    with pytest.raises(UserError, match="--kv=first_loop has no effect, since --unroll only exports"):
        convert.main([f"--donor={tmp_path}/out", f"--out={tmp_path}/full", "--unroll", "--kv=first_loop"])
    with pytest.raises(UserError, match="no full-size form"):
        convert.main([f"--donor={tmp_path}/out", f"--out={tmp_path}/full", "--unroll"])


def test_evaluation_by_default_leaves_copies_out(home, tmp_path, capsys):
    to_recursive(load_full(home / "donor"), 2, kv="first_loop").save(tmp_path)
    copy_tokenizer(home / "donor", tmp_path)
    flags = [f"--ckpt={tmp_path}", f"--text={home}/valid.txt", "--tokens=512", "--seq_len=32", "--rules=max_prob"]
    perplexity.main(flags)
    assert {row["keys"] for row in json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]} == {"exact"}
    with pytest.raises(UserError, match="kv=first_loop.*use keys='exact'"):
        perplexity.main([*flags, "--keys=copy"])


@pytest.mark.parametrize("init", ["stepwise", "calibrated"])
def test_train(init, home, tmp_path):
    """The loss falls, memory may be saved, and the result decodes."""
    more = ["--rank=2", "--kv=first_loop", "--exit_loss=weighted", f"--init={init}"]
    log = run(home, tmp_path / "out", *more)
    assert log[-1]["full_val_loss"] < log[0]["full_val_loss"]
    run(home, tmp_path / "checkpointed", *more, "--checkpointing")
    assert_same_weights(tmp_path / "out", tmp_path / "checkpointed")
    model = RecursiveTransformer.load(tmp_path / "out")
    assert model.config.kv == "first_loop" and model.layers[0].attn.v.lora_a.shape[0] == 1
    assert len(list(decode(model, torch.tensor([[1, 2, 3]]), 5, Rule("fixed")))) == 5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_in_ddp(checkpointing, tmp_path):
    """Each weight is used in every loop, and is ready once."""
    model, idx = shared("llama", 3, rank=2), tokens(2, 7)
    objective = train.Objective(model, train.TrainConfig(exit_loss="weighted", distill="none"))

    def gradients(objective):
        objective(idx, idx.roll(-1, 1), None)[0].backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        return found

    want = gradients(objective)
    model.checkpointing = checkpointing
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        have = gradients(torch.nn.parallel.DistributedDataParallel(objective))
    finally:
        torch.distributed.destroy_process_group()
    for name, grad in want.items():
        close(have[name], grad, 1e-12)


@pytest.mark.parametrize("more, message", [
    (["--loops=1", "--kv=first_loop"], "kv=first_loop lets later loops read"),
    (["--init=scratch", "--kv=first_loop"], "--kv=first_loop says how a donor is converted")])
def test_training_settings_that_do_not_fit(home, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        run(home, tmp_path / "out", *more)


def test_a_run_from_before_the_setting_is_resumed(home, tmp_path):
    more = ["--tokens=512"]
    run(home, tmp_path / "out", *more)
    state = torch.load(tmp_path / "out/train.pt")
    assert state["args"].pop("kv") == state["history"]["donor_config"].pop("kv") == "own"
    assert resumed_settings([f"--out={tmp_path}/out"], train.TrainConfig(), state).kv == "own"
    config = RecursiveTransformer.load(tmp_path / "out").config
    donor = replace(config, n_loop=1)
    check_donor(train.TrainConfig(), state["history"], donor.architecture(),
                Tokenizer.load(home / "donor", donor.vocab_size))
