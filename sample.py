"""Generates text with any checkpoint: one of ours, looped or full-size, or a Hugging Face folder.

    python sample.py --ckpt=out --prompt="The old house"
    python sample.py --ckpt=assets/donor --samples=3 --temperature=0.7 --top_p=0.9
    python sample.py --ckpt=out --rule=gate --show_exits     # early exits, each token coloured by its exit loop
    python sample.py --ckpt=out --prompts=prompts.txt        # a text for each line, many at a time
    python sample.py --ckpt=out_exits --speculative=2        # the first loop drafts, the others verify: the same text
"""

import io
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from engine import Engine, Request
from exits import NOT_FINITE, SCORED, Keys, Rule, RuleName, decode, end_ids, greedy, load_rule, read_thresholds
from hf import load_any
from lib.cli import UserError, parse_args, progress, script, use_colour
from lib.donors import find_donor
from lib.system import pick_device
from lib.tokenizer import TextStream, Tokenizer
from model import RecursiveTransformer
from speculative import check_draft, sample_token, speculate


@dataclass
class SampleConfig:
    ckpt: str = "out"                  # checkpoint folder
    prompt: str = "The old man looked at her"  # text to continue; empty starts a new text
    prompt_file: str | None = None     # read the prompt from this file instead
    prompts: str | None = None         # or many prompts: the lines of this file
    special: bool = True               # read control tokens in a prompt (<|im_start|>) as such; False = as text
    samples: int = 1                   # continuations of each prompt
    slots: int = 16                    # of several texts, how many are generated at a time
    max_new_tokens: int = 200          # stop after this many tokens
    temperature: float = 0.8           # divides the logits: below 1 sharper, above 1 flatter; 0 = greedy
    top_k: int = 50                    # sample from the k most probable tokens; 0 = all
    top_p: float = 1.0                 # sample from the most probable tokens with this total probability; 1 = all
    rule: RuleName | None = None       # which tokens exit early; not set = never, with --show_exits the gate
    threshold: float | None = None     # score from which a token exits, 0 to 1; not set = the calibrated one
    exit_loop: int = 1                 # rule fixed: the loop after which all tokens exit, counted from 1
    keys: Keys = "exact"               # KV of exited tokens: recomputed (exact), or copied from the exit loop
    show_exits: bool = False           # show the exit loop of each token: by colour, in a pipe by number
    speculative: int = 0               # tokens that the first loop's exit drafts for the others to verify; 0 = none
    seed: int = 0                      # same seed, same text
    device: str = "auto"               # auto, cpu, cuda
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto = float32 on CPUs, as stored on GPUs


def check_settings(args: SampleConfig) -> None:
    for name in ("samples", "slots", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)} must be at least 1")
    for name in ("temperature", "top_k", "speculative"):
        if not getattr(args, name) >= 0:
            raise UserError(f"--{name}={getattr(args, name)} must be 0 or more")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top_p={args.top_p} must be above 0 and at most 1")
    if sum((args.prompt != SampleConfig.prompt, args.prompt_file is not None, args.prompts is not None)) > 1:
        raise UserError("--prompt, --prompt_file and --prompts each give the prompt; use one of them")
    if args.threshold is not None and args.rule not in SCORED and (args.rule or not args.show_exits):
        raise UserError(f"--threshold={args.threshold} needs a rule that compares scores with it: use --rule="
                        f"{', '.join(SCORED)}")
    if args.keys != SampleConfig.keys and args.rule in (None, "never") and not (args.rule is None and args.show_exits):
        raise UserError(f"--keys={args.keys} is about tokens that exit early, and none does: give a --rule as well")
    if args.temperature == 0 and (args.top_p < 1 or args.top_k not in (SampleConfig.top_k, 0)):
        raise UserError(f"--temperature=0 is greedy, so --top_k={args.top_k} and --top_p={args.top_p} change nothing: "
                        "drop them, or give a temperature above 0")
    if args.exit_loop != SampleConfig.exit_loop and args.rule != "fixed":
        raise UserError(f"--exit_loop={args.exit_loop} is for --rule=fixed; the other rules decide token by token")
    if args.speculative and (args.rule not in (None, "never") or args.show_exits):
        raise UserError(f"--speculative={args.speculative} runs all loops for each token, so none exits early: drop "
                        "it, or drop --rule and --show_exits")


def token_probs(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Probabilities (B, V) to sample from, of logits (B, V): temperature first, then top-k, then top-p."""
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    # Relative to the maximum, and divided by no less than the dtype's tiny: the limit of low temperatures, not 0 / 0.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, torch.finfo(logits.dtype).tiny)
    if 0 < top_k < logits.size(-1):
        kth_logit = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth_logit, -torch.inf)
    probs = logits.softmax(-1)
    if top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True)
        dropped = ordered.cumsum(-1) - ordered >= top_p      # the more probable tokens suffice
        dropped[:, 0] = False                                # even if top_p rounds to 0
        probs = probs.masked_fill(dropped.scatter(-1, order, dropped), 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def make_sampler(args: SampleConfig) -> Callable[[Tensor], Tensor]:
    """The engine's sampler: logits (n, V) -> tokens (n,), with the device's own generator, as CUDA graphs need."""
    torch.manual_seed(args.seed)
    if args.temperature == 0:
        return greedy
    return lambda logits: sample_token(token_probs(logits, args.temperature, args.top_k, args.top_p))


def generate(model: RecursiveTransformer, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int = 0,
             top_p: float = 1.0, seed: int = 0, rule: Rule | None = None, keys: Keys = "exact",
             eos_id: int | Sequence[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the next tokens (B,) of prompts idx (B, T) and their exit loops (B,): see `decode`, exits.py."""
    draw = torch.Generator().manual_seed(seed)               # on the CPU: the same text on every device

    def sampler(logits: Tensor) -> Tensor:
        return sample_token(token_probs(logits, temperature, top_k, top_p).cpu(), draw).to(logits.device)
    return decode(model, idx, max_new_tokens, rule, keys, sampler, eos_id)


def generate_speculatively(args: SampleConfig, model: RecursiveTransformer, prompts: list[list[int]],
                           eos_id: Sequence[int], draw: torch.Generator) -> Iterator[list[list[int]]]:
    """Yield after each cycle each text's new tokens: see `speculate`, speculative.py."""
    def probs(logits: Tensor) -> Tensor:
        return token_probs(logits, args.temperature, args.top_k, args.top_p).cpu()   # where `draw` is
    return speculate(model, prompts, args.max_new_tokens, args.speculative, eos_id=eos_id, draw=draw,
                     probs=probs if args.temperature > 0 else None)


def find_rule(args: SampleConfig, folder, model: RecursiveTransformer) -> Rule:
    """The rule of --rule; with --show_exits alone the calibrated gate, or without one max_prob at 0.5."""
    name, threshold = args.rule or "never", args.threshold
    if args.rule is None and args.show_exits and model.config.n_loop > 1:
        name = "gate"
        if threshold is None and name not in read_thresholds(folder).get(args.keys, {}).get("thresholds", {}):
            name, threshold = "max_prob", 0.5
            print(f"{args.ckpt} is not calibrated for --keys={args.keys}: a token exits where the highest "
                  "probability is at least 0.5; for a calibrated gate run python -m evaluation.thresholds "
                  f"--ckpt={args.ckpt} --keys={args.keys}", file=sys.stderr)
    return load_rule(folder, model, name, threshold, args.exit_loop, args.keys)


def read_prompts(args: SampleConfig) -> list[str]:
    """The prompts: the lines of --prompts, the text of --prompt_file, or --prompt."""
    name = "prompts" if args.prompts is not None else "prompt_file"
    path = getattr(args, name)
    if path is None:
        if not args.prompt.isascii() and args.prompt.encode(errors="ignore").decode() != args.prompt:
            raise UserError(f"--prompt={args.prompt!a} has bytes that are not UTF-8: give it in UTF-8, or in a file")
        return [args.prompt]
    try:
        text = Path(path).read_text(encoding="utf-8-sig")    # some editors write a byte order mark
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read --{name}={path} ({e}); give a UTF-8 text file") from None
    if name == "prompt_file":
        return [text]
    if not text:
        raise UserError(f"--prompts={path} is empty; give a file with a prompt on each line")
    return text.removesuffix("\n").split("\n")


def main(argv=None):
    args = parse_args(SampleConfig, argv)
    check_settings(args)
    texts = read_prompts(args)
    if not Path(args.ckpt).is_dir() and args.ckpt == SampleConfig.ckpt:
        raise UserError("there is no checkpoint in out yet: run python train.py first, "
                        "or sample the shipped donor with --ckpt=assets/donor")
    folder = args.ckpt if Path(args.ckpt).is_dir() else find_donor(args.ckpt)
    device = pick_device(args.device)
    as_asked = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    model = load_any(folder, as_asked.get(args.dtype, None if device.type == "cuda" else torch.float32)).to(device)
    c = model.config
    tokenizer = Tokenizer.load(folder, c.vocab_size)
    if args.speculative:
        check_draft(c, args.speculative)
    rule = find_rule(args, folder, model)
    marker = ExitMarker(c.n_loop, use_colour(sys.stdout)) if args.show_exits else None
    n = len(texts) * args.samples
    many = args.prompts is not None or n > 1
    print(f"{args.ckpt}: {c.arch}, {c.n_layer} layers as {c.n_loop} x {c.n_unique}, rank {c.rank}, "
          f"{model.num_params()['stored'] / 1e6:.1f} M parameters, on {device.type} in "
          + str(model.embed.weight.dtype).removeprefix("torch.")
          + f"; {n} texts through {min(n, args.slots)} slots" * many + "\n", file=sys.stderr)
    if many:
        write_many(args, model, tokenizer, texts, rule, marker)
    else:
        write_one(args, model, tokenizer, texts[0], rule, marker)


def write_one(args: SampleConfig, model: RecursiveTransformer, tokenizer: Tokenizer, text: str, rule: Rule,
              marker: "ExitMarker | None") -> None:
    """Generate one text with `decode`, faster than the engine for one row, and print it token by token. UserError if
    the prompt leaves no room in the context."""
    ids, n_ctx = tokenizer.encode_prompt(text, args.special), model.config.n_ctx
    if len(ids) >= n_ctx:
        raise UserError(f"the prompt has {len(ids)} tokens, but the model's context is {n_ctx} and needs room for at "
                        f"least one more; shorten the prompt to at most {n_ctx - 1} tokens")
    if args.speculative:
        cycles = generate_speculatively(args, model, [ids], tokenizer.eos_ids, torch.Generator().manual_seed(args.seed))
        steps = ((token, model.config.n_loop - 1) for [new] in cycles for token in new)
    else:
        steps = generate(model, torch.tensor([ids], device=model.embed.weight.device), args.max_new_tokens,
                         args.temperature, args.top_k, args.top_p, args.seed, rule, args.keys, tokenizer.eos_ids)
        steps = ((token.item(), loop.item()) for token, loop in steps)
    print(text, end="", flush=True)
    ended = write(steps, tokenizer, ids, marker)
    print(f"\n({why_stopped(args, ended, len(ids), n_ctx)})", flush=True)
    if marker:
        print(marker.legend())


def write_many(args: SampleConfig, model: RecursiveTransformer, tokenizer: Tokenizer, texts: list[str], rule: Rule,
               marker: "ExitMarker | None") -> None:
    """Generate many texts at a time, with the engine or (--speculative) in batches. They are printed in the order of
    the prompts, each once it and all before it are finished; on Ctrl-C also those that have begun. A prompt that cannot
    be served is refused, and the others go on; UserError at the end if any was refused or failed."""
    n_ctx = model.config.n_ctx
    engine, requests = submit(args, model, tokenizer, texts, rule)

    def unserved(status: str) -> dict[int, str]:
        return {i // args.samples + 1: r.reason for i, r in enumerate(requests) if r.status == status}

    def page(i: int) -> str:
        request, out = requests[i], io.StringIO()
        titles = [f"prompt {i // args.samples + 1} of {len(texts)}"] * (args.prompts is not None)
        titles += [f"sample {i % args.samples + 1} of {args.samples}"] * (args.samples > 1)
        print(f"--- {', '.join(titles)}\n{texts[i // args.samples]}", end="", file=out)
        ended = write(zip(request.tokens, request.loops, strict=False), tokenizer, request.prompt, marker, out)
        ends = {"done": why_stopped(args, ended, len(request.prompt), n_ctx), "running": "interrupted"}
        print(f"\n({ends.get(request.status, f'{request.status}: {request.reason}')})\n", file=out)
        return out.getvalue()

    for i, reason in unserved("refused").items():
        print(f"prompt {i}: refused: {reason}", file=sys.stderr)
    n_shown, start, waiting = 0, time.perf_counter(), list(engine.waiting)
    run = run_batches(args, model, waiting) if args.speculative else engine.run()
    steps = progress(run, total=sum(request.max_new_tokens for request in waiting), desc="sampling", unit="tok")
    try:
        for _ in steps:
            while n_shown < len(requests) and requests[n_shown].status not in ("waiting", "running"):
                steps.write(page(n_shown), end="")           # above the progress bar
                sys.stdout.flush()
                n_shown += 1
    finally:
        steps.close()
        rest = range(n_shown, len(requests))
        print("".join(page(i) for i in rest if requests[i].status != "waiting"), end="", flush=True)
        n_generated, seconds = sum(len(request.tokens) for request in requests), time.perf_counter() - start
        print(f"{n_generated:,} tokens in {seconds:.1f} s, {n_generated / seconds:,.0f} tok/s", file=sys.stderr)
        if marker:
            print(marker.legend())
    for status, verb in (("refused", "were refused"), ("failed", "failed")):
        if lost := unserved(status):
            raise UserError(f"{len(lost)} of {len(texts)} prompts {verb}; the reason is printed with each")


def submit(args: SampleConfig, model: RecursiveTransformer, tokenizer: Tokenizer, texts: list[str],
           rule: Rule) -> tuple[Engine, list[Request]]:
    """An engine, and its requests for args.samples continuations of each text, one after the other."""
    prompts, errors = [], []
    for text in texts:
        try:
            ids, error = tokenizer.encode_prompt(text, args.special), ""
        except UserError as e:                               # an empty prompt, which the engine refuses
            ids, error = [], str(e)
        prompts += [ids] * args.samples
        errors += [error] * args.samples
    n_ctx, longest = model.config.n_ctx, max(1, *map(len, prompts))
    slots = 1 if args.speculative else min(args.slots, len(prompts))   # else the engine only checks the prompts
    engine = Engine(model, slots, min(n_ctx, longest + args.max_new_tokens), rule, args.keys,
                    sampler=make_sampler(args))
    requests = [engine.add(ids, max(1, min(args.max_new_tokens, n_ctx - len(ids))), tokenizer.eos_ids)
                for ids in prompts]
    for request, error in zip(requests, errors, strict=True):
        request.reason = error or request.reason
    return engine, requests


def run_batches(args: SampleConfig, model: RecursiveTransformer, requests: list[Request]) -> Iterator[None]:
    """What Engine.run does, by speculative decoding: yield at each new token of batches of --slots requests, one batch
    after the other."""
    draw, last = torch.Generator().manual_seed(args.seed), model.config.n_loop - 1
    for start in range(0, len(requests), args.slots):
        batch = requests[start:start + args.slots]
        for request in batch:
            request.status = "running"
        try:
            eos_ids = end_ids(batch[0].eos_id)
            for new in generate_speculatively(args, model, [request.prompt for request in batch], eos_ids, draw):
                for request, tokens in zip(batch, new, strict=True):
                    if -1 in tokens:
                        request.status, request.reason = "failed", NOT_FINITE
                    request.tokens += [token for token in tokens if token >= 0]
                    request.loops += [last] * len(tokens)
                    yield from [None] * len(tokens)
        except UserError as e:                               # all of them have failed
            for request in batch:
                request.status, request.reason = "failed", str(e)
        for request in batch:
            request.status = "done" if request.status == "running" else request.status


class ExitMarker:
    """Marks pieces of text by exit loop, with colours or with small numbers, and counts the exits."""

    COLOURS = (32, 33, 35, 36, 34, 31)                       # green, yellow, magenta, cyan, blue, red

    def __init__(self, n_loop: int, colour: bool):
        self.colour, self.count = colour, [0] * n_loop

    def number(self, loop: int) -> str:
        """A subscript, or a number in brackets if standard output cannot encode subscripts."""
        subscript = "".join(chr(0x2080 + int(digit)) for digit in str(loop))
        try:
            subscript.encode(sys.stdout.encoding or "utf-8")
        except UnicodeEncodeError:
            return f"[{loop}]"
        return subscript

    def mark(self, piece: str, loop: int) -> str:
        if not self.colour:
            return piece + self.number(loop + 1) * bool(piece)
        return f"\033[{self.COLOURS[loop % len(self.COLOURS)]}m{piece}\033[0m" * bool(piece)

    def legend(self) -> str:
        total = max(1, sum(self.count))
        shares = " · ".join(f"{self.mark(f'loop {i + 1}', i)} {n} ({n / total:.0%})" for i, n in enumerate(self.count))
        mean = sum((i + 1) * n for i, n in enumerate(self.count)) / total
        return f"exited after {shares} · mean depth {mean:.2f} of {len(self.count)}"


def write(steps: Iterable[tuple[int, int]], tokenizer: Tokenizer, prompt: list[int],
          marker: ExitMarker | None = None, file=None) -> bool:
    """Print the text of the steps (token, exit loop), whole characters only. True if the model ended the text."""
    stream, ended, loop = TextStream(tokenizer, prompt), False, 0

    def show(piece: str) -> None:
        print(marker.mark(piece, loop) if marker else piece, end="", file=file, flush=True)
    for token, loop in steps:
        if marker:
            marker.count[loop] += 1
        if token in tokenizer.eos_ids:
            ended = True
            break
        show(stream.push(token))
    show(stream.flush())
    return ended


def why_stopped(args: SampleConfig, ended: bool, n_prompt: int, n_ctx: int) -> str:
    if ended:
        return "end of text"
    full = n_prompt + args.max_new_tokens > n_ctx
    return f"the context of {n_ctx} tokens is full" if full else f"{args.max_new_tokens} new tokens"


if __name__ == "__main__":
    script(main)
