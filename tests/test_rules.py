"""Exit rules: scores against formulas in plain Python, rows that are independent of each other, files on disk."""

import json
import math
import re

import pytest
import torch
from test_model import close, cut, tiny
from tiny import contents, files_end_at
from torch.utils._python_dispatch import TorchDispatchMode

from exits import SCORED, Gate, Rule, load_rule, read_thresholds
from lib.cli import UserError
from lib.folders import GATE_FILE, THRESHOLDS_FILE, write_beside

N, C, V, EXITS = 40, 6, 11, 3
LOOPS = [*range(EXITS), torch.arange(N) % (EXITS + 1)]       # the last: rows at all loops, also the last loop
each_rule = pytest.mark.parametrize("name", SCORED)


def random_gate(dtype=torch.float64, n_exits=EXITS, n_embd=C):
    torch.manual_seed(5)
    gate = Gate(n_exits, n_embd, hidden=7).to(dtype).requires_grad_(False)
    for p in gate.parameters():
        p.normal_()
    return gate


def given(name, dtype=torch.float64, **options):
    """A rule, and N states and logits, of flat and of peaked distributions."""
    rule = Rule(name, gate=random_gate(dtype), **options)
    torch.manual_seed(6)
    sharp = torch.logspace(-2, 1, N)[:, None]
    return rule, (100 * torch.randn(N, C)).to(dtype), (torch.randn(N, V) * sharp).to(dtype)


def written_out(name, gate, x, loop, logits) -> float:
    """The score of one state x (C,)."""
    p = sorted((math.exp(v) / sum(map(math.exp, logits.tolist())) for v in logits.tolist()), reverse=True)
    if name == "max_prob":
        return p[0]
    if name == "margin":
        return p[0] - p[1]
    if name == "entropy":
        return 1 - sum(-q * math.log(q) for q in p) / math.log(V)
    scale, answer = (sum(v * v for v in x.tolist()) / C) ** 0.5, gate.b2[loop].item()
    for unit in range(gate.w1.size(1)):
        inner = gate.b1[loop, unit].item() + sum(
            gate.w1[loop, unit, i].item() * x[i].item() / scale for i in range(C))
        answer += gate.w2[loop, unit].item() * inner * (1 + math.erf(inner / 2**0.5)) / 2        # GELU
    return 1 / (1 + math.exp(-answer))


# ---------------------------------------------------------------------------------------------------------------------
# Scores and decisions

@each_rule
def test_scores_are_those_of_the_formulas(name):
    rule, x, logits = given(name)
    for loop in range(EXITS):
        want = [written_out(name, rule.gate, *row) for row in zip(x, [loop] * N, logits, strict=True)]
        close(rule.score(x, loop, logits), torch.tensor(want, dtype=torch.float64), 1e-12)
        assert name == "gate" or torch.equal(rule.score(x, loop, logits), rule.score(x, 0, logits))
    assert rule.reads_logits == (name != "gate")


@each_rule
def test_rows_at_different_loops_score_as_they_do_one_by_one(name):
    rule, x, logits = given(name)
    loops = torch.arange(N) % EXITS
    rows = [rule.score(x[i], int(loops[i]), logits[i]) for i in range(N)]
    close(rule.score(x, loops, logits), torch.stack(rows), 1e-12)
    shape = (2, 4, 5)
    close(rule.score(x.view(*shape, C), loops.view(shape), logits.view(*shape, V)).flatten(), torch.stack(rows), 1e-12)


@each_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_are_between_0_and_1(name, dtype):
    """Also for uniform distributions, for a token of probability 1, and for very large states."""
    rule, x, logits = given(name, dtype)
    torch.manual_seed(7)
    for size in (2, 7, 53, 4096):
        flat, certain = torch.zeros(N, size, dtype=dtype), torch.zeros(N, size, dtype=dtype)
        certain[:, 1] = 1e4
        for scores in (flat, flat - 7.7, 1e-4 * torch.randn(N, size, dtype=dtype), certain, -certain):
            score = rule.score(x * 1e10, 1, scores)
            assert ((score >= 0) & (score <= 1)).all()
    assert name == "gate" or rule.score(x, 1, certain).eq(1).all()


@each_rule
@pytest.mark.parametrize("loop", LOOPS, ids=str)
def test_a_threshold_of_infinity_keeps_all_and_of_0_none(name, loop):
    rule, x, logits = given(name, torch.float32, threshold=math.inf)
    assert not rule(x, loop, logits).any()
    rule.threshold = 0.0
    assert rule(x, loop, logits).all() and rule(x, loop, torch.zeros_like(logits)).all()


@each_rule
def test_a_state_exits_where_its_score_reaches_the_threshold(name):
    rule, x, logits = given(name)
    score = rule.score(x, 1, logits)
    for rule.threshold in score.tolist():
        assert torch.equal(rule(x, 1, logits), score >= rule.threshold)
    assert rule(x, 1, logits)[-1]                            # at its own score


@pytest.mark.parametrize("loop", LOOPS, ids=str)
def test_never_and_fixed_depend_on_the_loop_alone(loop):
    x, at = torch.full((N, C), torch.nan), torch.zeros(N, dtype=torch.long) + loop
    assert not Rule()(x, loop).any() and Rule()(x, loop).shape == (N,)
    for exit_loop in range(EXITS + 1):
        assert torch.equal(Rule("fixed", exit_loop=exit_loop)(x, loop), at >= exit_loop)
    assert not Rule().reads_logits and not Rule("fixed").reads_logits


@each_rule
@pytest.mark.parametrize("loop", LOOPS, ids=str)
def test_other_rows_change_nothing_and_a_broken_one_stays(name, loop):
    """Bit for bit, even if all other rows are NaN. A state that is NaN never exits, at any threshold."""
    rule, x, logits = given(name, torch.float32, threshold=0.4)
    score, exits = rule.score(x, loop, logits), rule(x, loop, logits)
    assert exits.any() and not exits.all()
    for keep in (torch.arange(N) % 2 == 0, torch.arange(N) == 3):
        broken = [torch.where(keep[:, None], t, torch.nan) for t in (x, logits)]
        assert torch.equal(rule.score(broken[0], loop, broken[1])[keep], score[keep])
        assert torch.equal(rule(broken[0], loop, broken[1]), exits & keep)
        rule.threshold = 0.0
        assert torch.equal(rule(broken[0], loop, broken[1]), keep)
        rule.threshold = 0.4


class NoSync(TorchDispatchMode):
    """Operations for which the host waits for the device are an error."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.name()
        assert not re.search("_local_scalar_dense|item|nonzero|masked_select|is_nonzero|equal$|unique", name), name
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["never", "fixed", *SCORED])
@pytest.mark.parametrize("loop", LOOPS, ids=str)
def test_nothing_waits_for_the_device(name, loop):
    rule, x, logits = given(name, threshold=0.5, exit_loop=1)
    with NoSync():
        rule(x, loop, logits)
    with pytest.raises(AssertionError), NoSync():
        bool(rule(x, loop, logits).any())                    # so the check notices


def test_the_gate_reads_half_precision_and_is_blind_to_scale():
    gate, x = random_gate(torch.float32), torch.randn(N, C)
    assert gate(x.bfloat16(), 0).dtype == torch.float32
    close(gate(x.bfloat16(), 1), gate(x.bfloat16().float(), 1), 0)
    close(gate(1000 * x, 1), gate(x, 1), 1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Files

@pytest.fixture
def model():
    return tiny("llama", n_loop=3)


@pytest.fixture
def ckpt(model, tmp_path):
    """A checkpoint with a gate, and thresholds for recomputed KV."""
    model.save(tmp_path / "ckpt")
    random_gate(torch.float32, 2, 32).save(tmp_path / "ckpt")
    (tmp_path / "ckpt" / THRESHOLDS_FILE).write_text(json.dumps(
        {"exact": {"agreement": 0.9, "confidence": 0.95, "thresholds": {"gate": 0.625, "margin": 0.25}}}))
    return tmp_path / "ckpt"


def test_a_gate_is_read_as_it_was_saved(ckpt, model):
    gate, x = Gate.load(ckpt, model), torch.randn(N, 32)
    assert torch.equal(gate(x, 1), random_gate(torch.float32, 2, 32)(x, 1)) and not gate.training
    assert sorted(p.name for p in ckpt.iterdir()) == ["config.json", THRESHOLDS_FILE, GATE_FILE, "model.safetensors"]


def test_a_gate_that_does_not_fit_the_disk_leaves_the_old_one(ckpt):
    before = contents(ckpt)
    with files_end_at(500), pytest.raises(UserError, match=rf"cannot write .*{GATE_FILE} .* before is untouched"):
        Gate(2, 32).save(ckpt)
    assert contents(ckpt) == before
    Gate(2, 32).save(ckpt)
    assert contents(ckpt)[GATE_FILE] != before[GATE_FILE]


def test_what_is_added_to_a_checkpoint_is_whole_or_not_there(ckpt):
    before = contents(ckpt)
    with files_end_at(100), pytest.raises(UserError, match=rf"cannot write .*{THRESHOLDS_FILE} .* before is untouched"):
        write_beside(ckpt, THRESHOLDS_FILE, lambda path: path.write_text("x" * 200))
    assert contents(ckpt) == before
    write_beside(ckpt, THRESHOLDS_FILE, lambda path: path.write_text("x" * 200))
    assert contents(ckpt) == before | {THRESHOLDS_FILE: b"x" * 200}


def test_a_new_gate_removes_the_thresholds_of_the_old_one(ckpt):
    random_gate(torch.float32, 2, 32).save(ckpt)
    assert not (ckpt / THRESHOLDS_FILE).exists()


def test_rules_are_loaded_with_their_thresholds(ckpt, model):
    rule = load_rule(ckpt, model, "gate")
    assert (rule.name, rule.threshold) == ("gate", 0.625)
    assert torch.equal(rule.gate.w1, random_gate(torch.float32, 2, 32).w1)
    assert load_rule(ckpt, model, "margin") == Rule("margin", 0.25)
    assert load_rule(ckpt, model, "entropy", 0.5, keys="copy") == Rule("entropy", 0.5)
    assert [load_rule(ckpt, model, "margin", t).threshold for t in (0.0, 1.0, math.inf)] == [0, 1, math.inf]
    assert [load_rule(ckpt, model, "fixed", exit_loop=i) for i in (1, 3)] == [
        Rule("fixed", exit_loop=0), Rule("fixed", exit_loop=2)]
    assert load_rule(ckpt, model, "never") == load_rule(ckpt, tiny("llama"), "never") == Rule()


def test_thresholds_of_another_dtype_are_used_with_a_warning(ckpt, model, capsys):
    found = json.loads((ckpt / THRESHOLDS_FILE).read_text())
    for dtype, warned in ((torch.float32, False), (torch.bfloat16, True)):
        served = model.to(dtype)
        found["exact"]["dtype"] = "torch.float32"
        (ckpt / THRESHOLDS_FILE).write_text(json.dumps(found))
        assert load_rule(ckpt, served, "gate").threshold == 0.625
        err = capsys.readouterr().err
        assert ("calibrated in torch.float32 and are used in torch.bfloat16: the agreement of 0.9" in err) == warned
        load_rule(ckpt, served, "gate", 0.5)                     # a threshold of one's own promises nothing
        del found["exact"]["dtype"]                              # nor do those of earlier versions say their dtype
        (ckpt / THRESHOLDS_FILE).write_text(json.dumps(found))
        load_rule(ckpt, served, "gate")
        assert not capsys.readouterr().err


def test_saving_other_weights_drops_gate_and_thresholds(ckpt):
    tiny("llama", seed=1, n_loop=3).save(ckpt)
    assert sorted(p.name for p in ckpt.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("asked, message", [
    ({"name": "margin", "threshold": -0.1}, r"--threshold=-0.1 is out of range: scores are between 0 and 1 \(inf"),
    ({"name": "gate", "threshold": 1.5}, "--threshold=1.5 is out of range"),
    ({"name": "entropy", "threshold": math.nan}, "--threshold=nan is out of range"),
    ({"name": "entropy", "threshold": -math.inf}, "--threshold=-inf is out of range"),
    ({"name": "fixed", "exit_loop": 0}, "--exit_loop=0, but the model has the loops 1 to 3"),
    ({"name": "fixed", "exit_loop": 4}, "--exit_loop=4, but the model has the loops 1 to 3"),
    ({"name": "max_prob"}, "no calibrated threshold of max_prob for --keys=exact: run "
                           "python -m evaluation.thresholds --ckpt=.*/ckpt "
                           r"--keys=exact .* or give --threshold \(0 to 1\)"),
    ({"name": "gate", "keys": "copy"}, "no calibrated threshold of gate for --keys=copy: run .*--keys=copy"),
])
def test_bad_arguments_are_refused(ckpt, model, asked, message):
    before = contents(ckpt)
    with pytest.raises(UserError, match=message):
        load_rule(ckpt, model, **asked)
    assert contents(ckpt) == before


@pytest.mark.parametrize("name", ["fixed", *SCORED])
def test_a_model_of_one_loop_has_no_exits(ckpt, name):
    with pytest.raises(UserError, match=rf"--rule={name} lets tokens exit .* has 1 loop; use --rule=never"):
        load_rule(ckpt, tiny("llama"), name, 0.5)


def test_a_missing_gate_is_an_error(ckpt, model):
    (ckpt / GATE_FILE).unlink()
    with pytest.raises(UserError, match="ckpt has no gate: train one with python -m evaluation.thresholds "
                                        "--ckpt=.*/ckpt, or use "):
        load_rule(ckpt, model, "gate", 0.5)
    assert load_rule(ckpt, model, "max_prob", 0.5).threshold == 0.5


def not_finite(path):
    gate = random_gate(torch.float32, 2, 32)
    gate.w2.data[1, 3] = math.nan
    gate.save(path.parent)


def test_a_rule_that_is_unknown_is_refused():
    with pytest.raises(UserError, match="'margins' is unknown; use one of never, fixed, max_prob"):
        Rule("margins", 0.5)


@pytest.mark.parametrize("damage", [
    lambda path: cut(path, 0.9), lambda path: cut(path, 0), lambda path: path.write_bytes(b"\xff" * 999),
    lambda path: path.write_bytes((path.parent / "model.safetensors").read_bytes()),
    lambda path: random_gate(torch.float32, 1, 32).save(path.parent),
    lambda path: random_gate(torch.float32, 2, 30).save(path.parent), not_finite,
], ids=["cut", "empty", "garbage", "a model", "fewer loops", "narrower", "not finite"])
def test_the_gate_of_another_model_or_a_damaged_one_is_an_error(ckpt, model, damage):
    damage(ckpt / GATE_FILE)
    before = contents(ckpt)
    with pytest.raises(UserError, match=rf"{GATE_FILE} is not the gate of this model .*; train a new one with python "
                                        r"-m evaluation.thresholds --ckpt=.*/ckpt --new_gate"):
        load_rule(ckpt, model, "gate", 0.5)
    assert contents(ckpt) == before


@pytest.mark.parametrize("text", [
    b"", b'{"exact": ', b"[1, 2]", b"3", b"\xff\xfe", b'{"exact": 3}', b'{"exact": {"thresholds": [1]}}',
    b'{"exact": {"thresholds": {"max_prob": "high"}}}', b'{"exact": {"thresholds": {"max_prob": null}}}',
], ids=str)
def test_damaged_thresholds_are_an_error(ckpt, model, text):
    (ckpt / THRESHOLDS_FILE).write_bytes(text)
    with pytest.raises(UserError, match=rf"{THRESHOLDS_FILE} is not readable .*; remove it, and calibrate again with "
                                        "python -m evaluation.thresholds --ckpt="):
        load_rule(ckpt, model, "max_prob")
    assert (ckpt / THRESHOLDS_FILE).read_bytes() == text
    assert load_rule(ckpt, model, "max_prob", 0.5).threshold == 0.5          # not read if not needed


def test_without_a_file_there_are_no_thresholds(ckpt):
    assert read_thresholds(ckpt)["exact"]["thresholds"] == {"gate": 0.625, "margin": 0.25}
    (ckpt / THRESHOLDS_FILE).unlink()
    assert read_thresholds(ckpt) == {}
