"""Wavefront OBJ with its .mtl: positions, vertex colours, uvs, normals, polygons of any size; materials with colours and textures."""

from pathlib import Path

import numpy as np

from mesh.parts import Material, Part
from mesh.pictures import read_picture

# Options of a texture statement and how many words follow each; up to three numbers follow -o, -s and -t.
_OPTIONS = {"-blendu": 1, "-blendv": 1, "-boost": 1, "-mm": 2, "-texres": 1, "-clamp": 1, "-bm": 1, "-imfchan": 1, "-type": 1, "-cc": 1}  # fmt: skip
_MAPS = {"map_kd": "albedo", "map_pr": "roughness", "map_pm": "metallic", "norm": "normal", "map_kn": "normal"}


def read_obj(path: Path, notes: list[str]) -> list[Part]:
    """The file as parts, one for each material; ValueError if a line cannot be read. What was amiss but survivable goes to `notes`."""
    v, vt, vn, materials = [], [], [], {}
    groups: dict[
        tuple[str, bool], list[list[int]]
    ] = {}  # (material, with uvs) -> v, vt, vn of the corners of triangles
    current, incomplete = "", 0
    text = path.read_text(encoding="utf-8", errors="replace").replace("\\\n", " ")
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words:
            continue
        try:
            if words[0] == "v":
                v.append([float(word) for word in words[1:8]])
            elif words[0] == "vt":
                vt.append([float(word) for word in words[1:3]] + [0.0] * (3 - len(words)))
            elif words[0] == "vn":
                vn.append([float(word) for word in words[1:4]])
            elif words[0] == "f":
                corners = [_corner(word, len(v), len(vt), len(vn)) for word in words[1:]]
                incomplete += len(corners) < 3
                group = groups.setdefault((current, all(corner[1] >= 0 for corner in corners)), [])
                for i in range(1, len(corners) - 1):
                    group.append(corners[0] + corners[i] + corners[i + 1])
            elif words[0] == "usemtl":
                current = line.split(None, 1)[1].strip() if len(words) > 1 else ""
            elif words[0] == "mtllib" and len(words) > 1:
                materials |= _read_materials(path, line.split(None, 1)[1].strip(), notes)
        except (ValueError, IndexError):
            raise ValueError(f"line {number} cannot be read: {line.strip()[:60]!r}") from None
    if incomplete:
        notes.append(f"{incomplete} faces with fewer than 3 corners were left out")
    if not v or any(len(row) < 3 for row in v) or any(len(row) != 3 for row in vn):
        raise ValueError("its vertices are incomplete" if v else "it has no vertices")
    positions, colors = _vertices(v)
    places = np.array(vt, float).reshape(-1, 2) * [1, -1] + [0, 1]
    parts = []
    for (name, with_uvs), rows in groups.items():
        if name and name not in materials:
            materials[name] = Material(name)
        corners = np.array(rows, np.int64).reshape(-1, 3, 3)
        faces, uv_faces = corners[..., 0], corners[..., 1]
        good = ((faces >= 0) & (faces < len(positions))).all(1) & ((uv_faces < len(places)).all(1))
        if not good.all():
            notes.append(f"{np.count_nonzero(~good)} faces that name vertices which do not exist were left out")
            corners, faces, uv_faces = corners[good], faces[good], uv_faces[good]
        used, index = np.unique(faces, return_inverse=True)
        part = Part(positions[used], index.reshape(-1, 3).astype(np.int64), material=materials.get(name, Material()))
        part.colors = None if colors is None else colors[used]
        part.normals = _normals(np.array(vn, float).reshape(-1, 3), corners[..., 2], index.reshape(-1), len(used))
        if with_uvs and len(places):
            used, index = np.unique(uv_faces, return_inverse=True)
            part.uvs, part.uv_faces = places[used], index.reshape(-1, 3).astype(np.int64)
            if np.all(np.diff(used) == 1) and len(groups) == 1:  # as in the file
                part.uvs, part.uv_faces = places, uv_faces
        parts.append(part)
    return parts


def _corner(word: str, *counts: int) -> list[int]:
    """`v/vt/vn` as indices from 0, -1 for what is absent; negative numbers count from the last one read."""
    fields = (word.split("/") + ["", ""])[:3]
    found = []
    for field, count in zip(fields, counts, strict=True):
        value = int(field) if field else 0
        found.append(value - 1 if value >= 0 else max(count + value, -1))
    if not fields[0] or found[0] < 0:
        found[0] = 1 << 40  # no such vertex: left out later, and counted
    return found


def _vertices(rows: list[list[float]]) -> tuple[np.ndarray, np.ndarray | None]:
    """Positions, and colours if at least one vertex has any (grey for the others)."""
    positions = np.array([row[:3] for row in rows], float)
    if all(len(row) < 6 for row in rows):
        return positions, None
    colors = np.array([row[-3:] if len(row) >= 6 else [np.nan] * 3 for row in rows], float)
    if np.nanmax(colors) > 1.5:
        colors = colors / 255
    return positions, np.clip(np.nan_to_num(colors, nan=0.5), 0, 1)


def _normals(normals: np.ndarray, of_corner: np.ndarray, vertex: np.ndarray, count: int) -> np.ndarray | None:
    """One normal for each vertex, the sum over its corners; None if the part has none."""
    of_corner = of_corner.reshape(-1)
    given = (of_corner >= 0) & (of_corner < len(normals))
    if not given.any():
        return None
    total = np.zeros((count, 3))
    np.add.at(total, vertex[given], normals[of_corner[given]])
    return total


def _read_materials(path: Path, name: str, notes: list[str]) -> dict[str, Material]:
    file = _beside(path, name)
    if file is None:
        notes.append(f"the material file {name} is not there: its colours are unknown")
        return {}
    materials: dict[str, Material] = {}
    current = Material()
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, rest = line.strip().partition(" ")
        key, rest = key.lower(), rest.strip()
        if key == "newmtl":
            current = materials[rest] = Material(rest)
        elif key == "kd":
            try:
                current.color = np.clip([float(word) for word in rest.split()[:3]], 0, 1) * np.ones(3)
            except ValueError:
                notes.append(f"a colour in {file.name} cannot be read: {rest[:30]}")
        elif key in _MAPS and rest:
            picture = _picture(path, _without_options(rest), notes)
            if picture is not None:
                gray = _MAPS[key] in ("roughness", "metallic")
                current.textures[_MAPS[key]] = picture[..., 0] if gray else picture
            elif _MAPS[key] == "albedo":
                current.color = np.full(3, 0.5)
    return materials


def _without_options(text: str) -> str:
    words = text.split(" ")
    while words and words[0].startswith("-"):
        option = words.pop(0).lower()
        for _ in range(_OPTIONS.get(option, 3)):
            if option in _OPTIONS or (words and words[0].replace(".", "").lstrip("+-").isdigit()):
                words = words[1:]
    return " ".join(words).strip()


def _beside(path: Path, name: str) -> Path | None:
    """The file that `path` names, as it is written, with / for \\, or just its last part beside `path`."""
    plain = name.strip().strip('"').replace("\\", "/")
    for candidate in (path.parent / name, path.parent / plain, path.parent / plain.rpartition("/")[2]):
        if candidate.is_file():
            return candidate
    return None


def _picture(path: Path, name: str, notes: list[str]) -> np.ndarray | None:
    file = _beside(path, name)
    if file is None:
        notes.append(f"the texture {name} is not there: grey instead")
        return None
    try:
        picture, remark = read_picture(file)
    except OSError:
        notes.append(f"the texture {name} cannot be read: grey instead")
        return None
    notes += [remark] if remark else []
    return picture
