"""The systems of configs/systems: the published values are in force, the embedded model gets its own."""

from functools import cache

import pytest
import yaml
from systems import ALSO, NAMES, PUBLISHED, STAGES, WORDLESS, shown
from systems_photos import FROM_PHOTOS

from errors import UserError
from flags import FLAGS
from guidance.weights import EMBEDDED, EMBEDDED_IF, resolve
from optimizer import rate_factors
from options import CONFIGS, parse
from schedule import Schedule

FOLDER = CONFIGS / "systems"
CHAINS = {**STAGES, **{f"{script} {how}": stages for (script, how), stages in ALSO.items()}}
LATER = {name for stages in CHAINS.values() for name in stages[1:]}


@cache
def read(name, *typed):
    return parse(["--config", f"configs/systems/{name}.yaml", *shown(name), *typed])


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
    """threestudio: level 8 at first, from step 2000 on one more every 500 steps (Magic123: 300)."""
    if PUBLISHED[name].get("max_level", 1) == 1:
        return
    share, every = read(name).max_level, 300 if name.startswith("magic123") else 500
    for step in (0, 1999, 2250, 2400, 2650, 2850, 3350, 3950, 4250, 4350, 4750, 5999, 6100, 9999):
        published = min(8 + max(step - 2000, 0) // every, 16)
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
    assert opt.guidance_scale.max() <= 10 and opt.lambda_guidance.max() == (0.5 if "magic123" in name else 1)
    assert (opt.zero123, opt.clip_model) == (None, None)
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
    flag = "zero123" if name in WORDLESS else "hf_key"
    opt = read(name, f"--{flag}", "some/model")
    assert getattr(opt, flag) == "some/model" and opt.iters == PUBLISHED[name]["iters"]


def test_one_of_two_priors_may_be_embedded():
    """What is typed about one stays where the other is replaced."""
    opt = read("magic123-coarse", "--sd_version", "embedded", "--zero123", "some/model")
    assert (opt.sd_version, opt.zero123) == ("embedded", "some/model")
    opt = read("zero123", "--sd_version", "embedded", "--zero123", "some/model")
    assert opt.zero123 == "some/model" and opt.iters == PUBLISHED["zero123"]["iters"]


@pytest.mark.parametrize("name", FROM_PHOTOS)
def test_a_system_of_photographs_wants_one_and_its_prompt(name):
    """One line, not a run that never looks at a picture; for --test the finished run is enough."""
    system = ["--config", f"configs/systems/{name}.yaml"]
    for typed in ([], ["--text", "a red chair"]):
        with pytest.raises(UserError, match="starts from photographs; give --image, --image_config or --photos"):
            parse([*system, *typed])
    if name in WORDLESS:
        assert parse([*system, "--image", "mug.png", "--text", "a mug"]).text == "a mug"
    else:
        with pytest.raises(UserError, match="wants a prompt beside the photographs; give --text"):
            parse([*system, "--image", "mug.png"])


@pytest.mark.parametrize("typed", [(), ("--sd_version", "embedded")])
@pytest.mark.parametrize("script", CHAINS)
def test_a_later_stage_goes_on_with_the_scene_of_the_one_before(script, typed, tmp_path):
    earlier, before = None, ()
    for name in CHAINS[script]:
        opt = read(name, *typed, *before)
        workspace = tmp_path / name
        opt.save(workspace / "config.yaml")
        if earlier is not None:
            for flag in ("bound", "num_levels", "log2_hashmap_size", "desired_resolution", "hidden_dim", "mlp_layers"):
                assert getattr(opt, flag) == getattr(earlier, flag), flag
            for flag in ("default_polar", "default_azimuth", "default_radius", "default_fovy"):  # the picture's place
                assert name not in FROM_PHOTOS or getattr(opt, flag) == getattr(earlier, flag), flag
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
        assert not {"init_with", "guide_shape", "image", "image_config", "photos", "text"} & {*content}
