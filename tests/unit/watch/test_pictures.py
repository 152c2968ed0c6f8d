"""Pictures of any kind are shown, what had to be changed is said, and predictions are judged as they should be."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from torchkeep.errors import DataError
from torchkeep.watch.media import MediaStore
from torchkeep.watch.pictures import confusion_picture, figure, image, prediction

MAGENTA = [255, 0, 255]
RAMP = np.linspace(0, 1, 48).reshape(4, 4, 3)  # H, W, C


def pixels(png: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(png)))


def shown(tmp_path: Path, late: Any) -> tuple[dict[str, Any], np.ndarray[Any, Any]]:
    media = MediaStore(tmp_path)
    told = late.settle(media)
    assert told == late.settle(media)  # the disk may have refused the first
    drawn = pixels(media.read(told["media"]))
    assert (told["height"], told["width"]) == drawn.shape[:2]
    return told, drawn


# --- pictures as they are


@pytest.mark.parametrize(
    ("values", "caption"),
    [(RAMP, ""), (RAMP.transpose(2, 0, 1), ""), (torch.tensor(RAMP).permute(2, 0, 1).bfloat16(), ""),
     ((RAMP * 255).round().astype(np.uint8), ""), ((RAMP * 255).round().astype(np.int64), ""),
     (RAMP * 2 - 1, "black is -1, white 1"), (RAMP * 9 + 2, "black is 2, white 11"),
     ((RAMP * 60000 + 500).astype(np.uint16), "black is 500, white 6.05e+04"),
     ((RAMP - 0.5) * 1.7e308, "black is -8.5e+307, white 8.5e+307"), (RAMP.tolist(), "")],
    ids=["HWC", "CHW", "bfloat16", "uint8", "int64", "-1…1", "2…11", "uint16", "huge", "list"],
)  # fmt: skip
def test_types_ranges_and_layouts(tmp_path: Path, values: Any, caption: str) -> None:
    told, drawn = shown(tmp_path, image(values))
    np.testing.assert_allclose(drawn, RAMP * 255, atol=1)
    assert told["caption"] == caption


@pytest.mark.parametrize(
    ("shape", "size", "said"),
    [((5, 7), (5, 7, 3), ""), ((1, 5, 7), (5, 7, 3), ""), ((5, 7, 1), (5, 7, 3), ""), ((4, 5, 7), (5, 7, 4), ""),
     ((5, 7, 4), (5, 7, 4), ""), ((2, 5, 7), (5, 7, 3), "channels 1 and 2 as red and green"),
     ((64, 80, 80), (80, 80, 3), "channels 1 to 3 of 64"), ((80, 80, 64), (80, 80, 3), "channels 1 to 3 of 64"),
     ((6, 3, 5, 7), (12, 25, 3), ""), ((6, 5, 7, 1), (12, 25, 3), ""), ((200, 1, 5, 5), (54, 54, 3), "64 of 200"),
     ((1, 9000), (1, 3000, 3), "of 9,000 × 1 pixels one in 3 each way"),
     ((3, 5000, 5), (2500, 3, 3), "of 5 × 5,000 pixels one in 2 each way")],
    ids=str,
)  # fmt: skip
def test_shapes(tmp_path: Path, shape: tuple[int, ...], size: tuple[int, ...], said: str) -> None:
    told, drawn = shown(tmp_path, image(np.random.default_rng(0).random(shape), "mine"))
    assert drawn.shape == size
    assert told["caption"] == "; ".join(filter(None, ("mine", said)))


def test_what_is_not_finite_is_magenta_and_said(tmp_path: Path) -> None:
    values = np.full((3, 4, 5), 0.5)
    values[0, 0, 0], values[2, 1, 1] = np.nan, -np.inf
    told, drawn = shown(tmp_path, image(values))
    assert told["caption"] == "2 pixels that are not finite in magenta"
    assert drawn[0, 0].tolist() == drawn[1, 1].tolist() == MAGENTA
    assert drawn[3, 4].tolist() == [128, 128, 128]
    assert (shown(tmp_path, image(np.full((4, 4), np.nan)))[1] == MAGENTA).all()
    assert (shown(tmp_path, image(torch.full((4, 4, 4), torch.nan)))[1] == MAGENTA).all()


def test_one_value_is_grey_and_bits_are_black_and_white(tmp_path: Path) -> None:
    told, drawn = shown(tmp_path, image(np.full((4, 4), 1e300)))
    assert told["caption"] == "all is 1e+300"
    assert (drawn == 128).all()
    assert set(shown(tmp_path, image(torch.eye(4).bool()))[1].ravel().tolist()) == {0, 255}


def test_the_picture_is_that_of_the_call(tmp_path: Path) -> None:
    values = torch.zeros(3, 4, 4)
    late = image(values)
    values.fill_(1)
    assert not shown(tmp_path, late)[1].any()


@pytest.mark.parametrize(
    "values", [torch.zeros(4, 4, dtype=torch.complex64), np.zeros(3), np.zeros((0, 4)), np.zeros((1, 1, 1, 4, 4)),
               "a.png", None, [[1], [1, 2]], np.array([["a"]]), torch.zeros(3, 4, 4, device="meta")], ids=repr
)  # fmt: skip
def test_what_is_no_picture_is_refused_at_the_call(values: Any) -> None:
    with pytest.raises(DataError, match="image"):
        image(values)


# --- predictions


def rows(tmp_path: Path, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = prediction(*args, **kwargs).settle(MediaStore(tmp_path))["rows"]
    return told


def judged(tmp_path: Path, truth: Any, output: Any, **kwargs: Any) -> list[tuple[Any, ...]]:
    told = rows(tmp_path, None, truth, output, **kwargs)
    return [
        (row["truth"], row["output"], row["confidence"] and round(row["confidence"], 2), row["is_right"])
        for row in told
    ]


def test_classes_by_their_logits(tmp_path: Path) -> None:
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, float("nan")], [-1e5, 1e5], [0.0, 9.0]])
    truth = torch.tensor([0, 1, 1, 1, -100])
    expected = [("ant", "ant", 0.88, True), ("bee", "ant", 0.88, False), ("bee", "NaN", None, False),
                ("bee", "bee", 1.0, True), ("-100", "bee", 1.0, None)]  # fmt: skip
    assert judged(tmp_path, truth, logits, classes=["ant", "bee"]) == expected
    assert judged(tmp_path, [0], [[0.25, 0.75]], confidence="given") == [("0", "1", 0.75, False)]
    assert judged(tmp_path, torch.tensor([0, 5]), torch.tensor([2, 5])) == [
        ("0", "2", None, False),
        ("5", "5", None, True),
    ]
    assert judged(tmp_path, [[0, 1, 0]], [[0.0, 3.0, 0.0]]) == [("1", "1", 0.91, True)]


@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_two_classes_by_one_logit(tmp_path: Path, shape: tuple[int, ...]) -> None:
    found, truth = torch.tensor([2.0, -2.0]).view(shape), torch.tensor([1.0, 1.0])
    assert judged(tmp_path, truth, found, classes=["no", "yes"]) == [
        ("yes", "yes", 0.88, True),
        ("yes", "no", 0.88, False),
    ]


def test_several_classes_at_once_numbers_and_texts(tmp_path: Path) -> None:
    truth, logits = torch.tensor([[1, 0, 1], [0, 0, 0]]), torch.tensor([[1.0, -1, 1], [-1, 2, -1]])
    told = judged(tmp_path, truth, logits, classes=["cat", "dog", "sofa"])
    assert told == [("cat, sofa", "cat, sofa", None, True), ("none", "dog", None, False)]
    assert judged(tmp_path, [1.234567, 3.0], [[1.5], [2.0]]) == [("1.235", "1.5", None, None), ("3", "2", None, None)]
    assert judged(tmp_path, np.full((1, 9), 0.5), np.zeros((1, 2)))[0][:2] == (f"[{'0.5, ' * 8}…]", "[0, 0]")
    assert judged(tmp_path, ["yes", "no"], ["yes", "yes"]) == [("yes", "yes", None, True), ("no", "yes", None, False)]


def test_samples_that_are_no_pictures_have_rows_only(tmp_path: Path) -> None:
    told = prediction(["a text", "x" * 3000], [0, 1], torch.eye(2), ids=["t/1", 7]).settle(MediaStore(tmp_path))
    assert (told["media"], told["width"], told["height"]) == (None, 0, 0)
    assert [(row["sample"], len(row["input"])) for row in told["rows"]] == [("t/1", 6), (7, 2000)]
    assert rows(tmp_path, torch.arange(6.0).view(2, 3), [0, 1], torch.eye(2))[0]["input"] == "[0, 1, 2]"
    assert [row["sample"] for row in rows(tmp_path, None, [0, 1], torch.eye(2), ids=torch.tensor([5]))] == [5, 1]


def test_right_and_wrong_look_different(tmp_path: Path) -> None:
    pictures = torch.full((2, 3, 64, 64), 128, dtype=torch.uint8)
    told, right = shown(tmp_path, prediction(pictures, [0, 0], [[1.0, 0.0], [1.0, 0.0]], classes=["a", "b"]))
    wrong = shown(tmp_path, prediction(pictures, [0, 1], [[1.0, 0.0], [1.0, 0.0]], classes=["a", "a"]))[1]
    half = told["width"] // 2
    assert right.shape == wrong.shape
    assert (right[:, :half] == wrong[:, :half]).all()
    assert (right[:, half:] != wrong[:, half:]).sum() > 1000
    assert (right[12 : 12 + 192, 12 : 12 + 192] == 128).all()  # nothing is drawn over a picture


def test_a_picture_is_shown_before_it_was_normalised(tmp_path: Path) -> None:
    plain = torch.rand(2, 3, 192, 192)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), np.array([0.2, 0.3, 0.1])
    normal = (plain - mean[:, None, None]) / torch.tensor(std)[:, None, None]
    drawn = shown(tmp_path, prediction(normal, [0, 1], torch.eye(2), mean=mean, std=std))[1]
    np.testing.assert_allclose(drawn[12:204, 12:204], plain[0].permute(1, 2, 0) * 255, atol=1)


@pytest.mark.parametrize(
    "shape", [(1, 8, 8), (8, 8), (3, 500, 375), (3, 1, 1000), (1000, 1, 3), (4, 30, 30), (3, 2000, 2000)]
)
def test_pictures_of_any_size_fit_their_cells(tmp_path: Path, shape: tuple[int, ...]) -> None:
    told, _ = shown(tmp_path, prediction(torch.rand(3, *shape), torch.tensor([0, 1, 1]), torch.rand(3, 2)))
    assert max(told["width"], told["height"]) < 600


def test_most_are_shown(tmp_path: Path) -> None:
    assert len(rows(tmp_path, torch.rand(40, 1, 8, 8), torch.zeros(40), torch.zeros(40), most=5)) == 5


@pytest.mark.parametrize("name", ["Жук", "蜂", "\ud83d", "\n\t\x00", "x" * 10_000, "", "🐝", "\u202eabc"])
def test_class_names_of_any_letters(tmp_path: Path, name: str) -> None:
    told, _ = shown(tmp_path, prediction(torch.rand(2, 1, 8, 8), [0, 1], torch.eye(2), classes=[name, name]))
    assert told["rows"][0]["truth"] == name
    assert told["width"] < 600
    masks = torch.tensor([[[0, 1, 2, 3]]])
    shown(tmp_path, prediction(torch.rand(1, 3, 8, 8), masks, masks, classes=[name] * 4))
    confusion_picture([name, name], [[1, 2], [3, 4]])


@pytest.mark.parametrize("kind", ["logits", "classes", "smaller"])
def test_masks_lie_over_the_picture_in_the_colour_of_their_class(tmp_path: Path, kind: str) -> None:
    truth = torch.zeros(1, 192, 192, dtype=torch.int64)
    truth[:, :96] = 2
    truth[:, 96:, :96] = 1
    truth[:, 180:, 180:] = 255  # ignored
    found = {
        "classes": truth,
        "smaller": truth[:, ::4, ::4],
        "logits": (truth[:, None] == torch.arange(3)[:, None, None]) * 5.0,
    }
    pictures = torch.full((1, 3, 192, 192), 255, dtype=torch.uint8)
    told, drawn = shown(tmp_path, prediction(pictures, truth, found[kind], classes=["sky", "sea", "land"]))
    row = told["rows"][0]
    assert row["truth"].startswith("land 50 %, sea 25 %, sky 25 %")
    assert row["is_right"] is None
    panels = [drawn[30 : 30 + 192, left : left + 192] for left in (12, 12 + 196, 12 + 392)]
    assert (panels[0] == 255).all()
    colours = [tuple(panels[1][y, x].tolist()) for y, x in ((10, 10), (150, 10), (150, 150), (190, 190))]
    assert len(set(colours)) == 4
    assert colours[3] == (255, 255, 255)
    assert (panels[1][:180, :180] == panels[2][:180, :180]).all()


def test_two_classes_leave_the_background_clear(tmp_path: Path) -> None:
    truth = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    truth[..., :32] = True
    drawn = shown(tmp_path, prediction(torch.ones(1, 3, 64, 64), truth, truth * 4.0 - 2))[1]
    assert (drawn[30:222, 208 + 96 : 400] == 255).all()
    assert (drawn[30:222, 208 : 208 + 96] != 255).any()


def test_pictures_as_truth_are_shown_in_one_range(tmp_path: Path) -> None:
    depth = torch.full((1, 192, 192), 8.0)
    depth[:, :96] = 0
    told, drawn = shown(tmp_path, prediction(torch.zeros(1, 3, 192, 192), depth, depth / 2))
    assert [drawn[200, left + 9, 0] for left in (208, 404)] == [255, 128]
    assert told["rows"][0]["truth"] == "mean 4"


@pytest.mark.parametrize(
    ("inputs", "truth", "output"),
    [(None, [0, 1], torch.eye(3)), (torch.rand(3, 1, 8, 8), [0, 1], torch.eye(2)), (None, None, [0]), (None, [0], None),
     (None, [], []), (None, 1, 1), (None, [0], torch.zeros(1, 0)), (None, [1 + 2j], [0.0]),
     (torch.rand(1, 1, 8, 8), torch.zeros(1, 8, 8, dtype=torch.int64), torch.zeros(1, 5)),
     (torch.rand(1, 1, 8, 8), torch.zeros(1, 8, 8), torch.zeros(1, 4, 8, 8))],
)  # fmt: skip
def test_what_does_not_fit_together_is_refused_at_the_call(inputs: Any, truth: Any, output: Any) -> None:
    with pytest.raises(DataError, match="prediction"):
        prediction(inputs, truth, output)


def test_a_mean_of_other_channels_is_refused() -> None:
    with pytest.raises(DataError, match="one for each channel"):
        prediction(torch.rand(1, 3, 8, 8), [0], [[1.0, 0.0]], mean=[0.5, 0.5])


def test_what_is_shown_is_what_was_there_at_the_call(tmp_path: Path) -> None:
    truth, logits = torch.tensor([0, 1]), torch.eye(2)
    late = prediction(None, truth, logits)
    truth.zero_()
    logits.zero_()
    assert all(row["is_right"] for row in late.settle(MediaStore(tmp_path))["rows"])


# --- confusion and figures


@pytest.mark.parametrize("num", [0, 1, 2, 10, 30, 31, 60, 500, 2001])
def test_confusion_of_any_number_of_classes(num: int) -> None:
    counts = np.eye(num, dtype=np.int64) * 100_000 + 1
    drawn = pixels(confusion_picture([f"class {number}" for number in range(num)], counts.tolist()))
    assert max(drawn.shape) < 2400
    assert (drawn[..., 2] > drawn[..., 0].astype(int) + 100).any() == (num > 0)  # right ones are blue


def test_mistakes_have_another_colour() -> None:
    right = pixels(confusion_picture(["ant", "bee"], [[50, 0], [0, 50]])).astype(int)
    wrong = pixels(confusion_picture(["ant", "bee"], [[40, 10], [0, 50]])).astype(int)
    is_orange = [(drawn[..., 0] > drawn[..., 2] + 50).sum() for drawn in (right, wrong)]
    assert is_orange[0] == 0
    assert is_orange[1] > 1000


@pytest.mark.parametrize(
    "counts", [[[float("nan"), 1], [2, -3]], [[0, 0], [0, 0]], [[1e18, 1], [0.5, 2]], torch.eye(2)]
)
def test_counts_of_any_kind(counts: Any) -> None:
    assert pixels(confusion_picture(["only one name"], counts)).ndim == 3


@pytest.mark.parametrize("counts", [[[1, 2]], [1, 2], [[1], [1, 2]], 5.0, "no"])
def test_what_is_no_confusion_matrix_is_refused(counts: Any) -> None:
    with pytest.raises(DataError):
        confusion_picture(["a", "b"], counts)


def test_a_figure_is_drawn_at_once_and_left_as_it_was(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="this needs matplotlib")
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(2, 1), dpi=100)
    axes = drawn.add_subplot()
    axes.plot([1, 2])
    canvas = drawn.canvas
    late, from_axes = figure(drawn), figure(axes)
    axes.clear()
    told, first = shown(tmp_path, late)
    assert (told["width"], told["height"]) == (200, 100)
    assert shown(tmp_path, from_axes)[0] == told
    assert drawn.canvas is canvas
    assert (first != shown(tmp_path, figure(drawn))[1]).any()


def test_what_is_no_figure_is_refused() -> None:
    class Broken:
        def savefig(self, *args: Any, **kwargs: Any) -> None:
            raise ZeroDivisionError("in an artist")

    for wrong in (None, "figure", Broken()):
        with pytest.raises(DataError, match="figure"):
            figure(wrong)


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.float8_e5m2])
@pytest.mark.parametrize("channels", [1, 3])
def test_masks_of_any_type_are_shown(kind: torch.dtype, channels: int, tmp_path: Path) -> None:
    output = torch.randint(0, 2, (2, channels, 6, 6)).to(kind)
    shown(tmp_path, prediction(torch.rand(2, 3, 6, 6), torch.randint(0, 2, (2, 6, 6)), output))
