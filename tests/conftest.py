"""What holds for all tests: imports start at the repository's root, and no GPU means Triton's interpreter."""

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
