"""evaluation/harness.py: its answers against the harness' own Hugging Face model, and against plain computations."""

import json
import math

import pytest
import torch
from tiny import story

from convert import to_hf
from evaluation import harness
from evaluation.harness import SEVEN, HarnessLM, hub_columns
from exits import Rule, decode
from hf import load_any
from lib.cli import UserError
from lib.tokenizer import Tokenizer
from model import Config, RecursiveTransformer

needs = pytest.mark.skipif(harness.lm_eval is None, reason="lm_eval is not installed")


def write_tokenizer(folder, bos: bool) -> None:
    """A tokenizer.json of bytes and some merges, whose template begins each text with <s> or does not."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers
    fast = Fast(models.BPE())
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast.train_from_iterator([story(0, 200)], trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if bos:
        fast.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}))


def write_donor(folder, bos: bool):
    """A Llama of random weights, none left as it was made, with a context of 32 tokens."""
    torch.manual_seed(0)
    model = RecursiveTransformer(Config(arch="llama", vocab_size=304, n_layer=2, n_embd=16, n_head=4, n_kv_head=2,
                                        head_dim=8, n_hidden=32, n_ctx=32, bos_token_id=0, eos_token_id=1))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    to_hf(model, folder)
    write_tokenizer(folder, bos)
    return folder


@pytest.fixture(scope="module")
def donor(tmp_path_factory):
    return write_donor(tmp_path_factory.mktemp("donor") / "llama", bos=False)


@pytest.fixture(scope="module")
def looped(tmp_path_factory):
    """A checkpoint of three loops, with LoRA."""
    folder = tmp_path_factory.mktemp("looped") / "ckpt"
    torch.manual_seed(1)
    model = RecursiveTransformer(Config(vocab_size=300, n_layer=6, n_loop=3, rank=2, n_embd=16, n_head=2, head_dim=8,
                                        n_hidden=32, n_ctx=32))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model.save(folder)
    write_tokenizer(folder, bos=False)
    return folder


PAIRS = [  # context, continuation: of many lengths, so that sorting and padding show
    ("The cat sees", " a mouse."), ("The cat sees ", "a mouse."), ("The cat  ", " the bread"), ("", "A dog"),
    ("My aunt", " finds her garden. My aunt loves some gold"), ("<s>The old king", " eats"), ("", "<s>"), ("x", "y"),
    (story(3, 40), " The cat"), (story(4, 3), story(5, 1)), ("The old king é", "té ü"), ("", "<s>A dog")]


def requests(kind: str, arguments: list):
    from lm_eval.api.instance import Instance
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def adapter(folder, dtype=torch.float64, **settings) -> HarnessLM:
    model = load_any(folder, dtype)
    return HarnessLM(model, Tokenizer.load(folder, model.config.vocab_size), **settings)


# ---------------------------------------------------------------------------------------------------------------------
# The model adapter

@needs
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-5), (torch.float32, 1e-4)])  # its norms stay in fp32
def test_log_likelihoods_are_those_of_the_harness_own_model(tmp_path, bos, dtype, atol):
    from lm_eval.models.huggingface import HFLM
    folder = write_donor(tmp_path / "llama", bos)
    ours = adapter(folder, dtype, batch=4)
    theirs = HFLM(str(folder), dtype=str(dtype).removeprefix("torch."), device="cpu", batch_size=4)
    pairs = [pair for pair in PAIRS if pair != ("", "<s>")]  # nothing to score: refused by both
    want, got = (lm.loglikelihood(requests("loglikelihood", pairs)) for lm in (theirs, ours))
    for pair, (a, greedy), (b, same) in zip(pairs, want, got, strict=True):
        assert b == pytest.approx(a, abs=atol) and greedy == same, pair
    texts = [("The cat",), (story(6, 20),), (story(7, 9),), ("<s>A dog",)]
    want, got = (lm.loglikelihood_rolling(requests("loglikelihood_rolling", texts)) for lm in (theirs, ours))
    assert got == pytest.approx(want, abs=10 * atol)


@needs
def test_greedy_is_true_for_the_text_of_greedy_decoding(donor):
    lm = adapter(donor)
    text = lm.generate_until(requests("generate_until", [("The cat sees", {"until": [], "max_gen_toks": 6})]))[0]
    ids = lm.tok_encode("The cat sees")
    with torch.no_grad():
        for _ in range(6):
            ids.append(lm.model.logits(lm.model(torch.tensor([ids]))[-1])[0, -1].argmax().item())
    assert text == lm.text_tokenizer.decode(ids[-6:])
    encoded = [(None, ids[:-6], ids[-6:]), (None, ids[:-6], [*ids[-6:-1], (ids[-1] + 1) % 300])]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(encoded)] == [True, False]


@needs
def test_greedy_text_is_the_harness_own_models(donor):
    from lm_eval.models.huggingface import HFLM
    theirs, ours = HFLM(str(donor), dtype="float64", device="cpu", batch_size=1), adapter(donor)
    long = ours.generate_until(requests("generate_until", [("The cat", {"max_gen_toks": 20, "until": "\0"})]))[0]
    asked = [("The cat", {"until": [long[5:7], "<never>"], "max_gen_toks": 20}), ("A dog", {"max_gen_toks": 9}),
             (story(8, 20), {"until": ["."], "max_gen_toks": 12}), ("My aunt", {"until": "a", "max_gen_toks": 25})]
    want, got = (lm.generate_until(requests("generate_until", asked)) for lm in (theirs, ours))
    assert got == want and got[0] == long[:long.index(long[5:7])]
    for refused in ({"do_sample": True}, {"temperature": 0.5}, {"num_beams": 4}, {"repetition_penalty": 1.5},
                    {"min_new_tokens": 9}, {"do_sample": True, "temperature": 0}):
        with pytest.raises(UserError, match="asks for sampling"):
            ours.generate_until(requests("generate_until", [("A", refused)]))
    with pytest.raises(UserError, match="256 new tokens, but the model's context is 32"):
        ours.generate_until(requests("generate_until", [("A", {})]))


@needs
@pytest.mark.parametrize("given", [
    {"until": None, "max_new_tokens": 7}, {"max_tokens": 7}, {"max_completion_tokens": 7, "until": "\0"},
    {"max_gen_toks": 7, "max_new_tokens": 3}, {"do_sample": False, "temperature": 1, "max_gen_toks": 7},
    {"max_gen_toks": 7, "top_p": 0.9, "num_beams": 1, "repetition_penalty": 1.0}, {"max_gen_toks": "7", "until": [""]}])
def test_every_spelling_of_a_tasks_settings_is_read(donor, given):
    lm = adapter(donor)
    text, want = (lm.generate_until(requests("generate_until", [("The cat", kwargs)]))[0]
                  for kwargs in (given, {"until": [], "max_gen_toks": 7}))
    assert text == want != ""


@needs
def test_any_end_of_text_ends_it(donor, monkeypatch):
    lm = adapter(donor)
    ids = [token.item() for token, _ in decode(lm.model, torch.tensor([lm.tok_encode("The cat")]), 12)]
    monkeypatch.setattr(lm.text_tokenizer, "eos_ids", (1, ids[4]))
    ended = lm.generate_until(requests("generate_until", [("The cat", {"max_gen_toks": 12})]))[0]
    assert ended == lm.text_tokenizer.decode(ids[:ids.index(ids[4])]) != lm.text_tokenizer.decode(ids)


@needs
def test_logits_that_are_not_finite_are_an_error(donor):
    lm = adapter(donor)
    lm.model.norm.weight.data[0] = math.nan
    for kind, args in (("loglikelihood", ("The", " cat")), ("generate_until", ("The", {"max_gen_toks": 4}))):
        with pytest.raises(UserError, match="not finite"):
            getattr(lm, kind)(requests(kind, [args]))


@needs
def test_each_exit_and_rule_scores_what_comes_out_there(looped):
    """Text by text, without padding."""
    from exits import run_exits
    model, pairs = load_any(looped, torch.float64), [pair for pair in PAIRS if pair[0]]
    tokenizer = Tokenizer.load(looped, 300)
    for rule, keys in ((Rule(), "exact"), (Rule("fixed", exit_loop=0), "exact"), (Rule("fixed", exit_loop=1), "exact"),
                       (Rule("max_prob", 0.06), "exact"), (Rule("max_prob", 0.06), "copy")):
        lm, n_exited = HarnessLM(model, tokenizer, rule, keys, batch=5), [0] * 3
        got = lm.loglikelihood(requests("loglikelihood", pairs))
        for (context, continuation), (likelihood, _) in zip(pairs, got, strict=True):
            before, after = lm._encode_pair(context, continuation)
            ids = torch.tensor([(before + after)[-33:]])
            with torch.no_grad():
                states, loops = run_exits(model, ids[:, :-1], rule, keys)
                if keys == "exact":                          # those of the full model, at the exit loops
                    states = torch.stack(model(ids[:, :-1]))[loops[0], 0, torch.arange(ids.size(1) - 1)][None]
                logs = model.logits(states)[0].log_softmax(-1)
            n = len(after)
            want = sum(logs[i, ids[0, i + 1]].item() for i in range(ids.size(1) - 1 - n, ids.size(1) - 1))
            assert likelihood == pytest.approx(want, abs=1e-9), (rule.name, keys, context)
            for loop in loops[0, -n:].tolist():
                n_exited[loop] += 1
        assert lm.n_exited.tolist() == n_exited
        assert (rule.name == "max_prob") == (min(n_exited[0], n_exited[2]) > 5)


@needs
def test_a_context_of_spaces_is_empty(donor):
    one, other = adapter(donor).loglikelihood(requests("loglikelihood", [("\n", "\n\nA dog"), ("", "\n\n\nA dog")]))
    assert one == other and one[0] < -1


@needs
def test_continuations_of_a_wrong_length_are_refused(donor):
    lm = adapter(donor)
    for context, continuation in (("The cat", ""), ("A", story(0, 30)), ("", "<s>")):
        with pytest.raises(UserError, match="cannot be scored .* context is 32 tokens"):
            lm.loglikelihood(requests("loglikelihood", [("a", "b"), (context, continuation)]))


# ---------------------------------------------------------------------------------------------------------------------
# Local files

QUESTION = {"query": "Question: Which is red?\n", "choices": ["a rose", "the sea"], "gold": 0}
PLAIN = {  # a line of each task in the gauntlet's form, the same in the hub's, and the requests that the harness makes
    "lambada_openai": ({"context": "He text  \"no\" to", "continuation": "her"}, {"text": "He text  \"no\" to her"},
                       [("He text  \"no\" to", " her")]),
    "piqa": (QUESTION, {"goal": "Which is red?", "sol1": "a rose", "sol2": "the sea", "label": 0},
             [("Question: Which is red?\nAnswer:", f" {c}") for c in QUESTION["choices"]]),
    "arc_easy": (QUESTION | {"query": "Question: Which is red?"},
                 {"question": "Which is red?", "choices": {"text": ["a rose", "the sea"], "label": ["A", "B"]},
                  "answerKey": "A"}, [("Question: Which is red?\nAnswer:", f" {c}") for c in QUESTION["choices"]]),
    "openbookqa": (QUESTION | {"query": "Red is"},
                   {"question_stem": "Red is", "choices": {"text": ["a rose", "the sea"], "label": ["A", "B"]},
                    "answerKey": "A"}, [("Red is", " a rose"), ("Red is", " the sea")]),
    "winogrande": ({"context_options": ["Sarah met Maria so Sarah", "Sarah met Maria so Samantha"], "gold": 1,
                    "continuation": "was glad."},
                   {"sentence": "Sarah met Maria so _ was glad.", "option1": "Sarah", "option2": "Samantha",
                    "answer": "2"},
                   [("Sarah met Maria so Sarah", " was glad."), ("Sarah met Maria so Samantha", " was glad.")]),
    "hellaswag": (None, {"activity_label": "Roofs", "ctx_a": "A man sits.", "ctx_b": "he", "ctx": "A man sits. he",
                         "endings": ["is up.", "is  [sub] down."], "label": "1", "ind": 24, "split": "val"},
                  [("Roofs: A man sits. He", " is up."), ("Roofs: A man sits. He", " is  down.")]),
    "wikitext": (None, {"page": "The cat sees a mouse."}, [("The cat sees a mouse.",)]),
}
PLAIN["arc_challenge"] = PLAIN["arc_easy"]
FILES = {"openbookqa": "openbook_qa.jsonl", "hellaswag": "hellaswag_2000.jsonl"}


def write_files(folder, form: int):
    folder.mkdir()
    for task, line in PLAIN.items():
        text = json.dumps(line[form] or line[1]) + "\n"
        (folder / FILES.get(task, f"{task}.jsonl")).write_text(text * 3)
    return folder


@pytest.mark.parametrize("task", PLAIN)
def test_lines_of_either_form_become_the_hubs(task):
    plain, hub, _ = PLAIN[task]
    assert hub_columns(task, hub) == hub == hub_columns(task, plain or hub)


@needs
@pytest.mark.parametrize("form", [0, 1])
def test_local_files_become_the_harness_own_requests(tmp_path, form):
    tasks = harness.load_tasks(list(PLAIN), str(write_files(tmp_path / "files", form)))
    assert list(tasks) == list(PLAIN)
    for name, task in tasks.items():
        task.set_config(key="num_fewshot", value=0)
        task.build_all_requests(limit=1)
        assert [request.args for request in task.instances] == PLAIN[name][2], name


@needs
def test_a_bad_local_file_is_named(tmp_path):
    folder = write_files(tmp_path / "files", 1)

    def refused(says, *names):
        with pytest.raises(UserError, match=says):
            harness.load_tasks(list(names), str(folder))
    refused("needs one file mmlu.jsonl for the task mmlu, .*local files work for lambada_openai", "mmlu")
    (folder / "piqa_train.jsonl").write_text("{}")
    refused("needs one file piqa.jsonl .* and has piqa.jsonl, piqa_train.jsonl", "arc_easy", "piqa")
    (folder / "arc_easy.jsonl").unlink()
    refused("needs one file arc_easy.jsonl", "arc_easy")
    for text, says in (('{"goal": "a"}', "lacks label, sol1, sol2: it needs the columns"), ("{", "JSONDecodeError"),
                       ("[1]", "AttributeError"), (" \n", "is empty"),
                       ('{"query": "a", "choices": ["b"], "gold": 0}', "line 1 of .*piqa.jsonl .*IndexError")):
        (folder / "piqa_train.jsonl").unlink(missing_ok=True)
        (folder / "piqa.jsonl").write_text(text)
        refused(says, "piqa")


# ---------------------------------------------------------------------------------------------------------------------
# The script

def run(capsys, *flags) -> tuple[str, dict]:
    harness.main([*flags, "--device=cpu"])
    *shown, line = capsys.readouterr().out.splitlines()
    return "\n".join(shown), json.loads(line, parse_constant=pytest.fail)


@needs
def test_all_tasks_beside_the_harness_own_model(donor, tmp_path, capsys):
    files = write_files(tmp_path / "files", 0)
    shown, numbers = run(capsys, f"--ckpt={donor}", f"--files={files}", f"--tasks={','.join(PLAIN)}", "--limit=2",
                         f"--against={donor}", f"--save={tmp_path}/lines.jsonl")
    assert json.loads((tmp_path / "lines.jsonl").read_text()) == numbers
    assert list(numbers["tasks"]) == list(numbers["against"]) == list(numbers["apart"]) == list(PLAIN)
    for name, row in numbers["tasks"].items():
        assert row["items"] == 2 and row["shots"] == 0 and name in shown
        theirs = numbers["against"][name]
        for part, value in row.items():
            # The items are equal, so their perplexity's standard error is fp32's rounding of the perplexity, about 1e8.
            rounding = 1e-6 * row["perplexity"] if part == "perplexity_stderr" else 1e-6
            assert value == pytest.approx(theirs[part], rel=1e-4, abs=rounding), part
        assert row.keys() == theirs.keys()
        apart = numbers["apart"][name]
        assert apart["largest_difference"] < 1e-4 and apart["other_greedy"] == 0
        assert apart["requests"] == 2 * len(PLAIN[name][2])
    assert {"acc", "acc_stderr", "acc_norm"} <= numbers["tasks"]["piqa"].keys()
    assert {"acc", "perplexity"} <= numbers["tasks"]["lambada_openai"].keys()
    lm = adapter(donor)
    context, continuation = PLAIN["lambada_openai"][2][0]
    (likelihood, _), = lm.loglikelihood(requests("loglikelihood", [(context, continuation)]))
    assert numbers["tasks"]["lambada_openai"]["perplexity"] == pytest.approx(math.exp(-likelihood), rel=1e-4)


@needs
def test_a_task_with_named_filters_keeps_all_metrics_and_each_answer_once(monkeypatch):
    """As the harness gives those of gsm8k: each document once per filter."""
    samples = [{"filter": name, "resps": [[answer]]} for name in ("strict-match", "flexible-extract")
               for answer in ("one", "two")]
    found = {"alias": "gsm8k", "exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": 0.1,
             "exact_match,flexible-extract": 0.75, "exact_match_stderr,flexible-extract": 0.2, "acc,none": 0.25}
    monkeypatch.setattr(harness.lm_eval.evaluator, "evaluate", lambda *_, **__: {
        "results": {"gsm8k": found}, "samples": {"gsm8k": samples}, "n-samples": {"gsm8k": {"effective": 2}},
        "n-shot": {"gsm8k": 5}})

    class Task:
        task_name = "gsm8k"

        def set_fewshot_seed(self, _):
            pass

        def get_config(self, _):
            return 5
    row, answers = harness.run_task(None, Task(), 2)
    assert answers == [("one", None), ("two", None)] and row == {
        "items": 2, "shots": 5, "exact_match,strict-match": 0.5, "exact_match,strict-match_stderr": 0.1,
        "exact_match,flexible-extract": 0.75, "exact_match,flexible-extract_stderr": 0.2, "acc": 0.25}
    assert "0.5000 ± 0.1000" in harness.show({"gsm8k": row}) and "0.7500 ± 0.2000" in harness.show({"gsm8k": row})


@needs
def test_exit_loop_and_rule_are_applied(looped, tmp_path, capsys):
    files = write_files(tmp_path / "files", 1)
    found = {}
    for flag in ("--keys=exact", "--exit_loop=1", "--exit_loop=3", "--rule=max_prob --threshold=0.06"):
        shown, numbers = run(capsys, f"--ckpt={looped}", f"--files={files}", "--tasks=lambada_openai", *flag.split())
        found[flag] = numbers["tasks"]["lambada_openai"]
        assert f"{found[flag]['loops']:.4f}" in shown
    full, first, last, some = found.values()
    assert full == last and full["loops"] == 3 and full["left_at"] == [0, 0, 1]
    assert first["loops"] == 1 and first["perplexity"] != pytest.approx(full["perplexity"], rel=1e-3)
    assert 1 <= some["loops"] <= 3 and full["items"] == 3


def test_a_mistake_is_named_before_any_work(looped, donor, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "run_task", lambda *_: pytest.fail("work was done"))

    def refused(says, *flags):
        with pytest.raises(UserError, match=says):
            harness.main([f"--ckpt={looped}", "--device=cpu", *flags])
    if harness.lm_eval is not None:
        refused("--limit=-1 must be 0 or more", "--limit=-1")
        refused("--batch=0 at least 1", "--batch=0")
        refused("cannot be written", f"--save={tmp_path}/nowhere/a.jsonl")
        refused("--exit_loop=4, but the model has the loops 1 to 3", "--exit_loop=4")
        refused("do not go together", "--exit_loop=1", "--rule=gate")
        refused("do not go together", "--rule=fixed")
        refused("needs a rule that compares scores", "--threshold=0.5")
        refused("has no gate", "--rule=gate")
        refused("--keys=copy is about tokens that exit early", "--keys=copy")
        refused("--against=.* cannot be loaded by transformers", f"--against={tmp_path}")
        refused("no calibrated threshold of max_prob", "--rule=max_prob")
        refused("needs one file hellaswag.jsonl", f"--files={tmp_path}", "--tasks=hellaswag")
        refused("donor .* does not exist", f"--ckpt={tmp_path}/nothing")
    monkeypatch.setattr(harness, "lm_eval", None)
    refused("need lm-evaluation-harness: pip install -e", f"--tasks={SEVEN[0]}")
