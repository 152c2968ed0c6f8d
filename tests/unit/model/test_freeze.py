"""A plan says what learns, and what it freezes stays as it is whatever is done to the model around it."""

from __future__ import annotations

import copy
import pickle
import re
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchkeep as tk
from torchkeep.errors import RunFailedError, SettingsError
from torchkeep.model.freeze import evaluating, learning, release
from torchkeep.model.parts import layer_depths

X = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 3


def block() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5))


class Net(nn.Module):
    """A stem, three blocks and a head with dropout before it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.ones(8))
        self.stem = nn.Linear(6, 8)
        self.noise = nn.Dropout(0.5)
        self.blocks = nn.Sequential(block(), block(), block())
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.noise(self.stem(x))) * self.scale)
        return logits


def frozen_modules(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if not module.training}


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def moved(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def update(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(X), Y).backward()
    optimizer.step()


# --- which parts


@pytest.mark.parametrize(
    ("wanted", "frozen"),
    [
        (["blocks.0"], {"blocks.0"}),
        (["blocks[:2]"], {"blocks.0", "blocks.1"}),
        (["blocks[-1]"], {"blocks.2"}),
        (["blocks[1]"], {"blocks.1"}),
        (["blocks[-2:]"], {"blocks.1", "blocks.2"}),
        (["blocks.*"], {"blocks.0", "blocks.1", "blocks.2"}),
        (["blocks.?.0"], {"blocks.0.0", "blocks.1.0", "blocks.2.0"}),
        (["blocks.[01]"], {"blocks.0", "blocks.1"}),
        (["[:2]"], {"stem", "noise"}),
        (["scale", "stem.bias"], {"scale", "stem.bias"}),
    ],
)
def test_parts_are_named_by_name_pattern_and_place(wanted: list[str], frozen: set[str]) -> None:
    model = Net()
    tk.FreezePlan(wanted).apply(model)
    names = {name for name, _ in model.named_parameters() if any(f"{name}.".startswith(f"{part}.") for part in frozen)}
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == names


def test_all_but_the_head_leaves_dropout_before_the_head_on() -> None:
    model = Net()
    plan = tk.FreezePlan(all_but_head=True)
    plan.apply(model)
    assert plan.head == "head.1"
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.1.weight", "head.1.bias"]
    assert not model.noise.training
    assert not model.blocks.training
    assert model.head[0].training
    assert model.training


def test_a_head_can_be_named() -> None:
    model = Net()
    tk.FreezePlan(all_but_head=True, head="blocks.2").apply(model)
    assert {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {
        "blocks.2.0",
        "blocks.2.1",
    }
    assert not model.head.training  # it comes after the named one, and has parameters


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"modules": ["blok"]}, r"did you mean 'blocks?"),
        ({"modules": ["block[:2]"]}, "did you mean 'blocks"),
        ({"modules": ["blocks[5:]"]}, "no part of the model"),
        ({"modules": ["stem", "blocks[2].0"]}, "no part of the model"),
        ({"modules": ["*"]}, "nothing in this model would learn at the start"),
        ({"modules": ["*"], "unfreeze_at_epoch": 2}, "nothing in this model would learn at the start"),
        ({"all_but_head": True, "head": "haed"}, "did you mean 'head'"),
        ({"stages": [{"modules": ["nothing"], "at_epoch": 1}]}, r"freeze.stages\[0\]"),
        ({}, "modules, all_but_head = true"),
        ({"modules": ["stem"], "unfreeze_at_epoch": 1, "unfreeze_at_step": 5}, "one of unfreeze_at_epoch"),
        ({"modules": ["stem"], "lp_ft": 1}, "or modules"),
        ({"modules": ["stem"], "unfreeze_at_step": 5, "stages": [{"modules": ["head"], "at_epoch": 1}]}, "in epochs"),
        ({"stages": [{"modules": ["stem"], "at_epoch": 1, "at_step": 2}]}, "not both"),
        ({"modules": ["stem"], "unfreeze_at": 1}, "unfreeze_at_epoch"),
        ({"stages": [{"modules": ["stem"], "at_epoc": 1}]}, r"stages.0.at_epoc\n(.|\n)*did you mean 'at_epoch'"),
    ],
)
def test_what_cannot_be_meant_is_said(given: dict[str, Any], said: str) -> None:
    model = Net()
    with pytest.raises(SettingsError) as raised:
        tk.FreezePlan(**given).apply(model)
    assert re.search(said, str(raised.value)), str(raised.value)
    assert len(learning(model)) == len(list(model.parameters()))


def test_a_tensor_shared_with_a_learning_part_is_refused_by_both_names() -> None:
    model = Net()
    model.again = nn.Linear(6, 8)
    model.again.weight = model.stem.weight
    with pytest.raises(SettingsError, match=r"stem.weight learns from: never; again.weight from: the start"):
        tk.FreezePlan("stem").apply(model)
    plan = tk.FreezePlan(["stem", "again.weight"])
    plan.apply(model)
    assert not model.again.weight.requires_grad
    plan.release()
    assert model.again.weight.requires_grad


def test_a_module_shared_with_a_learning_part_keeps_its_mode() -> None:
    shared = nn.Dropout(0.5)
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), shared), nn.Sequential(shared, nn.Linear(2, 2)))
    tk.FreezePlan("0").apply(model)
    assert shared.training
    assert not model[0][0].training


# --- what is frozen stays frozen


def test_frozen_parts_stay_in_eval_mode_under_any_train() -> None:
    model = Net()
    tk.FreezePlan("blocks").apply(model)
    frozen = {name for name, _ in model.named_modules() if name.split(".")[0] == "blocks"}
    for call in (model.train, model.blocks.train, model.blocks[0][1].train, model.eval, model.train):
        call()
    assert frozen_modules(model) == frozen
    with evaluating(model):
        assert frozen_modules(model) == {name for name, _ in model.named_modules()}
    assert frozen_modules(model) == frozen


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_are_as_frozen_and_apart(again: Any) -> None:
    model = Net()
    tk.FreezePlan("blocks").apply(model)
    other = again(model).train()
    assert frozen_modules(other) == frozen_modules(model)
    assert other.blocks.train() is other.blocks
    release(other)
    assert frozen_modules(other) == set()
    assert len(learning(other)) == len(list(other.parameters()))
    assert frozen_modules(model.train())


def test_release_puts_back_what_was() -> None:
    model = Net()
    model.stem.bias.requires_grad_(False)
    model.blocks[0].eval()
    own = frozen_modules(model)
    plan = tk.FreezePlan(["blocks", "stem"])
    plan.apply(model)
    plan.release()
    assert frozen_modules(model) == own
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["stem.bias"]
    assert all("train" not in vars(module) for module in model.modules())


def test_what_the_user_froze_never_learns() -> None:
    model = Net()
    model.blocks[0][0].weight.requires_grad_(False)
    plan = tk.FreezePlan("blocks", unfreeze_at_epoch=1)
    groups = plan.groups(model, 0.1)
    assert plan.advance(1)
    assert not model.blocks[0][0].weight.requires_grad
    assert model.blocks[0][0].bias.requires_grad
    assert all(p is not model.blocks[0][0].weight for group in groups for p in group["params"])


def test_another_plan_undoes_the_first() -> None:
    model = Net()
    tk.FreezePlan("blocks").apply(model)
    tk.FreezePlan("stem").apply(model)
    assert frozen_modules(model) == {"stem"}
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["stem.weight", "stem.bias"]


def test_gradients_from_before_are_forgotten() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.1)
    nn.functional.cross_entropy(model(X), Y).backward()
    tk.FreezePlan("blocks").apply(model)
    before = tensors(model)
    optimizer.step()
    assert {name.partition(".")[0] for name in moved(before, model)} == {"scale", "stem", "head"}


def test_a_changed_frozen_tensor_is_named() -> None:
    model = Net()
    plan = tk.FreezePlan("blocks", stages=[{"modules": ["blocks.2"], "at_epoch": 1}])
    plan.apply(model)
    first = plan.hash()
    plan.check()
    plan.advance(1)
    model.blocks[2][1].running_mean += 1
    plan.check()
    assert plan.hash() != first  # of fewer tensors
    model.blocks[0][1].running_mean += 1
    with pytest.raises(RunFailedError, match=r"blocks.0.1.running_mean"):
        plan.check()


# --- from when, and how fast


def test_unfreezing_by_hand_keeps_optimiser_and_schedule() -> None:
    model = Net()
    plan = tk.FreezePlan(
        all_but_head=True,
        rate_scale=0.1,
        stages=[{"modules": ["blocks[2:]"], "at_epoch": 1}, {"modules": ["blocks"], "at_epoch": 2, "rate_scale": 0.01}],
    )
    groups = plan.groups(model, 0.1, weight_decay=0.5)
    optimizer = torch.optim.SGD(groups, momentum=0.9, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    assert [round(group["lr"], 6) for group in optimizer.param_groups] == [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.5, 0.0}
    seen = []
    for epoch in range(4):
        changed = plan.advance(epoch)
        before = tensors(model.train())
        update(model, optimizer)
        update(model, optimizer)
        frozen = {name for name in before if name in plan.frozen}
        assert not moved(before, model) & frozen
        assert all(p.grad is None for name, p in model.named_parameters() if name in frozen)
        parts = {name[:8] if name.startswith("blocks") else name[:4] for name in moved(before, model)}
        seen.append((changed, sorted(parts)))
        schedule.step()
    assert [changed for changed, _ in seen] == [False, True, True, False]
    assert [names for _, names in seen] == [
        ["head"],
        ["blocks.2", "head"],
        ["blocks.0", "blocks.1", "blocks.2", "head"],
        ["blocks.0", "blocks.1", "blocks.2", "head"],
    ]
    assert {name.partition(".")[0] for name in plan.frozen} == {"scale", "stem"}
    assert [begin for begin, _ in plan.spans] == [(0, 0), (1, 0), (2, 0)]
    assert plan.spans[-1][1] == plan.frozen


def test_steps_count_too_and_a_state_is_taken_up() -> None:
    model, plan = Net(), tk.FreezePlan("blocks", unfreeze_at_step=5)
    plan.apply(model)
    assert not plan.advance(3, 4)
    assert plan.advance(3, 5)
    state, frozen = plan.state_dict(), plan.frozen
    assert frozen == frozenset()
    model, plan = Net(), tk.FreezePlan("blocks", unfreeze_at_step=5)
    plan.apply(model)
    plan.load_state_dict(state)
    assert plan.frozen == frozen
    assert frozen_modules(model) == set()
    plan.load_state_dict({"epoch": 0, "step": 0})
    assert not model.blocks.training


def test_lp_ft_trains_the_head_and_then_everything() -> None:
    model, plan = Net(), tk.FreezePlan(lp_ft=2, rate_scale=0.5)
    groups = plan.groups(model, 1.0, decay="all")
    assert [(group["lr"], len(group["params"])) for group in groups] == [(1.0, 2), (0.5, 15)]
    assert len(learning(model)) == 2
    plan.advance(2)
    assert len(learning(model)) == 17
    assert frozen_modules(model) == set()


def test_parts_that_learn_from_the_start_have_rates_of_their_own() -> None:
    plan = tk.FreezePlan(stages=[{"modules": ["blocks"], "rate_scale": 0.1}])
    assert [group["lr"] for group in plan.groups(Net(), 1.0)] == [1.0, 0.1]
    assert plan.frozen == frozenset()


class Layer(nn.Module):
    """Two parts in a list, as a transformer's layer may have them."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(2, 2), nn.LayerNorm(2)])


class Wrapped(nn.Module):
    """A trunk in a module of its own, as transformers has it."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(2))
        self.trunk = nn.ModuleDict({"embed": nn.Embedding(3, 2)})
        self.trunk["encoder"] = nn.Module()
        self.trunk["encoder"].layer = nn.ModuleList([Layer() for _ in range(3)])
        self.trunk["norm"] = nn.LayerNorm(2)
        self.head = nn.Linear(2, 2)


def test_layers_are_what_repeats_and_what_stands_around_it() -> None:
    depths = {
        "trunk.embed": 0,
        "trunk.encoder.layer.0": 1,
        "trunk.encoder.layer.1": 2,
        "trunk.encoder.layer.2": 3,
        "trunk.norm": 3,
        "head": 4,
    }
    model = Wrapped()
    assert layer_depths(model) == depths
    groups = tk.FreezePlan(layer_decay=0.5).groups(model, 16.0)
    assert [group["lr"] for group in groups] == [16, 8, 4, 2, 1]
    first = {id(p) for p in groups[-1]["params"]}
    assert first == {id(model.token), id(model.trunk["embed"].weight)}


def test_layer_decay_and_rate_scale_multiply() -> None:
    plan = tk.FreezePlan("trunk", layer_decay=0.5, rate_scale=0.25, unfreeze_at_epoch=1)
    assert [group["lr"] for group in plan.groups(Wrapped(), 64.0)] == [64, 8, 4, 4, 2, 1]


# --- normalisation


@pytest.mark.parametrize(("kind", "trains"), [("part", [False, True]), ("frozen", [False] * 2), ("learn", [True] * 2)])
def test_normalisation_learns_with_its_part_never_or_always(kind: str, trains: list[bool]) -> None:
    model = Net()
    plan = tk.FreezePlan("blocks", normalisation=kind, unfreeze_at_epoch=1)
    optimizer = torch.optim.SGD(plan.groups(model, 0.1))
    for epoch, learns in enumerate(trains):
        plan.advance(epoch)
        before = tensors(model.train())
        update(model, optimizer)
        norm = {name for name in before if name.startswith("blocks.1.1.")}
        assert moved(before, model) & norm == (norm if learns else set())
        assert model.blocks[1][3].training == (epoch == 1)
        assert ("blocks.1.0.weight" in moved(before, model)) == (epoch == 1)


# --- optimisers made without the plan


def test_rates_of_a_users_optimiser_are_scaled_once() -> None:
    model, plan = Net(), tk.FreezePlan("blocks", rate_scale=0.1, unfreeze_at_epoch=1)
    others = [p for name, p in model.named_parameters() if not name.startswith("blocks")]
    optimizer = torch.optim.SGD([{"params": model.blocks.parameters()}, {"params": others}], lr=1.0)
    plan.apply(model)
    plan.adopt([optimizer])
    plan.adopt([optimizer])
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 1.0]
    with pytest.raises(SettingsError, match="does not fit the plan"):
        plan.adopt([optimizer], is_scheduled=True)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda model: torch.optim.SGD(model.parameters(), lr=1.0), "does not fit the plan"),
        (lambda model: torch.optim.SGD(learning(model), lr=1.0), "no optimiser has it"),
    ],
)
def test_an_optimiser_that_does_not_fit_is_refused(make: Any, said: str) -> None:
    model, plan = Net(), tk.FreezePlan("blocks", rate_scale=0.1, unfreeze_at_epoch=1)
    plan.apply(model)
    with pytest.raises(SettingsError, match=said):
        plan.adopt([make(model)])


def test_a_fused_momentum_is_refused_for_parts_of_two_moments() -> None:
    model, plan = Net(), tk.FreezePlan("blocks", unfreeze_at_epoch=1)
    plan.apply(model)
    plan.adopt([torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)])
    with pytest.raises(SettingsError, match="fused momentum"):
        plan.adopt([torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, fused=True)])


# --- what it says


def test_the_map_is_as_deep_as_it_differs() -> None:
    model, plan = Net(), tk.FreezePlan("blocks[:2]", rate_scale=0.1, unfreeze_at_epoch=3)
    plan.apply(model)
    rows = {row["name"]: row for row in plan.map()}
    assert list(rows) == ["(model)", "stem", "blocks", "blocks.0", "blocks.1", "blocks.2", "head", "head.1"]
    assert [rows[name]["learns"] for name in ("stem", "blocks", "blocks.0")] == [True, "partly", False]
    assert rows["blocks.0"] == {
        "name": "blocks.0", "kind": "Sequential", "depth": 2, "num_parameters": 88, "learns": False, "rate_scale": 0.1,
        "learns_from": "epoch 3", "time_fraction": None, "is_cached": False,
    }  # fmt: skip
    assert plan.rows() == [
        ("freeze", "blocks[:2]: learns from epoch 3, at 0.1 × the rate", "176 of 355 parameters (49.6%)", "freeze")
    ]
    plan.advance(3)
    assert {row["learns"] for row in plan.map()} == {True}


def test_a_plan_without_a_model_says_so() -> None:
    with pytest.raises(tk.TorchkeepError, match="no model yet"):
        tk.FreezePlan("stem").advance(1)


# --- adapters


def test_adapters_learn_in_place_of_what_is_frozen() -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    model, plan = Net(), tk.FreezePlan(adapters={"targets": ["0.0", "1.0"], "r": 2, "dropout": 0.1})
    plan.apply(model)
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    adapters = {name for name in learns if "lora_" in name}
    assert len(adapters) == 4
    assert learns - adapters == {"head.1.weight", "head.1.bias"}
    assert all(m.training for name, m in model.named_modules() if "lora_" in name)
    again = Net()
    tk.FreezePlan(adapters={"targets": ["0.0", "1.0"], "r": 2}).apply(again)
    assert all(torch.equal(again.state_dict()[name], model.state_dict()[name]) for name in adapters)
    optimizer = torch.optim.AdamW(plan.groups(model, 0.1, weight_decay=0.1))
    before = tensors(model)
    for _ in range(2):
        update(model.train(), optimizer)
    assert moved(before, model) == learns
    plan.apply(model)  # a second time adds nothing
    assert {name for name, p in model.named_parameters() if p.requires_grad} == learns


def test_targets_that_are_not_there_are_said() -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    with pytest.raises(SettingsError, match="these layers take no adapters"):
        tk.FreezePlan(adapters={"targets": ["query"]}).apply(Net())


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SettingsError, match=r"torchkeep\[peft\]"):
        tk.FreezePlan(adapters={"targets": ["0.0"]}).apply(Net())
