"""Thresholds that are measured: chosen on half of the prompts, certified on the rest, and written into lite.json.

    python docs/calibrate.py 0.98 --ckpt lite7b --data alpaca_val.json

How likely an exit is wrong at a confidence is a curve (`fitted`).  Leaving with another token than the last layer's
is given a price.  Every price has its best thresholds (`best_thresholds`), a higher one safer ones.  Which price to
take is a matter of statistics (`calibrate`).
Two more tables tell what exits would save if copies were exact: on the model's own answers, and on references.
"""
import json
import math
import os
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from data import number, run  # noqa: E402
from docs.report import rate, table  # noqa: E402
from eval import flags, judge, measure, prepare  # noqa: E402
from model import InputError, find_checkpoint  # noqa: E402

MARGINS = (0.95, 0.8, 0.6, *np.arange(0.5, -0.01, -0.05))  # of the way from the target to 1, to aim at
AIMS = (0.995, 0.99, 0.98, 0.95)                          # agreement, where K and V are exact


def beyond(x, t, d, price=0.0):
    """What each of N tokens costs if no exit up to number x lets it go, under thresholds t (X,): the weights that
    it reads, but for the checks up to there, and `price` if it leaves with another token than the last layer's."""
    cost = np.full(len(d.ask), d.cost[-1], dtype=float)
    for y in reversed(range(x + 1, len(t))):
        if t[y] < 1:
            cost = d.ask + np.where(d.sure[:, y] > t[y], d.cost[y] + price * d.wrong[:, y], cost)
    return cost


def best_thresholds(d, price):
    """The thresholds (X,) that cost least if a disagreement costs `price`, as far as changing one at a time
    goes.  For one exit it is the best of all: in order of confidence, the gain of letting the first k tokens
    that get there leave is a running sum.  If nobody leaves, the checks are saved (t = 1)."""
    t = np.ones(d.sure.shape[1])
    for _ in range(20):                                  # mostly it is there after three
        before = t.copy()
        for x in reversed(range(len(t))):
            here = np.flatnonzero(~(d.sure[:, :x] > t[:x]).any(1))
            here = here[np.argsort(-d.sure[here, x], kind="stable")]
            sure = np.append(d.sure[here, x], 0)         # (n+1,)
            gain = (beyond(x, t, d, price) - d.cost[x] - price * d.wrong[:, x])[here].cumsum()
            gain[sure[1:] == sure[:-1]] = -np.inf        # who is equally sure leaves together
            k = np.argmax([d.ask[here].sum(), *gain])
            t[x] = (sure[k - 1] + sure[k]) / 2 if k else 1
        if (t == before).all():
            break
    return t


def fitted(d):
    """d, where wrong (N, X), 0 or 1, has become how likely it is at that confidence: for each exit a logistic curve in
    log(sure / (1 - sure)) (Platt, 1999).  Few sure tokens are wrong, and thresholds laid around just these would suit no
    others.  Where there is little to learn from, the curve stays near 1 - sure: a confidence that means what it says.
    (It is of all tokens.  Those that no earlier exit let go are wrong a little more often, so agreement ends below an aim.)"""
    curves = []
    for x, wrong in zip(torch.tensor(d.sure).double().clamp(1e-6, 1 - 1e-6).logit().T, torch.tensor(d.wrong).double().T):
        start = torch.tensor([0.0, -1.0]).double()       # sigmoid(-logit(sure)) = 1 - sure
        w = start.clone().requires_grad_()
        fit = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

        def loss():
            fit.zero_grad()
            far = F.binary_cross_entropy_with_logits(w[0] + w[1] * x, wrong, reduction="sum") + (w - start).square().sum() / 2
            far.backward()
            return far

        fit.step(loss)
        curves.append((w[0] + w[1] * x).sigmoid().detach().numpy())
    return SimpleNamespace(**vars(d) | dict(wrong=np.stack(curves, 1)))


def wrongly(t, d):
    """The share of tokens that leave, under thresholds t, with another token than the last layer's; by curves (`fitted`), the
    share that is to be expected.  (Where d.wrong counts what copying costs later tokens, too: what a token brings about.)"""
    return (beyond(-1, t, d, 1) - beyond(-1, t, d)).mean()


def cheapest(candidates, d, *aims):
    """For each agreement aimed at, the candidate thresholds that cost least while at least so many tokens are the last
    layer's: [(X,)].  (Trying candidates takes longest, so each is tried once.)"""
    tried = [(beyond(-1, t, d).mean(), wrongly(t, d), t) for t in candidates]
    safest = (np.inf, 0.0, np.ones(d.sure.shape[1]))                 # nobody leaves
    return [min((x for x in tried if x[1] <= 1 - aim), key=lambda x: x[0], default=safest)[2] for aim in aims]


@torch.inference_mode()
def later(model, exits, d, share=0.3):
    """For each exit, how many later tokens a token that leaves there makes wrong, its K and V above being copies: (X,).  On
    full depth's answers, at one exit at a time: the surest `share` of the tokens leave there; how many of those that stay
    change their choice?  (Two layers skipped may cost as much as six, so it is not told by their number.)"""
    goes, N = np.zeros(d.sure.shape, dtype=bool), len(d.ask)
    for x in range(len(exits)):                          # of those equally sure some, by chance
        goes[np.lexsort((np.random.default_rng(x).random(N), -d.sure[:, x]))[:math.ceil(share * N)], x] = True
    changed, ends = np.zeros(len(exits)), np.cumsum([len(a.agrees) for a in d.told])
    for a, mine in zip(tqdm(d.told, "copies", disable=None), np.split(goes, ends[:-1])):
        ids, P = torch.tensor([a.prompt + a.tokens[:-1]], device=model.output.weight.device), len(a.prompt)
        choices = []
        for n, here in zip([0, *exits], np.concatenate((np.zeros_like(mine[:, :1]), mine), 1).T):        # first nobody
            leave = torch.full(ids.shape, torch.inf)
            leave[0, P:][torch.tensor(here)] = n
            *_, h = model.states(ids, leave=leave.to(ids.device))
            choices.append(model.logits(h[0, P:]).argmax(-1).cpu().numpy())
        changed += ((np.array(choices[1:]) != choices[0]).T & ~mine).sum(0)
    skipped = model.args.n_layers - np.array(exits)      # where nothing is seen, these tell; else one more hardly counts
    return (changed + skipped / skipped.mean()) / goes.sum(0)


def copying(d, t, total, harm, before=(None, 0.0)):
    """What copied K and V cost later tokens: disagreements that generation with thresholds t met (`total`: its numbers),
    less full depth's own (rounding) and what leaves wrongly on full depth's text; per layer skipped, and over what
    `later` (harm) makes one expect.  `before`, if nothing was skipped.  (A straight line through one point.)"""
    n, skipped = total["steps"], total["full_layers"] - total["layers"]
    expected = n * wrongly(t, SimpleNamespace(**vars(d) | dict(wrong=np.broadcast_to(harm, d.sure.shape))))
    cost = max(0, n * (d.own - wrongly(t, d)) - total["agreed"])
    return (cost / skipped, cost / expected if expected else before[1]) if skipped else before


def said(model, prompts, exits, how, what, given=None):
    """What every exit would have said of the N tokens of full depth's answers, or of the answers given (lists of ids):
    sure, wrong (N, X), and in weights ask (N,), what a check reads, and cost (X+1,), what the layers up to each exit
    read, and all of them and the head; own, full depth's agreement with the answers; told, these."""
    told = [measure(model, p, model.args.n_layers, {}, how, exits) if given is None else
            judge(model, SimpleNamespace(prompt=p, tokens=given[i]), how["frequent"], exits)
            for i, p in enumerate(tqdm(prompts, what, disable=None))]
    if not any(a.agrees for a in told) or not exits:
        raise InputError(f"found {len(prompts)} prompts, {sum(len(a.tokens) for a in told)} tokens, "
                         f"{len(exits)} exits in a half; expected, in each, a prompt, an answer of two tokens, an exit")
    sure, right = (np.concatenate([np.array(getattr(a, key)).T for a in told]) for key in ("sure", "right"))
    layer, head = sum(p.numel() for p in model.layers[0].parameters()), model.output.weight.numel()
    return SimpleNamespace(told=told, sure=sure, wrong=1 - right, ask=model.args.dim * np.concatenate([a.sizes for a in told]),
                           own=np.mean([ok for a in told for ok in a.agrees]), cost=[*(n * layer for n in exits), model.args.n_layers * layer + head])


def candidates(d, exits, single=False):
    """Thresholds to choose from, the cheap ones first: the best for 202 prices (single: 200 quantiles), and seven between two."""
    path = ([np.full(len(exits), t) for t in np.quantile(d.sure, np.linspace(0, 1, 200))] if single else
            [best_thresholds(d, price * d.cost[0] / exits[0]) for price in (*np.geomspace(0.1, 1e4, 200), 1e5, 1e6)])        # in layers
    return [a + (b - a) * k / 8 for a, b in zip(path, path[1:]) for k in range(8)] + path[-1:]


def in_layers(d, exits, L):
    """d, of which a layer costs 1, a check and the head nothing."""
    return SimpleNamespace(**vars(d) | dict(ask=0 * d.ask, cost=[*exits, L]))


def without_copying(halves, exits, L):
    """What early exit would be if K and V were exact, in layers: thresholds that run few layers at each of AIMS, one an
    exit and one for all, chosen on one half's tokens and tried on the other's, both ways; the oracle is eval.py's.  [dict]"""
    halves, rows = [in_layers(d, exits, L) for d in halves], []
    curves, n = [fitted(d) for d in halves], sum(len(d.ask) for d in halves)
    chosen = {single: [cheapest(candidates(d, exits, single), d, *AIMS) for d in curves] for single in (False, True)}
    oracle = sum(np.where(d.wrong, L, exits).min(1).sum() for d in halves)
    for single, (i, aim) in product(chosen, enumerate(AIMS)):
        tried = [(thresholds[i], other) for thresholds, other in zip(chosen[single], halves[::-1])]
        wrong, layers = (sum(f(t, d) * len(d.ask) for t, d in tried)
                         for f in (wrongly, lambda t, d: beyond(-1, t, d).mean()))
        rows.append(dict(aim=aim, tokens=n, agreement=1 - wrong / n, saved=1 - layers / n / L, oracle=1 - oracle / n / L,
                         single=single, thresholds=[dict(zip(exits, t.tolist())) for t, _ in tried]))
    return rows


def calibrate(model, prompts, exits, how, target, by_layers=False, single=False):
    """Thresholds for `target` agreement: chosen on every other prompt, where full depth's answers tell what
    each exit would have said, and what leaving there costs later tokens (`later`; generation, how much of it comes
    about: `copying`); certified on the rest, by generating with them.  Candidates come from safe to cheap, and the first
    whose one-sided 95 % bound misses the target ends it.  As each is tried only if all before it passed, the 5 % hold
    for the one kept, however many there are (fixed-sequence testing).  (If bad prompts are rare, their answers must not be longer than any seen.)
    Returns what was tried, [dict].  how["recompute"]: nothing is copied, and so costs later tokens nothing.
    by_layers: thresholds for few layers, not for few bytes.  single: one threshold for all exits (to compare with)."""
    L, tries, counts = model.args.n_layers, [], ("layers", "FLOPs", "bytes")
    alone, rest = (said(model, prompts[i::2], exits, how, what) for i, what in enumerate(("choose", "the rest")))
    exact = without_copying((alone, rest), exits, L)
    alone = in_layers(alone, exits, L) if by_layers else alone

    def generated(t, prompts, what):
        told = [measure(model, p, L, dict(zip(exits, t)), how).numbers for p in tqdm(prompts, what, disable=None)]
        return told, {key: sum(a[key] for a in told) for key in told[0]}

    likely, exact_kv = fitted(alone), how.get("recompute", False)
    harm, found = (np.zeros(len(exits)), (0.0, 0.0)) if exact_kv else (later(model, exits, alone), (None, 0.0))
    priced = lambda: SimpleNamespace(**vars(likely) | dict(wrong=likely.wrong + found[1] * harm))  # noqa: E731
    for _ in range(0 if exact_kv else 2):                # what copying costs, and the thresholds that it leaves
        d = priced()
        t, = cheapest(candidates(d, exits, single), d, target)
        found = copying(alone, t, generated(t, prompts[::2], "copying")[1], harm, found)
    d = priced()
    aims = [target + margin * (1 - target) for margin in MARGINS]
    for aim, t in zip(aims, cheapest(candidates(d, exits, single), d, *aims)):
        if tries and not tries[-1]["certified"]:
            break
        t = t.tolist()
        if tries and t == [*tries[-1]["thresholds"].values()]:
            continue
        told, total = generated(t, prompts[1::2], f"certify {aim:.4f}")
        agreed, steps, n = [a["agreed"] for a in told], [a["steps"] for a in told], total["steps"]
        bad = max(steps)                                 # bad prompts are rare: count on a long one, half wrong
        bound = rate([*agreed, bad / 2], [*steps, bad], 1.645)[1] or 0
        tries.append(dict(
            aim=aim, target=target, thresholds=dict(zip(exits, t)), agreement=sum(agreed) / max(1, n), bound=bound,
            certified=bound >= target, exits_alone=1 - wrongly(t, rest), copying=found[0], exact=exact, prompts=len(told),
            by_layers=by_layers, recompute=exact_kv, tokens=n, max_new_tokens=how["max_new_tokens"], dtype=str(model.output.weight.dtype),
            **{f"{key} saved": 1 - total[key] / max(1, total[f"full_{key}"]) for key in counts}))
    return tries


def on_references(model, tokenizer, work, exits, how):
    """What exits would save were K and V exact (`without_copying`), on reference answers in place of the model's own,
    cut where these would end: of [(set, example, prompt)] those that have one, the last of each prompt; [] if fewer than two have.  Its thresholds
    are chosen on references, and are not stored."""
    work = [*{tuple(p): (name, e, p) for name, e, p in work if e["output"]}.values()]              # each prompt once
    if len(work) < 2:
        return []
    room = lambda p: min(how["max_new_tokens"], model.args.max_seq_len - len(p))  # noqa: E731
    given = [tokenizer.encode(e["output"], eos=True)[:room(p)] for _, e, p in work]
    halves = [said(model, [prompt for *_, prompt in work[i::2]], exits, how, "references", given[i::2]) for i in range(2)]
    return without_copying(halves, exits, model.args.n_layers)


def write_thresholds(path, lite, exits, tries, how, references):
    """Tell what calibration tried, and put the last thresholds that it certified, the cheapest, into lite.json."""
    columns = ("agreement", "bound", "exits_alone", "layers saved", "FLOPs saved", "bytes saved")
    row = lambda values, t: [*(f"{100 * x:.2f}" for x in values), " ".join(f"{n}: {x:.3f}" for n, x in t.items())]  # noqa: E731
    table(f"{tries[0]['prompts']} prompts, {tries[0]['tokens']} tokens, in %", [
        "agreement", "at least", "exits alone", *columns[3:], "thresholds"], {
        f"row {i}: aim {100 * t['aim']:.2f}": row((t[key] for key in columns), t["thresholds"]) for i, t in enumerate(tries, 1)})
    for rows, of in (tries[0]["exact"], ""), (references, " of reference answers"):
        if rows:
            table(f"both halves, {rows[0]['tokens']} tokens{of}, were K and V exact", ["agreement", "layers saved", "the oracle's", "share of it"], {
                f"aim {100 * x['aim']:.2f}" + ", one for all" * x["single"]: [
                    f"{100 * y:.2f}" for y in (x["agreement"], x["saved"], x["oracle"], x["saved"] / (x["oracle"] or 1))] for x in rows})
    if not tries[0]["recompute"]:
        print("no token left early in the half that chooses: what copied K and V cost later tokens is not known" if (harm := tries[0]["copying"]) is None else
              f"each layer that a token skips makes {harm:.4f} of a later token wrong, through copied K and V")
    if not (good := [t for t in tries if t["certified"] and min(t["thresholds"].values()) < 1]):
        raise InputError(f"no thresholds reach {tries[0]['target']} with 95 % confidence on "
                         f"{tries[0]['prompts']} prompts; take more, or a lower target. {path} is as it was")
    part = path.with_suffix(".tmp")
    part.write_text(json.dumps({"exits": exits, **lite, "thresholds": good[-1]["thresholds"],
                                "check": len(how["frequent"]), "recompute": tries[0]["recompute"], "calibration": good[-1]}) + "\n")
    part.replace(path)
    print(f"thresholds written to {path}; generate.py without --threshold takes them")


def main():
    parser = flags(__doc__)
    parser.add("target", type=number(float, 0.5, 0.9999), metavar="AGREEMENT", help="share of tokens that shall be the last layer's")
    parser.add("count", "bytes", nargs="?", choices=("bytes", "layers"), help="what there shall be few of: bytes of weights read, or layers run")
    args = parser.parse_args()
    if not args.ckpt or "RANK" in os.environ:
        raise InputError("thresholds are written into the lite.json of --ckpt: name it; and one process does it, without torchrun")
    args.ckpt = find_checkpoint(args.ckpt).resolve()         # what latest means now; a run may go on beside this one
    model, tokenizer, lite, exits, work, how = prepare(args)
    references = on_references(model, tokenizer, work, exits, how)
    prompts = [list(p) for p in dict.fromkeys(tuple(p) for *_, p in work)]                 # each counts once
    tries = calibrate(model, prompts, exits, how, args.target, args.count == "layers")
    write_thresholds(args.ckpt / "lite.json", lite, exits, tries, how, references)


if __name__ == "__main__":
    run(main)
