"""Donors: Hugging Face checkpoints of Gemma 1, Llama, Mistral, Qwen 2 and 3, SmolLM3 and GPT-NeoX (Pythia), read
strictly, one tensor at a time; and our models written for transformers, full-size ones in the same layout."""

import json
import re
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lib.checks import cast, check_tensors, check_type, widest
from lib.cli import UserError, is_main, progress
from lib.donors import copy_papers, donor_name, find_donor, read_json
from lib.export import looped_config, model_card, write_code
from lib.folders import replace_folder
from lib.tokenizer import copy_tokenizer, write_fast_tokenizer
from model import Config, RecursiveTransformer

# ---------------------------------------------------------------------------------------------------------------------
# The families: Hugging Face's names for our modules and settings. GPT-NeoX stores q, k and v as one tensor, head by
# head: "name#0" is q, the first third of each head, "name#1" is k and "name#2" is v.

LLAMA_NAMES = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "layers.{}.norm1": "model.layers.{}.input_layernorm",
    "layers.{}.norm2": "model.layers.{}.post_attention_layernorm",
    "layers.{}.attn.q": "model.layers.{}.self_attn.q_proj",
    "layers.{}.attn.k": "model.layers.{}.self_attn.k_proj",
    "layers.{}.attn.v": "model.layers.{}.self_attn.v_proj",
    "layers.{}.attn.o": "model.layers.{}.self_attn.o_proj",
    "layers.{}.attn.q_norm": "model.layers.{}.self_attn.q_norm",
    "layers.{}.attn.k_norm": "model.layers.{}.self_attn.k_norm",
    "layers.{}.mlp.gate": "model.layers.{}.mlp.gate_proj",
    "layers.{}.mlp.up": "model.layers.{}.mlp.up_proj",
    "layers.{}.mlp.down": "model.layers.{}.mlp.down_proj",
}
NEOX_NAMES = {
    "embed": "gpt_neox.embed_in",
    "norm": "gpt_neox.final_layer_norm",
    "head": "embed_out",
    "layers.{}.norm1": "gpt_neox.layers.{}.input_layernorm",
    "layers.{}.norm2": "gpt_neox.layers.{}.post_attention_layernorm",
    "layers.{}.attn.q": "gpt_neox.layers.{}.attention.query_key_value#0",
    "layers.{}.attn.k": "gpt_neox.layers.{}.attention.query_key_value#1",
    "layers.{}.attn.v": "gpt_neox.layers.{}.attention.query_key_value#2",
    "layers.{}.attn.o": "gpt_neox.layers.{}.attention.dense",
    "layers.{}.mlp.up": "gpt_neox.layers.{}.mlp.dense_h_to_4h",
    "layers.{}.mlp.down": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
}


@dataclass
class Family:
    hf_class: str                    # transformers' class is <hf_class>ForCausalLM
    names: dict[str, str]            # our module -> theirs
    settings: dict[str, str]         # our setting -> theirs
    defaults: dict                   # our settings where config.json has none: what transformers' class assumes
    must_agree: dict[str, str]       # a setting that transformers' class ignores -> ours, which it must not contradict
    activations: tuple[str, ...]     # the names of its activation


SETTINGS = {"vocab_size": "vocab_size", "n_layer": "num_hidden_layers", "n_embd": "hidden_size",
            "n_head": "num_attention_heads", "n_hidden": "intermediate_size", "n_ctx": "max_position_embeddings",
            "tie_head": "tie_word_embeddings", "bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id"}
UNBIASED = SETTINGS | {"n_kv_head": "num_key_value_heads", "head_dim": "head_dim", "norm_eps": "rms_norm_eps",
                       "rope_theta": "rope_theta"}
LLAMA = Family(
    hf_class="Llama", names=LLAMA_NAMES, activations=("silu",),
    settings=UNBIASED | {"attn_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    defaults={"n_ctx": 2048, "norm_eps": 1e-6, "tie_head": False, "rope_theta": 10000.0},
    must_agree={"partial_rotary_factor": "rotary_pct", "rotary_pct": "rotary_pct", "rotary_emb_base": "rope_theta"})
GEMMA = replace(
    LLAMA, hf_class="Gemma", activations=("gelu_pytorch_tanh", "gelu"),  # early releases' hidden_act "gelu" is tanh
    settings=UNBIASED | {"attn_bias": "attention_bias"},
    defaults={"n_ctx": 8192, "norm_eps": 1e-6, "tie_head": True, "rope_theta": 10000.0, "head_dim": 256})
MISTRAL = replace(LLAMA, hf_class="Mistral", settings=UNBIASED,
                  defaults=LLAMA.defaults | {"n_ctx": 131072, "n_kv_head": 8})
QWEN2 = replace(LLAMA, hf_class="Qwen2", settings=UNBIASED,
                defaults=LLAMA.defaults | {"n_ctx": 32768, "n_kv_head": 32, "attn_bias": True, "o_bias": False})
QWEN3 = replace(LLAMA, hf_class="Qwen3", settings=GEMMA.settings,
                defaults=LLAMA.defaults | {"n_ctx": 32768, "n_kv_head": 32, "head_dim": 128, "qk_norm": True})
SMOLLM3 = replace(LLAMA, hf_class="SmolLM3", settings=LLAMA.settings | {"no_rope": "no_rope_layers"},
                  defaults=LLAMA.defaults | {"n_ctx": 32768, "n_kv_head": 4, "tie_head": True, "rope_theta": 2e6})
NEOX = Family(
    hf_class="GPTNeoX", names=NEOX_NAMES, activations=("gelu",),
    settings=SETTINGS | {"norm_eps": "layer_norm_eps", "rope_theta": "rotary_emb_base", "rotary_pct": "rotary_pct",
                         "attn_bias": "attention_bias", "parallel": "use_parallel_residual"},
    defaults={"n_ctx": 2048, "norm_eps": 1e-5, "tie_head": False, "rope_theta": 10000.0, "rotary_pct": 0.25,
              "attn_bias": True, "mlp_bias": True, "parallel": True},
    must_agree={"partial_rotary_factor": "rotary_pct", "rope_theta": "rope_theta", "head_dim": "head_dim",
                "num_key_value_heads": "n_head"})
FAMILIES = {"gemma": GEMMA, "llama": LLAMA, "gpt_neox": NEOX, "mistral": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN3,
            "smollm3": SMOLLM3}
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")  # Config.rope_llama3
IN_ROPE = {"rope_theta": "rope_theta", "rotary_pct": "partial_rotary_factor"}  # ours -> theirs in rope_parameters
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # by safetensors' names
NOT_WEIGHTS = re.compile(r"rotary_emb\.inv_freq$|attention\.(bias|masked_bias)$")  # buffers that old checkpoints carry


def hf_name(name: str, arch: str) -> str:
    """`layers.3.attn.q.weight` -> `model.layers.3.self_attn.q_proj.weight` (GPT-NeoX: `...query_key_value.weight#0`).
    """
    module, _, kind = name.rpartition(".")                               # kind: weight or bias
    layer = re.search(r"\.(\d+)\.", module)
    theirs = FAMILIES[arch].names[module.replace(layer[1], "{}", 1) if layer else module]
    theirs, sharp, part = theirs.format(layer and layer[1]).partition("#")
    return f"{theirs}.{kind}{sharp}{part}"


# ---------------------------------------------------------------------------------------------------------------------
# A donor's config.json

# Settings that ask for what this code does not do: each is refused by name, since the model would be silently wrong.
REFUSED = {
    **dict.fromkeys(("rope_scaling", "rope_parameters"), "scaled rotary embeddings of another kind than llama3"),
    **dict.fromkeys(("sliding_window", "use_sliding_window"),
                    "a window shorter than max_position_embeddings, which you may lower to it"),
    "layer_types": "layers of different kinds", "attn_logit_softcapping": "soft-capping",
    "final_logit_softcapping": "soft-capping", "quantization_config": "quantised weights",
    **dict.fromkeys(("use_bidirectional_attention", "is_causal"), "bidirectional attention"),
}
REFUSED_TYPES = {"gemma2": " (soft-capping, sandwich norms, sliding windows)", "olmo2": " (norms after, not before)",
                 **dict.fromkeys(("gemma3", "gemma3_text"), " (sandwich norms, sliding windows)")}
# So are unknown settings whose name suggests the forward pass; other unknown settings are kept for exports.
ABOUT_FORWARD = re.compile(r"rope|rotary|alibi|attn|attention|norm|scal|multiplier|softcap|window|bias|residual|expert"
                           r"|moe|clip|activation|hidden_act|interleav")
HARMLESS = re.compile(  # about training and generation, and what transformers writes into every config.json
    r"_.*|.*(dropout|pdrop|_token_id|_version|flash.*|implementation|initializer_range)|(max|min)_length|num_labels"
    r"|(model_type|id2label|label2id|problem_type|architectures|(torch_)?dtype|use_cache|pretraining_tp|tokenizer_class)"
    r"|output_(attentions|hidden_states|scores)|return_dict.*|torchscript|is_(encoder_)?decoder|chunk_size_feed_forward"
    r"|max_window_layers|no_rope_layer_interval|is_llama_config|exported_by|recursive|repetition_penalty|do_sample"
    r"|temperature|top_[kp]")
NOT_EXPORTED = {"model_type", "architectures", "dtype", "torch_dtype", "exported_by", "auto_map", "hidden_act",
                "hidden_activation", "rope_scaling", "rope_parameters"}  # an export has its own, or has none


def config_from_hf(hf: dict, where="config.json") -> Config:
    """The full-size Config for a Hugging Face config.json. UserError for settings that this code would get wrong."""
    arch = hf.get("model_type")
    if hf.get("format") == "nanoRRT":
        raise UserError(f"{where} is of a checkpoint of this project, but a donor is a Hugging Face checkpoint: "
                        "export it first with python convert.py --unroll")
    if arch == "nanorrt":
        raise UserError(f"{where} is of a looped export to transformers by convert.py --hf: give the checkpoint "
                        "that it was made from, or as a donor that one's export by convert.py --unroll")
    if arch not in FAMILIES:
        raise UserError(f"{where}: model_type {arch!r} is not supported{REFUSED_TYPES.get(arch, '')}; donors are of "
                        f"type {', '.join(FAMILIES)}")
    family = FAMILIES[arch]
    hf = {"sliding_window": 4096} | hf if arch == "mistral" else hf      # as its class in transformers
    refuse_unsupported(hf, arch, where)
    values = family.defaults | {ours: hf[theirs] for ours, theirs in family.settings.items() if theirs in hf}
    for name in ("n_embd", "n_head", "n_layer", "n_hidden", "vocab_size"):
        if name not in values:
            raise UserError(f"{where}: setting '{family.settings[name]}' is missing; "
                            f"is it the config.json of a {arch} model?")
    values |= {name: rope_setting(hf, family, name, where) for name in IN_ROPE if name in family.settings}
    values["rope_llama3"] = rope_llama3(hf, values["n_ctx"], where)
    handled = NOT_EXPORTED | set(family.must_agree) | set(family.settings.values())
    try:
        for name, value in values.items():
            if value is not None or name not in ("n_kv_head", "head_dim"):
                check_type(Config, name, value)
        if "no_rope" in family.settings:
            values["no_rope"] = unrotated_layers(hf, values["n_layer"])
        derived = {"n_kv_head": values["n_head"], "head_dim": values["n_embd"] // max(values["n_head"], 1)}
        values |= {name: value for name, value in derived.items() if values.get(name) is None}
        config = Config(arch=arch, **values, extra={key: value for key, value in hf.items() if key not in handled})
    except UserError as e:                                               # it begins with our name of the setting
        name, *rest = str(e).partition("=")
        name = (family.settings | {"rope_llama3": " ".join(LLAMA3)}).get(name, name)
        raise UserError(f"{where}: {name}{''.join(rest)}") from None
    for key, name in family.must_agree.items():
        for given in (source.get(key) for source in (hf, *rope_dicts(hf))):
            if given not in (None, getattr(config, name)):
                raise UserError(f"{where}: {key}={given!r} is not supported for {arch}, where it is "
                                f"{getattr(config, name)}")
    return config


def rope_dicts(hf: dict) -> list[dict]:
    return [hf.get(name) or {} for name in ("rope_parameters", "rope_scaling")]


def rope_setting(hf: dict, family: Family, name: str, where) -> float:
    """Our setting `name`, from config.json itself (before transformers 5) or from its rope_parameters. UserError if
    both have it and differ."""
    key = family.settings[name]
    values = [v for v in (hf.get(key), *(rope.get(IN_ROPE[name]) for rope in rope_dicts(hf))) if v is not None]
    values = values or [family.defaults[name]]
    if any(v != values[0] for v in values):
        raise UserError(f"{where}: {key} is given as {' and as '.join(map(repr, values))}; keep the right one")
    return float(values[0]) if type(values[0]) is int else values[0]


def rope_llama3(hf: dict, n_ctx: int, where) -> list[float] | None:
    """The LLAMA3 settings of config.json, None without that scaling. UserError if it is given twice and they differ."""
    found = [[({LLAMA3[3]: n_ctx} | rope | hf).get(name) for name in LLAMA3] if is_llama3(rope) else None
             for rope in rope_dicts(hf) if rope]
    if any(one != found[0] for one in found):
        raise UserError(f"{where}: rope_scaling and rope_parameters differ; keep the right one")
    return found[0] if found else None


def is_llama3(rope: dict) -> bool:
    return "llama3" in (rope.get("rope_type"), rope.get("type"))         # "type" is the old key


def unrotated_layers(hf: dict, n_layer: int) -> list[int] | None:
    """The layers without rotation: those with a 0 in no_rope_layers, or every no_rope_layer_interval-th."""
    flags, interval = hf.get("no_rope_layers"), hf.get("no_rope_layer_interval", 4)
    if type(interval) is not int or interval < 1 or flags and len(flags) < n_layer:
        raise UserError(f"no_rope={flags} needs one entry for each of the {n_layer} layers, or null beside a "
                        f"no_rope_layer_interval that is positive ({interval!r})")
    flags = flags or [(i + 1) % interval for i in range(n_layer)]
    return [i for i in range(n_layer) if not flags[i]] or None


def refuse_unsupported(hf: dict, arch: str, where) -> None:
    """Raise UserError for settings that ask for another forward pass; warn once about unknown ones that do not."""
    family, unknown = FAMILIES[arch], []
    for key, value in hf.items():
        if (not value and key != "is_causal") or key in family.settings.values():    # off, or read
            continue
        if key in ("hidden_act", "hidden_activation"):
            if value not in family.activations[:1 if key == "hidden_activation" else None]:
                raise UserError(f"{where}: activation {value!r} is not supported for {arch}; "
                                f"use {family.activations[0]}")
        elif key in REFUSED:
            if not is_harmless(key, value, hf):
                raise UserError(f"{where}: {key}={value!r} ({REFUSED[key]}) is not supported; "
                                "choose a donor without it")
        elif key in family.must_agree or HARMLESS.fullmatch(key):
            continue
        elif ABOUT_FORWARD.search(key):
            raise UserError(f"{where}: {key}={value!r} is not known here and may change the forward pass; choose a "
                            "donor without it, or remove it if transformers does not read it either")
        else:
            unknown.append(key)
    if unknown:
        warn(f"config.json has settings that are not known here and are ignored: {', '.join(unknown)}")


def is_harmless(key: str, value, hf: dict) -> bool:
    """True if a setting in REFUSED has a value that changes nothing."""
    if key == "is_causal":
        return value in (True, None)
    if key in ("sliding_window", "use_sliding_window"):                  # off, or as wide as the longest text
        arch, window = hf["model_type"], hf.get("sliding_window", 4096)
        used = hf.get("use_sliding_window", arch not in ("qwen2", "qwen3", "smollm3")) or arch == "mistral"
        n_ctx = hf.get("max_position_embeddings", FAMILIES[arch].defaults["n_ctx"])
        return not used or window is None or (type(window) is type(n_ctx) is int and window >= n_ctx)
    if key == "layer_types":
        return isinstance(value, list) and all(kind == "full_attention" for kind in value)
    if not key.startswith("rope_") or not isinstance(value, dict):
        return False
    kind, read = ("llama3", LLAMA3) if is_llama3(value) else ("default", ())
    plain = {"rope_type": kind, "type": kind, "factor": 1, LLAMA3[3]: hf.get("max_position_embeddings")}
    return all(v is None or k in ("rope_theta", "partial_rotary_factor", *read) or k in plain and v == plain[k]
               for k, v in value.items())


@cache
def warn(message: str) -> None:
    """Print a warning to stderr, each message once."""
    if is_main():
        print(f"warning: {message}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Reading a donor's tensors

class Donor:
    """A Hugging Face checkpoint on disk, read one tensor at a time under our names. Its tensors must be exactly those
    that its config.json asks for: UserError otherwise, before any weight is read."""

    def __init__(self, donor: str):
        self.folder = find_donor(donor)
        self.config = config_from_hf(read_json(self.folder / "config.json"), self.folder / "config.json")
        name, before = donor_name(self.folder), self.config.extra.get("_name_or_path")    # perhaps its predecessor's
        self.config.extra["_name_or_path"] = name if "/" in name else before or name
        if (self.folder / "adapter_config.json").exists():
            raise UserError(f"{self.folder} has an adapter beside its weights (adapter_config.json), which is not "
                            "read; merge the two first (peft's merge_and_unload), or remove it")
        self.files, shapes, dtypes = self.find_files(), {}, {}
        for path in sorted(set(self.files.values())):
            with self.open(path) as f:
                for name in f.keys():  # noqa: SIM118 (not a dict)
                    if self.files.setdefault(name, path) == path:        # unlisted too; not another file's copies
                        shapes[name] = tuple(f.get_slice(name).get_shape())
                        dtypes[name] = f.get_slice(name).get_dtype()
        head = hf_name("head.weight", self.config.arch)
        alias = {"lm_head.weight": head} if head not in shapes else {}   # GPT-NeoX's head has two names
        self.stored_as = {alias.get(n, n): n for n in shapes if not NOT_WEIGHTS.search(n)}
        found = {n: shapes[stored] for n, stored in self.stored_as.items()}
        redundant = self.config.tie_head and found.pop(head, None) is not None  # some store a tied head too
        check_tensors(hf_shapes(self.config), found, self.folder)
        self.dtype = widest(FLOATS.get(dtypes[self.stored_as[n]], torch.float16) for n in found)
        if redundant and not torch.equal(self.load(head), self.load(hf_name("embed.weight", self.config.arch))):
            raise UserError(f"{self.folder}: {self.stored_as[head]} differs from the embedding, but config.json says "
                            "that they are tied (tie_word_embeddings); set it to false to use this head")

    def find_files(self) -> dict[str, Path]:
        """Tensor name -> the safetensors file that holds it."""
        index, single = self.folder / "model.safetensors.index.json", self.folder / "model.safetensors"
        if single.exists():
            with self.open(single) as f:
                return {name: single for name in f.keys()}  # noqa: SIM118
        if not index.exists():
            held = "only .bin weights, which are not read" if list(self.folder.glob("*.bin")) else "no safetensors"
            raise UserError(f"{self.folder} has neither model.safetensors nor its index ({held})")
        try:
            files = {name: self.folder / file for name, file in read_json(index)["weight_map"].items()}
        except (KeyError, AttributeError, TypeError):
            raise UserError(f"{index} has no weight_map: download it again") from None
        missing = sorted({p.name for p in files.values() if not p.exists()})
        if missing:
            raise UserError(f"{self.folder} lacks {', '.join(missing[:3])}, which {index.name} names; download it")
        return files

    def open(self, path: Path):
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as e:
            raise UserError(f"cannot read {path} ({e}); the file is cut short or damaged: download it again") from None

    def load(self, theirs: str) -> Tensor:
        """The tensor of this Hugging Face name, as stored."""
        stored = self.stored_as[theirs]
        with self.open(self.files[stored]) as f:             # closed after each tensor, which frees its pages
            w = f.get_tensor(stored).clone()
        if w.dtype not in FLOATS.values():
            raise UserError(f"{self.folder}: {stored} is stored as {w.dtype}; float32, bfloat16 and float16 are read, "
                            "quantised weights are not")
        return w

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Our tensor `name` in `dtype`; None is the donor's, the widest it is stored in. UserError if a number is not
        finite, or overflows in `dtype`."""
        theirs, _, part = hf_name(name, self.config.arch).partition("#")
        w = cast(self.load(theirs), dtype or self.dtype, f"{self.folder}: {self.stored_as[theirs]}")
        return split_heads(w, self.config)[:, int(part)].flatten(0, 1).contiguous() if part else w


def split_heads(w: Tensor, config: Config) -> Tensor:
    """(H, 3, D, ...) of GPT-NeoX's query_key_value weight or bias (H * 3 * D, ...)."""
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
    """The full-size model (n_loop=1) of a Hugging Face folder or id, in eval mode; dtype None is the widest that it is
    stored in."""
    source = Donor(donor)
    with torch.device("meta"):
        model = RecursiveTransformer(source.config)
    names = progress(list(model.state_dict()), desc="reading donor", unit="tensor")
    model.load_state_dict({name: source.read(name, dtype) for name in names}, assign=True)
    return model.eval()


def load_any(folder: str, dtype: torch.dtype | None = None) -> RecursiveTransformer:
    """The model of a checkpoint of ours, or of a Hugging Face one (a folder or an id)."""
    path = Path(folder).expanduser()
    if not path.is_dir() and "/" in str(folder):
        path = find_donor(folder)
    if (path / "config.json").exists() and "model_type" in read_json(path / "config.json"):
        return load_full(path, dtype)
    return RecursiveTransformer.load(path, dtype=dtype)


def is_looped(config: Config) -> bool:
    """False for a full-size model; True for one that has loops, LoRA or vectors per loop."""
    return config.n_loop != 1 or config.rank > 0 or config.vectors != "tied"


def refuse_looped(config: Config, instead: str) -> None:
    """Raise UserError unless the model is a full-size one; `instead` says what to do."""
    if is_looped(config):
        raise UserError(f"this is a recursive model already ({config.n_loop} loops, rank {config.rank}, vectors "
                        f"{config.vectors}); {instead}")


def refuse_first_loop_kv(config: Config) -> None:
    """Raise UserError if later loops read the first loop's keys and values, which no full-size model can do."""
    if config.kv == "first_loop":
        raise UserError("later loops of this model read the keys and values of the first (kv=first_loop), and a layer "
                        "of a full-size model computes its own from its own input: it has no full-size form; export "
                        "it looped with convert.py --hf, or convert the donor with --kv=own")


# ---------------------------------------------------------------------------------------------------------------------
# Ours -> Hugging Face

def hf_config(c: Config, dtype: torch.dtype) -> dict:
    """The config.json of a full-size model for transformers: the donor's other settings, and the model's own."""
    family = FAMILIES[c.arch]
    hf = {"pad_token_id": None} | c.extra | {
        "exported_by": "nanoRRT", "model_type": c.arch, "architectures": [family.hf_class + "ForCausalLM"],
        "hidden_act": family.activations[0], "torch_dtype": str(dtype).removeprefix("torch.")} | {
        theirs: getattr(c, ours) for ours, theirs in family.settings.items()}
    if c.rope_llama3:
        hf["rope_scaling"] = {"rope_type": "llama3"} | dict(zip(LLAMA3, c.rope_llama3, strict=True))
    if "no_rope" in family.settings:
        hf["no_rope_layers"] = [int(c.rotates(0, i)) for i in range(c.n_layer)]
    return hf


def to_hf(model: RecursiveTransformer, folder, tokenizer=None) -> None:
    """Write a model for transformers: a full-size one loads as GemmaForCausalLM, LlamaForCausalLM, and so on; a looped
    one, with each weight stored once, by trust_remote_code=True (lib/export.py).

    `tokenizer`: a folder whose tokenizer files, README and licence are copied along, and whose log supplies the losses.
    UserError for a full-size model that the class of its family cannot have.
    """
    c, share = model.config, None
    if is_looped(c):
        share = stored_share(model)
        hf = looped_config(c, str(model.embed.weight.dtype).removeprefix("torch."))
        tensors = {f"model.{name}": w.contiguous() for name, w in model.state_dict().items()}
    else:
        hf, tensors = hf_config(c, model.embed.weight.dtype), hf_tensors(model)
        back = config_from_hf(hf).architecture()
        lost = [f"{name}={value}" for name, value in c.architecture().items() if value != back[name]]
        if lost:
            raise UserError(f"transformers' {c.arch} cannot have {', '.join(lost)}: this model has no Hugging Face "
                            "class")
    with replace_folder(folder) as tmp:
        if tokenizer:
            copy_tokenizer(tokenizer, tmp)
            copy_papers(Path(tokenizer), tmp)
            if not (tmp / "tokenizer.json").exists():
                write_fast_tokenizer(tmp, c.bos_token_id, c.eos_token_id, c.n_ctx)
            (tmp / "README.md").write_text(model_card(c, share, tmp, Path(tokenizer)), encoding="utf-8")
        if share:
            write_code(tmp)
        (tmp / "config.json").write_text(json.dumps(hf, indent=1) + "\n", encoding="utf-8")
        save_file(tensors, tmp / "model.safetensors", metadata={"format": "pt"})


def stored_share(model: RecursiveTransformer) -> float:
    """The parameters of the block that are stored, as a share of the donor's block."""
    with torch.device("meta"):
        donor = RecursiveTransformer(replace(model.config, n_loop=1, rank=0, vectors="tied", kv="own"))
    return model.num_params()["stored_block"] / donor.num_params()["stored_block"]


def hf_tensors(model: RecursiveTransformer) -> dict[str, Tensor]:
    """The tensors of a full-size model under Hugging Face's names."""
    c, tensors, fused = model.config, {}, {}
    for name, w in model.state_dict().items():
        theirs, _, part = hf_name(name, c.arch).partition("#")
        if part:
            fused.setdefault(theirs, []).append(w.view(c.n_head, 1, c.head_dim, *w.shape[1:]))
        else:
            tensors[theirs] = w.contiguous()
    return tensors | {name: torch.cat(parts, dim=1).flatten(0, 2).contiguous() for name, parts in fused.items()}
