"""Every automatic choice in one table (law 6), and the ones that change bits replayed by a resume (law 4)."""

from __future__ import annotations

from dataclasses import asdict

from ..contracts import Decision, Json


class Decisions:
    """Collects choices; where a run goes on, the recorded value is taken instead of choosing again."""

    def __init__(self, recorded: list[Json] | None = None):
        self._recorded = {row["name"]: row for row in recorded or []}
        self.rows: list[Decision] = []

    def recorded(self, name: str) -> Json:
        """What was decided when the run began; None in a new run."""
        row = self._recorded.get(name)
        return row["value"] if row else None

    def note(self, name: str, value: Json, reason: str, override: str = "") -> None:
        """A choice that changes no bit, made anew each time."""
        self.rows.append(Decision(name, value, reason, override))

    def choose(self, name: str, value: Json, reason: str, override: str = "") -> Json:
        """A choice that changes bits: what was recorded stands."""
        if name in self._recorded:
            row = self._recorded[name]
            value, reason = row["value"], row["reason"]
        self.rows.append(Decision(name, value, reason, override))
        return value

    def to_json(self) -> list[Json]:
        return [asdict(row) for row in self.rows]
