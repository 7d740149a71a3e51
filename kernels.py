"""
Linear layers and attention for decoding a batch whose rows are at different loops (continuous depth-wise batching).

A row is one token of one sequence. `loop` (M,) holds the loop that each row is at, which selects its LoRA (A_l, B_l)
and its part of the cache. A row at loop -1 is idle: its result is zero.

Each operation has three implementations, each tested against the one before it:

    *_spec      the specification in torch, readable and slow
    *_concat    the torch path (CPU, fp64, no Triton): the LoRAs of all loops as one of rank n_loop * R, and a mask;
                for attention *_sdpa, masked beyond each row's length
    *_triton    visits all loops with row masks: no sorting, no tables, and the host never waits

Grids and tiles depend on shapes alone, so CUDA graphs may capture all launches. The order of every sum depends neither
on the number of rows (up to MAX_ROWS) nor on the other rows: a row alone gives bit for bit the same result as in a
mixed batch.

Shapes in comments: M rows, C width in, O width out, R LoRA rank, H query heads, K key/value heads, D head size,
S slots (one sequence each), T positions of a slot. Inside the GEMM kernels: N and K, the widths out and in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
    INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
    jit = partial(triton.jit, do_not_specialize=["M"])  # one compilation for all batch sizes of a tile
except ImportError:  # no wheel for this system: the torch paths remain
    triton, jit = None, lambda kernel: kernel


# ---------------------------------------------------------------------------------------------------------------------
# Public functions

def runs_triton(x: Tensor) -> bool:
    """True for the Triton path. Its kernels sum in fp32, so fp64 takes the torch path."""
    return triton is not None and x.is_cuda and x.dtype != torch.float64


def lora_rows(x: Tensor, a: Tensor, b: Tensor, loop: Tensor) -> Tensor:
    """B_l A_l x (M, O) with each row's own l: x (M, C), a (n_loop, R, C), b (n_loop, O, R), loop (M,) of -1 … n_loop-1.

    Loops beyond n_loop-1 are not checked for (the host would have to wait): the results of such rows are undefined.
    """
    assert a.shape == (len(b), b.size(2), x.size(1)) and len(loop) == len(x), shapes(x, a, b, loop)
    return (lora_rows_triton if runs_triton(x) else lora_rows_concat)(x, a, b, loop)


def linear_rows(x: Tensor, w: Tensor, a: Tensor | None, b: Tensor | None, loop: Tensor,
                bias: Tensor | None = None) -> Tensor:
    """W'x + B_l A_l x + bias (M, O) with each row's own l: as `lora_rows`, w (O, C), bias (O,) or (n_loop, O).

    Without a and b (rank 0): W'x + bias, on a GPU in the same tiles, which do not depend on the other rows. Above
    MAX_ROWS the library multiplies by W', and the order of a sum may depend on the number of rows.
    """
    assert x.size(1) == w.size(1) and len(loop) == len(x), shapes(x, w, loop)
    assert bias is None or bias.size(-1) == len(w), shapes(w, bias)
    assert a is None or a.shape == (len(b), b.size(2), x.size(1)) and b.size(1) == len(w), shapes(x, w, a, b)
    if not runs_triton(x):
        return linear_rows_concat(x, w, a, b, loop, bias)
    return (linear_rows_triton if len(x) <= MAX_ROWS else linear_rows_library)(x, w, a, b, loop, bias)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, slot: Tensor, loop: Tensor, length: Tensor) -> Tensor:
    """Softmax attention (M, H, D) of one query per row over the first `length` positions of its slot and loop.

    q (M, H, D); k, v (S, n_loop, T, K, D) with any strides, H a multiple of K; slot, loop, length (M,), length up to T.
    A row of length 0 is idle as well. What the cache holds from `length` on has no effect, even if it is NaN.
    """
    assert k.shape == v.shape and q.size(2) == k.size(4) and q.size(1) % k.size(3) == 0, shapes(q, k, v)
    assert len(q) == len(slot) == len(loop) == len(length), shapes(q, slot, loop, length)
    return (decode_attention_triton if runs_triton(q) else decode_attention_sdpa)(q, k, v, slot, loop, length)


def shapes(*tensors: Tensor) -> str:
    return "shapes do not fit: " + ", ".join(str(tuple(t.shape)) for t in tensors)


# ---------------------------------------------------------------------------------------------------------------------
# Tiles: fixed here, not tuned at run time. The order of a sum (block_k, splits) depends on N, K and R, never on M.

MAX_ROWS = 128      # of a tile: for more, the weights would be read again for each tile, by a library's GEMM once
SMS = 132           # multiprocessors of an H100; a launch should have a program for each
BLOCK_R = 64        # columns of the LoRA rank per tile
SPLIT_T = 256       # positions per program of the attention


def gemm_tiles(n: int, k: int, item_size: int = 2, copies: int = 1) -> tuple[int, int, int]:
    """(block_n, block_k, splits of k) for rows times `copies` weights (n, k) in one launch."""
    block_n = 128 if n > 8192 and item_size == 2 else 64     # wide layers read x less often; in fp32 it would spill
    block_k, splits = 2**14 // (block_n * item_size), 1      # 16 KB of weight either way
    while 2 * splits * copies * -(-n // block_n) <= SMS and k >= 2 * splits * 256:
        splits *= 2
    return block_n, block_k, -(-k // split_size(k, splits, block_k))


def row_tile(m: int, item_size: int = 2) -> int:
    """Rows per tile. Weights are the tensor cores' left operand (64 at a time), so rows need no padding to 64. fp32 is
    not multiplied by tensor cores: tiles of more than 32 rows do not fit the registers."""
    return 16 if m <= 16 else 32 if item_size > 2 else 64 if m <= 64 else 128


def attention_tiles(d: int, item_size: int = 2) -> int:
    """Positions per tile of the attention, for heads of size d: fewer in fp32, again because of the registers."""
    return (64 if d > 128 else 128) // (1 if item_size == 2 else 4)


# ---------------------------------------------------------------------------------------------------------------------
# Linear layers: specification and torch path

def lora_rows_spec(x: Tensor, a: Tensor, b: Tensor, loop: Tensor) -> Tensor:
    own = loop.clamp(min=0)
    y = torch.bmm(b[own], torch.bmm(a[own], x[:, :, None]))[:, :, 0]        # (M, O, R) (M, R, C) (M, C, 1): (M, O)
    return y.masked_fill(loop[:, None] < 0, 0)


def linear_rows_spec(x: Tensor, w: Tensor, a: Tensor | None, b: Tensor | None, loop: Tensor,
                     bias: Tensor | None = None) -> Tensor:
    y = torch.bmm(w.expand(len(x), -1, -1), x[:, :, None])[:, :, 0]         # (M, O)
    if a is not None:
        y = y + lora_rows_spec(x, a, b, loop)
    if bias is not None:
        y = y + (bias if bias.dim() == 1 else bias[loop.clamp(min=0)])
    return y.masked_fill(loop[:, None] < 0, 0)


def lora_rows_concat(x: Tensor, a: Tensor, b: Tensor, loop: Tensor) -> Tensor:
    """Two GEMMs around a mask, as in the paper. The second reads b as (O, n_loop * R), without a copy if b is stored
    that way: b = stacked.view(O, n_loop, R).transpose(0, 1)."""
    n_loop, rank, _ = a.shape
    z = F.linear(x, a.flatten(0, 1)).unflatten(1, (n_loop, rank))           # (M, n_loop, R)
    own = loop[:, None, None] == torch.arange(n_loop, device=x.device)[:, None]
    z = torch.where(own, z, 0).flatten(1)                                   # not a product: idle rows may be NaN
    return F.linear(z, b.transpose(0, 1).flatten(1))


def linear_rows_concat(x: Tensor, w: Tensor, a: Tensor | None, b: Tensor | None, loop: Tensor,
                       bias: Tensor | None = None) -> Tensor:
    return linear_rows_library(x, w, a, b, loop, bias, lora_rows_concat)


def linear_rows_library(x: Tensor, w: Tensor, a: Tensor | None, b: Tensor | None, loop: Tensor,
                        bias: Tensor | None = None, lora: Callable = lora_rows) -> Tensor:
    y = F.linear(x, w, bias if bias is not None and bias.dim() == 1 else None)
    if a is not None:
        y = y + lora(x, a, b, loop)
    if bias is not None and bias.dim() == 2:
        y = y + bias[loop.clamp(min=0)]
    return torch.where(loop[:, None] >= 0, y, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Linear layers: Triton. Tiles are weights × rows, the product transposed: x is the operand that may be 16 wide.

@jit
def _dot(left, right, acc):
    """acc + left right, in fp32."""
    if INTERPRET:  # the interpreter multiplies bf16 as if it were integers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision="ieee")


@jit
def _finish(y, row_loop, n, bias, stride_bias, N):
    """y plus the bias of each row's loop; zeros where the row is idle."""
    if bias is not None:
        y += tl.load(bias + tl.maximum(row_loop, 0) * stride_bias + n, n < N, other=0.0).to(tl.float32)
    return tl.where(row_loop >= 0, y, 0.0)


@jit
def _shrink(x, a, loops, z, M, R, K, stride_xm, stride_al, stride_ar, stride_zs, k_chunk,
            BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """z[split, m] = A_l x[m], summed over the split's part of K. Each program has one loop and writes the rows at that
    loop, so no two programs write the same element; idle rows are not written."""
    tiles = tl.cdiv(R, BLOCK_R)
    loop = tl.program_id(0) // tiles
    r = (tl.program_id(0) % tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    here = tl.load(loops + m, m < M, other=-1) == loop
    if tl.max(here.to(tl.int32), 0) > 0:
        acc = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
        for k0 in range(split * k_chunk, tl.minimum((split + 1) * k_chunk, K), BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            in_a = (r < R)[:, None] & (k < K)[None, :]
            at = tl.load(a + loop * stride_al + r[:, None] * stride_ar + k[None, :], in_a, other=0.0)
            xt = tl.load(x + m[None, :] * stride_xm + k[:, None], here[None, :] & (k < K)[:, None], other=0.0)
            acc = _dot(at, xt, acc)
        tl.store(z + split * stride_zs + m[None, :] * R + r[:, None], acc, here[None, :] & (r < R)[:, None])


@jit
def _linear(x, w, z, b, loops, bias, y, M, N, K, R, n_loop, stride_xm, stride_wn, stride_bl, stride_bn, stride_bias,
            stride_ys, k_chunk, r_chunk, PARTIAL: tl.constexpr,
            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr):
    """y[m] = W x[m] (unless w is None) + B_l z[m] in one accumulator; if PARTIAL, the split's part of both sums."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    row_loop = tl.load(loops + m, m < M, other=-1)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if w is not None:
        for k0 in range(split * k_chunk, tl.minimum((split + 1) * k_chunk, K), BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            in_w = (n < N)[:, None] & (k < K)[None, :]
            wt = tl.load(w + n.to(tl.int64)[:, None] * stride_wn + k[None, :], in_w, other=0.0)
            xt = tl.load(x + m[None, :] * stride_xm + k[:, None], (m < M)[None, :] & (k < K)[:, None], other=0.0)
            acc = _dot(wt, xt, acc)
    if z is not None:
        for loop in range(n_loop):
            here = row_loop == loop
            if tl.max(here.to(tl.int32), 0) > 0:  # else no row of the tile is at this loop
                for r0 in range(split * r_chunk, tl.minimum((split + 1) * r_chunk, R), BLOCK_R):
                    r = r0 + tl.arange(0, BLOCK_R)
                    in_b, in_z = (n < N)[:, None] & (r < R)[None, :], here[None, :] & (r < R)[:, None]
                    bt = tl.load(b + loop * stride_bl + n[:, None] * stride_bn + r[None, :], in_b, other=0.0)
                    zt = tl.load(z + m[None, :] * R + r[:, None], in_z, other=0.0)
                    acc = _dot(bt, zt, acc)
    if not PARTIAL:
        acc = _finish(acc, row_loop[None, :], n[:, None], bias, stride_bias, N)
    tl.store(y + split * stride_ys + m[None, :] * N + n[:, None], acc, (m < M)[None, :] & (n < N)[:, None])


@jit
def _sum_splits(part, loops, bias, y, N, stride_bias, stride_part, splits, BLOCK_N: tl.constexpr):
    """y[m] = part[0, m] + part[1, m] + …, always in this order."""
    m = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for split in range(splits):
        acc += tl.load(part + split * stride_part + m * N + n, n < N, other=0.0)
    tl.store(y + m * N + n, _finish(acc, tl.load(loops + m), n, bias, stride_bias, N), n < N)


def lora_rows_triton(x: Tensor, a: Tensor, b: Tensor, loop: Tensor) -> Tensor:
    return expand_rows(x, None, shrink_rows(x, a, loop), b, loop, None)


def linear_rows_triton(x: Tensor, w: Tensor, a: Tensor | None, b: Tensor | None, loop: Tensor,
                       bias: Tensor | None = None) -> Tensor:
    return expand_rows(x, w, None if a is None else shrink_rows(x, a, loop), b, loop, bias)


def shrink_rows(x: Tensor, a: Tensor, loop: Tensor) -> Tensor:
    """A_l x (M, R) in x's dtype, rounded once. Idle rows are undefined."""
    x, a, loop = along_rows(x), along_rows(a), loop.contiguous()
    (m, k), (n_loop, rank, _) = x.shape, a.shape
    block_r, block_k, splits = gemm_tiles(rank, k, x.element_size(), copies=2)  # typically rows are at two loops
    z = x.new_empty(m, rank)
    part = z if splits == 1 else x.new_empty(splits, m, rank, dtype=torch.float32)
    block_m = row_tile(m, x.element_size())
    _shrink[n_loop * -(-rank // block_r), -(-m // block_m), splits](
        x, a, loop, part, m, rank, k, x.stride(0), *a.stride()[:2], m * rank, split_size(k, splits, block_k),
        BLOCK_M=block_m, BLOCK_R=block_r, BLOCK_K=block_k, num_warps=4, num_stages=4)
    if splits > 1:
        _sum_splits[m, -(-rank // 1024)](part, loop, None, z, rank, 0, m * rank, splits, BLOCK_N=1024)
    return z


def expand_rows(x: Tensor, w: Tensor | None, z: Tensor | None, b: Tensor | None, loop: Tensor,
                bias: Tensor | None) -> Tensor:
    """W x + B_l z + bias (M, O), without the terms that are None."""
    x, loop = along_rows(x), loop.contiguous()
    (m, k), (n_loop, n, rank) = x.shape, b.shape if z is not None else (0, len(w), 0)
    block_n, block_k, splits = gemm_tiles(n, k, x.element_size()) if w is not None else (64, 64, 1)
    block_m = row_tile(m, x.element_size())
    w, b, bias = (along_rows(t) if t is not None else None for t in (w, b, bias))
    stride_wn = w.stride(0) if w is not None else 0
    stride_bl, stride_bn = b.stride()[:2] if z is not None else (0, 0)
    stride_bias = bias.stride(0) if bias is not None and bias.dim() == 2 else 0
    y = x.new_empty(m, n)
    part = y if splits == 1 else x.new_empty(splits, m, n, dtype=torch.float32)
    _linear[-(-n // block_n), -(-m // block_m), splits](
        x, w, z, b, loop, bias if splits == 1 else None, part, m, n, k, rank, n_loop, x.stride(0), stride_wn, stride_bl,
        stride_bn, stride_bias, m * n, split_size(k, splits, block_k), split_size(rank, splits, BLOCK_R),
        PARTIAL=splits > 1, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_R=BLOCK_R,
        num_warps=8 if block_m * block_n > 64 * 128 else 4, num_stages=4)   # four warps would spill registers
    if splits > 1:
        _sum_splits[m, -(-n // 1024)](part, loop, bias, y, n, stride_bias, m * n, splits, BLOCK_N=1024)
    return y


def split_size(total: int, splits: int, block: int) -> int:
    """Elements of `total` per split, a multiple of `block`."""
    return -(-total // (splits * block)) * block


def along_rows(t: Tensor) -> Tensor:
    """`t` itself if its last dimension is contiguous, which the kernels assume; else a contiguous copy."""
    return t if t.stride(-1) == 1 else t.contiguous()


# ---------------------------------------------------------------------------------------------------------------------
# Attention: specification and torch path

def decode_attention_spec(q: Tensor, k: Tensor, v: Tensor, slot: Tensor, loop: Tensor, length: Tensor) -> Tensor:
    y, group = torch.zeros_like(q), q.size(1) // k.size(3)
    for m in range(len(q)):
        if loop[m] < 0 or length[m] == 0:
            continue
        for h in range(q.size(1)):
            keys, values = (c[slot[m], loop[m], :length[m], h // group] for c in (k, v))    # (length, D)
            y[m, h] = torch.softmax(keys @ q[m, h] / q.size(2)**0.5, dim=0) @ values
    return y


def decode_attention_sdpa(q: Tensor, k: Tensor, v: Tensor, slot: Tensor, loop: Tensor, length: Tensor) -> Tensor:
    place = slot.clamp(min=0), loop.clamp(min=0)
    active = (loop >= 0) & (length > 0)                                     # (M,)
    valid = torch.arange(k.size(2), device=q.device) < length[:, None]      # (M, T)
    k, v = (torch.where(valid[:, :, None, None], c[place], 0).transpose(1, 2) for c in (k, v))     # (M, K, T, D)
    mask = (valid | ~active[:, None])[:, None, None]                        # not empty for idle rows: that gives NaN
    grouped = q.view(len(q), k.size(1), -1, q.size(2))                      # the query heads of a key head as queries
    y = F.scaled_dot_product_attention(grouped, k, v, mask).reshape(q.shape)
    return torch.where(active[:, None, None], y, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Attention: Triton. In `_attend` a program reads SPLIT positions of one row and key head, for all its query heads.
# `_merge` adds up a row's splits in order. Their size is fixed, so a row's sums do not depend on other rows.

@jit
def _attend(q, k, v, slots, loops, lengths, part, top, total, stride_qm, stride_qh, stride_ks, stride_kl, stride_kt,
            stride_kh, stride_kd, stride_vs, stride_vl, stride_vt, stride_vh, stride_vd, scale, D,
            GROUP: tl.constexpr, SPLIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr,
            BLOCK_D: tl.constexpr):
    """Per split: `top`, the highest q k; `total`, the sum of p = exp2((q k - top) scale); `part`, the sum of p v."""
    m, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    loop = tl.load(loops + m).to(tl.int64)
    end = tl.where(loop < 0, 0, tl.load(lengths + m))
    if split * SPLIT < end:  # else the split is empty, and `_merge` does not read it
        slot = tl.load(slots + m).to(tl.int64)
        k += slot * stride_ks + loop * stride_kl + head * stride_kh
        v += slot * stride_vs + loop * stride_vl + head * stride_vh
        g, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
        h = head * GROUP + g
        heads = (g < GROUP)[:, None] & (d < D)[None, :]
        qt = tl.load(q + m * stride_qm + h[:, None] * stride_qh + d[None, :], heads, other=0.0)
        high = tl.full((BLOCK_G,), float("-inf"), tl.float32)
        norm = tl.zeros((BLOCK_G,), tl.float32)
        acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
        for t0 in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, end), BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            in_k, in_v = (t < end)[None, :] & (d < D)[:, None], (t < end)[:, None] & (d < D)[None, :]
            kt = tl.load(k + t[None, :] * stride_kt + d[:, None] * stride_kd, in_k, other=0.0)
            score = _dot(qt, kt, tl.zeros((BLOCK_G, BLOCK_T), tl.float32))
            score = tl.where((t < end)[None, :], score, float("-inf"))
            higher = tl.maximum(high, tl.max(score, 1))
            p, fade = tl.exp2((score - higher[:, None]) * scale), tl.exp2((high - higher) * scale)
            vt = tl.load(v + t[:, None] * stride_vt + d[None, :] * stride_vd, in_v, other=0.0)
            acc = _dot(p.to(vt.dtype), vt, acc * fade[:, None])
            norm, high = norm * fade + tl.sum(p, 1), higher
        place = (m * tl.num_programs(1) * GROUP + h) * tl.num_programs(2) + split
        tl.store(part + place[:, None] * D + d[None, :], acc, heads)
        tl.store(top + place, high, g < GROUP)
        tl.store(total + place, norm, g < GROUP)


@jit
def _merge(part, top, total, loops, lengths, y, scale, D, splits, SPLIT: tl.constexpr, BLOCK_D: tl.constexpr):
    """y[m, h] = the sum of all splits' `part`, divided by that of their `total`, both rescaled to the highest `top`."""
    m, h = tl.program_id(0), tl.program_id(1)
    end = tl.where(tl.load(loops + m) < 0, 0, tl.load(lengths + m))
    d = tl.arange(0, BLOCK_D)
    row = m * tl.num_programs(1) + h
    high, norm, acc = float("-inf"), 0.0, tl.zeros((BLOCK_D,), tl.float32)
    for split in range(tl.cdiv(end, SPLIT)):
        place = row * splits + split
        here = tl.load(top + place)
        higher = tl.maximum(high, here)
        fade, weight = tl.exp2((high - higher) * scale), tl.exp2((here - higher) * scale)
        acc = acc * fade + tl.load(part + place * D + d, d < D, other=0.0) * weight
        norm, high = norm * fade + tl.load(total + place) * weight, higher
    tl.store(y + row * D + d, tl.where(end > 0, acc / norm, 0.0), d < D)


def decode_attention_triton(q: Tensor, k: Tensor, v: Tensor, slot: Tensor, loop: Tensor, length: Tensor) -> Tensor:
    q, slot, loop, length = along_rows(q), slot.contiguous(), loop.contiguous(), length.contiguous()
    (m, h, d), n_head = q.shape, k.size(3)
    splits, group, block_d = -(-k.size(2) // SPLIT_T), h // n_head, max(16, triton.next_power_of_2(d))
    part = q.new_empty(m, h, splits, d, dtype=torch.float32)
    top, total = part.new_empty(m, h, splits), part.new_empty(m, h, splits)
    y, scale = q.new_empty(m, h, d), math.log2(math.e) / d**0.5             # exp(x) is exp2(x log2(e))
    _attend[m, n_head, splits](
        q, k, v, slot, loop, length, part, top, total, *q.stride()[:2], *k.stride(), *v.stride(),
        scale, d, GROUP=group, SPLIT=SPLIT_T, BLOCK_T=attention_tiles(d, q.element_size()),
        BLOCK_G=max(16, triton.next_power_of_2(group)), BLOCK_D=block_d, num_warps=4, num_stages=2)
    _merge[m, h](part, top, total, loop, length, y, scale, d, splits, SPLIT=SPLIT_T, BLOCK_D=block_d)
    return y
