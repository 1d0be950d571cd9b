"""Kill a training run, kill -9, at random moments; resume it each time; at the end it must equal one never killed.

    python tests/kill.py                       # 10 kills, 2 processes, 200 steps with a save after each: 2 minutes
    python tests/kill.py --kills 3 --processes 1

On Linux: it finds the ranks, which torchrun starts in sessions of their own, by what /proc says of them.
"""
import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def processes(word):
    """The ids of processes with `word` in their command line, without torchrun's agents and this one."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode()
        except OSError:                                  # it ended meanwhile
            continue
        if str(word) in command and "torch.distributed.run" not in command and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def environ(pid):
    """The NAME=value strings that a process was started with."""
    return Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    r, folder = random.Random(args.seed), Path(tempfile.mkdtemp())
    settings = f"--steps {args.steps} --batch-size 8 --micro-batch-size 4 --val 8 --save-every 1".split()
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.processes)]

    def launch(out, *flags):
        return subprocess.Popen([*start, str(ROOT / "train.py"), *flags, "--out", str(out)], stdout=subprocess.DEVNULL,
                                stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def finish(process):
        if error := process.communicate()[1] if process.wait() else "":
            sys.exit(error)

    finish(launch(folder / "straight", *settings))
    run, killed = folder / "run", 0
    while killed < args.kills:
        process = launch(run, *(["--resume"] if (run / "latest").exists() else settings))
        before = os.readlink(run / "latest") if (run / "latest").exists() else "nothing"
        while (os.readlink(run / "latest") if (run / "latest").exists() else "nothing") == before:
            if process.poll() is not None:
                sys.exit(process.communicate()[1])
            time.sleep(0.05)
        time.sleep(r.uniform(0, 1.5))
        if process.poll() is not None:
            print("the run ended before its next kill: give more --steps")
            break
        process.kill()
        for pid in processes(run):
            os.kill(pid, signal.SIGKILL)
        process.wait()
        killed += 1
        left = sorted(p.name for p in run.iterdir() if p.name not in ("latest", "log.jsonl"))
        print(f"kill {killed}: latest is {os.readlink(run / 'latest')}; beside it {', '.join(left)}", flush=True)
    finish(launch(run, "--resume"))
    same = all(all(torch.equal(a[name][key], b[name][key]) for name in a for key in a[name]) for a, b in (
        [torch.load(folder / which / "latest" / f"optimizer.{rank:02d}.pt") for which in ("straight", "run")]
        for rank in range(args.processes)))
    print(f"{killed} kills; masters and moments {'equal' if same else 'DIFFER FROM'} the uninterrupted run's, bit for bit")
    sys.exit(not same)


if __name__ == "__main__":
    main()
