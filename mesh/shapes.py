"""Signed distances (negative inside) to start a surface from: simple bodies by name, and any triangle mesh."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from errors import UserError

Distance = Callable[[Float[Tensor, "N 3"]], Float[Tensor, "N"]]  # points -> signed distance, in the points' unit

SHAPES = {  # name: its numbers, all lengths; cylinder, capsule and torus turn around the y axis
    "sphere": ("radius",),
    "ellipsoid": ("x", "y", "z"),  # half axes
    "box": ("x", "y", "z"),  # half sides
    "cylinder": ("radius", "half_height"),
    "capsule": ("radius", "half_height"),  # half the distance between the centres of its two round ends
    "torus": ("ring_radius", "tube_radius"),
}


def shape_sdf(text: str, limit: float = 1.0) -> Distance:
    """The signed distance of the shape that `text` names, as "sphere 0.5" or "box 0.3 0.5 0.3", centred at the origin.

    Exact everywhere, the ellipsoid's too (found by iteration, to 1e-8). UserError naming --shape_init for an unknown shape, for the wrong
    numbers, and for a shape that reaches farther than `limit` from the origin along an axis.
    """
    name, *words = text.replace(",", " ").split() or [""]
    known = " | ".join(" ".join((shape, *numbers)) for shape, numbers in SHAPES.items())
    if name not in SHAPES:
        raise UserError(f"--shape_init {text}: no such shape; choose one of {known}")
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        raise UserError(f"--shape_init {text}: lengths are numbers; choose one of {known}") from None
    if len(numbers) != len(SHAPES[name]):
        needed = len(SHAPES[name])
        raise UserError(f"--shape_init {text}: {name} takes {needed} number{'s'[: needed > 1]}; choose one of {known}")
    if not all(0 < number < float("inf") for number in numbers):
        raise UserError(f"--shape_init {text}: lengths are above 0; choose one of {known}")
    function, reach = {
        "sphere": (_sphere, numbers[0]),
        "ellipsoid": (_ellipsoid, max(numbers)),
        "box": (_box, max(numbers)),
        "cylinder": (_cylinder, max(numbers)),
        "capsule": (_capsule, sum(numbers)),
        "torus": (_torus, sum(numbers)),
    }[name]
    if reach >= limit:
        raise UserError(
            f"--shape_init {text}: reaches {reach:g} from the origin; keep it below {limit:g}, the grid's edge"
        )
    return lambda points: function(points, *numbers)


def _sphere(p: Float[Tensor, "N 3"], radius: float) -> Float[Tensor, "N"]:
    return p.norm(dim=1) - radius


def _box(p: Float[Tensor, "N 3"], x: float, y: float, z: float) -> Float[Tensor, "N"]:
    return _corner(p.abs() - p.new_tensor([x, y, z]))


def _cylinder(p: Float[Tensor, "N 3"], radius: float, height: float) -> Float[Tensor, "N"]:
    return _corner(torch.stack([p[:, ::2].norm(dim=1) - radius, p[:, 1].abs() - height], 1))


def _capsule(p: Float[Tensor, "N 3"], radius: float, height: float) -> Float[Tensor, "N"]:
    along = (p[:, 1].abs() - height).clamp(min=0)
    return torch.stack([p[:, 0], along, p[:, 2]], 1).norm(dim=1) - radius


def _torus(p: Float[Tensor, "N 3"], ring: float, tube: float) -> Float[Tensor, "N"]:
    return torch.stack([p[:, ::2].norm(dim=1) - ring, p[:, 1]], 1).norm(dim=1) - tube


def _corner(excess: Float[Tensor, "N d"]) -> Float[Tensor, "N"]:
    """The signed distance to the corner at 0 of d right angles, from how far a point is beyond each side."""
    return excess.clamp(min=0).norm(dim=1) + excess.amax(1).clamp(max=0)


def _ellipsoid(p: Float[Tensor, "N 3"], x: float, y: float, z: float) -> Float[Tensor, "N"]:
    """The distance to the closest point c with c_i = e_i^2 p_i / (t + e_i^2) and t such that c lies on the surface (Eberly).

    With s = t + min e^2 that is the largest root of f(s) = sum (e_i p_i / (s + e_i^2 - min e^2))^2 - 1: convex and falling for s > 0, so
    Newton's method climbs to it from the left and never oversteps.
    """
    half = torch.tensor([x, y, z], dtype=torch.float64, device=p.device)
    q = (
        p.detach().double().abs().clamp(min=1e-9)
    )  # moves a point by less than 2e-9, and keeps it off the planes where s -> 0
    rise = half.square() - half.min() ** 2
    s = (half * q - rise).amax(1)  # there one term alone is 1
    for _ in range(60):
        terms = (half * q / (s[:, None] + rise)).square()
        step = (terms.sum(1) - 1) / (2 * (terms / (s[:, None] + rise)).sum(1))
        s = s + step
        if bool((step <= 1e-13 * s).all()):
            break
    closest = (half.square() * q / (s[:, None] + rise)).to(p.dtype)
    sign = ((q / half).square().sum(1) - 1).sign().to(p.dtype)
    return sign * (p.abs() - closest).norm(dim=1)


def mesh_sdf(vertices: Float[np.ndarray, "V 3"], faces: Int[np.ndarray, "F 3"]) -> Distance:
    """The signed distance to a triangle mesh; points come back on the device and in the type they had, without gradient.

    Inside is where the generalised winding number (Barill et al. 2018) is above 1/2 in size: that closes holes smoothly, and bears
    duplicate, crossing and degenerate triangles and a mesh that is inside out as a whole. A sheet has no inside. UserError without libigl.
    """
    try:
        import igl
    except ImportError:
        raise UserError("--init_with: a mesh as a start needs the package libigl; pip install libigl") from None
    v = np.ascontiguousarray(vertices, np.float64)
    f = np.ascontiguousarray(faces, np.int64)

    def distance(points: Float[Tensor, "N 3"]) -> Float[Tensor, "N"]:
        if not len(points):
            return points[:, 0]
        p = np.ascontiguousarray(points.detach().cpu().numpy(), np.float64)
        # Asked for both at once libigl scales the distance by 1 - 2 w, which is no distance where a hole makes w a fraction.
        far = igl.signed_distance(p, v, f, sign_type=igl.SIGNED_DISTANCE_TYPE_UNSIGNED)[0]
        inside = np.abs(igl.fast_winding_number(v, f, p)) > 0.5
        return torch.from_numpy(np.where(inside, -far, far)).to(points)

    return distance
