"""The command line, what scripts print, and folders that are replaced whole."""

import errno
import inspect
import json
import os
import shutil
import signal
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import pytest
import torch

import convert
import data
import evaluate
import harness
import runtime
import train
from runtime import (
    UserError,
    check_out,
    parse_args,
    peak_flops,
    peak_memory,
    pick_device,
    print0,
    progress,
    recover_folder,
    replace_folder,
    script,
    start_processes,
    table,
)

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


def test_flags_come_before_given_defaults_and_these_before_the_classes():
    before = Settings(size=5, fill=True, limit=3)
    assert parse_args(Settings, ["--size=6", "--fill=False"], defaults=before) == Settings(size=6, limit=3)
    assert before == Settings(size=5, fill=True, limit=3)


@pytest.mark.parametrize("argv, says", [
    (["--kind=oval"], "choose from 'round', 'square'"), (["--size=1.5"], "invalid int value: '1.5'"),
    (["--fill=yes"], "expected True or False, got 'yes'"), (["--siz=1"], "unrecognized arguments: --siz=1"),
    (["--limit=None"], "invalid int value"), (["stray"], "unrecognized arguments: stray")])
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


def test_a_bug_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        script(lambda: 1 / 0)


# ---------------------------------------------------------------------------------------------------------------------
# Devices and printing

def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert start_processes("cpu") == runtime.Processes(0, 1, torch.device("cpu"))
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


def test_peaks_of_this_machine_are_measured():
    assert peak_flops(torch.device("cpu"), bf16=False) > 1e8
    assert peak_flops(torch.device("meta"), bf16=False) is None
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
    assert runtime.read_lines(path) == []
    path.write_bytes(held)
    assert runtime.read_lines(path) == read
    assert ("line" in capsys.readouterr().err) == (appended not in (held, held + b"\n"))
    runtime.append_line(path, {"new": float("nan")})
    assert path.read_bytes() == appended + b'{"new": null}\n'
    assert runtime.read_lines(path) == [*read, {"new": None}]


@pytest.mark.parametrize("line", [b'{"a": 1', b"[1]", b"\x00\x00", b"\xff"])
def test_a_damaged_line_is_named(tmp_path, line):
    (tmp_path / "lines.jsonl").write_bytes(WHOLE + line + b"\n" + WHOLE)
    with pytest.raises(UserError, match=r"lines.jsonl, line 2, is damaged"):
        runtime.read_lines(tmp_path / "lines.jsonl")


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


@pytest.mark.parametrize("broken", ["write", "fsync", "copy", "first rename", "second rename"])
def test_a_disk_that_refuses_leaves_the_old_folder_and_says_so(tmp_path, monkeypatch, broken):
    out, renames = tmp_path / "out", []
    write(out, 1)
    (out / "log.jsonl").write_text("log")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def rename(path, target, really=Path.rename):
        renames.append(path)
        if len(renames) == ("first rename", "second rename").index(broken) + 1:
            full()
        return really(path, target)
    if broken in ("fsync", "copy"):
        monkeypatch.setattr(*{"fsync": (os, "fsync"), "copy": (shutil, "copy2")}[broken], full)
    elif "rename" in broken:
        monkeypatch.setattr(Path, "rename", rename)
    says = r"cannot write \S*out: No space left on device; what was there before is untouched"
    with pytest.raises(UserError, match=says), replace_folder(out) as tmp:
        (tmp / "model.safetensors").write_text("version 2")
        if broken == "write":
            full()
    monkeypatch.undo()
    assert version(out) == "version 1" and names(tmp_path) == {"out"} and "log.jsonl" in names(out)


@pytest.mark.parametrize("function, call", [
    ((os, "fsync"), 0), ((os, "fsync"), 2), ((Path, "rename"), 0), ((Path, "rename"), 1), ((shutil, "rmtree"), 0),
    ((shutil, "rmtree"), 1), ((shutil, "rmtree"), 2), ((shutil, "copy2"), 0)])
def test_a_kill_at_any_step_of_replacing_leaves_one_whole_version(tmp_path, monkeypatch, function, call):
    """Killed just before the given call; `rename` 1 is between the two renames."""
    out = tmp_path / "out"
    write(out, 1)
    (out / "log.jsonl").write_text("log")
    if os.fork() == 0:
        count, really = iter(range(99)), getattr(*function)

        def kill(*args, **kwargs):
            if next(count) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return really(*args, **kwargs)
        setattr(*function, kill)
        try:
            write(out, 2)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.wait()[1]) == signal.SIGKILL
    between = function == (Path, "rename") and call == 1
    assert out.exists() != between
    check_out(out)
    assert version(out) == ("version 2" if function[1] == "rmtree" and call == 2 else "version 1")
    assert (out / "log.jsonl").read_text() == "log"
    write(out, 3)
    assert version(out) == "version 3" and names(tmp_path) == {"out"}


def test_recovery_by_several_processes_at_once(tmp_path, monkeypatch):
    write(tmp_path / "out", 1)
    (tmp_path / "out").rename(runtime.beside(tmp_path / "out", ".old"))
    rename = Path.rename

    def slower(path, target):
        rename(path, target)                                           # the other process was faster
        return rename(path, target)
    monkeypatch.setattr(Path, "rename", slower)
    recover_folder(tmp_path / "out")
    assert version(tmp_path / "out") == "version 1"


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
