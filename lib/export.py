"""What lies beside the weights of an export to transformers: the model card; and with a looped model, which loads with
trust_remote_code=True, its code: modeling_nanorrt.py as it is, and model.py without what needs our other files."""

import ast
import re
import shutil
from dataclasses import asdict
from pathlib import Path

from lib.donors import DONOR_README, HUB_ID, LICENCES
from lib.results import read_lines

LIB = Path(__file__).resolve().parent
CLASSES = {"AutoConfig": "modeling_nanorrt.NanoRRTConfig",
           "AutoModelForCausalLM": "modeling_nanorrt.NanoRRTForCausalLM"}
NOT_COPIED = {"__post_init__", "save", "write", "load", "read_config", "row_kernels"}  # checks, checkpoints, the engine


def looped_config(c, dtype: str) -> dict:
    """The config.json of a looped model with the settings `c` and weights of this dtype."""
    return {"model_type": "nanorrt", "architectures": ["NanoRRTForCausalLM"], "auto_map": CLASSES,
            "exported_by": "nanoRRT", "dtype": dtype, "pad_token_id": c.extra.get("pad_token_id")} | {
        name: value for name, value in asdict(c).items() if name != "extra"}


def write_code(folder: Path) -> None:
    """Write the code of a looped model into `folder`."""
    shutil.copyfile(LIB / "modeling_nanorrt.py", folder / "modeling_nanorrt.py")
    source = (LIB.parent / "model.py").read_text(encoding="utf-8")
    (folder / "model.py").write_text(standalone(source), encoding="utf-8")


def standalone(source: str) -> str:
    """The source of model.py without the imports of our other files and what uses them: transformers copies a file only
    if it is imported relatively, and takes any other for a package that has to be installed."""
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        ours = isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "lib"
        if ours or getattr(node, "name", None) in NOT_COPIED or (
                isinstance(node, ast.If) and "row_kernels" in ast.unparse(node)):
            first = min(part.lineno for part in (node, *getattr(node, "decorator_list", ()))) - 1
            while not lines[first - 1].strip() or lines[first - 1].lstrip().startswith("#"):
                first -= 1                                               # empty lines and the comment above it
            lines[first:node.end_lineno] = [""] * (node.end_lineno - first)
    start, note = lines.index("@dataclass\n"), "# nanoRRT's model.py, without checks and checkpoints"
    return "".join([*lines[:start], f"UserError = ValueError  {note}\n\n\n", *lines[start:]])


# ---------------------------------------------------------------------------------------------------------------------
# The model card

def model_card(c, share: float | None, folder: Path, source: Path) -> str:
    """The README.md of an export; its licence is the one that README_donor.md in `folder` names.

    share: parameters stored in the block of a looped model, over those of the donor's; None for a full-size one.
    source: the checkpoint that is exported; the losses are from the log beside it, if there is one.
    """
    donor = c.extra.get("_name_or_path", "an unnamed donor")
    files = sorted(path.name for name in (*LICENCES, DONOR_README) for path in folder.glob(name))
    readme = (folder / DONOR_README).read_text(encoding="utf-8", errors="replace") if DONOR_README in files else ""
    front = re.match(r"---\n(.*?\n)---\n", readme, re.S)
    lines = re.findall(r"^license(?:_name|_link)?:.*$", front[1] if front else "", re.M)
    lines += [f"base_model: {donor}"] * bool(re.fullmatch(HUB_ID, donor))
    lines += ["library_name: transformers", "pipeline_tag: text-generation"] * bool(share)
    donor = donor if re.fullmatch(HUB_ID, donor) else Path(donor).name
    looped = {"n_loop": c.n_loop, "rank": c.rank} if share else c.extra.get("recursive")
    what = (f"A Relaxed Recursive Transformer of {looped['n_loop']} loops and LoRA rank {looped['rank']}, made from "
            f"{donor}{'' if share else ' and written out at full size'}" if looped else donor)
    how = f"{c.n_layer} layers, which transformers loads like any other {c.arch} model.\n\n" if not share else (
        f"a block of {c.n_unique} layers that runs {c.n_loop} times for each token. It stores {share:.1%} of the "
        "parameters of the donor's block. transformers, from version 5 on, loads it with the code beside it:\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n```\n\n")
    return "".join(f"{line}\n" for line in ["---", *lines, "---", ""] if lines) + (
        f"# {what}\n\nnanoRRT wrote this folder: {how}{loss_table(source)}The donor's licence applies to it. "
        f"Copied along: {', '.join(files) or 'no file of the donor'}.\n")


def loss_table(run: Path) -> str:
    """The losses of the donor and of the model before and after training, from the log of a run; empty if it has none.
    """
    log = read_lines(run / "log.jsonl")
    start = next((line for line in log if "donor_loss" in line), {})
    final = next((line for line in reversed(log) if line.get("final")), {})
    losses = {"donor": start.get("donor_loss"), "before training": start.get("full_val_loss"),
              "after training": final.get("full_val_loss")}
    rows = "".join(f"| {name} | {loss:.4f} |\n" for name, loss in losses.items() if loss is not None)
    return f"|  | validation loss, nats per token |\n|---|---|\n{rows}\n" if rows else ""
