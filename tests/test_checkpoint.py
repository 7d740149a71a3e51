"""A run's state on the disk: neither kills nor full disks nor damaged files lose more than minutes, and a run may go
on with other processes than it began with."""

import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny import (
    assert_close_logs,
    assert_same_weights,
    contents,
    count_lines,
    files_end_at,
    flags,
    interrupt_at,
    join,
    read_log,
    run,
    start_two,
    wait_for_step,
    weights,
)
from torch.distributed.optim import ZeroRedundancyOptimizer

import train
from lib.checkpoint import check_whole, find_state, load_optimizer, load_state
from lib.cli import UserError
from lib.donors import DONOR_README, donor_files
from lib.folders import TOKENIZER_FILES, check_out, own_folder, replace_folder
from lib.log import drop_log_after
from lib.tokenizer import Tokenizer
from model import RecursiveTransformer, read_config

ROOT = Path(__file__).resolve().parent.parent
FILES = ("train.pt", "model.safetensors", "config.json", "tokenizer.tiktoken")
HOW = ["--rank=2", "--tokens=1280", "--save_every=2"]                  # 10 steps


@pytest.fixture(scope="module")
def straight(home, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "out"
    run(home, out, *HOW)
    return out


@pytest.fixture(scope="module")
def crashed(home, tmp_path_factory) -> Path:
    """The same run, crashed within step 8: its newest checkpoint is of step 6, the one before it of step 4."""
    out = tmp_path_factory.mktemp("crashed") / "out"
    with interrupt_at(7, lambda: 1 / 0), pytest.raises(ZeroDivisionError):
        run(home, out, *HOW)
    return out


@pytest.fixture
def out(crashed, tmp_path) -> Path:
    return shutil.copytree(crashed, tmp_path / "out")


def damage(path: Path, how: str, rng=random.Random(0)) -> None:  # noqa: B008 (one sequence for all calls)
    data = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
    elif how == "truncate":
        path.write_bytes(data[:rng.randrange(len(data))])
    else:
        data[{"first": 0, "middle": len(data) // 2}[how]] ^= 1 << rng.randrange(8)
        path.write_bytes(data)


def resume(out: Path, how: str = "yes", *more: str) -> None:
    train.main([f"--resume={how}", f"--out={out}", *more])


# ---------------------------------------------------------------------------------------------------------------------
# Damaged files

def test_what_is_written_is_whole(out):
    assert check_whole(out)["step"] == 6 and check_whole(out / "previous")["step"] == 4
    assert not (out / "previous" / "previous").exists()
    assert check_whole(out)["sums"].keys() == {p.name for p in out.iterdir()} - {"train.pt", "log.jsonl", "previous"}


@pytest.mark.parametrize("how", ["truncate", "first", "middle", "delete"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(out, straight, capsys, name, how):
    (out / "notes").mkdir()
    (out / "notes" / "mine.txt").write_text("poem")
    damage(out / name, how)
    before = contents(out)
    with pytest.raises(UserError, match=rf"out is damaged: {name}.*--resume=auto goes back to the checkpoint before"):
        resume(out)
    assert contents(out) == before
    if how in ("middle", "delete"):                                    # the rest follows, for files that are the same
        resume(out, "auto")
        assert read_log(out) == read_log(straight)
        assert_same_weights(straight, out)
    else:
        assert find_state(out, "auto")["step"] == 4
        previous = {name.removeprefix("previous/"): data for name, data in before.items() if "previous" in name}
        assert contents(out) == previous | {name: before[name] for name in ("log.jsonl", "notes/mine.txt")}
    assert f"out is damaged: {name}" in (said := capsys.readouterr().out) and "before it, of step 4\n" in said
    assert (out / "notes" / "mine.txt").read_text() == "poem"
    assert [p.name for p in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("names", [FILES[:2], ("config.json",) * 2, ("train.pt", "config.json")])
def test_if_both_are_damaged_that_is_said_and_nothing_touched(out, names):
    damage(out / names[0], "truncate")
    damage(out / "previous" / names[1], "truncate")
    before = contents(out)
    with pytest.raises(UserError, match=rf"out is damaged: {names[0]}.*the one before it too: .*previous is damaged: "
                                        rf"{names[1]}.*start anew with another --out"):
        resume(out, "auto")
    shutil.rmtree(out / "previous")
    with pytest.raises(UserError, match=rf"out is damaged: {names[0]}.*no checkpoint before it.*another --out"):
        resume(out, "auto")
    assert contents(out) == {name: data for name, data in before.items() if "previous" not in name}


def test_no_flipped_bit_of_the_state_goes_unnoticed(out):
    """Or it has no effect: not every byte of a zip file means something."""
    path, state = out / "train.pt", load_state(out)
    data, rng = path.read_bytes(), random.Random(1)
    with zipfile.ZipFile(path) as f:
        directory = f.start_dir
    noticed, places = 0, [*rng.sample(range(directory), 8), *rng.sample(range(directory, len(data)), 32)]
    for place in places:
        broken = bytearray(data)
        broken[place] ^= 1 << rng.randrange(8)
        path.unlink()                                                  # `state` is mapped from the old file
        path.write_bytes(broken)
        try:
            got = check_whole(out)
        except UserError as e:
            assert "train.pt" in str(e)
            noticed += 1
        else:
            assert str(got) == str(state), place
    assert noticed > len(places) / 2


def test_killed_while_going_back(out, tmp_path):
    damage(out / "model.safetensors", "middle")
    lines, copy = [], shutil.copytree(out, tmp_path / "copy")
    count_lines(find_state, lines.append)(copy, "auto")
    rng = random.Random(2)
    for kill_at in rng.sample(range(len(lines)), 12):
        if os.fork() == 0:
            try:
                count_lines(find_state, lambda line: line == kill_at and os.kill(os.getpid(), signal.SIGKILL))(  # noqa: B023
                    out, "auto")
            finally:
                os._exit(1)
        assert os.WTERMSIG(os.wait()[1]) == signal.SIGKILL
        again = shutil.copytree(tmp_path, tmp_path.with_name("again"))
        assert find_state(again / "out", "auto")["step"] == 4 and check_whole(again / "out")["step"] == 4
        shutil.rmtree(again)
        if (out / "train.pt").exists() and load_state(out)["step"] == 4:
            break
    assert find_state(out, "auto")["step"] == 4


# ---------------------------------------------------------------------------------------------------------------------
# What is there to resume

def test_auto_starts_where_there_is_nothing_and_goes_on_where_there_is(home, straight, tmp_path):
    more = [*HOW, "--resume=auto"]
    for out in (tmp_path / "out", tmp_path / "other"):
        out.mkdir()                                                    # empty: no checkpoint to go back to
        with interrupt_at(1, lambda: 1 / 0), pytest.raises(ZeroDivisionError):
            run(home, out, *more)
        assert check_whole(out)["step"] == 0 and not (out / "previous").exists()
        if out.name == "other":
            (out / "log.jsonl").unlink()                               # crashed between checkpoint and first line
        assert run(home, out, *more) == read_log(straight)
        assert_same_weights(straight, out)


def test_nobodys_model_is_taken_for_a_run(home, out, tmp_path):
    plain = tmp_path / "plain"
    RecursiveTransformer.load(out).save(plain)
    before = contents(plain)
    for how, says in (("auto", "plain holds a model already; give another --out, and --ckpt="),
                      ("no", "plain holds a model already"), ("yes", r"nothing to resume: \S*train.pt does not exist")):
        with pytest.raises(UserError, match=says):
            run(home, plain, f"--resume={how}")
    assert contents(plain) == before
    shutil.copytree(out, tmp_path / "runs" / "previous")               # a folder of runs, one with an unlucky name
    for how in ("auto", "no"):
        with pytest.raises(UserError, match="holds|previous"):
            run(home, tmp_path / "runs", f"--resume={how}")
    assert check_whole(tmp_path / "runs" / "previous")["step"] == 6


def test_a_run_that_has_only_its_previous_checkpoint_is_no_free_place(home, out):
    for name in ("train.pt", "model.safetensors"):
        (out / name).unlink()
    with pytest.raises(UserError, match="out holds a run already; go on with --resume"):
        run(home, out, *HOW)
    with pytest.raises(UserError, match="train.pt is missing; --resume=auto goes back"):
        resume(out)
    assert find_state(out, "auto")["step"] == 4


def test_a_model_written_over_a_run_is_not_replaced_by_it(out, monkeypatch):
    """Killed when the model is there and the run not yet deleted."""
    model = RecursiveTransformer.load(out)
    with monkeypatch.context() as m:
        m.setattr(os, "replace", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.save(out)
    assert (out / ".next").exists()
    with own_folder(out):
        pass
    assert find_state(out, "auto") is None and not (out / "previous").exists()


def test_another_versions_state_is_named(out):
    torch.save({"step": 6, "args": load_state(out)["args"]}, out / "new.pt")
    (out / "new.pt").rename(out / "train.pt")
    with pytest.raises(UserError, match=r"train.pt is another version's; start a new run .*--ckpt=\S*out"):
        resume(out)


def test_a_checkpoint_with_a_damaged_config_may_be_replaced_but_nothing_else(out, tmp_path):
    damage(out / "config.json", "delete")
    check_out(out)
    (out / "train.pt").rename(tmp_path / "train.pt")
    with pytest.raises(UserError, match="not a checkpoint of this project"), replace_folder(out):
        pass


# ---------------------------------------------------------------------------------------------------------------------
# What happens around a run

def test_a_run_has_its_folder_alone(home, out, start, tmp_path):
    code = "import sys, time; sys.path.insert(0, sys.argv[1])\nfrom lib.folders import own_folder\n" \
           "with own_folder(sys.argv[2]): print('here', flush=True); time.sleep(100)"
    holder = subprocess.Popen([sys.executable, "-c", code, ROOT, out], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "here\n"
    before = contents(out)
    for how in ("yes", "auto", "no"):
        with pytest.raises(UserError, match=rf"process {holder.pid} on .* is writing in \S*out"):
            run(home, out, *HOW, f"--resume={how}")
    processes = start_two(start, flags(home, out, *HOW, "--micro_batch=4", "--resume"), tmp_path / "output")
    assert join(processes) == [2, 2] and (tmp_path / "output").read_text().count(f"process {holder.pid} on") == 2
    assert contents(out) == before
    holder.kill()
    holder.wait()
    resume(out)
    assert check_whole(out)["step"] == 10


def test_a_donor_that_is_moved_and_a_log_that_is_gone_end_no_run(home, tmp_path, straight):
    donor, out = shutil.copytree(home / "donor", tmp_path / "donor"), tmp_path / "out"

    def disturb():
        donor.rename(tmp_path / "elsewhere")
        out.rename(tmp_path / "moved")
        os.chdir(tmp_path)
    before = os.getcwd()
    try:
        os.chdir(home)
        with interrupt_at(7, disturb):
            run(home, out, f"--donor={donor}", *HOW)
    finally:
        os.chdir(before)
    assert_same_weights(straight, out)
    assert check_whole(out)["sums"].keys() == check_whole(straight)["sums"].keys()
    assert check_whole(tmp_path / "moved")["step"] == 6
    assert [line["step"] for line in read_log(out) if "loss" in line] == [8, 9, 10]


def test_a_reader_at_any_moment_of_a_save_reads_one_version_and_changes_nothing(home, tmp_path, monkeypatch):
    """Before every call of `os` that moves a file."""
    out, seen = tmp_path / "out", []

    def watched(name, really):
        def call(*args, **kwargs):
            if (out / "train.pt").exists():
                seen.append((weights(out), load_state(out)["step"]))
            return really(*args, **kwargs)
        monkeypatch.setattr(os, name, call)
    monkeypatch.setattr(time, "sleep", lambda _: None)                 # nobody finishes while this process reads
    for name in ("rename", "replace", "link", "fsync"):
        watched(name, getattr(os, name))
    run(home, out, *HOW, "--save_every=5")
    monkeypatch.undo()
    of_step = {}
    for state, step in seen:
        first = of_step.setdefault(step, state)
        assert all(torch.equal(first[name], w) for name, w in state.items()), step
    assert len(seen) > 20 and list(of_step) == [0, 5, 10]


@pytest.mark.parametrize("held, step, kept", [
    ('{"step": 1}\n\n{"step": 2}\n', 2, '{"step": 1}\n{"step": 2}\n'),             # a blank line
    ('{"step": 1}\n{"step": 2, "l{"step": 2}\n{"step": 3}\n{"step": 4}', 3, '{"step": 1}\n{"step": 3}\n'),   # torn
    ('{"step": 1}\n{"step": 2}', 2, '{"step": 1}\n{"step": 2}\n'),                  # no newline at its end
    ('{"step": 1}\n{"step": 2, "final": true}\n', 2, '{"step": 1}\n'), ("", 2, "")])
def test_a_log_loses_what_comes_after_the_checkpoint_and_damaged_lines(tmp_path, held, step, kept):
    (tmp_path / "log.jsonl").write_text(held)
    drop_log_after(tmp_path / "log.jsonl", step)
    assert (tmp_path / "log.jsonl").read_text() == kept
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]


# ---------------------------------------------------------------------------------------------------------------------
# Full disks and kills

@pytest.mark.parametrize("what", ["model.safetensors", "train.pt", "log.jsonl"])
def test_a_full_disk_leaves_both_checkpoints(home, tmp_path, what):
    out = tmp_path / "out"
    run(home, out, "--save_every=15", "--log_every=100")
    size = {p.name: p.stat().st_size for p in out.iterdir()}
    if what == "log.jsonl":
        logged = (out / what).read_text()
        (out / what).write_text(json.dumps({"step": 0, "pad": "x" * size["train.pt"]}) + "\n" + logged)
    limit = {"model.safetensors": size["model.safetensors"] - 1, "train.pt": size["train.pt"] - 1,
             "log.jsonl": (out / "log.jsonl").stat().st_size + 1}[what]
    before = contents(out)
    with files_end_at(limit), pytest.raises(UserError, match="cannot write") as e:
        train.main(["--resume", f"--out={out}", "--tokens=25600", "--log_every=1"])
    says = "holds the last checkpoint" if what == "log.jsonl" else "what was there before is untouched"
    assert says in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    after = contents(out)
    assert after | {"log.jsonl": b""} == before | {"log.jsonl": b""}
    assert check_whole(out)["step"] == 20 and check_whole(out / "previous")["step"] == 15
    train.main(["--resume", f"--out={out}", "--tokens=2688"])
    assert check_whole(out)["step"] == 21 and check_whole(out / "previous")["step"] == 20


def test_kill_9_at_any_moment_loses_nothing_but_the_last_step(home, tmp_path, start, monkeypatch):
    """Every checkpoint found after a kill is, bit for bit, that of an undisturbed run at the same step. Half of the
    kills come at a random line of writing a checkpoint, half at a random time after a process's second step, so that a
    slow machine makes progress too; after some, the newest is damaged."""
    more = ["--tokens=1600", "--batch_tokens=8", "--seq_len=8", "--micro_batch=1", "--save_every=1",
            "--eval_every=1000", "--eval_tokens=8", f"--data={home}/valid.txt"]
    straight, out, lines, rng, steps = tmp_path / "straight", tmp_path / "killed", [], random.Random(0), [0]
    damaged = 0
    sums, save = {}, count_lines(train.save_checkpoint, lines.append)

    def fingerprint(state):
        return [w.double().sum().item() for w in state.values()] + [next(iter(state.values())).double().std().item()]

    def recorded(folder, model, optimizer, state, tokenizer):
        sums[state["step"]] = fingerprint(model.state_dict())
        if state["step"] in (0, 1, 200):
            lines.clear()
            save(folder, model, optimizer, state, tokenizer)
        if state["step"] == 0:
            shutil.copytree(straight, out)
    monkeypatch.setattr(train, "save_checkpoint", recorded)
    want = run(home, straight, *more)
    (out / "log.jsonl").write_text(json.dumps(want[0]) + "\n")
    monkeypatch.undo()
    output = tmp_path / "output"
    output.touch()

    for i in range(20):
        argv = ["--resume=auto", f"--out={out}"]
        printed = output.stat().st_size
        process = start(argv, output, kill_at=rng.randrange(2 * len(lines)) if i % 2 else None)
        while i % 2 == 0 and process.is_alive() and output.read_bytes()[printed:].count(b" | loss ") < 2:
            time.sleep(0.002)                                          # not in the log: a killed process logged more
        time.sleep(rng.uniform(0, 0.05))
        if i % 2 == 0:
            process.kill()
        assert join([process]) == [-signal.SIGKILL], output.read_text()
        state = weights(out)
        steps.append(load_state(out)["step"])
        assert fingerprint(state) == sums[steps[-1]] and steps[-1] >= steps[-2]
        if i % 6 == 4 and (out / "previous").exists():
            steps[-1] = load_state(out / "previous")["step"]           # it may have been saved twice
            damage(out / FILES[damaged % 4], "middle")
            damaged += 1
    assert len(set(steps)) > 5 and steps[-1] < 200 and damaged == 3, steps
    resume(out, "auto")
    assert read_log(out) == want
    assert_same_weights(tmp_path / "straight", out)
    assert {p.name for p in tmp_path.iterdir()} == {"straight", "killed", "output"}


# ---------------------------------------------------------------------------------------------------------------------
# Other processes

def test_a_run_may_pass_from_processes_to_others(home, tmp_path, start):
    """2 with --zero, 1, 2 with --zero, 2 without, 2 with: each takes over the optimizer's state that another wrote."""
    how = ["--rank=2", "--vectors=per_loop", "--tokens=2560", "--batch_tokens=256"]
    want, out, output = run(home, tmp_path / "straight", *how), tmp_path / "out", tmp_path / "output"
    argv = flags(home, out, *how, "--resume=auto")

    def two(zero, stop_at):
        more = [f"--zero={zero}", "--micro_batch=4"]
        code = 0 if stop_at is None else 128 + signal.SIGTERM
        assert join(start_two(start, argv + more, output, stop_at=stop_at)) == [code] * 2, output.read_text()
        assert load_state(out)["step"] == (10 if stop_at is None else stop_at + 1)
    two(True, 1)
    with interrupt_at(3, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        train.main([*argv, "--zero=False"])
    assert load_state(out)["step"] == 4
    two(True, 5)
    two(False, 7)
    two(True, None)
    assert_close_logs(want, read_log(out))
    assert_same_weights(tmp_path / "straight", out, rtol=1e-2, atol=1e-4)


def test_zero_keeps_its_share_once_also_after_a_resume(out):
    state = load_state(out)["optimizer"]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = RecursiveTransformer.load(out)
        optimizer = train.make_optimizer(model, train.TrainConfig(zero=True))
        assert isinstance(optimizer, ZeroRedundancyOptimizer)
        load_optimizer(optimizer, state)
        assert len(optimizer.optim.state) == len(list(model.parameters())) and not optimizer.state
        assert all(s["step"] == 6 for s in optimizer.optim.state.values())
        optimizer.consolidate_state_dict(to=0)
        again = optimizer.state_dict()["state"]
        assert again.keys() == load_state(out)["optimizer"]["state"].keys()
        assert all(torch.equal(again[i][k], v) for i, s in load_state(out)["optimizer"]["state"].items()
                   for k, v in s.items())
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("zero", [False, True])
def test_a_resumed_optimizer_lets_the_old_file_go(out, zero):
    """Its moments are no longer those mapped from train.pt, whose space on the disk would stay in use."""
    def mapped():
        return str(out / "train.pt") in Path("/proc/self/maps").read_text()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, state = RecursiveTransformer.load(out), load_state(out)
        optimizer = train.make_optimizer(model, train.TrainConfig(zero=zero))
        load_optimizer(optimizer, state["optimizer"])
        assert mapped()
        del state
        gc.collect()
        assert not mapped() and optimizer.param_groups[0]["params"]
    finally:
        dist.destroy_process_group()


def test_a_first_save_that_was_interrupted_can_be_read(out):
    """A kill left .next, which is complete, and nothing beside it."""
    before, files = RecursiveTransformer.load(out).state_dict(), [path for path in out.iterdir()]
    (out / ".next").mkdir()
    for path in files:
        path.rename(out / ".next" / path.name)
    assert all(torch.equal(w, before[name]) for name, w in RecursiveTransformer.load(out).state_dict().items())
    assert Tokenizer.load(out).encode("the cat") and read_config(out).n_loop == 2
    assert donor_files(out).keys() == {path.name for path in files} & {*TOKENIZER_FILES, DONOR_README}


def worker(out: Path, rank: int) -> int | None:
    """The process of that rank in the run that writes `out`."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            ours = f"--out={out}\0".encode() in (folder / "cmdline").read_bytes()
            if ours and f"\0RANK={rank}\0".encode() in (folder / "environ").read_bytes():
                return int(folder.name)
        except OSError:
            continue                                                   # it ended, or is somebody else's
    return None


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the worker in /proc")
def test_a_killed_worker_is_replaced_and_nothing_is_lost(home, tmp_path):
    how, out = ["--tokens=19200", "--save_every=20", "--eval_every=1000", "--rank=2"], tmp_path / "out"  # 150 steps
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=3",
               "train.py", *flags(home, out, *how, "--micro_batch=4", "--resume=auto", "--zero")]
    with open(tmp_path / "output", "w") as f:
        launcher = subprocess.Popen(command, stdout=f, stderr=f, cwd=ROOT, start_new_session=True,
                                    env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        wait_for_step(out, 25, lambda: launcher.poll() is None)
        os.kill(worker(out, rank=1), signal.SIGKILL)
        launcher.wait(250)
    finally:
        if launcher.poll() is None:
            launcher.terminate()                                       # its workers are in sessions of their own
            launcher.wait(100)
    output = (tmp_path / "output").read_text()
    assert launcher.returncode == 0 and output.count("resuming at step") == 1, output
    assert_close_logs(run(home, tmp_path / "straight", *how), read_log(out), 1e-4)
    assert_same_weights(tmp_path / "straight", out, rtol=1e-2, atol=1e-2)


def test_an_error_of_the_first_process_is_everybodys(home, out, tmp_path, start):
    damage(out / "model.safetensors", "middle")
    processes = start_two(start, flags(home, out, *HOW, "--micro_batch=4", "--resume"), tmp_path / "output")
    assert join(processes) == [2, 2]
    said = (tmp_path / "output").read_text()
    assert said.count("error: ") == said.count("--resume=auto goes back") == 2 and "Traceback" not in said


def test_a_run_from_before_several_end_ids_were_kept_goes_on(home, tmp_path):
    """A run's record of its donor is compared by what is computed with; its licence came along."""
    donor, out = tmp_path / "donor", tmp_path / "out"
    shutil.copytree(home / "donor", donor)
    config = json.loads((donor / "config.json").read_text())
    (donor / "config.json").write_text(json.dumps(config | {"eos_token_id": [319, 7]}))
    (donor / "LICENSE").write_text("all yours")
    train.main([*flags(home, out, "--tokens=256"), f"--donor={donor}"])
    assert (out / "LICENSE").read_text() == "all yours"
    state = torch.load(out / "train.pt")
    del state["history"]["donor_config"]["extra"]
    state["history"]["donor_config"]["eos_token_id"] = 319
    torch.save(state, out / "train.pt")
    train.main(["--resume", f"--out={out}", "--tokens=384"])
    assert torch.load(out / "train.pt")["step"] == 3


def test_a_folder_of_chat_templates_goes_along_and_is_part_of_what_is_checked(home, tmp_path):
    """transformers keeps named chat templates in a folder of their own."""
    donor = shutil.copytree(home / "donor", tmp_path / "donor")
    (donor / "additional_chat_templates").mkdir()
    (donor / "additional_chat_templates/tool.jinja").write_text("one")
    run(home, tmp_path / "out", f"--donor={donor}", "--save_every=1")
    for folder in (tmp_path / "out", tmp_path / "out/previous"):
        assert (folder / "additional_chat_templates/tool.jinja").read_text() == "one"
        check_whole(folder)
    (tmp_path / "out/additional_chat_templates/tool.jinja").write_text("two")
    with pytest.raises(UserError, match="tool.jinja not as written"):
        check_whole(tmp_path / "out")
    find_state(tmp_path / "out", "auto")                     # goes back to the checkpoint before it
    assert (tmp_path / "out/additional_chat_templates/tool.jinja").read_text() == "one"
    check_whole(tmp_path / "out")
