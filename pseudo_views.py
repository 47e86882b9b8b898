"""Pictures of a subject from all around that nobody took: renders of a first scene, drawn over by a model that knows the subject
(DreamBooth3D, Raj et al. 2023, stage 2), and what is learnt from them (stage 3).

Each picture is drawn by itself, so colours shift from one to the next; the renders, being of one scene, do not. `steady` takes out of each
picture the shift that the others do not share, and leaves what they do: that corrects the saturated colours of score distillation.
"""

import csv
import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from files import atomic, make_folder
from guidance.draw import draw
from guidance.prior import Prior, resize
from guidance.prompt import PromptBank, with_view
from guidance.views import WORDS, view_weights
from nerf.media import pixels, save_png, sheet
from nerf.photo_files import read_picture
from nerf.progress import Bar
from nerf.provider import Cameras, orbit

RINGS = (
    (None, 5),
    (0.95, 3),
    (0.4, 4),
)  # of cameras: place within the training's polar angles (None: the default), share of the views
AT_ONCE = 8  # views in one call of the denoiser: always the same ones together, so that a resumed run draws the same
LEAST = 128  # pixels that a render is made with; it is averaged down for a smaller model
GROWTH = 1 / 12  # of a picture's width that the outline may grow by when it is drawn over
SURE = 1 / 32  # of a picture's width within the scene's outline is certainly object
TABLE, SHEET = "views.csv", "sheet.png"


@dataclass(frozen=True)
class Scene:
    """What the first scene looks like from N cameras."""

    cameras: Cameras
    rgb: Float[Tensor, "N S S 3"]  # on white
    alpha: Float[Tensor, "N S S"]


# -- which views ---------------------------------------------------------------------------------------------------------


def around(opt: Any, count: int, size: int) -> Cameras:
    """`count` cameras in three rings of different elevation, the default one and two more within `opt.theta_range`; the first stands at the
    default view. The default distance and field of view."""
    low, high = opt.theta_range
    shares = torch.tensor([float(share) for _, share in RINGS])
    ends = [0, *(count * shares.cumsum(0) / shares.sum()).round().long().tolist()]
    polar, azimuth = [], []
    for ring, (place, _) in enumerate(RINGS):
        number = ends[ring + 1] - ends[ring]
        polar += [opt.default_polar if place is None else low + place * (high - low)] * number
        azimuth += [opt.default_azimuth + (step + ring / 2) * 360.0 / number for step in range(number)]
    angles = torch.tensor(polar), torch.tensor(azimuth)
    return orbit(*angles, float(opt.default_radius), float(opt.default_fovy), size, size)


@torch.no_grad()
def rendered(workspace: Path, count: int, size: int, device: torch.device | str) -> Scene:
    """The scene that a finished run left in `workspace`, `size` pixels wide (averaged from at least `LEAST`), on white."""
    import nerf
    from nerf.trainer import Trainer
    from options import parse

    opt = parse(["--workspace", str(workspace), "--test"])
    large = size * -(-LEAST // size)
    cameras, colours, alphas = around(opt, count, large), [], []
    trainer = Trainer(opt, nerf.build_scene(opt, device=device), None, device)
    with trainer.showing("views") as scene, Bar("renders", count) as bar:
        for i in range(count):
            render = scene.show(cameras[i : i + 1], torch.ones(3), trainer.step)
            layers = torch.cat([render.image[..., :3], render.alpha], -1).float().cpu().permute(0, 3, 1, 2)
            layers = F.interpolate(layers, (size, size), mode="area").permute(0, 2, 3, 1)
            colours.append(layers[..., :3])
            alphas.append(layers[..., 3])
            bar.update(i + 1)
    return Scene(cameras.resized(size, size), torch.cat(colours).clamp(0, 1), torch.cat(alphas).clamp(0, 1))


# -- drawing over --------------------------------------------------------------------------------------------------------


def draw_over(
    prior: Prior,
    bank: PromptBank,
    scene: Scene,
    folder: Path,
    strength: float,
    steps: int,
    scale: float,
    seed: int = 0,
) -> Float[Tensor, "N S S 3"]:
    """Each render drawn over by the prior, told the prompt as seen from its camera; `folder`/NNN_drawn.png.

    strength: how much of the way from noise to picture is gone anew, in (0, 1]. Every view has noise of its own, from `seed` and its
    number. After a stop what is there is kept, and the rest is what it would have been.
    """
    make_folder(folder)
    paths = [folder / f"{number:03d}_drawn.png" for number in range(len(scene.rgb))]
    batches = [range(start, min(start + AT_ONCE, len(paths))) for start in range(0, len(paths), AT_ONCE)]
    missing = [batch for batch in batches if not all(paths[number].is_file() for number in batch)]
    with Bar("views", len(missing) * max(round(strength * steps), 1), lines=True) as bar:
        for batch in missing:
            part = slice(batch[0], batch[-1] + 1)
            told = bank.condition(scene.cameras.polar[part], scene.cameras.azimuth[part])
            noise = torch.cat([_noise(prior, seed, number) for number in batch])
            made = draw(
                prior,
                told.text,
                told.negative,
                steps,
                scale,
                noise=noise,
                start=scene.rgb[part].permute(0, 3, 1, 2),
                strength=strength,
                tick=lambda: bar.update(bar.done + 1),
            )
            for number, picture in zip(batch, resize(made, scene.rgb.shape[1]).clamp(0, 1), strict=True):
                save_png(paths[number], pixels(picture.permute(1, 2, 0)))
    return torch.stack([read_picture(path, str(path))[0] for path in paths])


def _noise(prior: Prior, seed: int, number: int) -> Float[Tensor, "1 C h w"]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    return torch.randn(1, prior.latent_channels, prior.latent_size, prior.latent_size, generator=generator)


def outlines(scene: Scene, drawn: Float[Tensor, "N S S 3"]) -> tuple[Float[Tensor, "N S S"], Float[Tensor, "N 3"]]:
    """(coverage in [0, 1] of the object in each drawn picture, the colour behind it).

    What differs from the colour far outside of the scene's outline is object, within a little more than that outline; what lies well within
    is object in any case.
    """
    size = scene.alpha.shape[-1]
    allowed, sure = _moved(scene.alpha, GROWTH * size), 1 - _moved(1 - scene.alpha, SURE * size)
    masks, colours = [], []
    for picture, near, core in zip(drawn, allowed, sure, strict=True):
        far = picture[near < 0.5]
        far = far if len(far) else picture.reshape(-1, 3)
        behind = far.median(0).values
        noise = (far - behind).abs().amax(-1).quantile(0.95).item()
        low = max(0.08, 1.5 * noise)
        found = (((picture - behind).abs().amax(-1) - low) / low).clamp(0, 1)
        masks.append(torch.maximum(found * (near > 0.5), (core > 0.5).to(found)))
        colours.append(behind)
    return _smooth(torch.stack(masks)), torch.stack(colours)


def _moved(mask: Float[Tensor, "N S S"], reach: float) -> Float[Tensor, "N S S"]:
    """Grown by so many pixels on every side."""
    pixels_ = max(round(reach), 1)
    return F.max_pool2d(mask[:, None], 2 * pixels_ + 1, 1, pixels_)[:, 0]


def _smooth(mask: Float[Tensor, "N S S"]) -> Float[Tensor, "N S S"]:
    """Single pixels and holes go: the median of nine."""
    windows = F.unfold(F.pad(mask[:, None], (1, 1, 1, 1), mode="replicate"), 3)
    return windows.median(1).values.view(mask.shape)


def steady(
    drawn: Float[Tensor, "N S S 3"], rgb: Float[Tensor, "N S S 3"], mask: Float[Tensor, "N S S"]
) -> tuple[Float[Tensor, "N S S 3"], Float[Tensor, "N 3"]]:
    """(the pictures without what each of them alone shifts its colours by, that shift).

    shift_i = median over the object of (drawn_i - render_i), which what was newly drawn, covering less than half of it, does not change;
    its median over the views stays in the pictures, the rest is taken out within the object.
    """
    shifts = torch.stack(
        [
            (a - b)[m > 0.5].median(0).values if (m > 0.5).any() else torch.zeros(3)
            for a, b, m in zip(drawn, rgb, mask, strict=True)
        ]
    )
    own = shifts - shifts.median(0).values
    return (drawn - own[:, None, None] * mask[..., None]).clamp(0, 1), own


def write_views(
    scene: Scene, drawn: Float[Tensor, "N S S 3"], folder: Path, weight: float = 1.0
) -> Float[Tensor, "N S S 4"]:
    """NNN_rgba.png, views.csv for `--image_config` and sheet.png (each render above what was drawn over it) -> the pictures."""
    mask, behind = outlines(scene, drawn)
    even, _ = steady(drawn, scene.rgb, mask)
    layers = mask[..., None]
    clean = (even - (1 - layers) * behind[:, None, None]) / layers.clamp(min=0.25)
    rgba = torch.cat([torch.where(layers > 0.25, clean, even).clamp(0, 1), layers], -1)
    c, rows = scene.cameras, []
    for number, picture in enumerate(rgba):
        path = save_png(folder / f"{number:03d}_rgba.png", pixels(picture))
        place = [f"{value[number].item():.6g}" for value in (c.polar, c.azimuth, c.radius, c.fovy)]
        rows.append([path.name, *place, f"{weight:g}"])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([["image", "polar", "azimuth", "radius", "fovy", "weight"], *rows])
    with atomic(folder / TABLE) as beside:
        beside.write_text(text.getvalue())
    _show(scene, rgba, folder / SHEET)
    return rgba


def _show(scene: Scene, rgba: Float[Tensor, "N S S 4"], path: Path, columns: int = 12) -> None:
    """Rows of renders, each above the pictures made of them, on white."""
    before = scene.rgb
    after = rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]
    tiles, white = [], torch.ones_like(before[:1])
    for start in range(0, len(rgba), columns):
        for row in (before[start : start + columns], after[start : start + columns]):
            tiles += [row, white.expand(columns - len(row), -1, -1, -1)]
    large = F.interpolate(torch.cat(tiles).permute(0, 3, 1, 2), (max(96, len(rgba[0]) // 4),) * 2, mode="area")
    save_png(path, sheet(pixels(large.permute(0, 2, 3, 1)), columns))


# -- learning from them --------------------------------------------------------------------------------------------------


def captions(
    prompt: str, polar: Float[Tensor, "N"], azimuth: Float[Tensor, "N"], words: int, angle_overhead: float
) -> list[str]:
    """The prompt with the view words nearest to each camera (degrees)."""
    weights = view_weights(polar, azimuth, words, False, angle_overhead)
    return [with_view(prompt, WORDS[words][number]) for number in weights.argmax(-1).tolist()]


def learn(asked: Any, workspace: Path, anew: bool, device: torch.device) -> Path:
    """The adapter `multiview` in `workspace`/adapters: goes on from `partial` with the drawn pictures, each under the view words of its
    camera, and the photographs under those that were found for them, beside the class pictures."""
    import dreambooth
    from guidance.embeddings import CachedEncoder
    from guidance.personalize import Examples, personalize
    from guidance.priors import load_prior, text_encoder
    from nerf.photo_files import read_rows
    from options import parse

    folder, source = workspace / "adapters", dreambooth.find_model(asked)
    dtype = dreambooth.precision_of(asked, device)
    prior, encoder = load_prior(source, device, dtype), text_encoder(source, device, dtype)
    cached = CachedEncoder(encoder)
    size = asked.resolution or prior.image_size
    prompt, words = dreambooth.taught(source, asked.prompt, asked.class_prompt)
    paths = dreambooth.list_pictures(Path(asked.instance_dir).expanduser())
    photographs, told = dreambooth.read_pictures(paths, "--instance_dir", size), [prompt] * len(paths)
    if asked.instance_views:
        told = dreambooth.views_of(prior, photographs, cached, prompt, asked, folder)
    opt = parse(["--config", str(workspace / "nerf" / "config.yaml"), "--text", asked.prompt])
    rows = read_rows(workspace / "pseudo" / TABLE)
    place = [torch.tensor([getattr(row, name) for row in rows]) for name in ("polar", "azimuth")]
    drawn = [row.image.with_name(row.image.name.replace("_rgba", "_drawn")) for row in rows]
    told = captions(prompt, *place, opt.view_words, opt.angle_overhead) + told
    instance = Examples(torch.cat([dreambooth.read_pictures(drawn, "pseudo", size), photographs]), told)
    of_class = None
    if asked.with_prior_preservation:
        kept = Path(asked.class_data_dir).expanduser() if asked.class_data_dir else folder / "class"
        how = asked.num_class_images, WORDS[asked.class_views], asked.sample_steps, asked.sample_scale, asked.seed, size
        of_class = Examples(*dreambooth.class_pictures(prior, cached.embed, kept, asked.class_prompt, *how))
    recipe = dreambooth.recipe_of(asked)
    steps = asked.multiview_steps or recipe.snapshots["partial"]
    recipe = replace(recipe, max_train_steps=steps, snapshots={"multiview": steps})
    if anew:
        dreambooth.forget(folder, recipe)
    with Bar("multiview", steps, lines=True) as bar:
        learnt_from = instance, of_class, recipe, folder, words, folder / "partial"
        done = personalize(prior, encoder, cached.embed, *learnt_from, bar.update)
    cached.close()
    return done["multiview"]
