"""Law 4: a run that is killed or interrupted at any moment and goes on ends as one that never stopped, to the bit."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exact import all_of
from PIL import Image
from samples import Noisy
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import torchkeep as tk
from torchkeep.folder import RunFolder
from torchkeep.watch.reading import RunRecord
from torchkeep.watch.records import next_attempt

X = torch.randn(45, 6, generator=torch.Generator().manual_seed(1))
Y = (X[:, :3].sum(1) > X[:, 3:].sum(1)).long()
VALID = TensorDataset(X[:20], Y[:20])


# --- Ctrl-C at every step, within this process


class Interrupting:
    """Sends this process a real Ctrl-C from within a training forward: the ``number``-th one, counted from 1."""

    def __init__(self, number: int | None):
        self.number, self.calls = number, 0

    def __call__(self, module: nn.Module, *_: Any) -> None:
        self.calls += module.training
        if module.training and self.calls == self.number:
            os.kill(os.getpid(), signal.SIGINT)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 2))


class Gan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 6))
        self.critic = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, real: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        fake = self.generator(noise)
        return fake, F.softplus(-self.critic(real)).mean() + F.softplus(self.critic(fake.detach())).mean()


def gan_step(model: Gan, batch: dict[str, Tensor], context: Any) -> dict[str, Tensor]:
    fake, critic = model(batch["input"], torch.randn(len(batch["input"]), 2))
    context.backward(critic, "critic")
    generator = F.softplus(-model.critic(fake)).mean()
    context.backward(generator, "generator")
    return {"loss": critic + generator, "critic": critic}


def gan_optimizers(model: Gan) -> dict[str, torch.optim.Optimizer]:
    return {
        "critic": torch.optim.AdamW(model.critic.parameters(), lr=1e-2),
        "generator": torch.optim.SGD(model.generator.parameters(), lr=1e-2, momentum=0.9),
    }


def chained(optimizer: torch.optim.Optimizer) -> Any:
    rates = torch.optim.lr_scheduler
    warm, down = rates.LinearLR(optimizer, 0.1, total_iters=2), rates.CosineAnnealingLR(optimizer, 6)
    return rates.SequentialLR(optimizer, [warm, down], [2])


def plateau(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


DATA = TensorDataset(X, Y)
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "plain": (net, {"schedule": "one_cycle", "settings": {"train": {"clip_norm": 0.5}}}),
    "average": (net, {"settings": {"train": {"accumulate": 2, "ema": 0.9}}, "early_stopping": {"patience": 1}}),
    "scaler": (net, {"settings": {"train": {"precision": "fp16", "clip_norm": 1.0}}}),
    "two optimisers": (Gan, {"step": gan_step, "optimizer": gan_optimizers, "train": tk.Arrays(input=X)}),
    "plateau": (net, {"optimizer": sgd, "schedule": plateau}),
    "scheduler": (net, {"optimizer": sgd, "schedule": chained}),
    "metrics": (net, {"metrics": ["accuracy", "f1"], "settings": {"train": {"train_metrics": True}}}),
    "draws": (lambda: nn.Linear(4, 3), {"train": tk.Foreign(Noisy(size=45)), "valid": Noisy(size=20)}),
}


def fit(case: str, folder: Path, stop_at: int | None = None) -> tuple[tk.Run, int]:
    """The run, and how many forwards were trained. Two epochs of three batches; log points within the epochs."""
    make, given = CASES[case]
    torch.manual_seed(0)
    model, watch = make(), Interrupting(stop_at)
    if case == "draws":
        model = nn.Sequential(nn.Dropout(0.1), model).double()
    model.register_forward_pre_hook(watch)
    chosen = {"train": DATA, "valid": None if case == "two optimisers" else VALID, "epochs": 2, "batch_size": 15}
    chosen |= {"checkpoint": {"every": 4}, "monitor": {"views": [], "log_every": 2}, "metrics": ["accuracy"]}
    chosen |= given
    settings = {**chosen.pop("settings", {})}
    settings["train"] = {"threads": 1, **settings.get("train", {})}
    random.seed(5), np.random.seed(5)  # a program begins anew; what it then draws is not what the run goes on with
    run = tk.fit(model, run_dir=folder, resume="auto", preflight="off", quiet=True, settings=settings, **chosen)
    return run, watch.calls


@pytest.mark.parametrize("case", CASES)
def test_a_run_interrupted_at_every_step_ends_the_same(case: str, tmp_path: Path) -> None:
    run, forwards = fit(case, tmp_path / "whole")
    wanted, sha256 = all_of(run.dir), run.sha256()
    assert forwards == 6
    for number in range(1, forwards + 1):
        folder = tmp_path / f"stopped-{number}"
        with pytest.raises(tk.Interrupted, match="the state is saved"):
            fit(case, folder, number)
        assert RunFolder(folder).status() == "interrupted"
        resumed, rest = fit(case, folder)
        assert number + rest in (forwards, forwards - 1)  # of two micro-batches the second is trained on too
        assert resumed.dir == folder
        assert resumed.sha256() == sha256
        assert all_of(folder) == wanted
        assert resumed.metrics == run.metrics
        assert resumed.best == run.best


def test_a_run_interrupted_again_and_again_ends_the_same(tmp_path: Path) -> None:
    wanted = all_of(fit("average", tmp_path / "whole")[0].dir)
    for _ in range(3):
        with pytest.raises(tk.Interrupted):
            fit("average", tmp_path / "often", 1)
    assert all_of(fit("average", tmp_path / "often")[0].dir) == wanted
    assert next_attempt(tmp_path / "often" / "records.jsonl") == 4
    again, forwards = fit("average", tmp_path / "often")  # nothing is left to do
    assert forwards == 0
    assert all_of(again.dir) == wanted


@pytest.mark.parametrize("lost", ["newest", "all"])
def test_a_run_whose_checkpoints_were_lost_ends_the_same(lost: str, tmp_path: Path) -> None:
    """The newest is damaged: the one before it is taken. None is there, as after a kill before the first: from 0."""
    wanted = all_of(fit("plain", tmp_path / "whole")[0].dir)
    folder = tmp_path / "stopped"
    with pytest.raises(tk.Interrupted):
        fit("plain", folder, 5)
    newest = folder / "checkpoints" / "step-00000005" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    if lost == "all":
        shutil.rmtree(folder / "checkpoints")
    _, forwards = fit("plain", folder)
    assert forwards == {"newest": 2, "all": 6}[lost]
    assert all_of(folder) == wanted


def stopping_at(step: int, folder: Path, stop: bool) -> tk.Run:
    model = net()
    model.register_forward_pre_hook(Interrupting(step if stop else None))
    settings = {"train": {"threads": 1, "max_steps": 4}}
    return tk.fit(model, DATA, VALID, epochs=5, batch_size=15, run_dir=folder, resume="auto", quiet=True,
                  settings=settings, monitor={"views": [], "log_every": 1}, checkpoint={"every": 2})  # fmt: skip


def test_a_run_interrupted_at_the_last_of_its_steps_is_still_evaluated(tmp_path: Path) -> None:
    wanted = all_of(stopping_at(4, tmp_path / "whole", False).dir)
    with pytest.raises(tk.Interrupted):
        stopping_at(4, tmp_path / "stopped", True)
    assert all_of(stopping_at(4, tmp_path / "stopped", False).dir) == wanted


def test_what_is_logged_now_and_then_is_the_same_after_a_resume(tmp_path: Path) -> None:
    """A key that a step logs at every third step only, beside one that it always logs."""

    def seldom(model: nn.Module, batch: dict[str, Tensor], context: Any) -> dict[str, Any]:
        loss = F.cross_entropy(model(batch["input"]), batch["target"])
        return {"loss": loss, "always": 1.0, **({"seldom": loss} if context.step % 3 == 1 else {})}

    def run(name: str, stop_at: int | None) -> tk.Run:
        model = net()
        model.register_forward_pre_hook(Interrupting(stop_at))
        return tk.fit(model, DATA, epochs=2, batch_size=15, step=seldom, run_dir=tmp_path / name, quiet=True,
                      settings={"train": {"threads": 1}}, monitor={"views": [], "log_every": 3},
                      resume="auto")  # fmt: skip

    wanted = all_of(run("whole", None).dir)
    for number in (1, 2):
        with pytest.raises(tk.Interrupted):
            run(str(number), number)
        assert all_of(run(str(number), None).dir) == wanted


# --- kill -9, in processes of their own

MODEL = """
import time, torch
from torch import nn

class Slow(nn.Module):
    def __init__(self, inputs, classes):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3),
                                  nn.Linear(16, classes))

    def forward(self, input):
        time.sleep(0.004)  # a step takes long enough to be killed in
        return self.body(input)

def build(num_classes):
    return Slow(3 * 12 * 12, num_classes)
"""

PROGRAM = """
import sys, torch, torchkeep as tk
from model import Slow

class Noisy(torch.utils.data.Dataset):
    def __init__(self, size):
        self.x = torch.randn(size, 6, generator=torch.Generator().manual_seed(size))
    def __len__(self):
        return len(self.x)
    def __getitem__(self, index):
        return self.x[index] + 0.1 * torch.randn(6), int(self.x[index].sum() > 0)

if __name__ == "__main__":
    torch.manual_seed(3)
    model = Slow(6, 2)
    tk.fit(model, Noisy(90), Noisy(40), metrics=["accuracy"], epochs=12, batch_size=5, learning_rate=3e-2,
           optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=3e-2),
           schedule=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 3e-2, total_steps=108),
           run_dir=sys.argv[1], resume="auto", quiet=True, workers=0, checkpoint={"every": 5},
           early_stopping={"patience": 3, "metric": "valid/loss"}, monitor={"views": [], "log_every": 1},
           settings={"train": {"threads": 1, "accumulate": 2, "ema": 0.9, "clip_norm": 1.0}})
""".replace("learning_rate=3e-2,\n           ", "\n           ")

RECIPE = """
seed = 4
[data]
train = "images"
valid_fraction = 0.25
image_size = 12
augment = ["random_resized_crop", "horizontal_flip", "random_rotation"]
batch_size = 5
workers = 2
[model]
name = "model.py:build"
[optimizer]
learning_rate = 1e-2
schedule = "one_cycle"
[train]
epochs = 12
metrics = ["accuracy"]
threads = 1
accumulate = 2
ema = 0.9
clip_norm = 1.0
[checkpoint]
every = 5
metric = "valid/loss"
[early_stopping]
patience = 3
metric = "valid/accuracy"
[monitor]
views = []
log_every = 1
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("killed")
    (place / "model.py").write_text(textwrap.dedent(MODEL), encoding="utf-8")
    (place / "program.py").write_text(textwrap.dedent(PROGRAM), encoding="utf-8")
    (place / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    rng = np.random.default_rng(0)
    for number in range(110):
        folder = place / "images" / ("dark", "light")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 200, (14, 16, 3)) + 40 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return place


def start(command: Sequence[str], place: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(place / "state")}
    return subprocess.Popen([sys.executable, *command], cwd=place, env=environment)


def finish(command: Sequence[str], place: Path) -> None:
    assert start(command, place).wait(timeout=120) == 0


def kill_at(command: Sequence[str], place: Path, run: Path, step: int) -> None:
    """Kill -9 within the 20 ms after the checkpoint of ``step``, or of a later one, was seen."""
    process = start(command, place)
    try:
        while max((int(path.name[5:]) for path in run.glob("checkpoints/step-*")), default=-1) < step:
            assert process.poll() is None, "the run ended before it was killed"
            time.sleep(0.001)
        time.sleep(random.random() * 0.02)
    finally:
        process.kill()
        process.wait()
    assert RunFolder(run).status() == "killed"


@pytest.mark.parametrize("road", ["recipe", "objects"])
def test_a_killed_run_goes_on_to_the_same_end(road: str, workplace: Path) -> None:
    def begin(name: str) -> list[str]:
        if road == "objects":
            return ["program.py", name]
        return ["-m", "torchkeep", "train", "recipe.toml", "--run-dir", name, "--quiet"]

    def go_on(name: str) -> list[str]:
        return begin(name) if road == "objects" else ["-m", "torchkeep", "resume", name, "--quiet"]

    whole, killed = f"{road}-whole", f"{road}-killed"
    reference = start(begin(whole), workplace)
    kill_at(begin(killed), workplace, workplace / killed, 0)  # nothing is saved yet but the beginning
    kill_at(go_on(killed), workplace, workplace / killed, random.randrange(5, 30, 5))
    finish(go_on(killed), workplace)
    assert reference.wait(timeout=120) == 0
    wanted = all_of(workplace / whole)
    assert wanted[3] == "stopped early"
    assert all_of(workplace / killed) == wanted
    assert next_attempt(workplace / killed / "records.jsonl") == 3


def test_what_is_set_on_a_resume_holds_and_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    rows = "\n".join(f"{i % 7},{i % 5},{'ab'[i % 2]}" for i in range(40))
    (tmp_path / "rows.csv").write_text(f"x,y,kind\n{rows}\n")
    recipe = {
        "data": {"train": "rows.csv", "target": "kind", "batch_size": 20},
        "model": {"name": "mlp"},
        "train": {"epochs": 1, "threads": 1},
        "optimizer": {"learning_rate": 0.01, "weight_decay": 0.1},
        "monitor": {"views": []},
    }
    run = tk.train(recipe, quiet=True)
    tk.resume(run.dir, set=["train.epochs=2", "optimizer.learning_rate=0.5", "optimizer.weight_decay=0.2"], quiet=True)
    again = tk.resume(run.dir, set=["train.epochs=3"], quiet=True)
    rates = RunRecord(run.dir / "records.jsonl").scalars(["train/learning_rate"])["value"].to_pylist()
    assert rates == [0.01, 0.5, 0.5]
    saved = tk.Checkpoints(run.dir / "checkpoints")
    groups = saved.load(saved.latest())["optimizer"]["optimizers"]["main"]["param_groups"]
    assert groups[0]["weight_decay"] == 0.2
    assert again.status == "finished"


class Scaled(nn.Module):
    """A loss with a parameter of its own, as metric learning has them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output * self.scale, target)


def test_a_loss_that_learns_goes_on_where_it_was(tmp_path: Path) -> None:
    def run(name: str, stop_at: int | None) -> Tensor:
        model, loss = net(), Scaled()
        model.register_forward_pre_hook(Interrupting(stop_at))
        optimizer = torch.optim.AdamW([*model.parameters(), *loss.parameters()], lr=0.1)
        tk.fit(model, DATA, loss=loss, optimizer=optimizer, epochs=2, batch_size=15, run_dir=tmp_path / name,
               settings={"train": {"threads": 1}}, monitor={"views": []}, resume="auto", quiet=True)  # fmt: skip
        return loss.scale.detach()

    wanted = run("whole", None)
    with pytest.raises(tk.Interrupted):
        run("stopped", 3)
    assert torch.equal(run("stopped", None), wanted)


def test_parameters_that_no_checkpoint_would_hold_are_refused(tmp_path: Path) -> None:
    model, lost = net(), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([*model.parameters(), lost])
    with pytest.raises(tk.TorchkeepError, match="no checkpoint would hold"):
        tk.fit(model, DATA, loss=lambda output, target: F.cross_entropy(output * lost, target), optimizer=optimizer,
               epochs=1, run_dir=tmp_path / "run", quiet=True)  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_another_accumulation_is_refused_and_another_learning_rate_goes_apart(tmp_path: Path) -> None:
    def run(stop_at: int | None, accumulate: int = 1, learning_rate: float = 0.01) -> tk.Run:
        model = net()
        model.register_forward_pre_hook(Interrupting(stop_at))
        return tk.fit(model, DATA, epochs=3, batch_size=15, run_dir=tmp_path / "run", learning_rate=learning_rate,
                      checkpoint={"every": 2}, settings={"train": {"threads": 1, "accumulate": accumulate}},
                      resume="auto", preflight="off", quiet=True)  # fmt: skip

    with pytest.raises(tk.Interrupted):
        run(5)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000005")  # as after a kill between two saves
    with pytest.raises(tk.TorchkeepError, match="another number of batches"):
        run(None, accumulate=2)
    ended = run(None, learning_rate=0.02)
    assert (tmp_path / "run" / "tensorboard" / "attempt-1").is_dir()
    assert ended.status == "finished"
