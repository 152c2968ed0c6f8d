"""Columns of a table: dates, gaps, numbers that are names, slips; and what is learned of which rows."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from torchkeep.data.dataset import whole
from torchkeep.data.frames import read_frame
from torchkeep.data.splits import split
from torchkeep.data.tables import Table, TableEncoding, encode_inputs
from torchkeep.errors import DataError

WAVES = ("year sin", "year cos", "week sin", "week cos", "day sin", "day cos")


def refused(frame: Any, *fragments: str, target: str = "y", **options: Any) -> None:
    with pytest.raises(DataError) as caught:
        Table(frame, target, **options)
    for fragment in fragments:
        assert fragment in caught.value.said()


def features(data: Table) -> dict[str, np.ndarray]:
    return dict(zip(data.encoding.numbers, data.columns["numbers"].T.numpy(), strict=True))


# --- dates


def test_a_date_is_its_days_and_its_place_in_year_and_week() -> None:
    days = [date(2024, 1, 1) + timedelta(int(number)) for number in (0, 7, 14, 366, 100)]
    data = Table(pa.table({"when": days, "y": list("ababa")}), "y")
    assert data.encoding.numbers == ("when", *(f"when: {wave}" for wave in WAVES[:4]))
    held = features(data)
    numbers = np.array([0, 7, 14, 366, 100])
    np.testing.assert_allclose(held["when"], (numbers - numbers.mean()) / numbers.std(), rtol=1e-4)
    for wave in ("week sin", "week cos"):
        np.testing.assert_allclose(held[f"when: {wave}"][:3], held[f"when: {wave}"][0], atol=1e-5)
    # 366 days later it is nearly the same time of the year, 100 days later it is not
    year = np.stack([held["when: year sin"], held["when: year cos"]])
    np.testing.assert_allclose(np.square(year).sum(0), 1, rtol=1e-5)
    turned = np.linalg.norm(year - year[:, :1], axis=0)
    assert turned[3] < 0.02 < 1 < turned[4]


def test_a_time_of_day_has_a_cycle_of_its_own() -> None:
    start = datetime(2024, 3, 1)
    times = [start + timedelta(hours=hours) for hours in (0, 6, 12, 24)]
    held = features(Table(pa.table({"when": times, "y": list("abab")}), "y"))
    np.testing.assert_allclose(held["when: day sin"], [0, 1, 0, 0], atol=1e-4)
    np.testing.assert_allclose(held["when: day cos"], [1, 0, -1, 1], atol=1e-4)
    zoned = pa.array([time.replace(tzinfo=UTC) for time in times], pa.timestamp("ms", "UTC"))
    other = features(Table(pa.table({"when": zoned, "y": list("abab")}), "y"))
    assert all(np.array_equal(held[name], other[name]) for name in held)


def test_dates_of_a_csv_with_gaps_are_encoded_for_new_rows_too(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("when,y\n2024-01-01,a\n,b\n2024-01-03,a\n2024-01-02,b\n")
    data = Table(tmp_path / "train.csv", "y")
    held = features(data)
    assert held["when: missing"].tolist() == [0, 1, 0, 0]
    assert [held[name][1] for name in held if name != "when: missing"] == [0] * 5
    (tmp_path / "new.csv").write_text("when\n2024-01-02\n")
    known = TableEncoding.from_json(data.encoding.to_json())
    inputs = encode_inputs(read_frame(tmp_path / "new.csv"), known, "new")
    assert torch.equal(inputs["numbers"][0], data.columns["numbers"][3])
    empty = encode_inputs(pa.table({"when": pa.nulls(2)}), known, "new")["numbers"]
    assert torch.equal(empty[0], data.columns["numbers"][1])
    (tmp_path / "slip.csv").write_text("when\n2.5.2024\n")
    with pytest.raises(DataError, match="column of dates holds something else") as caught:
        encode_inputs(read_frame(tmp_path / "slip.csv"), known, "slip.csv")
    assert "column 'when'" in caught.value.where


# --- gaps, names, slips


def test_gaps_are_told_where_the_learned_rows_have_some() -> None:
    frame = pa.table({"some": [1.0, None, 3.0, 4.0], "later": [1.0, 2.0, 3.0, None], "none": pa.nulls(4, pa.float64()),
                      "nan": [1.0, float("nan"), 1.0, 3.0], "y": list("abab")})  # fmt: skip
    train = Table(frame, "y", rows=[0, 1, 2])
    assert train.encoding.numbers == ("some", "some: missing", "later", "none", "nan", "nan: missing")
    held = features(Table(frame, "y", like=train))
    assert held["some: missing"].tolist() == [0, 1, 0, 0]
    assert held["nan: missing"].tolist() == [0, 1, 0, 0]
    assert held["some"][1] == held["later"][3] == held["nan"][1] == 0
    assert held["none"].tolist() == [0] * 4


def test_numbers_that_are_names_become_categories() -> None:
    frame = pa.table({"zip": [8001, 8002, 8001], "x": [1.0, 2.0, 3.0], "y": ["a", "b", "a"]})
    data = Table(frame, "y", categories=["zip"])
    assert data.encoding.numbers == ("x",)
    assert data.encoding.vocabularies == (("8001", "8002"),)
    as_floats = pa.table({"zip": [8002.0, 9999.0], "x": [1.0, 2.0], "y": ["a", "b"]})
    assert Table(as_floats, "y", like=data).columns["categories"].tolist() == [[2], [0]]
    refused(frame, "no column 'zpi'", "'zip'", categories=["zpi"])


def test_a_column_that_changes_its_type_names_the_row() -> None:
    values = [str(number) for number in range(100)]
    values[60] = "n/a"
    frame = pa.table({"x": values, "z": list(range(100)), "y": [number / 7 for number in range(100)]})
    refused(frame, "a column changes its type", "column 'x', row 60", "'n/a'", 'drop = ["x"]')
    assert Table(frame, "y", drop=["x"]).encoding.numbers == ("z",)
    assert Table(frame, "y", categories=["x"]).encoding.categories == ("x",)
    # a target that is all numbers but for one would else be a hundred classes
    refused(frame, "a column changes its type", "column 'x', row 60", target="x")


def test_a_column_that_changes_its_type_from_training_to_validation() -> None:
    train = Table(pa.table({"x": [1.0, 2.0], "y": ["a", "b"]}), "y")
    with pytest.raises(DataError, match="holds something else") as caught:
        Table(pa.table({"x": ["1", "two"], "y": ["a", "b"]}), "y", like=train)
    assert "column 'x'" in caught.value.where
    assert "two" in caught.value.got


@pytest.mark.parametrize(
    ("ids", "fragment"), [(["a", "b", "a"], "'a' more than once"), (["a", None, "b"], "an empty cell")]
)
def test_ids_name_one_sample_each(ids: list[str | None], fragment: str) -> None:
    frame = pa.table({"who": ids, "x": [1, 2, 3], "y": ["a", "b", "a"]})
    refused(frame, "an id does not name one sample", "column 'who'", fragment, id="who")
    named = pa.table({"who": ["k", "l", "m"], "x": [1, 2, 3], "y": ["a", "b", "a"]})
    data = Table(named, "y", id="who", rows=[2, 0])
    assert [data.id_of(i) for i in range(2)] == ["m", "k"]
    assert data.encoding.numbers == ("x",)
    assert Table(named, "y", drop=["who"]).id_of(1) == "row 1"


@pytest.mark.parametrize(
    ("target", "fragment"),
    [
        ([0.5, float("nan"), 1.5], "row 1"),
        ([0.5, 1.5, None], "row 2"),
        ([0.5, float("inf"), 1.5], "sample 1"),
        ([date(2024, 1, 1)] * 3, "this target cannot be used"),
        ([[1], [2], [3]], "this target cannot be used"),
    ],
)
def test_a_target_that_is_none(target: list[Any], fragment: str) -> None:
    refused(pa.table({"x": [1, 2, 3], "y": target}), fragment, "column 'y'")


def test_a_table_of_a_target_alone() -> None:
    refused(pa.table({"y": [1, 2]}), "no column beside its target")
    refused(pa.table({"x": [1, 2], "y": [1, 2]}), "no column beside its target", drop=["x"])


# --- what is learned of which rows


def test_all_that_is_learned_is_learned_of_the_training_rows_alone() -> None:
    rng = np.random.default_rng(0)
    frame = pa.table({"x": rng.normal(5, 3, 200), "when": [date(2024, 1, 1) + timedelta(int(i)) for i in range(200)],
                      "c": [f"c{i}" for i in range(200)], "y": rng.normal(100, 20, 200)})  # fmt: skip
    train, valid = split(Table(frame, "y"), 0.25, 0, "time:when")
    learned = whole(train)
    rows = np.arange(150)
    assert train.indices.tolist() == rows.tolist()  # type: ignore[attr-defined]
    by_name = {feature.name: feature for feature in learned.encoding.features}
    x, y = frame["x"].to_numpy(), frame["y"].to_numpy()
    assert (by_name["x"].mean, by_name["x"].deviation) == (x[rows].mean(), x[rows].std())
    assert by_name["when"].mean == pytest.approx(19723 + 74.5)  # 2024-01-01 is day 19,723
    assert learned.encoding.vocabularies == (tuple(sorted(f"c{i}" for i in rows)),)
    field = train.schema["target"]
    assert (field.mean, field.std) == (y[rows].mean(), y[rows].std())
    assert valid.schema == train.schema
    assert all(int(valid[i]["categories"][0]) == 0 for i in range(len(valid)))
    assert {int(train[i]["categories"][0]) for i in range(150)} == set(range(1, 151))


def test_a_class_that_only_validation_has_is_named() -> None:
    frame = pa.table({"x": list(range(8)), "when": list(range(8)), "y": ["a", "b"] * 3 + ["c", "c"]})
    with pytest.raises(DataError, match="not among those of the training data") as caught:
        split(Table(frame, "y"), 0.25, 0, "time:when")
    assert "'c'" in caught.value.got
    with pytest.raises(DataError, match="not among those of the training data") as caught:
        Table(frame, "y", rows=range(6, 8), like=Table(frame, "y", rows=range(6)))
    assert "row 6" in caught.value.where
