"""Text out of any checkpoint: one of ours, looped or at full size, or a Hugging Face folder.

    python sample.py --ckpt=out --prompt="The old house"
    python sample.py --ckpt=assets/donor --samples=3 --temperature=0.7 --top_p=0.9
    python sample.py --ckpt=out --rule=gate --show_exits     # tokens leave early, and are coloured by where they did
    python sample.py --ckpt=out --prompts=prompts.txt        # a text for each line, many at a time
"""

import io
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine import Engine
from exits import SCORED, Keys, Rule, RuleName, decode, likeliest, load_rule, read_thresholds
from hf import load_any
from lib.cli import UserError, parse_args, progress, script, use_colour
from lib.donors import find_donor
from lib.system import pick_device
from lib.tokenizer import TextStream, Tokenizer
from model import RecursiveTransformer


@dataclass
class SampleConfig:
    ckpt: str = "out"                  # checkpoint folder
    prompt: str = "The old man looked at her"  # text to go on from; empty starts a new text
    prompt_file: str | None = None     # read the prompt from this file instead
    prompts: str | None = None         # or many: each line of this file is one
    special: bool = True               # control tokens that a prompt spells (<|im_start|>) are these; False = text
    samples: int = 1                   # how many continuations of each prompt
    slots: int = 16                    # of several texts, how many are written at a time
    max_new_tokens: int = 200          # stop after so many tokens
    temperature: float = 0.8           # below 1 sharper, above 1 wilder; 0 always takes the likeliest token
    top_k: int = 50                    # choose among the k likeliest tokens; 0 = all
    top_p: float = 1.0                 # choose among the likeliest tokens that make up this probability; 1 = all
    rule: RuleName | None = None       # which tokens may leave early; not set = never, with --show_exits the gate
    threshold: float | None = None     # score from which a token leaves, 0 to 1; not set = as python exits.py found
    exit_loop: int = 1                 # rule fixed: the loop after which all tokens leave, counted from 1
    keys: Keys = "exact"               # keys of tokens that left: computed later, or copied from their exit loop
    show_exits: bool = False           # show after which loop each token left: by colour, in a pipe by number
    seed: int = 0                      # same seed, same text
    device: str = "auto"               # auto, cpu, cuda


def check_settings(args: SampleConfig) -> None:
    allowed = {"samples": (args.samples >= 1, "at least 1"), "slots": (args.slots >= 1, "at least 1"),
               "max_new_tokens": (args.max_new_tokens >= 1, "at least 1"),
               "temperature": (args.temperature >= 0, "0 or more"), "top_k": (args.top_k >= 0, "0 or more"),
               "top_p": (0 < args.top_p <= 1, "above 0 and at most 1")}
    for name, (fine, rule) in allowed.items():
        if not fine:
            raise UserError(f"--{name}={getattr(args, name)} must be {rule}")
    if sum((args.prompt != SampleConfig.prompt, args.prompt_file is not None, args.prompts is not None)) > 1:
        raise UserError("--prompt, --prompt_file and --prompts each say what to go on from; give one of them")
    if args.threshold is not None and args.rule not in SCORED and (args.rule or not args.show_exits):
        raise UserError(f"--threshold={args.threshold} needs a rule that compares scores with it: use --rule="
                        f"{', '.join(SCORED)}")
    if args.keys != SampleConfig.keys and args.rule in (None, "never") and not (args.rule is None and args.show_exits):
        raise UserError(f"--keys={args.keys} is about tokens that leave early, and none does: give a --rule as well")
    if args.temperature == 0 and (args.top_p < 1 or args.top_k not in (SampleConfig.top_k, 0)):
        raise UserError(f"--temperature=0 always takes the likeliest token, so --top_k={args.top_k} and --top_p="
                        f"{args.top_p} change nothing: drop them, or give a temperature above 0")
    if args.exit_loop != SampleConfig.exit_loop and args.rule != "fixed":
        raise UserError(f"--exit_loop={args.exit_loop} is for --rule=fixed; the other rules decide token by token")


def token_probs(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Logits (B, V) -> the probabilities (B, V) to draw from: temperature first, then top-k, then top-p."""
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    # Below the likeliest, and by no less than the dtype can tell from 0: a tiny temperature is the limit, not 0 / 0.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, torch.finfo(logits.dtype).tiny)
    if 0 < top_k < logits.size(-1):
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probs = logits.softmax(-1)
    if top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # by the probability of all likelier tokens
        beyond[:, 0] = False                   # of which the first has none, but the dtype may hold no such small top_p
        probs = probs.masked_fill(beyond.scatter(-1, order, beyond), 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def pick(probs: Tensor, draw: torch.Generator | None = None) -> Tensor:
    """One token (B,) of each row of probabilities (B, V), as torch.multinomial draws it, which waits for the host."""
    return (probs / torch.empty_like(probs).exponential_(generator=draw)).argmax(-1)


def chooser(args: SampleConfig) -> Callable[[Tensor], Tensor]:
    """For the engine: logits (n, V) -> tokens (n,), by a device's own numbers, since CUDA graphs know no others."""
    torch.manual_seed(args.seed)
    if args.temperature == 0:
        return likeliest
    return lambda logits: pick(token_probs(logits, args.temperature, args.top_k, args.top_p))


def generate(model: RecursiveTransformer, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int = 0,
             top_p: float = 1.0, seed: int = 0, rule: Rule | None = None, keys: Keys = "exact",
             eos_id: int | Sequence[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """The next tokens (B,) of prompts idx (B, T), and the loops (B,) they left after: see `decode`, exits.py."""
    draw = torch.Generator().manual_seed(seed)  # on the CPU: the same text on every device

    def choose(logits: Tensor) -> Tensor:
        return pick(token_probs(logits, temperature, top_k, top_p).cpu(), draw).to(logits.device)
    return decode(model, idx, max_new_tokens, rule, keys, choose, eos_id)


def find_rule(args: SampleConfig, folder, model: RecursiveTransformer) -> Rule:
    """The rule that was asked for; where only --show_exits was, the calibrated gate, or what there is to show."""
    name, threshold = args.rule or "never", args.threshold
    if args.rule is None and args.show_exits and model.config.n_loop > 1:
        name = "gate"
        if threshold is None and name not in read_thresholds(folder).get(args.keys, {}).get("thresholds", {}):
            name, threshold = "max_prob", 0.5
            print(f"{args.ckpt} is not calibrated for {args.keys} keys: tokens leave where the likeliest one has a "
                  f"probability of 0.5; for a gate that keeps its promise run python exits.py --ckpt={args.ckpt} "
                  f"--keys={args.keys}", file=sys.stderr)
    return load_rule(folder, model, name, threshold, args.exit_loop, args.keys)


def read_prompts(args: SampleConfig) -> list[str]:
    """The texts to go on from: lines of --prompts, all of --prompt_file, or --prompt."""
    name = "prompts" if args.prompts is not None else "prompt_file"
    path = getattr(args, name)
    if path is None:
        if not args.prompt.isascii() and args.prompt.encode(errors="ignore").decode() != args.prompt:
            raise UserError(f"--prompt={args.prompt!a} has bytes that are not UTF-8: give it in UTF-8, or in a file")
        return [args.prompt]
    try:
        text = Path(path).read_text(encoding="utf-8-sig")    # some editors begin a file with a byte order mark
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
    model = load_any(folder, None if device.type == "cuda" else torch.float32).to(device)  # CPUs are slow in bf16
    c = model.config
    tokenizer = Tokenizer.load(folder, c.vocab_size)
    rule, show = find_rule(args, folder, model), Exits(c.n_loop, use_colour(sys.stdout)) if args.show_exits else None
    n = len(texts) * args.samples
    many = args.prompts is not None or n > 1
    print(f"{args.ckpt}: {c.arch}, {c.n_layer} layers as {c.n_loop} x {c.n_unique}, rank {c.rank}, "
          f"{model.num_params()['stored'] / 1e6:.1f} M parameters, on {device.type}"
          + f"; {n} texts through {min(n, args.slots)} slots" * many + "\n", file=sys.stderr)
    if many:
        write_many(args, model, tokenizer, texts, rule, show)
    else:
        write_one(args, model, tokenizer, texts[0], rule, show)


def write_one(args: SampleConfig, model: RecursiveTransformer, tokenizer: Tokenizer, text: str, rule: Rule,
              show: "Exits | None") -> None:
    """One text, as it comes. A row alone needs no slots, and `decode` is the faster for it. UserError if the prompt
    leaves no room in the context."""
    ids, n_ctx = tokenizer.encode_prompt(text, args.special), model.config.n_ctx
    if len(ids) >= n_ctx:
        raise UserError(f"the prompt has {len(ids)} tokens, but the model's context is {n_ctx} and needs room for at "
                        f"least one more; shorten the prompt to at most {n_ctx - 1} tokens")
    steps = generate(model, torch.tensor([ids], device=model.embed.weight.device), args.max_new_tokens,
                     args.temperature, args.top_k, args.top_p, args.seed, rule, args.keys, tokenizer.eos_ids)
    print(text, end="", flush=True)
    end = write(((token.item(), loop.item()) for token, loop in steps), tokenizer, ids, show)
    print(f"\n({end or why_stopped(args, len(ids), n_ctx)})", flush=True)
    if show:
        print(show.legend())


def write_many(args: SampleConfig, model: RecursiveTransformer, tokenizer: Tokenizer, texts: list[str], rule: Rule,
               show: "Exits | None") -> None:
    """Many texts side by side, through the engine; printed in their order, each once it and those before it are
    finished, and on Ctrl-C all that have begun. A prompt that cannot be served is refused alone, and UserError in the
    end says how many were, or failed."""
    n_ctx, n = model.config.n_ctx, len(texts) * args.samples
    prompts, why = zip(*(found for text in texts for found in [encode(text, tokenizer, args.special)] * args.samples),
                       strict=True)
    engine = Engine(model, min(args.slots, n), min(n_ctx, max(1, *map(len, prompts)) + args.max_new_tokens), rule,
                    args.keys, choose=chooser(args))
    room = [max(1, min(args.max_new_tokens, n_ctx - len(ids))) for ids in prompts]
    requests = [engine.add(*each, tokenizer.eos_ids) for each in zip(prompts, room, strict=True)]
    for request, reason in zip(requests, why, strict=True):
        request.reason = reason or request.reason

    def lost(status: str) -> dict[int, str]:
        return {i // args.samples + 1: f"{status}: {r.reason}" for i, r in enumerate(requests) if r.status == status}
    for i, reason in lost("refused").items():
        print(f"prompt {i}: {reason}", file=sys.stderr)

    def page(i: int) -> str:
        request, out = requests[i], io.StringIO()
        titles = [f"prompt {i // args.samples + 1} of {len(texts)}"] * (args.prompts is not None)
        titles += [f"sample {i % args.samples + 1} of {args.samples}"] * (args.samples > 1)
        print(f"--- {', '.join(titles)}\n{texts[i // args.samples]}", end="", file=out)
        end = write(zip(request.tokens, request.loops, strict=False), tokenizer, request.prompt, show, out)
        ends = {"done": end or why_stopped(args, len(request.prompt), n_ctx), "running": "interrupted"}
        print(f"\n({ends.get(request.status, f'{request.status}: {request.reason}')})\n", file=out)
        return out.getvalue()

    shown, began = 0, time.perf_counter()
    steps = progress(engine.run(), total=sum(r.max_new_tokens for r in engine.queue), desc="sampling", unit="tok")
    try:
        for _ in steps:
            while shown < n and requests[shown].status not in ("waiting", "running"):
                steps.write(page(shown), end="")             # above the progress bar
                sys.stdout.flush()
                shown += 1
    finally:
        steps.close()
        print("".join(page(i) for i in range(shown, n) if requests[i].status != "waiting"), end="", flush=True)
        made, seconds = sum(len(request.tokens) for request in requests), time.perf_counter() - began
        print(f"{made:,} tokens in {seconds:.1f} s, {made / seconds:,.0f} tok/s", file=sys.stderr)
        if show:
            print(show.legend())
    for status, verb in (("refused", "were refused"), ("failed", "failed")):
        if lost(status):
            raise UserError(f"{len(lost(status))} of {len(texts)} prompts {verb}; the reason stands at each")


def encode(text: str, tokenizer: Tokenizer, special: bool) -> tuple[list[int], str]:
    """(the prompt's ids, ""); or where there can be none, which an engine refuses, (none, why)."""
    try:
        return tokenizer.encode_prompt(text, special), ""
    except UserError as e:
        return [], str(e)


class Exits:
    """Marks pieces of text by the loop that they left after: in colour, or where there is none by a small number."""

    COLOURS = (32, 33, 35, 36, 34, 31)                       # green, yellow, magenta, cyan, blue, red

    def __init__(self, n_loop: int, colour: bool):
        self.colour, self.count = colour, [0] * n_loop

    def number(self, loop: int) -> str:
        """Small, or where standard output has no such characters in brackets."""
        small = "".join(chr(0x2080 + int(digit)) for digit in str(loop))
        try:
            small.encode(sys.stdout.encoding or "utf-8")
        except UnicodeEncodeError:
            return f"[{loop}]"
        return small

    def mark(self, piece: str, loop: int) -> str:
        if not self.colour:
            return piece + self.number(loop + 1) * bool(piece)
        return f"\033[{self.COLOURS[loop % len(self.COLOURS)]}m{piece}\033[0m" * bool(piece)

    def legend(self) -> str:
        total = max(1, sum(self.count))
        shares = " · ".join(f"{self.mark(f'loop {i + 1}', i)} {n} ({n / total:.0%})" for i, n in enumerate(self.count))
        mean = sum((i + 1) * n for i, n in enumerate(self.count)) / total
        return f"left after {shares} · mean depth {mean:.2f} of {len(self.count)}"


def write(steps: Iterable[tuple[int, int]], tokenizer: Tokenizer, prompt: list[int], show: Exits | None = None,
          file=None) -> str:
    """Print one sample's text as it comes, from (token, loop) each, whole characters only; returns "end of text" if the
    model ended it."""
    out, end, loop = TextStream(tokenizer, prompt), "", 0
    for token, loop in steps:
        if show:
            show.count[loop] += 1
        if token in tokenizer.eos_ids:
            end = "end of text"
            break
        piece = out.push(token)
        print(show.mark(piece, loop) if show else piece, end="", file=file, flush=True)
    piece = out.flush()
    print(show.mark(piece, loop) if show else piece, end="", file=file)
    return end


def why_stopped(args: SampleConfig, prompt: int, n_ctx: int) -> str:
    full = prompt + args.max_new_tokens > n_ctx
    return f"the context of {n_ctx} tokens is full" if full else f"{args.max_new_tokens} new tokens"


if __name__ == "__main__":
    script(main)
