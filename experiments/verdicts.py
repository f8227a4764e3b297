"""The paper's claims, what the other scripts measured, and what follows. The table in README.md is this.

    python experiments/verdicts.py --scale laptop

A difference counts when the 95% interval of its mean over three pairs of seeds (Student's t) lies on one side. A claim
about fine-tuning is tested on the tasks that need pre-training, in shares of what the dense model gains there over
random weights: holding back less than a tenth of that is not "non-fine-tunable". What stays open is "cannot tell".
"""

import numpy as np

from common import EPOCHS, FULL, LORA, MASKED_FULL, PAIRS, RATIOS, SCRATCH, UserError, accuracy, markdown, run

T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57}  # Student's t, two-sided, by the number of values
TENTH = 10.0  # % of the dense model's gain
FREE = 0.05  # nats that a mask may cost


def interval(values):
    """Mean and half the width of its 95% interval."""
    values = np.asarray(values, float)
    return values.mean(), T95[len(values)] * values.std(ddof=1) / len(values) ** 0.5


def judge(intervals):
    """"holds" where every interval lies above 0, "does not hold" where one lies below it, or "cannot tell"."""
    if any(mean + half < 0 for mean, half in intervals):
        return "**does not hold**"
    return "**holds**" if all(mean - half > 0 for mean, half in intervals) else "**cannot tell**"


def spell(intervals, names, unit):
    return "; ".join(f"{name} {mean:.3g} ±{half:.2g}{unit}" for (mean, half), name in zip(intervals, names))


def advantage(lab, task, first, second, margin):
    """(interval of first - second in % of the dense model's gain, interval of what they differ by beyond the margin).

    first, second: accuracies on a task, one a pair of seeds. None where the dense model does not clearly beat random
    weights: nothing can be told there.
    """
    gains = np.array(lab.scores("dense", task, FULL)) - lab.scores("dense", task, SCRATCH)
    gain, half = interval(gains)
    if gain < half:
        return None
    return interval(100 * (first - second) / gain), interval(first - second - margin / 100 * gains)


def row(claim, found, said=""):
    """A row of the table from {task: advantage}."""
    found = {task: intervals for task, intervals in found.items() if intervals}
    if not found:
        return [claim, said + "the dense model does not clearly beat random weights", "**cannot tell**"]
    shown, judged = zip(*found.values())
    return [claim, said + spell(shown, found, " % of the dense gain"), judge(judged)]


def compare(lab, claim, one, other, margin=0.0):
    """Does arm `one`, a (variant, adversary), do better than arm `other`?"""
    return row(claim, {task: advantage(lab, task, *(np.array(lab.scores(variant, task, adversary))
                                                    for variant, adversary in (one, other)), margin)
                       for task in lab.scale.needy})


def capability(lab):
    dense, masked, random, mean = (np.array(lab.losses(variant)) for variant in ("dense", "pmp", "random", "mean"))
    cost, half = interval(masked - dense)
    return [
        [f"PMP preserves the pre-trained capability (4.2): at most {FREE} nats",
         f"held-out loss {dense.mean():.3f} dense, {masked.mean():.3f} PMP: {spell([(cost, half)], ['+'], ' nats')}",
         judge([(FREE - cost, half)])],
        ["the EarlyBird ticket trains at least as well as a random mask (4.4)",
         f"held-out loss {masked.mean():.3f} EarlyBird, {random.mean():.3f} random, {mean.mean():.3f} `--score mean`: "
         + spell([interval(masked - random)], ["over random +"], " nats"),
         judge([interval(random - masked)])],
    ]


def sweep(lab, claim, settings):
    """Does any setting give the PMP model what the dense one gets from its best? settings: [(rate, epochs), ...]."""
    task = lab.scale.needy[0]

    def values(variant):
        runs = [[accuracy(lab.tune(variant, pair, task, FULL, *setting)) for pair in PAIRS] for setting in settings]
        return np.array(max(runs, key=np.mean))
    return row(claim, {task: advantage(lab, task, values("dense"), values("pmp"), TENTH)},
               "held back at the best setting: ")


def knob(lab):
    task = lab.scale.needy[0]
    scores = {rho: np.array(lab.scores(variant, task, FULL)) for rho, variant in RATIOS.items()}
    means = ", ".join(f"{rho:g}: {value.mean():.1f}" for rho, value in scores.items())
    return row("the mask ratio sets the strength (4.4)", {task: advantage(lab, task, scores[1.0], scores[0.5], TENTH)},
               f"fine-tuned, {means}; 0.5 holds back: ")


def geometry(lab):
    for name, maker in (("landscape", "figure5"), ("gradients", "figure6"), ("one_step", "proposition1"),
                        ("recovery", "attacks")):
        if not lab.read(name):
            raise UserError(f"{lab.results} has no {name}.jsonl yet: run {maker}.py with the same flags first")
    landscape, gradients, step = (list(lab.read(name).values()) for name in ("landscape", "gradients", "one_step"))
    of = {variant: [result for result in landscape if result["key"]["model"] == variant]
          for variant in ("pmp", "dense")}
    rows = []
    for kind in ("random", "gradient"):
        mean = {(variant, place): np.array([1e3 * np.mean(result["curvature"][kind][place]) for result in results])
                for variant, results in of.items() for place in ("complement", "ticket")}
        excess = [interval(mean[variant, "complement"] - mean[variant, "ticket"]) for variant in of]
        rows.append([f"the loss curves more in the complement than in the ticket (Assumption 1), {kind} directions",
                     spell([interval(mean["pmp", place]) for place in ("complement", "ticket")],
                           ("complement", "ticket"), "") + f"; excess in the dense model: {excess[1][0]:.2g}",
                     judge(excess[:1])])
    change = {(variant, arm): np.array([1e3 * np.mean(result["change"][arm], 0) for result in step
                                        if result["key"]["model"] == variant])  # (models, sizes), thousandths of a nat
              for variant in of for arm in ("outsider", "authorised, same length")}
    sizes = [f"step {size:g}:" for size in step[0]["sizes"][:3]]
    for claim, value in (
            ("an outsider's step raises the pre-training loss (eq. 8)", lambda variant: change[variant, "outsider"]),
            ("and more than an authorised step of the same length (Proposition 1)",
             lambda variant: change[variant, "outsider"] - change[variant, "authorised, same length"])):
        found = [interval(column) for column in value("pmp").T[:3]]
        rows.append([claim, spell(found, sizes, " mnats") + "; dense model: " + ", ".join(
            f"{number:.2g}" for number in value("dense").mean(0)[:3]), judge(found)])
    telling = [result["auc"] for result in gradients if result["key"]["model"] == "pmp"]
    rows.append(["gradients do not tell the mask (5.2): AUC below 0.6", spell([interval(telling)], ["AUC"], ""),
                 judge([(0.6 - interval(telling)[0], interval(telling)[1])])])
    guesses = {}
    for result in lab.read("recovery").values():
        if "auc" in result:
            guesses.setdefault(result["key"]["attack"], []).append(result)
    best = max(guesses, key=lambda name: np.mean([result["iou"] for result in guesses[name]]))
    share, overlap = (interval([result[key] for result in guesses[best]]) for key in ("auc", "iou"))
    rows.append(["an outsider cannot recover the mask (5.2): IoU within 0.1 of chance (0.54)",
                 f"{best}: " + spell([share, overlap], ["AUC", "IoU"], ""), judge([(0.64 - overlap[0], overlap[1])])])
    return rows


def script(lab):
    outsider, dense = ("pmp", FULL), ("dense", FULL)
    epochs = [(lab.scale.rates[len(lab.scale.rates) // 2], number) for number in EPOCHS]
    rows = [
        *capability(lab),
        compare(lab, "full fine-tuning without the mask gains less than on the dense model (4.2)", dense, outsider,
                TENTH),
        compare(lab, "so does LoRA (4.2)", ("dense", LORA), ("pmp", LORA), TENTH),
        compare(lab, "authorised fine-tuning beats the outsider's (4.3)", ("pmp", MASKED_FULL), outsider),
        compare(lab, "a random mask protects less than the EarlyBird ticket (4.4)", ("random", FULL), outsider),
        knob(lab),
        sweep(lab, "no learning rate makes up for it (4.4)", [(rate, lab.scale.epochs[0]) for rate in lab.scale.rates]),
        sweep(lab, "no number of epochs makes up for it (4.4)", epochs),
        *geometry(lab),
    ]
    return markdown(["claim of the paper", "measured (95% interval)", "verdict"], rows)


if __name__ == "__main__":
    run(script, __doc__)
