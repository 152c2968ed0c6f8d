"""Predictions in the inputs' order: files, folders, tables, datasets or tensors through a trained model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import gradients
from ..contracts import INDEX, Batch, Field
from ..data.foreign import as_dataset
from ..data.generators import kept_generators
from ..data.inputs import InputBatch, input_batches
from ..data.sources import DataSettings
from ..errors import ModelError
from ..model.freeze import evaluating
from ..training.device import autocast
from ..training.objective import prediction_of
from ..training.prepare import Prepared


@dataclass(frozen=True)
class Prediction:
    """What the model says of one input: a label with its probability, a number, or why it could not be read."""

    input: str
    label: str | None = None
    probability: float | None = None
    value: float | None = None
    error: str | None = None

    def row(self) -> dict[str, Any]:
        """Only what was said."""
        return {name: value for name, value in vars(self).items() if value is not None}


def predict_all(prepared: Prepared, inputs: Any, settings: DataSettings | None) -> Iterator[Prediction]:
    """A prediction for each input, in order.

    Raises:  DataError for a path that is not there, or of a kind that the model does not take; ModelError for a model
             that says more than one thing of an input
    """
    target = _target_of(prepared)
    if target is not None and target.kind in ("mask", "tokens"):
        raise _says_more(f"a {'class for each pixel' if target.kind == 'mask' else 'next token for each token'}")
    for part in _parts(prepared, inputs, settings):
        read = iter(_predict_batch(prepared, part.batch) if part.batch is not None else [])
        for position, name in enumerate(part.names):
            said = {"error": part.problems[position]} if position in part.problems else next(read)
            yield Prediction(name, **said)


def _predict_batch(prepared: Prepared, batch: Batch) -> list[dict[str, Any]]:
    model = prepared.work.model
    with (
        kept_generators(),
        evaluating(model),
        gradients.none_needed(),
        autocast(prepared.precision, prepared.device),
    ):
        output = prediction_of(prepared.binding.call(prepared.mover(batch))).float().cpu()
    return said_of(output, _target_of(prepared), prepared.objective.name)


def _target_of(prepared: Prepared) -> Field | None:
    schema = prepared.work.train.schema
    return next((schema[name] for name in schema.targets), None)


def said_of(output: Tensor, target: Field | None, loss: str = "") -> list[dict[str, Any]]:
    """Logits as labels with their probabilities, other outputs as numbers.

    Shapes:  output (B, K), (B, 1) or (B,); with the loss "binary_cross_entropy" each is the logit of two classes
    Raises:  ModelError for any other output
    """
    classes = target.classes if target is not None else ()
    is_binary = loss == "binary_cross_entropy"
    if output.ndim > 2 or (output.ndim == 2 and output.shape[1] > 1 and loss == "mse"):
        raise _says_more(f"outputs {tuple(output.shape)}")
    if output.ndim == 2 and (output.shape[1] > 1 or (target is not None and target.kind == "multilabel")) and is_binary:
        return [_several(row, classes or [str(i) for i in range(len(row))]) for row in output.sigmoid()]
    if output.ndim == 1 or output.shape[1] == 1:
        numbers = output.reshape(len(output))
        if not is_binary:
            return [{"value": float(value)} for value in numbers]
        output = torch.stack([torch.zeros_like(numbers), numbers], 1)  # their softmax is the logit's sigmoid
    best = output.softmax(1).max(1)
    return [
        {"label": classes[i] if i < len(classes) else str(i), "probability": float(p)}
        for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def _says_more(got: str) -> ModelError:
    return ModelError(
        "this model says more than one thing of an input", where="predict", got=got,
        expected="(B, K) logits or (B,) numbers", fix="run.model() gives the model to call yourself",
    )  # fmt: skip


def _several(probabilities: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """The classes above one half, joined by "|"; the probability is that of the least sure decision."""
    chosen = [name for name, p in zip(classes, probabilities.tolist(), strict=True) if p > 0.5]
    return {"label": "|".join(chosen), "probability": float((probabilities - 0.5).abs().min() + 0.5)}


def _parts(prepared: Prepared, inputs: Any, settings: DataSettings | None) -> Iterator[InputBatch]:
    if isinstance(inputs, str | Path):
        inputs = [inputs]
    if isinstance(inputs, Sequence) and inputs and all(isinstance(item, str | Path) for item in inputs):
        paths = [Path(item) for item in inputs]
        yield from input_batches(paths, prepared.work.train, settings, prepared.work.batch_size)
        return
    if isinstance(inputs, Tensor | np.ndarray):
        yield from _tensor(prepared, torch.as_tensor(inputs))
        return
    loader = prepared.evaluation_loader(as_dataset(inputs))
    try:
        for batch in loader:
            yield InputBatch([str(int(i)) for i in batch[INDEX]], batch, {})
    finally:
        loader.close()


def _tensor(prepared: Prepared, inputs: Tensor) -> Iterator[InputBatch]:
    key = next(iter(prepared.work.train.schema.inputs), "input")
    for start, part in enumerate(torch.split(inputs, prepared.work.batch_size)):
        first = start * prepared.work.batch_size
        names = [str(first + i) for i in range(len(part))]
        yield InputBatch(names, {key: part, INDEX: torch.arange(len(part))}, {})
