"""Everything that becomes tokens: the tokenizer, Alpaca's format and prompts, the test sets, batches.

    python data.py                 # fetch Alpaca and the four instruction test sets into data/

An example is a dict: instruction, input (may be ""), output (None in a set of prompts) and group, its family
or category.  A prompt is BOS + template; the loss is on response + EOS alone.  The embedded set, without
download, lies in tiny/: questions whose answers need different amounts of computation.
"""
import gzip
import json
import random
import re
import sys
import urllib.request
from pathlib import Path

import sentencepiece
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from docs.cli import Parser, run
from model import IGNORE, InputError

TINY_FOLDER = Path(__file__).parent / "tiny"              # the embedded model, its tokenizer and questions
PREAMBLE = "Below is an instruction that describes a task"
REQUEST = " Write a response that appropriately completes the request.\n\n### Instruction:\n"
WITH_INPUT = PREAMBLE + ", paired with an input that provides further context." + REQUEST
NO_INPUT = PREAMBLE + "." + REQUEST
INPUT, RESPONSE = "\n\n### Input:\n", "\n\n### Response:"


class Tokenizer:
    """sentencepiece as Meta ships it. No token is ever added: pads are any id, with the label IGNORE."""

    def __init__(self, model_bytes, name="tokenizer.model"):
        self.sp, self.model_bytes = sentencepiece.SentencePieceProcessor(), model_bytes
        try:
            self.sp.LoadFromSerializedProto(model_bytes)
        except RuntimeError:
            raise InputError(f"{name}: not a sentencepiece model, or cut short; expected Meta's") from None
        self.size, self.bos, self.eos = self.sp.vocab_size(), self.sp.bos_id(), self.sp.eos_id()

    @classmethod
    def load(cls, folder, vocab_size=None):
        """From tokenizer.model in the checkpoint's folder, or in its parent, where Meta puts it."""
        paths = [p / "tokenizer.model" for p in (Path(folder), Path(folder).resolve().parent)]
        path = next((p for p in paths if p.is_file()), None)
        if path is None:
            raise InputError(f"no tokenizer.model in {folder} or its parent; copy Meta's there")
        tokenizer = cls(path.read_bytes(), path)
        if vocab_size and tokenizer.size > vocab_size:
            raise InputError(f"{path}: {tokenizer.size} pieces, but the model has {vocab_size} rows")
        return tokenizer

    def encode(self, text, bos=False, eos=False):
        """Text to a list of ids."""
        return [self.bos] * bos + self.sp.encode(text) + [self.eos] * eos

    def decode(self, ids, after=()):
        """The text that ids add to the text of the ids before them (BOS and EOS have none)."""
        before = self.sp.decode(list(after))
        return self.sp.decode([*after, *ids])[len(before):]


def prompt_text(example):
    """Alpaca's prompt for an example: its template with an input, or the one without."""
    if example["input"]:
        return WITH_INPUT + example["instruction"] + INPUT + example["input"] + RESPONSE
    return NO_INPUT + example["instruction"] + RESPONSE


READERS = {  # the keys that tell a format: Alpaca, Vicuna, Koala, WizardLM, Self-Instruct -> its example
    "instruction output": lambda r: (r["instruction"], r.get("input") or "", r["output"], r.get("group", "")),
    "text category": lambda r: (r["text"], "", None, r["category"]),
    "prompt": lambda r: (r["prompt"], "", None, ""),
    "Instruction Skill": lambda r: (r["Instruction"], "", None, f"{r['Skill']}; level {r['Difficulty']}"),
    "instruction instances": lambda r: (r["instruction"], r["instances"][0]["input"],
                                        r["instances"][0]["output"], r["motivation_app"])}


def read_examples(path, limit=None):
    """Examples from a .json (list) or .jsonl file, in any format of READERS. An InputError names the line.
    With a limit so many of them, evenly spaced, as test sets are sorted by category."""
    path = Path(path)
    try:
        text = (gzip.decompress if path.suffix == ".gz" else bytes)(path.read_bytes()).decode()
    except (OSError, EOFError, UnicodeDecodeError) as e:
        found = "no such file" if isinstance(e, FileNotFoundError) else e
        raise InputError(f"{path}: {found}; `python data.py` fetches Alpaca and the test sets") from None
    whole, examples, n = text.lstrip().startswith("["), [], 1
    try:
        for n, row in enumerate(json.loads(text) if whole else text.split("\n"), 1):
            if whole or row.strip():
                row = row if whole else json.loads(row)
                examples.append(read_row(row))
    except ValueError as e:
        raise InputError(f"{path}, line {n + e.lineno - 1}: not JSON ({e.msg}); expected a list of objects, "
                         "or one object a line") from None
    except (AttributeError, TypeError, KeyError, IndexError):
        found = f"keys {', '.join(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
        raise InputError(f"{path}, {'entry' if whole else 'line'} {n}: found {found}; expected Alpaca's "
                         "instruction, input, output (strings), or a test set's keys") from None
    if not examples:
        raise InputError(f"{path}: empty; expected at least one example")
    n = min(limit or len(examples), len(examples))
    return [examples[i * len(examples) // n] for i in range(n)]


def embedded(n, split="train"):
    """The first n examples of the embedded set; train and test share no underlying input."""
    return read_examples(TINY_FOLDER / f"{split}.jsonl.gz")[:n]


def read_row(row):
    """The example in one record; an AttributeError, TypeError, KeyError or IndexError if it is not one."""
    read = next((f for keys, f in READERS.items() if row.keys() >= set(keys.split())), None)
    example = dict(zip(("instruction", "input", "output", "group"), read(row)))
    if not all(isinstance(v, str) and not re.search("[\ud800-\udfff]", v)                # half of a pair
               for k, v in example.items() if (k, v) != ("output", None)):
        raise TypeError
    return example


SOURCES = {  # file in data/ -> its place on GitHub
    "alpaca_data.json": "tatsu-lab/stanford_alpaca/main/alpaca_data.json",
    "vicuna.jsonl": "lm-sys/vicuna-blog-eval/main/eval/table/question.jsonl",
    "koala.jsonl": "arnav-gudibande/koala-test-set/main/koala_test_set.jsonl",
    "wizardlm.jsonl": "nlpxucan/WizardLM/main/WizardLM/data/WizardLM_testset.jsonl",
    "self_instruct.jsonl": "yizhongw/self-instruct/main/human_eval/user_oriented_instructions.jsonl"}


def fetch(url, path):
    """Download url to path, whole and readable or not at all; a file that is there already is left alone."""
    if path.exists():
        return print(f"{path}: already there")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with tqdm(desc=path.name, unit="B", unit_scale=True, disable=None) as bar:
            urllib.request.urlretrieve(url, part, lambda blocks, size, total: bar.update(size))
        read_examples(part)
        part.rename(path)
    except (OSError, InputError) as e:                   # OSError: fewer bytes came than were announced, too
        raise InputError(f"{url}: {e}; nothing was written, try again") from None
    finally:
        part.unlink(missing_ok=True)


def tokenize(examples, tokenizer, max_len, note=lambda text: print(text, file=sys.stderr)):
    """[(ids, number of prompt ids)]; long responses are cut, prompts that fill max_len dropped, aloud."""
    rows, cut = [], 0
    for e in tqdm(examples, desc="tokenize", leave=False, disable=None, mininterval=1):
        prompt = tokenizer.encode(prompt_text(e), bos=True)
        ids = prompt + tokenizer.encode(e["output"], eos=True)
        cut += len(prompt) < max_len < len(ids)
        if len(prompt) < max_len:
            rows.append((ids[:max_len], len(prompt)))
    for n, fate in (len(examples) - len(rows), "dropped: their prompts fill"), (cut, "cut to"):
        if n:
            note(f"{n} of {len(examples)} examples {fate} {max_len} tokens")
    if not rows:
        raise InputError(f"every example is longer than --max-len {max_len}; raise it")
    return rows


def batches(rows, batch_size, seed, epoch):
    """One epoch: every row's index once, in seeded order, each batch sorted by length, so that micro-batches
    pad little.  (Batches of like length would pad less, and train worse: a step is all short answers, or all
    long.)  A function of its arguments: all ranks, and a resumed run, agree."""
    r, order = random.Random(f"{seed} {epoch}"), list(range(len(rows)))
    r.shuffle(order)
    cuts = [sorted(order[i:i + batch_size], key=lambda j: len(rows[j][0]))
            for i in range(0, len(order), batch_size)]
    r.shuffle(cuts)                                      # the last may be short: it comes anywhere
    return cuts


def share(batch, rank, world, micro):
    """This rank's micro-batches of a global batch: as many on all ranks (DDP needs it), some maybe empty."""
    mine = batch[rank::world]
    return [mine[i:i + micro] for i in range(0, len(batch[::world]), micro)]


def collate(rows, device="cpu"):
    """tokens and labels (B, T): the next token in a response, else IGNORE. No rows: a token without label."""
    rows = rows or [([0, 0], 2)]
    tokens = pad_sequence([torch.tensor(ids[:-1]) for ids, _ in rows], batch_first=True)
    labels = [torch.tensor([IGNORE] * (n_prompt - 1) + ids[n_prompt:]) for ids, n_prompt in rows]
    labels = pad_sequence(labels, batch_first=True, padding_value=IGNORE)
    return tokens.to(device), labels.to(device)


def main():
    """Fetch what is not there yet."""
    parser = Parser(__doc__)
    parser.add("--out", "data", metavar="DIR", help="folder to fetch into")
    parser.add("--base", "https://raw.githubusercontent.com", metavar="URL", help="GitHub, or a mirror")
    args = parser.parse_args()
    for name, place in SOURCES.items():
        fetch(f"{args.base}/{place}", Path(args.out) / name)


if __name__ == "__main__":
    run(main)
