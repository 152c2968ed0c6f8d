"""The examples run as they stand, and so does every block of Python in the docs; what the docs type exists."""

from __future__ import annotations

import math
import re
import runpy
import shlex
import shutil
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch

import torchkeep as tk
from torchkeep.cli import cli
from torchkeep.training.recipe import schema

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#]+)\)")


def links(page: Path) -> set[str]:
    """What the page's text links to, without the web."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    return {target for target in LINK.findall(text) if "://" not in target}


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The blocks of one language, with the line of the page where each begins."""
    text = page.read_text(encoding="utf-8")
    found = [match for match in BLOCK.finditer(text) if match[1] == language]
    return [(text[: match.start(2)].count("\n") + 1, match[2]) for match in found]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the examples in it, and nothing else."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def files(folder: Path) -> set[str]:
    """What lies there, but for runs and caches."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in found if path.parts[0] != "runs" and "__pycache__" not in path.parts}


def run_example(name: str, place: Path) -> None:
    before = files(place)
    with warnings.catch_warnings():
        if name == "text_model":  # what transformers and its own imports warn of is not ours
            warnings.simplefilter("ignore")
        runpy.run_path(str(place / "examples" / f"{name}.py"), run_name="__main__")
    assert files(place) == before


def test_own_objects(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_example("own_objects", place)
    assert "test digits are read wrongly" in capsys.readouterr().out
    assert tk.runs()[0]["best.valid/accuracy"] > 0.95


def test_gan(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_example("gan", place)
    drawn = capsys.readouterr().out.rpartition("drawn by the generator:")[2].strip("\n").splitlines()
    assert len(drawn) == 8
    assert "@@" in "".join(drawn)


def test_text_model(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    run_example("text_model", place)
    said = [line.split()[-2] for line in capsys.readouterr().out.splitlines()[-3:]]
    assert said == ["praise", "blame", "praise"]


def test_by_hand_goes_on(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = place / "examples" / "by_hand.py"
    example.write_text(example.read_text(encoding="utf-8").replace("EPOCHS = 30", "EPOCHS = 4"), encoding="utf-8")
    run_example("by_hand", place)
    whole = capsys.readouterr().out.splitlines()[-1]

    folder = place / "runs" / "by-hand"
    for path in tk.Checkpoints(folder).steps()[1:]:
        shutil.rmtree(path)  # as if it had been killed before these
    run_example("by_hand", place)
    resumed = capsys.readouterr().out.splitlines()
    assert resumed[0].startswith("going on from step")
    assert resumed[-1] == whole


def test_table(place: Path) -> None:
    before = files(place)
    run = tk.train("examples/table/recipe.toml")
    assert run.best.metrics["valid/accuracy"] > 0.85
    assert files(place) == before
    made = runpy.run_path("examples/table/make_data.py")["make_text"]()
    assert made == Path("examples/table/deliveries.csv").read_text(encoding="utf-8")


REAL = sorted({path.parent.name for path in (ROOT / "examples").glob("*/recipe.toml")} - {"digits", "table"})


@pytest.mark.parametrize("name", REAL)
def test_a_recipe_on_real_data_runs(name: str, tmp_path: Path) -> None:
    """Two steps of each: what the whole of it reaches is measured by bench/accuracy.py."""
    if not (ROOT / "../shared/data").is_dir():
        pytest.skip("the folder shared/data beside the repository is missing")
    threads = torch.get_num_threads()
    settings = ["train.max_steps=2", "monitor.views=[]"]
    try:
        run = tk.train(ROOT / "examples" / name / "recipe.toml", set=settings, run_dir=tmp_path / name, quiet=True)
    finally:
        torch.set_num_threads(threads)
    assert run.status == "finished"
    assert all(math.isfinite(value) for value in run.metrics.values())
    assert run.dir == tmp_path / name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_in_the_docs(page: Path, place: Path) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="transformers|torchmetrics")
        for line, code in blocks(page, "python"):
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_toml_in_the_docs(page: Path) -> None:
    for _, text in blocks(page, "toml"):
        assert tomllib.loads(text)


def shell_lines(page: Path) -> list[str]:
    return [line for _, text in blocks(page, "sh") for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_in_the_docs_exist(page: Path) -> None:
    for line in shell_lines(page):
        check_command(shlex.split(line, comments=True))


def check_command(words: list[str]) -> None:
    """Raises click.ClickException, or fails, where the command line does not know this."""
    assert words[0] == "torchkeep", f"{words[0]}: only the command line's own verbs are checked here"
    if words[1:] == ["--help"]:
        return
    verb = cli.commands[words[1]]
    verb.make_context(words[1], words[2:])


def test_a_command_that_does_not_exist_is_found() -> None:
    for wrong in (["torchkeep", "train", "x.toml", "--epochs", "3"], ["torchkeep", "resume"]):
        with pytest.raises(click.ClickException):
            check_command(wrong)
    with pytest.raises(KeyError):
        check_command(["torchkeep", "fly"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_in_the_docs_lead_somewhere(page: Path) -> None:
    assert [target for target in links(page) if not (page.parent / target).exists()] == []


def test_the_index_names_every_page() -> None:
    assert {page.name for page in PAGES} - {"index.md"} <= links(ROOT / "docs" / "index.md")


def test_the_recipe_page_is_up_to_date() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_recipe_page.py"))
    text = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert made["filled"](text, schema()) == text, "python docs/make_recipe_page.py"
