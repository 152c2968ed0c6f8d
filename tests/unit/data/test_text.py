"""Texts: a batch is its samples padded, a vocabulary is that of the training texts, blocks are the stream."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from torchkeep.chance import ChanceKey
from torchkeep.data.arrays import Arrays
from torchkeep.data.dataset import Part, whole
from torchkeep.data.loader import Loader
from torchkeep.data.splits import split
from torchkeep.data.text import TextBlocks, TextFolder, TextTable
from torchkeep.data.tokens import WordTokenizer
from torchkeep.errors import BadSampleError, DataError

TEXTS = ["Good film!", "", "so bad, so very bad", 'a "quoted",\nbroken line', "Ünïcödé 漢字 🎬"]
LABELS = ["pos", "neg", "neg", "pos", "pos"]
ROWS = pa.table({"text": TEXTS, "label": LABELS})


def table(texts: list[str], **columns: Any) -> pa.Table:
    return pa.table({"text": texts, "label": ["ab"[i % 2] for i in range(len(texts))], **columns})


def written(folder: Path, ending: str) -> Path:
    path = folder / f"texts{ending}"
    if ending == ".parquet":
        pq.write_table(ROWS, path)
    elif ending == ".jsonl":
        path.write_bytes(b"\n".join(orjson.dumps(row) for row in ROWS.to_pylist()))
    elif ending == ".arrow":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, ROWS.schema) as writer:
            writer.write_table(ROWS)
    else:
        sign = "\t" if ending == ".tsv" else ","
        cells = ['"' + text.replace('"', '""') + '"' for text in TEXTS]
        rows = [f"{text}{sign}{label}" for text, label in zip(cells, LABELS, strict=True)]
        path.write_text("\n".join([f"text{sign}label", *rows]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, texts in {"neg": ["bad", "awful"], "pos": ["good", "a fine film"]}.items():
        (tmp_path / "texts" / name).mkdir(parents=True)
        for number, text in enumerate(texts):
            (tmp_path / "texts" / name / f"{number}.txt").write_text(text, encoding="utf-8")
    return tmp_path / "texts"


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".parquet", ".arrow"])
def test_a_table_of_any_form_gives_the_same_texts(ending: str, tmp_path: Path) -> None:
    data = TextTable(written(tmp_path, ending), tokenizer="bytes")
    assert data.source.texts(np.arange(5)) == TEXTS
    assert data.schema["label"].classes == ("neg", "pos")
    assert data.labels is not None
    assert data.labels.tolist() == [1, 0, 0, 1, 1]
    assert data.fingerprint() == TextTable(ROWS, tokenizer="bytes").fingerprint()
    assert bytes((data[4]["input_ids"] - 1).tolist()).decode() == TEXTS[4]
    assert data[1]["input_ids"].tolist() == [257]  # an empty text is one end token
    assert data.id_of(2) == data[2]["id"] == "row 2"


def test_folders_are_classes_and_files_texts(folder: Path) -> None:
    data = TextFolder(folder)
    assert data.schema["label"].classes == ("neg", "pos")
    assert [data.id_of(i) for i in range(4)] == ["neg/0.txt", "neg/1.txt", "pos/0.txt", "pos/1.txt"]
    assert data.tokenizer.to_json()["words"] == ["a", "awful", "bad", "film", "fine", "good"]
    assert data[3]["input_ids"].tolist() == [2, 6, 5]
    (folder / "pos/1.txt").write_text("a fine film", encoding="utf-8-sig")  # what Windows puts first is no letter
    assert TextFolder(folder)[3]["input_ids"].tolist() == [2, 6, 5]
    named = TextFolder(folder, label_pattern=r"(?P<label>\d)\.txt")
    assert named.labels is not None
    assert named.labels.tolist() == [0, 1, 0, 1]
    assert named.column("label").tolist() == ["0", "1", "0", "1"]


def test_a_text_that_is_not_utf_8_is_named_with_its_byte(folder: Path) -> None:
    data = TextFolder(folder, tokenizer="bytes")
    (folder / "pos/0.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(BadSampleError, match="not UTF-8") as caught:
        data[2]
    assert "pos/0.txt (sample 2)" in caught.value.where
    assert caught.value.got == "byte 0xe9 at place 3"
    (folder / "pos/0.txt").unlink()
    with pytest.raises(BadSampleError, match="cannot be read") as caught:
        Loader(data, 4).peek()
    assert "pos/0.txt" in caught.value.where


@pytest.mark.parametrize(
    ("frame", "options", "fragments"),
    [
        (pa.table({"text": ["a", None], "label": [0, 1]}), {}, ["a text is missing", "row 1"]),
        (pa.table({"text": ["a", "b"], "label": ["x", None]}), {}, ["a label is missing", "row 1"]),
        (pa.table({"text": [1, 2], "label": [0, 1]}), {}, ["holds no texts", "int64"]),
        (pa.table({"words": ["a", "b"], "label": [0, 1]}), {}, ["no column 'text'", "words"]),
        (table(["a", "b"], name=["x", "x"]), {"id": "name"}, ["an id does not name one sample", "'x' more than once"]),
    ],
)
def test_a_table_without_a_text_or_label_in_each_row_is_refused(
    frame: pa.Table, options: dict[str, Any], fragments: list[str]
) -> None:
    with pytest.raises(DataError) as caught:
        TextTable(frame, **options)
    for fragment in fragments:
        assert fragment in caught.value.said()


def test_a_long_text_is_cut_at_max_length(tmp_path: Path) -> None:
    long = "word " * 20_000
    (tmp_path / "long.csv").write_text(f"text,label\n{long},a\nshort,b\n")
    data = TextTable(tmp_path / "long.csv", max_length=32)
    assert len(data.source.texts(np.array([0]))[0]) == 100_000
    batch = data.read_batch(np.array([0, 1]), ChanceKey())
    assert batch["input_ids"].shape == (2, 32)
    assert batch["attention_mask"].sum(1).tolist() == [32, 1]
    assert len(TextTable(tmp_path / "long.csv")[0]["input_ids"]) == 512  # the length where nothing is said
    assert data.lengths.tolist() == [256, 5]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=6), st.sampled_from(["words", "bytes"]), st.integers(1, 12))
def test_a_sample_in_a_batch_is_the_sample_alone(texts: list[str], tokenizer: str, max_length: int) -> None:
    data = TextTable(table(texts), tokenizer=tokenizer, max_length=max_length)
    order = np.random.default_rng(len(texts)).permutation(len(texts))
    batch = data.read_batch(order, ChanceKey())
    samples = [data[int(index)] for index in order]
    lengths = [len(sample["input_ids"]) for sample in samples]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["input_ids"].shape[1] == max(lengths) <= max_length
    for row, sample in enumerate(samples):
        assert torch.equal(batch["input_ids"][row, : lengths[row]], sample["input_ids"])
        assert (batch["input_ids"][row, lengths[row] :] == 0).all()
        assert (batch["attention_mask"][row, : lengths[row]] == 1).all()
    collated = data.collate(samples)
    assert all(torch.equal(batch[name], collated[name]) for name in batch)


def test_a_plain_dataloader_takes_it(folder: Path) -> None:
    data = TextFolder(folder)
    theirs = list(DataLoader(data, batch_size=3, collate_fn=data.collate))
    ours = list(Loader(data, 3, workers=2, backend="threads"))
    for plain, batch in zip(theirs, ours, strict=True):
        assert set(plain) == {"input_ids", "attention_mask", "label"}
        assert all(torch.equal(plain[name], batch[name]) for name in plain)


def test_validation_takes_over_the_training_tokenizer_classes_and_length() -> None:
    train = TextTable(table(["a b c", "b c b a"]), tokenizer="words", max_length=7)
    for tokenizer in (None, "words"):
        valid = TextTable(table(["c d"]), like=train, tokenizer=tokenizer)
        assert valid.tokenizer is train.tokenizer
        assert valid[0]["input_ids"].tolist() == [4, 1]  # "d" is unknown, and "c" comes after "b" and "a"
        assert valid.schema == train.schema
        assert valid.max_length == 7
    with pytest.raises(DataError, match="class") as caught:
        TextTable(pa.table({"text": ["x"], "label": ["c"]}), like=train)
    assert "'c'" in caught.value.got


def test_no_word_of_validation_is_in_the_vocabulary() -> None:
    texts = [f"shared only{i} only{i} once{i}" for i in range(40)]
    for rule in ("label", "random", "group:who", "time:when"):
        data = TextTable(table(texts, who=[i // 4 for i in range(40)], when=list(range(40))))
        train, valid = split(data, 0.25, 3, rule)
        assert isinstance(train, Part)
        assert isinstance(valid, Part)
        assert sorted(whole(train).tokenizer.words) == sorted(["shared", *(f"only{i}" for i in train.indices)])
        assert train.schema["input_ids"].num_tokens == len(train) + 3
        for part, second in ((train, False), (valid, True)):
            rows = torch.stack([part[i]["input_ids"] for i in range(len(part))])
            assert (rows[:, 0] == 2).all()
            assert (rows[:, 3] == 1).all()
            assert ((rows[:, 1] == 1) == second).all()


def test_a_tokenizer_that_learns_nothing_is_kept_by_a_split() -> None:
    given_one = WordTokenizer(["shared"])
    data = TextTable(table([f"shared only{i}" for i in range(8)]), tokenizer=given_one)
    train, _ = split(data, 0.25, 0)
    assert whole(train).tokenizer is given_one
    assert TextTable(ROWS, tokenizer="bytes").learned_from(np.array([0])).tokenizer.name == "bytes"


@pytest.mark.parametrize(
    "change", [{"tokenizer": "words"}, {"max_length": 3}, {"target": None}, {"source": table(["a", "c"])}]
)
def test_the_fingerprint_names_texts_tokenizer_length_and_labels(change: dict[str, Any]) -> None:
    plain: dict[str, Any] = {"source": table(["a", "b"]), "tokenizer": "bytes", "max_length": 9}
    assert TextTable(**plain).fingerprint() == TextTable(**plain).fingerprint()
    assert TextTable(**(plain | change)).fingerprint() != TextTable(**plain).fingerprint()


def test_training_has_buckets_and_evaluation_keeps_its_order() -> None:
    rng = np.random.default_rng(0)
    texts = ["x " * int(count) for count in rng.integers(1, 200, 512)]
    data = TextTable(table(texts))
    training, evaluation = Loader(data, 8, shuffle=True), Loader(data, 8)
    assert training.has_buckets
    assert not evaluation.has_buckets
    assert torch.cat([batch["index"] for batch in evaluation]).tolist() == list(range(512))
    batches = list(training)
    assert sorted(torch.cat([batch["index"] for batch in batches]).tolist()) == list(range(512))
    plain = list(Loader(data, 8, shuffle=True, buckets=False))
    padding = [
        1 - torch.cat([b["attention_mask"].flatten() for b in those]).float().mean() for those in (batches, plain)
    ]
    assert padding[0] < 0.1 < 0.3 < padding[1]
    sizes = [batch["input_ids"].shape[1] for batch in batches]
    assert sizes != sorted(sizes)  # the batches are mixed again
    assert Loader(data, 8, weights="balanced").has_buckets


@pytest.mark.parametrize("plan", [{"workers": 4, "backend": "threads"}, {"workers": 1, "backend": "processes"}])
def test_tokens_that_are_kept_are_those_that_were_made(plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    frame = table([" ".join(rng.choice(list("abcdef"), int(size))) for size in rng.integers(0, 40, 300)])
    kept = Loader(TextTable(frame), 7, weights="balanced", seed=2, **plan)
    epochs = [batch for _ in range(3) for batch in kept]
    kept.close()
    monkeypatch.setattr("torchkeep.data.text._KEPT_BYTES", 0)
    made = Loader(TextTable(frame), 7, weights="balanced", seed=2, workers=0)
    for batch, wanted in zip(epochs, [batch for _ in range(3) for batch in made], strict=True):
        assert all(torch.equal(batch[name], wanted[name]) for name in wanted)


# --- blocks


def stream_of(texts: list[str]) -> list[int]:
    return [number for text in texts for number in [*(byte + 1 for byte in text.encode()), 257]]


def test_blocks_are_the_stream_and_the_target_is_the_next_token(folder: Path) -> None:
    blocks = TextBlocks(TextFolder(folder, has_classes=False, tokenizer="bytes"), 5)
    stream = stream_of(["bad", "awful", "good", "a fine film"])
    assert len(blocks) == (len(stream) - 1) // 5 == 5
    inputs = torch.cat([blocks[i]["input_ids"] for i in range(5)])
    targets = torch.cat([blocks[i]["target"] for i in range(5)])
    assert inputs.tolist() == stream[:25]
    assert targets.tolist() == stream[1:26]
    assert blocks.stream.dtype == np.uint16
    assert blocks.schema.targets == ["target"]
    batch = next(iter(DataLoader(blocks, batch_size=5, collate_fn=blocks.collate)))
    assert torch.equal(batch["input_ids"].flatten(), inputs)


def test_each_text_is_ended_whatever_its_last_word() -> None:
    train = TextTable(table(["a b", "", "b a b"]), target=None)
    assert TextBlocks(train, 2).stream.tolist() == [3, 2, 1, 1, 2, 3, 2, 1]  # an empty text is its end alone
    valid = TextTable(table(["a z", "b b"]), target=None, like=train)
    a, b = (train.tokenizer.encode_batch([word])[0][0] for word in "ab")
    assert TextBlocks(valid, 2).stream.tolist() == [a, 1, 1, b, b, 1]  # an unknown last word, and the end


@pytest.mark.parametrize(("texts", "count"), [(["", ""], 2), (["abc"], 4)])
def test_texts_that_do_not_fill_a_block(texts: list[str], count: int) -> None:
    blocks = TextBlocks(TextTable(table(texts), target=None, tokenizer="bytes"), 4)
    with pytest.raises(DataError, match="do not fill one block") as caught:
        len(blocks)
    assert caught.value.got == f"{count} tokens"
    assert caught.value.expected == "more than 4"


def test_blocks_resume_where_they_were() -> None:
    rng = np.random.default_rng(1)
    texts = ["".join(rng.choice(list("abc"), 30)) for _ in range(20)]
    blocks = TextBlocks(TextTable(table(texts), target=None, tokenizer="bytes"), 7)
    whole_epoch = list(Loader(blocks, 4, shuffle=True, seed=5))
    loader = Loader(blocks, 4, shuffle=True, seed=5)
    iteration = iter(loader)
    for _ in range(6):
        next(iteration)
    other = Loader(blocks, 4, shuffle=True, seed=5)
    other.load_state_dict(loader.state_dict())
    for batch, wanted in zip(other, whole_epoch[6:], strict=True):
        assert all(torch.equal(batch[name], wanted[name]) for name in wanted)


def test_blocks_of_validation_are_in_the_tokens_of_training() -> None:
    train = TextBlocks(TextTable(table(["a b a b", "b c b"]), target=None), 2)
    first, _ = split(train, 0.4, 0)
    for like in (train, first):
        tokenizer = whole(like).tokenizer
        valid = TextBlocks(TextTable(table(["b z"]), target=None, like=like), 2)
        assert valid.tokenizer is tokenizer
        assert valid.schema == like.schema
        assert valid.stream.tolist() == [*tokenizer.encode_batch(["b"])[0], 1, 1]
    with pytest.raises(DataError, match="the training data are not"):
        TextTable(table(["a"]), like=Arrays(input=np.zeros((2, 3))))


def test_a_split_of_blocks_learns_no_word_of_validation() -> None:
    words = [f"w{i % 50}" for i in range(200)] + [f"rare{i // 2}" for i in range(100)]
    blocks = TextBlocks(TextTable(table([" ".join(words)]), target=None), 4)
    train, valid = split(blocks, 0.3, 0)
    assert isinstance(train, Part)
    learned = whole(train)
    assert learned is whole(valid)
    places = [place for block in train.indices for place in range(4 * block, min(4 * block + 5, 300))]
    counts = Counter(words[place] for place in places)
    seen = {word for word, count in counts.items() if count > 1}
    assert set(learned.tokenizer.words) == seen
    assert 50 < len(seen) < 150
    assert train.schema["input_ids"].num_tokens == learned.tokenizer.num_tokens == len(seen) + 2
    find = {word: number for number, word in enumerate(learned.tokenizer.words, 2)}
    assert learned.stream.tolist() == [*(find.get(word, 1) for word in words), 1]
    assert learned.fingerprint() != blocks.fingerprint()


def test_the_mean_of_a_target_is_that_of_the_training_texts() -> None:
    numbers = [float(number) for number in range(40)]
    frame = pa.table({"text": ["a"] * 40, "label": numbers, "when": list(range(40))})
    train, valid = split(TextTable(frame), 0.25, 0, "time:when")
    assert train.schema["target"].mean == np.mean(numbers[:30])
    assert train.schema["target"].std == pytest.approx(np.std(numbers[:30]))
    assert valid.schema == train.schema
