"""Binary glTF 2.0: one mesh, one material, no extension."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from files import atomic
from mesh import Mesh
from mesh.pictures import metallic_roughness, png
from mesh.srgb import srgb_to_linear
from mesh.tangents import split, tangents

_FLOAT, _USHORT, _UINT = 5126, 5123, 5125  # component types
_VERTICES, _INDICES = 34962, 34963  # buffer targets
_LINEAR, _TRILINEAR, _CLAMP, _REPEAT = 9729, 9987, 33071, 10497  # sampling


def write_glb(mesh: Mesh, path: Path, title: str = "") -> Path:
    """Positions, normals, 32-bit indices and, where there are any, textures as PNG (or else linear 16-bit vertex colours).

    Roughness and metallic share one picture, in its green and blue channels. A normal texture comes with the tangents that it was written for.
    """
    corners = np.arange(len(mesh.vertices))
    faces, uv = mesh.faces, None
    if mesh.uvs is not None:
        corners, uv, faces = split(mesh)
    positions = np.ascontiguousarray(mesh.vertices[corners], np.float32)
    normals = mesh.normals[corners].astype(np.float64)
    arrays = {  # name -> array, component type, type, fields of its own
        "POSITION": (positions, _FLOAT, "VEC3", {"min": positions.min(0).tolist(), "max": positions.max(0).tolist()}),
        "NORMAL": (_unit(normals), _FLOAT, "VEC3", {}),
    }
    if mesh.colors is not None and "albedo" not in mesh.textures:
        colors = np.ones((len(positions), 4))
        colors[:, :3] = srgb_to_linear(np.clip(mesh.colors[corners], 0, 1))
        arrays["COLOR_0"] = np.round(colors * 65535).astype(np.uint16), _USHORT, "VEC4", {"normalized": True}
    if uv is not None:
        arrays["TEXCOORD_0"] = np.ascontiguousarray(mesh.uvs[uv], np.float32), _FLOAT, "VEC2", {}
    if "normal" in mesh.textures:
        found = tangents(mesh)
        arrays["TANGENT"] = np.hstack([_unit(found[:, :3]), found[:, 3:].astype(np.float32)]), _FLOAT, "VEC4", {}
    arrays["indices"] = faces.astype(np.uint32).reshape(-1), _UINT, "SCALAR", {}

    views, accessors, blobs, start = [], [], [], 0

    def store(blob: bytes, **fields: Any) -> None:
        nonlocal start
        views.append({"buffer": 0, "byteOffset": start, "byteLength": len(blob), **fields})
        blobs.append(blob + b"\0" * (-len(blob) % 4))
        start += len(blobs[-1])

    for i, (name, (array, component, kind, fields)) in enumerate(arrays.items()):
        store(array.tobytes(), target=_INDICES if name == "indices" else _VERTICES)
        accessors.append({"bufferView": i, "componentType": component, "count": len(array), "type": kind, **fields})
    index = {name: i for i, name in enumerate(arrays)}
    primitive = {"indices": index.pop("indices"), "attributes": index, "material": 0, "mode": 4}
    head = {
        "asset": {"version": "2.0", "generator": "Somnium"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0, "name": title or "mesh"}],
        "meshes": [{"name": title or "mesh", "primitives": [primitive]}],
        "accessors": accessors,
    }
    head |= _material(mesh, lambda blob: (store(blob), len(views) - 1)[1])
    head |= {"bufferViews": views, "buffers": [{"byteLength": start}]}
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    with atomic(path) as beside, open(beside, "wb") as file:
        file.write(struct.pack("<4sII", b"glTF", 2, 12 + 8 + len(text) + 8 + start))
        file.write(struct.pack("<I4s", len(text), b"JSON") + text)
        file.write(struct.pack("<I4s", start, b"BIN\0"))
        file.writelines(blobs)
    return path


def _material(mesh: Mesh, store: Any) -> dict[str, Any]:
    """The parts of the file that speak of the material; `store` puts a picture's bytes into the buffer and returns its view.

    Without textures it is matte and white: lit evenly, a viewer shows the colours of the albedo render.
    """
    pictures = []
    physical: dict[str, Any] = {"baseColorFactor": [1.0, 1.0, 1.0, 1.0], "metallicFactor": 0.0, "roughnessFactor": 1.0}
    material: dict[str, Any] = {"pbrMetallicRoughness": physical}

    def texture(name: str, picture: np.ndarray) -> dict[str, int]:
        pictures.append({"bufferView": store(png(picture)), "mimeType": "image/png", "name": name})
        return {"index": len(pictures) - 1}

    if "albedo" in mesh.textures:
        physical["baseColorTexture"] = texture("albedo", mesh.textures["albedo"])
    packed = metallic_roughness(mesh)
    if packed is not None:
        physical["metallicRoughnessTexture"] = texture("metallic_roughness", packed)
        physical["metallicFactor"] = 1.0
    if "normal" in mesh.textures:
        material["normalTexture"] = texture("normal", mesh.textures["normal"])
    if not pictures:
        return {"materials": [material]}
    inside = mesh.uvs.size == 0 or (mesh.uvs.min() >= 0 and mesh.uvs.max() <= 1)
    wrap = _CLAMP if inside else _REPEAT
    sampler = {"magFilter": _LINEAR, "minFilter": _TRILINEAR, "wrapS": wrap, "wrapT": wrap}
    return {
        "materials": [material],
        "textures": [{"sampler": 0, "source": i} for i in range(len(pictures))],
        "images": pictures,
        "samplers": [sampler],
    }


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Unit to the last bit that 32 bits hold, as validators ask."""
    return (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)).astype(np.float32)
