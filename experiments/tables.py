"""The tables of README.md and docs/, each a function of the folder with the results."""

import math
import statistics
import textwrap
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from benchmarks.common import SHAPES
from hf import config_from_hf
from lib.cli import table
from lib.donors import read_json
from lib.results import read_lines
from model import RecursiveTransformer

ROOT = Path(__file__).resolve().parent.parent
EXIT_RANKS = {"tied": 0, "relaxed": 32}        # LoRA ranks of the models in exits_calibrated.jsonl
INITS = {"average": "average + SVD", "calibrated": "calibrated", "low_rank": "plain low rank of that size"}
DRAFT_EXITS = {"out_own_weighted": "weighted", "out_smollm2_2": "weighted", "out_smollm2_3": "weighted",
               "out_smollm2_2_self": "weighted, then self-distilled",
               **dict.fromkeys(("out_own_exits", "out_kv_exits"), "aggressive 0.1, self-distilled")}
SHARING = ("shared, one rank", "shared, ranks by need", "low rank", "any of them")  # ways, of experiments/sharing.py


# ---------------------------------------------------------------------------------------------------------------------
# Cells

def markdown(rows: list[list[str]]) -> str:
    """A table of these cells, the first row the header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def wrap(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def slashed(values: Iterable[float], digits: int = 2) -> str:
    return " / ".join(f"{value:.{digits}f}" for value in values)


def some_lines(path: Path) -> list[dict]:
    """The lines of a file of results. LookupError if it has none."""
    if lines := read_lines(path):
        return lines
    raise LookupError(f"no line in {path.name}")


def find(rows: list[dict], **fields) -> dict:
    """The first row with these fields. Raises LookupError if there is none."""
    for row in rows:
        if fields.items() <= row.items():
            return row
    raise LookupError(f"no row with {fields}")


@cache
def num_params(donor: str, loops: int = 1, rank: int = 0) -> dict[str, int]:
    """Of a recursive model of this donor: "shipped", or a shape of the benchmarks."""
    config = SHAPES.get(donor) or config_from_hf(read_json(ROOT / "assets/donor/config.json"))
    with torch.device("meta"):
        return RecursiveTransformer(replace(config, n_loop=loops, rank=rank)).num_params()


def stored(donor: str, loops: int = 2, rank: int = 0) -> str:
    """What a recursive model stores of its donor's block, without embedding and head, as "68 %"."""
    return percent(num_params(donor, loops, rank)["stored_block"] / num_params(donor)["stored_block"])


def where(lines: list[dict]) -> str:
    """Hardware, versions and commits of these lines."""
    def distinct(values) -> str:
        return ", ".join(dict.fromkeys(str(v) for v in values))
    hardware = distinct(line["gpu"] or line["cpu"] for line in lines)
    threads, version, commit = (distinct(line[key] for line in lines) for key in ("threads", "torch", "commit"))
    return f"{hardware}, {threads} thread{'s' * (threads != '1')}; torch {version}; commit {commit}"


# ---------------------------------------------------------------------------------------------------------------------
# README.md: a function for each table

def stepwise_table(results: Path) -> str:
    """The table that the README's first command prints at its end."""
    log = read_lines(results / "stepwise.jsonl")
    donor, converted, final = log[0]["donor_loss"], log[0]["full_val_loss"], log[-1]["full_val_loss"]
    full, tied = (num_params("shipped", loops) for loops in (1, 2))
    rows = [[name, f"{loss:.4f}", f"{math.exp(loss):.2f}",
             f"{params['stored'] / 1e6:.2f} M", f"{params['run'] / 1e6:.2f} M"]
            for name, loss, params in (("donor", donor, full), ("converted", converted, tied),
                                       ("uptrained", final, tied))]
    head = ["model", "validation loss", "perplexity", "stored", "run per token"]
    return "\n".join(["```", table([head, *rows]), "```"])



def batching_case(results: Path, trained: bool, kv: str = "own") -> dict:
    """The newest line of serving.jsonl of a checkpoint with trained exits, or of random weights."""
    for line in reversed(read_lines(results / "serving.jsonl")):
        if bool(line["settings"]["ckpt"]) == trained and line["model"].get("kv", "own") == kv:
            return line
    raise LookupError(f"no line of {'trained exits' if trained else 'random weights'} in serving.jsonl")


def best_rows(case: dict) -> list[list[dict]]:
    """For each variant of a case its rows, one for each number of slots, the fastest first."""
    by_variant: dict[tuple, list[dict]] = {}
    for row in case["rows"]:
        by_variant.setdefault((row["name"], row["exits"], row["keys"]), []).append(row)
    return [sorted(rows, key=lambda row: -row["over_best"]) for rows in by_variant.values()]


def batching_table(results: Path) -> str:
    """Each way to serve the model with trained exits, with the number of slots that is best for it. Of the variants of
    sequence and of depth-wise batching only the fastest; of the oracle, a limit, what keeps the text."""
    shown: dict[tuple, dict] = {}
    case = batching_case(results, trained=True)
    for row, *_ in best_rows(case):
        group = row["name"].split(",")[0], row["exits"], row["keys"]
        left_out = row["name"] == "synchronous exits" or (row["exits"], row["keys"]) == ("oracle", "copy")
        if not left_out and row["over_best"] > shown.get(group, {"over_best": 0})["over_best"]:
            shown[group] = row
    rows = [["variant", "exits", "slots", "KV", "mean loops", "tok/s over the best sequence batching",
             "over sequence at equal slots", "bound", "same text", "loss of text"]]
    rows += [[row["name"], row["exits"].replace("never", ""), str(row["slots"]), row["kv"], f"{row['mean_loops']:.2f}",
              f"{row['over_best']:.2f}", f"{row['over_sequence']:.2f}", f"{row['bound']:.2f}",
              f"{row['agreement']:.2f}", f"{row['loss']:.2f}"] for row in shown.values()]
    return markdown(rows)


# ---------------------------------------------------------------------------------------------------------------------
# docs/results.md

def decode_table(results: Path) -> str:
    """Tokens/s of `decode` and the engine beside the faster attention of transformers."""
    rows = [["model, full size", "texts", "`decode`", "`engine.py`", "transformers, static cache",
             "speed-up of `decode`"]]
    donor, smollm2 = read_lines(results / "decode.jsonl")[:2]
    for name, line in (("shipped donor, 5 M", donor), ("SmolLM2-135M", smollm2)):
        for n in sorted({row["rows"] for row in line["rows"]}):
            same_n = [row for row in line["rows"] if row["rows"] == n]
            ours, engine = find(same_n, code="decode"), find(same_n, code="engine")
            theirs = max(row["tokens_per_s"] for row in same_n if row["code"].startswith("transformers"))
            rates = (ours["tokens_per_s"], engine["tokens_per_s"], theirs)
            rows.append([name, str(n), *(f"{rate:.1f} tok/s" for rate in rates), f"{ours['of_transformers']:.2f}"])
    return markdown(rows)


# ---------------------------------------------------------------------------------------------------------------------
# docs/exits.md

def calibrated_table(results: Path) -> str:
    """Mean loops at each required agreement, on the half of the text that was not calibrated on."""
    exact = [line for line in read_lines(results / "exits_calibrated.jsonl") if line["settings"]["keys"] == "exact"]
    lines = {kind: [line for line in exact if f"-{kind}-" in line["settings"]["ckpt"]] for kind in EXIT_RANKS}
    rules = ("gate", "max_prob", "margin", "entropy")
    rows = [["agreement", "oracle", *rules]]
    for kind, rank in EXIT_RANKS.items():
        required = sorted({line["agreement"] for line in lines[kind]})
        label = f"{kind}, stored {stored('shipped', 2, rank)}"
        if kind == "tied":
            label += ": " + " / ".join(map(str, required))

        def mean_loops(rule: str, agreement: float, ours=lines[kind]) -> float:
            return statistics.mean(line["calibration_and_check"][rule][1]["loops"] for line in ours
                                   if line["agreement"] == agreement)
        rows.append([label, f"{statistics.mean(line['oracle'][1] for line in lines[kind]):.2f}",
                     *(slashed(mean_loops(rule, agreement) for agreement in required) for rule in rules)])
    return markdown(rows)


# ---------------------------------------------------------------------------------------------------------------------
# docs/calibration.md

def final_losses(line: dict, digits: int) -> str:
    """The loss after the last loop on each text of a line of calibrated.jsonl."""
    return slashed((exits[-1] for exits in line["loss"].values()), digits)


def read_starts(results: Path, donor: str) -> dict[tuple, dict]:
    """(init, loops, rank, tokens calibrated on or None) -> its line of calibrated.jsonl."""
    lines = [line for line in read_lines(results / "calibrated.jsonl") if line["settings"]["donor"] == donor]
    if not lines:
        raise LookupError(f"no line of {donor} in calibrated.jsonl")
    return {(line["init"], line["loops"], line["rank"], line.get("calib_tokens")): line for line in lines}


def start_table(results: Path) -> str:
    """Loss right after conversion, from average + SVD and calibrated, by rank and number of loops."""
    starts = read_starts(results, "SmolLM2-135M")
    ranks, loops = (sorted({key[i] for key in starts}) for i in (2, 1))
    rows = [["LoRA rank", *(head for n in loops for head in (f"{n} loops: stored", *INITS.values()))]]
    for rank in ranks:
        row = [str(rank)]
        for n in loops:
            row += [stored("smollm2", n, rank), *(final_losses(starts[init, n, rank, read], 2) for init, read in
                                                  (("average", None), ("calibrated", 20_480), ("low_rank", 20_480)))]
        rows.append(row)
    return markdown(rows)


def sharing_table(results: Path) -> str:
    """What each way to store the layers costs at equal size, and what they would choose."""
    rows = [["donor", "stored at most", *(f"{way}: error" for way in SHARING), "the pairs then choose"]]
    for line in some_lines(results / "sharing.jsonl"):
        for share in dict.fromkeys(row["asked"] for row in line["rows"]):
            found = [find(line["rows"], asked=share, way=way) for way in SHARING]
            chosen = ", ".join(f"{n} {way}" for way, n in
                               sorted(found[-1]["chosen"].items(), key=lambda item: -item[1]))
            rows.append([line["settings"]["donor"].replace("assets/donor", "shipped donor"), percent(share),
                         *(f"{row['error']:.4f} ({percent(row['stored'])})" for row in found), chosen])
    return markdown(rows)


def read_table(results: Path) -> str:
    """Loss right after calibrated conversion to 2 loops, by the number of tokens read."""
    models = (("SmolLM2-135M", "smollm2", read_starts(results, "SmolLM2-135M")),
              ("shipped donor", "shipped", read_starts(results, "assets/donor")))
    counts = sorted({tokens for _, _, starts in models for *_, tokens in starts if tokens})
    rows = [["model", "rank", "stored", *(f"{n:,} tokens" for n in counts)]]
    for name, donor, starts in models:
        for rank in sorted({rank for _, _, rank, _ in starts if rank}):
            lines = [starts.get(("calibrated", 2, rank, n)) for n in counts]
            if all(lines):
                rows.append([name, str(rank), stored(donor, 2, rank), *(final_losses(line, 3) for line in lines)])
    return markdown(rows)


# ---------------------------------------------------------------------------------------------------------------------
# docs/batching.md, docs/scale.md

def kv_policies_table(results: Path) -> str:
    """Loss on one text by what later tokens find of the loops that a token skipped."""
    names = {"exact": "recomputed", "copy": "copied from the exit loop", "overwritten": "one cache, overwritten",
             "shared": "shared: the first loop's"}
    rows = [["KV", "bytes of a token, bf16", "loss without exits", "with the gate", "mean loops"]]
    for line in some_lines(results / "kv_policies.jsonl"):
        for full, gate in zip(line["rows"][::2], line["rows"][1::2], strict=True):
            rows.append([names[full["policy"]], f"{full['bytes_per_token']:,}", f"{full['loss']:.3f}",
                         f"{gate['loss']:.3f}", f"{gate['mean_loops']:.2f}"])
    return markdown(rows)


def speculative_table(results: Path) -> str:
    """Exits as a draft: for each model the gamma that is fastest."""
    rows = [["model", "exits", "machine", "plain, tok/s", "γ", "accepted", "tok/s", "speed-up", "formula",
             "texts equal"]]
    for line in some_lines(results / "speculative.jsonl"):
        c, asked, best = line["model"], line["settings"], max(line["rows"], key=lambda row: row["speedup"])
        name = "SmolLM2-135M" if c["n_embd"] == 576 else "shipped donor"
        shape = f"{name}, {c['n_loop']} × {c['n_layer'] // c['n_loop']}" + ", shared KV" * (c["kv"] == "first_loop")
        dtype, tokens = {"float32": "fp32", "bfloat16": "bf16"}[line["dtype"]], asked["rows"] * asked["new_tokens"]
        exits = Path(asked["ckpt"]).name
        exits = DRAFT_EXITS.get(exits, exits)
        rows.append([shape, exits, f"{line['gpu'] or 'CPU, threads: {}'.format(line['threads'])}, {dtype}",
                     f"{tokens / line['plain_seconds']:.0f}", str(best["gamma"]), percent(best["acceptance"]),
                     f"{tokens / best['seconds']:.0f}", f"{best['speedup']:.2f}", f"{best['formula']:.2f}",
                     f"{best['equal_texts']} of {line['texts']}"])
    return markdown(rows)


def batching_details_table(results: Path) -> str:
    """Every row of the batching benchmark, with trained exits and, where they were run, with shared KV and with random
    weights: of each shape and machine the newest."""
    parts = [batching_details(batching_case(results, trained=True))]
    with suppress(LookupError):
        parts.append(batching_details(batching_case(results, trained=True, kv="first_loop")))
    drawn = {(line["model"]["n_embd"], line["gpu"]): line for line in read_lines(results / "serving.jsonl")
             if not line["settings"]["ckpt"]}
    return "\n\n".join([*parts, *map(batching_details, drawn.values())])


def batching_details(case: dict) -> str:
    """A row for each variant: its speed by number of slots, and the rest with the number that is fastest."""
    c, asked, trained = case["model"], case["settings"], bool(case["settings"]["ckpt"])
    shared = ", shared KV" * (c.get("kv") == "first_loop")
    about = (f"**{c['n_loop']} loops of {c['n_layer'] // c['n_loop']} layers, C = {c['n_embd']}, rank {c['rank']}"
             f"{shared}, {'trained exits' if trained else 'random weights'}**: {case['requests']} requests, prompts of "
             f"{asked['prompt_len']} tokens, {asked['new_tokens']} new ones on average, {asked['rounds']} rounds; "
             f"{case['gpu'] or case['cpu']}")
    if trained:
        about += (f"; texts at full depth have a loss of {case['full_depth_loss']:.3f}, and "
                  f"{percent(case['distinct'])} of a text's tokens are distinct")
    sweep = sorted({row["slots"] for row in case["rows"]})
    rows = [["variant", "exits", "KV", "mean loops", *(f"tok/s, {slots} slots" for slots in sweep), "over the best",
             "bound", "of the bound", *(["same text", "loss of text"] if trained else []), "ghost rows",
             "prompts / block / decision / head / rest, %"]]
    for best, *others in best_rows(case):
        speeds = {row["slots"]: f"{row['tokens_per_s']:,.0f} ({row['range'][0]:,.0f} to {row['range'][1]:,.0f})"
                  for row in (best, *others)}
        text = [f"{best['agreement']:.2f}", f"{best['loss']:.3f}"] if trained else []
        bound, engine = ["", ""], ["", ""]
        if best["time"]:                                     # not transformers' generate, nor decode
            bound = [f"{best['bound']:.2f}", percent(best["of_bound"])]
            engine = [percent(best["ghosts"]), " / ".join(f"{100 * share:.0f}" for share in best["time"].values())]
        rows.append([best["name"], best["exits"].replace("never", ""), best["kv"], f"{best['mean_loops']:.2f}",
                     *(speeds.get(slots, "") for slots in sweep), f"{best['over_best']:.2f}", *bound, *text, *engine])
    return f"{wrap(about + ':')}\n\n{markdown(rows)}"


def scale_table(results: Path) -> str:
    """The measurements of training and conversion beside their baselines."""
    def on_cpu(name: str) -> list[dict]:
        return [line for line in read_lines(results / f"{name}.jsonl") if not line.get("gpu")]

    def rate(rows: list[dict], **fields) -> float:
        return find(rows, **fields)["tokens_per_s"]

    loss, step, lora = (on_cpu(name)[-1]["rows"] for name in ("loss", "train", "lora"))
    chunked, naive = (find(loss, distill=True, code=code) for code in ("chunked", "naive"))
    def speed_ups(distill: bool) -> str:
        theirs = rate(step, code="transformers", distill=distill)
        ours = [rate(step, code="ours", loops=loops, rank=rank, distill=distill)
                for loops, rank in ((1, 0), (2, 0), (2, 64))]
        return ", ".join(f"{tokens_per_s / theirs:.2f} ×" for tokens_per_s in ours)

    def lora_time(path: str) -> str:
        rates = [rate(lora, rank=rank, path=path) for rank in (64, 512)]
        return ", ".join(percent(rate(lora, rank=0) / with_lora - 1) for with_lora in rates)

    conversion = find(on_cpu("convert"), what="scale")
    return markdown([
        ["what", "here", "baseline", "file"],
        ["memory of the loss beside its input, 4,096 tokens, V = 256,000, with distillation",
         f"{chunked['added_gib_at_all']:.2f} GiB",
         f"{naive['added_gib_at_all']:.0f} GiB, naive (extrapolated from 1,024 tokens)", "loss.jsonl"],
        ["speed of that loss", f"{chunked['tokens_per_s'] / naive['tokens_per_s']:.1f} ×", "1, naive", "loss.jsonl"],
        ["speed of a training step at SmolLM2's shape: full size, 2 loops, 2 loops with r 64", speed_ups(distill=False),
         "1, transformers at full size", "train.jsonl"],
        ["the same with distillation", speed_ups(distill=True), "1, transformers at full size", "train.jsonl"],
        ["time that LoRA adds to a training step of one layer, C = 2048, 4,096 tokens: r 64, r 512",
         f"{lora_time('merged')} (merged)", f"{lora_time('separate')} (a path of its own)", "lora.jsonl"],
        [f"converting Gemma 2B's shapes to 2 loops, average + SVD, r 512 (stored {stored('gemma-2b', 2, 512)})",
         f"{conversion['seconds']:.0f} s, {conversion['peak_gib']:.1f} GiB", "", "convert.jsonl"]])
