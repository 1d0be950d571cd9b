"""What early exit saves and what it costs, on data the model has not seen.

    python eval.py                                     # out/ (else tiny/) on the embedded test set
    python eval.py --ckpt out7b --data data/vicuna.jsonl --limit 20 --threshold 0.9 0.95,0.95,0.9,0.9,0.8,0.7

First, teacher-forced, the loss and accuracy of every exit.  Then greedy generation at full depth, with each
--threshold, and with the first n layers alone.  *Agreement* is the share of generated positions after the
first at which the token is the one that an exact full-depth pass over the same prefix puts first, while
generation ran on the K and V that early exit left behind.  Intervals are 95 %, clustered by prompt: the
tokens of a prompt are not independent.
"""
import copy
import json
import math

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import Parser, collate, embedded, prompt_text, read_examples, run, tokenize
from generate import answer, check_prompt, exit_rule, frequent_tokens, load_for_decoding
from model import IGNORE, InputError


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
def agrees(model, a):
    """Per generated token after the first: does an exact, uncached full-depth pass put it first? Bools."""
    ids = torch.tensor([a.prompt + a.tokens], device=model.output.weight.device)
    *_, h = model.states(ids[:, :-1])
    return (model.logits(h[0, len(a.prompt):]).argmax(-1) == ids[0, len(a.prompt) + 1:]).tolist()


def rate(hits, counts):
    """sum(hits) / sum(counts) over prompts, with its interval: [rate, low, high, n].
    Wilson's interval, for as many independent draws as would vary like the prompts do (the linearised
    variance of a ratio of sums); where nothing varies, for as many as there are prompts."""
    pairs = [(h, c) for h, c in zip(hits, counts) if c]
    n, g = sum(c for _, c in pairs), len(pairs)
    if not n:
        return [None, None, None, 0]
    p = sum(h for h, _ in pairs) / n
    between = sum((h - p * c) ** 2 for h, c in pairs) / n ** 2 * g / max(1, g - 1)
    m = min(n, p * (1 - p) / between) if between else g
    z = 1.96
    centre, half = p + z * z / (2 * m), z * math.sqrt(p * (1 - p) / m + z * z / (4 * m * m))
    return [p, (centre - half) / (1 + z * z / m), (centre + half) / (1 + z * z / m), n]


def measure(model, tokenizer, examples, settings, frequent, max_new_tokens):
    """Generate for every example under every setting {name: (layers at most, thresholds)}: {name: [record]}.
    The settings take turns, so that a change in the machine's speed hits all alike."""
    records = {name: [] for name in settings}
    models = {n: first_layers(model, n) for n, _ in settings.values()}
    prompts = [check_prompt(tokenizer.encode(prompt_text(e), bos=True), model) for e in examples]
    for e, prompt in zip(tqdm(examples, desc="generate", unit="prompt", disable=None), prompts):
        for name, (n, thresholds) in settings.items():
            a = answer(models[n], prompt, max_new_tokens, thresholds, eos=tokenizer.eos, frequent=frequent)
            text, want = tokenizer.decode(a.tokens, prompt).strip(), e["output"]
            records[name].append(dict(exits=a.exits[1:], agrees=agrees(model, a), seconds=a.decode,
                                      exact=None if want is None else text == want.strip()))
    return records


def summarise(records, full, n_layers):
    """One row of the sweep from a setting's records and, to compare with, full depth's."""
    depths = [n for r in records for n in r["exits"]]
    speed, base = (sum(len(r["exits"]) for r in rs) / max(1e-9, sum(r["seconds"] for r in rs))
                   for rs in (records, full))
    layers = sum(depths) / max(1, len(depths))
    row = dict(prompts=len(records), layers=layers, saved=1 - layers / n_layers, tokens_per_second=speed,
               speedup=speed / max(base, 1e-9),
               agreement=rate([sum(r["agrees"]) for r in records], [len(r["agrees"]) for r in records]),
               exits={n: depths.count(n) for n in sorted(set(depths))})
    if records[0]["exact"] is not None:
        gaps = [r["exact"] - f["exact"] for r, f in zip(records, full)]          # paired, prompt by prompt
        mean = sum(gaps) / len(gaps)
        spread = math.sqrt(sum((x - mean) ** 2 for x in gaps) / max(1, len(gaps) - 1) / len(gaps))
        row["exact"] = rate([r["exact"] for r in records], [1] * len(gaps))
        row["exact_gap"] = [mean, 1.96 * spread]
    return row


def evaluate(model, tokenizer, lite, examples, args):
    """Everything, as one dict: what --json prints and `show` lays out."""
    L = model.args.n_layers
    rules = {",".join(f"{x}" for x in t): exit_rule(t, args.exits, lite, L) for t in [[1], *args.threshold]}
    if "thresholds" in lite:
        rules["lite.json"] = exit_rule(None, args.exits, lite, L)
    exits = list(rules["1"])
    result = dict(settings=vars(args), n_layers=L, prompts=len(examples))
    if all(e["output"] is not None for e in examples):
        rows = tokenize(examples, tokenizer, model.args.max_seq_len)
        result["teacher_forced"] = list(zip([*exits, L], *exit_losses(model, rows, exits, 8)))
    settings = {name: (L, rule) for name, rule in rules.items()}
    settings |= {f"first {n} layers": (n, {}) for n in exits}
    records = measure(model, tokenizer, examples, settings, frequent_tokens(args, lite), args.max_new_tokens)

    def rows_of(group=None):                             # of the table: a setting each
        mine = {name: [r for r, e in zip(rs, examples) if group in (None, e["group"])]
                for name, rs in records.items()}
        return {name: summarise(rs, mine["1"], L) for name, rs in mine.items()}

    groups = {group: rows_of(group) for group in sorted({e["group"] for e in examples})}
    return result | dict(sweep=rows_of(), groups=groups)


def percent(x, interval=()):
    """A share in percent, and its interval."""
    text = "-" if x is None else f"{100 * x:.1f}"
    return f"{text} [{', '.join(percent(y) for y in interval)}]" if interval else text


def show(result):
    """Lay the result out as tables."""
    if "teacher_forced" in result:
        print(f"\nteacher-forced\n{'exit':>6} {'loss':>8} {'accuracy %':>11}")
        for n, loss, accuracy in result["teacher_forced"]:
            print(f"{n:>6} {loss:>8.3f} {percent(accuracy):>11}")
    print(f"\n{'threshold':>18} {'layers':>7} {'saved %':>8} {'agreement %':>18} "
          f"{'exact match %':>18} {'vs full':>12} {'tok/s':>6} {'speed':>6}")
    for name, r in result["sweep"].items():
        agreement = percent(r["agreement"][0], r["agreement"][1:3])
        exact = percent(r["exact"][0], r["exact"][1:3]) if "exact" in r else "-"
        gap = "{:+.1f} ±{:.1f}".format(*(100 * x for x in r["exact_gap"])) if "exact" in r else "-"
        print(f"{name:>18} {r['layers']:>7.2f} {percent(r['saved']):>8} {agreement:>18} "
              f"{exact:>18} {gap:>12} {r['tokens_per_second']:>6.0f} {r['speedup']:>5.2f}x")
    print(f"{result['prompts']} prompts; {sum(result['sweep']['1']['exits'].values())} tokens at full depth")
    if len(result["groups"]) > 1:
        names = "".join(f"{name:>16}" for name in result["sweep"])
        print(f"\nexact match % / mean layers\n{'group':>16} {'n':>5}{names}")
        for group, cells in result["groups"].items():
            row = "".join(f"{percent(r['exact'][0]) if 'exact' in r else '-':>10} /{r['layers']:>4.1f}"
                          for r in cells.values())
            print(f"{group:>16} {cells['1']['prompts']:>5}{row}")


def main():
    parser = Parser(__doc__)
    parser.add("--data", help="Alpaca-format files or test sets (default: 1000 examples of the embedded one)")
    parser.add("--threshold", [[0.95], [0.9], [0.8], [0.6], [0]], nargs="*", help="rules to set against "
               "full depth: each one number for all exits, or one per exit with commas")
    parser.add("--max-new-tokens", 128)
    for flag in ("--ckpt", "--limit", "--exits", "--shortlist", "--dtype", "--device", "--json"):
        parser.add(flag)
    args = parser.parse_args()
    examples = [e for path in args.data or [] for e in read_examples(path)][:args.limit]
    if len({e["output"] is None for e in examples}) > 1:
        raise InputError("--data has examples with and without an output: evaluate them apart")
    model, tokenizer, lite = load_for_decoding(args)
    result = evaluate(model, tokenizer, lite, examples or embedded(args.limit or 1000, split="test"), args)
    print(json.dumps(result)) if args.json else show(result)


if __name__ == "__main__":
    run(main)
