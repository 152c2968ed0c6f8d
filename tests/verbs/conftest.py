"""The command line on real input: small recipes in a folder of their own.

A command runs in this process through ``torchkeep.cli.run``, or in one of its own where that is the point.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from torchkeep import cli
from torchkeep.keep.checkpoint import Checkpoints
from torchkeep.tensors import tensor_sha256

TABLE = """
[data]
train = "rows.csv"
valid_fraction = 0.25
target = "kind"
batch_size = 8
workers = 0

[model]
name = "mlp"
args = {hidden = [8]}

[train]
epochs = 2
metrics = ["accuracy"]

[monitor]
views = []
"""

IMAGES = """
[data]
train = "train"
valid = "valid"
image_size = 8
batch_size = 4
workers = 0

[model]
name = "convnet"
args = {widths = [4]}

[train]
epochs = 2
metrics = ["accuracy"]

[monitor]
views = []
"""

SLOW_MODEL = """
import time

from torch import nn


class Slow(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, num_classes))

    def forward(self, numbers, categories):
        time.sleep(0.02 if self.training else 0)
        return self.layers(numbers)


def build(num_classes):
    return Slow(num_classes)
"""


@dataclass(frozen=True)
class Said:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str


class Desk:
    """A folder in which commands are typed, with a home of its own."""

    def __init__(self, folder: Path, read_printed: Callable[[], Any]):
        self.folder = folder
        self._read_printed = read_printed
        self._started: list[subprocess.Popen[str]] = []

    def say(self, *words: object) -> Said:
        """A command in this process: as ``python -m torchkeep`` runs it, without the start of Python and torch."""
        self._read_printed()
        code = cli.run(lambda: cli.cli.main(list(map(str, words)), prog_name="torchkeep", standalone_mode=False))
        printed = self._read_printed()
        return Said(code, printed.out, printed.err)

    def start(self, *words: object, program: tuple[str, ...] = ("-m", "torchkeep")) -> subprocess.Popen[str]:
        """A command in a process of its own, under way."""
        process = subprocess.Popen(
            [sys.executable, *program, *map(str, words)],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        self._started.append(process)
        return process

    def type(self, *words: object, program: tuple[str, ...] = ("-m", "torchkeep")) -> Said:
        """A command in a process of its own, to its end."""
        return finished(self.start(*words, program=program))

    def close(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.communicate()

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def write_table(self, num_rows: int = 40) -> None:
        """rows.csv: two numbers, a category and two classes; table.toml trains an mlp on it."""
        rows = [
            f"{i % 7},{i * 0.5},{'red' if i % 3 else 'blue'},{'big' if i * 7 % 11 > 5 else 'small'}"
            for i in range(num_rows)
        ]
        self.write("rows.csv", "\n".join(["a,b,colour,kind", *rows]) + "\n")
        self.write("table.toml", TABLE)

    def write_images(self) -> None:
        """train/ and valid/ with bright ants and dark bees; images.toml trains a convnet on them."""
        draws = np.random.default_rng(0)
        for split in ("train", "valid"):
            for name, low in (("ants", 150), ("bees", 0)):
                for number in range(6):
                    self.write_image(f"{split}/{name}/{number}.png", draws.integers(low, low + 100, (12, 10, 3)))
        self.write("images.toml", IMAGES)

    def write_image(self, name: str, pixels: np.ndarray[Any, Any]) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        return path

    def files(self) -> set[str]:
        """Everything in the folder, but for what Python itself keeps."""
        found = (path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*"))
        return {name for name in found if not name.startswith("home") and "__pycache__" not in name}

    def runs(self) -> list[str]:
        """The names of the folders under runs/."""
        folder = self.folder / "runs"
        return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []

    def records(self, run: str) -> list[dict[str, Any]]:
        lines = (self.folder / run / "records.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def checkpoints(self, run: str) -> Checkpoints:
        return Checkpoints(self.folder / run / "checkpoints")

    def last_step(self, run: str) -> int:
        """The step of the newest whole checkpoint."""
        saved = self.checkpoints(run).latest()
        assert saved is not None
        return saved.step

    def parameters(self, run: str) -> str:
        """sha256 of the newest whole checkpoint's parameters."""
        checkpoints = self.checkpoints(run)
        saved = checkpoints.latest()
        assert saved is not None
        return tensor_sha256(checkpoints.model(saved))

    def wait_for(self, name: str, process: subprocess.Popen[str], timeout_s: float = 60) -> None:
        """Wait until a file appears that a process makes."""
        until = time.monotonic() + timeout_s
        while not (self.folder / name).exists():
            assert process.poll() is None, f"it ended before it made {name}: {process.communicate()}"
            assert time.monotonic() < until, f"{name} has not appeared"
            time.sleep(0.02)


def finished(process: subprocess.Popen[str]) -> Said:
    """What a process printed by its end."""
    out, err = process.communicate(timeout=120)
    return Said(process.returncode, out, err)


@pytest.fixture
def ended() -> Callable[[subprocess.Popen[str]], Said]:
    return finished


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Desk]:
    """An empty folder to work in."""
    home = tmp_path / "home"
    home.mkdir()
    for name, value in {"HOME": home, "XDG_STATE_HOME": home / "state", "OMP_NUM_THREADS": 1, "COLUMNS": 80}.items():
        monkeypatch.setenv(name, str(value))
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    made = Desk(tmp_path, capsys.readouterr)
    yield made
    made.close()


@pytest.fixture
def slow(desk: Desk) -> Desk:
    """A desk with slow.toml: 24 steps of at least 20 ms with dropout, saved every 4."""
    desk.write_table(32)
    desk.write("slow.py", SLOW_MODEL)
    recipe = TABLE.replace('"mlp"\nargs = {hidden = [8]}', '"slow.py:build"').replace("epochs = 2", "epochs = 8")
    desk.write("slow.toml", recipe + "\n[checkpoint]\nevery = 4\n")
    return desk


@pytest.fixture
def images(desk: Desk) -> Desk:
    """A desk with images and a run on them, runs/images."""
    desk.write_images()
    assert desk.say("train", "images.toml", "--quiet").code == 0
    return desk


@pytest.fixture
def packaged(images: Desk) -> Desk:
    """The same with the run's package, images.tkp."""
    assert images.say("package", "runs/images", "-o", "images.tkp").code == 0
    return images
