"""The model card: what it says, and that nothing it is made of says anything else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from packaged import hub_contents, image_contents

from torchkeep.contracts import Field, Preprocess, Schema
from torchkeep.share.card import AUTHOR, card_over, model_card
from torchkeep.share.package import load_package, write_package

HOSTILE = ["# x", "<script>alert(1)</script>", "a|b", "---", "```\n---\nlicense: x\n```", "[x](javascript:y)", "*b*",
           "![i](http://evil/x.png)", "https://evil.example", "www.evil.example", "a\n\n## b", "&lt;b&gt;", "\u202eabc",
           "\x1b[31m", "", "\\", "`", "$x$", "~~x~~", "@ada", ": x", "'", '"', "{{x}}", "x" * 5000, AUTHOR, "\ud800",
           "1. x", "- x", "> x", "    x", "\u2028x", "<!-- x", "=\n==="]  # fmt: skip


def facts_of(text: str, **more: Any) -> dict[str, Any]:
    """Facts with a text wherever one of others may stand."""
    fields = {text or "input": Field("image", (3, 8, None)), "label": Field("label", (), (text, "bees"), True)}
    return {
        "name": text, "architecture": {"kind": "graph", "class_name": text, "num_parameters": 1200},
        "schema": Schema(fields, Preprocess(8, 3, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))), "loss": "cross_entropy",
        "calibration": {"temperature": 1.5, "split": text}, "size_bytes": 4800, "sha256": "ab" * 32,
        "metrics": {"step": 3, "epoch": 1, "values": {text: 0.5, "valid/accuracy": 0.25}},
        "base": {"source": text, "sha256": "cd" * 32},
        "provenance": {
            "seed": 0, "recipe": {}, "data": {"fingerprints": {text: text}}, "code": {"commit": text, "diff": text},
            "weights": {"source": text}, "environment": {"python": text, "packages": {text: text}},
        },
        **more,
    }  # fmt: skip


def parted(card: str) -> tuple[dict[str, Any], str]:
    """What the hub reads of a card's header, and the text below it."""
    _, header, text = re.split(r"^---\n", card, maxsplit=2, flags=re.MULTILINE)
    held = yaml.safe_load(header)
    assert isinstance(held, dict)
    return held, text


def form_of(text: str) -> list[tuple[Any, ...]]:
    """What a reader of Markdown sees but for the words: blocks, cells, marks, links and code in their order."""
    seen = []
    for block in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text):
        code = block.info if block.type == "fence" else ""
        words = [token.type for token in block.children or () if token.type not in ("text", "text_special")]
        seen.append((block.type, block.tag, block.level, code, tuple(words)))
    return seen


def check_harmless(text: str) -> None:
    header, said = parted(model_card(facts_of(text)))
    plain_header, plain = parted(model_card(facts_of("ants")))
    assert header == plain_header
    assert form_of(said) == form_of(plain)
    shown = MarkdownIt("commonmark").enable("table").render(said)
    assert not re.search(r"<(?!/?(h[12]|p|table|t[rdh]|thead|tbody|pre|code|ul|li|em|hr)\b|!-- from here on)", shown)
    bare = re.sub(r"\\(.)", r" \1 ", re.sub(r"^```.*?^```$", "", said, flags=re.DOTALL | re.MULTILINE))
    assert not re.search(r"https?:|www\.|@\w", bare)
    assert all(sign.isprintable() or sign == "\n" for sign in said)
    assert said.count(AUTHOR) == 1


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_text_of_others_is_only_a_text(text: str) -> None:
    check_harmless(text)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(st.sampled_from("#<>|-`[]()*_~$@:.!\\&;=+\n\t\r\"'{}/ ab1\x00\u2028\u202e") | st.characters()))
def test_any_text_is_only_a_text(text: str) -> None:
    check_harmless(text)


def test_the_same_facts_give_the_same_bytes_and_each_may_be_missing() -> None:
    facts = facts_of("ants")
    assert model_card(facts) == model_card(dict(reversed(facts.items())))
    whole = form_of(parted(model_card(facts))[1])
    for name in facts:
        _, text = parted(model_card({key: value for key, value in facts.items() if key != name}))
        assert len(form_of(text)) <= len(whole)
    header, text = parted(model_card({}))
    assert header == {"library_name": "torchkeep", "tags": ["pytorch", "torchkeep"]}
    assert "Left for the author to fill" in text


@pytest.mark.parametrize(("of_input", "target", "task"), [
    (Field("image", (3, 8, 8)), Field("label", (), ("a", "b"), True), "image-classification"),
    (Field("tokens", (None,)), Field("label", (), ("a", "b"), True), "text-classification"),
    (Field("audio", (8, None)), Field("label", (), ("a", "b"), True), "audio-classification"),
    (Field("vector", (4,)), Field("number", (), is_target=True), "tabular-regression"),
    (Field("tensor", (4,)), Field("label", (), ("a", "b"), True), None),
])  # fmt: skip
def test_the_hub_is_told_the_task(of_input: Field, target: Field, task: str | None) -> None:
    header, _ = parted(model_card({"schema": Schema({"x": of_input, "y": target})}))
    assert header.get("pipeline_tag") == task


@pytest.mark.parametrize(("source", "said"), [
    ("hf:ada/ants", "ada/ants"), ("hf:ants", None), ("hf:a/b/c", None), ("ants.pth", None), ("hf:a/b\nx: y", None),
])  # fmt: skip
def test_the_hub_is_told_the_model_it_began_with(source: str, said: str | None) -> None:
    for facts in ({"base": {"source": source}}, {"provenance": {"weights": {"source": source}}}):
        header, _ = parted(model_card(facts))
        assert header.get("base_model") == said


def test_many_classes_are_cut_short() -> None:
    classes = tuple(f"class {number}" for number in range(1000))
    card = model_card({"schema": Schema({"label": Field("label", (), classes, True)})})
    assert "1,000 classes" in card
    assert "class 49, and 950 more" in card


def test_a_package_s_card_loads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package(image_contents(tmp_path), tmp_path / "convnet.tkp")
    monkeypatch.chdir(tmp_path)
    held = load_package("convnet.tkp", device="cpu")
    header, _ = parted(held.card)
    assert header["pipeline_tag"] == "image-classification"
    assert "2 classes, in the order of the outputs: ants, bees." in held.card
    assert "the middle square is resized to 8 × 8 pixels" in held.card
    names: dict[str, Any] = {}
    for code in re.findall(r"^```python\n(.*?)^```$", held.card, re.DOTALL | re.MULTILINE):
        exec(code.replace('"INPUT"', '"images"'), names)
    assert len(names["predictions"]) == 4
    held.model.load_state_dict(names["state_dict"])


def test_a_transformers_model_says_how_its_library_reads_it(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    write_package(hub_contents(tmp_path), tmp_path / "bert.tkp")
    assert "torchkeep export bert.tkp --to transformers" in load_package(tmp_path / "bert.tkp", device="cpu").card


def test_an_author_s_words_stay() -> None:
    old, new = model_card(facts_of("ants")), model_card(facts_of("bees"))
    assert card_over("", new) == new
    assert card_over(old, new) == new
    edited = old.replace("---\n", "---\nlicense: mit\nlanguage:\n- en\n- de\ntags: [mine]\n", 1)
    edited = f"{edited.partition(AUTHOR)[0]}{AUTHOR}\n\nFor ants.\n"
    header, text = parted(card_over(edited, new))
    assert header == {**parted(new)[0], "license": "mit", "language": ["en", "de"]}
    assert text == f"{parted(new)[1].partition(AUTHOR)[0]}{AUTHOR}\n\nFor ants.\n"
    own = "# My ants\n\nAll by hand.\n"
    assert card_over(own, new) == own
    header, text = parted(card_over("---\nlicense: mit\n---\n", new))
    assert header == {**parted(new)[0], "license": "mit"}
    assert text == parted(new)[1]
