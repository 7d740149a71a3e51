"""What results/ says: the paper's conclusions beside ours, the README's figures, and the plots. Measures nothing.

    python report.py                # the conclusions, claim by claim
    python report.py --write        # and into the README, between its markers (a test says if it is old)
    python report.py --plots        # results/*.png from the same files; needs the [plot] extra
"""

import math
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bench_batching import plot_batching
from experiments.matrix import EXITS, MODELS, Conclusion, beside, conclusions, exit_run, other_settings
from lib.cli import UserError, parse_args, print0, script, table
from lib.results import read_lines

ROOT = Path(__file__).resolve().parent
ALIKE = 0.05                                   # nats: runs closer than this are said to be alike (5 % of perplexity)
HOLDS, FAILS, OPEN, MISSING = "holds", "does not", "cannot tell", "not run"
Losses = dict[str, dict[int, float]]           # run -> seed -> loss in nats


# ---------------------------------------------------------------------------------------------------------------------
# From the files to verdicts

@cache
def say_once(text: str) -> None:
    print(text, file=sys.stderr)


def alike(lines: list[dict], settings: Callable[[dict], tuple]) -> list[dict]:
    """Those of the lines whose settings most of them have, of equals the last: figures of others are no seeds of the
    same, nor to be set beside them. How many are left out is said."""
    found = [settings(line) for line in lines]
    most = max(reversed(found), key=Counter(found).__getitem__, default=None)
    for other, n in Counter(found).items():
        if other != most:
            differs = ", ".join(f"{key}={value}" for key, value in other if (key, value) not in most)
            say_once(f"{n} lines of other settings ({differs or 'the default ones'}) are left out; results in a folder "
                     "of their own can be read with --results")
    return [line for line, each in zip(lines, found, strict=True) if each == most]


def settings_but(*names: str) -> Callable[[dict], tuple]:
    """For `alike`: a line's settings without these and what changes no figure; what is not set is not there."""
    aside = {"save", "device", "plot", "ckpt", *names}
    return lambda line: tuple(sorted((key, str(value)) for key, value in line["settings"].items()
                                     if key not in aside and value is not None))


def read_runs(results: Path, model: str) -> dict[str, dict[int, dict]]:
    """run -> seed -> its line of experiments.jsonl, the last where there are several."""
    runs: dict[str, dict[int, dict]] = {}
    lines = [line for line in read_lines(results / "experiments.jsonl") if line.get("model") == model]
    for line in alike(lines, other_settings):
        runs.setdefault(line["name"], {})[line["seed"]] = line
    return runs


def exit_lines(results: Path, model: str) -> list[dict]:
    """What runs/exits_seeds.sh or runs/smollm2.sh measured."""
    return alike([line for line in read_lines(results / "exits_seeds.jsonl")
                  if "exit_loss" in line and exit_run(line, model)], settings_but())


def read_exits(results: Path, model: str) -> Losses:
    """"tied-self 1" -> seed -> loss after loop 1, and so on."""
    losses: Losses = {}
    for line in exit_lines(results, model):
        name, seed = exit_run(line, model)
        for loop, loss in enumerate(line["exit_loss"]):
            losses.setdefault(f"{name} {loop + 1}", {})[seed] = loss
    return losses


def all_losses(results: Path, model: str) -> Losses:
    losses = {name: {seed: line["loss"] for seed, line in seeds.items()}
              for name, seeds in read_runs(results, model).items()}
    return losses | read_exits(results, model)


def first(seeds: dict[int, dict]) -> dict:
    return list(seeds.values())[0]


def spread(values) -> str:
    """Mean ± standard deviation (n - 1); the mean alone of one value, a blank of none."""
    values = list(values)
    if len(values) < 2:
        return "".join(f"{v:.3f}" for v in values)
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def difference(a: list[float], b: list[float]) -> tuple[float, float]:
    """(mean of b less mean of a, its standard error), for two sets of at least two seeds each."""
    error = math.sqrt(sum(statistics.variance(x) / len(x) for x in (a, b)))
    return statistics.mean(b) - statistics.mean(a), error


def judge(claim: str, losses: Losses) -> tuple[str, str]:
    """(verdict, why) of "a < b", a's loss is lower, by twice the standard error; or of "a ~ b", they differ by less
    than ALIKE, by as much. The other way round by as much: it does not hold. Between, or of one seed: cannot tell."""
    left, sign, right = re.split(" ([<~]) ", claim)
    a, b = (list(losses.get(name, {}).values()) for name in (left, right))
    if not a or not b:
        return MISSING, ""
    if min(len(a), len(b)) < 2:
        return OPEN, f"{statistics.mean(b) - statistics.mean(a):+.4f}, one seed"
    d, error = difference(a, b)
    low, high = (d - 2 * error, d + 2 * error) if sign == "<" else (ALIKE - abs(d) - 2 * error,
                                                                   ALIKE - abs(d) + 2 * error)
    return HOLDS if low > 0 else FAILS if high < 0 else OPEN, f"{d:+.4f} ± {error:.4f}"


def verdict(conclusion: Conclusion, losses: Losses) -> str:
    """All claims hold, or one does not; else what is in the way."""
    verdicts = [judge(claim, losses)[0] for claim in conclusion.claims]
    return next((v for v in (FAILS, MISSING, OPEN) if v in verdicts), HOLDS)


def gap(runs: dict[str, dict[int, dict]], top: int) -> list[list[str]]:
    """Rows: tokens, loss of tied and of the largest rank, share of the gap between tied and donor that it makes good.
    Each share is of one seed: the same text in the same order."""
    rows = []
    for suffix in ("-quarter", "", "-fourfold"):
        tied, relaxed = (runs.get(name + suffix, {}) for name in ("stepwise", f"average-r{top}"))
        if both := sorted(tied.keys() & relaxed.keys()):
            donor = tied[both[0]]["donor_loss"]
            shares = [(tied[s]["loss"] - relaxed[s]["loss"]) / (tied[s]["loss"] - donor) for s in both]
            tokens = tied[both[0]]["settings"]["tokens"]
            rows.append([f"{tokens:,}", *(spread(of[s]["loss"] for s in both) for of in (tied, relaxed)),
                         spread(shares)])
    return rows


def unfinished(runs: dict[str, dict[int, dict]], model: str) -> list[str]:
    """Runs of the matrix that lack seeds, as "name (1 of 3)"."""
    ranks, seeds = MODELS[model].ranks, MODELS[model].seeds
    names = [run for c in conclusions(*ranks) for run in c.rows if " " not in run]
    names += [run for group in beside(*ranks).values() for run in group]
    return [f"{n} ({len(runs.get(n, {}))} of {seeds})" for n in dict.fromkeys(names) if len(runs.get(n, {})) < seeds]


# ---------------------------------------------------------------------------------------------------------------------
# The README's blocks, each from its file: <!-- NAME --> ... <!-- /NAME -->

def where(lines: list[dict]) -> str:
    """Hardware, versions and commits of these lines."""
    def several(values) -> str:
        return ", ".join(dict.fromkeys(str(v) for v in values))
    threads = several(line["threads"] for line in lines)
    return (f"{several(line['gpu'] or line['cpu'] for line in lines)}, {threads} thread{'s' * (threads != '1')}; torch "
            f"{several(line['torch'] for line in lines)}; commit {several(line['commit'] for line in lines)}")


def markdown(rows: list[list[str]]) -> str:
    """A table of these cells, the first row the header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def wrap(text: str, width: int = 80) -> str:
    import textwrap
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


def block_conclusions(results: Path) -> str:
    """The eight conclusions, what the largest rank wins back, and what is missing."""
    runs, losses, model = read_runs(results, "toy"), all_losses(results, "toy"), MODELS["toy"]
    lines = [line for name, seeds in runs.items() for line in seeds.values() if name != "donor"]
    exits = exit_lines(results, "toy")
    rows = [["", "loss, ours", "paper"]]

    def ours(run):                             # on the way from its start, which other files do not have
        starts = [f"{statistics.mean(line['start_loss'] for line in runs[run].values()):.3f}"] if run in runs else []
        return " → ".join([*starts, spread(losses.get(run, {}).values())])
    for i, c in enumerate(conclusions(*model.ranks), 1):
        rows.append([f"**{i} {c.name}**: {c.says}", f"**{verdict(c, losses)}**", c.metric])
        rows += [[label, ours(run), paper] for run, (label, paper) in c.rows.items()]
    tied = first(runs["stepwise"])
    tokens, donor = tied["settings"]["tokens"], tied["donor_loss"]
    valid = f"{tied['valid_tokens']:,}" if tied["valid_tokens"] else "some"  # of runs by older versions it is not known
    text = [
        wrap(f"The donor has a loss of {donor:.3f}; each run of 1 to 5 and 8 trained on {tokens:,} tokens, without "
             f"distillation where nothing else is said, and was measured on {valid} of a book that neither it nor "
             "the donor had seen: loss right after conversion → loss after training. (The learning rate is train.py's "
             "default, too high for what starts near the donor: that, and the donor itself, ends worse.) 6 and 7 are "
             "the models of \"Leaving early\". Mean ± standard deviation over the seeds there are, three unless a list "
             "below says otherwise, in nats. The paper's are Gemma 2B's with 2 loops, 1 to 6 after 15 billion tokens: "
             "perplexity or accuracy."),
        markdown(rows),
        wrap("A claim holds where the means differ by twice the standard error of their difference; runs are alike (≈) "
             f"where they differ by less than {ALIKE}, with as much to spare; of one seed nobody can tell. "
             "`python experiments.py --only=NAME` runs one conclusion, `python report.py` shows each claim. "
             f"1 to 5, 8: {where(lines)}. 6, 7 (`{EXITS}`): {where(exits)}."),
        wrap(f"What the LoRA wins back: the share of the gap between donor and tied model that rank {model.ranks[2]} "
             "closes after as many tokens. (The paper's largest rank, after 60 billion with distillation: "
             f"{math.log(11.44 / 10.81) / math.log(11.44 / 10.58):.2f}, of perplexities of 11.44 tied, 10.81 with r "
             "512, 10.58 at full size on the same tokens.)"),
        markdown([["tokens", "tied, stepwise", f"average + SVD, r {model.ranks[2]}", "share"],
                  *gap(runs, model.ranks[2])])]
    if missing := unfinished(runs, "toy"):
        text.append(wrap("Seeds still missing: " + ", ".join(missing) + "."))
    return "\n\n".join(text)


def block_stepwise(results: Path) -> str:
    """The table that the README's first command ends with, from its log."""
    log = read_lines(results / "stepwise.jsonl")
    donor, converted, final = log[0]["donor_loss"], log[0]["full_val_loss"], log[-1]["full_val_loss"]
    rows = [[name, f"{loss:.4f}", f"{math.exp(loss):.2f}", stored, "4.99 M"] for name, loss, stored in (
        ("donor", donor, "4.99 M"), ("converted", converted, "2.89 M"), ("uptrained", final, "2.89 M"))]
    won = (converted - final) / (converted - donor)
    return "\n".join(["```", table([["model", "validation loss", "perplexity", "stored", "run per token"], *rows]),
                      f"{won:.0%} of what conversion cost is won back", "```"])


def block_exits(results: Path) -> str:
    """Loss after each loop, by how the exits were trained."""
    losses = read_exits(results, "toy")
    rows = [["loss after loop 1 / 2", "tied", "relaxed (average, r 32)"]]
    for how, says in (("none", "post-trained without exit losses"), ("weighted", "weighted"),
                      ("self", "aggressive 0.1, self-distilled")):
        rows.append([says, *(" / ".join(spread(losses[f"{kind}-{how} {loop}"].values()) for loop in (1, 2))
                             for kind in ("tied", "relaxed"))])
    return markdown(rows)


def block_calibrated(results: Path) -> str:
    """Mean loops of 2 at the agreement asked for, on the half of the text that was not calibrated on."""
    lines = alike([line for line in read_lines(results / "exits_calibrated.jsonl")
                   if line["settings"]["keys"] == "exact"], settings_but("agreement", "new_gate"))
    rules = ("gate", "max_prob", "margin", "entropy")
    rows = [["agreement", "oracle", *rules]]
    for kind in ("tied", "relaxed"):
        ours = [line for line in lines if f"-{kind}-" in line["settings"]["ckpt"]]
        asked = sorted({line["agreement"] for line in ours})

        def loops(rule, ours=ours, asked=asked):
            return " / ".join(f"{statistics.mean(line['calibration_and_check'][rule][1]['loops'] for line in at):.2f}"
                              for at in ([line for line in ours if line["agreement"] == a] for a in asked))
        oracle = f"{statistics.mean(line['oracle'][1] for line in ours):.2f}"
        rows.append([f"{kind}, {' / '.join(map(str, asked))}" if kind == "tied" else kind, oracle, *map(loops, rules)])
    return markdown(rows)


def read_starts(results: Path, donor: str) -> dict[tuple, dict]:
    """(init, loops, rank, tokens calibrated on) -> its line of calibrated.jsonl."""
    lines = [line for line in read_lines(results / "calibrated.jsonl") if line["settings"]["donor"] == donor]
    if not lines:
        raise LookupError(f"no line of {donor} in calibrated.jsonl")
    return {(line["init"], line["loops"], line["rank"], line.get("calib_tokens")): line
            for line in alike(lines, settings_but("loops", "ranks", "calib_tokens"))}


def block_start(results: Path) -> str:
    """The loss right after conversion, on two texts: the paper's start beside the calibrated one."""
    starts = read_starts(results, "SmolLM2-135M")
    ranks, loops = (sorted({key[i] for key in starts}) for i in (2, 1))
    rows = [["LoRA rank", *(f"{n} loops: {init}" for n in loops for init in ("average + SVD", "calibrated"))]]
    for rank in ranks:
        cells = [starts.get((init, n, rank, tokens)) for n in loops
                 for init, tokens in (("average", None), ("calibrated", 20_480))]
        rows.append([str(rank), *(" / ".join(f"{text[-1]:.2f}" for text in line["loss"].values()) if line else ""
                                  for line in cells)])
    return markdown(rows)


def block_read(results: Path) -> str:
    """The loss right after calibrated conversion into 2 loops, by how much text was read."""
    starts = {name: read_starts(results, donor) for name, donor in (("SmolLM2-135M", "SmolLM2-135M"),
                                                                    ("shipped donor", "assets/donor"))}
    counts = sorted({n for found in starts.values() for *_, n in found if n})
    cases = [(name, rank) for name, found in starts.items() for rank in sorted({rank for _, _, rank, _ in found})
             if rank and all(("calibrated", 2, rank, n) in found for n in counts)]
    rows = [["tokens read", *(f"{name}, rank {rank}" for name, rank in cases)]]
    for n in counts:
        lines = [starts[name]["calibrated", 2, rank, n] for name, rank in cases]
        rows.append([f"{n:,}", *(" / ".join(f"{text[-1]:.3f}" for text in line["loss"].values()) for line in lines)])
    return markdown(rows)


def block_saved(results: Path) -> str:
    """Uptraining from both starts."""
    runs, mid = read_runs(results, "toy"), MODELS["toy"].ranks[1]
    tokens = first(runs[f"average-r{mid}-long"])["settings"]["tokens"]
    rows = [[f"rank {mid}", "start", f"after {tokens:,} tokens", "with exit losses: loop 1 / 2"]]
    for init, says in (("average", "average + SVD"), ("calibrated", "calibrated")):
        lines, exits = (list(runs[f"{init}-r{mid}-{how}"].values()) for how in ("long", "exits"))
        rows.append([says, *(spread(line[key] for line in lines) for key in ("start_loss", "loss")),
                     " / ".join(spread(line["exit_loss"][loop] for line in exits) for loop in (0, 1))])
    return markdown(rows)


def served(results: Path, line: int, name: str, exits: str = "never", keys: str = "exact") -> dict:
    """What this way to batch came to in that line of batching.jsonl."""
    case, = read_lines(results / "batching.jsonl")[line]["cases"]
    return [row for row in case["rows"] if (row["name"], row["exits"], row["keys"]) == (name, exits, keys)][0]


def block_batching(results: Path) -> str:
    """Each way to batch beside sequence batching and the formula: random weights, and the shipped donor."""
    more = served(results, 0, "V5h", "drawn")["slots"] - served(results, 0, "V1")["slots"]
    rows = [["", "C = 1024: tok/s", "of V1", "formula", "shipped donor: of V1", "formula"]]
    for name, keys, says in (("V1", None, "sequence batching, full depth"), ("V3", None, "depth-wise, nobody leaves"),
                             ("V4", "exact", "exits, the batch waits for its slowest"),
                             ("V5", "exact", "depth-wise with exits, exact keys"),
                             ("V5h", "exact", f"the head as a stage of its own, {more} slots more"),
                             ("V5", "copy", "copied keys"), ("V5h", "copy", "copied keys")):
        one, two = (served(results, line, name, *((kind, keys) if keys else ()))
                    for line, kind in ((0, "drawn"), (1, "oracle")))
        rows.append([f"{name}, {says}", f"{one['tokens_per_s']:.0f}",
                     *(f"{row[key]:.2f}" for row in (one, two) for key in ("of_v1", "formula"))])
    return markdown(rows)


BLOCKS: dict[str, Callable[[Path], str]] = {
    "stepwise": block_stepwise, "conclusions": block_conclusions, "exits": block_exits,
    "calibrated": block_calibrated, "batching": block_batching, "start": block_start, "read": block_read,
    "saved": block_saved}


LACKING = (LookupError, ValueError)            # what comes of results that are not there, or not all of them


def fill(text: str, results: Path) -> str:
    """The README with each of its blocks as results/ has it; one whose results are not there stays, and is named.
    UserError where a marker is missing."""
    for name, block in BLOCKS.items():
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)"
        if (n := len(re.findall(pattern, text, re.S))) != 1:
            raise UserError(f"README.md has {n} blocks between <!-- {name} --> and <!-- /{name} -->: it needs one")
        try:
            new = block(results)
        except LACKING as e:
            say_once(f"the block {name} of the README stays as it is: {results} lacks what it shows ({e!r})")
            continue
        text = re.sub(pattern, lambda m, new=new: m[1] + new + m[2], text, flags=re.S)
    return text


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def phrases(results: Path) -> list[str]:
    """What the README's prose and small tables say, with the figures that the files have: a test looks for each."""
    def lines(name):                           # measured on the CPU
        return [line for line in read_lines(results / f"{name}.jsonl") if not line.get("gpu")]

    def rate(rows, **what):                    # tokens/s of the row that is all this
        return next(r["tokens_per_s"] for r in rows if what.items() <= r.items())

    seeds = [line for line in lines("exits_calibrated") if "-seeds-" in line["settings"]["ckpt"]]
    checked = [(max(0.0, line["agreement"] - after["agreement"]), after["loops"], line)
               for line in seeds for _, after in line["calibration_and_check"].values()]
    exact = [found for found in checked if found[2]["settings"]["keys"] == "exact"]
    missed = sorted(short for short, _, _ in exact if short)
    copied = [found for found in checked if found[2]["settings"]["keys"] == "copy"]
    same = [found for found in exact if found[2]["settings"]["ckpt"] == copied[0][2]["settings"]["ckpt"]
            and found[2]["agreement"] == copied[0][2]["agreement"]]
    kept = {row["rule"]: row["agreement"] for row in lines("exits_unseen")[0]["rows"] if row.get("calibrated_for")}
    asking = [kept[rule] for rule in ("max_prob", "margin", "entropy")]
    small, large = (next(r for r in lines("decision")[0]["rows"] if (r["vocab_size"], r["batch"]) == (v, 1))
                    for v in (4096, 256_000))
    chunked, naive = (next(r for r in lines("loss")[-1]["rows"] if r["distill"] and r["code"] == code)
                      for code in ("chunked", "naive"))
    step, lora = lines("train")[-1]["rows"], lines("lora")[-1]["rows"]
    ours = [[rate(step, code="ours", loops=loops, rank=0, distill=distill) / rate(step, code="transformers",
            distill=distill) for loops in (1, 2)] for distill in (False, True)]
    merged, apart = ([rate(lora, rank=0) / rate(lora, rank=rank, path=path) - 1 for rank in (64, 512)]
                     for path in ("merged", "separate"))
    tied, relaxed = (lines(f"uptrain_smollm2_{name}") for name in ("stepwise", "average64"))
    gate, stage = (served(results, 1, name, "gate") for name in ("V5", "V5h"))
    donor, smollm2 = ({r["rows"]: r["of_transformers"] for r in line["rows"] if r["code"] == "decode"}
                      for line in lines("decode")[:2])
    apart_most = max(task["largest_difference"] for line in lines("harness") for task in line["apart"].values())
    same_scores = all(line["tasks"][t][k] == line["against"][t][k] for line in lines("harness")
                      for t in line["tasks"] for k in ("acc", "acc_norm") if k in line["tasks"][t])
    first = read_lines(results / "batching.jsonl")[0]["cases"][0]["rows"]
    apart_by = max(max(row["seconds"]) / min(row["seconds"]) - 1 for row in first)
    alone = [v1 / v3 for v1, v3 in zip(*(served(results, 2, name)["seconds"] for name in ("V1", "V3")), strict=True)]
    shapes = next(line for line in lines("convert") if line["what"] == "scale")
    mid, after = MODELS["toy"].ranks[1], read_runs(results, "toy")
    paper, ours_long = (list(after[f"{init}-r{mid}-long"].values()) for init in ("average", "calibrated"))

    def ends(runs: list[dict], key: str) -> float:
        return statistics.mean(run[key] for run in runs)
    unconverted = next(iter(read_starts(results, "SmolLM2-135M").values()))["donor_loss"]
    cost, small_cost = lines("calibrated_cost")                          # Gemma 2B's, SmolLM2's
    from_paper, from_ours = lines("calibrated_smollm2")
    scales = next(line for line in lines("calibrated_tried") if "in other scales" in line["tried"])
    return [
        f"in {from_ours['tokens']:,} tokens the paper's start came from {from_paper['start_loss']:.2f} to "
        f"{from_paper['loss']:.2f}, the calibrated one from {from_ours['start_loss']:.2f} to {from_ours['loss']:.2f} "
        f"(donor {from_ours['donor_loss']:.2f})",
        f"eight such steps led from {scales['loss'][0]:.2f} to {scales['loss'][-1]:.2f} instead of "
        f"{scales['beside_loss'][-1]:.2f}",
        f"of another kind (donor {unconverted['books'][0]:.2f} / {unconverted['other'][0]:.2f})",
        f"three seeds, donor {ends(paper, 'donor_loss'):.3f}), the paper's start ends at {ends(paper, 'loss'):.3f}, "
        f"the calibrated one begins at {ends(ours_long, 'start_loss'):.3f} and ends at {ends(ours_long, 'loss'):.3f}:",
        f"reading {cost['settings']['tokens']:,} tokens would take {cost['reading_s'] / 60:.0f} minutes, fitting "
        f"{cost['fitting_s'] / 60:.0f}, in {cost['memory_gib']:.1f} GiB",
        f"reading {small_cost['calib_tokens']:,} tokens {small_cost['reading_s']:.0f} s, fitting rank "
        f"{small_cost['rank']} {small_cost['fitting_s']:.0f} s, {small_cost['peak_gib']:.1f} GiB",
        f"take {shapes['seconds']:.0f} s and {shapes['peak_gib']:.1f} GiB on two CPU cores",
        f"differ by as much as {percent(apart_by)} (",
        f"V3 came to {served(results, 2, 'V3')['of_v1']:.2f} of V1 ({min(alone):.2f} to {max(alone):.2f}, round by",
        f"cost ghosts, {percent(served(results, 0, 'V5', 'drawn')['ghosts'])} of all rows",
        "in under {} minutes on two CPU cores".format({4: "four"}[math.ceil(lines("stepwise")[-1]["seconds"] / 60)]),
        f"leaves after {gate['mean_loops']:.2f} loops: {gate['of_v1']:.2f} of V1, {stage['of_v1']:.2f} with the head",
        f"decodes {donor[1]:.2f} × as fast as", f"16 texts {donor[16]:.2f} ×", f"SmolLM2-135M {smollm2[1]:.2f} ×;",
        f"log-likelihoods differ by {apart_most:.1e}".replace("e-0", "e-") + " at most, its accuracies "
        f"{'not at all' if same_scores else 'as well'} (results/harness.jsonl)",
        f"(`--init=random`) ends at {lines('random')[-1]['full_val_loss']:.4f}",
        f"Of {len(exact)} promises two were missed, by {missed[0]:.4f} and {missed[1]:.4f}." if len(missed) == 2 else
        f"Of {len(exact)} promises {len(missed)} were missed",
        f"became {min(asking):.3f} to {max(asking):.3f} for the three that ask the vocabulary, {kept['gate']:.4f} for",
        f"gets below {min(loops for _, loops, _ in copied):.2f} loops at {copied[0][2]['agreement']}, with exact ones "
        f"it is {min(loops for _, loops, _ in same):.2f}",
        f"the gate costs {percent(large['gate'] / large['block'], 1)} of a pass",
        f"one by max_prob {percent(large['max_prob'] / large['block'])} (",
        f"with 4,096 words {percent(small['max_prob'] / small['block'])};",
        f"{chunked['added_gib_at_all']:.2f} GiB beside its input, naive {naive['added_gib_at_all']:.0f} GiB (four "
        f"times its 1,024 tokens), and {chunked['tokens_per_s'] / naive['tokens_per_s']:.1f} ×",
        "full size {:.2f}, 2 loops {:.2f}; with distillation {:.2f} and {:.2f}".format(*ours[0], *ours[1]),
        "r 64 {}, r 512 {}; as a path of its own {} and {}".format(*map(percent, merged + apart)),
        f"tied, stepwise {tied[0]['full_val_loss']:.2f} → {tied[-1]['full_val_loss']:.2f}, r 64, average + SVD "
        f"{relaxed[0]['full_val_loss']:.2f} → {relaxed[-1]['full_val_loss']:.2f}; donor {tied[0]['donor_loss']:.2f}"]


# ---------------------------------------------------------------------------------------------------------------------
# Plots

def means(runs: dict[str, dict[int, dict]], name: str) -> tuple[float, float, float] | None:
    """(parameters without embeddings in millions, mean loss, standard deviation) of a run."""
    if not (seeds := list(runs.get(name, {}).values())):
        return None
    losses = [line["loss"] for line in seeds]
    return (seeds[0]["params"]["stored_block"] / 1e6, statistics.mean(losses),
            statistics.stdev(losses) if len(losses) > 1 else 0.0)


def line_of(axes, runs, names: list[str], label: str, xs: list[float] | None = None, style: str = "o-") -> None:
    """A line through the runs that there are, with error bars of a standard deviation."""
    points = [(m[0] if xs is None else xs[i], *m[1:]) for i, n in enumerate(names) if (m := means(runs, n))]
    if points:
        x, y, error = zip(*sorted(points), strict=True)
        axes.errorbar(x, y, error, fmt=style, markersize=4, capsize=2, label=label)


def mean_curve(lines: Iterable[dict]) -> list[list[float]]:
    """[tokens, loss on the way] of several seeds."""
    return [[statistics.mean(point) for point in zip(*points, strict=True)]
            for points in zip(*(line["curve"] for line in lines), strict=True)]


def plot_inits(axes, runs, ranks) -> None:
    """Above the donor's loss on the same text: on the way it is a shorter one than at the ends."""
    short = first(runs["donor"]) if "donor" in runs else None
    for name in ("stepwise", "average", "lower", "random"):
        lines = list(runs.get(name, {}).values())
        if lines:
            curve = mean_curve(lines) if short else []
            ends = [[tokens, statistics.mean(line[loss] - line["donor_loss"] for line in lines)]
                    for tokens, loss in ((0, "start_loss"), (lines[0]["settings"]["tokens"], "loss"))]
            points = [ends[0], *([tokens, loss - short["loss"]] for tokens, loss in curve), ends[1]]
            axes.plot(*zip(*points, strict=True), "o-", markersize=4, label=f"tied, {name}")
    axes.set(xlabel="tokens of uptraining", ylabel="validation loss above the donor's")


def plot_pareto(axes, runs, ranks) -> None:
    svd = [f"average-r{r}" for r in ranks]
    line_of(axes, runs, ["stepwise", *svd], "2 loops: tied, then average + SVD by rank")
    line_of(axes, runs, ["stepwise-3x", f"{svd[2]}-3x"], "3 loops", style="s-")
    line_of(axes, runs, ["full"], "full size, same tokens", style="k*")
    if means(runs, "stepwise"):
        axes.axhline(first(runs["stepwise"])["donor_loss"], color="k", linewidth=0.8, label="donor")
    axes.set(xlabel="parameters stored without embeddings, millions", ylabel="validation loss")


def plot_rank(axes, runs, ranks) -> None:
    xs = [0, *ranks]
    line_of(axes, runs, ["average", *(f"average-r{r}" for r in ranks)], "average + SVD", xs)
    line_of(axes, runs, ["average", *(f"average-r{r}-zero" for r in ranks)], "average, LoRA from zero", xs, "s--")
    line_of(axes, runs, [f"stepwise-r{ranks[2]}"], "stepwise + SVD", xs[3:], "^")
    axes.set(xlabel="LoRA rank (0: tied)", ylabel="validation loss")


def plot_calibrated(start, saved, large, results: Path) -> None:
    """Both starts right after conversion, by rank, and in uptraining (mean of the seeds there are)."""
    starts, runs, mid = read_starts(results, "SmolLM2-135M"), read_runs(results, "toy"), MODELS["toy"].ranks[1]
    for init, says, tokens in (("average", "average + SVD", None), ("calibrated", "calibrated (ours)", 20_480)):
        points = sorted((rank, line["loss"]["books"][-1]) for (how, loops, rank, n), line in starts.items()
                        if (how, loops, n) == (init, 2, tokens))
        start.plot(*zip(*points, strict=True), "o-", markersize=4, label=says)
        saved.plot(*zip(*mean_curve(runs[f"{init}-r{mid}-long"].values()), strict=True), label=says)
        line = [line for line in read_lines(results / "calibrated_smollm2.jsonl") if line["init"] == init][0]
        large.plot(*zip(*line["curve"], strict=True), label=says)
    start.axhline(first(starts)["donor_loss"]["books"][0], color="k", linewidth=0.8, label="donor")
    saved.axhline(first(runs["donor"])["loss"], color="k", linewidth=0.8, label="donor")
    large.axhline(line["donor_loss"], color="k", linewidth=0.8, label="donor")
    large.set(title=f"SmolLM2-135M, rank {line['rank']}: in uptraining", xlabel="tokens", ylabel="validation loss")
    start.set(title="SmolLM2-135M, 2 loops: right after conversion", xlabel="LoRA rank", ylabel="loss, other books")
    saved.set(title=f"shipped donor, rank {mid}: in uptraining", xlabel="tokens", ylabel="validation loss")


def save_plots(results: Path, model: str) -> None:
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
        except LACKING as e:
            say_once(f"{path} is not drawn: {results} lacks what it shows ({e!r})")
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


# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class ReportConfig:
    model: str = "toy"                         # whose runs: toy, or smollm2
    results: str = str(ROOT / "results")       # folder of the results
    write: bool = False                        # rewrite the README's blocks
    plots: bool = False                        # draw results/*.png


def main(argv=None) -> None:
    config = parse_args(ReportConfig, argv)
    if config.model not in MODELS:
        raise UserError(f"--model={config.model} is unknown; use {', '.join(MODELS)}")
    results, model = Path(config.results), MODELS[config.model]
    if not results.is_dir():
        raise UserError(f"--results={results} is no folder: give one in which experiments.py or bench.py saved results")
    losses, runs = all_losses(results, config.model), read_runs(results, config.model)
    for i, c in enumerate(conclusions(*model.ranks), 1):
        print0(f"\n{i} {c.name}: {c.says}: {verdict(c, losses)}")
        print0(f"python experiments.py --only={c.name}")
        print0(table([["", "loss, ours", "seeds", f"paper{', ' * bool(c.metric)}{c.metric}"]] + [
            [label, spread(losses.get(run, {}).values()), len(losses.get(run, {})), paper]
            for run, (label, paper) in c.rows.items()]))
        for claim in c.claims:
            print0("   {}: {}  {}".format(claim, *judge(claim, losses)))
    print0("\n" + table([["tokens", "tied", f"r {model.ranks[2]}", "share of the gap"], *gap(runs, model.ranks[2])]))
    print0("not run: " + (", ".join(unfinished(runs, config.model)) or "nothing"))
    if config.plots:
        save_plots(results, config.model)
    if config.write:
        readme = ROOT / "README.md"
        readme.write_text(fill(readme.read_text(encoding="utf-8"), results), encoding="utf-8")
        print0("README.md is up to date")


if __name__ == "__main__":
    script(main)
