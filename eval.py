"""What early exit saves, on four counts, and what it costs, on data not trained on.

    python eval.py                                     # out/ (else tiny/) on the embedded test set
    torchrun --nproc-per-node 8 eval.py --ckpt lite7b --data data/vicuna.jsonl data/koala.jsonl --limit 20

Every prompt is answered greedily at full depth, with each --threshold and by the first n layers alone, and an
exact, uncached full-depth pass judges each answer.  *Agreement* is the share of generated tokens, after
the first, that this pass puts first in their place, while generation ran on the K and V that early exit left.
The *oracle* leaves full depth's answer at the earliest exit that would have chosen the last layer's token.
Answers go to a .jsonl as they come; the same command goes on where it stopped.  docs/report.py tells more.
"""
import copy, json, math, os, re, sys, zlib
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import Parser, collate, embedded, prompt_text, read_examples, run, tokenize
from generate import Shortlist, answer, confidence, exit_rule, frequent_tokens, load_for_decoding
from model import IGNORE, LOGIT_ROWS, InputError, wide

FULL, ORACLE = "full depth", "oracle"

@torch.no_grad()
def exit_losses(model, rows, exits, size):
    """Mean loss and accuracy over the response tokens of rows, per exit and last layer: two lists (X+1,)."""
    total, count = torch.zeros(len(exits) + 1, 2, dtype=torch.float64), 0
    for i in range(0, len(rows), size):
        tokens, labels = collate(rows[i:i + size], model.output.weight.device)
        keep = labels != IGNORE                          # LOGIT_ROWS of them at a time, as in training
        for x, h in enumerate(model.states(tokens, exits)):
            for part, want in zip(h[keep].split(LOGIT_ROWS), labels[keep].split(LOGIT_ROWS)):
                logits = model.logits(part)
                right = (logits.argmax(-1) == want).sum()
                total[x] += torch.tensor([F.cross_entropy(logits, want, reduction="sum"), right])
        count += keep.sum().item()
    return (total / count).T.tolist()

def first_layers(model, n):
    """The same model, stopped after n layers: what a fixed exit is."""
    short = copy.copy(model)
    short._modules = {**model._modules, "layers": model.layers[:n]}
    return short

@torch.inference_mode()
def judge(model, a, frequent=(), exits=()):
    """What an exact, uncached full-depth pass says of an answer of N+1 tokens, added to it: agrees (N,), are
    the tokens after the first its choices; loss, -log p of all; pooled (D,), its mean last state; sizes (N,),
    how many tokens a check chose among; sure and right (X, N), each exit's confidence and agreement there."""
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

def costs(model, a, exits, asks, top, recompute=False):
    """What the N tokens of an answer after the first cost, in layers, FLOPs and bytes of weights read, if the
    i-th ran exits[i] layers and asks[i] checks; one that reached layer top pays the whole head.
    w weights are 2 w FLOPs, attention to S positions 4 S H E a layer.  The K and V that a skipped layer owes
    cost FLOPs (and so does a Q that nobody needs; recomputed, the whole layer) if a later token visits it,
    but no bytes: they share its products.  (Norms and such are left out, as in torch's FLOP counter.)"""
    s, n = model.args, np.array(exits, dtype=int)
    qkv = s.dim * (s.dim + 2 * model.layers[0].attention.wk.out_features)
    S = len(a.prompt) + 1 + np.arange(len(n))            # with itself
    layer = s.dim ** 2 + qkv + 3 * s.dim * s.ffn_dim
    weights = n * layer + s.dim * (asks * np.array(a.sizes, dtype=int) + s.vocab_size * (n == top))
    later = np.zeros_like(n)                             # how deep the deepest token after each one went
    for i in reversed(range(len(n) - 1)):
        later[i] = max(n[i + 1], later[i + 1])
    attention, owed = 4 * S * s.dim, np.maximum(0, later - n)
    flops = 2 * weights + attention * n + (2 * layer + attention if recompute else 2 * qkv) * owed
    return dict(layers=int(n.sum()), FLOPs=int(flops.sum()),
                bytes=int(weights.sum()) * model.output.weight.itemsize)

def measure(model, prompt, top, thresholds, how, exits=()):
    """The answer of the first `top` layers under thresholds, judged, with the numbers that are summed up."""
    a = answer(first_layers(model, top), prompt, thresholds=thresholds, **how)
    judge(model, a, how["frequent"], exits)
    n, full = np.array(a.exits[1:]), [model.args.n_layers] * len(a.exits[1:])
    asks = sum(n >= exit for exit, t in thresholds.items() if t < 1)
    a.numbers = dict(prompts=1, steps=len(n), length=len(a.tokens), agreed=sum(a.agrees), loss=a.loss,
                     seconds=a.decode, **costs(model, a, n, asks, top, how.get("recompute")))
    a.numbers |= {f"full_{key}": x for key, x in costs(model, a, full, 0, model.args.n_layers).items()}
    return a

def compare(model, tokenizer, name, e, prompt, settings, exits, how):
    """An example under all settings, {name: (layers at most, thresholds)}: a line of the results."""
    runs, full, L = {}, None, model.args.n_layers
    for setting, (top, thresholds) in settings.items():  # in turns: a change of the machine's speed hits all
        a = measure(model, prompt, top, thresholds, how, exits if setting == FULL else ())
        full, text = full or a, tokenizer.decode(a.tokens, prompt).strip()           # full depth comes first
        exact = None if e["output"] is None else int(text == e["output"].strip())
        runs[setting] = dict(text=text, exits=a.exits[1:], exact=exact, **a.numbers,
                             similarity=F.cosine_similarity(a.pooled, full.pooled, 0).item())
    columns = zip(*full.right or [full.agrees])          # per token: is each exit right? (no exits: L)
    best = [next((n for n, ok in zip(exits, column) if ok), L) for column in columns]
    price = costs(model, full, best, np.array(best, dtype=int) < L, L, how.get("recompute"))  # one check each
    runs[ORACLE] = runs[FULL] | dict(exits=best, seconds=None, **price)
    runs[FULL] |= dict(sure=full.sure, right=full.right)
    return dict(set=name, group=e["group"], prompt=prompt_text(e), output=e["output"], runs=runs)

def read_answers(path):
    """The header of a file of answers, None without one, and {i: line}. A line that a kill cut is none."""
    lines, text = [], path.read_text(errors="replace").strip() if path.exists() else ""
    for line in text.split("\n"):
        with suppress(ValueError):
            lines.append(json.loads(line))
    if text and not (text.startswith('{"settings"') and all(
            isinstance(line, dict) and ("i" in line or line == lines[0]) for line in lines)):
        raise InputError(f"{path}: expected one run's answers (eval.py's, say), and nothing else")
    return lines[0] if lines else None, {line["i"]: line for line in lines if "i" in line}

def collect(path, header, make, numbers):
    """{i: line} of a file of answers, once this process has added what the file lacks of its numbers: each
    made by make(i), and in one write, so any number of processes (torchrun's) may write and be killed."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    found, lines = read_answers(path)
    if found not in (None, header):
        raise InputError(f"{path}: another run's (flags, data, checkpoint, code differ); take another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as f:
        f.write(f"\n{json.dumps(header)}\n".encode() if found is None else b"\n")      # \n ends a broken line
        mine = [i for i in numbers if i % world == rank and i not in lines]
        for i in tqdm(mine, desc="answers", disable=rank > 0 or None):
            f.write(f"{json.dumps(dict(i=i, **make(i)))}\n".encode())
    return read_answers(path)[1]

def identity(args, model, work, rules):
    """What makes a run: flags, rules, a checksum of prompts, code, and dates of the checkpoint's files."""
    ours, w = re.compile(r"(params|lite)\.json|.*\.(pth|model)"), model.output.weight
    files = [p for p in sorted(args.ckpt.iterdir()) if ours.fullmatch(p.name)]
    files = [(p.name, p.stat().st_size, p.stat().st_mtime) for p in files]
    flags = vars(args) | dict(out=None, ckpt=str(args.ckpt), dtype=str(w.dtype), device=w.device.type)
    code = [Path(__file__).with_name(f"{m}.py").read_text() for m in "data eval generate model".split()]
    crc = zlib.crc32(repr((work, files, code)).encode())
    return json.loads(json.dumps(dict(settings=flags, rules=rules, prompts=len(work), crc=crc)))   # as stored

def flags(doc):
    """A parser with the flags that say what is answered, by what, and how far."""
    parser = Parser(doc)
    parser.add("--data", help="Alpaca-format files or test sets (default: 1000 examples of the embedded one)")
    parser.add("--max-new-tokens", 128)
    for flag in ("--ckpt", "--limit", "--exits", "--recompute", "--shortlist", "--dtype", "--device"):
        parser.add(flag)
    return parser

def prepare(args):
    """Model, tokenizer, lite.json, the exits to look at, [(set, example, prompt)], and how to generate."""
    alike = len({Path(p).stem for p in args.data or []}) < len({*(args.data or [])})      # then in full
    sets = [(p if alike else Path(p).stem, e) for p in args.data or [] for e in read_examples(p, args.limit)]
    sets = sets or [("embedded", e) for e in embedded(args.limit or 1000, split="test")]
    model, tokenizer, lite = load_for_decoding(args)
    exits, room = list(exit_rule([1.0], args.exits, lite, model.args.n_layers)), model.args.max_seq_len
    work = [(name, e, p) for name, e in sets if len(p := tokenizer.encode(prompt_text(e), bos=True)) < room]
    if not work:
        raise InputError(f"all {len(sets)} prompts fill the context of {room} tokens; take shorter ones")
    if len(work) < len(sets) and os.environ.get("RANK", "0") == "0":
        print(f"{len(sets) - len(work)} prompts fill the context of {room} tokens: left out", file=sys.stderr)
    how = dict(max_new_tokens=args.max_new_tokens, eos=tokenizer.eos, recompute=args.recompute)
    return model, tokenizer, lite, exits, work, how | dict(frequent=frequent_tokens(args, lite))

def main():
    """Answer what the file of answers lacks, under every setting, and tell what came out."""
    parser = flags(__doc__)
    parser.add("--threshold", [[0.95], [0.9], [0.8], [0.6]], nargs="*", help="rules to set against full "
               "depth: each one number for all exits, or one per exit with commas")
    parser.add("--out", metavar="FILE.jsonl", help="the answers (default: in results/, named by settings)")
    args = parser.parse_args()
    model, tokenizer, lite, exits, work, how = prepare(args)
    L = model.args.n_layers
    rules = {f"threshold {','.join(map(str, t))}": exit_rule(t, args.exits, lite, L) for t in args.threshold}
    chosen_for = dict(check=len(how["frequent"]), recompute=args.recompute)
    if "thresholds" in lite and all(lite.get(key, x) == x for key, x in chosen_for.items()):
        rules["lite.json"] = exit_rule(None, None, lite, L)
    settings = {FULL: (L, {})} | {name: (L, rule) for name, rule in rules.items()}
    settings |= {f"first {n} layers": (n, {}) for n in exits}
    header = identity(args, model, work, settings)
    name = (args.ckpt.parent if args.ckpt.name == "latest" else args.ckpt).resolve().name
    path = Path(args.out or f"results/{name}-{zlib.crc32(repr(header).encode()):08x}.jsonl")
    if path.suffix != ".jsonl" or path.resolve() in {Path(p).resolve() for p in args.data or []}:
        raise InputError(f"--out {path}: expected a name in .jsonl that is none of --data")

    def make(i):
        if i < len(work):
            return compare(model, tokenizer, *work[i], settings, exits, how)
        rows = [e for _, e, _ in work if e["output"] is not None]    # the last line: losses on references
        rows = rows and tokenize(rows, tokenizer, model.args.max_seq_len)
        return dict(teacher_forced=rows and [*zip([*exits, L], *exit_losses(model, rows, exits, 8))])

    answer(model, work[0][2], 4, {})                     # the first one is slow, and not recorded
    lines = collect(path, header, make, range(len(work) + 1))
    if len(lines) <= len(work):
        return                                           # another process is not done; the last one tells
    for name in [*settings, ORACLE]:
        s = Counter()                                    # sums over the prompts
        for line in (line for line in lines.values() if "runs" in line):
            s.update({key: x for key, x in line["runs"][name].items() if isinstance(x, (int, float))})
        speed = f", {s['steps'] / s['seconds']:5.0f} tokens/s" if s["seconds"] else ""       # oracle: none
        print(f"{name:>18}: {1 - s['layers'] / (s['full_layers'] or math.nan):6.1%} of layers saved, "
              f"{s['agreed'] / (s['steps'] or math.nan):6.1%} agreement{speed}")
    print(f"answers: {path}; all their figures: python docs/report.py {path}")

if __name__ == "__main__":
    run(main)
