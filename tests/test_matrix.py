"""experiments/matrix.py: every run has valid flags, is resumed, and is never run twice."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_runs import settings_of
from tiny import interrupt_at, read_log, weights

import train
from experiments import matrix as experiments
from experiments.conclusions import conclusions
from experiments.matrix import MODELS, ROOT, ExperimentsConfig, extra_runs, matrix
from lib.cli import UserError, parse_args
from lib.results import append_line, read_lines
from model import RecursiveTransformer, read_config

SMALL = ("--tokens=512 --batch_tokens=128 --seq_len=16 --micro_batch=8 --eval_tokens=256 --eval_every=2 --log_every=1 "
         "--warmup=1 --device=cpu")


@pytest.fixture
def driver(home, tmp_path, monkeypatch):
    """driver(*flags, stop_at=None) -> (flags of each train.py that ran, lines saved). Runs train.py in this
    process on the tiny donor; with stop_at the first run gets SIGTERM in the step after that one."""
    monkeypatch.chdir(tmp_path)
    ran = []

    def run_here(command):
        ran.append(command[2:])
        with interrupt_at(run_here.stop_at, lambda: os.kill(os.getpid(), signal.SIGTERM)):
            train.main(command[2:])
        run_here.stop_at = None
        return 0
    monkeypatch.setattr(experiments, "finish", run_here)

    def drive(*flags, stop_at=None):
        ran.clear()
        run_here.stop_at = stop_at
        experiments.main([f"--donor={home}/donor", f"--data={home}/train.txt", f"--valid={home}/valid.txt",
                          "--save=lines.jsonl", f"--more={SMALL}", *flags])
        return list(ran), [x for x in read_lines("lines.jsonl") if x.get("name") != "donor"]
    drive.ran = ran
    return drive


@pytest.mark.parametrize("name", MODELS)
def test_every_run_has_flags_that_exist_and_a_folder_of_its_own(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                              # where there is no run
    runs = experiments.commands(parse_args(ExperimentsConfig, [f"--model={name}", f"--out={tmp_path}"]))
    assert len({(run, seed) for run, seed, _ in runs}) == len(runs) == {"toy": 81, "smollm2": 56}[name]
    for run, seed, words in runs:
        if seed:
            assert words == [*next(w for r, _, w in runs if r == run)[:-1], f"--seed={seed}"]
            continue
        args = parse_args(train.TrainConfig, words)
        train.check_settings(args, resumed=False)
        assert args.seed == seed and train.accumulation(args, 1) >= 1 and args.tokens % args.batch_tokens == 0


def test_conclusions_are_about_runs_of_the_matrix():
    for model in MODELS.values():
        runs = matrix(model, Path("out"))
        for c in conclusions(*model.ranks):
            assert set(c.runs) <= set(runs) and all(len(label) == 2 for label in c.rows.values())
            for a, sign, b in c.claims:
                assert sign in ("<", "~") and a != b and {a, b} <= set(c.rows)
        assert {run for group in extra_runs(*model.ranks).values() for run in group} <= set(runs)
        assert len(set(runs.values())) == len(runs)          # no two have the same flags


def test_the_first_seed_of_every_run_comes_before_the_second():
    runs = experiments.commands(ExperimentsConfig())
    needed = {run for c in conclusions(*MODELS["toy"].ranks) for run in c.runs}
    seeds = [seed for name, seed, _ in runs if name in needed]
    assert seeds == sorted(seeds) and {name for name, _, _ in runs[:len(seeds)]} == needed


def test_a_measured_run_is_not_run_again(driver, home, capsys):
    ran, lines = driver("--only=norms", "--seeds=2")
    assert [(x["name"], x["seed"]) for x in lines] == [(n, s) for s in (0, 1)
                                                       for n in ("average", "norms-pick", "norms-zero")]
    for line in lines:
        log = read_log(Path(f"out_experiments/toy/{line['name']}-s{line['seed']}"))
        assert line["loss"] == log[-1]["full_val_loss"] and line["start_loss"] == log[0]["full_val_loss"]
        assert line["donor_loss"] == log[0]["donor_loss"] and [t for t, _ in line["curve"]] == [256]
        assert line["settings"]["tokens"] == 512 and line["settings"]["weight_decay"] == 0.1 and line["commit"]
        assert line["params"]["stored"] < line["params"]["run"]
    assert len({line["loss"] for line in lines}) == 6
    [donor] = [x for x in read_lines("lines.jsonl") if x["name"] == "donor"]
    assert donor["valid_tokens"] == 256 and line["valid_tokens"] == 1024
    assert donor["loss"] == pytest.approx(line["donor_loss"], abs=0.3) and donor["loss"] != line["donor_loss"]
    assert driver("--only=norms", "--seeds=2") == ([], lines)
    assert "6 runs, 6 of them measured" in capsys.readouterr().out
    ran, more = driver("--only=norms,inits", "--seeds=1")   # a run that two conclusions share runs once
    assert [line["name"] for line in more[6:]] == ["stepwise", "lower", "random"] and len(ran) == 3
    with pytest.raises(UserError, match="toy/average-s0"):   # other settings need another folder
        driver("--only=norms", "--seeds=1", f"--more={SMALL} --lr=2e-3")


def test_the_tokens_measured_are_recorded_not_those_asked_for(driver, home, tmp_path):
    (tmp_path / "short.txt").write_text((home / "valid.txt").read_text()[:600])
    line = driver("--only=distill", "--seeds=1", f"--valid={tmp_path}/short.txt")[1][0]
    [donor] = [x for x in read_lines("lines.jsonl") if x["name"] == "donor"]
    assert 100 < line["valid_tokens"] < 1024 and line["valid_tokens"] % 16 == 0
    assert line["curve_tokens"] == donor["valid_tokens"] < 256


def test_torn_and_foreign_lines_of_the_results_are_skipped(driver):
    ran, lines = driver("--only=distill", "--seeds=1")
    append_line("lines.jsonl", {"what": "bench"})
    with open("lines.jsonl", "a") as f:
        f.write('{"what": "experiment", "na')
    assert len(ran) == 2 and driver("--only=distill", "--seeds=1")[0] == []


def test_changed_settings_are_those_that_change_a_figure():
    lines = read_lines(ROOT / "results" / "experiments.jsonl")
    assert len(lines) > 80 and {experiments.changed_settings(line) for line in lines} == {()}
    line = next(line for line in lines if line["name"] == "norms-zero")
    for settings, other in (({"seed": 9, "out": "x", "ckpt": "elsewhere/zeroed"}, ()), ({"lr": 0.5}, (("lr", 0.5),)),
                            ({"tokens": 64, "valid": "a"}, (("tokens", 64), ("valid", "a")))):
        changed = experiments.changed_settings(line | {"settings": line["settings"] | settings})
        assert sorted(changed) == sorted(other)


def test_an_interrupted_run_is_resumed(driver, tmp_path):
    straight = driver("--only=distill", "--seeds=1", "--out=straight")[1]
    Path("lines.jsonl").unlink()
    with pytest.raises(UserError, match="stepwise, seed 0, did not finish"):
        driver("--only=distill", "--seeds=1", stop_at=2)
    assert len(read_lines("lines.jsonl")) == 1 and len(driver.ran) == 1  # the donor's line
    ran, lines = driver("--only=distill", "--seeds=1")
    assert [(x["name"], x["loss"]) for x in lines] == [(x["name"], x["loss"]) for x in straight]
    log = read_log(tmp_path / "out_experiments/toy/stepwise-s0")
    assert [x["step"] for x in log if "loss" in x] == [1, 2, 3, 4]
    Path("lines.jsonl").unlink()                             # as if stopped between a run's end and its line
    assert [x["loss"] for x in driver("--only=distill", "--seeds=1")[1]] == [x["loss"] for x in straight]


def test_the_starts_of_the_baselines(driver, home):
    driver("--only=pretrained", "--seeds=1")
    full, half = read_config("out_experiments/toy/full-s0"), read_config("out_experiments/toy/scratch-s0")
    tied = read_config("out_experiments/toy/stepwise-s0")
    assert (full.n_loop, full.n_layer) == (1, 4) and (half.n_loop, half.n_layer) == (1, 2)
    assert (tied.n_loop, tied.n_unique) == (2, 2)
    with torch.device("meta"):
        stored = [RecursiveTransformer(c).num_params()["stored"] for c in (half, tied)]
    assert stored[0] == stored[1]
    for name, weight in weights(Path("out_experiments/toy/zeroed")).items():
        assert (weight == 0).all() == ("norm" in name and name.startswith("layers.")), name


def test_dry_runs_nothing(driver, capsys):
    ran, lines = driver("--only=distill", "--dry")
    printed = [shlex.split(x) for x in capsys.readouterr().out.splitlines() if x.startswith("+ ")]
    assert not ran and not lines and not Path("out_experiments").exists()
    assert len(printed) == 6 and all(words[1:3] == ["python", "train.py"] for words in printed)
    assert ["--init=stepwise" in words for words in printed] == 6 * [True]


def test_ctrl_c_waits_until_the_command_has_saved(tmp_path):
    command = (f"import signal, time, pathlib\nsignal.signal(signal.SIGINT, lambda *_: (time.sleep(1), pathlib.Path("
               f"'{tmp_path}/saved').touch(), exit(130)))\npathlib.Path('{tmp_path}/ready').touch()\ntime.sleep(60)")
    driver = subprocess.Popen([sys.executable, "-c", f"import sys\nfrom experiments.matrix import finish\n"
                               f"finish([sys.executable, '-c', {command!r}])"],
                              cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    until = time.time() + 60
    while not (tmp_path / "ready").exists() and time.time() < until:
        time.sleep(0.05)
    os.killpg(driver.pid, signal.SIGINT)                     # as a terminal does, to both
    assert driver.wait(60) != 0 and (tmp_path / "saved").exists()


def test_unknown_names_and_failures_are_reported(driver, monkeypatch):
    with pytest.raises(UserError, match="--seeds=0 must be at least 1"):
        driver("--seeds=0")
    with pytest.raises(UserError, match="cannot be written"):
        driver("--save=nowhere/lines.jsonl")
    with pytest.raises(UserError, match="'ranks' is unknown; use inits, relaxed, rank"):
        driver("--only=inits,ranks")
    monkeypatch.setattr(experiments, "finish", lambda command: 3)
    with pytest.raises(UserError, match="exit code 3"):
        driver("--only=distill")


def test_the_large_matrix_is_ready(tmp_path, monkeypatch):
    """Every command of experiments/smollm2.sh has flags that exist."""
    done = subprocess.run(["bash", "experiments/smollm2.sh", "books.txt"], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"DRY": "1", "TASKS": "tasks"})
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    words = [[w for w in shlex.split(line[2:]) if w not in ("python", "-m")] for line in done.stdout.splitlines()]
    assert words[1][:2] == ["experiments.matrix", "--model=smollm2"]
    assert {w[0] for w in words} == {"train.py", "lib.data", "evaluation.perplexity", "evaluation.harness",
                                     "experiments.matrix", "experiments.report"}
    for w in words:
        parse_args(settings_of(w[0].removesuffix(".py")), w[1:])
    trained = [parse_args(train.TrainConfig, w[1:]) for w in words if w[0] == "train.py"]
    assert len({args.out for args in trained}) == 6
    large = matrix(MODELS["smollm2"], Path("out_experiments/smollm2"))
    for args in trained:
        train.check_settings(args, resumed=False)
        assert re.sub("-s0$", "", Path(args.ckpt).name) in large
