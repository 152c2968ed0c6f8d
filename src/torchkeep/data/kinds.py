"""What a sample may be: an image, a recording, a text, or a row of numbers. Each kind has its datasets."""

from __future__ import annotations

from typing import Any, Literal

from .audio import AudioTable, Clips
from .frames import Source
from .images import Images, ImageTable
from .labels import LabelledData
from .tables import Table
from .text import Texts, TextTable

Kind = Literal["image", "audio", "text", "table"]

ENCODED: dict[Kind, type[LabelledData]] = {"image": Images, "audio": Clips, "text": Texts}
"""What reads the encoded samples of each kind."""


def kind_of(dataset: LabelledData) -> Kind:
    """What the samples of a dataset are."""
    return next(kind for kind, base in ENCODED.items() if isinstance(dataset, base))


def table_of(kind: Kind, source: Source, column: str, label: str | None, **options: Any) -> Any:
    """The dataset of a table's rows. ``column`` is the one with the images, recordings or texts.

    Raises:  DataError where the table does not hold that
    """
    if kind == "table":
        return Table(source, label or "label", **options)
    if kind == "text":
        return TextTable(source, text=column, target=label, **options)
    table: Any = ImageTable if kind == "image" else AudioTable
    return table(source, **{kind: column}, label=label, **options)
