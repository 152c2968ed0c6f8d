"""TensorBoard's event files: how they are framed, named, written and read. Events are encoded here by hand.

TensorBoard's own writer takes 92 µs for a number; while it builds its objects, the training waits for the interpreter.

Sources:  TFRecord framing: length (u64), its masked CRC, data, their masked CRC, all little endian; the mask is that of
          TensorFlow's ``lib/hash/crc32c.h``; https://protobuf.dev/programming-guides/encoding; the numbers of fields
          are those of ``tensorboard/compat/proto/{event,summary,tensor}.proto``
"""

from __future__ import annotations

import math
import os
import re
import socket
import struct
import time
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import google_crc32c

from ..files import reported, write_all

FLOAT_MAX = 3.4028234663852886e38
"""The largest float32, as which TensorBoard shows every number."""
GRAPH_TAG = "__run_graph__"
_VERSION = "brain.Event:2"
_HEADER = struct.Struct("<QI")
_CRC = struct.Struct("<I")
_DOUBLE = struct.Struct("<d")
_WALL_TIME, _STEP, _SUMMARY = b"\x09", b"\x10", b"\x2a"  # fields 1, 2, 5 of an Event, as the wire has them


# --- messages


def varint(number: int) -> bytes:
    """An integer as protobuf has it: seven bits a byte, a negative one as its complement in 64 bits."""
    if 0 <= number < 128:
        return number.to_bytes(1, "little")
    number &= (1 << 64) - 1
    coded = bytearray()
    while number > 127:
        coded.append(number & 127 | 128)
        number >>= 7
    coded.append(number)
    return bytes(coded)


def message(*fields: tuple[int, int | float | str | bytes]) -> bytes:
    """A protobuf message of (number, value): an int is a varint, a float a double, bytes may be a message or packed."""
    parts: list[bytes] = []
    for number, value in fields:
        if isinstance(value, float):
            parts += varint(number << 3 | 1), _DOUBLE.pack(value)
        elif isinstance(value, int):
            parts += varint(number << 3), varint(value)
        else:
            data = value.encode("utf-8", "replace") if isinstance(value, str) else value
            parts += varint(number << 3 | 2), varint(len(data)), data
    return b"".join(parts)


def single(number: int, value: float) -> bytes:
    """A field of 32 bits; what is beyond them becomes infinite."""
    return varint(number << 3 | 5) + struct.pack("<f", _within(value))


def _within(value: float) -> float:
    return math.copysign(math.inf, value) if abs(value) > FLOAT_MAX else value


def tensor(kind: int, shape: Sequence[int], data: bytes) -> bytes:
    """A TensorProto of numbers as they lie in memory; ``kind`` is 1 for float32, 3 for int32, 4 for uint8."""
    return message((1, kind), (2, shape_of(shape)), (4, data))


def shape_of(shape: Sequence[int]) -> bytes:
    """A TensorShapeProto."""
    return b"".join(message((2, message((1, size)))) for size in shape)


def event(time_s: float, step: int, *fields: tuple[int, int | float | str | bytes]) -> bytes:
    """A framed Event."""
    return frame(message((1, float(time_s)), (2, step), *fields))


class ScalarEvent(NamedTuple):
    """An Event of numbers with everything but the numbers encoded before: 20 of them take 5 µs."""

    packing: struct.Struct
    parts: list[Any]  # turn by turn what stands before a number, and a number
    lead: bytes

    @classmethod
    def of(cls, tags: Collection[str]) -> ScalarEvent:
        values = [message((1, message((1, tag)) + single(2, 0.0)))[:-4] for tag in tags]
        packing = struct.Struct("<" + "".join(f"{len(value)}sf" for value in values))
        parts = [part for value in values for part in (value, 0.0)]
        return cls(packing, parts, _SUMMARY + varint(packing.size))

    def encode(self, time_s: float, step: int, numbers: Collection[float]) -> bytes:
        """The framed Event.

        Raises:  struct.error or TypeError for what is no number
        """
        parts = self.parts
        parts[1::2] = numbers
        try:
            body = self.packing.pack(*parts)
        except OverflowError:
            parts[1::2] = map(_within, numbers)
            body = self.packing.pack(*parts)
        return frame(b"".join((_WALL_TIME, _DOUBLE.pack(time_s), _STEP, varint(step), self.lead, body)))


# --- records of a file


def frame(data: bytes) -> bytes:
    """One TFRecord."""
    return b"".join((_header(len(data)), data, _CRC.pack(masked_crc32c(data))))


@lru_cache(1024)
def _header(size: int) -> bytes:
    data = struct.pack("<Q", size)
    return data + _CRC.pack(masked_crc32c(data))


def masked_crc32c(data: bytes) -> int:
    """The checksum as a TFRecord holds it."""
    crc: int = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_events(path: Path) -> Iterator[Any]:
    """The events of one file, up to its end or to the first that is torn or damaged, where TensorBoard stops too."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    with path.open("rb") as file:
        while len(header := file.read(_HEADER.size)) == _HEADER.size:
            size, crc = _HEADER.unpack(header)
            if crc != masked_crc32c(header[:8]):
                return
            data, tail = file.read(size), file.read(_CRC.size)
            if len(tail) < _CRC.size or _CRC.unpack(tail)[0] != masked_crc32c(data):
                return
            try:
                yield Event.FromString(data)
            except DecodeError:
                return


# --- a folder's files


def event_files(folder: Path) -> list[Path]:
    """The event files of a folder in the order in which TensorBoard reads them."""
    return sorted(folder.glob("*tfevents*"))


def shown_in(folder: Path) -> tuple[dict[str, int], dict[str, str]]:
    """What a folder's event files show: the highest step of every tag, and the plugin that it belongs to."""
    steps: dict[str, int] = {}
    plugins = {GRAPH_TAG: "graphs"}
    for path in event_files(folder):
        for found in read_events(path):
            if found.graph_def:
                steps[GRAPH_TAG] = max(steps.get(GRAPH_TAG, found.step), found.step)
            for value in found.summary.value:
                tag = value.tag
                if tag not in plugins:
                    plugins[tag] = value.metadata.plugin_data.plugin_name or "scalars"
                steps[tag] = max(steps.get(tag, found.step), found.step)
    return steps, plugins


class EventFile:
    """The file of one attempt, made with the first event. It comes last in its folder, whatever the clock says."""

    def __init__(self, folder: Path, attempt: int):
        self.folder = folder
        self.attempt = attempt
        self._file: IO[bytes] | None = None
        self._size_bytes = 0

    def append(self, data: bytes) -> None:
        """Add framed events.

        Raises:  StorageError where the disk refuses; nothing of them is then in the file
        """
        if not data:
            return
        with reported(self.folder):
            file = self._file or self._open()
            try:
                write_all(file, memoryview(data))
            except OSError:
                # readers stop at a torn event, so none may stay before the next
                file.truncate(self._size_bytes)
                file.seek(self._size_bytes)
                raise
        self._size_bytes += len(data)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> IO[bytes]:
        self.folder.mkdir(parents=True, exist_ok=True)
        first_s = _time_of_name(self.folder, int(time.time()))
        name = f"events.out.tfevents.{first_s:010d}.{socket.gethostname()}.{os.getpid()}.{self.attempt}"
        file = (self.folder / name).open("xb", buffering=0)
        head = event(time.time(), 0, (3, _VERSION))
        try:
            write_all(file, memoryview(head))
        except OSError:
            file.close()
            (self.folder / name).unlink()
            raise
        self._file, self._size_bytes = file, len(head)
        return file


def _time_of_name(folder: Path, now_s: int) -> int:
    # TensorBoard orders files by name and never goes back: a new one must come last
    found = [re.search(r"tfevents\.(\d+)", path.name) for path in event_files(folder)]
    return max([now_s, *(int(match[1]) + 1 for match in found if match)])
