"""Everything that becomes tokens: the tokenizer, Alpaca's format and prompts, the test sets, and a set made here.

    python data.py                 # fetch Alpaca and the four instruction test sets into data/
    python data.py --show 10       # print ten examples of the embedded set, which needs no download

An example is a dict: instruction, input (may be ""), output (None where a set has only prompts) and group, the name of
its family or category.  A prompt is `BOS + template`; the loss is on `response + EOS` alone.  The embedded set has ten
or so families of questions whose answers need different amounts of computation, which is what early exit lives on.
"""
import argparse
import io
import json
import os
import random
import string
import sys
import urllib.request
import zlib
from pathlib import Path

import sentencepiece
import torch
from tqdm import tqdm

from model import IGNORE, InputError

# --- What the scripts share: one vocabulary of flags, and errors of one line ----------------------------------------

FLAGS = {
    "--ckpt": dict(metavar="DIR", help="Meta-format folder (params.json, consolidated.NN.pth, tokenizer.model) or an "
                   "output folder of train.py"),
    "--data": dict(metavar="FILE", nargs="+", help="Alpaca-format .json or .jsonl, or one of the four test sets"),
    "--out": dict(metavar="DIR", help="folder to write the run to"),
    "--exits": dict(metavar="N,N..", type=lambda s: [int(x) for x in s.split(",") if x], help="exit layers, counted in "
                    "blocks run (default: the checkpoint's, else every 4th from 8, every 2nd in models under 16 layers)"),
    "--threshold": dict(metavar="X[,X..]", help="leave at an exit whose confidence is greater than this: one for all "
                        "exits or one each; 0 leaves at the first exit, 1 never does"),
    "--max-new-tokens": dict(type=int, metavar="N", help="tokens generated at most"),
    "--max-len": dict(type=int, metavar="N", help="tokens an example may have, prompt and response together"),
    "--temperature": dict(type=float, metavar="X", help="0 is greedy; otherwise logits are divided by it"),
    "--top-p": dict(type=float, metavar="X", help="sample from the likeliest tokens that hold this share of probability"),
    "--seed": dict(type=int, metavar="N", help="of everything random"),
    "--dtype": dict(choices=("float32", "bfloat16"), help="of the weights in memory"),
    "--device": dict(help="cpu, cuda or cuda:N (default: cuda where there is one)"),
    "--limit": dict(type=int, metavar="N", help="use the first N examples only"),
    "--json": dict(action="store_true", help="print machine-readable results on the last lines of stdout"),
}


class Parser(argparse.ArgumentParser):
    """argparse, with the script's docstring as help, shared flags by name, and errors of one line."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(self, flag, default=None, **more):
        """Add a flag; its meaning comes from FLAGS, its default from the script, and the help states both."""
        spec = {**FLAGS.get(flag, {}), **more}
        if default is not None and spec.get("action") != "store_true":
            spec["help"] += f" (default: {' '.join(default) if isinstance(default, list) else default})"
        self.add_argument(flag, default=False if spec.get("action") == "store_true" else default, **spec)

    def error(self, message):
        raise InputError(f"{message} (--help explains the flags)")


def run(main):
    """Call main(); what the user can mend is one line on stderr and exit code 2, a traceback is a bug of ours."""
    try:
        main()
    except InputError as e:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print("error:", " ".join(str(e).split("\n")), file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:                              # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def pick_device(name=None):
    """The torch.device to run on; InputError if a GPU is asked for and absent."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name}: expected cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA device(s); try --device cpu")
    return device


# --- Tokenizer and prompts -----------------------------------------------------------------------------------------

PREAMBLE = "Below is an instruction that describes a task"
WITH_INPUT = (PREAMBLE + ", paired with an input that provides further context. Write a response that appropriately "
              "completes the request.\n\n### Instruction:\n")
NO_INPUT = PREAMBLE + ". Write a response that appropriately completes the request.\n\n### Instruction:\n"
INPUT, RESPONSE = "\n\n### Input:\n", "\n\n### Response:"


class Tokenizer:
    """sentencepiece as Meta ships it. No token is ever added: pads are any id, with the label IGNORE."""

    def __init__(self, model_bytes, name="tokenizer.model"):
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
            self.model_bytes, self.size = model_bytes, self.sp.vocab_size()
        except (RuntimeError, TypeError):
            self.size = 0
        if not self.size:
            raise InputError(f"{name}: not a sentencepiece model, or cut short; expected Meta's tokenizer.model")
        self.bos, self.eos = self.sp.bos_id(), self.sp.eos_id()

    @classmethod
    def load(cls, folder, vocab_size=None):
        """From tokenizer.model in the checkpoint's folder, or in its parent, where Meta puts it."""
        paths = [p / "tokenizer.model" for p in (Path(folder), Path(folder).resolve().parent)]
        path = next((p for p in paths if p.is_file()), None)
        if path is None:
            raise InputError(f"no tokenizer.model in {folder} or its parent; it comes with Meta's weights: copy it there")
        tokenizer = cls(path.read_bytes(), path)
        if vocab_size and tokenizer.size > vocab_size:
            raise InputError(f"{path}: {tokenizer.size} pieces, but the model has {vocab_size} rows; whose tokenizer is it?")
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


# --- Files: Alpaca's format and the four test sets --------------------------------------------------------------------

READERS = {  # the keys that tell a format -> its example
    ("instruction", "output"): lambda r: (r["instruction"], r.get("input") or "", r["output"], ""),
    ("text", "category"): lambda r: (r["text"], "", None, r["category"]),                                  # Vicuna
    ("prompt",): lambda r: (r["prompt"], "", None, ""),                                                    # Koala
    ("Instruction", "Skill"): lambda r: (r["Instruction"], "", None, f"{r['Skill']}, {r['Difficulty']}"),  # WizardLM
    ("instruction", "instances"): lambda r: (r["instruction"], r["instances"][0]["input"],                 # Self-Instruct
                                             r["instances"][0]["output"], r["motivation_app"])}


def read_examples(path):
    """Examples from one .json (a list) or .jsonl file, in any format of READERS. InputError names file and line."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: {'no such file' if isinstance(e, FileNotFoundError) else e}; `python data.py` fetches "
                         "data/alpaca_data.json and the test sets") from None
    try:
        lines = [s for s in enumerate(text.split("\n"), 1) if s[1].strip()]     # not splitlines: U+2028 may be in a string
        whole = text.lstrip().startswith("[")
        rows = [*enumerate(json.loads(text), 1)] if whole else [(n, json.loads(s)) for n, s in lines]
    except ValueError as e:
        where = f"line {e.lineno}" if whole else f"line {next(n for n, s in lines if not _is_json(s))}"
        raise InputError(f"{path}, {where}: not JSON ({e.msg}); expected a list of objects, or one object a line") from None
    examples = []
    for n, row in rows:
        read = next((f for keys, f in READERS.items() if isinstance(row, dict) and all(k in row for k in keys)), None)
        try:
            example = dict(zip(("instruction", "input", "output", "group"), read(row)))
            if not all(isinstance(v, str) for k, v in example.items() if not (k == "output" and v is None)):
                raise TypeError
        except (TypeError, KeyError, IndexError):
            found = f"keys {', '.join(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
            raise InputError(f"{path}, {'entry' if whole else 'line'} {n}: found {found}; expected Alpaca's instruction, "
                             "input, output (strings), or a test set's keys") from None
        examples.append(example)
    if not examples:
        raise InputError(f"{path}: empty; expected at least one example")
    return examples


def _is_json(text):
    try:
        return json.loads(text) is not None
    except ValueError:
        return False


SOURCES = {  # file in data/ -> its place on GitHub
    "alpaca_data.json": "tatsu-lab/stanford_alpaca/main/alpaca_data.json",
    "vicuna.jsonl": "lm-sys/vicuna-blog-eval/main/eval/table/question.jsonl",
    "koala.jsonl": "arnav-gudibande/koala-test-set/main/koala_test_set.jsonl",
    "wizardlm.jsonl": "nlpxucan/WizardLM/main/WizardLM/data/WizardLM_testset.jsonl",
    "self_instruct.jsonl": "yizhongw/self-instruct/main/human_eval/user_oriented_instructions.jsonl"}


def fetch(url, path):
    """Download url to path, atomically and checked to be readable; a file that is there already is left alone."""
    path = Path(path)
    if path.exists():
        return print(f"{path}: already there")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with urllib.request.urlopen(url, timeout=60) as reply, part.open("wb") as f:
            size = int(reply.headers.get("Content-Length") or 0)
            with tqdm(total=size or None, unit="B", unit_scale=True, desc=path.name) as bar:
                while block := reply.read(1 << 16):
                    f.write(block)
                    bar.update(len(block))
            if size and f.tell() != size:
                raise OSError(f"{f.tell()} of {size} bytes came")
        read_examples(part)
        part.rename(path)
    except (OSError, InputError) as e:
        raise InputError(f"{url}: {e}; nothing was written, try again") from None
    finally:
        part.unlink(missing_ok=True)


# --- The embedded set: questions made by rule, so that they never run out ----------------------------------------------

WORDS = "bat bed box bus cap cat cup dog hat hen jar key map pen pig pot rat sun".split()
NAMES = "Ann Ben Dan Eve Gus Ian Jon Kim".split()
COLOURS = "red blue pink tan".split()
LETTERS = "abcdefghijklmnop"


def _echo(r):
    x = r.sample(WORDS, r.randint(3, 4))
    return "echo", dict(x=" ".join(x)), " ".join(x)


def _nth(r):
    x, n = r.sample(WORDS, 4), r.randrange(4)
    return "nth", dict(x=" ".join(x), n=n + 1), x[n]


def _colour(r):
    things, colours = r.sample(WORDS, 3), r.sample(COLOURS, 3)
    n = r.randrange(3)
    return "colour", dict(x=", ".join(f"{c} {t}" for t, c in zip(things, colours)), n=things[n]), colours[n]


def _larger(r):
    a, b = r.sample(range(10, 100), 2)
    return "larger", dict(x=f"{a} and {b}"), max(a, b)


def _count(r):
    word, *others = r.sample(WORDS, 3)
    n = r.randint(1, 4)
    x = [word] * n + r.choices(others, k=5 - n)
    r.shuffle(x)
    return "count", dict(x=" ".join(x), n=word), n


def _reverse(r):
    x = r.sample(WORDS, r.randint(3, 4))
    return f"reverse {len(x)}", dict(x=" ".join(x)), " ".join(reversed(x))


def _sort(r):
    x = r.sample(LETTERS, r.randint(3, 5))
    return f"sort {len(x)}", dict(x=" ".join(x)), " ".join(sorted(x))


def _sum(r):
    a, b = r.randint(10, 89), r.randint(10, 89)
    return "sum, carry" if a % 10 + b % 10 > 9 else "sum", dict(x=f"{a} and {b}"), a + b


def _chain(r):
    names, n = r.sample(NAMES, 4), r.randint(1, 3)
    x = [f"{a} calls {b}" for a, b in zip(names, names[1:])]
    r.shuffle(x)
    return f"chain {n}", dict(x=", ".join(x), n=names[0], m=n), names[n]


FAMILIES = {  # maker: its phrasings (after "|" stands the input), and the answer
    _echo: (["Repeat {x}.", "Say {x} again.", "Repeat the words.|Words {x}"], "The words are {y}."),
    _nth: (["Give word {n} of {x}.", "Which is word {n} in {x}?", "Give word {n}.|Words {x}"], "Word {n} is {y}."),
    _colour: (["Given {x}, which colour is the {n}?", "Say the colour of the {n} in {x}.",
               "Give the colour of the {n}.|Given {x}"], "The {n} is {y}."),
    _larger: (["Which is larger, {x}?", "Give the larger of {x}.", "Say which is larger.|Given {x}"], "The larger is {y}."),
    _count: (["Count {n} in {x}.", "Say the count of {n} in {x}.", "Count the word {n}.|Words {x}"], "The count of {n} is {y}."),
    _reverse: (["Reverse {x}.", "Say {x} in reverse.", "Reverse the words.|Words {x}"], "In reverse, {y}."),
    _sort: (["Sort {x}.", "Say {x} in order.", "Sort the letters.|Given {x}"], "In order, {y}."),
    _sum: (["Sum {x}.", "Which is the sum of {x}?", "Give the sum.|Given {x}"], "The sum of {x} is {y}."),
    _chain: (["Given {x}, follow {m} from {n}.", "Follow {m} calls from {n} in {x}.", "Follow {m} from {n}.|Given {x}"],
             "From {n} it is {y}."),
}


def embedded(n, seed=0, split="train"):
    """n examples of the embedded set. Train and test never share an underlying input, whatever its phrasing."""
    r, makers, examples = random.Random(f"{split} {seed}"), list(FAMILIES), []
    while len(examples) < n:
        make = r.choice(makers)
        group, fields, answer = make(r)
        words = sorted(fields["x"].replace(",", "").split())         # a + b is b + a: the order makes no new input
        if (zlib.crc32(f"{make.__name__} {words}".encode()) % 8 == 0) != (split == "test"):
            continue
        phrasings, response = FAMILIES[make]
        instruction, _, given = r.choice(phrasings).format(**fields).partition("|")
        examples.append(dict(instruction=instruction, input=given, output=response.format(y=answer, **fields), group=group))
    return examples


def train_tokenizer(vocab_size=512):
    """sentencepiece BPE on the embedded set, with LLaMA's ids; each part of the template is one piece."""
    texts = [t for e in embedded(20000) for t in (prompt_text(e), e["output"])]
    model = io.BytesIO()
    # U+2581 is how sentencepiece spells a space; the first one is the space it puts before every text.
    pieces = [s.replace(" ", "\u2581") for s in (" " + WITH_INPUT, " " + NO_INPUT, INPUT, RESPONSE)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=vocab_size, hard_vocab_limit=False,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        user_defined_symbols=pieces, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, character_coverage=1.0, num_threads=1, minloglevel=2)
    return Tokenizer(model.getvalue())


# --- Batches -----------------------------------------------------------------------------------------------------------


def tokenize(examples, tokenizer, max_len, note=print):
    """[(ids, number of prompt ids)]; responses are cut at max_len, prompts that fill it dropped, both counted aloud."""
    rows, cut = [], 0
    for e in tqdm(examples, desc="tokenize", leave=False, disable=None, mininterval=1):
        prompt = tokenizer.encode(prompt_text(e), bos=True)
        ids = prompt + tokenizer.encode(e["output"], eos=True)
        cut += len(prompt) < max_len < len(ids)
        if len(prompt) < max_len:
            rows.append((ids[:max_len], len(prompt)))
    if dropped := len(examples) - len(rows):
        note(f"{dropped} of {len(examples)} examples dropped: the prompt alone has --max-len {max_len} tokens or more")
    if cut:
        note(f"{cut} of {len(examples)} examples cut to --max-len {max_len} tokens")
    if not rows:
        raise InputError(f"every example is longer than --max-len {max_len}; raise it")
    return rows


def batches(rows, batch_size, seed, epoch, window=16):
    """One epoch: every row's index once, in batches of rows of like length, in seeded order.

    Rows are shuffled, sorted by length within windows of `window` batches, and the batches shuffled again: little
    padding, and still every batch mixes what the set holds.  A pure function of its arguments: a resumed run and any
    number of ranks see the same batches.
    """
    r, order = random.Random(f"{seed} {epoch}"), list(range(len(rows)))
    r.shuffle(order)
    span = batch_size * window
    for i in range(0, len(order), span):
        order[i:i + span] = sorted(order[i:i + span], key=lambda j: len(rows[j][0]))
    cuts = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    r.shuffle(cuts)
    return cuts


def share(batch, rank, world, micro):
    """This rank's micro-batches of a global batch: as many on every rank (DDP needs equal calls), perhaps empty."""
    mine = batch[rank::world]
    return [mine[i:i + micro] for i in range(0, len(batch[::world]), micro)]


def collate(rows, device="cpu"):
    """tokens and labels (B, T): labels are the next tokens where these belong to a response, IGNORE elsewhere.

    No rows make one of weight zero: a token without a label.
    """
    rows = rows or [([0, 0], 2)]
    tokens = torch.zeros(len(rows), max(len(ids) for ids, _ in rows) - 1, dtype=torch.long)
    labels = torch.full_like(tokens, IGNORE)
    for t, l, (ids, n_prompt) in zip(tokens, labels, rows):
        t[:len(ids) - 1] = torch.tensor(ids[:-1])
        l[n_prompt - 1:len(ids) - 1] = torch.tensor(ids[n_prompt:])
    return tokens.to(device), labels.to(device)


def main():
    parser = Parser(__doc__)
    parser.add("--out", "data", help="folder to fetch into")
    parser.add("--base", "https://raw.githubusercontent.com", metavar="URL", help="where the GitHub files are mirrored")
    parser.add("--show", type=int, metavar="N", help="print N examples of the embedded set instead")
    args = parser.parse_args()
    if args.show:
        for e in embedded(args.show, split="test"):
            print(f"[{e['group']}]  {e['instruction']}" + (f"  |  {e['input']}" if e["input"] else "") + f"\n    {e['output']}")
        return
    for name, place in SOURCES.items():
        fetch(f"{args.base}/{place}", Path(args.out) / name)


if __name__ == "__main__":
    run(main)
