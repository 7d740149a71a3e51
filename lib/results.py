"""Files of results: JSON lines in, JSON lines out, and what can be written checked before the work."""


import json
import os
import sys
from pathlib import Path

from lib.cli import UserError


def json_line(numbers: dict) -> str:
    """A line of JSON; null for NaN and infinities, which JSON does not have and strict readers refuse."""
    return json.dumps(json.loads(json.dumps(numbers), parse_constant=lambda _: None))


def check_writable(name: str, path: str | None) -> None:
    """Raise UserError if the file that --name gives, if it does, could not be written when the work is done."""
    if not path:
        return
    try:
        new = not os.path.exists(path)
        if new or os.path.isfile(path) or os.path.isdir(path):       # not a pipe, which would wait for its reader
            open(path, "ab").close()                         # tried: modes do not tell of root or of a read-only disk
        if new:
            os.unlink(os.path.realpath(path))                # not a link that led to it
    except OSError as e:
        raise UserError(f"--{name}={path} cannot be written ({e.strerror}): give a file in a folder that is there and "
                        "may be written to") from None


def check_plot(path: str | None) -> None:
    """Raise UserError, before minutes of work, if --plot, where it is given, could not be drawn or written."""
    if not path:
        return
    check_writable("plot", path)
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise UserError('--plot needs matplotlib: pip install -e ".[plot]"') from None
    if Path(path).suffix[1:].lower() not in FigureCanvasBase.filetypes:
        raise UserError(f"--plot={path}: give a file that ends in .png, .svg or .pdf")


def read_lines(path) -> list[dict]:
    """The JSON objects of a .jsonl file; none where there is no file. Blank lines are skipped, and a last line that a
    kill cut short is left out and named on stderr. Raises UserError for any other line that is not a JSON object."""
    found = []
    try:
        lines = Path(path).read_bytes().split(b"\n") if Path(path).exists() else []
    except OSError as e:
        raise UserError(f"cannot read {path} ({e.strerror})") from None
    for number, line in enumerate(lines, 1):
        values = json_object(line)
        if values is not None:
            found.append(values)
        elif line.strip() and number == len(lines):
            print(f"{path}: line {number} was cut short and is left out", file=sys.stderr)
        elif line.strip():
            raise UserError(f"{path}, line {number}, is damaged: {line[:60]!r} is not a JSON object; mend the line or "
                            "delete it")
    return found


def json_object(line: bytes) -> dict | None:
    """The JSON object that a line holds; None where it is none, or only a part."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) else None


def append_line(path: str, numbers: dict) -> None:
    """Add `json_line` to the file, on a line of its own. Raises UserError where it cannot be written."""
    try:
        if Path(path).is_file():                             # what a kill cut short is dropped, else it would stay in
            with open(path, "rb+") as f:                     # the middle
                rest = f.read().rpartition(b"\n")[-1]
                if rest.startswith(b"{") and json_object(rest) is None:
                    f.truncate(f.tell() - len(rest))
                elif rest:
                    f.write(b"\n")
        with open(path, "a") as f:
            f.write(json_line(numbers) + "\n")
    except OSError as e:
        raise UserError(f"cannot write {path} ({e.strerror}); what was measured stands above") from e
