"""What TensorBoard's own reader makes of our event files."""

from __future__ import annotations

import html
import json
import math
import os
import random
import re
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from google_crc32c import python as slow_crc32c
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from torchkeep.errors import RunFolderError
from torchkeep.watch.events import ScalarEvent, event, event_files, masked_crc32c, message, read_events, shown_in
from torchkeep.watch.media import MediaStore
from torchkeep.watch.tensorboard import TensorBoardView


def scalars(step: int, **values: float) -> dict[str, Any]:
    tags = {name.replace("_", "/"): value for name, value in values.items()}
    return {"kind": "scalars", "attempt": 0, "seq": step, "step": step, "time": 1000.0 + step, "values": tags}


def record(kind: str, step: int = 1, *, attempt: int = 0, seq: int = 0, **payload: Any) -> dict[str, Any]:
    head = {"kind": kind, "attempt": attempt, "rank": 0, "seq": seq, "step": step, "samples": 0, "epoch": 0}
    return {**head, "time": 1000.0, **payload}


def text(step: int, said: str, **head: int) -> dict[str, Any]:
    return record("text", step, tag="note", text=said, num_characters=len(said), media=None, **head)


def show(folder: Path, attempt: int, records: list[dict[str, Any]]) -> None:
    view = TensorBoardView(folder, attempt)
    view.write(records, MediaStore(folder.parent))
    view.flush()
    view.close()


def values_in(folder: Path) -> list[tuple[str, int, Any]]:
    """(tag, step, value) of all that the files show, in order."""
    return [
        (value.tag, found.step, value)
        for path in event_files(folder)
        for found in read_events(path)
        for value in found.summary.value
    ]


def texts_in(folder: Path) -> list[tuple[str, int, str]]:
    return [
        (tag, step, value.tensor.string_val[0].decode())
        for tag, step, value in values_in(folder)
        if value.metadata.plugin_data.plugin_name == "text"
    ]


def seen(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """By tag what TensorBoard's own reader finds."""
    program = """
        import json, sys
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        found = EventAccumulator(sys.argv[1])
        found.Reload()
        print(json.dumps({tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}))
    """
    # in a process of its own: TensorBoard's reader warns of things that are not ours
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {tag: [tuple(row) for row in rows] for tag, rows in json.loads(done.stdout).items()}


# --- the bytes


def test_checksums_are_tensorboards_with_or_without_the_compiled_module() -> None:
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c as theirs

    for size in [*range(40), 1023, 1024, 1025, 5000]:
        data = os.urandom(size)
        assert masked_crc32c(data) == theirs(data), size
        assert google_crc32c.value(data) == slow_crc32c.value(data)
    assert google_crc32c.value(b"123456789") == 0xE3069283


@given(
    st.floats(0, 1e12), st.integers(-(1 << 63), (1 << 63) - 1),
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.floats(width=32)),
)  # fmt: skip
def test_an_event_of_numbers_is_the_one_that_protobuf_writes(
    time_s: float, step: int, values: dict[str, float]
) -> None:
    from tensorboard.compat.proto.event_pb2 import Event

    theirs = Event(wall_time=time_s, step=step)
    theirs.summary.SetInParent()
    for tag, value in values.items():
        theirs.summary.value.add(tag=tag, simple_value=value)
    framed = ScalarEvent.of(values).encode(time_s, step, values.values())
    assert struct.unpack("<Q", framed[:8])[0] == len(framed) - 16
    found = Event.FromString(framed[12:-4])
    assert found.SerializeToString(deterministic=True) == theirs.SerializeToString(deterministic=True)


@given(st.floats(allow_nan=False), st.integers(-(1 << 63), (1 << 63) - 1), st.text(), st.binary())
def test_a_message_is_the_one_that_protobuf_reads(a: float, b: int, c: str, d: bytes) -> None:
    from tensorboard.compat.proto.event_pb2 import Event

    found = Event.FromString(event(a, b, (3, c))[12:-4])
    assert (found.wall_time, found.step) == (a, b)
    assert found.file_version == c.encode("utf-8", "replace").decode()
    assert Event.FromString(message((4, d))).graph_def == d


# --- numbers


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    records = [scalars(step, train_loss=1 / step, valid_loss=2.0) for step in (1, 2, 4)]
    timing = {**scalars(4, samples_per_s=10.0), "kind": "timing"}
    system = {**scalars(4, system_memory=3.0), "kind": "system"}
    show(tmp_path, 0, [*records, timing, system])
    found = seen(tmp_path)
    assert found["valid/loss"] == [(1, 2.0), (2, 2.0), (4, 2.0)]
    assert found["train/loss"] == [(1, 1.0), (2, 0.5), (4, 0.25)]
    assert found["samples/per/s"] == [(4, 10.0)]
    assert found["system/memory"] == [(4, 3.0)]


def test_one_event_a_record(tmp_path: Path) -> None:
    show(tmp_path, 0, [scalars(step, a=1.0, b=2.0) for step in (1, 2)])
    (path,) = event_files(tmp_path)
    version, first, second = read_events(path)
    assert version.file_version == "brain.Event:2"
    assert [value.tag for value in first.summary.value] == ["a", "b"]
    assert second.wall_time == 1002.0


def test_numbers_that_are_not_finite_are_shown_and_what_is_no_number_is_not(tmp_path: Path) -> None:
    show(tmp_path, 0, [scalars(1, a=math.nan, b=math.inf, c=1e300, d="no", e=None, f=True, g=1 << 62, h=-1e39)])
    found = seen(tmp_path)
    assert math.isnan(found["a"][0][1])
    assert found["b"][0][1] == found["c"][0][1] == math.inf
    assert found["h"][0][1] == -math.inf
    assert (found["f"], found["g"]) == ([(1, 1.0)], [(1, float(1 << 62))])
    assert not {"d", "e"} & found.keys()


def test_steps_that_go_back_are_not_shown(tmp_path: Path) -> None:
    show(tmp_path, 0, [scalars(-5, a=1.0), scalars(0, a=1.0, b=1.0), scalars(-3, a=1.0, b=1.0), scalars(2, a=1.0)])
    assert seen(tmp_path) == {"a": [(-5, 1.0), (0, 1.0), (2, 1.0)], "b": [(0, 1.0)]}


def test_any_tag_is_shown(tmp_path: Path) -> None:
    tags = ["", "a\nb", "x" * 5000, "Größe/損失", "<b>&", "/", "a//b", "\x00", "with space", "x" * 5000 + "y"]
    show(tmp_path, 0, [record("scalars", values={tag: float(place) for place, tag in enumerate(tags)})])
    found = {tag: rows[0][1] for tag, rows in seen(tmp_path).items()}
    assert sorted(found.values()) == list(range(len(tags)))
    assert found["(no tag)"] == 0
    assert found["a\\nb"] == 1
    assert max(map(len, found)) < 1100


# --- once


def test_a_resumed_run_shows_nothing_twice(tmp_path: Path) -> None:
    show(tmp_path, 0, [scalars(step, a=float(step)) for step in range(1, 8)])
    show(tmp_path, 1, [scalars(step, a=float(step), b=0.0) for step in range(5, 11)])
    assert shown_in(tmp_path)[0] == {"a": 10, "b": 10}
    found = seen(tmp_path)
    assert [step for step, _ in found["a"]] == list(range(1, 11))
    assert [step for step, _ in found["b"]] == list(range(5, 11))
    assert len(event_files(tmp_path)) == 2


def test_all_earlier_records_once_more_show_nothing_twice(tmp_path: Path) -> None:
    folder, media = tmp_path / "shown", MediaStore(tmp_path)
    records = every_kind(media)
    show(folder, 0, records)
    before = [(tag, step) for tag, step, _ in values_in(folder)]
    view = TensorBoardView(folder, 1)
    later = [{**row, "attempt": 1, "seq": 1000 + row["seq"]} for row in records]
    for given_again in (records, later, records):
        view.write(given_again, media)
    view.close()
    assert [(tag, step) for tag, step, _ in values_in(folder)] == before
    assert len(event_files(folder)) == 1


def test_two_texts_at_one_step_are_both_shown_once(tmp_path: Path) -> None:
    folder, media = tmp_path / "shown", MediaStore(tmp_path)
    view = TensorBoardView(folder, 0)
    both = [text(1, "one", seq=4), text(1, "two", seq=5)]
    view.write(both, media)
    view.write(both, media)
    view.write([text(1, "of the resumed", attempt=1, seq=9)], media)
    view.close()
    assert texts_in(folder) == [("note", 1, "one"), ("note", 1, "two")]


def test_the_graph_is_shown_once_a_folder(tmp_path: Path) -> None:
    media = MediaStore(tmp_path)
    for attempt in range(2):
        show(tmp_path / "shown", attempt, [graph(media, step=attempt, attempt=attempt), scalars(attempt, a=1.0)])
    found = [found for path in event_files(tmp_path / "shown") for found in read_events(path) if found.graph_def]
    assert len(found) == 1


def test_attempts_within_one_second_are_read_in_order(tmp_path: Path) -> None:
    for attempt in range(4):
        show(tmp_path, attempt, [scalars(attempt + 1, a=1.0)])
    assert [path.name.rpartition(".")[2] for path in event_files(tmp_path)] == ["0", "1", "2", "3"]
    assert [step for step, _ in seen(tmp_path)["a"]] == [1, 2, 3, 4]


def test_a_tag_belongs_to_the_plugin_that_shows_it_first(tmp_path: Path) -> None:
    folder, media = tmp_path / "shown", MediaStore(tmp_path)
    row = text(1, "said")
    for attempt in range(2):
        show(folder, attempt, [scalars(attempt, note=1.0), {**row, "step": attempt}])
    assert [(tag, step) for tag, step, _ in values_in(folder)] == [
        ("note", 0), ("note/text", 0), ("note", 1), ("note/text", 1),
    ]  # fmt: skip
    assert media.folder == tmp_path


# --- what goes wrong


def test_a_run_that_shows_nothing_makes_no_file(tmp_path: Path) -> None:
    empty = {"num": 0, "nan": 0, "positive_infinite": 0, "negative_infinite": 0, "bins": [], "counts": []}
    rows = [record("attempt_start"), record("bad_samples"), record("scalars", values={}), record("histogram", **empty)]
    show(tmp_path / "tensorboard", 0, [{**row, "tag": "a"} for row in rows])
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize("lost", [1, 5, 20, 30])
def test_a_torn_tail_is_shown_again_by_the_next_attempt(tmp_path: Path, lost: int) -> None:
    records = [scalars(step, a=float(step)) for step in range(1, 6)]
    show(tmp_path, 0, records)
    (path,) = event_files(tmp_path)
    os.truncate(path, path.stat().st_size - lost)
    show(tmp_path, 1, records)
    assert seen(tmp_path)["a"] == [(step, float(step)) for step in range(1, 6)]


def test_damage_in_the_middle_ends_the_reading_there(tmp_path: Path) -> None:
    show(tmp_path, 0, [scalars(step, a=float(step)) for step in range(1, 6)])
    (path,) = event_files(tmp_path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    assert 0 < shown_in(tmp_path)[0]["a"] < 5
    path.write_bytes(data[: len(data) // 2] + bytes(100))
    assert 0 < shown_in(tmp_path)[0]["a"] < 5


@pytest.mark.skipif(sys.platform == "win32", reason="a limit on a file's size is set by the resource module")
def test_a_full_disk_leaves_no_torn_event(tmp_path: Path) -> None:
    program = """
        import pathlib, resource, signal, sys
        from torchkeep.errors import StorageError
        from torchkeep.watch.media import MediaStore
        from torchkeep.watch.tensorboard import TensorBoardView
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        folder = pathlib.Path(sys.argv[1])
        view, media = TensorBoardView(folder, 0), MediaStore(folder)
        def records(first):
            return [{"kind": "scalars", "step": s, "time": 0.0, "values": {"a": 1.0}} for s in range(first, first + 5)]
        def refused(most_bytes, first):
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
            try:
                view.write(records(first), media)
            except StorageError:
                resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
                return True
        assert refused(10, 1) and not list(folder.iterdir())
        view.write(records(1), media)
        assert refused(300, 6)
        view.write(records(6), media)
        view.close()
        print("overcome")
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "overcome\n"
    assert [step for step, _ in seen(tmp_path)["a"]] == list(range(1, 11))


def test_a_medium_that_is_missing_takes_nothing_else_with_it(tmp_path: Path) -> None:
    folder, media = tmp_path / "shown", MediaStore(tmp_path)
    missing = f"media/aa/{'a' * 64}.png"
    lost = record("image", tag="x", media=missing, width=1, height=1, caption="")
    view = TensorBoardView(folder, 0)
    with pytest.raises(RunFolderError):
        view.write([scalars(1, a=1.0), lost], media)
    view.write([scalars(1, a=1.0)], media)
    view.close()
    assert seen(folder) == {"a": [(1, 1.0)]}


def test_a_text_that_the_page_would_choke_on_is_shown_as_it_is(tmp_path: Path) -> None:
    given = ["*short*", "[" * 5000, "1. " * 3000, "x" * 90_000]
    show(tmp_path, 0, [text(step, said) for step, said in enumerate(given)])
    short, slow, deep, long = (said for _, _, said in texts_in(tmp_path))
    assert short == "*short*"
    assert slow == f"    {'[' * 5000}\n"
    assert deep == f"    {'1. ' * 3000}\n"
    assert long.startswith("    xxx")
    assert long.endswith("90,000 characters in all; the rest is in the run's record")
    assert len(long) < 11_000


@pytest.mark.filterwarnings("ignore:html5lib:DeprecationWarning")
def test_what_is_no_markdown_is_shown_letter_by_letter(tmp_path: Path) -> None:
    from tensorboard.plugin_util import markdown_to_safe_html

    said = "# *a* _b_ `c` | <b>d</b> [e](f) 1. \\ & ![g](h) ~ **"
    rows = [{"sample": said, "input": None, "truth": 0.5, "output": "y", "confidence": None, "is_right": False}]
    show(tmp_path, 0, [
        record("alert", name="n", level="warning", text=f"{said}\n    {said}", fix=""),
        record("prediction", tag="p", media=None, width=0, height=0, rows=rows),
    ])  # fmt: skip
    alert, table = (markdown_to_safe_html(said) for _, _, said in texts_in(tmp_path))
    assert re.findall("<[^>]*>", alert) == ["<p>", "<strong>", "</strong>", "<br>", "</p>"]
    assert html.unescape(alert) == f"<p><strong>warning</strong> {said}<br>    {said}</p>"
    assert table.count("<td>") == 6
    assert f"<td>{said}</td>" in html.unescape(table)
    assert "<td>✗</td>" in table


# --- kinds


def graph(media: MediaStore, step: int = 0, **head: int) -> dict[str, Any]:
    nodes = [
        {"name": "in", "op": "input", "inputs": [], "shapes": [[1, 2]], "dtype": "float32"},
        {"name": "net/körper", "op": "aten::linear", "inputs": ["in", "none"], "shapes": [[1, -1]], "dtype": "float32"},
        {"name": "net/k:rper", "op": "aten::linear", "inputs": ["in"], "shapes": [], "dtype": ""},
        {
            "name": "//net//out/",
            "op": "aten::add",
            "inputs": ["net/körper", "net/k:rper"],
            "shapes": [[]],
            "dtype": "i",
        },
    ]
    name = media.put(json.dumps({"nodes": nodes}).encode(), ".json")
    return record("graph", step, tag="model", media=name, num_nodes=4, how="followed", **head)


def mesh(media: MediaStore, with_faces: bool) -> dict[str, Any]:
    parts = {"vertices": np.eye(3, dtype=np.float32), "colors": np.full((3, 3), 7, np.uint8)}
    parts |= {"faces": np.array([[0, 1, 2]], np.int32)} if with_faces else {}
    name = media.put(save(parts), ".safetensors")
    return record("mesh", tag=f"mesh{with_faces}", media=name, num_vertices=3, num_faces=int(with_faces), caption="c")


def curve(size: int) -> dict[str, Any]:
    names = ("true_positives", "false_positives", "true_negatives", "false_negatives", "precision", "recall")
    rows = {name: [float(place)] * size for place, name in enumerate(names)}
    return record("pr_curve", tag=f"curve{size}", thresholds=[0.5] * size, **rows)


def part(name: str, depth: int, learns: bool) -> dict[str, Any]:
    shares = {"num_parameters": 1000 + 1000 * depth, "rate_scale": None, "time_fraction": None, "is_cached": not learns}
    return {"name": name, "kind": "Linear", "depth": depth, "learns": learns, **shares}


def every_kind(media: MediaStore) -> list[dict[str, Any]]:
    rows = [
        scalars(1, loss=1.0), graph(media), mesh(media, True), mesh(media, False), curve(3), curve(0), text(1, "a"),
        record("alert", name="n", level="error", text="t", fix="f"),
        record("decision", name="workers", value=2, reason="r", override="o"),
        record("artifact", name="best", type="checkpoint", path="checkpoints/a", sha256="0", bytes=1, parents=[]),
        record("run_start", began=5.0, seed=1, settings={"a": {"b": 1, "c": True, "d": "x", "e": [1], "f": math.nan}}),
        record("trainable_map", rows=[part("", 0, True), part("body", 1, False)], frontier=["body"]),
        record("run_end", status="finished", reason="", metrics={}, artifacts=[]),
    ]  # fmt: skip
    return [{**row, "seq": place} for place, row in enumerate(rows)]


def test_a_graph_has_names_that_the_page_can_read(tmp_path: Path) -> None:
    from tensorboard.compat.proto.graph_pb2 import GraphDef

    show(tmp_path / "shown", 0, [graph(MediaStore(tmp_path))])
    (path,) = event_files(tmp_path / "shown")
    nodes = GraphDef.FromString(next(found.graph_def for found in read_events(path) if found.graph_def)).node
    assert [node.name for node in nodes] == ["in", "net/k_rper", "net/k_rper_1", "net/out"]
    assert [list(node.input) for node in nodes] == [[], ["in"], ["in"], ["net/k_rper", "net/k_rper_1"]]
    shapes = [dim.size for dim in nodes[1].attr["_output_shapes"].list.shape[0].dim]
    assert shapes == [1, -1]
    assert nodes[1].op == "aten::linear"


def test_a_mesh_has_its_parts_and_says_which(tmp_path: Path) -> None:
    from tensorboard.plugins.mesh.metadata import parse_plugin_metadata
    from tensorboard.util.tensor_util import make_ndarray

    media = MediaStore(tmp_path)
    show(tmp_path / "shown", 0, [mesh(media, True), mesh(media, False)])
    found = {tag: value for tag, _, value in values_in(tmp_path / "shown") if not tag.endswith("caption")}
    assert list(found) == [f"meshTrue_{part}" for part in ("VERTEX", "COLOR", "FACE")] + [
        f"meshFalse_{part}" for part in ("VERTEX", "COLOR")
    ]
    told = parse_plugin_metadata(found["meshTrue_FACE"].metadata.plugin_data.content)
    assert (told.name, told.content_type, told.components, list(told.shape)) == ("meshTrue", 2, 14, [1, 1, 3])
    assert parse_plugin_metadata(found["meshFalse_COLOR"].metadata.plugin_data.content).components == 10
    np.testing.assert_array_equal(make_ndarray(found["meshTrue_VERTEX"].tensor), np.eye(3)[None])
    np.testing.assert_array_equal(make_ndarray(found["meshTrue_COLOR"].tensor), np.full((1, 3, 3), 7))
    np.testing.assert_array_equal(make_ndarray(found["meshTrue_FACE"].tensor), [[[0, 1, 2]]])


def test_a_histogram_keeps_its_mass_and_what_is_not_finite_is_a_number(tmp_path: Path) -> None:
    from torchkeep.watch.histograms import histogram

    media = MediaStore(tmp_path)
    shuffled = random.Random(0)
    values = [shuffled.gauss(0, 1) for _ in range(1000)] + [0.0] * 5 + [math.nan, math.inf, -math.inf]
    show(tmp_path / "shown", 0, [
        record("histogram", tag="weights", **histogram(np.array(values, np.float32)).settle(media)),
        record("histogram", tag="same", **histogram(np.full(7, -2.0, np.float32)).settle(media)),
    ])  # fmt: skip
    found = {tag: value for tag, _, value in values_in(tmp_path / "shown")}
    assert found["weights/not_finite"].simple_value == 3
    histo = found["weights"].histo
    limits = list(histo.bucket_limit)
    assert limits == sorted(set(limits))
    assert sum(histo.bucket) == histo.num == 1005
    finite = np.array(values[:1005], np.float32)
    for limit in limits:
        told = sum(count for high, count in zip(limits, histo.bucket, strict=True) if high <= limit)
        assert abs(told - np.count_nonzero(finite <= limit)) <= np.count_nonzero(finite == np.float32(limit))
    assert (histo.min, histo.max) == (finite.min(), finite.max())
    assert (found["same"].histo.min, found["same"].histo.max, list(found["same"].histo.bucket)) == (-2, -2, [7])


def test_what_learns_is_a_table(tmp_path: Path) -> None:
    show(tmp_path / "shown", 0, every_kind(MediaStore(tmp_path)))
    (said,) = (said for tag, _, said in texts_in(tmp_path / "shown") if tag == "what learns")
    rows = [html.unescape(line) for line in said.splitlines()]
    assert rows[0] == "| module | kind | state | parameters |"
    assert rows[3] == "| · body | Linear | frozen, computed once | 2000 |"
    assert rows[-1] == "frontier: body"


def test_settings_are_a_row_of_the_hparams_page(tmp_path: Path) -> None:
    from tensorboard.plugins.hparams import metadata

    show(tmp_path / "shown", 0, every_kind(MediaStore(tmp_path)))
    told = {tag: value.metadata.plugin_data.content for tag, _, value in values_in(tmp_path / "shown")}
    begun = metadata.parse_session_start_info_plugin_data(told[metadata.SESSION_START_INFO_TAG])
    found = {key: getattr(value, value.WhichOneof("kind")) for key, value in begun.hparams.items()}
    assert found == {"a.b": 1.0, "a.c": True, "a.d": "x", "a.f": "nan"}
    assert begun.start_time_secs == 5.0
    assert metadata.parse_session_end_info_plugin_data(told[metadata.SESSION_END_INFO_TAG]).status == 1


def test_a_run_that_may_go_on_is_not_told_as_ended(tmp_path: Path) -> None:
    show(tmp_path / "shown", 0, [record("run_end", status="interrupted", reason="Ctrl-C", metrics={}, artifacts=[])])
    assert [tag for tag, *_ in values_in(tmp_path / "shown")] == ["run/end"]


def test_a_trace_lies_where_the_profiler_plugin_looks(tmp_path: Path) -> None:
    media = MediaStore(tmp_path)
    name = media.put(b'{"traceEvents": []}', ".json")
    show(tmp_path / "shown", 0, [record("profile", media=name, first_step=10, last_step=12)])
    assert (tmp_path / "shown" / "steps-10-12.pt.trace.json").read_bytes() == b'{"traceEvents": []}'
    assert not event_files(tmp_path / "shown")


def test_no_library_of_another_view_is_loaded(tmp_path: Path) -> None:
    program = """
        import pathlib, sys
        from torchkeep.watch.media import MediaStore
        from torchkeep.watch.tensorboard import TensorBoardView
        folder = pathlib.Path(sys.argv[1])
        view = TensorBoardView(folder / "shown", 0)
        view.write([{"kind": "scalars", "step": 1, "time": 0.0, "values": {"a": 1.0}},
                    {"kind": "decision", "step": 1, "time": 0.0, "name": "a", "value": 1}], MediaStore(folder))
        print(sorted({"torch", "tensorboard", "google.protobuf", "wandb", "mlflow", "PIL", "cv2"} & sys.modules.keys()))
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"
