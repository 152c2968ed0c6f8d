"""The record as TensorBoard shows it: event files, written and read here.

Sources:  TFRecord framing: length (u64), its masked CRC, data, their masked CRC, all little endian;
          CRC-32C by Castagnoli et al. 1993 (RFC 3720, B.4), masked as TensorFlow's ``lib/hash/crc32c.h`` does
"""

from __future__ import annotations

import os
import re
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..files import reported, write_all

_SHOWN_KINDS = ("scalars", "timing")
_VERSION = "brain.Event:2"
_POLYNOMIAL = 0x82F63B78
_BLOCK_BYTES = 1024
_HEADER = struct.Struct("<QI")
_CRC = struct.Struct("<I")


class TensorBoardView:
    """Writes one attempt's event file into ``folder``.

    Earlier files there are read first: a value at or below the highest step that its tag has is not shown again.
    """

    def __init__(self, folder: Path, attempt: int):
        self.folder = folder
        self.attempt = attempt
        self._high_water: dict[str, int] | None = None
        self._described: set[str] = set()
        self._file: IO[bytes] | None = None
        self._size_bytes = 0

    def write(self, records: list[dict[str, Any]]) -> None:
        """Show the scalars among the records: one event a record, one write for all.

        Raises:  StorageError where the disk refuses; nothing of these records is then shown
        """
        shown = [record for record in records if record["kind"] in _SHOWN_KINDS]
        if not shown:
            return
        if self._high_water is None:
            # here and not in __init__: reading a long run takes seconds, and this is not the trainer's thread
            self._high_water = high_water(self.folder)
        fresh = _not_yet_shown(shown, self._high_water)
        self._append(b"".join(frame(self._event(record, values)) for record, values in fresh))
        for record, values in fresh:
            self._high_water.update(dict.fromkeys(values, record["step"]))

    def flush(self) -> None:
        """Nothing waits here: every write reached the system."""

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _event(self, record: dict[str, Any], values: dict[str, float]) -> bytes:
        from tensorboard.compat.proto.event_pb2 import Event

        event = Event(wall_time=record["time"], step=record["step"])
        add = event.summary.value.add
        for tag, number in values.items():
            value = add(tag=tag, simple_value=number)
            if tag not in self._described:
                self._described.add(tag)
                value.metadata.plugin_data.plugin_name = "scalars"
        data: bytes = event.SerializeToString()
        return data

    def _append(self, data: bytes) -> None:
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

    def _open(self) -> IO[bytes]:
        from tensorboard.compat.proto.event_pb2 import Event

        self.folder.mkdir(parents=True, exist_ok=True)
        first_s = _time_of_name(self.folder, int(time.time()))
        name = f"events.out.tfevents.{first_s:010d}.{socket.gethostname()}.{os.getpid()}.{self.attempt}"
        self._file = (self.folder / name).open("xb", buffering=0)
        head = frame(Event(wall_time=time.time(), file_version=_VERSION).SerializeToString())
        write_all(self._file, memoryview(head))
        self._size_bytes = len(head)
        return self._file


def _not_yet_shown(
    records: list[dict[str, Any]], high_water: dict[str, int]
) -> list[tuple[dict[str, Any], dict[str, float]]]:
    """Each record with those of its values that are beyond their tag's step."""
    high_water = dict(high_water)
    fresh = []
    for record in records:
        step = record["step"]
        values = {
            tag: float(value)
            for tag, value in record["values"].items()
            if isinstance(value, int | float) and step > high_water.get(tag, -1)
        }
        if values:
            fresh.append((record, values))
            high_water.update(dict.fromkeys(values, step))
    return fresh


def event_files(folder: Path) -> list[Path]:
    """The event files of a folder in the order in which TensorBoard reads them."""
    return sorted(folder.glob("*tfevents*"))


def _time_of_name(folder: Path, now_s: int) -> int:
    # TensorBoard orders files by name and never goes back: a new one must come last, whatever the clock says
    found = [re.search(r"tfevents\.(\d+)", path.name) for path in event_files(folder)]
    return max([now_s, *(int(match[1]) + 1 for match in found if match)])


def high_water(folder: Path) -> dict[str, int]:
    """The highest step of every tag in a folder's event files."""
    highest: dict[str, int] = {}
    for path in event_files(folder):
        for event in read_events(path):
            for value in event.summary.value:
                highest[value.tag] = max(highest.get(value.tag, -1), event.step)
    return highest


def read_events(path: Path) -> Iterator[Any]:
    """The events of one file, up to its end or to the first that is torn or damaged, where TensorBoard stops too."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
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


def frame(data: bytes) -> bytes:
    """One TFRecord."""
    size = struct.pack("<Q", len(data))
    return b"".join((size, _CRC.pack(masked_crc32c(size)), data, _CRC.pack(masked_crc32c(data))))


def masked_crc32c(data: bytes) -> int:
    """The checksum as a TFRecord holds it."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """CRC-32C.

    The checksum is linear, so a block's is the exclusive or of one table entry a byte, chosen by the byte and its
    distance from the end: NumPy gathers a kilobyte in a few µs, where a loop over bytes takes 60.
    """
    global _tables
    if len(data) <= 16:
        return _crc32c_by_byte(data)
    if _tables is None:
        _tables = _distance_tables()
    state = 0xFFFFFFFF
    for start in range(0, len(data), _BLOCK_BYTES):
        state = _advance(state, data[start : start + _BLOCK_BYTES], _tables)
    return state ^ 0xFFFFFFFF


def _advance(state: int, block: bytes, tables: np.ndarray[Any, Any]) -> int:
    head = int.from_bytes(block[:4], "little") ^ state
    if len(block) < 4:
        # what is left of the state passes over the end of so short a block
        shift = 8 * len(block)
        low = (head & ((1 << shift) - 1)).to_bytes(len(block), "little")
        return _gather(low, tables) ^ (state >> shift)
    return _gather(head.to_bytes(4, "little") + block[4:], tables)


def _gather(block: bytes, tables: np.ndarray[Any, Any]) -> int:
    places = np.frombuffer(block, np.uint8) + _OFFSETS[_BLOCK_BYTES - len(block) :]
    return int(np.bitwise_xor.reduce(tables.take(places)))


def _byte_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (_POLYNOMIAL if byte & 1 else 0)
        table.append(byte)
    return table


def _distance_tables() -> np.ndarray[Any, Any]:
    """(_BLOCK_BYTES * 256,) uint32: what a byte adds to the checksum, the row of the farthest from the end first."""
    first = np.array(_BYTE_TABLE, np.uint32)
    rows = [first]
    for _ in range(_BLOCK_BYTES - 1):
        rows.append(rows[-1] >> np.uint32(8) ^ first[rows[-1] & np.uint32(255)])
    return np.concatenate(rows[::-1])


def _crc32c_by_byte(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _BYTE_TABLE[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


_BYTE_TABLE = _byte_table()
_OFFSETS = np.arange(_BLOCK_BYTES, dtype=np.intp) * 256
_tables: np.ndarray[Any, Any] | None = None
