"""The graph of a model: what its forward did, whatever it takes and gives, with nothing of it changed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from torchkeep.watch.activity import activities, as_numbers
from torchkeep.watch.graph import graph
from torchkeep.watch.media import MediaStore


def drawn(model: nn.Module, call: Any, folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    facts = graph(model, call).settle(MediaStore(folder))
    nodes = json.loads(MediaStore(folder).read(facts["media"]))["nodes"]
    assert facts["num_nodes"] == len(nodes)
    by_name = {node["name"]: node for node in nodes}
    assert len(by_name) == len(nodes)
    assert all(source in by_name for node in nodes for source in node["inputs"])
    return facts, by_name


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first = nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, times: int = 2, *, extra: Any = None) -> dict[str, Any]:
        for _ in range(int(x.sum() > 0) + times):
            x = self.drop(self.first(self.norm(x))).relu()
        x[0] += 1
        return {"hidden": [x], "logits": x @ x.T}


def test_a_forward_is_followed_through_loops_dicts_and_calls_twice(tmp_path: Path) -> None:
    facts, nodes = drawn(model := Body(), lambda: model(torch.ones(3, 4), 1, extra={"a": 1}), tmp_path)
    assert facts["how"] == "followed", facts["note"]
    assert [name for name in nodes if name.startswith("Body/first/linear")] == [
        "Body/first/linear", "Body/first/linear_1",
    ]  # fmt: skip
    assert nodes["Body/first/linear"]["inputs"] == ["Body/norm/batch_norm", "Body/first/weight", "Body/first/bias"]
    assert nodes["Body/first/weight"]["op"] == "parameter"
    assert nodes["Body/norm/batch_norm_1"]["inputs"][0] == "Body/relu"
    outputs = [node for node in nodes.values() if node["op"] == "output"]
    assert sorted(node["shapes"][0] for node in outputs) == [[3, 3], [3, 4]]


class Writes(nn.Module):
    def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> torch.Tensor:
        room = torch.zeros(2, 4)
        early = room.view(-1)
        room[:, :2].copy_(x.exp())
        room[0] += scale
        other = torch.from_numpy(np.ones(8, np.float32))
        return early.mul_(other).sum() + room.cos()


def test_what_is_written_into_views_comes_out_of_the_others(tmp_path: Path) -> None:
    model, x, scale = Writes(), torch.ones(2, 2), torch.ones(4)
    facts, nodes = drawn(model, lambda: model(x, scale=scale), tmp_path)
    assert facts["how"] == "followed", facts["note"]
    assert nodes["Writes/copy"]["inputs"] == ["Writes/getitem", "Writes/exp"]
    assert nodes["Writes/getitem_1"]["inputs"] == ["Writes/copy"]
    assert nodes["Writes/add"]["inputs"] == ["Writes/getitem_1", "input_1"]
    assert nodes["Writes/mul"]["inputs"] == ["Writes/setitem", "Writes/constant"]
    assert nodes["Writes/cos"]["inputs"] == ["Writes/mul"]
    assert sorted(name for name, node in nodes.items() if node["op"] == "input") == ["input", "input_1"]


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls, self.inner = 0, nn.Linear(2, 2)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen = self.seen + 1
        self.cached = x
        return self.inner(x).relu() if self.calls < 3 else x


def test_attributes_are_put_back_too() -> None:
    model, x = Counts(), torch.ones(1, 2)
    seen = model.seen
    for look in (graph, activities):
        look(model, lambda: model(x))
        assert model.calls == 0
        assert model.seen is seen
        assert not hasattr(model, "cached")
        assert model.training
        assert len(model.state_dict()) == 3


def test_a_compiled_model_is_followed_as_it_was_written(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    compiled, x = torch.compile(model, backend="eager"), torch.ones(1, 2)
    compiled(x)
    model[0].compile(backend="eager")
    expected = ["input", "Sequential/0/weight", "Sequential/0/bias", "Sequential/0/linear", "Sequential/1/relu",
                "Sequential/2/weight", "Sequential/2/bias", "Sequential/2/linear", "output"]  # fmt: skip
    for one in (compiled, model):
        facts, nodes = drawn(compiled, lambda one=one: one(x), tmp_path)  # type: ignore[misc]
        assert facts["how"] == "followed", facts["note"]
        assert list(nodes) == expected
    assert list(activities(compiled, lambda: compiled(x))) == ["1"]


def test_of_too_many_operations_the_modules_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchkeep.watch.graph._MOST_NODES", 10)
    facts, nodes = drawn(model := Body(), lambda: model(torch.ones(3, 4)), tmp_path)
    assert (facts["how"], facts["note"]) == ("modules", "more than 10 operations")
    assert list(nodes) == ["Body/norm", "Body/first", "Body/drop"]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_part_is_a_gap_and_a_scripted_whole_its_modules(tmp_path: Path) -> None:
    scripted, x = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))), torch.ones(2, 2)
    facts, nodes = drawn(model := nn.Sequential(nn.Linear(2, 2), scripted, nn.ReLU()), lambda: model(x), tmp_path)
    assert facts["how"] == "followed", facts["note"]
    assert nodes["Sequential/2/relu"]["inputs"] == ["Sequential/2/constant"]
    assert drawn(scripted, lambda: scripted(x), tmp_path)[0]["how"] == "modules"
    assert all(module.training for module in model.modules())


def test_nothing_of_the_model_is_changed(tmp_path: Path) -> None:
    model = Body()
    model.first.eval()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    modes = [module.training for module in model.modules()]

    def call() -> Any:
        random.random(), np.random.rand(), torch.rand(2)
        return model(torch.randn(3, 4))

    for look in (graph, activities):
        look(model, call)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
        assert [module.training for module in model.modules()] == modes
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_where_the_forward_fails_the_modules_are_shown(tmp_path: Path) -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.never = nn.Linear(2, 2), nn.ReLU(), nn.Linear(1, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.never(self.b(self.a(x)))

    facts, nodes = drawn(model := Fails(), lambda: model(torch.ones(1, 2)), tmp_path)
    assert facts["how"] == "modules"
    assert "RuntimeError" in facts["note"]
    assert nodes["Fails/b"]["inputs"] == ["Fails/a"]
    assert nodes["Fails/b"]["op"] == "ReLU"
    assert activities(model, lambda: model(torch.ones(1, 2))) == {}


@pytest.mark.parametrize("name", ["BertModel", "GPT2Model"])
def test_models_of_transformers(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"BertModel": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
                           "vocab_size": 100},
             "GPT2Model": {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 100}}  # fmt: skip
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**sizes[name]))
    facts, nodes = drawn(model, lambda: model(input_ids=torch.ones(2, 5, dtype=torch.int64)), tmp_path)
    assert facts["how"] == "followed", facts["note"]
    assert 20 < len(nodes) < 200
    assert any("layer" in name or "/h/" in name for name in nodes)


def test_attention_takes_its_usual_way(tmp_path: Path) -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    facts, _ = drawn(model, lambda: model(torch.randn(2, 3, 8)), tmp_path)
    assert facts["how"] == "followed", facts["note"]


def test_units_that_never_answer_are_counted() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2), nn.Tanh())
    with torch.no_grad():
        model[0].weight[:6].zero_(), model[0].bias[:6].fill_(-1), model[0].bias[6:].fill_(1)
    found = activities(model, lambda: model(torch.rand(16, 3)))
    assert list(found) == ["1", "3"]
    assert as_numbers({name: one.dead_fraction for name, one in found.items()}) == {"1": 0.75}
    assert found["1"].histogram.settle(MediaStore(Path()))["num"] == 16 * 8
    assert activities(model, lambda: model(torch.rand(15, 3)))["1"].dead_fraction is None
    assert list(activities(nn.Sequential(plain := nn.Linear(2, 2)), lambda: plain(torch.ones(1, 2)))) == ["0"]
