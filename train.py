"""Uptrain a recursive model against its donor (§3.1), on one process or, under torchrun, on many.

    python train.py                                       # the shipped donor -> 2 loops, stepwise, on a laptop
    torchrun --standalone --nproc_per_node=8 train.py --donor=google/gemma-2b --init=average --rank=512 --data=...
    python train.py --resume --out=out                    # go on where a run stopped, with the settings it had
"""

import json
import math
import os
import signal
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
from data import batch, load_tokens, validation
from exits import distill_loss
from hf import config_from_hf, find_donor, load_any, read_json
from model import Config, RecursiveTransformer, read_config
from runtime import (
    Processes,
    UserError,
    check_out,
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
    tokens: int = 500_000                  # tokens to train on, in all
    batch_tokens: int = 2048               # tokens per optimizer step, over all processes
    seq_len: int = 256                     # tokens per sequence
    micro_batch: int = 8                   # sequences per process that go through the model at once
    # how (App. E, and where it is silent: README)
    lr: float = 1e-3                       # peak of the cosine schedule (the paper's, for models of 1-2 B: 2e-4)
    min_lr: float = 0.1                    # where the cosine ends, as a share of lr
    warmup: int = 20                       # steps of linear warm-up
    weight_decay: float = 0.1              # AdamW's, on matrices only
    beta1: float = 0.9                     # AdamW's
    beta2: float = 0.95                    # AdamW's
    clip: float = 1.0                      # largest gradient norm
    distill: Literal["fkl", "rkl", "jsd", "tvd", "none"] = "fkl"  # distillation from the donor, beside cross entropy
    distill_weight: float = 1.0            # loss = cross entropy + this x distillation
    temperature: float = 1.0               # of both distributions in the distillation; its loss is scaled by the square
    # where, and how often
    out: str = "out"                       # checkpoint folder, with log.jsonl
    resume: bool = False                   # go on from the checkpoint in --out, with its settings
    eval_every: int = 50                   # steps between evaluations
    eval_tokens: int = 16_384              # validation tokens per evaluation; the last one uses four times as many
    save_every: int = 100                  # steps between checkpoints
    log_every: int = 10                    # steps between log lines
    seed: int = 0                          # of the data order and of whatever starts random
    device: str = "auto"                   # auto, cpu, cuda
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # autocast to bfloat16; auto = on GPUs
    compile: bool = False                  # torch.compile (a minute at the start)


# What a resumed run may be given anew: how it runs and reports, and how long (with the schedule of that length).
MAY_CHANGE = {"out", "resume", "tokens", "eval_every", "eval_tokens", "save_every", "log_every", "micro_batch",
              "device", "dtype", "compile"}


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


def make_optimizer(model: nn.Module, args: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
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
    check_out(out)
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


def check_start(args: TrainConfig, config: Config, state: dict | None) -> None:
    """Raise UserError if the donor's config fits neither --ckpt nor the run that is resumed: before any real work."""
    if state and asdict(config) != state["history"]["donor_config"]:
        changed = ", ".join(f"{k}={v} (was {state['history']['donor_config'].get(k)})"
                            for k, v in asdict(config).items() if v != state["history"]["donor_config"].get(k))
        raise UserError(f"the donor {args.donor} is of another architecture than when the run in {args.out} started: "
                        f"{changed}; resume with the donor it was made from")
    if args.ckpt and not state and (size := read_config(args.ckpt).vocab_size) != config.vocab_size:
        raise UserError(f"{args.ckpt} has a vocabulary of {size}, its teacher {args.donor} one of "
                        f"{config.vocab_size}: name its own --donor")


def build(args: TrainConfig, folder: Path, device) -> tuple[RecursiveTransformer, RecursiveTransformer | None]:
    """(student, donor) in fp32; the donor is None for init=scratch, which needs its config but no weights."""
    scratch = args.init == "scratch" and not args.ckpt
    donor = None if scratch else load_any(str(folder), torch.float32).requires_grad_(False).to(device)
    if args.resume or args.ckpt:
        student = RecursiveTransformer.load(args.out if args.resume else args.ckpt, dtype=torch.float32)
    elif scratch:
        student = RecursiveTransformer(donor_config(folder))
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
        total += torch.stack([loss.double(), torch.tensor(float(targets.numel()), device=loss.device).double()])
    if procs.world > 1:
        dist.all_reduce(total)
    return (total[0] / total[1]).item()


class StopFlag:
    """Ctrl-C or SIGTERM on any process ends the run after the current step, with a checkpoint."""

    def __init__(self):
        self.asked = False

    def __enter__(self):
        self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, *_):
        self.asked = True

    def __exit__(self, *_):
        for s, handler in self.before.items():
            signal.signal(s, handler)

    def agreed(self, procs: Processes) -> bool:
        if procs.world == 1:
            return self.asked
        flag = torch.tensor(float(self.asked), device=procs.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())


def clock(seconds: float) -> str:
    return f"{seconds:.0f}s" if seconds < 90 else f"{seconds / 60:.0f}m" if seconds < 5400 else f"{seconds / 3600:.1f}h"


# ---------------------------------------------------------------------------------------------------------------------

def main(argv=None):
    args = parse_args(TrainConfig, argv)
    state = None
    if args.resume:
        state = load_train_state(args.out)
        args = resumed_settings(argv, state)
    check_settings(args)
    check_out(args.out)
    if not args.resume and (Path(args.out) / "train.pt").exists():
        raise UserError(f"{args.out} holds a run already; go on with --resume, or give another --out")
    if not args.resume and (Path(args.out) / "model.safetensors").exists():  # somebody's donor, perhaps
        raise UserError(f"{args.out} holds a model already; give another --out, and --ckpt={args.out} to start from it")
    procs = start_processes(args.device)
    device = procs.device
    micro_steps, steps = accumulation(args, procs.world), args.tokens // args.batch_tokens
    if state and steps < state["step"]:
        raise UserError(f"--tokens={args.tokens} are {steps} steps, the run in {args.out} has done {state['step']}; "
                        f"ask for at least --tokens={state['step'] * args.batch_tokens}")
    torch.manual_seed(args.seed)
    bf16 = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)

    folder = find_donor(args.donor)                     # what can be wrong is found out before the minutes of work
    config = donor_config(folder)
    check_start(args, config, state)
    tokenizer = Tokenizer.load(folder, config.vocab_size)
    texts = {name: load_tokens(getattr(args, name), tokenizer, config.vocab_size) for name in ("data", "valid")}
    for name, tokens in texts.items():
        if len(tokens) <= args.seq_len:
            raise UserError(f"--{name}={getattr(args, name)} has {len(tokens)} tokens, one sequence needs "
                            f"{args.seq_len + 1} (seq_len + 1); give more text or a smaller --seq_len")
    train_tokens, valid = texts["data"], validation(texts["valid"], args.seq_len, 4 * args.eval_tokens)
    quick = valid[:max(1, len(valid) // 4)]
    model, donor = build(args, folder, device)
    teacher = donor if args.distill != "none" else None
    optimizer = make_optimizer(model, args, device)
    start, history = 0, {"tokenizer": str(folder), "donor_config": asdict(config)}
    if state:
        start, history = state["step"], state["history"]
        optimizer.load_state_dict(state["optimizer"])
        drop_log_after(Path(args.out) / "log.jsonl", start)

    n = model.num_params()
    c = model.config
    print0(f"{args.ckpt or args.init}: {c.n_layer} layers as {c.n_loop} x {c.n_unique}, rank {c.rank} | parameters "
           f"{n['stored'] / 1e6:.2f} M stored, {n['run'] / 1e6:.2f} M run per token | {len(train_tokens):,} training "
           f"tokens | {procs.world} x {device.type}{' bf16' if bf16 else ''}")
    objective = Objective(model, args)
    if args.compile:
        objective.compile()
    wrapped = DistributedDataParallel(objective) if procs.world > 1 else objective
    if not state:
        history["donor"] = evaluate(donor, valid, procs, autocast) if donor else None
        history["converted"] = evaluate(model, valid, procs, autocast)
        save_checkpoint(args, model, optimizer, 0, history)
        write_log(args, step=0, val_loss=history["converted"], donor_loss=history["donor"])
        before = f"donor {history['donor']:.4f}, " if donor else ""
        print0(f"validation loss: {before}start {history['converted']:.4f}")
    else:
        print0(f"resuming at step {start} of {steps}")

    with StopFlag() as stop:
        began, last_log = time.time(), (start, time.time())
        step = start
        while step < steps and not stop.agreed(procs):
            lr = learning_rate(step, steps, args)
            for group in optimizer.param_groups:
                group["lr"] = lr
            sums = torch.zeros(2, device=device)
            for micro in range(micro_steps):
                first = ((step * micro_steps + micro) * procs.world + procs.rank) * args.micro_batch
                rows = range(first, first + args.micro_batch)
                idx, targets = (t.to(device) for t in batch(train_tokens, rows, args.seq_len, args.seed))
                last = micro == micro_steps - 1
                with nullcontext() if last or procs.world == 1 else wrapped.no_sync(), autocast:
                    with torch.no_grad():
                        teacher_logits = teacher.logits(teacher(idx)[-1]) if teacher else None
                    loss, ce = wrapped(idx, targets, teacher_logits)
                (loss / micro_steps).backward()
                sums += torch.stack([loss.detach(), ce]) / micro_steps
            norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            if procs.world > 1:
                dist.all_reduce(sums)
            total, ce = (sums / procs.world).tolist()
            if not (math.isfinite(total) and math.isfinite(norm)):
                raise UserError(f"loss {total}, gradient norm {norm} at step {step + 1}: not finite, training stops; "
                                f"{args.out} holds the last good checkpoint: start anew with --ckpt and a lower --lr")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % args.log_every == 0 or step == steps:
                now = time.time()
                per_step = (now - last_log[1]) / (step - last_log[0])
                last_log = (step, now)
                speed = args.batch_tokens / per_step
                both = f" | with distillation {total:.4f}" if teacher else ""
                print0(f"step {step}/{steps} | loss {ce:.4f}{both} | lr {lr:.1e} | {per_step * 1000:.0f} ms | "
                       f"{speed:,.0f} tok/s | eta {clock(per_step * (steps - step))}")
                write_log(args, step=step, loss=ce, objective=total, lr=lr, grad_norm=float(norm), tokens_per_s=speed)
            if step % args.eval_every == 0 and step < steps:
                val = evaluate(model, quick, procs, autocast)
                print0(f"step {step}/{steps} | validation loss {val:.4f}")
                write_log(args, step=step, val_loss=val)
            if step % args.save_every == 0 and step < steps:
                save_checkpoint(args, model, optimizer, step, history)
        save_checkpoint(args, model, optimizer, step, history)
    if step < steps:
        print0(f"stopped at step {step} of {steps}; go on with: python train.py --resume --out={args.out}")
        return
    final = evaluate(model, valid, procs, autocast)
    write_log(args, step=step, val_loss=final, final=True, seconds=time.time() - began)
    lines = [["model", "validation loss", "perplexity", "stored", "run per token"]]
    if donor:
        lines.append(["donor", *score(history["donor"], donor.num_params())])
    lines += [["converted" if donor else "start", *score(history["converted"], n)],
              ["uptrained" if donor else "trained", *score(final, n)]]
    print0(f"\n{steps - start} steps in {clock(time.time() - began)}; checkpoint in {args.out}\n{table(lines)}")
    if donor and history["converted"] > history["donor"]:
        won = (history["converted"] - final) / (history["converted"] - history["donor"])
        print0(f"{won:.0%} of what conversion cost is won back")


def score(loss: float, n: dict) -> list[str]:
    return [f"{loss:.4f}", f"{math.exp(min(loss, 700)):.2f}", f"{n['stored'] / 1e6:.2f} M", f"{n['run'] / 1e6:.2f} M"]


if __name__ == "__main__":
    script(main)
