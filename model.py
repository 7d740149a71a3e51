"""
Full definition of a Relaxed Recursive Transformer, all of it in this single file.

A decoder-only Transformer whose depth is a loop: one block of n_layer / n_loop stored layers
is applied n_loop times (Eq. 2, the CYCLE pattern), and every linear map of the block may add a
low-rank delta of its own per loop (Eq. 3). Two corners of the same class are worth knowing:

    n_loop=1, rank=0   the ordinary, full-size Transformer (Eq. 1; what convert.py reads from Hugging Face)
    n_loop=B, rank=0   the strictly tied Recursive Transformer

Shapes in comments: B batch, T time, C width, H query heads, K key/value heads, D head size, V vocabulary,
R LoRA rank. The paper's B (number of loops) is always `n_loop` here.

Paper: Relaxed Recursive Transformers, https://arxiv.org/abs/2410.20672
"""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from functools import reduce
from pathlib import Path
from typing import Literal, get_args, get_origin

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lib.cli import UserError
from lib.folders import replace_folder, settled


@dataclass
class Config:
    vocab_size: int = 4096     # V
    n_layer: int = 12          # layers run per token; n_layer // n_loop of them are stored
    n_loop: int = 1            # how often the block of stored layers runs (the paper's B)
    rank: int = 0              # R, rank of the per-loop LoRA; 0 = strictly tied
    vectors: Literal["tied", "per_loop"] = "tied"  # norm weights and biases: shared (paper), or one per loop
    n_embd: int = 192          # C
    n_head: int = 4            # H
    n_kv_head: int = 1         # K; 1 = multi-query (Gemma), < H = grouped-query (TinyLlama), H = multi-head (Pythia)
    head_dim: int = 48         # D, not always n_embd // n_head (Gemma 7B)
    n_hidden: int = 512        # width of the MLP
    n_ctx: int = 512           # longest sequence the donor was made for
    arch: Literal["gemma", "llama", "gpt_neox"] = "gemma"  # norm, MLP and embedding of that family, see __init__s below
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rotary_pct: float = 1.0    # share of each head that is rotated (Pythia: 0.25)
    tie_head: bool = True      # the head is the embedding (Gemma)
    attn_bias: bool = False    # biases on q, k, v, o (Pythia)
    mlp_bias: bool = False     # biases on the MLP (Pythia)
    parallel: bool = False     # attention and MLP read the same input (Pythia)
    bos_token_id: int | None = None  # the donor's begin-of-text id
    eos_token_id: int | list[int] | None = None  # the donor's end-of-text id, or ids
    extra: dict = field(default_factory=dict)    # what else the donor's config.json says: nothing here, for exports

    def __post_init__(self):
        for f in fields(self):
            check_type(f.name, getattr(self, f.name))
        for name in ("vocab_size", "n_layer", "n_embd", "n_head", "n_kv_head", "head_dim", "n_hidden", "n_ctx",
                     "norm_eps", "rope_theta"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name}={getattr(self, name)} must be positive")
        if self.n_loop < 1 or self.n_layer % self.n_loop:
            raise UserError(f"{self.n_loop} loops do not divide the {self.n_layer} layers; "
                            f"use one of {', '.join(str(n) for n in divisors(self.n_layer))}")
        if self.rank < 0:
            raise UserError(f"rank {self.rank} is negative; use 0 for a tied model or a positive LoRA rank")
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_kv_head={self.n_kv_head} does not divide the {self.n_head} heads")
        rotated = 2 * len(range(0, int(self.head_dim * self.rotary_pct), 2))             # in pairs
        if not 0 < self.rotary_pct <= 1 or not 0 < rotated <= self.head_dim:
            name = "head_dim" if self.rotary_pct == 1 else "rotary_pct"
            raise UserError(f"{name}={getattr(self, name)} rotates {rotated} of each head's {self.head_dim} numbers; "
                            "use an even head_dim, and a rotary_pct above 0 and up to 1")
        for name in ("bos_token_id", "eos_token_id"):
            ids = getattr(self, name)
            if not all(0 <= i < self.vocab_size for i in (ids if isinstance(ids, list) else [ids or 0])):
                raise UserError(f"{name}={ids} is outside the vocabulary of {self.vocab_size}")

    def architecture(self) -> dict:
        """The settings that a model computes with: all but what is only noted about the donor."""
        noted = {"bos_token_id", "eos_token_id", "extra"}
        return {name: value for name, value in asdict(self).items() if name not in noted}

    @property
    def n_unique(self) -> int:
        """Stored layers, the paper's K = L / B."""
        return self.n_layer // self.n_loop

    @property
    def vector_loops(self) -> int | None:
        """How many of each norm weight and bias there are: one per loop, or None where the loops share one."""
        return self.n_loop if self.vectors == "per_loop" else None


def check_type(name: str, value) -> None:
    """Raise UserError unless `value` is of the type of Config's field `name`."""
    kind = Config.__dataclass_fields__[name].type
    if not is_type(value, kind):
        literal = get_origin(kind) is Literal
        raise UserError(f"{name}={value!r} is " + (f"unknown; use one of {', '.join(get_args(kind))}" if literal else
                        f"of the wrong type; it must be {kind.__name__ if type(kind) is type else kind}"))


def is_type(value, kind) -> bool:
    """True if `value` is of the type: an int is a float as well, but a bool is no int and nan no number."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is list:
        return type(value) is list and len(value) > 0 and all(is_type(v, get_args(kind)[0]) for v in value)
    if get_args(kind):                                                   # int | None
        return any(is_type(value, one) for one in get_args(kind))
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def upcast(x: Tensor) -> Tensor:
    """`x` in at least fp32, for the few places where half precision is not enough; fp64 stays fp64."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def per_loop_param(size: int, fill: float, n_loop: int | None) -> nn.Parameter:
    """A norm weight or a bias: (size,) shared by all loops as in the paper, or (n_loop, size), one for each."""
    return nn.Parameter(torch.full((size,) if n_loop is None else (n_loop, size), fill))


def select_loop(p: Tensor, loop: int | Tensor) -> Tensor:
    """The vector (C,) that `loop` uses, or (M, C) where M rows are at loops (M,) of their own."""
    return p if p.dim() == 1 else p[loop]


# ---------------------------------------------------------------------------------------------------------------------
# Norms. They are tied over the loops like everything else in the block, or with n_loop one per loop.

class RMSNorm(nn.Module):
    """x * rsqrt(mean(x²) + eps) * scale, in fp32 inside (Gemma, Llama)."""

    def __init__(self, size: int, eps: float, gemma: bool, n_loop: int | None = None):
        super().__init__()
        self.eps, self.gemma = eps, gemma
        self.scaled_eps = torch.tensor((size * eps) ** 0.5, dtype=torch.float64, device="cpu")  # hypot takes no number
        self.weight = per_loop_param(size, 0.0 if gemma else 1.0, n_loop)    # Gemma stores scale - 1
        self.bias = None

    def forward(self, x: Tensor, loop: int | Tensor = 0) -> Tensor:
        weight = select_loop(self.weight, loop)
        y = self.normalise(upcast(x))
        if self.gemma:                                                   # Gemma multiplies in fp32 and casts last
            return torch.addcmul(y, y, upcast(weight)).to(x.dtype)       # y * (1 + weight)
        return y.to(x.dtype) * weight                                    # Llama casts first

    def normalise(self, x: Tensor) -> Tensor:
        """x * rsqrt(mean(x²) + eps)."""
        if x.device.type == "cpu":
            return rms_norm_cpu(x, self.scaled_eps)
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)


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


def make_norm(config: "Config", n_loop: int | None = None) -> RMSNorm | LayerNorm:
    if config.arch == "gpt_neox":
        return LayerNorm(config.n_embd, config.norm_eps, n_loop)
    return RMSNorm(config.n_embd, config.norm_eps, config.arch == "gemma", n_loop)


def rms_norm_cpu(x: Tensor, scaled_eps: Tensor) -> Tensor:
    """x * rsqrt(mean(x²) + eps) as sqrt(C) x / sqrt(|x|² + C eps), with scaled_eps = sqrt(C eps): four small operations
    instead of nine, which saves an eighth of the time of decoding with a small model."""
    length = torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), scaled_eps)
    return x / (length * x.size(-1)**-0.5)


class RelaxedLinear(nn.Module):
    """y = W'x + B_l A_l x: W' shared by all loops, (A_l, B_l) owned by loop l (Eq. 3). No alpha/r scaling."""

    def __init__(self, d_in: int, d_out: int, config: Config, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in).normal_(std=0.02))
        self.bias = per_loop_param(d_out, 0.0, config.vector_loops) if bias else None
        self.rank = min(config.rank, d_in, d_out)  # a narrow map (multi-query keys) is full rank sooner
        if self.rank:
            self.lora_a = nn.Parameter(torch.randn(config.n_loop, self.rank, d_in) / d_in**0.5)
            self.lora_b = nn.Parameter(torch.zeros(config.n_loop, d_out, self.rank))

    def merged(self, loop: int) -> Tensor:
        """W' + B_l A_l (d_out, d_in), summed in fp32 and rounded once (under autocast, B_l A_l is a bf16 product)."""
        if not self.rank:
            return self.weight
        delta = upcast(self.lora_b[loop]) @ upcast(self.lora_a[loop])
        return (upcast(self.weight) + delta).type_as(self.weight)

    def forward(self, x: Tensor, loop: int | Tensor) -> Tensor:
        """x (..., d_in) -> (..., d_out), all of it at one loop, or rows x (M, d_in) each at its own (M,)."""
        if isinstance(loop, Tensor):
            from kernels import linear_rows  # for serving alone: the model itself needs no kernel
            a, b = (self.lora_a, self.lora_b) if self.rank else (None, None)
            return linear_rows(x, self.weight, a, b, loop, self.bias)
        weight, bias = self.weight, None if self.bias is None else select_loop(self.bias, loop)
        if not self.rank:
            return F.linear(x, weight, bias)
        d_out, d_in = weight.shape
        tokens = x.numel() // d_in
        # Building W' + BA costs R * d_in * d_out, the separate path R * tokens * (d_in + d_out): few tokens cannot pay.
        if tokens * (d_in + d_out) < d_in * d_out:
            return F.linear(x, weight, bias) + F.linear(F.linear(x, self.lora_a[loop]), self.lora_b[loop])
        return F.linear(x, self.merged(loop), bias)


def rope_angles(pos: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """cos and signed sin (T, 1, rotated) of the rotary embedding at positions `pos` (T,), in fp32: see `rotate`."""
    rotated = int(config.head_dim * config.rotary_pct)
    exponent = torch.arange(0, rotated, 2, device=pos.device, dtype=torch.float32) / rotated
    angle = pos.float()[:, None, None] * (1.0 / config.rope_theta**exponent)  # the order that donors were trained with
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (j, j + rotated/2) of x (B, T, heads, D); what lies beyond `rotated` passes unchanged.

    (a, b) becomes (a cos - b sin, b cos + a sin): x times cos, and its halves changed about times the signed sin.
    """
    cos, sin = rope
    rotated = cos.size(-1)
    if rotated < x.size(-1):
        return torch.cat([rotate(x[..., :rotated], rope), x[..., rotated:]], -1)
    wide = upcast(x)
    return torch.addcmul(wide * cos, wide.roll(rotated // 2, -1), sin).type_as(x)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v of the last T of n positions: q (B, H, T, D), k and v (B, K, n, D) -> (B, H, T, D)."""
    T, n, mask = q.size(2), k.size(2), None
    if 1 < T < n:                                                        # is_causal aligns its mask to the first key
        mask = torch.ones(T, n, dtype=torch.bool, device=q.device).tril(n - T)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=T > 1 and mask is None,
                                          enable_gqa=q.size(1) != k.size(1))


class KVCache:
    """Keys and values of every depth: a looped layer runs at n_loop depths, so the cache belongs to the depth
    (loop * n_unique + layer), never to the (shared) layer. All memory is allocated at the start."""

    def __init__(self, config: Config, batch: int, max_len: int, device="cpu", dtype=torch.float32):
        shape = (config.n_layer, batch, config.n_kv_head, max_len, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.depths = list(zip(self.k, self.v, strict=True))
        self.rope = rope_angles(torch.arange(max_len, device=device), config)
        self.n_unique = config.n_unique
        self.lengths = [0] * config.n_loop    # positions held per loop: a token that exited early lacks the later ones
        self.exited: Tensor | None = None     # (B, T) new tokens that take over the KV of the loop before (exits.py)

    def extend(self, loop: int, T: int) -> tuple[Tensor, Tensor]:
        """Make room for T more tokens at `loop`; returns their rotary angles. UserError if they do not fit."""
        start, end = self.lengths[loop], self.lengths[loop] + T
        if end > self.k.size(3):
            raise UserError(f"{end} tokens do not fit a cache made for {self.k.size(3)}")
        self.lengths[loop] = end
        return self.rope[0][start:end], self.rope[1][start:end]

    def attend(self, loop: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k, v (B, K, T, D) of the new tokens at this depth; returns what q (B, H, T, D) attends to."""
        depth, end = loop * self.n_unique + layer, self.lengths[loop]
        new = slice(end - k.size(2), end)
        if self.exited is not None:
            exited, before = self.exited[:, None, :, None], depth - self.n_unique
            k = torch.where(exited, self.k[before, :, :, new], k)
            v = torch.where(exited, self.v[before, :, :, new], v)
        keys, values = self.depths[depth]
        keys[:, :, new], values[:, :, new] = k, v
        return causal_attention(q, keys[:, :, :end], values[:, :, :end])

    def copy_loop(self, loop: int) -> None:
        """Copy the keys and values that `loop` lacks from the loop before (copied KV; CALM's state propagation)."""
        start, end, n = self.lengths[loop], self.lengths[loop - 1], self.n_unique
        for cache in (self.k, self.v):
            cache[loop * n:(loop + 1) * n, :, :, start:end] = cache[(loop - 1) * n:loop * n, :, :, start:end]
        self.lengths[loop] = end


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        C, H, K, D = config.n_embd, config.n_head, config.n_kv_head, config.head_dim
        self.n_head, self.n_kv_head, self.head_dim = H, K, D
        self.q = RelaxedLinear(C, H * D, config, config.attn_bias)
        self.k = RelaxedLinear(C, K * D, config, config.attn_bias)
        self.v = RelaxedLinear(C, K * D, config, config.attn_bias)
        self.o = RelaxedLinear(H * D, C, config, config.attn_bias)

    def forward(self, x: Tensor, rope, loop: int | Tensor, layer: int, cache) -> Tensor:
        T, D = len(rope[0]), self.head_dim                               # x (B T, C)
        q = rotate(self.q(x, loop).view(-1, T, self.n_head, D), rope)    # (B, T, H, D)
        k = rotate(self.k(x, loop).view(-1, T, self.n_kv_head, D), rope) # (B, T, K, D)
        v = self.v(x, loop).view(-1, T, self.n_kv_head, D)               # (B, T, K, D)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, D)
        y = causal_attention(q, k, v) if cache is None else cache.attend(loop, layer, q, k, v)
        return self.o(y.transpose(1, 2).reshape(x.size(0), -1), loop)    # (B T, C)


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
        """States x (B T, C) of B sequences of T = len(rope[0]) tokens, one step deeper. `layer` is the layer's index
        in the block: the same layer runs at a depth of its own in every loop."""
        y = x + self.attn(self.norm1(x, loop), rope, loop, layer, cache)
        return y + self.mlp(self.norm2(x if self.parallel else y, loop), loop)


class RecursiveTransformer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config, self.checkpointing = config, False  # True: keep only layers' inputs, run them again in backward
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_unique))
        self.norm = make_norm(config)                                    # one, whatever the exit
        self.head = None if config.tie_head else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for layer in self.layers:  # GPT-2's start: what adds to the residual stream is scaled down with its depth
            for linear in (layer.attn.o, layer.mlp.down):
                nn.init.normal_(linear.weight, std=0.02 / (2 * config.n_layer) ** 0.5)

    def forward(self, idx: Tensor, cache: KVCache | None = None) -> list[Tensor]:
        """Hidden states (B, T, C) after each of the n_loop loops, for token ids `idx` (B, T) int64.

        With a cache the tokens follow those it holds, and are added to it.
        """
        x, states = self.first_state(idx), []
        for loop in range(self.config.n_loop):                           # Eq. 2: the same layers, n_loop times
            x = self.block(x, loop, cache)
            states.append(x)
        return states

    def first_state(self, idx: Tensor) -> Tensor:
        """What the first loop reads (B, T, C): the embeddings of the tokens."""
        x = self.embed(idx)
        if self.config.arch == "gemma":  # sqrt(C) rounded to the compute dtype, as Gemma was trained
            x = x * torch.tensor(self.config.n_embd**0.5, dtype=x.dtype)
        return x

    def block(self, x: Tensor, loop: int | Tensor, cache=None) -> Tensor:
        """The stored layers, run once as loop number `loop` on states x (B, T, C). With a cache that knows their slots
        and positions (engine.py), on rows x (M, C) at loops (M,) of their own."""
        shape, T = x.shape, x.size(-2)
        rope = rope_angles(torch.arange(T, device=x.device), self.config) if cache is None else cache.extend(loop, T)
        x = x.flatten(0, -2)                                             # (B T, C): only attention knows of sequences
        for i, layer in enumerate(self.layers):
            if self.checkpointing:
                # The reentrant kind hands a shared weight's gradient to DDP once per loop, which DDP refuses.
                x = checkpoint(layer, x, rope, loop, i, cache, use_reentrant=False)
            else:
                x = layer(x, rope, loop, i, cache)
        return x.view(shape)

    def logits(self, x: Tensor) -> Tensor:
        """Logits (B, T, V) in fp32 of any loop's hidden state (B, T, C): all exits share final norm and head (§2.4)."""
        return upcast(F.linear(self.norm(x), self.head_weight))

    @property
    def head_weight(self) -> Tensor:
        """(V, C): the embedding where the two are tied."""
        return (self.embed if self.head is None else self.head).weight

    def num_params(self) -> dict[str, int]:
        """Parameters `stored` and `run` per token, each with embedding and head and (`_block`) without them."""
        looped = sum(p.numel() for name, p in self.layers.named_parameters() if not self.owned_by_loop(name, p))
        owned = sum(p.numel() for name, p in self.layers.named_parameters() if self.owned_by_loop(name, p))
        final = sum(p.numel() for p in self.norm.parameters())
        ends = self.embed.weight.numel() + (0 if self.head is None else self.head.weight.numel())
        stored, run = looped + owned + final, looped * self.config.n_loop + owned + final
        return {"stored": stored + ends, "run": run + ends, "stored_block": stored, "run_block": run}

    def flops(self, seq_len: int, n_exits: int = 1) -> int:
        """FLOPs of a forward pass, per token of a sequence that long: 2 for each parameter that a token runs through,
        and causal attention's (it sees half the sequence). Norms, and merging LoRAs once a batch, count nothing."""
        c = self.config
        matrices = sum(p.numel() for name, p in self.layers.named_parameters() if is_matrix(name)) * c.n_loop
        attention = c.n_layer * c.n_head * c.head_dim * (seq_len + 1)    # scores and their sum of values, half each
        return 2 * (matrices + n_exits * self.head_weight.numel() + attention)

    def owned_by_loop(self, name: str, p: Tensor) -> bool:
        """True for a stack over the loops (LoRA, vectors per loop), False for what all loops share."""
        return "lora_" in name or (p.dim() == 2 and self.config.vectors == "per_loop" and not is_matrix(name))

    # -----------------------------------------------------------------------------------------------------------------
    # A checkpoint is a folder: config.json and model.safetensors (and beside them the tokenizer and train.pt)

    def save(self, folder) -> None:
        """Replace `folder` whole: a crash leaves the old one or the new one. UserError if it holds something else."""
        with replace_folder(folder) as tmp:
            self.write(tmp)

    def write(self, folder) -> None:
        config = {"format": "nanoRRT"} | asdict(self.config)
        (Path(folder) / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, Path(folder) / "model.safetensors")

    @classmethod
    def load(cls, folder, device="cpu", dtype=None) -> "RecursiveTransformer":
        """The checkpoint in `folder`, in eval mode and the dtype it was saved in unless `dtype` says otherwise; one of
        several dtypes is loaded in the widest.

        Raises UserError if the folder is missing, is not a checkpoint of ours, or is damaged.
        """
        folder = settled(folder)
        config = read_config(folder)
        with torch.device("meta"):
            model = cls(config)
        path = Path(folder) / "model.safetensors"
        try:
            tensors = load_file(path, device=str(device))
        except (OSError, SafetensorError) as e:
            raise UserError(f"cannot read {path} ({e}); the file is missing, cut short or damaged") from None
        check_tensors({k: tuple(v.shape) for k, v in model.state_dict().items()},
                      {k: tuple(v.shape) for k, v in tensors.items()}, path)
        dtype = dtype or widest(v.dtype for v in tensors.values())
        model.load_state_dict({k: cast(v, dtype, f"{k} in {path}") for k, v in tensors.items()}, assign=True)
        return model.eval()


def is_matrix(name: str) -> bool:
    """True for the weight of a linear map, by its name inside the block: `attn.q.weight`, `mlp.up.weight`."""
    return name.endswith(tuple(f".{kind}.weight" for kind in ("q", "k", "v", "o", "gate", "up", "down")))


def read_config(folder) -> Config:
    """The Config in `folder`/config.json. Raises UserError if there is none of ours."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise UserError(f"no checkpoint in {folder}: no config.json; give a folder that convert.py or train.py wrote")
    try:
        values = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as e:
        raise UserError(f"{path} is not readable JSON ({e})") from None
    if values.pop("format", None) != "nanoRRT":
        raise UserError(f"{folder} is not a checkpoint of this project"
                        + (f" but a Hugging Face one ({values['model_type']}): convert it first with "
                           f"python convert.py --donor={folder}" if "model_type" in values else ""))
    unknown = set(values) - {f.name for f in fields(Config)}
    if unknown:
        raise UserError(f"{path} has unknown settings {sorted(unknown)}: written by a newer version?")
    try:
        return Config(**values)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None


def widest(dtypes) -> torch.dtype:
    """The one dtype that holds what all of these hold (bfloat16 weights beside float32 norms: float32)."""
    return reduce(torch.promote_types, dtypes)


def cast(w: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`w` in this dtype. UserError if it has NaN or infinity, or a number that is too large for the dtype."""
    low, high = torch.stack(w.aminmax()).tolist()                        # NaN if there is any
    if not math.isfinite(high - low):
        raise UserError(f"{name} is not finite (from {low} to {high}): its file is damaged, its training diverged, or "
                        f"it overflowed in {w.dtype}; use another checkpoint, or bfloat16")
    if max(-low, high) > torch.finfo(dtype).max:
        raise UserError(f"{name} has a weight of {high if high > -low else low:.6g}, and {dtype} overflows beyond "
                        f"{torch.finfo(dtype).max:.6g}; use --dtype=bfloat16 or float32")
    return w.to(dtype)


def check_tensors(want: dict[str, tuple], have: dict[str, tuple], where) -> None:
    """Raise UserError unless the named shapes agree exactly; says which do not and what the likely cause is."""
    missing, extra = sorted(set(want) - set(have)), sorted(set(have) - set(want))
    wrong = [f"{n} is {have[n]}, expected {want[n]}" for n in sorted(set(want) & set(have)) if want[n] != have[n]]
    if not (missing or extra or wrong):
        return
    causes = {"missing": "a shard was not downloaded, or config.json counts more layers than the file has",
              "unexpected": "config.json counts fewer layers than the file has, or belongs to another model",
              "wrongly shaped": "config.json belongs to another size of this model"}
    lines = [f"{len(names)} {kind} ({'; '.join(names[:3])}{' …' * (len(names) > 3)}): {causes[kind]}?"
             for kind, names in (("missing", missing), ("unexpected", extra), ("wrongly shaped", wrong)) if names]
    raise UserError(f"the tensors in {where} do not fit its config.json: " + "; ".join(lines))
