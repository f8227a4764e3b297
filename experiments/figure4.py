"""Figure 4: fine-tuning against the mask ratio, the learning rate and the number of epochs.

    python experiments/figure4.py --scale laptop

On the first task that needs pre-training. Left: the released and the fine-tuned model for rho 1.0 to 0.5, each with its
own search. Middle and right: full fine-tuning of the dense and the PMP model, the other setting fixed, no search.
"""

import numpy as np

from common import BASE, EPOCHS, FULL, PAIRS, RATIOS, SCRATCH, accuracy, markdown, mean_sd, picture, run, sd, subplots


def at(lab, variant, rate, epochs):
    """Accuracies on the first needy task at a given setting, for each pair of seeds."""
    runs = [lab.tune(variant, pair, lab.scale.needy[0], FULL, rate, epochs) for pair in PAIRS]
    return [accuracy(run) for run in runs if run]


def script(lab):
    task = lab.scale.needy[0]
    panels = {"rho": {label: {rho: lab.scores(variant, task, adversary) for rho, variant in RATIOS.items()}
                      for label, adversary in (("released", BASE), ("fine-tuned", FULL))}}
    panels["rho"]["from random weights"] = dict.fromkeys(RATIOS, lab.scores("dense", task, SCRATCH))
    middle = lab.scale.rates[len(lab.scale.rates) // 2]
    panels["rate"] = {label: {rate: at(lab, variant, rate, lab.scale.epochs[0]) for rate in lab.scale.rates}
                      for label, variant in (("without PMP", "dense"), ("PMP", "pmp"))}
    panels["epochs"] = {label: {epochs: at(lab, variant, middle, epochs) for epochs in EPOCHS}
                        for label, variant in (("without PMP", "dense"), ("PMP", "pmp"))}

    figure, axes = subplots(1, len(panels), figsize=(3.6 * len(panels), 3.2))
    text = []
    for axis, (name, lines) in zip(axes, panels.items()):
        for label, points in lines.items():
            axis.errorbar(list(points), [np.mean(v) for v in points.values()],
                          [sd(v) for v in points.values()], label=label, capsize=2)
        axis.set_xlabel({"rate": "learning rate, times the default"}.get(name, name))
        axis.set_xscale("linear" if name == "rho" else "log")
        axis.legend(fontsize=7)
        xs = list(next(iter(lines.values())))
        rows = [[label, *(mean_sd(points[x]) for x in xs)] for label, points in lines.items()]
        text.append(markdown([name, *xs], rows))
    axes[0].set_ylabel("accuracy, %")
    picture(lab, "figure4", figure)
    return "\n\n".join(text)


if __name__ == "__main__":
    run(script, __doc__)
