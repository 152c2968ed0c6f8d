"""The whole recipe, made of the settings beside their owners."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field as Setting
from pydantic import field_validator, model_validator

from ..contracts import Json
from ..data.sources import DataSettings
from ..errors import SettingsError
from ..keep.checkpoint import CheckpointSettings
from ..keep.stopping import EarlyStoppingSettings
from ..model.build import ModelSettings
from ..model.freeze import FreezeSettings
from ..settings import Settings, check, override, read_toml
from ..watch.monitor import MonitorSettings
from .features import FeatureSettings
from .metrics import check_metric_name
from .optim import OptimizerSettings

LOSSES = ("auto", "cross_entropy", "binary_cross_entropy", "mse")


class TrainSettings(Settings):
    """[train]: how long, on what, with which loss and metrics."""

    epochs: int = Setting(default=10, gt=0)
    """Passes over the training split."""
    max_steps: int | None = Setting(default=None, gt=0)
    """Stop after so many updates, within an epoch if need be."""
    loss: Literal["auto", "cross_entropy", "binary_cross_entropy", "mse"] = "auto"
    """"auto": cross_entropy for classes, mse for numbers, the model's own where its output has .loss."""
    class_weights: list[float] | None = None
    """One weight for each class, for cross_entropy."""
    label_smoothing: float = Setting(default=0.0, ge=0, lt=1)
    """The share of each label that is spread over all classes."""
    mixup: float = Setting(default=0.0, ge=0, allow_inf_nan=False)
    """The a of Beta(a, a), by which each image is blended with another of its batch, and so is the loss; 0: none."""
    cutmix: float = Setting(default=0.0, ge=0, allow_inf_nan=False)
    """The same for a box of another image; with ``mixup`` beside it, each batch gets one of the two by a keyed coin."""
    metrics: list[str] = Setting(default_factory=list)
    """"accuracy", "top5" (any number), "f1", "precision", "recall", "mean_absolute_error", "r2"."""
    train_metrics: bool = False
    """Measure the metrics on the training batches too, as they are trained on."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """"auto": bf16 on a GPU that has it, else fp32; fp16 comes with a loss scaler."""
    device: str = "auto"
    """"auto", "cpu", "cuda", "cuda:1", "mps"."""
    threads: int | None = Setting(default=None, gt=0)
    """torch's threads on the CPU; none: as torch has it. Another number gives other bits."""
    keep_memory: bool = True
    """On a CPU: what a step frees is kept for the next until the run ends, in place of asking the system anew."""
    deterministic: bool = False
    """Only deterministic kernels; on a GPU an exact resume needs it."""
    clip_norm: float | None = Setting(default=None, gt=0)
    """The largest norm of all gradients together."""
    accumulate: int = Setting(default=1, gt=0)
    """Batches (one backward each) for one update."""
    ema: float | None = Setting(default=None, gt=0, lt=1)
    """Decay of a moving average of the parameters, which evaluation then uses."""
    swa: int | None = Setting(default=None, gt=0)
    """The first epoch (counted from 1) at whose end the parameters join an average of equal weights, which is used."""

    @model_validator(mode="after")
    def _one_average(self) -> TrainSettings:
        if self.ema and self.swa:
            raise ValueError("one average: ema or swa")
        return self

    @field_validator("metrics")
    @classmethod
    def _known_metrics(cls, names: list[str]) -> list[str]:
        for name in names:
            check_metric_name(name)
        return names


class RunSettings(Settings):
    """What both roads share: a recipe's sections but for data and model."""

    name: str = "run"
    """What the run's folder is called."""
    seed: int = 0
    """What every draw is keyed by."""
    features: FeatureSettings = Setting(default_factory=FeatureSettings)
    """What a frozen part makes of each sample, computed once."""
    freeze: FreezeSettings | None = None
    """Which parts stay as they are, for how long, and how fast they learn afterwards."""
    optimizer: OptimizerSettings = Setting(default_factory=OptimizerSettings)
    """The update, its rate over time, and weight decay."""
    train: TrainSettings = Setting(default_factory=TrainSettings)
    """How long, on what, with which loss and metrics."""
    checkpoint: CheckpointSettings = Setting(default_factory=CheckpointSettings)
    """When to save and what to keep."""
    early_stopping: EarlyStoppingSettings = Setting(default_factory=EarlyStoppingSettings)
    """When to end before the last epoch."""
    monitor: MonitorSettings = Setting(default_factory=MonitorSettings)
    """What is recorded and shown."""

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if not name.strip(" .") or any(sign in name for sign in '/\\:*?"<>|'):
            raise ValueError("a name that a folder can have")
        return name


class Recipe(RunSettings):
    """A whole training, by names."""

    data: DataSettings
    """Where the samples come from and how they become batches."""
    model: ModelSettings
    """Which model, and what it is built with."""


def read_recipe(source: str | Path | dict[str, Any], assignments: list[str]) -> tuple[Recipe, Path]:
    """A recipe from a TOML file or a dict, with ``--set`` applied, and the folder that its paths are relative to.

    Raises:  SettingsError naming the key and what it may be
    """
    if isinstance(source, dict):
        return check(Recipe, override(source, assignments), "recipe"), Path.cwd()
    path = Path(source)
    data = read_toml(path)
    data.setdefault("name", path.resolve().parent.name if path.stem == "recipe" else path.stem)
    return check(Recipe, override(data, assignments), path), path.resolve().parent


def recipe_from_json(data: Json, where: object) -> Recipe:
    """A recipe as run.json holds it."""
    if data is None:
        raise SettingsError(
            "this run was made by tk.fit from objects", where=where, got="no recipe",
            expected="a run of torchkeep train", fix='call the same tk.fit(…, run_dir=…, resume="auto") again',
        )  # fmt: skip
    return check(Recipe, data, where)


def schema() -> Json:
    """The JSON schema of a recipe."""
    return Recipe.model_json_schema()
