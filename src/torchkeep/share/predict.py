"""Predictions in the inputs' order: files, folders, tables, datasets or tensors through a trained model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import gradients
from ..contracts import INDEX, Batch, Field
from ..data.decode import decode_image, resize_short_side_and_center_crop
from ..data.foreign import as_dataset, kept_generators
from ..data.images import IMAGE_SUFFIXES, encoded_images, read_image_file
from ..data.sources import DataSettings
from ..data.tables import PARQUET, column_names, encode_inputs, read_frame
from ..errors import BadSampleError, DataError
from ..model.freeze import evaluating
from ..training.device import autocast
from ..training.objective import prediction_of
from ..training.prepare import Prepared

_TABLES = (".csv", ".tsv", *PARQUET)


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


Part = tuple[list[str], Batch | None, dict[int, str]]
"""Names of some inputs, their batch (of those that can be read), and what is wrong with the others, by position."""


def predict_all(prepared: Prepared, inputs: Any, settings: DataSettings | None) -> Iterator[Prediction]:
    """A prediction for each input, in order.

    Raises:  DataError for a path that is not there, or of a kind that the model does not take
    """
    for names, batch, problems in _parts(prepared, inputs, settings):
        read = iter(_predict_batch(prepared, batch) if batch is not None else [])
        for position, name in enumerate(names):
            said = {"error": problems[position]} if position in problems else next(read)
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
    schema = prepared.work.train.schema
    target = next((schema[name] for name in schema.targets), None)
    return said_of(output, target, is_binary=prepared.objective.name == "binary_cross_entropy")


def said_of(output: Tensor, target: Field | None, is_binary: bool = False) -> list[dict[str, Any]]:
    """Logits as labels with their probabilities, other outputs as numbers.

    Shapes:  output (B, K), (B, 1) or (B,); one logit for two classes where ``is_binary``
    """
    classes = target.classes if target is not None else ()
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


def _parts(prepared: Prepared, inputs: Any, settings: DataSettings | None) -> Iterator[Part]:
    if isinstance(inputs, str | Path):
        inputs = [inputs]
    if isinstance(inputs, Sequence) and inputs and all(isinstance(item, str | Path) for item in inputs):
        yield from _files(prepared, [Path(item) for item in inputs], settings)
        return
    if isinstance(inputs, Tensor | np.ndarray):
        yield from _tensor(prepared, torch.as_tensor(inputs))
        return
    loader = prepared.evaluation_loader(as_dataset(inputs))
    try:
        for batch in loader:
            yield [str(int(i)) for i in batch[INDEX]], batch, {}
    finally:
        loader.close()


def _tensor(prepared: Prepared, inputs: Tensor) -> Iterator[Part]:
    key = next(iter(prepared.work.train.schema.inputs), "input")
    for start, part in enumerate(torch.split(inputs, prepared.work.batch_size)):
        first = start * prepared.work.batch_size
        yield [str(first + i) for i in range(len(part))], {key: part, INDEX: torch.arange(len(part))}, {}


def _files(prepared: Prepared, paths: list[Path], settings: DataSettings | None) -> Iterator[Part]:
    """Runs of image files as batches, each table by itself."""
    waiting: list[Path] = []
    for path in list(_expanded(paths)):  # all of them are looked for before the first is read
        if path.suffix.lower() in _TABLES:
            yield from _image_files(prepared, waiting)
            waiting = []
            yield from _table(prepared, path, settings)
        else:
            waiting.append(path)
    yield from _image_files(prepared, waiting)


def _expanded(paths: list[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            images = sorted(found for found in path.rglob("*") if found.suffix.lower() in IMAGE_SUFFIXES)
            if not images:
                raise DataError(
                    "there are no images in this folder",
                    where=path,
                    expected=f"files that end in {', '.join(IMAGE_SUFFIXES)}",
                )
            yield from images
        elif path.is_file():
            yield path
        else:
            raise DataError("there is no such input", where=path, got="no such file or folder")


def _image_files(prepared: Prepared, paths: list[Path]) -> Iterator[Part]:
    yield from _images(prepared, ((str(path), partial(read_image_file, path, str(path))) for path in paths))


def _images(prepared: Prepared, encoded: Iterator[tuple[str, Callable[[], bytes]]]) -> Iterator[Part]:
    if not any(field.kind == "image" for field in prepared.work.train.schema.values()):
        first = next(encoded, None)
        if first is None:
            return
        raise DataError(
            "this model does not take images", where=first[0], got="a file", expected="a .csv or .parquet table"
        )
    names: list[str] = []
    images: list[np.ndarray[Any, Any]] = []
    problems: dict[int, str] = {}
    for name, read in encoded:
        try:
            images.append(_pixels(prepared, name, read()))
        except BadSampleError as error:
            problems[len(names)] = f"{error.what}: {error.got}"
        names.append(name)
        if len(names) == prepared.work.batch_size:
            yield names, _image_batch(prepared, images), problems
            names, images, problems = [], [], {}
    if names:
        yield names, _image_batch(prepared, images), problems


def _pixels(prepared: Prepared, name: str, data: bytes) -> np.ndarray[Any, Any]:
    seen = prepared.work.train.schema.preprocess
    assert seen is not None
    image = decode_image(data, name, seen.channels)
    if seen.image_size is not None:
        return resize_short_side_and_center_crop(image, seen.image_size)
    shape = next(field.shape for field in prepared.work.train.schema.values() if field.kind == "image")
    if shape is not None and shape[1:] != image.shape[:2]:
        raise BadSampleError(
            "this image has another size", where=name, got=f"{image.shape[:2]}", expected=f"{shape[1:]}"
        )
    return image


def _image_batch(prepared: Prepared, images: list[np.ndarray[Any, Any]]) -> Batch | None:
    if not images:
        return None
    schema = prepared.work.train.schema
    key = next(name for name, field in schema.items() if field.kind == "image")
    return {key: torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), INDEX: torch.arange(len(images))}


def _table(prepared: Prepared, path: Path, settings: DataSettings | None) -> Iterator[Part]:
    column = settings.image if settings else "image"
    takes_images = any(field.kind == "image" for field in prepared.work.train.schema.values())
    if takes_images and column in column_names(path):
        yield from _images(prepared, encoded_images(path, column))
        return
    encoding = getattr(prepared.work.train, "encoding", None)
    if encoding is None:
        raise DataError(
            "this model does not take this table",
            where=path,
            got=f"columns {', '.join(column_names(path)[:20])}",
            expected=f"a column {column!r} of images" if takes_images else "the kind of data it was trained on",
        )
    columns = encode_inputs(read_frame(path), encoding, str(path))
    size = prepared.work.batch_size
    total = len(next(iter(columns.values())))
    for start in range(0, total, size):
        batch: Batch = {name: values[start : start + size] for name, values in columns.items()}
        stop = min(start + size, total)
        yield [f"{path}, row {row}" for row in range(start, stop)], {**batch, INDEX: torch.arange(start, stop)}, {}
