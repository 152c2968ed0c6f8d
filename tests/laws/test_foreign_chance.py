"""Law 1 for code that never heard of it: datasets and collates that draw from torch's, NumPy's, Python's generators."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from samples import SIZE, Noisy, OwnGenerator, SeldomNoisy, drop_some, generators, same

import torchkeep as tk
from torchkeep.data.foreign import Foreign
from torchkeep.data.splits import split

SOURCES = ["torch", "numpy", "python"]


def epoch(loader: tk.Loader) -> list[dict[str, Any]]:
    return list(loader)


def all_same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    return len(one) == len(other) and all(map(same, one, other))


def by_sample(batches: list[dict[str, Any]]) -> dict[int, Any]:
    return {int(i): row for batch in batches for i, row in zip(batch["index"], batch["input"], strict=True)}


@contextmanager
def untouched() -> Iterator[None]:
    before = generators()
    yield
    assert generators() == before


@pytest.mark.parametrize("source", SOURCES)
def test_draws_are_a_function_of_seed_epoch_and_sample(source: str) -> None:
    loader = tk.Loader(Noisy((source,)), 4, shuffle=True, seed=3)
    assert loader.dataset.probe.draws
    with untouched():
        first, second = by_sample(epoch(loader)), by_sample(epoch(loader))
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    again = tk.Loader(Noisy((source,)), 7, shuffle=True, seed=3)  # other batches, another state outside
    assert all(torch.equal(row, first[i]) for i, row in by_sample(epoch(again)).items())
    other = by_sample(epoch(tk.Loader(Noisy((source,)), 4, shuffle=True, seed=4)))
    assert all(first[i][1] != second[i][1] != other[i][1] != first[i][1] for i in range(SIZE))
    assert len({float(row[1]) for row in first.values()}) == SIZE


def test_processes_give_the_same_batches_and_go_on_within_an_epoch() -> None:
    here = tk.Loader(Noisy(), 4, shuffle=True, workers=0)
    with untouched(), closing(tk.Loader(Noisy(), 4, shuffle=True, workers=2)) as there:
        assert there.plan.backend == "processes"
        assert "global generators" in there.plan.reason
        assert all_same(epoch(there), epoch(here))
        begun = iter(there)
        assert len([next(begun) for _ in range(3)]) == 3
        state = there.state_dict()
        del begun
        wanted = epoch(here)
        there.load_state_dict(state)
        assert all_same(epoch(there), wanted[3:])
        resumed = tk.Loader(Noisy(), 4, shuffle=True, workers=0)
        resumed.load_state_dict(state)
        assert all_same(epoch(resumed), wanted[3:])
        assert all_same(epoch(resumed), epoch(here))


def test_a_draw_that_the_probe_did_not_meet_is_caught() -> None:
    def fresh(size: int = 4, **settings: Any) -> tk.Loader:
        return tk.Loader(SeldomNoisy(), size, shuffle=True, **settings)

    assert not fresh().dataset.probe.draws
    with untouched():
        wanted = by_sample(epoch(fresh()))
        for other in (epoch(fresh(5)), epoch(fresh(1))):
            assert all(torch.equal(row, wanted[i]) for i, row in by_sample(other).items())
        with closing(fresh(workers=1, backend="processes")) as there:
            assert there.plan.backend == "processes"
            assert all_same(epoch(there), epoch(fresh()))


def test_a_collate_that_draws_is_keyed_by_its_batch() -> None:
    def fresh(**settings: Any) -> tk.Loader:
        return tk.Loader(Noisy(), 4, shuffle=True, collate=drop_some, **settings)

    with untouched():
        here = fresh(workers=0)
        wanted = epoch(here)
        assert isinstance(wanted[0]["target"], torch.Tensor)
        assert not torch.equal(wanted[0]["input"] == 0, epoch(here)[0]["input"] == 0)
        with closing(fresh(workers=1)) as there:
            assert there.plan.backend == "processes"
            assert all_same(epoch(there), wanted)
        seek = fresh()
        seek.load_state_dict({**here.state_dict(), "epoch": 0, "delivered": 3})
        assert all_same(epoch(seek), wanted[3:])


def test_threads_are_never_given_foreign_code() -> None:
    """Who drew, the trainer or a thread of the loader, could not be told."""
    for data in (Noisy(), Noisy(())):
        loader = tk.Loader(data, 4, workers=2, backend="threads")
        assert loader.plan.backend == "processes"
        assert "share the trainer's random generators" in loader.plan.reason


def test_a_part_of_a_foreign_dataset_keeps_each_samples_chance() -> None:
    whole = by_sample(epoch(tk.Loader(Noisy(), 4)))
    train, valid = split(Foreign(Noisy()), 0.3, 0)
    for part in (train, valid):
        loader = tk.Loader(part, 3)
        assert loader.plan.backend == "inline"
        with untouched():
            rows = by_sample(epoch(loader))
        assert all(torch.equal(row, whole[int(part.indices[i])]) for i, row in rows.items())
        assert tk.Loader(part, 3, workers=2, backend="threads").plan.backend == "processes"
    assert len(train) + len(valid) == SIZE


def test_a_generator_of_its_own_is_called_best_effort_and_can_still_go_on(tmp_path: Path) -> None:
    assert not Foreign(OwnGenerator()).probe.repeatable
    assert Foreign(Noisy()).probe.repeatable

    def fit(epochs: int) -> tk.Run:
        model = torch.nn.Linear(2, 3)
        return tk.fit(
            model, OwnGenerator(), epochs=epochs, batch_size=8, run_dir=tmp_path / "own", resume="auto", quiet=True
        )

    run = fit(1)
    rows = json.loads((run.dir / "run.json").read_text())["decisions"]
    assert next(row["value"] for row in rows if row["name"] == "resume") == "best-effort"
    assert Foreign(OwnGenerator()).fingerprint() == Foreign(OwnGenerator()).fingerprint()
    assert fit(1).dir == run.dir


def test_what_cannot_travel_is_read_here_and_says_so() -> None:
    class Local(Noisy):
        pass

    for data, collate in ((Local(), None), (Noisy(), lambda samples: torch.stack([s[0] for s in samples]))):
        loader = tk.Loader(data, 4, workers=2, collate=collate)
        assert loader.plan.backend == "inline"
        assert "cannot travel to a process" in loader.plan.reason
        with untouched():
            assert sum(len(batch["index"]) for batch in loader) == SIZE


SCRIPT = """
import random, torch, torchkeep as tk

class Noisy(torch.utils.data.Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, index):
        return torch.rand(2), random.random()

loader = tk.Loader(Noisy(), 4, workers=2)
print(loader.plan.backend, loader.plan.reason, sep="|")
print(len(list(loader)))
"""


def test_a_script_without_a_main_guard_reads_its_own_samples(tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text(textwrap.dedent(SCRIPT), encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=True)
    plan, batches = done.stdout.splitlines()
    assert plan.startswith("inline|unguarded.py has no 'if __name__")
    assert batches == "2"
    assert done.stderr == ""
