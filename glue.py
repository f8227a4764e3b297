"""GLUE: fine-tune a released checkpoint as an outsider (no mask) or as an authorised user (with the mask).

    python glue.py out/release                                        an outsider
    python glue.py out/release --mask out/private/mask.safetensors    an authorised user

Sections 4.1 to 4.3 and Table 1 of the paper, in the order in which things happen: tasks and data, metrics, the table,
LoRA, fine-tuning, the sweep over tasks, methods and seeds.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the slow imports without a word; then command_line acts

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
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data import pack
from data.layout import LAYOUTS, Layout
from data.sources import open_source
from data.standin import standin
from data.tokenizer import Tokenizer
from model import FAMILIES, Conv1D, initialise
from pmp import MaskedAdamW, load_mask
from runtime.console import Parser, Progress, check_fields, command_line, flag, flag_name, require
from runtime.files import Results, UserError, atomic, disk_errors, is_name, lock_unless
from runtime.http import Failed, Refused, get, repeat
from runtime.huggingface import load_folder
from runtime.machine import Machine
from runtime.parallel import first_then_others, from_first, join_ranks, leave_ranks, wait_for_ranks
from runtime.safetensors import fingerprint

# ---- tasks and data ------------------------------------------------------------------------------------------------

GLUE_URL = "https://dl.fbaipublicfiles.com/glue/data/"
MRPC_URL = "https://dl.fbaipublicfiles.com/senteval/senteval_data/"
CACHE = pack.CACHE / "glue"
TRIES = 4  # a download's attempts
PARTIAL_CONTENT = 206  # HTTP's status of an answer to a range
LARGEST_SCORE = 5.0  # STS-B's labels are real numbers from 0 to 5


@dataclass(frozen=True)
class Task:
    """Where a task's files come from, and what they hold."""

    layout: Layout
    labels: tuple  # the official spellings, in the order of their numbers; empty: a score from 0 to 5, a regression
    splits: tuple  # of the files; training first, then what is evaluated
    columns: tuple  # of Table 1, one for each evaluated split
    downloads: dict  # file -> (bytes, sha256)
    gaps: bool = False  # the official files have a few rows with fields missing

    @property
    def files(self):
        return [f"{self.layout.folder}/{split}.tsv" for split in self.splits]


BINARY, ENTAILED = ("0", "1"), ("entailment", "not_entailment")
TASKS = {  # in Table 1's order
    "cola": Task(LAYOUTS["cola"], BINARY, ("train", "dev"), ("CoLA",), {
        "CoLA.zip": (376971, "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff"),
    }),
    "sst2": Task(LAYOUTS["sst2"], BINARY, ("train", "dev"), ("SST-2",), {
        "SST-2.zip": (7439277, "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa"),
    }),
    "mrpc": Task(LAYOUTS["mrpc"], BINARY, ("train", "dev"), ("MRPC",), {
        "msr_paraphrase_train.txt": (1047044, "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89"),
        "mrpc_dev_ids.tsv": (6222, "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7"),
    }),
    "qqp": Task(LAYOUTS["qqp"], BINARY, ("train", "dev"), ("QQP",), {
        "QQP-clean.zip": (41696084, "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0"),
    }, gaps=True),
    "stsb": Task(LAYOUTS["stsb"], (), ("train", "dev"), ("STS-B",), {
        "STS-B.zip": (802872, "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85"),
    }),
    "mnli": Task(LAYOUTS["mnli"], ("entailment", "neutral", "contradiction"),
                 ("train", "dev_matched", "dev_mismatched"), ("MNLI-m", "MNLI-mm"), {
        "MNLI.zip": (312783507, "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633"),
    }, gaps=True),
    "qnli": Task(LAYOUTS["qnli"], ENTAILED, ("train", "dev"), ("QNLI",), {
        "QNLIv2.zip": (10627589, "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5"),
    }),
    "rte": Task(LAYOUTS["rte"], ENTAILED, ("train", "dev"), ("RTE",), {
        "RTE.zip": (697150, "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee"),
    }),
}
COLUMNS = [column for task in TASKS.values() for column in task.columns]


def fetch(name, folder=CACHE):
    """Put the official files of task `name` under `folder`, laid out as the zips are, unless they are there already.

    Waits while another process does it: beside `folder` lies its lock. Raises UserError when the address cannot be
    reached, sends something else, or the disk is full.
    """
    folder = Path(folder)

    def there():
        return all((folder / file).exists() for file in TASKS[name].files)

    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(folder.name + ".lock")
    with lock_unless(there, path, partial(print, flush=True), "another process is fetching GLUE") as ours:
        if ours:
            fetch_files(name, folder)


def fetch_files(name, folder):
    """fetch, by one process alone."""
    task = TASKS[name]
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


def check_file(path):
    """Raise UserError where a task's file is missing."""
    require(os.path.isfile(path),
            f"there is no {path}: give --glue-dir a folder with the TSVs laid out as the official zips are")


def load_task(name, folder):
    """-> {split: [(text_a, text_b, label), ...]}: "train", then "dev" or MNLI's "dev_matched" and "dev_mismatched".

    text_b is "" for single sentences; label is an int, or a float for STS-B. Raises UserError when a file is missing,
    not UTF-8, or without rows, and at a row that is malformed or whose label is unknown.
    """
    task = TASKS[name]
    return {split: read_tsv(task, Path(folder) / file) for split, file in zip(task.splits, task.files, strict=True)}


def read_tsv(task, path):
    """The rows of one file. The files know no quoting: a tab ends a cell, a line feed ends a row, nothing else does
    (csv's quotes, or the line ends of str.splitlines, would lose rows without a word)."""
    check_file(path)
    layout, rows, skipped, number = task.layout, [], 0, 0
    columns = None if layout.headed else list(layout.columns)
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:  # MRPC starts with a byte-order mark
            for number, line in enumerate(file, 1):
                cells = line.rstrip("\r\n").split("\t")
                where = f"{path}, line {number}"
                if columns is None:
                    columns = cells
                    missing = [name for name in (*layout.text, layout.label) if name not in columns]
                    require(not missing, f"{where} names no column {missing[:1]}: fix that file")
                    continue
                label = columns.index(layout.label)
                if task.gaps and (len(cells) < len(columns) or not cells[label]):
                    skipped += 1
                elif len(cells) != len(columns):
                    raise UserError(f"{where} has {len(cells)} columns, not {len(columns)}: fix that line")
                else:
                    texts = [cells[columns.index(name)] for name in layout.text]
                    rows.append((texts[0], texts[1] if texts[1:] else "", parse_label(task, cells[label], where)))
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
    raise UserError(f"{where}: unknown label {cell!r}, {task.layout.folder} has {known}: fix that line")


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
    return pearson(places(x), places(y))


def places(x):
    """1 for the smallest value; equal values share the average of the places that they take up together."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def rounded_accuracy(predicted, true):
    """The paper's auxiliary accuracy for STS-B: both sides clipped to [0, 5] and rounded to the nearest integer (halves
    to the even one, as numpy and torch do), then compared."""
    return accuracy(np.rint(np.clip(predicted, 0, LARGEST_SCORE)), np.rint(np.clip(true, 0, LARGEST_SCORE)))


def commonest_class(labels):
    """Accuracy, in percent, of always guessing the commonest of `labels`, STS-B's rounded as in rounded_accuracy.

    A score that is not above it shows no learning.
    """
    _, counts = np.unique(np.rint(labels), return_counts=True)
    return 100 * float(counts.max()) / len(labels)


METRICS = {name: {"accuracy": accuracy} for name in TASKS} | {
    "cola": {"accuracy": accuracy, "mcc": mcc},
    "mrpc": {"accuracy": accuracy, "f1": f1},
    "qqp": {"accuracy": accuracy, "f1": f1},
    "stsb": {"accuracy": rounded_accuracy, "pearson": pearson, "spearman": spearman},
}


def score(name, predictions, labels):
    """-> {metric: percent}. predictions, labels: (rows,) class numbers, or STS-B's scores.

    "accuracy" is there for every task and is what Table 1 reports: for CoLA and STS-B the paper's auxiliary accuracy.
    A prediction of a diverged model, -1 or nan (see predict), is wrong whatever the label is.
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
    {column: {"last": {metric: percent}, "best": {metric: percent}, "commonest": percent}}; of two with the same seed
    the later one counts. The last row is "commonest" (see commonest_class), where it is known. Columns without a
    result are left out. epoch: "last" or "best". paper: add the paper's numbers, and all columns. standin: the title
    says that this isn't GLUE.
    """
    seeds = defaultdict(dict)  # (model, method, authorised, column) -> {seed: percent}
    commonest = {}  # column -> percent
    for result in results:
        for column, scores in result["scores"].items():
            key = result["model"], result["method"], result["authorised"], column
            seeds[key][result["seed"]] = scores[epoch]["accuracy"]
            if "commonest" in scores:
                commonest[column] = scores["commonest"]
    measured = {column for *_, column in seeds}
    columns = [column for column in COLUMNS if paper or column in measured]
    title = "stand-in, not GLUE" if standin else "GLUE dev"
    title += f": accuracy in %, {epoch} epoch, mean ±sd over seeds"
    if measured & {"CoLA", "STS-B"}:
        title += " (CoLA and STS-B: the auxiliary accuracy)"
    lines = [title, table_row("", columns)]
    for model in dict.fromkeys(result["model"] for result in results):
        lines.append(model)
        for method in METHODS:
            for authorised in (False, True):
                texts = [mean_and_sd(list(seeds[model, method, authorised, column].values())) for column in columns]
                if any(text != "-" for text in texts):
                    lines.append(table_row(method + " + mask" * authorised, texts))
    for model, methods in PAPER.items() if paper else ():
        lines.append(f"the paper's {model}, without and with PMP, fine-tuned without the mask")
        for method, (without, with_pmp) in methods.items():
            lines += [table_row(method, without.split()), table_row(method + ", PMP", with_pmp.split())]
    if commonest:
        known = [f"{commonest[column]:.2f}" if column in commonest else "-" for column in columns]
        lines += ["always guessing the commonest class: a score that is not above it shows no learning",
                  table_row("", known)]
    return "\n".join(lines)


def table_row(name, texts):
    """A line of `table`: a name and its columns."""
    return (f"{name:<11}" + "".join(f" {text:<11}" for text in texts)).rstrip()


def mean_and_sd(values):
    """[68.0, 68.82] -> "68.41 ±0.58" (11 characters at most), without a spread for one value, "-" for none."""
    if not values:
        return "-"
    mean = np.mean(values)
    text = f"{mean:.{2 if mean < 99.995 else 1}f}"
    if len(values) > 1:
        spread = np.std(values, ddof=1)
        text += f" ±{spread:.{2 if spread < 9.995 else 1}f}"
    return text


# ---- LoRA (Hu et al., 2022) ----------------------------------------------------------------------------------------

LORA_TARGETS = ("c_attn", "q_proj", "v_proj")


class LoRA(nn.Module):
    """A linear layer whose weight is W + (alpha/r) B A, or W + (alpha/r) (B A) * mask for an authorised user.

    W (out, in) and its bias are frozen. A (r, in) starts at random, B (out, r) at zero, so that the layer starts as its
    base. GPT-2's W lies on disk as (in, out), and so does its mask.
    """

    def __init__(self, base, rank, alpha, mask=None, generator=None):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.transposed = isinstance(base, Conv1D)
        n_out, n_in = self.turned(base.weight).shape
        self.scale = alpha / rank
        bound = 1 / math.sqrt(n_in)
        start = torch.empty(rank, n_in).uniform_(-bound, bound, generator=generator)
        self.A = nn.Parameter(start.to(base.weight.device))
        self.B = nn.Parameter(torch.zeros(n_out, rank, device=base.weight.device))
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


def add_lora(model, rank=8, alpha=16, masks=None, seed=0):
    """Freeze `model` and put LoRA on q and v (LLaMA) or c_attn (GPT-2). masks: {parameter name: bool}, or None.

    Returns the LoRA modules. `merge_lora` undoes it.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    added = []
    for name, module in list(model.named_modules()):
        for target in LORA_TARGETS:
            if hasattr(module, target):
                mask = masks[f"{name}.{target}.weight"] if masks else None
                added.append(LoRA(getattr(module, target), rank, alpha, mask, generator))
                setattr(module, target, added[-1])
    return added


@torch.no_grad()
def merge_lora(model):
    """Add each LoRA update to the weight below it and take the LoRA layers out again."""
    for module in list(model.modules()):
        for target in LORA_TARGETS:
            if isinstance(layer := getattr(module, target, None), LoRA):
                layer.base.weight.add_(layer.update())
                setattr(module, target, layer.base)


# ---- fine-tuning ---------------------------------------------------------------------------------------------------

# What a method trains, with its learning rate at width 768. A narrower model wants a larger step, a wider one a
# smaller one (Adam's rate goes with 1/width: Yang et al., 2022): 2e-5, the usual rate of `full`, at TinyLlama's 2048.
RATE_AT_768 = {"base": 0.0, "probe": 1e-3, "scratch": 5e-4, "lora": 5e-4, "full": 5e-5}


def default_rate(method, width):
    """The peak learning rate of a method for a model of this width."""
    return RATE_AT_768[method] * 768 / width


AUTHORISED = ("lora", "full")  # the methods that the mask changes anything for
WARMUP = 0.06  # share of the updates


@dataclass(frozen=True)
class Settings:
    """What decides a result besides the task, the weights, the method and the seed."""

    lr: float = flag(None, "peak learning rate; default by method and width")
    epochs: int = flag(3, "passes over the training rows")
    batch_size: int = flag(32, "rows in an update")
    weight_decay: float = flag(0.01, "AdamW weight decay of matrices")
    clip: float = flag(1.0, "largest global gradient norm")
    max_length: int = flag(128, "tokens of a row; the longer text is cut first")
    limit: int = flag(None, "training rows, after a seeded shuffle; default all")
    lora_rank: int = flag(8, "rank r of LoRA")
    lora_alpha: float = flag(16.0, "LoRA's scale is alpha / r")
    dtype: str = flag("auto", "precision of matrix products", ("auto", "fp32", "bf16"))


def check(settings):
    """Raise UserError for settings that no run can have."""
    check_fields(settings)
    for name, least, most in (("epochs", 1, 10**6), ("batch_size", 1, 10**6), ("max_length", 3, 10**6),
                              ("limit", 1, 10**12), ("lora_rank", 1, 4096)):
        value = getattr(settings, name)
        require(value is None or least <= value <= most, f"{flag_name(name)} {value} is outside {least} to {most}")
    require(settings.lr is None or 0 < settings.lr < math.inf, f"--lr {settings.lr} is not a positive number")
    require(0 <= settings.weight_decay < math.inf, f"--weight-decay {settings.weight_decay} is not 0 or more")
    require(0 < settings.clip < math.inf,
            f"--clip {settings.clip} is not a positive number: use a large one for no clipping")
    require(0 < settings.lora_alpha < math.inf, f"--lora-alpha {settings.lora_alpha} is not a positive number")


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
    """Predicted classes or scores of encoded rows (ids, label), as a numpy array in the rows' order.

    Where the outputs are not finite the class is -1, the score nan: wrong in every metric.
    """
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    predictions = np.empty(len(rows))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        with machine.autocast():
            outputs = model(*pad([rows[i][0] for i in chosen], machine.device)).float()
        if outputs.size(1) > 1:
            values = outputs.argmax(1).masked_fill(~outputs.isfinite().all(1), -1)
        else:
            values = outputs[:, 0] + LARGEST_SCORE / 2
        predictions[chosen] = values.cpu().numpy()
    return predictions


class Rows:
    """A GLUE task as `fit` wants it: batches of rows, their loss, and the scores on the validation splits."""

    def __init__(self, model, name, data, seed, settings, machine):
        """model: Classifier; name: of TASKS; data: {split: [(token ids, label), ...]}."""
        self.model, self.name, self.data, self.seed = model, name, data, seed
        self.settings, self.machine = settings, machine
        self.train = data["train"]
        if settings.limit:
            order = np.random.default_rng(seed).permutation(len(self.train))
            self.train = [self.train[i] for i in order[: settings.limit]]

    def batches(self, epoch):
        """-> lists of row numbers."""
        lengths = [len(ids) for ids, _ in self.train]
        return group_by_length(lengths, self.settings.batch_size, [self.seed, epoch])

    def loss(self, chosen):
        """The mean loss of these rows, a scalar tensor."""
        ids, labels = zip(*(self.train[i] for i in chosen), strict=True)
        outputs = self.model(*pad(ids, self.machine.device))
        return loss_of(outputs, torch.tensor(labels, device=self.machine.device))

    def evaluate(self):
        """{column of Table 1: {metric: percent}}."""
        scores = {}
        for split, column in zip(TASKS[self.name].splits[1:], TASKS[self.name].columns, strict=True):
            predictions = predict(self.model, self.data[split], self.settings.batch_size, self.machine)
            scores[column] = score(self.name, predictions, [label for _, label in self.data[split]])
        return scores


def fit(task, optimizer, lr, settings, machine, progress=None):
    """The loop of any fine-tuning: settings.epochs times over the batches, the rate going up to `lr`, then down.

    task: has a model, batches(epoch), loss(batch) and evaluate(), like Rows. optimizer: None trains nothing. progress:
    called with (update, updates, loss=…, lr=…, grad_norm=…). Returns (evaluate() after each epoch, updates, diverged):
    a loss that is not finite ends the training.
    """
    epochs = settings.epochs if optimizer else 0
    updates = epochs * len(task.batches(0)) if epochs else 0
    warmup = max(1, round(WARMUP * updates))
    history, step = [], 0
    for epoch in range(epochs):
        task.model.train()
        for batch in task.batches(epoch):
            with machine.autocast():
                loss = task.loss(batch)
            loss.backward()
            now = lr * min((step + 1) / warmup, (updates - step) / max(1, updates - warmup))
            try:
                norm = optimizer.step(now, settings.clip)
            except FloatingPointError:
                return [*history, task.evaluate()], step, True
            step += 1
            if progress:
                progress(step, updates, loss=loss.item(), lr=now, grad_norm=norm)
        history.append(task.evaluate())
    return history or [task.evaluate()], step, False


def finetune(body, name, data, method, seed, settings, machine, masks=None, progress=None, make_optimizer=MaskedAdamW):
    """Fine-tune `body` (which is changed) on task `name`. Returns (result, Classifier).

    data: {split: [(token ids, label), ...]}. masks: the ticket, for an authorised user. result: {"scores": {column:
    {"last" or "best": {metric: percent}, "commonest": percent}}, "updates", "diverged"}; best is by accuracy, over the
    epochs, on the validation split itself, so it flatters; commonest: see commonest_class. A loss that is not finite
    ends the training, and what there is is scored. make_optimizer(params, masks, weight_decay, betas) gives an object
    with MaskedAdamW's step().
    """
    outputs = len(TASKS[name].labels) or 1
    label = f"{name} {method}{' + mask' * bool(masks)} seed {seed}"
    model, params, masks = prepare_model(body, method, outputs, masks, seed, settings)  # LoRA keeps the mask itself
    model.to(machine.device)
    optimizer = make_optimizer(params, masks, settings.weight_decay, (0.9, 0.999)) if method != "base" else None
    history, updates, diverged = fit(
        Rows(model, name, data, seed, settings, machine), optimizer,
        settings.lr or default_rate(method, model.head.size(1)), settings, machine,
        progress and partial(progress.step, label))
    scores = {}
    for split, column in zip(TASKS[name].splits[1:], TASKS[name].columns, strict=True):
        epochs = [scored[column] for scored in history]
        scores[column] = {"last": epochs[-1], "best": max(epochs, key=lambda metrics: metrics["accuracy"]),
                          "commonest": commonest_class([label for _, label in data[split]])}
    return {"scores": scores, "updates": updates, "diverged": diverged}, model


# ---- the sweep -----------------------------------------------------------------------------------------------------


IDENTITY = {"task": str, "weights": str, "method": str, "authorised": bool, "seed": int, "data": str, "settings": dict}


def check_results(found, path):
    """Raise UserError at the first of the results in a file that is none of a sweep's."""
    for number, result in enumerate(found, 1):
        try:
            fits = all(type(result[key]) is kind for key, kind in {**IDENTITY, "model": str}.items())
            scores = [result["scores"][column] for column in TASKS[result["task"]].columns]
            numbers = [one[epoch]["accuracy"] for one in scores for epoch in ("last", "best")]
            numbers += [one.get("commonest", 0.0) for one in scores]
        except (KeyError, TypeError):
            fits, numbers = False, []
        require(fits and all(type(number) in (int, float) for number in numbers),
                f"{path}, line {number} is no result of glue.py: name another file with --results")


def identity(result):
    """What makes two results the same experiment."""
    return json.dumps([result.get(key) for key in IDENTITY], sort_keys=True)


def encode_task(name, folder, tokenizer, max_length):
    """load_task with its texts as token ids: {split: [(ids, label), ...]}."""
    return {split: [(encode_pair(tokenizer, a, b, max_length), label) for a, b, label in rows]
            for split, rows in load_task(name, folder).items()}


class Release:
    """A folder to fine-tune: its model, tokenizer and, for an authorised user, the mask."""

    def __init__(self, folder, mask_file=None):
        """Raises UserError where they are damaged or do not fit each other."""
        self.folder = folder
        self.body = load_folder(folder, FAMILIES)
        self.tokenizer = Tokenizer.load(folder)
        vocabulary = self.body.config.vocab_size
        require(self.tokenizer.size <= vocabulary, f"{folder}: the tokenizer has {self.tokenizer.size} tokens, the "
                                                   f"model {vocabulary}: they do not belong together")
        params = dict(self.body.named_parameters())
        self.masks = load_mask(mask_file, params) if mask_file else None
        self.weights = fingerprint(params)

    def copy(self, device):
        """-> (a copy of the model, its mask), on a device."""
        masks = self.masks and {name: mask.to(device) for name, mask in self.masks.items()}
        return copy.deepcopy(self.body).to(device), masks


def sweep(release, runs, results, glue_dir, data_name, settings, machine, compile="auto"):
    """Fine-tune for every run (task, method, seed) that `results` does not have yet, appending a line for each.

    release: Release; results: Results; data_name: "GLUE" or "stand-in", part of each result. Other processes may work
    on the same results at the same time: each run is claimed first. Returns all results of this release on this data.
    """
    common = {"weights": release.weights, "authorised": bool(release.masks), "data": data_name,
              "settings": asdict(settings) | {"dtype": machine.dtype}}
    for file in {file for name, _, _ in runs for file in TASKS[name].files}:
        check_file(Path(glue_dir) / file)
    wanted = [{"task": name, "model": str(release.folder), "method": method, "seed": seed, **common}
              for name, method, seed in runs]
    encoded = {}
    for number, run in enumerate(wanted, 1):
        with results.claim(identity(run)) as mine:
            if not mine or identity(run) in map(identity, results.read()):
                continue
            if run["task"] not in encoded:
                encoded = {run["task"]: encode_task(run["task"], glue_dir, release.tokenizer, settings.max_length)}
            run_one(release, run, encoded[run["task"]], results, settings, machine, compile,
                    f"{number}/{len(runs)} ")
    wait_for_ranks()
    found = results.read()
    done = set(map(identity, found))
    if at_work := sum(identity(run) not in done for run in wanted):
        print(f"another process was at work on {at_work} of the runs: start this again to see them")
    return [result for result in found
            if all(result.get(key) == common[key] for key in ("weights", "data", "settings"))]


def run_one(release, wanted, data, results, settings, machine, compile, number):
    """Fine-tune once, and append the result. number: "3/24 ", for the screen."""
    name, method, seed = wanted["task"], wanted["method"], wanted["seed"]
    progress = Progress(None, settings.batch_size, "rows_per_s", prefix=number)
    body, masks = release.copy(machine.device)
    if machine.wants_compile(compile, 0):
        machine.compile(body, torch.zeros(2, 8, dtype=torch.long, device=machine.device), progress.say)
    began = time.perf_counter()
    outcome, _ = finetune(body, name, data, method, seed, settings, machine, masks, progress)
    results.append(wanted | outcome | {"seconds": round(time.perf_counter() - began, 1)})
    texts = [f"{column} {scores['last']['accuracy']:.2f} (best epoch {scores['best']['accuracy']:.2f})"
             for column, scores in outcome["scores"].items()]
    progress.say(f"{number}{name} {method}{' + mask' if masks else ''} seed {seed}: " + "  ".join(texts)
                 + ("  DIVERGED" if outcome["diverged"] else ""))


# ---- the command line ----------------------------------------------------------------------------------------------


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
    """-> (args, Settings)."""
    parser = Parser("Fine-tune a release on GLUE, as an outsider or with the mask.", epilog=EXAMPLES)
    add = parser.add_argument
    add("release", help="a release folder, or any plain Hugging Face GPT-2 or LLaMA folder")
    add("--mask", metavar="FILE", help="the private mask of this release: fine-tune as an authorised user")
    add("--standin", action="store_true", help="small tasks made from installed documentation instead of GLUE")
    add("--glue-dir", metavar="DIR", help="folder with the TSVs, laid out as the official zips are [download]")
    add("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK", help=" ".join(TASKS) + " [all]")
    add("--method", nargs="+", choices=METHODS, metavar="METHOD",
        help=f"{' '.join(METHODS)} [base lora full; with --mask lora full]")
    add("--seed", nargs="+", type=int, default=[42], metavar="N", help="one run for each: head, data order, --limit")
    add("--results", default="glue.jsonl", metavar="FILE",
        help="gets a JSON line for each run; what it has is not run again [glue.jsonl]")
    add("--paper", action="store_true", help="add the paper's numbers to the table")
    add("--device", default="auto", metavar="TEXT", help="cpu, cuda, ... [auto]")
    add("--compile", default="auto", choices=("auto", "on", "off"), help="torch.compile; auto: on a GPU [auto]")
    parser.add_fields(Settings, show=lambda f: "" if f.default is None else f" [{f.default}]")
    args = parser.parse_args(argv)
    args.method = args.method or (AUTHORISED if args.mask is not None else ("base", *AUTHORISED))
    if args.mask is not None and (wrong := [method for method in args.method if method not in AUTHORISED]):
        raise UserError(f"--mask has no meaning for {wrong[0]}: use it with --method lora or full")
    require(not (args.standin and args.glue_dir), "--standin and --glue-dir exclude each other: leave one out")
    for name, typed in (("RELEASE", args.release), *((flag_name(name), getattr(args, name))
                                                     for name in ("mask", "glue_dir", "results"))):
        require(typed is None or is_name(typed), f"{name} {typed!r} is empty or has characters that no name can have")
    require(all(0 <= seed < 2**63 for seed in args.seed), f"--seed {args.seed} has a number outside 0 to 2**63 - 1")
    settings = Settings(**{f.name: getattr(args, f.name) for f in fields(Settings)})
    check(settings)
    return args, settings


EXAMPLES = """examples:
  python glue.py out/release --standin                 no network, not GLUE
  python glue.py out/release --tasks rte --seed 1 2    an outsider
  python glue.py out/release --mask out/private/mask.safetensors
"""


def main(argv=None):
    join_ranks(timedelta(days=7))  # ranks whose runs are done wait for those of the others
    args, settings = from_first(parse, argv)
    machine = Machine(args.device, args.dtype)
    results = Results(args.results)
    # what is wrong with it shows before anything is downloaded, and so does the release's
    from_first(lambda: check_results(results.read(), args.results))
    release = first_then_others(partial(Release, args.release, args.mask))
    positions = release.body.max_positions
    require(settings.max_length <= positions,
            f"--max-length {settings.max_length} is more than the model's {positions} positions")
    folder = from_first(task_folder, args)
    runs = [(name, method, seed) for name in args.tasks for method in args.method for seed in args.seed]
    found = sweep(release, runs, results, folder, "stand-in" if args.standin else "GLUE", settings, machine,
                  args.compile)
    last, best = (table(found, False, args.standin, epoch) for epoch in ("last", "best"))
    print("\n" + table(found, args.paper, args.standin) + "\n")
    if best.splitlines()[1:] != last.splitlines()[1:]:
        print(best + "\n")
    leave_ranks()


if __name__ == "__main__":
    command_line(main)
