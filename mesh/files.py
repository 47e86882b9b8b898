"""Mesh files of other programs: .obj .ply .glb .gltf .stl .off become a `Mesh`, or one line says why not."""

from pathlib import Path

import numpy as np

from errors import UserError, say
from mesh import Mesh
from mesh.parts import Material, Part, assemble
from mesh.repair import bounds, repair

KINDS = ("obj", "ply", "glb", "gltf", "stl", "off")
MANY = 500_000  # faces: from here on a line says that it will be slow
_OBJ = {b"v", b"vn", b"vt", b"vp", b"f", b"o", b"g", b"s", b"l", b"p", b"mtllib", b"usemtl"}  # how its lines begin
_STRANGERS = {b"PK\3\4": "a zip or usdz archive", b"Kaydara": "an FBX file", b"BLENDER": "a Blender file", b"#usda": "a USD file",
              b"PXR-USDC": "a USD file", b"\x89PNG": "a picture", b"\xff\xd8\xff": "a picture", b"%PDF": "a PDF"}  # fmt: skip


def load_mesh(path: Path, flag: str = "--init_with") -> Mesh:
    """The mesh in a file, in its own coordinates, with its textures or vertex or material colours (no colours: `colors` is None).

    All objects of a scene are merged; vertices at the same place with the same colour are one. What had to be repaired (`mesh.repair`) or is
    missing is said in one line. Coordinates beyond what 32 bits hold well are moved and scaled to reach 1, and the line tells by how much.
    UserError, with `flag` in front, if it cannot be read or holds no triangles.
    """
    path = Path(path)
    notes: list[str] = []
    try:
        parts = _read(path, _kind(path, notes), notes)
        _tame(parts, notes)
        mesh, done = repair(assemble(parts, notes))
        if len(mesh.faces) == 0:
            raise ValueError("nothing is left of it: " + "; ".join(done))
    except (ValueError, OSError) as error:
        reason = (error.strerror or error) if isinstance(error, OSError) else error
        raise UserError(f"{flag} {path}: {' '.join(str(reason).split())[:300]}") from None
    if len(mesh.faces) > MANY:
        notes.append(f"{len(mesh.faces):,} faces: every step will be slow")
    notes += done
    if notes:
        say(f"{flag} {path}: {'; '.join(dict.fromkeys(notes))}")
    return mesh


def _kind(path: Path, notes: list[str]) -> str:
    """What the file is, by its content; if its name says something else, a note tells. ValueError for what is no mesh file."""
    if not path.exists():
        raise ValueError("there is no such file")
    if not path.is_file():
        raise ValueError("this is a folder, not a mesh file" if path.is_dir() else "this is not an ordinary file")
    with open(path, "rb") as file:
        start = file.read(4096)
    if not start.strip(b"\0 \t\r\n"):
        raise ValueError("the file is empty")
    for magic, what in _STRANGERS.items():
        if start.startswith(magic):
            raise ValueError(f"this is {what}; save it as .glb or .obj")
    named, found = path.suffix.lower().removeprefix("."), _sniff(start, path.stat().st_size)
    if found is None and named not in KINDS:
        raise ValueError(
            f"not a mesh file that is read here; save it as one of {', '.join('.' + kind for kind in KINDS)}"
        )
    if found is None or named == found or {named, found} == {"stl", "off"}:
        return named if named in KINDS else found
    notes.append(f"its content is that of a .{found} file")
    return found


def _sniff(start: bytes, size: int) -> str | None:
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if start.startswith(b"glTF"):
        return "glb"
    if text.startswith(b"{"):
        return "gltf"
    if text.startswith((b"ply\n", b"ply\r")):
        return "ply"
    if text.split(None, 1)[:1] in ([b"OFF"], [b"COFF"], [b"NOFF"], [b"CNOFF"]):
        return "off"
    if len(start) >= 84 and size == 84 + 50 * int.from_bytes(start[80:84], "little"):
        return "stl"
    if text.startswith(b"solid") and b"facet" in text:
        return "stl"
    lines = [
        line
        for line in text.replace(b"\r", b"").replace(b"\\\n", b" ").split(b"\n")[:-1]
        if line.strip() and not line.startswith(b"#")
    ]
    if lines and all(line.split(None, 1)[0] in _OBJ for line in lines):
        return "obj"
    return None


def _read(path: Path, kind: str, notes: list[str]) -> list[Part]:
    if kind == "obj":
        from mesh.read_obj import read_obj

        return read_obj(path, notes)
    if kind in ("glb", "gltf"):
        from mesh.read_gltf import read_gltf

        return read_gltf(path, notes)[0]
    return _read_with_trimesh(path, kind)


def _read_with_trimesh(path: Path, kind: str) -> list[Part]:
    """PLY, STL and OFF."""
    import logging

    import trimesh

    logging.getLogger("trimesh").setLevel(logging.CRITICAL)
    try:
        scene = trimesh.load_scene(str(path), file_type=kind, process=False)
        shapes = [shape for shape in scene.geometry.values() if hasattr(shape, "faces")]
    except Exception as error:  # its readers raise whatever a broken file makes them raise
        raise ValueError(
            f"it cannot be read as .{kind}: it is cut off or no such file ({type(error).__name__})"
        ) from None
    if kind == "stl" and not any(len(shape.faces) for shape in shapes):
        raise ValueError("it cannot be read as .stl: it is cut off or no such file")
    return [_part(shape) for shape in shapes]


def _part(shape) -> Part:
    vertices, faces = np.asarray(shape.vertices, float), np.asarray(shape.faces, np.int64)
    visual, part = shape.visual, Part(vertices, faces)
    if len(faces) and (faces.min() < 0 or faces.max() >= len(vertices)):
        raise ValueError("it is cut off: faces name vertices that do not exist")
    if "vertex_normals" in shape._cache:
        part.normals = np.asarray(shape.vertex_normals, float)
    if visual.kind == "vertex":
        part.colors = np.asarray(visual.vertex_colors, float)[:, :3] / 255
    elif visual.kind == "face":
        part.colors = np.repeat(np.asarray(visual.face_colors, float)[:, :3] / 255, 3, axis=0)
        part.vertices, part.faces, part.normals = (
            vertices[faces.reshape(-1)],
            np.arange(faces.size).reshape(-1, 3),
            None,
        )
    elif visual.kind == "texture" and getattr(visual, "uv", None) is not None:
        part.uvs, part.uv_faces = np.asarray(visual.uv, float)[:, :2] * [1, -1] + [0, 1], faces
        image = getattr(visual.material, "image", None)
        if image is not None:
            part.material = Material(textures={"albedo": np.asarray(image.convert("RGB"), np.float32) / 255})
    return part


def _tame(parts: list[Part], notes: list[str]) -> None:
    """Move and scale, in 64 bits, what 32 bits would not hold: sizes beyond a million or below a millionth, or far from the origin."""
    boxes = [box for part in parts if (box := bounds(part.vertices)) is not None]
    for part in parts:
        part.vertices = np.where(np.abs(part.vertices) < 1e150, part.vertices, np.nan)
    if not boxes:
        return
    low, high = np.min([box[0] for box in boxes], axis=0), np.max([box[1] for box in boxes], axis=0)
    size, middle = float((high - low).max()), (low + high) / 2
    if size == 0 or (1e-6 <= size <= 1e6 and np.abs(middle).max() <= 1e4 * size):
        return
    reach = float(np.linalg.norm(high - low)) / 2
    for part in parts:
        part.vertices = (part.vertices - middle) / reach
    place = ", ".join(f"{x:.4g}" for x in middle)
    notes.append(f"it is {size:.3g} large at ({place}): moved to the origin and scaled by {1 / reach:.3g}")
