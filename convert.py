"""Convert a full-size model into a (Relaxed) Recursive Transformer (§2.2, §2.3), and back.

    python convert.py --donor=assets/donor --loops=2 --init=average --rank=64 --out=out_relaxed
    python convert.py --donor=assets/donor --loops=2 --init=calibrated --rank=64 --out=out_calibrated   # (calibrate.py)
    python convert.py --unroll --gguf=unrolled.gguf --donor=out_relaxed    # or --out=FOLDER, for transformers
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from calibrate import calibration_windows, to_calibrated, widened
from hf import Donor, hf_tensors, is_looped, load_any, load_full, refuse_first_loop_kv, refuse_looped, to_hf
from lib.checks import cast
from lib.cli import UserError, parse_args, print0, progress, script, table
from lib.data import load_tokens
from lib.donors import copy_papers, find_donor
from lib.folders import check_out, replace_folder
from lib.gguf_export import architecture, write_gguf
from lib.tokenizer import Tokenizer, copy_tokenizer
from model import Config, RecursiveTransformer, is_matrix

__all__ = ["load_any", "load_full", "loop_layers", "source_layers", "svd_factors", "to_hf", "to_recursive", "unroll"]

Init = Literal["stepwise", "average", "lower", "random"]
AnyInit = Literal[Init, "calibrated"]  # the last also needs text: calibrate.py
LoraInit = Literal["svd", "zero"]
Rounding = Literal["round", "floor"]
Norms = Literal["init", "average", "pick"]
Vectors = Literal["tied", "per_loop"]
KV = Literal["own", "first_loop"]


# ---------------------------------------------------------------------------------------------------------------------
# Figure 2: which donor layers a stored layer starts from

def source_layers(n_layer: int, n_loop: int, init: str, rounding: str = "round") -> list[list[int]]:
    """For each stored layer, the donor layers it starts from (averaged if several): Figure 2, counted from 0.

    >>> source_layers(6, 2, "stepwise"), source_layers(6, 2, "average"), source_layers(6, 2, "lower")
    ([[0], [2], [5]], [[0, 3], [1, 4], [2, 5]], [[0], [1], [2]])

    Stepwise takes evenly spaced layers from the first to the last. A fractional step, e.g. layer 2.5, is rounded: to
    the nearest ("round", half to even, as in the authors' later code) or down ("floor", which fits Figure 2 as well).
    """
    n_unique = Config(n_layer=n_layer, n_loop=n_loop).n_unique  # UserError if the loops do not fit
    if init == "stepwise":
        steps = [i * (n_layer - 1) / max(n_unique - 1, 1) for i in range(n_unique)]
        return [[round(s) if rounding == "round" else int(s)] for s in steps]
    if init == "average":  # stored layer i runs as layers i, i + n_unique, i + 2 n_unique, ...
        return [list(range(i, n_layer, n_unique)) for i in range(n_unique)]
    if init == "lower":
        return [[i] for i in range(n_unique)]
    raise UserError(f"unknown init {init!r}; use stepwise, average, lower or random")


# ---------------------------------------------------------------------------------------------------------------------
# Eq. 4: the LoRA from the SVD of the residual; App. C: where the residual is zero

@torch.no_grad()
def svd_factors(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(A, B) with B @ A the best rank-r approximation of delta (out, in): A = V_rᵀ (R, in), B = U_r S_r (Eq. 4).

    delta = U S Vᵀ: U are the eigenvectors of delta deltaᵀ, V those of deltaᵀ delta. The smaller of these two products
    is ~10x faster to decompose than delta; squaring halves the digits, hence fp64. Where the singular value is zero, A
    gets a Gaussian row and B a zero column (App. C): with zeros in both, neither would get a gradient.
    """
    delta = delta.float()
    rank = min(rank, *delta.shape)
    wide = delta.size(0) <= delta.size(1)
    d = delta.double()
    vectors = torch.linalg.eigh(d @ d.T if wide else d.T @ d)[1].flip(-1)[:, :rank].float()    # largest first
    if wide:
        a = vectors.T @ delta                                            # (R, in), row i has norm s_i
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
    """The usual random A (R, in) of a LoRA, on `like`'s device; drawn on the CPU, so the same for every device."""
    return (torch.randn(rank, like.size(1)) / like.size(1) ** 0.5).to(like.device)


def lora_factors(residuals: Iterable[Tensor], rank: int, lora_init: LoraInit,
                 opposite: bool) -> tuple[list[tuple[Tensor, Tensor]], float]:
    """(A, B) for the residual W_l - W' of each loop, in fp32, and the residuals' squared norm.

    opposite: the second of two residuals is minus the first, since W' is the mean of both weights.
    """
    factors, energy = [], 0.0
    for delta in residuals:
        r = min(rank, *delta.shape)
        if lora_init == "zero" or not delta.any():                       # App. C
            factors.append((gaussian(r, delta), delta.new_zeros(delta.size(0), r)))
        elif opposite and factors:
            factors.append((factors[0][0], -factors[0][1]))
        else:
            factors.append(svd_factors(delta, r))
        energy += delta.square().sum().item()
    return factors, energy


# ---------------------------------------------------------------------------------------------------------------------
# Full-size -> recursive

Read = Callable[[str], Tensor]  # name of a donor's tensor -> the tensor, from memory or from disk


@torch.no_grad()
def loop_layers(config: Config, read: Read, target: Config, init: Init = "stepwise", lora_init: LoraInit = "svd",
                rounding: Rounding = "round", norms: Norms = "init",
                dtype: torch.dtype | None = None) -> tuple[RecursiveTransformer, dict[str, list[float]]]:
    """The recursive model of config `target` from the tensors of a full-size model of `config` (§2.2, §2.3); dtype
    None keeps theirs. Also, for each kind of matrix, [squared norm of the residuals that LoRA keeps, that of all].
    """
    refuse_looped(config, "convert a full-size model, or unroll this one first")
    for given, allowed in ((init, Init), (lora_init, LoraInit), (rounding, Rounding), (norms, Norms)):
        if given not in get_args(allowed):
            raise UserError(f"{given!r} is unknown here; use one of {', '.join(get_args(allowed))}")
    if init == "random":  # the paper's baseline: the donor's shape, none of its weights
        return RecursiveTransformer(target).to(dtype or read("norm.weight").dtype).eval(), {}
    sources = source_layers(config.n_layer, target.n_loop, init, rounding)
    replaced = source_layers(config.n_layer, target.n_loop, "average")   # donor layers that each stored one replaces
    norm_sources = {"init": sources, "average": replaced, "pick": [layers[:1] for layers in replaced]}[norms]
    with torch.device("meta"):
        model = RecursiveTransformer(target)
    new, kept = {}, {}
    for name in progress([n for n in model.state_dict() if "lora_" not in n], desc="converting", unit="tensor"):
        if not name.startswith("layers."):                               # embedding, final norm, head: the donor's
            w = read(name)
            new[name] = cast(w.clone(), dtype or w.dtype, name)
            continue
        _, k, rest = name.split(".", 2)
        donors = depth_names(target, name)                               # one for each loop that it runs in
        store = dtype or read(donors[0]).dtype
        if not is_matrix(name):                                          # a norm weight or a bias
            stacked = target.vectors == "per_loop"
            w = torch.stack([read(donor) for donor in donors]) if stacked else mean(read, norm_sources[int(k)], rest)
            new[name] = cast(w, store, name)
            continue
        shared = mean(read, sources[int(k)], rest)                       # W'_k
        new[name] = cast(shared, store, name)
        if target.rank:
            residuals = (read(donor).float() - shared for donor in donors)       # in fp32: bf16 would drown them
            factors, energy = lora_factors(residuals, target.rank, lora_init, init == "average" and target.n_loop == 2)
            for part, stack in zip(("lora_a", "lora_b"), zip(*factors, strict=True), strict=True):
                part = name.removesuffix("weight") + part
                new[part] = cast(torch.stack(stack), store, part)
            sums = kept.setdefault(rest.removesuffix(".weight"), [0.0, 0.0])
            sums[0] += sum(b.square().sum().item() for _, b in factors)          # the rows of A have length 1
            sums[1] += energy
    model.load_state_dict(new, assign=True)
    return model.eval(), kept


def mean(read: Read, layers: list[int], rest: str) -> Tensor:
    """The mean over donor layers of the tensor `rest`, in fp32."""
    total = read(f"layers.{layers[0]}.{rest}").float()
    for layer in layers[1:]:
        total = total + read(f"layers.{layer}.{rest}").float()
    return total / len(layers)


def depth_names(config: Config, name: str) -> list[str]:
    """For a stored layer's tensor, the names at the depth of each loop that it runs in, in the full-size model."""
    _, i, rest = name.split(".", 2)
    return [f"layers.{int(i) + loop * config.n_unique}.{rest}" for loop in range(config.loops_of(name))]


def to_recursive(full: RecursiveTransformer, n_loop: int = 2, init: Init = "stepwise", rank: int = 0,
                 lora_init: LoraInit = "svd", vectors: Vectors = "tied", rounding: Rounding = "round",
                 norms: Norms = "init", dtype: torch.dtype | None = None, kv: KV = "own") -> RecursiveTransformer:
    """The recursive model of a full-size one, which stays unchanged. UserError if n_loop does not divide its layers."""
    target = replace(full.config, n_loop=n_loop, rank=rank, vectors=vectors, kv=kv)
    return loop_layers(full.config, full.state_dict().__getitem__, target, init, lora_init, rounding, norms, dtype)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Recursive -> full-size

@torch.no_grad()
def unroll(model: RecursiveTransformer, dtype: torch.dtype | None = None) -> RecursiveTransformer:
    """The full-size model that computes the same: W' + B A of every depth, summed in fp32 and rounded once to `dtype`
    (None: to each tensor's own). UserError for kv="first_loop", which no full-size model computes."""
    c, out = model.config, {}
    refuse_first_loop_kv(c)
    for name, w in model.state_dict().items():
        store = dtype or w.dtype
        if not name.startswith("layers."):
            out[name] = cast(w.clone(), store, name)
        elif is_matrix(name):
            linear = widened(model.get_submodule(name.removesuffix(".weight")))
            for loop, depth in enumerate(depth_names(c, name)):
                out[depth] = cast(linear.merged(loop).clone(), store, depth)
        elif "lora_" not in name:                                        # a norm weight or a bias
            for loop, depth in enumerate(depth_names(c, name)):
                out[depth] = cast((w[loop] if c.vectors == "per_loop" else w).clone(), store, depth)
    origin = {"recursive": {"n_loop": c.n_loop, "rank": c.rank, "vectors": c.vectors}} if c.n_loop > 1 or c.rank else {}
    with torch.device("meta"):
        full = RecursiveTransformer(replace(c, n_loop=1, rank=0, vectors="tied", extra=c.extra | origin))
    full.load_state_dict(out, assign=True)
    return full.eval()


@torch.no_grad()
def rounding_errors(model: RecursiveTransformer, full: RecursiveTransformer) -> tuple[float, float]:
    """How far the weights of `full`, the unrolled model, are from W' + B A: as a share of W' + B A, and of B A. 0 for
    both where nothing is rounded or LoRA adds nothing."""
    merged = added = rounding = 0.0
    weights = full.state_dict()
    for name in (n for n in model.state_dict() if is_matrix(n) and model.config.rank):
        linear = widened(model.get_submodule(name.removesuffix(".weight")))
        for loop, depth in enumerate(depth_names(model.config, name)):
            w = linear.merged(loop)
            merged += w.square().sum().item()
            added += (w - linear.weight).square().sum().item()
            rounding += (weights[depth] - w).square().sum().item()
    return ((rounding / merged) ** 0.5, (rounding / added) ** 0.5) if added else (0.0, 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Command line

@dataclass
class ConvertConfig:
    donor: str = "assets/donor"      # full-size model: a folder or a Hugging Face id
    out: str = "out_recursive"       # folder to write
    loops: int = 2                   # how often the shared block runs (the paper's B); 1 leaves the model at full size
    init: AnyInit = "stepwise"       # which donor layers the stored ones start from (Figure 2); calibrated is ours
    rank: int = 0                    # LoRA rank per loop and linear layer; 0 ties strictly
    lora_init: LoraInit = "svd"      # LoRA from the SVD of the residual (Eq. 4), or zero (ablation)
    vectors: Vectors = "tied"        # norm weights and biases: tied (paper), or one per loop
    kv: KV = "own"                   # keys and values: of each loop (paper), or the first loop's for all
    norms: Norms = "init"            # tied norm weights: from the layers of --init, averaged, or the first loop's
    rounding: Rounding = "round"     # where a stepwise step falls between two layers
    calib_text: str = "assets/books/train"  # init=calibrated: text files or token shards to run the donor on
    calib_tokens: int = 20_480       # init=calibrated: how many tokens of them
    dtype: Literal["keep", "float32", "bfloat16", "float16", "q8_0"] = "keep"  # of the weights; q8_0: of --gguf
    unroll: bool = False             # instead, export the recursive --donor at full size, in Hugging Face's layout
    hf: bool = False                 # instead, export the recursive --donor as it is, for transformers with remote code
    gguf: str | None = None          # instead, write --donor, as it is or with --unroll, as this file for llama.cpp
    seed: int = 0                    # of init=random, and of LoRA where the residual is zero


def check_ignored(args) -> None:
    """Raise UserError for settings, of convert.py or train.py, that have no effect beside the other settings."""
    from_weights = "lora_init norms rounding"
    conversion = f"loops init rank vectors kv calib_text calib_tokens seed {from_weights}"
    rules = (  # (if this holds, these have no effect, for this reason)
        (getattr(args, "gguf", None), f"out hf {conversion}", "--gguf only exports, into its file"),
        (getattr(args, "unroll", False), f"{conversion} hf", "--unroll only exports"),
        (getattr(args, "hf", False), conversion, "--hf only exports"),
        (args.init == "calibrated", from_weights, "--init=calibrated fits the weights to text"),
        (args.init != "calibrated", "calib_text calib_tokens", f"--init={args.init} reads no text"),
        (args.init == "random", from_weights, "--init=random takes none of the donor's weights"),
        (args.init != "stepwise", "rounding", f"--init={args.init} has no steps to round"),
        (args.rank == 0, "lora_init", "--rank=0 has no LoRA"),
        (args.vectors == "per_loop", "norms", "--vectors=per_loop keeps the norm weights of every loop"))
    for applies, names, reason in rules:
        for name in names.split():
            if applies and getattr(args, name, None) != getattr(type(args), name, None):         # not the default
                raise UserError(f"--{name}={getattr(args, name)} has no effect, since {reason}: drop --{name}")


def main(argv=None):
    args = parse_args(ConvertConfig, argv)
    torch.manual_seed(args.seed)
    check_ignored(args)
    if args.gguf:
        return export_gguf(args)
    if args.dtype == "q8_0":
        raise UserError("--dtype=q8_0 is a format of GGUF files: give a --gguf=FILE, or another dtype")
    if Path(args.out).resolve() == Path(args.donor).resolve():
        raise UserError(f"--out={args.out} is the donor itself and would replace it; give another folder")
    check_out(args.out)
    if (Path(args.out) / "train.pt").exists():
        raise UserError(f"--out={args.out} holds a training run; give another folder")
    dtype = None if args.dtype == "keep" else getattr(torch, args.dtype)
    if args.unroll or args.hf:
        export(args, dtype)
    else:
        convert(args, dtype)


def export(args: ConvertConfig, dtype: torch.dtype | None) -> None:
    """Write the checkpoint of ours in --donor for transformers: as it is, or with --unroll at full size."""
    model = RecursiveTransformer.load(args.donor, dtype=None if args.unroll else dtype)
    if args.hf:
        to_hf(model, args.out, tokenizer=args.donor)
        trust = ", trust_remote_code=True" * is_looped(model.config)
        print0(f"{args.donor} -> {args.out}: {model.num_params()['stored']:,} parameters stored, for transformers: "
               f"AutoModelForCausalLM.from_pretrained({args.out!r}{trust})")
        return
    full = unroll(model, dtype)
    to_hf(full, args.out, tokenizer=args.donor)
    print0(f"{args.donor} unrolled -> {args.out}: {model.config.n_layer} layers, for transformers")
    of_merged, of_added = rounding_errors(model, full)
    if of_merged:
        print0(f"rounding to {str(full.embed.weight.dtype).removeprefix('torch.')} changes the merged weights by "
               f"{of_merged:.2%} of their size, {of_added:.1%} of what LoRA adds to them; --dtype=float32 avoids it")


def export_gguf(args: ConvertConfig) -> None:
    """Write the model in --donor as the file --gguf, with --unroll at full size."""
    model = load_any(args.donor)
    dtype = str(model.embed.weight.dtype).removeprefix("torch.") if args.dtype == "keep" else args.dtype
    if args.unroll:                                                      # LoRA is rounded once, in the file
        model = unroll(model, torch.float32 if model.config.rank else None)
    c = model.config
    arch = architecture(c)                                               # UserError before the work
    for note in write_gguf(args.gguf, arch, c, hf_tensors(model), find_donor(args.donor), dtype):
        print0(f"note: {note}")
    print0(f"{args.donor} -> {args.gguf}: {arch}, {c.n_unique} layers" + f" x {c.n_loop} loops" * (c.n_loop > 1)
           + f", {dtype}, {Path(args.gguf).stat().st_size / 1e6:.1f} MB; next: llama-cli -m {args.gguf}")


def convert(args: ConvertConfig, dtype: torch.dtype | None) -> None:
    """Write the recursive model of the full-size --donor."""
    source = Donor(args.donor)
    c = source.config
    tokenizer = Tokenizer.load(source.folder, c.vocab_size)              # refuses a wrong one before the work
    target, kept = replace(c, n_loop=args.loops, rank=args.rank, vectors=args.vectors, kv=args.kv), {}
    if args.init == "calibrated":
        windows = calibration_windows(load_tokens(args.calib_text, tokenizer, c.vocab_size), args.calib_tokens, c,
                                      f"--calib_text={args.calib_text}")
    print0(f"{args.donor}: {c.arch}, {c.n_layer} layers of width {c.n_embd} -> {args.loops} loops, "
           f"init {args.init}, rank {args.rank}, vectors {args.vectors}, kv {args.kv}")
    with replace_folder(args.out) as tmp:
        copy_tokenizer(source.folder, tmp)
        copy_papers(source.folder, tmp)
        if args.init == "calibrated":
            model = to_calibrated(load_full(args.donor), windows, args.loops, args.rank, args.vectors, dtype,
                                  args.kv)
        else:
            model, kept = loop_layers(c, source.read, target, args.init, args.lora_init, args.rounding, args.norms,
                                      dtype)
        model.write(tmp)
    if kept:
        rows = [[kind, f"{part / max(total, 1e-30):.1%}"] for kind, (part, total) in kept.items()]
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
