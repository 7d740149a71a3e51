"""Folders that are replaced whole, and the lock that gives a run's folder one owner."""


import fcntl
import json
import os
import shutil
import socket
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from lib.cli import UserError

# ---------------------------------------------------------------------------------------------------------------------
# Folders that are replaced whole

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.tiktoken", "tokenizer.model", "tokenizer_config.json",
                   "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt",
                   "chat_template.jinja", "chat_template.json", "additional_chat_templates", "generation_config.json")
GATE_FILE, THRESHOLDS_FILE = "gate.safetensors", "exits.json"  # made for the weights beside them (rules.py)


# Inside a folder: half written; whole but not in place; what becomes the folder previous, and was it; who owns it all.
NEW, NEXT, HALF, OLD, LOCK = ".new", ".next", ".previous", ".old", ".lock"


@contextmanager
def own_folder(folder):
    """Keep other processes from writing in `folder`, which is made if need be; its resolved path. UserError if another
    process owns it, and says which, or if nothing can be written there.

    The lock is the system's, on a file inside, and ends with its process, however that ends.
    """
    folder = Path(folder).resolve()                          # the place stays the same, whatever becomes of links
    if folder in OWNED:
        yield folder
        return
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; --out needs a folder that is new, empty or a checkpoint")
    made = []                                                # and removed again if nothing came to be in them
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


OWNED: set[Path] = set()                                     # folders that this process owns


def take_lock(folder: Path) -> int:
    """The descriptor of the file whose lock this process now holds. UserError if another does."""
    for _ in range(100):
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(lock, 300, 0).decode(errors="replace") or "another process"
            os.close(lock)
            raise UserError(f"{owner} is writing in {folder}: wait until it ends, or give another --out") from None
        except OSError:                                      # a file system without locks: then without
            pass
        if same_file(lock, folder / LOCK):
            break
        os.close(lock)                                       # its owner has just removed it
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return lock


def same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):                                  # the first that holds something ends it
        for folder in folders:
            folder.rmdir()


@contextmanager
def replace_folder(folder, keep: bool = False):
    """Yield an empty folder; when the block ends, its files replace those in `folder`. On an error all stays as it was.

    A kill at any moment leaves all of the old files or all of the new: the new ones are written to the folder .new
    inside, flushed to the disk, and .new is renamed .next. From then on they count: `settled` finds them, and
    `finish_replacement` puts them in place, now or, after a kill, when the folder has an owner again. Nothing but the
    files inside is ever renamed, so that `folder` may be a mount point, or somebody's current folder. What the block
    did not write (a log, a folder inside) stays, but nothing of an old tokenizer beside a new, and no gate of other
    weights.
    keep: a run's checkpoint that is replaced stays in the folder previous inside.
    """
    with own_folder(folder) as folder:
        if not keep:                                         # a run did so when it began
            check_out(folder)
        new = folder / NEW
        try:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            yield new
            for path in (*new.iterdir(), new):
                if path.is_file():
                    path.chmod(new.stat().st_mode & 0o666)   # safetensors makes its files readable by their owner alone
                flush(path)
            if keep and (folder / "train.pt").exists():      # an empty folder could not be gone back to
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
    """Let folder/previous hold what `folder` does now: the same files under a second name, but a log, which grows."""
    half, kept, old = folder / HALF, folder / "previous", folder / OLD
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir()
    for path in folder.iterdir():
        if path.is_file() and not path.name.startswith("."):
            (shutil.copy2 if path.suffix == ".jsonl" else link)(path, half / path.name)
    flush(half)
    shutil.rmtree(old, ignore_errors=True)
    if kept.exists():
        kept.rename(old)
    half.rename(kept)
    shutil.rmtree(old, ignore_errors=True)


def finish_replacement(folder: Path) -> None:
    """Put the files of folder/.next, if there is one, in place; where a kill ended that before, again."""
    ready, new = folder / NEXT, folder / NEW
    if (folder / HALF).exists() and not (folder / "previous").exists():
        (folder / HALF).rename(folder / "previous")
    if not ready.exists():
        return
    names = {path.name for path in ready.iterdir()}
    stale = {GATE_FILE, THRESHOLDS_FILE, *(TOKENIZER_FILES if names & set(TOKENIZER_FILES) else ()),
             *(() if "train.pt" in names else ("train.pt", "previous"))} - names
    for path in (new, *(folder / name for name in stale)):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    for name in names:                                       # linked, not moved: .next stays whole to the end
        link(ready / name, new)
        os.replace(new, folder / name)
        new.unlink(missing_ok=True)                          # what was in place already is not even renamed
    flush(folder)
    ready.rename(new)
    shutil.rmtree(new, ignore_errors=True)


def link(path: Path, other: Path) -> None:
    """A second name for a file; a copy on file systems that know no such thing."""
    try:
        os.link(path, other, follow_symlinks=False)
    except OSError:
        other.unlink(missing_ok=True)
        shutil.copy2(path, other, follow_symlinks=False)


def flush(path: Path) -> None:
    """See to it that a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def settled(folder) -> Path:
    """Where to read the checkpoint in `folder`: there, or inside if a replacement was killed before its end. One that
    is being finished is waited for. A reader never writes: what it mended, the owner could be writing."""
    folder, tries = Path(folder), 50
    while (folder / NEXT).exists() and tries:
        time.sleep(0.02)
        tries -= 1
    return folder / NEXT if (folder / NEXT).exists() else folder


def check_out(folder) -> None:
    """Raise UserError if `folder` holds anything that is not a checkpoint, so that nobody's files are replaced."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; --out needs a folder that is new, empty or a checkpoint")
    held = sorted(p.name for p in folder.iterdir()) if folder.exists() else []
    held = [name for name in held if not name.startswith(".") and name != "lost+found"]  # a new disk's
    damaged = (folder / "train.pt").exists() and is_ours(folder / "previous")  # what --resume=auto mends
    if held and not is_ours(settled(folder)) and not damaged:
        raise UserError(f"{folder} holds something that is not a checkpoint of this project ({', '.join(held[:3])}); "
                        "give a folder that is new, empty or such a checkpoint")


def is_ours(folder: Path) -> bool:
    """True if this project wrote the checkpoint in `folder`: its own kind, or an export to Hugging Face's."""
    try:
        config = json.loads((folder / "config.json").read_text())
        return "nanoRRT" in (config.get("format"), config.get("exported_by"))
    except (OSError, ValueError, AttributeError):
        return False
