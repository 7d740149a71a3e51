"""What bench.py serves: requests and their exits, plain batches of them, and what the generated texts are worth."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import synchronize
from benchmarks.simulate import draw_exits, exit_probability
from engine import Engine
from exits import oracle_exits, score_exit
from lib.cli import UserError, progress
from lib.data import load_tokens
from lib.tokenizer import Tokenizer
from model import RecursiveTransformer


@dataclass
class Workload:
    """The same requests for all variants: prompts, numbers of new tokens, the texts at full depth, and the loops after
    which the tokens exit, by kind of exits."""
    prompts: list[list[int]]
    lengths: list[int]
    full_depth: list[list[int]] = field(default_factory=list)
    forced_exits: dict[str, list] = field(default_factory=dict)

    @property
    def max_len(self) -> int:
        return max(len(p) + n for p, n in zip(self.prompts, self.lengths, strict=True))


def draw_lengths(mean: int, n: int, draw: np.random.Generator) -> list[int]:
    """n lengths, uniform from half to one and a half of `mean`."""
    return draw.integers(-(-mean // 2), mean * 3 // 2 + 1, n).tolist()


def draw_workload(config, model: RecursiveTransformer, n: int) -> Workload:
    """n prompts of --prompt_len tokens each, which a plain batch needs no padding for, and numbers of new tokens, the
    same for the same settings. Prompts are text with --ckpt, else random tokens."""
    draw, size, vocab_size = np.random.default_rng(0), config.prompt_len, model.config.vocab_size
    lengths = draw_lengths(config.new_tokens, n, draw)
    if not config.ckpt:
        return Workload(draw.integers(0, vocab_size, (n, size)).tolist(), lengths)
    text = load_tokens(config.text, Tokenizer.load(config.ckpt, vocab_size), vocab_size)
    if len(text) <= size:
        raise UserError(f"--text={config.text} holds {len(text)} tokens, too few for a prompt of {size}")
    starts = draw.integers(0, len(text) - size, n)
    return Workload([[int(token) for token in text[start:start + size]] for start in starts], lengths)


def full_depth_texts(model: RecursiveTransformer, work: Workload, slots: int) -> list[list[int]]:
    """The greedy text of each request without early exits."""
    engine = Engine(model, slots, work.max_len)
    requests = [engine.add(p, n) for p, n in zip(work.prompts, work.lengths, strict=True)]
    for _ in progress(engine.run(), total=sum(work.lengths), desc="full depth", unit="tok"):
        pass
    return [r.tokens for r in requests]


@torch.no_grad()
def oracle_loops(model: RecursiveTransformer, work: Workload) -> list[list[int]]:
    """For each request, the earliest loop that predicts each token of its text at full depth."""
    found = []
    for prompt, text in progress(list(zip(work.prompts, work.full_depth, strict=True)), desc="oracle", unit="request"):
        idx = torch.tensor([prompt + text[:-1]], device=model.embed.weight.device)
        loops = oracle_exits(model, idx)[0, len(prompt) - 1:].tolist()       # from the prompt's last position on, ...
        found.append([model.config.n_loop - 1, *loops[1:]])                  # which runs all loops
    return found


def draw_forced_exits(kind: str, model: RecursiveTransformer, work: Workload, config) -> list:
    """For each request, the loops after which its tokens exit: drawn at random, or the oracle's."""
    if kind == "oracle":
        return oracle_loops(model, work)
    n_loop = model.config.n_loop
    exit_prob = exit_probability(n_loop, config.mean_loops) if config.exit_prob is None else config.exit_prob
    return [loops.tolist() for loops in draw_exits(work.lengths, n_loop, exit_prob, seed=1)]


def serve_in_batches(generate: Callable[[Tensor, int], list], work: Workload, slots: int,
                     device: torch.device) -> tuple[float, list[list[int]]]:
    """(seconds until all requests are done, their texts) of generate(prompts (slots, T), n). Each batch runs until its
    longest request is done; what the others have too much is dropped, and does not count."""
    prompts, texts = torch.tensor(work.prompts, device=device), []
    generate(prompts[:slots], 3)                             # warm-up
    synchronize(device)
    began = time.perf_counter()
    for i in range(0, len(prompts), slots):
        lengths = work.lengths[i:i + slots]
        texts += [text[:n] for text, n in zip(generate(prompts[i:i + slots], max(lengths)), lengths, strict=True)]
    synchronize(device)
    return time.perf_counter() - began, texts


@torch.no_grad()
def text_loss(model: RecursiveTransformer, prompts: list, texts: list, known: dict) -> float:
    """Mean negative log-likelihood in nats, at full depth, of the tokens of `texts` after their prompts.

    known: sums of texts that were read before, which most variants have in common; added to.
    """
    total = 0.0
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        key = (i, *text)
        if key not in known:
            idx = torch.tensor([prompt + text], device=model.embed.weight.device)
            states = model(idx[:, :-1])[-1][:, len(prompt) - 1:]             # (1, n, C): they predict the text
            _, ce = score_exit(model, states, idx[:, len(prompt):], model.config.n_loop - 1)
            known[key] = ce.double().sum().item()
        total += known[key]
    return total / sum(map(len, texts))


def same_share(texts: list, others: list) -> float:
    """Share of the tokens of `texts` that equal those of `others`, position by position."""
    return (sum(a == b for one, two in zip(texts, others, strict=True) for a, b in zip(one, two, strict=True))
            / sum(map(len, texts)))


def distinct_share(texts: list) -> float:
    """Mean share of a text's tokens that are distinct: near 0, the texts repeat themselves and show nothing."""
    return sum(len(set(text)) / len(text) for text in texts) / len(texts)
