"""What every script shares: command line, errors, process group, printing, and folders that are replaced whole."""

import argparse
import inspect
import json
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, Union, get_args, get_origin, get_type_hints

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm


class UserError(ValueError):
    """A mistake in what was given. The message says what was given, what is allowed and what to do; no traceback."""


# ---------------------------------------------------------------------------------------------------------------------
# Command line: a dataclass is the settings, the defaults and the help

def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")
    return text.lower() == "true"


def integer(text: str) -> int:
    """An int, also one spelled 15e9. Raises ValueError for 1.5."""
    try:
        return int(text)
    except ValueError:
        if not float(text).is_integer():                     # nor are inf and nan
            raise
        return int(float(text))


integer.__name__ = "int"                                     # argparse names it in "invalid int value: '1.5'"


def parse_args(cls, argv=None, defaults=None):
    """An instance of the dataclass `cls`, filled from `--field=value` flags, and from `defaults` where there is none.

    The comment that ends a field's line is its --help text, so a script's settings are written
    once and read three times: in the source, in --help and in the checkpoint.
    """
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(cls), re.M))
    parser = argparse.ArgumentParser(
        description=sys.modules[cls.__module__].__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    hints = get_type_hints(cls)
    for f in fields(cls):
        kind, text = hints[f.name], comments.get(f.name, "").replace("%", "%%")
        if get_origin(kind) in (Union, types.UnionType):  # `int | None`: the flag takes an int
            kind = get_args(kind)[0]
        value = getattr(defaults, f.name) if defaults else f.default
        shown = str(value).replace("%", "%%") if value not in (None, "") else "not set"
        options = {"default": value, "help": f"{text} [{shown}]"}
        if kind is bool:
            options |= {"type": boolean, "nargs": "?", "const": True, "metavar": "True|False"}
        elif get_origin(kind) is Literal:
            options |= {"choices": get_args(kind)}
            if "yes" in get_args(kind):  # a switch with more than two positions may be given bare
                options |= {"nargs": "?", "const": "yes"}
        else:
            options |= {"type": integer if kind is int else kind, "metavar": kind.__name__.upper()}
        parser.add_argument("--" + f.name, **options)
    return cls(**vars(parser.parse_args(argv)))


def script(main) -> None:
    """Run a script's `main()`: a UserError ends it with one clear line and exit code 2, Ctrl-C with 130."""
    try:
        main()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    else:
        code = 0
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


# ---------------------------------------------------------------------------------------------------------------------
# Processes, devices, printing

@dataclass
class Processes:
    rank: int            # this process, 0 .. world - 1
    world: int           # how many there are
    device: torch.device


def start_processes(device: str = "auto") -> Processes:
    """Join the group that torchrun made, if it did; pick this process' device (nccl on GPUs, gloo on CPUs)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local, here = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.is_available() and device in ("auto", "cuda"):
        if here > torch.cuda.device_count():
            raise UserError(f"{here} processes on this machine but {torch.cuda.device_count()} GPUs; "
                            f"use --nproc_per_node={torch.cuda.device_count()}, or --device=cpu")
        device = f"cuda:{local}"
    elif world > 1 and device.startswith("cuda:"):
        raise UserError(f"--device={device} would put all {world} processes on one GPU; use --device=cuda")
    chosen = pick_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world > 1:
        # torchrun's store outlives its restarts, and with it the addresses of processes that died: each attempt gets
        # its own corner. (Nodes may count attempts differently: several need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "") if here == world else ""
        store = dist.PrefixStore(f"attempt {attempt}", next(dist.rendezvous("env://", rank, world))[0])
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", store=store, rank=rank, world_size=world,
                                device_id=chosen if chosen.type == "cuda" else None)
        if chosen.type == "cpu" and os.environ.get("OMP_NUM_THREADS", "1") == "1":  # torchrun's cautious default
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // here))
    return Processes(rank, world, chosen)


def pick_device(device: str = "auto") -> torch.device:
    """The named device, or with "auto" the GPU if there is one. Raises UserError for a device that is not here."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device={device} cannot be used here ({str(e).splitlines()[0]}); "
                        "use auto, cpu or cuda") from None
    return chosen


def is_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def print0(*args) -> None:
    if is_main():
        print(*args, flush=True)


def progress(items=None, **options):
    """tqdm over bounded, otherwise silent work; off where nobody watches (not a terminal, or not the first process)."""
    return tqdm(items, dynamic_ncols=True, leave=False, disable=not (is_main() and sys.stderr.isatty()), **options)


def table(rows: list[list]) -> str:
    """Rows of cells as aligned text, the first row the header; numbers to the right, words to the left."""
    cells = [[str(c) for c in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]

    def line(row):
        return "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
    return "\n".join([line(cells[0]), "  ".join("-" * w for w in widths), *map(line, cells[1:])])


def clock(seconds: float) -> str:
    return f"{seconds:.0f}s" if seconds < 90 else f"{seconds / 60:.0f}m" if seconds < 5400 else f"{seconds / 3600:.1f}h"


# Dense bf16 TFLOP/s from the makers' data sheets, by words of torch.cuda.get_device_name(); the first match counts.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200 NVL": 835, "H200": 989, "GH200": 989,
               "B200": 2250, "A100": 312, "A800": 312, "H800": 989, "L40S": 362, "L40": 181, "L4": 121, "A10": 125,
               "A6000": 155, "4090": 165, "3090": 71}


def peak_flops(device: torch.device, bf16: bool) -> float | None:
    """FLOP/s that this process could reach in matrix products: a GPU's bf16 peak by its name, a CPU's as measured now.
    None where nothing is known."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if not bf16 or re.search(r"\b(MIG|Laptop)\b", name):  # a slice of that GPU, or a smaller one of its name
            return None
        return next((peak * 1e12 for words, peak in PEAK_TFLOPS.items() if re.search(rf"\b{words}\b", name)), None)
    if device.type != "cpu":
        return None
    a = torch.randn(1024, 1024, dtype=torch.bfloat16 if bf16 else torch.float32)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - began)
    return 2 * 1024**3 / min(seconds)


def peak_memory(device: torch.device) -> float:
    """GiB: the most that tensors took on a GPU, or that this process took of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")  # on Linux; ru_maxrss there starts at what the process had that started this one
    if status.exists() and (kilobytes := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(kilobytes[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def run_info() -> dict:
    """Where a figure was measured: hardware, versions, commit."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True,
                         text=True)
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = next((line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")), "")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu or platform.processor(), "gpu": gpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "python": platform.python_version(), "torch": torch.__version__, "commit": git.stdout.strip() or None,
            "time": time.strftime("%F %T")}


def json_line(numbers: dict) -> str:
    """A line of JSON; null for NaN and infinities, which JSON does not have and strict readers refuse."""
    return json.dumps(json.loads(json.dumps(numbers), parse_constant=lambda _: None))


def check_writable(name: str, path: str | None) -> None:
    """Raise UserError if the file that --name gives, if it does, could not be written when the work is done."""
    there = path and Path(path)
    if there and (there.is_dir() or not os.access(there if there.exists() else there.parent, os.W_OK)):
        raise UserError(f"--{name}={path} cannot be written: give a file in a folder that is there")


def check_plot(path: str | None) -> None:
    """Raise UserError, before minutes of work, if --plot, where it is given, could not be drawn or written."""
    if not path:
        return
    check_writable("plot", path)
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise UserError('--plot needs matplotlib: pip install -e ".[plot]"') from None
    if Path(path).suffix[1:].lower() not in FigureCanvasBase.filetypes:
        raise UserError(f"--plot={path}: give a file that ends in .png, .svg or .pdf")


def read_lines(path) -> list[dict]:
    """The JSON objects of a .jsonl file; none where there is no file. Blank lines are skipped, and a last line that a
    kill cut short is left out and named on stderr. Raises UserError for any other line that is not a JSON object."""
    found = []
    try:
        lines = Path(path).read_bytes().split(b"\n") if Path(path).exists() else []
    except OSError as e:
        raise UserError(f"cannot read {path} ({e.strerror})") from None
    for number, line in enumerate(lines, 1):
        values = json_object(line)
        if values is not None:
            found.append(values)
        elif line.strip() and number == len(lines):
            print(f"{path}: line {number} was cut short and is left out", file=sys.stderr)
        elif line.strip():
            raise UserError(f"{path}, line {number}, is damaged: {line[:60]!r} is not a JSON object; mend the line or "
                            "delete it")
    return found


def json_object(line: bytes) -> dict | None:
    """The JSON object that a line holds; None where it is none, or only a part."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) else None


def append_line(path: str, numbers: dict) -> None:
    """Add `json_line` to the file, on a line of its own. Raises UserError where it cannot be written."""
    try:
        if Path(path).is_file():                             # what a kill cut short is dropped, else it would stay in
            with open(path, "rb+") as f:                     # the middle
                rest = f.read().rpartition(b"\n")[-1]
                if rest.startswith(b"{") and json_object(rest) is None:
                    f.truncate(f.tell() - len(rest))
                elif rest:
                    f.write(b"\n")
        with open(path, "a") as f:
            f.write(json_line(numbers) + "\n")
    except OSError as e:
        raise UserError(f"cannot write {path} ({e.strerror}); what was measured stands above") from e


class StopFlag:
    """Ctrl-C or SIGTERM on any process ends the run after the current step, with a checkpoint."""

    def __init__(self):
        self.asked = False

    def __enter__(self):
        self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, *_):
        if not self.asked:  # torchrun passes Ctrl-C on a second time: repeats mean nothing
            print0("stopping after this step")
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


# ---------------------------------------------------------------------------------------------------------------------
# Folders that are replaced whole

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.tiktoken", "tokenizer.model", "tokenizer_config.json",
                   "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt",
                   "chat_template.jinja", "chat_template.json", "additional_chat_templates", "generation_config.json")
GATE_FILE, THRESHOLDS_FILE = "gate.safetensors", "exits.json"  # made for the weights beside them (rules.py)


@contextmanager
def replace_folder(folder, keep: str | None = None):
    """Yield a temporary folder that becomes `folder` when the block ends; on an error `folder` stays as it was.

    A crash at any moment leaves the old folder or the new one: everything is written to `.folder.tmp`, flushed to the
    disk, and renamed. Between the two renames the old one is called `.folder.old`, which `recover_folder` puts back.
    What the block did not write (a log, a folder inside) is carried over, but nothing of an old tokenizer beside a new,
    and no gate of other weights.
    keep: the name under which the old folder then stays inside the new one, instead of being deleted.
    """
    check_out(folder)
    folder = Path(folder).resolve()  # where a link points to is replaced, not the link
    tmp, old = beside(folder, ".tmp"), beside(folder, ".old")
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        tmp.mkdir(parents=True)
        yield tmp
        if folder.exists():
            new = {path.name for path in tmp.iterdir()}
            stale = {"train.pt", "previous", GATE_FILE, THRESHOLDS_FILE,
                     *(TOKENIZER_FILES if new & set(TOKENIZER_FILES) else ())}
            for path in folder.iterdir():
                if path.name in new | stale:
                    continue
                if path.is_dir() and not path.is_symlink():  # perhaps another run: its files are linked, not copied
                    shutil.copytree(path, tmp / path.name, symlinks=True, copy_function=os.link)
                else:
                    shutil.copy2(path, tmp, follow_symlinks=False)
        for path in (*filter(Path.exists, tmp.iterdir()), tmp):
            if path.is_file():
                path.chmod(tmp.stat().st_mode & 0o666)  # safetensors makes its files readable by their owner alone
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        tmp.rename(folder)
    except BaseException as e:
        recover_folder(folder)
        shutil.rmtree(tmp, ignore_errors=True)
        if isinstance(e, (OSError, SafetensorError)):
            reason = getattr(e, "strerror", None) or e
            raise UserError(f"cannot write {folder}: {reason}; what was there before is untouched") from e
        raise
    if keep and (old / "train.pt").exists():  # not an empty folder, which could not be gone back to
        with suppress(FileNotFoundError):  # a reader's recover_folder was faster
            put_inside(old, folder / keep)
    shutil.rmtree(old, ignore_errors=True)


def put_inside(old: Path, kept: Path) -> None:
    """Move the folder that was replaced into its successor, without what it kept inside itself."""
    shutil.rmtree(old / kept.name, ignore_errors=True)
    old.rename(kept)


def beside(folder: Path, suffix: str) -> Path:
    folder = folder.resolve()
    return folder.with_name(f".{folder.name}{suffix}")  # hidden: `mv out out.old` is what people do by hand


def recover_folder(folder) -> None:
    """Finish a replacement that was killed between its renames."""
    folder = Path(folder).resolve()
    old = beside(folder, ".old")
    with suppress(FileNotFoundError):  # another process of this run was faster
        if not folder.exists() and old.exists():
            old.rename(folder)
        elif all((f / "train.pt").exists() for f in (old, folder)) and not (folder / "previous").exists():
            put_inside(old, folder / "previous")


def check_out(folder) -> None:
    """Raise UserError if `folder` holds anything that is not a checkpoint, so that nobody's files are replaced."""
    recover_folder(folder)
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; --out needs a folder that is new, empty or a checkpoint")
    damaged = (folder / "train.pt").exists() and is_ours(folder / "previous")  # what --resume=auto mends
    if folder.exists() and any(folder.iterdir()) and not is_ours(folder) and not damaged:
        held = ", ".join(sorted(p.name for p in folder.iterdir())[:3])
        raise UserError(f"{folder} holds something that is not a checkpoint of this project ({held}); "
                        "give a folder that is new, empty or such a checkpoint")


def is_ours(folder: Path) -> bool:
    """True if this project wrote the checkpoint in `folder`: its own kind, or an export to Hugging Face's."""
    try:
        config = json.loads((folder / "config.json").read_text())
        return "nanoRRT" in (config.get("format"), config.get("exported_by"))
    except (OSError, ValueError, AttributeError):
        return False
