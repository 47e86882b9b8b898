"""One page about many runs: `index.html` in the folder that holds their workspaces, written from what lies in them.

Links are relative and pictures are in the page: it works without a network, and it can be moved along with its folder.
"""

import base64
import html
import io
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote

from nerf.page import write_page

TEMPLATE = Path(__file__).with_name("batch_page.html")
OUTPUT = "output.txt"  # what main.py said, where something else than a terminal listened
SIDE = 320  # pixels of a picture at most
TAIL = 4096  # bytes of a text that are looked at
REFRESH = 15  # seconds, while something is still to come
STATES = ("running", "waiting", "failed", "unfinished", "finished")


@dataclass(frozen=True)
class Entry:
    """One run of the page. `state`: one of `STATES`; `note`: one line about it."""

    workspace: Path
    prompt: str
    state: str
    note: str = ""


def finished(workspace: Path) -> bool:
    """Whether a run came to its end: there is a final checkpoint, and the report, the last thing that a run writes, is newer."""
    finals = sorted((workspace / "checkpoints").glob("step_*_final.pt"))
    report = workspace / "report.html"
    try:
        return bool(finals) and report.stat().st_mtime_ns > finals[-1].stat().st_mtime_ns
    except FileNotFoundError:
        return False


def entries(folder: Path) -> list[Entry]:
    """The runs in `folder`, by the names of their workspaces."""
    found = []
    for workspace in sorted(path for path in folder.iterdir() if path.is_dir()):
        if any((workspace / name).is_file() for name in ("config.yaml", "log.txt", OUTPUT)):
            prompt = _settings(workspace).get("text") or workspace.name
            done = finished(workspace)
            note = "" if done else last_error(workspace)
            found.append(
                Entry(workspace, str(prompt), "finished" if done else "failed" if note else "unfinished", note)
            )
    return found


def last_error(workspace: Path) -> str:
    """The last line of `output.txt`, if it tells of an error; else nothing."""
    lines = [line.strip() for line in _tail(workspace / OUTPUT).splitlines() if line.strip()]
    told = lines and re.match(r"error: |[\w.]*(Error|Exception)\b", lines[-1])
    return lines[-1].removeprefix("error: ") if told else ""


def write_index(folder: Path, runs: Sequence[Entry]) -> Path:
    """Write `folder/index.html` and return its path; UserError if that is not possible. A page with runs to come looks for news by itself."""
    counts = Counter(run.state for run in runs)
    told = [f"{len(runs)} prompt{'' if len(runs) == 1 else 's'}"]
    told += [f"{counts[state]} {state}" for state in reversed(STATES) if counts[state]]
    under_way = counts["running"] + counts["waiting"] > 0
    parts = {
        "refresh": f'<meta http-equiv="refresh" content="{REFRESH}">' if under_way else "",
        "title": html.escape(folder.resolve().name),
        "subtitle": " · ".join([*told, time.strftime("%d %B %Y, %H:%M")]),
        "cards": "\n".join(_card(folder, run) for run in runs),
    }
    return write_page(folder / "index.html", TEMPLATE.read_text(encoding="utf-8"), parts)


def _card(folder: Path, run: Entry) -> str:
    workspace = run.workspace
    videos = sorted((workspace / "results").glob("step_*_rgb.mp4"))
    sheets = sorted((workspace / "validation").glob("step_*_rgb.png"))
    source = next(iter([*videos[::-1], *sheets[::-1]]), None)
    picture = _picture(source, source.stat().st_mtime_ns) if source else None
    report = workspace / "report.html"
    if picture is None:
        shown = '<div class="none">no picture yet</div>'
    elif videos:
        video = html.escape(_link(folder, videos[-1]))
        shown = f'<video src="{video}" poster="{picture}" preload="none" loop muted playsinline></video>'
    else:
        shown = f'<img src="{picture}" alt="views from all around">'
    if report.is_file():
        shown = f'<a href="{html.escape(_link(folder, report))}">{shown}</a>'
    facts = [_steps(workspace, run.state), _seconds(workspace)]
    links = [("report", report), ("mesh", _mesh(workspace)), ("video", next(iter(videos[::-1]), None))]
    links += [("log", workspace / "log.txt"), ("output", workspace / OUTPUT)]
    there = [(name, path) for name, path in links if path is not None and path.is_file()]
    anchors = " ".join(f'<a href="{html.escape(_link(folder, path))}">{name}</a>' for name, path in there)
    note = f'<p class="note">{html.escape(run.note)}</p>' if run.note else ""
    return (
        f'<article class="card {run.state}">{shown}<div class="told"><h2>{html.escape(run.prompt)}</h2>'
        f'<p><b class="state">{run.state}</b>{"".join(f"<span>{fact}</span>" for fact in facts if fact)}</p>{note}'
        f'<p class="links">{anchors}</p></div></article>'
    )


def _link(folder: Path, path: Path) -> str:
    return quote(path.relative_to(folder).as_posix())


@lru_cache(maxsize=4096)
def _picture(path: Path, changed: int) -> str | None:
    """The first frame of a video, or the first view of a sheet, as a small data URL; None if it cannot be read. `changed` is when it was written."""
    import imageio_ffmpeg
    from PIL import Image

    try:
        if path.suffix == ".mp4":
            frames = imageio_ffmpeg.read_frames(str(path))
            size = next(frames)["size"]
            image = Image.frombytes("RGB", size, next(frames))
            frames.close()
        else:
            with Image.open(path) as sheet:  # views side by side: the first of them
                image = sheet.convert("RGB").crop((0, 0, min(sheet.size), min(sheet.size)))
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85, optimize=True)
    except (OSError, ValueError, StopIteration, RuntimeError):
        return None
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _settings(workspace: Path) -> dict:
    """config.yaml, or nothing where there is none that can be read."""
    import yaml

    try:
        found = yaml.safe_load((workspace / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _tail(path: Path) -> str:
    """The end of a text; nothing if there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(path.stat().st_size - TAIL, 0))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def _steps(workspace: Path, state: str) -> str:
    """How far it is: by the newest checkpoint, and while it runs by what it said."""
    done = max((int(path.name.split("_")[1].split(".")[0]) for path in _checkpoints(workspace)), default=0)
    if state == "running":
        said = re.findall(r"training (\d+)/\d+,", _tail(workspace / OUTPUT))
        done = max([done, *map(int, said[-1:])])
    total = _settings(workspace).get("iters")
    return "" if not done else f"{done} steps" if state == "finished" or not total else f"{done} of {total} steps"


def _checkpoints(workspace: Path) -> list[Path]:
    return [path for path in (workspace / "checkpoints").glob("step_*.pt") if re.match(r"step_\d+", path.name)]


def _seconds(workspace: Path) -> str:
    """What all phases took together; the last line of a run in log.txt tells it."""
    lines = re.findall(r"^.*  seconds: (.*)$", _tail(workspace / "log.txt"), re.MULTILINE)
    values = [float(value) for value in re.findall(r" (\d+\.\d+)", lines[-1])] if lines else []
    return f"{sum(values):.0f} s" if values else ""


def _mesh(workspace: Path) -> Path | None:
    """The mesh, in the format that most programs read."""
    found = {path.suffix: path for path in (workspace / "mesh").glob("mesh.*")}
    return next((found[kind] for kind in (".glb", ".obj", ".ply", ".usdz", ".stl") if kind in found), None)
