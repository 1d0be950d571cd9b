"""Do calibrated thresholds keep their word? On the tiny model, five times over, on questions that calibration never saw.

    python tests/calibration.py                        # 38 minutes on 2 cores

Each seed shuffles the embedded test questions: thresholds for 98 % agreement are chosen on 1500 of them, certified on 1500, and
measured on 1000 more, beside (a) one threshold for all exits, calibrated in the same way, and (b) the best single threshold in
hindsight: the lowest of those from 0.40 to 0.98 that reaches 98 % on the fresh questions themselves, found by bisection.
"""
import math
import random
import sys
from concurrent.futures import ProcessPoolExecutor
from os import cpu_count
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from data import TINY_FOLDER, Tokenizer, embedded, prompt_text, run  # noqa: E402
from docs.calibrate import calibrate  # noqa: E402
from docs.report import rate, table  # noqa: E402
from eval import measure  # noqa: E402
from model import load_meta, read_lite  # noqa: E402

TARGET, CALIBRATE, FRESH, SEEDS = 0.98, 3000, 1000, 5


def row(told, thresholds):
    """Agreement with its clustered standard error, tokens, and shares saved, over the numbers of some answers."""
    agreement, low, high, n = rate([a["agreed"] for a in told], [a["steps"] for a in told], 1.0)
    saved = {key: 1 - sum(a[key] for a in told) / sum(a[f"full_{key}"] for a in told) for key in ("layers", "FLOPs", "bytes")}
    return dict(agreement=agreement, error=(high - low) / 2, n=n, thresholds=thresholds, **saved)


def one(seed):
    """{kind: figures on fresh questions} for one shuffle."""
    torch.set_num_threads(1)
    model, lite, tokenizer = load_meta(TINY_FOLDER, torch.float32).fuse(), read_lite(TINY_FOLDER), Tokenizer.load(TINY_FOLDER)
    how = dict(max_new_tokens=128, eos=tokenizer.eos, frequent=lite["shortlist"])
    prompts = [tokenizer.encode(prompt_text(e), bos=True) for e in random.Random(seed).sample(embedded(4000, "test"), CALIBRATE + FRESH)]
    fresh = lambda t: row([measure(model, p, model.args.n_layers, t, how).numbers for p in prompts[CALIBRATE:]], t)  # noqa: E731
    rows = {}
    for kind, single in (("one an exit", False), ("one for all", True)):
        tries = calibrate(model, prompts[:CALIBRATE], lite["exits"], how, TARGET, single=single)
        rows[kind] = fresh([t for t in tries if t["certified"]][-1]["thresholds"])
    low, high = 0.40, 0.98                               # agreement rises with the threshold, but for noise
    while high - low > 0.01:
        r = fresh(dict.fromkeys(lite["exits"], (low + high) / 2))
        if r["agreement"] >= TARGET:
            high, rows["hindsight"] = (low + high) / 2, r
        else:
            low = (low + high) / 2
    return rows


def main():
    with ProcessPoolExecutor(cpu_count()) as pool:
        results = list(pool.map(one, range(SEEDS)))
    columns = ("agreement", "error", "layers", "FLOPs", "bytes")
    table("on fresh questions, in %; what is saved", [*columns, "tokens", "kept its word", "thresholds"], {f"seed {seed}, {kind}": [
        *(f"{100 * r[key]:.2f}" for key in columns), str(r["n"]), str(r["agreement"] >= TARGET - 2 * r["error"]),
        " ".join(f"{n}: {t:.3f}" for n, t in r["thresholds"].items())] for seed, rows in enumerate(results) for kind, r in rows.items()})
    for other in ("one for all", "hindsight"):
        gaps = [100 * (rows["one an exit"]["layers"] - rows[other]["layers"]) for rows in results]
        mean = sum(gaps) / SEEDS
        error = math.sqrt(sum((x - mean) ** 2 for x in gaps) / (SEEDS - 1) / SEEDS)
        print(f"one threshold an exit saves {mean:+.2f} (standard error {error:.2f}) points more of the layers than {other}")


if __name__ == "__main__":
    run(main)
