"""An example for a model that comes without data: inputs of stated shapes, drawn from keyed generators."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..chance import ChanceKey, keyed_seed
from ..errors import SettingsError

_FORM = re.compile(r"(?:(?P<name>\w+)=)?(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?")
_FLOATS = ("float32", "float64", "float16", "bfloat16")
_WHOLE = ("int64", "int32", "uint8", "bool")
_EXPECTED = "1x3x224x224, 2x16:int64 or name=2x16:int64"


def example_of(inputs: Sequence[str]) -> Any:
    """A batch of what ``inputs`` state: a tensor, a tuple of several, or a dict where they are named.

    "2x3x8x8" is drawn from a normal distribution; "2x16:int64" is of 0 and 1, which are numbers of classes or tokens
    in every model.

    Raises:  SettingsError for what states no input, or where only some are named
    """
    drawn = [_drawn(text, place) for place, text in enumerate(inputs)]
    if any(name for name, _ in drawn):
        if len({name for name, _ in drawn} - {""}) < len(drawn):
            raise SettingsError("every input has a name of its own, or none has", where="--input",
                                got=" ".join(inputs), expected="a=2x3 b=2x3:int64, or 2x3 2x3:int64")  # fmt: skip
        return dict(drawn)
    return drawn[0][1] if len(drawn) == 1 else tuple(tensor for _, tensor in drawn)


def _drawn(text: str, place: int) -> tuple[str, Tensor]:
    found = _FORM.fullmatch(text)
    dtype = (found["dtype"] or "float32") if found else ""
    if found is None or dtype not in (*_FLOATS, *_WHOLE):
        raise SettingsError(
            "this states no input", where=f"--input {text}", got=dtype or repr(text),
            expected=f"{_EXPECTED}; types {', '.join((*_FLOATS, *_WHOLE))}",
        )  # fmt: skip
    shape, kind = [int(size) for size in found["shape"].split("x")], getattr(torch, dtype)
    generator = torch.Generator().manual_seed(keyed_seed(ChanceKey(), "example", place))
    try:
        if dtype in _FLOATS:
            return found["name"] or "", torch.randn(shape, generator=generator).to(kind)
        return found["name"] or "", torch.randint(0, 2, shape, generator=generator).to(kind)
    except RuntimeError as error:
        raise SettingsError("there is no room for this input", where=f"--input {text}", got=str(error)[:200],
                            expected=_EXPECTED) from None  # fmt: skip
