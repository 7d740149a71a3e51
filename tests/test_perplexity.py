"""evaluation/perplexity.py: its figures against plain computations, and every mistake an error before the work."""

import json
import math
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from tiny import story

from convert import to_hf
from evaluation import perplexity
from evaluation.perplexity import EvaluateConfig, read_text
from exits import Gate, Rule, apply_rule, collect_exit_stats
from lib.cli import UserError
from lib.folders import GATE_FILE, THRESHOLDS_FILE
from lib.tokenizer import Tokenizer, train_tokenizer
from model import Config, RecursiveTransformer

RULES = ("max_prob", "margin", "entropy", "gate")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with ckpt/, of random weights, 3 loops and a gate, and text.txt."""
    home = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(0)
    model = RecursiveTransformer(Config(vocab_size=300, n_layer=6, n_loop=3, rank=2, n_embd=16, n_head=2, head_dim=8,
                                        n_hidden=32, n_ctx=48))
    gate = Gate(2, 16, hidden=8)
    for p in [*model.parameters(), gate.b1, gate.w2, gate.b2]:
        torch.nn.init.normal_(p, std=0.3)
    model.save(home / "ckpt")
    gate.save(home / "ckpt")
    train_tokenizer([story(0, 200) + "0123456789 " * 50], 300, home / "ckpt")
    (home / "text.txt").write_text(story(1, 100))
    return home


@pytest.fixture
def ckpt(home, tmp_path):
    """A copy to change."""
    return shutil.copytree(home / "ckpt", tmp_path / "ckpt")


def flags(home, ckpt, *more):
    return [f"--ckpt={ckpt}", f"--text={home}/text.txt", "--tokens=320", "--seq_len=16", "--device=cpu", *more]


def strict(line):
    return json.loads(line, parse_constant=pytest.fail)


def run(capsys, home, ckpt, *more):
    """What was printed before the JSON line, and that line."""
    perplexity.main(flags(home, ckpt, *more))
    *shown, line = capsys.readouterr().out.splitlines()
    return "\n".join(shown), strict(line)


def select(numbers, **which):
    return [row for row in numbers["rows"] if all(row[key] == value for key, value in which.items())]


def read(config):
    return read_text(config, RecursiveTransformer.load(config.ckpt), Tokenizer.load(config.ckpt))


def predictions(folder, pairs):
    """By loop and token, from all logits at once: argmax, cross entropy, and each rule's score."""
    model = RecursiveTransformer.load(folder)
    gate = Gate.load(folder, model)
    idx, targets = (torch.cat(part) for part in zip(*pairs, strict=True))
    token, ce, score = [], [], {name: [] for name in RULES}
    with torch.no_grad():
        for loop, x in enumerate(model(idx)):
            logits = model.logits(x)
            token.append(logits.argmax(-1).flatten().tolist())
            ce.append(F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").flatten().tolist())
            if loop < 2:
                p = logits.softmax(-1)
                unit = x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
                hidden = F.gelu(unit @ gate.w1[loop].T + gate.b1[loop])
                first, second = p.sort(-1).values[..., [-1, -2]].unbind(-1)
                for name, s in [("max_prob", first), ("margin", first - second),
                                ("entropy", 1 + (p * p.log()).sum(-1) / math.log(300)),
                                ("gate", (hidden @ gate.w2[loop] + gate.b2[loop]).sigmoid())]:
                    score[name].append(s.flatten().tolist())
    return token, ce, score


def assert_figures(row, loops, token, ce):
    """The row is right for tokens that exit after `loops`, counted from 0."""
    n = len(loops)
    agree = [token[loop][i] == token[-1][i] for i, loop in enumerate(loops)]
    early = [i for i in range(n) if token[-1][i] in (token[0][i], token[1][i])]
    assert row["loops"] == pytest.approx(sum(loops) / n + 1)
    assert row["left_at"] == pytest.approx([loops.count(loop) / n for loop in range(3)])
    assert row["agreement"] == pytest.approx(sum(agree) / n)
    assert row["perplexity"] == pytest.approx(math.exp(sum(ce[loop][i] for i, loop in enumerate(loops)) / n), rel=1e-4)
    assert row["caught"] == pytest.approx(sum(loops[i] < 2 and agree[i] for i in early) / len(early))


def test_the_figures_with_recomputed_kv_are_right(home, capsys):
    pairs = read(EvaluateConfig(f"{home}/ckpt", f"{home}/text.txt", 320, 16))
    token, ce, score = predictions(home / "ckpt", pairs)
    shown, numbers = run(capsys, home, home / "ckpt", "--keys=exact", "--thresholds=0.04,0.105,0.4")
    assert numbers["tokens"] == len(ce[0]) == 320
    assert numbers["exit_loss"] == pytest.approx([sum(loop) / 320 for loop in ce], abs=1e-5)
    table = [line.split() for line in shown.splitlines()]
    text = Tokenizer.load(home / "ckpt").decode(torch.cat([targets.flatten() for _, targets in pairs]).tolist())
    for i, (loss, bits) in enumerate(zip(numbers["exit_loss"], numbers["bits_per_byte"], strict=True)):
        assert bits == pytest.approx(loss * 320 / math.log(2) / numbers["bytes"])
        assert [f"{i + 1}", f"{loss:.4f}", f"{math.exp(loss):.2f}", f"{bits:.4f}"] in table
    assert numbers["bytes"] == len(text.encode()) > 320      # windows, spread, but each of whole characters
    assert f"320 tokens ({len(text)} bytes) in 20 windows of 16, stride 16" in shown
    oracle, *rows = numbers["rows"]
    assert oracle["rule"] == "oracle" and oracle["agreement"] == oracle["caught"] == 1
    assert_figures(oracle, [[t[i] for t in token].index(token[-1][i]) for i in range(320)], token, ce)
    assert [(row["rule"], row["threshold"]) for row in rows] == [(r, t) for r in RULES for t in (0.4, 0.105, 0.04)]
    for row in rows:
        first, second = score[row["rule"]]
        loops = [0 if a >= row["threshold"] else 1 if b >= row["threshold"] else 2
                 for a, b in zip(first, second, strict=True)]
        assert_figures(row, loops, token, ce)
    for name in RULES:
        assert any(0.05 < row["left_at"][0] < 0.95 for row in select(numbers, rule=name)), name


def test_copied_kv_have_rows_of_their_own(home, capsys):
    """As many tokens exit after the first loop with either policy; their KV change the loops after it."""
    _, numbers = run(capsys, home, home / "ckpt", "--rules=margin", "--thresholds=0,0.04,1")
    exact, copied = (select(numbers, keys=keys, rule="margin") for keys in ("exact", "copy"))
    assert [row["threshold"] for row in exact] == [row["threshold"] for row in copied] == [1, 0.04, 0]
    for never, _, at_once in (exact, copied):
        assert never["left_at"] == [0, 0, 1] and never["loops"] == 3 and never["agreement"] == 1
        assert at_once["left_at"] == [1, 0, 0] and at_once["loops"] == 1
        assert never["perplexity"] == pytest.approx(math.exp(numbers["exit_loss"][2]))
        assert at_once["perplexity"] == pytest.approx(math.exp(numbers["exit_loss"][0]))
    assert 0.05 < exact[1]["left_at"][0] == copied[1]["left_at"][0] < 0.95
    assert copied[1]["perplexity"] != pytest.approx(exact[1]["perplexity"], rel=1e-4)


def test_the_results_of_a_rule_keep_no_graph(home, capsys, monkeypatch):
    """It would keep the logits of the whole text alive."""
    apply_rule, kept = perplexity.apply_rule, []
    monkeypatch.setattr(perplexity, "apply_rule", lambda *args: kept.append(apply_rule(*args)) or kept[-1])
    run(capsys, home, home / "ckpt", "--thresholds=0.1", "--tokens=32")
    assert len(kept) == 8 and not any(out.ce.requires_grad for out in kept)


def test_a_token_exits_at_the_threshold_itself(home):
    model = RecursiveTransformer.load(home / "ckpt")
    pairs = read(EvaluateConfig(f"{home}/ckpt", f"{home}/text.txt", 32, 16))
    stats = collect_exit_stats(model, pairs, [Rule("margin")])
    for keys in ("exact", "copy"):
        rule = Rule("margin", threshold=stats.scores["margin"][0, 7].item())
        assert apply_rule(model, pairs, stats, rule, keys).exit_loop[7] == 0


def test_default_thresholds_are_deciles_of_the_scores(home, capsys):
    config = EvaluateConfig(f"{home}/ckpt", f"{home}/text.txt", 320, 16)
    _, _, score = predictions(home / "ckpt", read(config))
    _, numbers = run(capsys, home, home / "ckpt", "--keys=exact")
    for name in RULES:
        thresholds = [row["threshold"] for row in select(numbers, rule=name)]
        scores = score[name][0] + score[name][1]
        passed = [sum(s >= t - 1e-6 for s in scores) / len(scores) for t in thresholds]
        assert len(thresholds) == 9 and passed == pytest.approx([i / 10 for i in range(1, 10)], abs=0.01)


def test_thresholds_of_more_scores_than_torch_quantile_takes():
    """2^24 is its limit."""
    found = perplexity.find_thresholds(torch.zeros(2**24 + 1), [], 0.5)
    assert found == [0.5, 0.0]


@pytest.mark.parametrize("given", ["", "--thresholds=0.3,0.2"])
def test_a_calibrated_threshold_is_a_row_with_its_agreement(home, ckpt, capsys, given):
    (ckpt / THRESHOLDS_FILE).write_text(json.dumps({
        "exact": {"agreement": 0.98, "confidence": 0.95, "thresholds": {"gate": 0.3, "margin": 0.123456789012345}},
        "copy": {"agreement": 0.9, "confidence": 0.95, "thresholds": {"gate": 0.7}}}))
    shown, numbers = run(capsys, home, ckpt, "--tokens=64", *([given] if given else []))
    promised = {(r["rule"], r["keys"], r["threshold"]): r["calibrated_for"] for r in numbers["rows"][1:]
                if r["calibrated_for"]}
    assert promised == {("gate", "exact", 0.3): 0.98, ("margin", "exact", 0.123456789012345): 0.98,
                        ("gate", "copy", 0.7): 0.9}
    assert shown.count("calibrated for 0.98\n") == 2 and shown.count("calibrated for 0.9\n") == 1
    rows = len(given.split(",")) if given else 9
    assert len(select(numbers, rule="max_prob", keys="exact")) == rows
    assert len(select(numbers, rule="gate", keys="copy")) == rows + 1
    assert len(select(numbers, rule="gate", keys="exact")) == rows + (not given)   # one of those given is that one
    for name in ("gate", "margin"):
        thresholds = [row["threshold"] for row in select(numbers, rule=name, keys="exact")]
        assert thresholds == sorted(thresholds, reverse=True)


def test_rules_and_keys_can_be_chosen(home, capsys):
    shown, numbers = run(capsys, home, home / "ckpt", "--rules=entropy,margin,entropy", "--keys=copy",
                         "--thresholds=0.1")
    assert [(r["rule"], r["keys"]) for r in numbers["rows"][1:]] == [("entropy", "copy"), ("margin", "copy")]
    assert "max_prob" not in shown and " exact" not in shown.split("oracle")[1].split("\n", 1)[1]


def test_without_rotation_in_some_loops_there_are_no_copies_by_default(home, ckpt, capsys):
    config = json.loads((ckpt / "config.json").read_text())
    (ckpt / "config.json").write_text(json.dumps(config | {"no_rope": [1]}))
    _, numbers = run(capsys, home, ckpt, "--rules=margin", "--thresholds=0.1")
    assert {row["keys"] for row in numbers["rows"][1:]} == {"exact"}
    with pytest.raises(UserError, match="keys='copy'.*no_rope"):
        perplexity.main(flags(home, ckpt, "--rules=margin", "--keys=copy"))


def test_a_missing_gate_is_an_error_only_if_asked_for(home, ckpt, capsys):
    (ckpt / GATE_FILE).unlink()
    shown, numbers = run(capsys, home, ckpt, "--thresholds=0.1")
    assert f"{ckpt} has no gate yet: python -m evaluation.thresholds --ckpt={ckpt} trains one" in shown
    assert {row["rule"] for row in numbers["rows"]} == {"oracle", "max_prob", "margin", "entropy"}
    with pytest.raises(UserError, match="has no gate: train one"):
        perplexity.main(flags(home, ckpt, "--rules=max_prob,gate"))


@pytest.fixture
def one_loop(home, tmp_path):
    model = RecursiveTransformer(Config(vocab_size=300, n_layer=2, n_embd=16, n_head=2, head_dim=8, n_hidden=32,
                                        n_ctx=48))
    model.save(tmp_path / "full")
    for name in ("tokenizer.tiktoken", "tokenizer_config.json"):
        shutil.copy(home / "ckpt" / name, tmp_path / "full")
    return tmp_path / "full"


@pytest.mark.parametrize("more", [[], ["--rules=gate", "--thresholds=0.5"]])
def test_a_model_of_one_loop_has_a_loss_and_no_exits(home, one_loop, capsys, more):
    shown, numbers = run(capsys, home, one_loop, *more)
    assert "has 1 loop, so no token can exit before the last" in shown and "oracle" not in shown and "gate" not in shown
    (loss,), (oracle,) = numbers["exit_loss"], numbers["rows"]
    assert abs(loss - math.log(300)) < 0.5 and f"{loss:.4f}" in shown
    assert oracle["loops"] == 1 and oracle["perplexity"] == pytest.approx(math.exp(loss))


def test_a_hugging_face_folder_is_scored_as_its_conversion(home, one_loop, capsys, tmp_path):
    to_hf(RecursiveTransformer.load(one_loop), tmp_path / "hf")
    for name in ("tokenizer.tiktoken", "tokenizer_config.json"):
        shutil.copy(one_loop / name, tmp_path / "hf")
    ours, theirs = (run(capsys, home, folder)[1] for folder in (one_loop, tmp_path / "hf"))
    assert ours["exit_loss"] == theirs["exit_loss"] and ours["bits_per_byte"] == theirs["bits_per_byte"]


@pytest.mark.parametrize("name", ["embed.weight", "layers.0.mlp.down.lora_b"])
def test_a_loss_that_is_nan_is_an_error_and_nothing_is_saved(home, ckpt, tmp_path, monkeypatch, name):
    model = RecursiveTransformer.load(ckpt)
    dict(model.named_parameters())[name].data[1, 1] = math.nan
    monkeypatch.setattr(perplexity, "load_any", lambda *_: model)
    with pytest.raises(UserError, match="the logits are not finite"):
        perplexity.main(flags(home, ckpt, f"--save={tmp_path}/lines.jsonl"))
    assert not (tmp_path / "lines.jsonl").exists()


def test_a_plot_of_one_loop_is_refused(home, one_loop, tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match="1 loop, so there are no exits to plot"):
        perplexity.main(flags(home, one_loop, f"--plot={tmp_path}/a.png"))


def test_the_json_line_is_complete_and_save_appends_it(home, capsys, tmp_path):
    path, numbers = tmp_path / "lines.jsonl", []
    for thresholds in ("0.1", "0.2"):
        numbers.append(run(capsys, home, home / "ckpt", f"--thresholds={thresholds}", f"--save={path}",
                           "--tokens=64")[1])
    assert [strict(line) for line in path.read_text().splitlines()] == numbers
    assert [n["settings"]["thresholds"] for n in numbers] == ["0.1", "0.2"]
    assert numbers[0]["settings"] | {"thresholds": "0.2"} == numbers[1]["settings"]
    assert numbers[0]["settings"]["seq_len"] == 16 and numbers[0]["settings"]["ckpt"] == str(home / "ckpt")
    assert numbers[0]["torch"] == torch.__version__ and {"python", "commit", "cpu", "time"} <= numbers[0].keys()
    assert len(numbers[0]["rows"]) == 1 + 4 * 2


def test_the_line_is_strict_json_though_a_perplexity_is_infinite(home, ckpt, capsys):
    model = RecursiveTransformer.load(ckpt)
    model.norm.weight.data *= 1e4
    (ckpt / "model.safetensors").unlink()
    model.write(ckpt)
    _, numbers = run(capsys, home, ckpt, "--rules=max_prob", "--thresholds=0.5")
    assert min(numbers["exit_loss"]) > 710 and numbers["rows"][0]["perplexity"] is None


def test_a_plot_has_a_line_for_each_rule_and_keys(home, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or savefig(self, *a, **k))
    _, numbers = run(capsys, home, home / "ckpt", "--rules=margin,gate", "--thresholds=0.1,0.3", "--tokens=64",
                     f"--plot={tmp_path}/exits.png")
    assert (tmp_path / "exits.png").read_bytes().startswith(b"\x89PNG\r\n")
    (axes,) = figures[0].axes
    *lines, star = axes.lines
    assert [line.get_label() for line in lines] == ["margin, recomputed KV", "gate, recomputed KV", "margin, copied KV",
                                                    "gate, copied KV"]
    for line in lines:
        name, keys = line.get_label().removesuffix(" KV").split(", ")
        keys = {"recomputed": "exact", "copied": "copy"}[keys]
        rows = sorted((r["loops"], r["agreement"]) for r in select(numbers, rule=name, keys=keys))
        assert line.get_xydata().tolist() == [list(row) for row in rows]
        assert line.get_linestyle() == ("-" if keys == "exact" else "--")
        assert line.get_color() == lines[name == "gate"].get_color()
    assert lines[0].get_color() != lines[1].get_color()
    assert star.get_label() == "oracle" and star.get_xydata().tolist() == [[numbers["rows"][0]["loops"], 1]]


def test_windows_are_spread_evenly_over_the_text(home, monkeypatch):
    monkeypatch.setattr(perplexity, "windows", lambda tokens, seq_len, indices, stride: list(indices))
    there = (len(Tokenizer.load(home / "ckpt").encode((home / "text.txt").read_text())) - 1) // 16
    assert there > 60

    def numbers(tokens, seq_len=16):
        parts = read(EvaluateConfig(f"{home}/ckpt", f"{home}/text.txt", tokens, seq_len))
        assert all(1 <= len(part) <= 8 for part in parts)
        return sum(parts, [])
    assert numbers(16) == [0] and numbers(10**9) == list(range(there))
    some = numbers(20 * 16 + 15)
    gaps = [b - a for a, b in zip(some, [*some[1:], there], strict=True)]
    assert some[0] == 0 and len(some) == 20 and set(gaps) <= {there // 20, there // 20 + 1}
    assert len(numbers(480, seq_len=1000)) == 10             # no longer than the model's context, 48


def test_mistakes_are_errors_before_the_work(home, ckpt, tmp_path, monkeypatch):
    monkeypatch.setattr(perplexity, "collect_exit_stats", lambda *_: pytest.fail("the text was read"))
    (tmp_path / "short.txt").write_text("My aunt")
    (tmp_path / "empty.txt").write_text("")
    for flag, says in [
            ("--rules=max_prob,guess", "--rules=max_prob,guess: 'guess' is unknown; use max_prob, margin"),
            ("--rules=never", "'never' is unknown"), ("--rules=gate,", "'' is unknown"),
            ("--keys=exact,moved", "--keys=exact,moved: 'moved' is unknown; use exact, copy"),
            ("--thresholds=0.5,1.5", "0.5,1.5 are out of range"), ("--thresholds=-0.1", "out of range"),
            ("--thresholds=nan", "out of range"), ("--thresholds=0.5,inf", "out of range"),
            ("--thresholds=0.5,half", "must be numbers separated by commas"),
            ("--thresholds=0.5,,0.9", "must be numbers"),
            ("--seq_len=0", "--seq_len=0 must be at least 1"), ("--seq_len=-5", "must be at least 1"),
            ("--tokens=15", "less than one window; use --tokens=16"), ("--tokens=0", "less than one window"),
            ("--tokens=-1", "less than one window"),
            (f"--text={tmp_path}/short.txt", "need at least 17"), (f"--text={tmp_path}/empty.txt", "is empty"),
            (f"--text={tmp_path}/missing.txt", "missing.txt does not exist"),
            (f"--ckpt={tmp_path}/nowhere", "nowhere does not exist"),
            (f"--save={tmp_path}/nowhere/a.jsonl", "nowhere/a.jsonl cannot be written"),
            (f"--save={tmp_path}", "cannot be written"), ("--device=abacus", "cannot be used here")]:
        with pytest.raises(UserError, match=says):
            perplexity.main(flags(home, ckpt, flag))
    (ckpt / THRESHOLDS_FILE).write_text("{")
    with pytest.raises(UserError, match="not readable as thresholds"):
        perplexity.main(flags(home, ckpt))


def test_a_plot_that_cannot_be_written_is_an_error_before_the_work(home, tmp_path, monkeypatch):
    monkeypatch.setattr(perplexity, "collect_exit_stats", lambda *_: pytest.fail("the text was read"))
    monkeypatch.chdir(tmp_path)

    def refused(path, says):
        with pytest.raises(UserError, match=says):
            perplexity.main(flags(home, home / "ckpt", f"--plot={path}"))
    refused(tmp_path / "nowhere" / "a.png", "--plot=.*nowhere/a.png cannot be written")
    refused(tmp_path, "cannot be written")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib", None)
        without.setitem(sys.modules, "matplotlib.backend_bases", None)
        without.setitem(sys.modules, "matplotlib.figure", None)
        refused("a.png", "--plot needs matplotlib")
    pytest.importorskip("matplotlib")
    refused("a.xyz", "ends in .png")
    refused("plot", "ends in .png")
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Sliding windows, data sets by name

def test_in_sliding_windows_each_token_counts_once_with_its_longest_context(home, capsys, tmp_path):
    """Windows of 16 tokens with a stride of 4, token by token."""
    (tmp_path / "few.txt").write_text(story(1, 10))
    model, ids = RecursiveTransformer.load(home / "ckpt"), Tokenizer.load(home / "ckpt").encode(story(1, 10))
    shown, numbers = run(capsys, home, home / "ckpt", "--stride=4", "--tokens=100000", "--rules=margin",
                         "--thresholds=0.05,0", f"--text={tmp_path}/few.txt")
    n = numbers["tokens"]
    assert len(ids) - 4 <= n + 1 <= len(ids)                 # all but an incomplete stride at the end
    assert (numbers["windows"], numbers["window"], numbers["stride"]) == ((n - 16) // 4 + 1, 16, 4)
    assert f"{n:,} tokens ({numbers['bytes']:,} bytes) in {numbers['windows']} windows of 16, stride 4" in shown
    assert numbers["bytes"] == len(Tokenizer.load(home / "ckpt").decode(ids[1:n + 1]).encode())
    loss = [0.0] * 3
    with torch.no_grad():
        for at in range(n):                                  # the one that predicts ids[at + 1]
            start = 0 if at < 16 else (at - 16) // 4 * 4 + 4
            for loop, x in enumerate(model(torch.tensor([ids[start:at + 1]]))):
                loss[loop] -= model.logits(x)[0, -1].log_softmax(-1)[ids[at + 1]].item()
    assert numbers["exit_loss"] == pytest.approx([nats / n for nats in loss], abs=1e-5)
    for keys in ("exact", "copy"):                           # each counts as one exit
        some, none = select(numbers, rule="margin", keys=keys)
        assert none["left_at"] == [1, 0, 0] and none["perplexity"] == pytest.approx(math.exp(loss[0] / n), rel=1e-5)
        assert all(round(share * n, 6).is_integer() for share in some["left_at"])


def test_a_stride_above_the_window_is_refused(home, monkeypatch):
    monkeypatch.setattr(perplexity, "collect_exit_stats", lambda *_: pytest.fail("the text was read"))
    for stride in (0, -1, 17):
        with pytest.raises(UserError, match=f"--stride={stride} must be 1 to --seq_len=16"):
            perplexity.main(flags(home, home / "ckpt", f"--stride={stride}"))


def test_a_data_set_by_name_is_read_from_its_start(home, capsys, monkeypatch):
    """Without a network: the arguments of load_dataset, and how much is read."""
    import datasets
    asked, taken = [], []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return ({"text": taken.append(i) or story(i, 20)} for i in range(1000))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("lib.shards.BATCH", 2000)
    _, numbers = run(capsys, home, home / "ckpt", "--text=pg19#test", "--rules=margin", "--thresholds=0.1")
    assert asked == [(("emozilla/pg19", None), {"revision": None, "split": "test", "streaming": True})]
    assert numbers["tokens"] == 320 and len(taken) < 30
    tokenizer = Tokenizer.load(home / "ckpt")
    ids = [i for text in (story(n, 20) for n in range(3)) for i in [*tokenizer.encode(text), tokenizer.eos_id]]
    assert numbers["bytes"] == len(tokenizer.decode(i for i in ids[1:321] if i != tokenizer.eos_id))
    loss = F.cross_entropy(*(lambda model, rows: (model.logits(model(rows[:, :-1])[-1]).flatten(0, 1),
                                                  rows[:, 1:].flatten()))(
        RecursiveTransformer.load(home / "ckpt"), torch.tensor(ids[:321]).unfold(0, 17, 16)))
    assert numbers["exit_loss"][-1] == pytest.approx(loss.item(), abs=1e-5)
