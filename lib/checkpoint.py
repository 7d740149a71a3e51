"""A run's state on the disk, so that a crash, a kill, a full disk or a damaged file loses minutes at most.

A run's folder is a checkpoint (config.json, model.safetensors, the tokenizer) with `train.pt` beside it: optimizer,
step, settings, and the sums of the other files. The one saved before stays in its folder `previous`.
"""

import shutil
import zipfile
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from lib.cli import UserError, is_main, parse_args, print0
from lib.folders import replace_folder, settled
from lib.results import json_line, json_object
from lib.system import on_first


def save_checkpoint(out: str, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict,
                    files: dict[str, bytes]) -> None:
    """Replace the checkpoint in `out`, which stays in out/previous. All processes call, the first one writes.

    state: what the run must know to go on; files: by name, what goes along from the donor (its tokenizer, its
    licence). UserError if the disk is full; the folder is then as it was.
    """
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        optimizer.consolidate_state_dict(to=0)               # a step for all: each holds the state of its own share
    if is_main():
        with replace_folder(out, keep=True) as tmp:
            model.write(tmp)
            for name, content in files.items():
                (tmp / name).parent.mkdir(exist_ok=True)
                (tmp / name).write_bytes(content)
            sums = {str(path.relative_to(tmp)): checksum(path) for path in tmp.rglob("*") if path.is_file()}
            try:
                torch.save(state | {"sums": sums, "optimizer": optimizer.state_dict()}, tmp / "train.pt")
            except RuntimeError as e:                        # what torch makes of a full disk
                raise OSError(f"train.pt: {e} (is the disk full?)") from e
    if dist.is_initialized():
        dist.barrier()


def checksum(path: Path) -> list[int]:
    """[bytes, CRC-32] of a file: enough to notice a disk's errors and a copy cut short."""
    crc = 0
    with open(path, "rb") as f:
        while block := f.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return [path.stat().st_size, crc]


def load_state(folder) -> dict:
    """What save_checkpoint was given, "sums" and "optimizer". UserError if there is none or it is damaged."""
    path = settled(folder) / "train.pt"
    if not path.exists():
        raise UserError(f"nothing to resume: {path} does not exist; start without --resume, or name the run with --out")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:                                   # torch raises whatever its unpickler met
        raise UserError(f"{path} is damaged ({str(e).splitlines()[0]})") from None
    if "sums" not in state:
        raise UserError(f"{path} is another version's; start a new run from its weights with --ckpt={folder}")
    return state


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    optimizer.load_state_dict(state)
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        optimizer.state.clear()                              # it holds its share twice now; `optim` is what it steps
        optimizer.optim.load_state_dict(optimizer.optim.state_dict())  # its "step" is on the CPU: fused needs a GPU's


def check_whole(folder) -> dict:
    """The state of the checkpoint in `folder`. Raises UserError unless every file of it is as it was written."""
    folder = Path(folder)
    try:
        with zipfile.ZipFile(folder / "train.pt") as f:      # torch's format; it does not look at the sums itself
            bad = f.testzip()
    except FileNotFoundError:
        raise UserError(f"{folder} is damaged: train.pt is missing") from None
    except Exception as e:                                   # zipfile, too, raises whatever it met
        raise UserError(f"{folder} is damaged: train.pt ({e})") from None
    wrong = ["train.pt"] if bad else []
    state = {} if bad else load_state(folder)
    for name, was in state.get("sums", {}).items():
        try:
            wrong += [name] * (checksum(folder / name) != was)
        except OSError as e:
            wrong += [f"{name} ({e.strerror})"]
    if wrong:
        raise UserError(f"{folder} is damaged: {', '.join(wrong)} not as written")
    return state


def newest_whole(out: str) -> bool:
    """True if a run ever saved in `out`; a whole checkpoint is there then: where the newest is damaged, the previous
    one takes its place. Raises UserError if that is damaged as well."""
    newest, previous = Path(out), Path(out) / "previous"
    if not (newest / "train.pt").exists() and not (previous / "train.pt").exists():
        return False
    try:
        check_whole(newest)
    except UserError as e:
        if not previous.exists():
            raise UserError(f"{e}, and there is no checkpoint before it; start anew with another --out") from None
        try:
            state = check_whole(previous)
        except UserError as e2:
            raise UserError(f"{e}, and the one before it too: {e2}; start anew with another --out") from None
        print0(f"{e}: going back to the checkpoint before it, of step {state['step']}")
        with replace_folder(out) as tmp:                     # a copy: killed at any moment, the previous one is there
            for name in [*state["sums"], "train.pt"]:
                (tmp / name).parent.mkdir(exist_ok=True)
                shutil.copy2(previous / name, tmp)
        shutil.rmtree(previous)
    return True


def find_state(out: str, resume: Literal["no", "yes", "auto"]) -> dict | None:
    """The state of the run in `out` that is to go on, None to start anew; the first process sees to it that it is
    whole. Raises UserError, on all processes, if "yes" finds nothing, or if nothing is whole."""
    newest, previous = Path(out) / "train.pt", Path(out) / "previous" / "train.pt"

    def look() -> bool:
        try:
            if resume == "auto":
                return newest_whole(out)
            if resume == "yes" and (newest.exists() or previous.exists()):
                check_whole(out)
            return resume == "yes"
        except UserError as e:
            hint = "; --resume=auto goes back to the checkpoint before it" * (resume == "yes" and previous.exists())
            raise UserError(f"{e}{hint}") from None
    return load_state(out) if on_first(look) else None


def resumed_settings(argv, given, state: dict, may_change: set[str]):
    """The settings of the run that is resumed, with the flags `given` now (argv, parsed into the settings' class).

    Raises UserError if they would make another run of it: if one changes that is not in `may_change`.
    """
    saved = type(given)(**state["args"])
    kept = parse_args(type(given), argv, defaults=saved)
    clash = [f"--{name}={value} (the run has {getattr(saved, name)})" for name, value in asdict(kept).items()
             if value != getattr(saved, name) and name not in may_change]
    if clash:
        raise UserError(f"--resume continues the run in {given.out} as it was, but {', '.join(clash)} was given; "
                        f"drop the flag, or start a new run from it with --ckpt={given.out} and another --out")
    return replace(kept, resume=given.resume, out=given.out, device=given.device)  # folder and hardware are today's


# ---------------------------------------------------------------------------------------------------------------------
# The log beside it

def drop_log_after(path: Path, step: int) -> None:
    """Forget what was logged after the checkpoint that the run goes on from, and how it ended if it was at its end;
    and lines that a crash cut short."""
    if is_main() and path.exists():
        lines = [(line, json_object(line)) for line in path.read_bytes().splitlines()]
        kept = b"".join(line + b"\n" for line, values in lines
                        if values and values.get("step", 0) <= step and "final" not in values)
        if kept != path.read_bytes():
            half = path.with_name(f".{path.name}")
            half.write_bytes(kept)
            half.replace(path)


def write_log(out: str, **values) -> None:
    """Add a line to out/log.jsonl. Raises UserError if the disk is full."""
    if is_main():
        try:
            Path(out).mkdir(parents=True, exist_ok=True)     # somebody moved it away: the run goes on in a new one
            with open(Path(out) / "log.jsonl", "a") as f:
                f.write(json_line(values) + "\n")
        except OSError as e:
            raise UserError(f"cannot write {e.filename or 'log.jsonl'} ({e.strerror}); {out} holds the last "
                            f"checkpoint: make room, then go on with --resume --out={out}") from e
