"""What is exported looks like what was rendered: textures and vertex colours against the scene's own pictures, surfaces and fields."""

import numpy as np
import pytest
import torch
from standins import FormulaScene, lopsided

import rasterizer
from mesh import finish
from mesh.files import load_mesh
from nerf import build_scene
from nerf.provider import orbit
from nerf.results import finished_mesh
from nerf.trainer import Trainer

CAMERAS = orbit(80.0, torch.arange(8) * 45.0, 3.2, 30.0, 128, 128)
WHITE = torch.ones(3)


def picture(mesh, cameras):
    """A textured mesh, unlit, on white; [B, H, W, 3]."""
    vertices, faces = torch.as_tensor(mesh.vertices), torch.as_tensor(mesh.faces)
    clip = torch.nn.functional.pad(vertices, (0, 1), value=1.0) @ cameras.mvp().transpose(1, 2)
    raster = rasterizer.rasterize(clip, faces, cameras.height, cameras.width)
    uv = rasterizer.interpolate(torch.as_tensor(mesh.uvs)[None], raster, torch.as_tensor(mesh.uv_faces))
    colour = rasterizer.texture(torch.as_tensor(mesh.textures["albedo"]).float()[None], uv)
    colour = torch.where(raster[..., 3:] > 0, colour, 1.0)
    return rasterizer.antialias(colour, raster, clip, faces)


def psnr(a, b):
    return float(-10 * torch.log10((a - b).square().mean()))


def painted(options, *flags):
    """A surface whose colour changes from place to place."""
    scene = build_scene(options("--dmtet", "--tet_grid_size", 40, "--shape_init", "torus 0.4 0.2", *flags)).eval()
    with torch.no_grad():
        scene.field.encoder.embeddings.normal_(generator=torch.Generator().manual_seed(0))
    return scene


@pytest.mark.parametrize("flags", [(), ("--texture_size", 256, "--decimate_target", 3000)])
def test_a_surface_and_its_texture_look_the_same(options, flags):
    opt = options("--texture_size", 512, "--decimate_target", 0, *flags)
    scene = painted(options)
    mesh, measured = finished_mesh(scene, opt, 0, print)
    with torch.no_grad():
        own = scene.show(CAMERAS, WHITE, 0).image
    assert own.std() > 0.05
    assert psnr(picture(mesh, CAMERAS), own) > 28
    assert measured["mesh/faces"] == len(mesh.faces) and mesh.normals.shape == mesh.vertices.shape


def test_a_field_and_its_texture_look_the_same(options):
    """Where neither outline runs: it is soft in one, sharp in the other."""

    def formula(x):
        return lopsided(x, 400.0)[0], 0.5 + 0.4 * torch.sin(4 * x + x.roll(1, -1))

    flags = ("--cuda_ray", "--max_steps", 256, "--grid_size", 32)
    opt = options("--texture_size", 512, "--mcubes_resolution", 64, "--decimate_target", 0, *flags)
    scene = FormulaScene(opt, formula).eval()
    for step in range(16):
        scene.update_occupancy(step, torch.Generator().manual_seed(step))
    mesh, measured = finished_mesh(scene, opt, 0, print)
    assert measured["mesh/iou"] > 0.95
    with torch.no_grad():
        own = scene.render(CAMERAS, background=WHITE)
    made = picture(mesh, CAMERAS)
    inner = (own.alpha[..., 0] > 0.99) & ((made - 1).abs().amax(-1) > 1e-3)
    assert inner.float().mean() > 0.1
    assert psnr(made[inner], own.image[inner]) > 28


def test_without_texture_the_vertices_have_the_colours(options):
    opt = options("--texture_size", 0, "--decimate_target", 0)
    scene = painted(options)
    mesh, _ = finished_mesh(scene, opt, 0, print)
    assert mesh.uvs is None and not mesh.textures
    with torch.no_grad():
        own = scene.field.colour(torch.as_tensor(mesh.vertices))[0]
    assert np.allclose(mesh.colors, own, atol=1e-5)


def test_a_physical_material_has_four_textures_and_a_locked_surface_keeps_its_triangles(options):
    flags = ("--material", "pbr", "--lock_geo", "--texture_size", 64)
    opt = options("--dmtet", "--decimate_target", 100, *flags)
    scene = painted(options, "--material", "pbr", "--lock_geo", "--environment", "white")
    mesh, _ = finished_mesh(scene, opt, 0, print)
    assert set(mesh.textures) == {"albedo", "roughness", "metallic", "normal"}
    assert np.array_equal(mesh.faces, scene.surface().faces.numpy()) and len(mesh.faces) > 100
    assert np.allclose(mesh.textures["roughness"], 0.49, atol=0.01)  # where the head begins
    assert np.allclose(mesh.textures["normal"].mean((0, 1)), [0.5, 0.5, 1.0], atol=0.02)  # not bent


def test_a_vanished_surface_is_said(options):
    said = []
    scene = painted(options)
    with torch.no_grad():
        scene.geometry.distance.fill_(1.0)
    assert finished_mesh(scene, options(), 0, said.append) is None and "vanished" in said[0]
    assert finish.of_surface(scene, 0) is None


def test_test_exports_a_surface_in_every_format(options, tmp_path):
    from test_mesh_scene import BallGuidance

    flags = ("--dmtet", "--tet_grid_size", 16, "--workspace", tmp_path / "run", "--texture_size", 64)
    opt = options(*flags)
    Trainer(opt, build_scene(opt), BallGuidance(), "cpu").train()
    show = options("--workspace", tmp_path / "run", "--test", "--mesh_format", "obj,glb,ply,stl", "--texture_size", 64)
    assert show.dmtet and show.tet_grid_size == 16
    paths = Trainer(show, build_scene(show), None, "cpu").export_mesh()
    assert {path.suffix for path in paths} == {".obj", ".glb", ".ply", ".stl"}
    for path in paths:
        mesh = load_mesh(path)
        assert len(mesh.faces) > 100 and 0.3 < np.linalg.norm(mesh.vertices, axis=1).mean() < 0.6
