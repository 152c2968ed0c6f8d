"""Mixup and cutmix: what is drawn, what becomes of images and losses, and what they are refused for."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chisquare, kstest
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import torchkeep as tk
from torchkeep.errors import SettingsError
from torchkeep.training.mixing import Mix, Mixing, cut_box
from torchkeep.training.objective import Objective

DRAWS = torch.Generator().manual_seed(0)
IMAGES = torch.randn(40, 3, 8, 8, generator=DRAWS)
LABELS = torch.randint(0, 3, (40,), generator=DRAWS)
LOGITS = torch.randn(40, 3, generator=DRAWS)
MIXES = [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 3))


def mixed_at(mixing: Mixing, step: int, part: int = 0, images: Tensor = IMAGES) -> tuple[Tensor, Mix]:
    batch, mix = mixing({"image": images, "label": LABELS}, step, part)
    assert batch["label"] is LABELS
    return batch["image"], mix


# --- what is drawn


@pytest.mark.parametrize(("mixup", "cutmix"), MIXES)
def test_draws_are_a_function_of_seed_step_and_part(mixup: float, cutmix: float) -> None:
    mixing, before = Mixing("image", 5, mixup, cutmix), IMAGES.clone()
    state = torch.get_rng_state()
    seen = {place: mixed_at(mixing, *place) for place in [(3, 0), (3, 1), (4, 0)]}
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(before, IMAGES)
    torch.manual_seed(77)
    again = Mixing("image", 5, mixup, cutmix)
    for place in [(4, 0), (3, 1), (3, 0)]:  # in another order: nothing has a state
        image, mix = mixed_at(again, *place)
        assert torch.equal(image, seen[place][0])
        assert mix.share == seen[place][1].share
        assert torch.equal(mix.order, seen[place][1].order)
    orders = [mix.order.tolist() for _, mix in seen.values()]
    orders.append(mixed_at(Mixing("image", 6, mixup, cutmix), 3)[1].order.tolist())
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_the_share_of_mixup_is_beta_and_partners_are_even(alpha: float) -> None:
    mixing, few = Mixing("image", 1, alpha, 0.0), IMAGES[:5, :, :1, :1]
    mixes = [mixed_at(mixing, step, images=few)[1] for step in range(5000)]
    assert kstest([mix.share for mix in mixes], "beta", (alpha, alpha)).pvalue > 1e-3
    table = np.zeros((5, 5))
    for mix in mixes:
        table[np.arange(5), mix.order.numpy()] += 1
    assert chisquare(table.reshape(-1)).pvalue > 1e-3
    small = Mixing("image", 2, 0.0, 1.0)
    shares = [mixed_at(small, step, images=IMAGES[:2, :1])[1].share for step in range(500)]
    assert 0 <= min(shares) <= max(shares) <= 1


def test_a_keyed_coin_chooses_between_the_two() -> None:
    mixing, count = Mixing("image", 0, 0.4, 1.0), 2000
    plain = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 6, 6)
    blended = 0
    for step in range(count):
        image, mix = mixed_at(mixing, step, images=plain)
        parts = torch.stack([plain, plain[mix.order]])
        blended += not bool((image == parts).any(0).all())
    # a permutation without a moved sample, or a share of 0 or 1 in float32, shows nothing: 1 of 24, and few
    assert abs(blended / count - 0.5 * 23 / 24) < 4 * 0.5 / count**0.5


# --- what becomes of the images


def test_mixup_is_the_sum_by_shares_and_keeps_the_memory_format() -> None:
    for images in (IMAGES, IMAGES.to(memory_format=torch.channels_last), IMAGES.double()):
        for step in range(20):
            image, mix = mixed_at(Mixing("image", 0, 0.4, 0.0), step, images=images)
            wanted = mix.share * images + (1 - mix.share) * images[mix.order]
            torch.testing.assert_close(image, wanted)
            assert image.stride() == images.stride()


def test_the_share_of_cutmix_is_what_is_left_after_clipping() -> None:
    size = (12, 20)
    numbers = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 2, *size)
    clipped = 0
    for step in range(300):
        image, mix = mixed_at(Mixing("image", 3, 0.0, 1.0), step, images=numbers)
        for row, other in enumerate(mix.order.tolist()):
            if other != row:
                theirs = image[row, 0] == other
                assert torch.equal(image[row, 0][~theirs], torch.full_like(image[row, 0][~theirs], row))
                assert theirs.float().mean().item() == pytest.approx(1 - mix.share, abs=1e-6)
                down, across = theirs.any(1), theirs.any(0)
                assert int(theirs.sum()) == int(down.sum()) * int(across.sum())  # one box
                clipped += bool(theirs.any() and (down[0] or down[-1] or across[0] or across[-1]))
    assert clipped > 100


def test_the_box_has_the_area_that_was_drawn_where_nothing_is_clipped() -> None:
    for share in np.linspace(0.05, 1, 20).tolist():
        top, bottom, left, right = cut_box(1000, 600, share, 0.5, 0.5)
        assert (bottom - top) * (right - left) / 600_000 == pytest.approx(1 - share, abs=0.01)
        assert (top + bottom, left + right) == (1000, 600)
    assert cut_box(10, 10, 0.0, 0.0, 0.99) == (0, 5, 4, 10)


# --- what becomes of the loss


def soft(mix: Mix, labels: Tensor = LABELS) -> Tensor:
    hot = F.one_hot(labels, 3).float()
    return mix.share * hot + (1 - mix.share) * hot[mix.order]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradient_are_those_of_soft_labels(smoothing: float) -> None:
    objective = Objective("own", nn.CrossEntropyLoss(label_smoothing=smoothing))
    for step in range(10):
        _, mix = mixed_at(Mixing("image", 0, 1.0, 1.0), step)
        ours, theirs = (LOGITS.clone().requires_grad_() for _ in range(2))
        loss = mix.loss(objective, ours, LABELS)
        wanted = F.cross_entropy(theirs, soft(mix), label_smoothing=smoothing)
        loss.backward(), wanted.backward()
        torch.testing.assert_close(loss, wanted)
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_several_labels_and_numbers_have_the_gradient_of_their_mix() -> None:
    _, mix = mixed_at(Mixing("image", 0, 1.0, 0.0), 0)
    hot = F.one_hot(LABELS, 3).float()
    for loss in (F.binary_cross_entropy_with_logits, F.mse_loss):
        ours, theirs = (LOGITS.clone().requires_grad_() for _ in range(2))
        mix.loss(Objective("own", loss), ours, hot).backward()
        loss(theirs, soft(mix)).backward()
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_metrics_look_at_the_larger_share() -> None:
    order = torch.tensor([1, 2, 0])
    assert Mix(0.6, order).larger(order).tolist() == [1, 2, 0]
    assert Mix(0.4, order).larger(order).tolist() == [2, 0, 1]


# --- in a training


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., tk.Run]:
    def run(model: nn.Module, train: Any = None, mixes: dict[str, Any] | None = None, **given: Any) -> tk.Run:
        settings = {"train": {"threads": 1, **({"mixup": 0.4} if mixes is None else mixes)}}
        chosen = {"batch_size": 20, "epochs": 1, "quiet": True, "run_dir": tmp_path / "run", "workers": 0}
        data = tk.Arrays(image=IMAGES, label=LABELS) if train is None else train
        return tk.fit(model, data, settings=settings, monitor={"views": []}, **{**chosen, **given})

    return run


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("mixup", "cutmix"), MIXES)
def test_a_training_takes_the_steps_of_a_loop_with_soft_labels(
    mixup: float, cutmix: float, accumulate: int, fit: Callable[..., tk.Run]
) -> None:
    mixes = {"mixup": mixup, "cutmix": cutmix, "accumulate": accumulate, "train_metrics": True}
    theirs = net()
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    run = fit(net(), mixes=mixes, seed=9, metrics=["accuracy"],
              optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1))  # fmt: skip
    mixing = Mixing("image", 9, mixup, cutmix)
    hits = 0
    for number, batch in enumerate(tk.Loader(tk.Arrays(image=IMAGES, label=LABELS), 20, shuffle=True, seed=9)):
        step, part = divmod(number, accumulate)
        mixed, mix = mixing(batch, step, part)
        output = theirs(mixed["image"])
        (F.cross_entropy(output, soft(mix, batch["label"])) / accumulate).backward()
        hits += int((output.argmax(1) == mix.larger(batch["label"])).sum())
        if part == accumulate - 1:
            optimizer.step()
            optimizer.zero_grad()
    for ours, wanted in zip(run.model("last").parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours, wanted)
    assert run.metrics["train/accuracy"] == pytest.approx(hits / 40)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_it_trains_under_autocast_and_evaluates_unmixed(precision: str, fit: Callable[..., tk.Run]) -> None:
    images = torch.randint(0, 128, (40, 3, 8, 8), generator=DRAWS) + 127 * (LABELS == 1).view(-1, 1, 1, 1)
    data = tk.Arrays(image=images.to(torch.uint8), label=LABELS)
    mixes = {"mixup": 0.2, "cutmix": 1.0, "precision": precision}
    run = fit(net(), data, mixes, valid=data, epochs=2)
    with torch.no_grad():
        output = run.model("last")((images / 255 - 0.5) / 0.5)
    assert run.metrics["valid/loss"] == pytest.approx(float(F.cross_entropy(output, LABELS)), rel=0.05)


PROGRAM = """
import os, signal, sys, torch, torchkeep as tk
from torch import nn

folder, kill_at = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
images = torch.randint(0, 255, (48, 3, 8, 8), dtype=torch.uint8)
labels = torch.arange(48) % 3
body = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(144, 3)]
model = nn.Sequential(*body)
calls = 0

def count(module, given):
    global calls
    calls += module.training
    if calls == kill_at > 0:
        os.kill(os.getpid(), signal.SIGKILL)

model.register_forward_pre_hook(count)
run = tk.fit(model, tk.Arrays(image=images, label=labels), epochs=3, batch_size=8, run_dir=folder, resume="auto",
             quiet=True, workers=0, seed=2, checkpoint={"every": 2}, monitor={"views": []},
             settings={"train": {"threads": 1, "mixup": 0.3, "cutmix": 1.0, "accumulate": 2}})
print(run.sha256())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_a_killed_run_goes_on_to_the_same_end(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")

    def start(name: str, kill_at: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "program.py", name, str(kill_at)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)

    whole = start("whole", 0)
    assert whole.returncode == 0, whole.stderr
    assert start("killed", 11).returncode == -9  # in the second micro-batch of step 6; step 4 was saved
    again = start("killed", 0)
    assert again.returncode == 0, again.stderr
    assert again.stdout == whole.stdout


# --- refusals


def contrastive(output: Tensor, target: Tensor) -> Tensor:
    alike = F.normalize(output) @ F.normalize(output).T
    return F.cross_entropy(alike / 0.5, torch.arange(len(output)))


def weighted(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, weight=torch.tensor([1.0, 5.0, 0.1]))


class OwnLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, image: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(image)
        return {"logits": logits, "loss": F.cross_entropy(logits, labels)} if labels is not None else {"logits": logits}


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, image: Tensor, age: Tensor) -> Tensor:
        return self.net(image) + age[:, None]


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.layer(image)


def own_step(model: nn.Module, batch: dict[str, Tensor], context: Any) -> Tensor:
    return F.cross_entropy(model(batch["image"]), batch["label"])


ALONE = tk.Arrays(image=IMAGES)
MASKS = tk.Arrays(image=IMAGES, label=torch.zeros(40, 8, 8, dtype=torch.int64))
REFUSALS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "a step": (net, {"step": own_step}, "a step of your own"),
    "numbers": (lambda: nn.Linear(6, 3), {"train": TensorDataset(torch.randn(40, 6), LABELS)}, r"float32 \(20, 6\)"),
    "two inputs": (TwoInputs, {"train": tk.Arrays(image=IMAGES, age=torch.rand(40), label=LABELS)}, "image.*, age"),
    "masks": (OneLayer, {"train": MASKS}, r"a target of \(20, 8, 8\)"),
    "own loss": (OwnLoss, {}, "loss output.loss"),
    "a loss of the batch": (net, {"loss": contrastive}, "a whole batch at once"),
    "no target": (OneLayer, {"train": ALONE, "loss": lambda output: output.mean()}, "0 targets"),
    "its own image": (OneLayer, {"train": ALONE, "targets": "image", "loss": F.mse_loss}, "inputs none"),
}


@pytest.mark.parametrize("mixes", [{"mixup": 0.2}, {"cutmix": 1.0}])
@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_mixed_is_refused_before_anything_is_written(
    case: str, mixes: dict[str, float], fit: Callable[..., tk.Run], tmp_path: Path
) -> None:
    make, given, said = REFUSALS[case]
    with pytest.raises(SettingsError, match="cannot be mixed") as caught:
        fit(make(), mixes=mixes, **given)
    assert caught.value.where == f"train.{next(iter(mixes))}"
    assert re.search(said, caught.value.got)
    assert list(tmp_path.iterdir()) == []
    assert fit(make(), mixes={}, **given).status == "finished"  # unmixed it trains


@pytest.mark.parametrize("loss", [weighted, nn.CrossEntropyLoss(reduction="sum"), F.multi_margin_loss])
def test_a_loss_of_samples_is_no_loss_of_a_batch(loss: Any, fit: Callable[..., tk.Run]) -> None:
    assert fit(net(), loss=loss).status == "finished"


@pytest.mark.parametrize("value", [-0.1, float("inf")])
def test_a_share_that_no_beta_has_is_refused(value: float, fit: Callable[..., tk.Run]) -> None:
    with pytest.raises(SettingsError):
        fit(net(), mixes={"mixup": value})


def test_the_model_own_loss_gives_way_to_one_that_is_named(fit: Callable[..., tk.Run]) -> None:
    assert fit(OwnLoss(), loss="cross_entropy").status == "finished"
