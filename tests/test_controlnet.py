"""The ControlNet prior: diffusers' own pictures, and control pictures in the form that the published networks were trained on."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from ddim import ddim, noise, sphere_hints
from tiny_models import build_folder

from errors import UserError
from guidance import controlnet as module
from guidance.canny import canny
from guidance.controlnet import FARTHEST, HUB_CONTROLNETS, ControlNet, control_picture, control_source
from guidance.text import ClipText
from guidance.weights import Source, quiet


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A random Stable Diffusion and a ControlNet for it, whose last convolutions are not zero as in a new one."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    root = tmp_path_factory.mktemp("models")
    model = build_folder(root / "model", "eps-kl")
    torch.manual_seed(1)
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    controlnet = ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=(8, 8, 16)
    )  # 4 times smaller, as the latents
    for weight in controlnet.parameters():
        if not weight.any():
            weight.data.normal_(0, 0.3)
    with quiet():
        controlnet.save_pretrained(root / "control")
    return model, root / "control"


def source(folder):
    return Source(str(folder), True, folder.name, f"--hf_key {folder}")


def load(folders, which="normal", scale=0.7):
    control = control_source(which, str(folders[1]))
    return ControlNet.load(source(folders[0]), control, which, scale, "cpu")


@pytest.fixture(scope="module")
def texts(folders):
    return ClipText(source(folders[0]), "cpu").embed(["a red chair", "blue view"])


@pytest.mark.parametrize("which", HUB_CONTROLNETS)
def test_ddim_over_our_prior_draws_the_pipeline_s_picture(which, folders, texts):
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    pipe = StableDiffusionControlNetPipeline.from_pretrained(
        folders[0], controlnet=ControlNetModel.from_pretrained(folders[1]), safety_checker=None
    )
    pipe.set_progress_bar_config(disable=True)
    hints = sphere_hints([30.0])
    hints["picture"] = hints["normal"] / 2 + 0.5
    control = control_picture(which, hints, 32)
    expected = pipe(
        "a red chair", control, negative_prompt="blue view", guidance_scale=5.0, num_inference_steps=8, output_type="pt",
        controlnet_conditioning_scale=0.7, generator=torch.Generator().manual_seed(3),
    ).images  # fmt: skip

    prior = load(folders, which)

    def guided(latents, t):
        text, negative = prior.ask(latents, t, [each[None] for each in texts], hints)
        return negative + 5.0 * (text - negative)

    drawn = prior.decode(ddim(prior, noise(3, 1, 4, 8, 8), 8, guided))
    assert (drawn - expected).abs().max() < 2e-4
    assert drawn.std() > 0.01
    for scale in (0.0, 1.4):  # what the ControlNet adds is not lost in the picture
        prior.scale = scale
        assert (prior.decode(ddim(prior, noise(3, 1, 4, 8, 8), 8, guided)) - expected).abs().max() > 0.01


def test_without_strength_it_is_the_model_alone(folders, texts):
    from guidance.stable_diffusion import StableDiffusion

    prior, plain = load(folders, scale=0.0), StableDiffusion.load(source(folders[0]), "cpu")
    prior.controlnet.register_forward_hook(lambda *args: pytest.fail("the ControlNet was run for nothing"))
    question = noise(0, 2, 4, 8, 8), torch.tensor([5, 900]), texts
    torch.testing.assert_close(prior.predict(*question), plain.predict(*question))


def test_the_control_picture_is_made_once_for_all_wordings(folders, texts, monkeypatch):
    prior, hints = load(folders), sphere_hints([0.0, 120.0])
    noisy, t = noise(0, 2, 4, 8, 8), torch.tensor([5, 900])
    wordings = [texts, texts.flip(0), texts * 0.5]
    each = [prior.predict(noisy, t, wording, hints) for wording in wordings]
    made = []
    monkeypatch.setattr(module, "control_picture", lambda *args: made.append(args) or control_picture(*args))
    together = prior.ask(noisy, t, wordings, hints)
    assert [len(hints["normal"]) for _, hints, _ in made] == [2]
    torch.testing.assert_close(torch.stack(together), torch.stack(each), rtol=1e-4, atol=1e-5)
    prior.max_batch = 1
    torch.testing.assert_close(
        torch.stack(prior.ask(noisy, t, wordings, hints)), torch.stack(each), rtol=1e-4, atol=1e-5
    )


def test_the_network_can_be_asked_by_itself(folders, texts):
    """As a training of an adaptation does: with the hints as they come."""
    prior, hints = load(folders), sphere_hints([0.0, 120.0])
    noisy, t = noise(0, 2, 4, 8, 8), torch.tensor([5, 900])
    torch.testing.assert_close(prior.denoise(noisy, t, texts, hints), prior.predict(noisy, t, texts, hints))


def test_each_sample_has_its_own_control(folders, texts):
    prior, hints = load(folders), sphere_hints([0.0, 120.0])
    noisy, t = noise(0, 1, 4, 8, 8).repeat(2, 1, 1, 1), torch.tensor([400, 400])
    text = texts[:1].repeat(2, 1, 1)
    control = torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32)])
    both = prior.predict(noisy, t, text, {"control": control})
    assert not torch.allclose(both[0], both[1], atol=1e-3)
    swapped = prior.predict(noisy, t, text, {"control": control.flip(0)})
    torch.testing.assert_close(both, swapped.flip(0), rtol=1e-4, atol=1e-5)
    given = {"control": control_picture("normal", hints, 32)}
    torch.testing.assert_close(prior.predict(noisy, t, text, given), prior.predict(noisy, t, text, hints))


def test_a_picture_gets_a_gradient_and_the_networks_do_not(folders, texts):
    prior, hints = load(folders, "canny"), {"picture": torch.rand(2, 24, 24, 3)}
    image = hints["picture"].clone().requires_grad_()
    latents = prior.encode(image.permute(0, 3, 1, 2), torch.Generator().manual_seed(0))
    eps = prior.predict(latents.detach(), torch.tensor([300, 700]), texts, {"picture": image})
    latents.backward(eps)
    assert (image.grad.flatten(1).norm(dim=1) > 0).all()
    for network in (prior.controlnet, prior.denoiser, prior.autoencoder):
        assert not network.training and all(not p.requires_grad and p.grad is None for p in network.parameters())


# -- what the ControlNet is shown ------------------------------------------------------------------------------------


@pytest.mark.parametrize("polar", (80.0, 30.0))
def test_normals_are_those_of_the_camera_with_x_to_the_left(polar):
    """From every side the middle of a sphere faces the camera, its left edge points left (red), its upper edge up (green)."""
    size = 64
    picture = control_picture("normal", sphere_hints([0.0, 180.0, 70.0], size, polar), size)
    assert picture.shape == (3, 3, size, size) and picture.min() >= 0 and picture.max() <= 1
    vectors = 2 * picture - 1
    for vector in vectors:
        inside = (vector - torch.tensor([0.0, 0.0, 1.0])[:, None, None]).abs().sum(0) > 1e-5
        columns, rows = inside.any(0).nonzero().flatten(), inside.any(1).nonzero().flatten()
        middle = vector[:, size // 2 - 1 : size // 2 + 1, size // 2 - 1 : size // 2 + 1].mean((1, 2))
        assert torch.allclose(middle, torch.tensor([0.0, 0.0, 1.0]), atol=0.01)
        left, right = vector[:, size // 2, columns[0]], vector[:, size // 2, columns[-1]]
        top, bottom = vector[:, rows[0], size // 2], vector[:, rows[-1], size // 2]
        assert left[0] > 0.8 and right[0] < -0.8 and left[1].abs() < 0.1 and left[2] > 0
        assert top[1] > 0.8 and bottom[1] < -0.8 and top[0].abs() < 0.1 and top[2] > 0
        assert torch.allclose(vector[:, 0, 0], torch.tensor([0.0, 0.0, 1.0]), atol=1e-6)  # the background
        assert torch.allclose(vector[:, inside].norm(dim=0), torch.ones(int(inside.sum())), atol=1e-4)


def test_normals_fade_into_the_background_with_the_opacity():
    """The hint is a sum of weight x normal: its length does not tell the direction."""
    up = torch.tensor([0.0, 1.0, 0.0]).expand(1, 4, 4, 3)
    hints = {"normal": 0.3 * up, "alpha": torch.full((1, 4, 4, 1), 0.25), "c2w": torch.eye(4)[None]}
    picture = control_picture("normal", hints, 4)
    expected = 0.25 * torch.tensor([0.5, 1.0, 0.5]) + 0.75 * torch.tensor([0.5, 0.5, 1.0])
    assert torch.allclose(picture, expected[None, :, None, None].expand_as(picture), atol=1e-6)
    larger = control_picture("normal", sphere_hints([10.0], 24), 96)
    exact = control_picture("normal", sphere_hints([10.0], 96), 96)
    middle = slice(36, 60)
    assert (larger - exact)[..., middle, middle].abs().max() < 0.03


def test_depth_is_inverse_and_scaled_for_each_picture():
    distance = torch.tensor([[2.0, 4.0, 8.0, 3.0], [1.0, 1.25, 2.0, 1.0]]).view(2, 2, 2, 1)
    alpha = torch.tensor([[1.0, 1.0, 0.8, 0.0], [0.6, 1.0, 1.0, 0.0]]).view(2, 2, 2, 1)
    picture = control_picture("depth", {"depth": distance * alpha, "alpha": alpha}, 2)
    assert picture.shape == (2, 3, 2, 2) and torch.equal(picture[:, 0], picture[:, 1])

    def grey(inverse, low, high):
        return FARTHEST + (1 - FARTHEST) * (inverse - low) / (high - low)

    expected = torch.tensor([
        [1.0, grey(1 / 4, 1 / 8, 1 / 2), 0.8 * FARTHEST, 0.0],
        [0.6, grey(1 / 1.25, 1 / 2, 1.0), FARTHEST, 0.0],
    ])  # fmt: skip
    assert torch.allclose(picture[:, 0].flatten(1), expected, atol=1e-5)


def test_depth_of_nothing_of_a_wall_and_of_fog():
    empty, wall = torch.zeros(1, 4, 4, 1), torch.ones(1, 4, 4, 1)
    hints = {"depth": torch.cat([empty, 3 * wall, 0.6 * wall]), "alpha": torch.cat([empty, wall, 0.3 * wall])}
    picture = control_picture("depth", hints, 8)
    assert torch.allclose(picture, torch.tensor([0.0, 1.0, 0.3])[:, None, None, None].expand(3, 3, 8, 8))


def test_depth_of_a_sphere():
    hints = sphere_hints([0.0], 32)
    picture = control_picture("depth", hints, 64)[0, 0]
    assert picture[32, 32] > 0.97 and picture[0, 0] == 0
    assert picture[32, 32] > picture[32, 22] > picture[32, 18] > FARTHEST / 2


OPENCV = """
...#....#..#....
...#...#..#.....
..#......##.##..
.##....###....##
#....##......#..
..#.##....#..#..
..##......####..
##...#####.##...
.....####..##...
..##......#####.
..#.##....#..#..
#....##......##.
.##....###.....#
..#......##.....
...#...#..#.....
...#....#..#....
"""


def test_edges_are_opencv_s():
    """Made with OpenCV 5.0: Canny(bytes, 100, 200). Half of these pixels start an edge, half are reached from them."""
    coarse = torch.tensor([[0.1, 0.9, 0.2, 0.7], [0.8, 0.3, 0.6, 0.1], [0.2, 0.7, 0.9, 0.4], [0.5, 0.0, 0.3, 0.8]])
    one = 0.62 * F.interpolate(coarse[None, None], (16, 16), mode="bilinear", align_corners=False)
    image = torch.cat([one, one.flip(2), one.transpose(2, 3) * 0.5], 1)
    found = canny(torch.cat([torch.zeros_like(image), image]))
    assert ["".join("#" if on else "." for on in row) for row in found[1, 0].tolist()] == OPENCV.split()
    assert not found[0].any()
    fewer, more = canny(image, 200, 200), canny(image, 100, 100)
    assert fewer.sum() == 40 and found.sum() == 80 and more.sum() == 84


def test_edges_follow_far_and_keep_to_what_they_touch():
    """A faint line is an edge all along if one end of it is strong; another faint line that touches nothing is none."""
    image = torch.full((1, 1, 64, 64), 0.5)
    image[..., 10, :] += 0.14
    image[..., 10, :2] += 0.3
    image[..., 40, :] += 0.14
    found = canny(image)[0, 0]
    assert found[9, 4:].all() and found[11, 4:].all() and not found[30:].any()


def test_the_picture_s_edges_are_found_at_the_size_asked_for():
    picture = torch.zeros(1, 16, 16, 3)
    picture[:, :, 8:] = 1
    edges = control_picture("canny", {"picture": picture}, 64)
    assert edges.shape == (1, 3, 64, 64) and set(edges.unique().tolist()) == {0.0, 1.0}
    assert (edges[0, 0].sum(1) <= 2).all() and edges[0, 0][:, 28:36].any(1).all()


@pytest.mark.parametrize(
    ("which", "words"), (("normal", "normal and alpha and c2w"), ("depth", "depth and alpha"), ("canny", "picture"))
)
def test_a_missing_hint_is_said(which, words, folders, texts):
    with pytest.raises(ValueError, match=f"the ControlNet for {which} cannot see the scene: the hints lack {words}"):
        load(folders, which).predict(noise(0, 2, 4, 8, 8), torch.tensor([5, 900]), texts)
    with pytest.raises(ValueError, match="no control is called sketch; there are normal, depth, canny"):
        control_picture("sketch", {}, 8)


# -- loading -----------------------------------------------------------------------------------------------------------


def test_half_precision_is_read_from_whatever_files_there_are(folders, texts):
    hints, question = sphere_hints([0.0, 120.0]), (noise(0, 2, 4, 8, 8), torch.tensor([5, 900]), texts)
    expected = load(folders).predict(*question, hints)
    control = control_source("normal", str(folders[1]))
    half = ControlNet.load(source(folders[0]), control, "normal", 0.7, "cpu", torch.bfloat16)
    found = half.predict(*question, hints)
    assert half.controlnet.dtype == half.denoiser.dtype == torch.bfloat16 and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_where_a_controlnet_comes_from(folders):
    hub = control_source("depth")
    assert (hub.path_or_id, hub.local, hub.flag) == (HUB_CONTROLNETS["depth"], False, "--control depth")
    assert control_source("depth", str(folders[1])).local
    assert control_source("depth", "someone/else").path_or_id == "someone/else"
    with pytest.raises(UserError, match="--control_key no where: no where: no such folder"):
        control_source("depth", "no where")
    with pytest.raises(
        UserError, match="--control depth: lllyasviel/.* cannot be read as a ControlNetModel: .*; check the id"
    ):
        ControlNet.load(source(folders[0]), hub, "depth", 1.0, "cpu")


def test_a_controlnet_of_another_model_is_refused(folders, tmp_path):
    from diffusers import ControlNetModel, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folders[0] / "unet")
    other = UNet2DConditionModel(**{**unet.config, "cross_attention_dim": 24})
    with quiet():
        ControlNetModel.from_unet(other).save_pretrained(tmp_path / "other")
    with pytest.raises(
        UserError, match=r"--control_key .*other: the ControlNet does not belong to model \(cross_attention_dim 24 inst"
    ):
        load((folders[0], tmp_path / "other"))


def test_a_folder_that_is_no_controlnet_is_refused(folders, tmp_path):
    with pytest.raises(UserError, match="is not a ControlNetModel: it has no weights control"):
        load((folders[0], folders[0] / "unet"))
    empty = shutil.copytree(folders[1], tmp_path / "empty")
    next(empty.glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match="cannot be read as a ControlNetModel"):
        load((folders[0], empty))
