"""Kernels for rows at different loops: as exact as torch, independent of the other rows, and compiled without a GPU.

Run as a program (`python tests/test_kernels.py`) it compiles the launches of the paper's models and prints a line for
each."""

import contextlib
import inspect
import io
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a program has no conftest.py
import kernels
from kernels import (
    decode_attention,
    decode_attention_sdpa,
    decode_attention_spec,
    decode_attention_triton,
    linear_rows,
    linear_rows_concat,
    linear_rows_spec,
    linear_rows_triton,
    lora_rows,
    lora_rows_concat,
    lora_rows_spec,
    lora_rows_triton,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")
needs_triton = pytest.mark.skipif(kernels.triton is None, reason="no Triton for this system")
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(autouse=True)
def rounding(monkeypatch):
    """Triton's interpreter truncates fp32 to bf16; make it round to nearest, as torch and GPUs do."""
    if DEVICE == "cuda" or kernels.triton is None:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl
    cast = InterpreterBuilder.cast_impl

    def rounded(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        bits = torch.from_numpy(src.data.copy()).bfloat16().view(torch.int16).numpy()
        return TensorHandle(bits.view("uint16"), dst_type.scalar)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounded)


@pytest.fixture
def tiles(monkeypatch):
    """Tiles so small that small shapes take several in each direction, and three splits."""
    monkeypatch.setattr(kernels, "gemm_tiles", lambda n, k, item_size, copies=1: (16, 16, 3 if k > 32 else 1))
    monkeypatch.setattr(kernels, "row_tile", lambda m, item_size: 16)
    monkeypatch.setattr(kernels, "attention_tiles", lambda d, item_size: 16)
    monkeypatch.setattr(kernels, "BLOCK_R", 16)
    monkeypatch.setattr(kernels, "SPLIT_T", 32)


def draw(m, c, o, r, n_loop, dtype=torch.float64, bias=None, seed=0):
    """(x, w, a, b, loop, bias), scaled so that sums keep their variance; loops and idle rows in random order."""
    g = torch.Generator().manual_seed(seed)
    x, w, a, b = (torch.randn(shape, generator=g, dtype=torch.float64) / shape[-1]**0.5
                  for shape in ((m, c), (o, c), (n_loop, r, c), (n_loop, o, r)))
    x = x * c**0.5
    loop = torch.randint(-1, n_loop, (m,), generator=g)
    shape = {None: None, "tied": (o,), "per_loop": (n_loop, o)}[bias]
    bias = None if shape is None else torch.randn(shape, generator=g, dtype=torch.float64)
    return on(DEVICE, x, w, a, b, dtype=dtype) + [loop.to(DEVICE)] + on(DEVICE, bias, dtype=dtype)


def draw_cache(heads, n_kv, d, lengths, n_loop=2, t=65, dtype=torch.float64, seed=0):
    """(q, k, v, slot, loop, length). Positions that no row may read are NaN; k and v are views with other strides."""
    g = torch.Generator().manual_seed(seed)
    m = len(lengths)
    q = torch.randn(m, heads, d, generator=g, dtype=torch.float64)
    both = torch.randn(2, n_loop, m + 1, n_kv, t, d, generator=g, dtype=torch.float64)     # permuted below
    slot, loop = torch.randperm(m, generator=g), torch.randint(0, n_loop, (m,), generator=g)
    length = torch.tensor(lengths)
    unread = torch.ones(n_loop, m + 1, t, dtype=torch.bool)
    for s, own, n in zip(slot, loop, length, strict=True):
        unread[own, s, :n] = False
    both[unread[None, :, :, None].expand(2, -1, -1, n_kv, -1)] = NAN
    k, v = on(DEVICE, *both, dtype=dtype)
    return (*on(DEVICE, q, dtype=dtype), *(c.permute(1, 0, 3, 2, 4) for c in (k, v)),      # (S, n_loop, T, K, D)
            *on(DEVICE, slot, loop, length))


def on(device, *tensors, dtype=None):
    return [t if t is None else t.to(device, dtype) for t in tensors]


def doubled(args):
    return [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args]


def assert_as_exact(kernel, torchs, spec, args):
    """The kernel's error against fp64 is at most twice torch's own in the same dtype."""
    want, got = spec(*doubled(args)), kernel(*args)
    assert got.dtype == args[0].dtype and got.shape == want.shape
    ours, theirs = ((y.double() - want).abs().max().item() for y in (got, torchs(*args)))
    slack = (0.1 if got.dtype == torch.bfloat16 else 1) * torch.finfo(got.dtype).eps * want.abs().max().item()
    assert ours <= 2 * theirs + slack, (ours, theirs)
    assert want.isfinite().all()
    return got


exactly = partial(torch.testing.assert_close, atol=1e-12, rtol=1e-12)

# rows, width in, width out, rank, loops: ragged, ranks smaller and larger than a block, more rows than a tile
SHAPES = [(1, 16, 16, 4, 1), (5, 33, 20, 3, 2), (18, 100, 20, 7, 3), (17, 40, 20, 37, 4), (18, 20, 33, 18, 2)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
each_bias = pytest.mark.parametrize("bias", [None, "tied", "per_loop"])
HEADS = [(4, 1, 48), (4, 2, 64), (3, 3, 48), (18, 1, 16)]        # query heads, key heads, size of a head
LENGTHS = [0, 1, 16, 17, 31, 32, 33, 65, 40]
each_heads = pytest.mark.parametrize("heads", HEADS, ids=lambda s: "x".join(map(str, s)))


# ---------------------------------------------------------------------------------------------------------------------
# Torch

@each_shape
@each_bias
def test_torch_path_equals_the_specification(shape, bias):
    x, w, a, b, loop, bias = draw(*shape, bias=bias)
    x[loop < 0] = NAN
    exactly(lora_rows_concat(x, a, b, loop), lora_rows_spec(x, a, b, loop))
    for lora in ((a, b), (None, None)):
        exactly(linear_rows_concat(x, w, *lora, loop, bias), linear_rows_spec(x, w, *lora, loop, bias))


@each_shape
@each_bias
def test_specification_is_w_plus_ba_row_by_row(shape, bias):
    x, w, a, b, loop, bias = draw(*shape, bias=bias)
    for m, own in enumerate(loop.tolist()):
        added = 0 if bias is None else bias if bias.dim() == 1 else bias[own]
        delta = b[own] @ a[own]
        full, tied, lora = ((w + delta) @ x[m] + added, w @ x[m] + added, delta @ x[m])
        if own < 0:
            full, tied, lora = (torch.zeros_like(y) for y in (full, tied, lora))
        exactly(linear_rows_spec(x, w, a, b, loop, bias)[m], full)
        exactly(linear_rows_spec(x, w, None, None, loop, bias)[m], tied)
        exactly(lora_rows_spec(x, a, b, loop)[m], lora)


def test_concat_copies_no_weight_that_lies_stacked():
    x, _, a, _, loop, _ = draw(5, 16, 20, 4, 3)
    b = torch.randn(20, 3, 4, dtype=torch.float64, device=DEVICE).transpose(0, 1)
    exactly(lora_rows_concat(x, a, b, loop), lora_rows_spec(x, a, b, loop))
    assert b.transpose(0, 1).flatten(1).data_ptr() == b.data_ptr()


@each_heads
def test_attention_of_torch_equals_the_specification(heads):
    q, k, v, slot, loop, length = draw_cache(*heads, LENGTHS)
    for idle in (loop, torch.where(torch.arange(len(loop), device=DEVICE) % 3 == 1, -1, loop)):
        got = decode_attention_sdpa(q, k, v, slot, idle, length)
        exactly(got, decode_attention_spec(q, k, v, slot, idle, length))
        assert got[(idle < 0) | (length == 0)].eq(0).all() and got.isfinite().all()


def test_attention_is_softmax_over_the_slot_s_own_loop():
    q, k, v, slot, loop, length = (t.cpu() for t in draw_cache(4, 2, 8, [3, 5]))
    for m in range(2):
        keys, values = (c[slot[m], loop[m], :length[m]].repeat_interleave(2, 1) for c in (k, v))  # (length, H, D)
        p = (torch.einsum("hd,thd->ht", q[m], keys) / 8**0.5).softmax(-1)
        exactly(decode_attention_spec(q, k, v, slot, loop, length)[m], torch.einsum("ht,thd->hd", p, values))


class NoWaiting(TorchDispatchMode):
    """Fails on operations that make the host wait for the device, or whose shapes depend on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "item", "masked_select", "unique", "_unique2"), name
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        assert all(i is None or i.dtype != torch.bool for i in indices), "a mask as an index is a nonzero"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_torch_path_never_makes_the_host_wait(dtype):
    x, w, a, b, loop, bias = draw(5, 16, 20, 4, 2, dtype, "per_loop")
    cache = draw_cache(4, 2, 8, [3, 5, 0], dtype=dtype)
    with pytest.raises(AssertionError, match="nonzero|_local_scalar_dense"), NoWaiting():
        x[loop > 0]
    with NoWaiting():
        lora_rows_concat(x, a, b, loop)
        linear_rows_concat(x, w, a, b, loop, bias)
        linear_rows_concat(x, w, None, None, loop, bias[0])
        decode_attention_sdpa(*cache)


# ---------------------------------------------------------------------------------------------------------------------
# Triton: the results

@needs_triton
@each_shape
@each_dtype
def test_linear_is_as_exact_as_torch(tiles, shape, dtype):
    x, w, a, b, loop, bias = draw(*shape, dtype, "per_loop")
    for args in ((x, w, a, b, loop, bias), (x, w, a, b, loop, None), (x, w, None, None, loop, bias[0])):
        assert_as_exact(linear_rows_triton, linear_rows_concat, linear_rows_spec, args)


@needs_triton
@each_shape
@each_dtype
def test_lora_is_as_exact_as_torch(tiles, shape, dtype):
    x, _, a, b, loop, _ = draw(*shape, dtype)
    assert_as_exact(lora_rows_triton, lora_rows_concat, lora_rows_spec, (x, a, b, loop))


@needs_triton
@each_dtype
def test_linear_with_the_tiles_that_ship(dtype):
    for args in (draw(3, 100, 40, 10, 2, dtype, "per_loop"), draw(20, 528, 70, 70, 2, dtype, "tied")):
        assert_as_exact(linear_rows_triton, linear_rows_concat, linear_rows_spec, args)
    assert kernels.gemm_tiles(70, 528)[2] == 2


@needs_triton
@pytest.mark.parametrize("loops", [[-1] * 5, [0] * 5, [1] * 5, [2] * 5, [2, 1, 0, -1, 2]])
def test_rows_all_idle_all_at_one_loop_and_mixed(tiles, loops):
    x, w, a, b, loop, bias = draw(5, 40, 20, 18, 3, torch.float32, "per_loop")
    loop = torch.tensor(loops, device=DEVICE)
    x[loop < 0] = NAN
    for kernel, spec, args in ((lora_rows_triton, lora_rows_spec, (x, a, b, loop)),
                               (linear_rows_triton, linear_rows_spec, (x, w, a, b, loop, bias)),
                               (linear_rows_triton, linear_rows_spec, (x, w, None, None, loop, bias))):
        got = kernel(*args)
        torch.testing.assert_close(got, spec(*args), atol=1e-5, rtol=1e-5)
        assert got[loop < 0].eq(0).all()


@needs_triton
def test_linear_reads_any_strides(tiles):
    x, w, a, b, loop, bias = draw(5, 40, 20, 18, 3, torch.float32, "per_loop")
    want = linear_rows_triton(x, w, a, b, loop, bias)
    wide = torch.full((5, 50), NAN, device=DEVICE)
    wide[:, 3:43] = x
    views = [wide[:, 3:43], w.T.contiguous().T, a.transpose(0, 1).contiguous().transpose(0, 1),
             b.transpose(0, 1).contiguous().transpose(0, 1), torch.stack([loop, loop + 1], 1)[:, 0], bias]
    assert not any(t.is_contiguous() for t in views[:-1])
    assert torch.equal(linear_rows_triton(*views), want)


@needs_triton
@each_dtype
@each_heads
def test_attention_is_as_exact_as_torch(tiles, heads, dtype):
    q, k, v, slot, loop, length = draw_cache(*heads, LENGTHS, dtype=dtype)
    loop[8] = -1
    args = q, k, v, slot, loop, length
    got = assert_as_exact(decode_attention_triton, decode_attention_sdpa, decode_attention_spec, args)
    assert got[0].eq(0).all() and got[8].eq(0).all()


@needs_triton
def test_attention_to_scores_far_apart(tiles):
    """exp overflows unless the maximum so far is subtracted first. Rising and falling scores, across splits."""
    q, k, v, slot, loop, length = draw_cache(2, 1, 48, [40, 40], dtype=torch.float32, t=40)
    q[:] = 1
    k[:] = torch.arange(40, device=DEVICE)[:, None, None]
    k[slot[1]] = k[slot[1]].flip(1)
    got = decode_attention_triton(q, k, v, slot, loop, length)
    torch.testing.assert_close(got, decode_attention_spec(q, k, v, slot, loop, length), atol=1e-5, rtol=1e-5)


@needs_triton
@each_dtype
def test_attention_with_the_tiles_that_ship(dtype):
    args = draw_cache(2, 1, 24, [0, 1, 255, 256, 257, 300], t=300, dtype=dtype)
    assert_as_exact(decode_attention_triton, decode_attention_sdpa, decode_attention_spec, args)


@needs_triton
def test_a_swapped_loop_does_not_pass(tiles):
    """The LoRA, bias or keys of another loop change every row far beyond the tolerance of the tests above."""
    x, w, a, b, loop, bias = draw(6, 40, 20, 7, 2, torch.float32, "per_loop")
    loop = loop.clamp(min=0)
    want = linear_rows_triton(x, w, a, b, loop, bias)
    for swapped in ((a.flip(0), b, bias), (a, b.flip(0), bias), (a, b, bias.flip(0))):
        got = linear_rows_triton(x, w, *swapped[:2], loop, swapped[2])
        assert ((got - want).abs().amax(1) > 0.1).all()
    q, k, v, slot, loop, length = draw_cache(4, 2, 48, [40, 7, 33], dtype=torch.float32)
    k, v = k.nan_to_num(0.5), v.nan_to_num(0.5)
    want = decode_attention_triton(q, k, v, slot, loop, length)
    for swapped in ((k.flip(1), v), (k, v.flip(1)), (k.flip(0), v), (k, v.flip(0))):
        assert ((decode_attention_triton(q, *swapped, slot, loop, length) - want).abs().amax((1, 2)) > 0.02).all()


# ---------------------------------------------------------------------------------------------------------------------
# Triton: a row does not depend on the others, bit for bit

@needs_triton
@each_dtype
def test_a_row_alone_equals_the_row_in_a_mixed_batch(tiles, dtype):
    """It depends neither on the others' contents, here NaN, nor on its own place and tile."""
    x, w, a, b, loop, bias = draw(18, 36, 17, 18, 2, dtype, "per_loop")
    order = torch.randperm(18, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for f in (lambda x, loop: lora_rows_triton(x, a, b, loop),
              lambda x, loop: linear_rows_triton(x, w, a, b, loop, bias),
              lambda x, loop: linear_rows_triton(x, w, None, None, loop, bias)):
        whole = f(x, loop)
        assert torch.equal(f(x[order], loop[order]), whole[order])
        assert whole[[2, 17]].ne(0).all()       # two that are not idle, one in each tile
        for m in (2, 17):
            others = torch.full_like(x, NAN)
            others[m] = x[m]
            assert torch.equal(f(others, loop)[m], whole[m])
            assert torch.equal(f(x[m:m + 1], loop[m:m + 1])[0], whole[m])


@needs_triton
@each_dtype
def test_attention_of_a_row_alone_and_in_a_longer_cache(tiles, dtype):
    q, k, v, slot, loop, length = draw_cache(4, 2, 48, [17, 0, 40], dtype=dtype, t=40)
    whole = decode_attention_triton(q, k, v, slot, loop, length)
    order = torch.tensor([2, 0, 1], device=DEVICE)
    permuted = decode_attention_triton(q[order], k, v, slot[order], loop[order], length[order])
    assert torch.equal(permuted, whole[order])
    longer = [torch.cat([c, torch.full_like(c, NAN)], 2) for c in (k, v)]
    assert torch.equal(decode_attention_triton(q, *longer, slot, loop, length), whole)
    for m in (0, 2):
        others = torch.full_like(q, NAN)
        others[m] = q[m]
        assert torch.equal(decode_attention_triton(others, k, v, slot, loop, length)[m], whole[m])
        alone = decode_attention_triton(*(t[m:m + 1] for t in (q,)), k, v, *(t[m:m + 1] for t in (slot, loop, length)))
        assert torch.equal(alone[0], whole[m])


# ---------------------------------------------------------------------------------------------------------------------
# Triton: the launches of the paper's models

MODELS = {  # linear layers (width out, width in), query heads, key heads, size of a head, biases
    "Gemma 2B": ([(2048, 2048), (256, 2048), (16384, 2048), (2048, 16384)], 8, 1, 256, False),
    "TinyLlama 1.1B": ([(2048, 2048), (256, 2048), (5632, 2048), (2048, 5632)], 32, 4, 64, False),
    "Pythia 1B": ([(2048, 2048), (8192, 2048), (2048, 8192)], 8, 8, 256, True),
}


class Recorder:
    """Replaces a kernel: appends (kernel, grid, arguments by name, options) to `launches`, and runs nothing."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages") if k in kwargs}
            bound = inspect.signature(self.kernel.fn).bind(*args, **kwargs)
            self.launches.append((self.kernel, grid, bound.arguments, options))
        return launch


@contextlib.contextmanager
def recorded():
    names, launches = ("_shrink", "_linear", "_sum_splits", "_attend", "_merge"), []
    real = {name: getattr(kernels, name) for name in names}
    try:
        for name in names:
            setattr(kernels, name, Recorder(real[name], launches))
        yield launches
    finally:
        for name in names:
            setattr(kernels, name, real[name])


def empty(*shape, dtype):
    """A tensor without values: reading one, for which the host would have to wait, is an error."""
    return torch.empty(shape, dtype=dtype, device="meta")


def launch(m, linears, n_head, n_kv, d, biased, n_loop=2, ranks=(0, 64, 512), dtype=torch.bfloat16):
    """Launch all of a model's kernels for m rows, with the engine's layout of the cache."""
    loop, meta = partial(empty, dtype=torch.int64)(m), partial(empty, dtype=dtype)
    for o, c in linears:
        for rank in (min(r, o, c) for r in ranks):
            x, w, bias = meta(m, c), meta(o, c), meta(o) if biased else None
            a, b = (meta(n_loop, rank, c), meta(n_loop, o, rank)) if rank else (None, None)
            linear_rows_triton(x, w, a, b, loop, bias)
            if rank:
                lora_rows_triton(x, a, b, loop)
    cache = meta(n_loop, m, n_kv, 2048, d).permute(1, 0, 3, 2, 4)
    decode_attention_triton(meta(m, n_head, d), cache, cache, loop, loop, loop)


@needs_triton
@pytest.mark.parametrize("model", MODELS)
def test_the_order_of_a_sum_does_not_depend_on_the_number_of_rows(model):
    """The block along the sum, the size of a split and the number of splits are the same for every number of rows."""
    orders = []
    for m in (1, 16, 17, 64, 65, 128, 300):
        with recorded() as launches:
            launch(m, *MODELS[model])
        orders.append([(kernel, grid[2:]) + tuple(args.get(k) for k in (
            "BLOCK_K", "BLOCK_R", "k_chunk", "r_chunk", "PARTIAL", "splits", "SPLIT", "BLOCK_T", "BLOCK_N"))
            for kernel, grid, args, _ in launches])
        for _, grid, args, _ in launches:
            if "BLOCK_M" in args:
                assert (grid[1] - 1) * args["BLOCK_M"] < m <= grid[1] * args["BLOCK_M"]
            if "k_chunk" in args and args.get("w", 0) is not None:   # the splits cover the sum, once
                assert (grid[2] - 1) * args["k_chunk"] < args["K"] <= grid[2] * args["k_chunk"]
                assert args["k_chunk"] % args["BLOCK_K"] == 0
    assert all(order == orders[0] for order in orders)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("model", MODELS)
def test_the_tiles_of_three_stages_fit_the_shared_memory(model, dtype):
    """What the compiler keeps of the four stages, without compiling; fp32 elements are twice as large."""
    for m in (1, 16, 17, 64, 65, 128, 300):
        with recorded() as launches:
            launch(m, *MODELS[model], dtype=dtype)
        for _, _, args, _ in launches:
            if "BLOCK_M" in args:
                wide = args["BLOCK_M"] + args.get("BLOCK_N", args["BLOCK_R"])
                assert 3 * wide * args["BLOCK_K"] * dtype.itemsize <= 227 * 1024
            if dtype == torch.float32 and "BLOCK_M" in args:
                assert args["BLOCK_M"] * args.get("BLOCK_N", args["BLOCK_R"]) <= 32 * 64     # sums in the registers


def compile_launches():
    """Compile the models' launches for an sm_90 GPU. Yields a dictionary per distinct kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    triton.knobs.nvidia.dump_ptxas_log = True  # it alone tells registers and spills
    sources = {}
    bf16 = [(model, m, torch.bfloat16) for model in MODELS.values() for m in (16, 64, 128)]       # one of each tile
    fp32 = [(MODELS["Gemma 2B"], m, torch.float32) for m in (16, 32)]
    for model, m, dtype in bf16 + fp32:
        with recorded() as launches:
            launch(m, *model, dtype=dtype)
        for kernel, _, args, options in launches:
            sources.setdefault(str((kernel.fn.__name__, *(specialise(kernel, args)), options)),
                               (kernel, *specialise(kernel, args), options))
    for kernel, signature, constants, attrs, options in sources.values():
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            source = ASTSource(kernel, signature, {(i,): v for i, v in constants.items()}, attrs)
            built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        output, ptx = log.getvalue(), built.asm["ptx"]
        yield {"kernel": kernel.fn.__name__, "input": signature.get("x", signature.get("q")),
               "constants": {kernel.arg_names[i]: v for i, v in constants.items()},
               "shared": built.metadata.shared,
               "registers": int(re.search(r"Used (\d+) registers", output)[1]),
               "spills": sum(map(int, re.findall(r"(\d+) bytes spill", output))),
               "mma": sorted(set(re.findall(r"(wgmma|mma)\S*?\.(m\d+n\d+k\d+)", ptx))),
               "async_copies": sorted(set(re.findall(r"cp\.async\.c[ag]\S* .*?, 0x([0-9a-f]+),", ptx)))}


def specialise(kernel, args):
    """(signature, constants, hints) of a launch: None and 1 become constants, multiples of 16 get a hint."""
    types = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}
    signature, constants, attrs = {}, {}, {}
    for i, (name, param) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        v = args[name]
        if param.is_constexpr or v is None or (type(v) is int and v == 1 and not param.do_not_specialize):
            signature[name], constants[i] = "constexpr", v
        elif isinstance(v, float):
            signature[name] = "fp32"
        else:
            signature[name] = types[v.dtype] if isinstance(v, torch.Tensor) else "i32" if v < 2**31 else "i64"
            if not param.do_not_specialize and (isinstance(v, torch.Tensor) or v % 16 == 0):
                attrs[i,] = [["tt.divisibility", 16]]
    return signature, constants, attrs


@needs_triton
@pytest.mark.timeout(1800)
def test_every_launch_compiles_for_sm_90_and_fits(tmp_path):
    """In a process of its own, since kernels are interpreted in this one. It needs no GPU."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    built = [json.loads(line) for line in run.stdout.splitlines()]
    assert {k["kernel"] for k in built} == {"_shrink", "_linear", "_sum_splits", "_attend", "_merge"}
    for k in built:
        assert k["shared"] <= 227 * 1024 and k["registers"] <= 255, k
        assert k["spills"] <= (16 if k["input"] == "*fp32" else 0), k      # bytes: _shrink in fp32 spills 8
    assert {"*bf16", "*fp32"} <= {k["input"] for k in built if k["kernel"] == "_attend"}
    gemms = [k for k in built if k["kernel"] in ("_shrink", "_linear") and k["input"] == "*bf16"]
    assert {k["constants"]["BLOCK_M"] for k in gemms} == {16, 64, 128}
    for k in gemms:  # one instruction, whose width alone depends on the tile: the sums keep their order
        assert k["mma"] == [["wgmma", f"m64n{k['constants']['BLOCK_M']}k16"]], k
        assert k["async_copies"] == ["10"], k     # 16 bytes at a time, all of them


# ---------------------------------------------------------------------------------------------------------------------
# Which path is taken, and without Triton

def test_public_functions_take_the_torch_path_here():
    x, w, a, b, loop, bias = draw(5, 16, 20, 4, 2, bias="tied")
    exactly(lora_rows(x, a, b, loop), lora_rows_spec(x, a, b, loop))
    exactly(linear_rows(x, w, a, b, loop, bias), linear_rows_spec(x, w, a, b, loop, bias))
    exactly(linear_rows(x, w, None, None, loop), linear_rows_spec(x, w, None, None, loop))
    cache = draw_cache(4, 2, 8, [3, 5, 0])
    exactly(decode_attention(*cache), decode_attention_spec(*cache))


@pytest.mark.parametrize("there, is_cuda, dtype, want", [
    (True, True, torch.bfloat16, True), (True, True, torch.float32, True), (True, True, torch.float64, False),
    (True, False, torch.bfloat16, False), (False, True, torch.bfloat16, False)])
def test_triton_runs_where_there_is_a_gpu_and_less_than_fp64(monkeypatch, there, is_cuda, dtype, want):
    monkeypatch.setattr(kernels, "triton", SimpleNamespace() if there else None)
    assert kernels.runs_triton(SimpleNamespace(is_cuda=is_cuda, dtype=dtype)) is want


def test_public_functions_take_the_triton_path_where_it_runs(monkeypatch):
    monkeypatch.setattr(kernels, "runs_triton", lambda x: True)
    for name in ("lora_rows", "linear_rows", "decode_attention"):
        monkeypatch.setattr(kernels, name + "_triton", lambda *args, name=name: name)
    x, w, a, b, loop, _ = draw(5, 16, 20, 4, 2)
    assert lora_rows(x, a, b, loop) == "lora_rows" and linear_rows(x, w, a, b, loop) == "linear_rows"
    assert decode_attention(*draw_cache(4, 2, 8, [3])) == "decode_attention"


@needs_triton
@each_bias
def test_more_rows_than_a_tile_take_the_library_s_gemm(monkeypatch, tiles, bias):
    x, w, a, b, loop, bias = draw(9, 40, 20, 7, 2, torch.float32, bias)
    x[loop < 0] = NAN
    monkeypatch.setattr(kernels, "runs_triton", lambda x: True)
    monkeypatch.setattr(kernels, "linear_rows_triton", lambda *args: "tiles")
    assert kernels.MAX_ROWS == 128
    monkeypatch.setattr(kernels, "MAX_ROWS", 8)
    assert linear_rows(x[:8], w, a, b, loop[:8], bias) == "tiles"
    for lora in ((a, b), (None, None)):
        want = linear_rows_spec(x, w, *lora, loop, bias)
        torch.testing.assert_close(linear_rows(x, w, *lora, loop, bias), want, atol=1e-5, rtol=1e-5)


def test_shapes_that_do_not_fit_are_refused():
    x, w, a, b, loop, _ = draw(5, 16, 20, 4, 2)
    q, k, v, slot, at, length = draw_cache(4, 2, 8, [3, 5])
    for call in (lambda: lora_rows(x[:, 1:], a, b, loop), lambda: lora_rows(x, a[:1], b, loop),
                 lambda: lora_rows(x, a[:, 1:], b, loop), lambda: lora_rows(x, a, b, loop[1:]),
                 lambda: linear_rows(x, w[:, 1:], None, None, loop), lambda: linear_rows(x, w, a, b[:, 1:], loop),
                 lambda: linear_rows(x, w, a[:, 1:], b, loop), lambda: linear_rows(x, w, a, b, loop, w[1:, 0]),
                 lambda: linear_rows(x, w, None, None, loop[1:]),
                 lambda: decode_attention(q[:, 1:], k, v, slot, at, length),
                 lambda: decode_attention(q[..., 1:], k, v, slot, at, length),
                 lambda: decode_attention(q, k, v[:, :, 1:], slot, at, length),
                 lambda: decode_attention(q, k, v, slot[1:], at, length),
                 lambda: decode_attention(q, k, v, slot, at[1:], length),
                 lambda: decode_attention(q, k, v, slot, at, length[1:])):
        with pytest.raises(AssertionError, match="shapes do not fit"):
            call()


def test_kernels_use_no_atomics_whose_order_is_random():
    assert "atomic" not in Path(kernels.__file__).read_text().lower()


def test_torch_paths_work_without_triton():
    code = """
import sys
from functools import partial
sys.modules["triton"] = None
import torch, kernels
from test_kernels import draw, draw_cache
assert kernels.triton is None
x, w, a, b, loop, bias = draw(5, 16, 20, 4, 2, bias="tied")
assert kernels.linear_rows(x, w, a, b, loop, bias).shape == (5, 20) == kernels.lora_rows(x, a, b, loop).shape
assert kernels.decode_attention(*draw_cache(4, 2, 8, [3, 5])).shape == (2, 4, 8)
"""
    root = Path(kernels.__file__).parent
    env = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


if __name__ == "__main__":
    for found in compile_launches():
        print(json.dumps(found), flush=True)
