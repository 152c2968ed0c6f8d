"""The module tree: what goes in and comes out, what each module holds, what it costs, and what backward gives it."""

from __future__ import annotations

import contextlib
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, nn

from .. import gradients
from ..contracts import Json
from ..errors import ModelError
from .costs import Cost, Costs
from .followed import Followed, call
from .freeze import evaluating
from .untouched import untouched

Backward = Callable[[Any], None]
_FORWARD_FAILS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError)


@dataclass(frozen=True)
class ModuleRow:
    """One module with all that is below it. What only a forward or a backward tells is None, or empty, without one.

    ``name`` as ``named_modules`` has it, "(model)" for the model itself; ``type_name``, its class; ``depth``, 0 for
    the model. ``num_calls``: 0 for a module that the forward never called. ``inputs`` and ``outputs`` of its first
    call, as text. ``num_parameters``, numbers, each tensor once; of these ``num_learning`` and ``num_shared``, which
    lie at another place of the model too; ``num_buffers``, numbers; ``num_bytes`` of both. ``forward_flops`` and
    ``backward_flops``: of products, convolutions, attention and recurrent layers, where a multiply-add counts two.
    ``forward_s`` and ``backward_s``, seconds; ``time_fraction``, their share of the model's. ``backward_order``
    counts the modules as backward reaches them, from 1. ``gradient_norm``: the 2-norm of its parameters' gradients;
    ``gradient_zeros``, the fraction of these that are exactly 0; ``num_without_gradient``, learning numbers that
    backward did not reach.
    """

    name: str
    type_name: str
    depth: int
    num_calls: int | None
    inputs: str
    outputs: str
    num_parameters: int
    num_learning: int
    num_shared: int
    num_buffers: int
    num_bytes: int
    forward_flops: int | None = None
    backward_flops: int | None = None
    forward_s: float | None = None
    backward_s: float | None = None
    time_fraction: float | None = None
    backward_order: int | None = None
    gradient_norm: float | None = None
    gradient_zeros: float | None = None
    num_without_gradient: int | None = None


@dataclass(frozen=True)
class Anatomy(Sequence[ModuleRow]):
    """A model's rows in the order of the tree, the model itself first; a sequence of them.

    ``losses``, by name, are those that went backward; ``note`` says why nothing did, where that was wanted.
    """

    rows: tuple[ModuleRow, ...]
    losses: dict[str, float]
    note: str = ""

    @overload
    def __getitem__(self, place: int) -> ModuleRow: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[ModuleRow, ...]: ...
    def __getitem__(self, place: Any) -> Any:
        return self.rows[place]

    def __len__(self) -> int:
        return len(self.rows)

    def to_json(self) -> Json:
        """Values of JSON; a number that is none becomes text."""
        return {"rows": [_strict(asdict(row)) for row in self.rows], "losses": _strict(self.losses), "note": self.note}


def _strict(values: dict[str, Any]) -> dict[str, Any]:
    return {name: str(v) if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}


def describe(model: nn.Module, forward: Callable[[], Any] | None = None) -> list[ModuleRow]:
    """A row for each module, in the order of the tree; the first is the model itself.

    ``forward`` runs the model once on an example, in eval mode and without a graph; without it only what the model
    holds is known. Operations are not counted. Everything is as before afterwards.
    """
    if forward is None:
        return _rows(model, None, {})
    with untouched(model), evaluating(model), gradients.none_needed():
        costs = Costs(model, form_text)
        forward()
    return [replace(row, forward_flops=None) for row in _rows(model, costs, {})]


def dissect(
    model: nn.Module, batch: Any = None, loss: Callable[[Any], Any] | None = None,
    run: Callable[[Backward], Any] | None = None,
) -> Anatomy:  # fmt: skip
    """The model's rows after one forward and backward in the mode it is in, of which no trace is left.

    ``batch`` is a tensor, a tuple of arguments or a dict of keywords. ``loss`` takes the output; without it, it is the
    output's own ``.loss``, else the sum of the means of its floating tensors. ``run`` takes the place of both: it runs
    the model and calls what it is given with each loss. Without any of them only what the model holds is known.

    Raises:  ModelError for a model with lazy parameters, or that cannot take the batch, naming the module
    """
    if any(map(nn.parameter.is_lazy, [*model.parameters(), *model.buffers()])):
        raise ModelError("this model has parameters without a shape yet", where=type(model).__name__,
                         expected="a model that has run once", fix="model(example)")  # fmt: skip
    if batch is None and run is None:
        return Anatomy(tuple(_rows(model, None, {})), {})
    if run is None:
        run = partial(_run, Followed(model, batch, loss, None))  # which holds a copy of the batch
    pass_ = _Pass()
    with untouched(model), torch.enable_grad(), _plainly(model), Costs(model, form_text) as costs:
        try:
            run(pass_.backward)
        except _FORWARD_FAILS as error:
            raise _misfit(model, costs, batch, error) from error
        grads = {id(p): _measured(p.grad) for p in model.parameters() if p.grad is not None}
    return Anatomy(tuple(_rows(model, costs, grads)), pass_.losses, "" if pass_.is_done else pass_.note)


def _run(work: Followed, backward: Backward) -> None:
    backward(work.loss_of(call(work.model, work.batch)))


class _Pass:
    """Takes the losses backward, and remembers why one could not go."""

    def __init__(self) -> None:
        self.losses: dict[str, float] = {}
        self.is_done, self.note = False, "nothing gave a loss"

    def backward(self, loss: Any) -> None:
        if not isinstance(loss, Tensor):
            self.note = f"no backward: the loss is {type(loss).__name__}, not a tensor"
            return
        loss = loss.sum() if loss.dim() else loss
        self.losses[f"loss {len(self.losses) + 1}" if self.losses else "loss"] = float(loss.detach().real)
        if not loss.requires_grad:
            self.note = "no backward: nothing that learns leads to the loss"
            return
        try:
            gradients.backward(loss)
            self.is_done = True
        except RuntimeError as error:
            self.note = f"backward fails: {str(error).strip().partition(chr(10))[0][:200]}"


@contextlib.contextmanager
def _plainly(model: nn.Module) -> Iterator[None]:
    """Without what shows no operations, as compiled parts, and without cuDNN where it cannot go backward."""
    is_compiled = "torch._dynamo" in sys.modules  # whose import takes a second: who has compiled has it
    recurrent = any(isinstance(module, nn.RNNBase) and not module.training for module in model.modules())
    with contextlib.ExitStack() as stack:
        if is_compiled:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if recurrent:  # cuDNN's layers go backward in train mode alone
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


def _misfit(model: nn.Module, costs: Costs, batch: Any, error: Exception) -> ModelError:
    name, has_run = costs.innermost, costs.summed()[""].num_calls > 0
    place = f"{name} ({type(model.get_submodule(name)).__name__})" if name else type(model).__name__
    said = str(error).strip().partition("\n")[0][:200]
    return ModelError(
        "the loss cannot be computed" if has_run else "the model cannot take this batch", where=place,
        got=f"{form_text(batch) or 'its batch'} ({type(error).__name__}: {said})",
        expected="a loss of its output" if has_run else "a batch that it can take",
        fix="model.eval(), or a batch of two samples" if "more than 1 value per channel" in said else "",
    )  # fmt: skip


def _measured(gradient: Tensor) -> tuple[float, int]:
    """The squared 2-norm, and how many numbers are exactly 0."""
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    values = values if values.element_size() > 2 else values.float()
    found = torch.stack([torch.linalg.vector_norm(values), torch.count_nonzero(values).to(values.real.dtype)])
    norm, nonzero = found.tolist()
    return norm**2, gradient.numel() - int(nonzero)


# --- rows


def _rows(model: nn.Module, costs: Costs | None, grads: dict[int, tuple[float, int]]) -> list[ModuleRow]:
    places = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    shared = {key for key, count in places.items() if count > 1}
    sums = costs.summed() if costs is not None else {}
    held: tuple[dict[int, Any], dict[int, Any]] = {}, {}
    return [_row(name, module, held, shared, sums, grads) for name, module in model.named_modules()]


def _row(
    name: str, module: nn.Module, held: tuple[dict[int, Any], dict[int, Any]], shared: set[int],
    sums: dict[str, Cost], grads: dict[int, tuple[float, int]],
) -> ModuleRow:  # fmt: skip
    parameters = list(_below(module, "_parameters", held[0]).values())
    buffers, cost = list(_below(module, "_buffers", held[1]).values()), sums.get(name)
    return ModuleRow(
        name=name or "(model)",
        type_name=type(module).__name__,
        depth=name.count(".") + 1 if name else 0,
        num_calls=cost.num_calls if cost else None,
        inputs=cost.inputs if cost else "",
        outputs=cost.outputs if cost else "",
        num_parameters=_numel(parameters),
        num_learning=_numel(p for p in parameters if p.requires_grad),
        num_shared=_numel(p for p in parameters if id(p) in shared),
        num_buffers=_numel(buffers),
        num_bytes=sum(t.numel() * t.element_size() for t in [*parameters, *buffers]),
        **(_costs(cost, sums[""]) if cost else {}),
        **(_gradients(parameters, grads) if grads else {}),
    )


def _below(module: nn.Module, kind: str, known: dict[int, Any]) -> dict[int, Any]:
    """The tensors of a module and of all below it, each once; asked of torch, each module would walk its tree anew."""
    if id(module) not in known:
        known[id(module)] = found = {id(t): t for t in getattr(module, kind).values() if t is not None}
        for part in module._modules.values():
            if part is not None:
                found |= _below(part, kind, known)
    return known[id(module)]  # type: ignore[no-any-return]


def _numel(tensors: Any) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _costs(cost: Cost, whole: Cost) -> dict[str, Any]:
    total_s, has_backward = whole.forward_s + whole.backward_s, whole.order is not None
    return {
        "forward_flops": cost.forward_flops,
        "backward_flops": cost.backward_flops if has_backward else None,
        "forward_s": cost.forward_s,
        "backward_s": cost.backward_s if has_backward else None,
        "time_fraction": (cost.forward_s + cost.backward_s) / total_s if total_s else None,
        "backward_order": cost.order,
    }


def _gradients(parameters: list[nn.Parameter], grads: dict[int, tuple[float, int]]) -> dict[str, Any]:
    found = [(p, grads[id(p)]) for p in parameters if id(p) in grads]
    return {
        "gradient_norm": math.sqrt(sum(squared for _, (squared, _) in found)) if found else None,
        "gradient_zeros": sum(zeros for _, (_, zeros) in found) / max(1, _numel(p for p, _ in found))
        if found else None,
        "num_without_gradient": _numel(p for p in parameters if p.requires_grad and id(p) not in grads),
    }  # fmt: skip


# --- forms in words


def shape_text(value: Any) -> str:
    """Shapes in words: ``(32, 3, 224, 224)``, several joined, dicts and dataclasses by name."""
    return _text(value, lambda tensor: str(tuple(tensor.shape)))


def form_text(value: Any) -> str:
    """Shapes with types in words: ``(32, 3, 224, 224) float32``."""
    return _text(value, lambda tensor: f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}")


def _text(value: Any, said: Callable[[Tensor], str]) -> str:
    if isinstance(value, Tensor):
        return said(value)
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return ", ".join(text for item in value if (text := _text(item, said)))
    return ", ".join(f"{name} {text}" for name, item in _named(value) if (text := _text(item, said)))


def _named(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, tuple):
        yield from zip(getattr(value, "_fields"), value, strict=True)  # noqa: B009
    elif is_dataclass(value) and not isinstance(value, type):
        yield from ((field.name, getattr(value, field.name)) for field in fields(value))
