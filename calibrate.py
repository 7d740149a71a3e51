"""Calibrated conversion: a recursive model whose maps are fitted to what really runs through them.

The paper converts from weights alone, as if all directions of a map's input mattered alike, and all of its outputs.
Here the donor first reads some text, forward and backward, and each map is fitted to what entered it, x, and to how
much the loss felt of what it put out, g = d loss / d (W x). This is ours, not the paper's. W_l are the donor's weights
at the depths l that share one stored map W', A_l and B_l the LoRA of that loop. C_l = E[x x^T] E[|g|^2] are the second
moments of what enters there (plus a ridge), times how much it matters there; and D is diagonal: the mean squares of g
over all these depths, as shares. To second order, and with the moments of x and of each g taken apart (K-FAC, Martens
and Grosse 2015, but for D's diagonal: all of E[g g^T] was no better), the loss rises by half of

    E = sum_l tr D (W_l - W' - B_l A_l) C_l (W_l - W' - B_l A_l)^T                                                 (1)

and it is lowered by turns, each an exact minimum (but that (3), after its first time, goes only a step or two):

    weighted tying   W' = (sum_l W_l C_l) (sum_l C_l)^-1                              no LoRA yet                  (2)
    weighted SVD     B_l A_l = D^(-1/2) [D^(1/2) (W_l - W') C_l^(1/2)]_R C_l^(-1/2),  []_R: the SVD cut at rank R  (3)
    tying again      W' = (sum_l W_l P_l) (sum_l P_l)^-1,  P_l = C_l - C_l A_l^T (A_l C_l A_l^T)^-1 A_l C_l        (4)
                     and with it B_l = (W_l - W') C_l A_l^T (A_l C_l A_l^T)^-1

(4) is the best W' and B together, given A: P_l is what of the input the LoRA cannot see, so W' serves a loop only where
that loop cannot serve itself. (3) and (4) alternate until little more is won. With all C_l = D = I, (2) is Average and
(3) the SVD of Eq. 4. The code keeps A with A C A^T = I, and then B = (W_l - W') C_l A_l^T in (3) too.

Norm weights are first absorbed into the maps that follow them, else tying them alone costs more than all the rest. A
bias is one more column of W, over an input that is always 1 and that no LoRA sees. What is stored in the end does the
same in other scales: the shared norms multiply by what the donor's do on average, and B and A have half of S each. It
is what lets a good start survive AdamW, whose steps are of one size for all weights.
"""

from copy import deepcopy
from dataclasses import dataclass, field, replace
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Tokens, batch, count_windows
from losses import IGNORE, chunked_loss
from model import Config, Layer, LayerNorm, RecursiveTransformer, RelaxedLinear, RMSNorm, rope_angles, upcast
from runtime import UserError, print0, progress, table

# The maps that read the same input, by the one whose input is watched.
READERS = {"attn.q": ("attn.q", "attn.k", "attn.v"), "attn.o": ("attn.o",), "mlp.up": ("mlp.gate", "mlp.up"),
           "mlp.down": ("mlp.down",)}
WIDEST, SKETCH = 8192, 2048  # inputs wider than the first are kept as a sketch of so many rows, not as width x width


@dataclass
class Moments:
    """What ran through a donor, per token. Summed in fp64 (sketches, few tokens to a row, in fp32 or wider); second
    moments are kept in the dtype of what they are of."""
    # "layers.3.attn.q" -> E[x x^T] (in, in), E[x] (in,); of wide inputs a sketch S (rows, in + 1), with S^T S for the
    # first of x and a 1 beside it
    inputs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    # "layers.3.attn.k" -> E[g^2] (out,)
    gradients: dict[str, Tensor] = field(default_factory=dict)


Norm = RMSNorm | LayerNorm


def is_gemma(norm: Norm) -> bool:
    return isinstance(norm, RMSNorm) and norm.gemma


def gain(norm: Norm) -> Tensor:
    """What a norm multiplies by, in fp32 or wider."""
    return upcast(norm.weight.detach()) + (1.0 if is_gemma(norm) else 0.0)


def set_gain(norm: Norm, gains: Tensor | float) -> None:
    """Have a norm multiply by this, and add nothing."""
    norm.weight[:] = gains - (1.0 if is_gemma(norm) else 0.0)
    if norm.bias is not None:
        norm.bias.zero_()


@torch.no_grad()
def absorb(layer: Layer) -> Layer:
    """The same function, in fp32 or wider, with norm weights one and norm biases zero: the maps that follow have them.

    A map that reads a norm with bias needs a bias of its own, so GPT-NeoX gets biases in attention if it had none.
    """
    layer = deepcopy(layer)
    for p in layer.parameters():
        p.data = upcast(p.data)
    for norm, part, names in ((layer.norm1, layer.attn, "qkv"), (layer.norm2, layer.mlp, ("gate", "up"))):
        scale = gain(norm)
        for linear in filter(None, (getattr(part, name) for name in names)):
            if norm.bias is not None:
                bias = linear.weight @ norm.bias
                linear.bias = nn.Parameter(bias if linear.bias is None else linear.bias + bias)
            linear.weight *= scale
        set_gain(norm, 1.0)
    return layer


@torch.no_grad()
def moments(full: RecursiveTransformer, windows: list[Tensor]) -> Moments:
    """What runs through each map of a full-size model as it reads token ids (B, T) from `windows` and predicts them.

    One layer at a time, forward and then backward, so that beside the model there are only the states (tokens, C) that
    enter each layer, and one layer's graph. An input wider than WIDEST is kept as a sketch: every token is added to one
    of SKETCH rows with a random sign, so that its square has E[x x^T] as its mean. UserError where an input or a
    gradient is not finite.
    """
    windows = [idx.to(full.embed.weight.device) for idx in windows]
    ropes = [rope_angles(torch.arange(idx.size(1), device=idx.device), full.config) for idx in windows]
    entering = [[upcast(full.first_state(idx)).flatten(0, 1) for idx in windows]]
    for layer in progress(full.layers, desc="reading the calibration text", unit="layer"):
        layer = absorb(layer)
        entering.append([layer(x, rope, 0, 0, None) for x, rope in zip(entering[-1], ropes, strict=True)])
    head = upcast(full.head_weight.detach())
    grads = [gradient(full.norm, head, x, idx) for x, idx in zip(entering.pop(), windows, strict=True)]
    found, count = Moments(), sum(idx.numel() for idx in windows)
    for i in progress(reversed(range(len(full.layers))), desc="and back", unit="layer", total=len(full.layers)):
        layer = absorb(full.layers[i])
        watch(layer, f"layers.{i}.", found, count)
        for j, x in enumerate(entering.pop()):
            with torch.enable_grad():
                y = layer(x.requires_grad_(), ropes[j], 0, 0, None)
            grads[j], = torch.autograd.grad(y, x, grads[j])
        for name in (f"layers.{i}.{entry}" for entry in READERS):
            second, first = found.inputs[name]
            found.inputs[name] = second.to(x.dtype), first
    for name in (f"layers.{i}.{entry}" for i in range(len(full.layers)) for entry in READERS):   # the first that fails
        if not all(part.isfinite().all() for part in found.inputs[name]):
            raise UserError(f"what enters {name} of the donor is not finite on the calibration text: its weights are "
                            "damaged, or they overflow in this dtype")
    if not all(squares.isfinite().all() for squares in found.gradients.values()):
        raise UserError("the donor's loss on the calibration text has gradients that are not finite: its final norm or "
                        "head is damaged, or they overflow in this dtype")
    return found


def gradient(norm: Norm, head: Tensor, x: Tensor, idx: Tensor) -> Tensor:
    """Of the summed cross entropy of the next tokens of idx (B, T), in what the last layer put out, x (B T, C)."""
    targets = F.pad(idx[:, 1:], (0, 1), value=IGNORE).flatten()
    with torch.enable_grad():
        loss = chunked_loss([norm(x.requires_grad_(), 0)], head, targets)[0] * (targets != IGNORE).sum()
    return torch.autograd.grad(loss, x)[0]


def watch(layer: Layer, prefix: str, found: Moments, count: int) -> None:
    """Have the moments of what runs through the layer's maps, `count` tokens in all, added to `found`."""
    draw = torch.Generator().manual_seed(0)

    def forward(name):
        def hook(_, inputs):
            x = inputs[0].detach().flatten(0, -2)                        # (tokens, in)
            width = x.size(1)
            if name not in found.inputs:
                found.inputs[name] = (x.new_zeros(SKETCH, width + 1) if width > WIDEST else
                                      x.new_zeros(width, width, dtype=torch.float64),
                                      x.new_zeros(width, dtype=torch.float64))
            second, first = found.inputs[name]
            if width > WIDEST:
                row = torch.randint(SKETCH, (len(x),), generator=draw).to(x.device)
                sign = (torch.randint(2, (len(x), 1), generator=draw) * 2 - 1).to(x.device)
                second.index_add_(0, row, F.pad(x, (0, 1), value=1.0) * sign / count**0.5)
            else:
                second += (x.T @ x).double() / count
            first += x.sum(0, dtype=torch.float64) / count
        return hook

    def backward(name):
        def hook(_, inputs, outputs):
            g = outputs[0].flatten(0, -2)                                # (tokens, out)
            found.gradients[name] = found.gradients.get(name, 0.0) + g.square().sum(0, dtype=torch.float64) / count
        return hook

    for entry, kinds in READERS.items():
        layer.get_submodule(entry).register_forward_pre_hook(forward(prefix + entry))
        for kind in kinds:
            if kind != "mlp.gate" or layer.mlp.gate is not None:
                layer.get_submodule(kind).register_full_backward_hook(backward(prefix + kind))


def directions(target: Tensor, root: Tensor, rank: int, before: Tensor | None = None) -> Tensor:
    """Eq. 3: A (R, in) with A C A^T = I, what a LoRA should read to lower the error of `target` (out, in) most.
    root: Cholesky's L of C = L L^T. before: an A to start from; then two steps of subspace iteration, which never do
    worse than it, instead of all singular vectors."""
    if before is not None:
        v = root.T @ before.T                                            # of white inputs (in, R)
        for _ in range(2):
            v = torch.linalg.qr(root.T @ (target.T @ (target @ (root @ v))))[0]
        return torch.linalg.solve_triangular(root.T, v, upper=True).T
    seen = target @ root                                                 # the same map, of white inputs
    if target.size(0) <= target.size(1):                                 # decompose whichever side is smaller
        u = torch.linalg.eigh(seen @ seen.T)[1][:, -rank:].flip(1)       # largest first
        v = torch.linalg.qr(seen.T @ u)[0]
    else:
        v = torch.linalg.eigh(seen.T @ seen)[1][:, -rank:].flip(1)
    return torch.linalg.solve_triangular(root.T, v, upper=True).T


def fit(targets: list[Tensor], Cs: list[Tensor], rank: int, rounds: int = 0, stop: float = 0.0,
        biased: bool = False) -> tuple[Tensor, list[tuple[Tensor, Tensor]], list[float]]:
    """W' (out, in), (A, B) of each loop, and the error (1) at the start and after each round, as a share of the
    outputs' energy. targets W_l (out, in) and Cs (in, in) of each loop, fp64; biased: the last column is a bias.

    Rounds end early where one lowers the error by less than the share `stop`.
    """
    d = targets[0].size(1) - biased                                      # what a LoRA sees
    rank = min(rank, targets[0].size(0), d)
    roots = [torch.linalg.cholesky(C[:d, :d]) for C in Cs] if rank else []
    whole, energy = 0.0, 1e-300                                          # whole: sum_l W_l C_l
    for T, C in zip(targets, Cs, strict=True):
        TC = T @ C
        whole, energy = whole + TC, energy + (TC * T).sum()
    root = torch.linalg.cholesky(sum(Cs))
    tied = torch.cholesky_solve(whole.T, root).T                         # Eq. 2
    As = [None] * len(Cs)
    seen, read = [C[:, :0] for C in Cs], [T[:, :0] for T in targets]     # C_l A_l^T (in, R), W_l C_l A_l^T (out, R)

    def tie():  # Eq. 4, where P_l = C_l - seen_l seen_l^T, as a change of low rank to Eq. 2 (Woodbury)
        S = torch.cat(seen, dim=1)
        reach = torch.cholesky_solve(S, root)
        share, v = torch.linalg.eigh(torch.eye(S.size(1)).to(S) - S.T @ reach)
        needed = share > 1e-10                                           # else every loop's LoRA sees it: as in Eq. 2
        change = (tied @ S - torch.cat(read, dim=1)) @ v[:, needed] / share[needed] @ v[:, needed].T
        return tied + change @ reach.T, change

    def error(W, change):  # Eq. 1, with the best B; W sum(Cs) is whole + change S^T
        WS = W @ torch.cat(seen, dim=1)
        left = energy - (W * whole).sum() + (WS * change).sum() - (torch.cat(read, dim=1) - WS).square().sum()
        return (left / energy).item()

    def relax(W, loop):  # A of this loop, from Eq. 3
        T, C = targets[loop] - W, Cs[loop]
        if biased:                                                       # the bias as far as the inputs tell it
            T = torch.cholesky_solve(C[:d] @ T.T, roots[loop]).T
        As[loop] = directions(T, roots[loop], rank, As[loop] if 4 * rank < min(T.shape) else None)
        seen[loop] = C[:, :d] @ As[loop].T
        read[loop] = targets[loop] @ seen[loop]

    W = tied
    for loop in range(len(Cs) if rank else 0):
        relax(W, loop)
    errors = [error(W, 0.0)]
    while rank and len(errors) <= rounds and (len(errors) < 2 or errors[-2] - errors[-1] > stop * errors[-2]):
        for loop in range(len(Cs) if len(errors) > 1 else 0):            # the first has been relaxed
            relax(W, loop)
        W, change = tie()
        errors.append(error(W, change))
    return W, [(a, (T - W) @ s) for a, T, s in zip(As, targets, seen, strict=True) if rank], errors


def balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same B A with half of S in each: the paper's SVD leaves all of S in B, and then a step of AdamW on A moves
    the map much more than one on W' does. Directions without residual: A Gaussian, B zero (App. C)."""
    (qb, rb), (qa, ra) = torch.linalg.qr(b), torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(rb @ ra.T)
    a, b, dead = s.sqrt()[:, None] * (vh @ qa.T), qb @ (u * s.sqrt()), s <= 1e-6 * s.max().clamp_min(1e-30)
    a[dead] = torch.randn(int(dead.sum()), a.size(1)).to(a) / a.size(1) ** 0.5
    return a, b.masked_fill(dead, 0.0)


def fit_map(linear: RelaxedLinear, donors: list[RelaxedLinear], entering: list[tuple[Tensor, Tensor]],
            gradients: list[Tensor], gains: Tensor | float, rounds: int, stop: float, ridge: float) -> list[float]:
    """Fill `linear` with what fits best the donors' maps, one for each loop, on what ran through them; the errors of
    `fit`. gains: by how much more enters `linear` than entered the donors' (in,).

    A tied bias is fitted with W' as a column more. One per loop takes up the mean error of its loop, whatever W', A and
    B are, so that they have only C less that of the mean to fit.
    """
    biased, own = linear.bias is not None, linear.bias is not None and linear.bias.dim() == 2
    width = linear.weight.size(1)
    D = sum(gradients) / sum(gradients).mean().clamp_min(1e-30) + ridge
    weights, basis = [donor.weight for donor in donors], None
    if entering[0][0].size(1) == width:
        shown = [(second.double(), first, first.new_ones(1)) for second, first in entering]       # means of x x^T, x, 1
    else:                                                                # sketches: the fit is in what they span
        basis, r = torch.linalg.qr(torch.cat([S[:, :-1] for S, _ in entering]).T)                 # (in, all their rows)
        shown = [(part @ part.T, part @ S[:, -1].double(), S[:, -1:].double().square().sum(0))
                 for part, (S, _) in zip(r.double().split(len(entering[0][0]), dim=1), entering, strict=True)]
        weights = [W @ basis for W in weights]
    targets, Cs = [D.sqrt()[:, None] * W for W in weights], []
    for loop, ((second, first, one), squares) in enumerate(zip(shown, gradients, strict=True)):
        C = second - (first.outer(first) / one if own else 0.0)
        C.diagonal().add_(ridge * second.trace().clamp_min(1e-30) / width)
        if biased and not own:
            targets[loop] = torch.cat([targets[loop], (D.sqrt() * donors[loop].bias)[:, None]], dim=1)
            C = torch.cat([torch.cat([C, first[:, None]], dim=1), torch.cat([first, one])[None]])
        Cs.append(C * squares.sum().clamp_min(1e-30))
    W, lora, errors = fit(targets, Cs, linear.rank, rounds, stop, biased and not own)
    W, bias = (W / D.sqrt()[:, None]).split([weights[0].size(1), biased and not own], dim=1)
    if basis is not None:                                                # elsewhere W' is the average
        W = sum(donor.weight for donor in donors) / len(donors) + (W - sum(weights) / len(weights)).to(basis) @ basis.T
    linear.weight.copy_(W / gains)
    for loop, (a, b) in enumerate(lora):
        a = a if basis is None else (a.to(basis) @ basis.T).double()
        linear.lora_a[loop], linear.lora_b[loop] = balanced(a / gains, b / D.sqrt()[:, None])
    if biased:
        linear.bias.copy_(torch.stack([
            donor.bias + donor.weight.double() @ first - linear.merged(loop).double() @ (first * gains)
            for loop, (donor, (_, first)) in enumerate(zip(donors, entering, strict=True))]) if own else bias[:, 0])
    return errors


def share_gain(norm: Norm, donors: list[Norm]) -> Tensor:
    """Fill a norm with the donors' root mean square, channel by channel, and return what it multiplies by (C,). Kept
    from zero, since the maps that read it are divided by it. Its bias is zero: they have absorbed the donors'."""
    rms = torch.stack([gain(donor) for donor in donors]).square().mean(0).sqrt()
    rms = rms.clamp_min(0.1 * rms.square().mean().sqrt() + max(1e-6, torch.finfo(norm.weight.dtype).eps))
    set_gain(norm, rms)
    return gain(norm).view(-1, norm.weight.size(-1))[0]                  # as it is after rounding


@torch.no_grad()
def calibrate(full: RecursiveTransformer, seen: Moments, n_loop: int = 2, rank: int = 0, vectors: str = "tied",
              rounds: int = 8, stop: float = 0.02, ridge: float = 1e-3, dtype: torch.dtype | None = None,
              report: dict | None = None) -> RecursiveTransformer:
    """The recursive model fitted to a donor and the `moments` of what ran through its maps; dtype None: the donor's.

    ridge is added to the diagonals of each C and of D, as a share of their mean; rounds and stop as in `fit`. report,
    if given, is filled with kind of matrix -> the errors of `fit`, one list per stored layer.
    """
    biased = full.config.arch == "gpt_neox"                              # see `absorb`
    with torch.device("meta"):                                           # the weights of another size are never there
        model = RecursiveTransformer(replace(full.config, n_loop=n_loop, rank=rank, vectors=vectors, attn_bias=biased,
                                             mlp_bias=biased))
    model = model.to(dtype or full.embed.weight.dtype).to_empty(device=full.embed.weight.device)
    model.load_state_dict({n: w for n, w in full.state_dict().items() if not n.startswith("layers.")}, strict=False)
    for k, layer in enumerate(progress(model.layers, desc="calibrating", unit="layer")):
        at = range(k, full.config.n_layer, model.config.n_unique)        # of this position, one for each loop
        donors = [absorb(full.layers[i]) for i in at]
        gains = {"attn.q": share_gain(layer.norm1, [full.layers[i].norm1 for i in at]),
                 "mlp.up": share_gain(layer.norm2, [full.layers[i].norm2 for i in at])}
        for entry, kinds in READERS.items():
            for kind in kinds:
                if kind != "mlp.gate" or layer.mlp.gate is not None:
                    errors = fit_map(layer.get_submodule(kind), [d.get_submodule(kind) for d in donors],
                                     [seen.inputs[f"layers.{i}.{entry}"] for i in at],
                                     [seen.gradients[f"layers.{i}.{kind}"] for i in at], gains.get(entry, 1.0),
                                     rounds, stop, ridge)
                    if report is not None:
                        report.setdefault(kind, []).append(errors)
    return model.eval()


def calibration_windows(tokens: Tokens, n_tokens: int, config: Config, name: str) -> list[Tensor]:
    """Token ids (B, T) to calibrate on: windows drawn from all over the text. UserError if it has not one."""
    T = min(config.n_ctx, 512)
    if len(tokens) <= T:
        raise UserError(f"{name} has {len(tokens)} tokens, one window to calibrate on needs {T + 1}; give more text")
    if n_tokens < T:
        raise UserError(f"--calib_tokens={n_tokens} is less than one window of {T}; ask for more")
    n = min(n_tokens // T, count_windows(tokens, T))
    widest = max(config.n_embd, config.n_hidden, config.n_head * config.head_dim)
    if n * T < widest:
        print0(f"calibrating on {n * T:,} tokens, fewer than the {widest:,} inputs of the widest map: directions that "
               "they do not show are left to the ridge; give more text or --calib_tokens")
    return list(batch(tokens, range(n), T, seed=0)[0].split(4))


def mean_errors(lists: list[list[float]]) -> list[float]:
    """The errors by round of several maps, averaged; a map that is done stays at its last."""
    return [mean([errors[min(i, len(errors) - 1)] for errors in lists]) for i in range(max(map(len, lists)))]


def to_calibrated(full: RecursiveTransformer, windows: list[Tensor], n_loop: int = 2, rank: int = 0,
                  vectors: str = "tied", dtype: torch.dtype | None = None) -> RecursiveTransformer:
    """The recursive model of a donor, calibrated on token ids (B, T) from `windows`; says how the error fell."""
    if full.config.n_loop != 1:
        raise UserError("this is a recursive model already; calibrate its donor")
    report = {}
    model = calibrate(full, moments(full, windows), n_loop, rank, vectors, dtype=dtype, report=report)
    print0("error left, as a share of the outputs' energy, at the start and after each round: "
           + " ".join(f"{e:.4f}" for e in mean_errors([errors for kind in report.values() for errors in kind])))
    print0(table([["map", "start", "end"], *([kind, f"{mean([e[0] for e in errors]):.2%}",
                                              f"{mean([e[-1] for e in errors]):.2%}"]
                                             for kind, errors in report.items())]) + "\n")
    return model
