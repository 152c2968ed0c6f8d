"""Law 5: frozen is frozen: parameters, statistics, mode, decay, averages. A resume across an unfreezing is exact."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from exact import all_of
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import torchkeep as tk
from torchkeep.errors import RunFailedError
from torchkeep.training.step import Stepper
from torchkeep.watch.records import kept_records

X = torch.randn(45, 6, generator=torch.Generator().manual_seed(1))
Y = (X[:, :3].sum(1) > X[:, 3:].sum(1)).long()
DATA, VALID = TensorDataset(X, Y), TensorDataset(X[:20], Y[:20])
FROZEN = ("body.", "tied.")


class Net(nn.Module):
    """A body with statistics, dropout and a weight that two layers share, and a head with dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 8))
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.body[4].weight
        self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.tied(self.body(x)).tanh())
        return logits


def bits(tensors: dict[str, Tensor], parts: tuple[str, ...] = FROZEN) -> dict[str, bytes]:
    return {name: t.detach().numpy().tobytes() for name, t in tensors.items() if name.startswith(parts)}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHKEEP_CACHE", str(tmp_path / "cache"))


@contextlib.contextmanager
def interrupted(number: int | None) -> Iterator[None]:
    """A Ctrl-C at the beginning of the ``number``-th step."""
    whole, calls = Stepper.__call__, iter(range(1, 99))

    def call(self: Stepper, batches: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGINT)
        return whole(self, batches)

    with mock.patch.object(Stepper, "__call__", call):
        yield


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)


def noisy_step(model: nn.Module, batch: dict[str, Tensor], context: Any) -> dict[str, Tensor]:
    model.train(context.training)  # as many a loop does at every step
    output = model(batch["input"])
    return {"loss": F.cross_entropy(output, batch["target"]), "output": output, "target": batch["target"]}


SGD = {"name": "sgd", "weight_decay": 0.1, "fused": True, "schedule": "one_cycle"}
BODY = {"modules": ["body", "tied"], "rate_scale": 0.3}
GRADUAL = {
    "all_but_head": True,
    "head": "head",
    "stages": [{"modules": ["body[3:]", "tied"], "at_step": 1}, {"modules": ["body"], "at_step": 4, "rate_scale": 0.1}],
}
CASES: dict[str, dict[str, Any]] = {
    "at an epoch": {"freeze": {**BODY, "unfreeze_at_epoch": 1}, "settings": {"train": {"clip_norm": 0.5}}},
    "computed once": {"freeze": {"lp_ft": 1, "head": "head"}, "settings": {"features": {"cache": "on"}}},
    "at a step": {"freeze": {**BODY, "unfreeze_at_step": 2}, "settings": {"train": {"ema": 0.8}, "optimizer": SGD}},
    "gradual": {"freeze": GRADUAL, "settings": {"train": {"swa": 1}, "optimizer": SGD}},
    "accumulate": {"freeze": {**BODY, "unfreeze_at_step": 3}, "settings": {"train": {"accumulate": 2, "ema": 0.8}}},
    "scaler": {"freeze": {"lp_ft": 1, "head": "head"}, "settings": {"train": {"precision": "fp16"}}},
    "own optimiser": {"freeze": {"modules": ["body", "tied"], "unfreeze_at_epoch": 1}, "optimizer": momentum,
                      "step": noisy_step},
    "normalisation": {"freeze": {**BODY, "unfreeze_at_step": 2, "normalisation": "learn", "layer_decay": 0.7}},
    "adapters": {"freeze": {"adapters": {"targets": ["body.0"], "r": 2, "dropout": 0.2}, "head": "head",
                            "unfreeze_at_epoch": 1}},
}  # fmt: skip

WHEN: dict[str, list[tuple[int, int]]] = {
    "at an epoch": [(3, 1)], "computed once": [(3, 1)], "at a step": [(2, 0)], "gradual": [(1, 0), (4, 1)],
    "accumulate": [(3, 1)], "scaler": [(3, 1)], "own optimiser": [(3, 1)], "normalisation": [(2, 0)],
    "adapters": [(3, 1)],
}  # fmt: skip
"""The step and the epoch of each unfreezing."""


def fit(case: dict[str, Any], folder: Path, stop_at: int | None = None, model: nn.Module | None = None) -> tk.Run:
    """Two epochs of three batches, or what ``case`` says; a checkpoint at every second step."""
    torch.manual_seed(0)
    model = model or Net()
    settings = {"features": {"cache": "off"}, **case.get("settings", {})}  # "auto" measures: two runs may not be alike
    settings["train"] = {"threads": 1, **settings.get("train", {})}
    given = {"epochs": 2, "batch_size": 15, **{key: value for key, value in case.items() if key != "settings"}}
    with interrupted(stop_at):
        return tk.fit(
            model, DATA, VALID, run_dir=folder, resume="auto", quiet=True, settings=settings,
            checkpoint={"every": 2, "keep_last": 9}, monitor={"views": [], "log_every": 2}, **given,
        )  # fmt: skip


def maps_of(folder: Path) -> list[Any]:
    rows = kept_records(folder / "records.jsonl", ["trainable_map"])
    return [(row["step"], row["epoch"], [{**part, "time_fraction": None} for part in row["rows"]]) for row in rows]


@pytest.mark.parametrize("name", CASES)
def test_a_resume_at_every_step_across_an_unfreezing_is_exact(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    if name == "adapters":
        pytest.importorskip("peft", reason="peft is not installed")
    run = fit(case, tmp_path / "whole")
    wanted, maps = all_of(run.dir), maps_of(run.dir)
    assert [(step, epoch) for step, epoch, _ in maps] == [(0, 0), *WHEN[name]]
    for number in range(1, 5 if name == "accumulate" else 7):
        folder = tmp_path / f"stopped-{number}"
        with pytest.raises(tk.Interrupted, match="the state is saved"):
            fit(case, folder, number)
        resumed = fit(case, folder)
        assert all_of(resumed.dir) == wanted
        assert resumed.sha256("best") == run.sha256("best")
        assert maps_of(folder) == maps


@pytest.mark.parametrize("train", [{}, {"ema": 0.8}, {"swa": 1}, {"accumulate": 2}], ids=str)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "own"])
def test_no_bit_of_the_frozen_part_changes(train: dict[str, Any], optimizer: str, tmp_path: Path) -> None:
    model = Net()
    before = bits(model.state_dict())
    settings: dict[str, Any] = {"train": train}
    case = {"freeze": {"modules": ["body", "tied"]}, "settings": settings, "epochs": 3, "step": noisy_step}
    if optimizer == "own":
        case["optimizer"] = momentum
    else:
        settings["optimizer"] = {"name": optimizer, "weight_decay": 0.5, "decay": "all", "learning_rate": 0.1}
    head = bits(model.state_dict(), ("head.",))
    run = fit(case, tmp_path / "run", model=model)
    assert bits(model.state_dict()) == before
    assert bits(run.model().state_dict()) == before
    after = bits(model.state_dict(), ("head.",))
    assert all(after[name] != head[name] for name in head)
    for path in tk.Checkpoints(run.dir / "checkpoints").steps():
        state = tk.Checkpoints(run.dir / "checkpoints").load(path)
        assert bits(state["model"]) == before
        average = bits(state["optimizer"]["average"] or {})
        assert average == {name: before[name] for name in average}


def test_after_the_unfreezing_everything_learns_and_statistics_move(tmp_path: Path) -> None:
    model = Net()
    before = bits(model.state_dict())
    fit(CASES["at an epoch"], tmp_path / "run", model=model)
    after = bits(model.state_dict())
    assert [name for name in before if before[name] == after[name]] == []
    assert all(p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("optimizer", ["sgd", lambda model: torch.optim.SGD([
    {"params": [*model.body.parameters(), model.tied.bias]}, {"params": model.head.parameters()}], lr=1e-3)],
    ids=["name", "object"])  # fmt: skip
def test_rates_are_scaled_once_however_the_optimiser_is_made(optimizer: Any, tmp_path: Path) -> None:
    freeze = {**BODY, "unfreeze_at_epoch": 1}
    run = fit({"freeze": freeze, "optimizer": optimizer, "schedule": "linear"}, tmp_path / "run")
    checkpoints = tk.Checkpoints(run.dir / "checkpoints")
    state = checkpoints.load(checkpoints.steps()[-1])
    rates = [group["initial_lr"] for group in state["optimizer"]["optimizers"]["main"]["param_groups"]]
    assert sorted(set(rates)) == pytest.approx([3e-4, 1e-3])


def test_without_the_section_nothing_is_different(tmp_path: Path) -> None:
    run = fit({}, tmp_path / "run")
    checkpoints = tk.Checkpoints(run.dir / "checkpoints")
    state = checkpoints.load(checkpoints.steps()[-1])
    assert state["freeze"] is None
    assert [len(group["params"]) for group in state["optimizer"]["optimizers"]["main"]["param_groups"]] == [3, 8]
    assert maps_of(run.dir) == []


def test_the_models_of_a_run_learn_again(tmp_path: Path) -> None:
    model = Net()
    run = fit({"freeze": {"modules": ["body", "tied"]}}, tmp_path / "run", model=model)
    for one in (model, run.model().train()):
        assert all(p.requires_grad for p in one.parameters())
        assert all(module.training for module in one.modules())


def test_code_that_writes_to_the_frozen_part_is_found(tmp_path: Path) -> None:
    def writing(model: Any, batch: dict[str, Tensor], context: Any) -> dict[str, Tensor]:
        if context.step == 4:
            model.body[1].running_mean += 1e-3
        return noisy_step(model, batch, context)

    model = Net()
    case = {"freeze": {"modules": ["body", "tied"]}, "step": writing}
    with pytest.raises(RunFailedError, match=r"a frozen tensor has changed\n.*body\.1\.running_mean"):
        fit(case, tmp_path / "run", model=model)
    saved = tk.Checkpoints(tmp_path / "run" / "checkpoints").latest()
    assert saved is not None
    assert saved.step == 4  # what the epoch ended with is not kept


def test_what_failed_before_it_began_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = Net()
    case = {"freeze": {"modules": ["body", "tied"]}, "settings": {"optimizer": {"name": "sdg"}}}
    with pytest.raises(tk.TorchkeepError, match="no such optimiser"):
        fit(case, tmp_path / "run", model=model)
    assert all(p.requires_grad for p in model.parameters())
    assert all("train" not in vars(module) for module in model.modules())


def test_an_unknown_part_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(tk.TorchkeepError, match="did you mean 'body'"):
        fit({"freeze": {"modules": ["bodi"]}}, tmp_path / "run")
    assert not (tmp_path / "run").exists()
