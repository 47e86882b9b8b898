"""Files that appear whole or not at all."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from errors import UserError

_PART = re.compile(r"\..+\.(\d+)\.part(\..+)?")  # .NAME.PROCESS.part.SUFFIX: what `atomic` writes to
_DEPTH = 3  # folders below a workspace that this program writes into


def make_folder(folder: Path) -> Path:
    """Create `folder` and its parents and return it; UserError where that is not allowed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "not writable")
    except OSError as error:
        raise UserError(f"{folder}: cannot write there ({error.strerror}): choose another --workspace") from None
    return folder


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Hand out a path beside `path` to write to; when the block ends well it becomes `path`, else it is removed.

    The temporary name keeps the suffix, because encoders look at it. What is at `path` stays untouched until the new file lies complete on
    the disk. A full disk or a missing permission raises UserError.
    """
    path = Path(path)
    make_folder(path.parent)
    beside = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield beside
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too, must survive a power cut
        finally:
            os.close(folder)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}): free some space or change --workspace"
        ) from error
    finally:
        beside.unlink(missing_ok=True)


def put_between(text: str, marks: tuple[str, str], content: str, place: str = "the file") -> str:
    """The text with `content` between its two marks. Raises UserError if it has not exactly one of each, in order."""
    begin, end = marks
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UserError(f'{place}: needs one line "{begin}" and below it one line "{end}", for the table to go between')
    before, after = text.index(begin) + len(begin), text.index(end)
    return f"{text[:before]}\n\n{content.strip()}\n\n{text[after:]}"


def fill(path: Path, marks: tuple[str, str], content: str) -> None:
    """Put `content` between the marks of a text file. UserError if it cannot be read or written, or has no such marks."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {path}: cannot be read ({error.strerror})") from None
    whole = put_between(text, marks, content, f"--out {path}")
    with atomic(path) as beside:
        beside.write_text(whole, encoding="utf-8")


def is_mesh_file(path: str | None) -> bool:
    """Whether this is the name of a mesh file, by its ending."""
    return path is not None and path.lower().endswith((".obj", ".ply", ".glb", ".gltf", ".stl", ".off"))


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Inside the block no other process may claim `folder`; UserError if one has. The claim dies with its owner.

    What a killed owner left half-written is removed. Where the system has no such locks nothing happens.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    try:
        file = open(make_folder(folder) / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - closed below
    except OSError as error:
        raise UserError(
            f"{folder}: cannot write there ({error.strerror}): free some space or change --workspace"
        ) from None
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UserError(
                f"--workspace {folder}: another run is at work there (process {file.read().strip() or 'unknown'}); "
                "wait for it, or choose another --workspace"
            ) from None
        _sign(file)
        remove_halves(folder)
        yield
    finally:
        file.close()


def _sign(file: IO[str]) -> None:
    """Write who has claimed the folder, for the one who comes second. The claim holds without it, on a full disk for one."""
    try:
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), f"{os.getpid()}\n".encode())
    except OSError:
        pass


def remove_halves(folder: Path) -> list[Path]:
    """Delete what processes that are gone left half-written (`atomic`) in `folder` and the folders of a run below it; returns what went."""
    gone = []
    for place, below, names in os.walk(folder):
        if len(Path(place).relative_to(folder).parts) >= _DEPTH:
            below.clear()
        for name in names:
            half = _PART.fullmatch(name)
            if half and not _alive(int(half[1])):
                path = Path(place) / name
                try:
                    path.unlink()
                except OSError:  # somebody else's; it does no harm
                    continue
                gone.append(path)
    return gone


def _alive(process: int) -> bool:
    if process == os.getpid():  # whose number this once was as well: nothing is being written yet
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return True
