"""What an evaluation gathers to be shown, against counts made one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from torchkeep.training.seen import Seen
from torchkeep.watch.curves import NUM_THRESHOLDS, curve_of


def gathered(output: Tensor, target: Tensor, batch: int = 7, most: int = 10) -> Seen:
    seen = Seen(most, "x")
    for begin in range(0, len(output), batch):
        rows = slice(begin, begin + batch)
        seen.add(
            {"index": torch.arange(len(output))[rows], "x": torch.arange(len(output))[rows]}, output[rows], target[rows]
        )
    return seen


def test_the_first_samples_are_held_in_order() -> None:
    torch.manual_seed(0)
    output, target = torch.randn(20, 3), torch.randint(0, 3, (20,))
    seen = gathered(output, target)
    assert seen.held["index"].tolist() == seen.held["shown"].tolist() == list(range(10))
    assert torch.equal(seen.held["output"], output[:10])
    assert torch.equal(seen.held["truth"], target[:10])


def test_samples_are_taken_from_all_of_a_split() -> None:
    output, target = torch.randn(50, 3), torch.randint(0, 3, (50,))
    for batch in (3, 7, 50):
        seen = Seen(8, "x", stride=6)
        for begin in range(0, 50, batch):
            numbers = torch.arange(begin, min(begin + batch, 50))
            seen.add({"index": numbers, "x": numbers}, output[numbers], target[numbers])
        assert seen.held["index"].tolist() == list(range(0, 48, 6))
        assert torch.equal(seen.held["output"], output[0:48:6])


def test_confusion_counts_truth_by_output() -> None:
    torch.manual_seed(1)
    output, target = torch.randn(50, 4), torch.randint(0, 4, (50,))
    wanted = [[0] * 4 for _ in range(4)]
    for row, truth in zip(output, target, strict=True):
        wanted[int(truth)][int(row.argmax())] += 1
    assert gathered(output, target).confusion() == wanted


def test_curves_are_those_of_every_threshold() -> None:
    torch.manual_seed(2)
    output, target = torch.randn(60, 3), torch.randint(0, 3, (60,))
    scores = output.softmax(1)
    for number, curve in enumerate(gathered(output, target).curves()):
        for place in (0, 20, 64, 100, NUM_THRESHOLDS - 1):
            said = (scores[:, number] * (NUM_THRESHOLDS - 1)).long() >= place
            is_true = target == number
            assert curve["true_positives"][place] == int((said & is_true).sum())
            assert curve["false_positives"][place] == int((said & ~is_true).sum())
            assert curve["false_negatives"][place] == int((~said & is_true).sum())
            assert curve["true_negatives"][place] == int((~said & ~is_true).sum())


def test_two_classes_by_one_logit() -> None:
    output, target = torch.tensor([-3.0, 2.0, 0.5, -0.1]), torch.tensor([0, 1, 1, 0])
    curve = gathered(output[:, None], target).curves()[1]
    assert curve["precision"][NUM_THRESHOLDS // 2] == 1
    assert curve["recall"][NUM_THRESHOLDS // 2] == 1
    assert curve == curve_of(target, output.sigmoid())


def test_what_are_no_classes_is_left_out() -> None:
    numbers = gathered(torch.randn(9, 1), torch.randn(9, 1))
    assert numbers.confusion() is None
    assert numbers.curves() == []
    assert len(numbers.held["output"]) == 9
    nothing = Seen(4)
    nothing.add({"index": torch.arange(3)}, {"boxes": 1}, None)
    assert nothing.held == {}
    broken = gathered(torch.full((4, 3), torch.nan), torch.tensor([0, 1, 2, -100]))
    assert broken.curves()[0]["true_positives"][0] == 0


def test_what_cannot_be_counted_ends_the_gathering_only() -> None:
    seen = gathered(torch.randn(12, 3), torch.tensor([0, 1, 2, 7] * 3))
    assert (seen.held, seen.confusion(), seen.curves()) == ({}, None, [])
