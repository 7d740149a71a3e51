"""Checks of train.py's settings, before anything is loaded."""

import math
from pathlib import Path

from lib.cli import UserError
from lib.tokenizer import Tokenizer

# Names, the values allowed, and the words for them.
RANGES = (
    ("tokens batch_tokens seq_len micro_batch lr temperature eval_every save_every log_every eval_tokens clip",
     lambda value: 0 < value < math.inf, "must be positive and finite"),
    ("rank skip_tokens min_lr_ratio warmup weight_decay distill_weight exit_coef",
     lambda value: 0 <= value < math.inf, "must not be negative, and must be finite"),
    ("beta1 beta2", lambda value: 0 <= value < 1, "must be at least 0 and less than 1"),
)


def check_train_settings(args, resumed: bool) -> None:
    """Raise UserError for settings of train.py that are out of range, contradict each other or would change nothing,
    or if --out is taken."""
    for names, allowed, words in RANGES:
        for name in names.split():
            if not allowed(getattr(args, name)):
                raise UserError(f"--{name}={getattr(args, name)} {words}")
    if args.tokens < args.batch_tokens:
        raise UserError(f"--tokens={args.tokens} is less than one step of {args.batch_tokens}; ask for more tokens")
    if args.teacher and args.distill == "none":
        raise UserError(f"--teacher={args.teacher} has no effect with --distill=none: drop one of the two")
    if args.exit_distill and (args.exit_loss == "last" or (args.exit_loss == "aggressive" and args.exit_coef == 0)):
        raise UserError("--exit_distill trains the earlier exits; say how much with --exit_loss=aggressive or weighted")
    if not resumed:                                          # runs of older versions may have such settings
        check_used(args)
        check_new(args.out)


def check_used(args) -> None:
    """Raise UserError for a setting that is not at its default and would change nothing."""
    start = "--ckpt" if args.ckpt else "--init=scratch"
    converts = not args.ckpt and args.init != "scratch"
    distils = args.distill != "none" and (args.teacher or args.ckpt or args.init != "scratch")
    teaches = distils or (args.exit_distill and args.exit_loss != "last")
    conversion = "says how a donor is converted, and {start} converts none: drop one of the two"
    nothing = "would change nothing here, it needs {needs}: drop --{name}"
    table = (  # whether they are used, names, the message otherwise, what they need
        (converts, "rank loops lora_init vectors kv norms rounding calib_tokens", conversion, ""),
        (not args.ckpt, "init", conversion, ""),
        (args.exit_loss == "aggressive", "exit_coef", nothing, "--exit_loss=aggressive"),
        (args.distill == "none" or teaches, "distill", nothing, "a --teacher"),
        (teaches, "distill_weight temperature", nothing, "distillation"))
    for used, names, message, needs in table:
        for name in names.split():
            value = getattr(args, name)
            if not used and value != getattr(type(args), name):
                raise UserError(f"--{name}={value} " + message.format(start=start, needs=needs, name=name))


def check_new(out: str) -> None:
    """Raise UserError if a new run would overwrite a run or a model in `out`."""
    if any((Path(out) / name / "train.pt").exists() for name in ("", "previous")):
        raise UserError(f"{out} holds a run already; go on with --resume, or give another --out")
    if (Path(out) / "model.safetensors").exists():           # perhaps a donor
        raise UserError(f"{out} holds a model already; give another --out, and --ckpt={out} to start from it")


def accumulation(args, world: int) -> int:
    """Micro-steps per optimizer step. UserError if batch_tokens is not a multiple of the tokens of one micro-step."""
    one = args.micro_batch * args.seq_len * world
    if args.batch_tokens % one:
        near = max(1, args.batch_tokens // one)
        raise UserError(
            f"batch_tokens={args.batch_tokens} is not a multiple of micro_batch x seq_len x processes = "
            f"{args.micro_batch} x {args.seq_len} x {world} = {one}; use --batch_tokens={near * one} or "
            f"--batch_tokens={(near + 1) * one}, or a smaller --micro_batch")
    return args.batch_tokens // one


def check_seq_len(seq_len: int, configs: dict) -> None:
    """Raise UserError if sequences are longer than one of the models, {name: Config}, was made for."""
    for name, config in configs.items():
        if seq_len > config.n_ctx:
            raise UserError(f"--seq_len={seq_len} is longer than the {config.n_ctx} tokens that {name} was made for; "
                            f"use --seq_len={config.n_ctx} or less")


def check_texts(args, texts: dict) -> None:
    """Raise UserError if one of the texts, {setting: tokens}, is shorter than a sequence."""
    for name, tokens in texts.items():
        if len(tokens) <= args.seq_len:
            raise UserError(f"--{name}={getattr(args, name)} has {len(tokens)} tokens, one sequence needs "
                            f"{args.seq_len + 1} (seq_len + 1); give more text or a smaller --seq_len")


def check_vocabulary(name: str, folder, vocab_size: int, donor: str, donor_vocab_size: int, tokenizer: Tokenizer,
                     may_pad: bool = False) -> None:
    """Raise UserError unless the model in `folder` has the donor's tokenizer and vocabulary size. may_pad: another
    size is fine, as its vocabulary may be padded differently."""
    if ((vocab_size != donor_vocab_size and not may_pad)
            or not Tokenizer.load(folder, vocab_size).understands(tokenizer)):
        raise UserError(f"{name} has a vocabulary of {vocab_size}, {donor} one of {donor_vocab_size}, or another "
                        "tokenizer: they must be the same"
                        + (" but for its padding" if may_pad else " (--donor names the donor of --ckpt)"))
