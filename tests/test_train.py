"""Uptraining on a donor of a few thousand weights: that it learns, that equivalent runs are equal, that no moment of
being interrupted loses anything, and that a mistake is named before anything is overwritten."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import (
    DONOR,
    assert_close_logs,
    assert_same_weights,
    contents,
    flags,
    interrupt_at,
    join,
    read_log,
    run,
    start_two,
    story,
    wait_for_step,
    weights,
    write_donor,
)

import convert
import train
from convert import to_hf
from lib.cli import UserError, clock, parse_args, script
from lib.data import batch, load_tokens, validation, write_shards
from lib.log import drop_log_after, loss_cells, write_log
from lib.tokenizer import Tokenizer, copy_tokenizer, train_tokenizer
from losses import distill_loss
from model import Layer, RecursiveTransformer, is_matrix

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of sums, and so the last bit, depends on it
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------------------------
# Pieces

@pytest.mark.parametrize("weight, temperature, kind", [(1.0, 1.0, "fkl"), (0.5, 3.0, "rkl"), (2.0, 0.5, "tvd")])
def test_objective_is_cross_entropy_plus_scaled_distillation(weight, temperature, kind):
    torch.manual_seed(2)
    args = train.TrainConfig(distill=kind, distill_weight=weight, temperature=temperature)
    model, (idx, targets) = RecursiveTransformer(DONOR), torch.randint(DONOR.vocab_size, (2, 2, 5))
    states, head = 2 * torch.randn(2, 5, 8), torch.randn(DONOR.vocab_size, 8)
    loss, ce = train.Objective(model, args)(idx, targets, (states, head))
    teacher = states @ head.t()
    logits = model.logits(model(idx)[-1])
    want = -logits.log_softmax(-1).gather(-1, targets[..., None]).mean()
    apart = distill_loss(logits / temperature, teacher / temperature, kind)
    torch.testing.assert_close(ce, want[None])
    torch.testing.assert_close(loss, want + weight * temperature**2 * apart)
    assert not ce.requires_grad and loss.requires_grad
    plain, ce = train.Objective(model, args)(idx, targets, None)
    torch.testing.assert_close((plain, ce), (want, want[None]))


def reference_objective(model, idx, targets, teacher, weights, distill_weight, self_distill):
    """Sum over the exits of weight x (cross entropy + distill_weight x KL(teacher || student)), all logits at once."""
    logits = [model.logits(x) for x in model(idx)]
    losses = []
    for i, s in enumerate(logits):
        t = logits[-1].detach() if self_distill and i < len(logits) - 1 else teacher
        ce = torch.nn.functional.cross_entropy(s.flatten(0, 1), targets.flatten())
        losses.append(ce + (0 if t is None else distill_weight * distill_loss(s, t, "fkl")))
    return sum(w * x for w, x in zip(weights, losses, strict=True))


@pytest.mark.parametrize("kind, weights", [("weighted", [0.1, 0.2, 0.3, 0.4]), ("aggressive", [0.2, 0.2, 0.2, 1.0])])
@pytest.mark.parametrize("distilled, self_distill", [(True, False), (True, True), (False, True), (False, False)])
def test_the_objective_of_the_exits_and_its_gradient_are_those_written_out(kind, weights, distilled, self_distill):
    torch.manual_seed(4)
    model = RecursiveTransformer(replace(DONOR, n_loop=4, rank=2, vectors="per_loop")).double()
    for p in model.parameters():
        p.data = 0.3 * torch.randn_like(p)
    args = train.TrainConfig(exit_loss=kind, exit_coef=0.2, exit_distill=self_distill, distill_weight=0.7)
    idx, targets = torch.randint(DONOR.vocab_size, (2, 3, 7))
    states, head = torch.randn(3, 7, 8).double(), torch.randn(DONOR.vocab_size, 8).double()
    teacher = (states, head) if distilled else None
    want = reference_objective(model, idx, targets, states @ head.t() if distilled else None, weights, 0.7,
                               self_distill)
    grads = torch.autograd.grad(want, list(model.parameters()))
    loss, ce = train.Objective(model, args)(idx, targets, teacher)
    loss.backward()
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    assert len(ce) == 4
    for (name, p), grad in zip(model.named_parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-9, atol=1e-12, msg=name)


def test_learning_rate_goes_from_warmup_over_its_peak_to_its_end():
    args = train.TrainConfig(lr=2.0, min_lr_ratio=0.1, warmup=4)
    lr = [train.learning_rate(step, 21, args) for step in range(21)]
    assert lr[:4] == [0.5, 1.0, 1.5, 2.0] and max(lr) == 2.0
    assert lr[4] == pytest.approx(2.0) and lr[12] == pytest.approx(1.1) and lr[20] == pytest.approx(0.2)
    assert lr[4:] == sorted(lr[4:], reverse=True)
    assert train.learning_rate(0, 1, replace(args, warmup=0)) == 2.0
    assert train.learning_rate(2, 3, replace(args, warmup=100)) == pytest.approx(0.06)  # warm-up longer than the run


def test_a_renamed_setting_keeps_its_old_flag():
    assert parse_args(train.TrainConfig, ["--min_lr=0.3"]) == train.TrainConfig(min_lr_ratio=0.3)
    assert parse_args(train.TrainConfig, ["--min_lr=0.3", "--min_lr_ratio=0.2"]).min_lr_ratio == 0.2


@pytest.mark.parametrize("arch, vectors", [("gemma", "tied"), ("llama", "per_loop"), ("gpt_neox", "per_loop")])
def test_weight_decay_is_for_matrices_and_lora_only(arch, vectors):
    neox = arch == "gpt_neox"
    model = RecursiveTransformer(replace(DONOR, arch=arch, vectors=vectors, n_loop=2, rank=2, tie_head=not neox,
                                         attn_bias=neox, mlp_bias=neox, n_kv_head=4))
    args = train.TrainConfig(weight_decay=0.3, lr=0.5, beta1=0.8, beta2=0.9)
    optimizer = train.make_optimizer(model, args)
    names = {p: n for n, p in model.named_parameters()}
    decay = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay.keys() == set(names.values())
    for name, value in decay.items():
        decayed = is_matrix(name) or "lora_" in name or name in ("embed.weight", "head.weight")
        assert value == (0.3 if decayed else 0.0), name
    assert {g["betas"] for g in optimizer.param_groups} == {(0.8, 0.9)}


@pytest.mark.parametrize("batch_tokens, micro_batch, seq_len, world", [
    (2048, 8, 256, 3), (100, 8, 16, 1), (1000, 3, 7, 2), (129, 8, 16, 1), (5, 1, 1, 8)])
def test_a_batch_that_cannot_be_dealt_out_gets_numbers_that_can(batch_tokens, micro_batch, seq_len, world):
    args = train.TrainConfig(batch_tokens=batch_tokens, micro_batch=micro_batch, seq_len=seq_len)
    with pytest.raises(UserError, match=f"batch_tokens={batch_tokens} is not a multiple") as e:
        train.accumulation(args, world)
    offers = [int(part.split()[0].rstrip(",")) for part in str(e.value).split("--batch_tokens=")[1:]]
    assert len(set(offers)) == 2
    for offer in offers:
        steps = train.accumulation(replace(args, batch_tokens=offer), world)
        assert steps >= 1 and steps * micro_batch * seq_len * world == offer


def test_a_run_of_many_tokens_is_announced_in_few_characters():
    assert [clock(s) for s in (8.4, 600, 7200)] == ["8s", "10m", "2.0h"]
    assert loss_cells(10_000.0, {"stored": 1, "run": 1})[0] == "10000.0000"  # diverged: no overflow at the very end


# ---------------------------------------------------------------------------------------------------------------------
# Learning

@pytest.mark.parametrize("more, expected", [
    (["--init=stepwise"], {"n_loop": 2, "rank": 0, "vectors": "tied"}),
    (["--init=average", "--rank=4"], {"n_loop": 2, "rank": 4}),
    (["--init=lower", "--loops=4", "--vectors=per_loop", "--rank=2"], {"n_loop": 4, "rank": 2, "vectors": "per_loop"}),
    (["--init=random", "--rank=4"], {"n_loop": 2, "rank": 4}),
    (["--init=scratch"], {"n_loop": 1, "rank": 0}),
    (["--init=stepwise", "--distill=none", "--norms=average", "--rounding=floor"], {"n_loop": 2}),
    (["--init=stepwise", "--dtype=bfloat16"], {"n_loop": 2}),
])
def test_training_lowers_the_loss(home, tmp_path, capsys, more, expected):
    log = run(home, tmp_path / "out", *more)
    first, last = log[0], log[-1]
    assert first["step"] == 0 and last["step"] == 20 and last["final"]
    assert last["full_val_loss"] < first["full_val_loss"] - 0.05
    assert [line["step"] for line in log if "loss" in line] == list(range(1, 21))
    model = RecursiveTransformer.load(tmp_path / "out")
    assert {name: getattr(model.config, name) for name in expected} == expected
    assert all(p.dtype == torch.float32 for p in model.parameters())
    Tokenizer.load(tmp_path / "out", model.config.vocab_size)
    groups = torch.load(tmp_path / "out" / "train.pt")["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([1e-4, 1e-4])  # the schedule's end
    distilled = "scratch" not in more[0] and "--distill=none" not in more
    assert all((line["objective"] > line["loss"] + 1e-4) == distilled for line in log if "loss" in line)
    printed = capsys.readouterr().out
    assert f"step 20/20 | loss {log[-2]['loss']:.4f}" in printed and f"{last['full_val_loss']:.4f}" in printed
    assert ("donor" in printed) == (first["donor_loss"] is not None) == ("--init=scratch" not in more)


def test_distillation_pulls_towards_the_teacher(home, tmp_path):
    """The teacher says other things than the text does, so cross entropy alone leads away from it."""
    torch.manual_seed(5)
    teacher = RecursiveTransformer(DONOR).eval()
    teacher.embed.weight.data *= 4
    write_donor(teacher, home / "tokenizer", tmp_path / "donor")
    tokens = load_tokens(f"{home}/valid.txt", Tokenizer.load(tmp_path / "donor"), DONOR.vocab_size)
    (idx, _), = validation(tokens, 16, 128)

    @torch.no_grad()
    def distance(out, kind):
        student = RecursiveTransformer.load(out)
        return distill_loss(student.logits(student(idx)[-1]), teacher.logits(teacher(idx)[-1]), kind).item()

    def distances(kind):
        out = tmp_path / kind
        run(home, out, f"--donor={tmp_path}/donor", f"--distill={kind}", "--init=random",
            *["--distill_weight=20"] * (kind != "none"), "--tokens=5120", "--lr=5e-3", "--eval_every=1000")
        return [distance(out, k) for k in ("fkl", "rkl", "jsd", "tvd")]

    alone = dict(zip(("fkl", "rkl", "jsd", "tvd"), distances("none"), strict=True))
    for i, kind in enumerate(alone):
        assert distances(kind)[i] < 0.8 * alone[kind], kind


@pytest.mark.parametrize("arch, vectors", [("gemma", "per_loop"), ("gpt_neox", "per_loop"), ("llama", "tied")])
def test_every_parameter_gets_a_gradient(arch, vectors):
    torch.manual_seed(6)
    neox = arch == "gpt_neox"
    full = RecursiveTransformer(replace(DONOR, arch=arch, attn_bias=neox, mlp_bias=neox, parallel=neox, n_kv_head=4))
    student = convert.to_recursive(full, 2, "average", 4, vectors=vectors)
    idx, targets = torch.randint(DONOR.vocab_size, (2, 2, 9))
    teacher = full(idx)[-1].detach(), full.head_weight.detach()
    loss, _ = train.Objective(student, train.TrainConfig())(idx, targets, teacher)
    loss.backward()
    for name, p in student.named_parameters():
        assert p.grad is not None, name
        per_loop = p.grad.flatten(1).abs().amax(1) if student.owned_by_loop(name, p) else p.grad.abs().max()[None]
        if not name.endswith("k.bias"):  # a key bias moves all scores of a query alike: softmax does not see it
            assert (per_loop > 0).all(), (name, per_loop)


def test_exits_are_trained_as_much_as_asked(home, tmp_path, capsys):
    how = ["--tokens=640", "--loops=4", "--eval_every=3"]
    plain = run(home, tmp_path / "plain", *how)
    assert run(home, tmp_path / "none", *how, "--exit_loss=aggressive", "--exit_coef=0") == plain
    assert_same_weights(tmp_path / "plain", tmp_path / "none")
    some = run(home, tmp_path / "some", *how, "--exit_loss=aggressive", "--exit_coef=0.5", "--exit_distill")
    assert [len(line["exit_loss"]) for line in some if "loss" in line] == [4] * 5
    assert all(line["exit_loss"][-1] == line["loss"] for line in some if "loss" in line)
    assert [len(line["exit_val_loss"]) for line in some if "val_loss" in line] == [4]
    assert "(exits " in capsys.readouterr().out
    assert some[1]["loss"] == plain[1]["loss"] and some[-2]["loss"] != plain[-2]["loss"]
    assert sum(some[-2]["exit_loss"][:-1]) < sum(some[1]["exit_loss"][:-1])


def test_the_teacher_is_who_is_named(home, tmp_path):
    """The first step's objective, written out, with a teacher of another width and depth; and the donor itself, as a
    checkpoint of ours, teaches the same as where none is named."""
    torch.manual_seed(7)
    wide = RecursiveTransformer(replace(DONOR, n_embd=48, n_layer=2, n_hidden=80)).eval()
    wide.embed.weight.data *= 4
    write_donor(wide, home / "tokenizer", tmp_path / "wide")
    how = ["--tokens=256", "--loops=2"]
    log = run(home, tmp_path / "a", *how, f"--teacher={tmp_path}/wide")
    usual = run(home, tmp_path / "b", *how)
    assert run(home, tmp_path / "c", *how, f"--teacher={home}/full") == usual
    tokenizer = Tokenizer.load(home / "donor")
    idx, targets = batch(load_tokens(f"{home}/train.txt", tokenizer, DONOR.vocab_size), range(8), 16, seed=0)
    student = convert.to_recursive(RecursiveTransformer.load(home / "full"), 2, "stepwise", 0)
    with torch.no_grad():
        want = reference_objective(student, idx, targets, wide.logits(wide(idx)[-1]), [0, 1], 1.0, False)
    assert log[1]["objective"] == pytest.approx(want.item(), abs=1e-4)
    assert log[1]["loss"] == usual[1]["loss"] and log[1]["objective"] > usual[1]["objective"] + 0.1
    assert log[0] == usual[0]                                          # the donor stays what is compared with


def test_a_teacher_may_be_padded_differently_and_its_tokenizer_written_anew(home, tmp_path):
    torch.manual_seed(7)
    wide = RecursiveTransformer(replace(DONOR, vocab_size=400)).eval()
    wide.embed.weight.data *= 4
    same = RecursiveTransformer(DONOR)
    same.load_state_dict(wide.state_dict() | {"embed.weight": wide.embed.weight.data[:320]})
    logs = []
    for name, teacher in (("wide", wide), ("same", same)):
        folder = write_donor(teacher, home / "tokenizer", tmp_path / name)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "another"}))
        logs.append(run(home, tmp_path / f"run_{name}", "--tokens=256", "--loops=2", f"--teacher={folder}"))
    assert logs[0] == logs[1]


def test_a_run_that_knows_the_tokenizer_by_its_bytes_goes_on(home, tmp_path):
    """As runs of older versions do."""
    run(home, tmp_path, "--tokens=640")
    state = torch.load(tmp_path / "train.pt", weights_only=True)
    for name in ("another", Tokenizer.load(home / "donor").file_hash):
        state["history"]["tokenizer_hash"] = name
        torch.save(state, tmp_path / "train.pt")
        if name == "another":
            with pytest.raises(UserError, match="another architecture or tokenizer"):
                run(home, tmp_path, "--tokens=1280", "--resume")
    assert run(home, tmp_path, "--tokens=1280", "--resume")[-1]["step"] == 10


def test_a_converted_checkpoint_is_a_start(home, tmp_path):
    how = ["--init=average", "--rank=4", "--vectors=per_loop"]
    convert.main([f"--donor={home}/donor", f"--out={tmp_path}/converted", *how])
    before = contents(tmp_path / "converted")
    from_ckpt = run(home, tmp_path / "a", f"--ckpt={tmp_path}/converted")
    assert from_ckpt == run(home, tmp_path / "b", *how)
    assert contents(tmp_path / "converted") == before
    shutil.rmtree(tmp_path / "converted")
    run(home, tmp_path / "a", "--resume", f"--ckpt={tmp_path}/converted", "--tokens=2816")  # no longer needed


def test_the_table_says_converted_only_of_what_conversion_left(home, tmp_path, capsys):
    run(home, tmp_path / "a", "--tokens=256")
    assert {"converted", "uptrained"} <= set(capsys.readouterr().out.split())
    run(home, tmp_path / "b", f"--ckpt={tmp_path}/a", "--tokens=256")
    said = capsys.readouterr().out
    assert {"start", "trained"} <= set(said.split()) and not {"converted", "uptrained", "won"} & set(said.split())


# ---------------------------------------------------------------------------------------------------------------------
# Equal runs

def test_checkpointing_changes_nothing_but_memory(home, tmp_path, start, monkeypatch):
    torch.manual_seed(8)
    RecursiveTransformer(replace(DONOR, n_layer=6, n_loop=3, rank=2, vectors="per_loop")).save(tmp_path / "start")
    copy_tokenizer(home / "tokenizer", tmp_path / "start")
    how = [f"--ckpt={tmp_path}/start", "--tokens=640", "--exit_loss=weighted"]
    want, again = run(home, tmp_path / "plain", *how), []
    argv = flags(home, tmp_path / "two", *how, "--checkpointing", "--micro_batch=4")
    processes = start_two(start, argv, tmp_path / "output")
    forward = Layer.forward
    monkeypatch.setattr(Layer, "forward", lambda self, *a: again.append(torch.is_grad_enabled()) or forward(self, *a))
    assert run(home, tmp_path / "one", *how, "--checkpointing") == want
    assert sum(again) == 2 * 5 * 6                                     # each layer twice in each step: it did happen
    assert_same_weights(tmp_path / "plain", tmp_path / "one")
    assert join(processes) == [0, 0], (tmp_path / "output").read_text()
    assert_close_logs(want, read_log(tmp_path / "two"))
    assert_same_weights(tmp_path / "plain", tmp_path / "two", rtol=1e-2, atol=1e-4)


def test_skipped_tokens_are_those_that_a_run_of_the_same_seed_reads_first(home, tmp_path):
    """With a learning rate of nearly 0 the losses of the steps name the text they read."""
    def losses(*more):
        log = run(home, tmp_path / str(len(more)), "--lr=1e-12", "--distill=none", *more)
        return [line["loss"] for line in log if "loss" in line]
    whole = losses()
    assert len(set(whole)) == len(whole) == 20
    assert losses("--skip_tokens=1280", "--tokens=1280") == pytest.approx(whole[10:], abs=1e-5)


def test_accumulated_micro_batches_are_one_batch(home, tmp_path):
    a = run(home, tmp_path / "a", "--batch_tokens=256", "--micro_batch=16", "--rank=2")
    b = run(home, tmp_path / "b", "--batch_tokens=256", "--micro_batch=8", "--rank=2")
    assert len(a) > 10
    assert_close_logs(a, b)
    assert_same_weights(tmp_path / "a", tmp_path / "b", rtol=1e-3, atol=1e-4)


def test_two_processes_are_one_that_accumulates_also_when_stopped_between(home, tmp_path, start):
    more = ["--batch_tokens=256", "--tokens=10240", "--rank=2", "--vectors=per_loop", "--eval_every=15"]
    one, two = tmp_path / "one", tmp_path / "two"
    want = run(home, one, *more, "--micro_batch=8")
    processes = start_two(start, flags(home, two, *more, "--micro_batch=4"), tmp_path / "output")
    wait_for_step(two, 8, lambda: all(p.is_alive() for p in processes))
    os.kill(processes[1].pid, signal.SIGINT)                           # any process may be the one that is told
    assert join(processes) == [130, 130], (tmp_path / "output").read_text()
    assert (tmp_path / "output").read_text().count(f"--resume --out={two}") == 1
    assert 8 <= torch.load(two / "train.pt")["step"] < 40
    processes = start_two(start, ["--resume", f"--out={two}"], tmp_path / "output")
    assert join(processes) == [0, 0], (tmp_path / "output").read_text()
    assert_close_logs(want, read_log(two), 2e-5)
    assert_same_weights(one, two, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("number, more", [
    (signal.SIGTERM, ["--init=average", "--rank=4", "--vectors=per_loop"]),
    (signal.SIGINT, ["--init=scratch"]),
])
def test_stopped_and_resumed_is_straight_through(home, tmp_path, capsys, number, more):
    more = [*more, "--save_every=4"]
    want = run(home, tmp_path / "straight", *more)
    out, before = tmp_path / "stopped", signal.signal(number, signal.default_int_handler)
    for step in (3, 10):  # the signal comes within a step, which is finished first
        capsys.readouterr()
        with interrupt_at(step, lambda: os.kill(os.getpid(), number)), pytest.raises(SystemExit) as e:
            script(lambda: train.main(flags(home, out, *more) if step == 3 else ["--resume", f"--out={out}"]))  # noqa: B023
        assert e.value.code == 128 + number and torch.load(out / "train.pt")["step"] == step + 1
        assert f"go on with: python train.py --resume --out={out}" in capsys.readouterr().out
    assert signal.signal(number, before) is signal.default_int_handler  # given back
    train.main(["--resume", f"--out={out}"])
    assert read_log(out) == want
    assert_same_weights(tmp_path / "straight", out)
    states = [torch.load(o / "train.pt")["optimizer"]["state"] for o in (tmp_path / "straight", out)]
    assert all(torch.equal(states[0][i][k], states[1][i][k]) for i in states[0] for k in states[0][i])


def test_crashed_and_resumed_is_straight_through(home, tmp_path):
    more = ["--save_every=4", "--rank=2", "--eval_every=3"]
    want = run(home, tmp_path / "straight", *more)
    out = tmp_path / "crashed"
    for step in (7, 15):  # resumes after steps 4 and 12: what was logged since is computed again
        with interrupt_at(step, lambda: 1 / 0), pytest.raises(ZeroDivisionError):
            train.main(flags(home, out, *more) if step == 7 else ["--resume", f"--out={out}"])
        with open(out / "log.jsonl", "a") as f:
            f.write('{"step": 5, "lo')                                 # cut short by the crash
    train.main(["--resume", f"--out={out}"])
    assert read_log(out) == want
    assert_same_weights(tmp_path / "straight", out)
    train.main(["--resume", f"--out={out}"])                           # at its end already
    assert read_log(out) == want
    assert_same_weights(tmp_path / "straight", out)


def test_a_run_may_be_made_longer_and_moved(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = Path("out")                                                  # --out's default
    run(home, tmp_path / "a", "--save_every=7", "--lr=3e-3", "--rank=2")
    shutil.move("a", out)
    Path("a").mkdir()                                                  # where it says it is, somebody else lives now
    train.main(["--resume", "--tokens=3840", "--log_every=5"])
    state = torch.load(out / "train.pt")
    assert state["step"] == 30 and state["args"]["lr"] == 3e-3 and state["args"]["log_every"] == 5
    assert state["args"]["out"] == str(tmp_path / out) and not any(Path("a").iterdir())
    assert sum("final" in line for line in read_log(out)) == 1
    with pytest.raises(UserError, match="has done 30; ask for at least --tokens=3840"):
        train.main(["--resume", "--tokens=2560"])


@pytest.mark.parametrize("name", ["data", "valid", "donor", "teacher"])
def test_resume_refuses_other_contents_under_the_same_name(home, tmp_path, name):
    places = {"data": "train.txt", "valid": "valid.txt", "donor": "donor", "teacher": "full"}
    for place in places.values():
        (shutil.copytree if (home / place).is_dir() else shutil.copy)(home / place, tmp_path / place)
    how = [f"--{n}={tmp_path / place}" for n, place in places.items()]
    run(home, tmp_path / "out", *how, "--tokens=256")
    before = contents(tmp_path / "out")
    if name in ("data", "valid"):
        with open(tmp_path / places[name], "a") as f:
            f.write(" One more cat.")
    elif name == "donor":
        write_donor(RecursiveTransformer(DONOR), home / "tokenizer", tmp_path / "donor")
    else:
        model = RecursiveTransformer.load(home / "full")
        model.norm.weight.data[3] += 1
        model.save(tmp_path / "full")
    with pytest.raises(UserError, match=rf"--{name}=\S+: the content differs from what the run in \S+out began with"):
        train.main(["--resume", f"--out={tmp_path}/out", "--tokens=512"])
    assert contents(tmp_path / "out") == before
    train.main(["--resume", f"--out={tmp_path}/out", "--tokens=512",  # the same contents under other names
                f"--{name}={home / places[name]}"])


def test_a_run_of_an_earlier_version_goes_on(home, tmp_path):
    out, more = tmp_path / "out", ["--save_every=4", "--rank=2"]
    want = run(home, tmp_path / "straight", *more)
    with interrupt_at(7, lambda: 1 / 0), pytest.raises(ZeroDivisionError):
        run(home, out, *more)
    state = torch.load(out / "train.pt")
    state["history"] = {name: state["history"][name] for name in (
        "donor_config", "tokenizer_hash", "skipped", "donor", "converted")} | {"tokenizer": str(home / "donor")}
    state["args"]["exit_coef"] = 0.3                                   # changes nothing, and was once accepted
    state["args"]["min_lr"] = state["args"].pop("min_lr_ratio")        # its former name
    torch.save(state, out / "train.pt")
    train.main(["--resume", f"--out={out}"])
    assert read_log(out) == want
    assert_same_weights(tmp_path / "straight", out)


@pytest.mark.parametrize("seq_len, asked, at_end, between", [
    (16, 64, 256, 64), (64, 128, 512, 128), (64, 65, 256, 64), (16, 10**9, None, None), (32, 16, 64, 32)])
def test_an_evaluation_reads_what_was_asked_for_and_says_how_much(home, tmp_path, seq_len, asked, at_end, between):
    how = ["--tokens=1024", "--batch_tokens=512", "--eval_every=1", f"--seq_len={seq_len}", f"--eval_tokens={asked}"]
    log = run(home, tmp_path / "out", *how)
    there = len(load_tokens(f"{home}/valid.txt", Tokenizer.load(home / "donor"), DONOR.vocab_size))
    whole = (there - 1) // seq_len * seq_len
    first, = (line["val_tokens"] for line in log if "donor_loss" in line)
    under_way, = (line["val_tokens"] for line in log if "val_loss" in line)
    assert (first, under_way) == (at_end or whole, between or whole) and log[-1]["val_tokens"] == first
    assert log[0]["valid"][0] == there and [line["tokens"] for line in log if "lr" in line] == [512, 1024]
    train.main(["--resume", f"--out={tmp_path}/out", "--tokens=1536", "--eval_tokens=48"])  # its end is like its start
    assert read_log(tmp_path / "out")[-1]["val_tokens"] == first


def test_a_small_micro_batch_is_one_for_evaluations_too(home, tmp_path, monkeypatch):
    rows, evaluate = [], train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda model, pairs, *rest: rows.extend(
        len(idx) for idx, _ in pairs) or evaluate(model, pairs, *rest))
    run(home, tmp_path / "out", "--micro_batch=2", "--tokens=256", "--eval_every=1")
    assert max(rows) == 2


def test_the_seconds_of_a_run_are_those_of_all_its_legs(home, tmp_path):
    out = tmp_path / "out"
    with interrupt_at(3, lambda: (time.sleep(2), os.kill(os.getpid(), signal.SIGTERM))):
        assert train.main(flags(home, out)) == 128 + signal.SIGTERM
    began = time.perf_counter()
    assert train.main(["--resume", f"--out={out}"]) == 0
    seconds = json.loads((out / "log.jsonl").read_text().splitlines()[-1])["seconds"]
    assert 2 < seconds - (time.perf_counter() - began) < 20


def test_a_warm_up_that_never_ends_is_said(home, tmp_path, capsys):
    run(home, tmp_path / "a", "--tokens=256", "--warmup=200", "--lr=1e-3")
    assert "warning: the warm-up of 200 steps" in (said := capsys.readouterr().out) and "ends at 1.0e-05" in said
    run(home, tmp_path / "b", "--tokens=256", "--warmup=2")
    assert "warning" not in capsys.readouterr().out


def test_what_compile_lacks_is_named_at_the_start(home, tmp_path, monkeypatch):
    def missing(_):
        raise RuntimeError("backend='inductor' raised:\nInvalidCxxCompiler: No working C++ compiler found\n\nSet TORCH")
    monkeypatch.setattr(torch, "compile", missing)
    monkeypatch.setattr(train, "evaluate", lambda *_: 1 / 0)
    with pytest.raises(UserError, match="--compile does not work here .InvalidCxxCompiler: No working.*leave out"):
        run(home, tmp_path / "out", "--compile")
    assert not any(tmp_path.iterdir())


def test_only_the_first_process_writes_the_log(tmp_path, monkeypatch):
    log, lines = tmp_path / "log.jsonl", '{"step": 1}\n{"step": 2}\n{"st'
    log.write_text(lines)
    monkeypatch.setenv("RANK", "1")
    drop_log_after(log, 1)
    write_log(str(tmp_path), step=3)
    assert log.read_text() == lines
    monkeypatch.setenv("RANK", "0")
    drop_log_after(log, 2)
    write_log(str(tmp_path), step=3)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


@pytest.mark.parametrize("group", [False, True])
def test_torchrun_stops_with_a_checkpoint(home, tmp_path, group):
    """SIGTERM to the launcher, as a cluster sends it; Ctrl-C, which the terminal sends to all."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py",
               *flags(home, tmp_path / "out", "--tokens=12800000", "--micro_batch=4", "--save_every=100000")]
    with open(tmp_path / "output", "w") as f:
        launcher = subprocess.Popen(command, stdout=f, stderr=f, cwd=ROOT, start_new_session=True,
                                    env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        wait_for_step(tmp_path / "out", 3, lambda: launcher.poll() is None)
        (os.killpg if group else os.kill)(launcher.pid, signal.SIGINT if group else signal.SIGTERM)
        launcher.wait(60)
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
    output = (tmp_path / "output").read_text()
    step = torch.load(tmp_path / "out" / "train.pt")["step"]
    assert step >= 3, output
    assert output.count(f"stopped at step {step} of 100000; go on with: python train.py --resume") == 1, output
    RecursiveTransformer.load(tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes and accidents

def test_a_loss_that_is_not_finite_stops_before_it_is_saved(home, tmp_path):
    with pytest.raises(UserError, match=r"at step 2: not finite.*holds the last good checkpoint.*lower --lr"):
        run(home, tmp_path / "out", "--lr=1e30")
    assert torch.load(tmp_path / "out" / "train.pt")["step"] == 0
    assert all(w.isfinite().all() for w in weights(tmp_path / "out").values())


def test_a_step_that_is_not_finite_is_skipped_or_named(home, tmp_path, monkeypatch, capsys):
    step, forward, moved = train.train_step, train.Objective.forward, []

    def watched(run, *rest):
        def poisoned(self, *batch):
            loss, ce = forward(self, *batch)
            return loss * (float("nan") if run.step == 6 else 1), ce   # within step 7
        monkeypatch.setattr(train.Objective, "forward", poisoned)
        before = [p.clone() for p in run.model.parameters()]
        result = step(run, *rest)
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True)))
        assert all(p.isfinite().all() for p in run.model.parameters())
        return result
    monkeypatch.setattr(train, "train_step", watched)
    out, how = tmp_path / "out", ["--tokens=1280", "--save_every=4"]
    says = r"loss nan, gradient norm nan at step 7: not finite.*out holds the last good checkpoint, of step 4: " \
           r".*--ckpt=\S*out and a lower --lr, or go on with --resume --out=\S*out --skip_nonfinite"
    with pytest.raises(UserError, match=says):
        run(home, out, *how)
    moved.clear()
    train.main(["--resume", f"--out={out}", "--skip_nonfinite"])       # the message's advice
    assert moved == [True, True, False, True, True, True]
    log = read_log(out)
    assert [line["skipped"] for line in log if "loss" in line] == [0] * 6 + [1] * 4 and log[-1]["final"]
    assert "steps skipped because the loss or gradient was not finite: 1" in capsys.readouterr().out
    train.main(["--resume", f"--out={out}", "--tokens=1408"])
    assert read_log(out)[-2]["skipped"] == 1                           # the count goes on, too


BAD = {  # flags -> what the message says
    "--batch_tokens=100": r"use --batch_tokens=128 or --batch_tokens=256",
    "--micro_batch=3": r"3 x 16 x 1 = 48; use --batch_tokens=96 or --batch_tokens=144, or a smaller --micro_batch",
    "--tokens=127": r"--tokens=127 is less than one step of 128",
    "--seq_len=0": r"--seq_len=0 must be positive",
    "--seq_len=-16": r"--seq_len=-16 must be positive",
    "--micro_batch=0": r"--micro_batch=0 must be positive",
    "--batch_tokens=0": r"--batch_tokens=0 must be positive",
    "--tokens=-1": r"--tokens=-1 must be positive",
    "--lr=0": r"--lr=0.0 must be positive",
    "--lr=nan": r"--lr=nan must be positive",
    "--clip=0": r"--clip=0.0 must be positive",
    "--temperature=-1": r"--temperature=-1.0 must be positive",
    "--save_every=0": r"--save_every=0 must be positive",
    "--eval_every=0": r"--eval_every=0 must be positive",
    "--log_every=0": r"--log_every=0 must be positive",
    "--eval_tokens=0": r"--eval_tokens=0 must be positive",
    "--warmup=-1": r"--warmup=-1 must not be negative",
    "--weight_decay=-1": r"--weight_decay=-1.0 must not be negative",
    "--distill_weight=-1": r"--distill_weight=-1.0 must not be negative",
    "--min_lr_ratio=-1": r"--min_lr_ratio=-1.0 must not be negative",
    "--rank=-1": r"--rank=-1 must not be negative",
    "--seed=-1": r"--seed=-1 must not be negative",
    "--lr=inf": r"--lr=inf must be positive and finite",
    "--weight_decay=inf": r"--weight_decay=inf must not be negative, and must be finite",
    "--min_lr=nan": r"--min_lr_ratio=nan must not be negative",
    "--exit_coef=0.3": r"--exit_coef=0.3 would change nothing here, it needs --exit_loss=aggressive",
    "--exit_coef=0.3 --exit_loss=weighted": r"--exit_coef=0.3 would change nothing",
    "--distill=none --temperature=2": r"--temperature=2.0 would change nothing here, it needs distillation",
    "--distill=none --distill_weight=0.5": r"--distill_weight=0.5 would change nothing",
    "--init=scratch --temperature=2": r"--temperature=2.0 would change nothing",
    "--init=scratch --distill=rkl": r"--distill=rkl would change nothing here, it needs a --teacher",
    "--init=random --norms=average": r"--norms=average has no effect.*--init=random.*: drop --norms",
    "--init=average --vectors=per_loop --norms=pick":
        r"--norms=pick has no effect.*--vectors=per_loop.*: drop --norms",
    "--init=average --rounding=floor": r"--rounding=floor has no effect.*--init=average.*: drop --rounding",
    "--lora_init=zero": r"--lora_init=zero has no effect.*--rank=0.*: drop --lora_init",
    "--donor={home}/nan": r"nan: model.layers.1.mlp.up_proj.weight is not finite",
    "--teacher={home}/nan": r"nan: model.layers.1.mlp.up_proj.weight is not finite",
    "--ckpt={home}/nan_start": r"norm.weight in \S*nan_start/model.safetensors is not finite",
    "--beta2=1": r"--beta2=1.0 must be at least 0 and less than 1",
    "--loops=3": r"3 loops do not divide the 4 layers; use one of 1, 2, 4",
    "--loops=0": r"0 loops do not divide the 4 layers; use one of 1, 2, 4",
    "--data={home}/nothing.txt": r"nothing.txt does not exist",
    "--data={home}/empty.txt": r"empty.txt is empty",
    "--data={home}/short.txt": r"--data=\S*short.txt has \d+ tokens, one sequence needs 17.*smaller --seq_len",
    "--valid={home}/short.txt": r"--valid=\S*short.txt has \d+ tokens, one sequence needs 17.*smaller --seq_len",
    "--data={home}/shards": r"made with another tokenizer",
    "--donor={home}/nothing": r"donor \S*nothing does not exist",
    "--donor={home}/no_tokenizer": r"no tokenizer in \S*no_tokenizer",
    "--donor={home}/small_vocabulary": r"has 320 ids but the model's vocabulary is 300",
    "--ckpt={home}/nothing": r"no checkpoint in \S*nothing",
    "--ckpt={home}/donor": r"convert it first",
    "--seq_len=128 --micro_batch=1": r"--seq_len=128 is longer than the 64 tokens .* use --seq_len=64 or less",
    "--ckpt={home}/other_vocabulary": r"has a vocabulary of 300, its donor \S*donor one of 320, or another",
    "--ckpt={home}/full --rank=4": r"--rank=4 says how a donor is converted, and --ckpt converts none",
    "--init=scratch --rank=4": r"--rank=4 says how a donor is converted, and --init=scratch converts none",
    "--teacher={home}/nothing": r"donor \S*nothing does not exist",
    "--teacher={home}/other_words": r"--teacher=\S*other_words has a vocabulary of 320, the donor \S*donor one of 320",
    "--teacher={home}/short": r"--seq_len=16 is longer than the 8 tokens that \S*short was made for; use --seq_len=8",
    "--teacher={home}/full --distill=none": r"--teacher=\S*full has no effect with --distill=none",
    "--exit_loss=aggressive --loops=1": r"--exit_loss=aggressive needs an exit before the last loop.*has 1 loop",
    "--exit_loss=weighted --init=scratch": r"--exit_loss=weighted needs an exit before the last loop",
    "--exit_loss=weighted --ckpt={home}/full": r"--exit_loss=weighted needs an exit before the last loop",
    "--exit_distill": r"--exit_distill trains the earlier exits; say how much with --exit_loss=aggressive or weighted",
    "--exit_loss=aggressive --exit_coef=0 --exit_distill": r"--exit_distill trains the earlier exits",
    "--exit_coef=-1": r"--exit_coef=-1.0 must not be negative",
    "--device=cuda": r"--device=cuda cannot be used here",
    "--device=abacus": r"--device=abacus cannot be used here",
    "--out={home}/something": r"holds something that is not a checkpoint of this project \(precious.txt\)",
    "--out={home}/valid.txt": r"is a file; --out needs a folder",
    "--out={home}/full": r"full holds a run already; go on with --resume, or give another --out",
    "--out={home}/donor": r"donor holds a model already; give another --out",
    "--resume": r"nothing to resume: \S*train.pt does not exist",
    "--resume --out={home}/damaged": r"damaged is damaged: train.pt",
}


@pytest.fixture(scope="module")
def mistakes(home):
    """What the flags above name."""
    (home / "empty.txt").write_text("")
    (home / "short.txt").write_text("the cat")
    (home / "something").mkdir()
    (home / "something" / "precious.txt").write_text("poem")
    other = train_tokenizer([story(9, 300)], 290, home / "other_tokenizer")
    other = Tokenizer.load(home / "other_tokenizer")
    write_shards([story(1, 100)], other, home / "shards", DONOR.vocab_size)
    small = replace(DONOR, vocab_size=300)
    to_hf(RecursiveTransformer(DONOR), home / "no_tokenizer")
    write_donor(RecursiveTransformer(small), home / "tokenizer", home / "small_vocabulary")
    RecursiveTransformer(replace(small, n_loop=2)).save(home / "other_vocabulary")
    write_donor(RecursiveTransformer(DONOR), home / "other_tokenizer", home / "other_words")
    write_donor(RecursiveTransformer(replace(DONOR, n_ctx=8)), home / "tokenizer", home / "short")
    broken = RecursiveTransformer(DONOR)
    broken.layers[1].mlp.up.weight.data[3, 4] = float("nan")
    write_donor(broken, home / "tokenizer", home / "nan")
    start = RecursiveTransformer(replace(DONOR, n_loop=2))
    start.norm.weight.data[0] = float("inf")
    start.save(home / "nan_start")
    copy_tokenizer(home / "tokenizer", home / "nan_start")
    shutil.copytree(home / "full", home / "damaged")
    (home / "damaged" / "train.pt").write_bytes((home / "full" / "train.pt").read_bytes()[:1000])
    return home


@pytest.mark.parametrize("given", BAD)
def test_a_mistake_is_named_before_anything_is_written(mistakes, tmp_path, monkeypatch, given):
    if given == "--device=cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr(train, "to_recursive", lambda *a: convert.to_recursive(*a) if "loops" in given else 1 / 0)
    before = contents(mistakes)
    with pytest.raises(UserError, match=BAD[given]):
        run(mistakes, tmp_path / "out", *given.format(home=mistakes).split())
    assert contents(mistakes) == before and not any(tmp_path.iterdir())


@pytest.mark.parametrize("given, says", [
    ("--init=stepwize", "choose from 'stepwise', 'average', 'lower', 'random', 'calibrated', 'scratch'"),
    ("--distill=kl", "'fkl', 'rkl', 'jsd', 'tvd', 'none'"), ("--tokens=many", "invalid int value: 'many'"),
    ("--loop=2", "unrecognized arguments: --loop=2"), ("--compile=maybe", "expected True or False, got 'maybe'")])
def test_a_flag_that_cannot_be_read_exits_with_2(tmp_path, capsys, given, says):
    with pytest.raises(SystemExit) as e:
        train.main([f"--out={tmp_path}/out", given])
    assert e.value.code == 2 and says in capsys.readouterr().err and not any(tmp_path.iterdir())


@pytest.mark.parametrize("given, says", [
    ("--rank=2", r"--rank=2 \(the run has 4\)"), ("--lr=1e-4", r"--lr=0.0001 \(the run has 0.002\)"),
    ("--seed=1", r"--seed=1 \(the run has 0\)"), ("--batch_tokens=256", r"--batch_tokens=256 \(the run has 128\)"),
    ("--loops=4 --init=average", r"--init=average \(the run has stepwise\), --loops=4 \(the run has 2\)"),
    ("--distill=none", r"--distill=none \(the run has fkl\)"), ("--clip=2", r"--clip=2.0 \(the run has 1.0\)")])
def test_resume_refuses_what_would_change_the_run(home, tmp_path_factory, given, says):
    out = tmp_path_factory.getbasetemp() / "refused"
    if not out.exists():
        run(home, out, "--rank=4", "--lr=2e-3", "--tokens=256")
    before = contents(out)
    with pytest.raises(UserError, match=says + r" was given; drop the flag, or start a new run"):
        train.main(["--resume", f"--out={out}", *given.split()])
    assert contents(out) == before


@pytest.mark.parametrize("change", [{"n_layer": 8}, {"n_head": 2, "head_dim": 16}, {"vocab_size": 400}])
def test_resume_refuses_another_donor(home, tmp_path, change):
    """The second has tensors of the same shapes."""
    shutil.copytree(home / "donor", tmp_path / "donor")
    run(home, tmp_path / "out", f"--donor={tmp_path}/donor", "--tokens=256")
    to_hf(RecursiveTransformer(replace(DONOR, **change)), tmp_path / "donor")
    before, (name, value) = contents(tmp_path / "out"), next(iter(change.items()))
    with pytest.raises(UserError, match=rf"another architecture.*{name}={value} \(was {getattr(DONOR, name)}\)"):
        train.main(["--resume", f"--out={tmp_path}/out"])
    assert contents(tmp_path / "out") == before
