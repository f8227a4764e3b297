"""Sequences in micro-batches that fit the memory, and their gradient and loss, on all ranks together."""

import math
import time

import torch

from .parallel import average, share, world


class Reader:
    """Reads sequences of a packed text as micro-batches; of a mini-batch, each rank reads its share."""

    def __init__(self, blocks, batch_size, block_size, device):
        """blocks: data.pack's Blocks; batch_size: sequences in a micro-batch, at most; block_size: tokens in one."""
        self.blocks, self.batch_size, self.block_size, self.device = blocks, batch_size, block_size, device

    def micro_batches(self, numbers):
        """[token ids (b, T)] of the sequences with these numbers, a range. Raises UserError: see share()."""
        mine = share(len(numbers))
        numbers = numbers[mine.start:mine.stop]
        pieces = [numbers[start:start + self.batch_size] for start in range(0, len(numbers), self.batch_size)]
        return [self.blocks.read(piece[0], len(piece), self.block_size).to(self.device) for piece in pieces]

    def held_out(self, most):
        """The first sequences of a text, `most` of them or as many as there are and the ranks can share equally."""
        count = min(most, self.blocks.n_blocks(self.block_size))
        return self.micro_batches(range(max(world(), count - count % world())))


def gradient(model, micro_batches, machine):
    """Leave the gradient of a mini-batch's mean loss in the parameters of `model`; return that loss, a float.

    micro_batches: list of token ids (b, T) on the device; under torchrun, this rank's share. model(idx, labels) gives
    the mean loss. Raises FloatingPointError where the loss is not finite.
    """
    sequences = sum(map(len, micro_batches))
    total = 0.0
    for idx in micro_batches:
        with machine.autocast():
            loss = model(idx, idx) * (len(idx) / sequences)
        loss.backward()
        total += loss.detach()
    average(total, *(p.grad for p in model.parameters()))
    if not math.isfinite(total := float(total)):
        raise FloatingPointError(f"the loss is {total}")
    return total


@torch.no_grad()
def mean_loss(model, micro_batches, machine):
    """The mean loss over `micro_batches`, a float. Leaves the model and every random generator as they are."""
    sequences = sum(map(len, micro_batches))
    total = torch.tensor(0.0, dtype=torch.float64)
    with torch.compiler.set_stance("force_eager"):
        for idx in micro_batches:
            with machine.autocast():
                total += float(model(idx, idx)) * len(idx) / sequences
    if hasattr(model, "reshard"):
        model.reshard()  # FSDP keeps embedding and head gathered after a forward pass, for the backward pass
    average(total)
    return float(total)


def timed(function):
    """The seconds that function() takes, the work that it leaves to a GPU included."""
    began = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
