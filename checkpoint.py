"""A run's state on the disk, so that a crash, a kill, a full disk or a damaged file loses minutes at most.

A run's folder is a checkpoint (config.json, model.safetensors, the tokenizer) with `train.pt` beside it: optimizer,
step, settings, and the sums of the other files. The one saved before stays in its folder `previous`.
"""

import json
import os
import shutil
import zipfile
import zlib
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer

from model import RecursiveTransformer
from runtime import UserError, beside, is_main, parse_args, print0, recover_folder, replace_folder
from tokenizer import copy_tokenizer


def save_checkpoint(out: str, model: RecursiveTransformer, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Replace the folder `out`, whose former content moves to out/previous. All processes call, the first one writes.

    state: what the run must know to go on; its "tokenizer" names the folder whose tokenizer goes along. UserError if
    the disk is full; the folder is then as it was.
    """
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        optimizer.consolidate_state_dict(to=0)               # a step for all: each holds the state of its own share
    if is_main():
        with replace_folder(out, keep="previous") as tmp:
            model.write(tmp)
            copy_tokenizer(state["tokenizer"], tmp)
            sums = {path.name: checksum(path) for path in tmp.iterdir()}
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
    """What save_checkpoint was given, and "optimizer". Raises UserError if there is none or anything is damaged."""
    path = Path(folder) / "train.pt"
    if not path.exists():
        raise UserError(f"nothing to resume: {path} does not exist; start without --resume, or name the run with --out")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:                                   # torch raises whatever its unpickler met
        raise UserError(f"{path} is damaged ({str(e).splitlines()[0]})") from None


def check_whole(folder) -> None:
    """Raise UserError unless every file of the checkpoint in `folder` is as it was written."""
    folder = Path(folder)
    sums = load_state(folder)["sums"]
    try:
        with zipfile.ZipFile(folder / "train.pt") as f:      # torch's format; it does not look at the sums itself
            bad = f.testzip()
        wrong = ["train.pt"] if bad else [name for name, was in sums.items() if checksum(folder / name) != was]
    except (OSError, zipfile.BadZipFile, zlib.error) as e:
        raise UserError(f"{folder} is damaged ({e})") from None
    if wrong:
        raise UserError(f"{folder} is damaged: {', '.join(wrong)} is not as it was written")


def newest_whole(out: str) -> None:
    """See to it that `out`, if a run ever saved there, holds a whole checkpoint: where the newest is damaged, the
    previous one takes its place. Raises UserError if that is damaged as well."""
    recover_folder(out)
    out = Path(out)
    if not (out / "train.pt").exists() and not (out / "previous").exists():
        return
    try:
        return check_whole(out)
    except UserError as e:
        if not (out / "previous").exists():
            raise UserError(f"{e}, and there is no checkpoint before it; start anew with another --out") from None
        print0(f"{e}: going back to the checkpoint before it")
    check_whole(out / "previous")
    old = beside(out, ".old")                                # a crash here is mended by recover_folder: both are in old
    shutil.rmtree(old, ignore_errors=True)
    out.rename(old)
    with suppress(FileNotFoundError):                        # its end is cut off when the run goes on
        shutil.copy2(old / "log.jsonl", old / "previous" / "log.jsonl")
    (old / "previous").rename(out)
    shutil.rmtree(old)


def find_state(out: str, resume: Literal["no", "yes", "auto"]) -> dict | None:
    """The state of the run in `out` that is to go on, None to start anew; the first process sees to it that it is
    whole. Raises UserError if "yes" finds nothing, or if nothing is whole."""
    if resume == "no":
        return None
    path = Path(out) / "train.pt"
    if is_main():
        if resume == "auto":
            newest_whole(out)
        elif path.exists():
            try:
                check_whole(out)
            except UserError as e:
                raise UserError(f"{e}; --resume=auto goes back to the checkpoint before it") from None
    if dist.is_initialized():
        dist.barrier()
    return None if resume == "auto" and not path.exists() else load_state(out)


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
    """Forget what was logged after the checkpoint that the run goes on from, and how it ended if it was at its end."""
    if is_main() and path.exists():
        kept = 0
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"}\n") or (values := json.loads(line))["step"] > step or "final" in values:
                break                                        # a crash may have cut the last one short
            kept += len(line)
        os.truncate(path, kept)


def write_log(out: str, **values) -> None:
    """Add a line to out/log.jsonl. Raises UserError if the disk is full."""
    if is_main():
        try:
            with open(Path(out) / "log.jsonl", "a") as f:
                f.write(json.dumps(values) + "\n")
        except OSError as e:
            raise UserError(f"cannot write {e.filename or 'log.jsonl'} ({e.strerror}); {out} holds the last "
                            f"checkpoint: make room, then go on with --resume --out={out}") from e
