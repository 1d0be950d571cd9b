"""train.py: the same numbers on any number of processes, runs that resume, saves that are whole or absent."""
import collections
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from docs import plan as P
import data
import train as T
import worker
from conftest import ROOT, random_model
from data import batches, embedded, tokenize
from eval import exit_losses
from kill import environ, processes
from model import IGNORE, InputError, Transformer, load_meta
from reference import Llama

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
TINY = ["--steps", "6", "--batch-size", "8", "--micro-batch-size", "8", "--val", "16", "--save-every", "3"]


def torchrun(n, *args):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), *map(str, args)]


def train(*args, n=1, check=True):
    """Run train.py as a user does. n > 1: under torchrun."""
    command = torchrun(n, ROOT / "train.py", *args) if n > 1 else [sys.executable, str(ROOT / "train.py"), *map(str, args)]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, cwd=ROOT)
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture
def refused(monkeypatch, capsys):
    """What train.py, run in this process, says in its one line of error."""
    def call(*args):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
        with pytest.raises(SystemExit) as e:
            data.run(T.main)
        err = capsys.readouterr().err
        assert e.value.code == 2 and err.count("\n") == 1
        return err
    return call


def weights(out):
    """{parameter: {"master": ..., "m": ...}} of a run's newest save, from the parts of all its ranks."""
    parts = [torch.load(p, weights_only=True) for p in sorted((Path(out) / "latest").glob("optimizer.*.pt"))]
    assert sum(map(len, parts)) == len(set().union(*parts))
    return {name: state for part in parts for name, state in part.items()}


def count(path, word):
    return path.read_text().count(word) if path.exists() else 0


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name][k], b[name][k]) for name in a for k in a[name])


# --- one global batch, one result ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_process():
    return {dtype: worker.steps(dtype, 8, 20) for dtype in (torch.float64, torch.float32)}


@pytest.mark.parametrize("micro", [3, 1])
def test_accumulation_changes_nothing(one_process, micro):
    for dtype, loss, weight in ((torch.float64, 1e-12, 1e-9), (torch.float32, 1e-5, None)):
        compare(one_process[dtype], worker.steps(dtype, micro, 20), loss, weight)


def test_two_processes_equal_one_and_each_other(one_process, tmp_path):
    for dtype, micro, loss, weight in (("float64", 8, 1e-12, 1e-9), ("float64", 2, 1e-12, 1e-9), ("float32", 8, 1e-5, None)):
        subprocess.run(torchrun(2, ROOT / "tests/worker.py", tmp_path / "r", dtype, micro, 20), env=ENV, check=True)
        ranks = [torch.load(tmp_path / f"r.{rank}") for rank in (0, 1)]
        assert not set(ranks[0]["owned"]) & set(ranks[1]["owned"])               # sharded, nothing twice
        assert set(ranks[0]["owned"]) | set(ranks[1]["owned"]) == set(ranks[0]["weights"])
        assert [r["places"] for r in ranks] == [1, 1]     # views of the same buckets, in every micro-batch of every step
        for part in ("grads", "weights"):
            assert all(torch.equal(x, ranks[1][part][k]) for k, x in ranks[0][part].items())        # equal on all ranks
        compare(one_process[getattr(torch, dtype)], ranks[0], loss, weight)


def compare(one, other, loss, weight):
    torch.testing.assert_close(one["losses"], other["losses"], rtol=loss, atol=0)
    norm = math.sqrt(sum(g.square().sum().item() for g in one["grads"].values()))
    assert max((g - other["grads"][k]).abs().max().item() for k, g in one["grads"].items()) < max(loss, 1e-12) * norm
    if weight:
        assert max((w - other["weights"][k]).abs().max().item() for k, w in one["weights"].items()) < weight


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_on_copies_attends_to_what_decoding_leaves_in_the_cache(checkpointing):
    """Against the naive decoder, which copies eagerly: a token's states up to the layer that it leaves at, and its loss there."""
    model, tokens, leave = random_model(dtype=torch.float64), [3, 14, 15, 9, 26, 5, 35, 8], [math.inf, 2, 4, math.inf, 2, 2, math.inf, 4]
    model.checkpoint_blocks, naive = checkpointing, Llama.of(model)
    got = [*model.states(torch.tensor([tokens]), (2, 4), leave=torch.tensor([leave]))]
    for pos, (token, depth) in enumerate(zip(tokens, leave)):
        h, depth = naive.w["tok_embeddings.weight"][token], min(depth, naive.L)
        for layer in range(depth):
            h = naive.layer(layer, pos, h)
            if layer + 1 in (2, 4, 6):
                np.testing.assert_allclose(got[layer // 2][0, pos].detach(), h, rtol=1e-4, atol=1e-4)    # rope is fp32
        for layer in range(depth, naive.L):
            naive.write_kv(layer, pos, h)
    exact = [*model.states(torch.tensor([tokens]), (2, 4))]
    assert torch.equal(got[0], exact[0]) and (got[2] - exact[2])[0, 6].abs().max() > 1e-3             # copies are not exact
    labels = torch.tensor([[IGNORE] * 6 + [8, IGNORE]])
    losses = model(torch.tensor([tokens]), labels, (2, 4), torch.tensor([leave]))
    assert losses[2].item() == pytest.approx(-model.logits(got[2][0, 6]).log_softmax(-1)[8].item(), rel=1e-12)


def test_departures_are_of_the_share_of_generated_tokens_and_the_same_on_any_rank():
    rows, args = [(list(range(60)), 20), (list(range(45)), 44), (list(range(50)), 3)] * 40, SimpleNamespace(seed=0, copying=0.4, exits=[2, 4])
    leave = T.departures(rows, range(120), 7, args, "cpu")
    assert leave.shape == (120, 59) and torch.equal(leave[5:9, :49], T.departures(rows, [5, 6, 7, 8], 7, args, "cpu")[:, :49])
    early = leave < math.inf
    early[1::3, 44:], early[2::3, 49:] = False, False                 # pads
    assert not early[0::3, :20].any() and not early[1::3].any() and not early[2::3, :3].any()
    assert early[0::3, 20].any() and early[2::3, 3].any()             # the first generated token may leave
    n = 40 * (39 + 46)                                                # the last token of a row is only predicted
    assert abs(early.sum().item() / n - 0.4) < 4 * math.sqrt(0.24 / n)
    assert ((leave == 2) | (leave == 4))[early].all() and abs((leave == 2).sum().item() / early.sum().item() - 0.5) < 4 * 0.5 / math.sqrt(0.4 * n)
    assert not torch.equal(leave, T.departures(rows, range(120), 8, args, "cpu"))
    args.copying = 0.0
    assert T.departures(rows, range(120), 7, args, "cpu") is None


def test_a_step_trains_on_its_own_departures():
    model, rows, losses = random_model(dtype=torch.float64), worker.rows(), {}
    taught = random_model(1, torch.float64).requires_grad_(False)
    for step, copying, teacher, choices in ((3, 0.0, None, 0.0), (3, 0.5, None, 0.0), (4, 0.5, None, 0.0), (4, 0.5, taught, 0.0), (4, 0.5, None, 0.5)):
        args = SimpleNamespace(exits=[2, 4], weights=[1.0, 1.0, 1.0], micro_batch_size=2, copying=copying, choices=choices, seed=1)
        losses[step, copying, bool(teacher), choices] = T.gradients(model, rows, [5, 9, 30], args, step, teacher=teacher)
        parts = [(T.collate([rows[i] for i in part]), T.departures(rows, part, step, args, "cpu")) for part in ([5, 9], [30])]
        want = sum(model(*labelled, args.exits, leave, teacher, choices).detach() for labelled, leave in parts)
        torch.testing.assert_close(losses[step, copying, bool(teacher), choices] * sum(len(ids) - n for ids, n in (rows[i] for i in (5, 9, 30))), want)
    assert len({x[-1].item() for x in losses.values()}) == 4 and len({x[0].item() for x in losses.values()}) == 3    # exit 2 sees no copy


def test_the_mean_is_over_tokens_not_over_means():
    model, rows = random_model(dtype=torch.float64), worker.rows()
    args = SimpleNamespace(exits=worker.EXITS, weights=[1.0, 1.0, 2.0], micro_batch_size=2, copying=0.0, choices=0.0)
    got = T.gradients(model, rows, [0, 7, 13, 20, 31], args)
    want, count = torch.zeros(3, dtype=torch.float64), 0
    for i in (0, 7, 13, 20, 31):
        ids, n = rows[i]
        for h, j in zip(model.states(torch.tensor([ids]), worker.EXITS), range(3)):
            logp = model.logits(h[0]).log_softmax(-1)
            want[j] -= sum(logp[t - 1, ids[t]].item() for t in range(n, len(ids)))
        count += len(ids) - n
    torch.testing.assert_close(got, want / count, rtol=1e-12, atol=0)
    w = model.layers[1].feed_forward.w2.weight
    grad = w.grad[3, 5].item()
    with torch.no_grad():
        values = []
        for eps in (1e-5, -1e-5):
            w[3, 5] += eps
            losses = sum(model(*T.collate([rows[i]]), worker.EXITS) for i in (0, 7, 13, 20, 31)) / count
            values.append(((losses * torch.tensor([1, 1, 2])).sum() / 4).item())
            w[3, 5] -= eps
    assert grad == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


# --- optimizer and schedule ---------------------------------------------------------------------------------------------


def test_adamw_is_torchs():
    a, b = (random_model(dtype=torch.float64).train() for _ in range(2))
    args = SimpleNamespace(lr=1e-2, head_lr=1.0, weight_decay=0.1)
    mine = T.optimizer_for(a, args)
    theirs = torch.optim.AdamW([dict(params=[p for p in b.parameters() if p.dim() > 1], weight_decay=0.1),
                                dict(params=[p for p in b.parameters() if p.dim() == 1], weight_decay=0.0)], 1e-2, (0.9, 0.95))
    tokens = torch.randint(96, (4, 9))
    for _ in range(5):
        for model, opt in ((a, mine), (b, theirs)):
            opt.zero_grad()
            model(tokens, tokens, [2]).sum().backward()
            opt.step()
    for p, q in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_head_lr_moves_the_output_matrix_faster_and_nothing_else():
    """Against torch's AdamW, given the schedule's rates by hand."""
    a, b = (random_model(dtype=torch.float64).train() for _ in range(2))
    args = SimpleNamespace(exits=[2, 4], weights=[1.0, 1.0, 2.0], copying=0.0, choices=0.0, micro_batch_size=8, weight_decay=0.1, lr=1e-2, head_lr=3.0,
                           warmup=0.5, steps=4, clip=1e9)
    mine, head = T.optimizer_for(a, args), b.output.weight
    kinds = [[head], [p for p in b.parameters() if p.dim() > 1 and p is not head], [p for p in b.parameters() if p.dim() == 1]]
    theirs = torch.optim.AdamW([dict(params=ps, weight_decay=d) for ps, d in zip(kinds, (0.1, 0.1, 0))], 1e-2, (0.9, 0.95))
    for step, lr in enumerate((0.005, 0.01, 0.01, 0.005)):
        T.update(a, mine, worker.rows(), range(8), step, args)
        T.gradients(b, worker.rows(), range(8), args)
        for group, times in zip(theirs.param_groups, (3, 1, 1)):
            group["lr"] = lr * times
        theirs.step()
        theirs.zero_grad()
    for (name, p), q in zip(a.named_parameters(), b.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11, msg=name)


def test_a_large_gradient_is_cut_to_clip_and_one_that_is_not_finite_moves_nothing():
    model, seen = random_model(dtype=torch.float64), []
    args = SimpleNamespace(exits=[2], weights=[1.0, 1.0], copying=0.0, choices=0.0, micro_batch_size=8, weight_decay=0.0, lr=1e-3, head_lr=1.0,
                           warmup=0.5, steps=4, clip=0.5, out="run")
    optimizer = T.optimizer_for(model, args)
    optimizer.register_step_pre_hook(lambda *_: seen.append(math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))))
    _, norm = T.update(model, optimizer, worker.rows(), range(8), 0, args)
    assert norm > 0.6 and seen == [pytest.approx(0.5, rel=1e-5)]
    args.clip = 100 * norm
    _, norm = T.update(model, optimizer, worker.rows(), range(8), 1, args)
    assert seen[1:] == [pytest.approx(norm, rel=1e-9)]
    model.norm.weight.register_hook(lambda grad: grad * math.inf)    # the losses are finite, the gradient is not
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(InputError, match="step 3: loss or gradient is not finite"):
        T.update(model, optimizer, worker.rows(), range(8), 2, args)
    assert len(seen) == 2 and all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for values in ([1.0, math.inf], [math.nan, 1.0], [-math.inf, 1.0]):
        with pytest.raises(InputError, match="step 7: loss"):
            T.check_finite(values, 7, args)


def test_bf16_weights_keep_small_updates_in_their_masters():
    """At lr 2e-5 a bf16 weight of 1 cannot move by itself (half its last bit is 2e-3); its fp32 master does."""
    p, plain = (torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16)) for _ in range(2))
    mine, theirs = T.AdamW([p], lr=2e-5), torch.optim.AdamW([plain], lr=2e-5, weight_decay=0.0)
    for _ in range(300):
        p.grad, plain.grad = torch.ones_like(p), torch.ones_like(plain)
        mine.step()
        theirs.step()
    assert plain.eq(1).all()
    master = mine.state[p]["master"]
    assert master.dtype == torch.float32 and torch.allclose(master, torch.tensor(1 - 300 * 2e-5), atol=1e-5)
    assert torch.equal(p, master.bfloat16()) and p.ne(1).all()


def test_plain_bf16_adamw_loses_most_updates_of_weights_of_usual_size():
    """An Adam step is about lr = 2e-5; half the last bit of a bf16 weight above 2^-7 is more than that."""
    torch.manual_seed(0)
    p, plain = (torch.nn.Parameter(torch.randn(100000).mul(0.02).bfloat16()) for _ in range(2))
    plain.data, start = p.detach().clone(), p.detach().clone()
    p.grad = plain.grad = torch.randn(100000).bfloat16()
    mine = T.AdamW([p], lr=2e-5)
    mine.step()
    torch.optim.AdamW([plain], lr=2e-5, weight_decay=0.0).step()
    assert (plain == start).float().mean() > 0.6
    assert (mine.state[p]["master"] == start).float().mean() < 0.001


def test_bf16_with_masters_trains_the_tiny_model_as_fp32_does(tokenizer):
    rows, val = (tokenize(embedded(n, s), tokenizer, 64) for n, s in ((800, "train"), (200, "test")))
    args = SimpleNamespace(exits=[2, 4, 6], weights=[1.0] * 4, copying=0.0, choices=0.0, micro_batch_size=16, weight_decay=0.1, lr=3e-3, head_lr=1.0, warmup=0.1, steps=50, clip=1.0)
    loss = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = Transformer(replace(T.TINY, vocab_size=tokenizer.size))
        model.init_weights()
        model.to(dtype)
        optimizer = T.optimizer_for(model, args)
        for step, batch in enumerate(batches(rows, 16, 0, 0)):
            T.update(model, optimizer, rows, batch, step, args)
        loss[dtype] = exit_losses(model, val, args.exits, 50)[0]
    assert step == 49 and max(loss[torch.float32]) < 2.5                                    # 6.2 before
    assert loss[torch.bfloat16] == pytest.approx(loss[torch.float32], rel=0.01)


def test_learning_rate_rises_then_follows_a_cosine_to_zero():
    args = SimpleNamespace(lr=2.0, warmup=0.1, steps=100)
    got = [T.learning_rate(s, args) for s in range(100)]
    assert got[:10] == pytest.approx([0.2 * (s + 1) for s in range(10)])
    assert got[10:] == pytest.approx([1 + math.cos(math.pi * (s - 10) / 90) for s in range(10, 100)])


# --- the plan -----------------------------------------------------------------------------------------------------------


def test_the_plan_is_what_two_ranks_allocate(tmp_path):
    for dtype in ("bfloat16", "float32"):
        subprocess.run(torchrun(2, ROOT / "tests/worker.py", tmp_path / "r", dtype, 4, 2), env=ENV, check=True)
        sizes = [torch.load(tmp_path / f"r.{rank}")["size"] for rank in (0, 1)]
        args = SimpleNamespace(dtype=dtype, micro_batch_size=4, batch_size=8, max_len=30, exits=[2, 4], weight_decay=0.0,
                               lr=0.0, head_lr=1.0, copying=0.5, choices=0.0, teacher=None, activation_checkpointing=False)
        parts = {name: n for name, (n, _) in P.plan(random_model().args, args, 2).items()}
        for part in ("weights", "gradients", "optimizer"):
            assert parts[part] == pytest.approx(max(s[part] for s in sizes), rel=0.05), (dtype, part)
        assert sum(s["optimizer"] for s in sizes) < 1.1 * 2 * parts["optimizer"]
        start, end = random_model().state_dict(), torch.load(tmp_path / "r.0")["weights"]          # rank 0's, masters too
        assert max((end[k] - w).abs().max().item() for k, w in start.items()) < 0.1


def test_the_plan_counts_what_copies_take():
    model, tokens, seen = random_model(), torch.zeros(2, 29, dtype=torch.long), []
    for copying in (0.0, 0.5):
        args = SimpleNamespace(dtype="float32", micro_batch_size=2, batch_size=2, max_len=30, exits=[], weight_decay=0.0, lr=0.0,
                               head_lr=1.0, copying=copying, choices=0.0, teacher=None, activation_checkpointing=False)
        leave, kept = torch.full((2, 29), 3.0) if copying else None, {}
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.untyped_storage()._cdata: t}), lambda _: None)
        with hooks:
            end = [*model.states(tokens, leave=leave)]                # held: a freed storage's address may come again
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        seen.append((P.plan(model.args, args, 1)["activations"][0], sum(t.untyped_storage().nbytes() for k, t in kept.items() if k not in own)))
        assert end
    assert seen[1][1] - seen[0][1] == pytest.approx(seen[1][0] - seen[0][0], rel=0.02) and seen[1][0] > 1.1 * seen[0][0]


def test_the_plan_counts_a_teacher(tmp_path):
    """Its weights, and one fp32 row of probabilities a token, which the forward pass leaves for the backward pass."""
    model, tokens, sizes, plans, teacher = random_model(), torch.randint(96, (2, 29)), [], [], random_model(n_layers=2).requires_grad_(False)
    (tmp_path / "params.json").write_text(json.dumps({k: v for k, v in vars(teacher.args).items() if v is not None} | dict(vocab_size=-1)))
    for taught in (False, True):
        args, kept = SimpleNamespace(dtype="float32", micro_batch_size=2, batch_size=2, max_len=30, exits=[2], weight_decay=0.0, lr=0.0, head_lr=1.0,
                                     copying=0.0, choices=0.0,
                                     teacher=str(tmp_path) if taught else None, activation_checkpointing=False), {}
        plans.append(P.plan(model.args, args, 1))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.untyped_storage()._cdata: t}) or t, lambda t: t):
            losses = model(tokens, tokens, [2], teacher=teacher if taught else None)
        sizes.append(sum(t.untyped_storage().nbytes() for t in kept.values()))
        assert losses.requires_grad
    assert plans[1]["logits"][0] - plans[0]["logits"][0] == 4 * 2 * 29 * 96
    args.choices = 0.5                                                   # of one exit's logits a log-softmax more
    assert P.plan(model.args, args, 1)["logits"][0] - plans[1]["logits"][0] == 4 * 2 * 29 * 96
    assert sizes[1] - sizes[0] == 4 * 2 * 29 * 96 - 8 * 2 * 29                       # in place of the labels
    assert plans[1]["weights"][0] - plans[0]["weights"][0] == 4 * sum(p.numel() for p in teacher.parameters())


def test_what_autograd_keeps_is_counted_once_and_without_weights():
    block = torch.nn.Sequential(torch.nn.Linear(8, 16, bias=False), torch.nn.Tanh(), torch.nn.Linear(16, 4, bias=False))
    x = torch.zeros(10, 8, requires_grad=True)
    assert P.kept(block, x) == 4 * (10 * 8 + 10 * 16)                   # the input; tanh's result, which two ops keep


PARAMS = {"7b": dict(dim=4096, n_layers=32, n_heads=32), "13b": dict(dim=5120, n_layers=40, n_heads=40)}


@pytest.mark.parametrize("name, n, flags, code, said", [
    ("7b", 8, [], 0, "sum    59.02"), ("7b", 1, [], 2, "3 cards fit (on one machine --nproc-per-node 3)"),
    ("13b", 8, ["--activation-checkpointing"], 0, "sum    76.08"), ("13b", 8, [], 2, "--activation-checkpointing"),
    ("13b", 2, ["--card-gb", 24], 2, "no number of cards fits"), ("7b", 8, ["--card-gb", 79], 0, "5.92"), ("7b", 8, ["--card-gb", 8], 2, "    1.00  CUDA"), ("7b", 2, ["--micro-batch-size", 1], 0, "6,738,415,616"),
    ("7b", 8, ["--resume"], 2, "the run was started with"), ("7b", 8, ["--settings", '{"resume": true, "max_len": 300}'], 0, "x 299 tokens")])          # as train.py --resume passes them
def test_a_plan_needs_params_json_alone(tmp_path, name, n, flags, code, said):
    (tmp_path / "params.json").write_text(json.dumps({**PARAMS[name], "vocab_size": -1, "multiple_of": 256, "norm_eps": 1e-5}))
    command = [sys.executable, ROOT / "docs/plan.py", "--ckpt", tmp_path, "--nproc", n, *flags]
    done = subprocess.run(list(map(str, command)), env=ENV, capture_output=True, text=True)
    assert done.returncode == code and said in done.stdout + done.stderr and done.stderr.count("\n") == (code > 0)


def test_a_run_too_large_for_its_card_stops_before_anything_is_loaded(tmp_path, monkeypatch, capfd):
    (tmp_path / "params.json").write_text(json.dumps(PARAMS["7b"]))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=40 * 2 ** 30))
    monkeypatch.setattr(T, "pick_device", lambda name: torch.device("cuda:0"))
    monkeypatch.setattr("sys.argv", ["train.py", "--ckpt", f"{tmp_path}", "--data", "none", "--out", f"{tmp_path / 'run'}",
                                     "--micro-batch-size", "3", "--max-len", "300"])
    with pytest.raises(SystemExit, match="2"):
        T.main()
    said = capfd.readouterr()
    assert "1 process(es)" in said.out and "3 x 299 tokens" in said.out and "GiB per process, but the card has 40.0: 32 cards fit (on one machine --nproc-per-node 32)" in said.err
    assert not (tmp_path / "run").exists()


# --- runs ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Uninterrupted runs of 6 steps: in one process; with accumulation in two; in bf16 in two."""
    out = tmp_path_factory.mktemp("straight")
    train(*TINY, "--out", out / "one")
    train(*TINY, "--out", out / "two", "--micro-batch-size", 2, n=2)
    train(*TINY, "--out", out / "bf16", "--dtype", "bfloat16", "--activation-checkpointing", n=2)
    return out


def test_a_run_leaves_complete_folders_the_last_two_and_a_log(straight):
    out = straight / "one"
    assert sorted(p.name for p in out.iterdir()) == ["latest", "log.jsonl", "step-3", "step-6"]
    assert os.readlink(out / "latest") == "step-6"
    for step in (3, 6):
        assert sorted(p.name for p in (out / f"step-{step}").iterdir()) == [
            "consolidated.00.pth", "lite.json", "optimizer.00.pt", "params.json", "tokenizer.model", "trainer.json"]
    assert json.loads((out / "latest/lite.json").read_text())["exits"] == [2, 4, 6]
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in log if "losses" in e] == [1, 2, 3, 4, 5, 6] and len(log[1]["losses"]) == 4
    assert [e["step"] for e in log if "validation" in e] == [0, 3, 6]
    masters, params = weights(out), dict(load_meta(out).named_parameters())
    assert masters.keys() == params.keys()
    assert all(torch.equal(p, masters[name]["master"].bfloat16()) for name, p in params.items())


def back_to_step_3(run, copy):
    subprocess.run(["cp", "-r", str(run), str(copy)], check=True)
    (copy / "latest").unlink()
    (copy / "latest").symlink_to("step-3")
    subprocess.run(["rm", "-r", str(copy / "step-6")], check=True)


@pytest.mark.parametrize("name, n", [("one", 1), ("two", 2), ("bf16", 2)])
def test_a_resumed_run_has_the_same_weights_bit_for_bit(straight, tmp_path, name, n):
    """Set the run back to step 3, with a log line half written; resume without repeating the flags."""
    back_to_step_3(straight / name, tmp_path / "run")
    with (tmp_path / "run/log.jsonl").open("a") as log:
        log.write('{"step": 7, "los')
    done = train("--resume", "--out", tmp_path / "run", n=n)
    assert same(weights(tmp_path / "run"), weights(straight / name))
    assert {t.dtype for s in weights(tmp_path / "run").values() for t in s.values()} == {torch.float32}
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in log if "losses" in e] == [1, 2, 3, 4, 5, 6], done.stderr
    assert [e["step"] for e in log if "validation" in e] == [0, 3, 6]


def test_signal_save_and_resume_end_in_the_weights_of_an_uninterrupted_run(tmp_path, refused):
    args = ["--steps", 60, *TINY[2:6], "--val", 16, "--save-every", 60]
    train(*args, "--out", tmp_path / "straight")
    run = tmp_path / "run"
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *map(str, args), "--out", str(run)], env=ENV,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (run / "log.jsonl").exists() or (run / "log.jsonl").read_text().count("losses") < 5:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143 and 5 <= int(os.readlink(run / "latest")[5:]) < 60
    train("--resume", "--out", run)
    assert same(weights(run), weights(tmp_path / "straight"))
    part = run / "latest/optimizer.00.pt"
    part.write_bytes(part.read_bytes()[:5000])
    assert "optimizer.00.pt" in refused("--resume", "--out", run)
    part.unlink()
    assert "0 of 75" in refused("--resume", "--out", run)


def test_a_run_with_a_teacher_resumes_to_the_same_weights_and_learns_from_it(straight, tmp_path, refused):
    teacher = tmp_path / "teacher"
    subprocess.run(["cp", "-r", str(ROOT / "tiny"), str(teacher)], check=True)
    train(*TINY, "--teacher", teacher, "--out", tmp_path / "straight")
    back_to_step_3(tmp_path / "straight", tmp_path / "run")
    train("--resume", "--out", tmp_path / "run")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "straight"))
    assert not same(weights(tmp_path / "straight"), weights(straight / "one"))
    back_to_step_3(tmp_path / "straight", tmp_path / "changed")
    path = teacher / "consolidated.00.pth"
    other = torch.load(path) | {(one := "layers.3.feed_forward.w1.weight"): 2 * torch.load(path)[one]}
    torch.save(other, path)
    assert "--teacher: not what" in refused("--resume", "--out", tmp_path / "changed")


def test_a_teacher_must_read_the_same_tokens(checkpoint, tokenizer):
    model = random_model(vocab_size=tokenizer.size)
    teacher = T.load_teacher(checkpoint, model, tokenizer, 64)
    assert torch.equal(teacher.output.weight, model.output.weight) and not any(p.requires_grad for p in teacher.parameters())
    for other in ((model, tokenizer, 65), (model, SimpleNamespace(model_bytes=b"x"), 64), (random_model(), tokenizer, 64)):
        with pytest.raises(InputError, match="expected the model's own tokens"):
            T.load_teacher(checkpoint, *other)


def test_the_shortlist_is_what_responses_say_most(straight, tokenizer):
    rows = tokenize(embedded(6 * 8), tokenizer, 64)
    said = collections.Counter(i for ids, n_prompt in rows for i in ids[n_prompt:])
    listed = json.loads((straight / "one/latest/lite.json").read_text())["shortlist"]
    assert set(listed) == set(said) and tokenizer.eos in listed       # few enough to be listed all
    counts = [said[i] for i in listed]
    assert counts == sorted(counts, reverse=True)


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """What train.py's main() has ready for its loop, given some flags and 18 examples, of which 10 are to be trained on."""
    (tmp_path / "d.json").write_text(json.dumps([dict(instruction=f"Say bed {i}.", output=f"bed {i}") for i in range(18)]))

    def call(*args):
        got = []
        monkeypatch.setattr(T, "train", lambda *a: got.extend(a) or 0)
        flags = ["--data", tmp_path / "d.json", "--batch-size", 8, "--val", 8, "--out", tmp_path / "run", *args]
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        with pytest.raises(SystemExit) as e:
            T.main()
        assert e.value.code == 0
        return SimpleNamespace(**dict(zip("ddp model teacher optimizer tokenizer rows val args".split(), got)))

    return call


def test_the_shortlist_has_an_end(prepared, monkeypatch):
    monkeypatch.setattr(T, "SHORTLIST", 5)
    run = prepared("--steps", 1)
    said = collections.Counter(i for ids, n_prompt in run.rows for i in ids[n_prompt:])
    listed = run.args.shortlist
    assert len(run.rows) == 10 and len(set(listed)) == len(listed) == 5
    assert min(said[i] for i in listed) >= max(n for i, n in said.items() if i not in listed)


def test_seed_and_checkpointing_reach_the_model(prepared):
    runs = [prepared("--steps", 1, *flags) for flags in (("--seed", 1), ("--seed", 1), ("--seed", 2), ("--activation-checkpointing",))]
    first = [run.model.layers[3].attention.wq.weight for run in runs]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])
    assert [run.model.checkpoint_blocks for run in runs] == [False, False, False, True]


def test_without_flags_it_is_the_papers_lite(prepared):
    run = prepared("--steps", 1)
    assert run.teacher is None and run.args.copying == run.args.choices == 0 and run.args.exits == [2, 4, 6] and run.args.weights == [1, 1, 1, 1]
    assert {group["faster"] for group in run.optimizer.param_groups} == {1}


def test_examples_may_be_as_long_as_the_context_and_no_longer():
    args = SimpleNamespace(exits=None, no_lite=False, copying=0, choices=0, weights=None, max_len=64)
    T.choose_exits(args, random_model().args)
    args.max_len = 65
    with pytest.raises(InputError, match="--max-len 65: the model's context is 64 tokens"):
        T.choose_exits(args, random_model().args)


def test_epochs_are_counted_in_whole_batches(prepared):
    assert prepared("--epochs", 1.5).args.steps == 3     # 10 rows in batches of 8 and 2, 1.5 times


def test_tuning_goes_on_with_the_exits_of_the_checkpoint(checkpoint, tmp_path):
    (tmp_path / "d.json").write_text(json.dumps([dict(instruction=f"Say bed {i}.", output="bed") for i in range(4)]))
    subprocess.run(["cp", "-r", str(checkpoint), str(tmp_path / "ckpt")], check=True)
    (tmp_path / "ckpt/lite.json").write_text('{"max_seq_len": 64, "exits": [3]}')
    train("--ckpt", tmp_path / "ckpt", "--data", tmp_path / "d.json", "--val", 1, "--max-len", 40, "--steps", 1,
          "--out", tmp_path / "run")
    assert json.loads((tmp_path / "run/latest/lite.json").read_text())["exits"] == [3]


def test_epochs_count_with_data_from_nothing_too(tmp_path):
    (tmp_path / "d.json").write_text(json.dumps([dict(instruction=f"Say bed {i}.", output="bed") for i in range(9)]))
    train("--data", tmp_path / "d.json", "--epochs", 2, "--batch-size", 4, "--val", 1, "--out", tmp_path / "run")
    assert os.readlink(tmp_path / "run/latest") == "step-4"


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(straight, tmp_path, before, after):
    """To the same result but for rounding: a rank takes over what it now owns from whoever saved it."""
    name = {1: "one", 2: "two"}[before]
    back_to_step_3(straight / name, tmp_path / "run")
    train("--resume", "--out", tmp_path / "run", n=after)
    assert len(list((tmp_path / "run/latest").glob("optimizer.*.pt"))) == after
    got, want = weights(tmp_path / "run"), weights(straight / name)
    for name, state in want.items():
        torch.testing.assert_close(got[name]["master"], state["master"], rtol=0, atol=2e-4)
        assert got[name]["step"] == state["step"] == 6


@pytest.mark.parametrize("text", ["Application timeout caused pair closure", "[gloo/transport/tcp/pair.cc:534] Connection closed by peer"])
def test_a_lost_rank_is_told_from_a_bug(text):
    """The two ways in which gloo says it, and an error of ours."""
    args, bug = SimpleNamespace(timeout=5, out="run"), RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert "lost another rank" in str(T.explain(RuntimeError(text), args)) and T.explain(bug, args) is bug


def test_a_save_that_cannot_be_written_is_told_from_a_bug():
    error = T.explain(RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0"), SimpleNamespace(out="run"))     # torch.save's
    assert isinstance(error, OSError) and "is the disk full?" in str(error)


def test_two_machines_a_dead_rank_and_resume(tmp_path):
    """Two torchrun agents that find each other on a port; rank 1 is killed, then falls silent; the run ends as if it had not."""
    args = ["--steps", 40, "--batch-size", 8, "--micro-batch-size", 2, "--val", 8, "--save-every", 5]
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]

    def agents(*args):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend",
                   "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "lite", str(ROOT / "train.py"), *map(str, args)]
        return [subprocess.Popen(command, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in "01"]

    run = tmp_path / "run"
    for flags, sig in ((args, signal.SIGKILL), (["--resume"], signal.SIGSTOP), (["--resume"], None)):
        both = agents(*flags, "--timeout", 5, "--out", run)
        if sig:
            goal = 6 + count(run / "log.jsonl", "losses")
            rank = {}
            while len(rank) < 2 or count(run / "log.jsonl", "losses") < goal:
                assert all(p.poll() is None for p in both), both[0].communicate()[0]
                if len(rank) < 2:                        # once is enough: a search takes as long as some steps
                    rank = {r: p for p in processes(run) for r in (0, 1) if f"RANK={r}" in environ(p)}
                time.sleep(0.05)
            os.kill(rank[1], sig)
            deadline = time.time() + 60
            while Path(f"/proc/{rank[0]}").exists() and time.time() < deadline:
                time.sleep(0.05)                         # then: the silent one's own agent would wait for ever
            os.kill(rank[1], signal.SIGKILL) if sig == signal.SIGSTOP else None
        texts = [p.communicate(timeout=120)[0] for p in both]
        if sig:
            assert all(p.returncode != 0 for p in both)
            if sum(t.count("error: lost another rank") for t in texts) != 1:
                pytest.fail("\n=== the other agent ===\n".join(texts))
    assert all(p.returncode == 0 for p in both), texts
    train(*args, "--out", tmp_path / "straight", n=2)
    assert same(weights(run), weights(tmp_path / "straight"))


@pytest.mark.parametrize("sig, n", [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_signal_saves_at_the_next_step_and_the_run_goes_on(tmp_path, sig, n):
    out = tmp_path / "run"
    args = ["--steps", 2000, "--batch-size", 8, "--val", 16, "--out", out]
    command = torchrun(n, ROOT / "train.py", *args) if n > 1 else [sys.executable, str(ROOT / "train.py"), *map(str, args)]
    process = subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = out / "log.jsonl"
    while not log.exists() or log.read_text().count("losses") < 3:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    process.send_signal(sig)                             # torchrun passes it on to the ranks, at moments of their own
    text = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    saved = os.readlink(out / "latest")
    assert re.fullmatch(r"step-[1-9]\d*", saved) and not list(out.glob(".*.tmp"))
    assert n > 1 or (f"after step {saved[5:]}" in text and process.returncode == 130)
    assert json.loads((out / saved / "trainer.json").read_text())["step"] == int(saved[5:])


def test_a_run_killed_in_its_first_save_starts_anew(tmp_path):
    for folder in ("step-0", ".step-0.tmp"):
        (tmp_path / "run" / folder).mkdir(parents=True)
        (tmp_path / "run" / folder / "params.json").write_text("half")
    (tmp_path / "run/log.jsonl").write_text('{"step": 0, "validation": [1.0]}\n')                         # cut off on a new start
    train(*TINY, "--steps", 1, "--out", tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["latest", "log.jsonl", "step-0", "step-1"]
    assert json.loads((tmp_path / "run/step-0/trainer.json").read_text())["args"]["logged"] == 0
    assert [json.loads(s)["step"] for s in (tmp_path / "run/log.jsonl").read_text().splitlines()] == [0, 1, 1]
    assert load_meta(tmp_path / "run/step-0").args.dim > 0


def test_a_save_that_does_not_know_its_log_keeps_all_of_it(straight, tmp_path):
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", str(straight / "one"), str(run)], check=True)
    saved, log = json.loads((run / "latest/trainer.json").read_text()), (run / "log.jsonl").read_text()
    assert log.count("losses") == 6
    del saved["args"]["logged"], saved["args"]["teacher"]             # as an older one's: it had none
    (run / "latest/trainer.json").write_text(json.dumps(saved))
    train("--resume", "--out", run)
    assert (run / "log.jsonl").read_text().startswith(log)


def test_resuming_refuses_other_settings_and_starting_refuses_a_run(straight, refused):
    for args, message in ((["--resume", "--seed", 7], "--seed 7"), (["--resume", "--lr", 1], "has 0.00"), (["--resume", "--batch-size", 4], "has 8"), (["--resume", "--teacher", "tiny"], "has None"), ([], "--resume")):
        assert message in refused(*args, "--out", straight / "one")


def test_a_loss_that_is_not_finite_stops_names_the_step_and_keeps_the_last_good_save(tmp_path):
    done = train(*TINY, "--lr", "1e30", "--clip", "1e30", "--out", tmp_path / "run", check=False)
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert re.match(r"error: step [1-6]: loss", line) and "last good save" in line
    assert all(torch.isfinite(p).all() for p in load_meta(tmp_path / "run").parameters())


@pytest.fixture
def loop(tmp_path, monkeypatch, tokenizer):
    """train.py's loop over 10 rows in batches of 4, in this process: what it returns. `instead` takes the place of a step of training."""

    def call(start, instead, **flags):
        monkeypatch.setattr(T, "update", lambda ddp, optimizer, rows, batch, step, *_: instead(step, batch) or ([1.0, 1.0], 1.0))
        args = SimpleNamespace(**dict(out=tmp_path / "run", batch_size=4, micro_batch_size=4, steps=9, save_every=99, seed=5, logged=0, exits=[2], weights=[1, 1],
                                      shortlist=[], lr=1e-3, warmup=0.1, head_lr=1.0, weight_decay=0.0) | flags)
        model, rows = random_model(), worker.rows()[:10]
        return T.train(model, model, None, T.optimizer_for(model, args), tokenizer, rows, rows[:2], args, start, 0, 1, lambda text: None)

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return call


def test_a_signal_does_not_wait_for_a_validation(loop, tmp_path, monkeypatch):
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    assert loop(0, lambda step, batch: step == 1 and handlers[signal.SIGTERM](signal.SIGTERM, None), save_every=2) == signal.SIGTERM
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [("validation" in line, line["step"]) for line in log] == [(True, 0), (False, 1), (False, 2)]
    assert os.readlink(tmp_path / "run/latest") == "step-2"          # where a regular save was due


def test_each_epoch_takes_every_row_once_in_an_order_of_its_own(loop, tmp_path):
    """The loop's batches, from a step within the second epoch and from the start."""
    model, rows, taken = random_model(), worker.rows()[:10], []
    for start in (4, 0):
        assert loop(start, lambda step, batch: taken.append((step, *batch))) == 0
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    held_out, all_of_them = (exit_losses(model, part, [2], 4)[0] for part in (rows[:2], rows))
    assert log[0]["step"] == 0 and log[0]["validation"] == pytest.approx(held_out, rel=1e-6)
    assert held_out != pytest.approx(all_of_them, rel=1e-3)          # or the line above could not tell them apart
    epochs = [batches(rows, 4, 5, epoch) for epoch in range(3)]
    assert taken[5:] == [(step, *epochs[step // 3][step % 3]) for step in range(9)] and taken[:5] == taken[9:]
    orders = [[i for _, *batch in taken[5 + 3 * epoch:8 + 3 * epoch] for i in batch] for epoch in range(3)]
    assert all(sorted(order) == [*range(10)] for order in orders) and len({*map(tuple, orders)}) == 3


def test_no_lite_trains_the_last_layer_alone(tmp_path):
    train(*TINY, "--no-lite", "--out", tmp_path / "run")
    lite = json.loads((tmp_path / "run/latest/lite.json").read_text())
    assert lite["exits"] == [] and lite["weights"] == [1.0]
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert all(len(e["losses"]) == 1 for e in log if "losses" in e)


def test_tuning_a_checkpoint_on_alpaca_data(checkpoint, tmp_path):
    words = [f"{w} {v}" for w in ("bed", "box", "cat", "sun", "map") for v in ("is red", "is tan")]
    records = [dict(instruction=f"Say {w}.", input="", output=w) for w in words]
    (tmp_path / "d.json").write_text(json.dumps(records))
    done = train("--ckpt", checkpoint, "--data", tmp_path / "d.json", "--val", 2, "--max-len", 40, "--epochs", 2,
                 "--batch-size", 3, "--lr", 1e-2, "--out", tmp_path / "run", "--dtype", "float32")
    assert os.readlink(tmp_path / "run/latest") == "step-6", done.stderr        # 8 rows, 3 batches an epoch
    before, after = load_meta(checkpoint), load_meta(tmp_path / "run", torch.float32)
    assert after.args == before.args
    assert any(not torch.allclose(p, q, atol=1e-2) for p, q in zip(before.parameters(), after.parameters()))


def test_no_answer_to_a_held_out_prompt_is_trained_on(tmp_path):
    """Several files answer the same prompts; a file of its own keeps the order that its shuffled list has."""
    for name in "ab":
        (tmp_path / f"{name}.json").write_text(json.dumps([dict(instruction=f"{i}", output=f"{name}{i}") for i in range(20)]))
    args = SimpleNamespace(ckpt=None, data=[tmp_path / "a.json", tmp_path / "b.json"], limit=None, val=5)
    rows, val = T.load_examples(args)
    assert {e["instruction"] for e in rows} | {e["instruction"] for e in val} == {f"{i}" for i in range(20)}
    assert len(rows) == 30 and len(val) == 5 and all(e["output"][0] == "a" for e in val)
    assert not {e["instruction"] for e in rows} & {e["instruction"] for e in val}
    alone, order = T.load_examples(SimpleNamespace(**vars(args) | dict(data=args.data[:1]))), list(range(20))
    random.Random(0).shuffle(order)
    assert [e["instruction"] for part in alone[::-1] for e in part] == [f"{i}" for i in order]


def test_a_kill_at_any_write_of_a_save_leaves_a_folder_that_resumes(tmp_path):
    """A child process ends, without any clean-up, at its k-th change to the file system, for every k."""
    model, tokenizer = random_model(), SimpleNamespace(model_bytes=b"x")
    args = SimpleNamespace(exits=[2], weights=[1.0, 1.0], shortlist=[5], lr=1e-3, head_lr=1.0, weight_decay=0.0)
    optimizer, seen = T.optimizer_for(model, args), []
    for k in range(1, 100):
        out = tmp_path / f"run{k}"
        out.mkdir()
        for step in (1, 2):
            T.save(out, step, model, optimizer, tokenizer, args)
        if (child := os.fork()) == 0:
            torch.set_num_threads(1)                     # threads do not survive a fork
            die_at_write(k, out)
            T.save(out, 3, model, optimizer, tokenizer, args)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        step = json.loads((out / "latest/trainer.json").read_text())["step"]
        again = random_model(1)
        T.load_optimizer(out / "latest", again, T.optimizer_for(again, args))                # whole: all parts are read
        assert load_meta(out).args == model.args and os.readlink(out / "latest") == f"step-{step}"
        seen.append(step)
        if code == 0:
            break
        assert code == 9
        T.save(out, 4, model, optimizer, tokenizer, args)
        assert sorted(p.name for p in out.iterdir() if not p.name.startswith("step")) == ["latest"]
        assert len(list(out.iterdir())) == 3
    assert code == 0 and seen == sorted(seen) and set(seen) == {2, 3} and k > 15, seen


def die_at_write(k, out):
    """End this process at the k-th time that it opens a file to write, makes, renames, links or removes one below out."""
    left, save = [k], torch.save

    def count(then=lambda: None):
        left[0] -= 1
        if left[0] == 0:
            then()
            os._exit(9)

    def watch(event, args):
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (writes or event in ("os.mkdir", "os.rename", "os.symlink")) and str(out) in str(args) or event in (
                "os.remove", "os.rmdir"):                # of a tree these name the last part of the path alone
            count()

    def torch_save(obj, path):                           # writes in C++, unseen by the hook: half of the file, then all
        count()
        save(obj, path)
        count(lambda: os.truncate(path, path.stat().st_size // 2))

    torch.save = torch_save
    sys.addaudithook(watch)


def test_a_run_killed_twice_ends_in_the_weights_of_an_uninterrupted_run(tmp_path):
    args = ["--steps", 24, *TINY[2:6], "--val", 8, "--save-every", 1]
    train(*args, "--out", tmp_path / "straight")
    run = tmp_path / "run"
    for goal in (6, 14):
        resume = ["--resume"] if (run / "latest").exists() else args
        process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *map(str, resume), "--out", str(run)], env=ENV,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while count(run / "log.jsonl", "losses") < goal:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert int(os.readlink(run / "latest")[5:]) >= goal - 2
    train("--resume", "--out", run)
    assert same(weights(run), weights(tmp_path / "straight"))


def test_a_save_that_dies_half_way_leaves_the_last_one(tmp_path, monkeypatch):
    model, tokenizer = random_model(), SimpleNamespace(model_bytes=b"x")
    args = SimpleNamespace(exits=[2], weights=[1.0, 1.0], shortlist=[5], lr=1e-3, head_lr=1.0, weight_decay=0.0)
    optimizer, out = T.optimizer_for(model, args), tmp_path / "run"
    out.mkdir()
    T.save(out, 1, model, optimizer, tokenizer, args)
    original = torch.save
    monkeypatch.setattr(torch, "save", lambda obj, path: original(obj, path) if "consolidated" in str(path) else 1 / 0)    # noqa
    with pytest.raises(ZeroDivisionError):
        T.save(out, 2, model, optimizer, tokenizer, args)
    assert os.readlink(out / "latest") == "step-1" and not (out / "step-2").exists()
    monkeypatch.setattr(torch, "save", original)
    for step in (2, 3):
        T.save(out, step, model, optimizer, tokenizer, args)
    assert sorted(p.name for p in out.iterdir()) == ["latest", "step-2", "step-3"]
    (out / "step-3-mine").mkdir()                        # a copy of the user's is not ours to count or to delete
    T.save(out, 4, model, optimizer, tokenizer, args)
    assert os.readlink(out / "latest") == "step-4" and load_meta(out).args == model.args
    assert sorted(p.name for p in out.iterdir()) == ["latest", "step-3", "step-3-mine", "step-4"]
    with pytest.raises(InputError, match="rank 1 does not see what rank 0 wrote"):       # on a machine with an out/ of its own, say
        T.save(out, 5, model, optimizer, tokenizer, args, rank=1)
    free = 14 * sum(p.numel() for p in model.parameters())           # bf16 weights, fp32 masters and two moments
    monkeypatch.setattr(T.shutil, "disk_usage", lambda path: SimpleNamespace(free=free - 1))
    with pytest.raises(InputError, match="a save takes 0.0 GiB"):
        T.save(out, 5, model, optimizer, tokenizer, args)
    assert os.readlink(out / "latest") == "step-4" and load_meta(out).args == model.args
    monkeypatch.setattr(T.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    T.save(out, 5, model, optimizer, tokenizer, args)
    assert os.readlink(out / "latest") == "step-5"


def test_saves_without_their_latest_are_not_overwritten(straight, tmp_path, refused):
    subprocess.run(["cp", "-r", str(straight / "one"), str(tmp_path / "run")], check=True)
    (tmp_path / "run/latest").unlink()
    assert "is taken" in refused(*TINY, "--out", tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["log.jsonl", "step-3", "step-6"]


def test_ranks_with_different_data_are_refused(tmp_path):
    """Each rank reads a file of its own, through a link that depends on the rank."""
    for rank in (0, 1):
        rows = [dict(instruction=f"Say bed {i}.", output="bed") for i in range(9 + rank)]
        (tmp_path / f"{rank}.json").write_text(json.dumps(rows))
    code = (f"import os, runpy, sys; sys.argv = ['train.py', '--data', {str(tmp_path)!r} + '/' + os.environ['RANK'] + '.json', "
            f"'--val', '1', '--steps', '2', '--out', {str(tmp_path / 'run')!r}]; sys.path.insert(0, {str(ROOT)!r}); "
            f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')")
    (tmp_path / "each.py").write_text(code)
    done = subprocess.run(torchrun(2, tmp_path / "each.py"), env=ENV, capture_output=True, text=True)
    assert done.returncode != 0 and done.stderr.count("error: the ranks differ") == 1 and not (tmp_path / "run").exists()


def test_no_thread_of_the_group_outlives_it(tmp_path):
    """One that still holds a tensor while Python ends takes the process down, now and then: exit code -6."""
    code = f"""
import atexit, glob, runpy, sys
sys.argv[0] = "train.py"; sys.path.insert(0, {str(ROOT)!r})
def name(path):
    try:
        return open(path).read()
    except OSError:                                      # it ended between the listing and the look
        return ""
atexit.register(lambda: print([name(path) for path in glob.glob("/proc/self/task/*/comm")]))
runpy.run_path({str(ROOT / 'train.py')!r}, run_name="__main__")
"""
    (tmp_path / "listed.py").write_text(code)
    args = ["--steps", 2, "--batch-size", 8, "--val", 16, "--out", tmp_path / "run"]
    done = subprocess.run(torchrun(2, tmp_path / "listed.py", *args), env=ENV, capture_output=True, text=True, check=True)
    assert done.stdout.count("['python") == 2 and "gloo" not in done.stdout, done.stdout
    assert done.stdout.count("trained 2 steps") == 1     # one rank speaks for all


def test_a_resumed_run_refuses_other_data(tmp_path, refused):
    rows = [dict(instruction=f"Say bed {i}.", output="bed") for i in range(9)]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    args = ["--data", tmp_path / "d.json", "--val", 1, "--steps", 2, "--batch-size", 4, "--out", tmp_path / "run"]
    train(*args)
    train("--resume", "--micro-batch-size", 2, *args)    # the layout may change, and the same flags are no others
    (tmp_path / "d.json").write_text(json.dumps(rows[:8]))
    assert "--data, --teacher: not what" in refused("--resume", "--out", tmp_path / "run")
