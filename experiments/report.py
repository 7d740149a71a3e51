"""Verdicts, tables and plots from the lines in results/. Measures nothing.

    python -m experiments.report                # the verdicts, claim by claim, and what is still to be run
    python -m experiments.report --write        # also rewrites the tables of README.md and docs/ between their markers
    python -m experiments.report --plots        # also draws results/*.png; needs the [plot] extra
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from experiments import evidence, tables
from experiments.arms import STUDIES
from experiments.claims import claims
from experiments.matrix import next_runs, read_runs
from experiments.plots import save_plots
from experiments.verdicts import compare, verdicts
from lib.cli import UserError, parse_args, print0, script

ROOT = tables.ROOT

# page -> name of a table, which stands between <!-- NAME --> and <!-- /NAME --> -> function of the results folder
PAGES: dict[str, dict[str, Callable[[Path], str]]] = {
    "README.md": {"stepwise": tables.stepwise_table, "batching": tables.batching_table,
                  "sizes": evidence.sizes_table, "verdicts": evidence.verdicts_table},
    "docs/results.md": {"conclusions": evidence.conclusions_table, "arms": evidence.arms_block,
                        "gap": evidence.gap_table, "signs": evidence.signs_table, "rates": evidence.rates_table,
                        "smollm2": evidence.smollm2_table, "decode": tables.decode_table},
    "docs/exits.md": {"exits": evidence.exits_table, "calibrated": tables.calibrated_table,
                      "kv_policies": tables.kv_policies_table, "speculative": tables.speculative_table},
    "docs/calibration.md": {"start": tables.start_table, "read": tables.read_table, "saved": evidence.saved_table,
                            "equal_size": evidence.equal_size_table, "sharing": tables.sharing_table},
    "docs/choices.md": {"shared_kv": evidence.shared_kv_table},
    "docs/batching.md": {"batching_details": tables.batching_details_table},
    "docs/scale.md": {"scale": tables.scale_table},
}


def fill(page: str, text: str, results: Path) -> str:
    """The text of a page with its tables rewritten from `results`. Keeps a table whose results are missing or
    incomplete and warns about it. Raises UserError unless each pair of markers is there exactly once."""
    for name, make_table in PAGES[page].items():
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)"
        if (n := len(re.findall(pattern, text, re.S))) != 1:
            raise UserError(f"{page} has {n} tables between <!-- {name} --> and <!-- /{name} -->: it needs one")
        try:
            new = make_table(results)
        except (LookupError, ValueError) as e:
            print(f"the table {name} of {page} is not rewritten: lines that it needs are not in {results} ({e!r})",
                  file=sys.stderr)
            continue
        text = re.sub(pattern, lambda m, new=new: m[1] + new + m[2], text, flags=re.S)
    return text


def write_pages(folder: Path, results: Path) -> None:
    """Rewrite the tables of all pages in `folder`."""
    for page in PAGES:
        path = folder / page
        path.write_text(fill(page, path.read_text(encoding="utf-8"), results), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class ReportConfig:
    study: str = "toy"                         # whose verdicts to print: of experiments/arms.py
    results: str = str(ROOT / "results")       # folder of the results
    write: bool = False                        # rewrite the tables of README.md and docs/
    plots: bool = False                        # draw results/*.png


def print_verdicts(results: Path, name: str) -> None:
    """Each claim with its parts, and how many runs are missing."""
    study, lines = STUDIES[name], read_runs(results / "matrix.jsonl", name)
    if len(study.ranks) == 3:                                # the paper's arms
        found = verdicts(lines, given := claims(*study.ranks))
        for i, claim in enumerate(given, 1):
            verdict, p = found[claim.name]
            print0(f"\n{i} {claim.sentence}: {verdict}" + ("" if p is None else f" (p {p:.4f}, corrected)"))
            for part in claim.parts:
                words = f"{evidence.label(study, part.a)} {'=' if part.alike else '<'} {evidence.label(study, part.b)}"
                result = compare(lines, part)
                print0(f"   {words}: " + (f"{evidence.interval(result)}, {result.seeds} seeds, p {result.p:.4f}"
                                          if result else "not run"))
    print0(f"\n{len(lines)} runs measured; {len(next_runs(study, lines))} can run now: "
           f"python -m experiments.matrix --study={name}")


def main(argv=None) -> None:
    config = parse_args(ReportConfig, argv)
    if config.study not in STUDIES:
        raise UserError(f"--study={config.study} is unknown; use {', '.join(STUDIES)}")
    results = Path(config.results)
    if not results.is_dir():
        raise UserError(f"--results={results} is not a folder: give one with lines of experiments.matrix or bench.py")
    print_verdicts(results, config.study)
    if config.plots:
        save_plots(results)
    if config.write:
        write_pages(ROOT, results)
        print0(f"{', '.join(PAGES)} are up to date")


if __name__ == "__main__":
    script(main)
