"""Speed of tokenising texts into shards (lib/shards.py), beside the tokenizer's own batch encoding.

    python -m benchmarks.tokenise --donor=FOLDER --text=FILES --rounds=4
"""

import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import check_at_least, run_and_publish
from lib.cli import parse_args, progress, script, table
from lib.donors import find_donor
from lib.shards import Texts, write_shards
from lib.tokenizer import Tokenizer


@dataclass
class TokeniseConfig:
    donor: str = "assets/donor"            # whose tokenizer, a folder or a Hugging Face id
    text: str = "assets/books/valid.txt"   # text that is tokenised: files or folders, by comma
    rounds: int = 1                        # how often both are timed
    tmp: str | None = None                 # folder with room for the shards; not set = the system's
    save: str | None = None                # also append the JSON line to this file


def bench_tokenise(config: TokeniseConfig) -> dict:
    """Tokens/s of `write_shards`, from text files to shards on the disk, and of the tokenizer's batch encoding of the
    same documents in memory. They take turns; medians over the rounds."""
    tokenizer, documents = Tokenizer.load(find_donor(config.donor)), list(Texts(config.text))
    seconds, total = {"tokenizer alone": [], "data.py": []}, 0
    for _ in progress(range(config.rounds), desc="rounds"):
        began = time.perf_counter()
        if tokenizer.fast:
            ids = tokenizer.fast.encode_batch(documents, add_special_tokens=False)
        else:
            ids = tokenizer.ranks.encode_ordinary_batch(documents, num_threads=os.cpu_count() or 1)
        seconds["tokenizer alone"].append(time.perf_counter() - began)
        del ids                                              # freed here, so that it is not timed
        with tempfile.TemporaryDirectory(dir=config.tmp) as tmp:
            began = time.perf_counter()
            total, _ = write_shards(config.text, tokenizer, Path(tmp) / "out", tokenizer.vocab_size)
            seconds["data.py"].append(time.perf_counter() - began)
    speed = {name: total / statistics.median(s) for name, s in seconds.items()}
    ratio = speed["data.py"] / speed["tokenizer alone"]
    lines = [["code", "tok/s", "of the first"], ["tokenizer alone", f"{speed['tokenizer alone']:,.0f}", "1.00"],
             ["data.py", f"{speed['data.py']:,.0f}", f"{ratio:.2f}"]]
    print(f"{len(documents):,} documents, {total:,} tokens\n{table(lines)}")
    return {"documents": len(documents), "tokens": total, "tokens_per_s": speed, "ratio": ratio, "seconds": seconds}


def main(argv=None):
    config = parse_args(TokeniseConfig, argv)
    check_at_least(config, 1, "rounds")
    run_and_publish("tokenise", config, bench_tokenise)


if __name__ == "__main__":
    script(main)
