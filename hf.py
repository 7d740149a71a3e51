"""Hugging Face checkpoints of Gemma, Llama and GPT-NeoX (Pythia): read strictly, one tensor at a time, and written."""

import json
import re
import sys
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lib.checks import cast, check_tensors, check_type, widest
from lib.cli import UserError, is_main, progress
from lib.donors import DONOR_README, HUB_ID, LICENCES, copy_papers, donor_name, find_donor, read_json
from lib.folders import replace_folder
from lib.tokenizer import copy_tokenizer, write_fast_tokenizer
from model import Config, RecursiveTransformer

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
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # by safetensors' names
NOT_WEIGHTS = re.compile(r"rotary_emb\.inv_freq$|attention\.(bias|masked_bias)$")  # buffers that old checkpoints carry


def hf_name(name: str, arch: str) -> str:
    """`layers.3.attn.q.weight` -> `model.layers.3.self_attn.q_proj.weight` (NeoX: with `#part` for the fused map)."""
    layer = re.search(r"layers\.(\d+)\.", name)
    if not layer:
        return NAMES[arch][name]
    return NAMES[arch][name.replace(layer[0], "layers.{}.", 1)].format(layer[1])


# ---------------------------------------------------------------------------------------------------------------------
# Reading a donor

# Our settings by Hugging Face's names, and what its classes assume where config.json is silent.
KEYS = {"vocab_size": "vocab_size", "n_layer": "num_hidden_layers", "n_embd": "hidden_size",
        "n_head": "num_attention_heads", "n_hidden": "intermediate_size", "n_ctx": "max_position_embeddings",
        "tie_head": "tie_word_embeddings", "bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id"}
LLAMA_KEYS = KEYS | {"n_kv_head": "num_key_value_heads", "head_dim": "head_dim", "norm_eps": "rms_norm_eps",
                     "rope_theta": "rope_theta"}
NEOX_KEYS = KEYS | {"norm_eps": "layer_norm_eps", "rope_theta": "rotary_emb_base", "rotary_pct": "rotary_pct",
                    "attn_bias": "attention_bias", "parallel": "use_parallel_residual"}
KEYS = {"gemma": LLAMA_KEYS, "llama": LLAMA_KEYS, "gpt_neox": NEOX_KEYS}
DEFAULTS = {
    "gemma": {"n_ctx": 8192, "norm_eps": 1e-6, "tie_head": True, "head_dim": 256},
    "llama": {"n_ctx": 2048, "norm_eps": 1e-6, "tie_head": False},
    "gpt_neox": {"n_ctx": 2048, "norm_eps": 1e-5, "tie_head": False, "attn_bias": True, "mlp_bias": True,
                 "parallel": True},
}
# Gemma's first releases say "gelu" and mean the tanh approximation, as transformers knows too.
ACTIVATIONS = {"gemma": ("gelu_pytorch_tanh", "gelu"), "llama": ("silu",), "gpt_neox": ("gelu",)}

# What a config may ask for that this code does not do. Silently wrong is the worst outcome: each is refused by name.
REFUSED = {
    "rope_scaling": "scaled rotary embeddings", "rope_parameters": "scaled rotary embeddings",
    "sliding_window": "sliding-window attention", "layer_types": "layers of different kinds",
    "attention_bias": "attention biases", "mlp_bias": "MLP biases", "attn_logit_softcapping": "soft-capping",
    "final_logit_softcapping": "soft-capping", "quantization_config": "quantised weights",
    "use_bidirectional_attention": "bidirectional attention",
}
# So is any other setting whose name is about the forward pass; what else there is, goes along into exports.
ABOUT_FORWARD = re.compile(r"rope|rotary|alibi|attn|attention|norm|scal|multiplier|softcap|window|bias|residual|expert"
                           r"|moe|clip|activation|hidden_act|interleav")
HARMLESS = re.compile(  # of training, generation, and what transformers writes into every config.json
    r"_.*|.*(dropout|pdrop|_token_id|_version|flash.*|implementation|initializer_range)|(max|min)_length|num_labels"
    r"|(model_type|id2label|label2id|problem_type|architectures|(torch_)?dtype|use_cache|pretraining_tp|tokenizer_class)"
    r"|output_(attentions|hidden_states|scores)|return_dict.*|torchscript|is_(encoder_)?decoder|chunk_size_feed_forward"
    r"|max_window_layers|is_llama_config|exported_by|recursive|repetition_penalty|do_sample|temperature|top_[kp]")
COMPARED = {"num_key_value_heads", "head_dim", "rope_theta", "rotary_emb_base", "rotary_pct", "partial_rotary_factor"}
DROPPED = {"model_type", "architectures", "dtype", "torch_dtype", "exported_by", "auto_map", "hidden_act",
           "hidden_activation", "rope_scaling", "rope_parameters", *COMPARED}  # exports have their own


def config_from_hf(hf: dict, where="config.json") -> Config:
    """The full-size Config for a Hugging Face config.json. Raises UserError for whatever this code would get wrong."""
    arch = hf.get("model_type")
    if hf.get("format") == "nanoRRT":
        raise UserError(f"{where} is of a checkpoint of this project; a donor is a Hugging Face one: "
                        "write it out with python convert.py --unroll first")
    if arch not in NAMES:
        raise UserError(f"{where}: model_type {arch!r} is not supported; donors are of type {', '.join(NAMES)}")
    neox, keys = arch == "gpt_neox", KEYS[arch]
    refuse_unsupported(hf, arch, where)
    values = DEFAULTS[arch] | {ours: hf[theirs] for ours, theirs in keys.items() if theirs in hf}
    for name in ("n_embd", "n_head", "n_layer", "n_hidden", "vocab_size"):
        if name not in values:
            raise UserError(f"{where}: setting '{keys[name]}' is missing; is it the config.json of a {arch} model?")
    values["rope_theta"] = one_of(hf, keys["rope_theta"], "rope_theta", 10000.0, where)
    if neox:
        values["rotary_pct"] = one_of(hf, "rotary_pct", "partial_rotary_factor", 0.25, where)
    try:
        for name, value in values.items():
            if value is not None or name not in ("n_kv_head", "head_dim"):
                check_type(Config, name, value)
        derived = {"n_kv_head": values["n_head"], "head_dim": values["n_embd"] // max(values["n_head"], 1)}
        values |= {name: value for name, value in derived.items() if values.get(name) is None}
        config = Config(arch=arch, **values, extra={key: value for key, value in hf.items()
                                                    if key not in DROPPED and key not in keys.values()})
    except UserError as e:                                               # it begins with our name of the setting
        name, *rest = str(e).partition("=")
        raise UserError(f"{where}: {keys.get(name, name)}{''.join(rest)}") from None
    compared = {"partial_rotary_factor": config.rotary_pct}              # what the family's class does not read
    compared |= ({"rope_theta": config.rope_theta, "head_dim": config.head_dim, "num_key_value_heads": config.n_head}
                 if neox else {"rotary_emb_base": config.rope_theta, "rotary_pct": 1.0})
    for key, value in compared.items():
        for place in (hf, *ropes(hf)):
            if place.get(key) not in (None, value):
                raise UserError(f"{where}: {key}={place[key]!r} is not supported for {arch}, where it is {value}")
    return config


def ropes(hf: dict) -> list[dict]:
    return [hf.get(name) or {} for name in ("rope_parameters", "rope_scaling")]


def one_of(hf: dict, key: str, in_rope: str, default: float, where) -> float:
    """A setting that stands in config.json itself (before transformers 5) or in its rope_parameters. UserError if both
    do and they differ."""
    values = [v for v in (hf.get(key), *(rope.get(in_rope) for rope in ropes(hf))) if v is not None] or [default]
    if any(v != values[0] for v in values):
        raise UserError(f"{where}: {key} is given as {' and as '.join(map(repr, values))}; keep the right one")
    return float(values[0]) if type(values[0]) is int else values[0]


def refuse_unsupported(hf: dict, arch: str, where) -> None:
    """Raise UserError for settings that ask for another forward pass; name, once, those that nobody here knows."""
    unknown = []
    for key, value in hf.items():
        if not value or key in KEYS[arch].values():                      # off, or read
            continue
        if key in ("hidden_act", "hidden_activation"):
            if value not in ACTIVATIONS[arch]:
                raise UserError(f"{where}: activation {value!r} is not supported for {arch}; "
                                f"use {ACTIVATIONS[arch][0]}")
        elif key in REFUSED:
            if not is_harmless(key, value, hf):
                raise UserError(f"{where}: {key}={value!r} ({REFUSED[key]}) is not supported; "
                                "choose a donor without it")
        elif key in COMPARED or HARMLESS.fullmatch(key):
            continue
        elif ABOUT_FORWARD.search(key):
            raise UserError(f"{where}: {key}={value!r} is not known here, and sounds like another forward pass; choose "
                            "a donor without it, or remove it if transformers does not read it either")
        else:
            unknown.append(key)
    if unknown:
        warn(f"config.json has settings that are not known here and change nothing: {', '.join(unknown)}")


def is_harmless(key: str, value, hf: dict) -> bool:
    """True if a setting that is refused otherwise asks for nothing special."""
    if key == "sliding_window":
        return hf.get("use_sliding_window") is False
    if key == "layer_types":
        return isinstance(value, list) and all(kind == "full_attention" for kind in value)
    plain = {"rope_type": "default", "type": "default", "factor": 1,     # "type" is the old key
             "original_max_position_embeddings": hf.get("max_position_embeddings")}
    return key.startswith("rope_") and isinstance(value, dict) and all(
        v is None or k in ("rope_theta", "partial_rotary_factor") or k in plain and v == plain[k]
        for k, v in value.items())


@cache
def warn(message: str) -> None:
    """Say something on stderr, once."""
    if is_main():
        print(f"warning: {message}", file=sys.stderr)


class Donor:
    """A Hugging Face checkpoint on disk, read one tensor at a time by our names. Strict: every tensor that the config
    asks for must be there in its shape, and no other. Raises UserError otherwise, before any weight is read."""

    def __init__(self, donor: str):
        self.folder = find_donor(donor)
        self.config = config_from_hf(read_json(self.folder / "config.json"), self.folder / "config.json")
        self.config.extra.setdefault("_name_or_path", donor_name(self.folder))
        if (self.folder / "adapter_config.json").exists():
            raise UserError(f"{self.folder} has an adapter beside its weights (adapter_config.json), which is not "
                            "read; merge the two first (peft's merge_and_unload), or remove it")
        self.files, shapes, kinds = self.find_files(), {}, {}
        for path in sorted(set(self.files.values())):
            with self.open(path) as f:
                for name in f.keys():  # noqa: SIM118 (not a dict)
                    if self.files.setdefault(name, path) == path:        # also what the index forgets
                        shapes[name] = tuple(f.get_slice(name).get_shape())
                        kinds[name] = f.get_slice(name).get_dtype()
        head = hf_name("head.weight", self.config.arch)
        alias = {"lm_head.weight": head} if head not in shapes else {}
        self.stored_as = {alias.get(n, n): n for n in shapes if not NOT_WEIGHTS.search(n)}
        have = {n: shapes[stored] for n, stored in self.stored_as.items()}
        twice = self.config.tie_head and have.pop(head, None)            # some checkpoints store a tied head as well
        check_tensors(hf_shapes(self.config), have, self.folder)
        self.dtype = widest(FLOATS.get(kinds[self.stored_as[n]], torch.float16) for n in have)
        if twice and not torch.equal(self.load(head), self.load(hf_name("embed.weight", self.config.arch))):
            raise UserError(f"{self.folder}: {self.stored_as[head]} differs from the embedding, and config.json says "
                            "that they are one (tie_word_embeddings); set it to false if the head is meant to count")

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

    def load(self, theirs: str) -> Tensor:
        stored = self.stored_as[theirs]
        with self.open(self.files[stored]) as f:  # opened anew each time: a closed file's pages leave our memory
            w = f.get_tensor(stored).clone()
        if w.dtype not in FLOATS.values():
            raise UserError(f"{self.folder}: {stored} is stored as {w.dtype}; float32, bfloat16 and float16 are read, "
                            "quantised weights are not")
        return w

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Our tensor `name`, in the donor's dtype (the widest of those it is stored in) or in `dtype`. UserError if it
        is not finite, or overflows there."""
        theirs, _, part = hf_name(name, self.config.arch).partition("#")
        w = cast(self.load(theirs), dtype or self.dtype, f"{self.folder}: {self.stored_as[theirs]}")
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


def load_full(donor: str, dtype: torch.dtype | None = None) -> RecursiveTransformer:
    """The full-size model (n_loop=1) of a Hugging Face folder or id, in eval mode; dtype None keeps the donor's (the
    widest, where it is stored in several)."""
    source = Donor(donor)
    with torch.device("meta"):
        model = RecursiveTransformer(source.config)
    names = progress(list(model.state_dict()), desc="reading donor", unit="tensor")
    model.load_state_dict({name: source.read(name, dtype) for name in names}, assign=True)
    return model.eval()


def load_any(folder: str, dtype: torch.dtype | None = None) -> RecursiveTransformer:
    """A checkpoint of ours, or else a Hugging Face one at full size."""
    path = Path(folder).expanduser()
    if not path.is_dir() and "/" in str(folder):
        path = find_donor(folder)
    if (path / "config.json").exists() and "model_type" in read_json(path / "config.json"):
        return load_full(path, dtype)
    return RecursiveTransformer.load(path, dtype=dtype)


def refuse_looped(config: Config, instead: str) -> None:
    if config.n_loop != 1 or config.rank or config.vectors != "tied":
        raise UserError(f"this is a recursive model already ({config.n_loop} loops, rank {config.rank}, vectors "
                        f"{config.vectors}); {instead}")


# ---------------------------------------------------------------------------------------------------------------------
# Full-size -> Hugging Face

def hf_config(c: Config, dtype: torch.dtype) -> dict:
    """The config.json that transformers reads for a full-size model: the donor's, with what is true of this one."""
    family = "GPTNeoX" if c.arch == "gpt_neox" else c.arch.capitalize()
    return {"pad_token_id": None, "attention_bias": False} | c.extra | {
        "exported_by": "nanoRRT", "model_type": c.arch, "architectures": [family + "ForCausalLM"],
        "hidden_act": ACTIVATIONS[c.arch][0], "torch_dtype": str(dtype).removeprefix("torch.")} | {
        theirs: getattr(c, ours) for ours, theirs in KEYS[c.arch].items()}


def to_hf(model: RecursiveTransformer, folder, tokenizer=None) -> None:
    """Write a full-size model that transformers loads as GemmaForCausalLM, LlamaForCausalLM or GPTNeoXForCausalLM.

    `tokenizer`: a folder whose tokenizer files, README and licence go with it. Raises UserError for a model that loops:
    transformers has no such class, `unroll` it first.
    """
    c = model.config
    refuse_looped(c, "it has no Hugging Face class: export unroll(model)")
    hf = hf_config(c, model.embed.weight.dtype)
    back = config_from_hf(hf).architecture()
    lost = [f"{name}={value}" for name, value in c.architecture().items() if value != back[name]]
    if lost:
        raise UserError(f"transformers' {c.arch} cannot have {', '.join(lost)}: this model has no Hugging Face class")
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
            copy_papers(Path(tokenizer), tmp)
            if not (tmp / "tokenizer.json").exists():
                write_fast_tokenizer(tmp, c.bos_token_id, c.eos_token_id, c.n_ctx)
            (tmp / "README.md").write_text(model_card(c, tmp), encoding="utf-8")
        (tmp / "config.json").write_text(json.dumps(hf, indent=1) + "\n", encoding="utf-8")
        save_file(tensors, tmp / "model.safetensors", metadata={"format": "pt"})


def model_card(c: Config, folder: Path) -> str:
    """What the README of an export says, with the licence as README_donor.md in `folder` has it."""
    donor, looped = c.extra.get("_name_or_path", "an unnamed donor"), c.extra.get("recursive")
    papers = sorted(path.name for name in (*LICENCES, DONOR_README) for path in folder.glob(name))
    readme = (folder / DONOR_README).read_text(encoding="utf-8", errors="replace") if DONOR_README in papers else ""
    front = re.match(r"---\n(.*?\n)---\n", readme, re.S)
    lines = re.findall(r"^license(?:_name|_link)?:.*$", front[1] if front else "", re.M)
    lines += [f"base_model: {donor}"] * bool(re.fullmatch(HUB_ID, donor))
    donor = donor if re.fullmatch(HUB_ID, donor) else Path(donor).name
    what = (f"A Relaxed Recursive Transformer of {looped['n_loop']} loops and LoRA rank {looped['rank']}, made from "
            f"{donor} and written out at full size" if looped else donor)
    return "".join(f"{line}\n" for line in ["---", *lines, "---", ""] if lines) + (
        f"# {what}\n\nnanoRRT wrote this folder: {c.n_layer} layers, which transformers loads like any other {c.arch} "
        f"model. The donor's licence holds for it; {', '.join(papers) or 'no file of the donor'} came along.\n")
