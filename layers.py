"""Where the values of flags come from besides the command line: YAML files, saved runs, and what one choice brings along.

A layer is a name for the user (a file, "-O") and values by flag. A *system* is a --config file with a section `embedded`: its other values, those
published for big models, then yield to the settings of the embedded model wherever that is the prior, and the section is added to these.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from errors import UserError
from files import is_mesh_file
from flags import FLAGS, GROUPS, PRESETS, convert

ROOT = Path(__file__).resolve().parent
CONFIGS = ROOT / "configs"
SAVED = "config.yaml"
EMBEDDED = "embedded"  # the section of a system
PHOTOS = ("image", "image_config", "photos")
# what a scene's tensors depend on
_FIELD = {flag.name for flag in GROUPS["Scene"]} - {"latent"}
_SURFACE = _FIELD | {"tet_grid_size", "material"}

Layer = tuple[str, dict[str, Any]]  # where the values come from ("typed", "-O", a file) and the values


def automatic(chosen: list[Layer], typed: Layer, evaluate: bool) -> tuple[list[Layer], list[Layer]]:
    """What the choice of a method, of a prior and of a start brings along, and `chosen` (-O, --config, --file) as it comes after that."""
    embedded = last("hf_key", [], typed) is None and typed[1].get("sd_version") == "embedded"
    if embedded:  # typed, so it takes the place of a system's own model
        big = ("hf_key", "zero123")
        chosen = [(where, {k: v for k, v in layer.items() if k not in big}) for where, layer in chosen]
    method, pixels = last("distill", chosen, typed), last("IF", chosen, typed)
    embedded = last("hf_key", chosen, typed) is None and (pixels or last("sd_version", chosen, typed) == "embedded")
    photos = any(last(name, chosen, typed) for name in PHOTOS)
    alone = photos and last("text", chosen, typed) is None
    for where, layer in [] if evaluate else chosen:
        if EMBEDDED in layer and "known_view_interval" in layer and not photos:
            raise UserError(f"{where}: this system starts from photographs; give --image, --image_config or --photos")
        if EMBEDDED in layer and "sd_version" in layer and alone:
            raise UserError(f"{where}: this system wants a prompt beside the photographs; give --text")
    if alone:
        embedded = last("zero123", chosen, typed) is None
    layers = [_section("distill/published.yaml", method)]
    if photos:
        layers += [_section("photos/defaults.yaml", "alone" if alone else "text")]
    if embedded:
        layers += [(where, _published(layer)) for where, layer in chosen if EMBEDDED in layer]
        chosen = [
            (f"{where} {EMBEDDED}", layer[EMBEDDED]) if EMBEDDED in layer else (where, layer) for where, layer in chosen
        ]
        layers += [read_config(CONFIGS / "embedded.yaml")]
        layers += [read_config(CONFIGS / "embedded-if.yaml")] if pixels else []
        layers += [_section("distill/embedded.yaml", method)]
        layers += [_section("photos/defaults.yaml", "embedded" if alone else "embedded_text")] if photos else []
    if pixels:
        layers += [("--IF", {"latent_iter_ratio": 0.0})]  # there are no latents for normals to stand for
    if last("control", chosen, typed) == "canny":
        layers += [("--control canny", {"latent_iter_ratio": 0.0})]  # it looks for edges in a picture
    known = [*layers, *chosen]
    start = last("init_with", known, typed)
    if is_mesh_file(start):
        layers += [("--init_with", {"dmtet": True})]
    if is_mesh_file(start) or last("dmtet", known, typed):
        layers += [read_config(CONFIGS / "dmtet.yaml")]
        layers += [read_config(CONFIGS / "embedded-dmtet.yaml")] if embedded else []
        layers += [_section("photos/defaults.yaml", "surface")] if photos else []
        layers += [read_config(CONFIGS / "embedded-mesh.yaml")] if embedded and is_mesh_file(start) else []
    if start is not None and not is_mesh_file(start) and not evaluate:
        layers += [_structure_of(start)]
    return layers, [(where, _published(layer)) for where, layer in chosen]


def _published(layer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in layer.items() if name != EMBEDDED}


def _section(name: str, section: str) -> Layer:
    """What one of the files in configs/ says of a method."""
    where, content = _read_yaml(CONFIGS / name)
    return f"{where} {section}", _converted(content.get(section) or {}, f"{where} {section}")


def _structure_of(start: str) -> Layer:
    """How the scene of another run is built, from the settings that it saved."""
    path = Path(start)
    folder = path if path.is_dir() else path.parent.parent
    if not path.exists():
        return start, {}  # said when it is opened
    if not (folder / SAVED).is_file():
        raise UserError(
            f"--init_with {start}: no {SAVED} in {folder}; a checkpoint is read together with its workspace"
        )
    where, values = read_config(folder / SAVED, "; is it damaged?")
    structure = _SURFACE if values.get("dmtet") else _FIELD
    return where, {name: value for name, value in values.items() if name in structure}


def read_config(path: Path, hint: str = "") -> Layer:
    """A YAML file of flag values, all of them known and in range; a system's section `embedded` is under that name. Raises UserError."""
    where, content = _read_yaml(path, hint)
    section = content.pop(EMBEDDED, None)
    values = _converted(content, where)
    if section is not None:
        if not isinstance(section, dict):
            raise UserError(f"{where}: `{EMBEDDED}` is a section of lines such as `iters: 1000`")
        values[EMBEDDED] = _converted(section, f"{where} {EMBEDDED}")
    return where, values


def _read_yaml(path: Path, hint: str = "") -> Layer:
    import yaml

    where = shown(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        reason = getattr(error, "problem", None) or getattr(error, "strerror", None) or error
        raise UserError(f"{where}: cannot be read as YAML: {reason}{hint}") from None
    if not isinstance(content, (dict, type(None))):
        raise UserError(f"{where}: expected lines such as `iters: 1000`, found a {type(content).__name__}{hint}")
    return where, content or {}


def _converted(content: dict[Any, Any], where: str) -> dict[str, Any]:
    values = {}
    for key, value in content.items():
        name = str(key)
        if name not in FLAGS or name in ("config", "file"):
            raise UserError(f"{where}: unknown key {name!r}{suggest(name, FLAGS)}")
        values[name] = convert(FLAGS[name], value, label(name, where))
    return values


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def read_saved(workspace: str) -> Layer:
    path = Path(workspace) / SAVED
    if not path.is_file():
        raise UserError(
            f"--workspace {workspace}: there is no {SAVED} to restore; check the folder, or train first without --test"
        )
    where, values = read_config(path, "; is it damaged? train again, or mend it by hand")
    return where, {name: value for name, value in values.items() if FLAGS[name].saved}


def find(path: str, flag: str) -> Path:
    """A file as named from here, or from the folder of this program."""
    for candidate in (Path(path), ROOT / path):
        if candidate.is_file():
            return candidate
    raise UserError(f"{flag} {path}: no such file")


def last(name: str, sources: list[Layer], typed: Layer):
    """The value of `name` that will win, presets aside (they set none of those asked for)."""
    return next((layer[name] for _, layer in reversed([*sources, typed]) if name in layer), FLAGS[name].default)


def presets(sources: list[Layer], typed: Layer) -> list[Layer]:
    """The one of -O and -O2 that was asked for last."""
    for where, layer in reversed([*sources, typed]):
        asked = [name for name in PRESETS if layer.get(name)]
        if len(asked) > 1:
            raise UserError(
                f"-O and -O2 ({where}) exclude each other: one is for the grid, the other for the plain network; choose one"
            )
        if asked:
            return [(f"-{asked[0]}", PRESETS[asked[0]])]
        if any(name in layer for name in PRESETS):
            return []
    return []


def label(name: str, where: str) -> str:
    """How an error calls a flag: as it was typed, or by file and key."""
    if where in ("typed", "default", "-O", "-O2"):
        return f"-{name}" if name in PRESETS else f"--{name}"
    return f"{where}: {name}"


def suggest(name: str, known: Iterable[str]) -> str:
    folded = {candidate.lower().replace("-", "_"): candidate for candidate in known}
    close = get_close_matches(name.lower().replace("-", "_"), folded, n=1)
    return f"; did you mean {folded[close[0]]}?" if close else " (--help lists every flag)"
