"""What the suite of mistakes is made of: cases, small data that can be learned, small models, and a judge."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

import torchkeep as tk
from torchkeep.errors import TorchkeepError

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES, SHARED = ROOT / "examples", ROOT / "../shared"
DIGITS = EXAMPLES / "digits"

CLASSES, WIDTH, HIDDEN, TIME, WORDS, SIDE = 3, 8, 32, 6, 20, 12
BATCH = 16
REFUSED = "refused"
"""Stands among a case's checks where the training cannot even be prepared: an error of torchkeep's is right."""

Given = dict[str, Any]
Level = Literal["quick", "full"]
LEVELS: tuple[Level, ...] = ("quick", "full")


@dataclass(frozen=True)
class Case:
    """A training: what ``tk.preflight`` is given, made in a folder, and which checks should blame it: none if right.

    ``quick``: the quick checks should find it too. ``needs`` names what it takes of the shared data.
    """

    name: str
    make: Callable[[Path], Given]
    checks: tuple[str, ...] = ()
    quick: bool = False
    needs: tuple[str, ...] = ()

    @property
    def missing(self) -> list[str]:
        return [name for name in self.needs if not (SHARED / name).exists()]


@dataclass
class Outcome:
    """What the checks of a level said of a case; ``changed`` names what was not put back."""

    case: Case
    level: Level
    findings: list[Any] = field(default_factory=list)
    refusal: str = ""
    changed: list[str] = field(default_factory=list)

    @property
    def blames(self) -> dict[str, str]:
        said = {f.check: f"{f.verdict}: {f.found}" for f in self.findings if f.is_blamed}
        return {REFUSED: self.refusal} if self.refusal else said

    @property
    def verdict(self) -> str:
        """ "found", "found otherwise" (by a check that the case does not name) or "missed"."""
        if self.blames.keys() & set(self.case.checks):
            return "found"
        return "found otherwise" if self.blames.keys() - {REFUSED} else "missed"


def look(case: Case, folder: Path, level: Level) -> Outcome:
    """Ask the checks of a level about a case, from one seed, and compare everything before with everything after."""
    torch.manual_seed(0)
    given, found = case.make(folder), Outcome(case, level)
    before = memory_of(given)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using a target size")  # torch's own word to one of the mistakes
            found.findings = tk.preflight(**given, level=level)
    except TorchkeepError as refusal:
        found.refusal = str(refusal).partition("\n")[0]
    after = memory_of(given)
    found.changed = [name for name in before.keys() | after.keys() if not _same(before.get(name), after.get(name))]
    return found


def memory_of(given: Given) -> dict[str, Any]:
    """Parameters, buffers, gradients, modes, optimisers and generators, copied."""
    held: dict[str, Any] = {
        "torch's generator": torch.get_rng_state(),
        "numpy's generator": np.random.get_state()[1].copy(),
        "random's generator": random.getstate(),
    }
    model, optimizer = given["source"], given.get("optimizer")
    if isinstance(model, nn.Module):
        tensors = [*model.named_parameters(), *model.named_buffers()]
        held |= {name: tensor.detach().clone() for name, tensor in tensors}
        held |= {f"gradient of {n}": None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
        held |= {f"learning of {n}": p.requires_grad for n, p in model.named_parameters()}
        held |= {f"mode of {name}": module.training for name, module in model.named_modules()}
        held |= {f"{name}.{key}": value.clone() if isinstance(value, Tensor) else value
                 for name, module in model.named_modules() for key, value in vars(module).items()
                 if isinstance(value, int | float | Tensor)}  # fmt: skip
    for name, one in optimizer.items() if isinstance(optimizer, dict) else [("optimiser", optimizer)]:
        if isinstance(one, torch.optim.Optimizer):
            held[f"state of {name}"] = [dict(state) for state in one.state.values()]
            held[f"rates of {name}"] = [group["lr"] for group in one.param_groups]
    return held


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())
    return bool(np.array_equal(one, other)) if isinstance(one, np.ndarray) else bool(one == other)


# --- data: what is to be learned is a rule, the same in both splits


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def points(seed: int = 1, count: int = 96, **changed: Any) -> tk.Arrays:
    """``x`` (N, 8) of standard size; ``label``: which of three directions it points to most."""
    x = drawn(seed, count, WIDTH)
    return tk.Arrays(**({"x": x, "label": (x @ drawn(0, WIDTH, CLASSES)).argmax(1)} | changed))


def numbers(seed: int = 1, count: int = 96, scale: float = 1.0, *form: int) -> tk.Arrays:
    """``x`` (N, 8) and ``target`` (N, *form): a smooth function of it, of unit variance before ``scale``."""
    x = drawn(seed, count, WIDTH)
    y = x @ drawn(0, WIDTH, 1).squeeze(1)
    return tk.Arrays(x=x, target=((y / y.std()) * scale).reshape(count, *form))


def large(seed: int = 1, count: int = 96) -> tk.Arrays:
    """The same points about 500, with a deviation of 100."""
    return points(seed, count, x=500 + 100 * points(seed, count).columns["x"])


def series(seed: int = 1, count: int = 96) -> tk.Arrays:
    """``x`` (N, 6, 8): noise over time; ``label``: which of its first three features is greatest in the mean."""
    x = drawn(seed, count, TIME, WIDTH)
    return tk.Arrays(x=x, label=x[..., :CLASSES].mean(1).argmax(1))


def images(seed: int = 1, count: int = 96, form: Callable[[Tensor], Any] = lambda x: x) -> tk.Arrays:
    """``x`` (N, 1, 12, 12) about -1 to 1: a bright band at the top, in the middle or at the bottom."""
    label = torch.arange(count) % CLASSES
    x = 0.3 * drawn(seed, count, 1, SIDE, SIDE) - 0.5
    for place in range(CLASSES):
        x[label == place, :, 4 * place + 1 : 4 * place + 3] += 1.5
    return tk.Arrays(x=form(x), label=label)


def sentences(seed: int = 1, count: int = 96, words: int = WORDS) -> tk.Arrays:
    """``tokens`` (N, 6) from 0; ``label``: the first one's rest by three."""
    tokens = torch.randint(words, (count, TIME), generator=torch.Generator().manual_seed(seed))
    return tk.Arrays(tokens=tokens, label=tokens[:, 0] % CLASSES)


def counting(seed: int = 1, count: int = 96) -> tk.Arrays:
    """``tokens`` (N, 6) that count up by one, and ``target``: the next of each; -100 behind an end of its own."""
    random_ = torch.Generator().manual_seed(seed)
    tokens = (torch.randint(WORDS, (count, 1), generator=random_) + torch.arange(TIME)) % WORDS
    ends = torch.randint(2, TIME + 1, (count, 1), generator=random_)
    return tk.Arrays(tokens=tokens, target=((tokens + 1) % WORDS).where(torch.arange(TIME) < ends, -100))


# --- models


class Own(nn.Module):
    """A forward written beside the case: ``run(module, x)``; what else is given become its attributes."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **parts: Any):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


class Words(Own):
    """The same for ``tokens``."""

    def forward(self, tokens: Tensor) -> Any:  # type: ignore[override]
        return self.run(self, tokens)


def body(width: int = WIDTH) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, HIDDEN), nn.ReLU())


def net(*last: nn.Module, out: int = CLASSES) -> nn.Sequential:
    return nn.Sequential(*body(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, out), *last)


def convnet(out: int = CLASSES) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 36, out),
    )  # fmt: skip


def changed(model: nn.Module, change: Callable[[nn.Module], Any], *kinds: type[nn.Module]) -> nn.Module:
    """The model after ``change`` of each module of these kinds, without a graph."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, kinds):
                change(module)
    return model


def fit(
    model: nn.Module, data: Callable[..., Any] = points, *, train: Any = None, valid: Any = None,
    sections: Mapping[str, Mapping[str, Any]] | None = None, **given: Any,
) -> Given:  # fmt: skip
    """What ``tk.fit`` would be called with: two splits of the data, a few epochs on one thread."""
    train = data() if train is None else train
    valid = data(2, 48) if valid is None else valid
    settings = {name: dict(values) for name, values in (sections or {}).items()}
    settings["train"] = {"threads": 1, **settings.get("train", {})}
    own = {"source": model, "train": train, "valid": valid, "settings": settings}
    return {"batch_size": BATCH, "epochs": 5, **own, **given}


def recipe(data: Mapping[str, Any], model: Mapping[str, Any], **sections: Any) -> Given:
    """A recipe as a dict."""
    train = {"threads": 1, **sections.pop("train", {})}
    return {"source": {"name": "case", "data": dict(data), "model": dict(model), "train": train, **sections}}


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path
