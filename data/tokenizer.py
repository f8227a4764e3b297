"""Text <-> tokens: byte-level BPE, tiktoken's GPT-2 vocabulary or a small one trained on the corpus itself.

On disk a tokenizer is Hugging Face's tokenizer.json, so that a release opens in transformers too.
"""

import hashlib
import heapq
import itertools
import json
import os
import re
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import regex  # tiktoken installs it
import requests
import tiktoken

from runtime.files import UserError, atomic, disk_errors, open_regular, read_json

EOS = "<|endoftext|>"
# GPT-2's way to cut text into words, inside which merges happen. `++` never gives back what it took: the same words,
# but a million spaces in a row don't overflow the regex engine's stack.
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# The same for the standard library's re, which has no \p{L}. Needed for training alone, where rare scripts may differ.
TRAINING_WORDS = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")
TRAINING_CHARACTERS = 4_000_000
LONGEST_WORD, PIECE = 100, 20  # characters: training cuts a longer word, such as a page of Chinese, into such pieces
TRAINING_WORK = 2**24  # the sum over distinct words of bytes squared. English has a quarter; noise would take minutes
WHOLE = r"[\s\S]+"  # for a tokenizer that cuts no words
PROBE = "Aa 1\n\t-é中"  # a pattern that matches the empty string finds one here
LARGEST_ID = 2**31 - 1


def byte_letters():
    """GPT-2's printable stand-in for each of the 256 bytes, in the order of its first 256 tokens: {byte: letter}."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


LETTER = byte_letters()
BYTE = {letter: byte for byte, letter in LETTER.items()}


def spell(token):
    """bytes -> the letters under which tokenizer.json keeps them."""
    return "".join(LETTER[byte] for byte in token)


class Tokenizer:
    """A byte-level BPE: tokens' bytes and ids (a lower id merges first), special tokens, patterns that cut words.

    eos: id of the end-of-text token; size: vocabulary size; fingerprint: sha256 over all that decides the ids.
    """

    def __init__(self, ids, specials, eos=EOS, pattern=GPT2_WORDS, splits=(), unknown=None):
        """ids: {bytes: id}; specials: {text: id}; eos: the text of one of the specials.

        pattern: a regular expression; its matches, and what lies between them, are the words inside which merges
        happen. splits: others that cut the text before, each the pieces of the one before it. unknown: text of the
        special token for a byte that `ids` lacks. Raises UserError for what the engines of tiktoken and regex refuse.
        """
        self.ids, self.specials, self.unknown = ids, specials, unknown
        self.pattern, self.splits = pattern, splits
        self.eos = specials[eos]
        self.size = 1 + max(max(ids.values(), default=0), *specials.values())
        # tiktoken needs all 256 bytes. Those that the vocabulary lacks get ids above it, which never leave encode().
        lacking = [bytes([byte]) for byte in range(256) if bytes([byte]) not in ids]
        self.placeholders = {self.size + i: byte for i, byte in enumerate(lacking)}
        words = pattern
        if pattern != GPT2_WORDS:  # GPT-2's matches leave no gap; tiktoken would drop the text in one
            words = rf"(?:{pattern})|(?s:.+?)(?=(?:{pattern})|$)"
        with self._engine():
            self.encoding = tiktoken.Encoding(
                "pmp", pat_str=words, special_tokens=specials,
                mergeable_ranks=ids | {byte: id for id, byte in self.placeholders.items()})
            *self._cutters, last = [regex.compile(each) for each in (*splits, pattern)]
            if not all(match[0] for cutter in (*self._cutters, last) for match in cutter.finditer(PROBE)):
                raise ValueError("it matches the empty string")
        spelled = {spell(token): id for token, id in ids.items()}
        identity = [pattern, spelled, specials, self.eos] + ([splits, unknown] if splits or unknown else [])
        self.fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    @contextmanager
    def _engine(self):
        """Raise a UserError for whatever the engine of regular expressions cannot do."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the panics of tiktoken's engine are no `Exception`
            problem = str(error).partition("\n")[0][:120]
            raise UserError(f"the tokenizer's pattern {[*self.splits, self.pattern]!r:.80} cannot cut this text into "
                            f"words ({problem}): use another tokenizer") from None

    def encode(self, text):
        """str -> list of ids. Special tokens written out in the text are plain text.

        Raises UserError at a byte that the vocabulary lacks, where it has no unknown token, and at a text that is too
        much for the patterns of the tokenizer.
        """
        with self._engine():
            pieces = [text]
            for cutter in self._cutters:
                pieces = list(itertools.chain.from_iterable(isolate(cutter, piece) for piece in pieces))
            encoded = [self.encoding.encode_ordinary(piece) for piece in pieces]
        ids = encoded[0] if len(encoded) == 1 else list(itertools.chain.from_iterable(encoded))
        if self.placeholders:
            ids = [id if id < self.size else self._unknown(id) for id in ids]
        return ids

    def _unknown(self, placeholder):
        """The id to give for a byte that the vocabulary lacks."""
        if self.unknown is None:
            byte = self.placeholders[placeholder][0]
            raise UserError(f"the tokenizer has no token for the byte 0x{byte:02x}, which this text needs: remove the "
                            "character, or use another tokenizer")
        return self.specials[self.unknown]

    def encode_many(self, texts):
        """list of str -> list of lists of ids, on all processors. Raises UserError as `encode` does."""
        share = -(-len(texts) // os.cpu_count()) or 1  # a thread's; the engine works without Python's lock
        shares = [texts[start:start + share] for start in range(0, len(texts), share)]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            encoded = threads.map(lambda texts: [self.encode(text) for text in texts], shares)
            return list(itertools.chain.from_iterable(encoded))

    def decode(self, ids):
        """list of ids -> str; bytes that are no UTF-8 become U+FFFD."""
        return self.encoding.decode(ids)

    # ---- where tokenizers come from ----

    @classmethod
    def gpt2(cls):
        """GPT-2's 50,257 tokens. Raises UserError when tiktoken cannot get their files."""
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except (requests.RequestException, OSError, ValueError) as error:
            raise UserError(
                "tiktoken could not fetch GPT-2's vocabulary: connect to the network once, or set TIKTOKEN_CACHE_DIR "
                f"to a writable copy of the folder that has tiktoken's files for gpt2 ({str(error)[:90]}…)"
            ) from None
        return cls({encoding.decode_single_token_bytes(id): id for id in range(50256)}, {EOS: 50256})

    @classmethod
    def train(cls, texts, size=4096):
        """Byte-level BPE (Sennrich et al. 2016) on the first 4,000,000 characters of `texts`, an iterable of str.

        256 bytes, then the merges, the most frequent pair first (of equal ones that with the lowest ids), then EOS.
        A text too small for `size` tokens gives fewer. Where a text has very long or very many different words, merges
        are learned from the first of them, see TRAINING_WORK.
        """
        counts, room = Counter(), TRAINING_CHARACTERS
        for text in texts:
            counts.update(TRAINING_WORDS.findall(text[:room]))
            room -= len(text)
            if room <= 0:
                break
        for word in [word for word in counts if len(word) > LONGEST_WORD]:
            count = counts.pop(word)
            for start in range(0, len(word), PIECE):
                counts[word[start:start + PIECE]] += count
        spelled = [word.encode("utf-8", "replace") for word in counts]
        work = itertools.accumulate(len(word) ** 2 for word in spelled)
        first_ids = {byte: id for id, byte in enumerate(LETTER)}
        words = [[first_ids[byte] for byte in word] for word, so_far in zip(spelled, work, strict=True)
                 if so_far <= TRAINING_WORK]
        counts = list(counts.values())

        pairs, where = Counter(), defaultdict(set)  # how often a pair occurs, and in which words
        for index, word in enumerate(words):
            for pair in pairwise(word):
                pairs[pair] += counts[index]
                where[pair].add(index)
        heap = [(-count, pair) for pair, count in pairs.items()]
        heapq.heapify(heap)
        tokens = [bytes([byte]) for byte in LETTER]
        ids = {token: id for id, token in enumerate(tokens)}
        while len(tokens) < size - 1 and heap:
            count, pair = heapq.heappop(heap)
            if -count != pairs[pair]:  # other merges took some of its places since it was pushed
                if pairs[pair] > 0:
                    heapq.heappush(heap, (-pairs[pair], pair))
                continue
            if -count < 2:
                break  # what occurs once is no pattern
            token = tokens[pair[0]] + tokens[pair[1]]
            if token in ids:
                continue  # these bytes are a token already, by another pair
            new = ids[token] = len(tokens)
            tokens.append(token)
            changed = Counter()
            for index in where.pop(pair):
                old, word = words[index], merge(words[index], pair, new)
                words[index] = word
                for gone in pairwise(old):
                    changed[gone] -= counts[index]
                for come in pairwise(word):
                    changed[come] += counts[index]
                    where[come].add(index)
            for other, change in changed.items():
                pairs[other] += change
                if new in other:
                    heapq.heappush(heap, (-pairs[other], other))
        return cls(ids, {EOS: len(tokens)})

    # ---- on disk ----

    def save(self, folder, max_length=None):
        """Write tokenizer.json and tokenizer_config.json, for transformers' AutoTokenizer; the same bytes each time.

        max_length: tokens of a text at most (transformers warns of longer ones). The end-of-text token is the padding,
        too, on the right: transformers makes no batch without one. Raises UserError when the disk is full.
        """
        specials = sorted(self.specials.items(), key=lambda special: special[1])
        by_id = sorted(self.ids, key=self.ids.get)
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        patterns = [*self.splits] if self.pattern == GPT2_WORDS else [*self.splits, self.pattern]
        steps = [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
                 for pattern in patterns] + [byte_level | {"use_regex": self.pattern == GPT2_WORDS}]
        words = {"type": "Sequence", "pretokenizers": steps} if patterns else byte_level
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
        merges = [" ".join(map(spell, self._parts(token))) for token in by_id if len(token) > 1]
        model = {"type": "BPE", "dropout": None, "unk_token": self.unknown, "continuing_subword_prefix": "",
                 "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False,
                 "vocab": {spell(token): self.ids[token] for token in by_id} | dict(specials), "merges": merges}
        tokenizer = {"version": "1.0", "truncation": None, "padding": None,
                     "added_tokens": [{"id": id, "content": text} | flags for text, id in specials],
                     "normalizer": None, "pre_tokenizer": words, "post_processor": None, "decoder": byte_level,
                     "model": model}
        eos = self.encoding.decode([self.eos])
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "bos_token": eos, "pad_token": eos,
                  "padding_side": "right", "clean_up_tokenization_spaces": False}
        if max_length:
            config["model_max_length"] = max_length
        for name, content in (("tokenizer_config.json", config), ("tokenizer.json", tokenizer)):
            with atomic(Path(folder) / name) as file:
                file.write(json.dumps(content, ensure_ascii=False, indent=1).encode())

    def _parts(self, token):
        """The two parts from which BPE makes a token: what is left of its bytes when lower ids alone may merge."""
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            at = min(range(len(parts) - 1), key=lambda i: self.ids.get(parts[i] + parts[i + 1], self.size))
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        return parts

    @classmethod
    def load(cls, folder):
        """Open the byte-level BPE of a Hugging Face folder: tokenizer.json, or GPT-2's vocab.json and merges.txt.

        Raises UserError when there is none, or one that needs what we don't have.
        """
        folder = Path(folder)
        config = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if exists(folder / name):
                config |= read_json(folder / name)
        if exists(folder / "tokenizer.json"):
            path = folder / "tokenizer.json"
            file = read_json(path)
        elif exists(folder / "vocab.json") and exists(folder / "merges.txt"):
            path = folder / "vocab.json"
            file = {"pre_tokenizer": {"type": "ByteLevel"},
                    "model": {"type": "BPE", "vocab": read_json(path), "merges": read_merges(folder / "merges.txt")}}
        else:
            raise UserError(f"{folder} has no tokenizer.json: copy the model's tokenizer files into it")
        try:
            arguments = parse(file, config)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            problem = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise UserError(f"{path} is not a byte-level BPE tokenizer that we can read ({problem}): use GPT-2's or "
                            "another with ByteLevel in its tokenizer.json") from None
        try:
            return cls(**arguments)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None


def isolate(pattern, text):
    """Yield the matches of a compiled pattern, and what lies between them, in order. Raises TimeoutError."""
    end = 0
    for match in pattern.finditer(text, timeout=0.5 + len(text) / 1e5):  # seconds, for patterns without end
        yield text[end:match.start()]
        yield match[0]
        end = match.end()
    yield text[end:]


def merge(word, pair, new):
    """list of ids -> the same with each occurrence of `pair`, from the left, replaced by `new`."""
    merged, i = [], 0
    while i < len(word):
        if word[i] == pair[0] and i + 1 < len(word) and word[i + 1] == pair[1]:
            merged.append(new)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged


# ---- Hugging Face's files ------------------------------------------------------------------------------------------


def exists(path):
    """Whether there is something at `path`. Raises UserError for a name that is too long."""
    with disk_errors(path):
        return path.exists()


def read_merges(path):
    """The lines of GPT-2's merges.txt. Raises UserError when it is not UTF-8."""
    with open_regular(path) as file:
        try:
            lines = file.read().decode("utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 ({error.reason}): restore it from a copy") from None
    lines = [line.rstrip("\r") for line in lines]
    return [line for line in lines if line and not line.startswith("#version")]


def parse(file, config):
    """-> the arguments of Tokenizer, from tokenizer.json (and the other files' settings) as dicts.

    Raises ValueError, KeyError, TypeError, AttributeError for other tokenizers.
    """
    model = file["model"]
    if model["type"] != "BPE":
        raise ValueError(f"its model is {model['type']}")
    if file.get("normalizer"):
        raise ValueError(f"it has a {file['normalizer'].get('type')} normalizer")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback"):
        if model.get(option):
            raise ValueError(f"its model has the option {option}")
    *splits, pattern = word_patterns(file.get("pre_tokenizer") or {"type": "no"})

    vocab = model["vocab"]
    specials = {token["content"]: token["id"] for token in file.get("added_tokens", [])}
    eos = config.get("eos_token") or EOS
    eos = eos["content"] if isinstance(eos, dict) else eos
    unknown = model.get("unk_token")
    for special in (eos, unknown):
        if special in vocab:
            specials.setdefault(special, vocab[special])
    if eos not in specials:
        raise ValueError(f"it has no end-of-text token {eos!r}")
    ids = {unspell(token): id for token, id in vocab.items() if token not in specials}
    check_ids([*ids.values(), *specials.values()])

    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]  # "a b" in older files
    merged = [vocab[left + right] for left, right in merges]
    if merged != sorted(merged):
        raise ValueError("its ids do not follow the order of its merges")
    made = set(merged)
    unmade = [token for token, id in ids.items() if len(token) > 1 and id not in made]
    if unmade and not model.get("ignore_merges"):
        raise ValueError(f"none of its merges makes the token {spell(unmade[0])!r}")
    if all(bytes([byte]) in ids for byte in range(256)):
        unknown = None  # nothing is
    elif unknown is not None and unknown not in specials:
        raise ValueError(f"it has no unknown token {unknown!r}")
    return {"ids": ids, "specials": specials, "eos": eos, "pattern": pattern, "splits": splits, "unknown": unknown}


def check_ids(ids):
    """Raise ValueError unless `ids` are different whole numbers that tiktoken can hold."""
    for id in ids:
        if type(id) is not int or not 0 <= id <= LARGEST_ID:  # JSON's true is an int, too
            raise ValueError(f"{str(id)[:40]!r} is no token's id")
    if len(set(ids)) < len(ids):
        raise ValueError("two of its tokens have the same id")


def unspell(letters):
    """tokenizer.json's spelling of a token -> its bytes. Raises ValueError for letters that stand for no byte."""
    if unfit := [letter for letter in letters if letter not in BYTE]:
        raise ValueError(f"its token {letters[:40]!r} has {unfit[0]!r}, which stands for no byte")
    return bytes(BYTE[letter] for letter in letters)


def word_patterns(pre_tokenizer):
    """The regular expressions with which tokenizer.json's "pre_tokenizer" cuts text into words.

    Each cuts the pieces that the one before it left. Raises ValueError, KeyError, TypeError for steps we don't know.
    """
    sequence = pre_tokenizer["type"] == "Sequence"
    *splits, last = pre_tokenizer["pretokenizers"] if sequence else [pre_tokenizer]
    if last["type"] != "ByteLevel":
        raise ValueError(f"its last pre-tokenizer step is {last['type']}, not ByteLevel")
    if last.get("add_prefix_space"):
        raise ValueError("its ByteLevel step adds a space before the text")
    patterns = [split_pattern(step) for step in splits]
    if last.get("use_regex", True):
        patterns.append(GPT2_WORDS)
    return patterns or [WHOLE]


def split_pattern(step):
    """The regular expression of a Digits or Split step: its matches, and what lies between them, are the pieces."""
    if step["type"] == "Digits":
        return r"\p{N}" if step["individual_digits"] else r"\p{N}+"
    if step["type"] != "Split":
        raise ValueError(f"it has the pre-tokenizer step {step['type']}; we know Digits, Split and ByteLevel")
    if step["behavior"] != "Isolated" or step.get("invert"):
        kind = "inverted" if step.get("invert") else step["behavior"]
        raise ValueError(f"its Split step is {kind}; we know Isolated")
    if not isinstance(step["pattern"].get("Regex"), str):
        raise ValueError("its Split step has no regular expression")
    return step["pattern"]["Regex"]
