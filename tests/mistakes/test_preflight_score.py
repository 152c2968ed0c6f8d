"""Preflight finds what people do wrong, blames nothing that is right, and leaves everything as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
from healthy import HEALTHY
from material import LEVELS, Case, Level, look
from planted import NOT_FOUND, PLANTED


def _cases(cases: list[Case]) -> list[object]:
    """Each case at each level; what lacks its data is skipped, said."""
    return [
        pytest.param(case, level, id=f"{case.name}-{level}", marks=[pytest.mark.skipif(
            bool(case.missing), reason=f"not beside the repository: {', '.join(case.missing)}")])
        for case in cases for level in LEVELS
    ]  # fmt: skip


@pytest.mark.parametrize(("case", "level"), _cases(PLANTED))
def test_a_planted_mistake_is_found(case: Case, level: Level, tmp_path: Path) -> None:
    outcome = look(case, tmp_path, level)
    assert outcome.changed == []
    if level == "quick" and case.quick:
        assert outcome.verdict == "found", (outcome.blames, outcome.findings)
    if level == "full" and case.name not in NOT_FOUND:
        assert outcome.verdict != "missed", (outcome.blames, outcome.findings)


@pytest.mark.parametrize(("case", "level"), _cases(HEALTHY))
def test_what_is_right_is_not_blamed(case: Case, level: Level, tmp_path: Path) -> None:
    outcome = look(case, tmp_path, level)
    assert outcome.blames == {}
    assert outcome.changed == []


def test_the_suite_is_as_large_as_is_said() -> None:
    assert len(PLANTED) >= 30
    assert len(HEALTHY) >= 30
    assert len(NOT_FOUND) <= 0.05 * len(PLANTED)
    assert NOT_FOUND.keys() <= {case.name for case in PLANTED}
    assert len({case.name for case in (*PLANTED, *HEALTHY)}) == len(PLANTED) + len(HEALTHY)
