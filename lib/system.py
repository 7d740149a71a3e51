"""Processes, devices, memory, signals, and the hardware and versions that a figure was measured with."""

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
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from lib.cli import UserError, is_main, print0

# ---------------------------------------------------------------------------------------------------------------------
# Processes and devices

# How long the processes wait for one another, which NCCL ends after 10 minutes if not told otherwise: the first process
# alone saves and checks checkpoints. Gemma 2B's is 10 GB of weights and 20 GB of AdamW's state; at 50 MB/s, a slow
# network disk, that is 10 minutes, and the checksums read a third of it again. torchrun ends the others at once if one
# of them dies, so only one that hangs is noticed late.
FIRST_PROCESS = timedelta(hours=2)


@dataclass
class Processes:
    rank: int            # of this process, 0 .. world - 1
    world: int           # the number of processes
    device: torch.device


def start_processes(device: str = "auto") -> Processes:
    """This process's rank and device. Under torchrun it joins the process group (nccl on GPUs, gloo on CPUs)."""
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
        # torchrun's store outlives restarts, and so do the addresses of dead processes in it: each attempt has a prefix
        # of its own. (Nodes may count attempts differently: several need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "") if here == world else ""
        try:
            store = dist.PrefixStore(f"attempt {attempt}", next(dist.rendezvous("env://", rank, world))[0])
        except (RuntimeError, ValueError) as e:              # a port in use, a missing or wrong MASTER_ADDR
            raise UserError(f"the {world} processes cannot meet ({str(e).splitlines()[0]}); start them with torchrun, "
                            "or give them a free MASTER_PORT") from None
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", store=store, rank=rank, world_size=world,
                                timeout=FIRST_PROCESS, device_id=chosen if chosen.type == "cuda" else None)
        if chosen.type == "cpu" and os.environ.get("OMP_NUM_THREADS", "1") == "1":  # torchrun's default
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // here))
    return Processes(rank, world, chosen)


def pick_device(device: str = "auto") -> torch.device:
    """The device of this name; "auto" is the GPU if there is one. UserError if it cannot be used."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device={device} cannot be used here ({str(e).splitlines()[0]}); "
                        "use auto, cpu or cuda") from None
    return chosen


def pick_bf16(dtype: str, device: torch.device) -> bool:
    """Whether to run in bfloat16, by a setting that is auto (on GPUs), float32 or bfloat16."""
    return dtype == "bfloat16" or (dtype == "auto" and device.type == "cuda")


def check_compile(device: torch.device) -> None:
    """Raise UserError, before minutes of work, if torch.compile does not work here."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as e:                                   # each backend has its own kinds
        why = next((line for line in reversed(str(e).splitlines()) if "Error" in line or "ompiler" in line), e)
        raise UserError(f"--compile does not work here ({str(why).strip()[:200]}): install a C++ compiler (on GPUs "
                        "Triton, too), or leave out --compile") from None


# Dense bf16 TFLOP/s from the data sheets, by words of torch.cuda.get_device_name(); the first match counts.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200 NVL": 835, "H200": 989, "GH200": 989,
               "B200": 2250, "A100": 312, "A800": 312, "H800": 989, "L40S": 362, "L40": 181, "L4": 121, "A10": 125,
               "A6000": 155, "4090": 165, "3090": 71}


def peak_flops(device: torch.device, bf16: bool) -> float | None:
    """The bf16 peak in FLOP/s of a GPU, by its name. None if it is not known, in fp32, and for CPUs."""
    if device.type != "cuda" or not bf16:
        return None
    name = torch.cuda.get_device_name(device)
    if re.search(r"\b(MIG|Laptop)\b", name):                # a part of that GPU, or a smaller one of the same name
        return None
    return next((peak * 1e12 for words, peak in PEAK_TFLOPS.items() if re.search(rf"\b{words}\b", name)), None)


def peak_memory(device: torch.device) -> float:
    """Peak memory in GiB: of tensors on a GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")       # Linux, where ru_maxrss begins with the parent process's
    if status.exists() and (kilobytes := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(kilobytes[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def process_age() -> float:
    """Seconds since this process was started (importing torch takes some); 0 if the system does not say."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])      # from boot to start
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return 0.0


def run_info() -> dict:
    """The hardware, versions and commit that a figure was measured with."""
    commit = None                                            # where git or its folder is missing
    with suppress(OSError):
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent,
                                capture_output=True, text=True).stdout.strip() or None
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = next((line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")), "")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu or platform.processor(), "gpu": gpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "python": platform.python_version(), "torch": torch.__version__, "commit": commit,
            "time": time.strftime("%F %T")}


class StopFlag:
    """A context in which Ctrl-C, SIGTERM or a closed terminal, on any process, asks the run to stop after its step."""

    def __init__(self):
        self.asked = 0                                       # the signal's number

    def __enter__(self):
        self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
                       if signal.getsignal(s) != signal.SIG_IGN}     # nohup ignores SIGHUP, a shell's & SIGINT
        return self

    def ask(self, number, _):
        if not self.asked:  # torchrun sends Ctrl-C a second time: say it once
            with suppress(RuntimeError):                     # a signal during another print
                print0("stopping after this step")
        self.asked = number

    def __exit__(self, *_):
        for s, handler in self.before.items():
            signal.signal(s, handler)

    def agreed(self, procs: Processes) -> int:
        """The number of the signal that any of the processes received, on all of them; 0 if none did."""
        if procs.world == 1:
            return self.asked
        flag = torch.tensor(float(self.asked), device=procs.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return int(flag.item())


def on_first(work):
    """The result of work(), which runs on the first process, on all processes. A UserError is raised on all, too: the
    others would wait for ever."""
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
