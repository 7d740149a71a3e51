"""Simulates depth-wise batching as the paper does (App. K): slots, a queue and a clock, but no model.

Given are the seconds of a pass and the number of passes that each token takes. A slot whose request is done takes the
next one from the queue; the speed is all tokens by the seconds until all requests are done. As in the paper nothing
but the block's passes counts. It shows that the published speeds follow from the published times; bench.py measures.

    python -m benchmarks.simulate                                # the paper's times of a pass (Table K.1)
    python -m benchmarks.simulate --times=FILE --mean_loops=1.5
"""

import heapq
import json
from dataclasses import asdict, dataclass

import numpy as np

from benchmarks.common import check_at_least, run_and_publish
from lib.cli import UserError, parse_args, progress, script, table


@dataclass
class SimulateConfig:
    requests: int = 0                      # how many are simulated; 0 = 20,000
    new_tokens: int = 64                   # mean tokens of a request; each has half to 1.5 times as many
    mean_loops: float = 1.25               # mean loops of a token, where the times do not imply it
    exit_prob: float | None = None         # probability to exit after each early loop, instead of mean_loops
    times: str | None = None               # JSON file with times of a pass; not set = the paper's
    save: str | None = None                # also append the JSON line to this file


@dataclass
class Times:
    """A row of Table K.1, and the tokens/s of Table K.2 on SlimPajama, RedPajama and PG19."""
    name: str
    n_loop: int                                              # 1 = full size: a pass runs all its layers
    batch: int                                               # slots
    ms: float                                                # milliseconds of a pass, divided by the batch
    tokens_per_s: tuple[float | None, ...] = (None,)         # published, for each text
    left: tuple[float | None, ...] = (None,)                 # share of tokens that exit after loop 1 of 2, if known


TEXTS = ("SlimPajama", "RedPajama", "PG19")
TIED, RELAXED = (0.80, 0.76, 0.44), (0.69, 0.63, None)       # what all of Gemma's rows with 2 loops imply
PAPER = [
    Times("Gemma, sequence batching", 1, 43, 0.616, (1622, 1604, 1357)),
    Times("Gemma, 2 loops, tied", 2, 43, 0.265, (3159, 3050, 2421), TIED),
    Times("Gemma, 2 loops, rank 64", 2, 41, 0.323, (2357, 2255, 1858), RELAXED),
    Times("Gemma, 2 loops, rank 128", 2, 41, 0.324, (2355, 2250, 1844), RELAXED),
    Times("Gemma, 2 loops, rank 256", 2, 39, 0.372, (2047, 1976, 1740), RELAXED),
    Times("Gemma, 2 loops, rank 512", 2, 39, 0.422, (1806, 1754, 1598), RELAXED),
    Times("Gemma, 3 loops, tied", 3, 43, 0.182, (3120, 3041, 2729)),
    Times("Gemma, 3 loops, rank 512", 3, 39, 0.237, (2181, 2122, 1900)),
    Times("TinyLlama, 2 loops, tied", 2, 233, 0.413, (2038, 2023, 1933), (0.81, 0.80, 0.75)),
    Times("TinyLlama, 2 loops, rank 512", 2, 209, 0.428, (1716, 1702, 1581)),
    Times("Pythia, 2 loops, tied", 2, 61, 0.606, (1339, 1333, 1281), (0.77, 0.77, None)),
    Times("Pythia, 2 loops, rank 512", 2, 53, 0.702, (1051, 1077, 1021)),
]


def exit_probability(n_loop: int, mean_loops: float) -> float:
    """The probability to exit after each loop but the last with which tokens run `mean_loops` on average.

    >>> exit_probability(2, 1.25), exit_probability(3, 3.0)
    (0.75, 0.0)
    """
    low, high = 0.0, 1.0                                     # bisection: a higher probability means fewer loops
    for _ in range(60):
        middle = (low + high) / 2
        too_low = sum((1 - middle)**loop for loop in range(n_loop)) > mean_loops
        low, high = (middle, high) if too_low else (low, middle)
    return round(high, 12)


def check_exits(config) -> None:
    """Raise UserError if --mean_loops or --exit_prob is out of range."""
    if not config.mean_loops >= 1:                           # also false for NaN
        raise UserError(f"--mean_loops={config.mean_loops} must be 1 or more")
    if config.exit_prob is not None and not 0 <= config.exit_prob <= 1:
        raise UserError(f"--exit_prob={config.exit_prob} is a probability: 0 to 1")


def draw_exits(lengths: list[int], n_loop: int, exit_prob: float, seed: int) -> list[np.ndarray]:
    """For each request the loops, 0 to n_loop - 1, after which its tokens exit: each early loop with the probability
    `exit_prob`."""
    draw = np.random.default_rng(seed)
    stay = draw.random((sum(lengths), n_loop - 1)) >= exit_prob            # (tokens, early loops)
    return np.split(np.cumprod(stay, axis=1).sum(1), np.cumsum(lengths)[:-1])


def count_passes(work: list[np.ndarray], slots: int) -> int:
    """Passes until all requests are done. work: for each request, the number of passes of each token. The next request
    takes the slot that is free first, and a token starts when the one before it is done."""
    free_at = [0] * slots
    for tokens in work:
        heapq.heapreplace(free_at, free_at[0] + int(tokens.sum()))
    return max(free_at)


def simulate(work: list[np.ndarray], slots: int, pass_s: float) -> float:
    """Tokens/s, if a pass takes `pass_s` seconds."""
    return sum(map(len, work)) / (count_passes(work, slots) * pass_s)


def read_times(path: str) -> list[Times]:
    """The rows of a file: [{"name": ..., "n_loop": 2, "batch": 43, "ms": 0.265, "left": [0.8]}, ...]. Raises UserError
    for a file that is not of this form."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            rows = [Times(**row) for row in json.load(f)]
        for row in rows:
            row.tokens_per_s, row.left = tuple(row.tokens_per_s), tuple(row.left)
            if not (row.n_loop >= 1 and row.batch >= 1 and row.ms > 0 and all(p is None or 0 <= p <= 1
                                                                              for p in row.left)):
                raise ValueError(f"{row.name}: loops, batch and ms are positive, shares between 0 and 1")
        if not rows:
            raise ValueError("no rows")
    except (OSError, ValueError, TypeError, AttributeError) as e:
        raise UserError(f"--times={path} cannot be used ({e}); give a JSON file such as "
                        '[{"name": "tied", "n_loop": 2, "batch": 43, "ms": 0.265, "left": [0.8]}]') from None
    return rows


def exit_probability_of(row: Times, text: int, default: float) -> tuple[float, str]:
    """(the probability to exit after each loop but the last on a text, where it is from)."""
    share = row.left[text] if text < len(row.left) else None
    published = row.tokens_per_s[text] if text < len(row.tokens_per_s) else None
    if share is not None:
        return share, "given"
    if published is None:
        return default, "--mean_loops"
    mean = min(max(1.0, 1000 / (row.ms * published)), row.n_loop)          # a token takes ms x mean loops
    return exit_probability(row.n_loop, mean), "this row's own"


def simulate_row(row: Times, text: int, lengths: list[int], config: SimulateConfig) -> dict:
    """Simulated and published tokens/s of one row of times on one text."""
    default = exit_probability(row.n_loop, min(config.mean_loops, row.n_loop)) if config.exit_prob is None \
        else config.exit_prob
    exit_prob, source = exit_probability_of(row, text, default) if row.n_loop > 1 else (0.0, "")
    work = [1 + loops for loops in draw_exits(lengths, row.n_loop, exit_prob, seed=1)]
    return {"name": row.name, "text": TEXTS[text] if row in PAPER else text + 1, "batch": row.batch, "ms": row.ms,
            "mean_loops": float(np.concatenate(work).mean()), "exits_from": source,
            "tokens_per_s": simulate(work, row.batch, row.ms * row.batch / 1000),
            "published": row.tokens_per_s[text] if text < len(row.tokens_per_s) else None}


def bench_simulate(config: SimulateConfig) -> dict:
    """Simulated tokens/s from times of a pass, the paper's or a file's, beside the published ones."""
    times = read_times(config.times) if config.times else PAPER
    half = -(-config.new_tokens // 2)
    lengths = np.random.default_rng(0).integers(half, config.new_tokens * 3 // 2 + 1, config.requests or 20_000)
    rows = []
    for row in progress(times, desc="simulating", unit="row"):
        rows += [simulate_row(row, text, lengths.tolist(), config)
                 for text in range(max(len(row.left), len(row.tokens_per_s)))]
    lines = [["", "text", "slots", "ms", "mean loops", "from", "tok/s", "published", "of published"]]
    lines += [[r["name"], r["text"], r["batch"], r["ms"], f"{r['mean_loops']:.3f}", r["exits_from"],
               f"{r['tokens_per_s']:,.0f}", f"{r['published']:,.0f}" if r["published"] else "",
               f"{r['tokens_per_s'] / r['published']:.3f}" if r["published"] else ""] for r in rows]
    print(f"{len(lengths):,} requests; only the block's passes count\n{table(lines)}")
    return {"times": [asdict(row) for row in times], "rows": rows}


def main(argv=None):
    config = parse_args(SimulateConfig, argv)
    check_at_least(config, 1, "new_tokens")
    check_at_least(config, 0, "requests")
    check_exits(config)
    run_and_publish("simulate", config, bench_simulate)


if __name__ == "__main__":
    script(main)
