"""What is said of each module, against numbers counted by hand; and that nothing is changed by looking."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

from torchkeep.errors import ModelError
from torchkeep.generators import generator_states, same_states
from torchkeep.model.describe import Anatomy, ModuleRow, describe, dissect, form_text, shape_text


def rows_of(found: Anatomy) -> dict[str, ModuleRow]:
    return {row.name: row for row in found}


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


# --- numbers counted by hand


def test_a_linear_layer_costs_what_its_products_take() -> None:
    row = dissect(nn.Linear(5, 7), torch.randn(3, 5))[0]
    assert row.forward_flops == 2 * 3 * 5 * 7
    assert row.backward_flops == 2 * 3 * 5 * 7  # of the weight alone: the input wants no gradient
    assert (row.num_parameters, row.num_learning, row.num_bytes) == (42, 42, 168)
    assert (row.inputs, row.outputs) == ("(3, 5) float32", "(3, 7) float32")


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("make", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_convolution_costs_what_its_products_take(make: Any, groups: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), make(8, 8, 3, groups=groups, padding=1))
    rows = rows_of(dissect(model, torch.randn(2, 3, 5, 5)))
    products = 2 * 2 * 25 * 9 * 8 * 8 // groups
    assert rows["1"].forward_flops == products
    assert rows["1"].backward_flops == 2 * products
    first = 2 * 2 * 25 * 3 * 8
    assert rows["(model)"].forward_flops == first + products
    assert rows["(model)"].backward_flops == first + 2 * products


def test_recurrent_layers_and_attention_count_their_products() -> None:
    model = nn.LSTM(4, 5, num_layers=2, batch_first=True)
    steps, weights = 2 * 3, 4 * 5 * (4 + 5) + 4 * 5 * (5 + 5)
    row = dissect(model.eval(), torch.randn(2, 3, 4))[0]
    assert (row.forward_flops, row.backward_flops) == (2 * steps * weights, 4 * steps * weights)
    assert row.outputs == "(2, 3, 5) float32, (2, 2, 5) float32, (2, 2, 5) float32"

    class Attend(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    row = dissect(Attend(), torch.randn(2, 4, 6, 8))[0]
    assert row.forward_flops == 2 * (2 * 2 * 4 * 6 * 6 * 8)


def test_gradients_are_those_of_a_backward_by_hand() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)))
    x, y = torch.randn(5, 6), torch.tensor([0, 1, 2, 1, 0])
    with torch.no_grad():
        model[0].bias[2] = -100.0  # a dead unit
    found = dissect(model, x, lambda output: F.cross_entropy(output, y))
    F.cross_entropy(model(x), y).backward()
    rows = rows_of(found)
    for name, module in [("(model)", model), ("0", model[0]), ("2", model[2])]:
        grads = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
        together = torch.cat(grads)
        assert rows[name].gradient_norm == pytest.approx(float(together.norm()), rel=1e-6)
        assert rows[name].gradient_zeros == int((together == 0).sum()) / together.numel()
    assert (rows["0"].gradient_zeros or 0) >= 7 / 28
    assert found.losses["loss"] == pytest.approx(float(F.cross_entropy(model(x), y).detach()))
    assert [rows[name].backward_order for name in ("(model)", "0", "1", "2")] == [1, 3, 2, 1]
    assert found.note == ""


def test_shares_of_the_time_add_up() -> None:
    rows = dissect(nn.Sequential(nn.Linear(64, 64), nn.Sequential(nn.ReLU(), nn.Linear(64, 8))), torch.randn(32, 64))
    by_name = rows_of(rows)
    assert by_name["(model)"].time_fraction == 1.0
    parts = sum(by_name[name].time_fraction or 0 for name in ("0", "1.0", "1.1"))
    assert by_name["0"].forward_s
    assert 0 < parts <= 1 + 1e-9


# --- which modules


class Odd(nn.Module):
    """A layer called twice, one called by its input's sign, one never, one that writes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.positive, self.negative = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)
        self.never = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.flat = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.flat(self.twice(x)))[:, :4]
        with torch.no_grad():
            self.twice(x)
        return self.positive(x) if x.sum() >= 0 else self.negative(x)  # type: ignore[no-any-return]


def test_calls_are_added_and_what_is_never_called_is_known() -> None:
    model = seeded(Odd)
    rows = rows_of(dissect(model, torch.randn(3, 4)))
    assert rows["twice"].num_calls == 3
    assert rows["twice"].forward_flops == 3 * 2 * 3 * 16
    assert (rows["never"].num_calls, rows["never.0"].num_calls) == (0, 0)
    assert rows["never"].num_without_gradient == 20
    called, other = sorted(("positive", "negative"), key=lambda name: -(rows[name].num_calls or 0))
    assert (rows[called].num_calls, rows[other].num_calls) == (1, 0)
    assert rows[other].gradient_norm is None
    assert rows["flat"].backward_order
    assert rows["(model)"].num_without_gradient == 20 + 10


def test_tied_weights_are_counted_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
            self.out.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.table(ids))  # type: ignore[no-any-return]

    rows = rows_of(dissect(Tied(), torch.tensor([[1, 2]])))
    assert [rows[name].num_parameters for name in ("(model)", "table", "out")] == [40, 40, 40]
    assert [rows[name].num_shared for name in ("(model)", "table", "out")] == [40, 40, 40]
    assert rows["(model)"].num_bytes == 160
    assert rows["(model)"].gradient_norm == rows["out"].gradient_norm


def test_frozen_parts_are_told_from_those_that_learn() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    rows = rows_of(dissect(model, torch.randn(3, 4)))
    assert [rows[name].num_learning for name in ("(model)", "0", "2")] == [8 + 10, 0, 10]
    assert rows["0"].backward_order is None
    assert rows["0"].backward_flops == 0
    assert rows["1"].num_buffers == 9
    assert (rows["0"].gradient_norm, rows["0"].num_without_gradient) == (None, 0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_part_is_called_once_and_computed_again_in_backward(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.part = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.part, self.first(x), use_reentrant=reentrant)

    rows = rows_of(dissect(Checkpointed(), torch.randn(2, 4)))
    assert [rows[name].num_calls for name in ("part", "part.0", "part.2")] == [1, 1, 1]
    assert rows["part.0"].forward_flops == 128
    assert rows["part.0"].backward_flops == 3 * 128
    assert rows["part.0"].gradient_norm


def test_compiled_and_functional_parts_are_seen() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return grad * 2

    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Doubled.apply(x)  # type: ignore[no-any-return, no-untyped-call]

    model: Any = torch.compile(nn.Sequential(nn.Linear(4, 4), Own()), backend="eager")
    rows = dissect(model, torch.randn(2, 4))
    assert [row.num_calls for row in rows] == [1, 1, 1, 1]
    assert [row.forward_flops for row in rows] == [64, 64, 64, 0]
    assert rows[3].backward_order == 1


# --- forms


@dataclass
class Answer:
    """What a model may give."""

    scores: Tensor
    more: tuple[Tensor, ...] = ()


def test_forms_are_said_of_dicts_tuples_and_dataclasses() -> None:
    class Nested(nn.Module):
        def forward(self, ids: Tensor, *, mask: Tensor) -> Any:
            return {"a": ids.float() * mask, "b": (ids, [mask])}

    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Answer:
            return Answer(self.layer(x), (x.half(),))

    row = dissect(Nested(), {"ids": torch.ones(2, 3, dtype=torch.int64), "mask": torch.ones(2, 3).bool()})[0]
    assert row.inputs == "ids (2, 3) int64, mask (2, 3) bool"
    assert row.outputs == "a (2, 3) float32, b (2, 3) int64, (2, 3) bool"
    found = dissect(Given(), torch.ones(1, 2), lambda answer: answer.scores.sum())
    assert found[0].outputs == "scores (1, 2) float32, more (1, 2) float16"
    assert found[0].gradient_norm
    assert form_text(torch.ones(2, 2).max(0)) == "(2,) float32, (2,) int64"
    assert shape_text(pack_sequence([torch.ones(3, 2)])) == "data (3, 2), batch_sizes (3,)"


def test_a_transformers_model_tells_its_ties_and_parts() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertForMaskedLM(config)
    ids = torch.randint(0, 50, (2, 5))
    found = dissect(model, {"input_ids": ids, "labels": ids})
    rows = rows_of(found)
    expected = model(input_ids=ids, labels=ids).loss if not model.training else None
    assert expected is None or found.losses["loss"] == pytest.approx(float(expected))
    assert rows["(model)"].outputs == "loss () float32, logits (2, 5, 50) float32"
    assert rows["bert.embeddings.word_embeddings"].num_shared == 800
    assert rows["(model)"].num_parameters == sum(p.numel() for p in model.parameters())
    assert all(rows[f"bert.encoder.layer.{n}.attention.self.query"].gradient_norm for n in (0, 1))


# --- no trace


class Drawing(nn.Module):
    """All that could leave a trace: statistics, dropout, foreign draws, a counter, a write to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.count, self.cache = 0, list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        x += float(np.random.rand()) + random.random()
        self.cache.append(x)
        return self.drop(self.norm(self.layer(x)))  # type: ignore[no-any-return]


def test_nothing_is_changed() -> None:
    model = seeded(Drawing)
    model.norm.eval()
    x = torch.randn(6, 4)
    model.layer.weight.grad = held = torch.ones(4, 4)
    state, given = {name: value.clone() for name, value in model.state_dict().items()}, x.clone()
    before, hooks = generator_states(), [dict(vars(module)) for module in model.modules()]
    twice = [dissect(model, x) for _ in range(2)]
    describe(model, lambda: model(x.clone()))
    assert same_states(before, generator_states())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(x, given)
    assert model.layer.weight.grad is held
    assert torch.equal(held, torch.ones(4, 4))
    assert model.norm.weight.grad is None
    assert (model.training, model.norm.training, model.count, model.cache) == (True, False, 0, [])
    assert hooks == [dict(vars(module)) for module in model.modules()]
    assert twice[0].losses == twice[1].losses
    assert twice[0][0].gradient_norm == twice[1][0].gradient_norm


def test_nothing_is_changed_where_the_forward_fails() -> None:
    model, before = nn.Sequential(nn.Linear(4, 4), nn.Linear(3, 3)), generator_states()
    with pytest.raises(ModelError) as caught:
        dissect(model, torch.randn(2, 4))
    assert caught.value.where == "1 (Linear)"
    assert "(2, 4) float32" in caught.value.got
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    del before


def test_several_losses_go_backward_one_after_the_other() -> None:
    model = nn.ModuleDict({"drawer": nn.Linear(2, 3), "judge": nn.Linear(3, 1)})
    x = torch.ones(4, 2)

    def step(backward: Callable[[Any], None]) -> None:
        drawn = model["drawer"](x)
        backward(model["judge"](drawn.detach()).mean())
        backward(-model["judge"](drawn).mean())

    found = dissect(model, run=step)
    rows = rows_of(found)
    assert list(found.losses) == ["loss", "loss 2"]
    assert rows["judge"].num_calls == 2
    assert rows["judge"].gradient_norm == pytest.approx(0, abs=1e-6)  # the two are opposite, and added
    assert rows["drawer"].gradient_norm
    assert (rows["judge"].backward_order, rows["drawer"].backward_order) == (1, 2)
    assert rows["(model)"].num_calls == 0
    assert rows["(model)"].forward_flops == 2 * 4 * (2 * 3 + 2 * 3)


# --- without a backward


def test_the_rest_is_shown_where_nothing_can_go_backward() -> None:
    frozen = nn.Linear(4, 2)
    frozen.requires_grad_(False)
    found = dissect(frozen, torch.randn(2, 4))
    assert found.note == "no backward: nothing that learns leads to the loss"
    row = found[0]
    assert row.forward_flops == 32
    assert {row.backward_flops, row.backward_s, row.backward_order, row.gradient_norm} == {None}

    class Spoiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x).exp()
            y = x * 2
            x.add_(1)
            return y

    found = dissect(Spoiled(), torch.randn(2, 4))
    assert "backward fails: one of the variables needed for gradient computation has been modified" in found.note
    assert found[0].forward_flops == 64
    assert dissect(nn.Flatten(), torch.ones(2, 3, 4).long()).note.startswith("no backward: the loss is NoneType")


def test_without_a_batch_only_what_the_model_holds_is_known() -> None:
    row = dissect(nn.Linear(3, 2))[0]
    assert (row.num_parameters, row.num_calls, row.outputs, row.time_fraction) == (8, None, "", None)
    timed = describe(nn.Linear(3, 2), lambda: None)[0]
    assert (timed.num_calls, timed.forward_flops, timed.forward_s) == (0, None, 0.0)


def test_what_cannot_be_shown_is_refused() -> None:
    with pytest.raises(ModelError, match="without a shape"):
        dissect(nn.LazyLinear(3), torch.randn(2, 3))
    with pytest.raises(ModelError, match="the loss cannot be computed"):
        dissect(nn.Linear(2, 2), torch.ones(1, 2), lambda output: output["loss"])
    with pytest.raises(ModelError) as caught:
        dissect(nn.BatchNorm1d(2), torch.ones(1, 2))
    assert "model.eval()" in caught.value.fix


def test_other_kinds_of_gradients_are_measured() -> None:
    sparse = dissect(nn.Embedding(5, 2, sparse=True), torch.tensor([1, 1, 2]))[0]
    assert sparse.gradient_zeros == 0.6
    ruined = dissect(nn.Linear(2, 2), torch.full((1, 2), math.inf))
    assert not math.isfinite(ruined[0].gradient_norm or 0)
    assert ruined.to_json()["rows"][0]["gradient_norm"] in ("nan", "inf")
