"""What is measured of a pre-trained model: its loss on a text, its landscape, its gradients, one step of fine-tuning.

Functions take `shop`, run.py's Workshop, a `release`, and the masks of the PMP model with its seed, whether the release
was trained with them or not: what shows in the dense model, too, is not PMP's doing.
"""

import numpy as np
import torch
import torch.nn.functional as F

from model import parts_by_kind

# -----------------------------------------------------------------------------
# language modelling


@torch.no_grad()
def next_token(model, blocks, machine, size=16):
    """{"loss": nats, "accuracy": percent} of next-token prediction on blocks (N, T)."""
    model.eval()
    loss = right = 0.0
    for idx in blocks.to(machine.device).split(size):
        with machine.autocast():
            logits = model(idx)[:, :-1].flatten(0, 1).float()  # (B*(T-1), V)
        loss += float(F.cross_entropy(logits, idx[:, 1:].flatten(), reduction="sum"))
        right += int((logits.argmax(1) == idx[:, 1:].flatten()).sum())
    count = blocks[:, 1:].numel()
    return {"loss": loss / count, "accuracy": 100 * right / count}


def gradient(model, idx, machine):
    """{name: gradient} of the language-modelling loss on idx (B, T); leaves none behind in the model."""
    with machine.autocast():
        loss = model(idx.to(machine.device), idx.to(machine.device))
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def length(tensors):
    """Euclidean norm of a {name: tensor}, as one vector."""
    return float(torch.stack([tensor.detach().double().square().sum() for tensor in tensors.values()]).sum().sqrt())


@torch.no_grad()
def loss_beside(model, idx, direction, alphas):
    """[loss(theta + alpha * direction) for each alpha], in fp32, on idx (B, T). direction: {name: tensor}."""
    params, losses = dict(model.named_parameters()), []
    before = {name: p.clone() for name, p in params.items()}
    for alpha in alphas:
        for name, p in params.items():
            torch.add(before[name], direction[name], alpha=alpha, out=p)
        losses.append(float(model(idx, idx)))
    for name, p in params.items():
        p.copy_(before[name])
    return losses


# -----------------------------------------------------------------------------
# Figure 5 and Assumption 1: the loss beside the weights

ALPHAS = [-0.3, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.3]  # times the norm of the weights
DIRECTIONS, STEP = 3, 0.02  # STEP, times the norm of the weights: of the finite difference
PLACES = {"ticket": lambda mask: mask, "complement": lambda mask: ~mask, "full": torch.ones_like}


def by_rows(name, noise, p):
    """Noise whose rows have the lengths of the weight's rows."""
    if p.ndim < 2:
        return noise * p.abs()
    return noise * p.detach().norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)


SCALINGS = {  # what a random direction is made of
    "all tensors": lambda name, noise, p: noise,
    "without embedding": lambda name, noise, p: noise * (not any(word in name for word in ("embed", "wte", "wpe"))),
    "scaled by rows": by_rows,
}


def landscape(shop, release, masks):
    """{"curves": {place: [[loss at each alpha], …]}, "curvature": {scaling: {place: [d^T H d of unit directions]}}}."""
    model, idx = release.body, shop.held_out(release)[:8]
    params = dict(model.named_parameters())
    norm, curves, curvature = length(params), {}, {}
    middle = loss_beside(model, idx, params, [0.0])[0]
    for i in range(DIRECTIONS):
        generator = torch.Generator().manual_seed(i)
        noise = {name: torch.randn(p.shape, generator=generator).to(p.device) for name, p in params.items()}
        for scaling, scaled in SCALINGS.items():
            whole = {name: scaled(name, noise[name], p) for name, p in params.items()}
            for place, inside in PLACES.items():
                part = {name: v * inside(masks[name]) for name, v in whole.items()}
                factor = norm / length(part)
                part = {name: v * factor for name, v in part.items()}
                left, right = loss_beside(model, idx, part, [-STEP, STEP])
                found = curvature.setdefault(scaling, {}).setdefault(place, [])
                found.append((left + right - 2 * middle) / (STEP * norm) ** 2)
                if scaling == "all tensors":
                    curves.setdefault(place, []).append(loss_beside(model, idx, part, ALPHAS))
    return {"curves": curves, "curvature": curvature, "alphas": ALPHAS, "norm": norm}


# -----------------------------------------------------------------------------
# Figure 6 and section 5.2: do gradients tell the mask?

BINS = np.linspace(-12, 0, 61)  # of log10 |gradient|


def auc(positive, negative, points=2**20):
    """P(a random entry of `positive` is above one of `negative`), ties half; from a sample where there are many."""
    values = []
    for part in (positive, negative):
        at = torch.randint(len(part), (points,), generator=torch.Generator().manual_seed(0))
        values.append(part.cpu()[at if len(part) > points else ...])
    positive, negative = values[0], values[1].sort().values
    below, upto = (torch.searchsorted(negative, positive, right=right).double().mean() for right in (False, True))
    return float((below + upto) / (2 * len(negative)))


def auc_by_kind(scores, masks):
    """{"all entries", "within tensors", "without embedding", kind of tensor: AUC} of a score for each weight.

    scores: {name: tensor}, larger where a weight is more likely in the ticket. "within tensors" compares weights of the
    same tensor alone, and is the mean over tensors by size.
    """
    whole, inside, by_kind = [], [], {}
    for name, score in scores.items():
        mask = masks[name].to(score.device)
        whole.append((score.flatten(), mask.flatten()))
        if 0 < int(mask.sum()) < mask.numel():
            inside.append((auc(score[mask], score[~mask]), mask.numel()))
        for (kind, part), (_, inner) in zip(parts_by_kind(name, score), parts_by_kind(name, mask)):
            by_kind.setdefault(kind, []).append((part.flatten(), inner.flatten()))
    others = sum((pairs for kind, pairs in by_kind.items() if kind != "embedding"), [])
    groups = {"all entries": whole, "without embedding": others, **by_kind}
    found = {}
    for label, pairs in groups.items():
        flat, inner = (torch.cat(column) for column in zip(*pairs))
        if 0 < int(inner.sum()) < len(inner):
            found[label] = auc(flat[inner], flat[~inner])
    values, sizes = zip(*inside)
    return {**found, "within tensors": float(np.average(values, weights=sizes))}


def gradients(shop, release, masks):
    """{"auc": auc_by_kind of |gradient|, "zero": {place: share}, "histogram": {place: […]}}."""
    sizes = {name: g.abs() for name, g in gradient(release.body, shop.held_out(release)[:16], shop.machine).items()}
    size = torch.cat([g.flatten() for g in sizes.values()])
    ticket = torch.cat([masks[name].flatten() for name in sizes])
    parts = {"ticket": size[ticket], "complement": size[~ticket]}
    return {"auc": auc_by_kind(sizes, masks), "zero": {place: float((part == 0).float().mean())
                                                       for place, part in parts.items()},
            "histogram": {place: np.histogram(part[part > 0].log10().cpu(), BINS)[0].tolist()
                          for place, part in parts.items()}}


# -----------------------------------------------------------------------------
# Proposition 1: one step of fine-tuning

SIZES = [0.001, 0.003, 0.01]  # length of the outsider's step over the norm of the weights: it fixes eta
BATCHES = 5


def one_step(shop, release, masks):
    """{"change": {arm: [[change of the pre-training loss at each eta], … a row a batch]}}.

    One step of gradient descent on docs. All arms take it with the same eta (eq. 8); the "same length" ones with the
    length of the outsider's step.
    """
    model, idx = release.body, shop.held_out(release)[:8]
    norm, arms = length(dict(model.named_parameters())), {}
    docs = shop.task("docs", release, "judge")["train"]
    for i in range(BATCHES):
        g = gradient(model, docs[16 * i : 16 * i + 16], shop.machine)
        parts = {"outsider": g, "authorised": {name: g[name] * masks[name] for name in g},
                 "complement": {name: g[name] * ~masks[name] for name in g}}
        unit = norm / length(g)
        for name, part in parts.items():
            scales = {name: unit}
            if name != "outsider":
                scales[f"{name}, same length"] = norm / length(part)
            for arm, scale in scales.items():
                base, *losses = loss_beside(model, idx, part, [0.0, *(-scale * size for size in SIZES)])
                arms.setdefault(arm, []).append([loss - base for loss in losses])
    return {"change": arms, "sizes": SIZES, "norm": norm}


def ticket_by_kind(params, masks):
    """{kind: [entries in the ticket, entries, rows of matrices wholly frozen, rows]}: the anatomy of a mask."""
    found = {}
    for name in params:
        for kind, part in parts_by_kind(name, masks[name]):
            rows = part.any(dim=-1) if part.ndim > 1 else part.new_ones(0)
            counts = [int(part.sum()), part.numel(), int((~rows).sum()), len(rows)]
            found[kind] = [a + b for a, b in zip(found.get(kind, [0] * 4), counts)]
    return found
