"""experiments/report.py: its arithmetic on made-up results, and that all pages show what results/ has."""

import json
import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from experiments import plots, report, verdicts
from experiments.conclusions import ExitLoss, conclusions
from experiments.matrix import MODELS, ROOT
from experiments.report import PAGES, fill
from experiments.verdicts import gap, judge, read_runs, spread, unfinished, verdict
from lib.cli import UserError

PAGE_TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
TABLES = {name: table for page in PAGES.values() for name, table in page.items()}


def losses(**runs) -> verdicts.Losses:
    return {name: dict(enumerate(values)) for name, values in runs.items()}


def line(name: str, seed: int, loss: float, donor: float = 4.0, tokens: int = 1024, stored: int = 3_000_000) -> dict:
    return {"model": "toy", "name": name, "seed": seed, "loss": loss, "donor_loss": donor, "start_loss": 5.0,
            "settings": {"tokens": tokens}, "params": {"stored_block": stored}, "curve": [[512, loss + 0.5]]}


def write(folder: Path, *lines: dict) -> Path:
    (folder / "experiments.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


def test_spread_is_the_standard_deviation_of_a_sample():
    assert spread([1.0, 2.0, 3.0]) == "2.000 ± 1.000"        # n - 1; with n it would be 0.816
    assert spread([1.0]) == "1.000" and spread([]) == ""


@pytest.mark.parametrize("a, b, sign, want", [
    ([4.0, 4.1, 4.2], [4.4, 4.5, 4.6], "<", "holds"),        # 0.4, standard error sqrt(0.01 / 3 + 0.01 / 3) = 0.082
    ([4.4, 4.5, 4.6], [4.0, 4.1, 4.2], "<", "does not"),
    ([4.0, 4.1, 4.2], [4.16, 4.26, 4.36], "<", "cannot tell"),                       # 0.16 is less than 2 x 0.082
    ([4.0, 4.1, 4.2], [4.17, 4.27, 4.37], "<", "holds"),                             # 0.17 is more
    ([4.0], [5.0, 5.0], "<", "cannot tell"),                 # one seed has no spread
    ([], [5.0, 5.0], "<", "not run"), ([5.0, 5.0], [], "~", "not run"),
    ([4.00, 4.01, 4.02], [4.02, 4.03, 4.04], "~", "holds"),  # 0.02 ± 0.008: 0.05 is 3.7 errors away
    ([4.00, 4.01, 4.02], [3.90, 3.91, 3.92], "~", "does not"),
    ([4.00, 4.01, 4.02], [4.10, 4.11, 4.12], "~", "does not"),
    ([4.00, 4.01, 4.02], [4.04, 4.05, 4.06], "~", "cannot tell"),
])
def test_verdict_of_a_claim(a, b, sign, want):
    runs = {name: dict(enumerate(values)) for name, values in (("a", a), ("b", b))}
    assert judge(("a", sign, "b"), runs)[0] == want


def test_the_difference_and_its_error_are_shown():
    assert judge(("a", "<", "b"), losses(a=[4.0, 4.1, 4.2], b=[4.4, 4.5, 4.6]))[1] == "+0.4000 ± 0.0816"


def test_a_conclusion_is_as_good_as_its_worst_claim():
    low, high, vague = [4.0, 4.01], [5.0, 5.01], [3.0, 6.0]

    def of(*claims, **runs):
        conclusion = conclusions(6, 24, 48)[0]
        conclusion.claims = [tuple(claim.split()) for claim in claims]
        return verdict(conclusion, losses(**runs))
    assert of("a < b", a=low, b=high) == "holds"
    assert of("a < b", "b < a", "a < c", a=low, b=high) == "does not"                # though c was not run
    assert of("a < b", "a < c", "a < d", a=low, b=high, d=vague) == "not run"
    assert of("a < b", "a < d", a=low, b=high, d=vague) == "cannot tell"


def test_share_of_the_gap(tmp_path):
    """Tied 4.8 and relaxed 4.2 over a donor of 4.0: three quarters. Only seeds that both have count."""
    runs = read_runs(write(
        tmp_path, line("stepwise", 0, 4.8), line("average-r48", 0, 4.2), line("stepwise", 1, 4.8),
        line("average-r48", 1, 4.4), line("stepwise", 2, 9.0), line("stepwise-quarter", 0, 4.8, tokens=256),
        line("average-r48-quarter", 1, 4.2, tokens=256)), "toy")
    assert gap(runs, 48) == [["1,024", "4.800 ± 0.000", "4.300 ± 0.141", "0.625 ± 0.177"]]


def test_a_run_measured_twice_counts_once_and_missing_seeds_are_named(tmp_path):
    runs = read_runs(write(tmp_path, line("lower", 0, 9.0), line("lower", 0, 5.0), line("lower", 2, 6.0)), "toy")
    assert {seed: x["loss"] for seed, x in runs["lower"].items()} == {0: 5.0, 2: 6.0}
    missing = unfinished(runs, "toy")
    assert "lower (2 of 3)" in missing and "random (0 of 3)" in missing and len(missing) == len(set(missing))
    assert not any("-self" in name or "-none" in name for name in missing)           # exits_seeds.jsonl has those
    assert read_runs(tmp_path, "smollm2") == {}


def test_lines_of_other_settings_are_left_out_with_a_warning(tmp_path, capsys):
    other = line("stepwise", 1, 9.0) | {"settings": {"tokens": 64, "lr": 0.5}}
    runs = read_runs(write(tmp_path, line("stepwise", 0, 4.8), line("lower", 1, 4.8), other), "toy")
    assert {name: list(seeds) for name, seeds in runs.items()} == {"stepwise": [0], "lower": [1]}
    assert "1 lines of other settings (tokens=64, lr=0.5) are left out" in capsys.readouterr().err
    ours = {"exit_loss": [5.0, 4.0], "settings": {"ckpt": "out-seeds-tied-0-self-toy", "tokens": 64, "stride": None}}
    again = ours | {"settings": ours["settings"] | {"ckpt": "out-seeds-tied-1-self-toy", "save": "a"}}
    fewer = again | {"exit_loss": [9.0, 9.0], "settings": again["settings"] | {"tokens": 8}}
    foreign = ours | {"settings": {"ckpt": "my-own-model"}}
    lines = "".join(json.dumps(x) + "\n" for x in (ours, again, fewer, foreign, {}))
    (tmp_path / "exits_seeds.jsonl").write_text(lines)
    assert verdicts.read_exits(tmp_path, "toy") == {
        ExitLoss("tied", "self", 1): {0: 5.0, 1: 5.0}, ExitLoss("tied", "self", 2): {0: 4.0, 1: 4.0}}


KEPT = {  # file -> the tables that cannot be made without its lines
    "experiments": {"conclusions", "saved"}, "exits_seeds": {"exits"}, "exits_calibrated": {"calibrated"},
    "calibrated": {"start", "read"}, "calibrated_smollm2": {"saved_smollm2"}, "stepwise": {"stepwise"},
    "batching": {"batching", "batching_details"}, "decode": {"decode"}, "loss": {"scale"}, "train": {"scale"},
    "lora": {"scale"}, "convert": {"scale"}, "uptrain_smollm2_stepwise": {"uptrain"},
    "uptrain_smollm2_average64": {"uptrain"}}


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
    if name in ("experiments", "exits_seeds", "calibrated", "calibrated_smollm2", "batching"):
        monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
        report.main([f"--results={tmp_path}", "--plots"])


def test_write_rewrites_every_page(tmp_path):
    for page, text in PAGE_TEXTS.items():
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text(re.sub(r"(<!-- (\w+) -->\n).*?(\n<!-- /\2 -->)", r"\1old\3", text, flags=re.S))
        assert (tmp_path / page).read_text().count("-->\nold\n<!--") == len(PAGES[page])
    report.write_pages(tmp_path, ROOT / "results")
    assert all((tmp_path / page).read_text() == text for page, text in PAGE_TEXTS.items())


def test_lines_of_the_plots(tmp_path):
    runs = read_runs(write(
        tmp_path, line("average", 0, 4.8), line("average-r6", 0, 4.5), line("average-r6", 1, 4.7),
        line("average-r48", 0, 4.2, stored=5_000_000), line("average-r6-zero", 0, 4.9),
        line("donor", 0, 4.1)), "toy")
    axes = Figure().subplots()
    plots.plot_rank(axes, runs, MODELS["toy"].ranks)
    svd, zero = (c.lines[0].get_xydata().tolist() for c in axes.containers)
    assert svd == [[0, 4.8], [6, pytest.approx(4.6)], [48, 4.2]] and zero == [[0, 4.8], [6, 4.9]]
    axes = Figure().subplots()
    plots.plot_inits(axes, runs, MODELS["toy"].ranks)
    assert axes.lines[0].get_xydata().tolist() == [[0, 1.0], [512, pytest.approx(1.2)], [1024, pytest.approx(0.8)]]
    axes = Figure().subplots()
    plots.plot_pareto(axes, runs, MODELS["toy"].ranks)
    assert axes.containers[0].lines[0].get_xydata().tolist() == [[3, pytest.approx(4.6)], [5, 4.2]]
    plots.save_plots(write(tmp_path, line("average", 0, 4.8)), "smollm2")           # nothing there: empty, no error
    assert (tmp_path / "smollm2_rank.png").stat().st_size > 1000


# ---------------------------------------------------------------------------------------------------------------------
# The pages

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
        other = re.sub(r'((?:loss": \[?|"loops": |"of_v1": )(?=\d\.)|tokens_per_s": )\d', r"\g<1>7", path.read_text())
        if path.name == "calibrated.jsonl":
            other = re.sub(r", \d(?=\.\d+\])", ", 7", other)           # the last loop's
        (tmp_path / path.name).write_text(other)
    for name, table in TABLES.items():
        assert table(tmp_path) != table(ROOT / "results"), name


@pytest.mark.parametrize("loss, want", [(4.9, "does not hold"), (4.5, "holds")])
def test_another_loss_changes_the_verdict(tmp_path, loss, want):
    """The paper's fourth conclusion holds; it no longer does if distilled models have higher losses."""
    for path in (ROOT / "results").glob("*.jsonl"):
        (tmp_path / path.name).symlink_to(path)
    lines = [json.loads(line) for line in (ROOT / "results" / "experiments.jsonl").read_text().splitlines()]
    for line in lines:
        if line["name"] == "stepwise-fkl":
            line["loss"] = loss + line["seed"] / 100
    (tmp_path / "experiments.jsonl").unlink()
    write(tmp_path, *lines)
    row, = re.findall(r"\| 4 \|.*", TABLES["verdicts"](tmp_path))
    assert row.endswith(f"| {want} |")


def test_a_lost_marker_is_an_error():
    with pytest.raises(UserError, match="0 tables between <!-- exits -->"):
        fill("docs/exits.md", PAGE_TEXTS["docs/exits.md"].replace("<!-- exits -->", ""), ROOT / "results")


@pytest.mark.parametrize("page", PAGES)
def test_images_are_there(page):
    for name in re.findall(r"!\[[^]]*\]\((.*?)\)", PAGE_TEXTS[page]):
        assert ((ROOT / page).parent / name).stat().st_size > 1000, name
