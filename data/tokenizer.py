"""Text <-> tokens: byte-level BPE, with GPT-2's vocabulary or a small one that is trained on the text itself.

On disk a tokenizer is Hugging Face's tokenizer.json. Our own and GPT-2's are read, and every other is refused by name:
a setting that we ignored would silently change the ids.
"""

import hashlib
import heapq
import json
import os
import re
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise
from pathlib import Path

import tiktoken

from common import UserError, read_json, write_json

EOS = "<|endoftext|>"
# GPT-2's way to cut text into words, inside which merges happen. `++` never gives back what it took, and {1,100000}
# cuts a longer run of spaces: but for that the same words, and a million spaces in a row overflow no stack.
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s{1,100000}(?!\S)|\s"
# The same for the standard library's re, which has no \p{L}. Needed for training alone, where rare scripts may differ.
TRAINING_WORDS = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")
TRAINING_CHARACTERS = 4_000_000
LONGEST_WORD, PIECE = 100, 20  # characters: training cuts a longer word, such as a page of Chinese, into such pieces
TRAINING_WORK = 2**24  # the sum over distinct words of bytes squared. English has a quarter; noise would take minutes


def byte_letters():
    """{byte: letter}: GPT-2's printable stand-in for each of the 256 bytes, in the order of its first 256 tokens."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in letters:
            letters[byte] = chr(256 + len(letters) - len(printable))
    return letters


LETTER = byte_letters()
BYTE = {letter: byte for byte, letter in LETTER.items()}


def spell(token):
    """bytes -> the letters under which tokenizer.json keeps them."""
    return "".join(LETTER[byte] for byte in token)


class Tokenizer:
    """A byte-level BPE. eos: id of the end-of-text token, the last; size: of the vocabulary; fingerprint: a sha256."""

    def __init__(self, ids):
        """ids: {bytes: id} from 0 on without a gap, the 256 single bytes among them. A lower id merges first."""
        self.ids = ids
        self.eos = len(ids)
        self.size = len(ids) + 1
        self.encoding = tiktoken.Encoding("pmp", pat_str=GPT2_WORDS, mergeable_ranks=ids,
                                          special_tokens={EOS: self.eos})
        spelled = {spell(token): id for token, id in ids.items()}
        self.fingerprint = hashlib.sha256(json.dumps(spelled, sort_keys=True).encode()).hexdigest()

    def encode(self, text):
        """str -> list of ids. An end-of-text token that is written out in the text is plain text."""
        return self.encoding.encode_ordinary(text)

    def encode_many(self, texts):
        """list of str -> list of lists of ids, on all processors, a share each: tiktoken needs no lock of Python."""
        size = 1 + len(texts) // os.cpu_count()
        shares = [texts[start:start + size] for start in range(0, len(texts), size)]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            encoded = threads.map(lambda share: list(map(self.encode, share)), shares)
            return list(chain.from_iterable(encoded))

    def decode(self, ids):
        """list of ids -> str; bytes that are no UTF-8 become U+FFFD."""
        return self.encoding.decode(ids)

    # ---- where tokenizers come from ----

    @classmethod
    def gpt2(cls):
        """GPT-2's 50,257 tokens. Raises UserError when tiktoken cannot get their files."""
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:
            raise UserError("tiktoken could not fetch GPT-2's vocabulary: connect to the network once, or set "
                            "TIKTOKEN_CACHE_DIR to a copy of a folder that has tiktoken's files for gpt2 "
                            f"({str(error)[:90]})") from None
        return cls({encoding.decode_single_token_bytes(id): id for id in range(50256)})

    @classmethod
    def train(cls, texts, size=4096):
        """Byte-level BPE (Sennrich et al., 2016) on the first 4,000,000 characters of `texts`, an iterable of str.

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

        tokens = [bytes([byte]) for byte in LETTER]
        ids = {token: id for id, token in enumerate(tokens)}
        words, frequency, work = [], [], 0
        for word, count in counts.items():
            spelled = word.encode("utf-8", "replace")
            work += len(spelled) ** 2
            if work > TRAINING_WORK:
                break
            words.append([ids[bytes([byte])] for byte in spelled])
            frequency.append(count)

        pairs, where = Counter(), defaultdict(set)  # how often a pair occurs, and in which words
        for index, word in enumerate(words):
            for pair in pairwise(word):
                pairs[pair] += frequency[index]
                where[pair].add(index)
        heap = [(-count, pair) for pair, count in pairs.items()]
        heapq.heapify(heap)
        while len(tokens) < size - 1 and heap:
            count, pair = heapq.heappop(heap)
            if -count != pairs[pair]:  # other merges took some of its places since it was pushed
                if pairs[pair] > 0:
                    heapq.heappush(heap, (-pairs[pair], pair))
                continue
            if -count < 2:
                break  # what occurs once is no pattern
            token = tokens[pair[0]] + tokens[pair[1]]
            new = ids[token] = len(tokens)
            tokens.append(token)
            changed = Counter()
            for index in where.pop(pair):
                old, word = words[index], merge(words[index], pair, new)
                words[index] = word
                for gone in pairwise(old):
                    changed[gone] -= frequency[index]
                for come in pairwise(word):
                    changed[come] += frequency[index]
                    where[come].add(index)
            for other, change in changed.items():
                pairs[other] += change
                if new in other:
                    heapq.heappush(heap, (-pairs[other], other))
        return cls(ids)

    # ---- on disk ----

    def merges(self):
        """[[left, right]]: for each token of more than one byte, the two parts that BPE makes it of."""
        found = []
        for token in sorted(self.ids, key=self.ids.get):
            parts = [bytes([byte]) for byte in token]
            while len(parts) > 2:  # the pair that makes the lowest id merges first, as in encode()
                at = min(range(len(parts) - 1), key=lambda i: self.ids.get(parts[i] + parts[i + 1], self.size))
                joined = parts[at] + parts[at + 1]
                if joined not in self.ids:
                    raise ValueError(f"no merges make the token {spell(token)[:40]!r}")
                parts[at:at + 2] = [joined]
            if len(parts) == 2:
                found.append([spell(parts[0]), spell(parts[1])])
        return found

    def save(self, folder, max_length):
        """Write tokenizer.json and tokenizer_config.json for transformers' AutoTokenizer; the same bytes each time.

        max_length: tokens of a text at most (transformers warns of longer ones). The end-of-text token is the padding,
        too, on the right: transformers makes no batch without one.
        """
        vocabulary = {spell(token): id for token, id in sorted(self.ids.items(), key=lambda item: item[1])}
        added = {"id": self.eos, "content": EOS, "single_word": False, "lstrip": False, "rstrip": False,
                 "normalized": False, "special": True}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                 "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False,
                 "vocab": vocabulary | {EOS: self.eos}, "merges": [" ".join(pair) for pair in self.merges()]}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "bos_token": EOS, "pad_token": EOS,
                  "padding_side": "right", "clean_up_tokenization_spaces": False, "model_max_length": max_length}
        write_json(Path(folder) / "tokenizer_config.json", config)
        write_json(Path(folder) / "tokenizer.json", {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": [added], "normalizer": None,
            "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level, "model": model})

    @classmethod
    def load(cls, folder):
        """The tokenizer of a release, or of GPT-2's folder. Raises UserError that names what another one has."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.exists():
            raise UserError(f"{folder} has no tokenizer.json: copy the model's tokenizer files into it")
        content = read_json(path)
        config = {}
        if (folder / "tokenizer_config.json").exists():
            config = read_json(folder / "tokenizer_config.json")

        def refuse(what):
            return UserError(f"{path}: {what}, which our tokenizer does not have: use a release's folder or GPT-2's")

        try:
            model = content["model"]
            pre_tokenizer = content["pre_tokenizer"] or {"type": "none"}
            splits_words = pre_tokenizer["type"] == "ByteLevel" and pre_tokenizer.get("use_regex", True)
            if model["type"] != "BPE" or not splits_words:
                raise refuse(f"it is a {model['type']} model with the pre-tokenizer {pre_tokenizer['type']}")
            if pre_tokenizer.get("add_prefix_space") or config.get("add_prefix_space"):
                raise refuse("it has add_prefix_space")
            if content.get("normalizer"):
                raise refuse("it has a normalizer")
            post_processor = content.get("post_processor")
            if post_processor and post_processor["type"] != "ByteLevel":
                raise refuse(f"it has the post-processor {post_processor['type']}")
            if content.get("truncation") or content.get("padding"):
                raise refuse("it has truncation or padding")
            for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback",
                           "ignore_merges"):
                if model.get(option):
                    raise refuse(f"it has the option {option}")
            added = [token["content"] for token in content["added_tokens"]]
            if added != [EOS]:
                raise refuse(f"it has the added tokens {', '.join(added[:3])} and not just {EOS}")
            vocabulary = dict(model["vocab"])
            eos = vocabulary.pop(EOS)
            if unfit := [token for token in vocabulary if set(token) - set(BYTE)]:
                raise refuse(f"it has the token {unfit[0][:40]!r}")
            ids = {bytes(BYTE[letter] for letter in token): id for token, id in vocabulary.items()}
            if sum(len(token) ** 2 for token in ids) > TRAINING_WORK:
                raise refuse("it has very long tokens")
            numbers = sorted(ids.values())
            if numbers != list(range(len(ids))) or eos != len(ids) or content["added_tokens"][0]["id"] != eos:
                raise refuse(f"its ids are not 0, 1, … with {EOS} at the end")
            if not all(bytes([byte]) in ids for byte in range(256)):
                raise refuse("it lacks some of the 256 bytes")
            merges = []
            for pair in model["merges"]:
                if isinstance(pair, str):  # older files have "a b" for ["a", "b"]
                    pair = pair.split(" ")
                merges.append(pair)
            tokenizer = cls(ids)
            if merges != tokenizer.merges():
                raise refuse("it has merges that byte-level BPE with these ids does not make")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{path} is not a whole tokenizer.json ({error!r}): restore it from a copy") from None
        return tokenizer


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
