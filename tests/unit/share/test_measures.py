"""Metrics against formulas written out here, intervals against what they promise, and the page that shows them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchkeep as tk
from torchkeep.contracts import Field, Schema
from torchkeep.data.arrays import Columns
from torchkeep.data.readers import Reader
from torchkeep.data.sources import DataSettings
from torchkeep.errors import DataError, ModelError
from torchkeep.share import measures
from torchkeep.share.calibration import bins_of, calibrated, expected_error
from torchkeep.share.contract import Asked, Contract
from torchkeep.share.measures import Measured, measured
from torchkeep.share.report import report_page


class Says(nn.Module):
    """Gives what it takes."""

    def forward(self, said: Tensor) -> Tensor:
        return said


def asked_of(field: Field, loss: str, **calibration: Any) -> Asked:
    none = Columns()
    none.columns, none.where = {"": torch.empty(0)}, "test"
    none.schema = Schema({"said": Field("tensor"), "label": field})
    return Asked(
        Says(), Contract(Reader(none, DataSettings(train="")), loss, batch_size=64, calibration=calibration), "cpu"
    )


def classes_measured(logits: Tensor, labels: Tensor, classes: tuple[str, ...], **calibration: Any) -> Measured:
    field = Field("label", (), classes, is_target=True)
    return measured(asked_of(field, "cross_entropy", **calibration), tk.Arrays(said=logits, label=labels), workers=0)


def test_metrics_of_classes_are_those_of_their_formulas() -> None:
    draws = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (400,), generator=draws)
    logits = torch.randn(400, 3, generator=draws) + 2 * torch.nn.functional.one_hot(labels, 3)
    found = classes_measured(logits, labels, ("a", "b", "c"))
    p, answers = logits.double().softmax(1), logits.argmax(1)
    assert found.metrics["accuracy"][0] == pytest.approx(float((answers == labels).double().mean()))
    assert found.metrics["log_loss"][0] == pytest.approx(float(-p[torch.arange(400), labels].log().mean()))
    one_hot = torch.nn.functional.one_hot(labels, 3)
    assert found.metrics["brier"][0] == pytest.approx(float((p - one_hot).square().sum(1).mean()))
    f1 = []
    for k in range(3):
        hits = int(((answers == k) & (labels == k)).sum())
        given, true = int((answers == k).sum()), int((labels == k).sum())
        assert found.per_class[k]["precision"] == pytest.approx(hits / given)
        assert found.per_class[k]["recall"] == pytest.approx(hits / true)
        assert found.per_class[k]["support"] == true
        f1.append(2 * hits / (given + true))
    assert found.metrics["f1"][0] == pytest.approx(sum(f1) / 3)
    areas = [float((p[labels == k, k][:, None] > p[labels != k, k][None]).double().mean()) for k in range(3)]
    assert found.metrics["auroc"][0] == pytest.approx(sum(areas) / 3)
    assert sum(map(sum, found.confusion)) == 400
    for name in ("accuracy", "f1", "precision", "recall", "log_loss", "brier"):
        value, low, high = found.metrics[name]
        assert low < value < high
    surest = [row.size for row in found.worst]
    assert surest == sorted(surest, reverse=True)
    assert all(row.truth != row.answer for row in found.worst)


def test_an_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    hits = 0
    for seed in range(60):
        draws = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, 2, (200,), generator=draws)
        right = torch.rand(200, generator=draws) < 0.8
        logits = torch.nn.functional.one_hot(torch.where(right, labels, 1 - labels), 2).float()
        _, low, high = classes_measured(logits, labels, ("no", "yes")).metrics["accuracy"]
        hits += low <= 0.8 <= high
    assert 52 <= hits <= 60


def test_one_logit_of_two_classes_is_measured_as_two() -> None:
    logits, labels = torch.tensor([[2.0], [-1.0], [0.5], [-3.0]]), torch.tensor([1.0, 0.0, 0.0, 0.0])
    field = Field("label", (), ("no", "yes"), is_target=True)
    data = tk.Arrays(said=logits, label=labels)
    found = measured(asked_of(field, "binary_cross_entropy"), data, workers=0)
    assert found.metrics["accuracy"][0] == 0.75
    costs = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0], labels)
    assert found.metrics["log_loss"][0] == pytest.approx(float(costs), rel=1e-6)
    assert [(row.index, row.truth, row.answer) for row in found.worst] == [(2, "no", "yes")]


def test_numbers_are_measured_in_their_own_units() -> None:
    draws = torch.Generator().manual_seed(1)
    true = torch.randn(300, generator=draws) * 10
    said = true + torch.randn(300, generator=draws) + 0.5
    field = Field("number", (), is_target=True)
    found = measured(asked_of(field, "mse"), tk.Arrays(said=said[:, None], label=true), workers=0)
    gap = (said - true).double()
    assert found.metrics["mean_absolute_error"][0] == pytest.approx(float(gap.abs().mean()))
    assert found.metrics["rmse"][0] == pytest.approx(math.sqrt(float(gap.square().mean())))
    r2 = 1 - float(gap.square().mean() / true.double().var(correction=0))
    assert found.metrics["r2"][0] == pytest.approx(r2)
    assert found.metrics["bias"][1] < 0.5 < found.metrics["bias"][2]
    assert found.worst[0].size == pytest.approx(float(gap.abs().max()))


def test_an_interval_stays_where_its_metric_can_be() -> None:
    logits = torch.tensor([[8.0, 0.0]] * 39 + [[0.0, 8.0]])  # one of forty is wrong, and sure of it
    found = classes_measured(logits, torch.zeros(40, dtype=torch.int64), ("a", "b"))
    for name in ("log_loss", "brier", "accuracy", "f1"):
        value, low, high = found.metrics[name]
        assert 0 <= low < value < high, name
    assert found.metrics["brier"][2] <= 2


def test_the_interval_of_an_area_is_that_of_samples_drawn_again() -> None:
    draws = np.random.default_rng(3)
    labels = draws.integers(0, 3, 300)
    logits = draws.normal(size=(300, 3)) + np.eye(3)[labels]
    p = torch.tensor(logits).softmax(1).numpy()

    def area(places: Any) -> float:
        said, true = p[places], labels[places]
        return float(np.mean([(said[true == k, k][:, None] > said[true != k, k]).mean() for k in range(3)]))

    ends = np.quantile([area(draws.integers(0, 300, 300)) for _ in range(400)], (0.025, 0.975))
    value, *found = classes_measured(torch.tensor(logits), torch.tensor(labels), ("a", "b", "c")).metrics["auroc"]
    assert value == pytest.approx(area(np.arange(300)))
    assert found == pytest.approx(list(ends), abs=0.01)


def test_many_samples_have_the_intervals_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = torch.Generator().manual_seed(4)
    true = torch.randn(3000, generator=draws)
    data = tk.Arrays(said=true[:, None] + torch.randn(3000, 1, generator=draws), label=true)
    asked = asked_of(Field("number", (), is_target=True), "mse")
    few = measured(asked, data, workers=0).metrics
    monkeypatch.setattr(measures, "_MOST_DRAWN", 100)
    many = measured(asked, data, workers=0).metrics
    for name in ("mean_absolute_error", "bias", "rmse"):
        assert many[name] == pytest.approx(few[name], abs=0.01), name
    assert many["r2"] == pytest.approx(few["r2"], abs=0.03)
    value, low, high = few["error_at_90%"]
    assert low < value < high


def test_masks_and_tokens_without_a_number_are_counted_apart() -> None:
    draws = torch.Generator().manual_seed(5)
    mask, output = torch.randint(0, 2, (40, 3, 3), generator=draws), torch.randn(40, 2, 3, 3, generator=draws)
    output[7] = math.nan
    asked = asked_of(Field("mask", (3, 3), ("no", "yes"), is_target=True), "cross_entropy")
    found = measured(asked, tk.Arrays(said=output, label=mask), workers=0)
    kept = torch.arange(40) != 7
    assert (found.num_samples, found.num_unanswered, list(found.unanswered)) == (39, 1, ["7"])
    assert "no number" in report_page(found, "masks", {})
    assert found.metrics["accuracy"][0] == pytest.approx(float((output.argmax(1) == mask)[kept].double().mean()))
    assert found.metrics["log_loss"][0] == pytest.approx(
        float(torch.nn.functional.cross_entropy(output[kept], mask[kept])), rel=1e-5
    )
    with pytest.raises(DataError, match="not the model's"):
        measured(asked, tk.Arrays(said=output, label=mask + 6), workers=0)
    tokens, said = torch.randint(0, 9, (20, 4), generator=draws), torch.randn(20, 4, 9, generator=draws)
    next_ones = measured(asked_of(Field("tokens", (4,), is_target=True), "cross_entropy"),
                         tk.Arrays(said=said, label=tokens), workers=0).metrics  # fmt: skip
    cost = float(torch.nn.functional.cross_entropy(said.flatten(0, 1), tokens.flatten()))
    value, low, high = next_ones["perplexity"]
    assert low < value < high
    assert value == pytest.approx(math.exp(cost), rel=1e-5)


def test_several_labels_and_masks() -> None:
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    logits = torch.tensor([[3.0, -3.0], [3.0, 3.0], [3.0, 3.0], [-3.0, -3.0]])
    field = Field("multilabel", (2,), ("red", "big"), is_target=True)
    found = measured(asked_of(field, "binary_cross_entropy"), tk.Arrays(said=logits, label=labels), workers=0)
    assert found.metrics["exact_match"][0] == 0.75
    assert found.per_class[0] == pytest.approx({"precision": 2 / 3, "recall": 1, "f1": 0.8, "support": 2})
    assert found.metrics["auroc"][0] == pytest.approx((0.75 + 1) / 2)
    assert [(row.index, row.truth, row.answer) for row in found.worst] == [(1, "big", "red|big")]
    mask = torch.tensor([[[0, 1], [1, 255]]])
    output = torch.nn.functional.one_hot(torch.tensor([[[0, 1], [0, 0]]]), 2).permute(0, 3, 1, 2).float()
    seen = measured(asked_of(Field("mask", (2, 2), ("no", "yes"), is_target=True), "cross_entropy"),
                    tk.Arrays(said=output, label=mask), workers=0)  # fmt: skip
    assert seen.metrics["accuracy"][0] == pytest.approx(2 / 3)
    assert seen.metrics["mean_iou"][0] == pytest.approx((1 / 2 + 1 / 2) / 2)


def test_what_cannot_be_measured_is_said() -> None:
    logits, labels = torch.zeros(4, 2), torch.tensor([0, 1, 2, 1])
    with pytest.raises(DataError, match="not the model's"):
        classes_measured(logits, labels, ("a", "b"))
    with pytest.raises(DataError, match="no labels"):
        measured(asked_of(Field("label", (), ("a", "b"), is_target=True), "cross_entropy"), tk.Arrays(said=logits))
    with pytest.raises(ModelError, match="no output"):
        classes_measured(torch.full((4, 2), math.nan), torch.tensor([0, 1, 0, 1]), ("a", "b"))
    partly = torch.tensor([[math.nan, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert classes_measured(partly, torch.tensor([0, 1, 0]), ("a", "b")).num_unanswered == 1


def test_a_temperature_undoes_what_made_probabilities_too_sure() -> None:
    draws = torch.Generator().manual_seed(2)
    true = torch.randn(4000, 4, generator=draws)
    labels = true.softmax(1).multinomial(1, generator=draws)[:, 0]
    found = calibrated(true * 3, labels, "cross_entropy")
    assert found["temperature"] == pytest.approx(3, rel=0.1)
    assert found["nll_after"] < found["nll_before"]
    assert found["ece_after"] < 0.03 < found["ece_before"]
    yes = (true[:, 0].sigmoid() > torch.rand(4000, generator=draws)).long()
    assert calibrated(true[:, :1] / 2, yes, "binary_cross_entropy")["temperature"] == pytest.approx(0.5, rel=0.15)


def test_nothing_is_calibrated_where_nothing_can_be_said() -> None:
    assert calibrated(torch.randn(5, 2), torch.tensor([0, 1, 0, 1, 0]), "cross_entropy") == {}
    assert calibrated(torch.randn(50, 2), torch.zeros(50, dtype=torch.int64), "cross_entropy") == {}
    assert calibrated(torch.full((50, 2), math.nan), torch.arange(50) % 2, "cross_entropy") == {}


def test_bins_count_each_answer_once() -> None:
    sure, right = torch.tensor([0.5, 0.95, 0.99, 1.0]), torch.tensor([True, True, False, True])
    rows = bins_of(sure, right)
    assert sum(count for count, _, _ in rows) == 4
    assert rows[-1] == pytest.approx((3, 0.98, 2 / 3))
    assert expected_error(sure, right) == pytest.approx((3 * (0.98 - 2 / 3) + 0.5) / 4, abs=1e-6)


def test_nothing_of_the_data_is_markup_on_the_page(tmp_path: Path) -> None:
    logits, labels = torch.tensor([[2.0, 0.0], [3.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1, 1])
    evil = "<script>alert(1)</script>"
    found = classes_measured(logits, labels, (evil, "b"))
    page = report_page(found, evil, {"data": evil})
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 3
    assert "default-src 'none'" in page
    assert "http" not in page.replace("http-equiv", "")
