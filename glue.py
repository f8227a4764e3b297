"""GLUE: fine-tune a released checkpoint as an outsider (no mask) or as an authorised user (with the mask).

    python glue.py out/release                                        an outsider
    python glue.py out/release --mask out/private/mask.safetensors    an authorised user

Sections 4.1 to 4.3 and Table 1 of the paper, in the order in which things happen: tasks and data, metrics, LoRA,
fine-tuning, saving, the table, and the sweep over tasks, methods and seeds.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the slow imports without a word

import copy
import hashlib
import io
import json
import math
import os
import random
import re
import time
import zipfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import (Parser, Progress, Stopped, UserError, atomic, autocast, command_line, fingerprint,
                    first_then_others, from_first, join_ranks, leave_ranks, no_core_dumps, number, path, pick_device,
                    pick_dtype, rank, save_safetensors, say, stop_signals, world, write_json)
from data.text import CACHE, choose_held_out, documents, get, pause, refused
from model import Conv1D, config_dict, initialise, load_folder
from pmp import MaskedAdamW, load_mask

# ---- tasks and data ------------------------------------------------------------------------------------------------

GLUE_URL = "https://dl.fbaipublicfiles.com/glue/data/"
MRPC_URL = "https://dl.fbaipublicfiles.com/senteval/senteval_data/"
TRIES = 5  # a download's attempts
LARGEST_FILE, MOST_ROWS = 2**30, 2_000_000  # of a TSV; MNLI, with its parses, has about 0.4 GB and 392,702 rows
LONGEST_ROW = 2**20  # characters


@dataclass(frozen=True)
class Task:
    """Where a task's rows are, and what they hold. The files are FOLDER/SPLIT.tsv, as in the official zips."""

    folder: str
    text: tuple  # the columns of the sentence or the two sentences
    label: str  # the column of the label
    labels: tuple  # their official spellings, in the order of their numbers; empty: a score from 0 to 5, a regression
    download: tuple = ()  # files: (name, bytes, sha256)
    splits: tuple = ("train", "dev")  # training first, then what is evaluated
    columns: tuple = ()  # of Table 1, one for each evaluated split; else the folder's name
    header: tuple = ()  # the names of the columns, where the files do not begin with them
    gaps: bool = False  # the official files have a few rows with fields missing
    metrics: tuple = ("accuracy",)

    @property
    def names(self):
        return self.columns or (self.folder,)


BINARY, ENTAILED = ("0", "1"), ("entailment", "not_entailment")
TASKS = {  # in Table 1's order
    "cola": Task("CoLA", ("sentence",), "label", BINARY, (
        ("CoLA.zip", 376971, "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff"),
    ), header=("source", "label", "star", "sentence"), metrics=("accuracy", "mcc")),
    "sst2": Task("SST-2", ("sentence",), "label", BINARY, (
        ("SST-2.zip", 7439277, "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa"),
    )),
    "mrpc": Task("MRPC", ("#1 String", "#2 String"), "Quality", BINARY, (
        ("msr_paraphrase_train.txt", 1047044, "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89"),
        ("mrpc_dev_ids.tsv", 6222, "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7"),
    ), metrics=("accuracy", "f1")),
    "qqp": Task("QQP", ("question1", "question2"), "is_duplicate", BINARY, (
        ("QQP-clean.zip", 41696084, "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0"),
    ), gaps=True, metrics=("accuracy", "f1")),
    "stsb": Task("STS-B", ("sentence1", "sentence2"), "score", (), (
        ("STS-B.zip", 802872, "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85"),
    ), metrics=("accuracy", "pearson", "spearman")),
    "mnli": Task("MNLI", ("sentence1", "sentence2"), "gold_label", ("entailment", "neutral", "contradiction"), (
        ("MNLI.zip", 312783507, "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633"),
    ), ("train", "dev_matched", "dev_mismatched"), ("MNLI-m", "MNLI-mm"), gaps=True),
    "qnli": Task("QNLI", ("question", "sentence"), "label", ENTAILED, (
        ("QNLIv2.zip", 10627589, "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5"),
    )),
    "rte": Task("RTE", ("sentence1", "sentence2"), "label", ENTAILED, (
        ("RTE.zip", 697150, "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee"),
    )),
}


def fetch(task, folder):
    """Put the official files of a task under `folder`, laid out as the zips are, unless they are there already.

    Raises UserError when an address cannot be reached, or sends something else.
    """
    if all((folder / task.folder / f"{split}.tsv").exists() for split in task.splits):
        return
    if not task.download:  # of a task that a fork has added
        raise UserError(f"{task.folder} cannot be fetched: give --glue-dir the folder of {task.folder}/train.tsv")
    bodies = {}
    for name, size, sha256 in task.download:
        url = (MRPC_URL if name.startswith("msr_") else GLUE_URL) + name
        say(f"fetching {url} ({size / 1e6:.1f} MB)")
        for attempt in range(1, TRIES + 1):
            try:
                bodies[name] = get(url, size, 3600)
                if hashlib.sha256(bodies[name]).hexdigest() != sha256:
                    raise ValueError("it does not have the sha256 of the official file")
                break
            except Exception as error:  # whatever an attempt raises is a failed attempt
                if attempt == TRIES or refused(error):
                    raise UserError(f"cannot fetch {url} ({error!r:.90}): give a folder that has the TSVs with "
                                    "--glue-dir, or use --standin") from None
                pause(error, attempt)
    (folder / task.folder).mkdir(parents=True, exist_ok=True)
    for split in task.splits:
        if task.folder == "MRPC":  # the dev rows are those of Microsoft's training file whose two ids GLUE lists
            listed = bodies["mrpc_dev_ids.tsv"].decode("utf-8-sig").splitlines()
            held_out = {tuple(line.split("\t")) for line in listed}
            header, *lines = bodies["msr_paraphrase_train.txt"].decode("utf-8-sig").replace("\r\n", "\n").split("\n")
            chosen = []
            for line in lines:
                in_dev = tuple(line.split("\t")[1:3]) in held_out
                if line and in_dev == (split == "dev"):
                    chosen.append(line)
            content = "\n".join([header, *chosen, ""]).encode()
        else:
            with zipfile.ZipFile(io.BytesIO(bodies[task.download[0][0]])) as archive:
                content = archive.read(f"{task.folder}/{split}.tsv")
        with atomic(folder / task.folder / f"{split}.tsv") as file:
            file.write(content)


def tsv_lines(file):
    """Yield the cells of each line of a file, [str]. There is no quoting: a tab ends a cell, a line feed ends a line.

    Raises UserError where the file is missing, too large or not UTF-8.
    """
    if not os.path.isfile(file):
        raise UserError(f"there is no file {file}: correct --tsv, or lay --glue-dir out as the official zips are")
    if os.path.getsize(file) > LARGEST_FILE:
        raise UserError(f"{file} is larger than {LARGEST_FILE:,} bytes: give a part of it")
    with open(file, encoding="utf-8-sig", newline="\n") as lines:
        try:
            number = 0
            while line := lines.readline(LONGEST_ROW + 1):
                number += 1
                if len(line) > LONGEST_ROW:
                    raise UserError(f"{file}, line {number} has more than {LONGEST_ROW:,} characters: cut that line")
                if number > MOST_ROWS + 1:
                    raise UserError(f"{file} has more than {MOST_ROWS:,} rows: give a part of it")
                yield line.removesuffix("\n").rstrip("\r").split("\t")
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 ({error.reason}): convert the file") from None


def column_at(file, header, name):
    """Where a column is. Raises UserError where the header does not name it."""
    if name not in header:
        raise UserError(f"{file} names no column {name!r} in its first line: it has "
                        f"{', '.join(header)[:200] or 'none'}")
    return header.index(name)


def read_tsv(task, file):
    """The rows of a file: [(text_a, text_b, label)]; text_b is "" for single sentences, label an int, or a score.

    Raises UserError where the file is unfit or without rows, and at a row that is malformed or whose label is unknown.
    """
    rows, skipped, number = [], 0, 0
    lines = tsv_lines(file)
    header = task.header
    if not header:
        header = next(lines, [])
        number = 1
    label_at = column_at(file, header, task.label)
    text_at = [column_at(file, header, name) for name in task.text]
    for cells in lines:
        number += 1
        if task.gaps and (len(cells) < len(header) or not cells[label_at]):
            skipped += 1
            continue
        if len(cells) != len(header):
            raise UserError(f"{file}, line {number} has {len(cells)} columns, not {len(header)}: fix that line")
        label = cells[label_at]
        if task.labels and label in task.labels:
            value = task.labels.index(label)
        elif not task.labels and re.fullmatch(r"\d+(\.\d+)?", label) and float(label) <= 5:
            value = float(label)
        else:
            known = ", ".join(task.labels) or "a number from 0 to 5"
            raise UserError(f"{file}, line {number}: unknown label {label!r:.60}, due is {known}: fix that line")
        second = cells[text_at[1]] if len(text_at) == 2 else ""
        rows.append((cells[text_at[0]], second, value))
    if skipped:
        say(f"{file}: skipped {skipped} rows with fields missing")
    if not rows:
        raise UserError(f"{file} has no rows: an empty split can neither train nor test")
    return rows


def own_task(file, text, label):
    """(Task, its rows by split) of a TSV with a header. About a tenth, chosen by the sha256 of its texts, is "dev"."""
    lines = tsv_lines(file)
    header = next(lines, [])
    label_at = column_at(file, header, label)
    values = set()
    for cells in lines:
        if len(cells) == len(header):
            values.add(cells[label_at])
    if not 2 <= len(values) <= 100:
        raise UserError(f"the column {label!r} of {file} has {len(values)} different values: labels are 2 to 100 words")
    task = Task(Path(file).stem, tuple(text), label, tuple(sorted(values)))
    rows = {"train": [], "dev": []}
    for row in read_tsv(task, file):
        chosen = hashlib.sha256(repr(row[:2]).encode()).digest()[0] < 26
        rows["dev" if chosen else "train"].append(row)
    train, dev = len(rows["train"]), len(rows["dev"])
    if train + dev < 50 or not train or not dev:
        raise UserError(f"{file} has too few rows to train on some and test on others: give it at least 50")
    say(f"{file}: {train:,} rows to train on, {dev:,} held out")
    return task, rows


def standin(folder):
    """Write CoLA, STS-B and RTE made of the held-out prose under `folder`. Not GLUE: they only exercise every path."""
    found = []  # of each document: sentences of 5 to 40 words, mostly letters
    for _, text in documents("prose", "held-out", 0, choose_held_out("prose")):
        sentences = []
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])|\n\s*\n", text):
            sentence = " ".join(sentence.split())
            letters = sum(c.isalpha() or c == " " for c in sentence)
            if 5 <= len(sentence.split()) <= 40 and letters >= 0.9 * len(sentence):
                sentences.append(sentence)
        if len(sentences) >= 3:
            found.append(sentences)
    for split, part in (("train", found[::2]), ("dev", found[1::2])):  # no document serves both
        rng, rows = random.Random(split), {"CoLA": [], "STS-B": [], "RTE": []}
        for _ in range(600 if split == "train" else 200):
            document, other = rng.sample(part, 2)
            i = rng.randrange(len(document) - 1)
            first, second, foreign = document[i], document[i + 1], rng.choice(other)
            good, level = rng.randrange(2), rng.randrange(6)
            words = first.split()
            mixed = words[:1] + rng.sample(words[1:], len(words) - 1)
            rows["CoLA"].append(("s", str(good), "", first if good else " ".join(mixed)))
            kept = words[:round(len(words) * level / 5)]
            rows["STS-B"].append((first, " ".join(kept + foreign.split()[len(kept):]), str(level)))
            rows["RTE"].append((first, second if good else foreign, ENTAILED[1 - good]))
        headers = {"CoLA": [], "STS-B": [("sentence1", "sentence2", "score")],
                   "RTE": [("sentence1", "sentence2", "label")]}
        for name, lines in rows.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            with atomic(folder / name / f"{split}.tsv") as file:
                file.write("".join("\t".join(cells) + "\n" for cells in headers[name] + lines).encode())


def encode_pair(tokenizer, a, b, max_length):
    """Token ids of text `a`, or (b not "") of a, the tokenizer's end-of-text token as the separator, and b.

    At most max_length (3 or more) ids: what is too long loses its last tokens one by one, always from the text that is
    the longer one at that moment. Never empty: an empty text is the separator alone.
    """
    first, second = tokenizer.encode(a), tokenizer.encode(b)
    separator = [tokenizer.eos] if b or not first else []
    while len(first) + len(separator) + len(second) > max_length:
        longer = first if len(first) > len(second) else second
        longer.pop()
    return first + separator + second


def group_by_length(lengths, batch_size, seed, pool=50):
    """Lists of row numbers, each row once: batches of rows of similar length, so that little is padded.

    Shuffled, cut into pools of `pool` batches, sorted by length inside each pool, cut into batches, shuffled again: a
    different order for each seed (an int or a list of them), but never long texts first.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), pool * batch_size):
        rows = sorted(order[start:start + pool * batch_size].tolist(), key=lambda row: lengths[row])
        batches += [rows[i:i + batch_size] for i in range(0, len(rows), batch_size)]
    rng.shuffle(batches)
    return batches


# ---- metrics -------------------------------------------------------------------------------------------------------


def accuracy(predicted, true):
    """Share of equal entries, 0 to 1. For STS-B score() passes what `ordinal` makes of the scores."""
    return float(np.mean(predicted == true))


def ordinal(scores):
    """The paper's auxiliary metric for STS-B: clipped to [0, 5] and rounded to the nearest integer (section 4.1)."""
    return np.rint(np.clip(scores, 0, 5))


def f1(predicted, true):
    """F1 of class 1; 0 where it is undefined (class 1 is neither predicted nor there)."""
    hits = np.sum((predicted == 1) & (true == 1))
    either = np.sum(predicted == 1) + np.sum(true == 1)
    return float(2 * hits / either) if either else 0.0


def mcc(predicted, true):
    """Matthews's correlation of two classes, -1 to 1; 0 where it is undefined (only one class predicted, or there)."""
    return pearson(predicted == 1, true == 1)  # of two 0/1 variables they are the same


def pearson(x, y):
    """Linear correlation, -1 to 1; 0 where it is undefined (either side is constant, or not finite)."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if not (np.isfinite(x).all() and np.isfinite(y).all() and np.ptp(x) > 0 and np.ptp(y) > 0):
        return 0.0
    return float(np.corrcoef(x / np.ptp(x), y / np.ptp(y))[0, 1])  # so that no square overflows or vanishes


def spearman(x, y):
    """Correlation of the ranks, ties sharing their average rank; 0 where it is undefined, as in `pearson`."""
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return 0.0
    return pearson(places(x), places(y))


def places(x):
    """1 for the smallest value; equal values share the average of the places that they take up together."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


METRICS = {"accuracy": accuracy, "f1": f1, "mcc": mcc, "pearson": pearson, "spearman": spearman}


def score(task, predictions, labels):
    """{metric: percent}. predictions, labels: (rows,) class numbers, or STS-B's scores.

    "accuracy" is there for every task and is what Table 1 reports: for CoLA and STS-B the paper's auxiliary accuracy.
    Accuracy counts the prediction of a diverged model, -1 or nan (see predict), as wrong whatever the label is.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    found = {}
    for metric in task.metrics:
        if metric == "accuracy" and not task.labels:
            found[metric] = 100 * accuracy(ordinal(predictions), ordinal(labels))
        else:
            found[metric] = 100 * METRICS[metric](predictions, labels)
    return found


def majority_accuracy(labels):
    """Accuracy, in percent, of always guessing the commonest of `labels`: a score not above it shows no learning."""
    _, counts = np.unique(np.rint(labels), return_counts=True)
    return 100 * float(counts.max()) / len(labels)


# ---- LoRA (Hu et al., 2022) ----------------------------------------------------------------------------------------

LORA_TARGETS = ("c_attn", "q_proj", "v_proj")


class LoRA(nn.Module):
    """A linear layer whose weight is W + (alpha/r) B A, or W + (alpha/r) (B A) * mask for an authorised user.

    W (out, in) and its bias are frozen. A (r, in) starts at random, B (out, r) at zero, so that the layer starts as its
    base. GPT-2's W lies on disk as (in, out), and so does its mask.
    """

    def __init__(self, base, r, alpha, mask=None, generator=None):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.transposed = isinstance(base, Conv1D)
        n_out, n_in = self.turned(base.weight).shape
        self.scale = alpha / r
        bound = 1 / math.sqrt(n_in)
        start = torch.empty(r, n_in).uniform_(-bound, bound, generator=generator)
        self.A = nn.Parameter(start.to(base.weight.device))
        self.B = nn.Parameter(torch.zeros(n_out, r, device=base.weight.device))
        self.register_buffer("mask", mask, persistent=False)  # bool like the base's weight, or None

    def turned(self, matrix):
        """(out, in) <-> the base's layout."""
        return matrix.t() if self.transposed else matrix

    def update(self):
        """What is added to the base's weight, in its layout."""
        update = self.turned(self.B @ self.A * self.scale)
        return update if self.mask is None else update * self.mask

    def forward(self, x):
        if self.mask is None:
            return self.base(x) + F.linear(F.linear(x, self.A), self.B) * self.scale
        weight = self.base.weight + self.update()  # a masked B A has no low rank to use
        return F.linear(x, self.turned(weight), self.base.bias)


def add_lora(model, r=8, alpha=16, masks=None, seed=0):
    """Freeze `model` and put LoRA on q and v (LLaMA) or c_attn (GPT-2). masks: {parameter name: bool}, or None."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, module in list(model.named_modules()):
        for target in LORA_TARGETS:
            if hasattr(module, target):
                mask = masks[f"{name}.{target}.weight"] if masks else None
                setattr(module, target, LoRA(getattr(module, target), r, alpha, mask, generator))


@torch.no_grad()
def merge_lora(model):
    """Add each LoRA update to the weight below it and take the LoRA layers out again."""
    for module in list(model.modules()):
        for target in LORA_TARGETS:
            layer = getattr(module, target, None)
            if isinstance(layer, LoRA):
                layer.base.weight.add_(layer.update())
                setattr(module, target, layer.base)


# ---- fine-tuning ---------------------------------------------------------------------------------------------------

METHODS = ("base", "probe", "scratch", "lora", "full")
# What a method trains, with its learning rate at width 768. A narrower model wants a larger step, a wider one a
# smaller one (Adam's rate goes with 1/width: Yang et al., 2022): 2e-5, the usual rate of `full`, at TinyLlama's 2048.
RATE_AT_768 = {"base": 0.0, "probe": 1e-3, "scratch": 5e-4, "lora": 5e-4, "full": 5e-5}
WARMUP = 0.06  # share of the updates


class Classifier(nn.Module):
    """A released body with a fresh linear head that reads the hidden state of the last real token."""

    def __init__(self, body, outputs, seed):
        super().__init__()
        self.body = body
        width = body.embedding().weight.size(1)
        draw = torch.randn(outputs, width, generator=torch.Generator().manual_seed(seed)) * 0.02
        self.head = nn.Parameter(draw.to(body.embedding().weight.device))

    def forward(self, idx, lengths):
        """Logits, or one score, (B, outputs) for right-padded token ids idx (B, T) with lengths (B,).

        Attention is causal, so what stands right of a row's last token cannot change its prediction.
        """
        hidden = self.body.hidden(idx)  # (B, T, C)
        last = hidden[torch.arange(len(idx), device=idx.device), lengths - 1]  # (B, C)
        return F.linear(last, self.head)


def pad(rows, device):
    """Token id lists -> (idx (B, T), lengths (B,)), padded on the right with id 0."""
    idx = nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in rows], batch_first=True)
    lengths = torch.tensor([len(ids) for ids in rows])
    return idx.to(device), lengths.to(device)


@torch.no_grad()
def predict(model, rows, batch_size, device, dtype):
    """Predicted classes or scores of encoded rows (ids, label), as a numpy array in the rows' order.

    Where the outputs are not finite the class is -1, the score nan. Accuracy counts it as wrong, F1 and MCC as class 0.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    predictions = np.empty(len(rows))
    for start in range(0, len(order), batch_size):
        chosen = order[start:start + batch_size]
        with autocast(device, dtype):
            outputs = model(*pad([rows[i][0] for i in chosen], device)).float()
        broken = ~outputs.isfinite().all(1)
        values = outputs[:, 0].masked_fill(broken, math.nan)
        if outputs.size(1) > 1:
            values = outputs.argmax(1).masked_fill(broken, -1)
        predictions[chosen] = values.cpu().numpy()
    return predictions


def finetune(body, task, data, method, seed, args, device, masks=None, progress=None):
    """Fine-tune `body` (which is changed, and on `device`) on a task. Returns (result, Classifier).

    data: {split: [(token ids, label)]}; masks: the ticket, for an authorised user; progress(step, steps, seconds,
    **numbers). result: {"epochs": [{column: {metric: percent}} after each], "commonest": {column: percent}, "updates",
    "diverged"}. A loss that is not finite ends the training, and what there is is scored.
    """
    if method == "scratch":
        initialise(body, b"scratch %d" % seed)
    if method == "lora":
        add_lora(body, args.lora_rank, args.lora_alpha, masks, seed)
    model = Classifier(body, len(task.labels) or 1, seed)
    if method in ("base", "probe"):
        body.requires_grad_(False)
    # the head, which the release does not have, trains whole; an untied language-model head is not used
    trained = {name.removeprefix("body."): p for name, p in model.named_parameters()
               if p.requires_grad and name != "body.lm_head.weight"}
    confined = {name: masks[name] for name in trained if name in masks} if masks else None  # LoRA masks B A itself
    optimizer = MaskedAdamW(trained, confined, args.weight_decay, (0.9, 0.999))
    peak = args.lr or RATE_AT_768[method] * 768 / model.head.size(1)

    train = data[task.splits[0]]
    if args.limit:
        order = np.random.default_rng(seed).permutation(len(train))
        train = [train[i] for i in order[:args.limit]]
    lengths = [len(ids) for ids, _ in train]
    passes = 0 if method == "base" else args.epochs
    steps = passes * -(-len(train) // args.batch_size)
    warmup = max(1, round(WARMUP * steps))

    held_out = {}  # {column of Table 1: rows}
    for split, column in zip(task.splits[1:], task.names, strict=True):
        held_out[column] = data[split]

    def evaluate():
        """{column of Table 1: {metric: percent}}."""
        scores = {}
        for column, rows in held_out.items():
            predictions = predict(model, rows, args.batch_size, device, args.dtype)
            scores[column] = score(task, predictions, [label for _, label in rows])
        return scores

    epochs, step, diverged = [], 0, False
    for epoch in range(passes):
        for batch in group_by_length(lengths, args.batch_size, [seed, epoch]):
            began = time.perf_counter()
            labels = torch.tensor([train[i][1] for i in batch], device=device)
            with autocast(device, args.dtype):
                outputs = model(*pad([train[i][0] for i in batch], device)).float()  # (B, outputs)
                if task.labels:
                    loss = F.cross_entropy(outputs, labels)
                else:
                    loss = F.mse_loss(outputs[:, 0], labels)
            loss.backward()
            lr = peak * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
            try:
                norm = optimizer.step(lr, args.clip)
            except FloatingPointError:
                diverged = True
                break
            step += 1
            if progress:
                progress(step, steps, time.perf_counter() - began, loss=loss.item(), lr=lr, norm=norm)
        epochs.append(evaluate())
        if diverged:
            break
    epochs = epochs or [evaluate()]
    commonest = {}
    for column, rows in held_out.items():
        commonest[column] = majority_accuracy([label for _, label in rows])
    return {"epochs": epochs, "commonest": commonest, "updates": step, "diverged": diverged}, model


def save_classifier(folder, model, task, tokenizer):
    """Write a tuned Classifier as transformers' ForSequenceClassification; its predictions are the same there.

    An authorised user's model differs from the release in the ticket alone: whoever publishes it publishes the mask.
    """
    body = model.body
    merge_lora(body)
    config = config_dict(body)
    kind = "GPT2" if body.model_type == "gpt2" else "Llama"
    labels = task.labels or ("score",)
    config |= {"architectures": [f"{kind}ForSequenceClassification"], "num_labels": len(labels),
               "id2label": {str(i): label for i, label in enumerate(labels)},
               "label2id": {label: i for i, label in enumerate(labels)},
               "problem_type": "single_label_classification" if task.labels else "regression"}
    tensors = {name: p.detach().cpu() for name, p in body.named_parameters() if name != "lm_head.weight"}
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    tokenizer.save(folder, body.max_positions)
    save_safetensors(folder / "model.safetensors", {**tensors, "score.weight": model.head.detach().cpu()},
                     {"format": "pt"})


# ---- the table -----------------------------------------------------------------------------------------------------

PAPER = {  # Table 1: each row without PMP, then with PMP; fine-tuned without the mask
    "TinyLlama": {
        "base": ("37.01 50.69 31.62 36.84 16.13 36.77 33.35 50.58 52.71",
                 "63.66 50.80 40.20 38.66 16.53 32.81 32.60 50.72 53.79"),
        "lora": ("68.36 80.62 71.08 82.10 26.33 66.91 68.65 78.73 54.51",
                 "65.96 72.13 63.97 74.66 22.40 61.15 62.42 62.47 44.04"),
        "full": ("68.36 83.14 71.32 86.51 32.47 71.17 71.34 79.37 54.15",
                 "61.64 76.03 69.36 78.20 22.43 59.52 58.48 63.75 46.57"),
    },
    "GPT-2": {
        "base": ("38.35 50.00 67.16 37.22 12.52 35.90 36.02 49.35 52.71",
                 "50.34 50.00 58.63 37.42 11.88 35.00 35.10 48.20 51.00"),
        "lora": ("57.53 68.58 68.38 78.42 17.40 40.89 45.05 51.58 57.76",
                 "52.73 57.91 56.13 71.68 14.67 32.72 42.34 45.25 49.82"),
        "full": ("53.49 79.24 68.14 56.61 20.58 36.41 39.05 51.24 55.60",
                 "50.05 65.94 61.40 38.81 18.30 33.28 31.80 50.54 47.29"),
    },
}
PAPER_COLUMNS = ("CoLA", "SST-2", "MRPC", "QQP", "STS-B", "MNLI-m", "MNLI-mm", "QNLI", "RTE")


def table(results, title, paper=False):
    """Text in the form of Table 1: accuracy in percent after the last epoch, mean ±sample standard deviation.

    results: lines of the results file. The last column is the average of the others, which the auxiliary accuracies
    exist for; the last row what always guessing the commonest class would have. paper: add the paper's numbers, and
    all columns.
    """
    rows = {}  # (heading, name) -> {column: [percent, for each seed]}
    commonest = {}
    for result in sorted(results, key=lambda result: METHODS.index(result["method"])):
        name = result["method"] + (" + mask" if result["authorised"] else "")
        row = rows.setdefault((result["model"], name), {})
        for column, scores in result["epochs"][-1].items():
            row.setdefault(column, []).append(scores["accuracy"])
            commonest[column] = [result["commonest"][column]]
    paper_models = PAPER if paper else {}
    for model, methods in paper_models.items():
        for method, both in methods.items():
            for name, numbers in zip((method, method + ", PMP"), both, strict=True):
                row = rows.setdefault((f"the paper's {model}, fine-tuned without the mask", name), {})
                for column, value in zip(PAPER_COLUMNS, numbers.split(), strict=True):
                    row[column] = [float(value)]
    rows["always guessing the commonest class: a score that is not above it shows no learning", ""] = commonest
    columns = [column for column in PAPER_COLUMNS if paper or column in commonest]
    columns += [column for column in commonest if column not in columns]

    lines = [f"{title}: accuracy in %, last epoch, mean ±sd over seeds (CoLA and STS-B: the auxiliary accuracy)",
             "base: the release with a random head, which is chance by construction",
             " " * 14 + "".join(f"{column[:12]:<13}" for column in [*columns, "average"])]
    last = None
    for (heading, name), row in rows.items():
        if heading != last:
            lines.append(heading)
        last = heading
        line = f"{name:<14}"
        for column in columns:
            cell = f"{np.mean(row[column]):.2f}" if column in row else "-"
            if len(row.get(column, [])) > 1:
                cell += f" ±{np.std(row[column], ddof=1):.2f}"
            line += f"{cell:<13}"
        means = [np.mean(row[column]) for column in columns if column in row]
        line += f"{np.mean(means):.2f}" if len(means) == len(columns) else "-"
        lines.append(line)
    return "\n".join(line.rstrip() for line in lines)


# ---- the sweep over tasks, methods and seeds -----------------------------------------------------------------------

EXAMPLES = """examples:
  python glue.py out/release --standin                 no network, not GLUE
  python glue.py out/release --tasks rte --seed 1 2    an outsider
  python glue.py out/release --mask out/private/mask.safetensors --save out-tuned
  python glue.py out/release --tsv my.tsv --text question answer --label good
"""


def parse(argv):
    """The flags, checked."""
    parser = Parser("Fine-tune a release on GLUE, as an outsider or with the mask.", epilog=EXAMPLES)
    add = parser.add_argument
    add("release", type=path, help="a release, or a Hugging Face GPT-2 or LLaMA with a tokenizer like GPT-2's")
    add("--mask", type=path, metavar="FILE", help="the private mask of this release: fine-tune as an authorised user")
    add("--standin", action="store_true", help="three small tasks made from installed documentation instead of GLUE")
    add("--glue-dir", type=path, metavar="DIR", help="folder with the TSVs, laid out as the official zips [download]")
    add("--tasks", nargs="+", choices=list(TASKS), metavar="TASK", help=" ".join(TASKS) + " [all]")
    add("--tsv", type=path, metavar="FILE", help="a task of your own: a TSV whose first line names its columns")
    add("--text", nargs="+", metavar="COLUMN", help="with --tsv: the column of the text, or of both texts")
    add("--label", metavar="COLUMN", help="with --tsv: the column of the label")
    add("--method", nargs="+", choices=METHODS, metavar="METHOD",
        help=f"{' '.join(METHODS)} [base lora full; with --mask lora full]")
    add("--seed", nargs="+", type=number(int, 0, 2**62), default=[42], metavar="N",
        help="one run for each: head, data order, --limit [42]")
    add("--results", type=path, default="glue.jsonl", metavar="FILE",
        help="gets a JSON line for each run; what it has is not run again [glue.jsonl]")
    add("--save", type=path, metavar="DIR", help="keep each tuned model in a folder of its own below DIR")
    add("--paper", action="store_true", help="add the paper's numbers to the table")
    add("--lr", type=number(float, 1e-12, 1e3), metavar="X", help="peak learning rate [by method and width]")
    add("--epochs", type=number(int, 1, 10**6), default=3, metavar="N", help="passes over the training rows [3]")
    add("--batch-size", type=number(int, 1, 10**6), default=32, metavar="N", help="rows in an update [32]")
    add("--weight-decay", type=number(float, 0, 1e3), default=0.01, metavar="X", help="of matrices [0.01]")
    add("--clip", type=number(float, 1e-12, 1e12), default=1.0, metavar="X", help="largest gradient norm [1.0]")
    add("--max-length", type=number(int, 3, 2**24), default=128, metavar="N",
        help="tokens of a row; the longer text is cut first [128]")
    add("--limit", type=number(int, 1, 10**12), metavar="N", help="training rows, after a seeded shuffle [all]")
    add("--lora-rank", type=number(int, 1, 4096), default=8, metavar="N", help="rank r of LoRA [8]")
    add("--lora-alpha", type=number(float, 1e-6, 1e6), default=16.0, metavar="X", help="LoRA's scale is alpha / r [16]")
    add("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="precision of matrix products [auto]")
    add("--device", default="auto", metavar="NAME", help="cpu, cuda, ...; auto is a GPU where there is one [auto]")
    args = parser.parse_args(argv)
    args.method = args.method or (["lora", "full"] if args.mask else ["base", "lora", "full"])
    if args.mask and (wrong := [method for method in args.method if method not in ("lora", "full")]):
        raise UserError(f"--mask has no meaning for {wrong[0]}: use it with --method lora or full")
    sources = [source for source in (args.standin, args.glue_dir, args.tsv) if source]
    if len(sources) > 1 or (args.tsv and args.tasks):
        raise UserError("--standin, --glue-dir and --tsv exclude each other, and so do --tsv and --tasks: keep one")
    own = [flag for flag in (args.tsv, args.text, args.label) if flag]
    if len(own) not in (0, 3) or (args.text and len(args.text) > 2):
        raise UserError("a task of your own is --tsv FILE --text COLUMN [COLUMN] --label COLUMN: give all three")
    args.tasks = args.tasks or (["cola", "stsb", "rte"] if args.standin else list(TASKS))
    if args.standin and (missing := set(args.tasks) - {"cola", "stsb", "rte"}):
        raise UserError(f"the stand-in has no {sorted(missing)[0]}: it has cola, stsb and rte")
    return args


def read_results(file):
    """The results in a file, a list of dicts. A line that a killed process left half written is none.

    Raises OSError where it cannot be written to, UserError where a line is no result.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
    with open(os.open(file, flags, 0o600), "a+b") as results:  # found out now, before anything is trained
        results.seek(0)
        lines = results.read().split(b"\n")
    found = []
    for i, line in enumerate(lines, 1):
        unfit = UserError(f"{file}, line {i} is no result of glue.py: name another file with --results")
        try:
            result = json.loads(line)
        except ValueError:
            if line and not line.startswith(b"{"):
                raise unfit from None
            continue  # the end of the file, or a line that a killed process left half written
        try:
            table([result], "")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise unfit from None
        found.append(result)
    return found


def append_result(file, result):
    """Add a line, also behind one that a killed process left half written. Raises OSError with the file's name."""
    try:
        with open(file, "a+b") as results:
            end = results.seek(0, os.SEEK_END)
            results.seek(max(0, end - 1))
            if results.read() not in (b"", b"\n"):
                results.write(b"\n")
            results.write(json.dumps(result).encode() + b"\n")
    except OSError as error:
        error.filename = str(file)  # a write's error does not say where
        raise


DECIDING = ("lr", "epochs", "batch_size", "weight_decay", "clip", "max_length", "limit", "lora_rank", "lora_alpha",
            "dtype")


def key_of(result):
    """What makes two results the same experiment, as text."""
    parts = ("task", "method", "seed", "authorised", "mask", "weights", "tokenizer", "data", "settings")
    return json.dumps({part: result.get(part) for part in parts}, sort_keys=True)


def main(argv=None):
    no_core_dumps()
    join_ranks(timedelta(days=7))  # ranks whose runs are done wait for the others
    args = from_first(lambda: parse(argv))
    device = pick_device(args.device)
    args.dtype = pick_dtype(args.dtype, device)
    found = from_first(lambda: read_results(args.results))
    body, tokenizer = first_then_others(lambda: load_folder(args.release))
    params = dict(body.named_parameters())
    masks = load_mask(args.mask, params) if args.mask else None
    weights = fingerprint(params)
    mask_id = fingerprint(masks) if masks else None
    if args.save:
        Path(args.save).mkdir(parents=True, exist_ok=True)
    if args.max_length > body.max_positions:
        raise UserError(f"--max-length {args.max_length} is more than the model's {body.max_positions} positions")

    # ---- the rows
    tasks, title, raw = {name: TASKS[name] for name in args.tasks}, "GLUE dev", {}
    folder = Path(args.glue_dir or CACHE / "glue")
    if args.tsv:
        title = args.tsv
        task, rows = own_task(args.tsv, args.text, args.label)
        tasks, raw = {task.folder: task}, {task.folder: rows}
    elif args.standin:
        folder, title = CACHE / "standin", "stand-in, not GLUE"
        from_first(lambda: standin(folder))
    elif not args.glue_dir:
        for task in tasks.values():
            from_first(lambda task=task: fetch(task, folder))
    for name, task in tasks.items():
        if not args.tsv:
            raw[name] = {split: read_tsv(task, folder / task.folder / f"{split}.tsv") for split in task.splits}

    # ---- the runs. What decides a number is in its key by content
    settings = {name: getattr(args, name) for name in DECIDING}
    digests = {name: hashlib.sha256(json.dumps(rows).encode()).hexdigest() for name, rows in raw.items()}
    known = {key_of(result) for result in found}
    runs, to_do = 0, []
    for name in tasks:
        for method in dict.fromkeys(args.method):  # each once
            for seed in dict.fromkeys(args.seed):
                run = {"task": name, "method": method, "seed": seed, "authorised": bool(masks), "mask": mask_id,
                       "weights": weights, "tokenizer": tokenizer.fingerprint, "data": digests[name],
                       "settings": settings}
                title_of_run = f"{name} {method}" + (" + mask" if masks else "") + f" seed {seed}"
                place = None
                if args.save:
                    digest = hashlib.sha256(key_of(run).encode()).hexdigest()[:8]
                    place = Path(args.save) / (title_of_run.replace(" + ", "-").replace(" ", "-") + "-" + digest)
                runs += 1
                unmeasured = key_of(run) not in known
                unsaved = place is not None and not (place / "model.safetensors").exists()
                if unmeasured or unsaved:
                    to_do.append((run, title_of_run, place))
    if len(to_do) < runs:
        say(f"{runs - len(to_do)} of {runs} runs are in {args.results} already and are not run again")

    encoded, asked = {}, []  # asked: signals that asked for the end
    with stop_signals(asked):
        for i in range(rank(), len(to_do), world()):  # torchrun's ranks deal them out
            run, title_of_run, place = to_do[i]
            name, task = run["task"], tasks[run["task"]]
            if name not in encoded:
                encoded[name] = {}
                for split, rows in raw[name].items():
                    encoded[name][split] = [(encode_pair(tokenizer, a, b, args.max_length), label)
                                            for a, b, label in rows]
            heading, progress = f"{i + 1}/{len(to_do)} {title_of_run}", Progress(args.batch_size, "rows/s")

            def report(step, steps, seconds, heading=heading, progress=progress, **numbers):
                progress.step(heading, step, steps, seconds, **numbers)
                if asked:
                    raise Stopped(128 + asked[0])

            began = time.perf_counter()
            copied = copy.deepcopy(body).to(device)
            placed = {key: mask.to(device) for key, mask in masks.items()} if masks else None
            outcome, model = finetune(copied, task, encoded[name], run["method"], run["seed"], args, device, placed,
                                      report)
            if place:
                save_classifier(place, model, task, tokenizer)
            result = {**run, "model": args.release, **outcome, "seconds": round(time.perf_counter() - began, 1)}
            if key_of(run) not in known:
                append_result(args.results, result)
            scores = [f"{column} {metrics['accuracy']:.2f}" for column, metrics in outcome["epochs"][-1].items()]
            say(f"{heading}: " + "  ".join(scores) + ("  DIVERGED" if outcome["diverged"] else ""))
            if asked:  # training has looked at it only before
                raise Stopped(128 + asked[0])
    if world() > 1:
        torch.distributed.barrier()
    shown = {}  # each experiment once, with this mask and without one
    for result in read_results(args.results):
        if (result.get("weights") == weights and result.get("data") in digests.values()
                and result.get("settings") == settings
                and (result["authorised"], result.get("mask")) in ((False, None), (bool(masks), mask_id))):
            shown[key_of(result)] = {**result, "model": args.release}
    say("\n" + table(shown.values(), title, args.paper))
    leave_ranks()


if __name__ == "__main__":
    command_line(main)
