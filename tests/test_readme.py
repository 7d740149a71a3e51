"""README.md and docs/: every command runs, in order and small; every name, file and link exists."""

import ast
import multiprocessing
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_harness import needs, write_files

from convert import to_hf
from lib.bpe import train_tokenizer
from lib.cli import script
from model import Config, RecursiveTransformer

ROOT = Path(__file__).resolve().parent.parent
FILES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PAGES = {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in FILES}
README = PAGES["README.md"]
PACKAGES = [file.parent for file in ROOT.glob("*/__init__.py")]        # lib, evaluation, benchmarks, experiments
TEXT = "It was a dark night, and the old man looked at the sea. "


def find_commands() -> list[str]:
    """The commands of all bash blocks but pip's, each once; the one that reads shards comes last."""
    blocks = "".join(block for page in PAGES.values() for block in re.findall(r"```bash\n(.*?)```", page, re.S))
    commands = [part.strip() for line in blocks.splitlines() for part in line.split("&&")]
    commands = [c for c in dict.fromkeys(commands) if not c.startswith("pip ") and "pytest" not in c]
    return sorted(commands, key=lambda c: "--data=out_shards" in c)


SMALL = {  # settings added to a command; the last of two equal flags counts
    "train.py": "--tokens=1024 --batch_tokens=512 --micro_batch=1 --seq_len=64 --eval_tokens=256 --log_every=1",
    "sample.py": "--max_new_tokens=8",
    "convert.py": "",
    "lib.data": "--tokens=3000",
    "evaluation.perplexity": "--tokens=1024 --keys=exact",
    "evaluation.thresholds": "--data=texts --valid=small.txt --gate_tokens=512 --tokens=2048 --agreement=0.2",
    "evaluation.harness": "--files=tasks --limit=1",
    "benchmarks.speculative": "--text=small.txt --prompts=1 --new_tokens=8 --gammas=2",
    "experiments.matrix": "",
    "experiments.report": "",
}


def small(command: str) -> tuple[list[str], str, list[str]]:
    """(launcher, script or module, flags) of a command with the clone's donor and texts, and small settings."""
    launcher, *words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.endswith(".py") or word == "-m")
    options, (name, *flags) = words[:at], words[at + (words[at] == "-m"):]
    here = {"TinyLlama/TinyLlama_v1.1": "llama", "Qwen/Qwen2.5-Coder-0.5B": "qwen", "assets/books/train": "texts",
            **dict.fromkeys(("assets/books/valid.txt", "pg19#test", "code.txt", "unseen.txt"), "small.txt")}
    flags = [f"{key}={here.get(value, value)}" if value else key for key, _, value in (f.partition("=") for f in flags)]
    if "--resume" in flags:                                  # as if the run had been stopped: there is more to do
        return [launcher, *options], name, [*flags, "--tokens=1536"]
    if name == "train.py":
        flags += ["--valid=small.txt"] * ("--valid=" not in command) + ["--data=texts"] * ("--data=" not in command)
    if "--calib_text" in command:
        flags += ["--calib_tokens=1024"]
    return [launcher, *options], name, [*flags, *SMALL[name].split()]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder that looks like a clone, where commands may write, with a small Llama and Qwen and small texts."""
    folder = tmp_path_factory.mktemp("clone")
    for path in (*ROOT.glob("*.py"), *PACKAGES, ROOT / "assets", ROOT / "results", ROOT / "docs", ROOT / "README.md"):
        (folder / path.name).symlink_to(path)
    (folder / "small.txt").write_text(TEXT * 300)
    (folder / "texts").mkdir()
    for i in range(10):
        (folder / "texts" / f"{i}.txt").write_text(f"{i}. {TEXT}" * 40)
    write_files(folder / "tasks", 0)
    torch.manual_seed(0)
    for name, family in (("llama", {"arch": "llama"}), ("qwen", {"arch": "qwen2", "attn_bias": True, "o_bias": False})):
        config = Config(**family, vocab_size=280, n_layer=4, n_embd=16, n_head=2, head_dim=8, n_hidden=32)
        to_hf(RecursiveTransformer(config), folder / name)
        train_tokenizer([TEXT * 300], 280, folder / name)
    return folder


def run_python(folder: Path, name: str, flags: list[str]) -> None:
    """In a process of its own: what `python name.py` or `python -m name` does, with its output in folder/output."""
    os.chdir(folder)
    output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1), os.dup2(output, 2)
    torch.set_num_threads(1)
    sys.argv[:] = [name, *flags]
    module = name.removesuffix(".py")
    script(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True) and None)


def run_command(folder: Path, launcher: list[str], name: str, flags: list[str]) -> tuple[int, str]:
    """(exit code, output). Python's commands start from a process that has imported torch already."""
    if launcher[0] == "torchrun":
        argv = [sys.executable, "-m", "torch.distributed.run", *launcher[1:], name, *flags]
        done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=280,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        return done.returncode, done.stdout + done.stderr
    assert launcher == ["python"]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny", "tiktoken", "torch._dynamo"])
    process = context.Process(target=run_python, args=(folder, name, flags), daemon=True)
    process.start()
    process.join(280)
    process.kill()
    return process.exitcode, (folder / "output").read_text()


@pytest.mark.parametrize("command", [pytest.param(c, marks=needs if "harness" in c else ()) for c in find_commands()])
def test_command_runs(clone, command):
    code, output = run_command(clone, *small(command))
    assert code == 0, f"{command}\n{output}"


def test_python_block_runs_on_what_the_commands_made(clone, monkeypatch):
    block, = re.findall(r"```python\n(.*?)```", PAGES["docs/batching.md"], re.S)
    monkeypatch.chdir(clone)
    exec(block, names := {})
    assert [(r.status, len(r.tokens)) for r in names["requests"]] == 2 * [("done", 20)]


def test_all_other_python_is_the_walkthroughs():
    assert [name for name, page in PAGES.items() if "```python" in page] == ["docs/batching.md", "docs/walkthrough.md"]


# ---------------------------------------------------------------------------------------------------------------------
# What the pages name exists

def defined(file: Path) -> set[str]:
    """The functions, classes and methods that a file defines."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, kinds)}


def test_the_table_of_the_method_names_what_there_is():
    named = re.findall(r"`(\w+)(?:\.(\w+))?`(?: with [^,]*)?, ([\w/]+\.py)", README)
    assert sum(name.startswith("test_") for name, _, _ in named) == 11 and len(named) > 22
    for name, method, file in named:
        found = defined(ROOT / "tests" / file if file.startswith("test_") else ROOT / file)
        assert name in found and (not method or method in found), (name, method, file)


@pytest.mark.parametrize("page", PAGES)
def test_functions_named_with_their_file_exist(page):
    for name, file in re.findall(r"`(\w+)(?:\(.*?\))?`(?:,| in| \() ?([\w/]+\.py)", PAGES[page]):
        found = defined(ROOT / "tests" / file if file.startswith("test_") else ROOT / file)
        assert name in found, (name, file)


@pytest.mark.parametrize("page", PAGES)
def test_files_and_modules_named_exist(page):
    text = PAGES[page].partition("## Where the old commands went")[0]
    text = re.sub(r"https?://\S+", "", text)
    for name in re.findall(r"`((?!FOLDER)[\w./]+(?:\.py|\.sh|\.jsonl|/))`", text):
        assert any((ROOT / folder / name).exists() for folder in ("", "tests", "results", "docs")), name
    for name in re.findall(r"\b((?:results|experiments|evaluation|benchmarks|lib|docs|assets)/[\w/]+\.\w+)", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"python -m ((?:lib|evaluation|benchmarks|experiments)\.\w+)", text):
        assert (ROOT / f"{name.replace('.', '/')}.py").exists(), name
    for name in re.findall(r"(?:python|bash|torchrun[^`\n]*?) ([\w/]+\.(?:py|sh))\b", text):
        assert (ROOT / name).exists(), name


def test_the_table_of_old_commands_leads_to_modules():
    table = PAGES["docs/faq.md"].partition("## Where the old commands went")[2]
    new = " ".join(re.findall(r"^\|.*?\|(.*)\|$", table, re.M))
    modules = set(re.findall(r"\b((?:lib|evaluation|benchmarks|experiments)\.\w+)", new))
    assert len(modules) > 10
    for name in modules:
        assert (ROOT / f"{name.replace('.', '/')}.py").exists(), name


def test_files_of_the_readme_are_the_root():
    listed = README.partition("## Files")[2].partition("## ")[0]
    assert set(re.findall(r"\b(\w+\.py)\b", listed)) == {path.name for path in ROOT.glob("*.py")}
    assert {folder.name for folder in PACKAGES} <= set(re.findall(r"(\w+)/", listed))


@pytest.mark.parametrize("page", PAGES)
def test_settings_named_exist(page):
    """Every --flag of a page is a field of some script's settings, or torchrun's."""
    files = [file for folder in (ROOT, *PACKAGES) for file in folder.glob("*.py")]
    fields = {name for file in files for name in
              re.findall(r"^    (\w+): .*=.*  # ", file.read_text(encoding="utf-8"), re.M)}
    text = PAGES[page].partition("## Where the old commands went")[0]
    others = {"field", "help", "standalone", "nproc_per_node", "max-restarts"}
    assert set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", text)) - fields <= others


def anchors(page: str) -> set[str]:
    """GitHub's anchors of a page's headings."""
    text = re.sub(r"```.*?```", "", page, flags=re.S)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in
            re.findall(r"^#+ (.+)$", text, re.M)}


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target


def test_the_readme_is_one_page():
    assert len(README.splitlines()) <= 200 and len(README.encode()) <= 14 * 1024


def test_ci_runs_what_the_readme_says():
    ci = (ROOT / ".ci" / "run").read_text()
    assert 'pip install -q -e ".[test]"' in ci and "python -m pytest" in ci
    assert 'pip install -e ".[test]" && python -m pytest' in README
