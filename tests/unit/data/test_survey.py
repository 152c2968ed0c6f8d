"""A survey finds what was planted, and nothing in data without faults."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from torchkeep.chance import ChanceKey
from torchkeep.data.arrays import Arrays
from torchkeep.data.audio import AudioFolder
from torchkeep.data.dataset import Part
from torchkeep.data.duplicates import min_hash, shingles_of
from torchkeep.data.images import IdxImages, ImageFolder
from torchkeep.data.sheet import contact_sheet
from torchkeep.data.survey import Survey, kolmogorov_smirnov
from torchkeep.data.tables import Table
from torchkeep.data.text import TextBlocks, TextTable
from torchkeep.errors import DataError
from torchkeep.training.survey import survey

SHARED = Path(__file__).parents[3] / "../shared/data"


def picture(seed: int, height: int = 96, width: int = 128) -> Image.Image:
    """Soft blobs: as a photograph, it stays what it is when it is resized."""
    draws = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(draws).resize((width, height), Image.Resampling.BICUBIC)


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """12 different pictures for training and 10 for validation, of two classes, without any fault."""
    for number in range(22):
        split, name = "train" if number < 12 else "valid", "ants" if number % 2 else "bees"
        save(tmp_path / split / name / f"{number:02}.png", picture(number))
    return tmp_path


def look(root: Path, **options: Any) -> Survey:
    return survey({name: ImageFolder(root / name, image_size=32) for name in ("train", "valid")}, **options)


def problems(found: Survey) -> list[str]:
    return [f"{row.split}: {row.what}: {row.which}" for row in found.problems]


def groups(found: Survey, kind: str) -> list[set[str]]:
    return [{f"{m.split}/{m.id}" for m in group.samples} for group in found.copies if group.kind == kind]


def texts(rows: list[str], labels: list[str] | None = None) -> TextTable:
    labels = labels or [("a", "b")[place % 2] for place in range(len(rows))]
    return TextTable(pa.table({"text": rows, "label": labels}))


def sentences(count: int, seed: int) -> list[str]:
    words = np.array(
        ["the", "red", "old", "car", "house", "runs", "by", "with", "green", "quick", "river", "hill", "sun"]
    )
    draws = np.random.default_rng(seed)
    return [" ".join(draws.choice(words, 9)) + f" {draws.integers(1e9)}" for _ in range(count)]


def test_data_without_faults(root: Path) -> None:
    found = look(root)
    assert found.copies == []
    assert found.problems == []
    assert found.leaks == {"valid": {"exact": 0, "near": 0}}
    assert not any(row.is_over for row in found.drift)
    train = found.splits["train"]
    assert (train.num_samples, train.bad) == (12, [])
    assert train.classes == {"ants": 6, "bees": 6}
    assert train.num_bytes == sum(path.stat().st_size for path in (root / "train").rglob("*.png"))
    assert train.columns["width"]["median"] == 128
    assert train.columns["size"]["top"] == {"128 × 96": 12}


def test_mean_and_std_are_those_of_the_pixels(root: Path) -> None:
    data = ImageFolder(root / "train")
    pixels = np.stack([data.decoded(place) for place in range(len(data))]) / 255
    train = survey({"train": data}).splits["train"]
    assert train.mean == pytest.approx(pixels.mean((0, 1, 2)))
    assert train.std == pytest.approx(pixels.std((0, 1, 2)))


def test_exact_copies_across_splits_are_leaks(root: Path) -> None:
    save(root / "valid/ants/copy.bmp", Image.open(root / "train/ants/01.png"))  # the same pixels in another format
    found = look(root)
    assert groups(found, "exact") == [{"train/ants/01.png", "valid/ants/copy.bmp"}]
    assert found.copies[0].is_leak
    assert not found.copies[0].is_conflict
    assert found.leaks == {"valid": {"exact": 1, "near": 0}}


def test_a_copy_under_another_class_is_a_conflict(root: Path) -> None:
    save(root / "train/bees/copy.png", Image.open(root / "train/ants/01.png"))
    (group,) = look(root).copies
    assert group.is_conflict
    assert not group.is_leak
    assert {member.labels for member in group.samples} == {("ants",), ("bees",)}


@pytest.mark.parametrize("side", [(128, 96), (64, 48), (200, 150)], ids=["encoded again", "half", "larger"])
def test_near_copies(root: Path, side: tuple[int, int]) -> None:
    image = Image.open(root / "train/ants/01.png").resize(side, Image.Resampling.BICUBIC)
    save(root / "valid/ants/near.jpg", image, quality=40)
    found = look(root)
    assert groups(found, "near") == [{"train/ants/01.png", "valid/ants/near.jpg"}]
    assert groups(found, "exact") == []
    assert found.leaks == {"valid": {"exact": 0, "near": 1}}


def test_pictures_of_one_grey_are_no_near_copies(root: Path) -> None:
    for grey in (10, 100):
        save(root / f"train/ants/grey{grey}.png", Image.new("RGB", (20, 20), (grey,) * 3))
    found = look(root)
    assert found.copies == []
    assert found.splits["train"].columns["contrast"]["min"] == 0


def test_pictures_with_the_same_gradients_are_confirmed(root: Path) -> None:
    """A ramp and its square grow alike from left to right and downwards, but are two pictures."""
    ramp = np.linspace(0, 0.5, 64)[None, :] + np.linspace(0, 0.5, 64)[:, None]
    for power in (1, 2):
        save(root / f"train/ants/ramp{power}.png", Image.fromarray((ramp**power * 255).astype(np.uint8)).convert("RGB"))
    assert look(root).copies == []


def test_bad_files_are_listed_with_their_reasons(root: Path) -> None:
    held = BytesIO()
    picture(50).save(held, "JPEG")
    (root / "train/ants/cut.jpg").write_bytes(held.getvalue()[: len(held.getvalue()) // 2])
    (root / "train/ants/empty.jpg").write_bytes(b"")
    (root / "train/bees/words.png").write_text("this is no image at all")
    found = look(root).splits["train"]
    assert {bad.id: bad.got.split(" bytes")[1] for bad in found.bad} == {
        "ants/cut.jpg": " without an end marker", "ants/empty.jpg": "", "bees/words.png": " of no known form",
    }  # fmt: skip
    assert found.num_samples == 15
    assert found.classes == {"ants": 8, "bees": 7}
    assert found.columns["width"]["count"] == 12


def test_classes_only_in_valid_rare_unequal_and_alone(root: Path) -> None:
    for number in range(3):
        save(root / f"valid/wasps/{number}.png", picture(100 + number))
    for number in range(60):
        save(root / f"train/ants/more{number}.png", picture(200 + number))
    said = problems(look(root))
    assert "valid: 1 class not in train: 'wasps'" in said
    assert "valid: 1 class with fewer than 5 samples: 'wasps'" in said
    assert "train: classes as unequal as 11 to 1: 'ants' 66, 'bees' 6" in said
    alone = survey({"train": ImageFolder(root, label_pattern="(?P<label>png)$", image_size=32)})
    assert problems(alone) == ["train: one class only: 'png'"]


def test_images_of_several_sizes_are_said_where_no_size_is_set(root: Path) -> None:
    save(root / "train/ants/wide.png", picture(70, 50, 90))
    assert problems(look(root)) == []
    (said,) = problems(survey({"train": ImageFolder(root / "train")}))
    assert said == "train: images of several sizes, which training cannot batch: 2 sizes"


def test_labels_that_differ_by_a_dot() -> None:
    rows = {"age": [float(i) for i in range(40)]}
    train = Table(pa.table({**rows, "income": ["<=50K", ">50K"] * 20}), "income")
    test = Table(pa.table({"age": [i + 0.5 for i in range(40)], "income": ["<=50K.", ">50K."] * 20}), "income")
    found = survey({"train": train, "test": test})
    assert "test: 2 classes not in train: '<=50K.', '>50K.'" in problems(found)
    assert any("only by case, blanks or a dot: '<=50K' and '<=50K.'" in row for row in problems(found))
    assert not any(row.is_over for row in found.drift)  # the classes' shares are the same


def test_equal_rows_of_a_table_and_conflicts_over_the_dot() -> None:
    def rows(labels: list[str]) -> Table:
        frame = {"a": [1, 2, 1, None, None], "b": ["x", "x", "x", "y", "y"], "c": [0.1, 0.2, 0.1, 0.3, 0.3]}
        return Table(pa.table({**frame, "kind": labels}), "kind")

    found = survey({"train": rows(["no", "no", "yes", "no", "no."])})
    assert groups(found, "exact") == [{"train/row 0", "train/row 2"}, {"train/row 3", "train/row 4"}]
    assert [group.is_conflict for group in found.copies] == [True, False]
    assert found.splits["train"].columns["a"]["missing"] == 2


def test_a_column_that_drifts_comes_first() -> None:
    draws = np.random.default_rng(0)

    def rows(shift: float, colour: float) -> Table:
        columns = {"still": draws.normal(size=400), "moved": draws.normal(shift, size=400)}
        words = np.where(draws.random(400) < colour, "red", "blue").tolist()
        return Table(pa.table({**columns, "colour": words, "kind": ["a", "b"] * 200}), "kind")

    found = survey({"train": rows(0, 0.5), "valid": rows(0, 0.5), "test": rows(1, 0.9)})
    over = [(row.split, row.what, row.statistic) for row in found.drift if row.is_over]
    assert sorted(over) == [("test", "colour", "TV"), ("test", "moved", "KS")]
    assert [row.is_over for row in found.drift] == sorted((row.is_over for row in found.drift), reverse=True)


def test_drift_bounds_hold_for_splits_of_the_same_source() -> None:
    """Small splits of many kinds differ by chance, and that is not called drift."""
    called = 0
    for seed in range(40):
        draws = np.random.default_rng(seed)
        columns = {"number": draws.normal(size=90), "word": draws.choice(list("abcdefgh"), 90), "x": draws.random(90)}
        table = Table(pa.table({**columns, "kind": draws.choice(["a", "b"], 90)}), "kind")
        found = survey({"train": Part(table, np.arange(60)), "valid": Part(table, np.arange(60, 90))})
        called += sum(row.is_over for row in found.drift)
    assert called <= 2  # of 160


def test_kolmogorov_smirnov_by_hand() -> None:
    assert kolmogorov_smirnov(np.array([1.0, 2, 3]), np.array([1.0, 2, 3])) == 0
    assert kolmogorov_smirnov(np.array([1.0, 2]), np.array([3.0, 4])) == 1
    assert kolmogorov_smirnov(np.array([1.0, 2, 3, 4]), np.array([3.0, 4, 5, 6])) == 0.5


def test_texts() -> None:
    train, valid = sentences(40, 1), sentences(30, 2)
    clean = survey({"train": texts(train), "valid": texts(valid)})
    assert (clean.copies, clean.problems) == ([], [])
    valid[3] = train[5].upper() + "!"
    valid[4] = train[6]
    long = " ".join(sentences(6, 3))
    train[7], valid[8] = long, long.replace("river", "stream", 1)
    valid[9] = ""
    found = survey({"train": texts(train), "valid": texts(valid)})
    assert groups(found, "exact") == [{"train/row 6", "valid/row 4"}]
    assert groups(found, "near") == [{"train/row 5", "valid/row 3"}, {"train/row 7", "valid/row 8"}]
    assert found.splits["valid"].columns["characters"]["min"] == 0


def test_texts_that_share_most_shingles_share_a_band() -> None:
    met = 0
    for seed in range(50):
        letters = "".join(np.random.default_rng(seed).choice(list("abcdefghij"), 400))
        other = letters[:200] + "zz" + letters[202:]
        assert len(shingles_of(letters)) > 350
        met += bool({*min_hash(letters)[1:]} & {*min_hash(other)[1:]})
    assert met == 50


def test_recordings(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    for number in range(12):
        draws = np.random.default_rng(number)
        tones = sum(np.sin(np.arange(6000) / 8000 * 2 * np.pi * hertz) for hertz in draws.uniform(100, 3500, 4))
        wave = tones * np.interp(np.arange(6000), np.linspace(0, 6000, 9), draws.random(9)) / 8
        path = tmp_path / ("train" if number < 6 else "valid") / "ab"[number % 2] / f"{number:02}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, wave, 8000)
        if number == 1:
            first = wave

    def look() -> Survey:
        return survey({name: AudioFolder(tmp_path / name) for name in ("train", "valid")})

    clean = look()
    assert clean.copies == []
    assert clean.splits["train"].columns["seconds"]["median"] == 0.75
    assert clean.splits["train"].columns["rate"]["top"] == {"8,000 Hz": 6}
    soundfile.write(tmp_path / "valid/a/soft.wav", np.concatenate([np.zeros(900), first * 0.4]), 8000)
    soundfile.write(tmp_path / "valid/a/silent.wav", np.zeros(4000), 8000)
    soundfile.write(tmp_path / "valid/a/stereo.wav", np.stack([first, first], 1), 8000)
    (tmp_path / "valid/a/cut.wav").write_bytes((tmp_path / "valid/a/soft.wav").read_bytes()[:60])
    found = look()
    assert groups(found, "near") == [{"train/b/01.wav", "valid/a/soft.wav"}]
    assert found.copies[0].is_conflict
    assert found.splits["valid"].columns["level dB"]["min"] == -180
    assert [bad.id for bad in found.splits["valid"].bad] == ["a/cut.wav", "a/stereo.wav"]


def test_arrays_foreign_data_and_blocks() -> None:
    images = torch.from_numpy(np.stack([np.asarray(picture(i, 24, 24)) for i in range(12)])).permute(0, 3, 1, 2)
    images[7] = images[2]
    data = Arrays(image=images.contiguous(), label=torch.arange(12) % 2)
    found = survey({"train": data})
    assert groups(found, "exact") == [{"train/2", "train/7"}]
    assert found.copies[0].is_conflict
    assert found.splits["train"].classes == {"0": 6, "1": 6}
    assert len(found.splits["train"].mean) == 3

    class Own(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> Any:
            if index == 4:
                raise ValueError("gone")
            return torch.tensor([float(index), 1.0]), index % 2

    own = survey({"train": Own()}).splits["train"]
    assert [bad.got for bad in own.bad] == ["ValueError: gone"]
    assert own.classes == {"0": 4, "1": 5}
    blocks = survey({"train": TextBlocks(texts(sentences(20, 5)), 4)}).splits["train"]
    assert (blocks.kind, blocks.num_samples) == ("texts", 20)


def test_a_part_is_looked_at_alone(root: Path) -> None:
    data = ImageFolder(root / "train", image_size=32, augment=["random_resized_crop"])
    part = Part(Part(data, np.arange(2, 12)), np.array([0, 9]))
    found = survey({"train": part}).splits["train"]
    assert (found.num_samples, found.classes) == (2, {"ants": 1, "bees": 1})
    assert found.columns["width"]["min"] == 128  # the stored image, not a crop


def test_progress_ends_at_its_total(root: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    look(root, progress=lambda *told: seen.append(told))
    assert [told for told in seen if told[1] == told[2]] == [("train", 12, 12), ("valid", 10, 10)]


def test_nothing_to_survey() -> None:
    with pytest.raises(DataError, match="nothing to survey"):
        survey({})


def test_the_sheet_shows_the_pictures_and_marks_the_bad(root: Path) -> None:
    sheet = Image.open(BytesIO(contact_sheet(look(root))))
    (root / "train/ants/bad.png").write_bytes(b"")
    marked = Image.open(BytesIO(contact_sheet(look(root))))
    assert marked.height > sheet.height
    red = (np.asarray(marked) == (0xD0, 0x30, 0x30)).all(2).sum()
    assert (np.asarray(sheet) == (0xD0, 0x30, 0x30)).all(2).sum() == 0
    assert red > 100
    assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 5000  # photographs, not only panels


real = pytest.mark.skipif(not SHARED.is_dir(), reason="real data are missing: ../shared/data")


@real
def test_fashion_mnist_has_its_known_mean_and_std() -> None:
    data = IdxImages(SHARED / "fashion-mnist/t10k-images-idx3-ubyte.gz")
    found = survey({"test": Part(data, np.arange(2000))}).splits["test"]
    pixels = data.pixels[:2000] / 255
    assert found.mean == pytest.approx([pixels.mean()])
    assert found.std == pytest.approx([pixels.std()])


@real
@pytest.mark.parametrize(
    "make", [lambda image: image.resize((image.width // 2, image.height // 2)), lambda image: image]
)
def test_each_photograph_finds_its_copy_and_no_other(tmp_path: Path, make: Callable[[Any], Any]) -> None:
    data = ImageFolder(SHARED / "hymenoptera/val", image_size=64)
    for index in range(0, 60, 3):
        name = Path(data.id_of(index))
        save(tmp_path / name.parent.name / f"{index}.jpg", make(Image.fromarray(data.decoded(index))), quality=50)
    found = survey({"train": data, "valid": ImageFolder(tmp_path, image_size=64)})
    pairs = [(group.samples[0].index, int(Path(group.samples[1].id).stem)) for group in found.copies]
    assert all(one == other for one, other in pairs)
    assert len(pairs) == 20
    assert data.read(0, ChanceKey())["id"] == data.id_of(0)


@real
def test_adult() -> None:
    from torchkeep.data.frames import Form

    folder, form = SHARED / "tabular/adult", Form(is_csv=True)
    found = survey(
        {name: Table(folder / f"adult.{end}", "Y", form=form) for name, end in (("train", "data"), ("test", "test"))}
    )
    assert found.leaks["test"]["exact"] == 26
    assert any("'>50K' and '>50K.'" in row for row in problems(found))
    assert not any(row.is_over for row in found.drift)
