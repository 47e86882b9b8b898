"""glTF files put together piece by piece, a square to hang a picture on, and what it shows."""

import base64
import io
import json
import struct

import numpy as np
from PIL import Image

from mesh.texels import look_up

SQUARE = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], np.float32)
FACES = np.array([[0, 1, 2], [0, 2, 3]])
UVS = np.array([[0, 1], [1, 1], [1, 0], [0, 0]], np.float32)  # glTF: the picture hangs upright
CORNERS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)  # red, green / blue, white


def png(picture):
    held = io.BytesIO()
    Image.fromarray(np.asarray(picture, np.uint8)).save(held, "png")
    return held.getvalue()


def shown(mesh, points):
    """The colour of the texture at points of the plane z = 0."""
    found = []
    for point in np.asarray(points, float):
        for face, places in zip(mesh.vertices[mesh.faces], mesh.uvs[mesh.uv_faces], strict=True):
            system = np.r_[face.T[:2], np.ones((1, 3))]
            if abs(np.linalg.det(system)) > 1e-9 and np.ptp(face[:, 2]) == 0:
                weights = np.linalg.solve(system, [*point, 1])
                if weights.min() > -1e-6:
                    found.append(look_up(mesh.textures["albedo"], (weights @ places)[None])[0])
                    break
    return np.array(found)


class Gltf:
    """A glTF file put together piece by piece."""

    def __init__(self):
        self.blob = b""
        self.head = {"asset": {"version": "2.0"}, "scene": 0, "scenes": [{"nodes": [0]}], "nodes": [{"mesh": 0}]}
        self.head |= {"bufferViews": [], "accessors": [], "materials": [], "images": [], "textures": [], "meshes": []}

    def view(self, data, **fields):
        self.blob += b"\0" * (-len(self.blob) % 4)
        self.head["bufferViews"].append({"buffer": 0, "byteOffset": len(self.blob), "byteLength": len(data), **fields})
        self.blob += data
        return len(self.head["bufferViews"]) - 1

    def numbers(self, array, **fields):
        array = np.ascontiguousarray(array)
        types = {"f4": 5126, "u1": 5121, "u2": 5123, "u4": 5125, "i1": 5120, "i2": 5122}
        kind = "SCALAR" if array.ndim == 1 else f"VEC{array.shape[1]}"
        entry = {"bufferView": self.view(array.tobytes()), "componentType": types[array.dtype.str[1:]]}
        self.head["accessors"].append({**entry, "count": len(array), "type": kind, **fields})
        return len(self.head["accessors"]) - 1

    def texture(self, picture, **fields):
        self.head["images"].append({"bufferView": self.view(png(picture)), "mimeType": "image/png"})
        self.head["textures"].append({"source": len(self.head["images"]) - 1})
        return {"index": len(self.head["textures"]) - 1, **fields}

    def material(self, physical, **fields):
        self.head["materials"].append({"pbrMetallicRoughness": physical, **fields})
        return len(self.head["materials"]) - 1

    def mesh(self, *primitives):
        self.head["meshes"].append({"primitives": list(primitives)})

    def square(self, material=None, **attributes):
        attributes = {"POSITION": self.numbers(SQUARE), **attributes}
        entry = {"attributes": attributes, "indices": self.numbers(FACES.reshape(-1).astype(np.uint16))}
        return entry if material is None else {**entry, "material": material}

    def save(self, path, cut=None):
        if path.suffix == ".gltf":
            uri = "data:application/octet-stream;base64," + base64.b64encode(self.blob).decode()
            path.write_text(json.dumps({**self.head, "buffers": [{"byteLength": len(self.blob), "uri": uri}]}))
            return path
        text = json.dumps({**self.head, "buffers": [{"byteLength": len(self.blob)}]}).encode()
        text += b" " * (-len(text) % 4)
        body = self.blob + b"\0" * (-len(self.blob) % 4)
        data = struct.pack("<4sII", b"glTF", 2, 28 + len(text) + len(body))
        data += struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(body), b"BIN\0") + body
        path.write_bytes(data[:cut])
        return path
