"""What is compared: every arm of the experiments as data, and for each donor the text, the lengths and the seeds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Arm:
    """One way to make a smaller model of a donor."""
    name: str
    label: str
    flags: str                             # of train.py; {work} is the folder of the starts that matrix.py prepares
    family: str                            # tied, relaxed, calibrated, low rank, full or scratch
    base: str = ""                         # exits: the arm that is trained on


@dataclass(frozen=True)
class Study:
    """The arms of a donor, and how they are trained and measured."""
    donor: str
    data: str
    valid: str                             # what the learning rates are chosen on
    test: str                              # a folder with a text for each book, on which nothing is chosen
    windows: int                           # of seq_len tokens, of each book
    flags: str                             # of every run
    seq_len: int
    batch_tokens: int
    seeds: tuple[int, ...]
    tokens: int
    exit_tokens: int                       # post-training of the exits, on the text after `tokens`
    rate_seed: int                         # the learning rates are chosen with another seed, in shorter runs
    rate_tokens: int
    exit_rate_tokens: int
    grid: tuple[float, ...]                # learning rates, ascending
    first: tuple[float, ...]               # those of the grid that are tried first
    arms: tuple[Arm, ...]
    checked: tuple[str, ...] = ()          # arms whose neighbouring rates are also tried at full length

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)


def toy_arms() -> tuple[Arm, ...]:
    """LoRA ranks of 6, 24 and 48 are the shares of the width that 64, 256 and 512 are in Gemma 2B."""
    tied = [Arm(init, f"tied, {init}", f"--init={init} --distill=none", "tied")
            for init in ("stepwise", "average", "lower")]
    svd = [Arm(f"average-r{r}", f"average + SVD, r {r}", f"--init=average --rank={r} --distill=none", "relaxed")
           for r in (6, 24, 48)]
    calibrated = [Arm(f"calibrated-r{r}", f"calibrated, r {r}", f"--init=calibrated --rank={r} --distill=none",
                      "calibrated") for r in (6, 24, 48)]
    low_rank = [Arm(f"low-rank-{r}", f"plain low rank, as large as r {r}",
                    f"--ckpt={{work}}/low-rank-{r} --distill=none", "low rank") for r in (6, 24)]
    return (
        *tied, *svd, *low_rank, *calibrated,
        Arm("random", "tied, random", "--init=random --distill=none", "tied"),
        Arm("average-r48-zero", "average, LoRA from zero, r 48",
            "--init=average --rank=48 --lora_init=zero --distill=none", "relaxed"),
        Arm("stepwise-r48", "stepwise + SVD, r 48", "--init=stepwise --rank=48 --distill=none", "relaxed"),
        Arm("stepwise-fkl", "tied, stepwise, forward KL", "--init=stepwise --distill=fkl", "tied"),
        Arm("average-r48-fkl", "average + SVD, r 48, forward KL", "--init=average --rank=48 --distill=fkl", "relaxed"),
        Arm("full", "full size, same tokens", "--loops=1 --distill=none", "full"),
        Arm("scratch", "as large as tied, from scratch", "--init=scratch --donor={work}/half --distill=none",
            "scratch"),
        Arm("norms-pick", "tied, average, norms of the first loop", "--init=average --norms=pick --distill=none",
            "tied"),
        Arm("norms-one", "tied, average, norm gains 1", "--ckpt={work}/gain-1 --distill=none", "tied"),
        Arm("norms-zero", "tied, average, norm gains 0", "--ckpt={work}/gain-0 --distill=none", "tied"),
        Arm("exits-none", "no exit losses", "--exit_loss=last --distill=none", "tied", "stepwise"),
        Arm("exits-weighted", "weighted", "--exit_loss=weighted --distill=none", "tied", "stepwise"),
        *(Arm(f"exits-self{suffix}", f"aggressive 0.1, self-distilled{label}",
              "--exit_loss=aggressive --exit_coef=0.1 --exit_distill --distill=none", family, base)
          for suffix, label, family, base in (("", "", "tied", "stepwise"),
                                              ("-average", ", tied average", "tied", "average"),
                                              ("-r24", ", average + SVD, r 24", "relaxed", "average-r24"))))


STUDIES = {
    "toy": Study(
        donor="assets/donor", data="assets/books/train", valid="assets/books/valid.txt", test="assets/books/test",
        windows=64, flags="--micro_batch=8 --eval_tokens=8192 --eval_every=64 --save_every=64", seq_len=256,
        batch_tokens=2048, seeds=(0, 1, 2, 3, 4), tokens=524_288, exit_tokens=131_072, rate_seed=100,
        rate_tokens=131_072, exit_rate_tokens=65_536, grid=(3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
        first=(3e-4, 1e-3), arms=toy_arms(), checked=("stepwise", "average-r24", "low-rank-24", "average-r48")),
    "smollm2": Study(
        donor="HuggingFaceTB/SmolLM2-135M", data="assets/books/train", valid="assets/books/valid.txt",
        test="assets/books/test", windows=16, flags="--micro_batch=4 --eval_tokens=4096 --eval_every=32 "
        "--save_every=16", seq_len=256, batch_tokens=1024, seeds=(0,), tokens=131_072, exit_tokens=0, rate_seed=100,
        rate_tokens=16_384, exit_rate_tokens=0, grid=(1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3), first=(5e-4, 1e-3),
        arms=(Arm("stepwise", "tied, stepwise", "--init=stepwise", "tied"),
              Arm("average", "tied, average", "--init=average", "tied"),
              Arm("average-r64", "average + SVD, r 64", "--init=average --rank=64", "relaxed"),
              Arm("calibrated-r64", "calibrated, r 64", "--init=calibrated --rank=64", "calibrated"),
              Arm("low-rank-64", "plain low rank, as large as r 64", "--ckpt={work}/low-rank-64", "low rank"))),
}
