"""Work on all entries of large tensors: products with a mask, comparison of bits, and the exact global top-k."""

import torch
import torch.distributed as dist

from .parallel import local, rank, sharded, world

PIECE = 2**20  # entries that stay in a CPU's cache


def pieces(*tensors):
    """The same slices of several tensors of one shape, flat, PIECE entries each; of sharded ones, this rank's part."""
    return zip(*(local(tensor).reshape(-1).split(PIECE) for tensor in tensors), strict=True)


# ---- masks ---------------------------------------------------------------------------------------------------------


def float_pieces(tensor, mask):
    """Slices of `tensor` with the same slices of `mask` as 0.0 and 1.0, in one scratch buffer that is used again.

    A product of float and bool is 15 times slower than one of floats on a CPU; a float mask would take four bytes a
    parameter instead of one. As bytes the mask is converted in a third of the time. On a GPU both come whole and
    as they are: for gpt2 slices took 8.8 ms there, whole tensors 1.2.
    """
    if tensor.is_cuda:
        yield local(tensor), local(mask)
        return
    scratch = torch.empty(min(PIECE, local(tensor).numel()), dtype=tensor.dtype, device=tensor.device)
    for x, m in pieces(tensor, mask):
        yield x, scratch[: len(x)].copy_(m.view(torch.uint8))


@torch.no_grad()
def multiply_(tensor, mask):
    """tensor *= mask, in place. tensor: contiguous, float; mask: bool, of the same shape."""
    for x, m in float_pieces(tensor, mask):
        x.mul_(m)


@torch.no_grad()
def shrink_(tensor, mask, rate):
    """tensor -= rate * tensor * mask, in place; mask None stands for all ones."""
    if mask is None:
        tensor.mul_(1 - rate)
    else:
        for x, m in float_pieces(tensor, mask):
            x.addcmul_(x, m, value=-rate)


def bits(tensor):
    """The bits of an fp32 tensor as int32: unlike ==, they tell -0.0 from 0.0."""
    return tensor.detach().view(torch.int32)


def checksum(tensor, mask):
    """A number that changes, but for an unlikely accident, when an entry of `tensor` outside of `mask` does.

    tensor: fp32; mask: bool, of its shape. Of a sharded tensor, the number of this rank's part.
    """
    return sum(int(x.masked_fill(m, 0).sum(dtype=torch.int64)) for x, m in pieces(bits(tensor), mask))


# ---- exact top-k ---------------------------------------------------------------------------------------------------


def size_pattern(x):
    """The bits of |x| (fp32) as int32. Of non-negative floats, the larger one has the larger pattern."""
    return bits(x).bitwise_and(0x7FFFFFFF)


@torch.no_grad()
def top_k(scores, k):
    """{name: bool tensor} with exactly k True in all, at the k largest |score| over all tensors together.

    scores: {name: fp32 tensor}. Ties go to the first in the order of the dict, then of the flat index. The k-th
    largest pattern is found by counting: a histogram of the upper 16 bits of each pattern, then one of the lower 16
    inside the bin where the count passes k. No sort, no concatenation, one byte a parameter for the result. One GPU
    alone counts by halving instead, in a copy: thousands of its threads would wait for the same bins.

    Sharded scores give sharded masks with the same bits. Ranks exchange the two histograms, 2**18 and 2**19 bytes, and
    8 bytes a tensor and rank to deal out the ties; whatever the model's size, never a score.
    """
    def histogram(bins, values):
        """How many of values(pattern) fall into each bin, over all scores and ranks."""
        counts = torch.zeros(bins, dtype=torch.int64, device=first.device)
        for score in scores.values():
            for (x,) in pieces(score):
                counts += torch.bincount(values(size_pattern(x)), minlength=bins)
        if sharded(first):
            dist.all_reduce(counts)
        return counts

    def kth_bin(counts, k):
        """The bin of the k-th largest entry; how many of its entries are among the k largest; how many are not."""
        above = counts.flip(0).cumsum(0).flip(0) - counts  # entries in higher bins
        chosen = int((above < k).nonzero()[0])
        inside = k - int(above[chosen])
        return chosen, inside, int(counts[chosen]) - inside

    first = next(iter(scores.values()))
    if first.is_cuda and not sharded(first):
        patterns = torch.cat([bits(score).reshape(-1) for score in scores.values()]).bitwise_and_(0x7FFFFFFF)
        threshold, ties, excess = kth_by_halving(patterns, k)
    else:
        high, k, _ = kth_bin(histogram(2**15, lambda pattern: pattern >> 16), k)
        low, ties, excess = kth_bin(histogram(2**16, lambda pattern: pattern[pattern >> 16 == high] & 0xFFFF), k)
        threshold = high << 16 | low  # the k-th largest |score|, as a pattern

    masks, shares = {}, tie_shares(scores, threshold, ties) if excess else {}
    for name, score in scores.items():
        # contiguous whatever the score's strides are, so that its flat slices share its memory
        masks[name] = torch.empty_like(score, dtype=torch.bool, memory_format=torch.contiguous_format)
        ties = shares.get(name, ties)
        for x, mask in pieces(score, masks[name]):
            pattern = size_pattern(x)
            torch.ge(pattern, threshold, out=mask)
            if excess:  # more entries are equal to the k-th largest than there is room for
                tied = (pattern == threshold).nonzero()[:, 0]
                mask[tied[ties:]] = False
                ties = max(0, ties - len(tied))
    return masks


def kth_by_halving(patterns, k):
    """The k-th largest of `patterns` (N,), int32 >= 0; how many of its equals are among the k largest; how many not."""
    low, high = 0, 2**31 - 1
    while low < high:  # the largest number that at least k patterns reach
        middle = (low + high + 1) // 2
        low, high = (middle, high) if int((patterns >= middle).sum()) >= k else (low, middle - 1)
    ties = k - int((patterns > low).sum())
    return low, ties, int((patterns == low).sum()) - ties


def tie_shares(scores, threshold, ties):
    """{name: how many of the first `ties` entries at the threshold this rank holds}; {} where scores are not sharded.

    First is meant as on one device: by tensor, then by row, and so by rank.
    """
    if not sharded(next(iter(scores.values()))):
        return {}
    mine = torch.stack([sum((size_pattern(x) == threshold).sum() for (x,) in pieces(score))
                        for score in scores.values()])
    each = [torch.empty_like(mine) for _ in range(world())]
    dist.all_gather(each, mine)
    held = torch.stack(each, dim=1)  # (tensors, ranks)
    before = held.flatten().cumsum(0).view_as(held) - held
    mine = (ties - before).clamp(min=0).minimum(held)[:, rank()]
    return dict(zip(scores, mine.tolist(), strict=True))
