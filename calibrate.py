"""Calibrated conversion: fit the recursive model to the activations and gradients of its donor. Ours, not the paper's.

The paper converts from weights alone, so every direction of a layer's input counts the same, and so does every output.
Here the donor is first run on some text, forward and backward, and each linear layer is fitted to its inputs x and to
the gradients g = d loss / d(Wx) of its outputs. For the depths l that share one stored layer:

    W_l        the donor's weight; W' the shared one; A_l, B_l the LoRA of that loop
    C_l        E[x xᵀ] E[|g|²] plus a ridge: second moments of the input, times how much they matter to the loss
    D          diagonal: the mean of g² per output over these depths, as shares

To second order, and treating x and g as independent (K-FAC, Martens and Grosse 2015, with only the diagonal of
E[g gᵀ]: all of it was no better), the loss rises by half of

    E = Σ_l tr D (W_l - W' - B_l A_l) C_l (W_l - W' - B_l A_l)ᵀ                                                   (C1)

Three closed forms minimise it in turn, each exactly (but (C3) is exact only the first time; later it takes two steps
of subspace iteration):

    weighted tying   W' = (Σ W_l C_l) (Σ C_l)⁻¹                                       without LoRA                 (C2)
    weighted SVD     B_l A_l = D^(-1/2) [D^(1/2) (W_l - W') C_l^(1/2)]_R C_l^(-1/2)   []_R: the SVD cut at rank R  (C3)
    tying again      W' = (Σ W_l P_l) (Σ P_l)⁻¹,  P_l = C_l - C_l A_lᵀ (A_l C_l A_lᵀ)⁻¹ A_l C_l                   (C4)
                     and with it B_l = (W_l - W') C_l A_lᵀ (A_l C_l A_lᵀ)⁻¹

(C4) is the best W' and B together, given A: P_l is the part of the input that the LoRA of loop l does not read, so W'
is fitted only where the LoRAs cannot help. (C3) and (C4) alternate until they gain little. With all C_l = D = I, (C2)
is Average and (C3) is the SVD of Eq. 4. The code keeps A C Aᵀ = I, so that B = (W_l - W') C_l A_lᵀ in (C3) too.

Norm scales are first absorbed into the linear layers that follow; tying them alone would cost more than everything
else. A bias is one more column of W, for an input that is always 1 and that no LoRA reads. At the end the weights are
scaled for training, which does not change the function: the shared norms get the root mean square of the donors'
scales, A and B half of the singular values each. AdamW's steps are equally large for all weights, so otherwise training
would undo the fit.
"""

from copy import deepcopy
from dataclasses import dataclass, field, replace
from statistics import mean as average

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf import refuse_looped
from lib.checks import cast
from lib.cli import UserError, print0, progress, table
from lib.data import Tokens, batch, count_windows
from losses import IGNORE, chunked_loss
from model import Config, Layer, LayerNorm, RecursiveTransformer, RelaxedLinear, RMSNorm, rope_angles, upcast

# The linear layers that share an input, under the one whose input is recorded
SHARED_INPUT = {"attn.q": ("attn.q", "attn.k", "attn.v"), "attn.o": ("attn.o",), "mlp.up": ("mlp.gate", "mlp.up"),
                "mlp.down": ("mlp.down",)}
WIDEST, SKETCH = 8192, 2048  # for inputs wider than WIDEST, a sketch of SKETCH rows replaces the (width, width) moments


@dataclass
class ActivationStats:
    """What `collect_stats` measures of every linear layer of a donor: means over the calibration tokens.

    inputs: "layers.3.attn.q" -> E[x xᵀ] (in, in) and E[x] (in,) of the input. If it is wider than WIDEST, instead of
    E[x xᵀ] a sketch S (SKETCH, in + 1) of the input with a 1 appended: Sᵀ S is about E[x xᵀ], with E[x] beside it.
    gradients: "layers.3.attn.k" -> E[g²] (out,) of the output.
    """
    inputs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)


Norm = RMSNorm | LayerNorm


def is_gemma(norm: Norm) -> bool:
    return isinstance(norm, RMSNorm) and norm.gemma


def norm_scale(norm: Norm) -> Tensor:
    """The scale that a norm multiplies by, in fp32 or wider."""
    return upcast(norm.weight.detach()) + (1.0 if is_gemma(norm) else 0.0)


def set_norm_scale(norm: Norm, scale: Tensor | float) -> None:
    """Make a norm multiply by `scale`, with a bias of zero."""
    norm.weight[:] = scale - (1.0 if is_gemma(norm) else 0.0)
    if norm.bias is not None:
        norm.bias.zero_()


def linears(layer: Layer, names: tuple[str, ...]) -> list[tuple[str, RelaxedLinear]]:
    """[(name, linear layer)] for these names, without the gate where the family has none (GPT-NeoX)."""
    return [(name, layer.get_submodule(name)) for name in names if name != "mlp.gate" or layer.mlp.gate is not None]


def widened(module: nn.Module) -> nn.Module:
    """A copy in fp32 or wider."""
    module = deepcopy(module)
    for p in module.parameters():
        p.data = upcast(p.data)
    return module


@torch.no_grad()
def absorb_norms(layer: Layer) -> Layer:
    """A copy that computes the same, in fp32 or wider, with norm scales of one and norm biases of zero: the linear
    layers that follow absorb them (so GPT-NeoX's attention always gets biases)."""
    layer = widened(layer)
    for norm, first in ((layer.norm1, "attn.q"), (layer.norm2, "mlp.up")):
        scale = norm_scale(norm)
        for _, linear in linears(layer, SHARED_INPUT[first]):
            if norm.bias is not None:
                bias = linear.weight @ norm.bias
                linear.bias = nn.Parameter(bias if linear.bias is None else linear.bias + bias)
            linear.weight *= scale
        set_norm_scale(norm, 1.0)
    if layer.attn.o.bias is None and layer.norm1.bias is not None:       # beside q's, k's and v's, o has one too
        layer.attn.o.bias = nn.Parameter(torch.zeros_like(layer.norm1.bias))
    return layer


# ---------------------------------------------------------------------------------------------------------------------
# The donor's inputs and gradients

@torch.no_grad()
def collect_stats(full: RecursiveTransformer, windows: list[Tensor]) -> ActivationStats:
    """The stats of a full-size model's linear layers as it predicts the next tokens in `windows` of token ids (B, T).

    One layer at a time runs forward and then backward, so memory holds the model, the states (tokens, C) before each
    layer, and the graph of one layer. UserError if an input or a gradient is not finite, or if the model is recursive.
    """
    refuse_looped(full.config, "calibrate its donor")
    windows = [idx.to(full.embed.weight.device) for idx in windows]
    ropes = [rope_angles(torch.arange(idx.size(1), device=idx.device), full.config) for idx in windows]
    states = [[upcast(full.first_state(idx)).flatten(0, 1) for idx in windows]]      # before each layer, per window
    for i, layer in enumerate(progress(full.layers, desc="calibration, forward", unit="layer")):
        layer = absorb_norms(layer)
        states.append([layer(x, rope, 0, i, None) for x, rope in zip(states[-1], ropes, strict=True)])
    norm, head = widened(full.norm), upcast(full.head_weight.detach())
    grads = [loss_gradient(norm, head, x, idx) for x, idx in zip(states.pop(), windows, strict=True)]

    stats, count = ActivationStats(), sum(idx.numel() for idx in windows)
    for i in progress(range(len(full.layers))[::-1], desc="calibration, backward", unit="layer"):
        layer = absorb_norms(full.layers[i])
        add_hooks(layer, f"layers.{i}.", stats, count)
        for j, x in enumerate(states.pop()):
            with torch.enable_grad():
                y = layer(x.requires_grad_(), ropes[j], 0, i, None)
            grads[j], = torch.autograd.grad(y, x, grads[j])
        for name in (f"layers.{i}.{first}" for first in SHARED_INPUT):
            second, mean = stats.inputs[name]
            stats.inputs[name] = second.to(x.dtype), mean
    check_finite(stats, len(full.layers))
    return stats


def check_finite(stats: ActivationStats, n_layer: int) -> None:
    """Raise UserError if inputs (it names the first such layer) or gradients are not finite."""
    for name in (f"layers.{i}.{first}" for i in range(n_layer) for first in SHARED_INPUT):
        if not all(part.isfinite().all() for part in stats.inputs[name]):
            raise UserError(f"the input of {name} of the donor is not finite on the calibration text: its weights are "
                            "damaged, or they overflow in this dtype")
    if not all(squares.isfinite().all() for squares in stats.gradients.values()):
        raise UserError("the donor's loss on the calibration text has gradients that are not finite: its final norm or "
                        "head is damaged, or they overflow in this dtype")


def loss_gradient(norm: Norm, head: Tensor, x: Tensor, idx: Tensor) -> Tensor:
    """The gradient of the next tokens' summed cross entropy with respect to the last layer's output x (B T, C)."""
    targets = F.pad(idx[:, 1:], (0, 1), value=IGNORE).flatten()
    with torch.enable_grad():
        loss = chunked_loss([norm(x.requires_grad_())], head, targets)[0] * (targets != IGNORE).sum()
    return torch.autograd.grad(loss, x)[0]


def add_hooks(layer: Layer, prefix: str, stats: ActivationStats, count: int) -> None:
    """Let every pass through the layer add to `stats`, as means over `count` tokens."""
    draw = torch.Generator().manual_seed(0)

    def record_input(name):
        def hook(_, inputs):
            add_input(stats, name, inputs[0].detach().flatten(0, -2), count, draw)
        return hook

    def record_gradient(name):
        def hook(_, inputs, outputs):
            g = outputs[0].flatten(0, -2)                                # (tokens, out)
            stats.gradients[name] = stats.gradients.get(name, 0.0) + g.square().sum(0, dtype=torch.float64) / count
        return hook

    for first, names in SHARED_INPUT.items():
        layer.get_submodule(first).register_forward_pre_hook(record_input(prefix + first))
        for name, linear in linears(layer, names):
            linear.register_full_backward_hook(record_gradient(prefix + name))


def add_input(stats: ActivationStats, name: str, x: Tensor, count: int, draw: torch.Generator) -> None:
    """Add inputs x (tokens, in) of the linear layer `name` to `stats`: in fp64, or to a sketch S, where each token goes
    to a random row with a random sign, so that E[x xᵀ] is the expectation of Sᵀ S."""
    width = x.size(1)
    if name not in stats.inputs:
        stats.inputs[name] = (x.new_zeros(SKETCH, width + 1) if width > WIDEST else
                              x.new_zeros(width, width, dtype=torch.float64), x.new_zeros(width, dtype=torch.float64))
    second, mean = stats.inputs[name]
    if width > WIDEST:
        row = torch.randint(SKETCH, (len(x),), generator=draw).to(x.device)
        sign = (torch.randint(2, (len(x), 1), generator=draw) * 2 - 1).to(x.device)
        second.index_add_(0, row, F.pad(x, (0, 1), value=1.0) * sign / count**0.5)
    else:
        second += (x.T @ x).double() / count
    mean += x.sum(0, dtype=torch.float64) / count


# ---------------------------------------------------------------------------------------------------------------------
# The fit of one linear layer

def lora_input_basis(W: Tensor, chol_C: Tensor, rank: int, before: Tensor | None = None) -> Tensor:
    """(C3): the A (R, in), with A C Aᵀ = I, of the LoRA that is nearest to the residual W (out, in).

    chol_C: L with C = L Lᵀ. before: an earlier A, improved by two steps of subspace iteration (which never make it
    worse) instead of computing all singular vectors.
    """
    if before is not None:
        v = chol_C.T @ before.T                                          # (in, R), for whitened inputs
        for _ in range(2):
            v = torch.linalg.qr(chol_C.T @ (W.T @ (W @ (chol_C @ v))))[0]
        return torch.linalg.solve_triangular(chol_C.T, v, upper=True).T
    white = W @ chol_C                                                   # W for whitened inputs
    if W.size(0) <= W.size(1):                                           # decompose the smaller side
        u = torch.linalg.eigh(white @ white.T)[1][:, -rank:].flip(1)     # largest first
        v = torch.linalg.qr(white.T @ u)[0]
    else:
        v = torch.linalg.eigh(white.T @ white)[1][:, -rank:].flip(1)
    return torch.linalg.solve_triangular(chol_C.T, v, upper=True).T


class LayerFit:
    """The steps (C2) to (C4) for one linear layer, in fp64, with D^(1/2) already multiplied into the weights.

    W, C: W_l (out, in) and C_l (in, in) of each loop. biased: the last column of W is a bias, which no LoRA reads.
    """

    def __init__(self, W: list[Tensor], C: list[Tensor], rank: int, biased: bool):
        self.W, self.C, self.biased = W, C, biased
        self.n_read = W[0].size(1) - biased                              # inputs of a LoRA
        self.rank = min(rank, W[0].size(0), self.n_read)
        self.chol_C = [torch.linalg.cholesky(C_l[:self.n_read, :self.n_read]) for C_l in C] if self.rank else []
        self.sum_WC, self.energy = 0.0, 1e-300
        for W_l, C_l in zip(W, C, strict=True):
            WC = W_l @ C_l
            self.sum_WC, self.energy = self.sum_WC + WC, self.energy + (WC * W_l).sum()
        self.chol_sum_C = torch.linalg.cholesky(sum(C))
        self.tied = torch.cholesky_solve(self.sum_WC.T, self.chol_sum_C).T         # (C2)
        self.A: list[Tensor | None] = [None] * len(W)
        self.CA = [C_l[:, :0] for C_l in C]                              # C_l A_lᵀ (in, R)
        self.WCA = [W_l[:, :0] for W_l in W]                             # W_l C_l A_lᵀ (out, R)

    def fit_lora(self, shared: Tensor, loop: int) -> None:
        """(C3): this loop's A for the residual W_l - W'."""
        residual, C = self.W[loop] - shared, self.C[loop]
        if self.biased:                                                  # its best fit without the bias column
            residual = torch.cholesky_solve(C[:self.n_read] @ residual.T, self.chol_C[loop]).T
        before = self.A[loop] if 4 * self.rank < min(residual.shape) else None
        self.A[loop] = lora_input_basis(residual, self.chol_C[loop], self.rank, before)
        self.CA[loop] = C[:, :self.n_read] @ self.A[loop].T
        self.WCA[loop] = self.W[loop] @ self.CA[loop]

    def tie_again(self) -> tuple[Tensor, Tensor]:
        """(C4): W', and `change` (out, loops R), with which W' = tied + change ((Σ C_l)⁻¹ CA)ᵀ.

        P_l = C_l - CA_l CA_lᵀ is a low-rank update of C_l, so Woodbury's identity gives W' from (C2)'s.
        """
        CA, WCA = torch.cat(self.CA, dim=1), torch.cat(self.WCA, dim=1)
        solved = torch.cholesky_solve(CA, self.chol_sum_C)               # (Σ C_l)⁻¹ CA
        eigenvalues, v = torch.linalg.eigh(torch.eye(CA.size(1)).to(CA) - CA.T @ solved)
        kept = eigenvalues > 1e-10                                       # what every LoRA reads stays as in (C2)
        change = (self.tied @ CA - WCA) @ v[:, kept] / eigenvalues[kept] @ v[:, kept].T
        return self.tied + change @ solved.T, change

    def error(self, shared: Tensor, change: Tensor | float) -> float:
        """(C1) with the best B, as a share of Σ tr W_l C_l W_lᵀ, by way of W' Σ C_l = sum_WC + change CAᵀ."""
        shared_CA = shared @ torch.cat(self.CA, dim=1)
        residual = (self.energy - (shared * self.sum_WC).sum() + (shared_CA * change).sum()
                    - (torch.cat(self.WCA, dim=1) - shared_CA).square().sum())
        return (residual / self.energy).item()

    def lora(self, shared: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(A_l, B_l) of each loop, B_l = (W_l - W') C_l A_lᵀ."""
        return [(A, (W - shared) @ CA) for A, W, CA in zip(self.A, self.W, self.CA, strict=True) if self.rank]


def fit(W: list[Tensor], C: list[Tensor], rank: int, rounds: int = 0, stop: float = 0.0,
        biased: bool = False) -> tuple[Tensor, list[tuple[Tensor, Tensor]], list[float]]:
    """W' (out, in), (A, B) of each loop, and the error (C1) at the start and after each round of (C3) and (C4), as a
    share of the outputs' energy. A round that lowers the error by less than the share `stop` is the last."""
    if len(W) == 1:                                                      # nothing is shared: the donor's, B zero
        W, n_read = W[0], W[0].size(1) - biased
        out = W.size(0)
        rank = min(rank, out, n_read)
        return W, [(W.new_zeros(rank, n_read), W.new_zeros(out, rank))] * (rank > 0), [0.0]
    layer = LayerFit(W, C, rank, biased)
    loops = range(len(C)) if layer.rank else ()
    shared = layer.tied
    for loop in loops:
        layer.fit_lora(shared, loop)
    errors = [layer.error(shared, 0.0)]
    for n in range(rounds if loops else 0):
        if n > 0:                                                        # the first round starts from the fit above
            for loop in loops:
                layer.fit_lora(shared, loop)
        shared, change = layer.tie_again()
        errors.append(layer.error(shared, change))
        if not errors[-2] - errors[-1] > stop * errors[-2]:
            break
    return shared, layer.lora(shared), errors


def balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(A, B) with the same B A, and half of the singular values S in each. With all of S in B, as in Eq. 4, a step of
    AdamW on A would change the layer much more than one on W'. Where S is zero: A Gaussian, B zero (App. C)."""
    (qb, rb), (qa, ra) = torch.linalg.qr(b), torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(rb @ ra.T)
    a, b, dead = s.sqrt()[:, None] * (vh @ qa.T), qb @ (u * s.sqrt()), s <= 1e-6 * s.max().clamp_min(1e-30)
    a[dead] = torch.randn(int(dead.sum()), a.size(1)).to(a) / a.size(1) ** 0.5
    return a, b.masked_fill(dead, 0.0)


def in_sketched_span(sketches: list[Tensor]) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """An orthonormal basis (in, rows of all sketches) of their span, and E[x xᵀ], E[x], E[1] of each in this basis."""
    basis, r = torch.linalg.qr(torch.cat([S[:, :-1] for S in sketches]).T)
    stats = [(part @ part.T, part @ S[:, -1].double(), S[:, -1:].double().square().sum(0))
             for part, S in zip(r.double().split(len(sketches[0]), dim=1), sketches, strict=True)]
    return basis, stats


def fit_linear(linear: RelaxedLinear, donors: list[RelaxedLinear], inputs: list[tuple[Tensor, Tensor]],
               gradients: list[Tensor], scale: Tensor | float, rounds: int, stop: float, ridge: float) -> list[float]:
    """Fill `linear` with the fit of the donors' linear layers, one per loop; returns the errors of `fit`.

    inputs, gradients: those of ActivationStats for each loop. scale (in,): of the inputs of `linear` to the donors'.
    A tied bias is fitted as one more column of W'. Biases per loop take up each loop's mean error, whatever W', A and B
    are, so these are fitted to the inputs less their mean.
    """
    per_loop = linear.bias is not None and linear.bias.dim() == 2
    tied_bias = linear.bias is not None and not per_loop
    weights, basis = [donor.weight for donor in donors], None
    if inputs[0][0].size(1) == linear.weight.size(1):
        stats = [(second.double(), mean, mean.new_ones(1)) for second, mean in inputs]   # E[x xᵀ], E[x], E[1]
    else:                                                                # fitted in the span of the sketches
        basis, stats = in_sketched_span([sketch for sketch, _ in inputs])
        weights = [W @ basis for W in weights]
    D = sum(gradients) / sum(gradients).mean().clamp_min(1e-30) + ridge
    root_D = D.sqrt()[:, None]
    C = [weighted_moments(moments, squares.sum(), ridge, linear.weight.size(1), per_loop, tied_bias)
         for moments, squares in zip(stats, gradients, strict=True)]
    W = [root_D * weight for weight in weights]
    if tied_bias:
        W = [torch.cat([W_l, root_D * donor.bias[:, None]], dim=1) for W_l, donor in zip(W, donors, strict=True)]
    shared, lora, errors = fit(W, C, linear.rank, rounds, stop, tied_bias)

    shared, bias = (shared / root_D).split([weights[0].size(1), int(tied_bias)], dim=1)
    if basis is not None:                                                # outside of the span, W' is the plain average
        plain = sum(donor.weight for donor in donors) / len(donors)
        shared = plain + (shared - sum(weights) / len(weights)).to(basis) @ basis.T
    linear.weight.copy_(shared / scale)
    for loop, (a, b) in enumerate(lora):
        a = a if basis is None else (a.to(basis) @ basis.T).double()
        linear.lora_a[loop], linear.lora_b[loop] = balanced(a / scale, b / root_D)
    if tied_bias:
        linear.bias.copy_(bias[:, 0])
    elif per_loop:                                                       # what is missing on the mean input
        for loop, (donor, (_, mean)) in enumerate(zip(donors, inputs, strict=True)):
            wanted = donor.bias + donor.weight.double() @ mean
            linear.bias[loop] = wanted - linear.merged(loop).double() @ (mean * scale)
    return errors


def weighted_moments(moments: tuple[Tensor, Tensor, Tensor], weight: Tensor, ridge: float, width: int, centred: bool,
                     with_ones: bool) -> Tensor:
    """C_l from E[x xᵀ], E[x], E[1] and E[|g|²]: of x less its mean if `centred`, of x with a 1 appended `with_ones`."""
    second, mean, one = moments
    C = second - (mean.outer(mean) / one if centred else 0.0)
    C.diagonal().add_(ridge * second.trace().clamp_min(1e-30) / width)
    if with_ones:
        C = torch.cat([torch.cat([C, mean[:, None]], dim=1), torch.cat([mean, one])[None]])
    return C * weight.clamp_min(1e-30)


# ---------------------------------------------------------------------------------------------------------------------
# The whole model

def share_norm_scale(norm: Norm, donors: list[Norm]) -> Tensor:
    """Fill a norm with the root mean square of the donors' scales, for each channel; returns its scale (C,).

    It is kept away from zero, since the linear layers that follow are divided by it. Its bias is zero: they absorb it.
    """
    rms = torch.stack([norm_scale(donor) for donor in donors]).square().mean(0).sqrt()
    rms = rms.clamp_min(0.1 * rms.square().mean().sqrt() + max(1e-6, torch.finfo(norm.weight.dtype).eps))
    set_norm_scale(norm, rms)
    return norm_scale(norm).view(-1, norm.weight.size(-1))[0]            # as rounded to its dtype


def recursive_config(full: Config, n_loop: int, rank: int, vectors: str = "tied", kv: str = "own") -> Config:
    """The config of a donor's recursive model: absorbed norms leave biases where they have some (GPT-NeoX)."""
    biased = full.arch == "gpt_neox"
    return replace(full, n_loop=n_loop, rank=rank, vectors=vectors, kv=kv, attn_bias=biased or full.attn_bias,
                   mlp_bias=biased or full.mlp_bias)


@torch.no_grad()
def calibrate(full: RecursiveTransformer, stats: ActivationStats, n_loop: int = 2, rank: int = 0, vectors: str = "tied",
              rounds: int = 8, stop: float = 0.02, ridge: float = 1e-3, dtype: torch.dtype | None = None,
              report: dict | None = None, kv: str = "own") -> RecursiveTransformer:
    """The recursive model fitted to a donor and its `collect_stats`; dtype None is the donor's.

    ridge: what is added to the diagonals of each C and of D, as a share of their mean. rounds, stop: see `fit`.
    report: if given, filled with "attn.q" -> the errors of `fit` of each stored layer, and so on.
    """
    refuse_looped(full.config, "calibrate its donor")
    target = recursive_config(full.config, n_loop, rank, vectors, kv)
    with torch.device("meta"):                                           # allocate weights in the right dtype only
        model = RecursiveTransformer(target)
    model = model.to(dtype or full.embed.weight.dtype).to_empty(device=full.embed.weight.device)
    return fit_layers(model, full, stats, rounds, stop, ridge, report)


@torch.no_grad()
def fit_layers(model: RecursiveTransformer, full: RecursiveTransformer, stats: ActivationStats, rounds: int = 8,
               stop: float = 0.02, ridge: float = 1e-3, report: dict | None = None) -> RecursiveTransformer:
    """Fill a recursive model, whose LoRAs may have a rank for each layer, as `calibrate` does; returns it."""
    target, c = model.config, full.config
    model.load_state_dict({n: w for n, w in full.state_dict().items() if not n.startswith("layers.")}, strict=False)
    for k, layer in enumerate(progress(model.layers, desc="calibrating", unit="layer")):
        depths = range(k, c.n_layer, target.n_unique)                    # the donor layers that layer k replaces
        donors = [absorb_norms(full.layers[i]) for i in depths]
        for name in ("attn.q_norm", "attn.k_norm") if c.qk_norm else ():  # after the linear layer: nothing absorbs them
            norms = [upcast(full.layers[i].get_submodule(name).weight) for i in depths[:target.loops_of(name)]]
            norms = torch.stack(norms)
            layer.get_submodule(name).weight.copy_(norms if target.vectors == "per_loop" else norms.mean(0))
        scales = {"attn.q": share_norm_scale(layer.norm1, [full.layers[i].norm1 for i in depths]),
                  "mlp.up": share_norm_scale(layer.norm2, [full.layers[i].norm2 for i in depths])}
        for first, names in SHARED_INPUT.items():
            for name, linear in linears(layer, names):
                runs_at = depths[:target.loops_of(name)]                 # k and v perhaps in the first loop alone
                errors = fit_linear(linear, [donor.get_submodule(name) for donor in donors[:len(runs_at)]],
                                    [stats.inputs[f"layers.{i}.{first}"] for i in runs_at],
                                    [stats.gradients[f"layers.{i}.{name}"] for i in runs_at],
                                    scales.get(first, 1.0), rounds, stop, ridge)
                if report is not None:
                    report.setdefault(name, []).append(errors)
    for name, w in model.state_dict().items():                           # refuse overflow in a narrow dtype
        cast(w, w.dtype, f"{name} of the calibrated model")
    return model.eval()


def calibration_windows(tokens: Tokens, n_tokens: int, config: Config, name: str) -> list[Tensor]:
    """Token ids (B, T) to calibrate on, in windows from random places of the text. UserError if it is too short."""
    T = min(config.n_ctx, 512)
    if len(tokens) <= T:
        raise UserError(f"{name} has {len(tokens)} tokens, one window to calibrate on needs {T + 1}; give more text")
    if n_tokens < T:
        raise UserError(f"--calib_tokens={n_tokens} is less than one window of {T}; ask for more")
    n = min(n_tokens // T, count_windows(tokens, T))
    widest = max(config.n_embd, config.n_hidden, config.n_head * config.head_dim)
    if n * T < widest:
        print0(f"calibrating on {n * T:,} tokens, fewer than the {widest:,} inputs of the widest linear layer: not "
               "every direction of its input occurs; give more text or --calib_tokens")
    return list(batch(tokens, range(n), T, seed=0)[0].split(4))


def mean_errors(lists: list[list[float]]) -> list[float]:
    """The mean error of several linear layers after each round; one that stopped early keeps its last error."""
    return [average([errors[min(i, len(errors) - 1)] for errors in lists]) for i in range(max(map(len, lists)))]


def to_calibrated(full: RecursiveTransformer, windows: list[Tensor], n_loop: int = 2, rank: int = 0,
                  vectors: str = "tied", dtype: torch.dtype | None = None, kv: str = "own") -> RecursiveTransformer:
    """The recursive model of a donor, calibrated on token ids (B, T) of `windows`; prints how the error fell."""
    report = {}
    model = calibrate(full, collect_stats(full, windows), n_loop, rank, vectors, dtype=dtype, report=report, kv=kv)
    print0("error, as a share of the outputs' energy, at the start and after each round: "
           + " ".join(f"{e:.4f}" for e in mean_errors([errors for kind in report.values() for errors in kind])))
    rows = [[name, f"{average([e[0] for e in errors]):.2%}", f"{average([e[-1] for e in errors]):.2%}"]
            for name, errors in report.items()]
    print0(table([["linear layer", "start", "end"], *rows]) + "\n")
    return model
