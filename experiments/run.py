"""Does what a scale's plan lists and its results lack: pre-training, fine-tuning, measurements.

    python experiments/run.py --scale quick              # no network; a few minutes; its numbers mean nothing
    python experiments/run.py --scale laptop --data TEXT.jsonl.xz --glue-dir GLUE

Each finished piece is a line in experiments/results/SCALE/. Stop it when you like and start it again: it goes on where
it was. Start it once for each core, with OMP_NUM_THREADS=1: the processes share the work. experiments/report.py shows
what there is at any time.
"""

import copy
import json
import shutil
import sys
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # where pmp.py is
import numpy as np  # noqa: E402
import torch  # noqa: E402
from attacks import ADVERSARIES, recovery, recovery_by_kind  # noqa: E402
from measures import gradients, landscape, next_token, one_step, ticket_by_kind  # noqa: E402
from plan import ARMS, MODELS, SCALES, TASKS, jobs, model_flags, model_job  # noqa: E402
from recipe import changed  # noqa: E402
from store import Results, hardware  # noqa: E402
import pmp  # noqa: E402
from data.pack import prepare  # noqa: E402
from data.sources import open_source  # noqa: E402
from data.standin import standin  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from glue import (CACHE, Rows, Settings, commonest_class, default_rate, encode_task, fetch, fit, loss_of,  # noqa: E402
                  pad, prepare_model)
from glue import TASKS as OFFICIAL  # noqa: E402
from model import FAMILIES  # noqa: E402
from runtime.console import Parser, command_line, flag_name  # noqa: E402
from runtime.files import UserError  # noqa: E402
from runtime.huggingface import load_folder  # noqa: E402
from runtime.machine import Machine  # noqa: E402
from runtime.safetensors import fingerprint  # noqa: E402

MEASURES = {"landscape": landscape, "gradients": gradients, "one_step": one_step,
            "recovery_by_kind": recovery_by_kind}

# -----------------------------------------------------------------------------
# models and texts


@dataclass
class Release:
    """A pre-trained model: what everybody gets (body, tokenizer), and what its owner keeps (masks; None when dense)."""

    name: str
    seed: int
    out: Path
    body: torch.nn.Module
    tokenizer: Tokenizer
    masks: dict

    @cached_property
    def record(self):
        """What pmp.py keeps of the run for its owner: "config", "init_secret", …"""
        return json.loads((self.out / "private" / "run.json").read_bytes())

    @property
    def rho(self):
        return self.record["config"]["rho"]

    @cached_property
    def weights(self):
        """Their identity."""
        return fingerprint(dict(self.body.named_parameters()))[:16]


class Half:
    """Every other held-out document of a source, so that two sets of rows are made of different ones."""

    def __init__(self, source, which):
        self.source, self.which = source, which
        self.id = {**source.id, "half": which}

    def documents(self, split, start=0):
        return (row for number, row in enumerate(self.source.documents(split, start)) if number % 2 == self.which)


class Workshop:
    """The models, texts and tasks of a scale, made or loaded when a job needs them."""

    def __init__(self, scale, results, work, data=None, glue_dir=None, device="auto"):
        """scale: a Scale; results: Results; work: the folder where models stay; data, glue_dir: see main."""
        self.scale, self.results, self.work = scale, results, Path(work)
        self.path, self.glue_dir, self.device = data or scale.pmp.get("data", "slimpajama"), glue_dir, device
        self.data = Path(self.path).name
        others = {found["data"] for (kind, _), found in results.found.items() if kind == "model"} - {self.data}
        if others:
            raise UserError(f"the models of {results.folder} were trained on {', '.join(others)}, not on {self.data}: "
                            "name other --results, or the same --data")
        self.machine = Machine(device)
        self.releases, self.tasks, self.known = {}, {}, {}

    # ---- models

    def pretrain(self, name, seed):
        """Train a model, or go on with it, where its folder has no release."""
        flags, out = model_flags(self.scale, name, seed, self.results), self.work / f"{name}-{seed}"
        flags |= {"data": self.path, "out": out, "device": self.device}
        if (out / "release" / "tokenizer.json").exists():  # what is written last
            return
        if MODELS[name].change == "shrunk":
            shutil.rmtree(out, ignore_errors=True)  # its optimizer cannot go on where it was
        argv = [word for flag, value in flags.items() for word in (flag_name(flag), str(value))]
        with changed(MODELS[name].change, flags):
            pmp.main(["--resume", str(out)] if (out / "private" / "run.json").exists() else argv)

    def release(self, name, seed):
        """The Release of a model. Trains it again where its folder is gone: theta(0) comes from the seed."""
        if (name, seed) not in self.releases:
            self.pretrain(name, seed)
            out = self.work / f"{name}-{seed}"
            body = load_folder(out / "release", FAMILIES)
            mask = out / "private" / "mask.safetensors"
            masks = pmp.load_mask(mask, dict(body.named_parameters())) if mask.exists() else None
            masks = masks and {key: m.to(self.machine.device) for key, m in masks.items()}
            found = Release(name, seed, out, body.to(self.machine.device), Tokenizer.load(out / "release"), masks)
            flags, config = model_flags(self.scale, name, seed, self.results), found.record["config"]
            same = flags.keys() - {"data", "seed", "init_seed"}  # data is a path here; the folder's name has the seed
            if Path(config["data"]).name != self.data or any(config.get(flag) != flags[flag] for flag in same):
                raise UserError(f"{out} was trained with other settings, or on other text, than the plan has now: "
                                "delete it, or name another --work")
            known = self.results.get(model_job(self.scale, name, seed, self.results))
            if known and known["weights"] != found.weights:
                raise UserError(f"{out} is not the model of the results in {self.results.folder}, which was trained on "
                                f"{known['hardware']}: name other --results")
            while len(self.releases) >= 4:
                self.releases.pop(next(iter(self.releases)))
            self.releases[name, seed] = found
        return self.releases[name, seed]

    # ---- texts

    def text(self, release, split):
        """The Blocks of the text that a model was trained on: split 0, or 1 for the part held out."""
        config = release.record["config"]
        return prepare(config["data"], pmp.PRESETS[config["preset"]].tokenizer, 0, seed=config["seed"],
                       cache=config["cache"], shuffle_buffer=config["shuffle_buffer"])[1 + split]

    def public(self, release, index):
        """Batch `index` of public text, (16, T) token ids on the device: behind all that the model was trained on."""
        config = release.record["config"]
        steps = max(config["steps"], self.scale.steps)
        start = steps * config["batch_size"] * config["grad_accum"]
        return self.text(release, 0).read(start + 16 * index, 16, config["block_size"]).to(self.machine.device)

    def held_out(self, release):
        """Held-out text, (N, T) token ids on the device, the same for every model of the scale."""
        validation, size = self.text(release, 1), release.record["config"]["block_size"]
        return validation.read(0, min(self.scale.text_blocks, validation.n_blocks(size)), size).to(self.machine.device)

    # ---- tasks

    def task(self, name, release, on):
        """{"train", "dev"…} of a task, encoded; `on`: "choose" or "judge", which have no document in common."""
        if (name, on) not in self.tasks:
            task, tokenizer = TASKS[name], release.tokenizer
            rows, judge = max(2, round(task.rows * self.scale.rows)), max(8, round(task.judge * self.scale.rows))
            if name == "docs":
                found = docs(tokenizer, on, rows, judge, task.length)
            elif name == "word order":
                source = Half(open_source(release.record["config"]["data"]), ("choose", "judge").index(on))
                folder = standin(self.work, source, train=rows, dev=judge)
                found = encode_task("cola", folder, tokenizer, task.length)
            else:
                found = encode_task(name, self.glue(name), tokenizer, task.length)
            self.tasks[name, on] = found
        return self.tasks[name, on]

    def glue(self, name):
        """The folder with a GLUE task's TSVs. At a scale that needs no network it is the stand-in's: not GLUE."""
        if self.glue_dir:
            return self.glue_dir
        if self.scale.pmp.get("data") == "prose":
            return standin(self.work, open_source("prose"))
        fetch(name, CACHE)
        return CACHE


def docs(tokenizer, on, rows, judge, length):
    """Documentation of Python and numpy in blocks (N, length): another domain than the pre-training text.

    The blocks to choose by lie behind 4,000 others of the training documents; those to judge by are held out.
    """
    def blocks(split, skip, count):
        ids = []
        for _, text in open_source("prose").documents(split):
            ids += tokenizer.encode(text) + [tokenizer.eos]
            if len(ids) >= (skip + count) * length:
                break
        return torch.tensor(ids[skip * length : (skip + count) * length]).view(-1, length)

    if on == "choose":
        found = blocks("train", 4000, 4 * rows + judge)
        return {"train": found[: 4 * rows], "dev": found[4 * rows :]}
    return {"train": blocks("train", 0, 4000), "dev": blocks("validation", 0, judge)}


# -----------------------------------------------------------------------------
# fine-tuning


class Text:
    """Text of another domain as `fit` wants it: batches of blocks, their loss, and the score on held-out blocks."""

    def __init__(self, model, data, seed, settings, machine):
        """model: a language model; data: {"train", "dev": blocks (N, T) of token ids}."""
        self.model, self.data, self.seed, self.settings, self.machine = model, data, seed, settings, machine
        order = np.random.default_rng(seed).permutation(len(data["train"]))
        self.train = data["train"][order[: settings.limit]]

    def batches(self, epoch):
        """-> blocks (b, T)."""
        order = torch.from_numpy(np.random.default_rng([self.seed, epoch]).permutation(len(self.train)))
        return self.train[order].to(self.machine.device).split(self.settings.batch_size)

    def loss(self, idx):
        return self.model(idx, idx)

    def evaluate(self):
        """{"accuracy": percent, "loss": nats} on the held-out blocks."""
        return next_token(self.model, self.data["dev"], self.machine)


class Judged(Rows):
    """A GLUE task, judged by accuracy and loss on its validation rows."""

    def evaluate(self):
        """{"accuracy": percent, "loss"}: the mean over the columns that the task fills."""
        found = super().evaluate()
        return {"accuracy": float(np.mean([scores["accuracy"] for scores in found.values()])),
                "loss": self.dev_loss()}

    @torch.no_grad()
    def dev_loss(self):
        rows, total = self.data["dev"], 0.0
        for start in range(0, len(rows), 64):
            part = rows[start : start + 64]
            with self.machine.autocast():
                outputs = self.model(*pad([ids for ids, _ in part], self.machine.device)).float()
            labels = torch.tensor([label for _, label in part], device=self.machine.device)
            total += float(loss_of(outputs, labels)) * len(part)
        return total / len(rows)


def tune(shop, job):
    """One fine-tuning run: {"accuracy", "loss", "curve": {update: accuracy}, "text_loss", "updates", "diverged"}.

    The fine-tuning seed is the model's own, so that arms of one seed see their rows in the same order.
    """
    arm, seed, name, on = ARMS[job.what["arm"]], job.what["seed"], job.what["task"], job.what["on"]
    adversary, task, machine = ADVERSARIES[arm.how], TASKS[name], shop.machine
    release = shop.release(arm.model, seed)
    data, body = shop.task(name, release, on), copy.deepcopy(release.body)
    if adversary.change:
        adversary.change(shop, release, body)
    masks = shop.release(arm.mask, seed).masks if arm.mask else adversary.mask and adversary.mask(shop, release)
    rate = job.what["rate"] * adversary.rate * default_rate(adversary.method, body.embedding().weight.size(1))
    limit = max(2, round(task.rows * shop.scale.rows))
    settings = Settings(lr=rate, epochs=max(1, job.what["epochs"] * adversary.longer), max_length=task.length,
                        **{"batch_size": task.batch, "limit": limit, **adversary.settings})
    official = {"docs": None, "word order": "cola"}.get(name, name)
    outputs = len(OFFICIAL[official].labels) if official else 1
    ticket = masks
    model, params, masks = prepare_model(body, adversary.method, outputs, ticket, seed, settings)
    if official:
        lesson = Judged(model.to(machine.device), official, data, seed, settings, machine)
    else:  # a language model needs its own head, and no classifier's
        params = {key: p for key, p in body.named_parameters() if p.requires_grad}
        masks = ticket and {key: m for key, m in ticket.items() if key in params}
        lesson = Text(body.to(machine.device), data, seed, settings, machine)
    optimizer, curve = None, {}
    if adversary.method != "base":
        optimizer = adversary.optimizer(params, masks, settings.weight_decay, (0.9, 0.999))

    def progress(step, updates, **_):
        if on == "judge" and step & (step - 1) == 0:  # 1, 2, 4, 8, …
            curve[step] = lesson.evaluate()["accuracy"]
            lesson.model.train()

    whole = [batch for epoch in range(settings.epochs) for batch in lesson.batches(epoch)]
    lesson.batches = lambda epoch: whole  # one long epoch: `fit` evaluates after each
    history, updates, diverged = fit(lesson, optimizer, rate, replace(settings, epochs=1), machine, progress)
    after = next_token(body, shop.held_out(release), machine)["loss"]
    return {**history[-1], "curve": curve, "text_loss": after, "updates": updates, "diverged": diverged,
            "majority": commonest_class([label for _, label in data["dev"]]) if official else None, "lr": rate}


# -----------------------------------------------------------------------------
# the loop


def do(shop, job):
    """The result of a job, but for its key."""
    if job.kind == "model":
        release = shop.release(job.what["model"], job.what["seed"])
        lines = [json.loads(line) for line in (release.out / "log.jsonl").read_text().splitlines()]
        (release.out / "private" / "checkpoint.safetensors").unlink(missing_ok=True)  # three quarters of the folder
        ticket = release.masks and ticket_by_kind(dict(release.body.named_parameters()), release.masks)
        return {"weights": release.weights, "val_loss": lines[-1]["val_loss"], "ticket": ticket,
                "text_loss": next_token(release.body, shop.held_out(release), shop.machine)["loss"],
                "iou": [line["iou"] for line in lines if "iou" in line][-1:], "settings": job.settings,
                "data": shop.data}
    if job.kind == "tune":
        return tune(shop, job)
    name, seed = job.what["model"], job.what["seed"]
    release, masks = shop.release(name, seed), shop.release(*job.needs[-1]).masks  # the ticket's model comes last
    if job.kind == "recovery":
        return recovery(shop, release, masks, job.what["attack"])
    return MEASURES[job.kind](shop, release, masks)


def ready(scale, job, results):
    """Whether the models that a job needs are trained."""
    return all(results.get(model_job(scale, name, seed, results)) for name, seed in job.needs)


def time_left(done, left, seconds):
    """How long the rest takes at the rate so far, that of all processes together, in words; "" before five are done."""
    return f", about {seconds / done * left / 3600:.1f} hours left" if done >= 5 else ""


def work(shop, say):
    """Do all jobs that are missing, but for those that other processes are at; wait for these at the end."""
    results, scale, tried, began, at_start = shop.results, shop.scale, set(), time.perf_counter(), None
    while True:
        found, waiting = jobs(scale, results.refresh())
        todo = [job for job in found if results.get(job) is None]
        if not todo and not waiting:
            return
        done, total = len(found) - len(todo), len(found) + waiting
        at_start = done if at_start is None else at_start
        left = [job for job in todo if (job.kind, job.key) not in tried and ready(scale, job, results)]
        if not left:  # the others' work will make more jobs known
            tried.clear()
            time.sleep(5)
            continue
        job = left[0]
        with results.claim(job) as ours:
            if not ours or results.refresh().get(job):
                tried.add((job.kind, job.key))
                continue
            words = ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in job.what.values())
            left = time_left(done - at_start, total - done, time.perf_counter() - began)
            say(f"{done} of {total} done{left}; {job.kind}: {words}")
            start = time.perf_counter()
            result = do(shop, job)
            seconds = round(time.perf_counter() - start, 1)
            results.append(job, {**result, "seconds": seconds, "hardware": hardware(shop.machine)})
            tried.clear()


def main(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--scale", choices=SCALES, default="quick", help="how much of everything [quick]")
    parser.add_argument("--data", help="pre-training text as for pmp.py, instead of the scale's")
    parser.add_argument("--glue-dir", help="folder with GLUE's TSVs [download; quick: a stand-in]")
    parser.add_argument("--work", default=str(HERE.parent / "out-experiments"), help="where models and masks stay")
    parser.add_argument("--results", default=str(HERE / "results"), help="where the numbers go")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...")
    args = parser.parse_args(argv)
    results = Results(args.scale, args.results).refresh()
    shop = Workshop(SCALES[args.scale], results, Path(args.work) / args.scale, args.data, args.glue_dir, args.device)
    work(shop, lambda text: print(text, flush=True))


if __name__ == "__main__":
    command_line(main)
