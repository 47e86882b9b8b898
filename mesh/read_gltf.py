"""glTF 2.0 (.glb and .gltf): every instance of every triangle mesh of the scene, where the nodes put it, with its materials.

Read here are: any layout and number type of attributes (interleaved, normalised, sparse), strips and fans, node transforms, the pose of a
rigged mesh, base colour, metallic-roughness and normal textures, KHR_texture_transform, vertex colours. Not read: animation, morph targets, alpha,
compressed geometry (Draco, meshopt) and compressed pictures (Basis).
"""

import base64
import io
import json
import struct
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np

from mesh.parts import Material, Part
from mesh.pictures import read_picture
from mesh.srgb import linear_to_srgb, srgb_to_linear

_KINDS = {5120: np.int8, 5121: np.uint8, 5122: np.int16, 5123: np.uint16, 5125: np.uint32, 5126: np.float32}
_WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT2": 4, "MAT3": 9, "MAT4": 16}
_COMPRESSED = ("KHR_draco_mesh_compression", "EXT_meshopt_compression", "KHR_meshopt_compression")
_LARGEST = 1 << 32  # bytes


class _File:
    """The JSON of a file, and its numbers and pictures on demand."""

    def __init__(self, path: Path, notes: list[str]):
        data = path.read_bytes()
        self.path, self.notes, self.binary, self.views = path, notes, b"", {}
        if data[:4] == b"glTF":
            magic, version, length, size, kind = struct.unpack_from("<4sIII4s", data)
            if version != 2 or kind != b"JSON":
                raise ValueError(f"glTF version {version} instead of 2")
            if length > len(data):
                raise ValueError(f"it ends after {len(data)} of {length} bytes")
            text = data[20 : 20 + size]
            if len(data) >= 28 + size:
                (count,) = struct.unpack_from("<I", data, 20 + size)
                self.binary = data[28 + size : 28 + size + count]
        else:
            text = data
        self.head = json.loads(text.decode("utf-8-sig"))
        if not isinstance(self.head, dict) or not str(self.head.get("asset", {}).get("version", "")).startswith("2"):
            raise ValueError("it is no glTF 2.0")
        needed = [name for name in self.head.get("extensionsRequired", []) if name in _COMPRESSED]
        if needed:
            raise ValueError(f"it is compressed ({needed[0]}): save it without compression")

    def uri(self, text: str) -> bytes:
        if text.startswith("data:"):
            return base64.b64decode(text.partition(",")[2])
        file = self.path.parent / unquote(text)
        if "://" in text or not file.is_file():
            raise FileNotFoundError(f"{text} is not there")
        return file.read_bytes()

    def view(self, index: int) -> bytes:
        view = self.head["bufferViews"][index]
        buffer = view.get("buffer", 0)
        if buffer not in self.views:
            text = self.head["buffers"][buffer].get("uri")
            self.views[buffer] = self.binary if text is None else self.uri(text)
        start = view.get("byteOffset", 0)
        data = self.views[buffer][start : start + view["byteLength"]]
        if len(data) < view["byteLength"]:
            raise ValueError("its numbers are cut off")
        return data

    def numbers(self, index: int) -> np.ndarray:
        """An accessor as [count, width]; normalised integers as fractions."""
        accessor = self.head["accessors"][index]
        kind, width, count = _KINDS[accessor["componentType"]], _WIDTHS[accessor["type"]], accessor["count"]
        if count * width * 4 > _LARGEST:
            raise ValueError("its numbers are cut off")
        values = np.zeros((count, width), kind)
        if "bufferView" in accessor:
            values = self._rows(accessor["bufferView"], accessor.get("byteOffset", 0), kind, count, width)
        if "sparse" in accessor:
            sparse, values = accessor["sparse"], values.copy()
            places, others, many = sparse["indices"], sparse["values"], sparse["count"]
            at = self._rows(places["bufferView"], places.get("byteOffset", 0), _KINDS[places["componentType"]], many, 1)
            values[at[:, 0]] = self._rows(others["bufferView"], others.get("byteOffset", 0), kind, many, width)
        if accessor.get("normalized") and kind != np.float32:
            return np.maximum(values / np.iinfo(kind).max, -1.0)
        return values

    def _rows(self, view: int, start: int, kind: type, count: int, width: int) -> np.ndarray:
        data = self.view(view)
        row = np.dtype(kind).itemsize * width
        stride = self.head["bufferViews"][view].get("byteStride", row)
        if count == 0:
            return np.zeros((0, width), kind)
        if stride < row or start + (count - 1) * stride + row > len(data):
            raise ValueError("its numbers are cut off")
        whole = np.frombuffer(data, np.uint8, offset=start)
        rows = np.lib.stride_tricks.as_strided(whole, (count, row), (stride, 1))
        return np.ascontiguousarray(rows).view(np.dtype(kind).newbyteorder("<"))

    def picture(self, texture: dict[str, Any]) -> np.ndarray | None:
        """The picture that a textureInfo names; None, with a remark, if it cannot be had."""
        name = "a texture"
        try:
            entry = self.head["textures"][texture["index"]]
            source = entry.get("extensions", {}).get("EXT_texture_webp", entry).get("source", entry.get("source"))
            if source is None:
                raise OSError("no picture in a format that is read here")
            image = self.head["images"][source]
            name = (
                f"the texture {image.get('uri', '')[:60]}"
                if not image.get("uri", "data:").startswith("data:")
                else name
            )
            data = self.view(image["bufferView"]) if "bufferView" in image else self.uri(image["uri"])
            picture, remark = read_picture(io.BytesIO(data))
        except FileNotFoundError:
            self.notes.append(f"{name} is not there: grey instead")
            return None
        except (OSError, KeyError, IndexError, ValueError):
            self.notes.append(f"{name} cannot be read: grey instead")
            return None
        self.notes += [remark] if remark else []
        return picture


def read_gltf(path: Path, notes: list[str]) -> tuple[list[Part], str, str]:
    """Parts in world coordinates, the name of the first node, and the generator; ValueError or OSError if the file cannot be read.

    What was amiss but survivable goes to `notes`.
    """
    try:
        file = _File(path, notes)
        head = file.head
        nodes = head.get("nodes", [])
        if head.get("scenes"):
            roots = head["scenes"][head.get("scene", 0)].get("nodes", [])
        else:
            children = {child for node in nodes for child in node.get("children", [])}
            roots = [i for i in range(len(nodes)) if i not in children]
        worlds: dict[int, np.ndarray] = {}
        waiting = [(root, np.eye(4)) for root in roots]
        while waiting:
            index, parent = waiting.pop(0)
            if index not in worlds:  # a node has one parent; a file with a loop must not hang
                worlds[index] = parent @ _local(nodes[index])
                waiting += [(child, worlds[index]) for child in nodes[index].get("children", [])]
        materials: dict[int | None, tuple[Material, dict[str, Any]]] = {}
        parts, rigged = [], False
        for index, world in worlds.items():
            node = nodes[index]
            if "mesh" not in node:
                continue
            for primitive in head["meshes"][node["mesh"]]["primitives"]:
                if primitive.get("mode", 4) in (4, 5, 6):
                    number = primitive.get("material")
                    if number not in materials:
                        materials[number] = _material(file, number)
                    bones = _bones(file, node, worlds) if "skin" in node else None
                    rigged = rigged or bones is not None
                    parts.append(_part(file, primitive, world, bones, *materials[number]))
        if rigged:
            notes.append("it is rigged: its pose at rest is taken")
        name = nodes[0].get("name", "") if nodes else ""
        return parts, name, head["asset"].get("generator", "")
    except (KeyError, IndexError, TypeError, AttributeError, struct.error, MemoryError, RecursionError) as error:
        raise ValueError(f"its structure is broken ({type(error).__name__} {error})") from None


def _local(node: dict[str, Any]) -> np.ndarray:
    if "matrix" in node:
        return np.array(node["matrix"], float).reshape(4, 4).T
    matrix = np.eye(4)
    x, y, z, w = node.get("rotation", (0, 0, 0, 1))
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )
    matrix[:3, :3] = rotation * np.array(node.get("scale", (1, 1, 1)), float)
    matrix[:3, 3] = node.get("translation", (0, 0, 0))
    return matrix


def _bones(file: _File, node: dict[str, Any], worlds: dict[int, np.ndarray]) -> np.ndarray:
    """One matrix for each joint of the node's skin, from the mesh's rest to the world."""
    skin = file.head["skins"][node["skin"]]
    matrices = np.stack([worlds.get(joint, np.eye(4)) for joint in skin["joints"]])
    if "inverseBindMatrices" in skin:
        back = file.numbers(skin["inverseBindMatrices"]).reshape(-1, 4, 4).transpose(0, 2, 1)
        matrices = matrices @ back[: len(matrices)].astype(float)
    return matrices


def _part(
    file: _File,
    primitive: dict[str, Any],
    world: np.ndarray,
    bones: np.ndarray | None,
    material: Material,
    infos: dict[str, Any],
) -> Part:
    attributes = primitive["attributes"]
    points = file.numbers(attributes["POSITION"]).astype(float)
    count = len(points)
    order = file.numbers(primitive["indices"])[:, 0] if "indices" in primitive else np.arange(count)
    if order.dtype.kind not in "iu":
        raise ValueError("its faces are no whole numbers")
    faces = _triangles(order.astype(np.int64), primitive.get("mode", 4))
    good = ((faces >= 0) & (faces < count)).all(1)
    if not good.all():
        file.notes.append(f"{np.count_nonzero(~good)} faces that name vertices which do not exist were left out")
        faces = faces[good]
    matrices = np.broadcast_to(world, (1, 4, 4))
    if bones is not None and {"JOINTS_0", "WEIGHTS_0"} <= set(attributes):  # the joints place it, not its node
        joints, weights = (file.numbers(attributes[name]) for name in ("JOINTS_0", "WEIGHTS_0"))
        weights = weights / np.maximum(weights.sum(1, keepdims=True), 1e-9)
        matrices = (bones[joints.astype(int)] * weights[..., None, None]).sum(1)
    points = (matrices[:, :3, :3] @ points[..., None])[..., 0] + matrices[:, :3, 3]
    if np.linalg.det(matrices[0, :3, :3]) < 0:  # mirrored: the front stays the front
        faces = faces[:, ::-1]
    part = Part(points, faces, material=material)
    if "NORMAL" in attributes and abs(np.linalg.det(matrices[0, :3, :3])) > 1e-30:
        across = np.linalg.pinv(matrices[:, :3, :3]).transpose(0, 2, 1)
        part.normals = (across @ file.numbers(attributes["NORMAL"]).astype(float)[..., None])[..., 0]
    if "COLOR_0" in attributes:
        linear = file.numbers(attributes["COLOR_0"]).astype(float)[:, :3] * _factor(file, primitive)
        part.colors = linear_to_srgb(np.clip(linear, 0, 1))
    if infos or "TEXCOORD_0" in attributes:
        part.uvs = _uvs(file, attributes, infos)
        part.uv_faces = part.faces if part.uvs is not None else None
    return part


def _triangles(order: np.ndarray, mode: int) -> np.ndarray:
    if mode == 4:
        return order[: len(order) // 3 * 3].reshape(-1, 3)
    a, b, c = np.arange(max(len(order) - 2, 0)), np.arange(1, len(order) - 1), np.arange(2, len(order))
    if mode == 6:
        return order[np.stack([b, c, 0 * a], 1)]
    odd = a % 2 == 1  # every other triangle of a strip is turned
    return order[np.stack([a, np.where(odd, c, b), np.where(odd, b, c)], 1)]


def _material(file: _File, number: int | None) -> tuple[Material, dict[str, Any]]:
    """A material, and how its main texture is laid out (texCoord, KHR_texture_transform)."""
    if number is None:
        return Material(), {}
    entry = file.head["materials"][number]
    physical = entry.get("pbrMetallicRoughness", {})
    old = entry.get("extensions", {}).get("KHR_materials_pbrSpecularGlossiness", {})
    base = physical.get("baseColorTexture", old.get("diffuseTexture"))
    factor = np.array(physical.get("baseColorFactor", old.get("diffuseFactor", (1, 1, 1, 1))), float)[:3]
    material = Material(entry.get("name", ""), linear_to_srgb(np.clip(factor, 0, 1)))
    if base is not None:
        picture = file.picture(base)
        if picture is None:
            material.color = np.full(3, 0.5)
        else:
            tinted = (factor != 1).any()
            material.textures["albedo"] = (
                linear_to_srgb(np.clip(srgb_to_linear(picture) * factor, 0, 1)).astype(np.float32)
                if tinted
                else picture
            )
    packed = physical.get("metallicRoughnessTexture")
    picture = None if packed is None else file.picture(packed)
    if picture is not None:
        material.textures["roughness"] = picture[..., 1] * np.float32(physical.get("roughnessFactor", 1))
        material.textures["metallic"] = picture[..., 2] * np.float32(physical.get("metallicFactor", 1))
    bumps = entry.get("normalTexture")
    picture = None if bumps is None else file.picture(bumps)
    if picture is not None:
        material.textures["normal"] = picture
    info = next((info for info in (base, packed, bumps) if info is not None), {})
    return material, info


def _factor(file: _File, primitive: dict[str, Any]) -> np.ndarray:
    number = primitive.get("material")
    physical = {} if number is None else file.head["materials"][number].get("pbrMetallicRoughness", {})
    return np.array(physical.get("baseColorFactor", (1, 1, 1, 1)), float)[:3]


def _uvs(file: _File, attributes: dict[str, int], info: dict[str, Any]) -> np.ndarray | None:
    """Texture coordinates as the material's main texture wants them; all its textures are taken to be laid out alike."""
    move = info.get("extensions", {}).get("KHR_texture_transform", {})
    name = f"TEXCOORD_{move.get('texCoord', info.get('texCoord', 0))}"
    if name not in attributes:
        return None
    uvs = np.nan_to_num(file.numbers(attributes[name]).astype(float), posinf=0, neginf=0)
    if not move:
        return uvs
    angle = move.get("rotation", 0.0)  # counter-clockwise as one looks at the picture, whose v runs down
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return (uvs * move.get("scale", (1, 1))) @ turn.T + move.get("offset", (0, 0))
