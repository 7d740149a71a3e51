"""Any checkpoint scored as the field scores, by lm-evaluation-harness: at full depth, at an earlier exit, with a rule.

    python harness.py --ckpt=out                                # the paper's seven tasks, downloaded by the harness
    python harness.py --ckpt=out --exit_loop=1 --files=FOLDER   # after the first loop, from local files
    python harness.py --ckpt=out_full --against=DONOR           # beside the harness' own Hugging Face model

Prompts, shots, normalisation and metrics are the harness' (pip install -e ".[eval]"); here is the model that it asks.
(A few of its other tasks import the package evaluate, of whose name there is a file here: those will not run.)
"""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import torch

from exits import Keys, Rule, RuleName, at_exit, decode, load_rule, run_exits
from hf import load_any
from lib.cli import UserError, parse_args, print0, progress, script, table
from lib.donors import find_donor
from lib.results import append_line, check_writable, json_line
from lib.system import pick_device, run_info
from lib.tokenizer import TextStream, Tokenizer
from model import RecursiveTransformer

try:
    import datasets
    import lm_eval.evaluator
    import lm_eval.tasks
    from lm_eval.api.model import TemplateLM
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:                                          # named when it is needed: --help works without
    lm_eval, TemplateLM = None, object

# The paper's seven tasks, and one that takes the perplexity of any text: the folder of each in the harness, and the
# columns that it reads, as the data set has them on the Hugging Face hub.
SEVEN = ("lambada_openai", "hellaswag", "piqa", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
LOCAL = {
    "lambada_openai": ("lambada", {"text"}), "hellaswag": ("hellaswag", {"activity_label", "ctx_a", "ctx_b", "endings",
                                                                         "label"}),
    "piqa": ("piqa", {"goal", "sol1", "sol2", "label"}),
    "winogrande": ("winogrande", {"sentence", "option1", "option2", "answer"}),
    "arc_easy": ("arc", {"question", "choices", "answerKey"}),
    "arc_challenge": ("arc", {"question", "choices", "answerKey"}),
    "openbookqa": ("openbookqa", {"question_stem", "choices", "answerKey"}), "wikitext": ("wikitext", {"page"}),
}

# What a task may ask of its texts: settings that greedy text has no use for, and those that leave it as it is if they
# are as here. Any other is refused.
DRAWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p", "seed"}
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1, "length_penalty": 1, "min_length": 0,
           "no_repeat_ngram_size": 0, "min_new_tokens": 0, "early_stopping": False, "use_cache": True}


@dataclass
class HarnessConfig:
    ckpt: str = "out"                  # checkpoint: one of ours, or a Hugging Face folder or id
    tasks: str = ",".join(SEVEN)       # tasks of the harness, by comma
    files: str | None = None           # folder with a file TASK.jsonl of each; not set: the harness downloads its own
    limit: int = 0                     # the first so many items of each task; 0: all
    exit_loop: int | None = None       # all tokens leave after this loop, counted from 1; not set: after the last
    rule: RuleName | None = None       # or each token where this rule lets it
    threshold: float | None = None     # score from which a token leaves, 0 to 1; not set: as python exits.py found
    keys: Keys = "exact"               # keys of tokens that left: computed later, or copied from their exit loop
    batch: int = 16                    # requests side by side
    against: str | None = None         # also score this Hugging Face folder with the harness' own model, and compare
    save: str | None = None            # also append the JSON line to this file
    device: str = "auto"               # auto, cpu, cuda


# ---------------------------------------------------------------------------------------------------------------------
# The model that the harness asks

class HarnessLM(TemplateLM):
    """What the harness wants of a model: log-likelihoods of continuations and of whole texts, and greedy text.

    Each scored token comes out of the loop that `rule` lets it leave after (`run_exits`): also the first after a
    context, which `decode` always gives at full depth. left_at: how many left after each loop.
    """

    def __init__(self, model: RecursiveTransformer, tokenizer: Tokenizer, rule: Rule | None = None,
                 keys: Keys = "exact", batch: int = 16):
        super().__init__()
        self.model, self.words, self.rule, self.keys, self.batch = model, tokenizer, rule or Rule(), keys, batch
        self.left_at = torch.zeros(model.config.n_loop, dtype=torch.long)

    @property
    def eot_token_id(self) -> int:
        return self.words.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context is said to follow."""
        start = self.words.eos_id if self.words.bos_id is None else self.words.bos_id
        if start is None:
            raise UserError("a text without a context has nothing to follow: the tokenizer has neither BOS nor EOS")
        return start

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Ids, behind BOS where the tokenizer's template has it (Gemma, Llama) and the text does not say it itself."""
        ids, first = self.words.encode(string, special=True), self.words.first_id
        if first is None or add_special_tokens is False or (add_special_tokens is None and ids[:1] == [first]):
            return ids
        return [first, *ids]

    def loglikelihood(self, requests: list, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, would greedy decoding have said it) for each request's (context, continuation).

        The harness' own TemplateLM encodes both as one text, and counts a context's last spaces to the continuation.
        """
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood in nats of each request's whole text, in windows of the model's context side by side."""
        texts = [[(None, *make_disjoint_window(window)) for window in get_rolling_token_windows(
            self.tok_encode(request.args[0]), self.prefix_token_id, self.model.config.n_ctx, 1)]
            for request in requests]
        found = iter(self._loglikelihood_tokens([window for text in texts for window in text]))
        return [sum(likelihood for likelihood, _ in islice(found, len(text))) for text in texts]

    def _loglikelihood_tokens(self, requests: list, **_) -> list[tuple[float, bool]]:
        """Of (anything, ids of the context, ids of the continuation). Long ones first: a batch is of like lengths, and
        what does not fit into memory shows at once. What does not fit into the context goes at the left."""
        n_ctx, device = self.model.config.n_ctx, self.model.embed.weight.device
        for text, _context, continuation in requests:
            if not 0 < len(continuation) <= n_ctx:
                raise UserError(f"a continuation of {len(continuation)} tokens cannot be scored ({text!r:.200}): the "
                                f"model's context is {n_ctx} tokens, and at least one is needed")
        answers: list = [None] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        with progress(total=len(requests), desc="scoring", unit="request") as bar:
            for some in (order[i:i + self.batch] for i in range(0, len(order), self.batch)):
                # A context of spaces alone, which count to the continuation, is none.
                rows = [((requests[i][1] or [self.prefix_token_id]) + requests[i][2])[-(n_ctx + 1):] for i in some]
                counts = [len(requests[i][2]) for i in some]
                # Padded on the right, where causal attention does not look; nothing there is scored.
                idx = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
                scored = torch.zeros_like(idx[:, 1:], dtype=torch.bool)
                for row, ids, n in zip(scored, rows, counts, strict=True):
                    row[len(ids) - 1 - n:len(ids) - 1] = True
                for i, answer in zip(some, self.score(idx.to(device), scored.to(device), counts), strict=True):
                    answers[i] = answer
                bar.update(len(some))
        return answers

    @torch.no_grad()
    def score(self, idx: torch.Tensor, scored: torch.Tensor, counts: list[int]) -> list[tuple[float, bool]]:
        """Of texts idx (B, T + 1): the tokens whose places are marked, bool (B, T), so many in each row."""
        states, loops = run_exits(self.model, idx[:, :-1], self.rule, self.keys)
        targets = idx[:, 1:][scored]                                         # (N,)
        token, ce = at_exit(self.model, states[scored], targets, self.model.config.n_loop - 1)
        self.left_at += torch.bincount(loops[scored].cpu(), minlength=len(self.left_at))
        return [(-nats.sum().item(), bool(same.all()))
                for nats, same in zip(ce.double().split(counts), (token == targets).split(counts), strict=True)]

    def generate_until(self, requests: list, disable_tqdm: bool = True) -> list[str]:
        """Greedy text after each request's context, up to the first of its stop strings or the end of the text."""
        texts, n_ctx, device = [], self.model.config.n_ctx, self.model.embed.weight.device
        for request in progress(requests, desc="generating", unit="request"):
            context, given = request.args
            asked = normalize_gen_kwargs(given)              # as the harness' own models read the task's settings
            stops, n = list(filter(None, asked["until"])), asked["max_gen_toks"]
            other = {key for key, value in asked.items() if key not in DRAWN and value not in (None, NEUTRAL.get(key))}
            if asked["do_sample"] or other:
                raise UserError(f"the task asks for drawn text, or by other settings than are known here ({given}): "
                                "only greedy text is made")
            if n >= n_ctx:
                raise UserError(f"the task asks for {n} new tokens, but the model's context is {n_ctx}")
            ids = self.tok_encode(context)[-(n_ctx - n):] or [self.prefix_token_id]
            text, out = "", TextStream(self.words, ids)
            for token, _ in decode(self.model, torch.tensor([ids], device=device), n, self.rule, self.keys,
                                   eos_id=self.words.eos_ids):
                if token in self.words.eos_ids or any(stop in text for stop in stops):
                    break
                text += out.push(token.item())
            text += out.flush()
            texts.append(text[:min([len(text), *(text.find(stop) for stop in stops if stop in text)])])
        return texts


# ---------------------------------------------------------------------------------------------------------------------
# Tasks, from the hub or from local files

def find_file(folder: str, task: str) -> Path:
    """The .jsonl file whose name begins with the task's, underscores aside: openbook_qa.jsonl, hellaswag_2000.jsonl."""
    def plain(name: str) -> str:
        return name.replace("_", "").lower()
    there = sorted(Path(folder).glob("*.jsonl"))
    found = [path for path in there if plain(path.stem).startswith(plain(task))] if task in LOCAL else []
    if len(found) != 1:
        raise UserError(f"--files={folder} needs one file {task}.jsonl for the task {task}, and has "
                        f"{', '.join(p.name for p in found or there) or 'none'}; local files can be had for "
                        f"{', '.join(LOCAL)}")
    return found[0]


def hub_columns(task: str, row: dict) -> dict:
    """A line of a local file in the columns that the harness reads, which it may have already.

    Else it is in the form that MosaicML's evaluation gauntlet has spread: (query, choices, gold) for a question, with
    (context, continuation) for LAMBADA and (context_options, continuation, gold) for WinoGrande.
    """
    if "context_options" in row:
        one, two = row["context_options"]
        same = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
        same = one.rfind(" ", 0, same) + 1                   # the options are whole words
        return {"sentence": f"{one[:same]}_ {row['continuation']}", "option1": one[same:], "option2": two[same:],
                "answer": str(row["gold"] + 1)}
    if "continuation" in row:
        return {"text": f"{row['context']} {row['continuation']}"}
    if not {"query", "choices", "gold"} <= row.keys():
        return row
    question, choices = row["query"].removeprefix("Question: ").removesuffix("\n"), row["choices"]
    if task == "piqa":
        return {"goal": question, "sol1": choices[0], "sol2": choices[1], "label": row["gold"]}
    labels = [chr(ord("A") + i) for i in range(len(choices))]
    return {"question_stem" if task == "openbookqa" else "question": question,
            "choices": {"text": choices, "label": labels}, "answerKey": labels[row["gold"]]}


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {path} ({e}); give a UTF-8 file with a line of JSON per item") from None


def read_items(path: Path, task: str) -> list[dict]:
    """The items of a local file. UserError for lines that the task could not read: it would take blanks for them."""
    items = []
    for i, line in enumerate(read_text(path).split("\n")):   # JSON may hold other ends of lines
        if not line.strip():
            continue
        try:
            items.append(hub_columns(task, json.loads(line)))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as e:
            raise UserError(f"line {i + 1} of {path} cannot be read ({type(e).__name__}: {e})") from None
        if lacks := LOCAL[task][1] - items[-1].keys():
            raise UserError(f"line {i + 1} of {path} lacks {', '.join(sorted(lacks))}: it needs the columns of the "
                            f"data set on the hub, {', '.join(sorted(LOCAL[task][1]))}, or query, choices and gold")
    if not items:
        raise UserError(f"{path} is empty: give a line of JSON per item")
    return items


def every_split(items: list[dict]) -> Callable:
    """What the harness calls instead of downloading: whichever split a task asks for, it gets these items."""
    return lambda **_: dict.fromkeys(("train", "validation", "test"), datasets.Dataset.from_list(items))


def load_tasks(names: list[str], files: str | None) -> dict:
    """The harness' tasks by name. UserError for those it does not know, and for data that are not there."""
    local = {name: read_items(find_file(files, name), name) for name in names} if files else {}
    home = Path(lm_eval.tasks.__file__).parent
    known = set(names) <= set(LOCAL)                         # reading the whole index takes ten seconds
    manager = lm_eval.tasks.TaskManager(include_defaults=not known, include_path=[
        str(home / folder) for folder in sorted({LOCAL[name][0] for name in names})] if known else None)
    for name in names:
        if name not in manager.all_tasks:
            raise UserError(f"--tasks: the harness has no task {name!r}; the paper's are {', '.join(SEVEN)}")

    asked = names if not files else [{"group": "local", "task": [
        {"task": name, "custom_dataset": every_split(items)} for name, items in local.items()]}]
    try:
        return manager.load(asked)["tasks"]
    except Exception as e:                                   # datasets raises many kinds for "not to be had"
        raise UserError(f"the harness cannot load its tasks ({type(e).__name__}: {str(e)[:300]}); without a network "
                        "give --files, a folder with a file TASK.jsonl of each") from e


def run_task(lm, task, limit: int) -> tuple[dict, list[tuple]]:
    """(figures by name, (log-likelihood, would greedy decoding say it) of each of its requests)."""
    name = task.task_name
    task.set_fewshot_seed(DEFAULT_OTHER_SEED)                # these two as its own simple_evaluate does, which takes
    if task.get_config("num_fewshot") is None:               # seconds more to find out about the machine
        task.set_config("num_fewshot", 0)
    done = lm_eval.evaluator.evaluate(lm, {"tasks": {name: task}}, limit=limit or None, bootstrap_iters=100)
    figures = {key.removesuffix(",none"): value for key, value in done["results"][name].items()
               if key.endswith(",none") and isinstance(value, float)}
    answers = [resps[0] for sample in done["samples"][name] for resps in sample["resps"]]
    return ({"items": done["n-samples"][name]["effective"], "shots": done["n-shot"][name]} | figures,
            [answer if isinstance(answer, tuple) else (answer, None) for answer in answers])


# ---------------------------------------------------------------------------------------------------------------------

def compare(ours: list[tuple], theirs: list[tuple]) -> dict:
    """How far two models' answers to the same requests are apart."""
    assert len(ours) == len(theirs), (len(ours), len(theirs))
    apart = [abs(a - b) if isinstance(a, float) else float(a != b)
             for (a, _), (b, _) in zip(ours, theirs, strict=True)]
    return {"requests": len(ours), "largest_difference": max(apart), "mean_difference": sum(apart) / len(apart),
            "other_greedy": sum(a != b for (_, a), (_, b) in zip(ours, theirs, strict=True))}


def load_other(config: HarnessConfig, model: RecursiveTransformer):
    """The harness' own model of --against, in the dtype and on the device of ours. UserError where it cannot be had."""
    from lm_eval.models.huggingface import HFLM
    try:
        return HFLM(config.against, dtype=str(model.embed.weight.dtype).removeprefix("torch."),
                    device=str(model.embed.weight.device), batch_size=config.batch)
    except Exception as e:                                   # transformers raises many kinds, over many lines
        why = " ".join(str(e).split())[:200]
        raise UserError(f"--against={config.against} cannot be loaded by transformers ({type(e).__name__}: {why}); "
                        "give a folder with a model and a tokenizer that it reads, such as tokenizer.json") from e


def find_rule(config: HarnessConfig, folder, model: RecursiveTransformer) -> Rule:
    name = config.rule or ("never" if config.exit_loop is None else "fixed")
    if (name == "fixed") != (config.exit_loop is not None):
        raise UserError(f"--rule={name} and --exit_loop={config.exit_loop} do not go together: give --exit_loop alone, "
                        "for all tokens to leave there, or another rule without it")
    if config.threshold is not None and name in ("never", "fixed"):
        raise UserError(f"--threshold={config.threshold} needs a rule that compares scores with it: --rule=gate, ...")
    if config.keys != HarnessConfig.keys and name == "never":
        raise UserError(f"--keys={config.keys} is about tokens that leave early, and none does: give --exit_loop or a "
                        "--rule as well")
    if name == "fixed" and model.config.n_loop == 1 == config.exit_loop:
        return Rule()                                        # its one exit is the last
    return load_rule(folder, model, name, config.threshold, config.exit_loop or 1, config.keys)


def show(rows: dict[str, dict]) -> str:
    """A line per task; columns for the figures that any of them has."""
    figures = [key for key in dict.fromkeys(key for row in rows.values() for key in row)
               if isinstance(next(row[key] for row in rows.values() if key in row), float) and "_stderr" not in key]

    def cell(row: dict, key: str) -> str:
        error = row.get(f"{key}_stderr")
        return f"{row[key]:.4f}" + (f" ± {error:.4f}" if error else "") if key in row else ""
    lines = [[name, row["items"], row["shots"], *(cell(row, key) for key in figures)] for name, row in rows.items()]
    return table([["task", "items", "shots", *figures], *lines])


def main(argv=None) -> None:
    config = parse_args(HarnessConfig, argv)
    if lm_eval is None:
        raise UserError('the tasks need lm-evaluation-harness: pip install -e ".[eval]"')
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if config.limit < 0 or config.batch < 1:
        raise UserError(f"--limit={config.limit} must be 0 or more, --batch={config.batch} at least 1")
    check_writable("save", config.save)
    folder, device = find_donor(config.ckpt), pick_device(config.device)
    dtype = None if device.type == "cuda" else torch.float32
    model = load_any(folder, dtype).to(device)
    lm = HarnessLM(model, Tokenizer.load(folder, model.config.vocab_size), find_rule(config, folder, model),
                   config.keys, config.batch)
    other = None
    if config.against:
        other = load_other(config, model)
    tasks = load_tasks(list(dict.fromkeys(config.tasks.split(","))), config.files)
    print0(f"{config.ckpt}: {model.config.n_loop} loops, rule {lm.rule.name}"
           + f", exit after loop {config.exit_loop}" * (config.exit_loop is not None))
    rows, theirs, apart = {}, {}, {}
    for name, task in progress(tasks.items(), desc="tasks", unit="task"):
        lm.left_at.zero_()
        rows[name], answers = run_task(lm, task, config.limit)
        if (scored := lm.left_at.sum().item()) and model.config.n_loop > 1:
            left = lm.left_at / scored
            rows[name] |= {"loops": (left * torch.arange(1, len(left) + 1)).sum().item(), "left_at": left.tolist()}
        if other:
            theirs[name], others = run_task(other, task, config.limit)
            apart[name] = compare(answers, others)
    print0(show(rows))
    numbers = {"what": "harness", "settings": asdict(config)} | run_info() | {"lm_eval": version("lm_eval")} | {
        "tasks": rows}
    if other:
        print0(f"\n{config.against}, by the harness' own model:\n{show(theirs)}\n")
        print0(table([["task", *next(iter(apart.values()))]] + [
            [name, *(f"{v:.2e}" if isinstance(v, float) else v for v in row.values())] for name, row in apart.items()]))
        numbers |= {"against": theirs, "apart": apart}
    print0(json_line(numbers))
    if config.save:
        append_line(config.save, numbers)


if __name__ == "__main__":
    script(main)
