"""Reads the lines in results/ by run and seed, and tests the claims of the conclusions on them."""

import math
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from experiments.conclusions import Conclusion, ExitLoss, Measured, conclusions
from experiments.matrix import MODELS, changed_settings, exit_run, extra_runs
from lib.results import read_lines

ALIKE = 0.05                                   # nats; losses that differ by less count as alike
HOLDS, FAILS, OPEN, MISSING = "holds", "does not", "cannot tell", "not run"
Runs = dict[str, dict[int, dict]]              # run of the matrix -> seed -> its line
Losses = dict[Measured, dict[int, float]]      # what was measured -> seed -> loss in nats


# ---------------------------------------------------------------------------------------------------------------------
# Reading

@cache
def warn_once(text: str) -> None:
    print(text, file=sys.stderr)


def with_same_settings(lines: list[dict], settings: Callable[[dict], tuple]) -> list[dict]:
    """The lines with the most frequent settings (of equally frequent ones the last): only these are
    comparable. Warns about the lines that are left out."""
    found = [settings(line) for line in lines]
    counts = Counter(found)
    most = max(reversed(found), key=counts.__getitem__, default=None)
    for other, n in counts.items():
        if other != most:
            differs = ", ".join(f"{key}={value}" for key, value in other if (key, value) not in most)
            warn_once(f"{n} lines of other settings ({differs or 'the default ones'}) are left out; results in a "
                      "folder of their own can be read with --results")
    return [line for line, each in zip(lines, found, strict=True) if each == most]


def settings_without(*names: str) -> Callable[[dict], tuple]:
    """For `with_same_settings`: a function that gives a line's settings without these, without those that
    change no figure, and without those that are not set."""
    ignored = {"save", "device", "plot", "ckpt", *names}
    return lambda line: tuple(sorted((key, str(value)) for key, value in line["settings"].items()
                                     if key not in ignored and value is not None))


def read_runs(results: Path, model: str) -> Runs:
    """The lines of experiments.jsonl for this model; if a run was measured twice, the last."""
    runs: Runs = {}
    lines = [line for line in read_lines(results / "experiments.jsonl") if line.get("model") == model]
    for line in with_same_settings(lines, changed_settings):
        runs.setdefault(line["name"], {})[line["seed"]] = line
    return runs


def exit_lines(results: Path, model: str) -> list[dict]:
    """The lines of experiments/exits_seeds.sh (toy) or experiments/smollm2.sh."""
    return with_same_settings([line for line in read_lines(results / "exits_seeds.jsonl")
                               if "exit_loss" in line and exit_run(line, model)], settings_without())


def read_exits(results: Path, model: str) -> Losses:
    """The loss after each loop, by how the exits were trained."""
    losses: Losses = {}
    for line in exit_lines(results, model):
        run = exit_run(line, model)
        for loop, loss in enumerate(line["exit_loss"], 1):
            losses.setdefault(ExitLoss(run.kind, run.training, loop), {})[run.seed] = loss
    return losses


def all_losses(results: Path, model: str) -> Losses:
    """Everything that the conclusions compare."""
    losses = {name: {seed: line["loss"] for seed, line in seeds.items()}
              for name, seeds in read_runs(results, model).items()}
    return losses | read_exits(results, model)


def read_starts(results: Path, donor: str) -> dict[tuple, dict]:
    """(init, loops, rank, tokens calibrated on or None) -> its line of calibrated.jsonl."""
    lines = [line for line in read_lines(results / "calibrated.jsonl") if line["settings"]["donor"] == donor]
    if not lines:
        raise LookupError(f"no line of {donor} in calibrated.jsonl")
    return {(line["init"], line["loops"], line["rank"], line.get("calib_tokens")): line
            for line in with_same_settings(lines, settings_without("loops", "ranks", "calib_tokens"))}


def first_seed(seeds: dict[int, dict]) -> dict:
    return next(iter(seeds.values()))


# ---------------------------------------------------------------------------------------------------------------------
# Statistics

def spread(values: Iterable[float]) -> str:
    """Mean ± standard deviation (n - 1); only the mean of one value, empty for none."""
    values = list(values)
    if len(values) < 2:
        return "".join(f"{v:.3f}" for v in values)
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def difference(a: list[float], b: list[float]) -> tuple[float, float]:
    """(mean of b - mean of a, its standard error), for at least two seeds each."""
    error = math.sqrt(sum(statistics.variance(x) / len(x) for x in (a, b)))
    return statistics.mean(b) - statistics.mean(a), error


def judge(claim: tuple[Measured, str, Measured], losses: Losses) -> tuple[str, str]:
    """(verdict, the difference that decides it) of a claim.

    (a, "<", b) holds if the loss of a is lower by more than twice the standard error of the difference, (a,
    "~", b) if the difference is smaller than ALIKE by that margin. If the opposite is true by that margin,
    the claim does not hold. Otherwise, and with one seed, nobody can tell.
    """
    left, sign, right = claim
    a, b = (list(losses.get(measured, {}).values()) for measured in (left, right))
    if not a or not b:
        return MISSING, ""
    if min(len(a), len(b)) < 2:
        return OPEN, f"{statistics.mean(b) - statistics.mean(a):+.4f}, one seed"
    d, error = difference(a, b)
    margin = d if sign == "<" else ALIKE - abs(d)            # positive in favour of the claim
    evidence = f"{d:+.4f} ± {error:.4f}"
    if margin - 2 * error > 0:
        return HOLDS, evidence
    return FAILS if margin + 2 * error < 0 else OPEN, evidence


def verdict(conclusion: Conclusion, losses: Losses) -> str:
    """HOLDS if all claims hold, FAILS if one does not; otherwise what prevents a verdict."""
    verdicts = [judge(claim, losses)[0] for claim in conclusion.claims]
    return next((v for v in (FAILS, MISSING, OPEN) if v in verdicts), HOLDS)


def gap(runs: Runs, rank: int) -> list[list[str]]:
    """Rows of tokens, loss of the tied model, loss at this rank, share of the gap between tied model and
    donor that the LoRA closes. Shares are taken seed by seed: both runs of a seed see the same text in the
    same order."""
    rows = []
    for suffix in ("-quarter", "", "-fourfold"):
        tied, relaxed = (runs.get(name + suffix, {}) for name in ("stepwise", f"average-r{rank}"))
        if both := sorted(tied.keys() & relaxed.keys()):
            donor, tokens = tied[both[0]]["donor_loss"], tied[both[0]]["settings"]["tokens"]
            tied_loss, relaxed_loss = ([run[seed]["loss"] for seed in both] for run in (tied, relaxed))
            shares = [(t - r) / (t - donor) for t, r in zip(tied_loss, relaxed_loss, strict=True)]
            rows.append([f"{tokens:,}", spread(tied_loss), spread(relaxed_loss), spread(shares)])
    return rows


def unfinished(runs: Runs, model: str) -> list[str]:
    """Runs of the matrix that lack seeds, as "name (1 of 3)"."""
    ranks, seeds = MODELS[model].ranks, MODELS[model].seeds
    names = [run for c in conclusions(*ranks) for run in c.runs]
    names += [run for group in extra_runs(*ranks).values() for run in group]
    found = {name: len(runs.get(name, {})) for name in names}
    return [f"{name} ({n} of {seeds})" for name, n in found.items() if n < seeds]
