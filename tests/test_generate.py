"""generate.py: early exit against its definition, the naive eager-copy loop of reference.py. Traps as tests."""
import collections
import itertools
import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import generate as G
from bench import Eager
from conftest import random_model
from data import TINY_FOLDER, embedded, prompt_text
from model import InputError, load_meta
from reference import Llama

PROMPT = [1, 40, 7, 7, 63, 25]
# In a random model the confidences at exits 2 and 4 lie around these; see the share of exits the test asks for.
RULES = [{2: 0.35, 4: 0.3}, {2: 0.6, 4: 0.4}, {2: 0.2}, {1: 0.5, 2: 0.5, 3: 0.4, 4: 0.4, 5: 0.3}]


def run(model, n, thresholds=None, prompt=PROMPT, **more):
    pairs = list(G.generate(model, prompt, n, thresholds, **more))
    return [t for t, _ in pairs], [d for _, d in pairs]


@pytest.fixture(scope="module")
def model():
    return random_model(dtype=torch.float64)


def test_no_exits_is_plain_greedy_llama(model):
    tokens, exits = run(model, 20)
    for i in range(20):
        assert tokens[i] == model(torch.tensor([PROMPT + tokens[:i]]))[0, -1].argmax().item()
    assert exits == [6] * 20


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_deferred_copying_equals_the_eager_definition(model, rule):
    tokens, exits = run(model, 50, rule)
    assert (tokens, exits) == Llama.of(model).early_exit(PROMPT, 50, rule) == run(model, 50, rule, decoder=Eager)
    counts = collections.Counter(exits[1:])
    assert len(counts) > 1 and counts[6] > 3                          # tokens leave early, and skipped layers are revisited


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_recomputed_each_token_is_what_an_uncached_pass_of_all_layers_makes_it(model, rule):
    """K and V are exact: the first exit of the uncached pass that is sure enough chooses, at its depth."""
    tokens, exits = run(model, 50, rule, recompute=True)
    assert (tokens, exits) != run(model, 50, rule)                    # copies would have made another text
    with torch.no_grad():
        for i in range(1, 50):
            states = list(model.states(torch.tensor([PROMPT + tokens[:i]]), sorted(rule)))
            said = [(n, model.logits(h[0, -1]).softmax(-1)) for n, h in zip([*sorted(rule), 6], states)]
            depth, p = next((n, p) for n, p in said if n == 6 or p.max() > rule[n])
            assert (tokens[i], exits[i]) == (p.argmax(), depth)
    counts = collections.Counter(exits[1:])
    assert len(counts) > 1 and counts[6] > 3                          # tokens leave early, and skipped layers are revisited


def test_recomputing_equals_running_on_at_once(model):
    class RunOn(G.Decoder):
        def exit_early(self, token, pos):
            h, n, _, logits = self.climb(token, pos, self.thresholds)
            token = self.choose(h, logits)
            for block, kv in zip(self.model.layers[n:], self.cache[n:]):
                h = block(h, pos, kv)
            return [(token, n)]

    for rule in RULES:
        assert run(model, 50, rule, recompute=True) == run(model, 50, rule, decoder=RunOn)


def test_deferred_copying_equals_eager_in_fp32_too():
    small = random_model()
    for rule in RULES:
        assert run(small, 50, rule) == Llama.of(small).early_exit(PROMPT, 50, rule)


def test_threshold_above_every_confidence_is_full_depth_bit_for_bit(model):
    full, _ = run(model, 20)
    assert run(model, 20, {2: 1.0, 4: 1.0}) == (full, [6] * 20)
    assert run(model, 20, {2: 0.999999999999}) == (full, [6] * 20)    # asked at every token, never sure enough


def test_threshold_zero_leaves_at_the_first_exit_and_the_first_token_never_leaves_early(model):
    assert run(model, 20, {2: 0.0, 4: 0.0})[1] == [6] + [2] * 19


def test_the_comparison_is_strict():
    """A head of zeros: every confidence is exactly 1/V, and only a threshold below it lets a token go."""
    model = random_model(vocab_size=64)
    torch.nn.init.zeros_(model.output.weight)
    assert G.confidence(torch.zeros(64)) == 1 / 64
    assert run(model, 3, {2: 1 / 64})[1] == [6, 6, 6]
    assert run(model, 3, {2: 1 / 64 - 1e-6})[1] == [6, 2, 2]


def test_confidence_is_the_largest_softmax_probability():
    for scale in (0.1, 1, 30, 300):
        logits = torch.randn(1000) * scale
        assert G.confidence(logits) == pytest.approx(logits.double().softmax(-1).max().item(), rel=1e-5)
        assert G.confidence(logits) <= 1
    assert G.confidence(torch.tensor([1e4, 0, 0])) == 1                # saturated: still not above a threshold of 1


def account(model, rule, n, **how):
    """Decode in a poisoned cache; check the books after every token. Returns cache, states left with and depths."""
    decoder = G.Decoder(model, PROMPT, len(PROMPT) + n, rule, **how)
    cache, left, depths = decoder.cache.fill_(math.nan), decoder.left.fill_(math.nan), []
    with torch.no_grad():
        token = decoder.prefill(PROMPT)[0][0]
        for pos in range(len(PROMPT), len(PROMPT) + n):
            (token, depth), = decoder.exit_early(token, pos)
            depths.append(depth)
            assert left[:, pos].isfinite().all()
            for i, from_ in enumerate(decoder.debt_from):            # visited layers owe nothing, skipped ones what they skipped
                assert from_ == pos + 1 if i < depth else from_ <= pos
                assert not cache[i, ..., :from_, :].isnan().any() and cache[i, ..., from_:, :].isnan().all()
    return cache, left, depths


def test_no_hole_is_ever_read_and_the_debts_add_up(model):
    for rule in RULES:
        for recompute in (False, True):
            depths = account(model, rule, 40, recompute=recompute)[2]
            assert min(depths) < 6 and 6 in depths


def test_a_skipped_layer_holds_the_projected_exit_state(model):
    """K and V of layer l come from its own norm, wk and wv; K turned at the token's own position, V not at all."""
    cache, left, depths = account(model, RULES[0], 40)
    reference, checked = Llama.of(model), 0
    last_full = max(i for i, d in enumerate(depths) if d == 6)
    for i, depth in enumerate(depths[:last_full]):
        for layer in range(depth, 6):
            pos = len(PROMPT) + i
            reference.write_kv(layer, pos, left[0, pos].numpy())
            np.testing.assert_allclose(cache[layer, 0, 0, :, pos],
                                       reference.keys[layer][pos], rtol=1e-5, atol=1e-5)   # fp32 tables
            np.testing.assert_allclose(cache[layer, 1, 0, :, pos], reference.values[layer][pos], rtol=1e-9, atol=1e-12)
            checked += 1
    assert checked > 10


def test_a_layer_nobody_visits_again_is_never_paid(model, monkeypatch):
    rows = collections.Counter()
    for i, block in enumerate(model.layers):
        original = block.attention.keep
        monkeypatch.setattr(block.attention, "keep",
                            lambda k, *rest, i=i, original=original: rows.update({i: k.size(1)}) or original(k, *rest))
    for recompute in (False, True):
        rows.clear()
        run(model, 20, {2: 0.0}, recompute=recompute)
        assert dict(rows) == {0: 6 + 19, 1: 6 + 19, 2: 6, 3: 6, 4: 6, 5: 6}         # above exit 2: the prompt and nothing else


def test_the_token_comes_from_the_exits_logits_and_eos_may_too(model):
    rule = {2: 0.0}
    tokens, exits = run(model, 12, rule)
    for i in range(1, 12):                               # exit 2 sees exact K and V below it: two layers, uncached
        *_, h, _ = model.states(torch.tensor([PROMPT + tokens[:i]]), [2])
        assert tokens[i] == model.logits(h[0, -1]).argmax().item()
    eos = tokens[5]
    assert run(model, 12, rule, eos=eos)[0] == tokens[:tokens.index(eos) + 1]
    assert exits[5] == 2


def test_one_new_token_and_a_prompt_of_one(model):
    assert run(model, 1, {2: 0.0}) == run(model, 1) and len(run(model, 1)[0]) == 1
    assert run(model, 9, RULES[0], prompt=[1]) == Llama.of(model).early_exit([1], 9, RULES[0])


def test_an_exit_draws_from_its_own_tempered_distribution(model):
    """1000 draws of one token by exit 2, against its softmax in numpy; and depths ignore the temperature."""
    n, P, first, reference = 1000, len(PROMPT), 7, Llama.of(model)
    for pos, t in enumerate(PROMPT):
        reference.states(t, pos)
    x = reference.head(reference.states(first, P)[1])    # after two layers
    for temperature, top_p in ((1.5, 1), (0.7, 0.6)):
        p = np.exp((x - x.max()) / temperature)
        order, p = np.argsort(-p), p / p.sum()
        p[order[np.cumsum(p[order]) - p[order] >= top_p]] = 0
        p, rng = p / p.sum(), torch.Generator().manual_seed(0)
        decoder = G.Decoder(model, PROMPT, P + 2, {2: 0.0}, temperature=temperature, top_p=top_p, rng=rng)
        with torch.no_grad():
            decoder.prefill(PROMPT)
            drawn = collections.Counter(decoder.exit_early(first, P)[0] for _ in range(n))
        assert {depth for _, depth in drawn} == {2} and len(drawn) > 3 and all(p[t] for t, _ in drawn)
        assert all(abs(drawn[t, 2] / n - p[t]) < 4 * (p[t] * (1 - p[t]) / n) ** 0.5 + 2 / n for t in range(96))
    same = [run(model, 10, RULES[0], temperature=0.8, top_p=0.9, rng=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert same[0] == same[1]
    tokens, exits = run(model, 25, RULES[0], temperature=5.0, rng=torch.Generator().manual_seed(1))
    assert Llama.of(model).early_exit(PROMPT, 25, RULES[0], said=tokens) == (tokens, exits)


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.8), (2.0, 0.3)])
def test_the_distribution_is_the_nucleus(temperature, top_p):
    logits = torch.tensor([0.5, 2.0, -3.0, 1.0, 0.0], dtype=torch.float64)
    probs = {i: math.exp(x / temperature) for i, x in enumerate(logits.tolist())}
    total, kept, mass = sum(probs.values()), {}, 0.0
    for i in sorted(probs, key=probs.get, reverse=True):
        if mass < top_p:
            kept[i] = probs[i] / total
        mass += probs[i] / total
    want = [kept.get(i, 0) / sum(kept.values()) for i in probs]
    assert G.distribution(logits, temperature, top_p).tolist() == pytest.approx(want)
    assert G.distribution(logits).tolist() == G.distribution(logits.float(), 1e-40).tolist() == [0, 1, 0, 0, 0]


def test_draws_follow_the_distribution():
    n, probs = 20000, torch.tensor([0.5, 0.3, 0.2, 0.0])
    decoder = G.Decoder(random_model(), [1], 3, {}, temperature=1.0, rng=torch.Generator().manual_seed(0))
    counts = collections.Counter(decoder.draw(probs) for _ in range(n))
    for i, p in enumerate(probs.tolist()):
        assert abs(counts[i] / n - p) <= 5 * math.sqrt(p * (1 - p) / n)


# The shortlist

def test_an_exit_checked_on_a_list_of_all_tokens_is_the_whole_head(model):
    for rule in RULES:
        assert run(model, 50, rule, frequent=list(range(95, -1, -1))) == run(model, 50, rule)


def test_the_shortlist_holds_each_token_once_and_grows_with_the_context(model):
    short = G.Shortlist(model, [5, 9, 5], 4)
    short.add(iter([9, 7, 7, 5]))
    assert short.ids[:3].tolist() == [5, 9, 7]
    assert torch.equal(short.rows, model.output.weight[[5, 9, 7]])
    spread = short.spread(torch.tensor([-3.0, -1.0, -2.0]))          # below 0, and yet nobody else is likelier, or to be drawn
    assert {i: x for i, x in enumerate(spread.tolist()) if x > -math.inf} == {5: -3, 9: -1, 7: -2} and len(spread) == 96
    short.add(range(4))
    assert short.rows.shape == (7, 48)                   # as many as the frequent ones and the room for a context, no more
    full = G.Shortlist(model, [], 4)
    full.add([1, 2])
    assert full.rows is None and torch.equal(full.spread(torch.arange(96.0)), torch.arange(96.0))


def test_an_early_token_is_the_best_of_the_list_and_a_late_one_the_best_of_all(model):
    frequent, rule = list(range(20)), {2: 0.3}
    tokens, exits = run(model, 40, rule, frequent=frequent)
    assert {2, 6} == set(exits)
    assert (tokens, exits) == Llama.of(model).early_exit(PROMPT, 40, rule, frequent=frequent)
    assert any(t not in set(frequent) | set(PROMPT) for t, depth in zip(tokens, exits) if depth == 6)


def test_an_exiting_token_pays_no_head_and_a_check_only_the_list():
    read = collections.Counter()

    class Meter(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, f, types, args=(), kwargs=None):
            if f is torch.nn.functional.linear:
                read[tuple(args[1].shape)] += 1
            return f(*args, **(kwargs or {}))

    for fused, products in ((False, 7), (True, 4)):
        other = random_model(dtype=torch.float64)
        if fused:
            other.fuse()
        steps = G.generate(other, PROMPT, 11, {1: 1.0, 2: 0.0}, frequent=range(20))         # 1 never leaves, and is not asked
        next(steps)
        read.clear()
        with Meter():
            list(steps)
        heads = {shape: n for shape, n in read.items() if shape[0] in range(20, 20 + 6 + 12)}
        assert (96, 48) not in read and sum(heads.values()) == 10
        assert sum(read.values()) == 10 * (1 + 2 * products)         # a check and two layers for each token, nothing else


def test_the_first_token_is_prefill_and_each_later_one_decoding(model, monkeypatch):
    monkeypatch.setattr(G.time, "perf_counter", itertools.count().__next__)      # a second between two looks
    a = G.answer(model, PROMPT, 5, {2: 0.3})
    assert (len(a.tokens), a.prefill, a.decode) == (5, 1, 4)


def test_an_exit_without_a_stored_threshold_never_lets_go():
    assert G.exit_rule(None, [2, 4], dict(thresholds={"2": 0.5, "6": 0.25}), 8) == {2: 0.5, 4: 1.0}
    assert G.exit_rule(None, None, dict(thresholds={"2": 0.5, "6": 0.25}), 8) == {2: 0.5, 6: 0.25}


# Lossless decoding

@pytest.fixture(scope="module")
def tiny():
    """The committed model: its exits are good, so that drafts are kept."""
    return load_meta(TINY_FOLDER, torch.float64)


def questions(tokenizer, n):
    return [tokenizer.encode(prompt_text(e), bos=True) for e in embedded(n, split="test")]


@pytest.mark.parametrize("draft", [1, 4])
def test_verified_greedy_output_is_full_depths_for_any_exits_and_thresholds(model, tiny, tokenizer, draft):
    for m, prompt in ((model, PROMPT), (model, [1]), (tiny, questions(tokenizer, 1)[0])):
        full, L = run(m, 30, prompt=prompt)[0], len(m.layers)
        for rule, frequent in zip([*RULES, {2: 0.0}, {5: 0.0}, {1: 0.0, 3: 0.0}], [[], range(30)] * 4):
            drafts = []
            tokens, exits = run(m, 30, rule, prompt=prompt, frequent=frequent, verify=True, draft=draft, drafts=drafts)
            kept = sum(n < L for n in exits)
            assert tokens == full
            assert set(exits) <= {*rule, L} and kept <= sum(drafts) and max(drafts) <= draft
            if rule == {2: 0.0}:
                assert kept > 0 and exits.count(L) > 1               # both happen: drafts are kept, and are rejected


def test_a_draft_climbs_to_its_rounds_exit_however_unsure(model, monkeypatch):
    """Another rule of confidence may say exactly 0. A draft that then ran on would pass the layers above twice."""
    said, (full, _) = itertools.cycle((1.0, 0.0)), run(model, 20)      # a round's first token is sure, its draft is not
    monkeypatch.setattr(G, "confidence", lambda logits: torch.tensor(next(said)))
    assert run(model, 20, {2: 0.5}, verify=True, drafts=(drafts := []))[0] == full
    assert set(drafts[:-1]) == {1}


def test_verifying_with_packed_fp32_matrices_is_full_depth_too(tokenizer, monkeypatch):
    monkeypatch.setattr("model.PACK_FROM", 0)
    model = load_meta(TINY_FOLDER, torch.float32).fuse()
    for prompt in questions(tokenizer, 10):
        assert run(model, 20, {2: 0.3, 4: 0.3}, prompt=prompt, verify=True)[0] == run(model, 20, prompt=prompt)[0]


def test_good_drafts_are_kept_several_at_a_time(tiny, tokenizer):
    for prompt in questions(tokenizer, 5):
        drafts, full = [], run(tiny, 20, prompt=prompt, eos=tokenizer.eos)
        tokens, exits = run(tiny, 20, {2: 0.8}, prompt=prompt, eos=tokenizer.eos, verify=True, draft=8, drafts=drafts)
        assert tokens == full[0] and len(drafts) < len(tokens) - 1 and exits.count(2) >= 2


def test_a_verified_answer_stops_at_eos_and_at_its_length(tiny, tokenizer):
    prompt = questions(tokenizer, 1)[0]
    full, _ = run(tiny, 60, prompt=prompt)
    for n in range(1, 12):
        assert run(tiny, n, {2: 0.0}, prompt=prompt, verify=True)[0] == full[:n]
    for eos in set(full[:8]):
        assert run(tiny, 60, {2: 0.0}, prompt=prompt, verify=True, eos=eos)[0] == full[:full.index(eos) + 1]


@pytest.mark.parametrize("temperature, top_p, frequent", [(1.0, 1.0, []), (1.7, 0.8, []), (1.0, 0.9, [0, 2, 3])])
def test_verified_sampling_keeps_the_last_layers_distribution(temperature, top_p, frequent):
    """2nd to 4th token, jointly, against the product of the last layer's exact conditionals, 5 standard errors."""
    model, n, prompt = random_model(vocab_size=5, dtype=torch.float64, n_layers=3), 2000, [1, 4, 2]

    def joint(ids, depth):
        """{the next `depth` tokens: probability}, every forward uncached."""
        probs = G.distribution(model(torch.tensor([ids]))[0, -1], temperature, top_p).tolist()
        return {(t, *rest): p * q for t, p in enumerate(probs) if p
                for rest, q in (joint([*ids, t], depth - 1).items() if depth > 1 else [((), 1.0)])}

    with torch.no_grad():
        want = joint(prompt, 4)
    marginal, found, drafts, kept = collections.Counter(), collections.Counter(), [], 0
    for tokens, p in want.items():
        marginal[tokens[1:]] += p
    rng = torch.Generator().manual_seed(0)
    for _ in range(n):
        tokens, exits = run(model, 4, {1: 0.0}, prompt=prompt, verify=True, temperature=temperature, top_p=top_p, rng=rng,
                            frequent=frequent, drafts=drafts)
        found[tuple(tokens[1:])] += 1
        kept += exits.count(1)
    assert max(drafts) == 2 and 0.1 < kept / sum(drafts) < 0.95      # several at a time, and some are rejected
    assert sum(marginal.values()) == pytest.approx(1)
    for triple in marginal.keys() | found.keys():
        p = marginal[triple]
        assert abs(found[triple] / n - p) <= 5 * math.sqrt(p * (1 - p) / n) + 1e-12, (triple, found[triple] / n, p)


def test_a_batch_is_refused_in_one_line(model):
    with pytest.raises(InputError, match="expected one prompt"):
        run(model, 3, prompt=[PROMPT, PROMPT])


@pytest.mark.parametrize("thresholds, verify", [({}, False), ({2: 0.3, 4: 0.3}, False), ({2: 0.3, 4: 0.3}, True)])
def test_the_context_is_the_end(model, thresholds, verify):
    """As many tokens as there are positions left, however many were asked for; without one it is refused."""
    room = model.args.max_seq_len - len(PROMPT)
    assert run(model, 10 * room, thresholds, verify=verify) == run(model, room, thresholds, verify=verify) and len(run(model, 10 * room, thresholds)[0]) == room
    with pytest.raises(InputError, match="room in the context"):
        run(model, 3, prompt=[5] * model.args.max_seq_len)


@pytest.mark.parametrize("verify", [False, True])
def test_no_step_copies_or_allocates_the_cache(verify, monkeypatch):
    """The largest tensor that any operation of a step makes does not grow with the context as the cache does."""
    monkeypatch.setattr("model.PACK_FROM", 0)
    model, largest = random_model(max_seq_len=4096).fuse(), []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            own = {x.untyped_storage()._cdata for x in args if isinstance(x, torch.Tensor) and not x.is_mkldnn}
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in own:
                    largest[-1] = max(largest[-1], x.untyped_storage().nbytes())
            return out

    for n in (256, 2048):
        prompt = torch.randint(96, (n,), generator=torch.Generator().manual_seed(1)).tolist()
        drafts = []
        steps = G.generate(model, prompt, 8, {2: 0.1}, verify=verify, draft=2, drafts=drafts)
        next(steps)
        largest.append(0)
        with Sizes():
            list(steps)
        assert not verify or max(drafts) > 0
    layer = 2 * 2 * 8 * 2048 * 4                         # one layer's K and V of 2048 positions, bytes
    assert largest[1] < layer / 8, largest               # --verify's mask has rows x heads per K x positions bytes


def test_exit_rules():
    lite = dict(exits=[2, 4], thresholds={"2": 0.9, "4": 0.7})
    assert G.exit_rule(None, None, {}, 8) == {} and G.exit_rule([0.8], None, {}, 8) == {2: 0.8, 4: 0.8, 6: 0.8}
    assert G.exit_rule(None, None, lite, 8) == {2: 0.9, 4: 0.7} and G.exit_rule([1], None, lite, 8) == {2: 1, 4: 1}
    assert G.exit_rule([0.5, 0.6], [4, 6], lite, 8) == {4: 0.5, 6: 0.6}
    assert [list(G.exit_rule([1], None, {}, n)) for n in (2, 15, 16, 40)] == [[], [2, 4, 6, 8, 10, 12, 14], [8, 12], [8, 12, 16, 20, 24, 28, 32, 36]]
    with pytest.raises(InputError, match="3 numbers for 2 exits"):
        G.exit_rule([0.5] * 3, None, lite, 8)
    for exits in ([0], [8], [2, 2], [-1], [6, 4]):
        with pytest.raises(InputError, match="--exits"):
            G.exit_rule([0.5], exits, {}, 8)


def command(monkeypatch, capsys, *args):
    monkeypatch.setattr("sys.argv", ["generate.py", *map(str, args)])
    G.main()
    return capsys.readouterr()


def test_json_holds_what_generate_yields(checkpoint, tokenizer, monkeypatch, capsys):
    out = command(monkeypatch, capsys, "--ckpt", checkpoint, "--json", "--threshold", "0.3", "--max-new-tokens", 9,
                  "Sort b a.", "--raw", "In order")
    first, raw = [json.loads(line) for line in out.out.splitlines()]
    model = load_meta(checkpoint).eval()
    tokens, exits = run(model, 9, {2: 0.3, 4: 0.3}, prompt=first["prompt_tokens"], eos=tokenizer.eos)
    assert (first["tokens"], first["exits"]) == (tokens, exits)
    assert first["text"] == tokenizer.decode(tokens, first["prompt_tokens"]) and first["seconds"] > 0
    assert raw["prompt_tokens"] == tokenizer.encode("In order", bos=True)
    out = command(monkeypatch, capsys, "--ckpt", checkpoint, "--max-new-tokens", 1, "Sort \udcff", "--raw", "\udcff")       # as bytes come
    assert "> Sort ?\n" in out.out and "> ?\n" in out.out


def test_piped_text_is_plain_and_whole(checkpoint, monkeypatch, capsys):
    args = ("--ckpt", checkpoint, "--threshold", "0.3", "--max-new-tokens", 30, "Sort b a.")
    text = json.loads(command(monkeypatch, capsys, *args, "--json").out)["text"]
    out = command(monkeypatch, capsys, *args)
    assert "\x1b" not in out.out + out.err
    assert out.out == f"\n> Sort b a.\n{text.lstrip()}\n" or text.endswith("\ufffd")
    assert "layers on average" in out.err


def test_recompute_comes_by_flag_or_with_thresholds_that_were_chosen_for_it(tmp_path, monkeypatch, capsys):
    folder, seen, original = shutil.copytree(TINY_FOLDER, tmp_path / "tiny"), [], G.answer
    monkeypatch.setattr(G, "answer", lambda *args, **how: seen.append(how["recompute"]) or original(*args, **how))
    lite = json.loads((folder / "lite.json").read_text()) | dict(thresholds={"2": 0.9}, recompute=True)
    (folder / "lite.json").write_text(json.dumps(lite))
    for flags in ("", "--threshold 0.9", "--threshold 0.9 --recompute"):
        command(monkeypatch, capsys, "--ckpt", str(folder), "--limit", "1", *flags.split())
    command(monkeypatch, capsys, "--ckpt", str(TINY_FOLDER), "--limit", "1")
    assert seen == [True, False, True, False]


def test_verify_draft_seed_and_top_p_reach_decoding_from_their_flags(monkeypatch, capsys):
    """--verify says what full depth says, in as few rounds as --draft allows; draws follow --seed, and the narrowest nucleus is greedy."""
    ask = lambda *flags: command(monkeypatch, capsys, "--ckpt", TINY_FOLDER, "--limit", 4, *flags)  # noqa: E731
    plain, drafted = ask(), [ask("--verify", "--threshold", 0.3, "--draft", n) for n in (1, 4)]
    counts = [[int(n) for n in re.search(r"(\d+) drafted in (\d+) rounds", out.err).groups()] for out in drafted]
    assert all(out.out == plain.out for out in drafted) and "drafted" not in plain.err
    assert "exits (thresholds): full depth" in plain.err and "exits (thresholds): 2 (0.3)  4 (0.3)  6 (0.3)" in drafted[0].err
    assert 0 < counts[0][0] <= counts[0][1] > counts[1][1] and counts[1][0] > counts[1][1]
    hot = [ask("--temperature", 3, "--seed", seed).out for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2] and ask("--temperature", 3, "--seed", 1, "--top-p", 1e-6).out == plain.out != hot[0]
    checked = [ask("--verify", "--threshold", 0.05, "--temperature", 3, "--seed", seed).out for seed in (1, 1, 2)]    # drafts are kept by draws, too
    assert checked[0] == checked[1] != checked[2]


def test_tints_differ_by_exit_and_spare_full_depth_files_and_who_wants_none(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal, file = SimpleNamespace(isatty=lambda: True), SimpleNamespace(isatty=lambda: False)
    tints = [G.tint("x", n, 8, terminal) for n in (2, 4, 6, 8)]
    assert len(set(tints)) == 4 and tints[3] == "x" and all("x" in t for t in tints)
    assert G.tint("x", 2, 8, file) == "x"
    monkeypatch.setenv("NO_COLOR", "1")
    assert G.tint("x", 2, 8, terminal) == "x"


def test_the_summary_counts_tokens_layers_and_speed():
    answers = [SimpleNamespace(exits=[8, 2, 2], drafts=[], prefill=0.5, decode=0.5), SimpleNamespace(exits=[8, 4], drafts=[], prefill=0.25, decode=0.25)]
    assert G.summary(answers, 8) == ("5 tokens, 4.8 of 8 layers on average (2: 40%, 4: 20%, 8: 40%); "
                                     "prefill 0.75 s, decode 4 tokens/s")          # 3 tokens after the first ones, in 0.75 s
    answers[0].drafts = [2, 1]
    assert "3 drafted in 2 rounds, chosen at layer (2: 40%" in G.summary(answers, 8)


def test_checks_choose_among_as_many_frequent_tokens_as_thresholds_were_chosen_for():
    for lite, flag, want in ((dict(shortlist=[9, 5, 7]), None, [9, 5, 7]), (dict(shortlist=[9, 5, 7], check=2), None, [9, 5]), (dict(shortlist=[9, 5, 7], check=0), None, []),
                             (dict(shortlist=[9, 5, 7], check=2), 1, [9]), (dict(shortlist=[9, 5, 7]), 0, []), ({}, None, [])):
        assert G.frequent_tokens(SimpleNamespace(shortlist=flag), lite) == want


def test_the_stream_is_the_text_whatever_bytes_its_tokens_end_in(tokenizer, capsys):
    prompt, tokens = tokenizer.encode("Say hen.", bos=True), tokenizer.encode(" é, 日本 hen") + [tokenizer.eos]
    assert any(tokenizer.decode(tokens[:n], prompt).endswith("\ufffd") for n in range(len(tokens)))         # some are half a character
    for n in range(1, len(tokens) + 1):
        G.stream(tokenizer, 8, SimpleNamespace(prompt=prompt, tokens=tokens[:n], exits=[2] * n))
    assert capsys.readouterr().out == "é, 日本 hen"


def test_a_prompt_that_fills_the_context_is_refused_and_answers_stop_at_its_end(checkpoint, monkeypatch, capsys):
    with pytest.raises(InputError, match="shorten it"):
        command(monkeypatch, capsys, "--ckpt", checkpoint, "Sort b a.", "--raw", "bed box " * 40)
    assert capsys.readouterr().out == ""                 # refused before anything is shown
    out = command(monkeypatch, capsys, "--ckpt", checkpoint, "--raw", "bed box", "--max-new-tokens", 500, "--json")
    found = json.loads(out.out)
    assert len(found["prompt_tokens"]) + len(found["tokens"]) == 64 or found["tokens"][-1] == 2


def test_the_drawing_shows_what_was_computed_copied_and_verified():
    """By hand, for 4 layers."""
    import drawing
    letters = lambda cells: ["".join(name[0] for name in column) for column in cells]  # noqa: E731
    cells = drawing.early([1, 3, 1, 4, 2], 4)
    assert [[name == "computed" for name in column].count(True) for column in cells] == [1, 3, 1, 4, 2]
    assert [column[-1] for column in cells] == ["copied", "copied", "copied", "computed", "never"]
    assert letters(drawing.verified([1, 1, 4, 4, 2, 4], 4)) == ["cvvv", "cvvv", "cvvv", "cccc", "ccvv", "ccvv"]
