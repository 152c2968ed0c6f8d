"""The contract between data and model: what goes in and comes out, with types, classes and preprocessing.

It is part of every checkpoint and package. A batch that does not keep to it, or a run that would go on with another,
is an error that shows both.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..contracts import Batch, Field, Json, Schema
from ..errors import CheckpointError, ModelError, TorchkeepError
from ..model.flow import tensors
from .binding import batch_text

_FLOATING = ("audio", "number", "vector")
_WHOLE = ("tokens", "label", "multilabel")


def contract_json(schema: Schema, inputs: list[str], batch: Batch, output: Any) -> Json:
    """The contract as a checkpoint keeps it: the schema, each input's type, the outputs' types and shapes.

    An axis of any length, as the batch's, is None.
    """
    size = next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim), 0)
    return {
        "schema": schema.to_json(),
        "inputs": {name: _dtype(batch[name]) for name in inputs if isinstance(batch.get(name), Tensor)},
        "outputs": [
            {"dtype": _dtype(tensor), "shape": [None if not axis and length == size else length
                                                for axis, length in enumerate(tensor.shape)]}
            for tensor in tensors(output)
        ],
    }  # fmt: skip


def check_contract(saved: Json, now: Json, may_change: bool) -> None:
    """Compare the contract of a checkpoint with that of the run that would go on.

    Classes never change; shapes, types and preprocessing do where it was said that the data have changed.

    Raises:  CheckpointError showing both
    """
    for key, was, is_now, fix in _differences(saved, now):
        if key.startswith("classes") or not may_change:
            raise CheckpointError(
                "the checkpoint's model was made for other data", where=key, got=str(is_now)[:300],
                expected=str(was)[:300], fix=fix,
            )  # fmt: skip


def _differences(saved: Json, now: Json) -> list[tuple[str, Json, Json, str]]:
    found: list[tuple[str, Json, Json, str]] = []
    before, after = (Schema.from_json(contract["schema"]) for contract in (saved, now))
    for name in before:
        one, other = before[name], after.fields.get(name)
        if other is None or one.classes != other.classes:
            classes = other.classes if other is not None else "no such key"
            fix = "put the classes back in their order: the model's outputs are numbered by them"
            found.append((f"classes of {name}", one.classes, classes, fix))
        elif axes_text(one) != axes_text(other):
            found.append((f"shape of {name}", axes_text(one), axes_text(other), _ANEW))
    if before.preprocess != after.preprocess:
        found.append(("preprocessing", before.preprocess, after.preprocess, _ANEW))
    types = (
        (name, saved["inputs"][name], now["inputs"][name]) for name in saved["inputs"].keys() & now["inputs"].keys()
    )
    return found + [(f"type of {name}", was, is_now, _ANEW) for name, was, is_now in types if was != is_now]


_ANEW = "a new run with model.weights = this run's folder, or go on all the same: --allow-change data"


def misfit(
    schema: Schema, batch: Batch, types: dict[str, str] | None = None, *, like_first: bool = True
) -> tuple[str, str]:
    """The inputs of a batch that are not as the schema has them, in words, and what it has; empty where all fit.

    Only what is known is held against it: an axis that is fixed, whole numbers in place of floating ones. ``types``
    are those that the inputs had at first. A tensor of no kind is known by the first sample alone: its axes count where
    all should be ``like_first``.
    """
    known, names = types or {}, [n for n in schema.inputs if like_first or schema[n].kind != "tensor"]
    wrong = [name for name in names if name in batch and not _fits(schema[name], batch[name], known.get(name))]
    taken = (f"{name} {known.get(name, schema[name].kind)} {axes_text(schema[name])}" for name in wrong)
    return batch_text({name: batch[name] for name in wrong}), "; ".join(taken)


def _fits(field: Field, value: Any, dtype: str | None) -> bool:
    if not isinstance(value, Tensor):
        return True
    is_type = not (field.kind in _FLOATING and not value.is_floating_point())
    is_type &= not (field.kind in _WHOLE and value.is_floating_point())
    if dtype is not None and field.kind != "image":  # an image may come as it is stored, or normalised
        is_type &= value.is_floating_point() == ("float" in dtype)
    if field.shape is None or field.kind == "tokens":
        return is_type
    axes = value.shape[1:]
    return is_type and len(axes) == len(field.shape) and all(
        known is None or known == length for known, length in zip(field.shape, axes, strict=True)
    )  # fmt: skip


def refuse_misfit(error: Exception, contract: Json, batch: Batch, where: str) -> None:
    """Look whether an error of the model comes of a batch that does not keep to the contract.

    Raises:  ModelError showing both where it does not
    """
    got, expected = misfit(Schema.from_json(contract["schema"]), batch, contract["inputs"])
    if got and not isinstance(error, TorchkeepError):
        said = str(error).strip().partition("\n")[0][:200]
        raise ModelError(
            "a batch is not as the model was made for", where=where, got=f"{got} ({type(error).__name__}: {said})",
            expected=expected, fix="let every sample have the shape and type of the first, or collate= make them so",
        ) from error  # fmt: skip


def schema_text(schema: Schema) -> str:
    """The inputs in words: ``image image (B, 3, 64, 64)``."""
    return "; ".join(f"{name} {schema[name].kind} {axes_text(schema[name])}" for name in schema.inputs)


def axes_text(field: Field) -> str:
    """A field's axes, B for the batch's and … for one of any length."""
    sizes = ("B", *("…" if size is None else str(size) for size in field.shape or ("…",)))
    return f"({', '.join(sizes)})"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
