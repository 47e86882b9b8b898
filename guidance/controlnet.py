"""Stable Diffusion with a ControlNet: the prior also sees the scene's own normals, depth or edges, and keeps to them."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from errors import UserError
from guidance.canny import canny
from guidance.parts import part_source, read_part
from guidance.prior import Hints, resize
from guidance.stable_diffusion import StableDiffusion
from guidance.weights import Source
from schedule import Schedule, value_at

HUB_CONTROLNETS = {  # for Stable Diffusion 1.5, by what they see
    "normal": "lllyasviel/control_v11p_sd15_normalbae",
    "depth": "lllyasviel/control_v11f1p_sd15_depth",
    "canny": "lllyasviel/control_v11p_sd15_canny",
}
WANTED = {  # the hints that each needs, or `control` in place of them
    "normal": ("normal", "alpha", "c2w", "control"),
    "depth": ("depth", "alpha", "control"),
    "canny": ("picture", "control"),
}
FARTHEST = 0.2  # grey of the farthest point in a picture of depth: nearer than the background, which is black


def control_source(which: str, key: str | None = None) -> Source:
    """Where the ControlNet lies that `--control which` and `--control_key key` (a folder or hub id) ask for; touches no network."""
    flag = f"--control_key {key}" if key else f"--control {which}"
    return part_source(key, HUB_CONTROLNETS[which], flag)


class ControlNet(StableDiffusion):
    """A frozen Stable Diffusion and a ControlNet that adds to what the denoiser feels at every resolution (Zhang et al. 2023).

    `which`: what the ControlNet sees, see `control_picture`. `scale`: the strength of what it adds, a number or a schedule; may be set at
    any time; at 0 it is not run at all. `controlnet`: the network. The hint `control` [B, 3, k, k], if given, is shown to it as it is.
    """

    controlnet: torch.nn.Module
    which: str
    scale: float | Schedule

    @classmethod
    def load(
        cls,
        source: Source,
        control_source: Source,
        which: str,
        scale: float | Schedule = 1.0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "ControlNet":
        """Reads the model from `source` and the ControlNet from `control_source`.

        Raises UserError if one cannot be read or the two do not belong together.
        """
        from diffusers import ControlNetModel

        prior = super().load(source, device, dtype)
        controlnet = read_part(ControlNetModel, control_source, dtype)
        for name in ("cross_attention_dim", "block_out_channels", "in_channels"):
            its, models = (_plain(network.config[name]) for network in (controlnet, prior.denoiser))
            if its != models:
                raise UserError(
                    f"{control_source.flag}: the ControlNet does not belong to {source.name} ({name} {its} instead of {models}); "
                    "the usual ones are for --sd_version 1.5, others are named with --control_key"
                )
        prior.controlnet = controlnet.requires_grad_(False).eval().to(prior.device)
        prior.which, prior.scale, prior.wants = which, scale, WANTED[which]
        return prior

    @property
    def control_size(self) -> int:
        """Pixels a side of what the ControlNet looks at."""
        return self.latent_size * 2 ** (len(self.controlnet.config.conditioning_embedding_out_channels) - 1)

    def predict(
        self,
        noisy: Float[Tensor, "B C h w"],
        t: Int[Tensor, "B"],
        embedding: Float[Tensor, "B L D"],
        hints: Hints | None = None,
    ) -> Float[Tensor, "B C h w"]:
        """See `Prior.predict`; needs the hints that `control_picture` needs. Raises ValueError if they are missing."""
        return super().predict(noisy, t, embedding, self._seen(hints))

    def ask(
        self,
        noisy: Float[Tensor, "B C h w"],
        t: Int[Tensor, "B"],
        wordings: list[Float[Tensor, "B L D"]],
        hints: Hints | None = None,
    ) -> list[Float[Tensor, "B C h w"]]:
        """See `Prior.ask`; the control picture is made once for all wordings."""
        return super().ask(noisy, t, wordings, self._seen(hints))

    def denoise(self, noisy: Tensor, t: Tensor, embedding: Tensor, hints: Hints) -> Tensor:
        scale = value_at(self.scale, self.step)
        if not scale:
            return super().denoise(noisy, t, embedding, hints)
        noisy, embedding, control = (x.to(self.dtype) for x in (noisy, embedding, self._seen(hints)["control"]))
        down, middle = self.controlnet(noisy, t, embedding, control, conditioning_scale=scale, return_dict=False)
        return self.denoiser(
            noisy, t, embedding, down_block_additional_residuals=down, mid_block_additional_residual=middle
        ).sample

    def _seen(self, hints: Hints | None) -> Hints:
        hints = hints or {}
        if not value_at(self.scale, self.step):
            return {}
        if "control" not in hints:
            return {"control": control_picture(self.which, hints, self.control_size)}
        return {"control": hints["control"]}


@torch.no_grad()
def control_picture(which: str, hints: Hints, size: int) -> Float[Tensor, "B 3 k k"]:
    """What the ControlNet for `which` is shown: pictures of size x size in [0, 1]. Raises ValueError if a hint is missing.

    - normal (hints c2w, normal, alpha): red, green, blue = (n + 1) / 2 of the unit normal n seen from the camera, with the axes of Bae's
      estimator and of ScanNet, on whose pictures the ControlNet was trained: x to the LEFT, y up, z towards the camera. (An OpenGL
      camera's normal with x negated.) The background is a wall that faces the camera, (0.5, 0.5, 1).
    - depth (hints depth, alpha): inverse distance, from `FARTHEST` at the farthest visible point of each picture to 1 at the nearest;
      the background is 0. The hint is the sum of weight x distance: alpha is divided out. Only where alpha > 1/2 is anything visible;
      a scene that is fainter everywhere shows its alpha.
    - canny (hint picture): white edges on black, found at the size that is asked for.
    """
    if which == "normal":
        normal, alpha, c2w = _known(hints, which, "normal", "alpha", "c2w")
        seen = resize(torch.einsum("bij,bhwi->bjhw", c2w[:, :3, :3], normal), size)
        seen = F.normalize(seen, dim=1) * seen.new_tensor([-1.0, 1.0, 1.0])[:, None, None]
        alpha = resize(alpha.permute(0, 3, 1, 2), size).clamp(0, 1)
        wall = seen.new_tensor([0.5, 0.5, 1.0])[:, None, None]
        return alpha * (seen + 1) / 2 + (1 - alpha) * wall
    if which == "depth":
        depth, alpha = _known(hints, which, "depth", "alpha")
        inverse, solid = alpha / depth.clamp(min=1e-6), alpha > 0.5
        ends = {"high": (-torch.inf, torch.amax), "low": (torch.inf, torch.amin)}
        high, low = (end(torch.where(solid, inverse, lost), (1, 2, 3), True) for lost, end in ends.values())
        share = ((inverse - low) / (high - low).clamp(min=1e-9)).clamp(0, 1)
        share = torch.where(high > low, share, torch.ones_like(share))  # or all is at one distance
        grey = alpha.clamp(0, 1) * (FARTHEST + (1 - FARTHEST) * share)
        return resize(grey.permute(0, 3, 1, 2), size).clamp(0, 1).repeat(1, 3, 1, 1)
    if which == "canny":
        (picture,) = _known(hints, which, "picture")
        return canny(resize(picture.permute(0, 3, 1, 2), size)).repeat(1, 3, 1, 1)
    raise ValueError(f"no control is called {which}; there are {', '.join(HUB_CONTROLNETS)}")


def _known(hints: Hints, which: str, *names: str) -> list[Tensor]:
    missing = [name for name in names if name not in hints]
    if missing:
        raise ValueError(f"the ControlNet for {which} cannot see the scene: the hints lack {' and '.join(missing)}")
    return [hints[name].detach().float() for name in names]


def _plain(value) -> object:
    return list(value) if isinstance(value, (list, tuple)) else value
