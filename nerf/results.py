"""What comes out of a scene: validation sheets, the turntable, six views, the mesh. The caller applies the averaged weights first."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mesh import Mesh
from mesh.silhouette import overlap, rasterise
from nerf import checkpoint, media
from nerf.background import plain_colour
from nerf.progress import Bar
from nerf.provider import Cameras, orbit, six_views, turntable

MESH_VIEWS = 8  # to choose the threshold from, and as many others to measure the outline with
MESH_VIEW_SIZE = 96  # pixels
SIX_NAMES = ("front", "left", "back", "right", "top", "bottom")


def plain_background(opt: Any) -> Tensor | None:
    """The colour [3] behind a shown scene: the fixed one of `--background`, None for the network's, else white."""
    if opt.background == "mlp":
        return None
    return torch.tensor(plain_colour("white" if opt.background == "random" else opt.background))


def frames(scene: Any, cameras: Cameras, background: Tensor | None, step: int, bar: Bar | None = None) -> Iterator[Any]:
    """One render after another, with normals; `bar` counts them."""
    for i in range(len(cameras)):
        yield scene.show(cameras[i : i + 1], background, step)
        if bar is not None:
            bar.update(i + 1)


def validation(scene: Any, opt: Any, folder: Path, step: int, stop: Callable[[], bool]) -> list[Path]:
    """Views from all around, side by side: `step_0000500_rgb.png`, `_depth`, `_normal`. Nothing is written if `stop()` becomes true."""
    cameras = turntable(opt, opt.dataset_size_valid, opt.H, opt.W)
    views: dict[str, list[np.ndarray]] = {}
    with Bar("validation", len(cameras)) as bar:
        for render in frames(scene, cameras, plain_background(opt), step, bar):
            if stop():
                return []
            for kind, picture in media.pictures(render, opt.default_radius, opt.bound).items():
                views.setdefault(kind, []).append(picture[0])
    return [
        media.save_png(folder / f"step_{step:07d}_{kind}.png", media.sheet(np.stack(pictures)))
        for kind, pictures in views.items()
    ]


def turntable_videos(scene: Any, opt: Any, folder: Path, step: int) -> list[Path]:
    """Once around: `step_0000500_rgb.mp4`, `_depth`, `_normal`, all three from one pass, frame by frame onto the disk."""
    cameras = turntable(opt, opt.dataset_size_test, opt.H, opt.W)
    paths = {kind: folder / f"step_{step:07d}_{kind}.mp4" for kind in media.KINDS}
    with ExitStack() as stack, Bar("turntable", len(cameras)) as bar:
        streams = {kind: stack.enter_context(media.video(path, opt.H, opt.W)) for kind, path in paths.items()}
        for render in frames(scene, cameras, plain_background(opt), step, bar):
            for kind, picture in media.pictures(render, opt.default_radius, opt.bound).items():
                streams[kind](picture[0])
    return list(paths.values())


def six_pictures(scene: Any, opt: Any, folder: Path, step: int) -> list[Path]:
    """Front, left, back, right, top and bottom as `step_0000500_front_rgb.png` (with alpha), `_depth`, `_normal`."""
    cameras = six_views(opt, opt.H, opt.W)
    paths = []
    with Bar("six views", len(cameras)) as bar:
        for name, render in zip(SIX_NAMES, frames(scene, cameras, torch.zeros(3), step, bar), strict=True):
            found = media.pictures(render, opt.default_radius, opt.bound)
            found["rgb"] = media.with_alpha(render.image[..., :3], render.alpha)
            for kind, picture in found.items():
                paths.append(media.save_png(folder / f"step_{step:07d}_{name}_{kind}.png", picture[0]))
    return paths


def mesh_cameras(opt: Any, count: int, shift: float) -> Cameras:
    """`count` views around the object at polar angles spread over the training range; `shift` (of one step) turns them all."""
    turn = (torch.arange(count) + shift) / count
    low, high = opt.theta_range
    polar = low + (high - low) * torch.remainder(turn * 3.0 + 0.5, 1.0)
    middle = [sum(ends) / 2 for ends in (opt.radius_range, opt.fovy_range)]
    size = MESH_VIEW_SIZE
    return orbit(polar, 360 * turn, middle[0], middle[1], size, size)


def finished_mesh(scene: Any, opt: Any, step: int, log: Callable[[str], None]) -> tuple[Mesh, dict[str, float]] | None:
    """The scene as a mesh for files, with textures or (`--texture_size` 0) colours at the vertices, and what was measured of it.

    None, with a line said, if there is nothing. A surface that is locked keeps its triangles and its texture coordinates.
    """
    from mesh import finish
    from mesh.bake import bake

    if hasattr(scene, "surface"):
        mesh, ask, measured = finish.of_surface(scene, opt.decimate_target), scene.material, {}
        if mesh is None:
            log("no mesh: the surface has vanished")
            return None
        log(f"mesh: {len(mesh.faces)} faces")
    else:
        found = extract_mesh(scene, opt, step, log)
        if found is None:
            return None
        mesh, measured = found
        ask = finish.what_rays_see(scene.density, mesh, opt.mcubes_resolution, measured["mesh/threshold"])
    measured["mesh/faces"] = float(len(mesh.faces))
    device = next(scene.parameters()).device
    if opt.texture_size == 0:
        return finish.with_colors(mesh, ask, device), measured
    log(
        f"texture: {opt.texture_size} x {opt.texture_size} pixels, at most about {opt.unwrap_seconds} s for its coordinates"
    )
    return bake(mesh, ask, opt.texture_size, device, opt.unwrap_seconds), measured


def extract_mesh(scene: Any, opt: Any, step: int, log: Callable[[str], None]) -> tuple[Mesh, dict[str, float]] | None:
    """The scene's surface and what was measured of it (threshold, iou, faces); None, with a line said, if there is nothing."""
    from mesh.extract import extract

    fitted, fresh = mesh_cameras(opt, MESH_VIEWS, 0.0), mesh_cameras(opt, MESH_VIEWS, 0.5)
    with Bar("mesh", 100) as bar:
        seen = []
        for cameras in (fitted, fresh):
            renders = [scene.render(cameras[i : i + 1], step=step, normals=False) for i in range(len(cameras))]
            seen.append([torch.cat([getattr(r, name) for r in renders]) for name in ("alpha", "depth")])
            bar.update(bar.done + 20)
        found = extract(
            scene.density,
            fitted,
            *seen[0],
            bound=opt.bound,
            resolution=opt.mcubes_resolution,
            decimate_target=opt.decimate_target,
            threshold=None if opt.mesh_threshold == "auto" else float(opt.mesh_threshold),
            progress=lambda share: bar.update(40 + int(50 * share)),
            shape=getattr(scene, "even_density", None) if opt.mesh_threshold == "auto" else None,
        )
        if found is None:
            return None
        surface, threshold = found
        outline = (seen[1][0][..., 0] > 0.5).cpu().numpy()
        iou = overlap(outline, rasterise(surface.vertices, surface.faces, fresh))
    log(
        f"mesh: {len(surface.faces)} faces at density {threshold:.3g}; its outline covers the rendered one with IoU {iou:.3f} "
        f"in {MESH_VIEWS} views it was not fitted to"
    )
    if iou < 0.95:
        log(
            "the outlines differ: try a higher --mcubes_resolution, more --decimate_target, or --mesh_threshold by hand"
        )
    return surface, {"mesh/threshold": threshold, "mesh/iou": iou, "mesh/faces": float(len(surface.faces))}


def places(workspace: Path, step: int, particles: int, report: Path) -> list[str]:
    """The last lines of a run: what lies where."""
    found = {
        "report": [report],
        "video": sorted((workspace / "results").glob(f"step_{step:07d}_*.mp4")),
        "particles": sorted((workspace / "results").glob("particle_*"))[: particles - 1],
        "pictures": sorted((workspace / "results").glob(f"step_{step:07d}_*.png"))[:1],
        "mesh": sorted((workspace / "mesh").glob("mesh.*")),
        "checkpoint": checkpoint.newest_first(workspace / "checkpoints")[:1],
    }
    shown = {name: ", ".join([str(paths[0]), *(p.name for p in paths[1:])]) for name, paths in found.items() if paths}
    return [f"{name + ':':<12}{paths}" for name, paths in shown.items()]


def subject(opt: Any) -> str:
    """What is being made: the prompt, else the name of the photographs."""
    return opt.text or Path(opt.image or opt.image_config or opt.photos or "").name
