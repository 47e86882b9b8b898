"""The command line: who wins, what is refused and in which words, and what a finished run restores."""

import copy
import os
import pickle

import pytest
import yaml

from errors import UserError
from flags import FLAGS, PRESETS
from options import CONFIGS, Options, parse
from schedule import Schedule

TEXT = ("--text", "a hamburger")
EMBEDDED = CONFIGS / "embedded.yaml"
PRESET = yaml.safe_load(EMBEDDED.read_text())


def refused(*argv) -> str:
    """The one line that `argv` is refused with."""
    with pytest.raises(UserError) as caught:
        parse([str(item) for item in argv])
    line = str(caught.value)
    assert line and "\n" not in line
    return line


@pytest.fixture
def file(tmp_path):
    """`file("x.yaml", "iters: 3")`: writes a file, returns its path as text."""

    def write(name, content):
        (tmp_path / name).write_text(content)
        return str(tmp_path / name)

    return write


# ---- precedence -----------------------------------------------------------------------------------------------------------


def test_every_layer_wins_over_the_ones_below(file):
    config, flags = (
        file("a.yaml", "hf_key: some/model\nlr: 0.3\niters: 30\nfp16: false"),
        file("b.txt", "--lr 0.4 --seed 4"),
    )
    opt = parse([*TEXT, "-O", "--config", config, "--file", flags, "--seed", "5"])
    assert (opt.lr(0), opt.iters, opt.seed) == (0.4, 30, 5)
    assert opt.cuda_ray and not opt.fp16  # the preset's, the file's
    assert opt.bound == 1.0
    origins = {name: opt.origins[name] for name in ("lr", "iters", "seed", "cuda_ray", "fp16", "bound")}
    assert origins == {
        "lr": flags,
        "iters": config,
        "seed": "typed",
        "cuda_ray": "-O",
        "fp16": config,
        "bound": "default",
    }


def test_the_later_file_wins_whatever_its_kind(file):
    config, flags = file("a.yaml", "lr: 0.3"), file("b.txt", "--lr 0.4")
    assert parse([*TEXT, "--config", config, "--file", flags]).lr(0) == 0.4
    assert parse([*TEXT, "--file", flags, "--config", config]).lr(0) == 0.3
    assert parse([*TEXT, "--config", config, "--config", file("c.yaml", "lr: 0.5")]).lr(0) == 0.5
    assert parse(["--lr", "0.6", *TEXT, "--config", config]).lr(0) == 0.6  # typed wins wherever it stands


def test_the_embedded_preset_applies_by_itself_and_lies_lowest(file):
    preset = PRESET
    opt = parse(TEXT)
    assert opt.sd_version == "embedded" and (opt.iters, opt.grid_size) == (preset["iters"], preset["grid_size"])
    for argv in (["--sd_version", "2.1"], ["--hf_key", "some/model"], ["--config", file("a.yaml", "sd_version: 1.5")]):
        big = parse([*TEXT, *argv])
        assert (big.iters, big.grid_size, big.guidance_scale(0)) == (10000, 128, 100)
        assert EMBEDDED.name not in " ".join(big.origins.values())
    assert parse([*TEXT, "--iters", "7"]).iters == 7
    assert parse([*TEXT, "--config", file("b.yaml", "iters: 8")]).iters == 8
    back = parse([*TEXT, "--config", file("a.yaml", "sd_version: 1.5"), "--sd_version", "embedded"])
    assert back.iters == preset["iters"]


def test_the_presets_do_what_their_help_says():
    fast, plain = parse([*TEXT, "-O"]), parse([*TEXT, "-O2"])
    assert fast.fp16 and fast.cuda_ray and fast.backbone == "grid"
    assert plain.fp16 and plain.backbone == "vanilla" and plain.progressive_level and not plain.cuda_ray
    for name, changes in PRESETS.items():
        for flag in changes:
            assert f"--{flag}" in FLAGS[name].help


def test_a_typed_value_wins_over_a_preset_in_any_order():
    for argv in (["-O", "--no_fp16"], ["--no_fp16", "-O"]):
        opt = parse([*TEXT, *argv])
        assert not opt.fp16 and opt.cuda_ray
    assert parse([*TEXT, "-O2", "--backbone", "grid"]).backbone == "grid"


def test_only_one_of_the_presets_and_the_last_layer_chooses(file):
    assert "-O and -O2" in refused(*TEXT, "-O", "-O2")
    config = file("a.yaml", "O: true")
    assert parse([*TEXT, "--config", config]).cuda_ray
    both = parse([*TEXT, "--config", config, "-O2"])
    assert both.backbone == "vanilla" and not both.cuda_ray
    assert not parse([*TEXT, "--config", config, "--no_O"]).cuda_ray


def test_every_switch_can_be_typed_both_ways():
    switches = [
        name for name, flag in FLAGS.items() if flag.kind == "flag" and name not in (*PRESETS, "test", "six_views")
    ]
    assert switches
    for name in switches:
        surface = ["--dmtet"] if name == "lock_geo" else []  # makes no sense without
        assert getattr(parse([*TEXT, f"--{name}", *surface]), name) is True
        assert getattr(parse([*TEXT, f"--no_{name}"]), name) is False
        assert getattr(parse([*TEXT, f"--{name}", f"--no_{name}"]), name) is False


def test_the_user_is_told_what_presets_changed(file):
    lines = parse([*TEXT, "-O", "--no_fp16", "--config", file("a.yaml", "seed: 3\nbound: 1.0")]).changes.splitlines()
    assert any(line.startswith("configs/embedded.yaml: ") and f"iters {PRESET['iters']}" in line for line in lines)
    assert "-O: cuda_ray on" in lines  # fp16 was typed, so it is not the preset's
    assert any(line.endswith("a.yaml: seed 3") for line in lines)  # bound is the default anyway
    assert parse([*TEXT, "--sd_version", "2.1"]).changes == ""


# ---- values -----------------------------------------------------------------------------------------------------------------


def test_values_have_the_kind_of_their_flag():
    opt = parse(
        [*TEXT, "--iters", "1e3", "--radius_range", "2", "2.5", "--view_words", "0", "--phi_range", "-1e1", "10"]
    )
    assert opt.iters == 1000 and type(opt.iters) is int
    assert opt.radius_range == (2.0, 2.5) and opt.phi_range == (-10.0, 10.0)
    assert opt.view_words == 0 and type(opt.view_words) is int
    assert opt.hf_key is None and opt.negative == "" and opt.text == "a hamburger"
    assert parse([*TEXT, "--mesh_threshold", "7.5"]).mesh_threshold == "7.5"
    assert parse([*TEXT, "--decimate_target", "-1", "--grad_clip=-1e-3"]).grad_clip == -1e-3


def test_weights_rates_and_noise_levels_follow_schedules(file):
    typed = parse([*TEXT, "--iters", "100", "--lambda_tv", "[0, 1, 3, 0.5]", "--t_range", "0.1", "[0, 0.9, 0.5, 100]"])
    low, high = typed.t_range
    assert typed.lambda_tv(25) == pytest.approx(2) and typed.lambda_tv(99) == 3  # 0.5 is half of the run
    assert (low(50), high(0), high(50)) == (0.1, 0.9, pytest.approx(0.7))
    config = file("a.yaml", "iters: 100\nlambda_tv: [0, 1, 3, 0.5]\nt_range: [0.1, [0, 0.9, 0.5, 100]]\nlr: 1e-3")
    read = parse([*TEXT, "--config", config])
    assert (read.lambda_tv, read.t_range) == (typed.lambda_tv, typed.t_range)
    assert read.lr(0) == 1e-3  # YAML alone would take 1e-3 for a string
    scheduled = {name for name, flag in FLAGS.items() if flag.kind == "schedule"}
    assert {"lr", "guidance_scale", "lambda_guidance", "lambda_entropy", "lambda_center"} <= scheduled
    assert all(isinstance(getattr(typed, name), Schedule) for name in scheduled)


def test_a_file_of_flags_knows_quotes_and_comments(file):
    flags = file("flags.txt", "--text 'a blue chair'  # the prompt\n# --iters 3\n-O\n--lambda_tv \"[0, 1, 3, 0.5]\"\n")
    opt = parse(["--file", flags])
    assert opt.text == "a blue chair" and opt.fp16 and opt.iters == PRESET["iters"] and opt.lambda_tv.max() == 3
    outer = file("outer.txt", f"--config {file('in.yaml', 'seed: 9')} --iters 4")
    assert (parse([*TEXT, "--file", outer]).seed, parse([*TEXT, "--file", outer]).iters) == (9, 4)


def test_a_config_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse([*TEXT, "--sd_version", "2.1", "--config", "configs/embedded.yaml"]).iters == PRESET["iters"]


def test_options_are_read_only_and_can_be_copied():
    opt = parse(TEXT)
    with pytest.raises(AttributeError, match="read-only"):
        opt.iters = 3
    with pytest.raises(AttributeError):
        opt.new = 3
    with pytest.raises((AttributeError, TypeError)):
        del opt.iters
    with pytest.raises(TypeError):
        opt.origins["iters"] = "me"
    for twin in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert isinstance(twin, Options) and twin == opt
    assert opt != parse([*TEXT, "--seed", "1"])


# ---- restoring --------------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_restored_by_its_folder_alone(tmp_path):
    workspace = str(tmp_path / "a run")
    typed = [
        "--text",
        'a "red": chair # 1\nwith a 2nd line',
        "--workspace",
        workspace,
        "-O",
        "--no_fp16",
        "--iters",
        "20",
    ]
    typed += ["--t_range", "0.1", "[0, 0.9, 0.5, 1]", "--background", "#80a0ff", "--hf_key", "1.5", "--device", "cpu"]
    first = parse(typed)
    first.save(os.path.join(workspace, "config.yaml"))
    for action in ("--test", "--six_views"):
        again = parse(["--workspace", workspace, action])
        changed = {name for name in FLAGS if name in vars(first) and getattr(again, name) != getattr(first, name)}
        assert changed == {action[2:], "device"}  # what concerns the call itself is not restored
        assert again.changes == f"settings restored from {workspace}/config.yaml"
    more = parse(["--workspace", workspace, "--test", "--W", "32", "--fp16", "--iters", "40"])
    assert (more.W, more.fp16, more.text) == (32, True, first.text)
    assert more.t_range[1](20) == pytest.approx(0.7)  # fractions of the run stay fractions


def test_whatever_could_be_trained_can_be_restored(tmp_path):
    for i, argv in enumerate((["--bg_radius", "-1"], ["--mesh_threshold", "3"], ["-O2"], ["--negative", "ugly: #2"])):
        workspace = str(tmp_path / str(i))
        first = parse([*TEXT, "--hf_key", "some/model", "--workspace", workspace, *argv])
        first.save(os.path.join(workspace, "config.yaml"))
        again = parse(["--workspace", workspace, "--test"])
        assert all(getattr(again, name) == getattr(first, name) for name, flag in FLAGS.items() if flag.saved)


def test_the_saved_file_tells_where_values_come_from_and_is_whole(tmp_path):
    path = tmp_path / "new" / "config.yaml"
    opt = parse([*TEXT, "-O", "--seed", "3"])
    opt.save(path)
    lines = path.read_text().splitlines()
    assert "text: a hamburger  # typed" in lines and "seed: 3  # typed" in lines
    assert "cuda_ray: true  # -O" in lines and "bound: 1.0" in lines
    assert set(yaml.safe_load(path.read_text())) == {name for name, flag in FLAGS.items() if flag.saved}
    assert [entry.name for entry in path.parent.iterdir()] == ["config.yaml"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        opt.save(tmp_path / "file" / "config.yaml")


def test_every_value_survives_saving(tmp_path):
    argv = [*TEXT]
    samples = {"int": "17", "float": "0.75", "schedule": "[0, 0.5, 0.75, 9]", "text": '\'tis #1: "x"'}
    special = {
        "text",
        "workspace",
        "config",
        "file",
        "background",
        "mesh_threshold",
        "ckpt",
        "mesh_format",
        "min_near",
        "negative_w",
        "IF",
        "latent",
        "latent_iter_ratio",
    }
    for name, flag in FLAGS.items():
        if name in special or flag.kind not in (*samples, "choice", "flag") or not flag.saved:
            continue
        value = {"choice": flag.choices and flag.choices[-1]}.get(flag.kind, samples.get(flag.kind))
        argv += [f"--{name}"] if flag.kind == "flag" else [f"--{name}", str(value)]
    argv += ["--desired_resolution", "170", "--latent_iter_ratio", "0"]
    opt = parse([*argv, "--workspace", str(tmp_path)])
    opt.save(tmp_path / "config.yaml")
    again = parse(["--workspace", str(tmp_path), "--test"])
    for name, flag in FLAGS.items():
        if flag.saved:
            assert getattr(again, name) == getattr(opt, name), name


def test_nothing_to_restore_is_said(tmp_path):
    assert "no config.yaml" in refused("--workspace", tmp_path, "--test")
    (tmp_path / "config.yaml").write_text("text: [unclosed")
    assert "damaged" in refused("--workspace", tmp_path, "--test")
    (tmp_path / "config.yaml").write_text("text: a chair")
    assert parse(["--workspace", str(tmp_path), "--test"]).text == "a chair"
    assert "--ckpt scratch" in refused("--workspace", tmp_path, "--test", "--ckpt", "scratch")


# ---- mistakes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["--text", "missing"]),
        (["--text", " "], ["--text", "empty"]),
        (["--text", "a", "hamburger"], ["hamburger", "quotes"]),
        ([*TEXT, "--lambda_entropi", "3"], ["--lambda_entropi", "did you mean --lambda_entropy?"]),
        ([*TEXT, "--batch-size=2"], ["--batch-size", "did you mean --batch_size?"]),
        ([*TEXT, "--no_cuda_rays"], ["did you mean --no_cuda_ray?"]),
        (["--tex", "a"], ["unknown flag --tex"]),  # no abbreviations: they change their meaning when a flag is added
        ([*TEXT, "--lr"], ["--lr", "expected one argument"]),
        ([*TEXT, "--radius_range", "3"], ["--radius_range", "2 arguments"]),
        ([*TEXT, "--iters", "0"], ["--iters 0", "must be > 0"]),
        ([*TEXT, "--iters", "many"], ["--iters many", "not a number"]),
        ([*TEXT, "--iters", "1.5"], ["--iters 1.5", "whole number"]),
        ([*TEXT, "--w", "-64"], ["--w -64", "must be > 0"]),
        ([*TEXT, "--h", "0"], ["--h 0", "must be > 0"]),
        ([*TEXT, "--lr", "nan"], ["--lr nan", "finite"]),
        ([*TEXT, "--lambda_tv", "-1"], ["--lambda_tv -1", ">= 0"]),
        ([*TEXT, "--lambda_tv", "[0, 1, -1, 5]"], ["--lambda_tv", ">= 0"]),
        ([*TEXT, "--lambda_tv", "[0, 1"], ["--lambda_tv", "quotes"]),
        ([*TEXT, "--lambda_tv", "[0, 1, 2]"], ["--lambda_tv", "four numbers"]),
        ([*TEXT, "--theta_range", "20", "190"], ["--theta_range", "[0, 180]"]),
        ([*TEXT, "--fovy_range", "0", "20"], ["--fovy_range", "(0, 180)"]),
        ([*TEXT, "--radius_range", "3", "2"], ["--radius_range 3 2", "above"]),
        ([*TEXT, "--t_range", "0.5", "0.2"], ["--t_range 0.5 0.2", "above"]),
        ([*TEXT, "--t_range", "0.4", "[0, 0.9, 0.3, 1]"], ["--t_range", "above"]),  # only at the end of the run
        ([*TEXT, "--t_range", "0.4", "1.2"], ["--t_range", "[0, 1]"]),
        ([*TEXT, "--backbone", "gird"], ["--backbone gird", "did you mean grid?"]),
        ([*TEXT, "--optim", "lion"], ["--optim lion", "adan, adam"]),
        ([*TEXT, "--background", "blue"], ["--background blue", "#80a0ff"]),
        ([*TEXT, "--background", "mlp", "--bg_radius", "-1"], ["--background mlp", "--bg_radius -1"]),
        ([*TEXT, "--mesh_threshold", "low"], ["--mesh_threshold", "not a number"]),
        ([*TEXT, "--mesh_threshold", "0"], ["--mesh_threshold", "> 0"]),
        ([*TEXT, "--desired_resolution", "4"], ["--desired_resolution 4", "--base_resolution 8"]),
        ([*TEXT, "--min_near", "3.2"], ["--min_near 3.2", "--radius_range"]),
        ([*TEXT, "--config", "absent.yaml"], ["--config absent.yaml", "no such file"]),
        ([*TEXT, "--file", "absent.txt"], ["--file absent.txt", "no such file"]),
    ],
)
def test_a_mistake_gets_one_line_that_names_the_flag(argv, words):
    line = refused(*argv)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("iter: 3", ["unknown key 'iter'", "did you mean iters?"]),
        ("iters: -3", ["a.yaml: iters -3", "must be > 0"]),
        ("iters: yes", ["a.yaml: iters", "number"]),
        ("fp16: 3", ["a.yaml: fp16", "true or false"]),
        ("iters:", ["a.yaml: iters", "no value"]),
        ("radius_range: 3", ["a.yaml: radius_range", "two values"]),
        ("radius_range: [3, 2]", ["a.yaml: radius_range", "above"]),
        ("text: [a, b]", ["a.yaml: text", "must be text"]),
        ("- a list", ["a.yaml", "found a list"]),
        ("iters: [1, 2", ["a.yaml", "YAML"]),
        ("config: b.yaml", ["unknown key 'config'"]),
        ("3: 4", ["unknown key '3'"]),
    ],
)
def test_a_mistake_in_a_config_names_file_and_key(file, content, words):
    line = refused(*TEXT, "--config", file("a.yaml", content))
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("--iter 3", ["--iter", "did you mean --iters?"]),
        ("--iters -3", ["flags.txt: iters -3"]),
        ("--text 'open", ["flags.txt", "quotation"]),
        ("--file other.txt", ["flags.txt", "cannot name another"]),
        ("--help", ["flags.txt", "--help"]),
    ],
)
def test_a_mistake_in_a_file_of_flags_is_refused(file, content, words):
    line = refused(*TEXT, "--file", file("flags.txt", content))
    assert all(word in line for word in words), line


# -- what a method and a prior bring along ---------------------------------------------------------------------------------


def test_a_method_brings_its_published_settings_unless_they_are_typed():
    opt = parse([*TEXT, "--sd_version", "1.5", "--distill", "ism"])
    assert (opt.guidance_scale(0), opt.inversion_steps, opt.interval) == (7.5, 4, 0.05)
    assert opt.origins["inversion_steps"] == "configs/distill/published.yaml ism"
    assert parse([*TEXT, "--sd_version", "1.5", "--distill", "ism", "--inversion_steps", "2"]).inversion_steps == 2
    assert parse([*TEXT, "--sd_version", "1.5"]).guidance_scale(0) == 100
    bridge = parse([*TEXT, "--sd_version", "1.5", "--distill", "bridge", "--iters", "100"]).guidance_scale
    assert (bridge(79), bridge(81)) == (100, 40)


def test_the_embedded_models_go_before_the_published_settings():
    opt = parse([*TEXT, "--distill", "bridge"])
    assert opt.source == "" and opt.guidance_scale(0) < 10


def test_every_method_s_settings_are_flags_of_known_methods():
    from guidance.methods import METHODS

    for name in ("published.yaml", "embedded.yaml"):
        assert set(yaml.safe_load((CONFIGS / "distill" / name).read_text())) <= set(METHODS)
    assert tuple(METHODS) == FLAGS["distill"].choices
    for method in METHODS:
        parse([*TEXT, "--distill", method])
        parse([*TEXT, "--distill", method, "--sd_version", "1.5"])


def test_pixels_have_no_latents_to_start_with():
    assert parse([*TEXT, "--IF", "--hf_key", "DeepFloyd/IF-I-XL-v1.0"]).latent_iter_ratio == 0
    assert parse([*TEXT, "--IF", "--hf_key", "a/b", "--latent_iter_ratio", "0.1"]).latent_iter_ratio == 0.1
    assert parse([*TEXT, "--control", "canny", "--sd_version", "1.5"]).latent_iter_ratio == 0
    assert parse([*TEXT, "--control", "depth", "--sd_version", "1.5"]).latent_iter_ratio == 0.2
    assert parse([*TEXT, "--IF"]).iters == PRESET["iters"]  # tiny-if, with the embedded preset


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--view_group", "4", "--batch_size", "6"], "--batch_size 6 must be a multiple"),
        (["--IF", "--control", "depth"], "not with --IF"),
        (["--control_key", "x/y"], "--control normal, depth or canny"),
        (["--control", "canny", "--latent_iter_ratio", "0.1"], "use --latent_iter_ratio 0"),
        (["--lambda_eikonal", "1"], "add --backbone sdf"),
    ],
)
def test_what_does_not_go_together(words, reason):
    with pytest.raises(UserError, match=reason):
        parse([*TEXT, *words])
