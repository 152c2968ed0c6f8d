"""Law 1 when things go wrong: workers that die, samples that are bad or slow, a small /dev/shm, an interrupt."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults import Deadly, DeadlyFolder, Failing, Numbers, Slow, SlowFolder, broken_augmentation
from PIL import Image
from samples import same

import torchkeep as tk
from torchkeep.data.reading import valid_rows
from torchkeep.errors import BadSampleError, DataError, SettingsError

NUM = 26
KINDS = ["threads", "processes", "threaded_process"]
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at /proc and /dev/shm")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 images of two classes, of which the fourth and the tenth of the bees are cut."""
    made = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(NUM):
        folder = made / ("ants", "bees")[number % 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20 + number % 5, 24, 3), np.uint8)).save(folder / f"{number:02}.png")
    return made


@pytest.fixture(scope="module")
def damaged(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("damaged") / "images"
    shutil.copytree(root, made)
    for name in ("bees/07.png", "ants/20.png"):
        (made / name).write_bytes((root / name).read_bytes()[:100])
    return made


def folder(root: Path, **options: Any) -> Any:
    return tk.ImageFolder(root, image_size=16, augment=["random_resized_crop", "horizontal_flip"], **options)


def all_same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    return len(one) == len(other) and all(map(same, one, other))


def epochs(data: Any, number: int = 1, **settings: Any) -> list[dict[str, Any]]:
    with closing(tk.Loader(data, 4, shuffle=True, seed=5, **settings)) as loader:
        return [batch for _ in range(number) for batch in loader]


@pytest.mark.parametrize("cache", ["off", "ram", "disk"])
@pytest.mark.parametrize("backend", KINDS)
def test_each_kind_number_and_cache_gives_the_same_batches(
    root: Path, backend: Any, cache: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHKEEP_CACHE", str(tmp_path))
    wanted = epochs(folder(root), 2, workers=0, cache=cache)
    for workers in (1, 2, 8):
        assert all_same(epochs(folder(root), 2, workers=workers, backend=backend, cache=cache), wanted)


@pytest.mark.parametrize("backend", KINDS)
def test_the_rest_of_an_epoch_from_every_place(root: Path, backend: Any) -> None:
    wanted = epochs(folder(root), workers=0)
    with closing(tk.Loader(folder(root), 4, shuffle=True, seed=5, workers=2, backend=backend)) as loader:
        assert loader.plan.backend == backend
        for place in range(len(wanted)):
            loader.load_state_dict({**loader.state_dict(), "epoch": 0, "delivered": place})
            assert all_same(list(loader), wanted[place:])


@pytest.mark.parametrize("backend", ["processes", "threaded_process"])
def test_a_worker_that_is_killed_is_replaced_and_its_batches_come_again(root: Path, backend: Any) -> None:
    wanted = epochs(folder(root), 3, workers=0)
    with closing(tk.Loader(folder(root), 4, shuffle=True, seed=5, workers=2, backend=backend)) as loader:
        found = []
        for number in range(3):
            for place, batch in enumerate(loader):
                found.append(batch)
                if place == number:
                    os.kill(loader.worker_pids[place % len(loader.worker_pids)], signal.SIGKILL)
        assert all_same(found, wanted)


@pytest.mark.parametrize("backend", ["processes", "threaded_process"])
def test_after_three_deaths_the_error_names_the_sample(root: Path, backend: Any) -> None:
    data = Deadly(NUM, deadly=(13,)) if backend == "processes" else DeadlyFolder(root, deadly=(13,))
    with closing(tk.Loader(data, 4, workers=2, backend=backend)) as loader:
        found = []
        with pytest.raises(DataError, match="died 3 times") as caught:
            found.extend(loader)
        assert "sample 13" in caught.value.where
        assert "SIGKILL" in caught.value.got
        assert [int(i) for batch in found for i in batch["index"]] == list(range(12))


def test_a_process_that_cannot_begin_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "only_here.py").write_text("from faults import Numbers\nclass Local(Numbers): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import only_here

    loader = tk.Loader(only_here.Local(NUM), 4, workers=1, backend="processes")
    (tmp_path / "only_here.py").unlink()
    shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
    with closing(loader), pytest.raises((ModuleNotFoundError, DataError), match="only_here"):
        list(loader)


PARENT = """
import sys, time
import torchkeep as tk
if __name__ == "__main__":
    loader = tk.Loader(tk.ImageFolder(sys.argv[2], image_size=224), 4, workers=2, backend=sys.argv[1])
    for epoch in range(10_000):
        for number, batch in enumerate(loader):
            if number == 1 and not epoch:
                print(*loader.worker_pids, flush=True)
"""


def python(script: Path, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [*options.pop("before", []), sys.executable, str(script), *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}, **pipes, **options)


def gone(pids: list[int]) -> bool:
    for _ in range(200):
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.1)
    return False


@linux
@pytest.mark.parametrize("backend", KINDS)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_end_of_the_trainer_leaves_no_process_and_no_file(
    backend: str, number: int, root: Path, tmp_path: Path
) -> None:
    script, before = tmp_path / "parent.py", set(os.listdir("/dev/shm"))
    script.write_text(PARENT)
    with python(script, backend, str(root), start_new_session=True) as trainer:
        assert trainer.stdout is not None
        pids = [int(word) for word in trainer.stdout.readline().split()]
        assert len(pids) == {"processes": 2, "threaded_process": 1, "threads": 0}[backend]
        if number == signal.SIGINT:  # Ctrl-C goes to everything in the terminal
            os.killpg(trainer.pid, number)
        else:
            trainer.kill()
        _, said = trainer.communicate(timeout=30)
    assert ("KeyboardInterrupt" in said) == (number == signal.SIGINT)
    assert said.count("Traceback") == (number == signal.SIGINT)
    assert gone(pids)
    assert set(os.listdir("/dev/shm")) <= before


SMALL_SHM = """
import os, torchkeep as tk
from faults import Numbers
if __name__ == "__main__":
    assert os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize == 64 << 20
    loader = tk.Loader(Numbers(64, width=4_000_000), 8, workers=4, backend="processes")  # 128 MB a batch
    kept = [int(batch["input"][:, -1].sum()) for batch in loader]
    print(sum(kept), max(os.listdir("/dev/shm"), default="empty"))
"""


@linux
def test_batches_of_twice_the_size_of_dev_shm_pass(tmp_path: Path) -> None:
    script = tmp_path / "small.py"
    script.write_text(SMALL_SHM)
    mounted = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*mounted, "true"], capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    with python(script, before=mounted) as ran:
        out, said = ran.communicate(timeout=120)
    assert (out.split(), said) == ([str(sum(range(64))), "empty"], "")


@pytest.mark.parametrize("backend", ["processes", "threads"])
def test_a_slow_sample_reorders_nothing(root: Path, backend: Any) -> None:
    data = Slow(NUM, seconds=2.0, slow=(5,)) if backend == "processes" else SlowFolder(root)
    wanted = epochs(data, workers=0)
    begun = time.perf_counter()
    with closing(tk.Loader(data, 4, shuffle=True, seed=5, workers=2, backend=backend)) as loader:
        assert loader.plan.backend == backend
        assert all_same(list(loader), wanted)
    assert time.perf_counter() - begun < 30


@pytest.mark.parametrize("backend", ["inline", "processes"])
def test_an_exception_in_a_users_callable_shows_its_line_and_the_sample(root: Path, backend: Any) -> None:
    data = tk.ImageFolder(root, image_size=16, augment=[broken_augmentation])
    with closing(tk.Loader(data, 4, workers=1, backend=backend)) as loader, pytest.raises(BadSampleError) as caught:
        list(loader)
    assert "ants/" in caught.value.where
    assert "faults.py, line" in caught.value.where
    assert "ZeroDivisionError" in caught.value.got
    failing = Failing(NUM, failing=(9,))
    with closing(tk.Loader(failing, 4, workers=1, backend=backend)) as loader, pytest.raises(BadSampleError) as caught:
        list(loader)
    assert "cannot give this sample" in caught.value.what
    assert "sample 9 of Failing" in caught.value.where
    assert "faults.py, line" in caught.value.where


@linux
@pytest.mark.parametrize("backend", ["threads", "processes"])
def test_a_thousand_epochs_of_a_tiny_set(root: Path, backend: Any) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    data = tk.Part(folder(root), np.arange(3))
    with closing(tk.Loader(data, 2, shuffle=True, workers=2, backend=backend)) as loader:
        first = sorted(int(i) for batch in loader for i in batch["index"])
        gc.collect()  # what other tests have left may be closed meanwhile
        before = open_files()
        for _ in range(1000):
            assert sorted(int(i) for batch in loader for i in batch["index"]) == first
        assert loader.epoch == 1001
        assert open_files() <= before


@pytest.mark.parametrize("backend", KINDS)
def test_nested_loaders_and_two_iterations_at_once(root: Path, backend: Any) -> None:
    data = tk.Part(folder(root), np.arange(9))
    wanted = [epochs(data, 5, workers=0)[start : start + 3] for start in range(0, 15, 3)]
    with closing(tk.Loader(data, 4, shuffle=True, seed=5, workers=2, backend=backend)) as loader:
        pairs = list(zip(loader, loader, strict=True))
        assert all_same([a for a, _ in pairs], wanted[0])
        assert all_same([b for _, b in pairs], wanted[1])
        loader.rewind()
        outer, inner = [], []
        for batch in loader:
            outer.append(batch)
            inner.append(list(loader))
        assert all_same(outer, wanted[0])
        assert all(map(all_same, inner, wanted[1:4]))


def test_an_iteration_that_is_left_early_leaves_nothing_behind(root: Path) -> None:
    for backend in KINDS:
        wanted = epochs(folder(root), 4, workers=0)
        with closing(tk.Loader(folder(root), 4, shuffle=True, seed=5, workers=2, backend=backend)) as loader:
            for epoch in range(3):
                assert same(next(iter(loader)), wanted[7 * epoch])
            assert all_same(list(loader), wanted[21:])


# --- bad samples


@pytest.mark.parametrize("on_bad", ["substitute", "mask"])
def test_bad_samples_are_replaced_by_rule_whoever_reads(damaged: Path, on_bad: Any) -> None:
    wanted = epochs(folder(damaged), 2, workers=0, on_bad=on_bad, bad_fraction=0.1)
    for backend in KINDS:
        found = epochs(folder(damaged), 2, workers=2, backend=backend, on_bad=on_bad, bad_fraction=0.1)
        assert all_same(found, wanted)
    seen = torch.cat([batch["index"] for batch in wanted[:7]]).tolist()
    if on_bad == "mask":
        assert sorted(seen) == list(range(NUM))
        left = [index for batch in wanted[:7] for index in batch["index"][~batch["valid"]].tolist()]
        assert sorted(left) == [10, 16]  # ants/20.png and bees/07.png
    else:
        assert not {10, 16} & set(seen)
        assert len(seen) == NUM
        assert "valid" not in wanted[0]


def test_a_substitute_is_the_sample_that_it_says(damaged: Path) -> None:
    data = folder(damaged)
    for batch in epochs(data, workers=0, on_bad="substitute", bad_fraction=0.1):
        for row, index in enumerate(batch["index"].tolist()):
            alone = data.read_batch(np.array([index]), tk_key())
            assert torch.equal(batch["image"][row], alone["image"][0])
            assert batch["label"][row] == alone["label"][0]


def tk_key() -> Any:
    from torchkeep.chance import ChanceKey

    return ChanceKey(5, 0)


def test_the_list_of_bad_samples_and_its_limit_survive_a_resume(damaged: Path) -> None:
    def fresh(fraction: float) -> tk.Loader:
        return tk.Loader(folder(damaged), 4, shuffle=True, workers=0, on_bad="substitute", bad_fraction=fraction)

    whole = fresh(0.1)
    wanted = list(whole)
    assert sorted(bad.id for bad in whole.bad.values()) == ["ants/20.png", "bees/07.png"]
    assert all("100 bytes" in bad.reason for bad in whole.bad.values())
    for place in range(1, len(wanted)):
        loader = fresh(0.1)
        iteration = iter(loader)
        first = [next(iteration) for _ in range(place)]
        resumed = fresh(0.1)
        resumed.load_state_dict(loader.state_dict())
        assert all_same(first + list(resumed), wanted)
        assert resumed.bad == whole.bad
    for place in range(len(wanted)):  # one bad sample before the resume and one after it are two
        strict = fresh(0.0)
        done = []
        with contextlib.suppress(DataError):
            for batch in strict:
                done.append(batch)
                if len(done) == place:
                    break
        resumed = fresh(0.0)
        resumed.load_state_dict(strict.state_dict())
        if len(strict.bad) < 2:
            with pytest.raises(DataError, match="too many samples cannot be read") as caught:
                list(resumed)
            assert "2 of 26" in caught.value.got


def test_bad_samples_of_foreign_data_and_of_texts_too(tmp_path: Path) -> None:
    data = Failing(40, failing=(9, 30))
    batch = epochs(data, workers=0, on_bad="mask", bad_fraction=0.1)
    assert sorted(i for b in batch for i in b["index"][~b["valid"]].tolist()) == [9, 30]
    assert all_same(epochs(data, workers=2, backend="processes", on_bad="mask", bad_fraction=0.1), batch)
    for number in range(8):
        (tmp_path / "ab"[number % 2]).mkdir(exist_ok=True)
        (tmp_path / "ab"[number % 2] / f"{number}.txt").write_bytes(b"\xff\xfe bad" if number == 5 else b"good text")
    texts = tk.TextFolder(tmp_path, tokenizer="bytes")
    found = epochs(texts, workers=0, on_bad="mask")
    assert [i for b in found for i in b["index"][~b["valid"]].tolist()] == [6]


def test_masked_rows_leave_a_batch() -> None:
    batch = {"input": torch.arange(6.0).reshape(3, 2), "index": torch.arange(3), "text": ["a", "b", "c"]}
    kept = valid_rows({**batch, "valid": torch.tensor([True, False, True])})
    assert kept["input"].tolist() == [[0, 1], [4, 5]]
    assert kept["text"] == ["a", "c"]
    assert "valid" not in kept
    with pytest.raises(DataError, match="no sample of a batch"):
        valid_rows({**batch, "valid": torch.zeros(3, dtype=torch.bool)})


def test_pad_and_mask_agree_about_valid(damaged: Path) -> None:
    found = epochs(folder(damaged), workers=0, on_bad="mask", bad_fraction=0.1, last="pad")
    assert sum(int(batch["valid"].sum()) for batch in found) == NUM - 2
    assert sum(len(batch["valid"]) for batch in found) == 28


@pytest.mark.parametrize("wrong", [{"on_bad": "ignore"}, {"bad_fraction": 2.0}, {"cache": "tape"}, {"backend": "fork"}])
def test_a_word_that_means_nothing_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="cannot be used"):
        tk.Loader(Numbers(4), 2, **wrong)


def test_what_feeding_took_is_counted(root: Path) -> None:
    with closing(tk.Loader(folder(root), 4, workers=2, backend="threads", cache="ram")) as loader:
        before = loader.stats
        list(loader)
        list(loader)
        assert loader.stats.samples == 2 * NUM
        assert loader.stats.hits == NUM
        assert loader.stats.batches == 14
        assert loader.stats.read_s > 0
        rates = loader.stats.since(type(before)(), 1.0)
        assert rates["loader/cache_hit_fraction"] == 0.5
        assert set(rates) == {
            f"loader/{n}" for n in ("waiting_fraction", "read_ms", "cache_hit_fraction", "queue_depth")
        }


def test_a_transfer_begins_before_the_batch_before_it_is_left(root: Path) -> None:
    begun: list[int] = []

    def begin(batch: dict[str, Any]) -> dict[str, Any]:
        begun.append(int(batch["index"][0]))
        return batch

    loader = tk.Loader(tk.Arrays(input=torch.arange(10.0)), 2)
    loader.transfer = begin
    for number, batch in enumerate(loader, 1):
        assert int(batch["index"][0]) == 2 * (number - 1)
        assert len(begun) == min(5, number + 1)
        assert loader.state_dict()["delivered"] == number
    assert loader.epoch == 1
