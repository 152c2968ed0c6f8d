"""What a person sees of a model: it fits the terminal, tells neighbours that are alike once, and loses no number."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from torchkeep.contracts import Json
from torchkeep.model.describe import dissect
from torchkeep.watch.anatomy import amount_text, anatomy_page, anatomy_svg, show_anatomy
from torchkeep.watch.console import Console

HOSTILE = "<script>alert(1)</script>"


def block(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.LayerNorm(width))


def deep(num_blocks: int = 12) -> Json:
    """12 blocks that are alike, one that is wider, a frozen one, one that is never called, a hostile name."""
    model = nn.Sequential(*(block(4) for _ in range(num_blocks)), nn.Linear(4, 6), block(6))
    model[0].requires_grad_(False)
    model[1].never = nn.ModuleList([nn.Linear(3, 3)])
    model[1].never[0].add_module(HOSTILE, nn.Linear(2, 2))
    model[1].forward = lambda x: model[1][0](x)
    return dissect(model, torch.randn(2, 4)).to_json()


def shown(payload: Json, columns: int = 80, lines: int = 50, **options: Any) -> list[str]:
    text = io.StringIO()
    show_anatomy(Console(file=text), payload, room=(columns, lines), **options)
    return text.getvalue().splitlines()


@pytest.fixture(scope="module")
def payload() -> Json:
    return deep()


@pytest.mark.parametrize("columns", [40, 80, 120, 250])
@pytest.mark.parametrize("lines", [24, 60])
def test_it_fits_the_terminal(payload: Json, columns: int, lines: int) -> None:
    found = shown(payload, columns, lines)
    table = found[: next(n for n, line in enumerate(found) if "parameters," in line)]
    assert max(map(len, table)) <= columns
    assert len(found) <= lines
    assert table[0].split()[0] == "module"
    assert "parameters" in table[0]
    assert "gradient" in table[0] or columns <= 80


def test_neighbours_that_are_alike_are_told_once(payload: Json) -> None:
    found = shown(payload, 200, 60)
    line = next(line for line in found if "2 … 11" in line)
    assert "10 × Sequential" in line
    assert f"{10 * (16 + 4 + 8)}" in line
    gradient = sum(row["gradient_norm"] ** 2 for row in payload["rows"] if re.fullmatch(r"[2-9]|1[01]", row["name"]))
    assert f"{gradient**0.5:.3g}"[:4] in line
    assert sum("Sequential" in line for line in found) == 5  # the model, the frozen, the odd, the ten, the wider


def test_depth_is_as_asked_for(payload: Json) -> None:
    assert [line.split()[0] for line in shown(payload, depth=0)][:2] == ["module", "(model)"]
    whole = shown(payload, 200, everything=True)
    names = [line.split()[0] for line in whole if "Linear" in line or "ReLU" in line]
    assert len(names) == sum(row["type_name"] in ("Linear", "ReLU") for row in payload["rows"])
    assert not any("…" in line for line in whole)
    assert "to depth 0 of 4, 57 modules in all" in shown(payload, depth=0)[-1]


def test_what_should_be_known_is_said(payload: Json) -> None:
    text = "\n".join(shown(payload, 300))
    assert "never called: 1.1, 1.2, 1.never" in text
    assert "learns, but got no gradient: 1.2, 1.never" in text
    assert re.search(r"0 +Sequential .* 0 ", text)
    found = dissect(nn.Sequential(nn.Linear(2, 2)).requires_grad_(False), torch.ones(1, 2)).to_json()
    assert "no backward: nothing that learns leads to the loss" in shown(found)
    assert "gradient" not in shown(found, 250)[0]


def test_without_an_example_only_what_the_model_holds_is_shown() -> None:
    found = shown(dissect(block(4)).to_json(), 120)
    assert found[0].split() == ["module", "kind", "parameters", "bytes"]
    assert found[-1] == "28 parameters, 28 of them learn; 112 B"


def test_amounts_have_three_digits() -> None:
    values = (None, 0, 7, 999, 999.6, 9996, 14_156_352, 2.5e9)
    assert [amount_text(value, "B") for value in values] == [
        "", "0 B", "7 B", "999 B", "1.00 kB", "10.0 kB", "14.2 MB", "2.50 GB"
    ]  # fmt: skip


def test_the_picture_is_whole_and_needs_no_network(payload: Json) -> None:
    svg = anatomy_svg(payload)
    root = ElementTree.fromstring(svg)
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")
    assert HOSTILE not in svg
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"module", "parameters", "time", "2 … 11"} <= set(texts)
    width = float(root.attrib["width"])
    assert all(float(text.attrib["x"]) < width for text in root.iter("{http://www.w3.org/2000/svg}text"))
    ElementTree.fromstring(anatomy_svg(dissect(nn.Identity()).to_json()))


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 400)])
def test_the_page_opens_clean_and_unfolds(browser: Any, payload: Json, tmp_path: Path, scheme: str, width: int) -> None:
    path = tmp_path / "model.html"
    path.write_text(anatomy_page(payload, HOSTILE), encoding="utf-8")
    found: list[str] = []
    page = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800}).new_page()
    page.on("console", lambda message: found.append(message.text))
    page.on("request", lambda request: None if request.url == path.as_uri() else found.append(request.url))
    page.goto(path.as_uri())
    assert page.locator("summary").count() == len(payload["rows"])
    assert page.locator("h1").inner_text() == HOSTILE
    assert page.evaluate("document.querySelectorAll('script').length") == 0
    inner = page.locator("summary", has_text="LayerNorm").first
    assert not inner.is_visible()
    page.locator("details details > summary").first.click()
    assert inner.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ink = page.evaluate("getComputedStyle(document.querySelector('.time rect')).fill")
    assert ink == ("rgb(0, 114, 178)" if scheme == "light" else "rgb(86, 180, 233)")
    assert found == []
