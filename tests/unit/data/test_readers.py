"""New inputs are read as in training by what a package keeps: the same bits, the same problems, and nothing run."""

from __future__ import annotations

import copy
import gzip
import os
from collections.abc import Callable
from datetime import date, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from PIL import Image

from torchkeep.data.arrays import Arrays
from torchkeep.data.dataset import Part, whole
from torchkeep.data.foreign import as_dataset
from torchkeep.data.inputs import InputBatch
from torchkeep.data.readers import Reader, reader_from_json, reader_to_json
from torchkeep.data.sources import DataSettings, open_data, open_source
from torchkeep.data.text import TextTable
from torchkeep.data.tokens import ByteTokenizer
from torchkeep.errors import DataError, PackageError
from torchkeep.settings import check

SIZE = 10
WORDS = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "good", "bad", "film"]


def picture(number: int, bits: int = 8) -> bytes:
    held, draws = BytesIO(), np.random.default_rng(number)
    shape = (12 + number % 3, 10)
    pixels = (
        draws.integers(0, 1 << 16, shape, np.uint16) if bits == 16 else draws.integers(0, 256, (*shape, 3), np.uint8)
    )
    Image.fromarray(pixels).save(held, "PNG")
    return held.getvalue()


def sound(number: int) -> bytes:
    held = BytesIO()
    wave = np.random.default_rng(number).normal(0, 0.1, 800 + 100 * (number % 4))
    soundfile.write(held, wave, 8000 if number % 3 else 16000, format="WAV")
    return held.getvalue()


def text(number: int) -> bytes:
    return f"a {('good', 'bad')[number % 2]} film, number {number} {'or so ' * (number % 4)}".encode()


def write_folder(root: Path, ending: str, make: Callable[[int], bytes]) -> None:
    for number in range(SIZE):
        path = root / ("ants", "bees")[number % 2] / f"{number}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make(number))


def write_files(root: Path) -> None:
    """Each kind of data, and a tokenizer, below ``root``."""
    for name, ending, make in (
        ("images", ".png", picture), ("deep", ".png", lambda i: picture(i, 16)), ("sounds", ".wav", sound),
        ("texts", ".txt", text),
    ):  # fmt: skip
        write_folder(root / name, ending, make)
    labels = [("ants", "bees")[i % 2] for i in range(SIZE)]
    pq.write_table(pa.table({"scan": [picture(i) for i in range(SIZE)], "y": labels}), root / "images.parquet")
    pq.write_table(pa.table({"audio": [sound(i) for i in range(SIZE)], "label": labels}), root / "sounds.parquet")
    cells = [text(i).decode() for i in range(SIZE)]
    (root / "texts.csv").write_text(
        "review,label\n" + "".join(f'"{c}",{n}\n' for c, n in zip(cells, labels, strict=True))
    )
    rows = [f"{i / 7 if i % 3 else '?'},{date(2024, 1, 1) + timedelta(3 * i)},{labels[i]},00{i % 4},{20 + 3 * i}.5"
            for i in range(SIZE)]  # fmt: skip
    (root / "numbers.csv").write_text("\n".join(["x,when,insect,code,price", *rows]) + "\n")
    (root / "new.csv").write_text(
        "code,insect,when,x\n007,ants,2026-02-03,\n002,wasps,,-1e3\n003,,2023-01-01 10:00,4\n"
    )
    (root / "bare.data").write_text("".join(row + "\n" for row in rows))
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, 9, 9), np.uint8)
    for name, values in (("images-idx3", pixels), ("labels-idx1", np.arange(SIZE, dtype=np.uint8) % 2)):
        head = b"\0\0\x08" + bytes([values.ndim]) + np.array(values.shape, ">u4").tobytes()
        (root / f"digits-{name}-ubyte.gz").write_bytes(gzip.compress(head + values.tobytes()))
    write_tokenizer(root / "words.json")


def write_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    made.save(str(path))


CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "images": ({"train": "images", "image_size": 8, "crop_fraction": 0.875, "mean": [0.1, 0.2, 0.3]},
               ["images", "bad.png"]),
    "grey images": ({"train": "images", "image_size": 7, "channels": 1}, ["images"]),
    "images of 16 bits": ({"train": "deep", "image_size": 8, "bits": 16, "channels": 1}, ["deep", "bad.png"]),
    "images of one size": ({"train": "images.parquet", "image": "scan", "label": "y"}, ["images.parquet", "images"]),
    "idx images": ({"train": "digits-images-idx3-ubyte.gz", "image_size": 8}, ["images", "bad.png"]),
    "augmented images": ({"train": "images", "image_size": 8, "augment": ["random_resized_crop"]}, ["images"]),
    "a table": ({"train": "numbers.csv", "target": "insect", "categories": ["code"], "drop": ["price"]},
                ["numbers.csv", "new.csv"]),
    "a table that draws a number": ({"train": "numbers.csv", "target": "price"}, ["numbers.csv", "new.csv"]),
    "a table without a header": (
        {"train": "bare.data", "format": "csv", "columns": ["x", "when", "insect", "code", "price"], "target": "price",
         "categories": ["code"]}, ["bare.data"]),
    "bytes": ({"train": "texts", "tokenizer": "bytes", "max_length": 12}, ["texts", "bad.txt"]),
    "words": ({"train": "texts.csv", "text": "review"}, ["texts.csv", "texts", "bad.txt"]),
    "words of a tokenizer": ({"train": "texts.csv", "text": "review", "tokenizer": "words.json"}, ["texts.csv"]),
    "log-mels": ({"train": "sounds", "num_mels": 10}, ["sounds", "bad.wav", "sounds.parquet"]),
    "waveforms": ({"train": "sounds.parquet", "seconds": 0.1, "features": "waveform", "sample_rate": 4000,
                   "audio_channels": "mix"}, ["sounds.parquet", "sounds"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("readers")
    write_files(root)
    for name, data in (("bad.png", picture(0)[:60]), ("bad.wav", sound(1)[:-3]), ("bad.txt", b"\xff")):
        (root / name).write_bytes(data)
    return root


def settings_of(case: str) -> DataSettings:
    return check(DataSettings, {"valid_fraction": 0.2, "split_by": "random", **CASES[case][0]}, case)


def kept(dataset: Any, settings: DataSettings | None = None) -> Reader:
    """The reader as another process finds it: of bytes alone."""
    data, blobs = reader_to_json(dataset, settings)
    return reader_from_json(orjson.loads(orjson.dumps(data)), blobs)


def assert_same(found: list[InputBatch], expected: list[InputBatch]) -> None:
    assert [batch.names for batch in found] == [batch.names for batch in expected]
    assert [batch.problems for batch in found] == [batch.problems for batch in expected]
    for one, other in zip(found, expected, strict=True):
        assert (one.batch is None) == (other.batch is None)
        for name, tensor in (other.batch or {}).items():
            given = (one.batch or {})[name]
            assert given.dtype == tensor.dtype and torch.equal(given, tensor), name  # noqa: PT018
        assert (one.batch or {}).keys() == (other.batch or {}).keys()


@pytest.mark.parametrize("case", CASES)
def test_inputs_are_read_as_those_of_the_training_data(place: Path, case: str) -> None:
    settings = settings_of(case)
    train = open_data(settings, place, 0).train
    assert isinstance(train, Part)  # a fraction of it is set apart, as in most runs
    reader = kept(train, settings)
    assert reader.schema == train.schema
    paths = [place / name for name in CASES[case][1]]
    expected = list(Reader(train, settings).batches(paths, 4))
    assert len(expected) > 1
    assert_same(list(reader.batches(paths, 4)), expected)
    assert any(batch.problems for batch in expected) >= any(path.stem == "bad" for path in paths)
    again, blobs = reader_to_json(reader.like, reader.settings)
    assert (again, blobs) == reader_to_json(train, settings)


@pytest.mark.parametrize("case", CASES)
def test_labelled_data_are_opened_like_the_reader(place: Path, case: str) -> None:
    settings = settings_of(case)
    train = open_data(settings, place, 0).train
    reader, source = kept(train, settings), settings.train
    expected = open_source(settings, source, place, like=train, train=False)
    opened = open_source(reader.settings, source, place, like=reader.like, train=False)
    assert opened.schema == expected.schema
    assert opened.fingerprint() == expected.fingerprint()


def test_a_reader_reads_without_the_training_data(place: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "train", ".png", picture)
    settings = check(DataSettings, {"train": "train", "image_size": 8}, "test")
    data, blobs = reader_to_json(open_data(settings, tmp_path, 0).train, settings)
    for path in (tmp_path / "train").rglob("*.png"):
        path.unlink()
    assert str(tmp_path) not in orjson.dumps(data).decode()
    (batch,) = reader_from_json(data, blobs).batches(place / "images/ants/0.png", 4)
    assert batch.batch is not None
    assert batch.batch["image"].shape == (1, 3, 8, 8)


def test_columns_texts_and_tensors(place: Path) -> None:
    reader = kept(open_data(settings_of("a table"), place, 0).train, settings_of("a table"))
    (expected,) = reader.batches(place / "new.csv", 4)
    columns = {"x": ["", "-1e3", "4"], "code": ["007", "002", "003"], "insect": ["ants", "wasps", None],
               "when": ["2026-02-03", None, "2023-01-01 10:00"], "more": [1, 2, 3],
               "price": [1.0, 2.0, None]}  # fmt: skip
    (found,) = reader.batches(columns, 4)
    assert found.names == ["row 0", "row 1", "row 2"]
    assert_same([InputBatch(expected.names, found.batch, {})], [expected])
    with pytest.raises(DataError, match="make no table"):
        list(reader.batches(columns | {"x": [1]}, 4))
    with pytest.raises(DataError, match="no column 'when'"):
        list(reader.batches({"x": [1]}, 4))

    reader = kept(open_data(settings_of("words"), place, 0).train, settings_of("words"))
    paths = [place / f"texts/ants/{i}.txt" for i in (0, 2)]
    (expected,) = reader.batches(paths, 4)
    texts = [path.read_text() for path in paths]
    for given in (texts, {"review": texts}):
        (found,) = reader.batches(given, 4)
        assert_same([InputBatch(expected.names, found.batch, {})], [expected])
    (alone,) = reader.batches("lost.txt", 4)  # a text, for it is no Path
    assert alone.names == ["row 0"]
    with pytest.raises(DataError, match="no such input"):
        list(reader.batches(Path("lost.txt"), 4))

    reader = kept(open_data(settings_of("images"), place, 0).train, settings_of("images"))
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 8), np.uint8)
    pixels.flags.writeable = False
    for tensors in (pixels, torch.from_numpy(pixels.copy()), {"image": pixels}):
        batches = list(reader.batches(tensors, 4))
        assert [batch.names for batch in batches] == [["0", "1", "2", "3"], ["4"]]
        assert torch.equal(torch.cat([(b.batch or {})["image"] for b in batches]), torch.from_numpy(pixels.copy()))
    (expected,) = reader.batches([place / "images/bees/1.png", place / "bad.png"], 4)
    (found,) = reader.batches({"image": [picture(1), picture(0)[:60]]}, 4)
    assert_same([found], [InputBatch(["row 0", "row 1"], expected.batch, expected.problems)])
    for wrong, said in ((pixels[0], "other axes"), ({"image": pixels, "x": pixels[:1]}, "not as many"),
                        ([], "no inputs"), ([pixels], "no inputs"), ({"image": [[1]]}, "holds no images")):  # fmt: skip
        with pytest.raises(DataError, match=said):
            list(reader.batches(wrong, 4))


def test_classes_of_masks_are_those_of_training(tmp_path: Path) -> None:
    for number in range(3):
        for folder in ("images", "masks"):
            path = tmp_path / folder / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(np.full((8, 8), number, np.uint8)).save(path)
    masks = {"masks": "masks", "mask_classes": ["ground", "ant", "bee"]}
    settings = check(DataSettings, {"train": "images", "image_size": 4, "channels": 1, **masks}, "test")
    train = open_data(settings, tmp_path, 0).train
    reader = kept(train, settings)
    labelled = reader.settings.model_copy(update={"masks": "masks"})  # a folder, which no package names
    opened = open_source(labelled, "images", tmp_path, like=reader.like, train=False)
    assert (opened.schema, opened.fingerprint()) == (train.schema, train.fingerprint())
    assert reader.settings.masks is None


def test_a_stream_is_read_by_its_reader(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    kinds = datasets.Features({"content": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"content": [text(i).decode() for i in range(SIZE)], "label": [i % 2 for i in range(SIZE)]}
    datasets.Dataset.from_dict(rows, features=kinds).save_to_disk(str(tmp_path / "saved"))
    stream = {"train": "saved", "streaming": True, "length": SIZE, "tokenizer": "bytes"}
    settings = check(DataSettings, stream, "test")
    train = open_data(settings, tmp_path, 0).train
    reader = kept(train, settings)
    assert reader.schema == train.schema
    assert_same(list(reader.batches(["good"], 4)), list(Reader(train, settings).batches(["good"], 4)))


def test_texts_in_blocks_know_their_tokenizer(place: Path) -> None:
    data = {"train": "texts.csv", "text": "review", "block_size": 4}
    settings = check(DataSettings, data, "test")
    train = open_data(settings, place, 0).train
    reader = kept(train, settings)
    opened = open_source(reader.settings, "texts.csv", place, like=reader.like, train=False)
    assert opened.fingerprint() == train.fingerprint()
    with pytest.raises(DataError, match="does not take files"):
        list(reader.batches(place / "bad.txt", 4))


def test_columns_of_the_hub_and_several_labels(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = {
        "sentence": [text(i).decode() for i in range(SIZE)],
        "label": ["a|b" if i % 2 else "c" for i in range(SIZE)],
    }
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "new.csv").write_text("sentence,label\na good film,b\n")
    settings = check(DataSettings, {"train": "saved", "separator": "|"}, "test")
    train = open_data(settings, tmp_path, 0).train
    reader = kept(train, settings)
    assert_same(
        list(reader.batches(tmp_path / "new.csv", 4)), list(Reader(train, settings).batches([tmp_path / "new.csv"], 4))
    )
    opened = open_source(reader.settings, "new.csv", tmp_path, like=reader.like, train=False)
    assert opened[0]["label"].tolist() == [0, 1, 0]


@pytest.mark.parametrize("dataset", [
    Arrays(input=np.zeros((6, 3), np.float32), label=np.arange(6) % 2),
    as_dataset([(torch.zeros(3), 1)] * 4),
])  # fmt: skip
def test_of_other_data_there_is_the_schema(dataset: Any, place: Path) -> None:
    data, blobs = reader_to_json(dataset, None)
    assert (data["kind"], blobs) == ("tensors", {})
    reader = reader_from_json(data, blobs)
    assert reader.schema == dataset.schema
    assert len(whole(reader.like)) == 0
    given = torch.ones(5, 3)
    for inputs in (given, {"input": given.numpy()}):
        batches = list(reader.batches(inputs, 4))
        assert torch.equal(torch.cat([(batch.batch or {})["input"] for batch in batches]), given)
    with pytest.raises(DataError, match="does not take files"):
        list(reader.batches(place / "bad.png", 4))


class Letters(ByteTokenizer):
    """A tokenizer of the user's own."""

    def to_json(self) -> Any:
        return {"kind": "letters"}


def test_what_cannot_be_kept_is_said(place: Path) -> None:
    texts = TextTable(pa.table({"text": ["a", "b"]}), target=None, tokenizer=Letters())
    with pytest.raises(DataError, match="cannot be kept") as caught:
        reader_to_json(texts, None)
    assert "tokenizer" in caught.value.where
    assert "letters" in caught.value.got
    for classes in (("\udcff", "a"), (1, 2)):
        arrays = Arrays(input=np.zeros((2, 3)), label=np.array([0, 1]))
        object.__setattr__(arrays.schema["label"], "classes", classes)
        with pytest.raises(DataError, match="cannot be kept"):
            reader_to_json(arrays, None)


def change(data: Any, path: str, value: Any) -> Any:
    """A copy with one value set, or with a key removed where it is ``...``."""
    made = held = copy.deepcopy(data)
    *sections, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    for section in sections:
        held = held[section]
    if value is ...:
        del held[last]
    else:
        held[last] = value
    return made


NAN, SIDE, HUGE = float("nan"), 65_537, 1 << 40
HOSTILE: dict[str, list[tuple[str, Any]]] = {
    "images": [
        ("kind", "os.system"), ("kind", "audio"), ("kind", "tensors"), ("kind", ...), ("odd", 1), ("schema", ...),
        ("schema", []), ("settings/image_size", SIDE), ("settings/image_size", HUGE), ("settings/image_size", 0),
        ("settings/image_size", -8), ("settings/image_size", True), ("settings/image_size", "8"),
        ("settings/image_size", 9), ("settings/image_size", 8.5), ("settings/image", ...),
        ("settings/train", "/etc/passwd"),
        ("settings/masks", "../.."), ("settings/augment", ["horizontal_flip"]), ("settings/format", "pickle"),
        ("settings/columns", [1]), ("settings", None), ("schema/fields/image/shape", [3, 8]),
        ("schema/fields/image/shape", [3, SIDE, SIDE]), ("schema/fields/image/shape", [4, 8, 8]),
        ("schema/fields/image/shape", None), ("schema/fields/image/kind", "object"), ("schema/fields/image", ...),
        ("schema/fields/label/std", 0), ("schema/fields/label/std", NAN), ("schema/fields/label/mean", 1e999),
        ("schema/fields/label/classes", [1, 2]), ("schema/fields/label/is_target", False),
        ("schema/fields/label/is_target", 1), ("schema/fields/label/odd", 1), ("schema/fields/label/num_tokens", -1),
        ("schema/fields/label/num_tokens", HUGE), ("schema/fields/more", {"kind": "image"}),
        ("schema/preprocess", None), ("schema/preprocess/mean", [0.1]), ("schema/preprocess/std", [1, 1, 0]),
        ("schema/preprocess/std", [1, 1, NAN]), ("schema/preprocess/crop_fraction", 0),
        ("schema/preprocess/crop_fraction", 1e-400), ("schema/preprocess/bits", 32),
        ("schema/preprocess/image_size", 9),
        ("schema/preprocess/channels", 1), ("schema/preprocess/odd", 1), ("encoding", {}),
        ("tokenizer", {"kind": "bytes"}), ("schema/fields", {"deep": [[]]}),
    ],
    "a table": [
        ("encoding", ...), ("encoding/features/0/part", "__class__"), ("encoding/features/0/deviation", 0),
        ("encoding/features/0/deviation", NAN), ("encoding/features/0/mean", "1"), ("encoding/features/0/odd", 1),
        ("encoding/features", []), ("encoding/vocabularies", []), ("encoding/categories", ["code", "x", "y"]),
        ("encoding/classes", []), ("encoding/classes", ["ants"]), ("encoding/task", "regression"),
        ("encoding/task", "both"), ("encoding/odd", 1), ("encoding/vocabularies/0", [1]), ("settings/image", "x"),
        ("schema/fields/numbers/shape", [99]), ("schema/fields/more", {"kind": "number", "is_target": True}),
    ],
    "log-mels": [
        ("settings/sample_rate", None), ("settings/sample_rate", HUGE), ("settings/sample_rate", 10),
        ("settings/num_mels", 100_000), ("settings/num_mels", 11), ("settings/seconds", 1e12),
        ("settings/seconds", 1e-9), ("settings/features", "os.system"), ("settings/audio_channels", 2),
        ("settings/audio_channels", 3), ("schema/fields/audio/shape", [10, 7]),
    ],
    "words": [
        ("tokenizer", ...), ("tokenizer/kind", "file.py:f"), ("tokenizer/words", [1]), ("tokenizer/words", None),
        ("tokenizer/words", ["one"]), ("tokenizer/pattern", "(a+)+$"), ("tokenizer/odd", 1),
        ("tokenizer", {"kind": "hub", "name": "/etc/passwd", "pad_id": 0}), ("settings/max_length", 1),
        ("settings/tokenizer", "/etc/passwd"), ("settings/block_size", 2), ("settings/label_pattern", "(a+)+$"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_json_is_refused(place: Path, case: str) -> None:
    data, blobs = reader_to_json(open_data(settings_of(case), place, 0).train, settings_of(case))
    assert reader_from_json(data, blobs).schema
    for path, value in HOSTILE[case]:
        changed = change(data, path, value)
        with pytest.raises(PackageError) as caught:
            reader_from_json(changed, blobs)
        assert caught.value.where.startswith("how inputs are read"), path
        assert len(str(caught.value)) < 2000, path
    others: list[Any] = [None, [], 1, "x", {}, {"kind": "image"}]
    for other in others:
        with pytest.raises(PackageError):
            reader_from_json(other, blobs)


@pytest.mark.parametrize("text", [
    b"", b"{}", b"\xff\xfe", b'{"version": "1.0", "model": {"type": "WordLevel", "vocab": {}, "unk_token": "x"}}',
])  # fmt: skip
def test_a_damaged_tokenizer_is_refused(place: Path, text: bytes) -> None:
    settings = settings_of("words of a tokenizer")
    data, blobs = reader_to_json(open_data(settings, place, 0).train, settings)
    assert blobs["tokenizer.json"].startswith(b"{")
    with pytest.raises(PackageError, match="not what was written"):
        reader_from_json(data, {"tokenizer.json": text})
    with pytest.raises(PackageError, match="not what was written"):
        reader_from_json(data, {})
    panics = blobs["tokenizer.json"].replace(b'"id": "[CLS]"', b'"id": "[ODD]"', 1)  # the Rust side's own panic
    assert panics != blobs["tokenizer.json"]
    with pytest.raises(PackageError, match="not what was written"):
        reader_from_json(data, {"tokenizer.json": panics})


def test_nothing_that_the_json_names_is_opened(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of("words of a tokenizer")
    data, blobs = reader_to_json(open_data(settings, place, 0).train, settings)
    data = change(data, "tokenizer/name", str(place / "bad.txt"))

    def refuse(*given: Any, **_: Any) -> Any:
        raise AssertionError(f"opened {given[0]}")

    for owner, name in ((os, "open"), (os, "stat"), (Path, "open"), (Path, "read_bytes"), (Path, "read_text")):
        monkeypatch.setattr(owner, name, refuse)
    reader = reader_from_json(data, blobs)
    monkeypatch.undo()
    assert reader.settings.train == ""
