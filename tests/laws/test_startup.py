"""What is asked often must start at once: ``--help`` and ``import torchkeep`` load neither torch nor numpy.

The bound in seconds is the one exception to "no test measures time": the promise itself is a time. It is held against
the processor's time, which equals the clock's on an idle machine and does not grow with what else runs, and it is the
best of seven runs after one that is not counted.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

HEAVY = {"torch", "numpy", "pydantic"}
HELP = [sys.executable, "-m", "torchkeep", "--help"]
HELP_BOUND_S = 0.12
RUNS = 7

# Compiled files are what "warm" means, so they must be allowed to be written.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    return done


def imported_by(*arguments: str) -> set[str]:
    """The packages that a Python process imports, by its own account on stderr."""
    report = run([sys.executable, "-X", "importtime", *arguments]).stderr
    lines = [line for line in report.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().split(".")[0] for line in lines}


def test_the_account_of_imports_is_read_rightly() -> None:
    assert {"numpy", "json"} <= imported_by("-c", "import numpy, json")
    assert "numpy" not in imported_by("-c", "import json")


@pytest.mark.parametrize(
    "arguments",
    [
        ("-c", "import torchkeep"),
        ("-m", "torchkeep", "--help"),
        ("-c", "import torchkeep.cli"),
    ],
    ids=" ".join,
)
def test_starts_without(arguments: tuple[str, ...]) -> None:
    imported = imported_by(*arguments)
    assert "torchkeep" in imported
    assert imported & HEAVY == set()


@pytest.mark.parametrize("module", ["errors", "settings", "files", "folder"])
def test_the_light_part_of_the_root_starts_without_torch(module: str) -> None:
    assert "torch" not in imported_by("-c", f"import torchkeep.{module}")


def test_help_names_the_verbs() -> None:
    text = run(HELP).stdout
    for verb in ("train", "resume", "evaluate", "predict", "inspect", "runs", "survey", "schema"):
        assert verb in text


def test_help_comes_at_once() -> None:
    run(HELP)
    fastest = float("inf")
    for _ in range(RUNS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run(HELP)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        fastest = min(fastest, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if fastest <= HELP_BOUND_S:
            break  # the best can only become better
    assert fastest <= HELP_BOUND_S
