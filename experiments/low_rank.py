"""Models of equal size, most with a rank for each linear layer.

    low_rank   the baseline that shares nothing: every linear layer of the donor becomes B A, by a weighted SVD
    by_need    the recursive model of two loops, calibrated
    one_rank   the same with equal ranks, as train.py makes it

    python -m experiments.low_rank --size_of=24 --out=out_low_rank       # stores as much as average + SVD, r 24
    python -m experiments.low_rank --train --ckpt=out_low_rank --out=...  # then every setting of train.py

W is cut in the norm of calibrate.py's error (C1), D^(1/2) W C^(1/2), so both ways read the same text and weigh its
directions alike. Ranks go where they lower that error most for each number stored, over all layers at once.
"""

import heapq
import sys
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch

import train
from calibrate import (
    SHARED_INPUT,
    ActivationStats,
    absorb_norms,
    balanced,
    calibrate,
    calibration_windows,
    collect_stats,
    fit_layers,
    linears,
    norm_scale,
    recursive_config,
    weighted_moments,
)
from convert import load_full
from experiments.sharing import all_options, choose
from lib.cli import UserError, parse_args, print0, script
from lib.data import load_tokens
from lib.donors import find_donor
from lib.folders import check_out, replace_folder
from lib.system import pick_device
from lib.tokenizer import Tokenizer, copy_tokenizer
from model import Config, RecursiveTransformer

Way = Literal["low_rank", "by_need", "one_rank"]


class RankPerLayer(RecursiveTransformer):
    """Each linear layer has LoRAs of a rank of its own, config.extra["ranks"]: "layers.0.attn.q" -> R. A full-size one
    is plain low rank: its W' are zeros, which are neither stored nor trained."""

    def __init__(self, config: Config):
        super().__init__(config)
        for name, rank in config.extra["ranks"].items():
            linear = self.get_submodule(name)
            linear.rank = rank
            linear.lora_a = torch.nn.Parameter(linear.lora_a.data[:, :rank].clone()) if rank else None
            linear.lora_b = torch.nn.Parameter(linear.lora_b.data[:, :, :rank].clone()) if rank else None
        self.drop_weights()

    def drop_weights(self) -> None:
        if self.config.n_loop > 1:
            return
        for linear in map(self.get_submodule, self.config.extra["ranks"]):
            zeros = torch.zeros(linear.weight.shape, device=linear.lora_a.device)
            del linear.weight
            linear.register_buffer("weight", zeros, persistent=False)

    @classmethod
    def load(cls, folder, device="cpu", dtype=None) -> "RankPerLayer":
        model = super().load(folder, device, dtype)
        model.drop_weights()                                             # loading began on the meta device
        return model


@torch.no_grad()
def weighted_svds(full: RecursiveTransformer, stats: ActivationStats, ridge: float = 1e-3) -> dict[str, tuple]:
    """"layers.0.attn.q" -> (A, B, S): W = B A in full, the singular values S (of D^(1/2) W C^(1/2)) descending. By (C1)
    the loss rises by half the squares of those that are cut off."""
    found = {}
    for i, layer in enumerate(full.layers):
        absorbed = absorb_norms(layer)                                   # the stats are of its inputs
        scales = {"attn.q": norm_scale(layer.norm1), "mlp.up": norm_scale(layer.norm2)}
        for first in SHARED_INPUT:
            second, mean = stats.inputs[f"layers.{i}.{first}"]
            one = mean.new_ones(1)
            C = weighted_moments((second.double(), mean, one), one, ridge, len(mean), centred=False, with_ones=False)
            chol_C = torch.linalg.cholesky(C)
            for name, linear in linears(absorbed, SHARED_INPUT[first]):
                squares = stats.gradients[f"layers.{i}.{name}"].double()
                root_D = (squares + ridge * squares.mean()).sqrt()[:, None]
                u, s, vh = torch.linalg.svd(root_D * linear.weight.double() @ chol_C, full_matrices=False)
                a = torch.linalg.solve_triangular(chol_C, vh, upper=False, left=False) / scales.get(first, 1.0)
                found[f"layers.{i}.{name}"] = a, u * s / root_D, s
    return found


def ranks_by_need(svds: dict[str, tuple], budget: int) -> dict[str, int]:
    """The rank of each layer, at least 1, with which all A and B have at most `budget` entries: always the next rank
    that lowers the error most for each entry."""
    costs = {name: a.size(1) + b.size(0) for name, (a, b, _) in svds.items()}
    ranks, left = dict.fromkeys(svds, 1), budget - sum(costs.values())
    if left < 0:
        raise UserError(f"{budget} entries are too few for a rank of 1 in every layer")
    gains = {name: (s.square() / costs[name]).tolist() for name, (_, _, s) in svds.items()}
    queue = [(-gain[1], name) for name, gain in gains.items()]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        if costs[name] > left:                               # narrower layers may still fit
            continue
        ranks[name], left = ranks[name] + 1, left - costs[name]
        if ranks[name] < len(gains[name]):
            heapq.heappush(queue, (-gains[name][ranks[name]], name))
    return ranks


def stored_block(config: Config) -> int:
    """How many parameters a model of this config stores in its block."""
    with torch.device("meta"):
        return RecursiveTransformer(config).num_params()["stored_block"]


@torch.no_grad()
def to_low_rank(full: RecursiveTransformer, svds: dict[str, tuple], budget: int) -> RankPerLayer:
    """The plain low-rank model, from the `weighted_svds` of a donor, that stores at most `budget` parameters in its
    block."""
    weights = full.state_dict()
    others = full.num_params()["stored_block"] - sum(p.numel() for p in (full.get_submodule(n).weight for n in svds))
    ranks = ranks_by_need(svds, budget - others)
    model = RankPerLayer(replace(full.config, rank=max(ranks.values()), extra=full.config.extra | {"ranks": ranks}))
    model.load_state_dict({name: w for name, w in weights.items() if name in model.state_dict()}, strict=False)
    for name, (a, b, _) in svds.items():
        linear = model.get_submodule(name)
        linear.lora_a[0], linear.lora_b[0] = balanced(a[:ranks[name]], b[:, :ranks[name]])
    return model.eval()


@torch.no_grad()
def to_shared(full: RecursiveTransformer, stats: ActivationStats, found: dict[str, list], budget: int) -> RankPerLayer:
    """The recursive model of two loops, calibrated, whose LoRAs have ranks by need, from the donor's `shared_options`:
    it stores at most `budget` parameters in its block."""
    target, ranks = recursive_config(full.config, n_loop=2, rank=0), {}
    tied = sum(options[0][1] for options in found.values())              # the first option has a LoRA rank of zero
    chosen = choose(found, budget - stored_block(target) + tied, ("shared",))
    for (name, options), (_, cost, _) in zip(found.items(), chosen, strict=True):
        ranks[name] = (cost - options[0][1]) // (2 * sum(full.get_submodule(name).weight.shape))
    model = RankPerLayer(replace(target, rank=max(ranks.values()), extra=target.extra | {"ranks": ranks}))
    return fit_layers(model, full, stats).eval()


# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class LowRankConfig:
    donor: str = "assets/donor"            # full-size model: a folder or a Hugging Face id
    way: Way = "low_rank"                  # sharing nothing, or recursive with LoRA ranks by_need or one_rank for all
    size_of: int = 24                      # store as much as the donor with 2 loops and LoRAs of this rank
    loops: int = 2                         # or with this number of loops
    calib_text: str = "assets/books/train" # text to weigh the SVD by
    calib_tokens: int = 20_480             # tokens of it
    out: str = "out_low_rank"              # folder to write


@cache
def donor_stats(donor: str, text: str, n_tokens: int) -> tuple[RecursiveTransformer, ActivationStats]:
    full = load_full(donor, torch.float32).to(pick_device())
    tokens = load_tokens(text, Tokenizer.load(find_donor(donor), full.config.vocab_size), full.config.vocab_size)
    return full, collect_stats(full, calibration_windows(tokens, n_tokens, full.config, "--calib_text"))


@cache
def shared_options(donor: str, text: str, n_tokens: int) -> dict[str, list]:
    """The same at every size, and minutes of work."""
    return all_options(*donor_stats(donor, text, n_tokens), ("shared",))


def main(argv=None) -> int | None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--train"]:
        train.RecursiveTransformer = RankPerLayer            # what --ckpt and --resume load
        return train.main(argv[1:])
    args = parse_args(LowRankConfig, argv)
    check_out(args.out)
    source = args.donor, args.calib_text, args.calib_tokens
    full, stats = donor_stats(*source)
    size = stored_block(replace(full.config, n_loop=args.loops, rank=args.size_of))
    if args.way == "low_rank":
        model = to_low_rank(full, weighted_svds(full, stats), size)
    elif args.way == "one_rank":
        model = calibrate(full, stats, args.loops, args.size_of)
    elif args.loops == 2:
        model = to_shared(full, stats, shared_options(*source), size)
    else:
        raise UserError(f"--loops={args.loops}: --way=by_need chooses ranks for two loops only")
    with replace_folder(args.out) as tmp:
        copy_tokenizer(find_donor(args.donor), tmp)
        model.write(tmp)
    print0(f"wrote {args.out}: {model.num_params()['stored_block']:,} parameters in its block, at most {size:,}")


if __name__ == "__main__":
    script(main)
