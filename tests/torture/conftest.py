"""The long tests, run by ``make torture`` and by no other target: their figures go to bench/results/torture.json."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}  # children are forked: no pool of threads may be under way

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

from course import Note  # noqa: E402

from measure import RESULTS, write_result  # noqa: E402


@pytest.fixture(scope="session")
def kept_figures() -> Iterator[dict[str, Any]]:
    """The figures of this run, beside those of tests that it left out."""
    figures: dict[str, Any] = {}
    yield figures
    file = RESULTS / "torture.json"
    before = json.loads(file.read_text(encoding="utf-8"))["results"] if file.exists() else {}
    write_result("torture", {"results": {**before, **figures}})


@pytest.fixture
def note(kept_figures: dict[str, Any], request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Note:
    """Print and keep the figures of this test."""
    began = time.perf_counter()

    def say(**figures: Any) -> None:
        figures["seconds"] = round(time.perf_counter() - began, 1)
        kept_figures[request.node.name.removeprefix("test_")] = figures
        with capsys.disabled():
            print(f"\n{request.node.name}: " + ", ".join(f"{name} {value}" for name, value in figures.items()))

    return say
