"""Every command of the README, run in its order as a reader would, with small settings."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_harness import needs, write_files

from convert import to_hf
from lib.tokenizer import train_tokenizer
from model import Config, RecursiveTransformer

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [part.strip() for block in re.findall(r"```bash\n(.*?)```", README, re.S)
            for line in block.splitlines() for part in line.split("&&") if not part.strip().startswith("pip ")]
BLOCKS = {word: block for block in re.findall(r"```python\n(.*?)```", README, re.S)
          for word in ("Engine", "unroll") if word in block}
SMALL = {  # added to a command: the last of two equal flags counts
    "train.py": "--tokens=1024 --batch_tokens=512 --micro_batch=1 --seq_len=64 --eval_tokens=256 --log_every=1",
    "sample.py": "--max_new_tokens=8", "convert.py": "", "data.py": "", "evaluate.py": "--tokens=512 --keys=exact",
    "harness.py": "--files=tasks --limit=1", "report.py": "", "experiments.py": "",
    "exits.py": "--gate_tokens=512 --tokens=2048 --agreement=0.2",
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder that looks like a clone, where commands may write, with a small Llama and a small text of its own."""
    folder = tmp_path_factory.mktemp("clone")
    for path in (*ROOT.glob("*.py"), ROOT / "assets"):
        (folder / path.name).symlink_to(path)
    text = "It was a dark night, and the old man looked at the sea. " * 300
    (folder / "small.txt").write_text(text)
    write_files(folder / "tasks", 0)
    torch.manual_seed(0)
    config = Config(arch="llama", vocab_size=280, n_layer=4, n_embd=16, n_head=2, head_dim=8, n_hidden=32)
    to_hf(RecursiveTransformer(config), folder / "llama")
    train_tokenizer([text], 280, folder / "llama")
    return folder


def small(command: str) -> list[str]:
    """The command's words, with this Python, a checkpoint and a text that are here, and small settings."""
    words = shlex.split(command)
    script = next(w for w in words if w.endswith(".py"))
    launch = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    words = launch[words[0]] + words[1:]
    if "TinyLlama" in command or "out_" in command:
        words = [re.sub("TinyLlama/[^ ]+", "llama", w).replace("assets/books/train", "small.txt") for w in words]
        words = [w.replace("pg19#test", "small.txt") for w in words]
        words += ["--valid=small.txt"] * (script == "train.py" and not goes_on(command))
    return words + SMALL[script].split() * (not goes_on(command))


def goes_on(command: str) -> bool:
    return "--resume" in command.split()                     # --resume=auto starts where there is nothing


@pytest.mark.parametrize("command", [pytest.param(c, marks=needs if "harness.py" in c else ()) for c in COMMANDS
                                     if "pytest" not in c])
def test_command_runs(clone, command):
    if goes_on(command):  # as if the run had been stopped: there is more to do
        command += " --tokens=1536"
    done = subprocess.run(small(command), cwd=clone, capture_output=True, text=True, timeout=280,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def test_the_method_is_quoted_from_the_code():
    quoted, = re.findall(r"quoted from the code:\n\n```python\n(.*?)```", README, re.S)
    code = [line.strip() for path in ROOT.glob("*.py") for line in path.read_text(encoding="utf-8").splitlines()]
    for line in quoted.splitlines():
        line = line.split("  #")[0].strip()
        assert line.startswith("#") or any(said.startswith(line) for said in code), line


def test_the_table_of_the_method_names_what_there_is():
    named = re.findall(r"`(\w+)(?:\.\w+)?`, (\w+\.py)", README)
    assert sum(name.startswith("test_") for name, _ in named) == 11 < len(named) - 10
    for name, file in named:
        path = ROOT / "tests" / file if file.startswith("test_") else ROOT / file
        assert re.search(rf"(def|class) {name}\b", path.read_text(encoding="utf-8")), (name, file)


def test_what_the_exits_left_is_served(clone, monkeypatch):
    """The block about the engine, on what the commands above it made."""
    monkeypatch.chdir(clone)
    exec(BLOCKS["Engine"], names := {})
    assert [(r.status, len(r.tokens)) for r in names["requests"]] == 2 * [("done", 20)]


def test_python_block_runs():
    block = BLOCKS["unroll"]
    names = {"idx": torch.randint(0, 4096, (1, 8))}
    with torch.no_grad():
        exec(block, names)
        want, got = names["logits"], names["same"].logits(names["same"](names["idx"])[-1])
    torch.testing.assert_close(got, want, atol=0.15, rtol=0.05)  # the shipped weights are bfloat16


def test_ci_runs_what_the_readme_says():
    ci = (ROOT / ".ci" / "run").read_text()
    assert 'pip install -q -e ".[test]"' in ci and "python -m pytest" in ci
    assert 'pip install -e ".[test]" && python -m pytest' in README


def test_files_named_in_the_readme_exist():
    for name in re.findall(r"`([\w./]+(?:\.py|/))`", README):
        assert (ROOT / name).exists(), name
