"""Datasets that only give one sample after another: keyed chance, resumes, ranks, and a whole training on one."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

import torchkeep as tk
from torchkeep.chance import ChanceKey
from torchkeep.data.foreign import as_dataset
from torchkeep.data.streams import Stream
from torchkeep.errors import BadSampleError, DataError, SettingsError
from torchkeep.generators import generator_states, same_states

SIZE = 23


class Counting(IterableDataset[Any]):
    """Numbers with noise of the named global generators; what it was told of epochs."""

    def __init__(self, *sources: str, size: int = SIZE):
        self.sources, self.size = sources, size

    def __iter__(self) -> Iterator[Any]:
        for number in range(self.size):
            yield torch.tensor([float(number), self.noise()], dtype=torch.float64), number % 3

    def noise(self) -> float:
        draws = {"torch": lambda: float(torch.rand(())), "numpy": np.random.rand, "python": random.random}
        return sum(draws[source]() for source in self.sources)


class Sized(Counting):
    epochs: list[int]

    def __len__(self) -> int:
        return self.size

    def set_epoch(self, epoch: int) -> None:
        self.epochs = [*getattr(self, "epochs", []), epoch]
        self.shift = epoch + 0 * self.noise()

    def __iter__(self) -> Iterator[Any]:
        for sample, label in super().__iter__():
            yield sample + 100 * self.shift, label


def batches(loader: tk.Loader) -> list[dict[str, Any]]:
    return list(loader)


def same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    return len(one) == len(other) and all(
        list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(one, other, strict=True)
    )


def numbers(found: list[dict[str, Any]]) -> list[int]:
    return [int(row[0]) % 100 for batch in found for row in batch["input"]]


SOURCES = [(), ("torch",), ("numpy",), ("python",), ("torch", "numpy", "python")]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("sources", SOURCES)
@pytest.mark.parametrize("kind", [Counting, Sized])
def test_batches_are_keyed_and_the_trainers_generators_untouched(kind: Any, sources: Any, shuffle: bool) -> None:
    def fresh(seed: int = 0) -> tk.Loader:
        data = kind(*sources)
        return tk.Loader(data if kind is Sized else Stream(data, length=SIZE), 4, shuffle=shuffle, seed=seed)

    before = generator_states()
    loader = fresh()
    first, second = batches(loader), batches(loader)
    assert same_states(generator_states(), before)
    assert len(first) == len(loader) == 6
    assert sorted(numbers(first)) == sorted(numbers(second)) == list(range(SIZE))
    assert (numbers(first) == list(range(SIZE))) is not shuffle
    torch.manual_seed(99), np.random.seed(99), random.seed(99)
    again = fresh()
    again.peek()
    assert same([*batches(again), *batches(again)], first + second)
    if sources or shuffle:
        assert not same(first, second)
        assert not same(batches(fresh(1)), first)
    if kind is Sized:
        assert loader.dataset.dataset.epochs[-2:] == [0, 1]
        assert float(second[0]["input"][0, 0]) >= 100
    assert first[0]["index"].tolist() == [0, 1, 2, 3]
    assert torch.equal(first[1]["target"], torch.tensor([int(row[0]) % 3 for row in first[1]["input"]]))


@pytest.mark.parametrize("buffer", [1, 5, 1024])
def test_a_resume_anywhere_in_an_epoch_gives_the_rest_of_it(buffer: int) -> None:
    def fresh() -> tk.Loader:
        return tk.Loader(Stream(Sized("torch", "numpy"), buffer=buffer), 4, shuffle=True, seed=3)

    loader = fresh()
    for wanted in (batches(fresh()), None):
        wanted = wanted or batches_of_epoch(fresh(), 1)
        for number, _ in enumerate(loader, 1):
            resumed = fresh()
            resumed.load_state_dict(loader.state_dict())
            assert same(batches(resumed), wanted[number:])
    assert loader.epoch == 2


def batches_of_epoch(loader: tk.Loader, epoch: int) -> list[dict[str, Any]]:
    loader.load_state_dict({**loader.state_dict(), "epoch": epoch})
    return batches(loader)


def test_the_buffer_mixes_within_its_reach() -> None:
    stream = Stream(Counting(size=500), length=500, buffer=20)
    order = [int(sample["input"][0]) for sample in stream.samples(ChanceKey(1), shuffle=True)]
    assert sorted(order) == list(range(500))
    assert all(number <= place + 20 for place, number in enumerate(order))  # nothing comes before it was read
    assert np.abs(np.diff(order)).mean() > 5
    later = [int(sample["input"][0]) for sample in stream.samples(ChanceKey(1, 1), shuffle=True)]
    assert later[:50] != order[:50]
    assert later[-20:] != order[-20:]
    plain = Stream(Counting(size=500), length=500, buffer=1)
    assert [int(s["input"][0]) for s in plain.samples(ChanceKey(1), shuffle=True)] == list(range(500))


@pytest.mark.parametrize("length", [10, SIZE])
def test_an_epoch_has_its_length_and_a_short_stream_is_said(length: int) -> None:
    assert len(numbers(batches(tk.Loader(Stream(Counting(), length=length), 4)))) == length
    loader = tk.Loader(Stream(Counting(), length=SIZE + 1), 4)
    with pytest.raises(DataError, match="ended before its epoch") as caught:
        batches(loader)
    assert (caught.value.got, caught.value.expected) == (f"{SIZE} samples", f"{SIZE + 1}")
    assert f"length={SIZE}" in caught.value.fix


@pytest.mark.parametrize("last", ["keep", "drop"])
@pytest.mark.parametrize("size", [24, 30, 25])
def test_ranks_together_give_the_global_batches(last: Any, size: int) -> None:
    """30 = 3 · 8 + 6: each of two ranks has a share of the last batch; of the last 1 of 25 the second has none."""

    def of_rank(rank: int, world_size: int, batch_size: int) -> list[dict[str, Any]]:
        stream = Stream(Counting("torch", size=size), length=size, buffer=7)
        return batches(tk.Loader(stream, batch_size, shuffle=True, last=last, rank=rank, world_size=world_size))

    alone = of_rank(0, 1, 8)
    ranks = [of_rank(rank, 2, 4) for rank in range(2)]
    for wanted, *parts in zip(alone, *ranks, strict=True):
        for name in wanted:
            assert torch.equal(torch.cat([part[name] for part in parts]), wanted[name])


def test_collate_gets_the_samples_and_is_keyed() -> None:
    def collate(samples: list[Any]) -> dict[str, Any]:
        assert isinstance(samples[0], dict)
        return {"input": torch.stack([sample["input"] for sample in samples]), "noise": torch.rand(len(samples))}

    def fresh() -> tk.Loader:
        return tk.Loader(Stream(Sized()), 5, collate=collate)

    before = generator_states()
    first = batches(fresh())
    assert same_states(generator_states(), before)
    assert list(first[0]) == ["input", "noise", "index"]
    torch.manual_seed(3)
    assert same(batches(fresh()), first)
    assert first[0]["noise"][0] != first[1]["noise"][0]


class Of:
    """Samples as they are given, one after another, without a base class."""

    def __init__(self, samples: list[Any]):
        self.samples = samples

    def __iter__(self) -> Iterator[Any]:
        return iter(self.samples)

    def __len__(self) -> int:
        return len(self.samples)


@pytest.mark.parametrize(("sample", "names", "keys"), [
    ((torch.zeros(2), 1), None, ["input", "target"]), (torch.zeros(2), None, ["input"]),
    ({"image": torch.zeros(2), "label": 1}, None, ["image", "label"]),
    ((1.0, 2.0, 3), ("left", "right", "label"), ["left", "right", "label"]),
])  # fmt: skip
def test_samples_get_names(sample: Any, names: Any, keys: list[str]) -> None:
    stream = as_dataset(Of([sample] * 4), names)
    assert isinstance(stream, Stream)
    assert list(stream.schema) == keys
    assert list(batches(tk.Loader(stream, 2))[0]) == [*keys, "index"]
    assert stream.fingerprint() == as_dataset(Of([sample] * 4), names).fingerprint()
    assert stream.fingerprint() != as_dataset(Of([sample] * 5), names).fingerprint()


class Failing(Counting):
    """Fails where it is told to."""

    def __init__(self, place: str):
        super().__init__()
        self.place = place

    def __len__(self) -> int:
        return SIZE

    def set_epoch(self, epoch: int) -> None:
        if self.place == "set_epoch" and epoch:
            raise RuntimeError("no such epoch")
        self.epoch = epoch

    def __iter__(self) -> Any:
        if self.place == "iter" and self.epoch:
            raise RuntimeError("no iteration")
        return super().__iter__() if self.place == "iter" else self.some()

    def some(self) -> Iterator[Any]:
        for number, sample in enumerate(super().__iter__()):
            if self.place == "next" and number == 6 and self.epoch:
                raise RuntimeError("no sample")
            yield sample


@pytest.mark.parametrize(("place", "number"), [("set_epoch", 0), ("iter", 0), ("next", 6)])
def test_an_error_of_the_stream_names_its_place(place: str, number: int) -> None:
    loader = tk.Loader(Failing(place), 4)
    batches(loader)
    before = generator_states()
    with pytest.raises(BadSampleError, match="next sample") as caught:
        batches(loader)
    assert same_states(generator_states(), before)
    assert caught.value.where == f"sample {number} of Failing, epoch 2"
    assert "RuntimeError: no " in caught.value.got
    assert isinstance(caught.value.__cause__, RuntimeError)


NOT_STREAMS: dict[str, Any] = {
    "no length": lambda: as_dataset(Counting()),
    "empty": lambda: Stream(Counting(size=0), length=3),
    "three parts": lambda: Stream(Of([(1, 2, 3)])),
    "a generator": lambda: Stream((number for number in range(9)), length=9),
    "an iterator": lambda: Stream(iter([1, 2]), length=2),
    "a map": lambda: Stream(map(float, range(9)), length=9),
}


@pytest.mark.parametrize("case", NOT_STREAMS)
def test_what_is_no_stream_is_said(case: str) -> None:
    with pytest.raises(DataError) as caught:
        NOT_STREAMS[case]()
    assert caught.value.where
    if case == "no length":
        assert "tk.Stream(dataset, length=" in caught.value.fix


def test_what_a_stream_cannot_do_is_said() -> None:
    stream = Stream(Sized())
    with pytest.raises(DataError, match="no sample by number"):
        stream[0]
    with pytest.raises(SettingsError):
        tk.Loader(stream, 4, last="pad")
    assert tk.Loader(stream, 4, workers=2).plan.backend == "inline"


# --- a training


class Points(IterableDataset[Any]):
    """Separable points, with noise of torch's global generator."""

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        made = torch.Generator().manual_seed(1)
        for _ in range(45):
            point = torch.randn(6, generator=made)
            yield point + 0.01 * torch.randn(6), int(point[:3].sum() > point[3:].sum())


def fit(folder: Path, stop_at: int | None = None) -> tuple[tk.Run, int]:
    """The run, and how many batches were trained on: two epochs of three."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 2))
    calls = 0

    def watch(module: nn.Module, *_: Any) -> None:
        nonlocal calls
        calls += module.training
        if module.training and calls == stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    model.register_forward_pre_hook(watch)
    train, valid = (Stream(Points(), length=length, buffer=8) for length in (45, 20))
    run = tk.fit(model, train, valid, epochs=2, batch_size=15, run_dir=folder, resume="auto", quiet=True,
                 settings={"train": {"threads": 1}}, checkpoint={"every": 4}, metrics=["accuracy"],
                 monitor={"views": [], "log_every": 2}, preflight="off")  # fmt: skip
    return run, calls


def test_a_training_on_a_stream_that_was_interrupted_ends_the_same(tmp_path: Path) -> None:
    torch.manual_seed(5)
    run, calls = fit(tmp_path / "whole")
    assert calls == 6
    for number in (1, 2, 4, 5):
        folder = tmp_path / f"stopped-{number}"
        with pytest.raises(tk.Interrupted, match="the state is saved"):
            fit(folder, number)
        resumed, rest = fit(folder)
        assert number + rest == 6
        assert resumed.sha256() == run.sha256()
        assert resumed.metrics == run.metrics
