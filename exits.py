"""Exit losses and distillation."""

import torch
import torch.nn.functional as F
from torch import Tensor


def distill_loss(student_logits: Tensor, teacher_logits: Tensor, kind: str = "fkl") -> Tensor:
    """How far the student's next-token distribution is from the teacher's: mean over tokens, in nats (§3.1, App. F).

    `kind`: "fkl" KL(teacher || student), "rkl" KL(student || teacher), "jsd" Jensen-Shannon, "tvd" total variation.
    Both logits (..., V); the teacher's should carry no gradient.
    """
    s, t = F.log_softmax(student_logits, dim=-1), F.log_softmax(teacher_logits, dim=-1)
    if kind == "fkl":
        loss = t.exp() * (t - s)
    elif kind == "rkl":
        loss = s.exp() * (s - t)
    elif kind == "jsd":
        m = torch.logaddexp(s, t) - torch.log(torch.tensor(2.0, dtype=s.dtype, device=s.device))
        loss = 0.5 * (t.exp() * (t - m) + s.exp() * (s - m))
    elif kind == "tvd":
        loss = 0.5 * (s.exp() - t.exp()).abs()
    else:
        raise ValueError(f"unknown distillation {kind!r}: use fkl, rkl, jsd or tvd")
    return loss.sum(-1).mean()
