"""The shape and type that common operations give, found from those of their arguments alone.

torch knows them too, on the meta device, but asks its compiler for most: an import of a second and 80 MB, and up to a
millisecond for each operation.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .operations import Operation

_NOT_COVERED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError)


def rule_of(name: str) -> Callable[..., Any] | None:
    """What takes an operation's own arguments and gives empty tensors on the meta device, as it would; None: no rule.

    Raises:  what it likes where it does not cover the arguments, such as those that the operation refuses
    """
    return _RULES.get(name.removeprefix("aten."))


def by_shapes(operation: Operation) -> Callable[..., Any]:
    """The operation on the meta device, by its rule where that covers the arguments."""
    rule, function = rule_of(operation.name), operation.function
    if rule is None:
        return function

    def shaped(*args: Any, **kwargs: Any) -> Any:
        try:
            return rule(*args, **kwargs)
        except _NOT_COVERED:
            return function(*args, **kwargs)  # which says what is wrong, if anything is

    return shaped


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor on the meta device; torch.empty_like would import sympy there."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _need(*facts: bool) -> None:
    if not all(facts):
        raise ValueError("beyond this rule")


def _spread(*shapes: Sequence[int]) -> Sequence[int]:
    if all(shape == shapes[0] for shape in shapes):
        return shapes[0]
    spread = []
    for sizes in itertools.zip_longest(*(shape[::-1] for shape in shapes), fillvalue=1):
        wide = set(sizes) - {1}
        _need(len(wide) < 2)
        spread.append(wide.pop() if wide else 1)
    return spread[::-1]


def _spread_of(*values: Any) -> Sequence[int]:
    return _spread(*(value.shape if isinstance(value, Tensor) else () for value in values))


def _type_of(*values: Any) -> torch.dtype:
    kinds = {value.dtype for value in values if isinstance(value, Tensor)}
    if len(kinds) == 1:
        (kind,) = kinds
        if kind.is_floating_point:
            return kind
    one, other = values
    return torch.result_type(one, other)


def _whole_as(kind: torch.dtype, default: torch.dtype) -> torch.dtype:
    return kind if kind.is_floating_point else default


def _by_number(*values: Any, **_: Any) -> Tensor:
    given = [value for value in values if value is not None]
    return empty(_spread_of(*given), _type_of(*given))


def _divided(one: Any, other: Any, *, rounding_mode: str | None = None) -> Tensor:
    kind = _type_of(one, other)
    return empty(_spread_of(one, other), kind if rounding_mode else _whole_as(kind, torch.get_default_dtype()))


def _told(*values: Any) -> Tensor:
    return empty(_spread_of(*values), torch.bool)


def _chosen(condition: Tensor, one: Any, other: Any) -> Tensor:
    return empty(_spread_of(condition, one, other), _type_of(one, other))


def _masked(first: Tensor, mask: Tensor, _: Any) -> Tensor:
    return empty(_spread(first.shape, mask.shape), first.dtype)


def _same(first: Tensor, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Tensor:
    return empty(first.shape, dtype or first.dtype)


def _float(first: Tensor, *rest: Any, **_: Any) -> Tensor:
    others = [value for value in rest if isinstance(value, Tensor)]
    _need(first.is_floating_point(), all(value.dtype == first.dtype for value in others))
    return empty(first.shape, first.dtype)


def _softmax(first: Tensor, _: int, dtype: torch.dtype | None = None) -> Tensor:
    _need(first.is_floating_point())
    return empty(first.shape, dtype or first.dtype)


def _cumulated(first: Tensor, _: int, *, dtype: torch.dtype | None = None) -> Tensor:
    return empty(first.shape, dtype or _whole_as(first.dtype, torch.int64))


def _left(first: Tensor, dim: Any, keepdim: bool) -> list[int]:
    dims = range(first.ndim) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    gone = {range(first.ndim)[axis] for axis in dims}
    return [1 if i in gone else size for i, size in enumerate(first.shape) if keepdim or i not in gone]


def _reduced(first: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, **_: Any) -> Tensor:
    _need(first.is_floating_point())
    return empty(_left(first, dim, keepdim), dtype or first.dtype)


def _summed(first: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    return empty(_left(first, dim, keepdim), dtype or _whole_as(first.dtype, torch.int64))


def _measured(first: Tensor, _: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    return _reduced(first, dim, keepdim, dtype=dtype)


def _varied(first: Tensor, dim: Any = None, _: bool = True, keepdim: bool = False) -> Tensor:
    return _reduced(first, dim, keepdim)


def _found(first: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype) -> Tensor:
    _need(first.dtype != torch.uint8)  # of which all() and any() are no bool
    return empty(_left(first, dim, keepdim), dtype)


def _best(first: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    shape = _left(first, dim, keepdim)
    return empty(shape, first.dtype), empty(shape, torch.int64)


def _product(one: Tensor, other: Tensor) -> Tensor:
    _need(one.dtype == other.dtype, one.shape[-1] == other.shape[-2:][0])
    batch = _spread(one.shape[:-2], other.shape[:-2])
    return empty((*batch, *one.shape[-2:-1], *other.shape[1:][-1:]), one.dtype)


def _crossed(one: Tensor, other: Tensor) -> Tensor:
    _need(one.ndim == other.ndim == 1)
    return empty((one.shape[0], other.shape[0]), _type_of(one, other))


def _added_product(first: Tensor, one: Tensor, other: Tensor, **_: Any) -> Tensor:
    product = _product(one, other)
    _need(first.dtype == one.dtype, [*_spread(first.shape, product.shape)] == [*product.shape])
    return product


def _linear(first: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    _need(weight.ndim == 2, first.shape[-1] == weight.shape[1], first.dtype == weight.dtype)
    _need(bias is None or (bias.shape == weight.shape[:1] and bias.dtype == first.dtype))
    return empty((*first.shape[:-1], weight.shape[0]), first.dtype)


def _each(value: Any, count: int) -> list[int]:
    sizes = [value] if isinstance(value, int) else [*value]
    return sizes * count if len(sizes) == 1 else sizes


def _windows(sizes: Sequence[int], kernel: Any, stride: Any, padding: Any, dilation: Any, is_ceil: bool) -> list[int]:
    """How many windows of the kernel there are along each axis."""
    rows = [_each(value, len(sizes)) for value in (kernel, stride or kernel, padding, dilation)]
    counts = []
    for size, width, step, edge, gap in zip(sizes, *rows, strict=True):
        _need(width > 0, step > 0, edge >= 0, gap > 0)
        whole = size + 2 * edge - gap * (width - 1) - 1
        count = (whole + (step - 1 if is_ceil else 0)) // step + 1
        counts.append(count - (is_ceil and (count - 1) * step >= size + edge))
        _need(whole >= 0)
    return counts


def _convolved(
    first: Tensor, weight: Tensor, bias: Tensor | None = None,
    stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    _need(first.ndim == weight.ndim, first.shape[1] == weight.shape[1] * groups, first.dtype == weight.dtype)
    _need(bias is None or (bias.shape == weight.shape[:1] and bias.dtype == first.dtype))
    if padding == "same":
        _need({*_each(stride, 1)} == {1})
        return empty((*first.shape[:1], *weight.shape[:1], *first.shape[2:]), first.dtype)
    edge = 0 if padding == "valid" else padding
    sizes = _windows(first.shape[2:], weight.shape[2:], stride, edge, dilation, False)
    return empty((first.shape[0], weight.shape[0], *sizes), first.dtype)


def _max_pooled(
    axes: int, first: Tensor, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil: bool = False
) -> Tensor:
    _need(first.ndim in (axes + 1, axes + 2), first.is_floating_point())
    return empty((*first.shape[:-axes], *_windows(first.shape[-axes:], kernel, stride, padding, dilation, ceil)),
                 first.dtype)  # fmt: skip


def _mean_pooled(
    axes: int, first: Tensor, kernel: Any, stride: Any = (), padding: Any = 0, ceil: bool = False, *_: Any
) -> Tensor:
    return _max_pooled(axes, first, kernel, stride, padding, 1, ceil)


def _fitted(axes: int, first: Tensor, size: Any) -> Tensor:
    _need(first.ndim in (axes + 1, axes + 2), first.is_floating_point())
    return empty((*first.shape[:-axes], *_each(size, axes)), first.dtype)


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    first = tensors[0]
    axis, shape = range(first.ndim)[dim], [*first.shape]
    shape[axis] = sum(tensor.shape[axis] for tensor in tensors)
    others = {(tensor.dtype, tensor.ndim, tensor.shape[:axis], tensor.shape[axis + 1 :]) for tensor in tensors}
    _need(len(others) == 1)
    return empty(shape, first.dtype)


def _stacked(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    ((shape, dtype),) = {(tensor.shape, tensor.dtype) for tensor in tensors}
    axis = range(len(shape) + 1)[dim]
    return empty((*shape[:axis], len(tensors), *shape[axis:]), dtype)


def _looked_up(table: Tensor, places: Tensor, *_: Any) -> Tensor:
    _need(table.ndim == 2)
    return empty((*places.shape, table.shape[1]), table.dtype)


def _selected(first: Tensor, dim: int, places: Tensor) -> Tensor:
    axis = range(first.ndim)[dim]
    _need(places.ndim < 2)
    return empty((*first.shape[:axis], places.numel(), *first.shape[axis + 1 :]), first.dtype)


def _gathered(first: Tensor, _: int, places: Tensor, **__: Any) -> Tensor:
    return empty(places.shape, first.dtype)


def _indexed(first: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    """Where the axes that are indexed lie together; else, and for truth values, torch knows."""
    at = [i for i, index in enumerate(indices) if index is not None]
    given = [index for index in indices if index is not None]
    _need(at[-1] - at[0] == len(at) - 1, at[-1] < first.ndim)
    _need(all(index.dtype in (torch.int64, torch.int32) for index in given))
    shape = _spread_of(*given)
    return empty((*first.shape[: at[0]], *shape, *first.shape[at[-1] + 1 :]), first.dtype)


def _attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    _need(query.ndim == key.ndim == value.ndim > 2, query.shape[:-2] == key.shape[:-2] == value.shape[:-2])
    _need(query.shape[-1] == key.shape[-1], key.shape[-2] == value.shape[-2])
    _need(query.dtype == key.dtype == value.dtype)
    scores = [*query.shape[:-1], key.shape[-2]]
    _need(mask is None or [*_spread(mask.shape, scores)] == scores)
    return empty((*query.shape[:-1], value.shape[-1]), query.dtype)


def _counted(*ends: int, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return empty((len(range(*ends)),), dtype or torch.int64)


def _new(first: Tensor, size: Sequence[int], *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Tensor:
    return empty(size, dtype or first.dtype)


def _viewed(first: Tensor, size: Sequence[int]) -> Tensor:
    """By its shape alone: what the rules give need not lie in memory as the operations' own results do."""
    shape = [*size]
    if -1 in shape:
        shape[shape.index(-1)] = first.numel() // -math.prod(shape)
    _need(math.prod(shape) == first.numel())
    return empty(shape, first.dtype)


def _viewed_as(first: Tensor, other: Tensor) -> Tensor:
    return _viewed(first, other.shape)


def _unflattened(first: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    axis = range(first.ndim)[dim]
    one = _viewed(empty(first.shape[axis : axis + 1], first.dtype), sizes)
    return empty((*first.shape[:axis], *one.shape, *first.shape[axis + 1 :]), first.dtype)


def _padded(first: Tensor, widths: Sequence[int], *_: Any) -> Tensor:
    shape = [*first.shape]
    for i, (before, after) in enumerate(zip(widths[::2], widths[1::2], strict=True)):
        shape[-1 - i] += before + after
    return empty(shape, first.dtype)


def _recurred(
    gates: int, first: Tensor, states: Any, weights: Sequence[Tensor], has_biases: bool, layers: int,
    _: float, __: bool, is_both_ways: bool, is_batch_first: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    held, ways = states if isinstance(states, list) else [states], 1 + is_both_ways
    batch, width = first.shape[0 if is_batch_first else 1], held[0].shape[-1]
    fitting = []
    for taken in [first.shape[2], *[ways * width] * (layers - 1)]:
        fitting += [(gates * width, taken), (gates * width, width), *[(gates * width,)] * (2 * has_biases)] * ways
    # torch 2.13 checks none of these sizes itself, and reads outside of what is too short
    _need(first.ndim == 3, [tuple(weight.shape) for weight in weights] == fitting)
    _need(all(state.shape == (layers * ways, batch, width) for state in held))
    _need(len({tensor.dtype for tensor in (first, *held, *weights)}) == 1)
    output = empty((*first.shape[:2], ways * width), first.dtype)
    return output, *(empty(state.shape, state.dtype) for state in held)


_BY_NAME: dict[Callable[..., Any], str] = {
    _by_number: """
add.Scalar add.Tensor addcdiv.default addcmul.default bitwise_and.Scalar bitwise_and.Tensor bitwise_or.Scalar
bitwise_or.Tensor bitwise_xor.Tensor __and__.Scalar __and__.Tensor __or__.Scalar __or__.Tensor __xor__.Tensor
clamp.Tensor clamp.default clamp_max.default clamp_min.default floor_divide.Scalar floor_divide.default fmod.Scalar
fmod.Tensor lerp.Scalar lerp.Tensor maximum.default minimum.default max.other min.other mul.Scalar mul.Tensor
pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor remainder.Scalar remainder.Tensor rsub.Scalar rsub.Tensor sub.Scalar
sub.Tensor""",
    _divided: "atan2.default div.Scalar div.Scalar_mode div.Tensor div.Tensor_mode",
    _told: """
eq.Scalar eq.Tensor ge.Scalar ge.Tensor gt.Scalar gt.Tensor le.Scalar le.Tensor lt.Scalar lt.Tensor ne.Scalar ne.Tensor
isfinite.default isinf.default isnan.default logical_and.default logical_not.default logical_or.default
logical_xor.default""",
    _chosen: "where.Scalar where.ScalarOther where.ScalarSelf where.self",
    _masked: "masked_fill.Scalar masked_fill.Tensor",
    _same: """
abs.default bitwise_not.default fill.Scalar fill.Tensor flip.default full_like.default index_add.default
index_put.default neg.default ones_like.default relu.default roll.default scatter.src scatter.value scatter_add.default
select_scatter.default sign.default slice_scatter.default tril.default triu.default zeros_like.default""",
    _float: """
acos.default asin.default atan.default batch_norm.default ceil.default celu.default cos.default cosh.default elu.default
erf.default erfc.default exp.default exp2.default expm1.default floor.default gelu.default group_norm.default
hardshrink.default hardsigmoid.default hardswish.default hardtanh.default instance_norm.default layer_norm.default
leaky_relu.default log.default log10.default log1p.default log2.default log_sigmoid.default mish.default
nan_to_num.default prelu.default reciprocal.default relu6.default rms_norm.default round.default rsqrt.default
selu.default sigmoid.default silu.default sin.default sinh.default softplus.default softshrink.default sqrt.default
square.default tan.default tanh.default threshold.default trunc.default""",
    _softmax: "softmax.int log_softmax.int",
    _cumulated: "cumsum.default cumprod.default",
    _reduced: """
amax.default amin.default logsumexp.default max.default mean.default mean.dim min.default std.correction
var.correction""",
    _summed: "sum.default sum.dim_IntList prod.default prod.dim_int",
    _measured: "linalg_vector_norm.default norm.ScalarOpt_dim",
    _varied: "std.dim var.dim",
    functools.partial(_found, dtype=torch.bool): "all.default all.dim any.default any.dim",
    functools.partial(_found, dtype=torch.int64): "argmax.default argmin.default",
    _best: "max.dim min.dim",
    _product: "bmm.default dot.default matmul.default mm.default mv.default",
    _crossed: "outer.default",
    _added_product: "addmm.default baddbmm.default",
    _linear: "linear.default",
    _convolved: "conv1d.default conv1d.padding conv2d.default conv2d.padding conv3d.default conv3d.padding",
    _joined: "cat.default",
    _stacked: "stack.default",
    _looked_up: "embedding.default",
    _selected: "index_select.default",
    _gathered: "gather.default",
    _indexed: "index.Tensor",
    _attended: "scaled_dot_product_attention.default",
    _counted: "arange.default arange.start arange.start_step",
    _new: "new_full.default new_ones.default new_zeros.default",
    _viewed: "_unsafe_view.default reshape.default view.default",
    _viewed_as: "reshape_as.default view_as.default",
    _unflattened: "unflatten.int",
    _padded: "constant_pad_nd.default pad.default",
    functools.partial(_recurred, 1): "rnn_relu.input rnn_tanh.input",
    functools.partial(_recurred, 3): "gru.input",
    functools.partial(_recurred, 4): "lstm.input",
    **{functools.partial(_max_pooled, axes): f"max_pool{axes}d.default" for axes in (1, 2, 3)},
    **{functools.partial(_mean_pooled, axes): f"avg_pool{axes}d.default" for axes in (1, 2, 3)},
    **{functools.partial(_fitted, axes): f"adaptive_avg_pool{axes}d.default" for axes in (1, 2, 3)},
}
_RULES = {name: rule for rule, names in _BY_NAME.items() for name in names.split()}
