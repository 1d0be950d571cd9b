"""What a user can get wrong: one line on stderr naming what, where and what to do; exit code 2; nothing overwritten."""
import argparse
import importlib
import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch

import data
import eval as evaluation
import generate
import train
from conftest import ROOT

SCRIPTS = {"generate": generate, "eval": evaluation, "train": train}


class Code:
    """A pickle that runs a command when it is loaded."""
    def __reduce__(self):
        return os.system, ("touch EXECUTED",)


def no_tokenizer(d):
    (d / "tokenizer.model").unlink()


def broken_params(d):
    (d / "params.json").write_text('{"dim": 48,')


def edit_params(**change):
    def edit(d):
        params = json.loads((d / "params.json").read_text())
        (d / "params.json").write_text(json.dumps({k: v for k, v in {**params, **change}.items() if v is not ...}))
    return edit


def truncated(name, size):
    return lambda d: (d / name).write_bytes((d / name).read_bytes()[:size])


def shards_unlike(d):
    shard = torch.load(d / "consolidated.00.pth")
    torch.save(shard | {"layers.0.attention.wq.weight": shard["layers.0.attention.wq.weight"][:, 1:]}, d / "consolidated.01.pth")


def second_shard_missing(d):
    state = torch.load(d / "consolidated.00.pth")
    halves = {k: w if w.dim() == 1 else w.chunk(2, 1 if "tok_emb" in k or ".wo." in k or ".w2." in k else 0)[0].clone()
              for k, w in state.items()}
    torch.save(halves, d / "consolidated.00.pth")


def hugging_face(d):
    (d / "params.json").rename(d / "config.json")


CHECKPOINTS = [  # what is done to a good folder, and words of the line it must give
    (lambda d: shutil.rmtree(d), ["no such folder"]), (lambda d: [p.unlink() for p in d.iterdir()], ["no params.json", "nothing"]),
    (no_tokenizer, ["no tokenizer.model"]), (truncated("tokenizer.model", 3000), ["not a sentencepiece model"]),
    (lambda d: (d / "tokenizer.model").write_text("hello"), ["not a sentencepiece model"]),
    (broken_params, ["params.json", "JSON"]), (edit_params(dim=...), ["missing", "'dim'"]), (edit_params(n_heads=5), ["divide"]),
    (edit_params(n_heads=16), ["even width"]), (edit_params(n_kv_heads=4), ["n_kv_heads 4"]), (edit_params(n_layers=True), ["n_layers is True"]), (edit_params(norm_eps=0), ["norm_eps is 0"]),
    (edit_params(n_layers="6"), ["n_layers is '6'"]), (edit_params(rope_scaling=2), ["unexpected", "'rope_scaling'"]),
    (edit_params(n_layers=7), ["layers.6", "missing"]), (edit_params(dim=36), ["params.json says"]),
    (edit_params(vocab_size=90), ["params.json says"]), (truncated("consolidated.00.pth", 50000), ["consolidated.00.pth", "complete"]),
    (truncated("consolidated.00.pth", 0), ["consolidated.00.pth"]),
    (lambda d: (d / "consolidated.00.pth").write_bytes(pickle.dumps(Code())), ["refused"]),
    (lambda d: torch.save(dict(x=Code()), d / "consolidated.00.pth"), ["refused"]),
    (lambda d: torch.save([1], d / "consolidated.00.pth"), ["not a dictionary of tensors"]),
    (lambda d: torch.save(torch.load(d / "consolidated.00.pth") | {"norm.weight": 1.0}, d / "consolidated.00.pth"), ["not a dictionary of tensors"]),
    (shards_unlike, ["consolidated.01.pth", "first shard's shapes"]), (second_shard_missing, ["shard"]), (lambda d: (d / "consolidated.00.pth").rename(d / "consolidated.01.pth"), ["shard"]),
    (lambda d: (edit_params(vocab_size=-1)(d), torch.save({"norm.weight": torch.ones(48)}, d / "consolidated.00.pth")),
     ["layers.0.attention.wk.weight missing"]),
    (lambda d: (d / "consolidated.00.pth").unlink(), ["no weights"]), (hugging_face, ["Hugging Face", "params.json"]),
    (lambda d: (d / "lite.json").write_text("[]"), ["lite.json", "object"]),
    (lambda d: (d / "lite.json").write_text('{"thresholds": {"2": 7}}'), ["lite.json", "thresholds"]),
    (lambda d: (d / "lite.json").write_text('{"thresholds": {"\u00b2": 0.5}}'), ["lite.json", "by layer"]), (edit_params(norm_eps=float("nan")), ["norm_eps is nan"]),
    (lambda d: (d / "lite.json").write_text('{"max_seq_len": "x"}'), ["max_seq_len"]),
    (lambda d: (d / "lite.json").write_text('{"exits": [2, 99]}'), ["lite.json: exits [2, 99]"]),
    (lambda d: (d / "lite.json").write_text('{"calibration": []}'), ["lite.json"]),
    (lambda d: (d / "lite.json").write_text('{"shortlist": [2, "a"]}'), ["lite.json", "shortlist"]),
    (lambda d: (d / "lite.json").write_text('{"thresholds": {"2": 0.5, "6": 0.5}}'), ["lite.json: exits [2, 6]", "1 to 5"]),
    (lambda d: (d / "lite.json").write_text('{"shortlist": [2, 512]}'), ["lite.json", "shortlist", "another model"]),
    (lambda d: (d / "lite.json").write_text('{"recompute": "no"}'), ["lite.json", "recompute"]),
    (lambda d: (d / "lite.json").write_text('{"check": -1}'), ["lite.json", "check"])]

FLAGS = [  # script, arguments (CKPT, DIR and DATA are filled in), words of the line
    ("generate", "--ckpt CKPT --threshold 1.5 hi", ["--threshold", "1.5", "0 to 1"]),
    ("generate", "--ckpt CKPT --threshold x hi", ["--threshold", "x given"]), ("generate", "--ckpt CKPT --threshold nan hi", ["--threshold", "nan given"]),
    ("generate", "--ckpt CKPT --threshold 0.5,0.5,0.5 hi", ["3 numbers for 2 exits"]),
    ("generate", "--ckpt CKPT --exits 2,2 --threshold 1 hi", ["--exits", "different"]), ("generate", "--ckpt CKPT --threshold 0.5, hi", ["--threshold", "0.5, given"]),
    ("generate", "--ckpt CKPT --exits 9 hi", ["1 to 5"]),
    ("generate", "--ckpt CKPT --exits x hi", ["--exits"]), ("generate", "--ckpt CKPT --temperature -1 hi", ["--temperature"]),
    ("generate", "--ckpt CKPT --top-p 0 hi", ["--top-p"]), ("generate", "--ckpt CKPT --max-new-tokens 0 hi", ["--max-new-tokens"]),
    ("generate", "--ckpt CKPT --threshold 0.5 --shortlist 5 hi", ["lite.json", "no shortlist"]),
    ("generate", "--ckpt CKPT --thresh 0.5 hi", ["unrecognized", "--thresh"]), ("generate", "--ckpt CKPT --dtype int8 hi", ["--dtype"]), ("generate", "--ckpt CKPT --device cuda:7 hi", ["cuda:7", "cpu"]),
    ("generate", "--ckpt CKPT --device tpux hi", ["tpux"]), ("generate", "--ckpt CKPT --data DIR/none.json", ["none.json", "no such file"]),
    ("eval", "--ckpt CKPT --data DIR/none.json", ["none.json", "no such file"]), ("eval", "--ckpt CKPT --threshold 2", ["--threshold", "2 given"]),
    ("eval", "--ckpt DIR/none", ["no such folder"]), ("eval", "--ckpt CKPT --limit 0", ["--limit"]),
    ("train", "--ckpt CKPT --max-len 40 --out DIR/new", ["alpaca_data.json", "python data.py"]),
    ("train", "--ckpt CKPT --data DATA --max-len 3 --val 1 --out DIR/new", ["every example", "--max-len"]),
    ("train", "--ckpt CKPT --data DATA --max-len 40 --out DIR/new", ["--val 200", "2 prompts"]),
    ("train", "--ckpt CKPT --data DATA --max-len 40 --val 2 --out DIR/new", ["--val 2", "2 prompts"]), ("train", "--ckpt CKPT --data DATA --max-len 5000 --val 1 --out DIR/new", ["context"]),
    ("train", "--ckpt CKPT --data DIR/koala.jsonl --max-len 40 --val 1 --out DIR/new", ["output"]),
    ("train", "--epochs 2 --out DIR/new", ["--epochs", "--data", "--steps"]),
    ("train", "--data DATA --steps 5 --epochs 2 --out DIR/new", ["--steps 5", "--epochs 2", "one of them"]),
    ("train", "--ckpt CKPT --layers 4 --out DIR/new", ["--layers 4", "--ckpt ckpt", "one of them"]),
    ("generate", "--ckpt CKPT --verify hi", ["--verify", "--threshold"]), ("generate", "--ckpt CKPT --verify --threshold 0.6 --recompute hi", ["--verify", "no --recompute"]),
    ("train", "--copying 0.3 --no-lite --out DIR/new", ["--copying", "no-lite"]), ("train", "--copying 0.3 --layers 2 --out DIR/new", ["--copying", "no exit"]), ("train", "--choices 0.5 --no-lite --out DIR/new", ["--choices", "no-lite"]), ("train", "--teacher CKPT --max-len 65 --out DIR/new", ["--teacher", "65 of them at once"]),
    ("train", "--teacher DIR/nowhere --out DIR/new", ["nowhere", "no such folder"]),
    ("train", "--limit 5 --out DIR/new", ["--limit", "--data", "--steps"]),
    ("train", "--out DIR/mine", ["is taken"]), ("train", "--out DIR/file", ["is taken"]), ("train", "--out DIR/cleared", ["is taken"]),
    ("train", "--resume --out DIR/unlinked", ["no run to go on", "latest"]), ("train", "--resume --out DIR/unlinked/latest", ["no run to go on"]),
    ("train", "--no-lite --exits 2,4 --out DIR/new", ["--exits", "no-lite"]),
    ("train", "--resume --out DIR/new", ["no such folder", "new"]), ("train", "--resume --out DIR/mine", ["mine"]), ("train", "--resume --out CKPT", ["no run to go on"]),
    ("train", "--exits 2,9 --out DIR/new", ["--exits"]), ("train", "--weights 1,2 --out DIR/new", ["--weights", "expected 4"]), ("train", "--weights 0,0,0,0 --out DIR/new", ["--weights", "not all 0"]),
    ("train", "--batch-size 0 --out DIR/new", ["--batch-size"]), ("train", "--lr inf --out DIR/new", ["--lr", "inf given"]), ("train", "--dtype float16 --out DIR/new", ["float16"]),
    ("train", "--device cuda:7 --out DIR/new", ["cuda:7"]), ("train", "--steps -3 --out DIR/new", ["--steps"])]


@pytest.fixture
def place(tmp_path, checkpoint, monkeypatch):
    """A folder with a good checkpoint, a data file, somebody's folder and somebody's file; the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, tmp_path / "ckpt")
    (tmp_path / "d.json").write_text('[{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}]')
    (tmp_path / "koala.jsonl").write_text('{"prompt": "a"}')
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "cleared").mkdir()                        # a finished run, whose saves were moved elsewhere
    (tmp_path / "cleared/log.jsonl").write_text('{"step": 1, "losses": [1.0, 2.0]}\n')
    shutil.copytree(checkpoint, tmp_path / "unlinked/latest")        # a run, copied by something that follows links
    (tmp_path / "unlinked/latest/trainer.json").write_text('{"step": 1, "args": {}}')
    return tmp_path


def snapshot(folder):
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(script, args, words, place, monkeypatch, capsys):
    before = snapshot(place)
    monkeypatch.setattr("sys.argv", [f"{script}.py", *args])
    with pytest.raises(SystemExit) as e:
        data.run(SCRIPTS[script].main)
    out = capsys.readouterr()
    lines = [s for s in out.err.splitlines() if not s.startswith("no --ckpt")]
    assert e.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), out.err
    assert all(w in lines[0] for w in words), lines[0]
    assert snapshot(place) == before and not (place / "new").exists()


@pytest.mark.parametrize("damage, words", CHECKPOINTS, ids=[w[0] for _, w in CHECKPOINTS])
def test_bad_checkpoints(place, monkeypatch, capsys, damage, words):
    damage(place / "ckpt")
    refused("generate", ["--ckpt", "ckpt", "hello"], words, place, monkeypatch, capsys)
    assert not (place / "EXECUTED").exists()


@pytest.mark.parametrize("script, args, words", FLAGS, ids=[f"{s} {a}" for s, a, _ in FLAGS])
def test_bad_flags_and_data(place, monkeypatch, capsys, script, args, words):
    args = args.replace("CKPT", "ckpt").replace("DIR/", "").replace("DATA", "d.json").split()
    refused(script, args, words, place, monkeypatch, capsys)


@pytest.mark.parametrize("error, rank, code, said", [
    (data.InputError("a\nb"), 0, 2, "error: a b\n"), (data.InputError("a"), 1, 2, ""), (OSError("disk"), 1, 2, "error: disk\n"), (KeyboardInterrupt(), 0, 130, "")])
def test_what_ends_a_command_is_a_line_once_and_a_code(monkeypatch, capsys, error, rank, code, said):
    """What the user gave is wrong for all ranks alike, and told by the first; a disk may be one rank's own."""
    def main():
        raise error
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    with pytest.raises(SystemExit) as e:
        data.run(main)
    assert e.value.code == code and capsys.readouterr().err == said


def test_devices_are_dealt_out_or_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert data.pick_device("cuda") == torch.device("cuda:1") and data.pick_device("cpu") == torch.device("cpu")
    for name, found in (("cuda:0", "single process"), ("gpu", "expected cpu")):
        with pytest.raises(data.InputError, match=found):
            data.pick_device(name)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(data.InputError, match=r"found 2 CUDA devices for 3 process"):
        data.pick_device("cuda")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert data.pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(data.InputError, match="found 2 CUDA devices"):
        data.pick_device("cuda:2")


def test_as_a_command_it_is_one_line_and_exit_code_2(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "generate.py", "--ckpt", tmp_path, "hi"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["data", "train", "generate", "eval", "docs.plan", "docs.calibrate", "docs.report", "docs.answers", "docs.project"])
def test_help_explains_every_flag(script, monkeypatch):
    done = subprocess.run([sys.executable, ROOT / f"{script.replace('.', '/')}.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "python" in done.stdout
    parsers = []
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda parser: parsers.append(parser) or sys.exit())
    with pytest.raises(SystemExit):
        importlib.import_module(script).main()
    assert len(parsers[0]._actions) > 1 and [a.dest for a in parsers[0]._actions if not a.help] == []
