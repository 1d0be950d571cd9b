"""LITE tuning: every exit layer learns to answer, through the head of the last.

    python train.py                                     # a tiny LLaMA from nothing, minutes on a CPU
    torchrun --nproc-per-node 8 train.py --ckpt llama-2-7b      # LITE-tune Meta's weights on Alpaca
    python train.py --no-lite --out plain               # the baseline: the last layer's loss alone
    python train.py --resume                            # go on where out/ stopped (on a CPU bit for bit)

The run goes to out/: log.jsonl, and complete Meta folders out/step-N/, the newest of which is out/latest.
"""
import json, math, os, random, re, shutil, signal, subprocess, sys, time, zlib
from argparse import Namespace
from collections import Counter, defaultdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.optim.adamw import adamw
from tqdm import tqdm

from data import (TINY_FOLDER, Parser, Tokenizer, batches, collate, embedded, number, pick_device,
                  prompt_text, read_examples, run, share, tokenize)
from eval import exit_losses
from model import (InputError, ModelArgs, Transformer, check_exits, default_exits, find_checkpoint, lite_loss,
                   load_meta, load_tensors, read_args, read_json, read_lite, save_meta, wide)

SHORTLIST = 2048                       # frequent tokens kept in lite.json, for cheap exit checks
MACHINE = {"out", "resume", "device", "timeout"}     # may differ on --resume
LAYOUT = {"micro_batch_size", "activation_checkpointing"}            # may, too: this changes rounding alone
TINY = ModelArgs(dim=96, n_layers=8, n_heads=4, vocab_size=512, multiple_of=32, max_seq_len=256)
RECIPES = {  # flag: from nothing on the embedded set; with --ckpt, Stanford Alpaca's for 7B; type; meaning
    "--layers": (TINY.n_layers, None, number(int, 1), "of the model; one in --ckpt has its own"),
    "--steps": (2800, None, number(int, 1), "optimizer steps; with --data, in place of --epochs"),
    "--epochs": (None, 3, number(float, 0.001, 1000), "passes over --data"),
    "--batch-size": (32, 128, number(int, 1), "sequences per step, over all ranks"),
    "--micro-batch-size": (32, 4, number(int, 1), "sequences per rank and pass"),
    "--lr": (3e-3, 2e-5, number(float, 0), "peak learning rate"),
    "--weight-decay": (0.1, 0.0, number(float, 0), "of AdamW, on matrices"),
    "--max-len": (64, 512, number(int, 2), "tokens an example may have; longer responses are cut"),
    "--dtype": ("float32", "bfloat16", str, "of weights and gradients; the optimizer keeps fp32 copies"),
    "--val": (512, 200, number(int, 1), "prompts held out for the validation loss")}

class AdamW(torch.optim.Optimizer):
    """torch's AdamW on fp32 masters of the weights, kept beside the moments. (A bf16 weight has 8 bits: at lr
    2e-5 most updates are less than half its last one.) The master of an fp32 or wider weight is itself."""

    def __init__(self, params, lr, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay))
        for p in (p for group in self.param_groups for p in group["params"]):
            w = wide(p.detach())                         # of p's shape, fp32 or wider, like both moments
            self.state[p] = dict(master=w, m=torch.zeros_like(w), v=torch.zeros_like(w), step=w.new_zeros(()))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):         # one fp32 gradient at a time
                master, m, v, t = self.state[p].values()
                adamw([master], [wide(p.grad)], [m], [v], [], [t], fused=True, amsgrad=False, maximize=False,
                      beta1=0.9, beta2=0.95, eps=1e-8, lr=group["lr"], weight_decay=group["weight_decay"])
                p.copy_(master)

def optimizer_for(model, args, world=1):
    """AdamW that decays matrices, not norms. On several ranks ZeRO, stage 1: each keeps the state of its own
    parameters (whole ones, the largest dealt out first), updates these, and sends the others their values."""
    params = sorted(model.parameters(), key=torch.numel, reverse=True)           # as ZeRO deals them out
    groups = [dict(params=[p], weight_decay=args.weight_decay * (p.dim() > 1),
                   faster=args.head_lr if p is model.output.weight else 1) for p in params]
    return AdamW(groups, lr=args.lr) if world == 1 else ZeroRedundancyOptimizer(groups, AdamW, lr=args.lr)

def optimizer_state(model, optimizer):
    """{name: state} of the parameters whose state this rank keeps: what it saves."""
    state = getattr(optimizer, "optim", optimizer).state             # of ZeRO its own part
    return {name: state[p] for name, p in model.named_parameters() if p in state}

@torch.no_grad()
def load_optimizer(folder, model, optimizer):
    """Take over what any number of ranks saved. (torch's load_state_dict would cast masters to bf16.)"""
    params, paths = dict(model.named_parameters()), folder.glob("optimizer.*.pt")
    saved = {k: v for path in paths for k, v in load_tensors(path).items()}      # mapped, not read
    if saved.keys() != params.keys():
        raise InputError(f"{folder}: {len(saved)} of {len(params)} states; is an optimizer.NN.pt missing?")
    for name, p in params.items():
        p.copy_(saved[name]["master"])
    for name, state in optimizer_state(model, optimizer).items():
        for key, t in state.items():
            t.copy_(saved[name][key])

def learning_rate(step, args):
    """Linear warm-up over --warmup of all steps, then a cosine to 0. step counts from 0."""
    warm = max(1, round(args.warmup * args.steps))
    done = max(0, step - warm) / max(1, args.steps - warm)
    return args.lr * min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * done))

def distribute(model, exits, world):
    """The model in DDP, where p.grad is a view of the buckets that ranks sum: gradients exist once."""
    if world == 1:
        return model
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    ddp(*collate([], model.output.weight.device), exits).sum().backward()
    model.zero_grad()            # DDP has now laid its buckets out for good: a resumed run will round alike
    return ddp

def departures(rows, ids, step, args, device):
    """Where the tokens of the rows `ids` leave in training, (B, T): at a random exit for a share --copying of
    those that decoding would make, else never (inf). A function of step and row: any rank draws the same."""
    out = []
    for i in ids if args.copying else ():
        r, (tokens, n_prompt) = random.Random(f"{args.seed} {step} {i}"), rows[i]
        out.append(torch.tensor([math.inf] * n_prompt + [
            r.choice(args.exits) if r.random() < args.copying else math.inf for _ in tokens[n_prompt:-1]]))
    return pad_sequence(out, batch_first=True).to(device) if out else None       # pads: 0; nobody looks

def gradients(model, rows, batch, args, step=0, rank=0, world=1, teacher=None):
    """Run a global batch forward and backward. Returns the losses (X+1,), means over all its response tokens,
    however it is cut into ranks and micro-batches: each part adds its sum / count.  DDP averages over ranks,
    hence `* world`, and at every micro-batch, on purpose: under no_sync gradients would exist twice."""
    count, total = sum(len(ids) - n_prompt for ids, n_prompt in (rows[i] for i in batch)), 0
    for part in share(batch, rank, world, args.micro_batch_size):
        tokens, labels = collate([rows[i] for i in part], next(model.parameters()).device)
        leave = departures(rows, part, step, args, tokens.device)
        losses = model(tokens, labels, args.exits, leave, teacher, args.choices)
        (lite_loss(losses, args.weights) * world / count).backward()     # one: a backward per exit breaks DDP
        total = total + losses.detach()
    if world > 1:
        dist.all_reduce(total)
    return total / count

def update(ddp, optimizer, rows, batch, step, args, rank=0, world=1, teacher=None):
    """Step `step` (from 0) of a run, on a global batch. Returns its losses [X+1] and the gradient's norm."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, args) * group["faster"]
    losses = gradients(ddp, rows, batch, args, step, rank, world, teacher).tolist()  # waits for the device
    norm = torch.nn.utils.clip_grad_norm_(ddp.parameters(), args.clip).item()
    check_finite([*losses, norm], step + 1, args)
    optimizer.step()
    optimizer.zero_grad()
    return losses, norm

def save(out, step, model, optimizer, tokenizer, args, rank=0, world=1):
    """Write out/step-N, let out/latest point to it, keep the one before. A kill at any moment leaves an out/
    that resumes: all ranks write their part under a temporary name, which rank 0 changes when all have."""
    folder, tmp = out / f"step-{step}", out / f".step-{step}.tmp"
    link, latest, wait = out / ".latest.tmp", out / "latest", dist.barrier if world > 1 else lambda: None
    last = latest.readlink().name if latest.is_symlink() else ""
    if last == folder.name:
        return                                           # a resumed run is where it was
    if rank == 0:
        for old in out.iterdir():                        # older saves, and what a killed process left
            if re.fullmatch(r"step-\d+|\..*\.tmp", old.name) and old.name != last:
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
        need, free = 14 * sum(p.numel() for p in model.parameters()), shutil.disk_usage(out).free
        if need > free:
            raise InputError(f"{out}: a save takes {need / 2**30:.1f} GiB, {free / 2**30:.1f} are free")
        tmp.mkdir()
    wait()
    if not tmp.exists():
        raise InputError(f"--out {out}: rank {rank} does not see what rank 0 wrote; machines must share it")
    torch.save(optimizer_state(model, optimizer), tmp / f"optimizer.{rank:02d}.pt")
    if rank == 0:
        save_meta(tmp, model, tokenizer, {key: vars(args)[key] for key in ("exits", "weights", "shortlist")})
        (tmp / "trainer.json").write_text(json.dumps(dict(step=step, args=settings(args))) + "\n")
    wait()
    if rank == 0:
        tmp.rename(folder)
        link.symlink_to(folder.name)
        link.replace(latest)                             # from here on it counts

def settings(args):
    """What makes the run, and stays when it is resumed; not where and how it runs."""
    return {key: value for key, value in vars(args).items() if key not in MACHINE}

def flags(doc=__doc__):
    """The parser of train.py's flags; their default is None where the recipe decides (see `fill_in`)."""
    parser = Parser(doc)
    parser.set_defaults(logged=0)                        # bytes of log.jsonl, when last saved
    parser.add("--ckpt", help="Meta-format folder or train.py's output to tune (default: a tiny new model)")
    parser.add("--data", help="Alpaca-format (default: the embedded set; with --ckpt data/alpaca_data.json)")
    parser.add("--out", "out", metavar="DIR", help="folder to write the run to")
    parser.add("--resume", action="store_true", help="go on with the run in --out, with its settings")
    parser.add("--weights", metavar="W,W..", type=number(float, 0, many=True), help="of the losses (all 1)")
    for flag, (tiny, ckpt, kind, meaning) in RECIPES.items():
        parser.add(flag, type=kind, help=f"{meaning} (default: {tiny}; with --ckpt: {ckpt})")
    part = dict(type=number(float, 0, 1), metavar="X")
    parser.add("--copying", 0.0, **part, help="share of tokens that leave in training (not in the paper)")
    parser.add("--head-lr", 1.0, type=number(float, 0), metavar="X", help="output matrix: its rate over --lr")
    parser.add("--teacher", metavar="DIR", help="learn what this model says, not labels (not in the paper)")
    parser.add("--choices", 0.0, **part, help="share of exits' loss on last layer's pick (not in the paper)")
    parser.add("--no-lite", action="store_true", help="plain tuning: the last layer's loss alone")
    parser.add("--activation-checkpointing", action="store_true", help="compute blocks twice, to save memory")
    parser.add("--warmup", 0.03, **part, help="share of steps with rising lr")
    parser.add("--clip", 1.0, type=number(float, 1e-9), metavar="X", help="largest norm of the gradient")
    parser.add("--save-every", type=number(int, 1), metavar="N", help="steps per save (default: a fifth)")
    parser.add("--timeout", 600.0, type=number(float, 1, 1e6), metavar="S", help="silence of a dead rank")
    for flag, default in {"--seed": 0, "--exits": None, "--limit": None, "--device": None}.items():
        parser.add(flag, default)
    return parser

def fill_in(args):
    """Give the settings that no flag gave the recipe's value. Returns args."""
    for flag, (tiny, ckpt, *_) in RECIPES.items():
        key = flag[2:].replace("-", "_")
        if getattr(args, key) is None and not (key == "steps" and args.epochs and args.data):
            setattr(args, key, ckpt if args.ckpt else tiny)
    return args

def resolve(parser):
    """The settings, from flags and recipe, and 0; on --resume those of the run in --out and its step."""
    args = parser.parse_args()
    out = Path(args.out)
    if not args.resume:
        ours = re.compile(r"log\.jsonl|step-0|\..*\.tmp")          # of a run that died before its first save
        fresh = lambda p: p.suffix != ".jsonl" or "losses" not in p.read_text(errors="replace")     # no step
        if out.is_file() or not all(ours.fullmatch(p.name) and fresh(p) for p in out.glob("*")):
            raise InputError(f"--out {out} is taken: go on with the run there (--resume), or choose another")
        if (args.epochs or args.limit) and not args.ckpt and not args.data:
            raise InputError("--epochs and --limit are for --data; the embedded set gives what --steps takes")
        for a, b in ("steps", "epochs"), ("layers", "ckpt"):
            if (x := vars(args)[a]) and (y := vars(args)[b]):
                raise InputError(f"--{a} {x} --{b} {y}: give one of them")
        return fill_in(args), 0
    path = find_checkpoint(out) / "trainer.json"
    if not path.exists() or not (out / "latest").is_symlink():
        raise InputError(f"{out}: no run to go on with; expected latest there, a link to a run's save")
    saved = read_json(path)
    saved["args"].setdefault("logged", sys.maxsize)      # an older save does not know: keep all
    args = parser.parse_args(namespace=Namespace(**saved["args"]))   # flags, if given, change what was saved
    for key, new in settings(args).items():
        if new != (old := saved["args"].get(key, parser.get_default(key))) and key not in LAYOUT:
            raise InputError(f"--{key.replace('_', '-')} {new}: the run in {out} has {old}, and keeps it")
    return args, saved["step"]

def load_examples(args):
    """Training and validation examples: embedded, or --data, --val prompts apart with their first answers."""
    if not args.ckpt and not args.data:
        return embedded(args.steps * args.batch_size), embedded(args.val, split="test")
    paths, asked = args.data or ["data/alpaca_data.json"], defaultdict(list)
    for e in (e for path in paths for e in read_examples(path, args.limit)):
        asked[prompt_text(e)].append(e)                  # all answers to a prompt, from whatever file
    random.Random(0).shuffle(groups := [*asked.values()])
    if any(e["output"] is None for group in groups for e in group):
        raise InputError(f"{' '.join(paths)}: examples without an output; training needs Alpaca's format")
    if len(groups) <= args.val:
        raise InputError(f"{' '.join(paths)}: {len(groups)} prompts, too few to hold out --val {args.val}")
    return [e for group in groups[args.val:] for e in group], [group[0] for group in groups[:args.val]]

def choose_exits(args, shape, folder=None):
    """Fill in --exits (the checkpoint's lite.json may name them) and --weights, and check them."""
    exits = args.exits or folder and read_lite(folder).get("exits") or default_exits(shape.n_layers)
    if args.no_lite and args.exits or (args.copying or args.choices) and (args.no_lite or not exits):
        raise InputError("--exits, --copying, --choices: there is no exit for them; drop them, or --no-lite")
    args.exits = exits = check_exits([] if args.no_lite else exits, shape.n_layers, "--exits (or lite.json)")
    args.weights = args.weights or [1.0] * (len(exits) + 1)
    if len(args.weights) != len(exits) + 1 or not sum(args.weights):
        raise InputError(f"--weights {args.weights}: expected {len(exits) + 1}, not all 0: for {exits}, last")
    if args.max_len > shape.max_seq_len:
        raise InputError(f"--max-len {args.max_len}: the model's context is {shape.max_seq_len} tokens")

def load_teacher(folder, model, tokenizer, max_len):
    """The model in folder, frozen; InputError if it reads other tokens than `model`, or fewer at once."""
    teacher = load_meta(folder, model.output.weight.dtype, model.output.weight.device).requires_grad_(False)
    if (Tokenizer.load(find_checkpoint(folder)).model_bytes != tokenizer.model_bytes or
            teacher.args.vocab_size != model.args.vocab_size or teacher.args.max_seq_len < max_len):
        raise InputError(f"--teacher {folder}: expected the model's own tokens, {max_len} of them at once")
    return teacher

def main():
    """Set the run up, in the order in which a mistake shows soonest, and train."""
    args, step = resolve(flags())
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(args.device)
    note = tqdm.write if rank == 0 else (lambda text: None)
    folder = find_checkpoint(args.out if args.resume else args.ckpt) if args.ckpt else None
    shape = read_args(folder) if folder else ModelArgs(**vars(TINY) | dict(n_layers=args.layers))
    choose_exits(args, shape, folder)
    if device.type == "cuda" and folder and os.environ.get("LOCAL_RANK", "0") == "0":          # will it fit?
        card = torch.cuda.get_device_properties(device).total_memory / 2 ** 30
        plan = [sys.executable, Path(__file__).parent / "docs/plan.py", "--nproc", f"{world}",
                "--card-gb", f"{card}", "--settings", json.dumps(vars(args) | dict(ckpt=str(folder)))]
        if subprocess.run(plan).returncode:
            sys.exit(2)
    torch.manual_seed(args.seed)
    examples, dtype = load_examples(args), getattr(torch, args.dtype)
    model = load_meta(folder, dtype, device) if folder else Transformer(shape).init_weights()
    model.to(device, dtype).checkpoint_blocks = args.activation_checkpointing
    tokenizer = Tokenizer.load(folder or TINY_FOLDER, model.args.vocab_size)
    teacher = load_teacher(args.teacher, model, tokenizer, args.max_len) if args.teacher else None
    rows, val = (tokenize(part, tokenizer, args.max_len, note) for part in examples)
    args.steps = args.steps or math.ceil(args.epochs * math.ceil(len(rows) / args.batch_size))
    args.save_every = args.save_every or math.ceil(args.steps / 5)
    taught_by = [w.flatten()[0].item() for w in (teacher.parameters() if teacher else ())]
    crc = zlib.crc32(repr((rows, val, *taught_by)).encode())
    if args.resume and crc != args.crc:
        raise InputError(f"--data, --teacher: not what the run in {args.out} began with; restore it")
    args.crc, said = crc, Counter(i for ids, n_prompt in rows for i in ids[n_prompt:])
    args.shortlist = [i for i, _ in said.most_common(SHORTLIST)]
    try:
        if world > 1:
            join(args, step, device, world)
        ddp = distribute(model, args.exits, world)       # all ranks have rank 0's weights from here on
        optimizer = optimizer_for(model, args, world)
        if args.resume:
            load_optimizer(find_checkpoint(args.out), model, optimizer)
        halt = train(ddp, model, teacher, optimizer, tokenizer, rows, val, args, step, rank, world, note)
    except RuntimeError as e:
        raise explain(e, args) from None
    if world > 1:
        dist.destroy_process_group()                     # all ranks at once: one that failed would wait here
    sys.exit(128 + halt if halt else 0)

def join(args, step, device, world):
    """Meet the other ranks, and make sure that all are about to do the same."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = dict(backend="nccl", device_id=device) if device.type == "cuda" else dict(backend="gloo")
    dist.init_process_group(**backend, timeout=timedelta(seconds=args.timeout))
    dist.all_gather_object(seen := [None] * world, (step, settings(args)))
    if any(theirs != seen[0] for theirs in seen):
        raise InputError("the ranks differ in flags, data or saved step: machines must see the same")

def explain(e, args):
    """The error to raise for a RuntimeError: a line if a rank was lost or the disk is full, else e, a bug."""
    why = str(e).split(". ")[0][-60:]
    if isinstance(e, dist.DistError) or re.search("gloo|pair closure", str(e)):      # as gloo words it
        return InputError(f"lost another rank, or had no word from it for {args.timeout:g} s; {args.out} has "
                          f"the last save: go on with --resume ({why})")
    if "inline_container" in str(e):                     # torch.save's way to say that it cannot write
        return OSError(f"{args.out}: a save could not be written ({why}); is the disk full?")
    return e

def train(ddp, model, teacher, optimizer, tokenizer, rows, val, args, step, rank, world, note):
    """The loop. step counts the steps done; batches and learning rate are functions of it and the seed."""
    out, caught, started, device = Path(args.out), [0], time.time(), model.output.weight.device
    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, lambda number, _: caught.append(number))
    per_epoch, order = math.ceil(len(rows) / args.batch_size), None
    out.mkdir(parents=True, exist_ok=True)
    first, log = step, open(out / "log.jsonl" if rank == 0 else os.devnull, "a", buffering=1)
    if rank == 0:
        log.seek(log.truncate(min(args.logged, log.tell())))         # without what came after the last save
    bar = tqdm(range(step, args.steps + 1), total=args.steps, initial=step, unit="step", disable=rank or None)
    for step in bar:
        halt = torch.tensor(max(caught), device=device)
        if world > 1:
            dist.all_reduce(halt, dist.ReduceOp.MAX)     # the signal that any rank caught, on all of them
        halt, args.logged, due = halt.item(), log.tell(), step == args.steps or step % args.save_every == 0
        if due and not halt:                             # whoever sent a signal may not wait
            losses, right = exit_losses(model, val, args.exits, args.micro_batch_size)
            check_finite(losses, step, args)
            print(json.dumps(dict(step=step, validation=losses)), file=log)
            note(f"step {step}: validation loss (tokens right) " + ", ".join(
                f"exit {n} {x:.3f} ({a:.0%})" for n, x, a in zip([*args.exits, "last"], losses, right)))
        if due or halt:
            save(out, step, model, optimizer, tokenizer, args, rank, world)
        if halt or step == args.steps:
            break
        if order is None or step % per_epoch == 0:
            order = batches(rows, args.batch_size, args.seed, step // per_epoch)
        batch, clock = order[step % per_epoch], time.time()
        losses, norm = update(ddp, optimizer, rows, batch, step, args, rank, world, teacher)
        tokens, seconds = sum(len(rows[i][0]) for i in batch), time.time() - clock
        print(json.dumps(dict(step=step + 1, losses=losses, lr=learning_rate(step, args), norm=norm,
                              tokens=tokens, seconds=seconds)), file=log)
        at = " ".join(f"{n}: {x:.2f}" for n, x in zip([*args.exits, "last"], losses))
        bar.set_postfix_str(f"loss at {at}, {tokens / seconds:.0f} tok/s", refresh=False)
    note(f"stopped by signal {halt} after step {step}; saved; go on with --resume" if halt else
         f"trained {step - first} steps in {time.time() - started:.0f} s; the model is in {out}/latest")
    return halt

def check_finite(values, step, args):
    """Stop the run, on all ranks alike, if a loss or the gradient's norm is not a number any more."""
    if not math.isfinite(sum(values)):
        raise InputError(f"step {step}: loss or gradient is not finite ({values}). {args.out}/latest is the "
                         "last good save: train from it with --ckpt, a smaller --lr and another --out")

if __name__ == "__main__":
    run(main)
