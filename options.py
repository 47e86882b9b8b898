"""The command line: one read-only object that holds the value of every flag.

    default < configs/distill/published.yaml (for --distill) < configs/embedded*.yaml (with an embedded model) < --IF
            < configs/dmtet.yaml (for --dmtet) < the run that --init_with names < -O, -O2 < --config, --file < what was typed (layers.py)

With --test and --six_views what a run saved in WORKSPACE/config.yaml comes before -O. The flags themselves are in flags.py. Nothing
heavy is imported here, so that --help answers at once.
"""

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import library
from errors import UserError
from files import atomic
from flags import FLAGS, GROUPS, PRESETS, Flag, convert, show
from layers import (
    CONFIGS,
    PHOTOS,
    ROOT,
    SAVED,
    Layer,
    automatic,
    find,
    label,
    last,
    presets,
    read_config,
    read_saved,
    shown,
    suggest,
)
from schedule import Schedule

__all__ = ["CONFIGS", "ROOT", "SAVED", "Options", "Parser", "parse", "parser"]

VERSION = "0.1"
_ABOUT_CALL = ("O", "O2", "config", "file", "prompt_library")  # steer the parsing itself; not attributes of the result
_SEVERAL = ("pair", "schedules")
MESH_FORMATS = ("obj", "glb", "ply", "usdz", "stl")


class Options:
    """The value of every flag as an attribute, read-only. Weights, rates and the ends of `t_range` are functions of the step.

    `origins` tells where each value comes from, `changes` is a text for the user: what the presets and files changed.
    """

    def __init__(self, values: dict[str, Any], origins: dict[str, str]):
        self.__dict__.update(values)
        self.__dict__["origins"] = MappingProxyType(dict(origins))

    def __setattr__(self, name, value):
        raise AttributeError(f"options are read-only: {name}")

    __delattr__ = None

    def __reduce__(self):
        return Options, ({name: getattr(self, name) for name in self.__dict__ if name != "origins"}, dict(self.origins))

    def __eq__(self, other):
        if not isinstance(other, Options):
            return NotImplemented
        return {**self.__dict__, "origins": 0} == {**other.__dict__, "origins": 0}

    __hash__ = None

    def __repr__(self) -> str:
        return f"Options({', '.join(f'{name}={value!r}' for name, value in self.__dict__.items() if name in FLAGS)})"

    @property
    def changes(self) -> str:
        """One line per preset or file: what it set to something else than the default."""
        lines = []
        defaults = _resolved({name: convert(flag, flag.default, name) for name, flag in FLAGS.items()})
        for origin in dict.fromkeys(self.origins.values()):
            names = [name for name, where in self.origins.items() if where == origin]
            changed = [name for name in names if getattr(self, name) != defaults[name]]
            if origin in ("default", "typed") or not changed:
                continue
            if origin == shown(Path(self.workspace) / SAVED):
                lines.append(f"settings restored from {origin}")
            else:
                lines.append(f"{origin}: " + ", ".join(f"{name} {show(getattr(self, name))}" for name in changed))
        return "\n".join(lines)

    def changed(self, **values: Any) -> "Options":
        """The same with other values for some flags; UserError if they make no sense."""
        new = {name: convert(FLAGS[name], value, label(name, "typed")) for name, value in values.items()}
        kept = {name: getattr(self, name) for name in self.__dict__ if name != "origins"}
        origins = {**self.origins, **dict.fromkeys(new, "typed")}
        _check(kept | new, origins)
        return Options(_resolved(kept | new), origins)

    def save(self, path) -> None:
        """Write what a later --test needs, grouped and with the origin of each value as a comment; whole or not at all.

        Raises UserError when the file cannot be written.
        """
        lines = ["# What this run was made with. `main.py --workspace THIS_FOLDER --test` reads it."]
        for title, group in GROUPS.items():
            saved = [flag.name for flag in group if flag.saved]
            lines += ["", f"# {title}"] if saved else []
            for name in saved:
                origin = self.origins[name]
                lines.append(
                    f"{name}: {_to_yaml(getattr(self, name))}" + ("" if origin == "default" else f"  # {origin}")
                )
        with atomic(Path(path)) as beside:
            beside.write_text("\n".join(lines) + "\n", encoding="utf-8")


def parse(argv: Sequence[str] | None = None) -> Options:
    """The options that `argv` (default: the command line) asks for.

    Raises UserError for everything a user can get wrong; leaves by SystemExit only for --help and --version.
    """
    typed, sources = _read_arguments(argv, "typed")
    evaluate = last("test", sources, typed) or last("six_views", sources, typed)
    chosen = [*presets(sources, typed), *sources]
    if evaluate:
        chosen.insert(0, read_saved(last("workspace", sources, typed)))
    before, chosen = automatic(chosen, typed, evaluate)

    values = {name: convert(flag, flag.default, f"--{name}") for name, flag in FLAGS.items()}
    origins = dict.fromkeys(FLAGS, "default")
    for where, layer in [*before, *chosen, typed]:
        values |= layer
        origins |= dict.fromkeys(layer, where)
    if values["text"] is not None:
        values["text"] = library.resolve(values["text"], values["prompt_library"])
    _check(values, origins)
    kept = {name: value for name, value in values.items() if name not in _ABOUT_CALL}
    return Options(_resolved(kept), {name: origins[name] for name in kept})


def parser() -> argparse.ArgumentParser:
    """The argparse side of the table: grouped help with units, ranges and defaults."""
    result = Parser(
        prog="main.py",
        description='Text in, a 3-D model out. Start with: main.py --text "a hamburger" --workspace trial -O --save_mesh',
        epilog=(
            "A flag that is a switch can be turned off with --no_NAME. A value marked (schedule) may change with the step: a quoted list "
            '"[step0, value0, value1, step1, ...]", steps up to 1 being fractions of the run. '
            "Precedence: default < embedded preset < -O, -O2 < --config, --file < typed."
        ),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=118),
        usage="main.py --text TEXT [--workspace FOLDER] [-O | -O2] [flags]",
    )
    result._negative_number_matcher = re.compile(r"-(\d|\.\d|inf|nan)")  # -1e-3 is a value, not a flag
    result.add_argument("--version", action="version", version=f"Somnium {VERSION}", help="show the version and exit")
    for title, group in GROUPS.items():
        section = result.add_argument_group(title)
        for flag in group:
            add_flag(section, flag)
    return result


class Parser(argparse.ArgumentParser):
    """Refuses with a UserError of one line."""

    def error(self, message):
        raise UserError(f"{message.removeprefix('argument ')} (--help lists every flag)")


class _Source(argparse.Action):
    """--config and --file: kept in the order in which they were typed."""

    def __call__(self, parser, namespace, value, option_string=None):
        namespace.sources = [*getattr(namespace, "sources", []), (self.dest, value)]


def add_flag(section, flag: Flag) -> None:
    """A row of the table as an argument of argparse."""
    help_text = f"{flag.help} {_facts(flag)}".replace("%", "%%").strip()
    if flag.kind == "flag":
        dash = "-" if flag.name in PRESETS else "--"
        section.add_argument(dash + flag.name, action="store_true", help=help_text)
        section.add_argument(f"--no_{flag.name}", dest=flag.name, action="store_false", help=argparse.SUPPRESS)
        return
    several = flag.kind in _SEVERAL
    section.add_argument(
        f"--{flag.name}",
        nargs=2 if several else None,
        metavar=("LOW", "HIGH") if several else _metavar(flag),
        help=help_text,
        action=_Source if flag.name in ("config", "file") else "store",
    )


def _metavar(flag: Flag) -> str:
    return {"int": "N", "text": "TEXT", "choice": "|".join(map(str, flag.choices))}.get(flag.kind, "X")


def _facts(flag: Flag) -> str:
    """Unit, range and default, as the end of a help line."""
    facts = [flag.unit, flag.range if flag.range.startswith(">") or not flag.range else f"in {flag.range}"]
    if flag.kind == "flag":
        facts.append(f"on unless --no_{flag.name}" if flag.default else "")
    elif flag.default not in (None, ""):
        facts.append(f"default {show(flag.default)}")
    text = ", ".join(fact for fact in facts if fact)
    return ("(schedule) " if flag.kind.startswith("schedule") else "") + (f"[{text}]" if text else "")


def _read_arguments(argv: Sequence[str] | None, where: str) -> tuple[Layer, list[Layer]]:
    """What was typed, and the --config and --file layers in their order."""
    found, unknown = parser().parse_known_args(argv)
    if unknown:
        raise UserError(_unknown_argument(unknown))
    values = vars(found)
    sources = []
    for kind, path in values.pop("sources", []):
        if kind == "config":
            sources.append(read_config(find(path, "--config")))
        elif where != "typed":
            raise UserError(
                f"--file {where}: a file of flags cannot name another one; put its flags on the command line"
            )
        else:
            sources += _read_flag_file(find(path, "--file"))
    return (where, {name: convert(FLAGS[name], value, label(name, where)) for name, value in values.items()}), sources


def _read_flag_file(path: Path) -> list[Layer]:
    try:
        words = shlex.split(path.read_text(encoding="utf-8"), comments=True)
    except (OSError, ValueError) as error:
        raise UserError(f"--file {path}: {error}") from None
    if "-h" in words or "--help" in words or "--version" in words:
        raise UserError(f"--file {path}: holds a flag that only makes sense on the command line (--help, --version)")
    typed, sources = _read_arguments(words, str(path))
    return [*sources, typed]


def _unknown_argument(words: list[str]) -> str:
    flags = [word.partition("=")[0] for word in words if word.startswith("-")]
    if not flags:
        return f'unexpected {words[0]!r}: put quotes around a value of several words, as in --text "a hamburger"'
    switches = [f"--no_{name}" for name, flag in FLAGS.items() if flag.kind == "flag"]
    known = [label(name, "typed") for name in FLAGS] + switches
    return f"unknown flag {flags[0]}{suggest(flags[0], known)}"


def _resolved(values: dict[str, Any]) -> dict[str, Any]:
    """The same values, with schedules that know how long the run is."""

    def resolve(value):
        if isinstance(value, tuple):
            return tuple(resolve(item) for item in value)
        return value.resolved(values["iters"]) if isinstance(value, Schedule) else value

    return {name: resolve(value) for name, value in values.items()}


def _check(values: dict[str, Any], origins: dict[str, str]) -> None:
    """What no single value shows: combinations that cannot be meant. Raises UserError."""

    def refuse(name: str, reason: str):
        raise UserError(f"{label(name, origins[name])} {show(values[name])}: {reason}")

    evaluate = values["test"] or values["six_views"]
    photos = any(values[name] for name in PHOTOS)
    if values["text"] is None and not evaluate and not photos:
        raise UserError(
            '--text is missing: say what to make, as in --text "a hamburger" (or show it: --image; or restore a finished run with --test)'
        )
    if values["text"] is not None and not values["text"].strip():
        refuse("text", 'it is empty; say what to make, as in --text "a hamburger"')
    if evaluate and values["ckpt"] == "scratch":
        refuse("ckpt", "leaves nothing to test; name a checkpoint, or leave --test out")
    low, high = (end.resolved(values["iters"]) for end in values["t_range"])
    if any(low(step) > high(step) for step in {0, *low.steps, *high.steps}):
        refuse("t_range", "the low end must never be above the high end")
    if values["desired_resolution"] < values["base_resolution"]:
        refuse("desired_resolution", f"must not be below --base_resolution {values['base_resolution']}")
    if values["min_near"] >= values["radius_range"][0]:
        refuse("min_near", f"must be below the smallest camera distance, --radius_range {show(values['radius_range'])}")
    background = values["background"]
    if background not in ("random", "mlp", "white", "black") and not re.fullmatch("#[0-9a-fA-F]{6}", background):
        refuse("background", "must be random, mlp, white, black or a colour such as #80a0ff")
    if background == "mlp" and values["bg_radius"] <= 0 and origins["background"] != "default" and not evaluate:
        refuse("background", f"needs a background network: --bg_radius {show(values['bg_radius'])} must be above 0")
    if values["batch_size"] % values["view_group"]:
        refuse("view_group", f"--batch_size {values['batch_size']} must be a multiple of it")
    if values["latent"] and (values["IF"] or values["dmtet"] or values["lambda_clip"].max() > 0):
        refuse(
            "latent",
            "goes neither with --IF, which has no latents, nor with --dmtet and --lambda_clip, which need colors",
        )
    if values["lambda_zero123"].max() > 0 and not photos and not evaluate:
        refuse("lambda_zero123", "there is no picture to go by; give --image, --image_config or --photos")
    if photos and values["latent"]:
        refuse("latent", "photographs have no latents; leave one of them out")
    if values["guide_shape"] is None and values["lambda_shape"].max() > 0:
        refuse("lambda_shape", "name the shape with --guide_shape")
    if values["lambda_eikonal"].max() > 0 and values["backbone"] != "sdf":
        refuse("lambda_eikonal", "concerns distances; add --backbone sdf")
    if values["control"] != "none" and values["IF"]:
        refuse("control", "goes with Stable Diffusion, not with --IF; leave one of them out")
    if values["control"] == "canny" and values["latent_iter_ratio"] > 0:
        refuse("control", "finds edges in pictures; with it, use --latent_iter_ratio 0")
    if values["control_key"] and values["control"] == "none":
        refuse("control_key", "say what it is to see: --control normal, depth or canny")
    for name in ("lock_geo", "material"):
        if values[name] not in (False, "plain") and not values["dmtet"]:
            refuse(name, "concerns surfaces; add --dmtet")
    if values["gui"] and (values["viewer"] or values["six_views"]):
        refuse("gui", "goes neither with --viewer nor with --six_views; leave one of them out")
    formats = [name.strip().lower() for name in values["mesh_format"].split(",")]
    if not set(formats) <= set(MESH_FORMATS):
        refuse("mesh_format", f"must be some of {', '.join(MESH_FORMATS)}, separated by commas")
    if values["mesh_threshold"] != "auto":
        convert(_THRESHOLD, values["mesh_threshold"], label("mesh_threshold", origins["mesh_threshold"]))


_THRESHOLD = Flag("mesh_threshold", "float", None, "", range="> 0")


def _to_yaml(value: Any) -> str:
    """One value on one line of YAML."""
    import yaml

    def plain(item):
        if isinstance(item, Schedule):
            return item.to_yaml()
        return [plain(part) for part in item] if isinstance(item, tuple) else item

    style = '"' if isinstance(value, str) and not value.isprintable() else None  # a line break would end the line
    text = yaml.safe_dump(
        plain(value), default_flow_style=True, default_style=style, allow_unicode=True, width=float("inf")
    )
    return text.removesuffix("...\n").strip()
