"""What a mesh scene begins as: a shape, a mesh file, or what an earlier run made."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errors import UserError, say
from files import is_mesh_file
from mesh import Mesh
from mesh.geometry import Fixed, Tetrahedral
from mesh.scene import MeshScene
from mesh.texture import PhysicalHead, fit_colours
from nerf import build_field, checkpoint
from nerf.latent import Adapter, holds_latents
from nerf.renderer import NeRFRenderer
from nerf.results import extract_mesh
from nerf.start import earlier, fitting, own, seeded

SIZE = 0.7  # distance from the origin to the farthest point of a mesh file, in world units: what cameras see whole
MARGIN = 0.1  # room for growth around the object, world units
WARM_UP = 16  # updates of the occupancy grid before an earlier run's field is looked at


def build_mesh_scene(opt: Any, channels: int = 3, device: torch.device | str = "cpu") -> MeshScene:
    """The scene of `--dmtet` as it begins, on the CPU; a blank one if a checkpoint of the workspace is going to be loaded into it.

    Raises UserError where `--init_with` names nothing usable.
    """
    resumed = own(opt)
    run = opt.init_with is not None and not is_mesh_file(opt.init_with)
    start = resumed or (earlier(opt) if run else None)
    field = _field(opt, channels, start)
    head, environment = None, None
    if opt.material == "pbr":
        from mesh.environment import load_environment

        head = PhysicalHead(field.colour(torch.zeros(1, 3))[1].shape[1])
        environment = load_environment(opt.environment, opt.environment_scale, opt.environment_rotation)
    if resumed is not None:
        geometry = Fixed() if opt.lock_geo else Tetrahedral(opt.tet_grid_size, torch.full((3,), float(opt.bound)))
    elif opt.init_with is None:
        geometry = _shaped(opt)
        geometry = _locked(geometry) if opt.lock_geo else geometry
    elif is_mesh_file(opt.init_with):
        mesh = _placed(opt)
        geometry = _geometry(opt, mesh)
        _paint(field, mesh, opt)
    else:
        geometry = _continued(opt, field, head, device, *start)
    scene = MeshScene(opt, field, geometry, head, environment)
    scene.blank = resumed is not None
    return scene


def _shaped(opt: Any) -> Tetrahedral:
    """`--shape_init`, in a grid that fills the scene's box."""
    from mesh.shapes import shape_sdf

    sdf = shape_sdf(opt.shape_init, float(opt.bound))
    geometry = Tetrahedral(opt.tet_grid_size, torch.full((3,), float(opt.bound)))
    geometry.fill(sdf(geometry.nodes))
    if len(geometry().faces) == 0:
        raise UserError(f"--shape_init {opt.shape_init}: nothing of it lies inside the scene (--bound {opt.bound:g})")
    return geometry


def _locked(geometry: Tetrahedral) -> Fixed:
    """Its surface as it is now."""
    with torch.no_grad():
        surface = geometry()
    return Fixed(surface)


def _placed(opt: Any) -> Mesh:
    """The mesh file; one that is not around the origin, or too large or small for the cameras, is moved and scaled, and a line says so."""
    from mesh.files import load_mesh
    from mesh.repair import normalise

    mesh = load_mesh(Path(opt.init_with))
    reach = float((mesh.vertices**2).sum(1).max() ** 0.5)
    if not 0.5 * SIZE <= reach <= min(1.3 * SIZE, opt.bound):
        mesh = normalise(mesh, SIZE)
        say(
            f"--init_with {opt.init_with}: centred, and scaled so that it reaches {SIZE:g} from the origin (was {reach:.3g})"
        )
    return mesh


def _geometry(opt: Any, mesh: Mesh) -> Tetrahedral | Fixed:
    """The mesh itself, or tetrahedra around it."""
    if opt.lock_geo:
        return Fixed(mesh)
    from mesh.shapes import mesh_sdf

    reach = torch.as_tensor(abs(mesh.vertices).max(0)).float() + MARGIN
    geometry = Tetrahedral(opt.tet_grid_size, reach.clamp(max=float(opt.bound)))
    geometry.fill(mesh_sdf(mesh.vertices, mesh.faces)(geometry.nodes))
    if len(geometry().faces) == 0:
        raise UserError(
            f"--init_with {opt.init_with}: too thin for a grid of {opt.tet_grid_size} cells: more --tet_grid_size, or --lock_geo"
        )
    return geometry


def _paint(field: NeRFRenderer, mesh: Mesh, opt: Any) -> None:
    error = fit_colours(field, mesh, seeded(opt))
    if error > 0.1:
        say(f"the field follows the mesh's own colours only roughly (mean error {error:.2f}): more --log2_hashmap_size")


def _field(opt: Any, channels: int, start: tuple[dict[str, Tensor], Path] | None) -> NeRFRenderer:
    """A blank field of colours; where `start`, an earlier checkpoint, has latents, they and the map that makes colours of them."""
    if start is not None:
        values, path = start
        values = _part(values, "field") if any(name.startswith("geometry.") for name in values) else values
        if holds_latents(values):
            return Adapter.from_latent(opt, values, path)
    return build_field(opt, channels)


def _part(values: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one part of a scene, by their names in it."""
    start = f"{name}."
    return {key.removeprefix(start): value for key, value in values.items() if key.startswith(start)}


def _continued(
    opt: Any,
    field: NeRFRenderer,
    head: PhysicalHead | None,
    device: torch.device | str,
    values: dict[str, Tensor],
    path: Path,
) -> Tetrahedral | Fixed:
    """What an earlier run made: its field into `field`, its surface into the geometry that is returned."""
    if any(name.startswith("geometry.") for name in values):
        return _from_surface(opt, values, field, head, path)
    if not holds_latents(values):
        checkpoint.load_scene(field, fitting(values, field), path)
    mesh = surface_of_field(opt, field.to(device), device)
    field.cpu()
    _paint(field, mesh, opt)
    return _geometry(opt, mesh)


def surface_of_field(opt: Any, field: NeRFRenderer, device: torch.device | str = "cpu") -> Mesh:
    """The surface of a field, coloured."""
    generator = torch.Generator(device).manual_seed(opt.seed)
    field.eval()
    with torch.no_grad():
        for step in range(WARM_UP if field.occupancy is not None else 0):
            field.update_occupancy(step, generator)
        found = extract_mesh(field, opt, 0, say)
    field.train()
    if found is None:
        raise UserError(f"--init_with {opt.init_with}: that run's scene is empty; train it anew")
    return found[0]


def _from_surface(
    opt: Any, values: dict[str, Tensor], field: NeRFRenderer, head: PhysicalHead | None, path: Path
) -> Tetrahedral | Fixed:
    """Another mesh run's surface, locked or not."""
    if not holds_latents(_part(values, "field")):
        checkpoint.load_scene(field, fitting(_part(values, "field"), field), path)
    if head is not None and _part(values, "head"):
        head.load_state_dict(_part(values, "head"))
    own = _part(values, "geometry")
    before = Fixed() if "faces" in own else Tetrahedral(opt.tet_grid_size, own["reach"])
    before.adapt(own)
    before.load_state_dict(own)
    if isinstance(before, Fixed) == opt.lock_geo:
        return before
    locked = _locked(before)
    return locked if opt.lock_geo else _geometry(opt, locked.mesh())
