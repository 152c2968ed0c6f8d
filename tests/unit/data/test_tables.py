"""Tables: statistics of the training rows alone, and one encoding for all others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from torchkeep.chance import ChanceKey
from torchkeep.data.dataset import whole
from torchkeep.data.frames import read_frame
from torchkeep.data.loader import Loader
from torchkeep.data.splits import split
from torchkeep.data.tables import Table, TableEncoding, encode_inputs
from torchkeep.errors import DataError

REAL = Path(__file__).parents[3] / "../shared/data/tabular"

PEOPLE = """age , job, rich, member
 39, clerk, no, True
 50, ?, yes, False
 NA, cook, no, true
 31, clerk ,yes,
"""


@pytest.fixture
def people(tmp_path: Path) -> Path:
    (tmp_path / "people.csv").write_text(PEOPLE)
    return tmp_path / "people.csv"


def test_a_csv_is_read_with_its_blanks_and_gaps(people: Path) -> None:
    data = Table(people, "rich")
    assert data.encoding.numbers == ("age", "age: missing")
    assert data.encoding.categories == ("job", "member")
    assert data.schema["label"].classes == ("no", "yes")
    assert data.columns["label"].tolist() == [0, 1, 0, 1]
    assert data.columns["categories"].tolist() == [[1, 2], [0, 1], [2, 2], [1, 0]]
    assert data.cardinalities == (3, 3)
    ages = np.array([39, 50, 31])
    expected = [(39 - 40) / ages.std(), 10 / ages.std(), 0, (31 - 40) / ages.std()]
    np.testing.assert_allclose(data.columns["numbers"][:, 0], expected, rtol=1e-5, atol=1e-6)
    assert data.columns["numbers"][:, 1].tolist() == [0, 0, 1, 0]


def test_parquet_gives_the_same_as_csv(people: Path, tmp_path: Path) -> None:
    pq.write_table(read_frame(people), tmp_path / "people.parquet")
    assert Table(tmp_path / "people.parquet", "rich").fingerprint() == Table(people, "rich").fingerprint()


def test_statistics_are_those_of_the_training_rows() -> None:
    frame = pa.table({"x": [0.0, 2.0, 1000.0, 4.0], "c": ["a", "b", "z", "a"], "y": ["n", "p", "n", "p"]})
    train = Table(frame, "y", rows=[0, 1, 3])
    assert train.encoding.features[0].mean == 2.0
    assert train.encoding.vocabularies == (("a", "b"),)
    valid = Table(frame, "y", rows=[2], like=train)
    assert valid.columns["categories"].tolist() == [[0]]
    assert valid.columns["numbers"].item() == pytest.approx(998 / np.std([0, 2, 4]))
    assert valid.encoding == train.encoding


def test_a_split_learns_nothing_from_validation() -> None:
    rng = np.random.default_rng(0)
    frame = pa.table({"x": rng.normal(size=100), "y": rng.integers(0, 2, 100)})
    train, valid = split(Table(frame, "y"), 0.2, 0)
    assert (len(train), len(valid)) == (80, 20)
    assert whole(train) is whole(valid)
    learned = whole(train).encoding.features[0]
    assert learned.mean == pytest.approx(frame["x"].to_numpy()[train.indices].mean())
    assert sorted([*train.indices, *valid.indices]) == list(range(100))


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, 2, 1], "label"),
        ([1.5, 2.5, 3.0], "target"),
        (["a", "b", "a"], "label"),
        ([True, False, True], "label"),
        (list(range(60)), "target"),
    ],
)
def test_the_task_follows_the_target(values: list, kind: str) -> None:
    data = Table(pa.table({"x": [float(i) for i in range(len(values))], "t": values}), "t")
    assert data.schema.targets == [kind]
    if kind == "target":
        assert data.columns["target"].dtype == torch.float32
        np.testing.assert_allclose(data.columns["target"], values)


def test_numbers_as_classes_are_in_numeric_order() -> None:
    data = Table(pa.table({"x": [1.0, 2.0, 3.0], "t": [10, 9, 10]}), "t")
    assert data.schema["label"].classes == ("9", "10")
    regression = Table(pa.table({"x": [1.0, 2.0, 3.0], "t": [10, 9, 10]}), "t", task="regression")
    assert regression.columns["target"].tolist() == [10, 9, 10]


def test_a_constant_or_empty_column_is_zero() -> None:
    frame = pa.table({"c": [5, 5], "n": pa.nulls(2), "t": ["a", "b"]})
    assert Table(frame, "t").columns["numbers"].tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_a_missing_target_is_named_by_its_row(missing: float | None) -> None:
    frame = pa.table({"x": [1, 2, 3], "t": [1.5, 2.5, missing]})
    with pytest.raises(DataError) as caught:
        Table(frame, "t")
    assert "row 2" in caught.value.where
    assert len(Table(frame, "t", rows=[0, 1])) == 2


def test_tables_that_cannot_be_used_say_why(people: Path, tmp_path: Path) -> None:
    train = Table(people, "rich")
    other = people.read_text().replace("yes", "maybe")
    (tmp_path / "other.csv").write_text(other)
    with pytest.raises(DataError, match="class") as caught:
        Table(tmp_path / "other.csv", "rich", like=train)
    assert "row 1" in caught.value.where
    with pytest.raises(DataError) as caught:
        Table(people, "ritch")
    assert "rich" in caught.value.fix
    (tmp_path / "words.csv").write_text("age,job,rich,member\nold,cook,no,true\n")
    with pytest.raises(DataError, match="holds something else"):
        Table(tmp_path / "words.csv", "rich", like=train)
    (tmp_path / "ragged.csv").write_text("a,b\n1,2\n3\n")
    with pytest.raises(DataError, match="cannot be read"):
        Table(tmp_path / "ragged.csv", "a")
    (tmp_path / "twice.csv").write_text("a,a\n1,2\n")
    with pytest.raises(DataError, match="header"):
        Table(tmp_path / "twice.csv", "a")
    (tmp_path / "header.csv").write_text("a,b\n")
    with pytest.raises(DataError, match="empty"):
        Table(tmp_path / "header.csv", "a")
    with pytest.raises(DataError, match="missing"):
        Table(tmp_path / "peple.csv", "a")
    with pytest.raises(DataError, match="infinite"):
        Table(pa.table({"x": [1.0, float("inf")], "t": ["a", "b"]}), "t")
    with pytest.raises(DataError) as caught:
        Table(pa.table({"x": [[1], [2]], "z": [1, 2], "t": ["a", "b"]}), "t")
    assert 'drop = ["x"]' in caught.value.fix
    assert Table(pa.table({"x": [[1], [2]], "z": [1, 2], "t": ["a", "b"]}), "t", drop=["x"]).encoding.numbers == ("z",)


def test_the_encoding_travels_as_json_and_encodes_rows_without_a_target(people: Path) -> None:
    data = Table(people, "rich")
    read = TableEncoding.from_json(orjson.loads(orjson.dumps(data.encoding.to_json())))
    assert read == data.encoding
    inputs = encode_inputs(read_frame(people).drop_columns(["rich"]), read, "people")
    assert torch.equal(inputs["numbers"], data.columns["numbers"])
    assert torch.equal(inputs["categories"], data.columns["categories"])
    assert Table(people, "rich", like=read).fingerprint() == data.fingerprint()


def test_a_batch_is_its_samples_and_loaders_work(people: Path) -> None:
    data = Table(people, "rich")
    batch = data.read_batch(np.array([2, 0]), ChanceKey())
    assert torch.equal(batch["numbers"][0], data[2]["numbers"])
    assert int(batch["label"][1]) == data[0]["label"]
    theirs = next(iter(DataLoader(data, batch_size=4)))
    ours = next(iter(Loader(data, batch_size=4)))
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


@pytest.mark.parametrize(
    ("file", "target", "kind", "rows"),
    [
        ("adult/adult.data", "Y", "label", 32561),
        ("california-housing/housing.csv", "median_house_value", "target", 20640),
        ("titanic/train.csv", "Survived", "label", 891),
    ],
)
def test_real_tables(file: str, target: str, kind: str, rows: int) -> None:
    if not (REAL / file).is_file():
        pytest.skip(f"the file shared/data/tabular/{file} beside the repository is missing")
    data = Table(REAL / file, target)
    assert len(data) == rows
    assert data.schema.targets == [kind]
    numbers = data.columns["numbers"]
    assert torch.isfinite(numbers).all()
    values = [place for place, feature in enumerate(data.encoding.features) if feature.part == "value"]
    assert numbers[:, values].mean(0).abs().max() < 1e-3
