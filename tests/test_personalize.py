"""DreamBooth: the loss, the files it leaves, that they load in diffusers and that a stopped run ends the same."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_models import Folders

from dreambooth import class_pictures, find_pictures, read_pictures
from errors import UserError
from guidance.adapters import WEIGHTS, record_of
from guidance.draw import draw
from guidance.lora import from_epsilon
from guidance.personalize import CHECKPOINT, Examples, Recipe, personalize, posterior, weighted_loss
from guidance.priors import load_prior, text_encoder
from guidance.weights import resolve

SHORT = Recipe(
    max_train_steps=4,
    snapshots={"partial": 2, "full": 4},
    learning_rate=1e-2,
    rank=2,
    train_batch_size=2,
    checkpointing_steps=1,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return Folders(tmp_path_factory.mktemp("models"))


def source(folder, lora=None):
    return resolve(SimpleNamespace(hf_key=str(folder), IF=False, lora=lora))


def model(folder):
    return load_prior(source(folder), "cpu"), text_encoder(source(folder), "cpu")


def pictures(count=3, size=32, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def learn(folder, out, recipe=SHORT, of_class=True, **more):
    prior, encoder = model(folder)
    instance = Examples(pictures(), ["a red chair"] * 3)
    others = Examples(pictures(4, seed=1), ["a chair, front view", "a chair, back view"] * 2) if of_class else None
    return personalize(prior, encoder, encoder.embed, instance, others, recipe, out, **more)


def refused(act, *arguments, **named):
    with pytest.raises(UserError) as caught:
        act(*arguments, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- what is learnt ----------------------------------------------------------------------------------------------------


def test_the_loss_of_photographs_and_of_class_pictures():
    output, wanted = torch.zeros(4, 1, 2, 2), torch.zeros(4, 1, 2, 2)
    output[0], output[1], output[3] = 1, 3, 2
    weights = torch.tensor([0.5, 0.5, 0.25, 0.25])  # two photographs, two class pictures at a weight of 0.5
    assert weighted_loss(output, wanted, weights).item() == pytest.approx((1 + 9) / 2 + 0.5 * (0 + 4) / 2)


@pytest.mark.parametrize("kind", ["eps-kl", "v-tiny"])
def test_what_is_learnt_from_is_what_the_network_should_answer(kind, folders, tmp_path):
    from guidance.personalize import _Batches

    prior, encoder = model(folders[kind])
    student = SimpleNamespace(texts=lambda texts: list(texts))
    recipe = Recipe(train_batch_size=3, prior_loss_weight=0.5)
    instance, of_class = Examples(pictures(1), ["a chair"]), Examples(pictures(1, seed=1), ["a hamburger"])
    noisy, t, texts, wanted, weights = _Batches(prior, student, instance, of_class, recipe).draw()
    assert texts == ["a chair"] * 3 + ["a hamburger"] * 3
    torch.testing.assert_close(weights, torch.tensor([1 / 3] * 3 + [1 / 6] * 3))
    signal, sigma = (table[t][:, None, None, None] for table in (prior.signal, prior.sigma))
    clean = torch.cat([posterior(prior, each.pictures)[0].expand(3, -1, -1, -1) for each in (instance, of_class)])
    if kind == "v-tiny":  # no posterior: the latents are known exactly
        noise = (noisy - signal * clean) / sigma
        torch.testing.assert_close(
            wanted, from_epsilon(noise, clean, signal, sigma, "v_prediction"), rtol=1e-3, atol=1e-3
        )
    else:
        drawn = (noisy - sigma * wanted) / signal
        spread = posterior(prior, instance.pictures)[1].mean()
        assert 0.2 * spread < (drawn - clean).std() < 5 * spread


def test_the_cached_posterior_is_the_encoder_s(folders):
    prior, _ = model(folders["eps-kl"])
    mean, spread = posterior(prior, pictures())
    draws = torch.stack([prior.encode(pictures(), torch.Generator().manual_seed(seed)) for seed in range(200)])
    torch.testing.assert_close(draws.mean(0), mean, atol=0.4 * spread.max().item(), rtol=0)
    torch.testing.assert_close(draws.std(0), spread, atol=0.3 * spread.max().item(), rtol=0)


def test_it_learns_the_subject_and_the_weight_of_the_class_counts(folders, tmp_path):
    base = folders["v-tiny"]
    prior, encoder = model(base)
    mean, _ = posterior(prior, pictures())
    t, told = torch.tensor([300] * 3), encoder.embed(["a red chair"] * 3)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))
    noisy = prior.signal[300] * mean + prior.sigma[300] * noise

    def error(lora):
        its = load_prior(source(base, lora), "cpu")
        return (its.predict(noisy, t, told) - noise).square().mean().item()

    longer = Recipe(**{**vars(SHORT), "max_train_steps": 40, "snapshots": {"partial": 5, "full": 40}})
    done = learn(base, tmp_path / "a", longer)
    assert error(done["full"]) < error(done["partial"]) < error(None)
    heavy = Recipe(**{**vars(SHORT), "prior_loss_weight": 9.0})
    assert differ(learn(base, tmp_path / "b"), learn(base, tmp_path / "c", heavy))
    assert differ(learn(base, tmp_path / "d", of_class=False), learn(base, tmp_path / "b"))


def differ(one, other, name="full"):
    first, second = (load_file(done[name] / WEIGHTS) for done in (one, other))
    assert first.keys() == second.keys()
    return any(not torch.equal(first[key], second[key]) for key in first)


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "text"), [("eps-kl", False), ("v-tiny", True)])
def test_a_plain_diffusers_pipeline_loads_it(kind, text, folders, tmp_path):
    from diffusers import StableDiffusionPipeline

    recipe = Recipe(**{**vars(SHORT), "train_text_encoder": text, "lora_alpha": 3.0})
    done = learn(folders[kind], tmp_path / "out", recipe, words={"sks": "x"})
    assert list(done) == ["partial", "full"] and differ({"full": done["partial"]}, done)
    assert record_of(done["full"] / WEIGHTS, "")["words"] == {"sks": "x"}
    pipe = StableDiffusionPipeline.from_pretrained(folders[kind], safety_checker=None)
    noisy, t = torch.randn(1, 4, 8, 8), torch.tensor([300])
    ids = pipe.tokenizer(["a red chair"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        before = pipe.unet(noisy, t, pipe.text_encoder(ids)[0]).sample
        pipe.load_lora_weights(done["full"])
        told = pipe.text_encoder(ids)[0]
        after = pipe.unet(noisy, t, told).sample
    assert (after - before).abs().max() > 1e-3
    its = source(folders[kind], done["full"])
    ours = load_prior(its, "cpu")
    torch.testing.assert_close(text_encoder(its, "cpu").embed(["a red chair"]), told)
    torch.testing.assert_close(ours.denoise(noisy, t, told, {}), after)


def test_the_whole_denoiser(folders, tmp_path):
    recipe = Recipe(**{**vars(SHORT), "full": True, "learning_rate": 1e-3})
    done = learn(folders["eps-kl"], tmp_path / "out", recipe)
    plain, trained = (load_prior(source(folder), "cpu").denoiser for folder in (folders["eps-kl"], done["full"]))
    assert any(not torch.equal(a, b) for a, b in zip(plain.parameters(), trained.parameters(), strict=True))
    stamp = (done["full"] / "somnium.json").stat().st_mtime_ns
    learn(folders["eps-kl"], tmp_path / "out", recipe)
    assert (done["full"] / "somnium.json").stat().st_mtime_ns == stamp


def test_going_on_from_an_adapter(folders, tmp_path):
    done = learn(folders["eps-kl"], tmp_path / "a")
    still = Recipe(**{**vars(SHORT), "learning_rate": 1e-12, "adam_weight_decay": 0.0})
    again = learn(folders["eps-kl"], tmp_path / "b", still, start=done["full"])
    first, second = (load_file(which["full"] / WEIGHTS) for which in (done, again))
    for name in first:
        torch.testing.assert_close(first[name], second[name])
    other = Recipe(**{**vars(SHORT), "rank": 3})
    assert "of another rank" in refused(learn, folders["eps-kl"], tmp_path / "c", other, start=done["full"])


def test_what_is_complete_is_not_done_again_and_other_settings_are_refused(folders, tmp_path, monkeypatch):
    from guidance import personalize as module

    out = tmp_path / "out"
    done = learn(folders["eps-kl"], out)
    assert not (out / CHECKPOINT).exists()
    monkeypatch.setattr(module._Student, "step", None)
    assert learn(folders["eps-kl"], out) == done  # nothing was learnt
    other = Recipe(**{**vars(SHORT), "seed": 7})
    assert "--ckpt scratch" in refused(learn, folders["eps-kl"], out, other)


class Stop(Exception):
    pass


@pytest.mark.parametrize("text", [False, True])
def test_a_stopped_run_ends_the_same_bit_for_bit(text, folders, tmp_path, monkeypatch):
    from guidance import personalize as module

    recipe = Recipe(
        **{
            **vars(SHORT),
            "lr_scheduler": "cosine",
            "checkpointing_steps": 1,
            "train_text_encoder": text,
            "gradient_accumulation_steps": 2,
        }
    )
    straight = learn(folders["eps-kl"], tmp_path / "straight", recipe)
    step, calls = module._Student.step, []

    def stops(self, batches):
        calls.append(1)
        if len(calls) == 4:
            raise Stop
        return step(self, batches)

    monkeypatch.setattr(module._Student, "step", stops)
    with pytest.raises(Stop):
        learn(folders["eps-kl"], tmp_path / "stopped", recipe)
    other = Recipe(**{**vars(recipe), "learning_rate": 2e-2})
    assert "other pictures, texts or settings" in refused(learn, folders["eps-kl"], tmp_path / "stopped", other)
    again = learn(folders["eps-kl"], tmp_path / "stopped", recipe)
    assert len(calls) == 5  # three steps were kept
    assert not differ(straight, again) and not differ(straight, again, "partial")


def test_a_broken_checkpoint_begins_anew(folders, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / CHECKPOINT).write_bytes(b"half a file")
    done = learn(folders["eps-kl"], tmp_path / "out")
    assert "a broken checkpoint" in capsys.readouterr().err
    assert not differ(done, learn(folders["eps-kl"], tmp_path / "straight"))


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_the_pictures_of_a_folder(tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, :20], wide[:, 20:40], wide[:, 40:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(np.concatenate([wide[:10], wide[:10] * 0 + 9])).save(photos / "b.jpg", exif=exif, quality=95)
    clear = np.zeros((20, 20, 4), np.uint8)
    clear[5:15, 5:15] = 255, 0, 0, 255
    Image.fromarray(clear).save(photos / "a.PNG")
    (photos / "notes.txt").write_text("no picture")
    (photos / ".hidden.png").write_text("no picture")
    paths = find_pictures(photos, "--instance_data_dir")
    assert [path.name for path in paths] == [
        "a.PNG",
        "b.jpg",
    ] and "2 pictures; with fewer than 3" in capsys.readouterr().err
    first, second = read_pictures(paths, "--instance_data_dir", 20)
    assert (first[:, 0, 0] == 1).all() and first[0, 10, 10] == 1 and first[1, 10, 10] < 0.01
    assert second[1, 15, 10] > 0.9 and second[:, 4, 10].max() < 0.1  # the middle square, turned


def test_class_pictures_are_drawn_once_and_the_same_after_a_stop(folders, tmp_path):
    prior, encoder = model(folders["eps-kl"])
    wanted = {"prompt": "a chair", "count": 10, "views": ("front view", "back view"), "steps": 2, "scale": 2.0}
    rows, texts = class_pictures(prior, encoder.embed, tmp_path / "class", **wanted)
    assert texts[:3] == ["a chair, front view", "a chair, back view", "a chair, front view"] and len(rows) == 10
    files = sorted((tmp_path / "class").iterdir())
    assert [file.name for file in files[:2]] == ["0000_front_view.png", "0001_back_view.png"]
    before = {file.name: file.read_bytes() for file in files}
    for file in (files[3], files[9]):
        file.unlink()
    again, _ = class_pictures(prior, encoder.embed, tmp_path / "class", **wanted)
    assert {file.name: file.read_bytes() for file in files} == before and torch.equal(rows, again)
    Image.new("RGB", (40, 40), "red").save(tmp_path / "class" / "mine.png")
    rows, texts = class_pictures(prior, encoder.embed, tmp_path / "class", **wanted)
    assert texts[0] == "a chair" and len(rows) == 10 and rows[0, 0].min() > 0.99


def test_drawing_is_ddim_and_begins_with_a_picture(folders):
    from ddim import ddim

    prior, encoder = model(folders["eps-tiny"])
    told, base = encoder.embed(["a red chair"]), encoder.embed([""])
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = draw(prior, told, base, 20, 3.0, noise=z)

    def guided(latents, t):
        away, towards = prior.ask(latents, t, [base, told])
        return away + 3.0 * (towards - away)

    reference = prior.decode(ddim(prior, z, 20, guided))
    assert (plain - reference).abs().mean() < 0.1 * reference.std()  # other timesteps, the same way
    start = prior.decode(torch.zeros(1, 4, 8, 8))
    near, far = (
        (draw(prior, told, base, 20, 3.0, noise=z, start=start, strength=s) - start).abs().mean() for s in (0.05, 1.0)
    )
    assert near < 0.5 * far
