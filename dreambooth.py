"""The personalisation from its options to its files: which photographs, which words, which model, and what came of it."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from errors import UserError, say
from files import atomic, claimed, make_folder
from guidance.adapters import activate, add_to_denoiser, read
from guidance.draw import draw, likeliest
from guidance.embeddings import CachedEncoder
from guidance.personalize import CHECKPOINT, KINDS, WEIGHTS, Examples, Recipe, personalize
from guidance.prior import Prior, resize
from guidance.priors import load_prior, text_encoder
from guidance.prompt import with_view
from guidance.views import WORDS
from guidance.weights import EMBEDDED, Source, check_vocabulary, kind_of, known_words, read_json, resolve
from nerf.media import pixels, save_png
from nerf.photo_files import read_picture
from nerf.progress import Bar

SPARE = "xzqvjk"  # one-letter words of the embedded model's tokenizer that none of its captions used
SHOWN = ("front view", "left side view", "back view", "right side view")
SHEET, VIEWS = "samples.png", "views.json"
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
FEW, MANY = 3, 20  # photographs that a personalisation goes well with
AT_ONCE = 8  # pictures in one call of the denoiser: always the same ones together, so that a resumed run draws the same
_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def run(asked: Any, sheet: Callable | None = None) -> dict[str, Path]:
    """Personalises the model that `asked` names -> snapshot name -> its folder in `asked.output_dir`.

    asked: what scripts/train_dreambooth.py knows, by name. sheet: makes one picture of several, as toybox.sheet does. Raises UserError for
    whatever a user can get wrong, before anything slow.
    """
    source = find_model(asked)
    device = torch.device("cuda" if asked.device != "cpu" and torch.cuda.is_available() else "cpu")
    if asked.device == "cuda" and device.type != "cuda":
        raise UserError("--device cuda: there is no GPU; leave the flag out")
    recipe, dtype = recipe_of(asked), precision_of(asked, device)
    prompt, words = taught(source, asked.instance_prompt, asked.class_prompt)
    folder = Path(asked.output_dir).expanduser()
    with claimed(folder):
        if asked.ckpt == "scratch":
            forget(folder, recipe)
        paths = find_pictures(Path(asked.instance_data_dir), "--instance_data_dir")
        prior = load_prior(source, device, dtype)
        size = asked.resolution or prior.image_size
        if size % (prior.image_size // prior.latent_size):
            raise UserError(f"--resolution {size}: must be a multiple of {prior.image_size // prior.latent_size}")
        pictures = read_pictures(paths, "--instance_data_dir", size)
        encoder = text_encoder(source, device, dtype)
        start = Path(asked.start).expanduser() if asked.start else None
        cached = CachedEncoder(encoder)
        captions = [prompt] * len(pictures)
        if asked.instance_views:
            captions = views_of(prior, pictures, cached, prompt, asked, folder)
            told = ", ".join(f'{path.name}: "{text}"' for path, text in zip(paths, captions, strict=True))
            say(f"the photographs seem to show: {told}")
        instance = Examples(pictures, captions)
        of_class = None
        if asked.with_prior_preservation:
            place = Path(asked.class_data_dir).expanduser() if asked.class_data_dir else folder / "class"
            drawn = (
                asked.num_class_images,
                WORDS[asked.class_views],
                asked.sample_steps,
                asked.sample_scale,
                asked.seed,
                size,
            )
            of_class = Examples(*class_pictures(prior, cached.embed, place, asked.class_prompt, *drawn))
        for text in dict.fromkeys(instance.texts + (of_class.texts if of_class else [])):
            cached.embed([text])
        if not recipe.train_text_encoder and not recipe.full:
            encoder.close()
        with Bar("personalise", recipe.max_train_steps, lines=True) as bar:
            learnt_from = instance, of_class, recipe, folder, words, start
            done = personalize(prior, encoder, cached.embed, *learnt_from, bar.update)
        encoder.close()
        newest = max(folder.stat().st_mtime for folder in done.values())
        shown = (folder / SHEET).is_file() and (folder / SHEET).stat().st_mtime > newest
        if sheet and asked.num_validation_images and not recipe.full and not shown:
            show(source, done, prompt, folder, device, dtype, asked, sheet)
    return done


def views_of(
    prior: Prior, pictures: Float[Tensor, "N 3 k k"], cached: CachedEncoder, prompt: str, asked: Any, folder: Path
) -> list[str]:
    """The instance prompt with the view words that suit each photograph best; kept in `folder`/views.json, for that takes a while."""
    texts = [with_view(prompt, words) for words in WORDS[asked.instance_views]]
    digest = hashlib.sha256(json.dumps([prior.name, texts, asked.seed]).encode())
    digest.update(pictures.contiguous().numpy().tobytes())
    file = folder / VIEWS
    if file.is_file() and (known := read_json(file)).get("key") == digest.hexdigest():
        return known["texts"]
    with Bar("views", len(pictures) * len(texts), lines=True) as bar:
        best = likeliest(prior, pictures, cached.embed, texts, seed=asked.seed, tick=lambda: bar.update(bar.done + 1))
    found = [texts[number] for number in best]
    with atomic(file) as beside:
        beside.write_text(json.dumps({"key": digest.hexdigest(), "texts": found}, indent=1))
    return found


def find_model(asked: Any) -> Source:
    """The model to personalise. Raises UserError if it is of a family that cannot be."""
    named = SimpleNamespace(hf_key=asked.pretrained_model_name_or_path, IF=False, sd_version=asked.sd_version)
    source = resolve(SimpleNamespace(**vars(named), text="", negative="", distill="sds", source="", lora=None))
    kind = kind_of(source)
    if kind not in KINDS:
        raise UserError(f"{source.flag}: a {kind} cannot be personalised here; use Stable Diffusion 1, 2 or XL")
    if asked.train_text_encoder and kind == "StableDiffusionXLPipeline":
        raise UserError(
            "--train_text_encoder: goes with Stable Diffusion 1 and 2, whose text encoder is one; leave it out"
        )
    return source


def recipe_of(asked: Any) -> Recipe:
    """The part of the options that says how to learn, `asked.snapshots` ("NAME:STEP", up to 1 a share of all steps) included."""
    values = {item.name: getattr(asked, item.name) for item in fields(Recipe) if item.name != "snapshots"}
    return Recipe(snapshots=read_snapshots(asked.snapshots, asked.max_train_steps), **values)


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


def precision_of(asked: Any, device: torch.device) -> torch.dtype:
    """Of the frozen weights. Raises UserError for what cannot be trained."""
    wanted = asked.mixed_precision
    if wanted == "fp16" and (device.type == "cpu" or asked.full):
        why = "a CPU computes it very slowly or not at all" if device.type == "cpu" else "weights that learn need more"
        raise UserError(f"--mixed_precision fp16: {why}; use bf16 or no")
    return torch.float32 if asked.full else _DTYPES[wanted]


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


def show(
    source: Source, done: dict[str, Path], prompt: str, folder: Path, device, dtype, asked: Any, sheet: Callable
) -> Path:
    """A sheet of what the model draws of the subject from several sides, without an adapter and with each snapshot: `folder`/samples.png.

    All snapshots are on one denoiser, and take turns.
    """
    prior, encoder = load_prior(source, device, dtype), text_encoder(source, device, dtype)
    views = SHOWN[: asked.num_validation_images]
    rows: dict[str, list] = {}
    with Bar("samples", (len(done) + 1) * asked.sample_steps) as bar:
        for name in ("without", *done):
            adapters = ()
            if name != "without":
                flag = f"--lora {done[name]}"
                file = done[name] / WEIGHTS
                add_to_denoiser(prior.denoiser, read(file, flag, kind_of(source)), name, flag, source.name)
                activate(prior.denoiser, {name: 1.0})
                if asked.train_text_encoder:
                    from guidance.adapters import Adapter

                    adapters = (Adapter(file, 1.0, flag),)
                    encoder = text_encoder(replace(source, adapters=adapters), device, dtype)
            told = encoder.embed([with_view(prompt, words) for words in views])
            base = encoder.embed([""]).expand_as(told)
            noise = torch.Generator().manual_seed(asked.seed)
            made = draw(
                prior,
                told,
                base,
                asked.sample_steps,
                asked.sample_scale,
                generator=noise,
                tick=lambda: bar.update(bar.done + 1),
            )
            rows[name] = list(pixels(made.permute(0, 2, 3, 1)))
    title = f'"{asked.instance_prompt}" ({source.name}), {asked.max_train_steps} steps'
    return save_png(folder / SHEET, sheet(rows, views, title, min(max(prior.image_size, 128), 256)))


def tell(done: dict[str, Path], asked: Any) -> None:
    """What to do with the result."""
    last = list(done)[-1]
    model = {"embedded": ""}.get(asked.sd_version, f"--sd_version {asked.sd_version} ")
    if asked.pretrained_model_name_or_path:
        model = f"--hf_key {asked.pretrained_model_name_or_path} "
    use = f"--hf_key {done[last]}" if asked.full else f"{model}--lora {done[last]}"
    say(f'{", ".join(map(str, done.values()))}: written; use them as in main.py {use} --text "{asked.instance_prompt}"')


# -- folders of pictures ------------------------------------------------------------------------------------------------


def find_pictures(folder: Path, flag: str) -> list[Path]:
    """The photographs in a folder, in the order of their names; other files are left aside.

    Raises UserError, beginning with `flag`, if there is no folder or nothing in it; says a line about fewer than 3 or more than 20.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"{flag} {folder}: no such folder; name one with photographs of the subject")
    paths = list_pictures(folder)
    if not paths:
        raise UserError(f"{flag} {folder}: there are no pictures in it ({', '.join(ENDINGS)}); name another folder")
    if not FEW <= len(paths) <= MANY:
        many = "one picture" if len(paths) == 1 else f"{len(paths)} pictures"
        advice = "with fewer than 3 their views are learnt by heart" if len(paths) < FEW else "3 to 20 are enough"
        say(f"{flag} {folder}: {many}; {advice}")
    return paths


def read_pictures(paths: Sequence[Path], flag: str, size: int) -> Float[Tensor, "N 3 k k"]:
    """In [0, 1]: turned as EXIF says, on white where they are transparent, their middle squares resized to `size`. Raises UserError, beginning
    with `flag`, for one that cannot be read."""
    return torch.cat([_square(path, f"{flag} {path}", size) for path in paths])


def list_pictures(folder: Path) -> list[Path]:
    """The files that end like pictures, sorted; none that is hidden."""
    files = (path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return sorted(path for path in files if path.suffix.lower() in ENDINGS)


def class_pictures(
    prior: Prior,
    embed: Callable[[list[str]], Float[Tensor, "n L D"]],
    folder: Path,
    prompt: str,
    count: int,
    views: Sequence[str] = ("",),
    steps: int = 30,
    scale: float = 7.5,
    seed: int = 0,
    size: int = 0,
) -> tuple[Float[Tensor, "N 3 k k"], list[str]]:
    """(`count` pictures of a class, `size` pixels a side, a text for each), read from a folder; what it lacks is drawn first and kept there.

    views: view words; drawn pictures take turns with them, and the name tells which: 0003_back_view.png. Pictures of other names are the
    user's and show `prompt` itself. After a stop the drawing goes on where it was, and every picture is what it would have been.
    """
    make_folder(folder)
    names = [
        f"{number:04d}{'_' + views[number % len(views)] if views[number % len(views)] else ''}"
        for number in range(count)
    ]
    wordings = {f"{name.replace(' ', '_')}.png": with_view(prompt, name[5:]) for name in names}
    given = [path.name for path in list_pictures(folder) if not _DRAWN.fullmatch(path.name)][:count]
    drawn = list(wordings)[: count - len(given)]
    batches = [drawn[start : start + AT_ONCE] for start in range(0, len(drawn), AT_ONCE)]
    missing = [batch for batch in batches if not all((folder / name).is_file() for name in batch)]
    with Bar("class pictures", len(missing) * steps, lines=True) as bar:
        for batch in missing:
            told = torch.cat([embed([wordings[name]]) for name in batch])
            generator = torch.Generator().manual_seed(seed * 1_000_003 + int(batch[0][:4]))
            base = embed([""]).expand_as(told)
            made = draw(prior, told, base, steps, scale, generator=generator, tick=lambda: bar.update(bar.done + 1))
            for name, picture in zip(batch, made, strict=True):
                if not (folder / name).is_file():
                    save_png(folder / name, pixels(picture.permute(1, 2, 0)))
    used = given + drawn
    rows = [_square(folder / name, f"--class_data_dir {folder / name}", size or prior.image_size) for name in used]
    return torch.cat(rows), [wordings.get(name, prompt) for name in used]


_DRAWN = re.compile(r"\d{4}(_[a-z_]+)?\.png")


def _square(path: Path, label: str, size: int) -> Float[Tensor, "1 3 k k"]:
    """A picture's middle square, on white."""
    rgb, alpha = read_picture(path, label)
    rgb = rgb if alpha is None else rgb * alpha + 1 - alpha
    side = min(rgb.shape[:2])
    top, left = ((length - side) // 2 for length in rgb.shape[:2])
    return resize(rgb[top : top + side, left : left + side].permute(2, 0, 1)[None], size).clamp(0, 1)
