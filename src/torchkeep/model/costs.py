"""What a forward and a backward cost, module by module: calls, time and arithmetic, and when backward came there."""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_backward_flop_count, sdpa_flop_count


@dataclass
class Cost:
    """What is known of one module. ``order`` counts the modules as backward reaches them, from 1."""

    num_calls: int = 0
    inputs: str = ""
    outputs: str = ""
    forward_flops: int = 0
    backward_flops: int = 0
    forward_s: float = 0.0
    backward_s: float = 0.0
    order: int | None = None

    def add(self, other: Cost) -> None:
        """Take in what a part costs; ``order`` is that of whichever was reached first."""
        for name in ("forward_flops", "backward_flops", "forward_s", "backward_s"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.order = min((order for order in (self.order, other.order) if order is not None), default=None)


class Costs(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Times modules by hooks, which ``untouched`` takes away; entered as a context, it sees each operation too.

    An operation of backward belongs to the module that ran when its node was made: nodes are numbered in the order in
    which they are made. So nothing is set on tensors or the graph, which views and operations in place would not bear.
    ``said`` puts what goes in and comes out into words.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, said: Callable[[Any], str]):
        super().__init__()  # type: ignore[no-untyped-call]
        self._said = said
        self._own = {name: Cost() for name, _ in model.named_modules()}
        self._outside = Cost()
        self._path: list[tuple[str, int | None]] = []  # with the node of backward that computes a part again
        self._moves: list[tuple[int, str | None]] = [(-1, None)]  # from which number of a node on which module runs
        self._backward_at: str | None = None
        self._num_reached = 0
        self._formulas = FlopCounterMode(display=False, custom_mapping=_FORMULAS).flop_registry
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
        for name, module in model.named_modules():
            module.register_forward_pre_hook(partial(self._enter, name), prepend=True)
            module.register_forward_hook(partial(self._leave, name), with_kwargs=True)
        self._last_s = time.perf_counter()

    @property
    def innermost(self) -> str:
        """The module that runs, or that was left by an error; empty: the model, or none."""
        return self._path[-1][0] if self._path else ""

    def summed(self) -> dict[str, Cost]:
        """What each module costs with what is below it."""
        found = {name: Cost(**vars(cost)) for name, cost in self._own.items()}
        for name in reversed(found):
            if name:
                found[name.rpartition(".")[0]].add(found[name])
        return found

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first operation imports all of torch._dynamo, which takes a second

    def _enter(self, name: str, *_: Any) -> None:
        self._tick()
        self._path.append((name, _number()))
        self._move()

    def _leave(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._tick()
        while name in (around for around, _ in self._path) and self._path.pop()[0] != name:
            pass  # a module below ended by an error that was caught
        self._move()
        if _number() is not None:  # a checkpointed part, computed again
            return
        cost = self._own[name]
        if not cost.num_calls:
            cost.inputs = ", ".join(filter(None, (self._said(args), self._said(kwargs))))
            cost.outputs = self._said(output)
        cost.num_calls += 1

    def _move(self) -> None:
        self._moves.append((torch._C._autograd._get_sequence_nr(), self._path[-1][0] if self._path else None))

    def _tick(self, at: tuple[Cost, bool] | None = None) -> None:
        """Charge what has passed to the module that is at work."""
        self._wait()
        now = time.perf_counter()
        cost, is_backward = at or self._at()
        if is_backward:
            cost.backward_s += now - self._last_s
        else:
            cost.forward_s += now - self._last_s
        self._last_s = now

    def _at(self) -> tuple[Cost, bool]:
        number = _number()
        while self._path and self._path[-1][1] not in (None, number):
            self._path.pop()  # checkpoints end by an error as soon as they have what they need
        if number is None or (self._path and self._path[-1][1] is not None):
            return self._own[self._path[-1][0]] if self._path else self._outside, number is not None
        if number < _NO_NUMBER:
            self._backward_at = self._moves[bisect_right(self._moves, number, key=lambda move: move[0]) - 1][1]
        if self._backward_at is None:
            return self._outside, True
        cost = self._own[self._backward_at]
        if cost.order is None:
            self._num_reached += 1
            cost.order = self._num_reached
        return cost, True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.HigherOrderOperator):
            return NotImplemented
        if torch.is_inference_mode_enabled():  # there an operation comes whole that autograd takes apart
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        output = func(*args, **kwargs)
        cost, is_backward = at = self._at()
        if is_backward:  # in a forward modules are timed as a whole, by their hooks
            self._tick(at)
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            name = "backward_flops" if is_backward else "forward_flops"
            setattr(cost, name, getattr(cost, name) + _flops(formula, args, kwargs, output))
        return output


_NO_NUMBER = 1 << 63  # a parameter's node has none, and runs behind what leads to it


def _number() -> int | None:
    """That of backward's node at work; None outside of backward."""
    node = torch._C._current_autograd_node()
    return None if node is None else int(node._sequence_nr())


def _flops(formula: Any, args: Any, kwargs: Any, output: Any) -> int:
    """What a formula of torch's table or of the one below gives; most take shapes for tensors."""
    takes_shapes = getattr(formula, "__wrapped__", None)
    if takes_shapes is None:
        return int(formula(*args, **kwargs, out_val=output))
    return int(takes_shapes(*map(_shapes, args), **kwargs, out_shape=_shapes(output)))


def _shapes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape
    return [_shapes(item) for item in value] if isinstance(value, list | tuple) else value


# --- what torch's table lacks, or has wrong: shapes → operations


def _numel(shape: Sequence[int]) -> int:
    return math.prod(shape)


def _conv_backward(grad: Any, x: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """What each of the two gradients takes is what the forward takes; torch's own formula forgets the groups."""
    transposed, mask = args[4], args[7]
    return conv_flop_count(x, weight, grad, transposed=transposed) * (bool(mask[0]) + bool(mask[1]))


def _attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))  # type: ignore[no-untyped-call]


def _recurrent(x: Any, *weights: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """One layer in one direction: each step multiplies both of its matrices."""
    return 2 * _numel(x[:-1]) * sum(map(_numel, weights[:2]))


def _recurrent_cudnn(x: Any, weights: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * _numel(x[:-1]) * sum(_numel(weight) for weight in weights if len(weight) == 2)


def _twice(formula: Callable[..., int]) -> Callable[..., int]:
    """Backward: the gradient of what goes in, and that of the weights."""
    return lambda *args, **kwargs: 2 * formula(*args, **kwargs)


_aten = torch.ops.aten
_FORMULAS = {
    _aten.convolution_backward: _conv_backward,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _aten.mkldnn_rnn_layer: _recurrent,
    _aten.mkldnn_rnn_layer_backward: _twice(_recurrent),
    _aten._cudnn_rnn: _recurrent_cudnn,
    _aten._cudnn_rnn_backward: _twice(_recurrent_cudnn),
}
