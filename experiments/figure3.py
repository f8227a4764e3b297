"""Figure 3: authorised against outsider fine-tuning of the same PMP release.

    python experiments/figure3.py --scale laptop
"""

import numpy as np

from common import FULL, LORA, MASKED_FULL, MASKED_LORA, SCRATCH, markdown, mean_sd, picture, run, sd, subplots

ARMS = [("outsider, full", "pmp", FULL), ("authorised, full", "pmp", MASKED_FULL), ("outsider, LoRA", "pmp", LORA),
        ("authorised, LoRA", "pmp", MASKED_LORA), ("dense model, full", "dense", FULL),
        ("from random weights", "dense", SCRATCH)]


def script(lab):
    tasks = lab.scale.tasks
    scores = {label: [lab.scores(variant, task, adversary) for task in tasks] for label, variant, adversary in ARMS}
    figure, axis = subplots(figsize=(9, 3.8))
    for i, (label, values) in enumerate(scores.items()):
        axis.bar(np.arange(len(tasks)) + 0.14 * i, [np.mean(v) for v in values], 0.13, label=label,
                 yerr=[sd(v) for v in values])
    axis.set_xticks(np.arange(len(tasks)) + 0.35, tasks)
    axis.set_ylabel("accuracy, %")
    axis.legend(ncols=3, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))  # above the bars
    picture(lab, "figure3", figure)
    return markdown(["", *tasks], [[label, *map(mean_sd, values)] for label, values in scores.items()])


if __name__ == "__main__":
    run(script, __doc__)
