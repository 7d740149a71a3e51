"""Folders that hold a checkpoint: how one is replaced safely, and how two processes are kept from writing in it.

Replacing. A checkpoint is several files that belong together, and a process may be killed between any two of them.
The folder itself cannot be swapped for a new one, since it may be a mount point or somebody's current folder, and may
hold other files (a log). So its files are replaced one by one, but from a complete copy:

    1. `replace_folder` lets the caller write the new files into the subfolder .new, and flushes them to the disk.
    2. With `keep`, the old files get a second name (a hard link) in the subfolder .previous.
    3. .new is renamed .next. This one rename is the moment at which the new checkpoint replaces the old one.
    4. `finish_replacement` renames .previous to `previous`, in place of the checkpoint kept before, links each file of
       .next over the old file of its name, and deletes .next at the end.

With `keep`, from the second save on, two complete checkpoints share no file: damage to one of them leaves the other.
A kill before 3 leaves the old checkpoint; the next owner deletes .previous, and the next writer .new. A kill after 3
leaves .next, which is complete; the next owner of the folder repeats 4. Files of the folder that are not in the new
checkpoint stay, except those that would be wrong beside it: the rest of another tokenizer, and a gate or thresholds
made for other weights.

Reading. A reader takes the folder that `settled` returns: .next if there is one, otherwise the folder itself. If
another process is in the middle of 4, `settled` waits a second for it. A reader never writes.

Locking. `own_folder` holds a lock of the operating system (flock) on the file .lock inside. It ends when the process
does, also by a kill, so that no stale lock can remain; the text in the file only names the owner in error messages.
"""

import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from lib.cli import UserError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.tiktoken", "tokenizer.model", "tokenizer_config.json",
                   "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt",
                   "chat_template.jinja", "chat_template.json", "additional_chat_templates", "generation_config.json")
GATE_FILE, THRESHOLDS_FILE = "gate.safetensors", "exits.json"  # made for the weights beside them (exits.py)
CODE_FILES = ("model.py", "modeling_nanorrt.py")  # of a looped export (lib/export.py)

# In a folder: unfinished files; a complete checkpoint; the next folder `previous`, and the last one; the lock.
NEW, NEXT, HALF, OLD, LOCK = ".new", ".next", ".previous", ".old", ".lock"


@contextmanager
def own_folder(folder):
    """A context in which no other process writes in `folder`, which is made if it is missing; yields its resolved path.
    Finishes a replacement that a kill interrupted. UserError if another process owns it, or if it cannot be written.
    """
    folder = Path(folder).resolve()                          # links may change during a run, its place must not
    if folder in OWNED:
        yield folder
        return
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; --out needs a folder that is new, empty or a checkpoint")
    made = []                                                # folders to remove at the end if they are still empty
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        lock = take_lock(folder)
    except OSError as e:
        remove_empty(made)
        raise UserError(f"cannot write in {folder} ({e.strerror}); give a folder that may be written to") from None
    OWNED.add(folder)
    try:
        finish_replacement(folder)
        yield folder
    finally:
        OWNED.discard(folder)
        if same_file(lock, folder / LOCK):
            (folder / LOCK).unlink()
        os.close(lock)
        remove_empty(made)


OWNED: set[Path] = set()                                     # by this process


def take_lock(folder: Path) -> int:
    """The descriptor of .lock, locked by this process. UserError if another process holds it."""
    for _ in range(100):
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(lock, 300, 0).decode(errors="replace") or "another process"
            os.close(lock)
            raise UserError(f"{owner} is writing in {folder}: wait until it ends, or give another --out") from None
        except OSError:                                      # a file system without locks: go on without one
            pass
        if same_file(lock, folder / LOCK):
            break
        os.close(lock)                                       # its last owner has removed it: lock the new one
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return lock


def same_file(descriptor: int, path: Path) -> bool:
    """True if `path` is the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def remove_empty(folders: list[Path]) -> None:
    """Remove these nested folders, innermost first, up to the first that is not empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


@contextmanager
def replace_folder(folder, keep: bool = False):
    """A context that yields an empty folder; at its end, the files in it replace those in `folder` (see the top).

    After an error, or a full disk, `folder` is unchanged. keep: the old checkpoint of a run is kept in the subfolder
    `previous`.
    """
    with own_folder(folder) as folder:
        if not keep:                                         # a run has done this at its start
            check_out(folder)
        new = folder / NEW
        try:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            yield new
            for path in (*new.rglob("*"), new):
                if path.is_file():
                    path.chmod(new.stat().st_mode & 0o666)   # safetensors lets only the owner read its files
                flush(path)
            if keep and (folder / "train.pt").exists():      # only a whole checkpoint is worth keeping
                keep_files(folder)
            new.rename(folder / NEXT)
        except BaseException as e:
            shutil.rmtree(new, ignore_errors=True)
            if isinstance(e, (OSError, SafetensorError)):
                reason = getattr(e, "strerror", None) or e
                raise UserError(f"cannot write {folder}: {reason}; what was there before is untouched") from e
            raise
        try:
            finish_replacement(folder)
        except OSError as e:
            raise UserError(f"cannot finish {folder} ({e.strerror}): all of it is in {folder / NEXT}, and the next "
                            "command that writes there will finish it") from e


def keep_files(folder: Path) -> None:
    """Fill .previous with the files of `folder`: hard links, and a copy of the log, which is still written to."""
    half = folder / HALF
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir()
    for path in folder.iterdir():
        if path.is_file() and not path.name.startswith("."):
            (shutil.copy2 if path.suffix == ".jsonl" else link)(path, half / path.name)
        elif path.name in TOKENIZER_FILES:                   # a folder of chat templates
            shutil.copytree(path, half / path.name)
    flush(half)


def finish_replacement(folder: Path) -> None:
    """Replace the files of `folder` by those of .next, if there is one; also after a kill in the middle of this."""
    ready, new, half, kept, old = (folder / name for name in (NEXT, NEW, HALF, "previous", OLD))
    if not ready.exists():
        shutil.rmtree(half, ignore_errors=True)              # perhaps incomplete
        return
    if half.exists():                                        # complete, since it was made before .next
        if kept.exists():
            shutil.rmtree(old, ignore_errors=True)
            kept.rename(old)
        half.rename(kept)
    shutil.rmtree(old, ignore_errors=True)
    names = {path.name for path in ready.iterdir()}
    stale = {GATE_FILE, THRESHOLDS_FILE, *CODE_FILES, *(TOKENIZER_FILES if names & set(TOKENIZER_FILES) else ()),
             *(() if "train.pt" in names else ("train.pt", "previous"))} - names
    subfolders = {path.name for path in ready.iterdir() if path.is_dir()}
    for path in (new, *(folder / name for name in stale | subfolders)):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    for path in filter(Path.is_file, ready.rglob("*")):      # links, so that .next stays complete until the end
        place = folder / path.relative_to(ready)
        place.parent.mkdir(exist_ok=True)
        link(path, new)
        os.replace(new, place)
        new.unlink(missing_ok=True)                          # os.replace does nothing if both are the same file
    flush(folder)
    ready.rename(new)
    shutil.rmtree(new, ignore_errors=True)


def link(path: Path, other: Path) -> None:
    """Make `other` a hard link to `path`, or a copy on file systems without hard links."""
    try:
        os.link(path, other, follow_symlinks=False)
    except OSError:
        other.unlink(missing_ok=True)
        shutil.copy2(path, other, follow_symlinks=False)


def flush(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def settled(folder) -> Path:
    """The folder to read the checkpoint in `folder` from: itself, or .next inside if a replacement was interrupted. A
    replacement that is going on is waited for. Nothing is written: the owner might be writing at the same time."""
    folder, tries = Path(folder), 50
    while (folder / NEXT).exists() and tries:
        time.sleep(0.02)
        tries -= 1
    return folder / NEXT if (folder / NEXT).exists() else folder


def check_out(folder) -> None:
    """Raise UserError if `folder` holds anything but a checkpoint of this project, so that no other files are lost."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; --out needs a folder that is new, empty or a checkpoint")
    held = sorted(p.name for p in folder.iterdir()) if folder.exists() else []
    held = [name for name in held if not name.startswith(".") and name != "lost+found"]  # made by mkfs
    damaged = (folder / "train.pt").exists() and is_ours(folder / "previous")  # --resume=auto repairs it
    if held and not is_ours(settled(folder)) and not damaged:
        raise UserError(f"{folder} holds something that is not a checkpoint of this project ({', '.join(held[:3])}); "
                        "give a folder that is new, empty or such a checkpoint")


def is_ours(folder: Path) -> bool:
    """True if this project wrote the checkpoint in `folder`, in its own format or in Hugging Face's."""
    try:
        config = json.loads((folder / "config.json").read_text())
        return "nanoRRT" in (config.get("format"), config.get("exported_by"))
    except (OSError, ValueError, AttributeError):
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Single files

def replace_file(path: Path, content: bytes) -> None:
    """Write a file atomically: after a crash it has the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.tmp")
    with open(tmp, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)


def write_beside(folder, name: str, write: Callable[[Path], object]) -> None:
    """Add a file to a checkpoint, completely or not at all. UserError where it cannot be written (a full disk)."""
    tmp = Path(folder) / f".{name}.tmp"
    try:
        write(tmp)
        flush(tmp)
        os.replace(tmp, Path(folder) / name)
    except BaseException as e:
        tmp.unlink(missing_ok=True)
        if isinstance(e, (OSError, SafetensorError)):
            raise UserError(f"cannot write {Path(folder) / name} ({e}); what was there before is untouched") from e
        raise
