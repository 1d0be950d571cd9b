"""generate.py: early exit against its definition, the naive eager-copy loop of reference.py. Traps as tests."""
import collections
import json
import math

import numpy as np
import pytest
import torch

import generate as G
from conftest import random_model
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
    assert (tokens, exits) == Llama.of(model).early_exit(PROMPT, 50, rule)
    counts = collections.Counter(exits[1:])
    assert len(counts) > 1 and counts[6] > 3                          # tokens leave early, and skipped layers are revisited


def test_deferred_copying_equals_eager_in_fp32_too(model):
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


def account(model, rule, n, poison=float("nan")):
    """Decode by hand with decode_one in a poisoned cache; check the books after every token. Returns cache and depths."""
    P = len(PROMPT)
    cache = model.new_cache(1, P + n).fill_(poison)
    left = torch.full((1, P + n, model.args.dim), poison, dtype=cache.dtype)
    with torch.no_grad():
        *_, h = model.states(torch.tensor([PROMPT]), cache=cache)
        logits, debt_from, depths = model.logits(h[0, -1]), [P] * 6, []
        for pos in range(P, P + n):
            assert logits.isfinite().all()
            logits, depth = G.decode_one(model, logits.argmax().item(), pos, cache, left, debt_from, rule)
            depths.append(depth)
            for i in range(6):                           # visited layers owe nothing, skipped ones exactly what they skipped
                assert debt_from[i] == pos + 1 if i < depth else debt_from[i] <= pos
                assert not cache[i, ..., :debt_from[i], :].isnan().any() and cache[i, ..., debt_from[i]:, :].isnan().all()
    return cache, left, depths


def test_no_hole_is_ever_read_and_the_debts_add_up(model):
    for rule in RULES:
        depths = account(model, rule, 40)[2]
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
        original = block.attention.keys_values
        monkeypatch.setattr(block.attention, "keys_values",
                            lambda x, pos, kv=None, i=i, original=original: rows.update({i: x.size(1)}) or original(x, pos, kv))
    run(model, 20, {2: 0.0})
    assert dict(rows) == {0: 6 + 19, 1: 6 + 19, 2: 6, 3: 6, 4: 6, 5: 6}     # above exit 2: the prompt and nothing else


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


def test_sampling_draws_from_the_exits_own_tempered_distribution(model):
    draws = collections.Counter(run(model, 2, {2: 0.0}, temperature=1.5, rng=torch.Generator().manual_seed(s))[0][1]
                                for s in range(30))
    assert len(draws) > 3
    same = [run(model, 10, RULES[0], temperature=0.8, top_p=0.9, rng=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert same[0] == same[1]
    # confidence ignores the temperature: a token's depth depends on the tokens before it alone
    tokens, exits = run(model, 25, RULES[0], temperature=5.0, rng=torch.Generator().manual_seed(1))
    thresholds, reference = RULES[0], Llama.of(model)
    for pos, t in enumerate(PROMPT):
        reference.states(t, pos)
    for i, token in enumerate(tokens[:-1]):
        pos, h = len(PROMPT) + i, reference.w["tok_embeddings.weight"][token]
        for layer in range(6):
            h = reference.layer(layer, pos, h)
            x = reference.head(h)
            if layer + 1 in thresholds and 1 / np.exp(x - x.max()).sum() > thresholds[layer + 1]:
                break
        assert exits[i + 1] == layer + 1
        for skipped in range(layer + 1, 6):
            reference.write_kv(skipped, pos, h)


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.8), (2.0, 0.3)])
def test_sampled_frequencies_are_the_nucleus(temperature, top_p):
    logits, n = torch.tensor([2.0, 1.0, 0.5, 0.0, -3.0]), 20000
    probs = [math.exp(x / temperature) for x in logits.tolist()]
    kept, mass = [], 0.0
    for p in probs:                                      # the logits are in falling order already
        if mass < top_p:
            kept.append(p / sum(probs))
        mass += p / sum(probs)
    rng = torch.Generator().manual_seed(0)
    counts = collections.Counter(G.sample(logits, temperature, top_p, rng) for _ in range(n))
    assert set(counts) <= set(range(len(kept)))
    for i, p in enumerate(kept):
        p /= sum(kept)
        assert abs(counts[i] / n - p) < 5 * math.sqrt(p * (1 - p) / n) + 1e-9


def test_exit_rules():
    lite = dict(exits=[2, 4], thresholds={"2": 0.9, "4": 0.7})
    assert G.exit_rule(None, None, {}, 8) == {} and G.exit_rule([0.8], None, {}, 8) == {2: 0.8, 4: 0.8, 6: 0.8}
    assert G.exit_rule(None, None, lite, 8) == {2: 0.9, 4: 0.7} and G.exit_rule([1], None, lite, 8) == {2: 1, 4: 1}
    assert G.exit_rule([0.5, 0.6], [4, 6], lite, 8) == {4: 0.5, 6: 0.6}
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


def test_piped_text_is_plain_and_whole(checkpoint, tokenizer, monkeypatch, capsys):
    args = ("--ckpt", checkpoint, "--threshold", "0.3", "--max-new-tokens", 30, "Sort b a.")
    text = json.loads(command(monkeypatch, capsys, *args, "--json").out)["text"]
    out = command(monkeypatch, capsys, *args)
    assert "\x1b" not in out.out + out.err
    assert out.out == f"\n> Sort b a.\n{text.lstrip()}\n" or text.endswith("\ufffd")
    assert "layers on average" in out.err


def test_tints_differ_by_exit_and_spare_full_depth(tokenizer):
    painter = G.Painter(tokenizer, 8, colour=True)
    tints = [painter.tint("x", n) for n in (2, 4, 6, 8)]
    assert len(set(tints)) == 4 and tints[3] == "x" and all("x" in t for t in tints)


def test_a_prompt_that_fills_the_context_is_refused_and_answers_stop_at_its_end(checkpoint, monkeypatch, capsys):
    with pytest.raises(InputError, match="shorten it"):
        command(monkeypatch, capsys, "--ckpt", checkpoint, "--raw", "bed box " * 40)
    assert capsys.readouterr().out == ""                 # refused before anything is shown
    out = command(monkeypatch, capsys, "--ckpt", checkpoint, "--raw", "bed box", "--max-new-tokens", 500, "--json")
    found = json.loads(out.out)
    assert len(found["prompt_tokens"]) + len(found["tokens"]) == 64 or found["tokens"][-1] == 2


def test_a_real_model_leaves_as_the_eager_loop_says(real):
    """At three thresholds, on a tuned real model: tokens and exits equal the naive loop's; at least three exits fire."""
    from data import Tokenizer, prompt_text
    from model import find_checkpoint, read_lite
    model = load_meta(real, torch.float32)
    exits = read_lite(find_checkpoint(real)).get("exits")
    if not exits:
        pytest.skip("LITE_REAL_CKPT was not tuned with LITE: its exits are never sure")
    tokenizer, seen = Tokenizer.load(find_checkpoint(real)), collections.Counter()
    prompt = tokenizer.encode(prompt_text(dict(instruction="Name three colours.", input="")), bos=True)
    for threshold in (0.2, 0.4, 0.6):
        rule = {n: threshold for n in exits}
        tokens, depths = run(model, 24, rule, prompt=prompt)
        assert (tokens, depths) == Llama.of(model).early_exit(prompt, 24, rule)
        seen.update(depths[1:])
    assert len(seen - collections.Counter({model.args.n_layers: 10 ** 9})) >= 3 and seen[model.args.n_layers] > 0, seen
