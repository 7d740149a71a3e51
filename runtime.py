"""What every script shares: command line, errors, process group, printing, and folders that are replaced whole."""

import argparse
import fcntl
import inspect
import io
import json
import os
import platform
import re
import resource
import shutil
import signal
import socket
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


def at_home(text: str) -> str:
    """The text with ~ at the start of each part between commas replaced by the home folder: behind a "=" no shell does
    that."""
    return ",".join(map(os.path.expanduser, text.split(",")))


def filled(text: str) -> str:
    """`at_home` of a text that is not empty, as an unset variable of a shell would make it: that is not "not given"."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a value, got an empty one; give one, or leave the flag out")
    return at_home(text)


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
            if kind is str and f.name != "prompt":           # which may be empty, or begin with ~
                options["type"] = at_home if f.default == "" or "," in str(f.default) else filled  # lists check theirs
            else:
                options["type"] = integer if kind is int else kind
            options["metavar"] = kind.__name__.upper()
        parser.add_argument("--" + f.name, **options)
    settings = cls(**vars(parser.parse_args(argv)))
    if not 0 <= getattr(settings, "seed", 0) < 2**63:        # what both torch and numpy take
        raise UserError(f"--seed={settings.seed} must not be negative, and less than 2**63")
    return settings


def script(main) -> None:
    """Run a script's `main()` and exit with the code it returns. Without one: 0, or what `LOST` says. A UserError ends
    it with one clear line and 2, Ctrl-C with 130."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):             # what its encoding lacks must end nothing
            stream.reconfigure(errors="replace")
    says = ""
    try:
        code = main()
    except UserError as e:
        code, says = 2, f"error: {e}"
    except KeyboardInterrupt:
        code, says = 130, "interrupted"
    except SystemExit as e:
        code = e.code
    except OSError as e:
        if not isinstance(e, BrokenPipeError) and not output_lost("\n"):   # it may be any file's
            raise
        LOST.append(e)
        code = None
    output_lost()                                            # now: Python's own last flush would end in a traceback
    if code is None and LOST:
        code = 141 if isinstance(LOST[0], BrokenPipeError) else 2    # quietly, and as if by SIGPIPE; or a full disk
        says = "" if code == 141 else f"error: cannot write to standard output ({LOST[0].strerror})"
    if says:
        with suppress(OSError):
            print(says, file=sys.stderr, flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code or 0)


LOST: list[OSError] = []                                     # why standard output could not be written, if so


def output_lost(more: str = "") -> bool:
    """True if what was printed, and `more`, cannot be written (`| head`, a full disk, a closed terminal); from then on
    it goes nowhere."""
    try:
        if sys.stdout:                                       # None where it is closed
            sys.stdout.write(more)
            sys.stdout.flush()
        return False
    except OSError as e:
        LOST.append(e)
        with suppress(OSError):                              # a stream of a test has no number
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True


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
        try:
            store = dist.PrefixStore(f"attempt {attempt}", next(dist.rendezvous("env://", rank, world))[0])
        except (RuntimeError, ValueError) as e:              # the port is in use, MASTER_ADDR is missing or wrong
            raise UserError(f"the {world} processes cannot meet ({str(e).splitlines()[0]}); start them with torchrun, "
                            "or give them a free MASTER_PORT") from None
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


def check_compile(device: torch.device) -> None:
    """Raise UserError, before minutes of work, if torch.compile has not what it needs here."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as e:                                   # every backend raises its own
        why = next((line for line in reversed(str(e).splitlines()) if "Error" in line or "ompiler" in line), e)
        raise UserError(f"--compile does not work here ({str(why).strip()[:200]}): install a C++ compiler (on GPUs "
                        "Triton, too), or leave out --compile") from None


def is_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def print0(*args) -> None:
    """Report on the first process. A report that nobody can read ends no work: see `LOST`."""
    if is_main():
        try:
            print(*args)
        except OSError as e:
            LOST.append(e)
        output_lost()


def use_colour(stream) -> bool:
    """True if `stream` shows colours: a terminal, unless NO_COLOR is set (no-color.org) or it is a dumb one."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


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


def process_age() -> float:
    """Seconds since this process was started, which imports torch first; 0 where the system does not say."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])      # between boot and start
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return 0.0


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
    if not path:
        return
    try:
        new = not os.path.exists(path)
        if new or os.path.isfile(path) or os.path.isdir(path):       # not a pipe, which would wait for its reader
            open(path, "ab").close()                         # tried: modes do not tell of root or of a read-only disk
        if new:
            os.unlink(os.path.realpath(path))                # not a link that led to it
    except OSError as e:
        raise UserError(f"--{name}={path} cannot be written ({e.strerror}): give a file in a folder that is there and "
                        "may be written to") from None


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
    """Ctrl-C, SIGTERM or a closed terminal on any process ends the run after the current step, with a checkpoint."""

    def __init__(self):
        self.asked = 0                                       # the number of the signal

    def __enter__(self):
        self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
                       if signal.getsignal(s) != signal.SIG_IGN}     # nohup ignores the last, a shell's & the first
        return self

    def ask(self, number, _):
        if not self.asked:  # torchrun passes Ctrl-C on a second time: repeats mean nothing
            with suppress(RuntimeError):                     # in the midst of another print
                print0("stopping after this step")
        self.asked = number

    def __exit__(self, *_):
        for s, handler in self.before.items():
            signal.signal(s, handler)

    def agreed(self, procs: Processes) -> int:
        """0, or on all processes the signal that one of them was sent."""
        if procs.world == 1:
            return self.asked
        flag = torch.tensor(float(self.asked), device=procs.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return int(flag.item())


def on_first(work):
    """work()'s result on the first process, on all of them; as is its UserError: alone, it would leave others waiting.
    """
    result = [None]
    if is_main():
        try:
            result = [work()]
        except UserError as e:
            result = [e]
    if dist.is_initialized():
        dist.broadcast_object_list(result)
    if isinstance(result[0], UserError):
        raise result[0]
    return result[0]


# ---------------------------------------------------------------------------------------------------------------------
# Folders that are replaced whole

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.tiktoken", "tokenizer.model", "tokenizer_config.json",
                   "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt",
                   "chat_template.jinja", "chat_template.json", "additional_chat_templates", "generation_config.json")
GATE_FILE, THRESHOLDS_FILE = "gate.safetensors", "exits.json"  # made for the weights beside them (rules.py)


# Inside a folder: half written; whole but not in place; what becomes the folder previous, and was it; who owns it all.
NEW, NEXT, HALF, OLD, LOCK = ".new", ".next", ".previous", ".old", ".lock"


@contextmanager
def own_folder(folder):
    """Keep other processes from writing in `folder`, which is made if need be; its resolved path. UserError if another
    process owns it, and says which, or if nothing can be written there.

    The lock is the system's, on a file inside, and ends with its process, however that ends.
    """
    folder = Path(folder).resolve()                          # the place stays the same, whatever becomes of links
    if folder in OWNED:
        yield folder
        return
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; --out needs a folder that is new, empty or a checkpoint")
    made = []                                                # and removed again if nothing came to be in them
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        lock = take_lock(folder)
    except OSError as e:
        remove_empty(made)
        raise UserError(f"cannot write in {folder} ({e.strerror}); give a folder that may be written to") from None
    OWNED.add(folder)
    try:
        finish_replacement(folder)
        yield folder
    finally:
        OWNED.discard(folder)
        if same_file(lock, folder / LOCK):
            (folder / LOCK).unlink()
        os.close(lock)
        remove_empty(made)


OWNED: set[Path] = set()                                     # folders that this process owns


def take_lock(folder: Path) -> int:
    """The descriptor of the file whose lock this process now holds. UserError if another does."""
    for _ in range(100):
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(lock, 300, 0).decode(errors="replace") or "another process"
            os.close(lock)
            raise UserError(f"{owner} is writing in {folder}: wait until it ends, or give another --out") from None
        except OSError:                                      # a file system without locks: then without
            pass
        if same_file(lock, folder / LOCK):
            break
        os.close(lock)                                       # its owner has just removed it
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return lock


def same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):                                  # the first that holds something ends it
        for folder in folders:
            folder.rmdir()


@contextmanager
def replace_folder(folder, keep: bool = False):
    """Yield an empty folder; when the block ends, its files replace those in `folder`. On an error all stays as it was.

    A kill at any moment leaves all of the old files or all of the new: the new ones are written to the folder .new
    inside, flushed to the disk, and .new is renamed .next. From then on they count: `settled` finds them, and
    `finish_replacement` puts them in place, now or, after a kill, when the folder has an owner again. Nothing but the
    files inside is ever renamed, so that `folder` may be a mount point, or somebody's current folder. What the block
    did not write (a log, a folder inside) stays, but nothing of an old tokenizer beside a new, and no gate of other
    weights.
    keep: a run's checkpoint that is replaced stays in the folder previous inside.
    """
    with own_folder(folder) as folder:
        if not keep:                                         # a run did so when it began
            check_out(folder)
        new = folder / NEW
        try:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            yield new
            for path in (*new.iterdir(), new):
                if path.is_file():
                    path.chmod(new.stat().st_mode & 0o666)   # safetensors makes its files readable by their owner alone
                flush(path)
            if keep and (folder / "train.pt").exists():      # an empty folder could not be gone back to
                keep_files(folder)
            new.rename(folder / NEXT)
        except BaseException as e:
            shutil.rmtree(new, ignore_errors=True)
            if isinstance(e, (OSError, SafetensorError)):
                reason = getattr(e, "strerror", None) or e
                raise UserError(f"cannot write {folder}: {reason}; what was there before is untouched") from e
            raise
        try:
            finish_replacement(folder)
        except OSError as e:
            raise UserError(f"cannot finish {folder} ({e.strerror}): all of it is in {folder / NEXT}, and the next "
                            "command that writes there will finish it") from e


def keep_files(folder: Path) -> None:
    """Let folder/previous hold what `folder` does now: the same files under a second name, but a log, which grows."""
    half, kept, old = folder / HALF, folder / "previous", folder / OLD
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir()
    for path in folder.iterdir():
        if path.is_file() and not path.name.startswith("."):
            (shutil.copy2 if path.suffix == ".jsonl" else link)(path, half / path.name)
    flush(half)
    shutil.rmtree(old, ignore_errors=True)
    if kept.exists():
        kept.rename(old)
    half.rename(kept)
    shutil.rmtree(old, ignore_errors=True)


def finish_replacement(folder: Path) -> None:
    """Put the files of folder/.next, if there is one, in place; where a kill ended that before, again."""
    ready, new = folder / NEXT, folder / NEW
    if (folder / HALF).exists() and not (folder / "previous").exists():
        (folder / HALF).rename(folder / "previous")
    if not ready.exists():
        return
    names = {path.name for path in ready.iterdir()}
    stale = {GATE_FILE, THRESHOLDS_FILE, *(TOKENIZER_FILES if names & set(TOKENIZER_FILES) else ()),
             *(() if "train.pt" in names else ("train.pt", "previous"))} - names
    for path in (new, *(folder / name for name in stale)):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    for name in names:                                       # linked, not moved: .next stays whole to the end
        link(ready / name, new)
        os.replace(new, folder / name)
        new.unlink(missing_ok=True)                          # what was in place already is not even renamed
    flush(folder)
    ready.rename(new)
    shutil.rmtree(new, ignore_errors=True)


def link(path: Path, other: Path) -> None:
    """A second name for a file; a copy on file systems that know no such thing."""
    try:
        os.link(path, other, follow_symlinks=False)
    except OSError:
        other.unlink(missing_ok=True)
        shutil.copy2(path, other, follow_symlinks=False)


def flush(path: Path) -> None:
    """See to it that a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def settled(folder) -> Path:
    """Where to read the checkpoint in `folder`: there, or inside if a replacement was killed before its end. One that
    is being finished is waited for. A reader never writes: what it mended, the owner could be writing."""
    folder, tries = Path(folder), 50
    while (folder / NEXT).exists() and tries:
        time.sleep(0.02)
        tries -= 1
    return folder / NEXT if (folder / NEXT).exists() else folder


def check_out(folder) -> None:
    """Raise UserError if `folder` holds anything that is not a checkpoint, so that nobody's files are replaced."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; --out needs a folder that is new, empty or a checkpoint")
    held = sorted(p.name for p in folder.iterdir()) if folder.exists() else []
    held = [name for name in held if not name.startswith(".") and name != "lost+found"]  # a new disk's
    damaged = (folder / "train.pt").exists() and is_ours(folder / "previous")  # what --resume=auto mends
    if held and not is_ours(settled(folder)) and not damaged:
        raise UserError(f"{folder} holds something that is not a checkpoint of this project ({', '.join(held[:3])}); "
                        "give a folder that is new, empty or such a checkpoint")


def is_ours(folder: Path) -> bool:
    """True if this project wrote the checkpoint in `folder`: its own kind, or an export to Hugging Face's."""
    try:
        config = json.loads((folder / "config.json").read_text())
        return "nanoRRT" in (config.get("format"), config.get("exported_by"))
    except (OSError, ValueError, AttributeError):
        return False
