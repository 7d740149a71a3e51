"""Verdicts, tables and plots from the lines in results/. Measures nothing.

    python -m experiments.report                # the conclusions, claim by claim
    python -m experiments.report --write        # also rewrites the tables of README.md and docs/ between their markers
    python -m experiments.report --plots        # also draws results/*.png; needs the [plot] extra
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from experiments import tables
from experiments.conclusions import conclusions
from experiments.matrix import MODELS, ROOT
from experiments.plots import save_plots
from experiments.verdicts import all_losses, gap, judge, read_runs, spread, unfinished, verdict, warn_once
from lib.cli import UserError, parse_args, print0, script, table

# page -> name of a table, which stands between <!-- NAME --> and <!-- /NAME --> -> function of the results folder
PAGES: dict[str, dict[str, Callable[[Path], str]]] = {
    "README.md": {"stepwise": tables.stepwise_table, "batching": tables.batching_table,
                  "verdicts": tables.verdicts_table},
    "docs/results.md": {"conclusions": tables.conclusions_table, "decode": tables.decode_table},
    "docs/exits.md": {"exits": tables.exits_table, "calibrated": tables.calibrated_table},
    "docs/calibration.md": {"start": tables.start_table, "read": tables.read_table, "saved": tables.saved_table,
                            "saved_smollm2": tables.saved_smollm2_table},
    "docs/batching.md": {"batching_details": tables.batching_details_table},
    "docs/scale.md": {"scale": tables.scale_table, "uptrain": tables.uptrain_table},
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
            warn_once(f"the table {name} of {page} is not rewritten: lines that it needs are not in {results} "
                      f"({e!r})")
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
    model: str = "toy"                         # whose runs: toy, or smollm2
    results: str = str(ROOT / "results")       # folder of the results
    write: bool = False                        # rewrite the tables of README.md and docs/
    plots: bool = False                        # draw results/*.png


def print_conclusions(results: Path, model: str) -> None:
    """Conclusions with their losses and claims, the share of the gap that LoRA closes, and missing runs."""
    losses, runs, ranks = all_losses(results, model), read_runs(results, model), MODELS[model].ranks
    for i, c in enumerate(conclusions(*ranks), 1):
        print0(f"\n{i} {c.name}: {c.says}: {verdict(c, losses)}")
        print0(f"python -m experiments.matrix --only={c.name}")
        print0(table([["", "loss, ours", "seeds", f"paper{', ' * bool(c.metric)}{c.metric}"]] + [
            [label, spread(losses.get(measured, {}).values()), len(losses.get(measured, {})), paper]
            for measured, (label, paper) in c.rows.items()]))
        for claim in c.claims:
            print0("   {} {} {}: {}  {}".format(*claim, *judge(claim, losses)))
    print0("\n" + table([["tokens", "tied", f"r {ranks[2]}", "share of the gap"], *gap(runs, ranks[2])]))
    print0("not run: " + (", ".join(unfinished(runs, model)) or "nothing"))


def main(argv=None) -> None:
    config = parse_args(ReportConfig, argv)
    if config.model not in MODELS:
        raise UserError(f"--model={config.model} is unknown; use {', '.join(MODELS)}")
    results = Path(config.results)
    if not results.is_dir():
        raise UserError(f"--results={results} is not a folder: give one with lines of experiments.matrix or bench.py")
    print_conclusions(results, config.model)
    if config.plots:
        save_plots(results, config.model)
    if config.write:
        write_pages(ROOT, results)
        print0(f"{', '.join(PAGES)} are up to date")


if __name__ == "__main__":
    script(main)
