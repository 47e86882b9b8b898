"""The systems of configs/systems: the published values are in force, the embedded model gets its own."""

from functools import cache

import pytest
import yaml
from systems import NAMES, PUBLISHED, STAGES

from flags import FLAGS
from guidance.weights import EMBEDDED, EMBEDDED_IF, resolve
from optimizer import rate_factors
from options import CONFIGS, parse
from schedule import Schedule

FOLDER = CONFIGS / "systems"
LATER = {name for stages in STAGES.values() for name in stages[1:]}


@cache
def read(name, *typed):
    guide = ["--guide_shape", "chair.obj"] if name.startswith("sketchshape") else []
    return parse(["--config", f"configs/systems/{name}.yaml", "--text", "a red chair", *guide, *typed])


# ---- published ----------------------------------------------------------------------------------------------------------


def agrees(found, wanted) -> bool:
    if isinstance(wanted, dict):  # a course
        return all(found(step) == pytest.approx(value, rel=0.01, abs=1e-9) for step, value in wanted.items())
    if isinstance(wanted, tuple):
        return len(found) == len(wanted) and all(map(agrees, found, wanted))
    if isinstance(found, Schedule):
        return found.constant and found(0) == pytest.approx(wanted, rel=1e-3)
    if isinstance(wanted, (int, float)) and not isinstance(wanted, bool):
        return found == pytest.approx(wanted, rel=1e-3, abs=1e-9)
    return found == wanted


def test_every_system_is_in_the_table():
    assert set(PUBLISHED) == set(NAMES) and {"dreamfusion-sd", "sjc", "textmesh-if", "nemo-dmtet"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_published_values_are_in_force(name):
    opt = read(name)
    wrong = {}
    for flag, wanted in PUBLISHED[name].items():
        found = getattr(opt, flag)
        good = rate_factors(found) == pytest.approx(wanted) if flag == "lr_scale" else agrees(found, wanted)
        if not good:
            wrong[flag] = (found, wanted)
    assert not wrong


@pytest.mark.parametrize("name", NAMES)
def test_progressive_bands_open_when_they_should(name):
    """threestudio: level 8 at first, from step 2000 on one more every 500 steps."""
    if PUBLISHED[name].get("max_level", 1) == 1:
        return
    share = read(name).max_level
    for step in (0, 1999, 2400, 2600, 2999, 3300, 4700, 5999, 6100, 9999):
        published = min(8 + max(step - 2000, 0) // 500, 16)
        assert -(-share(step) * 16 // 1) == published, step  # the grid rounds up


OTHER = ("lambda_guidance", "lambda_rgb", "lambda_mask")  # not for random views


# ---- embedded -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_embedded_model_gets_values_of_its_own(name):
    opt = read(name, "--sd_version", "embedded")
    published = read(name)
    assert resolve(opt).path_or_id == str(EMBEDDED_IF if published.IF else EMBEDDED)
    assert opt.distill == published.distill and opt.dmtet == published.dmtet and opt.lock_geo == published.lock_geo
    assert opt.iters <= 800 and max(opt.w, opt.h) <= 64 and opt.batch_size == 1
    assert opt.guidance_scale.max() <= 10 and opt.lambda_guidance(0) == 1
    assert (opt.bound, opt.jitter_pose, opt.latent_iter_ratio) == (1, False, 0)
    assert opt.radius_range == (3.1, 3.3) and opt.theta_range == (15, 100) and opt.fovy_range == (30, 30)
    assert opt.train_shading == "auto"  # it has seen no normals
    assert opt.log2_hashmap_size <= 15 and opt.num_steps <= 64
    assert opt.voxel_size <= 64 or opt.backbone != "voxel"
    assert opt.size_scale.max() == 1 and (not opt.dmtet or opt.w * opt.dmtet_reso_scale <= 256)
    heavy = {flag: getattr(opt, flag) for flag in FLAGS if flag.startswith("lambda_") and flag not in OTHER}
    assert not {
        flag: weight for flag, weight in heavy.items() if weight.max() > 100
    }  # those are for sums over 16384 latents
    fastest = opt.lr.max() * max(
        rate_factors(opt.lr_scale).values()
    )  # bare voxels learn faster than what a network reads
    assert fastest == pytest.approx(0.1) if opt.backbone == "voxel" else fastest == pytest.approx(10 * opt.lr.max())


@pytest.mark.parametrize("name", NAMES)
def test_a_big_model_of_ones_own_takes_the_place_of_the_published_one(name):
    opt = read(name, "--hf_key", "some/model")
    assert opt.hf_key == "some/model" and opt.iters == PUBLISHED[name]["iters"]


@pytest.mark.parametrize("typed", [(), ("--sd_version", "embedded")])
@pytest.mark.parametrize("script", STAGES)
def test_a_later_stage_goes_on_with_the_scene_of_the_one_before(script, typed, tmp_path):
    earlier, before = None, ()
    for name in STAGES[script]:
        opt = read(name, *typed, *before)
        workspace = tmp_path / name
        opt.save(workspace / "config.yaml")
        if earlier is not None:
            for flag in ("bound", "num_levels", "log2_hashmap_size", "desired_resolution", "hidden_dim", "mlp_layers"):
                assert getattr(opt, flag) == getattr(earlier, flag), flag
            alone = read(name, *typed)
            for flag in ("latent", "material", "lock_geo", "dmtet", "tet_grid_size"):
                assert getattr(opt, flag) == getattr(alone, flag), flag
        earlier, before = opt, ("--init_with", str(workspace))


def test_files_say_what_differs_and_nothing_twice():
    for name in NAMES:
        content = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
        section = content.pop("embedded", {})
        structure = {"bound", "num_levels", "desired_resolution", "hidden_dim", "mlp_layers", "backbone"}
        assert name not in LATER or not structure & {*content, *section}, name  # those are the earlier run's
        assert "init_with" not in content and "guide_shape" not in content
