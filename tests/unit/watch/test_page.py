"""What the page promises: it opens in a real browser from one file, asks for nothing, and shows names as text."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from made_runs import append, changed, make_run, scalars

from torchkeep.watch.comparing import compare
from torchkeep.watch.page import comparison_page

HOSTILE = "<script>alert(1)<img src=x onerror=alert(2)>\"'&amp;"
TAG = "valid/</script><script>alert(3)</script>"


@pytest.fixture
def page_file(tmp_path: Path) -> Path:
    a = make_run(tmp_path / "a", metrics={"valid/accuracy": 0.7, TAG: 1.0})
    diff = "diff --git a/x.html b/x.html\n+<script>alert(4)</script>"
    b = make_run(
        tmp_path / HOSTILE, accuracies=(0.2, math.nan, 1e-3), code={"commit": None, "diff": diff},
        settings=changed(model__name="</td><script>alert(5)</script>", optimizer__learning_rate=0.5),
    )  # fmt: skip
    append(a, {"kind": "scalars", "step": 30, "values": {TAG: 1.0, "single": 3.0, "bad": math.nan}})
    append(b, *(scalars(step, train__noise=float(step % 7)) for step in range(40, 400)))
    path = tmp_path / "page.html"
    path.write_text(comparison_page(compare([a, b])), encoding="utf-8")
    return path


def open_page(browser: Any, path: Path, **options: Any) -> tuple[Any, list[str]]:
    """The page, and what went wrong: messages of the console, errors, dialogs, requests beyond the file."""
    found: list[str] = []
    page = browser.new_context(**options).new_page()
    page.on("console", lambda message: found.append(message.text))
    page.on("pageerror", lambda error: found.append(str(error)))
    page.on("dialog", lambda dialog: (found.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: None if request.url == path.as_uri() else found.append(request.url))
    page.goto(path.as_uri())
    return page, found


def test_the_page_names_no_other_place(page_file: Path) -> None:
    text = page_file.read_text(encoding="utf-8")
    assert re.findall(r"https?://", text) == []
    assert len(re.findall("<script", text)) == 2
    assert "style=" not in text
    assert not re.search(r"\son\w+=[^ ]*>", text.replace("&lt;img src=x onerror=alert(2)&gt;", ""))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_it_opens_clean_and_shows_names_as_text(browser: Any, page_file: Path, scheme: str, width: int) -> None:
    page, found = open_page(browser, page_file, color_scheme=scheme, viewport={"width": width, "height": 800})
    assert page.locator("tbody th", has_text=HOSTILE).count() == 1
    assert page.locator("h3", has_text=TAG).count() == 1
    page.locator("summary").click()
    assert "alert(4)" in page.locator("details pre").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.querySelectorAll('script').length") == 2
    ink = page.evaluate("getComputedStyle(document.querySelector('.main')).stroke")
    assert ink == ("rgb(0, 114, 178)" if scheme == "light" else "rgb(86, 180, 233)")
    assert found == []


def test_values_are_read_by_pointer_and_by_keys(browser: Any, page_file: Path) -> None:
    page, found = open_page(browser, page_file, viewport={"width": 1280, "height": 800})
    figure = page.locator("figure", has=page.get_by_role("heading", name="valid/accuracy", exact=True))
    chart = figure.locator(":scope > svg")
    assert figure.locator("output").all_inner_texts() == ["0.7000", "0.001000"]
    box = chart.bounding_box()
    middle = (54 + (400 - 54 - 20) / 2) / 400 * box["width"]
    chart.hover(position={"x": middle, "y": box["height"] / 2})
    assert figure.locator("figcaption").inner_text() == "step 20"
    assert figure.locator("output").all_inner_texts() == ["0.9000", "nan"]
    page.locator("h1").hover()
    assert figure.locator("figcaption").inner_text() == "last value, up to step 30"
    chart.focus()
    for key, step in [("ArrowRight", 10), ("ArrowRight", 20), ("ArrowLeft", 10)]:
        page.keyboard.press(key)
        assert figure.locator("figcaption").inner_text() == f"step {step}"
    assert figure.locator("output").all_inner_texts() == ["0.5000", "0.2000"]
    page.keyboard.press("Escape")
    assert figure.locator("output").all_inner_texts() == ["0.7000", "0.001000"]
    assert found == []


def test_curves_are_there_without_javascript_and_the_script_draws_the_same(browser: Any, page_file: Path) -> None:
    lines = "[...document.querySelectorAll('figure .main')].map(line => line.getAttribute('d'))"
    still, _ = open_page(browser, page_file, java_script_enabled=False)
    drawn = [path.get_attribute("d") for path in still.locator("figure > svg .main").all()]
    assert not still.locator(".bar").is_visible()
    page, found = open_page(browser, page_file)
    for box in ("log", "log"):
        page.locator(f"[name={box}]").click()
    first = page.evaluate("[...document.querySelectorAll('figure > svg .main')].map(line => line.getAttribute('d'))")
    numbers = [[float(n) for n in re.findall(r"-?\d+\.?\d*", path)] for path in first]
    assert numbers == [
        pytest.approx([float(n) for n in re.findall(r"-?\d+\.?\d*", path or "")], abs=0.11) for path in drawn
    ]
    before = page.evaluate(lines)
    page.locator("[name=smooth]").fill("0.9")
    smoothed = page.evaluate(lines)
    page.locator("[name=smooth]").fill("0")
    page.locator("[name=run]").first.uncheck()
    assert page.locator(".key .off").count() > 0
    assert before != smoothed
    page.locator("[name=run]").first.check()
    assert page.evaluate(lines) == before
    page.locator("[name=log]").check()
    assert page.locator(".log").first.is_visible()
    assert not page.locator(".lin").first.is_visible()
    assert found == []
