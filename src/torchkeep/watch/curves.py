"""Precision and recall at each threshold, from counts of scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..contracts import Json
from ..errors import SettingsError

NUM_THRESHOLDS = 128


def score_counts(scores: Tensor, is_true: Tensor) -> Tensor:
    """How many scores lie at each threshold, those of false and of true samples apart.

    Shapes:  scores (N, K) in [0, 1], is_true (N, K) int64 0 or 1 → (K, 2, NUM_THRESHOLDS) int64, on the device
    """
    num_classes = scores.shape[1]
    place = (scores * (NUM_THRESHOLDS - 1)).long().clamp_(0, NUM_THRESHOLDS - 1)
    cells = ((torch.arange(num_classes, device=scores.device) * 2 + is_true) * NUM_THRESHOLDS + place).flatten()
    counts = torch.zeros(num_classes * 2 * NUM_THRESHOLDS, dtype=torch.int64, device=scores.device)
    return counts.index_add_(0, cells, torch.ones_like(cells)).view(num_classes, 2, NUM_THRESHOLDS)


def curves(counts: Tensor) -> list[dict[str, Json]]:
    """Of each class what is right and wrong at each threshold, precision and recall: the payload of a "pr_curve".

    Shapes:  counts as ``score_counts`` gives them, or a sum of such
    Source:  Davis, Goadrich 2006, "The relationship between precision-recall and ROC curves"
    """
    reached = counts.cpu().flip(2).cumsum(2).flip(2)  # how many scores are at or beyond each threshold
    return [_curve(true, false) for false, true in reached.unbind(0)]


def curve_of(labels: Any, scores: Any) -> dict[str, Json]:
    """The curve of scores in [0, 1] and whether each is of a true sample; scores that are not finite are left out."""
    truth = torch.as_tensor(labels).flatten().bool().long()
    found = torch.as_tensor(scores).flatten().float()
    if len(truth) != len(found):
        raise SettingsError(
            "a curve needs a label for each score", where="pr_curve", got=f"{len(truth)} labels, {len(found)} scores",
        )  # fmt: skip
    kept = found.isfinite()
    return curves(score_counts(found[kept, None], truth[kept, None]))[0]


def _curve(true: Tensor, false: Tensor) -> dict[str, Json]:
    positives, negatives = int(true[0]), int(false[0])
    said = (true + false).double()
    return {
        "thresholds": torch.linspace(0, 1, NUM_THRESHOLDS).tolist(),
        "true_positives": true.tolist(),
        "false_positives": false.tolist(),
        "true_negatives": (negatives - false).tolist(),
        "false_negatives": (positives - true).tolist(),
        "precision": torch.where(said > 0, true / said.clamp(min=1), 1.0).tolist(),
        "recall": (true / max(1, positives)).tolist(),
    }
