"""glTF of other programs, however they lay it out: a mesh as its author meant it."""

import numpy as np
import pytest
import trimesh
from gltf_files import CORNERS, FACES, SQUARE, UVS, Gltf, shown
from PIL import Image

from mesh.files import load_mesh
from mesh.srgb import linear_to_srgb, srgb_to_linear
from mesh.texels import look_up


@pytest.fixture
def quiet(capsys):
    """Nothing may be said by the end of the test."""
    yield
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["glb", "gltf"])
def test_textured_gltf_is_kept_exactly(kind, tmp_path, quiet):
    file = Gltf()
    physical = {"baseColorTexture": file.texture(CORNERS), "metallicFactor": 0.5, "roughnessFactor": 0.5}
    physical["metallicRoughnessTexture"] = file.texture([[[9, 100, 200], [9, 50, 0]]])
    bumps = file.texture([[[128, 128, 255]]])
    file.mesh(file.square(file.material(physical, normalTexture=bumps), TEXCOORD_0=file.numbers(UVS * 3 - 1)))
    mesh = load_mesh(file.save(tmp_path / f"square.{kind}"))
    assert (mesh.vertices == SQUARE).all() and (mesh.faces == FACES).all()
    assert (mesh.uvs == UVS * 3 - 1).all() and (mesh.uv_faces == FACES).all()  # beyond [0, 1] too
    assert (np.round(mesh.textures["albedo"] * 255) == CORNERS).all()
    assert np.allclose(mesh.textures["roughness"], np.array([[100, 50]]) / 255 / 2)
    assert np.allclose(mesh.textures["metallic"], np.array([[200, 0]]) / 255 / 2)
    assert np.allclose(mesh.textures["normal"], np.array([128, 128, 255]) / 255)
    assert (mesh.normals == [0, 0, 1]).all()  # made: the file has none
    assert np.allclose(mesh.colors, look_up(mesh.textures["albedo"], mesh.uvs))


def test_normalised_interleaved_and_sparse_numbers(tmp_path, quiet):
    file = Gltf()
    rows = np.zeros(4, [("position", "<f4", 3), ("uv", "<u2", 2), ("color", "u1", 4)])
    rows["position"], rows["uv"], rows["color"] = SQUARE, UVS * 65535, [[0, 128, 255, 255]] * 4
    view = file.view(rows.tobytes(), byteStride=20)
    common = {"bufferView": view, "count": 4}
    file.head["accessors"] += [
        {**common, "componentType": 5126, "type": "VEC3"},
        {**common, "componentType": 5123, "type": "VEC2", "normalized": True, "byteOffset": 12},
        {**common, "componentType": 5121, "type": "VEC4", "normalized": True, "byteOffset": 16},
    ]
    sparse = {
        "count": 1,
        "indices": {"bufferView": file.view(np.array([3], np.uint16).tobytes()), "componentType": 5123},
        "values": {"bufferView": file.view(np.array([0, 5, 0], np.float32).tobytes())},
    }
    file.head["accessors"][0]["sparse"] = sparse
    textured = file.material({"baseColorTexture": file.texture(CORNERS)})
    attributes = {"POSITION": 0, "TEXCOORD_0": 1}
    index = file.numbers(FACES.reshape(-1).astype(np.uint8))
    file.mesh({"attributes": attributes, "indices": index, "material": textured})
    mesh = load_mesh(file.save(tmp_path / "a.glb"))
    assert (
        np.allclose(mesh.uvs, UVS)
        and mesh.vertices[3].tolist() == [0, 5, 0]
        and (mesh.vertices[:3] == SQUARE[:3]).all()
    )
    file.head["meshes"][0]["primitives"][0] = {"attributes": {"POSITION": 0, "COLOR_0": 2}, "indices": index}
    mesh = load_mesh(file.save(tmp_path / "b.glb"))
    assert np.allclose(mesh.colors, linear_to_srgb(np.array([0, 128 / 255, 1])), atol=1e-6)  # linear in the file


def test_nodes_put_things_where_they_belong(tmp_path, quiet):
    """One square twice: under a moved parent, turned by 90 degrees about y; and mirrored, with its front still in front."""
    file = Gltf()
    file.mesh(file.square(NORMAL=file.numbers(np.tile(np.float32([0, 0, 1]), (4, 1)))))
    half = np.sqrt(0.5)
    file.head["nodes"] = [
        {"translation": [10, 0, 0], "children": [1, 2]},
        {"mesh": 0, "rotation": [0, half, 0, half], "scale": [2, 2, 2]},
        {"mesh": 0, "matrix": [-1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 7, 1]},
    ]
    mesh = load_mesh(file.save(tmp_path / "scene.glb"))
    turned, mirrored = mesh.vertices[:4], mesh.vertices[4:]
    assert np.allclose(turned, np.array([[10, 0, 0], [10, 0, -2], [10, 2, -2], [10, 2, 0]]), atol=1e-5)
    assert np.allclose(mirrored, SQUARE * [-1, 1, 1] + [10, 0, 7])
    assert np.allclose(mesh.normals[:4], [1, 0, 0], atol=1e-6) and np.allclose(mesh.normals[4:], [0, 0, 1])
    a, b, c = (mesh.vertices[mesh.faces[:, i]] for i in range(3))
    fronts = np.cross(b - a, c - a)
    assert (fronts[:2, 0] > 0).all() and (fronts[2:, 2] > 0).all()


def test_strips_fans_and_no_indices(tmp_path, quiet):
    zigzag = SQUARE[[0, 1, 3, 2]]
    for mode, points in ((5, zigzag), (6, SQUARE), (4, SQUARE[FACES.reshape(-1)])):
        file = Gltf()
        file.mesh(
            {"attributes": {"POSITION": file.numbers(points)}, "mode": mode}, {"attributes": {"POSITION": 0}, "mode": 1}
        )
        mesh = load_mesh(file.save(tmp_path / f"{mode}.glb"))
        assert len(mesh.faces) == 2 and len(mesh.vertices) == 4 and (mesh.normals == [0, 0, 1]).all(), mode


def test_texture_transform_and_second_coordinates(tmp_path, quiet):
    """Offset and scale pick the green quarter; a quarter turn counter-clockwise brings what is right of the origin above it."""
    file = Gltf()
    move = {"offset": [0.5, 0.0], "scale": [0.5, 0.5], "texCoord": 1}
    base = file.texture(CORNERS, extensions={"KHR_texture_transform": move})
    coordinates = {"TEXCOORD_0": file.numbers(0 * UVS), "TEXCOORD_1": file.numbers(UVS)}
    file.mesh(file.square(file.material({"baseColorTexture": base}), **coordinates))
    mesh = load_mesh(file.save(tmp_path / "moved.glb"))
    assert np.allclose(mesh.uvs, UVS * 0.5 + [0.5, 0])
    assert np.allclose(shown(mesh, [[0.5, 0.5]]), [[0, 1, 0]])
    move.clear()
    move["rotation"] = np.pi / 2
    file.head["materials"][0]["pbrMetallicRoughness"]["baseColorTexture"]["texCoord"] = 1
    turned = load_mesh(file.save(tmp_path / "turned.glb"))
    assert np.allclose(turned.uvs[1], [1, -1], atol=1e-6)  # (1, 1) was at the lower right; up is -v


def test_colour_factor_is_linear_and_tints_the_texture(tmp_path, quiet):
    file = Gltf()
    base = {"baseColorTexture": file.texture(CORNERS), "baseColorFactor": [0.5, 1, 1, 1]}
    file.mesh(file.square(file.material(base), TEXCOORD_0=file.numbers(UVS)))
    mesh = load_mesh(file.save(tmp_path / "tinted.glb"))
    assert np.allclose(srgb_to_linear(mesh.textures["albedo"])[0, 0], [0.5, 0, 0], atol=1e-3)
    file.head["materials"][0]["pbrMetallicRoughness"] = {"baseColorFactor": [0.5, 0.25, 0, 1]}
    plain = load_mesh(file.save(tmp_path / "plain.glb"))
    assert np.allclose(plain.colors, linear_to_srgb(np.array([0.5, 0.25, 0]))) and not plain.textures
    assert np.allclose(plain.uvs, UVS)  # somebody may want to bake onto them


def test_several_materials_become_one_texture(tmp_path, capsys):
    """Four squares side by side: a picture, a picture repeated 3 times, one colour, and vertex colours."""
    file = Gltf()
    red = np.zeros((4, 4, 3), np.uint8) + np.array([200, 10, 10], np.uint8)
    first = file.material({"baseColorTexture": file.texture(np.repeat(np.repeat(CORNERS, 8, 0), 8, 1))})
    second = file.material({"baseColorTexture": file.texture([[[0, 0, 0], [250, 250, 250]]])})
    third = file.material({"baseColorFactor": srgb_to_linear(np.array([0.2, 0.4, 0.6])).tolist() + [1]})
    fourth = file.material({"baseColorTexture": file.texture(red), "metallicRoughnessTexture": file.texture(red)})
    uvs = file.numbers(UVS)
    file.mesh(file.square(first, TEXCOORD_0=uvs))
    file.mesh(file.square(second, TEXCOORD_0=file.numbers(np.float32(UVS * [3, 1] + [4, 0]))))
    file.mesh(file.square(third))
    file.mesh(file.square(fourth, TEXCOORD_0=uvs))
    file.head["nodes"] = [{"mesh": i, "translation": [2 * i, 0, 0]} for i in range(4)]
    file.head["scenes"] = [{"nodes": [0, 1, 2, 3]}]
    mesh = load_mesh(file.save(tmp_path / "many.glb"))
    assert "4 materials were put into one texture" in capsys.readouterr().err
    assert mesh.uvs.min() >= 0 and mesh.uvs.max() <= 1 and len(mesh.faces) == 8
    assert np.allclose(
        shown(mesh, [[0.2, 0.8], [0.8, 0.8], [0.2, 0.2], [0.8, 0.2]]),
        np.eye(4)[:, [0, 1, 2]] + np.eye(4)[:, [3]],
        atol=0.02,
    )
    dark, light = shown(mesh, [[2 + 1 / 12, 0.5], [2 + 3 / 12, 0.5]])
    again = shown(mesh, [[2 + 9 / 12, 0.5], [2 + 11 / 12, 0.5]])
    assert dark.max() < 0.25 and light.min() > 0.75 and np.allclose(again, [dark, light], atol=0.1)
    assert np.allclose(shown(mesh, [[4.5, 0.5]]), [[0.2, 0.4, 0.6]], atol=0.01)
    assert np.allclose(shown(mesh, [[6.5, 0.5]]), np.array([[200, 10, 10]]) / 255, atol=0.01)
    size = mesh.textures["albedo"].shape[:2]
    assert mesh.textures["roughness"].shape == size and mesh.textures["metallic"].shape == size
    where = mesh.uvs[mesh.uv_faces[[0, 6]]].mean(1)
    assert np.allclose(
        look_up(mesh.textures["roughness"], where), [1, 10 / 255], atol=0.01
    )  # plain where there was none


def test_a_rigged_mesh_stands_in_its_pose(tmp_path, capsys):
    """The node of a skinned mesh says nothing; its only joint lifts it by 3 and its inverse bind matrix scales by 2."""
    file = Gltf()
    weights = {
        "JOINTS_0": file.numbers(np.zeros((4, 4), np.uint8)),
        "WEIGHTS_0": file.numbers(np.tile(np.float32([1, 0, 0, 0]), (4, 1))),
    }
    file.mesh(file.square(**weights))
    bind = np.diag(np.float32([2, 2, 2, 1]))
    view = file.view(bind.T.tobytes())
    file.head["accessors"].append({"bufferView": view, "componentType": 5126, "count": 1, "type": "MAT4"})
    file.head["skins"] = [{"joints": [1], "inverseBindMatrices": len(file.head["accessors"]) - 1}]
    file.head["nodes"] = [{"mesh": 0, "skin": 0, "translation": [50, 0, 0]}, {"translation": [0, 3, 0]}]
    file.head["scenes"] = [{"nodes": [0, 1]}]
    assert np.allclose(load_mesh(file.save(tmp_path / "rigged.glb")).vertices, SQUARE * 2 + [0, 3, 0])
    assert "rigged" in capsys.readouterr().err


def test_gltf_of_trimesh_with_external_files(tmp_path, quiet):
    box = trimesh.creation.box((1, 2, 3))
    box.visual = trimesh.visual.TextureVisuals(
        uv=np.random.default_rng(0).uniform(size=(8, 2)), image=Image.fromarray(CORNERS)
    )
    scene = trimesh.Scene()
    scene.add_geometry(box, transform=trimesh.transformations.translation_matrix([1, 0, 0]))
    for name, data in scene.export(file_type="gltf").items():
        (tmp_path / name).write_bytes(data)
    mesh = load_mesh(tmp_path / "model.gltf")
    assert np.allclose(np.sort(mesh.vertices, 0), np.sort(box.vertices + [1, 0, 0], 0)) and len(mesh.faces) == 12
    assert mesh.textures["albedo"].shape == (2, 2, 3)


def test_meshes_with_hard_edges_are_joined(tmp_path, quiet):
    """24 vertices of a box become 8; colours that differ keep them apart."""
    box = trimesh.creation.box()
    box.unmerge_vertices()
    box.export(tmp_path / "box.glb")
    mesh = load_mesh(tmp_path / "box.glb")
    assert len(mesh.vertices) == 8 and np.allclose(np.linalg.norm(mesh.normals, axis=1), 1, atol=1e-6)
    box.visual.face_colors = np.repeat(np.array([[250, 0, 0, 255], [0, 250, 0, 255]], np.uint8), 6, 0)
    box.export(tmp_path / "box.ply")
    mesh = load_mesh(tmp_path / "box.ply")
    assert len(mesh.vertices) > 8 and set(map(tuple, np.round(mesh.colors * 255).astype(int).tolist())) == {
        (250, 0, 0),
        (0, 250, 0),
    }
