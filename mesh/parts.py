"""What a mesh file holds before it is one `Mesh`: parts, each with a material of its own; and how they become one."""

from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float, Int

from mesh import Mesh
from mesh.extract import vertex_normals
from mesh.pictures import LARGEST
from mesh.texels import look_up

_GREY = 0.5
_PLAIN = {"roughness": 1.0, "metallic": 0.0, "normal": (0.5, 0.5, 1.0)}  # where a material has no such texture
_GUTTER = 4  # texels around each picture of an atlas


@dataclass(eq=False)
class Material:
    """A name, one colour (sRGB-coded) if it says any, and textures as those of `Mesh`."""

    name: str = ""
    color: Float[np.ndarray, "3"] | None = None
    textures: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(eq=False)
class Part:
    """Triangles with one material; `colors` are sRGB-coded; uvs as those of `Mesh`."""

    vertices: Float[np.ndarray, "V 3"]
    faces: Int[np.ndarray, "F 3"]
    normals: Float[np.ndarray, "V 3"] | None = None
    colors: Float[np.ndarray, "V 3"] | None = None
    uvs: Float[np.ndarray, "T 2"] | None = None
    uv_faces: Int[np.ndarray, "F 3"] | None = None
    material: Material = field(default_factory=Material)


def assemble(parts: list[Part], notes: list[str]) -> Mesh:
    """One mesh of all parts. Vertices at the same place become one, unless their colours differ; what else had to be done goes to `notes`.

    The textures and uvs of a single material are kept as they are. The pictures of several are put side by side into one, and uvs move along.
    Where there is a texture, the vertex colours are read from it.
    """
    parts = [part for part in parts if len(part.faces)]
    if not parts:
        raise ValueError("it has no triangles")
    vertices = np.concatenate([part.vertices for part in parts]).astype(np.float64)
    starts = np.cumsum([0] + [len(part.vertices) for part in parts[:-1]])
    faces = np.concatenate([part.faces + start for part, start in zip(parts, starts, strict=True)]).astype(np.int64)
    textures, uvs, uv_faces = _textures(parts, notes)
    colors = None if "albedo" in textures else _colors(parts)
    old, index = _weld(vertices, colors)
    normals = _normals(parts, vertices, faces, index, len(old))
    faces = index[faces]
    mesh = Mesh(vertices[old], faces, None if colors is None else colors[old], normals, uvs, uv_faces, textures)
    return _colored(mesh) if "albedo" in textures else mesh


def _colored(mesh: Mesh) -> Mesh:
    from mesh.bake import vertex_colors

    return replace(mesh, colors=vertex_colors(mesh))


def _colors(parts: list[Part]) -> np.ndarray | None:
    """Vertex colours, or each material's own; None if no part has any."""
    if all(part.colors is None and part.material.color is None for part in parts):
        return None
    found = []
    for part in parts:
        color = _GREY if part.material.color is None else part.material.color
        found.append(np.zeros((len(part.vertices), 3)) + (color if part.colors is None else part.colors))
    return np.clip(np.nan_to_num(np.concatenate(found)), 0, 1)


def _weld(vertices: np.ndarray, colors: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The first of each set of equal vertices, in their order, and for every vertex its set."""
    rows = vertices.astype(np.float32) + np.float32(0)  # no negative zeros
    if colors is not None:
        rows = np.hstack([rows, np.round(colors * 255).astype(np.float32)])
    whole = np.ascontiguousarray(rows).view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1])))[:, 0]
    _, first, index = np.unique(whole, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return first[order], rank[index]


def _normals(parts: list[Part], vertices: np.ndarray, faces: np.ndarray, index: np.ndarray, count: int) -> np.ndarray:
    """The file's normals, their mean where vertices became one; made from the faces where the file has none or nonsense."""
    given = [np.full(part.vertices.shape, np.nan) if part.normals is None else part.normals for part in parts]
    given = np.nan_to_num(np.concatenate(given).astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    size = np.nanmax(np.abs(np.where(np.isfinite(vertices), vertices, 0)), initial=1e-30)
    made = np.zeros((count, 3))
    with np.errstate(invalid="ignore", over="ignore"):
        places = np.zeros((count, 3))
        places[index] = vertices / size
        made[:] = vertex_normals(places, index[faces])
        total = np.zeros((count, 3))
        np.add.at(total, index, given / np.maximum(np.linalg.norm(given, axis=1, keepdims=True), 1e-30))
        length = np.linalg.norm(total, axis=1, keepdims=True)
    made = np.where(np.isfinite(made).all(1, keepdims=True), made, [0.0, 0.0, 1.0])
    return np.where(length > 1e-3, total / np.maximum(length, 1e-30), made)


def _textures(
    parts: list[Part], notes: list[str]
) -> tuple[dict[str, np.ndarray], np.ndarray | None, np.ndarray | None]:
    """Textures, uvs and uv_faces of the whole."""
    textured = [part for part in parts if part.material.textures and part.uvs is not None]
    if any(part.material.textures and part.uvs is None for part in parts):
        notes.append("a texture without texture coordinates is left out")
    if any(part.colors is not None and np.ptp(part.colors, axis=0).max(initial=0) > 0.02 for part in textured):
        notes.append("its vertex colours are left out where there is a texture")
    materials = list({id(part.material): part.material for part in textured}.values())
    if not textured:
        if any(part.uvs is None for part in parts):
            return {}, None, None
        moves = [part.uvs for part in parts]
        textures: dict[str, np.ndarray] = {}
    elif len(materials) == 1 and len(textured) == len(parts):
        moves, textures = [part.uvs for part in parts], dict(materials[0].textures)
    else:
        parts = [_shifted(part) if part.material.textures and part.uvs is not None else _pointed(part) for part in parts]  # fmt: skip
        moves, textures = _side_by_side(parts)
        notes.append(f"{len({id(part.material) for part in parts})} materials were put into one texture")
    starts = np.cumsum([0] + [len(uvs) for uvs in moves[:-1]])
    uv_faces = np.concatenate([part.uv_faces + start for part, start in zip(parts, starts, strict=True)])
    return textures, np.concatenate(moves).astype(np.float32), uv_faces.astype(np.int64)


def _shifted(part: Part) -> Part:
    """Every face's uvs moved by whole pictures to near [0, 1], where a repeated texture looks the same."""
    corners = part.uvs.astype(np.float64)[part.uv_faces]
    if part.uvs.min() >= 0 and part.uvs.max() <= 1:
        return part
    corners = corners - np.floor(corners.min(1, keepdims=True) + 1e-6)
    return replace(part, uvs=corners.reshape(-1, 2), uv_faces=np.arange(corners.shape[0] * 3).reshape(-1, 3))


def _pointed(part: Part) -> Part:
    """A part without a texture, with a texture of its one colour (the mean of its vertices' colours)."""
    color = np.full(3, _GREY) if part.material.color is None else part.material.color
    if part.colors is not None and len(part.colors):
        color = part.colors.mean(0)
    picture = np.zeros((1, 1, 3), np.float32) + np.asarray(color, np.float32)
    material = Material(part.material.name, part.material.color, {"albedo": picture})
    return replace(part, uvs=np.full((1, 2), 0.5), uv_faces=np.zeros_like(part.faces), material=material)


def _side_by_side(parts: list[Part]) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Equal square cells, one for each material, row by row; the uvs of each part in them, and the pictures.

    A cell holds its picture as often as uvs repeat it, continued by `_GUTTER` texels on every side.
    """
    materials = list({id(part.material): part.material for part in parts}.values())
    columns = int(np.ceil(np.sqrt(len(materials))))
    rows = -(-len(materials) // columns)
    repeats = {id(material): np.ones(2, int) for material in materials}
    for part in parts:
        reach = np.ceil(part.uvs.max(0) - 1e-6).astype(int)
        repeats[id(part.material)] = np.maximum(repeats[id(part.material)], reach)
    largest = max(
        max(p.shape[:2] * repeats[id(m)][::-1])
        for m in materials
        for p in m.textures.values()  # fmt: skip
    )
    side = int(max(8, min(largest, LARGEST // columns - 2 * _GUTTER)))
    cell = side + 2 * _GUTTER
    textures = {}
    for name in dict.fromkeys(name for material in materials for name in material.textures):
        tail = (3,) if name in ("albedo", "normal") else ()
        whole = np.zeros((rows * cell, columns * cell, *tail), np.float32)
        for i, material in enumerate(materials):
            plain = _PLAIN.get(name, _GREY if material.color is None else material.color)
            picture = material.textures.get(name, np.zeros((1, 1, *tail), np.float32) + np.float32(plain))
            row, column = divmod(i, columns)
            place = (np.arange(-_GUTTER, side + _GUTTER) + 0.5) / side
            u, v = np.meshgrid(*(place * times for times in repeats[id(material)]))
            filled = look_up(picture, np.stack([u, v], -1).reshape(-1, 2)).reshape(cell, cell, *tail)
            whole[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] = filled
        textures[name] = whole
    moved = []
    for part in parts:
        i = [id(material) for material in materials].index(id(part.material))
        inside = part.uvs / repeats[id(part.material)] * side + _GUTTER + np.array(divmod(i, columns)[::-1]) * cell
        moved.append(inside / [columns * cell, rows * cell])
    return moved, textures
