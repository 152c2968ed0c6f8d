"""Predictions in the inputs' order: files, folders, tables, texts, datasets or tensors through a trained model."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..contracts import INDEX, VALID, Batch, Field
from ..data.foreign import as_dataset
from ..data.inputs import InputBatch
from ..data.loader import Loader, usable_cores
from ..data.reading import Collate, valid_rows
from ..errors import ModelError, SettingsError
from .contract import Asked
from .package import Package, load_package

_MAX_WORKERS = 8


class Prediction(NamedTuple):
    """What the model says of one input: a label with its probability, a number or several, or why there is nothing.

    ``top`` are the likeliest classes with their probabilities, where more than one was asked for.
    """

    input: str
    label: str | None = None
    probability: float | None = None
    value: float | None = None
    error: str | None = None
    top: tuple[tuple[str, float], ...] = ()
    values: tuple[float, ...] = ()

    def row(self) -> dict[str, Any]:
        """Only what was said."""
        return {name: value for name, value in self._asdict().items() if value is not None and value != ()}


class Predictor:
    """Asks a model, a batch at a time: ``predictor(inputs)``, or ``predictor.stream(inputs)`` for any number of them.

    ``source`` is a package or its path, or what ``Run.asked`` gives. ``inputs`` are one or several paths (files,
    folders, tables), texts where the model takes them, a tensor or array (N, …), a dict of a table's columns or of
    tensors, or a dataset, of which ``collate`` makes batches. ``top`` classes are said of each. The next batch is read
    while the model computes, by ``workers`` threads; 0: in turn.

    Raises:  SettingsError for a number that cannot be; as ``load_package`` does
    """

    def __init__(
        self, source: str | Path | Package | Asked, *, batch_size: int | None = None, top: int = 1,
        workers: int | Literal["auto"] = "auto", collate: Collate | None = None,
    ):  # fmt: skip
        _check("batch_size", batch_size, batch_size is None or batch_size > 0, "a whole number above 0")
        _check("top", top, top > 0, "a whole number above 0")
        _check("workers", workers, workers == "auto" or workers >= 0, '"auto" or a number from 0')
        package = load_package(source) if isinstance(source, str | Path) else source
        self.asked = package.asked if isinstance(package, Package) else package
        _check("top", top, top == 1 or self.asked.contract.loss != "mse", "1: this model says numbers, not classes")
        self.batch_size = batch_size or self.asked.contract.batch_size
        self.top, self.workers, self.collate = top, workers, collate

    def __call__(self, inputs: Any) -> list[Prediction]:
        return list(self.stream(inputs))

    def stream(self, inputs: Any) -> Iterator[Prediction]:
        """A prediction for each input, in order.

        Raises:  DataError for a path that is not there, or of a kind that the model does not take; ModelError for a
                 model that says more than one thing of an input
        """
        with closing(self.batches(inputs)) as batches:
            for predictions in batches:
                yield from predictions

    def outputs(self, batch: Batch) -> Tensor:
        """What the model gives for a batch as the reader makes it.

        Shapes:  images uint8 (B, C, H, W) → (B, K), (B,) or what the model gives, float32 on the CPU
        """
        return self.asked(batch)

    def batches(self, inputs: Any, *, first: int = 0) -> Generator[list[Prediction], None, None]:
        """As ``stream`` gives them, by the batch, from batch ``first`` on: those before it are not read.

        Raises:  as ``stream`` does
        """
        target = self.asked.contract.target
        if target is not None and target.kind in ("mask", "tokens"):
            raise _says_more(f"a {'class for each pixel' if target.kind == 'mask' else 'next token for each token'}")
        with closing(self._parts(inputs, first)) as parts:
            yield from map(self._predicted, parts)

    def _parts(self, inputs: Any, first: int) -> Generator[InputBatch, None, None]:
        are_named = isinstance(inputs, Sequence) and inputs and all(isinstance(item, str | Path) for item in inputs)
        if are_named or isinstance(inputs, Path | Tensor | np.ndarray | Mapping):
            workers = min(_MAX_WORKERS, usable_cores()) if self.workers == "auto" else self.workers
            reader = self.asked.contract.reader
            yield from reader.batches(inputs, self.batch_size, first=first, workers=workers)
            return
        loader = Loader(as_dataset(inputs), self.batch_size, collate=self.collate, workers=self.workers, on_bad="mask",
                        bad_fraction=1.0)  # fmt: skip
        with closing(loader):
            yield from (_of_loader(batch, loader) for batch in islice(loader, first, None))

    def _predicted(self, part: InputBatch) -> list[Prediction]:
        contract = self.asked.contract
        if part.batch is None:
            said = []
        else:
            output = self.asked(part.batch)
            said = said_of(output, contract.target, contract.loss, contract.temperature, self.top)
        if not part.problems:
            return [Prediction(name, **row) for name, row in zip(part.names, said, strict=True)]
        read, problems = iter(said), part.problems
        return [
            Prediction(name, **({"error": problems[place]} if place in problems else next(read)))
            for place, name in enumerate(part.names)
        ]


def _of_loader(batch: Batch, loader: Loader) -> InputBatch:
    indices = batch[INDEX].tolist()
    valid = batch[VALID].tolist() if VALID in batch else [True] * len(indices)
    problems = {place: loader.bad[indices[place]].reason for place, is_read in enumerate(valid) if not is_read}
    return InputBatch(list(map(str, indices)), valid_rows(batch) if any(valid) else None, problems)


def said_of(
    output: Tensor, target: Field | None, loss: str = "", temperature: float = 1.0, top: int = 1
) -> list[dict[str, Any]]:
    """Logits as labels with their probabilities, other outputs as numbers; an output that is none as an error.

    Shapes:  output (B, K), (B, 1) or (B,); with the loss "binary_cross_entropy" each is the logit of two classes, with
             "mse" each is a number
    Raises:  ModelError for any other output
    """
    if output.ndim not in (1, 2) or not len(output):
        raise _says_more(f"outputs {tuple(output.shape)}")
    said = _said(output, target, loss, temperature, top)
    # -inf is the logit of a class that cannot be
    lost = ~(output < math.inf) if output.ndim == 2 and output.shape[1] > 1 else ~output.isfinite()
    for row in lost.reshape(len(output), -1).any(1).nonzero()[:, 0].tolist():
        said[row] = {"error": "the model's output is no number"}
    return said


def _said(output: Tensor, target: Field | None, loss: str, temperature: float, top: int) -> list[dict[str, Any]]:
    classes = target.classes if target is not None else ()
    is_binary, is_single = loss == "binary_cross_entropy", output.ndim == 1 or output.shape[1] == 1
    if loss == "mse" and not is_single:
        return [{"values": tuple(row)} for row in output.tolist()]
    if is_binary and output.ndim == 2 and (not is_single or (target is not None and target.kind == "multilabel")):
        return _several(output.div(temperature).sigmoid(), classes, top)
    if is_single:
        numbers = output.reshape(len(output))
        if not is_binary:
            return [{"value": value} for value in numbers.tolist()]
        output = torch.stack([torch.zeros_like(numbers), numbers], 1)  # their softmax is the logit's sigmoid
    probabilities = output.div(temperature).softmax(1)
    names = _names(classes, probabilities)
    if top == 1:
        best = probabilities.max(1)
        return [{"label": names[i], "probability": p}
                for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]  # fmt: skip
    return [{"label": row[0][0], "probability": row[0][1], "top": row} for row in _likeliest(probabilities, names, top)]


def _names(classes: Sequence[str], probabilities: Tensor) -> list[str]:
    return [*classes, *map(str, range(len(classes), probabilities.shape[1]))]


def _likeliest(probabilities: Tensor, names: Sequence[str], top: int) -> list[tuple[tuple[str, float], ...]]:
    best = probabilities.topk(min(top, probabilities.shape[1]), 1)
    return [tuple((names[i], p) for p, i in zip(values, indices, strict=True))
            for values, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True)]  # fmt: skip


def _several(probabilities: Tensor, classes: Sequence[str], top: int) -> list[dict[str, Any]]:
    """The classes above one half, joined by "|"; the probability is that of the least sure decision."""
    names = _names(classes, probabilities)
    least = ((probabilities - 0.5).abs().amin(1) + 0.5).tolist()
    said: list[dict[str, Any]] = [
        {"label": "|".join(names[i] for i, p in enumerate(row) if p > 0.5), "probability": sure}
        for row, sure in zip(probabilities.tolist(), least, strict=True)
    ]
    if top > 1:
        for row, likeliest in zip(said, _likeliest(probabilities, names, top), strict=True):
            row["top"] = likeliest
    return said


def _says_more(got: str) -> ModelError:
    return ModelError(
        "this model says more than one thing of an input", where="predict", got=got,
        expected="(B, K) logits or (B,) numbers", fix="run.model() gives the model to call yourself",
    )  # fmt: skip


def _check(name: str, got: object, holds: bool, expected: str) -> None:
    if not holds:
        raise SettingsError("this cannot be predicted with", where=f"Predictor({name}=…)", got=got, expected=expected)
