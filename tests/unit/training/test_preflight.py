"""Preflight as a training meets it: what it says and where, what it costs, and that nothing is changed by it."""

from __future__ import annotations

import contextlib
import json
import random
import time
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchkeep as tk
from torchkeep.api import _work_of_objects
from torchkeep.errors import PreflightError, SettingsError
from torchkeep.model.untouched import untouched
from torchkeep.tensors import tensor_sha256
from torchkeep.training.checks import QUICK
from torchkeep.training.decisions import Decisions
from torchkeep.training.preflight import Report, preflight
from torchkeep.training.prepare import Prepared
from torchkeep.training.trials import TRIALS

LEVELS = ["quick", "full"]
NO_FOLDER = "no run folder was named"


class Net(nn.Module):
    """Whatever has a memory: statistics, dropout, a counter, a list and a tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 2))
        self.count, self.seen, self.last = 0, [0], torch.zeros(2)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.seen.append(self.count)
        self.last += 1
        return torch.as_tensor(self.layers(x))


def data(count: int = 64) -> tk.Arrays:
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(1))
    return tk.Arrays(input=x, label=(x[:, 0] > 0).long())


def fit(folder: Path, level: Any, **changed: Any) -> tuple[tk.Run, nn.Module]:
    torch.manual_seed(3)
    model = changed.pop("model", None) or Net()
    options = {"epochs": 2, "batch_size": 8, "workers": 0, "quiet": True, **changed}
    return tk.fit(model, data(), data(24), run_dir=folder, preflight=level, **options), model


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def generators() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("options", [{}, {"optimizer": momentum}, {"settings": {"train": {"ema": 0.9}}}], ids=str)
def test_a_training_ends_in_the_same_bits_with_it(level: str, options: dict[str, Any], tmp_path: Path) -> None:
    plain, _ = fit(tmp_path / "plain", "off", **options)
    looked, _ = fit(tmp_path / "looked", level, **options)
    assert plain.sha256() == looked.sha256()
    assert plain.metrics == looked.metrics


@pytest.mark.parametrize("level", LEVELS)
def test_model_and_generators_are_as_they_were(level: str) -> None:
    torch.manual_seed(3)
    model = Net()
    model.layers[0].weight.grad = gradient = torch.full((16, 4), 7.0)
    model.layers[3].eval()
    hooked = model.register_forward_hook(lambda *_: None)
    before, drawn = tensor_sha256(dict(model.state_dict())), generators()
    kept = [dict(vars(module)) for module in model.modules()]
    tk.preflight(model, data(), data(24), level=level, batch_size=8, epochs=1)
    assert (tensor_sha256(dict(model.state_dict())), generators()) == (before, drawn)
    assert model.layers[0].weight.grad is gradient
    assert bool((gradient == 7).all())
    assert (model.seen, model.count, model.last.tolist()) == ([0], 0, [0.0, 0.0])
    assert [module.training for module in model.modules()] == [row["training"] for row in kept]
    hooked.remove()


def test_optimizers_are_as_they_were() -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    model(torch.randn(4, 4)).sum().backward()
    optimizer.step()
    before = json.dumps(optimizer.state_dict(), default=lambda tensor: tensor.tolist())
    tk.preflight(model, data(), optimizer=optimizer, batch_size=8, epochs=1)
    assert json.dumps(optimizer.state_dict(), default=lambda tensor: tensor.tolist()) == before


def test_what_fails_meanwhile_leaves_the_model_as_it_was() -> None:
    model = Net()
    before = tensor_sha256(dict(model.state_dict()))

    def fail() -> None:
        with untouched(model, parameters=True):
            model(torch.randn(8, 4)).sum().backward()
            with torch.no_grad():
                model.layers[0].weight.add_(1)
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert tensor_sha256(dict(model.state_dict())) == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert (model.count, model.seen, model.last.tolist()) == (0, [0], [0.0, 0.0])


def test_the_quick_checks_are_named_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = fit(tmp_path / "run", "quick", quiet=False)
    said = capsys.readouterr().out
    kept = json.loads((run.dir / "run.json").read_text())["preflight"]
    names = [row["check"] for row in kept["findings"]]
    assert names == ["disk", *QUICK]
    assert all(name in said for name in names)
    assert {row["check"] for row in kept["findings"] if row["verdict"] != "passed"} == {"direction", "sequence"}


def test_full_makes_all_checks() -> None:
    found = tk.preflight(Net(), data(), data(24), batch_size=8)
    assert [finding.check for finding in found] == ["disk", *QUICK, *TRIALS]


def test_nothing_is_said_where_it_is_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = fit(tmp_path / "run", "off", quiet=False)
    assert "preflight" not in capsys.readouterr().out
    assert "preflight" not in json.loads((run.dir / "run.json").read_text())


def test_a_training_that_could_learn_nothing_does_not_begin(tmp_path: Path) -> None:
    with pytest.raises(PreflightError) as caught:
        fit(tmp_path / "run", "quick", loss=lambda output, target: nn.functional.cross_entropy(output.detach(), target))
    assert "loss attached" in caught.value.where
    assert ".detach()" in caught.value.fix
    assert not (tmp_path / "run").exists()


def test_a_warning_lets_it_begin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path / "run", "quick", model=nn.Sequential(nn.Linear(4, 2), nn.Softmax(-1)), quiet=True)
    assert "probabilities twice: the loss takes the softmax of what has been through softmax" in capsys.readouterr().out


def test_a_step_of_the_user_is_not_called_by_the_quick_one(tmp_path: Path) -> None:
    calls: list[int] = []

    def step(model: nn.Module, batch: dict[str, Any], context: Any) -> Tensor:
        calls.append(context.step)
        return nn.functional.cross_entropy(model(batch["input"]), batch["label"])

    fit(tmp_path / "run", "quick", step=step, epochs=1)
    assert [call for call in calls if call < 8] == list(range(8))  # then the evaluation, after step 8
    found = tk.preflight(Net(), data(), step=step, batch_size=8)
    assert next(finding for finding in found if finding.check == "gradients").verdict == "passed"


class Slow(nn.Module):
    """A model that takes its time for each sample."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.layer, self.seconds = nn.Linear(4, 2), seconds

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds * len(x))
        sizes.append(len(x))
        return torch.as_tensor(self.layer(x))


sizes: list[int] = []


def quick_report(model: nn.Module, count: int) -> Report:
    bound = signature(tk.fit).bind(model, data(count), batch_size=count, epochs=1)
    bound.apply_defaults()
    with contextlib.closing(Prepared(_work_of_objects(dict(bound.arguments)), Decisions())) as prepared:
        sizes.clear()
        return preflight(prepared, "quick")


def test_a_slow_model_is_asked_with_few_samples() -> None:
    report = quick_report(Slow(0.02), 32)
    # one step is expected to take 2 s: 2 % of it are less than the second that there is in any case
    assert report.budget_s == 1.0
    assert set(sizes) <= {1, 2}
    assert not report.blamed


def test_what_does_not_fit_into_the_time_is_left_out() -> None:
    report = quick_report(Slow(0.3), 2)  # 1.8 s for the first forward and backward
    verdicts = {finding.check: (finding.verdict, finding.found) for finding in report.findings}
    assert report.budget_s == 1.0
    assert verdicts["gradients"] == ("skipped", "no time")
    assert verdicts["optimiser"][0] == "passed"


@pytest.mark.parametrize("call", [lambda level: tk.preflight(Net(), data(), level=level),
                                  lambda level: tk.fit(Net(), data(), preflight=level)])  # fmt: skip
def test_a_level_that_is_none(call: Any) -> None:
    with pytest.raises(SettingsError, match="no such preflight"):
        call("thorough")
