"""Conditions on many runs, as a person types them: ``valid/accuracy > .9 and model.name = convnet``."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime, timedelta
from typing import NoReturn

from ..errors import SettingsError, nearest

FACTS = ("name", "status", "attempts", "model", "commit", "best_metric", "best", "created", "seconds", "step", "epoch",
         "seed", "data", "problem")  # fmt: skip
"""What every row has, None where it is not known; metrics ("best.TAG", "last.TAG") and dotted settings follow."""

_TOKEN = re.compile(
    r"""(?P<sign>!=|<=|>=|==?|<|>|~)|(?P<word>[()]|[^\s()=!<>~"']+)|"(?P<quoted>[^"]*)"|'(?P<single>[^']*)'"""
)
_TIME = re.compile(r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d)?")
_FINDING = {
    sign: f"SELECT run FROM value WHERE key = ? AND (number {sign} ? OR text {sign} ?)"  # noqa: S608 (of five signs)
    for sign in ("=", "<", "<=", ">", ">=")
}
_FINDING["~"] = "SELECT run FROM value WHERE key = ? AND instr(lower(coalesce(text, number)), lower(?2 || ?3)) > 0"
_WHERE_COLUMNS = len("  where:    ")
_MAX_DEPTH = 50


class Condition:
    """``valid/accuracy > .9 and not (model.name = convnet or seed = none)``: the runs for which it holds.

    Raises:  SettingsError with the place that cannot be read
    """

    def __init__(self, text: str, keys: dict[str, int], db: sqlite3.Connection, every: set[int]):
        self._text, self._keys, self._db, self._every = " ".join(text.split("\n")), keys, db, every
        self._tokens = list(self._scan())
        self._next = self._depth = 0

    def runs(self) -> set[int]:
        found = self._either()
        if self._kind != "end":
            self._refuse("and, or, or the end")
        return found

    def _scan(self) -> Iterator[tuple[str, str, int]]:
        """Kind, text and place of each token: sign, word (joints and parentheses too), quoted; the end."""
        place = 0
        while self._text[place:].strip():
            place += len(self._text[place:]) - len(self._text[place:].lstrip())
            found = _TOKEN.match(self._text, place)
            if found is None:
                raise self._error(place, "a key, a sign or a value; a quote needs its end")
            kind = str(found.lastgroup)
            word = kind == "word" and found[0].lower() in ("and", "or", "not", "(", ")")
            yield "joint" if word else kind.replace("single", "quoted"), found[kind], place
            place = found.end()
        yield "end", "", place

    @property
    def _kind(self) -> str:
        return self._tokens[self._next][0]

    def _is_next(self, joint: str) -> bool:
        """Whether this joint stands here, which is then behind us."""
        kind, text, _ = self._tokens[self._next]
        is_here = kind == "joint" and text.lower() == joint
        self._next += is_here
        return is_here

    def _either(self) -> set[int]:
        found = self._both()
        while self._is_next("or"):
            found |= self._both()
        return found

    def _both(self) -> set[int]:
        found = self._one()
        while self._is_next("and"):
            found &= self._one()
        return found

    def _one(self) -> set[int]:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            self._refuse(f"at most {_MAX_DEPTH} parentheses")
        if self._is_next("not"):
            found = self._every - self._one()
        elif self._is_next("("):
            found = self._either()
            if not self._is_next(")"):
                self._refuse("and, or, or a closing parenthesis")
        else:
            found = self._comparison()
        self._depth -= 1
        return found

    def _comparison(self) -> set[int]:
        name, place = self._taken("a metric, a setting or a fact such as status", "word", "quoted")
        sign, _ = self._taken("one of = != < <= > >= ~", "sign")
        kind = self._kind
        value, value_place = self._taken("a value: a number, a text, a date, true, false or none", "word", "quoted")
        key = find_key(name, self._keys, self._pointed(place))
        sign = sign.replace("==", "=")
        if sign == "!=":  # what is lacking is equal to nothing
            return self._every - self._found(key, name, "=", kind, value, value_place)
        return self._found(key, name, sign, kind, value, value_place)

    def _found(self, key: int, name: str, sign: str, kind: str, value: str, place: int) -> set[int]:
        word = value.lower() if kind == "word" else ""
        if word in ("none", "null", "missing") and sign == "=":
            having = self._db.execute("SELECT run FROM value WHERE key = ?", (key,))
            return self._every - {run for (run,) in having}
        if name == "created" and _TIME.fullmatch(value):
            return self._at_time(key, sign, value, place)
        number = _number(word)
        text = word if word in ("true", "false", "nan") else value
        if sign == "~":
            return self._select(sign, key, "", text)
        if name == "created" and number is None:
            raise self._error(place, "a date such as 2026-11-28 or 2026-11-28T09:30")
        return self._select(sign, key, number, text if number is None or sign == "=" else None)

    def _at_time(self, key: int, sign: str, value: str, place: int) -> set[int]:
        """A day, or a minute, is a span: in it, before its begin, behind its end."""
        try:
            begin = datetime.fromisoformat(value)
        except ValueError:
            raise self._error(place, "a date that the calendar has") from None
        end = begin + (timedelta(minutes=1) if ":" in value else timedelta(days=1))
        since_begin, since_end = (self._select(">=", key, at.timestamp(), None) for at in (begin, end))
        return {
            "<": self._select("<", key, begin.timestamp(), None), ">=": since_begin, ">": since_end,
            "<=": self._select("<", key, end.timestamp(), None),
        }.get(sign, since_begin - since_end)  # fmt: skip

    def _select(self, sign: str, key: int, number: float | str | None, text: str | None) -> set[int]:
        return {run for (run,) in self._db.execute(_FINDING[sign], (key, number, text))}

    def _taken(self, expected: str, *kinds: str) -> tuple[str, int]:
        kind, text, place = self._tokens[self._next]
        if kind not in kinds:
            self._refuse(expected)
        self._next += 1
        return text, place

    def _refuse(self, expected: str) -> NoReturn:
        raise self._error(self._tokens[self._next][2], expected)

    def _error(self, place: int, expected: str) -> SettingsError:
        got = (self._text[place:].split() or ["the end"])[0]
        return SettingsError(
            "this condition cannot be read", where=self._pointed(place), got=got, expected=expected,
            fix='--where "valid/accuracy > .9 and model.name = convnet"',
        )  # fmt: skip

    def _pointed(self, place: int) -> str:
        return f"{self._text}\n{' ' * (_WHERE_COLUMNS + place)}^"


def _number(word: str) -> float | None:
    with suppress(ValueError):
        return float(word) if word != "nan" else None
    return None


def find_key(name: str, keys: dict[str, int], where: str) -> int:
    """The key that a name stands for: a fact, a metric (its best on the validation split, else its last), a setting.

    A setting may leave out its sections where that is clear.

    Raises:  SettingsError where nothing or several things have the name
    """
    kind = "best" if name.startswith("valid/") else "last"
    for full in (name, f"{kind}.{name}", f"last.{name}", f"best.{name}", name.replace("attempt", "attempts")):
        if full in keys:
            return keys[full]
    if name in FACTS:
        return -1
    short = [key for key in keys if key.endswith(f".{name}") and not key.startswith(("best.", "last."))]
    if len(short) == 1:
        return keys[short[0]]
    if short:
        raise SettingsError(
            "this short name stands for several settings", where=where, got=repr(name),
            expected=f"one of {', '.join(sorted(short))}",
        )  # fmt: skip
    known = sorted({key.removeprefix("best.").removeprefix("last.") for key in keys} | set(FACTS))
    raise SettingsError(
        "no run here has such a key", where=where, got=repr(name),
        expected="a metric, a setting or a fact such as status",
        fix=nearest(name, [*known, *(key.rpartition(".")[2] for key in known)]),
    )  # fmt: skip
