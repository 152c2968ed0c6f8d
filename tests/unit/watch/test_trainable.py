"""What is told of a model's parts: folded to what differs, printed, and drawn without a text that is cut or covered."""

from __future__ import annotations

import io
import itertools
import json
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest
from torch import nn

from torchkeep.watch.console import Console
from torchkeep.watch.trainable import folded, show_trainable, state_of, trainable_svg

SVG = "{http://www.w3.org/2000/svg}"
Row = dict[str, Any]


def block(size: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(size, size, 3), nn.BatchNorm2d(size), nn.ReLU())


def model(num_blocks: int = 19) -> nn.Module:
    parts = {
        "features": nn.Sequential(*(block(8) for _ in range(num_blocks))),
        "classifier": nn.Sequential(nn.Dropout(0.2), nn.Linear(8, 2)),
    }
    made = nn.Module()
    for name, part in parts.items():
        made.add_module(name, part)
    return made


def rows_of(model: nn.Module, frozen: tuple[str, ...] = (), rates: dict[str, float] | None = None) -> list[Row]:
    """What a training would record; ``frozen`` and ``rates`` go by the beginning of a parameter's name."""
    rows = []
    for name, module in model.named_modules():
        own = [f"{name}.{at}".lstrip(".") for at, _ in module.named_parameters()]
        learns = {not one.startswith(frozen) for one in own} if frozen else {True} if own else set()
        scales = {scale for one in own for start, scale in (rates or {}).items() if one.startswith(start)}
        inside = f"{name}.".startswith(frozen) if frozen and name else False
        rows.append({
            "name": name or "(model)", "kind": type(module).__name__, "depth": name.count(".") + 1 if name else 0,
            "num_parameters": sum(p.numel() for p in module.parameters()),
            "learns": "partly" if len(learns) == 2 else learns == {True},
            "rate_scale": scales.pop() if len(scales) == 1 else None,
            "time_fraction": 0.01, "is_cached": inside,
        })  # fmt: skip
    return rows


def payload_of(rows: list[Row], **changed: Any) -> dict[str, Any]:
    facts = {
        "frontier": ["features.18 → 1280 float32"], "cache_bytes": 1_249_280, "views": 4, "expected_speedup": 31.26,
        "measured_speedup": 29.8, "note": None,
    }  # fmt: skip
    return {"rows": rows, **facts, **changed}


def told(rows: list[Row]) -> list[tuple[str, str]]:
    return [(row["name"], state_of(row)) for row in rows]


def first(count: int) -> tuple[str, ...]:
    return tuple(f"features.{n}." for n in range(count))


# --- folding


def test_neighbours_of_equal_state_become_one_line() -> None:
    assert told(folded(rows_of(model(), first(14)))) == [
        ("(model)", "learns in part"),
        ("features", "learns in part"),
        ("features.0 … features.13", "frozen, computed once"),
        ("features.14 … features.18", "learns"),
        ("classifier", "learns"),
    ]


def test_a_joined_line_adds_up() -> None:
    rows = rows_of(model(), first(14))
    joined = folded(rows)[2]
    kept = [row for row in rows if row["name"] in {f"features.{n}" for n in range(14)}]
    assert joined["num_parameters"] == sum(row["num_parameters"] for row in kept)
    assert joined["time_fraction"] == pytest.approx(0.14)
    assert joined["kind"] == "14 × Sequential"
    assert joined["depth"] == 2


def test_a_part_of_one_state_is_one_line() -> None:
    assert told(folded(rows_of(model(), ("features.",)))) == [
        ("(model)", "learns in part"), ("features", "frozen, computed once"), ("classifier", "learns"),
    ]  # fmt: skip


@pytest.mark.parametrize("frozen", [(), ("features.", "classifier.")])
def test_a_model_of_one_state_shows_its_parts(frozen: tuple[str, ...]) -> None:
    names = [row["name"] for row in folded(rows_of(model(), frozen))]
    assert names == ["(model)", "features", "classifier"]


def test_other_rates_stand_apart() -> None:
    rates = {f"features.{n}.": 0.5 ** (4 - n // 5) for n in range(19)} | {"classifier.": 1.0}
    assert told(folded(rows_of(model(), (), rates)))[2:] == [
        ("features.0 … features.4", "learns, rate × 0.0625"),
        ("features.5 … features.9", "learns, rate × 0.125"),
        ("features.10 … features.14", "learns, rate × 0.25"),
        ("features.15 … features.18", "learns, rate × 0.5"),
        ("classifier", "learns"),
    ]


def test_a_part_without_parameters_divides_nothing() -> None:
    rows = rows_of(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.Linear(2, 1)), ("3.",))
    assert told(folded(rows)) == [("(model)", "learns in part"), ("0 … 2", "learns"), ("3", "frozen, computed once")]
    assert state_of(rows[2]) == "no parameters"


@pytest.mark.parametrize("most", [3, 5, 8, 24])
def test_no_more_lines_than_asked_for_and_no_parameter_lost(most: int) -> None:
    every_other = tuple(f"features.{n}." for n in range(0, 60, 2))
    rows = folded(rows_of(model(60), every_other), most)
    assert 2 < len(rows) <= most
    top = [row for row in rows if row["depth"] == 1]
    assert sum(row["num_parameters"] for row in top) == rows[0]["num_parameters"]


def test_a_flat_model_that_alternates_ends_in_one_line() -> None:
    rows = rows_of(nn.Sequential(*(nn.Linear(2, 2) for _ in range(40))), tuple(f"{n}." for n in range(0, 40, 2)))
    found = folded(rows, 10)
    assert len(found) == 10
    assert told(found)[-1] == ("8 … 39", "learns in part")
    assert sum(row["num_parameters"] for row in found[1:]) == rows[0]["num_parameters"]


def test_nothing_is_folded_of_nothing() -> None:
    assert folded([]) == []
    ElementTree.fromstring(trainable_svg(payload_of([], frontier=[])))


# --- the console


def printed(payload: dict[str, Any]) -> str:
    file = io.StringIO()
    show_trainable(Console(file=file), payload)
    return file.getvalue()


def test_the_console_tells_state_share_frontier_cache_and_gain() -> None:
    text = printed(payload_of(rows_of(model(), first(14))))
    lines = text.splitlines()
    assert lines[0].split() == ["module", "kind", "state", "parameters", "share", "time"]
    assert lines[3].split() == [
        "features.0", "…", "features.13", "14", "×", "Sequential", "frozen,", "computed", "once", "8,400", "73.6", "%",
        "14.0", "%",
    ]  # fmt: skip
    assert lines[-4:] == [
        "3,018 of 11,418 parameters learn (26.4 %)",
        "frontier: features.18 → 1280 float32",
        "cache: 1.2 MB, 4 views of each sample",
        "speed-up: expected 31.3 ×, measured 29.8 ×",
    ]


def test_the_console_says_why_not() -> None:
    nothing = dict.fromkeys(("cache_bytes", "views", "expected_speedup", "measured_speedup"))
    text = printed(payload_of(rows_of(model()), frontier=[], note="no frontier: the stem learns", **nothing))
    assert text.splitlines()[-2:] == ["11,418 of 11,418 parameters learn (100.0 %)", "no frontier: the stem learns"]


# --- the picture

WIDE = "an_encoder_with_a_very_long_name_of_its_own" * 2
CASES: dict[str, dict[str, Any]] = {
    "frozen": payload_of(rows_of(model(), ("features.",))),
    "in part": payload_of(rows_of(model(), first(14))),
    "nothing frozen": payload_of(rows_of(model()), frontier=[], note="no frontier: the stem learns. " * 12),
    "layer decay": payload_of(rows_of(model(), (), {f"features.{n}.": 0.9**n for n in range(19)})),
    "long names": payload_of([row | {"name": WIDE, "kind": WIDE} for row in rows_of(model(), first(9))]),
    "signs": payload_of(
        [row | {"name": '<&\x1b[0m">κόσμος 模型', "time_fraction": None} for row in rows_of(model(), first(9))],
        note="模型的一部分" * 60,
    ),
    "many crossings": payload_of(
        rows_of(model(), first(5)), frontier=[f"features.{n} → 32 × 14 × 14 float16" for n in range(14)]
    ),
}


def boxes(svg: str) -> list[tuple[float, float, float, float, str]]:
    """Each text's left, top, right and bottom, for letters of the widest of the fonts named."""
    found = []
    for text in ElementTree.fromstring(svg).iter(f"{SVG}text"):
        size, said = float(text.get("font-size", 13)), text.text or ""
        width = 0.602 * size * sum(1 if letter.isascii() or letter in "…×→" else 2 for letter in said)
        x, y = float(text.get("x", 0)), float(text.get("y", 0))
        left = x - width if text.get("text-anchor") == "end" else x
        found.append((left, y - 0.8 * size, left + width, y + 0.25 * size, said))
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("width", [300, 960, 1600])
def test_no_text_is_cut_or_covers_another(case: str, width: int) -> None:
    svg = trainable_svg(CASES[case], width)
    root = ElementTree.fromstring(svg)
    _, _, right, bottom = map(float, root.get("viewBox", "").split())
    found = boxes(svg)
    assert [box for box in found if box[0] < 0 or box[1] < 0 or box[2] > right or box[3] > bottom] == []
    pairs = itertools.combinations(found, 2)
    covered = [(a, b) for a, b in pairs if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]]
    assert covered == []


@pytest.mark.parametrize("case", CASES)
def test_bars_stay_in_the_picture_and_off_the_texts(case: str) -> None:
    svg = trainable_svg(CASES[case])
    root = ElementTree.fromstring(svg)
    bars = [bar for bar in root.iter(f"{SVG}rect") if bar.get("height") == "10"]
    assert bars
    for bar in bars:
        x, y, width = (float(bar.get(key, 0)) for key in ("x", "y", "width"))
        assert 0 <= x <= x + width <= float(root.get("width", 0))
        assert not [b for b in boxes(svg) if b[0] < x + width and x < b[2] and b[1] < y + 10 and y < b[3]]


def test_a_reader_that_sees_nothing_is_told_the_same() -> None:
    root = ElementTree.fromstring(trainable_svg(CASES["in part"]))
    assert root.get("role") == "img"
    description = root.findtext(f"{SVG}desc", "")
    for word in ("26.4 %", "features.0 … features.13: frozen, computed once", "1280 float32", "1.2 MB", "29.8 ×"):
        assert word in description
    assert root.findtext(f"{SVG}title") == "What learns in Module"


def test_states_differ_in_shape_not_only_in_colour() -> None:
    rows = rows_of(model(1), ("features.0.0.",))
    rows[5]["is_cached"] = True  # a ReLU, so that it stands alone
    svg = trainable_svg(payload_of(rows))
    assert svg.count('r="6"') > 0
    assert svg.count("a5 5") > 0
    assert 'width="9" height="9"' in svg
    assert 'r="2"' in svg


def test_the_frontier_stands_below_what_is_computed_once() -> None:
    texts = {said: top for _, top, _, _, said in boxes(trainable_svg(CASES["in part"]))}
    frontier = texts["frontier: features.18 → 1280 float32"]
    assert texts["features.0 … features.13"] < frontier < texts["features.14 … features.18"]
    assert "stroke-dasharray" in trainable_svg(CASES["in part"])
    assert "stroke-dasharray" not in trainable_svg(CASES["nothing frozen"])


def test_the_picture_comes_from_json_asks_no_network_and_is_always_the_same() -> None:
    for payload in CASES.values():
        svg = trainable_svg(payload)
        assert svg == trainable_svg(json.loads(json.dumps(payload)))
        assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")
        assert "@import" not in svg
