"""A mesh is shown as it is, or smaller and said so; nothing in it names a vertex that is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load

from torchkeep.errors import DataError
from torchkeep.watch import meshes
from torchkeep.watch.media import MediaStore
from torchkeep.watch.meshes import MOST_VERTICES, mesh

SQUARE = [[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]]


def shown(tmp_path: Path, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    media = MediaStore(tmp_path)
    told = mesh(*args, **kwargs).settle(media)
    parts = load(media.read(told["media"]))
    assert told["num_vertices"] == len(parts["vertices"]) == len(parts["colors"])
    assert told["num_faces"] == len(parts.get("faces", ()))
    kinds = {"vertices": np.float32, "colors": np.uint8, "faces": np.int32}
    assert all(part.dtype == kinds[name] and part.shape[1:] == (3,) for name, part in parts.items())
    return told, parts


def sheet(size: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """A curved surface of size × size vertices, with quads."""
    row, column = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
    vertices = np.stack([row, column, 20 * np.sin(row / 30)], -1).reshape(-1, 3).astype(np.float32)
    first = (row[:-1, :-1] * size + column[:-1, :-1]).ravel()
    return vertices, np.stack([first, first + 1, first + size + 1, first + size], 1)


@pytest.mark.parametrize("batch", [lambda x: x, lambda x: torch.tensor(x), lambda x: torch.tensor(x)[None], np.array])
def test_triangles_as_they_are(tmp_path: Path, batch: Any) -> None:
    told, parts = shown(tmp_path, batch(SQUARE), batch([[0, 1, 2], [0, 2, 3]]))
    np.testing.assert_array_equal(parts["vertices"], SQUARE)
    np.testing.assert_array_equal(parts["faces"], [[0, 1, 2], [0, 2, 3]])
    assert told["num_left_out"] == 0
    assert told["caption"] == ""
    assert "num_vertices_before" not in told


def test_polygons_are_cut_into_triangles(tmp_path: Path) -> None:
    assert shown(tmp_path, SQUARE, [[0, 1, 2, 3]])[1]["faces"].tolist() == [[0, 1, 2], [0, 2, 3]]
    mixed = shown(tmp_path, [*SQUARE, [0.5, 2, 0]], [[0, 1, 2], (3, 2, 1, 0), [0, 1, 2, 4, 3]])[1]["faces"].tolist()
    assert sorted(mixed) == [[0, 1, 2], [0, 1, 2], [0, 2, 4], [0, 4, 3], [3, 1, 0], [3, 2, 1]]


def test_points_have_no_faces(tmp_path: Path) -> None:
    assert "faces" not in shown(tmp_path, torch.rand(10, 3))[1]
    assert "faces" not in shown(tmp_path, SQUARE, [])[1]
    assert shown(tmp_path, np.zeros((0, 3)))[0]["num_vertices"] == 0


@pytest.mark.parametrize(
    ("faces", "where", "got"),
    [([[0, 1, 2], [0, 1, 4]], "row 1", "index 4"), ([[0, -1, 2]], "row 0", "index -1"),
     ([[0, 1, 2.5]], "row 0", "index 2.5"), ([[0, 1, float("nan")]], "row 0", "index nan"),
     ([[0, 1, 2], [0, 1, 2, 9]], "row 1", "index 9"), (torch.tensor([[0, 1, 1 << 30]]), "row 0", "index 1073741824")],
)  # fmt: skip
def test_a_wrong_index_is_named(faces: Any, where: str, got: str) -> None:
    with pytest.raises(DataError) as raised:
        mesh(SQUARE, faces)
    assert raised.value.where == f"mesh, faces, {where}"
    assert raised.value.got == got
    assert raised.value.expected == "whole numbers from 0 to 3"


@pytest.mark.parametrize(
    "wrong",
    [{"vertices": np.zeros((4, 2))}, {"vertices": np.zeros((2, 4, 3))}, {"vertices": "cube"}, {"faces": [[0, 1]]},
     {"faces": [0, 1, 2]}, {"faces": 3}, {"faces": [[0, 1, 2], 3]}, {"faces": [[True, True, False]]},
     {"colors": np.zeros((3, 3))}, {"colors": 1}, {"truth": SQUARE}, {"truth": (np.zeros(3), None)},
     {"truth": (SQUARE, [[0, 1, 7]])}],
    ids=str,
)  # fmt: skip
def test_what_is_no_mesh_is_refused_at_the_call(wrong: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        mesh(**{"vertices": SQUARE, **wrong})


def test_several_meshes_are_told_apart_by_the_error() -> None:
    with pytest.raises(DataError, match="batch of 2"):
        mesh(torch.zeros(2, 5, 3))


def test_what_is_not_finite_is_left_out_and_counted(tmp_path: Path) -> None:
    vertices = [*SQUARE, [np.nan, 0, 0], [1e300, 0, 0]]
    told, parts = shown(tmp_path, vertices, [[0, 4, 1], [1, 2, 3], [5, 0, 1]])
    assert told["num_left_out"] == 2
    np.testing.assert_array_equal(parts["vertices"][parts["faces"]], [[SQUARE[1], SQUARE[2], SQUARE[3]]])
    assert shown(tmp_path, vertices)[0]["num_left_out"] == 2
    assert shown(tmp_path, [[np.inf] * 3])[0]["num_vertices"] == 0


@pytest.mark.parametrize(
    ("colors", "expected"),
    [([255, 0, 10], [255, 0, 10]), (np.full((4, 3), 0.2), [51, 51, 51]), (torch.full((4, 4), 0.5), [128, 128, 128]),
     (np.full((4, 3), 300), [255, 255, 255]), (np.full((4, 3), np.nan), [0, 0, 0]), ((0.0, 1.0, 0.0), [0, 255, 0])],
)  # fmt: skip
def test_colours(tmp_path: Path, colors: Any, expected: list[int]) -> None:
    assert shown(tmp_path, SQUARE, None, colors)[1]["colors"].tolist() == [expected] * 4


def test_truth_is_in_the_same_mesh_in_a_colour_of_its_own(tmp_path: Path) -> None:
    raised = np.array(SQUARE) + np.array([0, 0, 1])
    told, parts = shown(tmp_path, SQUARE, [[0, 1, 2]], truth=(raised, [[0, 1, 2], [0, 2, 3]]))
    assert told["caption"] == "prediction orange, truth blue"
    assert parts["faces"].tolist() == [[0, 1, 2], [4, 5, 6], [4, 6, 7]]
    assert len(np.unique(parts["colors"][:4], axis=0)) == len(np.unique(parts["colors"][4:], axis=0)) == 1
    assert (parts["colors"][0] != parts["colors"][4]).any()
    told, parts = shown(tmp_path, SQUARE, None, [1, 2, 3], truth=(raised, None))
    assert told["caption"] == "prediction in its own colours, truth blue"
    assert parts["colors"][0].tolist() == [1, 2, 3]


def test_a_large_mesh_becomes_as_large_as_a_page_can_draw(tmp_path: Path) -> None:
    vertices, quads = sheet(400)
    told, parts = shown(tmp_path, vertices, quads, truth=(vertices + np.array([0, 0, 50]), quads))
    assert told["num_vertices_before"] == 2 * 400**2
    assert MOST_VERTICES / 2 < told["num_vertices"] <= MOST_VERTICES
    assert told["num_faces"] > told["num_vertices"]
    assert len(np.unique(parts["colors"], axis=0)) == 2  # no vertex is made of both
    blue = parts["colors"][parts["faces"]] == parts["colors"][-1]
    assert (blue.all((1, 2)) | ~blue.any((1, 2))).all()  # and no face
    assert parts["faces"].max() < told["num_vertices"]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(60, 400), st.sampled_from([1e-30, 1.0, 1e30]), st.booleans())
def test_fewer_vertices_stay_where_they_were(seed: int, num: int, scale: float, is_flat: bool) -> None:
    random = np.random.default_rng(seed)
    vertices = (random.normal(size=(num, 3)) * [1, 1, not is_flat] * scale).astype(np.float32)
    colors = random.integers(0, 256, (num, 3), dtype=np.uint8)
    faces = random.integers(0, num, (3 * num, 3), dtype=np.int32)
    most, fewest = meshes.MOST_VERTICES, meshes._FEWEST_CELLS
    meshes.MOST_VERTICES, meshes._FEWEST_CELLS = num // 2, 1
    try:
        fewer, _, kept = meshes._clustered(vertices, colors, faces, np.zeros(num, bool))
    finally:
        meshes.MOST_VERTICES, meshes._FEWEST_CELLS = most, fewest
    assert 0 < len(fewer) <= num // 2
    assert ((kept >= 0) & (kept < len(fewer))).all()
    corners = np.sort(kept, 1)
    assert (corners[:, 1:] != corners[:, :-1]).all()
    assert len(np.unique(corners, axis=0)) == len(kept)
    extent = np.ptp(vertices.astype(np.float64), axis=0).max()
    for end in (np.min, np.max):  # a cell is far smaller than a third where so many are left
        assert np.abs(end(fewer, axis=0) - end(vertices, axis=0)).max() <= extent / 3
    assert (fewer.min(0) >= vertices.min(0) - 1e-6 * extent).all()
    assert (fewer.max(0) <= vertices.max(0) + 1e-6 * extent).all()


def test_points_at_one_place_become_one(tmp_path: Path) -> None:
    told, _ = shown(tmp_path, np.ones((70_000, 3)))
    assert (told["num_vertices"], told["num_vertices_before"]) == (1, 70_000)


def test_the_mesh_is_that_of_the_call(tmp_path: Path) -> None:
    vertices, media = torch.zeros(3, 3), MediaStore(tmp_path)
    late = mesh(vertices)
    vertices.fill_(1)
    assert not load(media.read(late.settle(media)["media"]))["vertices"].any()


def test_colors_far_below_none_are_none(tmp_path: Path) -> None:
    media = MediaStore(tmp_path)
    told = mesh(np.zeros((2, 3)), colors=np.array([[-3e38, 0.5, 1], [0, 0, 1]], np.float32)).settle(media)
    assert load(media.read(told["media"]))["colors"].tolist() == [[0, 128, 255], [0, 0, 255]]
