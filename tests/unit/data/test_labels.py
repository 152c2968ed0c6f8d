"""What a column or a folder says is to be predicted: classes, several classes, numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pytest
import torch

from torchkeep.contracts import Field
from torchkeep.data.labels import Labels, labels_of_classes, labels_of_column
from torchkeep.errors import DataError


def labels(values: Any, like: Field | None = None, separator: str | None = None, names: Any = None) -> Labels:
    """Of a column in two chunks, as tables have them; ``names`` as Hugging Face writes them."""
    column = values if isinstance(values, pa.Array) else pa.array(values)
    frame = pa.table({"y": pa.chunked_array([column[:1], column[1:]])})
    if names is not None:
        described = {"info": {"features": {"y": names}}}
        frame = frame.replace_schema_metadata({"huggingface": orjson.dumps(described).decode()})
    return labels_of_column(frame, "y", "t", like, separator)


def check(held: Labels, batch: torch.Tensor) -> None:
    """The batch, the samples one by one, and any other order of them."""
    count = len(held)
    assert torch.equal(held.batch(np.arange(count)), batch)
    assert held.batch(np.arange(count)).dtype == batch.dtype
    for index in range(count):
        assert torch.equal(torch.as_tensor(held.of(index)).to(batch.dtype), batch[index])
    assert torch.equal(held.batch(np.arange(count)[::-1].copy()), batch.flip(0))
    assert held.batch(np.array([], np.int64)).shape == (0, *batch.shape[1:])


@pytest.mark.parametrize(
    ("values", "classes", "numbers"),
    [
        (["b", "a", "b"], ("a", "b"), [1, 0, 1]),
        ([10, 9, -1], ("-1", "9", "10"), [2, 1, 0]),
        ([True, False, True], ("false", "true"), [1, 0, 1]),
        (pa.array(["b", "a", "b"]).dictionary_encode(), ("a", "b"), [1, 0, 1]),
        (pa.array(["b", "a", "b"], pa.large_string()), ("a", "b"), [1, 0, 1]),
        (pa.array([2, 1, 2], pa.uint8()), ("1", "2"), [1, 0, 1]),
    ],
)
def test_texts_bools_and_whole_numbers_are_classes(values: Any, classes: tuple[str, ...], numbers: list[int]) -> None:
    held = labels(values)
    assert (held.key, held.field) == ("label", Field("label", (), classes, is_target=True))
    check(held, torch.tensor(numbers))
    assert held.classes is not None
    assert held.classes.tolist() == numbers


@pytest.mark.parametrize(
    ("values", "classes", "rows"),
    [
        ([["b", "a"], [], ["b"]], ("a", "b"), [[1, 1], [0, 0], [0, 1]]),
        ([[10], [9, 10], [10, 10]], ("9", "10"), [[0, 1], [1, 1], [0, 1]]),
        (pa.array([["b"], ["a"], []], pa.large_list(pa.string())), ("a", "b"), [[0, 1], [1, 0], [0, 0]]),
    ],
)
def test_lists_are_several_classes(values: Any, classes: tuple[str, ...], rows: list[list[int]]) -> None:
    held = labels(values)
    assert (held.key, held.field) == ("label", Field("multilabel", (len(classes),), classes, is_target=True))
    assert held.classes is None
    check(held, torch.tensor(rows).float())
    again = labels(values[:2] if isinstance(values, list) else values.slice(0, 2), like=held.field)
    check(again, torch.tensor(rows[:2]).float())


def test_a_separator_parts_texts() -> None:
    train = labels(["b | a", "c", "a||b|", ""], separator="|")
    assert train.field.classes == ("a", "b", "c")  # nothing between two separators is no class
    check(train, torch.tensor([[1, 1, 0], [0, 0, 1], [1, 1, 0], [0, 0, 0]]).float())
    check(labels(["b|a", None, "c"], separator="|"), torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, 1]]).float())
    valid = labels(["c", "b"], like=train.field, separator="|")
    assert valid.field == train.field
    check(valid, torch.tensor([[0, 0, 1], [0, 1, 0]]).float())
    with pytest.raises(DataError, match="not among") as caught:
        labels(["a|d", "b"], like=train.field, separator="|")
    assert "'d'" in caught.value.got


def test_single_numbers_are_lists_too_where_training_had_lists() -> None:
    """A file of one label a row is read as whole numbers."""
    train = labels(["1|2", "2"], separator="|")
    check(labels([2, 1], like=train.field, separator="|"), torch.tensor([[0, 1], [1, 0]]).float())
    check(labels([2, 1], separator="|"), torch.tensor([[0, 1], [1, 0]]).float())


@pytest.mark.parametrize("values", [[1.5, 2.5, 6.5], pa.array([1.5, 2.5, 6.5], pa.float32())])
def test_floats_are_numbers_with_their_mean_and_deviation(values: Any) -> None:
    held = labels(values)
    assert held.key == "target"
    assert held.field.kind == "number"
    assert held.field.mean == pytest.approx(3.5)
    assert held.field.std == pytest.approx(np.std([1.5, 2.5, 6.5]))
    assert held.classes is None
    check(held, torch.tensor([1.5, 2.5, 6.5]))
    assert labels([3.0, 3.0]).field.std == 1.0  # a constant is divided by nothing
    valid = labels([7, 8, 9], like=held.field)  # whole numbers, by chance
    assert valid.field == held.field
    check(valid, torch.tensor([7.0, 8.0, 9.0]))
    learned = held.learned_from(np.array([0, 1]))
    assert (learned.field.mean, learned.field.std) == (2.0, 0.5)
    check(learned, torch.tensor([1.5, 2.5, 6.5]))


def test_class_numbers_that_were_read_as_floats_are_the_classes_of_training() -> None:
    like = labels([1, 2, 10]).field
    check(labels([10.0, 1.0], like=like), torch.tensor([2, 0]))
    with pytest.raises(DataError, match="not among"):
        labels([1.5, 1.0], like=like)


HUB = {"names": ["cat", "dog", "eel"], "_type": "ClassLabel"}


def test_names_of_the_hub_are_the_classes_in_their_order() -> None:
    held = labels([2, 0], names=HUB)
    assert held.field.classes == ("cat", "dog", "eel")
    check(held, torch.tensor([2, 0]))
    several = labels([[2, 0], []], names={"feature": HUB, "_type": "Sequence"})
    assert several.field.classes == ("cat", "dog", "eel")
    check(several, torch.tensor([[1, 0, 1], [0, 0, 0]]).float())
    nothing = labels(pa.array([[], []], pa.list_(pa.int64())), names={"feature": HUB, "_type": "Sequence"})
    check(nothing, torch.zeros(2, 3))
    for wrong in ([0, 3], [-1, 0]):
        with pytest.raises(DataError, match="no name") as caught:
            labels(wrong, names=HUB)
        assert caught.value.expected == "0 to 2"
    assert labels(["x", "y"], names={"_type": "Value"}).field.classes == ("x", "y")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (["a", None, None], "row 1"),
        ([1, None, 2], "row 1"),
        ([0.5, 1.5, float("nan")], "row 2"),
        ([["a"], None, ["b"]], "row 1"),
        ([["a"], ["b", None], ["b"]], "row 2"),
    ],
)
def test_a_missing_label_is_named(values: list, said: str) -> None:
    with pytest.raises(DataError, match="label is missing") as caught:
        labels(values)
    assert said in caught.value.where
    assert "column 'y'" in caught.value.where


CLASSES, SEVERAL, NUMBER = labels(["a", "b"]).field, labels([["a"], ["b"]]).field, labels([0.5, 1.0]).field


@pytest.mark.parametrize(
    ("values", "like", "separator"),
    [
        (pa.array([b"a", b"b"]), None, None),
        ([{"a": 1}, {"a": 2}], None, None),
        (pa.array([[1, 0], [0, 1]], pa.list_(pa.int64(), 2)), None, None),
        ([[{"a": 1}], []], None, None),
        ([[], []], None, None),
        (pa.array([[], []], pa.list_(pa.string())), None, None),
        ([0.5, 1.5], None, "|"),
        ([["a"], ["b"]], CLASSES, None),
        (["a", "b"], SEVERAL, None),
        ([0.5, 1.0], SEVERAL, None),
        (["a", "b"], NUMBER, None),
        ([["a"], ["b"]], NUMBER, None),
        ([float("inf"), 1.0], None, None),
        (["a", "c"], CLASSES, None),
        ([1, 2], CLASSES, None),
    ],
)
def test_what_cannot_be_labels_is_said(values: Any, like: Field | None, separator: str | None) -> None:
    with pytest.raises(DataError) as caught:
        labels(values, like, separator)
    assert "column 'y'" in caught.value.where
    assert caught.value.got
    assert caught.value.expected


def test_a_class_only_in_validation_is_named_with_the_nearest() -> None:
    with pytest.raises(DataError, match="not among") as caught:
        labels(["antz", "bee"], like=labels(["ant", "bee", "wasp"]).field)
    assert caught.value.got == "'antz'"
    assert "'ant'" in caught.value.fix
    check(labels(["wasp"], like=labels(["ant", "bee", "wasp"]).field), torch.tensor([2]))


def test_folders_take_over_the_numbers_of_training() -> None:
    like = Field("label", (), tuple(f"{number:03}" for number in range(300)), is_target=True)
    held = labels_of_classes(np.array([1, 0, 1], np.uint8), ["017", "299"], like, "t")
    check(held, torch.tensor([299, 17, 299]))
    same = labels_of_classes(np.array([1, 0], np.int32), like.classes, like, "t")
    check(same, torch.tensor([1, 0]))
    with pytest.raises(DataError, match="not among"):
        labels_of_classes(np.array([0]), ["300"], like, "t")
    with pytest.raises(DataError, match="another kind"):
        labels_of_classes(np.array([0]), ["a"], SEVERAL, "t")


def test_every_part_of_labels_is_in_the_checksum() -> None:
    import xxhash

    def digest(held: Labels) -> str:
        made = xxhash.xxh3_128()
        held.absorb(made)
        return str(made.hexdigest())

    made = [labels(values) for values in (["a", "b"], ["b", "a"], ["a", "c"], [["a"], ["b"]], [["a", "b"], []])]
    assert len({digest(held) for held in made}) == len(made)
    assert digest(labels(["a", "b"])) == digest(made[0])
