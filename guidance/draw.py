"""Pictures that a prior draws by itself, from noise or from another picture; and the pictures it draws of a class, kept in a folder."""

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from errors import UserError, say
from files import make_folder
from guidance.prior import Prior, resize
from guidance.prompt import with_view
from nerf.media import pixels, save_png
from nerf.photo_files import read_picture
from nerf.progress import Bar

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
FEW, MANY = 3, 20  # photographs that a personalisation goes well with
AT_ONCE = 8  # pictures in one call of the denoiser: always the same ones together, so that a resumed run draws the same


@torch.no_grad()
def draw(
    prior: Prior,
    told: Float[Tensor, "B L D"],
    base: Float[Tensor, "B L D"],
    steps: int = 30,
    scale: float = 7.5,
    noise: Float[Tensor, "B C h w"] | None = None,
    start: Float[Tensor, "B 3 H W"] | None = None,
    strength: float = 1.0,
    generator: torch.Generator | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Float[Tensor, "B 3 k l"]:
    """Pictures in [0, 1] by DDIM (Song et al. 2021, equation 12, eta = 0; for a flow model Euler's method).

    told, base: embeddings of the prompt and of what classifier-free guidance of strength `scale` goes away from. noise: by default drawn
    with `generator` (on the CPU, whatever the prior's device). start: pictures to begin with instead of noise; of the way from noise to
    picture the last share `strength`, in (0, 1], is gone anew (SDEdit, Meng et al. 2022). tick: called after each step.
    """
    count, size = len(told), prior.latent_size
    if noise is None:
        noise = torch.randn(count, prior.latent_channels, size, size, generator=generator)
    noise = noise.to(prior.device, torch.float32)
    first = round(strength * (prior.num_timesteps - 1))
    times = torch.linspace(first, 0, max(round(strength * steps), 1) + 1).round().long().tolist()
    z = noise
    if start is not None:
        clean = prior.encode(start.to(prior.device), torch.Generator(prior.device).manual_seed(0))
        z = prior.signal[first] * clean + prior.sigma[first] * noise
    for now, then in pairwise(times):
        t = torch.full((count,), now, device=prior.device)
        away, towards = prior.ask(z, t, [base, told])
        eps = away + scale * (towards - away)
        clean = (z - prior.sigma[now] * eps) / prior.signal[now].clamp(min=1e-3)
        if prior.autoencoder is None:
            clean = clean.clamp(-1, 1)
            eps = (z - prior.signal[now] * clean) / prior.sigma[now]
        z = prior.signal[then] * clean + prior.sigma[then] * eps
        tick()
    return prior.decode(clean)


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


@torch.no_grad()
def likeliest(
    prior: Prior,
    pictures: Float[Tensor, "N 3 k k"],
    embed: Callable[[list[str]], Float[Tensor, "n L D"]],
    texts: Sequence[str],
    draws: int = 12,
    seed: int = 0,
) -> list[int]:
    """For each picture the text that describes it best: the one under which the prior removes noise best, the mean error over `draws` noises
    that are the same for all texts (Li et al. 2023, "Your Diffusion Model is Secretly a Zero-Shot Classifier")."""
    generator = torch.Generator().manual_seed(seed)
    told = torch.cat([embed([text]) for text in texts]).to(prior.device)
    t = torch.linspace(0.2, 0.9, draws).mul(prior.num_timesteps).long().to(prior.device)
    latents = torch.cat(
        [prior.encode(p[None].to(prior.device), torch.Generator(prior.device).manual_seed(seed)) for p in pictures]
    )
    noise = torch.randn(draws, *latents.shape[1:], generator=generator).to(prior.device)
    found = []
    with Bar("views", len(latents) * len(texts), lines=True) as bar:
        for clean in latents:
            noisy = prior.signal[t, None, None, None] * clean + prior.sigma[t, None, None, None] * noise
            errors = []
            for text in told:
                eps = prior.predict(noisy, t, text.expand(draws, -1, -1))
                errors.append((eps - noise).square().mean().item())
                bar.update(bar.done + 1)
            found.append(min(range(len(errors)), key=errors.__getitem__))
    return found
