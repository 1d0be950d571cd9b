"""eval.py: its numbers against naive counts, and the figures of the committed tiny model."""
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data as D
import eval as E
import generate as G
from conftest import ROOT, random_model
from model import IGNORE, load_meta, read_lite
from reference import Llama
import questions as Q

ARGS = SimpleNamespace(max_new_tokens=40, shortlist=None)


def test_exit_losses_equal_a_naive_count():
    model = random_model(dtype=torch.float64)
    rows = [([1, 5, 9, 33, 2, 71, 4][:n], k) for n, k in ((7, 3), (4, 2), (6, 5))]
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


def test_agreement_is_with_an_exact_pass_over_the_tokens_that_came_out():
    model, prompt = random_model(dtype=torch.float64), [1, 40, 7]
    tokens, exits = Llama.of(model).early_exit(prompt, 30, {2: 0.4, 4: 0.3})
    want = [tokens[i] == Llama.of(model).logits(prompt + tokens[:i])[-1].argmax() for i in range(1, 30)]
    assert E.agrees(model, SimpleNamespace(prompt=prompt, tokens=tokens)) == want and 0 < sum(want) < 29
    full = [t for t, _ in G.generate(model, prompt, 30)]
    assert all(E.agrees(model, SimpleNamespace(prompt=prompt, tokens=full))) and E.agrees(model, SimpleNamespace(prompt=prompt, tokens=full[:1])) == []


def test_first_layers_are_a_model_of_that_depth():
    model, tokens = random_model(), torch.randint(96, (1, 9))
    state, _ = model.states(tokens, [2])
    assert torch.equal(E.first_layers(model, 2)(tokens), model.logits(state))
    assert len(model.layers) == 6 and model(tokens).shape == (1, 9, 96)


def test_rate_is_wilson_for_single_trials_and_wider_for_clusters():
    p, low, high, n = E.rate([1] * 80 + [0] * 20, [1] * 100)
    assert (p, n) == (0.8, 100)
    assert (low, high) == (pytest.approx(0.711, abs=2e-3), pytest.approx(0.867, abs=2e-3))      # Wilson, tabulated
    _, low10, high10, n10 = E.rate([10] * 80 + [0] * 20, [10] * 100)            # the tokens of a prompt go together
    assert n10 == 1000 and (low10, high10) == (pytest.approx(low, abs=1e-9), pytest.approx(high, abs=1e-9))
    p, low, high, n = E.rate([10] * 50, [10] * 50)                               # nothing varies: 50 prompts, not 500 draws
    assert p == high == 1 and low == pytest.approx(50 / (50 + 1.96 ** 2), rel=1e-9)
    assert E.rate([0], [0]) == [None, None, None, 0]


def test_the_interval_has_its_coverage_when_prompts_differ():
    r, inside, runs = random.Random(0), 0, 400
    for _ in range(runs):
        hits, counts = [], []
        for _ in range(60):
            q, c = r.choice((0.6, 0.95, 1.0)), r.randint(3, 30)
            counts.append(c)
            hits.append(sum(r.random() < q for _ in range(c)))
        _, low, high, _ = E.rate(hits, counts)
        inside += low <= (0.6 + 0.95 + 1.0) / 3 <= high
    assert 0.92 <= inside / runs <= 0.98


def test_a_row_of_the_sweep_counts_what_the_records_hold():
    records = [dict(exits=[2, 2, 8], agrees=[True, False, True], exact=True, seconds=1.0),
               dict(exits=[4], agrees=[True], exact=False, seconds=1.0)]
    full = [dict(exits=[8, 8], agrees=[True] * 2, exact=True, seconds=2.0)] * 2
    row = E.summarise(records, full, 8)
    assert row["layers"] == 4 and row["saved"] == 0.5 and row["exits"] == {2: 2, 4: 1, 8: 1}
    assert row["agreement"][0] == 0.75
    assert row["tokens_per_second"] == 2 and row["speedup"] == 2 and row["exact"][0] == 0.5
    assert row["exact_gap"][0] == -0.5


# --- the committed tiny model keeps what the README says of it ---------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    model = load_meta(ROOT / "tiny", torch.float32)
    return model, D.Tokenizer.load(ROOT / "tiny", model.args.vocab_size), read_lite(ROOT / "tiny")


def test_tiny_is_small_and_its_tokenizer_is_the_one_made_here(tiny, tokenizer):
    assert sum(p.stat().st_size for p in (ROOT / "tiny").iterdir()) <= 4e6
    sample = Q.embedded(200, split="test")
    assert all(tiny[1].encode(D.prompt_text(e)) == tokenizer.encode(D.prompt_text(e)) for e in sample)


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


def test_one_threshold_saves_two_fifths_of_the_layers_for_a_point(tiny):
    model, tokenizer, lite = tiny
    result = E.evaluate(model, tokenizer, lite, Q.embedded(250, split="test"),
                        SimpleNamespace(**vars(ARGS), exits=None, threshold=[[0.9]]))
    row = result["sweep"]["0.9"]
    assert row["saved"] >= 0.40 and row["exact_gap"][0] >= -0.01 - row["exact_gap"][1]
    assert row["agreement"][0] >= 0.98
    json.dumps(result)                                   # what --json prints
    groups = {g: cells["0.9"]["layers"] for g, cells in result["groups"].items()}
    assert groups["reverse 3"] < groups["reverse 6"] and groups["sort 3"] < groups["jump 4"]       # harder: deeper


def test_evaluating_prints_its_tables(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["eval.py", "--ckpt", str(ROOT / "tiny"), "--limit", "20", "--threshold", "0.9"])
    E.main()
    out = capsys.readouterr().out
    assert "teacher-forced" in out and "first 2 layers" in out and "reverse" in out
    monkeypatch.setattr("sys.argv", [*__import__("sys").argv, "--json"])
    E.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1], parse_constant=pytest.fail)      # no NaN
    assert set(result["sweep"]) == {"1", "0.9", "first 2 layers", "first 4 layers", "first 6 layers"}


def test_prompts_without_answers_are_measured_by_agreement(tmp_path, monkeypatch, capsys):
    (tmp_path / "v.jsonl").write_text('{"text": "Sort d a.", "category": "generic"}\n{"text": "Say hen.", "category": "other"}')
    monkeypatch.setattr("sys.argv", ["eval.py", "--ckpt", str(ROOT / "tiny"), "--data", str(tmp_path / "v.jsonl"), "--threshold", "0.8",
                                     "--max-new-tokens", "8", "--json"])
    E.main()
    result = json.loads(capsys.readouterr().out)
    assert "teacher_forced" not in result and "exact" not in result["sweep"]["0.8"] and set(result["groups"]) == {"generic", "other"}
