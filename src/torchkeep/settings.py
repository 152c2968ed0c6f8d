"""Frozen settings: from TOML, a dict and ``--set``, checked before anything opens.

Each room keeps its own section beside the code that it steers; ``training/recipe.py`` puts them together.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, TypeVar

import orjson
import pydantic
from pydantic import BaseModel, ConfigDict

from .contracts import Json
from .errors import SettingsError, nearest


class Settings(BaseModel):
    """The base of every section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


S = TypeVar("S", bound=Settings)

# pydantic speaks of JSON, a recipe's author of TOML
_WORDS = {"an object": "a section", "valid dictionary": "table", "valid array": "list", "valid string": "text"}


def read_toml(path: str | Path) -> dict[str, Any]:
    """A TOML file as a dict.

    Raises:  SettingsError if it is missing, not a file, or not TOML
    """
    path = Path(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(
            "the recipe is missing", where=path, got="no such file", expected="a TOML file",
            fix=nearest(path.name, [found.name for found in path.parent.glob("*.toml")])
            or "torchkeep schema prints what a recipe holds",
        ) from None  # fmt: skip
    except IsADirectoryError:
        raise SettingsError("the recipe is a folder", where=path, expected="a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(
            "the recipe is not TOML", where=path, got=error, expected='lines such as: name = "digits"'
        ) from None
    except OSError as error:
        raise SettingsError("the recipe cannot be read", where=path, got=error.strerror or error) from None


def override(data: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Apply ``section.key=value`` assignments to a copy. A value is read as TOML, else taken as text.

    Raises:  SettingsError for an assignment without "=" or through something that is not a section
    """
    data = _copy(data)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise SettingsError(
                "this --set cannot be read", where=f"--set {assignment}",
                got="no key before '='" if equals else "no '='", expected="section.key=value",
            )  # fmt: skip
        *sections, last = [part.strip() for part in key.split(".")]
        place = data
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise SettingsError(
                    "this --set goes through a value", where=f"--set {assignment}", got=f"{section!r} is no section"
                )
        place[last] = _value(text.strip())
    return data


def _copy(data: Any) -> Any:
    return {key: _copy(value) for key, value in data.items()} if isinstance(data, dict) else data


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def check(model: type[S], data: dict[str, Any], where: object) -> S:
    """Build ``model`` from plain data, strictly: no text becomes a number in silence.

    Raises:  SettingsError naming the key, and the nearest known one where it is unknown
    """
    try:
        return model.model_validate_json(orjson.dumps(data, default=_plain), strict=True)
    except pydantic.ValidationError as error:
        raise _explain(model, error.errors(include_url=False), data, where) from None
    except (TypeError, orjson.JSONEncodeError) as error:
        raise SettingsError("a setting holds something that a recipe cannot hold", where=where, got=error) from None


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} {value!r}")


def _explain(model: type[Settings], errors: list[Any], data: dict[str, Any], where: object) -> SettingsError:
    # an unknown key is the cause more often than the missing one beside it
    first = min(errors, key=lambda found: found["type"] != "extra_forbidden")
    path, got = _found_at(data, first["loc"])
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        known = _known_keys(model, path[:-1])
        return SettingsError(
            "unknown key", where=f"{where}: {key}", got=repr(path[-1]),
            expected=f"one of {', '.join(sorted(known))}",
            fix=nearest(path[-1], known) or _elsewhere(model, path[-1]) or "torchkeep schema prints every key",
        )  # fmt: skip
    if first["type"] == "missing" and isinstance(first["loc"][-1], str):
        key = ".".join([*path, first["loc"][-1]])
        return SettingsError("a key is missing", where=f"{where}: {key}", expected=key, fix=f"add {key} to the recipe")
    said = "; ".join(
        dict.fromkeys(_sentence(found) for found in errors if found["loc"][: len(path)] == first["loc"][: len(path)])
    )
    return SettingsError("a value cannot be used", where=f"{where}: {key or 'recipe'}", got=f"{got!r}", expected=said)


def _sentence(found: Any) -> str:
    if found["type"] == "missing":
        return "one value more"
    text = str(found["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    for json_word, word in _WORDS.items():
        text = text.replace(json_word, word)
    return text[0].lower() + text[1:] if text else text


def _found_at(data: Any, loc: tuple[str | int, ...]) -> tuple[list[str], Any]:
    """The keys of an error's place, and the value there.

    pydantic puts the tried type of a union after them: "int", "constrained-int".
    """
    path: list[str] = []
    for part in loc:
        is_section = isinstance(data, list) and isinstance(part, int) and isinstance((data[part:] or [0])[0], dict)
        if not is_section and (not isinstance(data, dict) or part not in data):
            break
        path.append(str(part))
        data = data[part]
    return path, data


def _elsewhere(model: type[BaseModel], name: str) -> str:
    """The section that has a key of this name."""
    sections = {key: _section_of(field.annotation) for key, field in model.model_fields.items()}
    homes = [f"{key}.{name}" for key, section in sections.items() if section and name in section.model_fields]
    return f"did you mean {homes[0]}?" if homes else ""


def _known_keys(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        field = model.model_fields.get(part)
        inner = _section_of(field.annotation) if field else None
        if inner is None:
            break
        model = inner
    return list(model.model_fields)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _section_of(argument)
        if found is not None:
            return found
    return None


def flatten(data: Json, prefix: str = "") -> dict[str, Json]:
    """Nested sections as dotted keys."""
    if not isinstance(data, dict):
        return {prefix: data}
    flat: dict[str, Json] = {}
    for key, value in data.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def difference(old: Json, new: Json) -> list[tuple[str, Json, Json]]:
    """What differs between two sets of settings: (dotted key, old value, new value)."""
    before, after = flatten(old), flatten(new)
    keys = sorted(before.keys() | after.keys())
    return [(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]
