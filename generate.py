"""Early exit: each token leaves the network at the first exit that is sure of it.

    python generate.py --threshold 0.8                      # questions of the embedded set, tinted by depth
    python generate.py --ckpt lite7b --threshold 0.95,0.95,0.9,0.9,0.8,0.7 "Name three uses of a brick."
    python generate.py --raw "The capital of France is" --threshold 1     # no template, full depth

A prompt runs through all layers, and so does the choice of the first new token.  Then, at each exit, the head
that all layers share is asked for its most probable token.  If that probability exceeds the exit's threshold,
the token is emitted and the layers above are skipped; the K and V missing there are made later, if needed,
from the state it left with.  With --verify exits only draft: the output is full depth's.  Batch 1, always.
"""
import json, math, os, sys, time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from data import (TINY_FOLDER, Parser, Tokenizer, embedded, number, pick_device, prompt_text, read_examples,
                  run)
from model import InputError, check_exits, default_exits, find_checkpoint, load_meta, read_lite

def confidence(logits):
    """The largest softmax probability of logits (..., N): exp(max - logsumexp) needs no other one."""
    return (logits.amax(-1) - logits.logsumexp(-1)).exp()

def distribution(logits, temperature=0.0, top_p=1.0):
    """Probabilities (V,) of the next token: all on the likeliest at temperature 0, else the top-p nucleus."""
    if temperature < 1e-6:                               # less would overflow
        return torch.zeros_like(logits).index_fill_(0, logits.argmax(), 1)
    probs, ids = (logits / temperature).softmax(-1).sort(descending=True)
    if top_p < 1:
        probs[probs.cumsum(-1) - probs >= top_p] = 0                 # those before it hold top_p already
    return torch.zeros_like(probs).index_copy_(0, ids, probs / probs.sum())

class Shortlist:
    """The tokens an exit chooses among: some frequent ones and those of the context, each once.
    The whole head at every exit would cost more than early exit saves.  Their rows of the output matrix are
    gathered once and lie side by side: a check is one small product.  Without frequent ones, it is all V."""

    def __init__(self, model, frequent, room):
        self.output, self.known, self.rows = model.output.weight, set(), None        # rows None: all V
        self.space = self.output.new_empty((len(frequent) + room) * bool(frequent), self.output.size(1))
        self.ids = torch.arange(len(self.space) or len(self.output), device=self.output.device)      # of rows
        self.add(frequent)

    def add(self, tokens):
        """Let exits choose these, too: rows (N, D) grows."""
        new = [t for t in dict.fromkeys(tokens) if t not in self.known]
        if new and len(self.space):
            span = slice(len(self.known), len(self.known) + len(new))
            self.ids[span] = torch.tensor(new)
            self.space[span] = self.output[self.ids[span]]
            self.known.update(new)
            self.rows = self.space[:span.stop]

    def spread(self, logits):
        """Their logits (N,) as logits (V,), -inf elsewhere."""
        return logits if self.rows is None else logits.new_full(
            (len(self.output),), -math.inf).index_copy_(0, self.ids[:len(logits)], logits)

class Decoder:
    """One prompt's generation: a KV cache, and the two ways to make the next tokens from one."""

    def __init__(self, model, prompt, room, thresholds, frequent=(), draft=4, temperature=0.0, top_p=1.0,
                 rng=None, drafts=None, recompute=False):    # drafts: a list, for how many each round had
        P, self.model, self.thresholds, self.longest, self.end = len(prompt), model, thresholds, draft, room
        self.distribution = lambda logits: distribution(logits, temperature, top_p)
        self.draw = lambda p: (torch.multinomial(p, 1, generator=rng) if temperature else p.argmax()).item()
        self.drafts, self.rng, self.recompute = [] if drafts is None else drafts, rng, recompute
        self.cache = model.new_cache(1, room)                        # (L, 2, 1, K, S, E), made once
        self.left = self.cache.new_empty(1, room, model.args.dim)    # states the tokens left with
        self.debt_from = [P] * len(model.layers)         # layer i holds K and V of the positions below this
        self.shortlist = Shortlist(model, frequent if thresholds else (), room)
        self.shortlist.add(prompt)

    def prefill(self, prompt):
        """The prompt, and the choice of the first new token, at full depth: [(token, layers)]."""
        *_, h = self.model.states(torch.tensor([prompt], device=self.left.device), cache=self.cache)
        return [(self.choose(h, None), len(self.model.layers))]

    def climb(self, token, pos, thresholds, owing=False):
        """The token at pos up through the layers until an exit is sure: its state (1, 1, D), the layers run,
        the confidence there, and logits (V,); without a sure exit the last layer's state, L, 0 and None."""
        h = self.model.tok_embeddings(torch.tensor([[token]], device=self.left.device))
        for n, block in enumerate(self.model.layers, 1):
            h = self.settle(n - 1, h, pos) if owing else block(h, pos, self.cache[n - 1])
            if n in thresholds:
                logits = self.model.logits(h[0, 0], self.shortlist.rows)
                sure = confidence(logits).item()         # here the device is waited for
                if sure > thresholds[n]:                 # >: 1 never leaves
                    return h, n, sure, self.shortlist.spread(logits)
        return h, n, 0.0, None

    def choose(self, h, logits):
        """The next token, from an exit's logits or, if they are None, from the last layer's state h."""
        return self.draw(self.distribution(self.model.logits(h[0, -1]) if logits is None else logits))

    def settle(self, layer, h, pos):
        """h (1, 1, D) at pos through a layer.  The tokens that skipped it, at debt_from..pos-1, lack K and V
        there: they get them now, from the states they left with, in one product with h's (unvisited, never).
        recompute: instead they run on through the layer, beside h and as far as h, and so get exact ones."""
        owed, self.debt_from[layer] = self.debt_from[layer], pos + 1
        block, kv = self.model.layers[layer], self.cache[layer]
        debt = self.left[:, owed:pos] if owed < pos else None
        if debt is None or not self.recompute:
            return block(h, pos, kv, debt)
        rows = block(torch.cat((debt, h), 1), owed, kv)              # (1, pos+1-owed, D)
        debt[:] = rows[:, :-1]                                       # a view: self.left moves up a layer
        return rows[:, -1:]

    def exit_early(self, token, pos):
        """LITE: the token after the one at pos, from the first sure exit: [(token, layers run)]."""
        h, n, _, logits = self.climb(token, pos, self.thresholds, owing=True)
        self.left[:, pos] = h[:, 0]
        return [(self.choose(h, logits), n)]

    def verify(self, token, pos):
        """Lossless: exits draft, the last layer decides: [(token, layers that chose it)], one or more.
        The first token to find a sure exit n sets the round's: the drafts after it stop at n as well, until
        one is unsure.  Then all rows go through the layers above n together.  (One that went alone would miss
        its predecessors' K and V there.)  What is rejected lies beyond the new pos in the cache.  A draft
        stays with probability min(1, p / q), else max(0, p - q) is drawn from (Leviathan, Chen et al.)."""
        h, n, sure, logits = self.climb(token, pos, self.thresholds)
        rows, guesses, longest = [h], [], min(self.longest, self.end - pos - 2)     # one place for the last's
        while sure > self.thresholds.get(n, 1) and len(guesses) < longest:
            q = self.distribution(logits)
            guesses.append((self.draw(q), q))
            h, _, sure, logits = self.climb(guesses[-1][0], pos + len(guesses), {n: -1})    # -1: up to n
            rows.append(h)
        h, chosen = torch.cat(rows, 1), []                           # (1, guesses + 1, D), all at n
        for block, kv in zip(self.model.layers[n:], self.cache[n:]):
            h = block(h, pos, kv)
        self.drafts += [len(guesses)]
        for (guess, q), logits in zip([*guesses, (None, 0)], self.model.logits(h[0])):    # last: no guess
            p = self.distribution(logits)
            if guess is None or torch.rand((), generator=self.rng, device=p.device) * q[guess] >= p[guess]:
                rest = (p - q).clamp(min=0)              # rounding alone may leave nothing of it
                return [*chosen, (self.draw(rest if rest.any() else p), len(self.model.layers))]
            chosen.append((guess, n))

@torch.inference_mode()
def generate(model, prompt, max_new_tokens, thresholds=None, eos=None, verify=False, decoder=Decoder, **how):
    """Yield (token, layers run) until eos, which is yielded too, max_new_tokens, or the end of the context.
    prompt is a list of ids, thresholds a dict {exit layer: threshold}: empty, or all 1, is ordinary LLaMA.
    verify: output as at full depth, whatever the exits are.  For `how`, see Decoder."""
    if not all(isinstance(token, int) for token in prompt) or len(prompt) >= model.args.max_seq_len:
        raise InputError("expected one prompt with room in the context, a list of ints: exits are per token")
    pos, remaining = len(prompt) - 1, min(max_new_tokens, model.args.max_seq_len - len(prompt))
    thresholds = {n: t for n, t in (thresholds or {}).items() if t < 1}          # 1 never leaves: do not ask
    state = decoder(model, prompt, len(prompt) + remaining, thresholds, **how)
    step, out = state.verify if verify else state.exit_early, state.prefill(prompt)
    while True:
        for token, depth in out:
            yield token, depth
            remaining -= 1
            if token == eos or not remaining:
                return
        state.shortlist.add(token for token, _ in out)
        pos += len(out)                                  # of the newest token, whose successor is unknown
        out = step(out[-1][0], pos)

def answer(model, prompt, max_new_tokens, thresholds, each=lambda answer: None, **how):
    """Generate to the end and keep the books: a namespace of prompt and tokens (ids), exits (layers run per
    token), drafts (per round of --verify), prefill and decode (seconds).  each(answer) follows a token."""
    a = SimpleNamespace(prompt=prompt, tokens=[], exits=[], drafts=[], prefill=0.0, decode=0.0)
    clock = time.perf_counter()
    for token, depth in generate(model, prompt, max_new_tokens, thresholds, drafts=a.drafts, **how):
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
    rule = threshold * len(exits) if len(threshold) == 1 else threshold
    if len(rule) != len(exits):
        raise InputError(f"--threshold: {len(rule)} numbers for {len(exits)} exits, {exits}; give one or all")
    return dict(zip(exits, rule))

def frequent_tokens(args, lite):
    """lite.json's tokens for checks: the first --shortlist, else `check`, else all; [] is the whole head."""
    return lite.get("shortlist", [])[:lite.get("check") if args.shortlist is None else args.shortlist]

def load_for_decoding(args):
    """Model, tokenizer and lite.json of --ckpt; without --ckpt of out/, else of tiny/, and says so."""
    device, folder = pick_device(args.device), args.ckpt
    if folder is None:
        folder = Path("out") if Path("out/latest").exists() else TINY_FOLDER
        print(f"no --ckpt given: using {folder.name}/", file=sys.stderr)
    args.ckpt = folder = find_checkpoint(folder)
    dtype = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    model, lite = load_meta(folder, getattr(torch, dtype), device).fuse(), read_lite(folder)
    for stored in (lite.get("exits", []), sorted(map(int, lite.get("thresholds", {})))):
        check_exits(stored, model.args.n_layers, f"{folder}/lite.json: exits")
    if max(lite.get("shortlist", []), default=math.inf if args.shortlist else 0) >= model.args.vocab_size:
        raise InputError(f"{folder}/lite.json: it has no shortlist, or one of another model with more tokens")
    return model, Tokenizer.load(folder, model.args.vocab_size), lite

def tint(text, depth, n_layers, out):
    """Text for a terminal, out: from green for the first exits to red; plain where all layers ran."""
    if depth == n_layers or not out.isatty() or "NO_COLOR" in os.environ:
        return text
    red, green = min(1, 2 * depth / n_layers), min(1, 2 - 2 * depth / n_layers)
    return f"\x1b[38;2;{int(red * 230)};{int(green * 200)};60m{text}\x1b[0m"

def stream(tokenizer, n_layers, a):
    """Print what the newest token adds to the text of an answer a, tinted by the depth it left at."""
    text, shown = (tokenizer.decode(ids, a.prompt).lstrip() for ids in (a.tokens, a.tokens[:-1]))
    if not text.endswith("\ufffd"):                      # half a character in byte pieces: wait for the rest
        print(tint(text[len(shown.rstrip("\ufffd")):], a.exits[-1], n_layers, sys.stdout), end="", flush=True)

def summary(answers, n_layers):
    """One line on tokens, depth and time of some answers; for --verify on drafts instead of depth."""
    depths, rounds = [n for a in answers for n in a.exits], [n for a in answers for n in a.drafts]
    shares = ", ".join(f"{n}: {depths.count(n) / len(depths):.0%}" for n in sorted(set(depths)))
    prefill, decode = (sum(getattr(a, part) for a in answers) for part in ("prefill", "decode"))
    speed = (len(depths) - len(answers)) / max(1e-9, decode)
    how = (f"{sum(rounds)} drafted in {len(rounds)} rounds, chosen at layer" if rounds else
           f"{sum(depths) / len(depths):.1f} of {n_layers} layers on average")
    return f"{len(depths)} tokens, {how} ({shares}); prefill {prefill:.2f} s, decode {speed:.0f} tokens/s"

def parse_args():
    """The flags of generate.py."""
    parser = Parser(__doc__)
    parser.add("prompt", nargs="*", metavar="PROMPT", help="instructions (default: some of the embedded set)")
    parser.add("--raw", metavar="TEXT", help="continue this text, without the instruction template")
    parser.add("--verify", action="store_true", help="lossless: exits only draft for the last layer")
    parser.add("--json", action="store_true", help="print results for machines, on the last lines of stdout")
    parser.add("--temperature", 0.0, type=number(float, 0), metavar="X", help="of softmax; 0: greedy")
    parser.add("--top-p", 1.0, type=number(float, 1e-9, 1), metavar="X", help="share kept for --temperature")
    rest = "--ckpt --data --limit --exits --threshold --recompute --shortlist --dtype --device".split()
    for flag, default in {**dict.fromkeys(rest), "--draft": 4, "--max-new-tokens": 256, "--seed": 0}.items():
        parser.add(flag, default)
    return parser.parse_args()

def main():
    """Answer the prompts: streamed and tinted, or as JSON."""
    args = parse_args()
    examples = [dict(instruction=p.encode(errors="replace").decode(), input="") for p in args.prompt]
    examples += [e for path in args.data or [] for e in read_examples(path, args.limit)]
    if not examples and args.raw is None:
        examples = embedded(args.limit or 6, split="test")
    texts = [(f"{e['instruction']} {e['input']}".strip(), prompt_text(e)) for e in examples]
    texts += [(raw := args.raw.encode(errors="replace").decode(), raw)] if args.raw is not None else []
    model, tokenizer, lite = load_for_decoding(args)
    L, thresholds = model.args.n_layers, exit_rule(args.threshold, args.exits, lite, model.args.n_layers)
    if args.verify and (args.recompute or not any(t < 1 for t in thresholds.values())):
        raise InputError("--verify drafts by exits: give a --threshold below 1, 0.6 say, and no --recompute")
    prompts = [(title, tokenizer.encode(text, bos=True)) for title, text in texts]
    if (longest := max(len(ids) for _, ids in prompts)) >= model.args.max_seq_len:
        raise InputError(f"prompt: {longest} tokens fill the context, {model.args.max_seq_len}; shorten it")
    args.recompute = args.recompute or args.threshold is None and lite.get("recompute", False)
    how = {key: vars(args)[key] for key in "max_new_tokens verify recompute draft temperature top_p".split()}
    reply = partial(answer, model, thresholds=thresholds, eos=tokenizer.eos, **how, frequent=frequent_tokens(
        args, lite), rng=torch.Generator(model.output.weight.device).manual_seed(args.seed))
    if args.json:
        for a in [reply(ids) for _, ids in prompts]:
            print(json.dumps(dict(prompt_tokens=a.prompt, tokens=a.tokens, exits=a.exits,
                                  text=tokenizer.decode(a.tokens, a.prompt), seconds=a.prefill + a.decode)))
        return
    rule = "  ".join(tint(f"{n} ({t:g})", n, L, sys.stderr) for n, t in thresholds.items()) or "full depth"
    print(f"exits (thresholds): {rule}", file=sys.stderr)
    told, here = lite.get("calibration", {}), dict(dtype=str(model.output.weight.dtype), thresholds={
        f"{n}": t for n, t in thresholds.items()}, recompute=args.recompute)
    as_measured = args.shortlist is None and args.raw is None and not args.verify and not args.temperature
    if as_measured and here.items() <= told.items() and "max_new_tokens" in told:    # all as it was there
        print("thresholds of lite.json, for {target:.1%} agreement; answers up to {max_new_tokens} tokens: "
              "{agreement:.1%}, at least {bound:.1%} with 95 % confidence".format_map(told), file=sys.stderr)
    answers = []
    for title, ids in prompts:
        print(f"\n> {title}", flush=True)
        answers.append(reply(ids, each=partial(stream, tokenizer, L)))
        print(flush=True)
    print(f"\n{summary(answers, L)}", file=sys.stderr)

if __name__ == "__main__":
    run(main)
