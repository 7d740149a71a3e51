"""Files of results, one JSON object a line, and checks before the work that they can be written."""

import json
import os
import sys
from pathlib import Path

from lib.cli import UserError


def json_line(numbers: dict) -> str:
    """The numbers as one line of JSON, with null for NaN and infinities, which JSON does not have."""
    return json.dumps(json.loads(json.dumps(numbers), parse_constant=lambda _: None))


def check_writable(name: str, path: str | None) -> None:
    """Raise UserError, before the work, if the file `path` of the setting `name` cannot be written. None is fine."""
    if not path:
        return
    try:
        new = not os.path.exists(path)
        if new or os.path.isfile(path) or os.path.isdir(path):       # a pipe would wait for its reader
            open(path, "ab").close()                         # modes say nothing of root or a read-only disk
        if new:
            os.unlink(os.path.realpath(path))                # the file, not a link to it
    except OSError as e:
        raise UserError(f"--{name}={path} cannot be written ({e.strerror}): give a file in a folder that is there and "
                        "may be written to") from None


def check_plot(path: str | None) -> None:
    """Raise UserError, before the work, if the file of --plot cannot be drawn or written. None is fine."""
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
    """The JSON objects of a .jsonl file; none if it does not exist. A last line that a kill cut short is left out and
    named on stderr. UserError for any other line that is not a JSON object."""
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
    """The JSON object in a line; None if it is something else, or cut short."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) else None


def append_line(path: str, numbers: dict) -> None:
    """Append `json_line(numbers)` to the file. UserError if it cannot be written."""
    try:
        if Path(path).is_file():                             # drop a last line that a kill cut short
            with open(path, "rb+") as f:
                rest = f.read().rpartition(b"\n")[-1]
                if rest.startswith(b"{") and json_object(rest) is None:
                    f.truncate(f.tell() - len(rest))
                elif rest:
                    f.write(b"\n")
        with open(path, "a") as f:
            f.write(json_line(numbers) + "\n")
    except OSError as e:
        raise UserError(f"cannot write {path} ({e.strerror}); what was measured stands above") from e
