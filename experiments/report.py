"""The tables and pictures of the study, from its lines: the questions of PROTOCOL.md and their verdicts.

    python experiments/report.py        rewrites what is between the marks in experiments/README.md, and the pictures

RESULTS has the two files of study.py: study.jsonl, and the lines of glue.py, glue.jsonl.
"""

import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen is needed
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from scipy import interpolate, stats  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Parser, UserError, atomic, command_line, path  # noqa: E402
from glue import PAPER, PAPER_COLUMNS, read_results as read_glue  # noqa: E402
from study import ARMS, LENGTHS, LONG_PAIRS, PAIRS, RATES, read_results  # noqa: E402

HERE = Path(__file__).resolve().parent
BUDGET = 0.5  # nats that the pre-training loss may rise in question 3
AT_RATES = [f"{rate} ×" for rate in RATES]  # heads of columns

# ---- what was measured ----------------------------------------------------------------------------------------------


class Study:
    """The lines of study.jsonl, by arm and pair."""

    def __init__(self, lines):
        self.models, self.attacks, self.measures, runs = {}, {}, [], {}
        for line in lines:
            key = line["key"]
            if key["do"] == "train":
                self.models[key["model"], key["length"], key["pair"]] = line
            elif key["do"] == "tune":
                place = key["arm"], key["length"], key["pair"], key["rate"]
                runs.setdefault(place, {})[key["seed"]] = line
            elif key["do"] == "attack":
                self.attacks.setdefault(key["model"], []).append(line)
            elif key["do"] == "measure":
                self.measures.append(line)
        self.runs = {place: seeds for place, seeds in runs.items() if len(seeds) == 2}

    def release(self, model, pair, what="text", length=1):
        """A release's loss in nats on the pre-training text, or on the task."""
        return self.models[model, length, pair][what]["loss"]

    def tuned(self, arm, pair, rate, what="task", score="loss", length=1):
        """The mean over two orders of the text of a tuned model's loss, or its accuracy in percent."""
        return float(np.mean([line[what][score] for line in self.runs[arm, length, pair, rate].values()]))

    def pairs(self, *arms, length=1):
        """The pairs in which these arms are complete, all rates; none where there is only one."""
        found = []
        for pair in PAIRS:
            if all((arm, length, pair, rate) in self.runs for arm in arms for rate in RATES):
                found.append(pair)
        return found if len(found) > 1 else []  # the own best rate of one pair is chosen on another

    def trained(self, *models):
        """The pairs in which these models of one token a parameter are there."""
        return [pair for pair in PAIRS if all((model, 1, pair) in self.models for model in models)]

    def best_rate(self, arm, pair, length=1):
        """The rate with the least mean task loss over the other pairs."""
        others = [other for other in self.pairs(arm, length=length) if other != pair]
        means = []
        for rate in RATES:
            losses = [self.tuned(arm, other, rate, length=length) for other in others]
            means.append(np.mean(losses))
        return RATES[int(np.argmin(means))]

    def at_best(self, arm, pair, score="loss", length=1):
        """A tuned model's score on the task at its arm's own best rate."""
        return self.tuned(arm, pair, self.best_rate(arm, pair, length), "task", score, length)

    def rise(self, arm, pair, rate):
        """How much of the pre-training text a tuned model has forgotten, in nats."""
        return self.tuned(arm, pair, rate, "text") - self.release(ARMS[arm][0], pair)

    def log_rise(self, arm, pair):
        """log of what an arm forgets at 4 x over what the dense one does; nan where either forgets nothing."""
        rises = [self.rise(name, pair, 4) for name in (arm, "dense")]
        return math.log(rises[0] / rises[1]) if min(rises) > 0 else math.nan

    def at_equal_forgetting(self, arm, pair, budget=BUDGET, smooth=False):
        """The task loss where the pre-training loss has risen by budget, on a line between the two nearest rates.

        The arm begins at (0, the release's task loss). smooth: on a monotone cubic in place of the line. nan where no
        rate forgets so much, or where a higher rate forgets less.
        """
        rises = [0.0] + [self.rise(arm, pair, rate) for rate in RATES]
        losses = [self.release(ARMS[arm][0], pair, "task")] + [self.tuned(arm, pair, rate) for rate in RATES]
        if rises != sorted(set(rises)) or rises[-1] < budget:
            return math.nan
        if smooth:
            return float(interpolate.PchipInterpolator(rises, losses)(budget))
        return float(np.interp(budget, rises, losses))

    def gap(self, a, b, length=1):
        """The task loss of arm a minus that of arm b by pair, each at its own best rate."""
        return [self.at_best(a, pair, length=length) - self.at_best(b, pair, length=length)
                for pair in self.pairs(a, b, length=length)]

    def forgetting_gap(self, **options):
        """The outsider's task loss minus the dense model's at equal forgetting, by pair."""
        gaps = []
        for pair in self.pairs("outsider", "dense"):
            outsider, dense = [self.at_equal_forgetting(arm, pair, **options) for arm in ("outsider", "dense")]
            gaps.append(outsider - dense)
        return gaps

    def release_gap(self, a, b, what="text"):
        """The loss of release a minus that of release b, by pair."""
        return [self.release(a, pair, what) - self.release(b, pair, what) for pair in self.trained(a, b)]

    def gain(self, arm, pair, length=1):
        """What tuning at the own best rate takes from the task loss of the release, in nats."""
        return self.release(ARMS[arm][0], pair, "task", length) - self.at_best(arm, pair, length=length)


def interval(values):
    """(mean, half of the 95% interval) of values by pair."""
    if len(values) < 2:
        return math.nan, math.nan
    return float(np.mean(values)), float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def holm(ps):
    """Holm's adjusted p-values of a family."""
    adjusted, largest = [1.0] * len(ps), 0.0
    for place, i in enumerate(np.argsort(ps)):
        largest = max(largest, min(1.0, (len(ps) - place) * ps[i]))
        adjusted[i] = largest
    return adjusted


# ---- the eight questions --------------------------------------------------------------------------------------------


def paper_share():
    """The median share of the dense model's gain that PMP takes away in Table 1, TinyLlama, full, in percent."""
    (base, _), (dense, pmp) = PAPER["TinyLlama"]["base"], PAPER["TinyLlama"]["full"]
    shares = []
    for before, without, with_pmp in zip(base.split(), dense.split(), pmp.split()):
        shares.append(100 * (float(without) - float(with_pmp)) / (float(without) - float(before)))
    return np.median(shares)


def questions(study):
    """[{"claim", "paper", "values", "bound", "above", "unit"}] of PROTOCOL.md.

    values: the measure by pair; above: whether the claim is that it is above the bound.
    """
    both = study.pairs("outsider", "dense")
    tenth = 0.1 * interval([study.gain("dense", pair) for pair in both])[0]
    slopes = []
    if all(set(LONG_PAIRS) <= set(study.pairs("outsider", "dense", length=length)) for length in LENGTHS):
        for pair in LONG_PAIRS:
            gaps = [study.at_best("outsider", pair, length=length) - study.at_best("dense", pair, length=length)
                    for length in LENGTHS]
            slopes.append(float(np.polyfit(np.log10(LENGTHS), gaps, 1)[0]))
    attacks = study.attacks.get("pmp", [])
    line = f"the shadow alone {interval([attack['shadow']['found'] for attack in attacks])[0]:.2f}"
    theirs = f"{paper_share():.0f}% less in the median task of Table 1 (TinyLlama, full, accuracy)"
    columns = ("claim", "paper", "values", "bound", "above", "unit")
    rows = [
        ("PMP preserves capability: held-out loss, PMP − dense", "yes (4.2)",
         study.release_gap("pmp", "dense"), 0.05, False, "nats"),
        ("Outsiders gain at least a tenth less: task loss, outsider − dense, each at its own best rate", theirs,
         study.gap("outsider", "dense"), tenth, True, "nats"),
        (f"… also at equal forgetting, {BUDGET} nats", "–",
         study.forgetting_gap(), tenth, True, "nats"),
        ("The early-bird ticket protects better than a random mask: task loss, outsider − random",
         "yes on most tasks (Figure 2)", study.gap("outsider", "random"), 0, True, "nats"),
        ("The mask helps those who have it: task loss, outsider − authorised", "as good or better on all tasks (4.3)",
         study.gap("outsider", "authorised"), 0, True, "nats"),
        ("Outsiders forget more: forgetting at 4 ×, log(outsider / dense)",
         "suggested by Proposition 1, which has no dense model",
         [study.log_rise("outsider", pair) for pair in both], 0, True, ""),
        (f"The mask cannot be recovered by somebody who knows the text: share of the ticket in the best guess; a "
         f"random one has 0.70, {line}",
         "not by gradients alone (5.2)", [attack["classifier"]["found"] for attack in attacks], 0.75, False, ""),
        ("The protection grows with training: slope of question 2 over log10(tokens a parameter)",
         "not said; our reading of section 3", slopes, 0, True, "nats a tenfold"),
    ]
    return [dict(zip(columns, row)) for row in rows]


def judge(asked):
    """Add "p", adjusted by Holm over all questions, and "verdict" to each question."""
    ps = []
    for ask in asked:
        p = stats.ttest_1samp(ask["values"], ask["bound"]).pvalue if len(ask["values"]) > 2 else 1.0
        ps.append(1.0 if math.isnan(p) else float(p))
    for ask, p in zip(asked, holm(ps)):
        ask["p"] = p
        if not ask["values"]:
            ask["verdict"] = "not run"
        elif p >= 0.05:
            ask["verdict"] = "open"
        elif (np.mean(ask["values"]) > ask["bound"]) == ask["above"]:
            ask["verdict"] = "holds"
        else:
            ask["verdict"] = "does not hold"
    return asked


def markdown(heads, rows):
    """A Markdown table. heads: a list of str; rows: lists of as many."""
    lines = []
    for cells in [heads, ["---"] * len(heads), *rows]:
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def question_table(asked):
    rows = []
    for number, ask in enumerate(asked, 1):
        effect = "–"
        if ask["values"]:
            middle, half = interval(ask["values"])
            effect = f"{middle:.3f} ±{half:.3f} {ask['unit']}".strip()
        side = ">" if ask["above"] else "<"
        rows.append([str(number), ask["claim"], effect, f"{side} {ask['bound']:.3g}", str(len(ask["values"])),
                     f"**{ask['verdict']}**", ask["paper"]])
    return markdown(["", "claim", "effect (95%)", "bound", "pairs", "verdict", "the paper"], rows)


# ---- what is described, without a verdict ---------------------------------------------------------------------------


def said(values, digits=3, sign="+"):
    """"+0.104 ±0.023" of values by pair; sign="-" writes no plus."""
    if len(values) < 2:
        return "not run"
    middle, half = interval(values)
    return f"{middle:{sign}.{digits}f} ±{half:.{digits}f}"


def describe(study):
    """A Markdown list of the effects without a verdict: mean, 95% interval, pairs."""
    lines = []

    def add(text, values, unit=" nats", digits=3):
        if len(values) > 1:
            lines.append(f"- {text}: {said(values, digits)}{unit} ({len(values)}).")

    both = study.pairs("outsider", "dense")
    add("Gain over the release, as the paper counts, dense", [study.gain("dense", pair) for pair in both])
    for arm in ("outsider", "random", "matched"):
        add(f"… dense − {arm}",
            [study.gain("dense", pair) - study.gain(arm, pair) for pair in study.pairs(arm, "dense")])
    for name, model in (("PMP", "pmp"), ("matched", "matched")):
        add(f"Task loss before tuning, {name} − dense", study.release_gap(model, "dense", "task"))
    add("Question 2 as a share of the dense model's gain",
        [100 * gap / study.gain("dense", pair) for gap, pair in zip(study.gap("outsider", "dense"), both)], "%", 1)
    add("Question 3 on a smooth curve in place of the line", study.forgetting_gap(smooth=True))
    add("Question 3 at a rise by 0.7 nats", study.forgetting_gap(budget=0.7))
    for number, arm, other in ((2, "outsider", "dense"), (4, "outsider", "random")):
        left = []
        for pair in study.pairs(arm, other, "dense", "matched"):
            slope = ((study.at_best("matched", pair) - study.at_best("dense", pair))
                     / (study.release("matched", pair) - study.release("dense", pair)))
            lost = slope * (study.release(ARMS[arm][0], pair) - study.release(ARMS[other][0], pair))
            left.append(study.at_best(arm, pair) - study.at_best(other, pair) - lost)
        add(f"Question {number} without what the lost capability explains, on the line of `matched`", left)
    for arm in ("random", "authorised", "matched"):
        add(f"Question 6 for {arm} in place of the outsider",
            [study.log_rise(arm, pair) for pair in study.pairs(arm, "dense")], "")
    add("Held-out loss, random mask − dense", study.release_gap("random", "dense"))
    add("Held-out loss, ticket with secret noise − PMP", study.release_gap("noisy", "pmp"))
    add("Accuracy on docs, dense − outsider, each at its own best rate",
        [study.at_best("dense", pair, score="accuracy") - study.at_best("outsider", pair, score="accuracy")
         for pair in both], " points", 2)
    return "\n".join(lines)


def length_table(study):
    """What more training changes, in the pairs of question 8; each arm at its own best rate unless a rate is named."""
    heads, rows = ["tokens a parameter (pairs)"], {}
    for length in LENGTHS:
        pairs = [pair for pair in study.pairs("outsider", "dense", "authorised", length=length) if pair in LONG_PAIRS]
        heads.append(f"{length} ({len(pairs)})")
        before, at_8, best, gain = {}, {}, {}, {}  # task losses by pair, of each arm, and what tuning takes from them
        for arm in ("outsider", "dense", "authorised"):
            before[arm] = np.array([study.release(ARMS[arm][0], pair, "task", length) for pair in pairs])
            at_8[arm] = np.array([study.tuned(arm, pair, 8, length=length) for pair in pairs])
            best[arm] = np.array([study.at_best(arm, pair, length=length) for pair in pairs])
            gain[arm] = np.array([study.gain(arm, pair, length) for pair in pairs])
        dense = np.array([study.release("dense", pair, length=length) for pair in pairs])
        pmp = np.array([study.release("pmp", pair, length=length) for pair in pairs])
        for name, values in (
                ("held-out loss, dense", dense), ("question 1, PMP − dense", pmp - dense),
                ("gain, dense", gain["dense"]),
                ("question 2, outsider − dense", best["outsider"] - best["dense"]),
                ("… both at 8 ×", at_8["outsider"] - at_8["dense"]),
                ("… before tuning", before["outsider"] - before["dense"]),
                ("… by gain, dense − outsider", gain["dense"] - gain["outsider"]),
                ("question 5, outsider − authorised", best["outsider"] - best["authorised"]),
                ("… the mask at 8 ×", at_8["outsider"] - at_8["authorised"])):
            row = rows.setdefault(name, [name])
            row.append(said(values, sign="-" if name.startswith("held-out") else "+"))
    return markdown(heads, rows.values())


def rate_table(study):
    """Task loss of each arm at each rate, mean over pairs, the least in bold; in brackets what is forgotten."""
    rows = []
    for arm, (model, _) in ARMS.items():
        pairs = study.pairs(arm)
        if not pairs:
            continue
        before = np.mean([study.release(model, pair, "task") for pair in pairs])
        cells = [f"{arm} ({len(pairs)})", f"{before:.3f}"]
        losses = [np.mean([study.tuned(arm, pair, rate) for pair in pairs]) for rate in RATES]
        for rate, loss in zip(RATES, losses):
            rise = np.mean([study.rise(arm, pair, rate) for pair in pairs])
            mark = "**" if loss == min(losses) else ""
            cells.append(f"{mark}{loss:.3f}{mark} ({rise:+.2f})")
        rows.append(cells)
    return markdown(["arm (pairs)", "before", *AT_RATES], rows)


def equal_rate_table(study):
    """Differences of the task loss at equal rates: mean and 95% interval; in brackets the number of pairs."""
    rows = []
    for a, b in (("outsider", "dense"), ("outsider", "random"), ("outsider", "authorised"),
                 ("dense", "dense in the mask"), ("guessed mask", "authorised")):
        pairs = study.pairs(a, b)
        cells = [said([study.tuned(a, pair, rate) - study.tuned(b, pair, rate) for pair in pairs]) for rate in RATES]
        rows.append([f"{a} − {b} ({len(pairs)})", *cells])
    arms = ("outsider", "authorised", "dense", "dense in the mask")
    pairs, cells = study.pairs(*arms), []
    for rate in RATES:
        tuned = [np.array([study.tuned(arm, pair, rate) for pair in pairs]) for arm in arms]
        cells.append(said(tuned[0] - tuned[1] - tuned[2] + tuned[3]))
    rows.append([f"the third line minus the fourth ({len(pairs)})", *cells])
    return markdown(["task loss", *AT_RATES], rows)


def table_1(lines, owners):
    """Table 1: accuracy in percent, mean ±sd over pairs. owners: {fingerprint of the weights: model}."""
    rows, commonest = {}, {}
    for line in lines:
        if line["weights"] not in owners:
            continue
        row = rows.setdefault((line["method"], owners[line["weights"]], line["authorised"]), {})
        for column, scores in line["epochs"][-1].items():
            row.setdefault(column, []).append(scores["accuracy"])
            commonest[column] = line["commonest"][column]
    columns = [column for column in PAPER_COLUMNS if column in commonest]
    table_rows = []
    for method in ("base", "lora", "full"):
        for place, (model, mask) in enumerate((("dense", False), ("pmp", False), ("pmp", True))):
            row = rows.get((method, model, mask), {})
            if not row:
                continue
            cells = []
            for column in columns:
                values = row.get(column, [])
                cells.append(f"{np.mean(values):.1f} ±{np.std(values, ddof=1):.1f}" if len(values) > 1 else "–")
            average = "–"
            if "–" not in cells:
                average = f"{np.mean([np.mean(row[column]) for column in columns]):.1f}"
            theirs = "–"
            if not mask:
                numbers = dict(zip(PAPER_COLUMNS, PAPER["TinyLlama"][method][place].split()))
                theirs = " / ".join(numbers[column] for column in columns)
            name = method + (", PMP" if model == "pmp" else "") + (" + mask" if mask else "")
            table_rows.append([name, *cells, average, theirs])
    values = [commonest[column] for column in columns]
    table_rows.append(["always the commonest class", *[f"{value:.1f}" for value in [*values, np.mean(values)]], ""])
    return markdown(["", *columns, "average", "the paper's TinyLlama, these columns"], table_rows)


def attack_table(attacks):
    """How much of a mask each attack of attack.py finds. attacks: {model: lines}."""
    masks = {"pmp": "early-bird ticket", "noisy": "with secret noise", "random": "random mask"}
    columns = []
    for model, mask in masks.items():
        count = len(attacks.get(model, []))
        columns += [f"{mask} ({count}): found", "surest 30%"]
    rows = []
    for name in ("gradient", "distance", "shadow", "classifier"):
        cells = []
        for model in masks:
            for score in ("found", "surest"):
                cells.append(said([line[name][score] for line in attacks.get(model, [])], sign="-"))
        rows.append([name, *cells])
    return markdown(["attack", *columns], rows)


def measure_table(lines):
    """Figures 5 and 6, Proposition 1 and the premise of section 3, of PMP and its dense twin in the same mask."""
    twins = {"PMP": [line for line in lines if line["key"]["model"] == "pmp"],
             "dense": [line for line in lines if line["key"]["model"] == "dense"]}
    regions = ("ticket", "complement", "full", "cross")
    rows = []
    for name, found in twins.items():
        cells = []
        for region in ("ticket", "complement", "full"):
            values = []
            for line in found:
                curve = line["figure 5"][region]
                values.append(curve[line["alphas"].index(0.1)] - curve[line["alphas"].index(0.0)])
            cells.append(said(values))
        rows.append([f"Figure 5: rise of the loss, {name}", *cells, ""])
    for label, terms in (("slope", ["slope"]), ("curvature", ["curvature"]), ("sum", ["slope", "curvature"])):
        for name, found in twins.items():
            cells = []
            for region in regions:
                values = [sum(line["proposition 1"][term][region] for term in terms) for line in found]
                cells.append(said(values))
            rows.append([f"Proposition 1: {label}, {name}", *cells])
    text = markdown(["", "ticket", "complement", "all weights", "cross term"], rows)
    rows = []
    for name, found in twins.items():
        figure_6 = [line["figure 6"] for line in found]
        columns = [[figure["zeros"]["ticket"] for figure in figure_6],
                   [figure["zeros"]["complement"] for figure in figure_6],
                   [figure["auc of the rest"] for figure in figure_6], [figure["found"] for figure in figure_6],
                   [line["premise"] for line in found]]
        cells = [said(values, sign="-") for values in columns]
        rows.append([f"Figure 6, section 3: {name}", *cells])
    heads = ["", "gradients of 0, ticket", "complement", "AUC of the rest", "the largest 70% find",
             "squared gradient in the ticket"]
    return text + "\n\n" + markdown(heads, rows)


# ---- pictures -------------------------------------------------------------------------------------------------------


def draw_figure_2(study, file):
    """Figure 2 by loss: the release and the tuned model, for no mask, a random mask and the early-bird ticket."""
    arms = ("dense", "random", "outsider")
    pairs = study.pairs(*arms)
    before = [[study.release(ARMS[arm][0], pair) for arm in arms] for pair in pairs]
    after = [[study.at_best(arm, pair) for arm in arms] for pair in pairs]
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    titles = ("release: pre-training loss", "all weights tuned: task loss")
    for axis, title, losses in zip(axes, titles, (before, after)):
        axis.plot(range(3), np.transpose(losses), color="grey", marker="o", linewidth=0.8, alpha=0.5)
        half = [interval(column)[1] for column in np.transpose(losses)]
        axis.errorbar(np.arange(3) + 0.1, np.mean(losses, axis=0), half, color="black", linestyle="", marker="_",
                      capsize=3)
        axis.set(title=title, xticks=range(3), ylabel="nats, lower is better", xlim=(-0.3, 2.3))
        axis.set_xticklabels(("no mask", "random mask", "PMP's ticket"))
        axis.grid(alpha=0.3, axis="y")
    figure.suptitle("grey: a line for each pair; black: mean and 95%", fontsize=9)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def draw_rates(study, file):
    """The task loss beside the dense model's at equal rates (Figure 4, middle), and against forgetting (question 3)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for number, arm in enumerate(("dense", "outsider", "authorised", "guessed mask", "random")):
        pairs = study.pairs(arm, "dense")
        if not pairs:
            continue
        losses, dense, rises = [], [], []  # each (pairs, rates)
        for pair in pairs:
            losses.append([study.tuned(arm, pair, rate) for rate in RATES])
            dense.append([study.tuned("dense", pair, rate) for rate in RATES])
            rises.append([study.rise(arm, pair, rate) for rate in RATES])
        losses, dense, rises = np.array(losses), np.array(dense), np.array(rises)
        if arm != "dense":
            half = stats.t.ppf(0.975, len(pairs) - 1) * stats.sem(losses - dense)
            apart = np.array(RATES) * 1.04 ** (number - 2)  # so that no interval hides another
            middle = (losses - dense).mean(0)
            left.errorbar(apart, middle, half, color=f"C{number}", marker="o", markersize=4, capsize=2)
        line = "--" if arm == "guessed mask" else "-"  # it covers the authorised user's
        right.plot(rises.mean(0), losses.mean(0), line, color=f"C{number}", marker="o", markersize=4, label=arm)
    left.axhline(0, color="C0", linewidth=1)
    left.set(title="task loss minus the dense model's (Figure 4, middle)", xscale="log", ylabel="nats, 95%",
             xlabel="rate, times glue.py's")
    left.set_xticks(RATES, [str(rate) for rate in RATES])
    left.minorticks_off()
    right.axvline(BUDGET, color="grey", linestyle=":", linewidth=1)
    right.set(title="what tuning costs: lower left is better", ylabel="task loss, nats",
              xlabel="forgetting: rise of the pre-training loss, nats")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def replace_block(text, name, content):
    """Put content between <!-- name --> and <!-- end of name -->. Raises UserError where they are missing."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise UserError(f"the document has no place for {name}: put {begin.strip()} and {end} there, a line each")
    return text.split(begin)[0] + begin + "\n" + content + "\n\n" + end + text.split(end)[1]


def main():
    parser = Parser("Write the study's tables into experiments/README.md, and draw its pictures.")
    parser.add_argument("--results", type=path, default=str(HERE / "results" / "study"),
                        help="the folder with study.jsonl and glue.jsonl [experiments/results/study]")
    parser.add_argument("--readme", type=path, default=str(HERE / "README.md"), help="[experiments/README.md]")
    args = parser.parse_args()
    results, readme = Path(args.results), Path(args.readme)
    if not (results / "study.jsonl").exists():
        raise UserError(f"{results} has no study.jsonl: name the --out of study.py")
    study = Study(read_results(results / "study.jsonl").values())
    owners = {line["weights"]: key[0] for key, line in study.models.items() if "weights" in line}
    text = readme.read_text()
    text = replace_block(text, "questions", question_table(judge(questions(study))))
    text = replace_block(text, "described", describe(study))
    text = replace_block(text, "rates", rate_table(study) + "\n\n" + equal_rate_table(study))
    text = replace_block(text, "lengths", length_table(study))
    text = replace_block(text, "recovery", attack_table(study.attacks))
    text = replace_block(text, "measures", measure_table(study.measures))
    if (results / "glue.jsonl").exists():
        text = replace_block(text, "table 1", table_1(read_glue(results / "glue.jsonl"), owners))
    with atomic(readme) as file:
        file.write(text.encode())
    if study.pairs("dense", "outsider", "random"):
        draw_figure_2(study, results / "figure2.png")
        draw_rates(study, results / "rates.png")


if __name__ == "__main__":
    command_line(main)
