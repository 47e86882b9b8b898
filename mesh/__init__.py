"""The scene as a surface: `extract` finds it in a density field, `unwrap` and `bake` give it textures, `export` writes it, `files` reads one."""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int

TEXTURES = ("albedo", "roughness", "metallic", "normal")


@dataclass(frozen=True)
class Mesh:
    """Triangles in the scene's world (right-handed, y up, front +z), counter-clockwise seen from outside.

    `colors` are the values of the rendered picture, in [0, 1]; `normals` are unit and point outward. Texture coordinates are glTF's: (0, 0) is
    the top left corner of the picture, u right, v down; `uv_faces` says which of `uvs` each corner of `faces` has. `textures`, floats in
    [0, 1]: "albedo" [h w 3] (sRGB-coded, as rendered), "roughness" and "metallic" [h w], "normal" [h w 3], which is (n + 1) / 2 of the normal
    in the tangent frame of `mesh.tangents`. Where there is an albedo texture it is what is shown, not `colors`. ValueError if parts contradict.
    """

    vertices: Float[np.ndarray, "V 3"]
    faces: Int[np.ndarray, "F 3"]
    colors: Float[np.ndarray, "V 3"] | None
    normals: Float[np.ndarray, "V 3"]
    uvs: Float[np.ndarray, "T 2"] | None = None
    uv_faces: Int[np.ndarray, "F 3"] | None = None
    textures: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = np.linalg.norm(self.normals, axis=1)
        if np.abs(lengths - 1).max(initial=0) > 1e-3:
            raise ValueError("the normals are not unit: were colours given in their place?")
        if self.faces.size and (self.faces.min() < 0 or self.faces.max() >= len(self.vertices)):
            raise ValueError("a face names a vertex that does not exist")
        if (self.uvs is None) != (self.uv_faces is None) or (self.textures and self.uvs is None):
            raise ValueError("uvs and uv_faces belong together, and textures need both")
        if self.uvs is not None and self.uv_faces.size and self.uv_faces.max() >= len(self.uvs):
            raise ValueError("a face names a uv that does not exist")
        for name, picture in self.textures.items():
            if name not in TEXTURES or picture.shape[2:] != ((3,) if name in ("albedo", "normal") else ()):
                raise ValueError(f"no texture is called {name} and has the shape {picture.shape}")
