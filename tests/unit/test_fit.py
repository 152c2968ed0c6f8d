"""tk.fit with a program's own objects: models, datasets, losses, optimisers, schedules, steps, metrics."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import torchkeep as tk
from torchkeep.errors import ModelError, SettingsError
from torchkeep.watch.reading import RunRecord
from torchkeep.watch.records import read_records

Fit = Callable[..., tk.Run]

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
Y = (X[:, :3].sum(1) > X[:, 3:].sum(1)).long() + (X[:, 0] > 1).long()
NUM_CLASSES = 3


@pytest.fixture
def fit(tmp_path: Path) -> Fit:
    """tk.fit in a folder of its own, quiet, without views, four batches an epoch."""

    def run(model: nn.Module, train: Any = None, *arguments: Any, **given: Any) -> tk.Run:
        settings = copy.deepcopy(given.pop("settings", {}))
        settings.setdefault("train", {}).setdefault("threads", 1)
        monitor = {"views": [], "log_every": 1}
        chosen = {"batch_size": 10, "epochs": 2, "quiet": True, "run_dir": tmp_path / "run", "monitor": monitor}
        data = TensorDataset(X, Y) if train is None else train
        return tk.fit(model, data, *arguments, settings=settings, **{**chosen, **given})

    return run


def net(seed: int = 0, out: int = NUM_CLASSES, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, out))


def losses(run: tk.Run, tag: str = "train/loss") -> list[float]:
    return RunRecord(run.dir / "records.jsonl").scalars([tag])["value"].to_pylist()


def rates(run: tk.Run) -> list[float]:
    return losses(run, "train/learning_rate")


def decisions(run: tk.Run) -> dict[str, Any]:
    return {row["name"]: row["value"] for row in json.loads((run.dir / "run.json").read_text())["decisions"]}


def nothing_made(tmp_path: Path) -> bool:
    return not list(tmp_path.iterdir())


# --- datasets


class Dicts(Dataset[Any]):
    """Samples with names."""

    def __init__(self, x: Tensor = X, y: Tensor = Y, names: tuple[str, str] = ("input", "label")):
        self.x, self.y, self.names = x, y, names

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {self.names[0]: self.x[index], self.names[1]: int(self.y[index])}


@pytest.mark.parametrize("form", ["tensors", "tuples", "dicts", "arrays", "columns"])
def test_every_form_of_the_same_data_trains_to_the_same_parameters(fit: Fit, form: str, tmp_path: Path) -> None:
    data = {
        "tensors": TensorDataset(X, Y),
        "tuples": [(X[i], int(Y[i])) for i in range(40)],
        "dicts": Dicts(),
        "arrays": tk.Arrays(input=X.numpy(), label=Y.numpy()),
        "columns": tk.Foreign([(X[i], int(Y[i])) for i in range(40)], names=("vector", "label")),
    }[form]
    run = fit(net(), data, data, metrics=["accuracy"], learning_rate=1e-2)
    wanted = fit(net(), metrics=["accuracy"], learning_rate=1e-2, run_dir=tmp_path / "wanted")
    assert run.sha256() == wanted.sha256()
    assert set(run.metrics) == {"train/loss", "valid/loss", "valid/accuracy"}
    assert decisions(run)["loss"] == "cross_entropy"


def test_a_seed_gives_the_same_bits_and_another_seed_others(fit: Fit, tmp_path: Path) -> None:
    def sha(name: str, seed: int) -> str:
        return fit(net(dropout=0.5), seed=seed, run_dir=tmp_path / name).sha256()

    assert sha("one", 3) == sha("two", 3) != sha("three", 4)


def test_ragged_sequences_through_a_collate(fit: Fit) -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 3, padding_idx=0)

        def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
            return self.table(tokens).sum(1) / lengths[:, None]

    rows = [(torch.randint(1, 9, (1 + i % 5,), generator=torch.Generator().manual_seed(i)), i % 3) for i in range(20)]

    def pad(samples: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
        tokens = nn.utils.rnn.pad_sequence([sample[0] for sample in samples], batch_first=True)
        lengths = torch.tensor([len(sample[0]) for sample in samples])
        return {"tokens": tokens, "lengths": lengths, "label": torch.tensor([sample[1] for sample in samples])}

    run = fit(Sums(), rows, rows, collate=pad, epochs=4, learning_rate=0.1, metrics=["accuracy"])
    assert run.metrics["valid/loss"] < losses(run)[0]
    tuples = fit(
        net(), [(X[i], int(Y[i])) for i in range(40)],
        collate=lambda s: (torch.stack([x for x, _ in s]), torch.tensor([y for _, y in s])),
    )  # fmt: skip
    assert decisions(tuples)["inputs"] == "input=input"


# --- how a batch meets the model


class TwoInputs(nn.Module):
    """Takes two vectors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(2, NUM_CLASSES), nn.Linear(4, NUM_CLASSES)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.a(left) + self.b(right)


class OneDict(TwoInputs):
    def forward(self, features: Mapping[str, Tensor]) -> Tensor:  # type: ignore[override]
        return self.a(features["left"]) + self.b(features["right"])


class Keywords(TwoInputs):
    def forward(self, **features: Tensor) -> Tensor:  # type: ignore[override]
        return self.a(features["left"]) + self.b(features["right"])


class OtherNames(TwoInputs):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return self.a(x) + self.b(y)


TWO = tk.Arrays(left=X[:, :2], right=X[:, 2:], label=Y)


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (TwoInputs, None),
        (TwoInputs, ["left", "right"]),
        (OneDict, None),
        (Keywords, None),
        (OtherNames, ["left", "right"]),
        (OtherNames, lambda batch: (batch["left"], batch["right"])),
        (OtherNames, lambda batch: ((batch["left"],), {"y": batch["right"]})),
        (OneDict, lambda batch: ((dict(batch),), {})),
        (TwoInputs, lambda batch: {"left": batch["left"], "right": batch["right"]}),
    ],
)
def test_models_of_several_inputs(fit: Fit, model: type[TwoInputs], inputs: Any, tmp_path: Path) -> None:
    run = fit(model(), TWO, inputs=inputs, targets="label")
    wanted = fit(TwoInputs(), TWO, run_dir=tmp_path / "wanted")
    assert run.sha256() == wanted.sha256()


def test_inputs_and_targets_by_name(fit: Fit) -> None:
    data = tk.Arrays(first=X, second=torch.zeros(40, 9), truth=Y, other=torch.zeros(40))
    assert fit(net(), data, inputs="first", targets="truth", loss="cross_entropy").metrics["train/loss"] < 1.3

    class TwoTruths(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net(out=4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            out = self.body(x)
            return out[:, :3], out[:, 3]

    def both(output: tuple[Tensor, Tensor], target: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(output[0], target["truth"]) + F.mse_loss(output[1], target["other"])

    fit(TwoTruths(), data, inputs="first", targets=["truth", "other"], loss=both)


@pytest.mark.parametrize("name", ["input", "x"])
def test_an_autoencoder_has_its_input_for_a_target(fit: Fit, name: str) -> None:
    class Auto(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net(out=6)

    Auto.forward = {  # type: ignore[assignment]
        "input": lambda self, input: self.body(input), "x": lambda self, x: self.body(x),
    }[name]  # fmt: skip
    run = fit(Auto(), tk.Arrays(input=X), tk.Arrays(input=X), targets="input", metrics=["mean_absolute_error"])
    assert decisions(run)["loss"] == "mse"
    assert set(run.best.metrics) >= {"valid/loss", "valid/mean_absolute_error"}


@dataclass
class Answer:
    loss: Tensor | None
    logits: Tensor


class OwnLoss(nn.Module):
    """Makes its own loss where it is given labels, as models of transformers do."""

    def __init__(self, form: Callable[[Tensor | None, Tensor], Any] = Answer):
        super().__init__()
        self.body, self.form = net(), form

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.body(inputs)
        return self.form(F.cross_entropy(logits, labels) if labels is not None else None, logits)


@pytest.mark.parametrize("key", ["label", "labels"])
@pytest.mark.parametrize("form", [Answer, lambda loss, logits: {"loss": loss, "logits": logits}])
def test_a_model_that_gives_its_own_loss(fit: Fit, form: Any, key: str, tmp_path: Path) -> None:
    data = tk.Arrays(**{"inputs": X, key: Y})
    run = fit(OwnLoss(form), data, data, metrics=["accuracy"])
    assert decisions(run)["loss"] == "output.loss"
    assert run.metrics["valid/accuracy"] > 0
    by_name = fit(OwnLoss(form), data, loss="cross_entropy", run_dir=tmp_path / "other")
    assert by_name.sha256() == run.sha256()


def test_a_model_that_cannot_be_given_its_labels_is_trained_on_its_logits(fit: Fit) -> None:
    run = fit(OwnLoss(), TensorDataset(X, Y), metrics=["accuracy"])
    assert decisions(run)["loss"] == "cross_entropy"


def test_a_transformers_model(fit: Fit) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    tokens = torch.randint(1, 30, (24, 8), generator=torch.Generator().manual_seed(0))
    data = tk.Arrays(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens[:, 0] % 3)
    run = fit(model, data, data, metrics=["accuracy"], epochs=3, batch_size=8, learning_rate=3e-3)
    assert decisions(run)["loss"] == "output.loss"
    assert "labels=labels" in decisions(run)["inputs"]
    assert run.metrics["train/loss"] < losses(run)[0]
    assert run.model()(tokens[:2]).logits.shape == (2, 3)
    assert len(list(run.predict(data))) == 24


# --- losses


def test_an_own_loss_as_callable_and_as_module(fit: Fit, tmp_path: Path) -> None:
    named = fit(net(), loss="cross_entropy")
    for number, loss in enumerate([F.cross_entropy, nn.CrossEntropyLoss(), lambda o, t: F.cross_entropy(o, t)]):
        assert fit(net(), loss=loss, run_dir=tmp_path / f"own{number}").sha256() == named.sha256()


def test_a_loss_of_one_number_in_a_vector(fit: Fit) -> None:
    run = fit(net(), loss=lambda output, target: F.cross_entropy(output, target).reshape(1))
    assert all(math.isfinite(value) for value in losses(run))


@pytest.mark.parametrize(
    ("model", "given", "says"),
    [
        (net(out=2), {}, "does not fit the classes"),
        (nn.Linear(5, 3), {}, "cannot take this batch"),
        (net(), {"loss": nn.L1Loss(reduction="none")}, "loss cannot take this output"),
        (net(), {"loss": lambda output, target: F.mse_loss(output, target.float().reshape(-1, 2))}, "loss cannot take"),
        (net(), {"loss": "mse"}, "different shapes"),
        (net(), {"loss": "crossentropy"}, "a value cannot be used"),
        (net(), {"metrics": ["acuracy"]}, "no such metric"),
        (net(), {"inputs": "image"}, "no such key"),
        (net(), {"targets": "labels"}, "no such key"),
        (net(), {"optimizer": "adam"}, "no such optimiser"),
        (net(), {"optimizer": lambda model: 5}, "gives no optimiser"),
        (net(), {"settings": {"train": {"epoch": 3}}}, "unknown key"),
        (net(), {"checkpoint": {"metric": "valid/f1"}}, "chosen on a validation split"),
        (net(), {"early_stopping": {"patience": 1}}, "watches a validation split"),
        (net(), {"settings": {"train": {"class_weights": [1.0, 2.0]}}}, "one weight for each class"),
        (net(), {"optimizer": torch.optim.SGD(net().parameters(), 0.1), "learning_rate": 0.1}, "given twice"),
    ],
)
def test_what_does_not_fit_is_said_before_a_folder_is_made(
    fit: Fit, tmp_path: Path, model: nn.Module, given: dict[str, Any], says: str
) -> None:
    with pytest.raises((ModelError, SettingsError), match=says):
        fit(model, **given)
    assert nothing_made(tmp_path)


def test_class_weights_and_label_smoothing_are_torchs(fit: Fit) -> None:
    weights = [1.0, 2.0, 0.5]
    settings = {"train": {"class_weights": weights, "label_smoothing": 0.1, "max_steps": 1}}
    model = net()
    with torch.no_grad():
        wanted = F.cross_entropy(model(X), Y, torch.tensor(weights), label_smoothing=0.1)
    run = fit(model, settings=settings, batch_size=40, learning_rate=1e-9)
    assert losses(run) == pytest.approx([float(wanted)], rel=1e-5)


# --- optimisers and schedules


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def test_an_optimiser_as_object_and_as_function(fit: Fit, tmp_path: Path) -> None:
    model = net()
    run = fit(model, optimizer=sgd(model))
    assert rates(run) == [0.1] * 8
    again = fit(net(), optimizer=sgd, run_dir=tmp_path / "function")
    assert again.sha256() == run.sha256()
    by_hand = net()
    optimizer, order = sgd(by_hand), tk.Loader(TensorDataset(X, Y), 10, shuffle=True)
    for _ in range(2):
        for batch in order:
            optimizer.zero_grad()
            F.cross_entropy(by_hand(batch["input"]), batch["target"]).backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(by_hand.parameters(), model.parameters(), strict=True))


def two_optimizers(model: nn.Sequential) -> dict[str, torch.optim.Optimizer]:
    return {
        "body": torch.optim.SGD(model[0].parameters(), lr=0.1),
        "head": torch.optim.AdamW(model[3].parameters(), lr=0.01),
    }


def test_two_optimisers_are_clipped_together(fit: Fit) -> None:
    model = net()
    run = fit(model, optimizer=two_optimizers(model), settings={"train": {"clip_norm": 1e-3}})
    assert losses(run, "train/learning_rate/body") == [0.1] * 8
    assert losses(run, "train/learning_rate/head") == [0.01] * 8
    model = net()
    batch = tk.Loader(TensorDataset(X, Y), 10, shuffle=True).peek()
    F.cross_entropy(model(batch["input"]), batch["target"]).backward()
    wanted = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    assert losses(run, "train/gradient_norm")[0] == pytest.approx(float(wanted), rel=1e-5)


def test_clipping_bounds_the_update(fit: Fit) -> None:
    model = net()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    fit(model, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=1.0), epochs=1,
        settings={"train": {"clip_norm": 1e-2, "max_steps": 1}})  # fmt: skip
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert float((after - before).norm()) == pytest.approx(1e-2, rel=1e-3)


def curve(make: Callable[[torch.optim.Optimizer], Any], every: int = 1) -> list[float]:
    """torch's own rates over 8 steps, the scheduler advanced after each step or each 4."""
    optimizer = torch.optim.SGD(net().parameters(), lr=0.1)
    scheduler, found = make(optimizer), []
    for step in range(1, 9):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step % every == 0:
            scheduler.step()
    return found


SCHEDULERS = torch.optim.lr_scheduler


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("one_cycle", lambda o: SCHEDULERS.OneCycleLR(o, 0.1, total_steps=8)),
        ("linear", lambda o: SCHEDULERS.LinearLR(o, 1.0, 0.0, total_iters=8)),
        ("cosine", lambda o: SCHEDULERS.CosineAnnealingLR(o, 8)),
        ("constant", lambda o: SCHEDULERS.ConstantLR(o, 1.0)),
    ],
)
def test_schedules_by_name_are_torchs(fit: Fit, name: str, make: Any) -> None:
    assert rates(fit(net(), schedule=name, learning_rate=0.1)) == pytest.approx(curve(make), rel=1e-9, abs=1e-12)


def test_warm_up_rises_in_even_steps(fit: Fit, tmp_path: Path) -> None:
    run = fit(net(), learning_rate=0.1, settings={"optimizer": {"warmup": 3, "schedule": "linear"}})
    assert rates(run) == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.08, 0.06, 0.04, 0.02])
    share = fit(net(), learning_rate=0.1, settings={"optimizer": {"warmup": 0.25}}, run_dir=tmp_path / "share")
    assert rates(share) == pytest.approx([0.1 / 3, 0.2 / 3, *[0.1] * 6])


@pytest.mark.parametrize("every", ["step", "epoch"])
@pytest.mark.parametrize(
    "make",
    [
        lambda o: SCHEDULERS.StepLR(o, 1, gamma=0.5),
        lambda o: SCHEDULERS.OneCycleLR(o, 0.1, total_steps=10),
        lambda o: SCHEDULERS.LambdaLR(o, lambda step: 1 / (1 + step)),
        lambda o: SCHEDULERS.SequentialLR(
            o, [SCHEDULERS.LinearLR(o, 0.1, total_iters=2), SCHEDULERS.CosineAnnealingLR(o, 6)], [2]
        ),
    ],
)
def test_a_scheduler_as_object_and_as_function(fit: Fit, make: Any, every: Any, tmp_path: Path) -> None:
    wanted = curve(make, 1 if every == "step" else 4)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = fit(model, optimizer=optimizer, schedule=make(optimizer), schedule_every=every)
    assert rates(given) == pytest.approx(wanted)
    made = fit(net(), optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1), schedule=lambda o: make(o),
               schedule_every=every, run_dir=tmp_path / "made")  # fmt: skip
    assert rates(made) == pytest.approx(wanted)


def test_a_schedule_as_a_function_of_step_and_total(fit: Fit) -> None:
    run = fit(net(), learning_rate=0.1, schedule=lambda step, total: 1 - step / total)
    assert rates(run) == pytest.approx([0.1 * (1 - step / 8) for step in range(8)])


def test_a_plateau_watches_the_evaluations(fit: Fit) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plateau = SCHEDULERS.ReduceLROnPlateau(optimizer, patience=0, threshold=1e9, threshold_mode="abs")
    run = fit(model, None, TensorDataset(X, Y), optimizer=optimizer, schedule=plateau, epochs=3)
    assert rates(run) == pytest.approx([0.1] * 8 + [0.01] * 4)


def test_a_scheduler_of_another_optimiser_is_refused(fit: Fit, tmp_path: Path) -> None:
    model = net()
    other = SCHEDULERS.StepLR(torch.optim.SGD(model.parameters(), lr=0.1), 1)
    with pytest.raises(SettingsError, match="steers another optimiser"):
        fit(model, schedule=other)
    assert nothing_made(tmp_path)


# --- accumulation, precision, averages


def grown(model: nn.Module, **given: Any) -> dict[str, Tensor]:
    given["fit"](
        model, given["data"], batch_size=given["size"], epochs=1, loss=given.get("loss"),
        collate=given.get("collate"), run_dir=given["run_dir"], step=given.get("step"),
        optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.5),
        settings={"train": {"accumulate": given["accumulate"], **given.get("train", {})}},
    )  # fmt: skip
    return dict(model.state_dict())


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.allclose(one[name], other[name], rtol=1e-9, atol=1e-10) for name in one)


class Tokens(nn.Module):
    """A tiny language model in fp64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(7, 8, dtype=torch.float64), nn.Linear(8, 7, dtype=torch.float64)

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.table(input))


def token_data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 7, (20, 5), generator=generator)
    labels = torch.where(torch.rand(20, 5, generator=generator) < 0.6, tokens.flip(1), -100)
    labels[:9] = -100  # whole micro-batches without a target
    labels[4, 0] = 3
    return [(tokens[i], labels[i]) for i in range(20)]


def double(samples: list[Any]) -> tuple[Tensor, Tensor]:
    return torch.stack([s[0] for s in samples]).double(), torch.as_tensor([s[1] for s in samples])


ROWS = [(X[i], int(Y[i])) for i in range(40)]
SPARSE = [(X[i], -100 if i % 4 else int(Y[i])) for i in range(40)]
NUMBERS = [(X[i], float(X[i, 0])) for i in range(40)]


@pytest.mark.parametrize(
    "case",
    [
        {"data": ROWS},
        {"data": ROWS, "train": {"class_weights": [1.0, 5.0, 0.25], "label_smoothing": 0.2}},
        {"data": ROWS, "train": {"clip_norm": 0.1}},
        {"data": ROWS, "loss": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64))},
        {"data": SPARSE, "loss": "cross_entropy"},
        {"data": NUMBERS, "loss": "mse", "out": 1},
        {"data": ROWS, "step": lambda m, b, c: {"loss": F.cross_entropy(m(b["input"]), b["target"])}},
    ],
    ids=["plain", "weights", "clip", "own weights", "ignored", "mse", "step"],
)
def test_micro_batches_make_the_update_of_the_whole_batch(fit: Fit, case: dict[str, Any], tmp_path: Path) -> None:
    def update(size: int, accumulate: int) -> dict[str, Tensor]:
        # 40 samples: with 6 · 4 the second group has two full batches and one of four
        name = f"{size}-{accumulate}"
        model = net(out=case.get("out", NUM_CLASSES)).double()
        return grown(model, fit=fit, run_dir=tmp_path / name, size=size, accumulate=accumulate, collate=double,
                     **{key: value for key, value in case.items() if key != "out"})  # fmt: skip

    assert close(update(6, 4), update(24, 1))


def test_tokens_without_a_label_count_for_nothing(fit: Fit, tmp_path: Path) -> None:
    whole = grown(Tokens(), fit=fit, data=token_data(), run_dir=tmp_path / "whole", size=12, accumulate=1)
    parts = grown(Tokens(), fit=fit, data=token_data(), run_dir=tmp_path / "parts", size=3, accumulate=4)
    assert close(parts, whole)
    values = [losses(tk_run) for tk_run in map(Records, (tmp_path / "parts", tmp_path / "whole"))]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


@dataclass
class Records:
    dir: Path


def test_the_loss_of_a_split_is_no_matter_of_the_batch_size(fit: Fit, tmp_path: Path) -> None:
    data = token_data()
    values = [
        fit(
            Tokens(), data[9:], data, epochs=1, batch_size=size, learning_rate=1e-12, run_dir=tmp_path / str(size)
        ).metrics
        for size in (3, 20)
    ]
    labels = torch.stack([label for _, label in data])
    with torch.no_grad():
        wanted = F.cross_entropy(Tokens()(torch.stack([x for x, _ in data])).transpose(1, 2), labels)
    assert [row["valid/loss"] for row in values] == pytest.approx([float(wanted)] * 2, rel=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns(fit: Fit, precision: str) -> None:
    settings = {"train": {"precision": precision, "clip_norm": 1.0, "accumulate": 2, "class_weights": [1.0, 1.0, 1.1]}}
    run = fit(net(), epochs=6, learning_rate=3e-2, settings=settings, metrics=["accuracy"])
    assert losses(run)[-1] < 0.7 * losses(run)[0]
    assert run.evaluate(TensorDataset(X, Y))["test/accuracy"] > 0.7
    assert all(p.dtype == torch.float32 for p in run.model().parameters())


class Tied(nn.Module):
    """Two names for one parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.last.weight = self.first.weight
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(torch.tanh(self.first(x))))


def test_equal_weights_from_an_epoch_on_are_averaged_and_evaluated(fit: Fit, tmp_path: Path) -> None:
    ends = [dict(fit(net(), epochs=epochs, run_dir=tmp_path / str(epochs)).model("last").state_dict())
            for epochs in (1, 2, 3)]  # fmt: skip
    run = fit(net(), None, TensorDataset(X, Y), epochs=3, settings={"train": {"swa": 2}}, run_dir=tmp_path / "swa")
    mean = {name: (ends[1][name] + ends[2][name]) / 2 for name in ends[1]}
    found = run.model("last").state_dict()
    assert all(torch.allclose(found[name], mean[name], atol=1e-7) for name in mean)
    assert run.metrics["valid/loss"] == pytest.approx(run.evaluate(TensorDataset(X, Y), which="last")["test/loss"])
    assert not torch.equal(found["0.weight"], ends[2]["0.weight"])


def test_there_is_one_average(fit: Fit) -> None:
    with pytest.raises(SettingsError, match="ema or swa"):
        fit(net(), settings={"train": {"swa": 2, "ema": 0.9}})


def test_the_moving_average_is_what_is_evaluated_and_handed_out(fit: Fit) -> None:
    model = Tied()
    average = {name: value.clone() for name, value in model.state_dict().items()}
    run = fit(model, None, TensorDataset(X, Y), learning_rate=3e-2, settings={"train": {"ema": 0.8}}, epochs=1)
    twin = Tied()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=3e-2)
    for group, decay in ((optimizer.param_groups[0], 0.01),):
        group["params"] = [p for p in twin.parameters() if p.ndim >= 2]
        group["weight_decay"] = decay
    optimizer.add_param_group({"params": [p for p in twin.parameters() if p.ndim < 2], "weight_decay": 0.0})
    for batch in tk.Loader(TensorDataset(X, Y), 10, shuffle=True):
        optimizer.zero_grad()
        F.cross_entropy(twin(batch["input"]), batch["target"]).backward()
        optimizer.step()
        for name, value in twin.state_dict().items():
            average[name].lerp_(value, 0.2)
    given = run.model().state_dict()
    assert all(torch.allclose(given[name], average[name], atol=1e-6) for name in average)
    assert not torch.allclose(model.first.weight, average["first.weight"], atol=1e-4)
    with torch.no_grad():
        logits = run.model()(X)
    assert run.metrics["valid/loss"] == pytest.approx(float(F.cross_entropy(logits, Y)), rel=1e-5)
    assert run.evaluate(TensorDataset(X, Y))["test/loss"] == pytest.approx(run.metrics["valid/loss"], rel=1e-6)


# --- a step of one's own


def test_a_whole_own_step(fit: Fit) -> None:
    seen: list[tuple[int, int, bool]] = []

    def step(model: nn.Module, batch: dict[str, Tensor], context: Any) -> dict[str, Any]:
        seen.append((context.step, context.epoch, context.training))
        noise = torch.randn(batch["input"].shape, generator=context.generator())
        output = model(batch["input"] + 0.01 * noise)
        loss = F.cross_entropy(output, batch["target"])
        return {"loss": loss, "norm": output.norm(), "one": loss.reshape(1), "two": 2.0, "output": output,
                "target": batch["target"]}  # fmt: skip

    run = fit(net(), None, TensorDataset(X, Y), step=step, metrics=["accuracy"], batch_size=20)
    assert seen == [(0, 0, True), (1, 0, True), (2, 1, False), (2, 1, False),
                    (2, 1, True), (3, 1, True), (4, 2, False), (4, 2, False)]  # fmt: skip
    assert losses(run, "train/two") == [2.0] * 4
    assert losses(run, "train/one") == pytest.approx(losses(run))
    assert run.best.metrics["valid/accuracy"] > 0


def test_a_step_without_outputs_has_no_metrics(fit: Fit) -> None:
    torchmetrics = pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    run = fit(
        net(), None, TensorDataset(X, Y), step=lambda m, b, c: F.cross_entropy(m(b["input"]), b["target"]),
        metrics=["accuracy", torchmetrics.F1Score(task="multiclass", num_classes=3)],
        checkpoint={"metric": "valid/loss"},
    )  # fmt: skip
    assert set(run.metrics) == {"train/loss", "valid/loss"}


@pytest.mark.parametrize("answer", [{}, {"los": torch.zeros(())}, 3.0, {"loss": torch.zeros(4)}])
def test_a_step_that_gives_no_loss_is_told_so(fit: Fit, answer: Any) -> None:
    with pytest.raises(ModelError, match="gives its loss"):
        fit(net(), step=lambda model, batch, context: answer)


class Gan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 6))
        self.critic = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


def gan_optimizers(model: Gan) -> dict[str, torch.optim.Optimizer]:
    return {
        "critic": torch.optim.AdamW(model.critic.parameters(), lr=1e-2),
        "generator": torch.optim.AdamW(model.generator.parameters(), lr=1e-2),
    }


def gan_step(model: Gan, batch: dict[str, Tensor], context: Any) -> dict[str, Tensor]:
    real = batch["input"]
    noise = torch.randn(len(real), 2, generator=context.generator("noise"))
    fake = model.generator(noise)
    critic = F.softplus(-model.critic(real)).mean() + F.softplus(model.critic(fake.detach())).mean()
    context.backward(critic, "critic")
    generator = F.softplus(-model.critic(fake)).mean()
    context.backward(generator, "generator")
    return {"loss": critic + generator, "critic": critic, "generator": generator}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_gan_with_two_optimisers(fit: Fit, precision: str) -> None:
    model = Gan()
    settings = {"train": {"precision": precision, "clip_norm": 5.0}}
    run = fit(model, tk.Arrays(input=X), step=gan_step, optimizer=gan_optimizers, settings=settings)
    if precision == "fp16":
        assert len([value for value in losses(run, "train/critic") if math.isfinite(value)]) == 8
        return
    twin, step = Gan(), 0
    optimizers, loader = gan_optimizers(twin), tk.Loader(tk.Arrays(input=X), 10, shuffle=True)

    class Context:
        def generator(self, name: str) -> torch.Generator:
            from torchkeep.chance import ChanceKey, keyed_seed

            return torch.Generator().manual_seed(keyed_seed(ChanceKey(0, step), name))

        def backward(self, loss: Tensor, name: str) -> None:
            optimizers[name].zero_grad()
            loss.backward()
            owned = [p for group in optimizers[name].param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(owned, 5.0)
            optimizers[name].step()

    for _ in range(2):
        for batch in loader:
            gan_step(twin, batch, Context())
            step += 1
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters(), strict=True))


def test_several_optimisers_need_to_be_told_apart(fit: Fit, tmp_path: Path) -> None:
    def silent(model: Gan, batch: dict[str, Tensor], context: Any) -> Tensor:
        return model.critic(batch["input"]).mean()

    def unknown(model: Gan, batch: dict[str, Tensor], context: Any) -> Tensor:
        context.backward(loss := silent(model, batch, context), "discriminator")
        return loss

    with pytest.raises(ModelError, match="which one each loss belongs to"):
        fit(Gan(), tk.Arrays(input=X), step=silent, optimizer=gan_optimizers)
    with pytest.raises(ModelError, match="no such optimiser"):
        fit(Gan(), tk.Arrays(input=X), step=unknown, optimizer=gan_optimizers)
    with pytest.raises(ModelError, match="no batches can be accumulated"):
        fit(Gan(), tk.Arrays(input=X), step=gan_step, optimizer=gan_optimizers,
            settings={"train": {"accumulate": 2}})  # fmt: skip


# --- metrics


def test_torchmetrics_objects_in_a_list_and_in_a_dict(fit: Fit, tmp_path: Path) -> None:
    torchmetrics = pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")

    def make() -> Any:
        return torchmetrics.Accuracy(task="multiclass", num_classes=3)

    data = TensorDataset(X, Y)
    named = fit(net(), data, data, metrics=["accuracy", "f1", "top2"])
    listed = fit(
        net(), data, data, metrics=[make(), torchmetrics.F1Score(task="multiclass", num_classes=3, average="macro")],
        run_dir=tmp_path / "list",
    )  # fmt: skip
    mapped = fit(net(), data, data, metrics={"mine": make(), "named": "f1"}, run_dir=tmp_path / "dict")
    assert set(listed.metrics) == {"train/loss", "valid/loss", "valid/accuracy", "valid/f1_score"}
    assert listed.metrics["valid/accuracy"] == pytest.approx(named.metrics["valid/accuracy"])
    assert listed.metrics["valid/f1_score"] == pytest.approx(named.metrics["valid/f1"])
    assert mapped.metrics["valid/mine"] == pytest.approx(named.metrics["valid/accuracy"])
    assert mapped.metrics["valid/named"] == pytest.approx(named.metrics["valid/f1"])
    with pytest.raises(SettingsError, match="two metrics have one name"):
        fit(net(), data, data, metrics=["accuracy", make()])


def test_train_metrics_are_those_of_the_steps(fit: Fit) -> None:
    run = fit(net(), None, TensorDataset(X, Y), metrics=["accuracy"], settings={"train": {"train_metrics": True}})
    assert len(losses(run, "train/accuracy")) == 2
    assert run.metrics["train/accuracy"] == losses(run, "train/accuracy")[-1]
    model = net()
    right = 0
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.01},
         {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}], lr=1e-3
    )  # fmt: skip
    for batch in tk.Loader(TensorDataset(X, Y), 10, shuffle=True):
        optimizer.zero_grad()
        output = model(batch["input"])
        right += int((output.argmax(1) == batch["target"]).sum())
        F.cross_entropy(output, batch["target"]).backward()
        optimizer.step()
    assert losses(run, "train/accuracy")[0] == pytest.approx(right / 40)


# --- evaluation, best and last, early stopping


class Watchful(nn.Module):
    """Notes its own mode and the random state it was evaluated in, and draws while it is evaluated."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = net(dropout=0.5), nn.BatchNorm1d(3)
        self.modes: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append((self.training, self.norm.training))
        if not self.training:
            torch.rand(3), np.random.rand()
        return self.norm(self.body(x))


def test_evaluation_leaves_the_training_as_it_was(fit: Fit, tmp_path: Path) -> None:
    data = TensorDataset(X, Y)
    model = Watchful()
    quiet = {"views": [], "log_every": 1, "graph": False, "histograms": "off"}  # each takes a forward of its own
    evaluated = fit(model, data, data, test=data, metrics=["accuracy"], monitor=quiet)
    assert evaluated.sha256() == fit(Watchful(), data, run_dir=tmp_path / "alone").sha256()
    assert model.modes == ([(True, True)] * 4 + [(False, False)] * 4) * 2 + [(False, False)] * 4
    assert model.training
    assert model.norm.training


def test_a_part_left_in_eval_mode_stays_there(fit: Fit) -> None:
    model = Watchful()
    model.norm.eval()
    statistics = model.norm.running_mean.clone()
    fit(model, None, TensorDataset(X, Y))
    assert set(model.modes) == {(True, False), (False, False)}
    assert not model.norm.training
    assert torch.equal(model.norm.running_mean, statistics)


def jumping(values: list[float]) -> Callable[..., Any]:
    """A step whose validation loss is given: values[epoch]."""

    def step(model: nn.Module, batch: dict[str, Tensor], context: Any) -> dict[str, Any]:
        loss = F.cross_entropy(model(batch["input"]), batch["target"])
        return {"loss": loss if context.training else torch.tensor(values[context.epoch - 1])}

    return step


def test_early_stopping_ends_at_the_right_epoch(fit: Fit, tmp_path: Path) -> None:
    data = TensorDataset(X, Y)
    valid = [0.9, 0.5, 0.7, 0.6, 0.5, 0.4, 0.3]
    run = fit(net(), data, data, step=jumping(valid), epochs=7, early_stopping={"patience": 3})
    assert losses(run, "valid/loss") == pytest.approx(valid[:5])
    assert (run.best.epoch, run.best.step) == (2, 8)
    end = [row for row in read_records(run.dir / "records.jsonl") if row["kind"] == "run_end"]
    assert end[-1]["reason"] == "stopped early"
    patient = fit(net(), data, data, step=jumping(valid), epochs=7, early_stopping={"patience": 4},
                  run_dir=tmp_path / "patient")  # fmt: skip
    assert len(losses(patient, "valid/loss")) == 7
    assert patient.best.epoch == 7


def test_best_and_last_and_what_is_measured_with_which(fit: Fit) -> None:
    data = TensorDataset(X, Y)
    kept: list[dict[str, Tensor]] = []

    def step(model: nn.Module, batch: dict[str, Tensor], context: Any) -> dict[str, Any]:
        output = model(batch["input"])
        loss = F.cross_entropy(output, batch["target"])
        if context.training:
            return {"loss": loss}
        kept.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"loss": loss if len(kept) > 3 else torch.tensor([0.5, 0.1, 0.8][len(kept) - 1]),
                "output": output, "target": batch["target"]}  # fmt: skip

    model = net()
    run = fit(
        model, data, data, test=data, step=step, epochs=3, batch_size=40, learning_rate=0.3, metrics=["accuracy"],
        checkpoint={"metric": "valid/loss"},
    )  # fmt: skip
    best, last = kept[1], kept[2]
    assert all(torch.equal(kept[3][name], best[name]) for name in best)  # the test split
    assert all(torch.equal(model.state_dict()[name], last[name]) for name in last)
    assert all(torch.equal(run.model().state_dict()[name], best[name]) for name in best)
    assert all(torch.equal(run.model("last").state_dict()[name], last[name]) for name in last)
    assert run.best.epoch == 2
    assert run.best.metrics["valid/loss"] == pytest.approx(0.1)
    assert run.sha256("best") != run.sha256("last") == run.sha256()
    with torch.no_grad():
        wanted = float((run.model()(X).argmax(1) == Y).float().mean())
    assert run.metrics["test/accuracy"] == pytest.approx(wanted)
    measured = run.evaluate()
    assert measured["test/accuracy"] == pytest.approx(wanted)
    assert run.evaluate(data, which="last")["test/loss"] != measured["test/loss"]
    assert all(torch.equal(model.state_dict()[name], last[name]) for name in last)
    assert not run.model().training


def test_predictions_come_in_the_inputs_order(fit: Fit) -> None:
    run = fit(net(), None, TensorDataset(X, Y), learning_rate=3e-2)
    with torch.no_grad():
        probabilities = run.model()(X).softmax(1)
    for inputs in (X, TensorDataset(X, Y), X.numpy()):
        said = list(run.predict(inputs))
        assert [one.input for one in said] == [str(i) for i in range(40)]
        assert [int(one.label or -1) for one in said] == probabilities.argmax(1).tolist()
        assert [one.probability for one in said] == pytest.approx(probabilities.max(1).values.tolist(), rel=1e-5)
    assert next(run.predict(X[:1], which="last")).label == str(int(run.model("last")(X[:1]).argmax()))


def test_a_run_folder_that_exists_is_never_written_again(fit: Fit) -> None:
    first = fit(net())
    stamp = (first.dir / "run.json").read_bytes()
    second = fit(net())
    assert (first.dir.name, second.dir.name) == ("run", "run-2")
    assert (first.dir / "run.json").read_bytes() == stamp
    assert first.status == second.status == "finished"


def test_a_run_cut_off_by_max_steps_is_evaluated_there(fit: Fit) -> None:
    run = fit(net(), None, TensorDataset(X, Y), epochs=9, checkpoint={"every": 2},
              settings={"train": {"max_steps": 6}})  # fmt: skip
    assert RunRecord(run.dir / "records.jsonl").scalars(["valid/loss"])["step"].to_pylist() == [4, 6]
    assert "valid/loss" in run.best.metrics
    saved = tk.Checkpoints(run.dir / "checkpoints").latest()
    assert saved is not None
    assert saved.step == 6
    assert "valid/loss" in saved.metrics


def test_every_verb_is_one_whichever_is_used_first() -> None:
    code = "import torchkeep as tk; tk.fit; assert all(callable(getattr(tk, name)) for name in tk.__all__)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


def test_a_class_that_training_never_saw_is_said_before_a_folder_is_made(fit: Fit, tmp_path: Path) -> None:
    with pytest.raises(tk.TorchkeepError):
        fit(net(), None, TensorDataset(X, Y + 2))
    assert nothing_made(tmp_path)


def test_a_schedule_for_two_optimisers_steers_both_or_is_refused(fit: Fit) -> None:
    model = net()
    try:
        run = fit(model, optimizer=two_optimizers(model), schedule=lambda o: SCHEDULERS.StepLR(o, 1, gamma=0.5))
    except SettingsError:
        return
    assert losses(run, "train/learning_rate/head")[-1] < 0.01


def test_a_plateau_that_wants_less_is_not_given_an_accuracy(fit: Fit) -> None:
    seen: list[float] = []

    class Watched(SCHEDULERS.ReduceLROnPlateau):
        def step(self, metrics: Any, epoch: int | None = None) -> None:
            seen.append(float(metrics))
            super().step(metrics)

    run = fit(net(), None, TensorDataset(X, Y), metrics=["accuracy"], optimizer=sgd, schedule=lambda o: Watched(o))
    assert seen == losses(run, "valid/loss")


class Shifted(TensorDataset):
    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        x, y = super().__getitem__(index)
        return x + 100, y


def test_a_tensor_dataset_that_adds_something_of_its_own_is_not_bypassed() -> None:
    batch = next(iter(tk.Loader(Shifted(X, Y), 4)))
    assert torch.equal(batch["input"], X[:4] + 100)


def test_float64_stays_float64(fit: Fit) -> None:
    run = fit(net().double(), TensorDataset(X.double(), Y))
    assert next(run.model().parameters()).dtype == torch.float64


class Labelled(Dataset[Any]):
    """Nothing says which labels it has but its samples."""

    def __init__(self, bad: int | None = None):
        self.bad = bad

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return X[index % 40], 7 if index == self.bad else index % 3


def test_a_label_out_of_range_is_named_with_its_sample(fit: Fit) -> None:
    with pytest.raises(tk.TorchkeepError, match=r"step \d, samples 57\n  got:      label 7\n  expected: 0 to 2"):
        fit(net(), Labelled(57))
    with pytest.raises(tk.TorchkeepError, match=r"split valid, samples \[33\]\n  got:      label 7"):
        fit(net(), Labelled(), Labelled(33))


def test_a_run_folder_is_called_as_it_was_asked_for(tmp_path: Path) -> None:
    place = tmp_path / "mein Lauf ü"
    for _ in range(2):
        run = tk.fit(net(), Labelled(), epochs=1, run_dir=place, resume=True, quiet=True)
        assert run.dir == place


@pytest.mark.parametrize(
    "slip",
    [
        {"loss": nn.CrossEntropyLoss},
        {"optimizer": torch.optim.SGD},
        {"resume": "yes"},
        {"collate": lambda samples: samples},
        {"collate": lambda samples: [1, 2]},
        {"train": (X, Y)},
    ],
    ids=str,
)
def test_a_slip_is_said_in_the_one_form_before_anything_is_written(slip: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(tk.TorchkeepError):
        tk.fit(net(), **{"train": Labelled(), "run_dir": tmp_path / "run", **slip})
    assert list(tmp_path.iterdir()) == []


def test_sparse_gradients_are_measured_too(fit: Fit) -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.EmbeddingBag(9, 2, sparse=True)

        def forward(self, tokens: Tensor) -> Tensor:
            return torch.as_tensor(self.words(tokens))

    tokens = torch.randint(9, (24, 5), generator=torch.Generator().manual_seed(0))
    data = tk.Arrays(tokens=tokens, label=tokens[:, 0] % 2)
    quiet = {"views": [], "graph": False, "histograms": "off"}
    run = fit(Bag(), data, optimizer=lambda m: torch.optim.SGD(m.parameters(), 0.1), epochs=20, batch_size=8,
              monitor=quiet)  # fmt: skip
    norms = [row["values"]["train/gradient_norm"] for row in tk.read_run(run.dir)
             if "train/gradient_norm" in row.get("values", {})]  # fmt: skip
    assert norms
    assert all(math.isfinite(norm) and norm > 0 for norm in norms)
