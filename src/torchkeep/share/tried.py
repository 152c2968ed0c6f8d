"""An ejected script tried beside the run that it stands for, before it is written; and what it must say of a plan."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..contracts import INDEX, KeyedDataset
from ..generators import kept_generators
from ..training.prepare import Prepared
from .ejecting import refused


def frozen_by_step(prepared: Prepared) -> dict[int, list[str]]:
    """From which step on which parts are frozen, under the names of whole modules where that says it.

    Raises:  SettingsError where modes and gradients are not those of such parts
    """
    model, plan = prepared.work.model, prepared.plan
    found = {0: _frozen(model)}
    for (epoch, step), _ in plan.spans if plan is not None else []:
        if plan is not None and plan.advance(epoch, step):
            found[max(epoch * prepared.steps_per_epoch, step)] = _frozen(model)
    return found


def _frozen(model: nn.Module) -> list[str]:
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    names = covering(model, frozen)
    held = [name for name, module in model.named_modules() if name and not module.training]
    names += [
        name for name in held if not _within(name, [*names, *(n for n in held if n != name and _within(name, [n]))])
    ]
    is_same = all(p.requires_grad != _within(name, names) for name, p in model.named_parameters())
    if not is_same or any(module.training == _within(name, names) for name, module in model.named_modules()):
        raise refused("parts that are frozen whole", "freeze", ", ".join(names[:8]))
    return names


def covering(model: nn.Module, wanted: set[str]) -> list[str]:
    """The fewest modules, and else parameters, that together hold these parameters and no other."""
    found: list[str] = []

    def visit(prefix: str, module: nn.Module) -> None:
        for name, child in module.named_children():
            inside = [f"{prefix}{name}.{own}" for own, _ in child.named_parameters(remove_duplicate=False)]
            if inside and wanted.issuperset(inside):
                found.append(prefix + name)
            elif not wanted.isdisjoint(inside):
                visit(f"{prefix}{name}.", child)
        found.extend(prefix + name for name, _ in module.named_parameters(recurse=False) if prefix + name in wanted)

    visit("", model)
    return found


def _within(name: str, parts: list[str]) -> bool:
    return any(f"{name}.".startswith(f"{part}.") for part in parts)


def rates_of(prepared: Prepared) -> list[tuple[float, list[str]]]:
    """The parts that have groups of their own, with their rates, in the optimiser's order; none where there is one."""
    optimizer, settings = prepared.optimizers.main, prepared.work.settings.optimizer
    names = {id(p): name for name, p in prepared.work.model.named_parameters()}
    parts: list[tuple[float, list[str]]] = []
    before: Any = None
    for group in optimizer.param_groups:
        own = [names[id(p)] for p in group["params"] if id(p) in names]
        decay, rate = group.get("weight_decay"), float(group.get("initial_lr", group["lr"]))
        if before is not None and parts[-1][0] == rate and before > decay == 0:
            parts[-1][1].extend(own)
        else:
            parts.append((rate, own))
        before = decay
    if len(parts) == 1 and parts[0][0] == settings.learning_rate:
        return []
    return [(rate, covering(prepared.work.model, set(own))) for rate, own in parts]


def try_script(text: str, output: Path, beside: dict[str, bytes], prepared: Prepared) -> None:
    """Run the script up to its first step: its samples, batches, first weights and groups must be those of the run.

    Raises:  SettingsError naming the first thing that is not
    """
    with tempfile.TemporaryDirectory(prefix="torchkeep-", ignore_cleanup_errors=True) as place, kept_generators():
        for name, data in beside.items():
            Path(place, name).write_bytes(data)
        space: dict[str, Any] = {"__name__": "ejected", "__file__": str(output)}
        exec(compile(text, str(output), "exec"), space)  # noqa: S102 - what was put together here
        for name, value in list(space.items()):
            if isinstance(value, Path) and value.name in beside:
                space[name] = Path(place, value.name)
        _compare(space, prepared)


def _compare(space: dict[str, Any], prepared: Prepared) -> None:
    work, data = prepared.work, space["load"]()
    splits = {name: split for name in ("train", "valid", "test") if (split := getattr(work, name)) is not None}
    for name, dataset in splits.items():
        _compare_split(space, data, name, dataset, prepared)
    size, batch_size = len(work.train), work.batch_size
    for shuffle in (space[name] for name in ("shuffled", "shuffled_few") if name in space):
        order = shuffle(work.settings.seed, 0, size)
        if "bucketed" in space:
            order = space["bucketed"](work.settings.seed, 0, order, data["train"]["length"], batch_size)
        _same("the order of the samples", torch.from_numpy(order[:batch_size]), prepared.example[INDEX])
    model, optimizer = space["make_training"](data)
    own = work.model.state_dict()
    for name, value in model.state_dict().items():
        _same(f"the first weights of {name}", value, own.get(name))
    found = _groups(optimizer, model)
    if found != _groups(prepared.optimizers.main, work.model):
        raise refused("the groups of the run", "optimizer", f"{len(found)} groups of parameters")


def _groups(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[Any]:
    names = {id(p): name for name, p in model.named_parameters()}
    options = ("lr", "weight_decay", "betas", "eps", "momentum", "nesterov", "fused")
    return [[sorted(names.get(id(p), "") for p in group["params"]), *(group.get(key) for key in options)]
            for group in optimizer.param_groups]  # fmt: skip


def _compare_split(
    space: dict[str, Any], data: dict[str, Any], name: str, dataset: KeyedDataset, prepared: Prepared
) -> None:  # fmt: skip
    """The targets of all samples, and the first batch as the model gets it."""
    target = prepared.binding.targets[0]
    plain = getattr(dataset, "without_augmentation", lambda: dataset)()
    with contextlib.closing(prepared.evaluation_loader(plain)) as loader:
        batch = prepared.mover(loader.peek())
    if len(data[name][target]) != len(dataset):
        raise refused(
            f"the {len(dataset):,} samples of the run", f"data.{name}", f"{len(data[name][target]):,} samples"
        )
    labels = getattr(dataset, "labels", None)
    if labels is not None:
        _same(f"the labels of {name}", torch.from_numpy(np.asarray(data[name][target])), torch.from_numpy(labels))
    found = space["make_batch"](data[name], np.arange(len(batch[INDEX])))
    for key in (*prepared.binding.keys, target):
        _same(f"{key} of {name}", found.get(key), batch[key])


def _same(what: str, found: Tensor | None, expected: Tensor | None) -> None:
    """Raises:  SettingsError where two tensors are not equal in every bit"""
    is_same = found is not None and expected is not None and torch.equal(found.cpu(), expected.cpu())
    if not is_same:
        raise refused("what the run has", what, "other numbers, where plain code reads the same files")
