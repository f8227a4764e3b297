"""Documents to train on, from three kinds of source.

    prose           the English documentation that came with Python, numpy and torch, about 8 MB: needs no network
    slimpajama      the paper's corpus, streamed over HTTP page by page
    a path          a .txt or .jsonl file, plain or .gz or .xz

A source has an `id` (a dict for JSON: which text this is, exactly) and `documents(split, start)`, which yields
(row, text) in an order that never changes, from row `start` on, so that an interrupted preparation goes on at its row.
"""

import gzip
import hashlib
import inspect
import io
import json
import lzma
import platform
import pydoc_data.topics
import re
import sysconfig
import time
import zlib
from functools import partial
from pathlib import Path

import numpy
import requests
import torch

from runtime.files import UserError, disk_errors, open_regular
from runtime.http import Failed, Refused, get, repeat


def open_source(name):
    """The source called `name`: "prose", "slimpajama", or the path of a .txt or .jsonl file (plain, .gz or .xz).

    Raises UserError when there is no such source, or no text in it.
    """
    if name == "prose":
        return Prose()
    if name == "slimpajama":
        return SlimPajama()
    return TextFile(name)


# ---- which documents are held out ----------------------------------------------------------------------------------


def divide(texts, split, start):
    """Yield the (row, text) of one split of a source that has no official one, from row `start` on.

    The side is a function of the text alone, so that copies of a document never land on both sides: about 2% of all
    texts, by their sha256, are validation. The first document and its copies are, too: validation is never empty.
    """
    first = None
    for row, text in enumerate(texts):
        first = text if first is None else first
        if row >= start:
            digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
            held_out = text == first or int.from_bytes(digest[:4], "big") < 0.02 * 2**32
            if held_out == (split == "validation"):
                yield row, text


# ---- prose: what is installed anyway -------------------------------------------------------------------------------


class Prose:
    """The help topics of pydoc, and the docstrings of the standard library, numpy and torch."""

    TRIPLE_QUOTED = re.compile(r'("""|\'\'\')(.*?)\1', re.DOTALL)  # finds docstrings ten times as fast as ast does
    NOT_PROSE = {"site-packages", "dist-packages", "test", "tests", "testing", "idlelib", "lib2to3", "_vendor"}

    def __init__(self):
        self.id = {"source": "prose", "python": platform.python_version(), "numpy": numpy.__version__,
                   "torch": str(torch.__version__)}

    def documents(self, split, start=0):
        """Yield (row, text) of "train" or "validation" from row `start` on."""
        return divide(self._texts(), split, start)

    def _texts(self):
        seen = set()
        for text in self._candidates():
            text = inspect.cleandoc(text)
            if text not in seen and self._english(text):
                seen.add(text)
                yield text

    def _candidates(self):
        topics = pydoc_data.topics.topics
        yield from (topics[name] for name in sorted(topics))
        for root in (sysconfig.get_path("stdlib"), Path(numpy.__file__).parent, Path(torch.__file__).parent):
            for path in sorted(Path(root).rglob("*.py")):
                if not self.NOT_PROSE & set(path.relative_to(root).parts):
                    for match in self.TRIPLE_QUOTED.finditer(path.read_text("utf-8", "replace")):
                        yield match[2]

    @staticmethod
    def _english(text):
        """Long enough to teach something, and mostly words: drops tables, code templates and figures of characters."""
        letters = sum(map(str.isalpha, text))
        return len(text) >= 200 and letters + text.count(" ") >= 0.8 * len(text) and letters >= 0.6 * len(text)


# ---- a file --------------------------------------------------------------------------------------------------------


class TextFile:
    """Documents of a .txt file (cut at blank lines) or a .jsonl file (the "text" field of each line)."""

    OPEN = {"": lambda file: file, ".gz": gzip.open, ".xz": lzma.open}  # from the file of the packed bytes

    def __init__(self, path):
        """Raises UserError when the file is missing, a folder, unreadable, of an unknown kind, or without text."""
        self.path = path = Path(path)
        packing = path.suffix if path.suffix in self.OPEN else ""
        self.open = self.OPEN[packing]
        self.kind = Path(path.name.removesuffix(packing)).suffix
        with disk_errors(path):  # a loop of links, a name too long
            if path.is_dir():
                raise UserError(f"{path} is a folder: give --data one .txt or .jsonl file (plain, .gz or .xz)")
            if not path.exists():
                raise UserError(f"there is no data {str(path)!r}: give prose, slimpajama, or a .txt or .jsonl file")
        if self.kind not in (".txt", ".jsonl"):
            raise UserError(f"{path} is neither .txt nor .jsonl (plain, .gz or .xz): rename or convert it")
        size, digest = self._digest()
        self.id = {"source": path.name, "bytes": size, "sha256": digest}
        if not any(text.strip() for text in self._texts()):
            raise UserError(f"{path} holds no text: give a file with documents in it")

    def _digest(self):
        """-> (bytes, sha256 of the first and the last MB): tells files apart without reading 100 GB each time."""
        with open_regular(self.path) as file:
            digest = hashlib.sha256(file.read(2**20))
            size = file.seek(0, io.SEEK_END)
            file.seek(max(0, size - 2**20))
            digest.update(file.read(2**20))
        return size, digest.hexdigest()

    def documents(self, split, start=0):
        """Yield (row, text) of "train" or "validation" from row `start` on.

        Raises UserError at bytes that are not UTF-8, at a .jsonl line without a text, and at a damaged archive.
        """
        return divide(self._texts(), split, start)

    def _texts(self):
        try:
            with open_regular(self.path) as packed, self.open(packed) as file:
                yield from self._lines(file) if self.kind == ".jsonl" else self._pieces(file)
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            raise UserError(f"{self.path} cannot be read to its end ({error}): it is damaged, get it again") from None

    def _lines(self, file):
        for number, line in enumerate(file, 1):
            where = f"{self.path}, line {number}"
            try:
                line = line.decode("utf-8-sig").strip()
                row = json.loads(line) if line else {"text": ""}
            except UnicodeDecodeError as error:
                raise UserError(f"{where} is not UTF-8 ({error.reason}): convert the file") from None
            except (ValueError, RecursionError):  # the latter: nested too deeply
                raise UserError(f"{where} is not JSON: fix or delete that line") from None
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise UserError(f'{where} has no string "text": fix or delete that line')
            if row["text"].strip():
                yield row["text"]

    def _pieces(self, file):
        """Cut at a blank line once a document has 2,000 characters, at any line's end once it has 8,000."""
        piece = ""
        lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")  # newline="": characters stay as they are
        try:
            while line := lines.readline(8000):  # a file may be one line of many GB
                piece += line
                if len(piece) >= 8000 or len(piece) >= 2000 and not line.strip():
                    yield piece
                    piece = ""
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path} is not UTF-8 ({error.reason}): convert the file") from None
        if piece:
            yield piece


# ---- SlimPajama over HTTP ------------------------------------------------------------------------------------------

ROWS_URL = "https://datasets-server.huggingface.co/rows"
DATASET = "DKYoon/SlimPajama-6B"
PAGE = 100  # rows a request, the server's limit
PACE, BURST = 0.65, 30  # seconds a request after the first 30: at most 491 in 5 minutes, where about 500 are allowed
GIVE_UP = 15 * 60  # seconds of nothing but failure


class SlimPajama:
    """The 6B-token sample of SlimPajama: 5,489,000 training documents, 9,347 for validation."""

    def __init__(self):
        self.id = {"source": "slimpajama", "dataset": DATASET, "config": "default"}
        self.session = requests.Session()
        self.length = PAGE  # rows to ask for
        self.paid = 0.0  # the time up to which requests have used their share of the server's patience

    def documents(self, split, start=0):
        """Yield (row, text) of "train" or "validation" from row `start` on: each row once, none left out.

        Raises UserError when the server refuses a request, or after 15 minutes of nothing but failure.
        """
        row, count = start, None
        while count is None or row < count:
            try:
                texts, count = repeat(partial(self._page, split, row, count), "SlimPajama", seconds=GIVE_UP)
            except Refused as error:
                raise UserError(f"SlimPajama's server refused row {row:,} of {split} for good ({error}): "
                                "give --data prose or a file instead") from None
            except Failed as error:
                raise UserError(f"SlimPajama did not come for too long, at row {row:,} of {split} (last: {error}): "
                                "check the network and run the same command again, it goes on at that row") from None
            for text in texts:
                yield row, text
                row += 1

    def _page(self, split, offset, count):
        """-> (texts, rows in the whole split). count: the latter as an earlier page had it, or None.

        Raises what `repeat` repeats.
        """
        now = time.monotonic()
        self.paid = max(self.paid, now) + PACE
        time.sleep(max(0.0, self.paid - now - BURST * PACE))
        query = {"dataset": DATASET, "config": "default", "split": split, "offset": offset, "length": self.length}
        try:
            answer = get(ROWS_URL, self.session, params=query)
        except Failed as error:
            if error.answer.headers.get("X-Error-Code") == "TooBigContentError":
                self.length = max(1, self.length // 2)
            raise
        try:
            page = answer.json()
            known, rows = page["num_rows_total"], page["rows"]
            texts = [row["row"]["text"] for row in rows]
            numbers = [row["row_idx"] for row in rows]
            whole = all(isinstance(text, str) for text in texts) and not any(row.get("truncated_cells") for row in rows)
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Failed(f"an answer of another form ({error!r})") from None
        if not isinstance(known, int) or known < max(1, offset) or known != (count or known):
            raise Failed(f"a split of {known} rows, after {count}")
        due = min(self.length, max(0, known - offset))
        if numbers != list(range(offset, offset + due)) or not whole:  # a short page would skip rows silently
            raise Failed(f"{len(rows)} rows where {due} whole ones from {offset} on were due")
        self.length = PAGE
        return texts, known
