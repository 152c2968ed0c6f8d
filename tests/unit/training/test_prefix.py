"""The frozen part computed once: the same training, found by what it follows from, and left where it cannot be."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import torchkeep as tk
from torchkeep.data.images import ImageFolder
from torchkeep.errors import ModelError
from torchkeep.store import Store
from torchkeep.tensors import tensor_sha256
from torchkeep.training.step import Stepper
from torchkeep.watch.records import read_records

FLIP, CROP = ["horizontal_flip"], ["random_resized_crop"]
Fit = Callable[..., tk.Run]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(40):
        path = folder / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 150 + 100 * (number % 2), (9, 12, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHKEEP_CACHE", str(tmp_path / "cache"))


class Net(nn.Module):
    """A trunk with statistics, and a head with dropout; the pooling between them is a function."""

    def __init__(self, seed: int = 0, dropout: float = 0.3):
        super().__init__()
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        torch.manual_seed(1)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(8, 2))

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.trunk(image).mean((2, 3)))
        return logits


@pytest.fixture
def fit(root: Path, tmp_path: Path) -> Fit:
    """Three epochs of four batches with the trunk frozen; what is kept is in this test's own cache."""
    runs = iter(range(99))

    def run(cache: str = "on", *, model: nn.Module | None = None, augment: Any = (), **given: Any) -> tk.Run:
        features, train = given.pop("features", {}), given.pop("train_settings", {})
        data = given.pop("data", None) or ImageFolder(root, image_size=8, augment=augment)
        settings = {"features": {"cache": cache, **features}, "train": {"threads": 1, **train}}
        return tk.fit(
            model or Net(), data, ImageFolder(root, image_size=8, like=data), settings=settings,
            **{"freeze": {"modules": ["trunk"]}, "batch_size": 10, "epochs": 3, "learning_rate": 0.05, "quiet": True,
               "metrics": ["accuracy"], "monitor": {"views": []}, "workers": 0,
               "run_dir": tmp_path / f"run-{next(runs)}", **given},
        )  # fmt: skip

    return run


def parameters(run: tk.Run) -> str:
    return run.sha256("last")


def made(run: tk.Run) -> int:
    """For how many samples and views the frozen part was computed in this run."""
    prefix = run._prepared.prefix
    assert prefix is not None
    assert prefix.valid is not None
    return prefix.train.made + prefix.valid.made


def decided(run: tk.Run) -> tuple[str, str]:
    rows = json.loads((run.dir / "run.json").read_text())["decisions"]
    return next((row["value"], row["reason"]) for row in rows if row["name"] == "frozen part")


@pytest.mark.parametrize("augment", [[], FLIP])
@pytest.mark.parametrize("train", [{}, {"ema": 0.8}, {"accumulate": 2}, {"precision": "bf16"}], ids=str)
def test_the_training_is_the_one_without_it(fit: Fit, augment: list[str], train: dict[str, Any]) -> None:
    whole = fit("off", augment=augment, train_settings=train)
    short = fit("on", augment=augment, train_settings=train)
    assert made(short) == 40 + 80 * len(augment)  # the same samples without augmentation are kept once
    one, other = (run.model("last").state_dict() for run in (whole, short))
    near = {"rtol": 0.1, "atol": 0.03} if "precision" in train else {"rtol": 1e-3, "atol": 1e-4}
    assert all(torch.allclose(one[name], other[name], **near) for name in one)
    assert one.keys() == other.keys()
    assert short.metrics["valid/loss"] == pytest.approx(whole.metrics["valid/loss"], rel=near["rtol"])
    again = short.evaluate(short._prepared.work.valid)["test/loss"]
    assert again == pytest.approx(short.best.metrics["valid/loss"], rel=near["rtol"])


def test_flips_that_are_kept_are_those_of_the_whole_training(fit: Fit) -> None:
    runs = [fit(cache, augment=augment) for augment in (FLIP, []) for cache in ("off", "on")]
    losses = [run.metrics["train/loss"] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] != pytest.approx(losses[3], rel=1e-4)


def test_other_draws_are_an_approximation_that_is_said(fit: Fit) -> None:
    run = fit("on", augment=CROP, features={"views": 2})
    assert made(run) == 2 * 40 + 40
    assert "approximation" in decided(run)[1]


def test_another_run_another_rate_and_another_head_find_it(fit: Fit) -> None:
    assert made(fit()) == 40
    assert made(fit(learning_rate=0.01)) == 0
    assert made(fit(seed=7)) == 0
    other = Net()
    other.head = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    assert made(fit(model=other)) == 0


def test_what_it_follows_from_gives_another_key(fit: Fit, root: Path, tmp_path: Path) -> None:
    fit()
    changed = Net()
    with torch.no_grad():
        changed.trunk[3].bias[5] += 1e-3
    assert made(fit(model=changed)) == 40
    moved = Net()
    moved.trunk[1].running_mean += 1e-3
    assert made(fit(model=moved)) == 40
    assert made(fit(data=ImageFolder(root, image_size=8, mean=[0.4], std=[0.5]))) == 40
    assert made(fit(data=ImageFolder(root, image_size=9))) == 40  # the validation split is of the size before
    assert made(fit(train_settings={"precision": "bf16"})) == 40
    assert made(fit(features={"dtype": "fp16"})) == 40
    assert made(fit(augment=CROP, features={"views": 1})) == 40  # the validation split's are those of before
    assert made(fit(augment=CROP, features={"views": 1}, seed=3)) == 40
    file = next(iter(sorted((root / "a").iterdir())))
    before = file.stat()
    os.utime(file, (1, 1))
    try:
        assert made(fit()) == 32  # the chunk that it is in
    finally:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


class Tanh(Net):
    """The same modules and parameters under another forward."""

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.trunk(image).tanh().mean((2, 3)))
        return logits


def test_other_code_gives_another_key(fit: Fit) -> None:
    fit()
    assert made(fit(model=Tanh())) == 40


def test_a_store_with_other_bits_is_found_by_computing_some_again(fit: Fit, tmp_path: Path) -> None:
    run = fit()
    assert run._prepared.prefix is not None
    assert made(fit(features={"verify": 8})) == 0
    for path in (tmp_path / "cache" / "features").iterdir():
        store = Store.on_disk(path, 40, 1 << 30, 1 << 20)
        row = store.get(0, identity := run._prepared.prefix.train._identity(0))
        if row is not None:
            store.put(0, row ^ 1, identity)
        store.close()
    with pytest.raises(ModelError, match="not what is computed now"):
        fit(features={"verify": 40})


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"freeze": None}, "nothing is frozen"),
        ({"train_settings": {"mixup": 0.4}}, "inputs are mixed"),
        ({"freeze": {"modules": ["trunk"], "unfreeze_at_step": 2}}, "nothing is frozen for a whole epoch"),
        ({"freeze": {"modules": ["trunk[3:]"]}}, "learns"),
        ({"freeze": {"modules": ["head"]}}, "learns"),
        ({"on_bad": "substitute"}, "on_bad"),
        ({"step": lambda model, batch, context: {"loss": model(batch["image"]).square().mean()}}, "a step of your own"),
    ],
    ids=str,
)
def test_where_it_cannot_be_the_reason_is_said(fit: Fit, given: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match="cannot be computed once") as caught:
        fit("on", **given)
    assert reason in str(caught.value.got)
    run = fit("auto", **given)
    assert run.status == "finished"
    assert run._prepared.prefix is None


def test_a_run_that_is_over_before_it_would_pay_is_left(fit: Fit) -> None:
    run = fit("auto", epochs=3)
    assert run._prepared.prefix is None
    assert decided(run) == ("in each step", "so few samples and epochs are over before it would pay")


def test_when_more_learns_the_whole_model_goes_on(fit: Fit, tmp_path: Path) -> None:
    plan = {"modules": ["trunk"], "unfreeze_at_epoch": 2, "rate_scale": 0.5}
    whole, short = (fit(cache, freeze=plan, epochs=4, optimizer="sgd") for cache in ("off", "on"))
    one, other = (run.model("last").state_dict() for run in (whole, short))
    assert not torch.equal(other["trunk.0.weight"], Net().state_dict()["trunk.0.weight"])
    assert all(torch.allclose(one[name], other[name], rtol=1e-3, atol=1e-4) for name in one)
    maps = [row for row in read_records(short.dir / "records.jsonl") if row["kind"] == "trainable_map"]
    assert maps[0]["rows"][0]["learns"] == "partly"
    assert maps[-1]["rows"][0]["learns"] is True
    assert maps[0]["frontier"]
    assert {row["name"].partition(".")[0] for row in maps[0]["rows"] if row["is_cached"]} == {"trunk"}


class StoppedError(Exception):
    """A step that fails."""


def test_a_run_stopped_in_each_step_ends_the_same_across_an_unfreezing(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"freeze": {"modules": ["trunk"], "unfreeze_at_epoch": 2}, "augment": FLIP,
             "checkpoint": {"every": 1, "on_error": "leave"}}  # fmt: skip
    wanted, step = parameters(fit("on", **given)), Stepper.__call__
    for number in range(1, 13):
        calls = iter(range(1, 99))

        def stop(stepper: Stepper, batches: Any, calls: Any = calls, number: int = number) -> Any:
            if next(calls) == number:
                raise StoppedError
            return step(stepper, batches)

        folder = tmp_path / f"stopped-{number}"
        monkeypatch.setattr(Stepper, "__call__", stop)
        with pytest.raises(StoppedError):
            fit("on", run_dir=folder, **given)
        monkeypatch.setattr(Stepper, "__call__", step)
        assert parameters(fit("on", run_dir=folder, resume="auto", **given)) == wanted, number


def test_the_model_is_left_as_it_was(fit: Fit) -> None:
    model = Net()
    before = {name: type(module.forward).__name__ for name, module in model.named_modules()}
    fit("on", model=model)
    assert {name: type(module.forward).__name__ for name, module in model.named_modules()} == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert tensor_sha256(dict(model.trunk.state_dict())) == tensor_sha256(dict(Net().trunk.state_dict()))
    assert model(torch.rand(2, 3, 8, 8)).requires_grad


RECIPE = """
[data]
train = "images"
valid = "images"
image_size = 8
batch_size = 10
workers = 0
[model]
name = "convnet"
args = {widths = [4]}
weights = "WEIGHTS"
[freeze]
all_but_head = true
[features]
cache = "on"
[train]
epochs = 2
threads = 1
[checkpoint]
every = 3
[monitor]
views = []
"""


def test_a_recipe_that_goes_on_finds_what_its_loaded_weights_made(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").symlink_to(root)
    for name, seed in (("drawn", 5), ("pretrained", 6)):
        plain = RECIPE.replace('weights = "WEIGHTS"\n', "").replace("[freeze]\nall_but_head = true\n", "")
        (tmp_path / f"{name}.toml").write_text(plain.replace('cache = "on"', 'cache = "auto"'))
        tk.train(tmp_path / f"{name}.toml", set=[f"seed={seed}"], run_dir=tmp_path / name, quiet=True)
    (tmp_path / "frozen.toml").write_text(RECIPE.replace("WEIGHTS", "pretrained"))
    whole = tk.train(tmp_path / "frozen.toml", run_dir=tmp_path / "whole", quiet=True)
    first, step = made(whole), Stepper.__call__
    calls = iter(range(1, 99))

    def stop(stepper: Stepper, batches: Any) -> Any:
        if next(calls) == 5:
            raise StoppedError
        return step(stepper, batches)

    monkeypatch.setattr(Stepper, "__call__", stop)
    with pytest.raises(StoppedError):
        tk.train(tmp_path / "frozen.toml", run_dir=tmp_path / "stopped", quiet=True, set=["checkpoint.on_error=leave"])
    monkeypatch.setattr(Stepper, "__call__", step)
    again = tk.resume(tmp_path / "stopped", quiet=True)
    assert (first, made(again)) == (40, 0)
    assert parameters(again) == parameters(whole)
    assert tk.resume(tmp_path / "stopped", quiet=True)._prepared.prefix is None  # nothing is left of its epochs


class Rooted(Net):
    """A parameter of the model itself, used by a function, belongs to the frozen part."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image + self.shift)


def test_a_parameter_outside_of_any_frozen_module_is_part_of_the_key(fit: Fit) -> None:
    plan = {"modules": ["trunk", "shift"]}
    assert made(fit(model=Rooted(), freeze=plan)) == 40
    assert made(fit(model=Rooted(), freeze=plan)) == 0
    moved = Rooted()
    with torch.no_grad():
        moved.shift += 1.0
    assert made(fit(model=moved, freeze=plan)) == 40


class Elsewhere(Net):
    """What the convolution gives is used beside its normalisation."""

    def forward(self, image: Tensor) -> Tensor:
        seen = self.trunk[0](image)
        logits: Tensor = self.head((self.trunk[1](seen) + seen).mean((2, 3)))
        return logits


def test_a_fold_that_changes_results_is_not_taken(fit: Fit) -> None:
    model = Elsewhere()
    model.trunk[1].running_mean += 0.5
    run = fit("on", model=model)
    assert "folded" not in decided(run)[0]
    assert run._prepared.prefix is not None
