"""Uptrain a recursive model against its donor (§3.1), on one process or, under torchrun, on many.

    python train.py                                       # the shipped donor -> 2 loops, stepwise, on a laptop
    torchrun --standalone --nproc_per_node=8 train.py --donor=FOLDER --init=average --rank=64 --data=FILES --lr=2e-4
    python train.py --resume --out=out                    # go on where a run stopped, with the settings it had
    torchrun --max-restarts=3 ... train.py --resume=auto  # start, or go on, or go on by itself after a crash
"""

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from calibrate import calibration_windows, to_calibrated
from convert import KV, AnyInit, LoraInit, Norms, Rounding, Vectors, check_ignored, to_recursive
from hf import config_from_hf, load_any, refuse_looped
from lib.checkpoint import check_donor, check_inputs, find_state, load_optimizer, resumed_settings, save_checkpoint
from lib.cli import UserError, parse_args, print0, script
from lib.data import Tokens, batches, load_tokens, validation
from lib.donors import donor_files, find_donor, read_json
from lib.folders import check_out, own_folder
from lib.log import by_exit, describe, drop_log_after, log_step, summary, write_log
from lib.settings import accumulation, check_seq_len, check_texts, check_train_settings, check_vocabulary
from lib.system import (
    Processes,
    StopFlag,
    check_compile,
    on_first,
    peak_flops,
    pick_bf16,
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
    init: TrainInit = "stepwise"           # §2.2; ours: calibrated; random: untrained; scratch: untrained, full size
    loops: int = 2                         # how many times the shared block runs (the paper's B)
    rank: int = 0                          # LoRA rank per loop and linear map; 0 ties strictly
    lora_init: LoraInit = "svd"            # LoRA from the SVD of the residual (Eq. 4), or zero (ablation)
    vectors: Vectors = "tied"              # norm weights and biases: tied (paper), or one per loop
    kv: KV = "own"                         # keys and values: of each loop (paper), or the first loop's for all
    norms: Norms = "init"                  # tied norm weights: as init says, averaged, or those of the first loop
    rounding: Rounding = "round"           # where a stepwise step falls between two layers
    calib_tokens: int = 20_480             # init=calibrated: the tokens of --data that the conversion is fitted to
    # on what
    data: str = "assets/books/train"       # text files, folders of them, or folders of token shards, by comma
    valid: str = "assets/books/valid.txt"  # the same, never trained on
    tokens: int = 300_000                  # tokens to train on, in all, rounded down to whole steps
    skip_tokens: int = 0                   # tokens to pass over: a run of the same data, seed and seq_len read them
    batch_tokens: int = 2048               # tokens per optimizer step, over all processes
    seq_len: int = 256                     # tokens per sequence
    micro_batch: int = 8                   # sequences per process that go through the model at once
    # how (App. E, and where it is silent: docs/choices.md)
    lr: float = 1e-3                       # peak of the cosine (paper, of 1-2 B: 2e-4; calibrated: 1e-4 to 3e-4)
    min_lr_ratio: float = 0.1              # the cosine ends at this share of lr
    warmup: int = 20                       # steps of linear warm-up
    weight_decay: float = 0.1              # AdamW's, on matrices only
    beta1: float = 0.9                     # AdamW's, of the mean of the gradient
    beta2: float = 0.95                    # AdamW's, of the mean of its square
    clip: float = 1.0                      # largest gradient norm
    distill: Literal["fkl", "rkl", "jsd", "tvd", "none"] = "fkl"  # distillation from the teacher, beside cross entropy
    distill_weight: float = 1.0            # loss = cross entropy + this x distillation
    temperature: float = 1.0               # of both distributions in the distillation; its loss is scaled by the square
    exit_loss: Literal["last", "weighted", "aggressive"] = "last"  # weights of the exits' losses (§2.4)
    exit_coef: float = 0.1                 # aggressive: the weight of every loop but the last
    exit_distill: bool = False             # the earlier exits are distilled from the last loop, not from the teacher
    # where, and how often
    out: str = "out"                       # checkpoint folder, with log.jsonl
    resume: Literal["no", "yes", "auto"] = "no"  # go on from the checkpoint in --out; auto: if there is one, else start
    eval_every: int = 50                   # steps between evaluations
    eval_tokens: int = 16_384              # validation tokens per evaluation; the first and last: four times as many
    save_every: int = 100                  # steps between checkpoints
    log_every: int = 10                    # steps between log lines
    seed: int = 0                          # of the data order and random initialisation
    device: str = "auto"                   # auto, cpu, cuda
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # autocast to bfloat16; auto = on GPUs
    compile: bool = False                  # torch.compile (a minute at the start)
    checkpointing: bool = False            # recompute activations in the backward pass: less memory, a third more work
    zero: bool = False                     # each process keeps only its share of the optimizer's state (ZeRO, stage 1)
    skip_nonfinite: bool = False           # skip a step whose loss or gradient is not finite, instead of stopping

    RENAMED = {"min_lr": "min_lr_ratio"}   # old flags and old checkpoints are read too


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
        return chunked_loss(
            [self.model.norm(states[i]) for i in self.exits], self.model.head_weight, targets,
            weights=list(self.exits.values()), teacher=teacher,
            kind="fkl" if args.distill == "none" else args.distill,          # without a teacher for exit_distill
            distill_weight=args.distill_weight, temperature=args.temperature, self_distill=args.exit_distill,
            compiled=args.compile)


def trained_exits(args: TrainConfig, n_loop: int) -> dict[int, float]:
    """{loop: weight of the loss at its end}."""
    if args.exit_loss == "last":
        return {n_loop - 1: 1.0}
    return {i: w for i, w in enumerate(exit_weights(n_loop, args.exit_loss, args.exit_coef)) if w > 0}


def learning_rate(step: int, steps: int, args: TrainConfig) -> float:
    """Linear warm-up, then a cosine down to min_lr_ratio * lr at the last step."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    done = (step - args.warmup) / max(1, steps - 1 - args.warmup)
    return args.lr * (args.min_lr_ratio + (1 - args.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizer(model: nn.Module, args: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, with --zero spread over the processes; weight decay for matrices and LoRA, none for norms and biases."""
    matrices = [p for n, p in model.named_parameters() if not n.endswith("bias") and "norm" not in n]
    vectors = [p for n, p in model.named_parameters() if n.endswith("bias") or "norm" in n]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    options = {"lr": args.lr, "betas": (args.beta1, args.beta2), "fused": True}
    if args.zero and dist.is_initialized():
        return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **options)
    return torch.optim.AdamW(groups, **options)


def check_settings(args: TrainConfig, resumed: bool) -> None:
    """Raise UserError for settings that are out of range, contradict each other or would change nothing."""
    check_train_settings(args, resumed)
    if not resumed:
        check_ignored(args)                                  # the settings of the conversion


# ---------------------------------------------------------------------------------------------------------------------
# Pieces of the run

def donor_config(folder: Path) -> Config:
    hf = read_json(folder / "config.json")
    return config_from_hf(hf, folder / "config.json") if "model_type" in hf else read_config(folder)


def check_start(args: TrainConfig, config: Config, tokenizer: Tokenizer, state: dict | None) -> None:
    """Raise UserError, before any weight is read, if the donor does not fit the settings, the teacher, --ckpt or the
    run that is resumed."""
    configs = {args.donor: config}
    if args.teacher:
        folder = find_donor(args.teacher)
        its = configs[args.teacher] = donor_config(folder)
        check_vocabulary(f"--teacher={args.teacher}", folder, its.vocab_size, f"the donor {args.donor}",
                         config.vocab_size, tokenizer, may_pad=True)
    check_seq_len(args.seq_len, configs)
    if state:
        check_donor(args, state["history"], config.architecture(), tokenizer)
        n_loop = read_config(args.out).n_loop
    elif args.ckpt:
        start = read_config(args.ckpt)
        check_vocabulary(f"--ckpt={args.ckpt}", args.ckpt, start.vocab_size, f"its donor {args.donor}",
                         config.vocab_size, tokenizer)
        n_loop = start.n_loop
    elif args.init == "scratch":
        n_loop = config.n_loop
    else:
        refuse_looped(config, "give its donor, or start from it with --ckpt")
        n_loop = replace(config, n_loop=args.loops, rank=args.rank, kv=args.kv).n_loop   # UserError if they do not fit
    if n_loop == 1 and args.exit_loss != "last":
        raise UserError(f"--exit_loss={args.exit_loss} needs an exit before the last loop, and this model has 1 loop")


def build(args: TrainConfig, folder: Path, config: Config, device, resumed: bool, windows: list[Tensor] | None,
          ) -> tuple[RecursiveTransformer, RecursiveTransformer | None, RecursiveTransformer | None]:
    """(student, donor, teacher), in fp32. The donor is None for init=scratch, which needs its config but no weights;
    the teacher is None without distillation. windows: the text for init=calibrated."""
    def frozen(source: str) -> RecursiveTransformer:
        return load_any(source, torch.float32).requires_grad_(False).to(device)

    scratch = args.init == "scratch" and not args.ckpt
    donor = None if scratch else frozen(str(folder))
    teacher = None if args.distill == "none" else donor
    if args.teacher:
        teacher = frozen(str(find_donor(args.teacher)))
    if resumed or args.ckpt:
        student = RecursiveTransformer.load(args.out if resumed else args.ckpt, dtype=torch.float32)
    elif scratch:
        student = RecursiveTransformer(config)
    elif windows:
        student = to_calibrated(donor, windows, args.loops, args.rank, args.vectors, kv=args.kv)
    else:
        student = to_recursive(donor, args.loops, args.init, args.rank, args.lora_init, args.vectors,
                               args.rounding, args.norms, kv=args.kv)
    student.checkpointing = args.checkpointing
    return student.to(device), donor, teacher


def precision(args: TrainConfig, device: torch.device) -> tuple[bool, torch.autocast]:
    """(whether forward passes run in bfloat16 where that is safe, the autocast context for it)."""
    bf16 = pick_bf16(args.dtype, device)
    return bf16, torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)


@torch.no_grad()
def evaluate(model: RecursiveTransformer, pairs: list, procs: Processes, autocast, exits=(-1,)) -> list[float]:
    """Mean cross entropy in nats at the exits of these loops, over validation batches, split over the processes."""
    total = torch.zeros(len(exits) + 1, dtype=torch.float64, device=procs.device)
    for idx, targets in pairs[procs.rank::procs.world]:
        with autocast:
            states = model(idx.to(procs.device))
            _, ce = chunked_loss([model.norm(states[i]) for i in exits], model.head_weight,
                                 targets.to(procs.device), [1.0] * len(exits))
        total += torch.cat([ce, ce.new_ones(1)]) * targets.numel()
    if procs.world > 1:
        dist.all_reduce(total)
    return (total[:-1] / total[-1]).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# The run

@dataclass
class Run:
    """The state of a run: what its steps read and change."""
    args: TrainConfig
    procs: Processes
    model: RecursiveTransformer
    donor: RecursiveTransformer | None      # None for init=scratch
    teacher: RecursiveTransformer | None    # None without distillation
    objective: nn.Module                    # model and loss: compiled, in DDP
    optimizer: torch.optim.Optimizer
    train_tokens: Tokens
    files: dict[str, bytes]                 # the donor's tokenizer and licence, which go into every checkpoint
    valid: list                             # validation batches for the first and the last evaluation
    quick: list                             # and for those between, a quarter of the tokens
    bf16: bool                              # forward passes run in bfloat16 where that is safe
    autocast: torch.autocast
    steps: int                              # optimizer steps in all
    micro_steps: int                        # forward and backward passes per step and process
    step: int                               # steps done
    saved: int                              # steps done when the last checkpoint was written
    history: dict                           # what a resumed run must know of its start
    flops: int                              # of a whole step, per token
    peak: float | None                      # FLOP/s of all devices together, where known
    began: float                            # time.perf_counter() less the seconds of the run before it was resumed


def prepare(args: TrainConfig, procs: Processes, state: dict | None, began: float) -> Run:
    """Load, check and convert. Every mistake in the settings is found before the minutes of work."""
    micro_steps, steps = accumulation(args, procs.world), args.tokens // args.batch_tokens
    torch.manual_seed(args.seed)
    bf16, autocast = precision(args, procs.device)
    if args.compile:
        check_compile(procs.device)

    folder = find_donor(args.donor)
    config = donor_config(folder)
    tokenizer = Tokenizer.load(folder, config.vocab_size)
    check_start(args, config, tokenizer, state)
    texts = {name: load_tokens(getattr(args, name), tokenizer, config.vocab_size) for name in ("data", "valid")}
    check_texts(args, texts)
    history = state["history"] if state else {
        "donor_config": asdict(config), "tokenizer_hash": tokenizer.hash, "skipped": 0, "seconds": 0.0, "bf16": bf16,
        "trained_before": bool(args.ckpt) and (Path(args.ckpt) / "train.pt").exists()}
    # The last evaluation reads as many tokens as the first, also if the run is resumed with another --eval_tokens.
    history.setdefault("eval_tokens", 4 * (state["args"]["eval_tokens"] if state else args.eval_tokens))

    windows = None
    if args.init == "calibrated" and state is None:
        windows = calibration_windows(texts["data"], args.calib_tokens, config, f"--data={args.data}")
    model, donor, teacher = build(args, folder, config, procs.device, state is not None, windows)
    check_inputs(args, history, texts | {"donor": donor, "teacher": args.teacher and teacher})
    if bf16:                                                 # frozen weights are rounded once, not at each use
        donor, teacher = (m and m.to(torch.bfloat16) for m in (donor, teacher))

    optimizer, step = make_optimizer(model, args), 0
    if state:
        step = state["step"]
        load_optimizer(optimizer, state["optimizer"])
        drop_log_after(Path(args.out) / "log.jsonl", step or -1)  # the first line follows its checkpoint: anew
    objective = Objective(model, args)
    if args.compile:
        objective.compile()
    valid, quick = (validation(texts["valid"], args.seq_len, n, args.micro_batch)
                    for n in (history["eval_tokens"], args.eval_tokens))
    flops = 3 * model.flops(args.seq_len, len(objective.exits)) + (teacher.flops(args.seq_len) if teacher else 0)
    peak = peak_flops(procs.device, bf16)
    return Run(args=args, procs=procs, model=model, donor=donor, teacher=teacher,
               objective=DistributedDataParallel(objective) if procs.world > 1 else objective, optimizer=optimizer,
               train_tokens=texts["data"], files=donor_files(folder), valid=valid, quick=quick, bf16=bf16,
               autocast=autocast, steps=steps, micro_steps=micro_steps, step=step, saved=step, history=history,
               flops=flops, peak=peak and peak * procs.world, began=began - history.get("seconds", 0.0))


def begin(run: Run, resumed: bool) -> None:
    """Print what will be trained. A new run also evaluates donor and start, and writes its first checkpoint."""
    args, history = run.args, run.history
    print0(describe(run))
    if args.warmup > run.steps:
        print0(f"warning: the warm-up of {args.warmup} steps is longer than the run of {run.steps}: the learning rate "
               f"ends at {learning_rate(run.steps - 1, run.steps, args):.1e}, below --lr={args.lr}; give a smaller "
               "--warmup or more --tokens")
    if resumed:
        print0(f"resuming at step {run.step} of {run.steps}")
    else:
        history["donor"] = evaluate(run.donor, run.valid, run.procs, run.autocast)[-1] if run.donor else None
        history["converted"] = evaluate(run.model, run.valid, run.procs, run.autocast)[-1]
        before = f"donor {history['donor']:.4f}, " if run.donor else ""
        print0(f"validation loss: {before}start {history['converted']:.4f}")
        save(run)
    if run.step == 0:
        write_log(args.out, step=0, full_val_loss=history["converted"], donor_loss=history["donor"],
                  val_tokens=count_targets(run.valid), data=history["inputs"]["data"],
                  valid=history["inputs"]["valid"])
    if run.donor and run.donor is not run.teacher:
        run.donor.cpu()                                      # frees the GPU's memory: it is not evaluated again


def count_targets(pairs: list) -> int:
    """The number of target tokens in validation batches."""
    return sum(targets.numel() for _, targets in pairs)


def save(run: Run) -> None:
    """Write a checkpoint of the step that was just done."""
    run.history["seconds"] = time.perf_counter() - run.began
    save_checkpoint(run.args.out, run.model, run.optimizer,
                    {"step": run.step, "args": asdict(run.args), "history": run.history}, run.files)
    run.saved = run.step


def micro_batches(run: Run) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's micro-batches from the current step to the last. The samples in each depend only on its number,
    so training sees the same data however often it is stopped and on however many processes."""
    def samples():
        rows, size = run.args.micro_batch, run.procs.world * run.args.micro_batch
        for micro in range(run.step * run.micro_steps, run.steps * run.micro_steps):
            first = run.args.skip_tokens // run.args.seq_len + micro * size + run.procs.rank * rows
            yield range(first, first + rows)
    return batches(run.train_tokens, samples(), run.args.seq_len, run.args.seed, run.procs.device)


def train_step(run: Run, stream: Iterator, lr: float) -> tuple[float, list[float], float]:
    """(objective, cross entropy of each trained exit, gradient norm) of the whole batch, after one optimizer step."""
    args, procs = run.args, run.procs
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    sums = 0.0
    for micro in range(run.micro_steps):
        idx, targets = next(stream)
        last = micro == run.micro_steps - 1             # DDP averages gradients once per step
        with nullcontext() if last or procs.world == 1 else run.objective.no_sync(), run.autocast:
            with torch.no_grad():
                teacher = run.teacher and (run.teacher.norm(run.teacher(idx)[-1]), run.teacher.head_weight)
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
                        f"--ckpt={args.out} and a lower --lr, or go on with --resume --out={args.out} --skip_nonfinite")
    run.optimizer.zero_grad(set_to_none=True)
    return total, ce, norm


def train(run: Run) -> int:
    """0 when all steps are done, or the number of the signal that stopped them. Either way the last step is saved."""
    args, seconds, logged = run.args, 0.0, run.step          # seconds spent in steps since the last logged one
    exits, stream = list(trained_exits(args, run.model.config.n_loop)), micro_batches(run)
    with StopFlag() as stop:
        signal = 0
        while run.step < run.steps and not (signal := stop.agreed(run.procs)):
            began, lr = time.perf_counter(), learning_rate(run.step, run.steps, args)
            total, ce, norm = train_step(run, stream, lr)
            seconds += time.perf_counter() - began
            done = run.step == run.steps
            if run.step % args.log_every == 0 or done:
                log_step(run, total, ce, lr, norm, seconds / (run.step - logged))
                seconds, logged = 0.0, run.step
            if run.step % args.eval_every == 0 and not done:
                val = evaluate(run.model, run.quick, run.procs, run.autocast, exits)
                print0(f"step {run.step}/{run.steps} | validation loss {val[-1]:.4f}{by_exit(val)}")
                write_log(args.out, step=run.step, val_loss=val[-1], exit_val_loss=val,
                          val_tokens=count_targets(run.quick))
            if run.step % args.save_every == 0 and not done:
                save(run)
        save(run)
    return signal


def report(run: Run) -> None:
    """The last evaluation, and the closing table: donor, converted, uptrained."""
    final = evaluate(run.model, run.valid, run.procs, run.autocast)[-1]
    seconds = time.perf_counter() - run.began
    write_log(run.args.out, step=run.step, full_val_loss=final, final=True, seconds=seconds,
              val_tokens=count_targets(run.valid), tokens=run.step * run.args.batch_tokens)
    print0(summary(run, final, seconds))


def main(argv=None) -> int:
    """The exit code: 0 if the run is done, 128 + the signal's number if a signal stopped it."""
    began, args = time.perf_counter() - (process_age() if argv is None else 0.0), parse_args(TrainConfig, argv)
    procs = start_processes(args.device)
    with ExitStack() as held:
        args = replace(args, out=str(Path(args.out).absolute()))
        on_first(lambda: held.enter_context(own_folder(args.out)) and None)
        state = find_state(args.out, args.resume)
        check_out(args.out)                             # find_state may have replaced a damaged checkpoint
        if state:
            args = resumed_settings(argv, args, state)
        resumed = state is not None
        check_settings(args, resumed)
        run = prepare(args, procs, state, began)
        del state                                       # it is memory-mapped: its file's space could not be freed
        begin(run, resumed)
        if not (stopped := train(run)):
            report(run)
            return 0
        print0(f"stopped at step {run.step} of {run.steps}; "
               f"go on with: python train.py --resume --out={args.out} (or torchrun, as before)")
        return 128 + stopped


if __name__ == "__main__":
    script(main)
