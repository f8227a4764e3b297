"""The paper's claims, judged as PROTOCOL.md says: paired differences, intervals, Holm's correction. It only reads."""

import math
import operator
from bisect import bisect_left
from dataclasses import dataclass, field
from functools import cache, partial

import numpy as np
from attacks import CONSTANTS, SCORES
from measures import SCALINGS, SIZES
from plan import (ARMS, CHOOSING, EQUAL_RATES, MAIN, RHO, TRIED, candidates, choice, choosing_mean, equal_jobs,
                  judged, measure_job, model_job, seeds_of, strongest, tuned_by, twin)

TENTH, EQUAL, CLOSE, OVERLAP, TELLING = 0.1, 0.05, 0.02, 0.1, 0.6  # margins: see the protocol
DRAWS = 2000  # of the bootstrap
RATIOS = {0.5: "rho0.5", 0.7: "pmp", 0.9: "rho0.9", 1.0: "dense"}
MOST = 1000  # pre-trainings: nobody will make more

# -----------------------------------------------------------------------------
# Student's t, from its density


def two_sided(t, n):
    """P(|T| > |t|) for Student's T with n - 1 degrees of freedom."""
    df = n - 1
    x = np.linspace(0, min(abs(t), 1e4), 20001)
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    return max(0.0, 1 - 2 * float(np.trapezoid(scale * (1 + x**2 / df) ** (-(df + 1) / 2), x)))


@cache
def quantile(n):
    """The t that |T| exceeds with probability 5%."""
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, n) > 0.05 else (low, middle)
    return high


# -----------------------------------------------------------------------------
# markers and rows


def short(value, digits):
    """0.0197 of 0.01968 for 3 digits; 138 of 138.2 for any: without an exponent."""
    return f"{value:.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


@dataclass
class Marker:
    """One test: an estimate with its 95% interval against a margin, which it should lie above, or below."""

    label: str
    estimate: float = math.nan
    half: float = math.nan  # of the interval's width
    margin: float = 0.0
    above: bool = True
    p: float = math.nan  # two-sided, against the margin, times looks
    n: int = 0  # pre-trainings
    planned: int = 2  # with fewer there is no verdict yet
    unit: str = ""
    verdict: str = "not run"
    looks: int = 1  # how often it was judged, with more pre-trainings each time
    tests: int = 1  # how many were not decided yet when Holm's correction came to it, itself too

    @property
    def limit(self):
        """Where it holds, in words."""
        return f"{'above' if self.above else 'below'} {self.margin:.3g}"

    @property
    def interval(self):
        """What was measured, in words."""
        return f"{short(self.estimate, 3)} ±{short(self.half, 2)} {self.unit}".rstrip()

    def judge(self, p):
        """Take the corrected p-value."""
        good = (self.estimate > self.margin) == self.above
        self.verdict = "open" if p >= 0.05 else "holds" if good else "does not hold"

    def enough(self):
        """How many pre-trainings would decide it, were estimate and spread to stay as they are: at most MOST + 1.

        It would be judged once more, with the tests that are open now.
        """
        errors = (self.estimate - self.margin) * quantile(self.n) / max(self.half, 1e-12)

        def decided(n):
            return two_sided(errors * math.sqrt(n / self.n), n) * (self.looks + 1) * self.tests < 0.05

        return bisect_left(range(MOST + 1), True, lo=self.n, key=decided)


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
        found -= {"tells nothing"}
        if found & {"not run", "unfinished"}:
            return "partly run"
        if {"holds", "does not hold"} <= found:
            return "mixed"
        if found == {"holds"}:
            return "holds"
        return "does not hold" if "does not hold" in found else "open"


def marker(label, values, error=None, **more):
    """A Marker of paired values, one a pre-training; error: of their mean, where the choice adds to it.

    A value that is not finite is left out. There are fewer than planned then, so there is no verdict.
    """
    values = np.asarray([value for value in values if value is not None and math.isfinite(value)])
    n = len(values)
    if n < 2:
        return Marker(label, n=n, **more)
    error = error or float(values.std(ddof=1)) / math.sqrt(n)
    found = Marker(label, float(values.mean()), quantile(n) * error, n=n, **more)
    if n < found.planned:
        found.verdict = "unfinished"
    else:
        found.p = found.looks * two_sided((found.estimate - found.margin) / max(error, 1e-12), n)
    return found


def correct(rows):
    """Holm's method over all markers of all rows."""
    tested = sorted((m for row in rows for m in row.markers if not math.isnan(m.p)), key=lambda m: m.p)
    worst, left = 0.0, len(tested)
    for i, found in enumerate(tested):
        worst, found.tests = max(worst, min(1.0, found.p * (len(tested) - i))), left
        found.judge(worst)
        left -= found.verdict != "open"
    return rows


# -----------------------------------------------------------------------------
# what the results say of an arm


class Evidence:
    """Looks up what claims are made of."""

    def __init__(self, results):
        self.results, self.scale = results, results.scale

    def planned(self, *arms):
        """How many pre-trainings there will be that all these arms fine-tune."""
        return len(set.intersection(*(set(tuned_by(self.scale, arm)) for arm in arms)))

    def runs(self, arm, task):
        """{seed: result} of an arm for the record."""
        jobs = judged(self.scale, arm, task, self.results)
        return {job.what["seed"]: found for job in jobs if (found := self.results.get(job))}

    def accuracy(self, arm, task):
        return accuracies(self.runs(arm, task))

    def models(self, name):
        """{seed: result} of the pre-trainings for the record."""
        found = {seed: self.results.get(model_job(self.scale, name, seed, self.results))
                 for seed in seeds_of(self.scale, name)}
        return {seed: result for seed, result in found.items() if result}

    def behind(self, model, reference):
        """{seed: nats} by which the held-out loss of a model is above that of another."""
        ours, other = self.models(model), self.models(reference)
        return {seed: ours[seed]["text_loss"] - other[seed]["text_loss"] for seed in ours if seed in other}

    def measured(self, kind, model, **more):
        """{seed: result} of a measurement."""
        found = {seed: self.results.get(measure_job(self.scale, kind, model, seed, self.results, **more))
                 for seed in seeds_of(self.scale, model)}
        return {seed: result for seed, result in found.items() if result}

    def rises(self, arm, runs):
        """{seed: nats} by which runs of an arm, {seed: result}, raise the loss on pre-training text."""
        before = {seed: self.results.get(model_job(self.scale, ARMS[arm].model, seed, self.results)) for seed in runs}
        return {seed: result["text_loss"] - before[seed]["text_loss"] for seed, result in runs.items() if before[seed]}

    def equal(self, arm):
        """{rate: {seed: result}} of an arm of EQUAL_RATES."""
        jobs = {rate: equal_jobs(self.scale, arm, rate, self.results) for rate in EQUAL_RATES[arm]}
        return {rate: {job.what["seed"]: result for job in found if (result := self.results.get(job))}
                for rate, found in jobs.items()}

    def tuned(self, model, setting):
        """{seed: accuracy} on docs after full fine-tuning of a kind of model with a setting, (rate, epochs)."""
        found = self.runs(model, "docs") if choice(self.scale, model, "docs", self.results) == setting else {}
        if setting and model in EQUAL_RATES and setting[1] == max(self.scale.epochs):
            found |= self.equal(model).get(setting[0], {})
        return accuracies(found)

    def differences(self, runs, weights, close=False):
        """{seed: sum(weight * accuracy) of the arms of `weights`} of each pre-training that all have.

        runs: {arm: {seed: result}}; close: of those alone whose models' held-out losses differ by less than EQUAL.
        """
        losses = [self.models(name) for name in {ARMS[arm].model for arm in weights}]
        values = {}
        for seed in sorted(set.intersection(*(set(runs[arm]) for arm in weights))):
            found = [one[seed]["text_loss"] for one in losses if seed in one]
            if not close or found and max(found) - min(found) < EQUAL:
                values[seed] = sum(weight * runs[arm][seed]["accuracy"] for arm, weight in weights.items())
        return values

    def search(self, arm, task):
        """{(rate, epochs): accuracies of the choosing seeds}, or {} while it is not done.

        That of an arm which takes another one's setting is the other's: it has no search of its own.
        """
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
                judge = table
                if twin(arm):  # both models have the pair that is best for their mean
                    judge = (table + np.array(list(self.search(twin(arm), task).values()))) / 2
                means, taken = table.mean(1), judge[:, choosing].mean(2).argmax(0)  # of each draw
                drawn = drawn + weight * (means[taken] - means[judge.mean(1).argmax()])
        return values, float(drawn.std()) * math.sqrt(len(seeds) / (len(seeds) - 1))

    def gain(self, task, full="dense", scratch="scratch"):
        """What the dense model gains over random weights: (mean, whether it is clearly above 0)."""
        values, error = self.contrast({full: 1, scratch: -1}, task)
        if error is None:
            return math.nan, False
        return values.mean(), values.mean() > quantile(len(values)) * error

    def shares(self, weights, full="dense", scratch="scratch", margin=0.0, suffix="", tasks=MAIN):
        """A marker for each task: sum(weight * accuracy) in percent of the gain that `full` has over `scratch`."""
        found = []
        for task in tasks:
            gain, clear = self.gain(task, full, scratch)
            test = dict(weights)
            if margin:  # a share of each pair's own gain, so that the test is against 0
                test[full] = test.get(full, 0) - margin
                test[scratch] = test.get(scratch, 0) + margin
            values, error = self.contrast(test, task)
            label = task + suffix
            if error is None or math.isnan(gain):
                found.append(Marker(label, unit="% of the gain", margin=100 * margin))
                continue
            one = share(label, values, gain, clear, error, planned=self.planned(*test))
            one.estimate, one.margin = one.estimate + 100 * margin, 100 * margin  # as it is shown
            found.append(one)
        return found


def share(label, values, gain, clear, error=None, **more):
    """A Marker of values in percent of the dense gain, and their error in percent, too.

    gain: the mean, and `clear` whether it is above 0; there is no number where it is not even positive.
    """
    if gain <= 0:
        return Marker(label, n=len(values), unit="% of the gain", verdict="tells nothing", **more)
    values = [100 * value / gain for value in values]
    return gated(marker(label, values, error and 100 * error / gain, unit="% of the gain", **more), clear)


def gated(found, clear):
    """A marker of a task, which tells nothing where the dense model's gain is not clear once all runs are there."""
    if not clear and found.n >= found.planned:
        found.verdict, found.p = "tells nothing", math.nan
    return found


def accuracies(runs):
    """{seed: accuracy} of {seed: result}."""
    return {seed: result["accuracy"] for seed, result in runs.items()}


def by_seed(first, second, combine=operator.sub):
    """combine(a, b) of the seeds that both have."""
    return [combine(first[seed], second[seed]) for seed in sorted(first) if seed in second]


def growth(a, b, least):
    """asinh(a / least) - asinh(b / least): log(a / b) where both are well above `least`, and defined below 0, too."""
    return math.asinh(a / least) - math.asinh(b / least)


def best_for_others(runs):
    """{seed: result at the rate that is best for the other seeds}. runs: {rate: {seed: result}}."""
    scores = {rate: accuracies(found) for rate, found in runs.items()}
    seeds = set.intersection(*map(set, scores.values()))
    found = {}
    for seed in sorted(seeds) if len(seeds) > 1 else ():
        means = {rate: np.mean([one[other] for other in seeds - {seed}]) for rate, one in scores.items()}
        found[seed] = runs[max(means, key=means.get)][seed]
    return found


def excess(own, own_inside, dense, dense_inside, least):
    """[growth of own over own inside the mask, minus the same of dense] of the seeds that all four have."""
    seeds = [seed for seed in sorted(own) if seed in own_inside and seed in dense and seed in dense_inside]
    return [growth(own[seed], own_inside[seed], least) - growth(dense[seed], dense_inside[seed], least)
            for seed in seeds]


# -----------------------------------------------------------------------------
# the claims


def sample(evidence, *models):
    """Of a test about pre-trained models: how many there will be, and how often it is judged.

    Where there are more than the main ones, these were judged before the others were added.
    """
    first = set(evidence.scale.seeds["main"])
    seeds = set.intersection(*(set(seeds_of(evidence.scale, model)) for model in models))
    return {"planned": len(seeds), "looks": 2 if first < seeds else 1}


def losses(evidence, claim, pairs, margin):
    """A row about held-out losses: first - second below the margin, in nats. pairs: {label: (model, model)}."""
    row = Row(claim)
    for label, (first, second) in pairs.items():
        row.markers.append(marker(label, evidence.behind(first, second).values(), margin=margin, above=False,
                                  unit="nats", **sample(evidence, first, second)))
    return row


def to_reach(curve, updates, final, goal):
    """The number of updates after which an accuracy was reached, interpolated; twice as many as there were if never."""
    curve = {int(step): value for step, value in curve.items()} | {updates: final}
    before = None
    for step in sorted(curve):
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


def strongest_attack(evidence, model):
    """{seed: IoU} of the guess of the ticket's size with the best mean IoU."""
    found = [{seed: result["iou"] for seed, result in evidence.measured("recovery", model, attack=attack).items()}
             for attack in SCORES if attack != CONSTANTS]
    return max(filter(None, found), key=lambda values: np.mean(list(values.values())), default={})


def best_arms(evidence, task):
    """The best arm on dense, and on PMP, of the adversaries for the record that need no guess at the mask.

    The choosing seeds decide. (None, None) where they have not been run.
    """
    ours = [arm for arm in strongest(evidence.scale, evidence.results) or [] if twin(arm)]
    if not ours:
        return None, None
    return tuple(max(arms, key=lambda arm: choosing_mean(evidence.scale, arm, evidence.results, (task,)))
                 for arms in (map(twin, ours), ours))


def by_ratio(evidence):
    """{rho: {seed: accuracy}} on docs, of the seeds that all ratios have, with PMP's rate and epochs."""
    setting = choice(evidence.scale, "pmp", "docs", evidence.results)
    scores = {rho: evidence.tuned(model, setting) for rho, model in RATIOS.items()}
    seeds = sorted(set.intersection(*map(set, scores.values())))
    return {rho: {seed: found[seed] for seed in seeds} for rho, found in scores.items()}


def slope(evidence):
    """Of accuracy on docs over rho, by least squares, in percent of the gain."""
    gain, clear = evidence.gain("docs")
    scores = by_ratio(evidence)
    weights = {rho: rho - np.mean(list(scores)) for rho in scores}
    total = sum(weight**2 for weight in weights.values())
    values = [sum(weight * scores[rho][seed] for rho, weight in weights.items()) / total for seed in scores[1.0]]
    return share("docs", values, gain, clear, planned=evidence.planned("rho0.5", "rho0.9"))


def best_against_best(evidence, task):
    """By how much PMP is below dense, each with its best adversary, in percent of the mean gain."""
    dense, ours = best_arms(evidence, task)
    gain, clear = evidence.gain(task)
    values, error = evidence.contrast({dense: 1, ours: -1}, task) if dense else ((), None)
    if error is None or math.isnan(gain):
        return Marker(task, margin=100 * TENTH, unit="% of the gain")
    return share(task, values, gain, clear, error, margin=100 * TENTH, planned=evidence.planned(dense, ours))


LEAST = {"rise": 0.01, "step": 1e-5, "curvature": 1e-6}  # where logs end: nats, nats, nats per squared length


def geometry(evidence):
    """Rows 13 to 17."""
    mark = partial(marker, **sample(evidence, "pmp", "dense"))
    row13 = Row("13 the complement curves more (Assumption 1)")
    more13 = Row("   more than in dense, with the same mask")
    bends = {}
    for model in ("pmp", "dense"):
        for seed, found in evidence.measured("landscape", model).items():
            for scaling, places in found["curvature"].items():
                bends.setdefault((model, scaling), {})[seed] = growth(
                    np.mean(places["complement"]), np.mean(places["ticket"]), LEAST["curvature"])
    for scaling in SCALINGS:
        own, dense = (bends.get((model, scaling), {}) for model in ("pmp", "dense"))
        row13.markers.append(mark(scaling, own.values(), unit="log ratio"))
        more13.markers.append(mark(scaling, by_seed(own, dense), unit="log ratio"))

    row14 = Row("14 an outsider's step raises the loss (eq. 8)")
    more14 = Row("   more than it does in dense")
    row15 = Row("15 more than an authorised (Proposition 1)")
    steps = {(model, arm): changes(evidence, model, arm) for model in ("pmp", "dense")
             for arm in ("outsider", "authorised")}
    for i, size in enumerate(SIZES):
        at = {key: {seed: change[i] for seed, change in found.items()} for key, found in steps.items()}
        own, dense = at["pmp", "outsider"], at["dense", "outsider"]
        row14.markers.append(mark(f"step {size:g}", [growth(change, 0, LEAST["step"]) for change in own.values()],
                                  unit="signed log"))
        more14.markers.append(mark(f"step {size:g}", by_seed(own, dense, partial(growth, least=LEAST["step"])),
                                   unit="log ratio"))
        row15.markers.append(mark(f"step {size:g}", excess(*at.values(), LEAST["step"]), unit="log ratio"))

    row16, row17 = Row("16 gradients do not tell the mask (5.2)"), Row("17 the mask cannot be recovered (5.2)")
    for label in ("all entries", "within tensors"):
        found = [result["auc"][label] for result in evidence.measured("gradients", "pmp").values()]
        row16.markers.append(mark(label, [max(value, 1 - value) for value in found], margin=TELLING, above=False,
                                  unit="AUC"))
    chance = RHO / (2 - RHO)
    for model, label, group in (("pmp", "rate 3e-3", "main"), ("literal-pmp", "rate 2e-5", "literal")):
        values = strongest_attack(evidence, model)
        row17.markers.append(marker(label, values.values(), margin=chance + OVERLAP, above=False, unit="IoU",
                                    planned=len(evidence.scale.seeds[group])))
    return [row13, more13, row14, more14, row15, row16, row17]


def dynamics(evidence):
    """Rows 10 to 12. All arms have the dense model's rate and epochs, on which speed and forgetting depend."""
    rows = [Row("10 outsiders are slower"), Row("11 outsiders forget more (after eq. 7)"),
            Row("12 outsiders forget more than the authorised")]
    for task in MAIN:
        reached = [speed(evidence, arm, task, 0.8) for arm in ("pmp, same", "dense")]
        rises = [evidence.rises(arm, evidence.runs(arm, task))
                 for arm in ("pmp, same", "pmp + mask, same", "dense", "dense in mask, same")]
        values = (by_seed(*reached, partial(growth, least=0.01)),
                  by_seed(rises[0], rises[2], partial(growth, least=LEAST["rise"])), excess(*rises, LEAST["rise"]))
        _, clear = evidence.gain(task)
        for row, found in zip(rows, values):
            one = marker(task, found, unit="log ratio", planned=evidence.planned("pmp", "dense"))
            row.markers.append(gated(one, clear))
    return rows


def own_rates(markers):
    """Markers of arms whose rates were chosen apart. On docs these decide more than the models: it tells nothing."""
    for one in markers:
        if one.label == "docs" and one.n:
            one.label, one.verdict, one.p = "docs, own rates", "tells nothing", math.nan
    return markers


def equal_rates(evidence):
    """Markers of rows 3, 6 and 19 on docs, with the same rates for all arms: not in the protocol."""
    gain, clear = evidence.gain("docs")

    def apart(label, one, other, **more):
        return share(label, by_seed(accuracies(one), accuracies(other)), gain, clear, **more)

    runs = {arm: evidence.equal(arm) for arm in EQUAL_RATES}
    best = {arm: best_for_others(runs[arm]) for arm in ("dense", "pmp", "pmp + mask")}
    fresh, literal = len(evidence.scale.seeds["fresh"]), ("literal-dense", "literal-pmp")
    label = "docs, best of equal rates"
    return {3: [apart(label, best["dense"], best["pmp"], margin=100 * TENTH, planned=fresh)],
            6: [apart(label, best["pmp + mask"], best["pmp"], planned=fresh)],
            19: [apart(f"docs, all at {rate:g} x", *(runs[arm][rate] for arm in literal),
                       planned=evidence.planned(*literal)) for rate in EQUAL_RATES["literal-dense"]]}


def claims(results):
    """The rows of the table of verdicts, judged."""
    evidence = Evidence(results)
    shares = evidence.shares
    equal = equal_rates(evidence)
    untied = {"full": "untied-dense", "scratch": "untied scratch", "margin": TENTH, "tasks": TRIED}
    row18 = Row("18 no adversary does better than on dense")
    for task in TRIED:
        row18.markers.append(best_against_best(evidence, task))
    return correct([
        losses(evidence, "1 PMP preserves capability (4.2)", {
            "tied": ("pmp", "dense"), "untied": ("untied-pmp", "untied-dense"),
            "mini-gpt2": ("gpt2-pmp", "gpt2-dense")}, EQUAL),
        losses(evidence, "2 the ticket trains as well as a random mask (4.4)", {
            "EarlyBird": ("pmp", "random"), "with the mean score": ("mean", "random")}, CLOSE),
        Row("3 outsiders gain less: full (4.2, 4.4)",
            own_rates(shares({"dense": 1, "pmp": -1}, margin=TENTH)) + equal[3] + shares(
                {"untied-dense": 1, "untied-pmp": -1}, **untied, suffix=", untied")),
        Row("4 outsiders gain less: LoRA (4.2)",
            shares({"dense lora": 1, "pmp lora": -1}, full="dense lora", margin=TENTH)),
        Row("5 it is more than lost capability (untied)", shares({"untied-matched": 1, "untied-pmp": -1}, **untied)),
        Row("6 authorised full beats the outsider's (4.3)", own_rates(shares({"pmp + mask": 1, "pmp": -1})) + equal[6]),
        Row("7 authorised LoRA beats the outsider's (4.3)",
            shares({"pmp lora + mask": 1, "pmp lora": -1}, full="dense lora")),
        Row("8 a random mask protects less (4.4)", shares({"random": 1, "pmp": -1})),
        Row("9 a smaller ratio protects more (4.4)", [slope(evidence)]),
        *dynamics(evidence), *geometry(evidence), row18,
        Row("19 undertraining alone shows Table 1's pattern",
            own_rates(shares({"literal-dense": 1, "literal-pmp": -1})) + equal[19]),
        Row("control: what is held back is seen", shares({"dense": 1, "rescaled": -1}, margin=TENTH)),
        Row("control: a search undoes some of it", shares({"rescaled, searched": 1, "rescaled": -1})),
    ])


def spell(found):
    """A marker in words."""
    if math.isnan(found.estimate):
        return f"{found.label}: {found.verdict}"
    own = ", tells nothing" if found.verdict == "tells nothing" else ""
    return f"{found.label}: {found.interval}{own}"
