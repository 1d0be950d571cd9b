"""What the answers that eval.py wrote amount to, by set and category, with intervals; and confidence against agreement.

    python docs/report.py results/tiny-1a2b3c4d.jsonl

prints tables, and writes the figures to the .json beside it (for docs/plots.py).  Intervals are 95 %, by prompt: the tokens
of a prompt are not independent.
"""
import argparse
import json
import math
import sys
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from data import run  # noqa: E402
from eval import FULL, ORACLE, read_answers  # noqa: E402
from model import InputError  # noqa: E402

FIGURES = {  # of a setting's numbers, summed over prompts (s), of full depth's (f) and of the oracle's (o)
    "layers": lambda s, f, o: s.layers / s.steps,
    "layers saved %": lambda s, f, o: 100 - 100 * s.layers / s.full_layers,
    "FLOPs saved %": lambda s, f, o: 100 - 100 * s.FLOPs / s.full_FLOPs,
    "bytes saved %": lambda s, f, o: 100 - 100 * s.bytes / s.full_bytes,
    "of the oracle's layers %": lambda s, f, o: 100 * (1 - s.layers / s.full_layers) / (1 - o.layers / f.layers),
    "of the oracle's bytes %": lambda s, f, o: 100 * (1 - s.bytes / s.full_bytes) / (1 - o.bytes / f.bytes),
    "tokens/s": lambda s, f, o: s.steps / s.seconds,
    "speed": lambda s, f, o: s.steps / s.seconds * f.seconds / f.steps,
    "agreement %": lambda s, f, o: 100 * s.agreed / s.steps,
    "exact match %": lambda s, f, o: 100 * s.exact / s.prompts,
    "exact - full depth's": lambda s, f, o: 100 * (s.exact - f.exact) / s.prompts,
    "similarity": lambda s, f, o: s.similarity / s.prompts,
    "perplexity": lambda s, f, o: np.exp(s.loss / s.length),
    "tokens an answer": lambda s, f, o: s.length / s.prompts}


def rate(hits, counts, z=1.96):
    """sum(hits) / sum(counts) over prompts, with its interval: [rate, low, high, n].
    Wilson's interval, for as many independent draws as would vary like the prompts do (the linearised
    variance of a ratio of sums); where nothing varies, for as many as there are prompts."""
    pairs = [(h, c) for h, c in zip(hits, counts) if c]
    n, g = sum(c for _, c in pairs), len(pairs)
    if not n:
        return [None, None, None, 0]
    p = sum(h for h, _ in pairs) / n
    between = sum((h - p * c) ** 2 for h, c in pairs) / n ** 2 * g / max(1, g - 1)
    m = min(n, p * (1 - p) / between) if between > 1e-12 else g                # less is rounding
    centre, half = p + z * z / (2 * m), z * math.sqrt(p * (1 - p) / m + z * z / (4 * m * m))
    return [p, (centre - half) / (1 + z * z / m), (centre + half) / (1 + z * z / m), n]


@lru_cache
def draws(g):
    """How often each of g prompts counts: once; and then as in 1000 samples of g, with replacement. (1001, g)"""
    return np.vstack([np.ones(g), np.random.default_rng(0).multinomial(g, [1 / g] * g, 1000)])


def middle(samples):
    """The ends of the middle 95 % of those samples in which the figure exists, that had something to divide by."""
    known = np.extract(np.isfinite(samples), samples)
    return np.percentile(known, (2.5, 97.5)) if len(known) else (math.nan, math.nan)


def summarise(lines, name):
    """FIGURES of a setting over some prompts: {figure: [value, low, high]}, and the exits that tokens left at.
    Intervals are bootstrapped; those of shares that may reach 1 are Wilson's."""
    runs, weights = [line["runs"][name] for line in lines], draws(len(lines))
    s, f, o = (SimpleNamespace(**{
        key: weights @ np.array([line["runs"][which][key] for line in lines], dtype=float)
        for key, value in runs[0].items() if not isinstance(value, (str, list))}) for which in (name, FULL, ORACLE))
    with np.errstate(all="ignore"):                      # what does not exist is NaN here and None in the end
        many = {key: figure(s, f, o) for key, figure in FIGURES.items()}
        row = {key: [x[0], *middle(x[1:] if len(lines) > 1 else [])] for key, x in many.items()}     # one prompt tells nothing of others
    for key, hits, counts in (("agreement %", "agreed", "steps"), ("exact match %", "exact", "prompts")):
        if None not in (r[hits] for r in runs):
            row[key] = [math.nan if x is None else 100 * x for x in rate([r[hits] for r in runs], [r[counts] for r in runs])[:3]]
    depths = [n for r in runs for n in r["exits"]]
    row = {key: [x if math.isfinite(x) else None for x in map(float, values)] for key, values in row.items()}
    return row | dict(exits={n: depths.count(n) for n in sorted(set(depths))})


def curve(lines, exits):
    """Does confidence predict agreement? Per exit and bin of confidence: [its mean, agreement, low, high, n]."""
    out = {n: [] for n in exits}
    for x, b in ((x, b) for x in range(len(exits)) for b in range(10)):
        tokens = ([*zip(run["sure"][x], run["right"][x])] for run in (line["runs"][FULL] for line in lines))
        inside = [[pair for pair in pairs if min(9, int(pair[0] * 10)) == b] for pairs in tokens]
        counts = [len(pairs) for pairs in inside]
        mean = sum(sure for pairs in inside for sure, _ in pairs) / max(1, sum(counts))
        out[exits[x]].append([mean, *rate([sum(ok for _, ok in pairs) for pairs in inside], counts)])
    return out


def report(lines, exits):
    """All figures, by set and, in it, by category."""
    figures = lambda some: dict(prompts=len(some), steps=sum(line["runs"][FULL]["steps"] for line in some),  # noqa: E731
                                rows={name: summarise(some, name) for name in some[0]["runs"]})
    out, names = {}, list(dict.fromkeys(line["set"] for line in lines))
    for name in names + ["all sets"] * (len(names) > 1):
        mine, groups = [line for line in lines if name in ("all sets", line["set"])], {}
        for line in mine:
            for label in set(line["group"].split("; ")) - {""}:
                groups.setdefault(label, []).append(line)
        out[name] = figures(mine) | dict(curve=curve(mine, exits), groups={
            label: figures(groups[label]) for label in sorted(groups) if name != "all sets"})
    return out


def table(corner, columns, rows):
    """Print rows {name: cells} under the names of columns, aligned."""
    lines = [[corner, *columns], *([name, *cells] for name, cells in rows.items())]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for first, *cells in lines:
        print(f"{first:<{widths[0]}}", *(f"{cell:>{w}}" for cell, w in zip(cells, widths[1:])), sep="  ")
    print()


def cell(values):
    """A figure and half the width of its interval, to three places or so."""
    value, low, high = values
    digits = max(0, 3 - len(str(int(abs(value or 0)))))
    half = "" if None in values else f" ±{(high - low) / 2:.{digits}f}"         # of a prompt alone: unknown
    return "-" if value is None else f"{value:.{digits}f}{half}"


def show(result):
    """Print a result's tables."""
    if result["teacher_forced"]:
        table("teacher-forced, layer", ["loss", "accuracy %"], {
            str(n): [f"{loss:.3f}", f"{100 * hits:.1f}"] for n, loss, hits in result["teacher_forced"]})
    for name, part in result["sets"].items():
        rows = part["rows"]
        table(f"{name}: {part['prompts']} prompts, {part['steps']} tokens", rows, {
            key: [cell(row[key]) for row in rows.values()] for key in FIGURES})
        for key in ("agreement %", "layers saved %", "exact match %") if part["groups"] else ():
            if rows[FULL][key][0] is not None:
                table(f"{key} in {name}", ["prompts", *rows], {
                    label: [str(group["prompts"]), *(cell(row[key]) for row in group["rows"].values())]
                    for label, group in part["groups"].items()})
    table("agreement % (tokens) by confidence", [f"{b / 10:.1f}-{(b + 1) / 10:.1f}" for b in range(10)], {
        f"exit {n}": [f"{100 * b[1]:.1f} ({b[4]})" if b[4] else "-" for b in bins]
        for n, bins in part["curve"].items()})           # of the last part: all sets together, if there are several


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("answers", type=Path, help="a .jsonl that eval.py wrote")
    path = parser.parse_args().answers
    header, lines = read_answers(path)
    losses = next((line["teacher_forced"] for line in lines.values() if "teacher_forced" in line), [])
    lines = [lines[i] for i in sorted(lines) if "runs" in lines[i]]
    if not lines:
        raise InputError(f"{path}: found no answers; expected a .jsonl that eval.py wrote")
    if len(lines) < header.get("prompts", 0):
        print(f"{path}: {len(lines)} of {header['prompts']} answers yet", file=sys.stderr)
    out = path.with_suffix(".json")
    if out == path or out.exists() and not out.read_text().startswith('{"settings"'):
        raise InputError(f"{out}: is not of this script, and would be overwritten; rename the answers")
    exits = [int(name.split()[1]) for name in header["rules"] if name.startswith("first ")]
    result = header | dict(teacher_forced=losses, sets=report(lines, exits))
    out.write_text(json.dumps(result) + "\n")
    show(result)
    print(f"figures, for docs/plots.py: {out}")


if __name__ == "__main__":
    run(main)
