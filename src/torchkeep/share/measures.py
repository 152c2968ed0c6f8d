"""What a model is worth on labelled data: metrics with intervals of 95 %, each class, calibration, the worst errors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..contracts import INDEX, VALID, Batch, Json, KeyedDataset
from ..data.dataset import id_of
from ..data.foreign import as_dataset
from ..data.loader import Loader
from ..data.reading import OnBad, valid_rows
from ..errors import DataError, ModelError
from ..training.metrics import classes_of
from ..training.objective import IGNORED, classes_are_last
from ..watch.console import format_number
from .calibration import bins_of, expected_error
from .contract import Asked, Contract

_DRAWS, _MOST_DRAWN = 1000, 10_000
_NORMAL = 1.959964  # of a standard normal, 95 % lie within
_TOP, _TOP_FROM = 5, 10
_MOST_WORST = 64
_NO_NUMBER = "the model's output is no number"
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
    known. ``bins`` are answers by their probability: how many, its mean, the share that is right. ``unanswered`` names
    the first samples that are left out, and says why.
    """

    num_samples: int
    metrics: dict[str, Interval]
    classes: tuple[str, ...] = ()
    per_class: list[dict[str, float]] = field(default_factory=list)
    confusion: list[list[int]] = field(default_factory=list)
    bins: list[tuple[int, float, float]] = field(default_factory=list)
    worst: list[Worst] = field(default_factory=list)
    calibration: Json = field(default_factory=dict)
    num_unanswered: int = 0
    unanswered: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> Json:
        """All of it."""
        return asdict(self)


def measured(
    asked: Asked, data: Any, *, workers: int | None = None, on_bad: OnBad = "raise", bad_fraction: float = 0.01
) -> Measured:  # fmt: skip
    """One pass over labelled data: metrics, intervals, calibration, and the worst errors.

    Intervals: Wilson's for shares, DeLong's for areas, order statistics for quantiles, 1,000 draws of the bootstrap for
    all else; the calibration error, which is biased in such draws, has none. Probabilities are of logits over the
    contract's temperature.

    A sample whose output is no number, or that cannot be read where ``on_bad`` bears it, is left out and said to be.

    Raises:  DataError for data without labels, or none; ModelError for outputs that these labels do not fit
    Source:  Wilson 1927; DeLong, DeLong & Clarke-Pearson 1988; Efron & Tibshirani 1993, chapter 13; Guo et al. 2017
             (arXiv 1706.04599) for calibration
    """
    dataset = as_dataset(data)
    gathered = Gathered(asked.contract, dataset)
    loader = Loader(dataset, batch_size=asked.contract.batch_size, workers="auto" if workers is None else workers,
                    on_bad=on_bad, bad_fraction=bad_fraction)  # fmt: skip
    with closing(loader):
        for batch in _readable(loader):
            gathered.add(batch, asked(batch), _labels(batch, gathered.target))
    return gathered.measured(loader)


class Gathered:
    """Takes outputs with their labels, a batch at a time, as an evaluation goes on; ``measured`` is what they come to.

    Raises:  DataError for data without labels, or none
    """

    def __init__(self, contract: Contract, dataset: KeyedDataset):
        names = contract.schema.targets or dataset.schema.targets
        if len(names) != 1 or len(dataset) == 0:
            raise DataError("there is nothing to measure by", where="evaluate", got=f"{len(dataset)} samples, targets "
                            f"{', '.join(names) or 'none'}", expected="labelled data with one target")  # fmt: skip
        self.target, self._contract, self._dataset = names[0], contract, dataset
        kind = contract.schema[self.target].kind if self.target in contract.schema else "label"
        self._positions = _Positions(contract, kind == "mask") if kind in ("mask", "tokens") else None
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self._lost: dict[int, str] = {}

    def add(self, batch: Batch, output: Any, target: Any) -> None:
        """Take a batch in: output (B, …), target (B, …); what is no tensor is left out."""
        if not isinstance(output, Tensor) or not isinstance(target, Tensor):
            return
        output, target, places = output.detach().float().cpu(), target.cpu(), batch[INDEX].cpu()
        if self._positions is None:
            self._parts.append((output, target, places))
        else:
            finite = _finite(output, places, self._lost)
            self._positions.add(output[finite], target[finite])

    def measured(self, loader: Loader) -> Measured:
        """What they come to; ``loader`` knows what could not be read.

        Raises:  DataError for labels that are not the model's; ModelError for outputs that they do not fit
        """
        if self._positions is not None:
            found = self._positions.measured(bool(self._lost))
        elif self._parts:
            outputs, labels, places = map(torch.cat, zip(*self._parts, strict=True))
            found = _told(self._contract, self._dataset, outputs, labels, places, self._lost)
        else:
            raise DataError("there is nothing to measure by", where="evaluate", got="no output with a label")
        lost = self._lost | {index: row.reason for index, row in loader.bad.items()}
        said = {id_of(self._dataset, index): lost[index] for index in sorted(lost)[:_MOST_WORST]}
        return replace(found, num_unanswered=len(lost), unanswered=said)


def _readable(loader: Loader) -> Iterator[Batch]:
    """The batches without what cannot be read."""
    return (valid_rows(batch) for batch in loader if VALID not in batch or bool(batch[VALID].any()))


def _labels(batch: Batch, name: str) -> Tensor:
    if name not in batch:
        raise DataError("these data have no labels to measure by", where="evaluate", got=", ".join(batch),
                        expected=f"{name!r}, as in training")  # fmt: skip
    return torch.as_tensor(batch[name]).cpu()


def _check_classes(labels: Tensor, num: int) -> None:
    if not len(labels) or int(labels.max()) >= num or int(labels.min()) < 0:
        raise DataError("these labels are not the model's", where="evaluate", got=f"labels {labels.min()} to "
                        f"{labels.max()}" if len(labels) else "no label", expected=f"0 to {num - 1}")  # fmt: skip


def _finite(outputs: Tensor, places: Tensor, lost: dict[int, str]) -> Tensor:
    """Of which samples the output is a number, (N,); the others are put to those that are lost."""
    finite = torch.isfinite(outputs.reshape(len(outputs), -1)).all(1)
    lost |= dict.fromkeys(places[~finite].tolist(), _NO_NUMBER)
    return finite


def _none_is_finite() -> ModelError:
    return ModelError("no output of this model is a number", where="evaluate", got="NaN or infinity alone",
                      expected="finite outputs")  # fmt: skip


def _told(
    contract: Contract, dataset: KeyedDataset, outputs: Tensor, labels: Tensor, places: Tensor, lost: dict[int, str]
) -> Measured:
    if outputs.ndim > 2 or (outputs.ndim == 2 and labels.ndim == 2 and outputs.shape != labels.shape):
        raise ModelError("these outputs are of no kind that is measured", where="evaluate",
                         got=f"outputs {tuple(outputs.shape)}, labels {tuple(labels.shape)}",
                         expected="(N, K) logits or (N,) numbers")  # fmt: skip
    finite = _finite(outputs, places, lost)
    outputs, labels, places = outputs[finite], labels[finite], places[finite]
    if not len(outputs):
        raise _none_is_finite()
    loss = contract.loss
    target = contract.target
    is_binary = loss == "binary_cross_entropy"
    if (
        (target is not None and target.kind in ("number", "vector"))
        or loss == "mse"
        or not (is_binary or outputs.ndim == 2)
    ):
        return _of_numbers(dataset, outputs, labels, places)
    logits = outputs / contract.temperature
    if is_binary and logits.ndim == 2 and logits.shape[1] > 1:
        return _of_several(contract, dataset, logits, labels, places)
    if is_binary or logits.shape[1] == 1:  # one logit: the softmax of 0 and it is its sigmoid
        one = logits.reshape(len(logits))
        logits, labels = torch.stack([torch.zeros_like(one), one], 1), labels.reshape(len(one))
    return _of_classes(contract, dataset, logits, labels, places)


# --- classes


def _of_classes(contract: Contract, dataset: KeyedDataset, logits: Tensor, labels: Tensor, places: Tensor) -> Measured:
    if labels.is_floating_point() and labels.ndim == 2:
        labels = labels.argmax(1)
    kept = labels != IGNORED
    logits, labels, places = logits[kept].double(), labels[kept].long(), places[kept]
    num = logits.shape[1]
    _check_classes(labels, num)
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
    metrics |= _macro(counts)
    costs = -logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
    rows = _redrawn(torch.stack([costs, squares], 1).numpy())
    metrics |= {"log_loss": _ends(rows[:, 0]), "brier": _ends(rows[:, 1])}
    gap = expected_error(sure, right)
    metrics["calibration_error"] = (gap, gap, gap)
    yes = labels[:, None] == torch.arange(num)
    metrics |= _area(*((p[:, 1:], yes[:, 1:]) if num == 2 else (p, yes)))
    wrong = torch.where(right, -1.0, sure).topk(min(_MOST_WORST, int((~right).sum()))).indices.tolist()
    classes, calibration = _classes(contract, num), contract.calibration
    if calibration:
        plain, _ = (logits * contract.temperature).softmax(1).max(1)
        calibration = {**calibration, "ece_here_before": expected_error(plain, right), "ece_here_after": gap}
    worst = [Worst(int(places[i]), id_of(dataset, int(places[i])), classes[int(labels[i])], classes[int(answers[i])],
                   float(sure[i])) for i in wrong]  # fmt: skip
    return Measured(len(labels), metrics, tuple(classes), _each(counts), counts.tolist(), bins_of(sure, right), worst,
                    calibration)  # fmt: skip


def _classes(contract: Contract, num: int) -> list[str]:
    named = contract.classes
    return [named[i] if i < len(named) else str(i) for i in range(num)]


def _each(counts: Array) -> list[dict[str, float]]:
    shares = _shares(counts.diagonal(), counts.sum(0), counts.sum(1))
    return [{"precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
            for p, r, f, n in zip(*shares, counts.sum(1), strict=True)]  # fmt: skip


def _shares(hits: Array, given: Array, true: Array) -> tuple[Array, Array, Array]:
    """Precision, recall and F1 of each class; 0 where nothing is divided."""
    return hits / np.maximum(given, 1), hits / np.maximum(true, 1), 2 * hits / np.maximum(given + true, 1)


def _macro(counts: Array) -> dict[str, Interval]:
    """The means over the classes that occur, with the intervals of confusions (K, K) drawn again."""
    draws, total = np.random.Generator(np.random.Philox(key=0)), int(counts.sum())
    true, given = counts.nonzero()
    cells, is_hit, num = counts[true, given], true == given, len(counts)
    found = []
    for drawn in (cells, *draws.multinomial(total, cells / total, _DRAWS)):
        parts = [np.bincount(place, drawn[kept], num) for place, kept in
                 ((true[is_hit], is_hit), (given, slice(None)), (true, slice(None)))]  # fmt: skip
        occurs = parts[1] + parts[2] > 0
        found.append([values[occurs].mean() for values in _shares(*parts)])
    rows = np.array(found)
    return {name: _ends(rows[:, k]) for k, name in enumerate(("precision", "recall", "f1"))}


def _redrawn(columns: Array) -> Array:
    """The means of the samples' values (N, M), and under them those of 1,000 sets of samples drawn again, (1001, M).

    Of many samples means are drawn from the normal distribution that theirs then follow.
    """
    draws, total, means = np.random.Generator(np.random.Philox(key=0)), len(columns), columns.mean(0)
    if total <= _MOST_DRAWN:
        counts = draws.multinomial(total, np.full(total, 1 / total), _DRAWS)
        return np.vstack([means, counts.astype(np.float64) @ columns / total])
    spread = np.cov(columns, rowvar=False).reshape(len(means), -1) / total
    return np.vstack([means, draws.multivariate_normal(means, spread, _DRAWS, "ignore", method="eigh")])


def _ends(rows: Array) -> Interval:
    """The value, which comes first, and where 95 % of those drawn lie."""
    low, high = np.quantile(rows[1:], (0.025, 0.975))
    return float(rows[0]), float(low), float(high)


def _share(hits: int, total: int) -> Interval:
    """A share with Wilson's interval."""
    p, z = hits / total, _NORMAL
    middle = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return p, max(0.0, min(middle - half, p)), min(1.0, max(middle + half, p))


def _pulled(value: float, pulls: Array) -> Interval:
    """A share with the interval that follows from how far each sample pulls it."""
    half = _NORMAL * float(pulls.std()) / math.sqrt(len(pulls))
    return value, max(0.0, value - half), min(1.0, value + half)


def _area(probabilities: Tensor, labels: Tensor) -> dict[str, Interval]:
    """The mean area under the ROC curve of each class against the rest, (N, K) both; nothing where none has both."""
    areas, pulls, total = [], np.zeros(len(labels)), len(labels)
    for p, yes in zip(probabilities.numpy().T, labels.numpy().T, strict=True):
        num_yes, num_no = int(yes.sum()), int((~yes).sum())
        if not num_yes or not num_no:
            continue
        ranks = _ranks(p)
        below = (ranks[yes] - _ranks(p[yes])) / num_no  # of the others, for each that is of the class
        above = 1 - (ranks[~yes] - _ranks(p[~yes])) / num_yes
        areas.append(float(below.mean()))
        pulls[yes] += (below - areas[-1]) * total / num_yes
        pulls[~yes] += (above - areas[-1]) * total / num_no
    return {"auroc": _pulled(float(np.mean(areas)), pulls / len(areas))} if areas else {}


def _ranks(values: Array) -> Array:
    """Ranks from 1, of equal values the mean of theirs."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(count) - (count - 1) / 2)[place])


# --- several labels, numbers, positions


def _of_several(contract: Contract, dataset: KeyedDataset, logits: Tensor, labels: Tensor, places: Tensor) -> Measured:
    p, true = logits.double().sigmoid(), labels > 0.5
    said = p > 0.5
    whole = (said == true).all(1)
    costs = F.binary_cross_entropy_with_logits(logits.double(), true.double(), reduction="none").mean(1)
    rows = _redrawn(torch.stack([costs, (said == true).double().mean(1)], 1).numpy())
    metrics = {"exact_match": _share(int(whole.sum()), len(whole)), "log_loss": _ends(rows[:, 0]),
               "accuracy": _ends(rows[:, 1])}  # fmt: skip
    sure, right = torch.maximum(p, 1 - p).flatten(), (said == true).flatten()
    gap = expected_error(sure, right)
    hits, sides = said & true, said.double() + true
    f1 = 2 * hits.sum(0) / sides.sum(0).clamp(min=1)
    pulls = ((2 * hits - f1 * sides) / sides.mean(0).clamp(min=1 / len(p))).mean(1)
    metrics |= {"f1": _pulled(float(f1.mean()), pulls.numpy()), "calibration_error": (gap, gap, gap), **_area(p, true)}
    classes = _classes(contract, p.shape[1])
    slips = torch.where(said == true, 0.0, torch.maximum(p, 1 - p)).amax(1)  # how sure the surest of them is
    wrong = slips.topk(min(_MOST_WORST, int((~whole).sum()))).indices.tolist()
    worst = [Worst(int(places[i]), id_of(dataset, int(places[i])), _joined(true[i], classes), _joined(said[i], classes),
                   float(slips[i])) for i in wrong]  # fmt: skip
    each = [_each(_pairs(said[:, k], true[:, k]))[1] for k in range(p.shape[1])]
    return Measured(len(p), metrics, tuple(classes), each, [], bins_of(sure, right), worst,
                    contract.calibration)  # fmt: skip


def _pairs(said: Tensor, true: Tensor) -> Array:
    return torch.bincount(true.long() * 2 + said.long(), minlength=4).reshape(2, 2).numpy()


def _joined(chosen: Tensor, classes: list[str]) -> str:
    return "|".join(classes[k] for k in chosen.nonzero()[:, 0].tolist()) or "none"


def _of_numbers(dataset: KeyedDataset, outputs: Tensor, labels: Tensor, places: Tensor) -> Measured:
    found, true = (part.double().reshape(len(part), -1).numpy() for part in (outputs, labels))
    if found.shape != true.shape:
        raise ModelError("outputs and labels are not as many", where="evaluate", got=f"outputs {found.shape}",
                         expected=f"labels {true.shape}")  # fmt: skip
    gaps, centred = found - true, true - true.mean(0)
    sizes, num = np.abs(gaps).mean(1), true.shape[1]
    rows = _redrawn(np.column_stack([sizes, gaps.mean(1), np.square(gaps).mean(1), centred, np.square(centred)]))
    spread = (rows[:, 3 + num :] - np.square(rows[:, 3 : 3 + num])).mean(1)
    metrics = {"mean_absolute_error": _ends(rows[:, 0]), "bias": _ends(rows[:, 1]),
               "rmse": _ends(np.sqrt(np.maximum(rows[:, 2], 0)))}  # fmt: skip
    if (spread > 0).all():
        metrics["r2"] = _ends(1 - rows[:, 2] / spread)
    metrics |= {f"error_at_{share:.0%}": _quantile(np.sort(sizes), share) for share in (0.5, 0.9, 0.99)}
    worst = [Worst(int(places[i]), id_of(dataset, int(places[i])), _row(true[i]), _row(found[i]), float(sizes[i]))
             for i in np.argsort(-sizes, kind="stable")[:_MOST_WORST]]  # fmt: skip
    return Measured(len(gaps), metrics, worst=worst)


def _quantile(ordered: Array, share: float) -> Interval:
    """A quantile between the values of those ranks that hold it; none where there are too few samples for them."""
    value, total = float(np.quantile(ordered, share)), len(ordered)
    half = _NORMAL * math.sqrt(total * share * (1 - share))
    low, high = math.floor(total * share - half), math.ceil(total * share + half)
    return (value, float(ordered[low]), float(ordered[high])) if low >= 0 and high < total else (value, value, value)


def _row(values: Array) -> str:
    return ", ".join(map(format_number, values[:4].tolist())) + (", …" if len(values) > 4 else "")


class _Positions:
    """Masks and next tokens: each pixel or token counts; the samples, which they are not, are drawn again."""

    def __init__(self, contract: Contract, is_mask: bool):
        self._contract, self._is_mask = contract, is_mask
        self._parts: list[Tensor] = []
        self._counts: Tensor | None = None

    def add(self, output: Tensor, label: Tensor) -> None:
        output = output / self._contract.temperature
        found, true = classes_of(output, label)
        kept = (true != IGNORED) & (true != _MASK_IGNORED if self._is_mask else true >= 0)
        is_one = output.ndim == true.ndim or output.shape[1] == 1
        num = 2 if is_one else output.shape[2 if classes_are_last(output, true) else 1]
        if kept.any():
            _check_classes(true[kept], num)
        costs = _costs(output, true.where(kept, IGNORED).long(), is_one)
        sums = torch.stack([(found == true).double() * kept, costs.double() * kept, kept.double()])
        self._parts.append(sums.flatten(2).sum(2).T)
        if self._is_mask:
            more = torch.bincount(true[kept].long() * num + found[kept], minlength=num * num).reshape(num, num)
            self._counts = more if self._counts is None else self._counts + more

    def measured(self, has_lost: bool) -> Measured:
        columns = torch.cat(self._parts).numpy() if self._parts else np.empty((0, 3))
        columns = columns[columns[:, 2] > 0]
        if not len(columns):
            raise _none_is_finite() if has_lost else DataError(
                "there is nothing to measure by", where="evaluate", got="no position with a class")  # fmt: skip
        rows = _redrawn(columns)
        metrics = {"accuracy": _ends(rows[:, 0] / rows[:, 2]), "log_loss": _ends(rows[:, 1] / rows[:, 2])}
        if self._counts is None:
            metrics["perplexity"] = _ends(np.exp(rows[:, 1] / rows[:, 2]))
            return Measured(len(columns), metrics)
        table = self._counts.numpy()
        union = table.sum(0) + table.sum(1) - table.diagonal()
        iou = float((table.diagonal()[union > 0] / union[union > 0]).mean())
        metrics["mean_iou"] = (iou, iou, iou)
        classes = tuple(_classes(self._contract, len(table)))
        return Measured(len(columns), metrics, classes, _each(table), table.tolist())


def _costs(output: Tensor, true: Tensor, is_one: bool) -> Tensor:
    """The log loss at each position."""
    if is_one:
        return F.binary_cross_entropy_with_logits(output.reshape(true.shape), (true > 0).float(), reduction="none")
    logits = output.movedim(2, 1) if classes_are_last(output, true) else output
    return F.cross_entropy(logits, true, ignore_index=IGNORED, reduction="none")
