"""The tables of the matrix: verdicts, arms, rates, and what each model stores."""

import math
import re
from collections.abc import Iterable
from pathlib import Path

from experiments.arms import STUDIES, Arm, Study
from experiments.claims import Comparison, Measured, claims
from experiments.matrix import Lines, chosen_rate, read_runs, tried_rates
from experiments.tables import markdown, percent, where, wrap
from experiments.verdicts import MISSING, Result, compare, gap_shares, losses, mean_loss, verdicts

KV_ARMS = {"stepwise": "stepwise-kv", "average-r24": "average-r24-kv", "calibrated-r24": "calibrated-r24-kv",
           "exits-self": "exits-self-kv"}                    # with each loop's own KV -> with the first loop's


def matrix_lines(results: Path, study: str = "toy") -> tuple[Study, Lines]:
    """A study and its lines. Raises LookupError without any."""
    lines = read_runs(results / "matrix.jsonl", study)
    if not any(run.arm == "donor" for run in lines):
        raise LookupError(f"no line of the donor of {study} in matrix.jsonl")
    return STUDIES[study], lines


def label(study: Study, measured: Measured) -> str:
    """In words: the arm, its loop if that is an exit's, and whether it is not trained yet."""
    words = study.arm(measured.arm).label
    if study.arm(measured.arm).base:
        words = ("first" if measured.loop == 0 else "last") + f" loop: {words}"
    return words + ("" if measured.trained else ", before training")


def weakest(lines: Lines, parts: list[Comparison]) -> str:
    """The difference, with its 95 % interval, of the part of a claim that is furthest from holding; empty if one was
    not run."""
    results = [compare(lines, part) for part in parts]
    return interval(max(results, key=lambda result: (result.p, -result.difference))) if all(results) else ""


def interval(result: Result) -> str:
    return f"{result.difference:+.3f} [{result.low:+.3f}, {result.high:+.3f}]"


def stored_by(arm: str, lines: Lines) -> str:
    """What an arm of the matrix stores of its donor's block; empty if it was not run."""
    def size(name: str) -> int | None:
        return next((line["params"]["stored_block"] for run, line in lines.items() if run.arm == name), None)
    return percent(size(arm) / size("donor")) if size(arm) else ""


def rate_of(study: Study, arm: Arm, lines: Lines) -> str:
    """The learning rate chosen for an arm; empty while it is open."""
    rate = chosen_rate(study, arm, lines) if tried_rates(arm, lines) else None
    return f"{rate:g}" if rate else ""


def mean_and_spread(values: tuple[float, float, int] | None) -> str:
    """Mean ± standard deviation over seeds; only the mean of one seed, empty for none."""
    if values is None:
        return ""
    return f"{values[0]:.3f}" + f" ± {values[1]:.3f}" * (values[2] > 1)


# ---------------------------------------------------------------------------------------------------------------------
# README.md and docs/results.md

def verdicts_table(results: Path) -> str:
    """A line for each conclusion, with the part of it that is furthest from holding."""
    study, lines = matrix_lines(results)
    found = verdicts(lines, given := claims(*study.ranks))
    rows = [["", "the paper's conclusion", "stored block", "weakest difference, nats [95 %]", "here"]]
    for i, claim in enumerate(given, 1):
        shares = {stored_by(measured.arm, lines) for measured in claim.rows if measured.arm != "full"} - {""}
        rows.append([str(i), claim.sentence, ", ".join(sorted(shares)), weakest(lines, claim.parts),
                     found[claim.name][0]])
    return markdown(rows)


def donor_cells(lines: Lines) -> list[str]:
    """Name, stored block, learning rate, loss before and after training of the donor, and one cell more."""
    return ["donor", "100 %", "", mean_and_spread(mean_loss(lines, Measured("donor", -1, False))), "", ""]


def arm_cells(study: Study, lines: Lines, arm: Arm) -> list[str]:
    """The same of an arm, without the last."""
    means = (mean_and_spread(mean_loss(lines, Measured(arm.name, -1, trained))) for trained in (False, True))
    return [arm.label, stored_by(arm.name, lines), rate_of(study, arm, lines), *means]


def arms_table(study: Study, lines: Lines, arms: Iterable[Arm]) -> str:
    """What each arm stores, its learning rate, and its loss on the test books before and after training."""
    rows = [["", "stored block", "learning rate", "before training", "after", "seeds"], donor_cells(lines)]
    rows += [[*arm_cells(study, lines, arm), str(len(losses(lines, Measured(arm.name))) or "not run")] for arm in arms]
    return markdown(rows)


def sizes_table(results: Path) -> str:
    """The README's: sharing beside plain low rank at the same two sizes."""
    study, lines = matrix_lines(results)
    rank = study.ranks[1]
    names = ("stepwise", "low-rank-0", f"average-r{rank}", f"calibrated-r{rank}", f"low-rank-{rank}", "full")
    return arms_table(study, lines, map(study.arm, names))


def arms_block(results: Path) -> str:
    """Every arm of the matrix on the shipped donor."""
    study, lines = matrix_lines(results)
    return "\n\n".join([
        arms_table(study, lines, [arm for arm in study.arms if not arm.base]),
        wrap(f"{where([line for run, line in lines.items() if run.stage != 'start'] or list(lines.values()))}.")])


def conclusions_table(results: Path) -> str:
    """The eight conclusions part by part."""
    study, lines = matrix_lines(results)
    given = claims(*study.ranks)
    found, rows = verdicts(lines, given), [["", "difference [95 %], ours", "p", "paper"]]
    for i, claim in enumerate(given, 1):
        verdict, p = found[claim.name]
        rows.append([f"**{i}** {claim.sentence}: **{verdict}**", "", "" if p is None else f"{p:.4f}", claim.metric])
        rows += [[f"{label(study, measured)} ({stored_by(measured.arm, lines) or 'not run'})",
                  mean_and_spread(mean_loss(lines, measured)), "", paper] for measured, paper in claim.rows.items()]
        for part in claim.parts:
            result, sign = compare(lines, part), "≈" if part.alike else "<"
            rows.append([f"_{label(study, part.a)} {sign} {label(study, part.b)}_",
                         interval(result) if result else MISSING, f"{result.p:.4f}" if result else "", ""])
    return markdown(rows)


def short_loss(study: Study, lines: Lines, measured: Measured) -> float | None:
    """The final validation loss of the short run at the chosen rate, or of its start."""
    tried = tried_rates(arm := study.arm(measured.arm), lines)
    if not tried or arm.base or measured.loop != -1:
        return None
    if measured.trained:
        return min(tried.values())
    return next(line["valid"]["start"] for run, line in lines.items() if (run.stage, run.arm) == ("rate", arm.name))


def signs_table(results: Path) -> str:
    """Whether the comparisons have the same sign after a quarter of the tokens, on other text, with another seed."""
    study, lines = matrix_lines(results)
    rows = [["lower < higher", f"{study.rate_tokens:,} tokens", f"{study.tokens:,} tokens", "same sign"]]
    for claim in claims(*study.ranks):
        for part in claim.parts:
            short = [short_loss(study, lines, measured) for measured in part[:2]]
            result = compare(lines, part)
            if None not in short and result:
                early = short[1] - short[0]
                rows.append([f"{label(study, part.a)} {'≈' if part.alike else '<'} {label(study, part.b)}",
                             f"{early:+.3f}", f"{result.difference:+.3f}",
                             "yes" if early * result.difference > 0 else "no"])
    return markdown(rows)


def gap_table(results: Path) -> str:
    """The share of the gap between the tied and the full-size model, trained alike, that a LoRA closes."""
    study, lines = matrix_lines(results)
    rows = [["", "stored block", f"share, {study.rate_tokens:,} tokens", f"share, {study.tokens:,} tokens", "paper"]]
    paper = {study.ranks[0]: f"{math.log(11.44 / 11.36) / math.log(11.44 / 10.58):.2f} (r 64)",
             study.ranks[2]: f"{math.log(11.44 / 10.81) / math.log(11.44 / 10.58):.2f} (r 512)"}
    for rank in study.ranks:
        name = f"average-r{rank}"
        tied, relaxed, full = (short_loss(study, lines, Measured(arm)) for arm in ("stepwise", name, "full"))
        shares = gap_shares(lines, study, name)
        rows.append([study.arm(name).label, stored_by(name, lines),
                     f"{(tied - relaxed) / (tied - full):.2f}" if None not in (tied, relaxed, full) else "",
                     mean_and_spread((shares.mean(), shares.std(ddof=1) if len(shares) > 1 else 0.0, len(shares)))
                     if len(shares) else "", paper.get(rank, "")])
    return markdown(rows)


def rates_table(results: Path) -> str:
    """The validation loss of every learning rate tried, by arm, and at full length where that was checked."""
    study, lines = matrix_lines(results)
    rows = [["", *(f"{lr:g}" for lr in study.grid)]]
    for arm in study.arms:
        if tried := tried_rates(arm, lines):
            rows.append([arm.label, *rate_cells(study, tried)])
    for name in study.checked:
        at = {run.lr: line["valid"]["final"] for run, line in lines.items() if (run.stage, run.arm) == ("check", name)}
        if at:
            rows.append([f"{study.arm(name).label}, {study.tokens:,} tokens", *rate_cells(study, at)])
    return markdown(rows)


def rate_cells(study: Study, at: dict[float, float]) -> list[str]:
    """The loss at each rate of the grid, the best in bold."""
    best = min(at, key=at.__getitem__)
    words = {lr: f"{loss:.3f}" for lr, loss in at.items()}
    return [f"**{words[lr]}**" if lr == best else words.get(lr, "") for lr in study.grid]


def smollm2_table(results: Path) -> str:
    """SmolLM2-135M and its plot: short runs on the validation text, long ones, if there are any, on the test books."""
    if not read_runs(results / "matrix.jsonl", "smollm2"):
        return "Not run yet: `python -m experiments.matrix --study=smollm2`."
    study, lines = matrix_lines(results, "smollm2")
    finished = any(run.stage == "main" for run in lines)
    rows = [["SmolLM2-135M, 2 loops", "stored block", "test books, before training", "validation text, before",
             f"after {study.rate_tokens:,} tokens", "at the rate",
             *[f"test books, after {study.tokens:,}", "above plain low rank as large [95 %]"][:2 * finished]]]
    rows.append(["donor", "100 %", mean_and_spread(mean_loss(lines, Measured("donor", -1, False))),
                 *[""] * (len(rows[0]) - 3)])
    for arm in study.arms:
        start, trained = Measured(arm.name, -1, False), Measured(arm.name)
        short, rates = [short_loss(study, lines, each) for each in (start, trained)], tried_rates(arm, lines)
        rows.append([arm.label, stored_by(arm.name, lines), mean_and_spread(mean_loss(lines, start)),
                     *("" if loss is None else f"{loss:.3f}" for loss in short),
                     f"{min(rates, key=rates.__getitem__):g}" if rates else ""])
        if finished:
            plain = {"tied": "low-rank-0", "relaxed": "low-rank-64", "calibrated": "low-rank-64"}.get(arm.family)
            result = compare(lines, Comparison(Measured(plain), trained)) if plain else None
            rows[-1] += [mean_and_spread(mean_loss(lines, trained)), interval(result) if result else ""]
    plot = "![Loss against the stored share of the block, SmolLM2-135M](../results/frontier_smollm2.png)"
    return f"{markdown(rows)}\n\n{plot}\n\n{wrap(where(list(lines.values())) + '.')}"


# ---------------------------------------------------------------------------------------------------------------------
# docs/choices.md

def shared_kv_table(results: Path) -> str:
    """Each loop's own keys and values beside those of the first loop, trained alike."""
    study, lines = matrix_lines(results)
    rows = [["", "stored block: own, shared", "loss with own KV", "with shared KV", "shared above own [95 %]"]]
    for name, shared in KV_ARMS.items():
        arm = study.arm(name)
        for loop in (0, -1) if arm.base else (-1,):
            pair = Measured(name, loop), Measured(shared, loop)
            result, of = compare(lines, Comparison(*pair)), (arm.base or name, study.arm(shared).base or shared)
            rows.append([label(study, pair[0]), ", ".join(stored_by(each, lines) for each in of),
                         *(mean_and_spread(mean_loss(lines, each)) for each in pair),
                         interval(result) if result else ""])
    return markdown(rows)


# ---------------------------------------------------------------------------------------------------------------------
# docs/exits.md and docs/calibration.md

def exits_table(results: Path) -> str:
    """Loss after each loop on the test books, by how the exits were trained."""
    study, lines = matrix_lines(results)
    rows = [["post-training", "of", "stored block", "learning rate", "loss after loop 1", "after loop 2", "seeds"]]
    for arm in study.arms:
        if arm.base:
            first, last = (mean_loss(lines, Measured(arm.name, loop)) for loop in (0, -1))
            rows.append([arm.label, study.arm(arm.base).label, stored_by(arm.base, lines), rate_of(study, arm, lines),
                         mean_and_spread(first), mean_and_spread(last), str(last[2]) if last else ""])
    return markdown(rows)


def saved_table(results: Path) -> str:
    """Average + SVD, calibrated and plain low rank at the same sizes, before and after training."""
    study, lines = matrix_lines(results)
    return arms_table(study, lines, sorted(
        (arm for arm in study.arms if re.fullmatch(r"(average|calibrated)-r\d+|low-rank-\d+", arm.name)),
        key=lambda arm: int(re.search(r"\d+$", arm.name)[0])))


def equal_size_table(results: Path) -> str:
    """Sharing with one LoRA rank and with ranks by need beside plain low rank of the same sizes, before and after short
    runs."""
    rows = [["donor", "stored block", "plain low rank", "calibrated, one rank", "calibrated, ranks by need",
             "ranks by need above plain low rank, after [95 %]"]]
    for name, donor in (("smollm2-sizes", "SmolLM2-135M"), ("sizes", "shipped donor")):
        study, lines = matrix_lines(results, name)
        for rank in sorted({int(arm.name.rpartition("-")[2]) for arm in study.arms}):
            names = [f"{way}-{rank}" for way in ("low-rank", "one-rank", "by-need")]
            cells = [" / ".join(filter(None, (mean_and_spread(mean_loss(lines, Measured(arm, -1, trained)))
                                              for trained in (False, True)))) for arm in names]
            above = compare(lines, Comparison(Measured(names[0]), Measured(names[2])))
            rows.append([donor, stored_by(names[0], lines), *cells, interval(above) if above else ""])
    return markdown(rows)
