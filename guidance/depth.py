"""What networks guess of a photograph: how far everything is, and which way surfaces face."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from errors import UserError
from guidance.parts import part_source, read_part
from guidance.weights import quiet

DEPTH_MODEL = "depth-anything/Depth-Anything-V2-Small-hf"
NORMAL_MODEL = "prs-eth/marigold-normals-v1-1"
KINDS = ("depth_anything", "dpt", "glpn", "zoedepth", "depth_pro")
_METRIC = ("glpn", "zoedepth", "depth_pro")  # distances; the others answer with something that grows towards the viewer
_METRIC_DATA = ("nyu", "kitti", "metric")  # in the names of DPT models that were trained on distances


class DepthModel:
    """A transformers model for depth, from a hub id or a folder: Depth Anything, DPT (MiDaS), GLPN, ZoeDepth, Depth Pro."""

    def __init__(self, key: str = DEPTH_MODEL, device: torch.device | str = "cpu", larger: str = "auto"):
        """larger: whether larger numbers of the model are "nearer" or "farther"; "auto" goes by its kind. UserError if it cannot be had."""
        flag = f"--depth_model {key}"
        with quiet():
            from transformers import AutoImageProcessor, AutoModelForDepthEstimation

        self.device, source = torch.device(device), part_source(key, DEPTH_MODEL, flag)
        try:
            self.model = read_part(AutoModelForDepthEstimation, source, torch.float32)
        except UserError as error:
            raise UserError(f"{error}; or do without: --no_depth") from None
        self.model = self.model.requires_grad_(False).eval().to(self.device)
        kind = self.model.config.model_type
        if kind not in KINDS:
            raise UserError(f"{flag}: is a {kind} model; what can be used: {', '.join(KINDS)}")
        try:
            with quiet():
                self.processor = AutoImageProcessor.from_pretrained(source.path_or_id, local_files_only=source.local)
        except Exception as error:  # broken or missing files fail in many ways
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{flag}: no preprocessor_config.json can be read: {reason}") from error
        self.nearer = larger == "nearer" if larger != "auto" else _grows_towards_viewer(self.model.config, key)

    @torch.no_grad()
    def __call__(self, rgb: Float[Tensor, "H W 3"]) -> Float[Tensor, "H W 1"]:
        """Depths of a picture in [0, 1], larger is farther, up to scale and shift.

        Of a model of inverse distances the negative: for an object whose depth is small against its distance the two go in a line.
        """
        height, width = rgb.shape[:2]
        with quiet():
            inputs = self.processor(images=(rgb * 255).round().byte().numpy(), return_tensors="pt").to(self.device)
            answer = self.model(**inputs)
            sizes: dict[str, Any] = {"target_sizes": [(height, width)]}
            if self.model.config.model_type == "zoedepth":  # it was padded
                sizes["source_sizes"] = [(height, width)]
            depth = self.processor.post_process_depth_estimation(answer, **sizes)[0]["predicted_depth"]
        depth = depth.float().cpu().reshape(height, width, 1)
        return -depth if self.nearer else depth


def _grows_towards_viewer(config: Any, key: str) -> bool:
    if config.model_type in _METRIC or getattr(config, "depth_estimation_type", "relative") == "metric":
        return False
    return not any(word in str(key).lower() for word in _METRIC_DATA)


class NormalModel:
    """Marigold's diffusion model of normals (Ke et al. 2024), from a hub id or a folder in diffusers' layout."""

    def __init__(self, key: str = NORMAL_MODEL, device: torch.device | str = "cpu", steps: int = 4):
        flag = f"--normal_model {key}"
        source = part_source(key, NORMAL_MODEL, flag)
        try:
            with quiet():
                from diffusers import MarigoldNormalsPipeline

                self.pipe = MarigoldNormalsPipeline.from_pretrained(
                    source.path_or_id, local_files_only=source.local, dtype=torch.float32
                ).to(device)
        except Exception as error:  # broken or missing files fail in many ways
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"{flag}: cannot be read as a MarigoldNormalsPipeline: {reason}; name a local folder, or leave the flag "
                "out: normals then follow from the depth"
            ) from error
        self.pipe.set_progress_bar_config(disable=True)
        self.steps = steps

    @torch.no_grad()
    def __call__(self, rgb: Float[Tensor, "H W 3"]) -> Float[Tensor, "H W 3"]:
        """Unit normals of a picture in [0, 1]: x right, y up, z towards the viewer. The same every time."""
        found = self.pipe(
            rgb.permute(2, 0, 1)[None],
            num_inference_steps=self.steps,
            generator=torch.Generator(self.pipe.device).manual_seed(0),
            output_type="pt",
        ).prediction
        return F.normalize(found[0].permute(1, 2, 0).float().cpu(), dim=-1)
