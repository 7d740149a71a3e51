"""bench.py: that it measures what it says, on equal terms, and names a mistake before any work."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_model import ARCHS, SMALL, randomise, tokens

import bench
import bench_training
from bench_training import NaiveObjective, TransformersObjective, apart, measure_layer, measure_loss
from convert import to_hf
from lib.cli import UserError
from lib.system import peak_memory
from lib.tokenizer import Tokenizer
from model import Config, Layer, RecursiveTransformer, RelaxedLinear
from train import Objective, TrainConfig

ROOT = Path(bench.__file__).parent
CONFIG = Config(**SMALL | ARCHS["llama"])
TINY = ["--seq_len=16", "--micro_batch=2", "--steps=1", "--device=cpu"]


@pytest.fixture(scope="module")
def donor(tmp_path_factory):
    """The flag for a tiny donor; of its folder the benchmarks of training need but the settings."""
    folder = tmp_path_factory.mktemp("donor")
    to_hf(RecursiveTransformer(CONFIG), folder)
    return f"--donor={folder}"


def run(monkeypatch, capsys, *flags) -> dict:
    """What bench.py prints at its end, measured in this process."""
    monkeypatch.setattr(bench_training, "apart", lambda measure, *args: measure(*args))
    bench.main([*TINY, *flags])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def assert_measured(rows, rounds=1):
    for row in rows:
        assert row["tokens_per_s"] > 0 and row["mfu"] > 0 and row["peak_gib"] > 0, row
        assert len(row["seconds"]) == rounds and row["seconds"] == sorted(row["seconds"])


def test_training_is_measured_case_by_case(donor, monkeypatch, capsys):
    pytest.importorskip("transformers")
    peaks = []
    monkeypatch.setattr(bench_training, "peak_flops", lambda *_: peaks.append(1e9) or 1e9)
    numbers = run(monkeypatch, capsys, "--what=train", donor, "--loops=2", "--ranks=0,3", "--rounds=2", "--layers=4")
    rows = numbers["rows"]
    assert_measured(rows, rounds=2)
    assert peaks == [1e9]                                        # measured once, the same for all
    assert numbers["shape"]["n_layer"] == 4 and numbers["tokens_per_step"] == 32
    cases = [("transformers", 1, 0), ("ours, naive loss", 1, 0), ("ours", 1, 0), ("ours", 2, 0), ("ours", 2, 3)]
    assert [(r["code"], r["loops"], r["rank"]) for r in rows] == 2 * cases
    assert [r["distill"] for r in rows] == 5 * [False] + 5 * [True]
    for _, naive, chunked, *_ in (rows[:5], rows[5:]):           # the same weights: the same loss after two updates
        assert chunked["loss"] == pytest.approx(naive["loss"], rel=1e-5)
    assert rows[7]["loss"] > rows[2]["loss"] + 1e-4              # distillation comes on top
    want = RecursiveTransformer(replace(CONFIG, n_layer=4)).flops(16)
    assert [r["flops_per_token"] for r in rows] == 5 * [3 * want] + 5 * [4 * want]
    assert all(r["mfu"] == pytest.approx(r["tokens_per_s"] * r["flops_per_token"] / 1e9) for r in rows)


def test_tokenising_is_measured_beside_the_tokenizer_alone(monkeypatch, capsys, tmp_path):
    text = (ROOT / "assets/books/valid.txt").read_text()
    (tmp_path / "a.txt").write_text(text[:5000])
    (tmp_path / "b.txt").write_text(text[5000:6000])
    numbers = run(monkeypatch, capsys, "--what=tokenise", f"--donor={ROOT}/assets/donor", f"--text={tmp_path}",
                  "--rounds=2")
    tokenizer = Tokenizer.load(ROOT / "assets/donor")
    assert numbers["documents"] == 2 and [len(s) for s in numbers["seconds"].values()] == [2, 2]
    assert numbers["tokens"] == 2 + sum(map(len, tokenizer.encode_batch([text[:5000], text[5000:6000]])))
    assert numbers["ratio"] == pytest.approx(numbers["tokens_per_s"]["data.py"]
                                             / numbers["tokens_per_s"]["tokenizer alone"])


def test_the_loss_is_measured_beside_the_naive_one(donor, monkeypatch, capsys):
    rows = run(monkeypatch, capsys, "--what=loss", donor)["rows"]
    assert_measured(rows)
    assert [(r["code"], r["distill"], r["tokens"]) for r in rows] == [
        (code, distill, n) for distill in (False, True) for code, n in (("chunked", 32), ("naive", 8))]
    whole = [measure_loss(bench.BenchConfig(steps=1, device="cpu"), CONFIG, r | {"tokens": 32})["loss"] for r in rows]
    assert whole[0] == pytest.approx(whole[1], rel=1e-5) and whole[2] == pytest.approx(whole[3], rel=1e-5)
    assert whole[2] > whole[0] + 1e-4
    peaks = [r["tokens_per_s"] * r["flops_per_token"] / r["mfu"] for r in rows]  # of a quarter of the tokens, too
    assert peaks == pytest.approx(4 * [peaks[0]])
    assert rows[1]["tokens_per_s"] == rows[1]["tokens"] / rows[1]["seconds"][0]
    assert rows[1]["added_gib_at_all"] == 4 * rows[1]["added_gib"]


def test_a_layer_with_lora_is_measured_path_by_path(donor, monkeypatch, capsys):
    numbers = run(monkeypatch, capsys, "--what=lora", donor, "--ranks=0,3")
    assert_measured(numbers["rows"])
    assert [(r["path"], r["rank"]) for r in numbers["rows"]] == [("merged", 0), ("merged", 3), ("separate", 3)]
    assert numbers["rows"][1]["loss"] == pytest.approx(numbers["rows"][2]["loss"], rel=1e-4)


@torch.no_grad()
def test_an_exit_decision_is_measured_with_all_that_it_needs(donor, monkeypatch, capsys):
    asked = {"head": 0, "block": 0}
    def counting(name, method):
        def count(*args):
            asked[name] += 1
            return method(*args)
        return count
    monkeypatch.setattr(RecursiveTransformer, "logits", counting("head", RecursiveTransformer.logits))
    monkeypatch.setattr(RecursiveTransformer, "block", counting("block", RecursiveTransformer.block))
    numbers = run(monkeypatch, capsys, "--what=decision", donor, "--rows=1,3", "--vocab_sizes=50,70")
    assert [(row["vocab_size"], row["batch"]) for row in numbers["rows"]] == [(50, 1), (50, 3), (70, 1), (70, 3)]
    assert all(row[name] > 0 for row in numbers["rows"] for name in ("block", "head", "max_prob", "gate"))
    assert asked["head"] == 4 * asked["block"] > 0              # by itself, and for each rule but the gate


def test_the_separate_path_is_the_same_map():
    layer = randomise(Layer(replace(CONFIG, n_loop=2, rank=3, attn_bias=True, vectors="per_loop")))
    for linear in (m for m in layer.modules() if isinstance(m, RelaxedLinear)):
        x = torch.randn(2, 50, linear.weight.size(1))
        torch.testing.assert_close(bench_training.separate(linear, x, 1), linear(x, 1))


def test_a_case_without_the_memory_says_so_and_the_others_go_on(donor, monkeypatch, capsys):
    def measure(measure, config, shape, case):
        return {"error": "out of memory"} if case["rank"] else measure(config, shape, case)
    monkeypatch.setattr(bench_training, "apart", measure)
    bench.main([*TINY, "--what=lora", donor, "--ranks=3", "--rounds=2"])
    printed = capsys.readouterr().out
    first, *others = json.loads(printed.splitlines()[-1])["rows"]
    assert_measured([first], rounds=2)
    assert [row["error"] for row in others] == 2 * ["out of memory"] and "tokens_per_s" not in others[0]
    assert printed.count("out of memory") == 4                   # in the table, and in the line


# ---------------------------------------------------------------------------------------------------------------------
# On equal terms

@pytest.mark.parametrize("arch", ARCHS)
def test_transformers_trains_the_same_model_on_the_same_loss(arch, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = randomise(RecursiveTransformer(replace(CONFIG, **ARCHS[arch]))).train()
    to_hf(ours, tmp_path)
    theirs = TransformersObjective(ours.config)
    theirs.model.load_state_dict(transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict())
    assert theirs.training and all(p.dtype == torch.float32 and p.requires_grad for p in theirs.parameters())
    assert sum(p.numel() for p in theirs.parameters()) == ours.num_params()["stored"]
    idx, targets = tokens(2, 9), tokens(3, 9)[1:]
    teacher = torch.randn(2, 9, 8), torch.randn(CONFIG.vocab_size, 8)
    for given in (None, teacher):
        args = TrainConfig(distill="fkl" if given else "none")
        losses = [f(idx, targets, given) for f in (Objective(ours, args), NaiveObjective(ours, args), theirs)]
        for loss, ce in losses[1:]:
            torch.testing.assert_close(loss, losses[0][0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(ce, losses[0][1], atol=1e-5, rtol=1e-5)
        by_ours, by_theirs = (torch.autograd.grad(loss, m.parameters()) for (loss, _), m in
                              ((losses[0], ours), (losses[2], theirs)))
        norms = [torch.stack([g.norm() for g in gs]).norm() for gs in (by_ours, by_theirs)]
        torch.testing.assert_close(*norms, atol=1e-5, rtol=1e-4)


def test_compiled_transformers_writes_out_no_mask():
    pytest.importorskip("transformers")
    masks = []

    def look(graph, inputs):
        masks.extend(node.kwargs.get("attn_mask") for node in graph.graph.nodes
                     if node.target is F.scaled_dot_product_attention)
        return graph
    theirs = TransformersObjective(replace(CONFIG, n_layer=1))
    torch._dynamo.reset()
    torch.compile(theirs, backend=look)(tokens(2, 9), tokens(2, 9), None)
    assert masks == [None]


# ---------------------------------------------------------------------------------------------------------------------
# Processes of their own

def test_a_case_runs_in_a_process_of_its_own_which_may_die():
    assert apart(os.getpid) != os.getpid()
    assert apart(os.abort) == {"error": "killed"}


def test_memory_that_is_not_there_is_an_error_of_the_case():
    assert apart(torch.empty, 2**50) == {"error": "out of memory"}


def test_a_measurement_comes_back_from_its_process():
    ballast = b"x" * 2**29                                       # half a GiB that is not the other process'
    config = bench.BenchConfig(seq_len=16, micro_batch=2, steps=3, device="cpu")
    row = apart(measure_layer, config, CONFIG, {"rank": 3, "path": "separate"})
    assert row.keys() == {"seconds", "loss", "peak_gib"} and len(row["seconds"]) == 3
    assert 0.05 < row["peak_gib"] < peak_memory(torch.device("cpu")) - len(ballast) / 2**31


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes

@pytest.mark.parametrize("what", ["train", "lora"])
@pytest.mark.parametrize("flag, message", [
    ("--ranks=full", "--ranks=full must be whole numbers by comma; use for example --ranks=2,3"),
    ("--ranks=2,", "--ranks=2, must be whole numbers by comma"),
    ("--ranks=-1", "rank -1 is negative; use 0 for a tied model or a positive LoRA rank"),
    ("--layers=7", "--layers=7, but --shape=donor has 6 of them; use 1 to 6, or 0 for all"),
    ("--layers=-1", "--layers=-1, but --shape=donor has 6 of them"),
    ("--device=gpu", "--device=gpu cannot be used here"),
    ("--steps=0", "--steps=0 must be positive"),
    ("--rounds=0", "--rounds=0 must be positive"),
    ("--micro_batch=0", "--micro_batch=0 must be positive"),
    ("--donor=nowhere/at/all", "nowhere/at/all"),
])
def test_mistakes_are_named_before_any_work(donor, monkeypatch, what, flag, message):
    monkeypatch.setattr(bench_training, "apart", lambda *_: pytest.fail("began to measure"))
    with pytest.raises(UserError) as e:
        bench.main([*TINY, f"--what={what}", donor, flag])
    assert message in str(e.value)


@pytest.mark.parametrize("loops, message", [
    ("7", "7 loops do not divide the 6 layers; use one of 1, 2, 3, 6"),
    ("two", "--loops=two must be whole numbers by comma; use for example --loops=2,3"),
    ("0", "0 loops do not divide the 6 layers"),
])
def test_loops_that_do_not_divide_are_named_before_any_work(donor, monkeypatch, loops, message):
    monkeypatch.setattr(bench_training, "apart", lambda *_: pytest.fail("began to measure"))
    with pytest.raises(UserError) as e:
        bench.main([*TINY, "--what=train", donor, f"--loops={loops}"])
    assert message in str(e.value)


@pytest.mark.parametrize("flag, message", [
    ("--rows=0", "--rows=0 must be positive"), ("--vocab_sizes=4k", "--vocab_sizes=4k must be whole numbers by comma"),
    ("--layers=7", "--layers=7, but --shape=donor has 6 of them"), ("--seq_len=0", "--seq_len=0 must be positive")])
def test_mistakes_about_decisions_are_named(donor, flag, message):
    with pytest.raises(UserError) as e:
        bench.main([*TINY, "--what=decision", donor, flag])
    assert message in str(e.value)
