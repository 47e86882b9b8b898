"""What a scene begins as: new, or what an earlier run made (`--init_with`)."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from errors import UserError, say
from nerf import build_field, checkpoint
from nerf.latent import CHANNELS, Latent, colours_of, continued, holds_latents


def build_field_scene(opt: Any, channels: int, model: Path | None) -> nn.Module:
    """A field: of colours, with `--latent` of latents, or of what was latents in the run that it starts from.

    `model`: the prior's folder, which tells how its latents become colours. UserError where `--init_with` names nothing that fits.
    """
    found = own(opt)  # what a resumed run was is seen in its own checkpoint
    start = found or (earlier(opt) if opt.init_with else None)
    if start is not None and holds_latents(start[0]):
        return continued(opt, *start)
    if opt.latent:
        return Latent(build_field(opt, CHANNELS), colours_of(model))
    field = build_field(opt, channels)
    if start is not None and found is None:
        if any(name.startswith("geometry.") for name in start[0]):
            raise UserError(f"--init_with {opt.init_with}: that run trained a surface; add --dmtet")
        if opt.backbone == "sdf" and "sharpness" not in start[0]:
            _grow_around(opt, field, *start)
        else:
            checkpoint.load_scene(field, fitting(start[0], field), start[1])
    return field


def _grow_around(opt: Any, field: nn.Module, values: dict[str, Tensor], path: Path) -> None:
    """A signed distance that begins as the surface and the colours of another run's field of densities."""
    from mesh.start import surface_of_field
    from mesh.texture import fit_colours

    other = build_field(SimpleNamespace(**{**vars(opt), "backbone": _backbone_of(path)}), field.channels)
    checkpoint.load_scene(other, fitting(values, other), path)
    mesh = surface_of_field(opt, other)
    field.begin_as(mesh.vertices, mesh.faces)
    fit_colours(field, mesh, seeded(opt))


def _backbone_of(checkpoint_file: Path) -> str:
    from layers import SAVED, read_config

    folder = checkpoint_file.parent.parent
    return read_config(folder / SAVED)[1].get("backbone", "grid")


def own(opt: Any) -> tuple[dict[str, Tensor], Path] | None:
    """The scene's tensors in the checkpoint that this run goes on from, and its file; None if it begins anew."""
    folder = Path(opt.workspace) / "checkpoints"
    if not checkpoint.expected(folder, opt.ckpt):
        return None
    state, path = checkpoint.choose(folder, opt.ckpt)
    return _first(state["scene"]), path


def earlier(opt: Any) -> tuple[dict[str, Tensor], Path]:
    """The same of the run that `--init_with` names, with averaged parameters: what that run showed. Of several particles the first."""
    path = Path(opt.init_with)
    if not path.exists():
        raise UserError(f"--init_with {path}: no such folder or file; name a workspace, a checkpoint in it, or a mesh")
    found = checkpoint.choose(path / "checkpoints", "latest") if path.is_dir() else (checkpoint.read(path), path)
    if found is None:
        raise UserError(f"--init_with {path}: no checkpoint there; train that run first")
    state, path = found
    values = {**state["scene"], **state["average"]["average"]}
    say(f'--init_with: from {path}, "{state["text"]}", step {state["step"]}')
    return _first(values), path


def _first(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of several particles the first."""
    first = "scenes.0."
    return {name.removeprefix(first): value for name, value in values.items() if name.startswith(first)} or values


def fitting(values: dict[str, Tensor], field: nn.Module) -> dict[str, Tensor]:
    """Values for a field without the occupancy grid, which either may lack, and with its own background where they have none."""
    beside = ("occupancy.", "background_network.")
    mine = {name: value for name, value in field.state_dict().items() if name.startswith(beside)}
    given = {name: value for name, value in values.items() if not name.startswith("occupancy.")}
    behind = {name for name in given if name.startswith("background_network.")}
    if {name for name in mine if name.startswith("background_network.")} != behind:
        given = {name: value for name, value in given.items() if name not in behind}
    return {**mine, **given}


def seeded(opt: Any) -> torch.Generator:
    """For random choices while a scene is made."""
    return torch.Generator().manual_seed(opt.seed)
