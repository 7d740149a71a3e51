"""Trains and measures every arm: one line of results/matrix.jsonl for each run.

    python -m experiments.matrix                        # all on the shipped donor: ten hours of one core
    python -m experiments.matrix --jobs=2 --only=norms  # two runs at a time, each on one core; arms by name
    python -m experiments.matrix --dry                  # only print what is to be run next
    python -m experiments.report                        # the verdicts from the lines so far

The learning rate of each arm comes first: short runs with a seed that is not used again, along a grid until the best
rate has a worse one on both sides, on the text of --valid. Then each seed runs all arms, so that a matrix stopped early
still compares all of them. Every finished model is scored once on books that nothing was chosen on. Runs that have a
line are skipped, interrupted ones resumed. Checkpoints that no other run starts from are deleted.
"""

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, get_args

import torch

from calibrate import calibration_windows, set_norm_scale
from convert import load_full, to_recursive
from experiments.arms import RANKS_PER_LAYER, STUDIES, Arm, Study
from experiments.low_rank import RankPerLayer, Way
from experiments.low_rank import main as make_start
from lib.cli import UserError, parse_args, print0, script
from lib.data import load_tokens, validation
from lib.donors import find_donor, read_json
from lib.folders import replace_folder
from lib.results import append_line, check_writable, read_lines
from lib.system import pick_device, run_info, start_processes
from lib.tokenizer import Tokenizer, copy_tokenizer
from model import RecursiveTransformer
from train import TrainConfig, build, donor_config, evaluate


class Run(NamedTuple):
    """A model to train and measure."""
    stage: str                             # see STAGES
    arm: str
    seed: int
    lr: float                              # 0: not trained

    def folder(self, work: Path) -> Path:
        return work / f"{self.stage}-{self.arm}-s{self.seed}-lr{self.lr:g}"


STAGES = {"start": "right after conversion, not trained", "rate": "short, to choose the learning rate",
          "main": "what is compared", "check": "as long as main, with the neighbours of the chosen rate",
          "exit_rate": "as rate, for the exits", "exits": "post-training of a model of `main`"}
Lines = dict[Run, dict]


def read_runs(path, study: str) -> Lines:
    """The lines of results/matrix.jsonl for this study."""
    return {Run(line["stage"], line["arm"], line["seed"], line["lr"]): line
            for line in read_lines(path) if line.get("study") == study}


# ---------------------------------------------------------------------------------------------------------------------
# What to run next

def rate_stage(arm: Arm) -> str:
    return "exit_rate" if arm.base else "rate"


def tried_rates(arm: Arm, lines: Lines) -> dict[float, float]:
    """{learning rate: final validation loss} of the short runs of this arm; infinite if it diverged."""
    return {run.lr: math.inf if line["valid"]["final"] is None else line["valid"]["final"]
            for run, line in lines.items() if (run.stage, run.arm) == (rate_stage(arm), arm.name)}


def missing_rates(study: Study, arm: Arm, lines: Lines) -> list[float]:
    """The rates to try next: the first ones, then neighbours of the best, until it is no edge of what was tried."""
    tried = tried_rates(arm, lines)
    if missing := [lr for lr in study.first if lr not in tried]:
        return missing
    best = study.grid.index(min(tried, key=tried.__getitem__))
    return [lr for lr in study.grid[max(0, best - 1):best + 2] if lr not in tried]


def chosen_rate(study: Study, arm: Arm, lines: Lines) -> float | None:
    """The learning rate of this arm; None while it is open."""
    arm = study.arm(arm.rate_of) if arm.rate_of else arm
    if missing_rates(study, arm, lines):
        return None
    tried = tried_rates(arm, lines)
    return min(tried, key=tried.__getitem__)


def next_runs(study: Study, lines: Lines) -> list[Run]:
    """The runs that lack a line and need no other run first, the most important first."""
    rates = {arm.name: chosen_rate(study, arm, lines) for arm in study.arms}
    arms, exits = ([arm for arm in study.arms if bool(arm.base) == based] for based in (False, True))
    runs = [Run("start", name, 0, 0.0) for name in ("donor", *(arm.name for arm in arms))]
    runs += [Run("rate", arm.name, study.rate_seed, lr) for arm in arms if not arm.rate_of
             for lr in missing_rates(study, arm, lines)]
    runs += [Run("exit_rate", arm.name, study.rate_seed, lr) for arm in exits if rates[arm.base]
             for lr in missing_rates(study, arm, lines)]
    for seed in study.seeds:
        runs += [Run("main", arm.name, seed, rates[arm.name]) for arm in arms if rates[arm.name]]
        runs += [Run("exits", arm.name, seed, rates[arm.name]) for arm in exits if rates[arm.name] and rates[arm.base]
                 and Run("main", arm.base, seed, rates[arm.base]) in lines]
        if seed == study.seeds[0]:
            runs += [Run("check", name, study.rate_seed, lr) for name in study.checked if rates[name]
                     for lr in neighbours(study, rates[name])]
    return [run for run in runs if run not in lines]


def neighbours(study: Study, lr: float) -> tuple[float, ...]:
    i = study.grid.index(lr)
    return study.grid[max(0, i - 1):i + 2]


# ---------------------------------------------------------------------------------------------------------------------
# One run

def flags(study: Study, run: Run, lines: Lines, work: Path) -> list[str]:
    """The settings of train.py."""
    arm, tokens, skip = study.arm(run.arm), study.tokens, 0
    if run.stage == "rate":
        tokens = study.rate_tokens
    elif run.stage in ("exit_rate", "exits"):
        tokens, skip = (study.exit_rate_tokens, study.rate_tokens) if run.stage == "exit_rate" else (
            study.exit_tokens, study.tokens)
    given = shlex.split(arm.flags.format(work=work))
    if not any(flag.startswith("--donor=") for flag in given):
        given.append(f"--donor={study.donor}")
    given += [f"--data={study.data}", f"--valid={study.valid}", *shlex.split(study.flags),
              f"--seq_len={study.seq_len}", f"--batch_tokens={study.batch_tokens}", f"--tokens={tokens}",
              f"--warmup={max(1, tokens // study.batch_tokens // 12)}", f"--lr={run.lr:g}", f"--seed={run.seed}",
              "--dtype=bfloat16", "--skip_nonfinite"]
    if arm.base:
        stage = "rate" if run.stage == "exit_rate" else "main"
        base = Run(stage, arm.base, run.seed, chosen_rate(study, study.arm(arm.base), lines))
        given += [f"--ckpt={base.folder(work)}", f"--skip_tokens={skip}"]
    return given


def is_kept(study: Study, run: Run) -> bool:
    """Whether exits are trained from its checkpoint."""
    return run.stage in ("rate", "main") and run.arm in {arm.base for arm in study.arms}


@cache
def books(study: Study, donor: str) -> dict[str, list]:
    """Book -> batches of (inputs, targets): windows side by side from its start."""
    folder = find_donor(donor)
    vocab_size = donor_config(folder).vocab_size
    tokenizer = Tokenizer.load(folder, vocab_size)
    return {path.stem: validation(load_tokens(str(path), tokenizer, vocab_size), study.seq_len,
                                  study.windows * study.seq_len) for path in sorted(Path(study.test).glob("*.txt"))}


def score(study: Study, model: RecursiveTransformer) -> dict[str, list[float]]:
    """Book -> cross entropy in nats after each loop, in fp32."""
    procs = start_processes("auto")
    model = model.to(procs.device)
    return {name: evaluate(model, pairs, procs, nullcontext(), range(model.config.n_loop))
            for name, pairs in books(study, study.donor).items()}


def start_model(study: Study, run: Run, work: Path) -> RecursiveTransformer:
    """The model of a run of the stage `start`."""
    if run.arm == "donor":
        return load_full(study.donor, torch.float32)
    arm = study.arm(run.arm)
    if arm.family in RANKS_PER_LAYER:
        return RankPerLayer.load(work / arm.name, dtype=torch.float32)
    args = parse_args(TrainConfig, flags(study, run, {}, work))
    folder, windows = find_donor(args.donor), None
    config = donor_config(folder)
    torch.manual_seed(run.seed)
    if args.init == "calibrated":
        tokens = load_tokens(args.data, Tokenizer.load(folder, config.vocab_size), config.vocab_size)
        windows = calibration_windows(tokens, args.calib_tokens, config, args.data)
    return build(args, folder, config, pick_device(), False, windows)[0]


def finish(command: list[str], output) -> int:
    """Run the command; its exit code. On Ctrl-C this waits, because the command saves before it exits."""
    with subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise


def train(study: Study, run: Run, given: list[str], work: Path) -> dict:
    """Train, and return what its log says of the validation text, tokens and seconds."""
    out = run.folder(work)
    work.mkdir(parents=True, exist_ok=True)
    module = ["-m", "experiments.low_rank", "--train"] if study.arm(run.arm).family in RANKS_PER_LAYER else ["train.py"]
    with open(f"{out}.txt", "a") as output:
        code = finish([sys.executable, *module, *given, f"--out={out}", "--resume=auto"], output)
    log = read_lines(out / "log.jsonl")
    if code or not log or not log[-1].get("final"):
        raise UserError(f"{out.name} did not finish (exit code {code}, {out}.txt): the same command resumes it")
    first, last = log[0], log[-1]
    return {"valid": {"donor": first["donor_loss"], "start": first["full_val_loss"], "final": last["full_val_loss"],
                      "tokens": last["val_tokens"]},
            "curve": [[line["step"] * study.batch_tokens, line["val_loss"]] for line in log if "val_loss" in line],
            "tokens": last["tokens"], "seconds": last["seconds"]}


def execute(name: str, study: Study, run: Run, lines: Lines, work: Path) -> dict:
    """The line of a run."""
    torch.set_num_threads(1)
    line = {"what": "matrix", "study": name} | run._asdict() | run_info()
    given = [] if run.arm == "donor" else flags(study, run, lines, work)
    if run.stage == "start":
        model = start_model(study, run, work)
    else:
        line |= {"command": shlex.join(given)} | train(study, run, given, work)
        kind = RankPerLayer if study.arm(run.arm).family in RANKS_PER_LAYER else RecursiveTransformer
        model = kind.load(run.folder(work), dtype=torch.float32)
    line |= {"params": model.num_params()}
    if run.stage in ("start", "main", "exits"):
        line |= {"books": {name: [round(loss, 6) for loss in exits] for name, exits in score(study, model).items()}}
    return line


# ---------------------------------------------------------------------------------------------------------------------
# All runs

def prepare_starts(study: Study, work: Path) -> None:
    """Write the starts that train.py does not make: the half-size model's configuration, tied models whose norm gains
    are 0 or 1, and those of low_rank.py."""
    folder, names = find_donor(study.donor), {arm.name for arm in study.arms}
    def missing(start: str) -> bool:
        return any(f"{{work}}/{start} " in arm.flags + " " for arm in study.arms) and not (
            work / start / "config.json").exists()
    if missing("half"):
        config = read_json(folder / "config.json")
        config["num_hidden_layers"] //= 2
        with replace_folder(work / "half") as tmp:
            copy_tokenizer(folder, tmp)
            (tmp / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    for gain in (0, 1):
        if missing(f"gain-{gain}"):
            model = to_recursive(load_full(study.donor, torch.float32), 2, "average")
            with torch.no_grad():
                for layer in model.layers:
                    for norm in (layer.norm1, layer.norm2):
                        set_norm_scale(norm, float(gain))
            with replace_folder(work / f"gain-{gain}") as tmp:
                copy_tokenizer(folder, tmp)
                model.write(tmp)
    for name, way in ((name, way) for name in sorted(names) for way in get_args(Way)):
        if name.startswith(f"{way.replace('_', '-')}-") and missing(name):
            make_start([f"--donor={study.donor}", f"--way={way}", f"--size_of={name.rpartition('-')[2]}",
                        f"--calib_text={study.data}", f"--out={work / name}"])


@dataclass
class MatrixConfig:
    study: str = "toy"                         # toy: the shipped donor; smollm2: SmolLM2-135M
    only: str = ""                             # arms, separated by commas; empty: all
    jobs: int = 1                              # runs at a time, each on one thread
    seeds: int | None = None                   # how many; not set: all of the study's
    donor: str | None = None                   # another full-size model than the study's: a folder or an id
    data: str | None = None                    # other text to train on
    valid: str | None = None                   # other text to choose learning rates on
    tokens: int | None = None                  # of each run of the main stage; the others in proportion
    out: str = "out_experiments"               # folder of the checkpoints
    save: str = "results/matrix.jsonl"         # file to append the lines to
    dry: bool = False                          # only print what is to be run next


def chosen_study(config: MatrixConfig) -> Study:
    """The study with the changes that the settings ask for."""
    if config.study not in STUDIES:
        raise UserError(f"--study={config.study} is unknown; use {', '.join(STUDIES)}")
    for name in ("jobs", "seeds", "tokens"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise UserError(f"--{name}={getattr(config, name)} must be at least 1")
    study = STUDIES[config.study]
    changes = {name: getattr(config, name) for name in ("donor", "data", "valid") if getattr(config, name)}
    if config.seeds:
        changes["seeds"] = tuple(range(config.seeds))
    if config.tokens:
        for name in ("tokens", "exit_tokens", "rate_tokens", "exit_rate_tokens"):
            share = getattr(study, name) / study.tokens * config.tokens
            changes[name] = math.ceil(share / study.batch_tokens) * study.batch_tokens
    if config.only:
        wanted = config.only.split(",")
        for name in wanted:
            if name not in {arm.name for arm in study.arms}:
                raise UserError(f"--only={config.only}: {name!r} is unknown; use "
                                f"{', '.join(arm.name for arm in study.arms)}, several separated by commas")
        wanted += [other for name in wanted for other in (study.arm(name).base, study.arm(name).rate_of)]
        changes |= {"arms": tuple(arm for arm in study.arms if arm.name in wanted),
                    "checked": tuple(name for name in study.checked if name in wanted)}
    return replace(study, **changes)


def main(argv=None) -> None:
    config = parse_args(MatrixConfig, argv)
    study, work = chosen_study(config), Path(config.out) / config.study
    lines = read_runs(config.save, config.study)
    print0(f"{len(lines)} runs are measured; {len(next_runs(study, lines))} can run now")
    if config.dry:
        for run in next_runs(study, lines):
            print0(" ".join(map(str, run)), shlex.join(flags(study, run, lines, work)) if run.arm != "donor" else "")
        return
    check_writable("save", config.save)
    prepare_starts(study, work)
    with ProcessPoolExecutor(config.jobs, mp_context=get_context("spawn")) as pool:
        running = {}
        while True:
            free = (run for run in next_runs(study, lines) if run not in running.values())
            while len(running) < config.jobs and (run := next(free, None)):
                running[pool.submit(execute, config.study, study, run, lines, work)] = run
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                lines[run] = future.result()
                append_line(config.save, lines[run])
                print0(summary(run, lines[run]))
                if not is_kept(study, run):
                    shutil.rmtree(run.folder(work), ignore_errors=True)


def summary(run: Run, line: dict) -> str:
    """What a finished run measured, in a few words."""
    words = f"{run.stage} {run.arm}, seed {run.seed}, lr {run.lr:g}:"
    if valid := line.get("valid"):
        words += f" valid {valid['start']:.4f} -> {valid['final'] or math.inf:.4f}"
    if scores := line.get("books"):
        words += " books " + " / ".join(f"{sum(loss) / len(loss):.4f}" for loss in zip(*scores.values(), strict=True))
    return words


if __name__ == "__main__":
    script(main)
