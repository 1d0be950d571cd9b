"""The maker of the embedded set: questions by rule, and the tokenizer of their words.

    python tests/questions.py          # write tiny/train.jsonl.gz, tiny/test.jsonl.gz and tiny/tokenizer.model anew

Ten families, whose answers need different amounts of computation: early exit lives on that.
"""
import gzip
import io
import json
import random
import sys
import zlib
from pathlib import Path

import sentencepiece

TINY = Path(__file__).parents[1] / "tiny"
sys.path.insert(0, str(TINY.parent))

from data import INPUT, NO_INPUT, RESPONSE, WITH_INPUT, Tokenizer, prompt_text  # noqa: E402

SIZES = {"train": 89600, "test": 4000}     # 2800 steps of 32 see each question once

WORDS = "bat bed box bus cap cat cup dog hat hen jar key map pen pig pot rat sun".split()
NAMES = "Ann Ben Dan Eve Gus Ian Jon Kim".split()
LETTERS = "abcdefghijklmnop"
FAMILIES = {  # what stands between the parts of x; the phrasings (after "|" stands the input); the answer
    "echo": (" ", ("Repeat {x}.", "Say {x} again.", "Repeat the words.|Words {x}"), "The words are {y}."),
    "pick": (" ", ("Give words {a} and {b} of {x}.", "Say words {a} and {b} in {x}.",
                   "Give words {a} and {b}.|Words {x}"), "It is {y}."),
    "reverse": (" ", ("Reverse {x}.", "Say {x} in reverse.", "Reverse the words.|Words {x}"),
                "In reverse, {y}."),
    "sort": (" ", ("Sort {x}.", "Say {x} in order.", "Sort the letters.|Given {x}"), "In order, {y}."),
    "rank": (" ", ("Give letter {n} of {x} in order.", "Which is letter {n} in order, of {x}?",
                   "Give letter {n} in order.|Given {x}"), "Letter {n} in order is {y}."),
    "larger": (" and ", ("Which is larger, {x}?", "Give the larger of {x}.",
                         "Say which is larger.|Given {x}"), "The larger is {y}."),
    "next": (" ", ("Give the number after {x}.", "Which number is after {x}?",
                   "Say the number after.|Given {x}"), "After {x} is {y}."),
    "sort by": (", ", ("Given {x}, sort the words.", "Sort the words in {x}.", "Sort the words.|Given {x}"),
                "In order, {y}."),
    "path": (", ", ("Given {x}, follow from {n}.", "Follow from {n} in {x}.", "Follow from {n}.|Given {x}"),
             "So {y}."),
    "jump": (", ", ("Given {x}, jump from {n}.", "Jump from {n} in {x}.", "Jump from {n}.|Given {x}"),
             "So {y}.")}


def question(family, r):
    """A question of a family, from the random.Random r: x (a list, its input), more fields, answer, level."""
    if family in ("echo", "reverse"):
        x = r.sample(WORDS, r.randint(3, 6))
        return x, {}, x[::-1] if family == "reverse" else x, len(x)
    if family == "pick":
        x, (a, b) = r.sample(WORDS, 4), r.sample(range(4), 2)
        return x, dict(a=a + 1, b=b + 1), [x[a], "and", x[b]], 2
    if family == "sort":
        x = r.sample(LETTERS, r.randint(3, 6))
        return x, {}, sorted(x), len(x)
    if family == "rank":
        x, n = r.sample(LETTERS, 4), r.randint(1, 4)
        return x, dict(n=n), [sorted(x)[n - 1]], 4
    if family == "larger":
        x = r.sample(range(10, 100), 2)
        return x, {}, [max(x)], 2
    if family == "next":                                 # often with nines at the end: the carry must be seen
        n = r.choice((1, 10, 100)) * r.randint(10, 99) + r.choice((0, 9, 99))
        return [n], {}, [n + 1], len(str(n)) - len(str(n).rstrip("9"))
    if family == "sort by":                              # words by their letters: look up, compare, look up
        words, keys = r.sample(WORDS, 3), r.sample(LETTERS, 3)
        return [f"{w} {k}" for w, k in zip(words, keys)], {}, [w for _, w in sorted(zip(keys, words))], 3
    names = r.sample(NAMES, 4 if family == "path" else 5)     # follow links of names, in "jump" two at a time
    links = [f"{a} {b}" for a, b in zip(names, names[1:])]
    r.shuffle(links)
    return links, dict(n=names[0]), names[::1 if family == "path" else 2], len(links)


def embedded(n, seed=0, split="train"):
    """n examples of the embedded set. Train and test share no underlying input, whatever its phrasing."""
    r, examples = random.Random(f"{split} {seed}"), []
    families = [*FAMILIES, *2 * ("sort by", "path")]     # learned last, so three times as many
    while len(examples) < n:
        family = r.choice(families)
        x, fields, y, level = question(family, r)
        words = sorted(" ".join(map(str, x)).split())    # the same words in another order: the same input
        if (zlib.crc32(f"{family} {words}".encode()) % 8 == 0) == (split == "test"):
            between, phrasings, answer = FAMILIES[family]
            fields |= dict(x=between.join(map(str, x)), y=" ".join(map(str, y)))
            instruction, _, given = r.choice(phrasings).format(**fields).partition("|")
            examples.append(dict(instruction=instruction, input=given, output=answer.format(**fields),
                                 group=f"{family} {level}"))
    return examples


def train_tokenizer(vocab_size=512):
    """sentencepiece BPE on the embedded set, with LLaMA's ids; each part of the template is one piece."""
    texts = [t for e in embedded(20000) for t in (prompt_text(e), e["output"])]
    model = io.BytesIO()
    # U+2581 is how sentencepiece spells a space; the first one is the space it puts before every text.
    pieces = [s.replace(" ", "\u2581") for s in (" " + WITH_INPUT, " " + NO_INPUT, INPUT, RESPONSE)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=vocab_size,
        hard_vocab_limit=False, character_coverage=1.0, byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, user_defined_symbols=pieces,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, minloglevel=2)
    return Tokenizer(model.getvalue())


if __name__ == "__main__":
    for split, n in SIZES.items():
        lines = "".join(json.dumps(e) + "\n" for e in embedded(n, split=split))
        (TINY / f"{split}.jsonl.gz").write_bytes(gzip.compress(lines.encode(), 9, mtime=0))
    (TINY / "tokenizer.model").write_bytes(train_tokenizer().model_bytes)
