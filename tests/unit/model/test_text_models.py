"""Padding changes no answer, a causal token sees nothing behind it, and both models learn what order decides."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from torchkeep.errors import ModelError
from torchkeep.model.text import TextConv, Transformer

MODELS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: TextConv(50, 3, width=8, channels=8, kernels=(1, 2, 4)),
    "transformer": lambda: Transformer(50, 3, width=16, depth=2, heads=2, embedding_std=1.0),
    "causal": lambda: Transformer(50, 3, width=16, depth=2, heads=2, per_token=True, embedding_std=1.0),
}


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def texts(lengths: tuple[int, ...] = (1, 2, 5, 17)) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(0, 50, (length,), generator=draw) for length in lengths]


def padded(rows: list[Tensor], pad_id: int, to: int) -> tuple[Tensor, Tensor]:
    input_ids = torch.full((len(rows), to), pad_id)
    mask = torch.zeros(len(rows), to, dtype=torch.int64)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return input_ids, mask


@pytest.mark.parametrize("pad_id", [0, 7])
@pytest.mark.parametrize("to", [17, 40])
@torch.no_grad()
def test_padding_changes_no_answer(model: nn.Module, pad_id: int, to: int) -> None:
    rows = texts()
    together = model(*padded(rows, pad_id, to))
    for i, row in enumerate(rows):
        alone = model(row[None])[0]
        torch.testing.assert_close(
            together[i][: len(row)] if alone.ndim == 2 else together[i], alone, atol=1e-5, rtol=0
        )
    assert not torch.allclose(together[1][:1], together[2][:1], atol=1e-3)  # the answers do depend on the text


@torch.no_grad()
def test_an_empty_row_gives_numbers(model: nn.Module) -> None:
    assert torch.isfinite(model(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[1, 1, 0], [0, 0, 0]]))).all()


@torch.no_grad()
def test_the_mask_may_be_of_any_type_and_a_text_of_any_length(model: nn.Module) -> None:
    input_ids, mask = padded(texts(), 0, 17)
    for kind in (torch.bool, torch.float32, torch.int32):
        assert torch.equal(model(input_ids, mask.to(kind)), model(input_ids, mask))
    assert torch.isfinite(model(torch.arange(3000)[None] % 50)).all()


@torch.no_grad()
def test_a_causal_token_sees_what_came_before_it_and_nothing_behind() -> None:
    torch.manual_seed(0)
    model = MODELS["causal"]().eval()
    (row,) = texts((12,))
    changed = row.clone()
    changed[6] = (row[6] + 1) % 50
    before, after = model(row[None])[0], model(changed[None])[0]
    assert before.shape == (12, 3)
    assert torch.equal(before[:6], after[:6])
    assert (before[6:] - after[6:]).abs().amax(1).min() > 1e-4  # each later token saw the change


@torch.no_grad()
def test_a_whole_text_is_seen_in_its_order() -> None:
    torch.manual_seed(0)
    for name in ("conv", "transformer"):
        model = MODELS[name]().eval()
        assert not torch.allclose(model(torch.tensor([[3, 4, 5]])), model(torch.tensor([[5, 4, 3]])), atol=1e-4)


def order_task() -> tuple[Tensor, Tensor, Tensor]:
    """Whether 1 comes right before 2 or right behind it, within other tokens and padding."""
    draw = torch.Generator().manual_seed(0)
    input_ids = torch.randint(3, 10, (64, 9), generator=draw)
    label = torch.arange(64) % 2
    input_ids[:, 4] = 1 + label
    input_ids[:, 5] = 2 - label
    mask = torch.ones_like(input_ids)
    mask[::3, 7:] = 0
    return input_ids, mask, label


@pytest.mark.parametrize("name", ["conv", "transformer"])
def test_it_learns_what_only_order_decides(name: str) -> None:
    torch.manual_seed(0)
    made = {
        "conv": lambda: TextConv(10, 2, width=16, channels=16, dropout=0.1),
        "transformer": lambda: Transformer(10, 2, width=16, depth=2, heads=2, dropout=0.0),
    }
    model = made[name]()
    input_ids, mask, label = order_task()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(input_ids, mask), label).backward()
        optimizer.step()
    assert (model.eval()(input_ids, mask).argmax(1) == label).all()


def test_every_parameter_learns(model: nn.Module) -> None:
    input_ids, mask = padded(texts(), 0, 17)
    model.train()(input_ids, mask).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


def test_bf16_goes_through(model: nn.Module) -> None:
    input_ids, mask = padded(texts(), 0, 17)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        low = model(input_ids, mask)
    torch.testing.assert_close(low.float(), model(input_ids, mask), atol=0.1, rtol=0.1)


def test_dropout_is_drawn_in_training_only(model: nn.Module) -> None:
    input_ids, mask = padded(texts(), 0, 17)
    assert torch.equal(model(input_ids, mask), model(input_ids, mask))
    model.train()
    assert not torch.equal(model(input_ids, mask), model(input_ids, mask))


def test_a_width_that_does_not_part_into_heads() -> None:
    with pytest.raises(ModelError, match="width 12, heads 4"):
        Transformer(10, 2, width=12, heads=4)
