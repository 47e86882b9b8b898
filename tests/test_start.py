"""What a stage starts from: a field, latents that become colours, a surface; and what it refuses, in one line."""

import pytest
import torch
from standins import BallGuidance

from errors import UserError
from mesh.scene import MeshScene
from nerf import build_scene
from nerf.latent import Adapter, Latent
from nerf.trainer import Trainer


class LatentGuidance(BallGuidance):
    """Wants latents of 1 inside a ball and 0 around it."""

    def __call__(self, image, polar, azimuth, step, as_latent=False, unit_range=True, hints=None):
        assert as_latent and not unit_range and image.shape[-1] == 4
        _, inside = self.target(polar, azimuth, *image.shape[1:3])
        loss = ((image - inside) ** 2).sum()
        return loss, {"grad_norm": loss.detach(), "nonfinite": torch.zeros(())}


@pytest.fixture
def finished(options, tmp_path):
    """`finished("name", "--backbone", "sdf")`: a short run in a workspace of that name, and its trainer."""

    def run(name, *typed, guidance=None):
        opt = options("--workspace", tmp_path / name, "--blob_density", 20, *typed)
        torch.manual_seed(0)
        trainer = Trainer(opt, build_scene(opt), guidance or BallGuidance(), "cpu")
        trainer.train()
        return trainer

    return run


@pytest.mark.parametrize("backbone", ["grid", "sdf"])
def test_a_field_goes_on_as_what_it_showed(finished, options, tmp_path, backbone):
    first = finished("first", "--backbone", backbone, "--bg_radius", -1)
    opt = options("--workspace", tmp_path / "second", "--init_with", tmp_path / "first")
    assert opt.backbone == backbone
    second = build_scene(opt)
    points = torch.rand(50, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    with first.showing("test") as scene, torch.no_grad():
        assert torch.allclose(second.density(points)["sigma"], scene.density(points)["sigma"])
        assert torch.allclose(second.density(points)["albedo"], scene.density(points)["albedo"])


def test_latents_become_colours_and_then_a_surface(finished, options, tmp_path):
    latent = finished("latent", "--latent", guidance=LatentGuidance())
    assert isinstance(latent.scene, Latent)
    again = options("--workspace", tmp_path / "latent", "--test")
    assert isinstance(build_scene(again), Latent)
    colours = finished("colours", "--init_with", tmp_path / "latent")
    assert isinstance(colours.scene, Adapter)
    # a stopped run goes on, and a finished one is shown, without the run that it came from
    (tmp_path / "latent").rename(tmp_path / "gone")
    shown = options("--workspace", tmp_path / "colours", "--test")
    trainer = Trainer(shown, build_scene(shown), None, "cpu")
    assert isinstance(trainer.scene, Adapter) and trainer.test()
    opt = options(
        "--workspace", tmp_path / "surface", "--init_with", tmp_path / "colours", "--dmtet", "--tet_grid_size", 16
    )
    scene = build_scene(opt)
    assert isinstance(scene, MeshScene) and isinstance(scene.field, Adapter) and len(scene.surface().faces) > 10
    Trainer(opt, scene, BallGuidance(), "cpu").train()
    back = options("--workspace", tmp_path / "surface", "--test")
    trainer = Trainer(back, build_scene(back), None, "cpu")
    assert isinstance(trainer.scene.field, Adapter) and trainer.test()


def test_densities_become_a_signed_distance_that_still_learns(finished, options, tmp_path):
    first = finished("first", "--bg_radius", -1, "--num_steps", 64)
    typed = ("--backbone", "sdf", "--lambda_eikonal", 1, "--bg_radius", -1, "--sdf_beta", 0.01)
    opt = options("--workspace", tmp_path / "second", "--init_with", tmp_path / "first", *typed)
    second = build_scene(opt)
    points = torch.rand(400, 3, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    with first.showing("test") as scene, torch.no_grad():
        dense = scene.density(points)["sigma"]
    inside = second.sdf(points).detach() < 0
    assert 0.05 < inside.float().mean() < 0.95
    assert dense[inside].median() > 3 * dense[~inside].median()
    trainer = Trainer(opt, second, BallGuidance(), "cpu")
    trainer.train()
    back = options("--workspace", tmp_path / "second", "--test")
    shown = Trainer(back, build_scene(back), None, "cpu")
    with shown.showing("test") as scene, trainer.showing("test") as own, torch.no_grad():
        assert torch.equal(scene.sdf(points), own.sdf(points))


def test_what_does_not_fit_is_said_in_one_line(finished, options, tmp_path):
    def refused(*typed):
        with pytest.raises(UserError) as told:
            build_scene(options("--workspace", tmp_path / "new", *typed))
        assert "\n" not in str(told.value)
        return str(told.value)

    finished("field")
    finished("surface", "--dmtet", "--tet_grid_size", 12)
    assert "add --dmtet" in refused("--init_with", tmp_path / "surface")
    assert "does not fit" in refused("--init_with", tmp_path / "field", "--num_levels", 3)
    assert "--guide_shape" in refused("--guide_shape", tmp_path / "nothing.obj", "--lambda_shape", 1)
    assert "name the shape" in refused("--lambda_shape", 1)
    assert "--latent" in refused("--latent", "--IF")
    (tmp_path / "empty").mkdir()
    assert "config.yaml" in refused("--init_with", tmp_path / "empty")
    (tmp_path / "preset.yaml").write_text("backbone: grid\nembedded:\n  itres: 3\n")
    assert "unknown key 'itres'; did you mean iters?" in refused("--config", tmp_path / "preset.yaml")
