"""Meshes and clouds of points, small enough for a browser."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..contracts import Json
from ..errors import DataError
from .kept import Kept, numbers
from .media import Late, MediaStore

MOST_VERTICES = 65_535  # what the 16-bit indices of TensorBoard's page can name
_FEWEST_CELLS = 31  # along the longest side: two parts of so many cells cannot have too many
_MOST_CELLS = 1 << 20  # three of them and the part fit into 64 bits
_GREY, _ORANGE, _BLUE = (176, 176, 176), (216, 96, 28), (59, 110, 165)

Array = np.ndarray[Any, Any]


def mesh(vertices: Any, faces: Any = None, colors: Any = None, *, truth: tuple[Any, Any] | None = None) -> Late:
    """A mesh of triangles or of other polygons, which are cut into triangles; without faces, a cloud of points.

    ``truth`` is another (vertices, faces), shown in the same mesh in a colour of its own. What has a corner that is not
    finite is left out and counted; beyond 65,535 vertices near ones become one, which the payload says.

    Shapes:  vertices (N, 3) or (1, N, 3); faces (F, 3), (F, 4) or a list of polygons; colors (N, 3) or (3,)
    Units:   colours uint8, or floats in 0 … 1
    Raises:  DataError for other shapes, and for an index that no vertex has, with its row and value
    """
    parts = [_part(vertices, faces, colors, "mesh")]
    if truth is not None:
        if not isinstance(truth, tuple | list) or len(truth) != 2:
            raise _wrong("truth", type(truth).__name__, "a pair (vertices, faces); faces may be None")
        parts.append(_part(*truth, None, "truth"))
    return _Mesh(parts)


def _wrong(where: str, got: object, expected: str) -> DataError:
    return DataError("this is no mesh", where=where, got=str(got), expected=expected)


def _unbatched(values: Any, where: str) -> Any:
    """Raises:  DataError where there are several, or none"""
    if values.ndim == 0:
        raise _wrong(where, f"the number {values}", "a row for each")
    if values.ndim == 3 and len(values) != 1:
        expected = "one mesh a call, such as vertices[0]: others would be drawn into it"
        raise _wrong(where, f"a batch of {len(values)}, shape {tuple(values.shape)}", expected)
    return values[0] if values.ndim == 3 else values


@dataclass(frozen=True)
class _Part:
    vertices: Kept
    faces: Array | None
    colors: Kept | None


def _part(vertices: Any, faces: Any, colors: Any, where: str) -> _Part:
    points = _unbatched(numbers(vertices, f"{where}, vertices"), f"{where}, vertices")
    shape = tuple(points.shape)
    if len(shape) != 2 or shape[1] != 3:
        raise _wrong(f"{where}, vertices", f"shape {shape}", "(N, 3): x, y and z of each vertex")
    triangles = None if faces is None else _triangles(faces, shape[0], f"{where}, faces")
    if colors is None:
        return _Part(Kept(points), triangles, None)
    shades = _unbatched(numbers(colors, f"{where}, colors"), f"{where}, colors")
    if tuple(shades.shape) not in ((3,), shape, (shape[0], 4)):
        raise _wrong(f"{where}, colors", f"shape {tuple(shades.shape)}", f"{shape}, a colour for each vertex, or (3,)")
    return _Part(Kept(points), triangles, Kept(shades))


def _triangles(faces: Any, num_vertices: int, where: str) -> Array:
    """Indices (F, 3) int32, which are checked here and now, where the caller can see the error."""
    by_size: list[Array] = []
    if isinstance(faces, list | tuple) and len({np.size(polygon) for polygon in faces}) > 1:
        for size in {len(polygon) for polygon in faces if np.ndim(polygon) == 1}:
            rows = [row for row, polygon in enumerate(faces) if np.ndim(polygon) == 1 and len(polygon) == size]
            by_size.append(_checked(np.array([faces[row] for row in rows]), rows, num_vertices, where))
        if sum(map(len, by_size)) != len(faces):
            raise _wrong(where, "a list of mixed kinds", "lists of vertex indices")
    else:
        together = Kept(_unbatched(numbers(faces, where), where)).array()
        by_size.append(_checked(together, range(len(together)), num_vertices, where))
    fans = [polygons[:, [0, corner, corner + 1]] for polygons in by_size for corner in range(1, polygons.shape[1] - 1)]
    return np.concatenate([np.zeros((0, 3), np.int32), *fans]).astype(np.int32)


def _checked(polygons: Array, rows: Sequence[int], num_vertices: int, where: str) -> Array:
    if not polygons.size:
        return np.zeros((0, 3), np.int32)
    if polygons.ndim != 2 or polygons.shape[1] < 3 or polygons.dtype.kind not in "iuf":
        raise _wrong(where, f"shape {polygons.shape} of {polygons.dtype}", "three or more vertex indices a face")
    with np.errstate(invalid="ignore"):
        bad = ~((polygons >= 0) & (polygons < num_vertices) & (polygons == np.floor(polygons)))
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise DataError(
            "a face names a vertex that is not there", where=f"{where}, row {rows[row]}",
            got=f"index {polygons[row, column]}", expected=f"whole numbers from 0 to {num_vertices - 1:,}",
        )  # fmt: skip
    return polygons.astype(np.int64)


@dataclass(frozen=True)
class _Mesh:
    parts: list[_Part]

    def settle(self, media: MediaStore) -> dict[str, Json]:
        from safetensors.numpy import save

        hues = (_GREY,) if len(self.parts) == 1 else (_ORANGE, _BLUE)
        made = [_finite(part, hue) for part, hue in zip(self.parts, hues, strict=True)]
        vertices, colors = (np.concatenate([part[n] for part in made]) for n in (0, 1))
        starts = (0, len(made[0][0]))
        faces = np.concatenate([part[2] + start for part, start in zip(made, starts, strict=False)])
        before, owner = len(vertices), np.arange(len(vertices)) >= starts[1]
        if before > MOST_VERTICES:
            vertices, colors, faces = _clustered(vertices, colors, faces, owner)
        parts = {"vertices": vertices, "colors": colors} | ({"faces": faces} if len(faces) else {})
        data = save({name: np.ascontiguousarray(part) for name, part in parts.items()})
        facts: dict[str, Json] = {"num_vertices_before": before} if len(vertices) < before else {}
        facts["caption"] = self._legend() if len(self.parts) == 2 else ""
        return {
            "media": media.put(data, ".safetensors"), "num_vertices": len(vertices), "num_faces": len(faces),
            "num_left_out": sum(part[3] for part in made), **facts,
        }  # fmt: skip

    def _legend(self) -> str:
        return f"prediction {'in its own colours' if self.parts[0].colors else 'orange'}, truth blue"


def _finite(part: _Part, hue: tuple[int, int, int]) -> tuple[Array, Array, Array, int]:
    """Vertices float32, colours uint8 and faces int32 of what is finite; how many faces, or points, are not."""
    with np.errstate(over="ignore"):
        vertices = part.vertices.array().astype(np.float32)
    colors = np.broadcast_to(np.array(hue, np.uint8) if part.colors is None else _shades(part.colors), vertices.shape)
    is_good = np.isfinite(vertices).all(1)
    places = np.cumsum(is_good, dtype=np.int32) - 1
    faces = np.zeros((0, 3), np.int32) if part.faces is None else part.faces[is_good[part.faces].all(1)]
    num_lost = int((~is_good).sum()) if part.faces is None else len(part.faces) - len(faces)
    return vertices[is_good], colors[is_good], places[faces], num_lost


def _shades(kept: Kept) -> Array:
    values: Any = kept.array()[..., :3]
    if values.dtype.kind == "f":
        values = np.nan_to_num(values).clip(0)
        values = (values * 255).round() if values.max(initial=0) <= 1 else values
    return np.asarray(np.clip(values, 0, 255).astype(np.uint8))


# --- fewer vertices


def _clustered(vertices: Array, colors: Array, faces: Array, owner: Array) -> tuple[Array, Array, Array]:
    """The same in fewer vertices: those in one cell of a grid become one. The finest grid that they fit is taken.

    Source:  Rossignac, Borrel 1993, "Multi-resolution 3D approximations for rendering complex scenes"
    """
    low = vertices.min(0).astype(np.float64)
    places = (vertices - low) / (max((vertices.max(0) - low).max(), np.finfo(np.float32).tiny))
    fits, fails = _FEWEST_CELLS, _MOST_CELLS
    while fails - fits > max(1, fits // 64):
        cells = max(fits + 1, math.isqrt(fits * fails))
        if len(np.unique(_keys(places, owner, cells))) <= MOST_VERTICES:
            fits = cells
        else:
            fails = cells
    _, cluster = np.unique(_keys(places, owner, fits), return_inverse=True)
    sizes = np.bincount(cluster)
    means = [np.bincount(cluster, column) / sizes for column in (*vertices.T, *colors.T)]
    shades = np.stack(means[3:], 1).round().astype(np.uint8)
    return np.stack(means[:3], 1).astype(np.float32), shades, _kept_faces(cluster.astype(np.int64)[faces])


def _keys(places: Array, owner: Array, cells: int) -> Array:
    x, y, z = np.minimum((places * cells).astype(np.int64), cells - 1).T
    return np.asarray(((owner * cells + x) * cells + y) * cells + z)


def _kept_faces(faces: Array) -> Array:
    """Faces with three different corners, each once."""
    a, b, c = np.sort(faces, 1).T
    _, first = np.unique((a << 32) | (b << 16) | c, return_index=True)
    kept = np.sort(first)
    return np.asarray(faces[kept[((a != b) & (b != c))[kept]]].astype(np.int32))
