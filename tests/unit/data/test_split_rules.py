"""Every rule of a split: disjoint parts that are the whole, keyed, and nothing learned from what is set apart."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from torchkeep.chance import ChanceKey
from torchkeep.data.dataset import Part, whole
from torchkeep.data.foreign import as_dataset
from torchkeep.data.index import Layout, list_folder
from torchkeep.data.splits import split, split_groups, split_time
from torchkeep.data.tables import Table
from torchkeep.data.text import TextTable
from torchkeep.errors import DataError, SettingsError

RULES = ["label", "random", "group:group", "time:time"]


@st.composite
def tables(draw: Any) -> tuple[Table, dict[str, np.ndarray]]:
    size = draw(st.integers(20, 120))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    columns = {
        "x": rng.normal(size=size),
        "label": np.array(["a", "b"])[np.arange(size) % 2],
        "group": rng.choice([f"g{i}" for i in range(draw(st.integers(4, 12)))], size),
        "time": rng.integers(0, 1000, size).astype("datetime64[s]"),
    }
    return Table(pa.table(columns), "label", drop=["group", "time"]), columns


@given(tables(), st.sampled_from(RULES), st.integers(0, 50), st.sampled_from([0.1, 0.25, 0.5]), st.booleans())
@settings(deadline=None, max_examples=60)
def test_parts_are_disjoint_and_the_whole(
    made: tuple[Table, dict[str, np.ndarray]], by: str, seed: int, fraction: float, tested: bool
) -> None:
    data, columns = made
    assume(by != "group:group" or len(np.unique(columns["group"])) > 2)
    parts = split(data, fraction, seed, by, 0.2 if tested else None)
    assert len(parts) == 2 + tested
    places = [part.indices for part in parts if isinstance(part, Part)]
    assert sorted(np.concatenate(places).tolist()) == list(range(len(data)))
    assert all(len(part) for part in places)
    again = split(data, fraction, seed, by, 0.2 if tested else None)
    assert [part.fingerprint() for part in again] == [part.fingerprint() for part in parts]
    if by == "group:group":
        groups = [set(columns["group"][part].tolist()) for part in places]
        assert sum(map(len, groups)) == len(set.union(*groups))
    elif by == "time:time":
        ends = [(columns["time"][part].min(), columns["time"][part].max()) for part in places]
        assert all(before[1] < after[0] for before, after in itertools.pairwise(ends))
    else:
        rest = len(data) - (len(places[2]) if tested else 0)
        assert abs(len(places[1]) - fraction * rest) <= 4
        if tested:
            assert abs(len(places[2]) - 0.2 * len(data)) <= 4
    if by == "label":
        assert set(columns["label"][places[0]]) == set(columns["label"])


@pytest.mark.parametrize("by", ["label", "random", "group:group"])
def test_another_seed_is_another_split(by: str) -> None:
    frame = pa.table({"x": np.arange(90.0), "label": ["a", "b", "c"] * 30, "group": [f"{i // 3}" for i in range(90)]})
    parts = [split(Table(frame, "label", drop=["group"]), 0.3, seed, by)[1] for seed in (0, 1, 2)]
    assert len({part.fingerprint() for part in parts}) == 3


def test_the_test_part_does_not_depend_on_the_fraction_of_validation() -> None:
    frame = pa.table({"x": np.arange(200.0), "label": ["a", "b"] * 100})
    tests = [split(Table(frame, "label"), fraction, 3, "label", 0.1)[2] for fraction in (0.1, 0.4)]
    assert isinstance(tests[0], Part)
    assert isinstance(tests[1], Part)
    assert tests[0].indices.tolist() == tests[1].indices.tolist()
    assert len(tests[0]) == 20


@pytest.mark.parametrize("by", RULES)
def test_nothing_is_learned_from_what_is_set_apart(by: str) -> None:
    """Values of validation and test are made absurd: what was learned stays what it was."""
    rng = np.random.default_rng(0)
    size = 80
    columns = {
        "x": rng.normal(size=size), "word": rng.choice(["p", "q"], size), "label": rng.choice(["a", "b"], size),
        "group": rng.choice([f"g{i}" for i in range(9)], size), "time": np.arange(size),
    }  # fmt: skip

    def learned(columns: dict[str, np.ndarray]) -> tuple[Any, list[np.ndarray]]:
        parts = split(Table(pa.table(columns), "label", drop=["group", "time"]), 0.2, 0, by, 0.2)
        assert all(whole(part) is whole(parts[0]) for part in parts)
        return whole(parts[0]).encoding, [part.indices for part in parts if isinstance(part, Part)]

    encoding, (train, *others) = learned(columns)
    assert encoding.features[0].mean == pytest.approx(columns["x"][train].mean())
    apart = np.concatenate(others)
    absurd = {name: values.copy() for name, values in columns.items()}
    absurd["x"][apart] = 1e6
    absurd["word"] = absurd["word"].astype(object)
    absurd["word"][apart] = "never seen"
    again, places = learned(absurd)
    assert places[0].tolist() == train.tolist()
    assert again == encoding
    absurd["x"][train[0]] += 1
    assert learned(absurd)[0] != encoding


def test_a_vocabulary_is_that_of_the_training_texts() -> None:
    texts = [f"common word{i} word{i}" for i in range(50)]
    data = TextTable(pa.table({"text": texts, "label": ["a", "b"] * 25}), tokenizer="words")
    train, valid, test = split(data, 0.2, 0, "label", 0.2)
    assert isinstance(train, Part)
    assert set(whole(train).tokenizer.words) == {"common", *(f"word{i}" for i in train.indices)}
    for part in (valid, test):
        assert part.schema == train.schema
        assert part.read(0, ChanceKey())["input_ids"].tolist()[1:3] == [1, 1]  # unknown


@pytest.mark.parametrize(("values", "valid"), [
    (["9", "10", "8", "7"], [1]), (["2026-01-10", "2026-01-09", "2025-12-31", "2026-01-01"], [0]),
])  # fmt: skip
def test_times_found_in_names_are_read_as_numbers_or_dates(tmp_path: Path, values: list[str], valid: list[int]) -> None:
    assert split_time(np.array(values), 0.25)[1].tolist() == valid
    for value in values:
        (tmp_path / f"a_{value}.txt").write_bytes(b"1")
    listing = list_folder(tmp_path, Layout((".txt",), "texts", True, "(?P<label>a)_(?P<time>.+)[.]txt"))
    assert listing.column("time")[split_time(listing.column("time"), 0.25)[1]].tolist() == [values[valid[0]]]


@pytest.mark.parametrize("times", [
    np.array([1.0, np.nan, 2.0]), np.array(["2026-01-01", "NaT"], "datetime64[D]"), np.array(["a", "b"], object),
    np.array(["soon", "later"]),
])  # fmt: skip
def test_a_time_that_is_none_is_said(times: np.ndarray) -> None:
    with pytest.raises(DataError, match="split by time"):
        split_time(times, 0.5)


@pytest.mark.parametrize("times", [np.array([5, 5, 5]), np.array([1])])
def test_times_that_leave_nothing_to_train_on_are_said(times: np.ndarray) -> None:
    with pytest.raises(DataError, match="empty"):
        split_time(times, 0.3)


@given(st.lists(st.integers(0, 8), min_size=2, max_size=80), st.floats(0.05, 0.95), st.integers(0, 9))
@settings(deadline=None)
def test_as_many_groups_as_come_nearest_to_the_fraction(groups: list[int], fraction: float, seed: int) -> None:
    held = np.array(groups)
    assume(len(set(groups)) > 1)
    kept, taken = split_groups(held, fraction, seed, "split")
    assert not set(held[kept]) & set(held[taken])
    assert len(kept)
    assert len(taken)
    largest = np.bincount(held).max()
    assert abs(len(taken) - fraction * len(held)) <= largest
    # a group's draw is that of its name: the order of the samples is nothing to it
    other = split_groups(held[::-1], fraction, seed, "split")[1]
    assert set(held[::-1][other]) == set(held[taken])


@pytest.mark.parametrize("by", ["labels", "group", "group:", "label:x", "time:", ""])
def test_a_rule_that_is_none_is_said(by: str) -> None:
    data = Table(pa.table({"x": np.arange(9.0), "label": ["a", "b", "c"] * 3}), "label")
    with pytest.raises(SettingsError, match="no such rule"):
        split(data, 0.3, 0, by)


def test_a_column_that_is_missing_is_said_with_those_there_are() -> None:
    data = Table(pa.table({"x": np.arange(9.0), "patient": ["a", "b", "c"] * 3, "label": ["a", "b", "c"] * 3}), "label")
    with pytest.raises(DataError, match="no column 'patint'") as caught:
        split(data, 0.3, 0, "group:patint")
    assert "patient" in caught.value.fix
    foreign = as_dataset([(np.zeros(2), 0)] * 9)
    with pytest.raises(DataError, match="no columns"):
        split(foreign, 0.3, 0, "group:patient")


def test_a_class_keeps_a_training_sample_by_label_and_is_an_error_otherwise() -> None:
    frame = pa.table({"x": np.arange(40.0), "time": np.arange(40), "label": ["a", "b"] * 19 + ["a", "rare"]})
    data = Table(frame, "label", drop=["time"])
    for seed in range(5):
        train = split(data, 0.5, seed)[0]
        assert isinstance(train, Part)
        assert 39 in train.indices
    with pytest.raises(DataError, match="not among those of the training data") as caught:
        split(data, 0.2, 0, "time:time")
    assert "'rare'" in caught.value.got
