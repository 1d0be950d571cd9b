"""Draw which (token, layer) cells an answer computed, copied and verified, from two lines of generate.py's JSON.

    ask() { python generate.py --ckpt tiny --threshold 0.9 --json "$@" "Reverse rat hat bed pig box cap."; }
    (ask; ask --verify) | python docs/drawing.py tiny 8 > docs/cells.svg

The first line is an early-exit answer, the second --verify's. A column is a token that was put in (below) and what came out (above).
(The JSON does not tell of rounds whose drafts were all refused: such a column is drawn as if it had gone up alone.)
"""
import json
import sys
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from data import Tokenizer, run  # noqa: E402
from model import find_checkpoint  # noqa: E402

W, H, LEFT = 58, 20, 70                  # of a cell, of the margin; in pixels
LOOK = {  # fill, letter, legend: readable in black and white
    "computed": ("#3d6fa5", "", "computed, alone"), "copied": ("#dfe8f2", "c", "K and V made later, from the state below"),
    "never": ("#ffffff", "", "not made: no later token came by"), "verified": ("#9dbb8a", "v", "computed together, to verify drafts")}


def early(depths, layers):
    """Cells of early exit, a list a token: computed up to its exit; above, copied if a later token visits the layer."""
    return [["computed" if n <= depth else "copied" if any(d >= n for d in depths[i + 1:]) else "never"
             for n in range(1, layers + 1)] for i, depth in enumerate(depths)]


def verified(depths, layers):
    """Cells of --verify. A round is tokens chosen at an exit n and one chosen by the last layer: all rows alone up to n, then together."""
    cells, n = [], layers
    for depth in depths:
        n = min(n, depth)
        cells.append(["computed" if k <= n else "verified" for k in range(1, layers + 1)])
        n = layers if depth == layers else n
    return cells


def text(x, y, s, size=12, anchor="middle"):
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" xml:space="preserve">{escape(s)}</text>'


def panel(title, cells, tokens, layers, y):
    """One grid, its top at y: layers upwards, tokens to the right."""
    out = [text(LEFT, y - 26, title, 14, "start")]
    for i, column in enumerate(cells):
        x = LEFT + i * W
        out += [text(x + W / 2, y - 6, tokens[i + 1]), text(x + W / 2, y + layers * H + 16, tokens[i])]
        for k, name in enumerate(column):
            fill, letter, _ = LOOK[name]
            top = y + (layers - 1 - k) * H
            out.append(f'<rect x="{x}" y="{top}" width="{W}" height="{H}" fill="{fill}" stroke="#666"/>')
            out.append(text(x + W / 2, top + 14, letter))
    return out + [text(LEFT - 8, y + (layers - n) * H + 15, f"layer {n}", 12, "end") for n in range(1, layers + 1)]


def main():
    tokenizer, layers = Tokenizer.load(find_checkpoint(sys.argv[1])), int(sys.argv[2])
    lines = [json.loads(line) for line in sys.stdin]
    out, y = [], 50
    for line, title, draw in zip(lines, ("early exit", "--verify: exits draft, the last layer decides"), (early, verified)):
        tokens = ["(end)" if t == tokenizer.eos else tokenizer.decode([t], line["prompt_tokens"]).strip() for t in line["tokens"]]
        out += panel(title, draw(line["exits"][1:], layers), tokens, layers, y)
        y += layers * H + 80
    for k, (fill, letter, legend) in enumerate(LOOK.values()):
        top = y - 50 + k * (H + 4)
        out += [f'<rect x="{LEFT}" y="{top}" width="{W}" height="{H}" fill="{fill}" stroke="#666"/>',
                text(LEFT + W / 2, top + 14, letter), text(LEFT + W + 10, top + 14, legend, 12, "start")]
    width = LEFT + max(380, W * max((len(line["tokens"]) for line in lines), default=0))         # 380: the longer title's
    print(f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y + 60}" font-family="monospace">'
          f'<rect width="100%" height="100%" fill="#fff"/>{"".join(out)}</svg>')


if __name__ == "__main__":
    run(main)
