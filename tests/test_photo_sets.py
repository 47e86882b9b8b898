"""Calibrated photographs: transforms.json and CO3D sequences, made here from renders whose cameras are known, give those cameras back."""

import gzip
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_photos import make_options
from torch.nn import functional as F

from errors import UserError
from nerf import alignment
from nerf.photo_sets import Shot, choose, read_co3d
from nerf.photos import load_references
from nerf.provider import orbit
from toybox.objects import OBJECTS
from toybox.render import trace

SIZE, FOVY, RADIUS = 64, 24.0, 3.2
AZIMUTHS = (0.0, 40.0, 95.0, 150.0, -160.0, -70.0)
POLARS = (75.0, 60.0, 80.0, 70.0, 65.0, 85.0)


@pytest.fixture(scope="module")
def toy():
    """Six views of a car: cameras, RGBA pictures of 8 bits."""
    cameras = orbit(torch.tensor(POLARS), torch.tensor(AZIMUTHS), RADIUS, FOVY, SIZE, SIZE)
    car = OBJECTS["car"]
    layers = trace(car, cameras.c2w, FOVY, SIZE, cameras.c2w[:, :3, 2], torch.ones(len(cameras)))
    colour = layers.fixed + layers.main[..., None] * torch.tensor(car.default)
    rgba = torch.cat([colour / layers.alpha[..., None].clamp(min=1e-4), layers.alpha[..., None]], -1)
    return cameras, (rgba.clamp(0, 1) * 255).round().byte().numpy()


def turned(seed):
    """Any rotation."""
    q = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)))[0]
    return q * torch.sign(torch.det(q))


def same_cameras(found, true, degrees=0.3):
    """Positions and axes agree."""
    assert torch.allclose(found.position, true.position, atol=RADIUS * math.radians(degrees))
    assert torch.allclose(found.c2w[:, :3, :3], true.c2w[:, :3, :3], atol=math.radians(degrees))
    assert torch.allclose(found.azimuth, true.azimuth, atol=degrees)


# -- transforms.json ---------------------------------------------------------------------------------------------------------

TO_Z_UP = torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])  # our (x, y, z) is the file's (x, -z, y)


def write_transforms(folder, toy, world=TO_Z_UP, scale=1.0, shift=(0.0, 0.0, 0.0), pictures=None, **intrinsics):
    """transforms.json with pictures, in a world that is ours turned by `world`, scaled and shifted."""
    cameras, rgba = toy
    frames = []
    for i, picture in enumerate(pictures or rgba):
        Image.fromarray(picture).save(folder / f"r_{i}.png")
        matrix = cameras.c2w[i].clone()
        matrix[:3, :3] = world @ matrix[:3, :3]
        matrix[:3, 3] = scale * world @ matrix[:3, 3] + torch.tensor(shift)
        frames.append({"file_path": f"./r_{i}", "transform_matrix": matrix.tolist()})
    data = {"frames": frames, **(intrinsics or {"camera_angle_x": math.radians(FOVY)})}
    (folder / "transforms.json").write_text(json.dumps(data))
    return make_options(photos=str(folder))


def test_blender_files_keep_their_pictures_and_cameras(tmp_path, toy):
    found = load_references(write_transforms(tmp_path, toy))
    same_cameras(found.cameras, toy[0], 0.01)
    assert torch.allclose(found.cameras.fovy, torch.tensor(FOVY))
    true = torch.from_numpy(toy[1]).float() / 255
    assert torch.allclose(found.mask, true[..., 3:], atol=1e-6)
    assert torch.allclose(found.rgb * found.mask, true[..., :3] * true[..., 3:], atol=1e-3)
    assert found.seen.amin() == 1


def test_blenders_front_is_ours():
    front = torch.eye(4)
    front[:3, :3] = torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])  # Blender's camera that looks along +y
    front[:3, 3] = torch.tensor([0.0, -4, 0])
    rotation, believed = alignment.upright(front[None], True)
    ours = alignment.Similarity(rotation, torch.zeros(3), 1.0).cameras(front[None])
    assert believed and torch.allclose(ours[0, :3, 3], torch.tensor([0.0, 0, 4]))
    assert torch.allclose(ours[0, :3, :3], torch.eye(3))


def test_another_scale_and_place_are_undone(tmp_path, toy):
    opt = write_transforms(tmp_path, toy, scale=2.5, shift=(3.0, -1.0, 7.0))
    same_cameras(load_references(opt).cameras, toy[0], 0.05)
    opt.photo_align = "file"
    kept = load_references(opt).cameras.position
    assert torch.allclose(kept, 2.5 * toy[0].position + torch.tensor([3.0, 7, 1]), atol=1e-3)


def test_a_file_on_its_side_is_put_upright(tmp_path, toy, capsys):
    found = load_references(write_transforms(tmp_path, toy, world=torch.eye(3)))  # y up, whatever the format says
    assert "do not stand upright" in capsys.readouterr().err
    assert torch.allclose(found.cameras.polar, torch.tensor(POLARS), atol=0.2)


def test_off_centre_wide_pictures_become_centred_squares(tmp_path, toy):
    """The principal point is far from the middle, pixels are no squares, the picture is no square: the cameras' own rays still match."""
    cameras, rgba = toy
    focal = SIZE / 2 / math.tan(math.radians(FOVY / 2))
    wide = [np.pad(p.repeat(2, axis=1), ((4, 10), (20, 36), (0, 0))) for p in rgba]
    intrinsics = {
        "fl_x": 2 * focal,
        "fl_y": focal,
        "cx": SIZE + 20,
        "cy": SIZE / 2 + 4,
        "w": 2 * SIZE + 56,
        "h": SIZE + 14,
    }
    found = load_references(write_transforms(tmp_path, toy, pictures=wide, **intrinsics))
    same_cameras(found.cameras, cameras, 0.01)
    size = found.rgb.shape[1]
    for i in range(len(found)):
        view = found.cameras[i : i + 1]
        again = trace(OBJECTS["car"], view.c2w, view.fovy, size, view.c2w[:, :3, 2], torch.ones(1)).alpha > 0.5
        mask = found.mask[i : i + 1, ..., 0] > 0.5
        assert (again & mask).sum() / (again | mask).sum() > 0.92


def test_a_lens_that_distorts_is_undone():
    at = torch.linspace(-0.5, 0.5, 200)
    y, x = torch.meshgrid(at, at, indexing="ij")
    values = torch.stack([x, y], -1)  # each pixel says where it is in the distorted plane
    shot = Shot(
        Path("x.png"), None, torch.eye(4), (199.0, 199.0), (100.0, 100.0), (200, 200), (0.1, 0.02, 0.06, -0.04, 0.01)
    )
    found, seen = alignment.undistorted(values, shot, 0.3, 60)
    u = ((torch.arange(60) + 0.5) / 60 * 2 - 1) * 0.3
    for row, column in ((30, 30), (5, 50), (55, 12)):
        a, b = float(u[column]), float(u[row])
        r2 = a * a + b * b
        k = 1 + 0.1 * r2 + 0.02 * r2**2 + 0.01 * r2**3
        expected = (
            a * k + 2 * 0.06 * a * b - 0.04 * (r2 + 2 * a * a),
            b * k + 0.06 * (r2 + 2 * b * b) - 2 * 0.04 * a * b,
        )
        assert torch.allclose(found[row, column], torch.tensor(expected), atol=2e-3)
    assert seen.amin() == 1


def test_beyond_the_photograph_nothing_is_known():
    shot = Shot(Path("x.png"), None, torch.eye(4), (50.0, 50.0), (32.0, 10.0), (64, 64))
    for size in (50, 18):  # 18: several subsamples a pixel, some of them outside
        found, seen = alignment.undistorted(torch.ones(64, 64, 3), shot, 0.5, size)
        assert seen[: int(0.28 * size)].amax() == 0 and seen[int(0.32 * size) + 1 :].amin() == 1
        assert torch.allclose(found[seen[..., 0] > 0], torch.ones(1))


def test_masks_of_their_own(tmp_path, toy):
    cameras, rgba = toy
    opt = write_transforms(tmp_path, toy, pictures=[np.ascontiguousarray(p[..., :3]) for p in rgba])
    data = json.loads((tmp_path / "transforms.json").read_text())
    for i, frame in enumerate(data["frames"]):
        Image.fromarray(rgba[i, ..., 3]).save(tmp_path / f"m_{i}.png")
        frame["mask_path"] = f"m_{i}.png"
    (tmp_path / "transforms.json").write_text(json.dumps(data))
    found = load_references(opt)
    assert torch.allclose(found.mask[..., 0], torch.from_numpy(rgba[..., 3]).float() / 255, atol=1e-6)


def test_where_the_cameras_miss_the_object_the_masks_decide(tmp_path, toy, capsys):
    """All look at a point above the object: its place follows from the masks."""
    cameras, rgba = toy
    shift = 24
    low = [np.pad(p, ((2 * shift, 0), (shift, shift), (0, 0))) for p in rgba]
    focal = SIZE / 2 / math.tan(math.radians(FOVY / 2))
    turn = math.atan(shift / focal)
    lifted = cameras.c2w.clone()
    tilt = torch.tensor([[1.0, 0, 0], [0, math.cos(turn), -math.sin(turn)], [0, math.sin(turn), math.cos(turn)]])
    lifted[:, :3, :3] = lifted[:, :3, :3] @ tilt
    opt = write_transforms(
        tmp_path, (replace(cameras, c2w=lifted), rgba), pictures=low, camera_angle_x=2 * math.atan(56 / focal)
    )
    found = load_references(opt)
    assert "from the masks" in capsys.readouterr().err
    assert torch.allclose(found.cameras.position, cameras.position, atol=0.15)


def test_a_wide_object_brings_the_cameras_nearer(tmp_path, toy, capsys):
    opt = write_transforms(tmp_path, toy)
    opt.bound = 0.3
    found = load_references(opt)
    text = capsys.readouterr().err
    assert "too wide" in text and found.cameras.radius.amax() < RADIUS
    opt.bound, opt.default_fovy = 1.0, 8.0
    load_references(opt)
    assert "--default_fovy" in capsys.readouterr().err


# -- CO3D --------------------------------------------------------------------------------------------------------------------


def write_co3d(folder, toy, isotropic=True, name="110_13051_23361", seed=5, pad=(0, 0)):
    """A sequence in CO3D's layout, in a world turned, scaled and moved anyhow."""
    cameras, rgba = toy
    world, scale, shift = turned(seed), 4.2, torch.tensor([5.0, -3.0, 2.0])
    sequence = folder / "car" / name
    (sequence / "images").mkdir(parents=True)
    (sequence / "masks").mkdir()
    focal = SIZE / 2 / math.tan(math.radians(FOVY / 2))
    rows = []
    for i, picture in enumerate(rgba):
        picture = np.pad(picture, ((0, pad[0]), (0, pad[1]), (0, 0)))
        height, width = picture.shape[:2]
        image, mask = f"car/{name}/images/frame{i:06d}.png", f"car/{name}/masks/frame{i:06d}.png"
        Image.fromarray(np.ascontiguousarray(picture[..., :3])).save(folder / image)
        Image.fromarray(np.ascontiguousarray(picture[..., 3])).save(folder / mask)
        r = world @ cameras.c2w[i, :3, :3]  # columns: right, up, back
        position = scale * world @ cameras.c2w[i, :3, 3] + shift
        axes = torch.stack([-r[:, 0], r[:, 1], -r[:, 2]], -1)  # left, up, forward: x_camera = x_world R + T
        half = np.array([width, height]) / 2
        unit = np.full(2, half.min()) if isotropic else half
        view = {
            "R": axes.tolist(),
            "T": (-position @ axes).tolist(),
            "focal_length": (focal / unit).tolist(),
            "principal_point": ((half - SIZE / 2) / unit).tolist(),
            "intrinsics_format": "ndc_isotropic" if isotropic else "ndc_norm_image_bounds",
        }
        rows.append(
            {
                "sequence_name": name,
                "frame_number": i,
                "image": {"path": image, "size": [height, width]},
                "mask": {"path": mask, "mass": 1.0},
                "viewpoint": view,
            }
        )
    with gzip.open(folder / "car" / "frame_annotations.jgz", "wt") as file:
        json.dump(rows[::-1], file)  # any order
    return make_options(photos=str(sequence))


@pytest.mark.parametrize("isotropic, pad", [(True, (0, 0)), (True, (30, 0)), (False, (0, 44))])
def test_a_co3d_sequence_gives_its_cameras_back(tmp_path, toy, isotropic, pad):
    found = load_references(write_co3d(tmp_path, toy, isotropic, pad=pad))
    same_cameras(found.cameras, toy[0])
    view, size = found.cameras, found.rgb.shape[1]
    again = trace(OBJECTS["car"], view.c2w, view.fovy, size, view.c2w[:, :3, 2], torch.ones(6)).alpha > 0.5
    mask = found.mask[..., 0] > 0.5
    assert ((again & mask).sum((1, 2)) / (again | mask).sum((1, 2))).amin() > 0.93


def test_some_views_of_a_sequence(tmp_path, toy):
    opt = write_co3d(tmp_path, toy)
    opt.photo_views, opt.default_azimuth = "2,0,5", 95.0
    found = load_references(opt)  # the first of them becomes the default azimuth; here that is where it was
    same_cameras(found.cameras, orbit(torch.tensor([80.0, 75, 85]), torch.tensor([95.0, 0, -70]), 3.2, FOVY, 64, 64))


def test_a_category_needs_one_sequence(tmp_path, toy):
    opt = write_co3d(tmp_path, toy)
    opt.photos = str(tmp_path / "car")
    assert len(load_references(opt)) == 6
    path = tmp_path / "car" / "frame_annotations.jgz"
    rows = json.loads(gzip.decompress(path.read_bytes()))
    path.write_bytes(gzip.compress(json.dumps(rows + [{**rows[0], "sequence_name": "other"}]).encode()))
    with pytest.raises(UserError, match="2 sequences"):
        load_references(opt)
    with pytest.raises(UserError, match="no sequence of this name"):
        (tmp_path / "car" / "third").mkdir()
        read_co3d(path, tmp_path / "car" / "third")


def test_views_with_one_direction_say_no_distance(tmp_path, toy):
    opt = write_co3d(tmp_path, toy)
    path = tmp_path / "car" / "frame_annotations.jgz"
    rows = json.loads(gzip.decompress(path.read_bytes()))
    path.write_bytes(gzip.compress(json.dumps([rows[0]]).encode()))
    with pytest.raises(UserError, match="more sides"):
        load_references(opt)


# -- mistakes ----------------------------------------------------------------------------------------------------------------


def test_mistakes_in_a_set_are_one_line(tmp_path, toy):
    opt = write_transforms(tmp_path, toy)
    path = tmp_path / "transforms.json"
    good = json.loads(path.read_text())

    def refused(match, change):
        data = json.loads(json.dumps(good))
        change(data)
        path.write_text(json.dumps(data))
        with pytest.raises(UserError, match=match) as caught:
            load_references(opt)
        assert str(caught.value).startswith("--photos") and "\n" not in str(caught.value)

    def mirror(data):
        for row in data["frames"][0]["transform_matrix"]:
            row[0] = -row[0]

    refused("no frames", lambda data: data.pop("frames"))
    refused("neither fl_x nor", lambda data: data.pop("camera_angle_x"))
    refused("file_path and", lambda data: data["frames"][1].pop("file_path"))
    refused("no such file", lambda data: data["frames"][1].update(file_path="gone"))
    refused("no rotation", mirror)
    refused("no 4 x 4", lambda data: data["frames"][0].update(transform_matrix=[[1.0, 2.0], [3.0, 4.0]]))
    refused("not understood", lambda data: data.update(camera_model="OPENCV_FISHEYE"))
    refused("calibration is for", lambda data: data.update(w=64, h=48))
    path.write_text("{")
    with pytest.raises(UserError, match="not readable as JSON"):
        load_references(opt)
    with pytest.raises(UserError, match="no such folder"):
        load_references(make_options(photos=str(tmp_path / "none")))
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="holds neither"):
        load_references(make_options(photos=str(tmp_path / "bare")))


def test_an_empty_mask_names_its_picture(tmp_path, toy):
    empty = [p.copy() for p in toy[1]]
    empty[2][..., 3] = 0
    with pytest.raises(UserError, match="r_2.png.*empty"):
        load_references(write_transforms(tmp_path, toy, pictures=empty))


def test_which_views():
    assert choose(10, "all") == list(range(10)) and choose(10, "4") == [0, 2, 5, 7] and choose(10, "3,1") == [3, 1]
    assert choose(10, "7,") == [7] and len(choose(10, "99")) == 10
    for wrong in ("some", "0", "3,10", "3,3", ""):
        with pytest.raises(UserError, match="--photo_views"):
            choose(10, wrong)


# -- geometry ----------------------------------------------------------------------------------------------------------------


def test_closest_point_and_up():
    generator = torch.Generator().manual_seed(0)
    point = torch.tensor([0.4, -1.0, 2.0])
    origins = 3 * torch.randn(5, 3, generator=generator)
    assert torch.allclose(alignment.closest_point(origins, point - origins), point, atol=1e-4)
    assert alignment.closest_point(origins, torch.ones(5, 3)) is None
    true = F.normalize(torch.tensor([0.3, 0.5, -0.8]), dim=0)
    back = alignment.turn_upright(true)
    assert torch.allclose(back @ true, torch.tensor([0.0, 1, 0]), atol=1e-6)
    assert torch.allclose(back @ back.T, torch.eye(3), atol=1e-6) and torch.det(back) > 0
    assert torch.allclose(
        alignment.turn_upright(torch.tensor([0.0, -1, 0])) @ torch.tensor([0.0, -1, 0]), torch.tensor([0.0, 1, 0])
    )
    narrow = orbit(torch.tensor([50.0, 55, 60]), torch.tensor([-8.0, 0, 20]), 3.0, 20.0, 8, 8).c2w.clone()
    narrow[:, :3] = back.T @ narrow[:, :3]
    assert torch.allclose(alignment.camera_up(narrow), true, atol=0.02)
