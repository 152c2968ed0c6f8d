"""How a model is asked and what its answers mean: all that whoever uses it needs to know beside the model itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import gradients
from ..contracts import Batch, Field, Json, Schema
from ..data.readers import Reader
from ..data.sources import DataSettings
from ..errors import ModelError
from ..generators import kept_generators
from ..model.freeze import evaluating
from ..settings import check
from ..training.binding import Binding, Inputs, batch_text
from ..training.contract import misfit, schema_text
from ..training.device import Mover, autocast, default_device, existing_device
from ..training.objective import prediction_of
from ..training.prepare import Prepared


@dataclass(frozen=True)
class Contract:
    """What a model was trained to take and to say.

    ``reader`` turns files, tables and tensors into batches; its schema has the shapes, types and classes. ``loss`` is
    the name of the loss, which tells what an output means: "cross_entropy" of classes, "binary_cross_entropy" of yes or
    no, "mse" of numbers. ``inputs`` are the keys that go to the model, or a function batch → args; None: found by name.
    ``calibration`` says how the temperature was found, by which logits are divided before they are probabilities.
    """

    reader: Reader
    loss: str = ""
    inputs: Inputs | None = None
    precision: str = "fp32"
    batch_size: int = 32
    calibration: Json = field(default_factory=dict)

    @property
    def schema(self) -> Schema:
        """What the samples hold, with the classes."""
        return self.reader.schema

    @property
    def target(self) -> Field | None:
        """What is predicted."""
        return next((self.schema[name] for name in self.schema.targets), None)

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes' names; empty where numbers are predicted."""
        return self.target.classes if self.target is not None else ()

    @property
    def temperature(self) -> float:
        """By which logits are divided: Guo et al. 2017, "On calibration of modern neural networks", section 4.2."""
        return float(self.calibration.get("temperature", 1.0))


class Asked:
    """A model with its contract, on a device: ``asked(batch)`` → the outputs, float32 on the CPU.

    The model is moved to the device, and its modes and gradients are left as they were.

    Shapes:  batch as the reader gives it, images uint8 (B, C, H, W) → (B, K), (B,) or what the model gives
    Raises:  ModelError for a batch that the model does not take, showing both; SettingsError for a device that is not
             there
    """

    def __init__(self, model: nn.Module, contract: Contract, device: str | torch.device | None = None):
        self.contract = contract
        named = existing_device(str(device), f"device = {str(device)!r}") if device is not None else None
        self.device = named or default_device()[0]
        self.model = model.to(self.device)
        self.mover = Mover(self.device, contract.schema)
        self._call: Callable[[Batch], Any] | None = None

    def __call__(self, batch: Batch) -> Tensor:
        with kept_generators(), evaluating(self.model), gradients.none_needed():
            return self.forward(batch).float().cpu()

    def forward(self, batch: Batch) -> Tensor:
        """The prediction as the model gives it, on the device."""
        call = self._bound(batch)
        got, expected = misfit(self.contract.schema, batch, like_first=False)
        if got:
            raise ModelError("this batch is not as the model was made for", where=type(self.model).__name__, got=got,
                             expected=expected)  # fmt: skip
        try:
            with autocast(self.contract.precision, self.device):
                output = prediction_of(call(self.mover(batch)))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, LookupError, ModelError) as error:
            raise self._misfit(batch, error) from error
        if not isinstance(output, Tensor):
            raise ModelError("this model gives no tensor", where=type(self.model).__name__, got=type(output).__name__,
                             expected="a tensor, .logits, or a tuple that begins with one")  # fmt: skip
        return output

    def _bound(self, batch: Batch) -> Callable[[Batch], Any]:
        if self._call is None:
            schema = self.contract.schema
            inputs = {name: batch[name] for name in batch if name not in schema.targets}
            self._call = Binding(self.model, inputs, (), self.contract.inputs, ()).call
        return self._call

    def _misfit(self, batch: Batch, error: Exception) -> ModelError:
        taken = schema_text(self.contract.schema)
        said = str(error).strip().partition("\n")[0][:200]
        return ModelError(
            "the model cannot take this batch", where=type(self.model).__name__,
            got=f"{batch_text(batch)} ({type(error).__name__}: {said})", expected=taken or "what it was trained on",
        )  # fmt: skip


def contract_of(prepared: Prepared, settings: DataSettings | None) -> Contract:
    """The contract of a run's model; ``settings`` are the recipe's, None where there is none."""
    work = prepared.work
    reader = Reader(work.train, settings or check(DataSettings, {"train": ""}, "data"))
    return Contract(reader, prepared.objective.name, work.inputs, prepared.precision, work.batch_size)
