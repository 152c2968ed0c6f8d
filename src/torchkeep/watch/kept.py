"""Values that are shown later, as they are now."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import DataError


def numbers(value: Any, where: str) -> Any:
    """A dense tensor or array of real numbers, of either or of nested lists of them. Of a sharded tensor: this shard.

    Raises:  DataError for anything else
    """
    try:
        if isinstance(value, list | tuple) and value and hasattr(value[0], "detach"):
            import torch

            value = torch.stack(list(value))
        if hasattr(value, "detach"):
            value = getattr(value, "to_local", lambda: value)().detach().resolve_neg()
            if value.is_complex() or value.is_quantized or value.is_meta:
                raise TypeError(f"a tensor of {value.dtype} on {value.device}")
            value = value if str(value.layout) == "torch.strided" else value.to_dense()
            return _usual(value)
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise TypeError(f"{type(value).__name__} of {array.dtype}")
        return array.astype(np.float64 if array.dtype.itemsize > 8 else array.dtype.newbyteorder("="), copy=False)
    except Exception as error:  # whatever a foreign object says to being an array
        raise DataError(
            "these are no numbers that can be shown", where=where, got=str(error)[:300],
            expected="a tensor, an array or nested lists of real numbers",
        ) from None  # fmt: skip


def _usual(value: Any) -> Any:
    """Of a type that torch can compare and sort: float8 as float32, what is unsigned beyond a byte as signed."""
    name = str(value.dtype).removeprefix("torch.")
    if name.startswith("float8"):
        return value.float()
    if name == "uint64":
        return value.double()
    return value.long() if name in ("uint16", "uint32") else value


class Kept:
    """A copy of a tensor or array, which arrives from a GPU while the training goes on.

    Units:  floats of less than 32 bits as float32
    """

    def __init__(self, values: Any):
        self.shape = tuple(values.shape)
        self._event: Any = None
        if isinstance(values, np.ndarray):
            self._values: Any = values.copy()
            return
        is_short = values.is_floating_point() and values.element_size() < 4
        wide = values.float() if is_short else values
        if wide.device.type == "cuda":
            import torch

            self._values = wide.to("cpu", non_blocking=True)  # to pinned memory
            self._event = torch.cuda.current_stream(wide.device).record_event()
        else:
            self._values = wide if is_short else wide.clone().cpu()

    def array(self) -> np.ndarray[Any, Any]:
        """The values, waited for where they are still under way."""
        if self._event is not None:
            self._event.synchronize()
        return self._values if isinstance(self._values, np.ndarray) else np.asarray(self._values.cpu().numpy())
