"""The model with kept tensors is the full model: equal outputs and gradients, whatever its forward does.

Every case compares one step of the full model with one on kept tensors (equal generators, train mode where learning),
on a batch that the search did not see and of another size. Outputs and gradients agree within 1e-5 of their size: the
frozen part is the same arithmetic, in another batch or without autograd.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchkeep.model.frontier import Frontier, NoFrontierError, compute, find_frontier, recall

SHARED = Path(__file__).parents[3] / "../shared/models/mobilenet_v2.py"
Batch = dict[str, Any]


def images(size: int = 6, seed: int = 0, side: int = 12) -> Batch:
    return {"image": torch.randn(size, 3, side, side, generator=torch.Generator().manual_seed(seed))}


def vectors(size: int = 6, seed: int = 0, width: int = 8, key: str = "x") -> Batch:
    return {key: torch.randn(size, width, generator=torch.Generator().manual_seed(seed))}


def tokens(size: int = 6, seed: int = 0, length: int = 7) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, length + 1, (size, 1), generator=draw)
    ids = torch.randint(1, 30, (size, length), generator=draw)
    return {"input_ids": ids, "attention_mask": (torch.arange(length) < lengths).long()}


def freeze(*modules: nn.Module | nn.Parameter) -> None:
    for module in modules:
        module.requires_grad_(False)
        if isinstance(module, nn.Module):
            module.eval()


def bound(model: nn.Module, *keys: str) -> Callable[[Batch], Any]:
    return lambda batch: model(*[batch[key] for key in keys])


def named(model: nn.Module) -> Callable[[Batch], Any]:
    return lambda batch: model(**batch)


def tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [tensor for value in values for tensor in tensors(value)]


def step(model: nn.Module, run: Callable[[], Any]) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """Outputs and gradients of one step, with generators and buffers put back."""
    model.zero_grad()
    state = copy.deepcopy(dict(model.named_buffers()))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        output = tensors(run())
    sum(t.float().pow(2).sum() for t in output if t.requires_grad).backward()  # type: ignore[union-attr]
    for name, buffer in model.named_buffers():
        buffer.copy_(state[name])
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return [t.detach().clone() for t in output], gradients


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * max(float(other.abs().max()), 1e-3))


def proven(model: nn.Module, forward: Callable[[Batch], Any], make: Callable[..., Batch], keys: list[str]) -> Frontier:
    """The frontier, after proof that the model with kept tensors is the full model."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    example, batch, state = make(6, 0), make(5, 1), torch.get_rng_state()
    found = find_frontier(model, forward, example, keys)
    assert all(torch.equal(tensor, make(6, 0)[key]) for key, tensor in example.items())
    kept = compute(found, model, forward, copy.deepcopy(batch))
    assert torch.equal(torch.get_rng_state(), state)
    as_kept = [tensor.clone() for tensor in kept]
    assert [(tuple(t.shape), t.dtype) for t in kept] == [((5, *c.shape), c.dtype) for c in found.crossings]
    assert found.sample_bytes == sum(t[0].numel() * t.element_size() for t in kept)
    assert not any(tensor.requires_grad for tensor in kept)
    read = {key: value for key, value in copy.deepcopy(batch).items() if key in found.inputs}
    whole, short = (
        step(model, run)
        for run in (lambda: forward(copy.deepcopy(batch)), lambda: recall(found, model, forward, read, kept))
    )
    assert len(whole[0]) == len(short[0])
    for one, other in zip(short[0], whole[0], strict=True):
        close(one, other)
    assert any(gradient is not None for gradient in whole[1].values())
    for name, gradient in whole[1].items():
        if gradient is None:
            assert short[1][name] is None, name
        else:
            close(short[1][name], gradient)  # type: ignore[arg-type]
    assert all(torch.equal(one, other) for one, other in zip(kept, as_kept, strict=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not any("forward" in module.__dict__ for module in model.modules())
    return found


def refused(model: nn.Module, forward: Callable[[Batch], Any], batch: Batch, keys: list[str]) -> str:
    with pytest.raises(NoFrontierError) as caught:
        find_frontier(model, forward, batch, keys)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert str(caught.value) == caught.value.what
    return caught.value.what


def convs(channels: int = 4) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.ReLU(inplace=True),
        nn.Conv2d(channels, 2 * channels, 3, 2), nn.BatchNorm2d(2 * channels), nn.ReLU(inplace=True),
    )  # fmt: skip


class Pooled(nn.Module):
    """Features, a mean, a classifier: the usual form."""

    def __init__(self) -> None:
        super().__init__()
        self.features = convs()
        self.classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 3))

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(self.features(image).mean((2, 3)))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_a_chain_is_kept_behind_its_last_frozen_module() -> None:
    model = nn.Sequential(convs(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    freeze(model[0])
    found = proven(model, bound(model, "image"), images, ["image"])
    assert (found.modules, found.inputs, found.sample_bytes) == (["0"], [], 8 * 4)  # behind the pool, not before it
    assert "3 (Linear) learns" in found.limit


def test_functions_at_the_frontier_are_kept_after_them() -> None:
    model = Pooled()
    freeze(model.features)
    found = proven(model, bound(model, "image"), images, ["image"])  # dropout of the head with equal generators
    [crossing] = found.crossings
    assert (crossing.name, crossing.shape, found.inputs) == ("model:mean", (8,), [])


def test_a_part_of_a_chain() -> None:
    model = Pooled()
    freeze(model.features[0], model.features[1])
    found = proven(model, bound(model, "image"), images, ["image"])
    assert found.modules == ["features.0", "features.1"]
    assert found.crossings[0].shape == (4, 10, 10)


def test_frozen_modules_that_stay_in_train_mode_are_followed_function_by_function() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    found = proven(model, bound(model, "x"), vectors, ["x"])
    assert (found.modules, found.crossings[0].name, found.inputs) == ([], "3:tanh", [])


@pytest.mark.skipif(not SHARED.is_file(), reason="the file shared/models/mobilenet_v2.py beside the repository misses")
@pytest.mark.parametrize("cut", [14, None])
def test_mobilenet(cut: int | None) -> None:
    spec = importlib.util.spec_from_file_location("mobilenet_v2", SHARED)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.build(3)
    freeze(model.features[:cut] if cut else model.features)
    found = proven(model, bound(model, "image"), lambda size, seed: images(size, seed, side=64), ["image"])
    if cut is None:
        assert (found.modules, found.sample_bytes) == (["features"], 1280 * 4)
    else:
        assert found.modules == [f"features.{i}" for i in range(14)]
        assert [(c.name, c.shape) for c in found.crossings] == [("features.13", (96, 4, 4))]


class Residual(nn.Module):
    """Blocks with skips, frozen and learning, and a skip from far before the frontier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(3))
        self.far = nn.Linear(8, 8)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = early = F.relu(self.stem(x - 0.5))
        for block in self.blocks:
            x = x + block(x)
        return self.head(torch.cat([x, self.far(early)], -1))


def test_residuals_and_a_second_crossing() -> None:
    model = Residual()
    freeze(model.stem, model.blocks[0], model.blocks[1])
    found = proven(model, bound(model, "x"), vectors, ["x"])
    assert found.modules == ["stem", "blocks.0", "blocks.1"]
    assert [crossing.name for crossing in found.crossings] == ["model:relu", "model:add"]
    freeze(model.far)
    found = proven(model, bound(model, "x"), vectors, ["x"])
    assert [crossing.name for crossing in found.crossings] == ["model:add", "far"]


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(convs(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.words = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.3))
        self.head = nn.Linear(16, 2)

    def forward(self, image: Tensor, words: Tensor) -> dict[str, Tensor]:
        words = F.dropout(self.words(words), 0.1, training=True)  # learns, and runs first
        image = self.image(image)
        return {"logits": self.head(torch.cat([image, words], 1)), "scale": words.detach().norm(dim=1)}


def test_two_towers_of_which_one_learns() -> None:
    model = Towers()
    freeze(model.image)

    def make(size: int, seed: int) -> Batch:
        return images(size, seed) | vectors(size, seed, key="words")

    found = proven(model, bound(model, "image", "words"), make, ["image", "words"])
    assert (found.modules, found.inputs) == (["image"], ["words"])


def test_an_input_that_both_sides_use_is_still_read() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.skip, self.head = nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = x / 2
            return self.head(self.trunk(x) + self.skip(x))

    model = Both()
    freeze(model.trunk)
    found = proven(model, bound(model, "x"), vectors, ["x"])
    assert (found.inputs, found.crossings[0].name) == (["x"], "trunk")


def test_a_module_called_twice_has_two_crossings() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            one, other = self.trunk(x), self.trunk(-x)
            again = self.trunk(self.mix(one))  # what goes in learns: this call is run
            return self.head(torch.cat([again, other], 1))

    model = Twice()
    freeze(model.trunk)
    found = proven(model, bound(model, "x"), vectors, ["x"])
    assert [(c.name, c.call) for c in found.crossings] == [("trunk", 0), ("trunk", 1)]
    assert found.modules == []  # it is still run, once of three times


def test_weights_tied_to_learning_ones_are_not_frozen() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.middle, self.out = nn.Embedding(30, 8), nn.Linear(8, 8), nn.Linear(8, 30, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.out(self.middle(self.embed(input_ids)))

    model = Tied()
    freeze(model.middle)
    assert "embed (Embedding) learns" in refused(model, bound(model, "input_ids"), tokens(), ["input_ids"])
    model = Tied()
    freeze(model.embed)  # and with it the output's weight
    assert proven(model, bound(model, "input_ids"), tokens, ["input_ids"]).modules == ["embed"]
    chain = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    freeze(chain[0], chain[1])
    chain[1].weight.data = chain[2].weight.data  # tied by their memory alone
    found = proven(chain, bound(chain, "x"), vectors, ["x"])
    assert (found.modules, found.limit) == (["0"], "1 (Linear) learns")


@pytest.mark.parametrize("frozen", [True, False])
def test_writing_in_place_damages_nothing(frozen: bool) -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.act, self.after = nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8)
            self.shift, self.head = nn.Parameter(torch.ones(8)), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x.mul_(2)  # into the batch
            x = self.trunk(x)
            side = x + self.shift
            x = self.after(self.act(x))
            x.add_(1)  # and used by its old name
            return self.head(x + side)

    model = Writes()
    freeze(model.trunk)
    if frozen:
        freeze(model.act, model.after)
    found = proven(model, bound(model, "x"), vectors, ["x"])
    assert [c.name for c in found.crossings] == (["trunk", "after"] if frozen else ["trunk"])


def test_what_learning_code_wrote_without_gradient_is_not_frozen() -> None:
    class Shifts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.after = nn.Linear(8, 8), nn.Linear(8, 8)
            self.shift, self.head = nn.Parameter(torch.ones(8)), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.trunk(x)
            with torch.no_grad():
                x.view(-1, 2, 4).add_(self.shift.view(2, 4))
            return self.head(self.after(x) + self.shift)

    model = Shifts()
    freeze(model.trunk, model.after)
    assert proven(model, bound(model, "x"), vectors, ["x"]).modules == ["trunk"]


def test_a_learning_write_goes_into_a_copy() -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.bias, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.trunk(x)
            y = x.view(-1, 2, 4)
            y += self.bias(torch.ones_like(x)).view(-1, 2, 4)
            return self.head(x)

    model = Adds()
    freeze(model.trunk)
    assert proven(model, bound(model, "x"), vectors, ["x"]).crossings[0].is_written


def test_a_frozen_module_that_writes_into_its_input() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.relu_())

    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.head = nn.Linear(8, 8), Block(), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(self.block(x)) + self.head(x)  # the x that block wrote into

    model = Skips()
    freeze(model.stem, model.block)
    proven(model, bound(model, "x"), vectors, ["x"])


@pytest.mark.parametrize("turn", [lambda x: x.flatten(0, 1), lambda x: x.transpose(0, 1), lambda x: x.sum((0, 1))])
def test_a_lost_sample_axis_is_crossed_before(turn: Callable[[Tensor], Tensor]) -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(turn(self.trunk(x.view(len(x), 2, -1))))

    model = Turned()
    freeze(model.trunk)
    found = proven(model, bound(model, "x"), vectors, ["x"])
    assert [(c.name, c.shape) for c in found.crossings] == [("trunk", (2, 8))]


def test_the_smaller_side_of_a_function_is_kept() -> None:
    class Grown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head = nn.Linear(8, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.trunk(x)
            return self.head(x.relu()) + self.head(x.sigmoid()) + self.head(x[:, None].expand(-1, 9, -1)).sum(1)

    model = Grown()
    freeze(model.trunk)
    found = proven(model, bound(model, "x"), vectors, ["x"])
    assert [(c.name, c.shape) for c in found.crossings] == [("trunk", (4,))]


@pytest.mark.parametrize("layers_frozen", [1, 2])
def test_a_transformer_with_a_mask(layers_frozen: int) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(30, 8)
            self.place = nn.Parameter(torch.randn(1, 7, 8))
            layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
            self.head = nn.Linear(8, 2)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            x = self.embed(input_ids) + self.place[:, : input_ids.shape[1]]
            x = self.encoder(x, src_key_padding_mask=attention_mask == 0)
            weight = attention_mask[:, :, None].to(x.dtype)
            return self.head((x * weight).sum(1) / weight.sum(1))

    model = Encoder()
    freeze(model.embed, model.place, *model.encoder.layers[:layers_frozen])
    found = proven(model, named(model), tokens, ["input_ids", "attention_mask"])
    assert found.modules == ["embed", *(f"encoder.layers.{i}" for i in range(layers_frozen))]
    assert found.inputs == ["attention_mask"]


def test_a_transformer_of_the_hub() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).train()
    freeze(model.bert.embeddings, model.bert.encoder.layer[0])
    model(**tokens(), output_hidden_states=True)  # leaves hooks in each layer, which sleep from now on
    found = proven(model, named(model), tokens, ["input_ids", "attention_mask"])
    assert found.modules == ["bert.embeddings", "bert.encoder.layer.0"]
    assert [(c.name, c.shape) for c in found.crossings] == [("bert.encoder.layer.0", (7, 16))]
    assert found.inputs == ["attention_mask"]
    freeze(model.bert)
    found = proven(model, named(model), tokens, ["input_ids", "attention_mask"])
    assert (found.modules, found.inputs, found.sample_bytes) == (["bert"], [], 16 * 4)


def test_several_results_dicts_and_a_frozen_output() -> None:
    class Trunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(8, 4), nn.Linear(8, 6)

        def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
            return {"maps": [self.one(x) * scale, self.other(x)], "width": 4, "none": None}

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head = Trunk(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            found = self.trunk(x, scale=2.0)
            assert found["none"] is None
            return {"logits": self.head(found["maps"][0]) * found["width"], "embedding": found["maps"][1]}

    model = Named()
    freeze(model.trunk)
    found = proven(model, bound(model, "x"), vectors, ["x"])
    assert [(c.name, c.shape) for c in found.crossings] == [("trunk", (4,)), ("trunk", (6,))]


def test_recurrent_layers_with_samples_on_the_second_axis() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.head = nn.GRU(8, 4), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            outputs, last = self.gru(x.transpose(0, 1))
            return self.head(torch.cat([outputs[0], last[-1]], 1))

    def make(size: int, seed: int) -> Batch:
        return {"x": torch.randn(size, 5, 8, generator=torch.Generator().manual_seed(seed))}

    model = Reader()
    freeze(model.gru)
    found = proven(model, bound(model, "x"), make, ["x"])
    assert [(c.name, c.shape) for c in found.crossings] == [("model:cat", (8,))]


def test_numbers_that_count_the_samples_are_not_kept() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, int]:
            return self.linear(x), len(x)

    class Divides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head = Counts(), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x, count = self.trunk(x)
            return self.head(x) / count

    model = Divides()
    freeze(model.trunk)
    assert proven(model, bound(model, "x"), vectors, ["x"]).modules == ["trunk.linear"]


def test_a_shape_that_depends_on_the_values() -> None:
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.after, self.head = nn.Linear(8, 8), nn.Linear(1, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.trunk(x)
            return self.head(self.after(x[x > 0.3][:, None]).mean(0) + x)

    model = Picks()
    freeze(model.trunk, model.after)
    reason = refused(model, bound(model, "x"), vectors(), ["x"])
    assert "depends on" in reason or "depend on" in reason


def test_evaluation_takes_the_same_kept_tensors() -> None:
    model = Pooled()
    freeze(model.features)
    forward = bound(model, "image")
    found = find_frontier(model, forward, images(), ["image"])
    model.eval()
    batch = images(3, 2)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            close(recall(found, model, forward, {}, compute(found, model, forward, batch)), forward(batch))


def test_autocast_around_both() -> None:
    model = Pooled()
    freeze(model.features)
    forward = bound(model, "image")
    found = find_frontier(model, forward, images(), ["image"])
    model.eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        kept = compute(found, model, forward, images())
        assert kept[0].dtype == torch.bfloat16
        assert torch.equal(recall(found, model, forward, {}, kept), forward(images()))


def test_a_copy_of_the_model_takes_the_same_frontier() -> None:
    model = Pooled()
    freeze(model.features)
    found = find_frontier(model, bound(model, "image"), images(), ["image"])
    average = copy.deepcopy(model).eval()
    kept = compute(found, average, bound(average, "image"), images())
    with torch.no_grad():
        close(recall(found, average, bound(average, "image"), {}, kept), average(images()["image"]))


def test_a_learning_stem_before_a_frozen_middle() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    freeze(model[1])
    assert refused(model, bound(model, "x"), vectors(), ["x"]) == "0 (Linear) learns, on the raw input"


def test_nothing_frozen_and_all_frozen() -> None:
    model = nn.Linear(8, 2)
    assert refused(model, bound(model, "x"), vectors(), ["x"]) == "nothing is frozen"
    freeze(model)
    assert "whole model is frozen" in refused(model, bound(model, "x"), vectors(), ["x"])


def test_batch_statistics_in_a_frozen_part() -> None:
    model = Pooled()
    model.features.requires_grad_(False)
    assert "features.1 (BatchNorm2d) is frozen and in train mode" in refused(
        model, bound(model, "image"), images(), ["image"]
    )


def test_batch_statistics_in_the_head_are_its_own() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, affine=False), nn.Linear(8, 2))
    freeze(model[0])
    found = proven(model, bound(model, "x"), vectors, ["x"])
    assert found.limit == "1 (BatchNorm1d) is in train mode"


def test_dropout_before_and_in_the_frozen_part() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 8), nn.Linear(8, 2))
    freeze(model[1])
    assert "0 (Dropout) draws random numbers (dropout)" in refused(model, bound(model, "x"), vectors(), ["x"])
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Linear(8, 2))
    freeze(model[0], model[2])
    found = proven(model, bound(model, "x"), vectors, ["x"])
    assert (found.modules, found.limit) == (["0"], "1 (Dropout) draws random numbers (dropout)")


def test_noise_that_eval_mode_does_not_end() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x + torch.rand_like(x))

    model = nn.Sequential(Noisy(), nn.Linear(8, 2))
    freeze(model[0])
    assert "0 (Noisy) draws random numbers (rand_like)" in refused(model, bound(model, "x"), vectors(), ["x"])


def test_a_buffer_that_changes() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.register_buffer("mean", torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            x = self.linear(x)
            self.mean.lerp_(x.mean(0), 0.1)
            return x - self.mean

    model = nn.Sequential(Counts(), nn.Linear(8, 2))
    freeze(model[0])
    forward = bound(model, "x")
    found = proven(model, forward, vectors, ["x"])  # what lies before the buffer's change is kept
    assert (found.modules, found.limit) == (["0.linear"], "0 (Counts) changes a buffer")


def test_samples_that_depend_on_one_another() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x - x.mean(0))

    model = nn.Sequential(Centred(), nn.Linear(8, 2))
    freeze(model[0])
    assert refused(model, bound(model, "x"), vectors(), ["x"]) == "samples depend on one another before 0"


def test_values_that_differ_from_call_to_call() -> None:
    class Drifts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.calls = nn.Linear(8, 8), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.linear(x) * self.calls

    model = nn.Sequential(Drifts(), nn.Linear(8, 2))
    freeze(model[0])
    assert "not the same when it is computed again" in refused(model, bound(model, "x"), vectors(), ["x"])


def test_user_hooks_see_what_they_saw() -> None:
    model = Pooled()
    freeze(model.features)
    seen: list[Tensor] = []
    model.features[3].register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    forward = bound(model, "image")
    found = proven(model, forward, images, ["image"])
    assert "features" not in found.modules
    assert "features.3" not in found.modules or len(found.crossings) > 1
    seen.clear()
    batch = images(4, 5)
    kept = compute(found, model, forward, batch)
    forward(batch)
    expected = seen[-1]
    recall(found, model, forward, {}, kept)
    assert type(seen[-1]) is Tensor
    close(seen[-1], expected)


def test_values_that_python_reads_are_there() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.trunk(x)
            if bool(torch.isfinite(x).all()):
                x = x.clamp(max=1.0)
            return self.head(x)

    model = Reads()
    freeze(model.trunk)
    assert proven(model, bound(model, "x"), vectors, ["x"]).crossings[0].name == "trunk"


def untold() -> Callable[[Tensor], Tensor]:
    """A compiled function, of whose calls no torch function tells."""
    with warnings.catch_warnings(action="ignore"):
        return torch.jit.trace(lambda x: x * 2, torch.ones(2, 8))


class Hides(nn.Module):
    def __init__(self, behind: bool) -> None:
        super().__init__()
        self.trunk, self.after, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.behind = behind
        self.untold = untold()

    def forward(self, x: Tensor) -> Tensor:
        y = self.trunk(x)
        return self.head(y + self.untold(self.after(y) if self.behind else x))


def test_a_use_of_the_input_that_nobody_tells_of() -> None:
    model = Hides(behind=False)
    freeze(model.trunk)
    found = proven(model, bound(model, "x"), vectors, ["x"])
    assert (found.modules, found.inputs) == (["trunk"], ["x"])


def test_a_use_of_frozen_results_that_nobody_tells_of() -> None:
    model = Hides(behind=True)
    freeze(model.trunk, model.after)
    assert "cannot be followed" in refused(model, bound(model, "x"), vectors(), ["x"])


def test_a_result_of_an_unknown_kind_is_followed_inside() -> None:
    class Boxes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> SimpleNamespace:
            return SimpleNamespace(features=self.linear(x).relu())

    class Opens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head = Boxes(), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.trunk(x).features)

    model = Opens()
    freeze(model.trunk)
    found = proven(model, bound(model, "x"), vectors, ["x"])
    assert (found.modules, found.crossings[0].name) == (["trunk.linear"], "trunk:relu")


def counted(model: nn.Module) -> dict[str, int]:
    """How often each module's own code runs."""
    calls: dict[str, int] = {}

    def count(path: str, original: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            calls[path] = calls.get(path, 0) + 1
            return original(*args, **kwargs)

        return forward

    for path, module in model.named_modules():
        module.forward = count(path, module.forward)  # type: ignore[method-assign]
    return calls


def test_each_side_runs_its_own_modules_alone() -> None:
    model = Pooled()
    freeze(model.features)
    forward = bound(model, "image")
    found = find_frontier(model, forward, images(), ["image"])
    calls = counted(model)
    kept = compute(found, model, forward, images())
    assert not any(path.startswith("classifier") for path in calls)
    assert calls["features.5"] == 1
    calls.clear()
    recall(found, model, forward, {}, kept)
    assert calls == {"": 1, "classifier": 1, "classifier.0": 1, "classifier.1": 1}
    assert all("forward" in module.__dict__ for module in model.modules())  # the user's own stay where they were


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_model_is_as_before_after_an_error(error: type[BaseException]) -> None:
    class Fails(Pooled):
        fail = False

        def forward(self, image: Tensor) -> Tensor:
            x = self.features[:3](image)
            if self.fail:
                raise error
            return self.classifier(self.features[3:](x).mean((2, 3)))

    model = Fails()
    freeze(model.features)
    forward = bound(model, "image")
    found = find_frontier(model, forward, images(), ["image"])
    kept = compute(found, model, forward, images())
    modes = [module.training for module in model.modules()]
    model.fail = True
    runs = [
        (lambda: compute(found, model, forward, images()), error),
        (lambda: recall(found, model, forward, {}, kept), error),
        (lambda: find_frontier(model, forward, images(), ["image"]),
         NoFrontierError if issubclass(error, Exception) else error),
    ]  # fmt: skip
    for run, expected in runs:
        with pytest.raises(expected):
            run()
        assert not any("forward" in module.__dict__ for module in model.modules())
        assert [module.training for module in model.modules()] == modes
    model.fail = False
    proven(model, forward, images, ["image"])


def test_a_forward_that_takes_another_way_is_an_error_not_a_result() -> None:
    class Turns(nn.Module):
        turn = False

        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.trunk(x)
            return self.head(x.sigmoid() if self.turn else x.relu())

    from torchkeep.errors import ModelError

    model = Turns()
    freeze(model.trunk)
    forward = bound(model, "x")
    found = find_frontier(model, forward, vectors(), ["x"])
    kept = compute(found, model, forward, vectors())
    model.turn = True
    with pytest.raises(ModelError, match="takes another way"):
        recall(found, model, forward, {}, kept)
    with pytest.raises(ModelError, match="another shape"):
        recall(found, model, forward, {}, [kept[0][:, :4]])


def test_one_sample_is_enough_and_generators_stay() -> None:
    model = Pooled()
    freeze(model.features)
    state = torch.get_rng_state()
    assert find_frontier(model, bound(model, "image"), images(1), ["image"]).sample_bytes == 32
    assert torch.equal(torch.get_rng_state(), state)
