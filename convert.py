"""Turn a full-size model into a (Relaxed) Recursive Transformer (§2.2, §2.3), and back.

    python convert.py --donor=assets/donor --loops=2 --init=average --rank=64 --out=out_relaxed
    python convert.py --donor=assets/donor --loops=2 --init=calibrated --rank=64 --out=out_calibrated   # (calibrate.py)
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from calibrate import calibration_windows, to_calibrated
from hf import Donor, load_any, load_full, refuse_looped, to_hf
from lib.checks import cast
from lib.cli import UserError, parse_args, print0, progress, script, table
from lib.data import load_tokens
from lib.donors import copy_papers
from lib.folders import check_out, replace_folder
from lib.tokenizer import Tokenizer, copy_tokenizer
from model import Config, RecursiveTransformer, is_matrix

__all__ = ["load_any", "load_full", "loop_layers", "source_layers", "svd_factors", "to_hf", "to_recursive", "unroll"]

Init = Literal["stepwise", "average", "lower", "random"]
AnyInit = Literal[Init, "calibrated"]  # the last is not made from weights alone: calibrate.py
LoraInit = Literal["svd", "zero"]
Rounding = Literal["round", "floor"]
Norms = Literal["init", "average", "pick"]
Vectors = Literal["tied", "per_loop"]


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


Read = Callable[[str], Tensor]  # the donor's tensor of that name: from memory, or from the disk one at a time


@torch.no_grad()
def loop_layers(config: Config, read: Read, target: Config, init: Init = "stepwise", lora_init: LoraInit = "svd",
                rounding: Rounding = "round", norms: Norms = "init", dtype: torch.dtype | None = None,
                report: dict | None = None) -> RecursiveTransformer:
    """The recursive model of config `target` made of a full-size model's tensors (§2.2, §2.3); dtype None keeps theirs.

    `report`, if given, is filled with kind of matrix -> [residual energy that the LoRA keeps, residual energy].
    """
    refuse_looped(config, "convert a full-size model, or unroll this one first")
    for given, allowed in ((init, Init), (lora_init, LoraInit), (rounding, Rounding), (norms, Norms)):
        if given not in get_args(allowed):
            raise UserError(f"{given!r} is unknown here; use one of {', '.join(get_args(allowed))}")
    if init == "random":  # the paper's baseline: the donor's shape, none of its weights
        return RecursiveTransformer(target).to(dtype or read("norm.weight").dtype).eval()
    sources = source_layers(config.n_layer, target.n_loop, init, rounding)
    by_loop = source_layers(config.n_layer, target.n_loop, "average")    # k, k + K, ...: position k in each loop
    vector_sources = {"init": sources, "average": by_loop, "pick": [layers[:1] for layers in by_loop]}[norms]
    with torch.device("meta"):
        model = RecursiveTransformer(target)
    new = {}
    for name in progress([n for n in model.state_dict() if "lora_" not in n], desc="converting", unit="tensor"):
        if not name.startswith("layers."):
            w = read(name)                                               # embedding, final norm, head: the donor's
            new[name] = cast(w.clone(), dtype or w.dtype, name)
            continue
        _, k, rest = name.split(".", 2)
        donors = [f"layers.{layer}.{rest}" for layer in by_loop[int(k)]]
        store = dtype or read(donors[0]).dtype
        if is_matrix(name):
            shared = mean(read, sources[int(k)], rest)                   # W'_k
            new[name] = cast(shared, store, name)
            if target.rank:
                residuals = (read(donor).float() - shared for donor in donors)   # in fp32: bf16 would drown them
                energy = [0.0, 0.0] if report is None else report.setdefault(rest.removesuffix(".weight"), [0.0, 0.0])
                factors = relax(residuals, target.rank, lora_init, init == "average" and target.n_loop == 2, energy)
                for part, stack in zip(("lora_a", "lora_b"), zip(*factors, strict=True), strict=True):
                    part = name.removesuffix("weight") + part
                    new[part] = cast(torch.stack(stack), store, part)
        elif target.vectors == "per_loop":
            new[name] = cast(torch.stack([read(donor) for donor in donors]), store, name)
        else:
            new[name] = cast(mean(read, vector_sources[int(k)], rest), store, name)
    model.load_state_dict(new, assign=True)
    return model.eval()


def mean(read: Read, layers: list[int], rest: str) -> Tensor:
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
                 lora_init: LoraInit = "svd", vectors: Vectors = "tied", rounding: Rounding = "round",
                 norms: Norms = "init", dtype: torch.dtype | None = None) -> RecursiveTransformer:
    """A recursive model of the same width and depth; `full` stays as it is. UserError if the loops do not divide it."""
    target = replace(full.config, n_loop=n_loop, rank=rank, vectors=vectors)
    return loop_layers(full.config, full.state_dict().__getitem__, target, init, lora_init, rounding, norms, dtype)


def depths(config: Config, name: str) -> list[str]:
    """The names in a full-size model of what a stored layer's tensor becomes, one for each loop."""
    _, i, rest = name.split(".", 2)
    return [f"layers.{depth}.{rest}" for depth in range(int(i), config.n_layer, config.n_unique)]


@torch.no_grad()
def unroll(model: RecursiveTransformer, dtype: torch.dtype | None = None,
           report: dict | None = None) -> RecursiveTransformer:
    """The ordinary full-size model that computes the same: W' + B A written out for every depth, summed in fp32 and
    rounded once, to `dtype` (None: to that of each tensor).

    `report`, if given, is filled with the squared norms of all merged weights, "merged", of what LoRA adds to them,
    "added", and of what rounding then does to them, "rounding".
    """
    c, out, report = model.config, {}, {} if report is None else report
    report |= {"merged": 0.0, "added": 0.0, "rounding": 0.0}
    for name, w in model.state_dict().items():
        store = dtype or w.dtype
        if not name.startswith("layers."):
            out[name] = cast(w.clone(), store, name)
        elif not is_matrix(name) and "lora_" not in name:
            for loop, at in enumerate(depths(c, name)):
                out[at] = cast((w[loop] if c.vectors == "per_loop" else w).clone(), store, at)
        elif is_matrix(name):
            linear = deepcopy(model.get_submodule(name.removesuffix(".weight")))
            linear.to(torch.promote_types(w.dtype, torch.float32))
            for loop, at in enumerate(depths(c, name)):
                merged = linear.merged(loop)
                out[at] = cast(merged.clone(), store, at)
                if c.rank:
                    report["merged"] += merged.square().sum().item()
                    report["added"] += (merged - linear.weight).square().sum().item()
                    report["rounding"] += (out[at] - merged).square().sum().item()
    origin = {"recursive": {"n_loop": c.n_loop, "rank": c.rank, "vectors": c.vectors}} if c.n_loop > 1 or c.rank else {}
    with torch.device("meta"):
        full = RecursiveTransformer(replace(c, n_loop=1, rank=0, vectors="tied", extra=c.extra | origin))
    full.load_state_dict(out, assign=True)
    return full.eval()


# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class ConvertConfig:
    donor: str = "assets/donor"      # full-size model: a folder or a Hugging Face id
    out: str = "out_recursive"       # folder to write
    loops: int = 2                   # how often the shared block runs (the paper's B); 1 leaves the model at full size
    init: AnyInit = "stepwise"       # which donor layers the stored ones start from (Figure 2), or calibrated (ours)
    rank: int = 0                    # LoRA rank per loop and linear map; 0 ties strictly
    lora_init: LoraInit = "svd"      # LoRA from the SVD of the residual (Eq. 4), or zero (ablation)
    vectors: Vectors = "tied"        # norm weights and biases: tied (paper), or one per loop
    norms: Norms = "init"            # tied norm weights: as init says, averaged, or the first loop's
    rounding: Rounding = "round"     # where a stepwise step falls between two layers
    calib_text: str = "assets/books/train"  # init=calibrated: text files or token shards that the donor reads
    calib_tokens: int = 20_480       # init=calibrated: how many tokens of them
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"  # of the weights written; keep: as the donor
    unroll: bool = False             # instead: write the recursive --donor out at full size, in Hugging Face's layout
    seed: int = 0                    # for what is random: init=random, zero-residual LoRA


def check_ignored(args) -> None:
    """Raise UserError for settings, of convert.py or train.py, that would change nothing beside the others."""
    weights = "lora_init norms rounding"                                 # how weights alone are converted
    how = f"loops init rank vectors calib_text calib_tokens seed {weights}"
    ignored = (  # if so, with this flag, these are ignored, which say that, since the flag does this
        (getattr(args, "unroll", False), "--unroll", how, "says how to convert", "writes out what is converted"),
        (args.init == "calibrated", "--init=calibrated", weights, "says how weights alone are converted",
         "fits them to text"),
        (args.init != "calibrated", f"--init={args.init}", "calib_text calib_tokens",
         "says what is read for --init=calibrated", "reads nothing"),
        (args.init == "random", "--init=random", weights, "says what to make of the donor's weights", "takes none"),
        (args.init != "stepwise", f"--init={args.init}", "rounding", "says where a step falls", "takes none"),
        (args.rank == 0, "--rank=0", "lora_init", "says how LoRA starts", "has none"),
        (args.vectors == "per_loop", "--vectors=per_loop", "norms", "says how the loops' norm weights become one",
         "keeps them all"))
    for applies, given, names, what, why in ignored:
        for name in names.split():
            if applies and getattr(args, name, None) != getattr(type(args), name, None):  # not the default
                raise UserError(f"--{name}={getattr(args, name)} {what}, and {given} {why}: drop --{name}")


def main(argv=None):
    args = parse_args(ConvertConfig, argv)
    torch.manual_seed(args.seed)
    if Path(args.out).resolve() == Path(args.donor).resolve():
        raise UserError(f"--out={args.out} is the donor itself and would replace it; give another folder")
    check_out(args.out)
    if (Path(args.out) / "train.pt").exists():
        raise UserError(f"--out={args.out} holds a training run; give another folder")
    check_ignored(args)
    dtype = None if args.dtype == "keep" else getattr(torch, args.dtype)
    if args.unroll:
        model, report = RecursiveTransformer.load(args.donor), {}
        full = unroll(model, dtype, report)
        to_hf(full, args.out, tokenizer=args.donor)
        print0(f"{args.donor} unrolled -> {args.out}: {model.config.n_layer} layers, for transformers")
        if report["rounding"] and report["added"]:
            size, added = ((report["rounding"] / report[key]) ** 0.5 for key in ("merged", "added"))
            print0(f"rounding to {str(full.embed.weight.dtype).removeprefix('torch.')} moves the merged weights by "
                   f"{size:.2%} of their size, {added:.1%} of what LoRA adds to them; --dtype=float32 does not round")
        return
    source, report = Donor(args.donor), {}
    c = source.config
    tokenizer = Tokenizer.load(source.folder, c.vocab_size)  # a wrong one is found out before the work
    target, calibrated = replace(c, n_loop=args.loops, rank=args.rank, vectors=args.vectors), args.init == "calibrated"
    if calibrated:
        windows = calibration_windows(load_tokens(args.calib_text, tokenizer, c.vocab_size), args.calib_tokens, c,
                                      f"--calib_text={args.calib_text}")
    print0(f"{args.donor}: {c.arch}, {c.n_layer} layers of width {c.n_embd} -> {args.loops} loops, "
           f"init {args.init}, rank {args.rank}, vectors {args.vectors}")
    with replace_folder(args.out) as tmp:
        copy_tokenizer(source.folder, tmp)
        copy_papers(source.folder, tmp)
        if calibrated:
            model = to_calibrated(load_full(args.donor), windows, args.loops, args.rank, args.vectors, dtype)
        else:
            model = loop_layers(c, source.read, target, args.init, args.lora_init, args.rounding, args.norms, dtype,
                                report)
        model.write(tmp)
    rows = [[kind, f"{kept / max(total, 1e-30):.1%}"] for kind, (kept, total) in report.items()]
    if rows:
        print0(table([["LoRA of", "residual energy kept"], *rows]) + "\n")
    with torch.device("meta"):
        full = RecursiveTransformer(c).num_params()
    print0(table([["parameters", "stored", "run per token", "stored, without embeddings"]] + [
        [name, f"{n['stored']:,}", f"{n['run']:,}", f"{n['stored_block']:,}"]
        for name, n in (("donor", full), ("recursive", model.num_params()))]))
    print0(f"wrote {args.out}; next: python train.py --donor={args.donor} --ckpt={args.out} --out=..., "
           f"or python sample.py --ckpt={args.out}")


if __name__ == "__main__":
    script(main)
