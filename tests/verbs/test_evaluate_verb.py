"""A run and its package measured by the command line, and the page that it writes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from torchkeep.model.images import ConvNet

TEXTS = """
[data]
train = "texts.csv"
valid_fraction = 0.3
workers = 0

[model]
name = "textconv"
args = {width = 8, channels = 8}

[train]
epochs = 1

[monitor]
views = []
"""


def test_a_package_and_its_run_are_measured_alike(packaged: Any) -> None:
    run = json.loads(packaged.say("evaluate", "runs/images", "valid", "--json").out)
    package = json.loads(packaged.say("evaluate", "images.tkp", "valid", "--json").out)
    assert {"test/loss", "test/accuracy"} <= set(run)
    assert package["test/accuracy"] == run["test/accuracy"]
    low, high = package["intervals"]["accuracy"]
    assert low <= package["test/accuracy"] <= high
    assert json.loads(packaged.say("evaluate", "runs/images", "--json").out)["valid/accuracy"] == run["test/accuracy"]
    said = packaged.say("evaluate", "images.tkp", "valid")
    assert "95 % interval" in said.out


def test_the_report_shows_the_worst_errors_and_needs_nothing_beside_it(packaged: Any) -> None:
    said = packaged.say("evaluate", "images.tkp", "valid", "--html", "report.html")
    assert said.code == 0, said.err
    page = (packaged.folder / "report.html").read_text(encoding="utf-8")
    assert "Confusion" in page
    assert "Calibration" in page
    assert 'src="http' not in page
    said = packaged.say("evaluate", "runs/images", "--html", "run.html")
    assert said.code == 0
    playwright = pytest.importorskip("playwright.sync_api")
    found: list[str] = []
    with playwright.sync_playwright() as started:
        try:
            browser = started.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        except playwright.Error:
            pytest.skip("there is no chromium here")
        shown = browser.new_page()
        shown.on("console", lambda message: found.append(message.text))
        shown.on(
            "request", lambda asked: found.append(asked.url) if not asked.url.startswith(("file:", "data:")) else 0
        )
        shown.goto((packaged.folder / "report.html").as_uri())
        assert shown.locator("h1").inner_text() == "images.tkp, measured"
        assert shown.locator("svg rect").count() > 0
        browser.close()
    assert found == []


def test_what_cannot_be_measured_is_said(packaged: Any) -> None:
    page = ("images.tkp", "valid", "--html", "nowhere/report.html")
    for words in (("images.tkp",), ("images.tkp", "nowhere"), ("missing.tkp", "valid"), ("runs/none",), page):
        said = packaged.say("evaluate", *words)
        assert said.code == 2, words
        assert "Traceback" not in said.err
    packaged.write_image("other/cats/0.png", np.zeros((8, 8, 3)))
    said = packaged.say("evaluate", "images.tkp", "other")
    assert said.code == 2
    assert "cats" in said.err


def test_a_sample_that_cannot_be_read_is_named(packaged: Any) -> None:
    packaged.write("valid/ants/7.png", "no image")
    said = packaged.say("evaluate", "images.tkp", "valid")
    assert said.code == 2
    assert "ants/7.png" in said.err
    lenient = ("--set", 'data.on_bad="mask"', "--set", "data.bad_fraction=0.5", "--run-dir", "runs/lenient", "--quiet")
    assert packaged.say("train", "images.toml", *lenient).code == 0
    said = packaged.say("evaluate", "runs/lenient", "--html", "report.html")
    assert said.code == 0, said.err
    assert "1 samples cannot be read" in said.out
    assert "ants/7.png" in said.out
    assert "ants/7.png" in (packaged.folder / "report.html").read_text(encoding="utf-8")
    assert json.loads(packaged.say("evaluate", "runs/lenient", "--json").out)["unanswered"] == 1


def test_tables_and_texts_are_measured_by_their_packages(desk: Any) -> None:
    desk.write_table()
    assert desk.say("train", "table.toml", "--quiet").code == 0
    assert desk.say("package", "runs/table", "-o", "table.tkp").code == 0
    found = json.loads(desk.say("evaluate", "table.tkp", "rows.csv", "--json", "--html", "table.html").out)
    assert 0 <= found["test/accuracy"] <= 1
    assert found["unanswered"] == 0
    assert all(low < high for low, high in found["intervals"].values())
    assert "colour blue" in (desk.folder / "table.html").read_text(encoding="utf-8")
    rows = "".join(f"a {('good', 'bad')[i % 2]} one {i},{i % 2}\n" for i in range(24))
    desk.write("texts.csv", f"text,label\n{rows}")
    desk.write("texts.toml", TEXTS)
    assert desk.say("train", "texts.toml", "--quiet").code == 0
    assert desk.say("package", "runs/texts", "-o", "texts.tkp").code == 0
    found = json.loads(desk.say("evaluate", "texts.tkp", "texts.csv", "--json", "--html", "texts.html").out)
    assert found["test/accuracy"] >= 0
    assert "one 1" in (desk.folder / "texts.html").read_text(encoding="utf-8")


def test_arrays_are_measured_by_their_package(desk: Any) -> None:
    draws = np.random.default_rng(0)
    labels = draws.integers(0, 2, 80)
    np.savez(desk.folder / "rows.npz", input=draws.normal(size=(80, 3)).astype(np.float32), label=labels)
    desk.write("arrays.toml", TEXTS.replace("texts.csv", "rows.npz").partition("[model]")[0]
               + '[model]\nname = "mlp"\n\n[train]\nepochs = 1\n\n[monitor]\nviews = []\n')  # fmt: skip
    assert desk.say("train", "arrays.toml", "--quiet").code == 0
    assert desk.say("package", "runs/arrays", "-o", "arrays.tkp").code == 0
    said = desk.say("evaluate", "arrays.tkp", "rows.npz", "--json", "--html", "arrays.html")
    assert said.code == 0, said.err
    assert 0 <= json.loads(said.out)["test/accuracy"] <= 1
    desk.write("rows.csv", "a,label\n1,0\n")
    assert ".npz" in desk.say("evaluate", "arrays.tkp", "rows.csv").err


def test_a_run_is_measured_in_one_pass(packaged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = ConvNet.forward

    def counted(self: ConvNet, image: Any) -> Any:
        seen.append(len(image))
        return real(self, image)

    monkeypatch.setattr(ConvNet, "forward", counted)
    assert packaged.say("evaluate", "runs/images").code == 0
    assert seen == [4, *[4] * 3]  # one batch is tried before, then the 12 of the split pass once
    refused = packaged.say("evaluate", "runs/images", "--workers", 1)
    assert refused.code == 2
    assert "torchkeep package" in refused.err
