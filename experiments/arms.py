"""What is compared: every arm of the experiments as data, and for each donor the text, the lengths and the seeds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Arm:
    """One way to make a smaller model of a donor."""
    name: str
    label: str
    flags: str                             # of train.py; {work} is the folder of the starts that matrix.py prepares
    family: str                            # tied, relaxed, calibrated, by need, low rank, full or scratch
    base: str = ""                         # exits: the arm that is trained on
    rate_of: str = ""                      # the arm whose learning rate it takes, instead of trying its own


RANKS_PER_LAYER = ("low rank", "by need")  # the families that low_rank.py loads and trains


def paper_arms(low: int, mid: int, top: int) -> tuple[Arm, ...]:
    """The arms of the paper's eight conclusions, for these LoRA ranks, and the ones that a sceptic asks for."""
    def plain(name: str, label: str, flags: str, family: str) -> Arm:
        return Arm(name, label, f"{flags} --distill=none", family)

    def exits(name: str, label: str, loss: str, family: str, base: str) -> Arm:
        return Arm(f"exits-{name}", label, f"--exit_loss={loss} --distill=none", family, base)

    ranks, self_distilled = (low, mid, top), "aggressive --exit_coef=0.1 --exit_distill"
    return (
        *(plain(init, f"tied, {init}", f"--init={init}", "tied") for init in ("stepwise", "average", "lower")),
        *(plain(f"average-r{r}", f"average + SVD, r {r}", f"--init=average --rank={r}", "relaxed") for r in ranks),
        *(plain(f"low-rank-{r}", f"plain low rank, as large as {f'r {r}' if r else 'tied'}",
                f"--ckpt={{work}}/low-rank-{r}", "low rank") for r in (0, low, mid)),
        plain("calibrated-r0", "tied, calibrated", "--init=calibrated", "calibrated"),
        *(plain(f"calibrated-r{r}", f"calibrated, r {r}", f"--init=calibrated --rank={r}", "calibrated")
          for r in ranks),
        plain("random", "tied, random", "--init=random", "tied"),
        plain(f"average-r{top}-zero", f"average, LoRA from zero, r {top}",
              f"--init=average --rank={top} --lora_init=zero", "relaxed"),
        plain(f"stepwise-r{top}", f"stepwise + SVD, r {top}", f"--init=stepwise --rank={top}", "relaxed"),
        Arm("stepwise-fkl", "tied, stepwise, forward KL", "--init=stepwise --distill=fkl", "tied"),
        Arm(f"average-r{top}-fkl", f"average + SVD, r {top}, forward KL",
            f"--init=average --rank={top} --distill=fkl", "relaxed"),
        plain("full", "full size, same tokens", "--loops=1", "full"),
        plain("scratch", "as large as tied, from scratch", "--init=scratch --donor={work}/half", "scratch"),
        plain("norms-pick", "tied, average, norms of the first loop", "--init=average --norms=pick", "tied"),
        plain("norms-one", "tied, average, norm gains 1", "--ckpt={work}/gain-1", "tied"),
        plain("norms-zero", "tied, average, norm gains 0", "--ckpt={work}/gain-0", "tied"),
        plain("stepwise-kv", "tied, stepwise, shared KV", "--init=stepwise --kv=first_loop", "tied"),
        plain(f"average-r{mid}-kv", f"average + SVD, r {mid}, shared KV",
              f"--init=average --rank={mid} --kv=first_loop", "relaxed"),
        plain(f"calibrated-r{mid}-kv", f"calibrated, r {mid}, shared KV",
              f"--init=calibrated --rank={mid} --kv=first_loop", "calibrated"),
        exits("none", "no exit losses", "last", "tied", "stepwise"),
        exits("weighted", "weighted", "weighted", "tied", "stepwise"),
        exits("self", "aggressive 0.1, self-distilled", self_distilled, "tied", "stepwise"),
        exits("self-kv", "the same, shared KV", self_distilled, "tied", "stepwise-kv"),
        exits("self-average", "the same, tied average", self_distilled, "tied", "average"),
        exits(f"self-r{mid}", f"the same, average + SVD, r {mid}", self_distilled, "relaxed", f"average-r{mid}"))


def arms_of_size(ranks: tuple[int, ...], flags: str = "", rates_of: int = 0) -> tuple[Arm, ...]:
    """Plain low rank and calibrated sharing, of the sizes that these LoRA ranks have with two loops. rates_of: the rank
    at whose size the learning rates of all are tried."""
    return tuple(Arm(f"{name}-{r}", f"{label}, as large as r {r}", f"--ckpt={{work}}/{name}-{r} {flags}", family,
                     rate_of=f"{name}-{rates_of}" if rates_of not in (0, r) else "")
                 for r in ranks for name, label, family in (
                     ("low-rank", "plain low rank", "low rank"), ("one-rank", "calibrated", "calibrated"),
                     ("by-need", "calibrated, ranks by need", "by need")))


@dataclass(frozen=True)
class Study:
    """The arms of a donor, and how they are trained and measured."""
    donor: str
    data: str
    valid: str                             # what the learning rates are chosen on
    windows: int                           # of seq_len tokens, of each book
    flags: str                             # of every run
    seq_len: int
    batch_tokens: int
    seeds: tuple[int, ...]
    tokens: int
    exit_tokens: int                       # post-training of the exits, on the text after `tokens`
    rate_tokens: int                       # of the short runs that the learning rates are chosen by
    exit_rate_tokens: int
    grid: tuple[float, ...]                # learning rates, ascending
    first: tuple[float, ...]               # those of the grid that are tried first
    arms: tuple[Arm, ...]
    ranks: tuple[int, ...]
    checked: tuple[str, ...] = ()          # arms whose neighbouring rates are also tried at full length
    rate_seed: int = 100                   # of the short runs and the checks, and of nothing else
    test: str = "assets/books/test"        # a folder with a text for each book, on which nothing is chosen

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)


STUDIES = {
    # Ranks of 6, 24 and 48 are the shares of the width that 64, 256 and 512 are in Gemma 2B.
    "toy": Study(
        donor="assets/donor", data="assets/books/train", valid="assets/books/valid.txt", windows=64,
        flags="--micro_batch=8 --eval_tokens=8192 --eval_every=64 --save_every=64", seq_len=256, batch_tokens=2048,
        seeds=(0, 1, 2, 3, 4), tokens=524_288, exit_tokens=131_072, rate_tokens=131_072, exit_rate_tokens=65_536,
        grid=(3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2), first=(3e-4, 1e-3), arms=paper_arms(6, 24, 48),
        ranks=(6, 24, 48), checked=("stepwise", "average-r24", "low-rank-24", "average-r48")),
    # Sharing and plain low rank at two sizes, distilled, on a GPU. out_books: other books, as gpu.sh writes them.
    "smollm2": Study(
        donor="HuggingFaceTB/SmolLM2-135M", data="out_books", valid="assets/books/valid.txt", windows=24,
        flags="--micro_batch=16 --eval_tokens=8192 --eval_every=64 --save_every=128", seq_len=512, batch_tokens=8192,
        seeds=(0, 1, 2), tokens=1_048_576, exit_tokens=0, rate_tokens=262_144, exit_rate_tokens=0,
        grid=(3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2), first=(3e-4, 1e-3), ranks=(64,),
        arms=(Arm("stepwise", "tied, stepwise", "--init=stepwise", "tied"),
              Arm("average", "tied, average", "--init=average", "tied"),
              Arm("low-rank-0", "plain low rank, as large as tied", "--ckpt={work}/low-rank-0", "low rank"),
              Arm("average-r64", "average + SVD, r 64", "--init=average --rank=64", "relaxed"),
              Arm("calibrated-r64", "calibrated, r 64", "--init=calibrated --rank=64", "calibrated"),
              Arm("low-rank-64", "plain low rank, as large as r 64", "--ckpt={work}/low-rank-64", "low rank"),
              Arm("full", "full size, same tokens", "--loops=1", "full"))),
    # The same ways to store at 60, 70, 80 %, and at 52, 59, 68, 75 %: short runs, for a CPU.
    "sizes": Study(
        donor="assets/donor", data="assets/books/train", valid="assets/books/valid.txt", windows=16,
        flags="--micro_batch=8 --eval_tokens=8192 --eval_every=64 --save_every=64", seq_len=256, batch_tokens=2048,
        seeds=(0, 1, 2), tokens=131_072, exit_tokens=0, rate_tokens=65_536, exit_rate_tokens=0,
        grid=(3e-5, 1e-4, 3e-4, 1e-3), first=(1e-4, 3e-4), arms=arms_of_size((11, 22, 33), "--distill=none"),
        ranks=()),
    "smollm2-sizes": Study(
        donor="HuggingFaceTB/SmolLM2-135M", data="out_books", valid="assets/books/valid.txt", windows=3,
        flags="--micro_batch=2 --eval_tokens=1024 --eval_every=100 --save_every=40", seq_len=512, batch_tokens=1024,
        seeds=(0,), tokens=65_536, exit_tokens=0, rate_tokens=16_384, exit_rate_tokens=0,
        grid=(3e-5, 1e-4, 3e-4, 1e-3), first=(1e-4, 3e-4), arms=arms_of_size((64, 8, 32, 88), rates_of=64), ranks=()),
    # The paper's arms on a GPU: experiments/gpu.sh.
    "smollm2-gpu": Study(
        donor="HuggingFaceTB/SmolLM2-135M", data="out_books", valid="out_books/valid", windows=64,
        flags="--micro_batch=16 --eval_tokens=65_536 --eval_every=40 --save_every=80 --compile", seq_len=1024,
        batch_tokens=65_536, seeds=(0, 1, 2), tokens=20_971_520, exit_tokens=5_242_880, rate_tokens=2_621_440,
        exit_rate_tokens=1_310_720, grid=(3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2), first=(3e-4, 1e-3),
        arms=paper_arms(16, 64, 256), ranks=(16, 64, 256), checked=("stepwise", "average-r64", "low-rank-64")),
}
