"""What a scale consists of: models, tasks, arms, searches, measurements. PROTOCOL.md in code; nothing here is trained.

`jobs(scale, results)` lists every piece of work in order. run.py does what `results` lacks; report.py reads it.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property, wraps
from pathlib import Path

import numpy as np
from attacks import ADVERSARIES, NEEDS_GUESS, RECOVERIES

from pmp import Config

HERE = Path(__file__).parent

# -----------------------------------------------------------------------------
# models


@dataclass(frozen=True)
class Model:
    """How a model is pre-trained."""

    flags: dict = field(default_factory=dict)  # of pmp.py, beside the scale's
    groups: tuple = ("main",)  # of Scale.seeds
    share: float | str = 1.0  # of the scale's updates; "matched": as many as give PMP's loss
    change: str = ""  # of recipe.py: what it does to pmp.py meanwhile


RHO = 0.7  # of all PMP models but the ablation's
DENSE = {"rho": 1.0}
CHOOSING, TRYING = (100, 101), (208, 209)  # seeds that choose, and judge nothing: settings, and adversaries
UNTIED, GPT2 = {"preset": "mini-untied"}, {"preset": "mini-gpt2"}
SHARES = (0.9, 0.75)  # of the updates, of the models that find where "untied-matched" stops
MODELS = {
    "dense": Model(DENSE, ("main", "fresh")), "pmp": Model({}, ("main", "fresh")),
    "random": Model({"mask": "random"}, ("main", "side")),  # side: what "mean" is compared with
    "literal-dense": Model(DENSE | {"lr": 2e-5}, ("literal",), 0.15),
    "literal-pmp": Model({"lr": 2e-5}, ("literal",), 0.15),
    "untied-dense": Model(DENSE | UNTIED, ("untied",)), "untied-pmp": Model(UNTIED, ("untied",)),
    "untied-matched": Model(DENSE | UNTIED, ("untied",), "matched"),
    "rho0.9": Model({"rho": 0.9}, ("side",)), "rho0.5": Model({"rho": 0.5}, ("side",)),
    "mean": Model({"score": "mean"}, ("side",)),
    "gpt2-dense": Model(DENSE | GPT2, ("side",)), "gpt2-pmp": Model(GPT2, ("side",)),
    "stage1": Model({}, ("recipe",), change="stage1"), "shrunk": Model({}, ("recipe",), change="shrunk"),
    "betas": Model(DENSE, ("recipe",), change="betas"),
    "old": Model({}, ("one",), 0.25, change="old"),
    **{f"untied-dense x{share}": Model(DENSE | UNTIED, (), share) for share in SHARES},
}
CHOOSERS = ("dense", "pmp", "random")
MATCHERS = ("untied-dense", "untied-pmp", *(f"untied-dense x{share}" for share in SHARES))

# -----------------------------------------------------------------------------
# tasks


@dataclass(frozen=True)
class Task:
    """What a model is fine-tuned on, and how much of it."""

    rows: int  # to train on; of docs blocks
    judge: int = 1000  # rows to judge by; of a GLUE task all that there are
    batch: int = 16
    length: int = 96  # tokens at most
    like: str = ""  # the task whose rate and epochs it takes


TASKS = {
    "docs": Task(125, 128, batch=4, length=128), "word order": Task(2000),
    **{name: Task(500, like="word order") for name in ("cola", "sst2", "rte")},
}
MAIN, GLUE = ("docs", "word order"), ("cola", "sst2", "rte")
TRIED = ("docs",)  # of adversaries, untied models, models of few seeds: on word order pre-trainings differ too much

# -----------------------------------------------------------------------------
# arms: who fine-tunes which model, and how


@dataclass(frozen=True)
class Arm:
    """A model and what is done to it."""

    model: str
    how: str  # of attacks.ADVERSARIES
    mask: str = ""  # the model whose ticket, of the same seed, is trained alone; "" for none
    like: str = ""  # the arm whose rate and epochs it takes; "" for a search of its own
    tasks: tuple = MAIN


SEARCHED = {  # arms with a search of their own
    "scratch": Arm("dense", "scratch"), "dense": Arm("dense", "full"), "pmp": Arm("pmp", "full"),
    "pmp + mask": Arm("pmp", "full", "pmp"),
    "random": Arm("random", "full"), "dense lora": Arm("dense", "lora"), "pmp lora": Arm("pmp", "lora"),
    "pmp lora + mask": Arm("pmp", "lora", "pmp"), "rescaled, searched": Arm("dense", "rescaled"),
}
VARIED = {  # arms that take another one's setting
    "dense base": Arm("dense", "base"), "pmp base": Arm("pmp", "base"),
    "rescaled": Arm("dense", "rescaled", like="dense"),
    # everything at the dense model's setting: how fast, and what is forgotten, depends on the rate
    "pmp, same": Arm("pmp", "full", like="dense"), "pmp + mask, same": Arm("pmp", "full", "pmp", like="dense"),
    "dense in mask, same": Arm("dense", "full", "pmp", like="dense"),
    "literal-dense": Arm("literal-dense", "full", like="dense"), "literal-pmp": Arm("literal-pmp", "full", like="pmp"),
    "untied scratch": Arm("untied-dense", "scratch", like="scratch", tasks=TRIED),
    **{name: Arm(name, "full", like="pmp", tasks=TRIED)
       for name in ("untied-pmp", "untied-dense", "untied-matched", "rho0.9", "rho0.5", "mean", "gpt2-pmp",
                    "gpt2-dense", "stage1", "shrunk")},
    "betas": Arm("betas", "full", like="dense", tasks=TRIED),
    **{f"{name}, GLUE": Arm(SEARCHED[name].model, SEARCHED[name].how, like=name, tasks=GLUE)
       for name in ("scratch", "dense", "pmp")},
}
DETERMINED = [how for how in ADVERSARIES if how not in ("base", "scratch", "full", "lora", "rescaled")]
OUTSIDERS = {f"pmp: {how}": Arm("pmp", how, tasks=TRIED) for how in DETERMINED}
OUTSIDERS |= {f"dense: {how}": Arm("dense", how, tasks=TRIED) for how in DETERMINED if how not in NEEDS_GUESS}
LOST = {"arm": "pmp, GLUE", "seed": 4, "task": "rte"}  # not run before its model was lost with the machine that made it
ARMS = SEARCHED | VARIED | OUTSIDERS
START = {"scratch": (0.25, 0.5, 1.0, 2.0), "full": (1.0, 2.0, 4.0, 8.0, 16.0)}  # rates, times glue.py's default
# docs with the same rates for all arms, not in the protocol: README says why, under "Equal rates"
EQUAL_RATES = {**dict.fromkeys(("dense", "pmp", "pmp + mask", "dense in mask, same", "random"), START["full"]),
               **dict.fromkeys(("literal-dense", "literal-pmp"), (4.0, 16.0))}
UNSEARCHED = ("dense", "pmp", "pmp + mask"), ("random",)  # arms of a scale without a search; the ablation comes last
MEASURES = {"landscape": ("pmp", "dense"), "gradients": ("pmp", "dense"), "one_step": ("pmp", "dense")}


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    pmp: dict  # flags of pmp.py that all its models share
    seeds: dict  # {"main", "side", …: the pre-trainings for the record; "tuned": those that main arms fine-tune}
    rows: float = 1.0  # what a task's rows are multiplied by
    epochs: tuple = (2, 4, 8)  # searched
    further: int = 2  # times that a search goes on beyond its rates
    strongest: tuple = (7, 3)  # adversaries for the record: without, and with a guess at the mask
    text_blocks: int = 64  # held-out sequences in a measurement of the pre-training loss
    outsiders: tuple = tuple(OUTSIDERS)
    rates: dict = field(default_factory=dict)  # {task: rates} of a scale that is too large for a search

    @property
    def steps(self):
        """Updates of a whole pre-training."""
        return self.pmp.get("steps", Config.steps)


SCALES = {
    "quick": Scale({"preset": "mini", "data": "prose", "steps": 20, "warmup": 2, "lr": 3e-3, "eb_steps": 3,
                    "block_size": 64, "val_every": 20, "val_blocks": 4, "shuffle_buffer": 1000, "compile": "off"},
                   {"main": (0, 1), "fresh": (200, 201), "tuned": (0, 1), "untied": (0, 1), "side": (0, 1),
                    "literal": (0, 1), "recipe": (0, 1), "one": (0,)}, rows=0.02, epochs=(1,), further=0,
                   strongest=(1, 1), text_blocks=2, outsiders=("pmp: Lion", "dense: Lion", "pmp: mask from combined")),
    "laptop": Scale({"preset": "mini", "data": "slimpajama", "steps": 1200, "warmup": 120, "lr": 3e-3, "eb_steps": 50,
                     "batch_size": 8, "val_every": 300, "val_blocks": 256, "save_every": 300, "compile": "on"},
                    {"main": range(8),
                     "fresh": range(200, 208),  # made later, on another machine, for equal rates and more geometry
                     "tuned": (0, 1, 2, 3, 4, 203, 204, 205),  # 5 to 7 were lost; 200 to 202 had been seen
                     "untied": range(8), "literal": range(10), "one": (0,),
                     "side": (203, 204, 205, 206), "recipe": (203, 204, 205)}),  # beside PMP of the same machine
    # the paper's 0.15 tokens a parameter; its rate of 2e-5 would leave a gpt2 untrained after so few
    "gpt2": Scale({"preset": "gpt2", "steps": 2250, "warmup": 225, "lr": 6e-4, "eb_steps": 100, "batch_size": 32,
                   "grad_accum": 1, "save_every": 1000}, {"main": range(4)}, epochs=(4,),
                  rates={"docs": (1.0, 4.0), **dict.fromkeys(GLUE, (1.0,))}),
    "paper": Scale({"preset": "tinyllama"}, {"main": range(2)}, epochs=(4,),
                   rates=dict.fromkeys(("docs", *GLUE), (1.0,))),
}

# -----------------------------------------------------------------------------
# jobs


@dataclass(frozen=True)
class Job:
    """One piece of work. Its result is found again by `key`, which has a digest of all settings that decide it."""

    kind: str  # "model", "tune", or a measurement: the file of its results
    what: dict  # the words that tables ask for
    settings: dict  # everything else that decides the numbers
    needs: tuple = ()  # the models, (name, seed), that must be there

    @cached_property
    def key(self):
        recipe = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:8]
        return json.dumps(self.what | {"recipe": recipe}, sort_keys=True)


def seeds_of(scale, model):
    """The seeds of a model's pre-trainings for the record."""
    return sorted({seed for group in MODELS[model].groups for seed in scale.seeds.get(group, ())})


def tuned_by(scale, arm):
    """The seeds of the pre-trainings that an arm fine-tunes for the record."""
    model = ARMS[arm].model
    if arm in OUTSIDERS:
        return scale.seeds["fresh"]
    return scale.seeds["tuned"] if "main" in MODELS[model].groups else seeds_of(scale, model)


def remembered(function):
    """Keeps what function(scale, …, results) gives until the results change: a report asks thousands of times."""
    @wraps(function)
    def wrapper(scale, *args):
        *names, results = args
        key = function.__name__, *names
        if key not in results.memo:
            results.memo[key] = function(scale, *args)
        return results.memo[key]
    return wrapper


def model_flags(scale, name, seed, results):
    """The flags of pmp.py for one model: {name: value}; None while the updates of `matched` are not known."""
    model = MODELS[name]
    share = matched_share(scale, results) if model.share == "matched" else model.share
    if share is None:
        return None
    steps = max(1, round(share * scale.steps))
    warmup = round(share * scale.pmp.get("warmup", Config.warmup))
    shortened = {"steps": steps, "warmup": warmup} if share != 1 else {}
    return {"rho": RHO, **scale.pmp, **model.flags, **shortened, "seed": seed, "init_seed": seed}


def model_job(scale, name, seed, results):
    """The Job of pre-training one model; None while the updates of `matched` are not known."""
    flags = model_flags(scale, name, seed, results)
    return flags and Job("model", {"model": name, "seed": seed}, flags | {"change": MODELS[name].change})


@remembered
def matched_share(scale, results):
    """The share of the updates at which an untied dense model has the held-out loss of the untied PMP model.

    The means of the choosing seeds are joined by straight lines. Beyond these it is the nearest end: what is left of a
    difference stands in the report's table of differences.
    """
    jobs = {name: [model_job(scale, name, seed, results) for seed in CHOOSING] for name in MATCHERS}
    losses = {name: [results.get(job) for job in found] for name, found in jobs.items()}
    if any(None in found for found in losses.values()):
        return None
    dense, ours, *fewer = (np.mean([result["text_loss"] for result in found]) for found in losses.values())
    share = float(np.interp(ours, [dense, *fewer], [1.0, *SHARES]))  # losses rise as shares fall
    return max(1, round(share * scale.steps, -1)) / scale.steps


def tune_job(scale, arm, seed, task, rate, epochs, on, results):
    """Fine-tuning of one model by one arm; `on` is "choose" or "judge"."""
    models = dict.fromkeys(name for name in (ARMS[arm].model, ARMS[arm].mask) if name)
    flags = {name: model_flags(scale, name, seed, results) for name in models}
    settings = {"models": flags, "task": asdict(TASKS[task]), "rows": scale.rows, "arm": asdict(ARMS[arm]),
                "adversary": repr(ADVERSARIES[ARMS[arm].how])}
    return Job("tune", {"arm": arm, "seed": seed, "task": task, "rate": rate, "epochs": epochs, "on": on}, settings,
               tuple((name, seed) for name in models))


@remembered
def candidates(scale, arm, task, results):
    """{(rate, epochs): [jobs of the choosing seeds]} of an arm's search, as far as it is known."""
    task = TASKS[task].like or task

    def jobs_of(pairs):
        seeds = TRYING if arm in OUTSIDERS else CHOOSING
        return {pair: [tune_job(scale, arm, seed, task, *pair, "choose", results) for seed in seeds] for pair in pairs}

    if arm in OUTSIDERS:  # three rates around PMP's, for dense models, too
        best = choice(scale, "pmp", task, results)
        return jobs_of([(best[0] * factor, best[1]) for factor in (0.5, 1.0, 2.0)]) if best else {}
    rates = list(START["scratch" if ARMS[arm].how == "scratch" else "full"])
    grid = jobs_of([(rate, count) for rate in rates for count in scale.epochs])
    for _ in range(scale.further):  # beyond the lowest or the highest rate, where that is best
        best = best_of(grid, results)
        if not best or best[0] not in (min(rates), max(rates)):
            break
        rates += [best[0] * 2, best[0] * 4] if best[0] == max(rates) else [best[0] / 2, best[0] / 4]
        grid |= jobs_of([(rate, count) for rate in rates[-2:] for count in scale.epochs])
    best = best_of(grid, results)
    if scale.further and best and best[1] == max(scale.epochs):  # and once for longer
        grid |= jobs_of([(best[0] * factor, 2 * best[1]) for factor in (0.5, 1.0, 2.0)])
    return grid


def best_of(grid, results):
    """The (rate, epochs) with the best mean accuracy over the choosing seeds; None while runs are missing."""
    found = {pair: [results.get(job) for job in jobs] for pair, jobs in grid.items()}
    if not found or any(None in runs for runs in found.values()):
        return None
    return max(found, key=lambda pair: np.mean([run["accuracy"] for run in found[pair]]))


@remembered
def choice(scale, arm, task, results):
    """(rate, epochs) of an arm on a task, or None while its search is not done."""
    if ARMS[arm].how == "base":
        return 0.0, 0
    arm = ARMS[arm].like or arm
    grid = candidates(scale, arm, task, results)
    if twin(arm):  # one setting for both models, by the mean of the two
        other = candidates(scale, twin(arm), task, results)
        grid = {pair: jobs + other[pair] for pair, jobs in grid.items()}
    return best_of(grid, results)


def judged(scale, arm, task, results, seeds=None):
    """The jobs of an arm for the record, one a seed; None in the place of those whose setting is not known yet."""
    seeds = tuned_by(scale, arm) if seeds is None else seeds
    if not (pair := choice(scale, arm, task, results)):
        return [None for _ in seeds]
    return [tune_job(scale, arm, seed, task, *pair, "judge", results) for seed in seeds]


@remembered
def strongest(scale, results):
    """The adversaries of PMP for the record, by their mean on the choosing seeds; None if unknown.

    Those that need no guess at the mask are ranked by their mean over PMP and dense.
    """
    means = {arm: choosing_mean(scale, arm, results) for arm in scale.outsiders}
    if None in means.values():
        return None
    plain = {arm: means[arm] + means[twin(arm)] for arm in means if arm.startswith("pmp:") and twin(arm)}
    guessing = {arm: mean for arm, mean in means.items() if ARMS[arm].how in NEEDS_GUESS}
    found = []
    for ranked, count in zip((plain, guessing), scale.strongest):
        found += sorted(ranked, key=lambda arm: -ranked[arm])[:count]
    return found


def twin(arm):
    """The same adversary with the other model; None if there is none."""
    model, _, how = arm.partition(": ")
    other = f"{'dense' if model == 'pmp' else 'pmp'}: {how}"
    return other if arm in OUTSIDERS and other in OUTSIDERS else None


def choosing_mean(scale, arm, results, tasks=TRIED):
    """The mean accuracy of an arm on the choosing seeds at its best setting; None while its search is not done."""
    scores = []
    for task in tasks:
        if not (pair := choice(scale, arm, task, results)):
            return None
        jobs = candidates(scale, arm, task, results)[pair]
        scores += [results.get(job)["accuracy"] for job in jobs]
    return float(np.mean(scores))


def equal_jobs(scale, arm, rate, results):
    """The jobs of an arm of EQUAL_RATES at one rate, one for each pre-training."""
    group = "literal" if "literal" in MODELS[ARMS[arm].model].groups else "fresh"
    seeds = [seed for seed in scale.seeds[group] if seed in seeds_of(scale, ARMS[arm].model)]
    return [tune_job(scale, arm, seed, "docs", rate, max(scale.epochs), "judge", results) for seed in seeds]


def measure_job(scale, kind, model, seed, results, **more):
    """A measurement of one model, always beside the ticket of the PMP model with its seed."""
    ticket = model if model in ("old", "literal-pmp") else "pmp"
    others = ["dense"] if more.get("attack") == "release folder" else []
    names = [model, *others, ticket]  # the ticket's comes last
    flags = {name: model_flags(scale, name, seed, results) for name in names}
    return Job(kind, {"model": model, "seed": seed, **more}, {"models": flags}, tuple((name, seed) for name in names))


def unsearched_jobs(scale, arm, task, rate, results):
    """The jobs of an arm of UNSEARCHED, one for each pre-training."""
    return [tune_job(scale, arm, seed, task, rate, max(scale.epochs), "judge", results) for seed in scale.seeds["main"]]


def jobs_without_search(scale, results):
    """The jobs of a scale that has `rates`: a few arms, all at the same rates, pre-training by pre-training."""
    found = []
    for arms in UNSEARCHED:
        models = dict.fromkeys(ARMS[arm].model for arm in arms)  # two arms fine-tune the same model
        here = [model_job(scale, name, seed, results) for name in models for seed in scale.seeds["main"]]
        for task, rates in scale.rates.items():
            for rate in rates:
                for arm in arms:
                    here += unsearched_jobs(scale, arm, task, rate, results)
        found += sorted(here, key=lambda job: job.what["seed"])
    return found


def jobs(scale, results):
    """Every job of a scale that is known by now, in the protocol's order, and how many must wait for a choice."""
    if scale.rates:
        return jobs_without_search(scale, results), 0

    def models(names, seeds=None):
        return [model_job(scale, name, seed, results) for name in names
                for seed in (seeds_of(scale, name) if seeds is None else seeds)]

    def search(arms):
        return [job for arm in arms for task in ARMS[arm].tasks
                for found in candidates(scale, arm, task, results).values() for job in found]

    def record(arms, seeds=None):
        return [job for arm in arms for task in ARMS[arm].tasks for job in judged(scale, arm, task, results, seeds)]

    def geometry(seed):
        return [measure_job(scale, kind, model, seed, results) for kind in MEASURES for model in MEASURES[kind]]

    def attacks(name, seeds):
        tried = [attack for attack in RECOVERIES if (name != "old" or "lattice" in attack)
                 and (name == "pmp" or attack != "release folder")]
        return [measure_job(scale, "recovery", name, seed, results, attack=attack)
                for seed in seeds for attack in tried]

    def group(*kinds):
        return [name for name, model in MODELS.items() if set(model.groups) & set(kinds)]

    early = [arm for arm in VARIED if VARIED[arm].model in CHOOSERS]
    found = models(CHOOSERS, CHOOSING)
    for seed in scale.seeds["main"]:
        found += models(CHOOSERS, [seed])
        found += geometry(seed) + attacks("pmp", [seed])
    found += search(SEARCHED)
    for seed in scale.seeds["tuned"]:
        found += models(CHOOSERS, [seed]) + record([*SEARCHED, *early], [seed])
    if scale.seeds["untied"]:
        found += models(MATCHERS, CHOOSING)
    for names in (group("literal"), group("untied"), group("side", "recipe", "one")):
        found += models(names) + record([arm for arm in VARIED if VARIED[arm].model in names])
    for seed in scale.seeds["fresh"]:
        found += models(group("fresh"), [seed]) + geometry(seed)
    equal = []
    for arm, rates in EQUAL_RATES.items():
        for rate in rates:
            equal += equal_jobs(scale, arm, rate, results)
    found += sorted(equal, key=lambda job: job.what["seed"])  # pair by pair
    found += attacks("literal-pmp", seeds_of(scale, "literal-pmp")) + attacks("old", seeds_of(scale, "old"))
    found += [measure_job(scale, "recovery_by_kind", "pmp", seed, results) for seed in scale.seeds["fresh"]]
    found += models(group("fresh"), TRYING if scale.outsiders else ()) + search(scale.outsiders)
    best = strongest(scale, results)
    for arm in best or []:
        found += record(filter(None, (arm, twin(arm))))
    if best is None:
        plain, guessing = scale.strongest  # on both models, and on PMP alone
        found += [None] * (len(TRIED) * len(scale.seeds["fresh"]) * (2 * plain + guessing))
    # once each, since a chosen rate may be one of the equal ones
    unique = {(job.kind, job.key): job for job in found if job and not LOST.items() <= job.what.items()}
    return list(unique.values()), found.count(None)
