"""Tokens per second of continuous depth-wise batching (engine.py) beside common ways to serve the same requests.

    python bench.py --ckpt=out_exits                           # trained exits and real prompts: the case that counts
    python bench.py --shape=small --loops=2 --ranks=0,64       # random weights, exits drawn at random: shapes only

Every variant serves the same requests with each number of slots of --slots, in turn, --rounds times:

    transformers           its greedy `generate` of the exported model, static cache; batches of as many as slots
    decode                 `decode` of exits.py, the same batches: each lasts until its longest text is done
    sequence               the engine at full depth, merged LoRA: a free slot takes the next request. Common today
    sequence, unmerged     the same with the looped model as it is: all tokens are at the same loop (on a GPU the host
                           waits in each pass for the head, as with synchronous exits)
    depthwise              tokens are at different loops; none exits early
    synchronous exits      tokens exit early, and the batch waits for its slowest
    depthwise+exits        tokens exit early, and none waits: what the paper simulates
    ..., head in full batches   exited tokens wait until a third of the slots do; the others keep the block busy

The time from the first request to the last token counts: prompts, block, exit decisions, head and scheduler. The
oracle's and drawn exits, which no rule decides, pay for the decisions of a gate, too.

The baseline is the best sequence batching of the whole sweep ("over best"); "over sequence" compares at equal slots.
Beside them is the bound of Continuous Depth Batching (arXiv 2608.09444), (F0 + r_max F_r) / (F0 + d F_r): F0 are the
FLOPs that a token needs once (the head), F_r those of a loop (without LoRA), d its mean loops, r_max all loops. The
bound counts neither prompts nor ghosts. With --ckpt, "same text" is the share of tokens that equal, position by
position, those of the same request at full depth; "loss" is the mean negative log-likelihood that the full-depth model
gives the generated tokens.
"""

import importlib.util
import math
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import get_args

import numpy as np
import torch

from benchmarks.common import (
    ShapeName,
    by_comma,
    check_at_least,
    check_ckpt_or_shape,
    load_shape,
    publish,
    random_model,
    synchronize,
)
from benchmarks.decode import decode_batch, in_transformers
from benchmarks.simulate import check_exits
from benchmarks.workload import (
    Workload,
    distinct_share,
    draw_forced_exits,
    draw_workload,
    full_depth_texts,
    same_share,
    serve_in_batches,
    text_loss,
)
from convert import unroll
from engine import Engine, Request
from exits import Gate, Keys, Rule, load_rule
from lib.cli import UserError, parse_args, progress, script, table
from lib.results import check_plot, check_writable
from lib.system import pick_device
from model import RecursiveTransformer


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
    slots: str = "8,16,24,32,64"           # sequences at a time, by comma: the sweep
    requests: int = 0                      # how many are served; 0 = four times the largest number of slots
    prompt_len: int = 32                   # tokens of a prompt
    new_tokens: int = 64                   # mean new tokens of a request; each has half to 1.5 times as many
    variants: str = ""                     # only these, by comma, with sequence among them
    exits: str = ""                        # drawn, oracle, gate, by comma; not set = drawn, with --ckpt oracle,gate
    mean_loops: float = 1.25               # mean loops of a token with drawn exits
    exit_prob: float | None = None         # probability to exit after each early loop, instead of mean_loops
    keys: str = ""                         # KV of tokens that exited, by comma: exact (recomputed), copy; not set = all
    refill: int = 1                        # free slots that new prompts wait for, to run together
    rounds: int = 5                        # how often all variants serve; the median counts
    plot: str | None = None                # with --ckpt: draw speed-up against agreement to this file
    device: str = "auto"                   # auto, cpu, cuda
    save: str | None = None                # also append a JSON line for each model to this file


@dataclass(frozen=True)
class Variant:
    name: str
    head: str = "every pass"                                 # or in full batches, for all slots; "" = no engine
    merged: bool = False                                     # the unrolled model: one pass runs all loops
    exits: str = "never"                                     # or drawn, oracle, gate
    keys: Keys = "exact"


STAGE = ", head in full batches"
IN_BATCHES = [Variant("transformers", "", merged=True), Variant("decode", "", merged=True)]
FULL_DEPTH = [Variant("sequence", merged=True), Variant("sequence, unmerged", "for all slots"),
              Variant("depthwise"), Variant("depthwise" + STAGE, "in full batches")]
EXITS = [Variant("synchronous exits", "for all slots"), Variant("depthwise+exits"),
         Variant("depthwise+exits" + STAGE, "in full batches")]
NAMES = [variant.name for variant in IN_BATCHES + FULL_DEPTH + EXITS]
BASELINES = ("sequence", "sequence, unmerged")
PARTS = ("prefill", "block", "decision", "head", "scheduler")
KV = {"exact": "recomputed", "copy": "copied"}


# ---------------------------------------------------------------------------------------------------------------------
# Serving

class TimedEngine(Engine):
    """Waits for the GPU after each part of a step, so that the seconds of each part are its own."""

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


def make_engine(variant: Variant, models: dict, rules: dict, slots: int, refill: int, max_len: int,
                timed: bool = False) -> Engine:
    """An engine with `slots` slots in all. models: by `Variant.merged`; rules: by (`Variant.exits`, `Variant.keys`)."""
    head = {"for all slots": 0, "every pass": 1, "in full batches": max(1, slots // 3)}[variant.head]
    rule = rules[variant.exits, variant.keys]
    return (TimedEngine if timed else Engine)(models[variant.merged], slots, max_len, rule, variant.keys, head,
                                              refill=min(refill, slots))


def serve_by_engine(engine: Engine, work: Workload, forced_exits: list | None) -> tuple[float, list[Request]]:
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


def run_variants(variants: list[Variant], models: dict, rules: dict, generators: dict[str, Callable], work: Workload,
                 config: BatchingConfig) -> list[dict]:
    """Seconds, texts, exits and the engine's statistics of each variant with each number of slots. All take turns,
    --rounds times. On a GPU timing the parts slows the whole down, so they are timed in one more turn."""
    device = models[False].embed.weight.device
    cuda, n_loop = device.type == "cuda", models[False].config.n_loop
    found = [{"variant": v, "slots": slots, "seconds": [], "stats": []} for slots in by_comma("slots", config.slots)
             for v in variants]
    turns = [(into, turn) for turn in range(config.rounds + cuda) for into in found]
    for into, turn in progress(turns, desc="serving", unit="run"):
        v, extra = into["variant"], turn == config.rounds
        if v.name in generators:
            if not extra:
                seconds, into["texts"] = serve_in_batches(generators[v.name], work, into["slots"], device)
                into["seconds"].append(seconds)
            continue
        engine = make_engine(v, models, rules, into["slots"], config.refill, work.max_len, extra)
        seconds, requests = serve_by_engine(engine, work, work.forced_exits.get(v.exits))
        into["texts"] = [r.tokens for r in requests]
        if not v.merged:                                     # the prompt yields the first token, after all loops
            into["exited"] = np.bincount([loop for r in requests for loop in r.loops[1:]], minlength=n_loop).tolist()
        if not extra:
            into["seconds"].append(seconds)
        if extra or not cuda:
            into["stats"].append({"all_s": seconds} | engine.stats)
        del engine                                           # frees its cache before the next one allocates its own
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Results

def speed_bound(model: RecursiveTransformer, mean_loops: float, context: float) -> float:
    """(F0 + r_max F_r) / (F0 + d F_r), see the top of the file, in FLOPs of a token with so many tokens before it."""
    once, n_loop = 2 * model.head_weight.numel(), model.config.n_loop
    loop = (model.flops(round(2 * context) - 1) - once) / n_loop             # `flops` counts half of the attention
    return (once + n_loop * loop) / (once + mean_loops * loop)


def summarise(found: dict, model: RecursiveTransformer, work: Workload, known: dict | None) -> dict:
    """The results of one variant with one number of slots. known: of `text_loss`; None with random weights, whose texts
    show nothing."""
    variant, n_loop, tokens = found["variant"], model.config.n_loop, sum(work.lengths)
    exited = np.array(found.get("exited", [0] * (n_loop - 1) + [1]))
    mean_loops = float(exited @ np.arange(1, n_loop + 1) / exited.sum())
    speeds = [tokens / seconds for seconds in found["seconds"]]
    kv = "shared" if shares_kv(model) else KV.get(variant.keys, variant.keys)
    row = asdict(variant) | {
        "slots": found["slots"], "seconds": found["seconds"], "tokens_per_s": statistics.median(speeds),
        "range": [min(speeds), max(speeds)], "kv": "" if variant.exits == "never" else kv,
        "mean_loops": mean_loops, "exits_by_loop": (exited / exited.sum()).tolist(),
        "bound": speed_bound(model, mean_loops, len(work.prompts[0]) + statistics.mean(work.lengths) / 2),
        "agreement": None if known is None else same_share(found["texts"], work.full_depth),
        "loss": None if known is None else text_loss(model, work.prompts, found["texts"], known),
        "ghosts": None, "time": None, "stats": None}
    if found["stats"]:
        stats = {k: statistics.mean(s[k] for s in found["stats"]) for k in found["stats"][0]}
        parts = {name: stats[name + "_s"] / stats["all_s"] for name in PARTS[:-1]}
        row |= {"ghosts": stats["ghost_rows"] / max(1, stats["rows"]), "stats": stats,
                "time": parts | {"scheduler": 1 - sum(parts.values())}}
    return row


def shares_kv(model: RecursiveTransformer) -> bool:
    """True if all loops read the keys and values of the first, so that a token that exits leaves none missing."""
    return model.config.kv == "first_loop"


def compare(rows: list[dict]) -> dict:
    """Add to each row its speed-up over the best sequence batching of all rows and of those with as many slots, and the
    share of the bound that the latter reaches. Returns the best. Rounds are compared one by one, since the machine's
    speed may drift, and the median of their ratios counts."""
    def speed_up(row: dict, baseline: dict) -> float:
        return statistics.median(b / s for s, b in zip(row["seconds"], baseline["seconds"], strict=True))

    def fastest(baselines: list[dict]) -> dict:              # the one that no other beats
        return max(baselines, key=lambda row: min(speed_up(row, other) for other in baselines))
    at_full_depth = [row for row in rows if row["name"] in BASELINES]
    best = fastest(at_full_depth)
    for row in rows:
        equal = fastest([r for r in at_full_depth if r["slots"] == row["slots"]])
        row["over_best"], row["over_sequence"] = speed_up(row, best), speed_up(row, equal)
        row["of_bound"] = row["over_sequence"] / row["bound"]
    return best


def label(row: dict) -> list[str]:
    """[variant, exits, KV] of a row."""
    return [row["name"], row["exits"].replace("never", ""), row["kv"]]


def show(rows: list[dict]) -> str:
    """A table with a line for each variant and number of slots."""
    def cell(number, form=".2f"):
        return "" if number is None else format(number, form)
    lines = [["slots", "variant", "exits", "KV", "tok/s", "min - max", "over best", "over sequence", "bound",
              "of bound", "loops", "same text", "loss", "ghosts", "prompts / block / decision / head / rest"]]
    for row in rows:
        parts = row["time"] or {}                            # none of transformers and decode, which have no bound
        lines.append([
            row["slots"], *label(row), f"{row['tokens_per_s']:,.0f}", " - ".join(f"{s:,.0f}" for s in row["range"]),
            *(cell(row[k]) for k in ("over_best", "over_sequence")),
            *(cell(row[k] if parts else None) for k in ("bound", "of_bound")), cell(row["mean_loops"]),
            cell(row["agreement"], ".1%"), cell(row["loss"], ".3f"), cell(row["ghosts"], ".0%"),
            " / ".join(f"{100 * parts[name]:.0f}" for name in PARTS if name in parts) + " %" * bool(parts)])
    return table(lines)


def plot_batching(case: dict, path: str) -> None:
    """Draw speed-up over the best sequence batching against agreement: each variant with the number of slots that is
    best for it, and a bar from its slowest to its fastest round. case: a line of `bench_batching`."""
    from matplotlib.figure import Figure

    figure, best = Figure(figsize=(9, 5), layout="constrained"), {}
    axes = figure.subplots()
    for row in sorted(case["rows"], key=lambda row: row["over_best"]):
        best[" · ".join(filter(None, label(row)))] = row     # the fastest comes last
    for i, (name, row) in enumerate(sorted(best.items(), key=lambda item: -item[1]["over_best"])):
        y, x = row["over_best"], 100 * row["agreement"] + 0.2 * (i - len(best) / 2)
        bar = [[abs(speed / row["tokens_per_s"] - 1) * y] for speed in row["range"]]
        axes.errorbar([x], [y], bar, fmt="osD"[i // 10 % 3], color=f"C{i % 10}", label=f"{name} · {row['slots']} slots")
    axes.axhline(1, color="k", linewidth=0.8)
    axes.set(xlabel="tokens equal to those at full depth, % (points beside one another for legibility)",
             ylabel="tokens/s over the best sequence batching")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=7)
    figure.savefig(path, dpi=120)


# ---------------------------------------------------------------------------------------------------------------------
# Settings

def variant_names(config: BatchingConfig) -> list[str]:
    """The names in --variants, or all. A comma with a space behind it is part of a name."""
    return re.split(r",(?! )", config.variants) if config.variants else NAMES


def check_workload(config: BatchingConfig, n_loop: int, n_ctx: int, known: list[str]) -> None:
    """Raise UserError for what cannot be measured on a model. known: the kinds of exits that it has."""
    by_comma("slots", config.slots, positive=True)
    if config.new_tokens < 3:
        raise UserError(f"--new_tokens={config.new_tokens}: a request's first token is the prompt's, and lengths are "
                        "drawn from half of this on; use 3 or more")
    if n_loop < 2:
        raise UserError(f"{n_loop} loop: rows cannot be at different ones; use --loops=2 or more, or a --ckpt that "
                        "convert.py made with as many")
    if not 1 <= config.mean_loops <= n_loop:
        raise UserError(f"--mean_loops={config.mean_loops} of {n_loop} loops; use 1 to {n_loop}")
    for name, allowed in (("exits", known), ("keys", get_args(Keys))):
        for word in getattr(config, name).split(",") if getattr(config, name) else ():
            if word not in allowed:
                raise UserError(f"--{name}={word} is not available here; use {', '.join(allowed)}, several by comma"
                                + (" (oracle and gate need --ckpt)" if name == "exits" else ""))
    if not {"sequence"} <= set(variant_names(config)) <= set(NAMES):
        raise UserError(f"--variants={config.variants}: give sequence, which the others are compared with, and any of "
                        f"{'; '.join(NAMES)}; by comma")
    longest = config.prompt_len + config.new_tokens * 3 // 2
    if longest > n_ctx:
        raise UserError(f"--prompt_len={config.prompt_len} and --new_tokens={config.new_tokens} come to as many as "
                        f"{longest} tokens, the new ones half as many again, and the model's context is {n_ctx}: give "
                        "less")


# ---------------------------------------------------------------------------------------------------------------------
# The benchmark

def make_rules(model: RecursiveTransformer, kinds: list[str], keys: list[str], ckpt: str | None) -> dict:
    """The rule of each (exits, keys). Forced exits override the gate that the oracle's and drawn ones are given: it
    only costs what a decision does."""
    c = model.config
    any_gate = Gate(c.n_loop - 1, c.n_embd, draw=torch.Generator().manual_seed(0)).to(model.embed.weight.device)
    cost = Rule("gate", math.inf, gate=any_gate)
    return {("never", "exact"): Rule()} | {
        (kind, k): load_rule(ckpt, model, "gate", keys=k) if kind == "gate" else cost for kind in kinds for k in keys}


def full_depth_models(model: RecursiveTransformer, names: list[str]) -> tuple[dict, dict[str, Callable]]:
    """({merged: model}, {name: generate} of the variants without an engine). A model that cannot be unrolled has no
    merged one, and no `generate` of transformers."""
    models, generators = {False: model}, {}
    try:
        models[True] = unroll(model)
        if "transformers" in names and importlib.util.find_spec("transformers"):
            generators["transformers"] = partial(in_transformers(model, "sdpa"), compiled=False)
        elif "transformers" in names:
            print("transformers is not installed: nothing to compare with", file=sys.stderr)
    except UserError as e:
        print(f"not everything can be compared with: {e}", file=sys.stderr)
    return models, generators | {"decode": partial(decode_batch, models.get(True, model))}


@torch.no_grad()
def measure(model: RecursiveTransformer, config: BatchingConfig) -> dict:
    """The results of all variants on one model."""
    c, names, sweep = model.config, variant_names(config), by_comma("slots", config.slots)
    keys = (config.keys or ("exact" if shares_kv(model) else "exact,copy")).split(",")
    kinds = (config.exits or ("oracle,gate" if config.ckpt else "drawn")).split(",")
    kinds = kinds if any(v.name in names for v in EXITS) else []
    rules, (models, generators) = make_rules(model, kinds, keys, config.ckpt), full_depth_models(model, names)
    work = draw_workload(config, model, config.requests or 4 * max(sweep))
    work.full_depth = full_depth_texts(model, work, max(sweep)) if config.ckpt else []
    work.forced_exits = {kind: draw_forced_exits(kind, model, work, config) for kind in kinds if kind != "gate"}
    variants = [v for v in IN_BATCHES if v.name in generators] + [v for v in FULL_DEPTH if v.merged in models]
    variants += [replace(v, exits=kind, keys=k) for kind in kinds for k in keys for v in EXITS]
    names = names if True in models else [*names, "sequence, unmerged"]      # a baseline in any case
    found = run_variants([v for v in variants if v.name in names], models, rules, generators, work, config)
    known = {} if config.ckpt else None
    rows = [summarise(f, model, work, known) for f in found]
    best = compare(rows)
    print(f"{c.n_loop} loops of {c.n_unique} layers, C = {c.n_embd}, rank {c.rank}, vocabulary size {c.vocab_size:,}; "
          f"{len(work.prompts)} requests: prompts of {config.prompt_len}, {config.new_tokens} new tokens on average; "
          f"{config.rounds} rounds\n\n{show(rows)}\n\nbest sequence batching: {best['name']}, {best['slots']} slots, "
          f"{best['tokens_per_s']:,.0f} tok/s")
    quality = {}
    if config.ckpt:
        quality = {"full_depth_loss": text_loss(model, work.prompts, work.full_depth, known),
                   "distinct": distinct_share(work.full_depth)}
        print(f"texts at full depth: loss {quality['full_depth_loss']:.3f}, {quality['distinct']:.0%} of a text's "
              "tokens are distinct")
    else:
        print("random weights: their greedy texts repeat themselves, so none is compared")
    return {"model": asdict(c), "requests": len(work.prompts), "max_len": work.max_len, "best": best["slots"],
            "rows": rows} | quality


def bench_batching(config: BatchingConfig) -> list[dict]:
    """Measure and publish all variants, on the checkpoint or on random weights for each number of loops and rank."""
    device = pick_device(config.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if config.ckpt:
        model = RecursiveTransformer.load(config.ckpt, dtype=dtype).to(device)
        check_workload(config, model.config.n_loop, model.config.n_ctx, ["drawn", "oracle", "gate"])
        models = [model]
    else:
        shape = load_shape(config.shape, config.donor, config.layers, config.vocab)
        shapes = [replace(shape, n_loop=n, rank=r) for n in by_comma("loops", config.loops)
                  for r in by_comma("ranks", config.ranks)]
        for one in shapes:
            check_workload(config, one.n_loop, one.n_ctx, ["drawn"])
        models = (random_model(one, device, dtype) for one in shapes)
    cases = []
    for model in models:
        cases.append({"dtype": str(dtype).removeprefix("torch."), "device": device.type} | measure(model, config))
        publish("serving", config, cases[-1])
    return cases


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
    check_at_least(config, 1, "prompt_len", "new_tokens", "rounds", "refill")
    check_at_least(config, 0, "requests")
    check_exits(config)
    check_ckpt_or_shape(config)
    check_writable("save", config.save)
    check_plot(config.plot)
    if config.plot and not config.ckpt:
        raise UserError("--plot shows speed-up against agreement, and texts of random weights show none: give --ckpt")
    cases = bench_batching(config)
    if config.plot:
        plot_batching(cases[0], config.plot)


if __name__ == "__main__":
    script(main)
