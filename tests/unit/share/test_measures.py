"""Metrics against formulas written out here, intervals against what they promise, and the page that shows them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchkeep as tk
from torchkeep.contracts import Field, Schema
from torchkeep.data.arrays import Columns
from torchkeep.data.readers import Reader
from torchkeep.data.sources import DataSettings
from torchkeep.errors import DataError, ModelError
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


def test_several_labels_and_masks() -> None:
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    logits = torch.tensor([[3.0, -3.0], [3.0, 3.0], [3.0, 3.0], [-3.0, -3.0]])
    field = Field("multilabel", (2,), ("red", "big"), is_target=True)
    found = measured(asked_of(field, "binary_cross_entropy"), tk.Arrays(said=logits, label=labels), workers=0)
    assert found.metrics["exact_match"][0] == 0.75
    assert found.per_class[0] == pytest.approx({"precision": 2 / 3, "recall": 1, "f1": 0.8, "support": 2})
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
