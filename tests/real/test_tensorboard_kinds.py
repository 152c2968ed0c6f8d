"""Every kind of record, asked back from a real TensorBoard server with both of its readers."""

from __future__ import annotations

import json
import math
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import pytest
from board import (
    CODE,
    CURVE,
    ODD_TAGS,
    STEPS,
    ask,
    curve,
    everything,
    fetch,
    png,
    record,
    serving,
    show,
    two_spheres,
    until,
    wav,
    weights,
)

from torchkeep.watch.media import MediaStore

RUN = "one/tensorboard"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything, of two attempts that overlap, and one with other settings."""
    folder = tmp_path_factory.mktemp("runs")
    rows = everything(MediaStore(folder / "one"))
    show(folder / "one", 0, [row for row in rows if row["step"] < 3])
    show(folder / "one", 1, rows)
    other = record("run_start", 0, began=1e9, settings={"train": {"learning_rate": 0.1}, "extra": "only here"})
    show(folder / "two", 0, [other, record("scalars", 1, values={"train/loss": 7.0})])
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["rust", "python"])
def server(request: pytest.FixtureRequest, runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(runs, tmp_path_factory.mktemp("log") / "tensorboard.log", fast=request.param) as address:
        until(lambda: "run/end" in ask(address, "plugin/text/tags").get(RUN, ()))  # the last record of the run
        until(lambda: "two/tensorboard" in ask(address, "plugin/scalars/tags"))
        yield address


def asked(server: str, path: str, tag: str) -> Any:
    return ask(server, path, run=RUN, tag=tag)


def test_numbers(server: str) -> None:
    rows = asked(server, "plugin/scalars/scalars", "train/loss")
    assert [row[1:] for row in rows] == [[step, pytest.approx(1 / step)] for step in STEPS]
    assert rows[0][0] == 1e9 + 1
    # as TensorBoard's server writes them for its page
    assert [row[2] for row in asked(server, "plugin/scalars/scalars", "odd/nan")] == ["NaN"] * 3
    assert [row[2] for row in asked(server, "plugin/scalars/scalars", "odd/infinite")] == ["Infinity"] * 3
    assert asked(server, "plugin/scalars/scalars", "system/memory_bytes")[-1][2] == 3e9


def test_any_tag_can_be_asked_for(server: str) -> None:
    tags = ask(server, "plugin/scalars/tags")[RUN]
    found = {asked(server, "plugin/scalars/scalars", tag)[0][2] for tag in tags if "odd/" not in tag}
    assert found >= set(range(len(ODD_TAGS)))


def test_histograms(server: str) -> None:
    assert set(ask(server, "plugin/histograms/tags")[RUN]) == {f"weights/{name}" for name in ("layer", "zero", "huge")}
    rows = asked(server, "plugin/histograms/histograms", "weights/layer")
    assert [row[1] for row in rows] == list(STEPS)
    for (_, step, buckets), bands in zip(
        rows, asked(server, "plugin/distributions/distributions", "weights/layer"), strict=True
    ):
        finite = weights(step)[np.isfinite(weights(step))]
        assert sum(count for _, _, count in buckets) == len(finite)
        assert (buckets[0][0], buckets[-1][1]) == pytest.approx((finite.min(), finite.max()))
        assert all(left[1] == right[0] for left, right in pairwise(buckets))
        assert bands[2][4] == [5000, pytest.approx(np.median(finite), abs=0.05)]
    for tag in ("zero", "huge"):
        for _, _, buckets in asked(server, "plugin/histograms/histograms", f"weights/{tag}"):
            assert all(math.isfinite(edge) for bucket in buckets for edge in bucket)
    assert asked(server, "plugin/scalars/scalars", "weights/layer/not_finite")[0][1:] == [2, 2.0]


@pytest.mark.parametrize("tag", ["inputs", "valid", "figure", "confusion"])
def test_pictures(server: str, tag: str) -> None:
    rows = ask(server, "plugin/images/images", run=RUN, tag=tag, sample="0")
    assert [row["step"] for row in rows] == list(STEPS)
    for row in rows:
        data = fetch(server, "plugin/images/individualImage", **dict(parse_qsl(row["query"])))
        assert data.startswith(b"\x89PNG")
        assert tag == "confusion" or data == png(row["step"])


def test_sound(server: str) -> None:
    rows = ask(server, "plugin/audio/audio", run=RUN, tag="sound", sample="0")
    assert [row["step"] for row in rows] == list(STEPS)
    assert fetch(server, "plugin/audio/individualAudio", **dict(parse_qsl(rows[0]["query"]))) == wav()
    assert rows[0]["contentType"] == "audio/wav"


def test_texts(server: str) -> None:
    said = {tag: asked(server, "plugin/text/text", tag) for tag in ask(server, "plugin/text/tags")[RUN]}
    texts = {tag: rows[-1]["text"] for tag, rows in said.items()}
    assert [row["step"] for row in said["note"]] == list(STEPS)
    assert "<h1>Title</h1>" in texts["note"]
    assert "<em>words</em>" in texts["note"]
    assert "<script" not in texts["note"]
    assert f"<code>{CODE}\n</code>" in texts["brackets"]
    assert "<td>&lt;bee&gt;</td>" in texts["valid/rows"].replace("&#60;", "&lt;").replace("&#62;", "&gt;")
    assert "<td>two cores</td>" in texts["decision/workers"]
    assert "a &#42;spike&#42; &#124; here" in texts["alert/loss"]
    assert "<td>c0</td>" in texts["run/start"]
    assert set(texts) == {
        "note", "brackets", "valid/rows", "decision/workers", "alert/loss", "run/start", "run/end", "inputs/caption",
    }  # fmt: skip


def test_precision_and_recall(server: str) -> None:
    rows = asked(server, "plugin/pr_curves/pr_curves", "bee")[RUN]
    assert [row["step"] for row in rows] == list(STEPS)
    for row in rows:
        for name in CURVE:
            assert row[name] == pytest.approx(curve(row["step"])[name], rel=1e-5, abs=1e-5)


def test_meshes(server: str) -> None:
    told = asked(server, "plugin/mesh/meshes", "shape")
    assert sorted({(row["step"], row["content_type"]) for row in told}) == [
        (s, part) for s in STEPS for part in (1, 2, 3)
    ]
    for name, key, kind in (("VERTEX", "vertices", "<f4"), ("FACE", "faces", "<i4"), ("COLOR", "colors", "u1")):
        data = fetch(server, "plugin/mesh/data", run=RUN, tag="shape", step="2", sample="0", content_type=name)
        np.testing.assert_array_equal(np.frombuffer(data, kind).reshape(-1, 3), two_spheres()[key])
    points = asked(server, "plugin/mesh/meshes", "the points")
    assert {row["content_type"] for row in points} == {1, 3}


def test_the_graph(server: str) -> None:
    told = ask(server, "plugin/graphs/info")[RUN]
    assert told["run_graph"] is True
    text = fetch(server, "plugin/graphs/graph", run=RUN, conceptual="false").decode()
    for line in ('name: "net/first/linear"', 'op: "aten::linear"', 'input: "net/first/relu"', "size: 32"):
        assert line in text
    assert text.count("node {") == 6


def post(server: str, path: str, **body: Any) -> Any:
    """What the HPARAMS page is answered with."""
    told = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server}/data/plugin/hparams/{path}", json.dumps(body).encode(), told)
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


def test_settings_and_results_of_all_runs(server: str) -> None:
    experiment = post(server, "experiment", includeMetrics=True)
    names = {row["name"] for row in experiment["hparamInfos"]}
    assert names == {"model.name", "model.width", "train.learning_rate", "train.compile", "extra"}
    metrics = {row["name"]["tag"] for row in experiment["metricInfos"]}
    assert "train/loss" in metrics
    wanted = [{"metric": {"tag": "train/loss"}}, {"hparam": "train.learning_rate"}]
    status = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]
    found = post(
        server,
        "session_groups",
        allowedStatuses=status,
        colParams=wanted,
        startIndex=0,
        sliceSize=9,
        includeMetrics=True,
    )
    rows = {group["sessions"][0]["name"]: group for group in found["sessionGroups"]}
    assert set(rows) == {RUN, "two/tensorboard"}
    assert rows[RUN]["hparams"]["train.learning_rate"] == 1e-3
    assert rows["two/tensorboard"]["hparams"]["train.learning_rate"] == 0.1
    assert rows[RUN]["sessions"][0]["status"] == "STATUS_SUCCESS"
    (value,) = (row for row in rows[RUN]["metricValues"] if row["name"]["tag"] == "train/loss")
    assert (value["value"], value["trainingStep"]) == (pytest.approx(1 / 3), 3)
