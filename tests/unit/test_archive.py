"""A package's file gives back what was written into it, and any other byte than those of its one form is refused."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import stat
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch

from torchkeep import archive
from torchkeep.archive import HEAD, Archive, write_archive
from torchkeep.errors import PackageError
from torchkeep.tensors import to_safetensors

TENSORS = {"weight": torch.arange(12.0).reshape(3, 4), "bias": torch.ones(3, dtype=torch.bfloat16)}
MEMBERS: dict[str, Any] = {
    "architecture.json": b'{"name": "mlp", "args": {"width": 3}}',
    "parameters.safetensors": to_safetensors(TENSORS),
    "code/model.py": b"print('hello')\n",
    "README.md": memoryview(b"# A model\n"),
    "empty": b"",
}
FORMS = pytest.mark.parametrize("folder", [False, True], ids=["zip", "folder"])


def written(path: Path, members: dict[str, Any] = MEMBERS, **given: Any) -> Path:
    write_archive(path, members, **given)
    return path


def read_all(path: Path) -> dict[str, bytes]:
    """Every member, by every way of reading that there is."""
    opened = Archive.open(path)
    opened.verify()
    for name in opened.names:
        if name.endswith(".json"):
            opened.json(name)
        if name.endswith(".safetensors"):
            opened.tensors(name)
    return {name: bytes(opened.read(name)) for name in opened.names}


def bytes_of(content: Any) -> bytes:
    return b"".join(content) if isinstance(content, list) else bytes(content)


# --- what is written


@FORMS
def test_a_package_gives_back_what_was_written(folder: bool, tmp_path: Path) -> None:
    path = written(tmp_path / "new" / "a.tkp", head={"name": "ants"}, folder=folder)
    opened = Archive.open(path)
    assert read_all(path) == {name: bytes_of(content) for name, content in MEMBERS.items()}
    assert opened.names == tuple(sorted(MEMBERS))
    assert (opened.head["name"], opened.head["format"]) == ("ants", 1)
    assert opened.json("architecture.json")["args"] == {"width": 3}
    tensors = opened.tensors("parameters.safetensors")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
    assert [file.name for file in path.parent.iterdir()] == ["a.tkp"]


def test_the_same_members_are_the_same_bytes(tmp_path: Path) -> None:
    first = written(tmp_path / "a", head={"name": "ants"})
    again = written(tmp_path / "b", dict(reversed(MEMBERS.items())), head={"name": "ants"})
    as_folder = written(tmp_path / "c", head={"name": "ants"}, folder=True)
    opened = Archive.open(as_folder)
    copy = written(tmp_path / "d", {name: opened.read(name) for name in opened.names}, head=opened.head)
    assert first.read_bytes() == again.read_bytes() == copy.read_bytes()
    assert (
        Archive.open(first).identity == opened.identity == hashlib.sha256((as_folder / HEAD).read_bytes()).hexdigest()
    )
    other = written(tmp_path / "e", MEMBERS | {"empty": b"1"}, head={"name": "ants"})
    assert Archive.open(other).identity != opened.identity


def test_others_read_it_as_a_zip(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tkp")
    with zipfile.ZipFile(path) as found:
        assert found.testzip() is None
        assert found.namelist() == [HEAD, *sorted(MEMBERS)]
        assert {name: found.read(name) for name in MEMBERS} == read_all(path)
    if unzip := shutil.which("unzip"):
        subprocess.run([unzip, "-q", path, "-d", tmp_path / "out"], check=True, stderr=subprocess.STDOUT)
        assert read_all(tmp_path / "out") == read_all(path)  # a package still


def test_every_member_begins_at_a_multiple_of_64(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tkp", {f"{'n' * n}/m": bytes([n]) * n for n in range(1, 150)})
    places = Archive.open(path)._places
    assert {place % 64 for place in places.values()} == {0}
    assert all(path.read_bytes()[places[f"{'n' * n}/m"] :][:n] == bytes([n]) * n for n in range(1, 150))


@FORMS
def test_training_on_the_tensors_changes_no_file(folder: bool, tmp_path: Path) -> None:
    path = written(tmp_path / "a.tkp", folder=folder)
    opened = Archive.open(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensors = opened.tensors("parameters.safetensors")
    tensors["weight"].add_(1)
    assert torch.equal(tensors["weight"], TENSORS["weight"] + 1)
    assert torch.equal(opened.tensors("parameters.safetensors")["weight"], TENSORS["weight"])
    assert read_all(path) == {name: bytes_of(content) for name, content in MEMBERS.items()}
    with pytest.raises(TypeError, match="read-only"):
        opened.read("README.md")[0] = 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_tensors_are_mapped_and_not_copied(tmp_path: Path) -> None:
    def anonymous_bytes() -> int:
        rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(rows["RssAnon"].split()[0]) << 10

    path = written(tmp_path / "a.tkp", {"p.safetensors": to_safetensors({"w": torch.ones(16 << 20)})})
    before = anonymous_bytes()
    tensor = Archive.open(path).tensors("p.safetensors")["w"]
    assert tensor[:: 1 << 10].sum() == 16 << 10
    assert anonymous_bytes() - before < 8 << 20
    if not path.unlink():
        assert tensor[-1] == 1  # what is mapped outlives the name, and the archive


@FORMS
def test_a_package_takes_the_place_of_another(folder: bool, tmp_path: Path) -> None:
    path = written(tmp_path / "a.tkp", {"a/b.json": b"1", "c.json": b"2"}, folder=folder)
    written(path, {"d/e/f.json": b"3"}, folder=folder)
    assert read_all(path) == {"d/e/f.json": b"3"}
    assert [file.name for file in tmp_path.iterdir()] == ["a.tkp"]


def test_no_folder_of_anything_else_is_replaced(tmp_path: Path) -> None:
    written(tmp_path / "package", folder=True)
    (tmp_path / "package" / "mine.txt").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for path, folder in [("package", True), ("package", False), ("file", True), ("", True)]:
        with pytest.raises(PackageError, match="something else"):
            written(tmp_path / path, folder=folder)
    assert (tmp_path / "package" / "mine.txt").read_text() == (tmp_path / "file").read_text() == "kept"


NAMES = [
    "", ".", "..", "/", "/a", "a/", "a//b", "../a", "a/../b", "a/./b", "./a", "a\\b", "C:a", ".hidden", "a.",
    "a./b", "-a", "a b", "a\n", "a\0", "é", "\u017f", "CON", "a/nul.txt", "com1.x", HEAD, HEAD.upper(),
    f"{HEAD}/a", "n" * 201,
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_some_system_cannot_hold_is_not_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="cannot hold"):
        written(tmp_path / "a.tkp", {name: b""})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("names", ["a A", "a a/b", "a A/b", "x/a X/b", "x/a X/A", "x/y/a x/Y/b"])
def test_names_that_meet_are_not_written(names: str, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="already"):
        written(tmp_path / "a.tkp", dict.fromkeys(names.split(), b""))


def test_what_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    heads: list[dict[str, Any]] = [
        {"x": object()},
        {"x": 1 << 70},
        {"x": "y" * (5 << 20)},
        {"format": 2},
        {"checksum": 0},
    ]
    for head in [*heads, {"x": json.loads("[" * 70 + "]" * 70)}]:
        with pytest.raises(PackageError):
            written(tmp_path / "a.tkp", head=head)
    with pytest.raises(PackageError, match="1,000"):
        written(tmp_path / "a.tkp", {f"m{n}": b"" for n in range(1001)})
    written(tmp_path / "a.tkp", {f"m{n}": b"" for n in range(1000)})
    assert len(read_all(tmp_path / "a.tkp")) == 1000


def test_what_is_beyond_4_gib_is_a_zip64(tmp_path: Path) -> None:
    contents = {"a": 5 << 30, "b": 3, "c": 0xFFFFFFFE, "d": 3}  # b and d begin beyond 4 GiB; c is just not wide itself
    fake = {name: archive.Sums(size, "00000000", "0" * 32, "0" * 64) for name, size in contents.items()}
    small = archive._sums_of([memoryview(b"end")])
    rows = fake | {"b": small, "d": small}
    text = archive._head_text({"format": 1, "torchkeep": "0", "members": {n: r._asdict() for n, r in rows.items()}})
    headers, end, tail = archive._laid_out(text, rows)
    path = tmp_path / "a.tkp"
    with path.open("wb") as file:  # sparse: what was not written takes no room
        for name, (header, place) in headers.items():
            file.seek(place - len(header))
            file.write(header + {"b": b"end", "d": b"end", HEAD: text}.get(name, b""))
        file.seek(end)
        file.write(tail)
    opened = Archive.open(path)
    assert bytes(opened.read("b")) == bytes(opened.read("d")) == b"end"
    with zipfile.ZipFile(path) as found:
        assert {info.filename: info.file_size for info in found.infolist()[1:]} == contents
        assert found.read("b") == found.read("d") == b"end"
        assert found.getinfo("d").header_offset > 9 << 30
    if unzip := shutil.which("unzip"):
        subprocess.run([unzip, "-tq", path, "b", "d"], check=True, stdout=subprocess.DEVNULL)


# --- what is refused


def refused(path: Path, peak_bytes: int = 32 << 20) -> PackageError:
    """The one error, with nothing written anywhere near and little memory taken."""
    before = sorted(path.parent.rglob("*"))
    tracemalloc.start()
    try:
        with pytest.raises(PackageError) as caught:
            read_all(path)
        assert tracemalloc.get_traced_memory()[1] < peak_bytes
    finally:
        tracemalloc.stop()
    assert sorted(path.parent.rglob("*")) == before
    assert caught.value.where
    assert len(str(caught.value)) < 2000
    return caught.value


@pytest.fixture
def good(tmp_path: Path) -> bytes:
    return written(tmp_path / "good.tkp").read_bytes()


def test_a_package_cut_off_anywhere_is_refused(good: bytes, tmp_path: Path) -> None:
    for size in range(0, len(good), 7):
        (tmp_path / "a.tkp").write_bytes(good[:size])
        with pytest.raises(PackageError):
            Archive.open(tmp_path / "a.tkp")


@FORMS
def test_a_bit_that_flips_anywhere_is_refused(folder: bool, good: bytes, tmp_path: Path) -> None:
    path = written(tmp_path / "a.tkp", folder=folder)
    for file in sorted(path.rglob("*")) if folder else [path]:
        whole = file.read_bytes() if file.is_file() else b""
        for place in range(0, len(whole), 3):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
            with pytest.raises(PackageError):
                read_all(path)
        if whole:
            file.write_bytes(whole)
    assert read_all(path)


Change = Callable[[bytes], bytes]
_DIRECTORY, _END = b"PK\1\2", b"PK\5\6"


def patched(sign: bytes, place: int, value: bytes) -> Change:
    """Other bytes at a place behind the last such sign."""

    def change(data: bytes) -> bytes:
        at = data.rindex(sign) + place
        return data[:at] + value + data[at + len(value) :]

    return change


CHANGED: dict[str, Change] = {
    "bytes before": lambda data: b"#!/bin/sh\n" + data,
    "bytes after": lambda data: data + b"\0",
    "two in one": lambda data: data + data,
    "a comment": lambda data: data[:-2] + b"\2\0hi",
    "a comment that is stated": patched(_END, 20, b"\1\0"),
    "another count": patched(_END, 8, b"\1\0\1\0"),
    "a directory elsewhere": patched(_END, 16, b"\0\0\0\0"),
    "encryption": patched(_DIRECTORY, 8, b"\1\0"),
    "encryption, in the member": patched(b"PK\3\4", 6, b"\1\0"),
    "a data descriptor": patched(b"PK\3\4", 6, b"\x08\0"),
    "compression": patched(_DIRECTORY, 10, b"\x08\0"),
    "compression, in the member": patched(b"PK\3\4", 8, b"\x08\0"),
    "a link": patched(_DIRECTORY, 38, struct.pack("<I", (stat.S_IFLNK | 0o777) << 16)),
    "made by Unix": patched(_DIRECTORY, 4, b"\x0a\3"),
    "a member over another": patched(_DIRECTORY, 42, b"\0\0\0\0"),
    "another size": patched(_DIRECTORY, 20, b"\1\0\0\0\1\0\0\0"),
    "another name": patched(_DIRECTORY, 46, b"q"),
    "another name, in the member": patched(b"PK\3\4", 30, b"q"),
    "bytes in the padding": patched(b"PK\3\4", 30 + len("parameters.safetensors") + 8, b"hidden"),
    "half a package.json": patched(b"PK\3\4\x0a\0\0\0\0\0\0\0\x21\0", 18, b"\1\0\0\0\1\0\0\0"),
    "no zip": lambda data: b"hello",
    "nothing": lambda data: b"",
    "half a header": lambda data: data[:40],
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_package_that_was_changed_is_refused(name: str, good: bytes, tmp_path: Path) -> None:
    changed = CHANGED[name](good)
    assert changed != good
    (tmp_path / "a.tkp").write_bytes(changed)
    refused(tmp_path / "a.tkp")


def zipped(*rows: tuple[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip as others make it, with whatever names."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", method) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that is there twice
        for name, data in rows:
            file.writestr(name, data)
    return made.getvalue()


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


def test_zips_of_others_are_refused(tmp_path: Path) -> None:
    inner = archive._head_text({"format": 1, "torchkeep": "0", "members": {}})
    saved = io.BytesIO()
    torch.save(TENSORS, saved)
    hostile = {
        "a bomb": zipped((HEAD, inner), ("zeros", bytes(256 << 20)), method=zipfile.ZIP_DEFLATED),
        "a bomb first": zipped((HEAD, bytes(256 << 20)), method=zipfile.ZIP_DEFLATED),
        "up": zipped((HEAD, inner), ("../canary", b"x")),
        "absolute": zipped((HEAD, inner), (str(tmp_path / "canary"), b"x")),
        "a link": zipped((HEAD, inner), (link("a"), b"/etc/passwd")),
        "twice": zipped((HEAD, inner), (HEAD, inner)),
        "10,000 members": zipped((HEAD, inner), *((f"m{n}", b"") for n in range(10_000))),
        "a checkpoint of torch": saved.getvalue(),
        "a package, zipped anew": zipped((HEAD, inner)),
    }
    for data in hostile.values():
        (tmp_path / "a.tkp").write_bytes(data)
        assert "unzip it" in refused(tmp_path / "a.tkp").fix
    assert [file.name for file in tmp_path.iterdir()] == ["a.tkp"]


def sealed(members: dict[str, bytes], head: dict[str, Any] | None = None, rows: dict[str, Any] | None = None) -> bytes:
    """A package whose every checksum is right, whatever its names are and its package.json says."""
    parts = {name: [memoryview(content)] for name, content in members.items()}
    sums = {name: archive._sums_of(content) for name, content in parts.items()}
    said = {name: row._asdict() for name, row in sums.items()} if rows is None else rows
    text = archive._head_text({"format": 1, "torchkeep": "0", "members": said} | (head or {}))
    return b"".join(archive._zipped(text, sums, parts))


def test_names_that_a_package_cannot_hold_are_refused(tmp_path: Path) -> None:
    for name in NAMES:
        if name.isascii() and name != HEAD:
            (tmp_path / "a.tkp").write_bytes(sealed({name: b"x"}))
            assert "a member of the name" in refused(tmp_path / "a.tkp").got
    for names in (["a", "b", "B"], ["a", "a/b"], [f"m{n}" for n in range(10_000)], ["b", "a"]):
        (tmp_path / "a.tkp").write_bytes(sealed(dict.fromkeys(names, b"")))
        refused(tmp_path / "a.tkp")
    assert [file.name for file in tmp_path.iterdir()] == ["a.tkp"]


A = archive._sums_of([memoryview(b"x")])._asdict()
LIES: dict[str, dict[str, Any]] = {
    "no members": {"head": {"members": None}},
    "a list of members": {"head": {"members": ["a"]}},
    "no version": {"head": {"torchkeep": None}},
    "format 0": {"head": {"format": 0}},
    "format true": {"head": {"format": True}},
    "a format in words": {"head": {"format": "1"}},
    "no format": {"head": {"format": None}},
    "a member that is not there": {"rows": {"a": A, "b": A}},
    "a member left out": {"rows": {}},
    "a size too large": {"rows": {"a": A | {"bytes": 1 << 40}}},
    "a size beyond all": {"rows": {"a": A | {"bytes": (1 << 64) - 1}}},
    "a size below nothing": {"rows": {"a": A | {"bytes": -1}}},
    "a size in words": {"rows": {"a": A | {"bytes": "1"}}},
    "a size in parts": {"rows": {"a": A | {"bytes": 1.0}}},
    "a size that is true": {"rows": {"a": A | {"bytes": True}}},
    "a row that is none": {"rows": {"a": 1}},
    "a row without a checksum": {"rows": {"a": {"bytes": 1}}},
    "a row that says more": {"rows": {"a": A | {"mode": 0o777}}},
    "a checksum in capitals": {"rows": {"a": A | {"crc32": A["crc32"].upper()}}},
    "a checksum that is a number": {"rows": {"a": A | {"crc32": 10**7}}},
    "another xxh3": {"rows": {"a": A | {"xxh3_128": "0" * 32}}},
    "another sha256": {"rows": {"a": A | {"sha256": "0" * 64}}},
    "another crc32": {"rows": {"a": A | {"crc32": "0" * 8}}},
}


@pytest.mark.parametrize("name", LIES)
def test_a_package_json_that_lies_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.tkp").write_bytes(sealed({"a": b"x"}, **LIES[name]))
    refused(tmp_path / "a.tkp")


@pytest.mark.parametrize(
    "text",
    [b"", b"[", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 1000 + b"1" + b"}" * 1000, b'{"format": NaN}',
     b'{"format": 1, "format": 1}', b'{"format": 1e999}', b'{"format": ' + b"9" * 5000 + b"}", b" " * (5 << 20),
     b'{"format": 1, "torchkeep": "\\ud800", "members": {}}', b"1" + b"0" * 400],
    ids=lambda text: repr(text[:20]),
)  # fmt: skip
@FORMS
def test_a_package_json_that_is_none_is_refused(text: bytes, folder: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.tkp"
    if folder:
        path.mkdir()
        (path / HEAD).write_bytes(text)
    else:
        path.write_bytes(b"".join(archive._zipped(text, {}, {})))
    refused(path)


@FORMS
@pytest.mark.parametrize("number", [2, 10**9, 10**30])
def test_a_newer_format_is_said(number: int, folder: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.tkp"
    text = json.dumps({"format": number, "torchkeep": "9\x1b[2J", "shape": "unknown"}).encode()
    if folder:
        path.mkdir()
        (path / HEAD).write_bytes(text)
        (path / "new").write_bytes(b"")
        (path / "new").unlink()
    else:
        path.write_bytes(archive._local_header(HEAD, len(text), zlib.crc32(text), 0) + text + b"whatever follows")
    error = refused(path)
    assert error.what == "this package is of a newer format"
    assert error.fix == "pip install -U torchkeep"
    assert "\x1b" not in str(error)


WRONG_JSON = [
    b"NaN",
    b"[" * 5000,
    b"[" * 65 + b"]" * 65,
    b'{"a": 1, "a": 2}',
    b"Infinity",
    b"1e999",
    b"'a'",
    b"\xff",
    b"",
]
WRONG_TENSORS = {
    "empty": b"",
    "a header beyond all": struct.pack("<Q", (1 << 64) - 1) + b"{}",
    "a header beyond the file": struct.pack("<Q", 1 << 20) + b"{}",
    "deep": struct.pack("<Q", 5000) + b"[" * 5000,
    "overlapping": [("a", "F32", [2], [0, 8]), ("b", "F32", [2], [4, 12])],
    "with a gap": [("a", "F32", [1], [0, 4]), ("b", "F32", [1], [8, 12])],
    "beyond the end": [("a", "F32", [4], [0, 16])],
    "of another size": [("a", "F32", [2], [0, 12])],
    "below nothing": [("a", "F32", [-1, -3], [0, 12])],
    "of no type": [("a", "os.system", [3], [0, 12])],
    "of no dimension": [("a", "F32", [0, 1 << 62, 1 << 62], [0, 0])],
    "with too few": [("a", "F32", [1], [0, 4])],
}


def safetensors_of(rows: list[tuple[str, str, list[int], list[int]]]) -> bytes:
    header = orjson.dumps({name: {"dtype": d, "shape": s, "data_offsets": o} for name, d, s, o in rows})
    return struct.pack("<Q", len(header)) + header + bytes(12)


@FORMS
def test_members_of_another_form_are_refused(folder: bool, tmp_path: Path) -> None:
    hostile = [("a.json", data) for data in WRONG_JSON]
    hostile += [
        ("p.safetensors", data if isinstance(data, bytes) else safetensors_of(data)) for data in WRONG_TENSORS.values()
    ]
    for name, data in hostile:
        path = written(tmp_path / "a.tkp", {name: data}, folder=folder)
        Archive.open(path).verify()  # it is as it was written
        assert refused(path).where == f"{name} in {path}"


def test_json_that_is_too_long_is_not_parsed(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tkp", {"a.json": b" " * ((64 << 20) + 1)})
    assert "67,108,864" in refused(path, peak_bytes=1 << 20).got


def test_a_folder_with_anything_else_is_refused(tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    outside.write_bytes(MEMBERS["architecture.json"])
    changes: list[Callable[[Path], object]] = [
        lambda path: (path / "more.txt").write_text(""),
        lambda path: (path / "code" / "more.py").write_text(""),
        lambda path: (path / "empty").unlink(),
        lambda path: (path / "empty").write_text("1"),
        lambda path: (path / HEAD).unlink(),
        lambda path: (path / "README.md").rename(path / "readme.md"),
        lambda path: [(path / f"m{n}").touch() for n in range(10_000)],
    ]
    if sys.platform != "win32":
        changes += [
            lambda path: ((path / "architecture.json").unlink(), (path / "architecture.json").symlink_to(outside)),
            lambda path: (path / "code").rename(tmp_path / "code") and (path / "code").symlink_to(tmp_path / "code"),
            lambda path: ((path / "empty").unlink(), os.mkfifo(path / "empty")),
        ]
    for change in changes:
        path = written(tmp_path / "a.tkp", folder=True)
        change(path)
        refused(path)
        shutil.rmtree(path)


def test_what_cannot_be_read_is_the_same_error(tmp_path: Path) -> None:
    assert refused(tmp_path / "nothing").what == "there is no package here"
    refused(tmp_path / ("n" * 300))
    if sys.platform != "win32":
        os.mkfifo(tmp_path / "pipe")
        refused(tmp_path / "pipe")
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        refused(tmp_path / "loop")
    opened = Archive.open(written(tmp_path / "a.tkp"))
    with pytest.raises(PackageError, match=r"README\.md'\?"):
        opened.read("README.mb")
    (tmp_path / "a.tkp").unlink()
    with pytest.raises(PackageError, match="cannot be read"):
        opened.read("README.md")
    written(tmp_path / "a.tkp", {"other": bytes(10_000)})
    with pytest.raises(PackageError, match="checksum differs"):
        opened.read("README.md")
