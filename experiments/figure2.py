"""Figure 2: the EarlyBird ticket against a random mask of the same ratio, before and after fine-tuning.

    python experiments/figure2.py --scale laptop

The paper measures "preserves capability" by base accuracy under an untrained head, which is near chance for everybody.
Added: the pre-training loss on held-out text, and the ticket of `--score mean`, whose search does become stable.
"""

import math

import numpy as np

from common import BASE, FULL, SCRATCH, markdown, mean_sd, picture, run, sd, subplots

VARIANTS = {"dense": "no mask", "pmp": "EarlyBird", "mean": "EarlyBird, mean score", "random": "random mask"}


def script(lab):
    tasks = lab.scale.needy
    rows, scores = [], {}
    for variant, label in VARIANTS.items():
        loss = lab.losses(variant)
        for adversary in (BASE, FULL):
            for task in tasks:
                scores[variant, adversary.name, task] = lab.scores(variant, task, adversary)
        rows.append([label, mean_sd(loss), f"{math.exp(np.mean(loss)):.1f}",
                     *(mean_sd(scores[variant, kind, task]) for kind in ("base", "full") for task in tasks)])
    rows.append(["from random weights", "", "", *[""] * len(tasks),
                 *(mean_sd(lab.scores("dense", task, SCRATCH)) for task in tasks)])

    figure, axes = subplots(1, 2, figsize=(9, 3.2), sharey=True)
    for axis, kind in zip(axes, ("base", "full")):
        for i, (variant, label) in enumerate(VARIANTS.items()):
            values = [scores[variant, kind, task] for task in tasks]
            axis.bar(np.arange(len(tasks)) + 0.2 * i, [np.mean(v) for v in values], 0.18, label=label,
                     yerr=[sd(v) for v in values])
        axis.set_xticks(np.arange(len(tasks)) + 0.3, tasks)
        axis.set_title({"base": "released", "full": "after an outsider's full fine-tuning"}[kind])
    axes[0].set_ylabel("accuracy, %")
    axes[0].legend()
    picture(lab, "figure2", figure)
    return markdown(["mask", "held-out loss", "perplexity", *(f"{kind}: {task}" for kind in ("base", "fine-tuned")
                                                            for task in tasks)], rows)


if __name__ == "__main__":
    run(script, __doc__)
