"""The same instructions, answered anew by a model: fresh text for its pupil to see (train.py --teacher).

    python docs/answers.py alpaca_train.json --ckpt smolplain --out answers.json

The file has the same examples in the same order (with --times N each N times, with different answers).  Take it in
place of the first, or beside it (and beside others, made with other seeds): train.py holds the same prompts out of all
files, and validates on the first one's answers to them.
It is for --teacher, which looks at text and not at labels: answers end at --max-new-tokens in the middle of a sentence,
and as labels would teach just that.
Prompts of one length go through the model together, at full depth.  Answers are kept in FILE.part as they come; the
same command goes on where it was stopped, and under torchrun its processes share the work.
"""
import json
import os
import random
import sys
from collections import defaultdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from data import Parser, Tokenizer, number, pick_device, prompt_text, read_examples, run  # noqa: E402
from eval import collect, identity  # noqa: E402
from model import InputError, find_checkpoint, load_meta  # noqa: E402


def draw(logits, rng):
    """An id for each row of logits (B, V), drawn from its softmax: (B, 1).  (multinomial draws B V numbers, this B.)"""
    total = logits.softmax(-1).cumsum(-1)
    return torch.searchsorted(total, total[:, -1:] * torch.rand(len(total), 1, generator=rng, device=total.device))


@torch.inference_mode()
def answer(model, prompts, room, temperature, eos, rng=None):
    """Continue B prompts (lists of ids, all of one length) by up to room tokens each, eos included: [ids].
    Temperature 0 takes the likeliest.  A row that has ended runs on until half of them have; then they go."""
    tokens = torch.tensor(prompts, device=model.output.weight.device)
    pos, cache, rows, said = 0, model.new_cache(len(prompts), len(prompts[0]) + room), list(range(len(prompts))), [[] for _ in prompts]
    while True:
        *_, h = model.states(tokens, pos=pos, cache=cache)
        logits, pos = model.logits(h[:, -1]), pos + tokens.size(1)
        tokens = draw(logits / temperature, rng) if temperature >= 1e-6 else logits.argmax(-1, True)
        for row, token in zip(rows, tokens[:, 0].tolist()):
            if eos not in said[row][-1:]:
                said[row].append(token)
        going = [i for i, row in enumerate(rows) if said[row][-1] != eos and len(said[row]) < room]
        if not going:
            return said
        if 2 * len(going) <= len(rows):
            tokens, cache, rows = tokens[going], cache[:, :, going], [rows[i] for i in going]


def main():
    parser = Parser(__doc__)
    parser.add("data", metavar="FILE", help="examples to answer")
    parser.add("--ckpt", required=True, help="the model that answers")
    parser.add("--out", "answers.json", metavar="FILE", help="file to write")
    parser.add("--temperature", 0.8, type=number(float, 0), metavar="X", help="of softmax; 0: the likeliest token")
    parser.add("--times", 1, type=number(int, 1), metavar="N", help="answers to each prompt, one after another in the file")
    parser.add("--batch-size", 64, type=number(int, 1), metavar="N", help="prompts answered together, at most")
    parser.add("--dtype", "bfloat16", help="of weights")
    for flag, default in {"--limit": None, "--max-new-tokens": 128, "--seed": 0, "--device": None}.items():
        parser.add(flag, default)
    args = parser.parse_args()
    examples = [dict(e) for e in read_examples(args.data, args.limit) for _ in range(args.times)]
    args.ckpt, device, out = find_checkpoint(args.ckpt), pick_device(args.device), Path(args.out)
    if args.times > 1 and args.temperature < 1e-6:
        raise InputError(f"--times {args.times}: at --temperature 0 all answers to a prompt are one; give it once, or a temperature")
    if out.exists() or out.suffix != ".json":
        raise InputError(f"--out {out}: expected a name in .json that is not taken")
    model = load_meta(args.ckpt, getattr(torch, args.dtype), device)     # not fused for decoding, where rows are few
    tokenizer, alike = Tokenizer.load(args.ckpt, model.args.vocab_size), defaultdict(list)
    for i, e in enumerate(examples):
        alike[len(ids := tokenizer.encode(prompt_text(e), bos=True))].append((i, ids))
    if (longest := max(alike)) >= (context := model.args.max_seq_len):
        raise InputError(f"{args.data}: a prompt of {longest} tokens fills the context, {context}; take it out")
    work = [(n, k, rows[k:k + args.batch_size]) for n, rows in sorted(alike.items()) for k in range(0, len(rows), args.batch_size)]

    def make(j):
        n, k, batch = work[j]
        rng = torch.Generator(device).manual_seed(random.Random(f"{args.seed} {n} {k}").getrandbits(63))
        said = answer(model, [ids for _, ids in batch], min(args.max_new_tokens, context - n), args.temperature, tokenizer.eos, rng)
        return dict(texts=[tokenizer.decode(tokens, ids).strip() for (_, ids), tokens in zip(batch, said)])

    part, tmp = (out.with_name(out.name + end) for end in (".part", f".{os.getpid()}.tmp"))
    lines = collect(part, identity(args, model, work, None), make, range(len(work)))
    if len(lines) < len(work):
        return                                           # another process is not done; the last one writes, or the last two
    for j, line in lines.items():
        for (i, _), text in zip(work[j][2], line["texts"]):
            examples[i]["output"] = text
    tmp.write_text(json.dumps(examples, indent=1) + "\n")
    tmp.rename(out)
    part.unlink(missing_ok=True)


if __name__ == "__main__":
    run(main)
