"""The shell files in experiments/: every command has flags that exist, and the toy versions run."""

import importlib
import os
import shlex
import subprocess
from pathlib import Path

import pytest

import train
from lib.cli import parse_args

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = ["tied", "relaxed", "distill", "long", "exits"]
TOY = [(experiment, "toy") for experiment in [*EXPERIMENTS, "exits_seeds"]]
LARGE = [(experiment, model) for experiment in EXPERIMENTS for model in ("gemma", "tinyllama", "pythia")]
SMALL = ["--tokens=512", "--batch_tokens=512", "--micro_batch=8", "--seq_len=64", "--eval_tokens=256", "--device=cpu"]


def settings_of(name: str) -> type:
    """The dataclass of the settings of a script: "train", "evaluation.perplexity"."""
    module = importlib.import_module(name)
    found, = [v for k, v in vars(module).items() if k.endswith("Config") and getattr(v, "__module__", "") == name]
    return found


def commands(experiment: str, model: str, *more: str, **env: str) -> list[list[str]]:
    """The words of each command that the experiment would run."""
    done = subprocess.run(["bash", f"experiments/{experiment}.sh", model, *more], cwd=ROOT, text=True,
                          capture_output=True, env=os.environ | {"DRY": "1"} | env)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line[2:]) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("experiment, model", [*TOY, *LARGE])
def test_every_command_has_flags_that_exist_and_a_folder_of_its_own(experiment, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                              # where there is no run
    words = commands(experiment, model, "--seed=7")
    for w in words:
        if w[:2] == ["python", "-m"]:
            parse_args(settings_of(w[2]), w[3:])
    runs = [parse_args(train.TrainConfig, w[w.index("train.py") + 1:]) for w in words if "train.py" in w]
    assert len({r.out for r in runs}) == len(runs) >= 4
    for args in runs:
        assert args.resume == "auto" and args.seed == 7
        train.check_settings(args, resumed=False)
        if model != "toy":  # the paper's recipe
            assert args.batch_tokens == 2**21 and args.seq_len == 2048 and args.lr == 2e-4
            assert (args.tokens, args.warmup) in ((15e9, 200), (60e9, 800))
            assert all(train.accumulation(args, gpus) for gpus in (1, 4, 8, 16, 32))


def test_gpus_and_machines_are_passed_on_to_torchrun():
    one, many = commands("tied", "gemma", GPUS="4")[0], commands("tied", "gemma", NODES="4", HEAD="node0:29500")[0]
    assert one[:4] == ["torchrun", "--nproc_per_node=4", "--max-restarts=3", "--standalone"]
    assert {"--nproc_per_node=8", "--nnodes=4", "--rdzv_endpoint=node0:29500"} < set(many)
    assert "--standalone" not in many
    lost = subprocess.run(["bash", "experiments/tied.sh", "gamma"], cwd=ROOT, capture_output=True, text=True)
    assert lost.returncode == 2 and "use toy, gemma, tinyllama or pythia" in lost.stderr


def test_the_toy_versions_run(tmp_path, monkeypatch):
    """Uptraining with a teacher, then exits; each run starts from the folder of an earlier one."""
    for name in ("assets", "experiments"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text((ROOT / "assets/books/valid.txt").read_text()[:20_000])
    for experiment in ("long", "exits"):
        for words in commands(experiment, "toy"):
            train.main([*words[words.index("train.py") + 1:], *SMALL, "--data=text.txt", "--valid=text.txt"])
