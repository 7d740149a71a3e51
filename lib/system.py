"""Processes, devices, compilers, memory, and what a figure was measured on."""


import os
import platform
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from lib.cli import UserError, is_main, print0

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
