"""Media are named by their content, written once, and checked when they are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchkeep.errors import RunFolderError
from torchkeep.watch.media import MediaStore


def test_equal_content_is_one_file(tmp_path: Path) -> None:
    media = MediaStore(tmp_path)
    names = {media.put(b"picture", ".png"), media.put(memoryview(b"picture"), ".png")}
    assert len(names) == 1
    assert media.read(names.pop()) == b"picture"
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


def test_damage_is_found(tmp_path: Path) -> None:
    media = MediaStore(tmp_path)
    name = media.put(b"picture", ".png")
    (tmp_path / name).write_bytes(b"pictura")
    with pytest.raises(RunFolderError, match="damaged"):
        media.read(name)
    (tmp_path / name).unlink()
    with pytest.raises(RunFolderError, match="cannot be read"):
        media.read(name)


@pytest.mark.parametrize("name", ["/etc/passwd", "media/../run.json", "media/ab/" + "0" * 64 + ".png", "media/x", ""])
def test_no_other_file_is_ever_opened(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunFolderError, match="no medium"):
        MediaStore(tmp_path).read(name)
