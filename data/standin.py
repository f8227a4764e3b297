"""A stand-in for GLUE: eight small tasks made from held-out documents, laid out like the official files.

No network, the same folders, columns, headers and oddities (CoLA without header and final newline, SST-2's space before
the tab, MRPC's byte-order mark), so that every path of glue.py can be tried. A score on it says nothing about GLUE.
"""

import hashlib
import json
import random
import re
from pathlib import Path

from data.layout import LAYOUTS
from runtime.files import UserError, atomic, disk_errors

LIMITS = re.compile(r"\b(?:if|unless|when|must|should|not|no|never|cannot|only|without|may|but)\b|n't\b", re.I)


def sentences(text):
    """The sentences of a document that have 5 to 40 words and are mostly letters; no tabs or line ends in them."""
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split())):
            letters = sum(c.isalpha() or c == " " for c in sentence)
            if 5 <= len(sentence.split()) <= 40 and letters >= 0.9 * len(sentence) and sentence[-1] in ".:?!":
                found.append(sentence)
    return list(dict.fromkeys(found))


class Examples:
    """Draws examples from `documents` (lists of sentences). Each task's method takes the number of a label and returns
    (text_a, text_b, label as the official file spells it)."""

    def __init__(self, documents, rng):
        self.documents, self.rng = documents, rng

    def draw(self):
        """-> two sentences that follow each other, another of the same document, one of another document."""
        document, other = self.rng.sample(self.documents, 2)
        i = self.rng.randrange(len(document) - 1)
        return document[i], document[i + 1], self.rng.choice(document[:i] + document[i + 2 :]), self.rng.choice(other)

    def edited(self, sentence):
        """The same sentence with one word left out and the words beside the gap swapped."""
        words = sentence.split()
        gap = self.rng.randrange(1, len(words) - 1)
        words[gap - 1 : gap + 2] = words[gap + 1], words[gap - 1]
        return " ".join(words)

    def cola(self, label):  # is the word order undisturbed? The first and the last word stay: they would give it away
        first, *words, last = self.draw()[0].split()
        mixed = self.rng.sample(words, len(words))
        mixed = words if label else mixed if mixed != words else words[::-1]
        return " ".join([first, *mixed, last]), "", str(label)

    def sst2(self, _):  # "negative" is a sentence that sets a limit or a condition
        sentence = self.draw()[0]
        return sentence + " ", "", "0" if LIMITS.search(sentence) else "1"

    def mrpc(self, label):  # the same sentence in other words, or the next one
        first, second, _, _ = self.draw()
        return first, self.edited(first if label else second), str(label)

    def qqp(self, label):  # the same question, or one about something else
        first, _, _, foreign = self.draw()
        return f"Is it so? {first}", f"Can one say this? {self.edited(first if label else foreign)}", str(label)

    def stsb(self, level):  # the share of words in common, after `level` fifths of the words were kept
        first, _, _, foreign = self.draw()
        words, others = first.split(), foreign.split()
        keep = round(len(words) * level / 5)
        second = words[:keep] + others[keep:]
        return first, " ".join(second), f"{5 * sum(word in words for word in second) / len(second):.3f}"

    def mnli(self, label):  # the next sentence, another one of the document, or one of another document
        first, *others = self.draw()
        return first, others[label], ("entailment", "neutral", "contradiction")[label]

    def qnli(self, label):  # does the sentence have what the question is about?
        sentence, _, _, foreign = self.draw()
        topic = max(re.findall(r"\w+", sentence), key=len)
        return f"What is said about {topic}?", foreign if label else sentence, ("entailment", "not_entailment")[label]

    def rte(self, label):  # do the two follow each other?
        first, second, _, foreign = self.draw()
        return first, foreign if label else second, ("entailment", "not_entailment")[label]


EXAMPLES = {  # task: method, number of labels
    "cola": (Examples.cola, 2), "sst2": (Examples.sst2, 2), "mrpc": (Examples.mrpc, 2), "qqp": (Examples.qqp, 2),
    "stsb": (Examples.stsb, 6), "mnli": (Examples.mnli, 3), "qnli": (Examples.qnli, 2), "rte": (Examples.rte, 2),
}


def write_standin(folder, texts, seed=0, train=400, dev=150):
    """Write the eight tasks under `folder`, made from `texts` (whole documents); the same input gives the same files.

    train, dev: rows a file at most (repetitions are left out), as many of each label. No document serves both training
    and development, nor both of MNLI's development files. Raises UserError when too few documents have three sentences.
    """
    documents = [found for found in map(sentences, texts) if len(found) >= 3]
    if len(documents) < 20:
        raise UserError(f"the stand-in needs 20 documents of three sentences, not {len(documents)}: give it more text")
    random.Random(seed).shuffle(documents)
    at = [len(documents) * tenths // 10 for tenths in (6, 8)]
    parts = {"train": documents[: at[0]], "dev": documents[at[0] :],
             "dev_matched": documents[at[0] : at[1]], "dev_mismatched": documents[at[1] :]}
    for name, layout in LAYOUTS.items():
        example, labels = EXAMPLES[name]
        for split in ("train", "dev_matched", "dev_mismatched") if name == "mnli" else ("train", "dev"):
            rng = random.Random(f"{seed} {layout.folder} {split}")
            examples, size = Examples(parts[split], rng), train if split == "train" else dev
            drawn = []
            for label in range(labels):
                known, found = set(drawn), dict.fromkeys(example(examples, label) for _ in range(3 * size))
                drawn += [cells for cells in found if cells not in known][: size // labels]
            if name != "stsb":  # as many of each label as of the rarest
                kinds = [[cells for cells in drawn if cells[2] == kind] for kind in dict.fromkeys(c[2] for c in drawn)]
                drawn = [cells for kind in kinds for cells in kind[: min(map(len, kinds))]]
            rng.shuffle(drawn)
            rows = [layout.columns] if layout.headed else []
            for i, (*texts, label) in enumerate(drawn):  # the other columns hold the row's number
                filled = dict(zip(layout.text, texts, strict=False)) | {layout.label: label}
                rows.append([filled.get(column, str(i)) for column in layout.columns])
            path = Path(folder) / layout.folder / f"{split}.tsv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic(path) as file:
                mark = "\ufeff" if name == "mrpc" else ""
                file.write((mark + "\n".join(map("\t".join, rows)) + "\n" * layout.headed).encode())


def standin(parent, source, **sizes):
    """The folder in `parent` with the stand-in of a source's held-out documents; written where it is not there yet.

    Another text, other sizes (see write_standin) or a change of this file give another folder.
    """
    identity = json.dumps([source.id, sizes, Path(__file__).read_text("utf-8")], sort_keys=True)
    folder = Path(parent) / f"standin-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
    with disk_errors(folder):
        if not (folder / "done").exists():
            write_standin(folder, [text for _, text in source.documents("validation")], **sizes)
            (folder / "done").touch()
    return folder
