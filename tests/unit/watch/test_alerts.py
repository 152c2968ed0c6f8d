"""Alerts: planted troubles are said once, healthy courses never."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from torchkeep.watch.alerts import Alert, Alerts


def read(alerts: Alerts, losses: list[float], norms: list[float]) -> list[str]:
    found: list[Alert] = []
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        found += alerts.after_reading({"train/loss": loss, "train/gradient_norm": norm}, step)
    return [alert.name for alert in found]


def healthy() -> dict[str, tuple[list[float], list[float]]]:
    draws = random.Random(0)
    steps = range(400)
    noise = [math.exp(draws.gauss(0, 0.5)) for _ in steps]

    def noisy(norm: Any) -> list[float]:
        return [max(1e-12, noise[s] * norm(s)) for s in steps]

    return {
        "decay": ([2.3 * math.exp(-s / 80) for s in steps], noisy(lambda s: math.exp(-s / 200))),
        "converged": ([2.3 * math.exp(-s / 10) for s in steps], noisy(lambda s: math.exp(-s / 10))),
        "warm-up": ([2.3 - s / 300 for s in steps], noisy(lambda s: 3 * min(1, 0.01 + s / 100))),
        "oscillating": ([1 + math.sin(s / 9) / 2 for s in steps], noisy(lambda s: 1.5 + math.sin(s / 5))),
        "flat": ([0.7] * 400, noise),
    }


@pytest.mark.parametrize("name", healthy())
def test_healthy_courses_are_left_alone(name: str) -> None:
    assert read(Alerts(), *healthy()[name]) == []


def test_gradients_that_explode_are_said_once_until_they_were_well() -> None:
    flickers, again = [500.0, 1.0, 600.0, 1.0, 1.0, 700.0], [1.0] * 3 + [800.0]
    assert read(Alerts(), [1.0] * 36, [1.0] * 30 + flickers) == ["gradients explode"]
    assert read(Alerts(), [1.0] * 40, [1.0] * 30 + flickers + again) == ["gradients explode"] * 2
    assert read(Alerts(), [1.0], [1e7]) == ["gradients explode"]


def test_a_norm_that_is_no_number_is_said_where_the_next_is_none_either() -> None:
    assert read(Alerts(), [1.0] * 4, [math.inf, 1.0, math.nan, 1.0]) == []
    assert read(Alerts(), [1.0] * 3, [math.inf, math.nan, math.inf]) == ["gradients explode"]


def test_gradients_that_vanish_while_nothing_is_learned() -> None:
    assert read(Alerts(), [2.3] * 60, [10.0 * 0.5**s for s in range(60)]) == ["gradients vanish"]
    assert read(Alerts(), [2.3] * 10, [0.0] * 10) == ["gradients vanish"]
    assert read(Alerts(), [1e-5] * 10, [1e-10] * 10) == []


def row(train: float, valid: float | None = None) -> dict[str, Any]:
    return {"step": 200, "metrics": {"train/loss": train} | ({} if valid is None else {"valid/loss": valid})}


def test_what_the_epochs_say() -> None:
    alerts = Alerts()
    chance = math.log(10)
    assert [a.name for a in alerts.after_epoch([row(chance)], chance)] == ["loss at chance"]
    assert alerts.after_epoch([row(chance), row(chance)], chance) == []
    assert Alerts().after_epoch([row(2.0)], chance) == []
    assert Alerts().after_epoch([row(50.0)], None) == []
    assert Alerts().after_epoch([row(chance) | {"step": 10}], chance) == []
    leaving = [row(1.0, 0.9), row(0.8, 0.95), row(0.6, 1.0), row(0.4, 1.1)]
    assert [a.name for a in Alerts().after_epoch(leaving, None)] == ["validation leaves training"]
    assert Alerts().after_epoch(leaving[:3], None) == []
    assert (
        Alerts().after_epoch([row(1 + r["metrics"]["valid/loss"], r["metrics"]["valid/loss"]) for r in leaving], None)
        == []
    )


def leaves(valid: list[float]) -> bool:
    alerts = Alerts()
    rows = [row(1 - epoch / 100, loss) for epoch, loss in enumerate(valid)]
    return any(alerts.after_epoch(rows[: epoch + 1], None) for epoch in range(len(rows)))


def test_validation_that_only_wavers_is_left_alone() -> None:
    draws = random.Random(0)
    falling = [0.3 + 2 * math.exp(-epoch / 8) for epoch in range(20)]
    flat = [0.3 * math.exp(draws.gauss(0, 0.02)) for _ in range(200)]
    assert sum(a < b < c < d for a, b, c, d in zip(flat, flat[1:], flat[2:], flat[3:], strict=False)) > 1
    assert not leaves(falling + flat)
    assert not leaves([*falling, 0.3, 0.301, 0.302, 0.303])
    assert leaves(falling + [0.46 + epoch / 50 for epoch in range(20)])


def test_what_the_machine_says() -> None:
    alerts = Alerts()
    said = [alerts.feeding(0.5) for _ in range(8)]
    assert [len(found) for found in said] == [0, 0, 0, 0, 1, 0, 0, 0]
    assert all(not Alerts().feeding(0.1) for _ in range(20))
    assert alerts.space(100 << 30, 1 << 30) == []
    assert [a.name for a in alerts.space(1 << 20, 10)] == ["disk fills"]
    assert [a.name for a in alerts.space(3 << 30, 2 << 30)] == []
    assert [a.text for a in alerts.dead({"1": 0.9, "2": 0.1})] == ["units answer no sample of a batch: 1 90%"]
