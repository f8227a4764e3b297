"""Packed blocks: the token file that training reads.

    source -> window of 50,000 documents, shuffled -> tokens, EOS after each document -> train.bin, uint16

A document is never truncated, and no token is lost or repeated: block i is tokens i*T … (i+1)*T of the file. The file
grows in a background thread while training reads what is there already. train.json beside it says how far it is valid;
it is renamed into place after the data it speaks of are on the disk, so that after `kill -9` at any moment the next
preparation goes on, and ends with the same bytes. Beside them window.spool holds the documents of the
unfinished window as they arrived, so that none has to be fetched twice.
"""

import hashlib
import json
import os
import re
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import torch

from data.sources import open_source
from data.tokenizer import Tokenizer
from runtime.files import UserError, atomic, disk_errors, lock, lock_unless, open_regular, parse_json, remove_partials

CACHE = Path(__file__).parent / "cache"
BUFFER = 50_000  # documents that are shuffled together (paper, appendix A)
VALIDATION_TOKENS = 131_072
CHUNK = 1_000  # documents tokenized, written and synced at a time
FORMAT = 1  # part of the cache's name: raise it when the same documents would give other bytes


def prepare(source, tokenizer, want_tokens, seed=42, cache=CACHE, shuffle_buffer=BUFFER,
            validation_tokens=VALIDATION_TOKENS, say=print):
    """-> (Tokenizer, train Blocks, validation Blocks) of a source, from the cache or growing into it.

    source: see open_source(); tokenizer: "gpt2", or "bpe" for 4,096 tokens trained on the source itself. Returns as
    soon as validation is complete; the training tokens follow in a background thread, up to `want_tokens` of them (or
    whatever read() asks for beyond). Validation takes whole documents until it has `validation_tokens`, and none of
    its documents, nor any other held-out one, is in train. say: called with a line of text while there is something to
    wait for. Raises UserError when the source or the cache is unfit.
    """
    source = open_source(source)
    identity = {"format": FORMAT, **source.id, "tokenizer": tokenizer, "seed": seed, "shuffle_buffer": shuffle_buffer,
                "validation_tokens": validation_tokens}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    folder = Path(cache) / (re.sub(r"[^\w.-]+", "_", source.id["source"])[:60] + f"-{tokenizer}-seed{seed}-{digest}")
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)

    ready = (folder / "validation.json").exists
    with disk_errors(folder), lock_unless(ready, folder / "lock", say, "another process is preparing the data") as ours:
        if ours:
            remove_partials(folder)
            prepare_validation(source, tokenizer, folder, identity, say)
    tokenizer = Tokenizer.gpt2() if tokenizer == "gpt2" else Tokenizer.load(folder / "tokenizer")
    identity["fingerprint"] = tokenizer.fingerprint

    stream = Stream(source, tokenizer, folder, identity)
    stream.want(want_tokens)
    validation = Blocks(PackedFile(folder / "validation", identity), seed, say)
    return tokenizer, Blocks(stream.file, seed, say, stream), validation


def prepare_validation(source, tokenizer, folder, identity, say):
    """Write the tokenizer and the validation file of a new cache."""
    if tokenizer == "bpe":
        say("training a tokenizer on the text")
        tokenizer = Tokenizer.train(text for _, text in source.documents("train"))
        (folder / "tokenizer").mkdir(exist_ok=True)
        tokenizer.save(folder / "tokenizer")
    else:
        tokenizer = Tokenizer.gpt2()
    say("preparing the validation text")
    ids = []
    for _, text in source.documents("validation"):
        ids += tokenizer.encode(text) + [tokenizer.eos]
        if len(ids) >= identity["validation_tokens"]:
            break
    file = PackedFile(folder / "validation", identity | {"fingerprint": tokenizer.fingerprint}, new=True)
    file.append(ids, done=True)


# ---- a file of tokens ----------------------------------------------------------------------------------------------


class PackedFile:
    """NAME.bin, uint16 tokens one after the other, and NAME.json, which says what they are and how many are valid.

    state: tokens (how many), crc (zlib.crc32 of their bytes), done (the source has no more), and for train how far the
    preparation is: rows (of the source, before the current window), window (its number), filled (its documents, once
    it is full, else 0), drained (those of them already packed), last (the source ended in it).
    """

    START = {"tokens": 0, "crc": 0, "done": False, "rows": 0, "window": 0, "filled": 0, "drained": 0, "last": False}

    def __init__(self, path, identity, new=False):
        """path: without suffix. identity: what the tokens are of. Raises UserError for a foreign or damaged file."""
        self.bin, self.json = Path(f"{path}.bin"), Path(f"{path}.json")
        self.identity = json.loads(json.dumps(identity))
        self.state = dict(self.START)
        if not new:
            self.refresh()
            self._check_bytes()

    def refresh(self):
        """Read again how far the file is, for another process may be writing it."""
        begun = self.bin.exists() and self.bin.stat().st_size > 0  # in this order: the .bin is written first
        if not self.json.exists():
            if begun:
                raise UserError(f"{self.json} is missing: delete the folder {self.json.parent} and run again")
            return
        with open_regular(self.json) as file:
            content = parse_json(file.read(), self.json, f"delete the folder {self.json.parent} and run again")
        state = {key: content.get(key) for key in self.START}
        if any(type(value) is not type(self.START[key]) or value < 0 for key, value in state.items()):
            raise UserError(f"{self.json} is damaged: delete the folder {self.json.parent} and run again")
        if content.get("identity") != self.identity:
            raise UserError(f"{self.json} is of other data, another tokenizer or another seed: delete the folder "
                            f"{self.json.parent} and run again")
        self.state = state

    def _check_bytes(self):
        crc, rest = 0, 2 * self.state["tokens"]
        if rest and self.bin.exists():
            with open_regular(self.bin) as file:
                while rest and (chunk := file.read(min(rest, 2**24))):
                    crc = zlib.crc32(chunk, crc)
                    rest -= len(chunk)
        if rest or crc != self.state["crc"]:
            raise UserError(f"{self.bin} is {'too short' if rest else 'damaged'}: delete the folder {self.bin.parent} "
                            "and run again")

    def append(self, ids, **state):
        """Add tokens, then say so, together with the other entries of the state that change with them."""
        data = np.array(ids, np.uint16).tobytes()
        with open(os.open(self.bin, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
            file.truncate(2 * self.state["tokens"])  # what a killed process wrote without recording it
            file.seek(0, os.SEEK_END)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        crc = zlib.crc32(data, self.state["crc"])
        new = self.state | {"tokens": self.state["tokens"] + len(ids), "crc": crc} | state
        with atomic(self.json) as file:
            file.write(json.dumps({"identity": self.identity, **new}, indent=1).encode())
        self.state = new

    def memmap(self):
        """The valid tokens, (state["tokens"],) uint16, read-only."""
        return np.memmap(self.bin, np.uint16, "r", shape=(self.state["tokens"],))


# ---- the stream of training tokens ---------------------------------------------------------------------------------


class Stream:
    """Packs the training documents of a source, in a thread of its own, up to the number of tokens that are wanted."""

    def __init__(self, source, tokenizer, folder, identity):
        self.source, self.tokenizer, self.folder, self.identity = source, tokenizer, folder, identity
        self.file = PackedFile(folder / "train", identity)
        self.wanted = 0
        self.thread = self.error = None
        self.waiting = 0  # documents in the window being filled

    def want(self, tokens):
        """Make sure that somebody is at work on that many tokens: this process, unless another one is already.

        Raises what stopped the thread, if something did.
        """
        self.wanted = max(self.wanted, tokens)
        if self.thread and not self.thread.is_alive():
            self.thread = None
        if self.error:
            raise self.error
        if not self.thread and not self.ready(self.wanted):
            self.thread = threading.Thread(target=self._run, daemon=True)
            self.thread.start()

    def ready(self, tokens):
        """Whether the file holds that many tokens, or all there will ever be."""
        return self.file.state["tokens"] >= tokens or self.file.state["done"]

    def status(self):
        """One line about what a reader is waiting for."""
        if self.waiting:
            return f"filling the shuffle buffer: {self.waiting:,} of {self.identity['shuffle_buffer']:,} documents"
        return f"packing: {self.file.state['tokens']:,} tokens are ready"

    def _run(self):
        try:
            with disk_errors(self.folder), lock(self.folder / "lock") as mine:
                self.file.refresh()
                if mine:
                    remove_partials(self.folder)
                while mine and not self.ready(self.wanted):
                    self._window()
        except Exception as error:  # whatever it is, the reader that waits for this thread raises it
            self.error = error

    def _window(self):
        """Fill a window with documents (or go on filling), shuffle it, pack it (or go on), up to the wanted tokens."""
        state = self.file.state
        with open(os.open(self.folder / "window.spool", os.O_RDWR | os.O_CREAT, 0o644), "r+b") as spool:
            places, row = self._spooled(spool, state["rows"])  # where each document begins in the spool
            if state["filled"] == 0:
                row, last = self._fill(spool, places, row)
                self.file.append([], rows=row, filled=len(places), last=last, done=not places)
            elif len(places) != state["filled"]:
                raise UserError(f"{spool.name} is damaged: delete the folder {self.folder} and run again")
            state, self.waiting = self.file.state, 0

            order = np.random.default_rng([self.identity["seed"], state["window"]]).permutation(len(places))
            for begin in range(state["drained"], len(places), CHUNK):
                if self.ready(self.wanted):
                    return
                texts = []
                for place in order[begin:begin + CHUNK]:
                    spool.seek(places[place])
                    texts.append(json.loads(spool.readline())[1])
                ids = []
                for document in self.tokenizer.encode_many(texts):
                    ids += document
                    ids.append(self.tokenizer.eos)
                if begin + CHUNK < len(places):
                    self.file.append(ids, drained=begin + CHUNK)
                else:
                    self.file.append(ids, window=state["window"] + 1, filled=0, drained=0, done=state["last"])
            spool.truncate(0)

    def _spooled(self, spool, rows):
        """-> (places, next row) of the documents that an earlier process left in the spool; cuts off a torn line."""
        places, end, row, filled = [], 0, rows, self.file.state["filled"]
        for line in spool:
            try:
                number, text = json.loads(line)
                torn = type(number) is not int or not isinstance(text, str) or not line.endswith(b"\n")
            except (ValueError, TypeError, RecursionError):
                torn = True
            if torn:  # by a kill
                break
            if not filled and number < row:  # of the window before: packed, but the spool was not cleared any more
                break
            places.append(end)
            end += len(line)
            row = number + 1
        spool.truncate(end)
        return places, rows if filled else row

    def _fill(self, spool, places, row):
        """-> (next row, whether the source has ended). Each document is in the spool before the next is asked for."""
        documents, last = self.source.documents("train", row), False
        while len(places) < self.identity["shuffle_buffer"]:
            self.waiting = len(places)
            number, text = next(documents, (None, None))
            if last := text is None:
                break
            places.append(spool.seek(0, os.SEEK_END))
            spool.write(json.dumps([number, text]).encode() + b"\n")
            spool.flush()
            row = number + 1
        os.fsync(spool.fileno())
        return row, last


# ---- what training reads -------------------------------------------------------------------------------------------


class Blocks:
    """Blocks of consecutive tokens. A tail that is shorter than a block is never used."""

    def __init__(self, file, seed, say, stream=None):
        """file: PackedFile; seed: for the order of later epochs; stream: who makes the file grow, if it does."""
        self.file, self.seed, self.say, self.stream = file, seed, say, stream

    def n_blocks(self, block_size):
        """How many blocks of `block_size` tokens there are by now."""
        return self.file.state["tokens"] // block_size

    def read(self, first, count, block_size):
        """The blocks number first ... first+count-1, (count, block_size) torch.long. Waits for the stream.

        Depends on nothing but its arguments, so that a resumed run goes on with no state, and processes can share the
        blocks of an update. When the source has ended, each further epoch reads all blocks again, in an order drawn
        from (seed, epoch). Raises UserError when there are fewer than `count` blocks in all, and what stopped the
        stream if it cannot give these blocks any more.
        """
        if self.stream:
            self._wait((first + count) * block_size)
        n = self.n_blocks(block_size)
        if n < count:
            raise UserError(f"the {self.file.bin.stem} text has {n} blocks of {block_size} tokens, too small for a "
                            f"batch of {count}: give --data more text, or use a smaller --batch-size or --block-size")
        tokens, blocks = self.file.memmap(), np.empty((count, block_size), np.int64)
        orders = {}
        for i in range(count):
            epoch, number = divmod(first + i, n)  # epoch 0 as long as the stream goes on: _wait() saw to it
            if epoch:
                if epoch not in orders:
                    orders[epoch] = np.random.default_rng([self.seed, epoch]).permutation(n)
                number = orders[epoch][number]
            blocks[i] = tokens[number * block_size:(number + 1) * block_size]
        return torch.from_numpy(blocks)

    def _wait(self, tokens):
        said, line = time.monotonic(), None
        while not self.stream.ready(tokens):
            self.stream.want(tokens)
            if time.monotonic() > said + 1 and line != self.stream.status():
                said, line = time.monotonic(), self.stream.status()
                self.say(line)
            time.sleep(0.02)
