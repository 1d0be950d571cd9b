"""The command line that the commands share: flags, errors of one line, devices. None of it is LITE."""
import math
import os
import re
import sys
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from contextlib import suppress

import torch

from model import InputError


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


FLAGS = {
    "--ckpt": dict(metavar="DIR", help="Meta-format folder or train.py's output (default: out, else tiny)"),
    "--data": dict(metavar="FILE", nargs="+", help="Alpaca-format .json or .jsonl, or one of the test sets"),
    "--exits": dict(metavar="N,N..", type=number(int, 1, many=True), help="blocks run at each exit (default: "
                    "the checkpoint's, else every 4th from 8; below 16 layers every 2nd)"),
    "--threshold": dict(metavar="X[,X..]", type=number(float, 0, 1, many=True), help="confidence above "
                        "which to leave, for all exits or one each; 1: never (default: lite.json's, else 1)"),
    "--shortlist": dict(metavar="N", type=number(int, 0), help="check exits on N frequent tokens, of "
                        "lite.json's, and the context's; 0: on all V (default: its check, else its list)"),
    "--max-new-tokens": dict(type=number(int, 1), metavar="N", help="tokens generated at most"),
    "--draft": dict(type=number(int, 1), metavar="N", help="tokens drafted at most, if no doubt ends it"),
    "--temperature": dict(type=number(float, 0), metavar="X", help="0: greedy; else it divides the logits"),
    "--top-p": dict(type=number(float, 1e-9, 1), metavar="X", help="share of probability to draw from"),
    "--seed": dict(type=number(int, 0, 2**63 - 1), metavar="N", help="of everything random"),
    "--dtype": dict(choices=("float32", "bfloat16"), help="of weights (default: float32, on a GPU bfloat16)"),
    "--device": dict(help="cpu, cuda or cuda:N (default: cuda where there is one)"),
    "--limit": dict(type=number(int, 1), metavar="N", help="use N examples, evenly spaced, of each file; of the embedded set (not in training) the first"),
    "--copying": dict(type=number(float, 0, 1), metavar="X", help="share of response tokens that leave early in "
                      "training, too: those after them attend to copies, as in decoding (not in the paper)"),
    "--no-lite": dict(action="store_true", help="plain tuning: the last layer's loss alone"),
    "--activation-checkpointing": dict(action="store_true", help="compute blocks twice, to save memory"),
    "--by-layers": dict(action="store_true", help="--calibrate for few layers, not for few bytes of weights"),
    "--json": dict(action="store_true", help="print results for machines, on the last lines of stdout"),
}


class Parser(ArgumentParser):
    """argparse with the script's docstring as help, shared flags by name, and errors of one line."""

    def __init__(self, doc):
        super().__init__(description=doc, allow_abbrev=False, formatter_class=RawDescriptionHelpFormatter)

    def add(self, flag, default=None, **more):
        """Add a flag: its meaning comes from FLAGS unless given here, its default is the script's."""
        spec = {**FLAGS.get(flag, {}), **more}
        if default is not None:
            spec["help"] += f" (default: {default})"
        self.add_argument(flag, default=default, **spec)

    def error(self, message):
        """What argparse calls on a bad flag."""
        raise InputError(f"{message} (--help explains the flags)")


def run(main):
    """Call main(). What the user can mend is one line on stderr and exit code 2; a traceback is our bug."""
    try:
        main()
    except BrokenPipeError:                              # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InputError, OSError) as e:
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
