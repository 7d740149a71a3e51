"""bench.py: all variants serve the same requests, and what stands beside their speed is right."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_model import SMALL, tiny

import bench
from bench import BASELINES, EXITS, NAMES, OLD_NAMES, check_workload, make_engine, mean_deepest, serve, speed_up
from benchmarks.simulate import count_passes, draw_exits
from benchmarks.workload import Workload, draw_workload, oracle_loops
from convert import to_hf, unroll
from exits import Gate, decode
from lib.cli import UserError
from lib.folders import THRESHOLDS_FILE
from lib.results import read_lines
from lib.tokenizer import copy_tokenizer

ROOT = Path(bench.__file__).parent
CONFIG = bench.BatchingConfig(slots=3, prompt_len=4, new_tokens=8, device="cpu")
TINY = ["--slots=3", "--requests=4", "--prompt_len=4", "--new_tokens=5", "--device=cpu", "--loops=3", "--ranks=2"]
SYNCHRONOUS, DEPTHWISE, IN_BATCHES = (variant.name for variant in EXITS)
MERGED = ("static", "sequence")


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


def run(capsys, *flags) -> dict:
    bench.main(list(flags))
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def work_of(n_loop: int, vocab=SMALL["vocab_size"]) -> Workload:
    draw = np.random.default_rng(3)
    lengths = [5, 9, 4, 7, 8, 6, 4]
    prompts = [draw.integers(0, vocab, n).tolist() for n in (3, 5, 2, 6, 4, 4, 3)]
    return Workload(prompts, lengths, {"drawn": [t.tolist() for t in draw_exits(lengths, n_loop, 0.5, seed=1)]})


# ---------------------------------------------------------------------------------------------------------------------
# The variants

@pytest.fixture(scope="module")
def served():
    """(model, work, {(name, keys): (engine, requests, variant)}): all variants, each once."""
    model, found = tiny("llama", n_loop=3, rank=2), {}
    models, work = {False: model, True: unroll(model)}, work_of(3)
    for v in BASELINES + [replace(v, exits="drawn", keys=keys) for keys in ("exact", "copy") for v in EXITS]:
        engine = make_engine(v, models, {}, CONFIG, work.max_len, timed=True)
        found[v.name, v.keys] = engine, serve(engine, work, work.forced_exits.get(v.exits))[1], v
    return model, work, found


def test_old_names_are_known():
    assert OLD_NAMES == {
        "V0": "static", "V1": "sequence", "V2": "sequence, unmerged", "V3": "depthwise",
        "V3h": "depthwise, head in full batches", "V4": "synchronous exits", "V5": "depthwise+exits",
        "V5h": "depthwise+exits, head in full batches"}


def test_every_variant_serves_the_same_requests(served):
    _, work, found = served
    assert [name for name, _ in found] == [v.name for v in BASELINES] + [v.name for v in EXITS] * 2
    for engine, requests, _ in found.values():
        assert [r.prompt for r in requests] == work.prompts
        assert [len(r.tokens) for r in requests] == [len(r.loops) for r in requests] == work.lengths
        assert engine.stats["prefill_tokens"] == sum(map(len, work.prompts))  # the one for warm-up is not counted


def test_variants_differ_as_they_say(served):
    model, _, found = served
    for (name, keys), (engine, _, _) in found.items():
        assert (engine.model is model) == (name not in MERGED) and engine.model.config.n_layer == 6
        assert engine.refill == (3 if name == "static" else 1) and engine.keys == keys
        assert engine.head == {"sequence, unmerged": 0, SYNCHRONOUS: 0}.get(name, 1)
        assert engine.slots == (4 if name.endswith(", head in full batches") else 3)
    stage = make_engine(EXITS[2], {False: model}, {}, replace(CONFIG, head_rows=2, refill=2), 30, timed=False)
    assert stage.head == 2 and stage.slots == 5 and stage.refill == 2


def test_forced_exits_are_obeyed_and_the_rest_runs_all_loops(served):
    _, work, found = served
    for (name, _), (_, requests, variant) in found.items():
        for request, forced in zip(requests, work.forced_exits["drawn"], strict=True):
            late = [0 if name in MERGED else 2] * (len(forced) - 1)
            assert request.loops[1:] == (forced[1:] if variant.exits == "drawn" else late)


def test_the_text_is_what_decoding_generates(served):
    model, work, found = served
    for i in (0, 4):
        want = [t.item() for t, _ in decode(model, torch.tensor([work.prompts[i]]), work.lengths[i])]
        for variant in BASELINES:
            assert found[variant.name, "exact"][1][i].tokens == want, variant.name
    texts = {at: [r.tokens for r in requests] for at, (_, requests, _) in found.items()}
    for keys in ("exact", "copy"):
        assert texts[SYNCHRONOUS, keys] == texts[DEPTHWISE, keys] == texts[IN_BATCHES, keys]
    assert texts["depthwise", "exact"] != texts[DEPTHWISE, "exact"] != texts[DEPTHWISE, "copy"]


def test_the_simulation_counts_the_passes_that_the_engine_made(served):
    _, _, found = served
    for (name, _), (engine, requests, _) in found.items():
        work = [np.array([1, *(loop + 1 for loop in r.loops[1:])]) for r in requests]
        if name in (*MERGED, "depthwise", DEPTHWISE):
            assert engine.stats["passes"] == count_passes(work, 3, "static" if name == "static" else "depth-wise"), name


def summarised(served) -> tuple[list[dict], list[dict]]:
    """(rows, what they are made from), as if the parts of each variant had taken these seconds."""
    _, _, found = served
    rows, parts = [], []
    full_depth = [r.tokens for r in found["sequence, unmerged", "exact"][1]]
    for engine, requests, v in found.values():
        stats = {"all_s": 10.0} | engine.stats | {"prefill_s": 1.0, "block_s": 4.0, "attention_s": 2.0,
                                                  "decision_s": 0.5, "head_s": 2.5}
        parts.append({"requests": requests, "stats": stats, "seconds": [4.0, 1.0, 2.0], "slots": engine.slots})
        rows.append(bench.summarise(v, parts[-1], full_depth, 3, 3))
    return rows, parts


def test_rows_are_summed_up(served):
    _, work, _ = served
    drawn = np.concatenate([t[1:] for t in work.forced_exits["drawn"]])
    for row in summarised(served)[0]:
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


def test_rows_are_compared_with_the_formulas_and_the_simulation(served):
    _, work, found = served
    rows, parts = summarised(served)
    passes = {row["name"]: row["stats"]["passes"] for row in rows}
    times = bench.compare(rows, parts, 3, 3)
    pass_s, merged_s = 4 / passes["depthwise"], 4 / passes["sequence"]
    head_s = 2.5 / found["sequence", "exact"][0].stats["head_runs"]
    assert times == pytest.approx({"pass_s": pass_s, "merged_pass_s": merged_s, "head_s": head_s,
                                   "rho": head_s / pass_s, "merged": merged_s / 3 / pass_s})
    static, sequence, unmerged, depthwise, depthwise_h, synchronous, exits, exits_h = rows[:8]
    assert static["formula"] is None and sequence["formula"] == 1 and sequence["of_v1"] == 1
    token = merged_s + head_s                                    # of sequence batching
    assert unmerged["formula"] == pytest.approx(token / (3 * pass_s + head_s))
    assert depthwise["formula"] == pytest.approx(token / (3 * (pass_s + head_s)))
    assert depthwise_h["formula"] == pytest.approx(token / (3 * pass_s + head_s))
    deep = mean_deepest(synchronous["left_at"], 3)
    assert synchronous["formula"] == pytest.approx(token / (deep * pass_s + head_s))
    assert deep > synchronous["mean_loops"]
    assert exits["formula"] == pytest.approx(token / (exits["mean_loops"] * (pass_s + head_s)))
    assert exits_h["formula"] == pytest.approx(token / (exits["mean_loops"] * pass_s + head_s))
    assert exits["of_formula"] == pytest.approx(exits["of_v1"] / exits["formula"])
    total = sum(work.lengths)
    for row, of_pass in ((static, merged_s), (sequence, merged_s), (depthwise, pass_s), (exits, pass_s)):
        count = passes[row["name"]]
        assert row["simulated"] == pytest.approx(total / (count * of_pass))
        assert row["simulated_all"] == pytest.approx(total / (count * of_pass + 2.5 + 1.0))
    assert unmerged["simulated"] == pytest.approx(depthwise["simulated"], rel=0.2)
    assert unmerged["simulated"] < synchronous["simulated"] < exits["simulated"] and "simulated" not in exits_h


def test_formulas_by_hand():
    assert speed_up("every pass", 2, 1.24, 0.53) == pytest.approx(2.53 / (1.24 * 1.53))
    assert speed_up("in full batches", 2, 1.24, 0.53) == pytest.approx(1.4294, abs=1e-4)
    assert speed_up("every pass", 3, 3, 0.0) == speed_up("in full batches", 3, 3, 0.7) == 1   # no gain, no loss
    assert speed_up("in full batches", 2, 2, 0.5, merged=0.5) == pytest.approx(0.6)    # (1 + 0.5) / 2.5
    assert mean_deepest([0.75, 0.25], 1) == 1.25 and mean_deepest([0.5, 0.5], 2) == 1.75
    assert mean_deepest([0.5, 0.25, 0.25], 2) == pytest.approx(1 + 0.75 + 1 - 0.75**2)


# ---------------------------------------------------------------------------------------------------------------------
# The whole command

def test_all_variants_are_measured_and_drawn(donor, capsys, tmp_path):
    numbers = run(capsys, *TINY, donor, "--rounds=2", "--mean_loops=1.5", f"--plot={tmp_path}/a.png")
    case, = numbers["cases"]
    assert case["requests"] == 4 and case["model"]["n_loop"] == 3 and case["model"]["rank"] == 2
    names = [(row["name"], row["exits"], row["keys"]) for row in case["rows"]]
    assert names[:5] == [(name, "never", "exact") for name in NAMES[:5]]
    assert names[5:] == [(name, "drawn", keys) for keys in ("exact", "copy") for name in NAMES[5:]]
    assert len({row["tokens"] for row in case["rows"]}) == 1
    assert all(len(row["seconds"]) == 2 and row["tokens_per_s"] > 0 for row in case["rows"])
    for row in case["rows"]:
        parts = row["time"]
        assert sum(parts.values()) - parts["attention"] == pytest.approx(1) and 0 < parts["attention"] < parts["block"]
        assert min(parts.values()) > 0
    assert (tmp_path / "a.png").read_bytes()[1:4] == b"PNG"


def test_a_line_with_the_old_names_is_drawn_as_well(tmp_path, monkeypatch):
    line = read_lines(ROOT / "results/batching.jsonl")[0]
    labels = []
    monkeypatch.setattr(bench, "label", lambda row, label=bench.label: labels.append(label(row)) or labels[-1])
    bench.plot_batching(line, str(tmp_path / "a.png"))
    assert ["sequence", "", ""] in labels and ["depthwise+exits", "drawn", "copied"] in labels
    assert (tmp_path / "a.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize("flag", ["V1,V2,V3,V5", "sequence,sequence, unmerged,depthwise,depthwise+exits"])
def test_some_of_the_variants(donor, capsys, flag):
    case, = run(capsys, *TINY, donor, f"--variants={flag}", "--keys=copy")["cases"]
    assert [row["name"] for row in case["rows"]] == ["sequence", "sequence, unmerged", "depthwise", "depthwise+exits"]
    assert case["rows"][0]["agreement"] == case["rows"][1]["agreement"] == 1


def test_a_checkpoint_is_served_by_its_gate_and_by_the_oracle(ckpt, capsys):
    numbers = run(capsys, *TINY, f"--ckpt={ckpt}", "--keys=exact", f"--text={ROOT}/assets/books/valid.txt")
    rows = {(row["exits"], row["name"]): row for row in numbers["cases"][0]["rows"]}
    assert [kind for kind, name in rows if name == DEPTHWISE] == ["oracle", "gate"]
    for name in NAMES[5:]:
        assert rows["oracle", name]["agreement"] == 1 > rows["gate", name]["agreement"]
    assert 1 < rows["gate", DEPTHWISE]["mean_loops"] < 2
    assert rows["gate", DEPTHWISE]["left_at"] == rows["gate", SYNCHRONOUS]["left_at"]


@torch.no_grad()
def test_the_oracle_is_the_earliest_loop_that_predicts_the_same():
    model, work = tiny("llama", n_loop=3), work_of(3)
    texts, want = [], []
    for prompt, n in zip(work.prompts, work.lengths, strict=True):
        texts.append([t.item() for t, _ in decode(model, torch.tensor([prompt]), n)])
        states = model(torch.tensor([prompt + texts[-1]]))
        predicted = [model.logits(x)[0].argmax(-1).tolist() for x in states]
        at = range(len(prompt), len(prompt) + n - 1)             # the token at t predicts the one at t + 1
        want.append([2, *(next(loop for loop in range(3) if predicted[loop][t] == predicted[2][t]) for t in at)])
    assert oracle_loops(model, work, texts) == want and 0 in sum(want, [])


def test_prompts_and_lengths_are_the_same_each_time_and_spread():
    model, config = tiny("llama", n_loop=2), replace(CONFIG, requests=400)
    work = draw_workload(config, model)
    assert work.prompts == draw_workload(config, model).prompts
    assert {len(p) for p in work.prompts} == set(range(2, 7)) and set(work.lengths) == set(range(4, 13))
    assert work.max_len == max(len(p) + n for p, n in zip(work.prompts, work.lengths, strict=True))
    assert len(draw_workload(CONFIG, model).prompts) == 4 * 3


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes

@pytest.mark.parametrize("flags, message", [
    (["--slots=0"], "--slots=0 must be positive"), (["--prompt_len=0"], "--prompt_len=0 must be positive"),
    (["--rounds=0"], "--rounds=0 must be positive"), (["--new_tokens=2"], "use 3 or more"),
    (["--requests=-1"], "--requests=-1 must be 0 or more"),
    (["--refill=4"], "--refill=4 must be 1 to 3, the --slots"), (["--refill=0"], "--refill=0 must be 1 to 3"),
    (["--variants=V1,V5"], "--variants=V1,V5: give sequence and depthwise"),
    (["--variants=V1,V3,V6"], "any of static; sequence; sequence, unmerged; depthwise;"),
    (["--head_rows=4"], "--head_rows=4 must be at most 3, the --slots"),
    (["--loops=1"], "rows cannot be at different ones; use --loops=2 or more"),
    (["--loops=4"], "4 loops do not divide the 6 layers"), (["--ranks=full"], "must be whole numbers by comma"),
    (["--mean_loops=3.5"], "--mean_loops=3.5 of 3 loops; use 1 to 3"), (["--mean_loops=0.5"], "must be 1 or more"),
    (["--mean_loops=nan"], "must be 1 or more"), (["--exit_prob=nan"], "is a probability"),
    (["--new_tokens=0"], "must be positive"),
    (["--ckpt=nowhere", "--shape=small"], "--shape=small describes random weights, and --ckpt=nowhere has its own"),
    (["--save=no/a.jsonl"], "--save=no/a.jsonl cannot be written"),
    (["--exit_prob=1.5"], "--exit_prob=1.5 is a probability"),
    (["--exits=gate"], "use drawn, oracle, several by comma (gate needs --ckpt)"),
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
    check_workload(replace(CONFIG, mean_loops=2.0, head_rows=3), 2, 64, ["drawn"])
