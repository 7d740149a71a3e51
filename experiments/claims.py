"""The paper's eight conclusions as claims about losses, written down before the runs that decide them."""

from dataclasses import dataclass
from typing import NamedTuple


class Measured(NamedTuple):
    """A loss on the test books: of which arm, after which loop, and whether after training."""
    arm: str
    loop: int = -1                             # as an index: 0 the first, -1 the last
    trained: bool = True


class Comparison(NamedTuple):
    """lower < higher: the first loss is lower. alike: they differ by less than EQUIVALENT either way."""
    a: Measured
    b: Measured
    alike: bool = False


EQUIVALENT = 0.03                              # nats


@dataclass
class Claim:
    name: str
    sentence: str                              # the paper's conclusion
    metric: str                                # of the paper's figures
    rows: dict[Measured, str]                  # what its table shows -> the paper's figure
    parts: list[Comparison]                    # it holds if all of them do


def lower(*order: str | Measured) -> list[Comparison]:
    """Each loss is lower than the next."""
    given = [Measured(each) if isinstance(each, str) else each for each in order]
    return [Comparison(a, b) for a, b in zip(given, given[1:], strict=False)]


def claims(low: int, mid: int, top: int) -> list[Claim]:
    """For these LoRA ranks. The paper's figures are those of Gemma 2B with 2 loops, after 15 billion tokens."""
    svd = [f"average-r{r}" for r in (low, mid, top)]
    zero, stepwise_svd, relaxed_self = f"average-r{top}-zero", f"stepwise-r{top}", f"exits-self-r{mid}"
    first, last = ({name: Measured(f"exits-{name}", loop) for name in ("none", "weighted", "self", "self-average")}
                   for loop in (0, -1))
    relaxed_first, relaxed_last = Measured(relaxed_self, 0), Measured(relaxed_self, -1)

    def shown(*names: str, paper=()) -> dict[Measured, str]:
        return dict(zip(map(Measured, names), [*paper, *[""] * len(names)], strict=False))

    return [
        Claim("inits", "tied: stepwise beats average and lower, and these beat random", "perplexity",
              shown("stepwise", "average", "lower", "random", paper=("12.85", "15.15", "15.03", "22.66")),
              [*lower("stepwise", "average", "random"), *lower("stepwise", "lower", "random")]),
        Claim("relaxed", "relaxed: average + SVD beats a LoRA from zero, and stepwise + SVD", "accuracy",
              shown(svd[2], zero, stepwise_svd, paper=("55.5", "49.0", "50.5")),
              [*lower(svd[2], zero), *lower(svd[2], stepwise_svd)]),
        Claim("rank", "a higher rank gives a lower loss, and each is lower after training than before", "accuracy",
              shown(*svd, paper=("52.1", "54.2", "55.5")),
              [*lower(svd[2], svd[1], svd[0]), *(c for name in svd for c in lower(name, Measured(name, -1, False)))]),
        Claim("distill", "distillation helps", "accuracy",
              shown("stepwise", "stepwise-fkl", svd[2], f"{svd[2]}-fkl", paper=("51.7", "53.4")),
              [*lower("stepwise-fkl", "stepwise"), *lower(f"{svd[2]}-fkl", svd[2])]),
        Claim("pretrained", "pretrained weights beat random ones", "perplexity",
              shown("stepwise", "scratch", "full", paper=("12.85", "22.63")), lower("stepwise", "scratch")),
        Claim("exits", "aggressive 0.1 with self-distillation keeps the last loop and lifts the first", "accuracy",
              {last["none"]: "51.7 (before)", last["weighted"]: "50.5", last["self"]: "52.6",
               first["none"]: "", first["weighted"]: "49.8", first["self"]: "48.0"},
              [Comparison(last["self"], last["none"], alike=True), *lower(first["self"], first["none"])]),
        Claim("relaxed_exits", "relaxation makes the first exit worse", "accuracy",
              {first["self"]: "48.8", first["self-average"]: "", relaxed_first: "40.8 (r 64)",
               last["self"]: "54.0", last["self-average"]: "", relaxed_last: "54.0 (r 64)"},
              [*lower(first["self"], relaxed_first), *lower(first["self-average"], relaxed_first)]),
        Claim("norms", "zero-initialised norms are disastrous, averaged ones as good as picked ones", "",
              shown("average", "norms-pick", "norms-one", "norms-zero"),
              [*lower("average", "norms-zero"),
               Comparison(Measured("average"), Measured("norms-pick"), alike=True)])]
