"""Checkpoints by someone who means harm, each with a manifest that is right: refused, nothing run, nothing written."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forging import seal

from torchkeep.errors import CheckpointError
from torchkeep.keep.checkpoint import Checkpoints, find_damage

Forge = Callable[[Path], None]


class Harm:
    """What a pickle would run."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> Any:
        return Path.touch, (self.canary,)


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """What reads for ever ends in a MemoryError, and not with the machine."""
    if sys.platform != "linux":
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A whole checkpoint, in a folder around which nothing may change; a canary and a secret lie outside."""
    folder = tmp_path / "run" / "checkpoints"
    state = {"model": {"w": torch.ones(4, 4)}, "optimizer": {"m": torch.ones(2)}, "clock": {"step": 1}}
    path = Checkpoints(folder, metric="loss").save(1, state, {"loss": 1.0})
    (tmp_path / "secret.safetensors").write_bytes((path / "model.safetensors").read_bytes())
    outside = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file() and path not in file.parents}
    yield path
    assert not (tmp_path / "canary").exists()
    after = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert {file: data for file, data in after.items() if not file.parent.name.endswith(path.name)
            and not file.parent.name.startswith("damaged-")} == outside  # fmt: skip


def assert_refused(path: Path) -> None:
    """No road to the state gives one, or ends in anything but the one form of message."""
    checkpoints = Checkpoints(path.parent, metric="loss")
    with pytest.raises(CheckpointError):
        checkpoints.load(path)
    for look in (checkpoints.latest, checkpoints.best, checkpoints.rows, checkpoints.take_up):
        try:
            found = look()
        except CheckpointError:
            continue
        assert look != checkpoints.take_up or found is None


def edited(name: str, change: Callable[[Any], Any]) -> Forge:
    """A JSON file with another content."""

    def forge(path: Path) -> None:
        data = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps(change(data)))
        if name != "manifest.json":
            seal(path)

    return forge


def replaced(name: str, old: str, new: str) -> Forge:
    """A file with another text in it, as no writer of JSON would write it."""

    def forge(path: Path) -> None:
        text = (path / name).read_text()
        assert old in text
        (path / name).write_text(text.replace(old, new, 1))
        if name != "manifest.json":
            seal(path)

    return forge


def manifest_names(name: str) -> Forge:
    def change(manifest: Any) -> Any:
        manifest["files"][name] = manifest["files"]["model.safetensors"]
        return manifest

    return edited("manifest.json", change)


def deep(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


MANIFESTS: dict[str, Forge] = {
    "a name above": manifest_names("../../../secret.safetensors"),
    "a name above, in two steps": manifest_names("model.safetensors/../../secret.safetensors"),
    "an absolute name": manifest_names("/etc/passwd"),
    "the folder above": manifest_names(".."),
    "the folder itself": manifest_names("."),
    "no name": manifest_names(""),
    "a name with a NUL": manifest_names("model\0.safetensors"),
    "a name too long": manifest_names("x" * 5000),
    "a name that is not there": manifest_names("more.safetensors"),
    "a million names": edited(
        "manifest.json",
        lambda m: {**m, "files": m["files"] | {f"{n}.safetensors": m["files"]["state.json"] for n in range(1_000_000)}},
    ),
    "NaN": replaced("manifest.json", '"files"', '"size": NaN, "files"'),
    "infinity": replaced("manifest.json", '"files"', '"size": -Infinity, "files"'),
    "a number beyond all": replaced("manifest.json", '"size_bytes": ', '"size_bytes": 1e999, "was": '),
    "a size of many digits": replaced("manifest.json", '"size_bytes": ', '"size_bytes": ' + "9" * 5000 + ', "was": '),
    "depth": replaced("manifest.json", '"files"', f'"deep": {deep(100)}, "files"'),
    "great depth": replaced("manifest.json", '"files"', f'"deep": {deep(100_000)}, "files"'),
    "a key twice": replaced("manifest.json", '"format"', '"format": 1, "format"'),
    "a list": edited("manifest.json", lambda _: []),
    "a word for files": edited("manifest.json", lambda m: {**m, "files": "model.safetensors"}),
    "a word for a receipt": edited("manifest.json", lambda m: {**m, "files": {"state.json": "x"}}),
    "a size that is none": edited("manifest.json", lambda m: {**m, "files": {"state.json": {"size_bytes": []}}}),
    "no files": edited("manifest.json", lambda m: {**m, "files": {}}),
}
for _file in ("state.json", "model.safetensors"):
    MANIFESTS[f"a size below zero of {_file}"] = edited(
        "manifest.json",
        lambda m, f=_file: {**m, "files": {**m["files"], f: {**m["files"][f], "size_bytes": -1}}},
    )


def head(**changed: Any) -> Forge:
    return edited("state.json", lambda data: data | changed)


def leaf(value: Any) -> Forge:
    """The model's one tensor, named in another way."""
    return edited("state.json", lambda data: data | {"state": {**data["state"], "model": {"w": value}}})


HEADS: dict[str, Forge] = {
    "files above": head(files={"model": "../../../secret", "optimizer": "optimizer"}),
    "files at an absolute name": head(files={"model": "/etc/passwd", "optimizer": "optimizer"}),
    "files by number": head(files={"model": 7, "optimizer": "optimizer"}),
    "files by a list": head(files={"model": ["model"], "optimizer": "optimizer"}),
    "files of a part that is not there": head(files={"model": "model", "optimizer": "optimizer", "more": "more"}),
    "a file that no part needs": head(files={"model": "model"}),
    "files as a list": head(files=["model"]),
    "no files": head(files=None),
    "no state": edited("state.json", lambda data: {k: v for k, v in data.items() if k != "state"}),
    "a state that is a list": head(state=[]),
    "metrics that are words": head(metrics={"loss": "low"}),
    "metrics that are a list": head(metrics=[1.0]),
    "metrics that are no numbers": head(metrics={"loss": {"$float": "low"}}),
    "metrics that are tensors": head(metrics={"loss": {"$tensor": "w"}}),
    "a format that is a list": head(format=[2]),
    "a format of tomorrow": head(format=10**9),
    "no word on exactness": edited("state.json", lambda data: {k: v for k, v in data.items() if k != "exact"}),
    "a time of words": head(created="today"),
    "no format": edited("state.json", lambda data: {k: v for k, v in data.items() if k != "format"}),
    "a list": edited("state.json", lambda _: []),
    "a number": edited("state.json", lambda _: 2),
    "NaN": replaced("state.json", '"step"', '"loss": NaN, "step"'),
    "infinity": replaced("state.json", '"step"', '"loss": Infinity, "step"'),
    "a number beyond all": replaced("state.json", '"step"', '"loss": 1e999, "step"'),
    "depth": replaced("state.json", '"step"', f'"deep": {deep(100)}, "step"'),
    "great depth": replaced("state.json", '"step"', f'"deep": {deep(100_000)}, "step"'),
    "a key twice": replaced("state.json", '"step"', '"step": 1, "step"'),
    "a tensor of another file": leaf({"$tensor": "m"}),
    "a tensor by a list": leaf({"$tensor": ["w"]}),
    "keys that are no numbers": leaf({"$int_keys": {"__class__": 1}}),
    "keys of a word": leaf({"$int_keys": "w"}),
    "a tuple of a number": leaf({"$tuple": 7}),
    "a float of words": leaf({"$float": "__import__('os')"}),
    "a type that torch does not have": leaf({"$tensor": "w", "$bytes": ["os", [1]]}),
    "a name of torch that is no type": leaf({"$tensor": "w", "$bytes": ["load", [1]]}),
    "a type by a list": leaf({"$tensor": "w", "$bytes": [[], [1]]}),
    "bytes without a shape": leaf({"$tensor": "w", "$bytes": 7}),
    "bytes of a shape that is too large": leaf({"$tensor": "w", "$bytes": ["complex64", [1 << 40]]}),
    "bytes of a shape below zero": leaf({"$tensor": "w", "$bytes": ["complex64", [-1]]}),
    "bytes of a shape of words": leaf({"$tensor": "w", "$bytes": ["complex64", ["x"]]}),
}


def tensors(header: Any, data: bytes = bytes(64), size: int | None = None) -> Forge:
    """model.safetensors with another header."""

    def forge(path: Path) -> None:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        begin = struct.pack("<Q", len(text) if size is None else size)
        (path / "model.safetensors").write_bytes(begin + text + data)
        seal(path)

    return forge


def row(begin: Any, end: Any, shape: Any = (4,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


TENSORS: dict[str, Forge] = {
    "offsets that overlap": tensors({"w": row(0, 16), "v": row(8, 24)}, bytes(24)),
    "offsets of the same place": tensors({"w": row(0, 16), "v": row(0, 16)}, bytes(16)),
    "a gap": tensors({"w": row(0, 16), "v": row(32, 48)}, bytes(48)),
    "offsets beyond the end": tensors({"w": row(0, 128, (32,))}),
    "offsets far beyond": tensors({"w": row(0, 4 << 60, (1 << 60,))}),
    "offsets below zero": tensors({"w": row(-16, 0)}, bytes(16)),
    "offsets backwards": tensors({"w": row(16, 0)}, bytes(16)),
    "offsets of words": tensors({"w": row("0", "16")}, bytes(16)),
    "offsets of fractions": tensors({"w": row(0.0, 16.0)}, bytes(16)),
    "no offsets": tensors({"w": {"dtype": "F32", "shape": [4]}}, bytes(16)),
    "a shape that is too large": tensors({"w": row(0, 16, (1 << 62, 4))}, bytes(16)),
    "a shape of nothing that is too large": tensors({"w": row(0, 0, (0, 1 << 62, 1 << 62))}, b""),
    "a shape below zero": tensors({"w": row(0, 16, (-2, -2))}, bytes(16)),
    "a shape beyond all": tensors(b'{"w":{"dtype":"F32","shape":[1e999],"data_offsets":[0,16]}}', bytes(16)),
    "a type that is none": tensors({"w": row(0, 16, dtype="PICKLE")}, bytes(16)),
    "a type by a list": tensors({"w": row(0, 16, dtype=["F32"])}, bytes(16)),
    "bytes that belong to nothing": tensors({"w": row(0, 16)}, bytes(17)),
    "a header of 2 ** 63 bytes": tensors({"w": row(0, 16)}, bytes(16), size=1 << 63),
    "a header longer than the file": tensors({"w": row(0, 16)}, bytes(16), size=4096),
    "a header of nothing": tensors(b"", b"", size=0),
    "a header that is a list": tensors([1, 2]),
    "a header with a key twice": tensors(b'{"w":' + json.dumps(row(0, 16)).encode() + b',"w":' +
                                         json.dumps(row(0, 16)).encode() + b"}", bytes(16)),
    "a header with NaN": tensors(b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,16]}}', bytes(16)),
    "a header of great depth": tensors(deep(100_000).encode()),
    "a header that is no UTF-8": tensors(b'{"\xff":1}'),
    "no tensor of the name": tensors({"v": row(0, 16)}, bytes(16)),
}  # fmt: skip


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_hostile_manifest_is_refused(kind: str, victim: Path) -> None:
    MANIFESTS[kind](victim)
    assert find_damage(victim)
    assert_refused(victim)


@pytest.mark.parametrize("kind", HEADS)
def test_a_hostile_state_is_refused(kind: str, victim: Path) -> None:
    HEADS[kind](victim)
    assert find_damage(victim) == ""  # its checksums are right: what it says is wrong
    assert_refused(victim)


@pytest.mark.parametrize("kind", TENSORS)
def test_hostile_tensors_are_refused(kind: str, victim: Path) -> None:
    TENSORS[kind](victim)
    assert find_damage(victim) == ""
    assert_refused(victim)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
def test_a_pickle_in_disguise_is_never_run(zipped: bool, name: str, victim: Path, tmp_path: Path) -> None:
    harm = Harm(tmp_path / "canary")
    torch.save({"w": harm}, victim / name, _use_new_zipfile_serialization=zipped)
    if name != "manifest.json":
        seal(victim)
    assert_refused(victim)
    torch.save({"w": harm}, tmp_path / "proof")
    torch.load(tmp_path / "proof", weights_only=False)  # it would have been run
    (tmp_path / "canary").unlink()
    (tmp_path / "proof").unlink()


@pytest.mark.skipif(sys.platform == "win32", reason="links need a right there")
@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("target", ["/dev/zero", "/etc/passwd", "../../../secret.safetensors", "loop"])
def test_a_link_is_not_followed(name: str, target: str, victim: Path) -> None:
    (victim / name).unlink()
    (victim / name).symlink_to(name if target == "loop" else target)
    assert find_damage(victim)
    assert_refused(victim)


def test_a_huge_file_behind_a_small_manifest_is_not_read_for_ever(victim: Path) -> None:
    with (victim / "model.safetensors").open("r+b") as file:
        file.truncate(1 << 36)  # sparse: 64 GiB of nothing
    assert "bytes instead of" in find_damage(victim)
    assert_refused(victim)
    next(victim.parent.glob("damaged-*/model.safetensors")).unlink()
