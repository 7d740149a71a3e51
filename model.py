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
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import decode_attention, linear_rows
from runtime import UserError, replace_folder, settled


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
    eos_token_id: int | None = None  # the donor's end-of-text id

    def __post_init__(self):
        for name in ("vectors", "arch"):
            allowed = get_args(type(self).__dataclass_fields__[name].type)
            if getattr(self, name) not in allowed:
                raise UserError(f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(allowed)}")
        if self.n_loop < 1 or self.n_layer % self.n_loop:
            raise UserError(f"{self.n_loop} loops do not divide the {self.n_layer} layers; "
                            f"use one of {', '.join(str(n) for n in divisors(self.n_layer))}")
        if self.rank < 0:
            raise UserError(f"rank {self.rank} is negative; use 0 for a tied model or a positive LoRA rank")

    @property
    def n_unique(self) -> int:
        """Stored layers, the paper's K = L / B."""
        return self.n_layer // self.n_loop


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def widen(x: Tensor) -> Tensor:
    """`x` in at least fp32, for the few places where half precision is not enough; fp64 stays fp64."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def loop_vector(size: int, fill: float, config: Config) -> nn.Parameter:
    """A norm weight or a bias: (C,) shared by all loops as in the paper, or (n_loop, C), one for each."""
    shape = (config.n_loop, size) if config.vectors == "per_loop" else (size,)
    return nn.Parameter(torch.full(shape, fill))


def of_loop(p: Tensor, loop: int | Tensor) -> Tensor:
    """The vector (C,) that `loop` uses, or (M, C) where rows stand at loops (M,) of their own."""
    return p if p.dim() == 1 else p[loop]


class Norm(nn.Module):
    """LayerNorm (Pythia) or RMSNorm (Gemma, Llama), in fp32 inside. Tied over the loops like all else in the block."""

    def __init__(self, config: Config):
        super().__init__()
        self.arch, self.eps, self.size = config.arch, config.norm_eps, (config.n_embd,)
        # hypot takes no Python number; a 0-dim tensor on the CPU changes neither dtype nor device of what it meets.
        self.least = torch.tensor((config.norm_eps * config.n_embd) ** 0.5, dtype=torch.float64, device="cpu")
        self.weight = loop_vector(config.n_embd, 0.0 if config.arch == "gemma" else 1.0, config)
        self.bias = loop_vector(config.n_embd, 0.0, config) if config.arch == "gpt_neox" else None

    def forward(self, x: Tensor, loop: int | Tensor) -> Tensor:
        w = of_loop(self.weight, loop)
        if self.arch == "gpt_neox":
            bias = of_loop(self.bias, loop)
            if w.dim() == 1:
                return F.layer_norm(x, self.size, w, bias, self.eps)
            return F.layer_norm(x, self.size, eps=self.eps) * w + bias
        y = self.rms_norm(widen(x))
        if self.arch == "gemma":  # Gemma stores w - 1, multiplies in fp32 and casts last
            return torch.addcmul(y, y, widen(w)).to(x.dtype)
        return y.to(x.dtype) * w  # Llama casts first

    def rms_norm(self, x: Tensor) -> Tensor:
        """x / sqrt(mean(x²) + eps)."""
        if x.is_cuda:  # one kernel
            return F.rms_norm(x, self.size, eps=self.eps)
        # On CPUs torch makes nine small operations of it, an eighth of a small model's time when decoding; these are
        # four: sqrt(C) x / sqrt(|x|² + C eps).
        length = torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self.least)
        return x / (length * self.size[0] ** -0.5)


class RelaxedLinear(nn.Module):
    """y = W'x + B_l A_l x: W' shared by all loops, (A_l, B_l) owned by loop l (Eq. 3). No alpha/r scaling."""

    def __init__(self, d_in: int, d_out: int, config: Config, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in).normal_(std=0.02))
        self.bias = loop_vector(d_out, 0.0, config) if bias else None
        self.rank = min(config.rank, d_in, d_out)  # a narrow map (multi-query keys) is full rank sooner
        if self.rank:
            self.lora_a = nn.Parameter(torch.randn(config.n_loop, self.rank, d_in) / d_in**0.5)
            self.lora_b = nn.Parameter(torch.zeros(config.n_loop, d_out, self.rank))

    def merged(self, loop: int) -> Tensor:
        """W' + B_l A_l (d_out, d_in), summed in fp32 and rounded once (under autocast, B_l A_l is a bf16 product)."""
        if not self.rank:
            return self.weight
        delta = widen(self.lora_b[loop]) @ widen(self.lora_a[loop])
        return (widen(self.weight) + delta).type_as(self.weight)

    def forward(self, x: Tensor, loop: int | Tensor) -> Tensor:
        """x (..., d_in) -> (..., d_out), all of it at one loop, or rows x (M, d_in) each at its own (M,)."""
        if isinstance(loop, Tensor):
            a, b = (self.lora_a, self.lora_b) if self.rank else (None, None)
            return linear_rows(x, self.weight, a, b, loop, self.bias)
        weight, bias = self.weight, None if self.bias is None else of_loop(self.bias, loop)
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
    wide = widen(x)
    return torch.addcmul(wide * cos, wide.roll(rotated // 2, -1), sin).type_as(x)


class KVCache:
    """Keys and values of every depth: a looped layer runs at n_loop depths, so the cache belongs to the depth
    (loop * n_unique + i), never to the (shared) layer. All memory is taken at the start."""

    def __init__(self, config: Config, batch: int, max_len: int, device="cpu", dtype=torch.float32):
        shape = (config.n_layer, batch, config.n_kv_head, max_len, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.depths = list(zip(self.k, self.v, strict=True))
        self.rope = rope_angles(torch.arange(max_len, device=device), config)
        self.n_unique = config.n_unique
        self.lengths = [0] * config.n_loop  # tokens held, per loop: one that left early is missing in the later ones
        self.left: Tensor | None = None     # (B, T) new tokens that take over the keys of the loop before (exits.py)

    def angles(self, loop: int, n: int) -> tuple[Tensor, Tensor]:
        """The rotary embedding's of the next n tokens at `loop`. UserError if they do not fit."""
        start = self.lengths[loop]
        end = start + n
        if end > self.k.size(3):
            raise UserError(f"{end} tokens do not fit a cache made for {self.k.size(3)}")
        return self.rope[0][start:end], self.rope[1][start:end]

    def append(self, depth: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep k, v (B, K, T, D) of the new tokens; returns all of this depth so far, (B, K, length + T, D) each."""
        start = self.lengths[depth // self.n_unique]
        end = start + k.size(2)
        if self.left is not None:
            left, before = self.left[:, None, :, None], depth - self.n_unique
            k = torch.where(left, self.k[before, :, :, start:end], k)
            v = torch.where(left, self.v[before, :, :, start:end], v)
        keys, values = self.depths[depth]
        keys[:, :, start:end], values[:, :, start:end] = k, v
        return keys[:, :, :end], values[:, :, :end]

    def copy_loop(self, loop: int) -> None:
        """Let the keys and values of the loop before stand in for those that `loop` does not have yet."""
        start, end, n = self.lengths[loop], self.lengths[loop - 1], self.n_unique
        for kept in (self.k, self.v):
            kept[loop * n:(loop + 1) * n, :, :, start:end] = kept[(loop - 1) * n:loop * n, :, :, start:end]
        self.lengths[loop] = end


class SlotCache:
    """Keys and values of sequences that stand at different loops and positions, one in each slot (engine.py).

    Of every stored layer (slots + 1, n_loop, max_len, K, D): a row finds its own by slot and loop. The slot beyond the
    last takes what idle rows write.
    """

    def __init__(self, config: Config, slots: int, max_len: int, device="cpu", dtype=torch.float32):
        shape = (config.n_unique, slots + 1, config.n_loop, max_len, config.n_kv_head, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.rope = rope_angles(torch.arange(max_len, device=device), config)
        self.slot = self.pos = torch.zeros(0, dtype=torch.long, device=device)  # (M,) of the rows in the coming pass
        self.span = max_len      # positions that attention goes through: all of them, if the host does not know better

    def angles(self, loop: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """The rotary embedding's of the n rows in the coming pass."""
        return self.rope[0][self.pos], self.rope[1][self.pos]

    def attend(self, i: int, loop: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keep k, v (M, K, D) of the rows in layer i; returns what q (M, H, D) finds in their slots and loops."""
        self.k[i].index_put_((self.slot, loop, self.pos), k)
        self.v[i].index_put_((self.slot, loop, self.pos), v)
        k, v = self.k[i, :, :, :self.span], self.v[i, :, :, :self.span]
        return decode_attention(q, k, v, self.slot, loop, self.pos + 1)


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        C, H, K, D = config.n_embd, config.n_head, config.n_kv_head, config.head_dim
        self.n_head, self.n_kv_head, self.head_dim = H, K, D
        self.q = RelaxedLinear(C, H * D, config, config.attn_bias)
        self.k = RelaxedLinear(C, K * D, config, config.attn_bias)
        self.v = RelaxedLinear(C, K * D, config, config.attn_bias)
        self.o = RelaxedLinear(H * D, C, config, config.attn_bias)

    def forward(self, x: Tensor, rope, loop: int | Tensor, depth: int, cache) -> Tensor:
        T, D = len(rope[0]), self.head_dim                               # x (B T, C), or (M, C): M rows as one sequence
        q = rotate(self.q(x, loop).view(-1, T, self.n_head, D), rope)    # (B, T, H, D)
        k = rotate(self.k(x, loop).view(-1, T, self.n_kv_head, D), rope) # (B, T, K, D)
        v = self.v(x, loop).view(-1, T, self.n_kv_head, D)               # (B, T, K, D)
        if isinstance(loop, Tensor):
            return self.o(cache.attend(depth, loop, q[0], k[0], v[0]).flatten(1), loop)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, D)
        mask, past = None, 0
        if cache is not None:
            past = cache.lengths[loop]
            k, v = cache.append(depth, k, v)                             # (B, K, past + T, D)
        if past and T > 1:  # is_causal would align the mask to the wrong corner
            mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=T > 1 and not past,
                                           enable_gqa=self.n_head != self.n_kv_head)
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
        self.parallel = config.parallel
        self.norm1, self.attn = Norm(config), Attention(config)
        self.norm2, self.mlp = Norm(config), MLP(config)

    def forward(self, x: Tensor, rope, loop: int | Tensor, depth: int, cache=None) -> Tensor:
        """States x (B T, C) of sequences in turn, T = len(rope[0]); or rows of their own: see `block`."""
        y = x + self.attn(self.norm1(x, loop), rope, loop, depth, cache)
        return y + self.mlp(self.norm2(x if self.parallel else y, loop), loop)


class RecursiveTransformer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config, self.checkpointing = config, False  # True: keep only layers' inputs, run them again in backward
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_unique))
        self.norm = Norm(Config(**asdict(config) | {"n_loop": 1, "vectors": "tied"}))  # one, whatever the exit
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

    def block(self, x: Tensor, loop: int | Tensor, cache: "KVCache | SlotCache | None" = None) -> Tensor:
        """The stored layers, run once as loop number `loop`, on states x (B, T, C); or on rows x (M, C) which stand at
        loops (M,) of their own, with a SlotCache that knows their slots and positions."""
        mixed, shape, T = isinstance(loop, Tensor), x.shape, x.size(-2)
        rope = cache.angles(loop, T) if cache is not None else rope_angles(torch.arange(T, device=x.device),
                                                                           self.config)
        x = x.flatten(0, -2)                                             # (B T, C): all but attention knows only rows
        for i, layer in enumerate(self.layers):
            at = i if mixed else loop * self.config.n_unique + i         # of a SlotCache the layer, else the depth
            place = rope, loop, at, cache
            # The reentrant kind would hand a shared weight's gradient to DDP once per loop, and DDP refuses that.
            x = checkpoint(layer, x, *place, use_reentrant=False) if self.checkpointing else layer(x, *place)
        if cache is not None and not mixed:
            cache.lengths[loop] += T
        return x.view(shape)

    def logits(self, x: Tensor) -> Tensor:
        """Logits (B, T, V) in fp32 of any loop's hidden state (B, T, C): all exits share final norm and head (§2.4)."""
        return widen(F.linear(self.norm(x, 0), self.head_weight))

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
        (Path(folder) / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, Path(folder) / "model.safetensors")

    @classmethod
    def load(cls, folder, device="cpu", dtype=None) -> "RecursiveTransformer":
        """The checkpoint in `folder`, in eval mode and the dtype it was saved in unless `dtype` says otherwise.

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
        if dtype is not None:
            tensors = {k: v.to(dtype) for k, v in tensors.items()}
        model.load_state_dict(tensors, assign=True)
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
        values = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as e:
        raise UserError(f"{path} is not readable JSON ({e})") from None
    if values.pop("format", None) != "nanoRRT":
        raise UserError(f"{folder} is not a checkpoint of this project"
                        + (f" but a Hugging Face one ({values['model_type']}): convert it first with "
                           f"python convert.py --donor={folder}" if "model_type" in values else ""))
    unknown = set(values) - {f.name for f in fields(Config)}
    if unknown:
        raise UserError(f"{path} has unknown settings {sorted(unknown)}: written by a newer version?")
    return Config(**values)


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
