"""A TensorBoard server on loopback, and a run that shows something of every kind."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import time
import urllib.parse
import urllib.request
import wave
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from torchkeep.watch.histograms import histogram
from torchkeep.watch.media import MediaStore
from torchkeep.watch.tensorboard import TensorBoardView

START_S = 60
STEPS = (1, 2, 3)
ODD_TAGS = ("a\nb", "Größe/損失", "<img src=x>&\"'", "//", "", "x" * 1200, "with space/%20?#")
TEXT = "# Title\n\nsome *words* <script>alert(1)</script>"
CODE = "[" * 3000
CURVE = ("true_positives", "false_positives", "true_negatives", "false_negatives", "precision", "recall")


@contextmanager
def serving(folder: Path, log: Path, fast: bool) -> Iterator[str]:
    """The address of a server that shows the runs in a folder, with the reader in Rust or the one in Python."""
    options = ["--host=127.0.0.1", "--port=0", f"--load_fast={str(fast).lower()}", "--logdir", str(folder)]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tensorboard.main", *options], stdout=file, stderr=file
        )
    try:
        yield until(lambda: _address(process, log))
    finally:
        process.terminate()
        process.wait(20)


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    assert process.poll() is None, log.read_text()
    text = log.read_text()
    return "http://" + text.partition("http://")[2].split("/")[0] if "http://127.0.0.1:" in text else ""


def until(ask_for: Callable[[], Any]) -> Any:
    """What a question is answered with once that is something."""
    deadline = time.monotonic() + START_S
    while not (answer := ask_for()):
        assert time.monotonic() < deadline, answer
        time.sleep(0.2)
    return answer


def fetch(server: str, path: str, **query: str) -> bytes:
    with urllib.request.urlopen(f"{server}/data/{path}?{urllib.parse.urlencode(query)}", timeout=20) as answer:
        return bytes(answer.read())


def ask(server: str, path: str, **query: str) -> Any:
    return json.loads(fetch(server, path, **query))


# --- what is shown


def record(kind: str, step: int, **payload: Any) -> dict[str, Any]:
    """One record; its place in the order is set by ``show``."""
    return {"kind": kind, "rank": 0, "step": step, "samples": step, "epoch": 0, "time": 1e9 + step, **payload}


def show(folder: Path, attempt: int, rows: list[dict[str, Any]]) -> None:
    view = TensorBoardView(folder / "tensorboard", attempt)
    view.write([{**row, "attempt": attempt, "seq": seq} for seq, row in enumerate(rows)], MediaStore(folder))
    view.close()


def png(step: int, size: int = 64) -> bytes:
    from PIL import Image

    ramp = np.linspace(0, 255, size).astype(np.uint8)
    pixels = np.stack(
        [np.add.outer(ramp // 2, ramp // 2), np.full((size, size), 60 * step), ramp + 0 * ramp[:, None]], 2
    )
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def wav() -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes((np.sin(np.arange(8000) / 3) * 20000).astype("<i2").tobytes())
    return buffer.getvalue()


def two_spheres() -> dict[str, np.ndarray[Any, Any]]:
    """One mesh of a red sphere and a blue one."""
    rows, columns, aside = 12, 24, np.array([1.2, 0, 0])
    across, around = np.meshgrid(np.linspace(0, math.pi, rows), np.linspace(0, 2 * math.pi, columns), indexing="ij")
    ball = np.stack([np.sin(across) * np.cos(around), np.cos(across), np.sin(across) * np.sin(around)], 2).reshape(
        -1, 3
    )
    first = np.arange(rows * columns).reshape(rows, columns)
    corners = [first[:-1, :-1], first[1:, :-1], first[:-1, 1:], first[1:, 1:]]
    faces = np.concatenate([np.stack([corners[k] for k in face], 2).reshape(-1, 3) for face in ((0, 2, 1), (1, 2, 3))])
    colors = np.repeat(np.array([[220, 40, 40], [40, 60, 220]], np.uint8), len(ball), axis=0)
    return {
        "vertices": np.concatenate([ball - aside, ball + aside]).astype(np.float32),
        "colors": colors,
        "faces": np.concatenate([faces, faces + len(ball)]).astype(np.int32),
    }


def graph() -> bytes:
    """A model with two blocks; the scope of the second is the name of a node besides."""
    rows = [
        ("input", "input", []),
        ("net/first/linear", "aten::linear", ["input"]),
        ("net/first/relu", "aten::relu", ["net/first/linear"]),
        ("net/second", "aten::linear", ["net/first/relu"]),
        ("net/second/add", "aten::add", ["net/second", "net/first/relu"]),
        ("output", "output", ["net/second/add"]),
    ]
    nodes = [
        {"name": name, "op": op, "inputs": inputs, "shapes": [[32, 10]], "dtype": "float32"}
        for name, op, inputs in rows
    ]
    return json.dumps({"nodes": nodes}).encode()


def weights(step: int) -> np.ndarray[Any, Any]:
    drawn = np.random.default_rng(step).normal(0.1 * step, 1, 5000).astype(np.float32)
    return np.concatenate([drawn, np.float32([math.nan, math.inf])]) if step == 2 else drawn


def curve(step: int) -> dict[str, list[float]]:
    threshold = np.linspace(0, 1, 21)
    rows = {"thresholds": threshold, "true_positives": 400 * (1 - threshold**2), "false_positives": 60 - 40 * threshold}
    rows |= {"true_negatives": 40 * threshold, "false_negatives": 400 * threshold**2}
    rows |= {"recall": 1 - threshold**2, "precision": 0.5 + threshold * step / 10}
    return {name: row.tolist() for name, row in rows.items()}


def everything(media: MediaStore) -> list[dict[str, Any]]:
    """The records of a run of three steps, with something of every kind."""
    settings = {"model": {"name": "convnet", "width": 32}, "train": {"learning_rate": 1e-3, "compile": False}}
    rows = [
        record("run_start", 0, began=1e9, seed=0, command="torchkeep train", settings=settings, code={"commit": "c0"}),
        record("decision", 0, name="workers", value=2, reason="two cores", override="data.workers"),
        record("graph", 0, tag="model", media=media.put(graph(), ".json"), num_nodes=6, how="followed"),
        record("scalars", 1, values={tag: float(place) for place, tag in enumerate(ODD_TAGS)}),
    ]  # fmt: skip
    for step in STEPS:
        rows += _of_step(step, media)
    parts = two_spheres()
    points = media.put(save({key: parts[key] for key in ("vertices", "colors")}), ".safetensors")
    return [
        *rows, record("mesh", 3, tag="the points", media=points, num_vertices=len(parts["vertices"]), num_faces=0),
        record("alert", 3, name="loss", level="warning", text="a *spike* | here", fix="lower the rate"),
        record("run_end", 3, status="finished", reason="", metrics={"valid/accuracy": 0.9}, artifacts=[]),
    ]  # fmt: skip


def _of_step(step: int, media: MediaStore) -> list[dict[str, Any]]:
    picture, parts = media.put(png(step), ".png"), two_spheres()
    size = {"width": 64, "height": 64}
    samples = [
        {"sample": "a|b", "input": None, "truth": "ant", "output": "<bee>", "confidence": 0.9, "is_right": False}
    ]
    shape = media.put(save(parts), ".safetensors")
    return [
        record("scalars", step, values={"train/loss": 1 / step, "odd/nan": math.nan, "odd/infinite": math.inf}),
        record("system", step, values={"system/memory_bytes": 1e9 * step}),
        record("histogram", step, tag="weights/layer", **histogram(weights(step)).settle(media)),
        record("histogram", step, tag="weights/zero", **histogram(np.zeros(9, np.float32)).settle(media)),
        record("histogram", step, tag="weights/empty", **histogram(np.zeros(0, np.float32)).settle(media)),
        record("histogram", step, tag="weights/huge", **histogram(np.float32([-3e38, 1e-40, 3e38])).settle(media)),
        record("image", step, tag="inputs", media=picture, caption="a batch", **size),
        record("prediction", step, tag="valid", media=picture, rows=samples, **size),
        record("figure", step, tag="figure", media=picture, **size),
        record("confusion", step, tag="confusion", classes=["ant", "bee"], counts=[[5, 1], [0, step]]),
        record("mesh", step, tag="shape", media=shape, num_vertices=len(parts["vertices"]), num_faces=1),
        record("text", step, tag="note", text=TEXT, num_characters=len(TEXT), media=None),
        record("text", step, tag="brackets", text=CODE, num_characters=len(CODE), media=None),
        record("audio", step, tag="sound", media=media.put(wav(), ".wav"), sample_rate=8000, seconds=1.0, caption=""),
        record("pr_curve", step, tag="bee", **curve(step)),
    ]  # fmt: skip
