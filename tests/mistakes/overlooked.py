"""Mistakes that the checks did not see when they first met them; each has taught one of them something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from material import WORDS, Case, Given, Own, Words, drawn, fit, net, points, recipe, written
from torch import Tensor, nn

import torchkeep as tk

_LONG, _WIDE = 12, 32


def _texts(seed: int = 1, count: int = 96, shift: int = 1) -> tk.Arrays:
    """``tokens`` (N, 12) by a rule, and ``target``: the next of each, or (0) the same."""
    tokens = torch.randint(WORDS, (count, _LONG + 1), generator=torch.Generator().manual_seed(seed))
    for place in range(2, _LONG + 1):
        tokens[:, place] = (tokens[:, place - 1] + tokens[:, place - 2]) % WORDS
    return tk.Arrays(tokens=tokens[:, :_LONG], target=tokens[:, shift : _LONG + shift])


def _reader(is_causal: bool = True) -> nn.Module:
    """A small transformer over ``tokens``: logits (B, T, K)."""

    def run(own: Any, tokens: Tensor) -> Any:
        size = tokens.shape[1]
        mask = torch.triu(torch.full((size, size), float("-inf")), 1) if is_causal else None
        return own.last(own.layers(own.words(tokens) + own.places.weight[:size], mask=mask))

    layer = nn.TransformerEncoderLayer(_WIDE, 4, 2 * _WIDE, dropout=0.0, batch_first=True)
    layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return Words(run, words=nn.Embedding(WORDS, _WIDE), places=nn.Embedding(_LONG, _WIDE), layers=layers,
                 last=nn.Linear(_WIDE, WORDS))  # fmt: skip


def _by_view(output: Tensor, target: Tensor) -> Tensor:
    size, time, classes = output.shape
    return F.cross_entropy(output.view(size, classes, time), target)


def _several(seed: int = 1, count: int = 96, scale: float = 1.0) -> tk.Arrays:
    x = drawn(seed, count, 8)
    return tk.Arrays(x=x, target=(x @ drawn(0, 8, 3) > -1).float() * scale)


def _scaled(seed: int, count: int) -> tk.Arrays:
    x = drawn(seed, count, 8)
    return tk.Arrays(x=x.sigmoid() / 255, label=(x @ drawn(0, 8, 3)).argmax(1))


def _window(seed: int, count: int) -> tk.Arrays:
    x = drawn(seed, count, 8).cumsum(1)
    return tk.Arrays(x=x, target=x[:, -1:])


def _without_minus(output: Tensor, label: Tensor) -> Tensor:
    return output.log_softmax(1).gather(1, label[:, None]).mean()


def _rate_as_factor(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1e-9 * 0.95**epoch)


def _with_a_gap(seed: int = 1, count: int = 200) -> tk.Arrays:
    held = points(seed, count)
    x, label = (torch.stack([torch.as_tensor(held[row][key]) for row in range(count)]) for key in ("x", "label"))
    x[150, 3] = float("nan")
    return tk.Arrays(x=x, label=label)


def _raw(seed: int, count: int) -> tk.Arrays:
    x = drawn(seed, count, 8)
    return tk.Arrays(x=30 * x + 120, label=(x @ drawn(0, 8, 3)).argmax(1))


def _drawn_again(_: Path) -> Given:
    x, rows = drawn(1, 120, 8), torch.randperm(240, generator=torch.Generator().manual_seed(2)) % 120
    label = (x @ drawn(0, 8, 3)).argmax(1)
    train, valid = (tk.Arrays(x=x[part], label=label[part]) for part in (rows[:180], rows[180:]))
    return fit(net(), train=train, valid=valid)


class _InPlace(torch.utils.data.Dataset[Any]):
    """Normalises what it holds, each time anew."""

    def __init__(self) -> None:
        self.x, self.label = drawn(1, 96, 8), (drawn(1, 96, 8) @ drawn(0, 8, 3)).argmax(1)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        x = self.x[index]
        x -= 0.4
        return {"x": x, "label": int(self.label[index])}


def _apart(model: nn.Module, batch: dict[str, Any], context: Any) -> dict[str, Tensor]:
    made = model(batch["x"])
    distance = ((made[:, None] - made[None]) ** 2).sum(-1).sqrt()  # of each to itself: a root at 0
    return {"loss": (1 - distance).relu().mean()}


def _known_afterwards(folder: Path) -> Given:
    rows = [f"{20 + row % 37},{row % 2 * (30 + row % 50)},{'yes' if row % 2 else 'no'}" for row in range(120)]
    table = written(folder, "loans.csv", "\n".join(["age,days_overdue,default", *rows]) + "\n")
    return recipe({"train": str(table), "target": "default", "valid_fraction": 0.2, "batch_size": 16}, {"name": "mlp"})


def _by_step(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.1)


def _read(model: nn.Module, **given: Any) -> Given:
    shift = given.pop("shift", 1)
    return fit(model, train=_texts(1, 96, shift), valid=_texts(2, 48, shift), **given)


OVERLOOKED: list[Case] = [
    Case("a target that is the input", lambda _: _read(_reader(), shift=0), ("sequence",), quick=True),
    Case("a language model that sees what comes", lambda _: _read(_reader(is_causal=False)), ("sequence",), quick=True),
    Case("view for transpose in the loss", lambda _: _read(_reader(), loss=_by_view), ("sequence",), quick=True),
    Case("softmax where several classes are true",
         lambda _: fit(net(nn.Softmax(1)), train=_several(), valid=_several(2, 48), loss=nn.BCELoss()),
         ("probabilities twice",), quick=True),
    Case("a root at 0 whose gradient is no number", lambda _: fit(net(), step=_apart), ("gradients",)),
    Case("a number that is none in a later batch", lambda _: fit(net(), train=_with_a_gap()), ("samples",)),
    Case("valid as it came, train standardised", lambda _: fit(net(), valid=_raw(2, 48)), ("samples",)),
    Case("a dataset that normalises itself away", lambda _: fit(net(), train=_InPlace()), ("samples",)),
    Case("samples drawn twice before the split", _drawn_again, ("splits apart",)),
    Case("a rate that ends after ten steps", lambda _: fit(
        net(), optimizer=lambda model: torch.optim.Adam(model.parameters(), 1e-3), epochs=40, schedule=_by_step),
        ("learning rate",)),
    Case("a rate thirty times too high for a transformer", lambda _: _read(_reader(), learning_rate=0.1, epochs=20),
         ("learning rate",)),
    Case("a scheduler's factor that is a rate", lambda _: fit(
        net(), optimizer=lambda model: torch.optim.Adam(model.parameters(), 1e-3), schedule=_rate_as_factor),
        ("learning rate",)),
    Case("divided by 255 twice", lambda _: fit(net(), train=_scaled(1, 96), valid=_scaled(2, 48)), ("inputs",), True),
    Case("a mask of 0 and 255", lambda _: fit(net(), train=_several(scale=255), valid=_several(2, 48, 255),
         loss=nn.BCEWithLogitsLoss()), ("probabilities twice",), quick=True),
    Case("a minus forgotten", lambda _: fit(net(), loss=_without_minus), ("direction",), quick=True),
    Case("a forecast of what is in the window", lambda _: fit(net(out=1), train=_window(1, 96), valid=_window(2, 48)),
         ("leak",)),
    Case("a parameter times a number", lambda _: fit(Own(lambda own, x: own.net(x + own.shift), net=net(),
         shift=nn.Parameter(drawn(3, 8)) * 0.02)), ("registered",), quick=True),
    Case("a column that is known only afterwards", _known_afterwards, ("leak",)),
]  # fmt: skip
