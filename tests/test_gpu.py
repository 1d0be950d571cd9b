"""On a GPU (opt-in: python -m pytest -m gpu tests): the CPU's results once more, and memory against docs/plan.py's sum."""
import copy
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import generate as G
import train as T
from conftest import ROOT, random_model
from docs import answers as A
from docs import plan as P
from eval import judge
from model import Transformer, save_meta

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
PROMPT, RULE = [1, 40, 7, 7, 63, 25], {2: 0.35, 4: 0.3}


def both():
    """The same random model on the CPU and, fused for decoding, on the GPU."""
    model = random_model(dtype=torch.float64)
    return model, copy.deepcopy(model).to(DEVICE).fuse()


@pytest.mark.parametrize("how", [dict(), dict(frequent=range(20)), dict(recompute=True), dict(verify=True)], ids=str)
def test_generation_is_the_cpus(how):
    here, there = both()
    want, got = (list(G.generate(m, PROMPT, 50, RULE, **how)) for m in (here, there))
    assert got == want and len({depth for _, depth in got}) > 1


def test_sampling_draws_from_the_gpus_own_generator():
    model = both()[1]
    draw = lambda seed, **how: list(G.generate(  # noqa: E731
        model, PROMPT, 30, RULE, temperature=1.0, top_p=0.9, rng=torch.Generator(DEVICE).manual_seed(seed), **how))
    for how in dict(), dict(verify=True):
        assert draw(0, **how) == draw(0, **how) != draw(1, **how)


def test_judging_is_the_cpus():
    told = []
    for model in both():
        a = judge(model, G.answer(model, PROMPT, 40, RULE), range(20), [2, 4])
        told.append((a.agrees, a.right, a.sizes, torch.tensor([*a.sure, [a.loss] * 39])))
    assert told[0][:3] == told[1][:3] and 0 < sum(told[0][0]) < 39
    torch.testing.assert_close(told[0][3], told[1][3], rtol=1e-4, atol=1e-5)    # the table of angles is fp32


def test_answers_are_the_cpus():
    want, got = (A.answer(m, [PROMPT, PROMPT[::-1]], 20, 0.0, 5) for m in both())
    assert got == want


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_is_the_cpus(checkpointing):
    """Losses and gradients of one batch, with copies, choices and a teacher."""
    rows = [([1, *range(2, 9 + i)], 3 + i % 3) for i in range(10)]
    run = SimpleNamespace(exits=[2, 4], weights=[1.0, 2.0, 4.0], copying=0.5, choices=0.5, micro_batch_size=4, seed=0)
    told = []
    for device in "cpu", DEVICE:
        model, teacher = (random_model(seed, torch.float64).to(device) for seed in (0, 1))
        model.checkpoint_blocks = checkpointing
        losses = T.gradients(model, rows, range(10), run, step=3, teacher=teacher.requires_grad_(False))
        told.append((losses.cpu(), [p.grad.cpu() for p in model.parameters()]))
    torch.testing.assert_close(told[0], told[1], rtol=1e-4, atol=1e-6)           # the table of angles is fp32


def test_a_run_by_command_learns_saves_and_resumes(tmp_path):
    """The tiny model in bf16, straight and in two parts, which need not round alike on a GPU."""
    args = ["--batch-size", "32", "--steps", "60", "--val", "64", "--save-every", "30", "--dtype", "bfloat16", "--device", DEVICE]
    call = lambda *more: subprocess.run([sys.executable, ROOT / "train.py", *map(str, more)], check=True, capture_output=True)  # noqa: E731
    call(*args, "--out", tmp_path / "run")
    call("--out", tmp_path / "run", "--resume")          # is there already: nothing happens
    (tmp_path / "run/latest").unlink()
    (tmp_path / "run/latest").symlink_to("step-30")
    read = lambda: [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]  # noqa: E731
    first = [line["losses"] for line in read() if "losses" in line]
    subprocess.run(["rm", "-r", str(tmp_path / "run/step-60")], check=True)
    call("--out", tmp_path / "run", "--resume")
    again = [line["losses"] for line in read() if "losses" in line]
    assert len(first) == len(again) == 60 and first[:30] == again[:30]
    assert all(b < 0.7 * a for a, b in zip(first[0], again[-1]))
    torch.testing.assert_close(torch.tensor(first), torch.tensor(again), rtol=0.05, atol=0.05)
    answer = subprocess.run([sys.executable, ROOT / "generate.py", "--ckpt", tmp_path / "run", "--threshold", "0.5", "--limit", "2"],
                            check=True, capture_output=True, text=True)
    assert "decode" in answer.stderr


@pytest.mark.parametrize("more", [{}, dict(activation_checkpointing=True), dict(teacher=True, copying=0.3), dict(choices=0.5)], ids=str)
def test_the_plan_is_an_upper_bound_of_what_a_card_allocates(tmp_path, tokenizer, more):
    """A quarter of LLaMA-2-7B's width and depth, with its vocabulary, 512 tokens, all response but one."""
    shape = random_model(dim=1024, n_layers=8, n_heads=8, n_kv_heads=8, vocab_size=8, multiple_of=256, max_seq_len=512).args
    shape.vocab_size = 32000
    args = T.fill_in(T.flags().parse_args(["--ckpt", "x", "--exits", "2,4,6"]))
    vars(args).update({"batch_size": 8, "micro_batch_size": 4, "weights": [1.0] * 4, "steps": 4, "val": 1} | more)
    model = Transformer(shape).to(torch.bfloat16).init_weights()
    if args.teacher:
        (tmp_path / "teacher").mkdir()
        save_meta(tmp_path / "teacher", model, tokenizer, {})
        args.teacher = tmp_path / "teacher"
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = model.to(DEVICE)
    model.checkpoint_blocks = args.activation_checkpointing
    teacher = T.load_meta(args.teacher, torch.bfloat16, DEVICE).requires_grad_(False) if args.teacher else None
    optimizer = T.optimizer_for(model, args)
    rows = [(torch.randint(32000, (512,)).tolist(), 1) for _ in range(8)]
    for step in range(2):
        losses, _ = T.update(model, optimizer, rows, range(8), step, args, teacher=teacher)
        assert all(map(math.isfinite, losses))
    took, parts = torch.cuda.max_memory_allocated() - before, P.plan(shape, args, 1)
    planned = parts["sum"][0] - parts["reserve"][0]
    print(f"\nplanned {planned / P.GIB:.2f} GiB, allocated {took / P.GIB:.2f}: {took / planned:.2f}")
    assert 0.7 * planned < took <= planned
