"""Who may leave early: by how sure the model is of its next token, or by a small network that never asks it.

The paper lets an oracle decide, which knows what the last loop will say (`oracle_exits`, exits.py). A `Rule` sees what
can be seen: the hidden state, or the logits made of it, which cost a product with the whole vocabulary. The gate and
the thresholds, which `python exits.py` finds, lie beside the model that they were made for.
"""

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model import RecursiveTransformer, upcast
from runtime import GATE_FILE, THRESHOLDS_FILE, UserError

RuleName = Literal["never", "fixed", "max_prob", "margin", "entropy", "gate"]
Keys = Literal["exact", "copy"]                              # of tokens that left, in the loops they skipped: exits.py
SCORED = ("max_prob", "margin", "entropy", "gate")           # the rules that have a threshold


def check_keys(keys: str) -> None:
    if keys not in get_args(Keys):
        raise UserError(f"keys={keys!r} is unknown; use one of {', '.join(get_args(Keys))}")


class Gate(nn.Module):
    """A probe on the hidden state at each exit but the last: how likely is it that the last loop would say the same?

    It never touches the vocabulary: a network C -> hidden -> 1 per exit, beside a head of V x C. All exits' weights
    are stacked, so that the rows of a batch may stand at different loops.
    """

    def __init__(self, n_exits: int, n_embd: int, hidden: int = 256, draw: torch.Generator | None = None):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(n_exits, hidden, n_embd, generator=draw) / n_embd**0.5)
        self.b1 = nn.Parameter(torch.zeros(n_exits, hidden))
        self.w2 = nn.Parameter(torch.zeros(n_exits, hidden))
        self.b2 = nn.Parameter(torch.zeros(n_exits))

    def forward(self, x: Tensor, loop: int | Tensor) -> Tensor:
        """Logit (...) of "the last loop would say the same" for states x (..., C) after `loop`, an int or int64 (...).
        """
        x = F.rms_norm(upcast(x), x.shape[-1:])                # deep states are large, and all exits alike to the probe
        if isinstance(loop, int):
            return F.gelu(F.linear(x, self.w1[loop], self.b1[loop])) @ self.w2[loop] + self.b2[loop]
        every = F.gelu(torch.einsum("...c,ehc->...eh", x, self.w1) + self.b1)
        every = (every * self.w2).sum(-1) + self.b2          # (..., n_exits): few, cheaper than gathering weights
        return every.gather(-1, loop.clamp(max=len(self.b2) - 1)[..., None])[..., 0]

    def save(self, folder) -> None:
        """Into the checkpoint in `folder`; thresholds there were those of the gate before, and go once this one is
        written."""
        def write(path: Path) -> None:
            save_file(self.state_dict(), path)
            (Path(folder) / THRESHOLDS_FILE).unlink(missing_ok=True)
        write_beside(folder, GATE_FILE, write)

    @classmethod
    def load(cls, folder, model: RecursiveTransformer) -> "Gate":
        """The gate of the checkpoint in `folder`. UserError if it has none or it is another model's."""
        path, c = Path(folder) / GATE_FILE, model.config
        if not path.exists():
            raise UserError(f"{folder} has no gate: train one with python exits.py --ckpt={folder}, "
                            "or use --rule=max_prob, margin or entropy")
        try:
            tensors = load_file(path)
            hidden = tensors["b1"].shape[1]
            gate = cls(c.n_loop - 1, c.n_embd, hidden)
            gate.load_state_dict(tensors)
            if not all(tensor.isfinite().all() for tensor in tensors.values()):
                raise RuntimeError("its weights are not finite")
        except (OSError, SafetensorError, KeyError, IndexError, RuntimeError) as e:
            raise UserError(f"{path} is not the gate of this model ({str(e).splitlines()[0]}); train it anew with "
                            f"python exits.py --ckpt={folder} --new_gate") from None
        return gate.to(model.embed.weight.device).eval()


@dataclass
class Rule:
    """Which tokens may leave: rule(x, loop, logits) -> bool (...), for states x (..., C) after `loop`.

    A batch at once: each answer depends on its own state alone, and nothing waits for the host. The score of a state
    is in [0, 1], the surer the higher; it may leave from `threshold` on. `loop` is an int, or int64 (...) where the
    rows stand at different loops; `logits` (..., V) are looked at only by the rules that say so in `reads_logits`.
    After the last loop everything leaves: rules are not asked.
    """
    name: RuleName = "never"
    threshold: float = math.inf
    exit_loop: int = 0                                       # fixed: the index of the loop
    gate: Gate | None = None

    def __post_init__(self):
        if self.name not in get_args(RuleName):
            raise UserError(f"the rule {self.name!r} is unknown; use one of {', '.join(get_args(RuleName))}")

    @property
    def reads_logits(self) -> bool:
        return self.name in ("max_prob", "margin", "entropy")

    def __call__(self, x: Tensor, loop: int | Tensor, logits: Tensor | None = None) -> Tensor:
        if self.name in ("never", "fixed"):
            at = torch.zeros(x.shape[:-1], dtype=torch.long, device=x.device) + loop
            return at >= (self.exit_loop if self.name == "fixed" else sys.maxsize)
        return self.score(x, loop, logits) >= self.threshold

    def score(self, x: Tensor, loop: int | Tensor, logits: Tensor | None = None) -> Tensor:
        if self.name == "gate":
            return self.gate(x, loop).sigmoid()
        total = logits.logsumexp(-1)
        if self.name == "max_prob":
            return (logits.amax(-1) - total).exp()
        if self.name == "margin":                            # between the two likeliest
            first, second = (logits.topk(2, dim=-1).values - total[..., None]).exp().unbind(-1)
            return first - second
        p = logits - total[..., None]                        # entropy, as a share of the most there could be
        return (1 + (p.exp() * p).sum(-1) / math.log(logits.size(-1))).clamp(min=0)  # rounding may fall below


def load_rule(folder, model: RecursiveTransformer, name: RuleName, threshold: float | None = None,
              exit_loop: int = 1, keys: Keys = "exact") -> Rule:
    """The rule `name` for the model in `folder`; its threshold, if not given, is the one calibrated for `keys`.

    exit_loop counts from 1, as people do. UserError for what cannot be: see the messages.
    """
    n_loop = model.config.n_loop
    if name == "never":
        return Rule()
    if n_loop < 2:
        raise UserError(f"--rule={name} lets tokens leave before the last loop, and the model in {folder} has 1 loop; "
                        "use --rule=never, or a model with 2 loops or more")
    if name == "fixed":
        if not 1 <= exit_loop <= n_loop:
            raise UserError(f"--exit_loop={exit_loop}, but the model has the loops 1 to {n_loop}")
        return Rule(name, exit_loop=exit_loop - 1)
    gate = Gate.load(folder, model) if name == "gate" else None
    if threshold is None:
        threshold = read_thresholds(folder).get(keys, {}).get("thresholds", {}).get(name)
        if threshold is None:
            raise UserError(f"{folder} has no calibrated threshold of {name} with {keys} keys: run python exits.py "
                            f"--ckpt={folder} --keys={keys} --agreement=0.98, or give --threshold (0 to 1)")
    if not (0 <= threshold <= 1 or threshold == math.inf):
        raise UserError(f"--threshold={threshold} is out of range: scores are between 0 and 1 (inf = never)")
    return Rule(name, threshold, gate=gate)


def read_thresholds(folder) -> dict:
    path = Path(folder) / THRESHOLDS_FILE
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
        if not all(0 <= t <= 1 for by_keys in found.values() for t in by_keys["thresholds"].values()):
            raise ValueError("a threshold is not between 0 and 1")
        return found
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise UserError(f"{path} is not readable as thresholds ({e}); remove it, and calibrate again with python "
                        f"exits.py --ckpt={folder}") from None


def write_beside(folder, name: str, write: Callable[[Path], object]) -> None:
    """A file added to a checkpoint, whole or not at all. UserError where the disk is full."""
    tmp = Path(folder) / f".{name}.tmp"
    try:
        write(tmp)
        os.replace(tmp, Path(folder) / name)
    except (OSError, SafetensorError) as e:
        tmp.unlink(missing_ok=True)
        raise UserError(f"cannot write {Path(folder) / name} ({e}); the checkpoint is as it was") from e
