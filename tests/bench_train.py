"""What LITE's losses cost in training: seconds a step and peak memory, beside plain tuning on the same batches.

    python tests/bench_train.py                                              # the tiny model: half a minute
    python tests/bench_train.py --ckpt smollm2 --data alpaca_train.json --batch-size 16 --micro-batch-size 8
    python tests/bench_train.py --random DIR --exits 1,2,3,4,5,6 --batch-size 4 --micro-batch-size 4 --steps 4 --device cuda

Each mode runs in processes of its own (memory is the process's largest resident size, on a GPU what was allocated
there), in turns, and reports the fastest time of each batch: noise of the machine only ever adds.  The bound is the
plain step, and for each exit one norm, head and cross-entropy, forward, recomputed and backward, on response positions
alone (which, timed alone, may cost more than within a step).
"""
import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import train as T  # noqa: E402
from bench import random_weights, sync  # noqa: E402
from data import TINY_FOLDER, Tokenizer, batches, collate, embedded, number, read_examples, run, share, tokenize  # noqa: E402
from model import IGNORE, LOGIT_ROWS, Transformer, check_exits, default_exits, find_checkpoint, load_meta, read_lite  # noqa: E402


def setup(args):
    """Model, rows and a few batches, the same in every mode: an epoch's, at even distances when sorted by tokens."""
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    if args.random:                                      # all tokens but the first are response
        model = random_weights(args.random, dtype, args.device)
        rows = [(torch.randint(model.args.vocab_size, (args.max_len,)).tolist(), 1) for _ in range(4 * args.batch_size)]
    elif args.ckpt:
        model = load_meta(args.ckpt, dtype, args.device)
        rows = tokenize(read_examples(args.data), Tokenizer.load(find_checkpoint(args.ckpt), model.args.vocab_size), args.max_len, lambda s: 0)
    else:
        tokenizer, model = Tokenizer.load(TINY_FOLDER), Transformer(T.TINY).init_weights().to(args.device, dtype)
        rows = tokenize(embedded(100 * args.batch_size), tokenizer, 64)
    order = batches(rows, args.batch_size, 0, 0)
    order = sorted((b for b in order if len(b) == args.batch_size), key=lambda b: sum(len(rows[i][0]) for i in b))
    if not order:
        sys.exit(f"{len(rows)} examples, too few for a batch of {args.batch_size}")
    return model, rows, [order[(2 * i + 1) * len(order) // (2 * args.steps)] for i in range(args.steps)]


def measure(args):
    """Run one mode over the batches; print its times and the process's peak memory, bytes."""
    model, rows, plan = setup(args)
    L, device = model.args.n_layers, model.output.weight.device
    asked = check_exits(args.exits or args.ckpt and read_lite(find_checkpoint(args.ckpt)).get("exits") or default_exits(L), L)
    exits = asked if args.mode == "lite" else []
    run = SimpleNamespace(exits=exits, weights=[1.0] * (len(exits) + 1), copying=0.0, choices=0.0, micro_batch_size=args.micro_batch_size,
                          weight_decay=0.0, lr=1e-4, head_lr=1.0, warmup=0.0, steps=len(plan), clip=1.0, out="")
    optimizer, seconds = T.optimizer_for(model, run), []
    loss = lambda h, targets: F.cross_entropy(model.logits(h), targets, reduction="sum")  # noqa: E731

    def heads(batch):
        """One exit's share: norm, head and cross-entropy on the responses of each micro-batch, recomputed backward."""
        for part in share(batch, 0, 1, args.micro_batch_size):
            labels = collate([rows[i] for i in part], device)[1]
            for targets in labels[labels != IGNORE].split(LOGIT_ROWS):
                h = torch.randn(len(targets), model.args.dim, dtype=model.output.weight.dtype, device=device, requires_grad=True)
                checkpoint(loss, h, targets, use_reentrant=False).backward()

    for batch in [plan[0], *plan]:                       # the first time warms up
        sync(device)
        clock = time.perf_counter()
        heads(batch) if args.mode == "heads" else T.update(model, optimizer, rows, batch, 0, run)
        sync(device)
        seconds.append(time.perf_counter() - clock)
    peak = (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
    tokens = [sum(len(rows[i][0]) for i in batch) for batch in plan]
    print(json.dumps(dict(seconds=seconds[1:], peak=peak, tokens=sum(tokens), exits=len(asked))))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", help="Meta-format folder (default: the tiny model from nothing)")
    parser.add_argument("--data", help="Alpaca-format file, with --ckpt")
    parser.add_argument("--random", metavar="DIR", help="random weights in the shape of DIR/params.json, random tokens")
    parser.add_argument("--exits", type=number(int, 1, many=True), metavar="N,N..", help="default: as train.py's")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--micro-batch-size", type=int, default=32)
    parser.add_argument("--max-len", type=int, default=512)
    parser.add_argument("--dtype", help="default: float32, with --ckpt or --random bfloat16")
    parser.add_argument("--steps", type=int, default=8, help="batches per mode and round (default: 8)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--mode", choices=("plain", "lite", "heads"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if bool(args.ckpt) != bool(args.data):
        parser.error("--ckpt and --data: give both or none")
    args.dtype = args.dtype or ("bfloat16" if args.ckpt or args.random else "float32")
    if args.mode:
        return measure(args)
    results = {"plain": [], "lite": [], "heads": []}
    for _ in range(args.rounds):
        for mode in results:
            done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--mode", mode], capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            results[mode].append(json.loads(done.stdout.splitlines()[-1]))
    best = {m: sum(map(min, zip(*(r["seconds"] for r in rs)))) / args.steps for m, rs in results.items()}
    peak = {m: min(r["peak"] for r in rs) for m, rs in results.items()}
    tokens, exits = results["plain"][0]["tokens"], results["plain"][0]["exits"]
    bound = best["plain"] + exits * best["heads"]
    print(f"{args.random or args.ckpt or 'tiny'}, {args.device}, {args.dtype}, {args.steps} batches of {args.batch_size} ({tokens / args.steps:.0f} tokens), "
          f"{exits} exits, {torch.get_num_threads()} threads")
    print(f"{'':>22} {'s/step':>8} {'tokens/s':>9} {'peak MiB':>9}")
    for mode in ("plain", "lite"):
        print(f"{mode:>22} {best[mode]:>8.3f} {tokens / args.steps / best[mode]:>9.0f} {peak[mode] / 2**20:>9.0f}")
    print(f"{'bound':>22} {bound:>8.3f}  = plain + {exits} x {best['heads']:.3f}")
    print(f"LITE takes {best['lite'] / best['plain']:.2f}x plain's time, {best['lite'] / bound:.2f}x the bound, "
          f"and {peak['lite'] / peak['plain']:.2f}x plain's memory")


if __name__ == "__main__":
    run(main)
