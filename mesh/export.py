"""Mesh files: OBJ, GLB, PLY, USDZ and STL; metres, y up, front +z, counter-clockwise outside.

Colours. A render's values are shown on a screen as they are: they are sRGB-coded, and so are the pictures of colour textures everywhere. OBJ and PLY
readers take vertex colours in that coding too, so they are written unchanged. glTF defines COLOR_0 as *linear* light, which the
viewer codes for the screen (USD's displayColor likewise); written unchanged, everything would look washed out. So those hold decoded
values (`srgb_to_linear`), the GLB in 16 bits because 8 linear bits band in the dark. Materials are matte (metallic 0, roughness 1, white)
where no texture says otherwise: lit evenly, a viewer shows the colours of the albedo render.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from errors import UserError, say
from files import atomic
from mesh import Mesh
from mesh.pictures import png
from mesh.srgb import linear_to_srgb, srgb_to_linear
from mesh.write_gltf import write_glb

__all__ = ["FORMATS", "export", "linear_to_srgb", "read_glb", "srgb_to_linear", "write_glb", "write_obj"]

FORMATS = ("obj", "glb", "ply", "usdz", "stl")
_MAPS = {"albedo": "map_Kd", "roughness": "map_Pr", "metallic": "map_Pm", "normal": "norm"}  # in a .mtl


def export(mesh: Mesh, folder: Path, title: str = "", formats: Sequence[str] = ("obj", "glb")) -> list[Path]:
    """Write `mesh.obj` (with `mesh.mtl` and a PNG for each texture), `mesh.glb`, `mesh.ply`, `mesh.usdz`, `mesh.stl` into `folder`; their paths.

    Only OBJ, GLB and USDZ hold textures; PLY has vertex colours, STL none, which a line says. Files that are there already are replaced,
    which a line says. A format that cannot be written here (usd-core missing) is left out with a line. ValueError for a mesh without faces.
    """
    if len(mesh.faces) == 0:
        raise ValueError("a mesh without faces cannot be written")
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise UserError(f"--mesh_format {','.join(unknown)}: not a format; choose from {', '.join(FORMATS)}")
    folder, paths = Path(folder), []
    writers = {"obj": write_obj, "glb": write_glb, "ply": write_ply, "usdz": _write_usdz, "stl": write_stl}
    names = [f"mesh.{name}" for name in formats]
    if "obj" in formats and mesh.textures:
        names += ["mesh.mtl", *(f"{name}.png" for name in mesh.textures)]
    replaced = [name for name in names if (folder / name).exists()]
    if replaced:
        say(f"{folder}: replacing {', '.join(replaced)}")
    for name in dict.fromkeys(formats):
        path = writers[name](mesh, folder / f"mesh.{name}", title)
        paths += [path] if path else []
    return paths


def write_obj(mesh: Mesh, path: Path, title: str = "") -> Path:
    """Wavefront OBJ: `v x y z`, `vn` and, of a textured mesh, `vt` (v up), its .mtl and one PNG for each texture; else `v x y z r g b`.

    What the .obj names is written first.
    """
    head = [f"# {' '.join(title.split())}", "# y up, front +z, metres", "o mesh"]
    rows, row = mesh.vertices, "v %.7g %.7g %.7g"
    if mesh.textures:
        _write_material(mesh, path)
        head[2:2] = [f"mtllib {path.stem}.mtl"]
    if mesh.colors is not None and "albedo" not in mesh.textures:
        head[2:2] = ["# v: position, then colour (sRGB, 0 to 1)"]
        rows, row = np.hstack([rows, mesh.colors]), row + " %.4f %.4f %.4f"
    corners = [mesh.faces + 1, mesh.faces + 1]
    if mesh.uvs is not None:
        corners.insert(1, mesh.uv_faces + 1)
    with atomic(path) as beside, open(beside, "w", encoding="utf-8") as file:
        file.write("\n".join(head) + "\n")
        np.savetxt(file, rows, row)
        if mesh.uvs is not None:
            np.savetxt(file, mesh.uvs.astype(np.float64) * [1, -1] + [0, 1], "vt %.7g %.7g")
        np.savetxt(file, mesh.normals, "vn %.4f %.4f %.4f")
        if mesh.textures:
            file.write("usemtl material\n")
        one = "%d/%d/%d" if mesh.uvs is not None else "%d//%d"
        np.savetxt(file, np.stack(corners, -1).reshape(len(mesh.faces), -1), f"f {one} {one} {one}")
    return path


def _write_material(mesh: Mesh, path: Path) -> None:
    """`path` with .mtl, and the textures beside it: Kd 1 so that the colours are the texture's; Pr, Pm and norm as in the PBR extension of MTL."""
    lines = ["newmtl material", "Ka 0 0 0", "Kd 1 1 1", "Ks 0 0 0", "d 1", "illum 1", "Pr 1", "Pm 0"]
    for name, picture in mesh.textures.items():
        with atomic(path.with_name(f"{name}.png")) as beside:
            beside.write_bytes(png(picture))
        lines.append(f"{_MAPS[name]} {name}.png")
    with atomic(path.with_suffix(".mtl")) as beside:
        beside.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_ply(mesh: Mesh, path: Path, title: str = "") -> Path:
    """Binary PLY with normals and 8-bit vertex colours; the title is not kept."""
    from trimesh.exchange.ply import export_ply

    return _write(path, export_ply(_solid(mesh), vertex_normal=True))


def write_stl(mesh: Mesh, path: Path, title: str = "") -> Path:
    """Binary STL: triangles and nothing else."""
    from trimesh.exchange.stl import export_stl

    if mesh.colors is not None or mesh.textures:
        say(f"{path}: an .stl file holds no colours")
    return _write(path, export_stl(_solid(mesh)))


def _write_usdz(mesh: Mesh, path: Path, title: str = "") -> Path | None:
    try:
        import pxr  # noqa: F401
    except ImportError:
        say(f"{path} is left out: the package usd-core is not installed")
        return None
    from mesh.write_usd import write_usdz

    return write_usdz(mesh, path, title)


def _write(path: Path, data: bytes) -> Path:
    with atomic(path) as beside:
        beside.write_bytes(data)
    return path


def _solid(mesh: Mesh):
    """As trimesh has it."""
    import trimesh

    colors = None if mesh.colors is None else np.round(np.clip(mesh.colors, 0, 1) * 255).astype(np.uint8)
    return trimesh.Trimesh(
        mesh.vertices, mesh.faces, vertex_normals=mesh.normals, vertex_colors=colors, process=False, validate=False
    )


def read_glb(path: Path) -> tuple[Mesh, str]:
    """A file of `write_glb`, with colours at its vertices whatever it has them as, and its title; ValueError for any other."""
    from mesh.parts import assemble
    from mesh.read_gltf import read_gltf

    try:
        parts, title, generator = read_gltf(path, [])
        if generator != "Somnium":
            raise ValueError("made by another program")
        mesh = assemble(parts, [])
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: not a mesh of this program ({error})") from None
    return mesh if mesh.colors is not None else replace(mesh, colors=np.full(mesh.vertices.shape, 0.5)), title
