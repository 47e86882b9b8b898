"""Mesh files of other programs, whole and broken: a mesh as its author meant it, or one line. (glTF: test_mesh_gltf.py)"""

import numpy as np
import pytest
import trimesh
from gltf_files import CORNERS, FACES, SQUARE, UVS, Gltf, png, shown
from PIL import Image

from errors import UserError
from mesh.files import load_mesh


@pytest.fixture
def quiet(capsys):
    """Nothing may be said by the end of the test."""
    yield
    assert capsys.readouterr().err == ""


# --- OBJ, PLY, STL, OFF ---

OBJ = """# a square
mtllib square.mtl
v 0 0 0
v 1 0 0
v 1 1 0
v 0 1 0
vt 0 0
vt 1 0
vt 1 1
vt 0 1
vn 0 0 1
usemtl wood
f -4/1/1 2/2/1 \\
3/3/1 4/4/1
"""


def test_obj_with_a_texture(tmp_path, quiet):
    """A quad with negative numbers and a continued line; a texture statement with options, a backslash and a blank in the name."""
    (tmp_path / "square.obj").write_text(OBJ)
    (tmp_path / "square.mtl").write_text(
        "newmtl wood\nKd 0.2 0.2 0.2\nmap_Kd -s 1 1 1 -clamp on maps\\my wood.png\nmap_Pr rough.png\n"
    )
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "my wood.png").write_bytes(png(CORNERS))
    (tmp_path / "rough.png").write_bytes(png([[51]]))
    mesh = load_mesh(tmp_path / "square.obj")
    assert (mesh.vertices == SQUARE).all() and (mesh.faces == FACES).all() and np.allclose(mesh.uvs, UVS)
    assert np.allclose(shown(mesh, [[0.25, 0.75], [0.75, 0.75], [0.25, 0.25]]), np.eye(3), atol=0.01)  # not upside down
    assert np.allclose(mesh.textures["roughness"], 0.2)


def test_obj_as_trimesh_reads_it_too(tmp_path, quiet):
    ball = trimesh.creation.icosphere(2)
    rng = np.random.default_rng(0)
    ball.visual = trimesh.visual.TextureVisuals(uv=rng.uniform(size=(162, 2)), image=Image.fromarray(CORNERS))
    (tmp_path / "ball.obj").write_text(trimesh.exchange.obj.export_obj(ball, mtl_name="ball.mtl"))
    (tmp_path / "ball.mtl").write_text("newmtl material_0\nKd 1 1 1\nmap_Kd c.png\n")
    (tmp_path / "c.png").write_bytes(png(CORNERS))
    theirs, ours = trimesh.load(tmp_path / "ball.obj", process=False), load_mesh(tmp_path / "ball.obj")
    assert np.allclose(theirs.vertices[theirs.faces], ours.vertices[ours.faces], atol=1e-6)
    assert np.allclose((theirs.visual.uv * [1, -1] + [0, 1])[theirs.faces], ours.uvs[ours.uv_faces], atol=1e-6)


def test_obj_with_colours_of_vertices_and_of_materials(tmp_path, quiet):
    (tmp_path / "a.obj").write_text("v 0 0 0 255 0 0\nv 1 0 0 255 128 0\nv 0 1 0 0 0 0\nf 1 2 3\n")
    assert np.allclose(load_mesh(tmp_path / "a.obj").colors, [[1, 0, 0], [1, 128 / 255, 0], [0, 0, 0]])
    (tmp_path / "b.mtl").write_text("newmtl one\nKd 1 0 0\nnewmtl two\nKd 0 0.5 0\n")
    text = "mtllib b.mtl\nv 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nusemtl one\nf 1 2 3\nusemtl two\nf 1 3 4\n"
    (tmp_path / "b.obj").write_text(text)
    mesh = load_mesh(tmp_path / "b.obj")
    assert np.allclose(mesh.colors[mesh.faces], np.array([[[1, 0, 0]], [[0, 0.5, 0]]]))  # sharp where they meet
    (tmp_path / "c.obj").write_text("v 0 0 0\nv 1 0 0\nv 1 1 0\nf 1 2 3\n")
    assert load_mesh(tmp_path / "c.obj").colors is None


@pytest.mark.parametrize("kind", ["ply", "stl", "off"])
def test_other_kinds(kind, tmp_path, quiet):
    ball = trimesh.creation.icosphere(2)
    if kind == "ply":
        ball.visual.vertex_colors = np.tile([10, 20, 30, 255], (162, 1))
    ball.export(tmp_path / f"ball.{kind}")
    mesh = load_mesh(tmp_path / f"ball.{kind}")
    assert len(mesh.faces) == 320 and len(mesh.vertices) == 162 and mesh.vertices.dtype == np.float32
    assert (mesh.normals * mesh.vertices).sum(1).min() > 0.99
    assert mesh.colors is None if kind != "ply" else np.allclose(mesh.colors, np.array([10, 20, 30]) / 255)


def test_text_stl(tmp_path, quiet):
    (tmp_path / "a.stl").write_text(trimesh.exchange.stl.export_stl_ascii(trimesh.creation.box()))
    assert len(load_mesh(tmp_path / "a.stl").vertices) == 8


# --- what cannot be read ---


def _glb(tmp_path, change=None, cut=None):
    file = Gltf()
    file.mesh(file.square())
    if change:
        change(file.head)
    return file.save(tmp_path / "x.glb", cut).read_bytes()


def _cut(shape, kind):
    data = shape.export(file_type=kind)
    return data[: len(data) // 2]


BAD = {
    "empty.obj": (b"", "the file is empty"),
    "blank.glb": (b"\n\n  \0", "the file is empty"),
    "words.obj": (b"Dear diary,\ntoday I made a mesh.\n", "no vertices"),
    "words.glb": (b"Dear diary,\ntoday I made a mesh.\n", "structure|Expecting|glTF"),
    "points.obj": (b"v 0 0 0\nv 1 0 0\nv 0 1 0\n", "no triangles"),
    "broken.obj": (b"v 0 0 0\nv 1 zero 0\n", "line 2 cannot be read: 'v 1 zero 0'"),
    "nowhere.obj": (b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9\n", "no triangles"),
    "nan.obj": (b"v nan 0 0\nv nan 0 0\nv nan 1 0\nf 1 2 3\n", "nothing is left"),
    "line.obj": (b"v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n", "nothing is left of it: 1 faces without area"),
    "scene.fbx": (b"Kaydara FBX Binary  \0", "an FBX file; save it as .glb or .obj"),
    "scene.usdz": (b"PK\3\4....", "a zip or usdz archive"),
    "photo.obj": (b"\x89PNG\r\n", "this is a picture"),
    "notes.txt": (b"Dear diary", "save it as one of .obj, .ply"),
    "random.ply": (bytes(range(256)) * 4, "cannot be read as .ply"),
    "random.stl": (bytes(range(256)) * 4, "cannot be read as .stl"),
    "cut.ply": (_cut(trimesh.creation.icosphere(2), "ply"), "cut off"),
    "cut.stl": (_cut(trimesh.creation.icosphere(2), "stl"), "cut off"),
    "old.gltf": (b'{"asset": {"version": "1.0"}}', "no glTF 2.0"),
    "no_mesh.gltf": (b'{"asset": {"version": "2.0"}}', "no triangles"),
    "list.gltf": (b'{"asset": [], "nodes": 7}', "structure is broken"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_one_line_about_a_file_that_is_no_mesh(name, tmp_path, capsys):
    content, what = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"^--init_with .*{name}: .*({what})") as found:
        load_mesh(tmp_path / name)
    assert "\n" not in str(found.value) and capsys.readouterr().err == ""


def test_one_line_about_what_is_not_there(tmp_path):
    for path, what in ((tmp_path / "a.glb", "there is no such file"), (tmp_path, "this is a folder")):
        with pytest.raises(UserError, match=what):
            load_mesh(path)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda head: head["accessors"][0].update(count=4000), "cut off"),
        (lambda head: head["accessors"][0].update(count=1 << 60), "cut off"),
        (lambda head: head["accessors"].pop(), "structure is broken"),
        (lambda head: head["bufferViews"][0].update(byteLength=1 << 40), "cut off"),
        (lambda head: head["meshes"][0]["primitives"][0].update(attributes={}), "structure is broken"),
        (lambda head: head.update(extensionsRequired=["KHR_draco_mesh_compression"]), "compressed .KHR_draco"),
        (lambda head: head["nodes"][0].update(children=[0, 5]), "structure is broken"),
    ],
)
def test_one_line_about_a_glb_that_contradicts_itself(change, what, tmp_path):
    (tmp_path / "bad.glb").write_bytes(_glb(tmp_path, change))
    with pytest.raises(UserError, match=what):
        load_mesh(tmp_path / "bad.glb")


def test_a_glb_cut_anywhere_is_one_line(tmp_path):
    whole = _glb(tmp_path)
    for size in range(1, len(whole), 37):
        (tmp_path / "cut.glb").write_bytes(whole[:size])
        with pytest.raises(UserError):
            load_mesh(tmp_path / "cut.glb")


def test_a_loop_of_nodes_ends(tmp_path):
    (tmp_path / "loop.glb").write_bytes(_glb(tmp_path, lambda head: head["nodes"][0].update(children=[0])))
    assert len(load_mesh(tmp_path / "loop.glb").faces) == 2


# --- what can be repaired, and is said ---


def _line(capsys):
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_the_content_counts_not_the_name(tmp_path, capsys):
    (tmp_path / "mesh.obj").write_bytes(_glb(tmp_path))
    assert len(load_mesh(tmp_path / "mesh.obj").faces) == 2
    assert "its content is that of a .glb file" in _line(capsys)
    (tmp_path / "mesh.dat").write_text(OBJ.replace("mtllib square.mtl\n", ""))
    assert len(load_mesh(tmp_path / "mesh.dat").faces) == 2 and ".obj file" in _line(capsys)


def test_absent_and_unreadable_textures_are_grey(tmp_path, capsys):
    (tmp_path / "square.obj").write_text(OBJ)
    assert load_mesh(tmp_path / "square.obj").colors is None and "material file square.mtl is not there" in _line(
        capsys
    )
    (tmp_path / "square.mtl").write_text("newmtl wood\nmap_Kd wood.png\n")
    assert (load_mesh(tmp_path / "square.obj").colors == 0.5).all() and "wood.png is not there: grey" in _line(capsys)
    (tmp_path / "wood.png").write_bytes(png(CORNERS)[:40])
    assert (load_mesh(tmp_path / "square.obj").colors == 0.5).all() and "cannot be read: grey" in _line(capsys)
    file = Gltf()
    file.head["images"], file.head["textures"] = [{"uri": "https://example.com/wood.png"}], [{"source": 0}]
    file.mesh(file.square(file.material({"baseColorTexture": {"index": 0}}), TEXCOORD_0=file.numbers(UVS)))
    mesh = load_mesh(file.save(tmp_path / "a.glb"))
    assert (mesh.colors == 0.5).all() and "wood.png is not there: grey" in _line(capsys)


def test_a_huge_texture_is_made_smaller(tmp_path, monkeypatch, capsys):
    from mesh import pictures

    monkeypatch.setattr(pictures, "LARGEST", 8)
    file = Gltf()
    base = {"baseColorTexture": file.texture(np.full((16, 32, 3), 70))}
    file.mesh(file.square(file.material(base), TEXCOORD_0=file.numbers(UVS)))
    mesh = load_mesh(file.save(tmp_path / "a.glb"))
    assert mesh.textures["albedo"].shape == (4, 8, 3) and np.allclose(mesh.textures["albedo"], 70 / 255)
    assert "32 x 16 was made smaller: 8 x 4" in _line(capsys)


def test_numbers_that_are_none_are_dropped(tmp_path, capsys):
    (tmp_path / "a.obj").write_text("v 0 0 0\nv 1 0 0\nv 1 1 0\nv nan 1 0\nv inf 0 0\nf 1 2 3\nf 1 3 4\nf 5 1 2\n")
    mesh = load_mesh(tmp_path / "a.obj")
    assert len(mesh.faces) == 1 and len(mesh.vertices) == 3 and np.isfinite(mesh.vertices).all()
    assert "2 faces with a corner that is not a number were dropped" in _line(capsys)


@pytest.mark.parametrize(("scale", "shift"), [(1e9, 0), (1e-9, 0), (1, 1e7), (1e200, 0)])
def test_enormous_coordinates_are_scaled_and_said(scale, shift, tmp_path, capsys):
    ball = trimesh.creation.icosphere(3)
    lines = [f"v {x:.17g} {y:.17g} {z:.17g}" for x, y, z in ball.vertices * scale + shift]
    lines += [f"f {a} {b} {c}" for a, b, c in ball.faces + 1]
    (tmp_path / "far.obj").write_text("\n".join(lines))
    if scale > 1e150:
        with pytest.raises(UserError, match="nothing is left"):
            load_mesh(tmp_path / "far.obj")
        return
    mesh = load_mesh(tmp_path / "far.obj")
    assert len(mesh.faces) == 1280 and len(mesh.vertices) == 642
    assert np.allclose(np.abs(mesh.vertices).max(0), 1 / np.sqrt(3), atol=1e-5)
    assert np.allclose(mesh.vertices / np.linalg.norm(mesh.vertices, axis=1, keepdims=True), ball.vertices, atol=1e-5)
    assert "moved to the origin and scaled by" in _line(capsys)


def test_many_faces_are_kept_and_said(tmp_path, monkeypatch, capsys):
    from mesh import files

    monkeypatch.setattr(files, "MANY", 300)
    trimesh.creation.icosphere(2).export(tmp_path / "ball.ply")
    assert len(load_mesh(tmp_path / "ball.ply").faces) == 320 and "320 faces: every step will be slow" in _line(capsys)
