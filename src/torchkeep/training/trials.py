"""The full checks before a training: a little is trained, and looked at. Those of the data are in ``trials_data``.

Whatever a check moves is put back after it; within a check, what several trainings begin with is put back between them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import gradients
from ..contracts import INDEX, Batch
from ..data.dataset import whole
from ..data.reading import tensors_in
from ..data.samples import digest_of
from ..errors import CheckpointError
from ..generators import keyed_generators
from ..model.build import build_model
from ..model.flow import tensors
from ..model.freeze import begin_training, evaluating
from ..model.hub import is_hub_name
from ..model.untouched import untouched
from ..tensors import pack, parse_json, read_safetensors, to_json, to_safetensors, unpack
from ..watch.console import format_number
from .binding import Binding
from .device import autocast
from .objective import classes_are_last
from .recipe import Recipe
from .subject import Finding, Subject, error, first_rows, passed, skipped, taken_rows, warning
from .trials_data import augmentation, classes, leak, samples, splits_apart

_LEARNING_STEPS, _RATES = 60, (1e-2, 1e-3, 1e-4)
_FALLEN = 0.95  # of the first loss; what learns at all gets far below it with so few samples
_FEW_STEPS = 5
_RANGE_STEPS, _RANGE_S = 30, 4.0
_TAIL, _POINTS = 10, 60
_SCALES_UP, _SCALES_DOWN = (1e2, 1e4, 1e6, 1e8, 1e10), (0.1, 1e-2, 1e-3, 1e-4)
_NOTHING = 1e-4  # of what another rate gains in a few updates
_DRAWN = 16  # numbers, all different, tell a drawn tensor from one that was made by a rule
_SLOPE = 1e-5
_MUCH_BETTER, _ALL_BUT_NOTHING = 2.5, 0.01


# --- a little training


@contextlib.contextmanager
def _training(subject: Subject) -> Iterator[None]:
    """Train mode without dropout, which would hide how a loss falls; what is learned meanwhile is forgotten."""
    with untouched(subject.model, parameters=True):
        begin_training(subject.model)
        for module in subject.model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.p < 1:
                module.p = 0.0
            elif isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
        yield


def _updates(
    subject: Subject, batch: Batch, optimizer: torch.optim.Optimizer, count: int,
    before: Callable[[int], None] = lambda step: None, enough: float = -math.inf,
) -> list[float]:  # fmt: skip
    """The losses before each of some updates with one batch; fewer where time is up, or a loss is no number.

    ``before`` is called with the step's number; the rest is left out once a loss is below ``enough`` of the first.
    """
    losses: list[float] = []
    for step in range(count):
        gradients.clear(subject.prepared.optimizers.parameters)
        losses.append(float(next(iter(subject.backward(batch).values()))))
        is_enough = losses[-1] < enough * losses[0] and losses[0] > 0
        if is_enough or subject.is_late or not math.isfinite(losses[-1]):
            break
        before(step)
        optimizer.step()
    return losses


def _own_adam(subject: Subject, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW([parameter for _, parameter in subject.parameters], rate, weight_decay=0.0)


def _hindrance(subject: Subject) -> Finding | None:
    """What keeps a check from training a little with the one loss that is to fall; None for nothing."""
    is_own = subject.work.step is not None
    if is_own and (len(subject.prepared.optimizers.by_name) > 1 or len(subject.first_pass.losses) > 1):
        return skipped("a step of your own with several losses, which need not fall")
    return None if subject.parameters else skipped("nothing learns")


def _answer(subject: Subject, batch: Batch, binding: Binding | None = None) -> list[Tensor]:
    """Every tensor that the model, or that of another binding, gives in eval mode."""
    binding = binding or subject.binding
    with evaluating(binding.model), torch.no_grad(), autocast(subject.prepared.precision, subject.prepared.device):
        output = binding.whole(batch)
    return tensors(output)


# --- what is learned


def one_batch_learned(subject: Subject) -> Finding:
    """So few samples can be learned by heart by whatever learns at all, at one rate or another."""
    hindrance = _hindrance(subject)
    if hindrance is not None:
        return hindrance
    few = _unlike(subject)
    tried: dict[float, list[float]] = {}
    for rate in _RATES:
        with _training(subject):
            losses = tried[rate] = _updates(subject, few, _own_adam(subject, rate), _LEARNING_STEPS, enough=0.5)
        best = min(filter(math.isfinite, losses), default=math.inf)
        if best <= losses[0] - (1 - _FALLEN) * abs(losses[0]):
            return passed(f"the loss of {_samples(few)} falls from {format_number(losses[0])} to {format_number(best)} "
                          f"in {len(losses)} updates")  # fmt: skip
    first = tried[_RATES[0]][0]
    if not math.isfinite(first):
        return skipped("the loss is not finite")
    if abs(first) < 0.01 or _is_known(subject, few):
        return passed(f"{_samples(few)} are known already: a loss of {format_number(first)}")
    if max(map(len, tried.values())) < _LEARNING_STEPS // 2:
        return skipped(f"no time: {max(map(len, tried.values()))} updates are too few to tell")
    best = min(filter(math.isfinite, (loss for losses in tried.values() for loss in losses)))
    return warning(f"the loss of {_samples(few)} stays at {format_number(best)}, from {format_number(first)}, at rates "
                   f"of {', '.join(map(format_number, _RATES))}", "a loss that falls towards 0: so few samples can be "
                   "learned by heart", "tk.inspect(model, batch) shows where gradients are 0; look for dead "
                   "activations, and at what comes between output and loss")  # fmt: skip


def _samples(batch: Batch) -> str:
    size = len(batch[INDEX])
    return f"{size} sample{'s' * (size > 1)}"


def _unlike(subject: Subject) -> Batch:
    """Two samples whose inputs and targets differ; four, where the target is a class or nothing, for numbers may lie
    anywhere: a line goes through two.
    """
    few, targets = subject.few, subject.targets
    is_number = isinstance(targets, Tensor) and targets.is_floating_point()
    truths = [digest_of(target) for target in targets] if isinstance(targets, Tensor) else []
    chosen: dict[str, int] = {}
    for wants_another in (True, False):
        known = {truths[row] for row in chosen.values() if truths}
        for row in range(len(few[INDEX])):
            alone = taken_rows(few, torch.tensor([row]))
            name = digest_of([alone.get(key) for key in subject.binding.keys])
            is_new = not truths or truths[row] not in known or not (wants_another or is_number)
            if name not in chosen and is_new and len(chosen) < (2 if is_number else 4):
                chosen[name] = row
                known |= {truths[row]} if truths else set()
    return taken_rows(few, torch.tensor(sorted(chosen.values())))


def _is_known(subject: Subject, batch: Batch) -> bool:
    """Whether every class is right: a loss with smoothed labels stays where it is then."""
    target = None if subject.work.step is not None else subject.binding.target(batch)
    if not isinstance(target, Tensor) or target.is_floating_point():
        return False
    output = subject.predicted(batch)
    return output.ndim == target.ndim + 1 and bool((output.argmax(-1 if classes_are_last(output, target) else 1)
                                                    == target).all())  # fmt: skip


def output_follows_input(subject: Subject) -> Finding:
    """Other inputs give other outputs, once a few updates have opened what begins closed, such as a head of zeros."""
    if subject.work.step is not None or not subject.parameters:
        return skipped("a step of your own calls the model itself" if subject.parameters else "nothing learns")
    few, binding, size = subject.few, subject.binding, len(subject.few[INDEX])
    names = [key for key in binding.keys if not (binding.makes_own_loss() and key in binding.targets)]
    rolled = taken_rows(few, torch.arange(size).roll(1))
    others = {key: rolled[key] for key in names if key in few and not _equal(rolled[key], few[key])}
    if not others:
        return skipped("the first samples do not differ")
    with _training(subject):
        _updates(subject, few, _own_adam(subject, 1e-3), _FEW_STEPS)
        own = _answer(subject, few)
        if _equal(_answer(subject, {**few, **others}), own):
            return error(f"the output is the same for {size} samples in another order of {', '.join(others)}, after "
                         f"{_FEW_STEPS} updates too", "other outputs for other inputs", "look for dead activations, a "
                         "layer of zeros, or an input that the forward does not use")  # fmt: skip
        unused = [key for key, value in others.items() if _equal(_answer(subject, {**few, key: value}), own)]
    unused = [key for key in unused if not callable(subject.work.inputs) and not _may_do_nothing(key)]
    if unused:
        return warning(f"{', '.join(unused)}: another order of it changes no output", "every input has an effect",
                       'use it in the forward, or leave it out with inputs="NAME"')  # fmt: skip
    return passed(f"{', '.join(others)}: another order gives another output")


def _may_do_nothing(key: str) -> bool:
    return any(word in key.lower() for word in ("mask", "length", "lens"))


def _equal(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors_in(one), tensors_in(other), strict=True))


# --- saving


def save_and_load(subject: Subject) -> Finding:
    """What a checkpoint holds of a model gives another one the same outputs, bit for bit."""
    if subject.work.step is not None:
        return skipped("a step of your own calls the model itself")
    own = _answer(subject, subject.few)
    if not _equal(own, _answer(subject, subject.few)):
        return skipped("two evaluations of the same samples differ")
    try:
        state = _through_bytes(subject.model.state_dict())
    except CheckpointError as problem:
        return error(f"{problem.where}: {problem.got}", problem.expected, problem.fix)
    unsaved = dict(_unsaved(subject.model))
    other = _after(subject, state, unsaved)
    if isinstance(other, str):
        return warning(f"the state does not fit another model: {other}", "the same names and shapes each time",
                       "build the model by its arguments alone")  # fmt: skip
    if not _equal(own, other):
        where = f": {', '.join(unsaved)} is not in the state" if unsaved else ""
        return warning(f"a model that was saved and loaded gives other outputs{where}", "the same, bit for bit",
                       'self.register_buffer("name", tensor) keeps a tensor in the state; nn.Parameter where it learns',
                       )  # fmt: skip
    return passed(f"the same outputs, {len(state):,} entries")


def _through_bytes(state: Any) -> Any:
    tree, tensors = pack(dict(state))
    stored = np.frombuffer(bytearray(b"".join(to_safetensors(tensors))), np.uint8)
    return unpack(parse_json(to_json(tree)), read_safetensors(stored))


def _unsaved(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that are no part of the state and look drawn: what a rule makes, it makes again in another model."""
    for name, module in model.named_modules():
        hidden = {key: module._buffers[key] for key in module._non_persistent_buffers_set}
        for key, value in {**vars(module), **hidden}.items():
            if isinstance(value, Tensor) and _looks_drawn(value.detach()):
                yield f"{name}.{key}".lstrip("."), value


def _looks_drawn(tensor: Tensor) -> bool:
    """Many numbers, each another, in no order, without a 0 or 1: masks, ranges, waves and windows are not so."""
    if not tensor.is_floating_point() or tensor.numel() < _DRAWN or not bool(tensor.isfinite().all()):
        return False
    values = tensor.flatten().double()
    slope = values.diff().sign()
    has_rule = bool(torch.isin(values, torch.tensor([0.0, 1.0], device=values.device, dtype=values.dtype)).any())
    return not has_rule and len(torch.unique(values)) == len(values) and len(torch.unique(slope)) > 1


@torch.no_grad()
def _after(subject: Subject, state: Any, unsaved: dict[str, Tensor]) -> list[Tensor] | str:
    """The outputs of a model that has nothing but the state; of a recipe's one that is built with another seed.

    Another model's state is the same one with all of its numbers gone: what is not saved does not come back.
    """
    work, twin = subject.work, _built_anew(subject)
    model = subject.model if twin is None else twin
    if twin is None:
        held = [value for value in model.state_dict(keep_vars=True).values() if isinstance(value, Tensor)]
        for tensor in (*held, *unsaved.values()):
            tensor.zero_()
    try:
        model.load_state_dict(state)
    except RuntimeError as problem:
        return str(problem).partition("\n")[2].strip()[:200]
    if twin is None:
        return _answer(subject, subject.few)
    binding = Binding(twin, subject.batch, work.train.schema.targets, work.inputs, work.targets,
                      subject.binding.makes_own_loss())  # fmt: skip
    return _answer(subject, subject.few, binding)


def _built_anew(subject: Subject) -> nn.Module | None:
    """The recipe's model with other numbers; None where it is an object, a hub's, or one with adapters in it."""
    work, settings = subject.work, subject.work.settings
    if not isinstance(settings, Recipe) or is_hub_name(settings.model.name):
        return None
    if settings.freeze is not None and settings.freeze.adapters is not None:
        return None
    cardinalities = getattr(whole(work.train), "cardinalities", ())
    with keyed_generators(settings.seed + 1):
        made = build_model(settings.model, work.train.schema, cardinalities, work.load, loads=False)
    return made.model.to(subject.prepared.device)


# --- micro-batches


def micro_batches(subject: Subject) -> Finding:
    """The gradient of parts, weighed as ``train.accumulate`` weighs them, is that of all samples at once."""
    size = len(subject.few[INDEX])
    hindrance = _hindrance(subject)
    if hindrance is not None or size < 2:
        return hindrance or skipped("it takes two samples")
    middle, few = max(1, size // 3), subject.few
    alone = [float(_count(subject, taken_rows(few, torch.tensor([row])))) for row in range(size)]
    order = torch.tensor(alone).argsort()  # as unequal as they can be
    parts = [taken_rows(few, order[slice(*span)]) for span in ((0, middle), (middle, size))]
    counts = [_count(subject, part) for part in parts]
    with untouched(subject.model), evaluating(subject.model):
        at_once = _gradient(subject, few)
        pieces = [_gradient(subject, p, c / sum(counts)) for p, c in zip(parts, counts, strict=True)]
        apart, tolerance = _apart(at_once, pieces), 1e-3 if subject.prepared.precision == "fp32" else 0.1
        said = f"the gradients of {middle} and {size - middle} samples make that of {size}"
        if apart <= tolerance:
            return passed(f"{said}, to {apart:.1g} of their size")
        if not _apart(at_once, [_gradient(subject, few)]) <= tolerance:
            return skipped("two gradients of the same samples differ")
    said = f"{said.replace('make', 'do not make')}: they are {apart:.2g} of their size apart"
    if subject.work.settings.train.accumulate == 1:
        return skipped(f"{said}, which is of no account without train.accumulate")
    return warning(said, "the same gradient", 'a loss that is a mean over its targets: no reduction="sum", no mean '
                   "over padding, nothing that compares samples; or train.accumulate = 1")  # fmt: skip


def _gradient(subject: Subject, batch: Batch, share: Any = 1) -> dict[str, Tensor]:
    """The gradient of a batch, times its share of the targets, by parameter."""
    subject.backward(batch)
    found = {name: p.grad.to_dense().float() * share for name, p in subject.parameters if p.grad is not None}
    gradients.clear(subject.model.parameters())
    return found


def _apart(at_once: dict[str, Tensor], pieces: list[dict[str, Tensor]]) -> float:
    """How far the pieces' sum is from the whole, in sizes of the pieces: they cancel out where all is learned."""
    names = at_once.keys() | {name for piece in pieces for name in piece}
    none = torch.zeros(())
    rest = [sum((piece.get(name, none) for piece in pieces), -at_once.get(name, none)) for name in names]
    size = sum(float(nn.utils.get_total_norm(piece.values())) for piece in pieces)
    return float(nn.utils.get_total_norm(rest)) / max(size, 1e-12)


def _count(subject: Subject, batch: Batch) -> Any:
    size = len(batch[INDEX])
    return size if subject.work.step is not None else subject.objective.count(subject.binding.target(batch), size)


# --- the learning rate


def learning_rate(subject: Subject) -> Finding:
    """A short range test with the run's own optimiser: its highest rate neither explodes nor stands still."""
    hindrance = _hindrance(subject)
    if hindrance is not None:
        return hindrance
    tried = _RangeTest(subject)
    own = tried.losses(1.0)
    first, size = own[0], max(abs(own[0]), 0.1)
    if not math.isfinite(first):
        return skipped("the loss is not finite")
    early = _ends_early(subject)
    if early:
        return early
    said = f"at the run's highest rate, {format_number(max(tried.peaks))}, the loss of a few samples"
    is_broken, end = not math.isfinite(own[-1]), statistics.median(own[-_TAIL:])
    if is_broken or (max(own) > first + 3 * size and end > first - 0.5 * size):
        better = tried.lower_rate((first if is_broken else end) - 0.25 * size)
        if is_broken or better:
            said += f", {format_number(first)}, is up to {format_number(max(own[1:]))} and at last {own[-1]:.3g}"
            return warning(said, "a loss that falls", f"optimizer.learning_rate = {better}, at which it does" if better
                           else "a far lower optimizer.learning_rate; look at the size of the inputs")  # fmt: skip
    elif min(own[-_TAIL:]) < first - 0.01 * size:
        lower = tried.losses(0.1)
        if lower[0] - min(lower[-_TAIL:]) > _MUCH_BETTER * (first - min(own[-_TAIL:])):
            ends = [format_number(min(losses[-_TAIL:])) for losses in (own, lower)]
            said += f" falls from {format_number(first)} to {ends[0]}, at a tenth of it to {ends[1]}"
            fix = f"optimizer.learning_rate = {max(tried.peaks) / 10:.1g}, or a warm-up"
            return warning(said, "a loss that falls as far as it can", fix)
        return passed(f"{said} falls from {format_number(first)} to {format_number(min(own[-_TAIL:]))}")
    if len(own) < _RANGE_STEPS:
        return skipped(f"no time: {len(own)} updates are too few to tell")
    if tried.rises(own):
        return warning(f"{said} rises from {format_number(first)} to {format_number(own[-1])}, and at lower rates too",
                       "a loss that falls", "maximize=False, or the loss's other sign")  # fmt: skip
    return tried.too_low(own) or passed(f"{said} stays about {format_number(first)}")


def _ends_early(subject: Subject) -> Finding | None:
    """What to say of a schedule that has all but ended the training when three quarters of it are left."""
    early = subject.prepared.total_steps // 4
    rates = [_rate_at(subject, step) for step in (early, 2 * early)]
    peak = _peaks(subject)[0]
    if not early or any(rate is None or rate >= _ALL_BUT_NOTHING * peak for rate in rates):
        return None
    return warning(f"after a quarter of the {subject.prepared.total_steps:,} steps the rate is {rates[0]:.1g}, from "
                   f"{peak:.1g}", "a rate at which something is learned until the end",
                   'schedule_every="epoch", or a schedule over all steps')  # fmt: skip


def _rate_at(subject: Subject, step: int) -> float | None:
    """The first group's rate then; None where a scheduler object has no formula for it."""
    optimizers = subject.prepared.optimizers
    if optimizers.scheduler is None:
        optimizers.set_rates(step)
        rate = float(optimizers.main.param_groups[0]["lr"])
        return rate if math.isfinite(rate) else None  # no function of the step has given it
    time = step if optimizers.steps_scheduler else step // subject.prepared.steps_per_epoch
    factors = getattr(optimizers.scheduler, "lr_lambdas", None)
    if factors:
        return float(optimizers.scheduler.base_lrs[0] * factors[0](time))
    if not hasattr(optimizers.scheduler, "_get_closed_form_lr"):
        return None
    ahead = copy.copy(optimizers.scheduler)
    ahead.last_epoch = time
    return float(ahead._get_closed_form_lr()[0])


class _RangeTest:
    """Some updates with the run's own optimiser at its highest rates, or so many times them; each from the start."""

    def __init__(self, subject: Subject):
        self.subject, self.optimizer = subject, subject.prepared.optimizers.main
        self.clip_norm = subject.work.settings.train.clip_norm
        self.peaks = _peaks(subject)
        # a whole test has a part of the time that there is
        one_s = subject.first_pass.seconds / len(subject.few[INDEX])
        rows = int(_RANGE_S / (_RANGE_STEPS * one_s)) if one_s else len(subject.few[INDEX])
        self.batch = first_rows(subject.few, max(4, rows))

    def losses(self, scale: float) -> list[float]:
        """Before each update; the rate rises over the first ten, as with a warm-up."""

        def prepare(step: int) -> None:
            rise = min(1.0, (step + 1) / 10)
            for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
                group["lr"] = peak * scale * rise
            if self.clip_norm is not None:
                gradients.clip(self.subject.prepared.optimizers.parameters, self.clip_norm)

        with _training(self.subject):
            self.optimizer.state.clear()
            return _updates(self.subject, self.batch, self.optimizer, _RANGE_STEPS, prepare)

    def lower_rate(self, below: float) -> str:
        """A rate at which the loss falls below this, where one is found in time."""
        for scale in _SCALES_DOWN:
            if self.losses(scale)[-1] < below:
                return f"{max(self.peaks) * scale:.1g}"
        return ""

    def rises(self, own: list[float]) -> bool:
        """Whether the loss goes up also where steps are small enough for it to go down, were the gradient followed."""
        if own[-1] < own[0] + 0.01 * abs(own[0]) or not self.is_steady:
            return False
        small = self.losses(_SCALES_DOWN[1])
        return len(small) > _TAIL and small[-1] > small[0] and small == sorted(small)

    def too_low(self, own: list[float]) -> Finding | None:
        """What to say where a rate of a hundred times as much learns and this one, over the whole run, does not."""
        if not self.is_steady or abs(own[0]) < 0.05 or _is_known(self.subject, self.batch):
            return None
        over_all = (own[0] - min(own)) * max(1.0, self.subject.prepared.total_steps / len(own))
        for scale in _SCALES_UP:
            gain = own[0] - min(filter(math.isfinite, self.losses(scale)))
            if gain > 0.1 * abs(own[0]):
                built = self.subject.work.built
                is_fresh = built is not None and built.report is None and gain > 0.3 * abs(own[0])
                least = max(_NOTHING * gain, 0.02 * abs(own[0]) if is_fresh else 0.0)
                rate, better = max(self.peaks), max(self.peaks) * scale
                said = f"at the run's highest rate, {format_number(rate)}, the loss does not move"
                return None if over_all > least else warning(
                    f"{said}; at {better:.1g} it falls by {format_number(gain)} in {_RANGE_STEPS} updates",
                    "a rate at which something is learned", f"optimizer.learning_rate = {better:.0e}",
                )  # fmt: skip
        return None

    @property
    def is_steady(self) -> bool:
        """Whether the same samples give the same loss, so that a small change of it means something."""
        with _training(self.subject):
            one, other = (float(self.subject.loss(self.batch).detach()) for _ in range(2))
        return one == other


def _peaks(subject: Subject) -> list[float]:
    """The highest rate of each group over the whole run, as far as schedules tell beforehand."""
    optimizers = subject.prepared.optimizers
    groups = optimizers.main.param_groups
    named = [max(float(group.get(key, 0)) for key in ("lr", "initial_lr", "max_lr")) for group in groups]
    if getattr(optimizers.scheduler, "lr_lambdas", None):
        points = np.linspace(0, optimizers.total_steps - 1, _POINTS).astype(int).tolist()
        factor = max(_rate_at(subject, step) or 0.0 for step in points) / max(optimizers.scheduler.base_lrs[0], 1e-30)
        named = [float(group.get("initial_lr", group["lr"])) * factor for group in groups]
    for group in groups:
        group["lr"] = math.nan  # stays where no function of the step gives the rate
    seen = []
    for step in np.linspace(0, optimizers.total_steps - 1, _POINTS).round().astype(int).tolist():
        optimizers.set_rates(step)
        seen.append([float(group["lr"]) for group in groups])
    return [rate if math.isfinite(rate) else own for rate, own in zip(np.max(seen, 0).tolist(), named, strict=True)]


# --- activations


def activations(subject: Subject) -> Finding:
    """An activation that is flat at every unit of every sample passes no gradient on: nothing before it learns."""
    hindrance = _hindrance(subject)
    if hindrance is not None:
        return hindrance
    with _training(subject):
        dead, count = _flat(subject)
        if dead:  # what begins closed and opens by itself is no mistake
            _updates(subject, subject.few, _own_adam(subject, 1e-3), _FEW_STEPS)
            dead &= _flat(subject)[0]
    if dead:
        return warning(f"{', '.join(sorted(dead))}: dead, or saturated, in all units for all {_samples(subject.few)}",
                       "a slope at some units", "look at the biases and weights before it, at the scale of its input, "
                       "and at a dropout of 1")  # fmt: skip
    return passed(f"{count:,} of {count:,} have a slope" if count else "there are no layers of activations")


def _flat(subject: Subject) -> tuple[set[str], int]:
    """The activations whose output no small change of the input changes, and how many were looked at."""
    slopes: dict[str, float] = {}

    def look(name: str, module: nn.Module, given: tuple[Any, ...]) -> None:
        if given and isinstance(given[0], Tensor) and given[0].numel():
            slopes[name] = max(slopes.get(name, 0.0), _slope(module, given[0].detach()))

    watched = {name: m for name, m in subject.model.named_modules() if _is_activation(m)}
    hooks = [module.register_forward_pre_hook(functools.partial(look, name)) for name, module in watched.items()]
    try:
        subject.losses(subject.few)
    finally:
        for hook in hooks:
            hook.remove()
    return {name for name, slope in slopes.items() if slope < _SLOPE}, len(slopes)


def _is_activation(module: nn.Module) -> bool:
    """One that takes each number alone; a dropout of 1, which leaves nothing, is one too."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p >= 1
    is_known = type(module).__module__ == nn.modules.activation.__name__
    return is_known and not isinstance(module, nn.MultiheadAttention | nn.GLU | nn.PReLU) and "max" not in (
        type(module).__name__.lower())  # fmt: skip


@torch.no_grad()
def _slope(module: nn.Module, given: Tensor) -> float:
    """The greatest slope over all numbers."""
    step = 1e-2 * given.abs().max().clamp(1e-3, 1.0)
    ahead, behind = (module.forward(given + by) for by in (step, -step))
    return float(((ahead - behind).abs().max() / (2 * step)).nan_to_num(torch.inf))


TRIALS: dict[str, Callable[[Subject], Finding]] = {
    "one batch learned": one_batch_learned, "output follows input": output_follows_input,
    "splits apart": splits_apart, "samples": samples, "classes": classes,
    "leak": leak, "augmentation": augmentation, "save and load": save_and_load,
    "micro-batches": micro_batches, "learning rate": learning_rate, "activations": activations,
}  # fmt: skip
"""The checks that train a little or look through the data, by name; each is undone before the next."""
