"""What a run shows of itself, and the same for a loop of one's own."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from ..contracts import Json
from ..errors import SettingsError
from ..files import FolderLock, reported
from ..folder import RECORDS_FILE, TENSORBOARD
from ..settings import Settings, check
from .apart import require
from .feeds import View
from .media import MediaStore
from .mlflow import MlflowSettings
from .recorder import LATE, Recorder
from .records import Record, last_step, next_attempt
from .wandb import WandbSettings

ViewName = Literal["tensorboard", "wandb", "mlflow"]


class MonitorSettings(Settings):
    """What a run shows of itself."""

    views: list[ViewName] = Field(default=["tensorboard"])
    """Where the run is shown, besides the console."""
    log_every: PositiveInt | None = None
    """Steps between two log points; left out, 50."""
    histograms: PositiveInt | Literal["auto", "epoch", "off"] = "auto"
    """Weights, gradients, activations: "epoch" or every so many steps; "auto": as often as 1 % of the time allows."""
    images: NonNegativeInt = 16
    """Validation samples shown with truth and output, as often as 1 % of the time allows; 0: none, and no curves."""
    graph: bool = True
    """The graph of the model, once."""
    profile: NonNegativeInt = 0
    """Steps whose operations are traced, after ten."""
    system_every_s: float = Field(default=10.0, ge=0)
    """Seconds between two looks at processor, memory, disk and network; 0: none."""
    wandb: WandbSettings = Field(default_factory=WandbSettings)
    """Where Weights & Biases keeps the run."""
    mlflow: MlflowSettings = Field(default_factory=MlflowSettings)
    """Where MLflow keeps the run."""


def check_views(settings: MonitorSettings) -> None:
    """Raises:  SettingsError where the package of a view is missing"""
    for name in settings.views:
        if name != "tensorboard":
            require(name)


def make_views(settings: MonitorSettings, folder: Path, attempt: int, apart: bool = False) -> list[View]:
    """The views of one attempt in a run's folder. Each loads its own libraries only."""
    made: list[View] = []
    for name in settings.views:
        if name == "tensorboard":
            from .tensorboard import TensorBoardView

            shown = folder / TENSORBOARD
            made.append(TensorBoardView(shown / f"attempt-{attempt}" if apart else shown, attempt))
        elif name == "wandb":
            from .wandb import WandbView

            made.append(WandbView(folder, attempt, folder.name, settings.wandb))
        else:
            from .mlflow import MlflowView

            made.append(MlflowView(folder, attempt, folder.name, settings.mlflow))
    return made


class Monitor:
    """The record of a loop of one's own, and its views.

    >>> with tk.Monitor("runs/mine", views=["tensorboard"]) as monitor:
    ...     monitor.log(step, **{"train/loss": loss})
    Nothing is computed, copied from a GPU or written on the caller's thread but what cannot wait. In a folder that has
    a record a new attempt begins at ``from_step``, the step of the checkpoint that was loaded: what was recorded beyond
    it is superseded. Without ``from_step`` it goes on behind the last step.

    Raises:  RunFolderError where another process records there, StorageError where the disk refuses
    """

    def __init__(
        self, folder: str | Path, views: Sequence[ViewName] = ("tensorboard",), *, from_step: int | None = None,
        config: Json = None, on_record: Sequence[Callable[[Record], Any]] = (),
        on_alert: Callable[[str], None] | None = None, settings: Mapping[str, Any] | None = None,
    ):  # fmt: skip
        self.folder = Path(folder)
        self._settings = check(MonitorSettings, {**(settings or {}), "views": list(views)}, "tk.Monitor")
        check_views(self._settings)
        with reported(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(self.folder).acquire()
        path = self.folder / RECORDS_FILE
        attempt = next_attempt(path)
        self._step = last_step(path) if from_step is None else from_step
        self._samples = self._epoch = 0
        self._watched: list[tuple[Any, int]] = []
        self.recorder = Recorder(
            path, attempt=attempt, views=make_views(self._settings, self.folder, attempt), on_record=on_record,
            on_alert=on_alert or _say,
        )  # fmt: skip
        self._record("attempt_start", None, from_step=self._step, settings=config)
        if attempt == 0:
            self._record("run_start", None, began=time.time(), settings=config)

    def log(self, step: int, *, epoch: int | None = None, samples: int | None = None, **values: Any) -> None:
        """Numbers of one step by tag: ``monitor.log(step, **{"train/loss": loss})``; tensors of one element too."""
        self._epoch = self._epoch if epoch is None else epoch
        self._samples = self._samples if samples is None else samples
        self._step = step
        numbers: dict[str, Any] = {}
        is_late = False
        for tag, value in values.items():
            kind = type(value)
            if kind is float or kind is int:
                numbers[tag] = value
            elif getattr(value, "is_cuda", False) and value.numel() == 1:
                numbers[tag], is_late = value.detach().clone(), True
            else:
                numbers[tag] = _number(tag, value)
        payload = {LATE: _Numbers(numbers)} if is_late else {"values": numbers}
        self.recorder.log("scalars", step=step, samples=self._samples, epoch=self._epoch, **payload)
        for model, every in self._watched:
            if step % every == 0:
                self._log_parameters(step, model)

    def histogram(self, step: int, tag: str, values: Any) -> None:
        """The distribution of a tensor, or of an array."""
        from .histograms import histogram

        self._record("histogram", step, tag=tag, late=histogram(values))

    def image(self, step: int, tag: str, image: Any, caption: str = "") -> None:
        """An image (C, H, W), (H, W, C) or (H, W), or a batch of them, of any type and range."""
        from . import pictures

        self._record("image", step, tag=tag, late=pictures.image(image, caption))

    def prediction(
        self, step: int, tag: str, inputs: Any, truth: Any, output: Any, *, classes: Sequence[str] = (),
        ids: Sequence[Any] = (), most: int = 16,
    ) -> None:  # fmt: skip
        """Samples (B, …) with their truth (B,) and what the model makes of them: logits (B, K), numbers or masks."""
        from . import pictures

        late = pictures.prediction(inputs, truth, output, classes=classes, ids=ids, most=most)
        self._record("prediction", step, tag=tag, late=late)

    def mesh(
        self, step: int, tag: str, vertices: Any, faces: Any = None, colors: Any = None, truth: Any = None
    ) -> None:
        """A mesh of vertices (N, 3) and faces (F, 3) or (F, 4), or points; beside it the true (vertices, faces)."""
        from .meshes import mesh

        self._record("mesh", step, tag=tag, late=mesh(vertices, faces, colors, truth=truth))

    def text(self, step: int, tag: str, text: Any) -> None:
        """A text, as markdown where the view shows it."""
        from . import waves

        self._record("text", step, tag=tag, late=waves.text(text))

    def audio(self, step: int, tag: str, samples: Any, sample_rate: int, caption: str = "") -> None:
        """Sound (T,), (1, T) or (2, T) in -1 … 1."""
        from . import waves

        self._record("audio", step, tag=tag, late=waves.audio(samples, sample_rate, caption))

    def figure(self, step: int, tag: str, figure: Any) -> None:
        """A figure of matplotlib, drawn now."""
        from . import pictures

        self._record("figure", step, tag=tag, late=pictures.figure(figure))

    def confusion(self, step: int, tag: str, counts: Any, classes: Sequence[str]) -> None:
        """Counts (K, K): rows are the truth, columns the output."""
        rows = counts.tolist() if hasattr(counts, "tolist") else [list(row) for row in counts]
        self._record("confusion", step, tag=tag, counts=rows, classes=list(classes))

    def pr_curve(self, step: int, tag: str, labels: Any, scores: Any) -> None:
        """Precision against recall of scores (N,) in 0 … 1, with whether each is of a true sample."""
        from .curves import curve_of

        self._record("pr_curve", step, tag=tag, **curve_of(labels, scores))

    def config(self, settings: Mapping[str, Any]) -> None:
        """The settings of this run, for tables of many runs."""
        self._record("run_start", None, began=time.time(), settings=dict(settings))

    def graph(self, model: Any, example: Any) -> None:
        """The graph of a model, of its forward on an example: a tensor, a tuple of arguments or a dict of keywords."""
        from .graph import graph

        def call() -> Any:
            if isinstance(example, tuple | list):
                return model(*example)
            return model(**example) if isinstance(example, Mapping) else model(example)

        self._record("graph", None, tag="model", late=graph(model, call))

    def watch(self, model: Any, every: int = 100) -> None:
        """Histograms of the parameters and gradients whenever ``log`` is called with a multiple of ``every`` steps."""
        self._watched.append((model, max(1, every)))

    def alert(self, name: str, text: str, *, level: str = "warning", fix: str = "") -> None:
        """Something that a person should look at."""
        at = {"step": self._step, "samples": self._samples, "epoch": self._epoch}
        self.recorder.alert(name, text, level=level, fix=fix, at=at)

    def flush(self) -> None:
        """Wait until the disk has all that was logged: what a checkpoint acknowledges must not be lost.

        Raises:  StorageError where the disk refuses
        """
        self.recorder.flush(durable=True)

    def close(self, status: str = "finished", metrics: Mapping[str, float] | None = None) -> None:
        """End the record and the views. May be called more than once."""
        if self._lock is None:
            return
        lock, self._lock = self._lock, None
        try:
            self._record("run_end", None, status=status, reason="", metrics=dict(metrics or {}), artifacts=[])
            self.recorder.close()
        finally:
            lock.release()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        self.close("finished" if kind is None else "interrupted" if kind is KeyboardInterrupt else "failed")

    def _record(self, kind: str, step: int | None, **payload: Any) -> None:
        at = self._step if step is None else step
        self.recorder.log(kind, step=at, samples=self._samples, epoch=self._epoch, **payload)

    def _log_parameters(self, step: int, model: Any) -> None:
        from .histograms import histograms

        named = {f"weights/{name}": p.detach() for name, p in model.named_parameters()}
        named |= {f"gradients/{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
        for tag, late in histograms(named).items():
            self._record("histogram", step, tag=tag, late=late)

    _lock: FolderLock | None


class _Numbers:
    """Numbers of which some are still on a device: the writer's thread waits for them."""

    def __init__(self, numbers: dict[str, Any]):
        self._numbers = numbers

    def settle(self, media: MediaStore) -> dict[str, Json]:
        return {"values": {tag: float(value) for tag, value in self._numbers.items()}}


def _number(tag: str, value: Any) -> Any:
    try:
        return float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, RuntimeError):
        shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
        raise SettingsError(
            "this is no number", where=f"monitor.log({tag!r})", got=f"{type(value).__name__}{shape}",
            expected="a number, or a tensor of one element", fix="monitor.histogram, .text or .image show other things",
        ) from None  # fmt: skip


def _say(text: str) -> None:
    from .console import Console

    Console().warn(text)
