"""The pictures of the report: each is a function of the results, drawn with matplotlib."""

from functools import partial

import numpy as np
from measures import BINS, PLACES, SIZES
from plan import EQUAL_RATES, MAIN, choice
from verdicts import EQUAL, accuracies, by_ratio
from runtime.files import UserError, atomic

# one colour for each meaning in all pictures; their lightness differs, too, so that they can be told in grey
COLOURS = {"ticket": "#1f5f99", "complement": "#d98032", "full": "#222222", "chance": "#888888",
           "train": "#7fb2d9", "validation": "#1f5f99",
           "dense": "#222222", "pmp": "#1f5f99", "pmp + mask": "#7fb2d9", "random": "#d98032", "scratch": "#bbbbbb",
           "mean": "#8a6fb0", "rho0.9": "#7fb2d9", "rho0.5": "#0b3556", "stopped early": "#d98032",
           "holds": "#1f5f99", "does not hold": "#b5402f", "open": "#999999", "tells nothing": "#dddddd",
           "not run": "#dddddd", "unfinished": "#999999"}
SHADES = ("#e3b768", "#b3732a", "#5e360b")  # of something that grows
TITLES = {"pmp": "PMP", "dense": "dense, with PMP's mask"}
SIGNS = {"holds": "o", "does not hold": "X", "open": "s", "tells nothing": "d", "not run": "d", "unfinished": "d"}


def subplots(*args, **kwargs):
    """matplotlib's, which the pictures alone need."""
    try:
        import matplotlib.pyplot
    except ImportError:
        raise UserError("the picture needs matplotlib: pip install matplotlib, then start this again") from None
    return matplotlib.pyplot.subplots(*args, **kwargs)


def save(figure, path, mode=0o644):
    """Write a matplotlib figure, atomically."""
    figure.tight_layout()
    write(figure, path, mode)


def write(figure, path, mode=0o644, **options):
    """Write a figure as it is. options: of savefig."""
    with atomic(path, mode) as file:
        figure.savefig(file, dpi=120, format="png", metadata={"Software": None}, **options)
    print(f"drawn: {path}")


FAR = 6  # of the forest: what is farther from its margin stands at the edge


def forest(rows, path):
    """A row for each claim, a marker for each task or step: how far it is from the margin, in halves of its interval.

    Every bar has the same length, therefore: it is a 95% interval, and clear of the line where it excludes the margin.
    """
    lines = [(row, marker) for row in rows for marker in row.markers]
    figure, axis = subplots(figsize=(11, 0.26 * len(lines) + 1.4))
    for y, (row, marker) in enumerate(lines):
        if row.markers[0] is marker:
            axis.text(-1.5, -y, row.claim, va="center", fontsize=8, fontweight="bold", transform=place(axis))
            axis.axhline(-y + 0.5, color="#eeeeee", linewidth=0.8)
        axis.text(-0.02, -y, marker.label, va="center", ha="right", fontsize=7, transform=place(axis))
        words = marker.verdict
        if marker.half == marker.half:
            sign = 1 if marker.above else -1
            x = sign * np.clip((marker.estimate - marker.margin) / max(marker.half, 1e-12), -FAR, FAR)
            colour = COLOURS[marker.verdict]
            axis.plot([x - 1, x + 1], [-y, -y], color=colour, linewidth=1.5)
            axis.plot(x, -y, SIGNS[marker.verdict], color=colour, markersize=5)
            words = f"{marker.verdict}: {marker.interval} ({marker.limit}; n={marker.n})"
        axis.text(1.02, -y, words, va="center", fontsize=7, color="black" if marker.half == marker.half else "#999999",
                  transform=place(axis))
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(xlim=(-FAR - 1.2, FAR + 1.2), ylim=(-len(lines) + 0.4, 0.8), yticks=[], xticks=[-FAR, 0, FAR])
    axis.set_xticklabels([f"-{FAR} or less", "margin", f"{FAR} or more"], fontsize=7)
    axis.set_xlabel("distance from the margin / half of the interval", fontsize=7)
    axis.text(0, 1.2, "against the claim      ", ha="right", fontsize=9)
    axis.text(0, 1.2, "      for the claim", ha="left", fontsize=9)
    for side in ("top", "left", "right"):
        axis.spines[side].set_visible(False)
    figure.subplots_adjust(left=0.4, right=0.64)
    write(figure, path, bbox_inches="tight")


def place(axis):
    """x in shares of the axis, y in data."""
    return axis.get_yaxis_transform()


def dots(axis, xs, ys, colour, label=None):
    """Each pre-training as a dot, their mean as a diamond."""
    axis.plot(xs, ys, "o", markersize=4, color=colour, alpha=0.5)
    axis.plot(np.mean(xs), np.mean(ys), "D", markersize=8, color=colour, label=label)


def log_ticks(axis, values, label):
    """A logarithmic x axis with a tick at each value."""
    axis.set(xlabel=label, xscale="log")
    axis.set_xticks(values, [f"{x:g}" for x in values])
    axis.minorticks_off()


def strips(evidence, arms, path):
    """A panel for each task: fine-tuned accuracy, arm beside arm."""
    figure, axes = subplots(1, len(MAIN), figsize=(10, 3.4))
    for axis, task in zip(axes, MAIN):
        for x, arm in enumerate(arms):
            values = list(evidence.accuracy(arm, task).values())
            if values:
                dots(axis, [x] * len(values), values, COLOURS[arm.replace(" lora", "")])
        axis.set_xticks(range(len(arms)), [arm.replace(" ", "\n", 1) for arm in arms], fontsize=8)
        axis.set(title=task, ylabel="fine-tuned accuracy, %", xlim=(-0.5, len(arms) - 0.5))
    save(figure, path)


TIED = {arm: arm for arm in ("dense", "random", "pmp", "mean", "rho0.9", "rho0.5")}
UNTIED = {"untied-dense": "dense", "untied-matched": "stopped early", "untied-pmp": "pmp"}


def anatomy(evidence, path):
    """Each pre-training: held-out loss against fine-tuned accuracy, so that lost capability shows.

    All with PMP's setting on docs; on word order each with its own.
    """
    figure, axes = subplots(1, 3, figsize=(12, 3.6))
    setting = choice(evidence.scale, "pmp", "docs", evidence.results)
    panels = {"docs": TIED, "docs, untied": UNTIED, "word order": TIED}
    for axis, (title, arms) in zip(axes, panels.items()):
        docs = title.startswith("docs")
        for arm, label in arms.items():
            scores = evidence.tuned(arm, setting) if docs else evidence.accuracy(arm, title)
            losses = evidence.models(arm)
            points = np.array([(losses[seed]["text_loss"], scores[seed]) for seed in scores if seed in losses])
            if len(points):
                dots(axis, *points.T, COLOURS[label], label)
        axis.set(xlabel="held-out pre-training loss, nats", title=title)
    axes[0].set(ylabel="fine-tuned accuracy, %")
    for axis in axes:
        axis.legend(fontsize=7)
    save(figure, path)


def costs(evidence, path):
    """Accuracy after 1, 2, 4, … updates of fine-tuning: the mean over pre-trainings."""
    figure, axes = subplots(1, len(MAIN), figsize=(10, 3.6))
    styles = {"dense": ("dense", "-"), "random": ("random", "-"), "pmp": ("pmp", "-"),
              "pmp + mask": ("pmp", "--"), "scratch": ("scratch", "-")}
    for axis, task in zip(axes, MAIN):
        for arm, (colour, style) in styles.items():
            curves = {}
            for result in evidence.runs(arm, task).values():
                for step, value in {**result["curve"], result["updates"]: result["accuracy"]}.items():
                    curves.setdefault(int(step), []).append(value)
            steps = sorted(curves)
            if steps:
                axis.plot(steps, [np.mean(curves[step]) for step in steps], style, color=COLOURS[colour], label=arm)
        axis.set(xscale="log", xlabel="updates of fine-tuning", ylabel="accuracy, %", title=task)
    axes[0].legend(fontsize=7)
    save(figure, path)


def figure2(evidence, path):
    """Ticket against random mask."""
    strips(evidence, ("dense", "pmp", "random", "scratch"), path)


def figure3(evidence, path):
    """Outsiders against the authorised."""
    strips(evidence, ("dense", "pmp", "pmp + mask", "dense lora", "pmp lora", "pmp lora + mask"), path)


def figure4(evidence, path):
    """Fine-tuned accuracy against the mask ratio, the learning rate and the epochs."""
    figure, axes = subplots(len(MAIN), 3, figsize=(10, 5.6), squeeze=False)
    found = by_ratio(evidence)
    if found[1.0]:
        for seed in found[1.0]:
            axes[0, 0].plot(list(found), [found[rho][seed] for rho in found], "o", color=COLOURS["pmp"], alpha=0.5)
        axes[0, 0].plot(list(found), [np.mean(list(one.values())) for one in found.values()], color=COLOURS["pmp"])
    axes[0, 0].set(xlabel="rho", ylabel="docs: accuracy, %", xticks=list(found))
    axes[1, 0].axis("off")  # ratios are tried on docs alone
    for line, task in zip(axes, MAIN):
        line[1].set(ylabel=f"{task}: accuracy, %")
        for axis, which, label in ((line[1], 0, "rate, times the default"), (line[2], 1, "epochs")):
            ticks = set()
            for arm in ("dense", "pmp"):
                best = {}
                for pair, values in evidence.search(arm, task).items():
                    best[pair[which]] = max(best.get(pair[which], 0.0), values.mean())
                points = sorted(best.items())
                axis.plot([x for x, _ in points], [y for _, y in points], "o-", color=COLOURS[arm], label=arm)
                ticks |= set(best)
            log_ticks(axis, sorted(ticks), label)
    axes[0, 1].legend(fontsize=7)
    save(figure, path)


def rates(evidence, path):
    """Docs at equal rates: fine-tuned accuracy, the rise of the pre-training loss, and what follows lost capability."""
    figure, axes = subplots(1, 3, figsize=(13, 3.6))
    for arm in ("dense", "pmp", "pmp + mask"):
        runs = {rate: found for rate, found in evidence.equal(arm).items() if found}
        for axis, values in zip(axes, (accuracies, partial(evidence.rises, arm))):
            ys = {rate: list(values(found).values()) for rate, found in runs.items()}
            for rate, found in ys.items():
                dots(axis, [rate] * len(found), found, COLOURS[arm])
            axis.plot(list(ys), [np.mean(found) for found in ys.values()], color=COLOURS[arm], label=arm)
            log_ticks(axis, EQUAL_RATES[arm], "rate, times the default")
    axes[0].set(ylabel="docs: fine-tuned accuracy, %")
    axes[1].set(ylabel="rise of the pre-training loss, nats")
    behind = evidence.behind("pmp", "dense")
    for rate, colour in zip((1.0, 4.0, 16.0), SHADES):
        runs = {arm: evidence.equal(arm)[rate] for arm in ("dense", "pmp")}
        gaps = evidence.differences(runs, {"dense": 1, "pmp": -1})
        seeds = [seed for seed in gaps if seed in behind]
        axes[2].plot([behind[seed] for seed in seeds], [gaps[seed] for seed in seeds], "o", color=colour,
                     label=f"{rate:g} x")
    axes[2].axvspan(-EQUAL, EQUAL, color="#eeeeee")
    axes[2].axhline(0, color="#bbbbbb", linewidth=0.8)
    axes[2].set(xlabel="held-out loss, PMP - dense, nats", ylabel="docs: accuracy, dense - PMP, points")
    axes[0].legend(fontsize=7)
    axes[2].legend(fontsize=7)
    save(figure, path)


def figure5(evidence, path):
    """By how much the loss rises beside the weights, along random directions."""
    figure, axes = subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for axis, model in zip(axes, ("pmp", "dense")):
        found = evidence.measured("landscape", model).values()
        for where in PLACES:
            curves = np.array([curve for result in found for curve in result["curves"][where]])
            if len(curves):
                alphas = next(iter(found))["alphas"]
                curves -= curves[:, [alphas.index(0)]]
                axis.errorbar(alphas, curves.mean(0), curves.std(0), label=where, capsize=2, color=COLOURS[where])
        axis.set(title=TITLES[model], xlabel="alpha")
    axes[0].set_ylabel("rise of the held-out loss, nats")
    axes[0].legend()
    save(figure, path)


def figure6(evidence, path):
    """Gradient magnitudes of ticket and complement on held-out text."""
    figure, axes = subplots(1, 2, figsize=(9, 3.2), sharey=True)
    for axis, model in zip(axes, ("pmp", "dense")):
        found = evidence.measured("gradients", model).values()
        for where in ("ticket", "complement"):
            if found:
                counts = np.sum([result["histogram"][where] for result in found], 0)
                axis.stairs(counts / counts.sum(), BINS, fill=True, alpha=0.5, label=where, color=COLOURS[where])
        axis.set(title=TITLES[model], xlabel="log10 |gradient|", xlim=(-9, -1))
    axes[0].set_ylabel("share of the weights")
    axes[0].legend()
    save(figure, path)


def proposition1(evidence, path):
    """What one step does to the pre-training loss, with the same eta and with the same length; and outsider's over
    authorised one's at the same eta, which Proposition 1 is about."""
    figure, axes = subplots(1, 3, figsize=(12, 3.6))
    styles = {"outsider": ("full", "-"), "authorised": ("ticket", "-"), "complement": ("complement", "-"),
              "authorised, same length": ("ticket", "--"), "complement, same length": ("complement", "--")}
    for axis, model in zip(axes, ("pmp", "dense")):
        axis.set_yscale("symlog", linthresh=0.1)
        found = evidence.measured("one_step", model).values()
        for arm, (colour, style) in styles.items():
            if found:
                change = 1e3 * np.mean([np.mean(result["change"][arm], 0) for result in found], 0)
                axis.plot(SIZES, change, style, marker="o", color=COLOURS[colour], label=arm)
        axis.set(title=TITLES[model], xscale="log")
        ratios = np.array([np.mean(result["change"]["outsider"], 0) / np.mean(result["change"]["authorised"], 0)
                           for result in found])
        for x, values in enumerate(ratios.T):
            beside = x + (-0.1 if model == "pmp" else 0.1)
            dots(axes[2], [beside] * len(values), values, COLOURS[model], None if x else model)
        axis.set_xlabel("length of the outsider's step / norm of the weights", fontsize=8)
    axes[0].set_ylabel("change of the loss, thousandths of a nat", fontsize=8)
    axes[0].legend(fontsize=7, handlelength=4)
    axes[2].set_xticks(range(len(SIZES)), [f"{size:g}" for size in SIZES])
    axes[2].set(title="outsider / authorised", xlabel="length of the outsider's step")
    axes[2].legend(fontsize=7)
    save(figure, path)


ALL = {"anatomy": anatomy, "costs": costs, "figure2": figure2, "figure3": figure3, "figure4": figure4, "rates": rates,
       "figure5": figure5, "figure6": figure6, "proposition1": proposition1}
KINDS = {"figure5": "landscape", "figure6": "gradients", "proposition1": "one_step"}
CAPTIONS = {"anatomy": "Held-out loss against fine-tuned accuracy", "costs": "Accuracy by updates of fine-tuning",
            "figure2": "Figure 2", "figure3": "Figure 3", "figure4": "Figure 4", "rates": "Docs at equal rates",
            "figure5": "Figure 5", "figure6": "Figure 6", "proposition1": "Proposition 1"}


def there(evidence, name):
    """Whether there are results for a picture."""
    if name in KINDS:
        return bool(evidence.measured(KINDS[name], "pmp") and evidence.measured(KINDS[name], "dense"))
    if name == "rates":
        return any(evidence.equal("dense").values())
    return bool(evidence.runs("dense", MAIN[0]))


def link(evidence, name):
    """A picture's line in a document."""
    path = f"results/{evidence.results.name}/{name}.png"
    return f"![{CAPTIONS[name]}]({path})" if there(evidence, name) else f"({CAPTIONS[name]}: not run yet.)"
