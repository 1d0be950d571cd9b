"""What early exit costs and what it saves, on data the model has not seen.

    python eval.py                                           # out/ (else tiny/) on the embedded test set
    python eval.py --ckpt out --data data/alpaca_val.json --limit 40 --dtype float32 --threshold 0.9 0.8 0.95,0.9,0.8,0.7
    python eval.py --json > results.json

First, teacher-forced, the loss and accuracy of every exit.  Then generation, greedy, at full depth, with each --threshold,
and with the first n layers alone.  *Agreement* is the share of generated positions after the first at which the token is
the one that an exact full-depth pass over the same prefix puts first, while generation ran on the K and V that early exit
left behind.  Intervals are 95 %; tokens of one prompt are not independent, so they are clustered by prompt.
"""
import copy
import json
import math
import sys

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import Parser, collate, embedded, prompt_text, read_examples, run, tokenize
from generate import answer, exit_rule, load_for_decoding
from model import IGNORE


@torch.no_grad()
def exit_losses(model, rows, exits, size):
    """Mean loss and accuracy over the response tokens of rows, for every exit and the last layer: two lists (X+1,)."""
    device = model.output.weight.device
    loss = hits = count = 0
    for i in range(0, len(rows), size):
        tokens, labels = collate(rows[i:i + size], device)
        keep = labels != IGNORE
        targets = labels[keep]
        logits = [model.logits(h[keep]) for h in model.states(tokens, exits)]                # (N, V) each
        loss += torch.stack([F.cross_entropy(x, targets, reduction="sum") for x in logits])
        hits += torch.stack([(x.argmax(-1) == targets).sum() for x in logits])
        count += keep.sum()
    return (loss / count).tolist(), (hits / count).tolist()


def first_layers(model, n):
    """The same model, stopped after n layers: what a fixed exit is."""
    short = copy.copy(model)
    short._modules = {**model._modules, "layers": model.layers[:n]}
    return short


@torch.inference_mode()
def agrees(model, a):
    """Per generated token after the first: is it what one exact, uncached full-depth pass puts first? A list of bools."""
    ids = torch.tensor([a.prompt + a.tokens[:-1]], device=model.output.weight.device)
    *_, h = model.states(ids)
    return (model.logits(h[0, len(a.prompt):]).argmax(-1) == torch.tensor(a.tokens[1:], device=h.device)).tolist()


def rate(hits, counts):
    """sum(hits) / sum(counts) over prompts, with its interval: [rate, low, high, n].

    Wilson's interval, at the number of independent draws that has the variance seen between prompts (the linearised
    variance of a ratio of sums); without any variance to see, the number of prompts.
    """
    pairs = [(h, c) for h, c in zip(hits, counts) if c]
    n, g = sum(c for _, c in pairs), len(pairs)
    if not n:
        return [math.nan, math.nan, math.nan, 0]
    p = sum(h for h, _ in pairs) / n
    between = sum((h - p * c) ** 2 for h, c in pairs) / n ** 2 * g / max(1, g - 1)
    m = min(n, p * (1 - p) / between) if between else g
    z = 1.96
    centre, half = p + z * z / (2 * m), z * math.sqrt(p * (1 - p) / m + z * z / (4 * m * m))
    return [p, (centre - half) / (1 + z * z / m), (centre + half) / (1 + z * z / m), n]


def measure(model, tokenizer, examples, settings, args):
    """Generate for every example under every setting, in turn, so that a change in the machine's speed hits all alike.

    settings: {name: (layers run at most, thresholds)}. Returns {name: [record per example]}.
    """
    records = {name: [] for name in settings}
    models = {n: first_layers(model, n) for n, _ in settings.values()}
    for e in tqdm(examples, desc="generate", unit="prompt", disable=None):
        prompt = tokenizer.encode(prompt_text(e), bos=True)
        for name, (n, thresholds) in settings.items():
            a = answer(models[n], tokenizer, prompt, args, thresholds)
            exact = None if e["output"] is None else tokenizer.decode(a.tokens, prompt).strip() == e["output"].strip()
            records[name].append(dict(exits=a.exits[1:], agrees=agrees(model, a), exact=exact, decode=a.decode))
    return records


def summarise(records, full, n_layers):
    """One row of the sweep from a setting's records and, for comparison, full depth's."""
    depths = [n for r in records for n in r["exits"]]
    early = [[ok for ok, n in zip(r["agrees"], r["exits"]) if n < n_layers] for r in records]
    seconds, base = (sum(r["decode"] for r in rs) for rs in (records, full))
    row = dict(layers=sum(depths) / max(1, len(depths)), tokens=len(depths),
               agreement=rate([sum(r["agrees"]) for r in records], [len(r["agrees"]) for r in records]),
               early_agreement=rate([sum(x) for x in early], [len(x) for x in early]),
               tokens_per_second=len(depths) / seconds, speedup=len(depths) / seconds * base / sum(len(r["exits"]) for r in full),
               exits={n: depths.count(n) for n in sorted(set(depths))})
    row["saved"] = 1 - row["layers"] / n_layers
    if records[0]["exact"] is not None:
        gaps = [r["exact"] - f["exact"] for r, f in zip(records, full)]          # paired, prompt by prompt
        mean = sum(gaps) / len(gaps)
        spread = 1.96 * math.sqrt(sum((x - mean) ** 2 for x in gaps) / max(1, len(gaps) - 1) / len(gaps))
        row |= dict(exact=rate([r["exact"] for r in records], [1] * len(records)), exact_gap=[mean, spread])
    return row


def by_group(records, examples):
    """{group: {setting: (n, exact, mean layers)}}, for sets whose examples carry a group."""
    groups = {}
    for name, rs in records.items():
        for group in sorted({e["group"] for e in examples}):
            mine = [r for r, e in zip(rs, examples) if e["group"] == group]
            depths = [n for r in mine for n in r["exits"]]
            exact = None if mine[0]["exact"] is None else sum(r["exact"] for r in mine) / len(mine)
            groups.setdefault(group, {})[name] = (len(mine), exact, sum(depths) / max(1, len(depths)))
    return groups


def show(result):
    """The result as tables on the screen."""
    percent = lambda x: "-" if x is None or math.isnan(x) else f"{100 * x:.1f}"                # noqa: E731
    span = lambda r: f"{percent(r[0])} [{percent(r[1])}, {percent(r[2])}]"                     # noqa: E731
    if "teacher_forced" in result:
        print(f"\n{'exit':>8} {'loss':>8} {'accuracy %':>11}      teacher-forced, {result['rows']} examples")
        for n, loss, accuracy in result["teacher_forced"]:
            print(f"{n:>8} {loss:>8.3f} {percent(accuracy):>11}")
    print(f"\n{'threshold':>20} {'layers':>7} {'saved %':>8} {'agreement %':>20} {'of early ones %':>20} {'exact %':>20} "
          f"{'vs full':>13} {'tok/s':>6} {'speed':>6}")
    for name, r in result["sweep"].items():
        exact = (span(r["exact"]), f"{100 * r['exact_gap'][0]:+.1f} ±{100 * r['exact_gap'][1]:.1f}") if "exact" in r else ("-", "-")
        print(f"{name:>20} {r['layers']:>7.2f} {percent(r['saved']):>8} {span(r['agreement']):>20} "
              f"{span(r['early_agreement']):>20} {exact[0]:>20} {exact[1]:>13} {r['tokens_per_second']:>6.0f} {r['speedup']:>5.2f}x")
    print(f"{result['prompts']} prompts, {result['sweep']['1']['tokens']} generated tokens after the first at full depth")
    if len(result["groups"]) > 1:
        print(f"\nexact % / mean layers\n{'group':>16} {'n':>5} " + " ".join(f"{name:>12}" for name in result["sweep"]))
        for group, cells in result["groups"].items():
            print(f"{group:>16} {cells['1'][0]:>5} " + " ".join(f"{percent(e):>6} /{d:>4.1f}" for _, e, d in cells.values()))


def evaluate(model, tokenizer, examples, lite, args):
    """All of the above as one dict: what --json prints and `show` draws."""
    model.eval()
    L = model.args.n_layers
    rules = {t: exit_rule(t, args.exits, lite, L) for t in ["1", *args.threshold]}
    exits = list(rules["1"])
    result = dict(settings={k: v for k, v in vars(args).items()}, n_layers=L, prompts=len(examples))
    if all(e["output"] is not None for e in examples):
        rows = tokenize(examples, tokenizer, model.args.max_seq_len, lambda text: print(text, file=sys.stderr))
        losses, accuracies = exit_losses(model, rows, exits, 8)
        result |= dict(rows=len(rows), teacher_forced=list(zip([*exits, L], losses, accuracies)))
    settings = {t: (L, rule) for t, rule in rules.items()}
    settings |= {f"first {n} layers": (n, {}) for n in exits}
    records = measure(model, tokenizer, examples, settings, args)
    result["sweep"] = {name: summarise(rs, records["1"], L) for name, rs in records.items()}
    result["groups"] = by_group({name: records[name] for name in settings}, examples)
    return result


def main():
    parser = Parser(__doc__)
    parser.add("--ckpt", help="Meta-format folder, or an output folder of train.py (default: out, else tiny)")
    parser.add("--data", help="Alpaca-format files or test sets (default: 1000 examples of the embedded test set)")
    parser.add("--limit")
    parser.add("--exits")
    parser.add("--threshold", ["0.95", "0.9", "0.8", "0.6", "0"], nargs="*", help="the settings to compare with full depth, "
               "each one number for all exits or one per exit, comma-separated")
    parser.add("--max-new-tokens", 128)
    for flag in ("--dtype", "--device", "--json"):
        parser.add(flag)
    args = parser.parse_args()
    args.temperature, args.top_p = 0.0, 1.0
    examples = [e for path in args.data or [] for e in read_examples(path)] or embedded(args.limit or 1000, split="test")
    model, tokenizer, lite = load_for_decoding(args)
    result = evaluate(model, tokenizer, examples[:args.limit], lite, args)
    print(json.dumps(result)) if args.json else show(result)


if __name__ == "__main__":
    run(main)
