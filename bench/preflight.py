"""How many planted mistakes preflight finds, and how many right trainings it blames: the cases of tests/mistakes.

    python bench/preflight.py

It ends with 1 where the full level finds less than 95 %, or where either level blames a right one.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import ROOT, write_result

sys.path.insert(0, str(ROOT / "tests" / "mistakes"))

from healthy import HEALTHY
from material import LEVELS, Case, Level, Outcome, look
from planted import PLANTED

LEAST_FOUND = 0.95


def looked_at(cases: list[Case], level: Level) -> tuple[list[Outcome], float]:
    """What the checks say of each case whose data is there, and the seconds of all of them."""
    began, outcomes = time.perf_counter(), []
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            outcomes.append(look(case, Path(folder), level))
    return outcomes, time.perf_counter() - began


def measure(level: Level) -> dict[str, Any]:
    """The shares of a level, and by name each case that it missed, found by another check, or blamed wrongly."""
    bad, bad_s = looked_at([case for case in PLANTED if not case.missing], level)
    right, right_s = looked_at([case for case in HEALTHY if not case.missing], level)
    blamed = {o.case.name: o.blames for o in right if o.blames}
    by = {word: {o.case.name: o.blames for o in bad if o.verdict == word} for word in ("found otherwise", "missed")}
    late = [o.case.name for o in bad if level == "quick" and o.case.quick and o.verdict == "missed"]
    return {
        "bad": len(bad), "found": len(bad) - len(by["missed"]), "right": len(right), "blamed": len(blamed),
        "changed": {o.case.name: o.changed for o in (*bad, *right) if o.changed}, "seconds": round(bad_s + right_s, 1),
        "cases": {**by, "blamed": blamed, "missed by quick checks that should find it": late},
    }  # fmt: skip


def show(level: Level, row: dict[str, Any]) -> None:
    print(f"{level:<6} found {row['found']} of {row['bad']} mistakes ({row['found'] / row['bad']:.0%}), "
          f"blamed {row['blamed']} of {row['right']} right trainings, {row['seconds']} s")  # fmt: skip
    for word, cases in row["cases"].items():
        for name in cases if word != "missed" or level == "full" else ():
            said = cases[name] if isinstance(cases, dict) else {}
            print(f"       {word}: {name}" + "".join(f"\n         {check}: {what}" for check, what in said.items()))
    for name, parts in row["changed"].items():
        print(f"       not put back: {name}: {', '.join(parts)}")


def main() -> None:
    left_out = [case.name for case in (*PLANTED, *HEALTHY) if case.missing]
    rows = {level: measure(level) for level in LEVELS}
    for level, row in rows.items():
        show(level, row)
    if left_out:
        print(f"left out, for their data is not beside the repository: {', '.join(left_out)}")
    path = write_result("preflight", {"left_out": left_out, "levels": rows})
    print(f"written to {path.relative_to(ROOT)}")
    full = rows["full"]
    if full["found"] < LEAST_FOUND * full["bad"] or any(row["blamed"] or row["changed"] for row in rows.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
