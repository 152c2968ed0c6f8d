"""The record as TensorBoard shows it: each kind as an event of the plugin that draws it."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..contracts import Json
from ..files import write_durable
from .events import (
    FLOAT_MAX,
    GRAPH_TAG,
    EventFile,
    ScalarEvent,
    event,
    message,
    shape_of,
    shown_in,
    single,
    tensor,
    varint,
)
from .media import MediaStore
from .records import Record

_NUMBERS = frozenset(("scalars", "timing", "system"))
_ONCE = ("graphs", "hparams")
_BEFORE_ALL = -(1 << 64)
_MOST_LAYOUTS = 1000
_MOST_TAG = 1000  # characters
_MOST_TEXT, _MOST_BRACKETS, _MOST_CELL = 10_000, 100, 500
_VERTEX, _FACE, _COLOR = 1, 2, 3
_FLOAT32, _INT32, _UINT8, _STRING = 1, 3, 4, 7
_WAV = message((2, 11))  # the encoding, of an AudioPluginData
_MOMENTS = ("min", "max", "num", "sum", "sum_squares")

_NESTED = re.compile(r"^[ \t]*(?:(?:\d+\.|[-*+>])[ \t]+){20}", re.MULTILINE)

Shown = tuple[str, str, bytes, bytes]
"""Tag, plugin, the plugin's own data, and the value as fields of a Summary.Value."""


class TensorBoardView:
    """Shows a record in the event files of ``folder``; the file of this attempt is made with the first event.

    Earlier files there are read first: what is at or below the highest step that its tag has there is not shown again,
    nor is what this view was given before. So a step that goes back is not shown, and of a tag's numbers at one step
    the first is.

    What TensorBoard cannot have is mapped. A tag belongs to the plugin that shows it first: elsewhere it becomes
    "TAG/PLUGIN". Of a tag's characters those that cannot be printed are escaped, what is beyond 1,000 is told by a
    hash, and none at all is "(no tag)". In a graph all but letters, digits and "_./-" become "_".

    TensorBoard itself keeps 10 images or sounds a tag, 500 histograms and 1,000 numbers, spread over the steps:
    ``tensorboard --samples_per_plugin images=100`` keeps more. The record has all.
    """

    name = "tensorboard"
    close_timeout_s = 30.0

    def __init__(self, folder: Path, attempt: int):
        self.folder = folder
        self._file = EventFile(folder, attempt)
        self._has_read = False
        self._steps: dict[str, int] = {}  # the highest of each tag
        self._plugins: dict[str, str] = {}
        self._last: dict[str, tuple[int, int]] = {}  # which record that was, where it is of this view's life
        self._layouts: dict[tuple[str, ...], tuple[list[str], ScalarEvent]] = {}

    def write(self, records: list[Record], media: MediaStore) -> None:
        """Show the records: one event each, one write for all.

        Raises:  StorageError where the disk refuses, RunFolderError for a medium that is damaged; nothing of these
                 records is then shown
        """
        if not self._has_read:
            # here and not in __init__: reading a long run takes seconds, and this is not the trainer's thread
            self._steps, self._plugins = shown_in(self.folder)
            self._has_read = True
        before = dict(self._steps), dict(self._plugins), dict(self._last)
        try:
            self._file.append(b"".join(self._events(records, media)))
        except BaseException:
            self._steps, self._plugins, self._last = before
            self._layouts.clear()
            raise

    def flush(self) -> None:
        """Nothing waits here: every write reached the system."""

    def close(self) -> None:
        self._file.close()

    def abandon(self) -> None:
        """A disk that hangs is left alone."""

    def _events(self, records: list[Record], media: MediaStore) -> Iterator[bytes]:
        for record in records:
            kind = record["kind"]
            if kind in _NUMBERS:
                yield self._numbers(record, record["values"])
            elif kind == "profile":
                self._keep_trace(record, media)
            elif kind in _KINDS:
                for tag, plugin, content, value in _KINDS[kind](record, media):
                    yield self._event(record, tag, plugin, content, value)

    def _numbers(self, record: Record, values: dict[str, Any]) -> bytes:
        """All numbers of a record as one event, the fast way where all are new."""
        names, event_of = self._layouts.get(tuple(values)) or self._layout(tuple(values))
        steps = self._steps
        step: int = record["step"]
        assert steps is not None
        if not names:
            return b""
        if step > max(map(steps.__getitem__, names)):
            try:
                data = event_of.encode(record["time"], step, values.values())
            except (struct.error, TypeError):
                numbers = {tag: value for tag, value in values.items() if isinstance(value, int | float)}
                if len(numbers) == len(values):
                    raise
                return self._numbers(record, numbers)
            steps.update(dict.fromkeys(names, step))
            return data
        fresh = [step > steps[name] for name in names]
        return self._numbers(record, {tag: values[tag] for tag, is_new in zip(values, fresh, strict=True) if is_new})

    def _layout(self, tags: tuple[str, ...]) -> tuple[list[str], ScalarEvent]:
        if len(self._layouts) >= _MOST_LAYOUTS:
            self._layouts.clear()
        names = [self._name(tag, "scalars") for tag in tags]
        for name in names:
            self._steps.setdefault(name, _BEFORE_ALL)
        self._layouts[tags] = names, ScalarEvent.of(names)
        return self._layouts[tags]

    def _event(self, record: Record, tag: str, plugin: str, content: bytes, value: bytes) -> bytes:
        """One event, empty where it was shown before."""
        name = GRAPH_TAG if plugin == "graphs" else self._name(tag, plugin)
        if not self._is_new(name, record, plugin in _ONCE):
            return b""
        if plugin == "graphs":
            return event(record["time"], record["step"], (4, value))
        metadata = message((1, message((1, plugin), (2, content))))
        shown = message((1, message((1, name), (9, metadata)) + value))
        return event(record["time"], record["step"], (5, shown))

    def _is_new(self, name: str, record: Record, once: bool) -> bool:
        """Whether it is beyond what is shown; at the very step only what the same attempt has recorded later."""
        step, place = record["step"], (record.get("attempt", 0), record.get("seq", 0))
        last_step, last = self._steps.get(name, _BEFORE_ALL), self._last.get(name, (-1, -1))
        is_later = step == last_step and place[0] == last[0] and place[1] > last[1]
        if not (step > last_step or is_later) or (once and name in self._steps):
            return False
        self._steps[name], self._last[name] = step, place
        return True

    def _name(self, tag: str, plugin: str) -> str:
        """The tag as it is shown, which no other plugin has."""
        name = tag if tag.isprintable() else "".join(map(_printable, tag))
        if len(name) > _MOST_TAG:
            import hashlib

            name = f"{name[:_MOST_TAG]}…{hashlib.sha256(tag.encode()).hexdigest()[:8]}"
        name = name or "(no tag)"
        while self._plugins.setdefault(name, plugin) != plugin:
            name += f"/{plugin}"
        return name

    def _keep_trace(self, record: Record, media: MediaStore) -> None:
        """Where torch-tb-profiler and chrome://tracing find it."""
        data = media.read(record["media"])
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"steps-{record['first_step']}-{record['last_step']}.pt.trace.json"
        write_durable(self.folder / name, data)


def _printable(letter: str) -> str:
    return letter if letter.isprintable() else letter.encode("unicode_escape").decode()


# --- pictures, sounds, meshes


def _image(record: Record, media: MediaStore) -> Iterator[Shown]:
    if record["media"] is not None:
        yield record["tag"], "images", b"", _picture(media.read(record["media"]))
    yield from _caption(record)
    if record["kind"] == "prediction":
        heads = ("sample", "input", "truth", "output", "confidence", "is_right")
        rows = [[row.get(head) for head in heads] for row in record["rows"]]
        yield _text(f"{record['tag']}/rows", _table(heads, rows))


def _picture(png: bytes) -> bytes:
    width, height = struct.unpack_from(">II", png, 16)
    return message((4, message((1, height), (2, width), (3, 3), (4, png))))


def _caption(record: Record) -> Iterator[Shown]:
    if record.get("caption"):
        yield _text(f"{record['tag']}/caption", _literal(record["caption"]))


def _confusion(record: Record, media: MediaStore) -> Iterator[Shown]:
    from .pictures import confusion_picture

    yield record["tag"], "images", b"", _picture(confusion_picture(record["classes"], record["counts"]))


def _audio(record: Record, media: MediaStore) -> Iterator[Shown]:
    # not as a Summary.Audio: the reader in Rust would give it to the page as bytes of no type
    value = message((8, message((1, _STRING), (2, shape_of((1, 2))), (8, media.read(record["media"])), (8, b""))))
    yield record["tag"], "audio", _WAV, value
    yield from _caption(record)


def _mesh(record: Record, media: MediaStore) -> Iterator[Shown]:
    """Each part under a tag of its own, as the plugin has it. Of the scene only the first step's settings count."""
    from safetensors.numpy import load

    parts = load(media.read(record["media"]))
    vertices, colors, faces = (parts.get(name, np.empty((0, 3))) for name in ("vertices", "colors", "faces"))
    if not len(vertices):
        return
    # both sides of a face are drawn; points are as large as a 100th of the whole, which the view fits to
    material = {"side": 2} if len(faces) else {"size": max(float(np.ptp(vertices, axis=0).max()) / 100, 1e-6)}
    config = json.dumps({"material": material})
    rows = [("VERTEX", _VERTEX, vertices, "<f4", _FLOAT32), ("COLOR", _COLOR, colors, "u1", _UINT8),
            ("FACE", _FACE, faces, "<i4", _INT32)]  # fmt: skip
    present = sum(1 << part for _, part, values, *_ in rows if len(values))
    for name, part, values, kind, dtype in rows:
        if len(values):
            shape = (1, *values.shape)
            told = (2, record["tag"]), (3, part), (5, config), (6, b"".join(map(varint, shape))), (7, present)
            value = message((8, tensor(dtype, shape, values.astype(kind).tobytes())))
            yield f"{record['tag']}_{name}", "mesh", message(*told), value
    yield from _caption(record)


# --- distributions and curves


def _histogram(record: Record, media: MediaStore) -> Iterator[Shown]:
    tag = record["tag"]
    if record["num"]:
        limits, counts = _buckets(record["bins"], record["counts"])
        facts = [(place, _finite(record[key])) for place, key in enumerate(_MOMENTS, 1)]
        packed = [(6, np.array(limits, "<f8").tobytes()), (7, np.array(counts, "<f8").tobytes())]
        yield tag, "histograms", b"", message((5, message(*facts, *packed)))
    num_left_out = sum(record[key] for key in ("nan", "positive_infinite", "negative_infinite"))
    if num_left_out:
        yield f"{tag}/not_finite", "scalars", b"", single(2, num_left_out)


def _buckets(bins: list[int], counts: list[int]) -> tuple[list[float], list[int]]:
    """Upper edges and counts without a gap: each bucket begins where the one before it ends."""
    from .histograms import edges

    limits: list[float] = []
    filled: list[int] = []
    for bin_idx, count in zip(bins, counts, strict=True):
        low, high = map(_finite, edges(bin_idx))
        if limits and low > limits[-1]:
            limits.append(low)
            filled.append(0)
        limits.append(high)
        filled.append(count)
    return limits, filled


def _finite(value: float) -> float:
    # TensorBoard holds float32, and a page with an infinite edge draws nothing
    return min(FLOAT_MAX, max(-FLOAT_MAX, float(value)))


def _pr_curve(record: Record, media: MediaStore) -> Iterator[Shown]:
    names = ("true_positives", "false_positives", "true_negatives", "false_negatives", "precision", "recall")
    rows = np.nan_to_num(np.array([record[name] for name in names], "<f4"))
    if rows.size:
        plugin_data = message((2, rows.shape[1]))
        yield record["tag"], "pr_curves", plugin_data, message((8, tensor(_FLOAT32, rows.shape, rows.tobytes())))


# --- texts


def _text(tag: str, markdown: str) -> Shown:
    return tag, "text", b"", message((8, message((1, _STRING), (2, b""), (8, markdown))))


def _own_text(record: Record, media: MediaStore) -> Iterator[Shown]:
    """As markdown, unless it is long, or TensorBoard's server would take minutes for it or fail."""
    text, size = record["text"], record["num_characters"]
    # its time grows with the square of the "[", and it recurses into each list within a list
    if size > _MOST_TEXT or text.count("[") > _MOST_BRACKETS or _NESTED.search(text):
        rest = f"\n\n{size:,} characters in all; the rest is in the run's record" if size > _MOST_TEXT else ""
        text = "".join(f"    {line}\n" for line in text[:_MOST_TEXT].splitlines()) + rest
    yield _text(record["tag"], text)


def _literal(text: Any) -> str:
    """A text as markdown that shows it as it is."""
    lines = _cut(str(text), _MOST_TEXT).strip().splitlines()
    return "<br>".join(re.sub(r"[^\w\s,;%'\"]|_", lambda found: f"&#{ord(found[0])};", line) for line in lines)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}…"


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [heads, ["---"] * len(heads), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "", True: "✓", False: "✗"}[value]
    return _literal(_cut(f"{value:.6g}" if isinstance(value, float) else str(value), _MOST_CELL))


def _alert(record: Record, media: MediaStore) -> Iterator[Shown]:
    fix = f"\n\nfix: {_literal(record['fix'])}" if record.get("fix") else ""
    yield _text(f"alert/{record['name']}", f"**{_literal(record['level'])}** {_literal(record['text'])}{fix}")


def _decision(record: Record, media: MediaStore) -> Iterator[Shown]:
    yield _facts(f"decision/{record['name']}", record, ("value", "reason", "override"))


def _artifact(record: Record, media: MediaStore) -> Iterator[Shown]:
    yield _facts(f"artifact/{record['name']}", record, ("type", "path", "media", "sha256", "bytes", "parents"))


def _facts(tag: str, record: Record, keys: Iterable[str]) -> Shown:
    told = {key: record[key] for key in keys if record.get(key) not in (None, "", [], {})}
    return _text(tag, _table(("", ""), told.items()))


def _trainable_map(record: Record, media: MediaStore) -> Iterator[Shown]:
    from .trainable import folded, state_of

    rows = folded(record["rows"])
    cells = [("· " * row["depth"] + row["name"], row["kind"], state_of(row), row["num_parameters"]) for row in rows]
    frontier = f"\n\nfrontier: {_literal(', '.join(record['frontier']))}" if record.get("frontier") else ""
    yield _text("what learns", _table(("module", "kind", "state", "parameters"), cells) + frontier)


# --- the run


def _run_start(record: Record, media: MediaStore) -> Iterator[Shown]:
    """The settings as a row of the HPARAMS page, which takes its columns and metrics from the runs that it finds.

    There is no "experiment" on purpose: TensorBoard takes one of them for all runs, and hides what only others have.
    """
    code = record.get("code") or {}
    facts = {**record, "commit": code.get("commit")}
    yield _facts("run/start", facts, ("command", "seed", "commit"))
    settings = dict(_flat("", record.get("settings") or record.get("recipe") or {}))
    if settings:
        rows = b"".join(message((1, message((1, key), (2, _setting(value))))) for key, value in settings.items())
        begun = rows + message((5, float(record.get("began") or record["time"])))
        yield "_hparams_/session_start_info", "hparams", message((3, begun)), _NOTHING


def _flat(prefix: str, value: Json) -> Iterator[tuple[str, bool | int | float | str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else key, item)
    elif isinstance(value, float) and not math.isfinite(value):
        yield prefix, str(value)
    elif isinstance(value, bool | int | float | str):
        yield prefix, value


def _setting(value: bool | int | float | str) -> bytes:
    """A google.protobuf.Value."""
    if isinstance(value, bool):
        return message((4, value))
    return message((3, _cut(value, _MOST_CELL)) if isinstance(value, str) else (2, float(value)))


def _run_end(record: Record, media: MediaStore) -> Iterator[Shown]:
    yield _facts("run/end", record, ("status", "reason"))
    if record["status"] == "finished":  # another may go on, and TensorBoard keeps the first end that it is told
        yield "_hparams_/session_end_info", "hparams", message((4, message((1, 1), (2, record["time"])))), _NOTHING


_NOTHING = message((8, tensor(_FLOAT32, (0,), b"")))


def _graph(record: Record, media: MediaStore) -> Iterator[Shown]:
    nodes = json.loads(media.read(record["media"]))["nodes"]
    names = _node_names([node["name"] for node in nodes])
    name_of = {node["name"]: name for node, name in zip(nodes, names, strict=True)}
    data = b"".join(message((1, _node(node, name, name_of))) for node, name in zip(nodes, names, strict=True))
    yield GRAPH_TAG, "graphs", b"", data + message((4, message((1, 1))))


def _node_names(names: list[str]) -> list[str]:
    """Names that the page can read, each once."""
    found: dict[str, None] = {}
    for name in names:
        plain = made = "/".join(filter(None, re.sub(r"[^A-Za-z0-9_./-]", "_", name).split("/"))) or "_"
        count = 0
        while made in found:
            count += 1
            made = f"{plain}_{count}"
        found[made] = None
    return list(found)


def _node(node: Json, name: str, name_of: dict[str, str]) -> bytes:
    """A NodeDef, with its shapes where the page looks for them."""
    inputs = [(3, name_of[source]) for source in node["inputs"] if source in name_of]
    shapes = b"".join(message((7, shape_of(shape))) for shape in node["shapes"] or ())
    attributes = [("_output_shapes", message((1, shapes)))] if shapes else []
    attributes += [("dtype", message((2, str(node["dtype"]))))] if node.get("dtype") else []
    rows = [(5, message((1, key), (2, value))) for key, value in attributes]
    return message((1, name), (2, node["op"]), *inputs, *rows)


_KINDS: dict[str, Callable[[Record, MediaStore], Iterator[Shown]]] = {
    "histogram": _histogram, "image": _image, "prediction": _image, "figure": _image, "confusion": _confusion,
    "mesh": _mesh, "audio": _audio, "pr_curve": _pr_curve, "text": _own_text, "alert": _alert,
    "decision": _decision, "artifact": _artifact, "trainable_map": _trainable_map, "run_start": _run_start,
    "run_end": _run_end, "graph": _graph,
}  # fmt: skip
