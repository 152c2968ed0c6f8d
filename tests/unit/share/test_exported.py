"""Graphs in place of classes: equal to the model on every size, and closed to what is hostile."""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from torchkeep.contracts import Json
from torchkeep.errors import ModelError
from torchkeep.model.build import BUILT_IN
from torchkeep.share.exported import export_graph
from torchkeep.share.graph import GraphModel
from torchkeep.share.operations import NAMES, find_operation

Made = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def tokens(batch: int = 3, length: int = 10) -> Tensor:
    return torch.randint(1, 90, (batch, length), generator=torch.Generator().manual_seed(length))


def text(batch: int = 3, length: int = 10) -> dict[str, Tensor]:
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[-1, length // 2 :] = 0
    return {"input_ids": tokens(batch, length), "attention_mask": mask}


def read_back(graph: Json, tensors: dict[str, Tensor]) -> GraphModel:
    """As a stranger has it: from the bytes alone."""
    return GraphModel(orjson.loads(orjson.dumps(graph)), {name: tensor.clone() for name, tensor in tensors.items()})


def leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    value = vars(value) if isinstance(value, Found) else value
    items = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else []
    return [leaf for item in items for leaf in leaves(item)]


def assert_same(model: nn.Module, again: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    for grad in (False, True):  # only without gradients results are overwritten
        with torch.set_grad_enabled(grad):
            expected, found = leaves(model(*copy.deepcopy(args), **kwargs, **cache)), leaves(again(*args, **kwargs))
            assert len(expected) == len(found) > 0
            for one, other in zip(expected, found, strict=True):
                torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)  # attention's fast path rounds elsewhere


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]):
        super().__init__()
        self.layers = kind(8, 16, 2, batch_first=True, bidirectional=True, dropout=0.5)

    def forward(self, x: Tensor) -> Any:
        return self.layers(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor, padded: Tensor) -> Any:
        return self.attention(x, x, x, key_padding_mask=padded)


@dataclass
class Found:
    logits: Tensor
    parts: list[Tensor]


class Changes(nn.Module):
    """Writes into a view, into a fresh tensor, and into its input."""

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
        y = x * 2
        y[:, 0] = 1.0
        z = x + 1
        z.relu_().mul_(scale)
        x.add_(1)
        w = torch.stack([x, z])
        w[0].sigmoid_()
        gated = F.gelu(x * 2, approximate="tanh")
        return {"y": y, "found": Found(z, [w, x]), "pair": (gated, None), "scale": scale}


class Zoo(nn.Module):
    """Convolutions, norms and samplings that the others lack."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding="same"), nn.InstanceNorm2d(8), nn.GroupNorm(2, 8), nn.SiLU(inplace=True),
            nn.BatchNorm2d(8, track_running_stats=False), nn.PReLU(), nn.AvgPool2d(2), nn.Upsample(scale_factor=2),
            nn.ConvTranspose2d(8, 4, 2, 2), nn.Hardswish(inplace=True), nn.Dropout2d(0.5), nn.PixelShuffle(2),
            nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.normalize(self.body(x), dim=1)
        best, place = y.topk(2, dim=1)
        return F.pad(y, (1, 0), value=float("-inf")), best + y.gather(1, place).softmax(1).log()


BUILDERS: dict[str, Callable[[], Made]] = {
    "convnet": lambda: (BUILT_IN["convnet"](3, 5), (numbers(3, 3, 16, 16),), {}),
    "resnet18": lambda: (BUILT_IN["resnet18"](3, 5), (numbers(2, 3, 32, 32),), {}),
    "mobilenet_v2": lambda: (BUILT_IN["mobilenet_v2"](3, 5), (numbers(2, 3, 32, 32),), {}),
    "vit": lambda: (BUILT_IN["vit"](3, 5, 16, depth=2), (numbers(3, 3, 16, 16),), {}),
    "mlp": lambda: (BUILT_IN["mlp"](4, 5, cardinalities=(9, 9), waves=4), (numbers(3, 4), tokens(3, 2) % 9), {}),
    "textconv": lambda: (BUILT_IN["textconv"](100, 5), (), text()),
    "transformer": lambda: (BUILT_IN["transformer"](100, 5, depth=2), (), text()),
    "per token": lambda: (BUILT_IN["transformer"](100, 5, depth=1, per_token=True), (tokens(),), {}),
    "audioconv": lambda: (BUILT_IN["audioconv"](16, 5), (numbers(2, 16, 40), torch.tensor([40, 20])), {}),
    "audioconv alone": lambda: (BUILT_IN["audioconv"](16, 5), (numbers(2, 16, 40),), {}),
    "lstm": lambda: (Recurrent(nn.LSTM), (numbers(3, 7, 8),), {}),
    "gru": lambda: (Recurrent(nn.GRU), (numbers(3, 7, 8),), {}),
    "attention": lambda: (Attention(), (numbers(3, 7, 16), torch.arange(7).expand(3, 7) > 4), {}),
    "encoder": lambda: (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2), (numbers(3, 7, 16),), {},
    ),
    "encoder and decoder": lambda: (
        nn.Transformer(16, 4, 1, 1, 32, batch_first=True), (numbers(3, 7, 16), numbers(3, 5, 16)), {},
    ),
    "zoo": lambda: (Zoo(), (numbers(2, 3, 8, 8),), {}),
    "changes": lambda: (Changes(), (numbers(3, 4),), {"scale": 0.5}),
}  # fmt: skip


def with_batch(value: Any, count: int) -> Any:
    return torch.cat([value] * 3)[:count] if isinstance(value, Tensor) else value


@pytest.mark.parametrize("name", BUILDERS)
def test_a_graph_gives_what_the_model_gives_for_any_batch(name: str) -> None:
    torch.manual_seed(0)
    model, args, kwargs = BUILDERS[name]()
    graph, tensors = export_graph(model, args, kwargs)
    assert graph["batch"] == "any"
    again = read_back(graph, tensors)
    model.eval()
    for count in (2, 1, 5):
        own_args = tuple(with_batch(value, count) for value in args)
        assert_same(model, again, own_args, {key: with_batch(v, count) for key, v in kwargs.items()})
    assert set(again.state_dict()) == set(tensors) >= set(model.state_dict())
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in again.state_dict().items()
               if key in model.state_dict())  # fmt: skip


def huggingface() -> dict[str, Callable[[], Made]]:
    hub = pytest.importorskip("transformers")
    sizes = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert = hub.BertConfig(**sizes, intermediate_size=64)
    distil = hub.DistilBertConfig(vocab_size=100, dim=32, n_layers=2, n_heads=4, hidden_dim=64)
    gpt2 = hub.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    llama = hub.LlamaConfig(**sizes, intermediate_size=64, num_key_value_heads=2)
    seen = {"num_attention_heads": 4, "intermediate_size": 64, "image_size": 32, "patch_size": 8}
    vit = hub.ViTConfig(hidden_size=32, num_hidden_layers=2, **seen)
    resnet = hub.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    image = {"pixel_values": numbers(2, 3, 32, 32)}
    return {
        "bert": lambda: (hub.BertForSequenceClassification(bert), (), text()),
        "distilbert": lambda: (hub.DistilBertForSequenceClassification(distil), (), text()),
        "gpt2": lambda: (hub.GPT2LMHeadModel(gpt2), (), text()),
        "llama": lambda: (hub.LlamaForCausalLM(llama), (), text()),
        "vit": lambda: (hub.ViTForImageClassification(vit), (), image),
        "resnet": lambda: (hub.ResNetForImageClassification(resnet), (), image),
    }


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama", "vit", "resnet"])
def test_models_of_transformers_load_without_transformers(name: str) -> None:
    torch.manual_seed(0)
    model, args, kwargs = huggingface()[name]()
    graph, tensors = export_graph(model, args, kwargs)
    again = read_back(graph, tensors)
    sizes = (
        [text(2, 7), text(1, 1), text(4, 23)] if "input_ids" in kwargs else [{"pixel_values": numbers(5, 3, 32, 32)}]
    )
    for own in [kwargs, *sizes]:
        assert_same(model.eval(), again, args, own)
    assert set(again(**kwargs)) == {"logits"}
    assert set(again.state_dict()) <= {*tensors, *model.state_dict()}


def test_an_operation_stays_whole_where_it_is_fast() -> None:
    graph, _ = export_graph(BUILT_IN["transformer"](100, 5, depth=1), (), text())
    names = {node["op"] for node in graph["nodes"]}
    whole = ("scaled_dot_product_attention", "layer_norm", "gelu", "embedding", "linear")
    assert {f"aten.{name}.default" for name in whole} <= names
    graph, _ = export_graph(BUILT_IN["mobilenet_v2"](3, 5), (numbers(2, 3, 32, 32),))
    assert len({node["op"] for node in graph["nodes"]}) == 6


def test_nothing_of_the_model_is_changed() -> None:
    model = BUILT_IN["convnet"](3, 5)
    model.train()
    model.features[1].eval()
    model.head.weight.requires_grad = False
    modes = {name: module.training for name, module in model.named_modules()}
    before, image = copy.deepcopy(model.state_dict()), numbers(2, 3, 16, 16)
    torch.manual_seed(3)
    random.seed(3)
    states, kept = (torch.get_rng_state(), random.getstate()), image.clone()
    export_graph(model, (image,))
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(image, kept)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert not model.head.weight.requires_grad
    assert torch.backends.mha.get_fastpath_enabled()


def test_an_example_of_one_sample_does() -> None:
    model = BUILT_IN["convnet"](3, 5).eval()
    again = read_back(*export_graph(model, (numbers(1, 3, 16, 16),)))
    assert_same(model, again, (numbers(4, 3, 16, 16),), {})


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] == 3 else x


def test_sizes_that_the_code_fixes_are_stated_and_kept() -> None:
    graph, tensors = export_graph(Fixed(), (numbers(3, 4),))
    assert (graph["batch"], graph["axes"]) == (3, {})
    again = read_back(graph, tensors)
    assert torch.equal(again(numbers(3, 4)), numbers(3, 4) * 2)
    with pytest.raises(ModelError, match="takes other inputs"):
        again(numbers(2, 4))
    assert export_graph(nn.ReLU(), (numbers(3, 4),), dynamic_batch=False)[0]["batch"] == 3


class Sized(nn.Module):
    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        return x * len(x) * scale, len(x)


def test_a_size_among_the_outputs_is_no_constant_for_other_sizes() -> None:
    graph, tensors = export_graph(Sized(), (numbers(3, 4), 2.0))
    assert graph["batch"] == 3
    again = read_back(graph, tensors)
    assert again(numbers(3, 4))[1] == again(numbers(3, 4), 2.0)[1] == 3
    assert torch.equal(again(x=numbers(3, 4))[0], numbers(3, 4) * 6)
    with pytest.raises(ModelError, match="takes other inputs"):
        again(numbers(3, 4), 3.0)


def test_the_longest_text_is_stated() -> None:
    hub = pytest.importorskip("transformers")
    config = hub.BertConfig(vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                            intermediate_size=16, max_position_embeddings=32)  # fmt: skip
    graph, tensors = export_graph(hub.BertModel(config), (), text())
    assert graph["axes"]["length"] == [1, 32]
    with pytest.raises(ModelError, match="length 33"):
        read_back(graph, tensors)(**text(2, 33))


class Depends(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x


class Draws(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x) + torch.rand_like(x)


class Counts(nn.Module):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x * self.calls


class Foreign(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x, object()


@pytest.mark.parametrize(
    ("model", "reason"),
    [(Depends(), "data-dependent"), (Draws(), "aten"), (Counts(), "changes its own state"), (Foreign(), "object")],
)
def test_what_cannot_be_a_graph_is_refused_with_its_reason(model: nn.Module, reason: str) -> None:
    with pytest.raises(ModelError) as caught:
        export_graph(model, (numbers(2, 3),))
    assert reason in caught.value.got
    assert 'code = "…"' in caught.value.fix


def test_tied_parameters_are_kept_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(100, 8)
            self.head = nn.Linear(8, 100, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(self.embedding(input_ids))

    model = Tied()
    graph, tensors = export_graph(model, (tokens(),))
    assert list(tensors) == graph["parameters"] == ["embedding.weight"]
    assert_same(model, read_back(graph, tensors), (tokens(2, 4),), {})


def test_a_graph_can_be_trained_moved_copied_and_exported_again() -> None:
    torch.manual_seed(0)
    model, args, kwargs = BUILDERS["transformer"]()
    graph, tensors = export_graph(model, args, kwargs)
    again = read_back(graph, tensors)
    assert export_graph(again, args, kwargs)[0] == graph
    assert list(inspect.signature(again.forward).parameters) == ["input_ids", "attention_mask"]
    dims = {name: {0: torch.export.Dim("batch")} for name in kwargs}
    program = torch.export.export(again, (), kwargs, dynamic_shapes=dims).module()
    torch.testing.assert_close(program(**text(5)), again(**text(5)))
    with torch.no_grad():
        assert torch.equal(torch.compile(again, backend="eager")(**kwargs), again(**kwargs))

    for one in (model.eval(), again):
        F.cross_entropy(one(**kwargs), torch.tensor([0, 1, 2])).backward()
    own = dict(model.named_parameters())
    assert all(parameter.requires_grad for parameter in again.parameters())
    for name, parameter in again.named_parameters():
        torch.testing.assert_close(parameter.grad, own[name].grad)
    twin = copy.deepcopy(again).double()
    assert next(again.parameters()).dtype == torch.float32
    assert next(twin.parameters()).dtype == torch.float64


def test_tensors_are_made_where_the_parameters_are() -> None:
    model, args, kwargs = BUILDERS["transformer"]()
    graph, tensors = export_graph(model, args, kwargs)
    assert "device" not in orjson.dumps(graph).decode()
    on_meta = read_back(graph, tensors).to("meta")
    assert on_meta(**{name: value.to("meta") for name, value in kwargs.items()}).device.type == "meta"


# --- what is hostile


def linear() -> tuple[Json, dict[str, Tensor]]:
    graph, tensors = export_graph(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), (numbers(2, 4),))
    return copy.deepcopy(graph), tensors


def node(name: Any, *args: Any, **kwargs: Any) -> Json:
    return {"op": name, "args": list(args), "kwargs": kwargs}


X: Json = {"$input": 0}
LAST: Json = {"$node": 1}
HOSTILE_NODES: dict[str, Json] = {
    "unknown": node("aten.nothing.default", X), "system": node("os.system", "true"), "eval": node("eval", "1"),
    "dotted": node("torch.ops.aten.relu.default", X), "prefix": node("aten.relu", X),
    "dunder": node("aten.__class__.mro"), "dunder op": node("__import__", "os"),
    "namespace": node("prim.device.default", X), "inplace": node("aten.relu_.default", X),
    "file": node("aten.from_file.default", "/etc/passwd"), "empty": node("aten.empty.memory_format", [9]),
    "chance": node("aten.rand.default", [2]), "strided": node("aten.as_strided.default", X, [99], [1]),
    "no text": node(["aten.relu.default"], X), "number": node(7), "none": node(None),
    "forward": node("aten.relu.default", {"$node": 3}), "itself": node("aten.relu.default", {"$node": 2}),
    "negative": node("aten.relu.default", {"$node": -1}), "bool": node("aten.relu.default", {"$node": True}),
    "no input": node("aten.relu.default", {"$input": 1}), "no tensor": node("aten.relu.default", {"$tensor": "x"}),
    "two refs": node("aten.relu.default", {"$node": 0, "$input": 0}),
    "unhashable": node("aten.relu.default", {"$tensor": []}),
    "few": node("aten.relu.default"), "many": node("aten.relu.default", X, X), "text": node("aten.relu.default", "x"),
    "list": node("aten.relu.default", [X]), "int": node("aten.select.int", X, 0.5, 0),
    "huge int": node("aten.select.int", X, 0, 1 << 64),
    "tensor for int": node("aten.select.int", X, X, 0), "int for list": node("aten.view.default", X, 4),
    "nan": node("aten.add.Tensor", X, float("nan")), "nan text": node("aten.add.Tensor", X, {"$float": "1e9"}),
    "dtype": node("aten.to.dtype", X, {"$dtype": "os"}), "layout": node("aten.zeros.default", [2], layout=1),
    "device": node("aten.zeros.default", [2], device="cuda"), "keyword": node("aten.relu.default", X, self=X),
    "generator": node("aten.zeros.default", [2], generator=1), "args": {"op": "aten.relu.default", "args": {"0": X}},
    "more keys": {**node("aten.relu.default", X), "code": "1"}, "no dict": ["aten.relu.default", X],
    "kwargs": {"op": "aten.relu.default", "args": [X], "kwargs": [1]},
    "sdpa": node("aten.scaled_dot_product_attention.default", X, X, X, None, 0.5),
    "lstm": node("aten.lstm.input", X, [X, X], [X], True, 1, 0.5, True, False, True),
    "statistics": node("aten.batch_norm.default", X, None, None, X, X, True, 0.1, 1e-5, True),
    "variance": node("aten.batch_norm.default", X, None, None, None, X, True, 0.1, 1e-5, True),
    "long text": node("aten.einsum.default", "i" * 201, [X]), "item of tensor": node("item", X, 0),
    "memory format": node("aten.contiguous.default", X, memory_format={"$memory_format": "__class__"}),
}  # fmt: skip


class Watched(TorchDispatchMode):
    """Keeps the name of every operation that torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran.add(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", HOSTILE_NODES)
def test_a_node_that_is_not_allowed_is_refused_before_anything_runs(name: str) -> None:
    graph, tensors = linear()
    graph["nodes"].append(HOSTILE_NODES[name])
    with Watched() as watched, pytest.raises(ModelError):
        GraphModel(graph, tensors)
    assert watched.ran == set()


def nested(depth: int) -> Json:
    tree: Json = {"$leaf": 0}
    for _ in range(depth):
        tree = {"list": [tree]}
    return tree


HOSTILE_GRAPHS: dict[str, Json] = {
    "deep output": {"output": nested(40)}, "deepest output": {"output": nested(5000)},
    "deep input": {"inputs": [{"name": "input", "value": nested(40)}]},
    "million": {"nodes": [None] * 1_000_000}, "no nodes": {"nodes": {}}, "outputs": {"outputs": [{"$node": 9}]},
    "no leaf": {"output": {"$leaf": 1}}, "leaf": {"output": {"$leaf": "0"}}, "tag": {"output": {"object": [1]}},
    "name": {"inputs": [{"name": "a b", "value": {"$leaf": 0}}]},
    "number": {"inputs": [{"name": 1, "value": {"$leaf": 0}}]},
    "twice": {"inputs": [{"name": "a", "value": {"$leaf": 0}}] * 2}, "no input": {"inputs": []},
    "positional": {"positional": 2}, "true": {"positional": True},
    "axes": {"axes": {"batch": ["1", None]}},
    "leaves": {"leaves": [{"dtype": "object", "shape": [1]}]},
    "shape": {"leaves": [{"dtype": "float32", "shape": ["x"]}]},
    "parameters": {"parameters": ["nobody"]}, "batch": {"batch": "none"}, "unknown key": {"code": "print(1)"},
    "list in output": {"outputs": [[{"$node": 0}]]},
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_GRAPHS)
def test_a_graph_of_another_form_is_refused(name: str) -> None:
    graph, tensors = linear()
    with pytest.raises(ModelError):
        GraphModel({**graph, **HOSTILE_GRAPHS[name]}, tensors)


@pytest.mark.parametrize("graph", [None, [], "x", 1, {}, {"nodes": []}])
def test_what_is_no_graph_is_refused(graph: Json) -> None:
    with pytest.raises(ModelError):
        GraphModel(graph, {})


@pytest.mark.parametrize("name", ["__class__", "forward", "_plan", "a.__init__", "", "a..b", "training", "0.weight.x"])
def test_a_tensor_cannot_take_a_place_of_the_model(name: str) -> None:
    graph, tensors = linear()
    with pytest.raises(ModelError):
        GraphModel(graph, {**tensors, name: torch.ones(1)})


def test_a_missing_tensor_is_refused() -> None:
    graph, tensors = linear()
    with pytest.raises(ModelError):
        GraphModel(graph, {"0.bias": tensors["0.bias"]})


def grown(*nodes: Json) -> GraphModel:
    graph, tensors = linear()
    graph["nodes"] += nodes
    graph["outputs"] = [{"$node": len(graph["nodes"]) - 1}]
    return GraphModel(graph, tensors)


HUGE: dict[str, list[Json]] = {
    "full": [node("aten.full.default", [1 << 40], 1)], "arange": [node("aten.arange.default", 1 << 40)],
    "zeros": [node("aten.zeros.default", [1 << 20, 1 << 20, 1 << 20])], "eye": [node("aten.eye.default", 1 << 18)],
    "repeat": [node("aten.repeat.default", X, [1 << 20, 1 << 20])], "pad": [node("aten.pad.default", X, [0, 1 << 40])],
    "expand": [node("aten.expand.default", {"$tensor": "0.bias"}, [1 << 40, 3])],
    "outer": [node("aten.full.default", [1 << 20], 1), node("aten.outer.default", {"$node": 2}, {"$node": 2})],
    "doubled": [node("aten.cat.default", [{"$node": 1 + i}, {"$node": 1 + i}]) for i in range(60)],
    "at once": [node("aten.full.default", [1 << 25], 1) for _ in range(9)]
    + [node("aten.cat.default", [{"$node": 2 + i} for i in range(9)])],
    "product": [node("aten.sym_size.int", X, 1)]
    + [node("int.mul", {"$node": 2 + i}, {"$node": 2 + i}) for i in range(9)],
    "by zero": [node("int.mod", 1, 0)], "no item": [node("aten.unbind.int", X), node("item", {"$node": 2}, 99)],
}  # fmt: skip


@pytest.mark.parametrize("name", HUGE)
def test_what_outgrows_its_inputs_is_refused_before_it_is_allocated(name: str) -> None:
    model = grown(*HUGE[name])
    with pytest.raises(ModelError, match="an operation of the graph fails"):
        model(numbers(2, 4))


def test_a_place_outside_a_table_is_one_error() -> None:
    model = grown(
        node("aten.to.dtype", X, {"$dtype": "int64"}),
        node("aten.embedding.default", {"$tensor": "0.weight"}, {"$node": 2}),
    )
    with pytest.raises(ModelError, match="an operation of the graph fails"):
        model(numbers(2, 4) * 1000)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((), {}), ((numbers(2, 4), 1), {}), ((numbers(2, 5),), {}), ((numbers(2, 4).long(),), {}), ((None,), {}),
     ((numbers(2, 4),), {"more": 1}), (([1.0],), {}), ((numbers(4),), {})],
)  # fmt: skip
def test_other_inputs_are_refused(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="takes other inputs"):
        grown()(*args, **kwargs)


def test_the_table_holds_plain_maths_alone() -> None:
    no_maths = {torch.Tag.inplace, torch.Tag.inplace_view, torch.Tag.data_dependent_output}
    chance = set()
    for name in NAMES:
        function = find_operation(name).function
        if not name.startswith("aten."):
            continue
        assert str(function) == name
        assert not function._schema.is_mutable
        assert not no_maths & set(function.tags)
        if torch.Tag.nondeterministic_seeded in function.tags:
            chance.add(name)
            assert {"train", "dropout_p"} & {argument.name for argument in find_operation(name).arguments}
    assert len(chance) == 5  # recurrent layers and attention, whose dropout a graph may not ask for


def test_an_operation_in_place_takes_the_same_arguments() -> None:
    twins = [operation for operation in map(find_operation, NAMES) if operation.in_place]
    assert len(twins) == 8
    for operation in twins:
        pair = (operation.function, operation.in_place)
        own, other = ([(row.name, str(row.type)) for row in one._schema.arguments[1:]] for one in pair)
        assert own == other


def test_a_fresh_result_shares_no_memory() -> None:
    fresh = [operation for operation in map(find_operation, NAMES) if operation.is_fresh]
    assert not any(row.alias_info for operation in fresh for row in operation.function._schema.returns)
