"""What the steps leave on the device: the same log points whenever it is read."""

from __future__ import annotations

import random

import pytest
import torch

from torchkeep.errors import NonFiniteLossError
from torchkeep.training.step import StepResult
from torchkeep.training.window import LogPoint, Window


def result(step: int, dtype: torch.dtype = torch.float32) -> StepResult:
    extras = {"norm": torch.tensor(step * 2.0, dtype=dtype), "plain": float(step)} if step % 3 else None
    return StepResult(torch.tensor(1 / step), step % 4 + 1, extras)


def log_points(reads: set[int], marks: set[int], last: int = 40) -> tuple[list[LogPoint], Window]:
    window, found = Window(), []
    for step in range(1, last + 1):
        window.add(result(step), [torch.tensor([step])])
        if step in marks:
            window.mark({"step": step}, {"rate": step / 10})
        if step in reads:
            found += window.read(step, wait=step % 2 == 0)
    return found + window.read(last), window


def test_when_it_is_read_changes_nothing() -> None:
    marks = {3, 4, 17, 30}
    wanted, rest = log_points({40}, marks)
    draws = random.Random(0)
    for _ in range(20):
        found, window = log_points(set(draws.sample(range(1, 41), 12)), marks)
        assert found == wanted
        assert window.state_dict() == rest.state_dict()
    assert [point.clock["step"] for point in wanted] == sorted(marks)
    first = wanted[0]
    assert first.samples == 2 + 3 + 4
    assert first.loss_sum == pytest.approx(2 + 3 / 2 + 4 / 3)
    assert first.extras == {"norm": 3.0, "plain": 1.5}
    assert first.rates == {"rate": 0.3}
    assert rest.num_waits == 0


def test_a_window_goes_on_where_its_state_was_taken() -> None:
    wanted, _ = log_points({40}, {25})
    _, window = log_points({20}, set(), last=20)
    again = Window()
    again.load_state_dict(window.state_dict())
    for step in range(21, 41):
        again.add(result(step), [torch.tensor([step])])
        if step == 25:
            again.mark({"step": 25}, {"rate": 2.5})
    assert again.read(40) == wanted


def test_the_first_bad_step_is_named_with_its_samples() -> None:
    window = Window()
    for step in range(1, 11):
        loss = torch.tensor(float("nan") if step in (7, 9) else 1.0)
        window.add(StepResult(loss, 1), [torch.tensor([100 + step])])
    with pytest.raises(NonFiniteLossError) as error:
        window.read(10)
    assert (error.value.where, error.value.got) == ("step 7", "samples 107")


def test_numbers_of_several_types_share_the_way() -> None:
    window = Window()
    window.add(StepResult(torch.tensor(0.25, dtype=torch.bfloat16), 1, {"n": torch.tensor(1 << 40)}), [])
    window.mark({"step": 1}, {})
    (point,) = window.read(1)
    assert (point.loss_sum, point.extras) == (0.25, {"n": float(1 << 40)})
