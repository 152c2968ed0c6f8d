"""Texts in tables or folders, made into tokens when a batch needs them, and padded to the longest of the batch."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow.compute as pc
import torch
import xxhash

from ..chance import ChanceKey
from ..contracts import Batch, Field, Sample, Schema
from ..errors import BadSampleError, DataError
from .blobs import FrameRows, ListedFiles, SizedBlobs
from .dataset import Indices, KeyedData, target_of, whole_of
from .frames import Form, Source, is_text, read_frame, require_column, where_of
from .index import Layout, list_folder
from .labels import Labels, labels_of_classes, labels_of_column
from .samples import padded
from .tokens import Tokenizer, make_tokenizer

TEXT_SUFFIXES = (".txt", ".text", ".md")
MAX_LENGTH = 512

_LEARN_AT_ONCE = 4096


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
        row = pc.index(pc.is_null(self._column), True).as_py() if self._column.null_count else -1
        if row >= 0:
            raise DataError(
                "a text is missing",
                where=f"{where}: column {name!r}, row {row} (counted from 0)",
                got=f"{self._column.null_count:,} cells without a text",
                expected="a text in each row; an empty one is a text too",
                fix="remove these rows",
            )

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


class Texts(KeyedData):
    """What the sources of texts share.

    ``tokenizer`` is "bytes", "words" (learned from these texts), a tokenizer.json, a folder or "hf:NAME" of a Hugging
    Face tokenizer, or a ``Tokenizer``; with ``like`` it is that of the training data. Longer texts are cut at
    ``max_length`` tokens.

    Shapes:  "input_ids" int64 (T,); in a batch (B, T), padded, with "attention_mask" int64 (B, T): 1 where a token is
    """

    threads = True  # a Hugging Face tokenizer works outside the GIL
    max_length: int
    tokenizer: Tokenizer

    def __init__(
        self,
        source: TextSource,
        labels: Labels | None,
        where: str,
        *,
        tokenizer: str | Tokenizer | None = None,
        max_length: int | None = None,
        base: Path | None = None,
        like: Any = None,
    ):
        known = whole_of(like, Texts, "a dataset of texts", where)
        self.source, self._labels, self.where = source, labels, where
        self.max_length = max_length or (known.max_length if known else MAX_LENGTH)
        if isinstance(tokenizer, str) or (tokenizer is None and known is None):
            self.tokenizer = make_tokenizer(tokenizer or "words", base, _some_texts(source, np.arange(len(source))))
        else:
            self.tokenizer = tokenizer or known.tokenizer  # type: ignore[union-attr]  # one of the two is there
        self._learns = tokenizer == "words" or (tokenizer is None and known is None)
        self.schema = self._schema()

    def _schema(self) -> Schema:
        fields = {"input_ids": Field("tokens", (None,), num_tokens=self.tokenizer.num_tokens)}
        if self._labels is not None:
            fields[self._labels.key] = self._labels.field
        return Schema({**fields, "id": Field("object")})

    def learned_from(self, indices: Indices) -> Texts:
        """The same texts; a vocabulary that was learned from them is learned from these alone."""
        if not self._learns:
            return self
        made = copy.copy(self)
        made.tokenizer = make_tokenizer("words", None, _some_texts(self.source, indices))
        made.schema = made._schema()
        return made

    def __len__(self) -> int:
        return len(self.source)

    def tokens(self, indices: Indices) -> list[np.ndarray[Any, Any]]:
        """The tokens of some texts, each (T,) int32."""
        return self.tokenizer.encode_batch(self.source.texts(indices), self.max_length)

    def read(self, index: int, key: ChanceKey) -> Sample:
        """One sample: {"input_ids": int64 (T,), "label": …, "id": str}."""
        sample: Sample = {"input_ids": torch.from_numpy(self.tokens(np.array([index]))[0].astype(np.int64))}
        if self._labels is not None:
            sample[self._labels.key] = self._labels.of(index)
        return sample | {"id": self.id_of(index)}

    def read_batch(self, indices: Indices, key: ChanceKey) -> Batch:
        """Shapes:  indices (B,) → "input_ids" and "attention_mask" int64 (B, T), "label" (B,)"""
        batch = self._padded(self.tokens(indices))
        return batch if self._labels is None else batch | {self._labels.key: self._labels.batch(indices)}

    def collate(self, samples: list[Sample]) -> Batch:
        """A batch of samples, padded to the longest."""
        rest = [{name: value for name, value in sample.items() if name != "input_ids"} for sample in samples]
        return self._padded([sample["input_ids"].numpy() for sample in samples]) | super().collate(rest)

    def _padded(self, tokens: list[np.ndarray[Any, Any]]) -> Batch:
        ids = padded(tokens, self.tokenizer.pad_id)
        lengths = torch.tensor([len(row) for row in tokens])
        return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}

    def id_of(self, index: int) -> str:
        return self.source.id_of(index)

    def fingerprint(self) -> str:
        """xxh3 of the texts, the tokenizer, the longest length and the labels."""
        digest = xxhash.xxh3_128(f"{self.tokenizer.fingerprint()}|{self.max_length}".encode())
        self.source.absorb(digest)
        if self._labels is not None:
            self._labels.absorb(digest)
        return str(digest.hexdigest())

    @property
    def labels(self) -> Indices | None:
        return self._labels.classes if self._labels is not None else None

    @property
    def lengths(self) -> np.ndarray[Any, Any]:
        """Bytes of each text: near enough to its tokens for buckets, and known without making them."""
        return np.asarray(np.minimum(self.source.sizes_bytes, 8 * self.max_length))


def _some_texts(source: TextSource, indices: Indices) -> Iterator[str]:
    for start in range(0, len(indices), _LEARN_AT_ONCE):
        yield from source.texts(indices[start : start + _LEARN_AT_ONCE])


class TextTable(FrameRows, Texts):
    """A table with a column of texts and one of what is to be predicted; ``target=None`` for none.

    Further options are those of ``Texts``.
    Raises:  DataError for a missing table or column, an empty cell, a class that ``like`` does not know
    """

    def __init__(
        self,
        source: Source,
        *,
        text: str = "text",
        target: str | None = "label",
        id: str | None = None,
        separator: str | None = None,
        form: Form | None = None,
        identity: str = "",
        **options: Any,
    ):
        where = where_of(source)
        form = form or Form()
        frame = read_frame(source, Form(form.is_csv, form.columns, (text,)))
        cells = TextCells(frame, text, where, identity)
        labels = None
        if target is not None:
            field = target_of(whole_of(options.get("like"), Texts, "a dataset of texts", where))
            labels = labels_of_column(frame, target, where, field, separator)
        self._keep(frame, [text], id, where)
        super().__init__(cells, labels, where, **options)


class TextFolder(Texts):
    """``root/CLASS/any/where/name.txt``: one text a file, the classes are the folders. Options as for ``Texts``.

    Raises:  DataError for a missing or empty root, no class folders, a class that ``like`` does not know
    """

    def __init__(
        self,
        root: str | Path,
        *,
        label_pattern: str | None = None,
        follow_links: bool = False,
        has_classes: bool = True,
        **options: Any,
    ):
        listing = list_folder(Path(root), Layout(TEXT_SUFFIXES, "texts", has_classes, label_pattern, follow_links))
        labels, where = None, str(root)
        if has_classes:
            field = target_of(whole_of(options.get("like"), Texts, "a dataset of texts", where))
            labels = labels_of_classes(listing.labels, listing.classes, field, where)
        super().__init__(TextFiles(ListedFiles(listing), where), labels, where, **options)


class TextBlocks(KeyedData):
    """Texts as one stream of tokens, cut into blocks: what a language model learns from.

    The texts stand one after another, each ended by the token that an empty text becomes. They are made into tokens
    once, when the first block or the number of blocks is asked for, and then held, two or four bytes a token.

    Shapes:  "input_ids" int64 (T,), "target" int64 (T,), the tokens that follow; T is ``block_size``
    Raises:  DataError where the texts do not fill one block
    """

    def __init__(self, texts: Texts, block_size: int):
        self.texts, self.block_size = texts, block_size
        self.where, self.tokenizer = texts.where, texts.tokenizer
        count = texts.tokenizer.num_tokens
        target = Field("tokens", (block_size,), num_tokens=count, is_target=True)
        self.schema = Schema({"input_ids": Field("tokens", (block_size,), num_tokens=count), "target": target})
        self._stream: np.ndarray[Any, Any] | None = None

    @property
    def stream(self) -> np.ndarray[Any, Any]:
        """All tokens, (N,) uint16 or int32."""
        if self._stream is None:
            kind = np.uint16 if self.tokenizer.num_tokens <= 1 << 16 else np.int32
            end = self.tokenizer.encode_batch([""], None)[0][-1:]
            parts = [np.empty(0, kind)]
            for start in range(0, len(self.texts), _LEARN_AT_ONCE):
                stop = min(start + _LEARN_AT_ONCE, len(self.texts))
                read = self.texts.source.texts(np.arange(start, stop))
                for tokens in self.tokenizer.encode_batch(read, None):
                    parts += [tokens.astype(kind), end.astype(kind)][: 1 if tokens[-1] == end[0] else 2]
            self._stream = np.concatenate(parts)
            if len(self) == 0:
                raise DataError(
                    "these texts do not fill one block",
                    where=self.where,
                    got=f"{len(self._stream):,} tokens",
                    expected=f"more than {self.block_size:,}",
                    fix="a smaller block_size",
                )
        return self._stream

    def __len__(self) -> int:
        return (len(self.stream) - 1) // self.block_size

    def read(self, index: int, key: ChanceKey) -> Sample:
        return {name: column[0] for name, column in self.read_batch(np.array([index]), key).items()}

    def read_batch(self, indices: Indices, key: ChanceKey) -> Batch:
        """Shapes:  indices (B,) → "input_ids" and "target" int64 (B, T)"""
        places = indices[:, None] * self.block_size + np.arange(self.block_size + 1)
        tokens = torch.from_numpy(self.stream[places].astype(np.int64))
        return {"input_ids": tokens[:, :-1], "target": tokens[:, 1:]}

    def fingerprint(self) -> str:
        return xxhash.xxh3_128_hexdigest(f"{self.texts.fingerprint()}|{self.block_size}".encode())

    def id_of(self, index: int) -> str:
        return f"block {index}"
