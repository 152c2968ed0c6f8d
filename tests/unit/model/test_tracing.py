"""What is kept for backward is counted as by hand, and the blame falls on the operation that earned it."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import torchkeep as tk
from torchkeep.errors import ModelError
from torchkeep.model.tracing import Trace, TraceRow, trace_backward

SHARED = Path(__file__).parents[3] / "../shared/models/mobilenet_v2.py"
FLOAT = 4


class Does(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def row_of(trace: Trace, name: str) -> TraceRow:
    return next(row for row in trace.rows if row.name == name)


def identity(width: int = 4) -> nn.Linear:
    """A layer that learns and changes nothing, so that what is planted in a sample stays where it is."""
    layer = nn.Linear(width, width)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(width))
        layer.bias.zero_()
    return layer


# --- what is kept


def test_a_linear_layer_keeps_what_goes_in() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    trace = trace_backward(model, drawn(5, 8))
    assert [row.name for row in trace.rows] == ["(loss)", "2", "1", "0"]
    # tanh keeps its output, which the second layer keeps too: one memory
    assert trace.num_bytes() == row_of(trace, "1").num_bytes() == 5 * 16 * FLOAT
    assert trace.num_bytes("batch") == 5 * 8 * FLOAT
    assert trace.num_bytes("parameter") == 16 * 2 * FLOAT  # the first layer's weight is not needed
    assert row_of(trace, "2").nodes == {"AddmmBackward0": 1, "AccumulateGrad": 2, "TBackward0": 1}
    assert {saved.node for saved in row_of(trace, "2").saved} == {"AddmmBackward0"}
    assert trace.num_nodes == sum(sum(row.nodes.values()) for row in trace.rows)
    assert trace.first_non_finite is None
    assert trace.is_finite


def test_convolution_normalisation_and_relu_in_place() -> None:
    block = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    trace = trace_backward(block, drawn(4, 3, 8, 8))
    plane = 4 * 8 * 6 * 6 * FLOAT
    assert row_of(trace, "0").num_bytes() == 0
    assert row_of(trace, "1").num_bytes() == plane + 2 * 8 * FLOAT  # what the convolution gave, mean and deviation
    assert row_of(trace, "2").num_bytes() == plane
    block[2].inplace = False
    assert trace_backward(block, drawn(4, 3, 8, 8)).num_bytes() == trace.num_bytes()
    frozen_statistics = trace_backward(block.eval(), drawn(4, 3, 8, 8))
    assert frozen_statistics.num_bytes() == 2 * plane  # no statistics of the batch; the model's own cost nothing


def test_attention_keeps_the_probabilities() -> None:
    samples, length, width = 2, 5, 8

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x)

    trace = trace_backward(Attention(), drawn(samples, length, width), loss=torch.sum)
    # queries, keys and values, and once the probabilities, which softmax and the second product keep
    assert row_of(trace, "(model)").num_bytes() == trace.num_bytes()
    assert trace.num_bytes() == (3 * samples * length * width + samples * length * length) * FLOAT


def test_a_checkpointed_part_keeps_what_goes_in() -> None:
    body = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8))

    class Checkpointed(nn.Module):
        def __init__(self, use_reentrant: bool | None) -> None:
            super().__init__()
            self.stem, self.body, self.use_reentrant = nn.Linear(8, 8), body, use_reentrant

        def forward(self, x: Tensor) -> Tensor:
            if self.use_reentrant is None:
                return self.body(self.stem(x))
            return checkpoint(self.body, self.stem(x), use_reentrant=self.use_reentrant)

    traces = [trace_backward(Checkpointed(way), drawn(5, 8)) for way in (None, False, True)]
    assert traces[0].num_bytes() == (5 * 8 + 2 * 5 * 64) * FLOAT
    assert traces[1].num_bytes() == traces[2].num_bytes() == 5 * 8 * FLOAT


def test_what_nobody_holds_any_more_is_not_counted() -> None:
    def forward(x: Tensor) -> Tensor:
        x.exp().sin()  # its graph is gone at once
        return x.exp()

    assert trace_backward(nn.Sequential(identity(), Does(forward)), drawn(3, 4)).num_bytes() == 3 * 4 * FLOAT


def test_dropout_keeps_a_mask_and_a_part_of_a_tensor_keeps_the_whole() -> None:
    dropped = trace_backward(nn.Sequential(identity(), nn.Dropout(0.5)), drawn(3, 4))
    assert row_of(dropped, "1").num_bytes() == 3 * 4 * FLOAT
    sliced = trace_backward(
        nn.Sequential(identity(), Does(lambda x: x[:1].exp().detach() + x[:1].square())), drawn(3, 4)
    )
    assert row_of(sliced, "1").num_bytes() == 3 * 4 * FLOAT


def test_a_shared_module_is_one_row_and_a_shared_parameter_one_gradient() -> None:
    shared = nn.Linear(4, 4)
    trace = trace_backward(nn.Sequential(shared, nn.Tanh(), shared), drawn(3, 4))
    assert [row.name for row in trace.rows] == ["(loss)", "0", "1"]
    assert row_of(trace, "0").nodes == {"AddmmBackward0": 2, "AccumulateGrad": 2, "TBackward0": 2}


def test_the_forms_of_a_batch_and_of_a_loss() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
            return {"sum": self.layer(a + b), "count": torch.tensor(3), "first": a}

    model, a, b = Pair(), drawn(2, 4), drawn(2, 4, seed=1)
    with torch.no_grad():
        expected = float(model(a, b)["sum"].mean() + a.mean())
    for batch in ((a, b), {"a": a, "b": b}):
        assert trace_backward(model, batch).loss == pytest.approx(expected)
    targets = torch.tensor([0, 2])
    by_hand = trace_backward(model, (a, b), loss=lambda out: F.cross_entropy(out["sum"], targets, reduction="none"))
    given = trace_backward(model, (a, b), loss=lambda out, y: F.cross_entropy(out["sum"], y).mul(2), targets=targets)
    assert by_hand.loss == pytest.approx(given.loss)


def test_gradients_with_respect_to_the_batch() -> None:
    energy = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    class Force(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.energy = energy

        def forward(self, x: Tensor) -> Tensor:
            return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]

    places = drawn(3, 4).requires_grad_()
    assert trace_backward(Force(), places).is_finite
    assert places.grad is None


# --- who made it


def log_of_a_negative(x: Tensor) -> Tensor:
    return x.log()


def zero_by_zero(x: Tensor) -> Tensor:
    return x / x


def overflow(x: Tensor) -> Tensor:
    return x.exp()


def half_overflow(x: Tensor) -> Tensor:
    return x.half().float()


FORWARD = [
    (log_of_a_negative, -3.0, "NaN", "aten.log", "clamp_min"),
    (zero_by_zero, 0.0, "NaN", "aten.div", "denominator"),
    (overflow, 100.0, "inf", "aten.exp", "logarithms"),
    (half_overflow, 1e6, "inf", "aten._to_copy", "65504"),
]


@pytest.mark.parametrize(("function", "planted", "value", "operation", "fix"), FORWARD, ids=lambda v: str(v)[:20])
def test_what_forward_made(function: Any, planted: float, value: str, operation: str, fix: str) -> None:
    batch = torch.full((6, 4), 0.5)
    batch[4, 1] = planted
    model = nn.Sequential(identity(), Does(function), nn.Linear(4, 2), nn.BatchNorm1d(2))
    trace = trace_backward(model, batch)
    found = trace.first_non_finite
    assert found is not None
    assert not trace.is_finite
    assert (found.direction, found.module, found.operation, found.value) == ("forward", "1", operation, value)
    assert (found.rows, found.shape) == ((4,), (6, 4))
    assert found.source.startswith(f"{Path(__file__).name}:")
    assert "return x" in found.source
    assert "(6, 4) float32 from" in found.inputs[0]
    assert fix in found.fix
    lines = str(trace).splitlines()
    assert lines[0] == f"{value} made in forward by {operation}, in 1 (Does)"
    assert lines[1] == "  samples:  4 of the batch"


def safe_looking_root(x: Tensor) -> Tensor:
    return torch.where(x > 0, x.sqrt(), 0.0)


def length(x: Tensor) -> Tensor:
    return x.square().sum(-1).sqrt()


def distance(x: Tensor) -> Tensor:
    return x.pow(0.5)


@pytest.mark.parametrize(
    ("function", "node"),
    [(safe_looking_root, "SqrtBackward0"), (length, "SqrtBackward0"), (distance, "PowBackward0")],
    ids=lambda v: str(v)[:20],
)
def test_what_backward_alone_made(function: Any, node: str) -> None:
    batch = drawn(6, 4).abs() + 0.1
    batch[2] = 0.0
    trace = trace_backward(nn.Sequential(identity(), nn.Identity(), Does(function)), batch)
    found = trace.first_non_finite
    assert found is not None
    assert torch.isfinite(torch.tensor(trace.loss))
    assert (found.direction, found.module, found.node, found.rows) == ("backward", "2", node, (2,))
    assert "return" in found.source
    assert "infinite slope at 0" in found.fix
    assert f"of {node}, in 2 (Does)" in str(trace)


def test_a_slope_that_nobody_needs_is_not_blamed() -> None:
    batch = drawn(6, 4).abs() + 0.1
    batch[2] = 0.0
    norm = nn.Sequential(identity(), Does(lambda x: x.norm(dim=-1)))
    assert trace_backward(norm, batch).is_finite  # torch has 0 there
    model = nn.Sequential(Does(lambda x: x.sqrt()), identity())
    assert trace_backward(model, batch).is_finite  # the batch has no gradient


def test_what_came_with_the_parameters_or_the_batch() -> None:
    model = nn.Sequential(identity(), nn.ReLU(), nn.Linear(4, 2))
    batch = drawn(6, 4)
    batch[3, 0] = float("nan")
    found = trace_backward(model, {"input": batch}).first_non_finite
    assert found is not None
    assert (found.direction, found.operation, found.rows) == ("batch", "['input']", (3,))
    assert str(found).startswith("NaN came with the batch ['input']\n  samples:  3 of the batch")
    targets = torch.tensor([0.0, float("inf"), 1.0])
    found = trace_backward(
        nn.Linear(4, 1), drawn(3, 4), loss=lambda o, y: F.mse_loss(o[:, 0], y), targets=targets
    ).first_non_finite
    assert found is not None
    assert (found.direction, found.rows, found.value) == ("targets", (1,), "inf")
    with torch.no_grad():
        model[2].weight[1, 1] = float("nan")
    found = trace_backward(model, drawn(6, 4)).first_non_finite
    assert found is not None
    assert (found.direction, found.module, found.operation) == ("parameter", "2", "2.weight")
    normalised = nn.Sequential(identity(), nn.BatchNorm1d(4)).eval()
    normalised[1].running_var[0] = float("nan")  # type: ignore[index,operator]
    found = trace_backward(normalised, drawn(6, 4)).first_non_finite
    assert found is not None
    assert (found.direction, found.operation) == ("buffer", "1.running_var")


class Masked(nn.Module):
    """Attention with a mask of -inf, made in one of the ways that people make it."""

    def __init__(self, way: str, after: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.way, self.after = way, after
        self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("triangle", torch.full((5, 5), float("-inf")).triu(1))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).mT
        hidden = ~seen[:, None, :]
        if self.way == "masked_fill":
            scores = scores.masked_fill(hidden, float("-inf"))
        elif self.way == "in place":
            scores = scores.clone().masked_fill_(hidden, float("-inf"))
        elif self.way == "where":
            scores = torch.where(hidden, torch.tensor(float("-inf")), scores)
        elif self.way == "buffer":
            scores = scores + self.triangle
        elif self.way == "log":
            scores = scores + seen[:, None, :].float().log()
        elif self.way == "added":
            scores = scores + torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))
        return self.after(torch.softmax(scores, -1) @ x)


WAYS = ["masked_fill", "in place", "where", "buffer", "log", "added"]


@pytest.mark.parametrize("way", WAYS)
def test_a_mask_is_not_blamed(way: str) -> None:
    seen = torch.ones(3, 5, dtype=torch.bool)
    seen[1, 3:] = False
    assert trace_backward(Masked(way), (drawn(3, 5, 4), seen)).first_non_finite is None
    found = trace_backward(Masked(way, lambda x: (x - 100).log()), (drawn(3, 5, 4), seen)).first_non_finite
    assert found is not None
    assert (found.operation, found.module) == ("aten.log", "(model)")


@pytest.mark.parametrize("way", ["masked_fill", "in place", "where", "added"])
def test_a_row_that_is_masked_as_a_whole_is_blamed_on_softmax(way: str) -> None:
    seen = torch.ones(3, 5, dtype=torch.bool)
    seen[2] = False
    found = trace_backward(Masked(way), (drawn(3, 5, 4), seen)).first_non_finite
    assert found is not None
    assert (found.operation, found.value, found.rows) == ("aten._softmax", "NaN", (2,))
    assert "-inf in 25 of 75" in found.inputs[0]
    assert "masked as a whole" in found.fix


def test_a_mask_that_reaches_the_loss_is_named() -> None:
    model = nn.Sequential(
        identity(), Does(lambda x: x.masked_fill(torch.tensor([True, False, False, False]), -torch.inf))
    )
    found = trace_backward(model, drawn(3, 4), loss=F.cross_entropy, targets=torch.tensor([1, 0, 2])).first_non_finite
    assert found is not None
    assert (found.operation, found.value, found.rows) == ("aten.masked_fill", "-inf", (0, 1, 2))


def test_a_healthy_infinity_before_the_fault_is_not_blamed() -> None:
    def forward(x: Tensor) -> Tensor:
        bounded = x.abs().log().clamp_min(-5)  # log(0) is caught here
        return bounded + (x - 1).sqrt()

    batch = torch.full((4, 4), 2.0)
    batch[0] = 0.0
    found = trace_backward(nn.Sequential(identity(), Does(forward)), batch).first_non_finite
    assert found is not None
    assert (found.operation, found.rows) == ("aten.sqrt", (0,))


def test_the_loss_may_be_what_fails() -> None:
    def loss(output: Tensor) -> Tensor:
        return -output.log().mean()

    batch = torch.ones(4, 4)
    batch[1] = -1
    found = trace_backward(identity(), batch, loss=loss).first_non_finite
    assert found is not None
    assert (found.module, found.rows) == ("(loss)", (1,))
    assert "output.log()" in found.source
    found = trace_backward(identity(), batch, loss=torch.log).first_non_finite
    assert found is not None
    assert (found.module, found.rows, found.source) == ("(loss)", (1,), "")


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_within_a_checkpointed_part(use_reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.stem, self.body = identity(), Does(function)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = checkpoint(self.body, self.stem(x), use_reentrant=use_reentrant)
            return out

    batch = torch.ones(6, 4)
    batch[5] = 0.0
    found = trace_backward(Checkpointed(zero_by_zero), batch).first_non_finite
    assert found is not None
    assert (found.direction, found.module, found.operation, found.rows) == ("forward", "body", "aten.div", (5,))
    found = trace_backward(Checkpointed(safe_looking_root), batch).first_non_finite
    assert found is not None
    assert (found.direction, found.node, found.rows) == ("backward", "SqrtBackward0", (5,))


def test_chance_is_the_same_when_it_looks_again() -> None:
    # with dropout the fault comes and goes: what the first run met, the second must find
    model = nn.Sequential(identity(), nn.Dropout(0.5), Does(lambda x: 1 / x.sum(-1)))
    for seed in range(12):
        torch.manual_seed(seed)
        trace = trace_backward(model, torch.eye(4))
        assert trace.is_finite == (trace.first_non_finite is None)
        assert trace.first_non_finite is None or trace.first_non_finite.operation == "aten.reciprocal"


def test_an_infinity_that_only_backward_meets_is_blamed_on_its_maker() -> None:
    def forward(x: Tensor) -> Tensor:
        return torch.where(x < 1, x.exp(), x)  # the loss is finite; backward multiplies 0 by inf

    batch = torch.zeros(6, 4)
    batch[3] = 1000.0
    trace = trace_backward(nn.Sequential(identity(), Does(forward)), batch)
    found = trace.first_non_finite
    assert found is not None
    assert trace.loss < 1000
    assert (found.direction, found.operation, found.value, found.rows) == ("forward", "aten.exp", "inf", (3,))


def test_the_samples_of_what_is_computed_for_all_positions_at_once() -> None:
    layer = identity()
    with torch.no_grad():
        layer.weight.mul_(2)
    batch = torch.ones(3, 5, 4)
    batch[1, 2, 3] = 3e38
    found = trace_backward(layer, batch).first_non_finite
    assert found is not None
    assert (found.operation, found.shape, found.rows) == ("aten.addmm", (15, 4), (1,))
    assert found.inputs[2].startswith("weight (4, 4)")


def test_complex_numbers() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.angle = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return (torch.polar(torch.ones(4), self.angle) * x / x.abs()).real

    batch = torch.ones(3, 4)
    batch[1, 2] = 0
    found = trace_backward(Turned(), batch).first_non_finite
    assert found is not None
    assert (found.operation, found.value, found.rows) == ("aten.div", "NaN", (1,))


# --- models as they are


class Turns(nn.Module):
    """Control flow that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x[0, 0])):
            x = self.layer(x).tanh()
        return self.other(x) if bool(x.sum() > 1e6) else x


def test_control_flow_that_depends_on_data() -> None:
    batch = drawn(3, 4)
    for turns in (1, 3):
        batch[0, 0] = turns
        trace = trace_backward(Turns(), batch)
        assert row_of(trace, "layer").nodes["AddmmBackward0"] == turns
        assert all(row.name != "other" for row in trace.rows)


def test_a_transformers_model() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=30, **sizes)
    model = transformers.BertForSequenceClassification(config)
    batch = {"input_ids": torch.randint(1, 30, (3, 7)), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    batch["attention_mask"][1, 4:] = 0
    trace = trace_backward(model, {**batch, "labels": torch.tensor([0, 1, 0])})
    assert trace.is_finite
    assert trace.loss < 2
    assert row_of(trace, "bert.encoder.layer.1.output.dense").nodes["AccumulateGrad"] == 2
    assert all(len(line) <= 100 for line in str(trace).splitlines())
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[5] = float("nan")
        batch["input_ids"][:, 0], batch["input_ids"][batch["input_ids"] == 5] = 1, 6
        batch["input_ids"][2, 3] = 5
    found = trace_backward(model, batch).first_non_finite
    assert found is not None
    assert (found.direction, found.rows) == ("parameter", (2,))
    assert found.operation == "bert.embeddings.word_embeddings.weight"


@pytest.fixture(scope="module")
def mobilenet() -> Any:
    if not SHARED.exists():
        pytest.skip("the shared models folder beside the repository is missing")
    spec = importlib.util.spec_from_file_location("mobilenet_v2_traced", SHARED)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build(num_classes=2)


def test_a_convolutional_model(mobilenet: Any) -> None:
    trace = trace_backward(mobilenet, drawn(2, 3, 64, 64), loss=F.cross_entropy, targets=torch.tensor([0, 1]))
    assert trace.is_finite
    assert sum(row.type_name == "Conv2d" for row in trace.rows) == 52
    assert sum(row.nodes.get("AccumulateGrad", 0) for row in trace.rows) == len(list(mobilenet.parameters()))


def test_the_sum_is_what_memory_grows_by(mobilenet: Any) -> None:
    images = drawn(2, 3, 64, 64)
    traced = trace_backward(mobilenet, images).num_bytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        total = mobilenet(images).mean()
    grown = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    assert grown == traced + total.nbytes


def test_two_networks() -> None:
    generator, critic = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(4, 1)
    critic.weight.grad = before = torch.ones(1, 4)
    trace = trace_backward(generator, drawn(5, 3), loss=lambda fake: F.softplus(-critic(fake)).mean())
    assert critic.weight.grad is before
    assert torch.equal(before, torch.ones(1, 4))
    assert critic.bias.grad is None
    assert trace.num_bytes() == (5 * 4 + 5) * FLOAT  # what tanh gave, and what went into softplus
    assert trace.num_bytes("parameter") == 4 * FLOAT  # the other network's, there anyway
    found = trace_backward(generator, drawn(5, 3), loss=lambda fake: (critic(fake) * 0).sqrt()).first_non_finite
    assert found is not None
    assert (found.module, found.node) == ("(loss)", "SqrtBackward0")


# --- and nothing happened


def test_nothing_changes() -> None:
    model = nn.Sequential(identity(), nn.BatchNorm1d(4), nn.Dropout(), nn.ReLU(True), Does(log_of_a_negative))
    model[0].weight.grad = torch.ones(4, 4)
    gradient = model[0].weight.grad
    state, hooks = copy.deepcopy(model.state_dict()), [copy.copy(vars(m)) for m in model.modules()]
    batch = drawn(6, 4) * 1e4
    before, generator = batch.clone(), torch.get_rng_state()
    assert not trace_backward(model, batch).is_finite
    assert torch.equal(batch, before)
    assert torch.equal(torch.get_rng_state(), generator)
    assert model[0].weight.grad is gradient
    assert torch.equal(gradient, torch.ones(4, 4))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [copy.copy(vars(m)) for m in model.modules()] == hooks
    with torch.no_grad():  # also where the caller has gradients off
        assert trace_backward(model[:1], batch).is_finite


def test_an_operation_in_place_on_what_backward_needs() -> None:
    def forward(x: Tensor) -> Tensor:
        y = x.exp()
        return y.mul_(2)

    with pytest.raises(ModelError) as error:
        trace_backward(nn.Sequential(identity(), Does(forward)), drawn(3, 4))
    assert (error.value.where, error.value.got) == ("1", "(3, 4) float32, written to 1 times")


def test_what_cannot_be_traced() -> None:
    with pytest.raises(ModelError, match="this is no model"):
        trace_backward(lambda x: x, drawn(3, 4))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="this is no loss"):
        trace_backward(identity(), drawn(3, 4), loss="mse")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="targets without a loss"):
        trace_backward(identity(), drawn(3, 4), targets=drawn(3, 4))
    with pytest.raises(ModelError, match="without a shape yet"):
        trace_backward(nn.LazyLinear(3), drawn(3, 4))
    with pytest.raises(ModelError, match=r"within torch\.func"):
        trace_backward(nn.Sequential(identity(), Does(lambda x: torch.func.grad(torch.sum)(x))), drawn(3, 4))
    for loss in (lambda out: out.detach().mean(), lambda out: out.mean().item()):
        with pytest.raises(ModelError, match="nothing that learns leads to the loss"):
            trace_backward(identity(), drawn(3, 4), loss=loss)
    with pytest.raises(ModelError, match="nothing that learns leads to the loss"):
        trace_backward(nn.Sequential(identity(), Does(lambda x: None)), drawn(3, 4))


def test_it_is_a_public_name() -> None:
    assert tk.trace_backward is trace_backward
