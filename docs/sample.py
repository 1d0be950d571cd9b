"""Draw generate.py's answers as an SVG, each token on a ground that tells how many layers it ran through.

    python generate.py --ckpt tiny --threshold 0.9 --limit 8 --json | python docs/sample.py tiny 8 > docs/sample.svg
"""
import json
import sys
import textwrap
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from data import INPUT, RESPONSE, Tokenizer, run  # noqa: E402
from model import find_checkpoint  # noqa: E402

WIDTH, LINE, X, RIGHT = 8.4, 26, 12, 720         # of a monospaced letter, of a line, the margins; in pixels


def shade(depth, layers):
    """(ground, ink), from a pale ground for the first layers to a dark one for all of them: readable in black and white."""
    x = (depth / layers) ** 2
    return f"rgb({int(235 - 170 * x)},{int(245 - 130 * x)},{int(225 - 60 * x)})", "#fff" if x > 0.7 else "#111"


def text(x, y, s, colour):
    return f'<text x="{x:.1f}" y="{y}" fill="{colour}" xml:space="preserve">{escape(s)}</text>'


def token(out, left, x, y, s, depth, layers):
    """Add a token at (x, y), or, if it does not fit there, at `left` on the next line. Returns where the next one goes."""
    ground, ink = shade(depth, layers)
    ends, s = "\n" in s, s.replace("\n", "") or "↵"
    if x + WIDTH * len(s) > RIGHT:
        x, y = left, y + LINE
    out += [f'<rect x="{x:.1f}" y="{y - 16}" width="{WIDTH * len(s):.1f}" height="22" fill="{ground}"/>', text(x, y, s, ink)]
    return (left, y + LINE) if ends else (x + WIDTH * len(s), y)


def main():
    tokenizer, layers = Tokenizer.load(find_checkpoint(sys.argv[1])), int(sys.argv[2])
    out, y, depths = [], LINE, set()
    for line in sys.stdin:
        a = json.loads(line)
        question = tokenizer.decode(a["prompt_tokens"]).split("### Instruction:\n")[-1].removesuffix(RESPONSE)
        for row in textwrap.wrap(question.replace(INPUT, "  "), int((RIGHT - X) / WIDTH), drop_whitespace=False):
            out.append(text(X, y, row, "#555"))
            y += LINE
        left, shown = X + 2 * WIDTH, ""
        x = left
        for i, depth in enumerate(a["exits"]):
            whole = tokenizer.decode(a["tokens"][:i + 1], a["prompt_tokens"])
            s, shown = ("·", shown) if whole.endswith("\ufffd") else (whole[len(shown):] or "⏎", whole)    # a part of a character; the end
            x, y = token(out, left, x, y, s, depth, layers)
            depths.add(depth)
        y += LINE + 8
    x = X
    for depth in sorted(depths):
        x, y = token(out, X, x, y, f" {depth} of {layers} layers ", depth, layers)
    print(f'<svg xmlns="http://www.w3.org/2000/svg" width="{RIGHT}" height="{y + 20}" font-family="monospace" font-size="14">'
          f'<rect width="100%" height="100%" fill="#fff"/>{"".join(out)}</svg>')


if __name__ == "__main__":
    run(main)
