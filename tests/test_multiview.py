"""The multi-view prior: the views of a group see each other and nobody else, each through its camera; MVDream's own layout is read."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from ddim import ddim, noise
from tiny_models import build_folder

from errors import UserError
from guidance.multiview import MultiView, camera_numbers, is_multiview
from guidance.text import ClipText
from guidance.weights import Source, quiet
from nerf.provider import orbit

WIDTH, WORDS_WIDTH = 32, 16


def source(folder):
    return Source(str(folder), True, folder.name, f"--hf_key {folder}")


def build_unet(**values):
    """A random denoiser that is told cameras, in which attention matters."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(4)
    unet = UNet2DConditionModel(**{
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (WIDTH, 2 * WIDTH),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": WORDS_WIDTH, "attention_head_dim": (2, 4), "use_linear_projection": True,
        "class_embed_type": "projection", "projection_class_embeddings_input_dim": 16,
    } | values)  # fmt: skip
    for name, weight in unet.named_parameters():
        if ".attn1." in name:
            weight.data.mul_(4)
    return unet


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from diffusers import StableDiffusionPipeline

    root = tmp_path_factory.mktemp("models")
    plain = build_folder(root / "plain", "eps-kl")
    pipe = StableDiffusionPipeline.from_pretrained(plain, unet=None, safety_checker=None)
    pipe.register_modules(unet=build_unet())
    with quiet():
        pipe.save_pretrained(root / "views")
    return root / "views"


@pytest.fixture
def prior(folder):
    return MultiView.load(source(folder), "cpu", views=3)


@pytest.fixture(scope="module")
def question(folder):
    """Two groups of three views: noisy latents, timesteps, prompts, hints."""
    text = ClipText(source(folder), "cpu").embed(["a red chair", "blue teddy"])
    cameras = orbit(torch.tensor([70.0] * 3 + [50.0] * 3), torch.tensor([0.0, 120, 240, 10, 130, 250]), 2.5, 40.0, 8, 8)
    return noise(0, 6, 4, 8, 8), torch.tensor([700] * 3 + [200] * 3), text.repeat_interleave(3, 0), {"c2w": cameras.c2w}


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


def test_the_order_of_the_views_does_not_matter(prior, question):
    noisy, t, text, hints = question
    expected = prior.predict(noisy, t, text, hints)
    order = torch.tensor([2, 0, 1, 3, 5, 4])
    found = prior.predict(noisy[order], t, text, {"c2w": hints["c2w"][order]})
    close(found, expected[order])
    assert (expected[0] - expected[1]).abs().max() > 0.01


def test_a_view_is_seen_by_its_group_alone(prior, question):
    noisy, t, text, hints = question
    expected = prior.predict(noisy, t, text, hints)
    other = noisy.clone()
    other[1] = noise(9, 4, 8, 8)
    change = (prior.predict(other, t, text, hints) - expected).flatten(1).abs().amax(1)
    assert (change[:3] > 1e-3).all() and (change[3:] < 1e-5).all()


def test_one_view_a_group_is_the_network_as_it_is(folder, question):
    noisy, t, text, hints = question
    one, six = (MultiView.load(source(folder), "cpu", views=views) for views in (1, 6))
    unet = MultiView.load(source(folder), "cpu", views=1).denoiser
    with torch.no_grad():
        expected = unet(noisy, t, text, class_labels=camera_numbers(hints["c2w"])).sample
    close(one.predict(noisy, t, text, hints), expected)
    assert (six.predict(noisy, t, text, hints) - expected).abs().max() > 1e-2


def test_self_attention_runs_over_all_pixels_of_a_group(prior, question):
    """Against attention written out: softmax(q k / sqrt(d)) v over the pixels of three views."""
    attention = prior.denoiser.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    hidden = noise(1, 6, 10, WIDTH)
    with torch.no_grad():
        found = attention(hidden)
        joined = hidden.reshape(2, 30, WIDTH)
        q, k, v = (
            project(joined).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for project in (attention.to_q, attention.to_k, attention.to_v)
        )
        mixed = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        expected = attention.to_out[0](mixed.transpose(1, 2).flatten(2)).reshape(6, 10, WIDTH)
    close(found, expected)


def test_another_attention_processor_keeps_the_views_together(prior, question):
    noisy, t, text, hints = question
    expected = prior.predict(noisy, t, text, hints)
    prior.denoiser.set_attention_slice("max")
    close(prior.predict(noisy, t, text, hints), expected)


def test_cross_attention_is_each_view_s_own(prior, question):
    """Prompts follow the camera: a view's words reach the others only through what it draws."""
    attention = prior.denoiser.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    hidden, words = noise(1, 6, 10, WIDTH), noise(2, 6, 5, WORDS_WIDTH)
    with torch.no_grad():
        together = attention(hidden, words)
        close(together[4:5], attention(hidden[4:5], words[4:5]))


@pytest.mark.parametrize(("most", "calls"), ((0, [6]), (1, [3, 3]), (3, [3, 3]), (5, [3, 3]), (6, [6]), (100, [6])))
def test_smaller_calls_keep_groups_whole(most, calls, prior, question):
    expected = prior.predict(*question)
    prior.max_batch, seen = most, []
    prior.denoiser.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    close(prior.predict(*question), expected)
    assert seen == calls


def test_wordings_are_groups_of_their_own(prior, question):
    noisy, t, text, hints = question
    wordings = [text, text.flip(0)]
    expected = [prior.predict(noisy, t, wording, hints) for wording in wordings]
    close(torch.stack(prior.ask(noisy, t, wordings, hints)), torch.stack(expected))


def test_cameras_matter(prior, question):
    noisy, t, text, hints = question
    expected = prior.predict(noisy, t, text, hints)
    turned = orbit(torch.tensor([70.0] * 6), torch.tensor([90.0, 210, 330, 10, 130, 250]), 2.5, 40.0, 8, 8).c2w
    assert (prior.predict(noisy, t, text, {"c2w": turned}) - expected)[:3].abs().max() > 1e-3
    farther = hints["c2w"].clone()
    farther[:, :3, 3] *= 1.7
    close(prior.predict(noisy, t, text, {"c2w": farther}), expected)


def test_cameras_are_told_as_mvdream_was_told_them():
    """Its world: z up, the object's front towards +x; its camera: OpenGL's axes, looking at the origin from distance 1."""
    polar, azimuth = torch.tensor([90.0, 75.0, 60.0, 90.0]), torch.tensor([0.0, 90.0, -130.0, 180.0])
    ours = orbit(polar, azimuth, torch.tensor([1.0, 2.0, 3.0, 4.0]), 40.0, 8, 8).c2w
    elevation, a = torch.deg2rad(90 - polar), torch.deg2rad(azimuth)
    place = torch.stack([elevation.cos() * a.cos(), elevation.cos() * a.sin(), elevation.sin()], -1)
    forward, up = -place, torch.tensor([0.0, 0.0, 1.0]).expand(4, 3)
    right = torch.nn.functional.normalize(torch.linalg.cross(forward, up), dim=-1)
    expected = torch.eye(4).repeat(4, 1, 1)
    expected[:, :3] = torch.stack([right, torch.linalg.cross(right, forward), -forward, place], -1)
    found = camera_numbers(ours)
    torch.testing.assert_close(found, expected.flatten(1), rtol=0, atol=1e-6)
    assert ours[1, :3, 3].norm().item() == pytest.approx(2.0)  # what was given is not changed
    assert found[0].tolist() == pytest.approx([0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1], abs=1e-6)


def test_ddim_over_our_prior_draws_the_reference_s_picture(folder, question):
    """No pipeline of diffusers calls such a model: a loop over its scheduler and the bare network, its attention joined by a processor
    of the usual kind, stands for one."""
    from diffusers import DDIMScheduler, UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor2_0

    class Joined(AttnProcessor2_0):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, **rest):
            if encoder_hidden_states is not None:
                return super().__call__(attn, hidden_states, encoder_hidden_states, **rest)
            batch, length, width = hidden_states.shape
            joined = super().__call__(attn, hidden_states.reshape(batch // 3, 3 * length, width), None, **rest)
            return joined.reshape(batch, length, width)

    unet, scheduler = (
        cls.from_pretrained(folder / part)
        for cls, part in ((UNet2DConditionModel, "unet"), (DDIMScheduler, "scheduler"))
    )
    unet.set_attn_processor(Joined())
    _, _, text, hints = question
    text, negative, c2w = text[:3], text[3:], hints["c2w"][:3]
    camera = camera_numbers(c2w)
    scheduler.set_timesteps(8)
    latents = noise(3, 3, 4, 8, 8)
    with torch.no_grad():
        for t in scheduler.timesteps:
            eps = unet(
                latents.repeat(2, 1, 1, 1), t, torch.cat([negative, text]), class_labels=camera.repeat(2, 1)
            ).sample
            base, told = eps.chunk(2)
            latents = scheduler.step(base + 5.0 * (told - base), t, latents).prev_sample

    prior = MultiView.load(source(folder), "cpu", views=3)

    def guided(z, t):
        told, base = prior.ask(z, t, [text, negative], {"c2w": c2w})
        return base + 5.0 * (told - base)

    drawn = ddim(prior, noise(3, 3, 4, 8, 8), 8, guided)
    assert (prior.decode(drawn) - prior.decode(latents)).abs().max() < 2e-4
    assert (drawn - latents).abs().max() < 2e-4 * latents.abs().max()


# -- loading -----------------------------------------------------------------------------------------------------------


def test_the_views_of_a_group_come_from_the_call_the_config_or_mvdream(folder, tmp_path):
    assert MultiView.load(source(folder), "cpu").view_group == 4
    named = shutil.copytree(folder, tmp_path / "named")
    config = json.loads((named / "unet" / "config.json").read_text())
    (named / "unet" / "config.json").write_text(json.dumps(config | {"view_group": 6}))
    assert MultiView.load(source(named), "cpu").view_group == 6
    assert MultiView.load(source(named), "cpu", views=2).view_group == 2


def test_what_does_not_fit_is_said(prior, folder, question):
    noisy, t, text, hints = question
    with pytest.raises(ValueError, match="the hints lack c2w"):
        prior.predict(noisy, t, text, {})
    with pytest.raises(ValueError, match="5 samples are no whole groups of 3 views"):
        prior.predict(noisy[:5], t[:5], text[:5], {"c2w": hints["c2w"][:5]})
    plain = folder.parent / "plain"
    with pytest.raises(UserError, match="plain: not a multi-view model: its denoiser is not told the 16 numbers"):
        MultiView.load(source(plain), "cpu")
    assert is_multiview(folder) and not is_multiview(plain) and not is_multiview(folder / "nothing")


def ldm_name(name: str) -> str:
    """A weight's name in the original code's denoiser (two levels, attention on the first, one block a level)."""
    for ours, theirs in (
        ("time_embedding.linear_1", "time_embed.0"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("class_embedding.linear_1", "camera_embed.0"),
        ("class_embedding.linear_2", "camera_embed.2"),
        ("conv_in", "input_blocks.0.0"),
        ("conv_norm_out", "out.0"),
        ("conv_out", "out.2"),
        ("down_blocks.0.resnets.0", "input_blocks.1.0"),
        ("down_blocks.0.attentions.0", "input_blocks.1.1"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.2.0.op"),
        ("down_blocks.1.resnets.0", "input_blocks.3.0"),
        ("mid_block.resnets.0", "middle_block.0"),
        ("mid_block.attentions.0", "middle_block.1"),
        ("mid_block.resnets.1", "middle_block.2"),
        ("up_blocks.0.resnets.0", "output_blocks.0.0"),
        ("up_blocks.0.resnets.1", "output_blocks.1.0"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.1.1.conv"),
        ("up_blocks.1.resnets.0", "output_blocks.2.0"),
        ("up_blocks.1.attentions.0", "output_blocks.2.1"),
        ("up_blocks.1.resnets.1", "output_blocks.3.0"),
        ("up_blocks.1.attentions.1", "output_blocks.3.1"),
        (".norm1", ".in_layers.0"),
        (".conv1", ".in_layers.2"),
        (".time_emb_proj", ".emb_layers.1"),
        (".norm2", ".out_layers.0"),
        (".conv2", ".out_layers.3"),
        (".conv_shortcut", ".skip_connection"),
    ):
        if ours[0] != ".":
            name = theirs + name.removeprefix(ours) if name.startswith(f"{ours}.") else name
        elif ".transformer_blocks." not in name:
            name = name.replace(ours, theirs)
    return name


@pytest.fixture(scope="module")
def mvdream(folder, tmp_path_factory):
    """The same model in the layout in which MVDream was published."""
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("mvdream")
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        (root / part).symlink_to(folder / part)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {
        "_class_name": "MVDreamPipeline",
        "unet": ["mv_unet", "MultiViewUNetModel"],
        "image_encoder": [None, None],
    }
    (root / "model_index.json").write_text(json.dumps(index))
    (root / "unet").mkdir()
    write_config(root)
    weights = {ldm_name(name): weight.contiguous() for name, weight in build_unet().state_dict().items()}
    assert len(weights) == len(build_unet().state_dict())
    save_file(weights, root / "unet" / "diffusion_pytorch_model.safetensors")
    return root


def write_config(root: Path, **values) -> None:
    config = {
        "_class_name": "MultiViewUNetModel", "attention_resolutions": [1], "camera_dim": 16, "channel_mult": [1, 2], "context_dim": WORDS_WIDTH,
        "image_size": 8, "in_channels": 4, "model_channels": WIDTH, "num_head_channels": 16, "num_res_blocks": 1, "out_channels": 4,
        "transformer_depth": 1,
    }  # fmt: skip
    (root / "unet" / "config.json").write_text(json.dumps(config | values))


def test_mvdream_s_own_weights_are_read(mvdream, folder, question):
    assert is_multiview(mvdream)
    ours, theirs = (MultiView.load(source(place), "cpu", views=3) for place in (folder, mvdream))
    expected, found = (prior.denoiser.state_dict() for prior in (ours, theirs))
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    close(theirs.predict(*question), ours.predict(*question))
    assert not theirs.denoiser.training and not any(p.requires_grad for p in theirs.denoiser.parameters())
    text = ClipText(source(mvdream), "cpu").embed(["a red chair"])
    torch.testing.assert_close(text, question[2][:1])
    half = MultiView.load(source(mvdream), "cpu", torch.bfloat16)
    assert {p.dtype for p in half.denoiser.parameters()} == {torch.bfloat16}


def test_what_is_not_mvdream_is_refused(mvdream, tmp_path):
    other = shutil.copytree(mvdream, tmp_path / "other")
    for values, words in (
        ({"ip_dim": 16}, "is ImageDream, which is told a picture as well"),
        ({"num_res_blocks": 2}, "cannot be read as MVDream's denoiser"),
        ({"camera_dim": 12}, "cannot be read as MVDream's denoiser"),
    ):
        write_config(other, **values)
        with pytest.raises(UserError, match=words):
            MultiView.load(source(other), "cpu")
    write_config(other)
    next((other / "unet").glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match="has no weights"):
        MultiView.load(source(other), "cpu")
