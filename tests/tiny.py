"""A donor with a few thousand parameters, and helpers of the tests that train it."""

import itertools
import json
import multiprocessing
import os
import random
import resource
import signal
import socket
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import train
from convert import to_hf
from lib.bpe import train_tokenizer
from lib.cli import script
from lib.tokenizer import copy_tokenizer
from model import Config, RecursiveTransformer

DONOR = Config(vocab_size=320, n_layer=4, n_embd=32, n_head=4, n_kv_head=1, head_dim=8, n_hidden=64, n_ctx=64)


def story(seed: int, sentences: int) -> str:
    """Random sentences of a small grammar, which a model learns quickly."""
    rng = random.Random(seed)
    parts = (["The cat", "A dog", "My aunt", "The old king"], ["sees", "eats", "finds", "loves"],
             ["a mouse", "the bread", "her garden", "some gold"])
    return " ".join(" ".join(map(rng.choice, parts)) + "." for _ in range(sentences))


def write_donor(model: RecursiveTransformer, tokenizer: Path, folder: Path) -> Path:
    to_hf(model, folder)
    copy_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """A folder with donor/ (trained a little, in Gemma's layout), train.txt and valid.txt."""
    home = tmp_path_factory.mktemp("home")
    words = random.Random(3)
    noise = " ".join("".join(words.choices("abcdefgh", k=words.randint(2, 5))) for _ in range(2000))
    train_tokenizer([story(1, 300) + noise], DONOR.vocab_size, home / "tokenizer")
    (home / "train.txt").write_text(story(1, 3000))
    (home / "valid.txt").write_text(story(2, 300))
    torch.manual_seed(0)
    write_donor(RecursiveTransformer(DONOR), home / "tokenizer", home / "donor")
    run(home, home / "full", "--init=scratch", "--tokens=12800", "--lr=5e-3", "--eval_every=1000")
    write_donor(RecursiveTransformer.load(home / "full"), home / "tokenizer", home / "donor")
    return home


def flags(home: Path, out: Path, *more: str) -> list[str]:
    return [f"--donor={home}/donor", f"--data={home}/train.txt", f"--valid={home}/valid.txt", f"--out={out}",
            "--tokens=2560", "--batch_tokens=128", "--seq_len=16", "--micro_batch=8", "--eval_tokens=256",
            "--eval_every=5", "--log_every=1", "--warmup=2", "--device=cpu", *more]


def run(home: Path, out: Path, *more: str) -> list[dict]:
    train.main(flags(home, out, *more))
    return read_log(out)


def read_log(out: Path) -> list[dict]:
    """The lines of log.jsonl without measured values, which differ from run to run."""
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (out / "log.jsonl").read_text().splitlines()]
    measured = {"tokens_per_s", "seconds", "mfu", "peak_gib"}
    return [{k: v for k, v in line.items() if k not in measured} for line in lines]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return RecursiveTransformer.load(out).state_dict()


def assert_same_weights(a: Path, b: Path, **tolerance) -> None:
    want, have = weights(a), weights(b)
    assert want.keys() == have.keys()
    for name in want:
        torch.testing.assert_close(have[name], want[name], msg=name, **(tolerance or {"rtol": 0, "atol": 0}))


def assert_close_logs(a: list[dict], b: list[dict], tolerance: float = 1e-5) -> None:
    assert [(line["step"], sorted(line)) for line in a] == [(line["step"], sorted(line)) for line in b]
    for x, y in zip(a, b, strict=True):
        for key in x.keys() & {"loss", "objective", "val_loss", "full_val_loss", "donor_loss", "lr"}:
            assert x[key] == pytest.approx(y[key], abs=tolerance), (x, y)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@contextmanager
def interrupt_at(step: int, how):
    """Call `how()` when training begins step number `step`, counted from 0."""
    schedule = train.learning_rate

    def interrupting(at, *rest):
        if at == step:
            how()
        return schedule(at, *rest)
    train.learning_rate = interrupting
    try:
        yield
    finally:
        train.learning_rate = schedule


def count_lines(save, reached):
    """`save`, but calling reached(n) before the nth executed line of the modules that move files."""
    lines = itertools.count()

    def trace(frame, event, _):
        if not frame.f_code.co_filename.endswith(("checkpoint.py", "folders.py", "shutil.py")):
            return None
        if event == "line":
            reached(next(lines))
        return trace

    def traced(*args):
        sys.settrace(trace)
        save(*args)
        sys.settrace(None)
    return traced


def child(argv: list[str], output: str, env: dict, kill_at: int | None = None, stop_at: int | None = None) -> None:
    """Run train.py in this process, with real signals, exit code and output.

    kill_at: SIGKILL when its saves have executed this many lines. stop_at: SIGTERM during this step.
    """
    if kill_at is not None:
        train.save_checkpoint = count_lines(
            train.save_checkpoint, lambda line: line == kill_at and os.kill(os.getpid(), signal.SIGKILL))
    os.environ.update(env)
    fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1), os.dup2(fd, 2)
    torch.set_num_threads(1)
    with interrupt_at(stop_at, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        script(lambda: train.main(argv))


@pytest.fixture(scope="session")
def start():
    """start(argv, output, **env) -> a training process, forked from a server that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "tiktoken", "torch._dynamo"])  # the last is what optimizers import late

    def start(argv, output, kill_at=None, stop_at=None, **env):
        process = context.Process(target=child, args=(argv, str(output), env, kill_at, stop_at), daemon=True)
        process.start()
        return process
    return start


def start_two(start, argv, output, **options):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    return [start(argv, output, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                  MASTER_PORT=port, **options) for rank in range(2)]


def join(processes) -> list[int | None]:
    for process in processes:
        process.join(100)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()  # a process that hangs ignores gentler signals
    return codes


def wait_for_step(out: Path, step: int, alive) -> None:
    until = time.time() + 100
    while time.time() < until and alive():
        if (out / "log.jsonl").exists() and f'"step": {step}, "loss"' in (out / "log.jsonl").read_text():
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} was not reached")


@contextmanager
def files_end_at(size: int):
    """Writes beyond `size` bytes of a file fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
