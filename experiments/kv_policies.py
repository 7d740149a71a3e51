"""What a looped model loses, on a given text, by how the keys and values (KV) of exited tokens are kept.

    python -m experiments.kv_policies --ckpt=out_exits --save=results/kv_policies.jsonl

Token by token, as in decoding, but each next token is the text's. The same gate decides under every policy:

    exact        recomputed KV: what the model computes without exits
    copy         the exit loop's KV stand in for those of the loops that are skipped
    overwritten  one cache for all loops, as of Continuous Depth Batching (arXiv 2608.09444): each loop of a token
                 overwrites the KV of the one before, so that later tokens find those of its last loop

A model with kv="first_loop" has one policy, which loses nothing: all loops read the first loop's KV.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from exits import Routed, Rule, choose_kv_policy, load_rule, run_prompts
from lib.cli import UserError, parse_args, progress, script, table
from lib.data import load_tokens, validation
from lib.results import append_line, check_writable
from lib.system import pick_device, run_info
from lib.tokenizer import Tokenizer
from model import Config, KVCache, RecursiveTransformer, causal_attention


@dataclass
class PoliciesConfig:
    ckpt: str = "out_exits"                # checkpoint with a calibrated gate
    text: str = "assets/books/valid.txt"   # text that the loss is measured on
    tokens: int = 32_768                   # tokens of it
    seq_len: int = 256                     # tokens per window
    prompt_len: int = 32                   # tokens at the start of each, which run all loops and are not counted
    threshold: float | None = None         # of the gate; not set: as calibrated for recomputed KV
    device: str = "auto"                   # auto, cpu, cuda
    save: str | None = None                # file to append the line to


class OverwrittenCache(KVCache):
    """A KVCache whose loops share the memory of the first."""

    def attend(self, loop: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (keys, values), end = self.depths[layer], self.lengths[loop]
        new = slice(end - k.size(1), end)
        for cache, fresh in ((keys, k.transpose(1, 2)), (values, v.transpose(1, 2))):
            cache[:, :, new] = fresh if self.exited is None else torch.where(
                self.exited[:, None, :, None], cache[:, :, new], fresh)
        return causal_attention(q, keys[:, :, :end], values[:, :, :end])

    def copy_loop(self, loop: int) -> None:
        self.lengths[loop] = self.lengths[loop - 1]


POLICIES = {"exact": ("exact", KVCache), "copy": ("copy", KVCache), "overwritten": ("copy", OverwrittenCache)}


@torch.inference_mode()
def text_losses(model: RecursiveTransformer, pairs: list, rule: Rule, policy: str, prompt_len: int) -> dict:
    """Mean cross entropy in nats and mean loops of the tokens behind the prompts of these batches of windows."""
    (keys, make_cache), c = POLICIES[policy], model.config
    loss, loops, n = 0.0, 0, 0
    for idx, targets in progress(pairs, desc=policy, unit="batch"):
        idx, targets = (t.to(model.embed.weight.device) for t in (idx, targets))
        B, T = idx.shape
        cache = make_cache(c, B, T, idx.device, model.embed.weight.dtype)
        run_prompts(model, cache, idx[:, :prompt_len])
        run_token = choose_kv_policy(model, cache, rule, keys, max(B, 2))    # of several rows, also for one
        for t in range(prompt_len, T):
            nobody = torch.zeros(B, dtype=torch.bool, device=idx.device)
            routed = run_token(idx[:, t:t + 1], Routed(idx.new_zeros(B, c.vocab_size), idx.new_zeros(B), nobody))
            loss += F.cross_entropy(routed.logits.float(), targets[:, t], reduction="sum").item()
            loops, n = loops + (routed.exit_loop + 1).sum().item(), n + B
    return {"loss": loss / n, "mean_loops": loops / n, "tokens": n}


def cache_bytes(config: Config, policy: str) -> int:
    """Bytes of the keys and values of one token, in bf16."""
    loops = 1 if policy == "overwritten" else config.kv_loops
    return 2 * 2 * loops * config.n_unique * config.n_kv_head * config.head_dim


def main(argv=None) -> None:
    args = parse_args(PoliciesConfig, argv)
    if not 1 <= args.prompt_len < args.seq_len:
        raise UserError(f"--prompt_len={args.prompt_len} must be at least 1 and below --seq_len={args.seq_len}")
    check_writable("save", args.save)
    model = RecursiveTransformer.load(args.ckpt, dtype=torch.float32).to(pick_device(args.device))
    c = model.config
    tokens = load_tokens(args.text, Tokenizer.load(args.ckpt, c.vocab_size), c.vocab_size)
    pairs = validation(tokens, args.seq_len, args.tokens, rows=32)
    gate, rows = load_rule(args.ckpt, model, "gate", args.threshold), []
    never = Rule("fixed", exit_loop=c.n_loop)                # no loop is the last but one
    for policy in POLICIES if c.kv == "own" else ["exact"]:
        for exits, rule in (("never", never), ("gate", gate)):
            rows.append({"policy": policy if c.kv == "own" else "shared", "exits": exits,
                         "bytes_per_token": cache_bytes(c, policy)}
                        | text_losses(model, pairs, rule, policy, args.prompt_len))
    print(table([["KV", "exits", "bytes per token", "mean loops", "loss"],
                 *([r["policy"], r["exits"], r["bytes_per_token"], f"{r['mean_loops']:.3f}", f"{r['loss']:.4f}"]
                   for r in rows)]))
    if args.save:
        append_line(args.save, {"what": "kv_policies", "settings": asdict(args)} | run_info()
                    | {"threshold": gate.threshold, "model": asdict(c), "rows": rows})


if __name__ == "__main__":
    script(main)
