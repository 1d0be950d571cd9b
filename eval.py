"""The paper's evaluation: what early exit saves, on four counts, and what it costs, on data not trained on.

    python eval.py                                     # out/ (else tiny/) on the embedded test set
    torchrun --nproc-per-node 8 eval.py --ckpt lite7b --data data/vicuna.jsonl data/koala.jsonl --limit 20
    python eval.py --ckpt lite7b --data alpaca_val.json --calibrate 0.98       # thresholds, for its lite.json

Every prompt is answered greedily at full depth, with each --threshold and by the first n layers alone, and an
exact, uncached full-depth pass judges each answer.  *Agreement* is the share of generated tokens, after
the first, that this pass puts first in their place, while generation ran on the K and V that early exit left.
The *oracle* leaves full depth's answer at the earliest exit that would have chosen the last layer's token.
Answers go to a .jsonl as they come: the same command again goes on where it stopped.  Their figures
(docs/report.py) are printed and go to the .json beside it.
"""
import copy
import json
import math
import os
import sys
import zlib
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from data import collate, embedded, prompt_text, read_examples, tokenize
from docs.cli import Parser, number, run
from docs.report import FULL, ORACLE, collect, identity, report, show
from generate import Shortlist, answer, confidence, exit_rule, frequent_tokens, load_for_decoding
from model import IGNORE, InputError, wide


@torch.no_grad()
def exit_losses(model, rows, exits, size):
    """Mean loss and accuracy over the response tokens of rows, per exit and last layer: two lists (X+1,)."""
    total = count = 0
    for i in range(0, len(rows), size):
        tokens, labels = collate(rows[i:i + size], model.output.weight.device)
        keep, scores = labels != IGNORE, []
        for h in model.states(tokens, exits):            # one exit's logits (N, V) at a time
            logits, want = model.logits(h[keep]), labels[keep]
            scores.append([F.cross_entropy(logits, want, reduction="sum"), (logits.argmax(-1) == want).sum()])
        total = total + torch.tensor(scores)             # (X+1, 2)
        count += keep.sum().item()
    return (total / count).T.tolist()


def first_layers(model, n):
    """The same model, stopped after n layers: what a fixed exit is."""
    short = copy.copy(model)
    short._modules = {**model._modules, "layers": model.layers[:n]}
    return short


@torch.inference_mode()
def judge(model, a, frequent=(), exits=()):
    """What an exact, uncached full-depth pass says of an answer of N+1 tokens, added to it: agrees (N,), does
    it put each token after the first in its place; loss, -log p of all; pooled (D,), its mean last state;
    sizes (N,), how many tokens a check chose among; sure and right (X, N), what every exit would have said
    there: its confidence, and whether its choice is the last layer's."""
    ids, P, sizes = a.prompt + a.tokens, len(a.prompt), []
    few = Shortlist(model, frequent, len(ids))
    for token in ids[:-1]:
        few.add([token])
        sizes.append(len(few.known) if frequent else len(few.ids))
    tokens, a.sizes, a.sure, a.right = few.ids.new_tensor(ids), sizes[P:], [], []
    *early, last = (h[0, P - 1:] for h in model.states(tokens[None, :-1], exits))           # (N+1, D) each
    logits = model.logits(last)
    best, a.pooled = logits.argmax(-1), wide(last).mean(0)
    a.agrees = (best == tokens[P:])[1:].int().tolist()
    a.loss = F.cross_entropy(logits, tokens[P:], reduction="sum").item()
    for h in early:
        logits = model.logits(h[1:], few.rows)
        unsaid = torch.arange(logits.size(1), device=h.device) >= tokens.new_tensor(a.sizes)[:, None]
        logits = logits.masked_fill(unsaid, -math.inf)               # tokens that the text brings up later
        a.sure.append([round(x, 6) for x in confidence(logits).tolist()])
        a.right.append((few.ids[logits.argmax(-1)] == best[1:]).int().tolist())
    return a


def costs(model, a, exits, asks, top):
    """What the tokens of an answer after the first cost, in layers, FLOPs and bytes of weights read, if they
    ran through exits (N,) layers and asks (N,) checks; the whole head follows layer top.
    w weights are 2 w FLOPs, attention to S positions 4 S H E a layer.  The K and V that a skipped layer owes
    cost FLOPs (and so does a Q that nobody needs) if a later token visits it, but no bytes: they share that
    token's product.  (Norms and other small things are left out, as in torch's FLOP counter.)"""
    s, n = model.args, np.array(exits, dtype=int)
    qkv = s.dim * (s.dim + 2 * model.layers[0].attention.wk.out_features)
    S = len(a.prompt) + 1 + np.arange(len(n))            # with itself
    layer = s.dim ** 2 + qkv + 3 * s.dim * s.ffn_dim
    weights = n * layer + s.dim * (asks * np.array(a.sizes, dtype=int) + s.vocab_size * (n == top))
    later = np.zeros_like(n)                             # how deep the deepest token after each one went
    for i in reversed(range(len(n) - 1)):
        later[i] = max(n[i + 1], later[i + 1])
    flops = 2 * weights + 2 * qkv * np.maximum(0, later - n) + 4 * S * s.dim * n
    return dict(layers=int(n.sum()), FLOPs=int(flops.sum()),
                bytes=int(weights.sum()) * model.output.weight.itemsize)


def measure(model, prompt, top, thresholds, how, exits=()):
    """The answer of the first `top` layers under thresholds, judged, with the numbers that FIGURES sum up."""
    a = answer(first_layers(model, top), prompt, thresholds=thresholds, **how)
    judge(model, a, how["frequent"], exits)
    n, full = np.array(a.exits[1:]), [model.args.n_layers] * len(a.exits[1:])
    asks = sum(n >= exit for exit, t in thresholds.items() if t < 1)
    a.numbers = dict(prompts=1, steps=len(n), length=len(a.tokens), agreed=sum(a.agrees), loss=a.loss,
                     seconds=a.decode, **costs(model, a, n, asks, top))
    a.numbers |= {f"full_{key}": x for key, x in costs(model, a, full, 0, model.args.n_layers).items()}
    return a


def compare(model, tokenizer, name, e, prompt, settings, exits, how):
    """An example under every setting {name: (layers at most, thresholds)}, in turns, so that a change in the
    machine's speed hits all alike: a line of the results."""
    runs, full, L = {}, None, model.args.n_layers
    for setting, (top, thresholds) in settings.items():
        a = measure(model, prompt, top, thresholds, how, exits if setting == FULL else ())
        full, text = full or a, tokenizer.decode(a.tokens, prompt).strip()           # full depth comes first
        exact = None if e["output"] is None else int(text == e["output"].strip())
        runs[setting] = dict(text=text, exits=a.exits[1:], exact=exact, **a.numbers,
                             similarity=F.cosine_similarity(a.pooled, full.pooled, 0).item())
    columns = zip(*full.right or [full.agrees])          # of a token each; all of them empty without exits
    best = [next((n for n, ok in zip(exits, column) if ok), L) for column in columns]
    asks = np.array(best, dtype=int) < L                 # the oracle knows where, and asks there alone
    runs[ORACLE] = runs[FULL] | dict(exits=best, seconds=None, **costs(model, full, best, asks, L))
    runs[FULL] |= dict(sure=full.sure, right=full.right)
    return dict(set=name, group=e["group"], prompt=prompt_text(e), output=e["output"], runs=runs)


def parse_args():
    """The flags of eval.py, checked as far as they can be without the model."""
    parser = Parser(__doc__)
    parser.add("--data", help="Alpaca-format files or test sets (default: 1000 examples of the embedded one)")
    parser.add("--threshold", [[0.95], [0.9], [0.8], [0.6]], nargs="*", help="rules to set against full "
               "depth: each one number for all exits, or one per exit with commas")
    parser.add("--calibrate", type=number(float, 0.5, 0.9999), metavar="X", help="choose thresholds for so "
               "much agreement, certify them, and write them into lite.json")
    parser.add("--out", metavar="FILE.jsonl", help="the answers (default: in results/, named by settings)")
    parser.add("--max-new-tokens", 128)
    for flag in ("--by-layers", "--ckpt", "--limit", "--exits", "--shortlist", "--dtype", "--device"):
        parser.add(flag)
    args = parser.parse_args()
    if args.out and not args.out.endswith(".jsonl"):
        raise InputError(f"--out {args.out}: expected a name in .jsonl; the figures go to .json beside it")
    if args.calibrate and ("RANK" in os.environ or not args.ckpt):
        raise InputError("--calibrate runs in one process, without torchrun, and writes to --ckpt: name it")
    return args


def evaluate(args, model, tokenizer, lite, work, exits, how):
    """Answer what the file of answers lacks, under every setting; rank 0 prints and writes the figures."""
    L, rank, world = model.args.n_layers, int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    rules = {f"threshold {','.join(map(str, t))}": exit_rule(t, args.exits, lite, L) for t in args.threshold}
    if "thresholds" in lite and lite.get("check") in (None, len(how["frequent"])):
        rules["lite.json"] = exit_rule(None, args.exits, lite, L)
    settings = {FULL: (L, {})} | {name: (L, rule) for name, rule in rules.items()}
    settings |= {f"first {n} layers": (n, {}) for n in exits}
    header = identity(args, model, work, settings)
    name = (args.ckpt.parent if args.ckpt.name == "latest" else args.ckpt).resolve().name
    path = Path(args.out or f"results/{name}-{zlib.crc32(repr(header).encode()):08x}.jsonl")
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=9))           # the slowest rank is waited for
    if {Path(p).resolve() for p in args.data or []} & {path.resolve(), path.with_suffix(".json").resolve()}:
        raise InputError(f"--out {path}: it, or the .json beside it, is one of --data; choose another name")
    answer(model, work[0][2], 4, {})                     # the first one is slow, and not recorded
    lines = collect(path, header, lambda i: compare(model, tokenizer, *work[i], settings, exits, how),
                    len(work), rank, world)
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return
    rows = [e for _, e, _ in work if e["output"] is not None]
    rows = rows and tokenize(rows, tokenizer, model.args.max_seq_len)
    losses = zip([*exits, L], *exit_losses(model, rows, exits, 8)) if rows else ()
    result = header | dict(teacher_forced=list(losses), sets=report(lines, exits))
    path.with_suffix(".json").write_text(json.dumps(result) + "\n")
    show(result)
    print(f"answers: {path}; figures, for docs/plots.py: {path.with_suffix('.json')}")


def main():
    """Read prompts and model; then evaluate, or calibrate."""
    args = parse_args()
    sets = [(Path(p).name.split(".")[0], e) for p in args.data or [] for e in read_examples(p, args.limit)]
    sets = sets or [("embedded", e) for e in embedded(args.limit or 1000, split="test")]
    model, tokenizer, lite = load_for_decoding(args)
    exits, room = list(exit_rule([1.0], args.exits, lite, model.args.n_layers)), model.args.max_seq_len
    work = [(name, e, p) for name, e in sets if len(p := tokenizer.encode(prompt_text(e), bos=True)) < room]
    if not work:
        raise InputError(f"all {len(sets)} prompts fill the context of {room} tokens; take shorter ones")
    if len(work) < len(sets) and os.environ.get("RANK", "0") == "0":
        print(f"{len(sets) - len(work)} prompts fill the context of {room} tokens: left out", file=sys.stderr)
    how = dict(max_new_tokens=args.max_new_tokens, eos=tokenizer.eos, frequent=frequent_tokens(args, lite))
    if not args.calibrate:
        return evaluate(args, model, tokenizer, lite, work, exits, how)
    from docs.calibrate import calibrate, write_thresholds           # not at the top: it imports this file
    tries = calibrate(model, [p for *_, p in work], exits, how, args.calibrate, args.by_layers)
    write_thresholds(args.ckpt / "lite.json", lite, exits, tries, how)


if __name__ == "__main__":
    run(main)
