"""The tables of README.md and docs/, each a function of the folder with the results."""

import math
import statistics
import textwrap
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from benchmarks.common import SHAPES
from experiments.conclusions import ExitLoss, Measured, conclusions
from experiments.matrix import EXITS, MODELS, ROOT, exit_run
from experiments.verdicts import (
    ALIKE,
    FAILS,
    HOLDS,
    MISSING,
    OPEN,
    Losses,
    Runs,
    all_losses,
    exit_lines,
    first_seed,
    gap,
    read_exits,
    read_runs,
    read_starts,
    settings_without,
    spread,
    unfinished,
    verdict,
    with_same_settings,
)
from hf import config_from_hf
from lib.cli import table
from lib.donors import read_json
from lib.results import read_lines
from model import RecursiveTransformer

EXIT_RANKS = {"tied": 0, "relaxed": 32}        # LoRA ranks of the models in exits_seeds.jsonl
INITS = {"average": "average + SVD", "calibrated": "calibrated"}


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


def find(rows: list[dict], **fields) -> dict:
    """The first row with these fields. Raises LookupError if there is none."""
    for row in rows:
        if fields.items() <= row.items():
            return row
    raise LookupError(f"no row with {fields}")


@cache
def num_params(donor: str, loops: int = 1, rank: int = 0) -> dict[str, int]:
    """Of a recursive model of this donor: "shipped", or a shape of the benchmarks."""
    config = SHAPES.get(donor) or config_from_hf(read_json(ROOT / MODELS["toy"].donor / "config.json"))
    with torch.device("meta"):
        return RecursiveTransformer(replace(config, n_loop=loops, rank=rank)).num_params()


def stored(donor: str, loops: int = 2, rank: int = 0) -> str:
    """What a recursive model stores of its donor's block, without embedding and head, as "68 %"."""
    return percent(num_params(donor, loops, rank)["stored_block"] / num_params(donor)["stored_block"])


def stored_by(measured: Measured, runs: Runs) -> str:
    """The same for a run of the matrix (empty if it was not run) or a model with trained exits."""
    if isinstance(measured, ExitLoss):
        return stored("shipped", 2, EXIT_RANKS[measured.kind])
    if measured not in runs:
        return ""
    return percent(first_seed(runs[measured])["params"]["stored_block"] / num_params("shipped")["stored_block"])


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
    """What the README's first command prints at its end."""
    log = read_lines(results / "stepwise.jsonl")
    donor, converted, final = log[0]["donor_loss"], log[0]["full_val_loss"], log[-1]["full_val_loss"]
    full, tied = (num_params("shipped", loops) for loops in (1, 2))
    rows = [[name, f"{loss:.4f}", f"{math.exp(loss):.2f}",
             f"{params['stored'] / 1e6:.2f} M", f"{params['run'] / 1e6:.2f} M"]
            for name, loss, params in (("donor", donor, full), ("converted", converted, tied),
                                       ("uptrained", final, tied))]
    won_back = (converted - final) / (converted - donor)
    return "\n".join(["```", table([["model", "validation loss", "perplexity", "stored", "run per token"], *rows]),
                      f"{won_back:.0%} of what conversion cost is won back", "```"])


# Of the batching benchmark: name in results/batching.jsonl -> the variant, and when the head runs.
VARIANTS = {"V0": ("static", "every pass"), "V1": ("sequence", "every pass"),
            "V2": ("sequence, not merged", "on the whole batch"), "V3": ("depthwise", "every pass"),
            "V3h": ("depthwise", "on full batches"), "V4": ("synchronous exits", "on the whole batch"),
            "V5": ("depthwise+exits", "every pass"), "V5h": ("depthwise+exits", "on full batches")}
KV = {"exact": "recomputed", "copy": "copied"}


def batching_rows(results: Path, line: int) -> list[dict]:
    """The rows of that line of batching.jsonl: 0 has random weights, 1 the shipped donor."""
    case, = read_lines(results / "batching.jsonl")[line]["cases"]
    return case["rows"]


def batching_table(results: Path) -> str:
    """Speed-up over sequence batching, measured and by the formula."""
    rows = [["variant", "head runs", "slots", "KV", "C = 1024", "formula", "shipped donor", "formula", "same text"]]
    for name, keys in (("V1", None), ("V3", None), ("V3h", None),
                       ("V4", "exact"), ("V5", "exact"), ("V5h", "exact"), ("V5h", "copy")):
        random, donor = (
            find(batching_rows(results, line), name=name, **({"exits": exits, "keys": keys} if keys else {}))
            for line, exits in ((0, "drawn"), (1, "oracle")))
        rows.append([*VARIANTS[name], str(random["slots"]), KV.get(keys, ""),
                     *(f"{row[key]:.2f}" for row in (random, donor) for key in ("of_v1", "formula")),
                     f"{donor['agreement']:.2f}"])
    return markdown(rows)


# Conclusions whose losses after training depend on the one learning rate of all runs, see docs/results.md.
ONE_RATE = ("relaxed", "rank", "norms")


def verdicts_table(results: Path) -> str:
    """A line for each conclusion."""
    runs, losses = read_runs(results, "toy"), all_losses(results, "toy")
    words = {HOLDS: "holds", FAILS: "does not hold", OPEN: "cannot tell", MISSING: "not run"}
    rows = [["", "the paper's conclusion", "stored block", "on the shipped donor"]]
    for i, c in enumerate(conclusions(*MODELS["toy"].ranks), 1):
        shares = {stored_by(measured, runs) for measured in c.rows if measured != "full"} - {""}
        rows.append([str(i), c.sentence, ", ".join(sorted(shares)),
                     words[verdict(c, losses)] + " †" * (c.name in ONE_RATE)])
    return markdown(rows)


# ---------------------------------------------------------------------------------------------------------------------
# docs/results.md

def conclusion_rows(runs: Runs, losses: Losses) -> list[list[str]]:
    """A row for each conclusion, and below it one for each loss that it compares."""
    def ours(measured: Measured) -> str:
        final = spread(losses.get(measured, {}).values())
        if measured not in runs:                             # exits: other files have their starts
            return final
        return f"{statistics.mean(line['start_loss'] for line in runs[measured].values()):.3f} → {final}"
    rows = []
    for i, c in enumerate(conclusions(*MODELS["toy"].ranks), 1):
        rows.append([f"**{i} {c.name}**: {c.says}", "", f"**{verdict(c, losses)}**", c.metric])
        rows += [[label, stored_by(measured, runs), ours(measured), paper]
                 for measured, (label, paper) in c.rows.items()]
    return rows


def conclusions_table(results: Path) -> str:
    """The eight conclusions in figures, and the share of the gap that the largest rank closes."""
    runs, losses, top = read_runs(results, "toy"), all_losses(results, "toy"), MODELS["toy"].ranks[2]
    lines = [line for name, seeds in runs.items() for line in seeds.values() if name != "donor"]
    tied = first_seed(runs["stepwise"])
    tokens, donor, valid = tied["settings"]["tokens"], tied["donor_loss"], tied["valid_tokens"]
    paper_share = math.log(11.44 / 10.81) / math.log(11.44 / 10.58)
    text = [
        wrap(f"The donor has a loss of {donor:.3f}. Each run of 1 to 5 and 8 trained on {tokens:,} tokens, without "
             f"distillation unless it says so, and was measured on {valid:,} tokens of a book that neither it nor the "
             "donor had seen: loss right after conversion → loss after training, mean ± standard deviation over three "
             "seeds, in nats. \"Stored block\" is the share of the donor's parameters, embedding and head apart. The "
             "models of 6 and 7 are those of exits.md. The paper's figures are Gemma 2B's with 2 loops, those of 1 to "
             "6 after 15 billion tokens: perplexity or accuracy."),
        markdown([["", "stored block", "loss, ours", "paper"], *conclusion_rows(runs, losses)]),
        wrap("A claim holds where the means differ by twice the standard error of their difference. Two runs count as "
             f"alike (≈) where they differ by less than {ALIKE}, by the same margin. One seed decides nothing. 1 to 5, "
             f"8: {where(lines)}. 6, 7 (`{EXITS}`): {where(exit_lines(results, 'toy'))}."),
        wrap(f"What the LoRA wins back: the share of the gap between donor and tied model that rank {top} "
             f"({stored_by(f'average-r{top}', runs)} of the donor's block, tied {stored_by('stepwise', runs)}) closes "
             "after as many tokens. (The paper's largest rank, r 512 at "
             f"{stored('gemma-2b', 2, 512)} of Gemma 2B's block, after 60 billion tokens with distillation: "
             f"{paper_share:.2f}, from perplexities of 11.44 tied, 10.81 with r 512, 10.58 at full size on the same "
             "tokens.)"),
        markdown([["tokens", "tied, stepwise", f"average + SVD, r {top}", "share"], *gap(runs, top)])]
    if missing := unfinished(runs, "toy"):
        text.append(wrap("Seeds still missing: " + ", ".join(missing) + "."))
    return "\n\n".join(text)


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

def exits_table(results: Path) -> str:
    """Loss after each loop, by how the exits were trained."""
    losses = read_exits(results, "toy")
    tied, relaxed = (stored("shipped", 2, rank) for rank in EXIT_RANKS.values())
    rows = [["loss after loop 1 / 2", f"tied ({tied} of the donor's block)",
             f"relaxed: average + SVD, r {EXIT_RANKS['relaxed']} ({relaxed})"]]
    for training, label in (("none", "post-trained without exit losses"), ("weighted", "weighted"),
                            ("self", "aggressive 0.1, self-distilled")):
        rows.append([label, *(" / ".join(spread(losses[ExitLoss(kind, training, loop)].values()) for loop in (1, 2))
                              for kind in EXIT_RANKS)])
    return markdown(rows)


def calibrated_table(results: Path) -> str:
    """Mean loops at each required agreement, on the half of the text that was not calibrated on."""
    lines = with_same_settings([line for line in read_lines(results / "exits_calibrated.jsonl")
                                if line["settings"]["keys"] == "exact"], settings_without("agreement", "new_gate"))
    rules = ("gate", "max_prob", "margin", "entropy")
    rows = [["agreement", "oracle", *rules]]
    for kind, rank in EXIT_RANKS.items():
        ours = [line for line in lines if (run := exit_run(line)) and run.kind == kind]
        required = sorted({line["agreement"] for line in ours})
        label = f"{kind}, stored {stored('shipped', 2, rank)}"
        if kind == "tied":
            label += ": " + " / ".join(map(str, required))

        def mean_loops(rule: str, agreement: float, ours=ours) -> float:
            return statistics.mean(line["calibration_and_check"][rule][1]["loops"] for line in ours
                                   if line["agreement"] == agreement)
        rows.append([label, f"{statistics.mean(line['oracle'][1] for line in ours):.2f}",
                     *(slashed(mean_loops(rule, agreement) for agreement in required) for rule in rules)])
    return markdown(rows)


# ---------------------------------------------------------------------------------------------------------------------
# docs/calibration.md

def final_losses(line: dict, digits: int) -> str:
    """The loss after the last loop on each text of a line of calibrated.jsonl."""
    return slashed((exits[-1] for exits in line["loss"].values()), digits)


def start_table(results: Path) -> str:
    """Loss right after conversion, from average + SVD and calibrated, by rank and number of loops."""
    starts = read_starts(results, "SmolLM2-135M")
    ranks, loops = (sorted({key[i] for key in starts}) for i in (2, 1))
    rows = [["LoRA rank", *(head for n in loops for head in (f"{n} loops: stored", *INITS.values()))]]
    for rank in ranks:
        row = [str(rank)]
        for n in loops:
            row += [stored("smollm2", n, rank), final_losses(starts["average", n, rank, None], 2),
                    final_losses(starts["calibrated", n, rank, 20_480], 2)]
        rows.append(row)
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


def saved_table(results: Path) -> str:
    """The shipped donor uptrained from both starts."""
    runs, mid = read_runs(results, "toy"), MODELS["toy"].ranks[1]
    run = first_seed(runs[f"average-r{mid}-long"])
    donor = first_seed(runs["donor"])                        # on the shorter text, on which exits are measured
    rows = [[f"rank {mid} ({stored_by(f'average-r{mid}-long', runs)} of the donor's block)", "start",
             f"after {run['settings']['tokens']:,} tokens", f"the same on {donor['valid_tokens']:,} tokens",
             "there, trained with exit losses: loop 1 / 2"],
            ["donor", "", f"{run['donor_loss']:.3f}", f"{donor['loss']:.3f}", ""]]
    for init, label in INITS.items():
        lines, exits = (list(runs[f"{init}-r{mid}-{how}"].values()) for how in ("long", "exits"))
        rows.append([label, *(spread(line[key] for line in lines) for key in ("start_loss", "loss")),
                     spread(line["exit_loss"][-1] for line in lines),
                     " / ".join(spread(line["exit_loss"][loop] for line in exits) for loop in (0, 1))])
    return markdown(rows)


def saved_smollm2_table(results: Path) -> str:
    """SmolLM2-135M uptrained from both starts."""
    lines = read_lines(results / "calibrated_smollm2.jsonl")
    rows = [["SmolLM2-135M, 2 loops", "stored", "start", "loss"],
            ["donor", "100 %", "", f"{lines[0]['donor_loss']:.2f}"]]
    rows += [[f"{INITS[line['init']]}, rank {line['rank']}", stored("smollm2", 2, line["rank"]),
              f"{line['start_loss']:.2f}", f"{line['loss']:.2f}"] for line in lines]
    return markdown(rows)


# ---------------------------------------------------------------------------------------------------------------------
# docs/batching.md, docs/scale.md

def batching_details_table(results: Path) -> str:
    """Every row of the batching benchmark."""
    parts = []
    for line, title in ((0, "C = 1024, random weights, exits drawn with a mean of 1.26 loops"),
                        (1, "shipped donor with trained exits")):
        rows = [["variant", "letter", "exits", "KV", "slots", "tok/s", "speed-up over sequence", "formula",
                 "mean loops", "ghost rows", "same text"]]
        for row in batching_rows(results, line):
            kv = "" if row["exits"] == "never" else KV[row["keys"]]
            rows.append([
                VARIANTS[row["name"]][0], row["name"], row["exits"], kv,
                str(row["slots"]), f"{row['tokens_per_s']:.0f}", f"{row['of_v1']:.2f}",
                "" if row["formula"] is None else f"{row['formula']:.2f}", f"{row['mean_loops']:.2f}",
                percent(row["ghosts"]), "" if line == 0 else f"{row['agreement']:.2f}"])
        parts.append(f"**{title}**\n\n{markdown(rows)}")
    return "\n\n".join(parts)


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
        ours = [rate(step, code="ours", loops=loops, rank=0, distill=distill) for loops in (1, 2)]
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
        ["speed of a training step at SmolLM2's shape: full size, 2 loops", speed_ups(distill=False),
         "1, transformers at full size", "train.jsonl"],
        ["the same with distillation", speed_ups(distill=True), "1, transformers at full size", "train.jsonl"],
        ["time that LoRA adds to a training step of one layer, C = 2048, 4,096 tokens: r 64, r 512",
         f"{lora_time('merged')} (merged)", f"{lora_time('separate')} (a path of its own)", "lora.jsonl"],
        [f"converting Gemma 2B's shapes to 2 loops, average + SVD, r 512 (stored {stored('gemma-2b', 2, 512)})",
         f"{conversion['seconds']:.0f} s, {conversion['peak_gib']:.1f} GiB", "", "convert.jsonl"]])


def uptrain_table(results: Path) -> str:
    """SmolLM2-135M-Instruct after half an hour of uptraining, tied and relaxed."""
    tied, relaxed = (read_lines(results / f"uptrain_smollm2_{name}.jsonl") for name in ("stepwise", "average64"))
    rows = [["SmolLM2-135M-Instruct as 2 × 15 layers", "stored", "start", "after half an hour"],
            ["donor", "100 %", "", f"{tied[0]['donor_loss']:.2f}"]]
    for log, label, rank in ((tied, "tied, stepwise", 0), (relaxed, "average + SVD, r 64", 64)):
        rows.append([label, stored("smollm2", 2, rank),
                     *(f"{line['full_val_loss']:.2f}" for line in (log[0], log[-1]))])
    return markdown(rows)
