"""The memory that LITE tuning takes of each card: a sum, from params.json alone, without weights or a GPU.

    python docs/plan.py --ckpt llama-2-7b --nproc 8
    python docs/plan.py --ckpt llama-2-13b --nproc 8 --activation-checkpointing --card-gb 80

Flags and defaults are train.py's, and --nproc and --card-gb.  It ends with exit code 2 if the cards are too small.  Taken for granted is
that all sequences have --max-len tokens, all of them response, and that attention keeps its (T, T) matrices.
"""
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from data import number, run  # noqa: E402
from model import LOGIT_ROWS, InputError, Transformer, find_checkpoint, read_args  # noqa: E402
from train import choose_exits, fill_in, flags, optimizer_for  # noqa: E402

GIB = 2 ** 30


def kept(f, x, **more):
    """Bytes that autograd keeps of f(x, ..) for the backward pass, f's parameters apart."""
    kept, own = [], {p.untyped_storage()._cdata for p in f.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.untyped_storage()), lambda _: None):
        f(x, **more)                                     # never run backward
    return sum({s._cdata: s.nbytes() for s in kept if s._cdata not in own}.values())


def plan(shape, args, world, card=80 * GIB):
    """What training takes of the fullest of `world` cards, at most: {part: (bytes, why)}, with their sum.
    card: its bytes; 3/40 of them, from 1 to 6 GiB, are left to what cannot be counted: a guess.
    On the meta device tensors have shapes alone, so nothing is allocated."""
    dtype = getattr(torch, args.dtype)
    with torch.device("meta"):
        model = Transformer(shape).to(dtype)
    dealt, c, L = [0] * world, dtype.itemsize, shape.n_layers
    for group in optimizer_for(model, args).param_groups:            # as ZeRO deals them out
        dealt[dealt.index(min(dealt))] += sum(p.numel() for p in group["params"])
    B, T = min(args.micro_batch_size, math.ceil(args.batch_size / world)), args.max_len - 1
    h = torch.empty(B, T, shape.dim, dtype=dtype, device="meta", requires_grad=True)
    source = torch.empty_like(h, requires_grad=True) if args.copying else None
    block, n, state = kept(model.layers[0], h, source=source), sum(dealt), 12 if c < 4 else 8
    blocks, how = ((L * h.nbytes * (1 + bool(args.copying)) + block, "their inputs, and one block recomputed") if
                   args.activation_checkpointing else (L * block, "see --activation-checkpointing"))
    taught, teacher = bool(args.teacher), 0
    copies = 3 + (0 < args.choices < 1)                  # log-softmax, its gradient, the logits'; two aims: one more
    if taught:
        known = replace(read_args(find_checkpoint(args.teacher)), vocab_size=shape.vocab_size)
        with torch.device("meta"):
            teacher = sum(p.numel() for p in Transformer(known).parameters())
    parts = dict(
        weights=((n + teacher) * c, f"{n:,}, {c} bytes each{f'; the teacher has {teacher:,} more' if taught else ''}"),
        gradients=(n * c, "as many: once, in the buckets that are summed over the ranks"),
        optimizer=(max(dealt) * state, f"{state} bytes, fp32 {'master and ' * (c < 4)}moments, for the "
                   f"{max(dealt):,} weights of the fullest rank"),
        activations=(blocks + h.nbytes * (len(args.exits) + 1), f"{B} x {T} tokens, {L} blocks: {how}"),
        logits=(shape.vocab_size * (4 * copies * min(B * T, LOGIT_ROWS) + 3 * c * shape.dim + 4 * B * T * taught), "one exit's, "
                f"of {LOGIT_ROWS} positions, fp32, {copies} times; the head's gradient while it is summed{'; what the teacher says of all' * taught}"),
        step=(max(p.numel() for p in model.parameters()) * 4 * (c < 4), "the largest gradient in fp32"),
        reserve=(min(max(card * 3 / 40, GIB), 6 * GIB), "CUDA, NCCL, fragmentation"))
    return {**parts, "sum": (sum(n for n, _ in parts.values()), f"with {world} process(es)")}


def fit(shape, args, world, card):
    """Print the plan; InputError if it is more than the card's bytes."""
    shape = replace(shape, vocab_size=shape.vocab_size if shape.vocab_size > 0 else 32000)   # Meta's says -1
    parts = plan(shape, args, world, card)
    print("GiB per card, at most:")
    for part, (n, why) in parts.items():
        print(f"{part:>12} {n / GIB:8.2f}  {why}")
    if (total := parts["sum"][0]) > card:
        enough = next((n for n in (*range(1, 9), 16, 32, 64) if plan(shape, args, n, card)["sum"][0] <= card), 0)
        raise InputError(f"{total / GIB:.1f} GiB per process, but the card has {card / GIB:.1f}: "
                         f"{f'{enough} cards fit (on one machine --nproc-per-node {enough})' if enough else 'no number of cards fits'}; or try "
                         "--activation-checkpointing or a smaller --micro-batch-size or --max-len")


def main():
    parser = flags(__doc__)
    parser.add("--nproc", 1, type=number(int, 1, 512), metavar="N", help="processes, over all machines")
    parser.add("--card-gb", 80.0, type=number(float, 0.1), metavar="GB", help="memory of a card, in GiB")
    parser.add_argument("--settings", type=json.loads, default={}, metavar="JSON", help="in place of flags, as train.py passes them on a GPU")
    args = parser.parse_args()
    if args.resume:
        raise InputError("--resume: nothing is saved here to go on with; give the flags that the run was started with")
    vars(args).update(args.settings)
    if not args.ckpt:
        raise InputError("--ckpt: expected the folder of a model; of it params.json is enough")
    fill_in(args)
    shape = read_args(folder := find_checkpoint(args.ckpt))
    choose_exits(args, shape, folder)
    fit(shape, args, args.nproc, args.card_gb * GIB)


if __name__ == "__main__":
    run(main)
