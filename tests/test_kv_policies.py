"""experiments/kv_policies.py: what exited tokens' keys and values cost."""

import json

import pytest
import torch
import torch.nn.functional as F
from test_model import each_arch, tiny, tokens

from convert import load_full, to_recursive
from exits import Gate, Rule
from experiments import kv_policies
from experiments.kv_policies import OverwrittenCache, cache_bytes, text_losses
from lib.cli import UserError
from lib.tokenizer import copy_tokenizer
from model import causal_attention, rope_angles


class LatestOnly:
    """One cache for all loops, written out: {layer: {position: its newest key and value}}, one row."""

    def __init__(self, config):
        self.config, self.at, self.kv = config, 0, [{} for _ in range(config.n_unique)]

    def kv_loop(self, loop):
        return loop

    def extend(self, loop, T):
        return rope_angles(torch.tensor([self.at]), self.config)

    def attend(self, loop, layer, q, k, v):
        self.kv[layer][self.at] = k[0, 0], v[0, 0]                       # (K, D) each
        keys, values = (torch.stack(each, 1)[None] for each in zip(*self.kv[layer].values(), strict=True))
        return causal_attention(q, keys, values)


def exits_at_random(x, loop, logits=None):
    """A rule: half of the tokens exit, by digits of their states."""
    return (1e3 * x.sum(-1)).frac().abs() < 0.5


exits_at_random.reads_logits = False


@each_arch
@pytest.mark.parametrize("n_loop, rows", [(2, 1), (3, 3)])
@torch.no_grad()
def test_overwritten_keys_are_those_of_the_last_loop_of_each_token(arch, n_loop, rows):
    model = tiny(arch, n_loop=n_loop, rank=2).double()
    idx, rule, prompt = tokens(rows, 16), exits_at_random, 1
    got = text_losses(model, [(idx[:, :-1], idx[:, 1:])], rule, "overwritten", prompt)
    loss, loops = 0.0, []
    for row in idx:
        cache = LatestOnly(model.config)
        for cache.at, token in enumerate(row[:-1]):
            x = model.first_state(token[None, None])
            for loop in range(n_loop):
                x = model.block(x, loop, cache)
                if cache.at >= prompt and loop < n_loop - 1 and rule(x[0], loop):
                    break
            if cache.at >= prompt:
                loss += F.cross_entropy(model.logits(x[0]), row[cache.at + 1][None]).item()
                loops.append(loop + 1)
    assert len(set(loops)) == n_loop   # every exit was taken
    assert got == {"loss": pytest.approx(loss / len(loops), abs=1e-6), "mean_loops": sum(loops) / len(loops),
                   "tokens": len(loops)}


@each_arch
@torch.no_grad()
def test_without_exits_only_the_overwritten_cache_changes_the_loss(arch):
    model, idx = tiny(arch, n_loop=2, rank=2).double(), tokens(3, 9)
    want = F.cross_entropy(model.logits(model(idx)[-1][:, 2:-1]).flatten(0, 1), idx[:, 3:].flatten())
    found = {policy: text_losses(model, [(idx[:, :-1], idx[:, 1:])], Rule("fixed", exit_loop=2), policy, 2)
             for policy in kv_policies.POLICIES}
    assert found["exact"]["loss"] == pytest.approx(want.item(), abs=1e-6) == found["copy"]["loss"]
    assert abs(found["overwritten"]["loss"] - want.item()) > 1e-3
    assert all(each["mean_loops"] == 2 and each["tokens"] == 18 for each in found.values())


def test_bytes_of_a_token():
    config = tiny("llama", n_loop=2).config
    cache = OverwrittenCache(config, 1, 10, dtype=torch.bfloat16)
    assert cache_bytes(config, "exact") * 10 == 2 * cache.k.numel() * 2 == cache_bytes(config, "overwritten") * 20


@pytest.mark.parametrize("kv, rows", [("own", 6), ("first_loop", 2)])
def test_from_the_command_line(kv, rows, home, tmp_path, capsys):
    model = to_recursive(load_full(str(home / "donor")), 2, "stepwise", kv=kv)
    model.save(tmp_path / "out")
    copy_tokenizer(home / "donor", tmp_path / "out")
    Gate(1, model.config.n_embd).save(tmp_path / "out")
    given = [f"--ckpt={tmp_path / 'out'}", f"--text={home / 'valid.txt'}", "--tokens=64", "--seq_len=16",
             "--prompt_len=4", "--threshold=0.5", f"--save={tmp_path / 'line.jsonl'}"]
    kv_policies.main(given)
    line = json.loads((tmp_path / "line.jsonl").read_text())
    assert len(line["rows"]) == rows and all(row["loss"] > 0 for row in line["rows"])
    assert ("shared" in capsys.readouterr().out) == (kv == "first_loop")
    with pytest.raises(UserError, match="--prompt_len=16 must be at least 1 and below --seq_len=16"):
        kv_policies.main([*given, "--prompt_len=16"])
