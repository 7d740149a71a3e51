"""Draws what sample.py --show_exits prints as an SVG: each token coloured by the loop after which it exited.

    python sample.py --ckpt=out_exits --show_exits --max_new_tokens=120 | python -m experiments.exits_svg > exits.svg
"""

import argparse
import re
import sys
from html import escape

COLOURS = ("#1a7f37", "#9a6700", "#8250df", "#1b7c83", "#0550ae", "#cf222e")     # of loops 1, 2, ...
PLAIN, WIDTH, LINE = "#57606a", 88, 20                       # colour of the prompt; characters and pixels per line
BOLD = ' font-weight="bold"'                                 # of loop 1, for readers who cannot tell the colours apart
DIGITS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")


def pieces(text: str, prompt: str) -> list[tuple[str, str]]:
    """[(token, colour), ...]. In a pipe sample.py writes subscript digits after each token, its exit loop."""
    found = re.findall(r"([^₀-₉]*)([₀-₉]+)", text.removeprefix(prompt))
    return [(prompt, PLAIN)] + [(piece, COLOURS[(int(loop.translate(DIGITS)) - 1) % len(COLOURS)])
                                for piece, loop in found]


def lines(parts: list[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """The pieces broken between words into lines of at most WIDTH characters."""
    letters = [(letter if letter != "\n" else " ", colour) for piece, colour in parts for letter in piece]
    out, start = [], 0
    while start < len(letters):
        end = min(start + WIDTH, len(letters))
        spaces = [i for i in range(start + 1, end) if letters[i][0] == " "]
        if end < len(letters) and spaces:
            end = spaces[-1] + 1
        line = []
        for letter, colour in letters[start:end]:            # neighbours of the same colour share a span
            if line and line[-1][1] == colour:
                line[-1] = (line[-1][0] + letter, colour)
            else:
                line.append((letter, colour))
        out.append(line)
        start = end
    return out


def draw(rows: list[list[tuple[str, str]]]) -> str:
    height = LINE * len(rows) + 24
    texts = [f'<text x="16" y="{LINE * (i + 1) + 8}" xml:space="preserve">' +
             "".join(f'<tspan fill="{colour}"{BOLD * (colour == COLOURS[0])}>{escape(piece)}</tspan>'
                     for piece, colour in row) + "</text>"
             for i, row in enumerate(rows)]
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 {height}" width="800" '
                      f'height="{height}" font-family="ui-monospace, Menlo, Consolas, monospace" font-size="14">',
                      f'<rect width="800" height="{height}" rx="8" fill="#fff" stroke="#d0d7de"/>', *texts, "</svg>"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="The old man looked at her", help="the prompt that was sampled from")
    prompt = parser.parse_args().prompt
    text, _, legend = sys.stdin.read().rstrip("\n").rpartition("\n")             # the last line is the legend,
    text = text.rpartition("\n(")[0]                                             # the one before: why the sample ended
    names = [(part, PLAIN) if i % 2 == 0 else (f"loop {part}", COLOURS[(int(part) - 1) % len(COLOURS)])
             for i, part in enumerate(re.split(r"loop (\d+)[₀-₉]+", legend))]
    print(draw([*lines(pieces(text, prompt)), [], *lines(names)]))


if __name__ == "__main__":
    main()
