"""Slots, a queue and a clock: the paper's own way to a speed (App. K), behind `bench.py --what=batching --simulate`.

It asks no engine. Known are the seconds of a pass and how many passes each token takes; a slot whose request is done
takes the next from the queue, and the speed is the tokens by the seconds until all are done. As in the paper nothing is
counted but the block's passes, unless seconds of the head and of the prompts are given as well.
"""

import heapq
import json
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from lib.cli import UserError, progress, table

How = Literal["depth-wise", "synchronous", "static"]


@dataclass
class Times:
    """A row of Table K.1, and what Table K.2 says that it comes to on SlimPajama, RedPajama and PG19."""
    name: str
    n_loop: int                                              # 1 = full size: a pass is all its layers
    batch: int                                               # slots
    ms: float                                                # of a pass, per token: divided by the batch already
    tokens_per_s: tuple[float | None, ...] = (None,)         # published, text by text
    left: tuple[float | None, ...] = (None,)                 # share that leaves after loop 1, of 2; None = not told


TEXTS = ("SlimPajama", "RedPajama", "PG19")
TIED, RELAXED = (0.80, 0.76, 0.44), (0.69, 0.63, None)       # what Gemma's rows with 2 loops imply, taken together
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


def leave_probability(n_loop: int, mean_loops: float) -> float:
    """The chance to leave after each loop but the last with which tokens run `mean_loops` on average.

    >>> leave_probability(2, 1.25), leave_probability(3, 3.0)
    (0.75, 0.0)
    """
    low, high = 0.0, 1.0                                     # the higher, the fewer loops
    for _ in range(60):
        middle = (low + high) / 2
        more = sum((1 - middle)**loop for loop in range(n_loop)) > mean_loops
        low, high = (middle, high) if more else (low, middle)
    return round(high, 12)


def draw_exits(lengths: list[int], n_loop: int, leave: float, seed: int) -> list[np.ndarray]:
    """For each request the loops 0 to n_loop - 1 after which its tokens leave, each of the early ones with probability
    `leave`."""
    draw = np.random.default_rng(seed)
    stay = draw.random((sum(lengths), n_loop - 1)) >= leave                # (tokens, early loops)
    return np.split(np.cumprod(stay, axis=1).sum(1), np.cumsum(lengths)[:-1])


def count_passes(work: list[np.ndarray], slots: int, how: How) -> int:
    """Passes until all requests are done; work: for each, the passes that its tokens take.

    depth-wise: a token starts when the one before is done. synchronous: when those of all slots are. static: as
    depth-wise, but a request when those of all slots are done.
    """
    if how == "static":
        return sum(int(max(tokens.sum() for tokens in work[i:i + slots])) for i in range(0, len(work), slots))
    if how == "depth-wise":                                  # who comes next goes to the slot that is free first
        free = [0] * slots
        for tokens in work:
            heapq.heapreplace(free, free[0] + int(tokens.sum()))
        return max(free)
    queue, running, passes = list(reversed(work)), [], 0     # running: (tokens, index of the next)
    while queue or running:
        while queue and len(running) < slots:
            running.append((queue.pop(), 0))
        passes += int(max(tokens[i] for tokens, i in running))
        running = [(tokens, i + 1) for tokens, i in running if i + 1 < len(tokens)]
    return passes


def simulate(work: list[np.ndarray], slots: int, pass_s: float, how: How = "depth-wise", head_s: float = 0.0,
             prefill_s: float = 0.0) -> float:
    """Tokens/s; head_s: what the head adds to a pass, prefill_s: what all prompts take together."""
    seconds = count_passes(work, slots, how) * (pass_s + head_s) + prefill_s
    return sum(map(len, work)) / seconds


def read_times(path: str) -> list[Times]:
    """The rows of a file: [{"name": ..., "n_loop": 2, "batch": 43, "ms": 0.265, "left": [0.8]}, ...]."""
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


def leave_of(row: Times, text: int, default: float) -> tuple[float, str]:
    """The chance to leave after each loop but the last on a text, and where it is from."""
    share = row.left[text] if text < len(row.left) else None
    published = row.tokens_per_s[text] if text < len(row.tokens_per_s) else None
    if share is not None:
        return share, "given"
    if published is None:
        return default, "--mean_loops"
    mean = min(max(1.0, 1000 / (row.ms * published)), row.n_loop)          # a token takes ms x mean loops
    return leave_probability(row.n_loop, mean), "this row's own"


def bench_simulate(config) -> dict:
    """Tokens/s by simulation from times of a pass: the paper's, or a file's."""
    rows, numbers = read_times(config.times) if config.times else PAPER, []
    half = -(-config.new_tokens // 2)
    lengths = np.random.default_rng(0).integers(half, config.new_tokens * 3 // 2 + 1, config.requests or 20_000)
    for row in progress(rows, desc="simulating", unit="row"):
        default = config.exit_prob if config.exit_prob is not None else \
            leave_probability(row.n_loop, min(config.mean_loops, row.n_loop))
        for text in range(max(len(row.left), len(row.tokens_per_s))):
            leave, source = leave_of(row, text, default) if row.n_loop > 1 else (0.0, "")
            work = [1 + loops for loops in draw_exits(lengths.tolist(), row.n_loop, leave, seed=1)]
            speed = simulate(work, row.batch, row.ms * row.batch / 1000)
            published = row.tokens_per_s[text] if text < len(row.tokens_per_s) else None
            numbers.append({"name": row.name, "text": TEXTS[text] if row in PAPER else text + 1, "batch": row.batch,
                            "ms": row.ms, "mean_loops": float(np.concatenate(work).mean()), "exits_from": source,
                            "tokens_per_s": speed, "published": published})
    lines = [["", "text", "slots", "ms", "mean loops", "from", "tok/s", "published", "of it"]]
    lines += [[n["name"], n["text"], n["batch"], n["ms"], f"{n['mean_loops']:.3f}", n["exits_from"],
               f"{n['tokens_per_s']:,.0f}", f"{n['published']:,.0f}" if n["published"] else "",
               f"{n['tokens_per_s'] / n['published']:.3f}" if n["published"] else ""] for n in numbers]
    print(f"{len(lengths):,} requests; the block alone is counted\n{table(lines)}")
    return {"times": [asdict(row) for row in rows], "rows": numbers}
