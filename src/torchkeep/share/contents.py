"""What of a run goes into its package: the model by name or as a graph, its contract, calibrated, and its origin."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..contracts import Json
from ..data.dataset import whole
from ..folder import RunFolder
from ..keep.checkpoint import Checkpoints, Saved
from ..model.build import NO_WEIGHTS
from ..model.hub import is_hub_name, placed
from ..training.binding import Binding
from ..training.prepare import Prepared
from ..training.recipe import Recipe
from ..usercode import is_reference, read_reference
from .architecture import coded, registered
from .calibration import calibrated
from .contract import Asked, contract_of
from .origin import origin_of
from .package import Contents

_MOST_CALIBRATED = 20_000  # samples: more change the third digit of one number


def contents_of(
    prepared: Prepared, recipe: Recipe | None, base: Path, folder: RunFolder, saved: Saved, model: nn.Module,
    weights: str | None = None,
) -> Contents:  # fmt: skip
    """A package's contents from one checkpoint of a run; ``weights`` are left out where the model still has them."""
    contract = contract_of(prepared, recipe.data if recipe is not None else None)
    loader = prepared.valid or prepared.loader
    example = loader.peek()
    contract = replace(contract, calibration=_calibration(prepared, Asked(model, contract, prepared.device)))
    if callable(contract.inputs):
        model, contract = _Whole(model, contract.inputs), replace(contract, inputs=None)
    epoch = Checkpoints(folder.checkpoints).load_part(saved, "clock")["epoch"]
    metrics = {"step": saved.step, "epoch": epoch, "values": dict(saved.metrics)}
    form = _form_of(prepared, recipe, base, model) if recipe is not None else None
    rename = recipe.model.rename if recipe is not None else {}
    return Contents(
        folder.name, model.cpu(), contract, example, form, metrics, origin_of(folder, saved), weights, rename
    )


def base_of(recipe: Recipe | None, base: Path) -> str | None:
    """The weights that a recipe's model began with; None where it was drawn."""
    if recipe is None or recipe.model.weights == NO_WEIGHTS:
        return None
    if recipe.model.weights is not None:
        return placed(recipe.model.weights, base)
    return placed(recipe.model.name, base) if is_hub_name(recipe.model.name) else None


def _form_of(
    prepared: Prepared, recipe: Recipe, base: Path, model: nn.Module
) -> tuple[dict[str, Json], dict[str, bytes]] | None:
    cardinalities = getattr(whole(prepared.work.train), "cardinalities", ())
    if is_reference(recipe.model.name):
        return coded(read_reference(recipe.model.name, base), recipe.model, cardinalities, model)
    return registered(recipe.model, cardinalities, model)


class _Whole(nn.Module):
    """A model with the function that makes its arguments of a batch, as one."""

    def __init__(self, model: nn.Module, inputs: Any):
        super().__init__()
        self.model, self._inputs = model, inputs

    def forward(self, **batch: Tensor) -> Any:
        return Binding(self.model, batch, (), self._inputs, ()).call(batch)


def _calibration(prepared: Prepared, asked: Asked) -> Json:
    """The temperature that fits the validation split; empty where there is none, or no probabilities."""
    data, target = prepared.work.valid, asked.contract.target
    is_one = len(asked.contract.schema.targets) == 1 and target is not None and target.kind in ("label", "multilabel")
    if data is None or not is_one or asked.contract.loss not in ("cross_entropy", "binary_cross_entropy"):
        return {}
    logits, labels, count = [], [], 0
    with contextlib.closing(prepared.evaluation_loader(data)) as loader:
        for batch in loader:
            logits.append(asked(batch))
            labels.append(torch.as_tensor(batch[asked.contract.schema.targets[0]]).cpu())
            count += len(labels[-1])
            if count >= _MOST_CALIBRATED:
                break
    found = calibrated(torch.cat(logits), torch.cat(labels), asked.contract.loss)
    return {**found, "split": "valid"} if found else {}
