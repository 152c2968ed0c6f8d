"""Losses, metrics and rates against references written out by hand, or torch's own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchkeep.errors import ModelError, SettingsError
from torchkeep.training.binding import Binding
from torchkeep.training.metrics import Metric, make_metrics
from torchkeep.training.objective import Objective, choose_objective
from torchkeep.training.optim import Schedule, rate_factor

GENERATOR = torch.Generator().manual_seed(0)
LOGITS, LABELS = torch.randn(200, 5, generator=GENERATOR), torch.randint(0, 4, (200,), generator=GENERATOR)
ONE_LOGIT, TRUTH = torch.randn(200, generator=GENERATOR), torch.randint(0, 2, (200,), generator=GENERATOR)


def measured(name: str, output: Tensor, target: Tensor, size: int = 30) -> float:
    """A metric fed in batches, saved and loaded halfway."""
    metric = make_metrics([name])[0]
    for start in range(0, len(output), size):
        metric.update(output[start : start + size], target[start : start + size])
        other = make_metrics([name])[0]
        other.load_state_dict(metric.state_dict())
        metric = other
    return metric.compute()


def scores(said: list[int], true: list[int], of: int) -> dict[str, float]:
    hits = sum(s == t == of for s, t in zip(said, true, strict=True))
    claimed, there = said.count(of), true.count(of)
    return {
        "precision": hits / claimed if claimed else 0.0,
        "recall": hits / there if there else 0.0,
        "f1": 2 * hits / (claimed + there) if claimed + there else 0.0,
    }


def test_accuracy_and_top_k() -> None:
    said, true = LOGITS.argmax(1).tolist(), LABELS.tolist()
    assert measured("accuracy", LOGITS, LABELS) == sum(s == t for s, t in zip(said, true, strict=True)) / 200
    for k in (1, 3):
        ranked = LOGITS.argsort(1, descending=True)[:, :k].tolist()
        wanted = sum(t in row for t, row in zip(true, ranked, strict=True)) / 200
        assert measured(f"top{k}", LOGITS, LABELS) == pytest.approx(wanted)
    assert measured("top9", LOGITS, LABELS) == 1.0
    assert measured("accuracy", ONE_LOGIT, TRUTH) == int(((ONE_LOGIT > 0) == TRUTH.bool()).sum()) / 200
    assert measured("accuracy", ONE_LOGIT[:, None], TRUTH) == measured("accuracy", ONE_LOGIT, TRUTH.float())


def test_what_is_ignored_counts_for_no_metric() -> None:
    hidden = torch.where(torch.arange(200) % 3 == 0, -100, LABELS)
    kept = hidden != -100
    for name in ("accuracy", "top2", "f1"):
        assert measured(name, LOGITS, hidden) == pytest.approx(measured(name, LOGITS[kept], LABELS[kept]))
    tokens, labels = LOGITS.reshape(20, 10, 5), hidden.reshape(20, 10)
    for output in (tokens, tokens.transpose(1, 2)):
        wanted = float((LOGITS.argmax(1) == LABELS)[kept].float().mean())
        assert measured("accuracy", output, labels) == pytest.approx(wanted)


@pytest.mark.parametrize("name", ["precision", "recall", "f1"])
def test_precision_recall_and_f1(name: str) -> None:
    said, true = LOGITS.argmax(1).tolist(), LABELS.tolist()
    occurs = sorted({*said, *true})
    macro = sum(scores(said, true, of)[name] for of in occurs) / len(occurs)
    assert measured(name, LOGITS, LABELS) == pytest.approx(macro)
    positive = (ONE_LOGIT > 0).long().tolist()
    binary = scores(positive, TRUTH.tolist(), 1)[name]
    for output, target in ((ONE_LOGIT, TRUTH), (ONE_LOGIT[:, None], TRUTH), (ONE_LOGIT[:, None], TRUTH[:, None])):
        assert measured(name, output, target.float()) == pytest.approx(binary)
    several = (ONE_LOGIT.reshape(40, 5), TRUTH.reshape(40, 5))  # five labels a sample: of all of them together
    assert measured(name, *several) == pytest.approx(binary)
    few = LOGITS[:, :3], LABELS.clamp(max=0)  # classes 1 and 2 are claimed, class 0 alone is true
    macro = sum(scores(few[0].argmax(1).tolist(), few[1].tolist(), of)[name] for of in range(3)) / 3
    assert measured(name, *few) == pytest.approx(macro)


def test_mean_absolute_error() -> None:
    output, target = torch.randn(90, 1, generator=GENERATOR), torch.randn(90, generator=GENERATOR)
    wanted = float((output[:, 0] - target).abs().mean())
    assert measured("mean_absolute_error", output, target) == pytest.approx(wanted, rel=1e-6)
    with pytest.raises(ModelError, match="different shapes"):
        measured("mean_absolute_error", torch.zeros(4, 2), torch.zeros(4))


def test_a_metric_that_saw_nothing_is_no_number() -> None:
    metric = make_metrics(["accuracy"])[0]
    assert isinstance(metric, Metric)
    assert math.isnan(metric.compute())
    metric.update(LOGITS, LABELS)
    metric.reset()
    assert math.isnan(metric.compute())


def objective(name: Any, *, class_weights: list[float] | None = None, label_smoothing: float = 0.0) -> Objective:
    batch = {"input": torch.zeros(1, 2), "target": torch.zeros(1)}
    binding = Binding(nn.Linear(2, 2), batch)
    return choose_objective(name, binding, batch["target"], class_weights, label_smoothing)[0]


@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 2.0, 1.0, 3.0]])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("form", ["classes", "probabilities", "pixels", "tokens"])
def test_cross_entropy_is_torchs(weights: list[float] | None, smoothing: float, form: str) -> None:
    output, target = LOGITS, LABELS
    wanted_output = output
    if form == "probabilities":
        target = torch.rand(200, 5, generator=GENERATOR).softmax(1)
    if form == "pixels":
        output = wanted_output = LOGITS.reshape(10, 5, 20)
        target = LABELS.reshape(10, 20)
    if form == "tokens":
        output, target = LOGITS.reshape(10, 20, 5), LABELS.reshape(10, 20)
        wanted_output = output.transpose(1, 2)
    found = objective("cross_entropy", class_weights=weights, label_smoothing=smoothing)
    weight = torch.tensor(weights) if weights else None
    assert torch.equal(found(output, target), F.cross_entropy(wanted_output, target, weight, label_smoothing=smoothing))
    low = found(output.bfloat16(), target)
    assert low.dtype == torch.float32
    assert float(low) == pytest.approx(float(found(output, target)), rel=2e-2)


def test_binary_cross_entropy_and_mse_take_one_column_for_one_number() -> None:
    target, classes = torch.rand(8, generator=GENERATOR), torch.tensor([0, 1] * 4)
    output = torch.randn(8, 1, generator=GENERATOR)
    for name, torchs in (("mse", F.mse_loss), ("binary_cross_entropy", F.binary_cross_entropy_with_logits)):
        found = objective(name)
        wanted = torchs(output[:, 0], target)
        for one, other in ((output, target), (output[:, 0], target), (output, target[:, None])):
            assert torch.equal(found(one, other), wanted)
        assert torch.equal(found(output, classes), torchs(output[:, 0], classes.float()))
        for wide in (torch.zeros(8, 2), torch.zeros(1, 8), torch.zeros(4)):
            with pytest.raises(ModelError, match="different shapes"):
                found(wide, target)
        with pytest.raises(SettingsError, match="belong to cross_entropy"):
            objective(name, label_smoothing=0.1)


def test_a_count_is_what_the_mean_runs_over() -> None:
    some = torch.tensor([0, -100, 2, 1])
    assert objective("cross_entropy").count(some, 4) == 3
    assert objective("cross_entropy", class_weights=[1.0, 2.0, 4.0]).count(some, 4) == 7.0
    assert objective("cross_entropy").count(torch.rand(4, 3, 6), 4) == 24
    assert objective("mse").count(torch.rand(4, 6), 4) == 24
    assert objective(nn.CrossEntropyLoss(ignore_index=0)).count(torch.tensor([0, 1, 2, 0]), 4) == 2
    assert objective(lambda output, target: output.sum()).count(torch.tensor([1, 2, 0, 1]), 4) == 4
    assert objective(lambda output, target: output.sum()).count({"a": some}, 4) == 4


def torchs_rates(make: Any, total: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, rates = make(optimizer), []
    for step in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < total - 1:
            scheduler.step()
    return rates


@pytest.mark.parametrize("total", [2, 3, 10, 97])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("one_cycle", lambda o, total: torch.optim.lr_scheduler.OneCycleLR(o, 1.0, total_steps=total)),
        ("linear", lambda o, total: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, total)),
        ("cosine", lambda o, total: torch.optim.lr_scheduler.CosineAnnealingLR(o, total)),
    ],
)
def test_a_rates_curve_is_torchs(name: Schedule, make: Any, total: int) -> None:
    if name == "one_cycle" and 0.3 * total < 1:
        pytest.skip("OneCycleLR then begins before step 0")
    found = [rate_factor(step, total, name) for step in range(total)]
    assert found == pytest.approx(torchs_rates(lambda o: make(o, total), total), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "one_cycle"])
@pytest.mark.parametrize("warmup", [0.0, 0.2, 7.0])
@pytest.mark.parametrize("total", [1, 2, 5, 50])
def test_a_rate_is_never_out_of_bounds(name: Schedule, warmup: float, total: int) -> None:
    factors = [rate_factor(step, total, name, warmup) for step in range(total + 2)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert any(factors)
