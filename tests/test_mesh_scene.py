"""A surface as a scene: the same pictures as a field of the same shape and colour, gradients to shape and colour, starts of every kind, resume."""

import numpy as np
import pytest
import torch
from standins import BallGuidance

from errors import UserError
from mesh import Mesh
from mesh.geometry import Fixed, Tetrahedral, vertex_normals
from mesh.scene import MeshScene
from nerf import build_field, build_scene
from nerf.provider import orbit
from nerf.trainer import Trainer

CAMERAS = orbit(torch.tensor([60.0, 90.0, 120.0]), torch.tensor([20.0, 100.0, -140.0]), 3.2, 30.0, 48, 48)
DMTET = ("--dmtet", "--tet_grid_size", 24, "--dmtet_reso_scale", 2)


@pytest.fixture
def ball(options):
    """A surface scene: a ball of radius 0.5."""
    return build_scene(options(*DMTET, "--tet_grid_size", 48))


def icosphere(subdivisions=3, radius=0.5):
    import trimesh

    sphere = trimesh.creation.icosphere(subdivisions, radius)
    vertices, faces = np.asarray(sphere.vertices), np.asarray(sphere.faces)
    normals = vertex_normals(torch.tensor(vertices), torch.tensor(faces)).numpy()
    return Mesh(vertices.astype(np.float32), faces, None, normals.astype(np.float32))


def exact(cameras, radius=0.5):
    """Coverage, distance, normal of a ball at the origin."""
    origin, direction = cameras.rays()
    along = -(origin * direction).sum(-1)
    inside = radius**2 - ((origin + along[..., None] * direction) ** 2).sum(-1)
    distance = along - inside.clamp(min=0).sqrt()
    return inside > 0, distance, (origin + distance[..., None] * direction) / radius


@torch.no_grad()
def test_the_ball_is_where_the_field_would_show_it(ball):
    render = ball.eval().render(CAMERAS, "normal", background=torch.zeros(3))
    covered, distance, normal = exact(CAMERAS)
    alpha = render.alpha[..., 0]
    assert (covered == (alpha > 0.5)).float().mean() > 0.985
    core = covered & (alpha == 1)
    assert core.float().mean() > 0.9 * covered.float().mean()
    assert (render.depth[..., 0] - distance)[core].abs().max() < 0.03
    cosine = (render.normal * normal).sum(-1)[core]
    assert cosine.mean() > 0.99
    assert torch.allclose(render.image[core], (render.normal[core] + 1) / 2, atol=1e-6)


@torch.no_grad()
def test_every_shading_is_the_fields(options):
    """A dense field that is 1 inside a ball, and the ball's surface: the same light, the same colours."""
    opt = options("--max_steps", 256, "--num_steps", 400, "--upsample_steps", 0)
    field = build_field(opt).eval()
    field._sigma = lambda raw: raw
    field._raw = lambda x: (1000 * (x.norm(dim=-1) < 0.5).float(), field.trunk[:-1](field.encode(x)))
    field.query = lambda x, normals=False: (
        field._raw(x)[0],
        field.colour(x)[0],
        torch.nn.functional.normalize(x, dim=-1) if normals else None,
    )
    scene = MeshScene(opt, field, Fixed(icosphere())).eval()
    light = torch.nn.functional.normalize(torch.tensor([[1.0, 2.0, 0.5], [0.0, 1.0, 1.0], [-1.0, 0.3, 1.0]]), dim=-1)
    for shading in ("albedo", "lambertian", "textureless", "normal"):
        told = {"shading": shading, "light": light, "ambient": torch.tensor([0.1, 0.3, 0.6])}
        mine = scene.render(CAMERAS, background=torch.tensor([0.2, 0.5, 0.9]), **told)
        theirs = field.render(CAMERAS, background=torch.tensor([0.2, 0.5, 0.9]), **told)
        core = (mine.alpha[..., 0] == 1) & (theirs.alpha[..., 0] > 0.99)
        assert (mine.image - theirs.image)[core].abs().mean() < 0.004, shading
        assert (mine.image - theirs.image).abs().mean() < 0.01, shading


def test_both_shape_and_colour_follow_the_picture(ball):
    ball.train()
    render = ball.render(CAMERAS, background=torch.ones(3))
    assert render.surface is not None and render.image.requires_grad
    render.alpha.sum().backward()
    slope = ball.geometry.distance.grad
    # a larger ball is one whose distances are smaller
    assert (slope <= 1e-4).float().mean() > 0.99 and slope.sum() < 0
    ball.zero_grad()
    ball.render(CAMERAS).image.sum().backward()
    assert ball.field.encoder.embeddings.grad.abs().sum() > 0


def test_the_surface_is_closed_even_where_it_wants_to_leave_the_grid():
    geometry = Tetrahedral(8, torch.tensor([0.5, 0.4, 0.3]))
    geometry.fill(torch.full((len(geometry.nodes),), -1.0))
    surface = geometry()
    edges = torch.cat([surface.faces[:, [0, 1]], surface.faces[:, [1, 2]], surface.faces[:, [2, 0]]])
    assert len(surface.faces) and len(torch.unique(edges, dim=0)) == len(edges)
    assert set(map(tuple, edges.tolist())) == set(map(tuple, edges.flip(1).tolist()))
    assert (surface.vertices.abs() <= geometry.reach + 1e-6).all()


def test_an_open_sheet_is_lit_from_both_sides(options):
    vertices = torch.tensor([[-0.5, -0.5, 0.0], [0.5, -0.5, 0.0], [0.5, 0.5, 0.0], [-0.5, 0.5, 0.0]])
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]])
    sheet = Mesh(vertices.numpy(), faces.numpy(), None, vertex_normals(vertices, faces).numpy())
    scene = MeshScene(options(), build_field(options()), Fixed(sheet)).eval()
    cameras = orbit(90.0, torch.tensor([0.0, 180.0]), 3.2, 30.0, 16, 16)
    picture = scene.render(cameras, "textureless", ambient=0.0).image[:, 8, 8]
    assert torch.allclose(picture, torch.ones(2, 3), atol=0.02)


def test_nothing_to_see_is_a_picture_of_the_background(options):
    empty = Mesh(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int64), None, np.zeros((0, 3), np.float32))
    scene = MeshScene(options(), build_field(options()), Fixed(empty)).train()
    render = scene.render(CAMERAS, background=torch.tensor([0.2, 0.5, 0.9]))
    assert torch.equal(render.image[1, 3, 3], torch.tensor([0.2, 0.5, 0.9])) and render.alpha.max() == 0


def test_training_moves_the_surface_and_resume_changes_nothing(options, tmp_path):
    def run(name, iters, stop=None):
        # the average of the weights follows at once, so that what is shown is what was trained
        flags = ("--workspace", tmp_path / name, "--iters", iters, "--ema_decay", 0, "--lr_geometry", 0.05)
        opt = options(*DMTET, "--shape_init", "sphere 0.4", *flags)
        torch.manual_seed(0)
        trainer = Trainer(opt, build_scene(opt), BallGuidance(), "cpu")
        while trainer.step < (stop or iters):
            trainer._ready()
            trainer._train_step()
        trainer.save()
        return trainer

    whole = run("whole", 12)
    run("parts", 12, stop=5)
    parts = run("parts", 12)
    for name, value in whole.scene.state_dict().items():
        assert torch.equal(value, parts.scene.state_dict()[name]), name
    with whole.showing("test") as scene:
        reached = scene.surface().vertices.norm(dim=-1).mean()
    assert reached > 0.41  # towards the guidance's ball of 0.5


def test_a_finished_field_becomes_a_surface(options, tmp_path):
    opt = options("--workspace", tmp_path / "coarse", "--blob_density", 30, "--cuda_ray", "--max_steps", 128)
    trainer = Trainer(opt, build_scene(opt), BallGuidance(), "cpu")
    trainer.train()
    fine = options(*DMTET, "--init_with", tmp_path / "coarse", "--workspace", tmp_path / "fine")
    assert fine.blob_density == 30  # the field's structure came along
    scene = build_scene(fine).eval()
    with trainer.showing("test") as field, torch.no_grad():
        before = field.render(CAMERAS, background=torch.ones(3))
        after = scene.render(CAMERAS, background=torch.ones(3))
    a, b = before.alpha[..., 0] > 0.5, after.alpha[..., 0] > 0.5
    assert (a & b).sum() / (a | b).sum() > 0.93
    assert (before.image - after.image)[a & b].abs().mean() < 0.08


def test_a_mesh_file_stays_as_it_is_if_locked_and_its_colours_are_the_start(options, tmp_path):
    import trimesh

    box = trimesh.creation.box((0.8, 0.6, 0.4))
    box.visual.vertex_colors = [220, 30, 30, 255]
    box.export(tmp_path / "box.ply")
    opt = options("--init_with", tmp_path / "box.ply", "--lock_geo", "--lambda_opacity", 0)
    assert opt.dmtet
    scene = build_scene(opt).eval()
    assert np.allclose(np.sort(scene.surface().vertices, 0), np.sort(box.vertices, 0), atol=1e-6)
    with torch.no_grad():
        render = scene.render(CAMERAS, background=torch.ones(3))
    seen = render.image[render.alpha[..., 0] == 1]
    assert (seen.mean(0) - torch.tensor([220, 30, 30]) / 255).abs().max() < 0.05
    assert not any(p is scene.geometry for p in scene.parameters()) and scene.geometry.parameter_groups(1.0) == []
    soft = build_scene(options("--init_with", tmp_path / "box.ply", *DMTET, "--tet_grid_size", 48))
    volume = _volume(soft.surface())
    assert volume == pytest.approx(0.8 * 0.6 * 0.4, rel=0.08)


@torch.no_grad()
def _volume(surface):
    a, b, c = surface.vertices[surface.faces].unbind(1)
    return float((a * torch.linalg.cross(b, c)).sum() / 6)


def test_a_surface_starts_another_and_may_be_locked(options, tmp_path):
    first = options(*DMTET, "--workspace", tmp_path / "first", "--shape_init", "box 0.3 0.5 0.2")
    Trainer(first, build_scene(first), BallGuidance(), "cpu").train()
    for flags, volume in (((), 0.24), (("--lock_geo",), 0.24)):
        opt = options("--dmtet", "--init_with", tmp_path / "first", "--workspace", tmp_path / "second", *flags)
        scene = build_scene(opt)
        assert scene.locked == bool(flags)
        assert _volume(scene.surface()) == pytest.approx(volume, rel=0.15)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--dmtet", "--shape_init", "potato 3"), "--shape_init potato 3: no such shape"),
        (("--dmtet", "--init_with", "nowhere"), "--init_with nowhere: no such folder"),
        (("--init_with", "nothing.glb"), "--init_with"),
        (("--lock_geo",), "--lock_geo"),
        (("--material", "pbr"), "--material pbr: concerns surfaces"),
        (("--mesh_format", "fbx"), "--mesh_format fbx: must be some of"),
        (("--dmtet", "--rasterizer", "nvdiffrast"), "--rasterizer nvdiffrast"),
    ],
)
def test_what_cannot_be_started_is_said_in_one_line(options, flags, said):
    with pytest.raises(UserError) as told:
        build_scene(options(*flags))
    assert said in str(told.value) and "\n" not in str(told.value)
