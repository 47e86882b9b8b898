"""CLIP's opinion: the processor's arithmetic with a gradient, the right caption preferred, view words chosen by the camera."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from errors import UserError
from guidance.clip import EMBEDDED, LARGE, Clip, PictureOpinion, build_clip, build_picture_opinion
from guidance.several import Several
from guidance.views import WORDS, view_weights
from options import parse
from schedule import Schedule
from toybox.objects import OBJECTS
from toybox.render import compose, orbit_cameras, trace

CAPTIONS = ["a hamburger", "a chair", "a teddy", "a mushroom", "a car", "a rocket"]


@pytest.fixture(scope="module")
def clip():
    return Clip()


def render(kind, azimuth=20.0, size=80):
    """[1, size, size, 3]"""
    thing, c2w = OBJECTS[kind], orbit_cameras(75.0, azimuth, 3.2)
    layers = trace(thing, c2w, 30.0, size, c2w[:, :3, 2], torch.full((1,), 0.6))
    return compose(layers, torch.tensor(thing.default), torch.full((3,), 0.8))


def similarity(clip, image, texts):
    return clip.embed_images(image) @ clip.embed(texts).T


def test_the_right_caption_has_the_lowest_loss(clip):
    texts = clip.embed(CAPTIONS)
    for caption in CAPTIONS:
        image = torch.cat([render(caption.split()[-1], azimuth) for azimuth in (20.0, 140.0, -100.0)])
        losses = torch.stack([clip.loss(image, text[None]) for text in texts])
        assert losses.argmin() == CAPTIONS.index(caption)


def test_the_gradient_raises_the_similarity(clip):
    text = clip.embed(["a hamburger"])
    image = render("chair").requires_grad_()
    loss = clip.loss(image, text)
    loss.backward()
    assert (image.grad.abs() > 0).float().mean() > 0.9
    step = image.detach() - 0.02 * image.grad.sign()
    assert clip.loss(step, text) < loss - 0.05
    assert all(p.grad is None and not p.requires_grad for p in clip.model.parameters())


def test_the_loss_is_minus_the_mean_cosine(clip):
    image = torch.cat([render("chair"), render("teddy")])
    texts = clip.embed(["a chair", "a hamburger"])
    torch.testing.assert_close(texts.norm(dim=-1), torch.ones(2))
    seen = clip.embed_images(image)
    torch.testing.assert_close(seen.norm(dim=-1), torch.ones(2))
    expected = -((seen[0] @ texts[0]) + (seen[1] @ texts[1])) / 2
    torch.testing.assert_close(clip.loss(image, texts), expected)
    torch.testing.assert_close(clip.loss(image, texts[:1]), -(seen @ texts[0]).mean())


def test_it_is_transformers_own_clip(clip):
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(EMBEDDED, dtype=torch.float32, local_files_only=True).eval()
    image = torch.cat([render(kind, size=64) for kind in ("chair", "teddy")])
    tokens = clip.tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(**tokens, pixel_values=(image.permute(0, 3, 1, 2) - 0.5) / 0.25)
    torch.testing.assert_close(clip.embed(CAPTIONS), out.text_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(clip.embed_images(image), out.image_embeds, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", (150, 40, 64))
def test_pictures_are_prepared_as_the_processor_does(clip, size):
    """Its resizing works on bytes, and cuts off between its two passes: the two agree up to rounding, and a few levels beside edges."""
    from transformers import CLIPImageProcessorPil

    image = (255 * render("hamburger", size=size)).round() / 255
    expected = CLIPImageProcessorPil.from_pretrained(EMBEDDED)(
        (255 * image[0]).byte().numpy(), return_tensors="pt"
    ).pixel_values
    seen = []
    hook = clip.model.vision_model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    clip.embed_images(image)
    hook.remove()
    assert seen[0].shape == (1, 3, 64, 64)
    levels = 0.25 * 255 * (seen[0] - expected).abs()
    assert levels.max() < 6 and levels.mean() < 0.4


def test_every_pixel_of_a_large_picture_counts(clip):
    image = torch.rand(1, 200, 170, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    clip.loss(image, clip.embed(["a chair"])).backward()
    assert (image.grad.abs() > 0).float().mean() > 0.95


def test_mean_and_spread_come_from_the_model_s_folder_or_are_the_usual_ones(clip, tmp_path):
    assert clip.mean.flatten().tolist() == [0.5] * 3 and clip.std.flatten().tolist() == [0.25] * 3
    folder = shutil.copytree(EMBEDDED, tmp_path / "clip")
    (folder / "preprocessor_config.json").unlink()
    assert Clip(folder).mean.flatten().tolist() == pytest.approx([0.4815, 0.4578, 0.4082], abs=1e-4)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]})
    )
    assert Clip(folder).mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_each_camera_is_judged_by_its_own_words(clip):
    """The blend of the wordings follows the camera."""
    texts = tuple(f"a teddy, {words}" for words in WORDS[8])
    bank = SimpleNamespace(texts=texts, view_words=8, view_blend=True, angle_overhead=45.0, angle_front=60.0)
    opt = SimpleNamespace(hf_key=None, sd_version="embedded", clip_model=None)
    opinion = build_clip(opt, bank, "cpu")
    polar, azimuth = torch.full((2,), 75.0), torch.tensor([0.0, 180.0])
    image = torch.cat([render("teddy", 0.0), render("teddy", 180.0)])
    assert (opinion(image, polar, azimuth) - opinion(image, polar, azimuth.flip(0))).abs() > 1e-3
    weights = view_weights(polar, azimuth, 8, True, 45.0, 60.0)
    text = weights @ clip.embed(list(texts))
    text = text / text.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(opinion(image, polar, azimuth), clip.loss(image, text))
    torch.testing.assert_close(clip.text_for(weights, opinion.features), text)


@pytest.mark.parametrize(
    ("values", "wanted"),
    (
        ({}, EMBEDDED),
        ({"sd_version": "1.5"}, LARGE),
        ({"hf_key": "someone/something"}, LARGE),
        ({"clip_model": "someone/clip", "sd_version": "1.5"}, "someone/clip"),
    ),
)
def test_which_model_is_asked(values, wanted, monkeypatch):
    opt = SimpleNamespace(**({"hf_key": None, "sd_version": "embedded", "clip_model": None} | values))
    asked = []
    monkeypatch.setattr(Clip, "__init__", lambda self, model, *rest: asked.append(model))
    monkeypatch.setattr(Clip, "embed", lambda self, texts: torch.zeros(1, 4))
    build_clip(opt, SimpleNamespace(texts=("a",)), "cpu")
    assert asked == [wanted]


def test_what_cannot_be_read_or_understood_is_said(clip, tmp_path, capsys):
    with pytest.raises(UserError, match='--text: the embedded model does not know "zebra"'):
        clip.embed(["a zebra"])
    clip.embed(["a red " * 10 + "chair"])
    assert "CLIP reads 14 tokens" in capsys.readouterr().err
    clip.embed(["a red chair, overhead front right view"])
    assert not capsys.readouterr().err
    assert clip.excess("a red chair") == 5 - 14
    with pytest.raises(UserError, match="--clip_model nowhere: nowhere: no such folder, and not a hub id"):
        Clip("nowhere")
    with pytest.raises(UserError, match="--clip_model no/such: no/such cannot be read as a CLIPModel: .*connect once"):
        Clip("no/such")
    half = shutil.copytree(EMBEDDED, tmp_path / "clip")
    (half / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be read as a CLIPModel"):
        Clip(half)


def test_a_network_that_lacks_weights_is_refused(tmp_path):
    """A part that is not there would be random, and nobody would know."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(EMBEDDED, tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    weights.pop("visual_projection.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="is not a CLIPModel: it has no weights visual_projection.weight"):
        Clip(folder)


# -- photographs -------------------------------------------------------------------------------------------------------------


def known(kind, azimuth):
    """A known picture of an object, as a prior is shown it."""
    return SimpleNamespace(picture=render(kind, azimuth)[0].permute(2, 0, 1), azimuth=azimuth)


def test_a_view_is_compared_with_the_nearest_picture_and_counts_less_the_farther_it_is(clip):
    """L = -lambda mean_b (1 - |a_b - a| / 180) <f_b, f>."""
    opinion = PictureOpinion(clip, [known("teddy", 0.0).picture, known("teddy", 170.0).picture], [0.0, 170.0], 10.0)
    azimuth = torch.tensor([0.0, 45.0, -100.0, 180.0, -170.0])
    place, share = opinion.nearest(azimuth)
    assert place.tolist() == [0, 0, 1, 1, 1]  # -100 is 90 degrees from 170
    torch.testing.assert_close(share, 1 - torch.tensor([0.0, 45.0, 90.0, 10.0, 20.0]) / 180)
    image = torch.cat([render("chair", float(a)) for a in azimuth])
    loss, log = opinion(image, torch.full((5,), 75.0), azimuth, 0)
    pictures = torch.cat([render("teddy", 0.0), render("teddy", 170.0)])
    cosines = (clip.embed_images(image) * clip.embed_images(pictures)[place]).sum(-1)
    torch.testing.assert_close(loss, -10 * (share * cosines).mean())
    torch.testing.assert_close(log["clip"], loss / 10)


def test_it_pulls_a_view_towards_the_object_of_the_picture(clip):
    opinion = PictureOpinion(clip, [known("hamburger", 0.0).picture], [0.0], 1.0)
    where = torch.full((1,), 75.0), torch.zeros(1)
    losses = {kind: float(opinion(render(kind, 0.0), *where, 0)[0]) for kind in ("hamburger", "chair", "rocket")}
    assert losses["hamburger"] == pytest.approx(-1, abs=0.02) and min(losses, key=losses.get) == "hamburger"
    image = render("chair", 0.0).requires_grad_()
    loss = opinion(image, *where, 0)[0]
    loss.backward()
    assert opinion(image.detach() - 0.02 * image.grad.sign(), *where, 0)[0] < loss - 0.05
    behind = render("chair", 180.0).requires_grad_()
    opinion(behind, where[0], torch.full((1,), 180.0), 0)[0].backward()
    assert behind.grad.abs().max() < 1e-6  # the picture says nothing about what is behind


def test_it_is_a_guidance_among_others(clip):
    """Weights by step, nothing to say of latents, nothing to save; what it shows is the view beside its picture."""
    opinion = PictureOpinion(clip, [known("teddy", 0.0).picture], [0.0], Schedule([0, 0, 1, 10]))
    image, where = render("chair", 0.0), (torch.full((1,), 75.0), torch.zeros(1))
    assert opinion(image, *where, 0)[0] == 0 and opinion(image, *where, 10, unit_range=True, hints={})[0] < 0
    assert opinion(torch.rand(1, 8, 8, 4), *where, 10, as_latent=True) == (0, {})
    opinion.follow(SimpleNamespace(lambda_clip=0.0))
    assert opinion(image, *where, 10)[0] == 0
    both = Several({"one": opinion, "picture": opinion})
    assert both.wants == () and both.state() == {"one": {}, "picture": {}}
    both.load_state(both.state())
    shown = both.debug_images(image, *where, 0)
    assert shown.shape == (2, 64, 128, 3)
    torch.testing.assert_close(shown[0, 32, 64:], opinion._sized(render("teddy", 0.0), 64)[0, 32])
    with pytest.raises(ValueError, match="no picture"):
        PictureOpinion(clip, [], [], 1.0)


def test_photographs_and_lambda_clip_bring_it(options, tmp_path, monkeypatch):
    """One reading of the CLIP for prompt and picture; without a prompt it is there as well; without --lambda_clip it is not."""
    from PIL import Image

    from main import build_guidances
    from nerf.photos import load_references

    layers = torch.cat([render("teddy", 0.0, 64)[0], torch.ones(64, 64, 1)], -1)
    layers[:8, :, 3] = 0
    Image.fromarray((255 * layers).byte().numpy()).save(tmp_path / "x_rgba.png")
    typed = ("--image", tmp_path / "x_rgba.png", "--text", "a teddy", "--lambda_zero123", 0)
    opt = options(*typed, "--lambda_clip", 10)
    both = build_guidances(opt, "cpu", load_references(opt))
    assert list(both.parts) == ["text", "picture"] and both.parts["picture"].clip is both.parts["text"].clip.clip
    assert both.parts["picture"].azimuths.tolist() == [0] and len(both.parts["picture"].pictures) == 1
    image, where = torch.rand(1, 16, 16, 3), (torch.full((1,), 75.0), torch.zeros(1))
    loss, log = both(image, *where, 0)
    assert torch.isfinite(loss) and {"grad_norm", "clip", "picture_clip"} <= {*log}
    assert not hasattr(build_guidances(options(*typed), "cpu", load_references(opt)), "parts")
    alone = parse(["--image", str(typed[1]), "--lambda_zero123", "0", "--lambda_clip", "10", "--device", "cpu"])
    assert isinstance(build_guidances(alone, "cpu", load_references(alone)), PictureOpinion)


@pytest.mark.parametrize(
    ("values", "wanted"), [({}, EMBEDDED), ({"zero123": "a/b"}, LARGE), ({"clip_model": "c/d"}, "c/d")]
)
def test_which_model_compares_pictures_without_a_prompt(values, wanted, monkeypatch):
    asked = []
    monkeypatch.setattr(Clip, "__init__", lambda self, model, *rest: asked.append(model))
    monkeypatch.setattr(PictureOpinion, "__init__", lambda self, *rest: None)
    build_picture_opinion(
        SimpleNamespace(**{"zero123": None, "clip_model": None, "lambda_clip": 1} | values), [], "cpu"
    )
    assert asked == [wanted]
