"""The paper's conclusions, tried one by one: trains what is missing, a line of results/experiments.jsonl for each run.

    python experiments.py                    # all, on the shipped donor: an hour and a half of one core
    python experiments.py --only=norms       # one conclusion: inits, relaxed, rank, distill, pretrained, exits,
                                             # relaxed_exits, norms; or the runs beside them: loops, zero, tokens
    python experiments.py --dry              # only say what would be run
    python report.py                         # the table of what is there, at any time; and the plots

A run is one train.py. What has its line already is skipped, what was cut off goes on where it was. The first seed of
every run comes first, then the second: whenever it is stopped, the table is as complete as it can be.
"""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from convert import load_full, to_recursive
from lib.cli import UserError, parse_args, print0, script
from lib.data import load_tokens, validation
from lib.donors import find_donor, read_json
from lib.folders import replace_folder
from lib.results import append_line, check_writable, json_line, read_lines
from lib.system import run_info, start_processes
from lib.tokenizer import Tokenizer, copy_tokenizer
from model import RecursiveTransformer, read_config
from train import TrainConfig, count_targets, evaluate, precision

EXITS = "bash runs/exits_seeds.sh"             # trains and measures what the two conclusions about exits ask for


@dataclass
class Model:
    """What differs between the donors. ranks: LoRA's, ascending; for the shipped donor the shares of the width that 64,
    256 and 512 are of Gemma's."""
    donor: str
    data: str
    valid: str
    tokens: int
    ranks: tuple[int, int, int]
    seeds: int
    flags: str                                 # for every run
    uptraining: str                            # for those that say what a calibrated start saves, beside the others


MODELS = {
    "toy": Model("assets/donor", "assets/books/train", "assets/books/valid.txt", 32_768, (6, 24, 48), 3,
                 "--batch_tokens=512 --micro_batch=2 --warmup=5 --eval_every=16 --eval_tokens=4096 --save_every=32",
                 "--tokens=307_200 --batch_tokens=2048 --micro_batch=8 --warmup=20 --lr=3e-4 --eval_every=5 "
                 "--save_every=50"),
    "smollm2": Model("HuggingFaceTB/SmolLM2-135M", "out_books", "out_books/valid", 20_971_520, (16, 64, 256), 1,
                     "--seq_len=1024 --batch_tokens=65_536 --micro_batch=16 --lr=5e-4 --warmup=20 --eval_every=40 "
                     "--eval_tokens=65_536 --save_every=80 --compile", "--eval_every=10"),
}


@dataclass
class Conclusion:
    name: str                                  # for --only
    says: str
    metric: str                                # of the paper's figures
    rows: dict[str, tuple[str, str]]           # run (of exits: and loop) -> what it is, the paper's figure
    claims: list[str]                          # "a < b", "a ~ b" of the runs' losses, all of which it takes


def conclusions(low: int, mid: int, top: int) -> list[Conclusion]:
    """The paper's eight, in order of importance, for these LoRA ranks; its figures are Gemma 2B's with 2 loops."""
    svd, zero = [f"average-r{r}" for r in (low, mid, top)], f"average-r{top}-zero"
    return [
        Conclusion("inits", "stepwise > average, lower > random", "perplexity", {
            "stepwise": ("stepwise", "12.85"), "average": ("average", "15.15"), "lower": ("lower", "15.03"),
            "random": ("random", "22.66")},
            ["stepwise < average", "stepwise < lower", "average < random", "lower < random"]),
        Conclusion("relaxed", "average + SVD is the best start", "accuracy", {
            svd[2]: (f"average + SVD, r {top}", "55.5"), zero: (f"average, zero, r {top}", "49.0"),
            f"stepwise-r{top}": (f"stepwise + SVD, r {top}", "50.5")},
            [f"{svd[2]} < {zero}", f"{svd[2]} < stepwise-r{top}"]),
        Conclusion("rank", "higher is better", "accuracy", {
            svd[0]: (f"average + SVD, r {low}", "52.1"), svd[1]: (f"r {mid}", "54.2"), svd[2]: (f"r {top}", "55.5")},
            [f"{svd[1]} < {svd[0]}", f"{svd[2]} < {svd[1]}"]),
        Conclusion("distill", "distillation helps", "accuracy", {
            "stepwise": ("tied, stepwise", "51.7"), "stepwise-fkl": ("with forward KL", "53.4")},
            ["stepwise-fkl < stepwise"]),
        Conclusion("pretrained", "pretrained weights ≫ random ones", "perplexity", {
            "stepwise": ("tied, stepwise", "12.85"), "scratch": ("as large, from scratch", "22.63"),
            "full": ("full size, same tokens", "")},
            ["stepwise < scratch"]),
        Conclusion("exits", "the last loop kept, the first lifted", "accuracy", {
            "tied-none 2": ("last loop: no exit losses", "51.7 (before)"),
            "tied-weighted 2": ("weighted", "50.5"), "tied-self 2": ("aggressive 0.1, self-distilled", "52.6"),
            "tied-none 1": ("first loop: no exit losses", ""),
            "tied-weighted 1": ("weighted", "49.8"), "tied-self 1": ("aggressive 0.1, self-distilled", "48.0")},
            ["tied-self 2 ~ tied-none 2", "tied-self 1 < tied-none 1"]),
        Conclusion("relaxed_exits", "relaxation hurts the first", "accuracy", {
            "tied-self 1": ("first loop: tied", "48.8"), "relaxed-self 1": ("relaxed, r 32 (r 64)", "40.8"),
            "tied-self 2": ("last loop: tied", "54.0"), "relaxed-self 2": ("relaxed, r 32 (r 64)", "54.0")},
            ["tied-self 1 < relaxed-self 1"]),
        Conclusion("norms", "zero is disastrous, averaged ≈ picked", "", {
            "average": ("average, norms averaged", ""), "norms-pick": ("the first loop's", ""),
            "norms-zero": ("zero", "")},
            ["average < norms-zero", "norms-pick < norms-zero", "average ~ norms-pick"]),
    ]


def beside(low: int, mid: int, top: int) -> dict[str, list[str]]:
    """Runs that no conclusion needs, but a plot or the table of the gap: --only's name -> runs."""
    return {"zero": [f"average-r{low}-zero", f"average-r{mid}-zero"],
            "loops": ["stepwise-3x", "average-3x", f"average-r{top}-3x"],
            "calibrated": [f"{init}-r{mid}-{how}" for how in ("long", "exits") for init in ("average", "calibrated")],
            "tokens": [f"{run}-{size}" for size in ("quarter", "fourfold") for run in ("stepwise", f"average-r{top}")]}


def matrix(model: Model, work: Path) -> dict[str, str]:
    """Every run that there is: name -> flags of train.py. `work` holds what `prepare` makes."""
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
    for init in ("average", "calibrated"):                               # ours: calibrate.py
        start = f"--init={init} --rank={mid} --distill=fkl {model.uptraining}"
        runs |= {f"{init}-r{mid}-long": start, f"{init}-r{mid}-exits": f"{start} --exit_loss=aggressive"}
    for size, tokens in (("quarter", model.tokens // 4), ("fourfold", 4 * model.tokens)):
        for name in ("stepwise", f"average-r{top}"):
            runs[f"{name}-{size}"] = f"{runs[name]} --tokens={tokens}"
    return runs


def chosen(model_name: str, only: str) -> list[str]:
    """Names of the runs that --only asks for, the conclusions' before the others; of SmolLM2 all there are."""
    ranks = MODELS[model_name].ranks
    groups = {c.name: [run for run in c.rows if " " not in run] for c in conclusions(*ranks)} | beside(*ranks)
    for word in (words := only.split(",") if only else []):
        if word not in groups:
            raise UserError(f"--only={only}: {word!r} is unknown; use {', '.join(groups)}, several by comma")
    names = dict.fromkeys(run for group in words or groups for run in groups[group])
    if model_name != "toy" and not words:
        names |= dict.fromkeys(n for n in matrix(MODELS[model_name], Path()) if not n.endswith(("quarter", "fourfold")))
    return list(names)


def prepare(donor: str, work: Path) -> None:
    """What two of the runs start from: the shape of the half-size model, and a tied one whose norm weights are zero."""
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


def measure_donor(words: list[str]) -> dict:
    """The donor's loss on the text that a run with these flags is measured on underway: what its curve is held
    against."""
    args = parse_args(TrainConfig, words)
    procs, model = start_processes(args.device), load_full(args.donor, torch.float32)
    bf16, autocast = precision(args, procs.device)
    text = load_tokens(args.valid, Tokenizer.load(find_donor(args.donor), model.config.vocab_size),
                       model.config.vocab_size)
    pairs = validation(text, args.seq_len, args.eval_tokens, args.micro_batch)
    model.to(procs.device, torch.bfloat16 if bf16 else None)
    return {"settings": asdict(args), "valid_tokens": count_targets(pairs),
            "loss": evaluate(model, pairs, procs, autocast)[-1]}


# ---------------------------------------------------------------------------------------------------------------------

def result(config: "ExperimentsConfig", name: str, seed: int, words: list[str], out: Path) -> dict | None:
    """What the finished run in `out` came to, from its log; None where it has not finished."""
    log = read_lines(out / "log.jsonl")
    if not log or not log[-1].get("final"):
        return None
    settings = parse_args(TrainConfig, words)
    with torch.device("meta"):
        params = RecursiveTransformer(read_config(out)).num_params()
    underway = [line for line in log if "val_loss" in line]
    curve = [[line["step"] * settings.batch_tokens, line["val_loss"]] for line in underway]
    return {"what": "experiment", "model": config.model, "name": name, "seed": seed, "command": shlex.join(words),
            "settings": asdict(settings)} | run_info() | {
            "params": params, "valid_tokens": log[-1].get("val_tokens"), "donor_loss": log[0]["donor_loss"],
            "start_loss": log[0]["full_val_loss"], "loss": log[-1]["full_val_loss"], "seconds": log[-1]["seconds"],
            "curve": curve, "curve_tokens": underway[-1].get("val_tokens") if underway else None,
            "exit_loss": underway[-1]["exit_val_loss"] if underway else None}


def exit_run(line: dict, model: str = "toy") -> tuple[str, int] | None:
    """("tied-self", seed) of a line that runs/exits_seeds.sh or runs/smollm2.sh measured, None of any other."""
    found = re.fullmatch(rf"out-[^-]+-(tied|relaxed)-(\d+)-(\w+)-{model}", line.get("settings", {}).get("ckpt", ""))
    return found and (f"{found[1]}-{found[3]}", int(found[2]))


@dataclass
class ExperimentsConfig:
    model: Literal["toy", "smollm2"] = "toy"   # the shipped donor, on one core; SmolLM2-135M, on a GPU
    only: str = ""                             # conclusions (or loops, zero, tokens, calibrated) by comma; empty: all
    seeds: int | None = None                   # how many; not set: 3, of smollm2 1
    donor: str | None = None                   # another full-size model than --model's: a folder or an id
    data: str | None = None                    # other text to train on
    valid: str | None = None                   # other text to measure on
    more: str = ""                             # flags for every train.py, as --more="--tokens=4096 --device=cpu"
    out: str = "out_experiments"               # folder of the checkpoints
    save: str = "results/experiments.jsonl"    # where the lines go
    dry: bool = False                          # only print the commands


def shared_flags(config: ExperimentsConfig) -> list[str]:
    """train.py's flags that all runs have, without --more."""
    model = MODELS[config.model]
    return [f"--donor={config.donor or model.donor}", f"--data={config.data or model.data}",
            f"--valid={config.valid or model.valid}", f"--tokens={model.tokens}", *shlex.split(model.flags)]


def commands(config: ExperimentsConfig) -> list[tuple[str, int, list[str]]]:
    """(name, seed, flags of train.py) of every run asked for, in order: seed by seed."""
    model, work, base = MODELS[config.model], Path(config.out) / config.model, shared_flags(config)
    flags = matrix(model, work)
    core = {run for c in conclusions(*model.ranks) for run in c.rows}
    stage = {name: 0 if name in core else 2 if name.endswith("fourfold") else 1 for name in flags}
    names, seeds = chosen(config.model, config.only), range(model.seeds if config.seeds is None else config.seeds)
    return [(name, seed, [*base, *flags[name].split(), f"--seed={seed}", *shlex.split(config.more)])
            for now in range(3) for seed in seeds for name in names if stage[name] == now]


@cache
def default_settings(model: str, name: str) -> dict:
    """train.py's settings of a run of the matrix, as they are without --more, --donor, --data and --valid."""
    config = ExperimentsConfig(model=model)
    own = matrix(MODELS[model], Path(config.out) / model).get(name, "")
    return asdict(parse_args(TrainConfig, [*shared_flags(config), *own.split()]))


def other_settings(line: dict) -> tuple:
    """((setting, value), ...): in what a line's run differs from that run's default settings, and so from the lines
    that it may be set beside. What changes no figure, as the folders do not, is left aside."""
    same = {"seed", "out", "resume", "device", "save_every", "log_every", "checkpointing", "zero"}
    want = default_settings(line["model"], line["name"])
    have = line.get("settings") or asdict(parse_args(TrainConfig, shlex.split(line.get("command", ""))))
    return tuple((key, have[key]) for key in want if key not in same and have.get(key, want[key]) != want[key]
                 and not str(want[key]).startswith(ExperimentsConfig.out))


def finish(command: list[str]) -> int:
    """The command's exit code. Ctrl-C is the command's to heed, which saves first: this waits for it."""
    with subprocess.Popen(command) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise


def main(argv=None) -> None:
    config = parse_args(ExperimentsConfig, argv)
    if config.seeds is not None and config.seeds < 1:
        raise UserError(f"--seeds={config.seeds} must be at least 1")
    if not config.dry:
        check_writable("save", config.save)
    work, model = Path(config.out) / config.model, MODELS[config.model]
    asked = set(config.only.split(","))
    runs, base = commands(config), [*shared_flags(config), *shlex.split(config.more)]
    done = {(line.get("name"), line.get("seed"), line.get("command")) for line in read_lines(config.save)}
    todo = [(name, seed, words) for name, seed, words in runs if (name, seed, shlex.join(words)) not in done]
    print0(f"{len(runs)} runs, {len(runs) - len(todo)} of them measured")
    if not config.dry and any(name in ("scratch", "norms-zero") for name, _, _ in todo):
        prepare(config.donor or model.donor, work)
    if todo and not config.dry and ("donor", 0, shlex.join(base)) not in done:
        append_line(config.save, {"what": "experiment", "model": config.model, "name": "donor", "seed": 0,
                                  "command": shlex.join(base)} | run_info() | measure_donor(base))
    for i, (name, seed, words) in enumerate(todo):
        out = work / f"{name}-s{seed}"
        command = ["train.py", *words, f"--out={out}", "--resume=auto"]
        print0(f"+ python {shlex.join(command)}" + f"   # {i + 1} of {len(todo)}" * (not config.dry))
        if config.dry:
            continue
        code = finish([sys.executable, *command])
        line = result(config, name, seed, words, out)
        if code or not line:
            raise UserError(f"{name}, seed {seed}, did not finish (exit code {code}); started again, it goes on there")
        append_line(config.save, line)
        print0(json_line({key: line[key] for key in ("name", "seed", "donor_loss", "start_loss", "loss")}))
    exits = [line for line in read_lines("results/exits_seeds.jsonl") if exit_run(line)]
    if config.model == "toy" and (not config.only or asked & {"exits", "relaxed_exits"}) and len(exits) < 24:
        print0(f"+ {EXITS}")
        if not config.dry and finish(EXITS.split()):
            raise UserError(f"{EXITS} did not finish; started again, it goes on where it was")


if __name__ == "__main__":
    script(main)
