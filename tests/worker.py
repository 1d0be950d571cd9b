"""What the tests run under torchrun, and in one process for comparison: a few steps on a small model.

    torchrun --nproc-per-node 2 worker.py RESULT DTYPE MICRO STEPS
"""
import gc
import os
import sys
from types import SimpleNamespace

import torch
import torch.distributed as dist

from conftest import random_model
import train as T

EXITS = [2, 4]


def rows():
    """43 rows of many lengths: the last batch of an epoch of 8s has 3, so that ranks are left without rows."""
    g = torch.Generator().manual_seed(0)
    return [(torch.randint(3, 96, (6 + i * 5 % 17,), generator=g).tolist(), 2 + i % 3) for i in range(43)]


def steps(dtype, micro, n, rank=0, world=1):
    """n of train.py's steps. Returns the second one's losses and (clipped) gradients, then the weights."""
    torch.manual_seed(0)
    model = random_model(dtype=dtype).train()
    args = SimpleNamespace(exits=EXITS, weights=[1.0, 0.5, 2.0], copying=0.5, micro_batch_size=micro, weight_decay=0.1, lr=1e-3,
                           choices=0.5 * (dtype == torch.float64),       # in fp32 the cut may turn a near-tie
                           head_lr=2.0, warmup=0.1, steps=n, batch_size=8, seed=1, clip=1.0)
    for p in model.parameters() if rank else ():         # rank 0's weights count
        p.data.add_(1)
    ddp, data, places = T.distribute(model, EXITS, world), rows(), {}
    teacher = random_model(1, dtype).requires_grad_(False) if dtype == torch.float64 else None
    optimizer = T.optimizer_for(model, args, world)

    def remember(*_):                                    # where each gradient lies, at every micro-batch but a step's first
        for name, p in model.named_parameters():
            places.setdefault(name, set()).update([] if p.grad is None else [p.grad.data_ptr()])

    ddp.register_forward_pre_hook(remember)
    # A last batch of 1 first: one rank has a row, the others run one of weight zero.
    plan = [[5], *(b for epoch in range(9) for b in T.batches(data, 8, 1, epoch))]
    losses, grads, sizes = [], [], []

    def look(*_):                                        # between a step and zero_grad
        remember()
        grads.append({k: p.grad.clone() for k, p in model.named_parameters()})
        state = T.optimizer_state(model, optimizer)
        sizes.append(dict(weights=size_of(model.parameters()), gradients=size_of(p.grad for p in model.parameters()),
                          optimizer=size_of((t for s in state.values() for t in s.values()), model.parameters())))

    optimizer.register_step_post_hook(look)
    for step in range(n):
        losses.append(T.update(ddp, optimizer, data, plan[step], step, args, rank, world, teacher if step % 2 else None)[0])
    return dict(losses=losses[1], grads=grads[1], weights=model.state_dict(), places=max(len(x) for x in places.values()),
                size=sizes[-1], owned=list(T.optimizer_state(model, optimizer)))


def size_of(tensors, apart=()):
    """Bytes of the memory under the tensors, each piece once, without what lies under `apart`."""
    pieces, others = ({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in ts} for ts in (tensors, apart))
    return sum(n for place, n in pieces.items() if place not in others)


if __name__ == "__main__":
    out, dtype, micro, n = sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    result = steps(dtype, micro, n, dist.get_rank(), dist.get_world_size())
    torch.save(result, f"{out}.{os.environ['RANK']}")
    gc.collect()                                         # `look` and the optimizer know each other, and it the group
    dist.destroy_process_group()
    threads = [open(f"/proc/self/task/{t}/comm").read() for t in os.listdir("/proc/self/task")]
    assert not any("gloo" in name for name in threads), threads             # one alive now may abort Python's end
