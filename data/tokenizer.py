"""Text <-> tokens: byte-level BPE, tiktoken's GPT-2 vocabulary or a small one trained on the corpus itself.

On disk a tokenizer is Hugging Face's tokenizer.json, so that a release opens in transformers too.
"""

import hashlib
import heapq
import json
import re
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import requests
import tiktoken

from . import UserError, atomic

EOS = "<|endoftext|>"
# GPT-2's way to cut text into words, inside which merges happen. `++` never gives back what it took: the same words,
# but a million spaces in a row don't overflow the regex engine's stack.
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# The same for the standard library's re, which has no \p{L}. Needed for training alone, where rare scripts may differ.
TRAINING_WORDS = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")
TRAINING_CHARACTERS = 4_000_000


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
    """A byte-level BPE: tokens' bytes and ranks (which are their ids), special tokens, the pattern of words.

    eos: id of the end-of-text token; size: vocabulary size; fingerprint: sha256 over all that decides the ids.
    """

    def __init__(self, ranks, specials, eos=EOS, pattern=GPT2_WORDS):
        """ranks: {bytes: id}; specials: {text: id}; eos: the text of one of the specials."""
        self.ranks, self.specials, self.pattern = ranks, specials, pattern
        self.encoding = tiktoken.Encoding("pmp", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
        self.eos = specials[eos]
        self.size = self.encoding.n_vocab
        spelled = {spell(token): rank for token, rank in ranks.items()}
        identity = json.dumps([pattern, spelled, specials, self.eos], sort_keys=True)
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()

    def encode(self, text):
        """str -> list of ids. Special tokens written out in the text are plain text."""
        return self.encoding.encode_ordinary(text)

    def encode_many(self, texts):
        """list of str -> list of lists of ids, on two threads."""
        return self.encoding.encode_ordinary_batch(texts, num_threads=2)

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
        return cls({encoding.decode_single_token_bytes(rank): rank for rank in range(50256)}, {EOS: 50256})

    @classmethod
    def train(cls, texts, size=4096):
        """Byte-level BPE (Sennrich et al. 2016) on the first 4,000,000 characters of `texts`, an iterable of str.

        256 bytes, then the merges, the most frequent pair first (of equal ones that with the lowest ids), then EOS.
        A text too small for `size` tokens gives fewer.
        """
        counts, room = Counter(), TRAINING_CHARACTERS
        for text in texts:
            counts.update(TRAINING_WORDS.findall(text[:room]))
            room -= len(text)
            if room <= 0:
                break
        first_ids = {byte: id for id, byte in enumerate(LETTER)}
        words = [[first_ids[byte] for byte in word.encode("utf-8", "replace")] for word in counts]
        counts = list(counts.values())

        pairs, where = Counter(), defaultdict(set)  # how often a pair occurs, and in which words
        for index, word in enumerate(words):
            for pair in pairwise(word):
                pairs[pair] += counts[index]
                where[pair].add(index)
        heap = [(-count, pair) for pair, count in pairs.items()]
        heapq.heapify(heap)
        tokens = [bytes([byte]) for byte in LETTER]
        ranks = {token: rank for rank, token in enumerate(tokens)}
        while len(tokens) < size - 1 and heap:
            count, pair = heapq.heappop(heap)
            if -count != pairs[pair]:  # other merges took some of its places since it was pushed
                if pairs[pair] > 0:
                    heapq.heappush(heap, (-pairs[pair], pair))
                continue
            if -count < 2:
                break  # what occurs once is no pattern
            token = tokens[pair[0]] + tokens[pair[1]]
            if token in ranks:
                continue  # these bytes are a token already, by another pair
            new = ranks[token] = len(tokens)
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
        return cls(ranks, {EOS: len(tokens)})

    # ---- on disk ----

    def save(self, folder):
        """Write tokenizer.json and tokenizer_config.json, for transformers' AutoTokenizer; the same bytes each time."""
        specials = sorted(self.specials.items(), key=lambda special: special[1])
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        if self.pattern == GPT2_WORDS:
            words = byte_level
        else:
            split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
            words = {"type": "Sequence", "pretokenizers": [split, byte_level | {"use_regex": False}]}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
        by_rank = sorted(self.ranks, key=self.ranks.get)
        merges = [" ".join(map(spell, self._parts(token))) for token in by_rank if len(token) > 1]
        model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                 "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False,
                 "vocab": {spell(token): self.ranks[token] for token in by_rank} | dict(specials), "merges": merges}
        tokenizer = {"version": "1.0", "truncation": None, "padding": None,
                     "added_tokens": [{"id": id, "content": text} | flags for text, id in specials],
                     "normalizer": None, "pre_tokenizer": words, "post_processor": None, "decoder": byte_level,
                     "model": model}
        eos = self.encoding.decode([self.eos])
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "bos_token": eos,
                  "clean_up_tokenization_spaces": False}
        for name, content in (("tokenizer_config.json", config), ("tokenizer.json", tokenizer)):
            with atomic(Path(folder) / name) as file:
                file.write(json.dumps(content, ensure_ascii=False, indent=1).encode())

    def _parts(self, token):
        """The two parts from which BPE makes a token: what is left of its bytes when lower ranks alone may merge."""
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            at = min(range(len(parts) - 1), key=lambda i: self.ranks.get(parts[i] + parts[i + 1], self.size))
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        return parts

    @classmethod
    def load(cls, folder):
        """Open the byte-level BPE of a Hugging Face folder: tokenizer.json, or GPT-2's vocab.json and merges.txt.

        Raises UserError when there is none, or one that needs what we don't have.
        """
        folder = Path(folder)
        config = read_json(folder / "special_tokens_map.json") | read_json(folder / "tokenizer_config.json")
        if (folder / "tokenizer.json").exists():
            path = folder / "tokenizer.json"
            file = read_json(path)
        elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            path = folder / "vocab.json"
            lines = (folder / "merges.txt").read_text("utf-8").splitlines()
            file = {"pre_tokenizer": {"type": "ByteLevel"}, "model": {
                "type": "BPE", "vocab": read_json(path),
                "merges": [line for line in lines if line and not line.startswith("#version")]}}
        else:
            raise UserError(f"{folder} has no tokenizer.json: copy the model's tokenizer files into it")
        try:
            return cls(*cls._parse(file, config))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{path} is not a byte-level BPE tokenizer that we can read ({error}): use GPT-2's or "
                            "another with ByteLevel in its tokenizer.json") from None

    @staticmethod
    def _parse(file, config):
        """-> the arguments of __init__. Raises ValueError, KeyError, TypeError, AttributeError for other tokenizers."""
        steps = file["pre_tokenizer"].get("pretokenizers", [file["pre_tokenizer"]])
        if file["model"]["type"] != "BPE" or steps[-1]["type"] != "ByteLevel" or steps[-1].get("add_prefix_space"):
            raise ValueError("it does not cut text into bytes without a prefix")
        if file.get("normalizer"):
            raise ValueError(f"it has a {file['normalizer'].get('type')} normalizer")
        pattern = GPT2_WORDS
        if not steps[-1].get("use_regex", True):
            if len(steps) != 2 or steps[0]["type"] != "Split" or steps[0]["behavior"] != "Isolated":
                raise ValueError("it cuts words in an unknown way")
            pattern = steps[0]["pattern"]["Regex"]
        vocab = file["model"]["vocab"]
        specials = {token["content"]: token["id"] for token in file.get("added_tokens", [])}
        eos = config.get("eos_token") or EOS
        eos = eos["content"] if isinstance(eos, dict) else eos
        if eos in vocab:
            specials.setdefault(eos, vocab[eos])
        if eos not in specials:
            raise ValueError(f"it has no end-of-text token {eos!r}")
        ranks = {bytes(BYTE[letter] for letter in token): id for token, id in vocab.items() if token not in specials}
        if not {bytes([byte]) for byte in range(256)} <= ranks.keys():
            raise ValueError("it lacks some of the 256 bytes")
        merges = file["model"]["merges"]  # "a b" in older files, ["a", "b"] in newer ones
        merged = [vocab["".join(pair.split(" ") if isinstance(pair, str) else pair)] for pair in merges]
        if merged != sorted(merged):
            raise ValueError("its ids do not follow the order of its merges")
        return ranks, specials, eos, pattern


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


def read_json(path):
    """A JSON object from a file, {} when there is no such file. Raises UserError when it is no JSON object."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): get it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object: get it again")
    return content
