"""Distributions in bins whose edges are fixed, four to an octave, counted where the values lie."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..contracts import Json
from .kept import Kept, numbers
from .media import Late, MediaStore

_ROW = 1024
_GROUP = {"cuda": 1 << 22}  # values that are counted together
_GROUP_CPU = 1 << 17  # they stay in the second cache: half the time of 4 million
_CELLS = 2048  # of sign, exponent and two bits of the fraction of a float32
_FRACTION_BITS = 21
_NORMAL, _INFINITE = 4, 1020  # cells of 2 ** -126, and of infinity
_LARGEST = torch.finfo(torch.float32).max
_WIDE = (torch.float64, torch.int64, torch.int32, torch.uint64, torch.uint32)  # more than a float32 holds

Piece = tuple[int, Tensor]
"""Which distribution it belongs to, and values (N,) of it."""


def edges(bin_idx: int) -> tuple[float, float]:
    """The two ends of a bin; the end that is nearer to 0 belongs to it, the other to the next.

    Bin 0 holds what is smaller than 2 ** -126, bins count upwards with the values, from -1016 to 1016. The outermost
    hold all that a float32 does not.
    """
    if bin_idx == 0:
        return -math.ldexp(1, -126), math.ldexp(1, -126)
    first = abs(bin_idx) + _NORMAL - 1
    near, far = (math.ldexp(1 + cell % 4 / 4, cell // 4 - 127) for cell in (first, first + 1))
    return (near, far) if bin_idx > 0 else (-far, -near)


def histogram(values: Any) -> Late:
    """The distribution of a tensor, an array or nested lists; of a list of tensors all their values in one.

    Raises:  DataError for what is no real number
    """
    many = isinstance(values, list | tuple) and values and isinstance(values[0], Tensor)
    pieces = [(0, _flat(value, "histogram")) for value in (values if many else [values])]
    device = pieces[0][1].device
    return _Distribution(_Counted([(0, flat.to(device)) for _, flat in pieces], 1), 0)


def histograms(named: Mapping[str, Any]) -> dict[str, Late]:
    """The distributions of many tensors by name, counted together: a dozen kernels for each 4 million values.

    Raises:  DataError for what is no real number
    """
    flats = {name: _flat(value, name) for name, value in named.items()}
    late: dict[str, Late] = {}
    for device in dict.fromkeys(flat.device for flat in flats.values()):
        here = [name for name, flat in flats.items() if flat.device == device]
        counted = _Counted([(place, flats[name]) for place, name in enumerate(here)], len(here))
        late |= {name: _Distribution(counted, place) for place, name in enumerate(here)}
    return {name: late[name] for name in flats}


def rebinned(payload: Mapping[str, Json], num: int = 64) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The same distribution in ``num`` bins of equal width between its min and max, none of its values lost.

    Shapes:  edges (num + 1,) float64, counts (num,) int64
    """
    if not payload["num"]:
        return np.linspace(0, 1, num + 1), np.zeros(num, np.int64)
    low, high = payload["min"], payload["max"]
    ends = np.clip([edges(bin_idx) for bin_idx in payload["bins"]], low, high).ravel()
    counts = np.array(payload["counts"])
    reached = np.stack([np.cumsum(counts) - counts, np.cumsum(counts)], 1).ravel()
    if low == high:
        around = max(0.5, abs(low) / 2)
        low, high = max(low - around, -sys.float_info.max), min(high + around, sys.float_info.max)
    limits = np.linspace(low / 2, high / 2, num + 1) * 2  # halved: their distance may be no float64
    below = np.rint(np.interp(limits, ends, reached))
    below[0], below[-1] = 0, counts.sum()
    return limits, np.diff(below).astype(np.int64)


def _flat(value: Any, where: str) -> Tensor:
    values = numbers(value, where)
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.require(values, requirements=["C", "W"]))
    return tensor.reshape(-1)


class _Counted:
    """Counts and moments of ``num`` distributions whose tensors are on one device, on their way from there.

    Each tensor lies in rows of its own, filled up with NaN, so that rows are reduced whatever tensor they are of.
    """

    def __init__(self, flats: list[Piece], num: int):
        device = flats[0][1].device
        totals = torch.zeros(num, _CELLS, dtype=torch.int64, device=device)
        moments: list[Tensor] = []
        rows: list[int] = []
        self._filled = [0] * num
        for group in _groups(flats, _GROUP.get(device.type, _GROUP_CPU)):
            x, places = self._in_rows(group)
            first, last = places[0], places[-1]
            offsets = torch.tensor(places, dtype=torch.int32).sub_(first).mul_(_CELLS).add_(_CELLS // 2)
            if device.type == "cuda":  # from other memory a copy would wait for the device
                offsets = offsets.pin_memory()
            totals[first : last + 1] += _counts(x, offsets.to(device, non_blocking=True), last - first + 1)
            moments.append(_moments(x))
            rows += places
        self._rows = np.array(rows, np.int64)  # which distribution each row of the moments is of
        self._totals = Kept(totals)
        self._moments = Kept(torch.cat(moments, 1)) if moments else None

    def _in_rows(self, group: list[Piece]) -> tuple[Tensor, list[int]]:
        """Values (rows, 1024), and the distribution of each row."""
        places = [place for place, piece in group for _ in range(_num_rows(piece))]
        first = group[0][1]
        x = torch.full((len(places), _ROW), math.nan, dtype=_kind(first), device=first.device)
        targets, start = [], 0
        for place, piece in group:
            targets.append(x.view(-1)[start : start + len(piece)])
            start += _num_rows(piece) * _ROW
            self._filled[place] += _num_rows(piece) * _ROW - len(piece)
        torch._foreach_copy_(targets, [piece for _, piece in group])
        return x.mul_(1), places  # a signalling NaN may have the cell of an infinity, a quiet one has not

    def payload(self, place: int) -> dict[str, Json]:
        below, above = self._totals.array()[place].reshape(2, -1)
        kept = slice(_NORMAL, _INFINITE)
        zero = below[:_NORMAL].sum() + above[:_NORMAL].sum()
        dense = np.concatenate([below[kept][::-1], [zero], above[kept]])
        bins = np.flatnonzero(dense)
        rows = slice(*np.searchsorted(self._rows, (place, place + 1)))
        moments = np.zeros((4, 0)) if self._moments is None else self._moments.array()[:, rows].astype(np.float64)
        num, has_any = int(dense.sum()), bool(dense.any())
        with np.errstate(over="ignore"):
            total, squares = (float(row.sum()) for row in moments[2:])
        return {
            "num": num, "min": float(moments[0].min()) if has_any else None,
            "max": float(moments[1].max()) if has_any else None, "sum": total, "sum_squares": squares,
            "nan": int(below[_INFINITE + 1 :].sum() + above[_INFINITE + 1 :].sum()) - self._filled[place],
            "positive_infinite": int(above[_INFINITE]), "negative_infinite": int(below[_INFINITE]),
            "bins": (bins - len(dense) // 2).tolist(), "counts": dense[bins].tolist(),
        }  # fmt: skip


def _groups(flats: Iterable[Piece], most: int) -> Iterator[list[Piece]]:
    """Pieces that are counted together: at most ``most`` values, of one kind."""
    group: list[Piece] = []
    room = most
    for place, flat in flats:
        for piece in (flat[start : start + most] for start in range(0, len(flat), most)):
            if group and (_num_rows(piece) * _ROW > room or _kind(piece) != _kind(group[0][1])):
                yield group
                group, room = [], most
            group.append((place, piece))
            room -= _num_rows(piece) * _ROW
    if group:
        yield group


def _num_rows(piece: Tensor) -> int:
    return -(-len(piece) // _ROW)


def _kind(piece: Tensor) -> torch.dtype:
    return torch.float64 if piece.dtype in _WIDE and piece.device.type != "mps" else torch.float32


def _counts(x: Tensor, offsets: Tensor, num: int) -> Tensor:
    """How many values are in each cell of ``num`` distributions. Shapes: x (rows, 1024), offsets (rows,)"""
    if x.dtype == torch.float64:
        x = torch.where(x.isfinite(), x.clamp(-_LARGEST, _LARGEST), x).float()
    cells = (x.view(torch.int32) >> _FRACTION_BITS).add_(offsets[:, None]).view(-1)
    if x.is_cuda:  # bincount would wait for the device
        counts = torch.zeros(num * _CELLS, dtype=torch.int32, device=x.device)
        return counts.index_add_(0, cells, torch.ones_like(cells)).view(num, _CELLS)
    return torch.bincount(cells, minlength=num * _CELLS).view(num, _CELLS)


def _moments(x: Tensor) -> Tensor:
    """Of the finite values of each row: min, max, sum, sum of squares. Shapes: (4, rows)"""
    wide = x.nan_to_num(0.0, 0.0, 0.0).to(torch.float32 if x.device.type == "mps" else torch.float64)
    low = x.nan_to_num(math.inf, math.inf, math.inf).amin(1)  # aminmax takes ten times as long by rows
    high = x.nan_to_num(-math.inf, -math.inf, -math.inf).amax(1)
    return torch.stack([low.to(wide.dtype), high.to(wide.dtype), wide.sum(1), wide.square_().sum(1)])


class _Distribution:
    def __init__(self, counted: _Counted, place: int):
        self._counted, self._place = counted, place

    def settle(self, media: MediaStore) -> dict[str, Json]:
        return self._counted.payload(self._place)
