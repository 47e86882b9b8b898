"""The personalisation from its options to its files: which photographs, which words, which model, and what came of it."""

import re
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from errors import UserError, say
from files import claimed
from guidance.adapters import activate, add_to_denoiser, read
from guidance.draw import class_pictures, draw, find_pictures, likeliest, read_pictures
from guidance.embeddings import CachedEncoder
from guidance.personalize import CHECKPOINT, KINDS, WEIGHTS, Examples, Recipe, personalize
from guidance.priors import load_prior, text_encoder
from guidance.prompt import with_view
from guidance.views import WORDS
from guidance.weights import EMBEDDED, Source, check_vocabulary, kind_of, known_words, resolve

SPARE = "xzqvjk"  # one-letter words of the embedded model's tokenizer that none of its captions used
SHOWN = ("front view", "left side view", "back view", "right side view")
SHEET = "samples.png"
_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def run(opt: Any) -> dict[str, Path]:
    """Personalises the model that `opt` names -> snapshot name -> its folder in `opt.output_dir`.

    opt: what scripts/train_dreambooth.py knows, by name. Raises UserError for whatever a user can get wrong, before anything slow.
    """
    source = find_model(opt)
    device = torch.device("cuda" if opt.device != "cpu" and torch.cuda.is_available() else "cpu")
    if opt.device == "cuda" and device.type != "cuda":
        raise UserError("--device cuda: there is no GPU; leave the flag out")
    recipe, dtype = recipe_of(opt), precision_of(opt, device)
    prompt, words = taught(source, opt.instance_prompt, opt.class_prompt)
    folder = Path(opt.output_dir).expanduser()
    with claimed(folder):
        if opt.ckpt == "scratch":
            forget(folder, recipe)
        paths = find_pictures(Path(opt.instance_data_dir), "--instance_data_dir")
        prior = load_prior(source, device, dtype)
        size = opt.resolution or prior.image_size
        if size % (prior.image_size // prior.latent_size):
            raise UserError(f"--resolution {size}: must be a multiple of {prior.image_size // prior.latent_size}")
        pictures = read_pictures(paths, "--instance_data_dir", size)
        encoder = text_encoder(source, device, dtype)
        start = Path(opt.start).expanduser() if opt.start else None
        cached = CachedEncoder(encoder)
        captions = [prompt] * len(pictures)
        if opt.instance_views:
            views = WORDS[opt.instance_views]
            seen = likeliest(
                prior, pictures, cached.embed, [with_view(prompt, words) for words in views], seed=opt.seed
            )
            captions = [with_view(prompt, views[number]) for number in seen]
            told = ", ".join(f"{path.name} {views[number]}" for path, number in zip(paths, seen, strict=True))
            say(f"the photographs seem to show: {told}")
        instance = Examples(pictures, captions)
        of_class = None
        if opt.with_prior_preservation:
            place = Path(opt.class_data_dir).expanduser() if opt.class_data_dir else folder / "class"
            drawn = opt.num_class_images, WORDS[opt.class_views], opt.sample_steps, opt.sample_scale, opt.seed, size
            of_class = Examples(*class_pictures(prior, cached.embed, place, opt.class_prompt, *drawn))
        for text in dict.fromkeys(instance.texts + (of_class.texts if of_class else [])):
            cached.embed([text])
        if not recipe.train_text_encoder and not recipe.full:
            encoder.close()
        done = personalize(prior, encoder, cached.embed, instance, of_class, recipe, folder, words, start)
        encoder.close()
        if opt.num_validation_images and not recipe.full:
            show(source, done, prompt, folder, device, dtype, opt)
    return done


def find_model(opt: Any) -> Source:
    """The model to personalise. Raises UserError if it is of a family that cannot be."""
    asked = SimpleNamespace(hf_key=opt.pretrained_model_name_or_path, IF=False, sd_version=opt.sd_version)
    source = resolve(SimpleNamespace(**vars(asked), text="", negative="", distill="sds", source="", lora=None))
    kind = kind_of(source)
    if kind not in KINDS:
        raise UserError(f"{source.flag}: a {kind} cannot be personalised here; use Stable Diffusion 1, 2 or XL")
    if opt.train_text_encoder and kind == "StableDiffusionXLPipeline":
        raise UserError(
            "--train_text_encoder: goes with Stable Diffusion 1 and 2, whose text encoder is one; leave it out"
        )
    return source


def recipe_of(opt: Any) -> Recipe:
    """The part of the options that says how to learn, `opt.snapshots` ("NAME:STEP", up to 1 a share of all steps) included."""
    values = {item.name: getattr(opt, item.name) for item in fields(Recipe) if item.name != "snapshots"}
    return Recipe(snapshots=read_snapshots(opt.snapshots, opt.max_train_steps), **values)


def read_snapshots(typed: Sequence[str], steps: int) -> dict[str, int]:
    """name -> number of steps. Raises UserError for a name that is no folder's or a step that is never reached."""
    found: dict[str, int] = {}
    for text in typed:
        name, _, at = text.partition(":")
        try:
            when = float(at)
            step = round(when * steps) if when <= 1 else int(when)
        except ValueError:
            raise UserError(f"--snapshots {text}: write NAME:STEP, as in partial:150") from None
        if not re.fullmatch(r"[\w\-]+", name) or name in ("class", *found):
            raise UserError(f"--snapshots {text}: the name must be one word, another one for each")
        if not 0 < step <= steps:
            raise UserError(f"--snapshots {text}: is not within the --max_train_steps {steps}")
        found[name] = step
    if not found or max(found.values()) < steps:
        raise UserError(f"--snapshots {' '.join(typed)}: the last one must be at the end, such as full:1")
    return found


def precision_of(opt: Any, device: torch.device) -> torch.dtype:
    """Of the frozen weights. Raises UserError for what cannot be trained."""
    wanted = opt.mixed_precision
    if wanted == "fp16" and (device.type == "cpu" or opt.full):
        why = "a CPU computes it very slowly or not at all" if device.type == "cpu" else "weights that learn need more"
        raise UserError(f"--mixed_precision fp16: {why}; use bf16 or no")
    return torch.float32 if opt.full else _DTYPES[wanted]


def taught(source: Source, instance_prompt: str, class_prompt: str | None) -> tuple[str, dict[str, str]]:
    """(the instance prompt as the tokenizer is to read it, the word that it teaches and what stands for that).

    A large tokenizer has rare words enough, such as "sks". The embedded model's would read that as three letters, which push the view words to
    places where it never saw them; so a letter stands for it, one token that no caption used. Raises UserError if the prompts have
    more unknown words than that one.
    """
    if source.path_or_id != str(EMBEDDED):
        return instance_prompt, {}
    words, marks = known_words(EMBEDDED)
    check_vocabulary({"--class_prompt": class_prompt}, words, marks)
    unknown = [word for word in re.findall(r"[^\W_]+", instance_prompt.lower()) if word not in words]
    check_vocabulary({"--instance_prompt": instance_prompt}, words, marks, unknown[-1:])
    if not unknown:
        return instance_prompt, {}
    word = unknown[-1]
    token = word if word in SPARE else SPARE[0]
    return re.sub(rf"\b{re.escape(word)}\b", token, instance_prompt, flags=re.IGNORECASE), {word: token}


def forget(folder: Path, recipe: Recipe) -> None:
    """Removes what an earlier personalisation left, but not its class pictures."""
    (folder / CHECKPOINT).unlink(missing_ok=True)
    for name in recipe.snapshots:
        for file in (folder / name / WEIGHTS, folder / name / "somnium.json"):
            file.unlink(missing_ok=True)


def show(source: Source, done: dict[str, Path], prompt: str, folder: Path, device, dtype, opt: Any) -> Path:
    """A sheet of what the model draws of the subject from several sides, without an adapter and with each snapshot: `folder`/samples.png.

    All snapshots are on one denoiser, and take turns.
    """
    from nerf.media import pixels, save_png
    from nerf.progress import Bar
    from toybox.sheet import labelled_sheet

    prior, encoder = load_prior(source, device, dtype), text_encoder(source, device, dtype)
    views = SHOWN[: opt.num_validation_images]
    rows: dict[str, list] = {}
    with Bar("samples", (len(done) + 1) * opt.sample_steps) as bar:
        for name in ("without", *done):
            adapters = ()
            if name != "without":
                flag = f"--lora {done[name]}"
                file = done[name] / WEIGHTS
                add_to_denoiser(prior.denoiser, read(file, flag, kind_of(source)), name, flag, source.name)
                activate(prior.denoiser, {name: 1.0})
                if opt.train_text_encoder:
                    from guidance.adapters import Adapter

                    adapters = (Adapter(file, 1.0, flag),)
                    encoder = text_encoder(replace(source, adapters=adapters), device, dtype)
            told = encoder.embed([with_view(prompt, words) for words in views])
            base = encoder.embed([""]).expand_as(told)
            noise = torch.Generator().manual_seed(opt.seed)
            made = draw(
                prior,
                told,
                base,
                opt.sample_steps,
                opt.sample_scale,
                generator=noise,
                tick=lambda: bar.update(bar.done + 1),
            )
            rows[name] = list(pixels(made.permute(0, 2, 3, 1)))
    title = f'"{opt.instance_prompt}" ({source.name}), {opt.max_train_steps} steps'
    return save_png(folder / SHEET, labelled_sheet(rows, views, title, min(max(prior.image_size, 128), 256)))


def tell(done: dict[str, Path], opt: Any) -> None:
    """What to do with the result."""
    last = list(done)[-1]
    use = f"--hf_key {done[last]}" if opt.full else f"--lora {done[last]}"
    say(f'{", ".join(map(str, done.values()))}: written; use them as in main.py {use} --text "{opt.instance_prompt}"')
