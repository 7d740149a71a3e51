"""Statistics of the claims, fixed before the runs: paired differences, a bootstrap over seeds and books, Holm.

Two arms of one seed read the same text in the same order, and are scored on the same books. So what is compared is the
difference of their losses for each seed and book, a table (seeds, books). Its mean over other seeds and other books is
estimated by drawing both anew, with replacement and apart from one another (a two-way bootstrap). A claim's p-value is
the largest of its parts', since all have to hold; over the eight claims the p-values are corrected by Holm's method.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from experiments.arms import Study
from experiments.claims import EQUIVALENT, Claim, Comparison, Measured
from experiments.matrix import Lines

HOLDS, FAILS, OPEN, MISSING = "holds", "does not hold", "cannot tell", "not run"
DRAWS, LEVEL = 10_000, 0.05


@dataclass
class Result:
    """How a comparison came out, in nats: mean of b - a, its 95 % interval, and the p-value of its opposite."""
    difference: float
    low: float
    high: float
    p: float
    seeds: int


def losses(lines: Lines, measured: Measured) -> dict[int, dict[str, float]]:
    """Seed -> book -> loss. A start has been scored for one seed and stands for all."""
    stages = ("main", "exits") if measured.trained else ("start",)
    return {run.seed: {book: exits[measured.loop] for book, exits in line["books"].items()}
            for run, line in lines.items() if run.arm == measured.arm and run.stage in stages}


def paired_differences(lines: Lines, comparison: Comparison) -> np.ndarray:
    """b - a (seeds, books), for the seeds that both have."""
    a, b = (losses(lines, each) for each in comparison[:2])
    seeds = sorted(a) if not comparison.b.trained else sorted(a.keys() & b.keys())
    if not comparison.b.trained and b:
        b = dict.fromkeys(seeds, next(iter(b.values())))
    return np.array([[b[seed][book] - a[seed][book] for book in sorted(a[seed])] for seed in seeds if b])


@cache
def draws(seeds: int, books: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each seed (DRAWS, seeds) and each book (DRAWS, books) is drawn."""
    rng = np.random.default_rng(0)
    return tuple(rng.multinomial(n, [1 / n] * n, DRAWS) for n in (seeds, books))


def bootstrap_means(differences: np.ndarray) -> np.ndarray:
    """The mean difference in each draw of seeds and books, (DRAWS,)."""
    by_seed, by_book = draws(*differences.shape)
    return np.einsum("ds,sb,db->d", by_seed, differences, by_book) / differences.size


def compare(lines: Lines, comparison: Comparison) -> Result | None:
    """None if one of the two was not run."""
    differences = paired_differences(lines, comparison)
    if not differences.size:
        return None
    means = bootstrap_means(differences)
    low, high = np.quantile(means, (0.025, 0.975))
    against = ((means <= 0).sum() if not comparison.alike else
               max((means >= EQUIVALENT).sum(), (means <= -EQUIVALENT).sum()))
    return Result(float(differences.mean()), float(low), float(high), float((against + 1) / (DRAWS + 1)),
                  len(differences))


def opposite(result: Result, alike: bool) -> bool:
    """Whether the interval contradicts the comparison."""
    return max(result.low, -result.high) > EQUIVALENT if alike else result.high < 0


def holm(p_values: list[float]) -> list[float]:
    """The p-values, corrected for their number: the smallest times n, the next times n - 1, ..., never falling."""
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = worst
    return adjusted


def verdicts(lines: Lines, given: list[Claim]) -> dict[str, tuple[str, float | None]]:
    """Claim -> (verdict, corrected p-value or None). With one seed nobody can tell."""
    results = {claim.name: [compare(lines, part) for part in claim.parts] for claim in given}
    complete = {name: parts for name, parts in results.items() if all(parts)}
    # All claims count, also those not run yet: a claim must not be easier to prove in a matrix that was stopped.
    p = dict(zip(complete, holm([max(part.p for part in parts) for parts in complete.values()]
                                + [1.0] * (len(given) - len(complete))), strict=False))
    found = {}
    for claim in given:
        parts = [(result, part.alike) for result, part in zip(results[claim.name], claim.parts, strict=True) if result]
        if any(opposite(result, alike) and result.seeds > 1 for result, alike in parts):
            found[claim.name] = FAILS, p.get(claim.name)
        elif claim.name not in complete:
            found[claim.name] = MISSING, None
        else:
            enough = all(result.seeds > 1 for result, _ in parts) and p[claim.name] < LEVEL
            found[claim.name] = (HOLDS if enough else OPEN), p[claim.name]
    return found


def mean_loss(lines: Lines, measured: Measured) -> tuple[float, float, int] | None:
    """(mean over books and seeds, standard deviation over seeds of the books' mean, seeds); None if it was not run."""
    means = [float(np.mean(list(books.values()))) for books in losses(lines, measured).values()]
    if not means:
        return None
    return float(np.mean(means)), float(np.std(means, ddof=1)) if len(means) > 1 else 0.0, len(means)


def gap_shares(lines: Lines, study: Study, arm: str) -> np.ndarray:
    """For each seed, the share of the gap between the tied model and the full-size one, both trained on the same
    tokens, that `arm` closes: as of the paper's figures."""
    tied, relaxed, full = (losses(lines, Measured(name)) for name in ("stepwise", arm, "full"))
    means = [[float(np.mean(list(found[seed].values()))) for found in (tied, relaxed, full)]
             for seed in sorted(tied.keys() & relaxed.keys() & full.keys())]
    return np.array([(t - r) / (t - f) for t, r, f in means])
