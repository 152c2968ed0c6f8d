"""A predictor answers as its model does, whatever it is given and whoever reads it; its rows come out right."""

from __future__ import annotations

import csv
import io
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import torchkeep as tk
from torchkeep.contracts import Field
from torchkeep.data.readers import Reader
from torchkeep.data.sources import DataSettings, open_data
from torchkeep.errors import DataError, RunFolderError, SettingsError
from torchkeep.settings import check
from torchkeep.share.contract import Asked, Contract
from torchkeep.share.predict import Prediction
from torchkeep.share.rows import Rows, inputs_of, job_of, row_of, stream_rows, write_rows

CLASSES = ("ants", "bees", "=wasps")


def reader_of(place: Path, **data: Any) -> Reader:
    settings = check(DataSettings, data, "here")
    return Reader(open_data(settings, place, 0).train, settings)


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    draws = np.random.default_rng(0)
    for number in range(18):
        path = tmp_path / "train" / CLASSES[number % 3] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 255, (9, 9, 3), dtype=np.uint8)).save(path)
    return tmp_path


class Counted(nn.Module):
    """A linear model that counts the samples that it was asked about."""

    def __init__(self, num_classes: int = 3, most: int = 1 << 30):
        super().__init__()
        self.seen, self.most = 0, most
        self.register_buffer("weight", torch.randn(num_classes, 192, generator=torch.Generator().manual_seed(0)))

    def forward(self, image: Tensor) -> Tensor:
        if self.seen + len(image) > self.most:
            raise KeyboardInterrupt
        self.seen += len(image)
        return image.flatten(1) @ self.weight.T


def predictor_of(place: Path, model: nn.Module | None = None, **options: Any) -> tk.Predictor:
    contract = Contract(reader_of(place, train="train", image_size=8), "cross_entropy", batch_size=4,
                        calibration={"temperature": 5.0})  # fmt: skip
    return tk.Predictor(Asked(model or Counted(), contract, "cpu"), **options)


# --- answers


def test_the_answers_are_those_of_the_bare_model_in_order_whoever_reads(pictures: Path) -> None:
    predictor = predictor_of(pictures, workers=0)
    (batch,) = (part.batch for part in predictor.asked.contract.reader.batches(Path("train"), 99))
    assert batch is not None
    with torch.no_grad():
        # the preprocessing of training: mean and deviation one half
        logits = predictor.asked.model((batch["image"].float() / 255 - 0.5) / 0.5)
    torch.testing.assert_close(predictor.outputs(batch), logits)
    wanted = (logits / 5).softmax(1).max(1)
    found = predictor(Path("train"))
    order = sorted(CLASSES)
    assert [said.label for said in found] == [order[i] for i in wanted.indices.tolist()]
    assert [said.probability for said in found] == pytest.approx(wanted.values.tolist(), rel=1e-4)
    files = sorted(Path("train").rglob("*.png"))
    assert [said.input for said in found] == [file.as_posix() for file in files]
    for workers in (1, 3, "auto"):
        other = predictor_of(pictures, workers=workers)
        assert other(files) == found
    assert [said.label for said in predictor(list(map(str, files[:1])))] == [found[0].label]


def test_tensors_arrays_and_datasets_say_the_same(pictures: Path) -> None:
    predictor = predictor_of(pictures, batch_size=5, top=2)
    images = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = predictor(images)
    assert [said.input for said in found] == list(map(str, range(12)))
    assert all(said.top[0] == (said.label, said.probability) and said.top[0][1] >= said.top[1][1] for said in found)
    assert predictor(images.numpy()) == predictor({"image": images}) == predictor(tk.Arrays(image=images)) == found
    assert predictor([{"image": image} for image in images]) == found
    of_pairs = tk.Predictor(predictor.asked, batch_size=5, top=2, collate=lambda samples: {
        "image": torch.stack([sample["input"] for sample in samples])})  # fmt: skip
    assert of_pairs(TensorDataset(images, torch.zeros(12))) == found


def test_samples_of_a_dataset_that_cannot_be_read_are_rows(pictures: Path) -> None:
    class Torn(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> Any:
            if index in (1, 2, 3, 6):
                raise ValueError(f"half of {index}")
            return {"image": torch.full((3, 8, 8), index, dtype=torch.uint8)}

    found = predictor_of(pictures, batch_size=2, workers=0)(Torn())
    assert [said.error for said in found] == [
        f"ValueError: half of {i}" if i in (1, 2, 3, 6) else None for i in range(8)
    ]
    assert [said.input for said in found] == list(map(str, range(8)))


def test_a_stream_that_is_left_ends_its_threads(pictures: Path) -> None:
    before = threading.active_count()
    stream = predictor_of(pictures, workers=2).stream(Path("train"))
    assert next(stream).label
    assert threading.active_count() > before
    stream.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_an_error_in_reading_ahead_is_said(pictures: Path) -> None:
    (pictures / "train/rows.csv").write_text("words\nhello\n")
    with pytest.raises(DataError, match="does not take this table"):
        predictor_of(pictures, workers=2)([Path("train"), Path("train/rows.csv")])
    for options in ({"top": 0}, {"batch_size": 0}, {"workers": -1}):
        with pytest.raises(SettingsError, match="cannot be predicted with"):
            predictor_of(pictures, **options)


def test_texts_are_given_as_they_are(tmp_path: Path) -> None:
    texts = [f"{'good' if i % 2 else 'bad'} film" for i in range(8)]
    (tmp_path / "texts.csv").write_text("text,label\n" + "".join(f"{t},{'np'[i % 2]}\n" for i, t in enumerate(texts)))
    reader = reader_of(tmp_path, train="texts.csv")

    class Length(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return torch.stack([tokens.float().mean(1), torch.ones(len(tokens))], 1)

    predictor = tk.Predictor(Asked(Length(), Contract(reader, "cross_entropy"), "cpu"))
    found = predictor(texts[:2])
    assert [said.input for said in found] == ["row 0", "row 1"]
    assert predictor(texts[0]) == found[:1]
    given, _, _ = inputs_of(reader, ["-"], lambda: "bad film\r\ngood film\n\nwörter\n".encode())
    assert given == ["bad film", "good film", "", "wörter"]
    with pytest.raises(SettingsError, match="stands alone"):
        inputs_of(reader, ["-", "a.txt"], lambda: b"a text")
    with pytest.raises(DataError, match="not UTF-8") as caught:
        inputs_of(reader, ["-"], lambda: b"good\n\xff")
    assert caught.value.where.endswith("line 2")
    with pytest.raises(DataError, match="nothing to predict"):
        inputs_of(reader, ["-"], lambda: b"\n")


def test_a_table_on_standard_input_is_read_as_a_file_is(tmp_path: Path) -> None:
    text = "code,x,kind\n" + "".join(f"{i % 3:03},{i},{'ab'[i % 2]}\n" for i in range(9))
    (tmp_path / "rows.csv").write_text(text)
    reader = reader_of(tmp_path, train="rows.csv", target="kind")
    given, paths, data = inputs_of(reader, ["-"], text.encode)
    assert (paths, data) == ([], text.encode())
    (expected,) = reader.batches(tmp_path / "rows.csv", 99)
    (found,) = reader.batches(given, 99)
    assert expected.batch is not None
    assert found.batch is not None
    assert all(torch.equal(found.batch[name], value) for name, value in expected.batch.items())
    with pytest.raises(DataError, match="more than once"):
        inputs_of(reader, ["-"], lambda: b"x,x\n1,2\n")


# --- rows


def names_in(data: bytes) -> list[str]:
    return [row["input"] for row in csv.DictReader(io.StringIO(data.decode(), newline=""))]


@pytest.mark.skipif(os.name != "posix", reason="such names are no names there")
def test_odd_names_come_out_right(pictures: Path) -> None:
    odd = ['a,"b".png', "new\nline.png", "cr\rlf.png", "=1+1.png", " blank .png", "süß.png"]
    whole = Path("train/ants/00.png").read_bytes()
    files = [os.fsencode(name) for name in odd] + [b"raw\xff.png"]
    for file in files:
        with open(file, "wb") as made:
            made.write(whole)
    predictor = predictor_of(pictures)
    found, paths, _ = inputs_of(predictor.asked.contract.reader, ["-"], lambda: b"\0".join(files) + b"\0")
    assert found.are_files
    assert inputs_of(predictor.asked.contract.reader, ["-"], lambda: b'\na,"b".png\r\n\n')[1] == [Path(odd[0])]
    assert [os.fsencode(path) for path in paths] == files
    shown = [*odd, "raw\\xff.png"]
    assert names_in(b"".join(lines for lines, _, _ in stream_rows(predictor, found, "csv"))) == shown
    lines = b"".join(lines for lines, _, _ in stream_rows(predictor, found, "jsonl")).decode().splitlines()
    assert [json.loads(line)["input"] for line in lines] == shown
    write_rows(predictor, found, pictures / "out.parquet", "parquet", {"of": "names"}, abs, print)
    assert pq.read_table("out.parquet")["input"].to_pylist() == shown


def test_each_form_says_the_same(pictures: Path) -> None:
    predictor = predictor_of(pictures, top=3)
    (pictures / "bad.png").write_bytes(b"no image")
    found = predictor.asked.contract.reader.found([Path("train"), Path("bad.png")])
    num_bad = {}
    for form in ("csv", "jsonl", "parquet"):
        num_bad[form] = write_rows(predictor, found, pictures / f"out.{form}", form, {"of": form}, abs, print)
    assert set(num_bad.values()) == {1}
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert rows == [json.loads(orjson.dumps(row_of(said))) for said in predictor(found)]
    parquet = pq.read_table("out.parquet").to_pylist()
    assert [{name: value for name, value in row.items() if value is not None} for row in parquet] == rows
    table = list(csv.DictReader(io.StringIO(Path("out.csv").read_text())))
    assert list(table[0]) == ["input", "label", "probability", "label_2", "probability_2", "label_3", "probability_3",
                              "value", "error"]  # fmt: skip
    assert [row["label_2"] for row in table[:-1]] == [row["top"][1]["label"] for row in rows[:-1]]
    assert [float(row["probability_3"]) for row in table[:-1]] == [row["top"][2]["probability"] for row in rows[:-1]]
    assert table[-1]["error"] == rows[-1]["error"]
    assert any(row["label"] == "=wasps" for row in table)  # as it is


def test_several_numbers_and_several_labels_have_their_columns(pictures: Path) -> None:
    asked = predictor_of(pictures).asked
    three = tk.Arrays(image=torch.zeros(2, 3, 8, 8), target=torch.zeros(2, 3))
    numbers = tk.Predictor(Asked(asked.model, Contract(Reader(three, asked.contract.reader.settings), "mse"), "cpu"))
    [said] = numbers(torch.ones(1, 3, 8, 8))
    assert said.values == pytest.approx(asked.model(torch.ones(1, 3, 8, 8))[0].tolist())
    with pytest.raises(SettingsError, match="cannot be predicted with"):
        tk.Predictor(numbers.asked, top=2)
    rows = Rows(numbers, "csv")
    assert rows.head() == b"input,label,probability,value,values,error\n"
    [row] = csv.DictReader(io.StringIO((rows.head() + rows.lines([row_of(said)])).decode()))
    assert json.loads(row["values"]) == list(said.values)
    several = Field("multilabel", (3,), CLASSES, is_target=True)
    reader = asked.contract.reader
    reader.like.schema = type(reader.schema)({**reader.schema.fields, "label": several}, reader.schema.preprocess)
    labels = tk.Predictor(Asked(asked.model, Contract(reader, "binary_cross_entropy"), "cpu"), top=2)
    assert Rows(labels, "csv").head().startswith(b"input,label,probability,label_1,probability_1,label_2")


# --- jobs


def told_of(place: Path, model: Counted, words: Sequence[str] = ("train",), **options: Any) -> list[str]:
    """What is told while a job runs that may be ended by its model."""
    predictor = predictor_of(place, model, workers=0, **options)
    found, paths, given = inputs_of(predictor.asked.contract.reader, words, bytes)
    told: list[str] = []
    counts: list[int] = []
    try:
        job = job_of(predictor, paths, given)
        write_rows(predictor, found, place / "out.csv", "csv", job, counts.append, told.append)
    except KeyboardInterrupt:
        told.append("ended")
    assert sum(counts) == 18 or told[-1] == "ended"
    return told


@pytest.mark.parametrize("most", [4, 9, 17])
def test_an_ended_job_goes_on_behind_its_finished_rows_to_the_same_bytes(pictures: Path, most: int) -> None:
    told_of(pictures, Counted())
    whole = Path("out.csv").read_bytes()
    Path("out.csv").unlink()
    part, done = pictures / ".out.csv.part", most // 4 * 4
    said = told_of(pictures, Counted(most=most))
    assert said == [f"{done} rows are kept in {part}: the same command goes on behind them", "ended"]
    assert not Path("out.csv").exists()
    with part.open("ab") as file:
        file.write(b'[{"input":"half of a li')  # what a kill leaves
    model = Counted()
    assert told_of(pictures, model) == [f"{done} rows were finished before"]
    assert model.seen == 18 - done  # nobody is asked twice
    assert Path("out.csv").read_bytes() == whole
    assert not part.exists()


def test_a_part_of_another_job_is_started_over(pictures: Path) -> None:
    told_of(pictures, Counted())
    whole = Path("out.csv").read_bytes()

    def part_left() -> None:
        assert told_of(pictures, Counted(most=8))[-1] == "ended"

    part_left()
    other = Counted()
    other.weight += 1
    [said] = told_of(pictures, other)
    assert "whose model differ: it is started over" in said
    assert other.seen == 18
    part_left()
    [said] = told_of(pictures, Counted(), top=2)
    assert "options" in said
    part_left()
    os.utime("train/ants/00.png", ns=(1, 1))
    [said] = told_of(pictures, Counted())
    assert "inputs" in said
    assert Path("out.csv").read_bytes() == whole
    for torn in (b"no json\n[]\n", b"", b"{}\n", b"[1]\n"):
        Path(".out.csv.part").write_bytes(torn)
        told_of(pictures, Counted())
        assert Path("out.csv").read_bytes() == whole


def test_inputs_that_cannot_be_used_leave_nothing(pictures: Path) -> None:
    predictor = predictor_of(pictures)
    (pictures / "rows.csv").write_text("words\nhello\n")
    with pytest.raises(DataError, match="does not take this table"):
        write_rows(predictor, [Path("rows.csv")], pictures / "out.csv", "csv", {"of": "it"}, abs, print)
    assert sorted(path.name for path in pictures.iterdir()) == ["rows.csv", "train"]


def test_two_jobs_never_write_one_output(pictures: Path) -> None:
    predictor = predictor_of(pictures)

    def seen(count: int) -> None:
        if count:
            with pytest.raises(RunFolderError, match="another process writes this output"):
                write_rows(predictor, [Path("train")], pictures / "out.csv", "csv", {"of": "it"}, abs, print)

    write_rows(predictor, [Path("train")], pictures / "out.csv", "csv", {"of": "it"}, seen, print)
    assert len(Path("out.csv").read_text().splitlines()) == 19


def test_however_many_rows_are_written_a_part_at_a_time(pictures: Path) -> None:
    class Counting(io.BytesIO):
        most = total = 0

        def write(self, data: Any) -> int:
            self.most, self.total = max(self.most, len(data)), self.total + len(data)
            return len(data)

    file = Counting()
    rows = ({"input": f"row {i}", "label": "a", "probability": 0.5} for i in range(100_000))
    Rows(predictor_of(pictures), "csv").write(rows, file)
    assert file.most < 1 << 19 < file.total
    assert Prediction("x", "a", 0.5).row() == {"input": "x", "label": "a", "probability": 0.5}
