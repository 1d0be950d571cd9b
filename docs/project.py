"""What LLaMA-2 7B and 13B would save if their tokens left where a small model's did: a projection, not a measurement.

    python docs/project.py results/smol-1a2b3c4d.jsonl

reads the answers that eval.py wrote.  A token that left at layer n of L is taken to leave at the same share of the larger
model's depth (to the nearest layer), after as many checks.  What that costs is then eval.py's arithmetic (`costs`) with the
larger model's shape; a check chooses among 2048 frequent tokens and the context's.
"""
import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from data import Tokenizer, run  # noqa: E402
from docs.report import table  # noqa: E402
from eval import costs, read_answers  # noqa: E402
from model import InputError, ModelArgs, Transformer  # noqa: E402
from train import SHORTLIST  # noqa: E402

SHAPES = {"7B": ModelArgs(4096, 32, 32, vocab_size=32000), "13B": ModelArgs(5120, 40, 40, vocab_size=32000)}


def project(shape, lines, setting, prompts, exits, L, recompute=False):
    """{count: share saved} of a setting's answers, given by a model of L layers that asks at exits, in one of the given shape.
    recompute: as the answers were given, with K and V of skipped layers recomputed."""
    with torch.device("meta"):
        model = Transformer(shape).to(torch.bfloat16)
    total = {}
    for line, prompt in zip(lines, prompts):
        left = np.array(line["runs"][setting]["exits"], dtype=int)
        n = np.rint(left / L * shape.n_layers).astype(int)
        a = SimpleNamespace(prompt=prompt, sizes=SHORTLIST + len(prompt) + 1 + np.arange(len(n)))
        asks = sum((left >= exit for exit in exits), 0 * n)
        for key, x in costs(model, a, n, asks, shape.n_layers, recompute).items():
            total[key] = total.get(key, 0) + x
        for key, x in costs(model, a, [shape.n_layers] * len(n), 0, shape.n_layers).items():
            total[f"full {key}"] = total.get(f"full {key}", 0) + x
    return {key: 1 - total[key] / total[f"full {key}"] for key in ("layers", "FLOPs", "bytes")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("answers", type=Path, help="a .jsonl that eval.py wrote")
    path = parser.parse_args().answers
    header, lines = read_answers(path)
    lines = [line for line in lines.values() if "runs" in line]
    if not any(line["runs"]["full depth"]["steps"] for line in lines):
        raise InputError(f"{path}: found no answers of two tokens or more; expected a .jsonl that eval.py wrote")
    rules, folder = header["rules"], header["settings"]["ckpt"]
    L, tokenizer = rules["full depth"][0], Tokenizer.load(folder)
    prompts = [tokenizer.encode(line["prompt"], bos=True) for line in lines]
    rows, recompute = {}, header["settings"].get("recompute")
    for setting in (name for name in rules if name.startswith(("threshold", "lite.json"))):
        for name, shape in SHAPES.items():
            exits = [int(exit) for exit, t in rules[setting][1].items() if t < 1]
            saved = project(shape, lines, setting, prompts, exits, L, recompute)
            rows[f"{name}, {setting}"] = [f"{100 * x:.1f}" for x in saved.values()]
    table("projected, saved %", ("layers", "FLOPs", "bytes"), rows)


if __name__ == "__main__":
    run(main)
