"""Scenes of latents: trained without an autoencoder, shown in colours, and turned into a scene of colours by a second stage.

    Latent     a field of the prior's latents; its pictures are latents while it trains and colours when it is shown
    Adapter    what goes on from there (Latent-NeRF, Metzer et al. 2023, section 4.1): the latents of every point become colours by a linear map that
               learns too, and from then on the prior sees pictures

Both name their parts `field` and `colours` in a checkpoint, so that the first becomes the second.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from errors import UserError
from nerf import build_field, checkpoint
from nerf.provider import Cameras
from nerf.renderer import NeRFRenderer, Render
from nerf.shading import Shading

CHANNELS = 4  # of the latents of Stable Diffusion 1, 2 and XL, and of the embedded model
FILE = "latent_rgb.json"  # in a model's folder: the map of its latents (toybox/latent_rgb.py)
# Latents (rows) to red, green and blue, for the autoencoder of Stable Diffusion 1 and 2: the published map of Latent-NeRF.
STABLE_DIFFUSION = ((0.298, 0.207, 0.208), (0.187, 0.286, 0.173), (-0.158, 0.189, 0.264), (-0.184, -0.271, -0.473))
# What is decoded for the eye has so many times the latents of a training picture along an edge (SJC's subpixels).
FINER = 2


class Colours(nn.Linear):
    """rgb = clamp((f A + b + 1) / 2, 0, 1): roughly the colours of latents f, scaled as the denoiser sees them.

    Gradients pass where nothing is clamped. Parameters: `weight` [3, C] is A transposed, `bias` [3] is b.
    """

    def __init__(self, matrix: Any = STABLE_DIFFUSION, offset: Any = (0.0, 0.0, 0.0)):
        """matrix: C rows of 3 numbers; offset: 3."""
        matrix, offset = torch.as_tensor(matrix, dtype=torch.float32), torch.as_tensor(offset, dtype=torch.float32)
        with torch.random.fork_rng([]):  # initial weights that nobody keeps must not move a scene's
            super().__init__(len(matrix), 3)
        with torch.no_grad():
            self.weight.copy_(matrix.T)
            self.bias.copy_(offset)

    def forward(self, latents: Float[Tensor, "*B C"]) -> Float[Tensor, "*B 3"]:
        return ((super().forward(latents).float() + 1) / 2).clamp(0, 1)

    @torch.no_grad()
    def inverse(self, rgb: Float[Tensor, "*B 3"]) -> Float[Tensor, "*B C"]:
        """The shortest latents that show these colours."""
        return (2 * rgb.to(self.weight) - 1 - self.bias) @ torch.linalg.pinv(self.weight.T)


def to_rgb(latents: Float[Tensor, "*B C"], colours: Colours | None = None) -> Float[Tensor, "*B 3"]:
    """Roughly the colours, in [0, 1], of latents; without `colours` of those of Stable Diffusion 1 and 2."""
    return (Colours() if colours is None else colours).to(latents.device)(latents)


def colours_of(folder: Path | None) -> Colours:
    """The map for the model in `folder`: the one in its `latent_rgb.json`, else (or for None) that of Stable Diffusion.

    UserError if that file cannot be read.
    """
    path = None if folder is None else folder / FILE
    if path is None or not path.is_file():
        return Colours()
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        matrix, offset = torch.tensor(told["matrix"]), torch.tensor(told["offset"])
        if matrix.dim() != 2 or matrix.shape[1] != 3 or offset.shape != (3,) or not torch.isfinite(matrix).all():
            raise ValueError("matrix: rows of 3 numbers; offset: 3 numbers")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a map from latents to colours ({error}); make it anew, or delete it") from None
    return Colours(matrix, offset)


def fit(latents: Float[Tensor, "N C"], rgb: Float[Tensor, "N 3"]) -> Colours:
    """The map with the least squared error, before clamping, for latents whose colours in [0, 1] are known."""
    known = torch.cat([latents, torch.ones_like(latents[:, :1])], -1).double()
    solution = torch.linalg.lstsq(known, 2 * rgb.double() - 1).solution
    return Colours(solution[:-1], solution[-1])


class Latent(nn.Module):
    """To the trainer a field of latents; to everybody who looks (eval mode) a scene of colours.

    What is not said here is the field's: `parameter_groups`, `update_occupancy`, `channels` (of the latents) and so on.
    Attributes: `colours`, fixed, in the checkpoint so that a finished run needs no prior to be shown; `prior`, see `decode_with`.
    """

    def __init__(self, field: nn.Module, colours: Colours):
        """ValueError if the map is for another number of channels."""
        super().__init__()
        _check_channels(field, colours)
        self.field, self.colours = field, colours.requires_grad_(False)
        self.prior: Any = None
        self._plain: dict[tuple[float, ...], Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "field":  # not there yet
                raise
            return getattr(self.field, name)

    def render(
        self,
        cameras: Cameras,
        shading: Shading = "albedo",
        light: Float[Tensor, "B 3"] | None = None,
        ambient: Float[Tensor, "B"] | float = 1.0,
        background: Float[Tensor, "*any"] | None = None,
        step: int = 0,
        generator: torch.Generator | None = None,
        chunk: int | None = None,
        normals: bool | None = None,
    ) -> Render:
        """`NeRFRenderer.render`: in train mode latents, on a background of latents; else colours, on a background of colours."""
        if not self.training and shading != "normal":
            background = self._behind(background)
        render = self.field.render(cameras, shading, light, ambient, background, step, generator, chunk, normals)
        if self.training or shading == "normal":
            return render
        return replace(render, image=self.colours(render.image))

    @torch.no_grad()
    def show(self, cameras: Cameras, background: Tensor | None, step: int) -> Render:
        """A picture for the eye, with normals: through the prior's decoder if there is one, else by the linear map."""
        if self.prior is None:
            render = self.field.show(cameras, self._behind(background), step)
            return replace(render, image=self.colours(render.image))
        render = self.field.show(cameras, self._behind(background, self._encoded), step)
        return replace(render, image=self._decoded(render.image))

    def density(self, x: Float[Tensor, "N 3"]) -> dict[str, Tensor]:
        """`sigma` [N] (per world unit) and `albedo` [N, 3], colours, at points of the box."""
        told = self.field.density(x)
        return {**told, "albedo": self.colours(told["albedo"])}

    def _behind(self, background: Tensor | None, encode: Any = None) -> Tensor | None:
        """A background of colours as latents (a plain one by `encode`, if given); None is the background network, else white."""
        if background is None:
            if self.field.background_network is not None:
                return None
            background = torch.ones(3)
        if background.shape[-1] != 3:
            return background
        return encode(background) if encode and background.dim() == 1 else self.colours.inverse(background)

    def _encoded(self, colour: Float[Tensor, "3"]) -> Float[Tensor, "C"]:
        """What the prior's encoder makes of a plain picture: in the decoder a nearly white background would show."""
        key = tuple(colour.tolist())
        if key not in self._plain:
            picture = colour.to(self.colours.weight).reshape(1, 3, 1, 1).expand(1, 3, *[self.prior.image_size] * 2)
            generator = torch.Generator(picture.device).manual_seed(0)
            quarter = self.prior.latent_size // 4
            inside = slice(quarter, max(quarter + 1, self.prior.latent_size - quarter))
            self._plain[key] = self.prior.encode(picture, generator)[0, :, inside, inside].mean((1, 2))
        return self._plain[key]

    def _decoded(self, latents: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W 3"]:
        height, width = latents.shape[1:3]
        share = min(1.0, FINER * self.prior.latent_size / max(height, width))
        small = _resize(latents.permute(0, 3, 1, 2), max(1, round(share * height)), max(1, round(share * width)))
        return _resize(self.prior.decode(small), height, width).permute(0, 2, 3, 1)


class Adapter(NeRFRenderer):
    """A field of latents whose colours are a linear map of them, clamped to [0, 1], which learns with it; to everybody a field of 3 channels.

    The background is its own, and of colours: that of the latents is left behind.
    """

    def __init__(self, opt: Any, field: nn.Module, colours: Colours):
        """`field`: of latents; loses its occupancy grid and background network. ValueError if the map takes another number of channels."""
        super().__init__(opt, 3)
        _check_channels(field, colours)
        field.occupancy = field.background_network = None
        self.field, self.colours = field, colours.requires_grad_(True)

    @classmethod
    def from_latent(cls, opt: Any, values: dict[str, Tensor], path: Path) -> "Adapter":
        """It begins as the field and the map in `values`, a checkpoint's scene; that of an `Adapter` brings its background too.

        UserError, naming `path`, if the field does not fit the options.
        """
        adapter = cls(opt, *_parts(opt, values))
        behind, left = "background_network.", ("field.occupancy.", "field.background_network.")
        known = {k: v for k, v in values.items() if k.startswith(("colours.", "field.")) and not k.startswith(left)}
        for name, value in adapter.state_dict().items():
            if name.startswith(("occupancy.", behind)):
                known[name] = values.get(name, value) if name.startswith(behind) else value
        checkpoint.load_scene(adapter, known, path)
        return adapter

    @property
    def encoder(self) -> nn.Module:
        return self.field.encoder

    def query(
        self, x: Float[Tensor, "M 3"], normals: bool = False
    ) -> tuple[Float[Tensor, "M"], Float[Tensor, "M 3"], Float[Tensor, "M 3"] | None]:
        """Density, albedo and, if asked for, unit normals."""
        sigma, latents, normal = self.field.query(x, normals)
        return sigma, self.colours(latents), normal

    def colour(self, x: Float[Tensor, "M 3"]) -> tuple[Float[Tensor, "M 3"], Float[Tensor, "M W"]]:
        """Albedo, and the features that its latents are made from."""
        latents, hidden = self.field.colour(x)
        return self.colours(latents), hidden

    def sigma(self, x: Float[Tensor, "M 3"]) -> Float[Tensor, "M"]:
        """The density alone."""
        return self.field.sigma(x)

    def density(self, x: Float[Tensor, "N 3"]) -> dict[str, Tensor]:
        """`sigma` [N] (per world unit) and `albedo` [N, 3] at points of the box."""
        sigma, albedo, _ = self.query(x)
        return {"sigma": sigma, "albedo": albedo}

    def normal(self, x: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        """Unit normals at points of the box."""
        return self.field.normal(x)

    def set_progress(self, ratio: float) -> None:
        self.field.set_progress(ratio)

    def parameter_groups(self, lr: float) -> list[dict]:
        """The field's groups, the map as `material`, the background."""
        groups = [*self.field.parameter_groups(lr), {"name": "material", "params": list(self.colours.parameters())}]
        if self.background_network is not None:
            groups.append({"name": "background", "params": list(self.background_network.parameters())})
        return [{"lr": lr, **group} for group in groups]


def decode_with(scene: nn.Module, prior: Any) -> None:
    """From now on every `Latent` in `scene` is shown through this prior's decoder.

    prior: anything with `decode` (latents [B, C, h, w] to pictures [B, 3, H, W] in [0, 1]), `encode` (the inverse, with a generator),
    `image_size` and `latent_size`, what it was trained on.
    """
    for part in scene.modules():
        if isinstance(part, Latent):
            part.prior = prior


def holds_latents(values: dict[str, Tensor]) -> bool:
    """Whether a checkpoint's scene is a `Latent` or an `Adapter`."""
    return "colours.weight" in values


def continued(opt: Any, values: dict[str, Tensor], path: Path) -> nn.Module:
    """The scene that goes on from `values`, a checkpoint's scene with latents in it: with `--latent` the same, else an `Adapter`.

    UserError, naming `path`, if the options are those of another scene.
    """
    if not opt.latent:
        return Adapter.from_latent(opt, values, path)
    scene = Latent(*_parts(opt, values))
    own = {name: value for name, value in scene.state_dict().items() if name.startswith("field.occupancy.")}
    known = {name: value for name, value in values.items() if not name.startswith("field.occupancy.")}
    checkpoint.load_scene(scene, known | own, path)
    return scene


def _parts(opt: Any, values: dict[str, Tensor]) -> tuple[nn.Module, Colours]:
    """A blank field with as many channels as the map in `values` takes, and that map."""
    weight = values["colours.weight"]
    return build_field(opt, weight.shape[1]), Colours(weight.T, values["colours.bias"])


def _check_channels(field: nn.Module, colours: Colours) -> None:
    if field.channels != colours.in_features:
        raise ValueError(f"the field has {field.channels} channels, the map to colours takes {colours.in_features}")


def _resize(picture: Float[Tensor, "B C h w"], height: int, width: int) -> Float[Tensor, "B C H W"]:
    if picture.shape[2:] == (height, width):
        return picture
    return F.interpolate(picture, (height, width), mode="bilinear", align_corners=False, antialias=True)
