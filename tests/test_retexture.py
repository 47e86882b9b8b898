"""Somebody's plain grey car, `--text "a red car"`: it comes back red, with the same triangles and the same texture coordinates."""

import numpy as np
import pytest

from mesh.export import export
from mesh.files import load_mesh
from toybox.mesh import colored, object_mesh
from toybox.objects import OBJECTS


@pytest.mark.slow
def test_a_grey_car_comes_back_red(main, tmp_path):
    car = OBJECTS["car"]
    (path,) = export(colored(object_mesh(car, 48, 3000), car, "grey", 128), tmp_path, "car", ["glb"])
    given = load_mesh(path)
    assert np.ptp(given.textures["albedo"]) < 0.02
    typed = (
        "--text",
        "a red car",
        "--workspace",
        "red",
        "-O",
        "--init_with",
        path,
        "--lock_geo",
        "--save_mesh",
        "--mesh_format",
        "glb",
    )
    quick = ("--iters", 60, "--texture_size", 128, "--W", 32, "--H", 32, "--eval_interval", 0, "--dataset_size_test", 2)
    done = main(*typed, *quick, "--dataset_size_valid", 2, "--dmtet_reso_scale", 1)
    assert done.returncode == 0, done.stderr
    made = load_mesh(tmp_path / "red" / "mesh" / "mesh.glb")
    assert np.allclose(made.vertices[made.faces], given.vertices[given.faces], atol=1e-6)
    assert np.allclose(made.uvs[made.uv_faces], given.uvs[given.uv_faces], atol=1e-6)
    red, green, blue = np.median(made.textures["albedo"].reshape(-1, 3), axis=0)
    assert red > 0.55 and green < 0.35 and blue < 0.35, (red, green, blue)
