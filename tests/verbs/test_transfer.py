"""A pretrained model fitted to new data in one command, on small images and rows."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

import torchkeep as tk
from torchkeep.errors import ModelError

SMALL = ("--set", "data.image_size=8", "--set", "model.args={widths=[4]}", "--set", "monitor.views=[]",
         "--set", "data.workers=0", "--set", "train.threads=1")  # fmt: skip


@pytest.fixture
def pretrained(desk: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A desk with images and a run on them, whose weights another run may begin with."""
    monkeypatch.setenv("TORCHKEEP_CACHE", str(desk.folder / "home" / "cache"))
    desk.write_images()
    assert desk.say("train", "images.toml", "--quiet").code == 0
    return desk


def measured(said: str, name: str) -> float:
    table = said.partition("on the validation split")[2]
    line = next(line for line in table.splitlines() if line.strip().startswith(f"{name} "))
    return float(line.split("accuracy")[1].split(",")[0])


def test_the_best_of_probe_and_tuned_is_kept_and_is_a_run_like_any_other(pretrained: Any) -> None:
    said = pretrained.say("transfer", ".", "--model", "convnet", "--weights", "runs/images", "--run-dir", "runs/new",
                          "--set", "train.epochs=2", *SMALL)  # fmt: skip
    assert said.code == 0, said.err
    assert "cross-validation" in said.out
    assert "all of it, from the probe's head" in said.out
    scores = {name: measured(said.out, name) for name in ("probe", "tuned", "25% tuned", "50% tuned", "75% tuned")}
    run = tk.open_run(pretrained.folder / "runs" / "new")
    assert run.best.metrics["valid/accuracy"] == pytest.approx(max(scores.values()), abs=1e-4)
    found = json.loads(pretrained.say("evaluate", "runs/new", "valid", "--json").out)
    assert found["test/accuracy"] == pytest.approx(max(scores.values()), abs=1e-4)
    assert pretrained.say("predict", "runs/new", "valid/ants/0.png").code == 0
    facts = json.loads((pretrained.folder / "runs" / "new" / "run.json").read_text())
    assert facts["weights"]["source"].endswith("images")
    assert {"probe", "tuning", "weights"} <= {row["name"] for row in facts["decisions"]}


def test_without_tuning_the_rest_stays_as_it_was_loaded(pretrained: Any) -> None:
    said = pretrained.say("transfer", ".", "--model", "convnet", "--weights", "runs/images", "--tune", "no",
                          "--run-dir", "runs/head", "--set", "train.epochs=2", *SMALL)  # fmt: skip
    assert said.code == 0, said.err
    assert "computed once" in said.out
    before, after = (tk.open_run(pretrained.folder / "runs" / name).model().state_dict() for name in ("images", "head"))
    head = next(name for name in reversed(before) if name.endswith("weight")).rpartition(".")[0]
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith(head))


def test_backbones_are_ranked_and_one_that_cannot_be_is_said(pretrained: Any) -> None:
    words = ("backbones", ".", "--models", "convnet,nothing,resnet18", "--weights", "runs/images,,", *SMALL[:2],
             *SMALL[4:])  # fmt: skip
    rows = [json.loads(line) for line in pretrained.say(*words, "--json").out.splitlines()]
    assert {row["name"] for row in rows} == {"convnet", "nothing", "resnet18"}
    held = [row["held_out"] for row in rows if row["held_out"] is not None]
    assert held == sorted(held, reverse=True)
    assert rows[-1]["problem"]
    said = pretrained.say(*words)
    assert said.code == 0
    assert "samples/s" in said.out


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (("nowhere", "--model", "convnet"), "nowhere"),
        ((".", "--model", "nothing"), "model.name"),
        ((".", "--model", "convnet", "--weights", "gone.pth"), "gone.pth"),
        ((".", "--model", "convnet", "--head", "nothing"), "head"),
        ((".", "--model", "convnet", "--set", "data.nothing=1"), "data.nothing"),
    ],
    ids=str,
)
def test_what_cannot_work_is_said_before_anything_is_written(pretrained: Any, words: Any, where: str) -> None:
    said = pretrained.say("transfer", *words, *SMALL[:2], *SMALL[4:])
    assert said.code == 2
    assert where in said.err
    assert "Traceback" not in said.err
    assert pretrained.runs() == ["images"]


class Rows(nn.Module):
    """A trunk and a head of other classes than the data's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.head = nn.Sequential(nn.Linear(6, 16), nn.Tanh()), nn.Linear(16, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.trunk(x))
        return logits


def test_a_model_and_a_dataset_of_ones_own(desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHKEEP_CACHE", str(desk.folder / "home" / "cache"))
    x = torch.randn(120, 6, generator=torch.Generator().manual_seed(1))
    data = tk.Arrays(x=x, label=(x[:, 0] > 0).long())
    model = Rows()
    settings = {"monitor": {"views": []}, "train": {"metrics": ["accuracy"], "threads": 1}}
    run = tk.fine_tune(model, data, epochs=2, settings=settings, run_dir=desk.folder / "mine", quiet=True)
    assert run.best.metrics["valid/accuracy"] > 0.8
    assert model.head.out_features == 2
    assert all(torch.equal(value, run.model().state_dict()[name]) for name, value in model.state_dict().items())


def test_a_head_on_several_vectors_is_no_probe(desk: Any) -> None:
    class Each(Rows):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x[:, None].expand(-1, 3, -1)).mean(1)

    x = torch.randn(40, 6)
    with pytest.raises(ModelError, match="one vector"):
        tk.fine_tune(Each(), tk.Arrays(x=x, label=(x[:, 0] > 0).long()), run_dir=desk.folder / "no", quiet=True)
    assert not (desk.folder / "no").exists()
