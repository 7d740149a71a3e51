"""The command line: settings as a dataclass, errors, printing, progress bars."""


import argparse
import inspect
import io
import os
import re
import sys
import types
from contextlib import suppress
from dataclasses import fields
from typing import Literal, Union, get_args, get_origin, get_type_hints

import torch.distributed as dist
from tqdm import tqdm


class UserError(ValueError):
    """A mistake in what was given. The message says what was given, what is allowed and what to do; no traceback."""


# ---------------------------------------------------------------------------------------------------------------------
# Command line: a dataclass is the settings, the defaults and the help

def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")
    return text.lower() == "true"


def integer(text: str) -> int:
    """An int, also one spelled 15e9. Raises ValueError for 1.5."""
    try:
        return int(text)
    except ValueError:
        if not float(text).is_integer():                     # nor are inf and nan
            raise
        return int(float(text))


integer.__name__ = "int"                                     # argparse names it in "invalid int value: '1.5'"


def at_home(text: str) -> str:
    """The text with ~ at the start of each part between commas replaced by the home folder: behind a "=" no shell does
    that."""
    return ",".join(map(os.path.expanduser, text.split(",")))


def filled(text: str) -> str:
    """`at_home` of a text that is not empty, as an unset variable of a shell would make it: that is not "not given"."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a value, got an empty one; give one, or leave the flag out")
    return at_home(text)


def parse_args(cls, argv=None, defaults=None):
    """An instance of the dataclass `cls`, filled from `--field=value` flags, and from `defaults` where there is none.

    The comment that ends a field's line is its --help text, so a script's settings are written
    once and read three times: in the source, in --help and in the checkpoint.
    """
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(cls), re.M))
    parser = argparse.ArgumentParser(
        description=sys.modules[cls.__module__].__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    hints = get_type_hints(cls)
    for f in fields(cls):
        kind, text = hints[f.name], comments.get(f.name, "").replace("%", "%%")
        if get_origin(kind) in (Union, types.UnionType):  # `int | None`: the flag takes an int
            kind = get_args(kind)[0]
        value = getattr(defaults, f.name) if defaults else f.default
        shown = str(value).replace("%", "%%") if value not in (None, "") else "not set"
        options = {"default": value, "help": f"{text} [{shown}]"}
        if kind is bool:
            options |= {"type": boolean, "nargs": "?", "const": True, "metavar": "True|False"}
        elif get_origin(kind) is Literal:
            options |= {"choices": get_args(kind)}
            if "yes" in get_args(kind):  # a switch with more than two positions may be given bare
                options |= {"nargs": "?", "const": "yes"}
        else:
            if kind is str and f.name != "prompt":           # which may be empty, or begin with ~
                options["type"] = at_home if f.default == "" or "," in str(f.default) else filled  # lists check theirs
            else:
                options["type"] = integer if kind is int else kind
            options["metavar"] = kind.__name__.upper()
        parser.add_argument("--" + f.name, **options)
    settings = cls(**vars(parser.parse_args(argv)))
    if not 0 <= getattr(settings, "seed", 0) < 2**63:        # what both torch and numpy take
        raise UserError(f"--seed={settings.seed} must not be negative, and less than 2**63")
    return settings


def script(main) -> None:
    """Run a script's `main()` and exit with the code it returns. Without one: 0, or what `LOST` says. A UserError ends
    it with one clear line and 2, Ctrl-C with 130."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):             # what its encoding lacks must end nothing
            stream.reconfigure(errors="replace")
    says = ""
    try:
        code = main()
    except UserError as e:
        code, says = 2, f"error: {e}"
    except KeyboardInterrupt:
        code, says = 130, "interrupted"
    except SystemExit as e:
        code = e.code
    except OSError as e:
        if not isinstance(e, BrokenPipeError) and not output_lost("\n"):   # it may be any file's
            raise
        LOST.append(e)
        code = None
    output_lost()                                            # now: Python's own last flush would end in a traceback
    if code is None and LOST:
        code = 141 if isinstance(LOST[0], BrokenPipeError) else 2    # quietly, and as if by SIGPIPE; or a full disk
        says = "" if code == 141 else f"error: cannot write to standard output ({LOST[0].strerror})"
    if says:
        with suppress(OSError):
            print(says, file=sys.stderr, flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code or 0)


LOST: list[OSError] = []                                     # why standard output could not be written, if so


def output_lost(more: str = "") -> bool:
    """True if what was printed, and `more`, cannot be written (`| head`, a full disk, a closed terminal); from then on
    it goes nowhere."""
    try:
        if sys.stdout:                                       # None where it is closed
            sys.stdout.write(more)
            sys.stdout.flush()
        return False
    except OSError as e:
        LOST.append(e)
        with suppress(OSError):                              # a stream of a test has no number
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True


def is_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def print0(*args) -> None:
    """Report on the first process. A report that nobody can read ends no work: see `LOST`."""
    if is_main():
        try:
            print(*args)
        except OSError as e:
            LOST.append(e)
        output_lost()


def use_colour(stream) -> bool:
    """True if `stream` shows colours: a terminal, unless NO_COLOR is set (no-color.org) or it is a dumb one."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def progress(items=None, **options):
    """tqdm over bounded, otherwise silent work; off where nobody watches (not a terminal, or not the first process)."""
    return tqdm(items, dynamic_ncols=True, leave=False, disable=not (is_main() and sys.stderr.isatty()), **options)


def table(rows: list[list]) -> str:
    """Rows of cells as aligned text, the first row the header; numbers to the right, words to the left."""
    cells = [[str(c) for c in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]

    def line(row):
        return "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
    return "\n".join([line(cells[0]), "  ".join("-" * w for w in widths), *map(line, cells[1:])])


def clock(seconds: float) -> str:
    return f"{seconds:.0f}s" if seconds < 90 else f"{seconds / 60:.0f}m" if seconds < 5400 else f"{seconds / 3600:.1f}h"
