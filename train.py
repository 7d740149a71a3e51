"""Uptrain a recursive model against its donor (§3.1), on one process or, under torchrun, on many.

    python train.py                                       # the shipped donor -> 2 loops, stepwise, on a laptop
    torchrun --standalone --nproc_per_node=8 train.py --donor=FOLDER --init=average --rank=64 --data=FILES --lr=2e-4
    python train.py --resume --out=out                    # go on where a run stopped, with the settings it had
    torchrun --max-restarts=3 ... train.py --resume=auto  # start, or go on, or go on by itself after a crash
"""

import math
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from calibrate import calibration_windows, to_calibrated
from convert import AnyInit, LoraInit, Norms, Rounding, Vectors, check_ignored, to_recursive
from hf import config_from_hf, load_any, refuse_looped
from lib.checkpoint import drop_log_after, find_state, load_optimizer, resumed_settings, save_checkpoint, write_log
from lib.cli import UserError, clock, parse_args, print0, script, table
from lib.data import Tokens, batches, load_tokens, validation
from lib.donors import donor_files, find_donor, read_json
from lib.folders import check_out, own_folder
from lib.system import (
    Processes,
    StopFlag,
    check_compile,
    on_first,
    peak_flops,
    peak_memory,
    process_age,
    start_processes,
)
from lib.tokenizer import Tokenizer
from losses import chunked_loss, exit_weights
from model import Config, RecursiveTransformer, read_config

TrainInit = Literal[AnyInit, "scratch"]


@dataclass
class TrainConfig:
    # what is trained
    donor: str = "assets/donor"            # full-size model: a folder or a Hugging Face id
    teacher: str | None = None             # distil from this model instead of the donor: a folder or an id, any size
    ckpt: str | None = None                # start from this checkpoint of ours instead of converting the donor
    init: TrainInit = "stepwise"           # how the stored layers start (§2.2); calibrated: ours; scratch = full size
    loops: int = 2                         # how often the shared block runs (the paper's B)
    rank: int = 0                          # LoRA rank per loop and linear map; 0 ties strictly
    lora_init: LoraInit = "svd"            # LoRA from the SVD of the residual (Eq. 4), or zero (ablation)
    vectors: Vectors = "tied"              # norm weights and biases: tied (paper), or one per loop
    norms: Norms = "init"                  # tied norm weights: as init says, averaged, or those of the first loop
    rounding: Rounding = "round"           # where a stepwise step falls between two layers
    calib_tokens: int = 20_480             # init=calibrated: tokens of --data that the donor reads first
    # on what
    data: str = "assets/books/train"       # text files or a folder of token shards; several by comma
    valid: str = "assets/books/valid.txt"  # the same, never trained on
    tokens: int = 300_000                  # tokens to train on, in all
    batch_tokens: int = 2048               # tokens per optimizer step, over all processes
    seq_len: int = 256                     # tokens per sequence
    micro_batch: int = 8                   # sequences per process that go through the model at once
    # how (App. E, and where it is silent: README)
    lr: float = 1e-3                       # peak of the cosine schedule (paper, of 1-2 B: 2e-4; calibrated: 3e-4)
    min_lr: float = 0.1                    # where the cosine ends, as a share of lr
    warmup: int = 20                       # steps of linear warm-up
    weight_decay: float = 0.1              # AdamW's, on matrices only
    beta1: float = 0.9                     # AdamW's, of the mean of the gradient
    beta2: float = 0.95                    # AdamW's, of the mean of its square
    clip: float = 1.0                      # largest gradient norm
    distill: Literal["fkl", "rkl", "jsd", "tvd", "none"] = "fkl"  # distillation from the teacher, beside cross entropy
    distill_weight: float = 1.0            # loss = cross entropy + this x distillation
    temperature: float = 1.0               # of both distributions in the distillation; its loss is scaled by the square
    exit_loss: Literal["last", "weighted", "aggressive"] = "last"  # which loops' outputs are trained, how much (§2.4)
    exit_coef: float = 0.1                 # aggressive: the weight of every loop but the last
    exit_distill: bool = False             # the earlier exits are distilled from the last loop, not from the teacher
    # where, and how often
    out: str = "out"                       # checkpoint folder, with log.jsonl
    resume: Literal["no", "yes", "auto"] = "no"  # go on from the checkpoint in --out; auto: if there is one, else start
    eval_every: int = 50                   # steps between evaluations
    eval_tokens: int = 16_384              # validation tokens per evaluation; the first and last: four times as many
    save_every: int = 100                  # steps between checkpoints
    log_every: int = 10                    # steps between log lines
    seed: int = 0                          # of the data order and of whatever starts random
    device: str = "auto"                   # auto, cpu, cuda
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # autocast to bfloat16; auto = on GPUs
    compile: bool = False                  # torch.compile (a minute at the start)
    checkpointing: bool = False            # less memory, a third more work: layers are run again in the backward pass
    zero: bool = False                     # each process keeps only its share of the optimizer's state (ZeRO, stage 1)
    skip_nonfinite: bool = False           # skip a step whose loss or gradient is not finite, instead of stopping


# What a resumed run may be given anew: where its files lie, how it runs and reports, how long (with that schedule).
MAY_CHANGE = {"out", "resume", "tokens", "eval_every", "eval_tokens", "save_every", "log_every", "micro_batch",
              "device", "dtype", "compile", "checkpointing", "zero", "skip_nonfinite", "donor", "teacher", "data",
              "valid"}


class Objective(nn.Module):
    """Model and loss for one micro-batch, in one module so that DDP and compile see a whole forward."""

    def __init__(self, model: RecursiveTransformer, args: TrainConfig):
        super().__init__()
        self.model, self.args = model, args
        self.exits = trained_exits(args, model.config.n_loop)

    def forward(self, idx: Tensor, targets: Tensor, teacher: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """(loss to minimise, cross entropy of each trained exit), means over tokens in nats; idx and targets (B, T).

        teacher: its last hidden states after the final norm (B, T, C'), and its head (V, C').
        """
        args, states = self.args, self.model(idx)
        return chunked_loss([self.model.norm(states[i], 0) for i in self.exits], self.model.head_weight, targets,
                            list(self.exits.values()), teacher, "fkl" if args.distill == "none" else args.distill,
                            args.distill_weight, args.temperature, args.exit_distill, args.compile)


def trained_exits(args: TrainConfig, n_loop: int) -> dict[int, float]:
    """{loop: weight of the loss at its end}."""
    if args.exit_loss == "last":
        return {n_loop - 1: 1.0}
    return {i: w for i, w in enumerate(exit_weights(n_loop, args.exit_loss, args.exit_coef)) if w > 0}


def learning_rate(step: int, steps: int, args: TrainConfig) -> float:
    """Linear warm-up, then a cosine down to min_lr x lr at the last step."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    done = (step - args.warmup) / max(1, steps - 1 - args.warmup)
    return args.lr * (args.min_lr + (1 - args.min_lr) * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizer(model: nn.Module, args: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, with --zero spread over the processes; weight decay for matrices and LoRA, none for norms and biases."""
    matrices = [p for n, p in model.named_parameters() if not n.endswith("bias") and "norm" not in n]
    vectors = [p for n, p in model.named_parameters() if n.endswith("bias") or "norm" in n]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    options = {"lr": args.lr, "betas": (args.beta1, args.beta2), "fused": True}
    if args.zero and dist.is_initialized():
        return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **options)
    return torch.optim.AdamW(groups, **options)


def accumulation(args: TrainConfig, world: int) -> int:
    """Micro-steps per optimizer step. Raises UserError if the batch cannot be dealt out evenly, and says what could."""
    one = args.micro_batch * args.seq_len * world
    if args.batch_tokens % one:
        near = max(1, args.batch_tokens // one)
        raise UserError(
            f"batch_tokens={args.batch_tokens} is not a multiple of micro_batch x seq_len x processes = "
            f"{args.micro_batch} x {args.seq_len} x {world} = {one}; use --batch_tokens={near * one} or "
            f"--batch_tokens={(near + 1) * one}, or a smaller --micro_batch")
    return args.batch_tokens // one


def check_settings(args: TrainConfig, resumed: bool) -> None:
    for name in ("tokens", "batch_tokens", "seq_len", "micro_batch", "lr", "temperature", "eval_every", "save_every",
                 "log_every", "eval_tokens", "clip"):
        if not 0 < getattr(args, name) < math.inf:
            raise UserError(f"--{name}={getattr(args, name)} must be positive and finite")
    for name in ("rank", "min_lr", "warmup", "weight_decay", "distill_weight", "exit_coef"):
        if not 0 <= getattr(args, name) < math.inf:
            raise UserError(f"--{name}={getattr(args, name)} must not be negative, and must be finite")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)} must be at least 0 and less than 1")
    if args.ckpt or args.init == "scratch":
        given = "--ckpt" if args.ckpt else "--init=scratch"
        for name in ("rank", "loops", "lora_init", "vectors", "norms", "rounding", "calib_tokens",
                     *["init"] * bool(args.ckpt)):
            if getattr(args, name) != getattr(TrainConfig, name):
                raise UserError(f"--{name}={getattr(args, name)} says how a donor is converted, and {given} converts "
                                "none: drop one of the two")
    if not resumed:                                          # a run that began with them goes on
        check_ignored(args)
        check_used(args)
    if args.tokens < args.batch_tokens:
        raise UserError(f"--tokens={args.tokens} is less than one step of {args.batch_tokens}; ask for more tokens")
    if not resumed and any((Path(args.out) / name / "train.pt").exists() for name in ("", "previous")):
        raise UserError(f"{args.out} holds a run already; go on with --resume, or give another --out")
    if not resumed and (Path(args.out) / "model.safetensors").exists():  # somebody's donor, perhaps
        raise UserError(f"{args.out} holds a model already; give another --out, and --ckpt={args.out} to start from it")


def check_used(args: TrainConfig) -> None:
    """Raise UserError for settings that would change nothing."""
    distils = args.distill != "none" and (args.teacher or args.ckpt or args.init != "scratch")
    taught = distils or args.exit_distill and args.exit_loss != "last"
    needs = [("exit_coef", args.exit_loss == "aggressive", "--exit_loss=aggressive"),
             ("distill", args.init != "scratch" or args.ckpt or args.teacher or args.distill == "none", "a --teacher"),
             ("distill_weight", taught, "distillation"), ("temperature", taught, "distillation")]
    for name, used, what in needs:
        if getattr(args, name) != getattr(TrainConfig, name) and not used:
            raise UserError(f"--{name}={getattr(args, name)} would change nothing here, it needs {what}: drop "
                            f"--{name}")


# ---------------------------------------------------------------------------------------------------------------------
# Pieces of the run

def donor_config(folder: Path) -> Config:
    hf = read_json(folder / "config.json")
    return config_from_hf(hf, folder / "config.json") if "model_type" in hf else read_config(folder)


def check_start(args: TrainConfig, config: Config, tokenizer: Tokenizer, state: dict | None) -> None:
    """Raise UserError if donor or teacher do not fit the settings, --ckpt or the run resumed: before any real work."""
    sources = {args.donor: config}
    if args.teacher and args.distill == "none":
        raise UserError(f"--teacher={args.teacher} is distilled from, and --distill=none distils nothing: drop one")
    if args.teacher:
        folder, other = find_donor(args.teacher), f"the donor {args.donor}"
        sources[args.teacher] = donor_config(folder)
        check_vocabulary(f"--teacher={args.teacher}", folder, sources[args.teacher], other, config, tokenizer,
                         padded=True)
    for name, its in sources.items():
        if args.seq_len > its.n_ctx:
            raise UserError(f"--seq_len={args.seq_len} is longer than the {its.n_ctx} tokens that {name} was made for; "
                            f"use --seq_len={its.n_ctx} or less")
    if state:
        before, now = state["history"]["donor_config"], config.architecture()
        changed = ", ".join(f"{k}={v} (was {before.get(k)})" for k, v in now.items() if v != before.get(k))
        if changed or state["history"]["tokenizer_hash"] not in tokenizer.hashes:
            raise UserError(f"the donor {args.donor} is of another architecture or tokenizer than when the run in "
                            f"{args.out} started: {changed or 'tokenizer'}; resume with the donor it was made from")
        loops = read_config(args.out).n_loop
    elif args.ckpt:
        start = read_config(args.ckpt)
        check_vocabulary(f"--ckpt={args.ckpt}", args.ckpt, start, f"its donor {args.donor}", config, tokenizer)
        loops = start.n_loop
    elif args.init != "scratch":
        refuse_looped(config, "give its donor, or start from it with --ckpt")
        loops = replace(config, n_loop=args.loops, rank=args.rank).n_loop  # UserError if it does not divide the layers
    else:
        loops = config.n_loop
    if args.exit_distill and args.exit_loss == "last":
        raise UserError("--exit_distill trains the earlier exits; say how much with --exit_loss=aggressive or weighted")
    if loops == 1 and args.exit_loss != "last":
        raise UserError(f"--exit_loss={args.exit_loss} needs an exit before the last loop, and this model has 1 loop")


def check_vocabulary(name: str, folder, its: Config, other: str, config: Config, tokenizer: Tokenizer,
                     padded: bool = False) -> None:
    """Raise UserError unless `its` tokenizer is the same, and its vocabulary as large, or padded as it likes."""
    if ((its.vocab_size != config.vocab_size and not padded)
            or not Tokenizer.load(folder, its.vocab_size).understands(tokenizer)):
        raise UserError(f"{name} has a vocabulary of {its.vocab_size}, {other} one of {config.vocab_size}, or another "
                        "tokenizer: their words must be the same (--donor names the donor of --ckpt)")


def check_finite(model: RecursiveTransformer, what: str) -> RecursiveTransformer:
    """`model`. Raises UserError if a weight of it is not finite: every loss would be nan."""
    bad = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if bad:
        raise UserError(f"{what} has weights that are not finite, in {len(bad)} tensors ({', '.join(bad[:3])}): the "
                        "file is damaged, or its training diverged; give another")
    return model


def identify(tokens: Tokens) -> list[int]:
    """[number of tokens, CRC-32] of a text; the sum is over all of it, or over 1,024 pieces spread evenly."""
    n, crc, size = len(tokens), 0, 256
    for start in (*range(0, n, max(size, n // 1024)), max(0, n - size)):
        crc = zlib.crc32(np.ascontiguousarray(tokens[start:start + size]), crc)
    return [n, crc]


def identify_weights(model: RecursiveTransformer) -> list[int]:
    """[number of weights, CRC-32 of up to 4,096 of each tensor]."""
    crc = 0
    for p in model.parameters():
        some = p.detach().flatten()[::max(1, p.numel() // 4096)]
        crc = zlib.crc32(some.float().cpu().contiguous().numpy(), crc)
    return [sum(p.numel() for p in model.parameters()), crc]


def check_inputs(args: TrainConfig, now: dict[str, list[int]], before: dict[str, list[int]]) -> None:
    """Raise UserError if a resumed run would go on with another text, donor or teacher than it began with, under the
    same name or another: its steps would see other windows, its losses not be comparable."""
    changed = [f"--{name}={getattr(args, name)}" for name in now.keys() | before.keys()
               if now.get(name) != before.get(name)]
    if changed:
        raise UserError(f"{', '.join(sorted(changed))}: the content differs from what the run in {args.out} began "
                        f"with; give the former, or start a new run with --ckpt={args.out} and another --out")


def build(args: TrainConfig, folder: Path, config: Config, device, resumed: bool, windows: list[Tensor] | None,
          ) -> tuple[RecursiveTransformer, RecursiveTransformer | None, RecursiveTransformer | None]:
    """(student, donor, teacher), in fp32; the donor is None for init=scratch, which needs its config but no weights,
    and the teacher None where nothing is distilled. windows: what init=calibrated reads."""
    scratch = args.init == "scratch" and not args.ckpt
    donor = None
    if not scratch:
        donor = check_finite(load_any(str(folder), torch.float32), args.donor).requires_grad_(False).to(device)
    teacher = None if args.distill == "none" else donor
    if args.teacher:
        teacher = load_any(str(find_donor(args.teacher)), torch.float32)
        teacher = check_finite(teacher, args.teacher).requires_grad_(False).to(device)
    if resumed or args.ckpt:
        student = RecursiveTransformer.load(args.out if resumed else args.ckpt, dtype=torch.float32)
    elif scratch:
        student = RecursiveTransformer(config)
    elif windows:
        student = to_calibrated(donor, windows, args.loops, args.rank, args.vectors)
    else:
        student = to_recursive(donor, args.loops, args.init, args.rank, args.lora_init, args.vectors,
                               args.rounding, args.norms)
    check_finite(student, args.out if resumed else args.ckpt or f"what --init={args.init} makes of the donor")
    student.checkpointing = args.checkpointing
    return student.to(device), donor, teacher


def precision(args: TrainConfig, device: torch.device) -> tuple[bool, torch.autocast]:
    """(whether forward passes run in bfloat16 where that is safe, the context that does it)."""
    bf16 = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    return bf16, torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)


@torch.no_grad()
def evaluate(model: RecursiveTransformer, pairs: list, procs: Processes, autocast, exits=(-1,)) -> list[float]:
    """Mean cross entropy in nats at these loops' exits, over validation batches, which the processes share out."""
    total = torch.zeros(len(exits) + 1, dtype=torch.float64, device=procs.device)
    for idx, targets in pairs[procs.rank::procs.world]:
        with autocast:
            states = model(idx.to(procs.device))
            _, ce = chunked_loss([model.norm(states[i], 0) for i in exits], model.head_weight,
                                 targets.to(procs.device), [1.0] * len(exits))
        total += torch.cat([ce, ce.new_ones(1)]) * targets.numel()
    if procs.world > 1:
        dist.all_reduce(total)
    return (total[:-1] / total[-1]).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# The run

@dataclass
class Run:
    """All that one run has, so that its pieces can be read one at a time."""
    args: TrainConfig
    procs: Processes
    model: RecursiveTransformer
    donor: RecursiveTransformer | None      # None for init=scratch
    teacher: RecursiveTransformer | None    # None where nothing is distilled
    objective: nn.Module                    # what is called and differentiated: compiled, in DDP
    optimizer: torch.optim.Optimizer
    train_tokens: Tokens
    files: dict[str, bytes]                 # of the donor, beside its weights, which go into every checkpoint
    valid: list                             # validation batches for the first and the last evaluation
    quick: list                             # and for those between, a quarter of the tokens
    bf16: bool                              # forward passes run in bfloat16 where that is safe
    autocast: torch.autocast
    steps: int                              # optimizer steps in all
    micro_steps: int                        # forward and backward passes per step and process
    step: int                               # steps done
    saved: int                              # steps done when the last checkpoint was written
    history: dict                           # what a resumed run must know of its start
    peak: float | None                      # FLOP/s that the devices could reach together, where known
    began: float                            # time.perf_counter() less the seconds of the run before it was resumed


def prepare(args: TrainConfig, procs: Processes, state: dict | None, began: float) -> Run:
    """Load, check and convert everything; what can be wrong is found out before the minutes of work."""
    micro_steps, steps = accumulation(args, procs.world), args.tokens // args.batch_tokens
    if state and steps < state["step"]:
        raise UserError(f"--tokens={args.tokens} are {steps} steps, the run in {args.out} has done {state['step']}; "
                        f"ask for at least --tokens={state['step'] * args.batch_tokens}")
    torch.manual_seed(args.seed)
    bf16, autocast = precision(args, procs.device)
    if args.compile:
        check_compile(procs.device)

    folder = find_donor(args.donor)
    config = donor_config(folder)
    tokenizer = Tokenizer.load(folder, config.vocab_size)
    check_start(args, config, tokenizer, state)
    texts = {name: load_tokens(getattr(args, name), tokenizer, config.vocab_size) for name in ("data", "valid")}
    for name, tokens in texts.items():
        if len(tokens) <= args.seq_len:
            raise UserError(f"--{name}={getattr(args, name)} has {len(tokens)} tokens, one sequence needs "
                            f"{args.seq_len + 1} (seq_len + 1); give more text or a smaller --seq_len")

    history = state["history"] if state else {
        "donor_config": asdict(config), "tokenizer_hash": tokenizer.hash, "skipped": 0, "seconds": 0.0,
        "bf16": bf16}
    # The last evaluation reads what the first has read, also where a resumed run is given other --eval_tokens.
    history.setdefault("eval_tokens", 4 * (state["args"]["eval_tokens"] if state else args.eval_tokens))

    windows = None
    if args.init == "calibrated" and state is None:
        windows = calibration_windows(texts["data"], args.calib_tokens, config, f"--data={args.data}")
    model, donor, teacher = build(args, folder, config, procs.device, state is not None, windows)
    inputs = {name: identify(tokens) for name, tokens in texts.items()}
    inputs |= {name: identify_weights(m) for name, m in (("donor", donor), ("teacher", args.teacher and teacher)) if m}
    check_inputs(args, inputs, history.setdefault("inputs", inputs))
    if bf16:  # frozen weights: rounded once, not by autocast at each use
        donor, teacher = (m and m.to(torch.bfloat16) for m in (donor, teacher))
    optimizer = make_optimizer(model, args)
    step = 0
    if state:
        step = state["step"]
        load_optimizer(optimizer, state["optimizer"])
        drop_log_after(Path(args.out) / "log.jsonl", step or -1)  # the first line follows its checkpoint: anew
    objective, peak = Objective(model, args), peak_flops(procs.device, bf16)
    if args.compile:
        objective.compile()
    valid, quick = (validation(texts["valid"], args.seq_len, n, args.micro_batch)
                    for n in (history["eval_tokens"], args.eval_tokens))
    return Run(args, procs, model, donor, teacher,
               DistributedDataParallel(objective) if procs.world > 1 else objective, optimizer, texts["data"],
               donor_files(folder), valid, quick, bf16, autocast, steps, micro_steps, step, step, history,
               peak and peak * procs.world, began - history.get("seconds", 0.0))


def begin(run: Run, resumed: bool) -> None:
    """Say what will be trained; a new run also scores donor and start, and writes its first checkpoint."""
    args, c, n = run.args, run.model.config, run.model.num_params()
    print0(f"{args.ckpt or args.init}: {c.n_layer} layers as {c.n_loop} x {c.n_unique}, rank {c.rank} | parameters "
           f"{n['stored'] / 1e6:.2f} M stored, {n['run'] / 1e6:.2f} M run per token | {len(run.train_tokens):,} tokens "
           f"to train on | {run.procs.world} x {run.procs.device.type}{' bf16' * run.bf16}")
    if args.warmup > run.steps:
        print0(f"warning: the warm-up of {args.warmup} steps is longer than the run of {run.steps}: the learning rate "
               f"ends at {learning_rate(run.steps - 1, run.steps, args):.1e}, below --lr={args.lr}; give a smaller "
               "--warmup or more --tokens")
    if resumed:
        print0(f"resuming at step {run.step} of {run.steps}")
    else:
        run.history["donor"] = evaluate(run.donor, run.valid, run.procs, run.autocast)[-1] if run.donor else None
        run.history["converted"] = evaluate(run.model, run.valid, run.procs, run.autocast)[-1]
        before = f"donor {run.history['donor']:.4f}, " if run.donor else ""
        print0(f"validation loss: {before}start {run.history['converted']:.4f}")
        save(run)
    if run.step == 0:
        write_log(args.out, step=0, full_val_loss=run.history["converted"], donor_loss=run.history["donor"],
                  val_tokens=count_targets(run.valid), data=run.history["inputs"]["data"],
                  valid=run.history["inputs"]["valid"])
    if run.donor and run.donor is not run.teacher:
        run.donor.cpu()                                 # scored, and of no further use on a GPU


def count_targets(pairs: list) -> int:
    return sum(targets.numel() for _, targets in pairs)


def save(run: Run) -> None:
    run.history["seconds"] = time.perf_counter() - run.began
    save_checkpoint(run.args.out, run.model, run.optimizer,
                    {"step": run.step, "args": asdict(run.args), "history": run.history}, run.files)
    run.saved = run.step


def feed(run: Run) -> Iterator[tuple[Tensor, Tensor]]:
    """This process' micro-batches from the current step to the last. Which samples they hold depends on their number
    alone, so neither a stop nor another number of processes changes what is trained on."""
    def samples():
        rows, size = run.args.micro_batch, run.procs.world * run.args.micro_batch
        for micro in range(run.step * run.micro_steps, run.steps * run.micro_steps):
            first = micro * size + run.procs.rank * rows
            yield range(first, first + rows)
    return batches(run.train_tokens, samples(), run.args.seq_len, run.args.seed, run.procs.device)


def train_step(run: Run, feed: Iterator, lr: float) -> tuple[float, list[float], float]:
    """One optimizer step; returns (objective, cross entropy of each trained exit, gradient norm) of the whole batch."""
    args, procs = run.args, run.procs
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    sums = 0.0
    for micro in range(run.micro_steps):
        idx, targets = next(feed)
        last = micro == run.micro_steps - 1             # DDP sums gradients once per step, not per micro-step
        with nullcontext() if last or procs.world == 1 else run.objective.no_sync(), run.autocast:
            with torch.no_grad():
                teacher = run.teacher and (run.teacher.norm(run.teacher(idx)[-1], 0), run.teacher.head_weight)
            loss, ce = run.objective(idx, targets, teacher)
            (loss / run.micro_steps).backward()
        sums += torch.cat([loss.detach()[None], ce]) / run.micro_steps
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), args.clip)
    if procs.world > 1:
        dist.all_reduce(sums)
    total, *ce, norm = torch.cat([sums / procs.world, norm[None]]).tolist()
    run.step += 1
    if math.isfinite(total) and math.isfinite(norm):
        run.optimizer.step()
    elif args.skip_nonfinite:
        run.history["skipped"] += 1
        print0(f"step {run.step}: loss {total}, gradient norm {norm}: skipped")
    else:
        raise UserError(f"loss {total}, gradient norm {norm} at step {run.step}: not finite, training stops; "
                        f"{args.out} holds the last good checkpoint, of step {run.saved}: start anew with "
                        f"--ckpt={args.out} and a lower --lr, or go on with --resume --skip_nonfinite")
    run.optimizer.zero_grad(set_to_none=True)
    return total, ce, norm


def train(run: Run) -> int:
    """Steps until all are done (0) or a signal asks to stop (its number); either way the last is saved."""
    args, seconds, logged = run.args, 0.0, run.step     # seconds in steps alone since the last line
    exits = list(trained_exits(args, run.model.config.n_loop))
    flops = 3 * run.model.flops(args.seq_len, len(exits)) + (run.teacher.flops(args.seq_len) if run.teacher else 0)
    stream = feed(run)
    with StopFlag() as stop:
        asked = 0
        while run.step < run.steps and not (asked := stop.agreed(run.procs)):
            began, lr = time.perf_counter(), learning_rate(run.step, run.steps, args)
            total, ce, norm = train_step(run, stream, lr)
            seconds += time.perf_counter() - began
            done = run.step == run.steps
            if run.step % args.log_every == 0 or done:
                per_step, seconds, logged = seconds / (run.step - logged), 0.0, run.step
                log_step(run, total, ce, lr, norm, per_step, flops)
            if run.step % args.eval_every == 0 and not done:
                val = evaluate(run.model, run.quick, run.procs, run.autocast, exits)
                print0(f"step {run.step}/{run.steps} | validation loss {val[-1]:.4f}{by_exit(val)}")
                write_log(args.out, step=run.step, val_loss=val[-1], exit_val_loss=val,
                          val_tokens=count_targets(run.quick))
            if run.step % args.save_every == 0 and not done:
                save(run)
        save(run)
    return asked


def log_step(run: Run, total: float, ce: list[float], lr: float, norm: float, per_step: float, flops: int) -> None:
    """One line on the screen, one in log.jsonl. per_step: seconds; flops: of the whole step, per token."""
    args, speed = run.args, run.args.batch_tokens / per_step
    mfu = run.peak and speed * flops / run.peak
    print0(f"step {run.step}/{run.steps} | loss {ce[-1]:.4f}{by_exit(ce)}"
           f"{f' | with distillation {total:.4f}' if run.teacher else ''} | lr {lr:.1e} | {per_step * 1000:.0f} ms | "
           f"{speed:,.0f} tok/s{f' | mfu {mfu:.0%}' if mfu else ''} | eta {clock(per_step * (run.steps - run.step))}")
    write_log(args.out, step=run.step, loss=ce[-1], exit_loss=ce, objective=total, lr=lr, grad_norm=norm,
              tokens_per_s=speed, mfu=mfu, peak_gib=peak_memory(run.procs.device), skipped=run.history["skipped"],
              tokens=run.step * args.batch_tokens)


def by_exit(losses: list[float]) -> str:
    return f" (exits {' '.join(f'{x:.4f}' for x in losses[:-1])})" if len(losses) > 1 else ""


def report(run: Run) -> None:
    """The closing table: donor, converted, uptrained."""
    history, n = run.history, run.model.num_params()
    final = evaluate(run.model, run.valid, run.procs, run.autocast)[-1]
    seconds = time.perf_counter() - run.began
    write_log(run.args.out, step=run.step, full_val_loss=final, final=True, seconds=seconds,
              val_tokens=count_targets(run.valid), tokens=run.step * run.args.batch_tokens)
    lines = [["model", "validation loss", "perplexity", "stored", "run per token"]]
    if run.donor:
        lines.append(["donor", *score(history["donor"], run.donor.num_params())])
    converted = run.donor and run.args.init != "random"  # else nothing of the donor is in it
    lines += [["converted" if converted else "start", *score(history["converted"], n)],
              ["uptrained" if converted else "trained", *score(final, n)]]
    print0(f"\n{run.steps} steps, {clock(seconds)}, peak memory {peak_memory(run.procs.device):.1f} GiB; checkpoint in "
           f"{run.args.out}\n{table(lines)}")
    if history["skipped"]:
        print0(f"{history['skipped']} steps were skipped: their loss or gradient was not finite")
    if history.get("bf16", run.bf16) != run.bf16:
        print0("the last line is measured in another precision than those before: the run was resumed with another "
               "--dtype or device")
    if converted and history["converted"] > history["donor"]:
        won = (history["converted"] - final) / (history["converted"] - history["donor"])
        print0(f"{won:.0%} of what conversion cost is won back")


def score(loss: float, n: dict) -> list[str]:
    return [f"{loss:.4f}", f"{math.exp(min(loss, 700)):.2f}", f"{n['stored'] / 1e6:.2f} M", f"{n['run'] / 1e6:.2f} M"]


def main(argv=None) -> int:
    """Exit code: 0 if the run is done, 128 and the signal's number if one has stopped it."""
    began, args = time.perf_counter() - (process_age() if argv is None else 0.0), parse_args(TrainConfig, argv)
    procs = start_processes(args.device)
    with ExitStack() as held:
        args = replace(args, out=str(Path(args.out).absolute()))
        on_first(lambda: held.enter_context(own_folder(args.out)) and None)
        state = find_state(args.out, args.resume)
        check_out(args.out)                             # after a damaged checkpoint has made way for the previous one
        if state:
            args = resumed_settings(argv, args, state, MAY_CHANGE)
        resumed = state is not None
        check_settings(args, resumed)
        run = prepare(args, procs, state, began)
        del state                                       # mapped from its file, which the disk could not free
        begin(run, resumed)
        if not (stopped := train(run)):
            report(run)
            return 0
        print0(f"stopped at step {run.step} of {run.steps}; "
               f"go on with: python train.py --resume --out={args.out} (or torchrun, as before)")
        return 128 + stopped


if __name__ == "__main__":
    script(main)
