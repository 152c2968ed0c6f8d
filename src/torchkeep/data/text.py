"""Texts in tables or folders, made into tokens when a batch needs them, and padded to the longest of the batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import xxhash

from ..chance import ChanceKey
from ..contracts import Batch, Field, Sample, Schema
from ..errors import BadSampleError, DataError, SettingsError
from .blobs import FolderRows, FrameRows, ListedFiles, SizedBlobs
from .dataset import Filling, Indices, KeyedData, target_of, whole, whole_of
from .frames import Form, Source, is_text, read_frame, require_column, where_of
from .index import Layout, list_folder
from .labels import LabelledData, Labels, check_filled, labels_of_classes, labels_of_column
from .masking import Augmentation, TextAugmentations
from .samples import padded
from .tokens import HubTokenizer, Tokenizer, WordTokenizer, make_tokenizer

TEXT_SUFFIXES = (".txt", ".text", ".md")
MAX_LENGTH = 512

_LEARN_AT_ONCE = 4096
_LEAST_COUNT = 2  # of a word in the blocks that it is learned from, as in WordTokenizer.learn
_KEPT_BYTES = 1 << 26  # of texts whose tokens are kept: usually as many bytes of tokens, at most four times as many
_MORE_TOKENS = 8  # than bytes: what a tokenizer puts around a text


class TextSource(Protocol):
    """Texts by number."""

    def __len__(self) -> int: ...

    def texts(self, indices: Indices) -> list[str]: ...

    def id_of(self, index: int) -> str: ...

    def absorb(self, digest: Any) -> None: ...

    @property
    def sizes_bytes(self) -> Any: ...


class TextCells:
    """A column of texts, as it lies in its table: one that is mapped from the disk stays there.

    Raises:  DataError for a missing column, one of another type, an empty cell
    """

    def __init__(self, frame: Any, name: str, where: str, identity: str = ""):
        self._column = require_column(frame, name, where, "data.text")
        self._identity = identity
        if not is_text(self._column.type):
            got = f"type {self._column.type}"
            raise DataError("this column holds no texts", where=f"{where}: column {name!r}", got=got, expected="texts")
        check_filled(self._column, f"{where}: column {name!r}", "text")

    def __len__(self) -> int:
        return len(self._column)

    def texts(self, indices: Indices) -> list[str]:
        return [self._column[index].as_py() for index in indices.tolist()]

    def id_of(self, index: int) -> str:
        return f"row {index}"

    def absorb(self, digest: Any) -> None:
        if self._identity:
            digest.update(self._identity.encode())
            return
        for start in range(0, len(self), _LEARN_AT_ONCE):
            for text in self._column.slice(start, _LEARN_AT_ONCE).to_pylist():
                digest.update(text.encode("utf-8", "surrogatepass") + b"\0")

    @property
    def sizes_bytes(self) -> Any:
        return pc.binary_length(self._column).to_numpy()


class TextFiles:
    """The files of a listing, each one text in UTF-8."""

    def __init__(self, files: SizedBlobs, where: str):
        self._files, self._where = files, where

    def __len__(self) -> int:
        return len(self._files)

    def texts(self, indices: Indices) -> list[str]:
        return [self._text(index) for index in indices.tolist()]

    def _text(self, index: int) -> str:
        where = f"{self._where}: {self.id_of(index)} (sample {index})"
        try:
            return self._files.read(index, where).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadSampleError(
                "this text is not UTF-8",
                where=where,
                got=f"byte {error.object[error.start]:#04x} at place {error.start:,}",
                expected="UTF-8",
                fix="iconv -f latin1 -t utf-8, if that is what it is",
            ) from None

    def id_of(self, index: int) -> str:
        return self._files.id_of(index)

    def absorb(self, digest: Any) -> None:
        self._files.absorb(digest)

    @property
    def sizes_bytes(self) -> Any:
        return self._files.sizes_bytes


class _KeptTokens:
    """Tokens as they were made, so that a second epoch does not make them again. Each text has a place of its own, so
    threads that make the same tokens write the same numbers.

    Shapes:  places (N + 1,) int64 in ``stream``; counts (N,) int32, 0 where a text's tokens are not made yet
    """

    def __init__(self, most: Indices):
        self._places = np.concatenate([np.zeros(1, np.int64), np.cumsum(most)])
        self._stream = np.empty(int(self._places[-1]), np.int32)  # memory comes with the first write
        self._counts = np.zeros(len(most), np.int32)

    def __reduce__(self) -> Any:
        return _KeptTokens, (np.diff(self._places),)  # another process keeps its own

    def rows(self, indices: Indices, make: Callable[[Indices], list[np.ndarray[Any, Any]]]) -> list[Any]:
        """The tokens of some texts, (T,) each, made where they are not here yet."""
        missing = indices[self._counts[indices] == 0]
        for index, row in zip(missing.tolist(), make(missing) if len(missing) else [], strict=True):
            start, end = self._places[index], self._places[index] + len(row)
            if end > self._places[index + 1]:  # more tokens than bytes: no place was kept for that
                return make(indices)
            self._stream[start:end] = row
            self._counts[index] = len(row)  # last: who sees a count finds the tokens
        places = zip(self._places[indices].tolist(), self._counts[indices].tolist(), strict=True)
        return [self._stream[start : start + count] for start, count in places]


def _kept_tokens(source: TextSource, max_length: int) -> _KeptTokens | None:
    sizes_bytes = source.sizes_bytes
    if sizes_bytes is None or int(np.sum(sizes_bytes)) > _KEPT_BYTES:
        return None
    return _KeptTokens(np.minimum(sizes_bytes + _MORE_TOKENS, max_length))


class Texts(LabelledData):
    """What the sources of texts share.

    ``tokenizer`` is "bytes", "words" (learned from these texts), a tokenizer.json, a folder or "hf:NAME" of a Hugging
    Face tokenizer, or a ``Tokenizer``; with ``like`` and without another name it is that of the training data. Longer
    texts are cut at ``max_length`` tokens. ``augment``: "token_mask", then callables ``(sample, rng)`` in their order.

    Shapes:  "input_ids" int64 (T,); in a batch (B, T), padded, with "attention_mask" int64 (B, T): 1 where a token is
    """

    suffixes = TEXT_SUFFIXES
    input_column = "text"
    max_length: int
    tokenizer: Tokenizer
    learns: bool  # whether the vocabulary is that of these texts

    def __init__(
        self, source: TextSource, labels: Labels | None, where: str, *, tokenizer: str | Tokenizer | None = None,
        max_length: int | None = None, base: Path | None = None, augment: Sequence[Augmentation] = (), like: Any = None,
    ):  # fmt: skip
        known = _known_texts(like, where)
        self.augmentations = TextAugmentations(tuple(augment))
        self.source = self._held = source
        self._labels, self.where = labels, where
        self.max_length = max_length or (known.max_length if known is not None else MAX_LENGTH)
        if known is not None and tokenizer in (None, known.tokenizer.name):  # words of these texts would be other words
            tokenizer = known.tokenizer
        self.learns = tokenizer in (None, "words")
        if tokenizer is None or isinstance(tokenizer, str):
            tokenizer = make_tokenizer(tokenizer or "words", base, _some_texts(source, np.arange(len(source))))
        self.tokenizer = tokenizer
        self._kept = _kept_tokens(source, self.max_length)
        self.schema = self._schema()

    def _schema(self) -> Schema:
        return self._schema_of({"input_ids": Field("tokens", (None,), num_tokens=self.tokenizer.num_tokens)})

    def learned_from(self, indices: Indices) -> Texts:
        """The same texts; a learned vocabulary, and the mean of a target of numbers, are those of these alone."""
        learned = WordTokenizer.learn(_some_texts(self.source, indices)) if self.learns else self.tokenizer
        made: Texts = super().learned_from(indices)
        return made.with_tokenizer(learned)

    def with_tokenizer(self, tokenizer: Tokenizer) -> Texts:
        """The same texts in other tokens."""
        made = copy.copy(self)
        made.tokenizer = tokenizer
        made._kept = _kept_tokens(self.source, self.max_length)
        made.schema = made._schema()
        return made

    @property
    def threads(self) -> bool:  # type: ignore[override]
        """Where tokens are kept, a batch is a gather: with threads it would take three times as long."""
        return not self.keeps_tokens and not self.augmentations.has_callable

    @property
    def keeps_tokens(self) -> bool:
        """Whether the texts are few enough for their tokens to be kept after the first epoch: 64 MB."""
        return self._kept is not None

    def tokens(self, indices: Indices) -> list[np.ndarray[Any, Any]]:
        """The tokens of some texts, each (T,) int32; made once where the texts are few enough to keep them."""
        return self._made(indices) if self._kept is None else self._kept.rows(indices, self._made)

    def _made(self, indices: Indices) -> list[np.ndarray[Any, Any]]:
        return self.tokenizer.encode_batch(self.source.texts(indices), self.max_length)

    def read(self, index: int, key: ChanceKey) -> Sample:
        """One sample: {"input_ids": int64 (T,), "label": …, "id": str}.

        Raises:  BadSampleError where a text is not UTF-8 or a callable fails, DataError where it gives no such sample
        """
        tokens = torch.from_numpy(self._masked(np.array([index]), key)[0].astype(np.int64))
        sample = {"input_ids": tokens, **self._label_of(index), "id": self.id_of(index)}
        return self.augmentations.apply_callables(sample, key, index, self._where(index, key))

    def begin(self, indices: Indices, key: ChanceKey) -> Filling | None:
        """None, for a batch is one gather; sample by sample where a user's callable may add keys."""
        return super().begin(indices, key) if self.augmentations.has_callable else None

    def read_batch(self, indices: Indices, key: ChanceKey) -> Batch:
        """Shapes:  indices (B,) → "input_ids" and "attention_mask" int64 (B, T), "label" (B,)"""
        if self.augmentations.has_callable:
            return self.collate([self.read(index, key) for index in indices.tolist()])
        return self._padded(self._masked(indices, key)) | self.labels_of(indices)

    def _masked(self, indices: Indices, key: ChanceKey) -> list[np.ndarray[Any, Any]]:
        return self.augmentations.mask(self.tokens(indices), indices, key, self.tokenizer)

    def without_augmentation(self) -> Texts:
        """A copy that shares everything but the augmentations."""
        plain = copy.copy(self)
        plain.augmentations = TextAugmentations()
        return plain

    def collate(self, samples: list[Sample]) -> Batch:
        """A batch of samples, padded to the longest."""
        rest = [{name: value for name, value in sample.items() if name != "input_ids"} for sample in samples]
        return self._padded([sample["input_ids"].numpy() for sample in samples]) | super().collate(rest)

    def _padded(self, tokens: list[np.ndarray[Any, Any]]) -> Batch:
        ids = padded(tokens, self.tokenizer.pad_id)
        lengths = np.array([len(row) for row in tokens])
        mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
        return {"input_ids": ids, "attention_mask": torch.from_numpy(mask)}

    def fingerprint(self) -> str:
        """xxh3 of the texts, the tokenizer, the longest length and the labels."""
        return self._digest(f"{self.tokenizer.fingerprint()}|{self.max_length}")

    @property
    def lengths(self) -> np.ndarray[Any, Any]:
        """Bytes of each text: near enough to its tokens for buckets, and known without making them."""
        return np.asarray(np.minimum(self.source.sizes_bytes, 8 * self.max_length))


def _known_texts(like: Any, where: str) -> Texts | None:
    """The texts of the training data, which may be cut into blocks.

    Raises:  DataError where those are no texts
    """
    held = whole(like)
    return whole_of(held.texts if isinstance(held, TextBlocks) else held, Texts, "a dataset of texts", where)


def _some_texts(source: TextSource, indices: Indices) -> Iterator[str]:
    for start in range(0, len(indices), _LEARN_AT_ONCE):
        yield from source.texts(indices[start : start + _LEARN_AT_ONCE])


class TextTable(FrameRows, Texts):
    """A table with a column of texts and one of what is to be predicted; ``target=None`` for none.

    Further options are those of ``Texts``.
    Raises:  DataError for a missing table or column, an empty cell, a class that ``like`` does not know
    """

    def __init__(
        self, source: Source, *, text: str = "text", target: str | None = "label", id: str | None = None,
        separator: str | None = None, form: Form | None = None, identity: str = "", **options: Any,
    ):  # fmt: skip
        where = where_of(source)
        form = form or Form()
        frame = read_frame(source, Form(form.is_csv, form.columns, (text,)))
        cells = TextCells(frame, text, where, identity)
        labels = None
        if target is not None:
            field = target_of(_known_texts(options.get("like"), where))
            labels = labels_of_column(frame, target, where, field, separator)
        self._keep(frame, [text], id, where)
        super().__init__(cells, labels, where, **options)


class TextFolder(FolderRows, Texts):
    """``root/CLASS/any/where/name.txt``: one text a file, the classes are the folders. Options as for ``Texts``.

    Raises:  DataError for a missing or empty root, no class folders, a class that ``like`` does not know
    """

    def __init__(
        self, root: str | Path, *, label_pattern: str | None = None, follow_links: bool = False,
        has_classes: bool = True, **options: Any,
    ):  # fmt: skip
        listing = list_folder(Path(root), Layout(TEXT_SUFFIXES, "texts", has_classes, label_pattern, follow_links))
        self.listing = listing
        labels, where = None, str(root)
        if has_classes:
            field = target_of(_known_texts(options.get("like"), where))
            labels = labels_of_classes(listing.labels, listing.classes, field, where)
        super().__init__(TextFiles(ListedFiles(listing), where), labels, where, **options)


class TextBlocks(KeyedData):
    """Texts as one stream of tokens, cut into blocks: what a language model learns from.

    The texts stand one after another, each ended by the token that an empty text becomes. They are made into tokens
    once, when the first block or the number of blocks is asked for, and then held, two or four bytes a token.

    ``texts`` is a dataset of texts, or a folder, a table or a list of them, with the options of ``Texts``.

    Shapes:  "input_ids" int64 (T,), "target" int64 (T,), the tokens that follow; T is ``block_size``
    Raises:  DataError where the texts do not fill one block, SettingsError where they are augmented
    """

    def __init__(self, texts: Texts | str | Path | Sequence[str], block_size: int, **options: Any):
        if isinstance(texts, str | Path) and Path(texts).is_dir():
            texts = TextFolder(texts, has_classes=False, **options)
        elif not isinstance(texts, Texts):
            held = texts if isinstance(texts, str | Path) else pa.table({"text": list(texts)})
            texts = TextTable(held, target=None, **options)
        if texts.augmentations.entries:
            got = f"{len(texts.augmentations.entries)} of them"
            raise SettingsError("blocks have no augmentations", where="augment", got=got, expected="none")
        self.texts, self.block_size, self.where = texts, block_size, texts.where
        shape, count = (block_size,), self.tokenizer.num_tokens
        target = Field("tokens", shape, num_tokens=count, is_target=True)
        self.schema = Schema({"input_ids": Field("tokens", shape, num_tokens=count), "target": target})
        self._stream: np.ndarray[Any, Any] | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        return self.texts.tokenizer

    @property
    def stream(self) -> np.ndarray[Any, Any]:
        """All tokens, (N,) uint16 or int32."""
        if self._stream is None:
            self._stream = np.concatenate(list(self._parts()))
            if len(self) == 0:
                raise DataError(
                    "these texts do not fill one block", where=self.where, got=f"{len(self._stream):,} tokens",
                    expected=f"more than {self.block_size:,}", fix="a smaller block_size",
                )  # fmt: skip
        return self._stream

    def _parts(self) -> Iterator[np.ndarray[Any, Any]]:
        kind = np.uint16 if self.tokenizer.num_tokens <= 1 << 16 else np.int32
        end = self.tokenizer.encode_batch([""], None)[0][-1:]
        closes = isinstance(self.tokenizer, HubTokenizer)  # many of these end each text themselves
        for start in range(0, len(self.texts), _LEARN_AT_ONCE):
            read = self.texts.source.texts(np.arange(start, min(start + _LEARN_AT_ONCE, len(self.texts))))
            for text, tokens in zip(read, self.tokenizer.encode_batch(read, None), strict=True):
                yield tokens.astype(kind)
                if text and not (closes and tokens[-1] == end[0]):
                    yield end.astype(kind)

    def learned_from(self, indices: Indices) -> TextBlocks:
        """The same blocks; a learned vocabulary is that of these alone, and other words become unknown."""
        known = self.tokenizer
        if not self.texts.learns or not isinstance(known, WordTokenizer):
            return self
        counts = np.bincount(self.stream[self._places(indices)].reshape(-1), minlength=known.num_tokens)
        first = known.num_tokens - len(known.words)
        counts[:first] = 0
        found = np.flatnonzero(counts >= _LEAST_COUNT).tolist() or np.flatnonzero(counts).tolist()
        found.sort(key=lambda number: (-counts[number], known.words[number - first]))
        renumbered = np.full(known.num_tokens, known.unknown_id, self.stream.dtype)
        renumbered[found] = np.arange(first, first + len(found))
        tokenizer = WordTokenizer([known.words[number - first] for number in found])
        made = TextBlocks(self.texts.with_tokenizer(tokenizer), self.block_size)
        made._stream = renumbered[self.stream]
        return made

    def _places(self, indices: Indices) -> Indices:
        """Where the blocks' tokens stand in the stream, and the one that follows each. Shapes: (B,) → (B, T + 1)."""
        return indices[:, None] * self.block_size + np.arange(self.block_size + 1)

    def __len__(self) -> int:
        return (len(self.stream) - 1) // self.block_size

    def begin(self, indices: Indices, key: ChanceKey) -> None:
        """None: a batch is one gather."""

    def read(self, index: int, key: ChanceKey) -> Sample:
        return {name: column[0] for name, column in self.read_batch(np.array([index]), key).items()}

    def read_batch(self, indices: Indices, key: ChanceKey) -> Batch:
        """Shapes:  indices (B,) → "input_ids" and "target" int64 (B, T)"""
        tokens = torch.from_numpy(self.stream[self._places(indices)].astype(np.int64))
        return {"input_ids": tokens[:, :-1].contiguous(), "target": tokens[:, 1:].contiguous()}

    def fingerprint(self) -> str:
        return xxhash.xxh3_128_hexdigest(f"{self.texts.fingerprint()}|{self.block_size}".encode())

    def id_of(self, index: int) -> str:
        return f"block {index}"
