"""The operations that an exported graph may hold, each by its whole name, and the arguments that each takes.

All are maths on tensors: none reads a file, calls back, changes an input or draws by chance. A name from a file is
only ever looked up in this table; what is not in it is not asked of torch.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..errors import ModelError

Gives = Literal["tensor", "tensors", "int"]

_ATEN = """
abs.default acos.default add.Scalar add.Tensor addcdiv.default addcmul.default asin.default atan.default atan2.default
bitwise_and.Scalar bitwise_and.Tensor bitwise_not.default bitwise_or.Scalar bitwise_or.Tensor bitwise_xor.Tensor
__and__.Scalar __and__.Tensor __or__.Scalar __or__.Tensor __xor__.Tensor ceil.default clamp.Tensor clamp.default
clamp_max.default clamp_min.default cos.default cosh.default div.Scalar div.Scalar_mode div.Tensor div.Tensor_mode
eq.Scalar eq.Tensor erf.default erfc.default exp.default exp2.default expm1.default floor.default floor_divide.Scalar
floor_divide.default fmod.Scalar fmod.Tensor ge.Scalar ge.Tensor gt.Scalar gt.Tensor isfinite.default isinf.default
isnan.default le.Scalar le.Tensor lerp.Scalar lerp.Tensor log.default log10.default log1p.default log2.default
logaddexp.default logical_and.default logical_not.default logical_or.default logical_xor.default lt.Scalar lt.Tensor
masked_fill.Scalar masked_fill.Tensor maximum.default minimum.default max.other min.other mul.Scalar mul.Tensor
nan_to_num.default ne.Scalar ne.Tensor neg.default pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor reciprocal.default
remainder.Scalar remainder.Tensor round.default rsqrt.default rsub.Scalar rsub.Tensor sigmoid.default sign.default
sin.default sinh.default sqrt.default square.default sub.Scalar sub.Tensor tan.default tanh.default trunc.default
where.Scalar where.ScalarOther where.ScalarSelf where.self

celu.default elu.default gelu.default glu.default hardshrink.default hardsigmoid.default hardswish.default
hardtanh.default leaky_relu.default log_sigmoid.default log_softmax.int mish.default prelu.default relu.default
relu6.default selu.default silu.default softmax.int softplus.default softshrink.default threshold.default

all.default all.dim amax.default amin.default any.default any.dim argmax.default argmin.default argsort.default
cumprod.default cumsum.default linalg_vector_norm.default logsumexp.default max.default max.dim mean.default mean.dim
median.dim min.default min.dim norm.ScalarOpt_dim prod.default prod.dim_int sort.default std.correction std.dim
sum.default sum.dim_IntList topk.default var.correction var.dim var_mean.correction

cat.default channel_shuffle.default chunk.default clone.default constant_pad_nd.default contiguous.default
detach.default diagonal.default embedding.default expand.default expand_as.default flatten.using_ints flip.default
gather.default index.Tensor index_select.default movedim.int movedim.intlist narrow.default pad.default permute.default
pixel_shuffle.default pixel_unshuffle.default repeat.default repeat_interleave.self_int reshape.default roll.default
copy.default fill.Scalar fill.Tensor index_add.default index_put.default scatter.src scatter.value scatter_add.default
select_scatter.default slice_scatter.default
select.int slice.Tensor split.Tensor split.sizes split_with_sizes.default squeeze.default squeeze.dim squeeze.dims
stack.default t.default take_along_dim.default tile.default transpose.int tril.default triu.default unbind.int
unflatten.int unfold.default unsqueeze.default view.default view_as.default reshape_as.default _unsafe_view.default

addmm.default baddbmm.default bmm.default bilinear.default cdist.default cosine_similarity.default dot.default
einsum.default linear.default matmul.default mm.default mv.default outer.default pairwise_distance.default

conv1d.default conv1d.padding conv2d.default conv2d.padding conv3d.default conv3d.padding conv_transpose1d.default
conv_transpose2d.input conv_transpose3d.input col2im.default im2col.default batch_norm.default group_norm.default
instance_norm.default layer_norm.default rms_norm.default adaptive_avg_pool1d.default adaptive_avg_pool2d.default
adaptive_avg_pool3d.default adaptive_max_pool1d.default adaptive_max_pool2d.default avg_pool1d.default
avg_pool2d.default avg_pool3d.default max_pool1d.default max_pool2d.default max_pool3d.default grid_sampler.default
upsample_bicubic2d.vec upsample_bilinear2d.vec upsample_linear1d.vec upsample_nearest1d.vec upsample_nearest2d.vec
upsample_nearest3d.vec upsample_trilinear3d.vec scaled_dot_product_attention.default gru.input lstm.input
rnn_relu.input rnn_tanh.input

_to_copy.default to.dtype to.other type_as.default sym_size.int

arange.default arange.start arange.start_step eye.default eye.m full.default full_like.default linspace.default
new_full.default new_ones.default new_zeros.default ones.default ones_like.default scalar_tensor.default
zeros.default zeros_like.default
"""
# beside all that is done number by number: what never gives back a view of what it took
_FRESH = """
adaptive_avg_pool2d.default addmm.default avg_pool2d.default baddbmm.default batch_norm.default bmm.default
conv1d.default conv1d.padding conv2d.default conv2d.padding conv3d.default conv3d.padding conv_transpose1d.default
conv_transpose2d.input conv_transpose3d.input full.default full_like.default group_norm.default layer_norm.default
linear.default max_pool2d.default mm.default ones.default ones_like.default zeros.default zeros_like.default
"""
_IN_PLACE = """
elu.default gelu.default hardsigmoid.default hardswish.default hardtanh.default leaky_relu.default relu.default
silu.default
"""
_TYPES_OF_A_CALL = ("Layout", "Device", "Generator")  # never in a file: the interpreter chooses them
_INT_BOUND = 1 << 63


@dataclass(frozen=True)
class Argument:
    """One argument: its kind as torch's schema calls it, such as "Tensor", "int" or "ScalarType"."""

    name: str
    kind: str
    is_list: bool = False
    is_optional: bool = False
    holds_none: bool = False
    is_keyword: bool = False
    is_required: bool = True
    default: Any = None


@dataclass(frozen=True)
class Operation:
    """What a name means: the function, its arguments, what it gives, and whether it must be told a device.

    ``is_fresh``: its result shares memory with nothing. ``in_place`` does the same to its first argument.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Argument, ...]
    gives: Gives
    is_placed: bool = False
    is_fresh: bool = False
    in_place: Callable[..., Any] | None = None

    @property
    def positional(self) -> tuple[Argument, ...]:
        return tuple(argument for argument in self.arguments if not argument.is_keyword)


def _bounded(function: Callable[..., int]) -> Callable[..., int]:
    def within_int64(*sizes: int) -> int:
        size = function(*sizes)
        if not -_INT_BOUND <= size < _INT_BOUND:  # else a chain of products grows without end
            raise ValueError("a size beyond 64 bits")
        return size

    return within_int64


SIZE_MATHS: dict[str, Callable[..., Any]] = {
    "int.add": operator.add, "int.sub": operator.sub, "int.mul": operator.mul, "int.floordiv": operator.floordiv,
    "int.mod": operator.mod, "int.neg": operator.neg, "int.max": torch.sym_max, "int.min": torch.sym_min,
}  # fmt: skip
ITEM = "item"
NAMES = frozenset({f"aten.{name}" for name in _ATEN.split()} | {*SIZE_MATHS, ITEM})


def find_operation(name: object) -> Operation:
    """The operation of exactly this name.

    Raises:  ModelError where it is none of those allowed
    """
    if not isinstance(name, str) or name not in NAMES:
        raise ModelError(
            "this operation may not stand in a graph", where="an operation's name", got=repr(name)[:200],
            expected=f"one of the {len(NAMES)} operations that are plain maths on tensors",
        )  # fmt: skip
    return _found(name)


@functools.cache
def _found(name: str) -> Operation:
    if name == ITEM:
        return Operation(name, operator.getitem, (Argument("values", "tensors"), Argument("index", "int")), "tensor")
    if name in SIZE_MATHS:
        sizes = (Argument("size", "int"), Argument("other", "int"))[: 1 if name == "int.neg" else 2]
        return Operation(name, _bounded(SIZE_MATHS[name]), sizes, "int")
    _, packet, overload = name.split(".")
    function = getattr(getattr(torch.ops.aten, packet), overload)
    rows = function._schema.arguments
    arguments = tuple(_argument(row) for row in rows if not str(row.real_type).endswith(_left_out(row)))
    has_device = any("Device" in str(row.real_type) for row in rows)
    is_placed = has_device and not any(argument.kind == "Tensor" for argument in arguments)
    returns = [str(row.real_type) for row in function._schema.returns]
    gives: Gives = "tensor" if returns == ["Tensor"] else "int" if returns == ["int"] else "tensors"
    is_fresh = torch.Tag.pointwise in function.tags or f"{packet}.{overload}" in _FRESH.split()
    is_both = f"{packet}.{overload}" in _IN_PLACE.split()
    in_place = getattr(getattr(torch.ops.aten, f"{packet}_"), overload) if is_both else None
    return Operation(name, function, arguments, gives, is_placed, is_fresh, in_place)


def _left_out(row: Any) -> tuple[str, ...]:
    kinds = tuple(f"{kind}{end}" for kind in _TYPES_OF_A_CALL for end in ("", "]"))
    return (str(row.real_type),) if row.name in ("pin_memory", "non_blocking") and row.kwarg_only else kinds


def _argument(row: Any) -> Argument:
    """From torch's own words: "Optional[List[int]]", "List[Optional[Tensor]]"."""
    kind = str(row.real_type)
    is_optional, kind = kind.startswith("Optional["), kind.removeprefix("Optional[").rstrip("]")
    is_list, kind = kind.startswith("List["), kind.removeprefix("List[")
    holds_none, kind = kind.startswith("Optional["), kind.removeprefix("Optional[")
    default, is_required = row.default_value, not row.has_default_value()
    return Argument(row.name, kind, is_list, is_optional, holds_none, row.kwarg_only, is_required, default)
