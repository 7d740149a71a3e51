"""What a model is trained on at each of its exits, without ever holding the logits of a batch (§2.4, §3.1).

With a vocabulary of 256,000 the logits of 8,192 tokens are 8 GB in fp32, and distillation naively needs ten times
that. `chunked_loss` goes through the tokens in chunks and takes each chunk's gradient by hand on the way, so that only
the gradients of the hidden states and of the head outlive a chunk.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.data import IGNORE
from model import upcast

Kind = Literal["fkl", "rkl", "jsd", "tvd"]


def exit_weights(n_loop: int, kind: Literal["weighted", "aggressive"], coef: float = 0.1) -> tuple[float, ...]:
    """The coefficient of each loop's loss, first to last (§2.4): "weighted" i / (1 + ... + n_loop), "aggressive"
    `coef` for every loop but the last, which has 1.

    >>> exit_weights(3, "aggressive"), exit_weights(2, "weighted")
    ((0.1, 0.1, 1.0), (0.3333333333333333, 0.6666666666666666))
    """
    if kind == "weighted":
        return tuple(2 * i / (n_loop * (n_loop + 1)) for i in range(1, n_loop + 1))
    if kind == "aggressive":
        return (coef,) * (n_loop - 1) + (1.0,)
    raise ValueError(f"unknown exit loss {kind!r}: use weighted or aggressive")


def distill_loss(student_logits: Tensor, teacher_logits: Tensor, kind: Kind = "fkl") -> Tensor:
    """How far the student's next-token distribution is from the teacher's: mean over tokens, in nats (§3.1, App. F).

    `kind`: "fkl" KL(teacher || student), "rkl" KL(student || teacher), "jsd" Jensen-Shannon, "tvd" total variation.
    Both logits (..., V); the teacher's should carry no gradient. `chunked_loss` is this and cross entropy, in chunks.
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

@torch.compiler.disable                                      # its loop is not for a graph; what it repeats may be
def chunked_loss(states: Sequence[Tensor], head: Tensor, targets: Tensor, weights: Sequence[float] = (1.0,),
                 teacher: tuple[Tensor, Tensor] | None = None, kind: Kind = "fkl", distill_weight: float = 1.0,
                 temperature: float = 1.0, self_distill: bool = False, compiled: bool = False,
                 chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """(sum over the exits of weight x (cross entropy + distill_weight x T^2 x divergence), cross entropy per exit).

    states: for each exit, the hidden states (..., C) after the final norm; head (V, C); targets (...) int64, IGNORE
    where there is none. teacher: (its hidden states after its final norm (..., C'), its head (V', C')): with it every
    exit is distilled from the same softmax, over the ids that both have; V' is another V if they are padded
    differently. self_distill: the exits before the last learn from the last one's detached logits instead. The means
    are over the targets, in nats; the cross entropies (n_exits,) carry no gradient.

    chunk: tokens at a time; by default a 16th of them, so that what is temporary stays below half a logits tensor, but
    256 at least, which keeps matrix products efficient. The result does not depend on it beyond rounding.
    """
    if len(states) != len(weights):
        raise ValueError(f"{len(states)} exits but {len(weights)} weights; give one for each")
    states, targets = [x.flatten(0, -2) for x in states], targets.flatten()
    teacher = (teacher[0].flatten(0, -2), teacher[1]) if teacher else (None, None)
    lengths = [len(x) for x in (*states, teacher[0]) if x is not None]
    assert set(lengths) == {len(targets)}, f"{len(targets)} targets for {lengths} hidden states"  # slices would hide it
    chunk = chunk or max(math.ceil(len(states[0]) / 16), 256)
    device = head.device.type                                # autocast does not reach into a backward by hand:
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states[0].dtype
    spec = (tuple(weights), kind, distill_weight, temperature, self_distill, compiled, chunk, dtype)
    with torch.autocast(device, enabled=False):
        return ChunkedLoss.apply(spec, torch.is_grad_enabled(), targets, *teacher, head, *states)


class ChunkedLoss(torch.autograd.Function):
    """`chunked_loss`. The gradients are found in forward, chunk by chunk; backward has only to scale them."""

    @staticmethod
    def forward(ctx, spec, learn, targets, teacher_states, teacher_head, head, *states):
        weights, kind, distill_weight, temperature, self_distill, compiled, chunk, dtype = spec
        step = torch.compile(token_losses) if compiled else token_losses
        w = head.to(dtype)                                                   # (V, C), rounded once
        teacher_w = None if teacher_head is None else teacher_head[:len(head)].to(dtype)
        count = (targets != IGNORE).sum().clamp(min=1).double()
        sums = torch.zeros(2, len(states), device=head.device, dtype=torch.float64)
        learns = [learn and needs for needs in ctx.needs_input_grad[5:]]      # head, states: a frozen one costs nothing
        d_head = torch.zeros_like(head, dtype=upcast(head).dtype) if learns[0] else None
        d_states = [torch.empty_like(x) if needs else None for x, needs in zip(states, learns[1:], strict=True)]
        for rows in (slice(i, i + chunk) for i in range(0, len(targets), chunk)):
            teacher = None                                                   # (n, V) log-probabilities
            if teacher_w is not None:
                teacher = log_probs(teacher_states[rows].to(dtype), teacher_w, temperature)
                if len(teacher_w) < len(head):               # e^-100: what it does not have it never predicts
                    teacher = F.pad(teacher, (0, len(head) - len(teacher_w)), value=-100.0)
            for e in reversed(range(len(states))):
                x = states[e][rows].to(dtype)                                # (n, C)
                ce, kd, grad = step(x, w, targets[rows], teacher, kind, distill_weight, temperature)
                counts = (targets[rows] != IGNORE)[:, None]                  # (n, 1)
                sums[:, e] += torch.stack([(ce * counts).sum(), (kd * counts).sum()])
                if any(learns):
                    scale = (counts / count * weights[e]).to(grad.dtype)
                    grad = grad.mul_(scale).to(dtype)                        # (n, V), by the logits
                    if d_states[e] is not None:
                        d_states[e][rows] = grad @ w
                    if d_head is not None:
                        add_product(d_head, grad.t(), x)
                del grad
                if self_distill and e == len(states) - 1:    # the earlier exits, which come next, learn from the last
                    teacher = log_probs(x, w, temperature)
        ctx.grads = (None if d_head is None else d_head.to(head.dtype), *d_states)
        ce, kd = (sums / count).to(upcast(head).dtype)
        ctx.mark_non_differentiable(ce)
        return ((ce + distill_weight * temperature**2 * kd) * ce.new_tensor(weights)).sum(), ce

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, by_loss, _):
        if ctx.grads is None:
            raise RuntimeError("chunked_loss keeps its gradients for one backward only")
        grads, ctx.grads = ctx.grads, None                                   # scaled in place: a copy of the head's
        return (None,) * 5 + tuple(None if g is None else g.mul_(by_loss.to(g.dtype)) for g in grads)  # is gigabytes


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in the precision of `total`, fp32 or better: bf16 would lose the small ones of many chunks."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)                                   # saves a tensor of total's size
    else:
        total.add_(a @ b)


def log_probs(x: Tensor, head: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(head x / T) (n, V) in fp32, of hidden states x (n, C)."""
    logits = upcast(F.linear(x, head))
    return F.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)


def token_losses(x: Tensor, head: Tensor, targets: Tensor, teacher: Tensor | None, kind: Kind, distill_weight: float,
                 temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy (n, 1), divergence (n, 1), and the derivative of cross entropy + distill_weight x T^2 x divergence
    by the logits (n, V), for hidden states x (n, C) and the teacher's log-probabilities (n, V) at temperature T."""
    column = targets.clamp(min=0)[:, None]
    s = log_probs(x, head)
    ce = -s.gather(1, column)
    kd, by_logits = torch.zeros_like(ce), None
    if teacher is not None:
        kd, by_logits = divergence(s if temperature == 1 else log_probs(x, head, temperature), teacher, kind)
    grad = s.exp_().scatter_add_(1, column, -torch.ones_like(ce))            # softmax - onehot
    if by_logits is not None:
        grad.add_(by_logits, alpha=distill_weight * temperature)             # T^2 from the loss, 1 / T from logits / T
    return ce, kd, grad


def divergence(s: Tensor, t: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """`distill_loss` of each token (n, 1), from log-probabilities of student and teacher (n, V), and its derivative by
    the student's logits (n, V)."""
    if kind == "fkl":
        q = t.exp()
        return (t - s).mul_(q).sum(-1, keepdim=True), s.exp().sub_(q)
    # The others by way of g, the derivative by the probabilities p (up to a constant): by logits it is p (g - sum p g).
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
