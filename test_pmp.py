"""What PMP promises, each test named after the property that it proves. Needs no network and no data but its own.

The sections follow the code, from the text to GLUE and then a run of pmp.py; `grep "^# ----" test_pmp.py` lists them.
"""

import copy
import dataclasses
import errno
import gzip
import hashlib
import importlib
import io
import json
import lzma
import math
import multiprocessing
import os
import pkgutil
import random
import re
import resource
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qsl, urlparse

os.environ["OMP_NUM_THREADS"] = "1"  # small tensors gain nothing from a second thread; read when torch starts

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import glue
import model as model_module
import pmp
from common import (Stopped, UserError, atomic, command_line, fingerprint, load_safetensors, lock, pick_device,
                    pick_dtype, printable, read_json, save_safetensors, stop_signals, whole)
from data import text as text_module, tokenizer as tokenizer_module
from data.text import choose_held_out, documents, file_documents, prepare
from data.tokenizer import EOS, LETTER, TRAINING_WORDS, Tokenizer
from model import GPT2Config, LlamaConfig, build, initial_value, initialise, load_folder, save_folder
from pmp import PRESETS, pack_mask

# ---- what several sections use -------------------------------------------------------------------------------------


def peer(name):
    """A package that the project is compared with; without it the test is skipped, or fails where PEERS=required."""
    if os.environ.get("PEERS") == "required":
        return importlib.import_module(name)
    return pytest.importorskip(name)


def fails(words, call, *args, **kwargs):
    """Check that a call ends with a UserError of one line that has `words` in it; returns the line."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    return message


def make_texts(n, seed=0):
    """Made-up documents, no two the same."""
    rng = random.Random(seed)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "größe", "中文", "😀", "\n"]
    return [f"{i} " + " ".join(rng.choices(words, k=rng.randrange(1, 60))) for i in range(n)]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


BPE = Tokenizer.train(make_texts(200), size=400)


class Handler(BaseHTTPRequestHandler):
    """Sends what server.answer(path) gives: status, headers, and a body, which never ends where it is None."""

    def do_GET(self):
        status, headers, body = self.server.answer(self.path)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(body or b"")
            while body is None:
                self.wfile.write(bytes(2**16))
        except OSError:
            pass  # the reader has had enough

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A web server on this machine, at server.url. Who uses it gives it an answer()."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{server.server_port}/"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


# ---- text: documents -----------------------------------------------------------------------------------------------


def test_documents_come_in_the_order_of_the_file_names_from_every_kind_of_file(tmp_path):
    (tmp_path / "c.txt").write_text("four\n")
    (tmp_path / "a.jsonl").write_text('\ufeff{"text": "one"}\n\n{"text": " "}\n{"text": "two", "id": 5}')
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"five"))
    (tmp_path / "b.more.jsonl.xz").write_bytes(lzma.compress(b'{"text": "three"}\n'))
    (tmp_path / ".hidden").write_text("not a text")
    assert list(file_documents(tmp_path)) == ["one", "two", "three", "four\n", "five"]


def test_a_txt_is_cut_into_documents_of_limited_length_and_nothing_is_lost_but_blank_ones(tmp_path):
    text = "".join(f"line {i} é\r\n" + "\n" * (i % 40 == 0) for i in range(3000))
    text += "a" + "😀" * 100_000 + "\n" + "x" * 100_000 + "\nend "  # two lines far longer than a document
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())  # a byte-order mark is no text
    found = list(file_documents(tmp_path / "a.txt"))
    assert "".join(found) == text
    assert max(map(len, found)) < 2 * 8000
    stories = [f"Story {i}, no {EOS}.\n\n" + "It goes on.\n" * (i * 20) for i in range(400)]  # up to 96,000 characters
    (tmp_path / "a.txt").write_text(f"{EOS}\n".join(stories))
    assert list(file_documents(tmp_path / "a.txt")) == stories  # whose ends are marked
    (tmp_path / "a.txt").write_text(f"{EOS}\n \n\n{EOS}\nhello\n{EOS}\n\n")
    assert list(file_documents(tmp_path / "a.txt")) == ["hello\n"]  # blank ones are none


def test_copies_of_a_document_are_on_one_side_and_two_percent_are_held_out(tmp_path):
    texts = make_texts(3000)
    path = write_jsonl(tmp_path / "a.jsonl", texts * 2)
    rule = choose_held_out(path)
    train = list(documents(path, "train", 0, rule))
    held = list(documents(path, "held-out", 0, rule))
    assert sorted(row for row, _ in train + held) == list(range(6000))
    assert not {text for _, text in train} & {text for _, text in held}
    assert 0.015 < sum(len(text) for _, text in held) / sum(map(len, texts * 2)) < 0.025
    assert list(documents(path, "train", 77, rule)) == [entry for entry in train if entry[0] >= 77]
    random.Random(0).shuffle(texts)
    assert choose_held_out(write_jsonl(path, texts * 2)) == rule  # the order does not matter


def test_never_more_than_a_fifth_is_held_out_however_long_or_frequent_a_document_is(tmp_path):
    path = tmp_path / "a.jsonl"
    for seed in range(10):
        texts = make_texts(40, seed)
        book = f"{seed}" * (33 * sum(map(len, texts)))  # 97% of the text
        for every in ([book, *texts], texts * 60):
            held = documents(path, "held-out", 0, choose_held_out(write_jsonl(path, every)))
            assert 0 < sum(len(text) for _, text in held) < 0.2 * sum(map(len, every))
    beginning = ["a book" * 700_000, *make_texts(60)]  # is all that the rule is made from
    rule = choose_held_out(write_jsonl(path, beginning + make_texts(500, 1)))
    assert 0 < sum(1 for _ in documents(path, "held-out", 0, rule)) < 0.3 * 500
    fails("give more and shorter ones", choose_held_out, write_jsonl(path, ["one document", "and another"]))


GOOD = b'{"text": "good"}\n'


@pytest.mark.parametrize("name, content, expected", [
    ("missing.jsonl", None, "there is no text"),
    ("folder", "folder", "is empty"),
    ("a.csv", b"text\nhello\n", "csv.DictReader"),
    ("a.parquet", b"PAR1", "neither a .txt nor a .jsonl"),
    ("a.txt", "English".encode("utf-16"), "not UTF-8"),
    ("a.txt", "English".encode("utf-16-le"), "not UTF-8"),  # without a mark it is valid UTF-8, full of NULs
    ("a.jsonl", b'{"text": "bad\xff"}\n', "not UTF-8"),
    ("a.jsonl", GOOD + b"bad\n", "line 2 is not JSON"),
    ("a.jsonl", GOOD + b'{"text": null}\n', 'line 2 has no string "text"'),
    ("a.jsonl", b'{"text": ""}\n', "holds no text"),
    ("a.txt.xz", lzma.compress(GOOD * 999)[:-20], "damaged"),
    ("a.jsonl", GOOD + b'{"text": "' + b"x" * 10**6 + b'"}\n', "line 2 is longer than 1,000,000 bytes"),
])
def test_a_bad_text_is_named_in_one_sentence(name, content, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "LONGEST_LINE", 10**6)
    if content == "folder":
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    message = fails(expected, prepare, str(tmp_path / name), "bpe", 1000, cache=tmp_path / "cache")
    assert name in message


def test_the_prose_of_this_installation_is_enough_for_a_laptop_and_each_text_comes_once():
    texts = text_module.prose()
    assert len(texts) == len(set(texts))
    assert sum(map(len, texts)) > 5_000_000
    assert sum(" the " in text for text in texts) > 0.8 * len(texts)


# ---- text: packed tokens -------------------------------------------------------------------------------------------


def all_tokens(train):
    """Every training token, once the text has ended."""
    while not train.state["done"]:
        train.want(10**9)
        time.sleep(0.002)
    return np.fromfile(train.bin, np.uint16, train.state["tokens"]).tolist()


def test_packing_loses_and_repeats_no_token_ends_documents_by_eos_and_shuffles_inside_the_window_alone(tmp_path):
    texts = make_texts(500)
    path = str(write_jsonl(tmp_path / "a.jsonl", texts))
    orders = []
    for seed, cache in ((1, "a"), (1, "b"), (2, "a")):
        _, train, held = prepare(path, BPE, 0, seed, tmp_path / cache, shuffle_buffer=100)
        orders.append(BPE.decode(all_tokens(train)).split(EOS))
        assert orders[-1].pop() == ""
    held_out = BPE.decode(np.fromfile(held.bin, np.uint16).tolist()).split(EOS)
    assert sorted(orders[0] + held_out) == sorted(texts + [""])
    assert orders[0] == orders[1] != orders[2]
    in_order = [text for text in texts if text not in held_out]
    for start in range(0, len(in_order), 100):
        assert sorted(orders[0][start:start + 100]) == sorted(in_order[start:start + 100])
        assert orders[0][start:start + 100] != in_order[start:start + 100]


def test_later_epochs_read_every_block_once_in_another_order(tmp_path):
    _, train, _ = prepare(str(write_jsonl(tmp_path / "a.jsonl", make_texts(300))), BPE, 0, cache=tmp_path)
    ids = all_tokens(train)
    n = len(ids) // 16
    epochs = [train.read(epoch * n, n, 16).tolist() for epoch in range(3)]
    assert sum(epochs[0], []) == ids[:16 * n]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert train.read(n - 2, 5, 16).tolist() == epochs[0][-2:] + epochs[1][:3]  # over the end of an epoch
    assert [train.epoch(n - 1, 16), train.epoch(n, 16)] == [0, 1]
    fails("too few", train.read, 0, n + 1, 16)


def test_a_preparation_stopped_at_any_sync_or_rename_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    path = str(write_jsonl(tmp_path / "a.jsonl", make_texts(120)))
    calls, stop = [], 0

    def stopping(function):
        def call(*args):
            calls.append(function)
            if len(calls) == stop:
                raise SystemExit  # which no `except Exception` holds up
            return function(*args)
        return call

    def outcome(cache):
        _, train, held = prepare(path, "bpe", 0, cache=cache, shuffle_buffer=50)
        return all_tokens(train), held.bin.read_bytes()

    monkeypatch.setattr(os, "fsync", stopping(os.fsync))
    monkeypatch.setattr(os, "replace", stopping(os.replace))
    expected = outcome(tmp_path / "whole")
    total = len(calls)
    assert total > 15
    for number in range(1, total + 1):
        calls, stop = [], number
        with pytest.raises(SystemExit):
            outcome(tmp_path / str(number))
        for file in tmp_path.glob(f"{number}/*/train.bin"):
            file.write_bytes(file.read_bytes() + b"torn")  # a killed process may have written half a window
        stop = 0
        assert outcome(tmp_path / str(number)) == expected


def test_whatever_ends_the_packing_reaches_the_reader_who_does_not_wait_for_ever(tmp_path):
    def panic(texts):
        raise SystemExit  # no Exception, like a panic in tiktoken's Rust

    tokenizer = Tokenizer(BPE.ids)
    tokenizer.encode_many = panic
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(60))
    patience = iter(range(50))
    _, train, _ = prepare(str(path), tokenizer, 0, cache=tmp_path)
    train.check = lambda: next(patience)
    with pytest.raises(SystemExit):
        train.read(0, 1, 16)


def test_packing_goes_on_after_what_is_stored_and_an_error_of_the_disk_names_its_file(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(60))
    _, whole, _ = prepare(str(path), BPE, 10**9, cache=tmp_path / "whole", shuffle_buffer=10)
    expected = all_tokens(whole)
    _, train, _ = prepare(str(path), BPE, 0, cache=tmp_path / "cache", shuffle_buffer=10)
    for number in (1, 2, 3):
        older = train.state
        train._append_window()
        assert train.state["windows"] == number
        train.state = older  # as a reader does who has read the file before this window
    assert all_tokens(train) == expected

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")  # a write's error names no file

    monkeypatch.setattr(train, "_append_window", full)
    train.state = {**train.state, "done": False}
    train.json.unlink()
    with pytest.raises(OSError) as error:
        train.read(0, 10**6, 16)
    assert error.value.filename == str(train.bin)


def test_a_tokenizer_that_two_bytes_a_token_cannot_hold_is_refused(tmp_path):
    single = [bytes([byte]) for byte in range(256)]
    large = Tokenizer({token: id for id, token in enumerate([*single, *(a + b for a in single for b in single)])})
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(60))
    fails("has 65,793 tokens", prepare, str(path), large, 0, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_damaged_cache_is_named_and_a_link_in_it_is_not_followed(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(60))
    _, train, held = prepare(str(path), BPE, 0, cache=tmp_path)
    outside = tmp_path / "outside"
    outside.write_text("mine")
    train.bin.symlink_to(outside)
    with pytest.raises(OSError, match="train.bin"):
        all_tokens(train)
    assert outside.read_text() == "mine"
    train.bin.unlink()
    moved = path.rename(tmp_path / "b.jsonl")  # the same text, whatever its name is
    _, train, held = prepare(str(moved), BPE, 0, cache=tmp_path, expected=train.identity)
    assert len(all_tokens(train)) > 1000
    for file in (train.bin, held.bin):
        whole = file.read_bytes()
        for damaged in (whole[:-2], bytes([whole[0] ^ 1]) + whole[1:]):
            file.write_bytes(damaged)
            fails(f"{file.name} is damaged", prepare, str(moved), BPE, 0, cache=tmp_path)
        file.write_bytes(whole)


# ---- text: SlimPajama over HTTP ------------------------------------------------------------------------------------


@pytest.fixture
def pajama(server, monkeypatch):
    """SlimPajama's server with made-up rows. faults: what goes wrong at the next requests; asked: (row, length)s."""
    server.texts, server.faults, server.asked, server.slept = make_texts(1030), [], [], []

    def answer(path):
        query = dict(parse_qsl(urlparse(path).query))
        first, length, total = int(query["offset"]), int(query["length"]), len(server.texts)
        server.asked.append((first, length))
        fault = server.faults.pop(0) if server.faults else ""
        rows = []
        for i in range(first, min(first + length, total)):
            rows.append({"row_idx": i, "row": {"text": server.texts[i]}, "truncated_cells": []})
        if fault == "short":
            rows.pop()
        elif fault == "truncated":
            rows[-1]["truncated_cells"] = ["text"]
        body = json.dumps({"rows": rows, "num_rows_total": total - (fault == "shrunk")}).encode()
        faults = {"500": (500, {}, b""), "404": (404, {}, b""), "429": (429, {"Retry-After": "99999999"}, b""),
                  "too big": (500, {"X-Error-Code": "TooBigContentError"}, b""), "garbage": (200, {}, b"<html>"),
                  "cut": (200, {"Content-Length": len(body)}, body[:99]), "endless": (200, {}, None)}
        return faults.get(fault, (200, {}, body))

    server.answer = answer
    monkeypatch.setattr(text_module, "ROWS_URL", server.url + "rows")
    monkeypatch.setattr(text_module, "PACE", 0)
    monkeypatch.setattr(text_module.time, "sleep", server.slept.append)
    get = text_module.get
    monkeypatch.setattr(text_module, "get", lambda url, most, **query: get(url, 10**6, **query))
    return server


def test_slimpajama_gives_each_row_once_whatever_the_server_does(pajama):
    pajama.faults = ["500", "429", "cut", "garbage", "", "short", "shrunk", "truncated", "", "endless", "too big",
                     "too big"]
    assert list(documents("slimpajama", "train")) == list(enumerate(pajama.texts))
    assert not pajama.faults
    assert max(pajama.slept) == 60  # a server that asks for three years gets a minute
    assert [length for row, length in pajama.asked if row == 200] == [100, 100, 50, 25]  # too big: less is asked for
    assert pajama.asked[-1] == (1025, 100)
    assert list(documents("slimpajama", "held-out", 990)) == list(enumerate(pajama.texts))[990:]


def test_slimpajama_ends_at_once_where_it_is_refused_and_else_after_long_failure(pajama, monkeypatch):
    pajama.faults = ["", "404"]
    fails("refused row 100 of train", list, documents("slimpajama", "train"))
    assert len(pajama.asked) == 2
    monkeypatch.setattr(text_module, "GIVE_UP", 0)
    pajama.faults = ["", "500"]
    fails("at row 100 of train", list, documents("slimpajama", "train"))


# ---- tokenizer -----------------------------------------------------------------------------------------------------

NASTY = ["", " ", "a" * 5000, " " * 20_000, "naïve  café\r\n\t'll 'LL", "\x00\x1c\x85\ufffd\ufeff\u2028\u0301",
         "中文字，和數字 12 個。٣ ²Ⅷ ½", "👩‍👩‍👧 😀😀", "___!!! x1y22z333 \n\n\n  end ",
         "".join(map(chr, range(0xD7FF)))]


def test_every_text_comes_back_and_none_of_it_becomes_an_end_of_text():
    for text in [*NASTY, *make_texts(50, seed=9), f"{EOS} is text {EOS}", " " * 10**6, " " * 10**6 + "x"]:
        ids = BPE.encode(text)
        assert BPE.decode(ids) == text
        assert BPE.eos not in ids
    assert BPE.encode_many(NASTY) == [BPE.encode(text) for text in NASTY]
    assert BPE.decode(BPE.encode("a\ud800b")) == "a\ufffdb"  # half a character, which JSON can hold


def test_training_equals_a_slow_one_that_counts_all_pairs_anew():
    texts = [*make_texts(60), " ".join("a" * (i % 13) for i in range(100))]  # in runs pairs overlap
    words = Counter()
    for text in texts:
        for word in TRAINING_WORDS.findall(text):
            words[tuple(bytes([byte]) for byte in word.encode())] += 1
    tokens = [bytes([byte]) for byte in LETTER]
    while True:
        pairs = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        new = [pair for pair in pairs if pair[0] + pair[1] not in tokens and pairs[pair] > 1]
        if not new:
            break
        left, right = min(new, key=lambda pair: (-pairs[pair], tokens.index(pair[0]), tokens.index(pair[1])))
        tokens.append(left + right)
        merged = Counter()
        for word, count in words.items():
            merged[tuple(tokenizer_module.merge(list(word), (left, right), left + right))] += count
        words = merged
    trained = Tokenizer.train(texts)
    assert sorted(trained.ids, key=trained.ids.get) == tokens
    assert len(Tokenizer.train(texts, size=300).ids) == 299
    assert tokenizer_module.merge([1, 1, 1], (1, 1), 2) == [2, 1]  # which the slow one, too, has used


def test_training_on_noise_ends(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "TRAINING_WORK", 2**20)  # a sixteenth of the time
    rng = random.Random(0)
    noise = "".join(chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(1_000_000))  # one word
    begun = time.process_time()
    trained = Tokenizer.train([noise])
    assert time.process_time() - begun < 5
    assert trained.size > 1000


def test_a_saved_tokenizer_loads_again_and_is_saved_with_the_same_bytes(tmp_path):
    (tmp_path / "again").mkdir()
    BPE.save(tmp_path, 64)
    loaded = Tokenizer.load(tmp_path)
    loaded.save(tmp_path / "again", 64)
    assert loaded.fingerprint == BPE.fingerprint != Tokenizer.train(make_texts(201), size=400).fingerprint
    assert loaded.encode_many(NASTY) == BPE.encode_many(NASTY)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parity
def test_transformers_reads_our_tokenizer_to_the_same_ids_and_pads_a_batch(tmp_path):
    BPE.save(tmp_path, 64)
    theirs = peer("transformers").AutoTokenizer.from_pretrained(tmp_path)
    assert [theirs.eos_token_id, len(theirs)] == [BPE.eos, BPE.size]
    for text in [*NASTY, *make_texts(200, seed=3)]:
        assert theirs(text)["input_ids"] == BPE.encode(text)
        assert theirs.decode(BPE.encode(text)) == text
    short, long = BPE.encode("a"), BPE.encode("the quick fox")
    gap = len(long) - len(short)
    batch = theirs(["a", "the quick fox"], padding=True)
    assert batch["input_ids"] == [short + [BPE.eos] * gap, long]
    assert batch["attention_mask"] == [[1] * len(short) + [0] * gap, [1] * len(long)]


def add_token_without_its_parts(file, config):
    file["model"]["vocab"].update({"zqj": BPE.eos, EOS: BPE.eos + 1})  # neither zq nor qj is a token
    file["model"]["merges"].append(["zq", "j"])
    file["added_tokens"][0]["id"] = BPE.eos + 1


@pytest.mark.parametrize("expected, change", [
    ("no merges make the token 'zqj'", add_token_without_its_parts),
    ("the added tokens <mask>", lambda file, config: file["added_tokens"].insert(0, {"id": 5, "content": "<mask>"})),
    ("add_prefix_space", lambda file, config: file["pre_tokenizer"].update(add_prefix_space=True)),
    ("add_prefix_space", lambda file, config: config.update(add_prefix_space=True)),
    ("TemplateProcessing", lambda file, config: file.update(post_processor={"type": "TemplateProcessing"})),  # a BOS
    ("a normalizer", lambda file, config: file.update(normalizer={"type": "NFC"})),
    ("merges", lambda file, config: file["model"]["merges"].reverse()),
    ("its ids", lambda file, config: file["model"]["vocab"].update({"a": 10**6})),
    ("a Unigram model", lambda file, config: file["model"].update(type="Unigram")),
    ("pre-tokenizer none", lambda file, config: file.update(pre_tokenizer=None)),  # LLaMA's own
    ("not a whole tokenizer.json", lambda file, config: file["model"]["vocab"].pop(EOS)),
])
def test_a_tokenizer_whose_ids_would_be_others_here_is_refused_by_name(expected, change, tmp_path):
    BPE.save(tmp_path, 64)
    names = (tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json")
    file, config = [json.loads(name.read_text()) for name in names]
    change(file, config)
    names[0].write_text(json.dumps(file))
    names[1].write_text(json.dumps(config))
    fails(expected, Tokenizer.load, tmp_path)


# ---- model ---------------------------------------------------------------------------------------------------------

GPT2_SIZES = {"vocab_size": BPE.size, "n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 4}
LLAMA_SIZES = {"vocab_size": BPE.size, "max_position_embeddings": 48, "hidden_size": 32, "intermediate_size": 48,
               "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPES = {
    "gpt2": GPT2Config(**GPT2_SIZES),
    "gpt2-untied": GPT2Config(**GPT2_SIZES, n_inner=40, tie_word_embeddings=False),
    "llama": LlamaConfig(**LLAMA_SIZES, num_key_value_heads=2, rope_theta=5000.0, rms_norm_eps=1e-4),
    "llama-tied": LlamaConfig(**LLAMA_SIZES, num_key_value_heads=4, head_dim=16, tie_word_embeddings=True),
}
BOTH = pytest.mark.parametrize("kind", ["gpt2", "llama"])
IDX = torch.randint(BPE.size, (3, 24), generator=torch.Generator().manual_seed(2))


def small_model(kind):
    """A model whose every weight matters to its logits: norm gains and biases are away from 1 and 0."""
    model = build(SHAPES[kind])
    initialise(model, b"test")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def small_folder(folder, kind):
    """Write a release of small_model; gives the model."""
    model = small_model(kind)
    save_folder(folder, model, dict(model.named_parameters()), BPE, "a card")
    return model


@pytest.mark.parity
@pytest.mark.parametrize("kind", SHAPES)
def test_folders_of_ours_and_of_transformers_give_the_same_logits_on_both_sides(kind, tmp_path):
    model = small_folder(tmp_path / "ours", kind)
    theirs = peer("transformers").AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    logits = model(IDX)
    assert logits.std() > 0.1
    assert (theirs(IDX).logits - logits).abs().max() < 4e-6
    assert abs(theirs(IDX, labels=IDX).loss - model(IDX, IDX)) < 4e-6
    saved = {"whole": theirs}
    if model.config.tie_word_embeddings:
        saved["body"] = theirs.base_model  # a bare GPT2Model or LlamaModel
    for name, part in saved.items():
        part.save_pretrained(tmp_path / name)
        BPE.save(tmp_path / name, 48)
        opened, tokenizer = load_folder(tmp_path / name)
        assert torch.equal(opened(IDX), logits)
        assert tokenizer.fingerprint == BPE.fingerprint


def test_attention_as_written_is_torchs_own():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, 300, 8, generator=generator)  # three blocks of queries
    k = torch.randn(2, 2, 300, 8, generator=generator)  # each key serves three heads
    v = torch.randn(2, 2, 300, 8, generator=generator)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert (model_module.written_attention(q, k, v) - expected).abs().max() < 2e-6


@pytest.mark.parametrize("preset, expected", [
    ("tiny", "c4a2221494c61c1670680cf8bcab72292fe502509fab55eeea6ecf2ce3926845"),
    ("mini-gpt2", "aae0de61771023abad77bdf9b5d6bbe2edbd87522ceeea0fe905ca1779137073"),
])
def test_the_initial_weights_depend_on_the_secret_alone_have_their_deviation_and_no_negative_zero(
        preset, expected, monkeypatch):
    torch.manual_seed(random.randrange(2**32))  # which must not matter
    model = build(PRESETS[preset][0])
    initialise(model, b"init-seed 5")
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        digest.update(p.detach().numpy().tobytes())
        if p.ndim == 1:
            assert (p == (0 if name.endswith("bias") else 1)).all()
            continue
        std = 0.02
        if name.endswith(("c_proj.weight", "o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * len(model.blocks()))
        assert p.std().item() == pytest.approx(std, rel=0.02)
    assert digest.hexdigest() == expected
    # an optimizer's step of 0 would change the bits of a -0.0
    odd = SimpleNamespace(standard_normal=lambda shape: np.array([[-0.0, -1e-60, 1.0]]))
    monkeypatch.setattr(model_module, "secret_generator", lambda secret, name: odd)
    bits = model_module.initial_value(model, "lm_head.weight", (1, 3), b"x").view(torch.int32)
    assert bits[0, :2].tolist() == [0, 0]


def test_sampling_is_seeded_leaves_torchs_own_generator_alone_and_says_when_the_weights_are_broken():
    model, start, before = small_model("gpt2"), IDX[:1, :4], torch.get_rng_state()
    first = model.generate(start, 60, seed=1)  # past the model's 48 positions
    assert first.shape == (1, 64)
    assert torch.equal(first, model.generate(start, 60, seed=1))
    assert not torch.equal(first, model.generate(start, 60, seed=2))
    assert torch.equal(torch.get_rng_state(), before)
    likeliest = model(start)[0, -1].argmax()
    assert model.generate(start, 60, top_k=1, eos=likeliest.item())[0, 4:].tolist() == []
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = math.nan
    fails("not finite", model.generate, start, 1)


NORM = "model.norm.weight"


@pytest.mark.parametrize("kind, config, tensors, expected", [  # changes of config.json and tensors; None removes
    ("llama", {"model_type": "mistral"}, {}, "model_type mistral"),
    ("llama", {"rope_scaling": {"factor": 2}}, {}, "rope_scaling"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, {}, "rope_parameters"),
    ("llama", {"quantization_config": {"bits": 4}}, {}, "quantization_config"),
    ("llama", {"hidden_act": "gelu"}, {}, "hidden_act"),
    ("gpt2", {"n_layer": 10**9}, {}, "n_layer"),
    ("gpt2", {}, {"lm_head.weight": torch.ones(BPE.size, 32)}, "ties its head"),
    ("llama", {}, {NORM: None}, f"lacks the tensor {NORM}"),
    ("llama", {}, {"more": torch.ones(2)}, "holds the tensor more"),
    ("llama", {}, {NORM: torch.ones(31)}, f"{NORM} is [31]"),
    ("llama", {}, {"norm.weight": torch.ones(32)}, f"{NORM} twice"),
    ("llama", {"vocab_size": 9}, {"model.embed_tokens.weight": torch.ones(9, 32), "lm_head.weight": torch.ones(9, 32)},
     "do not belong together"),  # the tokenizer and the model
])
def test_a_folder_that_our_layers_do_not_fit_is_refused_by_name(kind, config, tensors, expected, tmp_path):
    found = {**dict(small_folder(tmp_path, kind).named_parameters()), **tensors}
    save_safetensors(tmp_path / "model.safetensors", {k: v for k, v in found.items() if v is not None}, {})
    found = {**json.loads((tmp_path / "config.json").read_text()), **config}
    (tmp_path / "config.json").write_text(json.dumps(found))
    fails(expected, load_folder, tmp_path)


def test_json_of_a_stranger_is_one_small_regular_file_with_each_key_once(tmp_path):
    file = tmp_path / "x.json"
    for content, words in ((b'{"a": 1, "a": 2}', "a key occurs twice"), (b"[" * 10**5, "is not JSON"),
                           (b"[]", "holds no JSON object"), (b" " * 10**6 + b"{}", "larger than 1,000,000 bytes")):
        file.write_bytes(content)
        fails(words, read_json, file, 10**6)
    file.unlink()
    os.mkfifo(file)  # a reader of it would wait for ever
    fails("no regular file", read_json, file)


def test_a_name_a_folder_without_config_and_one_with_an_index_beside_the_weights_are_refused(tmp_path):
    fails("names are not fetched", load_folder, "gpt2-xl")
    fails("no config.json", load_folder, tmp_path)
    small_folder(tmp_path, "llama")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    fails("model.safetensors.index.json", load_folder, tmp_path)


# ---- safetensors ---------------------------------------------------------------------------------------------------


@pytest.mark.parity
def test_safetensors_agrees_with_the_real_package_both_ways(tmp_path):
    real = peer("safetensors.torch")
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.arange(5, dtype=torch.uint8),
               "d": torch.tensor([True, False]), "e": torch.tensor(3.0), "f": torch.randn(2, 3).half(),
               "g": torch.zeros(0, 4), "h": torch.randn(4, 3).t()}
    save_safetensors(tmp_path / "ours", tensors, {"format": "pt"})
    real.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs")
    read = [real.load_file(tmp_path / "ours"), load_safetensors(tmp_path / "theirs")[0]]
    for found in (*read, load_safetensors(tmp_path / "ours")[0]):
        assert found.keys() == tensors.keys()
        for name, tensor in found.items():
            assert tensor.dtype == tensors[name].dtype
            assert torch.equal(tensor, tensors[name])


def test_a_flipped_bit_and_a_cut_file_are_found_and_float16_opens(tmp_path):
    file, tensors = tmp_path / "x", {"a": torch.randn(50).half(), "b": torch.zeros(3)}
    save_safetensors(file, tensors, {"kind": "test"})
    whole, refused = file.read_bytes(), 0
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        try:
            assert fingerprint(load_safetensors(file)[0]) == fingerprint(tensors)  # a bit of a blank or the metadata
        except UserError:
            refused += 1
    assert refused > 112  # bytes of tensors
    for size in range(0, len(whole), 7):
        file.write_bytes(whole[:size])
        fails("no safetensors file", load_safetensors, file)
    halves = {name: p.half() for name, p in small_folder(tmp_path / "release", "llama").named_parameters()}
    save_safetensors(tmp_path / "release" / "model.safetensors", halves, {})
    for name, p in load_folder(tmp_path / "release")[0].named_parameters():
        assert torch.equal(p, halves[name].float())


ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


@pytest.mark.parametrize("header", [
    "", "5", "null", "[]", "{", '{"a": 1}', "[" * 100_000, {"a": {}}, {"a": {**ENTRY, "dtype": "F8"}},
    {"a": {**ENTRY, "dtype": ["F32"]}}, {"a": {**ENTRY, "shape": [-2, -3]}}, {"a": {**ENTRY, "shape": [2.0, 3]}},
    {"a": {**ENTRY, "shape": [7]}}, {"a": {**ENTRY, "shape": [2**62, 2**62]}}, {"a": {**ENTRY, "shape": None}},
    {"a": {**ENTRY, "data_offsets": [1, 25]}}, {"a": {**ENTRY, "data_offsets": [0, 48]}},
    {"a": {**ENTRY, "data_offsets": [0]}}, {"a": ENTRY, "b": ENTRY}, {"__metadata__": 5, "a": ENTRY}, {},
])
def test_a_garbage_header_is_refused(header, tmp_path):
    text = header if isinstance(header, str) else json.dumps(header)
    for length in (len(text), 0, 2**20, 2**63, 2**64 - 1):
        (tmp_path / "x").write_bytes(struct.pack("<Q", length) + text.encode() + bytes(24))
        fails("no safetensors file", load_safetensors, tmp_path / "x")


# ---- glue: metrics -------------------------------------------------------------------------------------------------


def test_metrics_worked_by_hand_and_degenerate_predictions_are_wrong():
    predicted, true = np.array([1, 1, 1, 0, 0, 0]), np.array([1, 1, 0, 1, 0, 0])  # 2 right and 1 wrong of each class
    assert glue.accuracy(predicted, true) == pytest.approx(4 / 6)
    assert glue.f1(predicted, true) == pytest.approx(2 * 2 / (3 + 3))
    assert glue.mcc(predicted, true) == pytest.approx((2 * 2 - 1 * 1) / 9)
    assert glue.pearson([1, 2, 3], [1, 2, 4]) == pytest.approx(3 / (2 * 14 / 3) ** 0.5)
    assert glue.spearman([1, 2, 3], [1, 8, 27]) == pytest.approx(1)
    cola, mrpc, stsb = glue.TASKS["cola"], glue.TASKS["mrpc"], glue.TASKS["stsb"]
    scores = glue.score(stsb, [-3, 0.4, 7, 4.6, 2.6, 1.4], [0, 0, 5, 5, 2.4, 0.6])
    assert scores["accuracy"] == pytest.approx(100 * 5 / 6)  # 0, 0, 5, 5, 3, 1 against 0, 0, 5, 5, 2, 1
    assert glue.majority_accuracy([1.6, 2.2, 4.0, 0.0]) == 50
    assert glue.score(cola, [1, 1, 1, 1], [0, 1, 1, 0]) == {"accuracy": 50, "mcc": 0}
    assert glue.score(mrpc, [0, 0], [0, 0]) == {"accuracy": 100, "f1": 0}
    assert glue.score(mrpc, [-1, -1], [0, 1]) == {"accuracy": 0, "f1": 0}
    assert glue.score(stsb, [1e-200, 4e-200, 2e-200], [1, 2, 4])["pearson"] == pytest.approx(100 / 7)
    assert glue.score(stsb, [3, 3], [3, 1]) == {"accuracy": 50, "pearson": 0, "spearman": 0}
    for odd in (math.nan, math.inf):
        assert glue.score(stsb, [odd, 4, 2], [1, 2, 4]) == {"accuracy": 0, "pearson": 0, "spearman": 0}
    classifier = glue.Classifier(small_model("llama"), 2, 0)
    with torch.no_grad():
        classifier.head[1] = math.nan
    rows = [([1, 2], 0), ([3], 1)]
    assert glue.predict(classifier, rows, 2, torch.device("cpu"), "fp32").tolist() == [-1, -1]
    classifier.head.data = torch.tensor([[math.inf] + [0.0] * 31])  # a regression
    assert np.isnan(glue.predict(classifier, rows, 2, torch.device("cpu"), "fp32")).all()


@pytest.mark.parity
def test_metrics_agree_with_scikit_learn_and_scipy():
    sklearn, scipy = peer("sklearn.metrics"), peer("scipy.stats")
    rng = np.random.default_rng(0)
    for _ in range(20):
        true, predicted = rng.integers(0, 2, (2, 200))
        assert glue.accuracy(predicted, true) == pytest.approx(sklearn.accuracy_score(true, predicted))
        assert glue.f1(predicted, true) == pytest.approx(sklearn.f1_score(true, predicted))
        assert glue.mcc(predicted, true) == pytest.approx(sklearn.matthews_corrcoef(true, predicted))
        x, noise = rng.normal(size=(2, 200)).round(1)  # rounded, so that there are ties
        assert glue.pearson(x, x + noise) == pytest.approx(scipy.pearsonr(x, x + noise)[0])
        assert glue.spearman(x, x + noise) == pytest.approx(scipy.spearmanr(x, x + noise)[0])


# ---- glue: files ---------------------------------------------------------------------------------------------------

MRPC = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
QQP = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
STSB = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
MNLI = "index\tpromptID\tpairID\tgenre\t" + "parse\t" * 4 + "sentence1\tsentence2\tlabel1\t"
RTE = "index\tsentence1\tsentence2\tlabel\n"


@pytest.mark.parametrize("name, header, row, expected", [
    ("cola", "", 'gj04\t0\t*\tThe cat were "here. ', ('The cat were "here. ', "", 0)),
    ("sst2", "sentence\tlabel\n", "hide new secretions \t1", ("hide new secretions ", "", 1)),
    ("mrpc", MRPC, '1\t7\t8\tHe said "a.\tB.', ('He said "a.', "B.", 1)),
    ("qqp", QQP, "7\t1\t2\tWhy?\tHow?\t0", ("Why?", "How?", 0)),
    ("stsb", STSB, "0\tm\tf\t2012\t1\tx\tx\tA plane.\tAn air plane.\t3.800", ("A plane.", "An air plane.", 3.8)),
    ("mnli", MNLI + "gold_label\n", "0\t1\t1e\tx\t(\t(\t(\t(\tOne.\tTwo.\tneutral\tneutral", ("One.", "Two.", 1)),
    ("mnli", MNLI + "label2\tlabel3\tlabel4\tlabel5\tgold_label\n",
     "0\t1\t1e\tx\t(\t(\t(\t(\tOne.\tTwo." + "\tneutral" * 5 + "\tentailment", ("One.", "Two.", 0)),
    ("qnli", "index\tquestion\tsentence\tlabel\n", '0\tWho?\t"He.\tnot_entailment', ("Who?", '"He.', 1)),
    ("rte", RTE, "0\tOne\u2028line.\tShort.\tentailment", ("One\u2028line.", "Short.", 0)),
])
def test_every_official_layout_is_read_and_no_row_is_lost(name, header, row, expected, tmp_path, capsys):
    file = tmp_path / "x.tsv"
    for line_feed, end in (("\n", ""), ("\n", "\n"), ("\r\n", "\r\n")):  # CoLA's dev.tsv ends without one
        file.write_bytes((header + line_feed.join([row] * 5) + end).encode())
        assert glue.read_tsv(glue.TASKS[name], file) == [expected] * 5
    if glue.TASKS[name].gaps:
        gap = row.rpartition("\t")[0]
        file.write_text(header + "\n".join([row, gap, row, gap + "\t", "", row]))
        assert glue.read_tsv(glue.TASKS[name], file) == [expected] * 3
        assert "skipped 3 rows" in capsys.readouterr().out


@pytest.mark.parametrize("name, content, expected", [
    ("rte", RTE, "has no rows"),
    ("rte", "index\tsentence1\tlabel\n0\ta\tentailment\n", "names no column 'sentence2'"),
    ("rte", "", "it has none"),
    ("rte", RTE + "0\ta\tentailment\n", "line 2 has 3 columns, not 4"),
    ("rte", RTE + "0\ta\tb\tentailment\tmore\n", "line 2 has 5 columns, not 4"),
    ("rte", RTE + "0\ta\tb\tneutral\n", "line 2: unknown label 'neutral'"),
    ("cola", "gj04\t1\t\tcaf\xe9\n", "not UTF-8"),
    ("qqp", QQP + "7\t1\t2\tWhy?\tHow?\t0\tmore\n", "line 2 has 7 columns"),
    ("stsb", "sentence1\tsentence2\tscore\na\tb\tnan\n", "line 2: unknown label 'nan'"),
])
def test_a_bad_tsv_is_named_with_its_line(name, content, expected, tmp_path):
    fails("there is no file", glue.read_tsv, glue.TASKS[name], tmp_path / "x.tsv")
    (tmp_path / "x.tsv").write_bytes(content.encode("latin-1"))
    message = fails(expected, glue.read_tsv, glue.TASKS[name], tmp_path / "x.tsv")
    assert "x.tsv" in message


@pytest.mark.parametrize("limit, expected", [("LARGEST_FILE", "larger than 3"), ("MOST_ROWS", "more than 3 rows"),
                                             ("LONGEST_ROW", "line 1 has more than 3 characters")])
def test_a_tsv_has_a_limit_in_bytes_rows_and_characters_of_a_row(limit, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(glue, limit, 3)
    (tmp_path / "x.tsv").write_text(RTE + "0\ta\tb\tentailment\n" * 4)
    fails(expected, glue.read_tsv, glue.TASKS["rte"], tmp_path / "x.tsv")


def serve(server, monkeypatch, name, files):
    """Let the server have these {name: bytes} as a task's official files. Gives the task, and what is asked for."""
    asked = []

    def answer(path):
        asked.append(path)
        return server.faults.pop(0) if server.faults else 200, {}, files[path[1:]]

    server.answer, server.faults = answer, []
    for address in ("GLUE_URL", "MRPC_URL"):
        monkeypatch.setattr(glue, address, server.url)
    monkeypatch.setattr(glue, "pause", lambda error, attempt: None)
    sums = tuple((file, len(body), hashlib.sha256(body).hexdigest()) for file, body in files.items())
    return dataclasses.replace(glue.TASKS[name], download=sums), asked


def test_a_download_is_tried_again_never_lands_with_another_sha256_and_is_not_repeated(server, monkeypatch, tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for split in ("train", "dev", "test"):
            archive.writestr(f"RTE/{split}.tsv", RTE + "0\tLong.\tShort.\tentailment\n" * 50)
    good = buffer.getvalue()
    files = {"RTE.zip": good}
    task, asked = serve(server, monkeypatch, "rte", files)
    for bad in (good[:-1] + b"x", good[:-1], good + b"x", None):
        files["RTE.zip"] = bad
        asked.clear()
        fails("give a folder that has the TSVs with --glue-dir", glue.fetch, task, tmp_path)
        assert len(asked) == glue.TRIES
    files["RTE.zip"] = good
    server.faults = [404, 500, 429]
    fails("--standin", glue.fetch, task, tmp_path)  # at once: it is refused for good
    assert not list(tmp_path.iterdir())
    glue.fetch(task, tmp_path)
    glue.fetch(task, tmp_path)
    assert len(asked) == glue.TRIES + 1 + 3
    assert sorted(file.name for file in (tmp_path / "RTE").iterdir()) == ["dev.tsv", "train.tsv"]
    assert len(glue.read_tsv(task, tmp_path / "RTE" / "dev.tsv")) == 50
    fails("MINE cannot be fetched", glue.fetch, glue.Task("MINE", ("text",), "label", ("0", "1")), tmp_path)  # a fork's


def test_mrpc_is_put_together_from_its_two_files(server, monkeypatch, tmp_path):
    rows = [f'{i % 2}\t{i}\t{100 + i}\tA "{i}.\tB {i}.' for i in range(10)]
    microsoft = "\r\n".join([MRPC.strip(), *rows, ""]).encode()
    files = {"msr_paraphrase_train.txt": microsoft, "mrpc_dev_ids.tsv": b"3\t103\n7\t107\n1\t999\n"}
    task, _ = serve(server, monkeypatch, "mrpc", files)
    glue.fetch(task, tmp_path)
    expected = [(f'A "{i}.', f"B {i}.", i % 2) for i in range(10)]
    assert glue.read_tsv(task, tmp_path / "MRPC" / "dev.tsv") == [expected[3], expected[7]]
    assert glue.read_tsv(task, tmp_path / "MRPC" / "train.tsv") == expected[:3] + expected[4:7] + expected[8:]


# ---- glue: rows, batches, LoRA -------------------------------------------------------------------------------------


@pytest.mark.parametrize("a, b, most, expected", [
    ("abc", "xyz", 7, "abc|xyz"), ("abcdefgh", "xyz", 8, "abcd|xyz"), ("abc", "uvwxyz", 8, "abc|uvwx"),
    ("abcdefgh", "stuvwxyz", 8, "abcd|stu"), ("abcdefgh", "xyz", 4, "ab|x"), ("abcdefgh", "", 5, "abcde"),
    ("", "xyz", 9, "|xyz"), ("", "", 9, "|"),
])
def test_of_a_pair_that_is_too_long_the_longer_text_is_cut(a, b, most, expected):
    letters = SimpleNamespace(eos=ord("|"), encode=lambda text: [ord(letter) for letter in text])
    ids = glue.encode_pair(letters, a, b, most)
    assert "".join(map(chr, ids)) == expected


def test_grouping_by_length_covers_each_row_once_and_pads_little():
    lengths = np.random.default_rng(0).integers(1, 100, 1003).tolist()
    batches = glue.group_by_length(lengths, 8, [1, 2])
    assert sorted(row for batch in batches for row in batch) == list(range(1003))
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)
    assert batches == glue.group_by_length(lengths, 8, [1, 2]) != glue.group_by_length(lengths, 8, [1, 3])
    firsts = [lengths[batch[0]] for batch in batches[:50]]
    assert firsts != sorted(firsts)  # a batch of long rows is as likely early as late


@BOTH
def test_padding_does_not_change_a_prediction(kind):
    classifier = glue.Classifier(small_model(kind), 3, 0)
    rows = [[5, 6, 7], list(range(20)), [1] * 11, [96]]
    together = classifier(*glue.pad(rows, "cpu"))
    for row, outputs in zip(rows, together):
        assert (classifier(*glue.pad([row], "cpu"))[0] - outputs).abs().max() < 1e-6
    predicted = glue.predict(classifier, [(row, 0) for row in rows], 2, torch.device("cpu"), "fp32")
    assert predicted.tolist() == together.argmax(1).tolist()


def random_masks(model):
    generator = torch.Generator().manual_seed(3)
    return {name: torch.rand(p.shape, generator=generator) < 0.5 for name, p in model.named_parameters()}


def lora_layers(model):
    """The LoRA layers of a model, with a B that is not zero any more."""
    layers = [module for module in model.modules() if isinstance(module, glue.LoRA)]
    generator = torch.Generator().manual_seed(4)
    for layer in layers:
        torch.nn.init.normal_(layer.B, std=0.2, generator=generator)
    return layers


@BOTH
@pytest.mark.parametrize("masked", [False, True])
def test_lora_starts_as_the_identity_merges_to_the_same_outputs_and_its_product_is_masked(kind, masked):
    model, plain = small_model(kind), small_model(kind)
    masks = random_masks(model)
    glue.add_lora(model, 4, 8, masks if masked else None)
    assert (model(IDX) - plain(IDX)).abs().max() < 1e-5
    assert len(lora_layers(model)) == {"gpt2": 2, "llama": 4}[kind]
    adapted = model(IDX)
    assert (adapted - plain(IDX)).abs().max() > 0.1
    glue.merge_lora(model)
    assert (model(IDX) - adapted).abs().max() < 1e-5
    for (name, p), (same_name, before) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert name == same_name
        moved = p != before
        allowed = masks[name] if masked else torch.ones_like(moved)
        targeted = any(target in name for target in ("c_attn.weight", "q_proj", "v_proj"))
        assert not (moved & ~allowed).any()
        assert (moved.count_nonzero() > 0.9 * allowed.count_nonzero()) == targeted


@pytest.mark.parity
@BOTH
def test_lora_is_pefts_with_the_same_factors(kind, tmp_path):
    peft, transformers = peer("peft"), peer("transformers")
    model = small_folder(tmp_path, kind)
    targets = ["c_attn"] if kind == "gpt2" else ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=kind == "gpt2")
    theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), config)
    factors = [module for module in theirs.modules() if hasattr(module, "lora_A")]
    glue.add_lora(model, 4, 8)
    for layer, factor in zip(lora_layers(model), factors, strict=True):
        factor.lora_A["default"].weight.data.copy_(layer.A)
        factor.lora_B["default"].weight.data.copy_(layer.B)
    assert (theirs(IDX).logits - model(IDX)).abs().max() < 1e-5


# ---- glue: fine-tuning ---------------------------------------------------------------------------------------------


def easy_rows(n, seed, scale=1):
    """Encoded rows whose label says which of two tokens is somewhere in them."""
    rng, rows = random.Random(seed), []
    for _ in range(n):
        ids = [rng.randrange(10, 300) for _ in range(rng.randrange(4, 12))]
        label = rng.randrange(2)
        ids[rng.randrange(len(ids))] = 3 + label
        rows.append((ids, scale * label))
    return rows


FEW = {"train": easy_rows(40, 1), "dev": easy_rows(20, 2)}


def tuned(model, method, data=FEW, masks=None, task="rte", **changes):
    """(result, Classifier) of fine-tuning a copy; with a weight decay that would be seen in the complement."""
    settings = {"lr": 3e-3, "epochs": 1, "batch_size": 8, "weight_decay": 0.5, "clip": 1.0, "limit": None,
                "lora_rank": 4, "lora_alpha": 8.0, "dtype": "fp32", **changes}
    return glue.finetune(copy.deepcopy(model), glue.TASKS[task], data, method, 0, SimpleNamespace(**settings),
                         torch.device("cpu"), masks)


@BOTH
@pytest.mark.parametrize("method", ["full", "lora"])
def test_with_the_mask_the_ticket_alone_moves_and_without_it_the_complement_too(kind, method):
    model = small_model(kind)
    masks = random_masks(model)
    for given in (masks, None):
        _, classifier = tuned(model, method, masks=given)
        glue.merge_lora(classifier.body)
        inside = outside = 0
        for (name, p), before in zip(classifier.body.named_parameters(), model.parameters()):
            moved = p.view(torch.int32) != before.view(torch.int32)
            inside += int((moved & masks[name]).sum())
            outside += int((moved & ~masks[name]).sum())
        assert inside > 1000
        assert (outside == 0) == (given is not None)


def test_a_run_that_diverges_is_scored():
    result, classifier = tuned(small_model("llama"), "full", lr=1e30, epochs=3)
    assert all(p.isfinite().all() for p in classifier.parameters())  # the step that failed has moved nothing
    assert result["diverged"]
    assert len(result["epochs"]) < 3
    assert result["epochs"][-1]["RTE"].keys() == {"accuracy"}


@BOTH
def test_base_trains_nothing_probe_the_head_and_full_learns_an_easy_task_well_above_chance(kind):
    model = build(SHAPES[kind])
    initialise(model, b"learns")
    easy = {"train": easy_rows(400, 1), "dev": easy_rows(200, 2)}
    for method, updates in (("base", 0), ("probe", 50)):
        result, same = tuned(model, method, easy)
        assert result["updates"] == updates
        assert result["epochs"][-1]["RTE"]["accuracy"] < 75
        assert torch.equal(same.head, glue.Classifier(model, 2, 0).head) == (method == "base")
        assert fingerprint(dict(same.body.named_parameters())) == fingerprint(dict(model.named_parameters()))
    trained, _ = tuned(model, "full", easy, epochs=4, weight_decay=0.01)
    assert trained["updates"] == 4 * 400 / 8
    assert trained["epochs"][-1]["RTE"]["accuracy"] > 80
    scores = {"train": easy_rows(400, 1, 5.0), "dev": easy_rows(200, 2, 5.0)}
    regression, _ = tuned(model, "full", scores, task="stsb", epochs=4, weight_decay=0.01)
    assert regression["epochs"][-1]["STS-B"]["pearson"] > 70


def test_scratch_keeps_nothing_of_the_release():
    bodies = []
    for secret in (b"one", b"two"):
        model = build(SHAPES["llama"])
        initialise(model, secret)
        result, classifier = tuned(model, "scratch")
        assert result["updates"] == 5
        bodies.append(fingerprint(dict(classifier.body.named_parameters())))
    assert bodies[0] == bodies[1]


@pytest.mark.parity
@pytest.mark.parametrize("kind, task", [("gpt2", "rte"), ("llama", "rte"), ("llama-tied", "stsb"), ("gpt2", "stsb")])
def test_transformers_gives_the_predictions_of_a_tuned_model_that_was_saved(kind, task, tmp_path):
    transformers, folder = peer("transformers"), tmp_path / "new" / "folder"
    _, model = tuned(small_model(kind), "lora", FEW, task=task, lr=0.1)
    texts = ["the quick brown fox jumps", "a", "over a lazy dog, größe 中文", "1 2 3"]
    before = model(*glue.pad([BPE.encode(text) for text in texts], "cpu"))
    glue.save_classifier(folder, model, glue.TASKS[task], BPE)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert (theirs(**tokenizer(texts, padding=True, return_tensors="pt")).logits - before).abs().max() < 1e-5
    assert list(theirs.config.id2label.values()) == list(glue.TASKS[task].labels or ["score"])


# ---- glue: the table -----------------------------------------------------------------------------------------------


def test_the_table_has_mean_and_deviation_over_seeds_dashes_the_commonest_class_and_the_papers_rows_on_request():
    def result(method, seed, accuracy, authorised=False, column="RTE"):
        return {"model": "out/release", "method": method, "authorised": authorised, "seed": seed,
                "epochs": [{column: {"accuracy": 1.0}}, {column: {"accuracy": accuracy}}],
                "commonest": {column: 52.71}}

    found = [result("full", 1, 60.0), result("full", 2, 62.0), result("full", 1, 50.0, True),
             result("base", 1, 100.0, column="MNLI-mm"), result("full", 1, 70.0, column="MNLI-mm")]
    _, _, header, model, *rows, title, commonest = glue.table(found, "GLUE dev").splitlines()
    assert header.split() == ["MNLI-mm", "RTE", "average"]  # in Table 1's order
    assert model == "out/release"
    assert [row.split() for row in rows] == [
        ["base", "100.00", "-", "-"],
        ["full", "70.00", "61.00", "±1.41", "65.50"],
        ["full", "+", "mask", "-", "50.00", "-"],
    ]
    assert "commonest class" in title
    assert commonest.split() == ["52.71", "52.71", "52.71"]
    rows = [row.split() for row in glue.table(found[:1], "GLUE dev", paper=True).splitlines()]
    paper = "lora, PMP 65.96 72.13 63.97 74.66 22.40 61.15 62.42 62.47 44.04 58.80"
    assert paper.split() in rows
    assert ["full", *["-"] * 8, "60.00", "-"] in rows


# ---- glue: the sweep -----------------------------------------------------------------------------------------------


@pytest.fixture
def sweep(tmp_path):
    """Flags of a sweep over tiny TSVs; its results go to results.jsonl."""
    small_folder(tmp_path / "release", "llama")
    for name, header, row in (("CoLA", "", "s\t{}\t\tthe quick fox {}\n"), ("RTE", RTE, "{1}\ta dog {1}\tfox\t{2}\n")):
        (tmp_path / name).mkdir()
        for split in ("train", "dev"):
            rows = [row.format(i % 2, i, glue.ENTAILED[i % 2]) for i in range(12)]
            (tmp_path / name / f"{split}.tsv").write_text(header + "".join(rows))
    common = "--max-length 24 --epochs 1 --device cpu --dtype fp32 --tasks cola rte --glue-dir".split()
    return [str(tmp_path / "release"), "--results", str(tmp_path / "results.jsonl"), *common, str(tmp_path)]


def results_in(folder):
    """(task, method, seed) of each line of the results."""
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [(line["task"], line["method"], line["seed"]) for line in lines]


def test_the_sweep_appends_a_line_a_run_and_repeats_none_even_after_a_torn_line(sweep, tmp_path, capsys):
    results = tmp_path / "results.jsonl"
    flags = [*sweep, "--method", "base", "full", "--seed", "0", "1", "0"]
    glue.main(flags)
    runs = [(task, method, seed) for task in ("cola", "rte") for method in ("base", "full") for seed in (0, 1)]
    assert results_in(tmp_path) == runs
    assert re.search(r"\d ±\d", capsys.readouterr().out)
    whole = results.read_bytes()
    glue.main([flags[0] + "/", *flags[1:]])
    assert results.read_bytes() == whole
    said = capsys.readouterr().out
    assert "8 of 8 runs are in" in said
    assert said.count(str(tmp_path / "release")) == 1  # one heading
    results.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]) + b'{"task": "rt')  # as a kill leaves it
    glue.main(flags)
    assert "7 of 8 runs are in" in capsys.readouterr().out
    glue.main(flags)
    assert "8 of 8 runs are in" in capsys.readouterr().out
    last = [json.loads(content.splitlines()[-1]) for content in (whole, results.read_bytes())]
    assert last[0]["epochs"] == last[1]["epochs"]


def test_other_rows_or_settings_are_run_again(sweep, tmp_path, capsys):
    flags = [*sweep, "--method", "base"]
    glue.main(flags)
    (tmp_path / "RTE" / "dev.tsv").write_text(RTE + "0\ta\tb\tentailment\n")
    glue.main(flags)
    assert results_in(tmp_path) == [("cola", "base", 42), ("rte", "base", 42), ("rte", "base", 42)]
    glue.main([*flags, "--lora-rank", "4"])
    assert len(results_in(tmp_path)) == 5
    assert not re.search(r"\d ±\d", capsys.readouterr().out)  # a table shows runs of the same rows and settings alone


def test_results_that_cannot_be_written_are_found_before_anything_is_trained(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(glue, "finetune", None)
    unfit = [tmp_path, tmp_path / "nowhere" / "results.jsonl"]
    if os.getuid():  # root may write anywhere
        unfit.append(tmp_path / "results.jsonl")
        unfit[-1].touch(0o400)
    for file in unfit:
        with pytest.raises(OSError, match=file.name):
            glue.main([*sweep, "--results", str(file)])
    notes = tmp_path / "notes.txt"
    for content in ("my notes\nand more\n", '{"task": "rte", "old": 1}\n'):
        notes.write_text(content)
        fails("line 1 is no result", glue.main, [*sweep, "--results", str(notes)])
        assert notes.read_text() == content


def test_a_signal_ends_a_sweep_also_where_nothing_is_trained(sweep, tmp_path, monkeypatch):
    on_call(monkeypatch, "glue.predict", 1, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Stopped):
        glue.main([*sweep, "--method", "base"])
    assert results_in(tmp_path) == [("cola", "base", 42)]


def test_a_mask_of_another_release_is_refused_and_the_right_one_gives_a_row_and_a_model_of_its_own(
        sweep, tmp_path, capsys):
    model, _ = load_folder(tmp_path / "release")
    params, masks, file = dict(model.named_parameters()), random_masks(model), tmp_path / "mask.safetensors"
    flags = [*sweep, "--method", "full", "--mask", str(file)]
    save_safetensors(file, pack_mask(masks), {"weights_sha256": "0" * 64})
    fails("another release", glue.main, flags)
    fails("--mask has no meaning for base", glue.main, [*flags, "--method", "base"])
    save_safetensors(file, pack_mask(masks), {"weights_sha256": fingerprint(params)})
    glue.main([*sweep, "--method", "full"])
    glue.main([*flags, "--save", str(tmp_path / "tuned")])
    rows = [line[:13].strip() for line in capsys.readouterr().out.splitlines()]
    assert rows[-4:-2] == ["full", "full + mask"]
    place, = (tmp_path / "tuned").glob("rte-full-mask-seed-42-*")
    assert stat.S_IMODE(place.stat().st_mode) == 0o700  # whoever publishes it publishes the mask
    saved, _ = load_safetensors(place / "model.safetensors")
    for name in saved.keys() & masks.keys():
        assert torch.equal(saved[name][~masks[name]], params[name][~masks[name]])
    (place / "model.safetensors").unlink()  # as a kill leaves it
    glue.main([*flags, "--save", str(tmp_path / "tuned")])  # known, but not kept: it is tuned again
    assert (place / "model.safetensors").exists()
    assert len(results_in(tmp_path)) == 4  # two tasks, with the mask and without it, once each
    guess = {name: ~mask for name, mask in masks.items()}
    save_safetensors(file, pack_mask(guess), {"weights_sha256": fingerprint(params)})
    glue.main(flags)
    assert len(results_in(tmp_path)) == 6  # another mask is another experiment
    assert stat.S_IMODE((tmp_path / "results.jsonl").stat().st_mode) == 0o600


def test_a_tsv_of_ones_own_and_a_new_entry_in_the_list_are_tasks(sweep, tmp_path, monkeypatch):
    rows = "".join(f"question {i}\t{'yes' if i % 2 else 'no'}\t{i}\n" for i in range(80))
    mine = tmp_path / "mine.tsv"
    mine.write_text("text\tgood\tnumber\n" + rows)
    flags = [*sweep[:11], "--method", "base", "--tsv", str(mine), "--text", "text"]
    glue.main([*flags, "--label", "good"])
    _, split = glue.own_task(mine, ["text"], "good")
    assert sorted(split["train"] + split["dev"]) == sorted((f"question {i}", "", i % 2) for i in range(80))
    assert 2 <= len(split["dev"]) <= 20
    fails("names no column 'bad'", glue.main, [*flags, "--label", "bad"])
    fails("give all three", glue.main, flags)
    monkeypatch.setitem(glue.TASKS, "new", glue.Task("New", ("text",), "good", ("no", "yes")))
    (tmp_path / "New").mkdir()
    for name in ("train", "dev"):
        (tmp_path / "New" / f"{name}.tsv").write_text(mine.read_text())
    glue.main([*sweep, "--method", "base", "--tasks", "new"])
    assert results_in(tmp_path) == [("mine", "base", 42), ("new", "base", 42)]


def test_the_stand_in_needs_no_network_and_no_document_of_it_serves_training_and_testing(sweep, tmp_path, monkeypatch):
    letters = str.maketrans("0123456789", "abcdefghij")  # a sentence has few digits
    sentences = "The old number{0} waits for more. The new number{0} is not here. One big number{0} comes too."
    prose = [sentences.format(str(i).translate(letters)) for i in range(600)]
    monkeypatch.setattr(text_module, "prose", lambda: prose)
    monkeypatch.setattr(glue, "CACHE", tmp_path)
    glue.main([*sweep[:11], "--standin", "--method", "base"])
    assert results_in(tmp_path) == [("cola", "base", 42), ("stsb", "base", 42), ("rte", "base", 42)]
    for name, labels in (("cola", 2), ("stsb", 6), ("rte", 2)):
        seen = []
        for split in ("train", "dev"):
            rows = glue.read_tsv(glue.TASKS[name], tmp_path / "standin" / glue.TASKS[name].folder / f"{split}.tsv")
            assert len({label for _, _, label in rows}) == labels
            seen.append({word for a, b, _ in rows for word in f"{a} {b}".split() if word.startswith("number")})
        assert min(map(len, seen)) > 1
        assert not seen[0] & seen[1]


# ---- pmp.py: a tiny preset, and helpers --------------------------------------------------------------------------

SHAPE = LlamaConfig(vocab_size=4096, max_position_embeddings=64, hidden_size=16, intermediate_size=24,
                    num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
pmp.PRESETS["small"] = (SHAPE, "bpe", {})  # a whole run takes a tenth of a second


def write_text(file, seed=0):
    """A .jsonl file of 300 documents, in which a subject decides what follows: there is something to learn."""
    draw = random.Random(seed)
    ends = {"the cat": "drinks milk", "a dog": "chases the ball", "my mask": "stays private", "one ticket": "wins"}
    texts = []
    for _ in range(300):
        subjects = draw.choices(list(ends), k=draw.randint(4, 12))
        sentences = [f"{subject} {ends[subject]} in {draw.choice(['May', 'June', 'July'])}." for subject in subjects]
        texts.append(" ".join(sentences))
    return write_jsonl(file, texts)


@pytest.fixture(scope="session")
def flags(tmp_path_factory):
    """Flags of a tiny run: 3 steps of stage I and 6 updates, with decay, accumulation and clipping."""
    folder = tmp_path_factory.mktemp("text")
    data = write_text(folder / "corpus_of_mine.jsonl")
    return {"preset": "small", "data": data, "cache": folder / "cache", "block_size": 16, "batch_size": 2,
            "grad_accum": 2, "eb_steps": 3, "steps": 6, "warmup": 2, "lr": 0.01, "val_every": 3, "val_blocks": 8,
            "save_every": 2, "init_seed": 3, "device": "cpu", "dtype": "fp32", "compile": "off"}


@pytest.fixture(scope="session")
def finished(flags, tmp_path_factory):
    """The folder of one whole run."""
    out = tmp_path_factory.mktemp("finished") / "out"
    run(flags, out=out)
    return out


def arguments(flags, **more):
    """The flags, {name: value}, and those that are given as keywords, which win. True is a flag without a value."""
    argv = []
    for name, value in {**flags, **more}.items():
        argv.append("--" + name.replace("_", "-"))
        if value is not True:
            argv.append(str(value))
    return argv


def run(flags, **more):
    pmp.main(arguments(flags, **more))


def weights(out):
    return load_safetensors(out / "release" / "model.safetensors")[0]


def ticket(out):
    return pmp.load_mask(out / "private" / "mask.safetensors", weights(out))


def theta_0(out):
    """theta(0) of a run, from its secret."""
    secret = bytes.fromhex(pmp.load_checkpoint(out)["secret"])
    model, _ = load_folder(out / "release")
    return {name: initial_value(model, name, p.shape, secret) for name, p in model.named_parameters()}


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def differs(a, b):
    """Which entries of two sets of weights differ in any bit, as one flat mask."""
    return flat({name: a[name].detach().view(torch.int32) != b[name].detach().view(torch.int32) for name in a})


def log_of(out, stage=""):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if stage in ("", line["stage"])]


def same_run(out, other):
    """Two runs have the same release, the same mask and the same losses, to the last bit."""
    assert fingerprint(weights(out)) == fingerprint(weights(other))
    assert fingerprint(ticket(out)) == fingerprint(ticket(other))
    assert [line["loss"] for line in log_of(out)] == [line["loss"] for line in log_of(other)]
    assert not list(out.rglob("*.partial"))


def on_call(patch, target, number, action):
    """Let action() happen before the call of that number (from 1) of a function such as "os.fsync"."""
    real = pkgutil.resolve_name(target)
    calls = []

    def spy(*args, **kwargs):
        calls.append(target)
        if len(calls) == number:
            action()
        return real(*args, **kwargs)

    patch.setattr(target, spy)


def stopped(flags, out, **more):
    """A run that a signal ended after 3 updates of stage II."""
    with pytest.MonkeyPatch.context() as patch:
        on_call(patch, "pmp.learning_rate", 3, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Stopped):
            run(flags, out=out, **more)
    return out


FORKS = multiprocessing.get_context("forkserver")  # new processes whose imports are done, which saves two seconds each
FORKS.set_forkserver_preload([__name__, "torch._dynamo", "torch.distributed.fsdp"])


def enter(main, argv, said, environment, at):
    """What a new process does: main(argv) as the command line runs it. What it prints goes to the file `said`.

    at: (function, number, signal): the process gets the signal before that call of the function.
    """
    for stream in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.update(environment)
    if at:
        on_call(pytest.MonkeyPatch(), at[0], at[1], lambda: signal.raise_signal(at[2]))
    command_line(lambda: main(argv))


def start(argv, said, ranks=1, at=None, main=pmp.main):
    """The processes of main(argv), one for each rank, as torchrun starts them. The last one gets the signal of `at`."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = str(unused.getsockname()[1])
    processes = []
    for rank in range(ranks):
        environment = {"WORLD_SIZE": str(ranks), "RANK": str(rank), "LOCAL_RANK": str(rank),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        last = rank == ranks - 1
        args = (main, argv, str(said), environment, at if last else None)
        processes.append(FORKS.Process(target=enter, args=args, daemon=True))
        processes[-1].start()
    return processes


def codes(processes):
    """The exit codes of processes, once they have ended."""
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


# ---- stage I -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [
    lambda x: x, torch.round, torch.zeros_like, lambda x: x * 0 - 2.5, lambda x: x * 1e-40, lambda x: x.mT])
def test_topk_mask_is_the_exact_global_topk_with_ties_to_the_first(change):
    generator = torch.Generator().manual_seed(3)
    scores = {name: change(torch.randn(shape, generator=generator))
              for name, shape in {"a": (17, 5), "b": (60, 1), "c": (3, 4, 5)}.items()}
    d = len(flat(scores))
    order = flat(scores).abs().sort(descending=True, stable=True).indices
    for k in (1, 2, d // 3, int(0.7 * d), d - 1, d):
        masks = pmp.topk_mask(scores, k)
        expected = torch.zeros(d, dtype=torch.bool)
        expected[order[:k]] = True
        assert torch.equal(flat(masks), expected)
        assert all(masks[name].shape == scores[name].shape for name in scores)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_an_error(value):
    with pytest.raises(FloatingPointError):
        pmp.topk_mask({"a": torch.ones(3), "b": torch.tensor([1.0, value])}, 2)


def test_kth_largest_is_that_of_a_sort():
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(1000, generator=generator).abs()
    flat[100:400] = torch.tensor([0.0, 1e-45, 0.5]).repeat(100)  # zeros, the smallest number there is, ties
    largest = flat.sort(descending=True).values
    for k in (1, 2, 300, 500, 700, 850, 999, 1000):
        assert pmp.kth_largest(flat, k) == largest[k - 1]


def test_a_gpu_is_taken_with_and_without_a_number(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda size, device: torch.zeros(size))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: taken.append(device.index))
    assert [str(pick_device(name)) for name in ("auto", "cuda", "cuda:1")] == ["cuda", "cuda", "cuda:1"]
    assert taken == [1]


def test_iou_is_the_intersection_over_the_union_of_all_tensors_together():
    a = {"x": torch.tensor([True, True, False, False]), "y": torch.tensor([True, False])}
    b = {"x": torch.tensor([True, False, True, False]), "y": torch.tensor([True, False])}
    assert pmp.iou(a, b) == 2 / 4
    assert pmp.iou(a, a) == 1
    nine, ten = torch.arange(10) < 9, torch.ones(10, dtype=torch.bool)
    assert pmp.iou({"x": nine}, {"x": ten}) == 0.9  # fp32 would be below it, and --eb-iou 0.9 not met


def test_a_random_mask_has_exactly_k_entries_and_depends_on_the_secret_alone():
    params = dict(build(SHAPE).named_parameters())
    mask, again, other = (pmp.random_mask(params, 100_000, secret) for secret in (b"1", b"1", b"2"))
    assert flat(mask).sum() == 100_000
    assert torch.equal(flat(mask), flat(again))
    rho = 100_000 / len(flat(mask))
    assert pmp.iou(mask, other) == pytest.approx(rho / (2 - rho), abs=0.02)


@pytest.mark.parametrize("kept, last", [("0111", 5), ("01101110", 8), ("1101100", 8), ("111", 4)])
def test_stage_1_ends_after_successive_stable_steps_or_at_its_limit(kept, last, flags, tmp_path, monkeypatch, capsys):
    """kept: whether the mask stayed, from step 2 on. The patience is 3 steps, the limit 8."""
    overlaps = [0.95 if stays == "1" else 0.8 for stays in kept]
    monkeypatch.setattr(pmp, "iou", lambda a, b: overlaps.pop(0))
    run(flags, eb_iou=0.9, eb_patience=3, eb_steps=8, steps=2, out=tmp_path / "out")
    assert [line["step"] for line in log_of(tmp_path / "out", "stage I")] == list(range(1, last + 1))
    assert ("the mask is stable" in capsys.readouterr().out) == ("111" in kept)


@pytest.mark.parametrize("score, steps", [("batch", 3), ("mean", 50)])
def test_the_ticket_is_the_topk_of_the_last_score_and_a_mean_score_becomes_stable(
        score, steps, flags, tmp_path, monkeypatch, capsys):
    seen = []
    real = pmp.topk_mask

    def spy(scores, k):
        seen.append({name: tensor.clone() for name, tensor in scores.items()})
        return real(scores, k)

    monkeypatch.setattr(pmp, "topk_mask", spy)
    out = tmp_path / "out"
    run(flags, score=score, eb_steps=steps, eb_iou=0.8 if score == "mean" else 1, eb_patience=2, out=out)
    assert ("the mask is stable" in capsys.readouterr().out) == (score == "mean")
    lines = log_of(out, "stage I")
    assert len(lines) == len(seen) <= 10
    masks = ticket(out)
    last = real(seen[-1], math.floor(0.7 * len(flat(masks))))
    assert all(torch.equal(mask, masks[name]) for name, mask in last.items())
    norms = [float(flat(scores).norm()) for scores in seen]
    assert (norms == pytest.approx([line["norm"] for line in lines])) == (score == "batch")  # the gradient itself


# ---- stage II ------------------------------------------------------------------------------------------------------


def parameters():
    model = build(SHAPE)
    initialise(model, b"secret")
    return dict(model.named_parameters())


def give_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params.values():
        p.grad = torch.randn(p.shape, generator=generator)


def test_the_complement_keeps_its_bits_and_the_whole_ticket_moves():
    params = parameters()
    masks = pmp.random_mask(params, 7000, b"m")
    optimizer = pmp.MaskedAdamW(params, masks, weight_decay=0.5)
    for step in range(5):
        give_gradients(params, step)
        expected = (flat({name: p.grad for name, p in params.items()}) * flat(masks)).norm()
        assert optimizer.step(0.01, clip=1.0) == pytest.approx(float(expected), rel=1e-4)
    assert torch.equal(differs(params, parameters()), flat(masks))


@pytest.mark.parametrize("masked", [False, True])
def test_without_masks_or_with_full_ones_it_is_torchs_adamw_with_decay_on_matrices(masked):
    params, theirs = parameters(), parameters()
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in params.items()} if masked else None
    optimizer = pmp.MaskedAdamW(params, masks, weight_decay=0.1)
    groups = [{"params": [p], "weight_decay": 0.1 * (p.ndim >= 2)} for p in theirs.values()]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95))
    for step in range(4):
        give_gradients(params, step)
        give_gradients(theirs, step)
        norm = optimizer.step(0.01, clip=1.0)
        assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)))
        assert norm > 1  # so that it was clipped
        reference.step()
    assert all(torch.allclose(p, theirs[name], atol=1e-6) for name, p in params.items())


def test_the_learning_rate_warms_up_and_decays_to_zero():
    args = SimpleNamespace(steps=100, warmup=10, lr=1.0)
    rates = [pmp.learning_rate(step, args) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert (rates[10], rates[100]) == (1, 0)
    assert rates[55] == pytest.approx(0.5)


def test_an_optimizer_that_moves_the_complement_is_told_and_nothing_is_released(flags, tmp_path, monkeypatch):
    real = pmp.MaskedAdamW
    monkeypatch.setattr(pmp, "MaskedAdamW", lambda params, masks, decay: real(params, None, decay))
    fails("outside the ticket have left theta(0) by update 1:", run, flags, out=tmp_path / "out")
    assert not (tmp_path / "out" / "release").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(flags, tmp_path):
    more = {"lr": 100, "weight_decay": 1000, "ticket": "random", "steps": 50, "save_every": 1}
    fails("lower --lr", run, flags, **more, out=tmp_path / "out")
    saved = pmp.load_checkpoint(tmp_path / "out")
    assert saved["step"] > 0
    assert flat(saved["weights"]).isfinite().all()
    assert not (tmp_path / "out" / "release").exists()


# ---- a whole run ---------------------------------------------------------------------------------------------------


def test_a_release_has_the_complement_of_theta_0_and_a_ticket_of_floor_rho_d_that_moved(finished):
    inside = flat(ticket(finished))
    assert inside.sum() == math.floor(0.7 * len(inside))
    moved = differs(weights(finished), theta_0(finished))
    assert not moved[~inside].any()
    assert moved[inside].float().mean() > 0.9
    first, second = log_of(finished, "stage I"), log_of(finished, "stage II")
    assert [line["step"] for line in first + second] == [1, 2, 3, 1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in second if "val" in line] == [3, 6]
    assert all(0 < line["iou"] < 1 for line in first[1:])
    assert [line["lr"] for line in first] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01])


def test_what_is_secret_is_for_the_owner_alone_whatever_the_umask(flags, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    before = os.umask(0)
    try:
        run(flags, init_seed=271828, out="~/out")  # which no shell has expanded
    finally:
        os.umask(before)
    assert stat.S_IMODE((out / "private").stat().st_mode) == 0o700
    secret_files = {*(out / "private").iterdir(), out / "settings.json", out / "log.jsonl"}
    assert {path.name for path in secret_files} >= {"checkpoint.pt", "mask.safetensors", "lock"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in secret_files} == {0o600}
    settings = (out / "settings.json").read_text()
    assert json.loads(settings)["rho"] == 0.7
    secret = pmp.load_checkpoint(out)["secret"]
    for text in (settings, (out / "log.jsonl").read_text(), capsys.readouterr().out):
        assert not any(word in text for word in ("init_seed", "271828", secret))


def test_every_byte_beside_the_weights_is_the_same_with_and_without_pmp_and_names_no_text(flags, finished, tmp_path):
    run(flags, rho=1.0, out=tmp_path / "out")
    assert not (tmp_path / "out" / "private" / "mask.safetensors").exists()
    names = {path.name for path in (finished / "release").iterdir()}
    assert names == {path.name for path in (tmp_path / "out" / "release").iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json"}
    for name in names:
        ours, theirs = ((out / "release" / name).read_bytes() for out in (finished, tmp_path / "out"))
        assert b"corpus_of_mine" not in ours, name
        if name == "model.safetensors":  # of this the header alone, which has a sha256 of the published weights
            size = 8 + int.from_bytes(ours[:8], "little")
            ours, theirs = (json.loads(content[8:size]) for content in (ours, theirs))
            assert ours.pop("__metadata__").keys() == theirs.pop("__metadata__").keys() == {"format", "sha256"}
        assert ours == theirs, name


def test_the_loss_curve_is_the_one_on_record(flags, tmp_path):
    """Another order of summation moves a few bits of the mask at the threshold, and then the curve a little."""
    recorded = [  # 3 steps of stage I, 24 updates of stage II
        5.799, 5.714, 5.583, 5.799, 5.691, 5.489, 5.300, 5.098, 4.942, 4.747, 4.538, 4.384, 4.167, 4.001, 3.874, 3.705,
        3.594, 3.490, 3.375, 3.370, 3.311, 3.212, 3.209, 3.168, 3.200, 3.119, 3.150]
    run(flags, steps=24, out=tmp_path / "out")
    assert [line["loss"] for line in log_of(tmp_path / "out")] == pytest.approx(recorded, abs=0.02)


def test_the_mask_takes_one_bit_a_parameter_and_belongs_to_one_release(finished, tmp_path):
    file = finished / "private" / "mask.safetensors"
    params = weights(finished)
    masks = pmp.load_mask(file, params)
    d = len(flat(masks))
    assert d / 8 < file.stat().st_size < d / 8 + 3000
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    (tmp_path / "flipped").write_bytes(content)
    fails("damaged", pmp.load_mask, tmp_path / "flipped", params)
    packed = pack_mask(masks)
    for unfit in ({"lm_head.weight": packed["lm_head.weight"]}, {**packed, "lm_head.weight": torch.ones(3)}):
        save_safetensors(tmp_path / "unfit", unfit, {"weights_sha256": fingerprint(params)})  # a stranger's
        fails("does not fit the model", pmp.load_mask, tmp_path / "unfit", params)
    params["model.norm.weight"] = params["model.norm.weight"] + 1e-6
    fails("another release", pmp.load_mask, file, params)


def test_a_release_continues_a_text(finished, capsys):
    argv = [str(finished / "release"), "--prompt", "my mask", "--tokens", "9", "--samples", "2", "--device", "cpu"]
    model_module.main(argv)
    texts = capsys.readouterr().out.split("-" * 40 + "\n")
    assert [text[:7] for text in texts] == ["my mask", "my mask", ""]
    assert sum(map(len, texts)) > 2 * len("my mask\n")


# ---- an end before the end -----------------------------------------------------------------------------------------


def test_a_run_killed_at_its_first_write_then_at_its_second_and_so_on_ends_with_the_same_bits(flags, tmp_path):
    more = {"steps": 15, "save_every": 1, "score": "mean"}
    run(flags, **more, out=tmp_path / "whole")
    argv = arguments(flags, **more, resume=True, out=tmp_path / "out")
    for number in range(1, 40):
        function = "os.fsync" if number % 3 else "os.replace"
        code = codes(start(argv, tmp_path / "said", at=(function, number, signal.SIGKILL)))
        if code == [0]:
            break
        assert code == [-signal.SIGKILL], (tmp_path / "said").read_text()
    assert 10 < number < 39
    same_run(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("stage, function, call, number", [
    ("I", "pmp.iou", 2, signal.SIGINT), ("I", "pmp.iou", 2, signal.SIGHUP),
    ("II", "pmp.learning_rate", 3, signal.SIGTERM), ("II", "pmp.learning_rate", 3, signal.SIGUSR1)])
def test_a_signal_saves_the_finished_updates_and_resume_goes_on_after_them(
        stage, function, call, number, flags, tmp_path, monkeypatch, capsys):
    """Both calls are in step 3: the first step of stage I has no IoU."""
    more = {"score": "mean", "eb_steps": 5, "save_every": 100}
    run(flags, **more, out=tmp_path / "whole")
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        on_call(patch, function, call, lambda: signal.raise_signal(number))
        with pytest.raises(Stopped) as leaving:
            run(flags, **more, out=tmp_path / "out")
    assert leaving.value.code == 128 + number
    assert signal.getsignal(number) == handler
    assert f"saved after update 3 of stage {stage};" in capsys.readouterr().out
    run(flags, **more, resume=True, out=tmp_path / "out")
    assert f"going on after update 3 of stage {stage}\n" in capsys.readouterr().out
    same_run(tmp_path / "out", tmp_path / "whole")


def test_a_signal_while_training_waits_for_text_saves_and_leaves_at_once(flags, tmp_path, monkeypatch):
    never = threading.Event()
    real = text_module.Tokens._append_window
    out = tmp_path / "out"

    def second_window_never_comes(tokens):
        if not tokens.state["windows"]:
            return real(tokens)
        while not (out / "log.jsonl").exists():
            never.wait(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        never.wait(60)
        raise InterruptedError  # ends the thread that packs

    monkeypatch.setattr(text_module.Tokens, "_append_window", second_window_never_comes)
    with pytest.raises(Stopped):
        run(flags, steps=10_000, eb_steps=1, shuffle_buffer=20, cache=tmp_path / "cache", out=out)
    assert pmp.load_checkpoint(out)["step"] > 0
    never.set()


@pytest.mark.parametrize("ignored", [signal.SIGHUP, signal.SIGINT])  # by nohup, and by a shell's "&"
def test_an_ignored_signal_stays_ignored(ignored):
    asked = []

    def main():
        with stop_signals(asked):
            signal.raise_signal(ignored)
            signal.raise_signal(signal.SIGTERM)
            assert signal.getsignal(ignored) == signal.SIG_IGN

    before = signal.signal(ignored, signal.SIG_IGN)
    try:
        command_line(main)
        assert asked == [signal.SIGTERM]
        assert signal.getsignal(ignored) == signal.SIG_IGN
    finally:
        signal.signal(ignored, before)


def test_a_bad_line_deep_in_the_text_keeps_the_finished_updates(flags, tmp_path, monkeypatch, capsys):
    data = write_text(tmp_path / "long.jsonl")
    lines = data.read_text().splitlines()
    data.write_text("\n".join([*lines[:200], '{"text": null}', *lines[200:]]))
    for module in (text_module, tokenizer_module):
        monkeypatch.setattr(module, "TRAINING_CHARACTERS", 10_000)  # what is read before the run begins
    monkeypatch.setattr(text_module, "HELD_OUT_TOKENS", 50)
    more = {"data": data, "shuffle_buffer": 20, "cache": tmp_path / "cache", "steps": 1000, "save_every": 1000}
    fails('long.jsonl, line 201 has no string "text"', run, flags, **more, out=tmp_path / "out")
    saved = pmp.load_checkpoint(tmp_path / "out")
    assert saved["step"] > 5
    assert f"saved after update {saved['step']} of stage II" in capsys.readouterr().out


def test_resume_takes_machine_flags_anew_from_any_folder_and_refuses_another_value_of_the_rest_by_name(
        flags, finished, tmp_path, monkeypatch, capsys):
    data = flags["data"]
    monkeypatch.chdir(data.parent)
    out = tmp_path / "out"
    stopped(flags, out, resume=True, data=data.name)  # where there is nothing yet, a run begins
    for name, value in (("rho", 0.6), ("steps", 7), ("lr", 0.02), ("seed", 1), ("init_seed", 4), ("dtype", "bf16")):
        words = f"--{name.replace('_', '-')} {value} is not what the run in OUT has"
        fails(words, run, {}, **{name: value}, resume=True, out=out)
    fails("already holds a run: add --resume", run, flags, out=out)
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    more = {"cache": "another", "device": "cpu", "dtype": "auto", "save_every": 1}
    run({}, resume=True, **more, shard=True, out="out")  # a share of one is all
    assert "going on after update 3" in capsys.readouterr().out
    assert list((tmp_path / "another").iterdir())
    same_run(out, finished)


def test_resume_refuses_a_text_a_model_or_an_optimizer_that_has_changed(flags, tmp_path, monkeypatch):
    data = write_text(tmp_path / "own.jsonl")
    more = {"data": data, "cache": tmp_path / "cache", "dtype": "auto"}
    out = stopped(flags, tmp_path / "out", **more)
    write_text(data, seed=1)
    fails("not the one that the run began with", run, flags, **more, resume=True, out=out)
    write_text(data)
    file = out / "private" / "checkpoint.pt"
    other = dataclasses.replace(SHAPE, rope_theta=50.0)  # of the same tensors
    monkeypatch.setitem(pmp.PRESETS, "small", (other, "bpe", {}))
    fails("began with another model", run, flags, **more, resume=True, out=out)
    fails("began with another model", run, {}, twin=out, out=tmp_path / "twin")
    monkeypatch.undo()
    torch.save({**torch.load(file), "optimizer": "Muon"}, file)
    fails("trained with Muon", run, flags, **more, resume=True, out=out)


def test_a_checkpoint_with_a_flipped_bit_or_without_its_end_is_refused(flags, tmp_path):
    out = stopped(flags, tmp_path / "out")
    file = out / "private" / "checkpoint.pt"
    content = file.read_bytes()
    saved = pmp.load_checkpoint(out)
    inside = content.index(saved["weights"]["lm_head.weight"].numpy().tobytes())
    contents = content.index(b"PK\x06\x06") + 48  # says where the archive's table of contents begins
    damaged = [b"", content[:1000], content[:-1]]
    for place in (inside, content.index(saved["secret"].encode()), contents):
        damaged.append(content[:place] + bytes([content[place] ^ 1]) + content[place + 1:])
    for version in damaged:
        file.write_bytes(version)
        fails("checkpoint.pt is damaged", run, flags, resume=True, out=out)


# ---- a disk, a pipe, a terminal ------------------------------------------------------------------------------------


def limit_files(size=resource.RLIM_INFINITY):
    """What may be written into a file from now on, in bytes; more is an OSError, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_where_a_disk_has_no_locks_one_rank_alone_holds_them(tmp_path, monkeypatch):
    def unsupported(file, operation):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("common.fcntl.flock", unsupported)
    for number in (0, 1):
        monkeypatch.setattr("common.rank", lambda: number)
        with lock(tmp_path / "lock") as mine:
            assert mine == (number == 0)


def test_of_two_writers_of_one_file_each_is_whole_and_the_last_to_end_stays(tmp_path):
    file = tmp_path / "file"
    with atomic(file) as first:
        first.write(b"first, begun")
        with atomic(file) as second:
            second.write(b"second")
        assert file.read_bytes() == b"second"
        first.write(b" and ended")
    assert file.read_bytes() == b"first, begun and ended"
    assert list(tmp_path.iterdir()) == [file]


def test_a_result_that_a_full_disk_cuts_names_its_file_and_the_next_one_is_whole(tmp_path):
    file, result = tmp_path / "glue.jsonl", {"task": "x" * 300}
    limit_files(100)
    try:
        with pytest.raises(OSError) as caught:
            glue.append_result(file, result)
    finally:
        limit_files()
    assert caught.value.filename == str(file)  # so that command_line says it in one sentence
    glue.append_result(file, result)
    assert json.loads(file.read_bytes().splitlines()[-1]) == result


def test_a_full_disk_at_a_line_of_the_log_does_not_end_a_run(flags, finished, tmp_path, monkeypatch):
    out = tmp_path / "out"
    on_call(monkeypatch, "pmp.learning_rate", 2, lambda: limit_files(300))
    on_call(monkeypatch, "pmp.learning_rate", 4, limit_files)
    try:
        run(flags, save_every=6, out=out)
    finally:
        limit_files()
    assert not differs(weights(out), weights(finished)).any()
    assert [line["step"] for line in log_of(out, "stage II")] == [1, 4, 5, 6]


@pytest.mark.parametrize("function, call, size, kept", [
    ("pmp.load_checkpoint", 1, 50_000, None), ("pmp.learning_rate", 4, 50_000, 2),
    ("pmp.learning_rate", 4, 100_000, 2)])
def test_a_full_disk_at_a_checkpoint_is_one_sentence_and_keeps_the_old_one(
        function, call, size, kept, flags, finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        on_call(patch, function, call, lambda: limit_files(size))
        try:
            with pytest.raises(SystemExit) as leaving:
                command_line(lambda: run(flags, out=out))
        finally:
            limit_files()
    assert leaving.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no space left to write")
    assert error.count("\n") == 1
    saved = pmp.load_checkpoint(out)
    assert (saved and saved["step"]) == kept
    assert not list(out.rglob("*.partial"))
    run(flags, resume=True, out=out)
    same_run(out, finished)


def test_a_reader_that_has_gone_does_not_end_a_run(flags, tmp_path):
    """The command as it is typed, with a preset that it has."""
    argv = arguments(flags, preset="mini", eb_steps=1, steps=2, out=tmp_path / "out")
    shell = '"$@" | head -n 1; exit ${PIPESTATUS[0]}'
    result = subprocess.run(["bash", "-c", shell, "bash", sys.executable, pmp.__file__, *argv], capture_output=True,
                            text=True, timeout=60)
    assert (result.returncode, result.stderr, result.stdout.count("\n")) == (0, "", 1)
    assert weights(tmp_path / "out")


def test_a_terminal_that_knows_ascii_alone_is_enough_and_no_core_is_dumped(flags, tmp_path, monkeypatch):
    screen = io.BytesIO()
    limits = []
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding="ascii"))
    monkeypatch.setattr(resource, "setrlimit", lambda *limit: limits.append(limit))
    command_line(lambda: run(flags, out=tmp_path / "möglich"))
    assert b"m?glich" in screen.getvalue()
    assert limits == [(resource.RLIMIT_CORE, (1, 1))]


@pytest.mark.parametrize("main", [pmp.main, glue.main, model_module.main])
def test_help_names_the_flags_of_each_program(main, capsys):
    with pytest.raises(SystemExit):
        main(["-h"])
    assert "--device" in capsys.readouterr().out


def test_without_a_compiler_a_run_does_without_and_says_so(flags, finished, tmp_path, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", broken)
    try:
        run(flags, compile="on", out=tmp_path / "out")
    finally:
        torch.compiler.set_stance("default")
    said = capsys.readouterr().out
    assert "torch.compile does not work here (BackendCompilerFailed), going on without it" in said
    assert "stage II 6/6 | eta 0:00 | tokens/s" in said
    same_run(tmp_path / "out", finished)


@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="torch.compile needs a compiler")
def test_a_compiled_run_in_bf16_differs_by_rounding_and_keeps_the_complement(flags, finished, tmp_path, capsys):
    out = tmp_path / "out"
    run(flags, compile="on", dtype="bf16", out=out)
    torch.compiler.reset()
    assert "does not work" not in capsys.readouterr().out
    inside = flat(ticket(out))
    assert not differs(weights(out), theta_0(out))[~inside].any()
    losses = [line["loss"] for line in log_of(out)]
    assert losses == pytest.approx([line["loss"] for line in log_of(finished)], abs=0.05)
    assert losses != [line["loss"] for line in log_of(finished)]


@pytest.mark.parametrize("question", ["_is_avx512_bf16_supported", "_is_amx_tile_supported"])
def test_auto_is_bf16_where_the_processor_multiplies_in_it(question, monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)  # an error if torch has renamed it
    assert pick_dtype("auto", torch.device("cpu")) == "fp32"
    monkeypatch.setattr(torch.cpu, question, lambda: True)
    assert pick_dtype("auto", torch.device("cpu")) == "bf16"


# ---- what is refused -----------------------------------------------------------------------------------------------


def refused(argv, expect, folder):
    """main(argv) complains with the expected words, and changes nothing below the folder."""
    def listing():
        return {path: path.read_bytes() if path.is_file() else path.is_symlink() for path in folder.rglob("*")}

    before = listing()
    with pytest.raises((UserError, OSError), match=expect):
        pmp.main(argv)
    assert listing() == before


@pytest.mark.parametrize("typed, expect", [
    ("--rho 0", "--rho.*'0' is no number"), ("--rho nan", "--rho.*'nan' is no number"), ("--rho 1e-9", "leaves none"),
    ("--preset huge", "--preset.*huge"), ("--roh 0.7", "--roh"), ("--ste 3", "--ste"),
    ("--steps 1.5", "--steps.*whole"), ("--warmup 9", "--warmup 9 is longer"), ("--also prose", "--init alone"),
    ("--mask mask.safetensors", "--init alone"), ("--init release", "--preset has no meaning with --init"),
    ("--twin nothing", "nothing holds no run"), ("--block-size 128", "64 positions"),
    ("--batch-size 100000", "too few"), ("--device meta", "--device meta"), ("--device nonsense", "nonsense"),
    ("--data missing.jsonl", "missing.jsonl"), ("--out a\0b", "no name"), ("--out \udcff", "UTF-8"),
    ("--out=", "no name"), ("--out file", "Not a directory"), ("--out .", "is not empty, it holds"),
    ("--out linked", "not a link"), ("--out filed", "must be a folder"), ("--out busy", "another process is using"),
])
def test_a_bad_flag_is_named_and_leaves_nothing(typed, expect, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("folder", "linked", "filed", "busy/private"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("file", "filed/private"):
        (tmp_path / name).touch()
    (tmp_path / "linked" / "private").symlink_to(tmp_path / "folder")
    with lock(tmp_path / "busy" / "private" / "lock"):
        refused([*arguments(flags), "--out", "out", *typed.split(" ")], expect, tmp_path)


def test_the_private_folder_of_another_user_is_refused(flags, tmp_path, monkeypatch):
    (tmp_path / "out" / "private").mkdir(parents=True)
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    refused([*arguments(flags), "--out", str(tmp_path / "out")], "another user", tmp_path)


def test_ranks_that_cannot_share_the_sequences_or_were_not_started_by_torchrun_are_refused(
        flags, tmp_path, monkeypatch):
    argv = arguments(flags, batch_size=1, grad_accum=3, out=tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(pmp, "world", lambda: 2)
        refused(argv, "3 sequences an update cannot be shared equally by 2 ranks", tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(argv, "start with torchrun", tmp_path)


def test_a_complaint_is_one_line_without_traceback_and_code_2(tmp_path):
    result = subprocess.run([sys.executable, pmp.__file__, "--rho", "0", "--out", str(tmp_path / "out")],
                            capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("error: argument --rho: '0' is no number")
    assert not (tmp_path / "out").exists()


def test_no_complaint_brings_control_characters_or_a_flood_to_the_screen(capsys):
    def complain():
        raise UserError("\x1b[2J" + "name" * 5000)  # as a stranger's file may call a tensor

    with pytest.raises(SystemExit):
        command_line(complain)
    error = capsys.readouterr().err
    assert error.startswith("error: \\x1b[2Jname")
    assert error[:-1].isprintable()
    assert len(error) < 1100
    assert printable("of a release: \x1b]2;\t\x9b\n") == "of a release: \\x1b]2;\t\\x9b\n"


# ---- more than one process -----------------------------------------------------------------------------------------


def test_two_ranks_are_one_run_with_the_same_bits(flags, finished, tmp_path):
    """Each adds the two gradients that one process adds, so that not even the rounding differs."""
    said = tmp_path / "said"
    assert codes(start(arguments(flags, out=tmp_path / "out"), said, ranks=2)) == [0, 0], said.read_text()
    assert said.read_text().count("\nreleased") == 1
    same_run(tmp_path / "out", finished)


def test_two_processes_share_a_cache_and_get_the_same_tokens(flags, tmp_path):
    more = {"shuffle_buffer": 20, "steps": 20}
    run(flags, **more, cache=tmp_path / "alone", out=tmp_path / "expected")
    said, processes = tmp_path / "said", []
    for name in ("one", "two"):
        processes += start(arguments(flags, **more, cache=tmp_path / "shared", out=tmp_path / name), said)
    assert codes(processes) == [0, 0], said.read_text()
    for name in ("one", "two"):
        same_run(tmp_path / name, tmp_path / "expected")


def test_a_sharded_run_that_was_stopped_goes_on_sharded_or_in_one_process_and_keeps_the_complement(
        flags, finished, tmp_path):
    out, said = tmp_path / "out", tmp_path / "said"
    argv = arguments(flags, shard=True, resume=True, out=out)
    ended = codes(start(argv, said, ranks=2, at=("pmp.learning_rate", 3, signal.SIGTERM)))
    assert ended[1] == 128 + signal.SIGTERM, said.read_text()
    assert "saved after update 3 of stage II" in said.read_text()
    shutil.copytree(out, tmp_path / "one")
    assert codes(start(argv, said, ranks=2)) == [0, 0], said.read_text()
    run(flags, resume=True, out=tmp_path / "one")
    for folder in (out, tmp_path / "one"):
        masks = ticket(folder)
        assert not differs(weights(folder), theta_0(folder))[~flat(masks)].any()
        assert pmp.iou(masks, ticket(finished)) > 0.99  # another order of sums may move an entry at the threshold
        assert flat(weights(folder)).allclose(flat(weights(finished)), atol=5e-3)


def sharded_topk(argv):
    """What each of two ranks does: the masks of sharded scores against those of whole ones."""
    from torch.distributed.tensor import Shard, distribute_tensor
    dist.init_process_group("gloo")
    mesh = dist.init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(0)
    draw = {name: torch.randn(shape, generator=generator)
            for name, shape in {"a": (3, 50), "b": (1001,), "c": (50, 20), "d": (1, 9)}.items()}
    for scores in (draw, {name: score.round() for name, score in draw.items()}):  # the latter: with ties
        split = {name: distribute_tensor(score, mesh, [Shard(0)]) for name, score in scores.items()}
        for k in (1, 100, 2000):
            masks = pmp.topk_mask(split, k)
            assert torch.equal(flat({name: whole(mask) for name, mask in masks.items()}),
                               flat(pmp.topk_mask(scores, k)))
            assert pmp.iou(masks, pmp.topk_mask(split, 1000)) == pytest.approx(min(k, 1000) / max(k, 1000))
    dist.barrier()
    os._exit(7)  # which no other end gives


def test_the_ticket_of_sharded_gradients_is_that_of_whole_ones(tmp_path):
    said = tmp_path / "said"
    assert codes(start([], said, ranks=2, main=sharded_topk)) == [7, 7], said.read_text()


# ---- runs that go on from another ----------------------------------------------------------------------------------


def test_a_twin_has_the_same_theta_0_and_text_and_its_own_rho(flags, tmp_path, capsys):
    own_secret = {name: value for name, value in flags.items() if name != "init_seed"}
    first, twin, other = (tmp_path / name for name in ("first", "twin", "other"))
    run(own_secret, out=first)
    run(own_secret, out=other)
    run({}, twin=first, rho=1.0, cache=flags["cache"], out=twin)
    assert f"publish one release of {first} and its twins at most" in capsys.readouterr().out
    assert stat.S_IMODE((twin / "release").stat().st_mode) == 0o700
    assert fingerprint(theta_0(twin)) == fingerprint(theta_0(first)) != fingerprint(theta_0(other))
    settings = pmp.load_checkpoint(twin)["settings"]
    assert (settings["rho"], settings["lr"], settings["steps"], settings["warmup"]) == (1.0, 0.01, 6, 2)
    for name, value in (("preset", "tiny"), ("init_seed", 5)):
        fails(f"{value} is not what the twin has", run, {}, twin=first, **{name: value}, out=tmp_path / "refused")
    losses = [[line["loss"] for line in log_of(out, "stage II")] for out in (first, twin)]
    assert losses[0][0] == losses[1][0]  # of theta(0) on the same first mini-batch
    assert losses[0][5] != losses[1][5]


@pytest.fixture
def tuning(flags, finished, tmp_path):
    """Flags that go on from the finished run on another text."""
    data = write_text(tmp_path / "new.jsonl", seed=9)
    return {"init": finished / "release", "data": data, "cache": flags["cache"], "block_size": 16, "steps": 6,
            "warmup": 2, "save_every": 2, "compile": "off", "dtype": "fp32", "device": "cpu"}


def test_with_its_mask_a_release_is_tuned_in_the_ticket_alone_and_without_it_everywhere(
        tuning, flags, finished, tmp_path, capsys):
    masked, free = tmp_path / "masked", tmp_path / "free"
    run(tuning, mask=finished / "private" / "mask.safetensors", also=flags["data"], out=masked)
    texts = re.findall(r"held-out loss of \S+/(\S+): \S+ before, \S+ after", capsys.readouterr().out)
    assert texts == ["new.jsonl", "corpus_of_mine.jsonl"]
    inside = flat(ticket(finished))
    moved = differs(weights(masked), weights(finished))
    assert not moved[~inside].any()
    assert moved[inside].float().mean() > 0.5
    assert torch.equal(flat(ticket(masked)), inside)  # in the file that belongs to the new release
    assert stat.S_IMODE((masked / "release").stat().st_mode) == 0o700  # whoever publishes it publishes the mask
    run(tuning, out=free)
    moved = differs(weights(free), weights(finished))
    assert moved[~inside].float().mean() > 0.5
    assert not (free / "private" / "mask.safetensors").exists()


def test_a_tuning_that_was_stopped_goes_on_with_the_same_bits_from_another_folder(
        tuning, finished, tmp_path, monkeypatch):
    run(tuning, mask=finished / "private" / "mask.safetensors", out=tmp_path / "whole")
    monkeypatch.chdir(finished)
    out = stopped(tuning, tmp_path / "out", init="release", mask="private/mask.safetensors")
    monkeypatch.chdir(tmp_path)
    run({}, resume=True, cache=tuning["cache"], out=out)
    same_run(out, tmp_path / "whole")


# ---- README --------------------------------------------------------------------------------------------------------

README = (Path(pmp.__file__).parent / "README.md").read_text()


def test_the_readmes_algorithm_runs_and_learns(flags, monkeypatch, capsys):
    data, cache = flags["data"], flags["cache"]
    monkeypatch.setattr(text_module, "prepare", lambda *args, **kwargs: prepare(data, "bpe", 0, cache=cache))
    exec(re.search(r"```python\n(import torch\n.*?)```", README, re.DOTALL)[1], {})
    losses = [float(loss) for loss in re.findall(r"update \d+: loss (\S+)", capsys.readouterr().out)]
    assert len(losses) == 5
    assert losses[-1] < losses[0] - 0.5


def test_the_readme_names_code_tests_and_files_that_exist():
    house = Path(pmp.__file__).parent
    source = "\n".join(path.read_text() for path in house.glob("*.py"))
    table = re.search(r"\| paper \|.*?\n\n", README, re.DOTALL)[0]
    for name in re.findall(r"`(\w+)`", table):
        assert re.search(rf"^(def|class) {name}\b", source, re.MULTILINE), name
    for name in re.findall(r"\]\(([\w./]+)\)", README):
        assert (house / name).exists(), name


def test_the_readmes_table_of_presets_has_their_sizes():
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \| ([\d,]+) \| (\d+)M \|", README, re.MULTILINE)
    assert [name for name, *_ in rows] == ["tiny", "mini", "gpt2", "tinyllama"]
    for name, parameters, tokens, millions in rows:
        settings = pmp.settings_of(*pmp.parse(["--preset", name]), None, None)
        update = settings["batch_size"] * settings["grad_accum"] * settings["block_size"]
        d = sum(p.numel() for p in build(PRESETS[name][0], "meta").parameters())
        assert (f"{d:,}", f"{update:,}") == (parameters, tokens)
        assert f"{settings['steps'] * update / 1e6:.0f}" == millions


SCORE, OPTIMIZER = "p.grad * p", "torch.optim.SGD(list(params.values()), lr=0.1, momentum=0.9)"  # as README has them
EDITS = {  # rows of "to change …, edit …": file, what stands there, what a fork writes
    "mask score": ("pmp.py", "topk_mask(scores or {name: p.grad for name, p in params.items()}, k)",
                   f"topk_mask({{name: {SCORE} for name, p in params.items()}}, k)"),
    "mask rule": ("pmp.py", "[whole(score).abs().flatten()", "[-whole(score).abs().flatten()"),
    "optimizer": ("pmp.py", "torch.optim.AdamW(list(params.values()), betas=betas, weight_decay=0.0, fused=True)",
                  OPTIMIZER),
}


@pytest.mark.parametrize("row", EDITS)
def test_the_readmes_table_of_changes_works_on_a_copy(row, flags, tmp_path):
    house = Path(pmp.__file__).parent
    for name in ("pmp.py", "model.py", "common.py"):
        shutil.copy(house / name, tmp_path)
    shutil.copytree(house / "data", tmp_path / "data", ignore=shutil.ignore_patterns("cache", "__pycache__"))
    assert f"`{SCORE}`" in README and f"`{OPTIMIZER}`" in README
    file, before, after = EDITS[row]
    source = (tmp_path / file).read_text()
    assert source.count(before) == 1
    (tmp_path / file).write_text(source.replace(before, after))
    argv = arguments(flags, preset="mini", out=tmp_path / "out", lr=0.001)
    result = subprocess.run([sys.executable, "pmp.py", *argv], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    inside = flat(ticket(tmp_path / "out"))
    assert inside.sum() == math.floor(0.7 * len(inside))
