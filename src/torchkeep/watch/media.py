"""What is too big for a line of the record: files named by their content, written once, checked when read."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ..contracts import Json
from ..errors import RunFolderError
from ..files import write_durable

FOLDER = "media"
_NAME = re.compile(r"media/([0-9a-f]{2})/(\1[0-9a-f]{62})(\.[a-z0-9]{1,16})")


class MediaStore:
    """The media of one run; ``folder`` is the run's."""

    def __init__(self, folder: Path):
        self.folder = folder

    def put(self, data: bytes | memoryview, suffix: str) -> str:
        """Keep the data and give the name that a record holds: "media/3f/3fa9….png".

        Raises:  StorageError where the disk refuses
        """
        digest = hashlib.sha256(data).hexdigest()
        name = f"{FOLDER}/{digest[:2]}/{digest}{suffix}"
        path = self.folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_durable(path, data)
        return name

    def path(self, name: str) -> Path:
        """Where a file lies that a record names.

        Raises:  RunFolderError for a name that no record of ours has
        """
        if not _NAME.fullmatch(name):
            raise RunFolderError(
                "the record names a file that is no medium", where=self.folder, got=name[:100],
                expected="media/ab/ab….png",
            )  # fmt: skip
        return self.folder / name

    def read(self, name: str) -> bytes:
        """The data as they were kept.

        Raises:  RunFolderError where they are missing or damaged
        """
        path = self.path(name)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise RunFolderError("a medium of the run cannot be read", where=path, got=error.strerror) from None
        if hashlib.sha256(data).hexdigest() != path.stem:
            raise RunFolderError(
                "a medium of the run is damaged", where=path, got=f"{len(data):,} bytes of another content",
                expected="the content that its name is the sha256 of",
            )  # fmt: skip
        return data


class Late(Protocol):
    """A payload that is finished on the writer's thread, so that the trainer's waits for no picture."""

    def settle(self, media: MediaStore) -> dict[str, Json]: ...


@dataclass(frozen=True)
class Medium:
    """A file with what a record says of it beside."""

    data: bytes
    suffix: str
    facts: dict[str, Json] = field(default_factory=dict)

    def settle(self, media: MediaStore) -> dict[str, Json]:
        return {"media": media.put(self.data, self.suffix), **self.facts}
