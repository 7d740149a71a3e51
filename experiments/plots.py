"""The plots in results/, drawn from the lines beside them. Needs the [plot] extra."""

import sys
from collections.abc import Callable
from pathlib import Path

from bench import plot_batching
from experiments.claims import Measured
from experiments.evidence import matrix_lines, short_loss
from experiments.tables import batching_case, read_starts
from experiments.verdicts import mean_loss
from lib.cli import UserError, print0

# Curve -> the arms on it, from small to large
CURVES = {"toy": {"tied, then average + SVD by rank": ["stepwise", "average-r6", "average-r24", "average-r48"],
                  "calibrated (ours)": ["calibrated-r6", "calibrated-r24", "calibrated-r48"],
                  "plain low rank, nothing shared": ["low-rank-0", "low-rank-6", "low-rank-24"], "full size": ["full"]},
          "smollm2": {"tied, then average + SVD": ["stepwise", "average-r64"], "calibrated (ours)": ["calibrated-r64"],
                      "plain low rank, nothing shared": ["low-rank-0", "low-rank-64"], "full size": ["full"]}}


def plot_frontier(axes, results: Path, name: str) -> None:
    """Loss against the stored share of the donor's block: dashed before training, solid after. On the test books, or,
    where only short runs were made, on the validation text."""
    study, lines = matrix_lines(results, name)
    finished = any(run.stage == "main" for run in lines) or not any(run.stage == "rate" for run in lines)

    def loss(arm: str, trained: bool) -> float | None:
        if not finished:
            return short_loss(study, lines, Measured(arm, -1, trained))
        found = mean_loss(lines, Measured(arm, -1, trained))
        return found and found[0]
    stored = {run.arm: line["params"]["stored_block"] for run, line in lines.items()}
    for i, (label, arms) in enumerate(CURVES[name].items()):
        for trained, style in ((False, "o--"), (True, "o-")):
            points = [(100 * stored[arm] / stored["donor"], at) for arm in arms if (at := loss(arm, trained))]
            if points:
                axes.plot(*zip(*points, strict=True), style, color=f"C{i}", markersize=4, alpha=1 if trained else 0.5,
                          label=f"{label}, {'after' if trained else 'before'} training")
    donor = loss("donor", False) if finished else next(
        line["valid"]["donor"] for run, line in lines.items() if run.stage == "rate")
    axes.axhline(donor, color="k", linewidth=0.8, label="donor")
    text, tokens = ("test books", study.tokens) if finished else ("validation text", study.rate_tokens)
    axes.set(xlabel="stored share of the donor's block, %", ylabel=f"loss on the {text}, {tokens:,} tokens")


def plot_starts(axes, results: Path) -> None:
    """SmolLM2 right after conversion, by what is stored."""
    starts = read_starts(results, "SmolLM2-135M")
    for init, label, tokens in (("average", "average + SVD", None), ("calibrated", "calibrated (ours)", 20_480)):
        points = sorted((rank, line["loss"]["books"][-1]) for (start_init, loops, rank, n), line in starts.items()
                        if (start_init, loops, n) == (init, 2, tokens))
        axes.plot(*zip(*points, strict=True), "o-", markersize=4, label=label)
    axes.axhline(next(iter(starts.values()))["donor_loss"]["books"][0], color="k", linewidth=0.8, label="donor")
    axes.set(title="SmolLM2-135M, 2 loops: right after conversion", xlabel="LoRA rank (256 stores 121 % of the block)",
             ylabel="loss, other books")


def save_plots(results: Path) -> None:
    """Draw every plot into `results`. Warns about those whose lines are missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError('--plots needs matplotlib: pip install -e ".[plot]"') from None

    def save(name: str, draw: Callable) -> None:
        figure, path = Figure(figsize=(7, 4), layout="constrained"), results / f"{name}.png"
        try:
            draw(figure, path)
        except (LookupError, ValueError) as e:               # lines are missing or incomplete
            print(f"{path} is not drawn: lines that it needs are not in {results} ({e!r})", file=sys.stderr)
            return
        for axes in figure.axes:
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
        if figure.axes:
            figure.savefig(path, dpi=120)
        print0(f"wrote {path}")

    for study in CURVES:
        save(f"frontier_{study}", lambda figure, _, study=study: plot_frontier(figure.subplots(), results, study))
    save("calibrated", lambda figure, _: plot_starts(figure.subplots(), results))
    save("batching", lambda _, path: plot_batching(batching_case(results, trained=True), str(path)))
