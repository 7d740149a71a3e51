"""The benchmarks of serving: every way to batch does the same work, and what stands beside it is what it says."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_model import ARCHS, SMALL, tiny

import bench
import bench_batching
import bench_decode
from bench_batching import BASELINES, EXITS, Served, check_settings, make_engine, serve, slowest, speed_up
from bench_simulate import PAPER, Times, count_passes, draw_exits, leave_of, leave_probability, read_times, simulate
from convert import to_hf, unroll
from exits import Gate, decode
from lib.cli import UserError
from lib.folders import THRESHOLDS_FILE
from lib.tokenizer import copy_tokenizer
from model import Config

ROOT = Path(bench.__file__).parent
CONFIG = bench.BenchConfig(slots=3, prompt_len=4, new_tokens=8, device="cpu")
TINY = ["--what=batching", "--slots=3", "--requests=4", "--prompt_len=4", "--new_tokens=5", "--device=cpu", "--loops=3",
        "--ranks=2"]


@pytest.fixture(scope="module")
def donor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("donor")
    to_hf(tiny("llama", n_loop=1, rank=0), folder)
    return f"--donor={folder}"


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A looped checkpoint with a tokenizer, a gate and a threshold that lets about half of the tokens leave."""
    folder = tmp_path_factory.mktemp("ckpt") / "out"
    model = tiny("gemma", n_loop=2, rank=2, vocab_size=4096)
    model.save(folder)
    copy_tokenizer(ROOT / "assets/donor", folder)
    gate = Gate(1, model.config.n_embd, draw=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(gate.w2)
    gate.save(folder)
    (folder / THRESHOLDS_FILE).write_text(json.dumps({"exact": {"thresholds": {"gate": 0.5}}}))
    return folder


def run(capsys, *flags) -> dict:
    bench.main(list(flags))
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def work_of(n_loop: int, vocab=SMALL["vocab_size"]) -> Served:
    draw = np.random.default_rng(3)
    lengths = [5, 9, 4, 7, 8, 6, 4]
    prompts = [draw.integers(0, vocab, n).tolist() for n in (3, 5, 2, 6, 4, 4, 3)]
    return Served(prompts, lengths, {"drawn": [t.tolist() for t in draw_exits(lengths, n_loop, 0.5, seed=1)]})


# ---------------------------------------------------------------------------------------------------------------------
# The engine, way by way

@pytest.fixture(scope="module")
def served():
    """(model, work, {(name, keys): (engine, requests)}): all variants, each once."""
    model, found = tiny("llama", n_loop=3, rank=2), {}
    models, work = {False: model, True: unroll(model)}, work_of(3)
    for v in BASELINES + [replace(v, exits="drawn", keys=keys) for keys in ("exact", "copy") for v in EXITS]:
        engine = make_engine(v, models, {}, CONFIG, work.max_len, watch=True)
        found[v.name, v.keys] = engine, serve(engine, work, work.traces.get(v.exits))[1], v
    return model, work, found


def test_every_variant_serves_the_same_requests(served):
    _, work, found = served
    assert [name for name, _ in found] == ["V0", "V1", "V2", "V3", "V3h"] + ["V4", "V5", "V5h"] * 2
    for engine, requests, _ in found.values():
        assert [r.prompt for r in requests] == work.prompts
        assert [len(r.tokens) for r in requests] == [len(r.loops) for r in requests] == work.lengths
        assert engine.stats["prefill_tokens"] == sum(map(len, work.prompts))  # the one that warms up is not counted


def test_variants_differ_as_they_say(served):
    model, _, found = served
    for (name, keys), (engine, _, _) in found.items():
        assert (engine.model is model) == (name not in ("V0", "V1")) and engine.model.config.n_layer == 6
        assert engine.refill == (3 if name == "V0" else 1) and engine.keys == keys
        assert engine.head == {"V2": 0, "V4": 0}.get(name, 1)
        assert engine.slots == (4 if name.endswith("h") else 3)
    stage = make_engine(EXITS[2], {False: model}, {}, replace(CONFIG, head_rows=2, refill=2), 30, watch=False)
    assert stage.head == 2 and stage.slots == 5 and stage.refill == 2


def test_traces_are_obeyed_and_the_rest_runs_all_loops(served):
    _, work, found = served
    for (name, _), (_, requests, _) in found.items():
        for request, trace in zip(requests, work.traces["drawn"], strict=True):
            want = trace[1:] if name >= "V4" else [0 if name < "V2" else 2] * (len(trace) - 1)
            assert request.loops[1:] == want


def test_the_text_is_what_decoding_says(served):
    model, work, found = served
    for i in (0, 4):
        want = [t.item() for t, _ in decode(model, torch.tensor([work.prompts[i]]), work.lengths[i])]
        for name in ("V0", "V1", "V2", "V3", "V3h"):
            assert found[name, "exact"][1][i].tokens == want, name
    texts = {at: [r.tokens for r in requests] for at, (_, requests, _) in found.items()}
    assert texts["V4", "exact"] == texts["V5", "exact"] == texts["V5h", "exact"] != texts["V3", "exact"]
    assert texts["V4", "copy"] == texts["V5", "copy"] == texts["V5h", "copy"] != texts["V5", "exact"]


def test_the_simulator_counts_the_passes_that_the_engine_made(served):
    _, _, found = served
    for (name, _), (engine, requests, _) in found.items():
        work = [np.array([1, *(loop + 1 for loop in r.loops[1:])]) for r in requests]
        if name in ("V0", "V1", "V3", "V5"):
            assert engine.stats["passes"] == count_passes(work, 3, "static" if name == "V0" else "depth-wise"), name


def test_rows_are_summed_up(served):
    model, work, found = served
    rows = []
    for engine, requests, v in found.values():
        stats = {"all_s": 10.0} | engine.stats | {"prefill_s": 1.0, "block_s": 4.0, "attention_s": 2.0,
                                                  "decision_s": 0.5, "head_s": 2.5}
        one = {"requests": requests, "stats": stats, "seconds": [4.0, 1.0, 2.0], "slots": engine.slots}
        rows.append(bench_batching.summarise(v, one, [r.tokens for r in found["V2", "exact"][1]], 3, 3))
    drawn = np.concatenate([t[1:] for t in work.traces["drawn"]])
    for row in rows:
        assert row["tokens"] == sum(work.lengths) and row["tokens_per_s"] == row["tokens"] / 2
        assert row["time"] == {"prefill": 0.1, "block": 0.4, "decision": 0.05, "head": 0.25, "attention": 0.2,
                               "scheduler": pytest.approx(0.2)}
        early = row["exits"] == "drawn"
        assert row["mean_loops"] == pytest.approx(drawn.mean() + 1 if early else 3)
        assert row["left_at"] == pytest.approx(np.bincount(drawn) / len(drawn) if early else [0, 0, 1])
        assert (row["agreement"] == 1) == (not early) and row["agreement"] > 0.1
        ran = (drawn + 1).sum() if early else len(drawn) * (1 if row["merged"] else 3)
        assert row["occupancy"] == pytest.approx(ran / row["stats"]["passes"] / 3)
        assert (row["ghosts"] > 0) == (early and row["keys"] == "exact")

    passes = {row["name"]: row["stats"]["passes"] for row in rows}
    times = bench_batching.compare(rows, 3, 3)
    pass_s, merged_s = 4 / passes["V3"], 4 / passes["V1"]
    head_s = 2.5 / found["V1", "exact"][0].stats["head_runs"]
    assert times == pytest.approx({"pass_s": pass_s, "merged_pass_s": merged_s, "head_s": head_s,
                                   "rho": head_s / pass_s, "merged": merged_s / 3 / pass_s})
    v0, v1, v2, v3, v3h, v4, v5, v5h = rows[:8]
    assert v0["formula"] is None and v1["formula"] == 1 and v1["of_v1"] == 1
    token = merged_s + head_s                                    # of V1
    assert v2["formula"] == pytest.approx(token / (3 * pass_s + head_s))
    assert v3["formula"] == pytest.approx(token / (3 * (pass_s + head_s)))
    assert v3h["formula"] == pytest.approx(token / (3 * pass_s + head_s))
    deep = slowest(v4["left_at"], 3)
    assert v4["formula"] == pytest.approx(token / (deep * pass_s + head_s)) and deep > v4["mean_loops"]
    assert v5["formula"] == pytest.approx(token / (v5["mean_loops"] * (pass_s + head_s)))
    assert v5h["formula"] == pytest.approx(token / (v5["mean_loops"] * pass_s + head_s))
    assert v5["of_formula"] == pytest.approx(v5["of_v1"] / v5["formula"])
    total = sum(work.lengths)
    for row, of_pass in ((v0, merged_s), (v1, merged_s), (v3, pass_s), (v5, pass_s)):
        count = passes[row["name"]]
        assert row["simulated"] == pytest.approx(total / (count * of_pass))
        assert row["simulated_all"] == pytest.approx(total / (count * of_pass + 2.5 + 1.0))
    assert v2["simulated"] == pytest.approx(v3["simulated"], rel=0.2)
    assert v2["simulated"] < v4["simulated"] < v5["simulated"] and "simulated" not in v5h


def test_formulas_by_hand():
    assert speed_up("A", 2, 1.24, 0.53) == pytest.approx(2.53 / (1.24 * 1.53))
    assert speed_up("C", 2, 1.24, 0.53) == pytest.approx(1.4294, abs=1e-4)
    assert speed_up("A", 3, 3, 0.0) == speed_up("C", 3, 3, 0.7) == 1     # nothing gained, nothing lost
    assert speed_up("C", 2, 2, 0.5, merged=0.5) == pytest.approx(0.6)    # (1 + 0.5) / 2.5
    assert slowest([0.75, 0.25], 1) == 1.25 and slowest([0.5, 0.5], 2) == 1.75
    assert slowest([0.5, 0.25, 0.25], 2) == pytest.approx(1 + 0.75 + 1 - 0.75**2)


# ---------------------------------------------------------------------------------------------------------------------
# The whole command

def test_all_variants_are_measured_and_drawn(donor, capsys, tmp_path):
    numbers = run(capsys, *TINY, donor, "--rounds=2", "--mean_loops=1.5", f"--plot={tmp_path}/a.png")
    case, = numbers["cases"]
    assert case["requests"] == 4 and case["model"]["n_loop"] == 3 and case["model"]["rank"] == 2
    names = [(row["name"], row["exits"], row["keys"]) for row in case["rows"]]
    assert names[:5] == [(name, "never", "exact") for name in ("V0", "V1", "V2", "V3", "V3h")]
    assert names[5:] == [(name, "drawn", keys) for keys in ("exact", "copy") for name in ("V4", "V5", "V5h")]
    assert len({row["tokens"] for row in case["rows"]}) == 1
    assert all(len(row["seconds"]) == 2 and row["tokens_per_s"] > 0 for row in case["rows"])
    for row in case["rows"]:
        parts = row["time"]
        assert sum(parts.values()) - parts["attention"] == pytest.approx(1) and 0 < parts["attention"] < parts["block"]
        assert min(parts.values()) > 0
    assert (tmp_path / "a.png").read_bytes()[1:4] == b"PNG"


def test_some_of_the_variants(donor, capsys):
    case, = run(capsys, *TINY, donor, "--variants=V1,V3,V5", "--keys=copy")["cases"]
    assert [row["name"] for row in case["rows"]] == ["V1", "V3", "V5"]
    assert case["rows"][0]["agreement"] == case["rows"][1]["agreement"] == 1


def test_a_checkpoint_is_served_by_its_gate_and_by_the_oracle(ckpt, capsys):
    numbers = run(capsys, *TINY, f"--ckpt={ckpt}", "--keys=exact", f"--text={ROOT}/assets/books/valid.txt")
    rows = {(row["exits"], row["name"]): row for row in numbers["cases"][0]["rows"]}
    assert [kind for kind, name in rows if name == "V5"] == ["oracle", "gate"]
    for name in ("V4", "V5", "V5h"):
        assert rows["oracle", name]["agreement"] == 1 > rows["gate", name]["agreement"]
    assert 1 < rows["gate", "V5"]["mean_loops"] < 2 and rows["gate", "V5"]["left_at"] == rows["gate", "V4"]["left_at"]


@torch.no_grad()
def test_the_oracle_is_the_earliest_loop_that_says_the_same():
    model, work = tiny("llama", n_loop=3), work_of(3)
    texts, want = [], []
    for prompt, n in zip(work.prompts, work.lengths, strict=True):
        texts.append([t.item() for t, _ in decode(model, torch.tensor([prompt]), n)])
        states = model(torch.tensor([prompt + texts[-1]]))
        said = [model.logits(x)[0].argmax(-1).tolist() for x in states]
        at = range(len(prompt), len(prompt) + n - 1)             # the token at t says the one at t + 1
        want.append([2, *(next(loop for loop in range(3) if said[loop][t] == said[2][t]) for t in at)])
    assert bench_batching.oracle_traces(model, work, texts) == want and 0 in sum(want, [])


def test_prompts_and_lengths_are_the_same_each_time_and_spread():
    model, config = tiny("llama", n_loop=2), replace(CONFIG, requests=400)
    work = bench_batching.draw_work(config, model)
    assert work.prompts == bench_batching.draw_work(config, model).prompts
    assert {len(p) for p in work.prompts} == set(range(2, 7)) and set(work.lengths) == set(range(4, 13))
    assert work.max_len == max(len(p) + n for p, n in zip(work.prompts, work.lengths, strict=True))
    assert len(bench_batching.draw_work(CONFIG, model).prompts) == 4 * 3


# ---------------------------------------------------------------------------------------------------------------------
# The simulation

def test_a_small_queue_by_hand():
    work = [np.array(passes) for passes in ([1, 2], [2, 2, 1], [1, 1], [2])]
    assert count_passes(work, 1, "depth-wise") == 12             # one after the other
    # two slots: 3 then [1, 1] until 5; 5 then [2] until 7
    assert count_passes(work, 2, "depth-wise") == 7
    assert count_passes(work, 2, "static") == 5 + 2
    # steps: (1, 2), (2, 2), then ([1 1], 1), ([1 1]'s second, [2])
    assert count_passes(work, 2, "synchronous") == 2 + 2 + 1 + 2
    assert simulate(work, 2, 0.5) == pytest.approx(8 / 3.5)
    assert simulate(work, 2, 0.5, head_s=0.25, prefill_s=2.0) == pytest.approx(8 / (7 * 0.75 + 2))


def test_draws_have_the_mean_that_was_asked_for():
    for n_loop, mean in ((2, 1.25), (3, 1.25), (3, 2.5), (4, 1.0), (4, 4.0)):
        leave = leave_probability(n_loop, mean)
        drawn = draw_exits([3000, 1, 3000], n_loop, leave, seed=0)
        assert [len(d) for d in drawn] == [3000, 1, 3000]
        every = np.concatenate(drawn) + 1
        assert every.mean() == pytest.approx(mean, abs=0.04) and every.min() >= 1 and every.max() <= n_loop
        early = every[every < n_loop]
        assert n_loop < 3 or len(early) in (0, 6001) or (every == 1).mean() == pytest.approx(leave, abs=0.03)
    same, other = (draw_exits([50], 2, 0.5, seed)[0].tolist() for seed in (0, 1))
    assert same == draw_exits([50], 2, 0.5, 0)[0].tolist() != other
    assert leave_probability(2, 1.25) == 0.75


def test_the_papers_tokens_per_second_come_out(capsys):
    rows = run(capsys, "--what=batching", "--simulate", "--requests=4000", "--new_tokens=32")["rows"]
    checked = [row for row in rows if "Gemma" in row["name"] and row["exits_from"] != "this row's own"
               and (row["name"], row["text"]) != ("Gemma, sequence batching", "PG19")]
    assert len(checked) == 2 + 3 + 4 * 2                         # one share for ranks 64 to 512 alike
    for row in checked:
        assert row["tokens_per_s"] == pytest.approx(row["published"], rel=0.05), row
    own = [row for row in rows if row["exits_from"] == "this row's own"]
    assert len(own) == 17 and all(row["tokens_per_s"] == pytest.approx(row["published"], rel=0.05) for row in own)


def test_shares_are_given_or_implied():
    tied, three = PAPER[1], PAPER[6]
    assert leave_of(tied, 0, 0.1) == (0.80, "given")
    leave, source = leave_of(three, 0, 0.1)
    assert source == "this row's own" and 1 + (1 - leave) + (1 - leave)**2 == pytest.approx(1000 / (0.182 * 3120))
    assert leave_of(Times("mine", 2, 4, 0.5), 0, 0.1) == (0.1, "--mean_loops")


def test_times_of_a_file(capsys, tmp_path):
    path = tmp_path / "times.json"
    path.write_text(json.dumps([{"name": "mine", "n_loop": 2, "batch": 4, "ms": 0.5, "left": [1.0, 0.0]}]))
    assert read_times(str(path)) == [Times("mine", 2, 4, 0.5, left=(1.0, 0.0))]
    rows = run(capsys, "--what=batching", "--simulate", f"--times={path}", "--requests=2000")["rows"]
    assert [row["tokens_per_s"] for row in rows] == pytest.approx([2000, 1000], rel=0.02)
    for text in ("[]", "{", '[{"name": "a"}]', '[{"name": "a", "n_loop": 2, "batch": 0, "ms": 1}]',
                 '[{"name": "a", "n_loop": 2, "batch": 1, "ms": 1, "left": [2]}]'):
        path.write_text(text)
        with pytest.raises(UserError, match="times.json cannot be used"):
            read_times(str(path))
    with pytest.raises(UserError, match=r"nowhere\.json cannot be used"):
        read_times("nowhere.json")


# ---------------------------------------------------------------------------------------------------------------------
# Decoding and kernels

def test_decoding_says_what_transformers_says(donor, capsys):
    pytest.importorskip("transformers")
    numbers = run(capsys, "--what=decode", donor, "--rows=1,3", "--new_tokens=9", "--prompt_len=5", "--device=cpu")
    codes = ["decode", "engine", "transformers, eager", "transformers, sdpa"]
    assert [(r["code"], r["rows"]) for r in numbers["rows"]] == [(c, rows) for rows in (1, 3) for c in codes]
    for row in numbers["rows"]:
        assert row["equal"] == 1 and [len(text) for text in row["tokens"]] == row["rows"] * [9]
        assert row["of_floor"] == pytest.approx(row["tokens_per_s"] / row["floor_tokens_per_s"])
    best = max(row["tokens_per_s"] for row in numbers["rows"][2:4])
    assert numbers["rows"][0]["of_transformers"] == pytest.approx(numbers["rows"][0]["tokens_per_s"] / best)


def test_decoding_a_looped_checkpoint(ckpt, capsys):
    rows = run(capsys, "--what=decode", f"--ckpt={ckpt}", "--rows=2", "--new_tokens=5", "--device=cpu")["rows"]
    assert all(row["equal"] == 1 for row in rows)


def test_bytes_of_a_step_by_hand():
    model = tiny("gemma", n_loop=2, rank=0)
    layer = sum(p.numel() for p in model.layers[0].parameters())
    cache = 2 * 6 * 1 * 12 * 10 * 3                              # k and v, depths, heads, D, context, rows
    assert bench_decode.bytes_per_step(model, 3, 10) == 4 * (6 * layer + 32 + 53 * 32 + cache)
    tree = tiny("gemma", n_loop=2, rank=0).to(torch.bfloat16)
    assert 2 * bench_decode.bytes_per_step(tree, 3, 10) == bench_decode.bytes_per_step(model, 3, 10)


def test_every_rung_does_the_same_and_moves_what_it_must():
    c = Config(**SMALL | ARCHS["llama"] | {"n_loop": 3, "rank": 2})
    found = bench_decode.linear_works(c, 2, "up", 32, 40, torch.device("cpu"), torch.float32)
    found |= bench_decode.attention_works(c, 2, 5, torch.device("cpu"), torch.float32)
    assert list(found) == ["lora_rows up", "linear_rows up", "decode_attention"]
    for works, _ in found.values():
        spec, *others = (work() for work in works.values())
        assert len(others) >= 1 and spec.abs().max() > 0
        for other in others:
            torch.testing.assert_close(other, spec, atol=1e-4, rtol=1e-4)
    lora = 2 * (32 + 40) + 2 * 2 * (32 + 40)                     # two rows, at two of the three loops
    assert [moved for _, moved in found.values()] == [4 * lora, 4 * (lora + 32 * 40), 4 * 2 * (2 * 40 + 2 * 5 * 2 * 10)]


def test_kernels_are_measured_rung_by_rung(donor, capsys):
    rows = run(capsys, "--what=kernels", donor, "--rows=1,2", "--loops=2", "--ranks=0,2", "--steps=1", "--seq_len=8",
               "--device=cpu")["rows"]
    assert [row["work"] for row in rows if row["rank"] == 0 and row["rows"] == 2] == [
        "linear_rows q", "linear_rows up", "linear_rows down", "decode_attention"]
    assert sum(row["rank"] == 2 for row in rows) == 2 * 6
    assert all(us > 0 for row in rows for us in row["us"].values()) and all(row["floor_us"] > 0 for row in rows)


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes

@pytest.mark.parametrize("flags, message", [
    (["--slots=0"], "--slots=0 must be positive"), (["--prompt_len=0"], "--prompt_len=0 must be positive"),
    (["--rounds=0"], "--rounds=0 must be positive"), (["--new_tokens=2"], "use 3 or more"),
    (["--requests=-1"], "--requests=-1 must be 0 or more"),
    (["--refill=4"], "--refill=4 must be 1 to 3, the --slots"), (["--refill=0"], "--refill=0 must be 1 to 3"),
    (["--variants=V1,V5"], "--variants=V1,V5: give V1 and V3"), (["--variants=V1,V3,V6"], "any of V0, V1, V2, V3, V3h"),
    (["--head_rows=4"], "--head_rows=4 must be at most 3, the --slots"),
    (["--loops=1"], "rows cannot stand at different ones; use --loops=2 or more"),
    (["--loops=4"], "4 loops do not divide the 6 layers"), (["--ranks=full"], "must be whole numbers by comma"),
    (["--mean_loops=3.5"], "--mean_loops=3.5 of 3 loops; use 1 to 3"), (["--mean_loops=0.5"], "must be 1 or more"),
    (["--simulate", "--mean_loops=nan"], "must be 1 or more"), (["--simulate", "--exit_prob=nan"], "is a probability"),
    (["--simulate", "--new_tokens=0"], "must be positive"), (["--simulate", "--requests=-1"], "must be 0 or more"),
    (["--simulate", "--plot=a.png"], "draws nothing"), (["--times=a.json"], "is read by --simulate alone"),
    (["--simulate", "--shape=small"], "--shape=small is of random weights"),
    (["--save=no/a.jsonl"], "--save=no/a.jsonl cannot be written"),
    (["--what=train", "--plot=a.png"], "and --what=train does not read it"),
    (["--what=svd", "--compile"], "--compile=True is for --what=train or decode"),
    (["--what=tokenise", "--rounds=0"], "must be positive"), (["--what=convert", "--seq_len=0"], "must be positive"),
    (["--exit_prob=1.5"], "--exit_prob=1.5 is a probability"),
    (["--exits=gate"], "use drawn, oracle, several by comma (gate needs --ckpt)"),
    (["--keys=none"], "--keys=none is not to be had here; use exact, copy"),
    (["--new_tokens=60"], "and the model's context is 64: give less"),
    (["--vocab=-5"], "--vocab=-5 must be 0 or more"), (["--ckpt=nowhere"], "no checkpoint in nowhere"),
    (["--plot=a.txt"], "--plot=a.txt: give a file that ends in .png"),
    (["--plot=no/a.png"], "in a folder that is there"),
])
def test_mistakes_are_named_before_any_work(donor, monkeypatch, flags, message):
    monkeypatch.setattr(bench_batching, "run_variants", lambda *_: pytest.fail("began to measure"))
    with pytest.raises(UserError) as e:
        bench.main([*TINY, donor, *flags])
    assert message in str(e.value)


def test_a_gate_that_is_not_calibrated_is_named(ckpt, monkeypatch):
    monkeypatch.setattr(bench_batching, "run_variants", lambda *_: pytest.fail("began to measure"))
    with pytest.raises(UserError, match="no calibrated threshold of gate with copy keys"):
        bench.main([*TINY, f"--ckpt={ckpt}", "--keys=exact,copy"])


@pytest.mark.parametrize("flags, message", [
    (["--what=decode", "--rows=0"], "--rows=0 must be positive"), (["--what=kernels", "--rows=0"], "must be positive"),
    (["--what=decode", "--new_tokens=60"], "the model's context is 64: give less"),
    (["--what=kernels", "--loops=4"], "4 loops do not divide"), (["--what=decode", "--rounds=0"], "--rounds=0")])
def test_mistakes_about_decoding_are_named(donor, monkeypatch, flags, message):
    monkeypatch.setattr(bench_decode, "time_in_turn", lambda *_: pytest.fail("began to measure"))
    with pytest.raises(UserError) as e:
        bench.main([*flags, "--device=cpu", donor])
    assert message in str(e.value)


def test_settings_that_are_fine_pass():
    check_settings(replace(CONFIG, mean_loops=2.0, head_rows=3), 2, 64, ["drawn"])
