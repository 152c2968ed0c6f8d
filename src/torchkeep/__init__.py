"""Torchkeep: a training system for PyTorch.

Read it in this order: ``chance``, ``data.images``, ``data.loader``, ``training.device``, ``training.binding`` and
``training.step`` are a sample's way from the disk to the gradient; ``training.recipe``, ``training.prepare``,
``training.loop``, ``watch.records`` and ``keep.checkpoint`` are the run around it; ``api`` and ``cli`` are the verbs.
``data.tables``, ``data.text``, ``data.audio``, ``data.hub`` and ``data.streams`` are read as ``data.images`` is; all of
them stand on ``data.frames``, ``data.index``, ``data.blobs``, ``data.dataset`` and ``data.labels``.

Names are loaded when they are first used: ``import torchkeep`` itself imports neither torch nor NumPy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import fit, inspect, open_run, preflight, resume, train
    from .data.arrays import Arrays
    from .data.audio import AudioFolder, AudioTable
    from .data.dataset import Part
    from .data.foreign import Foreign
    from .data.hub import HubDataset, HubStream
    from .data.images import IdxImages, ImageFolder, ImageTable
    from .data.loader import Loader
    from .data.splits import split
    from .data.streams import Stream
    from .data.tables import Table
    from .data.text import TextBlocks, TextFolder, TextTable
    from .errors import Interrupted, PreemptedError, TorchkeepError
    from .handing import eject, evaluate, evaluation, package, predict, reproduce
    from .history import compare, read_run, runs, sync
    from .keep.checkpoint import Checkpoints
    from .keep.generators import generator_states, set_generator_states
    from .keep.stopping import EarlyStopping
    from .model.freeze import FreezePlan
    from .model.tracing import trace_backward
    from .model.weights import load_weights
    from .running import BestPoint, Run
    from .share.package import Package, load_package, save_package
    from .share.predict import Predictor
    from .training.survey import survey
    from .transfer import fine_tune
    from .watch.monitor import Monitor
    from .watch.writer import SummaryWriter

__version__ = "0.1.0"

_PLACES = {
    "BestPoint": "running", "Run": "running", "eject": "handing", "evaluate": "handing", "evaluation": "handing",
    "fit": "api", "inspect": "api", "open_run": "api", "preflight": "api",
    "predict": "handing", "reproduce": "handing", "resume": "api", "train": "api",
    "Package": "share.package", "Predictor": "share.predict", "load_package": "share.package", "package": "handing",
    "save_package": "share.package",
    "compare": "history", "read_run": "history", "runs": "history", "sync": "history",
    "Monitor": "watch.monitor", "SummaryWriter": "watch.writer",
    "Arrays": "data.arrays", "AudioFolder": "data.audio", "AudioTable": "data.audio", "Foreign": "data.foreign",
    "HubDataset": "data.hub", "HubStream": "data.hub", "IdxImages": "data.images", "ImageFolder": "data.images",
    "ImageTable": "data.images", "Loader": "data.loader", "Part": "data.dataset", "Stream": "data.streams",
    "Table": "data.tables", "TextBlocks": "data.text", "TextFolder": "data.text", "TextTable": "data.text",
    "split": "data.splits", "survey": "training.survey",
    "Interrupted": "errors", "PreemptedError": "errors", "TorchkeepError": "errors",
    "Checkpoints": "keep.checkpoint", "EarlyStopping": "keep.stopping", "FreezePlan": "model.freeze",
    "load_weights": "model.weights", "fine_tune": "transfer", "trace_backward": "model.tracing",
    "generator_states": "keep.generators", "set_generator_states": "keep.generators",
}  # fmt: skip

__all__ = [
    "Arrays", "AudioFolder", "AudioTable", "BestPoint", "Checkpoints", "EarlyStopping", "Foreign", "FreezePlan",
    "HubDataset", "HubStream", "IdxImages", "ImageFolder", "ImageTable", "Interrupted", "Loader", "Monitor", "Package",
    "Part", "Predictor", "PreemptedError", "Run", "Stream", "SummaryWriter", "Table", "TextBlocks", "TextFolder",
    "TextTable", "TorchkeepError", "compare", "eject", "evaluate", "evaluation", "fine_tune", "fit", "generator_states",
    "inspect", "load_package", "load_weights", "open_run", "package", "predict", "preflight", "read_run", "reproduce",
    "resume", "runs", "save_package", "set_generator_states", "split", "survey", "sync", "trace_backward",
    "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_PLACES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
