"""
The whole model in one file: a Relaxed Recursive Transformer.

A decoder-only Transformer whose depth is a loop: a block of n_layer / n_loop stored layers is applied n_loop times
(Eq. 2, the CYCLE pattern), and every linear layer of the block may add a low-rank matrix for each loop (Eq. 3).
Two special cases of the same class:

    n_loop=1, rank=0   the ordinary, full-size Transformer (Eq. 1; what convert.py reads from Hugging Face)
    n_loop>1, rank=0   the strictly tied Recursive Transformer

Shapes in comments: B batch, T time, C width, H query heads, K key/value heads, D head size, V vocabulary size,
R LoRA rank, M rows at loops of their own (engine.py). The paper's B (number of loops) is always `n_loop` here, and its
K (number of stored layers) `n_unique`.

Paper: Relaxed Recursive Transformers, https://arxiv.org/abs/2410.20672
"""

import functools
import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lib import checks
from lib.cli import UserError
from lib.folders import replace_folder, settled

Arch = Literal["gemma", "llama", "gpt_neox", "mistral", "qwen2", "qwen3", "smollm3"]  # the last four as llama


@dataclass
class Config:
    vocab_size: int = 4096     # V
    n_layer: int = 12          # layers run per token; n_layer // n_loop of them are stored
    n_loop: int = 1            # how many times the block of stored layers runs (the paper's B)
    rank: int = 0              # R, rank of the per-loop LoRA; 0 = strictly tied
    vectors: Literal["tied", "per_loop"] = "tied"  # norm weights and biases: shared (paper), or one per loop
    kv: Literal["own", "first_loop"] = "own"  # keys and values: of each loop (paper), or the first loop's for all
    n_embd: int = 192          # C
    n_head: int = 4            # H
    n_kv_head: int = 1         # K; 1 = multi-query (Gemma), < H = grouped-query (TinyLlama), H = multi-head (Pythia)
    head_dim: int = 48         # D, not always n_embd // n_head (Gemma 7B)
    n_hidden: int = 512        # width of the MLP
    n_ctx: int = 512           # longest sequence the donor was trained on
    arch: Arch = "gemma"       # the family: decides norm, MLP and embedding scale
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rotary_pct: float = 1.0    # share of each head that is rotated (Pythia: 0.25)
    tie_head: bool = True      # the head is the embedding (Gemma)
    rope_llama3: list[float] | None = None  # factor, low and high frequency factor, original context (Llama 3.1)
    no_rope: list[int] | None = None  # depths (loop * n_unique + layer) whose q and k are not rotated (SmolLM3)
    qk_norm: bool = False      # RMSNorm over each head of q and k, before the rotation (Qwen 3)
    attn_bias: bool = False    # biases on q, k, v, o (Pythia)
    o_bias: bool = True        # with attn_bias, on o too (not Qwen 2)
    mlp_bias: bool = False     # biases on the MLP (Pythia)
    parallel: bool = False     # attention and MLP read the same input (Pythia)
    bos_token_id: int | None = None  # the donor's begin-of-text id
    eos_token_id: int | list[int] | None = None  # the donor's end-of-text id, or ids
    extra: dict = field(default_factory=dict)    # other settings of the donor, which an export writes back

    def __post_init__(self):
        checks.check_config(self)                                        # UserError for values that make no model

    @property
    def n_unique(self) -> int:
        """Number of stored layers, the paper's K = L / B."""
        return self.n_layer // self.n_loop

    @property
    def vector_loops(self) -> int | None:
        """How many of each norm weight and bias are stored: one per loop, or None if the loops share one."""
        return self.n_loop if self.vectors == "per_loop" else None

    @property
    def kv_loops(self) -> int:
        """How many loops compute keys and values, and so how many times n_unique layers a cache holds."""
        return 1 if self.kv == "first_loop" else self.n_loop

    def loops_of(self, name: str) -> int:
        """In how many loops a part of a stored layer runs, by its name: `attn.k`, `layers.0.mlp.up.weight`."""
        return self.kv_loops if {"k", "k_norm", "v"} & set(name.split(".")) else self.n_loop

    def rotates(self, loop: int, i: int) -> bool:
        """True if layer i rotates q and k at `loop`: by its depth, or with kv="first_loop" by that of the keys."""
        return min(loop, self.kv_loops - 1) * self.n_unique + i not in (self.no_rope or ())

    def architecture(self) -> dict:
        """The settings that determine what the model computes."""
        ignored = {"bos_token_id", "eos_token_id", "extra"}
        return {name: value for name, value in asdict(self).items() if name not in ignored}


class RelaxedLinear(nn.Module):
    """y = W'x + B_l A_l x: W' shared by all loops, (A_l, B_l) for loop l only (Eq. 3). No alpha/r scaling."""

    def __init__(self, d_in: int, d_out: int, config: Config, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in).normal_(std=0.02))
        self.bias = per_loop_param(d_out, 0.0, config.vector_loops) if bias else None
        self.rank = min(config.rank, d_in, d_out)  # less for narrow layers (multi-query keys)
        if self.rank:
            self.lora_a = nn.Parameter(torch.randn(config.n_loop, self.rank, d_in) / d_in**0.5)
            self.lora_b = nn.Parameter(torch.zeros(config.n_loop, d_out, self.rank))

    def merged(self, loop: int) -> Tensor:
        """The weight (d_out, d_in) of `loop`, W' + B_l A_l: summed in fp32 or wider, then rounded to the dtype of W'.

        Under autocast the product B_l A_l itself is in bf16.
        """
        if not self.rank:
            return self.weight
        delta = upcast(self.lora_b[loop]) @ upcast(self.lora_a[loop])
        return (upcast(self.weight) + delta).type_as(self.weight)

    def forward(self, x: Tensor, loop: int | Tensor) -> Tensor:
        """(..., d_out) for x (..., d_in) at one loop, or (M, d_out) for rows x (M, d_in) at loops (M,)."""
        if isinstance(loop, Tensor):
            a, b = (self.lora_a, self.lora_b) if self.rank else (None, None)
            return row_kernels().linear_rows(x, self.weight, a, b, loop, self.bias)
        weight, bias = self.weight, None if self.bias is None else select_loop(self.bias, loop)
        if not self.rank:
            return F.linear(x, weight, bias)
        d_out, d_in = weight.shape
        tokens = x.numel() // d_in
        # W' + BA costs R * d_in * d_out to build, A and B apart R * tokens * (d_in + d_out): less for few tokens.
        if tokens * (d_in + d_out) < d_in * d_out:
            return F.linear(x, weight, bias) + F.linear(F.linear(x, self.lora_a[loop]), self.lora_b[loop])
        return F.linear(x, self.merged(loop), bias)


@functools.cache
def row_kernels():
    """kernels.py: only rows at loops of their own need it, so it is imported at the first."""
    import kernels
    return kernels


def upcast(x: Tensor) -> Tensor:
    """`x` in fp32 if it is in half precision, else unchanged (fp64 stays fp64)."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


# ---------------------------------------------------------------------------------------------------------------------
# Norm weights and biases: tied over the loops like the matrices (paper), or with n_loop one per loop

def per_loop_param(size: int, fill: float, n_loop: int | None) -> nn.Parameter:
    """A parameter (size,) that all loops share, or (n_loop, size) with one vector per loop."""
    return nn.Parameter(torch.full((size,) if n_loop is None else (n_loop, size), fill))


def select_loop(p: Tensor, loop: int | Tensor) -> Tensor:
    """The vector (size,) of `loop`, or (M, size) for M rows at loops (M,)."""
    return p if p.dim() == 1 else p[loop]


class RMSNorm(nn.Module):
    """x * rsqrt(mean(x²) + eps) * scale, computed in fp32 (Gemma, Llama)."""

    def __init__(self, size: int, eps: float, gemma: bool, n_loop: int | None = None):
        super().__init__()
        self.eps, self.gemma = eps, gemma
        self.scaled_eps = torch.tensor((size * eps) ** 0.5, dtype=torch.float64, device="cpu")
        self.weight = per_loop_param(size, 0.0 if gemma else 1.0, n_loop)    # Gemma stores scale - 1
        self.bias = None

    def forward(self, x: Tensor, loop: int | Tensor = 0) -> Tensor:
        weight, wide = select_loop(self.weight, loop), upcast(x)
        if x.device.type == "cpu":
            y = rms_norm_cpu(wide, self.scaled_eps)                      # the same with fewer operations
        else:
            y = F.rms_norm(wide, x.shape[-1:], eps=self.eps)             # x * rsqrt(mean(x²) + eps)
        if self.gemma:                                                   # Gemma multiplies in fp32 and casts last
            return torch.addcmul(y, y, upcast(weight)).to(x.dtype)       # y * (1 + weight)
        return y.to(x.dtype) * weight                                    # Llama casts first


def rms_norm_cpu(x: Tensor, scaled_eps: Tensor) -> Tensor:
    """x * rsqrt(mean(x²) + eps), written as sqrt(C) x / sqrt(|x|² + C eps) with scaled_eps = sqrt(C eps): four
    operations instead of nine, which saves an eighth of the time of decoding with a small model."""
    length = torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), scaled_eps)
    return x / (length * x.size(-1)**-0.5)


class LayerNorm(nn.Module):
    """LayerNorm with weight and bias (GPT-NeoX)."""

    def __init__(self, size: int, eps: float, n_loop: int | None = None):
        super().__init__()
        self.eps = eps
        self.weight, self.bias = per_loop_param(size, 1.0, n_loop), per_loop_param(size, 0.0, n_loop)

    def forward(self, x: Tensor, loop: int | Tensor = 0) -> Tensor:
        weight, bias = select_loop(self.weight, loop), select_loop(self.bias, loop)
        if weight.dim() == 1:
            return F.layer_norm(x, x.shape[-1:], weight, bias, self.eps)
        return F.layer_norm(x, x.shape[-1:], eps=self.eps) * weight + bias


def make_norm(config: Config, n_loop: int | None = None) -> RMSNorm | LayerNorm:
    if config.arch == "gpt_neox":
        return LayerNorm(config.n_embd, config.norm_eps, n_loop)
    return RMSNorm(config.n_embd, config.norm_eps, config.arch == "gemma", n_loop)


# ---------------------------------------------------------------------------------------------------------------------
# Rotary embedding, attention and its cache

def rope_angles(pos: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """cos and signed sin (T, 1, rotated), in fp32, that `rotate` needs at positions `pos` (T,)."""
    rotated = int(config.head_dim * config.rotary_pct)
    exponent = torch.arange(0, rotated, 2, device=pos.device, dtype=torch.float32) / rotated
    freq = 1.0 / config.rope_theta**exponent                             # in the donors' order
    if config.rope_llama3:                                               # low frequencies are divided by `factor`
        factor, low, high, n_ctx = config.rope_llama3
        keep = ((n_ctx / (2 * math.pi / freq) - low) / (high - low)).clamp(0, 1)
        freq = (1 - keep) * freq / factor + keep * freq
    angle = pos.float()[:, None, None] * freq
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """x (B, T, heads, D) with its pairs (j, j + rotated/2) rotated; dimensions from `rotated` on stay unchanged.
    Angles are (T, 1, rotated), or (B, T, 1, rotated) where sequences are at positions of their own.

    (a, b) becomes (a cos - b sin, b cos + a sin): x times cos, plus x with halves swapped, times signed sin.
    """
    cos, sin = rope
    rotated = cos.size(-1)
    if rotated < x.size(-1):
        return torch.cat([rotate(x[..., :rotated], rope), x[..., rotated:]], -1)
    wide = upcast(x)
    return torch.addcmul(wide * cos, wide.roll(rotated // 2, -1), sin).type_as(x)


def rope_at(rope: tuple[Tensor, Tensor], config: Config, loop: int | Tensor, i: int) -> tuple[Tensor, Tensor]:
    """`rope` where layer i rotates at `loop`, an int or (T,); elsewhere cos 1 and sin 0, which `rotate` nothing."""
    still = [n for n in range(config.n_loop) if not config.rotates(n, i)] if config.no_rope else []
    if not still:
        return rope
    on = 1 - sum(loop == n for n in still)                               # 0 or 1, or (T,) of them
    on = on[:, None, None] if isinstance(loop, Tensor) else on
    return rope[0] * on + (1 - on), rope[1] * on


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v at the last T of n positions: q (B, T, H, D), k and v (B, K, n, D) -> (B, T, H, D).

    mask (B, 1, T, n): True where a token attends, for padded sequences; None is to every token up to it."""
    q, T, n = q.transpose(1, 2), q.size(1), k.size(2)
    if mask is None and 1 < T < n:                                       # is_causal aligns its mask to the first key
        mask = torch.ones(T, n, dtype=torch.bool, device=q.device).tril(n - T)
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=T > 1 and mask is None,
                                       enable_gqa=q.size(1) != k.size(1))
    return y.transpose(1, 2)


class KVCache:
    """Keys and values of every depth. A stored layer runs at n_loop depths, so each (loop, layer) has its own, at
    depth loop * n_unique + layer; with kv="first_loop" only those of the first loop are held. All memory is allocated
    at the start."""

    def __init__(self, config: Config, batch: int, max_len: int, device="cpu", dtype=torch.float32):
        shape = (config.kv_loops * config.n_unique, batch, config.n_kv_head, max_len, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.depths = list(zip(self.k, self.v, strict=True))
        self.rope = rope_angles(torch.arange(max_len, device=device), config)
        self.n_unique, self.kv_loops = config.n_unique, config.kv_loops
        self.lengths = [0] * self.kv_loops    # positions held per loop: fewer in loops that early exits skip
        self.exited: Tensor | None = None     # (B, T) new tokens whose KV `attend` copies from the loop before

    def kv_loop(self, loop: int) -> int | None:
        """The loop whose weights give the keys and values that `loop` adds, or None if it adds none."""
        return loop if loop < self.kv_loops else None

    def extend(self, loop: int, T: int) -> tuple[Tensor, Tensor]:
        """Rotary angles of the next T positions at `loop`, which `attend` then fills; where `loop` adds none, of the
        newest T. UserError if it is full."""
        if loop < self.kv_loops:
            if self.lengths[loop] + T > self.k.size(3):
                raise UserError(f"{self.lengths[loop] + T} tokens do not fit a cache made for {self.k.size(3)}")
            self.lengths[loop] += T
        end = self.lengths[min(loop, self.kv_loops - 1)]
        return self.rope[0][end - T:end], self.rope[1][end - T:end]

    def attend(self, loop: int, layer: int, q: Tensor, k: Tensor | None, v: Tensor | None) -> Tensor:
        """Attention of q (B, T, H, D) to all that is stored, after k and v (B, T, K, D) of the new tokens, if any."""
        loop = min(loop, self.kv_loops - 1)
        depth, end = loop * self.n_unique + layer, self.lengths[loop]
        keys, values = self.depths[depth]
        if k is not None:
            new = slice(end - k.size(1), end)
            k, v = k.transpose(1, 2), v.transpose(1, 2)                  # (B, K, T, D), as they are stored
            if self.exited is not None:
                exited, before = self.exited[:, None, :, None], depth - self.n_unique
                k = torch.where(exited, self.k[before, :, :, new], k)
                v = torch.where(exited, self.v[before, :, :, new], v)
            keys[:, :, new], values[:, :, new] = k, v
        return causal_attention(q, keys[:, :, :end], values[:, :, :end])

    def copy_loop(self, loop: int) -> None:
        """Copied KV, once no token runs on: fill the positions that `loop` lacks from the loop before.

        While some tokens run on, `exited` does the same; in the engine, SlotCache.copy_to_later_loops.
        """
        start, end, n = self.lengths[loop], self.lengths[loop - 1], self.n_unique
        for cache in (self.k, self.v):
            cache[loop * n:(loop + 1) * n, :, :, start:end] = cache[(loop - 1) * n:loop * n, :, :, start:end]
        self.lengths[loop] = end


class FirstLoopKV:
    """kv="first_loop" where nothing is decoded: a KVCache for one forward pass over T tokens, for autograd too."""

    def __init__(self, config: Config, T: int, device):
        self.rope = rope_angles(torch.arange(T, device=device), config)
        self.kv: list[tuple[Tensor, Tensor]] = [()] * config.n_unique    # (B, T, K, D) of each layer

    def kv_loop(self, loop: int) -> int | None:
        return 0 if loop == 0 else None

    def extend(self, loop: int, T: int) -> tuple[Tensor, Tensor]:
        return self.rope

    def attend(self, loop: int, layer: int, q: Tensor, k: Tensor | None, v: Tensor | None) -> Tensor:
        if k is not None:
            self.kv[layer] = k, v
        k, v = self.kv[layer]
        return causal_attention(q, k.transpose(1, 2), v.transpose(1, 2))


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        C, H, K, D = config.n_embd, config.n_head, config.n_kv_head, config.head_dim
        self.n_head, self.n_kv_head, self.head_dim = H, K, D
        self.q = RelaxedLinear(C, H * D, config, config.attn_bias)
        for_kv = replace(config, n_loop=config.kv_loops, kv="own")       # LoRA and biases of loops that compute them
        self.k = RelaxedLinear(C, K * D, for_kv, config.attn_bias)
        self.v = RelaxedLinear(C, K * D, for_kv, config.attn_bias)
        self.o = RelaxedLinear(H * D, C, config, config.attn_bias and config.o_bias)
        self.config, self.q_norm, self.k_norm = config, None, None
        if config.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(D, config.norm_eps, config.arch == "gemma", c.vector_loops)
                                        for c in (config, for_kv))

    def forward(self, x: Tensor, rope, loop: int | Tensor, layer: int, cache) -> Tensor:
        T, D = rope[0].size(-3), self.head_dim                               # x (B T, C)
        rope = rope_at(rope, self.config, loop, layer)
        q = self.rotated(self.q(x, loop).view(-1, T, self.n_head, D), self.q_norm, loop, rope)  # (B, T, H, D)
        k = v = None
        kv_loop = loop if cache is None else cache.kv_loop(loop)
        if kv_loop is not None:
            k = self.k(x, kv_loop).view(-1, T, self.n_kv_head, D)        # (B, T, K, D)
            k = self.rotated(k, self.k_norm, kv_loop, rope)
            v = self.v(x, kv_loop).view(-1, T, self.n_kv_head, D)        # (B, T, K, D)
        if cache is None:
            y = causal_attention(q, k.transpose(1, 2), v.transpose(1, 2))    # (B, T, H, D)
        else:
            y = cache.attend(loop, layer, q, k, v)
        return self.o(y.reshape(x.size(0), -1), loop)                    # (B T, C)

    def rotated(self, x: Tensor, norm: RMSNorm | None, loop: int | Tensor, rope) -> Tensor:
        """x (B, T, heads, D) after the norm of its heads, if there is one, and the rotation."""
        if norm is not None:
            x = norm(x.transpose(1, 2), loop).transpose(1, 2)            # T next to D: so are weights of each row
        return rotate(x, rope)


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        C, n_hidden, bias = config.n_embd, config.n_hidden, config.mlp_bias
        self.arch = config.arch
        self.gate = RelaxedLinear(C, n_hidden, config, bias) if config.arch != "gpt_neox" else None
        self.up = RelaxedLinear(C, n_hidden, config, bias)
        self.down = RelaxedLinear(n_hidden, C, config, bias)

    def forward(self, x: Tensor, loop: int | Tensor) -> Tensor:
        up = self.up(x, loop)                                            # (B T, n_hidden)
        if self.arch == "gpt_neox":
            hidden = F.gelu(up)
        elif self.arch == "gemma":
            hidden = F.gelu(self.gate(x, loop), approximate="tanh") * up
        else:
            hidden = F.silu(self.gate(x, loop)) * up
        return self.down(hidden, loop)


class Layer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.parallel, n_loop = config.parallel, config.vector_loops
        self.norm1, self.attn = make_norm(config, n_loop), Attention(config)
        self.norm2, self.mlp = make_norm(config, n_loop), MLP(config)

    def forward(self, x: Tensor, rope, loop: int | Tensor, layer: int, cache=None) -> Tensor:
        """The states (B T, C) after this layer, for x (B T, C) of B sequences of T = rope[0].size(-3) tokens.

        `layer` is its index in the block: with `loop` it gives the depth, which the cache and `no_rope` need.
        """
        y = x + self.attn(self.norm1(x, loop), rope, loop, layer, cache)
        return y + self.mlp(self.norm2(x if self.parallel else y, loop), loop)


class RecursiveTransformer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.checkpointing = False  # True: store only the layers' inputs and recompute the rest in backward
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_unique))
        self.norm = make_norm(config)                                    # shared by all exits
        self.head = None if config.tie_head else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for layer in self.layers:  # as GPT-2: smaller weights where a layer adds to the residual stream
            for linear in (layer.attn.o, layer.mlp.down):
                nn.init.normal_(linear.weight, std=0.02 / (2 * config.n_layer) ** 0.5)

    def forward(self, idx: Tensor, cache: KVCache | None = None, loops: int | None = None) -> list[Tensor]:
        """Hidden states (B, T, C) after each loop, or each of the first `loops`, for token ids `idx` (B, T) int64.

        With a cache, the tokens continue the sequences it holds and are added to it.
        """
        x, states = self.first_state(idx), []
        cache = cache or self.first_loop_kv(idx)
        for loop in range(loops or self.config.n_loop):                  # Eq. 2: the same layers, n_loop times
            x = self.block(x, loop, cache)
            states.append(x)
        return states

    def first_state(self, idx: Tensor) -> Tensor:
        """The first loop's input (B, T, C): the embeddings of token ids `idx` (B, T)."""
        x = self.embed(idx)
        if self.config.arch == "gemma":                                  # sqrt(C), rounded as in its training
            x = x * torch.tensor(self.config.n_embd**0.5, dtype=x.dtype)
        return x

    def first_loop_kv(self, idx: Tensor) -> FirstLoopKV | None:
        """The `cache` with which `block` runs idx (B, T) without KVCache; None unless kv="first_loop"."""
        return FirstLoopKV(self.config, idx.size(1), idx.device) if self.config.kv == "first_loop" else None

    def block(self, x: Tensor, loop: int | Tensor, cache=None) -> Tensor:
        """The states (B, T, C) after loop number `loop`: one pass of x (B, T, C) through the stored layers.

        With engine.py's cache, x (M, C) has M rows, handled as one sequence of M tokens, and `loop` (M,) a loop for
        each; the cache knows their slots and positions.
        """
        assert cache is not None or self.config.kv == "own", "kv='first_loop': every loop needs the first loop's KV"
        shape, T = x.shape, x.size(-2)
        # `extend` also reserves the next T positions of the cache.
        rope = rope_angles(torch.arange(T, device=x.device), self.config) if cache is None else cache.extend(loop, T)
        x = x.flatten(0, -2)                                             # (B T, C): only attention needs B and T apart
        for i, layer in enumerate(self.layers):
            if self.checkpointing:
                # Reentrant checkpointing hands DDP a shared weight's gradient once per loop: an error there.
                x = checkpoint(layer, x, rope, loop, i, cache, use_reentrant=False)
            else:
                x = layer(x, rope, loop, i, cache)
        return x.view(shape)

    def logits(self, x: Tensor) -> Tensor:
        """Logits (B, T, V) in fp32 of hidden states (B, T, C); all exits share final norm and head (§2.4)."""
        return upcast(F.linear(self.norm(x), self.head_weight))

    @property
    def head_weight(self) -> Tensor:
        """The weight (V, C) of the head: the embedding's if they are tied."""
        return (self.embed if self.head is None else self.head).weight

    def num_params(self) -> dict[str, int]:
        """Numbers of parameters: `stored`, and `run` per token; with `_block`, without embedding and head."""
        block, final = list(self.layers.named_parameters()), sum(p.numel() for p in self.norm.parameters())
        ends = self.embed.weight.numel() + (0 if self.head is None else self.head.weight.numel())
        stored = final + sum(p.numel() for _, p in block)
        run = final + sum(p.numel() * (1 if self.owned_by_loop(name, p) else self.config.loops_of(name))
                          for name, p in block)
        return {"stored": stored + ends, "run": run + ends, "stored_block": stored, "run_block": run}

    def flops(self, seq_len: int, n_exits: int = 1) -> int:
        """FLOPs of a forward pass per token: 2 per matrix entry that a token runs through, and causal attention over
        half of `seq_len`. Norms and LoRA are left out."""
        c = self.config
        matrices = sum(p.numel() * c.loops_of(name) for name, p in self.layers.named_parameters() if is_matrix(name))
        attention = c.n_layer * c.n_head * c.head_dim * (seq_len + 1)    # scores and values, half of T each
        return 2 * (matrices + n_exits * self.head_weight.numel() + attention)

    def owned_by_loop(self, name: str, p: Tensor) -> bool:
        """True for a parameter stacked over the loops (LoRA, vectors per loop), False for a shared one."""
        return "lora_" in name or (p.dim() == 2 and self.config.vectors == "per_loop" and not is_matrix(name))

    # -----------------------------------------------------------------------------------------------------------------
    # A checkpoint is a folder with config.json and model.safetensors (and the tokenizer, and train.pt of a run)

    def save(self, folder) -> None:
        """Replace `folder` atomically. UserError if it holds other files."""
        with replace_folder(folder) as tmp:
            self.write(tmp)

    def write(self, folder) -> None:
        config = {"format": "nanoRRT"} | asdict(self.config)
        (Path(folder) / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, Path(folder) / "model.safetensors")

    @classmethod
    def load(cls, folder, device="cpu", dtype=None) -> "RecursiveTransformer":
        """The model saved in `folder`, in eval mode; dtype None is the widest dtype that its tensors are stored in.

        UserError if the folder is missing, is not a checkpoint of ours, or is damaged.
        """
        folder = settled(folder)
        with torch.device("meta"):
            model = cls(read_config(folder))
        shapes = {name: tuple(w.shape) for name, w in model.state_dict().items()}
        tensors = checks.load_tensors(folder / "model.safetensors", shapes, device, dtype)
        model.load_state_dict(tensors, assign=True)
        return model.eval()


def is_matrix(name: str) -> bool:
    """True for the weight of a linear layer, by its name inside the block: `attn.q.weight`, `mlp.up.weight`."""
    return name.endswith(tuple(f".{kind}.weight" for kind in ("q", "k", "v", "o", "gate", "up", "down")))


def read_config(folder) -> Config:
    """The Config of the checkpoint in `folder`. UserError if there is none, or if it is not ours."""
    return checks.read_config(folder, Config)
