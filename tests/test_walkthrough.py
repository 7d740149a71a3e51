"""The walkthrough's snippets, run in order in one namespace: each prints the output that the page shows below it."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```\n```text\n(.*?)```", PAGE, re.S)     # (code, what it prints)
NUMBER = re.compile(r"-?\d+\.\d+")


def same_output(got: str, want: str) -> bool:
    """True if the texts are equal, except that decimal numbers may differ by two units of the last digit shown."""
    if NUMBER.sub("#", got).split() != NUMBER.sub("#", want).split():
        return False
    pairs = zip(NUMBER.findall(got), NUMBER.findall(want), strict=True)
    return all(abs(float(a) - float(b)) <= 2.01 * 10.0**-len(b.split(".")[1]) for a, b in pairs)


def test_every_snippet_prints_what_the_page_shows(monkeypatch):
    assert len(SNIPPETS) == PAGE.count("```python") > 15
    monkeypatch.chdir(ROOT)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                 # several test processes run side by side
    namespace = {}
    try:
        for code, want in SNIPPETS:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(code, "walkthrough.md", "exec"), namespace)
            assert want.strip() and same_output(out.getvalue(), want), f"{code}\nprints\n{out.getvalue()}\nnot\n{want}"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("got, want, same", [
    ("loss 4.22 True", "loss 4.23\nTrue", True), ("loss 4.22", "loss 4.25", False), ("6 layers", "7 layers", False),
    ("True", "False", False), ("4.22 4.22", "4.22", False)])
def test_only_the_last_digits_may_differ(got, want, same):
    assert same_output(got, want) is same
