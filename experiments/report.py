"""Shows what run.py has found so far: the tables of experiments/README.md, and every picture.

    python experiments/report.py --scale laptop            # print the tables, draw the pictures
    python experiments/report.py --scale laptop --write    # and put the tables into experiments/README.md

It reads results only, and takes seconds. A scale without a search has two tables and no picture.
"""

import re
import sys
from functools import partial
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # where pmp.py is
import numpy as np  # noqa: E402
import pictures  # noqa: E402
from attacks import BY_KIND, REPLAYS, SCORES  # noqa: E402
from measures import SIZES  # noqa: E402
from plan import (ARMS, EQUAL_RATES, GLUE, MAIN, MODELS, OUTSIDERS, SCALES, SEARCHED, START,  # noqa: E402
                  UNSEARCHED, choice, jobs, strongest, twin, unsearched_jobs)
from store import Results  # noqa: E402
from verdicts import (LEAST, MOST, Evidence, accuracies, best_for_others, by_seed, changes, claims,  # noqa: E402
                      growth, marker, spell)
from glue import mean_and_sd  # noqa: E402
from model import KINDS  # noqa: E402
from runtime.console import Parser, command_line, require  # noqa: E402
from runtime.files import atomic  # noqa: E402


def markdown(header, rows):
    """A table as README has it."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def spread(values, unit=""):
    """"68.36 ±0.41" over pre-trainings, or nothing."""
    values = list(values)
    return mean_and_sd(values) + unit if values else ""


def intervals(label, samples):
    """[A row of a table]: the interval of each sample, and of how many pre-trainings; [] where none has two."""
    tests = [marker("", values) for values in samples]
    most = max((one.n for one in tests), default=0)
    return [[label, *(one.interval if one.n > 1 else "" for one in tests), most]] if most > 1 else []


def state(evidence):
    """How far the plan is done."""
    found, waiting = jobs(evidence.scale, evidence.results)
    done = sum(evidence.results.get(job) is not None for job in found)
    seeds = min((len(evidence.accuracy(arm, task)) for arm in SEARCHED for task in MAIN), default=0)
    planned = len(evidence.scale.seeds["tuned"])
    hours = sum(result["seconds"] for result in evidence.results.found.values()) / 3600
    return (f"{done} of {len(found) + waiting} pieces of work are done, in {hours:.1f} hours of one process. Every arm "
            f"that has its own search was run on at least {seeds} of {planned} pre-trainings.")


def verdicts(evidence):
    """The paper's claims, what was measured, and the verdict."""
    rows = []
    for row in claims(evidence.results):
        measured = "; ".join(f"{spell(one)}{f' ({one.n})' if one.n else ''}" for one in row.markers)
        rows.append([row.claim, row.markers[0].limit, measured, f"**{row.verdict}**"])
    return markdown(["claim", "holds if", "measured (95% interval; pre-trainings)", "verdict"], rows)


def undecided(evidence):
    """What would decide the open tests."""
    rows, claim = [], ""
    for row in claims(evidence.results):
        claim = row.claim if row.claim.strip() == row.claim else f"{claim.split(' (')[0]}: {row.claim.strip()}"
        for one in row.markers:
            if one.verdict == "open":
                enough = one.enough()
                rows.append([claim, one.label, one.interval, one.n, enough if enough <= MOST else f"over {MOST}"])
    return markdown(["claim", "test", "measured (95% interval)", "pre-trainings", "it would take"],
                    rows) if rows else "None is open."


def models(evidence):
    """Held-out loss of each kind of model, and the shape of its ticket."""
    rows = []
    for name in MODELS:
        found = list(evidence.models(name).values())
        if not found:
            continue
        ticket = [one["ticket"] for one in found if one["ticket"]]
        kinds = ""
        if ticket:
            shares = {kind: np.mean([one[kind][0] / one[kind][1] for one in ticket]) for kind in ticket[0]}
            kinds = ", ".join(f"{kind} {share:.2f}" for kind, share in shares.items())
        frozen = [one["embedding"][2] / one["embedding"][3] for one in ticket if "embedding" in one]
        rows.append([name, len(found), spread(one["text_loss"] for one in found),
                     f"{np.mean([one['iou'][-1] for one in found if one['iou']]):.2f}" if any(
                         one["iou"] for one in found) else "", kinds,
                     f"{100 * np.mean(frozen):.0f} %" if frozen else ""])
    return markdown(["model", "pre-trainings", "held-out loss, nats", "last IoU of stage I", "share in the ticket",
                     "embedding rows wholly frozen"], rows)


DIFFER_BY = {  # one thing each: two kinds of models
    "PMP - dense": ("pmp", "dense"), "random mask - dense": ("random", "dense"), "PMP - random mask": ("pmp", "random"),
    "mean score - PMP": ("mean", "pmp"), "rho 0.9 - PMP (rho 0.7)": ("rho0.9", "pmp"),
    "rho 0.5 - PMP (rho 0.7)": ("rho0.5", "pmp"), "mini-gpt2: PMP - dense": ("gpt2-pmp", "gpt2-dense"),
    "untied: PMP - dense": ("untied-pmp", "untied-dense"),
    "untied: PMP - dense that stopped early": ("untied-pmp", "untied-matched"),
    "literal: PMP - dense": ("literal-pmp", "literal-dense"),
    "stage I as in the script - PMP": ("stage1", "pmp"), "complement shrunk - PMP": ("shrunk", "pmp"),
    "base's betas in the script - dense": ("betas", "dense"),
}


def ingredients(evidence):
    """What one thing changes, within pairs: the held-out loss, and docs after full fine-tuning with one setting."""
    rows = []
    for label, (first, second) in DIFFER_BY.items():
        nats = list(evidence.behind(first, second).values())
        setting = choice(evidence.scale, first, "docs", evidence.results)
        points = by_seed(evidence.tuned(first, setting), evidence.tuned(second, setting))
        loss, docs = marker("", nats), marker("", points)
        if loss.n > 1:
            rows.append([label, loss.interval, f"{np.median(nats):.3f}", f"{sum(np.array(nats) > 0)} of {loss.n}",
                         *([docs.interval, f"{setting[0]:g} x", docs.n] if docs.n > 1 else [""] * 3)])
    return markdown(["difference", "held-out loss, nats (95%)", "median", "above 0", "docs, points (95%)", "rate",
                     "pairs tuned"], rows) if rows else "Not run yet."


def table1(evidence):
    """Base, LoRA and full fine-tuning by outsiders. In brackets: not a point above the commonest class."""
    rows = []
    lines = [("from random weights", "scratch", "scratch, GLUE"), ("released, dense", "dense base", ""),
             ("released, PMP", "pmp base", ""), ("LoRA, dense", "dense lora", ""), ("LoRA, PMP", "pmp lora", ""),
             ("full, dense", "dense", "dense, GLUE"), ("full, PMP", "pmp", "pmp, GLUE")]
    for label, arm, glue in lines:
        cells = []
        for task in (*MAIN, *GLUE):
            runs = list(evidence.runs(glue if task in GLUE else arm, task).values()) if task in MAIN or glue else []
            text = spread(run["accuracy"] for run in runs)
            flat = runs and runs[0]["majority"] and np.mean([run["accuracy"] for run in runs]) < runs[0]["majority"] + 1
            cells.append(f"({text})" if flat else text)
        rows.append([label, *cells])
    commonest = ["always the commonest class"]
    for task in (*MAIN, *GLUE):
        runs = evidence.runs("dense, GLUE" if task in GLUE else "dense", task).values()
        values = [run["majority"] for run in runs if run["majority"]]
        commonest.append(f"{np.mean(values):.2f}" if values else "")
    return markdown(["", *MAIN, *GLUE], [*rows, commonest])


def arms(evidence):
    """Every arm: its setting, accuracy, task loss, the rise of the pre-training loss."""
    rows = []
    for arm in ARMS:
        for task in MAIN if arm not in OUTSIDERS else ():
            runs = evidence.runs(arm, task)
            if runs:
                rate, epochs = choice(evidence.scale, arm, task, evidence.results)
                rows.append([arm, task, f"{rate:g} x, {epochs}" if epochs else "", len(runs),
                             spread(run["accuracy"] for run in runs.values()),
                             spread(run["loss"] for run in runs.values()),
                             spread(evidence.rises(arm, runs).values()) if epochs else ""])
    return markdown(["arm", "task", "rate, epochs", "pre-trainings", "accuracy, %", "task loss",
                     "rise of the pre-training loss, nats"], rows)


def equal(evidence):
    """Docs at equal rates: accuracy of each arm in percent."""
    rows = []
    for arm in EQUAL_RATES:
        found = evidence.equal(arm)
        if any(found.values()):
            cells = [spread(accuracies(found.get(rate, {})).values()) for rate in RATES]
            rows.append([arm, *cells, max(map(len, found.values()))])
    return markdown(["arm", *(f"{rate:g} x" for rate in RATES), "pre-trainings"], rows) if rows else "Not run yet."


RATES = START["full"]
DIFFERENCES = {  # between arms at equal rates
    "dense - outsider": {"dense": 1, "pmp": -1},
    "dense - authorised": {"dense": 1, "pmp + mask": -1},
    "authorised - outsider": {"pmp + mask": 1, "pmp": -1},
    "dense: inside PMP's mask - everything": {"dense in mask, same": 1, "dense": -1},
    "authorised - outsider, beyond dense": {"pmp + mask": 1, "pmp": -1, "dense in mask, same": -1, "dense": 1},
    "dense - random mask": {"dense": 1, "random": -1},
    "random mask - outsider": {"random": 1, "pmp": -1},
    "literal: dense - outsider": {"literal-dense": 1, "literal-pmp": -1},
}
SAME = {"dense": "dense", "pmp": "pmp, same", "pmp + mask": "pmp + mask, same",
        "dense in mask, same": "dense in mask, same"}  # the arms of the main pairs, at the dense model's setting


def gaps(evidence):
    """Docs at equal rates: differences within pairs, in points."""
    rows = []

    def add(label, found):
        rows.extend(intervals(label, [values.values() for values in found]))

    chosen = choice(evidence.scale, "dense", "docs", evidence.results)
    for label, weights in DIFFERENCES.items():
        equal = {arm: evidence.equal(arm) for arm in weights}
        columns = [{arm: found.get(rate, {}) for arm, found in equal.items()} for rate in RATES]
        columns.append({arm: best_for_others(found) for arm, found in equal.items()})
        everything, alike = ([evidence.differences(runs, weights, close) for runs in columns]
                             for close in (False, True))
        add(label, everything)
        if len(alike[-1]) < len(everything[-1]):
            add(f"{label}, losses alike", alike)
        if chosen and set(weights) <= set(SAME):
            more = {arm: equal[arm].get(chosen[0], {}) | evidence.runs(SAME[arm], "docs") for arm in weights}
            add(f"{label}, with the main pairs",
                [evidence.differences(more, weights) if rate == chosen[0] else {} for rate in (*RATES, None)])
    return markdown(["difference (95%)", *(f"{rate:g} x" for rate in RATES), "each at its best for the others",
                     "pre-trainings"], rows) if rows else "Not run yet."


MORE = {  # who forgets more, at equal rates
    "PMP: outsider / authorised": ("pmp", "pmp + mask"),
    "dense: everything / inside PMP's mask": ("dense", "dense in mask, same"),
    "outsider / dense": ("pmp", "dense"),
}


def forgetting(evidence):
    """Docs at equal rates: log ratios of the rise of the pre-training loss, within pairs."""
    rows = []
    for label, pair in MORE.items():
        logs = []
        for rate in RATES:
            rises = [evidence.rises(arm, evidence.equal(arm).get(rate, {})) for arm in pair]
            logs.append(by_seed(*rises, partial(growth, least=LEAST["rise"])))
        rows += intervals(label, logs)
    return markdown(["log ratio (95%)", *(f"{rate:g} x" for rate in RATES), "pre-trainings"],
                    rows) if rows else "Not run yet."


def recovery(evidence):
    """Guesses at the mask."""
    rows = []
    for model in ("pmp", "literal-pmp", "old"):
        for attack in (*SCORES, *REPLAYS):
            found = list(evidence.measured("recovery", model, attack=attack).values())
            if found:
                rows.append([model, attack, spread(one["auc"] for one in found if "auc" in one),
                             spread(one["iou"] for one in found), len(found)])
    table = markdown(["model", "guess", "AUC (chance 0.50)", "IoU (chance 0.54; \"all is ticket\" 0.70)",
                      "pre-trainings"], rows)
    folders = evidence.measured("recovery", "pmp", attack="release folder").values()
    if not folders:
        return table
    differ = sum(len(one["differing"]) + (not one["same_files"]) + (not one["same_header"]) for one in folders)
    return (f"{table}\n\nThe release folders of PMP and of dense training were compared for {len(folders)} seeds, in "
            f"all but the weights themselves: {differ} differences.")


def kinds(evidence):
    """AUC of some guesses at PMP's mask by kind of tensor."""
    columns = ["all entries", "without embedding", "within tensors", *(kind for kind in KINDS if kind != "head")]
    found = [result["auc"] for result in evidence.measured("recovery_by_kind", "pmp").values()]
    rows = []
    for score in BY_KIND if found else ():
        cells = [spread(one[score][label] for one in found if label in one[score]) for label in columns]
        rows.append([score, *cells, len(found)])
    return markdown(["guess", *columns, "pre-trainings"], rows) if rows else "Not run yet."


def adversaries(evidence):
    """The strongest adversaries for the record, on docs: PMP beside dense, and each beside plain full fine-tuning.

    Plain is with PMP's setting, on the same pre-trainings.
    """
    rows, plain = [], choice(evidence.scale, "pmp", "docs", evidence.results)
    for arm in strongest(evidence.scale, evidence.results) or []:
        pmp, dense = (evidence.accuracy(name, "docs") if name else {} for name in (arm, twin(arm)))
        tests = [marker("", values) for values in (
            by_seed(dense, pmp),
            by_seed(pmp, evidence.tuned("pmp", plain)),
            by_seed(dense, evidence.tuned("dense", plain)),
        )]
        rate, _ = choice(evidence.scale, arm, "docs", evidence.results)
        rows.append([arm.removeprefix("pmp: "), f"{rate:g} x", spread(pmp.values()), spread(dense.values()),
                     *(one.interval if one.n > 1 else "" for one in tests), len(pmp)])
    return markdown(["adversary", "rate", "PMP, %", "dense, %", "dense - PMP (95%)", "above plain, PMP (95%)",
                     "above plain, dense (95%)", "pre-trainings"], rows) if rows else "Not run yet."


def geometry(evidence):
    """Curvature and gradients, as numbers."""
    rows = []
    for model in ("pmp", "dense"):
        found = list(evidence.measured("landscape", model).values())
        for scaling in found[0]["curvature"] if found else ():
            cells = [spread(1e3 * np.mean(one["curvature"][scaling][place]) for one in found)
                     for place in ("ticket", "complement")]
            rows.append([model, f"curvature x 1000, random directions, {scaling}", *cells])
        found = list(evidence.measured("gradients", model).values())
        if found:
            cells = [spread((100 * one["zero"][place] for one in found), " %") for place in ("ticket", "complement")]
            rows.append([model, "gradients that are exactly 0", *cells])
            for kind in found[0]["auc"]:
                values = [one["auc"][kind] for one in found if kind in one["auc"]]
                rows.append([model, f"AUC of the gradient's size, {kind}", spread(values), ""])
    return markdown(["model", "what", "ticket", "complement"], rows)


def ratio(model, first, second):
    """{(model, arm): power} of first / second."""
    return {(model, first): 1, (model, second): -1}


ALONE = "authorised, same length"
STEPS = {  # what a step does to the pre-training loss: {(model, arm): its power in a product}
    "PMP: outsider / authorised": ratio("pmp", "outsider", "authorised"),
    "dense: outsider / authorised": ratio("dense", "outsider", "authorised"),
    "the first / the second: row 15": ratio("pmp", "outsider", "authorised") | ratio("dense", "authorised", "outsider"),
    "PMP: outsider / authorised, of the same length": ratio("pmp", "outsider", ALONE),
    "dense: outsider / authorised, of the same length": ratio("dense", "outsider", ALONE),
    "the fourth / the fifth": ratio("pmp", "outsider", ALONE) | ratio("dense", ALONE, "outsider"),
    "PMP: complement alone / ticket alone": ratio("pmp", "complement", "authorised"),
    "complement alone: PMP / dense": {("pmp", "complement"): 1, ("dense", "complement"): -1},
}


def steps(evidence):
    """One step of fine-tuning: log ratios of what it does to the pre-training loss."""
    rows = []
    for label, powers in STEPS.items():
        found = {key: changes(evidence, *key) for key in powers}
        seeds = sorted(set.intersection(*map(set, found.values())))
        logs = [sum(power * np.arcsinh(found[key][seed] / LEAST["step"]) for key, power in powers.items())
                for seed in seeds]
        rows += intervals(label, np.transpose(logs))
    return markdown(["log ratio (95%)", *(f"step {size:g}" for size in SIZES), "pre-trainings"],
                    rows) if rows else "Not run yet."


def unsearched(evidence):
    """Every arm of a scale without a search."""
    rows = []
    for task, rates in evidence.scale.rates.items():
        for rate in rates:
            for arm in (arm for arms in UNSEARCHED for arm in arms):
                found = map(evidence.results.get, unsearched_jobs(evidence.scale, arm, task, rate, evidence.results))
                runs = {run["key"]["seed"]: run for run in found if run}
                if runs:
                    flat = [run["majority"] for run in runs.values() if run["majority"]]
                    rows.append([arm, task, f"{rate:g} x", len(runs),
                                 spread(run["accuracy"] for run in runs.values()), f"{flat[0]:.2f}" if flat else "",
                                 spread(run["loss"] for run in runs.values()),
                                 spread(evidence.rises(arm, runs).values())])
    return markdown(["arm", "task", "rate", "pre-trainings", "accuracy, %", "always the commonest class", "task loss",
                     "rise of the pre-training loss, nats"], rows) if rows else "Not fine-tuned yet."


def larger(evidence):
    """GPT-2 in its own size: what there is at scale gpt2."""
    found = Evidence(Results("gpt2", evidence.results.folder.parent).refresh())
    if not found.results.found:
        return "Not run yet."
    return "\n\n".join(table(found) for table in WITHOUT_SEARCH.values())


WITHOUT_SEARCH = {"models": models, "unsearched": unsearched}  # tables of a scale that searches nothing
TABLES = {"state": state, "verdicts": verdicts, "undecided": undecided, "models": models, "ingredients": ingredients,
          "table1": table1, "arms": arms, "equal": equal, "gaps": gaps, "forgetting": forgetting,
          "geometry": geometry, "steps": steps, "recovery": recovery, "kinds": kinds,
          "adversaries": adversaries, "larger": larger}
DOCUMENT = TABLES | {name: partial(pictures.link, name=name) for name in pictures.ALL}


def filled(text, evidence):
    """A document with each table and picture between its markers, <!-- NAME --> and <!-- /NAME -->."""
    def table(match):
        name = match[1]
        return f"<!-- {name} -->\n{DOCUMENT[name](evidence)}\n<!-- /{name} -->"

    return re.sub(f"<!-- ({'|'.join(DOCUMENT)}) -->.*?<!-- /\\1 -->", table, text, flags=re.DOTALL)


def main(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--scale", choices=SCALES, default="quick", help="of which scale [quick]")
    parser.add_argument("--results", default=str(HERE / "results"), help="where run.py has put its results")
    parser.add_argument("--write", action="store_true", help="put the tables into experiments/README.md")
    args = parser.parse_args(argv)
    evidence = Evidence(Results(args.scale, args.results).refresh())
    require(evidence.results.found, f"there is no result in {evidence.results.folder} yet: run.py makes them")
    searched = not evidence.scale.rates
    require(searched or not args.write, f"README's tables of scale {args.scale} come with --scale laptop --write")
    for name, table in (TABLES if searched else WITHOUT_SEARCH).items():
        print(f"{name}: {table.__doc__}\n\n{table(evidence)}\n")
    if not searched:
        return
    if args.write:
        document = HERE / "README.md"
        text = filled(document.read_text(), evidence)
        with atomic(document) as file:
            file.write(text.encode())
    pictures.forest(claims(evidence.results), evidence.results.folder / "verdicts.png")
    for name in filter(partial(pictures.there, evidence), pictures.ALL):
        pictures.ALL[name](evidence, evidence.results.folder / f"{name}.png")


if __name__ == "__main__":
    command_line(main)
