"""The probe: the optimum that Newton's method finds, honest held-out scores, and data that leave little to learn."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchkeep.errors import BadSampleError, DataError, LabelError, ModelError
from torchkeep.training import probe as module
from torchkeep.training.probe import STRENGTHS, Probe, fit_probe, interpolate


def blobs(num: int = 90, size: int = 6, classes: int = 3, spread: float = 1.5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Overlapping clouds, of features with very different units."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % classes
    centres = torch.randn(classes, size, generator=draw)
    features = centres[labels] + spread * torch.randn(num, size, generator=draw)
    return features * torch.logspace(-2, 2, size) + 5, labels


def standardised(features: Tensor) -> tuple[Tensor, Tensor]:
    x = features.double()
    return (x - x.mean(0)) / x.std(0, correction=0), x.std(0, correction=0)


def penalised(theta: Tensor, x: Tensor, labels: Tensor, strength: float) -> Tensor:
    return F.cross_entropy(x @ theta[:, :-1].T + theta[:, -1], labels) + strength / 2 * theta[:, :-1].square().sum()


def newton(x: Tensor, labels: Tensor, classes: int, strength: float) -> float:
    """The least penalised loss, by plain Newton steps. The ridge holds the one direction in which it is flat."""
    theta = torch.zeros(classes, x.shape[1] + 1, dtype=torch.float64)

    def loss(theta: Tensor) -> Tensor:
        return penalised(theta, x, labels, strength)

    for _ in range(20):
        gradient = torch.autograd.functional.jacobian(loss, theta).flatten()
        hessian = torch.autograd.functional.hessian(loss, theta).reshape(theta.numel(), -1)
        step = torch.linalg.solve(hessian + 1e-10 * torch.eye(theta.numel(), dtype=torch.float64), gradient)
        theta = theta - step.view_as(theta)
    return float(loss(theta))


def loss_of(probe: Probe, features: Tensor, labels: Tensor) -> float:
    _, scale = standardised(features)
    weight = probe.weight.double()
    logits = features.double() @ weight.T + probe.bias.double()
    return float(F.cross_entropy(logits, labels) + probe.regularisation / 2 * (weight * scale).square().sum())


@pytest.mark.parametrize("strength", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize(("num", "size"), [(90, 6), (15, 25)])
def test_the_loss_is_that_of_newtons_method(num: int, size: int, strength: float) -> None:
    features, labels = blobs(num, size)
    probe = fit_probe(features, labels, 3, strengths=[strength])
    assert loss_of(probe, features, labels) == pytest.approx(
        newton(standardised(features)[0], labels, 3, strength), abs=1e-6
    )


def test_a_warm_start_ends_where_a_cold_one_does() -> None:
    features, labels = blobs()
    warm = fit_probe(features, labels, 3)
    cold = fit_probe(features, labels, 3, strengths=[warm.regularisation])
    torch.testing.assert_close(warm.weight, cold.weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("outputs", [1, 2])
def test_numbers_get_the_ridge_solution(outputs: int) -> None:
    features, _ = blobs(60, 4)
    x, scale = standardised(features)
    truth = x @ torch.arange(4.0 * outputs, dtype=torch.float64).view(4, outputs) + 7
    probe = fit_probe(features, truth.float().squeeze(1), outputs, strengths=[0.5])
    expected = torch.linalg.solve(x.T @ x / 60 + 0.5 * torch.eye(4), x.T @ (truth - truth.mean(0)) / 60).T
    torch.testing.assert_close(probe.weight.double() * scale, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(probe.logits(features).mean(0).double(), truth.mean(0), rtol=1e-5, atol=1e-5)
    free = fit_probe(features, truth.float(), outputs)
    assert free.regularisation == STRENGTHS[-1]
    assert free.accuracy == pytest.approx(1, abs=1e-4)


def test_the_scores_are_those_of_fits_without_the_fold() -> None:
    features, labels = blobs(40, 5)
    x, _ = standardised(features)
    probe = fit_probe(x, labels, 3, folds=4, strengths=[0.1])
    fold_of = module._folds(labels, 4, 0)
    right = 0
    for fold in range(4):
        kept, held = fold_of != fold, fold_of == fold
        # its own standardisation is undone by the penalty's scale only nearly: so near that no class changes here
        fitted = fit_probe(x[kept], labels[kept], 3, strengths=[0.1])
        right += int((fitted.logits(x[held]).argmax(1) == labels[held]).sum())
    assert probe.accuracy * 40 == pytest.approx(right, abs=2)
    assert probe.accuracy < 1


def test_labels_without_meaning_are_not_learned() -> None:
    draw = torch.Generator().manual_seed(1)
    probe = fit_probe(torch.randn(200, 300, generator=draw), torch.randint(2, (200,), generator=draw), 2)
    assert probe.accuracy < 0.65
    assert len(probe.scores) < len(STRENGTHS)


@pytest.mark.parametrize("spread", [0.2, 1.5, 3.0])
def test_the_best_strength_is_chosen_and_equal_ones_by_loss(spread: float) -> None:
    features, labels = blobs(spread=spread)
    probe = fit_probe(features, labels, 3)
    assert probe.accuracy == max(probe.scores.values()) == probe.scores[probe.regularisation]
    equal = [strength for strength, score in probe.scores.items() if score == probe.accuracy]
    losses = {strength: fit_probe(features, labels, 3, strengths=[strength]).loss for strength in equal}
    assert losses[probe.regularisation] == pytest.approx(min(losses.values()), rel=1e-4)
    assert len(equal) > 1 or spread > 0.2


def test_the_same_data_give_the_same_bits_whatever_was_drawn_before() -> None:
    features, labels = blobs()
    first = fit_probe(features, labels, 3)
    torch.rand(5), np.random.rand(5), random.random()
    before = torch.get_rng_state()
    again = fit_probe(features, labels, 3)
    assert torch.equal(first.weight, again.weight)
    assert first.scores == again.scores
    assert torch.equal(before, torch.get_rng_state())


def test_folds_are_keyed_and_hold_each_class_alike() -> None:
    labels = torch.tensor([0] * 50 + [1] * 23 + [2] * 7)
    fold_of = module._folds(labels, 5, seed=0)
    for of_class in range(3):
        counts = torch.bincount(fold_of[labels == of_class], minlength=5)
        assert counts.max() - counts.min() <= 1
    assert not torch.equal(fold_of, module._folds(labels, 5, seed=1))


def test_chunks_and_float32_change_rounding_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = blobs()
    whole = fit_probe(features, labels, 3, strengths=[1e-2])
    numbers = fit_probe(features, labels.float(), 1, strengths=[1e-2])
    monkeypatch.setattr(module, "_CHUNK_NUMBERS", 200)
    torch.testing.assert_close(fit_probe(features, labels, 3, strengths=[1e-2]).weight, whole.weight)
    torch.testing.assert_close(fit_probe(features, labels.float(), 1, strengths=[1e-2]).weight, numbers.weight)
    monkeypatch.setattr(module, "_EXACT_NUMBERS", 0)
    single = fit_probe(features, labels, 3, strengths=[1e-2])
    torch.testing.assert_close(single.logits(features), whole.logits(features), rtol=1e-2, atol=1e-2)
    assert single.accuracy == whole.accuracy


@pytest.mark.parametrize("num", [1, 2, 3, 7])
def test_fewer_samples_than_folds(num: int) -> None:
    features, labels = blobs(num, 4)
    for target in (labels, labels.float()):
        probe = fit_probe(features, target, 3)
        assert torch.isfinite(probe.logits(features)).all()
        assert probe.regularisation in probe.scores


def test_a_class_of_one_sample_and_a_class_of_none() -> None:
    features, labels = blobs()
    features[0], labels[0] = 1000.0, 3
    probe = fit_probe(features, labels, 5, strengths=[1e-3])
    said = probe.logits(features).argmax(1)
    assert said[0] == 3
    assert not (said == 4).any()
    assert 0.5 < probe.accuracy < 1


def test_one_class_alone() -> None:
    features, labels = blobs()
    probe = fit_probe(features, torch.zeros_like(labels), 2)
    assert probe.accuracy == 1
    assert (probe.logits(features).argmax(1) == 0).all()
    assert fit_probe(features, torch.zeros_like(labels), 1).accuracy == 1


def test_features_that_tell_nothing() -> None:
    features, labels = blobs()
    constant = torch.full((90, 2), 1234.567)
    plain, padded = fit_probe(features, labels, 3), fit_probe(torch.cat([features, constant], 1), labels, 3)
    assert padded.scores == plain.scores
    torch.testing.assert_close(padded.logits(torch.cat([features, constant], 1)), plain.logits(features))
    assert fit_probe(constant, (torch.arange(90) % 3 > 0).long(), 2).accuracy == pytest.approx(2 / 3)
    assert fit_probe(features, torch.ones(90), 1).accuracy == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_features_that_are_not_finite_name_their_samples(value: float) -> None:
    features, labels = blobs()
    features[7, 2] = features[41, 0] = value
    with pytest.raises(BadSampleError, match="sample 7, 41"):
        fit_probe(features.half() if value > 0 else features, labels, 3)


@pytest.mark.parametrize("label", [3, -1, float("nan")])
def test_labels_that_cannot_be_are_named(label: float) -> None:
    features, labels = blobs()
    labels = labels.float() if label != label else labels
    labels[4] = label
    with pytest.raises(LabelError, match=rf"rows \[4\][\s\S]*label {label}") as caught:
        fit_probe(features, labels, 3)
    assert caught.value.rows == [4]


def test_no_sample_is_an_error() -> None:
    with pytest.raises(DataError, match="at least one"):
        fit_probe(torch.empty(0, 4), torch.empty(0, dtype=torch.int64), 3)


def test_put_makes_the_head_say_what_the_probe_says() -> None:
    features, labels = blobs()
    probe, head = fit_probe(features, labels, 3), nn.Linear(6, 3)
    probe.put(head)
    torch.testing.assert_close(head(features), probe.logits(features))
    assert head.weight.requires_grad
    for other in (nn.Linear(6, 4), nn.Linear(6, 3, bias=False)):
        with pytest.raises(ModelError, match="out_features=3, bias=True"):
            probe.put(other)


def test_interpolation_runs_from_the_first_to_the_second() -> None:
    a = {"w": torch.randn(3, 2), "frozen": torch.randn(5), "n": torch.tensor(3)}
    b = {"w": torch.randn(3, 2), "frozen": a["frozen"].clone(), "n": torch.tensor(8)}
    assert torch.equal(interpolate(a, b, 0.0)["w"], a["w"])
    assert torch.equal(interpolate(a, b, 1.0)["w"], b["w"])
    middle = interpolate(a, b, 0.3)
    torch.testing.assert_close(middle["w"], 0.7 * a["w"] + 0.3 * b["w"])
    assert torch.equal(middle["frozen"], a["frozen"])
    assert int(middle["n"]) == 8
