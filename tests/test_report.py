"""experiments/report.py: the statistics on made-up results, and that all pages show what results/ has."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import report, verdicts
from experiments.arms import STUDIES
from experiments.claims import Claim, Comparison, Measured, claims
from experiments.evidence import gap_table, rates_table, signs_table, smollm2_table, verdicts_table
from experiments.matrix import Run, read_runs
from experiments.plots import plot_frontier
from experiments.report import PAGES, ROOT, fill
from experiments.verdicts import bootstrap_means, compare, holm
from experiments.verdicts import verdicts as judge
from lib.cli import UserError

PAGE_TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
TABLES = {name: table for page in PAGES.values() for name, table in page.items()}
BOOKS = [f"book{i:02}" for i in range(11)]


def line(arm: str, stage: str = "main", seed: int = 0, lr: float = 3e-4, loss=4.0, final: float = 4.0, stored=50,
         study: str = "toy") -> dict:
    """A line of matrix.jsonl; loss: of each book, or one for all; with a list for each loop, or one for the last."""
    per_book = loss if isinstance(loss, list) and len(loss) == len(BOOKS) else [loss] * len(BOOKS)
    return {"study": study, "stage": stage, "arm": arm, "seed": seed, "lr": 0.0 if stage == "start" else lr,
            "books": {book: each if isinstance(each, list) else [each] for book, each in
                      zip(BOOKS, per_book, strict=True)},
            "valid": {"start": 5.0, "final": final}, "params": {"stored_block": stored}, "cpu": "CPU", "gpu": None,
            "threads": 1, "torch": "2", "commit": "abc"}


def write(folder: Path, *lines: dict) -> Path:
    (folder / "matrix.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


def lines_of(*lines: dict) -> dict:
    return {Run(x["stage"], x["arm"], x["seed"], x["lr"]): x for x in lines}


def noisy(arm: str, mean: float, seeds=range(5), by_seed=0.0, by_book=0.0, own=0.0, stage: str = "main") -> list[dict]:
    """Lines with effects of the seed and of the book that all arms share, and of the arm's own, by seed."""
    shared, alone = np.random.default_rng(1), np.random.default_rng(sum(map(ord, arm)))
    seed_effect, book_effect = shared.normal(0, by_seed, 100), shared.normal(0, by_book, len(BOOKS))
    return [line(arm, stage, seed, loss=[mean + seed_effect[seed] + book_effect[b] + noise for b in range(len(BOOKS))])
            for seed, noise in zip(seeds, alone.normal(0, own, 100), strict=False)]


A_BELOW_B = Comparison(Measured("a"), Measured("b"))
ALIKE = Comparison(Measured("a"), Measured("b"), alike=True)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics

def test_effects_that_both_arms_share_cancel():
    """Seeds and books that differ by whole nats do not hide a paired difference of 0.01."""
    lines = lines_of(*noisy("a", 4.0, by_seed=1, by_book=1), *noisy("b", 4.01, by_seed=1, by_book=1))
    result = compare(lines, A_BELOW_B)
    assert result.difference == pytest.approx(0.01) and result.low == pytest.approx(0.01)
    assert result.p == pytest.approx(1 / 10_001) and result.seeds == 5


def test_the_interval_has_the_spread_of_seeds_and_of_books():
    """Seeds alone: the mean of 5 draws of n seeds' differences has the standard error sqrt(var / n)."""
    differences = np.repeat([[0.1], [0.2], [0.3], [0.4], [0.5]], 11, axis=1)
    means = bootstrap_means(differences)
    assert means.mean() == pytest.approx(0.3, abs=0.005) and means.std() == pytest.approx(np.sqrt(0.02 / 5), rel=0.03)
    by_book = np.repeat([np.linspace(0, 1, 11)], 5, axis=0)
    assert bootstrap_means(by_book).std() == pytest.approx(np.sqrt(0.1 / 11), rel=0.03)
    # Both: the variances add.
    both = bootstrap_means(differences + by_book).std()
    assert both == pytest.approx(np.sqrt(0.02 / 5 + 0.1 / 11), rel=0.03)


def test_the_p_value_is_of_the_opposite():
    differences = np.linspace(-0.1, 0.3, 11)                 # mean 0.1, standard error 0.038: some draws < 0
    lines = lines_of(line("a", loss=[4.0] * 11), line("b", loss=[4.0 + d for d in differences]))
    p = compare(lines, A_BELOW_B).p
    assert p == pytest.approx((bootstrap_means(differences[None]) <= 0).mean(), abs=2e-4) and 1e-4 < p < 0.05
    assert compare(lines, Comparison(*A_BELOW_B[1::-1])).p > 0.95


@pytest.mark.parametrize("difference, p, contradicts", [(0.0, 1 / 10_001, False), (0.025, 1 / 10_001, False),
                                                        (0.04, 1.0, True), (-0.04, 1.0, True)])
def test_alike_is_an_interval_within_a_margin(difference, p, contradicts):
    lines = lines_of(*noisy("a", 4.0), *noisy("b", 4.0 + difference))
    result = compare(lines, ALIKE)
    assert result.p == pytest.approx(p) and verdicts.opposite(result, True) == contradicts


def test_only_seeds_that_both_have_are_compared_and_a_start_stands_for_all():
    lines = lines_of(*noisy("a", 4.0, seeds=(0, 1, 2)), *noisy("b", 4.2, seeds=(1, 2, 3)),
                     line("a", "start", loss=5.0))
    assert compare(lines, A_BELOW_B).seeds == 2
    result = compare(lines, Comparison(Measured("a"), Measured("a", -1, False)))
    assert result.seeds == 3 and result.difference == pytest.approx(1.0)
    assert compare(lines, Comparison(Measured("a"), Measured("c"))) is None


def test_a_loop_is_its_own_loss():
    lines = lines_of(line("exits-a", "exits", loss=[[5.0, 4.0]] * 11), line("exits-b", "exits", loss=[[5.5, 4.0]] * 11))
    def at(loop):
        return compare(lines, Comparison(Measured("exits-a", loop), Measured("exits-b", loop))).difference
    assert at(0) == pytest.approx(0.5) and at(-1) == 0


def test_holm():
    """The example of Holm (1979) in most textbooks: 0.01, 0.04, 0.03, 0.005 of four."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def claim(*parts: Comparison) -> list[Claim]:
    return [Claim("one", "", "", {}, list(parts))]


def test_verdicts():
    lines = lines_of(*noisy("a", 4.0), *noisy("b", 4.1), *noisy("c", 4.1, own=0.5), *noisy("d", 4.1, seeds=(0,)))
    a_c, a_d, b_a = (Comparison(Measured(x), Measured(y)) for x, y in ("ac", "ad", "ba"))
    a_x = Comparison(Measured("a"), Measured("x"))
    for parts, want in (((A_BELOW_B,), "holds"), ((b_a,), "does not hold"), ((a_c,), "cannot tell"),
                        ((A_BELOW_B, a_c), "cannot tell"),                # all parts have to hold
                        ((a_d,), "cannot tell"),                          # one seed
                        ((A_BELOW_B, a_x), "not run"), ((b_a, a_x), "does not hold"),     # whatever x would be
                        ((ALIKE,), "does not hold")):
        assert judge(lines, claim(*parts))["one"][0] == want, parts


def test_many_claims_need_more_evidence():
    """A p-value of 0.02 proves one claim, not one of eight; claims that were not run count as well."""
    rng = np.random.default_rng(0)
    differences = rng.normal(0, 1, (5, 11))
    for shift in np.linspace(0, 1, 201):                     # a shift with a p-value near 0.02
        if (bootstrap_means(differences + shift) <= 0).mean() < 0.02:
            break
    lines = lines_of(*(line("a", seed=s) for s in range(5)),
                     *(line("b", seed=s, loss=[4 + x + shift for x in differences[s]]) for s in range(5)))
    given = claim(A_BELOW_B)
    assert judge(lines, given)["one"][0] == "holds"
    others = [Claim(str(i), "", "", {}, [Comparison(Measured("x"), Measured("y"))]) for i in range(7)]
    assert judge(lines, given + others)["one"][0] == "cannot tell"


def test_intervals_cover_what_they_say():
    """Of 200 made-up experiments with effects of seed and book, the 95 % interval has the truth in most. (Fewer than
    95: a bootstrap of five seeds is somewhat too narrow.)"""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        differences = 0.1 + rng.normal(0, 0.03, (5, 1)) + rng.normal(0, 0.03, (1, 11)) + rng.normal(0, 0.01, (5, 11))
        low, high = np.quantile(bootstrap_means(differences), (0.025, 0.975))
        hits += low <= 0.1 <= high
    assert 0.84 < hits / 200 < 0.98


# ---------------------------------------------------------------------------------------------------------------------
# Tables and plots

def rates(arm: str, seed: int = 100, **at: float) -> list[dict]:
    names = {"low": 1e-4, "mid": 3e-4, "high": 1e-3}
    return [line(arm, "rate", seed, names[name], final=final) for name, final in at.items()]


def test_the_share_of_the_gap(tmp_path):
    """Tied 4.8 and relaxed 4.2 over a full-size model, trained on the same tokens, of 4.0: three quarters."""
    donor = line("donor", "start", stored=100)
    lines = [donor, line("stepwise", loss=4.8), line("average-r48", loss=4.2, stored=93), line("full", loss=4.0),
             line("stepwise", seed=1, loss=4.8), line("average-r48", seed=1, loss=4.4), line("full", seed=1, loss=4.0),
             *rates("stepwise", mid=4.6), *rates("average-r48", mid=4.3), *rates("full", mid=4.1)]
    row, = (x for x in gap_table(write(tmp_path, *lines)).splitlines() if "r 48" in x)
    assert [x.strip() for x in row.split("|")[1:-1]] == [
        "average + SVD, r 48", "93 %", "0.60", "0.625 ± 0.177", "0.72 (r 512)"]


def test_signs_and_rates(tmp_path):
    lines = [line("donor", "start"), *rates("stepwise", low=4.9, mid=4.6, high=4.7), *rates("average", mid=4.5),
             *noisy("stepwise", 4.2), *noisy("average", 4.3),
             *(line("stepwise", "check", 100, lr, final=f) for lr, f in ((1e-4, 4.2), (3e-4, 4.3)))]
    signs = signs_table(write(tmp_path, *lines))
    assert "| tied, stepwise < tied, average | -0.100 | +0.100 | no |" in signs and signs.count("\n") == 2
    table = rates_table(tmp_path).splitlines()
    assert table[2] == "| tied, stepwise |  | 4.900 | **4.600** | 4.700 |  |  |  |"
    assert table[-1] == "| tied, stepwise, 524,288 tokens |  | **4.200** | 4.300 |  |  |  |  |"


def test_one_seed_has_intervals_over_books(tmp_path):
    lines = [line("donor", "start", study="smollm2"), line("low-rank-0", study="smollm2", stored=25),
             line("low-rank-64", loss=[9.0] * 11, study="smollm2", stored=34),
             line("stepwise", loss=[4.0 + i / 10 for i in range(11)], study="smollm2", stored=25)]
    row, = (x for x in smollm2_table(write(tmp_path, *lines)).splitlines() if "stepwise" in x)
    assert re.search(r"\+0\.500 \[\+0\.3\d\d, \+0\.[67]\d\d\]", row) and "| 50 % |" in row.replace("25 %", "50 %")


def test_the_frontier_of_short_runs_is_on_the_validation_text(tmp_path):
    lines = [line("donor", "start", loss=3.9, stored=100, study="smollm2")]
    for arm, final in (("low-rank-0", 4.2), ("low-rank-64", 4.1)):
        lines.append(line(arm, "rate", 100, 3e-4, final=final, study="smollm2"))
        lines.append(line(arm, "rate", 100, 1e-3, final=4.6, study="smollm2"))
    for each in lines[1:]:
        each["valid"]["donor"] = 3.5
    axes = Figure().subplots()
    plot_frontier(axes, write(tmp_path, *lines), "smollm2")
    before, after, donor = ([list(point) for point in x.get_xydata()] for x in axes.lines)
    assert [y for _, y in before] == [5.0, 5.0] and [y for _, y in after] == [4.2, 4.1] and donor[0][1] == 3.5
    assert axes.get_ylabel() == "loss on the validation text, 262,144 tokens"


def test_points_of_the_frontier(tmp_path):
    lines = [line("donor", "start", loss=3.9, stored=100), line("average-r6", "start", loss=6.0, stored=55),
             line("average-r6", loss=4.5, stored=55), line("average-r6", seed=1, loss=4.7, stored=55),
             line("low-rank-6", loss=4.1, stored=55)]
    axes = Figure().subplots()
    plot_frontier(axes, write(tmp_path, *lines), "toy")
    before, after, low_rank, donor = ([list(point) for point in x.get_xydata()] for x in axes.lines)
    assert before == [pytest.approx([55, 6.0])] and after == [pytest.approx([55, 4.6])]
    assert low_rank == [pytest.approx([55, 4.1])]
    assert donor[0][1] == pytest.approx(3.9)


KEPT = {  # file -> the tables that cannot be made without its lines
    "matrix": {"sizes", "verdicts", "arms", "conclusions", "gap", "signs", "rates", "exits", "saved", "shared_kv",
               "equal_size"},
    "exits_calibrated": {"calibrated"}, "calibrated": {"start", "read"}, "stepwise": {"stepwise"},
    "serving": {"batching", "batching_details"}, "decode": {"decode"}, "loss": {"scale"}, "train": {"scale"},
    "lora": {"scale"}, "convert": {"scale"}, "kv_policies": {"kv_policies"},
    "speculative": {"speculative"}, "sharing": {"sharing"}}


@pytest.mark.parametrize("content", [None, "", '{"what": "bench"}\n{"what'])
@pytest.mark.parametrize("name", KEPT)
def test_missing_empty_and_torn_results_keep_only_the_tables_that_need_them(tmp_path, monkeypatch, name, content):
    for path in (ROOT / "results").glob("*.jsonl"):
        if path.stem != name:
            (tmp_path / path.name).symlink_to(path)
        elif content is not None:
            (tmp_path / path.name).write_text(content)
    kept = set()
    for page, tables in PAGES.items():
        text = fill(page, "".join(f"<!-- {table} -->\nold\n<!-- /{table} -->\n" for table in tables), tmp_path)
        kept |= set(re.findall(r"<!-- (\w+) -->\nold\n", text))
    assert kept == KEPT[name]
    if name in ("matrix", "calibrated", "serving"):
        monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
        report.main([f"--results={tmp_path}", "--plots"])


def test_write_rewrites_every_page(tmp_path):
    for page, text in PAGE_TEXTS.items():
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text(re.sub(r"(<!-- (\w+) -->\n).*?(\n<!-- /\2 -->)", r"\1old\3", text, flags=re.S))
        assert (tmp_path / page).read_text().count("-->\nold\n<!--") == len(PAGES[page])
    report.write_pages(tmp_path, ROOT / "results")
    assert all((tmp_path / page).read_text() == text for page, text in PAGE_TEXTS.items())


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_show_what_the_results_have(page):
    old, new = (text.splitlines() for text in (PAGE_TEXTS[page], fill(page, PAGE_TEXTS[page], ROOT / "results")))
    stale = [f"{a!r}\n  is now {b!r}" for a, b in zip(old, new, strict=False) if a != b]
    assert old == new, "run python -m experiments.report --write:\n" + "\n".join(stale[:5])


def test_no_page_has_markers_of_a_table_that_is_not_made():
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        markers = re.findall(r"^<!-- (\w+) -->$", path.read_text(encoding="utf-8"), re.M)
        assert markers == list(PAGES.get(str(path.relative_to(ROOT)), ())), path


def test_other_results_change_every_table(tmp_path):
    for path in (ROOT / "results").glob("*.jsonl"):
        other = re.sub(r'((?:loss": \[?|"(?:loops|over_best|final|speedup|error)": )(?=\d\.)|tokens_per_s": )\d',
                       r"\g<1>7", path.read_text())
        if path.name == "calibrated.jsonl":
            other = re.sub(r", \d(?=\.\d+\])", ", 7", other)           # the last loop's
        if path.name == "matrix.jsonl":
            other = re.sub(r"(?<=\[)(\d\.\d+)|(?<=\d, )(\d\.\d+)(?=\])",  # the losses of every book move apart
                           lambda m: f"{float(m[0]) ** 2:.4f}", other)
        (tmp_path / path.name).write_text(other)
    stages = {run.stage for run in read_runs(ROOT / "results/matrix.jsonl", "toy")}
    empty = set() if "main" in stages else {"verdicts", "conclusions", "gap", "signs", "exits", "shared_kv"}
    for name, table in TABLES.items():
        assert table(tmp_path) != table(ROOT / "results") or name in empty, name


@pytest.mark.parametrize("distilled, want", [(4.5, "does not hold"), (4.1, "holds")])
def test_another_loss_changes_the_verdict(tmp_path, distilled, want):
    """The paper's fourth conclusion, from lines in which distilled models have lower, or higher, losses."""
    lines = [line("donor", "start")]
    for arm in ("stepwise", "average-r48"):
        lines += [*noisy(arm, 4.3, by_book=0.1), *noisy(f"{arm}-fkl", distilled, by_book=0.1)]
    row, = re.findall(r"\| 4 \|.*", verdicts_table(write(tmp_path, *lines)))
    assert row.endswith(f"| {want} |")


def test_one_changed_line_changes_the_verdict(tmp_path):
    lines = [line("donor", "start"), *noisy("stepwise", 4.3), *noisy("scratch", 4.4)]
    assert judge(lines_of(*lines), claims(6, 24, 48))["pretrained"][0] == "holds"
    lines[-1] = line("scratch", seed=4, loss=3.9)
    write(tmp_path, *lines)
    assert judge(read_runs(tmp_path / "matrix.jsonl", "toy"), claims(6, 24, 48))["pretrained"][0] == "cannot tell"


def test_a_lost_marker_is_an_error():
    with pytest.raises(UserError, match="0 tables between <!-- exits -->"):
        fill("docs/exits.md", PAGE_TEXTS["docs/exits.md"].replace("<!-- exits -->", ""), ROOT / "results")


def test_every_study_has_a_report(tmp_path, capsys):
    for name in STUDIES:
        report.main([f"--study={name}", f"--results={write(tmp_path)}"])
    assert capsys.readouterr().out.count(": not run\n") > 20
    with pytest.raises(UserError,
                       match="--study=other is unknown; use toy, smollm2, sizes, smollm2-sizes, smollm2-gpu"):
        report.main(["--study=other"])


@pytest.mark.parametrize("page", PAGES)
def test_images_are_there(page):
    for name in re.findall(r"!\[[^]]*\]\((.*?)\)", PAGE_TEXTS[page]):
        assert ((ROOT / page).parent / name).stat().st_size > 1000, name
