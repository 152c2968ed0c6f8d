"""The device, the precision, and a batch's way there: images become numbers once, on the device."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..contracts import INDEX, Batch, Preprocess, Schema
from ..data.reading import tensors_in, valid_rows
from ..errors import SettingsError
from .decisions import Decisions
from .recipe import TrainSettings

_MMAP_FROM, _TRIM_FROM, _KEPT_BYTES = -3, -1, 1 << 30  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(settings: TrainSettings, decisions: Decisions) -> torch.device:
    """The device to train on.

    Raises:  SettingsError if the device that is set is not there
    """
    if settings.device != "auto":
        return existing_device(settings.device, "train.device")
    found, reason = default_device()
    decisions.note("device", str(found), reason, "train.device")
    return found


def default_device() -> tuple[torch.device, str]:
    """The device that this machine computes best on, and why."""
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.cuda.get_device_name()
    if torch.backends.mps.is_available():
        return torch.device("mps"), "Apple's GPU"
    return torch.device("cpu"), "no accelerator was found"


def choose_memory(settings: TrainSettings, device: torch.device, decisions: Decisions) -> None:
    """Keep freed memory on a CPU, where that is set and possible."""
    if settings.keep_memory and device.type == "cpu" and keep_freed_memory():
        decisions.note("memory", "freed is kept", "the next step needs it again", "train.keep_memory")


def existing_device(name: str, where: str) -> torch.device:
    """The device of this name.

    Raises:  SettingsError if it is not there
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(
            "this device is not there", where=where, got=f"{name!r} ({str(error).splitlines()[0]})",
            expected="auto, cpu" + (", cuda" if torch.cuda.is_available() else ""),
        ) from None  # fmt: skip
    return device


def choose_precision(settings: TrainSettings, device: torch.device, decisions: Decisions) -> str:
    """fp32, bf16 or fp16. On a CPU "auto" is fp32: bf16 is faster there only on some."""
    if settings.precision != "auto":
        return settings.precision
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    value, reason = ("bf16", "the GPU computes in it") if has_bf16 else ("fp32", f"the safe one on {device.type}")
    return str(decisions.choose("precision", value, reason, "train.precision"))


def choose_threads(settings: TrainSettings, decisions: Decisions) -> int:
    """Set torch's threads on the CPU; the number changes bits, so a resume takes the recorded one."""
    if settings.threads is not None:
        threads = settings.threads
    else:
        now = torch.get_num_threads()
        threads = int(decisions.choose("threads", now, "torch's own choice here", "train.threads"))
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    return threads


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for the next batch; False where it is not glibc. No bit changes by it.

    Left to itself it gives each large tensor back and asks for it anew, at a page fault for each 4 KB: a quarter of a
    step of MobileNetV2 on a CPU, and half of a forward alone.
    Source:  https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    library = _glibc()
    return library is not None and all(library.mallopt(kind, _KEPT_BYTES) for kind in (_MMAP_FROM, _TRIM_FROM))


def give_back_memory() -> None:
    """Give the system what was kept and is not used."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


@cache
def _glibc() -> Any:
    try:
        library = ctypes.CDLL(None) if sys.platform == "linux" else None
        return library if library is not None and library.gnu_get_libc_version else None
    except (OSError, AttributeError):
        return None


def autocast(precision: str, device: torch.device) -> Any:
    """The context of a forward: nothing for fp32, torch's autocast else."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, _DTYPES[precision])


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler | None:
    """fp16 gradients underflow without one (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2)."""
    return torch.amp.GradScaler(device.type) if precision == "fp16" else None


class _OnItsWay(dict[str, Any]):
    """A batch whose tensors are being copied; ``arrived`` is the event after which they are there."""

    arrived: torch.cuda.Event


def number_at_hand(value: Tensor) -> Tensor | float:
    """One number as it is cheapest kept: read where it lies on the CPU, for nothing waits there; else as a tensor."""
    return value.item() if value.is_cpu else value.detach().reshape(())


class Mover:
    """Takes batches to the device; uint8 images become normalised float32 there, once."""

    def __init__(self, device: torch.device, schema: Schema):
        self.device = device
        self._stays = device.type == "cpu"
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._images = [name for name, field in schema.items() if field.kind == "image"]
        self._scale: Tensor | None = None
        if self._images and schema.preprocess is not None:
            self._scale, self._shift = _scale_and_shift(schema.preprocess, device)
            self._wide_scale = self._scale / 257  # 65535 / 255: for images of 16 bits

    @property
    def copies(self) -> bool:
        """Whether batches go to another device on a stream of their own."""
        return self._copying is not None

    def begin(self, batch: Batch) -> Batch:
        """Leave out the rows that are none, and begin the way to a GPU: from pinned memory, on a stream of its own."""
        batch = valid_rows(batch)
        if self._copying is None:
            return batch
        with torch.cuda.stream(self._copying):
            moved = _OnItsWay({name: self._moved(name, value) for name, value in batch.items()})
            moved.arrived = self._copying.record_event()
        return moved

    def __call__(self, batch: Batch) -> Batch:
        if isinstance(batch, _OnItsWay):
            self._wait(batch)
        elif not self._stays:
            batch = {name: self._moved(name, value) for name, value in batch.items()}
        if self._images and self._scale is not None:
            batch = dict(batch)
            for name in self._images:
                image = batch.get(name)
                if isinstance(image, Tensor) and not image.is_floating_point():
                    scale = self._wide_scale if image.dtype == torch.uint16 else self._scale
                    batch[name] = image.float().mul_(scale).sub_(self._shift)
        return batch

    def _wait(self, batch: _OnItsWay) -> None:
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(batch.arrived)
        for tensor in tensors_in(batch):
            if tensor.device == self.device:
                tensor.record_stream(stream)  # its memory is not given away before this stream is done with it

    def _moved(self, name: str, value: Any) -> Any:
        if isinstance(value, Tensor) and name != INDEX:
            return (value if self._copying is None else value.pin_memory()).to(self.device, non_blocking=True)
        if isinstance(value, dict):
            return {inner: self._moved(inner, item) for inner, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._moved("", item) for item in value)
        return value


def _scale_and_shift(preprocess: Preprocess, device: torch.device) -> tuple[Tensor, Tensor]:
    # (x / 255 - mean) / std as x × scale - shift: one multiplication and one subtraction in place
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, -1, 1, 1) for v in (preprocess.mean, preprocess.std))
    return (1 / (255 * std)).float().to(device), (mean / std).float().to(device)
