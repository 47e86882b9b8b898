"""The scene as a surface: `extract` finds it in a density field, `export` writes it."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True)
class Mesh:
    """Triangles in the scene's world (right-handed, y up, front +z), counter-clockwise seen from outside.

    `colors` are the values of the rendered picture, in [0, 1]; `normals` are unit and point outward.
    """

    vertices: Float[np.ndarray, "V 3"]
    faces: Int[np.ndarray, "F 3"]
    colors: Float[np.ndarray, "V 3"]
    normals: Float[np.ndarray, "V 3"]
