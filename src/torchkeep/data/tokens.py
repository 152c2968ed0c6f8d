"""Tokenizers: a text becomes numbers, by its bytes, by words learned from the training texts, or as a hub's model asks.

An attention mask says which tokens count, so the number that pads is of no account to a model that masks.
"""

from __future__ import annotations

import os
import re
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import xxhash

from ..contracts import Json
from ..errors import DataError, SettingsError, nearest
from ..packages import package_of

WORD = r"\w+(?:['\u2019]\w+)*|[^\w\s\ud800-\udfff]"
"""What a word is: letters, digits and _, joined by inner apostrophes; any other sign, but for space, stands alone."""

_PADS = ("[PAD]", "<pad>", "<PAD>", "<|pad|>")
_MASKS = ("[MASK]", "<mask>", "<MASK>")
_ENDS = ("[UNK]", "<unk>", "</s>", "<|endoftext|>", "[SEP]")


class Tokenizer(ABC):
    """Texts to token numbers 0 … num_tokens - 1."""

    name: str
    num_tokens: int
    pad_id: int
    special_ids: tuple[int, ...] = ()  # what a tokenizer puts between or around words: no augmentation hides it

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], max_length: int | None = None) -> list[np.ndarray[Any, Any]]:
        """Each text's tokens, at most ``max_length``; an empty text becomes one unknown or end token.

        Shapes:  int32 (T,) each, T >= 1
        Raises:  SettingsError where nothing of a text would fit into ``max_length``
        """

    @abstractmethod
    def to_json(self) -> Json:
        """All that ``tokenizer_from_json`` needs."""

    @property
    def mask_id(self) -> int:
        """What stands for a hidden token: the mask token where there is one, else what an empty text becomes."""
        return int(self.encode_batch([""])[0][-1])

    def fingerprint(self) -> str:
        """xxh3 of all that decides the numbers; not of the name."""
        decisive = {key: value for key, value in self.to_json().items() if key != "name"}
        return str(xxhash.xxh3_128_hexdigest(orjson.dumps(decisive, option=orjson.OPT_SORT_KEYS)))


class ByteTokenizer(Tokenizer):
    """The bytes of UTF-8: 0 pads, byte b is b + 1, 257 is an empty text. A cut may fall within a letter."""

    name = "bytes"
    num_tokens = 258
    pad_id = 0
    end_id = 257

    def encode_batch(self, texts: Sequence[str], max_length: int | None = None) -> list[np.ndarray[Any, Any]]:
        _check_length(max_length)
        end = bytes([255])  # no byte of UTF-8; + 1 below, and + 1 more for the end
        rows = [np.frombuffer(text.encode("utf-8", "replace")[:max_length] or end, np.uint8) for text in texts]
        return [row.astype(np.int32) + (1 if row[0] != end[0] else 2) for row in rows]

    def to_json(self) -> Json:
        return {"kind": "bytes"}


class WordTokenizer(Tokenizer):
    """Lower-cased words and signs (``WORD``, after NFKC): 0 pads, 1 is unknown, then the words in order.

    Scripts without spaces, or with vowels as combining marks, are not cut into words by it: take "bytes" for them.
    """

    name = "words"
    pad_id = 0
    unknown_id = 1

    def __init__(self, words: Sequence[str]):
        self.words = list(words)
        self.num_tokens = len(self.words) + 2
        self._ids = {word: number for number, word in enumerate(self.words, 2)}

    @classmethod
    def learn(cls, texts: Iterable[str], min_count: int = 2, max_words: int | None = None) -> WordTokenizer:
        """The words of these texts, by falling count, then alphabet.

        Words that come less often than ``min_count`` are left out, so that "unknown" is learned too; where that leaves
        none, all are kept.
        """
        counts = Counter(word for text in texts for word in words_of(text))
        known = [word for word, count in counts.items() if count >= min_count] or list(counts)
        return cls(sorted(known, key=lambda word: (-counts[word], word))[:max_words])

    def encode_batch(self, texts: Sequence[str], max_length: int | None = None) -> list[np.ndarray[Any, Any]]:
        _check_length(max_length)
        find, unknown = self._ids.get, self.unknown_id
        rows = ([find(word, unknown) for word in words_of(text)[:max_length]] for text in texts)
        return [np.array(row or [unknown], np.int32) for row in rows]

    def to_json(self) -> Json:
        return {"kind": "words", "pattern": WORD, "words": self.words}


def words_of(text: str) -> list[str]:
    """The words and signs of a text, lower-cased."""
    return re.findall(WORD, unicodedata.normalize("NFKC", text).lower())


class HubTokenizer(Tokenizer):
    """A Hugging Face tokenizer, kept as the text of its tokenizer.json.

    ``pad_id`` is what is given, else the file's own padding, else a token of a usual name ([PAD], <pad> …), else 0.
    Unless TOKENIZERS_PARALLELISM is set, it is set to false: its threads do not outlive a fork.

    Raises:  SettingsError without the package tokenizers; DataError for a text that is no tokenizer
    """

    def __init__(self, text: str, name: str, pad_id: int | None = None):
        self.name = name
        self._text = text
        self._whole = _read_text(text, name)
        named = [number for token in _PADS if (number := self._whole.token_to_id(token)) is not None]
        own = (self._whole.padding or {}).get("pad_id")
        self.pad_id = int(next(number for number in (pad_id, own, *named, 0) if number is not None))
        self._direction = (self._whole.truncation or {}).get("direction", "right")
        self._whole.no_padding()
        self._whole.no_truncation()
        self.num_tokens = max([*self._whole.get_vocab(with_added_tokens=True).values(), self.pad_id]) + 1
        self._num_special = self._whole.num_special_tokens_to_add(False)
        added = self._whole.get_added_tokens_decoder().items()
        # what a template adds need not be said to be special
        around = self._whole.encode("").ids
        self.special_ids = (*around, *(number for number, token in added if token.special))
        self._cutting: dict[int, Any] = {}

    @classmethod
    def from_file(cls, path: Path, name: str = "") -> HubTokenizer:
        """A tokenizer.json.

        Raises:  SettingsError, DataError as the class
        """
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError("this tokenizer cannot be read", where=path, got=error) from error
        return cls(text, name or str(path))

    @classmethod
    def from_hub(cls, source: str, name: str = "") -> HubTokenizer:
        """A folder, or a name that the hub or its cache on this machine has; code that comes with it is not run.

        Raises:  SettingsError without the package transformers; DataError where it cannot be loaded
        """
        package = _package("transformers", source)
        try:
            loaded = package.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            return cls(loaded.backend_tokenizer.to_str(), name or source, loaded.pad_token_id)
        except Exception as error:  # whatever the hub, the network or the files bring
            raise DataError(
                "this tokenizer cannot be loaded",
                where=name or source,
                got=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
                expected="a fast tokenizer: a folder with its files, or a name that the hub knows",
                fix="give the path of a tokenizer.json",
            ) from error

    def encode_batch(self, texts: Sequence[str], max_length: int | None = None) -> list[np.ndarray[Any, Any]]:
        _check_length(max_length, self._num_special + 1)
        whole = [text.encode("utf-8", "replace").decode() for text in texts]  # half a surrogate pair is refused there
        encoded = self._at(max_length).encode_batch_fast(whole)  # without offsets, which nobody asks for
        return [np.array(row.ids or [self._end_id()], np.int32) for row in encoded]

    def to_json(self) -> Json:
        return {"kind": "hub", "name": self.name, "pad_id": self.pad_id, "tokenizer": self._text}

    @cached_property
    def mask_id(self) -> int:
        masks = (self._whole.token_to_id(token) for token in _MASKS)
        found = next((number for number in masks if number is not None), None)
        return self._end_id() if found is None else int(found)

    def _at(self, max_length: int | None) -> Any:
        # one copy for each length: to change the length of one in use would cut another thread's texts
        if max_length is None:
            return self._whole
        if max_length not in self._cutting:
            made = _read_text(self._text, self.name)
            made.no_padding()
            made.enable_truncation(max_length, direction=self._direction)
            self._cutting[max_length] = made
        return self._cutting[max_length]

    def _end_id(self) -> int:
        model = orjson.loads(self._text)["model"]
        found = [self._whole.token_to_id(token) for token in (model.get("unk_token") or "", *_ENDS)]
        return int(next(number for number in (model.get("unk_id"), *found, self.pad_id) if number is not None))


def make_tokenizer(name: str, base: Path | None = None, texts: Iterable[str] | None = None) -> Tokenizer:
    """ "bytes", "words" (learned from ``texts``), a tokenizer.json or a folder relative to ``base``, or "hf:NAME".

    Raises:  SettingsError for an unknown name, or for words without texts; DataError for what cannot be loaded
    """
    if name == "bytes":
        return ByteTokenizer()
    if name == "words":
        if texts is None:
            raise SettingsError("words are learned from texts", where=name, got="none", expected="the training texts")
        return WordTokenizer.learn(texts)
    if name.startswith("hf:"):
        return HubTokenizer.from_hub(name.removeprefix("hf:"), name)
    path = (base or Path()) / name
    if path.is_dir():
        return HubTokenizer.from_hub(str(path), name)
    if path.is_file():
        return HubTokenizer.from_file(path, name)
    raise SettingsError(
        "there is no such tokenizer", where=f"tokenizer {name!r}", got=f"no file or folder {path}",
        expected='"bytes", "words", "hf:NAME", or the path of a tokenizer.json or of its folder',
        fix=nearest(name, ["bytes", "words"]),
    )  # fmt: skip


def tokenizer_from_json(data: Json) -> Tokenizer:
    """The tokenizer that ``to_json`` wrote.

    Raises:  DataError for anything else; SettingsError without the package that a hub's tokenizer needs
    """
    match data:
        case {"kind": "bytes"}:
            return ByteTokenizer()
        case {"kind": "words", "pattern": pattern, "words": words} if pattern == WORD:
            return WordTokenizer(words)
        case {"kind": "hub", "tokenizer": text, "name": name, "pad_id": pad_id}:
            return HubTokenizer(text, name, pad_id)
    expected = f"what to_json gives, words by the pattern {WORD}"
    raise DataError("this is no saved tokenizer", where="tokenizer", got=str(data)[:80], expected=expected)


def _check_length(max_length: int | None, shortest: int = 1) -> None:
    if max_length is not None and max_length < shortest:
        expected = f"at least {shortest}, special tokens counted"
        raise SettingsError("no text fits into this length", where="max_length", got=max_length, expected=expected)


def _read_text(text: str, name: str) -> Any:
    package = _package("tokenizers", name)
    try:
        return package.Tokenizer.from_str(text)
    except Exception as error:  # the Rust side has no exception of its own
        raise DataError("this is no tokenizer", where=name, got=error, expected="a tokenizer.json") from error


def _package(package: str, where: str) -> Any:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return package_of(package, "hf", where)
