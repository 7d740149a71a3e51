"""bench.py: all variants serve the same requests with the same slots, and what stands beside their speed is right."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_model import SMALL, randomise, tiny

import bench
from bench import EXITS, FULL_DEPTH, NAMES, check_workload, make_engine, make_rules, serve_by_engine
from benchmarks.decode import decode_batch, in_transformers
from benchmarks.simulate import count_passes, draw_exits
from benchmarks.workload import Workload, distinct_share, draw_workload, oracle_loops, same_share, serve_in_batches
from benchmarks.workload import text_loss as loss_of
from convert import to_hf, unroll
from exits import Gate, Rule, decode
from experiments.tables import batching_details_table, batching_table
from lib.cli import UserError
from lib.folders import THRESHOLDS_FILE
from lib.results import read_lines
from lib.tokenizer import copy_tokenizer

ROOT = Path(bench.__file__).parent
CONFIG = bench.BatchingConfig(slots="2,3", prompt_len=4, new_tokens=8, device="cpu", requests=4)
TINY = ["--slots=2,3", "--requests=4", "--prompt_len=4", "--new_tokens=5", "--device=cpu", "--loops=3", "--ranks=2",
        "--rounds=1"]
SYNCHRONOUS, DEPTHWISE, IN_BATCHES = (variant.name for variant in EXITS)


@pytest.fixture(scope="module")
def donor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("donor")
    to_hf(tiny("llama", n_loop=1, rank=0), folder)
    return f"--donor={folder}"


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A looped checkpoint with a tokenizer, a gate and a threshold at which about half of the tokens exit."""
    folder = tmp_path_factory.mktemp("ckpt") / "out"
    model = tiny("gemma", n_loop=2, rank=2, vocab_size=4096)
    model.save(folder)
    copy_tokenizer(ROOT / "assets/donor", folder)
    gate = Gate(1, model.config.n_embd, draw=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(gate.w2)
    gate.save(folder)
    (folder / THRESHOLDS_FILE).write_text(json.dumps({"exact": {"thresholds": {"gate": 0.5}}}))
    return folder


def run(capsys, *flags) -> list[dict]:
    """The lines of JSON that are printed, one for each model."""
    bench.main(list(flags))
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


def work_of(n_loop: int, vocab=SMALL["vocab_size"]) -> Workload:
    draw = np.random.default_rng(3)
    lengths = [5, 9, 4, 7, 8, 6, 4]
    prompts = draw.integers(0, vocab, (7, 4)).tolist()
    return Workload(prompts, lengths, [], {"drawn": [t.tolist() for t in draw_exits(lengths, n_loop, 0.5, seed=1)]})


def by_decode(model, prompt: list[int], n: int) -> list[int]:
    return [t.item() for t, _ in decode(model, torch.tensor([prompt]), n)]


# ---------------------------------------------------------------------------------------------------------------------
# The variants

@pytest.fixture(scope="module")
def served():
    """(model, work, {(name, keys): (engine, requests, variant)}): all variants of the engine, each once, 3 slots."""
    model, found = tiny("llama", n_loop=3, rank=2), {}
    models, work, keys = {False: model, True: unroll(model)}, work_of(3), ["exact", "copy"]
    rules = make_rules(model, ["drawn"], keys, None)
    work.full_depth = [by_decode(model, p, n) for p, n in zip(work.prompts, work.lengths, strict=True)]
    for v in FULL_DEPTH + [replace(v, exits="drawn", keys=k) for k in keys for v in EXITS]:
        engine = make_engine(v, models, rules, 3, 1, work.max_len)
        found[v.name, v.keys] = engine, serve_by_engine(engine, work, work.forced_exits.get(v.exits))[1], v
    return model, work, found


def test_every_variant_serves_the_same_requests(served):
    _, work, found = served
    assert [name for name, _ in found] == [v.name for v in FULL_DEPTH] + [v.name for v in EXITS] * 2
    for engine, requests, _ in found.values():
        assert [r.prompt for r in requests] == work.prompts
        assert [len(r.tokens) for r in requests] == [len(r.loops) for r in requests] == work.lengths
        assert engine.stats["prefill_tokens"] == sum(map(len, work.prompts))  # the one for warm-up is not counted


def test_variants_differ_as_they_say_and_none_has_hidden_slots(served):
    model, _, found = served
    for (name, keys), (engine, _, v) in found.items():
        assert (engine.model is model) == (name != "sequence") and engine.model.config.n_layer == 6
        assert engine.slots == 3 and engine.refill == 1 and engine.keys == keys
        assert engine.head == {"sequence, unmerged": 0, SYNCHRONOUS: 0}.get(name, 1)
        assert engine.rule.name == ("never" if v.exits == "never" else "gate")
    rules = make_rules(model, ["drawn"], ["exact"], None)
    stage = make_engine(replace(EXITS[2], exits="drawn"), {False: model}, rules, 7, 9, 30, timed=True)
    assert stage.slots == 7 and stage.head == 2 and stage.refill == 7


def test_forced_exits_are_obeyed_and_pay_for_a_gate(served, monkeypatch):
    model, work, found = served
    for (name, _), (_, requests, variant) in found.items():
        for request, forced in zip(requests, work.forced_exits["drawn"], strict=True):
            late = [0 if name == "sequence" else 2] * (len(forced) - 1)
            assert request.loops[1:] == (forced[1:] if variant.exits == "drawn" else late)
    calls = []
    forward = Gate.forward
    monkeypatch.setattr(Gate, "forward", lambda self, x, loop: calls.append(len(x)) or forward(self, x, loop))
    rules = make_rules(model, ["drawn"], ["exact"], None)
    for variant, n in ((replace(EXITS[1], exits="drawn"), 1), (FULL_DEPTH[2], 0)):
        engine = make_engine(variant, {False: model}, rules, 3, 1, work.max_len)
        calls.clear()
        serve_by_engine(engine, work, work.forced_exits.get(variant.exits))
        assert len(calls) >= n * engine.stats["passes"] and bool(calls) == bool(n)


def test_exits_are_counted_without_the_prompts_token(served):
    model, work, _ = served
    models, rules = {False: model, True: unroll(model)}, make_rules(model, ["drawn"], ["exact"], None)
    variants = [FULL_DEPTH[0], replace(EXITS[1], exits="drawn")]
    merged, drawn = bench.run_variants(variants, models, rules, {}, work, replace(CONFIG, slots="3", rounds=1))
    assert "exited" not in merged                                # one pass runs all loops
    assert drawn["exited"] == np.bincount(sum((t[1:] for t in work.forced_exits["drawn"]), []), minlength=3).tolist()


def test_the_text_is_what_decoding_generates(served):
    _, work, found = served
    for variant in FULL_DEPTH:
        assert [r.tokens for r in found[variant.name, "exact"][1]] == work.full_depth, variant.name
    texts = {at: [r.tokens for r in requests] for at, (_, requests, _) in found.items()}
    for keys in ("exact", "copy"):
        assert texts[SYNCHRONOUS, keys] == texts[DEPTHWISE, keys] == texts[IN_BATCHES, keys]
    assert texts["depthwise", "exact"] != texts[DEPTHWISE, "exact"] != texts[DEPTHWISE, "copy"]


def test_plain_batches_generate_the_same_texts(served):
    pytest.importorskip("transformers")
    model, work, _ = served
    sizes = []

    def watched(generate):
        return lambda idx, n: sizes.append((len(idx), n)) or generate(idx, n)
    for generate in (lambda idx, n: decode_batch(model, idx, n),
                     lambda idx, n: in_transformers(model, "sdpa")(idx, n, compiled=False)):
        sizes.clear()
        seconds, texts = serve_in_batches(watched(generate), work, 3, torch.device("cpu"))
        assert texts == work.full_depth and seconds > 0
        assert sizes == [(3, 3), (3, 9), (3, 8), (1, 4)]         # a warm-up; then each batch as long as its longest


def test_the_simulation_counts_the_passes_that_the_engine_made(served):
    _, _, found = served
    for (name, _), (engine, requests, _) in found.items():
        if name in ("sequence", "depthwise", DEPTHWISE):
            work = [np.array([1, *(loop + 1 for loop in r.loops[1:])]) for r in requests]
            assert engine.stats["passes"] == count_passes(work, 3), name


def test_the_timed_engine_serves_alike_and_counts_every_part(served):
    model, work, found = served
    engine = make_engine(FULL_DEPTH[2], {False: model}, {("never", "exact"): Rule()}, 3, 1, work.max_len, timed=True)
    seconds, requests = serve_by_engine(engine, work, None)
    assert isinstance(engine, bench.TimedEngine) and not isinstance(found["depthwise", "exact"][0], bench.TimedEngine)
    assert [r.tokens for r in requests] == work.full_depth
    parts = [engine.stats[name + "_s"] for name in bench.PARTS[:-1]]
    assert min(parts) > 0 and sum(parts) < seconds


# ---------------------------------------------------------------------------------------------------------------------
# What stands beside the speed

def summarised(served, known=None) -> list[dict]:
    """The rows, as if the parts of each variant had taken these seconds."""
    model, work, found = served
    rows = []
    for engine, requests, v in found.values():
        stats = [{"all_s": 10.0} | engine.stats | {"prefill_s": 1.0, "block_s": block, "decision_s": 0.5, "head_s": 2.5}
                 for block in (3.0, 5.0)]
        into = {"variant": v, "slots": 3, "seconds": [4.0, 1.0, 2.0], "stats": stats,
                "texts": [r.tokens for r in requests]}
        if not v.merged:
            into["exited"] = np.bincount([loop for r in requests for loop in r.loops[1:]], minlength=3).tolist()
        rows.append(bench.summarise(into, model, work, known))
    return rows


def test_rows_are_summed_up(served):
    model, work, found = served
    drawn = np.concatenate([t[1:] for t in work.forced_exits["drawn"]])
    losses = set()
    for row in summarised(served, {}):
        assert row["tokens_per_s"] == sum(work.lengths) / 2
        assert row["range"] == [sum(work.lengths) / 4, sum(work.lengths)]
        assert row["time"] == {"prefill": 0.1, "block": 0.4, "decision": 0.05, "head": 0.25,
                               "scheduler": pytest.approx(0.2)}
        early = row["exits"] == "drawn"
        assert row["mean_loops"] == pytest.approx(drawn.mean() + 1 if early else 3)
        assert row["exits_by_loop"] == pytest.approx(np.bincount(drawn) / len(drawn) if early else [0, 0, 1])
        assert (row["agreement"] == 1) == (not early) and row["agreement"] > 0.1
        assert row["loss"] == loss_of(model, work.prompts, [r.tokens for r in found[row["name"], row["keys"]][1]], {})
        losses.add(round(row["loss"], 6))
        assert (row["ghosts"] > 0) == (early and row["keys"] == "exact")
    assert len(losses) == 3                                      # full depth, recomputed and copied KV
    for row in summarised(served):                               # random weights
        assert row["agreement"] is row["loss"] is None


def test_the_bound_by_hand(served):
    model, work, _ = served
    c, context = model.config, round(2 * (4 + sum(work.lengths) / 7 / 2)) / 2
    layer = sum(p.numel() for p in model.layers[0].parameters() if p.dim() == 2)     # W' of the seven linear layers
    loop = 2 * (2 * layer + 2 * 2 * c.n_head * c.head_dim * context)         # two layers; q k and p v at that context
    once = 2 * c.vocab_size * c.n_embd
    for row in summarised(served):
        want = (once + 3 * loop) / (once + row["mean_loops"] * loop)
        assert row["bound"] == pytest.approx(want) and (row["bound"] > 1.1) == (row["exits"] == "drawn")
    assert bench.speed_bound(model, 3, context) == 1


def test_speed_ups_are_over_the_best_sequence_batching_and_over_that_with_equal_slots():
    def row(name, slots, speed, bound=1.0):
        drift = (1, 2, 10)                                       # of the machine, from round to round
        return {"name": name, "slots": slots, "tokens_per_s": speed, "bound": bound,
                "seconds": [1000 / speed * slow for slow in drift]}
    rows = [row("decode", 8, 500), row("sequence", 8, 100), row("sequence, unmerged", 8, 120), row("depthwise", 8, 900),
            row("sequence", 16, 200), row("depthwise+exits", 16, 300, 2.0), row("depthwise+exits", 8, 60, 2.0)]
    assert bench.compare(rows) is rows[4]
    assert [r["over_best"] for r in rows] == pytest.approx([2.5, 0.5, 0.6, 4.5, 1, 1.5, 0.3])
    assert [r["over_sequence"] for r in rows] == pytest.approx([500 / 120, 100 / 120, 1, 7.5, 1, 1.5, 0.5])
    assert [rows[5]["of_bound"], rows[6]["of_bound"]] == pytest.approx([0.75, 0.25])
    rows[5]["seconds"] = [5.0, 20.0, 1.0]                       # 1, 0.5 and 50 times as fast as rows[4] in these rounds
    bench.compare(rows)
    assert rows[5]["over_best"] == rows[5]["over_sequence"] == 1


@torch.no_grad()
def test_the_loss_of_a_text_is_that_of_its_tokens_at_full_depth():
    model = randomise(tiny("llama", n_loop=2))
    prompts, texts = [[1, 2, 3], [4, 5, 6]], [[7, 8], [9, 1, 2, 3]]
    want = 0.0
    for prompt, text in zip(prompts, texts, strict=True):
        logits = model.logits(model(torch.tensor([prompt + text]))[-1])[0].log_softmax(-1)
        want -= sum(logits[2 + i, token].item() for i, token in enumerate(text))
    known = {}
    assert loss_of(model, prompts, texts, known) == pytest.approx(want / 6, rel=1e-5)
    assert len(known) == 2 and loss_of(None, prompts, texts, known) == pytest.approx(want / 6, rel=1e-5)  # read once
    assert loss_of(model, prompts, [[7, 8], [9, 1, 2, 4]], known) != pytest.approx(want / 6) and len(known) == 3


def test_shares_of_tokens():
    assert same_share([[1, 2, 3], [4]], [[1, 9, 3], [5]]) == 0.5
    assert distinct_share([[1, 1, 1, 1], [1, 2, 3, 3]]) == 0.5


# ---------------------------------------------------------------------------------------------------------------------
# The whole command

def test_all_variants_are_measured_with_every_number_of_slots(donor, capsys, tmp_path):
    pytest.importorskip("transformers")
    case, other = run(capsys, *TINY, donor, "--rounds=2", "--mean_loops=1.5", "--ranks=2,0",
                      f"--save={tmp_path}/a.jsonl")
    assert [x["model"]["rank"] for x in read_lines(tmp_path / "a.jsonl")] == [2, 0] == [
        x["model"]["rank"] for x in (case, other)]
    assert case["what"] == "serving" and case["requests"] == 4 and case["model"]["n_loop"] == 3
    names = [(row["name"], row["exits"], row["keys"], row["slots"]) for row in case["rows"]]
    assert names == [(name, exits, keys, slots) for slots in (2, 3) for name, exits, keys in [
        *((name, "never", "exact") for name in NAMES[:6]),
        *((name, "drawn", keys) for keys in ("exact", "copy") for name in NAMES[6:])]]
    assert {row["slots"] for row in case["rows"] if row["over_best"] == 1} == {case["best"]}
    for row in case["rows"]:
        assert len(row["seconds"]) == 2 and row["range"][0] <= row["tokens_per_s"] <= row["range"][1]
        assert row["agreement"] is row["loss"] is None and "full_depth_loss" not in case
        if row["head"]:
            assert sum(row["time"].values()) == pytest.approx(1) and min(row["time"].values()) > 0
        else:
            assert row["time"] is row["ghosts"] is None and row["bound"] == 1


def test_variants_take_turns(donor, capsys, monkeypatch):
    order = []
    monkeypatch.setattr(bench, "serve_by_engine", lambda engine, work, forced: order.append(
        (engine.slots, engine.model.config.n_loop)) or serve_by_engine(engine, work, forced))
    case, = run(capsys, *TINY, donor, "--rounds=2", "--variants=sequence,depthwise")
    assert order == 2 * [(2, 1), (2, 3), (3, 1), (3, 3)] and [len(row["seconds"]) for row in case["rows"]] == 4 * [2]


def test_some_of_the_variants(donor, capsys):
    case, = run(capsys, *TINY, donor, "--variants=sequence,sequence, unmerged,depthwise+exits", "--keys=copy",
                "--slots=2")
    assert [row["name"] for row in case["rows"]] == ["sequence", "sequence, unmerged", "depthwise+exits"]


def test_a_model_that_cannot_be_unrolled_is_compared_with_itself_unmerged(donor, capsys, monkeypatch):
    def refuse(model):
        raise UserError("no full-size model computes this")
    monkeypatch.setattr(bench, "unroll", refuse)
    bench.main([*TINY, donor, "--variants=transformers,decode,sequence,depthwise", "--slots=2"])
    out, err = capsys.readouterr()
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert [row["name"] for row in rows] == ["decode", "sequence, unmerged", "depthwise"]
    assert rows[1]["over_best"] == 1 and "no full-size model computes this" in err


def test_a_checkpoint_is_served_by_its_gate_and_by_the_oracle(ckpt, capsys, tmp_path):
    case, = run(capsys, *TINY, f"--ckpt={ckpt}", "--keys=exact", f"--text={ROOT}/assets/books/valid.txt",
                f"--plot={tmp_path}/a.png")
    rows = {(row["slots"], row["exits"], row["name"]): row for row in case["rows"]}
    assert [kind for slots, kind, name in rows if name == DEPTHWISE and slots == 2] == ["oracle", "gate"]
    for slots in (2, 3):
        for name in NAMES[6:]:
            assert rows[slots, "oracle", name]["agreement"] == 1 > rows[slots, "gate", name]["agreement"]
            assert rows[slots, "oracle", name]["loss"] == case["full_depth_loss"] < rows[slots, "gate", name]["loss"]
        assert 1 < rows[slots, "gate", DEPTHWISE]["mean_loops"] < 2 and 0 < case["distinct"] <= 1
        gates = [rows[slots, "gate", name]["exits_by_loop"] for name in (DEPTHWISE, SYNCHRONOUS)]
        assert gates[0] == gates[1]
    assert (tmp_path / "a.png").read_bytes()[1:4] == b"PNG"


def test_the_plot_has_a_point_for_each_variant_at_its_best(tmp_path, monkeypatch):
    from matplotlib.axes import Axes
    points, draw = {}, Axes.errorbar

    def look(axes, x, y, bar, label, **options):
        points[label] = round(x[0]), y[0], *(round(ends[0], 2) for ends in bar)
        return draw(axes, x, y, bar, label=label, **options)
    monkeypatch.setattr(Axes, "errorbar", look)
    line(tmp_path, "out", ("sequence", "never", "exact", 8, 90), ("sequence", "never", "exact", 16, 100),
         ("depthwise+exits", "gate", "exact", 8, 110), ("depthwise+exits", "gate", "exact", 16, 80))
    case, = read_lines(tmp_path / "serving.jsonl")
    bench.plot_batching(case, str(tmp_path / "a.png"))
    assert points == {"sequence · 16 slots": (50, 1.0, 0.01, 0.01),
                      "depthwise+exits · gate · recomputed · 8 slots": (50, 1.1, 0.01, 0.01)}


def line(folder: Path, ckpt: str | None, *rows: tuple) -> None:
    """Append a line to serving.jsonl; rows: (name, exits, keys, slots, tok/s), sequence batching with 100 at best."""
    made = [{"name": name, "exits": exits, "keys": keys, "kv": keys.replace("exact", "recomputed") * (exits != "never"),
             "slots": slots, "tokens_per_s": speed, "range": [speed - 1, speed + 1], "mean_loops": 1.5, "bound": 1.25,
             "over_best": speed / 100, "over_sequence": speed / 80, "of_bound": speed / 100, "agreement": ckpt and 0.5,
             "loss": ckpt and 3.0, "ghosts": 0.25, "time": dict.fromkeys(bench.PARTS, 0.2)}
            for name, exits, keys, slots, speed in rows]
    settings = {"ckpt": ckpt, "prompt_len": 16, "new_tokens": 24, "rounds": 2}
    case = {"settings": settings, "model": {"n_loop": 2, "n_layer": 12, "n_embd": 192, "rank": 0}, "requests": 9,
            "cpu": "CPU", "gpu": "NVIDIA H200" if ckpt is None else None, "rows": made, "full_depth_loss": 2.5,
            "distinct": 0.75}
    with open(folder / "serving.jsonl", "a") as f:
        f.write(json.dumps(case) + "\n")


def test_tables_show_the_newest_line_and_each_variant_at_its_best(tmp_path):
    line(tmp_path, "old", ("sequence", "never", "exact", 8, 1))
    line(tmp_path, "out", ("decode", "never", "exact", 8, 60), ("decode", "never", "exact", 16, 70),
         ("sequence", "never", "exact", 8, 100), ("sequence, unmerged", "never", "exact", 8, 90),
         ("synchronous exits", "gate", "exact", 8, 40), ("depthwise+exits", "oracle", "copy", 8, 300),
         ("depthwise+exits", "gate", "exact", 8, 110), ("depthwise+exits", "gate", "exact", 16, 120),
         ("depthwise+exits, head in full batches", "gate", "exact", 8, 130))
    line(tmp_path, None, ("sequence", "never", "exact", 8, 5), ("depthwise+exits", "drawn", "copy", 8, 6))
    rows = [[cell.strip() for cell in x.split("|")[1:-1]] for x in batching_table(tmp_path).splitlines()[2:]]
    assert rows == [
        ["decode", "", "16", "", "1.50", "0.70", "0.88", "1.25", "0.50", "3.00"],
        ["sequence", "", "8", "", "1.50", "1.00", "1.25", "1.25", "0.50", "3.00"],
        ["depthwise+exits, head in full batches", "gate", "8", "recomputed", "1.50", "1.30", "1.62", "1.25", "0.50",
         "3.00"]]
    trained, random = batching_details_table(tmp_path).split("\n\n**")
    assert "loss of 2.500, and 75 % of" in trained.replace("\n", " ") and "random weights" in random
    assert "2 rounds; CPU" in trained.replace("\n", " ") and "2 rounds; NVIDIA H200" in random.replace("\n", " ")
    assert ("| depthwise+exits | gate | recomputed | 1.50 | 110 (109 to 111) | 120 (119 to 121) | 1.20 | 1.25 | 120 % "
            "| 0.50 | 3.000 | 25 % | 20 / 20 / 20 / 20 / 20 |") in trained
    assert "| drawn | copy | 1.50 | 6 (5 to 7) | 0.06 |" in random and "same text" not in random
    (tmp_path / "serving.jsonl").unlink()
    line(tmp_path, None, ("sequence", "never", "exact", 8, 5))
    with pytest.raises(LookupError, match="no line of trained exits"):
        batching_table(tmp_path)


@torch.no_grad()
def test_the_oracle_is_the_earliest_loop_that_predicts_the_same():
    model, work = tiny("llama", n_loop=3), work_of(3)
    want = []
    for prompt, n in zip(work.prompts, work.lengths, strict=True):
        work.full_depth.append(by_decode(model, prompt, n))
        states = model(torch.tensor([prompt + work.full_depth[-1]]))
        predicted = [model.logits(x)[0].argmax(-1).tolist() for x in states]
        at = range(len(prompt), len(prompt) + n - 1)             # the token at t predicts the one at t + 1
        want.append([2, *(next(loop for loop in range(3) if predicted[loop][t] == predicted[2][t]) for t in at)])
    assert oracle_loops(model, work) == want and 0 in sum(want, [])


def test_prompts_and_lengths_are_the_same_each_time_and_lengths_spread():
    model = tiny("llama", n_loop=2)
    work = draw_workload(CONFIG, model, 400)
    assert work.prompts == draw_workload(CONFIG, model, 400).prompts
    assert {len(p) for p in work.prompts} == {4} and set(work.lengths) == set(range(4, 13)) and work.max_len == 16


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes

@pytest.mark.parametrize("flags, message", [
    (["--slots=8,0"], "--slots=8,0 must be positive"), (["--prompt_len=0"], "--prompt_len=0 must be positive"),
    (["--rounds=0"], "--rounds=0 must be positive"), (["--new_tokens=2"], "use 3 or more"),
    (["--requests=-1"], "--requests=-1 must be 0 or more"),
    (["--refill=0"], "--refill=0 must be positive"),
    (["--variants=depthwise"], "--variants=depthwise: give sequence, which the others are compared with"),
    (["--variants=sequence,V6"], "any of transformers; decode; sequence; sequence, unmerged; depthwise;"),
    (["--loops=1"], "rows cannot be at different ones; use --loops=2 or more"),
    (["--loops=4"], "4 loops do not divide the 6 layers"), (["--ranks=full"], "must be whole numbers by comma"),
    (["--mean_loops=3.5"], "--mean_loops=3.5 of 3 loops; use 1 to 3"), (["--mean_loops=0.5"], "must be 1 or more"),
    (["--mean_loops=nan"], "must be 1 or more"), (["--exit_prob=nan"], "is a probability"),
    (["--new_tokens=0"], "must be positive"),
    (["--ckpt=nowhere", "--shape=small"], "--shape=small describes random weights, and --ckpt=nowhere has its own"),
    (["--save=no/a.jsonl"], "--save=no/a.jsonl cannot be written"),
    (["--exit_prob=1.5"], "--exit_prob=1.5 is a probability"),
    (["--exits=gate"], "--exits=gate is not available here; use drawn, several by comma (oracle and gate need --ckpt)"),
    (["--plot=a.png"], "--plot shows speed-up against agreement, and texts of random weights show none: give --ckpt"),
    (["--keys=none"], "--keys=none is not available here; use exact, copy"),
    (["--new_tokens=60"], "and the model's context is 64: give less"),
    (["--vocab=-5"], "--vocab=-5 must be 0 or more"), (["--ckpt=nowhere"], "no checkpoint in nowhere"),
    (["--plot=a.txt"], "--plot=a.txt: give a file that ends in .png"),
    (["--plot=no/a.png"], "in a folder that is there"),
])
def test_mistakes_are_named_before_any_work(donor, monkeypatch, flags, message):
    monkeypatch.setattr(bench, "run_variants", lambda *_: pytest.fail("began to measure"))
    with pytest.raises(UserError) as e:
        bench.main([*TINY, donor, *flags])
    assert message in str(e.value)


def test_a_gate_that_is_not_calibrated_is_named(ckpt, monkeypatch):
    monkeypatch.setattr(bench, "run_variants", lambda *_: pytest.fail("began to measure"))
    with pytest.raises(UserError, match="no calibrated threshold of gate .*copy"):
        bench.main([*TINY, f"--ckpt={ckpt}", "--keys=exact,copy"])


@pytest.mark.parametrize("flags, command", [
    (["--what=decode", "--rows=1"], "use: python -m benchmarks.decode …"),
    (["--slots=2", "--what", "train"], "use: python -m benchmarks.training …"),
    (["--what=svd"], "use: python -m benchmarks.conversion --measure=svd …"),
    (["--what=batching", "--simulate"], "use: python -m benchmarks.simulate …"),
    (["--what=batching"], "use: python bench.py … without --what")])
def test_old_commands_are_answered_with_the_new_ones(flags, command):
    with pytest.raises(UserError) as e:
        bench.main(flags)
    assert str(e.value).endswith(command) and "\n" not in str(e.value)


def test_every_old_command_has_a_module():
    assert bench.MOVED.keys() == {"convert", "svd", "scale", "tokenise", "train", "loss", "lora", "decision",
                                  "batching", "decode", "kernels"}
    for what in bench.MOVED.keys() - {"batching"}:
        assert importlib.util.find_spec(f"benchmarks.{bench.MOVED[what].split()[0]}"), what


def test_settings_that_are_fine_pass():
    check_workload(replace(CONFIG, mean_loops=2.0), 2, 64, ["drawn"])
    check_workload(replace(CONFIG, prompt_len=52), 2, 64, ["drawn"])
