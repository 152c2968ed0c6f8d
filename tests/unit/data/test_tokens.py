"""Texts become the tokens that are stated, whatever the text, and a saved tokenizer gives the same ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from torchkeep.data.tokens import (
    ByteTokenizer,
    HubTokenizer,
    Tokenizer,
    WordTokenizer,
    make_tokenizer,
    tokenizer_from_json,
)
from torchkeep.errors import DataError, SettingsError

TEXTS = ["", " ", "a b", "Straße, 😀!", "b " * 5000, "\x00", "\ud800", "नमस्ते 世界", "don't"]
HUB_WORDS = {"[PAD]": 3, "[UNK]": 1, "[CLS]": 2, "[SEP]": 0, "a": 4, "b": 9}


def hub_file(folder: Path, pad: bool = True, special: bool = True) -> Path:
    """A tokenizer.json whose numbers have holes."""
    from tokenizers import Tokenizer as Rust
    from tokenizers import models, pre_tokenizers, processors

    words = {word: number for word, number in HUB_WORDS.items() if pad or word != "[PAD]"}
    made = Rust(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 0)]
        )
    path = folder / "tokenizer.json"
    made.save(str(path))
    return path


@pytest.fixture(params=["bytes", "words", "hub", "hub without special tokens"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    if request.param == "bytes":
        return ByteTokenizer()
    if request.param == "words":
        return WordTokenizer.learn(["a b straße", "a , !"])
    return HubTokenizer.from_file(hub_file(tmp_path, special=request.param == "hub"))


def lists(rows: list[np.ndarray[Any, Any]]) -> list[list[int]]:
    return [row.tolist() for row in rows]


@pytest.mark.parametrize("max_length", [None, 3, 64])
def test_every_text_has_a_token_and_each_is_in_range(tokenizer: Tokenizer, max_length: int | None) -> None:
    rows = tokenizer.encode_batch(TEXTS, max_length)
    assert len(rows) == len(TEXTS)
    for row in rows:
        assert row.dtype == np.int32
        assert row.ndim == 1
        assert 1 <= len(row) <= (max_length or 10**6)
        assert 0 <= row.min() <= row.max() < tokenizer.num_tokens
    assert len(rows[4]) == max_length or (max_length is None and len(rows[4]) >= 5000)
    assert 0 <= tokenizer.pad_id < tokenizer.num_tokens
    assert tokenizer.encode_batch([]) == []


def test_saved_and_loaded_it_is_the_same(tokenizer: Tokenizer) -> None:
    loaded = tokenizer_from_json(orjson.loads(orjson.dumps(tokenizer.to_json())))
    assert type(loaded) is type(tokenizer)
    for max_length in (None, 5):
        assert lists(loaded.encode_batch(TEXTS, max_length)) == lists(tokenizer.encode_batch(TEXTS, max_length))
    assert (loaded.name, loaded.num_tokens, loaded.pad_id) == (tokenizer.name, tokenizer.num_tokens, tokenizer.pad_id)
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert len(tokenizer.fingerprint()) == 32


def test_a_length_that_holds_nothing_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(SettingsError, match="no text fits"):
        tokenizer.encode_batch(["a"], 0)


def test_bytes_are_the_texts_own() -> None:
    rows = ByteTokenizer().encode_batch(["aÿ", "", "\x00"])
    assert lists(rows) == [[98, 0xC3 + 1, 0xBF + 1], [257], [1]]
    for text in ("Straße, 😀!", "नमस्ते 世界"):
        (row,) = ByteTokenizer().encode_batch([text])
        assert bytes((row - 1).astype(np.uint8)).decode() == text
    assert lists(ByteTokenizer().encode_batch(["abc"], 2)) == [[98, 99]]


def test_words_are_numbered_by_count_then_alphabet() -> None:
    made = WordTokenizer.learn(["the cat, THE dog", "the zebra cat"], min_count=1)
    assert made.words == ["the", "cat", ",", "dog", "zebra"]
    assert made.num_tokens == 7
    assert lists(made.encode_batch(["Zebra the unseen", "", "the ! cat"], 3)) == [[6, 2, 1], [1], [2, 1, 3]]
    assert WordTokenizer.learn(["b a a", "c c b"], max_words=2).words == ["a", "b"]
    assert WordTokenizer.learn(["the cat", "the dog"]).words == ["the"]
    assert WordTokenizer.learn(["a cat", "the dog"]).words == ["a", "cat", "dog", "the"]


def test_words_are_cut_as_stated() -> None:
    made = WordTokenizer.learn(["Don't stop\u2014it\u2019s «ﬁne»… 3.5€ x_y"], min_count=1)
    assert sorted(made.words) == sorted(
        ["don't", "stop", "\u2014", "it\u2019s", "«", "fine", "»", ".", "3", "5", "€", "x_y"]
    )
    composed, decomposed = made.encode_batch(["ﬁne", "FINE"])
    assert composed.tolist() == decomposed.tolist() != [1]


def test_only_the_training_texts_make_the_vocabulary() -> None:
    made = make_tokenizer("words", texts=iter(["one two"]))
    before = made.fingerprint()
    assert lists(made.encode_batch(["three four one"])) == [[1, 1, 2]]
    assert made.num_tokens == 4
    assert made.fingerprint() == before
    assert make_tokenizer("words", texts=["one three"]).fingerprint() != before


def test_a_hub_file_keeps_its_special_tokens_when_it_cuts(tmp_path: Path) -> None:
    made = HubTokenizer.from_file(hub_file(tmp_path))
    assert lists(made.encode_batch(["a b a b", "zzz", ""], 4)) == [[2, 4, 9, 0], [2, 1, 0], [2, 0]]
    assert lists(made.encode_batch(["a b a b"])) == [[2, 4, 9, 4, 9, 0]]
    assert made.num_tokens == 10
    assert made.pad_id == 3
    with pytest.raises(SettingsError, match="at least 3"):
        made.encode_batch(["a"], 2)


def test_what_pads_and_what_stands_for_an_empty_text(tmp_path: Path) -> None:
    path = hub_file(tmp_path, pad=False, special=False)
    assert HubTokenizer.from_file(path).pad_id == 0
    assert HubTokenizer(path.read_text("utf-8"), "x", pad_id=12).num_tokens == 13
    assert lists(HubTokenizer.from_file(path).encode_batch([""])) == [[1]]
    data = orjson.loads(path.read_bytes())
    data["padding"] = {
        "strategy": {"Fixed": 8},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 4,
        "pad_type_id": 0,
        "pad_token": "a",
    }
    data["truncation"] = {"direction": "Left", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    padded = HubTokenizer(orjson.dumps(data).decode(), "x")
    assert padded.pad_id == 4
    assert lists(padded.encode_batch(["a b"])) == [[4, 9]]  # neither padded nor cut by the file's own settings
    assert lists(padded.encode_batch(["a b b", "a"], 2)) == [[9, 9], [4]]


def test_the_fingerprint_follows_the_numbers_not_the_name(tmp_path: Path) -> None:
    text = hub_file(tmp_path).read_text("utf-8")
    assert HubTokenizer(text, "x").fingerprint() == HubTokenizer(text, "y").fingerprint()
    assert HubTokenizer(text.replace('"b": 9', '"b": 8'), "x").fingerprint() != HubTokenizer(text, "x").fingerprint()
    others = [ByteTokenizer(), WordTokenizer(["a", "b"]), WordTokenizer(["b", "a"]), HubTokenizer(text, "x")]
    assert len({other.fingerprint() for other in others}) == len(others)


def test_tokenizers_by_name(tmp_path: Path) -> None:
    hub_file(tmp_path)
    assert isinstance(make_tokenizer("bytes"), ByteTokenizer)
    made = make_tokenizer("tokenizer.json", base=tmp_path)
    assert (made.name, made.pad_id) == ("tokenizer.json", 3)
    with pytest.raises(SettingsError, match="did you mean 'words'"):
        make_tokenizer("wordz", texts=["a"])
    with pytest.raises(SettingsError, match="learned from texts"):
        make_tokenizer("words")
    with pytest.raises(SettingsError, match=r"no file or folder .*missing\.json"):
        make_tokenizer("missing.json", base=tmp_path)


def test_a_folder_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(hub_file(tmp_path)), pad_token="a", unk_token="[UNK]"
    )
    fast.save_pretrained(tmp_path / "saved")
    made = make_tokenizer("saved", base=tmp_path)
    assert made.pad_id == 4
    assert lists(made.encode_batch(["a b"])) == [[2, 4, 9, 0]]
    assert tokenizer_from_json(made.to_json()).fingerprint() == made.fingerprint()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot be loaded") as caught:
        make_tokenizer("empty", base=tmp_path)
    assert caught.value.where == "empty"


def test_what_is_no_tokenizer_is_said(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    (tmp_path / "y.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"no tokenizer"):
        make_tokenizer("x.json", base=tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        make_tokenizer("y.json", base=tmp_path)
    other = {"kind": "words", "words": ["a"], "pattern": r"\S+"}
    for data in (None, {}, {"kind": "letters"}, {"kind": "words", "words": ["a"]}, other):
        with pytest.raises(DataError, match="no saved tokenizer"):
            tokenizer_from_json(data)


@pytest.mark.parametrize(("package", "name"), [("tokenizers", "tokenizer.json"), ("transformers", "hf:some/name")])
def test_a_missing_package_is_named(package: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_file(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SettingsError, match=f"needs the package {package}") as caught:
        make_tokenizer(name, base=tmp_path)
    assert "pip install" in caught.value.fix


def test_a_fork_after_use_is_quiet(tmp_path: Path) -> None:
    program = f"""
import os, sys
from torchkeep.data.tokens import make_tokenizer
assert not {{"tokenizers", "transformers"}} & set(sys.modules)
made = make_tokenizer({str(hub_file(tmp_path))!r})
rows = made.encode_batch(["a b"] * 1000)
child = os.fork()
assert made.encode_batch(["a b"] * 1000)[0].tolist() == [2, 4, 9, 0]
if child: os.waitpid(child, 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
