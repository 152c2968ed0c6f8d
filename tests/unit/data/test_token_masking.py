"""Augmentations of texts: which tokens are hidden, that chance is keyed, and what a callable may do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from torchkeep.chance import ChanceKey
from torchkeep.data.dataset import Part
from torchkeep.data.loader import Loader
from torchkeep.data.sources import DataSettings, open_data
from torchkeep.data.splits import split
from torchkeep.data.text import TextBlocks, TextTable
from torchkeep.data.tokens import ByteTokenizer, HubTokenizer, WordTokenizer
from torchkeep.errors import BadSampleError, DataError, SettingsError

WORDS = [f"w{number}" for number in range(50)]
RNG = np.random.default_rng(0)
TEXTS = [" ".join(RNG.choice(WORDS, int(size))) for size in RNG.integers(1, 120, 400)]
FRAME = pa.table({"text": TEXTS, "label": [i % 2 for i in range(len(TEXTS))]})
KEY = ChanceKey(3, 1)


def texts(*augment: Any, frame: pa.Table = FRAME, **options: Any) -> TextTable:
    return TextTable(frame, augment=augment, **options)


def all_tokens(data: Any, key: ChanceKey = KEY) -> Tensor:
    return torch.cat([data.read(index, key)["input_ids"] for index in range(len(data))])


def hub(mask: bool) -> HubTokenizer:
    """A tokenizer with [CLS] and [SEP] about a text, and a token <x> that is said to be special."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

    names = ["[SEP]", "[UNK]", "[CLS]", "[PAD]", *WORDS, *(["[MASK]"] if mask else [])]
    made = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([AddedToken("<x>", special=True)])
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 0)]
    )
    return HubTokenizer(made.to_str(), "made here")


# --- what is hidden


@pytest.mark.parametrize("plan", [{"workers": 0}, {"workers": 2, "backend": "threads"}])
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_sample_is_masked_alike_in_every_batch(plan: dict[str, Any], epoch: int) -> None:
    data, key = texts("token_mask"), ChanceKey(5, epoch)
    loader = Loader(data, 7, shuffle=True, seed=5, **plan)
    seen = {}
    for _ in range(epoch + 1):
        for batch in loader:
            lengths = batch["attention_mask"].sum(1).tolist()
            for index, row, length in zip(batch["index"].tolist(), batch["input_ids"], lengths, strict=True):
                assert (row[length:] == data.tokenizer.pad_id).all()
                seen[index] = row[:length]
    loader.close()
    assert len(seen) == len(TEXTS)
    other = texts("token_mask")
    for index in reversed(range(len(TEXTS))):
        assert torch.equal(seen[index], other.read(index, key)["input_ids"])


def test_a_part_draws_for_the_sample_of_the_whole() -> None:
    data = texts("token_mask")
    part = Part(data, np.array([9, 2, 300]))
    for place, index in enumerate([9, 2, 300]):
        assert torch.equal(part.read(place, KEY)["input_ids"], data.read(index, KEY)["input_ids"])
    batch = part.read_batch(np.array([2, 0]), KEY)
    assert batch is not None
    length = int(batch["attention_mask"][0].sum())
    assert torch.equal(batch["input_ids"][0, :length], data.read(300, KEY)["input_ids"])


def test_15_of_100_tokens_are_hidden_evenly_over_places() -> None:
    count, size = 1500, 100
    frame = pa.table({"text": [" ".join(WORDS * 2)] * count, "label": [i % 2 for i in range(count)]})
    data = texts("token_mask", frame=frame)
    for key in (ChanceKey(0, 0), ChanceKey(0, 1), ChanceKey(1, 0)):
        hidden = (all_tokens(data, key) == data.tokenizer.mask_id).view(count, size).double()
        assert abs(float(hidden.mean()) - 0.15) < 3 * (0.15 * 0.85 / (count * size)) ** 0.5
        for axis, other in ((0, count), (1, size)):
            spread = hidden.mean(axis).std() / (0.15 * 0.85 / other) ** 0.5
            assert 0.8 < float(spread) < 1.2  # as independent draws: the mean of each place, and of each text
        beside = torch.corrcoef(torch.stack([hidden[:, 1:].flatten(), hidden[:, :-1].flatten()]))[0, 1]
        assert abs(float(beside)) < 4 / (count * size) ** 0.5
    first, second = (all_tokens(data, ChanceKey(0, epoch)) == data.tokenizer.mask_id for epoch in (0, 1))
    assert abs(float((first & second).double().mean()) - 0.15**2) < 0.002


@pytest.mark.parametrize("mask", [True, False])
def test_a_mask_token_hides_where_there_is_one_and_special_tokens_stay(mask: bool) -> None:
    tokenizer = hub(mask)
    hidden_as = 4 + len(WORDS) if mask else 1
    assert tokenizer.mask_id == hidden_as
    assert tokenizer.num_tokens == 4 + len(WORDS) + mask + 1
    marked = pa.table({"text": [f"<x> {text} <x>" for text in TEXTS], "label": FRAME["label"]})
    data = texts("token_mask", frame=marked, tokenizer=tokenizer, max_length=64)
    plain, seen = all_tokens(data.without_augmentation()), all_tokens(data)
    changed = plain != seen
    assert set(seen[changed].tolist()) == {hidden_as}
    special = torch.isin(plain, torch.tensor([0, 2, tokenizer.num_tokens - 1]))
    assert int(special.sum()) > 3 * len(TEXTS)
    assert not (changed & special).any()
    share = float(changed.sum() / (~special).sum())
    assert abs(share - 0.15) < 3 * (0.15 * 0.85 / int((~special).sum())) ** 0.5


@pytest.mark.parametrize(("tokenizer", "hidden_as"), [(ByteTokenizer(), 257), (WordTokenizer(WORDS), 1)])
def test_without_a_mask_token_it_is_what_an_empty_text_becomes(tokenizer: Any, hidden_as: int) -> None:
    data = texts("token_mask", tokenizer=tokenizer)
    plain, seen = all_tokens(texts(tokenizer=tokenizer)), all_tokens(data)
    assert set(seen[plain != seen].tolist()) == {hidden_as}


def test_kept_tokens_stay_as_they_are() -> None:
    data, every = texts("token_mask"), np.arange(len(TEXTS))
    assert data.keeps_tokens
    before = [row.copy() for row in texts().tokens(every)]
    for epoch in range(3):
        data.read_batch(every, ChanceKey(0, epoch))
        for row, wanted in zip(data.tokens(every), before, strict=True):
            assert np.array_equal(row, wanted)
    assert not torch.equal(all_tokens(data), all_tokens(data.without_augmentation()))
    assert torch.equal(all_tokens(data.without_augmentation()), all_tokens(texts()))


def test_a_second_mask_draws_apart_and_changes_nothing_of_the_first() -> None:
    once, twice = texts("token_mask"), texts("token_mask", "token_mask")
    hidden, more = (all_tokens(data) == data.tokenizer.mask_id for data in (once, twice))
    assert (more | ~hidden).all()
    assert abs(float(more.double().mean()) - (1 - 0.85**2)) < 0.01


# --- callables


def swap(sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    return {**sample, "input_ids": sample["input_ids"][torch.from_numpy(rng.permutation(len(sample["input_ids"])))]}


def test_a_callable_is_keyed_and_comes_after_the_mask() -> None:
    data = texts(swap, "token_mask")
    masked = texts("token_mask")
    moved = 0
    batches = [list(Loader(data, size, seed=3, workers=0)) for size in (5, 64)]
    for batch in batches[0] + batches[1]:
        for index, row, mask in zip(batch["index"].tolist(), batch["input_ids"], batch["attention_mask"], strict=True):
            key = ChanceKey(3, 0)
            alone = data.read(index, key)["input_ids"]
            assert torch.equal(row[: int(mask.sum())], alone)
            unmoved = masked.read(index, key)["input_ids"]
            assert torch.equal(alone.sort().values, unmoved.sort().values)
            moved += not torch.equal(alone, unmoved)
    assert moved > len(TEXTS)
    assert torch.equal(all_tokens(data.without_augmentation()), all_tokens(texts()))


def test_a_callable_may_add_a_key() -> None:
    data = texts(lambda sample, rng: {**sample, "size": len(sample["input_ids"])})
    batch = data.read_batch(np.array([3, 8]), KEY)
    assert batch["size"].tolist() == batch["attention_mask"].sum(1).tolist()
    loaded = next(iter(Loader(data, 4, workers=0)))
    assert loaded["size"].tolist() == loaded["attention_mask"].sum(1).tolist()


def breaks(sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    return {"input_ids": sample["words"]}


def test_a_callable_that_fails_names_sample_file_and_line() -> None:
    with pytest.raises(BadSampleError, match="augmentation failed") as caught:
        texts(breaks).read(7, KEY)
    line = breaks.__code__.co_firstlineno + 1
    assert "row 7 (sample 7, epoch 2)" in caught.value.where
    assert f"test_token_masking.py, line {line})" in caught.value.where
    assert caught.value.got == "KeyError: 'words'"


@pytest.mark.parametrize("given", [None, {}, {"input_ids": [1, 2]}, {"input_ids": torch.zeros(0, dtype=torch.int64)},
                                   {"input_ids": torch.zeros(3)}])  # fmt: skip
def test_a_callable_that_returns_no_sample_is_named(given: Any) -> None:
    with pytest.raises(DataError, match="something else than a sample") as caught:
        texts(lambda sample, rng: given)[0]
    assert "lambda" in caught.value.where


# --- where it is asked for


def test_a_recipe_masks_its_training_texts_alone(tmp_path: Path) -> None:
    rows = "\n".join(f"{text},{i % 2}" for i, text in enumerate(TEXTS))
    (tmp_path / "t.csv").write_text(f"text,label\n{rows}\n")
    for parts in ({"valid_fraction": 0.25}, {"valid": "t.csv", "test": "t.csv"}):
        settings = DataSettings(train="t.csv", text="text", augment=["token_mask"], **parts)
        opened = open_data(settings, tmp_path, 0)
        plain = open_data(settings.model_copy(update={"augment": []}), tmp_path, 0)
        hidden = all_tokens(opened.train) != all_tokens(plain.train)
        assert abs(float(hidden.double().mean()) - 0.15) < 0.02
        assert torch.equal(all_tokens(opened.valid), all_tokens(plain.valid))
        if opened.test is not None:
            assert torch.equal(all_tokens(opened.test), all_tokens(plain.test))


def test_a_split_keeps_the_mask_for_training() -> None:
    train, valid = split(texts("token_mask"), 0.25, 0)
    assert (all_tokens(train) == 1).double().mean() > 0.1
    assert torch.equal(all_tokens(valid, ChanceKey(0, 0)), all_tokens(valid, ChanceKey(1, 9)))


def test_unknown_names_and_blocks_are_refused() -> None:
    with pytest.raises(SettingsError, match="no augmentations of this name") as caught:
        texts("horizontal_flip")
    assert "token_mask" in caught.value.expected
    with pytest.raises(SettingsError, match="blocks have no augmentations"):
        TextBlocks(texts("token_mask", target=None), 8)
