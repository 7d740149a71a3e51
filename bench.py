"""Tokens per second of continuous depth-wise batching (engine.py) beside common ways to batch the same requests.

    python bench.py --shape=small --loops=2 --ranks=0,64       # random weights, exits drawn at random
    python bench.py --ckpt=out_exits --slots=16                # a checkpoint, with the oracle's and its gate's exits

    static                 V0   merged LoRA, all loops; new requests start when all slots are free
    sequence               V1   the same, but a free slot takes the next request: what is commonly served today
    sequence, unmerged     V2   as `sequence`, with the looped model as it is: all tokens are at the same loop
    depthwise              V3   tokens are at different loops; none exits early
    synchronous exits      V4   tokens exit early, and the batch waits for its slowest
    depthwise+exits        V5   tokens exit early, and none waits: what the paper simulates
    ..., head in full batches   V3h, V5h: exited tokens wait until --head_rows of them have gathered; as many more
                                slots keep the block full

The time from the first request to the last token counts: prompts, block, exit decisions, head and scheduler.

The formulas beside it count only passes and the head. Let rho be the seconds of the head over those of a pass of the
unmerged block (one loop, all slots), m the share of that which one loop of a merged block takes, B the number of loops
and E the mean loops of a token. A token then costs m B + rho with sequence batching, E (1 + rho) where the head runs
every pass (policy A), and E + rho where it runs in full batches only (policy C). So the speed-ups over `sequence` are

    every pass  (m B + rho) / (E (1 + rho))            in full batches  (m B + rho) / (E + rho)
"""

import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import torch

from benchmarks.common import ShapeName, by_comma, check_at_least, check_ckpt_or_shape, load_shape, publish, synchronize
from benchmarks.simulate import check_exits, simulate
from benchmarks.workload import Workload, draw_forced_exits, draw_workload
from convert import unroll
from engine import Engine, Request
from exits import Keys, Rule, load_rule
from lib.cli import UserError, parse_args, progress, script, table
from lib.results import check_plot, check_writable
from lib.system import pick_device
from model import Config, RecursiveTransformer


@dataclass
class BatchingConfig:
    ckpt: str | None = None                # looped checkpoint of ours; not set = random weights of the shape
    shape: ShapeName = "donor"             # whose shape: the donor's, or one of benchmarks/common.py
    donor: str = "assets/donor"            # full-size model, a folder or a Hugging Face id
    layers: int = 0                        # use only so many of its layers, for a small machine; 0 = all
    vocab: int = 0                         # vocabulary size; 0 = the shape's
    loops: str = "2,3"                     # numbers of loops, by comma
    ranks: str = "0,16,64"                 # LoRA ranks, by comma
    text: str = "assets/books/valid.txt"   # with --ckpt: text that prompts are cut from
    slots: int = 8                         # sequences at a time
    requests: int = 0                      # how many are served; 0 = four for each slot
    prompt_len: int = 32                   # mean tokens of a prompt; each has half to 1.5 times as many
    new_tokens: int = 64                   # mean new tokens of a request; each has half to 1.5 times as many
    variants: str = ""                     # only these, by comma, with sequence and depthwise among them
    exits: str = ""                        # drawn, oracle, gate, by comma; not set = drawn, with --ckpt oracle,gate
    mean_loops: float = 1.25               # mean loops of a token with drawn exits
    exit_prob: float | None = None         # probability to exit after each early loop, instead of mean_loops
    keys: str = "exact,copy"               # KV of tokens that exited, by comma: exact (recomputed), copy
    refill: int = 1                        # free slots that new prompts wait for, to run together
    head_rows: int = 0                     # rows of the head in full batches; 0 = half the slots
    rounds: int = 1                        # how often all variants serve; the median counts
    plot: str | None = None                # draw tokens/s to this file
    device: str = "auto"                   # auto, cpu, cuda
    save: str | None = None                # also append the JSON line to this file


@dataclass(frozen=True)
class Variant:
    name: str
    head: str                                                # runs every pass, in full batches, or for all slots
    policy: str | None                                       # whose formula applies
    exits: str = "never"                                     # or drawn, oracle, gate
    keys: Keys = "exact"
    merged: bool = False                                     # the unrolled model: one pass runs all loops
    refill: bool = True


STAGE = ", head in full batches"
BASELINES = [Variant("static", "every pass", None, merged=True, refill=False),
             Variant("sequence", "every pass", "in full batches", merged=True),
             Variant("sequence, unmerged", "for all slots", "in full batches"),
             Variant("depthwise", "every pass", "every pass"),
             Variant("depthwise" + STAGE, "in full batches", "in full batches")]
EXITS = [Variant("synchronous exits", "for all slots", "in full batches"),
         Variant("depthwise+exits", "every pass", "every pass"),
         Variant("depthwise+exits" + STAGE, "in full batches", "in full batches")]
NAMES = [variant.name for variant in BASELINES + EXITS]
OLD_NAMES = dict(zip(("V0", "V1", "V2", "V3", "V3h", "V4", "V5", "V5h"), NAMES, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Serving

class TimedEngine(Engine):
    """Waits for the GPU after each part of a step, so that the seconds of each part are its own."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.stats["attention_s"], attend = 0.0, self.cache.attend
        if not self.static:                                  # in a CUDA graph it cannot be timed apart from the block

            def timed_attend(*args):
                began = time.perf_counter()
                found = attend(*args)
                self.stats["attention_s"] += time.perf_counter() - began
                return found
            self.cache.attend = timed_attend

    def timed(self, name: str, work: Callable) -> None:
        self.time_with_gpu(name, partial(super().timed, name, work))         # a graph cannot hold the wait

    def prefill(self, scheduled: list[tuple[int, Request]]) -> None:
        self.time_with_gpu("prefill_s", partial(super().prefill, scheduled))

    def time_with_gpu(self, name: str, part: Callable) -> None:
        """Run a part that adds to its own seconds; if it did, count them to the end of its work on the GPU instead."""
        before, began = self.stats[name], time.perf_counter()
        part()
        if self.stats[name] > before:
            synchronize(self.device)
            self.stats[name] = before + time.perf_counter() - began


def make_engine(variant: Variant, models: dict, rules: dict, config: BatchingConfig, max_len: int,
                timed: bool) -> Engine:
    """models: the model by `Variant.merged`; rules: the gate by `Variant.keys`."""
    head_rows = config.head_rows or max(1, config.slots // 2)
    slots = config.slots + head_rows * (variant.head == "in full batches")
    head = {"for all slots": 0, "every pass": 1, "in full batches": head_rows}[variant.head]
    rule = rules[variant.keys] if variant.exits == "gate" else Rule()
    refill = config.refill if variant.refill else slots
    return (TimedEngine if timed else Engine)(models[variant.merged], slots, max_len, rule, variant.keys, head,
                                              refill=refill)


def serve(engine: Engine, work: Workload, forced_exits: list | None) -> tuple[float, list[Request]]:
    """(seconds until all requests are done, the requests). A short request comes first, for compilation and CUDA
    graphs, and is not counted."""
    engine.generate([work.prompts[0]], min(3, work.lengths[0]))
    engine.stats.update(dict.fromkeys(engine.stats, 0))
    engine.ran.zero_()
    synchronize(engine.device)
    began = time.perf_counter()
    requests = [engine.add(prompt, n, forced_exits=forced_exits and list(forced_exits[i]))
                for i, (prompt, n) in enumerate(zip(work.prompts, work.lengths, strict=True))]
    for _ in engine.run():
        pass
    synchronize(engine.device)
    seconds = time.perf_counter() - began
    assert all(r.status == "done" and len(r.tokens) == n for r, n in zip(requests, work.lengths, strict=True))
    engine.stats |= zip(("rows", "ghost_rows"), engine.ran.tolist(), strict=True)
    return seconds, requests


def run_variants(variants: list[Variant], models: dict, rules: dict, work: Workload,
                 config: BatchingConfig) -> list[dict]:
    """Seconds, requests and the engine's statistics of each variant. They take turns, --rounds times. On a GPU timing
    the parts slows the whole down, so they are timed in one more turn."""
    cuda = models[False].embed.weight.is_cuda
    found = [{"seconds": [], "stats": []} for _ in variants]
    turns = [(v, into, turn) for turn in range(config.rounds + cuda) for v, into in zip(variants, found, strict=True)]
    for variant, into, turn in progress(turns, desc="serving", unit="run"):
        timed = not cuda or turn == config.rounds
        engine = make_engine(variant, models, rules, config, work.max_len, timed)
        seconds, into["requests"] = serve(engine, work, work.forced_exits.get(variant.exits))
        if turn < config.rounds:
            into["seconds"].append(seconds)
        if timed:
            into["stats"].append({"all_s": seconds} | engine.stats)
        into["slots"] = engine.slots
        del engine                                           # frees its cache before the next one allocates its own
    for into in found:                                       # the mean over the turns
        into["stats"] = {k: sum(s[k] for s in into["stats"]) / len(into["stats"]) for k in into["stats"][0]}
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Results, beside the formulas and the simulation

def speed_up(policy: str, n_loop: int, mean_loops: float, rho: float, merged: float = 1.0) -> float:
    """Over `sequence`, by the formulas at the top of the file.

    >>> speed_up("every pass", 2, 1.25, 0.5), speed_up("in full batches", 2, 1.25, 0.5)
    (1.3333333333333333, 1.4285714285714286)
    """
    token = {"every pass": mean_loops * (1 + rho), "in full batches": mean_loops + rho}[policy]
    return (merged * n_loop + rho) / token


def mean_deepest(exit_share: list[float], slots: int) -> float:
    """Mean loops of the deepest of so many tokens, which all of them run if they wait for one another. exit_share: of
    tokens that exit after each loop."""
    before = np.cumsum([0.0, *exit_share[:-1]])              # share that exited before each loop
    return float(sum(1 - before**slots))


def summarise(variant: Variant, found: dict, full_depth: list[list[int]], n_loop: int, slots: int) -> dict:
    """The results of one variant. full_depth: the texts without early exits."""
    requests, stats = found["requests"], found["stats"]
    tokens = sum(len(r.tokens) for r in requests)
    later = np.array([loop for r in requests for loop in r.loops[1:]])       # the prompt yields the first token
    exit_share = np.eye(n_loop)[-1] if variant.merged else np.bincount(later, minlength=n_loop) / len(later)
    equal = sum(a == b for r, text in zip(requests, full_depth, strict=True)
                for a, b in zip(r.tokens, text, strict=True))
    time_share = {name: stats[name + "_s"] / stats["all_s"] for name in
                  ("prefill", "block", "decision", "head", "attention")}
    counted = sum(share for name, share in time_share.items() if name != "attention")    # attention is in the block
    return asdict(variant) | {
        "slots": found["slots"], "tokens": tokens, "seconds": found["seconds"],
        "tokens_per_s": tokens / statistics.median(found["seconds"]), "left_at": exit_share.tolist(),
        "mean_loops": float(exit_share @ np.arange(1, n_loop + 1)), "agreement": equal / tokens,
        "occupancy": float((later + 1).sum() / stats["passes"] / slots),     # merged tokens take one pass, at loop 0
        "ghosts": stats["ghost_rows"] / max(1, stats["rows"]), "time": time_share | {"scheduler": 1 - counted},
        "stats": stats}


def compare(rows: list[dict], found: list[dict], n_loop: int, slots: int) -> dict:
    """Add to each row its speed-up over `sequence`, the formula's, and the simulated tokens/s; returns the times that
    these are computed from."""
    sequence, depthwise = (next(row for row in rows if row["name"] == name) for name in ("sequence", "depthwise"))
    pass_s, merged_s = (row["stats"]["block_s"] / row["stats"]["passes"] for row in (depthwise, sequence))
    head_s = sequence["stats"]["head_s"] / sequence["stats"]["head_runs"]    # for all slots
    rho, merged = head_s / pass_s, merged_s / n_loop / pass_s
    for row, into in zip(rows, found, strict=True):
        synchronous = row["name"] == "synchronous exits"
        mean_loops = mean_deepest(row["left_at"], slots) if synchronous else row["mean_loops"]
        row["formulas"] = {policy: speed_up(policy, n_loop, mean_loops, rho, merged)
                           for policy in ("every pass", "in full batches")}
        row["formula"] = 1.0 if row is sequence else row["formulas"].get(row["policy"])
        row["of_v1"] = row["tokens_per_s"] / sequence["tokens_per_s"]
        row["of_formula"] = row["formula"] and row["of_v1"] / row["formula"]
        if row["head"] != "in full batches":                 # the simulation has no waiting for the head
            row |= simulate_row(row, into["requests"], slots, merged_s if row["merged"] else pass_s)
    return {"pass_s": pass_s, "merged_pass_s": merged_s, "head_s": head_s, "rho": rho, "merged": merged}


def simulate_row(row: dict, requests: list[Request], slots: int, pass_s: float) -> dict:
    """Simulated tokens/s of the row's requests, without and with the head and the prompts."""
    # A token that exits after loop l ran l + 1 passes. While a prompt, whose head yields the first token, is run, its
    # slot sits out one pass.
    work = [np.array([1, *(loop + 1 for loop in r.loops[1:])]) for r in requests]
    schedule = {"static": "static"}.get(row["name"], "synchronous" if row["head"] == "for all slots" else "depth-wise")
    head_s = row["stats"]["head_s"] / row["stats"]["passes"]
    return {"simulated": simulate(work, slots, pass_s, schedule),
            "simulated_all": simulate(work, slots, pass_s, schedule, head_s, row["stats"]["prefill_s"])}


def label(row: dict) -> list[str]:
    """[variant, exits, KV] of a row, also of one that was saved under an old name."""
    kind = [row["exits"], {"exact": "recomputed", "copy": "copied"}[row["keys"]]]
    return [OLD_NAMES.get(row["name"], row["name"]), *(kind if row["exits"] != "never" else ["", ""])]


def show(rows: list[dict], times: dict) -> str:
    """A table of speeds and one of where the time went."""
    def cell(number, form=".2f"):
        return "" if number is None else format(number, form)
    lines = [["variant", "exits", "KV", "slots", "tok/s", "over sequence", "formula", "of formula", "mean loops",
              "exits by loop", "same text"]]
    split = [["variant", "exits", "KV", "prompts", "block", "attention", "decision", "head", "rest", "rows/slot",
              "ghosts", "simulated", "with all", "measured"]]
    for row in rows:
        lines.append([*label(row), row["slots"], f"{row['tokens_per_s']:,.0f}", cell(row["of_v1"]),
                      cell(row["formula"]), cell(row["of_formula"]), cell(row["mean_loops"]),
                      " ".join(f"{share:.0%}" for share in row["left_at"]), f"{row['agreement']:.1%}"])
        split.append([*label(row), *(f"{row['time'][part]:.1%}" for part in
                      ("prefill", "block", "attention", "decision", "head", "scheduler")), cell(row["occupancy"]),
                      f"{row['ghosts']:.0%}", *(cell(row.get(k), ",.0f") for k in ("simulated", "simulated_all")),
                      f"{row['tokens_per_s']:,.0f}"])
    return (f"{table(lines)}\n\nrho {times['rho']:.3f}: the head takes {1e3 * times['head_s']:.3f} ms, a pass "
            f"{1e3 * times['pass_s']:.3f} ms; one loop of a merged block takes {times['merged']:.2f} of a pass\n\n"
            f"{table(split)}")


def plot_batching(numbers: dict, path: str) -> None:
    """Draw tokens/s by variant, a panel for each model, with the formula's as a mark. numbers: of `bench_batching`."""
    from matplotlib.figure import Figure

    cases = numbers["cases"]
    figure = Figure(figsize=(7, 0.8 + 0.28 * sum(len(case["rows"]) + 2 for case in cases)), layout="constrained")
    panels = figure.subplots(len(cases), squeeze=False)[:, 0]
    for case, axes in zip(cases, panels, strict=True):
        rows, c = case["rows"][::-1], case["model"]
        names = [" ".join(filter(None, label(row))) for row in rows]
        sequence = next(row["tokens_per_s"] for row, name in zip(rows, names, strict=True) if name == "sequence")
        axes.barh(names, [row["tokens_per_s"] for row in rows], color="C0")
        marks = [(row["formula"] * sequence, name) for row, name in zip(rows, names, strict=True) if row["formula"]]
        axes.plot(*zip(*marks, strict=True), "k|", markersize=12, label="formula")
        axes.set(xlabel="tokens/s", title=f"{c['n_loop']} loops, rank {c['rank']}")
        axes.legend()
    figure.savefig(path, dpi=120)


# ---------------------------------------------------------------------------------------------------------------------
# Settings

def variant_names(config: BatchingConfig) -> list[str]:
    """The names in --variants, or all. A comma with a space behind it is part of a name."""
    names = re.split(r",(?! )", config.variants) if config.variants else NAMES
    return [OLD_NAMES.get(name, name) for name in names]


def check_workload(config: BatchingConfig, n_loop: int, n_ctx: int, known: list[str]) -> None:
    """Raise UserError for what cannot be measured on a model. known: the kinds of exits that it has."""
    if config.new_tokens < 3:
        raise UserError(f"--new_tokens={config.new_tokens}: a request's first token is the prompt's, and lengths are "
                        "drawn from half of this on; use 3 or more")
    if not 1 <= config.refill <= config.slots:
        raise UserError(f"--refill={config.refill} must be 1 to {config.slots}, the --slots")
    if config.head_rows > config.slots:
        raise UserError(f"--head_rows={config.head_rows} must be at most {config.slots}, the --slots")
    if n_loop < 2:
        raise UserError(f"{n_loop} loop: rows cannot be at different ones; use --loops=2 or more, or a --ckpt that "
                        "convert.py made with as many")
    if not 1 <= config.mean_loops <= n_loop:
        raise UserError(f"--mean_loops={config.mean_loops} of {n_loop} loops; use 1 to {n_loop}")
    for name, allowed in (("exits", known), ("keys", ["exact", "copy"])):
        for word in getattr(config, name).split(",") if getattr(config, name) else ():
            if word not in allowed:
                raise UserError(f"--{name}={word} is not available here; use {', '.join(allowed)}, several by comma"
                                + (" (gate needs --ckpt)" if word == "gate" else ""))
    if not {"sequence", "depthwise"} <= set(variant_names(config)) <= set(NAMES):
        raise UserError(f"--variants={config.variants}: give sequence and depthwise, which the others are compared "
                        f"with, and any of {'; '.join(NAMES)}; by comma, or their letters {','.join(OLD_NAMES)}")
    longest = config.prompt_len * 3 // 2 + config.new_tokens * 3 // 2
    if longest > n_ctx:
        raise UserError(f"--prompt_len={config.prompt_len} and --new_tokens={config.new_tokens} come to as many as "
                        f"{longest} tokens, half as long again, and the model's context is {n_ctx}: give less")


# ---------------------------------------------------------------------------------------------------------------------
# The benchmark

def random_model(shape: Config, device: torch.device, dtype: torch.dtype) -> RecursiveTransformer:
    """Random weights, B of LoRA (which starts at zero) included."""
    torch.manual_seed(0)
    with device:
        model = RecursiveTransformer(shape).to(dtype)
    for name, p in model.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(p, std=0.02)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def measure(model: RecursiveTransformer, config: BatchingConfig) -> dict:
    """The results of all variants on one model."""
    c, keys, names = model.config, config.keys.split(","), variant_names(config)
    kinds = (config.exits or ("oracle,gate" if config.ckpt else "drawn")).split(",")
    kinds = kinds if any(v.name in names for v in EXITS) else []
    rules = {k: load_rule(config.ckpt, model, "gate", keys=k) for k in keys} if "gate" in kinds else {}
    models, work = {False: model, True: unroll(model)}, draw_workload(config, model)
    for kind in kinds:
        if kind != "gate":
            work.forced_exits[kind] = draw_forced_exits(kind, model, work, config)
    variants = BASELINES + [replace(v, exits=kind, keys=k) for kind in kinds for k in keys for v in EXITS]
    variants = [v for v in variants if v.name in names]
    found = run_variants(variants, models, rules, work, config)
    depthwise = next(f for v, f in zip(variants, found, strict=True) if v.name == "depthwise")
    full_depth = [r.tokens for r in depthwise["requests"]]
    rows = [summarise(v, f, full_depth, c.n_loop, config.slots) for v, f in zip(variants, found, strict=True)]
    times = compare(rows, found, c.n_loop, config.slots)
    print(f"{c.n_loop} loops of {c.n_unique} layers, C = {c.n_embd}, rank {c.rank}, vocabulary size {c.vocab_size:,}; "
          f"{len(work.prompts)} requests, {config.slots} slots of {work.max_len}\n\n{show(rows, times)}\n")
    return {"model": asdict(c), "requests": len(work.prompts), "max_len": work.max_len, "times": times, "rows": rows}


def bench_batching(config: BatchingConfig) -> dict:
    """Tokens/s of all variants, on the checkpoint or on random weights for each number of loops and rank."""
    device = pick_device(config.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if config.ckpt:
        model = RecursiveTransformer.load(config.ckpt, dtype=dtype).to(device)
        check_workload(config, model.config.n_loop, model.config.n_ctx, ["drawn", "oracle", "gate"])
        cases = [measure(model, config)]
    else:
        shape = load_shape(config.shape, config.donor, config.layers, config.vocab)
        shapes = [replace(shape, n_loop=n, rank=r) for n in by_comma("loops", config.loops)
                  for r in by_comma("ranks", config.ranks)]
        for one in shapes:
            check_workload(config, one.n_loop, one.n_ctx, ["drawn", "oracle"])
        cases = [measure(random_model(one, device, dtype), config) for one in shapes]
    return {"dtype": str(dtype).removeprefix("torch."), "device": device.type, "cases": cases}


MOVED = {"batching": "", "convert": "conversion", "svd": "conversion --measure=svd",
         "scale": "conversion --measure=scale", "train": "training", "loss": "loss", "lora": "lora",
         "decode": "decode", "kernels": "kernels", "decision": "decision", "tokenise": "tokenise"}


def check_moved(argv: list[str]) -> None:
    """Raise UserError for flags of earlier versions, with the command that replaces them."""
    what = re.search(r"(?:^|\n)--what[=\n](\w+)", "\n".join(argv))
    name = "simulate" if "--simulate" in argv else MOVED.get(what[1] if what else "", "")
    if name:
        raise UserError(f"bench.py measures batching only; use: python -m benchmarks.{name} …")
    if what:
        raise UserError("bench.py measures batching only; use: python bench.py … without --what")


def main(argv=None):
    check_moved(sys.argv[1:] if argv is None else argv)
    config = parse_args(BatchingConfig, argv)
    check_at_least(config, 1, "slots", "prompt_len", "new_tokens", "rounds")
    check_at_least(config, 0, "requests", "head_rows")
    check_exits(config)
    check_ckpt_or_shape(config)
    check_writable("save", config.save)
    check_plot(config.plot)
    numbers = bench_batching(config)
    publish("batching", config, numbers)
    if config.plot:
        plot_batching(numbers, config.plot)


if __name__ == "__main__":
    script(main)
