"""TensorBoard's pages in a real browser: what a person sees is drawn, and the console stays empty.

TORCHKEEP_SCREENSHOTS names a folder that keeps the pictures of the pages.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from board import ask, everything, serving, show, until

from torchkeep.watch.media import MediaStore

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

OPTIONS = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--disable-background-networking"]
RUN = "one/tensorboard"
Pixels = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("runs")
    show(folder / "one", 0, everything(MediaStore(folder / "one")))
    with serving(folder, tmp_path_factory.mktemp("log") / "tensorboard.log", fast=True) as address:
        until(lambda: "run/end" in ask(address, "plugin/text/tags").get(RUN, ()))
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no chromium")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=path, args=OPTIONS)
        yield opened
        opened.close()


def pixels_of(page: Any) -> Pixels:
    """(H, W, 3) int: the part of the page that the plugin draws in."""
    from PIL import Image

    shown = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB")).astype(int)
    return shown[170:, 330:1270]


def tinted(pixels: Pixels, channel: int, by: int = 20) -> Pixels:
    """(N, 3): the pixels of which one channel is above both others."""
    others = np.delete(pixels, channel, axis=2).max(2)
    return pixels[pixels[..., channel] > others + by]


def num_colors(pixels: Pixels) -> int:
    return len(np.unique(pixels.reshape(-1, 3), axis=0))


def curves_are_drawn(pixels: Pixels) -> bool:
    return len(tinted(pixels, 0)) > 300


def areas_are_drawn(pixels: Pixels) -> bool:
    return len(tinted(pixels, 0)) > 3000 and num_colors(tinted(pixels, 0)) > 2


def nodes_are_drawn(pixels: Pixels) -> bool:
    return bool((pixels.max(2) < 240).sum() > 500 and num_colors(pixels) > 20)


def picture_is_drawn(pixels: Pixels) -> bool:
    return num_colors(pixels) > 1000


def both_spheres_are_drawn(pixels: Pixels) -> bool:
    return min(len(tinted(pixels, 0, 60)), len(tinted(pixels, 2, 60))) > 20_000


PAGES = {
    "scalars": ("train", curves_are_drawn),
    "graphs": ("", nodes_are_drawn),
    "histograms": ("layer", areas_are_drawn),
    "distributions": ("layer", areas_are_drawn),
    "images": ("figure", picture_is_drawn),
    "mesh": ("shape", both_spheres_are_drawn),
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_drawn(server: str, browser: Any, name: str, tmp_path: Path) -> None:
    tag, is_drawn = PAGES[name]
    with browser.new_page(viewport={"width": 1280, "height": 1100}) as page:
        trouble = troubles_of(page)
        page.goto(f"{server}/#{name}" + (f"&tagFilter={tag}" if tag else ""))
        keep(page, name, tmp_path, is_drawn)
        if name == "graphs":  # the block can be opened
            page.locator("g.node", has_text="net").first.dblclick()
            until(lambda: page.locator("g.node", has_text="second").count())
    assert trouble == []


def test_any_tag_leaves_the_page_whole(server: str, browser: Any) -> None:
    with browser.new_page(viewport={"width": 1280, "height": 1100}) as page:
        trouble = troubles_of(page)
        page.goto(f"{server}/#scalars")
        for text in ("(no tag)", "<img src=x>&\"'", "Größe", "a\\nb", "xxxxxxxx"):
            page.get_by_text(text).first.wait_for(timeout=30_000)
    assert trouble == []


def test_the_settings_are_a_row(server: str, browser: Any, tmp_path: Path) -> None:
    with browser.new_page(viewport={"width": 1280, "height": 1100}) as page:
        trouble = troubles_of(page)
        page.goto(f"{server}/#hparams")
        for text in ("one/tensorboard", "0.0010000", "convnet"):
            page.get_by_text(text).first.wait_for(timeout=30_000)
        keep(page, "hparams", tmp_path, lambda pixels: num_colors(pixels) > 20)
    assert trouble == []


def troubles_of(page: Any) -> list[str]:
    """What goes wrong on a page, as it does: errors of its console and its scripts, and what the server refuses.

    Warnings are left out: TensorBoard's own scripts warn of one another (three.js, deprecated elements).
    """
    found: list[str] = []
    page.on("console", lambda said: found.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: found.append(str(error)))
    page.on("response", lambda answer: found.append(answer.url) if answer.status >= 400 else None)
    return found


def keep(page: Any, name: str, tmp_path: Path, is_drawn: Callable[[Pixels], bool]) -> None:
    """Wait until a page is drawn, and keep its picture."""
    folder = Path(os.environ.get("TORCHKEEP_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        until(lambda: is_drawn(pixels_of(page)))
    finally:
        page.screenshot(path=folder / f"{name}.png")
