"""Opt-in, `python -m pytest -m real tests`: the code on a real pre-trained model, SmolLM2-135M or what LITE_REAL_CKPT names."""
import os
from collections import Counter

import pytest
import torch

from data import Tokenizer, prompt_text
from generate import generate
from model import load_meta, read_lite
from reference import Llama, as_transformers

pytestmark = pytest.mark.real
SAYS = {  # greedy, in fp32; the two likeliest tokens differ by 0.008 and more in their logits
    "The capital of France is": [7042, 30, 198, 198, 504, 3575, 282, 260, 1797, 1918, 314, 1315, 2863, 4206, 30, 198],
    "Water boils at": [216, 33, 32, 32, 32, 3282, 28, 527, 314, 216, 33, 32, 32, 32, 3282, 282],
    "def fibonacci(n):": [198, 1604, 3987, 46477, 24, 94, 727, 472, 585, 304, 10204, 216, 32, 42, 448, 1003]}


@pytest.fixture(scope="module")
def speaker(real):
    model = load_meta(real, torch.float32)
    return model, Tokenizer.load(real, model.args.vocab_size)


@pytest.mark.parametrize("text", SAYS)
@pytest.mark.skipif("LITE_REAL_CKPT" in os.environ, reason="the ids are SmolLM2's")
def test_smollm2_says_what_it_said(speaker, text):
    model, tokenizer = speaker
    assert [t for t, _ in generate(model, tokenizer.encode(text, bos=True), len(SAYS[text]))] == SAYS[text]


def test_it_speaks_as_transformers_says(speaker):
    """24 greedy tokens for 5 prompts, fp32, equal LlamaForCausalLM's."""
    pytest.importorskip("transformers")
    model, tokenizer = speaker
    other = as_transformers(model)
    for text in ("The capital of France is", "def add(a, b):", "Once upon a time", "Water boils at", "My favourite colour"):
        prompt = tokenizer.encode(text, bos=True)
        want = other.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=-1, pad_token_id=0)
        assert [t for t, _ in generate(model, prompt, 24)] == want[0, len(prompt):].tolist()


def test_it_leaves_early_as_the_eager_loop_says(speaker, real):
    """Tokens and exits equal the naive loop's at several thresholds, at three depths or more."""
    model, tokenizer = speaker
    exits, seen = read_lite(real).get("exits") or [24, 26, 28], Counter()
    prompt = tokenizer.encode(prompt_text(dict(instruction="Name three colours.", input="")), bos=True)
    for threshold in (0.4, 0.6, 0.9, 0.99):
        rule = {n: threshold for n in exits}
        tokens, depths = zip(*generate(model, prompt, 24, rule))
        assert (list(tokens), list(depths)) == Llama.of(model).early_exit(prompt, 24, rule)
        seen.update(depths[1:])
    assert len(seen) >= min(3, len(exits) + 1), seen
