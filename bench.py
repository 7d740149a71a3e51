"""Batching, way by way, behind `python bench.py --what=batching`: the same requests, the same weights, tokens/s.

    V0    static batching       merged LoRA, full depth; new requests wait until all slots are free
    V1    sequence batching     the same, but a free slot takes the next request: what is commonly served today
    V2    sequence batching     as V1, with the looped model as it is: tokens run the loops in step
    V3    depth-wise            as V2, but rows stand at loops of their own; nobody leaves early
    V4    synchronous exits     tokens leave early, and the batch waits for its slowest
    V5    depth-wise exits      and it does not: what the paper simulates
    V3h, V5h                    the head runs for --head_rows at a time; as many slots more keep the block full

Counted is the time from the first request to the last token: prompts, block, decisions, head and scheduler.

Beside it stands what would be were nothing counted but passes and head. With rho = seconds of the head / seconds of a
pass of the unmerged block (one loop, all slots), m = a merged one's share of that, B loops and E mean loops of a token,
a token costs m B + rho with sequence batching; E (1 + rho) where the head runs at each pass (policy A); and E + rho
where it runs for full batches only (policy C). So the speed-up over V1 is

    A  (m B + rho) / (E (1 + rho))            C  (m B + rho) / (E + rho)
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import torch

from bench_simulate import draw_exits, leave_probability, simulate
from bench_training import by_comma, shape_of
from convert import unroll
from engine import Engine, Request
from exits import Keys, Rule, load_rule, oracle_exits
from lib.cli import UserError, progress, table
from lib.data import load_tokens
from lib.results import check_plot
from lib.system import pick_device
from lib.tokenizer import Tokenizer
from model import RecursiveTransformer


@dataclass(frozen=True)
class Variant:
    name: str
    what: str
    head: str                                                # now, waits (for all slots), or stage
    policy: str | None                                       # its formula
    exits: str = "never"                                     # or drawn, oracle, gate
    keys: Keys = "exact"
    merged: bool = False                                     # the unrolled model, at full depth in one pass
    refill: bool = True


BASELINES = [Variant("V0", "static batching", "now", None, merged=True, refill=False),
             Variant("V1", "sequence batching", "now", "C", merged=True),
             Variant("V2", "V1, not merged", "waits", "C"),
             Variant("V3", "depth-wise", "now", "A"),
             Variant("V3h", "V3, head as a stage", "stage", "C")]
EXITS = [Variant("V4", "synchronous exits", "waits", "C"),
         Variant("V5", "depth-wise exits", "now", "A"),
         Variant("V5h", "V5, head as a stage", "stage", "C")]
ALL = BASELINES + EXITS


@dataclass
class Served:
    """What all variants are to do: request by request a prompt, so many new tokens, and by kind of exits the loop after
    which each leaves."""
    prompts: list[list[int]]
    lengths: list[int]
    traces: dict[str, list]

    @property
    def max_len(self) -> int:
        return max(len(p) + n for p, n in zip(self.prompts, self.lengths, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# One variant, once

class Watched(Engine):
    """Ends each part of a step with a wait for the GPU, so that the parts' seconds are their own."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.stats["attention_s"], attend = 0.0, self.cache.attend
        if not self.static:                                  # else a graph may hold it: its seconds are the block's

            def watched(*args):
                began = time.perf_counter()
                found = attend(*args)
                self.stats["attention_s"] += time.perf_counter() - began
                return found
            self.cache.attend = watched

    def timed(self, name: str, work: Callable) -> None:
        self.to_its_end(name, partial(super().timed, name, work))            # a graph cannot hold the wait

    def admit(self) -> None:
        self.to_its_end("prefill_s", super().admit)

    def to_its_end(self, name: str, part: Callable) -> None:
        """Run a part that counts its own seconds, and count what the GPU takes as well, if it did anything."""
        before, began = self.stats[name], time.perf_counter()
        part()
        if self.stats[name] > before:
            synchronize(self.device)
            self.stats[name] = before + time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_engine(variant: Variant, models: dict, rules: dict, config, max_len: int, watch: bool) -> Engine:
    model = models[variant.merged]
    stage = config.head_rows or max(1, config.slots // 2)
    slots = config.slots + stage * (variant.head == "stage")
    head = {"waits": 0, "now": 1, "stage": stage}[variant.head]
    rule = rules[variant.keys] if variant.exits == "gate" else Rule()
    refill = config.refill if variant.refill else slots
    return (Watched if watch else Engine)(model, slots, max_len, rule, variant.keys, head, refill=refill)


def serve(engine: Engine, work: Served, traces: list | None) -> tuple[float, list[Request]]:
    """(seconds until all is said, the requests), after a short one that is not counted (graphs, compilation)."""
    engine.generate([work.prompts[0]], min(3, work.lengths[0]))
    engine.stats.update(dict.fromkeys(engine.stats, 0))
    engine.ran.zero_()
    synchronize(engine.device)
    began = time.perf_counter()
    requests = [engine.add(prompt, n, trace=traces and list(traces[i]))
                for i, (prompt, n) in enumerate(zip(work.prompts, work.lengths, strict=True))]
    for _ in engine.run():
        pass
    synchronize(engine.device)
    seconds = time.perf_counter() - began
    assert all(r.status == "done" and len(r.tokens) == n for r, n in zip(requests, work.lengths, strict=True))
    engine.stats |= zip(("rows", "ghost_rows"), engine.ran.tolist(), strict=True)
    return seconds, requests


def run_variants(variants: list[Variant], models: dict, rules: dict, work: Served, config) -> list[dict]:
    """Of each variant: seconds, requests and the engine's statistics. They take turns, --rounds times; on a GPU, where
    waiting for the parts disturbs, these are timed in a turn of their own."""
    cuda = models[False].embed.weight.is_cuda
    found = [{"seconds": [], "stats": []} for _ in variants]
    turns = [(v, into, turn) for turn in range(config.rounds + cuda) for v, into in zip(variants, found, strict=True)]
    for variant, into, turn in progress(turns, desc="serving", unit="run"):
        watch = not cuda or turn == config.rounds
        engine = make_engine(variant, models, rules, config, work.max_len, watch)
        seconds, into["requests"] = serve(engine, work, work.traces.get(variant.exits))
        if turn < config.rounds:
            into["seconds"].append(seconds)
        if watch:
            into["stats"].append({"all_s": seconds} | engine.stats)
        into["slots"] = engine.slots
        del engine                                           # its cache, before the next takes one
    for into in found:                                       # of one run: the mean over the turns
        into["stats"] = {k: sum(s[k] for s in into["stats"]) / len(into["stats"]) for k in into["stats"][0]}
    return found


# ---------------------------------------------------------------------------------------------------------------------
# What it comes to

def speed_up(policy: str, n_loop: int, mean_loops: float, rho: float, merged: float = 1.0) -> float:
    """Over sequence batching at full depth: see the top of the file.

    >>> speed_up("A", 2, 1.25, 0.5), speed_up("C", 2, 1.25, 0.5)
    (1.3333333333333333, 1.4285714285714286)
    """
    return (merged * n_loop + rho) / {"A": mean_loops * (1 + rho), "C": mean_loops + rho}[policy]


def slowest(left_at: list[float], slots: int) -> float:
    """Mean loops of the deepest of so many tokens: what all run that wait for one another."""
    before = np.cumsum([0.0, *left_at[:-1]])                 # share that left before the loop
    return float(sum(1 - before**slots))


def summarise(variant: Variant, found: dict, first: list[list[int]], n_loop: int, slots: int) -> dict:
    """A row of numbers. first: the text at full depth."""
    requests, stats = found["requests"], found["stats"]
    tokens = sum(len(r.tokens) for r in requests)
    later = np.array([loop for r in requests for loop in r.loops[1:]])       # the first comes of the prompt
    left_at = np.eye(n_loop)[-1] if variant.merged else np.bincount(later, minlength=n_loop) / len(later)
    equal = sum(a == b for r, text in zip(requests, first, strict=True) for a, b in zip(r.tokens, text, strict=True))
    parts = {name: stats[name + "_s"] / stats["all_s"] for name in
             ("prefill", "block", "decision", "head", "attention")}
    parts["scheduler"] = 1 - sum(share for name, share in parts.items() if name != "attention")   # the block's part
    return asdict(variant) | {
        "slots": found["slots"], "tokens": tokens, "seconds": found["seconds"],
        "tokens_per_s": tokens / statistics.median(found["seconds"]), "left_at": left_at.tolist(),
        "mean_loops": float(left_at @ np.arange(1, n_loop + 1)), "agreement": equal / tokens,
        "occupancy": float((later + 1).sum() / stats["passes"] / slots),     # merged tokens take one pass, at loop 0
        "ghosts": stats["ghost_rows"] / max(1, stats["rows"]), "time": parts, "stats": stats,
        "loops": [r.loops for r in requests]}


def compare(rows: list[dict], n_loop: int, slots: int) -> dict:
    """Add to each row its speed as a multiple of V1's, and what the formula and the simulator say of it; returns the
    times that these rest on. `loops` is used up."""
    v1, v3 = (next(row for row in rows if row["name"] == name) for name in ("V1", "V3"))
    pass_s, merged_s = (row["stats"]["block_s"] / row["stats"]["passes"] for row in (v3, v1))
    head_s = v1["stats"]["head_s"] / v1["stats"]["head_runs"]                # for all slots
    rho, merged = head_s / pass_s, merged_s / n_loop / pass_s
    for row in rows:
        deep = slowest(row["left_at"], slots) if row["name"] == "V4" else row["mean_loops"]
        row["formulas"] = {policy: speed_up(policy, n_loop, deep, rho, merged) for policy in "AC"}
        row["formula"] = 1.0 if row["name"] == "V1" else row["formulas"].get(row["policy"])
        row["of_v1"] = row["tokens_per_s"] / v1["tokens_per_s"]
        row["of_formula"] = row["formula"] and row["of_v1"] / row["formula"]
        # A token at index l ran l + 1 passes. The first is the prompt's; its slot sits out a pass meanwhile.
        work = [np.array([1, *(loop + 1 for loop in loops[1:])]) for loops in row.pop("loops")]
        how = "static" if row["name"] == "V0" else "synchronous" if row["head"] == "waits" else "depth-wise"
        of_pass = merged_s if row["merged"] else pass_s
        if row["head"] != "stage":                           # the simulator knows no waiting for the head
            row["simulated"] = simulate(work, slots, of_pass, how)
            row["simulated_all"] = simulate(work, slots, of_pass, how, row["stats"]["head_s"] / row["stats"]["passes"],
                                            row["stats"]["prefill_s"])
    return {"pass_s": pass_s, "merged_pass_s": merged_s, "head_s": head_s, "rho": rho, "merged": merged}


def show(rows: list[dict], times: dict) -> str:
    def of(number, form=".2f"):
        return "" if number is None else format(number, form)
    lines = [["", "what", "exits", "keys", "slots", "tok/s", "of V1", "formula", "of it", "loops", "left at", "agree"]]
    split = [["", "exits", "keys", "prompts", "block", "attention", "decision", "head", "rest", "rows/slot", "ghosts",
              "simulated", "with all", "measured"]]
    for row in rows:
        kind = [row["exits"], row["keys"]] if row["exits"] != "never" else ["", ""]
        lines.append([row["name"], row["what"], *kind, row["slots"], f"{row['tokens_per_s']:,.0f}", of(row["of_v1"]),
                      f"{of(row['formula'])} {row['policy'] or ''}".strip(), of(row["of_formula"]),
                      of(row["mean_loops"]), " ".join(f"{share:.0%}" for share in row["left_at"]),
                      f"{row['agreement']:.1%}"])
        split.append([row["name"], *kind, *(f"{row['time'][part]:.1%}" for part in
                      ("prefill", "block", "attention", "decision", "head", "scheduler")), of(row["occupancy"]),
                      f"{row['ghosts']:.0%}", *(of(row.get(k), ",.0f") for k in ("simulated", "simulated_all")),
                      f"{row['tokens_per_s']:,.0f}"])
    return (f"{table(lines)}\n\nrho {times['rho']:.3f}: the head {1e3 * times['head_s']:.3f} ms, a pass "
            f"{1e3 * times['pass_s']:.3f} ms; merged {times['merged']:.2f} of it\n\n{table(split)}")


# ---------------------------------------------------------------------------------------------------------------------
# What is served

def check_settings(config, n_loop: int, n_ctx: int, known: list[str]) -> None:
    """UserError for what cannot be measured. known: kinds of exits that can be had."""
    if config.new_tokens < 3:
        raise UserError(f"--new_tokens={config.new_tokens}: a request's first token is the prompt's, and lengths are "
                        "drawn from half of this on; use 3 or more")
    if not 1 <= config.refill <= config.slots:
        raise UserError(f"--refill={config.refill} must be 1 to {config.slots}, the --slots")
    if config.head_rows > config.slots:
        raise UserError(f"--head_rows={config.head_rows} must be at most {config.slots}, the --slots")
    if n_loop < 2:
        raise UserError(f"{n_loop} loop: rows cannot stand at different ones; use --loops=2 or more, or a --ckpt that "
                        "convert.py made with as many")
    if not 1 <= config.mean_loops <= n_loop:
        raise UserError(f"--mean_loops={config.mean_loops} of {n_loop} loops; use 1 to {n_loop}")
    for name, allowed in (("exits", known), ("keys", ["exact", "copy"])):
        for word in getattr(config, name).split(",") if getattr(config, name) else ():
            if word not in allowed:
                raise UserError(f"--{name}={word} is not to be had here; use {', '.join(allowed)}, several by comma"
                                + (" (gate needs --ckpt)" if word == "gate" else ""))
    if not {"V1", "V3"} <= set(variant_names(config)) <= {v.name for v in ALL}:
        raise UserError(f"--variants={config.variants}: give V1 and V3, which the others are measured by, and any of "
                        f"{', '.join(v.name for v in ALL)}, by comma")
    longest = config.prompt_len * 3 // 2 + config.new_tokens * 3 // 2
    if longest > n_ctx:
        raise UserError(f"--prompt_len={config.prompt_len} and --new_tokens={config.new_tokens} come to as many as "
                        f"{longest} tokens, half as long again, and the model's context is {n_ctx}: give less")


def variant_names(config) -> list[str]:
    return config.variants.split(",") if config.variants else [v.name for v in ALL]


def spread(typical: int, n: int, draw: np.random.Generator) -> list[int]:
    """n lengths, from half to one and a half of `typical`, all alike likely."""
    return draw.integers(-(-typical // 2), typical * 3 // 2 + 1, n).tolist()


def draw_work(config, model: RecursiveTransformer) -> Served:
    """Prompts and lengths, the same for the same settings; of a checkpoint prompts are text, else random tokens."""
    draw, n = np.random.default_rng(0), config.requests or 4 * config.slots
    sizes, lengths = spread(config.prompt_len, n, draw), spread(config.new_tokens, n, draw)
    if config.ckpt:
        words = model.config.vocab_size
        text = load_tokens(config.text, Tokenizer.load(config.ckpt, words), words)
        if len(text) <= max(sizes):
            raise UserError(f"--text={config.text} holds {len(text)} tokens, too few for a prompt of {max(sizes)}")
        starts = draw.integers(0, len(text) - max(sizes), n)
        prompts = [[int(token) for token in text[start:start + size]] for start, size in zip(starts, sizes,
                                                                                            strict=True)]
    else:
        prompts = [draw.integers(0, model.config.vocab_size, size).tolist() for size in sizes]
    return Served(prompts, lengths, {})


@torch.no_grad()
def oracle_traces(model: RecursiveTransformer, work: Served, texts: list[list[int]]) -> list[list[int]]:
    """For each request, the earliest loop at which each token of the text at full depth could have been said."""
    traces = []
    for prompt, text in progress(list(zip(work.prompts, texts, strict=True)), desc="oracle", unit="request"):
        idx = torch.tensor([prompt + text[:-1]], device=model.embed.weight.device)
        said = oracle_exits(model, idx)[0, len(prompt) - 1:].tolist()        # by the last token of the prompt, ...
        traces.append([model.config.n_loop - 1, *said[1:]])                  # which ran all loops
    return traces


def dummy_model(shape, n_loop: int, rank: int, device, dtype) -> RecursiveTransformer:
    """Random weights, LoRA as well."""
    torch.manual_seed(0)
    with device:
        model = RecursiveTransformer(replace(shape, n_loop=n_loop, rank=rank)).to(dtype)
    for name, p in model.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(p, std=0.02)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def measure(model: RecursiveTransformer, config) -> dict:
    """All variants on one model."""
    n_loop, keys = model.config.n_loop, config.keys.split(",")
    names = variant_names(config)
    kinds = (config.exits or ("oracle,gate" if config.ckpt else "drawn")).split(",")
    kinds = kinds if any(v.name in names for v in EXITS) else []             # else nobody leaves
    rules = {k: load_rule(config.ckpt, model, "gate", keys=k) for k in keys} if "gate" in kinds else {}
    models, work = {False: model, True: unroll(model)}, draw_work(config, model)
    if "drawn" in kinds:
        leave = leave_probability(n_loop, config.mean_loops) if config.exit_prob is None else config.exit_prob
        work.traces["drawn"] = [loops.tolist() for loops in draw_exits(work.lengths, n_loop, leave, seed=1)]
    if "oracle" in kinds:
        engine = Engine(model, config.slots, work.max_len)
        requests = [engine.add(p, n) for p, n in zip(work.prompts, work.lengths, strict=True)]
        for _ in progress(engine.run(), total=sum(work.lengths), desc="full depth", unit="tok"):
            pass
        work.traces["oracle"] = oracle_traces(model, work, [r.tokens for r in requests])
    variants = BASELINES + [replace(v, exits=kind, keys=k) for kind in kinds for k in keys for v in EXITS]
    variants = [v for v in variants if v.name in names]
    found = run_variants(variants, models, rules, work, config)
    first = next([r.tokens for r in f["requests"]] for v, f in zip(variants, found, strict=True) if v.name == "V3")
    rows = [summarise(v, f, first, n_loop, config.slots) for v, f in zip(variants, found, strict=True)]
    times = compare(rows, n_loop, config.slots)
    c = model.config
    print(f"{n_loop} loops of {c.n_unique} layers, C = {c.n_embd}, rank {c.rank}, {c.vocab_size:,} words; "
          f"{len(work.prompts)} requests, {config.slots} slots of {work.max_len}\n\n{show(rows, times)}\n")
    return {"model": asdict(c), "requests": len(work.prompts), "max_len": work.max_len, "times": times, "rows": rows}


def bench_batching(config) -> dict:
    """Tokens/s of every way to batch, with what the formula and the paper's simulation say beside it."""
    device = pick_device(config.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    check_plot(config.plot)
    if config.ckpt:
        model = RecursiveTransformer.load(config.ckpt, dtype=dtype).to(device)
        check_settings(config, model.config.n_loop, model.config.n_ctx, ["drawn", "oracle", "gate"])
        cases = [measure(model, config)]
    else:
        shape = shape_of(config)
        shapes = [replace(shape, n_loop=n, rank=r) for n in by_comma("loops", config.loops)
                  for r in by_comma("ranks", config.ranks)]
        for one in shapes:
            check_settings(config, one.n_loop, one.n_ctx, ["drawn", "oracle"])
        cases = [measure(dummy_model(shape, one.n_loop, one.rank, device, dtype), config) for one in shapes]
    numbers = {"dtype": str(dtype).removeprefix("torch."), "device": device.type, "cases": cases}
    if config.plot:
        plot_batching(numbers, config.plot)
    return numbers


# ---------------------------------------------------------------------------------------------------------------------

def plot_batching(numbers: dict, path: str) -> None:
    """Tokens/s by variant, a panel for each model, the formula's as a mark. numbers: of `bench_batching`."""
    from matplotlib.figure import Figure

    cases = numbers["cases"]
    figure = Figure(figsize=(7, 0.8 + 0.28 * sum(len(case["rows"]) + 2 for case in cases)), layout="constrained")
    panels = figure.subplots(len(cases), squeeze=False)[:, 0]
    for case, axes in zip(cases, panels, strict=True):
        rows, c = case["rows"][::-1], case["model"]
        names = [" ".join([r["name"], r["what"], *([r["exits"], r["keys"]] if r["exits"] != "never" else [])])
                 for r in rows]
        v1 = next(row["tokens_per_s"] for row in rows if row["name"] == "V1")
        axes.barh(names, [r["tokens_per_s"] for r in rows], color="C0")
        marks = [(r["formula"] * v1, name) for r, name in zip(rows, names, strict=True) if r["formula"]]
        axes.plot(*zip(*marks, strict=True), "k|", markersize=12, label="formula")
        axes.set(xlabel="tokens/s", title=f"{c['n_loop']} loops, rank {c['rank']}")
        axes.legend()
    figure.savefig(path, dpi=120)
