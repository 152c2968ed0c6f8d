"""Splits opened each by itself, for a survey: also where training would refuse them, with what it would say."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from ..errors import BadSampleError, DataError
from ..settings import Settings, check, override
from .contents import Rows
from .drift import Problem
from .frames import Form, is_table, read_frame
from .sources import DataSettings, LoadFunction, SplitName, kind_of_table, open_source, open_table
from .splits import split

_ROLES = {"train": "train", "training": "train", "val": "valid", "valid": "valid", "validation": "valid",
          "dev": "valid", "test": "test"}  # fmt: skip
_ANY_SIZE, _ANY_RATE = 224, 16_000


class _Alone(Settings):
    data: DataSettings


def settings_alone(named: Mapping[str, str], assignments: list[str]) -> DataSettings:
    """How sources without a recipe are read: as ``data.KEY=VALUE`` says.

    Raises:  SettingsError naming the key
    """
    told = override({"data": {"train": next(iter(named.values()))}}, assignments)
    return check(_Alone, told, "survey").data


def named_splits(sources: Sequence[str]) -> dict[str, str]:
    """Names for sources: by a word such as "val" in their own last part, else train, valid and test in order.

    A folder that holds nothing but folders of such names stands for them.
    """
    expanded = [part for source in sources for part in _splits_in(source) or [source]]
    said = [_role_of(source) for source in expanded]
    free = [role for role in ("train", "valid", "test") if role not in said]
    named: dict[str, str] = {}
    for source, role in zip(expanded, said, strict=True):
        name = role or (free.pop(0) if free else source)
        named[source if name in named else name] = source
    return dict(sorted(named.items(), key=lambda pair: pair[0] != "train"))


def _splits_in(source: str) -> list[str]:
    folder = Path(source).expanduser()
    inside = sorted(found for found in folder.iterdir() if found.name[0] != ".") if folder.is_dir() else []
    are_splits = inside and all(found.is_dir() and found.name in _ROLES for found in inside)
    return list(map(str, inside)) if are_splits else []


def _role_of(source: str) -> str | None:
    words = re.findall(r"[a-z]+", re.split(r"[/\\]", source.rstrip("/\\"))[-1].lower())
    return next((_ROLES[word] for word in words if word in _ROLES), None)


def open_apart(
    settings: DataSettings, sources: Mapping[str, str], base: Path, seed: int, load: LoadFunction
) -> tuple[dict[str, Any], list[Problem]]:
    """Each split by itself, without augmentation, and what training would refuse.

    Raises:  DataError where there is nothing that could be looked at
    """
    problems: list[Problem] = []
    opened = {name: _opened(settings, source, base, name, load, problems) for name, source in sources.items()}
    if settings.valid_fraction is not None and hasattr(opened["train"], "read"):
        try:
            parts = split(opened["train"], settings.valid_fraction, seed, settings.split_by, settings.test_fraction)
        except DataError as error:
            problems.append(_refusal("train", error))
        else:
            opened = {**dict(zip(("train", "valid", "test"), parts, strict=False)), **opened, "train": parts[0]}
    return opened, problems


def _opened(
    settings: DataSettings, source: str, base: Path, name: str, load: LoadFunction, problems: list[Problem]
) -> Any:
    role = cast(SplitName, name if name in ("train", "valid", "test") else "train")
    try:
        return open_source(settings, source, base, train=False, load=load, split_name=role)
    except BadSampleError:  # the first sample tells size or rate, and is bad: any will do, it is listed later
        given = {"image_size": settings.image_size or _ANY_SIZE, "sample_rate": settings.sample_rate or _ANY_RATE}
        return open_source(settings.model_copy(update=given), source, base, train=False, load=load, split_name=role)
    except DataError as error:
        path = base / Path(source).expanduser()
        if not path.is_file() or not is_table(path, settings.form):
            raise
        opened = _mended(settings, path, base)
        problems.append(_refusal(name, error))
        return opened


def _refusal(name: str, error: DataError) -> Problem:
    return Problem(name, f"training would refuse this: {error.what}", error.got, error.fix)


def _mended(settings: DataSettings, path: Path, base: Path) -> Any:
    """A table as it stands; one of images, recordings or texts without the rows that lack one, or a label."""
    kind, target = kind_of_table(settings, path), settings.predicted or "label"
    contents = {"image": settings.image, "audio": settings.audio or "audio", "text": settings.text or "text"}
    texts = (contents["text"],) if kind == "text" else ()
    frame = read_frame(path, Form(settings.form.is_csv, settings.form.columns, texts))
    if kind == "table":
        return Rows(frame, str(path), settings.predicted, tuple(settings.drop), tuple(settings.categories), settings.id)
    for name in (contents[kind], target):
        if name in frame.column_names:
            frame = frame.filter(frame[name].is_valid())
    return open_table(settings.model_copy(update={"id": None}), path, base, frame=frame)
