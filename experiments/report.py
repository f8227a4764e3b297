"""The tables and pictures of the study, from its lines: the questions of PROTOCOL.md and their verdicts.

    python experiments/report.py        rewrites what is between the marks in experiments/README.md, and the pictures

RESULTS has two files of study.py: study.jsonl, and the lines of glue.py, glue.jsonl.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen is needed
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from scipy import stats  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from glue import PAPER, PAPER_COLUMNS  # noqa: E402

HERE = Path(__file__).resolve().parent
RATES = (1, 2, 4, 8, 16)
BUDGET = 0.5  # nats that the pre-training loss may rise in question 3
NAMES = {"cola": "CoLA", "sst2": "SST-2", "rte": "RTE"}


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


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
        """The pairs in which these arms are complete: all rates."""
        return [pair for pair in range(8)
                if all((arm, length, pair, rate) in self.runs for arm in arms for rate in RATES)]

    def best_rate(self, arm, pair, length=1):
        """The rate with the least mean task loss over the other pairs."""
        others = [other for other in self.pairs(arm, length=length) if other != pair]
        return min(RATES, key=lambda rate: np.mean([self.tuned(arm, other, rate, length=length) for other in others]))

    def at_best(self, arm, pair, what="task", score="loss", length=1):
        """A tuned model's score at its arm's own best rate."""
        return self.tuned(arm, pair, self.best_rate(arm, pair, length), what, score, length)

    def at_equal_forgetting(self, arm, model, pair):
        """The task loss where the pre-training loss has risen by BUDGET, on a line between the two nearest rates.

        The arm begins at (0, the release's task loss). nan where no rate forgets so much.
        """
        before = self.release(model, pair)
        rises = [0.0] + [self.tuned(arm, pair, rate, "text") - before for rate in RATES]
        losses = [self.release(model, pair, "task")] + [self.tuned(arm, pair, rate) for rate in RATES]
        for i in range(len(RATES)):
            if rises[i] <= BUDGET <= rises[i + 1]:
                share = (BUDGET - rises[i]) / (rises[i + 1] - rises[i])
                return losses[i] + share * (losses[i + 1] - losses[i])
        return math.nan

    def gain(self, arm, model, pair, length=1):
        """What tuning takes from the task loss of the release, in nats."""
        return self.release(model, pair, "task", length) - self.at_best(arm, pair, length=length)


def interval(values):
    """(mean, half of the 95% interval) of values by pair."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return float(np.mean(values)) if len(values) else math.nan, math.nan
    return float(values.mean()), float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def holm(ps):
    """Holm's adjusted p-values of a family; a nan counts as 1."""
    order = sorted(range(len(ps)), key=lambda i: ps[i] if ps[i] == ps[i] else 1)
    adjusted, largest = [1.0] * len(ps), 0.0
    for place, i in enumerate(order):
        p = ps[i] if ps[i] == ps[i] else 1
        largest = max(largest, min(1.0, (len(ps) - place) * p))
        adjusted[i] = largest
    return adjusted


# ---- the eight questions --------------------------------------------------------------------------------------------


def questions(study):
    """[{"claim", "paper", "values", "bound", "above", "unit", "p", "verdict"}].

    values: by pair; above: on which side of the bound the claim lies; p: adjusted.
    """
    both = study.pairs("outsider", "dense")
    tenth = 0.1 * np.mean([study.gain("dense", "dense", pair) for pair in both]) if len(both) > 1 else math.nan
    models = [pair for pair in range(8) if all((name, 1, pair) in study.models for name in ("pmp", "dense"))]
    asked = []

    def ask(claim, paper, values, bound, above, unit="nats"):
        asked.append({"claim": claim, "paper": paper, "values": values, "bound": bound, "above": above, "unit": unit})

    def best(a, b, pairs, length=1):
        return [study.at_best(a, pair, length=length) - study.at_best(b, pair, length=length) for pair in pairs]

    ask("PMP preserves capability: held-out loss, PMP − dense", "equal base rows of Table 1",
        [study.release("pmp", pair) - study.release("dense", pair) for pair in models], 0.05, False)
    enough = len(both) > 1
    ask("Outsiders gain less: task loss, outsider − dense, each at its own best rate",
        "17 to 61% of the gain (Table 1, full)", best("outsider", "dense", both) if enough else [], tenth, True)
    ask(f"… also at equal forgetting: where the pre-training loss has risen by {BUDGET} nats", "–",
        [study.at_equal_forgetting("outsider", "pmp", pair) - study.at_equal_forgetting("dense", "dense", pair)
         for pair in both], tenth, True)
    pairs = study.pairs("outsider", "random")
    ask("The early-bird ticket protects better than a random mask: task loss, outsider − random",
        "yes on most tasks (Figure 2)", best("outsider", "random", pairs) if len(pairs) > 1 else [], 0, True)
    pairs = study.pairs("outsider", "authorised")
    ask("The mask helps those who have it: task loss, outsider − authorised", "yes on all tasks (Figure 3)",
        best("outsider", "authorised", pairs) if len(pairs) > 1 else [], 0, True)
    ask("Outsiders forget more: rise of the pre-training loss at 4 ×, log(outsider / dense)",
        "follows from Proposition 1",
        [math.log((study.tuned("outsider", pair, 4, "text") - study.release("pmp", pair))
                  / (study.tuned("dense", pair, 4, "text") - study.release("dense", pair))) for pair in both],
        0, True, "")
    ask("The mask cannot be recovered: share of the ticket in the best guess; chance is 0.70",
        "not from a few gradients (5.2)",
        [line["classifier"]["found"] for line in study.attacks.get("pmp", [])], 0.75, False, "")
    slopes = []
    for pair in range(4):
        lengths = [length for length in (1, 3, 10) if pair in study.pairs("outsider", "dense", length=length)
                   and len(study.pairs("outsider", "dense", length=length)) > 1]
        if len(lengths) == 3:
            gaps = [best("outsider", "dense", [pair], length)[0] for length in lengths]
            slopes.append(float(np.polyfit(np.log10(lengths), gaps, 1)[0]))
    ask("The protection grows with training: slope of question 2 over log10(tokens a parameter)",
        "implied by section 3", slopes, 0, True)
    ps = [float(stats.ttest_1samp(ask["values"], ask["bound"]).pvalue) if len(ask["values"]) > 2 else math.nan
          for ask in asked]
    for ask, p in zip(asked, holm(ps)):
        right = (np.mean(ask["values"]) > ask["bound"]) == ask["above"] if ask["values"] else False
        ask["p"] = p
        ask["verdict"] = "open" if p >= 0.05 else "holds" if right else "does not hold"
        if not ask["values"]:
            ask["verdict"] = "not run"
    return asked


def question_table(asked):
    rows = ["| | claim | effect (95%) | bound | pairs | verdict | the paper |", "| --- " * 7 + "|"]
    for number, ask in enumerate(asked, 1):
        middle, half = interval(ask["values"])
        effect = f"{middle:+.3f} ±{half:.3f} {ask['unit']}".strip() if ask["values"] else "–"
        side = ">" if ask["above"] else "<"
        rows.append(f"| {number} | {ask['claim']} | {effect} | {side} {ask['bound']:.3g} | {len(ask['values'])} | "
                    f"**{ask['verdict']}** | {ask['paper']} |")
    return "\n".join(rows)


# ---- what is described, without a verdict ---------------------------------------------------------------------------


def said(values, digits=3):
    """"+0.104 ±0.023 (8)" of values by pair."""
    values = [value for value in values if value == value]
    middle, half = interval(values)
    return f"{middle:+.{digits}f} ±{half:.{digits}f} ({len(values)})" if values else "not run"


def describe(study):
    """A list of Markdown with the descriptive effects: mean, 95% interval, pairs."""
    both, lines = study.pairs("outsider", "dense"), []
    if len(both) < 2:
        return "not run"

    def add(text, values, unit=" nats"):
        lines.append(f"- {text}: {said(values)}{unit}.")

    add("gain over the release, as the paper counts, dense", [study.gain("dense", "dense", pair) for pair in both])
    add("… outsider", [study.gain("outsider", "pmp", pair) for pair in both])
    shares = [100 * (1 - study.gain("outsider", "pmp", pair) / study.gain("dense", "dense", pair)) for pair in both]
    lines.append(f"- Share of the dense model's gain that the outsider lacks: {said(shares, 1)}%. Paper: 17 to 61%.")
    matched = [pair for pair in study.pairs("matched") if pair in both]
    if len(matched) > 1:
        left = []
        for pair in matched:
            slope = ((study.at_best("matched", pair) - study.at_best("dense", pair))
                     / (study.release("matched", pair) - study.release("dense", pair)))
            line = study.at_best("dense", pair) + slope * (study.release("pmp", pair) - study.release("dense", pair))
            left.append(study.at_best("outsider", pair) - line)
        add("Question 2 against a dense model as weak as PMP's release, what is not lost capability", left)
    inside = [pair for pair in study.pairs("authorised", "dense in the mask") if pair in both]
    if len(inside) > 1:
        add("Question 5 minus the same for the dense model in the same mask",
            [study.at_best("outsider", pair) - study.at_best("authorised", pair)
             - study.at_best("dense", pair) + study.at_best("dense in the mask", pair) for pair in inside])
    guessed = [pair for pair in study.pairs("guessed mask") if pair in both]
    if len(guessed) > 1:
        add("Question 2 for an outsider with a guessed mask",
            [study.at_best("guessed mask", pair) - study.at_best("dense", pair) for pair in guessed])
    random = [pair for pair in study.pairs("random") if pair in both]
    if len(random) > 1:
        add("Held-out loss, random mask − dense", [study.release("random", pair) - study.release("dense", pair)
                                                   for pair in random])
        add("Question 2 for a random mask", [study.at_best("random", pair) - study.at_best("dense", pair)
                                             for pair in random])
    noisy = [pair for pair in range(8) if ("noisy", 1, pair) in study.models]
    if len(noisy) > 1:
        add("Held-out loss, ticket with secret noise − PMP",
            [study.release("noisy", pair) - study.release("pmp", pair) for pair in noisy])
    add("Accuracy on docs, dense − outsider, each at its own best rate",
        [study.at_best("dense", pair, score="accuracy") - study.at_best("outsider", pair, score="accuracy")
         for pair in both], " points")
    for length in (3, 10):
        pairs = study.pairs("outsider", "dense", length=length)
        if len(pairs) > 1:
            add(f"{length} tokens a parameter: held-out loss, PMP − dense",
                [study.release("pmp", pair, length=length) - study.release("dense", pair, length=length)
                 for pair in pairs])
            add(f"{length} tokens a parameter: question 2",
                [study.at_best("outsider", pair, length=length) - study.at_best("dense", pair, length=length)
                 for pair in pairs])
            add(f"{length} tokens a parameter: question 5",
                [study.at_best("outsider", pair, length=length) - study.at_best("authorised", pair, length=length)
                 for pair in study.pairs("outsider", "authorised", length=length)])
    return "\n".join(lines)


ARMS = {"dense": "dense", "outsider": "pmp", "authorised": "pmp", "guessed mask": "pmp", "dense in the mask": "dense",
        "random": "random", "matched": "matched"}  # name: the model that is tuned


def rate_table(study):
    """Task loss of each arm at each rate, mean over pairs; in brackets the rise of the pre-training loss."""
    rows = ["| arm | release | " + " | ".join(f"{rate} ×" for rate in RATES) + " | pairs |",
            "| --- " * (len(RATES) + 3) + "|"]
    for arm, model in ARMS.items():
        pairs = study.pairs(arm)
        if not pairs:
            continue
        release = np.mean([study.release(model, pair, "task") for pair in pairs])
        cells = []
        for rate in RATES:
            loss = np.mean([study.tuned(arm, pair, rate) for pair in pairs])
            rise = np.mean([study.tuned(arm, pair, rate, "text") - study.release(model, pair) for pair in pairs])
            cells.append(f"{loss:.3f} ({rise:+.2f})")
        rows.append(f"| {arm} | {release:.3f} | {' | '.join(cells)} | {len(pairs)} |")
    return "\n".join(rows)


def table_1(lines, owners):
    """Table 1: accuracy in percent, mean ±sd over pairs. owners: {fingerprint of the weights: model}."""
    rows, commonest = {}, {}
    for line in lines:
        row = rows.setdefault((line["method"], owners[line["weights"]], line["authorised"]), {})
        for column, scores in line["epochs"][-1].items():
            row.setdefault(column, []).append(scores["accuracy"])
            commonest[column] = line["commonest"][column]
    columns = [column for column in PAPER_COLUMNS if column in commonest]
    text = ["| | " + " | ".join(columns) + " | average | the paper's TinyLlama, these columns |",
            "| --- " * (len(columns) + 3) + "|"]
    for method in ("base", "lora", "full"):
        for place, (model, mask) in enumerate((("dense", False), ("pmp", False), ("pmp", True))):
            row = rows.get((method, model, mask))
            if not row:
                continue
            cells = [f"{np.mean(row[column]):.1f} ±{np.std(row[column], ddof=1):.1f}" for column in columns]
            average = np.mean([np.mean(row[column]) for column in columns])
            numbers = dict(zip(PAPER_COLUMNS, PAPER["TinyLlama"][method][place].split())) if place < 2 else {}
            theirs = " / ".join(numbers[column] for column in columns) if numbers else "–"
            name = method + (", PMP" if model == "pmp" else "") + (" + mask" if mask else "")
            text.append(f"| {name} | {' | '.join(cells)} | {average:.1f} | {theirs} |")
    cells = [f"{commonest[column]:.1f}" for column in columns]
    text.append(f"| always the commonest class | {' | '.join(cells)} | "
                f"{np.mean([commonest[column] for column in columns]):.1f} | |")
    return "\n".join(text)


def attack_table(attacks):
    """How much of the mask each attack of attack.py finds, by the kind of mask. attacks: {model: lines}."""
    rows = ["| mask | attack | share of the ticket found | of the surest 30%, ticket | IoU | AUC | pairs |",
            "| --- " * 7 + "|"]
    masks = {"pmp": "early-bird ticket", "noisy": "ticket with secret noise", "random": "random mask"}
    for model, mask in masks.items():
        lines = attacks.get(model, [])
        for name in ("gradient", "distance", "shadow", "classifier") if len(lines) > 1 else ():
            cells = []
            for score in ("found", "surest", "iou", "auc"):
                middle, half = interval([line[name][score] for line in lines])
                cells.append(f"{middle:.3f} ±{half:.3f}")
            rows.append(f"| {mask} | {name} | {' | '.join(cells)} | {len(lines)} |")
    return "\n".join(rows)


def measure_table(lines):
    """Figure 5, 6, Proposition 1 and the premise of section 3, PMP and its dense twin in the same mask."""
    rows = ["| | PMP | dense, in the same mask |", "| --- | --- | --- |"]

    def add(name, of):
        cells = [said([of(line) for line in lines if line["key"]["model"] == model]) for model in ("pmp", "dense")]
        rows.append(f"| {name} | {' | '.join(cells)} |")

    middle, step = lines[0]["alphas"].index(0.0), lines[0]["alphas"].index(0.1)
    for place in ("ticket", "full", "complement"):
        add(f"Figure 5: rise of the loss at 0.1 of theta's norm, {place}",
            lambda line, place=place: line["figure 5"][place][step] - line["figure 5"][place][middle])
    add("Figure 6: AUC of |gradient| for the ticket", lambda line: line["figure 6"]["auc"])
    add("premise of section 3: share of the squared gradient that lies in the ticket",
        lambda line: line["premise"])
    for part in ("full", "ticket", "complement", "cross"):
        add(f"Proposition 1: one step on docs adds to the pre-training loss, {part}",
            lambda line, part=part: line["proposition 1"][part])
    return "\n".join(rows)


# ---- pictures -------------------------------------------------------------------------------------------------------


def draw_figure_2(study, file):
    """Figure 2 by loss: the release and the tuned model, for no mask, a random mask and the early-bird ticket."""
    pairs = [pair for pair in study.pairs("dense", "random", "outsider")]
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    columns = (("dense", "dense"), ("random", "random"), ("outsider", "pmp"))
    for axis, title in zip(axes, ("release: pre-training loss", "tuned by an outsider: task loss")):
        for pair in pairs:
            if axis is axes[0]:
                values = [study.release(model, pair) for _, model in columns]
            else:
                values = [study.at_best(arm, pair) for arm, _ in columns]
            axis.plot(range(3), values, color="grey", marker="o", linewidth=0.8, alpha=0.6)
        axis.set(title=title, xticks=range(3), ylabel="nats, lower is better", xlim=(-0.3, 2.3))
        axis.set_xticklabels(("no mask", "random mask", "PMP's ticket"))
        axis.grid(alpha=0.3, axis="y")
    figure.suptitle("a line for each pair", fontsize=9)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def draw_rates(study, file):
    """Task loss against the rate (Figure 4, middle), and against forgetting (question 3)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    models = {"dense": "dense", "outsider": "pmp", "authorised": "pmp", "random": "random"}
    for number, (arm, model) in enumerate(models.items()):
        pairs = study.pairs(arm)
        losses = np.array([[study.tuned(arm, pair, rate) for rate in RATES] for pair in pairs])
        rises = np.array([[study.tuned(arm, pair, rate, "text") - study.release(model, pair) for rate in RATES]
                          for pair in pairs])
        half = stats.t.ppf(0.975, len(pairs) - 1) * stats.sem(losses) if len(pairs) > 1 else None
        left.errorbar(RATES, losses.mean(0), half, color=f"C{number}", marker="o", markersize=4, capsize=2)
        right.plot(rises.mean(0), losses.mean(0), color=f"C{number}", marker="o", markersize=4, label=arm)
    left.set(title="Figure 4 (middle) by loss", xscale="log", xlabel="rate, times glue.py's", ylabel="task loss, nats")
    left.set_xticks(RATES, [str(rate) for rate in RATES])
    left.minorticks_off()
    right.axvline(BUDGET, color="grey", linestyle=":", linewidth=1)
    right.set(title="what it costs: lower left is better", xlabel="rise of the pre-training loss, nats")
    right.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def replace_block(text, name, content):
    """Put content between <!-- name --> and <!-- end of name -->."""
    begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
    head, rest = text.split(begin)
    return head + begin + content + end + rest.split(end)[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=HERE / "results" / "study")
    parser.add_argument("--readme", type=Path, default=HERE / "README.md")
    args = parser.parse_args()
    study = Study(read_lines(args.results / "study.jsonl"))
    glue = read_lines(args.results / "glue.jsonl")
    owners = {line["weights"]: key[0] for key, line in study.models.items() if "weights" in line}
    blocks = {"questions": question_table(questions(study)), "described": describe(study),
              "rates": rate_table(study)}
    if glue:
        blocks["table 1"] = table_1(glue, owners)
    if study.attacks:
        blocks["recovery"] = attack_table(study.attacks)
    if study.measures:
        blocks["measures"] = measure_table(study.measures)
    text = args.readme.read_text()
    for name, content in blocks.items():
        if f"<!-- {name} -->" in text:
            text = replace_block(text, name, content)
        else:
            print(f"{name}:\n{content}\n")
    args.readme.write_text(text)
    if len(study.pairs("dense", "outsider", "random")) > 1:
        draw_figure_2(study, args.results / "figure2.png")
        draw_rates(study, args.results / "rates.png")


if __name__ == "__main__":
    main()
