"""The frontier of a frozen model: the tensors where no gradient is needed before and gradient is needed after.

The model's own forward runs and nothing is traced, so that control flow, dicts, residuals and towers are what they are.
``find_frontier`` follows what each tensor depends on. ``compute`` runs the frozen part for real and keeps the
crossings. ``recall`` runs the forward with the frozen modules and the functions between them skipped: what they would
give is the kept tensor, or a placeholder on the meta device. Both follow the events that were found: another order of
events is an error, never another result.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import ModelError
from .flow import Event, Flow, Node, Refused, is_telling, name_of, patched, tensors, tree_map
from .freeze import evaluating

Forward = Callable[[Any], Any]


class NoFrontierError(ModelError):
    """Nothing of the model can be computed once per sample; it says why, in words for the model's user."""


@dataclass(frozen=True)
class Crossing:
    """One kept tensor, (B, *shape): ``name`` is the module that made it in its ``call`` from 0, or module:function.

    ``is_written``: something writes into it later, so that it is kept and recalled as a copy.
    """

    name: str
    call: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_written: bool


@dataclass(frozen=True)
class Frontier:
    """Where the frozen part ends: ``crossings`` in the order of the forward, ``modules`` that are not run any more.

    ``inputs`` are the keys that the rest still reads; ``limit`` says what the frozen part ended at.
    """

    crossings: list[Crossing]
    modules: list[str]
    sample_bytes: int
    inputs: list[str]
    limit: str
    _steps: list[_Step] = field(repr=False)
    _unread: dict[str, _Step] = field(repr=False)


class _Slot(NamedTuple):
    """The place of a crossing."""

    place: int


class _Absent(NamedTuple):
    """A tensor that is not computed: each extent as (constant, share of a sample)."""

    extents: tuple[tuple[int, int], ...]
    dtype: torch.dtype

    def placeholder(self, size: int) -> Tensor:
        """In the place of ``size`` samples."""
        shape = [constant + share * size for constant, share in self.extents]
        return _seen(torch.empty(shape, dtype=self.dtype, device="meta"))


class _Step(NamedTuple):
    """A call of a frozen module, or of a function between such, and the form of what it gives."""

    func: Any
    leaves: list[Any]
    spec: pytree.TreeSpec

    def result(self, give: Callable[[Any, Any], Any], given: Sequence[Any] = ()) -> Any:
        """With ``give(form, leaf)`` for each leaf."""
        leaves = [give(form, leaf) for form, leaf in zip(self.leaves, given or self.leaves, strict=True)]
        return leaves[0] if self.spec.is_leaf() else pytree.tree_unflatten(leaves, self.spec)


def find_frontier(model: nn.Module, forward: Forward, batch: dict[str, Any], keys: Sequence[str]) -> Frontier:
    """The frontier of the model as it is now: modes and ``requires_grad`` say what is frozen.

    ``forward(batch)`` runs the model as in training; ``keys`` name what of the batch belongs to single samples and goes
    into the model. The result holds for samples of this form (shapes and types), for any number of them, in train and
    eval mode. Generators, buffers and the batch are as before afterwards.

    Raises:  NoFrontierError, which names the module that is in the way. What lies before the frontier is computed twice
             and in two halves, and the model with kept tensors is compared with the full one: equal means that the
             norm of the difference is at most sqrt(eps) of the tensor's, 3.5e-4 in fp32
    """
    learning = {parameter.requires_grad for parameter in model.parameters()}
    if len(learning) < 2:
        raise NoFrontierError("the whole model is frozen" if False in learning else "nothing is frozen")
    whole, halves = _halves(batch, keys)
    trouble: object = ""
    for all_inputs in (False, True):  # what seems to be read by frozen modules alone may be read where nobody is told
        try:
            found = _find(model, forward, [whole, halves[0]], keys, all_inputs)
            _check(found, model, forward, whole, halves)
        except NoFrontierError:
            raise
        except Exception as error:
            trouble = getattr(error, "got", "") or error
        else:
            return found
    raise NoFrontierError(f"the forward cannot be followed: {trouble}")


def compute(frontier: Frontier, model: nn.Module, forward: Forward, batch: dict[str, Any]) -> list[Tensor]:
    """The crossings of a batch, each (B, …): the frozen part alone, without gradients, up to the last crossing.

    The model is in eval mode meanwhile, and no generator moves.
    """
    play = _Play(frontier)
    given = {**batch, **{key: tree_map(_seen, batch[key]) for key in frontier._unread}}
    with torch.no_grad(), _generators_kept(), evaluating(model), play.on(model), contextlib.suppress(_AllMade):
        forward(given)
        raise _OtherWayError("the end of the forward", "all that is kept")
    return [play.made[place] for place in range(len(frontier.crossings))]


def recall(
    frontier: Frontier, model: nn.Module, forward: Forward, batch: dict[str, Any], kept: Sequence[Tensor]
) -> Any:
    """The model's output, and its gradients, with ``kept`` from ``compute`` in place of the frozen part.

    Of the keys of samples only ``frontier.inputs`` are read.

    Raises:  ModelError where a kept tensor has another shape, or the forward takes another way than when it was found
    """
    for crossing, tensor in zip(frontier.crossings, kept, strict=True):
        if tensor.shape[1:] != crossing.shape:
            got, expected = f"{crossing.name} {tuple(tensor.shape[1:])}", str(crossing.shape)
            raise ModelError("a kept tensor has another shape", where="a sample", got=got, expected=expected)
    play = _Play(frontier, kept)
    with play.on(model):
        return forward({**batch, **{key: step.result(play.recalled) for key, step in frontier._unread.items()}})


class _AllMade(BaseException):
    """The last crossing is made. No error: it passes a user's ``except Exception``."""


class _OtherWayError(ModelError):
    def __init__(self, got: str, expected: str):
        what = "the forward takes another way than when its frozen part was found"
        super().__init__(what, got=got, expected=expected)


class Kept(Tensor):
    """What frozen modules give to one another, a placeholder or for real; functions on it follow the play's steps."""

    play: _Play | None = None

    @property
    def device(self) -> torch.device:  # type: ignore[override]  # where the kept tensors are, not "meta"
        return self.play.kept[0].device if self.play is not None and self.play.kept else _plain(self).device

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_telling(func):
            with torch._C.DisableTorchFunctionSubclass():
                told = func(*args, **kwargs)
            if not tensors(told):
                return told
        if cls.play is None:
            raise _OtherWayError(name_of(func), "no use of what was not computed")
        return cls.play.follow(func, func, args, kwargs)


class _Play:
    """One forward along a frontier's steps: for real, or with ``kept`` and placeholders."""

    def __init__(self, frontier: Frontier, kept: Sequence[Tensor] = ()):
        self.crossings, self.steps, self.kept = frontier.crossings, frontier._steps, kept
        self.made: dict[int, Tensor] = {}
        self._skipped = {step.func for step in self.steps if isinstance(step.func, tuple)}
        self._calls: Counter[str] = Counter()
        self._position = 0
        self._is_inside = False

    @contextlib.contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Frozen modules and ``Kept`` tensors follow this play; everything is as before afterwards."""
        modules = {path: model.get_submodule(path) for path, _ in self._skipped}
        before, Kept.play = Kept.play, self
        try:
            with patched({module: partial(self._call, path, module.forward) for path, module in modules.items()}):
                yield
        finally:
            Kept.play = before

    def _call(self, path: str, forward: Any, *args: Any, **kwargs: Any) -> Any:
        if self._is_inside:
            return forward(*args, **kwargs)
        func = path, self._calls[path]
        self._calls[path] += 1
        return self.follow(func, forward, args, kwargs) if func in self._skipped else forward(*args, **kwargs)

    def follow(self, func: Any, run: Any, args: Any, kwargs: Any) -> Any:
        """What the next step gives, if that is what was called."""
        position = self._position
        step = self.steps[position] if position < len(self.steps) else None
        if step is None or step.func != func:
            raise _OtherWayError(name_of(func), name_of(step.func) if step else "nothing more before the frontier")
        self._position += 1
        return step.result(self.recalled) if self.kept else self._run(step, run, args, kwargs)

    def recalled(self, form: Any, leaf: Any) -> Any:
        """The kept tensor, a placeholder, or the same constant."""
        if isinstance(form, _Absent):
            return form.placeholder(len(self.kept[0]))
        if not isinstance(form, _Slot):
            return leaf
        kept = self.kept[form.place]
        return kept.clone() if self.crossings[form.place].is_written else kept

    def _run(self, step: _Step, run: Any, args: Any, kwargs: Any) -> Any:
        self._is_inside = isinstance(step.func, tuple)
        args, kwargs = tree_map(_plain, (args, kwargs)) if self._is_inside else (args, kwargs)
        try:
            with contextlib.nullcontext() if self._is_inside else torch._C.DisableTorchFunctionSubclass():
                leaves, spec = pytree.tree_flatten(run(*args, **kwargs))
        finally:
            self._is_inside = False
        if spec != step.spec:
            raise _OtherWayError(f"another form of result from {name_of(step.func)}", "the same form")
        result = step.result(self._made, leaves)
        if len(self.made) == len(self.crossings):
            raise _AllMade
        return result

    def _made(self, form: Any, leaf: Any) -> Any:
        if not isinstance(form, _Slot):
            return _seen(leaf) if isinstance(leaf, Tensor) else leaf
        leaf = _plain(leaf)
        self.made[form.place] = leaf.clone() if self.crossings[form.place].is_written else leaf
        return leaf


def _seen(tensor: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Kept)


def _plain(tensor: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor) if isinstance(tensor, Kept) else tensor


def _find(model: nn.Module, forward: Forward, batches: list[Any], keys: Sequence[str], all_inputs: bool) -> Frontier:
    refused = {""}
    while True:
        try:
            with _untouched(model):
                one, other = (Flow(model, refused).run(forward, batch, keys) for batch in batches)
            return _Cut(one, other, [_size(batch, keys) for batch in batches], all_inputs).frontier()
        except Refused as refusal:
            if refusal.reason:
                raise NoFrontierError(refusal.reason) from None
            refused.add(refusal.path)


class _Cut:
    """Which tensors of two equal flows (over other numbers of samples) are kept, and which keys are still read."""

    def __init__(self, flow: Flow, other: Flow, sizes: list[int], all_inputs: bool):
        self.flow, self.nodes, self.events, self.sizes = flow, flow.nodes, flow.events, sizes
        same = [event.func for event in flow.events] == [event.func for event in other.events]
        if not same or len(flow.nodes) != len(other.nodes):
            raise NoFrontierError("the forward takes another way for another number of samples")
        for a, b in zip(flow.events, other.events, strict=True):
            if a.is_call and a.constants != b.constants:  # they depend on how many samples there are
                raise Refused(a.place)
        self.others = {id(a.tensor): b.tensor for a, b in zip(flow.nodes, other.nodes, strict=True)}
        self.inputs = frozenset(flow.inputs if all_inputs else ())
        self.kept: set[Node] = set()
        for node in flow.used:
            self._need(node)
        for node in self._earlier():
            self.kept = min(self.kept, self._fewest({*self.kept, node}), key=self._bytes)

    def _need(self, node: Node) -> None:
        """A tensor must be there: kept, or made anew from what is kept or read."""
        assert node.event is not None
        if not node.event.is_frozen:
            self.inputs |= node.event.keys
        elif self._is_by_sample(node):
            self.kept.add(node)
        elif node.event.is_call:
            raise Refused(node.event.place)
        else:
            for parent in node.event.parents:
                self._need(parent)

    def _is_by_sample(self, node: Node) -> bool:
        one, other = node.tensor.shape, self.others[id(node.tensor)].shape
        return bool(one) and [one[0], other[0]] == self.sizes and one[1:] == other[1:]

    def _there(self, kept: set[Node]) -> set[Node]:
        """The tensors that are real in a recall: kept, read, or made from such by functions alone."""
        there = set(kept)
        for node in self.nodes:
            if node.event is not None and not node.event.is_call:
                parents, keys = node.event.parents, node.event.keys
                there |= {node} if (there.issuperset(parents) if parents else keys <= self.inputs) else set()
        return there

    def _fewest(self, kept: set[Node]) -> set[Node]:
        for node in reversed(self.nodes):
            if node in kept and node in self._there(kept - {node}):
                kept = kept - {node}
        return kept

    def _earlier(self) -> list[Node]:
        """The kept tensors, and what they were made from by functions without parameters: it may be smaller."""
        found = list(self.kept)
        for node in found:
            if node.event and not node.event.is_heavy:
                found += [p for p in node.event.parents if p not in found and p.event and p.event.is_frozen]
        return [node for node in found if self._is_by_sample(node)]

    def _bytes(self, kept: set[Node]) -> int:
        return sum(node.tensor[:1].numel() * node.tensor.element_size() for node in kept)

    def frontier(self) -> Frontier:
        if not self.kept:
            cause, was_frozen = next(
                iter(self.flow.limits), ("what learns uses nothing that frozen modules give", True)
            )
            raise NoFrontierError(cause if was_frozen else f"{cause}, on the raw input")
        there, kept = self._there(self.kept), [node for node in self.nodes if node in self.kept]
        slots = {id(node.tensor): _Slot(place) for place, node in enumerate(kept)}
        run = [event for event in self.events if event.is_call or not there.issuperset(event.parents)]
        calls = Counter(event.func[0] for event in run if event.is_call)
        return Frontier(
            [_crossing(node) for node in kept],
            [path for path, count in calls.items() if count == self.flow.calls[path]], self._bytes(self.kept),
            [key for key in self.flow.inputs if key in self.inputs],
            next((cause for cause, was_frozen in self.flow.limits if was_frozen), ""),
            [self._step(event, slots) for event in run],
            {key: self._step(event, {}) for key, event in self.flow.inputs.items() if key not in self.inputs},
        )  # fmt: skip

    def _step(self, event: Event, slots: dict[int, _Slot]) -> _Step:
        return _Step(event.func, [slots.get(id(leaf)) or self._form(leaf, event) for leaf in event.leaves], event.spec)

    def _form(self, leaf: Any, event: Event) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        shapes, more = zip(leaf.shape, self.others[id(leaf)].shape, strict=True), self.sizes[0] - self.sizes[1]
        extents = tuple((a - (a - b) // more * self.sizes[0], (a - b) / more) for a, b in shapes)
        if not all(share.is_integer() for _, share in extents):
            raise NoFrontierError(f"the shape that {name_of(event.func)} gives depends on the values")
        return _Absent(tuple((constant, int(share)) for constant, share in extents), leaf.dtype)


def _crossing(node: Node) -> Crossing:
    assert node.event is not None
    tensor, call = node.tensor, node.event.func[1] if node.event.is_call else 0
    return Crossing(node.event.place, call, tuple(tensor.shape[1:]), tensor.dtype, tensor._version != node.version)


def _check(found: Frontier, model: nn.Module, forward: Forward, whole: dict[str, Any], halves: list[Any]) -> None:
    """Run the frozen part twice and in two halves, and the model with and without it."""

    def run(function: Any, batch: Any, *given: Any) -> Any:
        with _untouched(model):
            return function(tree_map(Tensor.clone, batch), *given)

    frozen, rest = partial(compute, found, model, forward), partial(recall, found, model, forward)
    kept, again, (one, other) = run(frozen, whole), run(frozen, whole), [run(frozen, half) for half in halves]
    for i, crossing in enumerate(found.crossings):
        if not _is_close(kept[i], again[i]):
            raise NoFrontierError(f"{crossing.name} is not the same when it is computed again")
        if not _is_close(kept[i], torch.cat([one[i], other[i]])):
            raise NoFrontierError(f"samples depend on one another before {crossing.name}")
    read = {key: value for key, value in whole.items() if key not in found._unread}
    for mode, grad in ((contextlib.nullcontext(), torch.enable_grad()), (evaluating(model), torch.no_grad())):
        with mode, grad:
            full, short = tensors(run(forward, whole)), tensors(run(rest, read, kept))
        if len(full) != len(short) or not all(map(_is_close, full, short)):
            raise _OtherWayError("other results with kept tensors", "the full model's output")


def _is_close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype or not one.is_floating_point():
        return torch.equal(one, other)
    eps, precise = torch.finfo(one.dtype).eps, torch.promote_types(one.dtype, torch.float32)
    one, other = one.detach().to(precise), other.detach().to(precise)
    error = torch.where(one == other, 0, one - other)  # infinities too
    return bool(error.norm() <= eps**0.5 * one.nan_to_num(0, 0, 0).norm())


def _generators_kept() -> contextlib.AbstractContextManager[None]:
    return torch.random.fork_rng(range(torch.cuda.device_count()))


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Generators and buffers are as before afterwards."""
    buffers = [(m, name, b, b.clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    with _generators_kept():
        try:
            yield
        finally:
            for module, name, buffer, copy in buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer, copy):  # by value: batch statistics are written without a new version
                    buffer.data.copy_(copy)


def _size(batch: dict[str, Any], keys: Sequence[str]) -> int:
    return len(tensors([batch[key] for key in keys])[0])


def _halves(batch: dict[str, Any], keys: Sequence[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The batch, with at least four rows, and two halves of it."""
    size = _size(batch, keys)

    def rows(places: Tensor, tensor: Tensor) -> Tensor:
        return tensor[places.to(tensor.device)] if tensor.ndim and len(tensor) == size else tensor

    places = torch.arange(max(size, 4)) % size  # statistics of a batch need two
    parts = [places, *places.tensor_split([(len(places) + 1) // 2])]
    whole, *halves = (tree_map(partial(rows, part), batch) for part in parts)
    return whole, halves
