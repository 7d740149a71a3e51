"""Save and resume a run, so that a crash, a kill, a full disk or a damaged file costs minutes at most.

A run's folder is a checkpoint (config.json, model.safetensors, the tokenizer) with `train.pt` beside it: the state of
the optimizer, the step, the settings, and checksums of the other files. The checkpoint before it is kept in the
subfolder `previous`.
"""

import shutil
import zipfile
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from lib.cli import UserError, is_main, parse_args, print0
from lib.folders import replace_folder, settled
from lib.system import on_first


def save_checkpoint(out: str, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict,
                    files: dict[str, bytes]) -> None:
    """Replace the checkpoint in `out`; the old one is kept in out/previous. All processes call, the first one writes.

    state: what else is needed to resume; files: by name, the donor's tokenizer and licence. UserError if the disk is
    full; the folder is then unchanged.
    """
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        optimizer.consolidate_state_dict(to=0)               # a collective: each process holds a share of the state
    if is_main():
        with replace_folder(out, keep=True) as tmp:
            model.write(tmp)
            for name, content in files.items():
                (tmp / name).parent.mkdir(exist_ok=True)
                (tmp / name).write_bytes(content)
            sums = {str(path.relative_to(tmp)): checksum(path) for path in tmp.rglob("*") if path.is_file()}
            try:
                torch.save(state | {"sums": sums, "optimizer": optimizer.state_dict()}, tmp / "train.pt")
            except RuntimeError as e:                        # so torch reports a full disk
                raise OSError(f"train.pt: {e} (is the disk full?)") from e
    if dist.is_initialized():
        dist.barrier()


def checksum(path: Path) -> list[int]:
    """[bytes, CRC-32] of a file, which reveal disk errors and truncated copies."""
    crc = 0
    with open(path, "rb") as f:
        while block := f.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return [path.stat().st_size, crc]


def load_state(folder) -> dict:
    """The `state` given to save_checkpoint, with "sums" (checksums) and "optimizer". UserError if it is missing or
    damaged."""
    path = settled(folder) / "train.pt"
    if not path.exists():
        raise UserError(f"nothing to resume: {path} does not exist; start without --resume, or name the run with --out")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:                                   # unpickling may raise anything
        raise UserError(f"{path} is damaged ({str(e).splitlines()[0]})") from None
    if "sums" not in state:
        raise UserError(f"{path} is another version's; start a new run from its weights with --ckpt={folder}")
    return state


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load the state of an optimizer, which may have been saved with or without ZeRO, by any number of processes."""
    optimizer.load_state_dict(state)
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        optimizer.state.clear()                              # a second copy of its share: `optim` is what steps
        optimizer = optimizer.optim
        optimizer.load_state_dict(optimizer.state_dict())    # moves "step" to the GPU, as fused AdamW needs
    for moments in optimizer.state.values():                 # on a CPU still mapped from train.pt, which is to go
        moments.update({name: x.clone() for name, x in moments.items()})


def check_whole(folder) -> dict:
    """The state of the checkpoint in `folder`. UserError unless all its files match their checksums."""
    folder = Path(folder)
    try:
        with zipfile.ZipFile(folder / "train.pt") as f:      # torch.load does not verify the zip file's checksums
            bad = f.testzip()
    except FileNotFoundError:
        raise UserError(f"{folder} is damaged: train.pt is missing") from None
    except Exception as e:                                   # a damaged zip file may raise anything
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
    """True if `out` holds a run; its newest checkpoint is then undamaged: if need be, the previous one has replaced
    it. UserError if both are damaged."""
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
        with replace_folder(out) as tmp:                     # a copy: a kill at any moment leaves `previous` intact
            for name in [*state["sums"], "train.pt"]:
                (tmp / name).parent.mkdir(exist_ok=True)
                shutil.copy2(previous / name, tmp / name)
        shutil.rmtree(previous)
    return True


def find_state(out: str, resume: Literal["no", "yes", "auto"]) -> dict | None:
    """The state of the run in `out` to resume, or None to start a new run. The first process checks its files; "auto"
    goes back to the previous checkpoint if the newest is damaged. UserError, on all processes, if "yes" finds no run or
    a damaged one, or if "auto" finds both damaged."""
    newest, previous = Path(out) / "train.pt", Path(out) / "previous" / "train.pt"

    def look() -> bool:
        try:
            if resume == "auto":
                return newest_whole(out)
            if resume == "yes" and (newest.exists() or previous.exists()):
                check_whole(out)                             # if there is none, load_state says so
            return resume == "yes"
        except UserError as e:
            hint = "; --resume=auto goes back to the checkpoint before it" * (resume == "yes" and previous.exists())
            raise UserError(f"{e}{hint}") from None
    return load_state(out) if on_first(look) else None


# ---------------------------------------------------------------------------------------------------------------------
# A resumed run is the same run

# What may change when a run is resumed: the places of its files, how it runs and reports, and its length (which
# stretches the schedule of the learning rate).
MAY_CHANGE = {"out", "resume", "tokens", "eval_every", "eval_tokens", "save_every", "log_every", "micro_batch",
              "device", "dtype", "compile", "checkpointing", "zero", "skip_nonfinite", "donor", "teacher", "data",
              "valid"}


def resumed_settings(argv, given, state: dict):
    """The settings of the resumed run, changed by the flags of the command line `argv`; `given` is what they parse to.

    UserError if a setting differs that is not in MAY_CHANGE, or if the run has done more steps than are asked for.
    """
    renamed = getattr(given, "RENAMED", {})
    saved = type(given)(**{renamed.get(name, name): value for name, value in state["args"].items()})
    kept = parse_args(type(given), argv, defaults=saved)
    clash = [f"--{name}={value} (the run has {getattr(saved, name)})" for name, value in asdict(kept).items()
             if value != getattr(saved, name) and name not in MAY_CHANGE]
    if clash:
        raise UserError(f"--resume continues the run in {given.out} as it was, but {', '.join(clash)} was given; "
                        f"drop the flag, or start a new run from it with --ckpt={given.out} and another --out")
    steps = kept.tokens // kept.batch_tokens
    if steps < state["step"]:
        raise UserError(f"--tokens={kept.tokens} is {steps} steps, but the run in {given.out} has done "
                        f"{state['step']}; ask for at least --tokens={state['step'] * kept.batch_tokens}")
    return replace(kept, resume=given.resume, out=given.out, device=given.device)  # folder and hardware are today's


def check_donor(args, history: dict, architecture: dict, tokenizer) -> None:
    """Raise UserError if the donor has another architecture or tokenizer than when the run started."""
    before = history["donor_config"]
    changed = ", ".join(f"{k}={v} (was {before.get(k)})" for k, v in architecture.items() if v != before.get(k, v))
    if changed or history["tokenizer_hash"] not in tokenizer.hashes:
        raise UserError(f"the donor {args.donor} is of another architecture or tokenizer than when the run in "
                        f"{args.out} started: {changed or 'tokenizer'}; resume with the donor it was made from")


def check_inputs(args, history: dict, inputs: dict) -> None:
    """Raise UserError if a text, the donor or the teacher differs from those the run started with, even under the same
    name: the run would see other data, and its losses could not be compared. A new run records them in its history.

    inputs: {setting: tokens, or model, or None}.
    """
    now = {name: identify_weights(x) if isinstance(x, nn.Module) else identify(x)
           for name, x in inputs.items() if x is not None}
    before = history.setdefault("inputs", now)
    changed = [f"--{name}={getattr(args, name)}" for name in now.keys() | before.keys()
               if now.get(name) != before.get(name)]
    if changed:
        raise UserError(f"{', '.join(sorted(changed))}: the content differs from what the run in {args.out} began "
                        f"with; give the former, or start a new run with --ckpt={args.out} and another --out")


def identify(tokens) -> list[int]:
    """[number of tokens, CRC-32] of a text: of all tokens, or of 1,024 evenly spaced pieces."""
    n, crc, size = len(tokens), 0, 256
    for start in (*range(0, n, max(size, n // 1024)), max(0, n - size)):
        crc = zlib.crc32(np.ascontiguousarray(tokens[start:start + size]), crc)
    return [n, crc]


def identify_weights(model: nn.Module) -> list[int]:
    """[number of weights, CRC-32] of a model: of all or at least 4,096 weights of each tensor."""
    crc = 0
    for p in model.parameters():
        some = p.detach().flatten()[::max(1, p.numel() // 4096)]
        crc = zlib.crc32(some.float().cpu().contiguous().numpy(), crc)
    return [sum(p.numel() for p in model.parameters()), crc]
