"""Settings of all tests: imports start at the repository's root, Triton's interpreter runs where there is no GPU, and
the whole suite runs on all cores, one process each."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")           # read when a kernel is defined, so set before any import
torch.set_num_threads(1)                                     # for tiny tensors a second thread only adds waiting

pytest.register_assert_rewrite("tiny", "small_tokenizers")
from small_tokenizers import byte_level, metaspace, ranks  # noqa: E402, F401
from tiny import DONOR, home, start  # noqa: E402, F401 (fixtures; their imports need the lines above)

from model import RecursiveTransformer  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def used_clone(tmp_path_factory):
    """The working folder of all tests: a clone in which every command of README.md and docs/ has been run.

    A finished run lies in each folder that a command writes by default or names, so a test that uses such a folder
    instead of its own fails.
    """
    clone = tmp_path_factory.mktemp("used_clone")
    for path in ROOT.iterdir():
        if not path.name.startswith((".", "out")):
            (clone / path.name).symlink_to(path)
    RecursiveTransformer(DONOR).save(clone / "out")
    torch.save({"step": 1}, clone / "out" / "train.pt")
    (clone / "out" / "log.jsonl").write_text('{"step": 1, "final": true}\n')
    pages = (path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    named = re.findall(r"--out=(out\w*)", " ".join(pages))
    defaults = {"out_recursive", "out_data", "out_low_rank",  # of convert, lib.data, experiments.low_rank and matrix
                "out_experiments/toy/main-stepwise-s0-lr0.001"}
    for name in {*named, *defaults} - {"out"}:
        shutil.copytree(clone / "out", clone / name)
    before = os.getcwd()
    os.chdir(clone)
    yield clone
    os.chdir(before)


def pytest_xdist_auto_num_workers(config) -> int | None:
    """The number of processes for pytest-xdist's -n auto: none for tests that are named, so that a debugger can reach
    them; None, its own default of one per core, for the whole suite."""
    named = config.args != config.getini("testpaths") or config.option.keyword
    return 0 if named else None
