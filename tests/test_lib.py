"""The command line, what scripts print, and folders that are replaced whole."""

import errno
import inspect
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import pytest
import torch
from tiny import count_lines

import convert
import sample
import train
from evaluation import harness
from evaluation import perplexity as evaluate
from lib import data, results, system
from lib.cli import UserError, parse_args, print0, progress, script, table, use_colour
from lib.folders import check_out, own_folder, replace_folder, settled
from lib.system import peak_flops, peak_memory, pick_device, start_processes

ROOT = Path(train.__file__).parent

Kind = Literal["round", "square"]


@dataclass
class Settings:
    # a comment of its own is nobody's help
    name: str = "a # b"                    # what it is called
    size: int = 1_000                      # how large, at most 100%
    share: float = 0.5                     # of the whole
    kind: Kind = "round"                   # which shape
    fill: bool = False                     # whether it is filled
    limit: int | None = None               # stop there
    place: str | None = None               # where
    plain: int = 3


def other_process(code: str, *args, **options) -> subprocess.Popen:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen([sys.executable, "-c", f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n{code}",
                             *map(str, args)], **options)


# ---------------------------------------------------------------------------------------------------------------------
# Command line

@pytest.mark.parametrize("argv, expected", [
    ([], {}),
    (["--name=x=y", "--size=2_000", "--share=1e-3", "--kind=square"],
     {"name": "x=y", "size": 2000, "share": 1e-3, "kind": "square"}),
    (["--fill"], {"fill": True}), (["--fill=true"], {"fill": True}), (["--fill=False"], {"fill": False}),
    (["--limit=7", "--place=here"], {"limit": 7, "place": "here"}),
    (["--size", "5", "--size=6"], {"size": 6}), (["--share=-1"], {"share": -1.0}),
])
def test_flags_fill_the_dataclass(argv, expected):
    settings = parse_args(Settings, argv)
    assert settings == Settings(**expected)
    assert all(type(getattr(settings, k)) is type(v) for k, v in expected.items())


def test_a_home_folder_is_found_in_every_path_but_not_in_a_prompt(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = ["--name=~/a,b,~/c", "--place=~"]
    assert parse_args(Settings, given) == Settings(name="/home/me/a,b,/home/me/c", place="/home/me")
    assert parse_args(Settings, ["--name=a~b/~"]).name == "a~b/~"
    assert parse_args(sample.SampleConfig, ["--prompt=~/a", "--ckpt=~/a"]).prompt == "~/a"


@pytest.mark.parametrize("seed", ["-1", "9223372036854775808", "1e30"])
def test_seeds_are_what_every_generator_takes(seed):
    for settings in (train.TrainConfig, convert.ConvertConfig, sample.SampleConfig):
        assert parse_args(settings, ["--seed=9223372036854775807"]).seed == 2**63 - 1
        with pytest.raises(UserError, match=rf"--seed={int(float(seed))} must not be negative, and less than 2\*\*63"):
            parse_args(settings, [f"--seed={seed}"])


def test_flags_come_before_given_defaults_and_these_before_the_classes():
    before = Settings(size=5, fill=True, limit=3)
    assert parse_args(Settings, ["--size=6", "--fill=False"], defaults=before) == Settings(size=6, limit=3)
    assert before == Settings(size=5, fill=True, limit=3)


@pytest.mark.parametrize("argv, says", [
    (["--kind=oval"], "choose from 'round', 'square'"), (["--size=1.5"], "invalid int value: '1.5'"),
    (["--fill=yes"], "expected True or False, got 'yes'"), (["--siz=1"], "unrecognized arguments: --siz=1"),
    (["--limit=None"], "invalid int value"), (["--limit="], "invalid int value"),
    (["--share= "], "invalid float value"), (["--name="], "expected a value, got an empty one"),
    (["--place= "], "expected a value, got an empty one"),
    (["stray"], "unrecognized arguments: stray")])
def test_a_wrong_flag_exits_with_2_and_says_what_is_allowed(capsys, argv, says):
    with pytest.raises(SystemExit) as e:
        parse_args(Settings, argv)
    assert e.value.code == 2 and says in capsys.readouterr().err


def test_comments_and_defaults_are_the_help(capsys):
    with pytest.raises(SystemExit) as e:
        parse_args(Settings, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert e.value.code == 0 and __doc__ in text
    for said in ("--size INT how large, at most 100% [1000]", "--kind {round,square} which shape [round]",
                 "--fill [True|False] whether it is filled [False]", "--limit INT stop there [not set]",
                 "--share FLOAT of the whole [0.5]", "--name STR what it is called [a # b]", "--plain INT [3]"):
        assert said in text, (said, text)
    assert "nobody's help" not in text


@pytest.mark.parametrize("main, settings", [
    (train.main, train.TrainConfig), (convert.main, convert.ConvertConfig), (data.main, data.DataConfig),
    (evaluate.main, evaluate.EvaluateConfig), (harness.main, harness.HarnessConfig)])
def test_every_script_explains_every_setting(capsys, monkeypatch, main, settings):
    monkeypatch.setenv("COLUMNS", "300")                               # no line is broken, at a hyphen least of all
    with pytest.raises(SystemExit) as e:
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert e.value.code == 0
    source = inspect.getsource(settings).splitlines()
    for f in fields(settings):
        line, = (line for line in source if line.startswith(f"    {f.name}: "))
        comment = line.split("  # ")[1].strip()                        # each ends with one
        assert f"--{f.name} " in text and comment in text, line


@pytest.mark.parametrize("error, code, says", [
    (None, 0, ""), (UserError("given, allowed, what to do"), 2, "error: given, allowed, what to do\n"),
    (KeyboardInterrupt(), 130, "interrupted\n"), (SystemExit(3), 3, "")])
def test_a_script_ends_with_one_line_and_a_code(capsys, error, code, says):
    def main():
        if error:
            raise error
    with pytest.raises(SystemExit) as e:
        script(main)
    assert e.value.code == code and capsys.readouterr().err == says


@pytest.mark.parametrize("code", [None, 0, 143])
def test_a_script_exits_with_what_its_main_returns(code):
    with pytest.raises(SystemExit) as e:
        script(lambda: code)
    assert e.value.code == (code or 0)


SCRIPT = "from lib.cli import print0, script\ndef main():\n    {}\n    open(sys.argv[1], 'w').close()\nscript(main)"


@pytest.mark.parametrize("work, code, done", [
    ("for i in range(20000): print0(i)", 141, True),                   # reports: the work goes on
    ("for i in range(20000): print(i)", 141, False),                   # the work itself
    ("for i in range(20000): print0(i)\n    open(sys.argv[1], 'w').close(); return 0", 0, True),
    ("print0(1); raise SystemExit(3)", 3, False)])
def test_a_reader_that_leaves_ends_nothing_with_a_traceback(tmp_path, work, code, done):
    process = other_process(SCRIPT.format(work), tmp_path / "done")
    process.stdout.readline()
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("", code)
    assert (tmp_path / "done").exists() == done


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full disk to write to")
@pytest.mark.parametrize("word, done", [("print0", True), ("print", False)])
def test_a_full_disk_behind_the_output_is_said(tmp_path, word, done):
    with open("/dev/full", "w") as f:
        process = other_process(SCRIPT.format(f"for i in range(20000): {word}(i)"), tmp_path / "done", stdout=f)
        error = process.stderr.read()
    assert process.wait() == 2 and error == "error: cannot write to standard output (No space left on device)\n"
    assert (tmp_path / "done").exists() == done


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_encoding_that_lacks_a_character_ends_nothing(tmp_path, encoding):
    work = "print('\\u0100', '\\udc80'); print('\\u0100', file=sys.stderr)"
    process = other_process(SCRIPT.format(work), tmp_path / "done", env=os.environ | {"PYTHONIOENCODING": encoding})
    assert process.communicate() == ("? ?\n", "?\n") and process.returncode == 0 and (tmp_path / "done").exists()


def test_an_error_that_is_not_of_the_output_keeps_its_traceback():
    with pytest.raises(FileNotFoundError):
        script(lambda: Path("/nowhere/at all").read_text())


def test_colours_are_for_terminals_that_show_them(monkeypatch):
    class Stream(io.StringIO):
        def isatty(self):
            return True
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert use_colour(Stream()) and not use_colour(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not use_colour(Stream())
    monkeypatch.setenv("NO_COLOR", "")                                 # as if it were not set: no-color.org
    assert use_colour(Stream())
    monkeypatch.setenv("TERM", "dumb")
    assert not use_colour(Stream())


def test_where_results_go_is_tried_at_once(tmp_path, monkeypatch):
    check = results.check_writable
    (tmp_path / "there").write_text("lines")
    os.mkfifo(tmp_path / "pipe")
    for fine in (None, tmp_path / "new", tmp_path / "there", "/dev/null", tmp_path / "pipe"):
        check("save", fine and str(fine))
    (tmp_path / "link").symlink_to("new")
    check("save", str(tmp_path / "link"))
    assert names(tmp_path) == {"there", "pipe", "link"} and (tmp_path / "there").read_text() == "lines"
    for wrong in (tmp_path, tmp_path / "no" / "folder", tmp_path / "there" / "file", tmp_path / ("n" * 300)):
        with pytest.raises(UserError, match="--save=.*cannot be written.*give a file in a folder that is there"):
            check("save", str(wrong))

    def read_only(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    monkeypatch.setattr("builtins.open", read_only)                    # root may do all, but not this
    with pytest.raises(UserError, match="Read-only file system"):
        check("save", str(tmp_path / "new"))


def test_processes_that_cannot_meet_are_told_so(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                            "MASTER_PORT": str(taken.getsockname()[1])}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match="the 2 processes cannot meet .*torchrun.*MASTER_PORT"):
            start_processes("cpu")
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(UserError, match="cannot meet"):
        start_processes("cpu")


def test_processes_wait_while_the_first_one_saves_a_large_model(monkeypatch):
    given = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(system.dist, "rendezvous", lambda *_: iter([(system.dist.HashStore(), 0, 2)]))
    monkeypatch.setattr(system.dist, "init_process_group", lambda *_, **options: given.update(options))
    start_processes("cpu")
    gemma_2b = 12 * 2.5e9 + 4 * 2.5e9                            # weights and AdamW's state; the weights for their CRC
    assert given["timeout"].total_seconds() > 4 * gemma_2b / 50e6 > 3000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_is_asked_for_by_a_signal_and_given_back(number):
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with system.StopFlag() as stop:
            os.kill(os.getpid(), number)
            assert stop.agreed(system.Processes(0, 1, torch.device("cpu"))) == number
        assert signal.signal(number, signal.SIG_IGN) == signal.SIG_DFL
        with system.StopFlag() as stop:                               # as nohup wants it
            os.kill(os.getpid(), number)
            assert stop.agreed(system.Processes(0, 1, torch.device("cpu"))) == 0
    finally:
        signal.signal(number, before)


def test_a_bug_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        script(lambda: 1 / 0)


# ---------------------------------------------------------------------------------------------------------------------
# Devices and printing

def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert start_processes("cpu") == system.Processes(0, 1, torch.device("cpu"))
    for name in ["abacus", *["cuda"] * (not torch.cuda.is_available())]:
        with pytest.raises(UserError, match=f"--device={name} cannot be used here.*use auto, cpu or cuda"):
            pick_device(name)


@pytest.mark.parametrize("rank, terminal, shown", [("0", True, True), ("0", False, False), ("1", True, False)])
def test_progress_and_printing_are_for_whoever_watches(capsys, monkeypatch, rank, terminal, shown):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    assert list(progress(range(3), desc="reading")) == [0, 1, 2]
    print0("said")
    out, err = capsys.readouterr()
    assert ("reading" in err) == shown and out == ("said\n" if rank == "0" else "")


def test_tables_are_aligned():
    assert table([["model", "loss"], ["donor", 1.5], ["a longer name", "12.25"]]).splitlines() == [
        "model           loss",
        "-------------  -----",
        "donor            1.5",
        "a longer name  12.25"]
    assert table([["a"]]) == "a\n-"
    with pytest.raises(ValueError):
        table([["a", "b"], ["c", "d", "e"]])


@pytest.mark.parametrize("name, tera", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
    ("NVIDIA H200 NVL", 835), ("NVIDIA GH200 480GB", 989), ("NVIDIA B200", 2250), ("NVIDIA A100-SXM4-80GB", 312),
    ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA A10", 125), ("NVIDIA L4", 121), ("NVIDIA L40", 181), ("NVIDIA L40S", 362),
    ("NVIDIA RTX A6000", 155), ("NVIDIA GeForce RTX 4090", 165),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),  # less than the name
    ("NVIDIA RTX A1000", None), ("NVIDIA A10G", None), ("AMD Instinct MI300X", None),           # in part the name
])
def test_peak_of_a_gpu_is_known_by_its_name(monkeypatch, name, tera):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), bf16=True) == (tera and tera * 1e12)
    assert peak_flops(torch.device("cuda"), bf16=False) is None


def test_a_figure_without_git_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert system.run_info()["commit"] is None


def test_only_gpus_have_a_known_peak_and_every_machine_a_peak_of_memory():
    for name in ("cpu", "meta"):
        assert peak_flops(torch.device(name), bf16=True) is None
    assert 0.05 < peak_memory(torch.device("cpu")) < 1000        # GiB


# ---------------------------------------------------------------------------------------------------------------------
# Files of one JSON object a line

WHOLE = b'{"a": 1}\n'


@pytest.mark.parametrize("held, read, appended", [
    (b"", [], b""),
    (WHOLE, [{"a": 1}], WHOLE),
    (b"\n" + WHOLE + b"  \n" + WHOLE, [{"a": 1}] * 2, b"\n" + WHOLE + b"  \n" + WHOLE),
    (WHOLE + b'{"a": 2}', [{"a": 1}, {"a": 2}], WHOLE + b'{"a": 2}\n'),       # an editor left out the newline
    (WHOLE + b'{"a": 2, "b": "\xc3', [{"a": 1}], WHOLE), (b'{"a"', [], b""),   # a kill cut the line short
])
def test_lines_are_read_and_added_whatever_ends_the_file(tmp_path, capsys, held, read, appended):
    path = tmp_path / "lines.jsonl"
    assert results.read_lines(path) == []
    path.write_bytes(held)
    assert results.read_lines(path) == read
    assert ("line" in capsys.readouterr().err) == (appended not in (held, held + b"\n"))
    results.append_line(path, {"new": float("nan")})
    assert path.read_bytes() == appended + b'{"new": null}\n'
    assert results.read_lines(path) == [*read, {"new": None}]


@pytest.mark.parametrize("line", [b'{"a": 1', b"[1]", b"\x00\x00", b"\xff"])
def test_a_damaged_line_is_named(tmp_path, line):
    (tmp_path / "lines.jsonl").write_bytes(WHOLE + line + b"\n" + WHOLE)
    with pytest.raises(UserError, match=r"lines.jsonl, line 2, is damaged"):
        results.read_lines(tmp_path / "lines.jsonl")


# ---------------------------------------------------------------------------------------------------------------------
# Folders that are replaced whole

def write(folder, version: int, extra: str = "") -> None:
    with replace_folder(folder) as tmp:
        (tmp / "config.json").write_text(json.dumps({"format": "nanoRRT", "text": f"version {version}"}))
        for name in ("model.safetensors", *extra.split()):
            (tmp / name).write_text(f"version {version}")


def version(folder: Path) -> str:
    texts = {(folder / "model.safetensors").read_text(), json.loads((folder / "config.json").read_text())["text"]}
    assert len(texts) == 1, texts
    return texts.pop()


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_a_folder_is_replaced_and_what_else_it_held_is_kept(tmp_path):
    out = tmp_path / "deep" / "out"
    write(out, 1, "train.pt")
    (out / "log.jsonl").write_text("log")
    (out / "link").symlink_to("log.jsonl")
    (out / "gone").symlink_to("nowhere")
    (out / "inside" / "deeper").mkdir(parents=True)
    (out / "inside" / "deeper" / "model.safetensors").write_text("another run's")
    for _ in range(2):
        write(out, 2)
        assert version(out) == "version 2" and names(tmp_path / "deep") == {"out"}
        assert names(out) == {"model.safetensors", "config.json", "log.jsonl", "link", "gone", "inside"}  # no train.pt
        assert (out / "log.jsonl").read_text() == (out / "link").read_text() == "log"
        assert (out / "inside" / "deeper" / "model.safetensors").read_text() == "another run's"


def test_names_that_people_use_are_left_alone(tmp_path):
    write(tmp_path / "out", 1)
    shutil.move(tmp_path / "out", tmp_path / "out.old")                # by hand, to keep it
    (tmp_path / "out.tmp").mkdir()
    for v in (2, 3):
        write(tmp_path / "out", v)
        assert names(tmp_path) == {"out", "out.old", "out.tmp"}
        assert version(tmp_path / "out.old") == "version 1" and version(tmp_path / "out") == f"version {v}"


@pytest.mark.parametrize("there", [True, False])
def test_where_a_link_points_is_replaced_not_the_link(tmp_path, there):
    (tmp_path / "disk").mkdir()
    if there:
        (tmp_path / "disk" / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    for v in (1, 2, 3):
        write(tmp_path / "out", v)
        assert version(tmp_path / "disk" / "real") == f"version {v}"
    assert names(tmp_path / "disk") == {"real"} and names(tmp_path) == {"out", "disk"}
    assert (tmp_path / "out").is_symlink()


def test_the_folder_one_is_in_can_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write(".", 1)
    assert version(tmp_path / "here") == "version 1" and names(tmp_path) == {"here"}


@pytest.mark.parametrize("error", [ZeroDivisionError("ours"), KeyboardInterrupt(), UserError("theirs")])
@pytest.mark.parametrize("there", [True, False])
def test_an_error_within_leaves_the_old_folder(tmp_path, error, there):
    out = tmp_path / "out"
    if there:
        write(out, 1)
    with pytest.raises(type(error)), replace_folder(out) as tmp:
        (tmp / "model.safetensors").write_text("half")
        raise error
    assert names(tmp_path) == ({"out"} if there else set())
    assert not there or version(out) == "version 1"


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("broken", ["write", "fsync", "rename"])
def test_a_disk_that_refuses_leaves_the_old_folder_and_says_so(tmp_path, monkeypatch, broken):
    out = tmp_path / "out"
    write(out, 1)
    (out / "log.jsonl").write_text("log")
    if broken != "write":
        monkeypatch.setattr(*{"fsync": (os, "fsync"), "rename": (Path, "rename")}[broken], full)
    says = r"cannot write \S*out: No space left on device; what was there before is untouched"
    with pytest.raises(UserError, match=says), replace_folder(out) as tmp:
        (tmp / "model.safetensors").write_text("version 2")
        if broken == "write":
            full()
    monkeypatch.undo()
    assert version(out) == "version 1" and names(tmp_path) == {"out"} and "log.jsonl" in names(out)


def test_a_disk_that_refuses_when_all_is_written_loses_nothing(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(out, 1)
    with monkeypatch.context() as m, pytest.raises(UserError, match=r"cannot finish \S*out \(No space.*\S*out/\.next"):
        m.setattr(os, "replace", full)
        write(out, 2)
    assert version(settled(out)) == "version 2"
    with own_folder(out):
        assert version(out) == "version 2"
    assert names(out) == {"config.json", "model.safetensors"}


def test_a_disk_without_links_is_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", full)
    for v in (1, 2):
        with replace_folder(tmp_path, keep=True) as tmp:
            (tmp / "config.json").write_text(json.dumps({"format": "nanoRRT", "text": f"version {v}"}))
            for name in ("model.safetensors", "train.pt"):
                (tmp / name).write_text(f"version {v}")
    assert version(tmp_path) == "version 2" and version(tmp_path / "previous") == "version 1"


def read_only(folder: Path) -> dict:
    return {p: (p.read_bytes() if p.is_file() else None, p.stat().st_mtime_ns) for p in folder.rglob("*")}


def test_a_kill_at_any_line_of_replacing_leaves_one_whole_version(tmp_path, monkeypatch):
    """For a reader, who changes nothing, at once; in its place when the folder has an owner again. The former stays."""
    monkeypatch.setattr(time, "sleep", lambda _: None)

    def save(folder, v):
        with replace_folder(folder, keep=True) as tmp:
            (tmp / "config.json").write_text(json.dumps({"format": "nanoRRT", "text": f"version {v}"}))
            for name in ("model.safetensors", "train.pt"):
                (tmp / name).write_text(f"version {v}")
    for there in (True, False):
        lines, found, start = [], set(), tmp_path / f"start {there}"
        if there:
            save(start, 0), save(start, 1)
            (start / "log.jsonl").write_text("log")
            (start / "gate.safetensors").write_text("of version 1")
        else:
            start.mkdir()
        count_lines(save, lines.append)(shutil.copytree(start, tmp_path / f"trial {there}"), 2)
        assert len(lines) > 50
        for kill_at in random.Random(0).sample(range(len(lines)), 60):
            out = shutil.copytree(start, tmp_path / f"{there} {kill_at}")
            if os.fork() == 0:
                try:
                    count_lines(save, lambda line: line == kill_at and os.kill(os.getpid(), signal.SIGKILL))(  # noqa: B023
                        out, 2)
                finally:
                    os._exit(1)
            assert os.WTERMSIG(os.wait()[1]) == signal.SIGKILL
            before, place = read_only(out), settled(out)
            if there or (place / "model.safetensors").exists():
                found.add(version(place))
                seen = version(place)
            assert read_only(out) == before
            check_out(out)
            with own_folder(out):
                if (out / "model.safetensors").exists():
                    assert version(out) == (out / "train.pt").read_text() == seen
                    assert (out / "gate.safetensors").exists() == (seen == "version 1")
                else:
                    assert not there
                if there:
                    assert (out / "log.jsonl").read_text() == "log"
                    assert version(out / "previous") == {"version 2": "version 1", "version 1": "version 0"}[seen]
            save(out, 3)
            assert version(out) == "version 3" and not {".new", ".next", ".lock"} & names(out)
        assert found == ({"version 1", "version 2"} if there else {"version 2"})


def test_two_checkpoints_share_no_file_at_any_moment_of_a_save(tmp_path, monkeypatch):
    """Before every call that links, moves or removes: damage to one file leaves a whole checkpoint."""
    out, moments = tmp_path / "out", []

    def checkpoints():
        """The inodes of the files of each whole checkpoint."""
        found = []
        for folder in [out, *(out / name for name in (".next", ".previous", "previous", ".old"))]:
            files = [folder / name for name in ("config.json", "model.safetensors", "train.pt")]
            if all(path.exists() for path in files):
                texts = [json.loads(files[0].read_text())["text"], *(path.read_text() for path in files[1:])]
                found += [{path.stat().st_ino for path in files}] * (len(set(texts)) == 1)
        return found

    def watch(owner, name):
        really = getattr(owner, name)

        def call(*args, **kwargs):
            whole = checkpoints()
            moments.append(any(a.isdisjoint(b) for a in whole for b in whole))
            return really(*args, **kwargs)
        monkeypatch.setattr(owner, name, call)

    def save(v):
        with replace_folder(out, keep=True) as tmp:
            (tmp / "config.json").write_text(json.dumps({"format": "nanoRRT", "text": f"version {v}"}))
            for name in ("model.safetensors", "train.pt"):
                (tmp / name).write_text(f"version {v}")
    save(0), save(1)
    for owner, name in ((os, "link"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (Path, "rename")):
        watch(owner, name)
    save(2)
    monkeypatch.undo()
    assert len(moments) > 10 and all(moments)
    assert version(out) == "version 2" and version(out / "previous") == "version 1"


# ---------------------------------------------------------------------------------------------------------------------
# One owner

def test_a_folder_has_one_owner_until_its_process_ends_however_it_does(tmp_path):
    write(tmp_path / "out", 1)
    holder = other_process("from lib.folders import own_folder\nwith own_folder(sys.argv[1]):\n"
                           "    print('here', flush=True); time.sleep(100)", tmp_path / "out")
    assert holder.stdout.readline() == "here\n"
    before = read_only(tmp_path)
    for path in (tmp_path / "out", tmp_path / "link"):
        if path.name == "link":
            path.symlink_to("out")
        with pytest.raises(UserError, match=rf"process {holder.pid} on \S+ is writing in \S*out: wait"):
            write(path, 2)
    (tmp_path / "link").unlink()
    assert {p: v for p, v in read_only(tmp_path).items() if p.is_file()} == {
        p: v for p, v in before.items() if p.is_file()}
    holder.kill()
    holder.wait()
    write(tmp_path / "out", 2)
    assert version(tmp_path / "out") == "version 2" and names(tmp_path / "out") == {"config.json", "model.safetensors"}


def test_what_an_owner_makes_for_nothing_is_gone_again(tmp_path):
    with own_folder(tmp_path / "a" / "b") as folder, own_folder(folder):
        assert folder.is_dir()
    assert names(tmp_path) == set()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write in"), own_folder(tmp_path / "file" / "out"):
        pass


def test_a_mount_point_can_be_replaced(tmp_path):
    """Somebody's volume: it can neither be renamed nor removed, and may have a lost+found."""
    code = "from tests.test_lib import write, version, Path\nfor v in (1, 2): write(sys.argv[1], v)\n" \
           "print(version(Path(sys.argv[1])))"
    (tmp_path / "disk" / "lost+found").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    mount = ["unshare", "-rm", "sh", "-c", 'mount --bind "$1" "$2" && shift 2 && exec "$@"', "sh", tmp_path / "disk",
             tmp_path / "out"]
    if not shutil.which("unshare") or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("no mounts of one's own here")
    said = subprocess.run([*mount, sys.executable, "-c", f"import sys; sys.path[:0] = [{str(ROOT)!r}, "
                           f"{str(ROOT / 'tests')!r}]\n{code}", tmp_path / "out"], capture_output=True, text=True)
    assert said.stdout == "version 2\n", said.stderr


@pytest.mark.parametrize("write_or_check", [check_out, lambda out: write(out, 1)])
def test_what_is_not_a_checkpoint_is_refused(tmp_path, write_or_check):
    (tmp_path / "poems").mkdir()
    (tmp_path / "poems" / "one.txt").write_text("poem")
    (tmp_path / "file").write_text("text")
    with pytest.raises(UserError, match=r"poems holds something .* of this project \(one.txt\); give a folder"):
        write_or_check(tmp_path / "poems")
    with pytest.raises(UserError, match=r"file is a file; --out needs a folder"):
        write_or_check(tmp_path / "file")
    assert (tmp_path / "poems" / "one.txt").read_text() == "poem" and (tmp_path / "file").read_text() == "text"
    assert names(tmp_path) == {"poems", "file"}
    check_out(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    check_out(tmp_path / "empty")
    assert names(tmp_path) == {"poems", "file", "empty"}


def test_a_hugging_face_folder_is_not_replaced(tmp_path):
    """It has a config.json and weights too, but they are somebody's: only what this project wrote is replaced."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_text("theirs")
    with pytest.raises(UserError, match="not a checkpoint of this project"):
        write(tmp_path, 1)
    assert (tmp_path / "model.safetensors").read_text() == "theirs"


def test_a_new_tokenizer_replaces_all_of_the_old(tmp_path):
    write(tmp_path / "out", 1, "tokenizer.json tokenizer_config.json log.jsonl")
    write(tmp_path / "out", 2)
    assert names(tmp_path / "out") >= {"tokenizer.json", "tokenizer_config.json", "log.jsonl"}
    write(tmp_path / "out", 3, "tokenizer.tiktoken")
    assert names(tmp_path / "out") == {"config.json", "model.safetensors", "tokenizer.tiktoken", "log.jsonl"}


def test_files_are_as_readable_as_the_umask_says(tmp_path):
    with replace_folder(tmp_path / "out") as tmp:
        (tmp / "model.safetensors").touch(0o600)
    mask = os.umask(0o022)
    os.umask(mask)
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask
