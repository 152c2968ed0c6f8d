"""Ten thousand packages that were damaged at random: each is refused by the one error, or reads as it was written."""

from __future__ import annotations

import contextlib
import copy
import json
import resource
import shutil
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterator
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
from torchkeep.contracts import Json
from torchkeep.errors import PackageError, UntrustedCodeError
from torchkeep.share.package import load_package
from torchkeep.tensors import to_safetensors

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "share"))

from packaged import members_of, write_good

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


# --- whole packages, loaded

HOSTILE: list[Json] = [
    "os.system", "builtins:eval", "../x.py:build", "/etc/passwd", "", "\x1b[2J", "hf", "code", "graph", "built-in",
    "vit", "transformer", "float16", "hub", "object", "tensor", "input", "batch", "aten.zeros.default", "int.mul",
    "aten.relu.default", "aten.matmul.default", "aten.repeat.default", None, True, False, 0, 1, -1, 2, 3, 7, 1 << 16,
    10**9, 1 << 62, 10**30, 0.5, -1e-9, 1e300, [], {}, [0], [10**9], [1 << 40, 1 << 40], [[]], {"$node": 0},
    {"$node": 1 << 40}, {"$input": 0}, {"$tensor": "head.bias"}, {"$float": "nan"}, {"$dtype": "float64"},
    {"x": {"y": [{}]}},
]  # fmt: skip
EDITS = st.tuples(
    st.sampled_from(["put", "put", "put", "drop", "swap", "copy", "rename", "number", "number"]),
    st.integers(0, 1 << 16), st.integers(0, 1 << 16),
)  # fmt: skip
KINDS = ["image", "graph", "text"]

Edit = tuple[str, int, int]


def places_in(data: Json) -> Iterator[tuple[Any, Any]]:
    """Each place of a tree of JSON: the dict or list, and the key."""
    rows = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in list(rows):
        yield data, key
        yield from places_in(value)


def edited(data: Json, edits: list[Edit]) -> Json:
    for kind, first, second in edits:
        places = list(places_in(data))
        if not places:
            return HOSTILE[second % len(HOSTILE)]
        (place, key), (other, at) = places[first % len(places)], places[second % len(places)]
        if kind == "drop":
            del place[key]
        elif kind == "swap":
            place[key], other[at] = other[at], place[key]
        elif kind == "copy":
            place[key] = copy.deepcopy(other[at])
        elif kind == "rename" and isinstance(place, dict):
            place[str(HOSTILE[second % len(HOSTILE)])] = place.pop(key)
        elif kind == "number" and type(place[key]) in (int, float):
            place[key] = [place[key] + 1, place[key] - 1, -place[key], place[key] * 1000, place[key] / 2][second % 5]
        else:
            place[key] = copy.deepcopy(HOSTILE[second % len(HOSTILE)])
    return data


def evil_member(name: str, content: bytes, edits: list[Edit]) -> bytes:
    """A member of JSON, or the header of a member of tensors, edited."""
    (size,) = struct.unpack_from("<Q", content) if name.endswith(".safetensors") else (0,)
    data = json.loads(content[8 : 8 + size] if size else content)
    with contextlib.suppress(RecursionError, ValueError):  # what was swapped into itself
        text = json.dumps(edited(data, edits)).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + size :] if size else text
    return content


def loaded(path: Path) -> str:
    """What became of loading; a model that loads can be asked, and any error but one fails the test."""
    try:
        found = load_package(path, device="cpu")
    except (PackageError, UntrustedCodeError) as error:
        return "untrusted" if isinstance(error, UntrustedCodeError) else "refused"
    batch, expected = found.selftest
    assert found.asked(batch).shape == expected.shape
    return "loaded"


def test_whole_packages_damaged_in_their_bytes_and_within(tmp_path: Path, note: Note) -> None:
    goods = {kind: write_good(kind, tmp_path, tmp_path / f"{kind}.tkp") for kind in KINDS}
    members = {kind: {name: bytes(data) for name, data in members_of(path).items()} for kind, path in goods.items()}
    wholes, outcomes, slowest = {kind: path.read_bytes() for kind, path in goods.items()}, Counter[str](), 0.0
    before, written = sorted(tmp_path.rglob("*")), tmp_path / "evil.tkp"
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def tried(how: str) -> str:
        nonlocal slowest
        began = time.perf_counter()
        outcome = loaded(written)
        slowest = max(slowest, time.perf_counter() - began)
        outcomes[f"{how}_{outcome}"] += 1
        return outcome

    @settings(max_examples=EXAMPLES // 2, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(KINDS), st.lists(DAMAGE, min_size=1, max_size=4))
    def check_bytes(kind: str, damages: list[Damage]) -> None:
        data = damaged(wholes[kind], damages)
        written.write_bytes(data)
        assert (tried("bytes") == "loaded") == (data == wholes[kind])

    @settings(max_examples=EXAMPLES // 2, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(KINDS), st.lists(EDITS, min_size=1, max_size=3), st.integers(0, 1 << 16))
    def check_within(kind: str, edits: list[Edit], number: int) -> None:
        names = [name for name in members[kind] if name != "README.md"]
        name = ["architecture.json", *names][number % (len(names) + 1)]
        held = members[kind] | {name: evil_member(name, members[kind][name], edits)}
        written.write_bytes(sealed(held, []))
        tried("within")

    check_bytes()
    check_within()
    assert outcomes["within_refused"] > outcomes["within_loaded"] > 0
    assert sorted(tmp_path.rglob("*")) == sorted([*before, written])
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) >> 10
    assert grown < 2048
    note(packages=outcomes.total(), **outcomes, other_errors=0, slowest_s=round(slowest, 2), grown_mb=grown)


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
