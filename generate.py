"""Early exit: each token leaves the network at the first exit that is sure of it.

    python generate.py --threshold 0.8                      # questions of the embedded set, tinted by depth
    python generate.py --ckpt llama-2-7b --threshold 0.95,0.95,0.9,0.9,0.8,0.7 "Name three uses of a brick."
    python generate.py --raw "The capital of France is" --threshold 1     # no template, full depth

A prompt runs through all layers, and so does the choice of the first new token.  From then on, at each exit,
the head that all layers share is asked for its most probable token.  If that probability exceeds the exit's
threshold, the token is emitted and the layers above are skipped; what they would have left in the KV cache is
made later, if anyone needs it, from the state the token left with (`decode_one`).  Batch 1, always.
"""
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from data import TINY_FOLDER, Parser, Tokenizer, embedded, pick_device, prompt_text, read_examples, run
from model import InputError, check_exits, default_exits, find_checkpoint, load_meta, read_lite


def confidence(logits):
    """The largest softmax probability of logits (V,), a float: exp(max - logsumexp) needs no other one."""
    return (logits.max() - logits.logsumexp(-1)).exp().item()        # .item(): the device is waited for here


def decode_one(model, token, pos, cache, left, debt_from, thresholds):
    """One token up through the layers until an exit is sure.

    token   the id at position pos; its successor is what the logits are for
    cache   (L, 2, 1, K, S, E); layer i holds K and V of the positions below debt_from[i]
    left    (1, S, D), the state with which each position left the network
    Copying the state up is deferred.  A layer that tokens skipped owes K and V for debt_from[i]..pos-1, and
    makes them from those tokens' exit states when a token next comes by, in the same matrix product.  It
    always owes the latest positions, so a number per layer keeps the account; unvisited, it never pays.
    Returns logits (V,) and the number of layers run.
    """
    h = model.tok_embeddings(torch.tensor([[token]], device=left.device))                    # (1, 1, D)
    for n, block in enumerate(model.layers, 1):
        owed = debt_from[n - 1]
        h = block(h, pos, cache[n - 1], left[:, owed:pos] if owed < pos else None)
        debt_from[n - 1] = pos + 1
        if n in thresholds:
            logits = model.logits(h[0, 0])
            if confidence(logits) > thresholds[n]:       # >: 1 never leaves
                break
    else:
        logits = model.logits(h[0, 0])
    left[:, pos] = h[:, 0]
    return logits, n


@torch.inference_mode()
def generate(model, prompt, max_new_tokens, thresholds=None, temperature=0.0, top_p=1.0, rng=None, eos=None):
    """Yield (token, layers run) until eos, which is yielded too, or max_new_tokens.

    prompt is a list of ids, thresholds a dict {exit layer: threshold}: empty, or all 1, is ordinary LLaMA.
    """
    thresholds = {n: t for n, t in (thresholds or {}).items() if t < 1}          # 1 never leaves: do not ask
    L, P, device = len(model.layers), len(prompt), model.output.weight.device
    cache = model.new_cache(1, P + max_new_tokens)
    left = cache.new_empty(1, P + max_new_tokens, model.args.dim)
    *_, h = model.states(torch.tensor([prompt], device=device), cache=cache)
    logits, depth, debt_from = model.logits(h[0, -1]), L, [P] * L
    for pos in range(P, P + max_new_tokens):
        token = sample(logits, temperature, top_p, rng)
        yield token, depth
        if token == eos or pos == P + max_new_tokens - 1:
            return
        logits, depth = decode_one(model, token, pos, cache, left, debt_from, thresholds)


def sample(logits, temperature=0.0, top_p=1.0, rng=None):
    """A token from logits (V,): the likeliest at temperature 0, else drawn from the top-p nucleus."""
    if temperature == 0:
        return logits.argmax().item()
    probs, ids = (logits / temperature).softmax(-1).sort(descending=True)
    probs[probs.cumsum(-1) - probs >= top_p] = 0                     # those before it hold top_p already
    return ids[torch.multinomial(probs, 1, generator=rng)].item()


def check_prompt(ids, model):
    """ids, unless they leave no room for an answer in the model's context."""
    if len(ids) >= model.args.max_seq_len:
        raise InputError(f"the prompt has {len(ids)} tokens; the model's context, answer included, is "
                         f"{model.args.max_seq_len}: shorten it")
    return ids


def answer(model, tokenizer, prompt, args, thresholds, rng=None, each=lambda answer: None):
    """Generate to the end and keep the books: a namespace of prompt and tokens (ids), exits (layers run per
    token), prefill and decode (seconds).  each(answer) is called after every token."""
    a = SimpleNamespace(prompt=check_prompt(prompt, model), tokens=[], exits=[], prefill=0.0, decode=0.0)
    room = min(args.max_new_tokens, model.args.max_seq_len - len(prompt))
    how, clock = (args.temperature, args.top_p, rng, tokenizer.eos), time.perf_counter()
    for token, depth in generate(model, prompt, room, thresholds, *how):
        seconds = time.perf_counter() - clock            # of generate alone, not of each()
        a.prefill, a.decode = (a.prefill, a.decode + seconds) if a.tokens else (seconds, 0.0)
        a.tokens.append(token)
        a.exits.append(depth)
        each(a)
        clock = time.perf_counter()
    return a


def exit_rule(threshold, exits, lite, n_layers):
    """{exit layer: threshold} from --threshold and --exits; None there: from lite.json. {} is full depth."""
    stored = {int(n): t for n, t in lite.get("thresholds", {}).items()}
    if threshold is None:
        return stored if exits is None else {n: stored.get(n, 1.0) for n in check_exits(exits, n_layers)}
    exits = check_exits(exits or lite.get("exits") or default_exits(n_layers), n_layers)
    if len(threshold) not in (1, len(exits)):
        raise InputError(f"--threshold: {len(threshold)} numbers for {len(exits)} exits "
                         f"({','.join(map(str, exits))}); give one for all or one each")
    return dict(zip(exits, threshold * len(exits) if len(threshold) == 1 else threshold))


def load_for_decoding(args):
    """Model, tokenizer and lite.json of --ckpt; without --ckpt of out/, else of tiny/, and says so."""
    folder, device = Path(args.ckpt or "out"), pick_device(args.device)
    if args.ckpt is None:
        folder = folder if (folder / "latest").exists() else TINY_FOLDER
        print(f"no --ckpt given: using {folder.name}/", file=sys.stderr)
    folder = find_checkpoint(folder)
    dtype = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    model = load_meta(folder, getattr(torch, dtype), device)
    lite = read_lite(folder)
    check_exits(lite.get("exits", []), model.args.n_layers)
    return model, Tokenizer.load(folder, model.args.vocab_size), lite


class Painter:
    """Prints an answer as it grows, each piece of text tinted by the depth its token left at."""

    def __init__(self, tokenizer, n_layers, colour):
        self.tokenizer, self.n_layers, self.colour, self.shown = tokenizer, n_layers, colour, 0

    def tint(self, text, depth):
        """Green for the shallowest exits, over yellow, to red; no tint where all layers ran."""
        if not self.colour or depth == self.n_layers:
            return text
        x = depth / self.n_layers
        return f"\x1b[38;2;{int(min(1, 2 * x) * 230)};{int(min(1, 2 - 2 * x) * 200)};60m{text}\x1b[0m"

    def __call__(self, a):
        text = self.tokenizer.decode(a.tokens, a.prompt)
        if len(a.tokens) == 1:
            self.shown = len(text) - len(text.lstrip())
        if not text.endswith("\ufffd"):                  # half a character in byte pieces: wait for the rest
            print(self.tint(text[self.shown:], a.exits[-1]), end="", flush=True)
            self.shown = max(self.shown, len(text))


def summary(answers, n_layers):
    """One line on tokens, depth and time of some answers."""
    depths = [n for a in answers for n in a.exits]
    mean, shares = sum(depths) / len(depths), {n: depths.count(n) / len(depths) for n in sorted(set(depths))}
    prefill, decode = sum(a.prefill for a in answers), max(1e-9, sum(a.decode for a in answers))
    return (f"{len(depths)} tokens, {mean:.1f} of {n_layers} layers on average ("
            f"{', '.join(f'{n}: {x:.0%}' for n, x in shares.items())}); prefill {prefill:.2f} s, decode "
            f"{(len(depths) - len(answers)) / decode:.0f} tokens/s")


def main():
    """Answer the prompts: streamed and tinted, or as JSON."""
    parser = Parser(__doc__)
    parser.add("prompt", nargs="*", metavar="PROMPT", help="instructions (default: some of the embedded set)")
    parser.add("--raw", metavar="TEXT", help="continue this text, without the instruction template")
    parser.add("--data", help="take the prompts from these files")
    parser.add("--ckpt", help="Meta-format folder, or an output folder of train.py (default: out, else tiny)")
    for flag in ("--limit", "--exits", "--threshold", "--dtype", "--device", "--json"):
        parser.add(flag)
    for flag, default in (("--max-new-tokens", 256), ("--temperature", 0.0), ("--top-p", 1.0), ("--seed", 0)):
        parser.add(flag, default)
    args = parser.parse_args()
    examples = [dict(instruction=p, input="") for p in args.prompt]
    examples += [e for path in args.data or [] for e in read_examples(path)]
    if not examples and args.raw is None:
        examples = embedded(args.limit or 6, split="test")
    texts = [(f"{e['instruction']} {e['input']}".strip(), prompt_text(e)) for e in examples[:args.limit]]
    texts += [(args.raw, args.raw)] if args.raw is not None else []
    model, tokenizer, lite = load_for_decoding(args)
    L, thresholds = model.args.n_layers, exit_rule(args.threshold, args.exits, lite, model.args.n_layers)
    prompts = [(title, check_prompt(tokenizer.encode(text, bos=True), model)) for title, text in texts]
    rng = torch.Generator(model.output.weight.device).manual_seed(args.seed)
    if args.json:
        answers = [answer(model, tokenizer, ids, args, thresholds, rng) for _, ids in prompts]
        for a in answers:
            print(json.dumps(dict(prompt_tokens=a.prompt, tokens=a.tokens, exits=a.exits,
                                  text=tokenizer.decode(a.tokens, a.prompt), seconds=a.prefill + a.decode)))
        return
    painter = Painter(tokenizer, L, sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    legend = "  ".join(painter.tint(f"{n} ({t:g})", n) for n, t in thresholds.items()) or "none, full depth"
    print(f"exits (thresholds): {legend}", file=sys.stderr)
    answers = []
    for title, ids in prompts:
        print(f"\n> {title}", flush=True)
        answers.append(answer(model, tokenizer, ids, args, thresholds, rng, painter))
        print(flush=True)
    print(f"\n{summary(answers, L)}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
