"""Text out of any checkpoint: one of ours, looped or at full size, or a Hugging Face folder.

    python sample.py --ckpt=out --prompt="The old house"
    python sample.py --ckpt=assets/donor --samples=3 --temperature=0.7 --top_p=0.9
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hf import find_donor, load_any
from model import KVCache, RecursiveTransformer
from runtime import UserError, parse_args, pick_device, progress, script
from tokenizer import TextStream, Tokenizer


@dataclass
class SampleConfig:
    ckpt: str = "out"                  # checkpoint folder
    prompt: str = "The old man looked at her"  # text to go on from; empty starts a new text
    prompt_file: str | None = None     # read the prompt from this file instead
    samples: int = 1                   # how many continuations, drawn side by side
    max_new_tokens: int = 200          # stop after so many tokens
    temperature: float = 0.8           # below 1 sharper, above 1 wilder; 0 always takes the likeliest token
    top_k: int = 50                    # choose among the k likeliest tokens; 0 = all
    top_p: float = 1.0                 # choose among the likeliest tokens that make up this probability; 1 = all
    seed: int = 0                      # same seed, same text
    device: str = "auto"               # auto, cpu, cuda


def check_settings(args: SampleConfig) -> None:
    allowed = {"samples": (args.samples >= 1, "at least 1"), "max_new_tokens": (args.max_new_tokens >= 1, "at least 1"),
               "temperature": (args.temperature >= 0, "0 or more"), "top_k": (args.top_k >= 0, "0 or more"),
               "top_p": (0 < args.top_p <= 1, "above 0 and at most 1")}
    for name, (fine, rule) in allowed.items():
        if not fine:
            raise UserError(f"--{name}={getattr(args, name)} must be {rule}")


def token_probs(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Logits (B, V) -> the probabilities (B, V) to draw from: temperature first, then top-k, then top-p."""
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits / temperature
    if 0 < top_k < logits.size(-1):
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probs = logits.softmax(-1)
    if top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # the probability of all likelier tokens: the first is always kept
        probs = probs.masked_fill((before >= top_p).scatter(-1, order, before >= top_p), 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


@torch.no_grad()
def generate(model: RecursiveTransformer, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int = 0,
             top_p: float = 1.0, seed: int = 0) -> Iterator[Tensor]:
    """The next tokens (B,) of prompts idx (B, T), one step after the other, until the context is full.

    Keys and values are cached per depth, so a step runs one token and never the prefix again.
    """
    B, T = idx.shape
    steps = min(max_new_tokens, model.config.n_ctx - T)
    weight = model.embed.weight
    cache = KVCache(model.config, B, T + steps, weight.device, weight.dtype)
    draw = torch.Generator().manual_seed(seed)  # on the CPU: the same text on every device
    for _ in range(steps):
        logits = model.logits(model(idx, cache)[-1][:, -1])              # (B, V)
        probs = token_probs(logits, temperature, top_k, top_p).cpu()
        token = torch.multinomial(probs, 1, generator=draw).to(idx.device)
        yield token[:, 0]
        idx = token


def read_prompt(args: SampleConfig, tokenizer: Tokenizer, n_ctx: int) -> tuple[str, list[int]]:
    """The prompt's text and ids. Raises UserError if it leaves no room in the context."""
    text = args.prompt
    if args.prompt_file:
        try:
            text = Path(args.prompt_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"cannot read --prompt_file={args.prompt_file} ({e}); give a UTF-8 text file") from None
    ids = tokenizer.encode_prompt(text)
    if len(ids) >= n_ctx:
        raise UserError(f"the prompt has {len(ids)} tokens, but the model's context is {n_ctx} and needs room for at "
                        f"least one more; shorten the prompt to at most {n_ctx - 1} tokens")
    return text, ids


def main(argv=None):
    args = parse_args(SampleConfig, argv)
    check_settings(args)
    if not Path(args.ckpt).is_dir() and args.ckpt == SampleConfig.ckpt:
        raise UserError("there is no checkpoint in out yet: run python train.py first, "
                        "or sample the shipped donor with --ckpt=assets/donor")
    folder = args.ckpt if Path(args.ckpt).is_dir() else find_donor(args.ckpt)
    device = pick_device(args.device)
    model = load_any(folder, None if device.type == "cuda" else torch.float32).to(device)  # CPUs are slow in bf16
    c, n = model.config, model.num_params()
    tokenizer = Tokenizer.load(folder, c.vocab_size)
    text, ids = read_prompt(args, tokenizer, c.n_ctx)
    print(f"{args.ckpt}: {c.arch}, {c.n_layer} layers as {c.n_loop} x {c.n_unique}, rank {c.rank}, "
          f"{n['stored'] / 1e6:.1f} M parameters, on {device.type}\n", file=sys.stderr)

    steps = generate(model, torch.tensor([ids] * args.samples, device=device), args.max_new_tokens,
                     args.temperature, args.top_k, args.top_p, args.seed)
    if args.samples == 1:
        print(text, end="", flush=True)
        end = stream(steps, tokenizer, ids)
        print(f"\n({end or why_stopped(args, len(ids), c.n_ctx)})", flush=True)
        return
    rows = [[] for _ in range(args.samples)]
    for tokens in progress(steps, total=args.max_new_tokens, desc="sampling", unit="tok"):
        for row, token in zip(rows, tokens.tolist(), strict=True):
            row.append(token)
        if all(tokenizer.eos_id in row for row in rows):
            break
    for i, row in enumerate(rows):
        kept = row[:row.index(tokenizer.eos_id)] if tokenizer.eos_id in row else row
        end = "end of text" if len(kept) < len(row) else why_stopped(args, len(ids), c.n_ctx)
        new = continuation(kept, tokenizer, ids)
        print(f"--- sample {i + 1} of {args.samples}\n{text}{new}\n({end})\n", flush=True)


def stream(steps: Iterator[Tensor], tokenizer: Tokenizer, prompt: list[int]) -> str:
    """Print one sample's text as it comes, whole characters only; returns "end of text" if the model ended it."""
    out = TextStream(tokenizer, prompt)
    for token in steps:
        if token.item() == tokenizer.eos_id:
            print(out.flush(), end="")
            return "end of text"
        print(out.push(token.item()), end="", flush=True)
    print(out.flush(), end="")
    return ""


def continuation(ids: list[int], tokenizer: Tokenizer, prompt: list[int]) -> str:
    out = TextStream(tokenizer, prompt)
    return "".join([out.push(i) for i in ids]) + out.flush()


def why_stopped(args: SampleConfig, prompt: int, n_ctx: int) -> str:
    full = prompt + args.max_new_tokens > n_ctx
    return f"the context of {n_ctx} tokens is full" if full else f"{args.max_new_tokens} new tokens"


if __name__ == "__main__":
    script(main)
