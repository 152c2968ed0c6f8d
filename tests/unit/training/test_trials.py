"""The full checks, one by one: what each blames, and what looks alike and is right. tests/mistakes has many more."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchkeep as tk
from torchkeep.training.subject import Finding
from torchkeep.training.trials import TRIALS

WIDTH, CLASSES = 6, 3


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def points(seed: int = 1, count: int = 64) -> tk.Arrays:
    x = drawn(seed, count, WIDTH)
    return tk.Arrays(x=x, label=x[:, :CLASSES].argmax(1))


def net(*last: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), *last, nn.Linear(16, CLASSES))


def found(check: str, model: nn.Module | None = None, train: Any = None, valid: Any = None, **given: Any) -> Finding:
    torch.manual_seed(0)
    made = {"batch_size": 16, "epochs": 3, "settings": {"train": {"threads": 1}}, **given}
    data = train if train is not None else points()
    findings = tk.preflight(model or net(), data, valid, level="full", **made)
    return next(finding for finding in findings if finding.check == check)


def verdict(check: str, *given: Any, **named: Any) -> str:
    return found(check, *given, **named).verdict


@pytest.mark.parametrize("check", TRIALS)
def test_nothing_is_said_against_an_ordinary_training(check: str) -> None:
    finding = found(check, valid=points(2, 32))
    assert finding.verdict == ("skipped" if check in ("augmentation", "leak") else "passed"), finding
    assert (finding.expected, finding.fix) == ("", "")


def test_every_blame_says_what_to_do() -> None:
    finding = found("learning rate", learning_rate=10.0)
    assert finding.is_blamed
    assert "10.00" in finding.found
    assert finding.expected == "a loss that falls"
    assert finding.fix.startswith("optimizer.learning_rate = ")


# --- one batch, and what an output follows


class Fixed(nn.Module):
    """Says the same whatever it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), -1)


def test_an_output_that_is_always_the_same() -> None:
    finding = found("output follows input", Fixed())
    assert finding.verdict == "error"
    assert "16 samples" in finding.found


def test_a_loss_that_does_not_fall() -> None:
    finding = found("one batch learned", loss=lambda output, label: F.cross_entropy(output * 0, label))
    assert finding.verdict == "warning"
    assert "4 samples" in finding.found
    assert f"{math.log(CLASSES):.3f}" in finding.found


def test_numbers_are_learned_by_a_line() -> None:
    x = drawn(1, 64, 1)
    data = tk.Arrays(x=x, target=drawn(2, 64, 1))  # which x tells nothing of: two samples are learned all the same
    assert verdict("one batch learned", nn.Linear(1, 1), data, inputs="x", loss="mse") == "passed"


def test_smoothed_labels_that_are_known_already() -> None:
    model, data = nn.Linear(WIDTH, CLASSES, bias=False), points()
    with torch.no_grad():
        model.weight.copy_(3 * torch.eye(CLASSES, WIDTH))
    assert verdict("one batch learned", model, data, loss=nn.CrossEntropyLoss(label_smoothing=0.3)) == "passed"


class Two(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, CLASSES), nn.Linear(width, CLASSES)
        nn.init.zeros_(self.second.weight)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.as_tensor(self.first(left) + self.second(right))


class OneOfTwo(Two):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.as_tensor(self.first(left) + self.second(left))


def test_an_input_without_effect_is_named() -> None:
    x = points().columns
    data = tk.Arrays(left=x["x"], right=drawn(3, 64, WIDTH), label=x["label"])
    finding = found("output follows input", OneOfTwo(), data)
    assert finding.verdict == "warning"
    assert finding.found.startswith("right: ")
    assert verdict("output follows input", Two(), data) == "passed"  # its second layer begins at 0
    given = {"inputs": lambda batch: (batch["left"], batch["left"])}  # who picks, may leave out
    assert verdict("output follows input", Two(), data, **given) == "passed"


# --- splits and classes


def mixed(share: float, count: int = 60) -> tk.Arrays:
    """A validation of which a share is in ``points()``."""
    own, other, copies = points(), points(2, count), int(share * count)
    return tk.Arrays(**{key: torch.cat([own.columns[key][:copies], other.columns[key][copies:]]) for key in own.schema})


class Pairs(torch.utils.data.Dataset[Any]):
    """A dataset as torch has them."""

    def __init__(self, data: tk.Arrays):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.data.columns["x"][index], int(self.data.columns["label"][index])


@pytest.mark.parametrize("kind", [lambda data: data, Pairs])
@pytest.mark.parametrize(("share", "expected"), [(0.0, "passed"), (0.1, "warning"), (1.0, "warning")])
def test_samples_that_both_splits_have(kind: Callable[[Any], Any], share: float, expected: str) -> None:
    finding = found("splits apart", None, kind(points()), kind(mixed(share)))
    assert finding.verdict == expected
    assert finding.found.startswith(f"{int(60 * share)} of 60 ")


def test_rows_that_are_alike_by_chance_are_no_leak() -> None:
    def rolled(seed: int, count: int) -> tk.Arrays:
        x = torch.randint(3, (count, 3), generator=torch.Generator().manual_seed(seed)).float()
        return tk.Arrays(x=x, label=(x.sum(1) > 3).long())

    finding = found("splits apart", nn.Linear(3, 2), rolled(1, 300), rolled(2, 60))
    assert finding.verdict == "passed"
    assert "60 of 60" in finding.found


def test_only_some_of_large_splits_are_read() -> None:
    x = drawn(1, 12_000, WIDTH)
    data = [tk.Arrays(x=part, label=part[:, :CLASSES].argmax(1)) for part in (x, x[:6_000])]
    finding = found("splits apart", None, *data)
    assert finding.verdict == "warning"
    assert "5,000 of 12,000 samples of train" in finding.found


@pytest.mark.parametrize("kind", [lambda data: data, Pairs])
def test_classes_that_are_missing(kind: Callable[[Any], Any]) -> None:
    data, valid = points(1, 300), points(2, 60)
    label = data.columns["label"]
    kept = [kind(tk.Arrays(x=data.columns["x"][rows], label=label[rows])) for rows in (label != 1, label == 1)]
    assert "no sample of '1'" in found("classes", None, kept[0], kind(valid)).found
    assert "labels of train are '1'" in found("classes", None, kept[1], kind(valid)).found
    assert "samples of valid are '1'" in found("classes", None, kind(data), kept[1]).found
    # two samples of one class may come by chance
    few = kind(tk.Arrays(x=data.columns["x"][label == 1][:2], label=torch.tensor([1, 1])))
    assert verdict("classes", None, kind(data), few) == "passed"


def test_a_single_sample_of_a_class() -> None:
    x, label = drawn(1, 400, WIDTH), torch.arange(400) % 2
    label[7] = 2
    finding = found("classes", None, tk.Arrays(x=x, label=label))
    assert finding.verdict == "warning"
    assert "1 sample of '2'" in finding.found


# --- augmentation

STRIPES = [np.tile(np.eye(4, dtype=np.uint8)[place].repeat(4) * 200, (16, 1)) for place in range(4)]


def striped(folder: Path, augment: Any) -> tk.ImageFolder:
    """Four classes, each with a stripe at another place."""
    import cv2

    noise = np.random.default_rng(0)
    for number in range(160):
        path = folder / "abcd"[number % 4] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), STRIPES[number % 4] + noise.integers(0, 50, (16, 16), np.uint8))
    return tk.ImageFolder(folder, channels=1, augment=augment)


def noise_alone(sample: Any, rng: np.random.Generator) -> Any:
    return sample | {"image": torch.from_numpy(rng.integers(0, 256, tuple(sample["image"].shape), dtype=np.uint8))}


def darkened(sample: Any, rng: np.random.Generator) -> Any:
    return sample | {"image": sample["image"] // 255}


@pytest.mark.parametrize(
    ("augment", "expected", "said"),
    [
        ([], "skipped", "changes no tensor"),
        (["vertical_flip", "color_jitter"], "passed", "of 160 samples"),
        ([noise_alone], "warning", "by chance in 25%"),
        ([darkened], "warning", "nearly constant"),
    ],
)
def test_augmentation_leaves_what_a_sample_is(augment: list[Any], expected: str, said: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 4))
    finding = found("augmentation", model, striped(tmp_path, augment))
    assert finding.verdict == expected
    assert said in finding.found
    assert all(getattr(entry, "__name__", entry) in finding.fix for entry in augment if expected == "warning")


# --- saving


class Keeps(nn.Module):
    """A tensor beside the parameters: ``kept`` as an attribute, or as a buffer."""

    def __init__(self, kept: Tensor, is_buffer: bool = False):
        super().__init__()
        self.layer = nn.Linear(WIDTH, CLASSES)
        if is_buffer:
            self.register_buffer("kept", kept)
        else:
            self.kept = kept

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.layer(x @ self.kept))


def waves() -> Tensor:
    angle = torch.arange(WIDTH)[:, None] / 100 ** (torch.arange(WIDTH // 2) / 3)
    return torch.cat([angle.sin(), angle.cos()], 1)


def test_a_drawn_tensor_that_no_state_holds() -> None:
    finding = found("save and load", Keeps(drawn(5, WIDTH, WIDTH)))
    assert finding.verdict == "warning"
    assert "kept is not in the state" in finding.found
    assert "register_buffer" in finding.fix
    assert verdict("save and load", Keeps(drawn(5, WIDTH, WIDTH), is_buffer=True)) == "passed"


@pytest.mark.parametrize("kept", [waves(), torch.ones(WIDTH, WIDTH).triu(), torch.linspace(0.1, 2, 36).view(6, 6)])
def test_what_a_rule_makes_is_made_again(kept: Tensor) -> None:
    assert verdict("save and load", Keeps(kept)) == "passed"


RECIPE_MODEL = """
import random
from torch import nn

class Scaled(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.scale = {scale}
        self.layer = nn.Linear({width}, num_classes)

    def forward(self, numbers):
        return self.layer(numbers * self.scale)

def build(num_classes):
    return Scaled(num_classes)
"""


@pytest.mark.parametrize(("scale", "expected"), [("random.random()", "warning"), ("0.5", "passed")])
def test_a_recipe_is_built_anew(scale: str, expected: str, tmp_path: Path) -> None:
    rows = [f"{random.Random(n).random()},{n % 7},{'yes' if n % 3 else 'no'}" for n in range(60)]
    (tmp_path / "rows.csv").write_text("\n".join(["a,b,label", *rows]))
    (tmp_path / "net.py").write_text(RECIPE_MODEL.format(scale=scale, width=2))
    recipe = {
        "name": "scaled", "data": {"train": str(tmp_path / "rows.csv"), "target": "label"},
        "model": {"name": f"{tmp_path / 'net.py'}:build"}, "train": {"threads": 1},
    }  # fmt: skip
    finding = next(f for f in tk.preflight(recipe, level="full") if f.check == "save and load")
    assert finding.verdict == expected, finding


# --- micro-batches


def test_a_sum_is_no_mean() -> None:
    def summed(output: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(output, label, reduction="sum")

    accumulating = {"train": {"threads": 1, "accumulate": 2}}
    finding = found("micro-batches", loss=summed, settings=accumulating)
    assert finding.verdict == "warning"
    assert "5 and 11 samples" in finding.found
    assert verdict("micro-batches", loss=summed) == "skipped"  # there are no micro-batches
    assert verdict("micro-batches", settings=accumulating) == "passed"


def test_a_mean_over_unequal_tokens() -> None:
    count, length = torch.arange(64) % 5 + 1, torch.arange(6)
    tokens = torch.randint(9, (64, 6), generator=torch.Generator().manual_seed(1))
    data = tk.Arrays(tokens=tokens, target=tokens.where(length < count[:, None], -100))
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9))
    given = {"settings": {"train": {"threads": 1, "accumulate": 2}}}

    def over_all(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.mT, target, reduction="none", ignore_index=-100).mean()

    assert verdict("micro-batches", model, data, loss="cross_entropy", **given) == "passed"
    assert verdict("micro-batches", model, data, loss=over_all, **given) == "warning"


def test_gradients_that_cancel_out_are_not_apart() -> None:
    x = drawn(1, 32, 1)
    data, model = tk.Arrays(x=torch.cat([x, x]), target=torch.cat([1e3 + x, 1e3 - x])), nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.fill_(1e3)  # the best that there is
    given = {"batch_size": 64, "inputs": "x", "loss": "mse", "settings": {"train": {"threads": 1, "accumulate": 2}}}
    assert verdict("micro-batches", model, data, **given) == "passed"


# --- the learning rate


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 20.0, total_steps=50)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"learning_rate": 1e-3}, "passed"),
        ({"learning_rate": 1e-5}, "passed"),
        ({"learning_rate": 1e-10}, "warning"),
        ({"learning_rate": 30.0}, "warning"),
        ({"optimizer": "sgd", "learning_rate": 0.1}, "passed"),
        ({"learning_rate": 30.0, "schedule": lambda step, total: 1e-4}, "passed"),
        ({"optimizer": lambda model: torch.optim.Adam(model.parameters(), 1e-3), "schedule": one_cycle}, "warning"),
        ({"optimizer": lambda model: torch.optim.SGD(model.parameters(), 0.05, maximize=True)}, "warning"),
    ],
    ids=str,
)
def test_the_highest_rate_of_the_run(given: dict[str, Any], expected: str) -> None:
    finding = found("learning rate", net(nn.Linear(16, 16), nn.ReLU()), **given)
    assert finding.verdict == expected, finding


# --- activations


class Opened(nn.Module):
    """A branch behind a rectifier that is closed at first; its own scale opens it."""

    def __init__(self, is_stuck: bool):
        super().__init__()
        self.enter, self.act, self.out = nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, CLASSES)
        with torch.no_grad():
            self.enter.bias.fill_(-9.0)
        self.lift = nn.Parameter(torch.zeros(()))
        self.is_stuck = is_stuck

    def forward(self, x: Tensor) -> Tensor:
        lift = 0.0 if self.is_stuck else 5e3 * self.lift
        return torch.as_tensor(self.out(self.act(self.enter(x) + lift)) + lift * 1e-3)


def test_what_is_dead_is_named() -> None:
    finding = found("activations", Opened(is_stuck=True))
    assert finding.verdict == "warning"
    assert finding.found.startswith("act: ")


@pytest.mark.parametrize("kind", [nn.Sigmoid, nn.Tanh, nn.Hardtanh, nn.GELU])
def test_saturated_is_as_good_as_dead(kind: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 16), kind(), nn.Linear(16, CLASSES))
    assert verdict("activations", model) == "passed"
    with torch.no_grad():
        model[0].bias.fill_(-50.0)
    assert verdict("activations", model) == "warning"


def test_a_dropout_of_one() -> None:
    assert verdict("activations", net(nn.Dropout(1.0))) == "warning"
    assert verdict("activations", net(nn.Dropout(0.5))) == "passed"


def test_a_step_with_several_losses_is_let_alone() -> None:
    model = nn.ModuleDict({"one": nn.Linear(WIDTH, 1), "two": nn.Linear(WIDTH, 1)})
    optimizers = {name: torch.optim.Adam(part.parameters()) for name, part in model.items()}

    def step(model: Any, batch: Any, context: Any) -> Any:
        losses = {name: model[name](batch["x"]).square().mean() for name in optimizers}
        for name, loss in losses.items():
            context.backward(loss, name)
        return {"loss": losses["one"]}

    checks = ("one batch learned", "learning rate", "micro-batches", "activations", "save and load")
    assert {verdict(check, model, step=step, optimizer=optimizers) for check in checks} == {"skipped"}


def test_without_time_nothing_is_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchkeep.training.preflight._TRIAL_S", 0.0)
    given = {"loss": lambda output, label: F.cross_entropy(output * 0, label), "learning_rate": 1e-12}
    assert found("one batch learned", **given).found.startswith("no time")
    assert found("learning rate", **given).found.startswith("no time")
