"""What comes in: the tokenizer, Alpaca's format and prompts, the test sets, batches; and the command line.

    python data.py                 # fetch Alpaca and the four instruction test sets into data/

An example is a dict: instruction, input (may be ""), output (None in a set of prompts) and group, its family
or category.  A prompt is BOS + template; the loss is on response + EOS alone.  The embedded set is in tiny/.
"""
import gzip, http.client, json, math, os, random, re, sys, urllib.request, zlib
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from contextlib import suppress
from pathlib import Path

import sentencepiece
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

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
        known = [i for i in after if i < self.size]      # models may have more rows, which mean nothing
        return self.sp.decode(known + [i for i in ids if i < self.size])[len(self.sp.decode(known)):]

def prompt_text(example):
    """Alpaca's prompt for an example: its template with an input, or the one without."""
    asked, given = example["instruction"], example["input"]
    return (WITH_INPUT + asked + INPUT + given if given else NO_INPUT + asked) + RESPONSE

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
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as e:
        found = "no such file" if isinstance(e, FileNotFoundError) else e
        raise InputError(f"{path}: {found}; `python data.py` fetches Alpaca and the test sets") from None
    whole, examples, n = text.lstrip().startswith("["), [], 1
    try:
        for n, row in enumerate(json.loads(text) if whole else text.split("\n"), 1):
            if whole or row.strip():
                examples.append(read_row(row := row if whole else json.loads(row)))
    except (ValueError, RecursionError) as e:
        at, why = n + getattr(e, "lineno", 1) - 1, getattr(e, "msg", e)
        raise InputError(f"{path}, line {at}: not JSON ({why}); expected a list or objects by line") from None
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
    except (OSError, ValueError, http.client.HTTPException, InputError) as e:
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
        raise InputError(f"every example's prompt fills {max_len} tokens (train.py: --max-len); raise it")
    return rows

def batches(rows, batch_size, seed, epoch):
    """One epoch: every row's index once, in seeded order, each batch by length: micro-batches pad little.
    (Batches of like length would train worse.)  A function of its arguments: ranks and resumed runs agree."""
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

def number(kind, low, high=math.inf, many=False):
    """An argparse type: an int or float from low to high, or a list of them that was separated by commas."""
    def parse(text):
        with suppress(ValueError):
            values = [kind(x) for x in text.split(",")]
            if all(low <= x <= high and x < math.inf for x in values) and (many or len(values) == 1):
                return values if many else values[0]
        span = f"{kind.__name__}{',..' * many} from {low}" + (f" to {high}" if high < math.inf else " up")
        raise ArgumentTypeError(f"{text} given; expected {span}")
    return parse

FLAGS = {  # those that several scripts have
    "--ckpt": dict(metavar="DIR", help="Meta-format folder or train.py's output (default: out, else tiny)"),
    "--data": dict(metavar="FILE", nargs="+", help="Alpaca-format .json or .jsonl, or one of the test sets"),
    "--limit": dict(type=number(int, 1), metavar="N", help="N of each file, evenly spaced (embedded: first)"),
    "--exits": dict(metavar="N,N..", type=number(int, 1, many=True), help="blocks run at each exit (default: "
                    "the checkpoint's, else every 4th from 8; below 16 layers every 2nd)"),
    "--threshold": dict(metavar="X[,X..]", type=number(float, 0, 1, many=True), help="confidence above "
                        "which to leave, for all exits or one each; 1: never (default: lite.json's, else 1)"),
    "--recompute": dict(action="store_true", help="no copies: skipped layers run, beside a later token"),
    "--shortlist": dict(metavar="N", type=number(int, 0), help="check exits on N frequent tokens, of "
                        "lite.json's, and the context's; 0: on all V (default: its check, else its list)"),
    "--max-new-tokens": dict(type=number(int, 1), metavar="N", help="tokens generated at most"),
    "--draft": dict(type=number(int, 1), metavar="N", help="with --verify: tokens drafted a round, at most"),
    "--seed": dict(type=number(int, 0, 2**63 - 1), metavar="N", help="of everything random"),
    "--dtype": dict(choices=("float32", "bfloat16"), help="of weights (default: float32, on a GPU bfloat16)"),
    "--device": dict(help="cpu, cuda or cuda:N (default: cuda where there is one)")}

class Parser(ArgumentParser):
    """argparse with the script's docstring as help, shared flags by name, and errors of one line."""

    def __init__(self, doc):
        super().__init__(description=doc, allow_abbrev=False, formatter_class=RawDescriptionHelpFormatter)

    def add(self, flag, default=None, **more):
        """Add a flag: its meaning comes from FLAGS unless given here, its default is the script's."""
        spec = {**FLAGS.get(flag, {}), **more}
        if default is not None:
            spec |= dict(default=default, help=f"{spec['help']} (default: {default})")
        self.add_argument(flag, **spec)

    def error(self, message):                            # argparse calls it on a bad flag
        raise InputError(f"{message} (--help explains the flags)")

def run(main):
    """Call main(). What the user can mend is one line on stderr and exit code 2; a traceback is our bug."""
    try:
        main()
    except BrokenPipeError:                              # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InputError, OSError, torch.OutOfMemoryError) as e:
        if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(e, OSError):    # a rank's own, perhaps
            print("error:", " ".join(str(e).split("\n")), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)

def pick_device(name=None):
    """The torch.device to run on; under torchrun each process of a machine gets a GPU of its own."""
    name, found = name or ("cuda" if torch.cuda.is_available() else "cpu"), torch.cuda.device_count()
    rank, n = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name) or n > 1 and ":" in name:
        raise InputError(f"--device {name}: expected cpu, cuda or, for a single process, cuda:N")
    if name != "cpu" and (n if name == "cuda" else int(name[5:]) + 1) > found:
        raise InputError(f"--device {name}: found {found} CUDA devices for {n} process(es); try --device cpu")
    return torch.device(f"cuda:{rank}" if name == "cuda" else name)

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
