"""What every experiment stands on: scales, models, tasks, fine-tuning with a search, and results that are kept.

    python experiments/table1.py --scale quick        # every script has these flags; -h lists them

A scale says how much of everything there is. Its models are pre-trained with pmp.py where they are missing, one folder
each; fine-tuning is glue.py's. Each finished run is a JSON line in experiments/results/SCALE/, and what has its line is
not run again: stop a script when you like, start it twice to use two cores, start it again to draw its picture. A line
knows its model, not what you change in SCALES or in an adversary: after that, name other --results.
"""

import copy
import hashlib
import json
import math
import os
import platform
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import pmp  # noqa: E402
from data.pack import prepare  # noqa: E402
from data.sources import open_source  # noqa: E402
from data.standin import standin  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from glue import (CACHE, TASKS, Settings, default_rate, encode_task, fetch, finetune, fit,  # noqa: E402
                  mean_and_sd, prepare_model)
from model import FAMILIES, RESIDUAL, initial_value, secret_generator  # noqa: E402
from pmp import MaskedAdamW, load_mask  # noqa: E402
from runtime.console import Parser, command_line, flag_name  # noqa: E402
from runtime.files import Results, UserError, lock  # noqa: E402
from runtime.huggingface import load_folder  # noqa: E402
from runtime.machine import Machine  # noqa: E402
from runtime.safetensors import fingerprint  # noqa: E402

# -----------------------------------------------------------------------------
# scales


@dataclass(frozen=True)
class Scale:
    """How much of everything. Tasks: GLUE's, "standin/…" of the scale's own held-out text, and "docs" (see adapt)."""

    pmp: dict  # flags of pmp.py that differ from the paper's run
    tasks: tuple  # Table 1 and Figure 3
    needy: tuple  # the tasks on which fine-tunability is tested: those that need pre-training
    rows: dict = field(default_factory=dict)  # {task: training rows, of "docs" blocks}; all where a task has no number
    select: int = 1000  # further training rows, which choose learning rate and epochs; of "docs" a quarter as many
    rates: tuple = (0.3, 1.0, 3.0)  # searched, as multiples of glue.py's rate for the method and the model's width
    epochs: tuple = (3, 6)  # searched; the first one with every rate
    batch_size: int = 32
    max_length: int = 128
    text_blocks: int = 64  # held-out sequences in a measurement of the pre-training loss
    seeded_steps: int = 100  # stage II of the model whose theta(0) comes from a known seed


LAPTOP = {"preset": "mini", "data": "slimpajama", "steps": 1500, "warmup": 100, "lr": 3e-3, "batch_size": 16,
          "block_size": 256, "eb_steps": 50, "val_every": 250, "val_blocks": 256, "save_every": 250, "compile": "on"}
GLUE = tuple(TASKS)
SCALES = {
    "quick": Scale({"preset": "mini", "data": "prose", "steps": 60, "warmup": 6, "lr": 3e-3, "eb_steps": 5},
                   ("docs", "standin/cola"), ("docs", "standin/cola"), rows={"docs": 16, "standin/cola": 64}, select=64,
                   rates=(1.0, 3.0), epochs=(1, 2), text_blocks=8, seeded_steps=5),
    "laptop": Scale(LAPTOP, ("docs", "standin/cola", "cola", "sst2", "rte"), ("docs", "standin/cola"),
                    rows={"docs": 125, "standin/cola": 4000, "cola": 500, "sst2": 500, "rte": 500}, select=500,
                    rates=(1.0, 4.0, 16.0), epochs=(2, 4), batch_size=16, max_length=96),
    # the paper's rate of 2e-5 leaves a gpt2 of this size untrained after so few tokens
    "gpt2": Scale({"preset": "gpt2", "lr": 6e-4}, GLUE, ("qnli", "sst2", "mnli")),
    "paper": Scale({"preset": "tinyllama"}, GLUE, ("qnli", "sst2", "mnli")),
}
VARIANTS = {  # how the models of a scale are pre-trained
    "dense": {"rho": 1.0}, "pmp": {"rho": 0.7}, "random": {"rho": 0.7, "mask": "random"},
    "mean": {"rho": 0.7, "score": "mean"}, "seeded": {"rho": 0.7, "init_seed": 42},
    **{f"rho{rho}": {"rho": rho} for rho in (0.9, 0.8, 0.6, 0.5)},
    "old": {"rho": 0.7},  # with theta(0) as it was drawn before: see old_initial_value
}
# one colour for each meaning in all pictures; their lightness differs, too, so that they can be told in grey
COLOURS = {"ticket": "#1f5f99", "complement": "#d98032", "chance": "#888888", "train": "#7fb2d9",
           "validation": "#1f5f99"}
COMPARED = {"pmp": "PMP", "dense": "dense, with PMP's mask"}  # Figures 5 and 6, Proposition 1
RATIOS = {1.0: "dense", 0.9: "rho0.9", 0.8: "rho0.8", 0.7: "pmp", 0.6: "rho0.6", 0.5: "rho0.5"}  # Figure 4
EPOCHS = (1, 2, 3, 5, 10)
SEEDS = 3  # pre-trainings of a variant
PAIRS = [(seed, 1 + seed) for seed in range(SEEDS)]  # (pre-training seed, fine-tuning seed) of every mean and spread


# -----------------------------------------------------------------------------
# adversaries: ways to fine-tune a release


@dataclass(frozen=True)
class Adversary:
    """What somebody does with a release. attacks.py has the determined ones."""

    name: str
    method: str = "full"  # of glue.py
    settings: dict = field(default_factory=dict)  # of glue.Settings
    authorised: bool = False  # has the mask
    mask: object = None  # (lab, Release) -> the {name: bool mask} to train inside of
    change: object = None  # (lab, Release, body) does something to the weights first
    optimizer: object = MaskedAdamW
    rate: float = 1.0  # what the learning rates are multiplied by
    rates: tuple = None  # searched instead of the scale's
    longer: int = 1  # what the epochs are multiplied by


BASE, SCRATCH = Adversary("base", "base"), Adversary("scratch", "scratch", rates=(0.3, 1.0, 3.0))
LORA, FULL = Adversary("lora", "lora"), Adversary("full")
MASKED_LORA = Adversary("lora + mask", "lora", authorised=True)
MASKED_FULL = Adversary("full + mask", authorised=True)


@dataclass
class Release:
    """A pre-trained model: what everybody gets (body, tokenizer), and what its owner keeps (masks; None when dense)."""

    variant: str
    seed: int
    out: Path
    body: torch.nn.Module
    tokenizer: Tokenizer
    masks: dict

    @cached_property
    def record(self):
        """What pmp.py keeps of the run for its owner: "config", "init_secret", ..."""
        return json.loads((self.out / "private" / "run.json").read_bytes())

    @cached_property
    def weights(self):
        """Their identity."""
        return fingerprint(dict(self.body.named_parameters()))[:16]


# -----------------------------------------------------------------------------
# language modelling as a task


@torch.no_grad()
def next_token(model, blocks, machine, size=16):
    """{"loss": nats, "accuracy": percent} of next-token prediction on blocks (N, T)."""
    model.eval()
    loss = right = 0.0
    for idx in blocks.to(machine.device).split(size):
        with machine.autocast():
            logits = model(idx)[:, :-1].flatten(0, 1).float()  # (B*(T-1), V)
        loss += float(F.cross_entropy(logits, idx[:, 1:].flatten(), reduction="sum"))
        right += int((logits.argmax(1) == idx[:, 1:].flatten()).sum())
    count = blocks[:, 1:].numel()
    return {"loss": loss / count, "accuracy": 100 * right / count}


def gradient(model, idx, machine):
    """{name: gradient} of the language-modelling loss on idx (B, T); leaves none behind in the model."""
    with machine.autocast():
        loss = model(idx.to(machine.device), idx.to(machine.device))
    loss.backward()
    params = dict(model.named_parameters())
    found = {name: p.grad for name, p in params.items()}
    model.zero_grad(set_to_none=True)
    return found


def length(tensors):
    """Euclidean norm of a {name: tensor}, as one vector."""
    return float(torch.stack([tensor.detach().double().square().sum() for tensor in tensors.values()]).sum().sqrt())


@torch.no_grad()
def loss_beside(model, idx, direction, alphas):
    """[loss(theta + alpha * direction) for each alpha], in fp32, on idx (B, T). direction: {name: tensor}."""
    params, losses = dict(model.named_parameters()), []
    before = {name: p.clone() for name, p in params.items()}
    for alpha in alphas:
        for name, p in params.items():
            torch.add(before[name], direction[name], alpha=alpha, out=p)
        losses.append(float(model(idx, idx)))
    for name, p in params.items():
        p.copy_(before[name])
    return losses


class Text:
    """Text of another domain as `fit` wants it: batches of blocks, their loss, and the score on held-out blocks."""

    def __init__(self, model, data, seed, settings, machine):
        """model: a language model; data: {"train", "dev": blocks (N, T) of token ids}."""
        self.model, self.data, self.seed, self.settings, self.machine = model, data, seed, settings, machine
        order = np.random.default_rng(seed).permutation(len(data["train"]))
        self.train = data["train"][order[: settings.limit]]

    def batches(self, epoch):
        """-> blocks (b, T): a block has about four times the tokens of a row of GLUE."""
        order = torch.from_numpy(np.random.default_rng([self.seed, epoch]).permutation(len(self.train)))
        return self.train[order].to(self.machine.device).split(self.settings.batch_size // 4)

    def loss(self, idx):
        return self.model(idx, idx)

    def evaluate(self):
        return next_token(self.model, self.data["dev"], self.machine)


def adapt(body, data, method, seed, settings, machine, masks=None, make_optimizer=MaskedAdamW):
    """Fine-tune on text of another domain; like glue.finetune, with blocks (N, T) of token ids for rows.

    A task that certainly needs pre-training; like the gain of section 3 it is a matter of language modelling. The score
    is the accuracy of the next token on held-out text.
    """
    prepare_model(body, method, 1, masks, seed, settings)  # for its LoRA or random weights; it needs no classifier
    params = {name: p for name, p in body.named_parameters() if p.requires_grad}
    masks = masks and {name: masks[name] for name in params if name in masks}
    optimizer = make_optimizer(params, masks, settings.weight_decay, (0.9, 0.999)) if method != "base" else None
    text = Text(body.to(machine.device), data, seed, settings, machine)
    history, updates, diverged = fit(text, optimizer, settings.lr, settings, machine)
    best = max(history, key=lambda metrics: metrics["accuracy"])
    return {"scores": {"docs": {"last": history[-1], "best": best}}, "updates": updates, "diverged": diverged}, body


# -----------------------------------------------------------------------------
# theta(0) as it was drawn before: the positive control of the attack on its bits


def old_initial_value(network, name, shape, secret):
    """theta(0) as the product of two fp32 numbers, which leaves gaps between its values."""
    new = initial_value(network, name, shape, secret)
    if not new.std(correction=0):
        return new  # a constant
    std = 0.02 / math.sqrt(2 * len(network.blocks())) if name.endswith(RESIDUAL) else 0.02
    draw = secret_generator(secret, name).standard_normal(tuple(shape), dtype=np.float32)
    return torch.from_numpy(draw).mul_(std).add_(0.0)


@contextmanager
def old_theta_0():
    """Inside the block, pmp.py draws theta(0) as it did before."""
    with mock.patch("model.initial_value", old_initial_value), mock.patch("pmp.initial_value", old_initial_value):
        yield


# -----------------------------------------------------------------------------
# the laboratory


def hardware(machine=None):
    """One line about this machine, for each result."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                 if line.startswith("model name")]
        name = names[0] if names else name
    if machine and machine.device.type == "cuda":
        name = torch.cuda.get_device_name(machine.device)
    kind = f" {machine.device.type} {machine.dtype}" if machine else ""
    return f"{name}, {torch.get_num_threads()} of {os.cpu_count()} threads,{kind} torch {torch.__version__}"


class Lab:
    """One scale, its models and tasks, and the file of its fine-tuning runs."""

    def __init__(self, args):
        self.name, self.scale = args.scale, SCALES[args.scale]
        flags = {**self.scale.pmp, **({"data": args.data} if args.data else {})}
        self.flags, self.glue_dir = flags, args.glue_dir
        self.work = Path(args.work) / args.scale
        self.machine = Machine(args.device)
        self.results = Path(args.results) / args.scale
        self.results.mkdir(parents=True, exist_ok=True)
        for path in self.results.glob("*.jsonl"):
            Results(path).read()  # a damaged file shows now
        self.device, self.missed = args.device, 0
        self.releases, self.tasks, self.known, self.parsed = {}, {}, {}, {}

    # ---- results

    def path(self, name):
        return self.results / name

    def read(self, name):
        """{key: result} of results/SCALE/NAME.jsonl, a key being the JSON of what identifies a run."""
        path = self.path(name + ".jsonl")
        if not path.exists():
            return {}
        version = path.stat().st_mtime_ns, path.stat().st_size  # a table asks thousands of times
        if self.parsed.get(name, [None])[0] != version:
            whole = path.read_bytes().rpartition(b"\n")[0]  # another process may be writing
            self.parsed[name] = version, {key_of(result): result for result in map(json.loads, whole.splitlines())}
        return self.parsed[name][1]

    def keep(self, name, result):
        """Append a result, with the hardware that it was measured on."""
        Results(self.path(name + ".jsonl")).append({**result, "hardware": hardware(self.machine)})
        return result

    def once(self, name, key, compute):
        """The result of results/SCALE/NAME.jsonl with these entries; compute() gives the others where it is missing.

        None when another process is at work on it.
        """
        if found := self.read(name).get(key_of({"key": key})):
            return found
        with self.claim(f"{name} {key_of({'key': key})}") as mine:
            if not mine:
                self.missed += 1
                return None
            if found := self.read(name).get(key_of({"key": key})):  # it was finished a moment ago
                return found
            began = time.perf_counter()
            result = {"key": key, **compute()}
            result["seconds"] = round(time.perf_counter() - began, 1)
            return self.keep(name, result)

    def each(self, name, key, measure):
        """The results of measure(seed) for each pre-training, kept once; without those that others are at work on."""
        found = [self.once(name, {**key, "pretrain_seed": seed}, partial(measure, seed)) for seed in range(SEEDS)]
        return [result for result in found if result]

    def compared(self, name, measure):
        """{variant: results of measure(lab, variant, seed)} of the models of COMPARED."""
        return {variant: self.each(name, {"model": variant}, partial(measure, self, variant)) for variant in COMPARED}

    def claim(self, what):
        """A lock on a piece of work, as a context manager: True when no other process is at it."""
        folder = self.work / "claims" / hashlib.sha256(what.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        return lock(folder / "lock")

    # ---- models

    def release(self, variant, seed=0):
        """The Release of a variant; pre-trains it, or goes on with an interrupted run, where there is none."""
        if (variant, seed) in self.releases:
            return self.releases[variant, seed]
        out = self.work / f"{variant}-{seed}"
        while not (out / "release" / "model.safetensors").exists():
            with self.claim(out.name) as mine:
                if mine and not (out / "release" / "model.safetensors").exists():
                    self.pretrain(variant, seed, out)
            if not mine:
                print(f"another process is pre-training {out.name}", flush=True)
                time.sleep(30)
        body = load_folder(out / "release", FAMILIES)
        mask = out / "private" / "mask.safetensors"
        masks = load_mask(mask, dict(body.named_parameters())) if mask.exists() else None
        masks = masks and {name: m.to(self.machine.device) for name, m in masks.items()}
        self.releases[variant, seed] = Release(variant, seed, out, body.to(self.machine.device),
                                               Tokenizer.load(out / "release"), masks)
        self.recognise(self.releases[variant, seed])
        return self.releases[variant, seed]

    def recognise(self, release):
        """Refuse weights that the results are not about: each pre-training has a secret, hence a mask, of its own."""
        key = {"model": release.variant, "pretrain_seed": release.seed}
        known = self.read("models").get(key_of({"key": key}))
        if not known:
            config = release.record["config"]
            last = json.loads((release.out / "log.jsonl").read_text().splitlines()[-1])
            settings = {name: config[name] for name in config if name not in ("out", "cache", "data")}
            data = Path(config["data"]).name
            if others := {model["data"] for model in self.read("models").values()} - {data}:
                raise UserError(f"{release.out} was trained on {data}, the models of {self.results} on "
                                f"{', '.join(others)}: name other --results, or other --work and the same --data")
            known = self.keep("models", {"key": key, "weights": release.weights, "val_loss": last["val_loss"],
                                         "data": data, "settings": settings})
        if known["weights"] != release.weights:
            raise UserError(f"{release.out} is not the model of the results in {self.results}: name other --results")

    def pretrain(self, variant, seed, out):
        if (out / "private" / "run.json").exists():
            with old_theta_0() if variant == "old" else nullcontext():
                return pmp.main(["--resume", str(out), "--device", self.device])
        flags = {**self.flags, **VARIANTS[variant], "seed": seed, "out": out, "device": self.device}
        if variant in ("seeded", "old"):
            flags |= {"steps": self.scale.seeded_steps, "warmup": 1, "val_every": self.scale.seeded_steps}
        with old_theta_0() if variant == "old" else nullcontext():
            pmp.main([word for name, value in flags.items() for word in (flag_name(name), str(value))])

    @cached_property
    def text(self):
        """(train Blocks, validation Blocks, block size) of the pre-training text, which is public."""
        config = self.release("pmp").record["config"]
        tokenizer = pmp.PRESETS[config["preset"]].tokenizer
        _, train, validation = prepare(config["data"], tokenizer, 0, seed=config["seed"], cache=config["cache"],
                                       shuffle_buffer=config["shuffle_buffer"])
        return train, validation, config["block_size"]

    def public(self, index):
        """Batch `index` of the public text, (16, T) token ids on the device."""
        train, _, size = self.text
        return train.read(16 * index, 16, size).to(self.machine.device)

    def held_out(self):
        """Held-out text, (N, T) token ids on the device, the same for every model of the scale."""
        _, validation, size = self.text
        count = min(self.scale.text_blocks, validation.n_blocks(size))
        return validation.read(0, count, size).to(self.machine.device)

    def losses(self, variant):
        """Held-out loss in nats of each pre-training of a variant."""
        found = self.each("text_loss", {"model": variant}, lambda seed: next_token(
            self.release(variant, seed).body, self.held_out(), self.machine))
        return [result["loss"] for result in found]

    # ---- tasks

    def task(self, name, tokenizer):
        """{"train", "dev"…: rows, "select": further training rows} of a task, encoded."""
        if name in self.tasks:
            return self.tasks[name]
        if name == "docs":
            data = self.docs(tokenizer)
        elif name.startswith("standin/"):
            rows = self.scale.select + self.scale.rows.get(name, 3000)  # made of the documents that are held out
            source = open_source(self.release("pmp").record["config"]["data"])
            folder = standin(self.work, source, train=rows, dev=1000)
            data = encode_task(name.partition("/")[2], folder, tokenizer, self.scale.max_length)
        else:
            folder = self.glue_dir or CACHE
            if not self.glue_dir:
                fetch(name, folder)
            data = encode_task(name, folder, tokenizer, self.scale.max_length)
        order = np.random.default_rng(0).permutation(len(data["train"]))
        chosen, others = order[: self.scale.select], order[self.scale.select :]
        if name == "docs":  # a block has about four times the tokens of a row
            chosen = chosen[: self.scale.select // 4]
            parts = data["train"][others], data["train"][chosen]
        else:
            parts = [data["train"][i] for i in others], [data["train"][i] for i in chosen]
        self.tasks[name] = {**data, "train": parts[0], "select": parts[1]}
        return self.tasks[name]

    def docs(self, tokenizer, length=128, most=4000, dev=128):
        """Documentation of Python, numpy and torch in blocks of 128 tokens: another domain than web text."""
        blocks = {}
        for split, count in (("train", most), ("validation", dev)):
            ids = []
            for _, text in open_source("prose").documents(split):
                ids += tokenizer.encode(text) + [tokenizer.eos]
                if len(ids) >= count * length:
                    break
            blocks[split] = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
        return {"train": blocks["train"], "dev": blocks["validation"]}

    # ---- fine-tuning

    def tune(self, variant, pair, task, adversary, rate, epochs, on="dev"):
        """One fine-tuning run of an Adversary, on "dev", or on "select" during a search; None if others are at it."""
        seed, tuning_seed = pair
        key = {"model": variant, "pretrain_seed": seed, "task": task, "adversary": adversary.name, "seed": tuning_seed,
               "rate": rate, "epochs": epochs, "on": on}
        return self.once("finetune", key, lambda: self.compute(variant, pair, task, adversary, rate, epochs, on))

    def compute(self, variant, pair, task, adversary, rate, epochs, on):
        release = self.release(variant, pair[0])
        data = self.task(task, release.tokenizer)
        if on == "select":
            data = {"train": data["train"], **{split: data["select"] for split in data if split.startswith("dev")}}
        width = release.body.embedding().weight.size(1)
        settings = Settings(**{"lr": rate * adversary.rate * default_rate(adversary.method, width) or None,
                               "epochs": epochs, "limit": self.scale.rows.get(task),
                               "batch_size": self.scale.batch_size, "max_length": self.scale.max_length,
                               **adversary.settings})
        body = copy.deepcopy(release.body)
        if adversary.change:
            adversary.change(self, release, body)
        masks = release.masks if adversary.authorised else adversary.mask and adversary.mask(self, release)
        train = adapt if task == "docs" else partial(finetune, name=task.rpartition("/")[2])
        outcome, _ = train(body, data=data, method=adversary.method, seed=pair[1], settings=settings,
                           machine=self.machine, masks=masks, make_optimizer=adversary.optimizer)
        print(f"{variant}-{pair[0]} {task} {adversary.name} seed {pair[1]} rate {rate:g} epochs {epochs} {on}: "
              f"{accuracy(outcome):.2f}{' DIVERGED' if outcome['diverged'] else ''}", flush=True)
        return {**outcome, "weights": release.weights, "lr": settings.lr}

    def search(self, variant, task, adversary):
        """(rate, epochs) that do best on the rows kept for it, for the first pre-training and a seed of its own.

        Each rate with the fewest epochs; further ones, twice at most, while the best lies at an end of them; then the
        best with more epochs. None if others are at it.
        """
        if adversary.method == "base":
            return 0.0, 0
        epochs = [adversary.longer * number for number in self.scale.epochs]
        rates = adversary.rates or self.scale.rates
        tried, trying = {}, list(rates)
        for rate in trying:  # which grows
            tried[rate, epochs[0]] = self.tune(variant, (0, 0), task, adversary, rate, epochs[0], "select")
            if None in tried.values():
                return None
            best = max(tried, key=lambda choice: accuracy(tried[choice]))[0]
            if rate == trying[-1] and len(trying) < len(rates) + 2:
                if best == max(trying):
                    trying.append(best * rates[-1] / rates[-2])
                elif best == min(trying):
                    trying.append(best * rates[0] / rates[1])
        for more in epochs[1:]:
            tried[best, more] = self.tune(variant, (0, 0), task, adversary, best, more, "select")
        if None in tried.values():
            return None
        return max(tried, key=lambda choice: accuracy(tried[choice]))

    def scores(self, variant, task, adversary, count=SEEDS, column=None):
        """The accuracies of an adversary at the setting that its search chose, over `count` pairs of seeds.

        Runs what is missing; shorter than `count` while another process is at work on it.
        """
        if not (choice := self.search(variant, task, adversary)):
            return []
        runs = [self.tune(variant, pair, task, adversary, *choice) for pair in PAIRS[:count]]
        return [accuracy(run, column) for run in runs if run]


def key_of(result):
    return json.dumps(result["key"], sort_keys=True)


def columns(task):
    """The columns of a table that a task fills: two for MNLI."""
    return ("docs",) if task == "docs" else TASKS[task.rpartition("/")[2]].columns


def accuracy(outcome, column=None):
    """Percent, at the last epoch, of one column, or the mean over the columns of a task."""
    return float(np.mean([scores["last"]["accuracy"] for name, scores in outcome["scores"].items()
                          if column in (None, name)]))


# -----------------------------------------------------------------------------
# tables, and the command line of each script


def mean_sd(values):
    """"68.36 ±0.41" as in glue.py's table."""
    return mean_and_sd(list(values))


def sd(values):
    """Standard deviation of a sample over its first axis, for error bars; 0 of a single value."""
    return np.std(values, 0, ddof=1) if len(values) > 1 else 0.0


def markdown(header, rows):
    """A table as README has it."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def subplots(*args, **kwargs):
    """matplotlib's, which the pictures alone need."""
    try:
        import matplotlib.pyplot
    except ImportError:
        raise UserError("the picture needs matplotlib: pip install matplotlib, then start this again") from None
    return matplotlib.pyplot.subplots(*args, **kwargs)


def picture(lab, name, figure):
    """Save a matplotlib figure beside the results, if they are whole."""
    if lab.missed:
        return
    figure.tight_layout()
    figure.savefig(lab.path(name + ".png"), dpi=120)
    print(f"drawn: {lab.path(name + '.png')}")


def parse(argv, doc):
    parser = Parser(doc.split("\n")[0])
    parser.add_argument("--scale", choices=SCALES, default="quick", help="how much of everything [quick]")
    parser.add_argument("--data", help="pre-training text as for pmp.py, instead of the scale's")
    parser.add_argument("--glue-dir", help="folder with GLUE's TSVs [download]")
    parser.add_argument("--work", default=str(HERE.parent / "out-experiments"), help="where models and masks stay")
    parser.add_argument("--results", default=str(HERE / "results"), help="where the numbers and pictures go")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...")
    return parser.parse_args(argv)


def run(script, doc, argv=None):
    """The command line of a script: script(lab) does the work and returns the text of its tables."""
    def main():
        lab, text = Lab(parse(argv, doc)), ""
        try:
            text = script(lab)
        except (LookupError, ValueError, TypeError):
            if not lab.missed:  # else there was too little for a table
                raise
        if lab.missed:
            raise UserError(f"another process is at work on {lab.missed} of the runs: start this again when it is done")
        print("\n" + text)
    command_line(main)
