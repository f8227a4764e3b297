"""The paper's claims, judged as PROTOCOL.md says: paired differences, intervals, Holm's correction. It only reads."""

import math
from dataclasses import dataclass, field

import numpy as np
from attacks import SCORES
from measures import SIZES
from plan import ARMS, CHOOSING, MAIN, MODELS, OUTSIDERS, candidates, choice, judged, measure_job, model_job, strongest

TENTH, EQUAL, CLOSE, OVERLAP, TELLING = 0.1, 0.05, 0.02, 0.1, 0.6  # margins: see the protocol
DRAWS = 2000  # of the bootstrap

# -----------------------------------------------------------------------------
# Student's t, from its density


def two_sided(t, n):
    """P(|T| > |t|) for Student's T with n - 1 degrees of freedom."""
    df = n - 1
    x = np.linspace(0, min(abs(t), 1e4), 20001)
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    return max(0.0, 1 - 2 * float(np.trapezoid(scale * (1 + x**2 / df) ** (-(df + 1) / 2), x)))


def quantile(n):
    """The t that |T| exceeds with probability 5%."""
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, n) > 0.05 else (low, middle)
    return high


# -----------------------------------------------------------------------------
# markers and rows


@dataclass
class Marker:
    """One test: an estimate with its 95% interval against a margin, which it should lie above, or below."""

    label: str
    estimate: float = math.nan
    half: float = math.nan  # of the interval's width
    margin: float = 0.0
    above: bool = True
    p: float = math.nan  # two-sided, against the margin
    n: int = 0  # pre-trainings
    unit: str = ""
    verdict: str = "not run"

    def judge(self, p):
        """Take the corrected p-value."""
        if not math.isnan(p):
            good = (self.estimate > self.margin) == self.above
            self.verdict = "open" if p >= 0.05 else "holds" if good else "does not hold"


@dataclass
class Row:
    """One claim."""

    claim: str
    markers: list = field(default_factory=list)

    @property
    def verdict(self):
        found = {marker.verdict for marker in self.markers}
        if found <= {"not run", "tells nothing"}:
            return "not run" if "not run" in found or not found else "tells nothing"
        found -= {"not run", "tells nothing"}
        if {"holds", "does not hold"} <= found:
            return "mixed"
        if found == {"holds"}:
            return "holds"
        return "does not hold" if "does not hold" in found else "open"


def marker(label, values, error=None, **more):
    """A Marker of paired values, one a pre-training; error: of their mean, where the choice adds to it."""
    values = np.asarray([value for value in values if value is not None and math.isfinite(value)])
    n = len(values)
    if n < 2:
        return Marker(label, n=n, **more)
    error = error or float(values.std(ddof=1)) / math.sqrt(n)
    found = Marker(label, float(values.mean()), quantile(n) * error, n=n, **more)
    found.p = two_sided((found.estimate - found.margin) / max(error, 1e-12), n)
    return found


def correct(rows):
    """Holm's method over all markers of all rows."""
    tested = sorted((m for row in rows for m in row.markers if not math.isnan(m.p)), key=lambda m: m.p)
    worst = 0.0
    for i, found in enumerate(tested):
        worst = max(worst, min(1.0, found.p * (len(tested) - i)))
        found.judge(worst)
    return rows


# -----------------------------------------------------------------------------
# what the results say of an arm


class Evidence:
    """Looks up what claims are made of."""

    def __init__(self, results):
        self.results, self.scale = results, results.scale

    def runs(self, arm, task):
        """{seed: result} of an arm for the record."""
        jobs = judged(self.scale, arm, task, self.results)
        return {job.what["seed"]: found for job in jobs if (found := self.results.get(job))}

    def accuracy(self, arm, task):
        return {seed: result["accuracy"] for seed, result in self.runs(arm, task).items()}

    def models(self, name):
        """{seed: result} of the pre-trainings for the record."""
        seeds = range(self.scale.seeds[MODELS[name].seeds])
        found = {seed: self.results.get(model_job(self.scale, name, seed, self.results)) for seed in seeds}
        return {seed: result for seed, result in found.items() if result}

    def measured(self, kind, model, **more):
        """{seed: result} of a measurement."""
        seeds = range(self.scale.seeds[MODELS[model].seeds])
        found = {seed: self.results.get(measure_job(self.scale, kind, model, seed, self.results, **more))
                 for seed in seeds}
        return {seed: result for seed, result in found.items() if result}

    def rises(self, arm, task):
        """{seed: nats} by which an arm's fine-tuning raises the loss on pre-training text."""
        before = self.models(ARMS[arm].model)
        return {seed: max(result["text_loss"] - before[seed]["text_loss"], 1e-4)
                for seed, result in self.runs(arm, task).items() if seed in before}

    def search(self, arm, task):
        """{(rate, epochs): accuracies of the choosing seeds}, or {} while it is not done."""
        if ARMS[arm].how == "base" or choice(self.scale, arm, task, self.results) is None:
            return {}
        grid = candidates(self.scale, ARMS[arm].like or arm, task, self.results)
        return {pair: np.array([self.results.get(job)["accuracy"] for job in jobs]) for pair, jobs in grid.items()}

    def contrast(self, weights, task):
        """(values by pre-training, standard error) of sum(weight * accuracy) over arms; ([], None) without runs.

        The error's bootstrap draws pre-trainings, and choosing seeds, which repeat the choice of rate and epochs.
        """
        scores = {arm: self.accuracy(arm, task) for arm in weights}
        seeds = sorted(set.intersection(*(set(found) for found in scores.values())))
        values = np.array([sum(weight * scores[arm][seed] for arm, weight in weights.items()) for seed in seeds])
        if len(seeds) < 2:
            return values, None
        random = np.random.default_rng(0)
        drawn = values[random.integers(len(seeds), size=(DRAWS, len(seeds)))].mean(1)
        choosing = random.integers(len(CHOOSING), size=(DRAWS, len(CHOOSING)))
        for arm, weight in weights.items():
            if grid := self.search(arm, task):
                table = np.array(list(grid.values()))  # (pairs, choosing seeds)
                means = table.mean(1)
                taken = table[:, choosing].mean(2).argmax(0)  # of each draw
                drawn = drawn + weight * (means[taken] - means.max())
        return values, float(drawn.std()) * math.sqrt(len(seeds) / (len(seeds) - 1))

    def gain(self, task, full="dense"):
        """What the dense model gains over random weights: (mean, whether it is clearly above 0)."""
        values, error = self.contrast({full: 1, "scratch": -1}, task)
        if error is None:
            return math.nan, False
        return values.mean(), values.mean() > quantile(len(values)) * error

    def shares(self, weights, full="dense", margin=0.0, above=True):
        """A marker for each main task: sum(weight * accuracy) in percent of the gain."""
        found = []
        for task in MAIN:
            values, error = self.contrast(weights, task)
            gain, clear = self.gain(task, full)
            if error is None or math.isnan(gain):
                found.append(Marker(task, unit="% of the gain", margin=100 * margin))
                continue
            # the margin is a share of each pair's own gain: it belongs to the values that are tested
            test = dict(weights)
            for arm, sign in ((full, -margin), ("scratch", margin)):
                test[arm] = test.get(arm, 0) + sign
            beyond, error = self.contrast(test, task)
            one = marker(task, 100 * beyond / gain, 100 * error / abs(gain), above=above)
            one.estimate, one.margin, one.unit = 100 * values.mean() / gain, 100 * margin, "% of the gain"
            if not clear:
                one.verdict, one.p = "tells nothing", math.nan
            found.append(one)
        return found


def by_seed(first, second, combine):
    """combine(a, b) of the seeds that both have."""
    return [combine(first[seed], second[seed]) for seed in sorted(first) if seed in second]


def log_ratio(a, b):
    """log(a / b); nan, which no marker counts, where one of them is not positive."""
    return math.log(a / b) if a > 0 and b > 0 else math.nan


def excess(own, own_inside, dense, dense_inside):
    """[log(own / own inside the mask) minus the same of dense] of the seeds that all four have."""
    seeds = [seed for seed in sorted(own) if seed in own_inside and seed in dense and seed in dense_inside]
    return [log_ratio(own[seed], own_inside[seed]) - log_ratio(dense[seed], dense_inside[seed]) for seed in seeds]


# -----------------------------------------------------------------------------
# the claims


def losses(evidence, claim, pairs, margin):
    """A row about held-out losses: first - second below the margin, in nats. pairs: {label: (model, model)}."""
    row = Row(claim)
    for label, (first, second) in pairs.items():
        one, other = evidence.models(first), evidence.models(second)
        row.markers.append(marker(label, by_seed(one, other, lambda a, b: a["text_loss"] - b["text_loss"]),
                                  margin=margin, above=False, unit="nats"))
    return row


def to_reach(curve, updates, final, goal):
    """The number of updates after which an accuracy was reached, interpolated; twice as many as there were if never."""
    points = sorted({int(step): value for step, value in curve.items()} | {updates: final})
    curve = {int(step): value for step, value in curve.items()} | {updates: final}
    before = None
    for step in points:
        if curve[step] >= goal:
            if before is None:
                return step
            share = (goal - curve[before]) / (curve[step] - curve[before])
            return math.exp(math.log(before) + share * math.log(step / before))
        before = step
    return 2 * updates


def speed(evidence, arm, task, share):
    """{seed: updates until an arm has a share of the dense gain}."""
    runs, dense, scratch = (evidence.runs(name, task) for name in (arm, "dense", "scratch"))
    return {seed: to_reach(run["curve"], run["updates"], run["accuracy"], scratch[seed]["accuracy"] + share * (
        dense[seed]["accuracy"] - scratch[seed]["accuracy"])) for seed, run in runs.items()
        if seed in dense and seed in scratch}


def changes(evidence, model, arm):
    """{seed: [mean change of the loss at each eta]} of Proposition 1's step."""
    return {seed: np.mean(result["change"][arm], 0) for seed, result in evidence.measured("one_step", model).items()}


def sign_marker(label, values):
    """Whether values are positive, by the sign test; shown as their geometric mean in thousandths of a nat."""
    n, low = len(values), sum(value <= 0 for value in values)
    found = Marker(label, n=n, unit="mnats", half=0.0)
    if n >= 2:
        few = min(low, n - low)
        found.p = min(1.0, 2 * sum(math.comb(n, i) for i in range(few + 1)) / 2**n)
        found.estimate = 1e3 * float(np.mean(values))
        found.half = 1e3 * quantile(n) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return found


def strongest_attack(evidence, model):
    """(name, {seed: IoU}) of the guess at the mask with the best mean IoU; replaying the secret is not a guess."""
    found = {attack: {seed: result["iou"] for seed, result in evidence.measured(
        "recovery", model, attack=attack).items()} for attack in SCORES}
    found = {attack: values for attack, values in found.items() if values}
    best = max(found, key=lambda attack: np.mean(list(found[attack].values())), default=None)
    return best, found.get(best, {})


def best_arms(evidence):
    """{"pmp" or "dense": {task: the arm with the best mean}} among full fine-tuning and the strongest adversaries."""
    names = strongest(evidence.scale, evidence.results) or []
    arms = {"pmp": ["pmp", *names], "dense": ["dense", *(twin for name in names if (
        twin := name.replace("pmp:", "dense:")) in OUTSIDERS)]}
    found = {}
    for model, tried in arms.items():
        for task in MAIN:
            means = {arm: np.mean(list(scores.values())) for arm in tried
                     if len(scores := evidence.accuracy(arm, task)) >= 2}
            found.setdefault(model, {})[task] = max(means, key=means.get, default=None) if len(means) > 1 else None
    return found


def geometry(evidence):
    """Rows 13 to 17."""
    row13 = Row("13 the complement curves more (Assumption 1)")
    landscapes = evidence.measured("landscape", "pmp")
    for scaling in ("all tensors", "without embedding", "scaled by rows"):
        values = [log_ratio(*(np.mean(found["curvature"][scaling][place]) for place in ("complement", "ticket")))
                  for found in landscapes.values()]
        row13.markers.append(marker(scaling, values, unit="log ratio"))

    row14 = Row("14 an outsider's step raises the loss (eq. 8)")
    row15 = Row("15 more than an authorised step (Proposition 1)")
    steps = {(model, arm): changes(evidence, model, arm) for model in ("pmp", "dense")
             for arm in ("outsider", "authorised")}
    for i, size in enumerate(SIZES):
        row14.markers.append(sign_marker(f"step {size:g}", [change[i] for change in steps["pmp", "outsider"].values()]))
    for i, size in enumerate(SIZES):
        at = {key: {seed: change[i] for seed, change in found.items()} for key, found in steps.items()}
        values = by_seed(at["pmp", "outsider"], at["dense", "outsider"], log_ratio)
        row14.markers.append(marker(f"step {size:g}, against dense", values, unit="log ratio"))
        row15.markers.append(marker(f"step {size:g}", excess(*at.values()), unit="log ratio"))

    row16 = Row("16 gradients do not tell the mask (5.2)")
    found = evidence.measured("gradients", "pmp").values()
    for label in ("all entries", "within tensors"):
        row16.markers.append(marker(label, [result["auc"][label] for result in found], margin=TELLING, above=False,
                                    unit="AUC"))
    row17 = Row("17 the mask cannot be recovered (5.2)")
    chance = 0.7 / (2 - 0.7)
    for model, label in (("pmp", "rate 3e-3"), ("literal-pmp", "rate 2e-5")):
        _, values = strongest_attack(evidence, model)
        row17.markers.append(marker(label, list(values.values()), margin=chance + OVERLAP, above=False, unit="IoU"))
    return [row13, row14, row15, row16, row17]


def claims(results):
    """The rows of the table of verdicts, judged."""
    evidence = Evidence(results)
    mid = np.array([0.5, 0.7, 0.9, 1.0]) - 0.775
    slope = dict(zip(("rho0.5", "pmp", "rho0.9", "dense"), mid / (mid**2).sum()))
    rows = [
        losses(evidence, "1 PMP preserves capability (4.2)", {
            "tied": ("pmp", "dense"), "untied": ("untied-pmp", "untied-dense"), "GPT-2": ("gpt2-pmp", "gpt2-dense")},
            EQUAL),
        losses(evidence, "2 the ticket trains as well as a random mask (4.4)", {"tied": ("pmp", "random")}, CLOSE),
        Row("3 outsiders gain less: full (4.2, 4.4)", evidence.shares({"dense": 1, "pmp": -1}, margin=TENTH)),
        Row("4 outsiders gain less: LoRA (4.2)",
            evidence.shares({"dense lora": 1, "pmp lora": -1}, "dense lora", margin=TENTH)),
        Row("5 it is more than lost capability", evidence.shares({"matched": 1, "pmp": -1}, margin=TENTH)),
        Row("6 authorised full beats the outsider's (4.3)", evidence.shares({"pmp + mask": 1, "pmp": -1})),
        Row("7 authorised LoRA beats the outsider's (4.3)", evidence.shares({"pmp lora + mask": 1, "pmp lora": -1})),
        Row("8 a random mask protects less (4.4)", evidence.shares({"random": 1, "pmp": -1})),
        Row("9 a smaller ratio protects more (4.4)", evidence.shares(slope)),
    ]
    row10, row11 = Row("10 outsiders are slower"), Row("11 outsiders forget more (after eq. 7)")
    row12 = Row("12 outsiders forget more than the authorised")
    for task in MAIN:
        row10.markers.append(marker(task, by_seed(*(speed(evidence, arm, task, 0.8) for arm in ("pmp", "dense")),
                                                  log_ratio), unit="log ratio"))
        rises = {arm: evidence.rises(arm, task) for arm in ("pmp", "dense", "pmp + mask", "dense in mask")}
        row11.markers.append(marker(task, by_seed(rises["pmp"], rises["dense"], log_ratio), unit="log ratio"))
        row12.markers.append(marker(task, excess(rises["pmp"], rises["pmp + mask"], rises["dense"],
                                                 rises["dense in mask"]), unit="log ratio"))
    rows += [row10, row11, row12, *geometry(evidence)]
    row18 = Row("18 no adversary does better than on dense")
    best = best_arms(evidence)
    for i, task in enumerate(MAIN):
        arms = best["dense"][task], best["pmp"][task]
        row18.markers.append(evidence.shares({arms[0]: 1, arms[1]: -1}, margin=TENTH)[i] if all(arms)
                             else Marker(task, unit="% of the gain"))
    rows += [row18, Row("19 undertraining alone shows Table 1's pattern",
                        evidence.shares({"literal-dense": 1, "literal-pmp": -1}))]
    return correct(rows)


def spell(found):
    """A marker in words."""
    if found.verdict == "not run" and math.isnan(found.estimate):
        return f"{found.label}: not run"
    return f"{found.label}: {found.estimate:.3g} ±{found.half:.2g} {found.unit}"
