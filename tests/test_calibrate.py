"""Calibrated conversion: each closed form against a numerical solver, exact limits, the command line."""

import copy
import itertools
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_convert import hf_folder
from test_model import close, each_arch, last, tiny, tokens
from tiny import home, run, story  # noqa: F401 (a fixture)

import calibrate
import convert
from calibrate import (
    absorb_norms,
    balanced,
    calibration_windows,
    collect_stats,
    fit,
    fit_linear,
    norm_scale,
    share_norm_scale,
    to_calibrated,
)
from convert import load_full, svd_factors, unroll
from experiments import calibrated as starts
from experiments import calibrated_cost
from experiments.low_rank import to_low_rank, weighted_svds
from lib.cli import UserError
from lib.data import Tokens, batch, load_tokens, write_shards
from lib.tokenizer import Tokenizer
from model import Config, RecursiveTransformer, RelaxedLinear, rope_angles

each_rank = pytest.mark.parametrize("rank", [0, 3, 1000])
each_shape = pytest.mark.parametrize("shape", [(9, 14), (14, 9)], ids=["wide", "tall"])


def problem(shape, n_loop=2, tokens=40, biased=False):
    """(W_l, X_l (tokens, in), C_l) of different weights, and inputs far from white."""
    torch.manual_seed(0)
    Ws = [torch.randn(shape, dtype=torch.float64) for _ in range(n_loop)]
    Xs = [torch.randn(tokens, shape[1], dtype=torch.float64) @ torch.randn(shape[1], shape[1], dtype=torch.float64) + 1
          for _ in range(n_loop)]
    if biased:
        Xs = [torch.cat([X[:, :-1], torch.ones(tokens, 1)], dim=1) for X in Xs]
    return Ws, Xs, [X.T @ X / tokens for X in Xs]


def error(Ws, Xs, W, factors):
    """(C1), from the outputs themselves."""
    factors = factors or [(torch.zeros(1, W.size(1)), torch.zeros(W.size(0), 1))] * len(Ws)
    wide = [torch.nn.functional.pad(a.double(), (0, W.size(1) - a.size(1))) for a, _ in factors]  # no LoRA on a bias
    wrong = [X @ (V - W - b.double() @ a).T for V, X, a, (_, b) in zip(Ws, Xs, wide, factors, strict=True)]
    return (sum(y.square().sum() for y in wrong) / sum((X @ V.T).square().sum() for V, X in zip(Ws, Xs, strict=True)))


# ---------------------------------------------------------------------------------------------------------------------
# Closed forms

@each_shape
@pytest.mark.parametrize("biased", [False, True])
def test_weighted_tying_is_least_squares(shape, biased):
    Ws, Xs, Cs = problem(shape, 3, biased=biased)
    W, factors, errors = fit(Ws, Cs, 0, biased=biased)
    want = torch.linalg.lstsq(torch.cat(Xs), torch.cat([X @ V.T for V, X in zip(Ws, Xs, strict=True)])).solution.T
    close(W, want, 1e-7)
    assert factors == [] and errors == pytest.approx([error(Ws, Xs, W, []).item()])


@each_shape
@pytest.mark.parametrize("biased", [False, True])
def test_weighted_svd_keeps_the_largest_singular_values_of_the_outputs(shape, biased):
    """With a bias: of the outputs that the inputs without it can produce. The rest is out of a LoRA's reach."""
    Ws, Xs, Cs = problem(shape, biased=biased)
    d = shape[1] - biased
    W, factors, errors = fit(Ws, Cs, 3, biased=biased)
    for V, X, (a, b), C in zip(Ws, Xs, factors, Cs, strict=True):
        y, q = X @ (V - W).T, torch.linalg.qr(X[:, :d])[0]
        best = (y - q @ (q.T @ y)).square().sum() + torch.linalg.svdvals(q.T @ y)[3:].square().sum()
        assert (y - X[:, :d] @ (b @ a).T).square().sum().item() == pytest.approx(best.item())
        close(a @ C[:d, :d] @ a.T, torch.eye(3, dtype=torch.float64), 1e-8)
    assert errors == pytest.approx([error(Ws, Xs, W, factors).item()])


@each_shape
@pytest.mark.parametrize("biased", [False, True])
def test_tying_again_is_what_descent_on_the_error_finds(shape, biased):
    """W' and all B together, given A: from far away, Newton-like steps on (C1) end at the same error."""
    Ws, Xs, Cs = problem(shape, biased=biased)
    W, factors, errors = fit(Ws, Cs, 2, rounds=3, biased=biased)
    free = [torch.randn_like(W), *(torch.randn_like(b) for _, b in factors)]
    for p in free:
        p.requires_grad_()
    descent = torch.optim.LBFGS(free, max_iter=3000, tolerance_grad=1e-13, tolerance_change=0,
                                line_search_fn="strong_wolfe")

    def step():
        descent.zero_grad()
        loss = error(Ws, Xs, free[0], [(a, b) for (a, _), b in zip(factors, free[1:], strict=True)])
        loss.backward()
        return loss
    descent.step(step)
    assert step().item() == pytest.approx(errors[-1], rel=1e-6)


@each_shape
@pytest.mark.parametrize("n_loop, rank, biased", [(2, 1, False), (2, 3, True), (3, 2, False), (3, 6, True),
                                                  (2, 99, False)])
def test_the_error_never_rises_and_is_that_of_the_outputs(shape, n_loop, rank, biased):
    Ws, Xs, Cs = problem(shape, n_loop, biased=biased)
    W, factors, errors = fit(Ws, Cs, rank, rounds=8, biased=biased)
    assert len(errors) == 9 or errors[-1] > errors[-2] - 1e-12           # all rounds, or no more gain
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(errors))
    assert errors[-1] == pytest.approx(error(Ws, Xs, W, factors).item(), rel=1e-5, abs=1e-12)
    assert errors[-1] < 0.9 * errors[0] or rank == 99
    if errors[0] < 1e-12:                                                # full rank: only rounding, which may differ
        return
    capped = fit(Ws, Cs, rank, rounds=8, stop=0.2, biased=biased)[2]     # ends where a round brings less than a fifth
    assert capped == errors[:len(capped)] and len(capped) < 9 and capped[-2] - capped[-1] <= max(0.2 * capped[-2], 0)


@each_shape
def test_white_inputs_give_average_and_the_plain_svd(shape):
    Ws, _, _ = problem(shape)
    W, factors, _ = fit(Ws, [torch.eye(shape[1], dtype=torch.float64)] * 2, 3)
    close(W, (Ws[0] + Ws[1]) / 2, 1e-9)
    again = fit(Ws, [torch.eye(shape[1], dtype=torch.float64)] * 2, 3, rounds=2)[0]
    close(again, W, 1e-9)                                                # both LoRAs read the same inputs
    for V, factor in zip(Ws, factors, strict=True):
        want_a, want_b = svd_factors(V - W, 3)
        a, b = balanced(*factor)
        close(b @ a, (want_b @ want_a).double(), 1e-5)
        S = want_b.norm(dim=0).double()                                  # the paper has all of it in B
        close(b.T @ b, S.diag(), 1e-5)
        close(a @ a.T, S.diag(), 1e-5)


def test_a_direction_without_residual_can_still_learn():
    torch.manual_seed(0)
    a, b = balanced(torch.cat([torch.randn(2, 9), torch.zeros(2, 9)]), torch.randn(7, 4))
    assert (b[:, 2:] == 0).all() and (b[:, :2] != 0).any() and (a != 0).all()
    assert 0.5 < a[2:].norm(dim=1).mean() < 2


@each_shape
@torch.no_grad()
def test_outputs_count_by_their_gradients(shape):
    """(C1) with D: the start by singular values, then as low as descent on W', A and B together gets."""
    Ws, _, Cs = problem(shape)
    gs = [torch.randn(50, shape[0], dtype=torch.float64) * torch.linspace(1, scale, shape[0]) for scale in (9, 20)]
    Gs = [g.square().mean(0) for g in gs]
    weights = [G.sum() for G in Gs]
    root, config = sum(Gs).sqrt().diag(), Config(n_loop=2, n_layer=2, rank=3)

    def left(W, factors):
        return sum(w * (root @ (V - W - b @ a) @ torch.linalg.cholesky(C)).square().sum()
                   for V, C, (a, b), w in zip(Ws, Cs, factors, weights, strict=True))

    def fitted(rounds, rank=3):
        linear = RelaxedLinear(shape[1], shape[0], replace(config, rank=rank)).double()
        donors = [RelaxedLinear(shape[1], shape[0], replace(config, rank=0)).double() for _ in Ws]
        for donor, W in zip(donors, Ws, strict=True):
            donor.weight.copy_(W)
        errors = fit_linear(linear, donors, [(C, C[0]) for C in Cs], Gs, 1.0, rounds, 0.0, 0.0)
        return linear.weight.data, [(linear.lora_a[i], linear.lora_b[i]) for i in range(2)] if rank else None, errors
    tied, _, _ = fitted(0, rank=0)
    C = [w * C for C, w in zip(Cs, weights, strict=True)]
    close(tied, (Ws[0] @ C[0] + Ws[1] @ C[1]) @ torch.linalg.inv(C[0] + C[1]), 1e-5)
    tail = sum(w * torch.linalg.svdvals(root @ (V - tied) @ torch.linalg.cholesky(C))[3:].square().sum()
               for V, C, w in zip(Ws, Cs, weights, strict=True))
    W, factors, errors = fitted(0)
    assert left(W, factors).item() == pytest.approx(tail.item(), rel=1e-6)
    energy = left(torch.zeros_like(W), [(torch.zeros(1, shape[1]).double(), torch.zeros(shape[0], 1).double())] * 2)
    assert errors[-1] == pytest.approx((tail / energy).item(), rel=1e-5)
    W, factors, errors = fitted(400)
    assert errors[-1] == pytest.approx((left(W, factors) / energy).item(), rel=1e-5)
    inverse = [torch.linalg.inv(torch.linalg.cholesky(C)) for C in Cs]   # descent finds white inputs easy
    white = [a @ i.inverse() for (a, _), i in zip(factors, inverse, strict=True)]
    free = [p.clone().requires_grad_() for p in (W, *(b for _, b in factors), *white)]
    descent = torch.optim.LBFGS(free, max_iter=500, tolerance_grad=1e-13, line_search_fn="strong_wolfe")

    @torch.enable_grad()
    def step():
        descent.zero_grad()
        loss = left(free[0], [(free[3] @ inverse[0], free[1]), (free[4] @ inverse[1], free[2])])
        loss.backward()
        return loss
    first = descent.step(step).item()
    assert first == pytest.approx(left(W, factors).item()) and step().item() > 0.95 * first


# ---------------------------------------------------------------------------------------------------------------------
# The donor's inputs and gradients

def absorbed(full):
    biased, new = full.config.arch == "gpt_neox", copy.deepcopy(full)
    new.config = replace(full.config, attn_bias=biased, mlp_bias=biased)
    new.layers = torch.nn.ModuleList(absorb_norms(layer) for layer in full.layers)
    return new


@each_arch
@pytest.mark.parametrize("attn_bias", [True, False])
def test_absorbed_norms_change_nothing(arch, attn_bias):
    full, idx = tiny(arch, **({"attn_bias": attn_bias} if arch == "gpt_neox" else {})).double(), tokens(2, 9)
    new = absorbed(full)
    close(last(new, idx), last(full, idx), 1e-12)
    for layer in new.layers:
        for norm in (layer.norm1, layer.norm2):
            assert (norm.weight == (0 if arch == "gemma" else 1)).all()
            assert norm.bias is None or not norm.bias.any()


@torch.enable_grad()
def watched(full, idx):
    """Linear layer -> (its inputs (tokens, in), the loss' gradients at its outputs (tokens, out)), norms absorbed."""
    donor, inputs, outputs = absorbed(full), {}, {}
    for name, module in donor.named_modules():
        if hasattr(module, "rank"):
            module.register_forward_pre_hook(lambda _, x, name=name: inputs.update({name: x[0].detach()}))
            module.register_forward_hook(lambda _, x, y, name=name: outputs.update({name: y}))
    loss = F.cross_entropy(donor.logits(donor(idx)[-1])[:, :-1].flatten(0, 1), idx[:, 1:].flatten(), reduction="sum")
    grads = torch.autograd.grad(loss, list(outputs.values()))
    return {name: (inputs[name].flatten(0, -2), g.flatten(0, -2)) for name, g in zip(outputs, grads, strict=True)}


@each_arch
def test_stats_are_those_of_each_linear_layer(arch):
    full, idx = tiny(arch, no_rope=[1, 5]).double(), tokens(4, 9)
    stats, want = collect_stats(full, [idx]), watched(full, idx)
    assert len(stats.inputs) == 24 and set(stats.gradients) == set(want)
    for entry, kinds in calibrate.SHARED_INPUT.items():
        for i, kind in itertools.product(range(6), kinds):
            if f"layers.{i}.{kind}" in want:
                x, g = want[f"layers.{i}.{kind}"]
                close(stats.inputs[f"layers.{i}.{entry}"][0], x.T @ x / 36, 1e-12)
                close(stats.inputs[f"layers.{i}.{entry}"][1], x.mean(0), 1e-12)
                close(stats.gradients[f"layers.{i}.{kind}"], g.square().mean(0), 1e-12)
    assert not any(m._forward_pre_hooks or m._backward_hooks for m in full.modules())    # only copies are watched


def test_stats_do_not_depend_on_order_or_batch_size():
    full, idx = tiny("llama").double(), tokens(6, 9)
    want = collect_stats(full, [idx])
    for windows in (idx.split(1), idx.flip(0).split(4)):
        stats = collect_stats(full, windows)
        for name, (second, first) in stats.inputs.items():
            close(second, want.inputs[name][0], 1e-12)
            close(first, want.inputs[name][1], 1e-12)
        for name, g in stats.gradients.items():
            close(g, want.gradients[name], 1e-12)


@pytest.mark.parametrize("arch", ["gemma", "gpt_neox"])
def test_weights_in_half_precision_are_read_in_full(arch):
    full, idx = tiny(arch).bfloat16(), tokens(4, 9)
    stats, want = collect_stats(full, [idx]), collect_stats(copy.deepcopy(full).float(), [idx])
    for name, (second, _) in stats.inputs.items():
        close(second, want.inputs[name][0], 1e-2 if "layers.0" in name else 2e-2)
        assert second.dtype == torch.float32


@torch.no_grad()
def test_wide_inputs_are_sketched(monkeypatch):
    full, idx = tiny("llama").double(), tokens(8, 60)
    want = collect_stats(full, [idx])
    exact = calibrate.calibrate(full, want, 2, 3)
    monkeypatch.setattr(calibrate, "WIDEST", 39)                         # attn.o and mlp.down read 40, the others 32

    def far(rows):  # of the sketches from the exact moments; with few rows, several tokens share one
        monkeypatch.setattr(calibrate, "SKETCH", rows)
        stats = collect_stats(full, idx.split(3)).inputs
        assert {len(s) for n, (s, _) in stats.items() if n.endswith(("attn.o", "down"))} == {rows}
        assert all(torch.allclose(s, want.inputs[n][0]) for n, (s, _) in stats.items()
                   if not n.endswith(("attn.o", "down")))
        found = {n: (s.T @ s, *want.inputs[n]) for n, (s, _) in stats.items() if len(s) == rows}
        assert all((s[:-1, -1] - first).norm() < first.norm() for s, _, first in found.values())
        return max(((s[:-1, :-1] - second).norm() / second.norm()).item() for s, second, _ in found.values())
    assert 0 < far(20_000) < 0.1 < far(400) < 0.6
    monkeypatch.setattr(calibrate, "SKETCH", 20_000)
    near = calibrate.calibrate(full, collect_stats(full, [idx]), 2, 3)
    close(near.layers[1].mlp.down.merged(1), exact.layers[1].mlp.down.merged(1), 0.05)


@pytest.mark.parametrize("rows", [8, 30, 2000])
@pytest.mark.parametrize("vectors", ["tied", "per_loop"])
@torch.no_grad()
def test_wide_inputs_with_biases(monkeypatch, vectors, rows):
    """The mean of a sketched input comes from the sketch as well: with the exact one, C would not be a covariance."""
    full, idx = tiny("gpt_neox").double(), tokens(12, 60)
    full.layers[1].mlp.down.weight.data *= 5
    exact = calibrate.calibrate(full, collect_stats(full, [idx]), 2, 3, vectors)
    monkeypatch.setattr(calibrate, "WIDEST", 39)
    monkeypatch.setattr(calibrate, "SKETCH", rows)
    report = {}
    near = calibrate.calibrate(full, collect_stats(full, [idx]), 2, 3, vectors, report=report)
    assert all(-1e-9 < e < 1 for errors in report["mlp.down"] for e in errors)
    if rows == 2000:
        close(near.layers[1].mlp.down.merged(1), exact.layers[1].mlp.down.merged(1), 0.2)
        close(near.layers[1].mlp.down.bias, exact.layers[1].mlp.down.bias, 0.1)


@pytest.mark.parametrize("vectors", ["tied", "per_loop"])
@torch.no_grad()
def test_a_fit_in_what_sketches_span_is_that_in_all_directions(vectors):
    """With the other directions left to the ridge, the sketches S and the moments SᵀS give the same fit."""
    torch.manual_seed(0)
    config = Config(n_loop=2, n_layer=2, rank=3, arch="gpt_neox", vectors=vectors)
    common = torch.randn(14, 40, dtype=torch.float64)
    sketches = [torch.randn(12, 14, dtype=torch.float64) @ common for _ in range(2)]
    donors = [RelaxedLinear(40, 20, replace(config, rank=0, vectors="tied"), bias=True).double() for _ in sketches]
    ones = [F.normalize(torch.rand(12, dtype=torch.float64), dim=0) for _ in sketches]             # of an input of 1
    grads = [torch.rand(20, dtype=torch.float64) + 0.1 for _ in donors]
    gains, found = torch.rand(40, dtype=torch.float64) + 0.1, []
    for seconds in ([torch.cat([S, one[:, None]], dim=1) for S, one in zip(sketches, ones, strict=True)],
                    [S.T @ S for S in sketches]):
        linear = RelaxedLinear(40, 20, config, bias=True).double()
        torch.manual_seed(1)
        means = [one @ S for S, one in zip(sketches, ones, strict=True)]
        errors = fit_linear(linear, donors, list(zip(seconds, means, strict=True)), grads, gains, 6, 0.0, 1e-7)
        found.append((errors, torch.cat([linear(S * gains, loop) for loop, S in enumerate(sketches)]),
                      linear.weight * gains))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-3)
    close(found[0][1], found[1][1], 1e-3)
    away = torch.linalg.qr(torch.cat(sketches).T, mode="complete")[0][:, 24:]    # directions outside of all sketches
    close(found[0][2] @ away, (donors[0].weight + donors[1].weight) @ away / 2, 1e-8)


def test_an_input_that_is_not_finite_is_named():
    full = tiny("llama")
    full.layers[2].attn.v.weight.data[3, 4] = float("nan")
    with pytest.raises(UserError, match=r"input of layers\.2\.attn\.o .* not finite"):
        collect_stats(full, [tokens(1, 9)])
    full = tiny("llama")
    full.norm.weight.data[3] = float("nan")
    with pytest.raises(UserError, match="gradients that are not finite: its final norm or head"):
        collect_stats(full, [tokens(1, 9)])


# ---------------------------------------------------------------------------------------------------------------------
# The whole model

@pytest.mark.parametrize("changes", [{"n_loop": 2}, {"rank": 2}, {"vectors": "per_loop"}], ids=str)
def test_a_recursive_model_is_not_calibrated_again(changes):
    model, full = tiny("llama", **changes), tiny("llama")
    with pytest.raises(UserError, match="recursive model already.*calibrate its donor"):
        collect_stats(model, [tokens(1, 9)])
    with pytest.raises(UserError, match="recursive model already.*calibrate its donor"):
        calibrate.calibrate(model, collect_stats(full, [tokens(1, 9)]))


def test_calibrated_weights_that_overflow_are_refused_by_name():
    full = tiny("llama")
    full.layers[1].mlp.down.weight.data *= 1e6
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down\.\S+ of the calibrated model is not finite.*float16"):
        calibrate.calibrate(full, collect_stats(full, [tokens(4, 40)]), 2, dtype=torch.float16)


def calibrated(full, n_loop=2, rank=3, vectors="tied", idx=None):
    return to_calibrated(full, list((tokens(12, 60) if idx is None else idx).split(4)), n_loop, rank, vectors)


@each_arch
@pytest.mark.parametrize("n_loop", [2, 3])
def test_full_rank_is_the_donor(arch, n_loop):
    """Also with tied norm weights: they are absorbed. Biases, and norms of q and k, are needed per loop."""
    full, idx = tiny(arch).double(), tokens(2, 9)
    vectors = "per_loop" if full.config.attn_bias or full.config.qk_norm else "tied"
    model = calibrated(full, n_loop, 1000, vectors)
    close(last(model, idx), last(full, idx), 1e-9)
    close(last(unroll(model), idx), last(full, idx), 1e-9)
    assert model.config.vectors == vectors and model.config.n_loop == n_loop


@each_arch
@each_rank
@pytest.mark.parametrize("vectors", ["tied", "per_loop"])
def test_one_loop_is_the_donor(arch, rank, vectors):
    full, idx = tiny(arch).double(), tokens(2, 9)
    close(last(calibrated(full, 1, rank, vectors), idx), last(full, idx), 1e-9)


@each_arch
@pytest.mark.parametrize("vectors", ["tied", "per_loop"])
@pytest.mark.parametrize("rank", [0, 4])
@torch.no_grad()
def test_every_layer_fits_the_donors_better_than_the_papers_start(arch, vectors, rank):
    full, idx = tiny(arch).double(), tokens(12, 60)
    donor, ours, stats = absorbed(full), calibrated(full, 2, rank, vectors, idx), collect_stats(full, [idx])
    paper = convert.to_recursive(donor, 2, "average", rank=rank, vectors=vectors, dtype=torch.float64)
    inputs = {name: x for name, (x, _) in watched(full, idx).items()}
    for kind in (n for n, m in ours.layers[0].named_modules() if hasattr(m, "rank")):
        wrong = [0.0, 0.0]
        for which, model in enumerate((ours, paper)):
            for i in range(3):
                at = [f"layers.{i + 3 * loop}.{kind}" for loop in range(2)]
                G = sum(stats.gradients[name] for name in at)
                norm = model.layers[i].norm1 if kind[5:] in "qkv" else model.layers[i].norm2
                gains = 1.0 if kind in ("attn.o", "mlp.down") else norm_scale(norm).view(-1, norm.weight.size(-1))[0]
                for loop, name in enumerate(at):
                    y = (model.layers[i].get_submodule(kind)(inputs[name] * gains, loop)
                         - donor.layers[i + 3 * loop].get_submodule(kind)(inputs[name], 0))
                    wrong[which] += stats.gradients[name].sum() * (y.square() @ G).sum()           # (C1)
                    if model is ours and vectors == "per_loop" and arch == "gpt_neox":
                        assert y.mean(0).abs().max() < 1e-9                                # the bias takes up the mean
        assert wrong[0] < wrong[1], kind


@pytest.mark.parametrize("vectors", ["tied", "per_loop"])
def test_neox_without_biases_of_its_attention(vectors):
    """Absorbed norms leave biases on q, k and v, and GPT-NeoX has them on o too then: zeros at the start."""
    full, idx = tiny("gpt_neox", attn_bias=False).double(), tokens(2, 9)
    close(last(calibrated(full, 1, 0, vectors), idx), last(full, idx), 1e-9)
    model = calibrated(full, 2, 1000, "per_loop")
    close(last(model, idx), last(full, idx), 1e-9)
    assert model.config.attn_bias and model.config.o_bias


def test_what_is_not_a_linear_layer_is_the_donors():
    full = tiny("llama")
    ours = calibrated(full)
    for name, w in ours.state_dict().items():
        assert name.startswith("layers.") or torch.equal(w, full.state_dict()[name]), name
    assert all(p.requires_grad and p.dtype == torch.float32 for p in ours.parameters())
    assert not ours.training and ours.config.rank == 3


@each_arch
@torch.no_grad()
def test_shared_norms_have_the_donors_root_mean_square(arch):
    full = tiny(arch).double()
    shut, open_ = (full.layers[i].norm1.weight for i in (1, 4))
    shut[3], open_[3], shut[4] = (-1.0, -1.0, -1.0) if arch == "gemma" else (0.0, 0.0, 0.0)
    ours = calibrated(full)
    for name in ("norm1", "norm2"):
        one, two = (norm_scale(full.layers[i].get_submodule(name)) for i in (1, 4))
        want, norm = ((one.square() + two.square()) / 2).sqrt(), ours.layers[1].get_submodule(name)
        least = 0.1 * want.square().mean().sqrt()
        close(norm_scale(norm), want.clamp_min(least + 1e-6), 1e-12)
        assert (norm.bias == 0).all() if arch == "gpt_neox" else norm.bias is None
    assert (want[4] > least) and norm_scale(ours.layers[1].norm1)[3] > 0
    half = copy.deepcopy(full.layers[1].norm1).bfloat16()
    half.weight.fill_(-0.999 if arch == "gemma" else 0.001)
    shared = copy.deepcopy(half)
    assert torch.equal(share_norm_scale(shared, [half, half]), norm_scale(shared)) and (norm_scale(shared) > 0).all()
    x = torch.randn(7, full.config.n_embd, dtype=torch.float64)
    rope = rope_angles(torch.arange(7), full.config)
    layer, exact = full.layers[1], calibrated(full, 2, 1000, "per_loop").layers[1]
    close(exact(x, rope, 0, 0, None), layer(x, rope, 0, 0, None), 1e-5)


def test_the_donor_stays_as_it_is():
    full = tiny("gpt_neox")
    before = {n: w.clone() for n, w in full.state_dict().items()}
    calibrated(full)
    assert all(torch.equal(w, before[n]) for n, w in full.state_dict().items())
    with pytest.raises(UserError, match="recursive model already"):
        calibrated(tiny("llama", n_loop=2))


def test_few_tokens_are_enough_to_run_with_a_warning(capsys):
    full = tiny("llama").double()
    text = Tokens([np.arange(4000, dtype=np.uint16) % 53])
    windows = calibration_windows(text, 64, full.config, "it")
    assert [w.shape for w in windows] == [(1, 64)] and not capsys.readouterr().out  # 64 tokens, 40 inputs
    full.config.n_ctx = 32
    windows = calibration_windows(text, 32, full.config, "it")
    assert "32 tokens, fewer than the 40 inputs of the widest linear layer" in capsys.readouterr().out
    assert last(to_calibrated(full, windows, rank=3), tokens(2, 9)).isfinite().all()
    assert sum(len(w) for w in calibration_windows(text, 10**9, full.config, "it")) == 3999 // 32   # all there is


# ---------------------------------------------------------------------------------------------------------------------
# Command line

@pytest.fixture
def donor(tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(f'{{"text": "{"abcdefgh"[i * i % 11 % 8]}"}}\n' for i in range(500)))
    return folder_with_eos(tmp_path / "donor")


def folder_with_eos(folder):
    hf_folder("llama", folder)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    return folder


def main(donor, **flags):
    flags = {"donor": donor, "out": donor.parent / "out", "init": "calibrated", "rank": 3, "calib_tokens": 256,
             "calib_text": donor.parent / "text.jsonl"} | flags
    convert.main([f"--{name}={value}" for name, value in flags.items()])


@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
def test_main_writes_what_the_function_makes(donor, capsys, dtype):
    main(donor, vectors="per_loop", dtype=dtype)
    printed = capsys.readouterr().out
    full, saved = load_full(donor), RecursiveTransformer.load(donor.parent / "out")
    text = load_tokens(str(donor.parent / "text.jsonl"), Tokenizer.load(donor), 53)
    dtype = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    want = to_calibrated(full, calibration_windows(text, 256, full.config, "it"), 2, 3, "per_loop", dtype)
    for name, w in saved.state_dict().items():
        assert w.dtype == dtype and torch.equal(w, want.state_dict()[name]), name
    assert re.search(r"start and after each round: 0\.\d+ 0\.\d+", printed) and "mlp.down" in printed


def test_shards_of_another_tokenizer_are_refused(donor, tmp_path):
    other = folder_with_eos(tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"h"', '"x"'))
    write_shards(str(tmp_path / "text.jsonl"), Tokenizer.load(other), tmp_path / "shards", 53)
    refused(donor, "another tokenizer", calib_text=tmp_path / "shards")


def test_calibration_text_without_calibration_is_refused(donor):
    refused(donor, "--calib_text=.* has no effect, since --init=average reads no text",
            init="average", calib_tokens=640)


def refused(donor, message, **flags):
    with pytest.raises(UserError, match=message):
        main(donor, **flags)
    assert not (donor.parent / "out").exists()


@pytest.mark.parametrize("flags, message", [
    ({"calib_tokens": 63}, "--calib_tokens=63 is less than one window of 64"),
    ({"lora_init": "zero"}, "--lora_init=zero has no effect, since --init=calibrated fits the weights"),
    ({"norms": "pick"}, "drop --norms"), ({"rounding": "floor"}, "drop --rounding"), ({"loops": 4}, "4 loops do not"),
], ids=str)
def test_settings_that_do_not_fit(donor, flags, message):
    refused(donor, message, **flags)


def test_text_that_is_missing_empty_or_short(donor, tmp_path):
    refused(donor, "nowhere.txt does not exist", calib_text=tmp_path / "nowhere.txt")
    (tmp_path / "empty.txt").write_text("")
    refused(donor, "empty", calib_text=tmp_path / "empty.txt")
    (tmp_path / "short.txt").write_text("a")
    refused(donor, r"short.txt has \d+ tokens, one window to calibrate on needs 65", calib_text=tmp_path / "short.txt")


def test_training_starts_calibrated(home, tmp_path):  # noqa: F811
    how = ["--rank=4", "--vectors=per_loop", "--tokens=256", "--eval_every=100"]
    log = run(home, tmp_path / "out", "--init=calibrated", "--calib_tokens=640", *how)
    average = run(home, tmp_path / "average", "--init=average", *how)
    assert log[0]["full_val_loss"] < average[0]["full_val_loss"] - 0.1
    convert.main([f"--donor={home}/donor", "--init=calibrated", *how[:2], f"--calib_text={home}/train.txt",
                  "--calib_tokens=640", f"--out={tmp_path}/converted"])
    assert run(home, tmp_path / "again", f"--ckpt={tmp_path}/converted", *how[2:]) == log
    run(home, tmp_path / "out", "--resume", "--tokens=384")              # trains on, from what it had trained


@pytest.mark.parametrize("flags, message", [
    (["--norms=average"], "fits the weights to text"), (["--lora_init=zero"], "fits the weights to text"),
    (["--calib_tokens=9"], "less than one window"), (["--ckpt={home}/full"], "--init=calibrated says how a donor"),
    (["--data={tmp}/short.txt"], "one window to calibrate on needs 65"),
], ids=str)
def test_training_refuses(home, tmp_path, flags, message):  # noqa: F811
    (tmp_path / "short.txt").write_text(story(5, 6))
    flags = [flag.format(home=home, tmp=tmp_path) for flag in flags]
    with pytest.raises(UserError, match=message):
        run(home, tmp_path / "out", "--init=calibrated", *flags)
    assert not (tmp_path / "out").exists()


def test_the_table_of_starts(home, tmp_path):  # noqa: F811
    flags = [f"--donor={home}/donor", f"--calib_text={home}/train.txt", f"--texts=ours={home}/valid.txt",
            "--seq_len=16", "--tokens=640", "--ranks=0,4", "--vectors=tied,per_loop", "--device=cpu"]
    starts.main([*flags, "--calib_tokens=640,1280", f"--save={tmp_path}/lines"])
    lines = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert [line["init"] for line in lines] == ["average"] * 4 + (["low_rank"] * 4 + ["calibrated"] * 4) * 2
    assert [line.get("calib_tokens") for line in lines[4:]] == [640] * 8 + [1280] * 8
    tokenizer, full = Tokenizer.load(home / "donor"), load_full(str(home / "donor"), torch.float32)
    text = load_tokens(f"{home}/train.txt", tokenizer, full.config.vocab_size)
    model = to_calibrated(full, calibration_windows(text, 1280, full.config, "it"), 2, 4, "per_loop")
    idx, targets = batch(load_tokens(f"{home}/valid.txt", tokenizer, full.config.vocab_size), range(40), 16, seed=7)
    want = [F.cross_entropy(model.logits(s).flatten(0, 1), targets.flatten()).item() for s in model(idx)]
    assert lines[-1]["loss"] == {"ours": pytest.approx(want, rel=1e-4)} and lines[-1]["rank"] == 4
    assert all(len(line["errors"]) >= 1 and line["peak_gib"] > 0 for line in lines if line["init"] == "calibrated")
    stats = collect_stats(full, calibration_windows(text, 1280, full.config, "it"))
    model = to_low_rank(full, weighted_svds(full, stats), model.num_params()["stored_block"])
    want = F.cross_entropy(model.logits(model(idx)[0]).flatten(0, 1), targets.flatten()).item()
    assert lines[-5]["loss"] == {"ours": [pytest.approx(want, rel=1e-4)]} and lines[-5]["vectors"] == "per_loop"


def test_the_cost_of_a_large_one_is_put_together_from_pieces(tmp_path, monkeypatch):
    monkeypatch.setitem(calibrated_cost.SHAPES, "small", Config(n_embd=32, n_head=4, head_dim=8, n_hidden=64, n_layer=6,
                                                     vocab_size=53, n_ctx=512))
    calibrated_cost.main(["--shape=small", "--read=512", "--tokens=1024", "--rank=4", f"--save={tmp_path}/line"])
    line = json.loads((tmp_path / "line").read_text())
    one, both = line["reading_1_s"], line["reading_all_s"]
    assert line["reading_s"] == pytest.approx(2 * (one + 5 * (both - one)))
    assert line["fitting_s"] == pytest.approx(3 * line["fitting_one_s"]) and line["memory_gib"] > line["peak_gib"]
    with pytest.raises(UserError, match="--shape=large"):
        calibrated_cost.main(["--shape=large"])
