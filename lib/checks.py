"""Checks of a model's settings and tensors. Each raises UserError, which says what is wrong and what to do."""

import json
import math
from dataclasses import fields
from functools import reduce
from pathlib import Path
from typing import Literal, get_args, get_origin

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lib.cli import UserError
from lib.folders import settled

# ---------------------------------------------------------------------------------------------------------------------
# Settings

def check_type(cls, name: str, value) -> None:
    """Raise UserError unless `value` has the type of the field `name` of the dataclass `cls`."""
    kind = cls.__dataclass_fields__[name].type
    if is_type(value, kind):
        return
    if get_origin(kind) is Literal:
        raise UserError(f"{name}={value!r} is unknown; use one of {', '.join(get_args(kind))}")
    wanted = kind.__name__ if type(kind) is type else kind               # int, or int | None
    raise UserError(f"{name}={value!r} is of the wrong type; it must be {wanted}")


def is_type(value, kind) -> bool:
    """True if `value` has the type `kind`: an int also passes for a float, but no bool for an int, and no nan or inf
    for a float."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is list:
        return type(value) is list and len(value) > 0 and all(is_type(v, get_args(kind)[0]) for v in value)
    if get_args(kind):                                                   # int | None
        return any(is_type(value, one) for one in get_args(kind))
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind


def check_config(c) -> None:
    """Raise UserError unless the fields of a model's Config have their types and fit together."""
    for f in fields(c):
        check_type(type(c), f.name, getattr(c, f.name))
    for name in ("vocab_size", "n_layer", "n_embd", "n_head", "n_kv_head", "head_dim", "n_hidden", "n_ctx",
                 "norm_eps", "rope_theta"):
        if getattr(c, name) <= 0:
            raise UserError(f"{name}={getattr(c, name)} must be positive")
    if c.n_loop < 1 or c.n_layer % c.n_loop:
        divisors = [str(n) for n in range(1, c.n_layer + 1) if c.n_layer % n == 0]
        raise UserError(f"{c.n_loop} loops do not divide the {c.n_layer} layers; use one of {', '.join(divisors)}")
    if c.kv == "first_loop" and c.n_loop == 1:
        raise UserError("kv=first_loop lets later loops read the first loop's keys and values, and there is 1 loop; "
                        "use kv=own, or 2 loops or more")
    if c.rank < 0:
        raise UserError(f"rank {c.rank} is negative; use 0 for a tied model or a positive LoRA rank")
    if c.n_head % c.n_kv_head:
        raise UserError(f"n_kv_head={c.n_kv_head} does not divide the {c.n_head} heads")
    rotated = 2 * len(range(0, int(c.head_dim * c.rotary_pct), 2))       # dimensions are rotated in pairs
    if not 0 < c.rotary_pct <= 1 or not 0 < rotated <= c.head_dim:
        name = "head_dim" if c.rotary_pct == 1 else "rotary_pct"
        raise UserError(f"{name}={getattr(c, name)} rotates {rotated} of each head's {c.head_dim} dimensions; "
                        "use an even head_dim, and a rotary_pct above 0 and up to 1")
    rope = c.rope_llama3
    if rope and not (len(rope) == 4 and min(rope) > 0 and rope[1] < rope[2]):
        raise UserError(f"rope_llama3={rope} must be four positive numbers: factor, low_freq_factor, high_freq_factor "
                        "(the larger of the two) and original_max_position_embeddings")
    if c.no_rope and not set(c.no_rope) <= set(range(c.n_layer)):
        raise UserError(f"no_rope={c.no_rope} names depths that the {c.n_layer} layers do not have")
    for name in ("bos_token_id", "eos_token_id"):
        ids = getattr(c, name)
        if not all(0 <= i < c.vocab_size for i in (ids if isinstance(ids, list) else [ids or 0])):
            raise UserError(f"{name}={ids} is outside the vocabulary of {c.vocab_size}")


def read_config(folder, cls):
    """The instance of `cls` that a checkpoint's config.json describes. UserError if it is missing or not ours."""
    path = settled(folder) / "config.json"
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
    unknown = set(values) - {f.name for f in fields(cls)}
    if unknown:
        raise UserError(f"{path} has unknown settings {sorted(unknown)}: written by a newer version?")
    try:
        return cls(**values)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Tensors

def load_tensors(path: Path, shapes: dict[str, tuple], device="cpu",
                 dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file in `dtype`; None is the widest one stored. UserError if the file is damaged,
    or if names and shapes are not exactly those of `shapes`."""
    try:
        tensors = load_file(path, device=str(device))
    except (OSError, SafetensorError) as e:
        raise UserError(f"cannot read {path} ({e}); the file is missing, cut short or damaged") from None
    check_tensors(shapes, {name: tuple(w.shape) for name, w in tensors.items()}, path)
    dtype = dtype or widest(w.dtype for w in tensors.values())
    return {name: cast(w, dtype, f"{name} in {path}") for name, w in tensors.items()}


def check_tensors(expected: dict[str, tuple], found: dict[str, tuple], where) -> None:
    """Raise UserError unless the names and shapes found are the expected ones; it names the likely cause."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    wrong = [f"{name} is {found[name]}, expected {expected[name]}" for name in sorted(set(expected) & set(found))
             if expected[name] != found[name]]
    causes = (("missing", missing, "a shard was not downloaded, or config.json counts more layers than the file has"),
              ("unexpected", extra, "config.json counts fewer layers than the file has, or belongs to another model"),
              ("wrongly shaped", wrong, "config.json belongs to another size of this model"))
    lines = [f"{len(names)} {kind} ({'; '.join(names[:3])}{' …' * (len(names) > 3)}): {cause}?"
             for kind, names, cause in causes if names]
    if lines:
        raise UserError(f"the tensors in {where} do not fit its config.json: " + "; ".join(lines))


def widest(dtypes) -> torch.dtype:
    """The dtype that holds the numbers of all these dtypes (float32 for bfloat16 weights and float32 norms)."""
    return reduce(torch.promote_types, dtypes)


def cast(w: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`w` in `dtype`. UserError if it has NaN, infinity, or a number that overflows in `dtype`."""
    low, high = torch.stack(w.aminmax()).tolist()                        # both are NaN if there is any
    if not math.isfinite(high - low):
        raise UserError(f"{name} is not finite (from {low} to {high}): its file is damaged, its training diverged, or "
                        f"it overflowed in {w.dtype}; use another checkpoint, or bfloat16")
    if max(-low, high) > torch.finfo(dtype).max:
        raise UserError(f"{name} has a weight of {high if high > -low else low:.6g}, and {dtype} overflows beyond "
                        f"{torch.finfo(dtype).max:.6g}; use --dtype=bfloat16 or float32")
    return w.to(dtype)
