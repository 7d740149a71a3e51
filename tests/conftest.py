"""What holds for all tests: imports start at the repository's root, no GPU means Triton's interpreter, and the whole
suite runs on all cores, a process on each."""

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
    os.environ.setdefault("TRITON_INTERPRET", "1")           # read when a kernel is defined: before anything imports it
torch.set_num_threads(1)                                     # the tensors are tiny: a second thread only waits

pytest.register_assert_rewrite("tiny", "small_tokenizers")
from small_tokenizers import byte_level, metaspace, ranks  # noqa: E402, F401
from tiny import DONOR, home, start  # noqa: E402, F401 (fixtures of several files; they import what the above prepares)

from model import RecursiveTransformer  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def used_clone(tmp_path_factory):
    """All tests run in a clone where every command of the README has been run: a run lies wherever one may be made, so
    a test that reads or writes such a folder, instead of one of its own, fails."""
    clone = tmp_path_factory.mktemp("used_clone")
    for path in ROOT.iterdir():
        if not path.name.startswith((".", "out")):
            (clone / path.name).symlink_to(path)
    RecursiveTransformer(DONOR).save(clone / "out")
    torch.save({"step": 1}, clone / "out" / "train.pt")
    (clone / "out" / "log.jsonl").write_text('{"step": 1, "final": true}\n')
    pages = (path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    outs = re.findall(r"--out=(out\w*)", " ".join(pages))
    for name in {*outs, "out_experiments/toy/average-s0"} - {"out"}:
        shutil.copytree(clone / "out", clone / name)
    before = os.getcwd()
    os.chdir(clone)
    yield clone
    os.chdir(before)


def pytest_xdist_auto_num_workers(config) -> int | None:
    """For -n auto of pytest-xdist: tests that are named run in pytest itself, where a debugger reaches them; all of
    them on as many processes as there are cores, which is its own answer."""
    named = config.args != config.getini("testpaths") or config.option.keyword
    return 0 if named else None
