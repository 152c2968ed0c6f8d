"""Which operation first made a NaN or an infinity that reached the loss or a gradient, and in which samples."""

from __future__ import annotations

import math
import re
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .. import gradients
from .flow import memory
from .followed import (
    LOSS,
    MODEL,
    Followed,
    ends_of,
    is_finite,
    is_looked_at,
    is_ruined,
    name_of,
    ruined_gradients,
    walk,
)  # fmt: skip
from .untouched import untouched

Direction = Literal["forward", "backward", "parameter", "buffer", "batch", "targets"]

WIDTH = 100
_NOT_MADE = ("aten.empty", "aten.new_empty")  # what was in this memory before is no result of anything
_TORCH = str(Path(torch.__file__).parent)
_OURS = {__file__, gradients.__file__, str(Path(__file__).with_name("followed.py"))}
_WATCHING = {"__torch_dispatch__", "_follow", "_make"}  # functions below on the way from an operation to its line
_AT_ZERO = "infinite slope at 0: add a small number before it, or choose its input by torch.where"
_ADVICE = [
    (r"Sqrt|VectorNorm|^Norm|Cdist|Pow|Acos|Asin|Std|^Log(2|10)?B", _AT_ZERO),
    (r"\.log|xlogy", "keep what goes in above 0: x.clamp_min(1e-6)"),
    (r"sqrt|pow", "keep what goes in at 0 or above: x.clamp_min(1e-12)"),
    (r"div|reciprocal|Div|Reciprocal", "a denominator that cannot be 0: clamp_min, or add a small number"),
    (r"oftmax|attention", "a row that is masked as a whole: leave a position open, or mask by finfo(dtype).min"),
    (r"exp|sinh|cosh", "stay in logarithms (logsumexp, log_softmax), or bound what goes in"),
]


@dataclass(frozen=True)
class NonFinite:
    """The first operation whose NaN or infinity reached the loss or a gradient, or the tensor that came with it.

    ``operation`` is the aten operation, and in backward ``node`` the function that it is the slope of; where no
    operation made it, ``direction`` says what had it and ``operation`` is its name. ``rows`` are the samples' places in
    the batch, None where the operation joins samples. ``source`` is the line of Python that led to it.
    """

    direction: Direction
    module: str
    type_name: str
    operation: str
    value: str
    output: str
    shape: tuple[int, ...]
    fix: str
    node: str = ""
    inputs: tuple[str, ...] = ()
    rows: tuple[int, ...] | None = None
    source: str = ""

    def __str__(self) -> str:
        place = f", in {self.module}" if self.module else ""
        place += f" ({self.type_name})" if self.type_name else ""
        verb = "made in" if self.direction in ("forward", "backward") else "came with the"
        by = f" by {self.operation}" if verb == "made in" else f" {self.operation}".rstrip()
        what = f"{self.value} {verb} {self.direction}{by}{f' of {self.node}' if self.node else ''}{place}"
        rows = [("samples", _rows_text(self.rows)), ("line", self.source)]
        rows += [("input", text) for text in self.inputs]
        rows += [("output" if verb == "made in" else "values", self.output), ("fix", self.fix)]
        return "\n".join([cut(what, WIDTH), *(cut(f"  {n + ':':<9} {text}", WIDTH) for n, text in rows if text)])


def find_maker(work: Followed) -> NonFinite | None:
    """Run once more and follow each NaN and infinity from where it was made to the loss or a gradient."""
    with untouched(work.model), torch.enable_grad(), torch.autograd.set_detect_anomaly(True, check_nan=False):
        search = _Search(work)
        with search:
            total = work.forward()
        if not is_finite(total.detach()):
            return search.found([total])
        nodes = list(walk(total))
        search.places = {number: work.place_of(number) for _, number in nodes}
        with search:
            ruined = ruined_gradients(total, ends_of(nodes))
        return search.found(ruined)


@dataclass(eq=False)
class _Origin:
    """Where values that are not finite come from. ``is_meant``: infinities that were written as a mask."""

    found: NonFinite
    is_meant: bool
    order: int
    alive: list[Any] = field(default_factory=list)  # memory that is freed would be taken for another tensor's


@dataclass
class _Input:
    text: str
    is_finite: bool
    has_nan: bool
    origin: _Origin | None


class _Search(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Knows for each memory with values that are not finite which operation they come from.

    An infinity that an operation was told to write (masked_fill) or that lies in a buffer is meant: it is blamed only
    where it reaches the end as it is, and what makes a NaN of it is blamed in its place.
    """

    def __init__(self, work: Followed):
        super().__init__()  # type: ignore[no-untyped-call]
        self.supports_higher_order_operators = True
        self.work = work
        self.places: dict[int, str] = {}
        self._place = LOSS  # of the node that ran last
        self._origins: dict[int, _Origin] = {}
        self._num_origins = 0
        for direction, name, tensor in _given(work):
            if is_ruined(tensor):
                self._bring(direction, name, tensor)

    @property
    def _node(self) -> Node | None:
        """What backward is at; None in forward, also where a checkpointed module computes it again."""
        return None if self.work.is_in_module else torch._C._current_autograd_node()

    def found(self, ends: list[Tensor]) -> NonFinite | None:
        """The first origin among those of ``ends``; of any where theirs is not known."""
        known = [self._origins[memory(end)] for end in ends if memory(end) in self._origins]
        known = known or [origin for origin in self._origins.values() if not origin.is_meant]
        return min(known, key=lambda origin: origin.order).found if known else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        is_in_place = getattr(getattr(func, "_schema", None), "is_mutable", False)
        inputs = self._inputs(given) if is_in_place else None  # afterwards it is too late to look
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor) and is_ruined(leaf)]
        if made and not str(func).startswith(_NOT_MADE):
            numbers = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, float)]
            is_told = not all(map(math.isfinite, numbers))
            self._follow(func, self._inputs(given) if inputs is None else inputs, made, is_told)
        return result

    def _inputs(self, given: list[Tensor]) -> list[_Input]:
        found = []
        for tensor in filter(is_looked_at, given):
            name, origin = self.work.owned.get(memory(tensor), ""), self._origins.get(memory(tensor))
            text = f"{name} {_values(tensor)}".strip()
            found.append(_Input(text, not is_ruined(tensor), bool(tensor.isnan().any()), origin))
        return found

    def _follow(self, func: Any, inputs: list[_Input], made: list[Tensor], is_told: bool) -> None:
        """Give what an operation made the origin of what went in, or name the operation as the origin."""
        ruined = [one for one in inputs if not one.is_finite]
        has_nan = any(bool(tensor.isnan().any()) for tensor in made)
        causes = [(not one.has_nan, one.origin) for one in ruined if one.origin and not one.origin.is_meant]
        meant = [one.origin for one in ruined if one.origin and one.origin.is_meant]
        if causes:
            origin = min(causes, key=lambda cause: (cause[0] and has_nan, cause[1].order))[1]
        elif meant and not has_nan:
            origin = meant[0]
        else:
            origin = self._make(func, inputs, made, is_meant=not has_nan and bool(is_told or ruined))
        for tensor in made:
            self._mark(tensor, origin)

    def _make(self, func: Any, inputs: list[_Input], made: list[Tensor], is_meant: bool) -> _Origin:
        node = self._node
        if node is not None:
            self._place = self.places.get(node._sequence_nr(), self._place)
        place = self.work.place if node is None else self._place
        operation, slope = ".".join(str(func).split(".")[:2]), name_of(node) if node is not None else ""
        lines = traceback.format_stack() if node is None else node.metadata.get("traceback_", [])  # type: ignore[attr-defined]
        found = NonFinite(
            "forward" if node is None else "backward", place, self.work.types.get(place, ""), operation,
            _worst(made[0]), _values(made[0]), tuple(made[0].shape), _advice(slope or operation, made[0]),
            node=slope, inputs=tuple(one.text for one in inputs), source=_source(lines),
        )  # fmt: skip
        return self._origin(found, is_meant)

    def _bring(self, direction: Direction, name: str, tensor: Tensor) -> None:
        """What was there before anything ran. Infinities are a mask in a buffer, and -inf in a batch."""
        fix = "look at these samples; torchkeep survey finds such values in data"
        place = ""
        if direction in ("parameter", "buffer"):
            place = name.rpartition(".")[0] or MODEL
            fix = "load the last good checkpoint; a lower learning rate or clip_norm prevents it"
        type_name, shape = self.work.types.get(place, ""), tuple(tensor.shape)
        found = NonFinite(direction, place, type_name, name, _worst(tensor), _values(tensor), shape, fix)
        meant = {"parameter": (), "buffer": ("inf", "-inf")}.get(direction, ("-inf",))
        self._mark(tensor, self._origin(found, found.value in meant))

    def _origin(self, found: NonFinite, is_meant: bool) -> _Origin:
        self._num_origins += 1
        return _Origin(found, is_meant, self._num_origins)

    def _mark(self, tensor: Tensor, origin: _Origin) -> None:
        self._origins[memory(tensor)] = origin
        origin.alive.append(tensor)
        if origin.found.rows is None and self._is_by_sample(tensor, origin.found.direction):
            rows = (~tensor.isfinite()).flatten(1).any(1) if tensor.dim() > 1 else ~tensor.isfinite()
            origin.found = replace(origin.found, rows=tuple(rows.nonzero().flatten().tolist()))

    def _is_by_sample(self, tensor: Tensor, direction: Direction) -> bool:
        """A weight, or its gradient, may be as long as the batch by chance."""
        is_now = (direction == "backward") == (self._node is not None)
        is_weight = memory(tensor) in self.work.owned or (
            direction == "backward" and any(tensor.shape == p.shape for p in self.work.model.parameters())
        )
        return bool(tensor.dim()) and len(tensor) == self.work.batch_size and is_now and not is_weight


def _given(work: Followed) -> Iterator[tuple[Direction, str, Tensor]]:
    yield from (("parameter", name, tensor.detach()) for name, tensor in work.model.named_parameters())
    yield from (("buffer", name, tensor.detach()) for name, tensor in work.model.named_buffers())
    for direction, tree in (("batch", work.batch), ("targets", work.targets)):
        for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
            if isinstance(leaf, Tensor):
                yield direction, pytree.keystr(path), leaf.detach()  # type: ignore[misc]


def _source(lines: list[str]) -> str:
    """The last line of the model's or the loss's Python, torch's own left out: ``net.py:12 return x.log()``."""
    for entry in reversed(lines):
        found = re.match(r'\s*File "(.+)", line (\d+), in (.+)\n\s*(.*)', entry)
        if found is None or found[1].startswith(_TORCH) or found[3] in _WATCHING:
            continue
        is_theirs = found[1] not in _OURS
        return f"{Path(found[1]).name}:{found[2]} {found[4]}".rstrip() if is_theirs else ""
    return ""


def _advice(operation: str, made: Tensor) -> str:
    if made.dtype == torch.float16 and not made.isnan().any():
        return "too large for fp16, which ends at 65504: bf16 or fp32 here, or smaller values"
    found = (text for pattern, text in _ADVICE if re.search(pattern, operation))
    return next(found, "look at what goes into this operation for these samples")


# --- as text


def form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _worst(tensor: Tensor) -> str:
    if tensor.isnan().any():
        return "NaN"
    return "inf" if tensor.is_complex() or tensor.isposinf().any() else "-inf"


def _values(tensor: Tensor) -> str:
    """Form, range of what is finite, and how much is not."""
    flat = tensor.detach().abs().flatten() if tensor.is_complex() else tensor.detach().flatten()
    finite, said = flat[flat.isfinite()], [form(tensor)]
    if len(finite):
        said.append(f"from {float(finite.min()):.4g} to {float(finite.max()):.4g}")
    counts = {"NaN": flat.isnan(), "inf": flat.isposinf(), "-inf": flat.isneginf()}
    bad = [f"{name} in {int(where.sum())}" for name, where in counts.items() if where.any()]
    return " ".join(said) + (f"; {', '.join(bad)} of {len(flat)}" if bad else "")


def _rows_text(rows: tuple[int, ...] | None) -> str:
    if rows is None:
        return ""
    return ", ".join(map(str, rows[:12])) + (f" … ({len(rows)} in all)" if len(rows) > 12 else "") + " of the batch"


def cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
