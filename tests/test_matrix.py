"""experiments/matrix.py: what is run next, and one small matrix from its first run to its last. low_rank.py."""

import math
import os
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_runs import settings_of
from tiny import DONOR, weights

import train
from calibrate import SHARED_INPUT, absorb_norms, calibrate, calibration_windows, collect_stats
from convert import load_full
from experiments import low_rank, matrix, sharing
from experiments.arms import STUDIES, arms_of_size, paper_arms
from experiments.claims import claims
from experiments.low_rank import RankPerLayer, ranks_by_need, to_low_rank, to_shared, weighted_svds
from experiments.matrix import Run, chosen_rate, flags, next_runs, tried_rates
from lib.cli import UserError, parse_args
from lib.data import load_tokens
from lib.results import read_lines
from lib.tokenizer import Tokenizer
from model import RecursiveTransformer

ROOT = Path(__file__).resolve().parent.parent
TOY = STUDIES["toy"]


def fake_line(final: float | None) -> dict:
    return {"valid": {"final": final, "start": 5.0}}


def run_all(study, loss) -> list[Run]:
    """The runs in the order in which one job does them, when a run with this arm and rate ends at loss(arm, lr)."""
    lines, order = {}, []
    while todo := next_runs(study, lines):
        order.append(todo[0])
        lines[todo[0]] = fake_line(loss(todo[0].arm, todo[0].lr or 1.0))
    return order


# ---------------------------------------------------------------------------------------------------------------------
# What is run

@pytest.mark.parametrize("name", STUDIES)
def test_every_run_has_flags_that_exist(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                              # where there is no run
    study = STUDIES[name]
    lines = {Run(matrix.rate_stage(arm), arm.name, 100, lr): fake_line(abs(math.log(lr / 1e-3)))
             for arm in study.arms for lr in study.grid}
    for arm in study.arms:
        for stage in ("exit_rate", "exits") if arm.base else ("rate", "main", "check"):
            args = parse_args(train.TrainConfig, flags(study, Run(stage, arm.name, 3, 1e-3), lines, Path("work")))
            train.check_settings(args, resumed=False)
            assert args.seed == 3 and args.lr == 1e-3 and train.accumulation(args, 1) >= 1
            assert args.tokens % args.batch_tokens == 0 and args.warmup < args.tokens // args.batch_tokens
            assert args.skip_tokens == {"exits": study.tokens, "exit_rate": study.rate_tokens}.get(stage, 0)
            if arm.base:
                assert args.ckpt.startswith(f"work/{'main' if stage == 'exits' else 'rate'}-{arm.base}-s3-")


@pytest.mark.parametrize("study", [TOY, STUDIES["smollm2-gpu"]])
def test_claims_are_about_arms(study):
    names = {arm.name for arm in study.arms}
    assert len(names) == len(study.arms) and set(study.checked) <= names
    assert len(given := claims(*study.ranks)) == 8
    for claim in given:
        assert {measured.arm for measured in claim.rows} <= names
        assert {each.arm for part in claim.parts for each in part[:2]} <= {measured.arm for measured in claim.rows}
        assert all(part.a != part.b for part in claim.parts)


@pytest.mark.parametrize("best", TOY.grid)
def test_the_grid_is_walked_until_the_best_rate_has_a_worse_one_on_both_sides(best):
    study = replace(TOY, arms=TOY.arms[:1], checked=())
    order = run_all(study, lambda arm, lr: abs(math.log(lr / best)))
    tried = [run.lr for run in order if run.stage == "rate"]
    assert len(set(tried)) == len(tried) and [run.lr for run in order if run.stage == "main"] == [best] * 5
    i = study.grid.index(best)
    assert set(study.grid[max(0, i - 1):i + 2]) <= set(tried)
    assert len(tried) <= 3 + max(0, abs(i - 2.5) - 0.5)      # no rate beyond a neighbour of the best


def test_a_run_that_diverged_is_the_worst():
    arm, study = TOY.arms[0], replace(TOY, arms=TOY.arms[:1])
    lines = {Run("rate", arm.name, 100, lr): fake_line(loss) for lr, loss in ((1e-4, 4.5), (3e-4, 4.4), (1e-3, None))}
    assert chosen_rate(study, arm, lines) == 3e-4 and tried_rates(arm, lines)[1e-3] == math.inf


def test_an_arm_with_the_rate_of_another_tries_none_and_waits():
    arms = arms_of_size((4, 8), rates_of=8)
    study = replace(TOY, arms=arms, checked=(), seeds=(0,))
    order = run_all(study, lambda arm, lr: abs(math.log(lr / 3e-4)))
    assert {run.arm for run in order if run.stage == "rate"} == {arm.name for arm in arms if arm.name.endswith("-8")}
    assert [run[1:] for run in order if run.stage == "main"] == [(arm.name, 0, 3e-4) for arm in arms]
    assert all(run.stage != "main" for run in next_runs(study, {}))


def test_every_arm_of_a_seed_comes_before_the_next_seed_and_exits_after_their_base():
    order = run_all(TOY, lambda arm, lr: abs(math.log(lr / 3e-4)))
    assert len(set(order)) == len(order)
    main = [run.seed for run in order if run.stage in ("main", "exits")]
    assert main == sorted(main) and set(main) == set(TOY.seeds)
    assert {run.arm for run in order if run.stage in ("main", "exits") and run.seed == 4} == {a.name for a in TOY.arms}
    at = {run: i for i, run in enumerate(order)}
    for run in order:
        if run.stage == "exits":
            assert at[Run("main", TOY.arm(run.arm).base, run.seed, 3e-4)] < at[run]
    assert all(run.seed == TOY.rate_seed for run in order if run.stage in ("rate", "exit_rate", "check"))
    assert TOY.rate_seed not in TOY.seeds
    assert sum(run.stage == "check" for run in order) == 3 * len(TOY.checked)
    # Several jobs at once: exits are not on the list before their base has its line.
    lines = {run: fake_line(abs(math.log((run.lr or 1) / 3e-4))) for run in order if run.stage not in ("main", "exits")}
    assert {run.stage for run in next_runs(TOY, lines)} == {"main"}
    lines[Run("main", "average", 2, 3e-4)] = fake_line(4.0)
    assert [run for run in next_runs(TOY, lines) if run.stage != "main"] == [
        Run("exits", "exits-self-average", 2, 3e-4)]


# ---------------------------------------------------------------------------------------------------------------------
# A small matrix

class Inline:
    """A pool that runs each job at once, in this process."""
    def __init__(self, jobs, mp_context):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, work, *args):
        future = Future()
        future.set_result(work(*args))
        return future


@pytest.fixture
def driver(home, tmp_path, monkeypatch):
    """driver(*flags) -> the lines saved, of a matrix on the tiny donor, with train.py in this process."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books").mkdir()
    for i, text in enumerate((home / "valid.txt").read_text()[k:k + 2000] for k in (0, 2000)):
        (tmp_path / "books" / f"book{i}.txt").write_text(text)
    ran = []

    def run_here(command, output):
        ran.append(command)
        if "experiments.low_rank" in command:
            with monkeypatch.context() as patched:           # main replaces the class that train.py loads
                patched.setattr(train, "RecursiveTransformer", RecursiveTransformer)
                return low_rank.main(command[3:]) or 0
        return train.main(command[2:]) or 0
    monkeypatch.setattr(matrix, "finish", run_here)
    monkeypatch.setattr(matrix, "ProcessPoolExecutor", Inline)
    arms = [arm for arm in paper_arms(2, 4, 8)
            if arm.name in ("stepwise", "scratch", "norms-zero", "exits-self")]
    arms += arms_of_size((4,), "--distill=none")
    study = replace(TOY, donor=f"{home}/donor", data=f"{home}/train.txt", valid=f"{home}/valid.txt", test="books",
                    windows=4, flags="--micro_batch=8 --eval_tokens=128 --device=cpu", seq_len=16, batch_tokens=128,
                    seeds=(0, 1), tokens=512, exit_tokens=256, rate_tokens=256, exit_rate_tokens=128,
                    grid=(1e-3, 3e-3), first=(3e-3,), arms=tuple(arms), checked=("stepwise",))
    monkeypatch.setitem(STUDIES, "toy", study)

    def drive(*flags):
        ran.clear()
        matrix.main(["--save=lines.jsonl", *flags])
        return read_lines("lines.jsonl")
    drive.ran = ran
    return drive


def test_a_matrix_from_its_first_run_to_its_last(driver):
    lines = driver()
    by_run = matrix.read_runs("lines.jsonl", "toy")
    assert len(by_run) == len(lines) and next_runs(STUDIES["toy"], by_run) == []
    stages = [line["stage"] for line in lines]
    assert {stage: stages.count(stage) for stage in set(stages)} == {
        "start": 7, "rate": 12, "exit_rate": 2, "main": 12, "exits": 2, "check": 2}
    for line in lines:
        if line["stage"] in ("start", "main", "exits"):
            loops = 1 if line["arm"] in ("donor", "low-rank-4", "scratch") else 2
            assert set(line["books"]) == {"book0", "book1"} and {len(x) for x in line["books"].values()} == {loops}
        if line["stage"] != "start":
            assert line["tokens"] == {"rate": 256, "exit_rate": 128, "exits": 256}.get(line["stage"], 512)
            assert line["valid"]["final"] < 10 and line["seconds"] > 0
    # Exits start from what uptraining of their seed left, and go on behind its text.
    exits = {line["seed"]: line for line in lines if line["stage"] == "exits"}
    for seed, line in exits.items():
        base, = (run for run in by_run if run.stage == "main" and run.arm == "stepwise" and run.seed == seed)
        assert f"--ckpt={base.folder(Path('out_experiments/toy'))}" in line["command"]
        assert "--skip_tokens=512" in line["command"] and line["valid"]["start"] == by_run[base]["valid"]["final"]
    # Only checkpoints that exits start from are left, and starts.
    left = {path.name for path in Path("out_experiments/toy").iterdir() if path.is_dir()}
    assert left == {"half", "gain-0", "low-rank-4", "by-need-4", "one-rank-4"} | {
        run.folder(Path()).name for run in by_run if run.arm == "stepwise" and run.stage in ("rate", "main")}
    # A second call has nothing to do.
    assert driver() == lines and not driver.ran


def test_the_starts_that_train_does_not_make(driver, home):
    driver("--seeds=1", "--only=scratch,norms-zero,low-rank-4,by-need-4,one-rank-4")
    work = Path("out_experiments/toy")
    assert train.donor_config(work / "half").n_layer == 2
    for name, weight in weights(work / "gain-0").items():
        assert (weight == -1).all() == ("norm" in name and name.startswith("layers.")), name     # Gemma stores gain - 1
    recursive = RecursiveTransformer(replace(DONOR, n_loop=2, rank=4))
    for way, kind in (("low-rank", RankPerLayer), ("by-need", RankPerLayer), ("one-rank", RecursiveTransformer)):
        model = kind.load(work / f"{way}-4")
        left = recursive.num_params()["stored_block"] - model.num_params()["stored_block"]
        assert 0 <= left < {"low-rank": 2 * DONOR.n_hidden, "by-need": 40 * DONOR.n_hidden, "one-rank": 1}[way]
        assert model.config.n_loop == (1 if way == "low-rank" else 2)


def test_the_score_is_that_of_each_book(driver, home):
    driver("--seeds=1", "--only=exits-self")             # keeps the checkpoint of its base
    line, = (x for x in read_lines("lines.jsonl") if x["stage"] == "main")
    out = Run("main", "stepwise", 0, line["lr"]).folder(Path("out_experiments/toy"))
    model, tokenizer = RecursiveTransformer.load(out), Tokenizer.load(home / "donor", DONOR.vocab_size)
    for name, found in line["books"].items():
        tokens = load_tokens(f"books/{name}.txt", tokenizer, DONOR.vocab_size)
        idx = torch.from_numpy(tokens[0:65]).long()[None]
        rows = torch.cat([idx[:, i:i + 17] for i in range(0, 64, 16)])
        if tokens.first_id is not None:
            rows = torch.cat([torch.full((4, 1), tokens.first_id), rows[:, :-1]], dim=1)
        states = model(rows[:, :-1])
        want = [torch.nn.functional.cross_entropy(model.logits(x).flatten(0, 1), rows[:, 1:].flatten()).item()
                for x in states]
        assert found == pytest.approx(want, abs=1e-4)


def test_dry_runs_nothing(driver, capsys):
    assert driver("--dry") == [] and not driver.ran and not Path("out_experiments").exists()
    printed = [shlex.split(line) for line in capsys.readouterr().out.splitlines()[1:]]
    assert [words[:2] for words in printed[:2]] == [["start", "donor"], ["start", "stepwise"]]
    for words in printed[1:]:
        parse_args(train.TrainConfig, words[4:])


def test_what_is_wrong_is_said(driver, monkeypatch):
    for given, message in (("--seeds=0", "--seeds=0 must be at least 1"), ("--study=big", "use toy, smollm2"),
                           ("--save=nowhere/lines.jsonl", "cannot be written"),
                           ("--only=stepwise,ranks", "'ranks' is unknown; use stepwise")):
        with pytest.raises(UserError, match=message):
            driver(given)
    monkeypatch.setattr(matrix, "finish", lambda command, output: 3)
    with pytest.raises(UserError, match=r"exit code 3, .*\.txt\): the same command resumes it"):
        driver("--only=stepwise")


def test_ctrl_c_waits_until_the_command_has_saved(tmp_path):
    command = (f"import signal, time, pathlib\nsignal.signal(signal.SIGINT, lambda *_: (time.sleep(1), pathlib.Path("
               f"'{tmp_path}/saved').touch(), exit(130)))\npathlib.Path('{tmp_path}/ready').touch()\ntime.sleep(60)")
    driver = subprocess.Popen([sys.executable, "-c", f"import sys\nfrom experiments.matrix import finish\n"
                               f"finish([sys.executable, '-c', {command!r}], sys.stderr)"],
                              cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    until = time.time() + 60
    while not (tmp_path / "ready").exists() and time.time() < until:
        time.sleep(0.05)
    os.killpg(driver.pid, signal.SIGINT)                     # as a terminal does, to both
    assert driver.wait(60) != 0 and (tmp_path / "saved").exists()


def test_the_gpu_script_is_ready():
    """Every command of experiments/gpu.sh has flags that exist."""
    done = subprocess.run(["bash", "experiments/gpu.sh", "books.txt"], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"DRY": "1"})
    assert done.returncode == 0, done.stderr
    words = [[w for w in shlex.split(line[2:]) if w not in ("python", "-m")] for line in done.stdout.splitlines()]
    assert len(words) > 5
    for w in words:
        parse_args(settings_of(w[0].removesuffix(".py")), w[1:])


# ---------------------------------------------------------------------------------------------------------------------
# Plain low rank

@pytest.fixture(scope="module")
def donor(home):
    full = load_full(home / "donor", torch.float32)
    tokens = load_tokens(f"{home}/train.txt", Tokenizer.load(home / "donor", DONOR.vocab_size), DONOR.vocab_size)
    windows = calibration_windows(tokens, 2048, full.config, "text")
    return full, windows, weighted_svds(full, collect_stats(full, windows))


def test_full_ranks_give_the_donor_back(donor):
    full, windows, svds = donor
    model = to_low_rank(full, svds, 10 * full.num_params()["stored_block"])
    assert model.config.extra["ranks"]["layers.0.attn.q"] == 32 and model.config.extra["ranks"]["layers.0.attn.k"] == 8
    torch.testing.assert_close(model(windows[0])[0], full(windows[0])[0], atol=2e-4, rtol=1e-3)


def test_it_stores_what_it_may_and_nothing_of_w(donor, tmp_path):
    full, windows, svds = donor
    budget = int(0.6 * full.num_params()["stored_block"])
    model = to_low_rank(full, svds, budget)
    assert budget - 2 * DONOR.n_hidden < model.num_params()["stored_block"] <= budget
    assert not any(name.endswith(("q.weight", "down.weight")) for name in model.state_dict())
    model.save(tmp_path / "saved")
    torch.testing.assert_close(RankPerLayer.load(tmp_path / "saved")(windows[0])[0], model(windows[0])[0])
    with pytest.raises(UserError):                           # by no other name
        RecursiveTransformer.load(tmp_path / "saved")


def test_the_svd_is_weighted_and_cut_where_it_costs_least(donor):
    """Its loss is lower than of the best approximation of the weights alone with uniform ranks."""
    full, windows, svds = donor
    size = 0.5 * full.num_params()["stored_block"]
    ours = to_low_rank(full, svds, int(size))
    plain, share = deepcopy(full), 0.5
    for layer in plain.layers:
        for linear in (layer.attn.q, layer.attn.k, layer.attn.v, layer.attn.o, layer.mlp.gate, layer.mlp.up,
                       layer.mlp.down):
            out, width = linear.weight.shape
            u, s, vh = torch.linalg.svd(linear.weight.data, full_matrices=False)
            r = max(1, int(share * out * width / (out + width)))
            linear.weight.data = (u[:, :r] * s[:r]) @ vh[:r]

    def loss(model):
        return sum(torch.nn.functional.cross_entropy(model.logits(model(idx)[0])[:, :-1].flatten(0, 1),
                                                     idx[:, 1:].flatten()).item() for idx in windows)
    assert loss(full) < loss(ours) < loss(plain)


def test_sharing_with_ranks_by_need(donor, tmp_path, monkeypatch):
    """It loses less than with one rank for all; with ranks of zero it is what calibrate makes."""
    full, windows, _ = donor
    monkeypatch.setattr(sharing, "RANKS", (0, 1, 2, 4, 8, 12))
    stats = collect_stats(full, windows)
    budget = low_rank.stored_block(replace(full.config, n_loop=2, rank=4))
    found = sharing.all_options(full, stats, ("shared",))
    model, one_rank = to_shared(full, stats, found, budget), calibrate(full, stats, 2, 4)
    ranks = model.config.extra["ranks"]
    assert len(set(ranks.values())) > 1 and 0.95 * budget < model.num_params()["stored_block"] <= budget

    def loss(model):
        return sum(torch.nn.functional.cross_entropy(model.logits(model(idx)[-1])[:, :-1].flatten(0, 1),
                                                     idx[:, 1:].flatten()).item() for idx in windows)
    assert loss(full) < loss(model) < loss(one_rank)
    tied = to_shared(full, stats, found, low_rank.stored_block(replace(full.config, n_loop=2)))
    assert set(tied.config.extra["ranks"].values()) == {0}
    torch.testing.assert_close(tied(windows[0])[1], calibrate(full, stats, 2)(windows[0])[1])
    model.save(tmp_path / "saved")
    torch.testing.assert_close(RankPerLayer.load(tmp_path / "saved")(windows[0])[1], model(windows[0])[1])


def test_a_layer_shares_where_that_is_cheapest(donor):
    """All do if the halves of the donor are equal, and then half the block has no error."""
    full, windows, _ = donor
    twice, n = deepcopy(full), full.config.n_layer // 2
    for k in range(n):
        twice.layers[n + k] = deepcopy(twice.layers[k])
    for model, shares in ((full, False), (twice, True)):
        found = sharing.all_options(model, collect_stats(model, windows))
        assert list(found) == [f"layers.{k}.{name}" for k in range(n) for names in SHARED_INPUT.values()
                               for name in names]
        whole = sum(options[0][1] for options in found.values())
        for share in (0.5, 0.7, 0.9):
            chosen = {name: sharing.choose(found, share * whole, ways) for name, ways in sharing.WAYS.items()}
            chosen["shared, one rank"] = sharing.one_rank(found, share * whole)
            size, error = ({name: sum(option[i] for option in chosen[name]) for name in chosen} for i in (1, 2))
            assert all(s <= share * whole for s in size.values())
            # The steps between ranks may leave a little of the budget.
            assert error["any of them"] <= 1.1 * min(error["low rank"], error["shared, ranks by need"]) + 1e-12
        assert ({option[0] for option in chosen["any of them"]} == {"shared"}) == shares
        assert (error["any of them"] < 1e-9) == shares


def test_the_errors_of_the_ways_to_store(donor):
    """Against (C1) written out, at a rank at which each has an error."""
    full, windows, svds = donor
    stats, n = collect_stats(full, windows), full.config.n_layer // 2
    layers = [absorb_norms(full.layers[i]) for i in (1, 1 + n)]
    W = [layer.mlp.up.weight.detach().double() for layer in layers]
    C, g = ([kind[f"layers.{i}.mlp.up"] for i in (1, 1 + n)] for kind in (stats.inputs, stats.gradients))
    C = [second.double() for second, _ in C]

    def error(fitted):
        return sum(torch.einsum("oi,ij,oj,o->", w - f, c, w - f, s).item() / 2
                   for w, f, c, s in zip(W, fitted, C, g, strict=True))
    group = sharing.Group(W, C, g, ridge=1e-9)
    plain = {cost: e for _, cost, e in group.low_rank()}
    rank = 8
    squares = torch.cat([torch.linalg.svdvals(s.sqrt()[:, None] * w @ torch.linalg.cholesky(c)).square() / 2
                         for w, c, s in zip(W, group.C, group.g, strict=True)]).sort()[0]
    assert plain[rank * sum(W[0].shape)] == pytest.approx(squares[:-rank].sum().item(), rel=1e-5)
    shared = dict((cost, e) for _, cost, e in group.shared())
    D = sum(g) / sum(g).mean()
    average = torch.linalg.solve(sum(c * s.sum() for c, s in zip(C, g, strict=True)).T,
                                 sum(w @ c * s.sum() for w, c, s in zip(W, C, g, strict=True)).T).T
    assert shared[W[0].numel()] == pytest.approx(error([average] * 2), rel=1e-4) and len(shared) > 2
    assert sorted(shared.values(), reverse=True) == list(shared.values())
    fitted = group.fit_product(16, 4)
    ranks = [torch.linalg.matrix_rank(f, rtol=1e-9).item() for f in (*fitted, fitted[0] - fitted[1])]
    assert ranks == [20, 20, 8] and group.error(fitted) == pytest.approx(error([f / D.sqrt()[:, None] for f in fitted]),
                                                                         rel=1e-4)
    size = sum(W[0].shape)
    assert group.error(fitted) < plain[8 * size]                         # LoRAs of rank 4 without U V
    for (_, cost, e), rank in zip(group.basis(), sharing.RANKS[1:], strict=False):
        assert plain[2 * rank * size] < e < plain[rank * size] and cost == rank * (W[0].size(1) + 2 * W[0].size(0))


def test_ranks_go_where_an_entry_lowers_the_error_most():
    def svd(out, width, *s):
        return torch.zeros(len(s), width), torch.zeros(out, len(s)), torch.tensor(s)
    svds = {"wide": svd(8, 8, 9.0, 8.0, 1.0), "narrow": svd(1, 3, 5.0, 4.1, 3.9)}    # 16 and 4 entries a rank
    # Gains for each entry: wide 64 / 16 = 4, 1 / 16; narrow 4.2, 3.8.
    assert ranks_by_need(svds, 20) == {"wide": 1, "narrow": 1}
    assert ranks_by_need(svds, 24) == {"wide": 1, "narrow": 2}
    assert ranks_by_need(svds, 36) == {"wide": 1, "narrow": 3}           # narrow fits, another wide one does not
    assert ranks_by_need(svds, 40) == {"wide": 2, "narrow": 2}
    assert ranks_by_need(svds, 1000) == {"wide": 3, "narrow": 3}
    with pytest.raises(UserError, match="too few"):
        ranks_by_need(svds, 19)
