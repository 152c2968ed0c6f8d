"""Works that are processes of their own: each stays up, waits, and measures itself when it is asked.

What is measured is the process and all below it, so that workers count as much as threads do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Feed = Callable[[], Iterator[Any]]
"""One epoch of batches at each call."""

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

_TICKS_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class LeftOut(Exception):  # noqa: N818  # no error: a work that cannot be done here says why
    """Why a work is left out."""


class Work:
    """A process that holds one work. ``cpu_s`` are the CPU seconds of each 1,000 units, a value a round."""

    def __init__(self, script: str, words: list[str], environment: dict[str, str]):
        self._process = subprocess.Popen(
            [sys.executable, script, "--work", *words],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.name, self.cpu_s = " ".join(words), list[float]()
        self.facts = self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"the work {self.name!r} ended with {self._process.wait()}")
        return json.loads(line)

    def rate(self, seconds: float) -> float:
        """Units a second, over whole epochs that take ``seconds`` or more."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        answer = self._answer()
        self.cpu_s.append(answer["cpu_s"])
        return float(answer["rate"])

    def close(self) -> None:
        self._process.communicate()


def serve(make: Callable[[], dict[str, Feed]], content_of: Callable[[Any], dict[str, float]]) -> None:
    """Say what an epoch holds and which way is the fastest; then measure that one for each line that is read."""
    try:
        feeds = make()
    except LeftOut as why:
        print(json.dumps({"left_out": str(why)}), flush=True)
        return
    content: dict[str, float] = {}
    for batch in next(iter(feeds.values()))():
        for name, value in content_of(batch).items():
            content[name] = content.get(name, 0) + value
    tried = {name: min(epoch_s(feed) for _ in range(3 if len(feeds) > 1 else 1)) for name, feed in feeds.items()}
    best = min(tried, key=lambda name: tried[name])
    feed = feeds[best]
    del feeds
    print(json.dumps({"content": content, "way": best, "tried_s": tried}), flush=True)
    for line in sys.stdin:
        seconds, units, spent, before_s = float(line), 0.0, 0.0, tree_cpu_s()
        while spent < seconds:
            spent += epoch_s(feed)
            units += content["units"]
        cpu_s = (tree_cpu_s() - before_s) / units * 1000
        print(json.dumps({"rate": units / spent, "cpu_s": cpu_s}), flush=True)


def epoch_s(feed: Feed) -> float:
    began = time.perf_counter()
    for _ in feed():
        pass
    return time.perf_counter() - began


def by_workers(dataset: Any, batch_size: int, collate: Any, numbers: tuple[int, ...]) -> dict[str, Feed]:
    """The same DataLoader with each number of workers, which stay from epoch to epoch."""
    from torch.utils.data import DataLoader

    return {
        f"{number} workers": DataLoader(
            dataset,
            batch_size,
            shuffle=True,
            num_workers=number,
            collate_fn=collate,
            persistent_workers=number > 0,
            multiprocessing_context="fork" if number and hasattr(os, "fork") else None,
        ).__iter__
        for number in numbers
    }


def answer_of(script: str, words: list[str], environment: dict[str, str]) -> Any:
    """What a process that does one work says in its last line."""
    command = [sys.executable, script, "--work", *words]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{words[0]} ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def folder_samples(root: Path) -> list[tuple[str, int]]:
    """torchvision's make_dataset: classes, a sorted walk of each, a tuple for each file."""
    samples = []
    for number, name in enumerate(sorted(entry.name for entry in os.scandir(root) if entry.is_dir())):
        for place, _, files in sorted(os.walk(root / name, followlinks=True)):
            for file in sorted(files):
                path = os.path.join(place, file)
                if path.lower().endswith((".jpg", ".jpeg", ".png")):
                    samples.append((path, number))
    return samples


# The process and all below it


def tree_cpu_s() -> float:
    """User and system seconds so far, also of children that have ended; without /proc none of those that live."""
    if not Path("/proc/self/stat").exists():
        return sum(os.times()[:4])
    # proc_pid_stat(5): utime, stime, cutime, cstime are fields 14 to 17; what ended is with its parent
    return sum(sum(map(int, _stat(pid)[11:15])) for pid in _tree()) / _TICKS_S


def tree_pss_bytes() -> dict[str, int]:
    """Memory in use, each shared page in equal parts: of all kinds, "anon" without files.

    Raises:  LeftOut where the system does not tell
    """
    found = {"all": 0, "anon": 0}
    for pid in _tree():
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
        except OSError:
            if pid == os.getpid():
                raise LeftOut("no /proc/PID/smaps_rollup here") from None
            continue
        rows = dict(line.partition(":")[::2] for line in lines)
        for name, key in (("all", "Pss"), ("anon", "Pss_Anon")):
            found[name] += int(rows.get(key, "0").split()[0]) * 1024
    return found


def _tree() -> list[int]:
    parents = {int(path.name): _stat(int(path.name))[1] for path in Path("/proc").glob("[0-9]*")}
    found = [os.getpid()]
    for pid in found:  # grows on the way
        found += [child for child, parent in parents.items() if int(parent) == pid]
    return found


def _stat(pid: int) -> list[str]:
    """The fields after the command's name, from the third on; zeros for a process that has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ["0"] * 50
