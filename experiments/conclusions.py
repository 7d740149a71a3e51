"""The paper's eight conclusions as data: the runs that test each, the paper's figures, and the claims."""

from dataclasses import dataclass
from typing import NamedTuple


class ExitLoss(NamedTuple):
    """Which loss of exits_seeds.jsonl: of which model, after which loop."""
    kind: str                                  # tied or relaxed
    training: str                              # of the exits: none, weighted, self
    loop: int                                  # from 1

    def __str__(self) -> str:
        return f"{self.kind}-{self.training} {self.loop}"


Measured = str | ExitLoss                      # a run of the matrix (its final loss), or a loss at an exit


@dataclass
class Conclusion:
    name: str                                  # for --only
    says: str                                  # the paper's conclusion in a few words, and as a sentence
    sentence: str
    metric: str                                # of the paper's figures
    rows: dict[Measured, tuple[str, str]]      # what was measured -> label, the paper's figure
    claims: list[tuple[Measured, str, Measured]]  # (a, "<", b): a has the lower loss; (a, "~", b): about the same

    @property
    def runs(self) -> list[str]:
        """The runs of the matrix it depends on."""
        return [run for run in self.rows if isinstance(run, str)]


def conclusions(low: int, mid: int, top: int) -> list[Conclusion]:
    """The paper's eight conclusions in order of importance, for these LoRA ranks. The paper's figures are
    those of Gemma 2B with 2 loops."""
    svd_low, svd_mid, svd_top = (f"average-r{r}" for r in (low, mid, top))
    zero, stepwise_svd = f"average-r{top}-zero", f"stepwise-r{top}"

    def tied(training: str, loop: int) -> ExitLoss:
        return ExitLoss("tied", training, loop)

    def relaxed(training: str, loop: int) -> ExitLoss:
        return ExitLoss("relaxed", training, loop)

    return [
        Conclusion(
            "inits", "stepwise > average, lower > random",
            "tied: stepwise beats average and lower, and these beat random", "perplexity",
            {"stepwise": ("stepwise", "12.85"), "average": ("average", "15.15"), "lower": ("lower", "15.03"),
             "random": ("random", "22.66")},
            [("stepwise", "<", "average"), ("stepwise", "<", "lower"), ("average", "<", "random"),
             ("lower", "<", "random")]),
        Conclusion(
            "relaxed", "average + SVD is the best start", "relaxed: average + SVD is the best start", "accuracy",
            {svd_top: (f"average + SVD, r {top}", "55.5"), zero: (f"average, zero, r {top}", "49.0"),
             stepwise_svd: (f"stepwise + SVD, r {top}", "50.5")},
            [(svd_top, "<", zero), (svd_top, "<", stepwise_svd)]),
        Conclusion(
            "rank", "higher is better", "a higher rank gives a lower loss", "accuracy",
            {svd_low: (f"average + SVD, r {low}", "52.1"), svd_mid: (f"r {mid}", "54.2"),
             svd_top: (f"r {top}", "55.5")},
            [(svd_mid, "<", svd_low), (svd_top, "<", svd_mid)]),
        Conclusion(
            "distill", "distillation helps", "distillation helps", "accuracy",
            {"stepwise": ("tied, stepwise", "51.7"), "stepwise-fkl": ("with forward KL", "53.4")},
            [("stepwise-fkl", "<", "stepwise")]),
        Conclusion(
            "pretrained", "pretrained weights ≫ random ones", "pretrained weights beat random ones by far",
            "perplexity",
            {"stepwise": ("tied, stepwise", "12.85"), "scratch": ("as large, from scratch", "22.63"),
             "full": ("full size, same tokens", "")},
            [("stepwise", "<", "scratch")]),
        Conclusion(
            "exits", "the last loop kept, the first lifted",
            "aggressive 0.1 + self-distillation keeps the last loop and lifts the first", "accuracy",
            {tied("none", 2): ("last loop: no exit losses", "51.7 (before)"), tied("weighted", 2): ("weighted", "50.5"),
             tied("self", 2): ("aggressive 0.1, self-distilled", "52.6"),
             tied("none", 1): ("first loop: no exit losses", ""), tied("weighted", 1): ("weighted", "49.8"),
             tied("self", 1): ("aggressive 0.1, self-distilled", "48.0")},
            [(tied("self", 2), "~", tied("none", 2)), (tied("self", 1), "<", tied("none", 1))]),
        Conclusion(
            "relaxed_exits", "relaxation hurts the first", "relaxation makes the first exit worse", "accuracy",
            {tied("self", 1): ("first loop: tied", "48.8"), relaxed("self", 1): ("relaxed, r 32 (r 64)", "40.8"),
             tied("self", 2): ("last loop: tied", "54.0"), relaxed("self", 2): ("relaxed, r 32 (r 64)", "54.0")},
            [(tied("self", 1), "<", relaxed("self", 1))]),
        Conclusion(
            "norms", "zero is disastrous, averaged ≈ picked",
            "zero-initialised norms are disastrous, averaged ones as good as picked ones", "",
            {"average": ("average, norms averaged", ""), "norms-pick": ("the first loop's", ""),
             "norms-zero": ("zero", "")},
            [("average", "<", "norms-zero"), ("norms-pick", "<", "norms-zero"), ("average", "~", "norms-pick")]),
    ]
