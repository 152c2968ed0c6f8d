"""Law 4 for features in pairs: whatever a run is made of, stopped at any moment it goes on to the same bits."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import random
import signal
import threading
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from exact import (
    APART,
    FEATURES,
    LEFT_BY,
    Case,
    StepError,
    Stop,
    all_of,
    draw_images,
    fit,
    run_killed,
    run_loop,
    states_of,
)
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

import torchkeep as tk
from torchkeep.files import DurableFolder
from torchkeep.folder import RunFolder
from torchkeep.model.images import ConvNet

Pair = frozenset[tuple[str, str]]

# --- the cases: every pair of features that can be together is in one of them


def pairs_of(case: Case) -> set[Pair]:
    return set(map(frozenset, combinations(case.items(), 2)))


def all_pairs() -> set[Pair]:
    levels = [[(name, level) for level in found] for name, found in FEATURES.items()]
    pairs = {frozenset({a, b}) for one, other in combinations(levels, 2) for a in one for b in other}
    return pairs - APART


def grown(pair: Pair, missing: set[Pair], rng: random.Random) -> Case:
    """A case with this pair; each other feature, in an order that is drawn, at the level that covers most."""
    case = dict(pair)
    for name in rng.sample(sorted(FEATURES), len(FEATURES)):
        if name not in case:
            levels = rng.sample(FEATURES[name], len(FEATURES[name]))
            larger = [one for level in levels if not pairs_of(one := case | {name: level}) & APART]
            case = max(larger, key=lambda one: len(pairs_of(one) & missing))
    return {name: case[name] for name in FEATURES}


def covering(seed: int) -> list[Case]:
    """Few cases that have every pair: each is the best of some that have a pair which is still missing."""
    rng, missing, cases = random.Random(seed), all_pairs(), []
    while missing:
        pairs = rng.choices(sorted(missing, key=sorted), k=20)
        best = max((grown(pair, missing, rng) for pair in pairs), key=lambda case: len(pairs_of(case) & missing))
        missing -= pairs_of(best)
        cases.append(best)
    return cases


CASES = covering(seed=0)


def test_every_pair_that_can_be_together_is_in_a_case() -> None:
    covered = set().union(*map(pairs_of, CASES))
    assert covered == all_pairs()


# --- stopped within every forward in turn, training or evaluating, within this process


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # a process begins ten times as quickly where what it imports is there already; torch.optim imports torch._dynamo
    preloaded = ["torchkeep.data.workers", "torchkeep.data.images", "torchkeep.api", "PIL.Image", "torch._dynamo"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(preloaded)
    multiprocessing.forkserver.ensure_running()
    folder = tmp_path_factory.mktemp("exact")
    draw_images(folder)
    return folder


def end_of(case: Case, place: Path, folder: Path) -> tuple[Any, ...]:
    """Everything that a run ends with, when it goes on and nothing stops it."""
    run, model = fit(case, place, folder, Stop("", None))
    return model, run.sha256("best"), run.best, run.metrics, *all_of(folder)


def check_common(states: dict[str, Any], other: dict[str, Any]) -> None:
    """Whichever checkpoints of a step both have are equal, and there are some."""
    common = states.keys() & other.keys()
    assert common
    assert {name: states[name] for name in common} == {name: other[name] for name in common}


def text_of(case: Case) -> str:
    return "-".join(level.replace(" ", "") for name, level in case.items() if level != FEATURES[name][0]) or "plain"


@pytest.mark.parametrize("case", CASES, ids=text_of)
def test_a_run_stopped_within_any_forward_ends_the_same(case: Case, place: Path, tmp_path: Path) -> None:
    counted = Stop("", None)
    fit(case, place, tmp_path / "whole", counted)
    wanted, states = end_of(case, place, tmp_path / "whole"), states_of(tmp_path / "whole" / "checkpoints")
    assert counted.calls == num_forwards(case)
    # processes take longer to begin than all else does; 4 has no factor in common with an epoch's 5 or 9 forwards
    for number in range(1, counted.calls + 1, 4 if case["feed"] == "processes" else 1):
        folder = tmp_path / f"stopped-{number}"
        with pytest.raises(LEFT_BY[case["stop"]]):
            fit(case, place, folder, Stop(case["stop"], number))
        assert end_of(case, place, folder) == wanted, number
        check_common(states, states_of(folder / "checkpoints"))


def num_forwards(case: Case) -> int:
    """Four batches an epoch, of two forwards where two optimisers take turns, and one evaluation."""
    return {"off": 3, "warmup": 3, "restore_best": 2}[case["stopping"]] * ({"one": 4, "two": 8}[case["optimisers"]] + 1)


def test_a_model_ends_with_its_best_parameters_where_that_is_asked_for(place: Path, tmp_path: Path) -> None:
    """So that the runs above are told apart by it: the best is not the last."""
    case = {name: levels[0] for name, levels in FEATURES.items()} | {"stopping": "restore_best"}
    run, model = fit(case, place, tmp_path / "run", Stop("", None))
    assert model == run.sha256("best") != run.sha256("last")


def test_a_save_under_way_ends_before_the_folder_is_free(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second Ctrl-C leaves the writing thread; the next attempt of the same program must not meet it at work."""
    case = {name: levels[0] for name, levels in FEATURES.items()}
    wanted = end_of(case, place, tmp_path / "whole")
    write = DurableFolder.write

    def slow(folder: DurableFolder, name: str, *parts: Any) -> None:
        time.sleep(0.05)
        write(folder, name, *parts)

    with monkeypatch.context() as patched:
        patched.setattr(DurableFolder, "write", slow)
        with pytest.raises(KeyboardInterrupt):
            fit(case, place, tmp_path / "stopped", Stop("at once", 3))
    assert not [thread for thread in threading.enumerate() if thread.name == "torchkeep-checkpoint"]
    assert end_of(case, place, tmp_path / "stopped") == wanted


# --- kill -9, in processes of their own


def exit_code(work: Callable[..., None], *given: Any) -> int | None:
    """How a process of its own ended; None where it did not within two minutes."""
    process = multiprocessing.get_context("forkserver").Process(target=work, args=given)
    process.start()
    process.join(120)
    code = process.exitcode
    process.kill()
    return code


@pytest.mark.parametrize("case", CASES[::3], ids=text_of)
def test_a_run_that_is_killed_ends_the_same(case: Case, place: Path, tmp_path: Path) -> None:
    fit(case, place, tmp_path / "whole", Stop("", None))
    wanted, number = end_of(case, place, tmp_path / "whole"), random.randint(1, num_forwards(case))
    folder = tmp_path / f"killed-{number}"
    assert exit_code(run_killed, case, place, folder, number) == -signal.SIGKILL
    assert RunFolder(folder).status() == "killed"
    assert exit_code(run_killed, case, place, folder, None) == 0
    assert RunFolder(folder).status() == "finished"
    assert end_of(case, place, folder) == wanted


def test_a_loop_of_ones_own_that_is_killed_within_any_forward_ends_the_same(place: Path, tmp_path: Path) -> None:
    assert exit_code(run_loop, place, tmp_path / "whole", None) == 0
    states = states_of(tmp_path / "whole")
    assert max(states) == "step-00000012"
    for number in range(1, 16):
        folder = tmp_path / f"killed-{number}"
        assert exit_code(run_loop, place, folder, number) == -signal.SIGKILL
        assert exit_code(run_loop, place, folder, None) == 0
        resumed = states_of(folder)
        assert max(resumed) == max(states)
        check_common(states, resumed)
    assert exit_code(run_loop, place, tmp_path / "beyond", 16) == 0


# --- what only a recipe has


def train_balanced(place: Path, folder: Path, stop: Stop) -> tuple[Any, ...]:
    """What a recipe ends with whose samples are drawn so that each class comes as often, with a test split."""
    recipe = {
        "data": {"train": str(place / "whole"), "valid": str(place / "valid"), "test": str(place / "valid"),
                 "image_size": 8, "augment": ["random_rotation", "random_erasing"], "weights": "balanced",
                 "batch_size": 5, "workers": 2, "cache": "disk"},
        "model": {"name": "convnet", "args": {"widths": [4, 8]}},
        "optimizer": {"name": "sgd", "learning_rate": 0.05, "schedule": "cosine", "warmup": 2},
        "train": {"epochs": 2, "threads": 1, "metrics": ["f1"], "label_smoothing": 0.1, "class_weights": [1.0, 2.0]},
        "checkpoint": {"every": 3, "on_error": "leave"},
        "monitor": {"views": [], "graph": False, "histograms": "off"},
    }  # fmt: skip

    def before(module: nn.Module, *_: Any) -> None:
        if isinstance(module, ConvNet):
            stop(module)

    with register_module_forward_pre_hook(before):
        run = tk.train(recipe, run_dir=folder, resume="auto", preflight="off", quiet=True)  # its forwards are counted
    return run.sha256("best"), run.best, run.metrics, *all_of(folder)


def test_a_recipe_stopped_within_any_forward_ends_the_same(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHKEEP_CACHE", str(tmp_path / "cache"))
    counted = Stop("", None)
    wanted = train_balanced(place, tmp_path / "whole", counted)
    assert counted.calls == 2 * (4 + 1) + 1
    for number in range(1, counted.calls + 1):
        folder, how = tmp_path / f"stopped-{number}", ("failure", "at once", "interrupt")[number % 3]
        with pytest.raises((StepError, KeyboardInterrupt)):  # Ctrl-C in the test split's forward ends at once
            train_balanced(place, folder, Stop(how, number))
        assert train_balanced(place, folder, Stop("", None)) == wanted, number
