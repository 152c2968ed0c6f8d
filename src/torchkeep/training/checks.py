"""The quick checks before a training: one forward and backward of a few samples tells most mistakes.

What the loss's graph shows is read from torch.autograd's own nodes: their names are those of the operations.
"""

from __future__ import annotations

import itertools
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from .. import gradients
from ..data.reading import tensors_in
from ..data.survey import listed
from ..generators import keyed_generators
from ..model.flow import tensors
from ..model.followed import end_of, name_of, walk
from ..model.freeze import evaluating
from ..watch.console import format_number, format_seconds
from .objective import classes_are_last, prediction_of
from .subject import Finding, Subject, error, first_rows, passed, skipped, taken_rows, warning

_RESHAPES = ("View", "UnsafeView", "Unsqueeze", "Squeeze", "Transpose", "T", "Permute", "ToCopy", "Alias", "Clone",
             "Slice", "Select", "ReshapeAlias", "Expand")  # fmt: skip
_ERRORS_OF = ("Sub", "Rsub", "MseLoss", "L1Loss", "SmoothL1Loss", "HuberLoss")
_TAKES = {"LogSoftmax": "softmax", "BinaryCrossEntropyWithLogits": "sigmoid"}
_LINEAR = ("Addmm", "Mm", "Convolution", "Relu", "Softmax")
_SHORT_S = 0.2
_MOST_BATCHES = 64
_SHORTEST = 4
_SMALL = 0.02


# --- the loss


def first_loss(subject: Subject) -> Finding:
    """The loss before any update against that of guessing: ln(classes), or the variance of the target."""
    values = {name: float(loss) for name, loss in subject.first_pass.losses.items()}
    if not all(map(math.isfinite, values.values())):
        return error(f"{values} on the first samples", "a finite loss", "look at the inputs and at logarithms, roots "
                     "and divisions in model and loss: tk.trace_backward names the operation")  # fmt: skip
    value = next(iter(values.values()))
    guess = _loss_of_guessing(subject)
    if guess is None:
        return passed(f"{format_number(value)}; what guessing would give is not known for this loss")
    expected, why = guess
    said = f"{format_number(value)}, guessing gives {format_number(expected)} ({why})"
    if value > 2 * expected + 2:
        return warning(said, f"about {format_number(expected)}", "normalise the inputs (and a target of numbers), "
                       "or look at how the last layer is initialised")  # fmt: skip
    return passed(said)


def _loss_of_guessing(subject: Subject) -> tuple[float, str] | None:
    kind, target = _kind_of_loss(subject), subject.targets
    if kind is None or not isinstance(target, Tensor):
        return None
    if kind == "binary_cross_entropy":
        return math.log(2), "ln 2"
    if kind == "mse":
        is_scaled = subject.objective.name == "mse" and subject.target_field and subject.target_field.std != 1.0
        whole = subject.binding.target(subject.batch).float()
        return (1.0, "the target's variance") if is_scaled else (float(whole.var(correction=0)), "its variance")
    output = prediction_of(subject.output)
    if not isinstance(output, Tensor) or output.ndim < 2:
        return None
    num_classes = output.shape[-1 if classes_are_last(output, target) else 1]
    return math.log(max(2, num_classes)), f"ln {num_classes}"


def _kind_of_loss(subject: Subject) -> str | None:
    """The loss's name where it is one whose value for a guess is known."""
    name, loss = subject.objective.name, subject.work.loss
    if subject.work.step is not None:
        return None
    kinds = {nn.CrossEntropyLoss: "cross_entropy", nn.BCEWithLogitsLoss: "binary_cross_entropy", nn.MSELoss: "mse"}
    own = next((kind for type_, kind in kinds.items() if type(loss) is type_), None)
    if own is not None:
        return own if loss.reduction == "mean" and getattr(loss, "pos_weight", None) is None else None
    return name if name in kinds.values() else None


def direction(subject: Subject) -> Finding:
    """A loss of one's own falls where the output of the true class rises."""
    target, output = subject.targets, subject.output if subject.objective.name == "own" else None
    if not isinstance(target, Tensor) or not isinstance(output, Tensor) or target.is_floating_point():
        return skipped("it takes classes and a loss of your own")
    fits = output.ndim == 2 and target.shape == output.shape[:1]
    if not fits or not 0 <= int(target.min()) <= int(target.max()) < output.shape[1]:
        return skipped("it takes an output for each class")
    truth = nn.functional.one_hot(target, output.shape[1])
    with gradients.none_needed():
        rises = [float(subject.objective(output + step * truth, target)) for step in (0.0, 0.1, 1.0)]
    if rises[0] < rises[1] < rises[2]:
        return warning(f"the loss goes from {format_number(rises[0])} to {format_number(rises[2])} where the output of "
                       "the true class is 1 higher", "a loss that falls", "the other sign: -loss")  # fmt: skip
    return passed("it falls where the output of the true class rises")


def loss_attached(subject: Subject) -> Finding:
    """The loss must hang on the parameters: detached, nothing could learn."""
    names = [name for name, root in zip(subject.first_pass.losses, subject.first_pass.roots, strict=True)
             if not root.requires_grad]  # fmt: skip
    if names:
        return error(
            f"{', '.join(names)} has no graph: nothing can learn from it", "a loss made of the model's output",
            "look for .detach(), .item(), .data, torch.no_grad or a new torch.tensor between them",
        )  # fmt: skip
    return passed("it has a graph")


def probabilities_twice(subject: Subject) -> Finding:
    """Softmax or sigmoid before a loss that applies it itself, or none before one that wants it."""
    for node in _nodes_of(subject.first_pass.roots):
        name, maker = _name(node), _name(_maker(node))
        takes = _TAKES.get(name)
        if takes is not None and maker in ("Softmax", "Sigmoid", "Relu"):
            return warning(
                f"the loss takes the {takes} of what has been through {maker.lower()} already",
                "logits as the last layer gives them", f"leave out the model's last {maker.lower()}",
            )  # fmt: skip
        if name.startswith("BinaryCrossEntropy") and _is_outside(subject.targets):
            return warning(
                f"targets from {_reach(subject.targets)} in a loss of yes or no", "0 to 1",
                "a mask of 255 is divided by 255; several classes want cross_entropy",
            )  # fmt: skip
        if name == "BinaryCrossEntropy" and maker == "Softmax" and _has_several(subject.targets):
            return warning(
                "several classes of a sample are true, and softmax lets them add up to 1", "each class by itself",
                "sigmoid in its place, or logits and BCEWithLogitsLoss",
            )  # fmt: skip
        if name.startswith("NllLoss") and maker in _LINEAR:
            return warning(
                f"the negative log-likelihood is taken of what {maker.lower()} gives", "log-probabilities",
                "cross_entropy in its place, or log_softmax at the end of the model",
            )  # fmt: skip
    return passed("the loss gets what it takes")


def _is_outside(target: Any) -> bool:
    if not isinstance(target, Tensor) or not target.numel():
        return False
    return not 0 <= float(target.min()) <= float(target.max()) <= 1


def _reach(target: Any) -> str:
    return f"{format_number(float(target.min()))} to {format_number(float(target.max()))}"


def _has_several(target: Any) -> bool:
    """Whether some sample has another number of true classes than one."""
    return isinstance(target, Tensor) and target.ndim == 2 and bool((target.float().sum(1).round() != 1).any())


def sequence(subject: Subject) -> Finding:
    """A class for each place of a sequence: not the input itself, not seen ahead, and each met by its own output."""
    target, binding = subject.targets, subject.binding
    is_sequence = isinstance(target, Tensor) and target.ndim == 2 and not target.is_floating_point()
    output = prediction_of(subject.output) if is_sequence and not binding.makes_own_loss() else None
    if not isinstance(output, Tensor) or output.ndim != 3 or target.shape[1] < _SHORTEST:
        return skipped("no class is predicted for each place of a sequence")
    same = {key: subject.few[key] for key in binding.keys if getattr(subject.few.get(key), "shape", ()) == target.shape}
    for key, given in same.items():
        if torch.equal(given, target) and subject.work.targets is None:
            return warning(f"the target is {key} itself", "what is not known yet: the next one, or one left out",
                           "shift it by one, target[:, :-1] = input[:, 1:]")  # fmt: skip
        if torch.equal(given[:, 1:], target[:, :-1]) and _sees_ahead(subject, key, output):
            return warning(f"the output at earlier places changes with the last of {key}", "an output that knows what "
                           "came before it alone", "a causal mask: is_causal=True in the attention")  # fmt: skip
    return _places_apart(subject, output, target)


def _sees_ahead(subject: Subject, key: str, output: Tensor) -> bool:
    changed = subject.few[key].clone()
    changed[:, -1] = changed[:, 0].where(changed[:, 0] != changed[:, -1], changed[:, 1])
    with evaluating(subject.model), gradients.none_needed():
        other = prediction_of(subject.forward({**subject.few, key: changed}))
    axis = 1 if classes_are_last(output, subject.targets) else 2
    before, after = (held.narrow(axis, 0, held.shape[axis] - 1) for held in (output, other))
    return distance(before, after) > tolerance(subject)


def _places_apart(subject: Subject, output: Tensor, target: Tensor) -> Finding:
    """Places in another order, outputs and targets together, have the same loss: else they do not meet."""
    if subject.objective.name != "own" or not isinstance(subject.output, Tensor):
        return passed("each place has its own target")
    axis = 1 if classes_are_last(output, target) else 2
    own, other = (float(subject.objective(o, t)) for o, t in ((output, target), (output.flip(axis), target.flip(1))))
    if abs(own - other) > 1e-3 * abs(own):  # rounding alone changes a mean by less
        return warning(f"the loss is {format_number(own)}, with all places turned around {format_number(other)}",
                       "the same: each place has its own output and target", "transpose(1, 2) in place of view or "
                       "reshape, before cross_entropy")  # fmt: skip
    return passed("each place has its own target")


def broadcast(subject: Subject) -> Finding:
    """(B,) against (B, 1) gives a (B, B) table of differences, whose mean is nobody's loss."""
    size = len(subject.few["index"])
    for node in _nodes_of(subject.first_pass.roots) if size > 1 else ():
        made = [child for child, _ in node.next_functions if child is not None]
        if _name(node) not in _ERRORS_OF or len(made) != 1:  # of two outputs all pairs may be meant
            continue
        for child in made:
            wide, narrow = (child, _below(child)) if _name(child) == "Expand" else (node, child)
            if _shape(wide) == (size, size) and _shape(narrow) in ((size,), (size, 1)):
                return warning(
                    f"{_shape(narrow)} against a target of another form makes a table of {(size, size)} in the loss",
                    "equal shapes", "output.squeeze(-1), or target.unsqueeze(-1)",
                )  # fmt: skip
    return passed("output and target have one shape")


def _nodes_of(roots: Iterable[Tensor]) -> Iterator[Any]:
    """Every node of the graphs."""
    return (node for root in roots for node, _ in walk(root))


def _name(node: Any) -> str:
    return "" if node is None else name_of(node).partition("Backward")[0]


def _below(node: Any) -> Any:
    return node.next_functions[0][0] if node is not None and node.next_functions else None


def _maker(node: Any) -> Any:
    """What made a node's first input, through whatever only changes its shape."""
    found = _below(node)
    while _name(found) in _RESHAPES:
        found = _below(found)
    return found


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(node._input_metadata[0].shape) if node is not None and node._input_metadata else ()


# --- what learns


def gradients_reach(subject: Subject) -> Finding:
    """Every parameter that learns gets a gradient; one that some batch reaches is no mistake."""
    names, missing = [name for name, _ in subject.parameters], subject.first_pass.without_gradient
    if not names:
        return error("no parameter of the model learns", "at least one", "freeze less: requires_grad_(True)")
    end = time.perf_counter() + 2 * _SHORT_S
    for batch in itertools.chain([subject.few], subject.batches(_MOST_BATCHES)) if missing else ():
        # what is dropped by chance, or routed by the data, comes another time
        subject.backward(batch)
        missing = {name for name, p in subject.parameters if p.grad is None} & missing
        if not missing or time.perf_counter() > end:
            break
    gradients.clear(subject.model.parameters())
    broken = subject.first_pass.not_finite
    if broken:
        return error(f"that of {listed([name for name in names if name in broken])} is not finite", "finite numbers",
                     "tk.trace_backward(model, batch) names the operation: a root or a norm at 0, a division by 0",
                     )  # fmt: skip
    if not missing:
        return passed(f"{len(names):,} of {len(names):,} learning parameters get one")
    said = f"{len(missing):,} of {len(names):,} learning parameters get none: "
    said += listed([name for name in names if name in missing])
    fix = "use them in the forward, look for .detach() or torch.no_grad before the loss, or freeze.modules names them"
    return (error if len(missing) == len(names) else warning)(said, "one for each", fix)


def in_optimizer(subject: Subject) -> Finding:
    """Every parameter that learns is in the optimisers exactly once."""
    owned = [p for o in subject.prepared.optimizers.by_name.values() for g in o.param_groups for p in g["params"]]
    counts = {id(p): 0 for p in owned}
    for parameter in owned:
        counts[id(parameter)] += 1
    left_out = [name for name, p in subject.parameters if not counts.get(id(p))]
    twice = [name for name, p in subject.parameters if counts.get(id(p), 0) > 1]
    if left_out:
        said = f"{len(left_out):,} of {len(subject.parameters):,} learning parameters are in none: {listed(left_out)}"
        return warning(said, "each in one", "make the optimiser after the model's last change, of model.parameters()")
    if twice:
        said = f"{len(twice):,} parameters are moved by two optimisers: {listed(twice)}"
        return warning(said, "each in one", "give each optimiser its own part of the model")
    return passed(f"each of {len(subject.parameters):,} once")


def registered(subject: Subject) -> Finding:
    """What learns must be known to the model: what lies in a plain list is neither moved, saved nor taken to a GPU.

    An input that wants a gradient, for a derivative by it, is no parameter: it is made anew, as long as the batch.
    """
    owners = (subject.model, *subject.prepared.objects.values())
    known = {id(p) for owner in owners if isinstance(owner, nn.Module) for p in owner.parameters()}
    moved = {id(p) for p in subject.prepared.optimizers.parameters}
    leaves = [end_of(node) for node in _nodes_of(subject.first_pass.roots)]
    kept = {id(value) for module in subject.model.modules() for value in vars(module).values()}
    strange = [
        leaf for leaf in leaves if leaf is not None and leaf.requires_grad and id(leaf) not in known | moved
        and (isinstance(leaf, nn.Parameter) or id(leaf) in kept or leaf.shape[:1] != subject.few["index"].shape)
    ]  # fmt: skip
    hidden = [
        f"{name or 'model'}.{key}" for name, module in subject.model.named_modules()
        for key, value in vars(module).items() if not key.startswith("_") and _holds_modules(value, known)
    ]  # fmt: skip
    made = [
        f"{name or 'model'}.{key}" for name, module in subject.model.named_modules()
        for key, value in vars(module).items() if isinstance(value, Tensor) and value.grad_fn is not None
    ]  # fmt: skip
    if made and strange:
        return error(
            f"{listed(made)} is made of a parameter once, when the model is built: no second step can go backward "
            "through it", "a parameter of its own", "reckon first: nn.Parameter(0.02 * torch.randn(…))",
        )  # fmt: skip
    if strange or hidden:
        where = f" in {listed(hidden)}" if hidden else f", the first of shape {tuple(strange[0].shape)}"
        count = max(1, len(strange))
        return warning(f"{count} tensor{'s' * (count > 1)} with a gradient and no parameter of the model{where}",
                       "parameters", "nn.ModuleList or nn.ModuleDict for a list or dict of modules, nn.Parameter for a "
                       "tensor")  # fmt: skip
    return passed("all that learns is a parameter of the model")


def _holds_modules(value: Any, known: set[int]) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    modules = [part for part in inner if isinstance(part, nn.Module)]
    return any(p.requires_grad and id(p) not in known for module in modules for p in module.parameters())


# --- the samples


def labels(subject: Subject) -> Finding:
    """Targets that are numbers are finite, differ, and have a size that can be learned."""
    if subject.work.step is not None:
        return skipped("a step of your own finds its truth itself")
    targets = [t for t in tensors_in(subject.binding.target(subject.batch)) if t.is_floating_point() and t.numel()]
    if not targets:
        return passed("no numbers among them; classes are within the model's outputs")
    if not all(bool(target.isfinite().all()) for target in targets):
        return error("a target is not finite", "finite numbers", "leave the sample out, or fill the cell in")
    if any(subject.num_rows >= 8 and bool((target == target[0]).all()) for target in targets):
        seen = _rows_that_are_equal(subject, targets)
        if seen:
            return warning(f"the first {seen:,} targets are equal", "targets that differ",
                           "look at the column or function that gives the target")  # fmt: skip
    size = max(float(target.abs().max()) for target in targets)
    knows = subject.target_field is not None and subject.target_field.std != 1.0
    if size > 100 and not knows and _kind_of_loss(subject) == "mse":
        return warning(f"numbers up to {format_number(size)}", "about -3 to 3",
                       "(target - mean) / standard deviation; tk.Table does so by itself")  # fmt: skip
    return passed(f"finite numbers up to {format_number(size)}")


def _rows_that_are_equal(subject: Subject, first: list[Tensor]) -> int:
    """In how many samples one of the targets stays what it is in the first; 0 where all differ: some are rare."""
    fixed, seen, end = {n for n, t in enumerate(first) if bool((t == t[0]).all())}, 0, time.perf_counter() + _SHORT_S
    for batch in subject.batches(_MOST_BATCHES):
        others = [t for t in tensors_in(subject.binding.target(batch)) if t.is_floating_point() and t.numel()]
        fixed = {n for n in fixed if bool((others[n] == first[n][0]).all())}
        seen += len(batch["index"])
        if not fixed or time.perf_counter() > end:
            break
    return seen if fixed else 0


def inputs(subject: Subject) -> Finding:
    """Inputs are finite, differ from sample to sample, and are of a size that layers are made for."""
    keys = subject.binding.keys
    held = {key: list(tensors_in(subject.batch[key])) for key in keys if key in subject.batch}
    floating = [(key, t) for key, values in held.items() for t in values if t.is_floating_point() and t.numel()]
    broken = [key for key, t in floating if not bool(t.isfinite().all())]
    if broken and not all(bool(loss.isfinite()) for loss in subject.first_pass.losses.values()):
        return error(f"{listed(broken)}: {sum(int((~t.isfinite()).sum()) for _, t in floating):,} values of the first "
                     "batch are not finite", "finite numbers", "fill them in or leave the samples out")  # fmt: skip
    whole = [t for values in held.values() for t in values if t.ndim and len(t) == subject.num_rows]
    if subject.num_rows >= 4 and whole and all(bool((t == t[:1]).all()) for t in whole):
        return warning(f"all {subject.num_rows} samples of the first batch are equal", "inputs that differ",
                       "look at one sample: dataset[0] and dataset[1]")  # fmt: skip
    large = [(key, float(t.abs().max()), float(t.std())) for key, t in floating if t.numel() > 1 and key not in broken]
    for key, size, spread in large:
        is_off = (size > 30 and spread > 10) or (0 < size < _SMALL and subject.num_rows >= 4)
        if is_off and _reaches_a_layer(subject, key):
            return warning(
                f"{key}: up to {format_number(size)}, standard deviation {format_number(spread)}", "about -3 to 3",
                "images as uint8 are normalised on the device; else (x - mean) / std, once",
            )  # fmt: skip
    said = ", ".join(f"{key} up to {format_number(size)}" for key, size, _ in large)
    return passed(said or "no floating inputs")


def _reaches_a_layer(subject: Subject, key: str) -> bool:
    """Whether a layer with weights is given numbers as large as they come; a normalisation takes any size."""
    sizes: list[tuple[str, float]] = []

    def look(module: nn.Module, given: tuple[Any, ...]) -> None:
        largest = [float(t.detach().abs().max()) for t in given if isinstance(t, Tensor) and t.numel()]
        sizes.extend((type(module).__name__, size) for size in largest)

    layers = [module for module in subject.model.modules() if next(module.parameters(recurse=False), None) is not None]
    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        with evaluating(subject.model), gradients.none_needed():
            subject.forward(subject.few)
    finally:
        for hook in hooks:
            hook.remove()
    raw = {float(t.abs().max()) for t in tensors_in(subject.few[key]) if t.is_floating_point()}
    return not sizes or any(size in raw and "Norm" not in name for name, size in sizes)


def last_batch(subject: Subject) -> Finding:
    """What is left for the last batch of an epoch may be one sample, of which batch norm can make nothing."""
    work = subject.work
    rest = len(work.train) % work.batch_size or work.batch_size
    if rest > 1 or (work.feeding.last == "drop" and work.batch_size > 1):
        return passed(f"{rest:,} samples" if work.feeding.last == "keep" else "it is dropped where it is smaller")
    try:
        subject.losses(first_rows(subject.batch, 1))
    except ValueError as problem:
        return error(f"it holds 1 sample: {problem}", "at least 2", 'last = "drop", or another batch size')
    return passed("1 sample, which the model takes")


# --- the answer


def evaluation_repeats(subject: Subject) -> Finding:
    """In eval mode the same samples give the same answer, whatever the generators stand at."""
    outputs = floating(subject.output)
    if not outputs:
        return skipped("the model gives no floating tensors")
    with keyed_generators(1), evaluating(subject.model), gradients.none_needed():
        again = floating(subject.forward(subject.few))
    apart = max((distance(one, two) for one, two in zip(outputs, again, strict=False)), default=0.0)
    if apart > tolerance(subject):
        return warning(f"two evaluations of the same samples differ by {apart:.2g} of their size", "equal outputs",
                       "F.dropout(x, p, self.training) in place of F.dropout(x, p); no noise in eval mode")  # fmt: skip
    return passed("twice the same")


def samples_apart(subject: Subject) -> Finding:
    """A sample's answer in eval mode is a matter of that sample alone; batch statistics in training are another."""
    size = len(subject.few["index"])
    outputs = [t for t in floating(subject.output) if t.ndim and len(t) == size]
    if size < 2 or not outputs:
        return skipped("it takes two samples and an output for each")
    if any(isinstance(m, nn.modules.batchnorm._NormBase) and m.running_mean is None and not isinstance(
        m, nn.modules.instancenorm._InstanceNorm) for m in subject.model.modules()):  # fmt: skip
        return skipped("the model normalises by the batch in eval mode too (track_running_stats=False)")
    if any(t.shape[1:2] == (size,) for t in outputs):
        with evaluating(subject.model), gradients.none_needed():
            fewer = floating(subject.forward(first_rows(subject.few, size - 1)))
        if any(t.shape[1:2] == (size - 1,) for t in fewer):
            return skipped("the output is a table of all pairs of samples")
    for row in (0, size - 1):
        # not only in another order: what is taken over all samples, as a mean, would be the same
        alone = taken_rows(subject.few, torch.full((size,), row))
        with evaluating(subject.model), gradients.none_needed():
            others = [t for t in floating(subject.forward(alone)) if t.ndim and len(t) == size]
        apart = max((distance(a[row], b[row]) for a, b in zip(outputs, others, strict=False)), default=0.0)
        if apart > tolerance(subject):
            if evaluation_repeats(subject).is_blamed:
                return skipped("two evaluations of the same samples differ")
            return warning(f"with other samples beside it a sample's output changes by {apart:.2g} of its size",
                           "an output that depends on its own sample alone",
                           "look for view or reshape across dimension 0, softmax(dim=0), a mean over the batch, or "
                           "attention without batch_first=True")  # fmt: skip
    return passed("a sample's output does not depend on the others")


def floating(output: Any) -> list[Tensor]:
    return [t.detach() for t in tensors(output) if t.is_floating_point() and t.numel()]


def distance(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return math.inf
    one, other = one.double(), other.double()
    return float((one - other).abs().max() / one.abs().max().clamp(min=1e-12)) if one.numel() else 0.0


def tolerance(subject: Subject) -> float:
    return 1e-4 if subject.prepared.precision == "fp32" else 0.05


# --- the machine


def disk(subject: Subject, place: Path | None) -> Finding:
    """The folder of checkpoints can be written to, and has room for those that will be kept."""
    if place is None:
        return skipped("no run folder was named")
    parent = next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):
            free = shutil.disk_usage(parent).free
    except OSError as refused:
        return warning(f"{parent}: {refused.strerror or refused}", "a folder that can be written to", "--run-dir DIR")
    kept = subject.work.settings.checkpoint
    count = kept.keep_last + kept.keep_best + 1  # one is written before another goes
    one = _state_bytes(subject)
    said = f"{count} checkpoints of {one / 1e6:,.1f} MB, {free / 1e9:,.1f} GB free in {parent}"
    if count * one > free:
        return error(said, f"{count * one / 1e9:,.1f} GB", "--run-dir on another disk, or checkpoint.keep_last = 1")
    return passed(said)


def _state_bytes(subject: Subject) -> int:
    """What a checkpoint holds: the model, and the optimiser's averages, which are two for each number in most."""
    own = sum(t.nbytes for t in (*subject.model.parameters(), *subject.model.buffers()))
    return own + (2 + (subject.prepared.average is not None)) * subject.num_learning_bytes


def time_and_memory(subject: Subject) -> Finding:
    """How long the training may take, and whether it fits into memory, by the first samples' forward and backward."""
    seen, share = subject.first_pass, subject.num_rows / len(subject.few["index"])
    batch_s = seen.seconds * share
    if batch_s < _SHORT_S:  # so little is mostly the beginning: a whole batch tells more
        began = time.perf_counter()
        subject.backward(subject.batch)
        batch_s = time.perf_counter() - began
        gradients.clear(subject.model.parameters())
    step_s = batch_s * subject.work.settings.train.accumulate
    needed = seen.activation_bytes * share + _state_bytes(subject) + subject.num_learning_bytes
    free = _free_bytes(subject.prepared.device)
    total = subject.prepared.total_steps
    said = (f"about {format_seconds(step_s * total)} for {total:,} steps of {format_number(step_s)} s, "
            f"{needed / 1e9:,.2f} GB of {free / 1e9:,.1f} GB free")  # fmt: skip
    if needed > free:
        return warning(said, "all of it in memory", "a smaller data.batch_size with train.accumulate")
    return passed(said)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


QUICK: dict[str, Callable[[Subject], Finding]] = {
    "optimiser": in_optimizer, "labels": labels, "inputs": inputs, "first loss": first_loss,
    "loss attached": loss_attached, "direction": direction, "gradients": gradients_reach, "registered": registered,
    "probabilities twice": probabilities_twice, "broadcast": broadcast, "sequence": sequence,
    "evaluation repeats": evaluation_repeats, "samples apart": samples_apart, "last batch": last_batch,
    "time and memory": time_and_memory,
}  # fmt: skip
"""The checks of every training by name, the cheapest first; "disk" wants a folder beside."""
