"""Zero-1-to-3 and Stable-Zero123 as a prior: what the object of a known picture looks like from another camera.

The denoiser sees the known picture's latents beside the noisy ones, and one token: a projection of the picture's image embedding and of the
relative pose (Liu et al. 2023, section 3.2; tiny-zero123 has several tokens). Both together are an "embedding" here, [B, rows + tokens, D]:
the latents, filled up to whole rows, then the tokens; all zeros stand for "told nothing", which is what guidance starts from. So a
`ViewBank` is to this prior what a `PromptBank` is to one of text.

Signs: the published models were trained in a right-handed world with z up and azimuth arctan2(y, x), ours is right-handed with y up and
azimuth arctan2(x, z). In both the azimuth grows counterclockwise seen from above and the polar angle from above downwards, so that no sign
changes: +90 shows what a camera sees that has gone to the right around the object.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from errors import UserError
from guidance import Guidance
from guidance.distillation import Distillation, Settings
from guidance.prior import Hints, Prior, resize
from guidance.prompt import Condition
from guidance.weights import Source
from guidance.zero123_reference import Parts, embed_picture, is_embedded, read_view_model, view_source

SCALE, SAMPLE_SCALE = 5.0, 3.0  # of guidance: the published ones, for distillation and for drawing pictures
EMBEDDED_SCALE = 3.0  # tiny-zero123's, for both
GRAD_SCALES = ("none", "angle")
_LEAST = 0.1  # references that count less than this beside the best one are left out


@dataclass(frozen=True)
class View:
    """A known picture of the object, on white, in [0, 1], and its camera (degrees; our convention, see nerf/provider.py).

    weight: how much it counts beside the others (`zero123_weight`), >= 0; mask: coverage in [0, 1], for models that know other backgrounds.
    """

    picture: Float[Tensor, "3 S S"]
    polar: float
    azimuth: float
    radius: float
    weight: float = 1.0
    mask: Float[Tensor, "1 S S"] | None = None


class Zero123(Prior):
    """A frozen novel-view model; see `Prior`, and above for what its embeddings are."""

    @classmethod
    def of(cls, parts: Parts, device: torch.device | str, name: str = "") -> "Zero123":
        """The prior in what `read_view_model` read."""
        return cls(parts.unet, parts.vae, *parts.levels, device, name)

    @classmethod
    def load(cls, source: Source, device: torch.device | str, dtype: torch.dtype = torch.float32) -> "Zero123":
        """Reads a model from where `view_source` found it. Raises UserError if it cannot be had, read or used."""
        return cls.of(read_view_model(source, device, dtype), device, source.name)

    def denoise(self, noisy: Tensor, t: Tensor, embedding: Tensor, hints: Hints) -> Tensor:
        tokens, beside = unpack(embedding, self.latent_channels, self.latent_size)
        both = torch.cat([noisy, beside], dim=1).to(self.dtype)
        return self.denoiser(both, t, tokens.to(self.dtype)).sample

    @torch.no_grad()
    def encode_reference(self, picture: Float[Tensor, "N 3 h w"]) -> Float[Tensor, "N C k k"]:
        """What the denoiser sees of known pictures in [0, 1]: the mode of their latents, not scaled."""
        with torch.autocast(self.device.type, enabled=False):
            whole = 2 * resize(picture.float(), self.image_size) - 1
            encoded = self.autoencoder.encode(whole.to(self.autoencoder.dtype))
        posterior = getattr(encoded, "latent_dist", None)
        return (encoded.latents if posterior is None else posterior.mode()).float()


def pack(tokens: Float[Tensor, "B n D"], latents: Float[Tensor, "B C k k"]) -> Float[Tensor, "B L D"]:
    """The embedding that carries both: the latents row by row, zeros behind their end, then the tokens."""
    width, flat = tokens.shape[2], latents.flatten(1)
    rows = F.pad(flat, (0, -flat.shape[1] % width)).unflatten(1, (-1, width))
    return torch.cat([rows, tokens], 1)


def unpack(
    embedding: Float[Tensor, "B L D"], channels: int, size: int
) -> tuple[Float[Tensor, "B n D"], Float[Tensor, "B C k k"]]:
    """The inverse of `pack`."""
    count = channels * size * size
    rows = -(-count // embedding.shape[2])
    flat = embedding[:, :rows].flatten(1)[:, :count]
    return embedding[:, rows:], flat.unflatten(1, (channels, size, size))


def relative_pose(
    target: Float[Tensor, "B 3"], reference: Float[Tensor, "B 3"], pose: str = "radius"
) -> Float[Tensor, "B 4"]:
    """What the model is told of two cameras (polar, azimuth, radius; degrees): (change of the polar angle, sine and cosine of the change of
    the azimuth, change of the radius), in radians and world units.

    pose: "polar" is Stable-Zero123's, which knows the reference's own polar angle in the last place instead of the radius.
    """
    change = target - reference
    polar, azimuth = torch.deg2rad(change[:, 0]), torch.deg2rad(change[:, 1])
    last = change[:, 2] if pose == "radius" else torch.deg2rad(reference[:, 0])
    return torch.stack([polar, azimuth.sin(), azimuth.cos(), last], -1)


def angle_between(
    polar: Float[Tensor, "B"], azimuth: Float[Tensor, "B"], polar_2: Float[Tensor, "N"], azimuth_2: Float[Tensor, "N"]
) -> Float[Tensor, "B N"]:
    """Degrees between the directions of cameras: by the chord, which is exact for small angles too."""

    def point(p: Tensor, a: Tensor) -> Tensor:
        p, a = torch.deg2rad(p), torch.deg2rad(a)
        return torch.stack([p.sin() * a.sin(), p.cos(), p.sin() * a.cos()], -1)

    chord = (point(polar, azimuth)[:, None] - point(polar_2, azimuth_2)).norm(dim=-1)
    return torch.rad2deg(2 * torch.asin((chord / 2).clamp(max=1.0)))


def reference_weights(angle: Float[Tensor, "B N"], weight: Float[Tensor, "N"]) -> Float[Tensor, "B N"]:
    """How much each of N known pictures counts for a camera that is `angle` (degrees) away from it; rows sum to 1.

    stable-dreamfusion's rule: 1 / angle, at most 100, relative to the largest, 0 below a tenth; times the picture's own weight, and again
    relative to the largest, 0 below a tenth. weight: > 0.
    """

    def relative(u: Tensor) -> Tensor:
        u = u / u.amax(-1, keepdim=True)
        return torch.where(u < _LEAST, 0.0, u)

    near = relative((1 / angle).clamp(max=100.0))
    both = relative(near * weight)
    return both / both.sum(-1, keepdim=True)


class ViewBank:
    """The known pictures as the denoiser is told of them.

    `features` [N, E], `latents` [N, C, k, k] (on white), `camera` [N, 3] (polar, azimuth, radius), `weight` [N].
    """

    def __init__(
        self,
        parts: Parts,
        prior: Zero123,
        views: Sequence[View],
        generator: torch.Generator | None = None,
        grad_scale: str = "angle",
    ):
        """generator: draws the picture that a view is compared with, where there are several; on the prior's device. grad_scale: "angle"
        (a view counts by its angle to the nearest known picture) or "none". Raises UserError if there is no picture of positive weight.
        """
        views = [view for view in views if view.weight > 0]
        if not views:
            raise UserError(
                "--image_config: no picture has a zero123_weight above 0; give at least one of them weight 1"
            )
        self.generator, self.grad_scale = generator, grad_scale
        self.projection, self.pose = parts.projection, parts.pose
        pictures = [resize(view.picture[None].to(prior.device).float(), prior.image_size) for view in views]
        self.features, self.latents = look(parts, prior, torch.cat(pictures))
        numbers = [[view.polar, view.azimuth, view.radius] for view in views]
        self.camera = torch.tensor(numbers, dtype=torch.float32, device=prior.device)
        self.weight = torch.tensor([float(view.weight) for view in views], device=prior.device)
        self._repaint = (
            None  # what else the image encoder is needed for: model, pictures and where they show the background
        )
        if parts.any_background and all(view.mask is not None for view in views):
            masks = [resize(view.mask[None].to(prior.device).float(), prior.image_size) for view in views]
            self._repaint = parts, prior, torch.cat(pictures), 1 - torch.cat(masks)

    def condition(
        self, polar: Float[Tensor, "B"], azimuth: Float[Tensor, "B"], hints: dict[str, Tensor] | None = None
    ) -> Condition:
        """What is known of the object as seen from each camera (degrees).

        Hints that are looked at: `c2w`, for the radius, which else is the known picture's own; `background` [B, 3], the plain color that
        each view is rendered on: a model that was trained on any background then sees the known picture on the same one, else on white.
        Adds the hint `share` [B]: how much the camera's gradient counts.

        Of several pictures one is drawn for each camera, with the probabilities of `reference_weights`: on average that is the gradient of
        the weighted mean of all predictions, with one call of the denoiser instead of N.
        """
        polar, azimuth = polar.to(self.camera), azimuth.to(self.camera)
        angle = angle_between(polar, azimuth, *self.camera[:, :2].unbind(1))
        chosen = torch.zeros_like(polar, dtype=torch.long)
        if len(self.weight) > 1:
            chances = reference_weights(angle, self.weight)
            chosen = torch.multinomial(chances, 1, generator=self.generator)[:, 0]
        known = dict(hints or {})
        radius = known["c2w"][:, :3, 3].to(self.camera).norm(dim=-1) if "c2w" in known else self.camera[chosen, 2]
        share = gradient_share(angle) if self.grad_scale == "angle" else torch.ones_like(polar)
        text = self.tell(chosen, torch.stack([polar, azimuth, radius], -1), known.get("background"))
        nothing = torch.zeros_like(text)
        return Condition(text, nothing, nothing, nothing, text, hints={**known, "share": share})

    @torch.no_grad()
    def tell(
        self, chosen: Int[Tensor, "B"], camera: Float[Tensor, "B 3"], background: Float[Tensor, "B 3"] | None = None
    ) -> Float[Tensor, "B L D"]:
        """The embedding: known picture number `chosen`, and where its camera lies from `camera` (polar, azimuth, radius)."""
        features, latents = self.features[chosen], self.latents[chosen]
        if background is not None and self._repaint is not None:
            parts, prior, pictures, empty = self._repaint
            change = background.to(pictures)[:, :, None, None] - 1
            features, latents = look(parts, prior, (pictures[chosen] + empty[chosen] * change).clamp(0, 1))
        pose = relative_pose(camera, self.camera[chosen], self.pose)
        with torch.autocast(pose.device.type, enabled=False):
            tokens = self.projection(torch.cat([features, pose], -1))
        return pack(tokens, latents)


def look(
    parts: Parts, prior: Zero123, picture: Float[Tensor, "N 3 h w"]
) -> tuple[Float[Tensor, "N E"], Float[Tensor, "N C k k"]]:
    """Image embeddings and latents of pictures."""
    return embed_picture(parts, picture, prior.image_size), prior.encode_reference(picture)


def gradient_share(angle: Float[Tensor, "B N"]) -> Float[Tensor, "B"]:
    """stable-dreamfusion's `zero123_grad_scale angle`: 0 at a known picture, 1 at 180 / N degrees from the nearest of N."""
    return angle.amin(-1) / (180 / angle.shape[1])


class ViewGuidance(Guidance):
    """A `Guidance` that knows the object's pictures instead of a prompt, and counts each view by its angle to them."""

    def __init__(self, prior: Zero123, bank: ViewBank, distillation: Distillation, opt, embedded: bool):
        """opt: `zero123_scale` and those of distillation; embedded: whether it is tiny-zero123."""
        self.prior, self.prompts, self.distillation, self.embedded = prior, bank, distillation, embedded
        self.lambda_image, self.clip, self.lambda_clip = 0.0, None, 0.0
        weight = distillation.weight
        distillation.weight = lambda draw: weight(draw) * draw.condition.hints["share"].view(-1, 1, 1, 1)
        self.follow(opt)

    def follow(self, opt) -> None:
        """Strengths as these options say, model and pictures as they are."""
        scale = opt.zero123_scale
        if scale is None:
            scale = EMBEDDED_SCALE if self.embedded else SCALE
        self.distillation.settings = replace(Settings.of(opt), guidance_scale=scale)
        self.weight = opt.lambda_zero123


def build_view_guidance(opt, pictures: Sequence[View], device: torch.device | str) -> ViewGuidance:
    """The guidance of the options `zero123` (see `view_source`), `zero123_scale` and `zero123_grad_scale`, and of those of distillation,
    precision and memory. Raises UserError if the model cannot be had or used.
    """
    from guidance.memory import apply, precision, tiny_autoencoder
    from guidance.methods import METHODS

    source = view_source(opt.zero123)
    parts = read_view_model(source, device, precision(opt, device))
    prior, embedded = Zero123.of(parts, device, source.name), is_embedded(source)
    generator = torch.Generator(prior.device)
    if opt.seed is None:
        generator.seed()
    else:
        generator.manual_seed(int(opt.seed) + 2 * 7919)  # not the numbers of the cameras, nor those of a prior of text
    bank = ViewBank(parts, prior, pictures, generator, opt.zero123_grad_scale)
    if opt.taesd and not embedded:
        tiny_autoencoder(opt, prior)
    apply(prior, opt)
    distillation = Distillation(prior, Settings.of(opt), generator, METHODS["sds"])
    return ViewGuidance(prior, bank, distillation, opt, embedded)


@torch.no_grad()
def sample_views(
    prior: Zero123,
    told: Float[Tensor, "B L D"],
    steps: int = 50,
    scale: float = 3.0,
    eta: float = 1.0,
    generator: torch.Generator | None = None,
    step_done: Callable[[int], None] | None = None,
) -> Float[Tensor, "B 3 h w"]:
    """Pictures in [0, 1] by DDIM (Song et al. 2021, equations 12 and 16) with classifier-free guidance, as the published demo draws them.

    told: the embeddings. eta: share of the noise that is drawn anew in each step. generator: on the prior's device; step_done: called
    with the number of steps taken so far.
    """
    shape = len(told), prior.latent_channels, prior.latent_size, prior.latent_size
    device = {"device": prior.device}
    z = torch.randn(shape, generator=generator, **device)
    times = torch.linspace(prior.num_timesteps - 1, 0, steps + 1, **device).round().long()
    for done, (now, then) in enumerate(pairwise(times), 1):
        base, guided = prior.ask(z, now.expand(shape[0]), [torch.zeros_like(told), told])
        eps = base + scale * (guided - base)
        signal, sigma = prior.signal[now], prior.sigma[now]
        clean = (z - sigma * eps) / signal.clamp(min=1e-3)
        a, r = prior.signal[then], prior.sigma[then]
        fresh = eta * (r / sigma) * (1 - (signal / a) ** 2).clamp(min=0).sqrt()
        z = a * clean + (r**2 - fresh**2).clamp(min=0).sqrt() * eps
        if eta > 0 and then > 0:
            z = z + fresh * torch.randn(shape, generator=generator, **device)
        if step_done is not None:
            step_done(done)
    return prior.decode(z)
