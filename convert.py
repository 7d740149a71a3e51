"""Turn a pretrained Gemma, Llama or Pythia checkpoint into a (Relaxed) Recursive Transformer, and back (§2.2, §2.3).

    python convert.py --donor=assets/donor --loops=2 --init=average --rank=64 --out=out_relaxed
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data import copy_tokenizer
from model import Config, RecursiveTransformer, check_tensors, is_matrix
from runtime import UserError, parse_args, print0, progress, replace_folder, script, table

# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face's names for our tensors. NeoX fuses q, k and v head by head: "name#0" is the first third of each head.

LLAMA_NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "layers.{}.norm1.weight": "model.layers.{}.input_layernorm.weight",
    "layers.{}.norm2.weight": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.attn.q.weight": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.attn.k.weight": "model.layers.{}.self_attn.k_proj.weight",
    "layers.{}.attn.v.weight": "model.layers.{}.self_attn.v_proj.weight",
    "layers.{}.attn.o.weight": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.mlp.gate.weight": "model.layers.{}.mlp.gate_proj.weight",
    "layers.{}.mlp.up.weight": "model.layers.{}.mlp.up_proj.weight",
    "layers.{}.mlp.down.weight": "model.layers.{}.mlp.down_proj.weight",
}
NEOX_NAMES = {
    "embed.weight": "gpt_neox.embed_in.weight",
    "norm.weight": "gpt_neox.final_layer_norm.weight",
    "norm.bias": "gpt_neox.final_layer_norm.bias",
    "head.weight": "embed_out.weight",
    "layers.{}.norm1.weight": "gpt_neox.layers.{}.input_layernorm.weight",
    "layers.{}.norm1.bias": "gpt_neox.layers.{}.input_layernorm.bias",
    "layers.{}.norm2.weight": "gpt_neox.layers.{}.post_attention_layernorm.weight",
    "layers.{}.norm2.bias": "gpt_neox.layers.{}.post_attention_layernorm.bias",
    "layers.{}.attn.q.weight": "gpt_neox.layers.{}.attention.query_key_value.weight#0",
    "layers.{}.attn.q.bias": "gpt_neox.layers.{}.attention.query_key_value.bias#0",
    "layers.{}.attn.k.weight": "gpt_neox.layers.{}.attention.query_key_value.weight#1",
    "layers.{}.attn.k.bias": "gpt_neox.layers.{}.attention.query_key_value.bias#1",
    "layers.{}.attn.v.weight": "gpt_neox.layers.{}.attention.query_key_value.weight#2",
    "layers.{}.attn.v.bias": "gpt_neox.layers.{}.attention.query_key_value.bias#2",
    "layers.{}.attn.o.weight": "gpt_neox.layers.{}.attention.dense.weight",
    "layers.{}.attn.o.bias": "gpt_neox.layers.{}.attention.dense.bias",
    "layers.{}.mlp.up.weight": "gpt_neox.layers.{}.mlp.dense_h_to_4h.weight",
    "layers.{}.mlp.up.bias": "gpt_neox.layers.{}.mlp.dense_h_to_4h.bias",
    "layers.{}.mlp.down.weight": "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight",
    "layers.{}.mlp.down.bias": "gpt_neox.layers.{}.mlp.dense_4h_to_h.bias",
}
NAMES = {"gemma": LLAMA_NAMES, "llama": LLAMA_NAMES, "gpt_neox": NEOX_NAMES}
NOT_WEIGHTS = re.compile(r"rotary_emb\.inv_freq$|attention\.(bias|masked_bias)$")  # buffers that old checkpoints carry


def hf_name(name: str, arch: str) -> str:
    """`layers.3.attn.q.weight` -> `model.layers.3.self_attn.q_proj.weight` (NeoX: with `#part` for the fused map)."""
    layer = re.search(r"layers\.(\d+)\.", name)
    if not layer:
        return NAMES[arch][name]
    return NAMES[arch][name.replace(layer[0], "layers.{}.", 1)].format(layer[1])


# ---------------------------------------------------------------------------------------------------------------------
# Reading a donor

# What a config may ask for that this code does not do. Silently wrong is the worst outcome: each is refused by name.
REFUSED = {
    "rope_scaling": "scaled rotary embeddings", "sliding_window": "sliding-window attention",
    "layer_types": "layers of different kinds", "attention_bias": "attention biases", "mlp_bias": "MLP biases",
    "attn_logit_softcapping": "soft-capping", "final_logit_softcapping": "soft-capping",
    "quantization_config": "quantised weights", "use_bidirectional_attention": "bidirectional attention",
}
# Gemma's first releases say "gelu" and mean the tanh approximation, as transformers knows too.
ACTIVATIONS = {"gemma": ("gelu_pytorch_tanh", "gelu"), "llama": ("silu",), "gpt_neox": ("gelu",)}


def config_from_hf(hf: dict, where="config.json") -> Config:
    """The full-size Config for a Hugging Face config.json. Raises UserError for whatever this code would get wrong."""
    arch = hf.get("model_type")
    if hf.get("format") == "nanoRRT":
        raise UserError(f"{where} is of a checkpoint of this project; a donor is a Hugging Face one: "
                        "write it out with python convert.py --unroll first")
    if arch not in NAMES:
        raise UserError(f"{where}: model_type {arch!r} is not supported; donors are of type {', '.join(NAMES)}")
    for key, meaning in REFUSED.items():
        off = (None, False) if key != "layer_types" else (None, [], ["full_attention"] * hf.get("num_hidden_layers", 0))
        if key == "attention_bias" and arch == "gpt_neox":
            continue
        if key == "sliding_window" and hf.get("use_sliding_window") is False:
            continue
        if key == "rope_scaling" and hf.get(key) == {"rope_type": "default"}:
            continue
        if hf.get(key) not in off:
            raise UserError(f"{where}: {key}={hf[key]!r} ({meaning}) is not supported; choose a donor without it")
    rope = hf.get("rope_parameters") or {}  # transformers 5; before that, settings of their own
    if rope.get("rope_type", "default") != "default" or any(isinstance(v, dict) for v in rope.values()):
        raise UserError(f"{where}: rope_parameters={rope!r} (scaled rotary embeddings) is not supported; "
                        "choose a donor with rope_type 'default'")
    act = hf.get("hidden_activation") or hf.get("hidden_act") or ACTIVATIONS[arch][0]
    if act not in ACTIVATIONS[arch]:
        raise UserError(f"{where}: activation {act!r} is not supported for {arch}; use {ACTIVATIONS[arch][0]}")
    neox, gemma = arch == "gpt_neox", arch == "gemma"
    try:
        n_embd, n_head = hf["hidden_size"], hf["num_attention_heads"]
        return Config(
            arch=arch, vocab_size=hf["vocab_size"], n_layer=hf["num_hidden_layers"], n_embd=n_embd, n_head=n_head,
            n_kv_head=n_head if neox else hf.get("num_key_value_heads") or n_head,
            head_dim=(None if neox else hf.get("head_dim")) or (256 if gemma else n_embd // n_head),
            n_hidden=hf["intermediate_size"], n_ctx=hf.get("max_position_embeddings", 2048),
            norm_eps=hf.get("layer_norm_eps", 1e-5) if neox else hf.get("rms_norm_eps", 1e-6),
            rope_theta=float(rope.get("rope_theta") or hf.get("rotary_emb_base" if neox else "rope_theta") or 10000.0),
            rotary_pct=float(rope.get("partial_rotary_factor") or hf.get("rotary_pct") or 0.25) if neox else 1.0,
            tie_head=hf.get("tie_word_embeddings", gemma), attn_bias=neox and hf.get("attention_bias", True),
            mlp_bias=neox, parallel=neox and hf.get("use_parallel_residual", True),
            bos_token_id=first(hf.get("bos_token_id")), eos_token_id=first(hf.get("eos_token_id")))
    except KeyError as e:
        raise UserError(f"{where}: setting {e} is missing; is this the config.json of a {arch} checkpoint?") from None


def first(ids: int | list[int] | None) -> int | None:
    return ids[0] if isinstance(ids, list) else ids


def find_donor(donor: str) -> Path:
    """The folder of a donor: a local one, or that of a Hugging Face id, downloaded once. UserError if it is neither."""
    folder = Path(donor)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(donor)) or folder.parent.is_dir():
        raise UserError(f"donor {donor} does not exist; give a folder with config.json and model.safetensors, "
                        "or a Hugging Face id like EleutherAI/pythia-160m")
    from huggingface_hub import snapshot_download
    try:
        wanted = ["*.json", "*.safetensors", "*.tiktoken", "tokenizer.model"]
        return Path(snapshot_download(donor, allow_patterns=wanted))
    except Exception as e:  # the hub client raises many kinds, all of them "not to be had"
        raise UserError(f"cannot download {donor} ({str(e).splitlines()[0]}); give a local folder instead") from None


class Donor:
    """A Hugging Face checkpoint on disk, read one tensor at a time by our names. Strict: every tensor that the config
    asks for must be there in its shape, and no other. Raises UserError otherwise, before any weight is read."""

    def __init__(self, donor: str):
        self.folder = find_donor(donor)
        self.config = config_from_hf(read_json(self.folder / "config.json"), self.folder / "config.json")
        self.files = self.find_files()
        shapes = {}
        for path in sorted(set(self.files.values())):
            with self.open(path) as f:
                held = [n for n in f.keys() if self.files.get(n) == path]  # noqa: SIM118 (not a dict)
                shapes |= {n: tuple(f.get_slice(n).get_shape()) for n in held}
        alias = {"lm_head.weight": "embed_out.weight"} if self.config.arch == "gpt_neox" else {}
        self.stored_as = {alias.get(n, n): n for n in shapes}
        have = {alias.get(n, n): s for n, s in shapes.items() if not NOT_WEIGHTS.search(n)}
        if self.config.tie_head:  # some checkpoints store the tied head a second time
            have.pop(hf_name("head.weight", self.config.arch), None)
        check_tensors(hf_shapes(self.config), have, self.folder)

    def find_files(self) -> dict[str, Path]:
        """Tensor name -> the safetensors file that holds it."""
        index, single = self.folder / "model.safetensors.index.json", self.folder / "model.safetensors"
        if single.exists():
            with self.open(single) as f:
                return {name: single for name in f.keys()}  # noqa: SIM118
        if not index.exists():
            held = "only .bin weights: save them as safetensors" if list(self.folder.glob("*.bin")) else "no weights"
            raise UserError(f"{self.folder} has neither model.safetensors nor its index ({held})")
        try:
            files = {name: self.folder / file for name, file in read_json(index)["weight_map"].items()}
        except (KeyError, AttributeError, TypeError):
            raise UserError(f"{index} has no weight_map: download it again") from None
        missing = sorted({p.name for p in files.values() if not p.exists()})
        if missing:
            raise UserError(f"{self.folder}: {index.name} names {', '.join(missing[:3])}, not there; download the rest")
        return files

    def open(self, path: Path):
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as e:
            raise UserError(f"cannot read {path} ({e}); the file is cut short or damaged: download it again") from None

    def read(self, name: str) -> Tensor:
        """Our tensor `name`, in the dtype it is stored in."""
        theirs, _, part = hf_name(name, self.config.arch).partition("#")
        stored = self.stored_as[theirs]
        with self.open(self.files[stored]) as f:  # opened anew each time: a closed file's pages leave our memory
            w = f.get_tensor(stored).clone()
        if w.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise UserError(f"{self.folder}: {stored} is stored as {w.dtype}; float32, bfloat16 and float16 are read, "
                            "quantised weights are not")
        return split_heads(w, self.config)[:, int(part)].flatten(0, 1).contiguous() if part else w


def split_heads(w: Tensor, config: Config) -> Tensor:
    """NeoX's fused query_key_value weight or bias (H * 3 * D, ...) -> (H, 3, D, ...)."""
    return w.view(config.n_head, 3, config.head_dim, *w.shape[1:])


def hf_shapes(config: Config) -> dict[str, tuple]:
    """Hugging Face's names and shapes for a full-size model of this config."""
    with torch.device("meta"):
        ours = RecursiveTransformer(config).state_dict()
    shapes = {}
    for name, w in ours.items():
        theirs, _, part = hf_name(name, config.arch).partition("#")
        shapes[theirs] = (3 * w.size(0), *w.shape[1:]) if part else tuple(w.shape)
    return shapes


def read_json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}; a donor has config.json and model.safetensors") from None
    except (OSError, ValueError, TypeError) as e:
        raise UserError(f"{path} is not readable JSON ({e})") from None


def load_full(donor: str, dtype: torch.dtype | None = None) -> RecursiveTransformer:
    """The full-size model (n_loop=1) of a Hugging Face folder or id, in eval mode; dtype None keeps the stored one."""
    source = Donor(donor)
    with torch.device("meta"):
        model = RecursiveTransformer(source.config)
    names = progress(list(model.state_dict()), desc="reading donor", unit="tensor")
    state = {name: source.read(name) for name in names}
    model.load_state_dict({k: v.to(dtype) if dtype else v for k, v in state.items()}, assign=True)
    return model.eval()


def load_any(folder: str, dtype: torch.dtype | None = None) -> RecursiveTransformer:
    """A checkpoint of ours, or else a Hugging Face one at full size."""
    config = Path(folder) / "config.json"
    if config.exists() and "model_type" in read_json(config) or not Path(folder).is_dir() and "/" in str(folder):
        return load_full(folder, dtype)
    return RecursiveTransformer.load(folder, dtype=dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Full-size -> recursive

Init = Literal["stepwise", "average", "lower", "random"]
LoraInit = Literal["svd", "zero"]
Rounding = Literal["round", "floor"]
Norms = Literal["init", "average", "pick"]


def source_layers(n_layer: int, n_loop: int, init: str, rounding: str = "round") -> list[list[int]]:
    """For each stored layer, the donor layers it starts from (averaged if several): Figure 2, counted from 0.

    >>> source_layers(6, 2, "stepwise"), source_layers(6, 2, "average"), source_layers(6, 2, "lower")
    ([[0], [2], [5]], [[0, 3], [1, 4], [2, 5]], [[0], [1], [2]])

    Stepwise takes evenly spaced layers, the first and the last among them; where a step falls between two layers,
    `rounding` says which: "round" (half to even, the authors' later code) or "floor" (fits Figure 2 as well).
    """
    k = Config(n_layer=n_layer, n_loop=n_loop).n_unique  # UserError if the loops do not fit
    if init == "stepwise":
        steps = [i * (n_layer - 1) / max(k - 1, 1) for i in range(k)]
        return [[round(s) if rounding == "round" else int(s)] for s in steps]
    if init == "average":  # cyclic: position i replaces layers i, i + k, i + 2k ...
        return [list(range(i, n_layer, k)) for i in range(k)]
    if init == "lower":
        return [[i] for i in range(k)]
    raise UserError(f"unknown init {init!r}; use stepwise, average, lower or random")


@torch.no_grad()
def svd_factors(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(A, B) with B @ A the best rank-r approximation of delta (out, in): A = V_r^T (R, in), B = U_r S_r (Eq. 4).

    The small side's Gram matrix has the same singular vectors and is ~10x faster to decompose than a full SVD; fp64
    keeps what squaring costs. Directions without residual get a Gaussian row in A and zeros in B (App. C): a zero in
    both would never train.
    """
    delta = delta.float()
    rank = min(rank, *delta.shape)
    wide = delta.size(0) <= delta.size(1)
    d = delta.double()
    vectors = torch.linalg.eigh(d @ d.T if wide else d.T @ d)[1].flip(-1)[:, :rank].float()  # largest first
    if wide:
        a = vectors.T @ delta                                            # (R, in), rows of length S
        s = a.norm(dim=1)
        b = vectors * s                                                  # (out, R)
        a = a / s.clamp_min(1e-30)[:, None]
    else:
        a, b = vectors.T.contiguous(), delta @ vectors                   # (R, in), (out, R)
        s = b.norm(dim=0)
    dead = s <= 1e-6 * s.max().clamp_min(1e-30)
    if dead.any():
        a[dead], b[:, dead] = gaussian(int(dead.sum()), a), 0.0
    return a, b


def gaussian(rank: int, like: Tensor) -> Tensor:
    """A (R, in) of the usual LoRA start, on `like`'s device; drawn on the CPU, so the same on every device."""
    return (torch.randn(rank, like.size(1)) / like.size(1) ** 0.5).to(like.device)


def refuse_looped(config: Config, instead: str) -> None:
    if config.n_loop != 1 or config.rank or config.vectors != "tied":
        raise UserError(f"this is a recursive model already ({config.n_loop} loops, rank {config.rank}, vectors "
                        f"{config.vectors}); {instead}")


@torch.no_grad()
def loop_layers(config: Config, read: Callable[[str], Tensor], n_loop: int, init: Init, rank: int, lora_init: str,
                vectors: str, rounding: str, norms: Norms, dtype: torch.dtype | None, report: dict | None = None):
    """The recursive model made of a full-size one's tensors, `read(name)` giving them one at a time (Figure 2, Eq. 4).

    `report`, if given, is filled with kind of matrix -> [residual energy kept by the rank, residual energy].
    """
    refuse_looped(config, "convert a full-size model, or unroll this one first")
    for given, allowed in ((init, Init), (lora_init, LoraInit), (rounding, Rounding), (norms, Norms)):
        if given not in get_args(allowed):
            raise UserError(f"{given!r} is unknown here; use one of {', '.join(get_args(allowed))}")
    target = replace(config, n_loop=n_loop, rank=rank, vectors=vectors)
    if init == "random":  # the paper's baseline: the donor's shape, none of its weights
        return RecursiveTransformer(target).to(dtype or read("norm.weight").dtype).eval()
    sources = source_layers(config.n_layer, n_loop, init, rounding)
    averaged = source_layers(config.n_layer, n_loop, "average")
    with torch.device("meta"):
        model = RecursiveTransformer(target)
    k, new = target.n_unique, {}
    names = [n for n in model.state_dict() if "lora_" not in n]
    for name in progress(names, desc="converting", unit="tensor"):
        if not name.startswith("layers."):
            new[name] = read(name).to(dtype, copy=True)                  # embedding, final norm, head: copied
            continue
        _, i, rest = name.split(".", 2)
        i = int(i)
        if not is_matrix(name):
            if vectors == "per_loop":
                chosen = torch.stack([read(f"layers.{loop * k + i}.{rest}") for loop in range(n_loop)])
            else:
                layers = {"init": sources, "average": averaged, "pick": [a[:1] for a in averaged]}[norms][i]
                chosen = mean(read, layers, rest)
            new[name] = chosen.to(dtype or read(f"layers.{i}.{rest}").dtype)
            continue
        shared = mean(read, sources[i], rest)                            # W'_k, in fp32
        keep = dtype or read(f"layers.{i}.{rest}").dtype
        new[name] = shared.to(keep)
        if rank:
            deltas = (read(f"layers.{loop * k + i}.{rest}").float() - shared for loop in range(n_loop))
            stem = name.removesuffix("weight")
            energy = report.setdefault(rest.removesuffix(".weight"), [0.0, 0.0]) if report is not None else [0.0, 0.0]
            factors = relax(deltas, rank, lora_init, init == "average" and n_loop == 2, energy)
            new[stem + "lora_a"], new[stem + "lora_b"] = (torch.stack(f).to(keep) for f in zip(*factors, strict=True))
    model.load_state_dict(new, assign=True)
    return model.eval()


def mean(read: Callable[[str], Tensor], layers: list[int], rest: str) -> Tensor:
    """The mean over donor layers of the tensor `rest`, in fp32."""
    total = read(f"layers.{layers[0]}.{rest}").float()
    for layer in layers[1:]:
        total = total + read(f"layers.{layer}.{rest}").float()
    return total / len(layers)


def relax(deltas, rank: int, lora_init: str, mirrored: bool, energy: list[float]) -> list[tuple[Tensor, Tensor]]:
    """One (A, B) per loop for the fp32 residuals W_l - W'. Zero residual or zero init: A Gaussian, B zero (App. C).

    Adds to `energy` the residuals' squared norm that the factors keep, and all of it.
    """
    factors = []
    for delta in deltas:
        r = min(rank, *delta.shape)
        if lora_init == "zero" or not delta.any():
            factors.append((gaussian(r, delta), delta.new_zeros(delta.size(0), r)))
        elif mirrored and factors:  # the mean of two is equally far from both: the second residual is minus the first
            factors.append((factors[0][0], -factors[0][1]))
        else:
            factors.append(svd_factors(delta, r))
        energy[0] += factors[-1][1].square().sum().item()  # the rows of A have length 1, so B holds the energy
        energy[1] += delta.square().sum().item()
    return factors


def to_recursive(full: RecursiveTransformer, n_loop: int = 2, init: Init = "stepwise", rank: int = 0,
                 lora_init: LoraInit = "svd", vectors: Literal["tied", "per_loop"] = "tied",
                 rounding: Rounding = "round", norms: Norms = "init",
                 dtype: torch.dtype | None = None) -> RecursiveTransformer:
    """A recursive model of the same width and depth; `full` stays as it is. UserError if the loops do not divide it."""
    state = full.state_dict()
    return loop_layers(full.config, state.__getitem__, n_loop, init, rank, lora_init, vectors, rounding, norms, dtype)


@torch.no_grad()
def unroll(model: RecursiveTransformer) -> RecursiveTransformer:
    """The ordinary full-size model that computes the same: W' + B A written out for every depth."""
    full = RecursiveTransformer(replace(model.config, n_loop=1, rank=0, vectors="tied"))
    k, state = model.config.n_unique, dict(model.state_dict())
    out = {n: w.clone() for n, w in state.items() if not n.startswith("layers.")}
    for name in (n for n in state if n.startswith("layers.") and "lora_" not in n):
        _, i, rest = name.split(".", 2)
        for loop in range(model.config.n_loop):
            if is_matrix(name):
                w = model.get_submodule(name.removesuffix(".weight")).merged(loop)
            else:
                w = state[name][loop] if model.config.vectors == "per_loop" else state[name]
            out[f"layers.{loop * k + int(i)}.{rest}"] = w.clone()
    full.load_state_dict(out, assign=True)
    return full.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Full-size -> Hugging Face

def hf_config(c: Config, dtype: torch.dtype) -> dict:
    """The config.json that transformers reads for a full-size model."""
    hf = {"model_type": c.arch, "vocab_size": c.vocab_size, "num_hidden_layers": c.n_layer, "hidden_size": c.n_embd,
          "num_attention_heads": c.n_head, "intermediate_size": c.n_hidden, "max_position_embeddings": c.n_ctx,
          "tie_word_embeddings": c.tie_head, "bos_token_id": c.bos_token_id, "eos_token_id": c.eos_token_id,
          "pad_token_id": None, "torch_dtype": str(dtype).removeprefix("torch.")}
    if c.arch == "gpt_neox":
        hf |= {"architectures": ["GPTNeoXForCausalLM"], "layer_norm_eps": c.norm_eps, "rotary_emb_base": c.rope_theta,
               "rotary_pct": c.rotary_pct, "use_parallel_residual": c.parallel, "attention_bias": c.attn_bias,
               "hidden_act": "gelu"}
    else:
        hf |= {"architectures": [c.arch.capitalize() + "ForCausalLM"], "num_key_value_heads": c.n_kv_head,
               "head_dim": c.head_dim, "rms_norm_eps": c.norm_eps, "rope_theta": c.rope_theta, "attention_bias": False,
               "hidden_act": ACTIVATIONS[c.arch][0]}
    return hf


def to_hf(model: RecursiveTransformer, folder, tokenizer=None) -> None:
    """Write a full-size model that transformers loads as GemmaForCausalLM, LlamaForCausalLM or GPTNeoXForCausalLM.

    `tokenizer`: a folder whose tokenizer files go with it. Raises UserError for a model that loops: transformers has no
    such class, `unroll` it first.
    """
    c = model.config
    refuse_looped(c, "it has no Hugging Face class: export unroll(model)")
    tensors, fused = {}, {}
    for name, w in model.state_dict().items():
        theirs, _, part = hf_name(name, c.arch).partition("#")
        if part:
            fused.setdefault(theirs, []).append(w.view(c.n_head, 1, c.head_dim, *w.shape[1:]))
        else:
            tensors[theirs] = w.contiguous()
    tensors |= {name: torch.cat(parts, dim=1).flatten(0, 2).contiguous() for name, parts in fused.items()}
    with replace_folder(folder) as tmp:
        if tokenizer:
            copy_tokenizer(tokenizer, tmp)
        (tmp / "config.json").write_text(json.dumps(hf_config(c, model.embed.weight.dtype), indent=1) + "\n")
        save_file(tensors, tmp / "model.safetensors", metadata={"format": "pt"})


# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class ConvertConfig:
    donor: str = "assets/donor"      # full-size model: a folder or a Hugging Face id
    out: str = "out_recursive"       # folder to write
    loops: int = 2                   # how often the shared block runs (the paper's B); 1 leaves the model at full size
    init: Init = "stepwise"          # which donor layers the stored ones start from (Figure 2)
    rank: int = 0                    # LoRA rank per loop and linear map; 0 ties strictly
    lora_init: LoraInit = "svd"      # LoRA from the SVD of the residual (Eq. 4), or zero (ablation)
    vectors: Literal["tied", "per_loop"] = "tied"  # norm weights and biases: tied (paper), or one per loop
    norms: Norms = "init"            # tied norm weights: as init says, averaged, or the first loop's
    rounding: Rounding = "round"     # where a stepwise step falls between two layers
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"  # of the weights written; keep: as the donor
    unroll: bool = False             # instead: write the recursive --donor out at full size, in Hugging Face's layout
    seed: int = 0                    # for what is random: init=random, zero-residual LoRA


def main(argv=None):
    args = parse_args(ConvertConfig, argv)
    torch.manual_seed(args.seed)
    if Path(args.out).resolve() == Path(args.donor).resolve():
        raise UserError(f"--out={args.out} is the donor itself and would replace it; give another folder")
    dtype = None if args.dtype == "keep" else getattr(torch, args.dtype)
    if args.unroll:
        model = RecursiveTransformer.load(args.donor)
        to_hf(unroll(model).to(dtype), args.out, tokenizer=args.donor)
        print0(f"{args.donor} unrolled -> {args.out}: {model.config.n_layer} layers, for transformers")
        return
    source, report = Donor(args.donor), {}
    c = source.config
    print0(f"{args.donor}: {c.arch}, {c.n_layer} layers of width {c.n_embd} -> {args.loops} loops, "
           f"init {args.init}, rank {args.rank}, vectors {args.vectors}")
    with replace_folder(args.out) as tmp:
        copy_tokenizer(source.folder, tmp)
        model = loop_layers(c, source.read, args.loops, args.init, args.rank, args.lora_init, args.vectors,
                            args.rounding, args.norms, dtype, report)
        model.write(tmp)
    rows = [[kind, f"{kept / max(total, 1e-30):.1%}"] for kind, (kept, total) in report.items()]
    if rows:
        print0(table([["LoRA of", "residual energy kept"], *rows]) + "\n")
    with torch.device("meta"):
        full = RecursiveTransformer(c).num_params()
    print0(table([["parameters", "stored", "run per token", "stored, without embeddings"]] + [
        [name, f"{n['stored']:,}", f"{n['run']:,}", f"{n['stored_block']:,}"]
        for name, n in (("donor", full), ("recursive", model.num_params()))]))
    print0(f"wrote {args.out}; next: python train.py --ckpt={args.out} or python sample.py --ckpt={args.out}")


if __name__ == "__main__":
    script(main)
