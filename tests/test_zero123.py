"""Zero-1-to-3: what its denoiser is told, the bank's numbers, the gradient; and with tiny-zero123, which way is left."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from gaussian import MixturePrior, gaussian
from zero123_models import SIZE, WIDTH, random_model

from errors import UserError
from guidance.weights import EMBEDDED_ZERO123, quiet
from guidance.zero123 import (
    View,
    ViewBank,
    Zero123,
    angle_between,
    build_view_guidance,
    gradient_share,
    pack,
    reference_weights,
    relative_pose,
    sample_views,
    unpack,
)
from guidance.zero123_reference import embed_picture, read_view_model, view_source
from nerf.provider import orbit


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {kind: random_model(root / kind, kind) for kind in ("kl", "tiny")}


@pytest.fixture(scope="module")
def model(folders):
    parts = read_view_model(view_source(str(folders["kl"])), "cpu")
    return parts, Zero123.of(parts, "cpu")


def picture(seed=0, size=SIZE):
    return torch.rand(3, size, size, generator=torch.Generator().manual_seed(seed))


def settings(**given):
    """The options that the guidance reads."""
    base = {
        "zero123": None, "zero123_scale": None, "zero123_grad_scale": "angle", "lambda_zero123": 1.0, "seed": 3,
        "precision": "fp32", "taesd": False, "vram_O": False,
        "guidance_scale": 100.0, "t_range": (0.02, 0.98), "t_schedule": "auto", "weighting": "auto", "iters": 100, "clip_latent": 0.0,
        "clip_pixel": 0.0, "clip_norm": 0.0, "bridge_from": 0.8, "inversion_steps": 5, "inversion_scale": 0.0, "inversion_eta": 0.0,
        "interval": 0.05, "lora_rank": 4, "lora_lr": 1e-4, "lora_scale": 1.0, "vae_slicing": False, "vae_tiling": False,
        "attention_slicing": False, "xformers": False, "tomesd": 0.0, "channels_last": False, "offload": "none", "compile": False,
    }  # fmt: skip
    return SimpleNamespace(**{**base, **given})


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_the_pose_in_the_published_model_s_world_is_ours():
    """Against the published formula for cameras in its own world (z up), that our cameras' positions are turned into."""
    generator = torch.Generator().manual_seed(0)
    polar, azimuth = (
        15 + 100 * torch.rand(2, 20, generator=generator),
        720 * torch.rand(2, 20, generator=generator) - 360,
    )
    radius = 1 + torch.rand(2, 20, generator=generator)

    def spherical(i):
        x, y, z = orbit(polar[i], azimuth[i], radius[i], 40.0, 8, 8).position.unbind(-1)
        x, y, z = z, x, y  # a rotation: our up y becomes their up z, our front z their front x
        return torch.atan2(torch.hypot(x, y), z), torch.atan2(y, x), (x * x + y * y + z * z).sqrt()

    (theta, phi, r), (theta_0, phi_0, r_0) = spherical(1), spherical(0)
    expected = torch.stack([theta - theta_0, (phi - phi_0).sin(), (phi - phi_0).cos(), r - r_0], -1)
    cameras = [torch.stack([polar[i], azimuth[i], radius[i]], -1) for i in (1, 0)]
    torch.testing.assert_close(relative_pose(*cameras), expected, atol=2e-5, rtol=1e-4)
    stable = relative_pose(*cameras, "polar")
    torch.testing.assert_close(stable[:, :3], expected[:, :3], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(stable[:, 3], theta_0, atol=2e-5, rtol=1e-4)


def test_angles_between_cameras():
    polar, azimuth = torch.tensor([90.0, 90.0, 0.0, 60.0]), torch.tensor([0.0, 90.0, 37.0, 10.0])
    angle = angle_between(polar, azimuth, torch.tensor([90.0, 60.0]), torch.tensor([0.0, 10.001]))
    cosine = math.sin(math.radians(60)) * math.cos(math.radians(10.001))
    torch.testing.assert_close(angle[:3, 0], torch.tensor([0.0, 90.0, 90.0]), atol=1e-4, rtol=0)
    assert angle[0, 1].item() == pytest.approx(math.degrees(math.acos(cosine)), abs=1e-3)
    assert angle[3, 1].item() == pytest.approx(0.001 * math.sin(math.radians(60)), rel=0.02)


def test_the_published_weights_of_several_pictures():
    angle = torch.tensor([[10.0, 20.0, 40.0], [1.0, 90.0, 179.0], [0.0, 50.0, 0.001]])
    weights = reference_weights(angle, torch.ones(3))
    torch.testing.assert_close(weights[0], torch.tensor([4.0, 2.0, 1.0]) / 7)
    torch.testing.assert_close(weights[1], torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(weights[2], torch.tensor([0.5, 0.0, 0.5]))  # 1 / angle is 100 at most
    own = reference_weights(
        angle[:1], torch.tensor([0.2, 4.0, 1.0])
    )  # 0.2, 2, 0.25; relative to the largest: 0.1, 1, 0.125
    torch.testing.assert_close(own[0], torch.tensor([0.1, 1.0, 0.125]) / 1.225)


def test_the_share_of_the_gradient_by_angle():
    torch.testing.assert_close(gradient_share(torch.tensor([[0.0], [45.0], [180.0]])), torch.tensor([0.0, 0.25, 1.0]))
    torch.testing.assert_close(gradient_share(torch.tensor([[30.0, 60.0, 20.0]])), torch.tensor([20 / 60]))


@pytest.mark.parametrize("count", (1, 3))
def test_an_embedding_carries_the_tokens_and_the_latents(count):
    generator = torch.Generator().manual_seed(0)
    tokens, latents = torch.randn(2, count, 24, generator=generator), torch.randn(2, 4, 8, 8, generator=generator)
    packed = pack(tokens, latents)
    assert packed.shape == (2, count + math.ceil(256 / 24), 24)
    for ours, theirs in zip(unpack(packed, 4, 8), (tokens, latents), strict=True):
        assert torch.equal(ours, theirs)


# -- what the denoiser is told -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ("kl", "tiny"))
def test_the_denoiser_gets_latents_beside_the_noise_and_one_token(kind, folders):
    """Against the networks called by hand, as the published code calls them."""
    parts = read_view_model(view_source(str(folders[kind])), "cpu")
    prior = Zero123.of(parts, "cpu")
    known = picture()
    bank = ViewBank(parts, prior, [View(known, 80.0, 20.0, 3.0)])
    c2w = orbit(torch.tensor([60.0, 95.0]), torch.tensor([110.0, -70.0]), torch.tensor([3.2, 2.9]), 40.0, 8, 8).c2w
    condition = bank.condition(torch.tensor([60.0, 95.0]), torch.tensor([110.0, -70.0]), {"c2w": c2w})
    with torch.no_grad():
        whole = 2 * known[None] - 1
        encoded = parts.vae.encode(whole)
        beside = encoded.latents if kind == "tiny" else encoded.latent_dist.mode()
        small = torch.nn.functional.interpolate(known[None], (24, 24), mode="bicubic", align_corners=True)
        small = (small - torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]) / torch.tensor(
            [0.26862954, 0.26130258, 0.27577711]
        )[:, None, None]
        seen = parts.tower(small).image_embeds.expand(2, -1)
        turn = torch.deg2rad(torch.tensor([90.0, -90.0]))
        pose = torch.stack(
            [torch.deg2rad(torch.tensor([-20.0, 15.0])), turn.sin(), turn.cos(), torch.tensor([0.2, -0.1])], -1
        )
        token = parts.projection(torch.cat([seen, pose], -1))
        assert token.shape == (2, 1, WIDTH)
        noisy, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([300, 700])
        expected = parts.unet(torch.cat([noisy, beside.expand(2, -1, -1, -1)], 1), t, token).sample
        nothing = parts.unet(torch.cat([noisy, torch.zeros_like(noisy)], 1), t, torch.zeros_like(token)).sample
    base, told = prior.ask(noisy, t, [condition.null, condition.text])
    torch.testing.assert_close(told, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(base, nothing, atol=1e-5, rtol=1e-4)
    assert (expected - nothing).abs().max() > 1e-3
    assert torch.equal(condition.negative, condition.null) and not condition.null.any()
    away = angle_between(
        torch.tensor([60.0, 95.0]), torch.tensor([110.0, -70.0]), torch.tensor([80.0]), torch.tensor([20.0])
    )
    torch.testing.assert_close(condition.hints["share"], away[:, 0] / 180)


def test_a_picture_of_another_size_is_brought_to_the_model_s(model):
    parts, prior = model

    def slope(size):
        ramp = (torch.arange(size) + 0.5) / size
        return torch.stack([ramp.expand(size, -1), ramp[:, None].expand(-1, size), torch.full((size, size), 0.3)])

    banks = [ViewBank(parts, prior, [View(each, 80.0, 0.0, 3.0)]) for each in (slope(SIZE), slope(3 * SIZE))]
    torch.testing.assert_close(banks[0].features, banks[1].features, atol=0.02, rtol=0.02)
    torch.testing.assert_close(banks[0].latents, banks[1].latents, atol=0.05, rtol=0.05)
    assert banks[1].latents.shape == banks[0].latents.shape == (1, 4, 8, 8)
    assert embed_picture(parts, picture()[None], SIZE).shape == (1, WIDTH)


def test_of_several_pictures_each_is_drawn_as_often_as_it_counts(model):
    parts, prior = model
    views = [View(picture(i), 80.0, azimuth, 3.0) for i, azimuth in enumerate((0.0, 40.0, 170.0))]
    bank = ViewBank(parts, prior, views, torch.Generator().manual_seed(0))
    count = 4000
    polar, azimuth = torch.full((count,), 80.0), torch.full((count,), 15.0)
    condition = bank.condition(polar, azimuth)
    told = unpack(condition.text, 4, 8)[1]
    seen = (
        torch.stack([(told - latents).flatten(1).abs().amax(1) < 1e-6 for latents in bank.latents], 1).float().mean(0)
    )
    expected = reference_weights(angle_between(polar[:1], azimuth[:1], *bank.camera[:, :2].unbind(1)), torch.ones(3))[0]
    torch.testing.assert_close(seen, expected, atol=0.03, rtol=0)
    assert expected[2] == 0 and seen[2] == 0
    token = bank.tell(torch.tensor([1]), torch.tensor([[80.0, 15.0, 3.0]]))[0, -1]  # its radius is its own: no change
    drawn = condition.text[(told - bank.latents[1]).flatten(1).abs().amax(1) < 1e-6][0, -1]
    torch.testing.assert_close(drawn, token)


def test_a_model_of_any_background_sees_the_picture_on_the_render_s(tmp_path):
    known, mask = picture(), (picture(9)[:1] > 0.5).float()
    on = [mask * known + (1 - mask) * color for color in (1.0, torch.tensor([0.2, 0.7, 0.4])[:, None, None])]
    angles = torch.tensor([80.0]), torch.tensor([90.0])
    plain = {"background": torch.tensor([[0.2, 0.7, 0.4]])}
    for any_background in (True, False):
        folder = random_model(tmp_path / str(any_background), "tiny", any_background=any_background)
        parts = read_view_model(view_source(str(folder)), "cpu")
        prior = Zero123.of(parts, "cpu")
        bank = ViewBank(parts, prior, [View(on[0], 80.0, 0.0, 3.0, mask=mask)])
        white, painted = (ViewBank(parts, prior, [View(one, 80.0, 0.0, 3.0)]).condition(*angles).text for one in on)
        assert (white - painted).abs().max() > 1e-3
        assert torch.equal(bank.condition(*angles).text, white)
        torch.testing.assert_close(bank.condition(*angles, plain).text, painted if any_background else white)


def test_pictures_of_no_weight_are_left_out_and_one_must_remain(model):
    parts, prior = model
    views = [View(picture(0), 80.0, 0.0, 3.0, 0.0), View(picture(1), 80.0, 90.0, 3.0, 2.0)]
    assert len(ViewBank(parts, prior, views).weight) == 1
    with pytest.raises(UserError, match="zero123_weight"):
        ViewBank(parts, prior, views[:1])


@pytest.mark.parametrize("eta", (0.0, 1.0))
def test_sampling_gives_the_distribution_of_a_prior_that_is_known(eta):
    known, prior = MixturePrior(channels=3), object.__new__(Zero123)
    for name in ("signal", "sigma", "num_timesteps", "latent_size", "latent_channels", "predict"):
        setattr(prior, name, getattr(known, name))
    prior.device, prior.decode = torch.device("cpu"), lambda latents: latents
    told, steps = gaussian(0.7, -0.5, 0.0, variance=0.3).expand(4000, 2, 5), []
    drawn = sample_views(prior, told, 400, 1.0, eta, torch.Generator().manual_seed(0), steps.append).flatten(1)
    torch.testing.assert_close(drawn.mean(0), torch.tensor([0.7, -0.5, 0.0]), atol=0.05, rtol=0)
    torch.testing.assert_close(drawn.var(0), torch.full((3,), 0.3), atol=0.03, rtol=0)
    assert steps == list(range(1, 401))


# -- guidance ----------------------------------------------------------------------------------------------------------


def render(seed=5, count=2):
    return torch.rand(count, SIZE, SIZE, 3, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def pull(guidance, image, polar, azimuth, step=0):
    loss, log = guidance(image, polar, azimuth, step)
    image.grad = None
    loss.backward()
    return image.grad.clone(), log


def test_the_gradient_is_finite_and_counts_by_the_angle(folders):
    views = [View(picture(), 80.0, 0.0, 3.0)]
    polar, azimuth = torch.tensor([80.0, 80.0]), torch.tensor([0.0, 180.0])
    opt = settings(zero123=str(folders["kl"]))
    by_angle, log = pull(build_view_guidance(opt, views, "cpu"), render(), polar, azimuth)
    assert torch.isfinite(by_angle).all() and log["nonfinite"] == 0
    assert by_angle[0].abs().max() == 0 and by_angle[1].abs().max() > 0  # nothing at the picture itself
    opt.zero123_grad_scale = "none"
    flat, _ = pull(build_view_guidance(opt, views, "cpu"), render(), polar, azimuth)
    assert flat[0].abs().max() > 0
    share = angle_between(polar[1:], azimuth[1:], torch.tensor([80.0]), torch.tensor([0.0])).item() / 180
    torch.testing.assert_close(by_angle[1], share * flat[1], atol=1e-4 * flat[1].abs().max().item(), rtol=1e-3)


def test_its_scale_is_its_own(folders):
    views = [View(picture(), 80.0, 0.0, 3.0)]
    scale = lambda **given: build_view_guidance(settings(**given), views, "cpu").distillation.settings.guidance_scale  # noqa: E731
    assert scale(zero123=str(folders["kl"])) == 5.0
    assert scale(zero123=str(folders["kl"]), zero123_scale=7.5) == 7.5
    guidance = build_view_guidance(settings(zero123=str(folders["kl"])), views, "cpu")
    guidance.follow(settings(zero123_scale=4.0, t_range=(0.2, 0.6)))
    assert (guidance.distillation.settings.guidance_scale, guidance.distillation.settings.t_range) == (4.0, (0.2, 0.6))


def test_a_saved_state_goes_on_with_the_same_pictures_and_noise(folders):
    views = [View(picture(i), 80.0, azimuth, 3.0) for i, azimuth in enumerate((0.0, 90.0))]
    polar, azimuth = torch.full((2,), 80.0), torch.tensor([45.0, 50.0])
    opt = settings(zero123=str(folders["tiny"]))
    guidance = build_view_guidance(opt, views, "cpu")
    pull(guidance, render(), polar, azimuth)
    state = guidance.state()
    shown = guidance.debug_images(render().detach(), polar, azimuth, 1)
    assert shown.shape == (2, SIZE, 3 * SIZE, 3)
    expected = [pull(guidance, render(), polar, azimuth, step)[0] for step in range(1, 4)]  # looking drew nothing
    again = build_view_guidance(settings(zero123=str(folders["tiny"]), seed=99), views, "cpu")
    again.load_state(state)
    for step, gradient in enumerate(expected, 1):
        assert torch.equal(pull(again, render(), polar, azimuth, step)[0], gradient)


# -- folders -----------------------------------------------------------------------------------------------------------


def spoil(folder, tmp_path, change):
    copy = tmp_path / "spoilt"
    shutil.copytree(folder, copy)
    change(copy)
    return copy


def no_unet(folder):
    shutil.rmtree(folder / "unet")


def no_projection(folder):
    (folder / "cc_projection" / "diffusion_pytorch_model.safetensors").unlink()


def four_channels(folder):
    from diffusers import UNet2DConditionModel

    with quiet():
        UNet2DConditionModel(
            sample_size=8, in_channels=4, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=WIDTH,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=2,
        ).save_pretrained(folder / "unet")  # fmt: skip


def other_projection(folder):
    from safetensors.torch import save_file

    layer = torch.nn.Linear(7, WIDTH).state_dict()
    save_file(
        {f"projection.{k}": v for k, v in layer.items()},
        folder / "cc_projection" / "diffusion_pytorch_model.safetensors",
    )


def broken_weights(folder):
    (folder / "image_encoder" / "model.safetensors").write_bytes(b"nothing")


def unknown_pose(folder):
    (folder / "cc_projection" / "config.json").write_text(json.dumps({"pose": "roll"}))


@pytest.mark.parametrize(
    ("change", "said"),
    (
        (no_unet, "missing: unet/config.json"),
        (no_projection, "missing: cc_projection"),
        (four_channels, "takes 4 channels"),
        (other_projection, "24 numbers of 7"),
        (broken_weights, "cannot be read"),
        (unknown_pose, "pose 'roll'"),
    ),
)
def test_what_a_folder_lacks_is_said_in_one_line(change, said, folders, tmp_path):
    folder = spoil(folders["kl"], tmp_path, change)
    with pytest.raises(UserError, match=said) as refusal:
        read_view_model(view_source(str(folder)), "cpu")
    assert "--zero123" in str(refusal.value) and "\n" not in str(refusal.value)


def test_other_layouts_of_the_projection_are_read(folders, tmp_path):
    """As the folders on the hub have it: another name, a .bin file, and no word about the pose but the model's name."""

    def rename(folder):
        from safetensors.torch import load_file

        weights = load_file(folder / "cc_projection" / "diffusion_pytorch_model.safetensors")
        (folder / "clip_camera_projection").mkdir()
        renamed = {name.replace("projection", "proj"): value for name, value in weights.items()}
        torch.save(renamed, folder / "clip_camera_projection" / "diffusion_pytorch_model.bin")
        shutil.rmtree(folder / "cc_projection")

    folder = spoil(folders["kl"], tmp_path, rename)
    expected = read_view_model(view_source(str(folders["kl"])), "cpu").projection[0].weight
    parts = read_view_model(view_source(str(folder)), "cpu")
    assert torch.equal(parts.projection[0].weight, expected) and parts.pose == "radius"
    stable = folder.rename(tmp_path / "Stable-Zero123-diffusers")
    assert read_view_model(view_source(str(stable)), "cpu").pose == "polar"


def test_a_projection_of_several_layers_to_several_tokens_is_read(tmp_path):
    layers = (
        torch.nn.Linear(WIDTH + 4, 40),
        torch.nn.SiLU(),
        torch.nn.Linear(40, 3 * WIDTH),
        torch.nn.Unflatten(-1, (3, WIDTH)),
    )
    projection = torch.nn.Sequential(*layers)
    parts = read_view_model(view_source(str(random_model(tmp_path / "deep", projection=projection))), "cpu")
    numbers = torch.randn(2, WIDTH + 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(parts.projection(numbers), projection(numbers))
    prior = Zero123.of(parts, "cpu")
    told = (
        ViewBank(parts, prior, [View(picture(), 80.0, 0.0, 3.0)])
        .condition(torch.tensor([80.0]), torch.tensor([90.0]))
        .text
    )
    assert unpack(told, 4, 8)[0].shape == (1, 3, WIDTH)
    assert torch.isfinite(prior.predict(torch.randn(1, 4, 8, 8), torch.tensor([500]), told)).all()


def test_names_that_are_no_models(monkeypatch):
    with pytest.raises(UserError, match="--zero123 no/such/folder/at all"):
        view_source("no/such/folder/at all")
    with pytest.raises(UserError, match=r"--zero123 somebody/nothing: .*convert_zero123"):
        read_view_model(view_source("somebody/nothing"), "cpu")
    monkeypatch.setattr("guidance.zero123_reference.EMBEDDED_ZERO123", EMBEDDED_ZERO123 / "gone")
    with pytest.raises(UserError, match="git checkout toybox/models"):
        view_source(None)
