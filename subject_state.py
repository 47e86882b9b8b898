"""What a DreamBooth3D workspace remembers: which stage is complete, with which settings; and its page."""

import hashlib
import html
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from errors import UserError, say
from files import atomic
from guidance.weights import read_json
from nerf.page import write_page

RECORD, PAGE = "dreambooth3d.json", "report.html"
# Each stage and those whose results it takes.
STAGES: dict[str, tuple[str, ...]] = {
    "personalise": (),
    "nerf": ("personalise",),
    "views": ("personalise", "nerf"),
    "multiview": ("personalise", "views"),
    "final": ("multiview", "views"),
    "mesh": ("final",),
    "context": ("final",),
}
ABOUT = {
    "personalise": "the photographs learnt: an adapter that stopped early, and one that knows them well",
    "nerf": "a scene by the early one",
    "views": "that scene from all around, drawn over with the other one",
    "multiview": "an adapter that learnt from these pictures and the photographs",
    "final": "its scene, which also looks at the pictures",
    "mesh": "its surface",
    "context": "the subject in another guise",
}
SHOWN = {"personalise": "adapters/samples.png", "views": "pseudo/sheet.png"}


def digest(paths: Sequence[Path], value: Any = None) -> str:
    """A text that changes with the files' contents and with the value."""
    found = hashlib.sha256(json.dumps(value, sort_keys=True).encode())
    for path in paths:
        found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:16]


class State:
    """The record in `workspace`. Raises UserError if it is of another subject, unless everything begins anew (`scratch`)."""

    def __init__(self, workspace: Path, inputs: dict[str, str], scratch: bool) -> None:
        self.path, self.inputs = workspace / RECORD, inputs
        known = read_json(self.path) if self.path.is_file() else {"inputs": inputs, "stages": {}}
        if known["inputs"] != inputs and not scratch:
            changed = next(name for name in inputs if known["inputs"].get(name) != inputs[name])
            raise UserError(
                f"--workspace {workspace}: is of another subject (other {changed}); choose another folder, or start over with "
                "--ckpt scratch"
            )
        self.stages: dict[str, dict[str, Any]] = known["stages"]

    def forget(self, stages: Sequence[str]) -> None:
        """These stages and all that take their results are to be done again."""
        gone = set(stages)
        for stage, needs in STAGES.items():
            if stage in gone or gone & set(needs):
                gone.add(stage)
                self.stages.pop(stage, None)
        self._write()

    def complete(self, stage: str, key: str) -> bool:
        """Whether the stage came to its end with the settings that `key` stands for."""
        own = self.stages.get(stage, {})
        return own.get("key") == key and "seconds" in own

    def begin(self, stage: str, key: str) -> bool:
        """Notes that the stage is under way; whether it begins anew."""
        own = self.stages.get(stage)
        if own and own["key"] == key:
            return False
        if own:
            say(f"{stage}: other settings than before; it is made anew")
        self.forget([stage])
        self.stages[stage] = {"key": key}
        self._write()
        return True

    def end(self, stage: str, seconds: float) -> None:
        """The stage is complete; `seconds`: of the call that ended it."""
        self.stages[stage]["seconds"] = round(seconds, 1)
        self._write()

    def _write(self) -> None:
        with atomic(self.path) as beside:
            beside.write_text(json.dumps({"inputs": self.inputs, "stages": self.stages}, indent=1))


# -- the page ------------------------------------------------------------------------------------------------------------

_TEMPLATE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{title}} · Somnium</title>
<style>
{{style}}h2 { margin: 0; font-size: 18px; font-weight: 620; }
section p { margin: 0 0 10px; color: var(--soft); }
section { padding: 16px; margin-top: 20px; }
img, video { max-width: 100%; border-radius: 8px; }
.photos img { height: 120px; margin-right: 8px; }
video { width: 320px; }
</style></head>
<body><main><header><p class="brand">Somnium · DreamBooth3D</p><h1>{{title}}</h1><p>{{time}}</p></header>{{sections}}</main></body></html>
"""


def write_report(workspace: Path, prompt: str, context: str | None, state: State, photographs: Sequence[Path]) -> Path:
    """WORKSPACE/report.html: the photographs, and what each stage made, with links to the stages' own reports. Small copies of the
    photographs lie in WORKSPACE/photos, so that the folder can be moved."""
    shown = "".join(f'<img src="{quote(_small(path, workspace / "photos"))}" alt="">' for path in photographs)
    parts = [f'<section class="card photos"><h2>photographs</h2>{shown}</section>']
    parts += [_section(workspace, stage, state) for stage in STAGES if stage != "context" or context]
    return write_page(
        workspace / PAGE,
        _TEMPLATE,
        {"title": html.escape(prompt), "time": time.strftime("%d %B %Y, %H:%M"), "sections": "".join(parts)},
    )


def _section(workspace: Path, stage: str, state: State) -> str:
    own = state.stages.get(stage, {})
    told = f"{own['seconds']:.0f} s" if "seconds" in own else "under way" if own else "to come"
    inside = [f"<h2>{stage}</h2><p>{html.escape(ABOUT[stage])} · {told}</p>"]
    picture = workspace / SHOWN.get(stage, "absent")
    if picture.is_file():
        inside.append(f'<img src="{quote(SHOWN[stage])}" alt="{stage}">')
    videos = sorted((workspace / stage / "results").glob("*_rgb.mp4"))
    if videos:
        place = quote(videos[-1].relative_to(workspace).as_posix())
        inside.append(f'<video src="{place}" autoplay loop muted playsinline></video>')
    for name, path in (("report", f"{stage}/report.html"), ("mesh", f"{stage}/mesh/mesh.glb")):
        if (workspace / path).is_file():
            inside.append(f'<p><a href="{quote(path)}">{name}</a></p>')
    return f'<section class="card">{"".join(inside)}</section>'


def _small(path: Path, folder: Path) -> str:
    """A copy of a photograph, 240 pixels at most, its place relative to the page."""
    from PIL import Image, ImageOps

    copy = folder / f"{path.stem}.jpg"
    if not copy.is_file():
        with Image.open(path) as picture:
            small = ImageOps.exif_transpose(picture).convert("RGB")
        small.thumbnail((240, 240))
        with atomic(copy) as beside:
            small.save(beside, quality=85)
    return f"{folder.name}/{copy.name}"
