"""The command line: settings as a dataclass, errors, printing, progress bars."""

import argparse
import inspect
import io
import os
import re
import sys
import types
from contextlib import suppress
from dataclasses import Field, fields
from typing import Literal, Union, get_args, get_origin, get_type_hints

import torch.distributed as dist
from tqdm import tqdm


class UserError(ValueError):
    """A mistake of the user. The message says what was given, what is allowed and what to do; it has no traceback."""


# ---------------------------------------------------------------------------------------------------------------------
# Command line: a dataclass holds the settings, their defaults and their help

def boolean(text: str) -> bool:
    """The value of True or False in any case."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")
    return text.lower() == "true"


def integer(text: str) -> int:
    """An int; 15e9 is one, too. ValueError for 1.5."""
    try:
        return int(text)
    except ValueError:
        if not float(text).is_integer():                     # false for inf and nan, too
            raise
        return int(float(text))


integer.__name__ = "int"                                     # for argparse: "invalid int value: '1.5'"


def expand_home(text: str) -> str:
    """The text with the home folder for ~ at the start of each part between commas. A shell does not expand it after
    an equals sign."""
    return ",".join(map(os.path.expanduser, text.split(",")))


def non_empty(text: str) -> str:
    """`expand_home` of the text. An empty one is an error: it is most likely a shell variable that is not set."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a value, got an empty one; give one, or leave the flag out")
    return expand_home(text)


def parse_args(cls, argv=None, defaults=None):
    """An instance of the dataclass `cls`, filled from `--field=value` flags, and from `defaults` where there is none.

    The comment at the end of a field's line is its --help text, so that settings are written once and read three
    times: in the source, in --help and in the checkpoint. A class may have RENAMED, {old name: new name}: flags with
    the old names still work.
    """
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(cls), re.M))
    parser = argparse.ArgumentParser(
        description=sys.modules[cls.__module__].__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    hints, renamed = get_type_hints(cls), getattr(cls, "RENAMED", {})
    for f in fields(cls):
        value = getattr(defaults, f.name) if defaults else f.default
        shown = value if value not in (None, "") else "not set"
        text = f"{comments.get(f.name, '')} [{shown}]".replace("%", "%%")
        names = [f.name, *(old for old, new in renamed.items() if new == f.name)]
        parser.add_argument(*(f"--{name}" for name in names), default=value, help=text,
                            **flag_options(f, hints[f.name]))
    settings = cls(**vars(parser.parse_args(argv)))
    if not 0 <= getattr(settings, "seed", 0) < 2**63:        # the seeds that torch and numpy take
        raise UserError(f"--seed={settings.seed} must not be negative, and less than 2**63")
    return settings


def flag_options(field: Field, kind) -> dict:
    """How argparse reads the flag of a field with this type hint."""
    if get_origin(kind) in (Union, types.UnionType):         # `int | None`: the flag takes an int
        kind = get_args(kind)[0]
    if kind is bool:
        return {"type": boolean, "nargs": "?", "const": True, "metavar": "True|False"}
    if get_origin(kind) is Literal:
        bare = {"nargs": "?", "const": "yes"} if "yes" in get_args(kind) else {}   # --resume is --resume=yes
        return {"choices": get_args(kind), **bare}
    metavar = kind.__name__.upper()
    if kind is int:
        kind = integer
    elif kind is str and field.name != "prompt":             # a prompt may be empty, or begin with ~
        is_list = field.default == "" or "," in str(field.default)
        kind = expand_home if is_list else non_empty         # scripts check their lists themselves
    return {"type": kind, "metavar": metavar}


# ---------------------------------------------------------------------------------------------------------------------
# Running a script, printing

# The error that standard output first failed with, if it did: its reader is gone (`| head`), its disk is full.
OUTPUT_ERRORS: list[OSError] = []


def script(main) -> None:
    """Run `main()` and exit with the code it returns. A UserError prints one line and exits with 2, Ctrl-C exits with
    130; if standard output is lost, the code is 141 (as if by SIGPIPE), or 2 with a message if its disk is full."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):             # a character that the encoding lacks must not end the run
            stream.reconfigure(errors="replace")
    message = ""
    try:
        code = main()
    except UserError as e:
        code, message = 2, f"error: {e}"
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    except SystemExit as e:
        code = e.code
    except OSError as e:
        if not isinstance(e, BrokenPipeError) and not output_lost("\n"):   # an error of another file
            raise
        OUTPUT_ERRORS.append(e)
        code = None
    output_lost()                                            # flush here: Python's own last flush may print a traceback
    if code is None and OUTPUT_ERRORS:
        e = OUTPUT_ERRORS[0]
        code = 141 if isinstance(e, BrokenPipeError) else 2
        message = "" if code == 141 else f"error: cannot write to standard output ({e.strerror})"
    if message:
        with suppress(OSError):
            print(message, file=sys.stderr, flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code or 0)


def output_lost(more: str = "") -> bool:
    """True if `more`, or what was printed before, cannot be written to standard output, which then goes nowhere."""
    try:
        if sys.stdout:                                       # None if it is closed
            sys.stdout.write(more)
            sys.stdout.flush()
        return False
    except OSError as e:
        OUTPUT_ERRORS.append(e)
        with suppress(OSError):                              # in a test it may have no file descriptor
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True


def is_main() -> bool:
    """True on the first process of a run, and without torchrun."""
    return int(os.environ.get("RANK", 0)) == 0


def print0(*args) -> None:
    """Print on the first process only. If standard output is lost, the work goes on: see `OUTPUT_ERRORS`."""
    if is_main():
        try:
            print(*args)
        except OSError as e:
            OUTPUT_ERRORS.append(e)
        output_lost()


def use_colour(stream) -> bool:
    """True if `stream` is a terminal that shows colours, and NO_COLOR is not set (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def progress(items=None, **options):
    """tqdm over `items`, shown on the first process and on a terminal only."""
    return tqdm(items, dynamic_ncols=True, leave=False, disable=not (is_main() and sys.stderr.isatty()), **options)


def table(rows: list[list]) -> str:
    """The rows as aligned text. The first row is the header; the first column is aligned left, the others right."""
    cells = [[str(c) for c in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]

    def line(row):
        return "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
    return "\n".join([line(cells[0]), "  ".join("-" * w for w in widths), *map(line, cells[1:])])


def clock(seconds: float) -> str:
    """A time in seconds, minutes or hours: 8s, 10m, 2.0h."""
    return f"{seconds:.0f}s" if seconds < 90 else f"{seconds / 60:.0f}m" if seconds < 5400 else f"{seconds / 3600:.1f}h"
