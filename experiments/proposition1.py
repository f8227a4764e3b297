"""Proposition 1: what one fine-tuning step does to the pre-training loss, with and without the mask.

    python experiments/proposition1.py --scale laptop

One step of gradient descent on text of another domain, from the released weights: the outsider's g, the authorised g_M,
and the complement's part alone; with the same learning rate, as eq. 8 has it, and with the same length. The proposition
says that the outsider's step raises the loss on the pre-training text, by at least c eta^2. Control: the dense model.
"""

import numpy as np

from common import COMPARED, gradient, length, loss_beside, markdown, mean_sd, picture, run, sd, subplots

SIZES = [0.001, 0.003, 0.01, 0.03, 0.1]  # length of the outsider's step over the norm of the weights
BATCHES = 5


def measure(lab, variant, seed):
    """{arm: [[change of the loss at each size], ... a row a batch]} of one model."""
    release, masks = lab.release(variant, seed), lab.release("pmp", seed).masks
    model, idx = release.body, lab.held_out()[:16]
    norm = length(dict(model.named_parameters()))
    docs = lab.task("docs", release.tokenizer)["train"]
    arms = {}
    for i in range(BATCHES):
        g = gradient(model, docs[16 * i : 16 * i + 16], lab.machine)
        parts = {"outsider": g, "authorised": {name: g[name] * masks[name] for name in g},
                 "complement": {name: g[name] * ~masks[name] for name in g}}
        unit = norm / length(g)
        for name, part in parts.items():
            for arm, scale in ((name, unit), (f"{name}, same length", norm / length(part))):
                if arm != "outsider, same length":
                    base, *losses = loss_beside(model, idx, part, [0.0, *(-scale * size for size in SIZES)])
                    arms.setdefault(arm, []).append([loss - base for loss in losses])
    return {"change": arms, "sizes": SIZES, "norm": norm}


def script(lab):
    found = lab.compared("one_step", measure)
    figure, axes = subplots(1, 2, figsize=(9, 3.4), sharey=True)
    rows = []
    for axis, (variant, results) in zip(axes, found.items()):
        for arm in results[0]["change"]:
            change = np.array([np.mean(result["change"][arm], 0) for result in results])  # (models, sizes)
            axis.errorbar(SIZES, change.mean(0), sd(change), label=arm, capsize=2)
            rows.append([variant, arm, *(mean_sd(1e3 * change[:, i]) for i in range(len(SIZES)))])
        axis.set(title=COMPARED[variant], xscale="log",
                 xlabel="length of the step / norm of the weights")
        axis.set_yscale("symlog", linthresh=1e-3)
    axes[0].set_ylabel("change of the pre-training loss")
    axes[0].legend(fontsize=7)
    picture(lab, "proposition1", figure)
    return markdown(["model", "step", *(f"{size:g}" for size in SIZES)], rows)


if __name__ == "__main__":
    run(script, __doc__)
