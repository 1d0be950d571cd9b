"""Do calibrated thresholds keep their word? On the tiny model, five times over, on questions that calibration never saw.

    OMP_NUM_THREADS=1 python tests/calibration.py      # MINUTES minutes on one core

Each seed shuffles the embedded test questions: thresholds for 98 % agreement are chosen on 1000 of them, certified on 1000, and
measured on 1000 more, beside (a) one threshold for all exits, calibrated in the same way, and (b) the best single threshold in
hindsight: the lowest of those from 0.40 to 0.98 that reaches 98 % on the fresh questions themselves, found by bisection.
"""
import math
import random
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from data import TINY_FOLDER, Tokenizer, embedded, prompt_text, run  # noqa: E402
from docs.report import rate, table  # noqa: E402
from eval import calibrate, measure  # noqa: E402
from model import load_meta, read_lite  # noqa: E402

TARGET, N = 0.98, 1000


def row(told):
    """Agreement with its clustered standard error, tokens, and shares saved, over the numbers of some answers."""
    agreement, low, high, n = rate([a["agreed"] for a in told], [a["steps"] for a in told], 1.0)
    saved = {key: 1 - sum(a[key] for a in told) / sum(a[f"full_{key}"] for a in told) for key in ("layers", "FLOPs", "bytes")}
    return dict(agreement=agreement, error=(high - low) / 2, n=n, **saved)


def main():
    model, lite = load_meta(TINY_FOLDER, torch.float32).fuse(), read_lite(TINY_FOLDER)
    tokenizer, exits, L, rows = Tokenizer.load(TINY_FOLDER), lite["exits"], model.args.n_layers, {}
    how = dict(max_new_tokens=128, eos=tokenizer.eos, frequent=lite["shortlist"])
    for seed in range(5):
        prompts = [tokenizer.encode(prompt_text(e), bos=True) for e in random.Random(seed).sample(embedded(4000, "test"), 3 * N)]
        fresh = lambda thresholds: row([measure(model, p, L, thresholds, how).numbers for p in prompts[2 * N:]])  # noqa: E731
        certified = [t for t in calibrate(model, prompts[:2 * N], exits, how, TARGET) if t["certified"]]
        for kind in ("one an exit", "one for all"):
            thresholds = [t for t in certified if t["kind"] == kind][-1]["thresholds"]
            rows[f"seed {seed}, {kind}"] = fresh(thresholds) | dict(thresholds=thresholds)
        low, high, best = 0.40, 0.98, None               # agreement rises with the threshold, but for noise
        while high - low > 0.01:
            middle = (low + high) / 2
            r = fresh(dict.fromkeys(exits, middle)) | dict(thresholds={"all": middle})
            low, high, best = (low, middle, r) if r["agreement"] >= TARGET else (middle, high, best)
        rows[f"seed {seed}, hindsight"] = best
        print(f"seed {seed}: " + ", ".join(f"{name}: agreement {r['agreement']:.4f}, layers saved {r['layers']:.4f}" for name, r in rows.items()
                                          if f"seed {seed}" in name), file=sys.stderr)
    columns = ("agreement", "error", "layers", "FLOPs", "bytes")
    table("on fresh questions, %", [*columns, "tokens", "kept its word", "thresholds"], {name: [
        *(f"{100 * r[key]:.2f}" for key in columns), str(r["n"]), str(r["agreement"] >= TARGET - 2 * r["error"]),
        " ".join(f"{n}: {t:.3f}" for n, t in r["thresholds"].items())] for name, r in rows.items()})
    for other in ("one for all", "hindsight"):
        gaps = [rows[f"seed {seed}, one an exit"]["layers"] - rows[f"seed {seed}, {other}"]["layers"] for seed in range(5)]
        mean, spread = sum(gaps) / 5, math.sqrt(sum((x - sum(gaps) / 5) ** 2 for x in gaps) / 4 / 5)
        print(f"one threshold an exit saves {100 * mean:+.2f} ± {100 * spread:.2f} points more of the layers than {other}")


if __name__ == "__main__":
    run(main)
