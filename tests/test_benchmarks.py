"""benchmarks/: each measures what it says, on equal terms, and names a mistake before any work."""

import json
import os
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_model import ARCHS, SMALL, randomise, tiny, tokens

from benchmarks import common, conversion, decision, decode, kernels, lora, loss, simulate, tokenise, training
from benchmarks.simulate import PAPER, Times, count_passes, draw_exits, exit_probability, exit_probability_of
from benchmarks.training import NaiveObjective, TransformersObjective
from convert import to_hf
from lib.cli import UserError
from lib.system import peak_memory
from lib.tokenizer import Tokenizer
from model import Config, Layer, RecursiveTransformer, RelaxedLinear
from train import Objective, TrainConfig

ROOT = Path(__file__).resolve().parent.parent
CONFIG = Config(**SMALL | ARCHS["llama"])
TINY = ["--seq_len=16", "--micro_batch=2", "--steps=1", "--device=cpu"]


@pytest.fixture(scope="module")
def donor(tmp_path_factory):
    """The flag for a tiny donor."""
    folder = tmp_path_factory.mktemp("donor")
    to_hf(RecursiveTransformer(CONFIG), folder)
    return f"--donor={folder}"


@pytest.fixture(autouse=True)
def known_peak(monkeypatch):
    """1e9 FLOP/s, so that MFU is known on every device."""
    monkeypatch.setattr(common, "peak_flops", lambda *_: 1e9)


@pytest.fixture
def run(monkeypatch, capsys):
    """run(module, flags) -> the JSON line that it prints at its end, measured in this process."""
    monkeypatch.setattr(common, "run_in_subprocess", lambda measure, *args: measure(*args))

    def run(module, *flags):
        module.main(list(flags))
        return json.loads(capsys.readouterr().out.splitlines()[-1])
    return run


def assert_measured(rows, rounds=1):
    for row in rows:
        assert row["tokens_per_s"] > 0 and row["mfu"] > 0 and row["peak_gib"] > 0, row
        assert len(row["seconds"]) == rounds and row["seconds"] == sorted(row["seconds"])


def test_training_is_measured_case_by_case(donor, monkeypatch, run):
    pytest.importorskip("transformers")
    peaks = []
    monkeypatch.setattr(common, "peak_flops", lambda *_: peaks.append(1e9) or 1e9)
    numbers = run(training, *TINY, donor, "--loops=2", "--ranks=0,3", "--rounds=2", "--layers=4")
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


def test_the_baselines_memory_by_arithmetic_and_what_fits(capsys):
    gemma = common.SHAPES["gemma-2b"]
    weights, layer = 2_506_172_416, 193_576                      # bytes per token, counted in saved_tensors_hooks
    want = 20 * weights + 2048 * (18 * layer + 36 * 256_000)
    assert training.baseline_gib(gemma, 2048, True) == pytest.approx(want / 2**30, rel=0.01)
    assert training.baseline_gib(gemma, 2048, True) < 79 < training.baseline_gib(gemma, 8192, False) < 130
    config = training.TrainingConfig(seq_len=2048, micro_batch=4)
    training.warn_of_memory(config, gemma, 79.0)
    assert "about 144 GiB of the GPU's 79" in (said := capsys.readouterr().err) and "use --micro_batch=1," in said
    training.warn_of_memory(replace(config, micro_batch=1), gemma, 79.0)
    assert not capsys.readouterr().err


def test_tokenising_is_measured_beside_the_tokenizer_alone(run, tmp_path):
    text = (ROOT / "assets/books/valid.txt").read_text()
    (tmp_path / "a.txt").write_text(text[:5000])
    (tmp_path / "b.txt").write_text(text[5000:6000])
    numbers = run(tokenise, f"--donor={ROOT}/assets/donor", f"--text={tmp_path}", "--rounds=2")
    tokenizer = Tokenizer.load(ROOT / "assets/donor")
    assert numbers["documents"] == 2 and [len(s) for s in numbers["seconds"].values()] == [2, 2]
    assert numbers["tokens"] == 2 + sum(map(len, tokenizer.encode_batch([text[:5000], text[5000:6000]])))
    assert numbers["ratio"] == pytest.approx(numbers["tokens_per_s"]["data.py"]
                                             / numbers["tokens_per_s"]["tokenizer alone"])


def test_the_loss_is_measured_beside_the_naive_one(donor, run):
    rows = run(loss, *TINY, donor)["rows"]
    assert_measured(rows)
    assert [(r["code"], r["distill"], r["tokens"]) for r in rows] == [
        (code, distill, n) for distill in (False, True) for code, n in (("chunked", 32), ("naive", 8))]
    config = loss.LossConfig(steps=1, device="cpu")
    whole = [loss.measure_loss(config, CONFIG, r | {"tokens": 32})["loss"] for r in rows]
    assert whole[0] == pytest.approx(whole[1], rel=1e-5) and whole[2] == pytest.approx(whole[3], rel=1e-5)
    assert whole[2] > whole[0] + 1e-4
    peaks = [r["tokens_per_s"] * r["flops_per_token"] / r["mfu"] for r in rows]  # of a quarter of the tokens, too
    assert peaks == pytest.approx(4 * [peaks[0]])
    assert rows[1]["tokens_per_s"] == rows[1]["tokens"] / rows[1]["seconds"][0]
    assert rows[1]["added_gib_at_all"] == 4 * rows[1]["added_gib"]


def test_a_layer_with_lora_is_measured_path_by_path(donor, run):
    numbers = run(lora, *TINY, donor, "--ranks=0,3")
    assert_measured(numbers["rows"])
    assert [(r["path"], r["rank"]) for r in numbers["rows"]] == [("merged", 0), ("merged", 3), ("separate", 3)]
    assert numbers["rows"][1]["loss"] == pytest.approx(numbers["rows"][2]["loss"], rel=1e-4)


@torch.no_grad()
def test_an_exit_decision_is_measured_with_all_that_its_rule_reads(donor, monkeypatch, run):
    called = {"head": 0, "block": 0}
    def counting(name, method):
        def count(*args):
            called[name] += 1
            return method(*args)
        return count
    monkeypatch.setattr(RecursiveTransformer, "logits", counting("head", RecursiveTransformer.logits))
    monkeypatch.setattr(RecursiveTransformer, "block", counting("block", RecursiveTransformer.block))
    numbers = run(decision, donor, "--rows=1,3", "--vocab_sizes=50,70", "--steps=1", "--seq_len=16", "--device=cpu")
    assert [(row["vocab_size"], row["batch"]) for row in numbers["rows"]] == [(50, 1), (50, 3), (70, 1), (70, 3)]
    assert all(row[name] > 0 for row in numbers["rows"] for name in ("block", "head", "max_prob", "gate"))
    assert called["head"] == 4 * called["block"] > 0            # by itself, and for each rule but the gate


def test_the_separate_path_is_the_same_linear_layer():
    layer = randomise(Layer(replace(CONFIG, n_loop=2, rank=3, attn_bias=True, vectors="per_loop")))
    for linear in (m for m in layer.modules() if isinstance(m, RelaxedLinear)):
        x = torch.randn(2, 50, linear.weight.size(1))
        torch.testing.assert_close(lora.separate_lora(linear, x, 1), linear(x, 1))


def test_a_case_without_the_memory_says_so_and_the_others_go_on(donor, monkeypatch, capsys):
    def measure(measure, config, shape, case):
        return {"error": "out of memory"} if case["rank"] else measure(config, shape, case)
    monkeypatch.setattr(common, "run_in_subprocess", measure)
    lora.main([*TINY, donor, "--ranks=3", "--rounds=2"])
    printed = capsys.readouterr().out
    first, *others = json.loads(printed.splitlines()[-1])["rows"]
    assert_measured([first], rounds=2)
    assert [row["error"] for row in others] == 2 * ["out of memory"] and "tokens_per_s" not in others[0]
    assert printed.count("out of memory") == 4                   # in the table, and in the line


# ---------------------------------------------------------------------------------------------------------------------
# The simulation

def test_a_small_queue_by_hand():
    work = [np.array(passes) for passes in ([1, 2], [2, 2, 1], [1, 1], [2])]
    assert count_passes(work, 1) == 12                           # one after the other
    # two slots: 3 then [1, 1] until 5; 5 then [2] until 7
    assert count_passes(work, 2) == 7
    assert simulate.simulate(work, 2, 0.5) == pytest.approx(8 / 3.5)


def test_draws_have_the_mean_that_was_asked_for():
    for n_loop, mean in ((2, 1.25), (3, 1.25), (3, 2.5), (4, 1.0), (4, 4.0)):
        exit_prob = exit_probability(n_loop, mean)
        drawn = draw_exits([3000, 1, 3000], n_loop, exit_prob, seed=0)
        assert [len(d) for d in drawn] == [3000, 1, 3000]
        every = np.concatenate(drawn) + 1
        assert every.mean() == pytest.approx(mean, abs=0.04) and every.min() >= 1 and every.max() <= n_loop
        early = every[every < n_loop]
        assert n_loop < 3 or len(early) in (0, 6001) or (every == 1).mean() == pytest.approx(exit_prob, abs=0.03)
    same, other = (draw_exits([50], 2, 0.5, seed)[0].tolist() for seed in (0, 1))
    assert same == draw_exits([50], 2, 0.5, 0)[0].tolist() != other
    assert exit_probability(2, 1.25) == 0.75


def test_the_papers_tokens_per_second_come_out(run):
    rows = run(simulate, "--requests=4000", "--new_tokens=32")["rows"]
    checked = [row for row in rows if "Gemma" in row["name"] and row["exits_from"] != "this row's own"
               and (row["name"], row["text"]) != ("Gemma, sequence batching", "PG19")]
    assert len(checked) == 2 + 3 + 4 * 2                         # one share for ranks 64 to 512 alike
    for row in checked:
        assert row["tokens_per_s"] == pytest.approx(row["published"], rel=0.05), row
    own = [row for row in rows if row["exits_from"] == "this row's own"]
    assert len(own) == 17 and all(row["tokens_per_s"] == pytest.approx(row["published"], rel=0.05) for row in own)


def test_shares_are_given_or_implied():
    tied, three = PAPER[1], PAPER[6]
    assert exit_probability_of(tied, 0, 0.1) == (0.80, "given")
    exit_prob, source = exit_probability_of(three, 0, 0.1)
    assert source == "this row's own"
    assert 1 + (1 - exit_prob) + (1 - exit_prob)**2 == pytest.approx(1000 / (0.182 * 3120))
    assert exit_probability_of(Times("mine", 2, 4, 0.5), 0, 0.1) == (0.1, "--mean_loops")


def test_times_of_a_file(run, tmp_path):
    path = tmp_path / "times.json"
    path.write_text(json.dumps([{"name": "mine", "n_loop": 2, "batch": 4, "ms": 0.5, "left": [1.0, 0.0]}]))
    assert simulate.read_times(str(path)) == [Times("mine", 2, 4, 0.5, left=(1.0, 0.0))]
    rows = run(simulate, f"--times={path}", "--requests=2000")["rows"]
    assert [row["tokens_per_s"] for row in rows] == pytest.approx([2000, 1000], rel=0.02)
    for text in ("[]", "{", '[{"name": "a"}]', '[{"name": "a", "n_loop": 2, "batch": 0, "ms": 1}]',
                 '[{"name": "a", "n_loop": 2, "batch": 1, "ms": 1, "left": [2]}]'):
        path.write_text(text)
        with pytest.raises(UserError, match="times.json cannot be used"):
            simulate.read_times(str(path))
    with pytest.raises(UserError, match=r"nowhere\.json cannot be used"):
        simulate.read_times("nowhere.json")


# ---------------------------------------------------------------------------------------------------------------------
# Decoding and kernels

def test_decoding_generates_what_transformers_generates(donor, run):
    pytest.importorskip("transformers")
    numbers = run(decode, donor, "--rows=1,3", "--new_tokens=9", "--prompt_len=5", "--device=cpu")
    codes = ["decode", "engine", "transformers, eager", "transformers, sdpa"]
    assert [(r["code"], r["rows"]) for r in numbers["rows"]] == [(c, rows) for rows in (1, 3) for c in codes]
    for row in numbers["rows"]:
        assert row["equal"] == 1 and [len(text) for text in row["tokens"]] == row["rows"] * [9]
        assert row["of_floor"] == pytest.approx(row["tokens_per_s"] / row["floor_tokens_per_s"])
    best = max(row["tokens_per_s"] for row in numbers["rows"][2:4])
    assert numbers["rows"][0]["of_transformers"] == pytest.approx(numbers["rows"][0]["tokens_per_s"] / best)


def test_decoding_a_looped_checkpoint(tmp_path, run):
    tiny("gemma", n_loop=2, rank=2, vocab_size=4096).save(tmp_path / "ckpt")
    rows = run(decode, f"--ckpt={tmp_path}/ckpt", "--rows=2", "--new_tokens=5", "--device=cpu")["rows"]
    assert all(row["equal"] == 1 for row in rows)


def test_bytes_of_a_step_by_hand():
    model = tiny("gemma", n_loop=2, rank=0)
    layer = sum(p.numel() for p in model.layers[0].parameters())
    cache = 2 * 6 * 1 * 12 * 10 * 3                              # k and v, depths, heads, D, context, rows
    assert decode.bytes_per_step(model, 3, 10) == 4 * (6 * layer + 32 + 53 * 32 + cache)
    tree = tiny("gemma", n_loop=2, rank=0).to(torch.bfloat16)
    assert 2 * decode.bytes_per_step(tree, 3, 10) == decode.bytes_per_step(model, 3, 10)


def test_every_implementation_does_the_same_and_moves_what_it_must():
    c = Config(**SMALL | ARCHS["llama"] | {"n_loop": 3, "rank": 2})
    found = kernels.linear_works(c, 2, "up", 32, 40, torch.device("cpu"), torch.float32)
    found |= kernels.attention_works(c, 2, 5, torch.device("cpu"), torch.float32)
    assert list(found) == ["lora_rows up", "linear_rows up", "decode_attention"]
    for works, _ in found.values():
        spec, *others = (work() for work in works.values())
        assert len(others) >= 1 and spec.abs().max() > 0
        for other in others:
            torch.testing.assert_close(other, spec, atol=1e-4, rtol=1e-4)
    lora = 2 * (32 + 40) + 2 * 2 * (32 + 40)                     # two rows, at two of the three loops
    assert [moved for _, moved in found.values()] == [4 * lora, 4 * (lora + 32 * 40), 4 * 2 * (2 * 40 + 2 * 5 * 2 * 10)]


def test_consecutive_calls_read_other_weights_that_no_cache_holds(monkeypatch):
    c = Config(**SMALL | ARCHS["llama"] | {"n_loop": 2, "rank": 2})
    make = lambda: kernels.linear_works(c, 2, "up", 32, 40, torch.device("cpu"), torch.float32)     # noqa: E731
    lora, linear = (moved for _, moved in make().values())
    monkeypatch.setattr(kernels, "CACHE", 2 * linear - 1)        # two linear layers exceed it, and so many LoRAs
    for (works, moved), n in zip(kernels.rotate(make).values(), (-(-(2 * linear - 1) // lora), 2), strict=True):
        assert (n - 1) * moved < kernels.CACHE <= n * moved
        for calls in works.values():
            assert len(calls) == n
            weights = [{t.data_ptr() for t in call.args if isinstance(t, torch.Tensor)} for call in calls]
            assert len(set.union(*weights)) == sum(map(len, weights))
    assert len(kernels.rotate(make, most=3)["lora_rows up"][0]["spec"]) == 3


def test_a_call_is_a_share_of_all_that_are_timed(monkeypatch):
    called, order = [], []
    def in_turn(works, rounds, device):
        for work in works.values():
            work()
        return dict.fromkeys(works, 36.0)
    monkeypatch.setattr(kernels, "time_in_turn", in_turn)
    works = {"a": [lambda i=i: called.append(i) for i in range(3)], "b": [lambda: order.append(0)] * 20}
    assert kernels.time_calls(works, 1, torch.device("cpu")) == {"a": 2.0, "b": 1.8}
    assert called == 6 * [0, 1, 2] and len(order) == 20          # 18 and 20 calls: 16 or more


def test_on_a_gpu_one_graph_makes_all_calls(monkeypatch):
    events = []
    class Graph:
        def replay(self):
            events.append("replay")
    @contextmanager
    def recording(graph):
        events.append("begin")
        yield
        events.append("end")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    call = kernels.call_all([lambda: events.append(1), lambda: events.append(2)], torch.device("cuda"))
    assert events == [1, 2, "begin", 1, 2, "end"]                # compiled first, then recorded
    call()
    assert events[6:] == ["replay"]


def test_kernels_are_measured_one_by_one(donor, run):
    rows = run(kernels, donor, "--rows=1,2", "--loops=2", "--ranks=0,2", "--steps=1", "--seq_len=8",
               "--device=cpu")["rows"]
    assert [row["work"] for row in rows if row["rank"] == 0 and row["rows"] == 2] == [
        "linear_rows q", "linear_rows up", "linear_rows down", "decode_attention"]
    assert sum(row["rank"] == 2 for row in rows) == 2 * 6
    assert all(us > 0 for row in rows for us in row["us"].values()) and all(row["floor_us"] > 0 for row in rows)


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
        for objective, ce in losses[1:]:
            torch.testing.assert_close(objective, losses[0][0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(ce, losses[0][1], atol=1e-5, rtol=1e-5)
        by_ours, by_theirs = (torch.autograd.grad(objective, m.parameters()) for (objective, _), m in
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
    assert common.run_in_subprocess(os.getpid) != os.getpid()
    assert common.run_in_subprocess(os.abort) == {"error": "killed"}


def test_memory_that_is_not_there_is_an_error_of_the_case():
    assert common.run_in_subprocess(torch.empty, 2**50) == {"error": "out of memory"}


def test_a_measurement_comes_back_from_its_process():
    ballast = b"x" * 2**29                                       # half a GiB that is not the other process'
    config = lora.LoraConfig(seq_len=16, micro_batch=2, steps=3, device="cpu")
    row = common.run_in_subprocess(lora.measure_layer, config, CONFIG, {"rank": 3, "path": "separate"})
    assert row.keys() == {"seconds", "loss", "peak_gib"} and len(row["seconds"]) == 3
    assert 0.05 < row["peak_gib"] < peak_memory(torch.device("cpu")) - len(ballast) / 2**31


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes

@pytest.fixture
def no_measuring(monkeypatch):
    for module in (common, decision, decode, kernels):
        for name in {"run_in_subprocess", "time_in_turn", "time_calls"} & vars(module).keys():
            monkeypatch.setattr(module, name, lambda *_: pytest.fail("began to measure"))


MISTAKES = {
    (training, lora): {
        "--ranks=full": "--ranks=full must be whole numbers by comma; use for example --ranks=2,3",
        "--ranks=2,": "--ranks=2, must be whole numbers by comma",
        "--ranks=-1": "rank -1 is negative; use 0 for a tied model or a positive LoRA rank"},
    (training, lora, loss): {"--rounds=0": "must be positive", "--micro_batch=0": "must be positive"},
    (training, lora, loss, decision, kernels): {
        "--steps=0": "--steps=0 must be positive", "--seq_len=0": "--seq_len=0 must be positive",
        "--device=gpu": "--device=gpu cannot be used here", "--donor=nowhere/at/all": "nowhere/at/all",
        "--save=no/a.jsonl": "--save=no/a.jsonl cannot be written"},
    (training, decision): {
        "--layers=7": "--layers=7, but --shape=donor has 6 of them; use 1 to 6, or 0 for all",
        "--layers=-1": "--layers=-1, but --shape=donor has 6 of them"},
    (training,): {
        "--loops=7": "7 loops do not divide the 6 layers; use one of 1, 2, 3, 6",
        "--loops=two": "--loops=two must be whole numbers by comma; use for example --loops=2,3",
        "--loops=0": "0 loops do not divide the 6 layers"},
    (training, loss, decode): {"--vocab=-5": "--vocab=-5 must be 0 or more"},
    (loss,): {"--width=-1": "--width=-1 must be 0 or more"},
    (decision, decode, kernels): {"--rows=0": "--rows=0 must be positive"},
    (decision,): {"--vocab_sizes=4k": "--vocab_sizes=4k must be whole numbers by comma"},
    (kernels,): {"--loops=4": "4 loops do not divide"},
    (decode,): {"--new_tokens=60": "the model's context is 64: give less", "--rounds=0": "--rounds=0 must be positive",
                "--prompt_len=0": "--prompt_len=0 must be positive"},
    (tokenise,): {"--rounds=0": "must be positive"},
    (conversion,): {"--seq_len=0": "must be positive", "--tokens=0": "must be positive"}}


@pytest.mark.parametrize("module, flag, message", [
    pytest.param(module, flag, message, id=f"{module.__name__} {flag}")
    for modules, mistakes in MISTAKES.items() for module in modules for flag, message in mistakes.items()])
def test_mistakes_are_named_before_any_work(donor, no_measuring, module, flag, message):
    with pytest.raises(UserError) as e:
        module.main([donor, flag])
    assert message in str(e.value)


@pytest.mark.parametrize("flag, message", [
    ("--mean_loops=nan", "must be 1 or more"), ("--exit_prob=nan", "is a probability"),
    ("--new_tokens=0", "must be positive"), ("--requests=-1", "must be 0 or more")])
def test_mistakes_about_the_simulation_are_named(flag, message):
    with pytest.raises(UserError, match=message):
        simulate.main([flag])


def test_a_checkpoint_beside_a_shape_is_a_mistake(donor):
    with pytest.raises(UserError, match="--layers=2 describes random weights, and --ckpt=nowhere has its own"):
        decode.main([donor, "--ckpt=nowhere", "--layers=2"])


def test_fewer_layers_keep_which_of_them_do_not_rotate():
    shape = Config(n_layer=8, no_rope=[3, 7])
    assert [common.with_layers(shape, n).no_rope for n in (2, 4, 8)] == [None, [3], [3, 7]]
