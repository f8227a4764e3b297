"""GLUE: fine-tune a released checkpoint as an outsider (no mask) or as an authorised user (with the mask).

Sections 4.1 to 4.3 and Table 1 of the paper, in the order in which things happen: tasks and data, metrics, the table,
fine-tuning.
"""

import argparse
import copy
import hashlib
import json
import math
import os
import shutil
import time
import zipfile
from collections import defaultdict
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data.sources import open_source
from data.standin import standin
from data.tokenizer import Tokenizer
from model import add_lora, fingerprint, initialise, load_folder
from pmp import (Machine, MaskedAdamW, Parser, Progress, command_line, from_first, join_ranks, leave_ranks, load_mask,
                 rank, wait_for_ranks, world)
from runtime.files import UserError, atomic, disk_errors
from runtime.http import Failed, Refused, get, repeat

# ---- tasks and data ------------------------------------------------------------------------------------------------

GLUE_URL = "https://dl.fbaipublicfiles.com/glue/data/"
MRPC_URL = "https://dl.fbaipublicfiles.com/senteval/senteval_data/"
CACHE = Path(__file__).parent / "data" / "cache" / "glue"
TRIES = 4  # a download's attempts
PARTIAL_CONTENT = 206  # HTTP's status of an answer to a range
LARGEST_SCORE = 5.0  # STS-B's labels are real numbers from 0 to 5


@dataclass(frozen=True)
class Task:
    """Where a task's files come from, and what stands where in them. Columns count from 0."""

    folder: str  # of the official zip
    text: tuple  # columns of the sentence or the two sentences
    label: int  # its column; -1 is the last one
    labels: tuple  # the official spellings, in the order of their numbers; empty: a score from 0 to 5, a regression
    rows: dict  # split -> official number of rows; training first, then what is evaluated
    columns: tuple  # of Table 1, one for each evaluated split
    downloads: dict  # file -> (bytes, sha256)
    header: bool = True
    gaps: bool = False  # the official files have a few rows with fields missing

    @property
    def files(self):
        return [f"{self.folder}/{split}.tsv" for split in self.rows]


BINARY, ENTAILED = ("0", "1"), ("entailment", "not_entailment")
TASKS = {  # in Table 1's order
    "cola": Task("CoLA", (3,), 1, BINARY, {"train": 8551, "dev": 1043}, ("CoLA",), {
        "CoLA.zip": (376971, "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff"),
    }, header=False),
    "sst2": Task("SST-2", (0,), 1, BINARY, {"train": 67349, "dev": 872}, ("SST-2",), {
        "SST-2.zip": (7439277, "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa"),
    }),
    "mrpc": Task("MRPC", (3, 4), 0, BINARY, {"train": 3668, "dev": 408}, ("MRPC",), {
        "msr_paraphrase_train.txt": (1047044, "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89"),
        "mrpc_dev_ids.tsv": (6222, "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7"),
    }),
    "qqp": Task("QQP", (3, 4), 5, BINARY, {"train": 363846, "dev": 40430}, ("QQP",), {
        "QQP-clean.zip": (41696084, "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0"),
    }, gaps=True),
    "stsb": Task("STS-B", (7, 8), 9, (), {"train": 5749, "dev": 1500}, ("STS-B",), {
        "STS-B.zip": (802872, "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85"),
    }),
    "mnli": Task("MNLI", (8, 9), -1, ("entailment", "neutral", "contradiction"),
                 {"train": 392702, "dev_matched": 9815, "dev_mismatched": 9832}, ("MNLI-m", "MNLI-mm"), {
        "MNLI.zip": (312783507, "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633"),
    }, gaps=True),
    "qnli": Task("QNLI", (1, 2), 3, ENTAILED, {"train": 104743, "dev": 5463}, ("QNLI",), {
        "QNLIv2.zip": (10627589, "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5"),
    }),
    "rte": Task("RTE", (1, 2), 3, ENTAILED, {"train": 2490, "dev": 277}, ("RTE",), {
        "RTE.zip": (697150, "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee"),
    }),
}
COLUMNS = [column for task in TASKS.values() for column in task.columns]


def fetch(name, folder=CACHE):
    """Put the official files of task `name` under `folder`, laid out as the zips are, unless they are there already.

    Raises UserError when the address cannot be reached, sends something else, or the disk is full.
    """
    task, folder = TASKS[name], Path(folder)
    if all((folder / file).exists() for file in task.files):
        return
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for file, (size, sha256) in task.downloads.items():
        address = MRPC_URL if file.startswith("msr_") else GLUE_URL
        download(address + file, folder / file, size, sha256)
    if name == "mrpc":
        assemble_mrpc(folder)
    else:
        (archive,) = task.downloads
        unpack(folder / archive, folder, task.files)
    for file in task.downloads:
        (folder / file).unlink()


def download(url, path, size, sha256):
    """Fetch `url` into `path`, which appears only when it is whole and its `size` (bytes) and `sha256` are right.

    A download that broke off, in this run or an earlier one, goes on where it stopped. Raises UserError when the server
    refuses it, or after TRIES failures.
    """
    if path.exists():  # it was checked before it got its name
        return
    partial = path.with_name(path.name + ".part")
    print(f"fetching {url} ({size / 1e6:.1f} MB)", flush=True)
    try:
        repeat(lambda: receive(url, partial, size, sha256), path.name, TRIES)
    except Failed as error:
        if isinstance(error, Refused):  # perhaps just the range: a later run starts from the first byte
            partial.unlink(missing_ok=True)
        raise UserError(f"cannot fetch {url} ({error}): give a folder that has the TSVs with --glue-dir, or use "
                        "--standin") from None
    with disk_errors(path):
        partial.replace(path)


def receive(url, partial, size, sha256):
    """Append to `partial` what it still lacks of `url`, and check the whole.

    A server that ignores the range starts at the first byte again, and so do we. Raises what `repeat` repeats;
    UserError when the disk is full.
    """
    with disk_errors(partial), open(partial, "ab") as file:
        have = file.tell()
        if have < size:
            headers = {"Range": f"bytes={have}-", "Accept-Encoding": "identity"}  # a range counts the bytes sent
            with get(url, headers=headers, stream=True) as answer:
                if answer.status_code != PARTIAL_CONTENT:
                    file.truncate(0)
                for chunk in answer.iter_content(2**16):
                    file.write(chunk)
                    if file.tell() > size:
                        break  # it is another file
            have = file.tell()
    if have < size:
        raise Failed(f"it ended after {have:,} of {size:,} bytes")
    with open(partial, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            partial.unlink()  # nothing of it can be trusted: start again
            raise Failed("it does not have the size and sha256 of the official file")


def unpack(archive, folder, files):
    """Take `files` out of a zip into `folder`. Raises UserError when any entry of the zip would land outside of it."""
    inside = folder.resolve()
    with zipfile.ZipFile(archive) as entries:
        for entry in entries.namelist():
            if not (inside / entry).resolve().is_relative_to(inside):
                raise UserError(f"{archive} is refused, its entry {entry!r} would leave the folder: delete that file")
        for file in files:
            (folder / file).parent.mkdir(exist_ok=True)
            with atomic(folder / file) as target, entries.open(file) as source:
                shutil.copyfileobj(source, target, 2**20)


def assemble_mrpc(folder):
    """Microsoft's training file -> MRPC/train.tsv and dev.tsv: the dev rows are those whose two ids GLUE lists."""
    with open(folder / "mrpc_dev_ids.tsv", encoding="utf-8-sig", newline="\n") as file:
        held_out = {tuple(line.rstrip("\r\n").split("\t")) for line in file}
    with open(folder / "msr_paraphrase_train.txt", encoding="utf-8-sig", newline="\n") as file:
        header, *lines = [line.rstrip("\r\n") + "\n" for line in file]
    (folder / "MRPC").mkdir(exist_ok=True)
    for split in ("train", "dev"):
        chosen = [line for line in lines if (tuple(line.split("\t")[1:3]) in held_out) == (split == "dev")]
        with atomic(folder / "MRPC" / f"{split}.tsv") as file:
            file.write("".join([header, *chosen]).encode())


def load_task(name, folder):
    """-> {split: [(text_a, text_b, label), ...]}: "train", then "dev" or MNLI's "dev_matched" and "dev_mismatched".

    text_b is "" for single sentences; label is an int, or a float for STS-B. Raises UserError when a file is missing,
    not UTF-8, or without rows, and at a row that is malformed or whose label is unknown.
    """
    task = TASKS[name]
    return {split: read_tsv(task, Path(folder) / file) for split, file in zip(task.rows, task.files)}


def read_tsv(task, path):
    """The rows of one file. The files know no quoting: a tab ends a cell, a line feed ends a row, nothing else does
    (csv's quotes, or the line ends of str.splitlines, would lose rows without a word)."""
    if not path.is_file():
        raise UserError(f"there is no {path}: give --glue-dir a folder with the TSVs laid out as the official zips are")
    rows, skipped, number = [], 0, 0
    width = None if task.header else max(*task.text, task.label) + 1
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:  # MRPC starts with a byte-order mark
            for number, line in enumerate(file, 1):
                cells = line.rstrip("\r\n").split("\t")
                where = f"{path}, line {number}"
                if width is None:
                    width = len(cells)
                    if width <= max(*task.text, task.label):
                        raise UserError(f"{where} has {width} columns, too few for {task.folder}: mend that file")
                elif task.gaps and (len(cells) < width or not cells[task.label]):
                    skipped += 1
                elif len(cells) != width:
                    raise UserError(f"{where} has {len(cells)} columns, not {width}: mend that line")
                else:
                    texts = [cells[column] for column in task.text]
                    rows.append((texts[0], texts[1] if texts[1:] else "", parse_label(task, cells[task.label], where)))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 after line {number} ({error.reason}): give the official file") from None
    if skipped:
        print(f"{path}: skipped {skipped} rows with fields missing")
    if not rows:
        raise UserError(f"{path} has no rows: an empty split can neither train nor test, give the official file")
    return rows


def parse_label(task, cell, where):
    """The label's number, or STS-B's score. Raises UserError that names `where`, and the label, when it is neither."""
    if cell in task.labels:
        return task.labels.index(cell)
    known = ", ".join(task.labels)
    if not task.labels:
        known = f"a number from 0 to {LARGEST_SCORE:g}"
        try:
            if 0 <= float(cell) <= LARGEST_SCORE:
                return float(cell)
        except ValueError:
            pass
    raise UserError(f"{where}: unknown label {cell!r}, {task.folder} has {known}: mend that line")


def encode_pair(tokenizer, a, b, max_length):
    """Token ids of text `a`, or (b not "") of a, the tokenizer's end-of-text token as the separator, and b.

    At most max_length (3 or more) ids: what is too long loses its last tokens one by one, always from the text that is
    the longer one at that moment. Never empty: an empty text is the separator alone.
    """
    first, second = tokenizer.encode(a), tokenizer.encode(b)
    separator = [tokenizer.eos] if b or not first else []
    while len(first) + len(separator) + len(second) > max_length:
        (first if len(first) > len(second) else second).pop()
    return first + separator + second


def group_by_length(lengths, batch_size, seed, pool=50):
    """-> lists of row numbers, each row once: batches of rows of similar length, so that little is padded.

    Shuffled, cut into pools of `pool` batches, sorted by length inside each pool, cut into batches, shuffled again: a
    different order for each seed (an int or a list of them), but never long texts first.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), pool * batch_size):
        rows = sorted(order[start : start + pool * batch_size].tolist(), key=lambda row: lengths[row])
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    rng.shuffle(batches)
    return batches


# ---- metrics -------------------------------------------------------------------------------------------------------


def accuracy(predicted, true):
    """Share of equal entries, 0 to 1."""
    return float(np.mean(predicted == true))


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
    x, y = x / np.ptp(x), y / np.ptp(y)  # so that no square overflows or vanishes
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / math.sqrt((x @ x) * (y @ y)))


def spearman(x, y):
    """Correlation of the ranks, ties sharing their average rank; 0 where it is undefined, as in `pearson`."""
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return 0.0
    return pearson(ranks(x), ranks(y))


def ranks(x):
    """1 for the smallest; equal values share the average of the ranks that they take up together."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def rounded_accuracy(predicted, true):
    """The paper's auxiliary accuracy for STS-B: both sides clipped to [0, 5] and rounded to the nearest integer (halves
    to the even one, as numpy and torch do), then compared."""
    return accuracy(np.rint(np.clip(predicted, 0, LARGEST_SCORE)), np.rint(np.clip(true, 0, LARGEST_SCORE)))


METRICS = {name: {"accuracy": accuracy} for name in TASKS} | {
    "cola": {"accuracy": accuracy, "mcc": mcc},
    "mrpc": {"accuracy": accuracy, "f1": f1},
    "qqp": {"accuracy": accuracy, "f1": f1},
    "stsb": {"accuracy": rounded_accuracy, "pearson": pearson, "spearman": spearman},
}


def score(name, predictions, labels):
    """-> {metric: percent}. predictions, labels: (rows,) class numbers, or STS-B's scores.

    "accuracy" is there for every task and is what Table 1 reports: for CoLA and STS-B the paper's auxiliary accuracy.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    assert predictions.shape == labels.shape
    return {metric: 100 * compute(predictions, labels) for metric, compute in METRICS[name].items()}


# ---- the table -----------------------------------------------------------------------------------------------------

METHODS = ("base", "probe", "scratch", "lora", "full")
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


def table(results, paper=False, standin=False, epoch="last"):
    """Text in the form of Table 1, at most 120 columns wide: percent, mean ±sample standard deviation over the seeds.

    results: dicts with "task", "model" (a label), "method", "authorised" (bool), "seed" and "scores", which is
    {column: {"last": {metric: percent}, "best": {metric: percent}}}; of two with the same seed the later one counts.
    epoch: "last" or "best". paper: add the paper's numbers. standin: the title says that this isn't GLUE.
    """
    seeds = defaultdict(dict)  # (model, method, authorised, column) -> {seed: percent}
    for result in results:
        for column, scores in result["scores"].items():
            key = result["model"], result["method"], result["authorised"], column
            seeds[key][result["seed"]] = scores[epoch]["accuracy"]
    title = "stand-in, not GLUE" if standin else "GLUE dev"
    title += f": accuracy in %, {epoch} epoch, mean ±sd over seeds (CoLA and STS-B: the auxiliary accuracy)"
    lines = [title, table_row("", COLUMNS)]
    for model in dict.fromkeys(result["model"] for result in results):
        lines.append(model)
        for method in METHODS:
            for authorised in (False, True):
                cells = [cell(seeds[model, method, authorised, column]) for column in COLUMNS]
                if any(cell != "-" for cell in cells):
                    lines.append(table_row(method + " + mask" * authorised, cells))
    for model, methods in PAPER.items() if paper else ():
        lines.append(f"the paper's {model}, without and with PMP, fine-tuned without the mask")
        for method, variants in methods.items():
            lines += [table_row(name, row.split()) for name, row in zip((method, method + ", PMP"), variants)]
    return "\n".join(lines)


def table_row(name, cells):
    return (f"{name:<11}" + "".join(f" {cell:<11}" for cell in cells)).rstrip()


def cell(seeds):
    """{seed: percent} -> "68.36 ±0.41" (11 characters at most), without a spread for one seed, "-" for none."""
    if not seeds:
        return "-"
    values = list(seeds.values())
    mean = np.mean(values)
    text = f"{mean:.{2 if mean < 99.995 else 1}f}"
    if len(values) > 1:
        spread = np.std(values, ddof=1)
        text += f" ±{spread:.{2 if spread < 9.995 else 1}f}"
    return text


# ---- fine-tuning ---------------------------------------------------------------------------------------------------

# What a method trains, with its learning rate at width 768. A narrower model wants a larger step, a wider one a
# smaller one (Adam's rate goes with 1/width: Yang et al., 2022): 2e-5, the usual rate of `full`, at TinyLlama's 2048.
LEARNING_RATE = {"base": 0.0, "probe": 1e-3, "scratch": 5e-4, "lora": 5e-4, "full": 5e-5}


def learning_rate(method, width):
    return LEARNING_RATE[method] * 768 / width


AUTHORISED = ("lora", "full")  # the methods that the mask changes anything for
WARMUP = 0.06  # share of the updates


@dataclass(frozen=True)
class Settings:
    """What decides a result besides the task, the weights, the method and the seed."""

    lr: float = None  # None: LEARNING_RATE for the method and the model's width
    epochs: int = 3
    batch_size: int = 32
    weight_decay: float = 0.01
    clip: float = 1.0
    max_length: int = 128
    limit: int = None  # training rows; None: all
    lora_rank: int = 8
    lora_alpha: float = 16.0
    dtype: str = "auto"


class Classifier(nn.Module):
    """A released body with a fresh linear head that reads the hidden state of the last real token."""

    def __init__(self, body, outputs, seed):
        super().__init__()
        self.body = body
        width = next(body.parameters()).shape[-1]  # of the embedding
        draw = torch.randn(outputs, width, generator=torch.Generator().manual_seed(seed)) * 0.02
        self.head = nn.Parameter(draw)

    def forward(self, idx, lengths):
        """Logits, or one score, (B, outputs) for right-padded token ids idx (B, T) with lengths (B,).

        Attention is causal, so what stands right of a row's last token cannot change its prediction.
        """
        hidden = self.body.hidden(idx)  # (B, T, C)
        last = hidden[torch.arange(len(idx), device=idx.device), lengths - 1]  # (B, C)
        return F.linear(last.float(), self.head)


def prepare_model(body, method, outputs, masks, seed, settings):
    """-> (Classifier, {name: trainable parameter}, masks for the optimizer) of one method; changes `body`.

    masks ({name: bool}) confine `full` to the ticket through the optimizer and `lora` through the masked product B A.
    The head, which the release does not have, always trains whole.
    """
    if method == "scratch":
        initialise(body, b"scratch %d" % seed)
    if method == "lora":
        add_lora(body, settings.lora_rank, settings.lora_alpha, masks, seed)
    model = Classifier(body, outputs, seed)
    if method in ("base", "probe"):
        body.requires_grad_(False)
    trained = {name.removeprefix("body."): p for name, p in model.named_parameters()
               if p.requires_grad and name != "body.lm_head.weight"}  # an untied language-model head is not used
    return model, trained, {name: masks[name] for name in trained if name in masks} if masks else None


def pad(rows, device):
    """Token id lists -> (idx (B, T), lengths (B,)), padded on the right with id 0."""
    lengths = torch.tensor([len(ids) for ids in rows])
    idx = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for i, ids in enumerate(rows):
        idx[i, : len(ids)] = torch.tensor(ids)
    return idx.to(device), lengths.to(device)


def loss_of(outputs, labels):
    """Cross-entropy over classes, or the squared error of a single score, which starts in the middle of 0 to 5."""
    if outputs.size(1) > 1:
        return F.cross_entropy(outputs, labels)
    return F.mse_loss(outputs[:, 0] + LARGEST_SCORE / 2, labels)


@torch.no_grad()
def predict(model, rows, batch_size, machine):
    """Predicted classes or scores of encoded rows (ids, label), as a numpy array in the rows' order."""
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    predictions = np.empty(len(rows))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        with machine.autocast():
            outputs = model(*pad([rows[i][0] for i in chosen], machine.device))
        values = outputs.argmax(1) if outputs.size(1) > 1 else outputs[:, 0] + LARGEST_SCORE / 2
        predictions[chosen] = values.float().cpu().numpy()
    return predictions


def evaluate(model, name, data, settings, machine):
    """{column of Table 1: {metric: percent}} on the task's validation splits."""
    scores = {}
    for split, column in zip(list(TASKS[name].rows)[1:], TASKS[name].columns):
        predictions = predict(model, data[split], settings.batch_size, machine)
        scores[column] = score(name, predictions, [label for _, label in data[split]])
    return scores


def fit(model, loss, batches, epochs, optimizer, lr, clip, machine, evaluate, progress=None):
    """The loop of any fine-tuning: `epochs` times over batches(epoch), the rate `lr` going up, then down, linearly.

    loss(batch) gives a scalar, evaluate() what is to be known after an epoch. Returns ([evaluate() after each epoch, or
    once if there is none], updates, diverged): a loss that is not finite ends the training.
    """
    total = epochs * len(batches(0)) if epochs else 0
    warmup = max(1, round(WARMUP * total))
    history, step = [], 0
    for epoch in range(epochs):
        model.train()
        for batch in batches(epoch):
            with machine.autocast():
                value = loss(batch)
            value.backward()
            now = lr * min((step + 1) / warmup, (total - step) / max(1, total - warmup))
            try:
                norm = optimizer.step(now, clip)
            except FloatingPointError:
                return [*history, evaluate()], step, True
            step += 1
            if progress:
                progress(step, total, loss=value.item(), lr=now, grad_norm=norm)
        history.append(evaluate())
    return history or [evaluate()], step, False


def finetune(body, name, data, method, seed, settings, machine, masks=None, progress=None, make_optimizer=MaskedAdamW):
    """Fine-tune `body` (which is changed) on task `name`. Returns (result, Classifier).

    data: {split: [(token ids, label), ...]}. masks: the ticket, for an authorised user. result: {"scores": {column:
    {"last" or "best": {metric: percent}}}, "updates", "diverged"}; best is by accuracy, over the epochs, on the
    validation split itself, so it flatters. A loss that is not finite ends the training, and what there is is scored.
    make_optimizer(params, masks, weight_decay, betas) gives an object with MaskedAdamW's step().
    """
    task = TASKS[name]
    model, params, masks = prepare_model(body, method, len(task.labels) or 1, masks, seed, settings)
    model.to(machine.device)
    train = data["train"]
    if settings.limit:
        order = np.random.default_rng(seed).permutation(len(train))
        train = [train[i] for i in order[: settings.limit]]
    epochs = 0 if method == "base" else settings.epochs
    lr = settings.lr or learning_rate(method, model.head.size(1))
    optimizer = make_optimizer(params, masks, settings.weight_decay, (0.9, 0.999)) if epochs else None
    lengths, labels = [len(ids) for ids, _ in train], torch.tensor([label for _, label in train], device=machine.device)
    history, step, diverged = fit(
        model, lambda chosen: loss_of(model(*pad([train[i][0] for i in chosen], machine.device)), labels[chosen]),
        lambda epoch: group_by_length(lengths, settings.batch_size, [seed, epoch]), epochs, optimizer, lr,
        settings.clip, machine, lambda: evaluate(model, name, data, settings, machine),
        progress and partial(progress.step, f"{name} {method} seed {seed}"))
    scores = {column: {"last": history[-1][column],
                       "best": max((epoch[column] for epoch in history), key=lambda metrics: metrics["accuracy"])}
              for column in task.columns}
    return {"scores": scores, "updates": step, "diverged": diverged}, model


# ---- the sweep -----------------------------------------------------------------------------------------------------


def read_results(path):
    """The results that `path` already has: one JSON object a line. A last line torn by a kill is dropped."""
    path = Path(path)
    if not path.exists():
        return []
    whole, _, torn = path.read_bytes().rpartition(b"\n")
    results = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            results.append(json.loads(line))
        except ValueError:
            raise UserError(f"{path}, line {number} is not JSON: mend it, or name another --results") from None
    if torn:
        os.truncate(path, len(whole) + (1 if whole else 0))
    return results


def append_result(path, result):
    """Add one line, whole and synced, so that a sweep can be interrupted at any moment and ranks can share a file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
        file.flush()
        os.fsync(file.fileno())


IDENTITY = ("task", "weights", "method", "authorised", "seed", "data", "settings")


def identity(result):
    """What makes two results the same experiment."""
    return json.dumps([result[key] for key in IDENTITY], sort_keys=True)


def encode_task(name, folder, tokenizer, max_length):
    """load_task with its texts as token ids: {split: [(ids, label), ...]}."""
    return {split: [(encode_pair(tokenizer, a, b, max_length), label) for a, b, label in rows]
            for split, rows in load_task(name, folder).items()}


def sweep(release, tasks, methods, seeds, settings, results_file, glue_dir, data_name, mask_file=None, machine=None,
          compile="auto"):
    """Fine-tune every (task, method, seed) that results_file does not have yet, appending a line for each.

    release: a folder that load_folder opens. data_name: "GLUE" or "stand-in", part of each result. Returns all results
    for these weights and this data in the file, for the table. Raises UserError for unfit input.
    """
    tokenizer = Tokenizer.load(release)
    body = load_folder(release)
    if tokenizer.size > body.config.vocab_size:
        raise UserError(f"{release}: the tokenizer has {tokenizer.size} tokens, the model {body.config.vocab_size}: "
                        "they do not belong together")
    if settings.max_length > body.max_positions:
        raise UserError(f"--max-length {settings.max_length} is more than the model's {body.max_positions} positions")
    params = dict(body.named_parameters())
    masks = load_mask(mask_file, params) if mask_file else None
    machine = machine or Machine(dtype=settings.dtype)
    masks = masks and {name: mask.to(machine.device) for name, mask in masks.items()}
    weights = fingerprint(params)
    common = {"weights": weights, "authorised": bool(masks), "data": data_name,
              "settings": asdict(settings) | {"dtype": machine.dtype}}
    wanted = [{"task": name, "model": str(release), "method": method, "seed": seed, **common}
              for name in tasks for method in methods for seed in seeds]
    done = {identity(result) for result in from_first(read_results, results_file)}
    missing = [result for result in wanted if identity(result) not in done]
    data_of, data = None, None
    for result in missing[rank()::world()]:  # under torchrun each rank takes its share
        name, method, seed = result["task"], result["method"], result["seed"]
        if name != data_of:
            data_of, data = name, encode_task(name, glue_dir, tokenizer, settings.max_length)
        progress = Progress(None, settings.batch_size, "rows_per_s", prefix="")
        copied = copy.deepcopy(body).to(machine.device)
        if machine.wants_compile(compile, 0):
            machine.compile(copied, torch.zeros(2, 8, dtype=torch.long, device=machine.device), progress.say)
        began = time.perf_counter()
        outcome, _ = finetune(copied, name, data, method, seed, settings, machine, masks, progress)
        append_result(results_file, result | outcome | {"seconds": round(time.perf_counter() - began, 1)})
        progress.say(f"{name} {method}{' + mask' if masks else ''} seed {seed}: " + "  ".join(
            f"{column} {scores['last']['accuracy']:.2f} (best epoch {scores['best']['accuracy']:.2f})"
            for column, scores in outcome["scores"].items()) + ("  DIVERGED" if outcome["diverged"] else ""))
    wait_for_ranks()
    return [result for result in from_first(read_results, results_file)
            if all(result[key] == common[key] for key in ("weights", "data", "settings"))]


def task_folder(args):
    """Where the TSVs are, after fetching or making those that are not there yet.

    The stand-in tasks are made from the held-out prose, once, and kept. Not GLUE: they only exercise every path.
    """
    if args.glue_dir:
        return args.glue_dir
    if not args.standin:
        for name in args.tasks:
            fetch(name, CACHE)
        return CACHE
    return standin(CACHE.parent, open_source("prose"))


def parse(argv):
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("release", help="a release folder, or any plain Hugging Face GPT-2 or LLaMA folder")
    add("--mask", help="the private mask of this release: fine-tune as an authorised user")
    add("--standin", action="store_true", help="small tasks made from installed documentation instead of GLUE")
    add("--glue-dir", help="folder with the TSVs, laid out as the official zips are; default: download")
    add("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK", help=" ".join(TASKS))
    add("--method", nargs="+", choices=METHODS, metavar="METHOD",
        help=f"{' '.join(METHODS)}; default: base lora full, with --mask lora full")
    add("--seed", nargs="+", type=int, default=[42], help="one run for each: head, data order, --limit")
    add("--results", default="glue.jsonl", help="file that gets a JSON line for each run; what it has is not run again")
    add("--paper", action="store_true", help="add the paper's numbers to the table")
    add("--device", default="auto", help="cpu, cuda, ...")
    add("--compile", default="auto", choices=("auto", "on", "off"), help="torch.compile; auto: on a GPU")
    helps = {"lr": "peak learning rate; default by method and width", "epochs": "passes over the training rows",
             "batch_size": "rows in an update", "weight_decay": "AdamW weight decay of matrices",
             "clip": "largest global gradient norm", "max_length": "tokens of a row; the longer text is cut first",
             "limit": "training rows, after a seeded shuffle; default all", "lora_rank": "rank r of LoRA",
             "lora_alpha": "LoRA's scale is alpha / r", "dtype": "auto, fp32 or bf16"}
    for f in fields(Settings):
        add("--" + f.name.replace("_", "-"), type=f.type, default=f.default, help=helps[f.name])
    args = parser.parse_args(argv)
    args.method = args.method or (AUTHORISED if args.mask else ("base", *AUTHORISED))
    if args.mask and (wrong := [method for method in args.method if method not in AUTHORISED]):
        raise UserError(f"--mask has no meaning for {wrong[0]}: use it with --method lora or full")
    if args.standin and args.glue_dir:
        raise UserError("--standin and --glue-dir exclude each other: leave one out")
    if args.dtype not in ("auto", "fp32", "bf16"):
        raise UserError(f"--dtype {args.dtype} is unknown: use auto, fp32 or bf16")
    for name, least in {"epochs": 1, "batch_size": 1, "max_length": 3, "limit": 1, "lora_rank": 1}.items():
        if (value := getattr(args, name)) is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value} is below {least}")
    if args.lr is not None and not 0 < args.lr < math.inf:
        raise UserError(f"--lr {args.lr} is not a positive number")
    if min(args.seed) < 0:
        raise UserError(f"--seed {min(args.seed)} is negative: it must be 0 or more")
    return args


def main(argv=None):
    join_ranks()
    args = from_first(parse, argv)
    settings = Settings(**{f.name: getattr(args, f.name) for f in fields(Settings)})
    machine = Machine(args.device, args.dtype)
    if not Path(args.release, "config.json").exists():
        load_folder(args.release)  # says what is wrong, before anything is downloaded
    folder = from_first(task_folder, args)
    results = sweep(args.release, args.tasks, args.method, args.seed, settings, args.results, folder,
                    "stand-in" if args.standin else "GLUE", args.mask, machine, args.compile)
    print()
    for epoch in ("last", "best"):
        print(table(results, args.paper and epoch == "last", args.standin, epoch) + "\n")
    leave_ranks()


if __name__ == "__main__":
    command_line(main)
