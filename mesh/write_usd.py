"""USDZ, by usd-core: a mesh with a UsdPreviewSurface material; everything in one package."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from files import atomic
from mesh import Mesh
from mesh.pictures import png
from mesh.srgb import srgb_to_linear

_INPUTS = {"albedo": "diffuseColor", "roughness": "roughness", "metallic": "metallic", "normal": "normal"}


def write_usdz(mesh: Mesh, path: Path, title: str = "") -> Path:
    """Metres, y up. Textures lie in the package as PNG; without them the vertex colours are `displayColor` (linear light)."""
    from pxr import UsdUtils

    with TemporaryDirectory(prefix="somnium-") as folder:  # a name of its own: USD keeps open layers by their names
        layer = Path(folder) / "mesh.usdc"
        _write_layer(mesh, layer, title)
        with atomic(path) as beside:
            if not UsdUtils.CreateNewUsdzPackage(str(layer), str(beside)):
                raise OSError("the package could not be written")
    return path


def _write_layer(mesh: Mesh, layer: Path, title: str) -> None:
    from pxr import Gf, Sdf, Usd, UsdGeom, UsdShade, Vt

    stage = Usd.Stage.CreateNew(str(layer))
    UsdGeom.SetStageUpAxis(stage, UsdGeom.Tokens.y)
    UsdGeom.SetStageMetersPerUnit(stage, 1.0)
    root = UsdGeom.Xform.Define(stage, "/object")
    root.GetPrim().SetDocumentation(title)
    stage.SetDefaultPrim(root.GetPrim())
    shape = UsdGeom.Mesh.Define(stage, "/object/mesh")
    vertices = np.ascontiguousarray(mesh.vertices, np.float32)
    shape.CreatePointsAttr(Vt.Vec3fArray.FromNumpy(vertices))
    shape.CreateFaceVertexCountsAttr(Vt.IntArray.FromNumpy(np.full(len(mesh.faces), 3, np.int32)))
    shape.CreateFaceVertexIndicesAttr(Vt.IntArray.FromNumpy(mesh.faces.astype(np.int32).reshape(-1)))
    shape.CreateNormalsAttr(Vt.Vec3fArray.FromNumpy(np.ascontiguousarray(mesh.normals, np.float32)))
    shape.SetNormalsInterpolation(UsdGeom.Tokens.vertex)
    shape.CreateSubdivisionSchemeAttr(UsdGeom.Tokens.none)
    shape.CreateExtentAttr(Vt.Vec3fArray.FromNumpy(np.stack([vertices.min(0), vertices.max(0)])))
    values = UsdGeom.PrimvarsAPI(shape)
    if mesh.uvs is not None:
        places = values.CreatePrimvar("st", Sdf.ValueTypeNames.TexCoord2fArray, UsdGeom.Tokens.faceVarying)
        upward = (mesh.uvs * [1, -1] + [0, 1]).astype(np.float32)  # USD counts v from below
        places.Set(Vt.Vec2fArray.FromNumpy(np.ascontiguousarray(upward)))
        places.SetIndices(Vt.IntArray.FromNumpy(mesh.uv_faces.astype(np.int32).reshape(-1)))
    colored = mesh.colors is not None and "albedo" not in mesh.textures
    if colored:
        linear = srgb_to_linear(np.clip(mesh.colors, 0, 1).astype(np.float64)).astype(np.float32)
        color = values.CreatePrimvar("displayColor", Sdf.ValueTypeNames.Color3fArray, UsdGeom.Tokens.vertex)
        color.Set(Vt.Vec3fArray.FromNumpy(np.ascontiguousarray(linear)))

    material = UsdShade.Material.Define(stage, "/object/material")
    surface = _shader(stage, "surface", "UsdPreviewSurface")
    surface.CreateInput("roughness", Sdf.ValueTypeNames.Float).Set(1.0)
    surface.CreateInput("metallic", Sdf.ValueTypeNames.Float).Set(0.0)
    if colored:
        reader = _shader(stage, "colors", "UsdPrimvarReader_float3")
        reader.CreateInput("varname", Sdf.ValueTypeNames.String).Set("displayColor")
        _connect(surface, "diffuseColor", Sdf.ValueTypeNames.Color3f, reader, "result", Sdf.ValueTypeNames.Float3)
    if mesh.textures:
        reader = _shader(stage, "places", "UsdPrimvarReader_float2")
        reader.CreateInput("varname", Sdf.ValueTypeNames.String).Set("st")
        inside = mesh.uvs.size == 0 or (mesh.uvs.min() >= 0 and mesh.uvs.max() <= 1)
    for name, picture in mesh.textures.items():
        (layer.parent / f"{name}.png").write_bytes(png(picture))
        node = _shader(stage, name, "UsdUVTexture")
        node.CreateInput("file", Sdf.ValueTypeNames.Asset).Set(f"./{name}.png")
        coding = "sRGB" if name == "albedo" else "raw"
        node.CreateInput("sourceColorSpace", Sdf.ValueTypeNames.Token).Set(coding)
        for side in ("wrapS", "wrapT"):
            node.CreateInput(side, Sdf.ValueTypeNames.Token).Set("clamp" if inside else "repeat")
        _connect(node, "st", Sdf.ValueTypeNames.Float2, reader, "result", Sdf.ValueTypeNames.Float2)
        if name == "normal":  # from [0, 1] to [-1, 1]
            node.CreateInput("scale", Sdf.ValueTypeNames.Float4).Set(Gf.Vec4f(2, 2, 2, 1))
            node.CreateInput("bias", Sdf.ValueTypeNames.Float4).Set(Gf.Vec4f(-1, -1, -1, 0))
        kind = {"albedo": Sdf.ValueTypeNames.Color3f, "normal": Sdf.ValueTypeNames.Normal3f}.get(
            name, Sdf.ValueTypeNames.Float
        )
        channel, held = ("r", Sdf.ValueTypeNames.Float) if picture.ndim == 2 else ("rgb", Sdf.ValueTypeNames.Float3)
        _connect(surface, _INPUTS[name], kind, node, channel, held)
    surface.CreateOutput("surface", Sdf.ValueTypeNames.Token)
    material.CreateSurfaceOutput().ConnectToSource(surface.ConnectableAPI(), "surface")
    UsdShade.MaterialBindingAPI.Apply(shape.GetPrim()).Bind(material)
    stage.GetRootLayer().Save()


def _shader(stage: Any, name: str, identifier: str) -> Any:
    from pxr import UsdShade

    shader = UsdShade.Shader.Define(stage, f"/object/material/{name}")
    shader.CreateIdAttr(identifier)
    return shader


def _connect(shader: Any, name: str, kind: Any, source: Any, output: str, output_kind: Any) -> None:
    source.CreateOutput(output, output_kind)
    shader.CreateInput(name, kind).ConnectToSource(source.ConnectableAPI(), output)
