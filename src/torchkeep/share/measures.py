"""What a model is worth on labelled data: metrics with intervals of 95 %, each class, calibration, the worst errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..contracts import INDEX, Json, KeyedDataset
from ..data.dataset import id_of
from ..data.foreign import as_dataset
from ..data.loader import Loader
from ..errors import DataError, ModelError
from ..training.metrics import classes_of
from ..training.objective import IGNORED
from .calibration import bins_of, expected_error
from .contract import Asked

_DRAWS, _DRAWN_AT_ONCE = 1000, 4_000_000
_NORMAL = 1.959964  # of a standard normal, 95 % lie within
_TOP, _TOP_FROM = 5, 10
_MOST_WORST = 64
_MASK_IGNORED = 255

Interval = tuple[float, float, float]
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Worst:
    """A sample on which the model errs most: its place in the data, its name, the truth, the answer, and how sure."""

    index: int
    name: str
    truth: str
    answer: str
    size: float


@dataclass(frozen=True)
class Measured:
    """What was measured. ``metrics`` are value, lower and upper end of the 95 % interval, which are equal where none is
    known. ``bins`` are answers by their probability: how many, its mean, the share that is right."""

    num_samples: int
    metrics: dict[str, Interval]
    classes: tuple[str, ...] = ()
    per_class: list[dict[str, float]] = field(default_factory=list)
    confusion: list[list[int]] = field(default_factory=list)
    bins: list[tuple[int, float, float]] = field(default_factory=list)
    worst: list[Worst] = field(default_factory=list)
    calibration: Json = field(default_factory=dict)
    num_unanswered: int = 0

    def to_json(self) -> Json:
        """All of it."""
        return asdict(self)


def measured(asked: Asked, data: Any, *, workers: int | None = None) -> Measured:
    """One pass over labelled data: metrics, intervals, calibration, and the worst errors.

    Intervals: Wilson's for shares, the normal one for means, 1,000 draws of the bootstrap for all else. Probabilities
    are of logits over the contract's temperature.

    Raises:  DataError for data without labels, or none; ModelError for outputs that these labels do not fit
    Source:  Wilson 1927; Efron & Tibshirani 1993, chapter 13; Guo et al. 2017 (arXiv 1706.04599) for calibration
    """
    dataset = as_dataset(data)
    names = asked.contract.schema.targets or dataset.schema.targets
    if len(names) != 1 or len(dataset) == 0:
        raise DataError("there is nothing to measure by", where="evaluate", got=f"{len(dataset)} samples, "
                        f"targets {', '.join(names) or 'none'}", expected="labelled data with one target")  # fmt: skip
    kind = asked.contract.schema[names[0]].kind if names[0] in asked.contract.schema else "label"
    loader = Loader(dataset, batch_size=asked.contract.batch_size, workers="auto" if workers is None else workers)
    with closing(loader):
        if kind in ("mask", "tokens"):
            return _of_positions(asked, loader, names[0], len(dataset), kind)
        outputs, labels, places = [], [], []
        for batch in loader:
            outputs.append(asked(batch))
            labels.append(torch.as_tensor(batch[names[0]]).cpu())
            places.append(torch.as_tensor(batch[INDEX]))
    return _told(asked, dataset, torch.cat(outputs), torch.cat(labels), torch.cat(places))


def _told(asked: Asked, dataset: KeyedDataset, outputs: Tensor, labels: Tensor, places: Tensor) -> Measured:
    if outputs.ndim > 2 or (outputs.ndim == 2 and labels.ndim == 2 and outputs.shape != labels.shape):
        raise ModelError("these outputs are of no kind that is measured", where="evaluate",
                         got=f"outputs {tuple(outputs.shape)}, labels {tuple(labels.shape)}",
                         expected="(N, K) logits or (N,) numbers")  # fmt: skip
    finite = torch.isfinite(outputs.reshape(len(outputs), -1)).all(1)
    outputs, labels, places, lost = outputs[finite], labels[finite], places[finite], int((~finite).sum())
    if not len(outputs):
        raise ModelError("no output of this model is a number", where="evaluate", got=f"{lost} of NaN or infinity",
                         expected="finite outputs")  # fmt: skip
    loss = asked.contract.loss
    target = asked.contract.target
    is_binary = loss == "binary_cross_entropy"
    if (
        (target is not None and target.kind in ("number", "vector"))
        or loss == "mse"
        or not (is_binary or outputs.ndim == 2)
    ):
        return _of_numbers(dataset, outputs, labels, places, lost)
    logits = outputs / asked.contract.temperature
    if is_binary and logits.ndim == 2 and logits.shape[1] > 1:
        return _of_several(asked, logits, labels, lost)
    if is_binary or logits.shape[1] == 1:  # one logit: the softmax of 0 and it is its sigmoid
        one = logits.reshape(len(logits))
        logits, labels = torch.stack([torch.zeros_like(one), one], 1), labels.reshape(len(one))
    return _of_classes(asked, dataset, logits, labels, places, lost)


# --- classes


def _of_classes(
    asked: Asked, dataset: KeyedDataset, logits: Tensor, labels: Tensor, places: Tensor, lost: int
) -> Measured:
    if labels.is_floating_point() and labels.ndim == 2:
        labels = labels.argmax(1)
    kept = labels != IGNORED
    logits, labels, places = logits[kept].double(), labels[kept].long(), places[kept]
    num = logits.shape[1]
    if not len(labels) or int(labels.max()) >= num or int(labels.min()) < 0:
        raise DataError("these labels are not the model's", where="evaluate", got=f"labels up to {labels.max()}"
                        if len(labels) else "no label", expected=f"0 to {num - 1}")  # fmt: skip
    p = logits.softmax(1)
    sure, answers = p.max(1)
    right = answers == labels
    counts = torch.bincount(labels * num + answers, minlength=num * num).reshape(num, num).numpy()
    truth = p.gather(1, labels[:, None])[:, 0]
    squares = p.square().sum(1) - 2 * truth + 1
    metrics: dict[str, Interval] = {"accuracy": _share(int(right.sum()), len(right))}
    if num >= _TOP_FROM:
        hits = (logits.topk(_TOP, 1).indices == labels[:, None]).any(1)
        metrics["top5"] = _share(int(hits.sum()), len(hits))
    metrics |= _drawn_again(counts, _macro)
    metrics["log_loss"] = _mean(-logits.log_softmax(1).gather(1, labels[:, None])[:, 0].numpy())
    metrics["brier"] = _mean(squares.numpy())
    gap = expected_error(sure, right)
    metrics["calibration_error"] = (gap, gap, gap)
    if (area := _area(p.numpy(), labels.numpy())) is not None:
        metrics["auroc"] = area
    wrong = torch.where(right, -1.0, sure).topk(min(_MOST_WORST, int((~right).sum()))).indices.tolist()
    classes = _classes(asked, num)
    worst = [Worst(int(places[i]), id_of(dataset, int(places[i])), classes[int(labels[i])], classes[int(answers[i])],
                   float(sure[i])) for i in wrong]  # fmt: skip
    return Measured(len(labels), metrics, tuple(classes), _each(counts), counts.tolist(), bins_of(sure, right), worst,
                    asked.contract.calibration, lost)  # fmt: skip


def _classes(asked: Asked, num: int) -> list[str]:
    named = asked.contract.classes
    return [named[i] if i < len(named) else str(i) for i in range(num)]


def _each(counts: Array) -> list[dict[str, float]]:
    precision, recall, f1 = _shares(counts[None])
    rows = zip(precision[0], recall[0], f1[0], counts.sum(1), strict=True)
    return [{"precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)} for p, r, f, n in rows]


def _shares(counts: Array) -> tuple[Array, Array, Array]:
    """Precision, recall and F1 of each class, (D, K), of confusions (D, K, K); 0 where nothing is divided."""
    hits = np.diagonal(counts, axis1=1, axis2=2).astype(np.float64)
    given, true = counts.sum(1), counts.sum(2)
    return hits / np.maximum(given, 1), hits / np.maximum(true, 1), 2 * hits / np.maximum(given + true, 1)


def _macro(counts: Array) -> dict[str, Array]:
    there = (counts.sum(1) + counts.sum(2)) > 0
    parts = dict(zip(("precision", "recall", "f1"), _shares(counts), strict=True))
    return {name: (values * there).sum(1) / np.maximum(there.sum(1), 1) for name, values in parts.items()}


def _drawn_again(counts: Array, told: Callable[[Array], dict[str, Array]]) -> dict[str, Interval]:
    """What is told of a table of counts, with the interval of samples drawn again from it."""
    values = {name: float(value[0]) for name, value in told(counts[None]).items()}
    total, draws = int(counts.sum()), np.random.Generator(np.random.Philox(key=0))
    size = max(1, min(_DRAWS, _DRAWN_AT_ONCE // counts.size))
    parts = []
    for start in range(0, _DRAWS, size):
        drawn = draws.multinomial(total, counts.ravel() / total, min(size, _DRAWS - start))
        parts.append(told(drawn.reshape(-1, *counts.shape)))
    return {name: (value, *_ends(np.concatenate([part[name] for part in parts]))) for name, value in values.items()}


def _ends(values: Array) -> tuple[float, float]:
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def _share(hits: int, total: int) -> Interval:
    """A share with Wilson's interval."""
    p, z = hits / total, _NORMAL
    middle = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return p, max(0.0, min(middle - half, p)), min(1.0, max(middle + half, p))


def _mean(values: Array) -> Interval:
    value = float(values.mean())
    half = _NORMAL * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return value, value - half, value + half


def _area(p: Array, labels: Array) -> Interval | None:
    """The area under the ROC curve, each class against the rest; of two classes with Hanley and McNeil's interval."""
    areas = []
    for k in [1] if p.shape[1] == 2 else range(p.shape[1]):
        yes = labels == k
        num_yes, num_no = int(yes.sum()), int((~yes).sum())
        if not num_yes or not num_no:
            continue
        _, place, count = np.unique(p[:, k], return_inverse=True, return_counts=True)
        ranks = (np.cumsum(count) - (count - 1) / 2)[place]  # of equal values the mean of their ranks
        areas.append(((ranks[yes].sum() - num_yes * (num_yes + 1) / 2) / (num_yes * num_no), num_yes, num_no))
    if not areas:
        return None
    area = float(np.mean([row[0] for row in areas]))
    if p.shape[1] > 2:
        return area, area, area
    _, m, n = areas[0]
    first, second = area / (2 - area), 2 * area * area / (1 + area)
    spread = area * (1 - area) + (m - 1) * (first - area**2) + (n - 1) * (second - area**2)
    half = _NORMAL * math.sqrt(max(0.0, spread) / (m * n))
    return area, max(0.0, area - half), min(1.0, area + half)


# --- several labels, numbers, positions


def _of_several(asked: Asked, logits: Tensor, labels: Tensor, lost: int) -> Measured:
    p, true = logits.double().sigmoid(), labels > 0.5
    said = p > 0.5
    pairs = np.stack([_pairs(said[:, k], true[:, k]) for k in range(p.shape[1])])
    whole = (said == true).all(1)
    costs = F.binary_cross_entropy_with_logits(logits.double(), true.double(), reduction="none").mean(1)
    metrics = {"exact_match": _share(int(whole.sum()), len(whole)), "log_loss": _mean(costs.numpy()),
               "accuracy": _mean((said == true).double().mean(1).numpy())}  # fmt: skip
    sure, right = torch.maximum(p, 1 - p).flatten(), (said == true).flatten()
    gap = expected_error(sure, right)
    each = [_each(pair)[1] for pair in pairs]
    f1 = float(np.mean([row["f1"] for row in each]))
    metrics |= {"f1": (f1, f1, f1), "calibration_error": (gap, gap, gap)}
    return Measured(len(p), metrics, tuple(_classes(asked, p.shape[1])), each, [], bins_of(sure, right), [],
                    asked.contract.calibration, lost)  # fmt: skip


def _pairs(said: Tensor, true: Tensor) -> Array:
    return torch.bincount(true.long() * 2 + said.long(), minlength=4).reshape(2, 2).numpy()


def _of_numbers(dataset: KeyedDataset, outputs: Tensor, labels: Tensor, places: Tensor, lost: int) -> Measured:
    found, true = (part.double().reshape(len(part), -1).numpy() for part in (outputs, labels))
    if found.shape != true.shape:
        raise ModelError("outputs and labels are not as many", where="evaluate", got=f"outputs {found.shape}",
                         expected=f"labels {true.shape}")  # fmt: skip
    gaps = found - true
    sizes = np.abs(gaps).mean(1)
    metrics = {"mean_absolute_error": _mean(sizes), "bias": _mean(gaps.mean(1))}
    draws, parts = np.random.Generator(np.random.Philox(key=0)), []
    size = max(1, min(_DRAWS, _DRAWN_AT_ONCE // len(gaps)))
    for start in range(0, _DRAWS, size):
        weights = draws.multinomial(len(gaps), np.full(len(gaps), 1 / len(gaps)), min(size, _DRAWS - start))
        parts.append(_fit(weights.astype(np.float64), gaps, true))
    drawn = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    told = _fit(np.ones((1, len(gaps))), gaps, true)
    metrics |= {name: (float(value[0]), *_ends(drawn[name])) for name, value in told.items() if np.isfinite(value[0])}
    for share in (0.5, 0.9, 0.99):
        value = float(np.quantile(sizes, share))
        metrics[f"error_at_{share:.0%}"] = (value, value, value)
    worst = [Worst(int(places[i]), id_of(dataset, int(places[i])), _row(true[i]), _row(found[i]), float(sizes[i]))
             for i in np.argsort(-sizes)[:_MOST_WORST]]  # fmt: skip
    return Measured(len(gaps), metrics, worst=worst, num_unanswered=lost)


def _fit(weights: Array, gaps: Array, true: Array) -> dict[str, Array]:
    """Root mean squared error and R² for weights (D, N) of the samples."""
    total = weights.sum(1)
    squares = weights @ np.square(gaps).mean(1) / total
    spread = (weights @ np.square(true) / total[:, None] - np.square(weights @ true / total[:, None])).mean(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return {"rmse": np.sqrt(squares), "r2": 1 - squares / np.where(spread > 0, spread, np.nan)}


def _row(values: Array) -> str:
    return ", ".join(f"{value:.4g}" for value in values[:4]) + (", …" if len(values) > 4 else "")


def _of_positions(asked: Asked, loader: Loader, name: str, count: int, kind: str) -> Measured:
    """Masks and next tokens: each pixel or token counts, and no sample by itself."""
    hits = total = 0
    counts: Tensor | None = None
    for batch in loader:
        output, label = asked(batch), torch.as_tensor(batch[name]).cpu()
        found, true = classes_of(output, label)
        kept = (true != IGNORED) & (true != _MASK_IGNORED if kind == "mask" else true >= 0)
        found, true = found[kept].long(), true[kept].long()
        hits, total = hits + int((found == true).sum()), total + len(true)
        if kind == "mask":
            num = max(2, output.shape[1] if output.ndim == label.ndim + 1 else 2)
            more = torch.bincount(true * num + found, minlength=num * num).reshape(num, num)
            counts = more if counts is None else counts + more
    if not total:
        raise DataError("there is nothing to measure by", where="evaluate", got="no position with a class")
    accuracy = hits / total
    metrics: dict[str, Interval] = {"accuracy": (accuracy, accuracy, accuracy)}  # positions are no independent samples
    if counts is None:
        return Measured(count, metrics)
    table = counts.numpy()
    union = table.sum(0) + table.sum(1) - table.diagonal()
    iou = float((table.diagonal()[union > 0] / union[union > 0]).mean())
    metrics["mean_iou"] = (iou, iou, iou)
    return Measured(count, metrics, tuple(_classes(asked, len(table))), _each(table), table.tolist())
