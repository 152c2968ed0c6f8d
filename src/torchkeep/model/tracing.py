"""Backward seen: what each module keeps in memory for it, and the operation that first made a NaN or an infinity."""

from __future__ import annotations

import contextlib
import re
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks

from ..errors import ModelError
from .flow import memory, tensors
from .followed import MODEL, Followed, LossFunction, end_of, ends_of, is_finite, name_of, ruined_gradients, walk
from .nonfinite import NonFinite, cut, find_maker, form
from .untouched import untouched

Kind = Literal["activation", "parameter", "batch"]


@dataclass(frozen=True)
class SavedTensor:
    """A tensor that a node of the graph keeps for backward.

    ``kind`` "parameter" (or buffer) and "batch" are in memory anyway. ``num_bytes`` is the whole memory that it keeps
    alive, 0 where an earlier one keeps the same.
    """

    node: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: Kind
    num_bytes: int


@dataclass(frozen=True)
class TraceRow:
    """What one module does itself, without the modules in it: its nodes by kind with their number, and what they keep.

    ``name`` is "(model)" for the model's own operations, "(loss)" for what comes after it.
    """

    name: str
    type_name: str
    nodes: dict[str, int]
    saved: tuple[SavedTensor, ...]

    def num_bytes(self, kind: Kind = "activation") -> int:
        """The memory of one kind that this module is the first to keep."""
        return sum(saved.num_bytes for saved in self.saved if saved.kind == kind)


@dataclass(frozen=True)
class Trace:
    """One forward and backward: the graph by module in the order in which backward reaches it.

    ``print(trace)`` shows it as a table. ``first_non_finite`` is None where the loss and all gradients are finite.
    """

    loss: float
    is_finite: bool
    rows: tuple[TraceRow, ...]
    first_non_finite: NonFinite | None

    @property
    def num_nodes(self) -> int:
        """How many nodes backward runs through."""
        return sum(sum(row.nodes.values()) for row in self.rows)

    def num_bytes(self, kind: Kind = "activation") -> int:
        """What is kept for backward; of activations it is the memory that a forward adds."""
        return sum(row.num_bytes(kind) for row in self.rows)

    def __str__(self) -> str:
        total = (
            f"{self.num_nodes} nodes keep {_size(self.num_bytes())} of activations for backward; there anyway: "
            f"{_size(self.num_bytes('parameter'))} parameters, {_size(self.num_bytes('batch'))} batch"
        )
        found = [str(self.first_non_finite)] if self.first_non_finite else []
        if not self.is_finite and not found:
            found = [f"the loss is {self.loss:g} or a gradient is not finite, which did not come back in a second try"]
        head = _line("module", "nodes of backward", "keeps", "bytes")
        return "\n".join([*found, total, head, *map(_row_line, self.rows)])


def trace_backward(model: nn.Module, batch: Any, *, loss: LossFunction | None = None, targets: Any = None) -> Trace:
    """One forward and backward, watched: what is kept for backward by whom, and what first made a NaN or infinity.

    ``batch`` is a tensor, a tuple of arguments or a dict of keywords, with the samples along the first dimension.
    ``loss`` takes the output, and ``targets`` where given; of more than one number the sum is taken. Without it, it is
    the output's ``.loss``, else the sum of the means of the floating outputs. The model runs in the mode it is in, and
    nothing of it, of the batch or of the generators changes. Only where the loss or a gradient is not finite, a second
    run looks at each operation. What a Function of your own keeps beside ``save_for_backward`` is not seen.

    Shapes:  any
    Units:   bytes
    Raises:  ModelError where nothing that learns leads to the loss, or where an operation in place wrote over what
             backward needs
    """
    _check(model, loss, targets)
    work = Followed(model, batch, loss, targets)
    kept: list[weakref.ref[_Kept]] = []
    with untouched(model), torch.enable_grad():
        with _hooks_allowed(), saved_tensors_hooks(partial(_keep, work, kept), _give):
            total = work.forward()
        nodes = list(walk(total))
        rows = _rows(work, nodes, [alive for ref in kept if (alive := ref()) is not None])
        is_sound = not ruined_gradients(total, ends_of(nodes)) and is_finite(total.detach())
    found = None if is_sound else find_maker(Followed(model, batch, loss, targets))
    return Trace(float(total.detach()), is_sound, rows, found)


def _check(model: Any, loss: Any, targets: Any) -> None:
    where = "tk.trace_backward"
    if not isinstance(model, nn.Module):
        raise ModelError("this is no model", where=where, got=type(model).__name__, expected="an nn.Module")
    if any(map(nn.parameter.is_lazy, model.parameters())):
        raise ModelError(
            "this model has parameters without a shape yet", where=where, expected="a model that has run once",
            fix="model(example)",
        )  # fmt: skip
    if loss is not None and not callable(loss):
        raise ModelError(
            "this is no loss", where=where, got=repr(loss), expected="a function of the output (and of targets)",
            fix="loss=torch.nn.functional.cross_entropy",
        )  # fmt: skip
    if loss is None and targets is not None:
        raise ModelError(
            "targets without a loss that takes them", where=where, got="targets=", expected="loss= too",
            fix="loss=lambda output, targets: …",
        )  # fmt: skip


@dataclass
class _Kept:
    """What lies in a node's place for a saved tensor: it lives as long as the node."""

    tensor: Tensor
    version: int
    number: int
    place: str


def _keep(work: Followed, kept: list[weakref.ref[_Kept]], tensor: Tensor) -> _Kept:
    # the node that saves is the one that was made last; detached, for an output would keep its own node alive
    one = _Kept(tensor.detach(), tensor._version, torch._C._autograd._get_sequence_nr() - 1, work.place)
    kept.append(weakref.ref(one))
    return one


@contextlib.contextmanager
def _hooks_allowed() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "support saved tensor hooks" not in str(error):
            raise
        raise ModelError(
            "torch does not let anybody see what is saved within torch.func", where="tk.trace_backward", got=error,
            expected="a forward without torch.func's transforms", fix="torch.autograd.grad(…, create_graph=True) there",
        ) from error  # fmt: skip


def _give(kept: _Kept) -> Tensor:
    if kept.tensor._version != kept.version:  # torch itself does not look where hooks are set
        raise ModelError(
            "a tensor that backward needs was written to after it was saved", where=kept.place,
            got=f"{form(kept.tensor)}, written to {kept.tensor._version - kept.version} times",
            expected="no operation in place on what an operation of this module saved",
            fix="use the operation that makes a new tensor: x = x + y in place of x += y",
        )  # fmt: skip
    return kept.tensor


def _rows(work: Followed, nodes: list[tuple[Node, int]], kept: list[_Kept]) -> tuple[TraceRow, ...]:
    names = {number: name_of(node) for node, number in nodes if end_of(node) is None}
    counts: dict[str, Counter[str]] = {}
    for node, number in sorted(nodes, key=lambda found: -found[1]):  # the engine takes the youngest that is ready
        name = work.owned.get(memory(end)) if (end := end_of(node)) is not None else None
        place = work.place_of(number) if name is None else name.rpartition(".")[0] or MODEL
        counts.setdefault(place, Counter())[name_of(node)] += 1
    saved: dict[str, list[SavedTensor]] = {place: [] for place in [*counts, *(one.place for one in kept)]}
    held = {*work.owned, *map(memory, ends_of(nodes))}
    given, seen = set(map(memory, tensors([work.batch, work.targets]))), set[int]()
    for one in kept:
        key = memory(one.tensor)
        kind: Kind = "batch" if key in given else "parameter" if key in held else "activation"
        num_bytes = 0 if key in seen else _num_bytes(one.tensor)
        seen.add(key)
        form = (tuple(one.tensor.shape), one.tensor.dtype)
        saved[one.place].append(SavedTensor(names.get(one.number, ""), *form, kind, num_bytes))
    return tuple(
        TraceRow(place, work.types.get(place, ""), dict(counts.get(place, {})), tuple(found))
        for place, found in saved.items()
    )


def _num_bytes(tensor: Tensor) -> int:
    is_plain = tensor.layout == torch.strided
    return tensor.untyped_storage().nbytes() if is_plain else tensor.numel() * tensor.element_size()


# --- as text


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.4g} GB"


def _line(name: str, nodes: str, keeps: str, size: str) -> str:
    cells = [(name, 26), (nodes, 32), (keeps, 28)]
    return f"{'  '.join(f'{cut(text, width):<{width}}' for text, width in cells)}  {size:>8}"


def _row_line(row: TraceRow) -> str:
    nodes = Counter(re.sub(r"Backward\d*$", "", name) for name in Counter(row.nodes).elements())
    kept = sorted((s for s in row.saved if s.kind == "activation"), key=lambda saved: -saved.num_bytes)
    keeps = Counter(_saved_text(saved) for saved in kept if saved.num_bytes)
    name = f"{row.name} {row.type_name}".rstrip()
    name = name if len(name) <= 26 else row.name if len(row.name) <= 26 else "…" + row.name[-25:]
    return _line(name, _counted(nodes), _counted(keeps), _size(row.num_bytes()))


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{text}{f' ×{count}' if count > 1 else ''}" for text, count in counts.items())


def _saved_text(saved: SavedTensor) -> str:
    return f"{saved.shape} {str(saved.dtype).removeprefix('torch.')}"
