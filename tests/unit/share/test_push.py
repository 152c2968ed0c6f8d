"""Packages that go to a hub and come back: a stub of it answers, its own client asks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_stub import TOKEN, HubStub
from huggingface_hub import constants
from packaged import write_good

from torchkeep.archive import Archive
from torchkeep.errors import PackageError, SettingsError
from torchkeep.share.card import AUTHOR
from torchkeep.share.export import unpack
from torchkeep.share.hub import fetched, push
from torchkeep.share.package import load_package

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("good")
    return write_good("graph", root, root / "ants.tkp")


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStub]:
    """A hub whose client is logged in, has an empty cache, and does not wait before it tries again."""
    made = HubStub()
    template = made.url + "/{repo_id}/resolve/{revision}/{filename}"
    values = {
        "ENDPOINT": made.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_TOKEN_PATH": str(tmp_path / "token"),
    }  # fmt: skip
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(time, "sleep", lambda _, wait=time.sleep: wait(0.001))
    yield made
    made.close()


def elsewhere(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Another machine: another cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))


def test_what_is_pushed_comes_back_byte_by_byte(stub: HubStub, good: Path) -> None:
    address = push(good, "hf:ada/ants")
    commit, message, files = stub.repos["ada/ants"].commits[-1]
    assert address == f"{stub.url}/ada/ants/commit/{commit}"
    assert message == "Add ants.tkp"
    assert files["ants.tkp"] == good.read_bytes()
    assert files["README.md"] == bytes(Archive.open(good).read("README.md"))
    assert not stub.repos["ada/ants"].is_private
    assert fetched("hf:ada/ants").read_bytes() == good.read_bytes()
    held = load_package("hf:ada/ants", device="cpu")
    assert held.identity == Archive.open(good).identity
    assert held.asked(held.selftest[0]).shape == (2, 2)


def test_a_login_is_asked_for_to_push_and_not_to_fetch(
    stub: HubStub, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(good, "hf:ada/ants", message="first")
    assert stub.repos["ada/ants"].commits[-1][1] == "first"
    monkeypatch.delenv("HF_TOKEN")
    assert fetched("hf:ada/ants").read_bytes() == good.read_bytes()
    with pytest.raises(PackageError, match="does not know who asks") as caught:
        push(good, "hf:ada/bees")
    assert "hf auth login" in caught.value.fix
    push(good, "hf:ada/bees", token=TOKEN)


def test_a_private_one_is_seen_by_its_owner_alone(stub: HubStub, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(good, "hf:ada/ants", private=True)
    assert stub.repos["ada/ants"].is_private
    push(good, "hf:ada/ants", private=True)
    assert fetched("hf:ada/ants").read_bytes() == good.read_bytes()
    monkeypatch.delenv("HF_TOKEN")
    elsewhere(monkeypatch, good.parent / "other")
    with pytest.raises(PackageError, match="no such thing for you") as caught:
        fetched("hf:ada/ants")
    assert "hf auth login" in caught.value.fix


def test_private_is_not_pushed_where_all_can_see(stub: HubStub, good: Path) -> None:
    stub.put("ada/ants", note=b"x")
    with pytest.raises(PackageError, match="for all to see"):
        push(good, "hf:ada/ants", private=True)
    assert list(stub.files("ada/ants")) == ["note"]
    assert not stub.blobs


def test_a_folder_goes_as_a_file_of_the_same_identity(stub: HubStub, good: Path, tmp_path: Path) -> None:
    push(unpack(good, tmp_path / "bees"), "hf:ada/bees")
    assert stub.files("ada/bees")["bees.tkp"] == good.read_bytes()


def test_the_cache_does_where_no_hub_answers(stub: HubStub, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ants", "bees", "bees"):
        push(good, f"hf:ada/{name}")
    path = fetched("hf:ada/ants")
    stub.answers[""] = (503, "down")
    assert fetched("hf:ada/ants") == path
    stub.answers[""] = (0, "")
    assert fetched("hf:ada/ants") == path
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetched("hf:ada/ants/ants.tkp") == fetched("hf:ada/ants") == path
    with pytest.raises(PackageError, match="cannot be reached") as caught:
        fetched("hf:ada/bees")  # of which the cache has the card alone
    assert "HF_HUB_OFFLINE" in str(caught.value)


def test_one_of_several_is_named(stub: HubStub, good: Path) -> None:
    data = good.read_bytes()
    first = stub.put("eve/both", a_tkp=data, note=b"")
    assert fetched("hf:eve/both").name == "a.tkp"
    stub.put("eve/both", **{"deep/b.tkp": data[:-1]})
    with pytest.raises(PackageError, match="several packages") as caught:
        fetched("hf:eve/both")
    assert caught.value.got == "a.tkp, deep/b.tkp"
    assert caught.value.fix.startswith("hf:eve/both/a.tkp")
    assert fetched("hf:eve/both/deep/b.tkp").read_bytes() == data[:-1]
    assert fetched(f"hf:eve/both@{first}").read_bytes() == data
    assert fetched(f"hf:eve/both@{first}/a.tkp").read_bytes() == data
    stub.put("eve/none", note=b"")
    with pytest.raises(PackageError, match="no package"):
        fetched("hf:eve/none")


@pytest.mark.parametrize("source", ["hf:eve/gone", "hf:eve/one@v2", "hf:eve/one@v2/a.tkp", "hf:eve/one/b.tkp"])
def test_what_is_not_there_is_said(stub: HubStub, source: str) -> None:
    stub.put("eve/one", a_tkp=b"x")
    with pytest.raises(PackageError, match="no such thing for you") as caught:
        fetched(source)
    assert caught.value.where == source


@pytest.mark.parametrize("source", [
    "hf:", "hf:ants", "hf:a/b/c", "hf:a/b/../c.tkp", "hf:a/b@../../x", "hf:../b", "hf:a/b@", "hf:a/b/.tkp",
    "hf:a/b/x\\y.tkp", "hf:a/b@refs/../x",
])  # fmt: skip
def test_what_names_no_package_asks_no_hub(stub: HubStub, good: Path, source: str) -> None:
    with pytest.raises(PackageError, match="names no package"):
        fetched(source)
    with pytest.raises(SettingsError, match="names no repository"):
        push(good, source)
    assert not stub.asked


@pytest.mark.parametrize(("where", "status", "said"), [
    ("repos/create", 401, "does not know who asks"), ("preupload", 403, "does not allow"), ("commit", 403, "not allow"),
    ("validate", 400, "refuses"), ("lfs/objects", 422, "refuses"), ("commit", 412, "refuses"),
    ("preupload", 500, "broke off"), ("repos/create", 0, "broke off"), ("preupload", 0, "broke off"),
    ("PUT", 0, "broke off"), ("commit", 0, "broke off"),
])  # fmt: skip
def test_a_push_that_fails_says_why_and_leaves_nothing(
    stub: HubStub, good: Path, where: str, status: int, said: str
) -> None:
    stub.answers[where] = (status, f"no, {TOKEN} will not do")
    with pytest.raises(PackageError, match=said) as caught:
        push(good, "hf:ada/ants")
    assert TOKEN not in str(caught.value)
    repo = stub.repos.get("ada/ants")
    assert repo is None or len(repo.commits) == 1
    stub.answers.clear()
    push(good, "hf:ada/ants")
    assert stub.files("ada/ants")["ants.tkp"] == good.read_bytes()


def test_another_s_name_is_refused(stub: HubStub, good: Path) -> None:
    with pytest.raises(PackageError, match="does not allow") as caught:
        push(good, "hf:eve/ants")
    assert "rights" in caught.value.got


def test_a_damaged_package_is_not_sent(stub: HubStub, good: Path, tmp_path: Path) -> None:
    data, parameters = bytearray(good.read_bytes()), bytes(Archive.open(good).read("parameters.safetensors"))
    data[data.index(parameters) + len(parameters) - 1] ^= 1
    (tmp_path / "bad.tkp").write_bytes(data)
    with pytest.raises(PackageError):
        push(tmp_path / "bad.tkp", "hf:ada/ants")
    with pytest.raises(PackageError, match="no package here"):
        push(tmp_path / "none.tkp", "hf:ada/ants")
    assert not stub.asked


@pytest.mark.parametrize("change", [lambda data: data[:-100], lambda data: data[:5000] + b"\1" + data[5001:], len])
def test_other_bytes_than_were_pushed_are_refused(stub: HubStub, good: Path, change: Any) -> None:
    data = change(good.read_bytes())
    stub.put("eve/ants", a_tkp=data if isinstance(data, bytes) else b"PK" * data)
    with pytest.raises(PackageError):
        load_package("hf:eve/ants")


def test_a_download_that_breaks_off_leaves_no_package(stub: HubStub, good: Path, tmp_path: Path) -> None:
    stub.put("eve/ants", a_tkp=good.read_bytes())
    stub.cut_bytes = 3000
    with pytest.raises(PackageError, match="broke off"):
        fetched("hf:eve/ants")
    assert not list((tmp_path / "cache").rglob("*.tkp"))
    stub.answers.clear()
    stub.cut_bytes = None
    assert fetched("hf:eve/ants").read_bytes() == good.read_bytes()


def test_the_author_s_words_outlast_another_push(stub: HubStub, good: Path) -> None:
    push(good, "hf:ada/ants")
    card = stub.files("ada/ants")["README.md"].decode()
    above, _, _ = card.partition(AUTHOR)
    written = above.replace("---\n", "---\nlicense: mit\n", 1).replace("# ants", "# Ants!")
    stub.repos["ada/ants"].add("edited", {"README.md": f"{written}{AUTHOR}\n\nFor ants only.\n".encode()})
    push(good, "hf:ada/ants")
    again = stub.files("ada/ants")["README.md"].decode()
    assert again.endswith(f"{AUTHOR}\n\nFor ants only.\n")
    assert "license: mit\n" in again
    assert "\n# ants\n" in again


def test_the_command_says_the_address_and_no_more(stub: HubStub, good: Path, tmp_path: Path) -> None:
    env = {**os.environ, "HF_ENDPOINT": stub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
           "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}  # fmt: skip

    def say(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "torchkeep", *map(str, words)]
        return subprocess.run(command, env=env, capture_output=True, text=True, encoding="utf-8", timeout=120)

    said = say("push", good, "hf:ada/ants", "--private", "--message", "Ants")
    assert said.returncode == 0, said.stderr
    assert said.stdout == f"{stub.url}/ada/ants/commit/{stub.repos['ada/ants'].commits[-1][0]}\n"
    assert TOKEN not in said.stderr
    assert stub.repos["ada/ants"].is_private
    assert say("verify", "hf:ada/ants").returncode == 0
