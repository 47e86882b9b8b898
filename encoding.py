"""One door to the encodings: a name and numbers in, a module and the width of its output out."""

from typing import Any

from torch import nn

NAMES = ("none", "frequency", "sphere_harmonics", "hashgrid", "tiledgrid")


class Identity(nn.Identity):
    """Passes x on; takes and ignores what other encoders take (`bound`, `max_level`)."""

    def forward(self, x: Any, **_: Any) -> Any:
        return x


def get_encoder(
    name: str,
    input_dim: int = 3,
    multires: int = 6,
    degree: int = 4,
    num_levels: int = 16,
    level_dim: int = 2,
    base_resolution: int = 16,
    log2_hashmap_size: int = 19,
    desired_resolution: int = 2048,
    align_corners: bool = False,
    interpolation: str = "linear",
) -> tuple[nn.Module, int]:
    """An encoder of points with `input_dim` coordinates, and how many numbers it makes of one.

    Args:
        name: 'none', 'frequency' (`multires` bands), 'sphere_harmonics' (`degree`), 'hashgrid' or 'tiledgrid' (the rest).
    Raises:
        ValueError: unknown name; the text lists those there are.
    """
    if name == "none":
        return Identity(), input_dim
    if name == "frequency":
        from freqencoder import FreqEncoder

        encoder: Any = FreqEncoder(input_dim, degree=multires)
    elif name == "sphere_harmonics":
        from shencoder import SHEncoder

        encoder = SHEncoder(input_dim, degree=degree)
    elif name in ("hashgrid", "tiledgrid"):
        from gridencoder import GridEncoder

        encoder = GridEncoder(
            input_dim=input_dim,
            num_levels=num_levels,
            level_dim=level_dim,
            base_resolution=base_resolution,
            log2_hashmap_size=log2_hashmap_size,
            desired_resolution=desired_resolution,
            gridtype=name.removesuffix("grid"),
            align_corners=align_corners,
            interpolation=interpolation,
        )
    else:
        raise ValueError(f"unknown encoding {name!r}: choose one of {', '.join(NAMES)}")
    return encoder, encoder.output_dim
