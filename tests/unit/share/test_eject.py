"""Ejected scripts: their pieces give what the house gives, all examples eject, what cannot be written is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import torchkeep as tk
from torchkeep.chance import ChanceKey, epoch_order, keyed_bits
from torchkeep.data.mel import log_mel
from torchkeep.data.order import bucketed_order
from torchkeep.data.splits import split_indices
from torchkeep.errors import SettingsError
from torchkeep.share import ejected
from torchkeep.share.sourcing import imports_of, written_out
from torchkeep.training.metrics import make_metrics
from torchkeep.training.optim import rate_factor

ROOT = Path(__file__).parents[3]
EXAMPLES = sorted(path.parent.name for path in (ROOT / "examples").glob("*/recipe.toml"))
SHIPPED = ("digits", "table")


@pytest.mark.parametrize("size", [1, 7, 256, 257, 1000, 1024, 4099])
@pytest.mark.parametrize("seed", [0, 2**40])
def test_orders_are_those_of_the_loader(size: int, seed: int) -> None:
    shuffle = ejected.shuffled_few if size <= 256 else ejected.shuffled
    for epoch in (0, 3):
        order = shuffle(seed, epoch, size)
        assert order.tolist() == epoch_order(ChanceKey(seed, epoch), size, 0, size).tolist()
        lengths = keyed_bits(ChanceKey(5), "lengths", np.arange(size)) % np.uint64(40)
        bucketed = bucketed_order(ChanceKey(seed, epoch), lambda a, b: order[a:b], lengths, size, 4)  # noqa: B023
        assert ejected.bucketed(seed, epoch, order, lengths, 4).tolist() == bucketed(0, size).tolist()


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5])
def test_splits_are_those_of_the_house(fraction: float) -> None:
    labels = np.array([0] * 50 + [1] * 13 + [2] * 2 + [3])
    for operation in ("split", "split/test"):
        expected = split_indices(len(labels), labels, fraction, 7, operation)
        found = ejected.split(labels, fraction, 7, operation)
        assert [part.tolist() for part in found] == [part.tolist() for part in expected]


@pytest.mark.parametrize("warmup", [0.3, 0.05, 5.0])
def test_one_cycle_is_the_house_s(warmup: float) -> None:
    for step in range(40):
        assert ejected.one_cycle(step, 40, warmup) == rate_factor(step, 40, "one_cycle", warmup)


def test_log_mels_are_the_house_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ejected, "scipy", pytest.importorskip("scipy"), raising=False)
    pytest.importorskip("scipy.fft")
    waves = np.random.default_rng(0).standard_normal((3, 8000)).astype(np.float32)
    assert np.array_equal(ejected.log_mel(waves, 8000, 40), log_mel(waves, 8000, 40))


def test_metrics_are_the_house_s() -> None:
    torch.manual_seed(0)
    classes = [(torch.randn(n, 5), torch.randint(0, 4, (n,))) for n in (32, 32, 7)]
    for name in ("f1", "precision", "recall"):
        assert getattr(ejected, name)(classes) == measured(name, classes)
    numbers = [(torch.randn(n) * 300, torch.randn(n) * 300) for n in (32, 32, 7)]
    assert ejected.r2(numbers) == measured("r2", numbers)


def measured(name: str, seen: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    (metric,) = make_metrics([name])
    for output, target in seen:
        metric.update(output, target)
    return metric.compute()


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_ejects(name: str, tmp_path: Path) -> None:
    """It is tried beside the run before it is written; what is left to look at here is how it reads."""
    if name not in SHIPPED and not (ROOT / "../shared/data").is_dir():
        pytest.skip("the folder shared/data beside the repository is missing")
    text = eject(ROOT / "examples" / name / "recipe.toml", tmp_path).read_text(encoding="utf-8")
    compile(text, name, "exec")
    assert "torchkeep" not in text.replace("written by torchkeep eject", "")
    assert max(map(len, text.splitlines())) <= 120
    assert num_code_lines(text) < 200
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--isolated", "--line-length=120"]
    checked = subprocess.run(
        [*command, "--select=E,F,W,I,B,SIM,RET", tmp_path / "train.py"], capture_output=True, text=True, timeout=60
    )
    assert checked.returncode == 0, checked.stdout


def num_code_lines(text: str) -> int:
    """Lines that are neither blank nor a comment or a docstring alone."""
    return sum(not line.lstrip().startswith(("#", '"""')) for line in text.splitlines() if line.strip())


def eject(recipe: Any, folder: Path, *sets: str) -> Path:
    threads = torch.get_num_threads()
    try:
        return tk.eject(recipe, folder / "train.py", set=sets)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ("train.mixup=0.2", "train.mixup"),
        ('data.weights="balanced"', "data.weights"),
        ('data.on_bad="mask"', "data.on_bad"),
        ('data.augment=["rand_augment"]', "data"),
        ("train.train_metrics=true", "train.train_metrics"),
        ("data.bits=16", "data"),
    ],
)
def test_what_cannot_be_written_is_refused(changes: str, where: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be written as a plain script") as refusal:
        eject(ROOT / "examples/digits/recipe.toml", tmp_path, changes)
    assert refusal.value.where == where
    assert list(tmp_path.iterdir()) == []


def test_a_script_that_gives_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece that reads other pixels than the run does is noticed, and nothing is left behind."""
    monkeypatch.setattr("torchkeep.share.ejecting.ejected.decode_grey", ejected.decode_colours)
    with pytest.raises(SettingsError, match="cannot be written as a plain script"):
        eject(ROOT / "examples/digits/recipe.toml", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_source_comes_with_all_that_it_needs() -> None:
    from torchkeep.model.images import ResNet18

    text = written_out([ResNet18])
    assert "ModelError" not in text
    space: dict[str, Any] = {}
    exec(f"{imports_of(text)}\n{text}", space)
    torch.manual_seed(0)
    own = ResNet18(3, 2).state_dict()
    torch.manual_seed(0)
    assert all(torch.equal(value, own[name]) for name, value in space["ResNet18"](3, 2).state_dict().items())
