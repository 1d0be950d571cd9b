"""What early exit is worth on the wall clock: full depth, early exit and --verify, batch 1, greedy, in one run.

    python tests/bench.py                                                              # out/, else the tiny model: 1 minute
    python tests/bench.py --ckpt smol --data alpaca_val.json --dtype bfloat16 --threshold 0.9 --force 12 --transformers
    python tests/bench.py --ckpt smol --dtype bfloat16 --context                       # time per token, 64 to 2048
    python tests/bench.py --random llama-2-7b --device cuda --force 8 16 24            # random weights, for the timing

Decoding one token reads every weight it uses once, and that is what it waits for.  So each mode is first run under a
meter that adds up the bytes of all matrices multiplied (which is also its warm-up), then timed in turns with the
others, always for --tokens tokens (no stop at EOS), decoding alone, after the prompt.  Columns:
    S          speed-up over full depth; P: the same as predicted by the bytes alone; share: (S - 1) / (P - 1)
    agreement  tokens that an exact full-depth pass over the same prefix puts first, up to EOS; full depth falls short of 100 % by rounding
    GB/s       weights read per second; the ceiling is that of one large matrix-vector product in this run
"""
import json
import platform
import statistics
import sys
import time
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import model as M  # noqa: E402
from data import Parser, embedded, number, pick_device, prompt_text, read_examples, run  # noqa: E402
from docs.report import rate  # noqa: E402
from eval import judge  # noqa: E402
from generate import Decoder, exit_rule, frequent_tokens, generate, load_for_decoding  # noqa: E402
from model import InputError, Transformer, read_args  # noqa: E402


class Eager(Decoder):
    """Copying by its definition: the exit state goes through wk and wv of every skipped layer at once."""

    def exit_early(self, token, pos):
        h, n, _, logits = self.climb(token, pos, self.thresholds)
        for block, kv in zip(self.model.layers[n:], self.cache[n:]):
            a = block.attention
            k, v = (y.unflatten(-1, (-1, a.head_dim)) for y in M.product(block.attention_norm(h), self.wkv(a)).chunk(2, -1))
            a.keep(a.rotate(k, pos), v, pos, kv)
        return [(self.choose(h, logits), n)]

    @staticmethod
    @cache
    def wkv(attention):
        """wk and wv joined and packed, like everything that is read in decoding."""
        return M.pack(torch.cat((attention.wk.weight, attention.wv.weight)))


class WholeHead(Decoder):
    """An exiting token pays the whole head after all: what the skipped layers alone are worth."""

    def choose(self, h, logits):
        return super().choose(h, None)


@contextmanager
def metered(books):
    """Adds up, in books.bytes, the bytes of the matrices that are multiplied."""
    original = M.product

    def product(x, w):
        books.bytes += w.numel() * w.element_size()
        return original(x, w)

    M.product = product
    try:
        yield
    finally:
        M.product = original


def sync(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def decode(model, prompt, tokens, thresholds, meter=False, **how):
    """One answer with its books: tokens, exits, drafts, decoding seconds, and bytes of weights read if metered."""
    a = SimpleNamespace(prompt=prompt, drafts=[], bytes=0)
    steps = generate(model, prompt, tokens, thresholds, drafts=a.drafts, **how)
    out = [next(steps)]                                  # the prompt's pass is not decoding
    sync(model.output.weight.device)
    clock = time.perf_counter()
    with metered(a) if meter else nullcontext():
        out += steps
    sync(model.output.weight.device)
    a.seconds = time.perf_counter() - clock
    a.tokens, a.exits = [t for t, _ in out], [n for _, n in out]
    return a


def theirs(other, prompt, tokens):
    """Seconds of transformers' generate for as many tokens, its prompt pass (a run for one token) taken off."""
    ids, seconds = torch.tensor([prompt], device=other.device), []
    for n in (1, tokens):
        clock = time.perf_counter()
        other.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, eos_token_id=-1,
                       pad_token_id=0)
        sync(other.device)
        seconds.append(time.perf_counter() - clock)
    return seconds[1] - seconds[0]


@torch.inference_mode()
def ceiling(model, layout):
    """Bytes per second of one large matrix-vector product: the output matrix, or one of 64 MiB; three of them, too large for the cache."""
    w = model.output.weight
    rows = max(len(w), 2 ** 26 // (w.size(1) * w.itemsize))
    big = [layout(torch.randn(rows, w.size(1), device=w.device).to(w.dtype)) for _ in range(3)]
    x, times = torch.randn(1, w.size(1), device=w.device).to(w.dtype), []
    for _ in range(5):
        sync(w.device)
        clock = time.perf_counter()
        for m in big:
            M.product(x, m)
        sync(w.device)
        times.append(time.perf_counter() - clock)
    return sum(m.numel() * w.itemsize for m in big) / statistics.median(times)


def modes_of(args, model, lite):
    """{name: how to decode}."""
    L, rule = model.args.n_layers, exit_rule(args.threshold, args.exits, lite, model.args.n_layers)
    few = dict(frequent=frequent_tokens(args, lite))
    modes = {"full depth": (dict(thresholds={}), {}),
             "full depth, shortlist at the last layer": (dict(thresholds={L: 0}), few)}
    if rule and not args.random:
        modes |= {"early exit, full checks, eager": (dict(thresholds=rule, decoder=Eager), {}),
                  "early exit, full checks": (dict(thresholds=rule), {}),
                  "early exit, shortlist, eager": (dict(thresholds=rule, decoder=Eager), few),
                  "early exit, shortlist": (dict(thresholds=rule), few),
                  "early exit, shortlist, then whole head": (dict(thresholds=rule, decoder=WholeHead), few),
                  "early exit, shortlist, recompute": (dict(thresholds=rule, recompute=True), few)}
    for n in args.force:
        modes |= {f"always exit {n}, eager": (dict(thresholds={n: 0}, decoder=Eager), few),
                  f"always exit {n}": (dict(thresholds={n: 0}), few)}
    for t in args.verify_threshold:
        modes[f"verify, {t:g}"] = (dict(thresholds=exit_rule([t], args.exits, lite, L), verify=True, draft=args.draft), few)
    if not few["frequent"]:                              # no list: the modes with one would be those without
        modes = {name: how for name, how in modes.items() if "shortlist" not in name}
    wanted = {name for name in modes if name == "full depth" or any(part in name for part in args.only or [""])}
    return {name: how | more for name, (how, more) in modes.items() if name in wanted}


def take_turns(args, model, ways, prompts):
    """{name: seconds per token, round by round}, and {layout: bytes per second of a large product, likewise}."""
    ways = {name: lambda p, f=f: f(p).seconds for name, f in ways.items()}
    if args.transformers:
        import transformers
        from reference import as_transformers
        transformers.logging.set_verbosity_error()       # it warns of the EOS that never comes
        ways["transformers generate"] = partial(theirs, as_transformers(model), tokens=args.tokens)
        ways["transformers generate"](prompts[0])
    rounds, ceilings, names = {name: [] for name in ways}, {"packed": [], "as loaded": []}, list(ways)
    for turn in range(args.rounds):
        for layout, f in zip(ceilings, (M.pack, torch.clone)):
            ceilings[layout].append(ceiling(model, f))
        seconds = dict.fromkeys(ways, 0.0)
        for i, p in enumerate(prompts, turn):
            for name in names[i % len(names):] + names[:i % len(names)]:         # nobody always follows the same
                seconds[name] += ways[name](p)
        for name in names:
            rounds[name].append(seconds[name] / (len(prompts) * (args.tokens - 1)))
    return rounds, ceilings


def books(runs, full, model, eos):
    """What a mode's metered answers show: bytes, P, layers, agreement, drafts."""
    n, L = sum(len(a.tokens) - 1 for a in runs), len(model.layers)
    ok = [judge(model, a).agrees[:a.tokens.index(eos) if eos in a.tokens else None] for a in runs]         # to the first EOS
    return dict(bytes=sum(a.bytes for a in runs) / n, P=sum(a.bytes for a in full) / sum(a.bytes for a in runs),
                layers=sum(sum(a.exits[1:]) for a in runs) / n, agreement=rate([sum(x) for x in ok], [len(x) for x in ok]),
                identical=sum(a.tokens == b.tokens for a, b in zip(runs, full)), drafts=sum(sum(a.drafts) for a in runs),
                rounds=sum(len(a.drafts) for a in runs), kept=sum(n < L for a in runs for n in a.exits))


def compare(args, model, lite, prompts, eos):
    """Meter all modes on all prompts, time them in turns, print the table; returns its figures."""
    ways = {name: partial(decode, model, tokens=args.tokens, **how) for name, how in modes_of(args, model, lite).items()}
    seen = {name: [f(p, meter=True) for p in prompts] for name, f in ways.items()}
    times, ceilings = take_turns(args, model, ways, prompts)
    rows, full = {}, times["full depth"]
    for name, t in times.items():
        r = rows[name] = dict(tokens_per_second=1 / statistics.median(t), S=statistics.median(f / x for f, x in zip(full, t)))
        if name in seen:
            r |= books(seen[name], seen["full depth"], model, eos)
            r["share"] = (r["S"] - 1) / (r["P"] - 1) if r["P"] > 1.02 else None
    for layout, measured in ceilings.items():
        top, base = statistics.median(measured), rows["full depth"]
        print(f"one large matrix-vector product, {layout}, reads {top / 1e9:.1f} GB/s: full depth could make "
              f"{top / base['bytes']:.0f} tokens/s and makes {base['tokens_per_second'] * base['bytes'] / top:.0%} of them")
    print(f"\n{'':<40} {'tok/s':>7} {'S':>6} {'P':>6} {'share':>6} {'layers':>7} {'agreement %':>19} {'MB/token':>9} {'GB/s':>6}")
    for name, r in rows.items():
        show(name, r)
    explain(rows, len(prompts))
    return dict(ceilings=ceilings, rows=rows)


def show(name, r):
    """A line of the table."""
    number = lambda x, form: "-".rjust(int(form.split(".")[0])) if x is None else format(x, form)  # noqa: E731
    agreement = "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * x for x in r["agreement"][:3])) if r.get("agreement", [None])[0] is not None else "-"
    rate_ = r["bytes"] * r["tokens_per_second"] / 1e9 if "bytes" in r else None
    print(f"{name:<40} {r['tokens_per_second']:>7.1f} {r['S']:>5.2f}x {number(r.get('P'), '5.2f')}{'x' if 'P' in r else ' '} "
          f"{number(r.get('share'), '6.2f')} {number(None if 'verify' in name else r.get('layers'), '7.2f')} {agreement:>19} "
          f"{number(r['bytes'] / 1e6 if 'bytes' in r else None, '9.1f')} {number(rate_, '6.1f')}")


def explain(rows, prompts):
    """What --verify's drafts came to, and the differences that pairs of modes show."""
    for name, r in rows.items():
        if r.get("drafts"):
            print(f"{name}: {r['drafts'] / r['rounds']:.2f} drafts a round, {r['kept'] / r['drafts']:.1%} of them kept, "
                  f"{r['kept'] / r['rounds'] + 1:.2f} tokens a round; identical to full depth on {r['identical']} of {prompts} prompts")
    for name, row in rows.items():
        if name.endswith(", eager") and name[:-7] in rows:
            lazy = rows[name[:-7]]
            print(f"{name[:-7]}: deferring the copies saves {(row['bytes'] - lazy['bytes']) / 1e6:.1f} MB and "
                  f"{1e3 / row['tokens_per_second'] - 1e3 / lazy['tokens_per_second']:.2f} ms a token")
    early, depth = (rows.get(f"early exit, shortlist{more}") for more in ("", ", then whole head"))
    if early and depth:
        print(f"early exit, shortlist: {early['S']:.2f}x, of which skipped layers {depth['S']:.2f}x (they carry over to a "
              f"large model), the skipped head {early['S'] / depth['S']:.2f}x")


def random_weights(folder, dtype, device):
    """A model of the shape that folder/params.json has, made on the device."""
    shape = read_args(folder)
    shape.vocab_size = 32000 if shape.vocab_size < 0 else shape.vocab_size           # Meta's params.json says -1
    with torch.device("meta"):
        model = Transformer(shape).to(dtype)
    model = model.to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1, 0.02) if p.dim() == 1 else p.normal_(0, 0.02)
    return model


def load(args):
    """Model, tokenizer, lite.json; with --random no tokenizer, and nothing but params.json is read."""
    if not args.random:
        return load_for_decoding(args)
    model = random_weights(args.random, getattr(torch, args.dtype or "bfloat16"), pick_device(args.device))
    return model.fuse(), None, dict(shortlist=list(range(min(2048, model.args.vocab_size))))


def context(model):
    """Milliseconds per token at growing positions, full depth, beside what attention's reading of K and V adds."""
    longest = min(2048, model.args.max_seq_len) - 16
    prompt = torch.randint(3, model.args.vocab_size, (longest,), generator=torch.Generator().manual_seed(0)).tolist()
    kv = 2 * model.layers[0].attention.n_kv_heads * model.layers[0].attention.head_dim * model.output.weight.itemsize
    print(f"{'position':>9} {'ms/token':>9} {'K and V read, MB':>17}")
    for n in (n for n in (64, 128, 256, 512, 1024, 2032) if n <= longest):
        times = [decode(model, prompt[:n], 16, {}).seconds / 15 for _ in range(5)]        # after the first token
        print(f"{n:>9} {1e3 * statistics.median(times):>9.2f} {n * kv * model.args.n_layers / 1e6:>17.2f}")


def main():
    parser = Parser(__doc__)
    parser.add("--threshold", help="confidence above which to leave, for all exits or one each; 1: never (default: lite.json's, else 0.9)")
    for flag in ("--ckpt", "--data", "--exits", "--shortlist", "--dtype", "--device"):
        parser.add(flag)
    parser.add("--draft", 4)
    parser.add_argument("--random", metavar="DIR", help="random weights in the shape of DIR/params.json: for timing alone")
    parser.add("--prompts", 10, type=number(int, 1), metavar="N", help="how many")
    parser.add("--tokens", 96, type=number(int, 2), metavar="N", help="new tokens for each")
    parser.add("--rounds", 3, type=number(int, 1), metavar="N", help="timed turns; the median counts")
    parser.add_argument("--force", type=int, nargs="*", default=[], metavar="N", help="also leave always after these layers (any)")
    parser.add_argument("--verify-threshold", type=float, nargs="*", default=[0.5, 0.8], metavar="X",
                        help="a verify mode for each (default: 0.5 0.8)")
    parser.add_argument("--only", nargs="+", metavar="PART", help="full depth, and the modes with one of these in their names")
    parser.add_argument("--context", action="store_true", help="time per token against position instead")
    parser.add_argument("--transformers", action="store_true", help="time transformers' generate, too (pip install transformers)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    args = parser.parse_args()
    model, tokenizer, lite = load(args)
    if args.threshold is None and "thresholds" not in lite:
        args.threshold = [0.9]
    card = torch.cuda.get_device_name() if model.output.weight.is_cuda else f"{torch.get_num_threads()} CPU threads"
    print(f"{card}, {platform.processor() or platform.machine()}, torch {torch.__version__}, {model.output.weight.dtype}")
    if args.context:
        return context(model)
    examples = [e for path in args.data or [] for e in read_examples(path)] or embedded(1000, split="test")
    examples = examples[::max(1, len(examples) // args.prompts)]
    prompts = ([list(range(100, 164))] * args.prompts if args.random else
               [tokenizer.encode(prompt_text(e), bos=True) for e in examples])
    prompts = [p for p in prompts if len(p) + args.tokens <= model.args.max_seq_len][:args.prompts]
    if not prompts:
        raise InputError(f"--tokens {args.tokens}: no prompt leaves room for them in the context, {model.args.max_seq_len}; take fewer")
    if not all(0 < n <= model.args.n_layers for n in args.force):
        raise InputError(f"--force {args.force}: expected layers from 1 to {model.args.n_layers}")
    result = compare(args, model, lite, prompts, tokenizer and tokenizer.eos)
    if args.json:
        Path(args.json).write_text(json.dumps(dict(settings=vars(args), **result)) + "\n")


if __name__ == "__main__":
    run(main)
