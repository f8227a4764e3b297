"""Figure 6: gradient magnitudes of the ticket and of the complement on held-out text, and how far they overlap.

    python experiments/figure6.py --scale laptop

The overlap is an AUC: 0.5 when a parameter's gradient says nothing about the mask, 1 when it tells it. The control is
the dense model with the mask of the PMP model: what shows there too is the architecture's and the data's doing.
"""

import numpy as np
import torch

from attacks import auc
from common import COMPARED, gradient, markdown, mean_sd, picture, run, subplots

BINS = np.linspace(-12, 0, 61)  # of log10 |gradient|


def measure(lab, variant, seed):
    """{"auc", "zero": {place: share of gradients that are exactly 0}, "histogram": {place: [...]}} of one model."""
    model, masks = lab.release(variant, seed).body, lab.release("pmp", seed).masks
    slopes = gradient(model, lab.held_out()[:16], lab.machine)
    size = torch.cat([g.abs().flatten() for g in slopes.values()])
    ticket = torch.cat([masks[name].flatten() for name in slopes])
    parts = {"ticket": size[ticket], "complement": size[~ticket]}
    return {"auc": auc(*parts.values()),
            "zero": {place: float((part == 0).float().mean()) for place, part in parts.items()},
            "histogram": {place: np.histogram(part[part > 0].log10().cpu(), BINS)[0].tolist()
                          for place, part in parts.items()}}


def script(lab):
    found = lab.compared("gradients", measure)
    figure, axes = subplots(1, 2, figsize=(9, 3.2), sharey=True)
    rows = []
    for axis, (variant, results) in zip(axes, found.items()):
        for place in ("ticket", "complement"):
            counts = np.sum([result["histogram"][place] for result in results], 0)
            axis.stairs(counts / counts.sum(), BINS, fill=True, alpha=0.5, label=place)
        axis.set_title(COMPARED[variant])
        axis.set_xlabel("log10 |gradient|, zeros left out")
        rows.append([variant, mean_sd([result["auc"] for result in results]),
                     *(mean_sd([100 * result["zero"][place] for result in results]) + " %"
                       for place in ("ticket", "complement"))])
    axes[0].legend()
    picture(lab, "figure6", figure)
    return markdown(["model", "AUC", "exact zeros in the ticket", "in the complement"], rows)


if __name__ == "__main__":
    run(script, __doc__)
