"""The loader's own promises: orders, epochs, states, weights, samplers, padding, and what it says when it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, RandomSampler, SequentialSampler, TensorDataset, WeightedRandomSampler

import torchkeep as tk
from torchkeep.chance import ChanceKey, epoch_order, keyed_bits, keyed_seed, keyed_uniform, weighted_positions
from torchkeep.data import order as order_module
from torchkeep.errors import BadSampleError, CheckpointError, DataError, SettingsError

# --- chance


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 1000), data=st.data())
@settings(max_examples=60, deadline=None)
def test_an_epochs_order_is_a_permutation_found_from_any_place(
    size: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    key = ChanceKey(seed, epoch)
    whole = epoch_order(key, size, 0, size)
    assert np.array_equal(np.sort(whole), np.arange(size))
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    assert np.array_equal(epoch_order(key, size, start, stop), whole[start:stop])


def test_every_small_size_is_permuted_and_every_place_is_reached() -> None:
    for size in range(1, 130):
        assert sorted(epoch_order(ChanceKey(1, size), size, 0, size)) == list(range(size))
    first = Counter(int(epoch_order(ChanceKey(0, epoch), 10, 0, 1)[0]) for epoch in range(2000))
    assert chi_square(first, 10) < 21.7  # 99 % of 9 degrees of freedom
    pairs = Counter(tuple(epoch_order(ChanceKey(0, epoch), 4, 0, 4).tolist()) for epoch in range(4800))
    assert len(pairs) == 24
    assert chi_square(pairs, 24) < 41.6  # 99 % of 23


def chi_square(counts: Counter[Any], cells: int) -> float:
    expected = counts.total() / cells
    return sum((counted - expected) ** 2 / expected for counted in counts.values()) + expected * (cells - len(counts))


def test_draws_are_uniform_and_know_only_their_own_key() -> None:
    key, ids = ChanceKey(7, 3), np.arange(20_000)
    draws = keyed_uniform(key, "flip", ids, 3)
    for column in draws.T:
        assert chi_square(Counter((column * 50).astype(int).tolist()), 50) < 74.9  # 99 % of 49
    assert abs(np.corrcoef(draws.T) - np.eye(3)).max() < 0.03
    some = np.array([17, 4, 19_000])
    assert np.array_equal(keyed_uniform(key, "flip", some, 3), draws[some])
    bits = keyed_bits(key, "flip", ids)
    assert abs(((bits[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)).mean(0) - 0.5).max() < 0.02


def test_each_part_of_a_key_changes_the_draw() -> None:
    keys = [(ChanceKey(s, e), op, i) for s in range(3) for e in range(3) for op in ("a", "b") for i in range(3)]
    assert len({keyed_seed(*key) for key in keys}) == len(keys)
    assert len({keyed_bits(k, op, np.array([i])).item() for k, op, i in keys}) == len(keys)
    orders = [tuple(epoch_order(ChanceKey(s, e), 100, 0, 100)) for s in range(4) for e in range(4)]
    assert len(set(orders)) == 16
    assert keyed_seed(ChanceKey(-1, 0), "a") == keyed_seed(ChanceKey(2**64 - 1, 0), "a") < 2**63


# --- epochs and states


def numbers(size: int, batch_size: int = 4, **settings: Any) -> tk.Loader:
    return tk.Loader(tk.Arrays(input=torch.arange(float(size))), batch_size, **settings)


def indices(loader: Any) -> list[list[int]]:
    return [batch["index"].tolist() for batch in loader]


def flat(loader: Any) -> list[int]:
    return [i for batch in indices(loader) for i in batch]


def test_breaking_out_early_begins_a_new_epoch() -> None:
    wanted = numbers(10, shuffle=True)
    epochs = [flat(wanted) for _ in range(3)]
    loader = numbers(10, shuffle=True)
    for batch in loader:
        assert batch["index"].tolist() == epochs[0][:4]
        break
    at = {"epoch": 0, "delivered": 1, "global_batch": 4, "num_samples": 10, "order": "shuffled"}
    assert loader.state_dict() == at
    assert flat(loader) == epochs[1]
    assert flat(loader) == epochs[2]
    assert loader.epoch == 3


def test_two_iterations_at_once_are_two_epochs() -> None:
    wanted = numbers(10, shuffle=True)
    epochs = [flat(wanted) for _ in range(5)]
    pairs = numbers(10, shuffle=True)
    both = [(a["index"].tolist(), b["index"].tolist()) for a, b in zip(pairs, pairs, strict=True)]
    assert [i for a, _ in both for i in a] == epochs[0]
    assert [i for _, b in both for i in b] == epochs[1]
    assert flat(pairs) == epochs[2]
    nested = numbers(10, shuffle=True)
    seen = [(batch["index"].tolist(), flat(nested)) for batch in nested]
    assert [i for outer, _ in seen for i in outer] == epochs[0]
    assert [inner for _, inner in seen] == epochs[1:4]
    assert flat(nested) == epochs[4]


def test_a_state_is_that_of_the_iteration_that_began_last() -> None:
    loader = numbers(12, shuffle=True)
    outer = iter(loader)
    next(outer)
    inner = iter(loader)
    next(inner), next(inner)
    next(outer)
    state = loader.state_dict()
    assert (state["epoch"], state["delivered"]) == (1, 2)
    resumed = numbers(12, shuffle=True)
    resumed.load_state_dict(state)
    assert indices(resumed) == indices(inner)


def test_a_state_is_not_loaded_into_an_epoch_under_way() -> None:
    loader = numbers(10)
    state = loader.state_dict()
    begun = iter(loader)
    with pytest.raises(CheckpointError, match="before its iteration begins"):
        loader.load_state_dict(state)
    next(begun)
    with pytest.raises(CheckpointError, match="before its iteration begins"):
        loader.load_state_dict(state)
    del begun
    loader.load_state_dict(state)
    finished = iter(loader)
    assert flat(finished) == list(range(10))
    loader.load_state_dict(state)  # the iterator still has a name, and has ended
    assert flat(loader) == list(range(10))


@pytest.mark.parametrize("other", [numbers(10, 5), numbers(11, 4), numbers(10, 4, world_size=2)])
def test_a_state_of_other_batches_is_refused(other: tk.Loader) -> None:
    with pytest.raises(CheckpointError, match="not those of the saved state"):
        other.load_state_dict(numbers(10, 4).state_dict())


class Huge(Dataset[Any]):
    """Ten million samples that are made when they are asked for."""

    def __len__(self) -> int:
        return 10_000_000

    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize("weighted", [False, True])
def test_seeking_costs_no_more_than_beginning(weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up: list[int] = []

    def counting(find: Any) -> Any:
        def found(*arguments: Any) -> Any:
            looked_up.append(arguments[-1] - arguments[-2])
            return find(*arguments)

        return found

    monkeypatch.setattr(order_module, "epoch_order", counting(epoch_order))
    monkeypatch.setattr(order_module, "weighted_positions", counting(weighted_positions))
    chosen = {"weights": np.ones(10_000_000)} if weighted else {"shuffle": True}
    loader = tk.Loader(Huge(), 32, workers=0, **chosen)
    loader.load_state_dict({**loader.state_dict(), "epoch": 4, "delivered": 300_000})
    for number, batch in enumerate(loader, 300_000):
        start = 32 * number
        if not weighted:
            assert batch["index"].tolist() == epoch_order(ChanceKey(0, 4), 10_000_000, start, start + 32).tolist()
        if number == 300_002:
            break
    assert sum(looked_up) <= 1 << 16
    assert loader.state_dict()["delivered"] == 300_003


# --- the last batch, weights, samplers


def test_keep_drop_and_pad() -> None:
    assert [len(batch) for batch in indices(numbers(10))] == [4, 4, 2]
    assert [len(batch) for batch in indices(numbers(10, last="drop"))] == [4, 4]
    assert len(numbers(3, last="drop")) == 0
    assert indices(numbers(3, last="drop")) == []
    *whole, padded = list(numbers(10, last="pad"))
    assert all("valid" not in batch for batch in whole)
    assert padded["valid"].tolist() == [True, True, False, False]
    assert padded["input"].tolist() == [8.0, 9.0, 8.0, 8.0]
    assert all("valid" not in batch for batch in numbers(8, last="pad"))


def test_weights_are_shares_of_keyed_draws() -> None:
    weights = [0.0, 1.0, 2.0, 5.0, 0.0]
    data = tk.Arrays(input=torch.arange(5.0))

    def epochs(seed: int = 0, count: int = 400) -> list[list[int]]:
        loader = tk.Loader(data, 3, weights=weights, seed=seed)
        return [flat(loader) for _ in range(count)]

    drawn = epochs()
    counts = Counter(i for epoch in drawn for i in epoch)
    assert set(counts) == {1, 2, 3}
    assert [counts[i] / 2000 for i in (1, 2, 3)] == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.03)
    assert epochs(count=3) == drawn[:3]
    assert epochs(seed=1, count=3) != drawn[:3]
    assert drawn[0] != drawn[1]


def test_torchs_samplers_are_keyed_by_the_epoch() -> None:
    data = tk.Arrays(input=torch.arange(30.0))
    for make in (lambda: RandomSampler(range(30)), lambda: WeightedRandomSampler([1.0] * 30, 30)):
        before = torch.get_rng_state()
        loader = tk.Loader(data, 4, sampler=make())
        first, second = flat(loader), flat(loader)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(5)
        again = tk.Loader(data, 4, sampler=make())
        again.load_state_dict({**again.state_dict(), "delivered": 3})
        assert flat(again) == first[12:]
        assert flat(again) == second != first
    assert flat(tk.Loader(data, 4, sampler=SequentialSampler(range(30)))) == list(range(30))


def test_a_sampler_with_a_generator_of_its_own_is_keyed_too() -> None:
    def fresh(seed: int) -> tk.Loader:
        own = torch.Generator().manual_seed(seed)
        return tk.Loader(tk.Arrays(input=torch.arange(30.0)), 4, sampler=RandomSampler(range(30), generator=own))

    loader = fresh(1)
    first, second = flat(loader), flat(loader)
    resumed = fresh(1)
    resumed.load_state_dict({**resumed.state_dict(), "epoch": 1, "delivered": 2})
    assert flat(resumed) == second[8:]
    assert flat(fresh(2)) != first != second


def test_an_own_sampler_is_told_the_epoch() -> None:
    class Turning:
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __len__(self) -> int:
            return 4

        def __iter__(self) -> Any:
            return iter([(i + self.epoch) % 4 for i in range(4)])

    loader = numbers(10, 2, sampler=Turning())
    assert [flat(loader) for _ in range(2)] == [[0, 1, 2, 3], [1, 2, 3, 0]]
    assert len(loader) == 2


def test_peeking_counts_nothing() -> None:
    loader = numbers(10, shuffle=True)
    peeked = loader.peek()["index"].tolist()
    assert indices(loader)[0] == peeked
    assert loader.peek()["index"].tolist() != peeked


# --- what samples become


def test_samples_get_names_and_become_tensors() -> None:
    rows = [{"x": np.float64(i), "n": i, "flag": i > 1, "name": f"s{i}", "pair": (i, i + 1)} for i in range(4)]
    batch = next(iter(tk.Loader(rows, 4)))
    assert batch["x"].dtype == torch.float64
    assert batch["n"].dtype == torch.int64
    assert batch["flag"].dtype == torch.bool
    assert batch["name"] == ["s0", "s1", "s2", "s3"]
    assert batch["pair"].tolist() == [[0, 1], [1, 2], [2, 3], [3, 4]]
    triples = tk.Foreign([(1.0, 2, 3)] * 4, names=("left", "right", "label"))
    assert list(next(iter(tk.Loader(triples, 4)))) == ["left", "right", "label", "index"]
    with pytest.raises(DataError, match="need names"):
        tk.Loader([(1.0, 2, 3)] * 4, 2)
    assert list(next(iter(tk.Loader(TensorDataset(torch.zeros(4, 2)), 4)))) == ["input", "index"]


def test_what_is_no_batch_is_said() -> None:
    ragged = [(torch.zeros(n), 0) for n in (1, 2, 3)]
    with pytest.raises(DataError, match="cannot be stacked") as caught:
        list(tk.Loader(ragged, 3))
    assert "key 'input'" in caught.value.where
    assert "(1,) and (2,)" in caught.value.got
    with pytest.raises(DataError, match="no batch"):
        list(tk.Loader(ragged, 3, collate=lambda samples: "nothing"))
    padded = tk.Loader(ragged, 3, collate=lambda rows: (torch.nn.utils.rnn.pad_sequence([r[0] for r in rows]), rows[0]))
    assert next(iter(padded))["input"].shape == (3, 3)
    for nothing in ([], 5, iter([1, 2])):
        with pytest.raises(DataError):
            tk.Loader(nothing, 2)


class Broken(Dataset[Any]):
    """Fails at one sample, deep in a library."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        return torch.nn.functional.one_hot(torch.tensor(3 if index == 4 else 0), 3)  # the user's line


def test_an_error_in_a_dataset_names_the_sample_and_the_users_line() -> None:
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    line = next(number for number, text in enumerate(lines, 1) if text.endswith("# the user's line"))
    with pytest.raises(BadSampleError) as caught:
        list(tk.Loader(Broken(), 2))
    assert "sample 4 of Broken" in caught.value.where
    assert f"{Path(__file__).name}, line {line}" in caught.value.where
    assert "RuntimeError" in caught.value.got
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize(
    "bad",
    [
        {"batch_size": 0},
        {"last": "half"},
        {"backend": "fork"},
        {"workers": -1},
        {"rank": 2, "world_size": 2},
        {"shuffle": True, "weights": [1.0] * 10},
        {"weights": [1.0] * 9},
        {"weights": [0.0] * 10},
        {"weights": [1.0] * 9 + [float("nan")]},
        {"weights": [1.0] * 9 + [-1.0]},
    ],
)
def test_a_setting_that_cannot_be_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="cannot be used"):
        numbers(10, **bad)


def test_a_batch_sampler_is_no_sampler() -> None:
    batch_sampler = torch.utils.data.BatchSampler(SequentialSampler(range(10)), 2, False)
    with pytest.raises(SettingsError, match="gives no positions"):
        list(numbers(10, 2, sampler=batch_sampler))


ORPHANS = """
import time, torch, torchkeep as tk
from samples import Noisy
if __name__ == "__main__":
    loader = tk.Loader(Noisy(size=10_000), 2, workers=2, backend="processes")
    for number, batch in enumerate(loader):
        if number == 1:
            print(*loader.worker_pids, flush=True)
            time.sleep(60)
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at processes in /proc")
def test_workers_end_with_a_trainer_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / "orphans.py").write_text(ORPHANS)
    laws = str(Path(__file__).parents[1] / "laws")
    paths = os.pathsep.join([laws, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(tmp_path / "orphans.py")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths}
    ) as trainer:
        assert trainer.stdout is not None
        workers = [int(word) for word in trainer.stdout.readline().split()]
        trainer.kill()
    assert len(workers) == 2
    for _ in range(300):
        alive = [worker for worker in workers if Path(f"/proc/{worker}").exists()]
        if not alive:
            break
        time.sleep(0.1)
    assert alive == []
