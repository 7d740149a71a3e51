"""Speed of speculative decoding by the exits, beside plain decoding at full depth and beside what its formula promises.

    python -m benchmarks.speculative --ckpt=out_exits
    python -m benchmarks.speculative --ckpt=out_exits --prompts=200 --gammas=2     # are 200 texts the same?
"""

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import by_comma, check_at_least, run_and_publish, synchronize
from exits import decode
from hf import load_any
from lib.cli import UserError, parse_args, progress, script, table
from lib.data import load_tokens
from lib.donors import find_donor
from lib.system import pick_bf16, pick_device
from lib.tokenizer import Tokenizer
from model import KVCache, RecursiveTransformer
from speculative import check_draft, speculate


@dataclass
class SpeculativeConfig:
    ckpt: str = "out_exits"                # checkpoint with trained exits, which draft
    text: str = "assets/books/valid.txt"   # prompts are random passages of it
    gammas: str = "1,2,3,4,6"              # numbers of tokens that are drafted at a time, by comma
    draft_loop: int = 1                    # the loop whose exit drafts, counted from 1
    prompts: int = 20                      # batches of prompts; each is decoded in all ways in turn
    rows: int = 1                          # texts that are decoded together
    prompt_len: int = 32                   # tokens of a prompt
    new_tokens: int = 64                   # tokens that are generated
    device: str = "auto"                   # auto, cpu, cuda
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto = bfloat16 on GPUs
    save: str | None = None                # also append the JSON line to this file


def draw_prompts(config: SpeculativeConfig, model: RecursiveTransformer) -> Tensor:
    """(prompts, rows, prompt_len) random passages of the text. UserError if the text is too short."""
    vocab_size, size = model.config.vocab_size, config.prompt_len
    text = load_tokens(config.text, Tokenizer.load(find_donor(config.ckpt), vocab_size), vocab_size)
    if len(text) <= size:
        raise UserError(f"--text={config.text} holds {len(text)} tokens, too few for a prompt of {size}")
    starts = np.random.default_rng(0).integers(0, len(text) - size, (config.prompts, config.rows))
    return torch.tensor([[[int(token) for token in text[at:at + size]] for at in batch] for batch in starts])


class Clock:
    """Seconds of what was run, by name. Each call adds one time, of one run or the mean of several."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, {}

    def run(self, name: str, work, repeats: int = 1):
        synchronize(self.device)
        began = time.perf_counter()
        for _ in range(repeats):
            result = work()
        synchronize(self.device)
        self.seconds.setdefault(name, []).append((time.perf_counter() - began) / repeats)
        return result

    def mean(self, name: str) -> float:
        return statistics.fmean(self.seconds[name])


@torch.inference_mode()
def time_parts(clock: Clock, model: RecursiveTransformer, idx: Tensor, gammas: list[int], draft_loop: int) -> None:
    """Add the seconds of what a cycle consists of, after the texts idx (B, T): the drafting loops for one position, the
    later loops and the head for one and for gamma + 1 positions."""
    c, n = model.config, idx.size(1)
    cache = KVCache(c, len(idx), n + max(gammas) + 1, idx.device, model.embed.weight.dtype)
    x = model(idx[:, :1], cache)[-1].repeat(1, max(gammas) + 1, 1)       # (B, max(gammas) + 1, C)

    def run_loops(first: int, end: int, T: int) -> None:
        cache.lengths = [n] * c.n_loop
        for loop in range(first, end):
            model.block(x[:, :T], loop, cache)
    clock.run("draft", lambda: run_loops(0, draft_loop + 1, 1), 4)
    for T in sorted({1, *(gamma + 1 for gamma in gammas)}):
        clock.run(f"later {T}", lambda T=T: run_loops(draft_loop + 1, c.n_loop, T), 4)
        clock.run(f"head {T}", lambda T=T: model.logits(x[:, :T]), 4)


def formula_speedup(clock: Clock, gamma: int, acceptance: float) -> tuple[float, float]:
    """Speed-up over plain decoding, by the seconds of the parts, if each draft is accepted with the same probability;
    and the same if the later loops and the head took as long for gamma + 1 positions as for one."""
    draft, head = clock.mean("draft"), clock.mean("head 1")
    tokens = sum(acceptance**i for i in range(gamma + 1))                # (1 - p^(gamma + 1)) / (1 - p)
    plain, drafting = draft + clock.mean("later 1") + head, (gamma + 1) * draft + gamma * head
    verifying = [clock.mean(f"later {T}") + clock.mean(f"head {T}") for T in (gamma + 1, 1)]
    return tuple(tokens * plain / (drafting + verify) for verify in verifying)


def count_accepted(cycles: list[list[list[int]]], gamma: int, n: int) -> list[int]:
    """Numbers of accepted drafts, for each row and each cycle that had room for all of its gamma + 1 tokens."""
    counts = []
    for row in zip(*cycles, strict=True):
        left = n - len(row[0])                                           # the first cycle drafts nothing
        for new in row[1:]:
            counts += [len(new) - 1] * (left > gamma)
            left -= len(new)
    return counts


def bench_speculative(config: SpeculativeConfig) -> dict:
    """Acceptance and tokens/s of greedy speculative decoding beside plain decoding, prompts included, by gamma."""
    device, n, gammas = pick_device(config.device), config.new_tokens, by_comma("gammas", config.gammas, positive=True)
    dtype = torch.bfloat16 if pick_bf16(config.dtype, device) else torch.float32
    model = load_any(find_donor(config.ckpt), dtype).to(device)
    c, draft_loop = model.config, config.draft_loop - 1
    check_draft(c, max(gammas), draft_loop)
    if config.prompt_len + n > c.n_ctx:
        raise UserError(f"--prompt_len={config.prompt_len} and --new_tokens={n} are {config.prompt_len + n} tokens, "
                        f"and the model's context is {c.n_ctx}: give less")
    prompts, clock = draw_prompts(config, model).to(device), Clock(device)

    def decode_all_ways(idx: Tensor, clock: Clock, accepted: dict[int, list], equal: dict[int, int]) -> None:
        text = clock.run("plain", lambda: torch.stack([token for token, _ in decode(model, idx, n)], 1))
        for gamma in gammas:
            cycles = clock.run(f"gamma {gamma}", lambda gamma=gamma: list(
                speculate(model, idx.tolist(), n, gamma, draft_loop)))
            accepted[gamma] += count_accepted(cycles, gamma, n)
            rows = zip(*cycles, strict=True)
            equal[gamma] += sum(sum(new, []) == want for new, want in zip(rows, text.tolist(), strict=True))
        time_parts(clock, model, torch.cat([idx, text[:, :n // 2]], 1), gammas, draft_loop)
    decode_all_ways(prompts[0], Clock(device), {gamma: [] for gamma in gammas}, dict.fromkeys(gammas, 0))  # warm-up
    accepted, equal = {gamma: [] for gamma in gammas}, dict.fromkeys(gammas, 0)
    for idx in progress(prompts, desc="prompts", unit="batch"):
        decode_all_ways(idx, clock, accepted, equal)
    rows = [summarize(clock, gamma, accepted[gamma]) | {"equal_texts": equal[gamma]} for gamma in gammas]
    n_tokens, n_texts, plain = config.rows * n, config.rows * config.prompts, clock.mean("plain")
    lines = [["gamma", "accepted", "tokens per cycle", "tok/s", "speed-up [quartiles]", "formula", "reached",
              "formula, positions free", "texts equal"], ["plain", "", 1, f"{n_tokens / plain:,.0f}", *5 * [""]]]
    for r in rows:
        low, high = np.quantile(r["speedup_of_prompts"], (0.25, 0.75))
        lines.append([r["gamma"], f"{r['acceptance']:.1%}", f"{r['tokens_per_cycle']:.2f}",
                      f"{n_tokens / r['seconds']:,.0f}", f"{r['speedup']:.2f} [{low:.2f}, {high:.2f}]",
                      f"{r['formula']:.2f}", f"{r['speedup'] / r['formula']:.0%}", f"{r['formula_free']:.2f}",
                      f"{r['equal_texts']} of {n_texts}"])
    print(f"{config.ckpt}: {c.n_loop} x {c.n_unique} layers, loop {config.draft_loop} drafts; {config.prompts} x "
          f"{config.rows} prompts of {config.prompt_len} tokens, {n} new ones\n{table(lines)}")
    parts = {name: clock.mean(name) for name in clock.seconds if name.startswith(("draft", "later", "head"))}
    return {"model": asdict(c), "dtype": str(dtype).removeprefix("torch."), "plain_seconds": plain, "texts": n_texts,
            "seconds_of_parts": parts, "rows": rows}


def summarize(clock: Clock, gamma: int, counts: list[int]) -> dict:
    """Acceptance and speed for the numbers of drafts that were accepted in each cycle."""
    tested = sum(counts) + sum(count < gamma for count in counts)        # what follows a rejected draft is not tested
    acceptance, name = sum(counts) / max(1, tested), f"gamma {gamma}"
    formula, free = formula_speedup(clock, gamma, acceptance)
    ratios = [a / b for a, b in zip(clock.seconds["plain"], clock.seconds[name], strict=True)]
    return {"gamma": gamma, "acceptance": acceptance, "tokens_per_cycle": 1 + sum(counts) / max(1, len(counts)),
            "seconds": clock.mean(name), "speedup": clock.mean("plain") / clock.mean(name),
            "speedup_of_prompts": sorted(ratios), "formula": formula, "formula_free": free}


def main(argv=None):
    config = parse_args(SpeculativeConfig, argv)
    check_at_least(config, 1, "prompts", "rows", "prompt_len", "new_tokens", "draft_loop")
    run_and_publish("speculative", config, bench_speculative)


if __name__ == "__main__":
    script(main)
