"""Training, and what the other verbs make of the run: the folder, what is printed, predictions."""

from __future__ import annotations

import csv
import io
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from torchkeep.keep.checkpoint import find_damage

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
SHORT = ("--set", "train.epochs=1", "--set", "model.args={widths=[4,8]}")


def next_commands(printed: str) -> list[str]:
    lines = printed.splitlines()
    return [line.strip() for line in lines[lines.index("next:") + 1 :]]


def test_the_digits_recipe_leaves_a_whole_run_and_its_next_commands_work(desk: Any) -> None:
    said = desk.type("train", DIGITS / "recipe.toml", *SHORT)
    assert said.code == 0
    assert said.err == ""
    assert "\x1b" not in said.out
    for word in ("best valid/accuracy", "test/accuracy", "finished after epoch 1", "samples/s", "records.jsonl"):
        assert word in said.out

    folder = desk.folder / "runs" / "digits"
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert run["recipe"]["model"]["args"] == {"widths": [4, 8]}
    assert run["recipe"]["optimizer"]["schedule"] == "one_cycle"
    assert run["seed"] == 0
    assert {row["name"] for row in run["decisions"]} >= {"device", "precision", "feeding", "loss"}
    assert all(row["reason"] for row in run["decisions"])
    assert run["data"]["fingerprints"].keys() == {"train", "valid", "test"}
    assert run["data"]["schema"]["fields"]["label"]["classes"] == list("0123456789")
    assert run["environment"]["packages"]["torchkeep"]
    assert "code" in run
    kinds = {row["kind"] for row in desk.records("runs/digits")}
    assert kinds >= {"run_start", "decision", "attempt_start", "scalars", "run_end"}
    for name in ("last", "best"):
        hint = json.loads((folder / "checkpoints" / f"{name}.json").read_text(encoding="utf-8"))
        saved = folder / "checkpoints" / hint["folder"]
        assert json.loads((saved / "manifest.json").read_text(encoding="utf-8"))["files"]
        assert find_damage(saved) == ""
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))

    commands = next_commands(said.out)
    assert [command.split()[:2] for command in commands] == [
        ["torchkeep", "evaluate"],
        ["torchkeep", "predict"],
        ["torchkeep", "package"],
        ["tensorboard", "--logdir"],
    ]
    measured = desk.type(*shlex.split(commands[0])[1:])  # in a process of its own: nothing is left of the training
    assert measured.code == 0
    end = next(row for row in desk.records("runs/digits") if row["kind"] == "run_end")
    test_loss = f"{end['metrics']['test/loss']:.3f}"
    assert any(line.split() == ["test/loss", test_loss] for line in measured.out.splitlines())

    packaged = desk.say(*shlex.split(commands[2])[1:])
    assert packaged.code == 0
    assert (desk.folder / "digits.tkp").is_file()
    inspected = desk.say("inspect", "runs/digits")
    assert inspected.code == 0
    assert "(32, 1, 8, 8)" in inspected.out
    assert "1,182" in inspected.out

    predicted = desk.say(*shlex.split(commands[1].replace("FILES", str(DIGITS / "test.parquet")))[1:])
    assert predicted.code == 0
    rows = list(csv.DictReader(io.StringIO(predicted.out)))
    assert len(rows) > 100
    assert {row["label"] for row in rows} <= set("0123456789")
    assert all(0 <= float(row["probability"]) <= 1 for row in rows)

    before = desk.parameters("runs/digits")
    resumed = desk.say("resume", "runs/digits")
    assert resumed.code == 0
    assert desk.parameters("runs/digits") == before


def test_a_table_is_trained_with_an_mlp_and_asked_for_new_rows(desk: Any) -> None:
    desk.write_table()
    said = desk.say("train", "table.toml", "--quiet")
    assert (said.code, said.out, said.err) == (0, "", "")
    desk.write("new.csv", "b,colour,more,a\n1.5,green,x,\n,,y,3\n2,red,z,4\n")
    lines = desk.say("predict", "runs/table", "new.csv", "--format", "jsonl").out.splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["input"] for row in rows] == [f"new.csv, row {row}" for row in range(3)]
    assert {row["label"] for row in rows} <= {"big", "small"}

    said = desk.say("predict", "runs/table", "new.csv", "-o", "out.csv")
    assert (said.code, said.out) == (0, "")
    written = list(csv.DictReader(io.StringIO((desk.folder / "out.csv").read_text(encoding="utf-8"))))
    assert [row["label"] for row in written] == [row["label"] for row in rows]
    desk.say("predict", "runs/table", "new.csv", "-o", "out.jsonl")
    assert (desk.folder / "out.jsonl").read_text(encoding="utf-8").splitlines() == lines

    measured = json.loads(desk.say("evaluate", "runs/table", "rows.csv", "--json").out)
    assert measured.keys() >= {"test/loss", "test/accuracy", "intervals"}
    assert json.loads(desk.say("evaluate", "runs/table", "--json").out).keys() >= {"valid/loss", "valid/accuracy"}


def test_numbers_are_predicted_where_the_target_is_a_number(desk: Any) -> None:
    desk.write_table()
    edits = ("--set", "data.target=b", "--set", 'train.metrics=["mean_absolute_error"]')
    assert desk.say("train", "table.toml", "--quiet", *edits).code == 0
    rows = list(csv.DictReader(io.StringIO(desk.say("predict", "runs/table", "rows.csv").out)))
    assert len(rows) == 40
    assert all(np.isfinite(float(row["value"])) and row["label"] == "" for row in rows)


def test_images_are_predicted_in_order_and_a_bad_one_has_a_row_that_says_why(desk: Any) -> None:
    desk.write_images()
    assert desk.say("train", "images.toml", "--quiet").code == 0
    desk.write("bad.png", "no image")
    desk.write("empty.jpg", "")
    files = ["valid/bees/1.png", "bad.png", "valid/ants/0.png", "empty.jpg", "valid/ants/1.png"]
    said = desk.type("predict", "runs/images", *files, "--format", "jsonl")
    assert said.code == 3
    assert "2 inputs could not be read" in said.err
    rows = [json.loads(line) for line in said.out.splitlines()]
    assert [row["input"] for row in rows] == files
    assert ["error" in row for row in rows] == [False, True, False, True, False]
    assert "cannot be decoded" in rows[1]["error"]
    assert " at 0x" not in rows[1]["error"]
    assert all(row["label"] in ("ants", "bees") and 0.5 <= row["probability"] <= 1 for row in rows if "label" in row)

    as_csv = desk.say("predict", "runs/images", *files)
    assert as_csv.code == 3
    table = list(csv.DictReader(io.StringIO(as_csv.out)))
    assert [row["label"] for row in table] == [row.get("label", "") for row in rows]
    to_file = desk.say("predict", "runs/images", *files, "-o", "out.jsonl")
    assert (to_file.code, to_file.out) == (3, "")
    assert (desk.folder / "out.jsonl").read_text(encoding="utf-8") == said.out

    folder = list(csv.DictReader(io.StringIO(desk.say("predict", "runs/images", "valid").out)))
    names = [path.as_posix() for path in sorted(Path("valid").rglob("*.png"))]
    assert [Path(row["input"]).as_posix() for row in folder] == names


def test_a_csv_of_image_paths_is_trained_and_predicted(desk: Any) -> None:
    desk.write_images()
    names = [f"train/{name}/{number}.png" for number in range(6) for name in ("ants", "bees")]
    desk.write("pictures.csv", "\n".join(["image,label", *(f"{name},{name.split('/')[1]}" for name in names)]) + "\n")
    edits = ("--set", "data.train=pictures.csv", "--set", "data.valid=pictures.csv")
    assert desk.say("train", "images.toml", "--quiet", *edits).code == 0
    desk.write("asked.csv", f"image\n{names[3]}\nmissing.png\n{names[0]}\n")
    said = desk.say("predict", "runs/images", "asked.csv")
    assert said.code == 3
    rows = list(csv.DictReader(io.StringIO(said.out)))
    assert [row["input"] for row in rows] == [names[3], "missing.png", names[0]]
    assert [bool(row["error"]) for row in rows] == [False, True, False]


def test_a_model_of_ones_own_file(desk: Any) -> None:
    desk.write_images()
    model = "from torch import nn\n\n\ndef build(num_classes, width):\n    return nn.Sequential("
    desk.write("nets/own.py", model + "nn.Flatten(), nn.Linear(192, width), nn.Linear(width, num_classes))\n")
    edits = ("--set", "model.name=nets/own.py:build", "--set", "model.args={width=5}")
    said = desk.say("train", "images.toml", "--quiet", *edits)
    assert (said.code, said.err) == (0, "")
    assert json.loads((desk.folder / "runs/images/run.json").read_text(encoding="utf-8"))["code_files"]
    inspected = desk.say("inspect", "runs/images", "--json")
    rows = [json.loads(line) for line in inspected.out.splitlines()]
    assert rows[0]["num_parameters"] == 192 * 5 + 5 + 5 * 2 + 2
    assert desk.say("evaluate", "runs/images").code == 0


def test_a_name_that_is_taken_gets_a_number_and_resume_auto_goes_on_with_the_newest(desk: Any) -> None:
    desk.write_table()
    for _ in range(2):
        assert desk.say("train", "table.toml").code == 0
    assert desk.runs() == ["table", "table-2"]
    first = (desk.folder / "runs/table/run.json").read_bytes()
    longer = ("--set", "train.epochs=3")
    said = desk.say("train", "table.toml", "--resume", "auto", *longer)
    assert said.code == 0
    assert "train.epochs was 2 and is 3" in said.out + said.err
    assert desk.runs() == ["table", "table-2"]
    assert (desk.last_step("runs/table"), desk.last_step("runs/table-2")) == (8, 12)
    assert (desk.folder / "runs/table/run.json").read_bytes() == first
    said = desk.say("train", "table.toml", "--run-dir", "elsewhere/mine", "--resume", "auto", "--quiet")
    assert said.code == 0
    assert desk.last_step("elsewhere/mine") == 8

    rows = [json.loads(line) for line in desk.say("runs", "--json").out.splitlines()]
    assert [(row["name"], row["status"], row["attempts"]) for row in rows] == [
        ("table", "finished", 1),
        ("table-2", "finished", 2),
    ]
    printed = desk.say("runs").out
    columns = ["run", "status", "attempts", "model", "commit", "best", "began", "time"]
    assert printed.splitlines()[0].split() == columns
    assert "table-2" in printed
    said = desk.say("runs", "nowhere")
    assert said.code == 2
    assert "there is no such folder" in said.err


def test_the_same_recipe_gives_the_same_bits(desk: Any) -> None:
    desk.write_table()
    for edits in ([], ["--set", "data.workers=2"], ["--set", "seed=1"]):
        assert desk.say("train", "table.toml", "--quiet", *edits).code == 0
    parameters = [desk.parameters(f"runs/{name}") for name in ("table", "table-2", "table-3")]
    assert parameters[0] == parameters[1] != parameters[2]


def test_schema_describes_every_key(desk: Any) -> None:
    said = desk.say("schema")
    assert (said.code, said.err) == (0, "")
    schema = json.loads(said.out)
    parts = {"recipe": schema, **schema["$defs"]}
    assert {"DataSettings", "ModelSettings", "TrainSettings", "OptimizerSettings"} <= parts.keys()
    for part, described in parts.items():
        assert described["additionalProperties"] is False, part
        for key, value in described["properties"].items():
            assert value.get("description"), f"{part}.{key}"


@pytest.mark.parametrize("verb", ["", "train", "resume", "evaluate", "predict", "inspect", "runs", "schema"])
def test_help(desk: Any, verb: str) -> None:
    said = desk.say(*verb.split(), "--help")
    assert said.code == 0
    assert said.out.startswith("Usage: torchkeep")
