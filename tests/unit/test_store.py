"""The store of arrays: what it hands out is what was put, whatever was killed, full, damaged or at work beside it."""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from torchkeep.files import lock_byte
from torchkeep.store import _ALIGN, _END_AT, Store, evict

MB = 1 << 20
PROGRAM = """
import os, random, resource, sys, threading
from pathlib import Path
import numpy as np
from torchkeep.store import Store
def array_of(i):
    return np.random.default_rng(i).integers(0, 255, (1 + i % 7, 1000 + 37 * i, 3), dtype=np.uint8)
def fill(store, numbers):
    return [store.put(i, array_of(i), identity=i + 1) for i in numbers]
"""


def array_of(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 255, (1 + i % 7, 1000 + 37 * i, 3), dtype=np.uint8)


def fill(store: Store, numbers: range) -> list[bool]:
    return [store.put(i, array_of(i), identity=i + 1) for i in numbers]


def right(store: Store) -> list[int]:
    """The numbers that the store has; each must be what was put."""
    found = []
    for i in range(store.num):
        array = store.get(i, identity=i + 1)
        if array is not None:
            np.testing.assert_array_equal(array, array_of(i), err_msg=str(i))
            found.append(i)
    return found


def start(program: str, *arguments: object, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM + program, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]


def said(process: subprocess.Popen[str]) -> str:
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return text


@pytest.fixture(params=["disk", "memory"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[int, int], Store]:
    if request.param == "disk":
        return lambda num, budget: Store.on_disk(tmp_path / "a.store", num, budget)
    return Store.in_memory


@pytest.mark.parametrize("dtype", ["?", "u1", "<u2", ">u2", "f2", "<f4", ">f8", "i8", "c8"])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 0, 2), (7, 5), (4, 3, 2), (2, 3, 4, 5)])
def test_an_array_comes_back_as_it_was(make: Callable[[int, int], Store], dtype: str, shape: tuple[int, ...]) -> None:
    store = make(3, MB)
    array = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    assert store.put(1, array)
    found = store.get(1)
    assert found is not None
    assert found.dtype == array.dtype.newbyteorder("<")
    assert found.shape == shape
    np.testing.assert_array_equal(found, array)
    assert not found.flags.writeable
    assert store.get(0) is None
    assert store.get(2) is None
    assert store.count == 1


def test_features_in_float16_go_from_run_to_run(tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(size=(50, 197, 64)).astype(np.float16)
    store = Store.on_disk(tmp_path / "a.store", 50, 4 * MB)
    assert all(store.put(i, features[i].T) for i in range(50))  # not contiguous
    store.close()
    again = Store.on_disk(tmp_path / "a.store", 50, 4 * MB)
    for i in range(50):
        np.testing.assert_array_equal(again.get(i), features[i].T)


def test_another_identity_is_a_miss_and_can_be_replaced(make: Callable[[int, int], Store]) -> None:
    store = make(1, MB)
    store.put(0, np.zeros(3), identity=1)
    old = store.get(0, identity=1)
    assert store.get(0, identity=2) is None
    assert store.get(0) is None
    store.put(0, np.ones(3), identity=2)
    assert store.get(0, identity=1) is None
    np.testing.assert_array_equal(store.get(0, identity=2), np.ones(3))
    np.testing.assert_array_equal(old, np.zeros(3))  # what was handed out stays
    assert store.damaged == 0


def test_whoever_writes_can_be_killed_at_any_moment(tmp_path: Path) -> None:
    program = """
store = Store.on_disk(Path(sys.argv[1]), 300, 1 << 30)
numbers = list(range(300)); random.Random(sys.argv[2]).shuffle(numbers)
print("ready", flush=True)
while True:
    fill(store, numbers)
"""
    path, chance, seen = tmp_path / "a.store", random.Random(0), set()
    for attempt in range(24):
        with start(program, path, attempt) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(chance.random() * 0.1)
            process.kill()
        store = Store.on_disk(path, 300, 1 << 30)
        found = right(store)
        assert store.damaged == 0
        assert seen <= set(found)  # nothing is lost again
        seen = set(found)
        store.close()
    assert seen
    store = Store.on_disk(path, 300, 1 << 30)
    assert all(fill(store, range(300)))
    assert right(store) == list(range(300))


# each array takes space under the lock, so that all meet there
FILL = """
import torchkeep.store
torchkeep.store._LEASE_BYTES = 64
threads = [threading.Thread(target=fill, args=(store, range(k, 400, 4))) for k in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(store.refused)
"""


def test_processes_and_threads_fill_one_file_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchkeep.store._LEASE_BYTES", 64)
    path = tmp_path / "a.store"
    opened = "store = Store.on_disk(Path(sys.argv[1]), 400, 1 << 30)" + FILL
    processes = [start(opened, path) for _ in range(3)]
    store = Store.on_disk(path, 400, 1 << 30)
    fill(store, range(3, 400, 4))
    assert [said(process) for process in processes] == ["\n"] * 3
    assert right(store) == list(range(400))
    assert store.damaged == 0


def test_who_opens_a_damaged_file_at_once_with_others_shares_the_new_one(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        for number in range(100):
            path = tmp_path / f"{number}.store"
            path.write_bytes(b"damaged")
            stores = list(threads.map(lambda _, path=path: Store.on_disk(path, 5, 64 * MB), range(4)))
            assert [os.fstat(store.fileno()).st_ino for store in stores] == [path.stat().st_ino] * 4
            for store in stores:
                store.close()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows removes no open file")
def test_a_file_that_is_removed_while_it_is_opened_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.store"
    moments = iter([path.unlink])

    def late(*arguments: object) -> bool:
        next(moments, lambda: None)()
        return lock_byte(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("torchkeep.store.lock_byte", late)
    fill(Store.on_disk(path, 5, MB), range(5))
    assert right(Store.on_disk(path, 5, MB)) == list(range(5))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows hands no files to other processes")
def test_a_store_in_memory_is_filled_by_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchkeep.store._LEASE_BYTES", 64)
    store = Store.in_memory(400, 1 << 30)
    handle = store.fileno()
    adopted = "store = Store.adopt(int(sys.argv[1]))" + FILL
    processes = [start(adopted, handle, pass_fds=[handle]) for _ in range(3)]
    fill(store, range(3, 400, 4))
    assert [said(process) for process in processes] == ["\n"] * 3
    assert right(store) == list(range(400))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_a_forked_process_takes_space_of_its_own(tmp_path: Path) -> None:
    program = """
stores = [Store.on_disk(Path(sys.argv[1]), 200, 1 << 30), Store.in_memory(200, 1 << 30)]
for store in stores: fill(store, range(2))
child = os.fork()
for store in stores:
    assert all(fill(store, range(2, 200, 2) if child else range(3, 200, 2)))
if not child:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
for store in stores:
    for i in range(200):
        np.testing.assert_array_equal(store.get(i, i + 1), array_of(i))
"""
    said(start(program, tmp_path / "a.store"))


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 4]))


@pytest.mark.parametrize("place", ["data", *range(_ALIGN, 2 * _ALIGN, 9)])
def test_a_flipped_bit_is_a_miss_that_is_counted_and_mended(tmp_path: Path, place: int | str) -> None:
    path = tmp_path / "a.store"
    store = Store.on_disk(path, 2, MB)
    fill(store, range(2))
    store.close()
    flip(path, path.read_bytes().index(array_of(0).tobytes()) + 999 if place == "data" else int(place))
    store = Store.on_disk(path, 2, MB)
    assert right(store) == [1]
    is_identity = 16 <= int(place) - _ALIGN < 24 if place != "data" else False
    assert store.damaged == (0 if is_identity else 1)
    assert fill(store, range(1)) == [True]
    assert right(store) == [0, 1]


@pytest.mark.parametrize("place", [0, 9, 17, 33, _END_AT, _END_AT + 9, "cut", "empty", "text"])
def test_a_damaged_file_is_begun_anew(tmp_path: Path, place: int | str) -> None:
    path = tmp_path / "a.store"
    store = Store.on_disk(path, 5, MB)
    fill(store, range(5))
    if isinstance(place, int):
        flip(path, place)
    else:
        store.close()
        path.write_bytes({"cut": path.read_bytes()[:1000], "empty": b"", "text": b"no store"}[place])
    again = Store.on_disk(path, 5, MB)
    assert right(again) == []
    assert all(fill(again, range(5)))
    assert right(again) == list(range(5))
    assert [found.name for found in tmp_path.iterdir()] == ["a.store"]
    if isinstance(place, int):
        assert right(store) == list(range(5))  # the file that it holds lives on without a name


def test_another_number_or_version_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.store"
    fill(Store.on_disk(path, 5, MB), range(5))
    assert right(Store.on_disk(path, 6, MB)) == []
    fill(Store.on_disk(path, 6, MB), range(6))
    assert len(right(Store.on_disk(path, 6, MB))) == 6
    monkeypatch.setattr("torchkeep.store.VERSION", 2)
    assert right(Store.on_disk(path, 6, MB)) == []


def test_another_budget_is_no_reason_to_begin_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.store"
    first = Store.on_disk(path, 200, MB)
    fill(first, range(200))
    kept = right(first)
    assert 0 < len(kept) < 200
    second = Store.on_disk(path, 200, 64 * MB)
    assert right(second) == kept
    assert all(fill(second, range(len(kept), 200)))
    assert len(right(second)) == 200
    assert right(first)[: len(kept)] == kept  # it maps less of the file: the rest is a miss
    third = Store.on_disk(path, 200, MB)
    assert len(right(third)) == 200
    assert not any(fill(third, range(200)))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path | None]:
    """A disk of 4 MB; None where only root may make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    try:
        is_mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        is_mounted = False
    yield folder if is_mounted else None
    if is_mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows limits no process's files")
@pytest.mark.parametrize("is_limited", [False, True])
def test_a_full_disk_ends_the_keeping_and_nothing_else(
    tmp_path: Path, small_disk: Path | None, is_limited: bool
) -> None:
    if small_disk is None and not is_limited:
        pytest.skip("only root can mount a small disk")
    program = """
store = Store.on_disk(Path(sys.argv[1]), 300, 1 << 30)
if len(sys.argv) > 2: resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, 4 << 20))
kept = fill(store, range(300))
assert 0 < sum(kept) == kept.index(False), kept
for i in range(300):
    found = store.get(i, i + 1)
    assert (found is not None) == kept[i]
    if kept[i]: np.testing.assert_array_equal(found, array_of(i))
print(sum(kept), store.refused)
"""
    path = (tmp_path if is_limited or small_disk is None else small_disk) / "a.store"
    count, _, reason = said(start(program, path, *(["limited"] if is_limited else []))).partition(" ")
    assert reason.strip() == ("File too large" if is_limited else "No space left on device")
    store = Store.on_disk(path, 300, 1 << 30)
    assert len(right(store)) == int(count)
    assert store.damaged == 0
    store.close()


def test_a_folder_that_cannot_be_written_is_a_store_that_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = Store.on_disk(tmp_path / "file" / "a.store", 5, MB)
    assert store.refused
    assert not any(fill(store, range(5)))
    assert right(store) == []
    store.close()


def test_after_a_power_cut_space_that_records_name_is_not_given_out_again(tmp_path: Path) -> None:
    path = tmp_path / "a.store"
    store = Store.on_disk(path, 40, 64 * MB)
    before = path.read_bytes()[:_ALIGN]
    fill(store, range(20))
    store.close()
    with path.open("r+b") as file:  # as if the header had not reached the disk
        file.write(before)
    store = Store.on_disk(path, 40, 64 * MB)
    assert right(store) == list(range(20))
    fill(store, range(20, 40))
    assert right(store) == list(range(40))


@pytest.mark.parametrize("budget", [0, 1000])
def test_without_a_budget_nothing_is_kept(make: Callable[[int, int], Store], budget: int) -> None:
    store = make(5, budget)
    assert fill(store, range(5)) == [False] * 5
    assert "budget" in store.refused
    assert right(store) == []
    assert store.used_bytes == 0


def test_a_used_up_budget_is_said_and_what_is_kept_stays(make: Callable[[int, int], Store]) -> None:
    store = make(200, MB)
    kept = fill(store, range(200))
    assert 0 < sum(kept) < 200
    assert "1,048,576" in store.refused
    assert [i for i in range(200) if kept[i]] == right(store)
    assert MB / 2 < store.used_bytes <= MB


def test_the_least_recently_used_go_first_and_held_ones_stay(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.store" for name in "abcd"]
    for age, path in enumerate(reversed(paths)):
        store = Store.on_disk(path, 100, 64 * MB)
        fill(store, range(100))
        store.close()
        os.utime(path, (1e9 - age, 1e9 - age))  # a is the oldest
    size = 512 * paths[0].stat().st_blocks
    held = "store = Store.on_disk(Path(sys.argv[1]), 100, 1 << 30); print('held', flush=True); sys.stdin.read()"
    with start(held, paths[0], stdin=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        os.utime(paths[0], (1, 1))
        assert evict(tmp_path, 3 * size + size // 2) <= 3 * size + size // 2
        assert [path.exists() for path in paths] == [True, False, True, True]
        own = Store.on_disk(paths[2], 100, 64 * MB)
        assert evict(tmp_path, 0) > 0
        assert [path.exists() for path in paths] == [True, False, True, False]
        assert len(right(own)) == 100
        process.kill()
    kept = own.get(0, 1)
    own.close()
    assert evict(tmp_path, 0) == 0
    assert list(tmp_path.iterdir()) == []
    np.testing.assert_array_equal(kept, array_of(0))


def test_a_store_may_have_less_than_the_budget_of_its_folder(tmp_path: Path) -> None:
    store = Store.on_disk(tmp_path / "a.store", 200, 1 << 40, MB)
    kept = fill(store, range(200))
    assert MB / 2 < store.used_bytes <= MB < (tmp_path / "a.store").stat().st_size < 2 * MB
    other = pickle.loads(pickle.dumps(store))
    assert right(other) == [i for i in range(200) if kept[i]]
    fill(other, range(200))
    assert other.used_bytes <= MB


def test_a_store_that_grows_makes_room_within_the_budget_of_its_folder(tmp_path: Path) -> None:
    for name in "ab":
        store = Store.on_disk(tmp_path / f"{name}.store", 100, 64 * MB)
        fill(store, range(100))
        store.close()
        os.utime(tmp_path / f"{name}.store", (ord(name), ord(name)))
    budget = int(2.5 * 512 * (tmp_path / "a.store").stat().st_blocks)
    store = Store.on_disk(tmp_path / "c.store", 100, budget)
    assert {path.name for path in tmp_path.iterdir()} == {"a.store", "b.store", "c.store"}
    assert all(fill(store, range(100)))
    assert {path.name for path in tmp_path.iterdir()} == {"b.store", "c.store"}
    assert evict(tmp_path, 1 << 40) <= budget


def test_a_store_travels_by_its_path_and_one_in_memory_by_its_handle(tmp_path: Path) -> None:
    on_disk = Store.on_disk(tmp_path / "a.store", 5, MB)
    fill(on_disk, range(5))
    assert right(pickle.loads(pickle.dumps(on_disk))) == list(range(5))
    in_memory = Store.in_memory(5, MB)
    fill(in_memory, range(5))
    packed = pickle.dumps(in_memory)
    assert len(packed) < 1000
    bare = pickle.loads(packed)
    assert right(bare) == []
    assert not any(fill(bare, range(5)))
    bare.attach(os.dup(in_memory.fileno()))
    assert right(bare) == list(range(5))
    other = Store(6)
    other.attach(os.dup(in_memory.fileno()))
    assert "another form" in other.refused
    assert right(other) == []


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="this system has no /dev/shm")
def test_a_store_in_memory_has_no_name_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = set(os.listdir("/dev/shm"))
    store = Store.in_memory(5, MB)
    assert all(fill(store, range(5)))
    assert set(os.listdir("/dev/shm")) <= before
    assert list(tmp_path.iterdir()) == []


def test_systems_without_files_in_memory_have_a_nameless_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = Store.in_memory(5, MB)
    assert all(fill(store, range(5)))
    assert right(store) == list(range(5))
    assert list(tmp_path.iterdir()) == []


def test_it_works_without_what_windows_lacks(tmp_path: Path) -> None:
    program = """
from types import SimpleNamespace
held = set()
def locking(handle, mode, size):
    place = os.lseek(handle, 0, os.SEEK_CUR)
    if (mode == 0) != (place in held):
        raise OSError("locked already, or not locked")
    held.symmetric_difference_update([place])
sys.modules["fcntl"] = None
sys.modules["msvcrt"] = SimpleNamespace(LK_LOCK=1, LK_NBLCK=2, LK_UNLCK=0, locking=locking)
sys.platform = "win32"
for name in [name for name in sys.modules if name.startswith("torchkeep")]: del sys.modules[name]
for name in ("pwrite", "memfd_create", "register_at_fork", "O_CLOEXEC", "O_DIRECT"): os.__dict__.pop(name, None)
from torchkeep.store import Store
for store in (Store.on_disk(Path(sys.argv[1]), 50, 1 << 26), Store.in_memory(50, 1 << 26)):
    threads = [threading.Thread(target=fill, args=(store, range(k, 50, 4))) for k in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert all((store.get(i, i + 1) == array_of(i)).all() for i in range(50))
    store.close()
"""
    said(start(program, tmp_path / "a.store"))
    assert len(right(Store.on_disk(tmp_path / "a.store", 50, 64 * MB))) == 50
