"""Names without objects, folders in the order of their names' bytes, and listings that are saved and opened again."""

from __future__ import annotations

import os
import shutil
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchkeep.chance import ChanceKey
from torchkeep.data import index
from torchkeep.data.blobs import ListedFiles
from torchkeep.data.images import ImageFolder
from torchkeep.data.index import Layout, Listing, Names, list_folder
from torchkeep.errors import BadSampleError, DataError

TEXTS = Layout((".txt",), "texts")
FLAT = Layout((".txt",), "texts", has_classes=False)
NAMES = st.binary(min_size=1, max_size=12)


def write(root: Path, *names: str | bytes, data: bytes = b"1") -> Path:
    for name in names:
        path = root / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def raw_names(listing: Listing) -> list[bytes]:
    return [listing.names.raw(i) for i in range(len(listing))]


# --- names


@given(st.lists(NAMES))
def test_names_come_back_byte_for_byte(names: list[bytes]) -> None:
    held = Names.of(names)
    assert len(held) == len(names)
    assert [held.raw(i) for i in range(len(held))] == names
    assert [os.fsencode(held[i]) for i in range(len(held))] == names
    assert held.lengths.tolist() == [len(name) for name in names]
    assert all(held.shown(i).encode() for i in range(len(held)))  # printable wherever UTF-8 is


@given(st.lists(st.lists(st.none() | st.text(max_size=4), max_size=5), max_size=4), st.data())
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
@settings(deadline=None)
def test_a_column_of_any_chunks_and_slices_is_its_names(
    kind: Any, chunks: list[list[str | None]], data: st.DataObject
) -> None:
    column = pa.chunked_array([pa.array(chunk, kind) for chunk in chunks], kind)
    start = data.draw(st.integers(0, len(column)))
    part = column.slice(start, data.draw(st.integers(0, len(column))))
    held = Names.of_column(part)
    assert [held[i] for i in range(len(held))] == [text or "" for text in part.to_pylist()]
    joined = Names.of_column(part.combine_chunks())
    assert joined.offsets.tolist() == held.offsets.tolist()


def test_a_dictionary_column_is_its_names() -> None:
    held = Names.of_column(pa.array(["b", None, "a", "b"]).dictionary_encode())
    assert [held[i] for i in range(4)] == ["b", "", "a", "b"]


def test_a_million_names_are_bytes_and_offsets_alone() -> None:
    held = Names.of(map(b"class/%07d.jpg".__mod__, range(1_000_000)))
    assert held.raw(999_999) == b"class/0999999.jpg"
    assert vars(held).keys() == {"blob", "offsets"}
    assert held.blob.nbytes + held.offsets.nbytes == 1_000_000 * (17 + 8) + 8  # one str alone has 66 bytes
    for numbers in (held.blob, held.offsets):
        assert sys.getsizeof(numbers.base) < 1.2 * numbers.nbytes  # both grow by an eighth at most


# --- folders


@given(st.sets(st.lists(st.sampled_from(["a", "b", "a.", "a-b", "B", "é", "名", "a b", "~"]), min_size=1, max_size=3)
               .map("/".join), min_size=1, max_size=12))  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_the_order_is_that_of_the_whole_names_bytes(tmp_path_factory: Any, stems: set[str]) -> None:
    root = write(tmp_path_factory.mktemp("root"), *[f"{stem}.txt" for stem in stems])
    found = raw_names(list_folder(root, FLAT))
    assert found == sorted(os.fsencode(f"{stem}.txt") for stem in stems)
    assert list_folder(root, FLAT).sizes_bytes.tolist() == [1] * len(stems)


def test_a_class_is_the_first_folder_and_a_loose_file_has_none(tmp_path: Path) -> None:
    write(tmp_path, "b/x.txt", "a/deep/er/x.TXT", "b/.hidden.txt", ".git/a.txt", "b/.d/a.txt", "b/x.png", "loose.txt")
    found = list_folder(tmp_path, TEXTS)
    assert raw_names(found) == [b"a/deep/er/x.TXT", b"b/x.txt"]
    assert found.classes == ("a", "b")
    assert found.labels.tolist() == [0, 1]
    assert found.labels.dtype == np.int32
    assert raw_names(list_folder(tmp_path, FLAT)) == [b"a/deep/er/x.TXT", b"b/x.txt", b"loose.txt"]


def test_a_pattern_finds_the_class_and_other_parts(tmp_path: Path) -> None:
    write(tmp_path, "ant_p2.txt", "bee_p1.txt", "sub/ant_p10.txt")
    found = list_folder(tmp_path, Layout((".txt",), "texts", True, r"(?P<label>[a-z]+)_p(?P<patient>\d+)(?P<no>x)?"))
    assert found.classes == ("ant", "bee")
    assert found.labels.tolist() == [0, 1, 0]
    assert found.column("patient").tolist() == ["2", "1", "10"]
    for name in ("no", "other"):
        with pytest.raises(DataError, match="do not tell this") as caught:
            found.column(name)
        assert "ant_p2.txt" in caught.value.got


@pytest.mark.parametrize("pattern", [r"(?P<label>\d+)", r"([a-z]+)", r"a(?P<label>x)?", "("])
def test_a_pattern_that_does_not_fit_is_answered(tmp_path: Path, pattern: str) -> None:
    write(tmp_path, "ant.txt")
    with pytest.raises(DataError) as caught:
        list_folder(tmp_path, Layout((".txt",), "texts", True, pattern))
    assert pattern.replace("\\", "\\\\") in caught.value.got


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take no names that are no UTF-8")
def test_names_that_are_no_utf8_are_listed_read_and_shown(tmp_path: Path) -> None:
    write(tmp_path, b"caf\xe9/\xff.txt", b"b/x.txt", data=b"12")
    found = list_folder(tmp_path, TEXTS)
    assert raw_names(found) == [b"b/x.txt", b"caf\xe9/\xff.txt"]
    assert found.path(1).read_bytes() == b"12"
    assert found.names.shown(1) == "caf\\xe9/\\xff.txt"
    assert found.classes == ("b", "caf\\xe9")


def test_links_within_are_followed_and_links_out_only_where_that_is_said(tmp_path: Path) -> None:
    root, out = write(tmp_path / "root", "a/x.txt"), write(tmp_path / "out", "y.txt", "notes")
    (root / "b").symlink_to(root / "a", target_is_directory=True)
    (root / "a" / "z.txt").symlink_to("x.txt")
    (root / "a" / "README").symlink_to(out / "notes")  # no text: not looked at
    assert raw_names(list_folder(root, TEXTS)) == [b"a/x.txt", b"a/z.txt", b"b/x.txt", b"b/z.txt"]
    for name, target in (("a/out.txt", out / "y.txt"), ("c", out)):
        (root / name).symlink_to(target)
        with pytest.raises(DataError, match="leads out") as caught:
            list_folder(root, TEXTS)
        assert "follow_links" in caught.value.fix
        assert name in caught.value.where
        followed = raw_names(list_folder(root, Layout((".txt",), "texts", follow_links=True)))
        assert (name if name.endswith(".txt") else f"{name}/y.txt").encode() in followed
        (root / name).unlink()


@pytest.mark.parametrize("follow_links", [False, True])
def test_links_that_go_round_end(tmp_path: Path, follow_links: bool) -> None:
    write(tmp_path, "a/x.txt", "b/y.txt")
    (tmp_path / "a" / "up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "a" / "b").symlink_to(tmp_path / "b", target_is_directory=True)
    (tmp_path / "b" / "a").symlink_to(tmp_path / "a", target_is_directory=True)
    (tmp_path / "b" / "self.txt").symlink_to("self.txt")
    found = list_folder(tmp_path, Layout((".txt",), "texts", follow_links=follow_links))
    names = raw_names(found)
    assert names == sorted(set(names))
    assert {b"a/x.txt", b"b/y.txt", b"a/b/y.txt", b"b/self.txt"} <= set(names)
    assert found.sizes_bytes[names.index(b"b/self.txt")] == -1


def test_a_folder_that_vanishes_while_it_is_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a/x.txt", "b/y.txt")
    size_bytes = index._size_bytes

    def vanishing(entry: Any) -> int:
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        return size_bytes(entry)

    monkeypatch.setattr(index, "_size_bytes", vanishing)
    with pytest.raises(DataError, match="cannot be listed") as caught:
        list_folder(tmp_path, TEXTS)
    assert caught.value.where == str(tmp_path / "b")


def test_a_user_without_a_home_can_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("TORCHKEEP_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    monkeypatch.setattr(index, "_SAVED_FROM", 1)
    assert list_folder(write(tmp_path, "a/x.txt"), TEXTS).saved_at is None


# --- saved listings


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("TORCHKEEP_CACHE", raising=False)
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    monkeypatch.setattr(index, "_SAVED_FROM", 2)
    made = write(tmp_path / "root", "a/1.txt", "a/2.txt", "b/deep/3.txt")
    settle(made)
    return made


def settle(root: Path) -> None:
    """As if nothing had changed for a minute."""
    for folder in (root, *(path for path in root.rglob("*") if path.is_dir())):
        past = folder.stat().st_mtime - 60
        os.utime(folder, (past, past))


def is_opened(root: Path, layout: Layout = TEXTS) -> bool:
    """Whether the listing is a saved one: its arrays are then mapped from files."""
    return isinstance(list_folder(root, layout).sizes_bytes, np.memmap)


def test_a_current_listing_is_opened_and_equal(root: Path) -> None:
    made, opened = list_folder(root, TEXTS), list_folder(root, TEXTS)
    assert isinstance(opened.names.blob, np.memmap)
    assert made.saved_at == opened.saved_at is not None
    assert opened.fingerprint() == made.fingerprint()
    assert raw_names(opened) == raw_names(made)
    for name in ("root", "classes", "pattern"):
        assert getattr(opened, name) == getattr(made, name)
    for name in ("labels", "sizes_bytes", "changed_ns"):
        np.testing.assert_array_equal(getattr(opened, name), getattr(made, name))
    opened._fingerprint = ""
    assert opened.fingerprint() == made.fingerprint()
    assert not is_opened(root, FLAT)  # another layout is another listing
    assert is_opened(root, FLAT)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take no names that are no UTF-8")
def test_a_listing_with_any_names_is_saved(tmp_path: Path, root: Path) -> None:
    other = write(tmp_path / os.fsdecode(b"r\xff"), b"\xe9/1.txt", b"\xe9/\xfe.txt", b"b/3.txt")
    settle(other)
    made = list_folder(other, TEXTS)
    assert is_opened(other)
    assert list_folder(other, TEXTS).classes == made.classes == ("\\xe9", "b")


CHANGES: dict[str, Callable[[Path], Any]] = {
    "added": lambda root: write(root, "b/deep/4.txt"),
    "removed": lambda root: (root / "a/1.txt").unlink(),
    "renamed": lambda root: (root / "a/1.txt").rename(root / "a/0.txt"),
    "moved": lambda root: (root / "a/1.txt").rename(root / "b/1.txt"),
    "new folder": lambda root: write(root, "c/1.txt"),
    "folder gone": lambda root: shutil.rmtree(root / "b/deep"),
    "replaced": lambda root: os.replace(write(root / "a", "new.txt", data=b"22") / "new.txt", root / "a/1.txt"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_listing_that_is_not_the_disks_is_not_used(root: Path, change: str) -> None:
    before = list_folder(root, TEXTS)
    assert is_opened(root)
    CHANGES[change](root)
    after = list_folder(root, TEXTS)
    on_disk = sorted(path.relative_to(root).as_posix().encode() for path in root.rglob("*.txt"))
    assert raw_names(after) == on_disk
    assert after.fingerprint() != before.fingerprint()
    assert not isinstance(after.sizes_bytes, np.memmap)
    assert after.saved_at is None  # it changed just now, and may change again under the same time stamp
    settle(root)
    assert not is_opened(root)
    assert is_opened(root)


def test_a_small_or_a_fresh_folder_is_not_saved(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(root, "a/new.txt")
    assert list_folder(root, TEXTS).saved_at is None
    settle(root)
    monkeypatch.setattr(index, "_SAVED_FROM", 5)
    assert list_folder(root, TEXTS).saved_at is None


FILES = ["names", "offsets", "sizes", "labels", "folders", "folder_offsets", "changed"]
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:-8],
    "longer": lambda data: data + data[:8],
    "flipped": lambda data: bytes([data[0] ^ 1]) + data[1:],
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [*(f"{name}.bin" for name in FILES), "listing.json", "manifest.json"])
def test_a_damaged_listing_is_made_anew(root: Path, name: str, damage: str) -> None:
    made = list_folder(root, TEXTS)
    assert made.saved_at is not None
    file = made.saved_at / name
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    assert Listing.open(made.saved_at) is None
    assert list_folder(root, TEXTS).fingerprint() == made.fingerprint()
    assert is_opened(root)


def test_a_large_listing_is_checked_while_the_work_begins(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = list_folder(root, TEXTS)
    assert made.saved_at is not None
    monkeypatch.setattr(index, "_CHECKED_AT_ONCE", 0)
    whole = Listing.open(made.saved_at)
    assert whole is not None
    assert whole.checked.wait(10)
    assert ListedFiles(whole).read(0, "here") == ListedFiles(made).read(0, "here")
    file = made.saved_at / "labels.bin"
    file.write_bytes(DAMAGE["flipped"](file.read_bytes()))
    opened = Listing.open(made.saved_at)
    if opened is not None:  # the check had not ended yet
        assert opened.checked.wait(10)
        with pytest.raises(BadSampleError, match="no longer true"):
            ListedFiles(opened).read(0, "here")


@pytest.mark.parametrize("lost", ["a file", "all", "a file stands there"])
def test_a_lost_listing_is_made_anew_and_no_cache_is_no_error(root: Path, tmp_path: Path, lost: str) -> None:
    saved = list_folder(root, TEXTS).saved_at
    assert saved is not None
    if lost == "a file":
        (saved / "labels.bin").unlink()
    else:
        shutil.rmtree(tmp_path / "cache")
    if lost == "a file stands there":
        (tmp_path / "cache").write_bytes(b"")
    assert raw_names(list_folder(root, TEXTS)) == [b"a/1.txt", b"a/2.txt", b"b/deep/3.txt"]
    assert is_opened(root) is (lost != "a file stands there")


def test_a_file_rewritten_in_place_is_a_bad_sample_that_names_the_listing(tmp_path: Path, root: Path) -> None:
    from PIL import Image

    images = tmp_path / "images"
    for number in range(3):
        (images / "a").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(images / f"a/{number}.bmp")
    settle(images)
    ImageFolder(images)
    data = ImageFolder(images)
    saved = data.listing.saved_at
    assert isinstance(data.listing.sizes_bytes, np.memmap)
    assert data.read(1, ChanceKey())["image"][0, 0, 0] == 1
    (images / "a/1.bmp").write_bytes((images / "a/0.bmp").read_bytes() + b"0")
    with pytest.raises(BadSampleError) as caught:
        ImageFolder(images).read(1, ChanceKey())
    assert str(saved) in caught.value.fix
    assert "a/1.bmp" in caught.value.where
    assert saved is not None
    shutil.rmtree(saved)
    assert ImageFolder(images).read(1, ChanceKey())["image"][0, 0, 0] == 0


def test_a_million_saved_names_are_mapped_not_held(tmp_path: Path) -> None:
    count = 1_000_000
    names = Names.of(map(b"class/%07d.jpg".__mod__, range(count)))
    sizes, labels = np.zeros(count, np.int64), np.zeros(count, np.int32)
    folders, times = Names.of(["", "class/"]), np.zeros(2, np.int64)
    Listing(tmp_path, names, sizes, labels, ("class",), folders, times).save(tmp_path / "saved")
    tracemalloc.start()
    opened = Listing.open(tmp_path / "saved")
    size, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert opened is not None
    assert opened.names[123_456] == "class/0123456.jpg"
    assert size < peak < 1_000_000  # of 37 MB
