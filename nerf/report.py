"""One page that tells the story of a run: `report.html`, made of what lies in the workspace, complete in itself, readable without a network."""

import base64
import html
import io
import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mesh import Mesh
from mesh.export import read_glb
from mesh.extract import decimate, vertex_normals
from nerf import media
from nerf.page import write_page
from nerf.results import subject

TEMPLATE = Path(__file__).with_name("report.html")
FRAMES = 48  # of the turntable
FRAME_SIDE = 400  # pixels at most
FACES = 60000  # of the embedded mesh at most
GROWTH = 6  # validations shown at most

History = dict[str, list[list[float]]]


def write_report(
    opt: Any,
    workspace: Path,
    step: int,
    history: History,
    times: dict[str, float],
    device: torch.device,
    gpu_memory: int | None = None,
) -> Path:
    """Write `workspace/report.html` and return its path.

    Shown are the turntable of `step`, the mesh (if it is of this prompt), the validation sheets, the curves of `history`
    ({name: [[step, value], ...]}), the options, `times` (seconds by phase), the memory (`gpu_memory` in bytes) and the files.
    """
    strip, shape = _strip(workspace / "results", step), _mesh(workspace / "mesh" / "mesh.glb", subject(opt))
    prompt = html.escape(subject(opt) or "no prompt")
    threads = torch.get_num_threads()
    processor = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else processor
    subtitle = f"{step} steps · {where} · {time.strftime('%d %B %Y, %H:%M')}"
    parts = {
        "title": f"{prompt} · Somnium",
        "prompt": f"“{prompt}”",
        "subtitle": html.escape(subtitle),
        "tiles": _tiles(step, history, times, gpu_memory),
        "growth": _growth(workspace / "validation"),
        "curves": _curves(history),
        "settings": _settings(opt),
        "times": _table([[name, _seconds(value), ""] for name, value in times.items()]),
        "files": _files(workspace),
        "data": json.dumps({"strip": strip, "mesh": shape}).replace("</", "<\\/"),
    }
    return write_page(workspace / "report.html", TEMPLATE.read_text(encoding="utf-8"), parts)


def _jpeg(picture: np.ndarray, side: int | None = None, quality: int = 85) -> str:
    """A picture as a data URL, no larger than `side` pixels."""
    from PIL import Image

    image = Image.fromarray(picture)
    if side is not None:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _strip(folder: Path, step: int) -> dict[str, Any] | None:
    """The turntable as one sheet of frames per kind."""
    from PIL import Image

    kinds, shape, columns = [], (0, 0, 0), 8
    for kind in media.KINDS:
        path = folder / f"step_{step:07d}_{kind}.mp4"
        if not path.is_file():
            continue
        small = []
        for frame in media.read_video(path, FRAMES):
            image = Image.fromarray(frame)
            image.thumbnail((FRAME_SIDE, FRAME_SIDE), Image.Resampling.LANCZOS)
            small.append(np.asarray(image))
        shape = (len(small), *small[0].shape[:2])
        kinds.append({"name": kind, "sheet": _jpeg(media.sheet(np.stack(small), columns))})
    if not kinds:
        return None
    count, height, width = shape
    columns = min(columns, count)
    return {"kinds": kinds, "count": count, "columns": columns, "width": width, "height": height}


def _mesh(path: Path, text: str | None) -> dict[str, Any] | None:
    """The mesh in a few bytes per vertex: positions as 16-bit fractions of its box, normals and colours as bytes."""
    if not path.is_file():
        return None
    try:
        mesh, title = read_glb(path)
    except ValueError:
        return None
    if title != text:
        return None
    faces, label = len(mesh.faces), f"{len(mesh.faces):,} faces"
    if faces > FACES:
        mesh, label = _lighter(mesh), f"{faces:,} faces (here {FACES:,})"
    low, high = mesh.vertices.min(0), mesh.vertices.max(0)
    size = np.maximum(high - low, 1e-6)

    def packed(values: np.ndarray, kind: type) -> str:
        padded = np.pad(np.round(values).astype(kind), ((0, 0), (0, 1)))  # WebGL likes rows of a multiple of 4 bytes
        return base64.b64encode(padded.tobytes()).decode()

    return {
        "positions": packed((mesh.vertices - low) / size * 65535, np.uint16),
        "normals": packed(mesh.normals * 127, np.int8),
        "colors": packed(np.clip(mesh.colors, 0, 1) * 255, np.uint8),
        "faces": base64.b64encode(mesh.faces.astype(np.uint32).tobytes()).decode(),
        "count": len(mesh.faces),
        "low": low.tolist(),
        "size": size.tolist(),
        "label": label,
    }


def _lighter(mesh: Mesh) -> Mesh:
    from scipy.spatial import cKDTree

    vertices, faces = decimate(mesh.vertices.astype(np.float64), mesh.faces, FACES)
    nearest = cKDTree(mesh.vertices).query(vertices)[1]
    return Mesh(vertices.astype(np.float32), faces, mesh.colors[nearest], vertex_normals(vertices, faces))


def _tiles(step: int, history: History, times: dict[str, float], gpu_memory: int | None) -> str:
    def last(name: str) -> float | None:
        return history[name][-1][1] if history.get(name) else None

    unit = 1 if sys.platform == "darwin" else 1024  # what getrusage counts in
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    facts = {"training": _seconds(times["training"]) if times.get("training") else None}
    facts["all together"] = _seconds(sum(times.values()))
    facts["steps per second"] = f"{step / times['training']:.1f}" if times.get("training") else None
    facts["memory"] = f"{peak / 1e9:.2f} GB"
    facts["GPU memory"] = f"{gpu_memory / 1e9:.2f} GB" if gpu_memory else None
    facts["mesh outline IoU"] = f"{last('mesh/iou'):.3f}" if last("mesh/iou") is not None else None
    facts["picture covered"] = f"{100 * last('alpha/mean'):.0f} %" if last("alpha/mean") is not None else None
    return "".join(
        f'<div class="card tile"><span>{name}</span><strong>{value}</strong></div>'
        for name, value in facts.items()
        if value
    )


def _growth(folder: Path) -> str:
    """The validation sheets, evenly chosen, the last one included."""
    from PIL import Image

    sheets = sorted(folder.glob("step_*_rgb.png"))
    if not sheets:
        return ""
    chosen = sorted({round(i * (len(sheets) - 1) / max(GROWTH - 1, 1)) for i in range(GROWTH)})
    rows = []
    for path in (sheets[i] for i in chosen):
        with Image.open(path) as image:
            picture = _jpeg(np.asarray(image.convert("RGB")), side=1400)
        step = int(path.name.split("_")[1])
        rows.append(
            f'<div><span>step {step}</span><img src="{picture}" alt="views from all around at step {step}"></div>'
        )
    return f'<h2>How it grew</h2><div class="card growth">{"".join(rows)}</div>'


def _curves(history: History) -> str:
    """One small chart per name with at least two values; names that hardly change are left out."""
    charts = []
    for name in sorted(history, key=_order):
        points = [(x, y) for x, y in history[name] if math.isfinite(y)]
        low, high = min((y for _, y in points), default=0.0), max((y for _, y in points), default=0.0)
        if len(points) > 1 and high - low > 1e-3 * max(abs(low), abs(high)):
            charts.append(_chart(name, points))
    if not charts:
        return '<p class="card tile">no curves: the run was too short</p>'
    return f'<div class="charts">{"".join(charts)}</div>'


def _order(name: str) -> tuple[int, str]:
    groups = ("loss", "guidance", "alpha", "grad_norm", "lr", "samples")
    group = name.split("/")[0]
    return (groups.index(group) if group in groups else len(groups), name)


def _chart(name: str, points: list[tuple[float, float]]) -> str:
    """An SVG line chart: steps below, three levels at the left; logarithmic if positive values span more than a factor of 30."""
    width, height, left, right, top, bottom = 320, 150, 48, 8, 10, 20
    if len(points) > 400:
        points = [points[i * len(points) // 400] for i in range(400)] + points[-1:]
    values = [y for _, y in points]
    log = min(values) > 0 and max(values) > 30 * min(values)
    scaled = [math.log10(y) for y in values] if log else values
    low, high = min(scaled), max(scaled)
    first, last = points[0][0], points[-1][0]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / max(last - first, 1e-9)
        up = (y - low) / max(high - low, 1e-12)
        return left + across * (width - left - right), height - bottom - up * (height - top - bottom)

    path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for (x, _), y in zip(points, scaled, strict=True))
    lines = []
    for share in (0.0, 0.5, 1.0):
        level = low + share * (high - low)
        y = place(first, level)[1]
        text = _number(10**level if log else level)
        lines.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text x="{left - 6}" y="{y + 3:.1f}" text-anchor="end">{text}</text>')
    for x, anchor in ((first, "start"), (last, "end")):
        lines.append(f'<text x="{place(x, low)[0]:.1f}" y="{height - 5}" text-anchor="{anchor}">{x:g}</text>')
    lines.append(f'<text x="{(left + width - right) / 2}" y="{height - 5}" text-anchor="middle">step</text>')
    x, y = place(points[-1][0], scaled[-1])
    scale = " · log" if log else ""
    return (
        f'<figure class="card"><figcaption>{html.escape(name)}<span>{_number(values[-1])}{scale}</span></figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(name)} over the steps">{"".join(lines)}'
        f'<polyline class="curve" points="{path}"/><circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/></svg></figure>'
    )


def _number(value: float) -> str:
    """Three digits, and never more than seven characters: 0.0123, 12.3, 123k, 1.2e-5."""
    size = abs(value)
    if size == 0 or 1e-3 <= size < 1e4:
        return f"{value:.3g}" if size < 1e3 else f"{value:.0f}"
    if size >= 1e9 or size < 1e-3:
        digits, exponent = f"{value:.1e}".split("e")
        return f"{digits}e{int(exponent)}"
    return f"{value / 1e6:.3g}M" if size >= 1e6 else f"{value / 1e3:.3g}k"


def _seconds(value: float) -> str:
    if value < 60:
        return f"{value:.1f} s"
    minutes = round(value) // 60
    return f"{minutes} min {round(value) % 60} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _settings(opt: Any) -> str:
    """What differs from the defaults with where it comes from, and the rest folded away."""
    from flags import FLAGS, convert, show

    changed, rest = [], []
    for name, flag in FLAGS.items():
        if not hasattr(opt, name):
            continue
        value, default = show(getattr(opt, name)), show(convert(flag, flag.default, name))
        row = [f"--{name}", value, opt.origins.get(name, "") if value != default else flag.help]
        (changed if value != default else rest).append(row)
    folded = f"<details><summary>{len(rest)} at their defaults</summary>{_table(rest)}</details>"
    return _table(changed) + folded


def _files(workspace: Path) -> str:
    told = {
        "results": "turntable videos, six views",
        "mesh": "the mesh, with vertex colours",
        "validation": "pictures during the training",
        "checkpoints": "the training, to go on from",
        "run": "tensorboard",
        "guidance": "what the prior saw",
        "config.yaml": "the settings: --workspace FOLDER --test restores them",
        "log.txt": "what the run said",
    }
    rows = []
    for name, what in told.items():
        path = workspace / name
        inside = (
            sorted(p for p in path.glob("*") if p.is_file() and not p.name.startswith(".")) if path.is_dir() else []
        )
        if not inside and not path.is_file():
            continue
        size = sum(p.stat().st_size for p in inside) if inside else path.stat().st_size
        shown = inside if name in ("results", "mesh") else []
        links = " ".join(f'<a href="{name}/{html.escape(p.name)}">{html.escape(p.name)}</a>' for p in shown)
        rows.append([f'<a href="{name}">{name}</a>', links or html.escape(what), f"{size / 1e6:.2f} MB"])
    where = f'<p class="bar">{html.escape(str(workspace.resolve()))}</p>'
    return _table(rows, escape=False).replace("</table>", f"</table>{where}")


def _table(rows: list[list[str]], escape: bool = True) -> str:
    cells = ["".join(f"<td>{html.escape(c) if escape else c}</td>" for c in row) for row in rows]
    return f'<div class="card"><table>{"".join(f"<tr>{row}</tr>" for row in cells)}</table></div>'
