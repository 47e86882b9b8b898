"""Calibrated photographs from a folder: NeRF's transforms.json (Blender, instant-ngp, nerfstudio) and sequences of CO3D.

Every file's cameras become OpenGL's (x right, y up, looking along -z) in that file's own world, and pixels of its pictures; what the world is
turned, moved and scaled to is alignment.py's business.
"""

import gzip
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from errors import UserError, say

NAMES = ("transforms.json", "transforms_train.json")
ANNOTATIONS = ("frame_annotations.jgz", "frame_annotations.json.gz", "frame_annotations.json")
ENDINGS = ("", ".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Shot:
    """One photograph and its camera: `focal` and `centre` (the principal point, from the upper left corner of the upper left pixel) in
    pixels of a picture of `size` (width, height); `distortion` k1 k2 p1 p2 k3 of OpenCV's model."""

    image: Path
    mask: Path | None
    c2w: Float[Tensor, "4 4"]
    focal: tuple[float, float]
    centre: tuple[float, float]
    size: tuple[int, int] | None = None
    distortion: tuple[float, float, float, float, float] = (0.0, 0.0, 0.0, 0.0, 0.0)

    def scaled_to(self, width: int, height: int) -> "Shot":
        """The same for a picture that was resized."""
        if self.size is None or self.size == (width, height):
            return self
        x, y = width / self.size[0], height / self.size[1]
        focal, centre = (self.focal[0] * x, self.focal[1] * y), (self.centre[0] * x, self.centre[1] * y)
        return replace(self, focal=focal, centre=centre, size=(width, height))


def find_set(folder: Path) -> tuple[str, Path]:
    """("nerf" or "co3d", the file that lists the cameras) for what `--photos` names: a folder, or a transforms file itself."""
    label = f"--photos {folder}"
    if folder.is_file() and folder.suffix == ".json":
        return "nerf", folder
    if not folder.is_dir():
        raise UserError(f"{label}: no such folder; name one with a transforms.json, or a CO3D sequence")
    for name in NAMES:
        if (folder / name).is_file():
            return "nerf", folder / name
    for place in (folder, folder.resolve().parent):
        for name in ANNOTATIONS:
            if (place / name).is_file():
                return "co3d", place / name
    raise UserError(
        f"{label}: holds neither {' nor '.join(NAMES)}, nor is it a CO3D sequence (with frame_annotations.jgz beside or above); name another"
    )


# -- transforms.json ---------------------------------------------------------------------------------------------------------


def read_transforms(path: Path) -> list[Shot]:
    """The frames of a transforms.json, in its order, in its own world (z up).

    Intrinsics: fl_x, fl_y, cx, cy with w, h, or camera_angle_x (radians), for all frames or one. Masks: `mask_path`, else the pictures' alpha.
    """
    label = f"--photos {path}"
    data = _read_json(path, label)
    frames = data.get("frames") if isinstance(data, dict) else None
    if not isinstance(frames, list) or not frames:
        raise UserError(f"{label}: has no frames; it is no NeRF transforms file")
    return [_nerf_shot(path.parent, f"{label}, frame {i}", {**data, **frame}) for i, frame in enumerate(frames)]


def _nerf_shot(folder: Path, label: str, frame: dict[str, Any]) -> Shot:
    if "file_path" not in frame or "transform_matrix" not in frame:
        raise UserError(f"{label}: needs file_path and transform_matrix; correct it")
    if frame.get("camera_model", "OPENCV") not in ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL"):
        raise UserError(
            f"{label}: camera_model {frame['camera_model']} is not understood; undistort the pictures first"
        )
    image = _existing(folder, str(frame["file_path"]), label)
    mask = _existing(folder, str(frame["mask_path"]), label) if frame.get("mask_path") else None
    size = (int(frame["w"]), int(frame["h"])) if "w" in frame and "h" in frame else _size_of(image, label)
    focal = frame.get("fl_x")
    if focal is None and "camera_angle_x" in frame:
        focal = size[0] / 2 / float(torch.tan(torch.tensor(float(frame["camera_angle_x"]) / 2)))
    if focal is None:
        raise UserError(f"{label}: says neither fl_x nor camera_angle_x; add one of them")
    focal_y = frame.get("fl_y", focal)
    if "fl_y" not in frame and "fl_x" not in frame and "camera_angle_y" in frame:
        focal_y = size[1] / 2 / float(torch.tan(torch.tensor(float(frame["camera_angle_y"]) / 2)))
    return Shot(
        image,
        mask,
        _rigid(torch.tensor(frame["transform_matrix"], dtype=torch.float64), label),
        (float(focal), float(focal_y)),
        (float(frame.get("cx", size[0] / 2)), float(frame.get("cy", size[1] / 2))),
        size,
        tuple(float(frame.get(name, 0.0)) for name in ("k1", "k2", "p1", "p2", "k3")),
    )


def _rigid(matrix: Float[Tensor, "h w"], label: str) -> Float[Tensor, "4 4"]:
    """The same camera without a scale in its axes; UserError for what is no camera or mirrors the world."""
    if matrix.shape not in ((4, 4), (3, 4)) or not torch.isfinite(matrix).all():
        raise UserError(f"{label}: transform_matrix is no 4 x 4 matrix of numbers; correct it")
    u, stretch, v = torch.linalg.svd(matrix[:3, :3])
    if float(stretch[-1]) < 1e-6 or float(stretch[0] / stretch[-1]) > 1.05 or float(torch.det(u @ v)) < 0:
        raise UserError(f"{label}: transform_matrix is no rotation (it mirrors or distorts); correct it")
    c2w = torch.eye(4)
    c2w[:3, :3], c2w[:3, 3] = (u @ v).float(), matrix[:3, 3].float()
    return c2w


# -- CO3D --------------------------------------------------------------------------------------------------------------------


def read_co3d(path: Path, folder: Path) -> list[Shot]:
    """The frames of one sequence of CO3D (v1 or v2), by frame number, in its own world (any direction may be up).

    `path` is the category's frame_annotations, `folder` what the user named: the sequence, or a category that holds one alone.
    """
    label = f"--photos {folder}"
    rows = _read_json(path, label)
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "viewpoint" in row for row in rows):
        raise UserError(f"{label}: {path.name} is no list of CO3D's frames; restore it")
    names = sorted({str(row.get("sequence_name")) for row in rows})
    if folder.resolve() != path.resolve().parent:
        names = [name for name in names if name == folder.resolve().name]
        if not names:
            raise UserError(f"{label}: {path} knows no sequence of this name; name another folder")
    if len(names) > 1:
        shown = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
        raise UserError(f"{label}: holds {len(names)} sequences; name one of them: {path.parent}/NAME with {shown}")
    rows = sorted((r for r in rows if str(r.get("sequence_name")) == names[0]), key=lambda r: r.get("frame_number", 0))
    return [_co3d_shot(path.resolve().parent, f"{label}, frame {row.get('frame_number')}", row) for row in rows]


def _co3d_shot(category: Path, label: str, row: dict[str, Any]) -> Shot:
    """PyTorch3D's camera as OpenGL's.

    It maps x_camera = x_world R + T (row vectors), x to the left, y up, z forward: turning the axes x and z round gives ours. Its
    normalised coordinates grow to the left and upwards; 1 is half the shorter side ("ndc_isotropic") or half of each side.
    """
    try:
        view, (height, width) = row["viewpoint"], row["image"]["size"]
        image = _existing_any((category.parent, category), str(row["image"]["path"]), label)
        mask = row.get("mask") or {}
        mask = _existing_any((category.parent, category), str(mask["path"]), label) if mask.get("path") else None
        rotation, shift = (torch.tensor(view[name], dtype=torch.float64) for name in ("R", "T"))
        half = torch.tensor([width / 2, height / 2])
        unit = half if view.get("intrinsics_format") == "ndc_norm_image_bounds" else half.amin().expand(2)
        focal, centre = (torch.tensor(view[name]).float() for name in ("focal_length", "principal_point"))
        matrix = torch.cat([rotation @ torch.diag(rotation.new_tensor([-1, 1, -1])), (-rotation @ shift)[:, None]], 1)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{label}: is not described as CO3D does ({type(error).__name__}: {error}); restore it"
        ) from None
    focal, centre = (focal.expand(2) * unit).tolist(), (half - centre * unit).tolist()
    return Shot(image, mask, _rigid(matrix, label), tuple(focal), tuple(centre), (int(width), int(height)))


# -- files -------------------------------------------------------------------------------------------------------------------


def _read_json(path: Path, label: str) -> Any:
    """JSON, compressed or not."""
    try:
        raw = path.read_bytes()
        return json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{label}: {path.name} is not readable as JSON ({error}); restore it") from None


def _existing(folder: Path, name: str, label: str) -> Path:
    """A picture named in a file, with or without its ending."""
    for ending in ENDINGS:
        if (place := folder / f"{name}{ending}").is_file():
            return place
    raise UserError(f"{label}: {folder / name}: no such file; paths are relative to the folder")


def _existing_any(folders: tuple[Path, ...], name: str, label: str) -> Path:
    """The same in the first folder that has it: CO3D's paths begin with the category."""
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    return _existing(folders[0], name, label)


def _size_of(path: Path, label: str) -> tuple[int, int]:
    """Width and height as the pixels lie in the file: what a calibration refers to."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return picture.size
    except (OSError, ValueError) as error:
        raise UserError(f"{label}: {path} cannot be read as a picture ({error})") from None


def choose(count: int, wanted: str) -> list[int]:
    """Which of `count` photographs `--photo_views` names: all, so many evenly spread (`8`), or these (`0,50,100`)."""
    label = f"--photo_views {wanted}"
    try:
        numbers = None if wanted == "all" else [int(word) for word in wanted.split(",") if word.strip()]
    except ValueError:
        raise UserError(f"{label}: give all, a number of views such as 8, or their places such as 0,50,100") from None
    if numbers is None:
        return list(range(count))
    if "," in wanted:
        if not numbers or min(numbers) < 0 or max(numbers) >= count or len(set(numbers)) < len(numbers):
            raise UserError(f"{label}: the places are different numbers from 0 to {count - 1}")
        return numbers
    if not numbers or numbers[0] < 1:
        raise UserError(f"{label}: give at least one view")
    if numbers[0] > count:
        say(f"{label}: there are only {count}")
    few = min(numbers[0], count)
    return [i * count // few for i in range(few)]
