"""The trainings that are tortured, in children forked from a warm process, and the seam through which they are hurt."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import torchkeep
from torchkeep import cli, files
from torchkeep.keep.checkpoint import Checkpoints, find_damage
from torchkeep.tensors import pack, tensor_sha256
from torchkeep.watch.records import canonical

MODEL = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, num_classes)
        )

    def forward(self, numbers, categories):
        return self.layers(numbers)

def build(num_classes):
    return Net(num_classes)
"""
RECIPE = """
seed = 4
[data]
train = "rows.csv"
valid_fraction = 0.25
target = "kind"
batch_size = 8
workers = 0
[model]
name = "model.py:build"
[optimizer]
learning_rate = 1e-2
schedule = "one_cycle"
[train]
epochs = {epochs}
metrics = ["accuracy"]
threads = 1
ema = 0.9
[checkpoint]
every = {every}
[monitor]
views = []
log_every = 1
"""

Child = Callable[[], int]
Note = Callable[..., None]  # prints and keeps figures by name
Fault = Literal["none", "kill", "torn", "error"]


def write_course(place: Path, epochs: int = 4, every: int = 3) -> None:
    """recipe.toml, model.py and rows.csv: ``epochs`` times six steps, saved every ``every``."""
    rows = "\n".join(f"{i % 7},{i * 0.5},{'red' if i % 3 else 'blue'},{'big' if i * 7 % 11 > 5 else 'small'}"
                     for i in range(64))  # fmt: skip
    (place / "rows.csv").write_text(f"a,b,colour,kind\n{rows}\n")
    (place / "model.py").write_text(MODEL)
    (place / "recipe.toml").write_text(RECIPE.format(epochs=epochs, every=every))


@dataclass
class Seam:
    """Hurts at the ``number``-th call that changes the disk: writes, syncs, renames and what makes or removes names."""

    number: int = 0
    fault: Fault = "none"
    log: int = -1  # a file that says what was hurt
    calls: int = 0

    def __post_init__(self) -> None:
        self._counting = threading.Lock()

    def install(self) -> None:
        names = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir")
        for name in names if self.fault != "error" else names[:4]:
            setattr(os, name, self._hurting(name, getattr(os, name)))
        files.write_all = self._hurting("write", files.write_all)  # type: ignore[assignment]

    def _hurting(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def hurt(*given: Any, **named: Any) -> Any:
            with self._counting:
                self.calls += 1
                is_now = self.calls == self.number
            if is_now:
                self._hurt(name, given)
            return call(*given, **named)

        return hurt

    def _hurt(self, name: str, given: tuple[Any, ...]) -> None:
        at = given[0].name if name == "write" else given[name in ("rename", "replace")]
        at = os.readlink(f"/proc/self/fd/{at}") if name == "fsync" and sys.platform == "linux" else at
        os.write(self.log, f"{name} {at}".encode())
        if self.fault == "error":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if self.fault == "torn" and name == "write":
            given[0].write(given[1][: len(given[1]) // 2])
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit status, negative for a signal; what it printed, and where it was hurt."""

    code: int
    said: str
    hurt: str


class Place:
    """A folder of courses: children forked into it, and the steps that they have acknowledged."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.acks, self._said, self._hurt = folder / "acks", folder / "said", folder / "hurt"

    def fork(self, child: Child, seam: Seam | None = None) -> int:
        """Begin a child, whose process id is returned."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: no thread is under way here
            pid = os.fork()
        if not pid:
            code = 70
            try:
                self._enter(seam)
                code = child()
                for thread in threading.enumerate():
                    if not thread.daemon and thread is not threading.current_thread():
                        thread.join()
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        return pid

    def _enter(self, seam: Seam | None) -> None:
        os.chdir(self.folder)
        os.environ |= {"XDG_STATE_HOME": str(self.folder / "state"), "XDG_CACHE_HOME": str(self.folder / "cache")}
        out = os.open(self._said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2)
        sys.stdin, sys.stdout, sys.stderr = open(os.devnull), os.fdopen(1, "w"), os.fdopen(2, "w")  # noqa: SIM115
        acks = os.open(self.acks, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        acknowledge(lambda step: os.writev(acks, [b"%d\n" % step]))  # no write, which strace counts
        if seam is not None:
            seam.log = os.open(self._hurt, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            seam.install()

    def wait(self, pid: int, timeout_s: float = 60) -> Ended:
        """A child's end."""
        until = time.monotonic() + timeout_s
        while not (done := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > until:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise AssertionError(f"it did not end: {self._said.read_text()}")
            time.sleep(0.001)
        hurt = self._hurt.read_text() if self._hurt.exists() else ""
        return Ended(os.waitstatus_to_exitcode(done[1]), self._said.read_text(), hurt)

    def run_whole(self, child: Child) -> Ended:
        """A child that nothing hurts; what it imported is imported here, so that those after it begin at once."""
        listed = self.folder / "modules"

        def listing() -> int:
            code = child()
            listed.write_text("\n".join(sys.modules))
            return code

        ended = self.run(listing)
        for name in listed.read_text().split():
            with contextlib.suppress(Exception), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(name)
        return ended

    def run(self, child: Child, seam: Seam | None = None) -> Ended:
        return self.wait(self.fork(child, seam))

    def acked(self) -> list[int]:
        """The steps that were acknowledged so far, by whatever child."""
        return [int(line) for line in self.acks.read_text().split()] if self.acks.exists() else []


def acknowledge(told: Callable[[int], object]) -> None:
    """Tell of each checkpoint in the moment in which it is durable: the hints and the retiring come after it."""
    leave = files.DurableFolder.__exit__

    def noted(folder: Any, kind: Any, error: Any, trace: Any) -> None:
        leave(folder, kind, error, trace)
        if kind is None and folder.path.name.startswith("step-"):
            told(int(folder.path.name[5:]))

    files.DurableFolder.__exit__ = noted  # type: ignore[method-assign]


def typed(*words: str) -> Child:
    """A command of torchkeep, as ``python -m torchkeep`` runs it."""
    return lambda: cli.run(lambda: cli.cli.main(list(words), prog_name="torchkeep", standalone_mode=False))


def begin(run: str, *more: str) -> Child:
    return typed("train", "recipe.toml", "--run-dir", run, *more)


def go_on(folder: Path, name: str) -> Child:
    """``resume``; before run.json is written there is nothing to resume, and the same command begins again."""
    run = run_in(folder, name)
    if (run / "run.json").exists():
        return typed("resume", str(run))
    return typed("train", "recipe.toml", "--run-dir", str(folder / name), "--resume", "auto")


def clear(folder: Path, name: str) -> None:
    for path in folder.glob(f"{name}*"):
        shutil.rmtree(path)


def run_in(folder: Path, name: str) -> Path:
    """The run of a name; one that was killed before run.json is begun anew beside what it left."""
    return next((path for path in sorted(folder.glob(f"{name}*")) if (path / "run.json").exists()), folder / name)


def end_of(run: Path) -> tuple[str, int, bytes]:
    """What must be the same: sha256 of every tensor of the last checkpoint, its step, and the record."""
    checkpoints = Checkpoints(run / "checkpoints")
    saved = checkpoints.latest()
    assert saved is not None
    return tensor_sha256(pack(checkpoints.load(saved))[1]), saved.step, canonical(run / "records.jsonl")


def assert_safe(checkpoints: Path, acked: list[int]) -> int:
    """That every checkpoint in sight is whole, and that the newest is none below an acknowledged one; its step."""
    paths = Checkpoints(checkpoints).steps()
    assert not [f"{path.name}: {damage}" for path in paths if (damage := find_damage(path))]
    newest = int(paths[-1].name[5:]) if paths else -1
    assert newest >= max(acked, default=-1)
    return newest


def hand_loop(folder: Path, steps: int = 5, keep_last: int = 2, wait: bool = True) -> Child:
    """A loop of one's own with ``tk.Checkpoints`` alone: everything happens in one thread where it waits."""

    def child() -> int:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        checkpoints = torchkeep.Checkpoints(folder, keep_last, metric="loss")
        taken, begun = checkpoints.take_up(), 0
        if taken is not None:
            begun = taken[0].step
            model.load_state_dict(taken[1]["model"])
            optimizer.load_state_dict(taken[1]["optimizer"])
        for step in range(begun + 1, steps + 1):
            x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoints.save(step, state, {"loss": loss.item()}, wait=wait)
        checkpoints.join()
        return 0

    return lambda: cli.run(child)


def hand_end(folder: Path) -> tuple[str, int]:
    checkpoints = Checkpoints(folder)
    saved = checkpoints.latest()
    assert saved is not None
    return tensor_sha256(pack(checkpoints.load(saved))[1]), saved.step
