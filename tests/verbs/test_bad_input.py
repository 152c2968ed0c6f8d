"""Bad input: one clear error, its exit code, and nothing half-written."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from torchkeep.keep.checkpoint import find_damage

NETS = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, outputs, bad_from=None):
        super().__init__()
        self.layer, self.bad_from = nn.Linear(2, outputs), bad_from
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, numbers, categories):
        self.calls += self.training
        bad = self.bad_from is not None and int(self.calls) >= self.bad_from
        return self.layer(numbers) * (float("nan") if bad else 1.0)


def good(num_classes):
    return Net(num_classes)


def wide(num_classes):
    return Net(num_classes + 1)


def misfit(num_classes):
    return nn.Linear(7, num_classes)


def nan(num_classes):
    return Net(num_classes, bad_from=7)


def raises(*anything):
    raise RuntimeError("no weights here")


def nothing(*anything):
    return None
"""


def only_error(said: Any, name: str, *fragments: str) -> None:
    """One message in the one form, and no trace of the program."""
    assert "Traceback" not in said.err
    lines = said.err.splitlines()
    assert lines[0].startswith(f"{name}: "), said.err
    assert all(line.startswith("  ") for line in lines[1:]), said.err
    heads = [line.split(":")[0].strip() for line in lines[1:] if line[2] != " "]
    assert heads == [head for head in ("where", "got", "expected", "fix") if head in heads], said.err
    for fragment in fragments:
        assert fragment in said.err, f"{fragment!r} is missing from: {said.err}"


def refused(desk: Any, words: tuple[str, ...], name: str, *fragments: str) -> None:
    """The command ends with exit code 2 and leaves everything as it was."""
    before = desk.files()
    said = desk.say(*words)
    only_error(said, name, *fragments)
    assert said.code == 2
    assert desk.files() == before


def set_all(edits: str) -> tuple[str, ...]:
    return tuple(word for edit in edits.split("; ") for word in ("--set", edit))


# --- the recipe


def test_a_recipe_that_cannot_be_read(desk: Any) -> None:
    desk.write_table()
    desk.write("broken.toml", "[data\ntrain = 1")
    desk.write("empty.toml", "")
    (desk.folder / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    refused(
        desk, ("train", "tabel.toml"), "SettingsError", "the recipe is missing", "where:    tabel.toml", "table.toml"
    )
    refused(desk, ("train", "."), "SettingsError", "the recipe is a folder")
    refused(desk, ("train", "broken.toml"), "SettingsError", "not TOML", "broken.toml", "line 1")
    refused(desk, ("train", "bytes.toml"), "SettingsError", "not TOML", "bytes.toml")
    refused(desk, ("train", "empty.toml"), "SettingsError", "a key is missing", "empty.toml: data")
    refused(desk, ("inspect", "tabel.toml"), "SettingsError", "the recipe is missing")


@pytest.mark.parametrize(
    ("edits", "fragments"),
    [
        ("train.epoch=3", ["unknown key", "table.toml: train.epoch", "'epochs'"]),
        ("trian.epochs=3", ["unknown key", "table.toml: trian", "'train'"]),
        ("epochs=3", ["unknown key", "table.toml: epochs"]),
        ("train.epochs=three", ["train.epochs", "'three'", "integer"]),
        ('train.epochs="3"', ["train.epochs", "'3'", "integer"]),
        ("train.epochs=1.5", ["train.epochs", "1.5"]),
        ("train.epochs=0", ["train.epochs", "greater than 0"]),
        ("train.metrics=accuracy", ["train.metrics", "list"]),
        ("train=3", ["table.toml: train", "section"]),
        ("data.train=3", ["data.train", "text"]),
        ("data.batch_size=0", ["data.batch_size", "greater than 0"]),
        ("data.workers=-1", ["table.toml: data.workers\n", "got:      -1"]),
        ("data.workers=some", ["table.toml: data.workers\n", "'some'", "'auto'"]),
        ("data.valid_fraction=1.5", ["data.valid_fraction", "1.5"]),
        ("data.valid=rows.csv", ["data.valid or data.valid_fraction"]),
        ("data.augment=['random_shif']", ["random_shif", "'random_shift'"]),
        ("optimizer.learning_rate=-1", ["optimizer.learning_rate", "greater than 0"]),
        ("optimizer.learning_rate=nan", ["optimizer.learning_rate", "nan"]),
        ("optimizer.name=adam", ["optimizer.name", "'adam'", '"adamw"']),
        ("optimizer.schedule=onecycle", ["optimizer.schedule", "'one_cycle'"]),
        ("optimizer.betas=[0.9]", ["table.toml: optimizer.betas\n", "got:      [0.9]"]),
        ("optimizer.betas=[0.9,2.0]", ["optimizer.betas"]),
        ("train.metrics=['accurasy']", ["train.metrics", "'accurasy'", "'accuracy'"]),
        ("train.metrics=['mean_absolute_error']", ["mean_absolute_error"]),
        ("train.loss=crossentropy", ["train.loss", "'crossentropy'", "'cross_entropy'"]),
        ("train.loss=mse", ["(8, 2)", "(8,)"]),
        ("train.class_weights=[1.0]", ["train.class_weights", "2"]),
        ("train.label_smoothing=0.1; train.loss=mse", ["train.label_smoothing"]),
        ("train.device=gpu", ["train.device", "'gpu'", "cpu"]),
        ("checkpoint.every=soon", ["checkpoint.every", "'soon'", "10m"]),
        ("checkpoint.every=0", ["checkpoint.every", "0"]),
        ("checkpoint.metric=valid/f1", ["checkpoint.metric", "'valid/f1'", "valid/accuracy"]),
        ("early_stopping.patience=1; early_stopping.metric=valid/f1", ["early_stopping.metric", "valid/accuracy"]),
        ("monitor.views=['tensorbord']", ["monitor.views", "tensorboard"]),
        ("name=''", ["name"]),
        ("name=a/b", ["name"]),
        ("model.name=mlpp", ["model.name", "'mlpp'", "'mlp'"]),
        ("model.name=convnet", ["model.name", "images", "mlp"]),
        ("model.args={hiden=[3]}", ["model.args.hiden", "'hidden'"]),
        ("model.args={hidden='x'}", ["model.name = 'mlp'"]),
        ("train.epochs", ["--set train.epochs", "no '='", "section.key=value"]),
        ("=3", ["--set =3", "section.key=value"]),
        ("train.epochs.more=3", ["--set train.epochs.more=3", "'epochs' is no section"]),
    ],
)
def test_a_recipe_that_cannot_mean_anything(desk: Any, edits: str, fragments: list[str]) -> None:
    desk.write_table()
    said = desk.say("train", "table.toml", *set_all(edits))
    name = "ModelError" if said.err.startswith("ModelError") else "SettingsError"
    only_error(said, name, *fragments)
    assert said.code == 2
    assert desk.files() == {"rows.csv", "table.toml"}


def test_an_error_in_a_process_of_its_own_has_its_code_and_no_traceback(desk: Any) -> None:
    desk.write_table()
    said = desk.type("train", "table.toml", "--set", "train.epoch=3")
    assert (said.code, said.out) == (2, "")
    only_error(said, "SettingsError", "train.epoch", "'epochs'")
    assert desk.files() == {"rows.csv", "table.toml"}


# --- the data


def test_tables_that_cannot_be_trained_on(desk: Any) -> None:
    desk.write_table()
    desk.write("empty.csv", "")
    desk.write("header.csv", "a,b,colour,kind\n")
    desk.write("ragged.csv", "a,kind\n1,2,3\n4\n")
    desk.write("notes.txt", "hello")
    desk.write("broken.parquet", "PAR1 and no more")
    for source, fragments in {
        "row.csv": ["the data are missing", "rows.csv"],
        "empty.csv": ["empty.csv", "no first line"],
        "header.csv": ["this table is empty", "header.csv", "0 rows"],
        "ragged.csv": ["ragged.csv", "Expected 2 columns"],
        "notes.txt": ["notes.txt", "'.txt'", "file.py:function"],
        "broken.parquet": ["broken.parquet"],
        "hf:squad": ["hf:squad"],
        "missing.py:make": ["missing.py"],
    }.items():
        name = "ModelError" if source.startswith("missing") else "DataError"
        refused(desk, ("train", "table.toml", "--set", f"data.train={source}"), name, *fragments)
    refused(desk, ("train", "table.toml", "--set", "data.target=knd"), "DataError", "'knd'", "'kind'", "rows.csv")
    refused(desk, ("train", "table.toml", "--set", "data.drop=['c']"), "DataError", "'c'")

    desk.write("no_target.toml", (desk.folder / "table.toml").read_text().replace('target = "kind"\n', ""))
    refused(desk, ("train", "no_target.toml"), "DataError", "rows.csv", "data.target")


def test_validation_data_that_do_not_fit_the_training_data(desk: Any) -> None:
    desk.write_table()
    desk.write_images()
    text = (desk.folder / "table.toml").read_text()
    desk.write("both.toml", text.replace("valid_fraction = 0.25", 'valid = "more.csv"'))
    for rows, fragments in {
        "a,b,colour,kind\n1,2,red,huge\n": ["more.csv", "'huge'", "big, small"],
        "a,colour,kind\n1,red,big\n": ["more.csv", "no column 'b'"],
        "a,b,colour,kind\nx,2,red,big\n": ["more.csv", "column 'a'", "'x'"],
    }.items():
        desk.write("more.csv", rows)
        refused(desk, ("train", "both.toml"), "DataError", *fragments)
    refused(desk, ("train", "both.toml", "--set", "data.valid=valid"), "DataError", "images", "Table")

    desk.write_image("wasps/wasps/0.png", np.zeros((12, 12, 3)))
    refused(desk, ("train", "images.toml", "--set", "data.valid=wasps"), "DataError", "wasps", "'wasps'", "ants, bees")


def test_folders_that_hold_no_classes_of_images(desk: Any) -> None:
    desk.write_images()
    (desk.folder / "nothing").mkdir()
    (desk.folder / "bare/ants").mkdir(parents=True)
    desk.write("pictures.csv", "image,lable\ntrain/ants/0.png,ants\n")
    for source, fragments in {
        "trian": ["the data are missing", "'train'"],
        "nothing": ["this folder is empty", "nothing"],
        "bare": ["there are no images", "folders ants", ".png"],
        "train/ants": ["no class folders", "6 images"],
        "pictures.csv": ["pictures.csv", "'label'", "'lable'"],
    }.items():
        refused(desk, ("train", "images.toml", "--set", f"data.train={source}"), "DataError", *fragments)


def test_an_image_that_cannot_be_decoded(desk: Any) -> None:
    desk.write_images()
    bad = desk.folder / "train/ants/3.png"
    good = bad.read_bytes()
    bad.write_bytes(good[:60])
    whole_batch = ("train", "images.toml", "--set", "data.batch_size=12")
    refused(desk, whole_batch, "BadSampleError", "ants/3.png", "sample 3", "60 bytes", "truncated")

    # in a later batch: what was trained before stays, and goes on when the image is mended
    bad.write_bytes(bytes(len(good)))
    words = ("train", "images.toml", "--set", "data.batch_size=1", "--set", "checkpoint.every=1")
    said = desk.say(*words, "--quiet")
    only_error(said, "BadSampleError", "ants/3.png", "sample 3", "epoch", f"{len(good)} bytes")
    assert said.code in (1, 2)
    step = desk.last_step("runs/images")
    assert 0 < step < 12, "another seed: the first sample is the bad one"
    assert desk.records("runs/images")[-1]["status"] == "failed"
    assert all(not find_damage(path) for path in desk.checkpoints("runs/images").steps())
    bad.write_bytes(good)
    assert desk.say("resume", "runs/images", "--quiet").code == 0
    assert desk.say(*words, "--quiet").code == 0
    assert desk.parameters("runs/images") == desk.parameters("runs/images-2")


# --- the model and other code


def test_code_that_cannot_be_used(desk: Any) -> None:
    desk.write_table()
    desk.write("nets.py", NETS)
    desk.write("syntax.py", "def build(:\n    pass\n")
    desk.write("leaves.py", "import sys\n\nsys.exit(3)\n")
    desk.write("imports.py", "import a_module_that_is_missing\n")
    desk.write("value.py", "build = 3\n")
    for model, fragments in {
        "net.py:good": ["net.py", "missing"],
        "nets.py:god": ["nets.py", "'god'", "'good'"],
        "nets.py": ["'nets.py'", "file.py:function"],
        "syntax.py:build": ["syntax.py, line 1", "SyntaxError"],
        "leaves.py:build": ["leaves.py, line 3", "SystemExit"],
        "imports.py:build": ["imports.py, line 1", "a_module_that_is_missing"],
        "value.py:build": ["value.py", "'build'"],
        "nets.py:raises": ["nets.py:raises", "RuntimeError: no weights here"],
        "nets.py:nothing": ["nets.py:nothing", "NoneType", "torch.nn.Module"],
        "nets.py:wide": ["does not fit the classes", "(8, 3)", "(B, 2)"],
        "nets.py:misfit": ["cannot take this batch", "Linear", "numbers float32 (8, 2)"],
    }.items():
        words = ("train", "table.toml", "--set", f"model.name={model}", "--set", "model.args={}")
        refused(desk, words, "ModelError", *fragments)
    words = ("train", "table.toml", "--set", "data.train=nets.py:raises")
    refused(desk, words, "DataError", "nets.py:raises", "RuntimeError: no weights here")
    words = ("train", "table.toml", "--set", "optimizer.name=nets.py:nothing")
    refused(desk, words, "SettingsError", "nets.py:nothing", "NoneType", "Optimizer")


def test_an_optimizer_function_that_raises(desk: Any) -> None:
    desk.write_table()
    desk.write("nets.py", NETS)
    words = ("train", "table.toml", "--set", "optimizer.name=nets.py:raises")
    refused(desk, words, "SettingsError", "nets.py:raises", "RuntimeError: no weights here")


# --- a run that fails


@pytest.mark.parametrize(
    ("edits", "step"),
    [
        ("model.name=nets.py:nan; model.args={}; checkpoint.every=2", 7),
        ("optimizer.name=sgd; optimizer.learning_rate=1e30; checkpoint.every=1", 1),
    ],
)
def test_a_loss_that_is_no_number_stops_the_run_and_spoils_no_checkpoint(desk: Any, edits: str, step: int) -> None:
    desk.write_table()
    desk.write("nets.py", NETS)
    said = desk.say("train", "table.toml", "--set", "train.epochs=3", *set_all(edits))
    only_error(said, "NonFiniteLossError", f"where:    step {step}", "samples", "last good checkpoint")
    assert said.code == 1
    ids = said.err.split("got:      samples ")[1].splitlines()[0].split(", ")
    assert len(ids) == 8
    assert all(0 <= int(sample) < 40 for sample in ids)

    checkpoints = desk.checkpoints("runs/table")
    last = checkpoints.latest()
    assert last is not None
    assert last.step < step
    assert all(not find_damage(path) for path in checkpoints.steps())
    assert all(bool(tensor.isfinite().all()) for tensor in checkpoints.model(last).values())
    assert all(math.isfinite(v) for row in desk.records("runs/table") for v in row.get("values", {}).values())
    assert desk.records("runs/table")[-1]["status"] == "failed"
    again = desk.say("resume", "runs/table")
    assert again.code == 1
    only_error(again, "NonFiniteLossError", f"step {step}")


# limits the size of a file as a full disk would
WITH_LIMIT = """
import resource, runpy, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
runpy.run_module("torchkeep", run_name="__main__")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE is of POSIX")
def test_a_disk_that_refuses_a_write(desk: Any) -> None:
    desk.write_table()
    wide = ("--set", "model.args={hidden=[160,160]}", "--set", "checkpoint.every=3")
    # the parameters of 110 kB fit below the limit, the optimiser's state of 220 kB does not
    said = desk.type("150000", "train", "table.toml", *wide, program=("-c", WITH_LIMIT))
    assert said.code == 1
    only_error(said, "StorageError", "the disk refused a write", "optimizer.safetensors", "File too large")
    assert desk.last_step("runs/table") == 0
    assert not [name for name in desk.files() if name.endswith(".tmp")]
    assert desk.say("resume", "runs/table", "--quiet").code == 0
    assert desk.say("train", "table.toml", "--quiet", *wide).code == 0
    assert desk.parameters("runs/table") == desk.parameters("runs/table-2")


def test_a_folder_for_runs_that_cannot_be_made(desk: Any) -> None:
    desk.write_table()
    desk.write("runs", "a file")
    refused(desk, ("train", "table.toml"), "RunFolderError", "runs is a file", "--run-dir")
    refused(desk, ("train", "table.toml", "--run-dir", "rows.csv/mine"), "RunFolderError", "rows.csv is a file")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only(desk: Any) -> None:
    desk.write_table()
    parent = desk.folder / "kept"
    parent.mkdir()
    parent.chmod(0o500)
    try:
        said = desk.say("train", "table.toml", "--run-dir", "kept/mine")
    finally:
        parent.chmod(0o700)
    only_error(said, "StorageError", "kept/mine", "Permission denied", "--run-dir")
    assert said.code in (1, 2)
    assert list(parent.iterdir()) == []


# --- a run that cannot go on


def test_a_run_that_another_process_holds(slow: Any) -> None:
    process = slow.start("train", "slow.toml", "--set", "train.epochs=100")
    slow.wait_for("runs/slow/checkpoints/step-00000004", process)
    for words in (("resume", "runs/slow"), ("train", "slow.toml", "--resume", "auto")):
        said = slow.say(*words)
        assert said.code == 2
        only_error(said, "RunFolderError", "in use", "runs/slow", f"pid {process.pid}")
    assert json.loads(slow.say("runs", "--json").out)["status"] == "running"
    assert process.poll() is None
    assert slow.runs() == ["slow"]


def test_a_folder_that_holds_no_run(desk: Any) -> None:
    desk.write_table()
    for place in ("runs/none", ".", "rows.csv"):
        for verb in ("predict", "evaluate"):
            refused(desk, (verb, place, "rows.csv"), "PackageError", "package", place)
    for place, got in [("runs/none", "no such folder"), (".", "no run.json in it"), ("rows.csv", "a file")]:
        refused(desk, ("resume", place), "RunFolderError", "not the folder of a run", place, got)


def test_a_run_whose_data_changed(desk: Any) -> None:
    desk.write_table()
    assert desk.say("train", "table.toml", "--quiet").code == 0
    desk.write("rows.csv", (desk.folder / "rows.csv").read_text() + "1,2,red,big\n")
    before = desk.parameters("runs/table")
    for words in (("resume", "runs/table"), ("train", "table.toml", "--resume", "auto")):
        refused(desk, words, "CheckpointError", "the data are not those", "train")
    assert desk.parameters("runs/table") == before
    (desk.folder / "rows.csv").unlink()
    refused(desk, ("resume", "runs/table"), "DataError", "rows.csv")


def test_settings_that_do_not_fit_a_finished_run_leave_it_finished(desk: Any) -> None:
    desk.write_table()
    assert desk.say("train", "table.toml", "--quiet").code == 0
    refused(desk, ("resume", "runs/table", "--set", "train.epoch=9"), "SettingsError", "train.epoch", "'epochs'")
    refused(desk, ("resume", "runs/table", "--set", "model.args={hidden=[5]}"), "CheckpointError", "not that of the")
    assert json.loads(desk.say("runs", "--json").out)["status"] == "finished"


def test_code_that_changed_runs_only_by_its_hash(desk: Any) -> None:
    desk.write_table()
    code = desk.write("nets.py", NETS)
    words = ("--set", "model.name=nets.py:good", "--set", "model.args={}")
    assert desk.say("train", "table.toml", "--quiet", *words).code == 0
    assert desk.say("resume", "runs/table", "--quiet").code == 0

    marker = desk.folder / "it-ran"
    code.write_text(NETS + f"\nopen({str(marker)!r}, 'w').close()\n", encoding="utf-8")
    for verb, more in [("resume", ()), ("evaluate", ()), ("predict", ("rows.csv",)), ("inspect", ())]:
        refused(desk, (verb, "runs/table", *more), "UntrustedCodeError", "has changed", "nets.py", "--trust-code ")
        refused(desk, (verb, "runs/table", *more, "--trust-code", "0" * 64), "UntrustedCodeError", "nets.py")
    assert not marker.exists()
    said = desk.say("resume", "runs/table")
    trust = said.err.split("--trust-code ")[1].split()[0]
    assert desk.say("resume", "runs/table", "--quiet", "--trust-code", trust).code == 0
    assert marker.exists()


def test_code_that_never_ran_here(desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.write_table()
    desk.write("nets.py", NETS)
    words = ("--set", "model.name=nets.py:good", "--set", "model.args={}")
    assert desk.say("train", "table.toml", "--quiet", *words).code == 0
    monkeypatch.setenv("XDG_STATE_HOME", str(desk.folder / "home" / "another"))
    refused(desk, ("evaluate", "runs/table"), "UntrustedCodeError", "never ran on this machine", "--trust-code ")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 99}', '{"format": 1}', '{"format": 1, "created": 1.0, "recipe": {}}', "\0" * 50]
)
def test_run_json_that_is_damaged(desk: Any, text: str) -> None:
    desk.write_table()
    desk.write("runs/table/run.json", text)
    for words in [
        ("resume", "runs/table"),
        ("evaluate", "runs/table"),
        ("predict", "runs/table", "rows.csv"),
        ("inspect", "runs/table"),
        ("train", "table.toml", "--resume", "auto"),
    ]:
        before = desk.files()
        said = desk.say(*words)
        only_error(said, "RunFolderError", "run.json" if words[0] != "train" else "")
        assert said.code == 2
        assert desk.files() - {"runs/table/.lock"} == before - {"runs/table/.lock"}
    listed = desk.say("runs", "--json")
    assert listed.code == 0
    assert json.loads(listed.out)["status"] == "unreadable"
    assert "unreadable" in desk.say("runs").out


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_taken(desk: Any) -> None:
    desk.write_table()
    words = ("train", "table.toml", "--quiet", "--set", "checkpoint.every=2", "--set", "checkpoint.keep_last=3")
    assert desk.say(*words).code == 0
    before = desk.parameters("runs/table")
    newest = desk.folder / "runs/table/checkpoints/step-00000008"
    file = newest / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    said = desk.say("resume", "runs/table")
    assert said.code == 0
    printed = said.out + said.err
    assert "step-00000008 is damaged (model.safetensors has other content" in printed
    assert "resumed from step 6" in printed
    assert (newest.parent / "damaged-step-00000008-1" / "model.safetensors").read_bytes() == bytes(data)
    assert desk.last_step("runs/table") == 8
    assert desk.parameters("runs/table") == before

    for path in newest.parent.glob("step-*"):
        (path / "manifest.json").unlink()
    refused_run = desk.say("evaluate", "runs/table")
    assert refused_run.code == 2
    only_error(refused_run, "CheckpointError", "no whole checkpoint", "checkpoints")


# --- predict


def test_inputs_that_a_model_cannot_take(desk: Any) -> None:
    desk.write_table()
    desk.write_images()
    desk.write("few.csv", "a,colour\n1,red\n")
    desk.write("words.csv", "a,b,colour\n1,red,red\n")
    (desk.folder / "nothing").mkdir()
    assert desk.say("train", "table.toml", "--quiet").code == 0
    assert desk.say("train", "images.toml", "--quiet").code == 0
    for run, name, fragments in [
        ("table", "few.csv", ["few.csv", "no column 'b'"]),
        ("table", "words.csv", ["words.csv", "column 'b'", "'red'"]),
        ("table", "train/ants/0.png", ["does not take files", "0.png", ".csv"]),
        ("table", "missing.csv", ["missing.csv", "no such file"]),
        ("images", "rows.csv", ["rows.csv", "'image'"]),
        ("images", "nothing", ["nothing in this folder", ".png", "nothing"]),
    ]:
        refused(desk, ("predict", f"runs/{run}", name), "DataError", *fragments)
        assert desk.say("predict", f"runs/{run}", name).out == ""
    said = desk.say("predict", "runs/images", "train/ants/0.png", "missing.png")
    assert (said.code, said.out) == (2, "")
    words = ("predict", "runs/images", "train", "-o", "missing/out.csv")
    refused(desk, words, "SettingsError", "missing/out.csv", "a folder that exists")
    refused(desk, ("evaluate", "runs/table", "valid"), "DataError", "images", "Table")
    refused(desk, ("evaluate", "runs/images", "rows.csv"), "DataError", "rows.csv")
    assert Path("missing").exists() is False


def test_words_that_are_no_command(desk: Any) -> None:
    for words in [(), ("trian",), ("train",), ("train", "x.toml", "--resume", "maybe"), ("predict", "runs/x")]:
        said = desk.say(*words)
        assert said.code == 2
        assert "Usage: torchkeep" in said.err
        assert said.out == ""
