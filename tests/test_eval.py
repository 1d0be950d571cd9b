"""eval.py: its numbers against naive counts, and the figures of the committed tiny model."""
import json
import math
import os
import random
import shutil
import subprocess
import sys
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bench
import data as D
import eval as E
import generate as G
from docs import calibrate as C
from docs import project as P
from docs import report as R
from conftest import ROOT, random_model
from model import IGNORE, InputError, load_meta, read_lite, save_meta
from reference import Llama
import questions as Q


def test_exit_losses_equal_a_naive_count(monkeypatch):
    model = random_model(dtype=torch.float64)
    rows = [([1, 5, 9, 33, 2, 71, 4][:n], k) for n, k in ((7, 3), (4, 2), (6, 5))]
    monkeypatch.setattr(E, "LOGIT_ROWS", 4)              # of 6 and 1
    losses, accuracies = E.exit_losses(model, rows, [2, 4], size=2)
    reference = Llama.of(model)
    for loss, accuracy, n in zip(losses, accuracies, (2, 4, 6)):
        total = hits = count = 0
        for ids, k in rows:
            for pos in range(k - 1, len(ids) - 1):
                for t in range(pos + 1):
                    h = reference.states(ids[t], t)[n - 1]
                x = reference.head(h)
                total += np.log(np.exp(x - x.max()).sum()) + x.max() - x[ids[pos + 1]]
                hits += int(x.argmax() == ids[pos + 1])
                count += 1
        assert (loss, accuracy) == (pytest.approx(total / count, rel=1e-5), pytest.approx(hits / count))


def test_a_judged_answer_against_naive_states():
    """Agreement, loss, pooled state, and at each place what an exit would have said, choosing among a few tokens."""
    model, prompt, few = random_model(dtype=torch.float64), [1, 40, 7], [3, 11, 60, 61, 62]
    tokens, _ = Llama.of(model).early_exit(prompt, 30, {2: 0.4, 4: 0.3})
    a = E.judge(model, SimpleNamespace(prompt=prompt, tokens=tokens), few, [2, 4])
    ids, reference, loss, agrees, states = prompt + tokens, Llama.of(model), 0, [], []
    for pos, token in enumerate(ids[:-1]):
        h = reference.states(token, pos)
        if pos < len(prompt) - 1:
            continue
        p = np.exp(reference.head(h[-1]))
        loss -= np.log(p[ids[pos + 1]] / p.sum())
        states.append(h[-1])
        agrees.append(int(p.argmax() == ids[pos + 1]))
        if pos >= len(prompt):
            among, i = sorted({*few, *ids[:pos + 1]}), pos - len(prompt)
            assert a.sizes[i] == len(among)
            for x, n in enumerate((2, 4)):
                q = np.exp(reference.head(h[n - 1])[among])
                assert a.sure[x][i] == pytest.approx(q.max() / q.sum(), abs=1e-6)
                assert a.right[x][i] == (among[q.argmax()] == p.argmax())
    assert a.agrees == agrees[1:] and 0 < sum(a.agrees) < 29 and {0, 1} == {*a.right[0], *a.right[1]}
    assert a.loss == pytest.approx(loss) and np.allclose(a.pooled.numpy(), np.mean(states, 0))
    whole = E.judge(model, SimpleNamespace(prompt=prompt, tokens=tokens), (), [2])
    assert whole.sizes == [96] * 29 and whole.agrees == a.agrees and whole.sure[0] != a.sure[0]
    full = [t for t, _ in G.generate(model, prompt, 30)]
    assert all(E.judge(model, SimpleNamespace(prompt=prompt, tokens=full)).agrees)
    one = E.judge(model, SimpleNamespace(prompt=prompt, tokens=full[:1]), few, [2])
    assert (one.agrees, one.sure, one.right, one.sizes) == ([], [[]], [[]], []) and one.loss > 0


def test_what_an_exit_would_have_said_is_what_the_decoder_hears():
    """A threshold between two confidences that `judge` found makes exactly the tokens above it leave."""
    model, prompt, few = random_model(dtype=torch.float64), [1, 40, 7], list(range(20))
    full = G.answer(model, prompt, 30, {})
    sure = E.judge(model, full, few, [2]).sure[0]
    first = [t for t in sorted(sure) if t < 0.99][-3]    # leaving changes what follows: hold the first to leave
    exits = G.answer(model, prompt, 30, {2: first - 1e-5}, frequent=few).exits[1:]
    assert exits.index(2) == next(i for i, x in enumerate(sure) if x > first - 1e-5)


def counted(f):
    """torch's own count of the FLOPs of f(), attention as plain matrix products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        f()
    return counter.get_total_flops()


@torch.inference_mode()
def test_flops_are_those_that_torch_counts():
    """A full-depth step, a check, and a row that only owes K and V, each apart."""
    model = random_model(n_layers=4)
    D, kv, F = 48, 2 * (2 * 8) * 48, model.args.ffn_dim              # kv: of two heads, 8 wide
    a = SimpleNamespace(prompt=[1] * 9, sizes=[33])
    cost = lambda exits, asks: E.costs(model, a, exits, asks, 4)["FLOPs"]  # noqa: E731
    cache = model.new_cache(1, 40).zero_()
    step = counted(lambda: model.logits(list(model.states(torch.tensor([[5]]), pos=9, cache=cache))[-1]))
    assert cost([4], 0) == step
    check = counted(lambda: model.logits(torch.ones(D), model.output.weight[:33]))
    assert cost([4], 1) - cost([4], 0) == check
    block, h, debt = model.layers[0], torch.ones(1, 1, D), torch.ones(1, 3, D)
    rows = [counted(lambda: block(h, 9, cache[0], d)) for d in (None, debt)]
    assert rows[1] - rows[0] == 3 * 2 * (D * D + kv) and rows[0] == 2 * (2 * D * D + kv + 3 * D * F) + 4 * 10 * D


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("few", [(), tuple(range(30))])
def test_costs_are_what_a_whole_generation_runs_and_reads(few, recompute):
    """Thresholds, checks, debts paid and unpaid: torch's FLOP counter and the meter of bench.py against the formulas."""
    model, prompt = random_model(seed=3), [1, 40, 7]
    thresholds, how = {2: 0.45, 4: 0.4, 5: 1.0}, dict(frequent=few, recompute=recompute)     # exit 5 is not asked
    steps = G.generate(model, prompt, 40, thresholds, **how)
    out, books = [next(steps)], SimpleNamespace(bytes=0)
    with bench.metered(books):
        flops = counted(lambda: out.extend(steps))
    a = SimpleNamespace(prompt=prompt, tokens=[t for t, _ in out])
    n = np.array([n for _, n in out][1:])
    assert {2, 4, 6} == set(n)
    E.judge(model, a, few)
    cost = E.costs(model, a, n, (n >= 2) * 1 + (n >= 4), 6, recompute)
    masked = 1e-3 * recompute                            # rows together: attention's masked half, which is computed but not counted
    assert cost["bytes"] == books.bytes and 0 <= flops - cost["FLOPs"] <= masked * flops and cost["layers"] == n.sum()
    told = E.measure(model, prompt, 6, thresholds, how | dict(max_new_tokens=40, eos=None)).numbers
    assert cost == {key: told[key] for key in cost} and (recompute or cost == E.costs(model, a, n, (n >= 2) * 1 + (n >= 4), 6))      # copies are the default


def test_first_layers_are_a_model_of_that_depth():
    model, tokens = random_model(), torch.randint(96, (1, 9))
    state, _ = model.states(tokens, [2])
    assert torch.equal(E.first_layers(model, 2)(tokens), model.logits(state))
    assert len(model.layers) == 6 and model(tokens).shape == (1, 9, 96)
    told = E.measure(model, [1, 40, 7], 2, {}, dict(frequent=(), max_new_tokens=5, eos=None)).numbers
    costs = [E.costs(model, SimpleNamespace(prompt=[1, 40, 7], sizes=[96] * 4), [n] * 4, 0, n) for n in (2, 6)]      # both pay the whole head
    assert all((told[key], told[f"full_{key}"]) == (costs[0][key], costs[1][key]) for key in costs[0])


def test_the_oracle_leaves_at_the_first_right_exit_and_pays_for_one_check():
    model, tokenizer, kinds = load_meta(ROOT / "tiny", torch.float32).fuse(), D.Tokenizer.load(ROOT / "tiny"), set()
    how = dict(max_new_tokens=40, eos=tokenizer.eos, frequent=range(3, 40))
    layer = 96 * 96 * 4 + 3 * 96 * model.args.ffn_dim                # wq, wk, wv, wo of full width
    for e in Q.embedded(40, split="test"):
        prompt = tokenizer.encode(D.prompt_text(e), bos=True)
        around = dict(e, output=f" {e['output']}\n")     # spaces around it do not make an answer wrong
        runs = E.compare(model, tokenizer, "s", around, prompt, {E.FULL: (8, {}), "first": (2, {})}, [2, 4, 6], how)["runs"]
        assert runs[E.FULL]["exact"] == (runs[E.FULL]["text"] == e["output"])
        a = E.measure(model, prompt, 8, {}, how, [2, 4, 6])
        right = np.array(a.right)                        # (3, N)
        best = np.where(right.any(0), 2 + 2 * right.argmax(0), 8).tolist()
        assert runs[E.FULL]["exits"] == [8] * len(best) and runs[E.ORACLE]["exits"] == best and runs[E.ORACLE]["layers"] == sum(best)
        assert runs[E.ORACLE]["bytes"] == 4 * sum(n * layer + 96 * (512 if n == 8 else size) for n, size in zip(best, a.sizes))
        pooled = [x.pooled.double().numpy() for x in (a, E.measure(model, prompt, 2, {}, how))]
        cosine = pooled[0] @ pooled[1] / np.prod([np.linalg.norm(x) for x in pooled])
        assert runs["first"]["similarity"] == pytest.approx(cosine, abs=1e-5) and runs[E.FULL]["similarity"] == pytest.approx(1, abs=1e-5)
        kinds |= set(best)
    assert kinds == {2, 4, 6, 8}


def test_rate_is_wilson_for_single_trials_and_wider_for_clusters():
    p, low, high, n = R.rate([1] * 80 + [0] * 20, [1] * 100)
    assert (p, n) == (0.8, 100)
    assert (low, high) == (pytest.approx(0.711, abs=2e-3), pytest.approx(0.867, abs=2e-3))      # Wilson, tabulated
    _, low10, high10, n10 = R.rate([10] * 80 + [0] * 20, [10] * 100)            # the tokens of a prompt go together
    assert n10 == 1000 and (low10, high10) == (pytest.approx(low, abs=1e-9), pytest.approx(high, abs=1e-9))
    p, low, high, n = R.rate([10] * 50, [10] * 50)                               # nothing varies: 50 prompts, not 500 draws
    assert p == high == 1 and low == pytest.approx(50 / (50 + 1.96 ** 2), rel=1e-9)
    for h, c in ((63, 69), (98, 107), (9, 10)):          # one prompt is one draw, whatever rounding makes of h - p c
        p, _, half = h / c, 1 + 1.96 ** 2, 1.96 * (h / c * (1 - h / c) + 1.96 ** 2 / 4) ** 0.5
        assert R.rate([h], [c])[1:3] == pytest.approx([(p + 1.96 ** 2 / 2 - half) / _, (p + 1.96 ** 2 / 2 + half) / _], rel=1e-9)
    assert R.rate([0], [0]) == [None, None, None, 0]


def test_the_interval_has_its_coverage_when_prompts_differ():
    r, inside, runs = random.Random(0), 0, 400
    for _ in range(runs):
        hits, counts = [], []
        for _ in range(60):
            q, c = r.choice((0.6, 0.95, 1.0)), r.randint(3, 30)
            counts.append(c)
            hits.append(sum(r.random() < q for _ in range(c)))
        _, low, high, _ = R.rate(hits, counts)
        inside += low <= (0.6 + 0.95 + 1.0) / 3 <= high
    assert 0.92 <= inside / runs <= 0.98


def test_the_one_sided_bound_misses_in_one_of_twenty():
    r, below, runs = random.Random(1), 0, 1000
    for _ in range(runs):
        hits, counts = [], []
        for _ in range(80):
            q, c = r.choice((0.9, 0.99, 1.0)), r.randint(3, 30)
            counts.append(c)
            hits.append(sum(r.random() < q for _ in range(c)))
        below += R.rate(hits, counts, 1.645)[1] <= (0.9 + 0.99 + 1.0) / 3
    assert 0.92 <= below / runs <= 0.98


def line(exits, agrees, exact, seconds, layers, **more):
    """A run of the results, as eval.py writes it."""
    n = len(exits)
    return dict(exits=exits, agreed=sum(agrees), exact=exact, seconds=seconds, prompts=1, steps=n, length=n + 1, loss=n + 1.0,
                similarity=0.5, layers=layers, FLOPs=10, bytes=10, full_layers=8 * n, full_FLOPs=40, full_bytes=20, text="", **more)


def test_figures_are_ratios_of_sums_over_prompts():
    lines = [dict(set="s", group="a; b", runs={R.FULL: line([8] * 3, [1] * 3, 1, 2.0, 24, sure=[[0.95, 0.2, 1.0]], right=[[1, 0, 1]]),
                                               "x": line([2, 2, 8], [1, 0, 1], 1, 1.0, 12), R.ORACLE: line([2] * 3, [1] * 3, 1, None, 6)}),
             dict(set="t", group="b", runs={R.FULL: line([8], [1], 1, 2.0, 8, sure=[[0.91]], right=[[0]]),
                                            "x": line([4], [1], 0, 1.0, 4), R.ORACLE: line([8], [1], 1, None, 8)})]
    row = R.summarise(lines, "x")
    want = {"layers": 4, "layers saved %": 50, "FLOPs saved %": 75, "bytes saved %": 50, "of the oracle's layers %": 50 / (1 - 14 / 32) ,
            "tokens/s": 2, "speed": 2, "agreement %": 75, "exact match %": 50, "exact - full depth's": -50, "similarity": 0.5,
            "perplexity": np.e, "tokens an answer": 3}
    assert {key: row[key][0] for key in want} == pytest.approx(want) and row["exits"] == {2: 2, 4: 1, 8: 1}
    assert all(low <= value <= high for value, low, high in (row[key] for key in want if None not in row[key]))
    assert row["exact - full depth's"][1:] == [-100, 0]                          # both prompts drawn from two
    out = R.report(lines, [2])
    assert set(out) == {"s", "t", "all sets"} and set(out["s"]["groups"]) == {"a", "b"} and out["all sets"]["groups"] == {}
    assert out["all sets"]["curve"][2][9][::4] == [pytest.approx((0.95 + 1 + 0.91) / 3), 3]
    assert out["all sets"]["curve"][2][9][1] == pytest.approx(2 / 3) and out["all sets"]["curve"][2][2][:2] == [0.2, 0]
    no = line([], [], None, 0.0, 0)                      # an answer of one token, and no reference: nothing to divide by
    row = R.summarise([dict(set="s", group="", runs={R.FULL: no, "x": no, R.ORACLE: no})], "x")
    assert row["agreement %"] == row["speed"] == row["exact match %"] == [None] * 3 and row["perplexity"][0] == pytest.approx(np.e)
    json.dumps(row, allow_nan=False)


def test_a_sample_of_one_token_answers_alone_does_not_take_the_interval():
    runs = [line([], [], None, 0.0, 0), line([2], [1], 1, 1.0, 2), line([6], [1], 1, 1.0, 6)]        # drawn thrice, in 1 of 27 the first alone
    row = R.summarise([dict(runs={R.FULL: run, R.ORACLE: run}) for run in runs], R.FULL)
    assert row["layers"] == [4, 2, 6] and row["tokens/s"] == [1, 1, 1]


def test_a_bootstrapped_interval_has_its_coverage():
    r, inside = random.Random(0), 0
    for _ in range(200):
        runs = [line([1] * n, [1] * n, 1, n * r.gauss(1, 0.2), 4 * n) for n in (r.randint(3, 30) for _ in range(60))]
        low, high = R.summarise([dict(runs={R.FULL: run, R.ORACLE: run}) for run in runs], R.FULL)["tokens/s"][1:]
        inside += low <= 1 <= high
    assert 0.90 <= inside / 200 <= 0.99


# --- thresholds -------------------------------------------------------------------------------------------------------


def told(seed, n=60):
    """What exits 2 and 4 of 6 said of n tokens: sure ones are right more often, and deeper ones."""
    r = np.random.default_rng(seed)
    sure = np.round(r.random((n, 2)) ** 0.5, 2)                     # with ties
    wrong = (r.random(sure.shape) > sure ** 0.3).astype(int)
    return SimpleNamespace(own=1.0, sure=sure, wrong=wrong, ask=np.full(n, 10.0), cost=[200, 400, 650])


def naive(t, d):
    """Cost and disagreements of thresholds, token by token."""
    cost = wrong = 0
    for i in range(len(d.ask)):
        for x, threshold in enumerate(t):
            cost += d.ask[i] * (threshold < 1)
            if d.sure[i, x] > threshold:
                cost, wrong = cost + d.cost[x], wrong + d.wrong[i, x]
                break
        else:
            cost += d.cost[-1]
    return cost, wrong


@pytest.mark.parametrize("seed", range(4))
def test_thresholds_cost_least_for_every_price_of_a_disagreement(seed):
    d = told(seed)
    grid = [0, *np.unique(d.sure) - 0.005, 1.0]
    for price in (10, 100, 300, 1000, 1e5):
        value = lambda t: naive(t, d)[0] + price * naive(t, d)[1]  # noqa: E731
        t = C.best_thresholds(d, price)
        assert (C.beyond(-1, t, d).sum(), C.beyond(-1, t, d, 1.0).sum() - C.beyond(-1, t, d).sum()) == pytest.approx(naive(t, d))
        for x in range(2):                               # one at a time: none is better; and one exit alone is a global best
            assert all(value(t) <= value([*t[:x], other, *t[x + 1:]]) + 1e-6 for other in grid)
        one = SimpleNamespace(sure=d.sure[:, :1], wrong=d.wrong[:, :1], ask=d.ask, cost=[d.cost[0], d.cost[-1]])
        best = min(naive([t], one)[0] + price * naive([t], one)[1] for t in grid)
        assert sum(naive(C.best_thresholds(one, price), one) * np.array([1, price])) == pytest.approx(best)


def test_the_cheapest_that_agrees_enough():
    d = told(0)
    every = [np.array(t) for t in ((0, 0), (0.5, 0.5), (0.9, 0.7), (0.95, 0.95), (1, 1))]
    shares = [1 - naive(t, d)[1] / 60 for t in every]
    assert shares[0] < shares[-1] == 1
    for aim in (0.5, 0.9, 0.99, 1.0):
        want = min((naive(t, d)[0], i) for i, t in enumerate(every) if shares[i] >= aim)[1]
        assert C.cheapest(every, d, aim, 1.0)[0] is every[want]
    assert C.cheapest(every[:1], d, 0.99)[0].tolist() == [1, 1]      # none: nobody leaves


def test_copying_is_what_generation_lacks_beyond_wrong_exits():
    d = told(1)                                          # 60 tokens, exits 2 and 4 of 6
    for t in ([0.3, 0.5], [0.6, 0.4], [1, 0.7]):
        t = np.array(t)
        wrong = sum(next((d.wrong[i, x] for x in (0, 1) if d.sure[i, x] > t[x]), 0) for i in range(60))
        costly = 10 * sum(next(([0.2, 0.05][x] for x in (0, 1) if d.sure[i, x] > t[x]), 0) for i in range(60))
        total, harm = dict(steps=600, agreed=600 - 10 * wrong - 45, full_layers=3600, layers=3000), np.array([0.2, 0.05])
        assert C.copying(d, t, total, harm) == pytest.approx((45 / 600, 45 / costly))
        assert C.copying(d, t, total | dict(agreed=600), harm) == (0, 0)         # fewer than expected: no harm, not a gain
        d.own = 0.99                                     # full depth itself: 6 of 600
        assert C.copying(d, t, total, harm) == pytest.approx((39 / 600, 39 / costly))
        d.own = 1.0
    for nothing in (dict(steps=0, agreed=0, full_layers=0, layers=0), dict(steps=600, agreed=590, full_layers=3600, layers=3600)):
        assert C.copying(d, np.ones(2), nothing, harm, (0.02, 3)) == (0.02, 3)          # nothing skipped tells nothing


def test_later_counts_the_choices_that_copies_change():
    """Against a loop over tokens and layers: who leaves runs no further, and those that stay read the K and V it leaves."""
    model, exits = random_model(2, dtype=torch.float64), [1, 3, 5]
    d = C.said(model, [[1, 5, 9, 2], [1, 7, 30], [1, 44, 60, 8, 20]], exits, dict(max_new_tokens=24, eos=None, frequent=()), "")
    assert all(len(set(sure)) == len(sure) for sure in d.sure.T)     # no ties, so the surest are told
    found = C.later(model, exits, d)
    for x, n in enumerate(exits):
        least, changed = sorted(d.sure[:, x])[-math.ceil(0.3 * len(d.ask))], 0
        for a in d.told:
            exact, naive = Llama.of(model).logits(a.prompt + a.tokens[:-1]).argmax(-1), Llama.of(model)
            for pos, token in enumerate(a.prompt + a.tokens[:-1]):
                h, i = naive.w["tok_embeddings.weight"][token], pos - len(a.prompt)
                leaves = i >= 0 and a.sure[x][i] >= least
                for layer in range(naive.L):
                    h = h if leaves and layer >= n else naive.layer(layer, pos, h)
                    naive.write_kv(layer, pos, h) if leaves and layer >= n else None
                changed += not leaves and i >= 0 and naive.head(h).argmax() != exact[pos]
        assert n == 5 or changed > 4
        assert found[x] == pytest.approx((changed + (6 - n) / 3) / math.ceil(0.3 * len(d.ask)))


def test_curves_of_two_confidences_are_the_shares_of_wrong_tokens():
    """Two numbers fit two shares, whatever they are, but for the lean to 1 - sure, which 40 000 tokens outweigh."""
    sure = np.repeat([[0.6], [0.9]], 20000, 0)
    wrong = np.concatenate([np.arange(20000) < n for n in (7000, 900)])[:, None] * 1.0
    found = C.fitted(SimpleNamespace(sure=sure, wrong=wrong, ask="as it was"))
    assert found.wrong == pytest.approx(np.repeat([[0.35], [0.045]], 20000, 0), abs=2e-4)
    assert found.ask == "as it was" and found.sure is sure


@pytest.mark.parametrize("n", [1, 3, 400])
def test_curves_stay_finite_and_near_the_confidence_where_nothing_is_wrong(n):
    """Without the lean the best curve would be 0 for tokens never wrong, at infinite numbers."""
    sure = np.stack([np.linspace(0.5, 1, n), np.full(n, 1.0)], 1)
    found = C.fitted(SimpleNamespace(sure=sure, wrong=np.zeros((n, 2)))).wrong
    assert np.isfinite(found).all() and (found >= 0).all() and (np.diff(found[:, 0]) <= 0).all()
    assert n > 3 or found == pytest.approx(1 - sure, abs=0.2)
    assert found[:, 0].max() < (0.5 if n < 400 else 0.05)


def test_thresholds_from_curves_do_better_on_other_tokens():
    """400 tokens to choose on, 20000 of the same kind to be tried on: what thresholds cost with wrong tokens at their price."""
    def drawn(seed, n):                                  # what is hard is so for all exits; the first overstates how sure it is
        rng = np.random.default_rng(seed)
        easy = rng.normal(1, 2, (n, 1)) + np.array([0, 1, 2])
        sure = 1 / (1 + np.exp(-1.2 * easy - rng.normal(0, 1, (n, 3))))
        wrong = rng.random((n, 3)) < 1 / (1 + np.exp(1.5 * easy))
        return SimpleNamespace(sure=sure, wrong=1.0 * wrong, ask=np.zeros(n), cost=[2, 4, 6, 8])

    other, price, costs = drawn(99, 20000), 100, []
    for seed in range(12):
        d = drawn(seed, 400)
        costs.append([C.beyond(-1, C.best_thresholds(x, price), other, price).mean() for x in (C.fitted(d), d)])
    curves, raw = zip(*costs)
    assert np.mean(raw) - np.mean(curves) > 0.1 and sum(a < b for a, b in costs) >= 9, costs


def test_without_copying_is_counted_in_layers_on_the_other_half():
    halves = told(0, 400), told(1, 300)
    in_layers = lambda d: SimpleNamespace(sure=d.sure, wrong=d.wrong, ask=0 * d.ask, cost=[2, 4, 6])  # noqa: E731
    steps = [*np.arange(0.305, 1, 0.01), 1]
    first = [next((n for n, bad in zip((2, 4), row) if not bad), 6) for d in halves for row in d.wrong]
    found = C.without_copying(halves, [2, 4], 6)
    assert [(x["single"], x["aim"]) for x in found] == [(single, aim) for single in (False, True) for aim in (0.995, 0.99, 0.98, 0.95)]
    assert all(a["saved"] < b["saved"] and a["agreement"] > b["agreement"] for a, b in zip(found, found[1:]) if a["single"] == b["single"])
    curves = [in_layers(C.fitted(d)) for d in halves]
    pairs = [[(a == b, *naive((a, b), d)) for a in steps for b in steps] for d in curves]
    for x in found:
        layers = wrong = 0
        for t, every, chosen, rest in zip(x["thresholds"], pairs, curves, halves[::-1]):
            assert not x["single"] or len(set(t.values())) == 1
            allowed = len(chosen.ask) * (1 - x["aim"]) + 1e-9
            fewest = min(n for same, n, wrong in every if wrong <= allowed and same >= x["single"])
            a, b = naive([*t.values()], chosen)
            assert b <= allowed and a <= 1.1 * fewest               # of all pairs of thresholds, whichever way they are found
            a, b = naive([*t.values()], in_layers(rest))
            layers, wrong = layers + a, wrong + b
        assert x["saved"] == pytest.approx(1 - layers / 4200) and x["agreement"] == pytest.approx(1 - wrong / 700)
        assert x["oracle"] == pytest.approx(1 - sum(first) / 4200) and x["tokens"] == 700


def test_references_that_are_the_model_s_own_answers_tell_what_these_told(tiny):
    model, tokenizer, lite = tiny
    how = dict(max_new_tokens=6, eos=tokenizer.eos, frequent=lite["shortlist"])
    examples = [e | dict(output="?") for e in Q.embedded(60, split="test")]
    work = [("embedded", e, tokenizer.encode(D.prompt_text(e), bos=True)) for e in examples]
    odd = C.on_references(model, tokenizer, work, [2, 4, 6], how)                                # a wrong answer: other tokens
    for _, e, prompt in work:
        ids = E.answer(model, prompt, thresholds={}, **how).tokens
        e["output"] = tokenizer.decode(ids, prompt).strip()
        e["output"] += " and so on" * (ids[-1] != tokenizer.eos)      # more than is generated: cut
        assert tokenizer.encode(e["output"], eos=True)[:6] == ids
    own = [C.said(model, [p for *_, p in work[i::2]], [2, 4, 6], how, "") for i in range(2)]
    assert C.on_references(model, tokenizer, work, [2, 4, 6], how) == C.without_copying(own, [2, 4, 6], 8) != odd
    without = C.on_references(model, tokenizer, work[:7] + work[8:], [2, 4, 6], how)
    for nothing in (None, ""):
        examples[7]["output"] = nothing
        assert C.on_references(model, tokenizer, work, [2, 4, 6], how) == without
    assert C.on_references(model, tokenizer, work[7:8], [2, 4, 6], how) == []
    long = [1] * (model.args.max_seq_len - 3)            # it has room for no more than three tokens
    assert C.on_references(model, tokenizer, [("", examples[0], long), ("", examples[0], [2, *long[1:]])], [2, 4, 6], how)[0]["tokens"] == 4
    assert C.on_references(model, tokenizer, work + work[:9], [2, 4, 6], how) == C.on_references(model, tokenizer, work, [2, 4, 6], how)        # no prompt in both halves


def test_calibration_counts_what_copying_costs_later_tokens(tiny, monkeypatch):
    """Where each skipped layer costs the tokens after it 1 % more, thresholds are safer from the start."""
    model, tokenizer, lite = tiny
    prompts = [tokenizer.encode(D.prompt_text(e), bos=True) for e in Q.embedded(80, split="test")]
    how = dict(max_new_tokens=20, eos=tokenizer.eos, frequent=lite["shortlist"])

    def harmful(*args):
        a = E.measure(*args)
        a.numbers["agreed"] -= 0.01 * (a.numbers["full_layers"] - a.numbers["layers"])
        return a

    first = [C.calibrate(model, prompts, [2, 4, 6], how, 0.98)[0]]
    monkeypatch.setattr(C, "measure", harmful)
    first.append(C.calibrate(model, prompts, [2, 4, 6], how, 0.98)[0])
    assert first[1]["layers saved"] < first[0]["layers saved"] - 0.05
    found = []
    for harm in ([0.5, 1e-3, 1e-3], [1e-3, 1e-3, 0.5]):              # it matters at which exit
        monkeypatch.setattr(C, "later", lambda *_, harm=harm: np.array(harm))
        tried = [t["thresholds"] for t in C.calibrate(model, prompts, [2, 4, 6], how, 0.8)]
        found.append(next(t for t in tried if min(t.values()) < 1))              # the safest that lets any leave
    assert found[0][2] == 1 > found[0][6] and found[1][6] == 1 > found[1][2]


# --- the committed tiny model keeps what the README says of it ---------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    model = load_meta(ROOT / "tiny", torch.float32)
    return model, D.Tokenizer.load(ROOT / "tiny", model.args.vocab_size), read_lite(ROOT / "tiny")


def test_tiny_is_small():
    assert sum(p.stat().st_size for p in (ROOT / "tiny").iterdir()) <= 4e6


def test_full_depth_answers_and_the_first_exit_alone_does_not(tiny):
    """Exact match on 1000 unseen questions: greedy is right everywhere if and only if the forced argmax is."""
    model, tokenizer, lite = tiny
    rows = D.tokenize(Q.embedded(1000, split="test"), tokenizer, 256)
    exact = []
    with torch.no_grad():
        for i in range(0, 1000, 100):
            tokens, labels = D.collate(rows[i:i + 100])
            exact.append([((model.logits(h).argmax(-1) == labels) | (labels == IGNORE)).all(1)
                          for h in model.states(tokens, lite["exits"])])
    share = [torch.cat(parts).float().mean().item() for parts in zip(*exact)]
    assert share[-1] >= 0.80 and share[0] <= share[-1] - 0.15, share


def test_calibration_by_layers_does_not_mind_what_a_check_reads(tiny, monkeypatch):
    """Where a check reads as much as eight layers, thresholds for few bytes are 1; those for few layers are as they were."""
    model, tokenizer, lite = tiny
    prompts = [tokenizer.encode(D.prompt_text(e), bos=True) for e in Q.embedded(60, split="test")]
    how, said = dict(max_new_tokens=20, eos=tokenizer.eos, frequent=lite["shortlist"]), C.said

    def dear(*args):
        d = said(*args)
        return SimpleNamespace(**vars(d) | dict(ask=0 * d.ask + 4 * d.cost[0]))

    monkeypatch.setattr(C, "said", dear)
    by_bytes, by_layers = (C.calibrate(model, prompts, [2, 4, 6], how, 0.98, which)[0] for which in (False, True))
    assert by_bytes["layers saved"] < 0.1 and by_layers["layers saved"] > 0.6 and by_layers["by_layers"]


def test_calibration_for_recomputed_k_and_v_generates_so(tiny):
    """Its figures are those of generating with recomputed K and V, which cost FLOPs, not those of generating with copies."""
    model, tokenizer, lite = tiny
    prompts = [tokenizer.encode(D.prompt_text(e), bos=True) for e in Q.embedded(120, split="test")]
    how = dict(max_new_tokens=20, eos=tokenizer.eos, frequent=lite["shortlist"])
    first = C.calibrate(model, prompts, [2, 4, 6], how | dict(recompute=True), 0.9, True)[0]
    assert first["copying"] == 0 and first["recompute"]
    saved = []
    for recompute in (True, False):
        told = [E.measure(model, p, 8, first["thresholds"], how | dict(recompute=recompute)).numbers for p in prompts[1::2]]
        saved.append(1 - sum(a["FLOPs"] for a in told) / sum(a["full_FLOPs"] for a in told))
    assert first["FLOPs saved"] == saved[0] < saved[1] - 0.01


def test_recompute_reaches_eval_and_project_from_their_flag_and_file(tmp_path, monkeypatch, capsys):
    counts = {}
    for flag in ("", "--recompute"):
        path = tmp_path / f"r{len(flag)}.jsonl"
        call(monkeypatch, E, f"--ckpt {ROOT}/tiny --limit 20 --threshold 0.9 --out {path} {flag}")
        runs = [line["runs"] for line in E.read_answers(path)[1].values() if "runs" in line]
        capsys.readouterr()
        call(monkeypatch, P, str(path))
        counts[flag] = {name: sum(run[name]["FLOPs"] for run in runs) for name in ("threshold 0.9", "oracle", "full depth")}
        counts[flag]["projected"] = capsys.readouterr().out
    for name in ("threshold 0.9", "oracle"):
        assert counts[""][name] < counts["--recompute"][name] < counts[""]["full depth"] == counts["--recompute"]["full depth"]
    text = path.read_text()                              # the same answers, as if they had been given with copies
    path.write_text(text.replace('"recompute": true', '"recompute": false', 1))
    call(monkeypatch, P, str(path))
    assert '"recompute": true' in text and capsys.readouterr().out != counts["--recompute"]["projected"]


def test_calibration_does_not_make_up_what_copies_cost(tmp_path, monkeypatch, capsys, checkpoint):
    """Exits of random weights are never right, so nobody leaves and nothing is copied; and no row hides another of a like aim."""
    folder = shutil.copytree(checkpoint, tmp_path / "random")
    call(monkeypatch, C, f"0.9999 --ckpt {folder} --limit 8 --max-new-tokens 8", fails="no thresholds reach")
    assert "what copied K and V cost later tokens is not known" in capsys.readouterr().out
    tries = [dict(aim=aim, copying=0.0012, thresholds={2: 1.0}, exact=[], prompts=9, tokens=99, recompute=False, target=0.9999, certified=False,
                  agreement=1, bound=1, exits_alone=1, **{f"{key} saved": 0 for key in ("layers", "FLOPs", "bytes")}) for aim in (0.99991, 0.99992)]
    with pytest.raises(InputError):
        C.write_thresholds(tmp_path / "x", {}, [2], tries, dict(frequent=[]), [])
    out = capsys.readouterr().out
    assert "row 1: aim 99.99" in out and "row 2: aim 99.99" in out and "makes 0.0012 of a later token wrong" in out


def test_calibration_writes_thresholds_that_it_certified(tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(ROOT / "tiny", tmp_path / "tiny")
    before = json.loads((folder / "lite.json").read_text())
    call(monkeypatch, C, f"0.999 --ckpt {folder} --limit 20", fails="lite.json is as it was")       # too few to tell
    (tmp_path / "few.json").write_text(json.dumps([dict(e, input="") for e in Q.embedded(12, split="test")]))
    call(monkeypatch, C, f"0.9 --ckpt {folder} --data {f'{tmp_path}/few.json ' * 30}", fails="lite.json is as it was")       # still 12
    assert json.loads((folder / "lite.json").read_text()) == before
    capsys.readouterr()
    call(monkeypatch, C, " ".join(["0.95", "layers", "--ckpt", str(folder), "--limit", "240"]))
    out = capsys.readouterr().out
    assert "aim 99.00" in out and out.count("were K and V exact") == 2 and "tokens of reference answers" in out
    lite = json.loads((folder / "lite.json").read_text())
    found = lite["calibration"]
    assert found["bound"] >= 0.95 <= found["agreement"] and found["layers saved"] > 0.6
    assert found["prompts"] == len({D.prompt_text(e) for e in Q.embedded(240, split="test")}) // 2 < 120         # two came twice
    assert lite["thresholds"] == found["thresholds"] and found["by_layers"] and lite["check"] == len(before["shortlist"])
    assert {key: lite[key] for key in before} == before
    call(monkeypatch, G, f"--ckpt {folder} --limit 1")   # takes them, and says so
    said = capsys.readouterr().err
    assert "lite.json, for 95.0% agreement" in said and all(f"{n} ({t:g})" in said for n, t in lite["thresholds"].items())
    for other in ("--shortlist 0", "--temperature 1", "--dtype bfloat16", "--exits 2", "--threshold 0.5", "--recompute", "--verify", "--raw x"):        # not what was certified
        call(monkeypatch, G, f"--ckpt {folder} --limit 1 {other}")
        assert "95 % confidence" not in capsys.readouterr().err
    rows = []
    for shortlist in ("", " --shortlist 0", " --exits 4"):           # eval.py judges them with the list they were chosen with alone
        call(monkeypatch, E, f"--ckpt {folder} --limit 2 --threshold --out {tmp_path / f'r{len(shortlist)}.jsonl'}{shortlist}")
        figures = report(tmp_path / f"r{len(shortlist)}.jsonl", monkeypatch)
        rows.append(figures["sets"]["embedded"]["rows"].get("lite.json", {}).get("layers saved %"))
    assert rows[0] == rows[2] and rows[1] is None        # and all of them, whatever exits are looked at
    call(monkeypatch, E, f"--ckpt {folder} --limit 2 --threshold --recompute --out {tmp_path / 'r.jsonl'}")        # nor beside what they were not chosen for
    assert "lite.json" not in report(tmp_path / "r.jsonl", monkeypatch)["sets"]["embedded"]["rows"]
    model, tokenizer = load_meta(folder, torch.float32), D.Tokenizer.load(folder)              # and on fresh questions they hold
    how = dict(max_new_tokens=40, eos=tokenizer.eos, frequent=lite["shortlist"])
    rule = {int(n): t for n, t in lite["thresholds"].items()}
    told = [E.measure(model, tokenizer.encode(D.prompt_text(e), bos=True), 8, rule, how).numbers for e in Q.embedded(400, split="test")[240:]]
    assert R.rate([a["agreed"] for a in told], [a["steps"] for a in told])[0] >= 0.95


@pytest.mark.parametrize("flags, where", [
    ("0.9", "name it"), ("0.9 --ckpt TINY --limit 1", "found 0 prompts"), ("0.9 --ckpt TINY --limit 4 --max-new-tokens 1", "an answer of two"),
    ("--ckpt TINY --data DIR/d.jsonl --out DIR/d.jsonl", "none of --data"), ("--ckpt TINY --data DIR/d.jsonl --out DIR/d.json", "in .jsonl"), ("--ckpt TINY --data DIR/d.jsonl --out DIR/five.jsonl", "one run's answers"),
    ("--ckpt TINY --data DIR/half.jsonl", "line 1")])
def test_mistakes_are_told_in_a_line(tmp_path, monkeypatch, flags, where):
    (tmp_path / "d.jsonl").write_text('{"prompt": "Say hen."}\n')
    (tmp_path / "five.jsonl").write_text("5\n")
    (tmp_path / "half.jsonl").write_text('{"prompt": "\\ud800"}\n')
    call(monkeypatch, C if flags.startswith("0.9") else E, flags.replace("DIR", str(tmp_path)).replace("TINY", str(ROOT / "tiny")), fails=where)


def test_a_model_without_exits_is_evaluated_too(tmp_path, monkeypatch):
    model = random_model(n_layers=2, vocab_size=512)
    (tmp_path / "m").mkdir()
    save_meta(tmp_path / "m", model, D.Tokenizer.load(ROOT / "tiny"), {})
    call(monkeypatch, E, f"--ckpt {tmp_path / 'm'} --data {ROOT / 'tiny' / 'test.jsonl.gz'} --limit 3 --max-new-tokens 5 --threshold --out {tmp_path / 'r.jsonl'}")
    rows = report(tmp_path / "r.jsonl", monkeypatch)["sets"]["test.jsonl"]["rows"]
    assert set(rows) == {"full depth", "oracle"} and rows["oracle"]["layers"][0] == 2


def test_answers_of_one_token_tell_nothing_and_claim_nothing(tmp_path, monkeypatch, capsys):
    call(monkeypatch, E, f"--ckpt {ROOT / 'tiny'} --limit 2 --max-new-tokens 1 --threshold 0.9 --out {tmp_path / 'r.jsonl'}")
    assert capsys.readouterr().out.count("nan% of layers saved,   nan% agreement") == 6
    call(monkeypatch, P, str(tmp_path / "r.jsonl"), fails="no answers of two tokens")


def call(monkeypatch, module, command, fails=None):
    """Run a script's main() with a command line."""
    monkeypatch.setattr("sys.argv", ["x.py", *command.split()])
    if fails:
        with pytest.raises(InputError, match=fails):
            module.main()
    else:
        module.main()


def report(path, monkeypatch):
    """The figures that docs/report.py makes of eval.py's answers."""
    call(monkeypatch, R, str(path))
    return json.loads(path.with_suffix(".json").read_text(), parse_constant=pytest.fail)             # no NaN


def evaluate(folder, monkeypatch, capsys):
    """eval.py on a few embedded questions: its lines, figures and output."""
    call(monkeypatch, E, " ".join(["--ckpt", str(ROOT / "tiny"), "--limit", "6", "--threshold", "0.9", "--out", str(folder / "r.jsonl")]))
    lines, out = [], capsys.readouterr().out
    for s in (folder / "r.jsonl").read_text().splitlines():
        with suppress(ValueError):                                                                   # one may be broken
            lines.append(json.loads(s))
    figures = report(folder / "r.jsonl", monkeypatch)
    row = figures["sets"]["embedded"]["rows"]["threshold 0.9"]                   # eval.py's own words are the report's
    said = f"{row['layers saved %'][0]:.1f}% of layers saved, {row['agreement %'][0]:5.1f}% agreement, {row['tokens/s'][0]:5.0f} tokens/s"
    assert f"threshold 0.9:  {said}" in out and out.count("\n") == 7
    return lines, figures, capsys.readouterr().out


def without_time(lines):
    return [{name: {k: v for k, v in run.items() if k != "seconds"} for name, run in x["runs"].items()} for x in sorted(
        (x for x in lines if "runs" in x), key=lambda x: x["i"])]


def test_an_interrupted_evaluation_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    (tmp_path / "a").mkdir()
    whole, figures, out = evaluate(tmp_path / "a", monkeypatch, capsys)
    assert "teacher-forced" in out and "first 2 layers" in out and "oracle" in out and "exit 4" in out
    assert [x["i"] for x in whole[1:]] == list(range(7)) and figures["settings"]["threshold"] == [[0.9]]
    assert set(figures["sets"]["embedded"]["rows"]) == {"full depth", "threshold 0.9", "first 2 layers", "first 4 layers", "first 6 layers", "oracle"}
    text, asked = (tmp_path / "a" / "r.jsonl").read_text(), []
    (tmp_path / "r.jsonl").write_text(text[:text.index('{"i": 3') + 50])         # killed in the middle of a write
    original = E.compare
    monkeypatch.setattr(E, "compare", lambda *a: asked.append(a) or original(*a))
    lines, again, _ = evaluate(tmp_path, monkeypatch, capsys)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "r.jsonl").write_text(text[:40])   # and in the middle of the first one, of the header
    assert without_time(evaluate(tmp_path / "b", monkeypatch, capsys)[0]) == without_time(whole)
    asked = asked[:-6]
    assert len(asked) == 3 and without_time(lines) == without_time(whole)
    assert again["sets"]["embedded"]["rows"]["oracle"]["layers"] == figures["sets"]["embedded"]["rows"]["oracle"]["layers"]
    call(monkeypatch, E, f"--ckpt {ROOT / 'tiny'} --limit 6 --threshold 0.8 --out {tmp_path / 'r.jsonl'}", fails="another run")


def test_a_run_is_another_if_anything_that_made_it_differs(tmp_path, monkeypatch, checkpoint):
    folder, modules = shutil.copytree(checkpoint, tmp_path / "model"), [shutil.copyfile(ROOT / f"{m}.py", tmp_path / f"{m}.py") for m in ("data", "eval", "generate", "model")]
    monkeypatch.setattr(E, "__file__", str(tmp_path / "eval.py"))

    def ask(model=random_model(), work=("a",), rules=1, **flags):
        return json.dumps(E.identity(SimpleNamespace(**dict(ckpt=folder, limit=5, out="x") | flags), model, work, rules))

    seen = [ask(), ask(work=("b",)), ask(rules=2), ask(limit=6), ask(random_model().bfloat16()), ask(random_model().to("meta"))]
    (folder / "notes.txt").write_text("of the user's")
    assert ask() == seen[0] == ask(out="y")
    for path in modules:
        with open(path, "a") as f:
            f.write("# changed\n")
        seen.append(ask())
    for name in ("consolidated.00.pth", "lite.json", "params.json", "tokenizer.model"):
        os.utime(folder / name, (1, 1))                  # as if written anew
        seen.append(ask())
    assert len(set(seen)) == 14


def test_what_is_no_file_of_answers_is_left_alone(tmp_path):
    for text in ("hello", '{"i": 0}', '{"settings": {}}\n{"step": 1}', '{"settings": {}}\n[1]'):
        (tmp_path / "a.jsonl").write_text(text)
        with pytest.raises(InputError, match="expected one run's answers"):
            E.collect(tmp_path / "a.jsonl", {"settings": {}}, lambda i: {}, [0])
        assert (tmp_path / "a.jsonl").read_text() == text


def test_a_report_overwrites_no_file_of_another_kind(tmp_path, monkeypatch, capsys):
    evaluate(tmp_path, monkeypatch, capsys)
    (tmp_path / "r.json").write_text('[{"instruction": "a", "output": "b"}]')
    call(monkeypatch, R, str(tmp_path / "r.jsonl"), fails="would be overwritten")
    assert (tmp_path / "r.json").read_text() == '[{"instruction": "a", "output": "b"}]'
    (tmp_path / "no.jsonl").write_text("")
    call(monkeypatch, R, str(tmp_path / "no.jsonl"), fails="found no answers")


def test_two_processes_share_the_prompts(tmp_path, monkeypatch, capsys):
    lines, _, _ = evaluate(tmp_path, monkeypatch, capsys)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(ROOT / "eval.py"), "--ckpt", str(ROOT / "tiny"),
               "--limit", "6", "--threshold", "0.9", "--out", str(tmp_path / "two.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "python docs/report.py" in done.stdout, done.stderr
    both = [json.loads(s) for s in (tmp_path / "two.jsonl").read_text().splitlines() if s]
    assert sorted(x["i"] for x in both if "i" in x) == list(range(7))
    for one, two in zip(without_time(lines), without_time(both)):
        assert one.keys() == two.keys() and all(one[k]["exits"] == two[k]["exits"] and one[k]["text"] == two[k]["text"] for k in one)


def test_the_process_that_is_done_last_tells(tmp_path, monkeypatch, capsys):
    told = []
    for rank in "01":
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", rank)
        call(monkeypatch, E, f"--ckpt {ROOT / 'tiny'} --limit 2 --threshold 0.9 --max-new-tokens 4 --out {tmp_path / 'r.jsonl'}")
        told.append(capsys.readouterr().out.count("agreement"))
    assert told == [0, 6]


def test_the_last_line_holds_the_losses_on_all_references(tmp_path, monkeypatch):
    call(monkeypatch, E, f"--ckpt {ROOT / 'tiny'} --limit 2 --threshold 0.9 --max-new-tokens 4 --out {tmp_path / 'r.jsonl'}")
    rows = D.tokenize(Q.embedded(2, split="test"), D.Tokenizer.load(ROOT / "tiny"), 256)
    want = [[n, *x] for n, *x in zip((2, 4, 6, 8), *E.exit_losses(load_meta(ROOT / "tiny", torch.float32), rows, [2, 4, 6], 8))]
    for got, x in zip(E.read_answers(tmp_path / "r.jsonl")[1][2]["teacher_forced"], want, strict=True):
        assert got == pytest.approx(x, rel=1e-4)


def test_answers_of_a_training_run_bear_its_name(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "tiny", tmp_path / "mine/step-3")
    (tmp_path / "mine/latest").symlink_to("step-3")
    monkeypatch.chdir(tmp_path)
    call(monkeypatch, E, "--ckpt mine --limit 1 --threshold --max-new-tokens 2")
    assert [p.name.split("-")[0] for p in (tmp_path / "results").iterdir()] == ["mine"]


def test_prompts_that_fill_the_context_are_left_out_aloud(tmp_path, monkeypatch, capsys):
    tokenizer, exact = D.Tokenizer.load(ROOT / "tiny"), {}
    for n in range(256):                                 # of exactly as many tokens, BOS included
        example = dict(instruction=" ".join(["hen"] * n), input="", output="hen")
        exact[len(tokenizer.encode(D.prompt_text(example), bos=True))] = example
    out, files = tmp_path / "r.jsonl", [tmp_path / "two.json", tmp_path / "one.json"]
    files[0].write_text(json.dumps([exact[256], exact[255]]))
    files[1].write_text(json.dumps([exact[256]]))
    call(monkeypatch, E, f"--ckpt {ROOT / 'tiny'} --data {files[0]} --threshold 0.9 --out {out}")
    assert "1 prompts fill the context of 256 tokens: left out" in capsys.readouterr().err
    header, lines = E.read_answers(out)
    assert header["prompts"] == 1 and lines[0]["prompt"] == D.prompt_text(exact[255])
    call(monkeypatch, E, f"--ckpt {ROOT / 'tiny'} --data {files[1]} --out {tmp_path / 'no.jsonl'}", fails="all 1 prompts fill the context")


def test_thresholds_without_a_word_of_what_they_were_chosen_for_are_judged(tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(ROOT / "tiny", tmp_path / "tiny")
    (folder / "lite.json").write_text(json.dumps(read_lite(folder) | dict(thresholds={"2": 0.9, "4": 0.9, "6": 0.9})))       # by hand, say
    call(monkeypatch, E, f"--ckpt {folder} --limit 2 --threshold --out {tmp_path / 'r.jsonl'}")
    assert "lite.json: " in capsys.readouterr().out


def test_the_test_sets_by_set_and_category(tmp_path, monkeypatch, capsys):
    (tmp_path / "s.v.jsonl").write_text('{"text": "Sort d a.", "category": "generic"}\n{"text": "Say hen.", "category": "other"}')
    (tmp_path / "s.w.jsonl").write_text('{"idx": 1, "Skill": "Math", "Difficulty": 3, "Instruction": "Say 3."}')
    call(monkeypatch, E, f"--ckpt {ROOT / 'tiny'} --data {tmp_path / 's.v.jsonl'} {tmp_path / 's.w.jsonl'} --threshold 0.8 --max-new-tokens 8 "
         f"--out {tmp_path / 'r.jsonl'}")
    result, out = report(tmp_path / "r.jsonl", monkeypatch), capsys.readouterr().out
    assert set(result["sets"]) == {"s.v", "s.w", "all sets"} and set(result["sets"]["s.w"]["groups"]) == {"Math", "level 3"}
    assert result["teacher_forced"] == [] and result["sets"]["s.v"]["rows"]["threshold 0.8"]["exact match %"] == [None] * 3
    assert "agreement % in s.v" in out and "exact match % in" not in out
    (tmp_path / "x").mkdir()                             # a namesake is another set
    shutil.copy(tmp_path / "s.w.jsonl", tmp_path / "x/s.v.jsonl")
    call(monkeypatch, E, f"--ckpt {ROOT / 'tiny'} --data {tmp_path / 's.v.jsonl'} {tmp_path / 'x/s.v.jsonl'} --threshold --max-new-tokens 8 --out {tmp_path / 'q.jsonl'}")
    assert set(report(tmp_path / "q.jsonl", monkeypatch)["sets"]) == {f"{tmp_path / 's.v.jsonl'}", f"{tmp_path / 'x/s.v.jsonl'}", "all sets"}


@pytest.mark.parametrize("text, where", [('{"text": "a", "category": "b"}\n{"text": 3}', "line 2"), ("\n", "empty"), ('{"q": 1}', "line 1"), ('[{"x"', "line 1")])
def test_what_cannot_be_read_is_named_and_nothing_written(tmp_path, monkeypatch, text, where):
    (tmp_path / "v.jsonl").write_text(text)
    monkeypatch.chdir(tmp_path)
    call(monkeypatch, E, f"--ckpt {ROOT / 'tiny'} --data {tmp_path / 'v.jsonl'}", fails=where)
    assert [p.name for p in tmp_path.iterdir()] == ["v.jsonl"]


def test_one_threshold_saves_three_fifths_of_the_layers_for_a_point(tiny):
    model, tokenizer, lite = tiny
    how = dict(max_new_tokens=40, eos=tokenizer.eos, frequent=lite["shortlist"])
    settings = {R.FULL: (8, {}), "x": (8, dict.fromkeys([2, 4, 6], 0.9))}
    lines = [E.compare(model, tokenizer, "embedded", e, tokenizer.encode(D.prompt_text(e), bos=True), settings, [2, 4, 6], how)
             for e in Q.embedded(250, split="test")]
    result = R.report(lines, [2, 4, 6])["embedded"]
    row = result["rows"]["x"]
    gap, _, high = row["exact - full depth's"]           # of 250 questions: a point is within the interval, three are not the estimate
    assert row["layers saved %"][0] >= 60 and high >= -1 and gap >= -3 and row["agreement %"][0] >= 99
    assert result["rows"]["oracle"]["layers saved %"][0] >= row["layers saved %"][0] - 1
    groups = {g: part["rows"]["x"]["layers"][0] for g, part in result["groups"].items()}
    assert groups["reverse 3"] < groups["reverse 6"] and groups["sort 3"] < groups["jump 4"]       # harder: deeper


def test_the_pictures_are_drawn(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="docs/plots.py needs matplotlib, a development extra")
    from docs import plots
    evaluate(tmp_path, monkeypatch, capsys)
    monkeypatch.setattr("sys.argv", ["plots.py", str(tmp_path / "r.json"), "--plain", str(tmp_path / "r.json"), "--out", str(tmp_path / "x")])
    plots.main()
    names = [f"x-{name}.svg" for name in ("cost", "curve", "exits", "loss")]
    assert sorted(p.name for p in tmp_path.glob("*.svg")) == names
    first = (tmp_path / "x-loss.svg").read_text()
    plots.main()
    assert (tmp_path / "x-loss.svg").read_text() == first and "without" in first and "layer" in first


def test_a_projection_is_the_arithmetic_it_says():
    """7B's, by hand: the same share of depth, to the nearest layer; layers alone, and bytes with six checks where nothing left."""
    lines = lambda n: [{"runs": {"rule": {"exits": [n] * 3}}}]  # noqa: E731
    layer, head, prompt = 4 * 4096 ** 2 + 3 * 4096 * 11008, 32000 * 4096, [[1] * 10]
    for n, L, kept in ((8, 32, 8), (2, 8, 8), (7, 30, 7), (24, 30, 26)):
        assert P.project(P.SHAPES["7B"], lines(n), "rule", prompt, [n], L)["layers"] == 1 - kept / 32
    assert P.project(P.SHAPES["13B"], lines(2), "rule", prompt, [2], 8)["layers"] == 0.75
    never = P.project(P.SHAPES["7B"], lines(30), "rule", prompt, [8, 12, 16, 20, 24, 28], 30)
    asked = 6 * 4096 * sum(2048 + 11 + i for i in range(3))          # the first checked follows a first new token
    assert never["layers"] == 0 and never["bytes"] == pytest.approx(-asked / (3 * (32 * layer + head)))
