"""CLIP's opinion: the processor's arithmetic with a gradient, the right caption preferred, view words chosen by the camera."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from errors import UserError
from guidance.clip import EMBEDDED, LARGE, Clip, build_clip
from guidance.views import WORDS, view_weights
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
