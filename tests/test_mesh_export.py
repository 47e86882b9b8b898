"""What other programs find in the files: Khronos' validator, usd-core and trimesh are asked."""

import json
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trimesh

from errors import UserError
from mesh import Mesh
from mesh.export import FORMATS, export, read_glb
from mesh.files import load_mesh
from mesh.pictures import metallic_roughness
from mesh.srgb import srgb_to_linear
from mesh.tangents import tangents
from mesh.unwrap import unwrap


@pytest.fixture(scope="module")
def mesh():
    """A lopsided ball with every texture there is, in 8-bit values, so that a PNG holds them exactly."""
    ball = trimesh.creation.icosphere(2)
    vertices, faces = np.asarray(ball.vertices * [0.5, 0.6, 0.7] + [0.1, 0, 0], np.float32), np.asarray(ball.faces)
    uvs, uv_faces = unwrap(vertices, faces, size=128)
    rng = np.random.default_rng(0)
    shapes = {"albedo": (32, 64, 3), "roughness": (32, 64), "metallic": (16, 32), "normal": (16, 16, 3)}
    textures = {name: rng.integers(0, 256, shape).astype(np.float32) / 255 for name, shape in shapes.items()}
    textures["normal"] = (np.array([128, 128, 255]) / 255 * np.ones((16, 16, 1))).astype(np.float32)
    normals = np.asarray(ball.vertex_normals)
    return Mesh(vertices, faces, rng.uniform(size=vertices.shape), normals, uvs, uv_faces, textures)


@pytest.fixture(scope="module")
def plain(mesh):
    """The same with vertex colours only."""
    return replace(mesh, uvs=None, uv_faces=None, textures={})


@pytest.fixture(scope="module")
def folder(mesh, tmp_path_factory):
    where = tmp_path_factory.mktemp("export") / "mesh"
    paths = export(mesh, where, title='a "lopsided"\nball, grün', formats=FORMATS)
    assert [path.name for path in paths] == [f"mesh.{name}" for name in FORMATS]
    assert {p.name for p in where.iterdir()} == {p.name for p in paths} | {
        "mesh.mtl",
        *(f"{n}.png" for n in mesh.textures),
    }
    return where


VALIDATE = """
const fs = require('fs'), validator = require(process.argv[1]);
const folder = process.argv[2];
Promise.all(process.argv.slice(3).map(file => validator.validateBytes(new Uint8Array(fs.readFileSync(file)))))
    .then(reports => console.log(JSON.stringify(reports)));
"""


def test_khronos_validator_has_nothing_to_say(mesh, plain, folder, tmp_path):
    module = Path(sys.prefix) / "node" / "node_modules" / "gltf-validator"
    if not shutil.which("node") or not module.is_dir():
        pytest.skip("needs node and gltf-validator: scripts/setup.sh --tests installs it where there is npm")
    meshes = {
        "plain": plain,
        "bare": replace(plain, colors=None),
        "albedo": replace(mesh, textures={"albedo": mesh.textures["albedo"]}),
        "repeated": replace(mesh, uvs=mesh.uvs * 3 - 1),
        "rough": replace(mesh, textures={"roughness": mesh.textures["roughness"]}),
        "one": replace(plain, faces=plain.faces[:1]),
    }
    files = [folder / "mesh.glb"] + [export(m, tmp_path / name, formats=["glb"])[0] for name, m in meshes.items()]
    command = ["node", "-e", VALIDATE, str(module), str(tmp_path), *map(str, files)]
    reports = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)
    assert len(reports) == len(files)
    for file, report in zip(files, reports, strict=True):
        assert report["issues"]["messages"] == [], file
    assert reports[0]["info"]["totalTriangleCount"] == 320 and reports[0]["info"]["hasTextures"]


def test_glb_as_trimesh_reads_it(mesh, folder):
    (found,) = trimesh.load(folder / "mesh.glb", process=False).geometry.values()
    material = found.visual.material
    uvs = found.visual.uv * [1, -1] + [0, 1]
    assert np.allclose(found.vertices[found.faces], mesh.vertices[mesh.faces])
    assert np.allclose(uvs[found.faces], mesh.uvs[mesh.uv_faces], atol=1e-6)
    assert material.baseColorFactor is None or (np.array(material.baseColorFactor) == 255).all()
    assert material.metallicFactor == 1 and material.roughnessFactor == 1  # both are in the picture
    assert (_bytes(material.baseColorTexture) == np.round(mesh.textures["albedo"] * 255)).all()
    packed = _bytes(material.metallicRoughnessTexture)
    assert (packed[..., 1] == np.round(mesh.textures["roughness"] * 255)).all()
    assert (packed[::2, ::2, 2] == np.round(mesh.textures["metallic"] * 255)).all()  # half the size
    assert "color" not in found.visual.vertex_attributes  # it would be multiplied onto the texture


def _bytes(image):
    return np.asarray(image.convert("RGB"))


def test_glb_tells_its_tangents(mesh, folder):
    data = (folder / "mesh.glb").read_bytes()
    size = struct.unpack_from("<I", data, 12)[0]
    head = json.loads(data[20 : 20 + size])
    accessor = head["accessors"][head["meshes"][0]["primitives"][0]["attributes"]["TANGENT"]]
    start = 28 + size + head["bufferViews"][accessor["bufferView"]]["byteOffset"]
    found = np.frombuffer(data, np.float32, accessor["count"] * 4, start).reshape(-1, 4)
    assert np.allclose(found, tangents(mesh), atol=1e-6) and set(np.abs(found[:, 3])) == {1.0}
    assert head["samplers"][0]["wrapS"] == 33071  # clamped: its uvs stay inside


def test_obj_as_trimesh_reads_it(mesh, folder):
    found = trimesh.load(folder / "mesh.obj", process=False)
    uvs = found.visual.uv * [1, -1] + [0, 1]
    assert np.allclose(found.vertices[found.faces], mesh.vertices[mesh.faces], atol=1e-6)
    assert np.allclose(uvs[found.faces], mesh.uvs[mesh.uv_faces], atol=1e-6)
    assert np.allclose(found.vertex_normals[found.faces], mesh.normals[mesh.faces], atol=1e-3)
    material = found.visual.material
    assert (_bytes(material.image) == np.round(mesh.textures["albedo"] * 255)).all()
    assert (np.array(material.diffuse)[:3] == 255).all()  # Kd 1: the texture's colours, not darker ones
    lines = (folder / "mesh.mtl").read_text().splitlines()
    assert "map_Pr roughness.png" in lines and "map_Pm metallic.png" in lines and "norm normal.png" in lines


def test_ply_and_stl_as_trimesh_reads_them(mesh, folder):
    found = trimesh.load(folder / "mesh.ply", process=False)
    assert (found.vertices == mesh.vertices).all() and (found.faces == mesh.faces).all()
    assert np.abs(found.visual.vertex_colors[:, :3] / 255 - mesh.colors).max() < 0.003  # sRGB, as rendered
    assert np.allclose(found.vertex_normals, mesh.normals, atol=1e-5)
    assert b"binary_little_endian" in (folder / "mesh.ply").read_bytes()[:60]
    found = trimesh.load(folder / "mesh.stl", process=False)
    assert (found.vertices[found.faces] == mesh.vertices[mesh.faces]).all()
    assert (folder / "mesh.stl").stat().st_size == 84 + 50 * 320


def test_usdz_as_usd_core_reads_it(mesh, plain, folder, tmp_path):
    from pxr import Usd, UsdGeom, UsdShade, UsdValidation

    stage = Usd.Stage.Open(str(folder / "mesh.usdz"))
    assert UsdGeom.GetStageUpAxis(stage) == "Y" and UsdGeom.GetStageMetersPerUnit(stage) == 1 and stage.GetDefaultPrim()
    (prim,) = [prim for prim in stage.Traverse() if prim.IsA(UsdGeom.Mesh)]
    shape = UsdGeom.Mesh(prim)
    assert (np.array(shape.GetPointsAttr().Get()) == mesh.vertices).all()
    assert (np.array(shape.GetFaceVertexIndicesAttr().Get()).reshape(-1, 3) == mesh.faces).all()
    assert shape.GetSubdivisionSchemeAttr().Get() == "none"
    places = UsdGeom.PrimvarsAPI(prim).GetPrimvar("st")
    assert places.GetInterpolation() == "faceVarying"
    flat = np.array(places.ComputeFlattened()).reshape(-1, 3, 2)
    assert np.allclose(flat * [1, -1] + [0, 1], mesh.uvs[mesh.uv_faces], atol=1e-6)  # v from below
    material, _ = UsdShade.MaterialBindingAPI(prim).ComputeBoundMaterial()
    surface = material.ComputeSurfaceSource()[0]
    assert surface.GetIdAttr().Get() == "UsdPreviewSurface"
    for name, key in (
        ("diffuseColor", "albedo"),
        ("roughness", "roughness"),
        ("metallic", "metallic"),
        ("normal", "normal"),
    ):
        node = UsdShade.Shader(surface.GetInput(name).GetConnectedSources()[0][0].source.GetPrim())
        assert node.GetInput("sourceColorSpace").Get() == ("sRGB" if key == "albedo" else "raw")
        assert (_inside(node.GetInput("file").Get().resolvedPath) == np.round(mesh.textures[key] * 255)).all()
    export(plain, tmp_path, formats=["usdz"])
    simple = Usd.Stage.Open(str(tmp_path / "mesh.usdz"))
    color = UsdGeom.PrimvarsAPI(simple.GetPrimAtPath("/object/mesh")).GetPrimvar("displayColor")
    assert np.allclose(color.Get(), srgb_to_linear(plain.colors), atol=1e-6)  # linear, as USD says
    context = UsdValidation.ValidationContext(UsdValidation.ValidationRegistry().GetOrLoadAllValidators())
    assert [error.GetMessage() for one in (stage, simple) for error in context.Validate(one)] == []


def _inside(name):
    """A picture in a package: /tmp/mesh.usdz[0/albedo.png]."""
    import io
    import zipfile

    from PIL import Image

    package, _, picture = name.rstrip("]").partition("[")
    with zipfile.ZipFile(package) as archive:
        return np.asarray(Image.open(io.BytesIO(archive.read(picture))))


@pytest.mark.parametrize("name", ["obj", "glb", "ply"])
def test_our_own_reader_gives_the_mesh_again(mesh, plain, folder, tmp_path, name):
    found = load_mesh(folder / f"mesh.{name}")
    assert (found.faces == mesh.faces).all() and np.allclose(found.vertices, mesh.vertices, atol=1e-6)
    assert np.allclose(found.normals, mesh.normals, atol=1e-3)
    if name != "ply":
        assert np.allclose(found.uvs[found.uv_faces], mesh.uvs[mesh.uv_faces], atol=1e-6)
        assert set(found.textures) == set(mesh.textures)
        for key in ("albedo", "roughness", "normal"):
            assert (found.textures[key] == mesh.textures[key]).all(), key
    (path,) = export(plain, tmp_path, formats=[name])
    again = load_mesh(path)
    assert (
        np.abs(again.colors - plain.colors).max() < 0.003 and (again.faces == plain.faces).all() and not again.textures
    )


def test_read_glb_gives_colours_whatever_the_file_has(mesh, plain, folder, tmp_path):
    textured, title = read_glb(folder / "mesh.glb")
    assert title == 'a "lopsided"\nball, grün' and textured.colors.shape == mesh.vertices.shape
    assert (textured.faces == mesh.faces).all()
    bare, _ = read_glb(export(replace(plain, colors=None), tmp_path, formats=["glb"])[0])
    assert np.allclose(bare.colors, 1)  # its material is white
    data = (folder / "mesh.glb").read_bytes()
    (tmp_path / "foreign.glb").write_bytes(data.replace(b'"Somnium"', b'"Blender"'))
    (tmp_path / "cut.glb").write_bytes(data[: len(data) // 2])
    for name in ("foreign.glb", "cut.glb", "absent.glb"):
        with pytest.raises(ValueError, match="not a mesh of this program"):
            read_glb(tmp_path / name)


def test_what_is_there_is_replaced_whole_and_said(mesh, plain, tmp_path, monkeypatch, capsys):
    export(plain, tmp_path, formats=["obj", "stl"])
    line = capsys.readouterr().err.splitlines()
    assert len(line) == 1 and "mesh.stl: an .stl file holds no colours" in line[0]
    (tmp_path / "albedo.png").write_text("the user's own")
    export(mesh, tmp_path, formats=["obj"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("replacing mesh.obj, albedo.png")
    before = (tmp_path / "mesh.obj").read_bytes()

    def stop(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savetxt", stop)
    with pytest.raises(UserError, match="No space left"):
        export(mesh, tmp_path, formats=["obj"])
    assert (tmp_path / "mesh.obj").read_bytes() == before and not list(tmp_path.glob(".*"))


def test_formats_that_do_not_exist_or_cannot_be_written(plain, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="--mesh_format fbx: .*usdz"):
        export(plain, tmp_path, formats=["obj", "fbx"])
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="without faces"):
        export(replace(plain, faces=plain.faces[:0]), tmp_path)
    monkeypatch.setitem(sys.modules, "pxr", None)
    assert [path.name for path in export(plain, tmp_path, formats=["usdz", "glb"])] == ["mesh.glb"]
    assert "usd-core is not installed" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write there"):
        export(plain, tmp_path / "file" / "mesh")


def test_two_sizes_share_a_picture(mesh):
    packed = metallic_roughness(mesh)
    assert (
        packed.shape == (32, 64, 3)
        and (packed[..., 0] == 1).all()
        and (packed[1::2, 1::2, 2] == mesh.textures["metallic"]).all()
    )
    only = metallic_roughness(replace(mesh, textures={"metallic": mesh.textures["metallic"]}))
    assert (only[..., 1] == 1).all() and only.shape == (16, 32, 3)
    assert metallic_roughness(replace(mesh, textures={})) is None


def test_a_mesh_that_contradicts_itself_is_refused(mesh, plain):
    for wrong in (
        {"normals": mesh.normals * 0.5},
        {"faces": mesh.faces + 200},
        {"uvs": None},
        {"uv_faces": mesh.uv_faces + 500},
        {"textures": {"albedo": mesh.textures["roughness"]}},
        {"textures": {"colour": mesh.textures["albedo"]}},
    ):
        with pytest.raises(ValueError):
            replace(mesh, **wrong)
    with pytest.raises(ValueError, match="need both"):
        replace(plain, textures=mesh.textures)
    with pytest.raises(ValueError, match="not unit"):
        Mesh(mesh.vertices, mesh.faces, mesh.normals, mesh.colors)  # the wrong way round
