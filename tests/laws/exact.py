"""Small runs put together from features by name, and the ways they are stopped; processes of their own import it."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import torchkeep as tk
from torchkeep.tensors import pack, tensor_sha256
from torchkeep.watch.records import canonical, read_records

FEATURES: dict[str, tuple[str, ...]] = {
    "dropout": ("off", "on"),
    "norm": ("off", "batch"),
    "augment": ("off", "on"),
    "mix": ("off", "mixup", "cutmix"),
    "accumulate": ("1", "2"),
    "average": ("off", "ema", "swa"),
    "clip": ("off", "on"),
    "schedule": ("constant", "one_cycle"),
    "stopping": ("off", "warmup", "restore_best"),
    "feed": ("inline", "threads", "processes"),
    "precision": ("fp32", "bf16", "fp16"),
    "optimisers": ("one", "two"),
    "every": ("1", "2", "3", "epoch"),
    "keep": ("last", "every 4"),
    "cache": ("off", "ram"),
    "bad": ("none", "substitute", "mask"),
    "metrics": ("valid", "both"),
    "stop": ("interrupt", "at once", "failure"),
}
"""What a run is made of, and how it is left (``stop``)."""

APART = {
    # a step of the user's own mixes by itself, and updates within itself
    *(frozenset({("mix", mix), ("optimisers", "two")}) for mix in ("mixup", "cutmix")),
    frozenset({("accumulate", "2"), ("optimisers", "two")}),
    # images are read in processes where an augmentation is the user's own
    frozenset({("feed", "processes"), ("augment", "off")}),
}
"""Pairs that cannot be together."""

Case = dict[str, str]
_BATCH, _TRAIN, _VALID = 5, 18, 5  # four batches, the last of three; one to evaluate


# --- how a run is left


class StepError(Exception):
    """A step that fails, as a bug of the user's would make it."""


class Stop:
    """Leaves a run within the ``number``-th forward of a module, counted from the first that trains; none: never."""

    def __init__(self, how: str, number: int | None, wait_s: float = 0.0):
        self.how, self.number, self.wait_s, self.calls = how, number, wait_s, 0

    def __call__(self, module: nn.Module, *_: Any) -> None:
        self.calls += module.training or self.calls > 0
        if self.calls == self.number:
            self.number = None
            time.sleep(self.wait_s)  # a save may be under way
            _LEAVE[self.how]()


def _fail() -> None:
    raise StepError


def _interrupt(times: int) -> None:
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGINT)


_LEAVE: dict[str, Callable[[], None]] = {
    "interrupt": lambda: _interrupt(1),
    "at once": lambda: _interrupt(2),
    "failure": _fail,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
}
LEFT_BY: dict[str, type[BaseException]] = {
    "interrupt": tk.Interrupted, "at once": KeyboardInterrupt, "failure": StepError,
}  # fmt: skip


# --- what is trained


def draw_images(place: Path) -> None:
    """Folders "whole", "damaged" (one of whose images cannot be read) and "valid": noise in two unequal classes."""
    rng = np.random.default_rng(0)
    for split, size in (("whole", _TRAIN), ("damaged", _TRAIN), ("valid", _VALID)):
        for number in range(size):
            path = place / split / "ab"[number % 3 > 0] / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (10, 12, 3), dtype=np.uint8)).save(path)
    (place / "damaged" / "a" / "03.png").write_bytes(b"no image")


def fading(sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """An augmentation of the user's own."""
    return {**sample, "image": (sample["image"] * rng.uniform(0.5, 1.0)).to(torch.uint8)}


class Net(nn.Module):
    """A convolution and a linear layer, with whatever else of ``case`` is part of a model."""

    def __init__(self, case: Case):
        super().__init__()
        norm = nn.BatchNorm2d(4) if case["norm"] == "batch" else nn.Identity()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), norm, nn.Tanh(), nn.Flatten())
        self.head = nn.Sequential(nn.Dropout(0.4 if case["dropout"] == "on" else 0.0), nn.Linear(36, 2))

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(image))
        return logits


def two_in_turn(model: nn.Module, batch: dict[str, Tensor], context: Any) -> dict[str, Any]:
    """A step of the user's own: the head learns from noisy images, then the body from clean ones."""
    image, label = batch["image"], batch["label"]
    logged: dict[str, Any] = {"target": label}
    if context.training:
        noise = torch.randn(image.shape, generator=context.generator("noise"))
        logged["noisy"] = F.cross_entropy(model(image + 0.3 * noise).float(), label)
        context.backward(logged["noisy"], "head")
    logged["output"] = model(image).float()
    logged["loss"] = F.cross_entropy(logged["output"], label)
    context.backward(logged["loss"], "body")
    return logged


def two_optimisers(model: Any) -> dict[str, torch.optim.Optimizer]:
    return {
        "body": torch.optim.AdamW(model.body.parameters(), lr=0.02),
        "head": torch.optim.SGD(model.head.parameters(), lr=0.1, momentum=0.9),
    }


def images_of(case: Case, place: Path) -> tuple[tk.ImageFolder, tk.ImageFolder]:
    augment: list[Any] = ["random_resized_crop", "horizontal_flip", "color_jitter"] if case["augment"] == "on" else []
    augment += [fading] if case["feed"] == "processes" else []
    train = tk.ImageFolder(place / ("whole" if case["bad"] == "none" else "damaged"), image_size=8, augment=augment)
    return train, tk.ImageFolder(place / "valid", image_size=8, like=train)


def settings_of(case: Case) -> dict[str, Any]:
    """The sections, as a recipe has them."""
    every, stopping = case["every"], case["stopping"]
    train = {"threads": 1, "precision": case["precision"], "accumulate": int(case["accumulate"])}
    train |= {case["mix"]: 0.8} if case["mix"] != "off" else {}
    train |= {"off": {}, "ema": {"ema": 0.8}, "swa": {"swa": 2}}[case["average"]]
    train |= {"clip_norm": 0.5} if case["clip"] == "on" else {}
    train |= {"train_metrics": case["metrics"] == "both", "epochs": 4 if stopping == "warmup" else 3}
    early: dict[str, Any] = {"restore_best": stopping == "restore_best"}
    if stopping != "off":  # no improvement is large enough: the second evaluation ends it, or with a warm-up the third
        early |= {"patience": 1, "min_delta": 9.0, "warmup": 2 if stopping == "warmup" else 0}
    checkpoint = {"every": every if every == "epoch" else int(every), "on_error": "leave", "metric": "valid/loss"}
    checkpoint |= {"keep_every": 4} if case["keep"] == "every 4" else {}
    return {"train": train, "early_stopping": early, "checkpoint": checkpoint,
            "monitor": {"views": [], "log_every": 2, "graph": False, "histograms": "off"}}  # fmt: skip


def fit(case: Case, place: Path, folder: Path, stop: Stop) -> tuple[tk.Run, str]:
    """The run, everything built anew, and the identity of the parameters that the model was left with."""
    torch.manual_seed(3)
    model = Net(case)
    model.register_forward_pre_hook(stop)
    train, valid = images_of(case, place)
    own: dict[str, Any] = {"learning_rate": 0.02, "on_bad": "raise" if case["bad"] == "none" else case["bad"]}
    if case["optimisers"] == "two":
        own |= {"step": two_in_turn, "optimizer": two_optimisers, "learning_rate": None}
    torch.seed()  # what the program draws by itself is not what the run goes on with
    run = tk.fit(
        model, train, valid, metrics=["accuracy"], batch_size=_BATCH, schedule=case["schedule"],
        workers=0 if case["feed"] == "inline" else 2, cache="ram" if case["cache"] == "ram" else "off",
        run_dir=folder, resume="auto", preflight="off", quiet=True, settings=settings_of(case), **own,
    )  # fmt: skip
    return run, tensor_sha256(dict(model.state_dict()))


# --- what must be the same


def all_of(folder: Path) -> tuple[bytes, str, Any, str]:
    """Everything that must be the same: the record, the last checkpoint's tensors and values, and why it ended."""
    checkpoints = tk.Checkpoints(folder / "checkpoints")
    saved = checkpoints.latest()
    assert saved is not None
    values, tensors = pack(checkpoints.load(saved))
    ends = [row for row in read_records(folder / "records.jsonl") if row["kind"] == "run_end"]
    return canonical(folder / "records.jsonl"), tensor_sha256(tensors), (saved.step, values), ends[-1]["reason"]


def states_of(folder: Path) -> dict[str, tuple[str, Any]]:
    """The tensors and values of every checkpoint that stands, by its name."""
    checkpoints = tk.Checkpoints(folder)
    packed = {path.name: pack(checkpoints.load(path)) for path in checkpoints.steps()}
    return {name: (tensor_sha256(tensors), values) for name, (values, tensors) in packed.items()}


# --- in processes of their own, and with the pieces alone


def run_killed(case: Case, place: Path, folder: Path, number: int | None) -> None:
    """``fit`` in a process of its own, which a kill -9 ends within its ``number``-th forward."""
    fit(case, place, folder, Stop("kill", number, random.random() * 0.005))


def run_loop(place: Path, folder: Path, number: int | None) -> None:
    """The same for a loop written by hand: feeding, saving, stopping and the generators' states are from here."""
    torch.set_num_threads(1)
    stop = Stop("kill", number, random.random() * 0.005)
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    model = Net({"norm": "batch", "dropout": "on"})
    model.register_forward_pre_hook(stop)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    train, valid = images_of({"augment": "on", "feed": "threads", "bad": "none"}, place)
    loader, evaluated = tk.Loader(train, _BATCH, shuffle=True, seed=7, workers=2), tk.Loader(valid, _VALID)
    checkpoints = tk.Checkpoints(folder, keep_last=3, metric="valid/loss")
    stopper = tk.EarlyStopping(metric="valid/loss", patience=1, min_delta=9.0, warmup=2)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "loader": loader, "stopper": stopper}
    losses: list[float] = []

    def save(metrics: dict[str, float]) -> None:
        state: dict[str, Any] = {name: dict(part.state_dict()) for name, part in parts.items()}
        state |= {"rng": tk.generator_states(), "losses": losses}
        checkpoints.save(len(losses), state, metrics, wait=False)

    saved = checkpoints.latest()
    if saved is not None:
        state = checkpoints.load(saved)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        losses = state["losses"]
        tk.set_generator_states(state["rng"])
    while not stopper.should_stop:
        model.train()
        for batch in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch["image"] / 255), batch["label"])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
            save({})
        model.eval()
        with torch.no_grad():
            batch = next(iter(evaluated))
            metrics = {"valid/loss": F.cross_entropy(model(batch["image"] / 255), batch["label"]).item()}
        stopper.update(metrics)
        save(metrics)
    checkpoints.join()
