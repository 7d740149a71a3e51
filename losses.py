"""The losses at a model's exits: cross entropy (§2.4) and distillation (§3.1), never holding a batch's logits.

With a vocabulary of 256,000 the logits of 8,192 tokens are 8 GB in fp32, and distillation naively needs ten times
that. `chunked_loss` computes loss and gradient of one chunk of tokens after the other, so that only the gradients of
the hidden states and of the head stay in memory.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.data import IGNORE
from model import upcast

Kind = Literal["fkl", "rkl", "jsd", "tvd"]


def exit_weights(n_loop: int, kind: Literal["weighted", "aggressive"], coef: float = 0.1) -> tuple[float, ...]:
    """The coefficient of each loop's loss, first to last (§2.4): "weighted" is i / (1 + ... + n_loop), "aggressive" is
    `coef` for every loop but the last, and 1 for the last.

    >>> exit_weights(3, "aggressive"), exit_weights(2, "weighted")
    ((0.1, 0.1, 1.0), (0.3333333333333333, 0.6666666666666666))
    """
    if kind == "weighted":
        return tuple(2 * i / (n_loop * (n_loop + 1)) for i in range(1, n_loop + 1))
    if kind == "aggressive":
        return (coef,) * (n_loop - 1) + (1.0,)
    raise ValueError(f"unknown exit loss {kind!r}: use weighted or aggressive")


def distill_loss(student_logits: Tensor, teacher_logits: Tensor, kind: Kind = "fkl") -> Tensor:
    """The divergence between the student's and the teacher's next-token distributions, from logits (..., V): mean over
    tokens, in nats (§3.1, App. F). The teacher's logits should carry no gradient. A reference: training uses
    `divergence`, which gives the gradient as well.

    `kind`: "fkl" KL(teacher || student), "rkl" KL(student || teacher), "jsd" Jensen-Shannon, "tvd" total variation.
    """
    s, t = F.log_softmax(student_logits, dim=-1), F.log_softmax(teacher_logits, dim=-1)
    if kind == "fkl":
        loss = t.exp() * (t - s)
    elif kind == "rkl":
        loss = s.exp() * (s - t)
    elif kind == "jsd":
        m = torch.logaddexp(s, t) - math.log(2)
        loss = 0.5 * (t.exp() * (t - m) + s.exp() * (s - m))
    elif kind == "tvd":
        loss = 0.5 * (s.exp() - t.exp()).abs()
    else:
        raise ValueError(f"unknown distillation {kind!r}: use fkl, rkl, jsd or tvd")
    return loss.sum(-1).mean()


# ---------------------------------------------------------------------------------------------------------------------
# Cross entropy and distillation in chunks

class LossOptions(NamedTuple):
    """The options of `chunked_loss`, which are the same for every chunk."""
    weights: tuple[float, ...]
    kind: Kind
    distill_weight: float
    temperature: float
    self_distill: bool
    compiled: bool
    chunk: int
    dtype: torch.dtype                                       # of the matrix products


@torch.compiler.disable                                      # the loop over chunks stays out of graphs
def chunked_loss(states: Sequence[Tensor], head: Tensor, targets: Tensor, weights: Sequence[float] = (1.0,), *,
                 teacher: tuple[Tensor, Tensor] | None = None, kind: Kind = "fkl", distill_weight: float = 1.0,
                 temperature: float = 1.0, self_distill: bool = False, compiled: bool = False,
                 chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """(sum over the exits of weight x (cross entropy + distill_weight x T² x divergence), cross entropy per exit).

    Both are means over the targets, in nats; the cross entropies (n_exits,) carry no gradient.

    states: for each exit, the hidden states (..., C) after the final norm; head (V, C); targets (...) int64, with
    IGNORE where there is none; weights: one per exit.
    teacher: its hidden states after its final norm (..., C') and its head (V', C'). All exits are then distilled from
    its softmax over the ids that both models have (V' differs from V if the vocabularies are padded differently).
    self_distill: the exits before the last are distilled from the last one's detached logits instead.
    compiled: run each chunk through torch.compile.
    chunk: tokens per chunk. By default a 16th of them, which keeps temporary memory below half of a logits tensor, but
    at least 256, which keeps matrix products efficient. The result does not depend on it beyond rounding.
    """
    if len(states) != len(weights):
        raise ValueError(f"{len(states)} exits but {len(weights)} weights; give one for each")
    states, targets = [x.flatten(0, -2) for x in states], targets.flatten()
    teacher = teacher and (teacher[0].flatten(0, -2), teacher[1])
    lengths = [len(x) for x in (*states, *(teacher or ())[:1])]
    assert set(lengths) == {len(targets)}, f"{len(targets)} targets for {lengths} hidden states"
    chunk = chunk or max(math.ceil(len(targets) / 16), 256)
    device = head.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states[0].dtype
    options = LossOptions(tuple(weights), kind, distill_weight, temperature, self_distill, compiled, chunk, dtype)
    with torch.autocast(device, enabled=False):              # it would not reach gradients that are taken by hand
        return ChunkedLoss.apply(options, torch.is_grad_enabled(), targets, teacher, head, *states)


class ChunkedLoss(torch.autograd.Function):
    """`chunked_loss`. forward computes the gradients as well, chunk by chunk; backward only scales them."""

    @staticmethod
    def forward(ctx, options: LossOptions, grad_enabled: bool, targets, teacher, head, *states):
        o, n_exits = options, len(states)
        losses_of = torch.compile(token_losses) if o.compiled else token_losses
        w = head.to(o.dtype)                                                 # (V, C), rounded once
        teacher_w = teacher and teacher[1][:len(head)].to(o.dtype)
        count = (targets != IGNORE).sum().clamp(min=1).double()
        sums = torch.zeros(2, n_exits, device=head.device, dtype=torch.float64)      # cross entropy, divergence
        need_head, *need_states = [grad_enabled and needs for needs in ctx.needs_input_grad[4:]]
        d_head = torch.zeros_like(head, dtype=upcast(head).dtype) if need_head else None
        d_states = [torch.empty_like(x) if needs else None for x, needs in zip(states, need_states, strict=True)]
        for rows in (slice(i, i + o.chunk) for i in range(0, len(targets), o.chunk)):
            counted = (targets[rows] != IGNORE)[:, None]                     # (n, 1), n tokens of this chunk
            target_log_probs = None                                          # (n, V), of the teacher or the last exit
            if teacher:
                target_log_probs = teacher_log_probs(teacher[0][rows].to(o.dtype), teacher_w, o.temperature, len(head))
            for e in reversed(range(n_exits)):
                x = states[e][rows].to(o.dtype)                              # (n, C)
                ce, kd, grad = losses_of(x, w, targets[rows], target_log_probs, o.kind, o.distill_weight, o.temperature)
                sums[:, e] += torch.stack([(ce * counted).sum(), (kd * counted).sum()])
                if need_head or any(need_states):
                    scale = (counted / count * o.weights[e]).to(grad.dtype)
                    grad = grad.mul_(scale).to(o.dtype)                      # (n, V), with respect to the logits
                    if need_states[e]:
                        d_states[e][rows] = grad @ w
                    if need_head:
                        add_product(d_head, grad.t(), x)
                del grad
                if o.self_distill and e == n_exits - 1:
                    target_log_probs = log_probs(x, w, o.temperature)
        ctx.grads = (None if d_head is None else d_head.to(head.dtype), *d_states)
        ce, kd = (sums / count).to(upcast(head).dtype)
        ctx.mark_non_differentiable(ce)
        losses = ce + o.distill_weight * o.temperature**2 * kd               # (n_exits,)
        return (losses * ce.new_tensor(o.weights)).sum(), ce                 # §2.4: Σ_i α_i L_i

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss, _):
        if ctx.grads is None:
            raise RuntimeError("chunked_loss keeps its gradients for one backward only")
        grads, ctx.grads = ctx.grads, None
        scaled = (None if g is None else g.mul_(d_loss.to(g.dtype)) for g in grads)    # in place: the head's is large
        return (None, None, None, None, *scaled)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed in the dtype of `total` (fp32 or wider): in bf16, small terms of many chunks get lost."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)                                   # without a temporary tensor of this size
    else:
        total.add_(a @ b)


def log_probs(x: Tensor, head: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(head x / T) (n, V) in fp32, of hidden states x (n, C)."""
    logits = upcast(F.linear(x, head))
    return F.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)


def teacher_log_probs(x: Tensor, head: Tensor, temperature: float, vocab_size: int) -> Tensor:
    """`log_probs` (n, vocab_size) of a teacher; ids that its head lacks get a probability of e^-100."""
    t = log_probs(x, head, temperature)
    return F.pad(t, (0, vocab_size - len(head)), value=-100.0) if len(head) < vocab_size else t


def token_losses(x: Tensor, head: Tensor, targets: Tensor, teacher: Tensor | None, kind: Kind, distill_weight: float,
                 temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy (n, 1), divergence (n, 1), and the gradient (n, V) of cross entropy + distill_weight x T² x
    divergence with respect to the logits, for hidden states x (n, C) and the teacher's log-probabilities (n, V) at
    temperature T."""
    column = targets.clamp(min=0)[:, None]
    s = log_probs(x, head)
    ce = -s.gather(1, column)
    kd, d_logits = torch.zeros_like(ce), None
    if teacher is not None:
        kd, d_logits = divergence(s if temperature == 1 else log_probs(x, head, temperature), teacher, kind)
    grad = s.exp_().scatter_add_(1, column, -torch.ones_like(ce))            # softmax - onehot
    if d_logits is not None:
        grad.add_(d_logits, alpha=distill_weight * temperature)             # T² from the loss, 1 / T from logits / T
    return ce, kd, grad


def divergence(s: Tensor, t: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """`distill_loss` of each token (n, 1), from the log-probabilities (n, V) of student and teacher, and its gradient
    (n, V) with respect to the student's logits."""
    if kind == "fkl":
        q = t.exp()
        return (t - s).mul_(q).sum(-1, keepdim=True), s.exp().sub_(q)
    # g is the gradient with respect to the probabilities p, up to a constant; to the logits it is p (g - sum p g).
    p = s.exp()
    if kind == "rkl":
        g = s - t
        value = mean = (p * g).sum(-1, keepdim=True)
    elif kind == "jsd":
        m = torch.logaddexp(s, t).sub_(math.log(2))
        g = (s - m).mul_(0.5)
        mean = (p * g).sum(-1, keepdim=True)
        value = mean + 0.5 * (t - m).mul_(t.exp()).sum(-1, keepdim=True)
    elif kind == "tvd":
        gap = p - t.exp()
        g = gap.sign().mul_(0.5)
        mean = (p * g).sum(-1, keepdim=True)
        value = gap.mul_(g).sum(-1, keepdim=True)                            # half of |p - q| = (p - q) sign(p - q)
    else:
        raise ValueError(f"unknown distillation {kind!r}: use fkl, rkl, jsd or tvd")
    return value, g.sub_(mean).mul_(p)
