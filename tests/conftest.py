"""What holds for all tests: imports start at the repository's root, no GPU means Triton's interpreter, and the whole
suite runs on all cores, a process on each."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")           # read when a kernel is defined: before anything imports it
torch.set_num_threads(1)                                     # the tensors are tiny: a second thread only waits

pytest.register_assert_rewrite("tiny")
from tiny import home, start  # noqa: E402, F401 (fixtures of several files; they import what the lines above prepare)


def pytest_xdist_auto_num_workers(config) -> int | None:
    """For -n auto of pytest-xdist: tests that are named run in pytest itself, where a debugger reaches them; all of
    them on as many processes as there are cores, which is its own answer."""
    named = config.args != config.getini("testpaths") or config.option.keyword
    return 0 if named else None
