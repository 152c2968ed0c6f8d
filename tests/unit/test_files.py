"""Durable files: whole or not at all, said when refused, never two processes in one folder."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from torchkeep.errors import RunFolderError, StorageError
from torchkeep.files import (
    AppendFile,
    DurableFolder,
    FolderLock,
    new_folder,
    receipt_of,
    set_aside,
    sweep,
    write_durable,
)


def test_a_written_file_has_the_receipt_that_was_given(tmp_path: Path) -> None:
    receipt = write_durable(tmp_path / "a", b"some bytes" * 1000)
    assert receipt == receipt_of(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_refused_write_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_durable(tmp_path / "a", b"old")

    def refuse(handle: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match="errno 5"):
        write_durable(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_appears_with_its_manifest_or_not_at_all(tmp_path: Path) -> None:
    def fail_halfway() -> None:
        with DurableFolder(tmp_path / "step") as folder:
            folder.write("x", b"1")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert list(tmp_path.iterdir()) == []
    with DurableFolder(tmp_path / "step") as folder:
        folder.write("x", b"1", b"2")
    assert sorted(path.name for path in (tmp_path / "step").iterdir()) == ["manifest.json", "x"]


def test_a_folder_is_invisible_until_everything_in_it_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    visible: list[bool] = []
    real = os.fsync

    def note(handle: int) -> None:
        visible.append((tmp_path / "step").exists())
        real(handle)

    monkeypatch.setattr(os, "fsync", note)
    with DurableFolder(tmp_path / "step") as folder:
        folder.write("x", b"1")
    assert visible == [False, False, False, True]  # x, the manifest, the folder; then the parent after the rename


def test_what_an_attempt_left_hidden_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".step.1.tmp").mkdir()
    (tmp_path / ".last.json.1.tmp").write_text("half")
    (tmp_path / "kept").write_text("")
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_name_in_use_gets_a_number(tmp_path: Path) -> None:
    made = [new_folder(tmp_path, "run") for _ in range(3)]
    assert [path.name for path, _ in made] == ["run", "run-2", "run-3"]
    for path, lock in made:
        lock.release()
        (path / "run.json").touch()
    path, lock = new_folder(tmp_path, "run")
    assert path.name == "run-4"
    lock.release()


def test_an_empty_folder_is_taken_and_one_with_anything_in_it_is_not(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").touch()
    (tmp_path / "run-2").mkdir()
    (tmp_path / "run-2" / ".lock").write_text("pid 1 on another-host")
    (tmp_path / "run-3").touch()
    path, lock = new_folder(tmp_path, "run")
    assert path.name == "run-2"
    assert "pid 1 on another-host" in lock.stale
    other, second = new_folder(tmp_path, "run")
    assert other.name == "run-4"
    lock.release()
    second.release()
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_setting_aside_deletes_nothing(tmp_path: Path) -> None:
    for _ in range(2):
        (tmp_path / "step").write_text("damaged")
        set_aside(tmp_path / "step")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged-step-1", "damaged-step-2"]


def test_a_second_process_is_refused_and_a_dead_one_forgotten(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib, torchkeep.files as f\n"
        "lock = f.FolderLock(pathlib.Path(sys.argv[1])).acquire(); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunFolderError, match=f"pid {other.pid} on"):
            FolderLock(tmp_path).acquire()
        assert FolderLock.is_held(tmp_path)
        other.kill()
    lock = FolderLock(tmp_path).acquire()
    assert f"pid {other.pid} on" in lock.stale
    assert "make sure" not in lock.stale
    assert FolderLock.is_held(tmp_path)
    lock.release()
    assert not FolderLock.is_held(tmp_path)
    with contextlib.closing(FolderLock(tmp_path).acquire()) as again:
        assert not again.stale


def test_a_lock_of_another_host_is_named(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("pid 7 on far-away")
    with contextlib.closing(FolderLock(tmp_path).acquire()) as lock:
        assert "pid 7 on far-away" in lock.stale
        assert "make sure" in lock.stale


@pytest.mark.parametrize("torn", [b"", b'{"half', b"x" * (3 << 20)])
def test_a_torn_tail_is_cut_off_when_lines_go_on(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"one\ntwo\n" + torn)
    file = AppendFile(path)
    file.append(b"three\n")
    file.close()
    assert path.read_bytes() == b"one\ntwo\nthree\n"


def test_a_refused_append_leaves_whole_lines(tmp_path: Path) -> None:
    program = (
        "import resource, signal, sys, pathlib, torchkeep.files as f, torchkeep.errors as e\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "file = f.AppendFile(pathlib.Path(sys.argv[1])); file.append(b'whole\\n')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
        "try: file.append(b'too long for the disk\\n')\n"
        "except e.StorageError as error: print(error.where)\n"
    )
    path = tmp_path / "lines"
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(path)
    assert path.read_bytes() == b"whole\n"
