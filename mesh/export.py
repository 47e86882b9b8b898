"""Mesh files: OBJ and GLB, both with vertex colours and normals, y up, front +z, counter-clockwise outside.

Colours. A render's values are shown on a screen as they are: they are sRGB-coded. OBJ readers take `v x y z r g b` in that coding, so the
values are written unchanged. glTF defines COLOR_0 as *linear* light, which the viewer codes for the screen; written unchanged, everything would look
washed out. So the GLB holds the decoded values (`srgb_to_linear`), in 16 bits because 8 linear bits band in the dark. Its material is
a plain matte one (metallic 0, roughness 1, base colour white): lit evenly, a viewer shows the colours of the albedo render.
"""

import json
import struct
from pathlib import Path

import numpy as np
from jaxtyping import Float

from files import atomic
from mesh import Mesh

_FLOAT, _USHORT, _UINT = 5126, 5123, 5125  # glTF component types
_VERTICES, _INDICES = 34962, 34963  # glTF buffer targets


def srgb_to_linear(value: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Decode sRGB in [0, 1] (IEC 61966-2-1): v / 12.92 up to 0.04045, ((v + 0.055) / 1.055)^2.4 above."""
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(value: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """The inverse of `srgb_to_linear`."""
    return np.where(value <= 0.0031308, value * 12.92, 1.055 * np.maximum(value, 0.0031308) ** (1 / 2.4) - 0.055)


def export(mesh: Mesh, folder: Path, title: str = "") -> list[Path]:
    """Write `mesh.obj` and `mesh.glb` into `folder` and return their paths."""
    return [write_obj(mesh, folder / "mesh.obj", title), write_glb(mesh, folder / "mesh.glb", title)]


def write_obj(mesh: Mesh, path: Path, title: str = "") -> Path:
    """Wavefront OBJ: `v x y z r g b`, `vn`, `f v//n`."""
    with atomic(path) as beside, open(beside, "w", encoding="utf-8") as file:
        file.write(f"# {' '.join(title.split())}\n# v: position, then colour (sRGB, 0 to 1); y up, front +z\no mesh\n")
        np.savetxt(file, np.hstack([mesh.vertices, mesh.colors]), "v %.6f %.6f %.6f %.4f %.4f %.4f")
        np.savetxt(file, mesh.normals, "vn %.4f %.4f %.4f")
        np.savetxt(file, np.repeat(mesh.faces + 1, 2, axis=1), "f %d//%d %d//%d %d//%d")
    return path


def write_glb(mesh: Mesh, path: Path, title: str = "") -> Path:
    """Binary glTF 2.0 with one mesh: positions, normals, linear 16-bit colours, 32-bit indices, no extension."""
    positions = np.ascontiguousarray(mesh.vertices, np.float32)
    colors = np.ones((len(positions), 4))
    colors[:, :3] = srgb_to_linear(np.clip(mesh.colors, 0, 1))
    parts = [  # array, component type, type, buffer target, fields of its own
        (positions, _FLOAT, "VEC3", _VERTICES, {"min": positions.min(0).tolist(), "max": positions.max(0).tolist()}),
        (np.ascontiguousarray(mesh.normals, np.float32), _FLOAT, "VEC3", _VERTICES, {}),
        (np.round(colors * 65535).astype(np.uint16), _USHORT, "VEC4", _VERTICES, {"normalized": True}),
        (mesh.faces.astype(np.uint32).reshape(-1), _UINT, "SCALAR", _INDICES, {}),
    ]
    views, accessors, start = [], [], 0
    for i, (array, component, kind, target, fields) in enumerate(parts):
        views.append({"buffer": 0, "byteOffset": start, "byteLength": array.nbytes, "target": target})
        accessors.append({"bufferView": i, "componentType": component, "count": len(array), "type": kind, **fields})
        start += array.nbytes  # every part is a multiple of 4 bytes, which alignment asks for
    material = {"baseColorFactor": [1.0, 1.0, 1.0, 1.0], "metallicFactor": 0.0, "roughnessFactor": 1.0}
    primitive = {"attributes": {"POSITION": 0, "NORMAL": 1, "COLOR_0": 2}, "indices": 3, "material": 0, "mode": 4}
    head = {
        "asset": {"version": "2.0", "generator": "Somnium"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0, "name": title or "mesh"}],
        "meshes": [{"name": title or "mesh", "primitives": [primitive]}],
        "materials": [{"pbrMetallicRoughness": material}],
        "accessors": accessors,
        "bufferViews": views,
        "buffers": [{"byteLength": start}],
    }
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    body = b"".join(array.tobytes() for array, *_ in parts)
    with atomic(path) as beside, open(beside, "wb") as file:
        file.write(struct.pack("<4sII", b"glTF", 2, 12 + 8 + len(text) + 8 + len(body)))
        file.write(struct.pack("<I4s", len(text), b"JSON") + text)
        file.write(struct.pack("<I4s", len(body), b"BIN\0") + body)
    return path


def read_glb(path: Path) -> tuple[Mesh, str]:
    """A file of `write_glb` and its title; ValueError for any other."""
    data = path.read_bytes()
    try:
        length = struct.unpack_from("<I", data, 12)[0]
        head = json.loads(data[20 : 20 + length])
        arrays = []
        for accessor in head["accessors"]:
            view = head["bufferViews"][accessor["bufferView"]]
            kind = {_FLOAT: np.float32, _USHORT: np.uint16, _UINT: np.uint32}[accessor["componentType"]]
            start = 20 + length + 8 + view["byteOffset"]
            arrays.append(np.frombuffer(data, kind, view["byteLength"] // kind().nbytes, start))
        positions, normals, colors, faces = arrays
        srgb = linear_to_srgb(colors.reshape(-1, 4)[:, :3] / 65535.0)
        mesh = Mesh(positions.reshape(-1, 3), faces.reshape(-1, 3).astype(np.int64), srgb, normals.reshape(-1, 3))
        return mesh, head["nodes"][0]["name"]
    except (KeyError, IndexError, ValueError, struct.error) as error:
        raise ValueError(f"{path}: not a mesh of this program ({error})") from None
