"""docs/answers.py: many prompts at once, against one at a time; what it draws, against the softmax; its file, against its source."""
import json
import os
import shutil
import sys

import pytest
import torch

from conftest import random_model
from data import TINY_FOLDER, Tokenizer, embedded, prompt_text, read_examples
from docs import answers as A
from generate import generate
from model import InputError, load_meta


def test_prompts_answered_together_say_what_each_says_alone():
    """float64, so that no near-tie falls the other way.  Some rows end early, and leave."""
    model = random_model(dtype=torch.float64)
    prompts = [[1, 5 + i, 40, 3 * i % 96, 7] for i in range(20)]
    whole = [[t for t, _ in generate(model, p, 40)] for p in prompts]
    eos = max(range(96), key=lambda token: sum(token in ids for ids in whole))
    alone = [ids[:ids.index(eos) + 1] if eos in ids else ids for ids in whole]
    assert A.answer(model, prompts, 40, 0, eos) == alone
    lengths = sorted(len(ids) for ids in alone)
    assert lengths[-1] == 40 and lengths[10] < 40                    # so half of the rows were dropped before the end
    for temperature in (0, 1e-40):
        assert A.answer(model, prompts[:3], 1, temperature, eos) == [ids[:1] for ids in alone[:3]]


def test_draws_follow_the_softmax():
    n, logits = 40000, torch.tensor([[0.0, 1.0, -30.0, 2.0], [3.0, -1.0, 0.5, 0.0]])
    ids = A.draw(logits.repeat(n, 1), torch.Generator().manual_seed(0)).view(n, 2)
    for drawn, p in zip(ids.T, logits.softmax(-1)):
        assert ((drawn.bincount(minlength=4) / n - p).abs() < 4 * (p * (1 - p) / n).sqrt() + 1e-12).all()


def call(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["answers.py", *map(str, args)])
    A.main()


def test_the_file_has_the_same_examples_with_other_outputs(tmp_path, monkeypatch):
    examples, out = embedded(40, split="test"), tmp_path / "new" / "answers.json"
    (tmp_path / "x.json").write_text(json.dumps([e | dict(output="?") for e in examples]))
    flags = (tmp_path / "x.json", "--ckpt", TINY_FOLDER, "--dtype", "float32", "--out", out)
    call(monkeypatch, *flags, "--temperature", 0, "--max-new-tokens", 40, "--batch-size", 3)
    written, model, tokenizer = read_examples(out), load_meta(TINY_FOLDER, torch.float32), Tokenizer.load(TINY_FOLDER)
    assert [e | dict(output="") for e in written] == [e | dict(output="") for e in examples]
    for e in written[:10]:
        ids = tokenizer.encode(prompt_text(e), bos=True)
        assert e["output"] == tokenizer.decode([t for t, _ in generate(model, ids, 40, eos=tokenizer.eos)], ids).strip()
    assert sum(a["output"] == b["output"] for a, b in zip(written, examples)) > 25           # it can answer
    for name in (out, tmp_path / "answers.json.gz"):
        with pytest.raises(InputError, match="not taken"):
            call(monkeypatch, *flags[:-1], name)
    assert read_examples(out) == written and [p.name for p in out.parent.iterdir()] == ["answers.json"]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        call(monkeypatch, flags[0], "--ckpt", TINY_FOLDER, "--limit", 9, "--temperature", 2, "--seed", seed, "--out", tmp_path / f"{name}.json")
    a, b, c = (read_examples(tmp_path / f"{name}.json") for name in "abc")
    assert len(a) == 9 and a == b != c
    call(monkeypatch, flags[0], "--ckpt", TINY_FOLDER, "--limit", 9, "--temperature", 2, "--times", 3, "--out", tmp_path / "d.json")
    d = read_examples(tmp_path / "d.json")
    assert [e["instruction"] for e in d] == [e["instruction"] for e in a for _ in range(3)]
    assert any(d[i]["output"] != d[i + 1]["output"] for i in range(0, 27, 3))


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """What comes out is what an uninterrupted run writes, batch by batch, and no batch is answered twice."""
    (tmp_path / "x.json").write_text(json.dumps(embedded(12, split="test")))
    shutil.copytree(TINY_FOLDER, tmp_path / "m")
    flags = (tmp_path / "x.json", "--ckpt", tmp_path / "m", "--temperature", 2, "--batch-size", 2, "--max-new-tokens", 6)
    call(monkeypatch, *flags, "--out", tmp_path / "whole.json")
    batches, original = [], A.answer

    def dies(*args):
        if len(batches) == 3:
            raise KeyboardInterrupt
        batches.append(args[1])
        return original(*args)

    out, part = tmp_path / "out.json", tmp_path / "out.json.part"
    part.write_text('{"settings": {"da')                 # killed in the first line: nothing to go on with
    monkeypatch.setattr(A, "answer", dies)
    with pytest.raises(KeyboardInterrupt):
        call(monkeypatch, *flags, "--out", out)
    assert part.read_text().count('{"i"') == 3 and not out.exists()
    part.write_text(part.read_text()[:-9])               # and in the middle of the third batch
    with pytest.raises(InputError, match="another run"):
        call(monkeypatch, *flags, "--seed", 1, "--out", out)
    when = (weights := tmp_path / "m/consolidated.00.pth").stat().st_mtime_ns
    os.utime(weights)                                    # the folder has another model now
    with pytest.raises(InputError, match="another run"):
        call(monkeypatch, *flags, "--out", out)
    os.utime(weights, ns=(when, when))
    monkeypatch.setattr(A, "answer", lambda *args: batches.append(args[1]) or original(*args))
    call(monkeypatch, *flags, "--out", out)
    assert read_examples(out) == read_examples(tmp_path / "whole.json") and not part.exists()
    del batches[2]                                       # the line of which was cut short: answered again
    assert len(batches) > 5 and all(batches.count(b) == 1 for b in batches)
    monkeypatch.setenv("WORLD_SIZE", "2")                # two processes; the last one to be done writes
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        call(monkeypatch, *flags, "--out", tmp_path / "two.json")
        assert (tmp_path / "two.json").exists() == (rank == "0")
    assert read_examples(tmp_path / "two.json") == read_examples(out)


def test_a_prompt_without_room_for_an_answer_is_named_first(tmp_path, monkeypatch):
    (tmp_path / "x.json").write_text(json.dumps([dict(instruction="word " * 300, output="?")]))
    with pytest.raises(InputError, match="fills the context, 256"):
        call(monkeypatch, tmp_path / "x.json", "--ckpt", TINY_FOLDER, "--out", tmp_path / "y.json")
