"""What a run of train.py prints, and log.jsonl beside its checkpoint."""

import math
from pathlib import Path

from lib.cli import UserError, clock, is_main, print0, table
from lib.results import json_line, json_object
from lib.system import peak_memory


def write_log(out: str, **values) -> None:
    """Append a line to out/log.jsonl, on the first process. UserError if the disk is full."""
    if is_main():
        try:
            Path(out).mkdir(parents=True, exist_ok=True)     # if it was moved away, the run goes on in a new folder
            with open(Path(out) / "log.jsonl", "a") as f:
                f.write(json_line(values) + "\n")
        except OSError as e:
            raise UserError(f"cannot write {e.filename or 'log.jsonl'} ({e.strerror}); {out} holds the last "
                            f"checkpoint: make room, then go on with --resume --out={out}") from e


def drop_log_after(path: Path, step: int) -> None:
    """Remove the lines of steps after `step`, the final line, and lines that a crash cut short: the run that is
    resumed at `step` writes them again."""
    if is_main() and path.exists():
        lines = [(line, json_object(line)) for line in path.read_bytes().splitlines()]
        kept = b"".join(line + b"\n" for line, values in lines
                        if values and values.get("step", 0) <= step and "final" not in values)
        if kept != path.read_bytes():
            half = path.with_name(f".{path.name}")
            half.write_bytes(kept)
            half.replace(path)


def describe(run) -> str:
    """The line at the start of a run: the model, its sizes, the text and the devices."""
    args, c, n = run.args, run.model.config, run.model.num_params()
    return (f"{args.ckpt or args.init}: {c.n_layer} layers as {c.n_loop} x {c.n_unique}, rank {c.rank} | "
            f"parameters {n['stored'] / 1e6:.2f} M stored, {n['run'] / 1e6:.2f} M run per token | "
            f"{len(run.train_tokens):,} tokens to train on | "
            f"{run.procs.world} x {run.procs.device.type}{' bf16' * run.bf16}")


def log_step(run, objective: float, ce: list[float], lr: float, norm: float, seconds: float) -> None:
    """Print and log one step. ce: the cross entropy of each trained exit; seconds: those of a step."""
    args, speed = run.args, run.args.batch_tokens / seconds
    mfu = run.peak and speed * run.flops / run.peak          # model FLOPs utilisation; None where no peak is known
    print0(f"step {run.step}/{run.steps} | loss {ce[-1]:.4f}{by_exit(ce)}"
           f"{f' | with distillation {objective:.4f}' if run.teacher else ''} | lr {lr:.1e} | "
           f"{seconds * 1000:.0f} ms | {speed:,.0f} tok/s{f' | mfu {mfu:.0%}' if mfu else ''} | "
           f"eta {clock(seconds * (run.steps - run.step))}")
    write_log(args.out, step=run.step, loss=ce[-1], exit_loss=ce, objective=objective, lr=lr, grad_norm=norm,
              tokens_per_s=speed, mfu=mfu, peak_gib=peak_memory(run.procs.device), skipped=run.history["skipped"],
              tokens=run.step * args.batch_tokens)


def by_exit(losses: list[float]) -> str:
    """The losses of all exits but the last, in brackets; empty if only the last is trained."""
    return f" (exits {' '.join(f'{x:.4f}' for x in losses[:-1])})" if len(losses) > 1 else ""


def summary(run, final: float, seconds: float) -> str:
    """The closing table of validation losses, and what a reader must know about it. final: that of the run's end."""
    history, n = run.history, run.model.num_params()
    rows = [["model", "validation loss", "perplexity", "stored", "run per token"]]
    if run.donor:
        rows.append(["donor", *loss_cells(history["donor"], run.donor.num_params())])
    converted = run.donor and run.args.init != "random" and not history.get("trained_before")
    rows += [["converted" if converted else "start", *loss_cells(history["converted"], n)],
             ["uptrained" if converted else "trained", *loss_cells(final, n)]]
    lines = [f"\n{run.steps} steps, {clock(seconds)}, peak memory {peak_memory(run.procs.device):.1f} GiB; checkpoint "
             f"in {run.args.out}", table(rows)]
    if history["skipped"]:
        lines.append(f"steps skipped because the loss or gradient was not finite: {history['skipped']}")
    if history.get("bf16", run.bf16) != run.bf16:
        lines.append("the last row is measured in another precision than the rows above: the run was resumed with "
                     "another --dtype or device")
    if converted and history["converted"] > history["donor"]:
        won = (history["converted"] - final) / (history["converted"] - history["donor"])
        lines.append(f"{won:.0%} of what conversion cost is won back")
    return "\n".join(lines)


def loss_cells(loss: float, n: dict) -> list[str]:
    """The cells of a row: loss, perplexity, parameters stored and run per token."""
    return [f"{loss:.4f}", f"{math.exp(min(loss, 700)):.2f}", f"{n['stored'] / 1e6:.2f} M", f"{n['run'] / 1e6:.2f} M"]
