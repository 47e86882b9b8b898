"""Pages that are complete in themselves: a template's places filled, in the style that they share (page.css)."""

from collections.abc import Mapping
from pathlib import Path

from files import atomic

STYLE = Path(__file__).with_name("page.css")


def write_page(path: Path, template: str, parts: Mapping[str, str]) -> Path:
    """Write the template with every {{name}} replaced by that part, and {{style}} by the shared style -> path; it appears whole.

    KeyError for a place that no part fills.
    """
    known = {"style": STYLE.read_text(encoding="utf-8"), **parts}
    first, *pieces = template.split("{{")
    filled = first + "".join(known[name] + rest for name, _, rest in (piece.partition("}}") for piece in pieces))
    with atomic(path) as beside:
        beside.write_text(filled, encoding="utf-8", errors="replace")
    return path
