"""The verb survey: each split opened by itself, also where training would refuse it, with what it would say."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from ..data.cache import CachePlan, fill, with_cache
from ..data.contents import Progress, Rows
from ..data.frames import is_table, read_frame
from ..data.loader import usable_cores
from ..data.reading import Bad
from ..data.sheet import contact_sheet
from ..data.sources import DataSettings, SplitName, kind_of_table, open_data, open_source, open_table
from ..data.splits import split
from ..data.survey import Problem, Survey, examined
from ..errors import BadSampleError, DataError
from ..files import make_folder, write_durable
from ..settings import Settings, check, override
from ..tensors import to_json
from ..usercode import load_function
from .recipe import read_recipe

_SPLITS = ("train", "valid", "test")
_ROLES = {"train": "train", "training": "train", "val": "valid", "valid": "valid", "validation": "valid",
          "dev": "valid", "test": "test"}  # fmt: skip
_ANY_SIZE, _ANY_RATE = 224, 16_000


class _Sources(Settings):
    data: DataSettings


def survey(
    sources: str | Path | Sequence[str | Path] | Mapping[str, Any], *, set: Sequence[str] = (),
    output: str | Path | None = None, progress: Progress | None = None,
) -> Survey:  # fmt: skip
    """What is in the data of a recipe, of one or more sources such as ``data.train`` names, or of datasets by split.

    Sources are the splits, named by a word such as "val" in their paths, else train, valid and test in order. ``set``
    says how they are read, ``["data.target=income"]``. ``output`` is a folder for survey.json and the contact
    sheet, sheet.png. ``progress(split, done, total)`` is called on the way.

    Raises:  SettingsError, DataError where there is nothing to look at; what training would refuse is a finding
    """
    problems: list[Problem] = []
    if isinstance(sources, Mapping):
        datasets = dict(sources)
    else:
        names = [str(sources)] if isinstance(sources, str | Path) else list(map(str, sources))
        datasets = _opened_splits(names, list(set), problems)
    found = examined(datasets, problems, progress)
    if output is not None:
        make_folder(Path(output))
        write_durable(Path(output) / "survey.json", to_json(found.to_json(), indent=True))
        write_durable(Path(output) / "sheet.png", contact_sheet(found))
    return found


def build_cache(
    sources: Sequence[str], *, set: Sequence[str] = (), progress: Progress | None = None
) -> dict[str, tuple[CachePlan, list[Bad]]]:  # fmt: skip
    """Decode each image once into the cache on the disk where a training with ``data.cache = "disk"`` will find it.

    ``sources`` and ``set`` are those of ``survey``. For each split its plan, and the samples that cannot be read.

    Raises:  SettingsError where a split is none of images, DataError as opening them does
    """
    settings, seed, base = _settings_of(list(sources), _named_splits(list(sources)), list(set))
    report, built = progress or (lambda name, done, total: None), {}
    splits = vars(open_data(settings, base, seed, load_function))
    for name, dataset in splits.items():
        if dataset is not None:
            cached, plan = with_cache(dataset, "disk")
            built[name] = plan, fill(cached, usable_cores(), partial(report, name))
    return built


def _is_recipe(sources: list[str]) -> bool:
    return len(sources) == 1 and sources[0].endswith(".toml")


def _settings_of(
    sources: list[str], named: dict[str, str], assignments: list[str]
) -> tuple[DataSettings, int, Path]:  # fmt: skip
    """The settings of a recipe or of named splits, the seed, and the folder that names are relative to."""
    if _is_recipe(sources):
        recipe, base = read_recipe(sources[0], assignments)
        return recipe.data, recipe.seed, base
    return check(_Sources, override({"data": named}, assignments), "survey").data, 0, Path.cwd()


def _opened_splits(sources: list[str], assignments: list[str], problems: list[Problem]) -> dict[str, Any]:
    named = _named_splits(sources)
    settings, seed, base = _settings_of(sources, {"train": next(iter(named.values()))}, assignments)
    if _is_recipe(sources):
        named = {name: source for name in _SPLITS if (source := getattr(settings, name))}
    opened = {name: _opened(settings, source, base, name, problems) for name, source in named.items()}
    if settings.valid_fraction is not None and hasattr(opened.get("train"), "read"):
        try:
            parts = split(opened["train"], settings.valid_fraction, seed, settings.split_by, settings.test_fraction)
            opened = {**dict(zip(_SPLITS, parts, strict=False)), **opened, "train": parts[0]}
        except DataError as error:
            problems.append(_refusal("train", error))
    return opened


def _named_splits(sources: list[str]) -> dict[str, str]:
    """Names for sources: by a word such as "val" in their own last part, else train, valid and test in order.

    A folder that holds nothing but folders of such names stands for them.
    """
    expanded = [part for source in sources for part in _splits_in(source) or [source]]
    words = [re.findall(r"[a-z]+", re.split(r"[/\\]", source.rstrip("/\\"))[-1].lower()) for source in expanded]
    said = [next((_ROLES[word] for word in found if word in _ROLES), None) for found in words]
    free = [role for role in _SPLITS if role not in said]
    named: dict[str, str] = {}
    for source, role in zip(expanded, said, strict=True):
        name = role or (free.pop(0) if free else source)
        named[source if name in named else name] = source
    return dict(sorted(named.items(), key=lambda pair: pair[0] != "train"))


def _splits_in(source: str) -> list[str]:
    folder = Path(source).expanduser()
    inside = sorted(found for found in folder.iterdir() if found.name[0] != ".") if folder.is_dir() else []
    are_splits = all(found.is_dir() and found.name in _ROLES for found in inside)
    return list(map(str, inside)) if are_splits else []


def _opened(settings: DataSettings, source: str, base: Path, name: str, problems: list[Problem]) -> Any:
    role = cast(SplitName, name if name in _SPLITS else "train")
    told: dict[str, Any] = {"train": False, "load": load_function, "split_name": role}
    try:
        return open_source(settings, source, base, **told)
    except BadSampleError:  # the first sample tells size or rate, and is bad: any will do, it is listed later
        given = {"image_size": settings.image_size or _ANY_SIZE, "sample_rate": settings.sample_rate or _ANY_RATE}
        return open_source(settings.model_copy(update=given), source, base, **told)
    except DataError as error:
        path = base / Path(source).expanduser()
        if not path.is_file() or not is_table(path, settings.form):
            raise
        problems.append(_refusal(name, error))
        return _mended(settings, path, base)


def _refusal(name: str, error: DataError) -> Problem:
    return Problem(name, f"training would refuse this: {error.what}", error.got, error.fix)


def _mended(settings: DataSettings, path: Path, base: Path) -> Any:
    """A table as it stands; one of images, recordings or texts without the rows that lack one, or a label."""
    told = settings.model_copy(update={"kind": kind_of_table(settings, path), "id": None})
    frame = read_frame(path, told.form)
    if told.kind == "table":
        return Rows(frame, told.predicted, tuple(told.drop), tuple(told.categories), settings.id)
    for name in {told.column_of(told.kind), told.predicted or "label"}.intersection(frame.column_names):
        frame = frame.filter(frame[name].is_valid())
    return open_table(told, path, base, frame=frame)
