"""A linear probe: the best linear head on features that were computed once, its strength found by cross-validation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ..chance import ChanceKey, keyed_bits
from ..errors import BadSampleError, DataError, LabelError, ModelError

STRENGTHS = tuple(10.0 ** (half / 2) for half in range(4, -9, -1))
"""The strengths tried, from 1e2 to 1e-4: the factor of ½‖weight‖² beside a mean over samples."""

_EXACT_NUMBERS = 1 << 22  # up to 32 MB of features are solved in float64
_CHUNK_NUMBERS = 1 << 23  # outputs held at once: 64 MB
_PATIENCE = 3  # a path that has got worse so often in a row is not followed into its costly weak end
_BIAS_PENALTY = 1e-12  # leaves the bias free, and the equations solvable where a fold has no sample


@dataclass(frozen=True)
class Probe:
    """A linear head, and how it was chosen.

    ``accuracy`` is that of held-out samples (for targets that are numbers R²), each predicted by the fold that did not
    see it; ``loss`` likewise their mean log-loss (squared error); ``scores`` the accuracy by strength. ``weight`` and
    ``bias`` are fitted to all samples.

    Shapes:  weight (C, D), bias (C,), float32, for features as they came
    """

    weight: Tensor
    bias: Tensor
    regularisation: float
    accuracy: float
    loss: float
    scores: dict[float, float]

    def logits(self, features_BD: Tensor) -> Tensor:
        """Shapes:  features (B, D) → (B, C), float32"""
        return features_BD.to(self.weight) @ self.weight.T + self.bias

    def put(self, head: nn.Linear) -> None:
        """Write the solution into the model's head.

        Raises:  ModelError where the head has another shape or no bias
        """
        if head.weight.shape != self.weight.shape or head.bias is None:
            raise ModelError(
                "the probe does not fit this head", where="model.head", got=str(head),
                expected=f"Linear(in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}, bias=True)",
            )  # fmt: skip
        with torch.no_grad():
            head.weight.copy_(self.weight)
            head.bias.copy_(self.bias)


@dataclass(frozen=True)
class _Problem:
    """One column for each fold and a last one for all samples: these fits go down the path side by side.

    Shapes:  inputs (N, D + 1) standardised, the last column ones; share (N, F + 1), a sample's part in each mean
    """

    inputs: Tensor
    labels: Tensor
    fold_of: Tensor
    share: Tensor

    def chunks(self, num_outputs: int) -> list[slice]:
        size = max(1, _CHUNK_NUMBERS // (num_outputs * self.share.shape[1]))
        return [slice(start, start + size) for start in range(0, len(self.inputs), size)]


def fit_probe(
    features: Tensor, labels: Tensor, num_classes: int, *, folds: int = 5, seed: int = 0,
    strengths: Sequence[float] | None = None,
) -> Probe:  # fmt: skip
    """Multinomial logistic regression, or ridge regression where the labels are floats, on standardised features.

    The strength is the one with the best held-out accuracy over stratified folds, by log-loss where these are equal.
    Folds depend on (seed, labels) alone. Standardisation uses all samples, and no label. The memory taken is about that
    of one more copy of the features in float32.

    Shapes:  features (N, D); labels (N,) int64 in [0, num_classes), or (N,) or (N, C) floats
    Raises:  DataError without samples, BadSampleError for one that is not finite, LabelError for a label out of range
    Source:  Kornblith, Shlens, Le 2019, "Do better ImageNet models transfer better?" (a path of L2-regularised
             probes); Nocedal & Wright 2006, algorithm 7.5 (L-BFGS)
    """
    is_classes = not labels.is_floating_point()
    _check(features, labels, num_classes)
    inputs, mean, scale, basis = _standardised(features)
    labels = labels.to(inputs.device).long() if is_classes else labels.to(inputs).reshape(len(labels), -1)
    fold_of = _folds(labels if is_classes else torch.zeros(len(labels)), folds, seed).to(inputs.device)
    is_in = fold_of[:, None] != torch.arange(int(fold_of.max()) + 2, device=inputs.device)
    problem = _Problem(inputs, labels, fold_of, is_in / is_in.sum(0).clamp(min=1).to(inputs.dtype))
    path = _logistic_path if is_classes else _ridge_path

    scores: dict[float, float] = {}
    best, lowest, num_worse, chosen, solution = (-math.inf, -math.inf), math.inf, 0, 0.0, inputs
    for strength, theta in path(problem, num_classes, sorted(strengths or STRENGTHS, reverse=True)):
        scores[strength], loss = _held_out_score(problem, theta)
        is_best = (scores[strength], -loss) > best
        num_worse = 0 if is_best or loss < lowest else num_worse + 1
        lowest = min(lowest, loss)
        if is_best:
            best, chosen, solution = (scores[strength], -loss), strength, theta[-1].to(torch.float64, copy=True)
        if num_worse == _PATIENCE:
            break
    weight, bias = solution[:, :-1], solution[:, -1]
    weight = (weight if basis is None else weight @ basis.double().T) / scale.double()
    return Probe(weight.float(), (bias - weight @ mean.double()).float(), chosen, best[0], -best[1], scores)


def interpolate(a: Mapping[str, Tensor], b: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Weights on the line from ``a`` (share 0) to ``b`` (share 1); what is no float is taken from ``b``.

    What is equal in both keeps its bits.

    Source:  Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", equation 1
    """
    return {n: torch.lerp(a[n], b[n], share) if b[n].is_floating_point() else b[n].clone() for n in b}


def _check(features: Tensor, labels: Tensor, num_classes: int) -> None:
    assert features.ndim == 2
    assert len(features) == len(labels)
    if not len(features):
        raise DataError("a probe needs samples", where="data.train", got="0 samples", expected="at least one")
    is_classes = not labels.is_floating_point()
    wrong = (labels < 0) | (labels >= num_classes) if is_classes else ~torch.isfinite(labels.reshape(len(labels), -1))
    rows = wrong.reshape(len(labels), -1).any(1).nonzero().flatten().tolist()
    if rows:
        values = sorted(set(labels[rows[:1000]].flatten().tolist()), key=str)
        raise LabelError(
            "a label that a probe cannot learn", rows, got=f"label {', '.join(map(str, values[:10]))}",
            expected=f"0 to {num_classes - 1}" if is_classes else "finite numbers",
            fix="torchkeep survey DATA shows the labels; mend them",
        )  # fmt: skip


def _standardised(features: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The inputs of a problem; mean and scale (D,); and the basis (D, N) where samples are fewer than features.

    Such features are rotated into the space that the samples span: the solution lies in it, and its norm is the same.

    Raises:  BadSampleError for a sample that is not finite
    """
    num_samples, num_features = features.shape
    dtype = torch.float64 if features.numel() <= _EXACT_NUMBERS else torch.float32
    device = "cpu" if features.device.type == "mps" else features.device  # which has no float64
    inputs = torch.ones(num_samples, num_features + 1, dtype=dtype, device=device)
    x = inputs[:, :-1].copy_(features)
    # a sum is finite where all its terms are, and takes no second copy
    bad = (~torch.isfinite(x.sum(1))).nonzero().flatten().tolist()
    if bad:
        raise BadSampleError(
            "the features of a sample are not finite", where=f"sample {', '.join(map(str, bad[:10]))}",
            got=f"NaN or infinity in {len(bad):,} of {num_samples:,} samples", expected="finite numbers",
            fix='train.precision = "fp32", or mend the sample or the weights',
        )  # fmt: skip
    variance, mean = torch.var_mean(x, 0, correction=0)
    deviation = variance.sqrt()
    # the spread of a constant feature is rounding, which must not be blown up to 1
    scale = torch.where(deviation > 1e-6 * mean.abs(), deviation, 1.0)
    x.sub_(mean).div_(scale)
    if num_samples >= num_features:
        return inputs, mean, scale, None
    basis, triangle = torch.linalg.qr(x.T)
    return torch.cat([triangle.T, inputs[:, -1:]], 1), mean, scale, basis


def _folds(labels: Tensor, folds: int, seed: int) -> Tensor:
    """The fold of each sample: classes are dealt out one after another, each in the order of a keyed draw."""
    draws = keyed_bits(ChanceKey(seed), "probe", np.arange(len(labels)))
    order = np.lexsort((draws, labels.cpu().numpy()))
    fold_of = np.empty(len(labels), np.int64)
    fold_of[order] = np.arange(len(labels)) % folds
    return torch.from_numpy(fold_of)


def _logistic_path(problem: _Problem, num_classes: int, strengths: Sequence[float]) -> Iterator[tuple[float, Tensor]]:
    """Solutions (F + 1, C, D + 1), each begun from that of the strength before."""
    is_exact = problem.inputs.dtype == torch.float64
    theta = problem.inputs.new_zeros(problem.share.shape[1], num_classes, problem.inputs.shape[1])
    for strength in strengths:
        solver = torch.optim.LBFGS(
            [theta], max_iter=500, history_size=10, line_search_fn="strong_wolfe",
            tolerance_grad=1e-7 if is_exact else 1e-4, tolerance_change=1e-11 if is_exact else 1e-7,
        )  # fmt: skip
        solver.step(partial(_loss_and_gradient, problem, theta, strength))  # type: ignore[no-untyped-call]
        yield strength, theta


def _loss_and_gradient(problem: _Problem, theta: Tensor, strength: float) -> float:
    """What L-BFGS asks for: the sum of all fits' losses, and its gradient in closed form, put beside ``theta``."""
    loss = strength / 2 * float(theta[..., :-1].square().sum(dtype=torch.float64))
    gradient = theta * strength
    gradient[..., -1] = 0
    for rows in problem.chunks(theta.shape[1]):
        x, share = problem.inputs[rows], problem.share[rows]
        logs = _outputs(x, theta).log_softmax(2)
        places = problem.labels[rows, None, None].expand(-1, share.shape[1], 1)
        loss -= float((share * logs.gather(2, places).squeeze(2)).sum(dtype=torch.float64))
        slope = logs.exp_().scatter_add_(2, places, torch.full_like(places, -1, dtype=logs.dtype))
        gradient += ((slope * share[..., None]).flatten(1).T @ x).view_as(theta)
    theta.grad = gradient
    return loss


def _ridge_path(problem: _Problem, num_classes: int, strengths: Sequence[float]) -> Iterator[tuple[float, Tensor]]:
    """Solutions (F + 1, C, D + 1) of the normal equations; a fold's are those of all samples without its own."""
    num_folds, num_inputs = problem.share.shape[1] - 1, problem.inputs.shape[1]
    own = problem.inputs.new_zeros(num_folds + 1, num_inputs, num_inputs + problem.labels.shape[1], dtype=torch.float64)
    for fold in range(num_folds):
        for rows in torch.split((problem.fold_of == fold).nonzero()[:, 0], max(1, _CHUNK_NUMBERS // num_inputs)):
            x = problem.inputs[rows].double()
            own[fold] += x.T @ torch.cat([x, problem.labels[rows].double()], 1)
    counts = (problem.share > 0).sum(0).clamp(min=1)
    moments = (own.sum(0) - own) / counts[:, None, None]
    penalty = torch.ones(num_inputs, dtype=torch.float64, device=moments.device)
    for strength in strengths:
        penalty[:-1], penalty[-1] = strength, _BIAS_PENALTY
        left = moments[..., :num_inputs] + penalty.diag()
        yield strength, torch.linalg.solve(left, moments[..., num_inputs:]).mT.to(problem.inputs)


def _outputs(x: Tensor, theta: Tensor) -> Tensor:
    """Shapes:  x (B, D + 1), theta (F + 1, C, D + 1) → (B, F + 1, C)"""
    return (x @ theta.flatten(0, 1).T).view(len(x), *theta.shape[:2])


def _held_out_score(problem: _Problem, theta: Tensor) -> tuple[float, float]:
    """Accuracy and log-loss, or R² and squared error, where each sample is predicted by the fold without it."""
    parts = [
        _outputs(problem.inputs[rows], theta).take_along_dim(problem.fold_of[rows, None, None], 1).squeeze(1)
        for rows in problem.chunks(theta.shape[1])
    ]
    outputs, labels = torch.cat(parts).double(), problem.labels
    if not labels.is_floating_point():
        is_right = outputs.argmax(1) == labels
        return float(is_right.double().mean()), float(nn.functional.cross_entropy(outputs, labels))
    error = (labels.double() - outputs).square().mean()
    spread = labels.double().var(0, correction=0).mean()
    return float(1 - error / spread) if spread > 0 else 0.0, float(error)
