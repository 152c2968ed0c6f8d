"""torchkeep survey on real input: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import torchkeep as tk

ROWS = "age,colour,income\n" + "".join(
    f"{20 + i},{'red' if i % 3 else 'blue'},{'low' if i % 2 else 'high'}\n" for i in range(40)
)
TEST_ROWS = "age,colour,income\n" + "".join(f"{20.5 + i},red,{'low.' if i % 2 else 'high.'}\n" for i in range(40))


def found(desk: Any, *words: object) -> Any:
    said = desk.say("survey", *words, "--json")
    assert (said.code, said.err) == (0, "")
    return json.loads(said.out)


def test_a_recipe_with_faults(desk: Any) -> None:
    desk.write_images()
    (desk.folder / "train/ants/broken.png").write_bytes(b"")
    pixels = np.asarray(Image.open(desk.folder / "train/ants/2.png"))
    desk.write_image("valid/bees/leak.png", pixels)
    before = desk.files()
    said = desk.say("survey", "images.toml")
    assert (said.code, said.err) == (0, "")
    assert desk.files() == before
    for line in (
        "split  holds      size         classes  bad",
        "ants   7      6",
        "train   ants/broken.png  this image cannot be decoded, 0 bytes",
        "warning: leak: train holds copies of 1 (exact) of the 13 samples of valid",
        "  train: ants/2.png (ants) = valid: bees/leak.png (bees)",
    ):
        assert line in said.out, f"{line!r} is missing from:\n{said.out}"


def test_clean_data_have_no_warning(desk: Any) -> None:
    desk.write_images()
    said = desk.say("survey", "images.toml")
    assert said.code == 0
    assert "warning" not in said.out
    assert "labels and samples: no problems" in said.out


def test_bad_samples_alone_one_a_line(desk: Any) -> None:
    desk.write_images()
    assert desk.say("survey", "train", "--bad").out == ""
    (desk.folder / "train/ants/broken.png").write_bytes(b"")
    assert desk.say("survey", "train", "--bad").out == (
        "train: ants/broken.png: this image cannot be decoded: 0 bytes\n".replace("train:", f"{desk.folder}/train:")
    )


def test_a_folder_of_splits_and_folders_by_name(desk: Any) -> None:
    desk.write_images()
    (desk.folder / "both").mkdir()
    (desk.folder / "train").rename(desk.folder / "both/train")
    (desk.folder / "valid").rename(desk.folder / "both/val")
    assert list(found(desk, "both")["splits"]) == ["train", "valid"]
    assert list(found(desk, "both/val", "both/train")["splits"]) == ["train", "valid"]


def test_labels_that_training_refuses_are_findings(desk: Any) -> None:
    desk.write("train.csv", ROWS)
    desk.write("test.csv", TEST_ROWS)
    result = found(desk, "train.csv", "test.csv", "--set", "data.target=income")
    assert {row["what"] for row in result["problems"]} == {
        "2 classes not in train", "labels that differ only by case, blanks or a dot",
    }  # fmt: skip
    assert [row["what"] for row in result["drift"] if row["is_over"]] == ["colour"]


@pytest.mark.parametrize(
    ("text", "assignment", "what"),
    [
        (ROWS + "61,red,\n", "data.target=income", "a target is missing"),
        (ROWS + "61,red,\n", "data.drop=[]", "the target of this table is not named"),
        (ROWS, "data.target=wage", "this table has no column 'wage'"),
    ],
    ids=["an empty cell", "no target", "no such column"],
)
def test_tables_that_training_refuses_are_looked_at(desk: Any, text: str, assignment: str, what: str) -> None:
    desk.write("rows.csv", text)
    result = found(desk, "rows.csv", "--set", assignment)
    assert any(what in row["what"] for row in result["problems"])
    assert result["splits"]["train"]["columns"]["age"]["count"] == text.count("\n") - 1


def test_texts_without_a_label_and_ids_that_name_two(desk: Any) -> None:
    rows = {"text": ["one thing", "another", "more words", "last of all"] * 5, "label": ["a", "b", "a", None] * 5}
    pq.write_table(pa.table(rows | {"name": ["x"] * 20}), desk.folder / "t.parquet")
    result = found(desk, "t.parquet", "--set", "data.id=name")
    assert any("training would refuse this" in row["what"] for row in result["problems"])
    assert result["splits"]["train"]["num_samples"] == 15


def test_a_first_image_that_is_bad(desk: Any) -> None:
    desk.write_images()
    for number in range(6):
        (desk.folder / f"train/ants/{number}.png").write_bytes(b"no image")
        (desk.folder / f"train/bees/{number}.png").write_bytes(b"no image")
    assert len(found(desk, "train")["splits"]["train"]["bad"]) == 12


def test_the_fractions_of_a_recipe(desk: Any) -> None:
    desk.write_table()
    splits = found(desk, "table.toml")["splits"]
    assert {name: split["num_samples"] for name, split in splits.items()} == {"train": 30, "valid": 10}
    assert desk.say("survey", "table.toml", "--set", "data.valid_fraction=0.5", "--json").code == 0


def test_a_folder_with_the_sheet(desk: Any) -> None:
    desk.write_images()
    said = desk.say("survey", "images.toml", "-o", "seen/deep")
    assert said.code == 0
    written = json.loads((desk.folder / "seen/deep/survey.json").read_text())
    assert written == found(desk, "images.toml")
    with Image.open(desk.folder / "seen/deep/sheet.png") as sheet:
        assert (sheet.format, sheet.width) == ("PNG", 1200)
    assert {path.name for path in (desk.folder / "seen/deep").iterdir()} == {"survey.json", "sheet.png"}


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("nothing",), "DataError: the data are missing"),
        (("empty",), "DataError: this folder is empty"),
        (("rows.txt",), "DataError: this is no source of data"),
        (("none.toml",), "SettingsError: the recipe is missing"),
        (("rows.csv", "--set", "data.tarjet=income"), "SettingsError: unknown key"),
        (("rows.csv", "--set", "target=income"), "SettingsError: unknown key"),
    ],
)
def test_what_cannot_be_looked_at(desk: Any, words: tuple[str, ...], error: str) -> None:
    (desk.folder / "empty").mkdir()
    desk.write("rows.txt", "x")
    desk.write("rows.csv", ROWS)
    said = desk.say("survey", *words)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith(error)
    assert "  where:" in said.err


def test_the_function_takes_datasets(desk: Any) -> None:
    desk.write_images()
    result = tk.survey({"train": tk.ImageFolder("train"), "mine": [(np.zeros(3), 1), (np.ones(3), 0)]})
    assert {name: split.num_samples for name, split in result.splits.items()} == {"train": 12, "mine": 2}
    assert any(row.what == "samples, where train has images" for row in result.problems)


def test_code_that_gives_data(desk: Any) -> None:
    desk.write("mine.py", "def rows(split):\n    return [([float(i)], i % 2) for i in range(10)]\n")
    assert found(desk, f"{Path('mine.py')}:rows")["splits"]["train"]["classes"] == {"0": 5, "1": 5}
