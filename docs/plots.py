"""Draw what eval.py measured and docs/report.py summed up: four pictures, readable in black and white.

    pip install matplotlib
    python docs/plots.py results/tiny-1a2b3c4d.json --plain results/plain-1a2b3c4d.json --out docs/tiny

writes docs/tiny-curve.svg (confidence against agreement), -cost.svg (what is saved against agreement), -exits.svg (where
tokens leave) and, where the set has answers, -loss.svg (loss per layer; --plain: the same without LITE).
"""
import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams |= {"svg.hashsalt": "lite", "svg.fonttype": "none", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
import matplotlib.pyplot as plt  # noqa: E402

INK = ["#000000", "#1f5fa8", "#c2571a", "#7a7a7a", "#2b8a57", "#8a4fa0", "#b8a000", "#555555"]
MARKS, LINES = "osD^vPX*", ["-", "--", "-.", ":"]
SAVED = {"layers": "layers saved %", "FLOPs": "FLOPs saved %", "bytes of weights": "bytes saved %"}


def picture(path, x, y, draw):
    """One SVG, the same bytes for the same data."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    draw(axes)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    print(path)


def whiskers(values):
    """matplotlib's form of [value, low, high] each: the values and the lengths of their intervals' halves."""
    halves = [(v, v if low is None else low, v if high is None else high) for v, low, high in values]
    return [v for v, *_ in values], [[max(0, v - low) for v, low, _ in halves], [max(0, high - v) for v, _, high in halves]]


def curve(axes, part):
    """Confidence against agreement, an exit a line; a point is a bin with 20 tokens or more."""
    axes.plot([0, 1], [0, 1], color="#bbbbbb", label="confidence = agreement")
    for i, (n, bins) in enumerate(part["curve"].items()):
        bins = [b for b in bins if b[4] >= 20]
        if bins:
            y, half = whiskers([b[1:4] for b in bins])
            axes.errorbar([b[0] for b in bins], y, half, color=INK[i % 8], ls=LINES[i % 4], marker=MARKS[i % 8], capsize=2, label=f"exit {n}")


def cost(axes, part):
    """What each threshold saves, counted four ways, against agreement; and what the oracle saves."""
    rows = {name: row for name, row in part["rows"].items() if name.startswith(("threshold", "lite.json"))}
    rows = sorted(rows.values(), key=lambda row: row["agreement %"][0])
    x = [row["agreement %"][0] for row in rows]
    for i, (name, key) in enumerate(SAVED.items()):
        y, half = whiskers([row[key] for row in rows])
        axes.errorbar(x, y, half, color=INK[i], ls=LINES[i], marker=MARKS[i], capsize=2, label=name)
        axes.plot(part["rows"]["full depth"]["agreement %"][0], part["rows"]["oracle"][key][0], color=INK[i], ls="", marker="*", ms=11,
                  label=f"{name}, oracle")
    axes.plot(x, [100 - 100 / row["speed"][0] for row in rows], color=INK[3], ls=LINES[3], marker=MARKS[3], label="time")
    axes.axhline(0, color="#bbbbbb", lw=0.8)


def exits(axes, part, L):
    """Share of tokens by the layer they left at, a group of bars a layer."""
    rows = {name: row["exits"] for name, row in part["rows"].items() if name.startswith(("threshold", "lite.json", "oracle"))}
    layers = sorted({int(n) for row in rows.values() for n in row} | {L})
    for i, (name, row) in enumerate(rows.items()):
        share = [100 * row.get(str(n), 0) / sum(row.values()) for n in layers]
        at = [k + (i - (len(rows) - 1) / 2) * 0.8 / len(rows) for k in range(len(layers))]
        axes.bar(at, share, 0.8 / len(rows), color=str(0.15 + 0.7 * i / max(1, len(rows) - 1)), edgecolor="black", lw=0.6,
                 hatch=["", "//", "..", "xx", "\\\\"][i % 5], label=name)
    axes.set_xticks(range(len(layers)), [str(n) for n in layers])


def loss(axes, results):
    """Teacher-forced loss per layer, of each model a line."""
    for i, (name, result) in enumerate(results.items()):
        axes.plot(*zip(*((n, x) for n, x, _ in result["teacher_forced"])), color=INK[i], ls=LINES[i], marker=MARKS[i], label=name)
    axes.set_ylim(bottom=0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", help="the .json that docs/report.py wrote")
    parser.add_argument("--plain", metavar="JSON", help="that of the same model tuned with --no-lite")
    parser.add_argument("--out", default="docs/eval", metavar="PREFIX", help="of the pictures' names (default: docs/eval)")
    args = parser.parse_args()
    read = lambda path: json.loads(Path(path).read_text())  # noqa: E731
    result = read(args.results)
    part, L = list(result["sets"].values())[-1], result["rules"]["full depth"][0]
    picture(f"{args.out}-curve.svg", "confidence of the exit", "agreement with the last layer", lambda axes: curve(axes, part))
    picture(f"{args.out}-cost.svg", "agreement with full depth, % of tokens", "saved, %", lambda axes: cost(axes, part))
    picture(f"{args.out}-exits.svg", "layers run", "share of tokens, %", lambda axes: exits(axes, part, L))
    if result["teacher_forced"]:
        both = {"with LITE": result} | ({"without": read(args.plain)} if args.plain else {})
        picture(f"{args.out}-loss.svg", "layer", "loss", lambda axes: loss(axes, both))


if __name__ == "__main__":
    main()
