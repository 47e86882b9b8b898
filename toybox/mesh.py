"""An object of the toybox as a mesh file, to retexture, to refine, or to guide a sketch.

python -m toybox.mesh car --out car.glb                    in its own color
python -m toybox.mesh car --color grey --out car.obj       plain: every part of it grey
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from errors import UserError, say
from mesh import Mesh
from mesh.bake import bake
from mesh.export import FORMATS, export
from mesh.extract import clean, decimate, vertex_normals
from options import Parser
from toybox.objects import COLORS, OBJECTS, Object
from toybox.render import albedo, sdf

PLAIN = {"grey": (0.5, 0.5, 0.5), "white": (1.0, 1.0, 1.0)}
REACH = 0.84  # of the grid around the object, world units


def object_mesh(obj: Object, resolution: int = 128, faces: int = 12000) -> Mesh:
    """Its surface without colours: marching cubes on the exact distance, at most about `faces` triangles."""
    import mcubes

    axis = torch.linspace(-REACH, REACH, resolution)
    nodes = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    values = torch.cat([sdf(obj, part) for part in nodes.split(1 << 17)]).reshape(3 * (resolution,))
    vertices, triangles = mcubes.marching_cubes(-values.double().numpy(), 0.0)
    vertices, triangles = clean(vertices * (2 * REACH / (resolution - 1)) - REACH, triangles.astype(np.int64))
    if len(triangles) > faces:
        vertices, triangles = decimate(vertices, triangles, faces)
    normals = vertex_normals(vertices, triangles)
    return Mesh(vertices.astype(np.float32), triangles, None, normals.astype(np.float32))


def colored(mesh: Mesh, obj: Object, color: str | None, size: int = 512) -> Mesh:
    """With a texture: in the named colour of the prompts (None: its own), or all over `grey` or `white`."""
    plain = PLAIN.get(color or "")

    def ask(points: torch.Tensor, normals: torch.Tensor) -> dict[str, torch.Tensor]:
        if plain:
            return {"albedo": torch.tensor(plain).expand(len(points), 3)}
        return {"albedo": albedo(obj, points, COLORS[color] if color else obj.default)}

    return bake(mesh, ask, size)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=OBJECTS, metavar="KIND", help=", ".join(OBJECTS))
    parser.add_argument("--color", choices=(*PLAIN, *COLORS), help="default: its own")
    parser.add_argument("--out", type=Path, required=True, help=f"a file that ends in {', '.join(FORMATS)}")
    try:
        args = parser.parse_args(argv)
        if args.out.suffix[1:] not in FORMATS:
            raise UserError(f"--out {args.out}: must end in one of {', '.join(FORMATS)}")
        if args.out.exists():
            raise UserError(f"--out {args.out}: exists already; choose another name, or delete it")
        obj = OBJECTS[args.kind]
        written = export(colored(object_mesh(obj), obj, args.color), args.out.parent, args.kind, [args.out.suffix[1:]])
        for path in written:
            path.rename(args.out)
            say(f"{args.out}: {args.kind}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
