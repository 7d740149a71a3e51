"""Uptrain a recursive model against its donor (§3.1), on one process or, under torchrun, on many.

    python train.py                                       # the shipped donor -> 2 loops, stepwise, on a laptop
    torchrun --standalone --nproc_per_node=8 train.py --donor=FOLDER --init=average --rank=64 --data=FILES --lr=2e-4
    python train.py --resume --out=out                    # go on where a run stopped, with the settings it had
"""

import json
import math
import os
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from convert import LoraInit, Norms, Rounding, Vectors, to_recursive
from data import Tokens, batch, load_tokens, validation
from exits import distill_loss
from hf import config_from_hf, find_donor, load_any, read_json, refuse_looped
from model import Config, RecursiveTransformer, read_config
from runtime import (
    Processes,
    StopFlag,
    UserError,
    check_out,
    clock,
    is_main,
    parse_args,
    print0,
    replace_folder,
    script,
    start_processes,
    table,
)
from tokenizer import Tokenizer, copy_tokenizer

TrainInit = Literal["stepwise", "average", "lower", "random", "scratch"]


@dataclass
class TrainConfig:
    # what is trained
    donor: str = "assets/donor"            # full-size model and teacher: a folder or a Hugging Face id
    ckpt: str | None = None                # start from this checkpoint of ours instead of converting the donor
    init: TrainInit = "stepwise"           # how the stored layers start (§2.2); scratch = random weights at full size
    loops: int = 2                         # how often the shared block runs (the paper's B)
    rank: int = 0                          # LoRA rank per loop and linear map; 0 ties strictly
    lora_init: LoraInit = "svd"            # LoRA from the SVD of the residual (Eq. 4), or zero (ablation)
    vectors: Vectors = "tied"              # norm weights and biases: tied (paper), or one per loop
    norms: Norms = "init"                  # tied norm weights: as init says, averaged, or those of the first loop
    rounding: Rounding = "round"           # where a stepwise step falls between two layers
    # on what
    data: str = "assets/books/train"       # text files or a folder of token shards; several by comma
    valid: str = "assets/books/valid.txt"  # the same, never trained on
    tokens: int = 300_000                  # tokens to train on, in all
    batch_tokens: int = 2048               # tokens per optimizer step, over all processes
    seq_len: int = 256                     # tokens per sequence
    micro_batch: int = 8                   # sequences per process that go through the model at once
    # how (App. E, and where it is silent: README)
    lr: float = 1e-3                       # peak of the cosine schedule (the paper's, for models of 1-2 B: 2e-4)
    min_lr: float = 0.1                    # where the cosine ends, as a share of lr
    warmup: int = 20                       # steps of linear warm-up
    weight_decay: float = 0.1              # AdamW's, on matrices only
    beta1: float = 0.9                     # AdamW's, of the mean of the gradient
    beta2: float = 0.95                    # AdamW's, of the mean of its square
    clip: float = 1.0                      # largest gradient norm
    distill: Literal["fkl", "rkl", "jsd", "tvd", "none"] = "fkl"  # distillation from the donor, beside cross entropy
    distill_weight: float = 1.0            # loss = cross entropy + this x distillation
    temperature: float = 1.0               # of both distributions in the distillation; its loss is scaled by the square
    # where, and how often
    out: str = "out"                       # checkpoint folder, with log.jsonl
    resume: bool = False                   # go on from the checkpoint in --out, with its settings
    eval_every: int = 50                   # steps between evaluations
    eval_tokens: int = 16_384              # validation tokens per evaluation; the first and last: four times as many
    save_every: int = 100                  # steps between checkpoints
    log_every: int = 10                    # steps between log lines
    seed: int = 0                          # of the data order and of whatever starts random
    device: str = "auto"                   # auto, cpu, cuda
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # autocast to bfloat16; auto = on GPUs
    compile: bool = False                  # torch.compile (a minute at the start)


# What a resumed run may be given anew: where its files lie, how it runs and reports, and how long (with that schedule).
MAY_CHANGE = {"out", "resume", "tokens", "eval_every", "eval_tokens", "save_every", "log_every", "micro_batch",
              "device", "dtype", "compile", "donor", "data", "valid"}


class Objective(nn.Module):
    """Cross entropy + distillation for one micro-batch, in one module so that DDP and compile see a whole forward."""

    def __init__(self, model: RecursiveTransformer, args: TrainConfig):
        super().__init__()
        self.model, self.args = model, args

    def forward(self, idx: Tensor, targets: Tensor, teacher_logits: Tensor | None) -> tuple[Tensor, Tensor]:
        """(loss to minimise, cross entropy), both mean over tokens in nats; idx and targets (B, T)."""
        logits = self.model.logits(self.model(idx)[-1])                  # (B, T, V)
        ce = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        if teacher_logits is None:
            return ce, ce.detach()
        t = self.args.temperature  # the square keeps the gradient's size (Hinton et al., 2015)
        kl = t * t * distill_loss(logits / t, teacher_logits / t, self.args.distill)
        return ce + self.args.distill_weight * kl, ce.detach()


def learning_rate(step: int, steps: int, args: TrainConfig) -> float:
    """Linear warm-up, then a cosine down to min_lr x lr at the last step."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    done = (step - args.warmup) / max(1, steps - 1 - args.warmup)
    return args.lr * (args.min_lr + (1 - args.min_lr) * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizer(model: nn.Module, args: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; weight decay for matrices and LoRA, none for norm weights and biases."""
    matrices = [p for n, p in model.named_parameters() if not n.endswith("bias") and "norm" not in n]
    vectors = [p for n, p in model.named_parameters() if n.endswith("bias") or "norm" in n]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": args.weight_decay},
                              {"params": vectors, "weight_decay": 0.0}],
                             lr=args.lr, betas=(args.beta1, args.beta2), fused=True)


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


def check_settings(args: TrainConfig) -> None:
    for name in ("tokens", "batch_tokens", "seq_len", "micro_batch", "lr", "temperature", "eval_every", "save_every",
                 "log_every", "eval_tokens", "clip"):
        if not getattr(args, name) > 0:
            raise UserError(f"--{name}={getattr(args, name)} must be positive")
    for name in ("rank", "min_lr", "warmup", "weight_decay", "distill_weight", "seed"):
        if not getattr(args, name) >= 0:
            raise UserError(f"--{name}={getattr(args, name)} must not be negative")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)} must be at least 0 and less than 1")
    if args.ckpt or args.init == "scratch":
        given = "--ckpt" if args.ckpt else "--init=scratch"
        for name in ("rank", "loops", "lora_init", "vectors", "norms", "rounding", *["init"] * bool(args.ckpt)):
            if getattr(args, name) != getattr(TrainConfig, name):
                raise UserError(f"--{name}={getattr(args, name)} says how a donor is converted, and {given} converts "
                                "none: drop one of the two")
    if args.tokens < args.batch_tokens:
        raise UserError(f"--tokens={args.tokens} is less than one step of {args.batch_tokens}; ask for more tokens")
    if not args.resume and (Path(args.out) / "train.pt").exists():
        raise UserError(f"{args.out} holds a run already; go on with --resume, or give another --out")
    if not args.resume and (Path(args.out) / "model.safetensors").exists():  # somebody's donor, perhaps
        raise UserError(f"{args.out} holds a model already; give another --out, and --ckpt={args.out} to start from it")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

def save_checkpoint(args: TrainConfig, model, optimizer, step: int, history: dict) -> None:
    """Replace the folder args.out: model, tokenizer, optimizer and where the run stands. The first process writes."""
    if is_main():
        with replace_folder(args.out) as tmp:
            model.write(tmp)
            copy_tokenizer(history["tokenizer"], tmp)
            state = {"step": step, "args": asdict(args), "history": history, "optimizer": optimizer.state_dict()}
            try:
                torch.save(state, tmp / "train.pt")
            except RuntimeError as e:  # what torch makes of a full disk
                raise OSError(f"train.pt: {e} (is the disk full?)") from e
    if dist.is_initialized():
        dist.barrier()


def load_train_state(out: str) -> dict:
    path = Path(out) / "train.pt"
    if not path.exists():
        raise UserError(f"nothing to resume: {path} does not exist; start without --resume, or name the run with --out")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return state | {"args": TrainConfig(**state["args"])}
    except Exception as e:  # torch raises whatever its unpickler met
        raise UserError(f"{path} is damaged ({str(e).splitlines()[0]}); start anew with --ckpt={out}") from None


def resumed_settings(argv, state: dict) -> TrainConfig:
    """The settings of the run that is resumed, with the flags given now. UserError if they would change what it is."""
    saved, given = state["args"], parse_args(TrainConfig, argv)
    kept = parse_args(TrainConfig, argv, defaults=saved)
    clash = [f"--{name}={value} (the run has {getattr(saved, name)})" for name, value in asdict(kept).items()
             if value != getattr(saved, name) and name not in MAY_CHANGE]
    if clash:
        raise UserError(f"--resume continues the run in {given.out} as it was, but {', '.join(clash)} was given; "
                        f"drop the flag, or start a new run from it with --ckpt={given.out} and another --out")
    return replace(kept, resume=True, out=given.out)  # the folder may have been moved


def drop_log_after(path: Path, step: int) -> None:
    """Forget what was logged after the checkpoint that the run goes on from, and how it ended if it was at its end."""
    if is_main() and path.exists():
        kept = 0
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"}\n") or (values := json.loads(line))["step"] > step or "final" in values:
                break  # a crash may have cut the last one short
            kept += len(line)
        os.truncate(path, kept)


def write_log(args: TrainConfig, **values) -> None:
    if is_main():
        try:
            with open(Path(args.out) / "log.jsonl", "a") as f:
                f.write(json.dumps(values) + "\n")
        except OSError as e:
            raise UserError(f"cannot write {e.filename or 'log.jsonl'} ({e.strerror}); {args.out} holds the last "
                            f"checkpoint: make room, then go on with --resume --out={args.out}") from e


# ---------------------------------------------------------------------------------------------------------------------
# Pieces of the run

def donor_config(folder: Path) -> Config:
    hf = read_json(folder / "config.json")
    return config_from_hf(hf, folder / "config.json") if "model_type" in hf else read_config(folder)


def check_start(args: TrainConfig, config: Config, tokenizer: Tokenizer, state: dict | None) -> None:
    """Raise UserError if the donor does not fit the settings, --ckpt or the run resumed: before any real work."""
    if args.seq_len > config.n_ctx:
        raise UserError(f"--seq_len={args.seq_len} is longer than the {config.n_ctx} tokens that {args.donor} was made "
                        f"for; use --seq_len={config.n_ctx} or less")
    if state:
        before = state["history"]["donor_config"]
        changed = ", ".join(f"{k}={v} (was {before.get(k)})" for k, v in asdict(config).items() if v != before.get(k))
        if changed or state["history"]["tokenizer_hash"] != tokenizer.hash:
            raise UserError(f"the donor {args.donor} is of another architecture or tokenizer than when the run in "
                            f"{args.out} started: {changed or 'tokenizer'}; resume with the donor it was made from")
    elif args.ckpt:
        size = read_config(args.ckpt).vocab_size
        if size != config.vocab_size or Tokenizer.load(args.ckpt, size).hash != tokenizer.hash:
            raise UserError(f"{args.ckpt} has a vocabulary of {size}, its teacher {args.donor} one of "
                            f"{config.vocab_size}, or another tokenizer: name its own --donor")
    elif args.init != "scratch":
        refuse_looped(config, "give its donor, or start from it with --ckpt")
        replace(config, n_loop=args.loops, rank=args.rank)  # UserError if the loops do not divide the layers


def build(args: TrainConfig, folder: Path, config: Config,
          device) -> tuple[RecursiveTransformer, RecursiveTransformer | None]:
    """(student, donor) in fp32; the donor is None for init=scratch, which needs its config but no weights."""
    scratch = args.init == "scratch" and not args.ckpt
    donor = None if scratch else load_any(str(folder), torch.float32).requires_grad_(False).to(device)
    if args.resume or args.ckpt:
        student = RecursiveTransformer.load(args.out if args.resume else args.ckpt, dtype=torch.float32)
    elif scratch:
        student = RecursiveTransformer(config)
    else:
        student = to_recursive(donor, args.loops, args.init, args.rank, args.lora_init, args.vectors,
                               args.rounding, args.norms)
    return student.to(device), donor


@torch.no_grad()
def evaluate(model: RecursiveTransformer, batches: list, procs: Processes, autocast) -> float:
    """Mean cross entropy in nats over validation batches, which the processes share out."""
    total = torch.zeros(2, dtype=torch.float64, device=procs.device)
    for idx, targets in batches[procs.rank::procs.world]:
        with autocast:
            logits = model.logits(model(idx.to(procs.device))[-1])
        loss = F.cross_entropy(logits.flatten(0, 1), targets.to(procs.device).flatten(), reduction="sum")
        total[0] += loss
        total[1] += targets.numel()
    if procs.world > 1:
        dist.all_reduce(total)
    return (total[0] / total[1]).item()


# ---------------------------------------------------------------------------------------------------------------------
# The run

@dataclass
class Run:
    """All that one run has, so that its pieces can be read one at a time."""
    args: TrainConfig
    procs: Processes
    model: RecursiveTransformer
    donor: RecursiveTransformer | None      # None for init=scratch
    teacher: RecursiveTransformer | None    # the donor, or None where nothing is distilled
    objective: nn.Module                    # what is called and differentiated: compiled, in DDP
    optimizer: torch.optim.Optimizer
    train_tokens: Tokens
    valid: list                             # all validation batches; the first quarter serves between
    bf16: bool                              # forward passes run in bfloat16 where that is safe
    autocast: torch.autocast
    steps: int                              # optimizer steps in all
    micro_steps: int                        # forward and backward passes per step and process
    step: int                               # steps done
    history: dict                           # what a resumed run must know of its start


def prepare(args: TrainConfig, state: dict | None) -> Run:
    """Load, check and convert everything; what can be wrong is found out before the minutes of work."""
    procs = start_processes(args.device)
    micro_steps, steps = accumulation(args, procs.world), args.tokens // args.batch_tokens
    if state and steps < state["step"]:
        raise UserError(f"--tokens={args.tokens} are {steps} steps, the run in {args.out} has done {state['step']}; "
                        f"ask for at least --tokens={state['step'] * args.batch_tokens}")
    torch.manual_seed(args.seed)
    bf16 = args.dtype == "bfloat16" or (args.dtype == "auto" and procs.device.type == "cuda")
    autocast = torch.autocast(procs.device.type, dtype=torch.bfloat16, enabled=bf16)

    folder = find_donor(args.donor)
    config = donor_config(folder)
    tokenizer = Tokenizer.load(folder, config.vocab_size)
    check_start(args, config, tokenizer, state)
    texts = {name: load_tokens(getattr(args, name), tokenizer, config.vocab_size) for name in ("data", "valid")}
    for name, tokens in texts.items():
        if len(tokens) <= args.seq_len:
            raise UserError(f"--{name}={getattr(args, name)} has {len(tokens)} tokens, one sequence needs "
                            f"{args.seq_len + 1} (seq_len + 1); give more text or a smaller --seq_len")

    model, donor = build(args, folder, config, procs.device)
    optimizer = make_optimizer(model, args)
    history = {"donor_config": asdict(config), "tokenizer_hash": tokenizer.hash}
    if state:
        history = state["history"]
        optimizer.load_state_dict(state["optimizer"])
        drop_log_after(Path(args.out) / "log.jsonl", state["step"])
    objective = Objective(model, args)
    if args.compile:
        objective.compile()
    return Run(args, procs, model, donor, None if args.distill == "none" else donor,
               DistributedDataParallel(objective) if procs.world > 1 else objective, optimizer, texts["data"],
               validation(texts["valid"], args.seq_len, 4 * args.eval_tokens),
               bf16, autocast, steps, micro_steps,
               state["step"] if state else 0, history | {"tokenizer": str(folder)})


def begin(run: Run) -> None:
    """Say what will be trained; a new run also scores donor and start, and writes its first checkpoint."""
    args, c, n = run.args, run.model.config, run.model.num_params()
    print0(f"{args.ckpt or args.init}: {c.n_layer} layers as {c.n_loop} x {c.n_unique}, rank {c.rank} | parameters "
           f"{n['stored'] / 1e6:.2f} M stored, {n['run'] / 1e6:.2f} M run per token | {len(run.train_tokens):,} tokens "
           f"to train on | {run.procs.world} x {run.procs.device.type}{' bf16' * run.bf16}")
    if args.resume:
        print0(f"resuming at step {run.step} of {run.steps}")
        return
    run.history["donor"] = evaluate(run.donor, run.valid, run.procs, run.autocast) if run.donor else None
    run.history["converted"] = evaluate(run.model, run.valid, run.procs, run.autocast)
    before = f"donor {run.history['donor']:.4f}, " if run.donor else ""
    print0(f"validation loss: {before}start {run.history['converted']:.4f}")
    save_checkpoint(args, run.model, run.optimizer, 0, run.history)
    write_log(args, step=0, full_val_loss=run.history["converted"], donor_loss=run.history["donor"])


def train_step(run: Run, lr: float) -> tuple[float, float, float]:
    """One optimizer step; returns (objective, cross entropy, gradient norm), means over the whole batch."""
    args, procs = run.args, run.procs
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    sums = torch.zeros(2, device=procs.device)
    for micro in range(run.micro_steps):
        first = ((run.step * run.micro_steps + micro) * procs.world + procs.rank) * args.micro_batch
        rows = range(first, first + args.micro_batch)
        idx, targets = (t.to(procs.device) for t in batch(run.train_tokens, rows, args.seq_len, args.seed))
        last = micro == run.micro_steps - 1             # DDP sums gradients once per step, not per micro-step
        with nullcontext() if last or procs.world == 1 else run.objective.no_sync(), run.autocast:
            with torch.no_grad():
                teacher_logits = run.teacher.logits(run.teacher(idx)[-1]) if run.teacher else None
            loss, ce = run.objective(idx, targets, teacher_logits)
        (loss / run.micro_steps).backward()
        sums += torch.stack([loss.detach(), ce]) / run.micro_steps
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), args.clip).item()
    if procs.world > 1:
        dist.all_reduce(sums)
    total, ce = (sums / procs.world).tolist()
    if not (math.isfinite(total) and math.isfinite(norm)):
        raise UserError(f"loss {total}, gradient norm {norm} at step {run.step + 1}: not finite, training stops; "
                        f"{args.out} holds the last good checkpoint: start anew with --ckpt and a lower --lr")
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    return total, ce, norm


def train(run: Run) -> bool:
    """Steps until all are done (True) or somebody asks to stop (False); either way the last is saved."""
    args, seconds, logged = run.args, 0.0, run.step     # seconds in steps alone since the last line
    with StopFlag() as stop:
        while run.step < run.steps and not stop.agreed(run.procs):
            began, lr = time.perf_counter(), learning_rate(run.step, run.steps, args)
            total, ce, norm = train_step(run, lr)
            seconds += time.perf_counter() - began
            done = run.step == run.steps
            if run.step % args.log_every == 0 or done:
                per_step, seconds, logged = seconds / (run.step - logged), 0.0, run.step
                speed = args.batch_tokens / per_step
                both = f" | with distillation {total:.4f}" if run.teacher else ""
                print0(f"step {run.step}/{run.steps} | loss {ce:.4f}{both} | lr {lr:.1e} | {per_step * 1000:.0f} ms | "
                       f"{speed:,.0f} tok/s | eta {clock(per_step * (run.steps - run.step))}")
                write_log(args, step=run.step, loss=ce, objective=total, lr=lr, grad_norm=norm, tokens_per_s=speed)
            if run.step % args.eval_every == 0 and not done:
                quick = run.valid[:max(1, len(run.valid) // 4)]
                val = evaluate(run.model, quick, run.procs, run.autocast)
                print0(f"step {run.step}/{run.steps} | validation loss {val:.4f}")
                write_log(args, step=run.step, val_loss=val)
            if run.step % args.save_every == 0 and not done:
                save_checkpoint(args, run.model, run.optimizer, run.step, run.history)
        save_checkpoint(args, run.model, run.optimizer, run.step, run.history)
    return run.step == run.steps


def report(run: Run, seconds: float) -> None:
    """The closing table: donor, converted, uptrained."""
    final, history, n = evaluate(run.model, run.valid, run.procs, run.autocast), run.history, run.model.num_params()
    write_log(run.args, step=run.step, full_val_loss=final, final=True, seconds=seconds)
    lines = [["model", "validation loss", "perplexity", "stored", "run per token"]]
    if run.donor:
        lines.append(["donor", *score(history["donor"], run.donor.num_params())])
    converted = run.donor and run.args.init != "random"  # else nothing of the donor is in it
    lines += [["converted" if converted else "start", *score(history["converted"], n)],
              ["uptrained" if converted else "trained", *score(final, n)]]
    print0(f"\n{run.steps} steps, {clock(seconds)}; checkpoint in {run.args.out}\n{table(lines)}")
    if converted and history["converted"] > history["donor"]:
        won = (history["converted"] - final) / (history["converted"] - history["donor"])
        print0(f"{won:.0%} of what conversion cost is won back")


def score(loss: float, n: dict) -> list[str]:
    return [f"{loss:.4f}", f"{math.exp(min(loss, 700)):.2f}", f"{n['stored'] / 1e6:.2f} M", f"{n['run'] / 1e6:.2f} M"]


def main(argv=None):
    began, args, state = time.perf_counter(), parse_args(TrainConfig, argv), None
    check_out(args.out)
    if args.resume:
        state = load_train_state(args.out)
        args = resumed_settings(argv, state)
    check_settings(args)
    run = prepare(args, state)
    begin(run)
    if train(run):
        report(run, time.perf_counter() - began)
    else:
        print0(f"stopped at step {run.step} of {run.steps}; "
               f"go on with: python train.py --resume --out={args.out} (or torchrun, as before)")


if __name__ == "__main__":
    script(main)
