"""Runs the paper's experiments that are still missing: one line of results/experiments.jsonl for each run.

    python -m experiments.matrix                # all on the shipped donor: an hour and a half on one core
    python -m experiments.matrix --only=norms   # one conclusion: inits, relaxed, rank, distill, pretrained, exits,
                                                # relaxed_exits, norms; or more runs: zero, loops, calibrated, tokens
    python -m experiments.matrix --dry          # only print the commands
    python -m experiments.report                # verdicts and plots from the lines so far

Each run is one call of train.py. Runs that already have a line are skipped; an interrupted run is resumed.
The first seed of every run comes before the second seed of any, so a matrix that was stopped early still
covers every conclusion.
"""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from convert import load_full, to_recursive
from experiments.conclusions import conclusions
from lib.cli import UserError, parse_args, print0, script
from lib.data import load_tokens, validation
from lib.donors import find_donor, read_json
from lib.folders import replace_folder
from lib.results import append_line, check_writable, json_line, read_lines
from lib.system import run_info, start_processes
from lib.tokenizer import Tokenizer, copy_tokenizer
from model import RecursiveTransformer, read_config
from train import TrainConfig, count_targets, evaluate, precision

ROOT = Path(__file__).resolve().parent.parent
EXITS = "bash experiments/exits_seeds.sh"      # trains and measures the models of the two conclusions about exits
N_EXIT_LINES = 24                              # lines of results/exits_seeds.jsonl when it has finished


@dataclass
class Model:
    """The settings in which the donors differ."""
    donor: str
    data: str
    valid: str
    tokens: int
    ranks: tuple[int, int, int]                # LoRA ranks, ascending; toy: the share of the width that the paper's
    seeds: int                                 # 64, 256 and 512 have in Gemma 2B
    flags: str                                 # of every run
    uptraining: str                            # more flags of the runs that compare average with calibrated starts


MODELS = {
    "toy": Model("assets/donor", "assets/books/train", "assets/books/valid.txt", 32_768, (6, 24, 48), 3,
                 "--batch_tokens=512 --micro_batch=2 --warmup=5 --eval_every=16 --eval_tokens=4096 --save_every=32",
                 "--tokens=307_200 --batch_tokens=2048 --micro_batch=8 --warmup=20 --lr=3e-4 --eval_every=5 "
                 "--save_every=50"),
    "smollm2": Model("HuggingFaceTB/SmolLM2-135M", "out_books", "out_books/valid", 20_971_520, (16, 64, 256), 1,
                     "--seq_len=1024 --batch_tokens=65_536 --micro_batch=16 --lr=5e-4 --warmup=20 --eval_every=40 "
                     "--eval_tokens=65_536 --save_every=80 --compile", "--eval_every=10"),
}


def extra_runs(low: int, mid: int, top: int) -> dict[str, list[str]]:
    """Name for --only -> runs that no conclusion needs, but a plot or another table of the report."""
    return {"zero": [f"average-r{low}-zero", f"average-r{mid}-zero"],
            "loops": ["stepwise-3x", "average-3x", f"average-r{top}-3x"],
            "calibrated": [f"{init}-r{mid}-{how}" for how in ("long", "exits") for init in ("average", "calibrated")],
            "tokens": [f"{run}-{size}" for size in ("quarter", "fourfold")
                       for run in ("stepwise", f"average-r{top}")]}


def matrix(model: Model, work: Path) -> dict[str, str]:
    """Every run: name -> flags of train.py. `work` is the folder with the checkpoints of `prepare_starts`."""
    _, mid, top = model.ranks
    starts = {init: f"--init={init}" for init in ("stepwise", "average", "lower", "random")}
    for rank in model.ranks:
        starts[f"average-r{rank}"] = f"--init=average --rank={rank}"
        starts[f"average-r{rank}-zero"] = f"--init=average --rank={rank} --lora_init=zero"
    starts[f"stepwise-r{top}"] = f"--init=stepwise --rank={top}"
    runs = {}
    for loops, suffix in ((2, ""), (3, "-3x")):
        for name, start in starts.items():
            runs[name + suffix] = f"{start} --loops={loops} --distill=none"
            runs[name + suffix + "-fkl"] = f"{start} --loops={loops} --distill=fkl"
    runs |= {"full": "--loops=1 --distill=none",
             "scratch": f"--init=scratch --donor={work}/half --distill=none",
             "norms-pick": "--init=average --norms=pick --distill=none",
             "norms-zero": f"--ckpt={work}/zeroed --distill=none"}
    for init in ("average", "calibrated"):                   # ours: calibrate.py
        start = f"--init={init} --rank={mid} --distill=fkl {model.uptraining}"
        runs |= {f"{init}-r{mid}-long": start, f"{init}-r{mid}-exits": f"{start} --exit_loss=aggressive"}
    for size, tokens in (("quarter", model.tokens // 4), ("fourfold", 4 * model.tokens)):
        for name in ("stepwise", f"average-r{top}"):
            runs[f"{name}-{size}"] = f"{runs[name]} --tokens={tokens}"
    return runs


def select_runs(model_name: str, only: str) -> list[str]:
    """Names of the runs that --only selects, those of the conclusions first. Without --only: all of them; for
    the shipped donor those that a conclusion, a plot or a table needs."""
    ranks = MODELS[model_name].ranks
    groups = {c.name: c.runs for c in conclusions(*ranks)} | extra_runs(*ranks)
    words = only.split(",") if only else []
    for word in words:
        if word not in groups:
            raise UserError(f"--only={only}: {word!r} is unknown; use {', '.join(groups)}, "
                            "several separated by commas")
    names = dict.fromkeys(run for group in words or groups for run in groups[group])
    if model_name != "toy" and not words:
        every = matrix(MODELS[model_name], Path())
        names |= dict.fromkeys(name for name in every if not name.endswith(("quarter", "fourfold")))
    return list(names)


# ---------------------------------------------------------------------------------------------------------------------
# Settings and commands

@dataclass
class ExperimentsConfig:
    model: Literal["toy", "smollm2"] = "toy"   # the shipped donor, on one core; SmolLM2-135M, on a GPU
    only: str = ""                             # conclusions or extra runs, separated by commas; empty: all
    seeds: int | None = None                   # how many; not set: 3, of smollm2 1
    donor: str | None = None                   # another full-size model than --model's: a folder or an id
    data: str | None = None                    # other text to train on
    valid: str | None = None                   # other text to measure on
    more: str = ""                             # flags for every train.py, as --more="--tokens=4096 --device=cpu"
    out: str = "out_experiments"               # folder of the checkpoints
    save: str = "results/experiments.jsonl"    # file to append the lines to
    dry: bool = False                          # only print the commands


def shared_flags(config: ExperimentsConfig) -> list[str]:
    """The flags of train.py that all runs share, without --more."""
    model = MODELS[config.model]
    return [f"--donor={config.donor or model.donor}", f"--data={config.data or model.data}",
            f"--valid={config.valid or model.valid}", f"--tokens={model.tokens}", *shlex.split(model.flags)]


def commands(config: ExperimentsConfig) -> list[tuple[str, int, list[str]]]:
    """(name, seed, flags of train.py) of every selected run, in order: all runs of a conclusion by seed, then
    the extra runs by seed, then the long ones."""
    model, work, base = MODELS[config.model], Path(config.out) / config.model, shared_flags(config)
    flags = matrix(model, work)
    needed = {run for c in conclusions(*model.ranks) for run in c.runs}
    stage = {name: 0 if name in needed else 2 if name.endswith("fourfold") else 1 for name in flags}
    names = select_runs(config.model, config.only)
    seeds = range(model.seeds if config.seeds is None else config.seeds)
    return [(name, seed, [*base, *flags[name].split(), f"--seed={seed}", *shlex.split(config.more)])
            for now in range(3) for seed in seeds for name in names if stage[name] == now]


# ---------------------------------------------------------------------------------------------------------------------
# Starts and baselines that train.py does not make

def prepare_starts(donor: str, work: Path) -> None:
    """Write the starts of two runs: the configuration of the half-size model, and a tied model whose norm
    weights are zero."""
    folder = find_donor(donor)
    if not (work / "half" / "config.json").exists():         # which is written last
        config = read_json(folder / "config.json")
        config["num_hidden_layers"] //= 2
        (work / "half").mkdir(parents=True, exist_ok=True)
        copy_tokenizer(folder, work / "half")
        (work / "half" / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    if not (work / "zeroed" / "config.json").exists():
        model = to_recursive(load_full(donor, torch.float32), 2, "average")
        for name, p in model.layers.named_parameters():
            if "norm" in name:
                p.data.zero_()                 # as stored: Gemma's scale becomes 1, Llama's 0
        with replace_folder(work / "zeroed") as tmp:
            copy_tokenizer(folder, tmp)
            model.write(tmp)


def measure_donor(flags: list[str]) -> dict:
    """The donor's loss on the shorter text on which runs with these flags are evaluated during training."""
    args = parse_args(TrainConfig, flags)
    procs, model = start_processes(args.device), load_full(args.donor, torch.float32)
    bf16, autocast = precision(args, procs.device)
    text = load_tokens(args.valid, Tokenizer.load(find_donor(args.donor), model.config.vocab_size),
                       model.config.vocab_size)
    pairs = validation(text, args.seq_len, args.eval_tokens, args.micro_batch)
    model.to(procs.device, torch.bfloat16 if bf16 else None)
    return {"settings": asdict(args), "valid_tokens": count_targets(pairs),
            "loss": evaluate(model, pairs, procs, autocast)[-1]}


# ---------------------------------------------------------------------------------------------------------------------
# Lines of results

def read_result(config: ExperimentsConfig, name: str, seed: int, flags: list[str], out: Path) -> dict | None:
    """The line of a finished run, from the log in `out`; None if it has not finished."""
    log = read_lines(out / "log.jsonl")
    if not log or not log[-1].get("final"):
        return None
    settings = parse_args(TrainConfig, flags)
    with torch.device("meta"):
        params = RecursiveTransformer(read_config(out)).num_params()
    evals = [line for line in log if "val_loss" in line]
    curve = [[line["step"] * settings.batch_tokens, line["val_loss"]] for line in evals]
    return {"what": "experiment", "model": config.model, "name": name, "seed": seed, "command": shlex.join(flags),
            "settings": asdict(settings)} | run_info() | {
            "params": params, "valid_tokens": log[-1].get("val_tokens"), "donor_loss": log[0]["donor_loss"],
            "start_loss": log[0]["full_val_loss"], "loss": log[-1]["full_val_loss"], "seconds": log[-1]["seconds"],
            "curve": curve, "curve_tokens": evals[-1].get("val_tokens") if evals else None,
            "exit_loss": evals[-1]["exit_val_loss"] if evals else None}


class ExitRun(NamedTuple):
    """A model that experiments/exits_seeds.sh or smollm2.sh made."""
    kind: str                                  # tied or relaxed
    seed: int
    training: str                              # of its exits: none, weighted, self; up: only uptrained


def exit_run(line: dict, model: str = "toy") -> ExitRun | None:
    """Which of these models the line measured; None if another. Lines name it by its folder, --ckpt."""
    found = re.fullmatch(rf"out-[^-]+-(tied|relaxed)-(\d+)-(\w+)-{model}", line.get("settings", {}).get("ckpt", ""))
    return found and ExitRun(found[1], int(found[2]), found[3])


@cache
def default_settings(model: str, name: str) -> dict:
    """The settings of train.py of a run of the matrix without --more, --donor, --data and --valid."""
    config = ExperimentsConfig(model=model)
    own = matrix(MODELS[model], Path(config.out) / model).get(name, "")
    return asdict(parse_args(TrainConfig, [*shared_flags(config), *own.split()]))


def changed_settings(line: dict) -> tuple:
    """((setting, value), ...) in which the run of a line differs from its defaults in the matrix. Settings
    that change no figure, such as folders, are left out."""
    ignored = {"seed", "out", "resume", "device", "save_every", "log_every", "checkpointing", "zero"}
    default = default_settings(line["model"], line["name"])
    settings = line.get("settings") or asdict(parse_args(TrainConfig, shlex.split(line.get("command", ""))))
    return tuple((key, settings[key]) for key, value in default.items()
                 if key not in ignored and settings.get(key, value) != value
                 and not str(value).startswith(ExperimentsConfig.out))


# ---------------------------------------------------------------------------------------------------------------------
# Running

def finish(command: list[str]) -> int:
    """Run the command; its exit code. On Ctrl-C this waits, because the command saves before it exits."""
    with subprocess.Popen(command) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise


def run_training(config: ExperimentsConfig, todo: list[tuple[str, int, list[str]]]) -> None:
    """Train each of these runs and append its line; with --dry print the commands only."""
    for i, (name, seed, flags) in enumerate(todo):
        out = Path(config.out) / config.model / f"{name}-s{seed}"
        command = ["train.py", *flags, f"--out={out}", "--resume=auto"]
        print0(f"+ python {shlex.join(command)}" + f"   # {i + 1} of {len(todo)}" * (not config.dry))
        if config.dry:
            continue
        code = finish([sys.executable, *command])
        line = read_result(config, name, seed, flags, out)
        if code or not line:
            raise UserError(f"{name}, seed {seed}, did not finish (exit code {code}); the same command resumes it")
        append_line(config.save, line)
        print0(json_line({key: line[key] for key in ("name", "seed", "donor_loss", "start_loss", "loss")}))


def run_exits(config: ExperimentsConfig) -> None:
    """Run the shell file of the experiments about exits if they are selected and not finished."""
    selected = not config.only or {"exits", "relaxed_exits"} & set(config.only.split(","))
    done = [line for line in read_lines("results/exits_seeds.jsonl") if exit_run(line)]
    if config.model != "toy" or not selected or len(done) >= N_EXIT_LINES:
        return
    print0(f"+ {EXITS}")
    if not config.dry and finish(EXITS.split()):
        raise UserError(f"{EXITS} did not finish; the same command resumes it")


def main(argv=None) -> None:
    config = parse_args(ExperimentsConfig, argv)
    if config.seeds is not None and config.seeds < 1:
        raise UserError(f"--seeds={config.seeds} must be at least 1")
    if not config.dry:
        check_writable("save", config.save)
    runs, base = commands(config), [*shared_flags(config), *shlex.split(config.more)]
    done = {(line.get("name"), line.get("seed"), line.get("command")) for line in read_lines(config.save)}
    todo = [(name, seed, flags) for name, seed, flags in runs if (name, seed, shlex.join(flags)) not in done]
    print0(f"{len(runs)} runs, {len(runs) - len(todo)} of them measured")
    if todo and not config.dry:
        if any(name in ("scratch", "norms-zero") for name, _, _ in todo):
            prepare_starts(config.donor or MODELS[config.model].donor, Path(config.out) / config.model)
        if ("donor", 0, shlex.join(base)) not in done:
            append_line(config.save, {"what": "experiment", "model": config.model, "name": "donor", "seed": 0,
                                      "command": shlex.join(base)} | run_info() | measure_donor(base))
    run_training(config, todo)
    run_exits(config)


if __name__ == "__main__":
    script(main)
