"""More than one device: torchrun starts the program once for each, as ranks 0, 1, …; without it there is one rank.

Data parallel: every rank holds the whole model and reads its share of each mini-batch. Sharded: besides, each tensor is
split by rows over the ranks (torch's FSDP2), as a DTensor. For one rank, and for an ordinary tensor, the functions here
do nothing.
"""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from .files import UserError

# ---- ranks ---------------------------------------------------------------------------------------------------------


def join_ranks(limit=timedelta(minutes=30)):
    """Become one of torchrun's ranks. Only rank 0 prints; errors go to stderr on any of them.

    limit: of waiting for another rank. A dead one closes its connections, which the others notice at once, so this is
    for one that hangs. Half an hour leaves time to write a large checkpoint.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=limit)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")


def wait_for_ranks():
    """Return when all ranks have come here."""
    if dist.is_initialized():
        dist.barrier()


def leave_ranks(code=0, wait=True):
    """End this process if it is one of several ranks; wait: when all of them have come here.

    This skips Python's own exit. There gloo's threads abort about one process in fifty ("terminate called without an
    active exception", torch 2.13), and torchrun would report a finished run as a failure.
    """
    if dist.is_initialized():
        if wait:
            wait_for_ranks()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def world():
    """The number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def launcher():
    """How the program was started, for a message that says how to start it again."""
    return "python" if world() == 1 else f"torchrun --standalone --nproc-per-node={world()}"


def lost_rank(error):
    """Whether a RuntimeError says that another rank is gone; gloo's have no class of their own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def from_first(function, *args):
    """What function(*args) returns on rank 0, on every rank. If it raises there, the others exit quietly."""
    if world() == 1:
        return function(*args)
    message = [None, "failed"]  # the result, and how it went
    try:
        if rank() == 0:
            message = [function(*args), "done"]
    finally:
        dist.broadcast_object_list(message)
    if message[1] == "failed":  # rank 0 says what is wrong and goes; then this one may go, too
        try:
            wait_for_ranks()
        finally:
            os._exit(2)
    return message[0]


def first_then_others(function):
    """What function() returns, on every rank its own. Rank 0 goes first, and prepares what the others then find."""
    mine = []
    from_first(lambda: mine.append(function()))
    return mine[0] if mine else function()


def share(count):
    """This rank's part of range(count), as a range. Raises UserError where the ranks cannot share it equally."""
    if count % world():
        raise UserError(f"{count} sequences an update cannot be shared equally by {world()} ranks: make --batch-size "
                        f"times --grad-accum a multiple of {world()}")
    size = count // world()
    return range(rank() * size, (rank() + 1) * size)


def average(*tensors):
    """Replace tensors by their mean over the ranks. FSDP has averaged the gradients of sharded tensors already."""
    if world() > 1:
        whole_ones = [tensor for tensor in tensors if not sharded(tensor)]
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in whole_ones]:
            work.wait()
        torch._foreach_div_(whole_ones, world())


def any_rank(flag):
    """Whether `flag` is true on any rank: the same answer on all of them."""
    raised = torch.tensor(float(flag))
    if world() > 1:
        dist.all_reduce(raised, dist.ReduceOp.MAX)
    return bool(raised)


# ---- sharded tensors -----------------------------------------------------------------------------------------------


def sharded(tensor):
    """Whether a tensor is split over the ranks."""
    return hasattr(tensor, "to_local")  # importing the class DTensor would take as long as importing torch


def local(tensor):
    """The part of a tensor that this rank holds, sharing its memory."""
    return tensor.to_local() if sharded(tensor) else tensor


def whole(tensor):
    """All of a tensor, gathered on every rank. Where it is sharded every rank must call this, in the same order."""
    return tensor.full_tensor() if sharded(tensor) else tensor


def split_like(p, full):
    """The tensor `full` on p's device, split as p is."""
    full = full.to(p.device)
    if not sharded(p):
        return full
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(full, p.device_mesh, p.placements, src_data_rank=None)


@torch.no_grad()
def assign(p, full):
    """Copy the tensor `full`, of p's whole shape, into p."""
    p.copy_(split_like(p, full))


def count(mask):
    """The number of True entries of a bool tensor, over all ranks."""
    number = local(mask).count_nonzero()  # on a CPU, 25 times as fast as sum()
    if sharded(mask):
        dist.all_reduce(number)
    return int(number)


def writes(tensors):
    """Whether this rank has a part in writing `tensors`: rank 0 writes, and gathers sharded ones from all."""
    return rank() == 0 or any(map(sharded, tensors))


def place(build, device, shard):
    """(the model that build(device) gives, how the ranks hold it in words); shard: each holds some rows of each tensor.

    While a model is sharded no rank ever holds all of it. FSDP gathers a block when it is needed and averages its
    gradient after each micro-batch: a sum of gradients over micro-batches would have to be kept whole on every rank.
    """
    if world() == 1:
        return build(device), ""
    if not shard:
        return build(device), f", {world()} ranks"
    from torch.distributed.fsdp import fully_shard  # takes as long to import as torch

    model = build("meta")
    mesh = dist.init_device_mesh(device.type, (world(),))
    for part in (*model.blocks(), model):
        fully_shard(part, mesh=mesh)
    model.to_empty(device=device)
    model.tie()
    return model, f", {world()} ranks hold a share each"


def memory_per_rank(model, ranks=1, **more):
    """{what: bytes} that each rank keeps to train `model` in fp32 with AdamW.

    model: on any device; on "meta" it takes no memory itself. more: what else, in bytes a parameter, as in mask=1.
    With ranks > 1 the tensors are sharded, and "gathered" estimates what FSDP keeps whole for a moment: the weights and
    gradients of the root (embedding and head), and a copy of those gradients or the weights of two blocks and the
    gradients of one. Activations come on top.
    """
    share = sum(-(-len(p) // ranks) * (p.numel() // len(p)) for p in model.parameters())
    block = sum(p.numel() for p in model.blocks()[0].parameters())
    root = sum(p.numel() for p in model.parameters()) - block * len(model.blocks())
    gathered = 4 * (2 * root + max(root, 3 * block)) if ranks > 1 else 0
    kept = {"weights": 4, "gradients": 4, "moments": 8, **more}
    return {what: size * share for what, size in kept.items()} | {"gathered": gathered}
