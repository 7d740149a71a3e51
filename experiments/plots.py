"""The plots in results/, drawn from the lines beside them. Needs the [plot] extra."""

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

from bench import plot_batching
from experiments.matrix import MODELS
from experiments.verdicts import Runs, first_seed, read_runs, read_starts, warn_once
from lib.cli import UserError, print0
from lib.results import read_lines


def mean_point(runs: Runs, name: str) -> tuple[float, float, float] | None:
    """(stored parameters of the block in millions, mean loss, standard deviation); None if it was not run."""
    if not (seeds := list(runs.get(name, {}).values())):
        return None
    losses = [line["loss"] for line in seeds]
    return (seeds[0]["params"]["stored_block"] / 1e6, statistics.mean(losses),
            statistics.stdev(losses) if len(losses) > 1 else 0.0)


def plot_line(axes, runs: Runs, names: list[str], label: str, xs: list[float] | None = None, style: str = "o-") -> None:
    """A line through these runs, at xs or at their stored parameters, with standard deviations."""
    points = [(p[0] if xs is None else xs[i], *p[1:]) for i, n in enumerate(names) if (p := mean_point(runs, n))]
    if points:
        x, y, error = zip(*sorted(points), strict=True)
        axes.errorbar(x, y, error, fmt=style, markersize=4, capsize=2, label=label)


def mean_curve(lines: Iterable[dict]) -> list[list[float]]:
    """[tokens, validation loss] during training, the mean over seeds."""
    return [[statistics.mean(point) for point in zip(*points, strict=True)]
            for points in zip(*(line["curve"] for line in lines), strict=True)]


def plot_inits(axes, runs: Runs, ranks) -> None:
    """Losses above the donor's on the same text, which is shorter during training than at its ends."""
    short = first_seed(runs["donor"]) if "donor" in runs else None
    for name in ("stepwise", "average", "lower", "random"):
        lines = list(runs.get(name, {}).values())
        if lines:
            curve = mean_curve(lines) if short else []
            ends = [[tokens, statistics.mean(line[loss] - line["donor_loss"] for line in lines)]
                    for tokens, loss in ((0, "start_loss"), (lines[0]["settings"]["tokens"], "loss"))]
            points = [ends[0], *([tokens, loss - short["loss"]] for tokens, loss in curve), ends[1]]
            axes.plot(*zip(*points, strict=True), "o-", markersize=4, label=f"tied, {name}")
    axes.set(xlabel="tokens of uptraining", ylabel="validation loss above the donor's")


def plot_pareto(axes, runs: Runs, ranks) -> None:
    svd = [f"average-r{r}" for r in ranks]
    plot_line(axes, runs, ["stepwise", *svd], "2 loops: tied, then average + SVD by rank")
    plot_line(axes, runs, ["stepwise-3x", f"{svd[2]}-3x"], "3 loops", style="s-")
    plot_line(axes, runs, ["full"], "full size, same tokens", style="k*")
    if "stepwise" in runs:
        axes.axhline(first_seed(runs["stepwise"])["donor_loss"], color="k", linewidth=0.8, label="donor")
    axes.set(xlabel="parameters stored without embeddings, millions", ylabel="validation loss")


def plot_rank(axes, runs: Runs, ranks) -> None:
    xs = [0, *ranks]
    plot_line(axes, runs, ["average", *(f"average-r{r}" for r in ranks)], "average + SVD", xs)
    plot_line(axes, runs, ["average", *(f"average-r{r}-zero" for r in ranks)], "average, LoRA from zero", xs, "s--")
    plot_line(axes, runs, [f"stepwise-r{ranks[2]}"], "stepwise + SVD", xs[3:], "^")
    axes.set(xlabel="LoRA rank (0: tied)", ylabel="validation loss")


def plot_calibrated(start, uptraining, smollm2, results: Path) -> None:
    """Average + SVD and calibrated starts in three panels: right after conversion, and during uptraining."""
    starts, runs, mid = read_starts(results, "SmolLM2-135M"), read_runs(results, "toy"), MODELS["toy"].ranks[1]
    for init, label, tokens in (("average", "average + SVD", None), ("calibrated", "calibrated (ours)", 20_480)):
        points = sorted((rank, line["loss"]["books"][-1]) for (start_init, loops, rank, n), line in starts.items()
                        if (start_init, loops, n) == (init, 2, tokens))
        start.plot(*zip(*points, strict=True), "o-", markersize=4, label=label)
        uptraining.plot(*zip(*mean_curve(runs[f"{init}-r{mid}-long"].values()), strict=True), label=label)
        line = [line for line in read_lines(results / "calibrated_smollm2.jsonl") if line["init"] == init][0]
        smollm2.plot(*zip(*line["curve"], strict=True), label=label)
    start.axhline(first_seed(starts)["donor_loss"]["books"][0], color="k", linewidth=0.8, label="donor")
    uptraining.axhline(first_seed(runs["donor"])["loss"], color="k", linewidth=0.8, label="donor")
    smollm2.axhline(line["donor_loss"], color="k", linewidth=0.8, label="donor")
    start.set(title="SmolLM2-135M, 2 loops: right after conversion", xlabel="LoRA rank", ylabel="loss, other books")
    uptraining.set(title=f"shipped donor, rank {mid}: in uptraining", xlabel="tokens", ylabel="validation loss")
    smollm2.set(title=f"SmolLM2-135M, rank {line['rank']}: in uptraining", xlabel="tokens", ylabel="validation loss")


def save_plots(results: Path, model: str) -> None:
    """Draw every plot of this model into `results`. Warns about those whose lines are missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError('--plots needs matplotlib: pip install -e ".[plot]"') from None
    runs, ranks = read_runs(results, model), MODELS[model].ranks
    prefix = "" if model == "toy" else f"{model}_"

    def save(name: str, draw: Callable, size: tuple = (7, 4)) -> None:
        figure, path = Figure(figsize=size, layout="constrained"), results / f"{prefix}{name}.png"
        try:
            draw(figure, path)
        except (LookupError, ValueError) as e:               # lines are missing or incomplete
            warn_once(f"{path} is not drawn: lines that it needs are not in {results} ({e!r})")
            return
        for axes in figure.axes:
            axes.grid(alpha=0.3)
            if axes.get_legend_handles_labels()[1]:
                axes.legend()
        if figure.axes:
            figure.savefig(path, dpi=120)
        print0(f"wrote {path}")

    for name, draw in (("inits", plot_inits), ("pareto", plot_pareto), ("rank", plot_rank)):
        save(name, lambda figure, _, draw=draw: draw(figure.subplots(), runs, ranks))
    if model == "toy":
        save("batching", lambda _, path: plot_batching(read_lines(results / "batching.jsonl")[0], str(path)))
        save("calibrated", lambda figure, _: plot_calibrated(*figure.subplots(1, 3), results), (14, 4))
