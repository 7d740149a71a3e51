"""Finding a donor, and the files that accompany its weights: tokenizer, README, licence."""

import json
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from lib.cli import UserError
from lib.folders import settled
from lib.tokenizer import copy_tokenizer

HUB_ID = r"\w[\w.-]*/\w[\w.-]*"  # owner/name
DONOR_README = "README_donor.md"
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def find_donor(donor: str) -> Path:
    """The folder of a donor: a local one, or the download of a Hugging Face id. UserError if neither."""
    folder = Path(donor).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(HUB_ID, str(donor)):
        raise UserError(f"donor {donor} does not exist; give a folder with config.json and model.safetensors, "
                        "or a Hugging Face id like EleutherAI/pythia-160m")
    from huggingface_hub import snapshot_download
    try:
        wanted = ["*.json", "*.safetensors", "*.tiktoken", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt",
                  "README.md", *LICENCES]
        return Path(snapshot_download(donor, allow_patterns=wanted, ignore_patterns=["*/*", "consolidated*"]))
    except Exception as e:  # the hub client raises many kinds
        why = str(e).partition("\n")[0]
        raise UserError(f"donor {donor} is not a folder, and cannot be downloaded either ({why}); give a local folder"
                        ) from None


def donor_name(folder: Path) -> str:
    """The Hugging Face id that a folder was downloaded from, otherwise the folder's name."""
    folder = folder.resolve()
    cached = folder.parent.parent.name if folder.parent.name == "snapshots" else ""
    return cached.removeprefix("models--").replace("--", "/", 1) or folder.name


def read_json(path: Path) -> dict:
    """The contents of a JSON file. Raises UserError if it is missing or damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}; a donor has config.json and model.safetensors") from None
    except (OSError, ValueError, TypeError) as e:
        raise UserError(f"{path} is not readable JSON ({e})") from None


def copy_papers(src: Path, dst: Path) -> None:
    """Copy the donor's licence, and its README as README_donor.md, from it or from a model made of it."""
    src = settled(src)
    readme, config = src / DONOR_README, src / "config.json"
    if not readme.exists() and config.exists() and "model_type" in read_json(config):
        readme = src / "README.md"
    for path in (*(path for name in LICENCES for path in src.glob(name)), readme):
        if path.is_file():
            shutil.copyfile(path, dst / (DONOR_README if path == readme else path.name))


def donor_files(folder: Path) -> dict[str, bytes]:
    """{name: content} of the files that go with a donor's weights, held in memory."""
    with TemporaryDirectory() as tmp:
        copy_tokenizer(folder, tmp)
        copy_papers(folder, Path(tmp))
        return {str(path.relative_to(tmp)): path.read_bytes() for path in Path(tmp).rglob("*") if path.is_file()}
