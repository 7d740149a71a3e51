"""What bench.py serves: prompts, numbers of new tokens, and the loops after which tokens exit."""

from dataclasses import dataclass, field

import numpy as np
import torch

from benchmarks.simulate import draw_exits, exit_probability
from engine import Engine
from exits import oracle_exits
from lib.cli import UserError, progress
from lib.data import load_tokens
from lib.tokenizer import Tokenizer
from model import RecursiveTransformer


@dataclass
class Workload:
    """The same requests for all variants: prompts, numbers of new tokens, and the loops after which the tokens exit, by
    kind of exits."""
    prompts: list[list[int]]
    lengths: list[int]
    forced_exits: dict[str, list] = field(default_factory=dict)

    @property
    def max_len(self) -> int:
        return max(len(p) + n for p, n in zip(self.prompts, self.lengths, strict=True))


def draw_lengths(mean: int, n: int, draw: np.random.Generator) -> list[int]:
    """n lengths, uniform from half to one and a half of `mean`."""
    return draw.integers(-(-mean // 2), mean * 3 // 2 + 1, n).tolist()


def draw_workload(config, model: RecursiveTransformer) -> Workload:
    """Prompts and lengths, the same for the same settings. Prompts are text with --ckpt, else random tokens."""
    draw, n = np.random.default_rng(0), config.requests or 4 * config.slots
    sizes, lengths = draw_lengths(config.prompt_len, n, draw), draw_lengths(config.new_tokens, n, draw)
    vocab_size = model.config.vocab_size
    if not config.ckpt:
        return Workload([draw.integers(0, vocab_size, size).tolist() for size in sizes], lengths)
    text = load_tokens(config.text, Tokenizer.load(config.ckpt, vocab_size), vocab_size)
    if len(text) <= max(sizes):
        raise UserError(f"--text={config.text} holds {len(text)} tokens, too few for a prompt of {max(sizes)}")
    starts = draw.integers(0, len(text) - max(sizes), n)
    prompts = [[int(token) for token in text[start:start + size]] for start, size in zip(starts, sizes, strict=True)]
    return Workload(prompts, lengths)


@torch.no_grad()
def oracle_loops(model: RecursiveTransformer, work: Workload, texts: list[list[int]]) -> list[list[int]]:
    """For each request, the earliest loop that predicts each token of its text at full depth."""
    found = []
    for prompt, text in progress(list(zip(work.prompts, texts, strict=True)), desc="oracle", unit="request"):
        idx = torch.tensor([prompt + text[:-1]], device=model.embed.weight.device)
        loops = oracle_exits(model, idx)[0, len(prompt) - 1:].tolist()       # from the prompt's last position on, ...
        found.append([model.config.n_loop - 1, *loops[1:]])                  # which runs all loops
    return found


def draw_forced_exits(kind: str, model: RecursiveTransformer, work: Workload, config) -> list:
    """For each request, the loops after which its tokens exit: drawn at random, or the oracle's."""
    n_loop = model.config.n_loop
    if kind == "drawn":
        exit_prob = exit_probability(n_loop, config.mean_loops) if config.exit_prob is None else config.exit_prob
        return [loops.tolist() for loops in draw_exits(work.lengths, n_loop, exit_prob, seed=1)]
    engine = Engine(model, config.slots, work.max_len)
    requests = [engine.add(p, n) for p, n in zip(work.prompts, work.lengths, strict=True)]
    for _ in progress(engine.run(), total=sum(work.lengths), desc="full depth", unit="tok"):
        pass
    return oracle_loops(model, work, [r.tokens for r in requests])
