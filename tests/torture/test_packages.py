"""Ten thousand packages that were damaged at random: each is refused by the one error, or reads as it was written."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from course import Fault, Note, Place, Seam
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torchkeep import archive
from torchkeep.archive import HEAD, Archive, write_archive
from torchkeep.errors import PackageError
from torchkeep.tensors import to_safetensors

TENSORS = {"weight": torch.arange(12.0).reshape(3, 4), "bias": torch.ones(3, dtype=torch.bfloat16)}
MEMBERS = {
    "architecture.json": b'{"name": "mlp", "args": {"width": 3, "rate": 0.5, "parts": [1, null, true]}}',
    "code/model.py": b"print('hello')\n",
    "labels.json": b'["ants", "bees"]',
    "parameters.safetensors": b"".join(to_safetensors(TENSORS)),
}
EXAMPLES = 10_000

Damage = tuple[str, int, int, bytes]
DAMAGE = st.tuples(
    st.sampled_from(["flip", "flip", "write", "insert", "cut", "repeat", "move", "end"]),
    st.integers(0, 1 << 16), st.integers(1, 64), st.binary(min_size=1, max_size=12),
)  # fmt: skip
WORDS = [
    b"9" * 30,
    b"-1",
    b"NaN",
    b"[",
    b"]" * 70,
    b'"',
    b"{",
    b",",
    b"1e999",
    b"null",
    b"..",
    b"F64",
    b"\\ud800",
    b"\0",
]


def damaged(data: bytes, damages: list[Damage]) -> bytes:
    for kind, place, size, words in damages:
        at = place % (len(data) + 1)
        before, piece, after = data[:at], data[at : at + size], data[at + size :]
        data = {
            "flip": before + bytes([piece[0] ^ 1 << size % 8]) + piece[1:] + after if piece else data,
            "write": before + words + data[at + len(words) :],
            "insert": before + words + piece + after,
            "cut": before + after,
            "repeat": before + piece + piece + after,
            "move": after + before + piece,
            "end": before,
        }[kind]
    return data


def outcome_of(path: Path, expected: dict[str, bytes]) -> str:
    """What became of a package; any error but one, and other bytes than were written, fail the test."""
    try:
        opened = Archive.open(path)
        opened.verify()
        found = {name: bytes(opened.read(name)) for name in opened.names}
    except PackageError:
        return "refused"
    assert found == expected
    try:
        for name in opened.names:
            if name.endswith(".json"):
                opened.json(name)
            if name.endswith(".safetensors"):
                # bit patterns that are NaN or no bool may be there: their sum needs every byte
                [tensor.view(-1).double().sum() for tensor in opened.tensors(name).values()]
    except PackageError:
        return "refused_member"
    return "read_as_written"


def test_packages_damaged_anywhere(tmp_path: Path, note: Note) -> None:
    write_archive(tmp_path / "good.tkp", MEMBERS)
    write_archive(tmp_path / "good", MEMBERS, folder=True)
    whole, outcomes = (tmp_path / "good.tkp").read_bytes(), Counter[str]()

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(DAMAGE, min_size=1, max_size=4), st.sampled_from(["zip", "zip", HEAD, *MEMBERS]))
    def check(damages: list[Damage], file: str) -> None:
        path = tmp_path / ("good.tkp" if file == "zip" else "good")
        changed = path if file == "zip" else path / file
        good = whole if file == "zip" else changed.read_bytes()
        data = damaged(good, damages)
        changed.write_bytes(data)
        try:
            outcome = outcome_of(path, MEMBERS)
        finally:
            changed.write_bytes(good)
        assert (outcome == "read_as_written") == (data == good)
        outcomes[outcome] += 1

    check()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["good", "good.tkp"]
    note(packages=outcomes.total(), **outcomes, other_errors=0, other_content=0)


def test_packages_that_lie_under_checksums_that_hold(tmp_path: Path, note: Note) -> None:
    outcomes = Counter[str]()
    words = st.tuples(st.just("write"), st.integers(0, 1 << 16), st.just(1), st.sampled_from(WORDS))

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(
        st.lists(DAMAGE | words, min_size=1, max_size=3),
        st.sampled_from([HEAD, *MEMBERS, "parameters.safetensors", "parameters.safetensors"]),
    )
    def check(damages: list[Damage], name: str) -> None:
        members = MEMBERS | ({name: damaged(MEMBERS[name], damages)} if name != HEAD else {})
        (tmp_path / "a.tkp").write_bytes(sealed(members, damages if name == HEAD else []))
        outcomes[outcome_of(tmp_path / "a.tkp", members)] += 1

    check()
    assert [file.name for file in tmp_path.iterdir()] == ["a.tkp"]
    assert outcomes["read_as_written"]
    assert outcomes["refused_member"]
    note(packages=outcomes.total(), **outcomes, other_errors=0, other_content=0)


def sealed(members: dict[str, bytes], damages: list[Damage]) -> bytes:
    """A package whose every checksum holds; its package.json is damaged, and sealed again where it still is JSON."""
    parts = {name: [memoryview(content)] for name, content in members.items()}
    sums = {name: archive._sums_of(content) for name, content in parts.items()}
    rows = {name: row._asdict() for name, row in sums.items()}
    head: dict[str, Any] = {"format": 1, "torchkeep": "0", "members": rows}
    text = damaged(orjson.dumps(head), damages)
    with contextlib.suppress(ValueError, TypeError):  # no JSON, or no dict
        text = archive._head_text(orjson.loads(text))
    return b"".join(archive._zipped(text, sums, parts))


@pytest.mark.skipif(sys.platform == "win32", reason="forks its children")
@pytest.mark.parametrize("folder", [False, True], ids=["zip", "folder"])
@pytest.mark.parametrize("fault", ["kill", "torn", "error"])
def test_a_write_that_ends_early(fault: Fault, folder: bool, tmp_path: Path, note: Note) -> None:
    place, path, number, outcomes = Place(tmp_path), tmp_path / "packages" / "a", 0, Counter[str]()
    path.parent.mkdir()
    new = {"new.json": b"[1]", "deep/er/new.json": b"[2]"}

    def child() -> int:
        write_archive(path, new, folder=folder)
        return 0

    while True:
        number += 1
        write_archive(path, MEMBERS, folder=folder)
        ended = place.run(child, Seam(number, fault))
        if not ended.hurt:
            break
        # a folder has no name between the two renames that replace it: the old one is beside it then
        beside = [file for file in path.parent.glob(".*.replaced") if not path.exists()]
        opened = Archive.open(path if path.exists() else beside[0])
        opened.verify()
        is_new = opened.names == tuple(sorted(new))
        assert is_new or opened.names == tuple(sorted(MEMBERS))
        assert ended.code or is_new
        outcomes["new" if is_new else "old" if path.exists() else "old_beside"] += 1
        for left in path.parent.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    assert outcomes["old"] >= 2
    assert outcomes["old_beside"] <= (2 if folder else 0)
    note(places=outcomes.total(), **outcomes, damaged=0)
