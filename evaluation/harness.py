"""Scores any checkpoint with lm-evaluation-harness: at full depth, at an earlier exit, or with an exit rule.

    python -m evaluation.harness --ckpt=out                                # the paper's seven tasks, downloaded
    python -m evaluation.harness --ckpt=out --exit_loop=1 --files=FOLDER   # after the first loop, from local files
    python -m evaluation.harness --ckpt=out_full --against=DONOR           # beside the harness' Hugging Face model

Prompts, shots, normalisation and metrics are the harness' own (pip install -e ".[eval]"); here is the model adapter.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import torch

from exits import Keys, Rule, RuleName, decode, load_rule, run_exits, score_exit
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
except ImportError:                                          # an error in main: --help works without
    lm_eval, TemplateLM = None, object

# The paper's seven tasks and wikitext, a perplexity: the folder of each in the harness, and the columns that it reads.
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

# Generation settings that a task may have: those that greedy decoding ignores, and those that change nothing at these
# values. Any other is an error.
IGNORED = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p", "seed"}
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1, "length_penalty": 1, "min_length": 0,
           "no_repeat_ngram_size": 0, "min_new_tokens": 0, "early_stopping": False, "use_cache": True}


@dataclass
class HarnessConfig:
    ckpt: str = "out"                  # checkpoint: one of ours, or a Hugging Face folder or id
    tasks: str = ",".join(SEVEN)       # tasks of the harness, separated by commas
    files: str | None = None           # folder with a file TASK.jsonl of each; not set: the harness downloads them
    limit: int = 0                     # only the first items of each task; 0: all
    exit_loop: int | None = None       # all tokens exit after this loop, counted from 1; not set: the last
    rule: RuleName | None = None       # or each token where this rule lets it exit
    threshold: float | None = None     # score from which a token exits, 0 to 1; not set: the calibrated one
    keys: Keys = "exact"               # KV of exited tokens: recomputed (exact), or copied from the exit loop
    batch: int = 16                    # requests side by side
    against: str | None = None         # also score this Hugging Face folder or id with the harness' own model
    save: str | None = None            # also append the JSON line to this file
    device: str = "auto"               # auto, cpu, cuda


# ---------------------------------------------------------------------------------------------------------------------
# The model adapter

class HarnessLM(TemplateLM):
    """The harness' interface to a model: log-likelihoods of continuations and of whole texts, and greedy text.

    Each token is scored at the exit where `rule` lets it exit (`run_exits`), also the first after a context, which
    `decode` predicts at full depth. n_exited: how many tokens were scored at each exit.
    """

    def __init__(self, model: RecursiveTransformer, tokenizer: Tokenizer, rule: Rule | None = None,
                 keys: Keys = "exact", batch: int = 16):
        super().__init__()
        self.model, self.rule, self.keys, self.batch = model, rule or Rule(), keys, batch
        self.text_tokenizer = tokenizer                      # self.tokenizer is for one of Hugging Face's
        self.n_exited = torch.zeros(model.config.n_loop, dtype=torch.long)

    @property
    def eot_token_id(self) -> int:
        return next(iter(self.text_tokenizer.eos_ids), None)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context: BOS, or else EOS."""
        prefix = self.eot_token_id if self.text_tokenizer.bos_id is None else self.text_tokenizer.bos_id
        if prefix is None:
            raise UserError("a text without a context needs a token before it: the tokenizer has neither BOS nor EOS")
        return prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Token ids, with BOS first if the tokenizer's template has it (Gemma, Llama) and the text does not."""
        ids, first = self.text_tokenizer.encode(string, special=True), self.text_tokenizer.first_id
        if first is None or add_special_tokens is False or (add_special_tokens is None and ids[:1] == [first]):
            return ids
        return [first, *ids]

    def loglikelihood(self, requests: list, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, True if greedy decoding gives it) for each request's (context, continuation).

        TemplateLM encodes both as one text, and moves spaces at the end of the context into the continuation.
        """
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood in nats of each request's whole text, in adjacent windows as long as the model's context."""
        texts = [[(None, *make_disjoint_window(window)) for window in get_rolling_token_windows(
            self.tok_encode(request.args[0]), self.prefix_token_id, self.model.config.n_ctx, 1)]
            for request in requests]
        found = iter(self._loglikelihood_tokens([window for text in texts for window in text]))
        return [sum(likelihood for likelihood, _ in islice(found, len(text))) for text in texts]

    def _loglikelihood_tokens(self, requests: list, **_) -> list[tuple[float, bool]]:
        """`loglikelihood` of requests (text, ids of the context, ids of the continuation).

        The longest come first, so that batches are of similar lengths and a lack of memory shows at once. Contexts that
        are too long are cut at the left.
        """
        n_ctx = self.model.config.n_ctx
        for text, _context, continuation in requests:
            if not 0 < len(continuation) <= n_ctx:
                raise UserError(f"a continuation of {len(continuation)} tokens cannot be scored ({text!r:.200}): the "
                                f"model's context is {n_ctx} tokens, and at least one is needed")
        answers: list = [None] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        with progress(total=len(requests), desc="scoring", unit="request") as bar:
            for batch in (order[i:i + self.batch] for i in range(0, len(order), self.batch)):
                # A context of spaces alone is empty: they have been moved into the continuation.
                rows = [((requests[i][1] or [self.prefix_token_id]) + requests[i][2])[-(n_ctx + 1):] for i in batch]
                for i, answer in zip(batch, self.score(rows, [len(requests[i][2]) for i in batch]), strict=True):
                    answers[i] = answer
                bar.update(len(batch))
        return answers

    @torch.no_grad()
    def score(self, rows: list[list[int]], counts: list[int]) -> list[tuple[float, bool]]:
        """The answers for texts of token ids, of each of which the last `counts` tokens are scored."""
        # Padding on the right changes nothing under causal attention.
        idx = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)   # (B, T + 1)
        scored = torch.zeros_like(idx[:, 1:], dtype=torch.bool)                                        # (B, T)
        for mask, row, n in zip(scored, rows, counts, strict=True):
            mask[len(row) - 1 - n:len(row) - 1] = True
        idx, scored = (t.to(self.model.embed.weight.device) for t in (idx, scored))
        states, exit_loop = run_exits(self.model, idx[:, :-1], self.rule, self.keys)
        targets = idx[:, 1:][scored]                                                                   # (N,)
        token, ce = score_exit(self.model, states[scored], targets, self.model.config.n_loop - 1)
        self.n_exited += torch.bincount(exit_loop[scored].cpu(), minlength=len(self.n_exited))
        return [(-nats.sum().item(), bool(same.all()))
                for nats, same in zip(ce.double().split(counts), (token == targets).split(counts), strict=True)]

    def summarize_exits(self) -> dict:
        """Mean loops, and the share of the scored tokens that exited after each; {} without exits or scored tokens."""
        if len(self.n_exited) == 1 or not self.n_exited.any():
            return {}
        share = self.n_exited / self.n_exited.sum().item()
        return {"loops": (share * torch.arange(1, len(share) + 1)).sum().item(), "left_at": share.tolist()}

    def generate_until(self, requests: list, disable_tqdm: bool = True) -> list[str]:
        """Greedy text after each request's context, up to the first of its stop strings or the end of the text."""
        return [self.generate(*request.args) for request in progress(requests, desc="generating", unit="request")]

    def generate(self, context: str, settings: dict) -> str:
        known, n_ctx = normalize_gen_kwargs(settings), self.model.config.n_ctx         # as the harness' own models do
        stops, n = list(filter(None, known["until"])), known["max_gen_toks"]
        unknown = {key for key, value in known.items()
                   if key not in IGNORED and value not in (None, NEUTRAL.get(key))}
        if known["do_sample"] or unknown:
            raise UserError(f"the task asks for sampling, or for unknown generation settings ({settings}): only greedy "
                            "decoding is possible")
        if n >= n_ctx:
            raise UserError(f"the task asks for {n} new tokens, but the model's context is {n_ctx}")
        ids = self.tok_encode(context)[-(n_ctx - n):] or [self.prefix_token_id]
        text, stream = "", TextStream(self.text_tokenizer, ids)
        idx = torch.tensor([ids], device=self.model.embed.weight.device)
        for token, _ in decode(self.model, idx, n, self.rule, self.keys, eos_id=self.text_tokenizer.eos_ids):
            if token in self.text_tokenizer.eos_ids:
                break
            text += stream.push(token.item())
            if any(stop in text for stop in stops):
                break
        text += stream.flush()
        return text[:min([len(text), *(text.find(stop) for stop in stops if stop in text)])]


# ---------------------------------------------------------------------------------------------------------------------
# Tasks, from the hub or from local files

def find_file(folder: str, task: str) -> Path:
    """The .jsonl file whose name begins with the task's, ignoring underscores: openbook_qa.jsonl, piqa_2000.jsonl."""
    def plain(name: str) -> str:
        return name.replace("_", "").lower()
    files = sorted(Path(folder).glob("*.jsonl"))
    found = [path for path in files if plain(path.stem).startswith(plain(task))] if task in LOCAL else []
    if len(found) != 1:
        raise UserError(f"--files={folder} needs one file {task}.jsonl for the task {task}, and has "
                        f"{', '.join(p.name for p in found or files) or 'none'}; local files work for "
                        f"{', '.join(LOCAL)}")
    return found[0]


def hub_columns(task: str, row: dict) -> dict:
    """A line of a local file with the columns that the harness reads.

    Lines that lack them are in the format of MosaicML's evaluation gauntlet: (query, choices, gold) for questions,
    (context, continuation) for LAMBADA, (context_options, continuation, gold) for WinoGrande.
    """
    if "context_options" in row:
        one, two = row["context_options"]
        n = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
        n = one.rfind(" ", 0, n) + 1                         # of the common prefix; the options are whole words
        return {"sentence": f"{one[:n]}_ {row['continuation']}", "option1": one[n:], "option2": two[n:],
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
    """The items of a local file. UserError for lines without the task's columns, which the harness would take as blank.
    """
    items = []
    for i, line in enumerate(read_text(path).split("\n")):   # JSON may contain other line breaks
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
    """The function that the harness calls instead of downloading: these items as every split."""
    return lambda **_: dict.fromkeys(("train", "validation", "test"), datasets.Dataset.from_list(items))


def load_tasks(names: list[str], files: str | None) -> dict:
    """The harness' tasks by name. UserError for unknown tasks and missing data."""
    local = {name: read_items(find_file(files, name), name) for name in names} if files else {}
    home = Path(lm_eval.tasks.__file__).parent
    known = set(names) <= set(LOCAL)                         # reading the whole index takes ten seconds
    manager = lm_eval.tasks.TaskManager(include_defaults=not known, include_path=[
        str(home / folder) for folder in sorted({LOCAL[name][0] for name in names})] if known else None)
    for name in names:
        if name not in manager.all_tasks:
            raise UserError(f"--tasks: the harness has no task {name!r}; the paper's are {', '.join(SEVEN)}")

    specs = names if not files else [{"group": "local", "task": [
        {"task": name, "custom_dataset": every_split(items)} for name, items in local.items()]}]
    try:
        return manager.load(specs)["tasks"]
    except Exception as e:                                   # datasets raises many types
        raise UserError(f"the harness cannot load its tasks ({type(e).__name__}: {str(e)[:300]}); without a network "
                        "give --files, a folder with a file TASK.jsonl of each") from e


def metric_name(key: str) -> str:
    """The harness' "acc,none" and "exact_match_stderr,strict-match" as "acc" and "exact_match,strict-match_stderr"."""
    metric, _, name = key.partition(",")
    base = metric.removesuffix("_stderr")
    return base + f",{name}" * (name not in ("", "none")) + metric[len(base):]


def run_task(lm, task, limit: int) -> tuple[dict, list[tuple]]:
    """(metrics by name, the model's answer to each of its requests: (log-likelihood, greedy) or (text, None))."""
    name = task.task_name
    task.set_fewshot_seed(DEFAULT_OTHER_SEED)                # these two as the harness' simple_evaluate does, which is
    if task.get_config("num_fewshot") is None:               # seconds slower: it collects facts about the machine
        task.set_config("num_fewshot", 0)
    results = lm_eval.evaluator.evaluate(lm, {"tasks": {name: task}}, limit=limit or None, bootstrap_iters=100)
    metrics = {metric_name(key): value for key, value in results["results"][name].items() if isinstance(value, float)}
    samples = results["samples"][name]                       # each document once per filter, with the same answers
    answers = [resps[0] for sample in samples if sample["filter"] == samples[0]["filter"] for resps in sample["resps"]]
    return ({"items": results["n-samples"][name]["effective"], "shots": results["n-shot"][name]} | metrics,
            [answer if isinstance(answer, tuple) else (answer, None) for answer in answers])


# ---------------------------------------------------------------------------------------------------------------------

def compare(ours: list[tuple], theirs: list[tuple]) -> dict:
    """Differences between two models' answers to the same requests."""
    assert len(ours) == len(theirs), (len(ours), len(theirs))
    difference = [abs(a - b) if isinstance(a, float) else float(a != b)
                  for (a, _), (b, _) in zip(ours, theirs, strict=True)]
    return {"requests": len(ours), "largest_difference": max(difference),
            "mean_difference": sum(difference) / len(difference),
            "other_greedy": sum(a[1] != b[1] for a, b in zip(ours, theirs, strict=True))}


def load_other(config: HarnessConfig, model: RecursiveTransformer):
    """The harness' own model of --against, in our model's dtype and on its device. UserError if it cannot be loaded."""
    from lm_eval.models.huggingface import HFLM
    try:
        return HFLM(config.against, dtype=str(model.embed.weight.dtype).removeprefix("torch."),
                    device=str(model.embed.weight.device), batch_size=config.batch)
    except Exception as e:                                   # transformers raises many types, over many lines
        why = " ".join(str(e).split())[:200]
        raise UserError(f"--against={config.against} cannot be loaded by transformers ({type(e).__name__}: {why}); "
                        "give a folder with a model and a tokenizer that it reads, such as tokenizer.json") from e


def find_rule(config: HarnessConfig, folder, model: RecursiveTransformer) -> Rule:
    name = config.rule or ("never" if config.exit_loop is None else "fixed")
    if (name == "fixed") != (config.exit_loop is not None):
        raise UserError(f"--rule={name} and --exit_loop={config.exit_loop} do not go together: give --exit_loop alone, "
                        "for all tokens to exit there, or another rule without it")
    if config.threshold is not None and name in ("never", "fixed"):
        raise UserError(f"--threshold={config.threshold} needs a rule that compares scores with it: --rule=gate, ...")
    if config.keys != HarnessConfig.keys and name == "never":
        raise UserError(f"--keys={config.keys} is about tokens that exit early, and none does: give --exit_loop or a "
                        "--rule as well")
    if name == "fixed" and model.config.n_loop == 1 == config.exit_loop:
        return Rule()                                        # the only exit is the last
    return load_rule(folder, model, name, config.threshold, config.exit_loop or 1, config.keys)


def show(rows: dict[str, dict]) -> str:
    """A line per task, with columns for the metrics that any of them has."""
    metrics = [key for key in dict.fromkeys(key for row in rows.values() for key in row)
               if isinstance(next(row[key] for row in rows.values() if key in row), float) and "_stderr" not in key]

    def cell(row: dict, key: str) -> str:
        error = row.get(f"{key}_stderr")
        return f"{row[key]:.4f}" + (f" ± {error:.4f}" if error else "") if key in row else ""
    lines = [[name, row["items"], row["shots"], *(cell(row, key) for key in metrics)] for name, row in rows.items()]
    return table([["task", "items", "shots", *metrics], *lines])


def main(argv=None) -> None:
    config = parse_args(HarnessConfig, argv)
    if lm_eval is None:
        raise UserError('the tasks need lm-evaluation-harness: pip install -e ".[eval]"')
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if config.limit < 0 or config.batch < 1:
        raise UserError(f"--limit={config.limit} must be 0 or more, --batch={config.batch} at least 1")
    check_writable("save", config.save)
    folder, device = find_donor(config.ckpt), pick_device(config.device)
    model = load_any(folder, None if device.type == "cuda" else torch.float32).to(device)
    lm = HarnessLM(model, Tokenizer.load(folder, model.config.vocab_size), find_rule(config, folder, model),
                   config.keys, config.batch)
    other = load_other(config, model) if config.against else None
    tasks = load_tasks(list(dict.fromkeys(config.tasks.split(","))), config.files)
    print0(f"{config.ckpt}: {model.config.n_loop} loops, rule {lm.rule.name}"
           + f", exit after loop {config.exit_loop}" * (config.exit_loop is not None))
    rows, theirs, differences = {}, {}, {}
    for name, task in progress(tasks.items(), desc="tasks", unit="task"):
        lm.n_exited.zero_()
        rows[name], answers = run_task(lm, task, config.limit)
        rows[name] |= lm.summarize_exits()
        if other:
            theirs[name], others = run_task(other, task, config.limit)
            differences[name] = compare(answers, others)
    print0(show(rows))
    numbers = {"what": "harness", "settings": asdict(config)} | run_info() | {"lm_eval": version("lm_eval")} | {
        "tasks": rows}
    if other:
        print0(f"\n{config.against}, by the harness' own model:\n{show(theirs)}\n")
        lines = [[name, *(f"{v:.2e}" if isinstance(v, float) else v for v in row.values())]
                 for name, row in differences.items()]
        print0(table([["task", *next(iter(differences.values()))], *lines]))
        numbers |= {"against": theirs, "apart": differences}
    print0(json_line(numbers))
    if config.save:
        append_line(config.save, numbers)


if __name__ == "__main__":
    script(main)
