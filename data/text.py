"""Text for pre-training, in the order in which it happens:

    documents -> a shuffled window of 50,000 -> tokens, EOS after each document -> train.bin, uint16

There are three kinds of text:

    prose           the English documentation that came with Python, numpy and torch, about 8 MB: needs no network
    slimpajama      the paper's corpus, streamed over HTTP page by page
    a path          a .txt or .jsonl file (plain, .gz or .xz), or a folder of such files

No document is truncated, and no token is lost or repeated: block i is the tokens i*T … (i+1)*T of the file. A thread
appends whole windows while training reads what is there. train.json says how many tokens are valid, and it is renamed
into place after they are on the disk. So a kill costs one window, and the next preparation ends with the same bytes.
"""

import gzip
import hashlib
import inspect
import io
import json
import os
import platform
import pydoc_data.topics
import random
import re
import sysconfig
import threading
import time
import zlib
from functools import cache as cached
from pathlib import Path

import numpy as np
import requests
import torch

from common import UserError, atomic, lock, read_json, say, write_json
from data.tokenizer import EOS, TRAINING_CHARACTERS, Tokenizer

CACHE = Path(__file__).parent / "cache"
BUFFER = 50_000  # documents that are shuffled together (section 4.1)
WINDOW_CHARACTERS = 2**28  # and no more characters than this, so that a window fits the memory
HELD_OUT_TOKENS = 131_072  # of the held-out documents the first so many, the last one whole; the rest is unused
FORMAT = 3  # part of the cache's name: raise it when the same documents would give other bytes

# ---- documents -----------------------------------------------------------------------------------------------------

KINDS = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz", ".txt.xz", ".jsonl.xz")
LONGEST_LINE = 64_000_000  # bytes of a .jsonl line, characters of a .txt document


def kind_of(path):
    """".jsonl.xz" of "a.b.jsonl.xz"; "" where there is no such kind."""
    for kind in KINDS:
        if path.name.endswith(kind):
            return kind
    return ""


def files_of(data):
    """The files of a path, a folder's in the order of their names. Raises UserError where one cannot be read."""
    path = Path(data)
    if not path.exists():
        raise UserError(f"there is no text {data!r}: give prose, slimpajama, a .txt or .jsonl file, or a folder")
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if not file.name.startswith("."))
        if not files:
            raise UserError(f"the folder {path} is empty: give one with .txt or .jsonl files")
    for file in files:
        if file.name.endswith(".csv"):
            raise UserError(f"{file} is .csv: convert it with python -c \"import csv, json, sys; [print(json.dumps("
                            "{'text': row['text']})) for row in csv.DictReader(sys.stdin)]\" < FILE.csv > FILE.jsonl")
        if not kind_of(file) or not file.is_file():
            raise UserError(f"{file} is neither a .txt nor a .jsonl file (also .gz, .xz): convert it or move it away")
    return files


def identify(data):
    """What a text is, as a dict for JSON: of files, their kinds and sha256, not their names.

    Raises UserError where there is no such text.
    """
    if data == "prose":
        return {"text": "prose", "python": platform.python_version(), "numpy": np.__version__,
                "torch": str(torch.__version__)}
    if data == "slimpajama":
        return {"text": DATASET}
    digest, size = hashlib.sha256(), 0
    for path in files_of(data):
        with open(path, "rb") as file:
            digest.update(f"{kind_of(path)} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
            size += file.tell()
    return {"text": "files", "bytes": size, "sha256": digest.hexdigest()}


def documents(data, split, start=0, rule=None):
    """Yield (row, text) of "train" or "held-out" from row `start` on, in an order that never changes.

    rule: what choose_held_out() gave; SlimPajama needs none.
    """
    if data == "slimpajama":
        yield from slimpajama("train" if split == "train" else "validation", start)
        return
    for row, text in enumerate(all_documents(data)):
        if row >= start and is_held_out(text, rule) == (split == "held-out"):
            yield row, text


def all_documents(data):
    """All documents of the prose, or of files."""
    return prose() if data == "prose" else file_documents(data)


def digest_of(text):
    """A number from 0 to 2**64 - 1 that looks random and depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8])


def choose_held_out(data):
    """The rule that holds documents out: {"longest": characters, "threshold": digest, "never": digests}.

    It is a function of the text alone, so that no copy of a held-out document is trained on. It looks at a sample: the
    first 4,000,000 characters, or as many as hold 51 different documents. Some 2% of the sample is held out, less where
    that would take more than a fifth of its documents. Never more than a fifth of the sample is, however long or
    frequent a document is. What follows is judged by the same rule. Raises UserError where no document is short enough.
    """
    sizes, total = {}, 0  # a document's characters, those of its copies included
    for text in all_documents(data):
        digest = digest_of(text)
        sizes[digest] = sizes.get(digest, 0) + len(text)
        total += len(text)
        if total >= TRAINING_CHARACTERS and len(sizes) > 50:
            break
    if not total:
        raise UserError(f"{data} holds no text: give a file with documents in it")
    rule, held = {"longest": int(0.18 * total), "threshold": -1, "never": []}, 0
    for digest in sorted(sizes):
        if held >= 0.02 * total or held and digest > 2**64 // 5:  # beyond it are four fifths of all documents
            break
        if sizes[digest] <= rule["longest"]:
            held += sizes[digest]
            rule["threshold"] = digest
        else:
            rule["never"].append(digest)
    if not held:
        raise UserError(f"{data} has no document below a fifth of its text that could be held out: give more and "
                        "shorter ones, some 50,000 characters in all; in a .txt a line <|endoftext|> ends one")
    return rule


def is_held_out(text, rule):
    """Whether a document is for validation and not for training."""
    digest = digest_of(text)
    return digest <= rule["threshold"] and len(text) <= rule["longest"] and digest not in rule["never"]


@cached
def prose():
    """The help topics of pydoc and the docstrings of the standard library, numpy and torch, each once."""
    triple_quoted = re.compile(r'("""|\'\'\')(.*?)\1', re.DOTALL)  # finds docstrings ten times as fast as ast does
    no_prose = {"site-packages", "dist-packages", "test", "tests", "testing", "idlelib", "lib2to3", "_vendor"}
    topics = pydoc_data.topics.topics
    candidates = [topics[name] for name in sorted(topics)]
    for root in (sysconfig.get_path("stdlib"), Path(np.__file__).parent, Path(torch.__file__).parent):
        for path in sorted(Path(root).rglob("*.py")):
            if not no_prose & set(path.relative_to(root).parts):
                candidates += [match[2] for match in triple_quoted.finditer(path.read_text("utf-8", "replace"))]
    found = {}
    for text in candidates:
        text = inspect.cleandoc(text)
        letters = sum(map(str.isalpha, text))
        words = letters + text.count(" ")  # drops tables, templates of code, and figures made of characters
        if len(text) >= 200 and words >= 0.8 * len(text) and letters >= 0.6 * len(text):
            found[text] = None
    return list(found)


def file_documents(data):
    """Yield the documents of a file or folder: the "text" of each .jsonl line, the parts of a .txt.

    Raises UserError at bytes that are not UTF-8, at a .jsonl line without a text, and at a damaged archive.
    """
    for path in files_of(data):
        kind, opener = kind_of(path), open
        if kind.endswith(".gz"):
            opener = gzip.open
        elif kind.endswith(".xz"):
            try:
                import lzma
            except ImportError:
                raise UserError(f"this Python has no lzma, which {path} needs: unpack the file first") from None
            opener = lzma.open
        try:
            with opener(path, "rb") as file:
                yield from json_lines(file, path) if ".jsonl" in kind else text_documents(file, path)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 ({error.reason}): convert the file") from None
        except UserError:
            raise
        except Exception as error:  # each kind of archive has errors of its own
            raise UserError(f"{path} cannot be read to its end ({error}): it is damaged, get it again") from None


def json_lines(file, path):
    """Yield the "text" of each line of a .jsonl file; blank ones are left out."""
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        where = f"{path}, line {number}"
        if len(line) > LONGEST_LINE:
            raise UserError(f"{where} is longer than {LONGEST_LINE:,} bytes: cut that document")
        line = line.decode("utf-8-sig").strip()
        try:
            row = json.loads(line) if line else {"text": ""}
        except (ValueError, RecursionError):  # the latter: nested too deeply
            raise UserError(f"{where} is not JSON: fix or delete that line") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise UserError(f'{where} has no string "text": fix or delete that line')
        if row["text"].strip():
            yield row["text"]


def text_documents(file, path):
    """Yield the documents of a .txt file, which end at a line that is <|endoftext|>, as in TinyStories.

    Blank ones are left out. A file without such a line in its first MiB is also cut at a blank line once a document has
    2,000 characters. Once it has 8,000 it is cut at the next line's end, or inside a line of more than 8,000.
    """
    marked = re.search(rb"^<\|endoftext\|>\s*$", file.read(2**20), re.MULTILINE)
    file.seek(0)
    lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")  # newline="": characters stay as they are
    piece, size = [], 0
    while line := lines.readline(8000):  # a file may be one line of many GB
        if "\0" in line:
            raise UserError(f"{path} is not UTF-8 (it has NUL characters): convert the file")
        ends = line.strip() == EOS
        if not ends:
            piece.append(line)
            size += len(line)
        if not marked:
            ends = ends or size >= 8000 or size >= 2000 and not line.strip()
        if ends or size >= LONGEST_LINE:
            text = "".join(piece)
            if text.strip():
                yield text
            piece, size = [], 0
    text = "".join(piece)
    if text.strip():
        yield text


# ---- SlimPajama over HTTP ------------------------------------------------------------------------------------------

ROWS_URL = "https://datasets-server.huggingface.co/rows"
DATASET = "DKYoon/SlimPajama-6B"
PAGE = 100  # rows a request, the server's limit
PACE, BURST = 0.65, 30  # seconds a request after the first 30: at most 491 in 5 minutes, where about 500 are allowed
GIVE_UP = 15 * 60  # seconds of nothing but failure
LONGEST_PAUSE = 60.0  # seconds, whatever a server's Retry-After asks for


def get(url, most, seconds=600, **arguments):
    """The body of an HTTP answer of at most `most` bytes within `seconds`.

    arguments: those of requests.get. Raises what requests and urllib3 raise, with `.response` where the server refused.
    """
    begun, body = time.monotonic(), bytearray()
    with requests.get(url, timeout=(10, 60), stream=True, **arguments) as answer:
        answer.raise_for_status()
        while chunk := answer.raw.read1(2**16, decode_content=True):  # what has come, however little it is
            body += chunk
            if len(body) > most or time.monotonic() > begun + seconds:
                raise requests.RequestException(f"the answer had more than {most:,} bytes, or took {seconds} s")
    return bytes(body)


def headers_of(error):
    """The headers of the answer that an exception brings along, if it brings one."""
    response = getattr(error, "response", None)
    return {} if response is None else response.headers  # an answer that tells of a failure is false


def refused(error):
    """Whether an error says that a server refuses for good: asking again has no use."""
    response = getattr(error, "response", None)
    if response is None:
        return False
    return 400 <= response.status_code < 500 and response.status_code not in (408, 429)


def pause(error, attempt):
    """Wait before the next attempt (from 1): exponential backoff with jitter, and what Retry-After asks for, capped."""
    wait = random.uniform(0, 2 ** min(attempt - 1, 6))
    asked = headers_of(error).get("Retry-After", "0")  # seconds, or a date
    wait += float(asked) if asked.isdecimal() else LONGEST_PAUSE
    time.sleep(min(wait, LONGEST_PAUSE))


def slimpajama(split, start):
    """Yield (row, text) of SlimPajama's "train" or "validation" from row `start` on: each row once, none left out.

    Raises UserError when the server refuses a request, or after 15 minutes of nothing but failure.
    """
    row, rows, length = start, None, PAGE
    failures, worked, paid = 0, time.monotonic(), 0.0
    while rows is None or row < rows:
        now = time.monotonic()
        paid = max(paid, now) + PACE  # the time up to which requests have used their share of the server's patience
        time.sleep(max(0.0, paid - now - BURST * PACE))
        query = {"dataset": DATASET, "config": "default", "split": split, "offset": row, "length": length}
        try:
            page = json.loads(get(ROWS_URL, 100_000_000, params=query))
            known = page["num_rows_total"]
            due = list(range(row, min(row + length, known)))
            texts = [entry["row"]["text"] for entry in page["rows"]]
            numbers = [entry["row_idx"] for entry in page["rows"]]
            cut = any(entry.get("truncated_cells") for entry in page["rows"])
            if known < max(1, row):
                raise ValueError(f"a text of {known} rows, and row {row} was due")
            if rows not in (None, known):
                raise ValueError(f"a text of {known} rows, which had {rows} before")
            if cut or numbers != due:
                raise ValueError(f"{len(texts)} rows of {known} where {len(due)} whole ones from {row} on were due")
            if not all(isinstance(text, str) for text in texts):
                raise ValueError("a row without a text")
        except Exception as error:  # whatever an attempt raises is a failed attempt
            if refused(error):
                raise UserError(f"SlimPajama's server refused row {row:,} of {split} for good ({error}): give --data "
                                "prose or a file instead") from None
            if time.monotonic() > worked + GIVE_UP:
                raise UserError(f"SlimPajama did not come for too long, at row {row:,} of {split} ({error!r:.90}): "
                                "check the network and run the same command again, it goes on") from None
            if headers_of(error).get("X-Error-Code") == "TooBigContentError":
                length = max(1, length // 2)
            failures += 1
            if failures == 3:
                say(f"SlimPajama: {error!r:.90}; trying again")
            pause(error, failures)
            continue
        rows, length, failures, worked = known, PAGE, 0, time.monotonic()
        for text in texts:
            yield row, text
            row += 1


# ---- packed tokens -------------------------------------------------------------------------------------------------


def prepare(data, tokenizer, want_tokens, seed=42, cache=CACHE, shuffle_buffer=BUFFER, expected=None):
    """(Tokenizer, training Tokens, held-out Tokens) of a text, from the cache or growing into it.

    tokenizer: "gpt2", or "bpe" for 4,096 tokens trained on the text itself, or a Tokenizer. Returns as soon as the
    held-out text is complete; the training tokens follow in a thread, up to `want_tokens` of them or whatever is read
    beyond. expected: the `identity` that training Tokens once had, or None. Raises UserError when text or cache are
    unfit, or the text is not the expected one.
    """
    name = tokenizer
    if isinstance(tokenizer, Tokenizer):
        name = tokenizer.fingerprint
        if tokenizer.size > 2**16:
            raise UserError(f"the tokenizer has {tokenizer.size:,} tokens, and packed text holds 65,536: use a smaller "
                            "one")
    identity = {"format": FORMAT, **identify(data), "tokenizer": name, "seed": seed, "shuffle_buffer": shuffle_buffer}
    if expected and expected != identity:
        changed = next(key for key in identity if expected.get(key) != identity[key])
        raise UserError(f"the text {data} is not the one that the run began with ({changed} was "
                        f"{expected.get(changed)}, now {identity[changed]}): put it back, or name another --out")
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(cache) / f"{re.sub(r'[^a-zA-Z0-9.-]+', '_', Path(data).name)[:40]}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)

    if tokenizer == "gpt2":
        tokenizer = Tokenizer.gpt2()
    said = False
    while not (folder / "held-out.json").exists():
        with lock(folder / "lock") as mine:
            if mine:
                start_cache(data, tokenizer, folder)
                continue
        if not said:
            say("another process is preparing the text")
        said = True
        time.sleep(0.2)
    if tokenizer == "bpe":
        tokenizer = Tokenizer.load(folder / "tokenizer")

    held = Tokens(folder / "held-out", seed)
    train = Tokens(folder / "train", seed)
    train.source = (data, tokenizer, shuffle_buffer, held.state["rule"])
    train.identity = identity
    train.want(want_tokens)
    return tokenizer, train, held


def start_cache(data, tokenizer, folder):
    """Write the tokenizer and the held-out tokens of a new cache."""
    say("preparing the text")
    rule = None if data == "slimpajama" else choose_held_out(data)
    if tokenizer == "bpe":
        tokenizer = Tokenizer.train(text for _, text in documents(data, "train", 0, rule))
        (folder / "tokenizer").mkdir(exist_ok=True)
        tokenizer.save(folder / "tokenizer", 1024)
    ids = []
    for _, text in documents(data, "held-out", 0, rule):
        ids += tokenizer.encode(text) + [tokenizer.eos]
        if len(ids) >= HELD_OUT_TOKENS:
            break
    content = np.array(ids, np.uint16).tobytes()
    with atomic(folder / "held-out.bin") as file:
        file.write(content)
    state = {"tokens": len(ids), "crc": zlib.crc32(content), "done": True, "rule": rule}
    write_json(folder / "held-out.json", state)


class Tokens:
    """The tokens of a packed text in blocks of T. Those for training may still grow, in a thread of this process.

    state: tokens (how many are valid), crc (zlib.crc32 of their bytes), done (the text has no more); of training
    tokens also rows (of the text that are packed) and windows (how many they made), of held-out ones the rule.
    """

    def __init__(self, path, seed):
        """path: without suffix. Raises UserError where the file is damaged."""
        self.bin, self.json = Path(f"{path}.bin"), Path(f"{path}.json")
        self.seed = seed
        self.state = {"tokens": 0, "crc": 0, "done": False, "rows": 0, "windows": 0}
        self.wanted, self.waiting = 0, 0
        self.source = self.thread = self.error = None
        self.check = lambda: None  # called while waiting for tokens; what it raises ends the wait
        if self.bin.is_symlink() or self.json.is_symlink():
            raise UserError(f"{self.bin} or {self.json.name} is a link, which is not followed: remove it")
        self.refresh()
        crc, left = 0, 2 * self.state["tokens"]
        if left and self.bin.exists():
            with open(self.bin, "rb") as file:
                while left and (chunk := file.read(min(left, 2**24))):
                    crc = zlib.crc32(chunk, crc)
                    left -= len(chunk)
        if left or crc != self.state["crc"]:
            raise UserError(f"{self.bin} is damaged: delete the folder {self.bin.parent} and run again")

    def refresh(self):
        """Read again how many tokens there are: another process may be packing."""
        if self.json.exists():
            self.state = read_json(self.json)

    # ---- packing ----

    def want(self, tokens):
        """Let a thread pack up to that many tokens. Raises what stopped it, if something did."""
        self.wanted = max(self.wanted, tokens)
        if self.error:
            raise self.error
        if not self.ready(self.wanted) and (self.thread is None or not self.thread.is_alive()):
            self.thread = threading.Thread(target=self._pack, daemon=True)
            self.thread.start()

    def ready(self, tokens):
        """Whether there are that many tokens, or all there will ever be."""
        return self.state["tokens"] >= tokens or self.state["done"]

    def _pack(self):
        try:
            with lock(self.bin.with_name("lock")) as mine:
                self.refresh()
                while mine and not self.ready(self.wanted):
                    self._append_window()
        except BaseException as error:  # whatever it is (tiktoken's panics are no Exception), the reader raises it
            if isinstance(error, OSError):
                error.filename = error.filename or str(self.bin)  # a write's error does not say where
            self.error = error

    def _append_window(self):
        """Fill a window with documents, shuffle it, append its tokens, and then say so."""
        data, tokenizer, shuffle_buffer, rule = self.source
        # what is stored, not self.state: a reader may just have put back an older one
        state = read_json(self.json) if self.json.exists() else dict(self.state)
        texts, size, last = [], 0, True
        for row, text in documents(data, "train", state["rows"], rule):
            texts.append(text)
            size += len(text)
            self.waiting = len(texts)
            state["rows"] = row + 1
            if len(texts) >= shuffle_buffer or size >= WINDOW_CHARACTERS:
                last = False
                break
        order = np.random.default_rng([self.seed, state["windows"]]).permutation(len(texts))
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW  # a planted link could lead to another file
        with open(os.open(self.bin, flags, 0o644), "ab") as file:
            file.truncate(2 * state["tokens"])  # what a killed process wrote without recording it
            share = max(1, min(1000, len(texts) * 2**22 // (size + 1)))  # documents of 4M characters: books are long
            for begin in range(0, len(texts), share):
                ids = []
                for encoded in tokenizer.encode_many([texts[i] for i in order[begin:begin + share]]):
                    ids += encoded
                    ids.append(tokenizer.eos)
                content = np.array(ids, np.uint16).tobytes()
                file.write(content)
                state["tokens"] += len(ids)
                state["crc"] = zlib.crc32(content, state["crc"])
            file.flush()
            os.fsync(file.fileno())
        state["windows"] += 1
        state["done"] = last
        write_json(self.json, state)
        self.state, self.waiting = state, 0

    # ---- reading ----

    def blocks(self, block_size):
        """How many blocks of `block_size` tokens there are by now. A shorter tail is never used."""
        return self.state["tokens"] // block_size

    def epoch(self, number, block_size):
        """How often the whole text was read before block `number`."""
        return number // self.blocks(block_size) if self.state["done"] else 0

    def read(self, first, count, block_size):
        """The blocks number first ... first+count-1, (count, block_size) torch.long. Waits until they are packed.

        Depends on nothing but its arguments, so that a resumed run needs no state, and ranks can share an update. When
        the text has ended, each further epoch reads all blocks again, in an order drawn from (seed, epoch). Raises
        UserError when there are fewer than `count` blocks in all, and what stopped the packing.
        """
        said, line = time.monotonic(), None
        while not self.ready((first + count) * block_size):
            self.want((first + count) * block_size)
            status = f"packing the text: {self.state['tokens']:,} tokens are ready"
            if self.waiting:
                status = f"packing the text: {self.waiting:,} documents are in the next window"
            if time.monotonic() > said + 5 and status != line:
                said, line = time.monotonic(), status
                say(status)
            self.check()
            time.sleep(0.02)
            self.refresh()
        n = self.blocks(block_size)
        if n < count:
            raise UserError(f"the text has {n} blocks of {block_size} tokens, too few for {count} sequences at once: "
                            "give --data more text, or use a smaller --batch-size or --block-size")
        try:
            tokens = np.memmap(self.bin, np.uint16, "r", shape=(self.state["tokens"],))
        except OSError:  # a file system without mmap
            tokens = np.fromfile(self.bin, np.uint16, self.state["tokens"])
        blocks, orders = np.empty((count, block_size), np.int64), {}
        for i in range(count):
            epoch, number = divmod(first + i, n)  # while the text grows, first + count is at most n: the epoch is 0
            if epoch:
                if epoch not in orders:
                    orders[epoch] = np.random.default_rng([self.seed, epoch]).permutation(n)
                number = orders[epoch][number]
            blocks[i] = tokens[number * block_size:(number + 1) * block_size]
        return torch.from_numpy(blocks)
