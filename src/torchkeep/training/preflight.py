"""Preflight: what mostly is a mistake, found before it costs a night; afterwards all is as it was, bit for bit."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..contracts import Json
from ..errors import PreflightError
from ..generators import seed_all
from ..model.untouched import untouched
from .checks import QUICK, disk
from .optim import Optimizers
from .prepare import Prepared
from .subject import Finding, Subject
from .trials import TRIALS

Level = Literal["quick", "full", "off"]

_LEAST_S, _MOST_S, _SHARE = 1.0, 10.0, 0.02
_MOST_ROWS = 16
_PASSES = 12  # forwards that the quick checks take at most, a backward counted as two
_TRIAL_S = 10.0
_WITHOUT_FORWARD = {"optimiser", "labels", "inputs", "disk"}
_FORWARDS = dict.fromkeys(_WITHOUT_FORWARD, 0)
_FORWARDS |= {"direction": 1, "sequence": 2, "evaluation repeats": 2, "samples apart": 3}
_FIRST_PASS = 3  # forward and backward, which the other checks look at
_BYTES_PER_S = 1e9  # at which memory for gradients comes from the system


@dataclass(frozen=True)
class Report:
    """What was found, check by check, in how long, seconds; ``budget_s`` is what there was for it."""

    level: Level
    findings: tuple[Finding, ...]
    seconds: float
    budget_s: float | None = None

    @property
    def blamed(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.is_blamed]

    def to_json(self) -> Json:
        return {"level": self.level, "seconds": self.seconds, "findings": [vars(finding) for finding in self.findings]}


def preflight(prepared: Prepared, level: Level, place: Path | None = None) -> Report:
    """Look a prepared training over. ``place`` is the run's folder to be.

    "quick" takes 2 % of the estimated time, at least 1 s and at most 10 s; a step of the user's own is not called by
    it, for it may keep what it sees. "full" also trains a little, and puts everything back.
    """
    began = time.perf_counter()
    checks: dict[str, Callable[[Subject], Finding]] = {"disk": partial(disk, place=place), **QUICK}
    budget_s = None if level == "full" else _budget_s(prepared)
    subject = Subject(prepared, _rows(prepared, budget_s))
    findings = []
    with _all_kept(prepared, is_trained=False):
        for name, check in checks.items():
            why = "" if budget_s is None else _hindrance(subject, name, began + budget_s)
            findings.append(Finding(name, "skipped", why) if why else _checked(subject, name, check))
    if level == "full":
        for name, check in TRIALS.items():
            with _all_kept(prepared, is_trained=True):
                findings.append(_checked(subject, name, check))
    return Report(level, tuple(findings), time.perf_counter() - began, budget_s)


def _budget_s(prepared: Prepared) -> float:
    estimated_s = 3 * prepared.first_forward_s * prepared.total_steps
    return max(_LEAST_S, min(_SHARE * estimated_s, _MOST_S))


def _rows(prepared: Prepared, budget_s: float | None) -> int:
    """So many samples that what is to be done with them takes half of the time, as far as the first forward tells."""
    one_s = prepared.first_forward_s / prepared.work.batch_size
    if budget_s is None or not one_s:
        return _MOST_ROWS
    return max(2, min(_MOST_ROWS, int(budget_s / (2 * _PASSES * one_s))))


def _hindrance(subject: Subject, name: str, deadline: float) -> str:
    """What keeps a quick check from being made; empty for nothing."""
    if subject.work.step is not None and name not in _WITHOUT_FORWARD:
        return "a step of your own may keep what it sees: --preflight full calls it"
    is_first = name not in _FORWARDS and "first_pass" not in vars(subject)
    needed_s = _FORWARDS.get(name, _FIRST_PASS * is_first) * subject.forward_s
    needed_s += is_first * subject.num_learning_bytes / _BYTES_PER_S
    return "no time" if time.perf_counter() + needed_s > deadline else ""


def _checked(subject: Subject, name: str, check: Callable[[Subject], Finding]) -> Finding:
    began = time.perf_counter()
    subject.deadline = began + _TRIAL_S
    seed_all(subject.work.settings.seed)
    try:
        found = check(subject)
    except NotImplementedError:  # a container of models, which a step of the user's own calls one by one
        found = Finding("", "skipped", "the model has no forward of its own")
    except Exception as problem:  # whatever a model's code may raise: the training will say it in its own words
        said = f"{type(problem).__name__}: {str(problem).strip().partition(chr(10))[0][:200]}"
        why = "a step of your own asks the model in its own way" if subject.work.step is not None else ""
        found = Finding("", "skipped", why or f"it could not be looked at: {said}")
    return replace(found, check=name, seconds=time.perf_counter() - began)


@contextlib.contextmanager
def _all_kept(prepared: Prepared, is_trained: bool) -> Iterator[None]:
    """Whatever has a memory is as it was afterwards: model, loss, step, optimisers, generators."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(untouched(prepared.work.model, parameters=is_trained))
        for part in prepared.objects.values():
            stack.enter_context(untouched(part, parameters=is_trained) if isinstance(part, nn.Module) else _kept(part))
        if is_trained:
            stack.enter_context(_optimizers_kept(prepared.optimizers))
        yield


@contextlib.contextmanager
def _kept(part: Any) -> Iterator[None]:
    before = copy.deepcopy(part.state_dict())
    try:
        yield
    finally:
        part.load_state_dict(before)


@contextlib.contextmanager
def _optimizers_kept(optimizers: Optimizers) -> Iterator[None]:
    """States and options; the tensors that a state holds are copied, for an update writes into them."""
    held = [
        (o, {key: _copied(value) for key, value in o.state.items()}, [dict(group) for group in o.param_groups])
        for o in optimizers.by_name.values()
    ]
    try:
        yield
    finally:
        for optimizer, state, groups in held:
            optimizer.state.clear()
            optimizer.state.update(state)
            for group, before in zip(optimizer.param_groups, groups, strict=True):
                group.clear()
                group.update(before)


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return value.clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)


def refuse_errors(findings: Sequence[Finding]) -> None:
    """End here where nothing can be learned.

    Raises:  PreflightError for the first "error" among the findings
    """
    for finding in findings:
        if finding.verdict == "error":
            raise PreflightError(
                "this training would come to nothing", where=f"preflight: {finding.check}", got=finding.found,
                expected=finding.expected, fix=f"{finding.fix}; --preflight off begins all the same",
            )  # fmt: skip
