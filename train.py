"""LITE tuning: every exit layer learns to answer, through the head of the last.

    python train.py                                          # a tiny LLaMA from nothing, on the embedded set, minutes on a CPU
    torchrun train.py --ckpt llama-2-7b                      # LITE-tune Meta's weights on data/alpaca_data.json
    torchrun --nproc-per-node 8 train.py --ckpt llama-2-13b --lr 1e-5 --epochs 5
    python train.py --no-lite --out plain                    # the baseline: the last layer's loss alone
    python train.py --resume                                 # go on where out/ stopped, to the same weights bit for bit

The run goes to out/: log.jsonl, and complete Meta folders out/step-N/ of which out/latest is the newest.
"""
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.adamw import adamw
from tqdm import tqdm

from data import (Parser, Tokenizer, batches, collate, embedded, pick_device, read_examples, run, share, tokenize,
                  train_tokenizer)
from eval import exit_losses
from model import (InputError, ModelArgs, Transformer, check_exits, default_exits, find_checkpoint, lite_loss, load_meta,
                   save_meta, wide)

TINY = ModelArgs(dim=128, n_layers=8, n_heads=4, multiple_of=32, max_seq_len=256)
# The two recipes: from nothing on the embedded set, and Stanford Alpaca's for LLaMA-2-7B.
RECIPES = {
    "tiny": dict(steps=2400, epochs=1, batch_size=64, micro_batch_size=64, lr=3e-3, weight_decay=0.1, max_len=64,
                 dtype="float32", val=512),
    "ckpt": dict(steps=None, epochs=3, batch_size=128, micro_batch_size=4, lr=2e-5, weight_decay=0.0, max_len=512,
                 dtype="bfloat16", val=200)}


class AdamW(torch.optim.Optimizer):
    """torch's AdamW on fp32 master weights, which live beside the moments in the optimizer's state.

    A bf16 weight keeps 8 bits: at lr 2e-5 most updates are smaller than half its last one and would be lost.  For an
    fp32 (or wider) weight the master is the weight itself.
    """

    def __init__(self, params, lr, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, betas=betas, eps=eps))

    def master(self, p):
        """The state of p: master, m, v (as p, fp32 or wider) and the count of steps."""
        if not self.state[p]:
            w = wide(p.detach())
            self.state[p] = dict(master=w, m=torch.zeros_like(w), v=torch.zeros_like(w), step=torch.zeros(()))
        return self.state[p]

    @torch.no_grad()
    def step(self):
        """One update of every weight that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            states = [self.master(p) for p in params]
            adamw([s["master"] for s in states], [wide(p.grad) for p in params], [s["m"] for s in states],
                  [s["v"] for s in states], [], [s["step"] for s in states], fused=True, amsgrad=False, maximize=False,
                  lr=group["lr"], weight_decay=group["weight_decay"], beta1=group["betas"][0], beta2=group["betas"][1],
                  eps=group["eps"])
            for p, s in zip(params, states):
                p.copy_(s["master"])

    def save_state(self):
        """The states in the order of the parameters, as a list of dicts of tensors."""
        return [self.master(p) for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def load_state(self, states):
        """Take over what save_state gave. (Optimizer.load_state_dict would cast the masters to the weights' dtype.)"""
        for p, s in zip((p for group in self.param_groups for p in group["params"]), states, strict=True):
            p.copy_(s["master"])
            self.state[p] = {**{k: t.to(p.device) for k, t in s.items()}, "master": wide(p.detach())}
            if p.dtype != self.state[p]["master"].dtype:
                self.state[p]["master"].copy_(s["master"])


def optimizer_for(model, args):
    """AdamW that decays matrices, not norms."""
    params = list(model.parameters())
    return AdamW([dict(params=[p for p in params if p.dim() > 1], weight_decay=args.weight_decay),
                  dict(params=[p for p in params if p.dim() == 1], weight_decay=0.0)], lr=args.lr)


def learning_rate(step, args):
    """Linear warm-up over --warmup of all steps, then a cosine to 0. step counts from 0."""
    warm = max(1, round(args.warmup * args.steps))
    return args.lr * min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * max(0, step - warm) / max(1, args.steps - warm)))


def gradients(model, rows, batch, args, rank=0, world=1):
    """Run a global batch forward and backward. Returns the mean loss per exit and last layer (X+1,), over all ranks.

    One mean over all response tokens of the batch, however it is cut into ranks and micro-batches: each part adds its
    sum / count.  DDP averages gradients over ranks, hence `* world`.
    """
    device = next(model.parameters()).device
    count = sum(len(ids) - n_prompt for ids, n_prompt in (rows[i] for i in batch))
    total = 0
    for part in share(batch, rank, world, args.micro_batch_size):
        losses = model(*collate([rows[i] for i in part], device), args.exits)
        (lite_loss(losses, args.weights) * world / count).backward()       # one backward: DDP allows no second
        total = total + losses.detach()
    if world > 1:
        dist.all_reduce(total)
    return total / count


def save(out, step, model, optimizer, tokenizer, args):
    """Write out/step-N whole or not at all, let out/latest point to it, keep the newest two."""
    folder, tmp, link = out / f"step-{step}", out / f".step-{step}.tmp", out / ".latest.tmp"
    for old in out.glob(".*.tmp"):
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    if not folder.exists():
        tmp.mkdir(parents=True)
        save_meta(tmp, model, tokenizer, dict(exits=args.exits, weights=args.weights))
        torch.save(dict(step=step, args=vars(args), optimizer=optimizer.save_state()), tmp / "trainer.pt")
        tmp.rename(folder)
    link.symlink_to(folder.name)
    link.replace(out / "latest")
    for old in sorted(out.glob("step-*"), key=lambda p: int(p.name[5:]))[:-2]:
        shutil.rmtree(old)


def parse_args():
    """The run's settings; None where the recipe, or the run that is resumed, decides."""
    parser = Parser(__doc__)
    both = "(default: {0[%s]} from nothing, {1[%s]} with --ckpt)"

    def add(flag, help, **more):
        key = flag[2:].replace("-", "_")
        parser.add(flag, help=f"{help} " + (both % (key, key)).format(RECIPES["tiny"], RECIPES["ckpt"]), **more)

    parser.add("--ckpt")
    parser.add("--data", help="Alpaca-format .json or .jsonl (default with --ckpt: data/alpaca_data.json; without: the "
               "embedded set)")
    parser.add("--out", "out")
    parser.add("--resume", action="store_true", help="go on with the run in --out, with its settings")
    parser.add("--exits")
    parser.add("--weights", metavar="W,W..", type=lambda s: [float(x) for x in s.split(",")],
               help="of the exits' losses and the last layer's (default: all 1)")
    parser.add("--no-lite", action="store_true", help="plain tuning: no exits, the last layer's loss alone")
    add("--steps", "optimizer steps; with --data, instead of --epochs", type=int, metavar="N")
    add("--epochs", "passes over --data", type=float, metavar="N")
    add("--batch-size", "sequences per step, over all ranks", type=int, metavar="N")
    add("--micro-batch-size", "sequences per rank and pass", type=int, metavar="N")
    add("--lr", "peak learning rate", type=float, metavar="X")
    add("--weight-decay", "of AdamW, on matrices", type=float, metavar="X")
    add("--max-len", "tokens an example may have, prompt and response together; longer responses are cut", type=int, metavar="N")
    add("--dtype", "of weights and gradients; the optimizer's copy is fp32")
    add("--val", "examples held out for the validation loss", type=int, metavar="N")
    parser.add("--warmup", 0.03, type=float, metavar="X", help="share of the steps in which the learning rate rises")
    parser.add("--clip", 1.0, type=float, metavar="X", help="largest norm of the gradient")
    parser.add("--save-every", type=int, metavar="N", help="steps between saves and validations (default: a fifth of the run)")
    parser.add("--activation-checkpointing", action="store_true", help="keep one state per layer, recompute the rest")
    parser.add("--limit")
    parser.add("--seed", 0)
    parser.add("--device")
    return parser.parse_args()


def resolve(args):
    """Fill in the recipe; or, on --resume, take the settings of the run in --out and refuse flags that contradict."""
    out = Path(args.out)
    if not args.resume:
        if (out / "latest").exists():
            raise InputError(f"--out {out} holds a run already: --resume goes on with it, another --out starts a new one")
        if out.exists() and (not out.is_dir() or any(p.name != "log.jsonl" for p in out.iterdir())):
            raise InputError(f"--out {out} exists and is not a run of train.py; choose another")
        for key, value in RECIPES["ckpt" if args.ckpt else "tiny"].items():
            if getattr(args, key) is None:
                setattr(args, key, value)
        return None
    saved = torch.load(find_checkpoint(out) / "trainer.pt", map_location="cpu", weights_only=True)
    given = {flag[2:].split("=")[0].replace("-", "_") for flag in sys.argv[1:] if flag.startswith("--")}
    for key in sorted(given - {"resume", "out", "device"}):
        if key in saved["args"] and getattr(args, key) != saved["args"][key]:
            raise InputError(f"--{key.replace('_', '-')} {getattr(args, key)}: the run in {out} has {saved['args'][key]}; "
                             "a resumed run keeps its settings")
    vars(args).update({**saved["args"], "out": args.out, "resume": True, "device": args.device})
    return saved


def load_data(args, tokenizer, note):
    """Training and validation rows: the embedded set, made to measure, or --data less --val examples."""
    if not args.ckpt and not args.data:
        train, val = embedded(args.steps * args.batch_size, args.seed), embedded(args.val, split="test")
    else:
        train = [e for path in args.data or ["data/alpaca_data.json"] for e in read_examples(path)][:args.limit]
        if any(e["output"] is None for e in train):
            raise InputError("--data has examples without an output: training needs Alpaca's format")
        if len(train) <= args.val:
            raise InputError(f"--data has {len(train)} examples, no more than the --val {args.val} held out")
        random.Random(0).shuffle(train)
        val, train = train[:args.val], train[args.val:]
    return tokenize(train, tokenizer, args.max_len, note), tokenize(val, tokenizer, args.max_len, note)


def build(args, device):
    """Model and tokenizer: Meta's weights, or a tiny model from nothing."""
    dtype = getattr(torch, args.dtype)
    if args.ckpt:
        folder = find_checkpoint(args.ckpt)
        model = load_meta(folder, dtype, device)
        tokenizer = Tokenizer.load(folder, model.args.vocab_size)
    else:
        tokenizer = train_tokenizer()
        model = Transformer(ModelArgs(**{**vars(TINY), "vocab_size": tokenizer.size}))
        model.init_weights()
        model.to(device, dtype)
    model.checkpoint_blocks = args.activation_checkpointing
    L = model.args.n_layers
    args.exits = [] if args.no_lite else check_exits(args.exits if args.exits is not None else default_exits(L), L)
    args.weights = args.weights or [1.0] * (len(args.exits) + 1)
    if len(args.weights) != len(args.exits) + 1 or min(args.weights) < 0 or not sum(args.weights):
        raise InputError(f"--weights: {args.weights} given; expected {len(args.exits) + 1} numbers >= 0 (exits "
                         f"{args.exits} and the last layer)")
    if args.max_len > model.args.max_seq_len:
        raise InputError(f"--max-len {args.max_len}: the model's context is {model.args.max_seq_len} tokens")
    return model, tokenizer


def main():
    args = parse_args()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(args.device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"))
    note = (lambda *text: tqdm.write(" ".join(map(str, text)))) if rank == 0 else (lambda *text: None)
    saved = resolve(args)
    torch.manual_seed(args.seed)
    model, tokenizer = build(args, device)
    optimizer = optimizer_for(model, args)
    rows, val = load_data(args, tokenizer, note)
    args.steps = args.steps or math.ceil(args.epochs * math.ceil(len(rows) / args.batch_size))
    args.save_every = args.save_every or math.ceil(args.steps / 5)
    if saved:
        optimizer.load_state(saved["optimizer"])
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        train(model, optimizer, tokenizer, rows, val, args, saved["step"] if saved else 0, rank, world, note)
    finally:
        if world > 1:
            dist.destroy_process_group()


def train(model, optimizer, tokenizer, rows, val, args, step, rank, world, note):
    """The loop. step is the number of steps done; batches and learning rate are functions of it and the seed."""
    out, stop, started = Path(args.out), [], time.time()
    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, lambda number, _: stop.append(number))
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model
    per_epoch, order, layers = math.ceil(len(rows) / args.batch_size), None, [*args.exits, "last"]
    log = Log(out / "log.jsonl", step) if rank == 0 else None
    bar = tqdm(total=args.steps, initial=step, desc="train", unit="step", disable=None if rank == 0 else True, mininterval=1)
    while True:
        halt = agree(stop, world, next(model.parameters()).device)
        if halt or step % args.save_every == 0 or step == args.steps:
            losses, _ = exit_losses(model, val, args.exits, args.micro_batch_size)
            note(f"step {step}: validation loss " + ", ".join(f"{n} {x:.3f}" for n, x in zip(layers, losses)))
            if rank == 0:
                log.write(step=step, validation=losses)
                save(out, step, model, optimizer, tokenizer, args)
        if halt or step == args.steps:
            break
        if order is None or step % per_epoch == 0:
            order = batches(rows, args.batch_size, args.seed, step // per_epoch)
        batch, clock = order[step % per_epoch], time.time()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        losses = gradients(ddp, rows, batch, args, rank, world).tolist()           # waits for the device
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip).item()
        if not math.isfinite(sum(losses) + norm):
            raise InputError(f"step {step + 1}: loss {losses}, gradient norm {norm}; stopped. {out}/latest is the last good "
                             "save: go on from it with a smaller --lr and another --out")
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        tokens = sum(len(rows[i][0]) for i in batch)
        if rank == 0:
            log.write(step=step, losses=losses, lr=group["lr"], norm=norm, tokens=tokens, seconds=time.time() - clock)
        bar.set_postfix_str(f"loss {' '.join(f'{x:.2f}' for x in losses)}, {tokens / (time.time() - clock):.0f} tok/s", refresh=False)
        bar.update()
    bar.close()
    if halt:
        note(f"stopped by signal {halt} after step {step}; saved; go on with --resume")
        sys.exit(128 + halt)
    note(f"trained {step} steps in {time.time() - started:.0f} s; the model is in {out}/latest")


class Log:
    """log.jsonl, one object a line. A resumed run first drops what was logged after its save."""

    def __init__(self, path, step):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [s for s in path.read_text().splitlines() if json.loads(s)["step"] <= step] if step else []
        tmp = path.with_name(".log.tmp")
        tmp.write_text("".join(s + "\n" for s in kept))
        tmp.replace(path)
        self.file = path.open("a")

    def write(self, **entry):
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()


def agree(stop, world, device):
    """The signal that any rank caught, or 0: the same answer on all ranks."""
    caught = torch.tensor(max(stop, default=0), device=device)
    if world > 1:
        dist.all_reduce(caught, dist.ReduceOp.MAX)
    return caught.item()


if __name__ == "__main__":
    run(main)
