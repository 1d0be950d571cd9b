"""What LLaMA-2 7B and 13B would save if their tokens left where a small model's did: a projection, not a measurement.

    python docs/project.py results/smol-1a2b3c4d.jsonl

reads the answers that eval.py wrote.  A token that left at layer n of L is taken to leave at the exit of the larger model next
to the same share of its depth, and a token that ran through all layers to do so again.  What that costs is then eval.py's
arithmetic (`costs`) with the larger model's shape, checks on the 2048 frequent tokens and the context included.
"""
import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from data import Tokenizer  # noqa: E402
from docs.cli import run  # noqa: E402
from docs.report import table  # noqa: E402
from eval import costs  # noqa: E402
from model import InputError, ModelArgs, Transformer, default_exits  # noqa: E402
from train import SHORTLIST  # noqa: E402

SHAPES = {"7B": ModelArgs(vocab_size=32000), "13B": ModelArgs(dim=5120, n_layers=40, n_heads=40, vocab_size=32000)}


def project(shape, lines, setting, prompts, L):
    """{count: share saved} of a setting's answers, whose exits are of L layers, in a model of the given shape."""
    with torch.device("meta"):
        model = Transformer(shape).to(torch.bfloat16)
    exits, total = default_exits(shape.n_layers), {}
    for line, prompt in zip(lines, prompts):
        n = np.array([shape.n_layers if n == L else min(exits, key=lambda exit: abs(exit / shape.n_layers - n / L))
                      for n in line["runs"][setting]["exits"]], dtype=int)
        a = SimpleNamespace(prompt=prompt, sizes=SHORTLIST + len(prompt) + np.arange(len(n)))
        asks = sum(n >= exit for exit in exits)
        for key, x in costs(model, a, n, asks, shape.n_layers).items():
            total[key] = total.get(key, 0) + x
        for key, x in costs(model, a, [shape.n_layers] * len(n), 0, shape.n_layers).items():
            total[f"full {key}"] = total.get(f"full {key}", 0) + x
    return {key: 1 - total[key] / total[f"full {key}"] for key in ("layers", "FLOPs", "bytes")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("answers", type=Path, help="a .jsonl that eval.py wrote")
    path = parser.parse_args().answers
    try:
        header, *lines = [json.loads(line) for line in path.read_text().split("\n") if line.strip()]
        rules, folder, _ = header["rules"], header["settings"]["ckpt"], lines[0]["runs"]
    except (ValueError, KeyError, TypeError, IndexError):
        raise InputError(f"{path}: not the answers of eval.py; expected its .jsonl") from None
    L, tokenizer = rules["full depth"][0], Tokenizer.load(folder)
    prompts = [tokenizer.encode(line["prompt"], bos=True) for line in lines]
    rows = {}
    for setting in (name for name in rules if name.startswith(("threshold", "lite.json"))):
        for name, shape in SHAPES.items():
            saved = project(shape, lines, setting, prompts, L)
            rows[f"{name}, {setting}"] = [f"{100 * x:.1f}" for x in saved.values()]
    table("projected, saved %", ("layers", "FLOPs", "bytes"), rows)


if __name__ == "__main__":
    run(main)
