"""The table of flags: names, defaults, help."""

from flags import FLAGS, GROUPS, PRESETS, convert
from options import CONFIGS, ROOT, parse, parser

TEXT = ("--text", "a hamburger")


def test_every_default_is_a_value_that_could_be_typed():
    for name, flag in FLAGS.items():
        value = convert(flag, flag.default, name)
        assert value is None or convert(flag, value, name) == value
        assert flag.kind != "choice" or flag.default in flag.choices


def test_names_are_unique_and_told_in_help():
    assert len(FLAGS) == sum(len(group) for group in GROUPS.values())
    text = parser().format_help()
    for name, flag in FLAGS.items():
        assert (f"  -{name} " if name in PRESETS else f"--{name} ") in text.replace("\n", " ")
        assert flag.help and not flag.help.endswith(".")
    for title in GROUPS:
        assert title in text
    assert "world units, > 0, default 3 3.5" in " ".join(text.split())


def test_the_names_of_stable_dreamfusion_are_kept():
    expected = {
        "guidance_scale": 100,
        "iters": 10000,
        "lr": 1e-3,
        "max_steps": 1024,
        "num_steps": 64,
        "upsample_steps": 32,
    }
    expected |= {
        "update_extra_interval": 16,
        "latent_iter_ratio": 0.2,
        "min_ambient_ratio": 0.1,
        "textureless_ratio": 0.2,
    }
    expected |= {
        "density_thresh": 10,
        "blob_density": 5,
        "blob_radius": 0.2,
        "bg_radius": 1.4,
        "optim": "adan",
        "w": 64,
    }
    expected |= {"radius_range": (3.0, 3.5), "theta_range": (45, 105), "fovy_range": (10, 30), "default_radius": 3.2}
    expected |= {"default_polar": 90, "default_fovy": 20, "t_range": (0.02, 0.98), "lambda_entropy": 1e-3, "W": 800}
    expected |= {
        "lambda_orient": 1e-2,
        "lambda_opacity": 0,
        "grad_clip": -1,
        "jitter_up": 0.02,
        "mcubes_resolution": 256,
    }
    assert {name: FLAGS[name].default for name in expected} == expected


def test_every_config_of_this_repository_is_valid():
    configs = sorted((ROOT / "configs").glob("*.yaml"))
    assert (CONFIGS / "embedded.yaml") in configs
    for path in configs:
        parse([*TEXT, "--config", str(path)])
