"""Would a layer share its weights if it could choose? Ways to store each linear layer of a donor, at one price.

    python -m experiments.sharing --donor=FOLDER --calib_text=SHARDS --save=results/sharing.jsonl

The layers that two loops would share are stored in each of these ways, at many ranks R:

    full       as they are
    low rank   W_l = B_l A_l, cut apart by a weighted SVD: nothing is shared (ranks by need, also between the two)
    shared     W' + B_l A_l: the paper's relaxed sharing, fitted as calibrate.py does
    product    U V + B_l A_l: the shared part has a rank of its own
    basis      B_l A, with A shared: Basis Sharing (2410.03765)

What each costs is what (C1) of calibrate.py says the loss rises by, with each layer's own gradients. One price for a
stored parameter then decides for all of them, and is raised until the model is as small as it should be: no other
choice among these that stores as little has a smaller error (but for what the steps between ranks leave).
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from calibrate import (
    SHARED_INPUT,
    ActivationStats,
    absorb_norms,
    calibration_windows,
    collect_stats,
    fit,
    linears,
    lora_input_basis,
)
from convert import load_full
from lib.cli import parse_args, print0, progress, script, table
from lib.data import load_tokens
from lib.donors import find_donor
from lib.results import append_line
from lib.system import pick_device, run_info
from lib.tokenizer import Tokenizer
from model import RecursiveTransformer

RANKS = (0, 8, 16, 24, 32, 48, 64, 96, 128, 192)  # of the LoRAs beside a full W'; also U V's, and those of a basis
WAYS = {"shared, one rank": ("shared",), "shared, ranks by need": ("shared",), "low rank": ("full", "low rank"),
        "any of them": ("full", "low rank", "shared", "product", "basis")}


@dataclass
class SharingConfig:
    donor: str = "assets/donor"            # full-size model: a folder or a Hugging Face id
    calib_text: str = "assets/books/train"  # text to weigh errors by
    calib_tokens: int = 20_480             # tokens of it
    stored: str = "0.43,0.5,0.6,0.7,0.8"   # shares of the block's matrices to store, by comma
    save: str | None = None                # also append a JSON line to this file


class Group:
    """One linear layer at the two depths that would share it: weights (out, in), E[x xᵀ] and E[g²] of each."""

    def __init__(self, weights: list[Tensor], moments: list[Tensor], squares: list[Tensor], ridge: float = 1e-3):
        self.W, self.n_out, self.n_in = [W.double() for W in weights], *weights[0].shape
        self.C = [C.double() + ridge * C.trace().double() / len(C) * torch.eye(len(C)).double() for C in moments]
        self.g = [(g + ridge * g.mean()).double() for g in squares]
        D = sum(self.g) / sum(self.g).mean()                             # as calibrate.py ties them: one D for both,
        self.root_D = D.sqrt()[:, None]                                  # multiplied into the weights
        self.WD = [self.root_D * W for W in self.W]
        self.CD = [C * g.sum() for C, g in zip(self.C, self.g, strict=True)]
        self.chol = [torch.linalg.cholesky(C) for C in self.CD]
        self.chol_sum = torch.linalg.cholesky(sum(self.CD))

    def error(self, fitted: list[Tensor]) -> float:
        """What the loss rises by, for weights with D^(1/2) multiplied in."""
        rest = [W - F / self.root_D for W, F in zip(self.W, fitted, strict=True)]
        return sum(((R @ C) * R * g[:, None]).sum().item() / 2 for R, C, g in zip(rest, self.C, self.g, strict=True))

    def options(self, ways: tuple[str, ...]) -> list[tuple[str, int, float]]:
        """(way, parameters, error) of every way to store the two, among `ways`."""
        return [option for way in ways for option in getattr(self, way.replace(" ", "_"))()]

    def full(self):
        yield "full", 2 * self.n_out * self.n_in, 0.0

    def low_rank(self):
        squares = torch.cat([torch.linalg.svdvals(g.sqrt()[:, None] * W @ torch.linalg.cholesky(C)).square() / 2
                             for W, C, g in zip(self.W, self.C, self.g, strict=True)]).sort(descending=True)[0]
        left = squares.flip(0).cumsum(0).flip(0).tolist()                # the error if the first R are kept
        for rank in range(0, len(left), 2):
            yield "low rank", rank * (self.n_out + self.n_in), left[rank]

    def shared(self):
        for rank in RANKS:
            if rank < min(self.n_out, self.n_in):
                W, lora, _ = fit(self.WD, self.CD, rank, rounds=3, stop=0.01)
                fitted = [W + b @ a for a, b in lora] if lora else [W, W]
                yield "shared", self.n_out * self.n_in + 2 * rank * (self.n_out + self.n_in), self.error(fitted)

    def product(self):
        for shared_rank in (64, 128, 256):
            for rank in (16, 64):
                if shared_rank + rank < min(self.n_out, self.n_in):
                    yield ("product", (shared_rank + 2 * rank) * (self.n_out + self.n_in),
                           self.error(self.fit_product(shared_rank, rank)))

    def fit_product(self, shared_rank: int, rank: int) -> list[Tensor]:
        """U V and the LoRAs in turns, each the best beside the others."""
        BA = [torch.zeros_like(W) for W in self.WD]
        for _ in range(3):
            wanted = sum((W - F) @ C for W, F, C in zip(self.WD, BA, self.CD, strict=True))
            wanted = torch.cholesky_solve(wanted.T, self.chol_sum).T
            A = lora_input_basis(wanted, self.chol_sum, shared_rank)
            UV = wanted @ sum(self.CD) @ A.T @ A
            for i, (W, C, chol) in enumerate(zip(self.WD, self.CD, self.chol, strict=True)):
                A = lora_input_basis(W - UV, chol, rank)
                BA[i] = (W - UV) @ C @ A.T @ A
        return [UV + F for F in BA]

    def basis(self):
        for rank in (*RANKS[1:], 256, 384):
            if rank < min(self.n_out, self.n_in):
                A = lora_input_basis(torch.cat(self.WD), self.chol_sum, rank)
                fitted = [torch.linalg.solve(A @ C @ A.T, A @ C @ W.T).T @ A
                          for W, C in zip(self.WD, self.CD, strict=True)]
                yield "basis", rank * (self.n_in + 2 * self.n_out), self.error(fitted)


@torch.no_grad()
def all_options(full: RecursiveTransformer, stats: ActivationStats, ways: tuple[str, ...] = WAYS["any of them"]
                ) -> dict[str, list]:
    """"layers.3.mlp.up" -> `Group.options`, for two loops of layers 0 to n_layer / 2 - 1."""
    n, found, layers = full.config.n_layer // 2, {}, [absorb_norms(layer) for layer in full.layers]
    for k in progress(range(n), desc="ways to store", unit="layer"):
        depths = (k, k + n)
        for first, names in SHARED_INPUT.items():
            for name, _ in linears(layers[k], names):
                group = Group([layers[i].get_submodule(name).weight for i in depths],
                              [stats.inputs[f"layers.{i}.{first}"][0] for i in depths],
                              [stats.gradients[f"layers.{i}.{name}"] for i in depths])
                found[f"layers.{k}.{name}"] = group.options(ways)
    return found


def choose(found: dict[str, list], budget: float, ways: tuple[str, ...]) -> list[tuple[str, int, float]]:
    """The option of each group, among `ways`, that is best at the lowest price with which all fit the budget."""
    found = [[option for option in options if option[0] in ways] for options in found.values()]

    def at(price: float):
        return [min(options, key=lambda option: option[2] + price * option[1]) for options in found]
    low, high = 1e-15, 1e3
    for _ in range(100):
        price = (low * high) ** 0.5
        low, high = (price, high) if sum(option[1] for option in at(price)) > budget else (low, price)
    return at(high)


def one_rank(found: dict[str, list], budget: float) -> list[tuple[str, int, float]]:
    """Shared, with LoRAs of the largest rank that fits the budget in every group (of a narrow one, its largest)."""
    groups = [[option for option in options if option[0] == "shared"] for options in found.values()]
    chosen = [[options[min(i, len(options) - 1)] for options in groups] for i in range(len(RANKS))]
    return max((c for c in chosen if sum(option[1] for option in c) <= budget),
               key=lambda c: sum(option[1] for option in c), default=chosen[0])


def main(argv=None) -> None:
    args = parse_args(SharingConfig, argv)
    full, folder = load_full(args.donor, torch.float32).to(pick_device()), find_donor(args.donor)
    tokens = load_tokens(args.calib_text, Tokenizer.load(folder, full.config.vocab_size), full.config.vocab_size)
    stats = collect_stats(full, calibration_windows(tokens, args.calib_tokens, full.config, "--calib_text"))
    found = all_options(full, stats)
    whole = sum(max(option[1] for option in options if option[0] == "full") for options in found.values())
    rows, lines = [], [["asked", "way", "stored", "error", "chosen"]]
    for share in map(float, args.stored.split(",")):
        for name, ways in WAYS.items():
            chosen = (one_rank(found, share * whole) if name == "shared, one rank" else
                      choose(found, share * whole, ways))
            row = {"asked": share, "way": name, "stored": sum(option[1] for option in chosen) / whole,
                   "error": sum(option[2] for option in chosen), "chosen": Counter(option[0] for option in chosen)}
            rows.append(row)
            lines.append([f"{share:.0%}", name, f"{row['stored']:.1%}", f"{row['error']:.4f}",
                          ", ".join(f"{n} {way}" for way, n in row["chosen"].most_common())])
    print0(f"of {len(found)} groups of two linear layers:\n{table(lines)}")
    if args.save:
        append_line(args.save, {"what": "sharing", "settings": vars(args), **run_info(), "groups": len(found),
                                "rows": rows})


if __name__ == "__main__":
    script(main)
