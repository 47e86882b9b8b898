"""Texture coordinates for any mesh: charts that do not overlap, in one square picture.

xatlas cuts and flattens; it runs in a process of its own, because it can crash (its issue 146: charts of closed smooth surfaces) and because
its time grows faster than the number of faces. A large mesh is given to it in pieces of at most `PIECE` neighbouring faces, which avoids both:
50 000 faces take seconds instead of a quarter of a minute and get fewer charts. Where it fails, `mesh.atlas` makes a simpler atlas.
"""

import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from jaxtyping import Float, Int

from errors import say
from mesh.atlas import box_atlas

PIECE, WHOLE = 1000, 10_000  # faces of a piece; meshes up to the second number are not cut
SIZE, PADDING = 1024, 6  # texels: the picture that the padding between charts is meant for
_CHILD = Path(__file__).with_name("xatlas_child.py")


def unwrap(
    vertices: Float[np.ndarray, "V 3"],
    faces: Int[np.ndarray, "F 3"],
    seconds: float = 60,
    size: int = SIZE,
    padding: int = PADDING,
) -> tuple[Float[np.ndarray, "T 2"], Int[np.ndarray, "F 3"]]:
    """`uvs` in [0, 1] (v down) and `uv_faces`, the uv of each corner of each face; every face has its own place in the picture.

    In a picture of `size` x `size` texels, charts lie about `padding` texels apart and half of that from the border. xatlas gets `seconds`;
    if it is missing, fails or takes longer, one line says so and the charts are projections along the axes.
    """
    if len(faces) == 0:
        return np.zeros((0, 2), np.float32), faces.astype(np.int64)
    middle = (vertices.min(0) + vertices.max(0)) / 2
    scale = float(np.ptp(vertices, axis=0).max())
    # xatlas calls what is smaller than 1e-7 nothing: give it something large.
    vertices = ((vertices - middle) * (100 / max(scale, 1e-30))).astype(np.float32)
    _, first, one = np.unique(vertices, axis=0, return_index=True, return_inverse=True)
    vertices, faces = vertices[first], one.reshape(-1)[faces]  # hard edges of a picture are no reason to cut
    found = _ask_xatlas(vertices, faces, seconds, size, padding)
    if isinstance(found, str):
        say(f"texture coordinates: {found}; the mesh is cut along the axes instead")
        found = box_atlas(vertices, faces, size, padding)
    uvs, uv_faces = found
    margin = padding / (2 * size)
    return (margin + np.clip(uvs, 0, 1) * (1 - 2 * margin)).astype(np.float32), uv_faces


def pieces(
    vertices: Float[np.ndarray, "V 3"], faces: Int[np.ndarray, "F 3"], limit: int = PIECE
) -> Int[np.ndarray, "F"]:
    """A number for each face: sets of at most `limit` faces, made by halving the longest side again and again."""
    centres = vertices[faces].mean(1)
    number, waiting, count = np.zeros(len(faces), np.int64), [np.arange(len(faces))], 0
    while waiting:
        those = waiting.pop()
        if len(those) <= limit:
            number[those], count = count, count + 1
            continue
        axis = np.ptp(centres[those], axis=0).argmax()
        those = those[np.argsort(centres[those, axis], kind="stable")]
        waiting += [those[: len(those) // 2], those[len(those) // 2 :]]
    return number


def _ask_xatlas(
    vertices: np.ndarray, faces: np.ndarray, seconds: float, size: int, padding: int
) -> tuple[np.ndarray, np.ndarray] | str:
    """uvs and uv_faces, or what went wrong."""
    part = np.zeros(len(faces), np.int64) if len(faces) <= WHOLE else pieces(vertices, faces)
    with TemporaryDirectory(prefix="somnium-") as folder:
        source, target = Path(folder) / "mesh.npz", Path(folder) / "atlas.npz"
        # xatlas widens the picture rather than shrink the charts, by a quarter or so: ask for a smaller one.
        np.savez(source, vertices=vertices, faces=faces, part=part, resolution=size * 4 // 5, padding=padding)
        try:
            command = [sys.executable, "-P", str(_CHILD), str(source), str(target)]
            # Ctrl-C means this program, which then finishes what it has begun: keep it from the child.
            done = subprocess.run(command, capture_output=True, timeout=seconds, start_new_session=True, check=False)
        except subprocess.TimeoutExpired:
            return f"xatlas did not finish within {seconds:g} seconds"
        except OSError as error:
            return f"xatlas could not be started ({error.strerror})"
        if done.returncode == 3:
            return "xatlas is not installed"
        if done.returncode < 0:
            return f"xatlas crashed ({signal.Signals(-done.returncode).name})"
        if done.returncode or not target.is_file():
            last = (done.stderr.decode(errors="replace").splitlines() or ["no reason given"])[-1]
            return f"xatlas failed ({last[:100]})"
        with np.load(target) as atlas:
            uvs, uv_faces = atlas["uvs"], atlas["uv_faces"]
    if uv_faces.shape != faces.shape or not np.isfinite(uvs).all() or (uv_faces.size and uv_faces.max() >= len(uvs)):
        return "xatlas gave no usable answer"
    return uvs, uv_faces
