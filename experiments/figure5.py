"""Figure 5 and Assumption 1: the pre-training loss beside the released weights, inside the ticket and outside of it.

    python experiments/figure5.py --scale laptop

Random directions of one length (alpha times the norm of the weights), confined to the ticket, to the complement, or to
nothing; and the directions of the gradient on text of another domain, which fine-tuning would take. The curvature
d^T H d of each unit direction is a finite difference. The control is the dense model with the mask of the PMP model: if
its landscape has the same shape, PMP has not made it.
"""

import numpy as np
import torch

from common import COMPARED, gradient, length, loss_beside, markdown, mean_sd, picture, run, sd, subplots

ALPHAS = [-0.3, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.3]
DIRECTIONS, STEP = 5, 0.02  # STEP, times the norm of the weights: of the finite difference
PLACES = {"ticket": lambda mask: mask, "complement": lambda mask: ~mask, "full": torch.ones_like}


def measure(lab, variant, seed):
    """{"curves": {place: [[loss at each alpha], ...]}, "curvature": {kind: {place: [...]}}} of one model."""
    release, masks = lab.release(variant, seed), lab.release("pmp", seed).masks
    model, idx = release.body, lab.held_out()[:16]
    norm = length(dict(model.named_parameters()))
    docs = lab.task("docs", release.tokenizer)["train"]
    slopes = [gradient(model, docs[16 * i : 16 * i + 16], lab.machine) for i in range(DIRECTIONS)]
    curves, curvature = {}, {"random": {}, "gradient": {}}
    for place, inside in PLACES.items():
        curves[place], curvature["random"][place], curvature["gradient"][place] = [], [], []
        for i in range(DIRECTIONS):
            generator = torch.Generator().manual_seed(i)
            random = {name: torch.randn(p.shape, generator=generator).to(p.device)
                      for name, p in model.named_parameters()}
            for kind, vector in (("random", random), ("gradient", slopes[i])):
                part = {name: v * inside(masks[name]) for name, v in vector.items()}
                scale = norm / length(part)
                part = {name: v * scale for name, v in part.items()}
                alphas = [*ALPHAS, -STEP, STEP] if kind == "random" else [0.0, -STEP, STEP]
                *curve, left, right = loss_beside(model, idx, part, alphas)
                middle = curve[ALPHAS.index(0.0)] if kind == "random" else curve[0]
                curvature[kind][place].append((left + right - 2 * middle) / (STEP * norm) ** 2)
                if kind == "random":
                    curves[place].append(curve)
    return {"curves": curves, "curvature": curvature, "alphas": ALPHAS, "norm": norm}


def script(lab):
    found = lab.compared("landscape", measure)
    figure, axes = subplots(1, 2, figsize=(9, 3.4), sharey=True)
    rows = []
    for axis, (variant, results) in zip(axes, found.items()):
        for place in PLACES:
            curves = np.array([curve for result in results for curve in result["curves"][place]])
            axis.errorbar(ALPHAS, curves.mean(0), sd(curves), label=place, capsize=2)
        axis.set_title(COMPARED[variant])
        axis.set_xlabel("alpha")
        for kind in ("random", "gradient"):
            means = {place: [1e3 * np.mean(result["curvature"][kind][place]) for result in results] for place in PLACES}
            rows.append([variant, kind, *map(mean_sd, means.values())])
    axes[0].set_ylabel("held-out loss, nats")
    axes[0].legend()
    picture(lab, "figure5", figure)
    return markdown(["model", "directions", *(f"d^T H d x 1000: {place}" for place in PLACES)], rows)


if __name__ == "__main__":
    run(script, __doc__)
