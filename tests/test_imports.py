"""Imports go one way: evaluation, benchmarks and experiments -> the root's files -> lib. bench.py is a benchmark, too:
it uses benchmarks/, and of the others only experiments/ uses it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ["evaluation", "benchmarks", "experiments"]
MODULES = {path.stem for path in ROOT.glob("*.py")} - {"bench"}
ALLOWED = {"lib": {"lib"}, "": MODULES | {"lib"}} | {folder: MODULES | {"lib", folder} for folder in FOLDERS}
ALLOWED["experiments"] = ALLOWED["experiments"] | {"bench", "benchmarks"}  # what made the results: shapes, a plot
COPIED = ROOT / "lib" / "modeling_nanorrt.py"  # imported in an exported folder, beside a copy of model.py
OURS = MODULES | set(FOLDERS) | {"lib", "bench"}


def imported(file: Path) -> set[str]:
    """The first part of every module's name that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_go_downwards(folder):
    for file in set((ROOT / folder).glob("*.py")) - {COPIED}:
        allowed = ALLOWED["benchmarks" if file == ROOT / "bench.py" else folder]
        assert imported(file) & OURS <= allowed, file
