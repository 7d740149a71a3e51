"""Hugging Face checkpoints of Gemma, Llama and GPT-NeoX (Pythia): read strictly, one tensor at a time, and written."""

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model import Config, RecursiveTransformer, check_tensors
from runtime import UserError, progress, replace_folder
from tokenizer import copy_tokenizer

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
    except UserError:
        raise
    except (TypeError, ValueError) as e:
        raise UserError(f"{where} has a setting of the wrong kind ({e}); download it again") from None


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
        return Path(snapshot_download(donor, allow_patterns=wanted, ignore_patterns=["*/*"]))
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
            held = "only .bin weights; safetensors are read" if list(self.folder.glob("*.bin")) else "no safetensors"
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


def refuse_looped(config: Config, instead: str) -> None:
    if config.n_loop != 1 or config.rank or config.vectors != "tied":
        raise UserError(f"this is a recursive model already ({config.n_loop} loops, rank {config.rank}, vectors "
                        f"{config.vectors}); {instead}")


# ---------------------------------------------------------------------------------------------------------------------
# Full-size -> Hugging Face

def hf_config(c: Config, dtype: torch.dtype) -> dict:
    """The config.json that transformers reads for a full-size model."""
    hf = {"exported_by": "nanoRRT", "model_type": c.arch,
          "vocab_size": c.vocab_size, "num_hidden_layers": c.n_layer, "hidden_size": c.n_embd,
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
