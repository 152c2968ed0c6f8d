"""``torchkeep reproduce``: the same bits from a run's folder and from its package, or the first place that differs."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from torch import nn

import torchkeep as tk
from torchkeep.archive import Archive, write_archive
from torchkeep.errors import SettingsError
from torchkeep.handing import reproduce
from torchkeep.tensors import to_json, to_safetensors


def doctored(package: Path, change: Callable[[Any], Any], member: str = "provenance.json") -> Path:
    """A package whose checksums hold, with another provenance."""
    archive = Archive.open(package)
    members: dict[str, Any] = {name: bytes(archive.read(name)) for name in archive.names}
    if member.endswith(".json"):
        said = orjson.loads(members[member])
        members[member] = to_json(change(said) or said)
    else:
        tensors = archive.tensors(member)
        change(tensors)
        members[member] = to_safetensors(tensors)
    made = package.with_name(f"doctored-{package.name}")
    write_archive(made, members, head={"name": archive.head["name"]})
    return made


def with_rate(rate: float) -> Callable[[Any], None]:
    return lambda said: said["recipe"]["optimizer"].update(learning_rate=rate)


@pytest.fixture
def trained(desk: Any) -> Any:
    """A desk with runs/table, trained, and table.tkp of its best checkpoint, step 4 or 8 of 8."""
    desk.write_table()
    assert desk.say("train", "table.toml", "--set", "optimizer.schedule=one_cycle", "--quiet").code == 0
    assert desk.say("package", "runs/table", "-o", "table.tkp").code == 0
    return desk


def test_a_run_gives_the_same_bits_again(trained: Any) -> None:
    said = trained.say("reproduce", "runs/table")
    assert said.code == 0, said.err
    assert "the same bits" in said.out
    assert trained.runs() == ["table", "table-reproduced"]
    assert trained.parameters("runs/table") == trained.parameters("runs/table-reproduced")
    assert "tensorboard" not in {path.name for path in (trained.folder / "runs/table-reproduced").iterdir()}


def test_a_package_gives_the_same_bits_where_its_data_lie_elsewhere(trained: Any) -> None:
    shutil.move(trained.folder / "rows.csv", trained.folder / "elsewhere.csv")
    shutil.rmtree(trained.folder / "runs")
    missing = trained.say("reproduce", "table.tkp")
    assert missing.code == 2
    assert "--data" in missing.err
    assert trained.runs() == []
    words = ("table.tkp", "--data", "data.train=elsewhere.csv", "--run-dir", "new/again", "--json")
    said = trained.say("reproduce", *words)
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert (found["same"], found["tensors"], found["then"]) == (True, [], found["now"])
    assert found["parting"]["num_equal"] > 0
    assert (trained.folder / "new/again/run.json").is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_run_that_was_interrupted_and_resumed_gives_the_same_bits_at_every_point(slow: Any, ended: Any) -> None:
    process = slow.start("train", "slow.toml", "--set", "optimizer.schedule=one_cycle")
    slow.wait_for("runs/slow/checkpoints/step-00000008", process)
    process.send_signal(signal.SIGINT)
    assert ended(process).code == 130
    step = slow.last_step("runs/slow")
    assert 8 <= step < 24
    # where it stands: another recipe's schedule would end there, this one's goes on
    assert slow.say("package", "runs/slow", "--checkpoint", "last", "-o", "part.tkp").code == 0
    for source in ("runs/slow", "part.tkp"):
        said = slow.say("reproduce", source, "--json")
        assert said.code == 0, (said.err, said.out)
        assert json.loads(said.out)["step"] == step
    assert slow.say("resume", "runs/slow", "--quiet").code == 0
    said = slow.say("reproduce", "runs/slow", "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["step"] == 24


def test_another_learning_rate_parts_at_its_first_number_and_names_the_tensors(trained: Any) -> None:
    doctored(trained.folder / "table.tkp", with_rate(0.5))
    said = trained.say("reproduce", "doctored-table.tkp", "--json")
    assert said.code == 1, said.err
    found = json.loads(said.out)
    first = min(row["step"] for row in trained.records("runs/table") if row["kind"] == "scalars")
    assert (found["same"], found["parting"]["step"]) == (False, first)
    assert found["parting"]["tag"].startswith("train/")
    assert found["tensors"][0] in trained.checkpoints("runs/table").model(trained.checkpoints("runs/table").latest())
    assert found["largest"] > 0
    said = trained.say("reproduce", "doctored-table.tkp")
    assert said.code == 1
    assert f"part at step {first}" in said.out
    assert found["tensors"][0] in said.out


def test_parameters_that_are_not_those_of_the_provenance_are_found(trained: Any) -> None:
    doctored(
        trained.folder / "table.tkp", lambda tensors: next(iter(tensors.values())).add_(1), "parameters.safetensors"
    )
    said = trained.say("reproduce", "doctored-table.tkp", "--json")
    assert said.code == 1, said.err
    found = json.loads(said.out)
    assert (found["parting"]["tag"], len(found["tensors"]), found["largest"]) == (None, 1, pytest.approx(1))


def test_other_data_are_refused_before_anything_is_trained(trained: Any) -> None:
    rows = (trained.folder / "rows.csv").read_text()
    trained.write("rows.csv", rows.replace("0,0.0,", "9,0.5,"))
    for source in ("runs/table", "table.tkp"):
        said = trained.say("reproduce", source)
        assert said.code == 2
        assert said.err.count("got:") == said.err.count("expected:") == 1
        assert trained.runs() == ["table"]
    said = trained.say("reproduce", "table.tkp", "--allow-change", "data", "--json")
    assert said.code == 1, said.err
    assert "data.train" in [row[0] for row in json.loads(said.out)["differences"]]


def test_another_environment_is_said_beside_what_differs(trained: Any) -> None:
    def age(said: Any) -> None:
        said["environment"]["packages"]["numpy"] = "0.1"
        said["environment"]["processor"] = "an abacus"

    doctored(trained.folder / "table.tkp", age)
    said = trained.say("reproduce", "doctored-table.tkp")
    assert said.code == 0, said.err
    assert "packages.numpy was '0.1'" in said.err + said.out
    assert "an abacus" in said.out


def test_code_that_a_recipe_names_runs_by_its_hash_alone(slow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert slow.say("train", "slow.toml", "--set", "train.epochs=1", "--quiet").code == 0
    assert slow.say("package", "runs/slow", "-o", "slow.tkp").code == 0
    assert slow.say("reproduce", "slow.tkp", "--json").code == 0  # this machine has run that file
    monkeypatch.setenv("XDG_STATE_HOME", str(slow.folder / "another"))
    for source in ("runs/slow", "slow.tkp"):
        said = slow.say("reproduce", source)
        assert said.code == 2
        assert "--trust-code" in said.err
    digest = said.err.split("--trust-code ")[1].split()[0]
    assert slow.say("reproduce", "slow.tkp", "--trust-code", digest, "--json").code == 0
    slow.write("slow.py", (slow.folder / "slow.py").read_text() + "\nopen('ran', 'w')\n")
    assert slow.say("reproduce", "slow.tkp").code == 2
    assert not (slow.folder / "ran").exists()


def test_a_run_of_objects_names_the_call_to_repeat(desk: Any) -> None:
    torch.manual_seed(0)
    data = tk.Arrays(x=torch.randn(8, 2), label=torch.arange(8) % 2)
    tk.fit(nn.Linear(2, 2), data, epochs=1, batch_size=4, seed=3, run_dir="runs/own", monitor={"views": []}, quiet=True)
    with pytest.raises(SettingsError) as caught:
        reproduce("runs/own")
    assert "Linear" in caught.value.got
    assert "batch_size=4" in caught.value.fix
    assert "seed=3" in caught.value.fix


HOSTILE: dict[str, Callable[[Any], Any]] = {
    "no object": lambda said: [1],
    "a recipe that is none": lambda said: said.update(recipe={"data": 3}),
    "no recipe": lambda said: said.update(recipe=None),
    "a step below none": lambda said: said["checkpoint"].update(step=-1),
    "threads of no number": lambda said: said["decisions"].append({"name": "threads", "value": "many"}),
    "a thousand processes": lambda said: said["decisions"].append({"name": "feeding", "value": "9999 processes"}),
    "a course of words": lambda said: said["course"].update({"train/loss": [["one", "two"]]}),
    "a lock of numbers": lambda said: said["environment"].update(lock=[1]),
    "code of a list": lambda said: said.update(code=["diff"]),
    "an unknown key": lambda said: said.update(more=1),
    "code that is not there": lambda said: said["recipe"]["model"].update(name="../../net.py:build"),
    "a device that is not there": lambda said: said["recipe"]["train"].update(device="cuda:99"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_provenance_that_nobody_wrote_is_refused(trained: Any, name: str) -> None:
    doctored(trained.folder / "table.tkp", HOSTILE[name])
    said = trained.say("reproduce", "doctored-table.tkp")
    assert said.code == 2
    assert "where:" in said.err
    assert trained.runs() == ["table"]


@pytest.mark.parametrize("word", ["optimizer.learning_rate=1", "data.train"])
def test_data_says_where_and_nothing_else(trained: Any, word: str) -> None:
    said = trained.say("reproduce", "table.tkp", "--data", word)
    assert said.code == 2
    assert "data.train" in said.err


def test_a_package_of_no_run_says_so(desk: Any) -> None:
    tk.save_package(nn.Linear(2, 2), "own.tkp", torch.randn(3, 2))
    said = desk.say("reproduce", "own.tkp")
    assert said.code == 2
    assert "provenance.json" in said.err
    assert desk.say("reproduce", "nothing.tkp").code == 2
