"""What a run's mask does to the loss: Figure 5, Figure 6, Proposition 1 and the premise of section 3.

    python experiments/measure.py OUT                      a run, with its own mask
    python experiments/measure.py TWIN --mask-of OUT       another model with the same mask: what shows there, too,
                                                           is not PMP's doing

Prints the numbers, and with --picture draws Figures 5 and 6. Keep both to yourself: they describe the mask.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Parser, UserError, command_line, path, say  # noqa: E402
from data.text import CACHE, prepare  # noqa: E402
from model import load_folder  # noqa: E402
from pmp import load_checkpoint, topk_mask, unpack_mask  # noqa: E402

ALPHAS = (-0.3, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.3)  # times the norm of the weights
STEP = 0.01  # length of the outsider's step in Proposition 1, times the norm of the weights
BINS = np.linspace(-12, 0, 61)  # of log10 |gradient|


def parts(tensors, masks):
    """{"full", "ticket", "complement"}: the tensors, and the same with zeros outside the ticket or inside it."""
    ticket = {name: t * masks[name] for name, t in tensors.items()}
    complement = {name: t * ~masks[name] for name, t in tensors.items()}
    return {"full": tensors, "ticket": ticket, "complement": complement}


def norm(tensors):
    """Euclidean norm of {name: tensor}, as one vector."""
    return sum(float(t.detach().double().square().sum()) for t in tensors.values()) ** 0.5


def gradient(model, tokens, first, batches=1, block_size=256):
    """{name: gradient} in fp32 of the mean loss on mini-batches of 16 blocks of a text."""
    for batch in range(batches):
        idx = tokens.read(first + 16 * batch, 16, block_size)  # (B, T)
        (model(idx, idx) / batches).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


@torch.no_grad()
def loss_beside(model, idx, direction, alphas):
    """[loss(theta + alpha * direction) for each alpha] in fp32 on idx (B, T). The weights keep their bits."""
    before = {name: p.clone() for name, p in model.named_parameters()}
    losses = []
    for alpha in alphas:
        for name, p in model.named_parameters():
            p.copy_(before[name] + alpha * direction[name])
        losses.append(float(model(idx, idx)))
    for name, p in model.named_parameters():
        p.copy_(before[name])
    return losses


def figure_5(model, masks, idx, directions=3):
    """{"ticket", "full", "complement": [loss at each of ALPHAS]}: the mean of random directions of the same length."""
    size, curves = norm(dict(model.named_parameters())), {}
    for seed in range(directions):
        generator = torch.Generator().manual_seed(seed)
        noise = {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
        for region, part in parts(noise, masks).items():
            scale = size / norm(part)
            part = {name: scale * t for name, t in part.items()}
            curves.setdefault(region, []).append(loss_beside(model, idx, part, ALPHAS))
    return {region: np.mean(found, axis=0).tolist() for region, found in curves.items()}


def auc(positive, negative):
    """P(an entry of `positive` is above one of `negative`), ties half."""
    negative = negative.sort().values
    below = torch.searchsorted(negative, positive).double()
    upto = torch.searchsorted(negative, positive, right=True).double()
    return float((below + upto).mean() / (2 * len(negative)))


def figure_6(g, masks):
    """How |gradient| is spread in the ticket and in the complement, and how far it tells one from the other.

    "zeros": the shares that are exactly 0, as the embedding's rows of tokens that do not occur; "auc of the rest":
    without these; "found": the share of the ticket in a guess of its size, the largest |gradient|.
    """
    size = torch.cat([t.abs().flatten() for t in g.values()])
    inside = torch.cat([masks[name].flatten() for name in g])
    nonzero = size > 0
    guess = topk_mask({"all": size}, int(inside.sum()))["all"]
    found = {"auc": auc(size[inside], size[~inside]), "found": float(guess[inside].float().mean()),
             "auc of the rest": auc(size[inside & nonzero], size[~inside & nonzero]), "zeros": {}}
    for region, part in (("ticket", size[inside]), ("complement", size[~inside])):
        found["zeros"][region] = float((part == 0).float().mean())
        found[region] = np.histogram(part[part > 0].log10(), BINS)[0].tolist()
    return found


def premise(model, masks, held):
    """The share of the squared gradient of the expected loss that lies in the ticket; section 3 takes it for 0.

    The product of the gradients of two halves of the held-out text: the noise of mini-batches has a mean of 0 in it.
    """
    half = min(8, held.blocks(256) // 32)  # mini-batches in each
    first, second = gradient(model, held, 0, half), gradient(model, held, 16 * half, half)
    product = {name: first[name].double() * second[name].double() for name in first}
    total = sum(float(t.sum()) for t in product.values())
    return sum(float(t[masks[name]].sum()) for name, t in product.items()) / total


def proposition_1(model, masks, task, idx, batches=5):
    """What one step of gradient descent on another text adds to the loss of idx (B, T), in nats.

    {"slope", "curvature": {"full", "ticket", "complement", "cross"}}: the part that changes its sign with the step, and
    the rest: the first- and second-order terms of Proposition 1's proof sketch. The step of all weights is STEP times
    their norm long; the two others have its learning rate. "cross" is what the step of all weights adds beyond the sum
    of its two parts: in the curvature eta^2 g_M^T H g_complement, which the sketch does not name; in the slope it is of
    third order.
    """
    size = norm(dict(model.named_parameters()))
    slope, curvature = {}, {}
    for batch in range(batches):
        g = gradient(model, task, 16 * batch)
        eta = STEP * size / norm(g)
        for region, part in parts(g, masks).items():
            after, before, opposite = loss_beside(model, idx, part, (-eta, 0.0, eta))
            slope.setdefault(region, []).append((after - opposite) / 2)
            curvature.setdefault(region, []).append((after + opposite) / 2 - before)
    found = {}
    for term, values in (("slope", slope), ("curvature", curvature)):
        means = {region: float(np.mean(value)) for region, value in values.items()}
        means["cross"] = means["full"] - means["ticket"] - means["complement"]
        found[term] = means
    return found


def measure(model, masks, held, task):
    """All of it, as a dict for JSON. held, task: Tokens of the pre-training text, held out, and of another text."""
    idx = held.read(0, 8, 256)
    return {"alphas": ALPHAS, "figure 5": figure_5(model, masks, idx),
            "figure 6": figure_6(gradient(model, held, 8), masks), "premise": premise(model, masks, held),
            "proposition 1": proposition_1(model, masks, task, idx)}


def measure_run(out, mask_of, cache=CACHE, task="prose"):
    """Measure the run in a folder, with the mask of another run."""
    saved, owner = load_checkpoint(out), load_checkpoint(mask_of)
    if not saved or not owner or not owner["mask"] or not (Path(out) / "release").exists():
        raise UserError(f"{out} is no finished run, or {mask_of} has no mask: name the --out of a run with rho < 1")
    model, tokenizer = load_folder(Path(out) / "release")
    masks = unpack_mask(owner["mask"], dict(model.named_parameters()))
    held = prepare(saved["settings"]["data"], tokenizer, 0, saved["settings"]["seed"], cache)[2]
    if held.blocks(256) < 32:
        raise UserError(f"the text of {out} has {held.blocks(256)} held-out blocks of 256 tokens, and 32 are needed")
    return measure(model, masks, held, prepare(task, tokenizer, 0, 0, cache)[1])


def draw(found, file):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for region, colour in (("ticket", "C0"), ("full", "C3"), ("complement", "C1")):
        left.plot(found["alphas"], found["figure 5"][region], colour, marker="o", markersize=3, label=region)
    left.set(title="Loss along a random direction (Figure 5)", xlabel="length, times the norm of theta", ylabel="nats")
    for region, colour in (("ticket", "C0"), ("complement", "C1")):
        counts = np.array(found["figure 6"][region])
        right.stairs(counts / counts.sum(), BINS, color=colour, label=region)
    right.set(title="Gradients of held-out text (Figure 6)", xlabel="log10 |gradient|", ylabel="share", xlim=(-9, -1))
    left.legend()
    right.legend()
    file.touch()
    file.chmod(0o600)
    figure.savefig(file, dpi=130)


def main():
    parser = Parser("Figures 5 and 6, Proposition 1 and the premise of section 3, of a run and a mask.")
    parser.add_argument("out", type=path, help="the --out of a run of pmp.py")
    parser.add_argument("--mask-of", type=path, help="take the mask of this run [OUT]")
    parser.add_argument("--task", default="prose", help="text of the step of Proposition 1, as pmp.py's --data [prose]")
    parser.add_argument("--cache", type=path, default=CACHE, help="folder that keeps prepared text")
    parser.add_argument("--picture", type=path, metavar="FILE", help="draw Figures 5 and 6 there")
    args = parser.parse_args()
    found = measure_run(args.out, args.mask_of or args.out, args.cache, args.task)
    say(json.dumps(found))
    if args.picture:
        draw(found, Path(args.picture))


if __name__ == "__main__":
    command_line(main)
