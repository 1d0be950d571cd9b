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
import re
import sys
import zlib
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from data import Parser, collate, embedded, number, prompt_text, read_examples, run, tokenize
from docs.report import FULL, ORACLE, collect, rate, report, show, table
from generate import Shortlist, answer, confidence, exit_rule, frequent_tokens, load_for_decoding
from model import IGNORE, InputError, wide

MARGINS = (0.95, 0.8, 0.6, *np.arange(0.5, -0.01, -0.05))  # of the way from the target to 1, to aim at


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
    later = np.append(np.maximum.accumulate(n[:0:-1])[::-1], 0)[:len(n)]         # deepest visit after each
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
        runs[setting] = dict(text=text, exits=a.exits[1:], agrees=a.agrees, exact=exact, **a.numbers,
                             similarity=F.cosine_similarity(a.pooled, full.pooled, 0).item())
    columns = zip(*full.right or [full.agrees])          # of a token each; all of them empty without exits
    best = [next((n for n, ok in zip(exits, column) if ok), L) for column in columns]
    asks = np.array(best, dtype=int) < L                 # the oracle knows where, and asks there alone
    runs[ORACLE] = runs[FULL] | dict(exits=best, seconds=None, **costs(model, full, best, asks, L))
    runs[FULL] |= dict(sure=full.sure, right=full.right)
    return dict(set=name, group=e["group"], prompt=prompt_text(e), output=e["output"], runs=runs)


def beyond(x, t, d, price=0.0):
    """What each of N tokens costs once it is past exit number x, under thresholds t (X,): the weights that it
    reads, and `price` if it leaves with another token than the last layer's."""
    cost = np.full(len(d.ask), d.cost[-1], dtype=float)
    for y in reversed(range(x + 1, len(t))):
        if t[y] < 1:
            cost = d.ask + np.where(d.sure[:, y] > t[y], d.cost[y] + price * d.wrong[:, y], cost)
    return cost


def best_thresholds(d, price):
    """The thresholds (X,) that cost least if a disagreement costs `price`, as far as changing one at a time
    goes.  For one exit it is the best of all: in order of confidence, the gain of letting the first k tokens
    that get there leave is a running sum.  If nobody leaves, the checks are saved (t = 1)."""
    t = np.ones(d.sure.shape[1])
    for _ in range(20):                                  # mostly it is there after three
        before = t.copy()
        for x in reversed(range(len(t))):
            here = np.flatnonzero(~(d.sure[:, :x] > t[:x]).any(1))
            here = here[np.argsort(-d.sure[here, x], kind="stable")]
            sure = np.append(d.sure[here, x], 0)         # (n+1,)
            gain = (beyond(x, t, d, price) - d.cost[x] - price * d.wrong[:, x])[here].cumsum()
            gain[sure[1:] == sure[:-1]] = -np.inf        # who is equally sure leaves together
            k = np.argmax([d.ask[here].sum(), *gain])
            t[x] = (sure[k - 1] + sure[k]) / 2 if k else 1
        if (t == before).all():
            break
    return t


def cheapest(candidates, d, agreement):
    """The candidate thresholds that read least while at least so many tokens are the last layer's."""
    cost = [beyond(-1, t, d) for t in candidates]
    good = [k for k, t in enumerate(candidates) if (beyond(-1, t, d, 1) - cost[k]).mean() <= 1 - agreement]
    return candidates[min(good, key=lambda k: cost[k].mean())] if good else np.ones(d.sure.shape[1])


def calibrate(model, prompts, exits, how, target, single=False):
    """Thresholds for `target` agreement: chosen on every other prompt, where full depth's answers tell what
    each exit would have said, and certified on the rest, by generating with them.  Candidates come from safe
    to cheap, and the first whose one-sided 95 % bound misses the target ends it.  As each is tried only if
    all before it passed, the 5 % hold for the one kept, however many there are (fixed-sequence testing).
    Returns what was tried, [dict].  single: one threshold for all exits (to compare with)."""
    L, tries, counts = model.args.n_layers, [], ("layers", "FLOPs", "bytes")
    told = [measure(model, p, L, {}, how, exits) for p in tqdm(prompts[::2], "choose", disable=None)]
    if len(prompts) < 2 or not exits or not any(a.agrees for a in told):
        raise InputError(f"--calibrate: found {len(prompts)} prompts, {sum(len(a.tokens) for a in told)} "
                         f"tokens, {len(exits)} exits; expected two prompts, answers of two tokens, an exit")
    sure, right = (np.concatenate([np.array(getattr(a, key)).T for a in told]) for key in ("sure", "right"))
    layer, head = sum(p.numel() for p in model.layers[0].parameters()), model.output.weight.numel()
    ask = model.args.dim * np.concatenate([a.sizes for a in told])               # all in weights
    cost = [*(n * layer for n in exits), L * layer + head]
    d = SimpleNamespace(sure=sure, wrong=1 - right, ask=ask, cost=cost)
    path = ([np.full(len(exits), t) for t in np.quantile(sure, np.linspace(0, 1, 200))] if single else
            [best_thresholds(d, price * layer) for price in np.geomspace(0.1, 1e4, 200)])
    candidates = [a + (b - a) * k / 8 for a, b in zip(path, path[1:]) for k in range(8)]         # and between
    for aim in (target + margin * (1 - target) for margin in MARGINS):
        t = dict(zip(exits, cheapest(candidates, d, aim).tolist()))
        if tries and (t == tries[-1]["thresholds"] or not tries[-1]["certified"]):
            continue
        told = [measure(model, p, L, t, how).numbers
                for p in tqdm(prompts[1::2], f"certify {aim:.4f}", disable=None)]
        total = {key: sum(a[key] for a in told) for key in told[0]}
        agreed, steps, n = [a["agreed"] for a in told], [a["steps"] for a in told], total["steps"]
        bad = n / len(told)                              # bad prompts are rare: count on one more, half wrong
        bound = rate([*agreed, bad / 2], [*steps, bad], 1.645)[1] or 0
        tries.append(dict(
            aim=aim, target=target, thresholds=t, agreement=sum(agreed) / max(1, n), bound=bound,
            certified=bound >= target, prompts=len(told), tokens=n, dtype=str(model.output.weight.dtype),
            **{f"{key} saved": 1 - total[key] / total[f"full_{key}"] for key in counts}))
    return tries


def write_thresholds(path, lite, exits, tries, how):
    """Tell what calibration tried, and put the cheapest thresholds that it certified into lite.json."""
    columns = ("layers saved", "FLOPs saved", "bytes saved")
    table(f"{tries[0]['prompts']} prompts, {tries[0]['tokens']} tokens, in %", [
        "agreement", "at least", *columns, "thresholds"], {
        f"aim {100 * t['aim']:.2f}": [
            *(f"{100 * t[key]:.2f}" for key in ("agreement", "bound", *columns)),
            " ".join(f"{n}: {x:.3f}" for n, x in t["thresholds"].items())] for t in tries})
    if not (good := [t for t in tries if t["certified"] and min(t["thresholds"].values()) < 1]):
        raise InputError(f"no thresholds reach {tries[0]['target']} with 95 % confidence on "
                         f"{tries[0]['prompts']} prompts; take more, or a lower target. {path} is as it was")
    part = path.with_suffix(".tmp")
    part.write_text(json.dumps({"exits": exits, **lite, "thresholds": good[-1]["thresholds"],
                                "check": len(how["frequent"]), "calibration": good[-1]}) + "\n")
    part.replace(path)
    print(f"thresholds written to {path}; generate.py without --threshold takes them")


def parse_args():
    parser = Parser(__doc__)
    parser.add("--data", help="Alpaca-format files or test sets (default: 1000 examples of the embedded one)")
    parser.add("--threshold", [[0.95], [0.9], [0.8], [0.6]], nargs="*", help="rules to set against full "
               "depth: each one number for all exits, or one per exit with commas")
    parser.add("--calibrate", type=number(float, 0.5, 0.9999), metavar="X", help="choose thresholds for so "
               "much agreement, certify them, and write them into lite.json")
    parser.add("--out", metavar="FILE.jsonl", help="the answers (default: in results/, named by settings)")
    parser.add("--max-new-tokens", 128)
    for flag in ("--ckpt", "--limit", "--exits", "--shortlist", "--dtype", "--device"):
        parser.add(flag)
    args = parser.parse_args()
    if args.out and not args.out.endswith(".jsonl"):
        raise InputError(f"--out {args.out}: expected a name in .jsonl; the figures go to .json beside it")
    if args.calibrate and "RANK" in os.environ:
        raise InputError("--calibrate runs in one process: start it with python, not torchrun")
    return args


def identity(args, model, work, settings):
    """What makes a run: its settings, and a checksum of its prompts and of the checkpoint's files' dates."""
    ours, w = re.compile(r"(params|lite)\.json|.*\.(pth|model)"), model.output.weight
    files = [p for p in sorted(args.ckpt.iterdir()) if ours.fullmatch(p.name)]
    files = [(p.name, p.stat().st_size, p.stat().st_mtime) for p in files]
    flags = {key: value for key, value in vars(args).items() if key not in ("out", "calibrate")}
    flags |= dict(ckpt=str(args.ckpt), dtype=str(w.dtype), device=w.device.type)
    header = dict(settings=flags, rules=settings, crc=zlib.crc32(repr((work, files)).encode()))
    return json.loads(json.dumps(header))                # as it will be read back


def evaluate(args, model, tokenizer, lite, work, exits, how):
    """Answer what the file of answers lacks, under every setting; rank 0 prints and writes the figures."""
    L, rank, world = model.args.n_layers, int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    rules = {f"threshold {','.join(map(str, t))}": exit_rule(t, args.exits, lite, L) for t in args.threshold}
    if "thresholds" in lite:
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
    make = lambda i: compare(model, tokenizer, *work[i], settings, exits, how)  # noqa: E731
    lines = collect(path, header, make, len(work), rank, world)
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
    args = parse_args()
    sets = [(Path(p).name.split(".")[0], e) for p in args.data or [] for e in read_examples(p, args.limit)]
    sets = sets or [("embedded", e) for e in embedded(args.limit or 1000, split="test")]
    model, tokenizer, lite = load_for_decoding(args)
    exits, room = list(exit_rule([1.0], args.exits, lite, model.args.n_layers)), model.args.max_seq_len
    work = [(name, e, tokenizer.encode(prompt_text(e), bos=True)) for name, e in sets]
    work = [(name, e, prompt) for name, e, prompt in work if len(prompt) < room]
    if not work:
        raise InputError(f"all {len(sets)} prompts fill the context of {room} tokens; take shorter ones")
    if len(work) < len(sets) and os.environ.get("RANK", "0") == "0":
        print(f"{len(sets) - len(work)} prompts fill the context of {room} tokens: left out", file=sys.stderr)
    how = dict(max_new_tokens=args.max_new_tokens, eos=tokenizer.eos, frequent=frequent_tokens(args, lite))
    if not args.calibrate:
        return evaluate(args, model, tokenizer, lite, work, exits, how)
    tries = calibrate(model, [prompt for *_, prompt in work], exits, how, args.calibrate)
    write_thresholds(args.ckpt / "lite.json", lite, exits, tries, how)


if __name__ == "__main__":
    run(main)
