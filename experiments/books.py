"""Cleans books of Project Gutenberg: python -m experiments.books FOLDER OUT

Reads FOLDER/train*.jsonl.gz and FOLDER/valid*.jsonl.gz (one book per line: title, text) and writes
OUT/train.jsonl and OUT/valid.jsonl with one line per paragraph. A model that sees the hard line breaks of the
digital edition spends its capacity on counting to seventy-two.
"""

import gzip
import json
import re
import sys
from pathlib import Path

BOILERPLATE = re.compile(
    r"[^\n]*\w\*{3}$|.*\b(?:transcribed (?:by|from)|produced by|e-?text (?:prepared|was)|this e-?(?:text|book)|"
    r"prepared by|proof(?:ed|read)|scanned|digiti[sz]ed|project gutenberg|pgdp\.net|gutenberg\.org|"
    r"transcriber['’]?s?['’]? notes?|html version|distributed proof\w*)", re.I | re.S)
SMALL_PRINT = re.compile(r"\*END\W*THE SMALL PRINT[^\n]*\n|\*\*\* ?START OF TH[^\n]*\n", re.I)
BRACKETED = re.compile(r"\[(?:illustration|picture|frontispiece|image|pg|page)\b[^\]]{0,1000}\]|\{\d+\}", re.I)


def clean(text: str) -> str:
    """The book with one line per paragraph and a blank line between them, without italics. Verse, drama and
    tables of contents keep their lines."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").lstrip("\ufeff")
    small_print = SMALL_PRINT.search(text[:30_000])
    if small_print:
        text = text[small_print.end():]
    text = BRACKETED.sub("", text).replace("_", "")
    kept = []
    blocks = re.split(r"\n\s*\n", text)
    for i, block in enumerate(blocks):
        lines = [" ".join(line.split()) for line in block.split("\n")]
        lines = [line for line in lines if line]
        # Only at the two ends of a book do such words mark boilerplate.
        if not lines or ((i < 40 or i > len(blocks) - 20) and len(block) < 1500 and BOILERPLATE.match(block)):
            continue
        if not re.search(r"\w", block):                      # a rule or a row of asterisks, always written alike
            kept.append("* * *")
            continue
        full = lines[:-1] or lines                           # the last line of a paragraph may be short
        wrapped = sum(map(len, full)) / len(full) >= 45
        kept.append(" ".join(lines) if wrapped else "\n".join(lines))
    return "\n\n".join(kept) + "\n"


def middle(text: str, characters: int = 62_000) -> str:
    """Whole paragraphs from the middle of a book: 64 windows of 256 tokens, with the shipped tokenizer."""
    start = text.rfind("\n\n", 0, (len(text) - characters) // 2) + 2
    return text[start:text.find("\n\n", start + characters) + 1]


def main(source: str, out: str) -> None:
    (Path(out) / "test").mkdir(parents=True, exist_ok=True)
    for split in ("train", "valid"):
        books = characters = 0
        with open(Path(out) / f"{split}.jsonl", "w", encoding="utf-8") as sink:
            for path in sorted(Path(source).glob(f"{split}*.jsonl.gz")):
                with gzip.open(path, "rt", encoding="utf-8") as lines:
                    for line in lines:
                        book = json.loads(line)
                        title, text = " ".join(book["title"].split()), clean(book["text"])
                        sink.write(json.dumps({"title": title, "text": text}, ensure_ascii=False) + "\n")
                        books, characters = books + 1, characters + len(text)
                        if split == "valid":
                            name = re.sub(r"\W+", "_", title.lower())[:40].strip("_")
                            (Path(out) / "test" / f"{name}.txt").write_text(middle(text), encoding="utf-8")
        print(f"{split}: {books} books, {characters:,} characters")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
